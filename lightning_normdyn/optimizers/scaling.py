"""A change of scale that is made for an update still to come, and how to take it back.

`ready` shrinks and rescales weights before the optimizer steps. The step may then raise, or a
checkpoint may be saved before the optimizer has written anything: what was done must not be done
again. Every tensor of torch counts how often it was written to; these versions tell what has been
done, and what the optimizer has stepped since.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import and_, is_not, ne, or_
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.placement import gradients_of, versions_of
from lightning_normdyn.geometry.rounded import scale_rounded_
from lightning_normdyn.geometry.vectors import WeightVectors

from .state import RunningStatistics, rescale_batch_norms_

Ahead = dict[str, Any]
"""What a checkpoint holds although its step has not happened: plain tensors, lists and strings."""


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
        return {part: getattr(self.module, f"running_{part}") for part in ("mean", "var")}


class _Watch:
    """Tells which of some tensors have been written to since it began."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = list(tensors)
        # Versions and not copies: comparing numbers would cost memory and wait for the device.
        self._versions = versions_of(tensors)

    def written(self) -> list[bool]:
        return list(map(ne, versions_of(self.tensors), self._versions))


class _LeftGradients:
    """The gradients that weights were left with, to be told from others later.

    Args:
        gradients: of each weight, or None.
        held_until: lives as long as the step that goes on, which holds all of them anyway; None:
            nobody is known to hold them.
    """

    def __init__(self, gradients: Sequence[Tensor | None], held_until: object | None) -> None:
        # With each its version: a new gradient may be written into the same memory.
        self._versions = versions_of(gradients)
        self._held = list(gradients)
        self._references: list[ref[Tensor] | None] = []
        self._end: ref[Any] | None = None
        if held_until is None:
            self.let_go()
            return
        # Nearly always the update is made, and nobody asks: a reference for each gradient would
        # take longer than all that is done with it. Weak here too: no circle may hold gradients.
        own = ref(self)

        def let_go(_: Any) -> None:
            left = own()
            if left is not None:
                left.let_go()

        self._end = ref(held_until, let_go)

    def let_go(self) -> None:
        """Hold them weakly: gradients are the first thing that somebody who is out of memory lets
        go of."""
        held, self._held = self._held, []
        self._references = list(map(_reference, held))

    def gradients(self) -> list[Tensor | None]:
        """Those of them that are still there."""
        if self._held:
            return self._held
        return [None if reference is None else reference() for reference in self._references]

    def differ_from(self, gradients: Sequence[Tensor | None]) -> list[bool]:
        """For each weight whether its gradient is another one now."""
        is_another = map(is_not, gradients, self.gradients())
        is_written = map(ne, versions_of(gradients), self._versions)
        return list(map(or_, is_another, is_written))


class Scaling:
    """One factor per vector, for the weights and for everything that depends on their scale.

    Args:
        vectors: the weights.
        factor: ``(n,)``.
        states: for each weight the optimizer's state, ``{buffer: tensor}``, if it follows.
        exponents: ``{buffer: e}``: the buffer is multiplied by ``factor**e``.
        gradients: whether the gradients of the coming step are divided by the factor.
        statistics: what lies behind the weights.
        invariant: for each weight whether the loss does not see its length; None: of all. Their
            gradients go as one over it.

    Attributes:
        pending: for each weight whether it has been multiplied and the optimizer has not stepped it
            since, when `judge` was last called.
        stepped: for each weight whether the optimizer has stepped it since `seal`, when `judge` was
            last called.

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
        states: Sequence[Mapping[Any, Any]] = (),
        exponents: Mapping[str, float] | None = None,
        gradients: bool = False,
        statistics: Sequence[Statistics] = (),
        invariant: Sequence[bool] | None = None,
    ) -> None:
        self.vectors = vectors
        self.factor = factor
        self.gradients = gradients
        weights = vectors.weights
        self.invariant = list(invariant or [True] * len(weights))
        self.pending = [False] * len(weights)
        self.stepped = [False] * len(weights)

        self._buffers: dict[str, tuple[float, _Watch]] = {}
        # Before its first step an optimizer has no buffers: there is nothing to rescale then.
        for name, exponent in (exponents or {}).items():
            buffers = [of_weight.get(name) for of_weight in states]
            if any(buffer is not None for buffer in buffers):
                self._buffers[name] = exponent, _Watch(buffers)
        self._statistics = [(s, _Watch(list(s.buffers().values()))) for s in statistics]
        # Taken before `apply`, so that a later version says that it was done.
        self._before = vectors.versions()
        self._left: list[int] | None = None
        self._gradients_left: _LeftGradients | None = None

    def apply(self) -> None:
        """Multiply everything."""
        vectors = self.vectors
        vectors.scale_(self.factor)
        # A gradient goes as one over the length, so it is divided.
        if self.gradients:
            # Two operations as a quotient.
            vectors.scale_(self.factor.reciprocal(), vectors.gradients())
        for exponent, watch in self._buffers.values():
            vectors.scale_(self.factor**exponent, vectors.local(watch.tensors))
        behind = []
        for each, _ in self._statistics:
            behind += _statistics_of(each.module, each.buffers(), each.factor, each.bias)
        rescale_batch_norms_(behind)

    # ------------------------------------------------------------------------- what has been done

    def seal(self, held_until: object | None = None) -> None:
        """Everything is ready for the update: what is written from now on, others write.

        Args:
            held_until: lives as long as the step, if that is known to hold its gradients.
        """
        self._left = self.vectors.versions()
        self.seal_gradients(held_until)

    def seal_gradients(self, held_until: object | None = None) -> None:
        """`seal` the gradients again: they were changed for the step and put back."""
        self._gradients_left = _LeftGradients(gradients_of(self.vectors.weights), held_until)

    def forget_gradients(self) -> None:
        """The update has been made: nothing depends on its gradients any more."""
        self._gradients_left = None

    def untouched(self) -> bool:
        """Whether nobody has written to weights and gradients since `seal`."""
        return self._left == self.vectors.versions() and not any(self._new_gradients())

    def _new_gradients(self) -> list[bool]:
        """For each weight whether its gradient is another one than at `seal`."""
        # Not sealed yet: the step raised before its update, so nothing was taken anew.
        if self._gradients_left is None:
            return [False] * len(self.vectors.weights)
        return self._gradients_left.differ_from(gradients_of(self.vectors.weights))

    def judge(self) -> None:
        """Find out what has been done by now: sets `pending` and `stepped`.

        To be called before anybody takes anything back.
        """
        versions = self.vectors.versions()
        # Without a seal nobody can have stepped: the update follows it.
        self.stepped = list(map(ne, versions, self._left or versions))
        multiplied = self._multiplied(versions)
        self.pending = [
            done and not stepped for done, stepped in zip(multiplied, self.stepped, strict=True)
        ]

    def _multiplied(self, versions: Sequence[int]) -> list[bool]:
        return list(map(ne, versions, self._before))

    # -------------------------------------------------------------------------------- and back

    def take_back(self, *, gradients_count: bool = False) -> None:
        """Divide by the factor again what `judge` found to be pending. No collective.

        Args:
            gradients_count: whether the gradients that are there now are what the next update will
                be made of. They are then brought to the scale of the weights: those of this step
                were divided, new ones were taken at weights that had been multiplied.
        """
        pending, vectors = self.pending, self.vectors
        if not any(pending):
            return
        # Divided, not restored from a copy, which would be as large as the model.
        vectors.scale_(1 / self._where(pending))
        if gradients_count:
            self._rescale_gradients()
        for exponent, watch in self._buffers.values():
            # Apart from the weights: an exception may have come between the two.
            written = list(map(and_, pending, watch.written()))
            vectors.scale_(self._where(written) ** -exponent, vectors.local(watch.tensors))
        behind = []
        for each, watch in self._statistics:
            if pending[each.position]:
                written_buffers = _written_buffers(each, watch)
                behind += _statistics_of(each.module, written_buffers, 1 / each.factor, each.bias)
        rescale_batch_norms_(behind)

    def _rescale_gradients(self) -> None:
        at_other_scale = []
        for pending, new, invariant in zip(
            self.pending, self._new_gradients(), self.invariant, strict=True
        ):
            # A gradient that the loss has taken anew at the multiplied weight has the other scale
            # by itself; the one of this step only if it was divided.
            other_scale = invariant if new else self.gradients
            at_other_scale.append(pending and other_scale)
        if any(at_other_scale):
            self.vectors.scale_(self._where(at_other_scale), self.vectors.gradients())

    def _where(self, chosen: Sequence[bool]) -> Tensor:
        """The factor of the vectors of chosen weights, 1 for the others."""
        # The common case, without a transfer to the device.
        if all(chosen):
            return self.factor
        of_weight = torch.tensor(chosen, dtype=torch.bool, device=self.factor.device)
        return torch.where(self.vectors.spread(of_weight), self.factor, 1.0)

    # ------------------------------------------------------------------------ over a checkpoint

    def state(self, names: Sequence[str]) -> Ahead:
        """What a checkpoint must say, so that `put_back` can take this back in another process.

        A collective where vectors lie on several ranks.

        Args:
            names: what the weights are called there.

        Returns:
            Empty if there is nothing to take back.
        """
        self.judge()
        if not any(self.pending):
            return {}
        # On every rank, even where none of its own weights is pending: it is a collective.
        gathered = self.vectors.gather(self.factor)
        written = {name: watch.written() for name, (_, watch) in self._buffers.items()}
        weights = {}
        for i, (name, partition) in enumerate(zip(names, self.vectors.partitions, strict=True)):
            if self.pending[i]:
                weights[name] = {
                    "factor": gathered[i].cpu().clone(),
                    "keep": list(partition.keep),
                    "labels": partition.labels.cpu().clone(),
                    "buffers": {b: self._buffers[b][0] for b in written if written[b][i]},
                }
        behind = {}
        for statistics, watch in self._statistics:
            done = list(_written_buffers(statistics, watch))
            if self.pending[statistics.position] and done:
                bias = None if statistics.bias is None else statistics.bias.cpu().clone()
                factor = statistics.factor.cpu().clone()
                behind[statistics.name] = {"factor": factor, "bias": bias, "done": done}
        return {"weights": weights, "statistics": behind}


class RoundedScaling(Scaling):
    """A scaling of low-precision weights: factors that rounding would swallow are owed.

    Taken back, the factor is owed in the other direction; the weights stay as they are.

    Args:
        vectors: the weights, stored in bfloat16 or float16.
        factor: ``(n,)``.
        owed: ``(n,)``: the product of the factors that earlier steps left unapplied.

    Attributes:
        owed: the same, now.
    """

    def __init__(
        self,
        vectors: WeightVectors,
        factor: Tensor,
        owed: Tensor,
    ) -> None:
        super().__init__(vectors, factor)
        self.owed = owed
        self._applied = False

    def apply(self) -> None:
        """Multiply what survives rounding."""
        self.owed = scale_rounded_(self.vectors, self.factor, self.owed)
        self._applied = True

    def _multiplied(self, versions: Sequence[int]) -> list[bool]:
        # A factor that is owed has not been written anywhere, and yet it counts.
        return [self._applied] * len(versions)

    def take_back(self, *, gradients_count: bool = False) -> None:
        """Owe the factor in the other direction."""
        self.owed = self.owed / self._where(self.pending).to(self.owed.dtype)

    def state(self, names: Sequence[str]) -> Ahead:
        """See `Scaling.state`.

        `put_back` does not touch these weights: who keeps what is owed divides it.
        """
        state = super().state(names)
        for entry in state.get("weights", {}).values():
            entry["owed"] = True
        return state


@torch.no_grad()
def put_back(
    ahead: Ahead,
    weights: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
    module: nn.Module,
) -> list[str]:
    """Take back what a checkpoint holds although its step never happened (`Scaling.state`).

    In the process that goes on from there.

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
        if name not in weights or not _put_weight_back(name, weights[name], entry, optimizers):
            unfit.append(name)
    modules = dict(module.named_modules())
    for name, entry in ahead.get("statistics", {}).items():
        if name not in modules or not _put_statistics_back(modules[name], entry):
            unfit.append(name)
    return unfit


def _put_weight_back(
    name: str,
    weight: Tensor,
    entry: Ahead,
    optimizers: Sequence[Optimizer],
) -> bool:
    """Whether ``entry`` fits the weight; divides it and its buffers if so."""
    # The vectors of then: the callbacks of this process may be resolved to others.
    partition = Partition(tuple(entry["keep"]), entry["labels"], "saved")
    saved = entry["factor"]
    if saved.shape != (partition.n,) or not (torch.isfinite(saved) & (saved > 0)).all():
        return False
    try:
        vectors = WeightVectors([weight], [partition], [name])
    except (ValueError, IndexError):  # the weight has another shape
        return False
    # The weight itself was not written to; who keeps what is owed divides it.
    if entry.get("owed"):
        return True
    factor = vectors.scatter([saved])
    vectors.scale_(1 / factor)
    for optimizer in optimizers:
        state = optimizer.state.get(weight, {})
        for buffer, exponent in entry["buffers"].items():
            if isinstance(state.get(buffer), Tensor):
                vectors.scale_(factor**-exponent, vectors.local([state[buffer]]))
    return True


def _put_statistics_back(norm: nn.Module, entry: Ahead) -> bool:
    """Whether ``entry`` fits the normalization; rescales its running statistics if so."""
    factor, bias = entry["factor"], entry["bias"]
    buffers = {}
    for part in entry["done"]:
        buffer = getattr(norm, f"running_{part}", None)
        if not isinstance(buffer, Tensor) or buffer.shape != factor.shape:
            return False
        buffers[part] = buffer
    if bias is not None and bias.shape != factor.shape:
        return False
    rescale_batch_norms_(_statistics_of(norm, buffers, 1 / factor, bias))
    return True


def _reference(gradient: Tensor | None) -> ref[Tensor] | None:
    return None if gradient is None else ref(gradient)


def _written_buffers(statistics: Statistics, watch: _Watch) -> dict[str, Tensor]:
    written = zip(statistics.buffers().items(), watch.written(), strict=True)
    return {name: buffer for (name, buffer), was_written in written if was_written}


def _statistics_of(
    module: nn.Module,
    buffers: Mapping[str, Tensor],
    factor: Tensor,
    bias: Tensor | None,
) -> list[RunningStatistics]:
    """What is to be rescaled of a normalization; nothing without buffers."""
    if not buffers:
        return []
    # A checkpoint is loaded on the host.
    device = next(iter(buffers.values())).device
    offset = None if bias is None else bias.to(device)
    eps = float(module.eps)  # type: ignore[arg-type]
    mean, var = buffers.get("mean"), buffers.get("var")
    return [RunningStatistics(mean, var, factor.to(device), offset, eps)]
