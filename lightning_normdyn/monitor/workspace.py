"""A W&B workspace for weight dynamics: one panel per quantity with all layers, chosen by pattern.

An optional extra: ``pip install 'lightning-normdyn[workspace]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_normdyn.errors import NormDynError

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


class _Panel(NamedTuple):
    title: str
    pattern: str
    logarithmic: bool


# A prediction stands in the panel of what it predicts.
_LAYERS = (
    _Panel("Effective learning rate, η/‖w‖", "^effective_lr/", True),
    _Panel("Learning rate of the direction, η/‖w‖²", "^direction_lr/", True),
    _Panel(
        "Angular update and prediction (radians per step)", "^(equilibrium_)?angular_update/", True
    ),
    _Panel("Angular update over its prediction", "^equilibrium_ratio/", True),
    _Panel("Weight norm", "^weight_norm/", True),
    _Panel("Weight standard deviation", "^weight_std/", True),
    _Panel("Effective step size (chord per step)", "^effective_step_size/", True),
    _Panel("Equivalent weight decay of AWS", "^equivalent_weight_decay/", True),
    _Panel("Gradient-weight cosine", "^gradient_cosine/", False),
    _Panel("Radial update (per step)", "^radial_update/", False),
)
_OVERVIEW = (
    _Panel("Effective learning rate", "^normdyn/effective_lr$", True),
    _Panel("Learning rate of the direction", "^normdyn/direction_lr$", True),
    _Panel("Angular update and prediction", "^normdyn/(equilibrium_)?angular_update$", True),
    _Panel("Angular update over its prediction", "^normdyn/equilibrium_ratio$", True),
    _Panel("Weight norm", "^normdyn/weight_norm$", True),
    _Panel(
        "Skipped, clamped, collapsed",
        "^normdyn/(skipped_steps|clamped_vectors|collapsed_vectors)$",
        False,
    ),
)
X_AXIS = "trainer/global_step"


def wandb_workspace(entity: str, project: str, *, name: str = "Weight dynamics") -> Workspace:
    """Lay out a workspace that shows every run of a project, with any number of layers and without
    a click.

    The curves are those of `NormDynamicsMonitor`; runs that differ in their method (weight decay,
    AWS, WRS) overlay in the section
    "Overview". Nothing is sent until you call ``save()``, which needs a login (``wandb login``, or
    ``WANDB_API_KEY``).

    Args:
        entity: the W&B user or team.
        project: the project that the runs are in.
        name: what to call the workspace.

    Raises:
        NormDynError: if wandb-workspaces is not installed.

    Example:
        ::

            workspace = wandb_workspace("my-team", "normdyn")
            workspace.save()  # prints where it is
    """
    try:
        from wandb_workspaces import workspaces as ws
    except ImportError as error:
        raise NormDynError(
            f"a workspace needs wandb-workspaces ({error}). `pip install "
            f"'lightning-normdyn[workspace]'`."
        ) from error
    wide = ws.SectionLayoutSettings(columns=1, rows=1)
    layers = [
        ws.Section(name=panel.title, panels=[_line_plot(panel)], is_open=True, layout_settings=wide)
        for panel in _LAYERS
    ]
    overview = ws.Section(
        name="Overview", panels=[_line_plot(panel) for panel in _OVERVIEW], is_open=True
    )
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[overview, *layers],
        settings=ws.WorkspaceSettings(x_axis=X_AXIS),
    )


def _line_plot(panel: _Panel) -> Any:
    from wandb_workspaces.reports.v2.interface import LinePlot

    return LinePlot(
        title=panel.title, x=X_AXIS, y=[], metric_regex=panel.pattern, log_y=panel.logarithmic
    )
