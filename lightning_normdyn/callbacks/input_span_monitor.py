"""What part of the weights the training data can see: the WRS paper's input space projection, at
the end of epochs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]  # not exported by name
from torch import Tensor, nn

from lightning_normdyn.engine.callback import (
    NormDynCallback,
    Plan,
    Target,
    check_count,
    is_number,
)
from lightning_normdyn.engine.lightning_facts import batches_that_stepped, before_batch_transfer
from lightning_normdyn.engine.messages import warn_once
from lightning_normdyn.engine.state import history as check_history
from lightning_normdyn.errors import NoTargetsError, NotSupportedError
from lightning_normdyn.functional import generalized_gaussian_shape
from lightning_normdyn.input_span.span import (
    LAYERS,
    Covariance,
    InputRows,
    covariance_bytes,
    filter_labels,
    filters_of,
    input_span,
    row_shape,
    share_filters,
    spread_rows,
    vector_shares,
    weight_shape,
)
from lightning_normdyn.input_span.training_sample import Sample, seed_everything, undisturbed
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.spawned import KeepsHistory
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.step import Phase, Step

BLOCK_BYTES = 2**31
"""Covariances held at once; more layers than fit are done in turn, each turn with a pass of its own
over the sample."""
BINS = 61
REACH = 6.0
"""Histograms of weights span so many root mean squares to either side."""
QUANTITIES = (
    "input_span_energy",
    "input_span_noise",
    "input_span_rank",
    "ggd_shape_input",
    "ggd_shape_parameter",
)


class InputSpanMonitor(NormDynCallback, KeepsHistory):
    r"""Logs what part of each layer's weights its inputs can see, and how the weights are
    distributed (WRS paper, Figures 4 to 6).

    At the end of an epoch, inputs of the targeted layers (rows of linear layers, patches of
    convolutions) are gathered over a sample of
    the training data, and the eigenvectors of their covariance are computed. The leading ones,
    which hold the share ``energy`` of the
    variance, are the span of the inputs. Keys are ``<quantity>/<parameter name>``:

    =======================
    ===================================================================================================
    quantity                meaning
    =======================
    ===================================================================================================
    ``input_span_energy``   share of a weight vector's squared norm inside the span (truncated basis), mean over the vectors
    ``input_span_noise``    the rest: what the data cannot see
    ``input_span_rank``     directions in the span; for grouped convolutions the mean over groups, 0 for constant inputs
    ``ggd_shape_input``     generalized-Gaussian shape of the weights in the whole eigenbasis (rotated, norms kept): 2 Gaussian, 1 Laplace
    ``ggd_shape_parameter`` the same of the weights as they are
    =======================
    ===================================================================================================

    The sample is drawn from the training *dataset* (which must be map-style) with a seed of its
    own: the same examples at every epoch
    and on any number of ranks, which share the work. They are collated and transferred as in
    training, so training-time augmentation
    applies, with the same random numbers for an example at every epoch. Then ``forward`` of the
    LightningModule is called in evaluation
    mode, without gradients, on the first element of the batch, or with the entries of a mapping
    that ``forward`` takes as keyword
    arguments; override `call_model` where that is not what it wants. One call is tried at fit
    start. Model, buffers, training flags,
    data order, loggers and random numbers (also those of generators that the dataset, its collate
    function, the datamodule or the
    model hold) are left as they were.

    **Cost.** A pass of ``forward`` over at most ``max_samples`` examples. Per layer with :math:`d`
    entries per filter and :math:`g`
    groups: at most ``max_samples`` rows, :math:`g d^2` multiply-adds for each, :math:`8 g d^2`
    bytes, and about :math:`10 g d^3`
    operations for the eigenvectors (beyond 5120 entries: a randomized method for the leading ones
    only, and no ``ggd_shape_input``). At
    most 2 GiB of covariances are held at once; layers that do not fit take turns, with a pass each,
    and a layer that does not fit alone
    is refused by name (left out, with a warning, under ``"auto"``).

    Not for FSDP1, DeepSpeed and tensor parallelism, where whole inputs or weights are not at hand.

    Args:
        every_n_epochs: measure at the end of every so many training epochs.
        max_samples: most examples to pass through the model, and most rows to take per layer,
            spread over all examples.
        energy: share of the inputs' variance that makes the span, in (0, 1].
        method: how the shape is fitted: ``"moments"``, or ``"mle"`` (slower, more precise on clean
            data).
        seed: of the sample.
        params: ``"auto"`` (every weight of a linear layer or convolution that an optimizer owns and
            ``forward`` uses), a glob pattern, or
            a list of them.
        granularity: ``"auto"``, ``"filter"``, ``"group"`` or ``"layer"``: the vectors that energy
            and noise are averaged over.

    Attributes:
        history: the same rows in memory, on rank zero, logger or not, with histograms of the
            weights as per-vector arrays
            (`lightning_normdyn.monitor.plots.plot_input_span`, `plot_weight_histogram`).

    Raises:
        ValueError: for numbers out of range.

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
        if (
            self.seed >= 2**31
        ):  # what numpy, torch and Python all take, with the number of a batch added
            raise ValueError(f"`seed` must be below 2**31, got {seed!r}.")
        if not is_number(energy) or not 0 < energy <= 1:
            raise ValueError(f"`energy` must be in (0, 1], got {energy!r}.")
        if method not in ("moments", "mle"):
            raise ValueError(f"`method` must be 'moments' or 'mle', got {method!r}.")
        self.energy = float(energy)
        self.method = method
        KeepsHistory.__init__(self)

    def _forget(self) -> None:
        super()._forget()
        self._off = False
        self._readers: dict[Tensor, list[nn.Module]] = {}
        self._tried: dict[nn.Module, _Trial] | None = None
        self._labels: dict[str, Tensor] = {}
        self._cut: set[nn.Module] = set()  # layers of whose rows some were left out

    @property
    def shows_tables(self) -> bool:
        """It has no part in the tables."""
        return False

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {
            key: getattr(self, key)
            for key in ("every_n_epochs", "max_samples", "energy", "method", "seed")
        }

    def handlers(self) -> dict[Phase, Callable[[Step, Plan], None]]:
        """It has no part in a step."""
        return {}

    def treatment(self, plan: Plan, target: Target) -> str:
        """Measuring is not treating."""
        return ""

    def call_model(self, module: LightningModule, batch: Any) -> None:
        """Run ``module`` on a batch as it came from the loader; override it where ``forward`` wants
        something else.

        Args:
            module: the LightningModule, in evaluation mode.
            batch: collated and on the device.
        """
        first = batch[0] if isinstance(batch, (tuple, list)) else batch
        if isinstance(first, Mapping):
            taken = inspect.signature(module.forward).parameters.values()
            everything = any(p.kind is p.VAR_KEYWORD for p in taken)
            named = {p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            chosen = {key: value for key, value in first.items() if everything or key in named}
            if chosen:
                module(**chosen)
                return
        module(first)

    # -- which layers
    # --------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers, and refuse strategies that cut inputs or weights."""
        self._off, self.history = bool(trainer.barebones), History()
        self._refuse_strategy(trainer)
        super().on_fit_start(trainer, pl_module)
        assert self._session is not None
        for layer in pl_module.modules():
            for weight in (
                layer.parameters() if isinstance(layer, LAYERS) else ()
            ):  # also behind a parametrization
                if self._session.weights.shapes.get(weight) == weight_shape(layer):
                    self._readers.setdefault(weight, []).append(layer)
        self._check_patterns(trainer)

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
        if stage == "fit":
            self.send_history(trainer)

    @staticmethod
    def _refuse_strategy(trainer: Trainer) -> None:
        found = None
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            found = type(trainer.strategy).__name__
        elif (
            trainer.world_size > 1
            and (trainer.distributed_sampler_kwargs or {}).get("num_replicas") != trainer.world_size
        ):
            found = f"{type(trainer.strategy).__name__} with tensor parallelism"
        if found is not None:
            raise NotSupportedError(
                f"InputSpanMonitor needs the layers' whole inputs and weights, which {found} does "
                f"not keep at hand. "
                "Use one device, DDP or ModelParallelStrategy with data parallelism (FSDP2), or "
                "remove the callback."
            )

    def _check_weight(self, weight: Tensor, name: str) -> None:
        super()._check_weight(weight, name)
        reason = self._obstacle(weight)
        if reason is not None:
            raise NotSupportedError(
                f"`{name}` was asked to be a target of InputSpanMonitor, but {reason}. Leave it "
                f"out with params=[..., '!{name}']."
            )

    def _obstacle(self, weight: Tensor) -> str | None:
        """Why the inputs of ``weight`` cannot be looked at; None if they can."""
        if self._readers and weight not in self._readers:
            return (
                "it is not the weight of a linear layer or a convolution, so it has no input rows"
            )
        readers = self._readers.get(weight, [])
        if readers and not share_filters(readers):
            kinds = " and ".join(dict.fromkeys(type(layer).__name__ for layer in readers))
            return f"it is shared by layers ({kinds}) that divide it into different filters"
        for layer in readers:
            if covariance_bytes(layer) > BLOCK_BYTES:
                groups, entries = row_shape(layer)
                need, most = covariance_bytes(layer) / 2**30, BLOCK_BYTES / 2**30
                return f"its rows of {entries} entries need {need:.1f} GiB for {groups} covariance(s), and at most {most:g} GiB are spent"
        if self._tried is not None and readers:
            trials = [self._tried[layer] for layer in readers if layer in self._tried]
            if not trials:
                return "`forward` does not call the layer that it belongs to"
            return next((t.obstacle for t in trials if t.obstacle), None)
        return None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try one call of the model, and refuse what it does not reach."""
        super().on_train_start(trainer, pl_module)
        if self._off:
            return
        sample = Sample(trainer, self.max_samples, self.seed)
        with undisturbed(pl_module, self.seed, sample.sources):
            self._tried = self._try(trainer, pl_module, sample)
        self._check_patterns(trainer)
        assert self._session is not None
        if not any(self._can_measure(w) for w in self._session.weights.names if w in self._readers):
            raise NoTargetsError(
                f"InputSpanMonitor found no linear layer or convolution that "
                f"`{type(pl_module).__name__}.forward` uses. "
                "Override `call_model` so that it runs the layers, or remove the callback."
            )
        for weight in self._readers if self.params == ["auto"] else ():
            readers = self._readers[weight]
            if weight.requires_grad and (
                covariance_bytes(readers[0]) > BLOCK_BYTES or not share_filters(readers)
            ):
                warn_once(
                    f"InputSpanMonitor leaves out `{self._session.weights.name(weight)}`: "
                    f"{self._obstacle(weight)}."
                )

    def _try(
        self, trainer: Trainer, module: LightningModule, sample: Sample
    ) -> dict[nn.Module, _Trial]:
        tried: dict[nn.Module, _Trial] = {}

        def look(layer: nn.Module, args: Any, kwargs: Any) -> None:
            trial = tried.setdefault(layer, _Trial())
            trial.calls += 1
            try:
                InputRows(layer, _input_of(args, kwargs))
            except NotSupportedError as error:
                trial.obstacle = str(error)

        layers = {layer for layers in self._readers.values() for layer in layers}
        with _watching(layers, look):
            try:
                self._run(trainer, module, sample.small_batch())
            except Exception as error:
                raise NotSupportedError(
                    f"InputSpanMonitor calls `{type(module).__name__}.forward` with the first "
                    f"element of a batch (with the entries of a "
                    f"mapping by name), and here that raised {type(error).__name__}: {error}\n"
                    "Let `forward` take it, or override `InputSpanMonitor.call_model(module, "
                    "batch)` in a subclass."
                ) from error
        return tried

    def on_plan(self, plan: Plan, bracket: StepBracket) -> None:
        """Which vector each filter belongs to."""
        self._label(plan.targets)

    def _label(self, targets: Sequence[Target]) -> None:
        for target in targets:
            try:
                self._labels[target.name] = filter_labels(
                    self._readers[target.weight][0], target.partition
                )
            except NotSupportedError as error:
                raise NotSupportedError(
                    f"`{target.name}` cannot be a target of InputSpanMonitor: {error}. Leave it "
                    f"out with params=[..., '!{target.name}']."
                ) from error

    # -- measuring
    # -----------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, if it is time."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self.plans:
            self._catch_up(trainer, pl_module, trainer.current_epoch)
        elif self._is_due(trainer.current_epoch):
            targets = [t for plan in self.plans.values() for t in plan.targets]
            assert self._session is not None
            for bracket in self._session.attachment.brackets:
                bracket.settle()  # a fused optimizer tells later whether it skipped its last update
            self._measure(trainer, pl_module, targets, max(self.steps_of(i) for i in self.plans))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In the first epoch after a resume: look whether the one before it was measured."""
        if batch_idx == 0:
            self._catch_up(trainer, pl_module, trainer.current_epoch - 1)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _is_due(self, epoch: int) -> bool:
        return not self._off and (epoch + 1) % self.every_n_epochs == 0

    def _catch_up(self, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        """Measure an epoch whose last step came before a checkpoint, and whose end after it (as
        where a validation has it saved): the
        weights are still those of its end."""
        restored, session = self._restored, self._session
        if (
            restored is None
            or epoch < 0
            or not self._is_due(epoch)
            or "history" not in restored.get("extra", {})
        ):
            return
        assert session is not None
        history = History()
        history.load_state_dict(restored["extra"]["history"])
        if (
            len(history) and history[-1]["step"] >= self._newest_step(trainer)
        ) or not session.restore_verdicts():
            return
        chosen = {
            i: [self._target(w) for w in self._select(session.weights.owned(o))]
            for i, o in enumerate(session.attachment.optimizers)
        }
        targets = [t for found in chosen.values() for t in found if t is not None]
        if targets:
            self._label(targets)
            self.history = history
            self._measure(
                trainer,
                module,
                targets,
                max(int(restored["steps"].get(i, 0)) for i, found in chosen.items() if found),
            )
            self._restored = {**restored, "extra": self._extra()}

    @staticmethod
    def _newest_step(trainer: Trainer) -> int:
        """As Lightning has it for values of an epoch: the step of its last batch."""
        return max(0, batches_that_stepped(trainer) - 1)

    def _measure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        targets: list[Target],
        optimizer_step: int,
    ) -> None:
        sample = Sample(trainer, self.max_samples, self.seed)
        found: dict[str, _Found] = {}
        self._cut.clear()
        with (
            undisturbed(pl_module, self.seed, sample.sources),
            self._progress(trainer, sample, targets) as advance,
        ):
            for block in self._blocks(targets):
                streams = self._gather(trainer, pl_module, sample, block, advance)
                found.update(self._describe(block, streams))
        if trainer.is_global_zero:
            self._publish(trainer, sample, found, optimizer_step)

    def _blocks(self, targets: list[Target]) -> list[list[Target]]:
        """Targets whose covariances fit into memory together."""
        blocks: list[list[Target]] = [[]]
        held = 0
        for target in targets:
            need = covariance_bytes(self._readers[target.weight][0])
            if held + need > BLOCK_BYTES and blocks[-1]:
                blocks.append([])
                held = 0
            blocks[-1].append(target)
            held += need
        return blocks

    def _gather(
        self,
        trainer: Trainer,
        module: LightningModule,
        sample: Sample,
        targets: list[Target],
        advance: Callable[[], None],
    ) -> list[Covariance]:
        """Mean and covariance of the targets' input rows, over the whole sample and all ranks."""
        assert self._tried is not None
        streams = [
            Covariance(*row_shape(self._readers[t.weight][0]), module.device) for t in targets
        ]
        of_layer: dict[nn.Module, list[tuple[Covariance, int]]] = {}
        for target, stream in zip(targets, streams, strict=True):
            layers = self._readers[target.weight]
            calls = sum(self._tried[layer].calls for layer in layers if layer in self._tried)
            for layer in layers:
                of_layer.setdefault(layer, []).append((stream, max(1, calls)))
        quantiles: Tensor | None = None

        def look(layer: nn.Module, args: Any, kwargs: Any) -> None:
            if quantiles is None:
                return
            rows = InputRows(layer, _input_of(args, kwargs))
            for stream, calls in of_layer[layer]:
                each = max(
                    1, quantiles.shape[1] // calls
                )  # a layer that is called several times takes fewer rows of each call
                chosen = spread_rows(rows.count, quantiles[:, :each].flatten())
                if len(chosen) < rows.count:
                    self._cut.add(layer)
                for part in chosen.split(rows.at_once):  # type: ignore[no-untyped-call]
                    stream.add(rows.take(part))

        with _watching(of_layer, look):
            for number, batch in sample.share(trainer.global_rank, trainer.world_size):
                quantiles = None if number is None else sample.quantiles[number]
                self._run(trainer, module, batch, sample.seed_of(number))
                advance()
        if trainer.world_size > 1:
            for stream in streams:
                stream.merge(dist.all_reduce)
        return streams

    def _run(self, trainer: Trainer, module: LightningModule, batch: Any, seed: int = 0) -> None:
        """Transfer a batch and call the model as in training."""
        seed_everything(seed, module.device)  # augmentation on the device
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.strategy.batch_to_device(before_batch_transfer(module, batch))
        with trainer.precision_plugin.forward_context():
            self.call_model(module, batch)

    def _describe(self, targets: list[Target], streams: list[Covariance]) -> dict[str, _Found]:
        """The numbers of each layer; where there are several ranks, each works out its share of the
        layers."""
        rank, world = (
            (dist.get_rank(), dist.get_world_size())
            if dist.is_available() and dist.is_initialized()
            else (0, 1)
        )
        table = streams[0].mean.new_zeros(len(targets), _Found.WIDTH)
        for i, (target, stream) in enumerate(zip(targets, streams, strict=True)):
            weight: Any = target.weight.detach()
            whole = (
                weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            )  # every rank takes part
            if i % world == rank and stream.count:
                filters = filters_of(self._readers[target.weight][0], whole).to(table)
                table[i] = self._numbers(filters, stream, self._labels[target.name]).to(table)
        if world > 1:
            dist.all_reduce(table)
        return {
            t.name: _Found(t, s.count, row)
            for t, s, row in zip(targets, streams, table.tolist(), strict=True)
            if s.count
        }

    def _numbers(self, filters: Tensor, stream: Covariance, labels: Tensor) -> Tensor:
        covariance = stream.covariance()
        if not bool(torch.isfinite(covariance).all() & torch.isfinite(filters).all()):
            return torch.full((_Found.WIDTH,), nan, dtype=torch.float64, device="cpu")
        span = input_span(filters, covariance, stream.mean, self.energy)
        shares = vector_shares(span, labels)
        rotated = span.rotated if span.rotated is not None else filters[:0]
        shapes = [generalized_gaussian_shape(x, method=self.method) for x in (rotated, filters)]
        sizes = [
            torch.nan_to_num(x / filters.square().mean().sqrt()).clamp(-REACH, REACH)
            for x in (rotated, filters)
        ]
        # On the host: on a GPU it is not deterministic, which a Trainer may have been told to be.
        histograms = [torch.histc(x.float().cpu(), BINS, -REACH, REACH) for x in sizes]
        numbers = torch.tensor(
            [float(shares.nanmean()), float(span.rank.double().mean()), *shapes],
            dtype=torch.float64,
            device="cpu",
        )
        return torch.cat([numbers, *(h.double() for h in histograms)])

    @contextmanager
    def _progress(
        self, trainer: Trainer, sample: Sample, targets: list[Target]
    ) -> Iterator[Callable[[], None]]:
        """A bar on rank zero's terminal, where the Trainer shows one too."""
        bar, rounds = (
            trainer.progress_bar_callback,
            sample.rounds(trainer.world_size) * len(self._blocks(targets)),
        )
        if bar is None or not trainer.is_global_zero or not sys.stderr.isatty():
            yield lambda: None
        elif isinstance(bar, RichProgressBar):  # it owns the screen
            bar.print(
                f"lightning-normdyn: inputs of {len(targets)} weights over {sample.count} examples"
            )
            yield lambda: None
        else:
            with Tqdm(
                total=rounds,
                desc=f"Inputs of {len(targets)} weights",
                leave=False,
                dynamic_ncols=True,
            ) as shown:
                yield lambda: shown.update() and None

    def _publish(
        self, trainer: Trainer, sample: Sample, found: dict[str, _Found], optimizer_step: int
    ) -> None:
        """Rank zero: into the history and the loggers."""
        step = self._newest_step(trainer)
        broken = [name for name, f in found.items() if not isfinite(f.numbers[1])]
        row = {
            f"{quantity}/{name}": value
            for name, f in found.items()
            for quantity, value in f.values().items()
            if isfinite(value)
            or name
            # NaN where a run has diverged; what is undefined (constant inputs) is left out
            in broken
        }
        if broken:
            warn_once(
                f"InputSpanMonitor: inputs or weights of {', '.join(broken[:4])} are not finite at "
                f"step {step}; NaN is logged for them."
            )
        few = [
            f"`{name}` ({f.rows} for {row_shape(layers[0])[1]} entries)"
            for name, f in found.items()
            for layers in [self._readers[f.target.weight]]
            if f.rows <= row_shape(layers[0])[1]
            and not (sample.whole and self._cut.isdisjoint(layers))
        ]
        if few and not len(self.history):
            rank_zero_info(
                f"InputSpanMonitor took fewer rows than a filter has entries of "
                f"{', '.join(few[:4])}{' and more' if len(few) > 4 else ''}: "
                "their inputs may vary in more directions than so few rows show. Raise "
                "`max_samples`."
            )
        # Aside, and then in one go: a signal handler may save a checkpoint at any moment.
        history = self.history.fork()
        newest = history.newest_step
        if newest is not None and newest > step:
            warn_once(
                f"InputSpanMonitor's history reaches to step {newest}, and this fit counts from an "
                f"earlier one, because its loops were not "
                f"restored with the weights. Rows from step {step} on are dropped."
            )
            history.truncate_after(step - 1)
        history.append(step, row, optimizer_step=optimizer_step)
        histograms = {
            key: np.asarray(v)
            for name, f in found.items()
            for key, v in f.histograms(name).items()
            if name not in broken
        }
        history.append_vectors(step, histograms)
        history.meta = {**history.meta, **self._meta(sample, found)}
        self.history.show(history)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)

    def _meta(self, sample: Sample, found: dict[str, _Found]) -> dict[str, Any]:
        targets = {
            name: {
                "shape": list(f.target.verdict.shape),
                "scale_invariant": f.target.verdict.kind,
                "vectors": f.target.partition.n,
                "rows": f.rows,
            }
            for name, f in found.items()
        }
        return {
            "targets": targets,
            "settings": self.settings(),
            "examples": sample.count,
            "histogram_reach": REACH,
        }

    def _extra(self) -> dict[str, Any]:
        return {"history": self.history.state_dict()}

    def _check_extra(self, extra: Any, where: str) -> None:
        if "history" in extra:
            check_history(extra["history"], f"{where}.history")

    def _load_extra(self, extra: dict[str, Any]) -> None:
        if "history" in extra:
            self.history.load_state_dict(extra["history"])


@dataclass
class _Trial:
    """What one call of the model did with a layer."""

    calls: int = 0
    obstacle: str | None = None


@dataclass
class _Found:
    """The numbers of one layer."""

    target: Target
    rows: int
    numbers: Sequence[float]

    WIDTH: ClassVar[int] = 4 + 2 * BINS

    def values(self) -> dict[str, float]:
        energy, rank, rotated, as_is = self.numbers[:4]
        return dict(zip(QUANTITIES, (energy, 1 - energy, rank, rotated, as_is), strict=True))

    def histograms(self, name: str) -> dict[str, Sequence[float]]:
        counts = {
            "histogram_input": self.numbers[4 : 4 + BINS],
            "histogram_parameter": self.numbers[4 + BINS :],
        }
        return {f"{kind}/{name}": values for kind, values in counts.items() if sum(values)}


@contextmanager
def _watching(layers: Any, look: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    """Call ``look`` before each of the layers runs."""
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_of(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs.get("input")
