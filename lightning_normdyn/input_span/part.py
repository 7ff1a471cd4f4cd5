"""What InputSpanMonitor does in one fit: which layers, when to gather, and what an epoch gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_normdyn.engine.flavours import Trainer, classes
from lightning_normdyn.engine.lightning_facts import batches_that_stepped, before_batch_transfer
from lightning_normdyn.engine.messages import warn_once
from lightning_normdyn.engine.part import Part
from lightning_normdyn.engine.plan import Target
from lightning_normdyn.engine.session import Session
from lightning_normdyn.engine.value_checks import flag, optional, plain, record, whole
from lightning_normdyn.engine.worker import Worker
from lightning_normdyn.errors import NormDynError, NoTargetsError, NotSupportedError
from lightning_normdyn.monitor.history import History, check_history

from .fixed_weights import at_fixed_weights, progress, rounds_of, share_of_batches
from .gather import InputGatherer, ReadableLayers, Readers
from .rows import filter_labels, filters_of
from .summary import GapReporter, SpanSummary, facts_of, publish, summary_numbers

# Covariances may have hundreds of MiB, which nobody expects in a checkpoint.
MOST_SAVED_BYTES = 64 * 2**20

# A chosen epoch that is not measured yet: its number, the step that its row belongs to, whether its
# last batch was reached, and what was gathered.
CHECK_EPOCH = record(
    {"number": whole(), "step": whole(), "is_over": flag, "gathered": optional(plain)}
)


class SpanWorker(Worker[Any]):
    """Refuses vectors that are not made of whole filters; it has no part in a step."""

    part: SpanPart

    def prepare(self) -> None:
        """Look at every target."""
        for target in self.plan.targets:
            try:
                filter_labels(self.part.layers.readers[target.weight][0], target.partition)
            except NotSupportedError as error:
                raise NotSupportedError(
                    f"`{target.name}` cannot be a target of InputSpanMonitor: {error}. Leave it "
                    f"out with params=[..., '!{target.name}']."
                ) from error


class SpanPart(Part[Any]):
    """Gathers inputs during chosen epochs, and measures after their last batch.

    Attributes:
        layers: which weights' inputs can be looked at.
        gaps: tells where inputs are missing.
    """

    STATE = record({}, {"history": check_history, "epoch": CHECK_EPOCH})

    def __init__(self, rule: Any, worker: type[Worker[Any]], session: Session) -> None:
        super().__init__(rule, worker, session)
        # On the callback, where a person looks for it after the fit.
        rule.history = History()
        refuse_strategy(session.trainer)
        eagerly = rule.dataloader is not None
        self.layers = ReadableLayers(session.module, session.weights.shapes, eagerly=eagerly)
        self.gaps = GapReporter(self.layers, by_name=rule.by_name)
        # Of the chosen epoch that is running: batches of it were seen, and what they held.
        self._epoch_open = False
        self._gatherer: InputGatherer | None = None

    @property
    def _trainer(self) -> Trainer:
        return self.session.trainer

    # -- which layers

    def fit_start(self) -> None:
        """Find the layers, and refuse what cannot be measured."""
        super().fit_start()
        self._refuse_to_measure_nothing()
        # What a person has named and cannot be measured was refused already.
        if self.rule.by_name:
            return
        for weight in self.layers.readers:
            reason = self.layers.standing_obstacle(weight)
            if reason and weight.requires_grad and weight in self.matched:
                warn_once(f"InputSpanMonitor leaves out `{self.name_of(weight)}`: {reason}.")

    def train_start(self) -> None:
        """Try one batch of ``dataloader``, and refuse what it does not reach."""
        super().train_start()
        if self.rule.dataloader is None or self._trainer.barebones:
            return
        self.layers.trial = self._try()
        # Once more, with what the trial has shown.
        self.check_patterns(self.session.attachment.optimizers)
        self._refuse_to_measure_nothing()

    def check_weight(self, weight: Tensor, name: str) -> None:
        """Refuse a weight whose inputs cannot be looked at."""
        super().check_weight(weight, name)
        reason = self.layers.obstacle(weight)
        if reason is not None:
            raise NotSupportedError(
                f"`{name}` was asked to be a target of InputSpanMonitor, but {reason}. Leave it "
                f"out with params=[..., '!{name}']."
            )

    def _refuse_to_measure_nothing(self) -> None:
        weights = self.layers.readers
        if any(map(self.can_treat, weights)):
            return
        kind = type(self.session.module).__name__
        if self.layers.trial is not None:
            raise NoTargetsError(
                f"InputSpanMonitor found no linear layer or convolution that `{kind}.forward` "
                "uses. Override `call_model` so that it runs the layers, or remove the callback."
            )
        reasons = sorted(set(filter(None, map(self.layers.standing_obstacle, weights))))
        because = f": {'; '.join(reasons)}" if reasons else ""
        raise NoTargetsError(
            f"InputSpanMonitor found no linear layer or convolution in `{kind}` that it can "
            f"measure{because}. Remove the callback, or name other weights."
        )

    def _try(self) -> InputGatherer:
        """Run one batch, only to see which layers it reaches."""
        module = self.session.module
        # No rows: what is asked is only which layers are called, and with what.
        gatherer = self._gather_for(self.layers.readers, most=0)
        with closing(gatherer), at_fixed_weights(module, self.rule.seed):
            for batch in self.rule.dataloader:
                gatherer.begin_batch(1)
                try:
                    self._run(batch)
                # Whatever `forward` raises: its message cannot say who called it, and with what.
                except Exception as error:
                    raise NotSupportedError(
                        f"InputSpanMonitor calls `{type(module).__name__}.forward` with the first "
                        f"element of a batch of `dataloader` (with the entries of a "
                        f"mapping by name), and here that raised {type(error).__name__}: {error}\n"
                        "Let `forward` take it, or override `InputSpanMonitor.call_model(module, "
                        "batch)` in a subclass."
                    ) from error
                gatherer.end_batch()
                return gatherer
        raise NotSupportedError("InputSpanMonitor's `dataloader` has no batch. Give it one.")

    # -- when to gather

    def batch_start(self, batch: Any, batch_idx: int) -> None:
        """Gather from this batch, if it belongs to a chosen epoch."""
        super().batch_start(batch, batch_idx)
        epoch = self._trainer.current_epoch
        if batch_idx == 0:
            self._catch_up(epoch - 1)
        if self._trainer.barebones or (epoch + 1) % self.rule.every_n_epochs:
            return
        if not self._epoch_open and self.rule.dataloader is None:
            self._gatherer = self._gather_for(self._turn_of(epoch))
            # An epoch opens at a later batch only where the fit was resumed within it.
            if batch_idx and not self._go_on(self._gatherer, self._saved_epoch(), epoch):
                rank_zero_info(
                    f"InputSpanMonitor gathers in epoch {epoch} what comes after its first "
                    f"{batch_idx} batches: the fit was resumed there."
                )
        self._epoch_open = True
        if self._gatherer is not None:
            self._gatherer.begin_batch(_batches_left(self._trainer, batch_idx))

    def _saved_epoch(self) -> dict[str, Any] | None:
        """The unfinished epoch of the checkpoint, before the first step has taken it up."""
        return None if self.restored is None else self.restored["extra"].get("epoch")

    def _go_on(self, gatherer: InputGatherer, saved: dict[str, Any] | None, epoch: int) -> bool:
        """Whether ``gatherer`` goes on from what the checkpoint holds of this epoch."""
        if saved is None or saved["gathered"] is None or saved["number"] != epoch:
            return False
        try:
            gatherer.load(saved["gathered"], self._names())
        # The checkpoint may be of other layers. A training must not fail for a measurement.
        except NormDynError as error:
            warn_once(f"InputSpanMonitor drops the inputs gathered before the checkpoint: {error}")
            return False
        return True

    def _names(self) -> dict[Tensor, str]:
        return {weight: self.name_of(weight) for weight in self.layers.readers}

    def _catch_up(self, epoch: int) -> None:
        """Measure the epoch before a resume, if it ended with the checkpoint.

        A saver that comes first in the list of callbacks saves before the epoch's last batch was
        measured, and the resumed fit never comes back to that batch. Now, before the first forward
        pass, weights and running statistics are still those of its end.
        """
        saved = self._saved_epoch()
        if saved is None or not saved["is_over"] or saved["number"] != epoch:
            return
        gatherer = None
        if self.rule.dataloader is None:
            gatherer = self._gather_for(self._turn_of(epoch))
            gatherer.close()
            if not self._go_on(gatherer, saved, epoch):
                return
        self._record(gatherer, saved["step"])

    def batch_end(self) -> None:
        """Measure after the last batch.

        Not at the end of the epoch: a validation comes in between, in which a checkpoint may be
        saved, and a fit that resumes from it would never come back to this epoch.
        """
        super().batch_end()
        if self._gatherer is not None:
            self._gatherer.end_batch()
        # The count of steps grows only after this hook.
        if self._trainer.is_last_batch:
            self._measure(batches_that_stepped(self._trainer))

    def epoch_end(self) -> None:
        """Measure an epoch that ended before its last batch."""
        super().epoch_end()
        # As Lightning has it for values of an epoch: the step of its last batch.
        self._measure(max(0, batches_that_stepped(self._trainer) - 1))

    def close(self) -> None:
        """Leave no hook behind."""
        super().close()
        self._close_epoch()

    def _close_epoch(self) -> None:
        if self._gatherer is not None:
            self._gatherer.close()
        self._gatherer, self._epoch_open = None, False

    def _turn_of(self, epoch: int) -> Readers:
        """The weights, with their layers, whose turn it is in a chosen epoch."""
        # Only what an optimizer owns: a weight that nobody trains would cost a turn.
        selected = self.select(self.session.attachment.weights())
        blocks = self.layers.blocks(filter(self.can_treat, selected))
        # By the number of the epoch, so that a resumed fit goes on with the same turn.
        turn: int = (epoch + 1) // self.rule.every_n_epochs - 1
        return blocks[turn % len(blocks)]

    def _gather_for(
        self, readers: Mapping[Tensor, Sequence[nn.Module]], most: int | None = None
    ) -> InputGatherer:
        trainer = self._trainer
        if most is None:
            # `max_samples` counts over all ranks.
            most = max(1, self.rule.max_samples // trainer.world_size)
        # Ranks see different batches: let them choose different rows, too.
        seed = self.rule.seed + trainer.global_rank
        return InputGatherer(readers, trainer.strategy.root_device, most=most, seed=seed)

    # -- measuring

    def _measure(self, step: int) -> None:
        gatherer, due = self._gatherer, self._epoch_open
        self._close_epoch()
        if not due:
            return
        for bracket in self.session.attachment.brackets:
            # A fused optimizer tells later whether it skipped its last update.
            bracket.settle()
        self._record(gatherer, step)

    def _record(self, gatherer: InputGatherer | None, step: int) -> None:
        """Make a row of what was gathered, or of a pass over ``dataloader``; a collective."""
        targets = self._known_targets()
        if not targets:
            return
        if gatherer is None:
            summaries, batches = self._pass_over_loader(targets)
        else:
            summaries, batches = self._summarize(gatherer, targets), gatherer.batches
        history = self.rule.history
        restored = self.restored
        if restored is not None:
            # No step has taken the checkpoint up yet: the row belongs to what it holds.
            self.load_extra(restored["extra"])
        if self._trainer.is_global_zero:
            # Layers may take turns: what is known of those of earlier epochs stays.
            facts = dict(history.meta.get("targets", {}))
            facts.update(facts_of(targets, summaries))
            publish(
                history,
                self._trainer.loggers,
                summaries,
                step,
                optimizer_step=self._optimizer_steps(),
                meta={"targets": facts, "settings": self.rule.settings(), "batches": batches},
            )
        if restored is not None:
            extra = {**restored["extra"], "history": history.state_dict()}
            # It is measured now: a checkpoint before the first step must not ask for it again.
            extra.pop("epoch", None)
            self.restored = {**restored, "extra": extra}

    def _known_targets(self) -> list[Target]:
        """The weights to measure; none where no optimizer has stepped yet and nothing was
        restored."""
        if self.workers:
            return self.targets
        if self.restored is None or not self.session.restore_verdicts():
            return []
        # After a resume, what the checkpoint says of each weight holds until the first step.
        selected = self.select(self.session.attachment.weights())
        return list(filter(None, map(self.target_or_none, selected)))

    def _optimizer_steps(self) -> int:
        if self.workers:
            return max(self.steps_of(index) for index in self.workers)
        assert self.restored is not None
        return max((int(steps) for steps in self.restored["steps"].values()), default=0)

    def _pass_over_loader(self, targets: list[Target]) -> tuple[dict[str, SpanSummary], int]:
        """Gather at fixed weights, as many layers at a time as fit into memory.

        Returns:
            The summaries by weight name, and how many batches counted on this rank.
        """
        module, trainer = self.session.module, self._trainer
        world = trainer.world_size
        # The batches that each rank runs in one pass.
        rounds = rounds_of(self.rule.dataloader, world)
        blocks = self.layers.blocks(target.weight for target in targets)
        total = None if rounds is None else rounds * len(blocks)
        summaries: dict[str, SpanSummary] = {}
        batches = 0
        with progress(trainer, total, f"inputs of {len(targets)} weights") as advance:
            for readers in blocks:
                # One for each block: the covariances of all layers may not fit into memory.
                gatherer = self._gather_for(readers)
                with closing(gatherer), at_fixed_weights(module, self.rule.seed):
                    share = share_of_batches(self.rule.dataloader, trainer.global_rank, world)
                    for number, (batch, counts) in enumerate(share):
                        # Where the length is not known, rows are taken until there are enough.
                        if counts:
                            gatherer.begin_batch(1 if rounds is None else rounds - number)
                        self._run(batch)
                        gatherer.end_batch()
                        advance()
                summaries.update(self._summarize(gatherer, targets))
                batches = gatherer.batches
        return summaries, batches

    def _run(self, batch: Any) -> None:
        """Transfer a batch and call the model as in training."""
        module, trainer = self.session.module, self._trainer
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.strategy.batch_to_device(before_batch_transfer(module, batch))
        with trainer.precision_plugin.forward_context():
            self.rule.call_model(module, batch)

    def _summarize(
        self, gatherer: InputGatherer, targets: Sequence[Target]
    ) -> dict[str, SpanSummary]:
        """The numbers of each layer that was gathered from, by weight name; a collective.

        Where there are several ranks, each works out its share of the layers.
        """
        rank, world = self._trainer.global_rank, self._trainer.world_size
        measured = [target for target in targets if target.weight in gatherer.streams]
        streams = [gatherer.streams[target.weight] for target in measured]
        if world > 1:
            for stream in streams:
                stream.merge(dist.all_reduce)
        # One row per layer, filled by the rank whose share it is: the sum over ranks completes it.
        table = torch.zeros(len(measured), SpanSummary.WIDTH, dtype=torch.float64, device="cpu")
        for i, (target, stream) in enumerate(zip(measured, streams, strict=True)):
            weight: Any = target.weight.detach()
            # Every rank takes part in making a sharded weight whole.
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            if i % world == rank and stream.count:
                layer = self.layers.readers[target.weight][0]
                filters = filters_of(layer, whole).to(stream.mean)
                labels = filter_labels(layer, target.partition)
                table[i] = summary_numbers(
                    filters, stream, labels, self.rule.energy, self.rule.method
                )
        if world > 1:
            on_device = table.to(self._trainer.strategy.root_device)
            dist.all_reduce(on_device)
            table = on_device.cpu()
        summaries = {}
        for target, stream, numbers in zip(measured, streams, table.tolist(), strict=True):
            if stream.count:
                summaries[target.name] = SpanSummary(stream.count, numbers)
        self.gaps.report(gatherer, measured, summaries)
        return summaries

    # -- checkpoints

    def checkpoint_saved(self) -> None:
        """Send what was measured to the process that called ``fit``: one that the Trainer started
        gets no on_exception when it fails."""
        self.rule.send_history(self._trainer)

    torn_down = checkpoint_saved

    def extra(self) -> dict[str, Any]:
        """The history, and the chosen epoch that is running."""
        extra: dict[str, Any] = {"history": self.rule.history.state_dict()}
        # The checkpoint is one rank's, and other ranks have gathered from other batches.
        if self._epoch_open and self._trainer.world_size == 1:
            extra["epoch"] = {
                "number": self._trainer.current_epoch,
                "step": batches_that_stepped(self._trainer),
                "is_over": bool(self._trainer.is_last_batch),
                "gathered": self._gathered(),
            }
        return extra

    def _gathered(self) -> dict[str, Any] | None:
        """What was gathered so far; None if it is too large for a checkpoint."""
        if self._gatherer is None:
            return None
        size = sum(stream.nbytes for stream in self._gatherer.streams.values())
        return self._gatherer.state(self._names()) if size <= MOST_SAVED_BYTES else None

    def load_extra(self, extra: dict[str, Any]) -> None:
        """Go on with the history of the checkpoint."""
        if "history" in extra:
            self.rule.history.load_state_dict(extra["history"])


def refuse_strategy(trainer: Trainer) -> None:
    """Refuse strategies that cut inputs or weights."""
    strategy = type(trainer.strategy).__name__
    # Ranks that share a layer see the same batch, so that under tensor parallelism the sampler has
    # fewer replicas than there are processes.
    replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas")
    fsdp = classes("strategies", "FSDPStrategy")
    deepspeed = classes("strategies", "DeepSpeedStrategy")
    if isinstance(trainer.strategy, (*fsdp, *deepspeed)):
        refused = strategy
    elif trainer.world_size > 1 and replicas != trainer.world_size:
        refused = f"{strategy} with tensor parallelism"
    else:
        return
    raise NotSupportedError(
        f"InputSpanMonitor needs the layers' whole inputs and weights, which {refused} does not "
        f"keep at hand. Use one device, DDP or ModelParallelStrategy with data parallelism "
        f"(FSDP2), or remove the callback."
    )


def _batches_left(trainer: Trainer, batch_idx: int) -> int:
    """This batch and those after it in the epoch; 1 where that is not known, so that rows are taken
    until there are enough."""
    total = trainer.num_training_batches
    if isfinite(total):
        return max(1, int(total) - batch_idx)
    return 1
