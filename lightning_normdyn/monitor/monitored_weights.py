"""What of the weights of one optimizer is the same in every row, in arrays over them.

Legend: ``w`` weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.engine.plan import Target

from .by_weight import Doubles, Flags
from .expected_norms import Kind
from .measured_balance import SHOWN
from .quantities import QUANTITIES
from .row_values import WeightKeys

UNEXPECTED = ("norm_drift", "balance_ratio")
"""What is shown of a weight that has no expectation: what it is held against is its balance, and
without one, how fast its norm moves is what can be said."""


class MonitoredWeights:
    """The weights of one optimizer.

    Args:
        targets: the weights.
        quantities: what is averaged over the vectors of each.
        of_matrices: by weight, the quantities of whole matrices that are shown.

    Attributes:
        names: of the weights.
        everywhere: ``(w,)``, the places of all of them.
        invariant: ``(w,)``, which are scale-invariant.
        followable: ``(w,)``, whose norms may be followed step by step.
        in_16_bits: ``(w,)``: rounding alone turns such a weight by 2.5e-3 in every step, whatever
            pulls at it.
        entries: ``(w,)``, numbers in each weight.
        counts: ``(w,)``, its vectors.
        lengths: ``(w,)``, entries of one of them.
        of_matrices: ``(9, w)``, which quantities of a balance are shown, and none of `UNEXPECTED`
            in the last two rows.
        predicted: the quantities that are compared with a prediction.
        measured: keys of what is averaged, and of what is compared with a prediction.
        expected: keys of what is compared with an expectation.
        balanced: keys of the ``(9, w)`` quantities of balances.
        answers: of `lightning_normdyn.monitor.group_theory.GroupTheory`, from row to row.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        quantities: Sequence[str],
        of_matrices: Sequence[Sequence[str]],
    ) -> None:
        self.names = tuple(target.name for target in targets)
        self.everywhere = np.arange(len(targets), dtype=np.int64)
        self.invariant = _flags([target.scale_invariant for target in targets])
        rounded = (torch.bfloat16, torch.float16)
        self.in_16_bits = _flags([target.weight.dtype in rounded for target in targets])
        self.entries = _doubles([target.entries for target in targets])
        self.counts = _doubles([max(1, target.partition.n) for target in targets])
        self.lengths = np.maximum(self.entries // self.counts, 1.0)
        # A single number has no direction.
        self.followable = self.invariant & (self.lengths >= 2) & ~self.in_16_bits
        self._shapes = [target.matrix for target in targets]

        shown = [[name in wanted for wanted in of_matrices] for name in SHOWN]
        unexpected = [[False] * len(targets) for _ in UNEXPECTED]
        self.of_matrices = np.array([*shown, *unexpected], dtype=np.bool_)

        self.predicted = [q.name for q in QUANTITIES.values() if q.prediction is not None]
        expectations = [q.name for q in QUANTITIES.values() if q.expectation is not None]
        self.measured = WeightKeys([*quantities, *self.predicted], self.names)
        self.expected = WeightKeys(expectations, self.names)
        # Those of `UNEXPECTED` once more: where nobody asked for them, they come last.
        self.balanced = WeightKeys([*SHOWN, *UNEXPECTED], self.names)
        self._kinds: tuple[Sequence[int], Sequence[Kind]] = ((), ())
        self.answers: dict[Any, Any] = {}

    def take_effects(self, effects: Sequence[Effects]) -> None:
        """What callbacks do to each weight from now on."""
        self._effects = list(effects)
        self._kinds = ((), ())

    def kinds(self, groups: Sequence[int]) -> Sequence[Kind]:
        """Weights that share a param group, a shape, and what callbacks do to them.

        Args:
            groups: the place of the param group of each weight.
        """
        known_groups, kinds = self._kinds
        if kinds and known_groups == groups:
            return kinds
        alike: dict[tuple[int, Effects, tuple[int, int] | None], list[int]] = {}
        of_weights = zip(groups, self._effects, self._shapes, strict=True)
        for place, key in enumerate(of_weights):
            alike.setdefault(key, []).append(place)
        kinds = [Kind(*key, np.array(places, dtype=np.int64)) for key, places in alike.items()]
        self._kinds = (list(groups), kinds)
        return kinds


def _flags(values: Sequence[bool]) -> Flags:
    return np.array(values, dtype=np.bool_)


def _doubles(values: Sequence[float]) -> Doubles:
    return np.array(values, dtype=np.float64)


__all__ = ["MonitoredWeights"]
