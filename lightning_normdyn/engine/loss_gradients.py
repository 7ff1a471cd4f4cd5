"""The gradients of the loss itself: as a backward pass leaves them, before anybody clips,
centralizes or disturbs them.

The Euler test holds for the gradient of the loss. What the optimizer receives may be something
else: adaptive clipping, centralized gradients, added noise, a gradient compressed on its way
between the ranks. So the sums are taken at the very end of the backward pass, before any hook of
Lightning, of other callbacks and of the optimizer. What changes a gradient even earlier (hooks of
the weight itself) is watched, and such a gradient is no evidence.
"""

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


def euler_products(vectors: WeightVectors, gradients: Sequence[Tensor | None]) -> Tensor:
    """This rank's <w, w>, <w, g>, <g, g> of each vector, ``(3, n)``: what the Euler test needs.

    Args:
        vectors: of the weights.
        gradients: laid out like `WeightVectors.values`.
    """
    weights = vectors.values()
    return vectors.partial_inner(
        (weights, weights),
        (weights, gradients),
        (gradients, gradients),
        exact=False,
    )


class LossGradients:
    """What one optimizer's next step may know of the loss's own gradients.

    `watch` before each backward pass that belongs to the step, `take` when the step is about to
    happen.

    Args:
        weights: the weights of interest.
        vectors: them as vectors; None while it is not yet known what their vectors are: then the
            gradients are copied.
    """

    def __init__(
        self,
        weights: Iterable[Tensor],
        vectors: WeightVectors | None,
    ) -> None:
        self._weights = [w for w in weights if w.requires_grad]
        self._vectors = vectors
        self._is_complete = False  # whether a watched backward pass has come to its end
        self._sums: Tensor | None = None
        self._copies: dict[Tensor, Tensor] = {}
        self._lengths: dict[Tensor, Tensor] = {}  # of the weights when gradients were copied
        # For each weight, on its device: whether something has changed its gradient.
        self._changed: dict[Tensor, Tensor] = {}
        self._removers: list[Callable[[], None]] = []

    def watch(self, loss: Tensor) -> None:
        """Before the backward pass of ``loss``."""
        # Gradients of masters (DeepSpeed) come late.
        through_masters = self._vectors is not None and self._vectors.through_masters
        if not loss.requires_grad or through_masters:
            return
        if self._is_complete:
            self._look_for_changes()
        for weight in self._weights:
            self._watch_hooks(weight)
        at_the_end_of_backward(loss, self._complete)

    @torch.no_grad()
    def _complete(self) -> None:
        self.forget()
        self._is_complete = True
        if self._vectors is not None:
            gradients = self._vectors.gradients()
            fit = _fit(self._vectors, gradients)
            self._sums = euler_products(self._vectors, gradients) if fit else None
            return
        self._copies, self._lengths = {}, {}
        for weight in self._weights:
            gradient = _gradient(weight)
            if gradient is not None:
                self._copies[weight] = gradient.clone()
                self._lengths[weight] = _length(weight)

    def forget(self) -> None:
        """Leave no hook behind: a backward pass that raised never came to its end."""
        for remove in self._removers:
            remove()
        self._removers = []

    # -- what came in between
    # ------------------------------------------------------------------------------

    @torch.no_grad()
    def _look_for_changes(self) -> None:
        """Gradients that an earlier batch has left must be what its backward pass gave: a gradient
        may be clipped at every batch."""
        if self._vectors is not None and self._sums is not None:
            self._compare_sums(self._vectors, self._sums[2])
        for weight, copy in self._copies.items():
            gradient = _gradient(weight)
            if gradient is not None:
                # 0: cleared in place
                self._note(weight, ((gradient != copy) & (gradient != 0)).any())

    def _compare_sums(
        self,
        vectors: WeightVectors,
        before: Tensor,
    ) -> None:
        gradients = vectors.gradients()
        if all(gradient is None for gradient in gradients):
            return
        (squares,) = vectors.partial_inner((gradients, gradients), exact=False)
        differs = (squares != before) & (squares != 0)
        per_weight = vectors.per_weight(differs.to(squares.dtype)) > 0
        for weight, changed in zip(vectors.weights, per_weight, strict=True):
            self._note(weight, changed)

    def _note(
        self,
        weight: Tensor,
        changed: Tensor,
    ) -> None:
        self._changed[weight] = changed | self._changed.get(weight, False)

    def _watch_hooks(self, weight: Tensor) -> None:
        """Compare what goes into the hooks that others have given the weight with what comes
        out."""
        parameter: Any = weight
        if parameter._backward_hooks:
            passing: list[tuple[Tensor, int]] = []

            def enters(gradient: Tensor) -> None:
                passing.append((gradient, gradient._version))

            def leaves(gradient: Tensor) -> None:
                before, version = passing.pop()
                if gradient is not before or gradient._version != version:
                    self._note(weight, torch.ones((), dtype=torch.bool, device=weight.device))

            self._surround(parameter._backward_hooks, parameter.register_hook, enters, leaves)

        if parameter._post_accumulate_grad_hooks:
            lengths: list[Tensor] = []

            def arrives(_: Tensor) -> None:
                gradient = _gradient(weight)
                if gradient is not None:
                    lengths.append(_length(gradient))

            def goes(_: Tensor) -> None:
                gradient = _gradient(weight)
                # An optimizer that steps in these hooks leaves no gradient.
                if lengths and gradient is not None:
                    self._note(weight, _length(gradient) != lengths[-1])
                lengths.clear()

            register = parameter.register_post_accumulate_grad_hook
            self._surround(parameter._post_accumulate_grad_hooks, register, arrives, goes)

    def _surround(
        self,
        hooks: Any,
        register: Any,
        before: Any,
        behind: Any,
    ) -> None:
        """Put one hook before and one behind those that are there.

        Args:
            hooks: the ordered dictionary of the others.
            register: adds one to it.
            before: what is called first.
            behind: what is called last.
        """
        first = register(before)
        # torch reads the entries in the order in which they were put in, and does not heed
        # `move_to_end`.
        for key in list(hooks):
            if key != first.id:
                hooks[key] = hooks.pop(key)
        self._removers += [first.remove, register(behind).remove]

    # -- the step
    # ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def take(self, vectors: WeightVectors) -> Tensor | None:
        """This rank's `euler_products`; NaN where hooks have changed the gradient.

        None if no backward pass was watched, or none of whose end the gradients are known: then
        only the optimizer's are there.
        """
        is_known = self._vectors is None or self._vectors is vectors
        if not self._is_complete or not is_known or vectors.through_masters:
            return None
        sums = self._sums
        if self._vectors is None:
            copies = vectors.local([self._copies.get(w) for w in vectors.weights])
            if not _fit(vectors, copies):
                return None
            # SAM takes its gradient at weights that it has moved, and moves them back before it
            # steps.
            for weight, length in self._lengths.items():
                self._note(weight, _length(weight) != length)
            sums = euler_products(vectors, copies)
        if sums is None:
            return None
        for weight, where in zip(vectors.weights, vectors.slices, strict=True):
            if weight in self._changed:
                changed, products = self._changed[weight], sums[1:, where]
                # Chosen on the device, which nobody waits for.
                sums[1:, where] = torch.where(changed, float("nan"), products)
        return sums


def _fit(vectors: WeightVectors, gradients: Sequence[Tensor | None]) -> bool:
    """Whether gradients are laid out like the weights: FSDP1 keeps whole ones between the batches
    that it accumulates."""
    for weight, gradient in zip(vectors.values(), gradients, strict=True):
        if gradient is not None and gradient.shape != weight.shape:
            return False
    return True


def _gradient(weight: Tensor) -> Tensor | None:
    """Its dense gradient, if there is one."""
    gradient = weight.grad
    if gradient is None:
        return None
    # A rank that holds nothing of a sharded weight has an empty gradient.
    is_dense = gradient.layout == torch.strided
    return gradient.detach() if is_dense and gradient.numel() else None


def _length(tensor: Tensor) -> Tensor:
    """The length of what this rank holds of a weight or gradient."""
    local: Any = tensor.detach()
    if hasattr(local, "to_local"):
        local = local.to_local()
    length: Tensor = torch.linalg.vector_norm(local)
    return length
