"""What part of the weights the training data can see: the WRS paper's input space projection, once
per chosen epoch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]  # not exported by name
from torch import Tensor, nn

from lightning_normdyn.engine.arguments import check_count, is_number
from lightning_normdyn.engine.legacy import LegacyCallback
from lightning_normdyn.engine.lightning_facts import batches_that_stepped, before_batch_transfer
from lightning_normdyn.engine.messages import warn_once
from lightning_normdyn.engine.plan import Plan
from lightning_normdyn.engine.target import Target
from lightning_normdyn.errors import NoTargetsError, NotSupportedError
from lightning_normdyn.input_span.fixed_weights import (
    at_fixed_weights,
    progress,
    rounds_of,
    share_of_batches,
)
from lightning_normdyn.input_span.gather import InputGatherer
from lightning_normdyn.input_span.layers import ReadableLayers
from lightning_normdyn.input_span.record import GapReporter, facts_of, publish
from lightning_normdyn.input_span.rows import filter_labels, filters_of
from lightning_normdyn.input_span.summary import SpanSummary, summary_numbers
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.history_check import check_history
from lightning_normdyn.monitor.spawned import KeepsHistory
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.step import Phase, Step


class InputSpanMonitor(LegacyCallback, KeepsHistory):
    r"""Logs what part of each layer's weights its inputs can see, and how the weights are
    distributed (WRS paper, Figures 4 to 6).

    During a chosen epoch, inputs of the targeted layers (rows of linear layers, patches of
    convolutions) are gathered from the batches that the model is trained on. At the epoch's last
    batch the eigenvectors of their covariance are computed. The leading ones, which hold the share
    ``energy`` of the variance, are the span of the inputs. Keys are ``<quantity>/<parameter name>``:

    - ``input_span_energy``: share of a weight vector's squared norm inside the span (truncated
      basis), mean over the vectors.
    - ``input_span_noise``: the rest: what the data cannot see.
    - ``input_span_rank``: directions in the span; for grouped convolutions the mean over groups, 0
      for constant inputs.
    - ``ggd_shape_input``: generalized-Gaussian shape of the weights in the whole eigenbasis
      (rotated, norms kept): 2 Gaussian, 1 Laplace.
    - ``ggd_shape_parameter``: the same of the weights as they are.

    **What differs from the paper**, which feeds data to a model whose weights stand still: here
    weights move while inputs are gathered, so a deeper layer's inputs are a mixture over the epoch,
    with dropout and augmentation as trained. The weights that are looked at are those after the
    epoch's last step. With ``dataloader``, inputs are gathered as in the paper: after that last
    step, in a pass over this loader at fixed weights, in evaluation mode and without gradients,
    which leaves the model and all global random states as they were. There `call_model` is called
    with each batch: it runs ``forward`` on the first element, or with the entries of a mapping that
    ``forward`` takes as keyword arguments; override it where that is not what you want. One batch
    is tried at fit start.

    After a resume in the middle of a chosen epoch, its inputs are those of the batches that are
    left; an epoch whose last batch came before the checkpoint is not measured again.

    Compiled code (``torch.compile``) calls no hooks, so what runs inside it is refused by name, or
    left out with a warning under ``"auto"``; with ``dataloader`` it runs eagerly and is measured.
    Not for FSDP1, DeepSpeed and tensor parallelism, where whole inputs or weights are not at hand.

    **Cost.** No forward pass but with ``dataloader``. Per layer with :math:`d` entries per filter
    and :math:`g` groups: at most ``max_samples`` rows, :math:`g d^2` multiply-adds for each,
    :math:`8 g d^2` bytes, which are read and written once per batch, and about :math:`10 g d^3`
    operations for the eigenvectors (beyond 5120 entries: a randomized method for the leading ones
    only, and no ``ggd_shape_input``). At most 2 GiB of covariances are held at once. Layers that do
    not fit take turns: another part of them in every chosen epoch, or with ``dataloader`` a pass
    for each part. A layer that does not fit alone is refused by name (left out, with a warning,
    under ``"auto"``).

    Args:
        every_n_epochs: measure in every so many-th training epoch.
        dataloader: batches to gather the inputs from at fixed weights, as the paper does: a loader
            of its own, the same on every rank (they share the batches). None: the training batches.
        max_samples: most rows to take per layer, over all ranks, spread over the epoch or the
            loader; where their length is not known, the first ones.
        energy: share of the inputs' variance that makes the span, in (0, 1].
        method: how the shape is fitted: ``"moments"``, or ``"mle"`` (slower, more precise on clean
            data).
        seed: of the choice of rows, and of random numbers in passes over ``dataloader``.
        params: ``"auto"`` (every weight of a linear layer or convolution that an optimizer owns), a
            glob pattern, or a list of them.
        granularity: ``"auto"``, ``"filter"``, ``"group"`` or ``"layer"``: the vectors that energy
            and noise are averaged over.

    Attributes:
        history: the same rows in memory, on rank zero, logger or not, with histograms of the
            weights as per-vector arrays (`lightning_normdyn.plots.plot_input_span`,
            `plot_weight_histogram`).

    Raises:
        ValueError: for numbers out of range, and a ``dataloader`` that can be run through only
            once.

    Example:
        >>> from lightning_normdyn import InputSpanMonitor
        >>> InputSpanMonitor(10, max_samples=20_000).energy
        0.99
    """

    writes: ClassVar[bool] = False

    def __init__(
        self,
        every_n_epochs: int = 1,
        *,
        dataloader: Iterable[Any] | None = None,
        max_samples: int = 100_000,
        energy: float = 0.99,
        method: Literal["moments", "mle"] = "moments",
        seed: int = 0,
        params: str | list[str] = "auto",
        granularity: Literal["auto", "filter", "group", "layer"] = "auto",
    ) -> None:
        super().__init__(params, granularity)
        self.every_n_epochs = check_count("every_n_epochs", every_n_epochs, 1)
        self.max_samples = check_count("max_samples", max_samples, 2)
        self.seed = check_count("seed", seed, 0)
        # NumPy takes no larger ones, and each rank adds its own number.
        if self.seed >= 2**31:
            raise ValueError(f"`seed` must be below 2**31, got {seed!r}.")
        if not is_number(energy) or not 0 < energy <= 1:
            raise ValueError(f"`energy` must be in (0, 1], got {energy!r}.")
        if method not in ("moments", "mle"):
            raise ValueError(f"`method` must be 'moments' or 'mle', got {method!r}.")
        if isinstance(dataloader, Iterator):
            raise ValueError(
                f"`dataloader` must be iterable once per chosen epoch, such as a DataLoader; got "
                f"{type(dataloader).__name__}, which can be run through only once."
            )
        self.energy = float(energy)
        self.method = method
        self.dataloader = dataloader
        KeepsHistory.__init__(self)

    def _forget(self) -> None:
        super()._forget()
        self._layers: ReadableLayers | None = None
        self._gaps: GapReporter | None = None
        self._labels: dict[str, Tensor] = {}
        # Of the chosen epoch that is running: batches of it were seen, and what they held.
        self._epoch_open = False
        self._gatherer: InputGatherer | None = None

    @property
    def shows_tables(self) -> bool:
        """It has no part in the tables."""
        return False

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        names = ("every_n_epochs", "max_samples", "energy", "method", "seed")
        return {name: getattr(self, name) for name in names}

    def handlers(self) -> dict[Phase, Callable[[Step, Plan], None]]:
        """It has no part in a step."""
        return {}

    def treatment(self, plan: Plan, target: Target) -> str:
        """Measuring is not treating."""
        return ""

    def call_model(self, module: LightningModule, batch: Any) -> None:
        """Run ``module`` on a batch of ``dataloader``; override it where ``forward`` wants
        something else.

        Args:
            module: the LightningModule, in evaluation mode.
            batch: collated and on the device.
        """
        first = batch[0] if isinstance(batch, (tuple, list)) else batch
        if isinstance(first, Mapping):
            taken = inspect.signature(module.forward).parameters.values()
            everything = any(p.kind is p.VAR_KEYWORD for p in taken)
            by_name = {p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            chosen = {key: value for key, value in first.items() if everything or key in by_name}
            if chosen:
                module(**chosen)
                return
        module(first)

    # ------------------------------------------------------------------------------ which layers

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers, and refuse strategies that cut inputs or weights."""
        self.history = History()
        self._refuse_strategy(trainer)
        super().on_fit_start(trainer, pl_module)
        assert self._session is not None
        eagerly = self.dataloader is not None
        self._layers = ReadableLayers(pl_module, self._session.weights.shapes, eagerly=eagerly)
        self._gaps = GapReporter(self._layers, by_name=self._by_name)
        self._check_layers(trainer, pl_module)
        self._name_what_is_left_out()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try one batch of ``dataloader``, and refuse what it does not reach."""
        super().on_train_start(trainer, pl_module)
        if self.dataloader is not None and not trainer.barebones:
            assert self._layers is not None
            self._layers.trial = self._try(trainer, pl_module, self.dataloader)
            self._check_layers(trainer, pl_module)

    @staticmethod
    def _refuse_strategy(trainer: Trainer) -> None:
        strategy = type(trainer.strategy).__name__
        replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas")
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            refused = strategy
        elif trainer.world_size > 1 and replicas != trainer.world_size:
            refused = f"{strategy} with tensor parallelism"
        else:
            return
        raise NotSupportedError(
            f"InputSpanMonitor needs the layers' whole inputs and weights, which {refused} does "
            f"not keep at hand. "
            "Use one device, DDP or ModelParallelStrategy with data parallelism (FSDP2), or "
            "remove the callback."
        )

    def _check_layers(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse named weights that cannot be measured, and a network with nothing to measure."""
        self._check_patterns(trainer)
        assert self._session is not None
        assert self._layers is not None
        if any(
            self._can_measure(w) for w in self._session.weights.names if w in self._layers.readers
        ):
            return
        kind = type(module).__name__
        if self._layers.trial is not None:
            raise NoTargetsError(
                f"InputSpanMonitor found no linear layer or convolution that `{kind}.forward` uses. "
                "Override `call_model` so that it runs the layers, or remove the callback."
            )
        reasons = {self._layers.standing_obstacle(w) or "" for w in self._layers.readers} - {""}
        because = f": {'; '.join(sorted(reasons))}" if reasons else ""
        raise NoTargetsError(
            f"InputSpanMonitor found no linear layer or convolution in `{kind}` that it can "
            f"measure{because}. Remove the callback, or name other weights."
        )

    def _name_what_is_left_out(self) -> None:
        assert self._session is not None
        assert self._layers is not None
        if self._by_name:
            return  # an error already
        for weight in self._layers.readers:
            reason = self._layers.standing_obstacle(weight)
            if reason and weight.requires_grad and weight in self._matched:
                name = self._session.weights.name(weight)
                warn_once(f"InputSpanMonitor leaves out `{name}`: {reason}.")

    def _check_weight(self, weight: Tensor, name: str) -> None:
        super()._check_weight(weight, name)
        # Patterns are checked once before the layers have been looked for.
        reason = None if self._layers is None else self._layers.obstacle(weight)
        if reason is not None:
            raise NotSupportedError(
                f"`{name}` was asked to be a target of InputSpanMonitor, but {reason}. Leave it "
                f"out with params=[..., '!{name}']."
            )

    def _try(
        self, trainer: Trainer, module: LightningModule, batches: Iterable[Any]
    ) -> InputGatherer:
        """Run one batch, only to see which layers it reaches."""
        assert self._layers is not None
        gatherer = self._gather_for(trainer, self._layers.readers, most=0)
        with closing(gatherer), at_fixed_weights(module, self.seed):
            for batch in batches:
                gatherer.begin_batch(1)
                try:
                    self._run(trainer, module, batch)
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

    def on_plan(self, plan: Plan, bracket: StepBracket) -> None:
        """Which vector each filter belongs to."""
        assert self._layers is not None
        for target in plan.targets:
            try:
                layer = self._layers.readers[target.weight][0]
                self._labels[target.name] = filter_labels(layer, target.partition)
            except NotSupportedError as error:
                raise NotSupportedError(
                    f"`{target.name}` cannot be a target of InputSpanMonitor: {error}. Leave it "
                    f"out with params=[..., '!{target.name}']."
                ) from error

    # ----------------------------------------------------------------------------- when to gather

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Gather from this batch, if it belongs to a chosen epoch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        epoch = trainer.current_epoch
        if trainer.barebones or (epoch + 1) % self.every_n_epochs:
            return
        if not self._epoch_open:
            self._epoch_open = True
            if self.dataloader is None:
                self._gatherer = self._gather_for(trainer, self._turn_of(epoch))
                if batch_idx:
                    rank_zero_info(
                        f"InputSpanMonitor gathers in epoch {epoch} what comes after its first "
                        f"{batch_idx} batches: the fit was resumed there."
                    )
        if self._gatherer is not None:
            self._gatherer.begin_batch(_batches_left(trainer, batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after the last batch.

        Not at the end of the epoch: a validation comes in between, in which a checkpoint may be
        saved, and a fit that resumes from it would never come back to this epoch.
        """
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._gatherer is not None:
            self._gatherer.end_batch()
        if trainer.is_last_batch:
            self._measure(trainer, pl_module, batches_that_stepped(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure an epoch that ended before its last batch."""
        super().on_train_epoch_end(trainer, pl_module)
        # As Lightning has it for values of an epoch: the step of its last batch.
        self._measure(trainer, pl_module, max(0, batches_that_stepped(trainer) - 1))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook behind."""
        super().on_exception(trainer, pl_module, exception)
        self._close()

    def _close(self) -> None:
        gatherer, self._gatherer, self._epoch_open = self._gatherer, None, False
        if gatherer is not None:
            gatherer.close()

    def _turn_of(self, epoch: int) -> dict[Tensor, list[nn.Module]]:
        """The weights, with their layers, whose turn it is in a chosen epoch."""
        session = self._session
        assert session is not None
        assert self._layers is not None
        owned = []
        for optimizer in session.attachment.optimizers:
            owned += session.weights.owned(optimizer)
        blocks = self._layers.blocks(w for w in self._select(owned) if self._can_measure(w))
        # By the number of the epoch, so that a resumed fit goes on with the same turn.
        turn = (epoch + 1) // self.every_n_epochs - 1
        return blocks[turn % len(blocks)]

    def _gather_for(
        self,
        trainer: Trainer,
        readers: Mapping[Tensor, Sequence[nn.Module]],
        most: int | None = None,
    ) -> InputGatherer:
        if most is None:
            most = max(1, self.max_samples // trainer.world_size)
        # Ranks see different batches: let them choose different rows, too.
        seed = self.seed + trainer.global_rank
        return InputGatherer(readers, trainer.strategy.root_device, most=most, seed=seed)

    # -------------------------------------------------------------------------------- measuring

    def _measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        gatherer, due = self._gatherer, self._epoch_open
        self._close()
        if not due or not self.plans:
            return
        assert self._session is not None
        for bracket in self._session.attachment.brackets:
            # A fused optimizer tells later whether it skipped its last update.
            bracket.settle()
        targets = [target for plan in self.plans.values() for target in plan.targets]
        if gatherer is not None:
            summaries, batches = self._summarize(trainer, gatherer, targets), gatherer.batches
        else:
            summaries, batches = self._pass_over_loader(trainer, pl_module, targets)
        if trainer.is_global_zero:
            # Layers may take turns: what is known of those of earlier epochs stays.
            facts = {**self.history.meta.get("targets", {}), **facts_of(targets, summaries)}
            publish(
                self.history,
                trainer.loggers,
                summaries,
                step,
                optimizer_step=max(self.steps_of(index) for index in self.plans),
                meta={"targets": facts, "settings": self.settings(), "batches": batches},
            )

    def _pass_over_loader(
        self, trainer: Trainer, module: LightningModule, targets: list[Target]
    ) -> tuple[dict[str, SpanSummary], int]:
        """Gather at fixed weights, as many layers at a time as fit into memory.

        Returns:
            The summaries by weight name, and how many batches counted on this rank.
        """
        assert self.dataloader is not None
        assert self._layers is not None
        world = trainer.world_size
        rounds = rounds_of(self.dataloader, world)
        blocks = self._layers.blocks(target.weight for target in targets)
        total = None if rounds is None else rounds * len(blocks)
        summaries: dict[str, SpanSummary] = {}
        batches = 0
        with progress(trainer, total, f"inputs of {len(targets)} weights") as advance:
            for readers in blocks:
                gatherer = self._gather_for(trainer, readers)
                with closing(gatherer), at_fixed_weights(module, self.seed):
                    share = share_of_batches(self.dataloader, trainer.global_rank, world)
                    for number, (batch, counts) in enumerate(share):
                        if counts:
                            gatherer.begin_batch(1 if rounds is None else rounds - number)
                        self._run(trainer, module, batch)
                        gatherer.end_batch()
                        advance()
                summaries.update(self._summarize(trainer, gatherer, targets))
                batches = gatherer.batches
        return summaries, batches

    def _run(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Transfer a batch and call the model as in training."""
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.strategy.batch_to_device(before_batch_transfer(module, batch))
        with trainer.precision_plugin.forward_context():
            self.call_model(module, batch)

    def _summarize(
        self, trainer: Trainer, gatherer: InputGatherer, targets: Sequence[Target]
    ) -> dict[str, SpanSummary]:
        """The numbers of each layer that was gathered from, by weight name; a collective.

        Where there are several ranks, each works out its share of the layers.
        """
        assert self._layers is not None
        assert self._gaps is not None
        rank, world = trainer.global_rank, trainer.world_size
        measured = [target for target in targets if target.weight in gatherer.streams]
        streams = [gatherer.streams[target.weight] for target in measured]
        if world > 1:
            for stream in streams:
                stream.merge(dist.all_reduce)
        table = torch.zeros(len(measured), SpanSummary.WIDTH, dtype=torch.float64, device="cpu")
        for i, (target, stream) in enumerate(zip(measured, streams, strict=True)):
            weight: Any = target.weight.detach()
            # Every rank takes part in making a sharded weight whole.
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            if i % world == rank and stream.count:
                layer = self._layers.readers[target.weight][0]
                filters = filters_of(layer, whole).to(stream.mean)
                labels = self._labels[target.name]
                table[i] = summary_numbers(filters, stream, labels, self.energy, self.method)
        if world > 1:
            on_device = table.to(trainer.strategy.root_device)
            dist.all_reduce(on_device)
            table = on_device.cpu()
        summaries = {}
        for target, stream, numbers in zip(measured, streams, table.tolist(), strict=True):
            if stream.count:
                summaries[target.name] = SpanSummary(stream.count, numbers)
        self._gaps.report(gatherer, measured, summaries)
        return summaries

    # ------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Send what was measured to the process that called ``fit``: one that the Trainer started
        gets no on_exception when it fails."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        self.send_history(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Send the history to the process that called ``fit``, if that is another one."""
        super().teardown(trainer, pl_module, stage)
        self._close()
        if stage == "fit":
            self.send_history(trainer)

    def _extra(self) -> dict[str, Any]:
        return {"history": self.history.state_dict()}

    def _check_extra(self, extra: Any, where: str) -> None:
        if "history" in extra:
            check_history(extra["history"], f"{where}.history")

    def _load_extra(self, extra: dict[str, Any]) -> None:
        if "history" in extra:
            self.history.load_state_dict(extra["history"])


def _batches_left(trainer: Trainer, batch_idx: int) -> int:
    """This batch and those after it in the epoch; 1 where that is not known, so that rows are taken
    until there are enough."""
    total = trainer.num_training_batches
    return max(1, int(total) - batch_idx) if isfinite(total) else 1
