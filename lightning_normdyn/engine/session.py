"""What all callbacks of the suite share during one fit: the names, the brackets, and the search for
scale-invariant weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from math import nan
from operator import is_
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary, ref

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_normdyn.engine.effect import (
    Effect,
    Effects,
    LengthJumps,
    NoEffect,
    OnOtherVectors,
    Projection,
    combine,
)
from lightning_normdyn.engine.evidence import Contradiction, Evidence
from lightning_normdyn.engine.lightning_facts import (
    accumulates_batch,
    batches_that_stepped,
    callbacks_of,
    log_every,
    set_callbacks,
    wrapped_optimizers,
)
from lightning_normdyn.engine.loss_gradients import LossGradients, changed_between_ranks
from lightning_normdyn.engine.messages import show, warn_once
from lightning_normdyn.engine.plan import Plan, Target
from lightning_normdyn.engine.witness import Witness
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.placement import (
    check_weight,
    forget_gradients,
    full_shape,
    has_gradient,
)
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.invariance.epsilons import EpsilonWatch
from lightning_normdyn.invariance.euler import EulerTest
from lightning_normdyn.invariance.graph_state import GraphState, Normalizations
from lightning_normdyn.invariance.names import parameter_names
from lightning_normdyn.invariance.partitions import is_gain
from lightning_normdyn.invariance.search import ScaleInvarianceSearch
from lightning_normdyn.invariance.verdict import Verdict
from lightning_normdyn.optimizers.bracket import Phase, Step, StepBracket, check_optimizer
from lightning_normdyn.optimizers.decay import Decay, decay_of, highest_claim
from lightning_normdyn.optimizers.group_numbers import group_number, is_zero
from lightning_normdyn.optimizers.scaling import put_back
from lightning_normdyn.optimizers.state import taken_over_by_trial
from lightning_normdyn.optimizers.views import accumulates, survey, torch_optimizers
from lightning_normdyn.optimizers.wrappers import steps_in_two_phases, without_framework

if TYPE_CHECKING:
    from lightning_normdyn.engine.callback import NormDynCallback


# The rank of what comes after whatever callbacks do in a phase.
LAST = 1000


class Session:
    """What all callbacks of the suite share during one fit."""

    _of: ClassVar[WeakKeyDictionary[Trainer, ref[Session]]] = (
        WeakKeyDictionary()
    )  # its members hold it, and it holds the Trainer

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
        # By identity and before anything runs: under FSDP2 a later no-grad forward shows parameters
        # that are not the optimizer's.
        self.names = parameter_names(module)
        survey(
            trainer.strategy.model or module, trainer.optimizers
        )  # the module inside of whatever the strategy wraps around it
        self.holders = holders_of(module)
        self.shapes = {weight: full_shape(weight) for weight in self.names}
        self.lazy = {
            weight for weight in self.names if is_lazy(weight)
        }  # of no known shape, now that everything is mapped
        self._gains = {weight for weight in self.names if self._is_gain(weight)}
        self.search = ScaleInvarianceSearch(module)
        self.members: list[NormDynCallback] = []
        self.optimizers: list[Optimizer] = []
        self.outers: list[Any] = []
        """For each of them what a person has made: itself, or what steps through it."""
        self.brackets: list[StepBracket] = []
        self._leading: list[
            StepBracket
        ] = []  # one for each optimizer of the Trainer; DeepSpeed steps an optimizer in parts
        self._remove: dict[StepBracket, list[Callable[[], None]]] = {}
        self._watching = False
        self._guard = _Guard(self)
        self._seen: dict[int, tuple[Any, ...]] = {}
        self._watched: tuple[Any, ...] | None = None
        self._undecided: set[Tensor] = set()
        self._missed: set[Tensor] = set()
        self._unread_rows: dict[int, UnreadRows | None] = {}  # of each optimizer's weights
        self._last_look: dict[int, int] = {}  # at the gradients of each optimizer's unread rows
        # A weight that trains but never shows up in a loss (a backward that Lightning does not see)
        # must not cost every batch: eight looks,
        # then at growing distances.
        self._batches, self._looks, self._next_look = 0, 0, 0
        self._unread = False
        self._unknown = dict(self.search.verdicts)
        self._normalizations = Normalizations(module)
        self._graph: GraphState | None = None  # of the graph that the verdicts were read from
        self._version = 0
        self.evidence = Evidence()
        self._epsilons = EpsilonWatch(
            module
        )  # where a claim is looked at closely: it may be false because of an epsilon
        self._withdrawn: dict[str, Verdict] = {}
        self.resumed = False
        """Whether the verdicts come from a checkpoint of the same network: its fit had its first
        steps, so nothing is refused any more."""
        self.losses: dict[str, str] = {}
        """Weights that callbacks acted on and no longer do, for tables: since when and why."""
        self._analyzed = False
        self._begun = False  # whether a step came after a loss that was seen, or had gradients
        self.checked = (
            False  # whether every optimizer has stepped, and what was asked for was found
        )
        self._announced: set[Tensor] = set()
        self._resolved = False
        self._steps_before: list[int] = []
        self._compile_next = False
        self.attempts = 0
        self._stepped_before_attempt = 0
        self._attempted_in = -1  # the batch, counted over the fit, of the newest attempt
        self._shift = 0  # from Lightning's count of batches to that of a run without interruption
        self._last_ended = -1  # Lightning's count at the newest end of a batch
        self._steps_of_gone = 0  # of optimizers that others have taken the place of
        self._followed: list[Any] = []  # the Trainer's optimizers as they were found
        self._two_phases: set[int] = set()  # optimizers in two phases that have not stepped
        self._places: dict[
            int, list[tuple[Tensor, Tensor]]
        ] = {}  # where their weights must be when it is next looked
        self._left_alone: list[Any] = []
        self._mapped: dict[
            int, tuple[Any, ...]
        ] = {}  # by optimizer: the param groups whose weights have names
        self.replaced: set[int] = set()
        """Optimizers that came during the fit: what is refused of them is no error."""
        self.known: set[int] = set()
        """Ids of the optimizers whose steps are seen, and of those around them."""
        self._witness: Witness | None = None
        self._tallies: list[str] | None = None
        self.notes: list[str] = []
        """What the end table says below: on which weights or optimizers a callback stopped acting,
        and why."""
        self.batch: Any = None
        """The batch that is being trained on."""

    # -- brackets
    # ------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Bracket every optimizer of the fit; idempotent."""
        if self.brackets:
            return
        parts = [torch_optimizers(o) for o in self.trainer.optimizers]
        self.optimizers = [part for ours in parts for part in ours]
        self.brackets = [StepBracket.of(o) for o in self.optimizers]
        # Lightning hears nothing of the steps of an optimizer in two phases, so none of them can be
        # known to have been skipped.
        told = [
            ours
            for o, ours in zip(self.trainer.optimizers, parts, strict=True)
            if not steps_in_two_phases(without_framework(o))
        ]
        self._leading = [StepBracket.of(ours[0]) for ours in told if ours]
        self._followed = list(self.trainer.optimizers)
        self.outers = [
            without_framework(o)
            for o, ours in zip(self._followed, parts, strict=True)
            for _ in ours
        ]
        for bracket in self.brackets:
            self._listen(bracket)
        self.known = {id(o) for o in [*self.optimizers, *self.outers]}
        self._witness = Witness(self)

    def _listen(self, bracket: StepBracket) -> None:
        self._remove[bracket] = [bracket.add(Phase.RESOLVE, self._resolve)]
        bracket.on_refusal = partial(self._refuse_acting, bracket)
        index = next(i for i, b in enumerate(self.brackets) if b is bracket)
        if steps_in_two_phases(self.outers[index]):
            self._two_phases.add(index)
            self._remove[bracket].append(
                bracket.add(Phase.RESCALE, self._remember_where_it_ended, rank=LAST)
            )

    def _refuse_acting(self, bracket: StepBracket, error: NotSupportedError) -> None:
        """A step turns out to be one that nothing may act in, after others were handled: the
        callbacks that only look go on."""
        index = next(i for i, b in enumerate(self.brackets) if b is bracket)
        for member in self.members:
            if index in member.plans and not member.acts_around_steps:
                member._refuse(index, error, first=False)

    def _held(self) -> list[Any]:
        """The optimizers that Lightning holds now, each as a person has made it."""
        strategy = self.trainer.strategy
        # Automatic optimization steps what these wrap; an entry of strategy.optimizers that was
        # exchanged alone is stepped by hand only.
        return [
            without_framework(o) for o in [*strategy.optimizers, *wrapped_optimizers(self.trainer)]
        ]

    def check_new_optimizers(self) -> None:
        """Say which of the optimizers that have come since the last batch cannot be handled: nobody
        may be told when they step."""
        now = self.trainer.optimizers
        if len(now) == len(self._followed) and all(map(is_, now, self._followed)):
            return
        for optimizer in now:
            if not any(optimizer is o for o in self._followed):
                self._supported(without_framework(optimizer))
        self._followed = list(now)

    def _supported(self, optimizer: Any) -> list[Optimizer]:
        """What steps when ``optimizer`` does; nothing, with a word, if that cannot be handled."""
        try:
            parts = torch_optimizers(optimizer)
            for part in parts:
                check_optimizer(part)
        except NotSupportedError as error:  # training goes on without us
            self.known.add(id(optimizer))
            self._left_alone.append(optimizer)  # so that nothing else gets its id
            self.note(
                f"Nothing acts on the steps of {type(optimizer).__name__}, which came during the "
                f"fit, or measures them: {error}"
            )
            return []
        return parts

    def follow(self, optimizer: Optimizer) -> None:
        """``optimizer``, which nobody has bracketed, is about to step: go on with it if it has
        taken the place of another."""
        held = self._held()
        for outer in held:
            if id(outer) in self.known and id(optimizer) != id(outer):
                continue
            parts = self._supported(outer)
            if not any(optimizer is part or optimizer is outer for part in parts):
                continue
            self.known.add(id(outer))
            listed = held[: len(self.trainer.optimizers)]
            gone = [i for i, o in enumerate(self.outers) if not any(o is h for h in listed)]
            # Of several that were replaced at once, the one in the same place.
            gone.sort(key=lambda i: not (i < len(listed) and listed[i] is outer))
            for part in parts:
                self._take_up(part, outer, gone.pop(0) if gone else len(self.optimizers))
            return

    def _take_up(self, optimizer: Optimizer, outer: Any, index: int) -> None:
        """From its next step on ``optimizer`` is number ``index``: what was counted for its
        predecessor goes on."""
        self.replaced.add(index)
        counts = [member.steps_of(index) for member in self.members]
        if index < len(self.optimizers):
            before, self.optimizers[index], self.outers[index] = (
                self.outers[index],
                optimizer,
                outer,
            )
            self.known -= {id(before), id(self.brackets[index].optimizer)}
            old = self.brackets[index]
            old.settle()
            if any(old is bracket for bracket in self._leading):
                self._leading = [bracket for bracket in self._leading if bracket is not old]
                self._steps_of_gone += old.steps
            for member in self.members:
                member._steps_of_gone += old.steps - member._attached_at.get(index, old.steps)
                member._drop_handlers(index)
            for remove in self._remove.pop(old, []):
                remove()
            self.brackets[index] = StepBracket.of(optimizer)
            text = f"{type(before).__name__} was replaced by another {type(outer).__name__}"
        else:
            self.optimizers.append(optimizer)
            self.outers.append(outer)
            self.brackets.append(StepBracket.of(optimizer))
            text = f"{type(outer).__name__} has joined the optimizers"
        bracket = self.brackets[index]
        self.known.add(id(optimizer))
        if not steps_in_two_phases(outer):
            self._leading.append(bracket)
        for member, count in zip(self.members, counts, strict=True):
            member._counted[index], member._attached_at[index] = count, bracket.steps
        self._seen.pop(index, None)
        self._steps_before = [b.steps for b in self.brackets]
        self._listen(bracket)
        step = max(counts, default=0)
        show(
            self.trainer,
            f"lightning-normdyn: {text} after {step} steps. The callbacks go on with it, and go on "
            f"counting.",
        )

    def _take_in_new_weights(self, index: int, *, final: bool) -> tuple[Any, ...]:
        """Map weights that have come since the start of the fit: layers that grew, a head that was
        exchanged.

        Args:
            index: of an optimizer whose param groups may have changed.
            final: whether the module shows the optimizer's own parameters for certain, as it does
                when a step is due.

        Returns:
            The layout of these param groups.
        """
        optimizer = self.optimizers[index]
        layout = _layout(optimizer)
        if self._mapped.get(index) == layout:
            return layout
        held = {p for group in optimizer.param_groups for p in group["params"]}
        names = parameter_names(self.module) if not held <= self.names.keys() else {}
        new = {
            weight: found
            for weight, found in names.items()
            if weight in held and weight not in self.names
        }
        if final or held <= self.names.keys() | new.keys():
            self._mapped[index] = layout
        if not new:
            return layout
        changed = {name for found in new.values() for name in found}
        for weight, found in list(self.names.items()):  # those whose place has been taken
            rest = tuple(name for name in found if name not in changed)
            if rest:
                self.names[weight] = rest
            else:
                del self.names[weight]
        self.names.update(new)
        survey(self.trainer.strategy.model or self.module, self.trainer.optimizers)
        self.holders = holders_of(self.module)
        self.shapes.update({weight: full_shape(weight) for weight in new})
        self.lazy.update(weight for weight in new if is_lazy(weight))
        self._gains = {weight for weight in self.names if self._is_gain(weight)}
        self._unread_rows = {}
        self.search.take_in(changed)
        self._unknown = {
            name: Verdict.unknown(name, v.shape, v.reason)
            for name, v in self.search.verdicts.items()
        }
        self._normalizations = Normalizations(self.module)
        self.evidence.reconsider(changed)
        for name in changed:
            self._withdrawn.pop(name, None)
            self.losses.pop(name, None)
        for member in self.members:
            member._take_in(new, changed)
        # The next forward pass is watched; what it shows is told in a table when the new weights
        # have stepped.
        self._unread, self._next_look = True, self._batches
        return layout

    def is_targeted(self, weight: Tensor) -> bool:
        """Whether some callback's ``params`` let this weight in."""
        return len(self.shapes[weight]) >= 2 and any(
            weight in member._matched for member in self.members
        )

    def in_first_step(self, index: int) -> bool:
        """Whether a refusal still is an error: until the end of the first real step of an optimizer
        that was there from the start."""
        if index in self.replaced:
            return False
        return all(
            self.brackets[index].steps <= member._attached_at.get(index, 0)
            for member in self.members
        )

    def note(self, text: str) -> None:
        """Say something once, now and in the end table."""
        if text not in self.notes:
            self.notes.append(text)
            warn_once(text)

    def closing_words(self) -> list[str]:
        """What a person should read below the end table: what was left alone or not seen, and
        callbacks that did not always act."""
        unseen = [] if self._witness is None else self._witness.notes
        return [*self.notes, *unseen, *(self._tallies or [])]

    def close(self) -> None:
        """Leave no hook behind; idempotent."""
        self.stop_watching()
        self._epsilons.stop()
        if self._witness is not None:
            self._witness.close()
        for bracket in self.brackets:
            bracket.restore()
            self._take_back(bracket)
        for removers in self._remove.values():
            for remove in removers:
                remove()
        self._remove = {}
        self.closed = True

    def _take_back(self, bracket: StepBracket) -> None:
        """The fit ends in the middle of a step: leave no weight shrunk for an update that did not
        come."""
        try:
            bracket.take_back()
        except Exception as error:  # a device that has failed; what ends the fit must come through
            warn_once(
                f"What was done to weights for the step that failed could not be taken back: "
                f"{type(error).__name__}: {error}"
            )

    # -- the search for scale-invariant weights
    # ------------------------------------------------------------------------

    def batch_start(self) -> None:
        """Watch the forward pass of this batch if it may tell something new."""
        for bracket in self.brackets:
            # of a step that raised, before a forward pass sees these weights again
            bracket.take_back()
        self.evidence.begin_batch()
        self.check_new_optimizers()
        for index in range(len(self.optimizers)):
            self._take_in_new_weights(index, final=False)
            self._remember_place(index)
        doubtful = self.evidence.doubted()
        if doubtful:
            self._epsilons.forget_old()
            if (
                not something_is_compiled()
            ):  # it would be compiled again, for a hook more and then for one less
                self._epsilons.start({name for claim in doubtful for name in claim.norms})
        if self._compile_next:
            self._compile_next = False
            stepped = [
                o
                for o, b, before in zip(
                    self.optimizers, self.brackets, self._steps_before, strict=True
                )
                if b.steps > before
            ]
            forget_gradients(
                self.module, [p for o in stepped for g in o.param_groups for p in g["params"]]
            )
        state = self._graph_state()
        partly_read = {
            w for rows in self._unread_rows.values() if rows is not None for w in rows.weights
        }
        # The batch that gave them gradients is over; the next one that uses them may be several
        # away.
        self._missed &= self._undecided | partly_read
        self._batches += 1
        news = (
            bool(self._missed) or self._unread or self.search.masks.wants_a_look
        ) and self._batches >= self._next_look
        if self._watched == state and not news:
            return
        if news:
            self._looks += 1
            self._next_look = (
                self._batches + 1 if self._looks < 8 else self._batches + self._batches // 2
            )
        graph = GraphState.of(self.module)
        if self._watched is None and self._resume(graph):
            self._watched, self._begun, self._graph = state, True, graph
            return
        if self._watched is not None and self._watched[1] != state[1]:
            self.evidence.reconsider(
                list(self.evidence.records)
            )  # a normalization behaves differently from here on
        self._watched, self._graph = state, graph
        self._watching, self._analyzed = True, False
        self._steps_before = [b.steps for b in self.brackets]
        self._epsilons.start()
        self._guard.stand_first()
        self.search.watch()

    def stop_watching(self) -> None:
        """Put back the switches of the process that show the graph; idempotent."""
        self.search.close()
        self._guard.leave()
        self._watching = False

    def before_backward(self, loss: Tensor) -> None:
        """Read the graph of this loss, if its forward was watched."""
        if self._watching:
            self.search.analyze(loss)
            self._version += 1
            self._analyzed = True
        for index in range(len(self.optimizers)):
            self._watch_gradients(index, loss)

    def batch_end(self) -> None:
        """Stop watching; once every optimizer has stepped, say what was found, and again when more
        is found (finetuning)."""
        self._last_ended = self._counted_batches()
        self._epsilons.stop()
        if self._watching:
            self.stop_watching()
            self._compile_next = True
            self._unread = (
                not self._analyzed
            )  # this batch had no loss (training_step may return None)
        for index in list(self._places):
            if index not in self._two_phases:
                self._check_place(index)
        self._look_for_unseen_steps()
        if not self._resolved or not self._begun or len(self._seen) < len(self.optimizers):
            return
        self._resolved = False
        if not self.checked:
            self.checked = True
            for member in self.members:
                member._check_found()
        targets = {
            t.weight for m in self.members for plan in m.plans.values() for t in plan.targets
        }
        if not targets <= self._announced:
            self._announced |= targets
            announce(self)

    def _look_for_unseen_steps(self) -> None:
        every, stepped = log_every(self.trainer), batches_that_stepped(self.trainer)
        if self._witness is not None and every and stepped % every == 0:
            self._witness.look()
            self._look_for_replaced_weights()

    def _look_for_replaced_weights(self) -> None:
        """Say so if a weight without a gradient has been replaced in the network, and the optimizer
        holds the old one."""
        held = {w for optimizer in self.optimizers for w in self.owned(optimizer)}
        idle = [
            w
            for w in held
            if w.grad is None and w.requires_grad and type(w.data) is Tensor and self.is_targeted(w)
        ]
        if not idle:
            return
        present = parameter_names(self.module)
        by_name = {name: weight for weight, names in present.items() for name in names}
        for weight in idle:
            name = self.names[weight][0]
            now = by_name.get(name)
            if weight in present or now is None or now.grad is None:
                continue
            self.note(
                f"`{name}` was replaced in the network by a parameter that no optimizer holds: it "
                f"is not trained, and nothing acts on it. "
                "Put it into a param group."
            )

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
        self._tallies = [text for member in self.members if (text := member.tally_in_words())]

    def _graph_state(self) -> tuple[Any, ...]:
        """What decides the graph's shape and may change during a fit: frozen weights, and mode,
        kind and settings of normalizations."""
        return tuple(w.requires_grad for w in self.names), self._normalizations.state()

    # -- checkpoints
    # ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What is known of the weights, which graph it was read from, and the evidence for it:
        plain tensors, numbers and strings."""
        return {
            "targets": {
                n: v.state() for n, v in self.search.verdicts.items() if v.kind != "unknown"
            },
            "graph": None if self._graph is None else self._graph.state(),
            "is_reading": self._watching,
            "evidence": self.evidence.state(in_batch=self._is_inside_batch()),
            "losses": dict(self.losses),
            "position": self.position(),
        }

    def restore_verdicts(self) -> bool:
        """Take up what a checkpoint says about the weights, until the first step takes up the rest
        of it; whether it says anything."""
        tables = [
            m._restored["targets"]
            for m in self.members
            if m._restored and m._restored.get("targets")
        ]
        shapes = {
            name: tuple(self.shapes[weight])
            for weight, names in self.names.items()
            for name in names
        }
        for table in tables:
            known = {}
            for name, state in table.items():
                if shapes.get(name, tuple(state["shape"])) == tuple(state["shape"]):
                    known[name] = Verdict.from_state(name, state)
                else:  # another model of the same names
                    warn_once(
                        f"What the checkpoint says of `{name}` is not used: it had the shape "
                        f"{tuple(state['shape'])} there."
                    )
            self.search.take_up(known)
        return bool(tables)

    def _resume(self, now: GraphState) -> bool:
        """Take up what a checkpoint knows of the weights, as far as it holds for the network as it
        is ``now``; whether all of it does."""
        if not self.restore_verdicts():
            return False
        restored = next(
            m._restored for m in self.members if m._restored and m._restored.get("targets")
        )
        if restored.get("position") is not None:
            self.go_on_from(restored["position"])
        then = None if restored.get("graph") is None else GraphState.from_state(restored["graph"])
        same_network = everywhere(then is not None and then.network == now.network)
        verdicts = dict(self.search.verdicts)
        for verdict in verdicts.values():
            unchanged = same_network or (
                then is not None
                and all(
                    then.normalizations.get(name) == now.normalizations.get(name)
                    for name in verdict.norms
                )
            )
            if verdict.withdrawn_partition is not None and unchanged:
                self._withdrawn[verdict.name] = verdict
                warn_once(
                    f"`{verdict.name}` is no longer taken for scale-invariant: {verdict.reason}."
                )
        if not same_network:
            # Another network: judged as a fresh fit would judge it, but for claims that gradients
            # have contradicted already.
            self.search.start_afresh({**self._unknown, **self._withdrawn})
            self.resumed = bool(self._withdrawn)
            return False
        self.resumed = bool(self._withdrawn) or any(
            int(steps) for steps in restored["steps"].values()
        )
        self.losses = dict(restored.get("losses", {}))
        if restored.get("evidence"):
            self.evidence.load(restored["evidence"], verdicts)
        # Saved in the middle of a batch whose graph was being read, verdicts may lack some of its
        # losses.
        return everywhere(
            then is not None and then.frozen == now.frozen and not restored.get("is_reading")
        )

    def put_back(self, ahead: dict[str, Any]) -> None:
        """Take back what a checkpoint holds for a step that had not written anything yet when it
        was saved."""
        weights = {name: weight for weight, names in self.names.items() for name in names}
        unfit = put_back(ahead, weights, self.optimizers, self.module)
        if unfit:
            warn_once(
                f"The checkpoint was saved in the middle of a step, and what had been done for it "
                f"to {', '.join(unfit)} does not fit this "
                "model. These weights go on as the checkpoint has them."
            )

    def verdict(self, weight: Tensor) -> Verdict:
        """What is known about ``weight``."""
        names = self.names.get(weight, ())
        for name in names:
            if name in self.search.verdicts:
                return self.search.verdicts[name]
        return Verdict.unknown(
            names[0] if names else "?", self.shapes.get(weight, tuple(weight.shape))
        )

    def _is_gain(self, weight: Tensor) -> bool:
        shape = self.shapes[weight]
        return (
            len(shape) >= 2
            and weight not in self.lazy
            and is_gain(self.module, self.names[weight][0], shape)
        )

    def has_no_direction(self, weight: Tensor) -> bool:
        """Whether the vectors of ``weight`` are single numbers: nothing that is said of directions
        means anything for them."""
        # The numbers of Linear(1, n) in front of a LayerNorm are one vector.
        return weight in self._gains and self.verdict(weight).partition is None

    def _remember_place(self, index: int) -> None:
        """Before the first step of an optimizer in two phases: where its weights are, to which they
        must come back."""
        if index in self._two_phases:
            self._places[index] = [(p, p.detach().clone()) for p in self._plain_weights(index)]

    def _check_place(self, index: int) -> None:
        """Refuse an optimizer in two phases whose inner step is not all that moves its weights: the
        step could not be seen."""
        away = [p for p, before in self._places.pop(index, []) if not _is_back(p.detach(), before)]
        if away:
            outer, inner = type(self.outers[index]).__name__, type(self.optimizers[index]).__name__
            error = NotSupportedError(
                f"{outer} takes its gradient at other weights, and the step that {inner} makes "
                f"inside it is not all that moves "
                f"`{self.names[away[0]][0]}`: it does not start where the weights were, or they "
                f"are moved on after it. So the step of "
                f"{outer} cannot be seen. Use a form that brings the weights back first and ends "
                f"with the inner step."
            )
            if index not in self.replaced:
                raise error
            for member in self.members:
                member._refuse(index, error, first=False)

    def _remember_where_it_ended(self, step: Step) -> None:
        """After the first step of an optimizer in two phases: where the inner step has left the
        weights."""
        index = next(i for i, b in enumerate(self.brackets) if b is step.bracket)
        if index in self._two_phases:
            self._two_phases.discard(index)
            self._places[index] = [(p, p.detach().clone()) for p in self._plain_weights(index)]

    def _plain_weights(self, index: int) -> list[Tensor]:
        return [
            p
            for p in self.owned(self.optimizers[index])
            if p.requires_grad and type(p.data) is Tensor
        ]

    def _resolve(self, step: Step) -> None:
        if self._places:
            self._check_place(next(i for i, b in enumerate(self.brackets) if b is step.bracket))
        self._decide(step)
        if self._undecided:  # gradients are there now; later somebody may have cleared them
            ours = {p for group in step.optimizer.param_groups for p in group["params"]}
            self._missed |= {
                w for w in self._undecided & ours if w.requires_grad and has_gradient(w)
            }
        index = next(i for i, b in enumerate(self.brackets) if b is step.bracket)
        rows = self._unread_rows.get(index)
        if rows is not None and self._may_wait_for_the_device(index, step):
            self._missed |= rows.with_gradient()

    def _may_wait_for_the_device(self, index: int, step: Step) -> bool:
        """Whether numbers may be copied to the host in this step: in the first ones, and where a
        logger gets its numbers anyway.

        An optimizer that did not step at a logging step is looked at when it steps next.
        """
        looked_at, now = self._last_look.get(index, 0), self._logging_step()
        if not log_every(self.trainer):
            now = step.number // 50
        self._last_look[index] = now
        return step.number <= UnreadRows.FIRST_STEPS or now > looked_at

    def _decide(self, step: Step) -> None:
        index = next(i for i, b in enumerate(self.brackets) if b is step.bracket)
        layout = self._take_in_new_weights(index, final=True)
        if self._seen.get(index) != (self._version, layout):
            self.search.agree()
            agree(self.search.verdicts)
            self._keep_withdrawn()
            self._claim(index)
        self._begun = (
            self._begun
            or self._version > 0
            or any(has_gradient(w) for w in self.owned(step.optimizer))
        )
        self._question(index)  # the same on every rank, because its sums are
        seen = (self._version, layout)
        if self._seen.get(index) == seen:
            return
        self._seen[index], self._resolved = seen, True
        unknown = {
            w: v
            for o in self.optimizers
            for w in self.owned(o)
            if (v := self.verdict(w)).kind == "unknown"
        }
        self._undecided = {w for w, verdict in unknown.items() if verdict.unread is None}
        self._watch_unread_rows(index, step.optimizer)
        treated = self._treated(index)
        for member in self.members:
            member._resolve(index)
        self._tell_losses(index, treated)

    # -- evidence
    # ------------------------------------------------------------------------------------------------------

    def _logging_step(self) -> int:
        """How many logging steps the Trainer has come to with this batch; 0 if it does not log."""
        every = log_every(self.trainer)
        return (self.now + 1) // every if every else 0

    def _watch_gradients(self, index: int, loss: Tensor) -> None:
        """If the next step of this optimizer is to be looked at: by the gradients as this backward
        pass leaves them."""
        examination, optimizer, logging_step = (
            self.evidence.of(index),
            self.optimizers[index],
            self._logging_step(),
        )
        if self._seen.get(index) == (self._version, _layout(optimizer)):
            if not self.evidence.is_due(index, logging_step):
                return
            gradients = LossGradients(examination.weights, examination.vectors)
        else:
            # What is claimed is settled at the step, with all ranks. Until then the gradients are
            # copied.
            claimed = {
                verdict.name: w
                for w in self.owned(optimizer)
                if _is_claimed(verdict := self.verdict(w))
            }
            wanted = self.evidence.wanted(
                index, logging_step, [self.verdict(w) for w in claimed.values()]
            )
            if not wanted:
                return
            gradients = LossGradients([claimed[verdict.name] for verdict in wanted], None)
        if examination.gradients is None:
            examination.gradients = gradients
        examination.gradients.watch(loss)

    def _claim(self, index: int) -> None:
        """Say what is claimed about the weights of this optimizer, and how far gradients have
        confirmed it."""
        verdicts = {
            w: self.verdict(w)
            for w in self.owned(self.optimizers[index])
            if not has_sparse_gradient(w)
        }
        claimed = {w: verdict for w, verdict in verdicts.items() if _is_claimed(verdict)}
        self.evidence.claim(index, list(claimed), list(claimed.values()))
        self._mark_confirmed()

    def _question(self, index: int) -> None:
        """Hold what the graph claims against real gradients; a contradiction withdraws the claim
        before this step touches anything."""
        trainer = self.trainer
        # What the optimizer receives will do where the backward pass was not seen, but for clipping
        # by value, which turns it, and for
        # an optimizer in two phases (SAM), whose gradient was taken at other weights.
        by_value = trainer.gradient_clip_val and str(
            trainer.gradient_clip_algorithm
        ).lower().endswith("value")
        as_received = not by_value and not steps_in_two_phases(self.outers[index])
        trusted = not changed_between_ranks(trainer.strategy.model)
        judged = self.evidence.judged
        found = self.evidence.question(
            index, self._logging_step(), trusted=trusted, as_received=as_received
        )
        for contradiction in found:
            self._withdraw(contradiction)
        if self.evidence.judged != judged:
            self._mark_confirmed()

    def _withdraw(self, found: Contradiction) -> None:
        name = found.claim.name
        claim = self.search.verdicts.get(name, found.claim)
        text = EulerTest.contradiction(found.rms, found.count)
        epsilon = self._epsilons.largest(claim.norms)
        if epsilon is not None and epsilon.explains(found.rms):
            text += f", because {epsilon}"
        withdrawn = claim.withdrawn(text, "gradients")
        self._withdrawn[name] = self.search.verdicts[name] = withdrawn
        self._version += 1
        self.losses[name] = f"since step {found.step}, {withdrawn.reason}"
        warn_once(f"`{name}` is no longer taken for scale-invariant: {withdrawn.reason}.")

    def _keep_withdrawn(self) -> None:
        """A graph that was read again claims the same: it shows no more than it did before."""
        for name, withdrawn in self._withdrawn.items():
            now = self.search.verdicts.get(name)
            if now is None or now.partition is None or now.norms == withdrawn.norms:
                self.search.verdicts[name] = withdrawn

    def _mark_confirmed(self) -> None:
        for name, verdict in self.search.verdicts.items():
            if (
                verdict.known == "graph"
                and verdict.partition is not None
                and self.evidence.confirmed(verdict)
            ):
                self.search.verdicts[name] = replace(verdict, known="graph and gradients")

    def _treated(self, index: int) -> dict[str, Tensor]:
        """Weights of one optimizer that some callback acts on."""
        plans = [member.plans.get(index) for member in self.members if member.acts]
        return {t.name: t.weight for plan in plans if plan is not None for t in plan.targets}

    def _tell_losses(self, index: int, before: Mapping[str, Tensor]) -> None:
        """Name the weights that callbacks acted on until now and cannot act on any more, since the
        graph has changed."""
        now, owned = self._treated(index), set(self.owned(self.optimizers[index]))
        for name, weight in before.items():
            if (
                name in now
                or name in self.losses
                or weight not in owned
                or not weight.requires_grad
            ):
                continue
            if (
                self.verdict(weight).partition is not None
            ):  # left alone for another reason, which has been said
                continue
            reason = self.verdict(weight).reason or "no loss contains it any more"
            self.losses[name] = f"since step {self.evidence.of(index).steps}, {reason}"
            warn_once(f"`{name}` is no longer taken for scale-invariant: {reason}.")

    # -- numbers that the monitor shows
    # --------------------------------------------------------------------------------

    def attempt(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step, unless its scaler finds an inf or no weight has a
        gradient."""
        # An optimizer that takes two gradients in a step (SAM) has Lightning say so twice.
        counted_before = any(
            bracket.stepping and bracket.evaluations > 1 for bracket in self.brackets
        )
        if counted_before or steps_in_two_phases(without_framework(optimizer)):
            return
        parameters = (
            p
            for part in torch_optimizers(optimizer)
            for g in part.param_groups
            for p in g["params"]
        )
        is_attempt = not accumulates(self.trainer.strategy.model) and any(
            map(has_gradient, parameters)
        )
        self.attempts += is_attempt
        self._stepped_before_attempt = self._stepped() if is_attempt else -1
        self._attempted_in = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        for bracket in self.brackets:
            bracket.close_in()

    def skipped_steps(self) -> int:
        """Updates that a gradient scaler skipped in this fit."""
        return max(0, self.attempts - self._stepped() - self._attempt_is_open())

    def _stepped(self) -> int:
        """Updates that happened, or of which a fused optimizer has not told yet that they did
        not."""
        return self._steps_of_gone + sum(b.steps + b.unsettled for b in self._leading)

    def _attempt_is_open(self) -> bool:
        """Whether a step is being attempted right now: a checkpoint saved in the middle of it must
        not count it as skipped."""
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        is_of_this_batch = (
            self._attempted_in == progress.total.ready
            and progress.current.processed < progress.current.started
        )
        return is_of_this_batch and self._stepped() == self._stepped_before_attempt

    # -- the x axis
    # ------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> int:
        """The x axis of curves, as Lightning's loggers count it: batches that stepped before this
        one, over resumes."""
        return self._counted_batches() + self._shift

    def _counted_batches(self) -> int:
        return batches_that_stepped(self.trainer)

    def _is_inside_batch(self) -> bool:
        """Whether a batch is being trained on; a fit that resumes from here trains on it again."""
        batch: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return bool(batch.processed < batch.ready)

    def position(self) -> list[int]:
        """For a checkpoint: ``now`` of the next batch to be trained on, as a run without
        interruption counts it, and Lightning's count."""
        batch: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        is_inside_step = self._is_inside_batch()
        # Lightning counts a batch only after the hooks of its end and after a validation that
        # follows it.
        is_counted = (
            batch.processed == batch.completed and self._counted_batches() != self._last_ended
        )
        done = int(
            not is_inside_step
            and not is_counted
            and batch.ready > 0
            and not accumulates_batch(self.trainer)
        )
        return [self.now + done, self._counted_batches()]

    def go_on_from(self, position: Sequence[int]) -> bool:
        """Count on from the `position` of a checkpoint, from the first batch on; False where the
        loops were not restored with it.

        Lightning itself counts a batch once more or not at all, depending on the hook in which the
        checkpoint was saved.
        """
        following, counted = position
        if self._counted_batches() - counted not in (0, 1):
            return False
        self._shift = following - self._counted_batches()
        return True

    def counted(self, key: str) -> Tensor | None:
        """Sum of a counter over all vectors of all callbacks, ``(1,)`` on the device; None if
        nobody counts it."""
        totals = [
            plan.vectors.totals(plan.counters[key])
            for m in self.members
            for plan in m.plans.values()
            if key in plan.counters
        ]
        return (
            torch.cat([t.to(totals[0].device) for t in totals]).sum(0, keepdim=True)
            if totals
            else None
        )

    def counted_by_weight(self, key: str) -> dict[str, int]:
        """Sum of a counter over the vectors of each weight where it is not 0; every rank must call
        it."""
        found: Counter[str] = Counter()
        for plan in (
            plan for m in self.members for plan in m.plans.values() if key in plan.counters
        ):
            totals = plan.vectors.totals(plan.counters[key]).tolist()
            found.update(
                {t.name: int(total) for t, total in zip(plan.targets, totals, strict=True) if total}
            )
        return dict(found)

    def effects(
        self, targets: Sequence[Target], besides: NormDynCallback | None = None
    ) -> list[Effects]:
        """What the callbacks, ``besides`` one, do to each of these weights, in one pass over all
        plans."""
        found: dict[Tensor, list[Effect]] = {t.weight: [] for t in targets}
        asked = {t.weight: t for t in targets}
        for member in self.members:
            if member is besides:
                continue
            for theirs in (
                t for plan in member.plans.values() for t in plan.targets if t.weight in asked
            ):
                effect = member.stated_effect(theirs)
                same = _on_the_same_vectors(effect, theirs, asked[theirs.weight])
                found[theirs.weight].append(effect if same else OnOtherVectors(effect))
        return [combine(found[t.weight]) for t in targets]

    def effect(self, target: Target, besides: NormDynCallback | None = None) -> Effects:
        """What the callbacks, ``besides`` one, do to this weight together."""
        return self.effects([target], besides)[0]

    def treatments(self) -> dict[Tensor, str]:
        """How the callbacks treat each targeted weight, in words; empty for one that is only
        measured.

        Takes norms once for each plan, over all ranks: every rank must call it.
        """
        texts: dict[Tensor, list[str]] = {}
        for member in self.members:
            for plan in member.plans.values():
                for target, text in zip(plan.targets, member.treatments(plan), strict=True):
                    texts.setdefault(target.weight, [])
                    if text:
                        texts[target.weight].append(text)
        for weight in self._decays_taken_by_trial() & texts.keys():
            texts[weight].append("its decay taken over, as a trial showed to be exact")
        return {weight: "; ".join(found) for weight, found in texts.items()}

    def _decays_taken_by_trial(self) -> set[Tensor]:
        """Weights whose decay is taken over from an optimizer of which nobody has read the step."""
        found: set[Tensor] = set()
        for bracket in self.brackets:
            owners = bracket.decay_owners()
            decaying = [
                group
                for group in bracket.optimizer.param_groups
                if not is_zero(group_number(group, "weight_decay"))
            ]
            if owners and decaying and taken_over_by_trial(bracket.optimizer):
                found |= {p for group in decaying for p in group["params"] if p in owners}
        return found

    def decays(self, plan: Plan) -> list[Decay]:
        """Who decays each target of ``plan`` in this step, and by how much; ``rate`` None where
        nobody can tell."""
        owners = StepBracket.of(plan.optimizer).decay_owners()
        found = []
        known: dict[
            Any, Decay
        ] = {}  # most weights of a group are treated alike, and this may be asked at every step
        targets = zip(
            plan.targets, plan.groups_of(plan.targets), self.effects(plan.targets), strict=True
        )
        for target, group, effects in targets:
            # Claims say who decays it, also where somebody claims it who is no callback; after a
            # fit there are none any more.
            owner = owners.get(target.weight, highest_claim(effects.decay_rules))
            alike = id(group), effects, owner
            if alike not in known:
                known[alike] = decay_of(plan.optimizer, group, effects.decay_rules, owner)
            decay = known[alike]
            found.append(Decay(owner, None) if effects.decay_untold else decay)
        return found

    def decay_shares(
        self, plan: Plan, step: Step, norm: Tensor, std: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The share of each vector that AWS takes away before this step, and that decay takes away
        within it, whoever applies it.

        Args:
            plan: the vectors.
            step: the step.
            norm: their norms, ``(n,)``.
            std: their standard deviations, for AWS on weight-standardized weights.

        Returns:
            Two ``(n,)``, at most 0.5 each; the second is NaN where nobody can tell. Exact for plain
            SGD and decoupled decays; of a coupled
            decay under momentum, the mean.
        """
        decays = self.decays(plan)
        vectors = plan.vectors
        tensor = partial(torch.tensor, device=norm.device)

        size = norm
        if std is not None:
            by_std = vectors.spread(
                tensor([decay.statistic == "std" for decay in decays], dtype=torch.bool)
            )
            size = torch.where(by_std, std, norm)
        alphas = vectors.spread(tensor([decay.alpha for decay in decays], dtype=norm.dtype))
        rates = tensor(
            [0.0 if isinstance(decay.rate, Tensor) else _or_nan(decay.rate) for decay in decays],
            dtype=norm.dtype,
        )
        for i, decay in enumerate(decays):
            if isinstance(
                decay.rate, Tensor
            ):  # it may lie on the device, and nothing waits for that
                rates[i] = decay.rate
        for member in self.members:
            member.correct_decays(plan, decays, rates)

        lr = plan.rates()
        before = (lr * alphas * size).clamp(max=0.5)
        within = (lr * vectors.spread(rates)).clamp(max=0.5)
        active = plan.active(step)
        if active is None:
            return before, within
        return torch.where(active, before, 0.0), torch.where(active, within, 0.0)

    def applied_decay(
        self, plan: Plan, step: Step, norm: Tensor, std: Tensor | None = None
    ) -> Tensor:
        """The share of each vector that all decay takes away in this step: ``(n,)``. Arguments as
        for `decay_shares`."""
        before, within = self.decay_shares(plan, step, norm, std)
        return before + within - before * within

    def events(self) -> dict[tuple[int, int, str], int]:
        """How often each kind of event has happened in this fit, by callback (its place in the
        list), optimizer and kind."""
        counts: dict[tuple[int, int, str], int] = {}
        for place, member in enumerate(self.members):
            for plan in member.plans.values():
                counts.update(
                    {(place, plan.index, kind): count for kind, count in plan.events.items()}
                )
        return counts

    def _watch_unread_rows(self, index: int, optimizer: Optimizer) -> None:
        """Remember which rows of this optimizer's weights no loss has read, so that a gradient
        there leads to another look."""
        before = self._unread_rows.get(index)
        found: dict[Tensor, Partition] = {}
        for weight in self.owned(optimizer):
            unread = self.verdict(weight).unread
            if unread is not None and weight.requires_grad and is_measurable(weight):
                found[weight] = unread
        now = self._unread_rows[index] = UnreadRows(found) if found else None
        if before is not None:  # the last look has found some of what it was for
            for weight, unread in before.weights.items():
                if (
                    now is None
                    or weight not in now.weights
                    or not now.weights[weight].equal(unread)
                ):
                    self._missed.discard(weight)

    def losses_in_words(self) -> str:
        """For the table at the end of a fit: the weights that callbacks have stopped acting on;
        empty without any."""
        lines = [f"  {name}: {why}" for name, why in self.losses.items()]
        if len(lines) > 8:
            lines = [*lines[:8], f"  and {len(lines) - 8} more"]
        return (
            "\n".join(
                [
                    "No longer treated, because the claim of scale invariance did not hold:",
                    *lines,
                    "",
                ]
            )
            if lines
            else ""
        )

    def owned(self, optimizer: Optimizer) -> list[Tensor]:
        """Weights of two or more dimensions that ``optimizer`` holds, in its order."""
        return [
            p
            for g in optimizer.param_groups
            for p in g["params"]
            if p in self.names and len(self.shapes[p]) >= 2
        ]


class _Guard(Callback):
    """Stands first among the Trainer's callbacks while a forward pass is watched, and ends the
    watch if anything goes wrong.

    Watching sets switches of the whole process. Another callback's ``on_exception`` may raise, and
    what stands behind it in the list is
    then never called.
    """

    def __init__(self, session: Session) -> None:
        self._session = ref(session)  # a cycle would keep the Trainer alive

    def stand_first(self) -> None:
        """Another list, not a change of this one: Lightning may be going through it right now."""
        session = self._session()
        if session is not None and self not in callbacks_of(session.trainer):
            set_callbacks(session.trainer, [self, *callbacks_of(session.trainer)])

    def leave(self) -> None:
        """Take it out of the list again; idempotent."""
        session = self._session()
        if session is not None and self in callbacks_of(session.trainer):
            others = [c for c in callbacks_of(session.trainer) if c is not self]
            set_callbacks(session.trainer, others)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Before any other callback's."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before any other callback's; where the tuner ends a fit, it is all that is called."""
        self._stop()

    def _stop(self) -> None:
        session = self._session()
        if session is not None:
            session.stop_watching()


def _or_nan(number: float | None) -> float:
    return nan if number is None else float(number)


def _on_the_same_vectors(effect: Effect, theirs: Target, ours: Target) -> bool:
    """Whether what holds for the vectors of one callback's target may be said of another's."""
    if isinstance(effect, (NoEffect, LengthJumps)) or theirs.partition.equal(ours.partition):
        return True
    # Gated projection takes the filter view or else the layer view, whichever is at right angles to
    # the gradient.
    return isinstance(effect, Projection) and effect.gate == "cosine" and ours.partition.n == 1


def _is_claimed(verdict: Verdict) -> bool:
    return verdict.partition is not None and verdict.known in ("graph", "graph and gradients")


def something_is_compiled() -> bool:
    """Whether torch.compile has compiled anything in this process."""
    import torch._dynamo.utils

    return bool(torch._dynamo.utils.counters["frames"])


class UnreadRows:
    """Rows that no loss has read so far, as far as its graph was looked at. A gradient there says
    that a loss has.

    Args:
        weights: for each weight these entries, as one vector.
    """

    FIRST_STEPS = 16

    def __init__(self, weights: dict[Tensor, Partition]) -> None:
        self.weights = weights
        self._vectors = WeightVectors(list(weights), list(weights.values()))

    def with_gradient(self) -> set[Tensor]:
        """The weights with a gradient that is not zero in these rows, the same on every rank.

        Copies to the host. Every rank must call it.
        """
        gradients = self._vectors.gradients()

        def summarize(sums: Tensor, length: Tensor) -> Tensor:
            return (sums > 0).to(self._vectors.sum_dtype)

        found = self._vectors.inner_and_totals((gradients, gradients), summarize=summarize)[1][
            0
        ].tolist()
        return {weight for weight, number in zip(self.weights, found, strict=True) if number}


def _layout(optimizer: Optimizer) -> tuple[tuple[int, ...], ...]:
    """The param groups of an optimizer, to see when one joins, grows, or gets other weights."""
    return tuple((id(g), *map(id, g["params"])) for g in optimizer.param_groups)


def _is_back(weight: Tensor, before: Tensor) -> bool:
    """Whether a weight is where it was, but for the roundings of a way there and back."""
    distance = torch.linalg.vector_norm((weight - before).float())
    length = torch.linalg.vector_norm(before.float())
    return bool(distance <= 8 * torch.finfo(weight.dtype).eps * length)


def holders_of(module: nn.Module) -> dict[Tensor, list[nn.Module]]:
    """The modules that hold each parameter; several where it is tied."""
    holders: dict[Tensor, list[nn.Module]] = {}
    for submodule in module.modules():
        for parameter in submodule.parameters(recurse=False):
            holders.setdefault(parameter, []).append(submodule)
    return holders


def everywhere(holds: bool) -> bool:
    """Whether something holds on every rank; every rank must call it."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return holds
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, holds)
    return all(found)


def agree(verdicts: dict[str, Verdict]) -> None:
    """Make all ranks hold the same verdicts: a weight on which they differ is not touched."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    # A reason may name numbers that one rank has seen.
    mine = {name: (v.shape, _digest({**v.state(), "reason": ""})) for name, v in verdicts.items()}
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    for name in sorted({n for table in everybody for n in table}):
        found = [table.get(name) for table in everybody]
        if any(f != found[0] for f in found):
            shape, _ = next(f for f in found if f is not None)
            verdicts[name] = Verdict.unknown(name, shape, "the ranks see different graphs")


def _digest(state: Any) -> str:
    """Short and the same for equal states: the labels of a large model's weights are megabytes."""
    if isinstance(state, Tensor):
        return sha256(state.cpu().numpy().tobytes()).hexdigest()
    if isinstance(state, Mapping):
        return repr([(key, _digest(value)) for key, value in sorted(state.items())])
    if isinstance(state, (list, tuple)):
        return repr([_digest(value) for value in state])
    return repr(state)


def is_measurable(weight: Tensor) -> bool:
    """Whether sums can be taken over this weight and its gradient."""
    try:
        check_weight(weight, "weight")
    except NotSupportedError:
        return False
    return not has_sparse_gradient(weight)


def has_sparse_gradient(weight: Tensor) -> bool:
    """Whether the last backward pass left a sparse gradient."""
    return weight.grad is not None and weight.grad.layout != torch.strided


def announce(session: Session) -> None:
    """Print the table of targets on rank zero."""
    from lightning_normdyn.engine.start_table import print_start_table

    print_start_table(session)  # every rank works out the numbers in it, rank zero prints


__all__ = ["Session", "has_sparse_gradient"]
