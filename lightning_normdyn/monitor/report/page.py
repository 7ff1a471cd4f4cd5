"""One HTML file about one or several runs: what to look at first, charts, comparisons, and the
table of all layers.

The file needs no network and no server; it may be mailed. The page is the template ``page.html``
beside this file, made of the blocks in ``blocks.html``. Everything that comes from a run is
escaped, and the page's own security policy allows no script but its own and plotly's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor import group_sizes
from lightning_normdyn.monitor.events import LR_DROP, happenings
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.quantities import monitored
from lightning_normdyn.storage import replacing

from .charts import MOST_POINTS, compared_data, run_data
from .document import plotly_script, rendered
from .sparkline import sparkline
from .standouts import in_one_sentence, like, standouts
from .stills import common_limits, pictures_of, pictures_of_all, ridge_of
from .summary import COLUMNS, LayerSummary, side_by_side, summaries

WIDTH = 100
"""Characters of a line of a table that stands on the page as text."""
NOT_INSTALLED = (
    "Plotly is not installed, so this page is still. For one to hover, zoom and pick layers in: "
    "pip install 'lightning-normdyn[report]'."
)
"""What a page says, and who writes it, where it could not be interactive."""

_ASKED_FOR = "This page is still, as was asked for."
_THINNED = (
    f"Curves of many records are thinned for drawing, to {MOST_POINTS:,} points in a chart: of "
    f"each stretch the smallest and the largest value are kept."
)
_LEADS = {
    True: "To look at first:",
    False: "Nothing stands out. The layers that are farthest from what is expected or from the "
    "others:",
}


def write_report(
    runs: Mapping[str, History],
    path: str | os.PathLike[str],
    say: Callable[[str], None] = lambda text: None,
    *,
    still: bool = False,
) -> Path:
    """Write one self-contained HTML file about one or several runs.

    With plotly the page is interactive and takes about 2 MB, nearly all of it plotly's script.
    Without it, and with ``still``, its charts are pictures.

    Args:
        runs: histories by label.
        path: of the HTML file; an older one is replaced only when the new one is complete.
        say: is told what is being drawn.
        still: pictures in place of interactive charts: a page of some hundred kB for mails, and
            for readers without JavaScript.

    Returns:
        the path.

    Raises:
        NormDynError: where there is no run, a run has nothing to show, or what draws it is
            missing: matplotlib, and for an interactive page plotly.
    """
    # All that can be refused is refused before minutes of drawing.
    if not runs:
        raise NormDynError("a report needs at least one run, got none.")
    interactive = not still and can_interact()
    if not interactive and not can_draw():
        raise NormDynError(
            "a report needs plotly or matplotlib; `pip install 'lightning-normdyn[report]'`, or "
            "`pip install 'lightning-normdyn[plot]'` for one with still pictures."
        )

    layers = {label: summaries(label, history) for label, history in runs.items()}
    rows = _rows(runs, layers)
    sections = []
    for number, (label, history) in enumerate(runs.items()):
        first = _first_of_all(history, layers[label], number)
        sections.append({**_section(label, history), **first})
    if interactive:
        compared, data = _with_charts(sections, runs, layers, say)
    else:
        compared, data = _with_pictures(sections, runs, say), None

    # A single run needs no column that says which it is.
    columns = COLUMNS if len(runs) > 1 else COLUMNS[1:]
    page = rendered(
        "page.html",
        interactive=interactive,
        data=data,
        title=", ".join(runs),
        columns=columns,
        rows=rows,
        compared=compared,
        sections=sections,
        thinning=_THINNED,
        still=_ASKED_FOR if still else NOT_INSTALLED,
    )
    with replacing(path) as file:
        # A name may hold half of a surrogate pair, which UTF-8 cannot express.
        file.write(page.encode("utf-8", errors="replace"))
    return Path(path)


def can_interact() -> bool:
    """Whether plotly is installed."""
    return plotly_script() is not None


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _with_charts(
    sections: Sequence[dict[str, Any]],
    runs: Mapping[str, History],
    layers: Mapping[str, Sequence[LayerSummary]],
    say: Callable[[str], None],
) -> tuple[list[Any], dict[str, Any]]:
    """Give each section the charts of its run; returns those of the comparison, and the data of
    all."""
    limits = common_limits(runs)
    data = []
    for section, (label, history) in zip(sections, runs.items(), strict=True):
        say(f"drawing {label}")
        names = [layer.name for layer in layers[label]]
        own = run_data(history, names, limits)
        section["charts"] = own["charts"]
        section["events"] = _events_in_words(history)
        # Hills that overlap have no interactive chart. What matplotlib alone draws is left out
        # where it is missing: the page is complete without it.
        section["pictures"] = []
        if can_draw():
            section["pictures"] += ridge_of(label, history)
        data.append(own)

    compared = compared_data(runs)
    return compared, {"runs": data, "compared": compared}


def _with_pictures(
    sections: Sequence[dict[str, Any]], runs: Mapping[str, History], say: Callable[[str], None]
) -> list[Any]:
    """Give each section the pictures of its run; returns those of the comparison."""
    limits = common_limits(runs)
    for section, (label, history) in zip(sections, runs.items(), strict=True):
        say(f"drawing {label}")
        section["pictures"] = list(pictures_of(label, history, limits))
    return list(pictures_of_all(runs, say))


def _rows(
    runs: Mapping[str, History], layers: Mapping[str, Sequence[LayerSummary]]
) -> list[tuple[LayerSummary, int, int]]:
    """The layers of all runs as rows of the table, each with the places of its run and of itself
    in it, by which its curves are found."""
    places = {}
    for number, label in enumerate(layers):
        for place, layer in enumerate(layers[label]):
            places[label, layer.name] = (number, place)
    rows = []
    for layer in side_by_side(runs, layers):
        number, place = places[layer.run, layer.name]
        rows.append((layer, number, place))
    return rows


def _first_of_all(
    history: History,
    layers: Sequence[LayerSummary],
    number: int,
) -> dict[str, Any]:
    """What stands on top of the page about one run: a sentence about all layers, and the ones to
    look at."""
    places = {layer.name: place for place, layer in enumerate(layers)}
    cards = []
    is_any_off = False
    for standout in standouts(history, layers):
        name = standout.layer.name
        spark = sparkline(history, name, like(standout.layer, layers))
        # By its run and place, the script finds the curves of a card as it does those of a row.
        card = {"standout": standout, "run": number, "place": places[name], "spark": spark}
        cards.append(card)
        is_any_off = is_any_off or standout.is_off
    return {
        "sentence": in_one_sentence(history, layers),
        "lead": _LEADS[is_any_off],
        "cards": cards,
    }


def _section(label: str, history: History) -> dict[str, Any]:
    """What the page says of one run."""
    first, last = history[0], history[-1]
    facts = f"{len(history)} records from step {first['step']} to {last['step']}."
    # Logs other than a history do not count optimizer steps apart.
    if last["optimizer_step"] != last["step"]:
        facts += f" {last['optimizer_step']} optimizer steps."
    # A file from elsewhere may hold anything there.
    if isinstance(history.meta.get("kernels"), str):
        facts += f" Kernels: {history.meta['kernels']}."

    # What no picture shows is given as the numbers of the last record.
    drawn = {quantity.name for quantity in monitored() if quantity.places or quantity.drawn_with}
    others = {key: value for key, value in last.items() if key.split("/")[0] not in drawn}
    del others["step"], others["optimizer_step"]
    forecasts = _forecasts(history)
    sizes = group_sizes.as_text(list(group_sizes.from_plain(history.meta.get("groups"))), WIDTH)
    about = {"last record": others, **history.meta}
    # These stand on the page already.
    for key, told in (("forecast", forecasts), ("groups", sizes)):
        if told:
            del about[key]
    return {
        "label": label,
        "facts": facts,
        "note": history.meta.get("note", ""),
        "forecasts": [*forecasts, sizes] if sizes else forecasts,
        # default=str: a report is for reading, and `meta` may hold what JSON cannot express.
        "details": json.dumps(
            about,
            indent=1,
            default=str,
            ensure_ascii=False,
        ),
    }


def _events_in_words(history: History) -> str:
    """What the vertical lines of the charts are."""
    said = []
    for told in happenings(history):
        lines = "Dotted"
        if told.kind == LR_DROP:
            lines = "Dashed"
        when = f"at step {told.steps[0]}"
        if len(told.steps) > 1:
            when = f"{len(told.steps)} times, at steps {told.steps[0]} to {told.steps[-1]}"
        said.append(f"{lines}: {told.words}, {when}.")
    return " ".join(said)


def _forecasts(history: History) -> list[str]:
    """What the monitor has said of where norms will go: at the start, and with what the run has
    shown."""
    known = history.meta.get("forecast")
    # A file from elsewhere may hold anything there.
    if not isinstance(known, dict):
        return []
    return [text for text in (known.get("start"), known.get("end")) if isinstance(text, str)]
