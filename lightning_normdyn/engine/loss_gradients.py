"""The gradients of the loss itself: as a backward pass leaves them, before anybody clips,
centralizes or disturbs them.

The Euler test holds for the gradient of the loss. What the optimizer receives may be something
else: adaptive clipping, centralized
gradients, added noise, a gradient compressed on its way between the ranks. So the sums are taken at
the very end of the backward pass,
before any hook of Lightning, of other callbacks and of the optimizer. What changes a gradient even
earlier (hooks of the weight itself)
is watched, and such a gradient is no evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_normdyn.geometry.vectors import WeightVectors

# Hooks of DistributedDataParallel that average gradients, at most in 16 bits, and so leave their
# direction.
AVERAGING_HOOKS = ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook")


def changed_between_ranks(model: Any) -> bool:
    """Whether a communication hook may hand back something else than the average of the gradients
    (PowerSGD, one of the user's own).

    Args:
        model: what the strategy has wrapped around the module: DistributedDataParallel and FSDP
            list their hooks.
    """
    hooks = [hook for hook, _ in getattr(model, "_comm_hooks", None) or ()]
    if getattr(model, "_comm_hook", None) is not None:
        hooks.append(model._comm_hook)
    return any(getattr(hook, "__name__", "?") not in AVERAGING_HOOKS for hook in hooks)


def at_the_end_of_backward(loss: Tensor, call: Callable[[], None]) -> None:
    """Call once the backward pass of ``loss`` is over, as the last thing within it: gradients are
    complete and averaged over ranks."""
    engine = torch.autograd.Variable._execution_engine

    def last() -> None:
        # DistributedDataParallel and FSDP finish their gradients in callbacks of this very queue,
        # which were added after ours.
        engine.queue_callback(call)

    def hook(_: Tensor) -> None:
        engine.queue_callback(last)

    loss.register_hook(hook)  # type: ignore[no-untyped-call]


class LossGradients:
    """What one optimizer's next step may know of the loss's own gradients.

    `watch` before each backward pass that belongs to the step, `take` when the step is about to
    happen.

    Args:
        weights: the weights of interest.
        vectors: them as vectors; None while it is not yet known what their vectors are: then the
            gradients are copied.
    """

    def __init__(self, weights: Iterable[Tensor], vectors: WeightVectors | None) -> None:
        self.weights = [w for w in weights if w.requires_grad]
        self.vectors = vectors
        self._sums: Tensor | None = None
        self._copies: dict[Tensor, Tensor] = {}
        self._weights: dict[Tensor, Tensor] = {}  # their lengths when the gradients were copied
        self._changed: dict[
            Tensor, Tensor
        ] = {}  # weight -> 1 where something changed its gradient, on its device
        self._hooks: list[Any] = []
        self.seen = False

    def watch(self, loss: Tensor) -> None:
        """Before the backward pass of ``loss``."""
        if not loss.requires_grad or (self.vectors is not None and self.vectors.through_masters):
            return
        self._look_for_changes()
        for weight in self.weights:
            self._watch_hooks(weight)
        at_the_end_of_backward(loss, self._at_the_end)

    @torch.no_grad()
    def _at_the_end(self) -> None:
        for remove in self._hooks:
            remove()
        self._hooks = []
        self.seen = True
        if self.vectors is None:
            gradients = {w: _gradient(w) for w in self.weights}
            self._copies = {w: g.clone() for w, g in gradients.items() if g is not None}
            self._weights = {w: _length(w) for w in self._copies}
        else:
            self._sums = self._products()

    def _products(self) -> Tensor | None:
        assert self.vectors is not None
        weights, gradients = self.vectors.values(), self.vectors.gradients()
        if not _fit(weights, gradients):
            return None
        return self.vectors.partial_inner(
            (weights, weights), (weights, gradients), (gradients, gradients), exact=False
        )

    # -- what came in between
    # ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _look_for_changes(self) -> None:
        """Gradients that an earlier batch has left must be what its backward pass gave: a gradient
        may be clipped at every batch."""
        if not self.seen:
            return
        if self.vectors is not None and self._sums is not None:
            gradients = self.vectors.gradients()
            if any(g is not None for g in gradients):
                now, before = (
                    self.vectors.partial_inner((gradients, gradients), exact=False)[0],
                    self._sums[2],
                )
                differs = (
                    self.vectors.per_weight(((now != before) & (now != 0)).to(now.dtype)) > 0
                )  # 0: cleared in place
                for weight, changed in zip(self.vectors.weights, differs, strict=True):
                    self._note(weight, changed)
        for weight, copy in self._copies.items():
            gradient = _gradient(weight)
            if gradient is not None:
                self._note(weight, ((gradient != copy) & (gradient != 0)).any())

    def _note(self, weight: Tensor, changed: Tensor) -> None:
        self._changed[weight] = (
            changed if weight not in self._changed else self._changed[weight] | changed
        )

    def _watch_hooks(self, weight: Tensor) -> None:
        """Put one hook before and one behind those that others have given the weight, and compare
        what passes."""
        before_accumulation: Any = weight._backward_hooks
        if before_accumulation:
            passing: list[tuple[Tensor, int]] = []

            def enters(gradient: Tensor) -> None:
                passing.append((gradient, gradient._version))

            def leaves(gradient: Tensor) -> None:
                before, version = passing.pop()
                if gradient is not before or gradient._version != version:
                    self._note(weight, torch.ones((), dtype=torch.bool, device=weight.device))

            register: Any = weight.register_hook
            self._hooks.append(_put_first(before_accumulation, register(enters)))
            self._hooks.append(register(leaves).remove)
        after_accumulation: Any = weight._post_accumulate_grad_hooks
        if after_accumulation:
            lengths: list[Tensor] = []

            def arrives(_: Tensor) -> None:
                gradient = _gradient(weight)
                if gradient is not None:
                    lengths.append(_length(gradient))

            def goes(_: Tensor) -> None:
                gradient = _gradient(weight)
                if lengths and gradient is not None:  # an optimizer that steps in here leaves none
                    self._note(weight, _length(gradient) != lengths[-1])
                lengths.clear()

            register_after: Any = weight.register_post_accumulate_grad_hook
            self._hooks.append(_put_first(after_accumulation, register_after(arrives)))
            self._hooks.append(register_after(goes).remove)

    # -- the step
    # ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def take(self, vectors: WeightVectors) -> Tensor | None:
        """This rank's <w, w>, <w, g>, <g, g> of each vector, ``(3, n)``; NaN where hooks have
        changed the gradient.

        None if no backward pass was watched, or none of whose end the gradients are known: then
        only the optimizer's are there.
        """
        sums = self._sums
        known = self.vectors is None or self.vectors is vectors
        if not self.seen or not known or vectors.through_masters:
            return None
        if self.vectors is None:
            copies, weights = (
                vectors.local([self._copies.get(w) for w in vectors.weights]),
                vectors.values(),
            )
            if not _fit(weights, copies):
                return None
            # SAM takes its gradient at weights that it has moved, and moves them back before it
            # steps.
            for weight, length in self._weights.items():
                self._note(weight, _length(weight) != length)
            sums = vectors.partial_inner(
                (weights, weights), (weights, copies), (copies, copies), exact=False
            )
        if sums is None:
            return None
        changed = [self._changed.get(w) for w in vectors.weights]
        for where, flag in zip(vectors.slices, changed, strict=True):
            if flag is not None:
                sums[1:, where] = torch.where(flag, float("nan"), sums[1:, where])
        return sums

    def forget(self) -> None:
        """Leave no hook behind: a backward pass that raised never came to its end."""
        for remove in self._hooks:
            remove()
        self._hooks = []


def _fit(weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> bool:
    """Whether gradients are laid out like the weights: FSDP1 keeps whole ones between the batches
    that it accumulates."""
    return all(g is None or g.shape == w.shape for w, g in zip(weights, gradients, strict=True))


def _gradient(weight: Tensor) -> Tensor | None:
    """Its dense gradient, if there is one."""
    gradient = weight.grad
    if gradient is None or gradient.layout != torch.strided or gradient.numel() == 0:
        return None
    return gradient.detach()


def _length(tensor: Tensor) -> Tensor:
    """The length of what this rank holds of a weight or gradient."""
    local: Any = tensor.detach()
    if hasattr(local, "to_local"):
        local = local.to_local()
    length: Tensor = torch.linalg.vector_norm(local)
    return length


def _put_first(hooks: Any, handle: Any) -> Callable[[], None]:
    """Make the last hook of an ordered dictionary the first; returns what removes it."""
    # torch reads the entries in the order in which they were put in, and does not heed
    # `move_to_end`.
    others = [(key, hook) for key, hook in hooks.items() if key != handle.id]
    ours = hooks[handle.id]
    hooks.clear()
    hooks[handle.id] = ours
    hooks.update(others)
    return handle.remove  # type: ignore[no-any-return]


__all__ = ["LossGradients", "at_the_end_of_backward", "changed_between_ranks"]
