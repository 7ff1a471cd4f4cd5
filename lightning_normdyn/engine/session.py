"""The driver of a fit: what all callbacks of the suite share while a Trainer is fitting.

The first callback of the list hands Lightning's hooks on to the session, which watches forward
passes, reads what their graphs say of the weights, and has every callback make its plan before the
first step that knows it. What it knows stands in its parts, and is asked for there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakMethod, ref

from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.geometry.placement import any_gradient, forget_gradients
from lightning_normdyn.invariance.graph_state import GraphState
from lightning_normdyn.invariance.search import ScaleInvarianceSearch
from lightning_normdyn.optimizers.step import Step
from lightning_normdyn.tables import name_skeleton

from .attachment import Attachment, Attempts
from .claims import Claims
from .clock import Clock
from .combined import Combined
from .flavours import Callback, LightningModule, Trainer
from .lightning_facts import callbacks_of, log_every, set_callbacks
from .looks import Looks
from .member import Member
from .messages import show, warn_once
from .weights import Layout, Weights, held_by, is_measurable
from .witness import Witness

# Asked of every parameter in every batch, so without a Python frame for each.
_IS_TRAINED = attrgetter("requires_grad")


class Session:
    """What all callbacks of the suite share during one fit.

    Args:
        trainer: of the fit.
        module: the LightningModule.

    Attributes:
        members: the callbacks' parts in this fit, in the order of the Trainer's list.
        weights: names, holders and shapes of the parameters.
        attachment: the optimizers and their brackets.
        search: reads graphs.
        claims: what is believed of each weight's scale invariance.
        looks: when to read a graph again.
        clock: the x axis of curves.
        attempts: steps that a gradient scaler skipped.
        combined: what all callbacks do to a weight, taken together.
        batch: the batch that is being trained on.
        checked: whether every optimizer has stepped, and what was asked for was found.
        closed: whether the fit is over.
        notes: what the end table says below: on which weights or optimizers a callback stopped
            acting, and why.
    """

    # Weak on both sides: the Trainer's callbacks hold the session, and it holds the Trainer.
    _of: ClassVar[WeakKeyDictionary[Trainer, ref[Session]]] = WeakKeyDictionary()

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule) -> Session:
        """The session of the fit that is running on ``trainer``."""
        known = cls._of.get(trainer)
        session = None if known is None else known()
        if session is None or session.closed:
            session = cls(trainer, module)
            cls._of[trainer] = ref(session)
        return session

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self.closed = False
        self.members: list[Member] = []
        self.batch: Any = None
        self.checked = False
        self.notes: list[str] = []
        self._said: set[object] = set()

        self.weights = Weights(trainer, module)
        self.attachment = Attachment(
            trainer, self.weights, self.members, resolve=self.resolve, note=self.note
        )
        self.search = ScaleInvarianceSearch(module)
        self.looks = Looks()
        self.clock = Clock(trainer)
        self.claims = Claims(trainer, self.weights, self.search, self.clock)
        self.attempts = Attempts(trainer, self.attachment)
        self.combined = Combined(self.members, self.attachment)
        self._witness: Witness | None = None
        self._tallies: list[str] | None = None

        self._guard = Guard(self.stop_watching)
        self._watching = False
        # Whether the watched batch had a loss.
        self._analyzed = False
        # What decides the graph's shape, when it was last watched.
        self._watched: tuple[Any, ...] | None = None
        self._graph: GraphState | None = None
        # Whether the batch before was watched, for which torch.compile makes way.
        self._compile_next = False

        # Since the last start table.
        self._has_new_plans = False
        # Whether a step came after a loss that was seen, or had gradients.
        self._begun = False
        # Weights that a start table has shown.
        self._announced: set[Tensor] = set()

    # -- optimizers

    def attach(self) -> None:
        """Bracket every optimizer of the fit; idempotent."""
        if self._witness is None:
            self.attachment.attach()
            self._witness = Witness(self)

    def in_first_step(self, index: int) -> bool:
        """Whether a refusal still is an error: until the end of the first real step of an optimizer
        that was there from the start."""
        entry = self.attachment.entries[index]
        if entry.came_later:
            return False
        steps = entry.bracket.steps
        return all(steps <= member.attached_at.get(index, 0) for member in self.members)

    def is_targeted(self, weight: Tensor) -> bool:
        """Whether some callback's ``params`` let this weight in."""
        matched = any(weight in member.matched for member in self.members)
        return matched and self.weights.is_matrix(weight)

    def _take_in_new_weights(self, index: int, *, final: bool) -> Layout:
        """Take in layers that grew or a head that was exchanged; arguments as for
        `Weights.take_in`.

        Returns:
            The layout of the optimizer's param groups.
        """
        entry = self.attachment.entries[index]
        optimizer = entry.optimizer
        layout = entry.layout.read(optimizer)
        # The same object as long as nothing has changed, as in nearly all batches.
        if layout is self.weights.layouts.get(index):
            return layout
        new = self.weights.take_in(index, optimizer, layout, final=final)
        if not new:
            return layout
        changed = {name for names in new.values() for name in names}
        self.claims.take_in(changed)
        for member in self.members:
            member.take_in(new, changed)
        # What the next forward pass shows is told in a table when the new weights have stepped.
        self.looks.ask_at_once()
        return layout

    # -- a batch

    def batch_start(self) -> None:
        """Watch the forward pass of this batch if it may tell something new."""
        entries = self.attachment.entries
        for entry in entries:
            # Of a step that raised, before a forward pass sees these weights again.
            entry.bracket.take_back()
        self.attachment.check_new_optimizers()
        for index, entry in enumerate(entries):
            self._take_in_new_weights(index, final=False)
            if entry.return_check is not None:
                entry.return_check.begin_batch()
        self.claims.begin_batch()
        if self._compile_next:
            self._compile_next = False
            self._forget_gradients()

        # What decides the graph's shape and may change during a fit: frozen weights, and mode, kind
        # and settings of normalizations.
        is_trained = list(map(_IS_TRAINED, self.weights.names))
        state = is_trained, self.search.normalizations.state()
        is_worth_a_look = self.looks.begin_batch(wanted=self.search.masks.wants_a_look)
        if self._watched == state and not is_worth_a_look:
            return
        graph = GraphState.of(self.module)
        # What a checkpoint knows need not be read again.
        if self._watched is None and self._resume(graph):
            self._watched, self._begun, self._graph = state, True, graph
            return
        if self._watched is not None and self._watched[1] != state[1]:
            # A normalization behaves differently from here on.
            self.claims.evidence.reconsider(list(self.claims.evidence.records))
        self._watched, self._graph = state, graph
        self._watch()

    def _forget_gradients(self) -> None:
        """The graph was watched in the last batch, and torch.compile may compile the next one."""
        stepped: list[Tensor] = []
        for entry in self.attachment.entries:
            if entry.bracket.steps > entry.steps_at_watch:
                stepped += held_by(entry.optimizer)
        forget_gradients(self.module, stepped)

    def _watch(self) -> None:
        self._watching, self._analyzed = True, False
        for entry in self.attachment.entries:
            entry.steps_at_watch = entry.bracket.steps
        self.claims.epsilons.start()
        self._guard.stand_first(self.trainer)
        self.search.watch()

    def stop_watching(self) -> None:
        """Put back the switches of the process that show the graph; idempotent."""
        self.search.close()
        self._guard.leave(self.trainer)
        self._watching = False

    def before_backward(self, loss: Tensor) -> None:
        """Read the graph of this loss, if its forward was watched."""
        if self._watching:
            self.claims.read(loss)
            self._analyzed = True
        logging_step = self.clock.logging_step
        for index, entry in enumerate(self.attachment.entries):
            # As read when the batch began. Groups that have changed since make other vectors at the
            # step, and gradients that were taken for these are then no evidence.
            settled = entry.resolved_for == self._basis(entry.layout.latest)
            self.claims.watch_gradients(index, entry.optimizer, loss, logging_step, settled=settled)

    def batch_end(self) -> None:
        """Stop watching; once every optimizer has stepped, say what was found, and again when more
        is found (finetuning)."""
        stepped = self.clock.end_batch()
        self.claims.epsilons.stop()
        if self._watching:
            self.stop_watching()
            self._compile_next = True
            # training_step may return None.
            self.looks.seen(had_loss=self._analyzed)
        for index, entry in enumerate(self.attachment.entries):
            if entry.return_check is not None and entry.return_check.has_stepped:
                self.attachment.check_return(index)
        every = log_every(self.trainer)
        if self._witness is not None and every and stepped % every == 0:
            self._witness.look()
            self._witness.look_for_replaced_weights()
        if self._has_new_plans and self._begun:
            self._tell_new_plans()

    def _tell_new_plans(self) -> None:
        """Once every optimizer has stepped: was something found, and what?"""
        if any(entry.resolved_for is None for entry in self.attachment.entries):
            return
        self._has_new_plans = False
        if not self.checked:
            self.checked = True
            for member in self.members:
                member.check_found()
        targets: set[Tensor] = set()
        for plan in self.combined.plans:
            targets.update(plan.claimed)
        if not targets <= self._announced:
            self._announced |= targets
            if any(member.rule.shows_tables for member in self.members):
                # Every rank takes part in the sums, rank zero prints.
                table = self.combined.start_table(self.claims.of, self._kind_of)
                show(self.trainer, table)

    def _kind_of(self, norm: str) -> str:
        """What a normalization is: the class of a module by its name, without its dimensions."""
        # One that was written by hand is "DivBackward0 in block.attention".
        operation, _, _ = norm.partition(" in ")
        try:
            module = self.module.get_submodule(operation)
        except AttributeError:
            # No module of this name: an operation, or a module within a wrapper.
            return name_skeleton(operation)
        return re.sub(r"\dd$", "", type(module).__name__)

    # -- a step

    def resolve(self, step: Step) -> None:
        """A step is about to happen: every callback makes its plan, unless it has one."""
        index = self.attachment.number_of(step.bracket)
        self.attachment.check_return(index)
        logging_step = self.clock.logging_step
        self._decide(index, step, logging_step)
        # A Trainer that never logs has steps like those of one that logs every 50.
        if not logging_step and not log_every(self.trainer):
            logging_step = step.number // 50
        self.looks.note_gradients(index, step, logging_step)

    def _decide(self, index: int, step: Step, logging_step: int) -> None:
        layout = self._take_in_new_weights(index, final=True)
        entry = self.attachment.entries[index]
        if entry.resolved_for != self._basis(layout):
            self.claims.settle(index, self.weights.owned(step.optimizer))
        if not self._begun:
            with_gradient = any_gradient(self.weights.owned(step.optimizer))
            self._begun = self.claims.version > 0 or with_gradient
        # The optimizer's gradients will do where the backward pass was not seen, but one in two
        # phases takes its gradient at other weights.
        as_received = entry.return_check is None
        self.claims.question(index, logging_step, as_received=as_received)
        # A contradiction may just have withdrawn a claim.
        basis = self._basis(layout)
        if entry.resolved_for == basis:
            return
        entry.resolved_for = basis
        self._has_new_plans = True
        self._note_what_is_open(index, step.optimizer)
        before = self._treated(index)
        for member in self.members:
            member.resolve(index)
        # When all have resolved: who owns which decay is known only then.
        for member in self.members:
            member.rehearse(index, step)
        self.claims.tell_losses(index, before, self._treated(index))

    def _basis(self, layout: Layout) -> tuple[int, Layout]:
        """What the plans for an optimizer rest on: verdicts and param groups."""
        return self.claims.version, layout

    def _note_what_is_open(self, index: int, optimizer: Optimizer) -> None:
        undecided = []
        for weight in self.attachment.weights():
            verdict = self.claims.of(weight)
            if verdict.kind == "unknown" and verdict.unread is None:
                undecided.append(weight)
        unread = {}
        for weight in self.weights.owned(optimizer):
            rows = self.claims.of(weight).unread
            if rows is not None and weight.requires_grad and is_measurable(weight):
                unread[weight] = rows
        self.looks.decided(index, undecided, unread)

    def _treated(self, index: int) -> dict[str, Tensor]:
        """Weights of one optimizer that some callback acts on."""
        owned = set(self.weights.owned(self.attachment.entries[index].optimizer))
        treated = {}
        for member, plan in self.combined.shares():
            if member.rule.acts and plan.index == index:
                for target in plan.targets:
                    if target.weight in owned:
                        treated[target.name] = target.weight
        return treated

    # -- what was not seen

    def last_look(self) -> None:
        """At the end of the fit, once: was every step seen, and did every callback act where it was
        to act?"""
        if self._witness is None or self._tallies is not None:
            return
        self._witness.look(last=True)
        for member in self.members:
            idle = member.idle_in_words()
            if idle:
                warn_once(idle)
        # Now: when the first callback of the list lets go of the brackets, nobody counts any more.
        tallies = [member.tally_in_words() for member in self.members]
        self._tallies = [text for text in tallies if text]

    # -- words

    def note(self, text: str) -> None:
        """Say something once, now and in the end table."""
        if text not in self.notes:
            self.notes.append(text)
            warn_once(text)

    def say_once(self, text: str, about: object = None) -> None:
        """Warn of something once in this fit, whichever optimizer it comes up at.

        Args:
            text: what to say.
            about: what tells it from other warnings; None: the text.
        """
        key = text if about is None else about
        if key not in self._said:
            self._said.add(key)
            warn_once(text)

    def closing_words(self) -> list[str]:
        """What a person should read below the end table: what was left alone or not seen, and
        callbacks that did not always act."""
        unseen = [] if self._witness is None else self._witness.notes
        return [*self.notes, *unseen, *(self._tallies or [])]

    # -- checkpoints

    def state(self) -> dict[str, Any]:
        """What is known of the weights, which graph it was read from, and the evidence for it:
        plain tensors, numbers and strings."""
        return {
            **self.claims.state(),
            "graph": None if self._graph is None else self._graph.state(),
            "is_reading": self._watching,
            "position": self.clock.position(),
        }

    def restore_verdicts(self) -> list[dict[str, Any]]:
        """Take up what a checkpoint says about the weights, until the first step takes up the rest
        of it.

        Returns:
            What it holds for those callbacks that knew of targets.
        """
        states = []
        for member in self.members:
            state = member.restored
            if state and state.get("targets"):
                self.claims.take_up(state["targets"])
                states.append(state)
        return states

    def _resume(self, graph: GraphState) -> bool:
        """Take up what a checkpoint knows of the weights, as far as it holds for the network as it
        is now; whether all of it does."""
        states = self.restore_verdicts()
        if not states:
            return False
        restored = states[0]
        if restored.get("position") is not None:
            self.clock.go_on_from(restored["position"])
        return self.claims.resume(restored, graph)

    # -- the end

    def close(self) -> None:
        """Leave no hook behind; idempotent."""
        self.stop_watching()
        self.claims.epsilons.stop()
        if self._witness is not None:
            self._witness.close()
        self.attachment.close()
        self.closed = True


class Guard(Callback):
    """Stands first among the Trainer's callbacks while a forward pass is watched.

    Watching sets switches of the whole process. Another callback's ``on_exception`` may raise, and
    what stands behind it in the list is then never called.

    Args:
        stop: ends the watch; a method, held weakly, since the Trainer holds this callback.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = WeakMethod(stop)

    def stand_first(self, trainer: Trainer) -> None:
        """Put it in front of the Trainer's list."""
        callbacks = callbacks_of(trainer)
        if self not in callbacks:
            # Another list, not a change of this one: Lightning may be going through it right now.
            set_callbacks(trainer, [self, *callbacks])

    def leave(self, trainer: Trainer) -> None:
        """Take it out of the list again; idempotent."""
        callbacks = callbacks_of(trainer)
        if self in callbacks:
            set_callbacks(trainer, [c for c in callbacks if c is not self])

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Before any other callback's."""
        self._end()

    def teardown(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: str,
    ) -> None:
        """Before any other callback's; where the tuner ends a fit, it is all that is called."""
        self._end()

    def _end(self) -> None:
        stop = self._stop()
        if stop is not None:
            stop()
