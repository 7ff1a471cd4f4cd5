"""When an optimizer really steps: one `StepBracket` per optimizer around every real update.

``ready``: gradients are final, weights are still those the gradients were taken at, the update will
follow. ``stepped``: weights have just changed; the learning rate is still the one that was used.

Built on torch's optimizer hooks with the closure wrapped, so it is right under accumulation,
clipping, every precision, skipped steps, manual optimization and several optimizers, in Lightning,
Fabric or a plain loop. Knows nothing of Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.placement import any_gradient, with_gradient

from .checks import check_optimizer, closure_error
from .decay import DecayOwner
from .group_numbers import HELD
from .scaling import Scaling
from .step import Bracket, Handler, HostCopy, Phase, Step
from .takeover import Claimed, DecayTakeover
from .views import torch_optimizers
from .wrappers import closure_does_nothing


def _hooked_steps(kind: type[Optimizer]) -> int:
    """How many ``step`` methods of a class and its bases torch has put hooks around."""
    return sum(getattr(vars(c).get("step"), "hooked", False) for c in kind.__mro__)


def _stepped(held: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Those of the weights of all groups that have a gradient."""
    return with_gradient(chain.from_iterable(held))


def _holds_gradients(kind: type[Optimizer]) -> bool:
    """Whether a step lets go of no gradient before it is over: torch's own do not. One of somebody
    else may, to have their memory."""
    module = getattr(kind.step, "__module__", None)
    return str(module).startswith("torch.optim.")


class _Entry(NamedTuple):
    """A handler and its place in the order of a step."""

    phase: int
    rank: int
    order: str
    added: int
    handler: Handler
    reads_gradients: Callable[[Step], bool] | None


class StepBracket(Bracket):
    """Calls handlers at the moments ``ready`` and ``stepped`` of every real update of an optimizer.

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

    # Both references are weak: the optimizer's hooks hold the bracket and a handler may hold the
    # optimizer, so a strong one would be a cycle through a global.
    _of: ClassVar[WeakKeyDictionary[Optimizer, ref[StepBracket]]] = WeakKeyDictionary()

    @classmethod
    def of(cls, optimizer: Optimizer) -> StepBracket:
        """The bracket of ``optimizer``, or of the one that Lightning or Fabric has wrapped."""
        parts = torch_optimizers(optimizer)
        if len(parts) > 1:
            raise NotSupportedError(
                f"{type(optimizer).__name__} steps {len(parts)} groups of weights one after the "
                "other. Bracket each of lightning_normdyn.torch_optimizers(optimizer)."
            )
        optimizer = parts[0]
        known = cls._of.get(optimizer)
        bracket = None if known is None else known()
        if bracket is None:
            bracket = cls(optimizer)
            cls._of[optimizer] = ref(bracket)
        return bracket

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__()
        check_optimizer(optimizer)
        self._optimizer_ref = ref(optimizer)
        self.steps = 0
        """Real steps since the bracket was attached, in which some weight had a gradient; call
        `settle` first if a fused optimizer may have skipped the last one."""
        self.evaluations = 0
        """How often the step that goes on, or the last one, has evaluated its closure so far."""
        self.on_refusal: Callable[[NotSupportedError], None] | None = None
        """Called in place of an error where a step cannot be handled after others could; None: an
        error at any time."""
        self._hooks: list[Any] = []
        self._handlers: list[_Entry] = []
        self._added = 0
        self._takeover = DecayTakeover()
        self._depth = 0  # calls of torch's hooks that are not over: a step may call super().step()
        self._step: Step | None = None
        self._settings_left: list[Any] | None = None
        self._unsettled: tuple[HostCopy, Step] | None = None

    @property
    def optimizer(self) -> Optimizer:
        """The torch optimizer."""
        optimizer = self._optimizer_ref()
        assert optimizer is not None, "a bracket is used after its optimizer is gone"
        return optimizer

    # ---------------------------------------------------------------------------- registration

    def add(
        self,
        phase: Phase,
        handler: Handler,
        order: str = "",
        rank: int = 0,
        reads_gradients: Callable[[Step], bool] | None = None,
    ) -> Callable[[], None]:
        """Call ``handler(step)`` in ``phase`` of every real step.

        Args:
            phase: when within the step.
            handler: what to call.
            order: breaks ties within a phase, so that the order of registration does not matter.
            rank: who comes first within a phase, where that makes a difference: a lower rank does.
            reads_gradients: of a handler in a phase after the update, asked right before it:
                whether the handler will ask which weights had a gradient. None: it may.

        Returns:
            A function that takes the handler away again; the last one to go detaches the bracket
            from the optimizer.
        """
        if not self._hooks:
            self._attach()
        self._added += 1
        entry = _Entry(phase, rank, order, self._added, handler, reads_gradients)
        self._handlers.append(entry)
        # Without the functions, which cannot be compared.
        self._handlers.sort(key=lambda e: e[:4])

        def remove() -> None:
            if entry in self._handlers:
                self._handlers.remove(entry)
            if not self._handlers:
                self.detach()

        return remove

    def acts_between(self, first: Phase, last: Phase, *, before_rank: int | None = None) -> bool:
        """Whether some handler is called after phase ``first`` and before phase ``last``, or in
        ``last`` with a rank below ``before_rank``.

        If so, weights may change in between.
        """
        for entry in self._handlers:
            if first < entry.phase < last:
                return True
            if before_rank is not None and entry.phase == last and entry.rank < before_rank:
                return True
        return False

    def claim_decay(
        self, claimant: object, owner: DecayOwner, weights: Claimed | Callable[[], Claimed]
    ) -> Callable[[], None]:
        """Take over the weight decay of ``weights`` from the optimizer.

        From ``ready`` to ``stepped`` the step sees those weights in param groups of their own with
        ``weight_decay=0`` (`lightning_normdyn.optimizers.takeover`). A second claim by the same
        claimant replaces its first.

        With a partition for a weight, only its vectors are meant. The rows that belong to none (the
        value rows of a packed qkv with QK-norm) get the optimizer's own decay from the bracket, as
        the optimizer itself would apply it: a decoupled one as a factor on the rows before the
        update, a coupled one added to their gradient, which is put back afterwards.

        Args:
            claimant: who claims it.
            owner: as whom; the highest owner of a weight applies its decay.
            weights: of which weights; a callable is asked at every step.

        Returns:
            A function that takes the claim back.
        """
        return self._takeover.claim(claimant, owner, weights)

    def decay_owner(self, weight: Tensor) -> DecayOwner | None:
        """Who applies the decay of ``weight``; None: the optimizer."""
        return self.decay_owners().get(weight)

    def decay_owners(self) -> dict[Tensor, DecayOwner]:
        """Who applies the decay of each weight that somebody has claimed."""
        return self._takeover.owners()

    # ----------------------------------------------------------------- the hooks of the optimizer

    def _attach(self) -> None:
        self._of[self.optimizer] = ref(self)
        post = self.optimizer.register_step_post_hook(self._post)
        self._hooks = [self.optimizer.register_step_pre_hook(self._pre), post]
        # First among the post hooks: whoever else listens must find the weights as the callbacks
        # leave them.
        self.optimizer._optimizer_step_post_hooks.move_to_end(post.id, last=False)  # type: ignore[attr-defined]

    def close_in(self) -> None:
        """Be the last hook before the update, also if others were registered later.

        ``ready`` then comes after what they do to gradients. Happens after every step; to be called
        before a step for hooks that are new since the last one.
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
        # Anew, with its buffers: they are as large as the weights.
        super().__init__()
        self._takeover, self._step = DecayTakeover(), None
        self._of.pop(self.optimizer, None)

    def _pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        # As many of torch's hooks can be open as steps of this class and its bases are hooked. If
        # there are more, an earlier step raised and never came to its end.
        if self._depth and self._depth >= _hooked_steps(type(optimizer)):
            self._depth = 0
        self._depth += 1
        # torch calls the hooks again for the super().step() of a subclass: the same step.
        if self._depth > 1:
            return None
        self.restore()
        stepping, *others = args
        view = self._takeover.view_for(stepping)
        closure = others[0] if others else kwargs.get("closure")
        if closure is None:
            self._ready(stepping)
            return (view, *others), kwargs
        self.evaluations = 0
        # What a step that raised has left behind goes before new gradients are taken.
        if self._step is not None and not closure_does_nothing(closure):
            self.take_back()

        def wrapped(*a: Any, **k: Any) -> Any:
            self.evaluations += 1
            if self.evaluations > 1:
                self._evaluated_again()
                return closure(*a, **k)
            loss = closure(*a, **k)
            self._ready(stepping)
            return loss

        if others:
            return (view, wrapped, *others[1:]), kwargs
        return (view,), {**kwargs, "closure": wrapped}

    def _evaluated_again(self) -> None:
        """The optimizer takes a second gradient in one step (SAM, a line search).

        The step still leads from the weights of the first gradient to those that it leaves, so it
        can be measured and projected, and its weights rescaled. But what acts between a gradient
        and the update is no longer between them.
        """
        acts = self.acts_between(Phase.MEASURE, Phase.SNAPSHOT)
        if not acts and not self._takeover.changes_gradients:
            return
        error = closure_error(self.optimizer)
        if not self.steps or self.on_refusal is None:
            self.restore()
            raise error
        self.on_refusal(error)

    @torch.no_grad()
    def _ready(self, stepping: Optimizer) -> None:
        self.settle()
        optimizer = self.optimizer
        skipped = getattr(optimizer, "found_inf", None)
        if self._step is not None and self._is_as_left(self._step):
            # The last step raised before it wrote anything: all that has to be done for this one is
            # done.
            self._step.skipped = skipped
            self._take_decay_over(stepping, self._step, again=True)
            return
        self.take_back(gradients_count=True)
        self.forget_snapshots()
        held = list(map(HELD, optimizer.param_groups))
        if not any_gradient(chain.from_iterable(held)):
            return
        step = Step(self, self.steps + 1, skipped, partial(_stepped, held))
        self._step = step
        # On its own: it may add handlers that act in this very step.
        self._run(step, Phase.RESOLVE, Phase.RESOLVE)
        self._run(step, Phase.RESOLVE + 1, Phase.SNAPSHOT)
        self.take_snapshots()
        self._note_gradients(step)
        self._take_decay_over(stepping, step, again=False)

    def _note_gradients(self, step: Step) -> None:
        """Fix which weights have a gradient for who asks after the update, which may free or
        replace gradients."""
        # Looking at every weight is most of what a step costs in which nothing acts.
        for entry in self._handlers:
            reads = entry.reads_gradients
            if entry.phase > Phase.SNAPSHOT and (reads is None or reads(step)):
                step.note_gradients()
                return

    def _take_decay_over(self, stepping: Optimizer, step: Step, *, again: bool) -> None:
        add_decay = self._takeover.begin(stepping, step, again=again)
        if not again and step.scalings:
            # The arguments of torch's own steps hold the view until they are over, and so do the
            # frames of one that raised.
            step.seal(self._takeover.view if _holds_gradients(type(stepping)) else None)
            self._settings_left = self._settings()
        # After the seal: it is put back after the update, so it does not count as a new gradient.
        if add_decay is not None:
            add_decay()

    @torch.no_grad()
    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        self._takeover.end(self._step, after_update=True)
        step, self._step = self._step, None
        # Without a step the bracket was attached after ready, or no weight had a gradient.
        if step is not None:
            step.mark_updated()
            if step.skipped is None:
                self.steps += 1
                step.mark_happened()
            else:
                # A fused optimizer decides on the device: fetch its decision without waiting.
                self._unsettled = HostCopy(step.skipped), step
            self._step = step
            self._run(step, Phase.SNAPSHOT + 1, Phase.RESCALE)
            self._step = None
            self.forget_snapshots()
        self.close_in()

    def _run(self, step: Step, first: int, last: int) -> None:
        for entry in list(self._handlers):
            if first <= entry.phase <= last:
                entry.handler(step)

    # ------------------------------------------------------------------ steps that do not happen

    def _is_as_left(self, step: Step) -> bool:
        """Whether ``ready`` was there already, and nothing that the step is made of changed since.

        That is weights, gradients and the numbers of the param groups.
        """
        if self._settings_left is None or not step.scalings:
            return False
        return self._settings_left == self._settings() and all(
            scaling.untouched() for scaling in step.scalings
        )

    def _settings(self) -> list[Any]:
        """The numbers that a step is made with, as the param groups have them."""
        settings: list[Any] = []
        for group in self.optimizer.param_groups:
            for key in ("lr", "weight_decay"):
                value = group.get(key)
                # Of a tensor, which one it is and how often it was written to: reading it would
                # wait for the device.
                if isinstance(value, Tensor):
                    value = (id(value), value._version)
                settings.append(value)
        return settings

    @property
    def unfinished(self) -> list[Scaling]:
        """What was multiplied for a step that is not over: its update is running, or it raised."""
        if self._step is None or self._step.happened:
            return []
        return self._step.scalings

    def take_back(self, *, gradients_count: bool = False) -> None:
        """If the last step raised, make the weights what they were before it, up to one rounding.

        Those that it has stepped stay.

        Args:
            gradients_count: whether the gradients that are there now are what the next update will
                be made of.
        """
        step, self._step = self._step, None
        self._settings_left = None
        # Called several times in every step, nearly always for nothing.
        if step is not None:
            with torch.no_grad():
                step.take_back(gradients_count=gradients_count)

    def restore(self) -> None:
        """Give the optimizer its own gradients back, and show nobody split param groups any more:
        the step that goes on is over, or raised."""
        self._takeover.end(self._step, after_update=False)

    # -------------------------------------------------------------------------------- counting

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
        (skipped, step), self._unsettled = self._unsettled, None
        if not skipped.get():
            self.steps += 1
            step.mark_happened()
