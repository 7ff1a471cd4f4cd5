"""Weight norm, effective learning rate and angular update as torchmetrics, for people with a
training loop of their own.

Each metric sees one weight or a list of weights and answers for every weight vector: ``(n,)``, an
average over the updates since ``reset``. In a ``MetricCollection`` all of them take the same call,
``update(weight, weight_before=..., lr=...)``.

Legend: ``n`` weight vectors of all weights together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_normdyn import functional as F
from lightning_normdyn.engine.arguments import check_choice
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.plots.vectors import draw_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Weights = Tensor | Sequence[Tensor]


def _as_list(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    # Asked first: a tensor is a sequence of its rows, too.
    if isinstance(tensors, Tensor):
        return [tensors]
    return list(tensors)


class _PerVector(Metric):
    """The average of one number per weight vector over updates; vectors whose number is NaN are
    left out of it.

    Processes that hold the same weights agree anyhow, and processes that hold different data
    average: both states are summed.
    """

    is_differentiable = False
    higher_is_better = None
    # With True, `forward` would compute every update twice.
    full_state_update = False

    axis_label = ""
    squared = False
    """Whether squares are averaged: the result is then the root mean square."""

    def __init__(
        self,
        quantity: str,
        *,
        granularity: Literal["filter", "layer"] = "filter",
        reduction: Literal["none", "mean"] = "none",
        num_vectors: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.granularity = check_choice("granularity", granularity, ("filter", "layer"))
        self.reduction = check_choice("reduction", reduction, ("none", "mean"))
        # Without dimensions until the first update says how many vectors there are: a zero adds to
        # anything. The names tell the classes apart, because MetricCollection lets metrics share
        # their states when names and first values agree.
        shape = () if num_vectors is None else (num_vectors,)
        empty = torch.zeros(shape, dtype=torch.float64, device="cpu")
        self._total = f"{quantity}_total"
        self._count = f"{quantity}_count"
        self.add_state(self._total, empty, dist_reduce_fx="sum")
        self.add_state(self._count, empty.long(), dist_reduce_fx="sum")

    def _add(self, values: Iterable[Tensor]) -> None:
        # float64: in float32 a sum over many updates rounds away much of each new one.
        new = torch.cat([value.double() for value in values])
        total = getattr(self, self._total)
        # Another number of vectors cannot be the same weights, and no average is over both.
        if total.ndim and total.shape != new.shape:
            raise NormDynError(
                f"{type(self).__name__} was updated with {new.numel()} weight vectors and has "
                f"{total.numel()}; pass the same weights every time."
            )
        # NaN is what is not defined; an infinite value is a run that diverged, and shall show.
        seen = ~new.isnan()
        if self.squared:
            new = new.square()
        setattr(self, self._total, total + new.where(seen, 0.0))
        setattr(self, self._count, getattr(self, self._count) + seen)

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None
    ) -> None:
        """Sum both states over the ranks; ranks that had no update yet add nothing.

        Such a rank does not know how many vectors there are, and a state of another shape than the
        other ranks' would leave all of them waiting for each other. So the number of vectors is
        agreed upon first, by a tensor of the same shape everywhere.
        """
        total = getattr(self, self._total)
        mine = total.numel() if total.ndim else 0
        number = torch.tensor([mine], dtype=torch.int64, device=total.device)
        gathered = dist_sync_fn(number, group=process_group or self.process_group)
        of_ranks = list(map(int, gathered))
        updated = sorted(set(filter(None, of_ranks)))
        # Every rank sees the same list, so every rank raises, and none waits for another.
        if len(updated) > 1:
            found = ", ".join(f"rank {rank}: {each}" for rank, each in enumerate(of_ranks))
            raise NormDynError(
                f"{type(self).__name__} has other weight vectors on other ranks ({found}); pass "
                f"the same weights on all."
            )
        if not mine and updated:
            for state in (self._total, self._count):
                setattr(self, state, getattr(self, state).new_zeros(updated[0]))
        super()._sync_dist(dist_sync_fn, process_group=process_group)

    def compute(self) -> Tensor:
        """The averages, float64: ``(n,)``, or one number with ``reduction="mean"`` (and, as
        torchmetrics has it, for n = 1); NaN where nothing was seen.
        """
        # 0 / 0: a vector that was never seen has no average, so NaN is right.
        mean: Tensor = getattr(self, self._total).double() / getattr(self, self._count)
        if self.reduction == "mean":
            mean = mean.nanmean()
        # The root comes last: a mean of roots would not be the root mean square.
        if self.squared:
            mean = mean.sqrt()
        return mean

    def _vectors(self, weight: Weights) -> list[Tensor]:
        weights = _as_list(weight)
        if not weights:
            raise NormDynError(
                f"{type(self).__name__} was updated with an empty list of weights; pass at least "
                f"one."
            )
        if self.granularity == "layer":
            return [each.reshape(1, -1) for each in weights]
        return weights

    def plot(
        self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """Draw a value, or the values of several steps.

        Args:
            val: what ``compute`` or ``forward`` gave, or a list of it, one per step; ``compute()``
                if None.
            ax: where to draw; a new figure if None.
        """
        if val is None:
            val = self.compute()
        steps = torch.stack(_as_list(val)).detach().cpu().double()
        # A metric of one vector, or a mean, has no dimension of vectors.
        values = steps.reshape(len(steps), -1).numpy()
        return draw_metric(values, self.axis_label, isinstance(val, Tensor), ax)


class WeightNorm(_PerVector):
    r"""Norm of each weight vector, :math:`\lVert w\rVert_2`, averaged over updates.

    Args:
        granularity: what one vector is: ``"filter"``, an index of dim 0, or ``"layer"``, a whole
            weight. For groups, or for a transposed convolution, pass the weight reshaped to ``(n,
            d)``.
        reduction: ``"none"`` gives ``(n,)``, ``"mean"`` the mean over vectors, which is what
            ``self.log`` of a LightningModule needs.
        num_vectors: vectors of all weights together; given, a metric that saw no update at all on
            any process computes NaN for each.
        kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> metric = WeightNorm()
        >>> metric.update(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        >>> metric.compute()
        tensor([5., 2.], dtype=torch.float64)
    """

    axis_label = "weight norm"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("weight_norm", **kwargs)

    def update(self, weight: Weights) -> None:
        """See a weight ``(rows, ...)``, or a list of weights, of any floating dtype."""
        self._add(map(F.weight_norm, self._vectors(weight)))


class EffectiveLR(_PerVector):
    r"""Effective learning rate of each weight vector, :math:`\eta/\lVert w\rVert` (AWS paper, eq.
    12), averaged over updates.

    Args:
        statistic: ``"norm"``, or ``"std"`` for weight-standardized weights (eq. 13).
        kwargs: ``granularity``, ``reduction`` and ``num_vectors`` as in :class:`WeightNorm`, and
            those of ``torchmetrics.Metric``.

    Example:
        >>> metric = EffectiveLR()
        >>> metric.update(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), lr=0.1)
        >>> metric.compute()
        tensor([0.0200, 0.0500], dtype=torch.float64)
    """

    axis_label = "effective learning rate"

    def __init__(self, *, statistic: Literal["norm", "std"] = "norm", **kwargs: Any) -> None:
        # With the statistic in the name: a MetricCollection must not let both kinds share their
        # states.
        super().__init__(f"effective_lr_{statistic}", **kwargs)
        self.statistic = check_choice("statistic", statistic, ("norm", "std"))

    def update(self, weight: Weights, lr: float | Tensor | Sequence[float]) -> None:
        """See a weight ``(rows, ...)``, or a list of weights, with their learning rate, or a list
        with one for each weight."""
        weights = self._vectors(weight)
        lrs = list(lr) if isinstance(lr, Sequence) else [lr] * len(weights)
        # Checked first: `map` stops at the shorter list and would leave out the last weights.
        if len(lrs) != len(weights):
            raise NormDynError(
                f"EffectiveLR was updated with {len(weights)} weights and {len(lrs)} learning "
                f"rates; pass one, or one for each."
            )
        size = F.weight_norm if self.statistic == "norm" else F.weight_std
        sizes = map(size, weights)
        self._add(map(F.effective_lr, lrs, sizes))


class AngularUpdate(_PerVector):
    r"""Angle by which each weight vector turned in a step, in radians: the root mean square over
    updates.

    The mean of squares is what the predictions of :mod:`lightning_normdyn.theory.equilibrium` are
    about; with ``reduction="mean"`` it is taken over vectors too.

    Args:
        kwargs: ``granularity``, ``reduction`` and ``num_vectors`` as in :class:`WeightNorm`, and
            those of ``torchmetrics.Metric``.

    Example:
        >>> metric = AngularUpdate()
        >>> before = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
        >>> metric.update(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), weight_before=before)
        >>> metric.compute()
        tensor([0.7854, 1.5708], dtype=torch.float64)
    """

    axis_label = "angular update (radians per step)"
    squared = True
    plot_lower_bound = 0.0
    plot_upper_bound = math.pi

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("angular_update", **kwargs)

    def update(self, weight: Weights, weight_before: Weights) -> None:
        """See a weight after a step and a copy of it from before, or two lists of weights in the
        same order."""
        after = self._vectors(weight)
        before = self._vectors(weight_before)
        # Checked first: `map` stops at the shorter list and would leave out the last weights.
        if len(after) != len(before):
            raise NormDynError(
                f"AngularUpdate was updated with {len(after)} weights and {len(before)} weights "
                f"before the step; pass as many."
            )
        self._add(map(F.angular_update, before, after))
