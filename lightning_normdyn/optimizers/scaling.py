"""A change of scale that is made for an update still to come, and how to take it back if the update
never comes.

`ready` shrinks and rescales weights before the optimizer steps. The step may then raise, or a
checkpoint may be saved before the optimizer
has written anything: what was done must not be done again. Every tensor of torch counts how often
it was written to; these versions tell
what has been done, and what the optimizer has stepped since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.placement import gradient_of, version_of
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.optimizers.state import rescale_batch_norm_

Ahead = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Running statistics of a normalization that follow the weight in front of them.

    Args:
        name: of the module in the LightningModule.
        module: it has ``running_mean``, ``running_var`` and ``eps``.
        position: of the weight among those of the vectors.
        factor: ``(channels,)``, by how much the input of each channel is multiplied.
        bias: ``(channels,)``, what is added to it behind the weight, or None.
    """

    name: str
    module: nn.Module
    position: int
    factor: Tensor
    bias: Tensor | None

    def buffers(self) -> dict[str, Tensor]:
        """Those that change."""
        mean, var = self.module.running_mean, self.module.running_var
        assert isinstance(mean, Tensor)
        assert isinstance(var, Tensor)
        return {"mean": mean, "var": var}


class Scaling:
    """One factor per vector, for the weights and for everything whose meaning depends on their
    scale.

    Args:
        vectors: the weights.
        factor: ``(n,)``.
        state: the optimizer's state, as far as it follows: ``{weight: {buffer: tensor}}``.
        exponents: ``{buffer: e}``: the buffer is multiplied by ``factor**e``.
        gradients: whether the gradients of the coming step are divided by the factor.
        statistics: what lies behind the weights.
        invariant: for each weight whether the loss does not see its length; None: of all. Their
            gradients go as one over it.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> vectors = WeightVectors([weight], [Partition.filters((1, 2))])
        >>> scaling = Scaling(vectors, torch.tensor([0.5]))
        >>> scaling.apply()
        >>> weight.tolist()
        [[1.5, 2.0]]
        >>> scaling.judge()
        >>> scaling.take_back()
        >>> weight.tolist()
        [[3.0, 4.0]]
    """

    def __init__(
        self,
        vectors: WeightVectors,
        factor: Tensor,
        *,
        state: Mapping[Tensor, Mapping[str, Any]] | None = None,
        exponents: Mapping[str, float] | None = None,
        gradients: bool = False,
        statistics: Sequence[Statistics] = (),
        invariant: Sequence[bool] | None = None,
    ) -> None:
        self.vectors = vectors
        self.factor = factor
        self.gradients = gradients
        self.statistics = list(statistics)
        self.invariant = [True] * len(vectors.weights) if invariant is None else list(invariant)
        self.exponents = {}
        self._buffers: dict[str, list[Tensor | None]] = {}
        for key, exponent in (exponents or {}).items():
            buffers = [
                state[w].get(key) if state is not None and w in state else None
                for w in vectors.weights
            ]
            if any(b is not None for b in buffers):
                self.exponents[key] = exponent
                self._buffers[key] = buffers
        self._before = vectors.versions()
        self._buffers_before = {
            key: [_version(b) for b in buffers] for key, buffers in self._buffers.items()
        }
        self._statistics_before = [
            {name: b._version for name, b in s.buffers().items()} for s in self.statistics
        ]
        self._left: list[int] | None = None
        # Weak: gradients are the first thing that somebody who is out of memory lets go of.
        self._gradients_left: list[tuple[ref[Tensor] | None, int]] = []
        self.pending = [False] * len(vectors.weights)
        """For each weight whether it has been multiplied and the optimizer has not stepped it
        since, when `judge` was last called."""
        self.stepped = list(self.pending)
        """For each weight whether the optimizer has stepped it since `seal`, when `judge` was last
        called."""

    def apply(self) -> None:
        """Multiply everything."""
        vectors = self.vectors
        vectors.scale_(self.factor)
        if self.gradients:
            vectors.scale_(1 / self.factor, vectors.gradients())
        for key, exponent in self.exponents.items():
            vectors.scale_(self.factor**exponent, vectors.local(self._buffers[key]))
        for statistics in self.statistics:
            _rescale_statistics(
                statistics.module, statistics.buffers(), statistics.factor, statistics.bias
            )

    # -- and back
    # ------------------------------------------------------------------------------------------------------

    def seal(self) -> None:
        """Everything is ready for the update: whatever is written to weights and gradients from now
        on, others do."""
        self._left = self.vectors.versions()
        self.seal_gradients()

    def seal_gradients(self) -> None:
        """`seal` the gradients again: they were changed for the step and put back."""
        gradients = [gradient_of(w) for w in self.vectors.weights]
        self._gradients_left = [
            (None, 0) if g is None else (ref(g), version_of(g)) for g in gradients
        ]

    def untouched(self) -> bool:
        """Whether nobody has written to weights and gradients since `seal`."""
        return self._left == self.vectors.versions() and not any(self._new_gradients())

    def _new_gradients(self) -> list[bool]:
        """For each weight whether its gradient is another one than at `seal`."""
        if not self._gradients_left:
            return [False] * len(self.vectors.weights)
        new = []
        for weight, (gradient_left, version) in zip(
            self.vectors.weights, self._gradients_left, strict=True
        ):
            gradient = gradient_of(weight)
            left = None if gradient_left is None else gradient_left()
            new.append(
                gradient is not left or (gradient is not None and version_of(gradient) != version)
            )
        return new

    def judge(self) -> None:
        """Find out what has been done by now: sets `pending` and `stepped`, before anybody takes
        anything back."""
        now = self.vectors.versions()
        left = now if self._left is None else self._left
        self.stepped = [version != at_end for version, at_end in zip(now, left, strict=True)]
        self.pending = [
            here and not away
            for here, away in zip(self._multiplied(now), self.stepped, strict=True)
        ]

    def _multiplied(self, now: Sequence[int]) -> list[bool]:
        return [version != before for version, before in zip(now, self._before, strict=True)]

    def take_back(self, *, gradients_count: bool = False) -> None:
        """Divide by the factor again what `judge` found to be pending. No collective.

        Args:
            gradients_count: whether the gradients that are there now are what the next update will
                be made of. They are then brought to
                the scale of the weights: those of this step were divided, new ones were taken at
                    weights that had been multiplied.
        """
        pending, vectors = self.pending, self.vectors
        if not any(pending):
            return
        vectors.scale_(1 / self._where(pending, self.factor))
        if gradients_count:
            each = zip(pending, self._new_gradients(), self.invariant, strict=True)
            other_scale = [
                here and (invariant if new else self.gradients) for here, new, invariant in each
            ]
            if any(other_scale):
                vectors.scale_(self._where(other_scale, self.factor), vectors.gradients())
        for key, exponent in self.exponents.items():
            written = [
                here and done for here, done in zip(pending, self._written(key), strict=True)
            ]
            vectors.scale_(
                self._where(written, self.factor) ** -exponent, vectors.local(self._buffers[key])
            )
        for statistics, before in zip(self.statistics, self._statistics_before, strict=True):
            if pending[statistics.position]:
                done = {
                    name: b
                    for name, b in statistics.buffers().items()
                    if b._version != before[name]
                }
                _rescale_statistics(statistics.module, done, 1 / statistics.factor, statistics.bias)

    def _written(self, key: str) -> list[bool]:
        return [
            _version(b) != before
            for b, before in zip(self._buffers[key], self._buffers_before[key], strict=True)
        ]

    def _where(self, chosen: Sequence[bool], factor: Tensor) -> Tensor:
        if all(chosen):
            return factor
        of_weight = torch.tensor(list(chosen), dtype=torch.bool, device=factor.device)
        return torch.where(self.vectors.spread(of_weight), factor, torch.ones_like(factor))

    # -- over a checkpoint
    # ---------------------------------------------------------------------------------------------

    def state(self, names: Sequence[str]) -> Ahead:
        """What a checkpoint must say, so that `put_back` can take this back in another process.

        A collective where vectors lie on several ranks.

        Args:
            names: what the weights are called there.

        Returns:
            Empty if there is nothing to take back.
        """
        self.judge()
        pending = self.pending
        if not any(pending):
            return {}
        whole = self.vectors.gather(self.factor)
        weights: Ahead = {}
        for i, (name, partition) in enumerate(zip(names, self.vectors.partitions, strict=True)):
            if pending[i]:
                weights[name] = {
                    "factor": whole[i].cpu().clone(),
                    "keep": list(partition.keep),
                    "labels": partition.labels.cpu().clone(),
                    "buffers": {
                        key: e for key, e in self.exponents.items() if self._written(key)[i]
                    },
                }
        statistics: Ahead = {}
        for each, before in zip(self.statistics, self._statistics_before, strict=True):
            done = [name for name, b in each.buffers().items() if b._version != before[name]]
            if pending[each.position] and done:
                bias = None if each.bias is None else each.bias.cpu().clone()
                statistics[each.name] = {
                    "factor": each.factor.cpu().clone(),
                    "bias": bias,
                    "done": done,
                }
        return {"weights": weights, "statistics": statistics}


class RoundedScaling(Scaling):
    """A scaling of weights stored in bfloat16 or float16: factors that rounding would swallow are
    owed.

    Taken back, the factor is owed in the other direction; the weights stay as they are.

    Args:
        vectors: the weights.
        factor: ``(n,)``.
        owed: ``(n,)``: the product of the factors that earlier steps left unapplied.

    Attributes:
        owed: the same, now.
    """

    def __init__(self, vectors: WeightVectors, factor: Tensor, owed: Tensor) -> None:
        super().__init__(vectors, factor)
        self.owed = owed
        self._applied = False

    def apply(self) -> None:
        """Multiply what survives rounding."""
        self.owed = self.vectors.scale_rounded_(self.factor, self.owed)
        self._applied = True

    def _multiplied(self, now: Sequence[int]) -> list[bool]:
        return [self._applied] * len(now)

    def take_back(self, *, gradients_count: bool = False) -> None:
        """Owe the factor in the other direction."""
        self.owed = self.owed / self._where(self.pending, self.factor).to(self.owed.dtype)

    def state(self, names: Sequence[str]) -> Ahead:
        """See `Scaling.state`; `put_back` does not touch these weights: who keeps what is owed
        divides it."""
        state = super().state(names)
        for entry in state.get("weights", {}).values():
            entry["owed"] = True
        return state


@torch.no_grad()
def put_back(
    ahead: Ahead, weights: Mapping[str, Tensor], optimizers: Sequence[Optimizer], module: nn.Module
) -> list[str]:
    """Take back what a checkpoint holds although its step never happened: `Scaling.state`, in the
    process that goes on from there.

    Args:
        ahead: from the checkpoint.
        weights: the parameters by name.
        optimizers: their state has been restored.
        module: the LightningModule.

    Returns:
        What of it does not fit the model and was left alone: names.
    """
    unfit = []
    for name, entry in ahead.get("weights", {}).items():
        weight = weights.get(name)
        vectors = None if weight is None else _vectors_of(name, weight, entry)
        if weight is None or vectors is None:
            unfit.append(name)
            continue
        if entry.get("owed"):
            continue
        factor = vectors.scatter([entry["factor"]])
        vectors.scale_(1 / factor)
        states = [o.state[weight] for o in optimizers if weight in o.state]
        for key, exponent in entry["buffers"].items():
            for state in states:
                if isinstance(state.get(key), Tensor):
                    vectors.scale_(factor**-exponent, vectors.local([state[key]]))
    modules = dict(module.named_modules())
    for name, entry in ahead.get("statistics", {}).items():
        norm = modules.get(name)
        buffers = {part: getattr(norm, f"running_{part}", None) for part in entry["done"]}
        tensors = [*buffers.values(), *([] if entry["bias"] is None else [entry["bias"]])]
        if norm is None or any(
            not isinstance(t, Tensor) or t.shape != entry["factor"].shape for t in tensors
        ):
            unfit.append(name)
            continue
        _rescale_statistics(
            norm,
            {part: b for part, b in buffers.items() if b is not None},
            1 / entry["factor"],
            entry["bias"],
        )
    return unfit


def _vectors_of(name: str, weight: Tensor, entry: Ahead) -> WeightVectors | None:
    partition = Partition(tuple(entry["keep"]), entry["labels"], "saved")
    factor = entry["factor"]
    if factor.shape != (partition.n,) or not bool((torch.isfinite(factor) & (factor > 0)).all()):
        return None
    try:
        return WeightVectors([weight], [partition], [name])
    except (ValueError, IndexError):  # of another shape
        return None


def _rescale_statistics(
    module: nn.Module, buffers: Mapping[str, Tensor], factor: Tensor, bias: Tensor | None
) -> None:
    if not buffers:
        return
    device = next(iter(buffers.values())).device
    offset = None if bias is None else bias.to(device)
    eps = float(module.eps)  # type: ignore[arg-type]
    rescale_batch_norm_(buffers.get("mean"), buffers.get("var"), factor.to(device), offset, eps)


def _version(buffer: Tensor | None) -> int:
    return 0 if buffer is None else version_of(buffer)
