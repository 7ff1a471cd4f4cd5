"""The balance of each weight matrix on the way: from the sums of a measured step to the window that
it extends, and to the numbers that are logged.

Numbers of the host. The windows: `lightning_normdyn.monitor.balance`; the pulls of decay:
`lightning_normdyn.monitor.pulls`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_normdyn.engine.value_checks import (
    MOST,
    Check,
    flag,
    many,
    number,
    optional,
    record,
    require,
    table,
    text,
)
from lightning_normdyn.functional import balanced_angular_update

from .balance import LOG_NORM, NO_ROWS, PULL, SQUARED_ANGLE, BalanceWindow, Passed, Point
from .balance_windows import MatrixRow, Windows, spans_of
from .by_weight import Doubles, Flags, places_among
from .pulls import End, Strength

ROUNDING = 16 * torch.finfo(torch.float64).eps
"""What may be left of a difference of two equal numbers, relative to them."""

MOST_LOG = 750.0
"""Every positive float64 has a logarithm closer to 0."""


class MatrixSums(NamedTuple):
    """The sums of one measured step over all vectors of a weight, ``(w,)`` each.

    Legend: w the weight that the gradient was taken at, s the weight just before the step, d the
    step from s.

    Args:
        ww: Σ⟨w, w⟩.
        ss: Σ⟨s, s⟩.
        sd: Σ⟨s, d⟩.
        dd: Σ⟨d, d⟩.
        size_ww: Σ size·⟨w, w⟩, with the size that AdaptiveWeightShrink goes by; 0 without it.
        log_scale_ww: Σ ln c·⟨w, w⟩, with ln c added up over all steps so far, of callbacks that
            multiply a weight by c after each step; 0 without them.
        target_ww: Σ angle·⟨w, w⟩, with the angle that a callback was to turn the step by; 0 without
            one.
    """

    ww: Doubles
    ss: Doubles
    sd: Doubles
    dd: Doubles
    size_ww: Doubles
    log_scale_ww: Doubles
    target_ww: Doubles

    @property
    def squared_angle(self) -> Doubles:
        """Of the step, with all vectors as one; NaN where there is no direction."""
        # As `lightning_normdyn.functional.angle_from_sums` has it; numpy takes half as long for so
        # few numbers.
        with np.errstate(all="ignore"):
            square = self.dd - self.sd * self.sd / self.ss
            across = np.sqrt(np.where(square > ROUNDING * self.dd, square, 0.0))
            along = (self.ss + self.sd) / np.sqrt(self.ss)
            angle = np.arctan2(across, along)
            has_length = (self.ss > 0) & np.isfinite(self.ss + self.sd + self.dd)
        has_direction = has_length & ((across != 0) | (along != 0))
        return np.where(has_direction, angle * angle, nan)

    @property
    def size(self) -> Doubles:
        """The size with which AdaptiveWeightShrink pulls at the norm of the whole: that of long
        vectors counts for more, because they make up more of the norm."""
        return self._mean_of(self.size_ww)

    @property
    def log_scale(self) -> Doubles:
        """Σ ln c of the whole; NaN where the callbacks' vectors are others."""
        return self._mean_of(self.log_scale_ww)

    @property
    def target_angle(self) -> Doubles:
        """What the step was to turn by; 0 where no callback sets it, NaN where it could not."""
        return self._mean_of(self.target_ww)

    def _mean_of(self, weighted: Doubles) -> Doubles:
        with np.errstate(all="ignore"):
            return np.where(self.ww > 0, weighted / self.ww, 0.0)


class Balance(NamedTuple):
    """What is known of the balance of one weight.

    Args:
        window: rows since the norm was last set, or its decay last jumped.
        end: the newest row; None before the first.
        elapsed: ΣP of the run so far.
        was_set: whether a callback set the norm around the newest row.
    """

    window: BalanceWindow = NO_ROWS
    end: End | None = None
    elapsed: float = 0.0
    was_set: bool = False

    @property
    def newest(self) -> Point | None:
        """The newest row of the window."""
        return self.window.points[-1] if self.window.points else None


class BalanceRow(NamedTuple):
    """A row of the weights of one optimizer, ``(w,)`` each but for the number.

    Args:
        number: of the optimizer step.
        sums: of that step.
        lr: the rate that it applied; NaN where nobody can tell.
        strength: of the decay in it.
        passed: sums over the steps since the newest row, as `passed_between` gives them.
        is_known: whether these steps are known.
        is_set: whether a callback has set the norm since the newest row, or in this step.
        stepped: whether the weight was stepped at all.
    """

    number: int
    sums: MatrixSums
    lr: Doubles
    strength: Strength
    passed: Passed
    is_known: Flags
    is_set: Flags
    stepped: Flags


@dataclass(frozen=True, eq=False)
class BalanceTable:
    """`Balance` of many weights. It never changes; `after` gives the next one.

    Args:
        names: of the weights.
        windows: of all of them.
        ends: ``(w,)`` each, the newest rows; the number is -1 before the first.
        elapsed: ``(w,)``.
        was_set: ``(w,)``.
        known: ``(w,)``, which weights were in the newest row.
    """

    names: tuple[str, ...]
    windows: Windows
    ends: End
    elapsed: Doubles
    was_set: Flags
    known: Flags

    @classmethod
    def from_values(cls, names: tuple[str, ...], values: Sequence[Balance | None]) -> BalanceTable:
        """As `of` gave them; None of a weight that was never measured."""
        balances = [value or Balance() for value in values]
        ends = [balance.end or End(-1, nan, nan) for balance in balances]
        numbers, rates, sizes = zip(*ends, strict=True) if ends else ((), (), ())
        return cls(
            names,
            Windows.from_windows([balance.window for balance in balances]),
            End(
                np.array(numbers, dtype=np.int64),
                np.array(rates, dtype=np.float64),
                np.array(sizes, dtype=np.float64),
            ),
            np.array([balance.elapsed for balance in balances], dtype=np.float64),
            np.array([balance.was_set for balance in balances], dtype=np.bool_),
            np.array([value is not None for value in values], dtype=np.bool_),
        )

    def of(self, place: int) -> Balance:
        """Of one weight."""
        number, lr, size = (column[place].item() for column in self.ends)
        return Balance(
            self.windows.of(place),
            None if number < 0 else End(number, lr, size),
            self.elapsed[place].item(),
            self.was_set[place].item(),
        )

    def after(self, row: BalanceRow) -> BalanceTable:
        """With one more row."""
        sums = row.sums
        end = End(row.number, row.lr, sums.size)
        # What a callback sets at the step of a row happens after that row was measured. So the
        # steps before it and those after it are left out.
        has_end = self.known & (self.ends.number >= 0) & (self.ends.number < row.number)
        is_known = row.is_known | (self.ends.number == row.number - 1)
        is_known &= has_end & ~(row.is_set | self.was_set)
        pull = row.strength.pull(row.lr, end.size)
        matrix_row = MatrixRow(
            row.number, sums.ww, sums.squared_angle, pull, row.lr, sums.log_scale
        )
        passed = row.passed.pull + pull
        # Rows of neighbouring steps have nothing between them, whose pull is known to be 0.
        counts = is_known & np.isfinite(passed)
        # A weight that missed a row begins anew.
        elapsed = np.where(self.known, self.elapsed, 0.0)
        return BalanceTable(
            self.names,
            self.windows.extended(matrix_row, row.passed, is_known, row.stepped),
            End(np.where(row.stepped, row.number, -1), end.lr, end.size),
            np.where(counts, elapsed + passed, elapsed),
            row.is_set,
            row.stepped,
        )


# -- what is logged of it

SHOWN = (
    "matrix_angle",
    "norm_drift",
    "coherence",
    "balanced_angular_update",
    "balance_ratio",
    "loss_decay",
    "pull",
)
"""The quantities of a balance, in the order of their table."""

OF_ONE_STEP = frozenset(["matrix_angle", "pull", "norm_drift"])
"""What the newest rows tell by themselves: no span of steps is looked for."""

_RESTS_ON_SPANS = [place for place, name in enumerate(SHOWN) if name not in OF_ONE_STEP]


def quantities_of(
    balances: BalanceTable,
    entries: Doubles,
    noise_coherences: Doubles,
    wanted: Flags,
) -> Doubles:
    """What is logged of balances; NaN where nobody can tell.

    Args:
        balances: of the weights.
        entries: ``(w,)``, numbers in each matrix.
        noise_coherences: ``(w,)``, the coherence of pure noise under the optimizer of each; NaN
            where it is not known.
        wanted: ``(7, w)``, which of `SHOWN` are asked for of each weight; of the others, spans of
            steps may be left out.

    Returns:
        ``(7, w)``, the quantities `SHOWN`.
    """
    shown = np.full((len(SHOWN), len(balances.names)), nan, dtype=np.float64)
    asks_for_span = np.asarray(wanted[_RESTS_ON_SPANS].any(0))
    angle, drift, kappa, balanced, ratio, loss, pulls = shown
    for window in balances.windows.shared:
        rows = window.rows
        places = places_among(window.places, len(balances.names))
        angle[places] = np.sqrt(rows[-1][SQUARED_ANGLE])
        pulls[places] = rows[-1][PULL]
        if len(rows) > 1:
            growth = (rows[-1][LOG_NORM] - rows[-2][LOG_NORM]) / 2
            drift[places] = growth / (window.numbers[-1] - window.numbers[-2])
        # To look for a span of steps takes ten times as long as all else here.
        may_have_one = asks_for_span[places] & window.may_be_sure(entries[places])
        (weights,) = np.nonzero(may_have_one)
        if not len(weights):
            continue
        chosen = window.places[weights]
        span, is_enough = spans_of(window, weights, entries[chosen])
        pull = rows[-1][PULL][weights]
        with np.errstate(all="ignore"):
            at_balance = balanced_angular_update(pull, span.coherence)
            of_loss = span.loss_decay(noise_coherences[chosen])
        kappa[chosen] = np.where(is_enough, span.coherence, nan)
        balanced[chosen] = np.where(is_enough & (pull > 0), at_balance, nan)
        ratio[chosen] = np.where(is_enough, span.ratio, nan)
        loss[chosen] = np.where(is_enough, of_loss, nan)
    return shown


# -- in checkpoints


def state_of(balances: Mapping[str, Balance]) -> dict[str, Any]:
    """Balances by weight as plain tensors and numbers."""
    state = {}
    for name, balance in balances.items():
        points = torch.tensor(balance.window.points, dtype=torch.float64, device="cpu")
        state[name] = {
            # reshape: without any point torch does not know the second dimension.
            "points": points.reshape(-1, len(Point._fields)),
            "end": None if balance.end is None else list(balance.end),
            "elapsed": balance.elapsed,
            "was_set": balance.was_set,
        }
    return state


def balances_from(state: Mapping[str, Any]) -> dict[str, Balance]:
    """What `state_of` gave."""
    balances = {}
    for name, known in state.items():
        points = []
        for at, *numbers in known["points"].tolist():
            points.append(Point(int(at), *numbers))
        end = None
        if known["end"] is not None:
            at, lr, size = known["end"]
            end = End(int(at), float(lr), float(size))
        balances[str(name)] = Balance(
            BalanceWindow(tuple(points)),
            end,
            float(known["elapsed"]),
            bool(known["was_set"]),
        )
    return balances


def _points(value: Any, where: str) -> None:
    """Rows that can follow each other: anything else would raise much later, within a step."""
    width = len(Point._fields)
    is_table = isinstance(value, Tensor) and value.dtype == torch.float64 and value.ndim == 2
    require(is_table and value.shape[1] == width, f"{where} is no table of {width} numbers a row")
    columns = dict(zip(Point._fields, value.T, strict=True))
    for name in ("log_norm", "squared_angle", "angles", "log_scale"):
        require(bool(columns[name].isfinite().all()), f"{where} holds a {name} that is not finite")
    # No float64 is longer or shorter, and the exponential of a larger number would overflow.
    require(
        bool((columns["log_norm"].abs() < MOST_LOG).all()), f"{where} holds a norm beyond reach"
    )
    numbers = columns["number"]
    are_counts = (numbers == numbers.round()) & (numbers >= 0) & (numbers < MOST)
    require(bool(are_counts.all()), f"{where} holds rows of steps that cannot be")
    grows = bool((numbers.diff() > 0).all()) and bool((columns["angles"].diff() >= 0).all())
    is_positive = bool((columns["squared_angle"] >= 0).all())
    require(grows and is_positive, f"{where} is no sequence of rows")


STATE: Check = table(
    text(),
    record(
        {
            "points": _points,
            # NaN stands for a rate that nobody can tell.
            "end": optional(many(number(finite=False))),
            "elapsed": number(),
            "was_set": flag,
        },
        closed=True,
    ),
)
"""What `state_of` may look like in a checkpoint."""


__all__ = [
    "Balance",
    "BalanceRow",
    "BalanceTable",
    "MatrixSums",
    "balances_from",
    "quantities_of",
    "state_of",
]
