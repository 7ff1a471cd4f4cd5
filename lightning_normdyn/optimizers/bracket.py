"""When an optimizer really steps: one `StepBracket` per optimizer around every real update.

``ready``: gradients are final, weights are still those the gradients were taken at, the update will
follow.
``stepped``: weights have just changed; the learning rate is still the one that was used.

Built on torch's optimizer hooks with the closure wrapped, so it is right under accumulation,
clipping, every precision, skipped steps,
manual optimization and several optimizers, in Lightning, Fabric or a plain loop. Knows nothing of
Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.placement import full_shape, gradient_of, has_gradient
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.optimizers.decay import DecayOwner
from lightning_normdyn.optimizers.facts import applied_decay
from lightning_normdyn.optimizers.group_numbers import group_number, is_zero
from lightning_normdyn.optimizers.scaling import Scaling
from lightning_normdyn.optimizers.state import is_schedule_free, supports_decay_takeover
from lightning_normdyn.optimizers.step_view import (
    show,
    unsplit,
    view_class,
    view_of,
    writes_into_groups,
)
from lightning_normdyn.optimizers.views import groups_for_step, steps_as_one, torch_optimizers
from lightning_normdyn.optimizers.wrappers import (
    closure_does_nothing,
    fires_step_hooks,
    inner_optimizers,
    prepare_step_hooks,
)


class Phase(IntEnum):
    """The order of events within one step, whatever the order in which callbacks were
    registered."""

    RESOLVE = 0  # ready: find out which weights are meant (first step, or param groups changed)
    MEASURE = 10  # ready: sums over w_t, the weight that the gradient was taken at
    LR_DROP = 20  # ready: rescale weights, state and this step's gradients
    SHRINK = 30  # ready: w <- f w
    SNAPSHOT = 40  # ready: copy the shrunk weight, where somebody asks for it
    # stepped: the first real step has filled the optimizer's state; last moment for an error
    LOOK_AGAIN = 45
    PROJECT = 50  # stepped: on w' - s
    MEASURE_STEP = 60  # stepped: angle of the step
    RESCALE = 70  # stepped: last, so that no step's angle contains it


class HostCopy:
    """A tensor on its way to the host: from a GPU it arrives while the next steps run, and nobody
    waits.

    Args:
        tensor: what to copy, as it is at this point of the device's work.

    Example:
        >>> HostCopy(torch.ones(2)).get()
        tensor([1., 1.])
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            # Only into pinned memory does a copy go on by itself.
            self._host = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True
            )
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.clone()

    @property
    def arrives_later(self) -> bool:
        """Whether `get` might have to wait if it is called at once; the same on every rank."""
        return self._event is not None

    def get(self) -> Tensor:
        """The copy; waits until the device has come to the point where it was asked for."""
        if self._event is not None:
            self._event.synchronize()
        return self._host if self._host.device.type == "cpu" else self._host.cpu()


@dataclass
class Step:
    """One update of one optimizer, as handlers see it.

    Args:
        bracket: the bracket it belongs to.
        number: 1-based count of real steps of this optimizer since the bracket was attached, this
            one included.
        skipped: None, or a 0/1 float tensor on the device: whether a fused optimizer skips this
            update inside its kernel (GradScaler
            found an inf).
        with_gradient: ids of the weights that had a gradient at ``ready``; the step may free or
            replace it.
    """

    bracket: StepBracket
    number: int
    skipped: Tensor | None = None
    with_gradient: Set[int] = frozenset()
    _scalings: list[Scaling] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list)
    _notes: list[Callable[[], None]] = field(default_factory=list)
    _counts: list[Callable[[], None]] = field(default_factory=list)
    _happened: bool = False

    @property
    def optimizer(self) -> Optimizer:
        """The torch optimizer that steps."""
        return self.bracket.optimizer

    def scale(self, scaling: Scaling) -> None:
        """Multiply weights at ``ready``, so that it is not done twice if this step raises, or a
        checkpoint is saved before its update.

        The next step then finds the weights as they are and goes straight to the update, or divides
        them by the factor first.
        """
        self._scalings.append(scaling)
        scaling.apply()

    def undo_with(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` if this step raises and the next one has to begin anew; for what else than
        `scale` is done at ``ready``."""
        self._undo.append(undo)

    def when_done(self, note: Callable[[], None]) -> None:
        """Call ``note`` as soon as it is known that this step has happened: after the update, or
        when a fused optimizer has told the host
        that it did not skip it."""
        if self._happened:
            note()
        else:
            self._notes.append(note)

    def when_updated(self, count: Callable[[], None]) -> None:
        """Call ``count`` after the update, whether or not a fused optimizer skipped it: for counts
        that are 0 where it did."""
        self._counts.append(count)

    def _mark_updated(self) -> None:
        counts, self._counts = self._counts, []
        for count in counts:
            count()

    def _mark_happened(self) -> None:
        self._happened = True
        notes, self._notes = self._notes, []
        for note in notes:
            note()

    def unless_skipped(self, value: Tensor, otherwise: float) -> Tensor:
        """``value``, or ``otherwise`` everywhere if the update is skipped on the device; no host
        synchronization."""
        if self.skipped is None:
            return value
        return torch.where(
            self.skipped.to(value.device) > 0, torch.full_like(value, otherwise), value
        )


Handler = Callable[[Step], None]
Claimed = Set[Tensor] | Mapping[Tensor, Partition]
"""Weights whose decay is taken over: whole, or only in the rows that belong to a vector of their
partition."""


class StepBracket:
    """Calls handlers at the moments ``ready`` and ``stepped`` around every real update of
    ``optimizer``.

    Use `StepBracket.of`: an optimizer has one bracket, shared by everybody.

    Args:
        optimizer: a torch optimizer.

    Raises:
        NotSupportedError: for LBFGS and other optimizers that evaluate their closure more than once
            per step.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> bracket = StepBracket.of(optimizer)
        >>> remove = bracket.add(Phase.RESCALE, lambda step: print("after step", step.number))
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        after step 1
        >>> remove()
    """

    # Weak on both sides, since a handler may hold the optimizer: the hooks of the optimizer hold
    # the bracket.
    _of: ClassVar[WeakKeyDictionary[Optimizer, ref[StepBracket]]] = WeakKeyDictionary()

    @classmethod
    def of(cls, optimizer: Optimizer) -> StepBracket:
        """The bracket of ``optimizer``, or of the one that Lightning or Fabric has wrapped."""
        parts = torch_optimizers(optimizer)
        if len(parts) > 1:
            raise NotSupportedError(
                f"{type(optimizer).__name__} steps {len(parts)} groups of weights one after the "
                f"other. "
                "Bracket each of lightning_normdyn.torch_optimizers(optimizer)."
            )
        optimizer = parts[0]
        known = cls._of.get(optimizer)
        bracket = None if known is None else known()
        if bracket is None:
            bracket = cls(optimizer)
            cls._of[optimizer] = ref(bracket)
        return bracket

    def __init__(self, optimizer: Optimizer) -> None:
        check_optimizer(optimizer)
        self._optimizer_ref = ref(optimizer)
        self.steps = 0
        """Real steps since the bracket was attached, in which some weight had a gradient; call
        `settle` first if a fused optimizer may have
        skipped the last one."""
        self.evaluations = 0
        """How often the step that goes on, or the last one, has evaluated its closure so far."""
        self.on_refusal: Callable[[NotSupportedError], None] | None = None
        """Called in place of an error where a step cannot be handled after others could; None: an
        error at any time."""
        self._handlers: list[tuple[int, int, str, int, Handler]] = []
        self._added = 0
        self._claims: dict[object, tuple[DecayOwner, Callable[[], Claimed]]] = {}
        self._rest: tuple[list[tuple[Tensor, Partition | None]], WeightVectors] | None = None
        # Gradients that were changed for the step: what they were before, and their version
        # afterwards.
        self._gradients: list[tuple[Tensor, Tensor, int]] = []
        self._snapshot_requests: dict[Tensor, Tensor] = {}
        self._snapshots: dict[Tensor, Tensor] = {}
        self._buffers: dict[Tensor, Tensor] = {}
        self._step: Step | None = None
        self._depth = 0
        # Weak: a view shares the optimizer's __dict__, which holds this bracket.
        self._view: ref[Optimizer] | None = None
        self._view_class: tuple[type[Optimizer], type[Any] | None] | None = None
        self._writes_into_groups = True
        self._settings_left: list[Any] | None = None
        self._unsettled: tuple[HostCopy, Step] | None = None
        self._hooks: list[Any] = []

    @property
    def optimizer(self) -> Optimizer:
        """The torch optimizer."""
        optimizer = self._optimizer_ref()
        assert optimizer is not None, "a bracket is used after its optimizer is gone"
        return optimizer

    # -- registration
    # --------------------------------------------------------------------------------------------------

    def add(
        self, phase: Phase, handler: Handler, order: str = "", rank: int = 0
    ) -> Callable[[], None]:
        """Call ``handler(step)`` in ``phase`` of every real step.

        Args:
            phase: when within the step.
            handler: what to call.
            order: breaks ties within a phase, so that the order of registration does not matter.
            rank: who comes first within a phase, where that makes a difference: a lower rank does.

        Returns:
            A function that takes the handler away again; the last one to go detaches the bracket
            from the optimizer.
        """
        if not self._hooks:
            self._attach()
        self._added += 1
        entry = (int(phase), rank, order, self._added, handler)
        self._handlers.append(entry)
        self._handlers.sort(key=lambda e: e[:4])

        def remove() -> None:
            if entry in self._handlers:
                self._handlers.remove(entry)
            if not self._handlers:
                self.detach()

        return remove

    def claim_decay(
        self, claimant: object, owner: DecayOwner, weights: Claimed | Callable[[], Claimed]
    ) -> Callable[[], None]:
        """Take over the weight decay of ``weights`` from the optimizer; a callable is asked at
        every step.

        From ``ready`` to ``stepped`` the step sees those weights in param groups of their own with
        ``weight_decay=0``: bit-exact in every
        precision. The step alone does (`lightning_normdyn.optimizers.step_view`): the optimizer keeps its
        param groups, whoever looks at it meanwhile.
        A second claim by the same claimant replaces its first.

        With a partition for a weight, only its vectors are meant. The rows that belong to none (the
        value rows of a packed qkv with
        QK-norm) get the optimizer's own decay from the bracket, as the optimizer itself would apply
        it: a decoupled one as a factor on
        the rows before the update, a coupled one added to their gradient, which is put back
        afterwards.

        Returns:
            A function that takes the claim back.
        """
        self._claims[claimant] = (owner, weights if callable(weights) else lambda: weights)

        def remove() -> None:
            self._claims.pop(claimant, None)

        return remove

    def decay_owner(self, weight: Tensor) -> DecayOwner | None:
        """Who applies the decay of ``weight``; None: the optimizer."""
        return self.decay_owners().get(weight)

    def decay_owners(self) -> dict[Tensor, DecayOwner]:
        """Who applies the decay of each weight that somebody has claimed."""
        return {weight: owner for owner, weights in self._claimed() for weight in weights}

    def _claimed(self) -> list[tuple[DecayOwner, Claimed]]:
        """All claims, the highest owner last: it is the one that counts."""
        return sorted(
            ((owner, weights()) for owner, weights in self._claims.values()),
            key=lambda claim: claim[0],
        )

    def acts_between(self, first: Phase, last: Phase) -> bool:
        """Whether some handler is called after phase ``first`` and before phase ``last``: whether
        weights may change in between."""
        return any(first < phase < last for phase, *_ in self._handlers)

    def request_snapshot(self, storages: Mapping[Tensor, Tensor]) -> None:
        """Ask, before phase SNAPSHOT, that the shrunk weights of this step be copied.

        Args:
            storages: weight -> this rank's plain storage of it; asked for twice, a weight is copied
                once.
        """
        self._snapshot_requests.update(storages)

    def early_snapshot(self, storages: Mapping[Tensor, Tensor]) -> list[Tensor]:
        """Memory for this step's snapshot, in the order of ``storages``, for one who reads the
        weights anyway and copies them on the way.

        Only for a handler in a phase after which nothing `acts_between` it and SNAPSHOT; it must
        copy all.
        """
        for weight, storage in storages.items():
            if weight not in self._snapshots:
                self._snapshots[weight] = self._buffer(weight, storage)
        return [self._snapshots[weight] for weight in storages]

    def snapshot(self, weight: Tensor) -> Tensor:
        """The copy of the storage of ``weight`` that was taken in this step's SNAPSHOT phase."""
        return self._snapshots[weight]

    # -- the two moments
    # -----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        self._of[self.optimizer] = ref(self)
        post = self.optimizer.register_step_post_hook(self._post)
        self._hooks = [self.optimizer.register_step_pre_hook(self._pre), post]
        # First among the post hooks: whoever else listens must find the weights as the callbacks
        # leave them.
        self.optimizer._optimizer_step_post_hooks.move_to_end(post.id, last=False)  # type: ignore[attr-defined]

    def close_in(self) -> None:
        """Be the last hook before the update, also if others were registered later: ``ready`` comes
        after what they do to gradients.

        Happens after every step; to be called before a step for hooks that are new since the last
        one.
        """
        if self._hooks:
            self.optimizer._optimizer_step_pre_hooks.move_to_end(self._hooks[0].id)  # type: ignore[attr-defined]

    def detach(self) -> None:
        """Leave the optimizer as if the bracket had never been there."""
        self.restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._handlers = []
        self.on_refusal = None
        self._claims = {}
        self._snapshots, self._buffers, self._rest, self._step = {}, {}, None, None
        self._of.pop(self.optimizer, None)

    def _pre(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hooked = sum(getattr(vars(c).get("step"), "hooked", False) for c in type(optimizer).__mro__)
        if self._depth >= hooked:  # an earlier step raised and never came to its end
            self._depth = 0
        self._depth += 1
        if self._depth > 1:  # torch calls hooks again for the super().step() of a subclass
            return None
        self.restore()
        positional = len(args) > 1
        closure = args[1] if positional else kwargs.get("closure")
        view = self._view_of(args[0])
        if closure is None:
            self._ready(args[0])
            return (view, *args[1:]), kwargs
        self.evaluations = 0
        if not closure_does_nothing(closure):
            self.take_back()  # of a step that raised, before new gradients are taken

        def wrapped(*a: Any, **k: Any) -> Any:
            self.evaluations += 1
            if self.evaluations > 1:
                self._evaluated_again()
                return closure(*a, **k)
            loss = closure(*a, **k)
            self._ready(args[0])
            return loss

        if positional:
            return (view, wrapped, *args[2:]), kwargs
        return (view, *args[1:]), {**kwargs, "closure": wrapped}

    def _evaluated_again(self) -> None:
        """The optimizer takes a second gradient in one step, at whatever weights (SAM, a line
        search).

        The step still leads from the weights of the first gradient to those that it leaves, so it
        can be measured and projected, and its
        weights rescaled. But what acts between a gradient and the update is no longer between them.
        """
        acts = any(Phase.MEASURE < phase < Phase.SNAPSHOT for phase, *_ in self._handlers)
        if not acts and not self._gradients:
            return
        error = _closure_error(self.optimizer)
        if not self.steps or self.on_refusal is None:
            self.restore()
            raise error
        self.on_refusal(error)

    @torch.no_grad()
    def _ready(self, stepping: Optimizer) -> None:
        self.settle()
        if self._step is not None and self._is_as_left():
            # The last step raised before it wrote anything: all that has to be done for this one is
            # done.
            self._step.skipped = getattr(self.optimizer, "found_inf", None)
            self._take_decay_over(stepping, self._step, again=True)
            return
        self.take_back(gradients_count=True)
        self._snapshots.clear()  # of a step that raised
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not any(map(has_gradient, parameters)):
            return
        with_gradient = frozenset(id(p) for p in parameters if gradient_of(p) is not None)
        step = Step(self, self.steps + 1, getattr(self.optimizer, "found_inf", None), with_gradient)
        self._step = step
        self._run(Phase.RESOLVE, Phase.RESOLVE)  # may add handlers that act in this very step
        self._run(Phase.RESOLVE + 1, Phase.SNAPSHOT)
        self._take_snapshots()
        self._take_decay_over(stepping, step)

    # -- steps that do not happen
    # ----------------------------------------------------------------------------------------

    def _is_as_left(self) -> bool:
        """Whether ``ready`` was there already, and neither weights, gradients nor the numbers of
        the param groups changed since."""
        step = self._step
        if step is None or self._settings_left is None or not step._scalings:
            return False
        return self._settings_left == self._settings() and all(
            scaling.untouched() for scaling in step._scalings
        )

    def _settings(self) -> list[Any]:
        """The numbers that a step is made with, as the param groups have them; of tensors, which
        and how often written to."""
        found: list[Any] = []
        for group in self.optimizer.param_groups:
            for key in ("lr", "weight_decay"):
                value = group.get(key)
                found.append((id(value), value._version) if isinstance(value, Tensor) else value)
        return found

    @property
    def unfinished(self) -> list[Scaling]:
        """What was multiplied for a step that is not over: its update is running, or it raised."""
        return [] if self._step is None or self._step._happened else list(self._step._scalings)

    @torch.no_grad()
    def take_back(self, *, gradients_count: bool = False) -> None:
        """If the last step raised, make the weights what they were before it, up to one rounding:
        those that it has not stepped.

        Args:
            gradients_count: whether the gradients that are there now are what the next update will
                be made of.
        """
        step, self._step = self._step, None
        self._settings_left = None
        if step is None or step._happened:
            return
        for scaling in step._scalings:
            scaling.judge()
        for scaling in reversed(step._scalings):
            scaling.take_back(gradients_count=gradients_count)
        for undo in reversed(step._undo):
            undo()

    def _view_of(self, stepping: Optimizer) -> Optimizer:
        """What ``step`` is to run on: a view of what was about to step, or that itself where no
        view can be made."""
        kind = type(stepping)
        if self._view_class is None or self._view_class[0] is not kind:
            self._view_class = kind, view_class(kind)
            self._writes_into_groups = writes_into_groups(kind)
        made = self._view_class[1]
        if made is None:
            self._view = None
            return stepping
        view = view_of(stepping, made)
        self._view = ref(view)
        return view

    @torch.no_grad()
    def _post(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        self.restore(after_update=True)
        step, self._step = self._step, None
        if step is None:  # attached between ready and stepped, or no weight had a gradient
            self.close_in()
            return
        step._mark_updated()
        if step.skipped is None:
            self.steps += 1
            step._mark_happened()
        else:
            self._unsettle(step)
        self._step = step
        self._run(Phase.SNAPSHOT + 1, Phase.RESCALE)
        self._step = None
        self._snapshots.clear()
        self.close_in()

    def _run(self, first: int, last: int) -> None:
        assert self._step is not None
        for phase, *_, handler in list(self._handlers):
            if first <= phase <= last:
                handler(self._step)

    def _take_snapshots(self) -> None:
        requests = {
            w: storage for w, storage in self._snapshot_requests.items() if w not in self._snapshots
        }
        self._snapshot_requests = {}
        if not requests:
            return
        buffers = {weight: self._buffer(weight, storage) for weight, storage in requests.items()}
        torch._foreach_copy_(list(buffers.values()), list(requests.values()))
        self._snapshots.update(buffers)

    def _buffer(self, weight: Tensor, storage: Tensor) -> Tensor:
        # New memory of a CPU is fetched page by page from the system, which takes three times as
        # long as the copy. An accelerator's
        # allocator keeps what is freed, and there others can use it between two steps.
        if storage.device.type != "cpu":
            return torch.empty_like(storage)
        known = self._buffers.get(weight)
        if known is None or known.shape != storage.shape or known.dtype != storage.dtype:
            known = self._buffers[weight] = torch.empty_like(storage)
        return known

    # -- counting
    # ------------------------------------------------------------------------------------------------------

    def _unsettle(self, step: Step) -> None:
        """A fused optimizer decides on the device: fetch its decision without waiting for it."""
        assert step.skipped is not None
        self._unsettled = HostCopy(step.skipped), step

    @property
    def stepping(self) -> bool:
        """Whether the optimizer is within its ``step``."""
        return self._depth > 0

    @property
    def unsettled(self) -> bool:
        """Whether the last update of a fused optimizer is not yet counted."""
        return self._unsettled is not None

    def settle(self) -> None:
        """Make `steps` final: count the last update of a fused optimizer unless it was skipped."""
        if self._unsettled is None:
            return
        (copy, step), self._unsettled = self._unsettled, None
        if not bool(copy.get()):
            self.steps += 1
            step._mark_happened()

    # -- decay take-over
    # -----------------------------------------------------------------------------------------------

    def _take_decay_over(self, stepping: Optimizer, step: Step, *, again: bool = False) -> None:
        """Let the step see the claimed weights without weight decay, and apply it to those of their
        rows that nobody claimed.

        Args:
            stepping: what steps.
            step: the step.
            again: whether the last step raised, and its weights are as they were left for it.
        """
        add_decay = self._split(stepping, step, again=again)
        if not again:
            for scaling in step._scalings:
                scaling.seal()
            self._settings_left = self._settings() if step._scalings else None
        if add_decay is not None:
            add_decay()

    def _split(self, stepping: Optimizer, step: Step, *, again: bool) -> Callable[[], None] | None:
        taken: dict[Tensor, Partition | None] = {}
        for _, weights in self._claimed():
            taken.update(weights if isinstance(weights, Mapping) else dict.fromkeys(weights))
        if not taken:
            return None
        optimizer, write_through = self.optimizer, self._writes_into_groups

        def split(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
            return groups_for_step(optimizer, groups, taken, write_through=write_through)

        groups = stepping.param_groups
        shown = split(groups)
        if shown is None:
            return None
        view = None if self._view is None else self._view()
        if view is None:
            raise NotSupportedError(
                f"The weight decay of {type(optimizer).__name__} would have to be taken over, but "
                f"its class cannot be derived from. "
                "Set weight_decay=0 in the param groups of these weights, or use "
                "weight_decay='keep' where the callback has it."
            )
        add_decay = self._decay_rest(taken, step, again=again)
        show(view, split, groups, shown)
        return add_decay

    def _decay_rest(
        self, taken: Mapping[Tensor, Partition | None], step: Step, *, again: bool
    ) -> Callable[[], None] | None:
        """Apply the optimizer's decay to what the step now sees without it although nobody claimed
        it.

        That is rows of claimed weights, and whole weights where a strategy steps all weights of a
        group as one tensor.

        Returns:
            What adds a coupled decay to the gradients; None if there is none to add.
        """
        as_one = steps_as_one(self.optimizer)
        if not as_one and not any(part is not None and part.partial for part in taken.values()):
            return None
        groups = [(group, p) for group in self._decaying_groups() for p in group["params"]]
        partly: list[tuple[Tensor, Partition | None, dict[str, Any]]] = []
        for group, weight in groups:
            if weight in taken:
                part = taken[weight]
                if part is not None and part.partial:
                    partly.append((weight, part, group))
            elif as_one:
                partly.append((weight, None, group))
        if not partly:
            return None
        known = [(w, part) for w, part, _ in partly]
        if self._rest is None or [(id(w), id(part)) for w, part in self._rest[0]] != [
            (id(w), id(part)) for w, part in known
        ]:
            rest = [
                Partition.whole(full_shape(w)) if part is None else part.rest() for w, part in known
            ]
            self._rest = known, WeightVectors([w for w, _ in known], rest)
        vectors = self._rest[1]
        present_gradients = vectors.has_gradient(step)
        coupled, factors = [], []
        for (weight, _, group), present in zip(partly, present_gradients, strict=True):
            decay = applied_decay(self.optimizer, group, weight) if present else None
            is_coupled = decay is not None and decay.kind == "coupled"
            sign = (
                -1.0 if group.get("maximize") else 1.0
            )  # torch turns the gradient around before it adds the decay
            factors.append(1.0 if decay is None else decay.factor)
            coupled.append(sign * decay.amount if decay is not None and is_coupled else 0.0)
        if not again and any(isinstance(f, Tensor) or f != 1 for f in factors):
            step.scale(
                Scaling(
                    vectors,
                    step.unless_skipped(self._of_rest(vectors, factors), 1.0),
                    invariant=[False] * len(partly),
                )
            )
        if not any(isinstance(c, Tensor) or c != 0 for c in coupled):
            return None
        amounts = self._of_rest(vectors, coupled)
        return partial(self._add_to_gradients, vectors, amounts)

    def _add_to_gradients(self, vectors: WeightVectors, amounts: Tensor) -> None:
        scale = getattr(
            self.optimizer, "grad_scale", None
        )  # a fused optimizer divides by it in its kernel, before the decay
        gradients = vectors.gradients()
        before = [(g, g.clone()) for g in gradients if g is not None]
        vectors.add_scaled_(
            amounts if scale is None else amounts * scale.to(amounts), vectors.values(), gradients
        )
        self._gradients = [(g, copy, g._version) for g, copy in before]

    def _decaying_groups(self) -> list[dict[str, Any]]:
        """Param groups with a weight decay; one that lives on a device counts as one, since nothing
        waits for it."""
        return [
            group
            for group in self.optimizer.param_groups
            if not is_zero(group_number(group, "weight_decay"))
        ]

    @staticmethod
    def _of_rest(vectors: WeightVectors, values: list[Any]) -> Tensor:
        per_weight = torch.stack(
            [torch.as_tensor(v, dtype=vectors.sum_dtype, device=vectors.device) for v in values]
        )
        return vectors.spread(per_weight)

    @torch.no_grad()
    def restore(self, *, after_update: bool = False) -> None:
        """Give the optimizer its own gradients back, if a step left them changed, and show nobody
        split param groups any more.

        Args:
            after_update: whether only the update has been there since. If the step raised, somebody
                may have written new gradients into
                the same memory: these stay.
        """
        changed, self._gradients = self._gradients, []
        for gradient, before, version in changed:
            if after_update or gradient._version == version:
                gradient.copy_(before)
        if changed and self._step is not None:
            for scaling in self._step._scalings:
                scaling.seal_gradients()
        view = None if self._view is None else self._view()
        self._view = None
        if view is not None:
            unsplit(view)


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse optimizers that have no single step from one weight to the next.

    Raises:
        NotSupportedError: for LBFGS (evaluates its closure more than once) and schedule-free
            optimizers (keep a second copy of the
            weights), and for one whose step hooks torch does not call.
    """
    prepare_step_hooks(optimizer)
    if not fires_step_hooks(optimizer):
        raise NotSupportedError(
            f"torch calls no hooks around the step of {type(optimizer).__name__}, so nobody would "
            f"see it step: its __init__ never calls "
            "torch.optim.Optimizer.__init__. Let it call super().__init__(params, defaults), or "
            "return the optimizer inside it."
        )
    if any(c.__name__ == "LBFGS" for c in type(optimizer).__mro__):
        raise _closure_error(optimizer)
    if is_schedule_free(optimizer):
        raise NotSupportedError(
            f"{type(optimizer).__name__} keeps a second copy of the weights and trains at a point "
            f"between the two, so a norm or a "
            "step of the parameter alone means nothing. Use the optimizer's ordinary form with a "
            "learning rate schedule."
        )


def check_decay_takeover(
    optimizer: Optimizer, weights: Iterable[Tensor] | Mapping[Tensor, Partition]
) -> None:
    """Refuse, before training, a decay that cannot be taken over.

    Args:
        optimizer: whose decay.
        weights: of these weights, or of the vectors of these partitions.

    Raises:
        NotSupportedError: if a group that holds one of ``weights`` has a decay that is not 0 and
            the optimizer keeps per-step state in its
            groups, or is not known, or applies it to the rows that nobody takes over in a way that
            cannot be repeated.
    """
    reason = supports_decay_takeover(optimizer)
    if inner_optimizers(optimizer):
        reason = f"{type(optimizer).__name__} steps through the optimizer inside it, which has param groups of its own"
    if reason is None:
        _check_rest(optimizer, weights if isinstance(weights, Mapping) else {})
        return
    ours = {id(w) for w in weights}
    for group in optimizer.param_groups:
        decay = group_number(group, "weight_decay")
        if not is_zero(decay) and any(id(p) in ours for p in group["params"]):
            raise NotSupportedError(
                f"The weight decay {decay} of {type(optimizer).__name__} would have to be taken "
                f"over for these weights, but {reason}. "
                "Set weight_decay=0 in their param group, or use weight_decay='keep' where the "
                "callback has it."
            )


def _check_rest(optimizer: Optimizer, partitions: Mapping[Tensor, Partition]) -> None:
    for group in optimizer.param_groups:
        partial = [p for p in group["params"] if p in partitions and partitions[p].partial]
        if not partial or is_zero(group_number(group, "weight_decay")):
            continue
        if applied_decay(optimizer, group, partial[0]) is None:
            raise NotSupportedError(
                f"Some rows of a weight keep the weight decay {group['weight_decay']} of "
                f"{type(optimizer).__name__} while that of the "
                "others is taken over, but a trial could not tell how it applies its decay, so it "
                "cannot be applied to those rows alone. "
                "Set weight_decay=0 in the weight's param group, or use weight_decay='keep' where "
                "the callback has it."
            )
        if not group.get("fused"):
            continue
        if any(p.dtype.itemsize < 4 for p in partial):
            raise NotSupportedError(
                f"Some rows of a weight keep the weight decay {group['weight_decay']} of "
                f"{type(optimizer).__name__} while that of the "
                "others is taken over, but its fused kernel applies it in float32 within the "
                "update, and the weight is stored in less. "
                "Use fused=False, set weight_decay=0 in the weight's param group, or "
                "weight_decay='keep' where the callback has it."
            )


def _closure_error(optimizer: Optimizer) -> NotSupportedError:
    return NotSupportedError(
        f"{type(optimizer).__name__} evaluates its closure more than once per step, so there is no "
        f"single gradient that the update follows "
        "on. Use an optimizer that evaluates it once, such as SGD or AdamW, or SAM around one of "
        "them."
    )
