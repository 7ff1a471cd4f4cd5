"""A W&B workspace for weight dynamics: one panel per quantity of the table, with all layers, chosen
by pattern.

An optional extra: ``pip install 'lightning-normdyn[workspace]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_normdyn.errors import NormDynError

from .quantities import QUANTITIES, Quantity, drawn_with, monitored, shown_in

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


# Where WandbLogger logs the step of the Trainer; W&B's own step counts calls.
X_AXIS = "trainer/global_step"


def wandb_workspace(entity: str, project: str, *, name: str = "Weight dynamics") -> Workspace:
    """Lay out a workspace that shows every run of a project, with any number of layers and without
    a click.

    The curves are those of `NormDynamicsMonitor`; runs that differ in their method (weight decay,
    AWS, WRS) overlay in the section "Overview". Nothing is sent until you call ``save()``, which
    needs a login (``wandb login``, or ``WANDB_API_KEY``).

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
        # Imported only here: the package is an optional extra.
        from wandb_workspaces import workspaces as ws
    except ImportError as error:
        raise NormDynError(
            f"a workspace needs wandb-workspaces ({error}). `pip install "
            f"'lightning-normdyn[workspace]'`."
        ) from error
    wide = ws.SectionLayoutSettings(columns=1, rows=1)
    # A prediction stands in the panel of what it predicts, so it has no section of its own.
    sections = []
    for quantity in monitored():
        if not quantity.drawn_with:
            panel = _panel(quantity, "^({})/")
            section = ws.Section(
                name=quantity.title, panels=[panel], is_open=True, layout_settings=wide
            )
            sections.append(section)
    compared = [_panel(QUANTITIES[name], "^normdyn/({})$") for name in shown_in("comparison")]
    overview = ws.Section(name="Overview", panels=compared, is_open=True)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[overview, *sections],
        settings=ws.WorkspaceSettings(x_axis=X_AXIS),
    )


def _panel(quantity: Quantity, pattern: str) -> Any:
    """The curves of a quantity and of those that are drawn with it.

    Args:
        quantity: whose title and axis the panel has.
        pattern: of the log keys, with ``{}`` for the names.
    """
    from wandb_workspaces.reports.v2.interface import LinePlot

    names = drawn_with(quantity.name)
    titles = [QUANTITIES[name].title for name in names]
    return LinePlot(
        title=", ".join(titles),
        title_y=quantity.axis,
        x=X_AXIS,
        # No list of keys: a pattern also finds the layers of runs that do not exist yet.
        y=[],
        metric_regex=pattern.format("|".join(names)),
        log_y=quantity.scale != "linear",
    )
