"""How large weights and steps of each param group are: a table that may be held beside those of
other optimizers, widths and runs.

Numbers per entry do not depend on the size of a matrix, and an update over the learning rate does
not depend on the schedule: 0.23 is pure noise under AdamW, in a layer of any width. From the
windows of `lightning_normdyn.monitor.measured_balance`, which are on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf, isfinite, nan, sqrt
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.optim import Optimizer

from lightning_normdyn.engine.plan import Target
from lightning_normdyn.optimizers.recognition import class_for_predictions
from lightning_normdyn.optimizers.step_response import own_response
from lightning_normdyn.optimizers.step_rules import Subject
from lightning_normdyn.tables import paragraph, render
from lightning_normdyn.theory.growth import noise_energy

from .balance import BalanceWindow, Point
from .measure import StepGauge
from .measured_balance import Balance

MOST_GROUPS = 12
"""Rows that are printed: a layer-wise learning rate makes hundreds of groups."""

ABOUT = (
    "RMS: of an entry of a weight at its last row, and of a step over the learning rate, what "
    "points along the weight left out; noise: the same of a step if gradients were noise. rad/step "
    "and balanced (the angle at which decay would hold norms, with the coherence that the steps "
    "have shown) are medians over weights."
)

COLUMNS = (
    "group",
    "invariant",
    "weights",
    "RMS weight",
    "RMS update",
    "noise",
    "rad/step",
    "balanced",
)

UNKNOWN = "-"


class GroupSizes(NamedTuple):
    """The weights of one param group that are scale-invariant at the same granularity; None where
    nobody can tell.

    Args:
        group: what tables call the param group.
        kind: at which granularity: "filter", "group", "layer", "partly", "no", "unknown".
        weights: how many weights they are.
        rms_weight: root mean square of their entries, at the newest row.
        rms_update: root mean square of the entries of a step over the learning rate, without the
            part along the weight; over the newer half of a weight's window.
        rms_of_noise: what that would be if gradients were noise.
        angle: median of the weights' RMS angles over their windows, rad/step.
        balanced: median of the angles at which decay would hold their norms.
    """

    group: str
    kind: str
    weights: int
    rms_weight: float | None
    rms_update: float | None
    rms_of_noise: float | None
    angle: float | None
    balanced: float | None


def group_names(optimizers: Sequence[Optimizer]) -> list[list[str]]:
    """What tables call the param groups of each optimizer: as few numbers as tell them apart.

    Example:
        >>> from torch import nn
        >>> weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
        >>> group_names([torch.optim.SGD([{"params": [weight]} for weight in weights])])
        [['SGD 0', 'SGD 1']]
    """
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    names_of_all = []
    for index, optimizer in enumerate(optimizers):
        name = kinds[index]
        if kinds.count(name) > 1:
            name = f"{name}-{index}"
        names = [name]
        count = len(optimizer.param_groups)
        if count > 1:
            names = [f"{name} {place}" for place in range(count)]
        names_of_all.append(names)
    return names_of_all


def group_sizes(
    optimizers: Sequence[Optimizer],
    gauges: Mapping[int, StepGauge],
    balances: Mapping[str, Balance],
) -> list[GroupSizes]:
    """The table of a run so far.

    Args:
        optimizers: those that step.
        gauges: by place of the optimizer among them.
        balances: by weight.
    """
    names = group_names(optimizers)
    rows = []
    for index, gauge in gauges.items():
        # An optimizer that came later has no name.
        if index >= len(names):
            continue
        for (place, kind), targets in _alike(gauge).items():
            sizes = []
            for target in targets:
                balance = balances.get(target.name)
                # A weight without a gradient was never measured.
                if balance is not None and balance.newest is not None:
                    sizes.append(_sizes_of(gauge, target, balance.newest, balance.window))
            if sizes:
                rows.append(_row(names[index][place], kind, sizes))
    return rows


def _alike(gauge: StepGauge) -> dict[tuple[int, str], list[Target]]:
    """Weights by the place of their param group and by granularity."""
    plan = gauge.plan
    # By identity: groups may be equal.
    places = {id(group): place for place, group in enumerate(plan.optimizer.param_groups)}
    alike: dict[tuple[int, str], list[Target]] = {}
    for target, group in zip(plan.targets, plan.groups_of(plan.targets), strict=True):
        # A view of an optimizer may show other dictionaries each time.
        if id(group) in places:
            alike.setdefault((places[id(group)], target.verdict.kind), []).append(target)
    return alike


class _Sizes(NamedTuple):
    """One weight; NaN where nobody can tell.

    Args:
        entries: numbers in it.
        squared_norm: at the newest row.
        energy: squared length of a step at right angles to it, over lr².
        of_noise: the same of noise.
        angle: RMS over its window.
        balanced: the angle at which decay would hold its norm.
    """

    entries: int
    squared_norm: float
    energy: float
    of_noise: float
    angle: float
    balanced: float


def _sizes_of(
    gauge: StepGauge,
    target: Target,
    newest: Point,
    window: BalanceWindow,
) -> _Sizes:
    entries = gauge.entries[target.name]
    # Rounding alone turns a weight of 16 bits by 2.5e-3 in a step.
    if target.weight.dtype in (torch.bfloat16, torch.float16):
        return _Sizes(entries, newest.squared_norm, nan, nan, nan, nan)
    angle = balanced = nan
    span = window.whole
    if span is not None:
        angle = sqrt(span.angles / span.steps)
        # Before enough was turned, a coherence is noise.
        is_sure = window.newest_span(entries) is not None
        if is_sure and span.coherence > 0 and span.pulls > 0:
            balanced = sqrt(2 * span.pulls / span.steps / span.coherence)
    return _Sizes(
        entries,
        newest.squared_norm,
        _energy(window.points),
        _energy_of_noise(gauge, target, entries),
        angle,
        balanced,
    )


def _energy(points: Sequence[Point]) -> float:
    """That of steps, averaged over the newer half of a window: the older one may be a warm-up."""
    newer = points[len(points) // 2 :]
    known = [point.energy for point in newer if isfinite(point.energy)]
    # Under a rate of 0 there is none.
    return fmean(known) if known else nan


def _energy_of_noise(
    gauge: StepGauge,
    target: Target,
    entries: int,
) -> float:
    (group,) = gauge.plan.groups_of([target])
    kind = class_for_predictions(gauge.plan.optimizer)
    response = own_response(kind, group, Subject(target.matrix))
    # Of steps in proportion to gradients, only these tell the size.
    if response is None or not response.normalized:
        return nan
    energy = noise_energy(response, np.array([entries], dtype=np.float64), None)
    # A normalized step asks for no size of gradients.
    assert energy is not None
    return float(energy[0])


def _row(
    group: str,
    kind: str,
    sizes: Sequence[_Sizes],
) -> GroupSizes:
    entries, norms, energies, of_noise, angles, balanced = zip(*sizes, strict=True)
    return GroupSizes(
        group,
        kind,
        len(sizes),
        _rms(norms, entries),
        _rms(energies, entries),
        _rms(of_noise, entries),
        _median(angles),
        _median(balanced),
    )


def _rms(squares: Sequence[float], entries: Sequence[int]) -> float | None:
    """Of all entries together, from sums of squares; None where no sum is known."""
    total, count = 0.0, 0
    for square, number in zip(squares, entries, strict=True):
        # What one weight does not tell is not taken from the others either.
        if isfinite(square):
            total += square
            count += number
    return sqrt(total / count) if count else None


def _median(values: Sequence[float]) -> float | None:
    known = list(filter(isfinite, values))
    # The median, since one weight far off is a finding, and no size of the group.
    return median(known) if known else None


# -- told, and kept


def as_text(rows: Sequence[GroupSizes], width: int | None = None) -> str:
    """The table in a terminal; empty without rows.

    Args:
        rows: from `group_sizes`.
        width: columns of the terminal; None: what the terminal has.
    """
    if not rows:
        return ""
    title = "lightning-normdyn: sizes by param group, over the run"
    table = render(title, COLUMNS, [cells_of(row) for row in rows[:MOST_GROUPS]], width=width)
    more = ""
    if len(rows) > MOST_GROUPS:
        more = paragraph(f"... and {len(rows) - MOST_GROUPS} more rows", width)
    return table + more + paragraph(ABOUT, width)


def of_runs_as_text(runs: Mapping[str, Sequence[GroupSizes]], width: int | None = None) -> str:
    """The tables of several runs as one; empty without rows.

    Args:
        runs: rows by label of the run.
        width: columns of the terminal; None: what the terminal has.
    """
    cells = []
    for label, rows in runs.items():
        cells += [[label, *cells_of(row)] for row in rows]
    if not cells:
        return ""
    columns = ("run", *COLUMNS)
    table = render("sizes by param group, over each run", columns, cells, width=width)
    return table + paragraph(ABOUT, width)


def cells_of(row: GroupSizes) -> list[str]:
    """A row's cells, in the order of `COLUMNS`.

    Example:
        >>> cells_of(GroupSizes("AdamW", "filter", 9, 0.02, 0.2311, 0.2294, None, None))
        ['AdamW', 'filter', '9', '0.02', '0.231', '0.229', '-', '-']
    """
    cells = [row.group, row.kind, str(row.weights)]
    for value in row[3:]:
        cells.append(UNKNOWN if value is None else f"{value:.3g}")
    return cells


def as_plain(rows: Sequence[GroupSizes]) -> list[dict[str, Any]]:
    """For a history's ``meta``, which is JSON."""
    return [row._asdict() for row in rows]


def from_plain(known: object) -> Iterator[GroupSizes]:
    """The rows that `as_plain` gave; those of a file from elsewhere that are none are left out."""
    for row in known if isinstance(known, list) else []:
        if isinstance(row, dict) and row.keys() == set(GroupSizes._fields):
            sizes = GroupSizes(**row)
            if _is_row(sizes):
                yield sizes


def _is_row(sizes: GroupSizes) -> bool:
    group, kind, weights, *numbers = sizes
    are_texts = isinstance(group, str) and isinstance(kind, str)
    are_numbers = all(number is None or _is_number(number) for number in numbers)
    return are_texts and _is_number(weights) and are_numbers


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < inf


__all__ = [
    "ABOUT",
    "COLUMNS",
    "GroupSizes",
    "as_plain",
    "as_text",
    "cells_of",
    "from_plain",
    "group_names",
    "group_sizes",
    "of_runs_as_text",
]
