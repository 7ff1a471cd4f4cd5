"""What is believed of each weight's scale invariance during a fit: what the graph claims, what
gradients say to it, and what a checkpoint knew."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.geometry.reduction import of_all_ranks, world_size
from lightning_normdyn.invariance.epsilons import EpsilonWatch
from lightning_normdyn.invariance.euler import contradiction_in_words
from lightning_normdyn.invariance.graph_state import GraphState
from lightning_normdyn.invariance.search import ScaleInvarianceSearch
from lightning_normdyn.invariance.verdict import Verdict

from .clock import Clock
from .evidence import Contradiction, Evidence
from .flavours import Trainer
from .loss_gradients import LossGradients, changed_between_ranks
from .messages import warn_once
from .weights import Weights, has_sparse_gradient

# Weights that the end table names as no longer treated before it says how many more there are.
MOST_LOSSES = 8


class Claims:
    """The verdicts of one fit and the evidence for them.

    Args:
        trainer: of the fit.
        weights: of the network.
        search: whose verdicts are held against gradients, and changed where these contradict.
        clock: says when the Trainer logs.

    Attributes:
        version: changes whenever verdicts may have.
        evidence: what gradients have said so far.
        resumed: whether the verdicts come from a checkpoint of the same network: its fit had its
            first steps, so nothing is refused any more.
        losses: weights that callbacks acted on and no longer do, for tables: since when and why.
    """

    def __init__(
        self,
        trainer: Trainer,
        weights: Weights,
        search: ScaleInvarianceSearch,
        clock: Clock,
    ) -> None:
        self._trainer, self._weights = trainer, weights
        self._search, self._clock = search, clock
        self.version = 0
        self.evidence = Evidence()
        self.resumed = False
        self.losses: dict[str, str] = {}
        # Where a claim is looked at closely: it may be false because of an epsilon.
        self.epsilons = EpsilonWatch(weights.module)
        self._unknown = dict(search.verdicts)
        self._withdrawn: dict[str, Verdict] = {}

    def of(self, weight: Tensor) -> Verdict:
        """What is known about ``weight``."""
        names = self._weights.names.get(weight, ())
        for name in names:
            if name in self._search.verdicts:
                return self._search.verdicts[name]
        shape = self._weights.shapes.get(weight, tuple(weight.shape))
        return Verdict.unknown(names[0] if names else "?", shape)

    def has_no_direction(self, weight: Tensor) -> bool:
        """Whether the vectors of ``weight`` are single numbers: nothing that is said of directions
        means anything for them."""
        # The numbers of Linear(1, n) in front of a LayerNorm are one vector.
        return self._weights.is_gain(weight) and self.of(weight).partition is None

    def take_in(self, changed: Iterable[str]) -> None:
        """Other weights are called by these names from now on."""
        self._search.take_in(set(changed))
        self._unknown = {
            name: Verdict.unknown(name, verdict.shape, verdict.reason)
            for name, verdict in self._search.verdicts.items()
        }
        self.evidence.reconsider(changed)
        for name in changed:
            self._withdrawn.pop(name, None)
            self.losses.pop(name, None)

    def begin_batch(self) -> None:
        """Look for epsilons that explain what the newest looks have contradicted."""
        self.evidence.begin_batch()
        doubted = self.evidence.doubted()
        if doubted:
            self.epsilons.forget_old()
            # For a hook more, and then for one less, modules would be compiled again.
            if not something_is_compiled():
                self.epsilons.start({name for claim in doubted for name in claim.norms})

    def read(self, loss: Tensor) -> None:
        """Read the graph of a loss whose forward pass was watched."""
        self._search.analyze(loss)
        self.version += 1

    # -- evidence
    # ------------------------------------------------------------------------------------------

    def watch_gradients(
        self,
        index: int,
        optimizer: Optimizer,
        loss: Tensor,
        logging_step: int,
        *,
        settled: bool,
    ) -> None:
        """If the next step of an optimizer is to be looked at: by the gradients as this backward
        pass leaves them.

        Args:
            index: of the optimizer.
            optimizer: whose weights are meant.
            loss: whose backward pass is about to begin.
            logging_step: how many logging steps the Trainer will have come to with this batch.
            settled: whether all ranks have agreed on what is claimed.
        """
        examination = self.evidence.of(index)
        if settled:
            if not examination.is_due(logging_step):
                return
            gradients = LossGradients(examination.claims, examination.vectors)
        else:
            # What is claimed is settled at the step, with all ranks. Until then the gradients are
            # copied.
            claimed = self._claimed(self._weights.owned(optimizer))
            wanted = self.evidence.wanted(index, logging_step, claimed)
            if not wanted:
                return
            gradients = LossGradients(wanted, None)
        if examination.gradients is None:
            examination.gradients = gradients
        examination.gradients.watch(loss)

    def settle(
        self,
        index: int,
        owned: Sequence[Tensor],
    ) -> None:
        """Say what is claimed about the weights of an optimizer, and how far gradients have
        confirmed it. Every rank must call it."""
        self._search.agree()
        agree(self._search.verdicts)
        self._keep_withdrawn()
        dense = [weight for weight in owned if not has_sparse_gradient(weight)]
        self.evidence.claim(index, self._claimed(dense))
        self._mark_confirmed()

    def question(self, index: int, logging_step: int, *, as_received: bool) -> None:
        """Hold what the graph claims against real gradients; a contradiction withdraws the claim
        before this step touches anything.

        Args:
            index: of the optimizer, the same on every rank.
            logging_step: how many logging steps the Trainer will have come to with this batch.
            as_received: whether the optimizer's gradients are the loss's own.
        """
        # In most steps nothing is looked at, and then nobody asks how gradients came about.
        is_due = self.evidence.of(index).is_due(logging_step)
        judged = self.evidence.judged
        contradictions = self.evidence.question(
            index,
            logging_step,
            trusted=is_due and not changed_between_ranks(self._trainer.strategy.model),
            as_received=is_due and as_received and not self._clips_by_value(),
        )
        for contradiction in contradictions:
            self._withdraw(contradiction)
        if self.evidence.judged != judged:
            self._mark_confirmed()

    def _clips_by_value(self) -> bool:
        """Whether the Trainer clips gradients by value, which turns them."""
        trainer = self._trainer
        algorithm = str(trainer.gradient_clip_algorithm).lower()
        return bool(trainer.gradient_clip_val) and algorithm.endswith("value")

    def _claimed(self, weights: Iterable[Tensor]) -> dict[Tensor, Verdict]:
        """The weights of which the graph claims something, and what."""
        claimed = {}
        for weight in weights:
            verdict = self.of(weight)
            if verdict.partition is not None and verdict.known in ("graph", "graph and gradients"):
                claimed[weight] = verdict
        return claimed

    def _withdraw(self, contradiction: Contradiction) -> None:
        name = contradiction.claim.name
        claim = self._search.verdicts.get(name, contradiction.claim)
        text = contradiction_in_words(contradiction.rms, contradiction.count)
        epsilon = self.epsilons.largest(claim.norms)
        if epsilon is not None and epsilon.explains(contradiction.rms):
            text += f", because {epsilon}"
        withdrawn = claim.withdrawn(text, "gradients")
        self._withdrawn[name] = self._search.verdicts[name] = withdrawn
        self.version += 1
        self._tell_loss(name, contradiction.step, withdrawn.reason)

    def _keep_withdrawn(self) -> None:
        """A graph that was read again claims the same: it shows no more than it did before."""
        for name, withdrawn in self._withdrawn.items():
            verdict = self._search.verdicts.get(name)
            if verdict is None or verdict.partition is None or verdict.norms == withdrawn.norms:
                self._search.verdicts[name] = withdrawn

    def _mark_confirmed(self) -> None:
        for name, verdict in self._search.verdicts.items():
            is_open = verdict.known == "graph" and verdict.partition is not None
            if is_open and self.evidence.confirmed(verdict):
                self._search.verdicts[name] = replace(verdict, known="graph and gradients")

    # -- what is no longer treated
    # ------------------------------------------------------------------------

    def tell_losses(
        self, index: int, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
    ) -> None:
        """Name the weights that callbacks acted on until now and cannot act on any more, since the
        graph has changed.

        Args:
            index: of the optimizer that holds them.
            before: the weights that were acted on.
            after: those that still are.
        """
        for name, weight in before.items():
            if name in after or name in self.losses or not weight.requires_grad:
                continue
            verdict = self.of(weight)
            # One that is claimed is left alone for another reason, which has been said.
            if verdict.partition is None:
                reason = verdict.reason or "no loss contains it any more"
                self._tell_loss(name, self.evidence.of(index).steps, reason)

    def _tell_loss(
        self,
        name: str,
        step: int,
        reason: str,
    ) -> None:
        self.losses[name] = f"since step {step}, {reason}"
        _warn_of_loss(name, reason)

    def losses_in_words(self) -> str:
        """For the table at the end of a fit: the weights that callbacks have stopped acting on;
        empty without any."""
        if not self.losses:
            return ""
        lines = [f"  {name}: {why}" for name, why in self.losses.items()]
        if len(lines) > MOST_LOSSES:
            lines = [*lines[:MOST_LOSSES], f"  and {len(lines) - MOST_LOSSES} more"]
        head = "No longer treated, because the claim of scale invariance did not hold:"
        return "\n".join([head, *lines, ""])

    # -- checkpoints
    # --------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What is known of the weights and the evidence for it: plain tensors, numbers, strings."""
        verdicts = self._search.verdicts
        # A fresh fit knows nothing of the others either.
        known = [name for name, verdict in verdicts.items() if verdict.kind != "unknown"]
        return {
            "targets": {name: verdicts[name].state() for name in known},
            "evidence": self.evidence.state(in_batch=self._clock.is_inside_batch),
            "losses": dict(self.losses),
        }

    def take_up(self, table: Mapping[str, Any]) -> None:
        """Take up the verdicts of a checkpoint, until `resume` takes up the rest of it."""
        weights = self._weights.by_name()
        known = {}
        for name, state in table.items():
            shape = tuple(state["shape"])
            weight = weights.get(name)
            if weight is None or tuple(self._weights.shapes[weight]) == shape:
                known[name] = Verdict.from_state(name, state)
            else:
                # Another model whose weights have the same names.
                warn_once(
                    f"What the checkpoint says of `{name}` is not used: it had the shape {shape} "
                    f"there."
                )
        self._search.take_up(known)

    def resume(
        self,
        restored: Mapping[str, Any],
        graph: GraphState,
    ) -> bool:
        """Take up what a checkpoint knows, as far as it holds for the present network.

        Args:
            restored: the state of one of its callbacks, whose verdicts have been taken up.
            graph: what decides the graph's shape now.

        Returns:
            Whether all of it holds, so that nothing has to be read again.
        """
        saved = restored.get("graph")
        before = None if saved is None else GraphState.from_state(saved)
        same_network = everywhere(before is not None and before.network == graph.network)
        verdicts = dict(self._search.verdicts)
        for verdict in verdicts.values():
            if verdict.withdrawn_partition is None:
                continue
            if same_network or _same_norms(verdict, before, graph):
                self._withdrawn[verdict.name] = verdict
                _warn_of_loss(verdict.name, verdict.reason)
        self.resumed = bool(self._withdrawn)
        if not same_network:
            # Another network: judged as a fresh fit would judge it, but for claims that gradients
            # have contradicted already.
            self._search.start_afresh(self._unknown | self._withdrawn)
            return False
        self.resumed |= any(int(steps) for steps in restored["steps"].values())
        self.losses = dict(restored.get("losses", {}))
        if restored.get("evidence"):
            self.evidence.load(restored["evidence"], verdicts)
        # Saved in the middle of a batch whose graph was being read, verdicts may lack some of its
        # losses.
        same_weights = before is not None and before.frozen == graph.frozen
        return everywhere(same_weights and not restored.get("is_reading"))


def something_is_compiled() -> bool:
    """Whether torch.compile has compiled anything in this process."""
    # torch._dynamo takes seconds to import, and most fits never come here.
    import torch._dynamo.utils

    return bool(torch._dynamo.utils.counters["frames"])


def _warn_of_loss(name: str, reason: str) -> None:
    warn_once(f"`{name}` is no longer taken for scale-invariant: {reason}.")


def _same_norms(
    verdict: Verdict,
    before: GraphState | None,
    graph: GraphState,
) -> bool:
    """Whether the normalizations behind a claim are set as they were."""
    if before is None:
        return False
    was, now = before.normalizations, graph.normalizations
    return all(was.get(name) == now.get(name) for name in verdict.norms)


def everywhere(holds: bool) -> bool:
    """Whether something holds on every rank; every rank must call it."""
    return all(of_all_ranks(holds))


def agree(verdicts: dict[str, Verdict]) -> None:
    """Make all ranks hold the same verdicts: a weight on which they differ is not touched.

    Args:
        verdicts: by weight name; changed in place. Every rank must call it.
    """
    if world_size() == 1:
        return
    digests = {}
    for name, verdict in verdicts.items():
        # A reason may name numbers that one rank has seen, so it may differ.
        state = {**verdict.state(), "reason": ""}
        digests[name] = (verdict.shape, _digest(state))
    tables = of_all_ranks(digests)
    # In the same order on all ranks.
    for name in sorted(set().union(*tables)):
        entries = [table.get(name) for table in tables]
        if entries.count(entries[0]) < len(entries):
            shape, _ = next(filter(None, entries))
            verdicts[name] = Verdict.unknown(name, shape, "the ranks see different graphs")


def _digest(state: Any) -> str:
    """Short, and the same for equal states."""
    if isinstance(state, Tensor):
        # The labels of a large model's weights are megabytes, which no rank needs to see.
        return sha256(state.cpu().numpy().tobytes()).hexdigest()
    if isinstance(state, Mapping):
        state = sorted(state.items())
    if isinstance(state, (list, tuple)):
        return repr([_digest(value) for value in state])
    return repr(state)
