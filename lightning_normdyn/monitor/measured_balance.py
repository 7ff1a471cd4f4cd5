"""The balance of each weight matrix on the way: from the sums of a measured step to the window that
it extends, and to the numbers that are logged.

Numbers of the host. The windows: `lightning_normdyn.monitor.balance`; the pulls of decay:
`lightning_normdyn.monitor.pulls`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import atan2, isfinite, nan, sqrt
from typing import Any, NamedTuple

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

from .balance import NO_ROWS, BalanceWindow, MatrixRow, Point, Span
from .passed_steps import Stretch
from .pulls import End, Strength, passed_between

ROUNDING = 16 * torch.finfo(torch.float64).eps
"""What may be left of a difference of two equal numbers, relative to them."""

MOST_LOG = 750.0
"""Every positive float64 has a logarithm closer to 0."""


class MatrixSums(NamedTuple):
    """The sums of one measured step over all vectors of a weight.

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

    ww: float
    ss: float
    sd: float
    dd: float
    size_ww: float
    log_scale_ww: float = 0.0
    target_ww: float = 0.0

    @property
    def squared_angle(self) -> float:
        """Of the step, with all vectors as one; NaN where there is no direction."""
        # As `lightning_normdyn.functional.angle_from_sums` has it. These numbers are on the host
        # already, and from tensors of one number they would be read one by one.
        if not (self.ss > 0 and isfinite(self.ss + self.sd + self.dd)):
            return nan
        square = self.dd - self.sd * self.sd / self.ss
        across = sqrt(square) if square > ROUNDING * self.dd else 0.0
        along = (self.ss + self.sd) / sqrt(self.ss)
        if across == 0 and along == 0:
            return nan
        angle = atan2(across, along)
        return angle * angle

    @property
    def size(self) -> float:
        """The size with which AdaptiveWeightShrink pulls at the norm of the whole: that of long
        vectors counts for more, because they make up more of the norm."""
        return self.size_ww / self.ww if self.ww > 0 else 0.0

    @property
    def log_scale(self) -> float:
        """Σ ln c of the whole; NaN where the callbacks' vectors are others."""
        return self.log_scale_ww / self.ww if self.ww > 0 else 0.0

    @property
    def target_angle(self) -> float:
        """What the step was to turn by; 0 where no callback sets it, NaN where it could not."""
        return self.target_ww / self.ww if self.ww > 0 else 0.0


class Balance(NamedTuple):
    """What is known of the balance of one weight. It never changes; `after` gives the next one.

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

    def after(
        self,
        number: int,
        sums: MatrixSums,
        lr: float,
        strength: Strength,
        stretches: Sequence[tuple[Stretch, Strength, float | None]],
        *,
        is_set: bool,
    ) -> Balance:
        """With one more row.

        Args:
            number: of its optimizer step.
            sums: of that step.
            lr: the rate that it applied; NaN where nobody can tell.
            strength: of the decay in it.
            stretches: for `passed_between`, from the newest row on; empty where these steps are not
                known.
            is_set: whether a callback has set the norm since the newest row, or in this step.
        """
        end = End(number, lr, sums.size)
        passed = None
        # What a callback sets at the step of a row happens after that row was measured. So the
        # steps before it and those after it are left out.
        if self.end is not None and self.end.number < number and not (is_set or self.was_set):
            is_known = number == self.end.number + 1 or bool(stretches)
            passed = passed_between(self.end, end, stretches) if is_known else None
        pull = strength.pull(lr, sums.size)
        row = MatrixRow(number, sums.ww, sums.squared_angle, pull, lr, sums.log_scale)
        window = self.window.extended(row, passed)
        elapsed = self.elapsed
        # Rows of neighbouring steps have nothing between them, whose pull is known to be 0.
        if passed is not None and isfinite(passed.pull + row.pull):
            elapsed += passed.pull + row.pull
        return Balance(window, end, elapsed, is_set)

    @property
    def newest(self) -> Point | None:
        """The newest row of the window."""
        return self.window.points[-1] if self.window.points else None


OF_ONE_STEP = frozenset(["matrix_angle", "pull", "norm_drift"])
"""What `quantities_of_step` tells: no span of steps is looked for."""


def quantities_of_step(balance: Balance) -> dict[str, float]:
    """Of `quantities_of`, what the newest rows tell by themselves."""
    point = balance.newest
    if point is None:
        return {}
    shown = {"matrix_angle": sqrt(point.squared_angle), "pull": point.pull}
    step = balance.window.newest_step
    if step is not None:
        shown["norm_drift"] = step.growth / step.steps
    return _known_of(shown)


def quantities_of(
    balance: Balance, entries: int, noise_coherence: float | None
) -> dict[str, float]:
    """What is logged of a balance, by name; what nobody can tell has no entry.

    Args:
        balance: of the weight.
        entries: numbers in the matrix.
        noise_coherence: the coherence of pure noise under this optimizer; None if it is not known.
    """
    shown = quantities_of_step(balance)
    point = balance.newest
    span = balance.window.newest_span(entries)
    if point is not None and span is not None:
        shown.update(_known_of(_of_span(span, point, noise_coherence)))
    return shown


def _known_of(quantities: dict[str, float]) -> dict[str, float]:
    # Absent, and not NaN: that would say that the run has diverged.
    return {name: value for name, value in quantities.items() if isfinite(value)}


def _of_span(
    span: Span,
    point: Point,
    noise_coherence: float | None,
) -> dict[str, float]:
    kappa = span.coherence
    shown = {"coherence": kappa, "balance_ratio": span.ratio}
    if point.pull > 0:
        shown["balanced_angular_update"] = float(balanced_angular_update(point.pull, kappa))
    if noise_coherence is not None:
        shown["loss_decay"] = span.loss_decay(noise_coherence)
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
    "MatrixSums",
    "balances_from",
    "quantities_of",
    "quantities_of_step",
    "state_of",
]
