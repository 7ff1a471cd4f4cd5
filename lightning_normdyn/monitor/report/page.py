"""One HTML file about one or several runs: pictures, comparisons, and the table of all layers.

The file needs no network and no server; it may be mailed. The page is the template ``page.html``
beside this file. Everything that comes from a run is escaped, and the page's own security policy
allows no script but its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.quantities import monitored
from lightning_normdyn.storage import replacing

from .document import rendered
from .stills import Limits, common_limits, pictures_of, pictures_of_all
from .summary import COLUMNS, side_by_side


def write_report(
    runs: Mapping[str, History],
    path: str | os.PathLike[str],
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write one self-contained HTML file about one or several runs.

    Args:
        runs: histories by label.
        path: of the HTML file; an older one is replaced only when the new one is complete.
        say: is told what is being drawn.

    Returns:
        the path.

    Raises:
        NormDynError: where there is no run, a run has nothing to show, or matplotlib is missing.
    """
    # All that can be refused is refused before minutes of drawing.
    if not runs:
        raise NormDynError("a report needs at least one run, got none.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise NormDynError(
            "a report needs matplotlib; `pip install 'lightning-normdyn[plot]'`."
        ) from error

    several = len(runs) > 1
    layers = side_by_side(runs)
    compared = list(pictures_of_all(runs, say)) if several else []
    limits = common_limits(runs)
    sections = []
    for label, history in runs.items():
        say(f"drawing {label}")
        sections.append(_section(label, history, limits))

    # A single run needs no column that says which it is.
    columns = COLUMNS if several else COLUMNS[1:]
    page = rendered(
        "page.html",
        title=", ".join(runs),
        columns=columns,
        layers=layers,
        compared=compared,
        sections=sections,
    )
    with replacing(path) as file:
        # A name may hold half of a surrogate pair, which UTF-8 cannot express.
        file.write(page.encode("utf-8", errors="replace"))
    return Path(path)


def _section(label: str, history: History, limits: Limits) -> dict[str, Any]:
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
    about = {"last record": others, **history.meta}
    if forecasts:
        # It stands on the page already.
        del about["forecast"]
    return {
        "label": label,
        "facts": facts,
        "note": history.meta.get("note", ""),
        "forecasts": forecasts,
        "pictures": list(pictures_of(label, history, limits)),
        # default=str: a report is for reading, and `meta` may hold what JSON cannot express.
        "details": json.dumps(
            about,
            indent=1,
            default=str,
            ensure_ascii=False,
        ),
    }


def _forecasts(history: History) -> list[str]:
    """What the monitor has said of where norms will go: at the start, and with what the run has
    shown."""
    known = history.meta.get("forecast")
    # A file from elsewhere may hold anything there.
    if not isinstance(known, dict):
        return []
    return [text for text in (known.get("start"), known.get("end")) if isinstance(text, str)]
