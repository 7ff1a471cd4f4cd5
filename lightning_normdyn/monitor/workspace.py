"""A W&B workspace for weight dynamics: the overview first, then a panel with all layers for each
quantity of the table.

An optional extra: ``pip install 'lightning-normdyn[workspace]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_normdyn.errors import NormDynError

from .curves import numbered
from .quantities import OVERVIEW, QUANTITIES, Quantity, drawn_with, monitored, shown_in

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


# Where WandbLogger logs the step of the Trainer; W&B's own step counts calls.
X_AXIS = "trainer/global_step"


def wandb_workspace(
    entity: str,
    project: str,
    *,
    name: str = "Weight dynamics",
    layers: Sequence[str] = (),
) -> Workspace:
    """Lay out a workspace that shows every run of a project, with any number of layers and without
    a click.

    W&B's own page sorts sections by name. Here the overview comes first, where runs that differ in
    their method (weight decay, AWS, WRS) overlay; then the pictures and tables; then a section for
    each quantity with the curves of all layers. Sections of what loggers get by name only
    (``NormDynamicsMonitor(quantities=[...])``) are at the end, and closed. Nothing is sent until
    you call ``save()``, which needs a login (``wandb login``, or ``WANDB_API_KEY``).

    Args:
        entity: the W&B user or team.
        project: the project that the runs are in.
        name: what to call the workspace.
        layers: names of the layers in the order of the network, e.g.
            ``list(load_history("history.npz").meta["targets"])``: their curves are then listed in
            that order, with zero-padded numbers. Without, panels find the layers of any run by
            pattern, in W&B's own order.

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
    of_overview = f"^{OVERVIEW}/({{}})$"
    compared = [_pattern_panel(QUANTITIES[name], of_overview) for name in shown_in("comparison")]
    sections = [
        ws.Section(name="Overview", panels=compared, is_open=True),
        ws.Section(name="Layers at a glance", panels=_glance(), is_open=True),
    ]
    wide = ws.SectionLayoutSettings(columns=1, rows=1)
    # What every run has comes before what was asked for by name.
    ordered = sorted(monitored(), key=lambda quantity: not quantity.logged)
    for quantity in ordered:
        # A prediction stands in the panel of what it predicts, so it has no section of its own.
        if quantity.drawn_with:
            continue
        section = ws.Section(
            name=quantity.title,
            panels=[_panel_of_layers(quantity, layers)],
            is_open=quantity.logged,
            layout_settings=wide,
        )
        sections.append(section)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=X_AXIS),
    )


def _glance() -> list[Any]:
    """The table of layers, and the pictures in which the layer that is off is a row or a line."""
    from wandb_workspaces.reports.v2.interface import MediaBrowser, WeavePanelSummaryTable

    maps = [f"normdyn_pictures/heat_map_{name}" for name in shown_in("map")]
    curves = [f"normdyn_pictures/{name}" for name in shown_in("curves")]
    return [
        WeavePanelSummaryTable(table_name="normdyn_tables/layers"),
        MediaBrowser(title="Layer by step", media_keys=maps),
        MediaBrowser(title="All layers", media_keys=curves),
    ]


def _panel_of_layers(quantity: Quantity, layers: Sequence[str]) -> Any:
    """The curves of all layers, and of what is drawn with them."""
    if not layers:
        # No list of keys: a pattern also finds the layers of runs that do not exist yet.
        return _pattern_panel(quantity, "^({})/")
    numbers = numbered(layers)
    titles = {}
    for companion in drawn_with(quantity.name):
        for layer in layers:
            titles[f"{companion}/{layer}"] = f"{numbers[layer]} {layer}"
    return _line_plot(quantity, y=list(titles), line_titles=titles)


def _pattern_panel(quantity: Quantity, pattern: str) -> Any:
    """The curves of a quantity and of those that are drawn with it.

    Args:
        quantity: whose title and axis the panel has.
        pattern: of the log keys, with ``{}`` for the names.
    """
    names = "|".join(drawn_with(quantity.name))
    return _line_plot(quantity, y=[], metric_regex=pattern.format(names))


def _line_plot(quantity: Quantity, **lines: Any) -> Any:
    from wandb_workspaces.reports.v2.interface import LinePlot

    titles = [QUANTITIES[name].title for name in drawn_with(quantity.name)]
    return LinePlot(
        title=", ".join(titles),
        title_y=quantity.axis,
        x=X_AXIS,
        log_y=quantity.scale != "linear",
        **lines,
    )
