"""A page that holds runs against the first of them: ratios of angles and pulls, weight by weight,
and the sizes of weights and steps by param group.

One HTML file that needs no network; its script only sorts tables, and everything that comes from a
run is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor import group_sizes
from lightning_normdyn.monitor.group_sizes import GroupSizes
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.run_ratios import (
    LEGEND,
    MEDIAN,
    RunRatios,
    WeightRatios,
    as_text,
    cells_of,
    heads,
    run_ratios,
)
from lightning_normdyn.storage import replacing
from lightning_normdyn.theory.words import AS_EXPECTED

from .document import rendered


class Cell(NamedTuple):
    """A cell of a table.

    Args:
        text: what stands in it.
        style: classes that the page's style knows.
        number: what a column is sorted by; None for text, and where there is none.
    """

    text: str
    style: str = ""
    number: float | None = None


class Compared(NamedTuple):
    """A run against the first one.

    Args:
        title: which run is over which.
        ratios: of their weights.
    """

    title: str
    ratios: RunRatios


def compared_runs(runs: Mapping[str, History]) -> list[Compared]:
    """Every other run over the first one.

    Args:
        runs: histories by label.

    Raises:
        NormDynError: where there is one run only, or no weight in common.
    """
    (first, base), *others = runs.items()
    if not others:
        raise NormDynError(
            f"a comparison needs at least two runs, got `{first}` alone; name those to hold "
            f"against it, too."
        )
    compared = []
    for label, history in others:
        try:
            ratios = run_ratios(history, base)
        except NormDynError as error:
            raise NormDynError(f"`{label}` over `{first}`: {error}") from error
        compared.append(Compared(f"{label} over {first}", ratios))
    return compared


def comparison_text(
    compared: Sequence[Compared], runs: Mapping[str, History], width: int | None = None
) -> str:
    """The same in a terminal.

    Args:
        compared: from `compared_runs`.
        runs: histories by label.
        width: columns of the terminal; None: what the terminal has.
    """
    tables = [as_text(each.title, each.ratios, width) for each in compared]
    tables.append(group_sizes.of_runs_as_text(_group_sizes(runs), width))
    return "\n".join(filter(None, tables))


def _group_sizes(runs: Mapping[str, History]) -> dict[str, list[GroupSizes]]:
    """What each run noted of its param groups."""
    sizes = {}
    for label, history in runs.items():
        sizes[label] = list(group_sizes.from_plain(history.meta.get("groups")))
    return sizes


def write_comparison(
    compared: Sequence[Compared], runs: Mapping[str, History], path: str | os.PathLike[str]
) -> Path:
    """Write the page.

    Args:
        compared: from `compared_runs`.
        runs: histories by label.
        path: of the HTML file; an older one is replaced only when the new one is complete.

    Returns:
        the path.
    """
    low, high = AS_EXPECTED
    page = rendered(
        "ratios.html",
        interactive=False,
        title=f"Runs compared: {', '.join(runs)}",
        sections=[_section(each) for each in compared],
        legend=LEGEND,
        low=low,
        high=high,
        groups=_groups(runs),
        groups_heads=_heads(["run", *group_sizes.COLUMNS[:2]], group_sizes.COLUMNS[2:]),
        groups_legend=group_sizes.ABOUT,
    )
    with replacing(path) as file:
        # A name may hold half of a surrogate pair, which UTF-8 cannot express.
        file.write(page.encode("utf-8", errors="replace"))
    return Path(path)


def _section(compared: Compared) -> dict[str, Any]:
    ratios = compared.ratios
    return {
        "title": compared.title,
        "heads": _heads(["weight"], heads()),
        "rows": [_row(weight.name, weight) for weight in ratios.farthest_first],
        "last": [_row(MEDIAN, ratios.medians)] if len(ratios.weights) > 1 else [],
        "left_out": ratios.left_out,
    }


def _heads(texts: Sequence[str], numbers: Sequence[str]) -> list[Cell]:
    return [*map(Cell, texts), *map(Cell, numbers, repeat("number"))]


def _row(name: str, weight: WeightRatios) -> list[Cell]:
    low, high = AS_EXPECTED
    cells = [Cell(name, "name")]
    ratios = (*weight.angles, *weight.pulls)
    for ratio, text in zip(ratios, cells_of(weight), strict=True):
        style = "number"
        if ratio is not None and ratio > high:
            style = "number off"
        elif ratio is not None and ratio < low:
            style = "number less"
        cells.append(Cell(text, style, ratio))
    return cells


def _groups(runs: Mapping[str, History]) -> list[list[Cell]]:
    """The rows of all runs, below each other."""
    rows = []
    for label, sizes in _group_sizes(runs).items():
        for row in sizes:
            group, kind, *texts = group_sizes.cells_of(row)
            numbers = map(Cell, texts, repeat("number"), row[2:])
            rows.append([Cell(label, "name"), Cell(group), Cell(kind), *numbers])
    return rows
