"""The monitor: norms, effective learning rates and angular updates of every weight, in the loggers
and in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite, nan
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.arguments import check_count
from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.engine.legacy import LegacyCallback
from lightning_normdyn.engine.lightning_facts import log_every
from lightning_normdyn.engine.messages import show, warn_once
from lightning_normdyn.engine.plan import Plan
from lightning_normdyn.engine.state import seal
from lightning_normdyn.engine.target import Target
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.histograms import PACKED, Histogram, bin_vectors, unpack
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.ledger import Ledger, Norms, Row, whole_number
from lightning_normdyn.monitor.loggers import (
    HistoryFiles,
    Outcome,
    can_show_histograms,
    publish_about,
    publish_alert,
    publish_history,
    publish_outcome,
    publish_row,
    publish_to_trainer,
    told_to_trainer,
)
from lightning_normdyn.monitor.predictions import (
    Course,
    Dying,
    entries_of_dying,
    falls_ever_faster,
    idle_decay,
    judge,
    least_of,
    log_smallest,
    predict,
    steps_to_collapse,
    steps_until_overflow,
    urgency,
)
from lightning_normdyn.monitor.quantities import QUANTITIES, monitored, to_measure
from lightning_normdyn.monitor.spawned import KeepsHistory
from lightning_normdyn.monitor.step_sums import StepSums
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.group_numbers import with_plain_numbers
from lightning_normdyn.optimizers.host_copy import HostCopy
from lightning_normdyn.optimizers.rate import applied_rate
from lightning_normdyn.optimizers.recognition import class_for_predictions
from lightning_normdyn.optimizers.step import Phase, Step
from lightning_normdyn.optimizers.step_response import step_response
from lightning_normdyn.parametrizations import is_weight_standardized
from lightning_normdyn.tables import paragraph, render

# Measured for the predictions and the warnings, not logged.
INTERNAL = ("lr", "gradient_scale", "dead", "dead_rate", "urgency")
# Optimizer steps without any gradient after which a vector counts as dead, and how many of them one
# look may vouch for.
DEAD_AFTER, VOUCHED = 75, 25
COLLAPSE = "Weights collapse"
DIVERGED = "Weights are not finite"
# A learning rate that was constant and is this much lower at the next record has dropped; a
# schedule that glides never does.
LR_DROP = 1.5
# A vector this much shorter than the mean of its weight has collapsed.
COLLAPSED = 1e-3


@dataclass
class _Measured:
    """What one optimizer's step gave for each vector, still on the device and on the rank that
    holds it."""

    plan: Plan
    step: int
    optimizer_step: int
    quantities: list[str]
    due: bool  # or measured only because the fit may end here
    overdue: (
        bool  # due because of a logging step, and not as the first step of the fit: loggers get it
    )
    # (2 quantities + 1, n): what to sum over vectors, whether it counts, and the size with 0 for
    # what is not finite
    values: Tensor
    size: Tensor
    active: Tensor | None
    binned: Tensor | None  # (quantities with histograms, n), if there are to be any
    kept: Tensor | None  # (2, n): norm and applied decay, if the history keeps vectors
    skipped: Tensor
    groups: list[dict[str, Any]]  # hyperparameters of each target's group at this very step

    def reduce(self) -> Tensor:
        """All that goes to the host, over the vectors of all ranks: sums and counts, collapsed
        vectors, histograms, whether skipped.

        Every rank must call it. Two small collectives, and two more for histograms; none where
        every rank holds all vectors.
        """
        vectors = self.plan.vectors
        *totals, sizes = vectors.totals(self.values)
        collapsed = self.size < COLLAPSED * vectors.spread(sizes / vectors.count)
        if self.active is not None:
            collapsed &= self.active
        histograms = [] if self.binned is None else [bin_vectors(vectors, self.binned).flatten()]
        return torch.cat(
            [*totals, vectors.totals(collapsed.to(sizes.dtype)), *histograms, self.skipped]
        )


@dataclass
class _Sent:
    """What was measured in one batch, on its way to the host."""

    results: list[_Measured]
    sizes: list[
        int
    ]  # how many of the numbers belong to each result; the rest is the number of clamped vectors
    numbers: HostCopy
    vectors: list[dict[str, Any]]  # what the history keeps of each result's vectors
    events: tuple[str, ...]  # what happened since the results before these
    marked: dict[tuple[int, int, str], int]  # how often it had happened by then
    skipped_steps: int
    shown: bool  # whether loggers get it


@dataclass
class _Published:
    """What became of results that were sent: all of it worked out before anything is changed.

    Args:
        ledger: the one that takes the place of the ledger there is.
        row: the numbers by log key; None if the device skipped every update.
        histograms: by log key.
        step: the x axis.
        concerns: warnings to give, each as a function to call.
    """

    ledger: Ledger
    row: dict[str, float] | None
    histograms: dict[str, Histogram]
    step: int
    concerns: list[Callable[[], None]]


class NormDynamicsMonitor(LegacyCallback, KeepsHistory):
    r"""Logs norm, effective learning rate, angular update and their relatives for every weight, and
    prints what came of them.

    One ``log_metrics`` call per logging step and logger. Keys are ``<quantity>/<parameter name>``,
    averaged over the weight's vectors, and ``normdyn/<quantity>`` over all scale-invariant vectors.
    `lightning_normdyn.monitor.quantities` is the table of all quantities, with their formulas and
    averages; `markdown_table` there prints it.

    Under SGD the direction follows ``direction_lr``; under Adam-like optimizers it follows
    ``effective_lr``.

    An optimizer that does not step at a logging step (the generator of a GAN, manual accumulation)
    is measured at its next real step. Of
    an optimizer that steps several times within one batch, the first of these steps is measured. A
    row's ``optimizer_step`` is the number
    of the measured step; of several optimizers in one row, that of the first. Where weights or
    gradients are not finite, the numbers that
    rest on them are NaN.

    At the end of a fit W&B gets a table of the layers, a chart per main quantity and pictures
    (``normdyn_tables``, ``normdyn_charts``,
    ``normdyn_pictures``), TensorBoard and MLflow get the table and the pictures, and CSV gets the
    pictures beside ``metrics.csv``. The
    history lies beside each of them as ``history.npz``, which ``python -m lightning_normdyn
    report`` reads; on a disk or at a URL
    (``s3://``). It is written at every checkpoint and when a fit is interrupted, too; a second fit
    of the same run writes
    ``history.fit2.npz``. Pictures need matplotlib.

    Args:
        every_n_steps: logging steps as the Trainer counts them; None: the Trainer's
            ``log_every_n_steps``.
        quantities: e.g. ``["effective_lr", "angular_update"]``, names out of the table (a wrong one
            is answered with all of them);
            None: all that apply.
        per_vector: also keep every vector's norm and applied decay in `history`, as float32; of
            float64 weights also what float32 leaves of
            the norm (``weight_norm_rest``).
        histograms: also send histograms over vectors to W&B and TensorBoard:
            ``weight_norm_histogram/<parameter name>`` and
            ``angular_update_histogram/<parameter name>``.
        tables: print the tables at the start and the end of a fit.
        alert: send W&B alerts for weights that collapse.
        params: ``"auto"`` (every weight of two or more dimensions that an optimizer owns, but for
            gains, whose rows are single numbers), a
            glob pattern, or a list of them.
        granularity: ``"auto"``, ``"filter"``, ``"group"`` or ``"layer"``.

    Attributes:
        history: the same rows in memory, on rank zero, logger or not
            (`lightning_normdyn.monitor.history.History`). From a GPU a row arrives,
            here and in the loggers, one batch later, under its own step; at an epoch's end and in a
            checkpoint all are there.

    Raises:
        ValueError: for numbers out of range and unknown quantities.

    Example:
        >>> from lightning_normdyn import NormDynamicsMonitor
        >>> NormDynamicsMonitor(50, quantities=["effective_lr", "angular_update"]).every_n_steps
        50
    """

    writes: ClassVar[bool] = False

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        quantities: list[str] | None = None,
        per_vector: bool = False,
        histograms: bool = False,
        tables: bool = True,
        alert: bool = False,
        params: str | list[str] = "auto",
        granularity: Literal["auto", "filter", "group", "layer"] = "auto",
    ) -> None:
        super().__init__(params, granularity)
        known = [quantity.name for quantity in monitored()]
        if quantities is not None and not (quantities and set(quantities) <= set(known)):
            raise ValueError(
                f"`quantities` must be None or names out of {known}, got {quantities!r}."
            )
        self.every_n_steps = (
            None
            if every_n_steps is None
            else check_count("every_n_steps", every_n_steps, 1, "None or ")
        )
        self.quantities = None if quantities is None else list(quantities)
        self.per_vector_history = per_vector
        self.histograms = histograms
        self.tables = tables
        self.alert = alert
        KeepsHistory.__init__(self)

    def _forget(self) -> None:
        super()._forget()
        self._off = False
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._spare: dict[int, Tensor] = {}  # memory for the values of the next logging step
        self._due_now: dict[
            int, tuple[bool, bool]
        ] = {}  # by optimizer: `due` and `overdue` of the step that is being measured
        # Replaced as a whole, so that a signal handler's checkpoint finds the state before a row or
        # the one after it.
        self._ledger = Ledger.new(separate=False)
        self._position: list[int] | None = None  # of the checkpoint that this fit goes on from
        self._begun_at: int | None = None  # x of the first batch of this fit
        self._taken_up = False  # whether the ledger holds what `_restored` says
        self._skipped_before = 0  # steps skipped before the checkpoint
        self._standardized: dict[int, Tensor | None] = {}
        self._quantities: dict[int, list[str]] = {}
        self._effects: dict[str, Effects] = {}
        self._length: dict[str, int] = {}
        # Alpha of AdaptiveWeightShrink, NaN where it does not act, and where it goes by the std.
        self._shrinks: dict[int, tuple[Tensor, Tensor]] = {}
        self._needs_exact: dict[int, bool] = {}
        self._log_smallest: dict[int, Tensor] = {}
        self._dead: dict[int, tuple[int, Tensor]] = {}
        self._to_fall: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # whether a vector is dead, and the e-foldings that it has left
        self._reported: set[tuple[str, str]] = set()
        self._unknown_rates: set[str] = set()
        self._told = 0  # how many targets the loggers know of
        self._files: HistoryFiles | None = (
            None  # where this fit's history lies, once it has been written
        )
        self._ended = False  # whether the fit is over, and all has been written
        self._continued = False  # whether the history came from a checkpoint

    @property
    def shows_tables(self) -> bool:
        """Whether this callback wants the tables printed."""
        return self.tables

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {"every_n_steps": self.every_n_steps, "quantities": self.quantities}

    def handlers(self) -> dict[Phase, Callable[[Step, Plan], None]]:
        """Measures before and after the step."""
        return {Phase.MEASURE: self._measure_weight, Phase.MEASURE_STEP: self._measure_step}

    def on_plan(self, plan: Plan, bracket: StepBracket) -> None:
        """What applies to which weights depends on the other callbacks' plans too, so it is worked
        out when all have been made."""
        self._quantities.pop(plan.index, None)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the callbacks do may change from epoch to epoch (WRS in its window)."""
        for plan in self.plans.values():
            self._read_effects(plan)

    def _read_effects(self, plan: Plan) -> None:
        assert self._session is not None
        effects = self._session.combined.effects(plan.targets, besides=self)
        self._effects.update(
            {t.name: found for t, found in zip(plan.targets, effects, strict=True)}
        )
        shrinks = [effect.shrink for effect in effects]
        alphas = [nan if shrink is None else shrink.alpha for shrink in shrinks]
        by_std = [shrink is not None and shrink.statistic == "std" for shrink in shrinks]
        vectors = plan.vectors
        self._shrinks[plan.index] = (
            vectors.spread(torch.tensor(alphas, dtype=vectors.sum_dtype, device=vectors.device)),
            vectors.spread(torch.tensor(by_std, dtype=torch.bool, device=vectors.device)),
        )

    def _prepare(self, plan: Plan) -> None:
        """Which quantities apply to which weights."""
        assert self._session is not None
        module, vectors = self._session.module, plan.vectors
        standardized = [is_weight_standardized(module, t.name) for t in plan.targets]
        by_target = vectors.spread(
            torch.tensor(standardized, device=vectors.device, dtype=torch.bool)
        )
        self._standardized[plan.index] = by_target if any(standardized) else None
        self._say_unknown_rate(plan)
        self._read_effects(plan)
        shrunk = any(self._effects[t.name].shrink is not None for t in plan.targets)
        wanted = to_measure(self.quantities, standardized=any(standardized), shrunk=shrunk)
        # A shrink just before the step may be as small as 1e-7, and a mean much larger than the
        # standard deviation beside it: more than
        # sums in float32 can tell. And a replay compares its own norms with those kept.
        self._needs_exact[plan.index] = (
            shrunk
            or any(standardized)
            or any(QUANTITIES[name].exact for name in wanted)
            or self.per_vector_history
        )
        # Predictions and verdicts rest on the norm, the angle, and the present strength of AWS.
        needed = ["weight_norm", "angular_update", *(["equivalent_weight_decay"] if shrunk else [])]
        self._quantities[plan.index] = list(dict.fromkeys([*wanted, *needed]))
        smallest = [log_smallest(t.weight.dtype) for t in plan.targets]
        self._log_smallest[plan.index] = vectors.spread(
            torch.tensor(smallest, dtype=vectors.sum_dtype, device=vectors.device)
        )
        self._dead[plan.index] = (
            0,
            torch.zeros(vectors.n, dtype=vectors.sum_dtype, device=vectors.device),
        )
        for target in plan.targets:
            members = int(
                target.partition.lengths(
                    self._session.weights.shapes[target.weight], target.verdict.read
                ).sum()
            )
            self._length[target.name] = max(1, members // max(1, target.partition.n))

    def _say_unknown_rate(self, plan: Plan) -> None:
        """Whoever misses a curve must find out why it is not there."""
        groups = plan.groups_of(plan.targets)
        if all(
            applied_rate(plan.optimizer, g, t.weight) is not None
            for g, t in zip(groups, plan.targets, strict=True)
        ):
            return
        name = type(plan.optimizer).__name__
        if name not in self._unknown_rates:
            self._unknown_rates.add(name)
            warn_once(
                f"The learning rate that {name} applies in its next step cannot be told from its "
                f"param groups and its state. Until it can "
                "be, effective_lr, direction_lr and predictions are left out for its weights; "
                "norms and angles are measured."
            )

    # -- measuring
    # -----------------------------------------------------------------------------------------------------

    @property
    def _every(self) -> int:
        """Batches that step from one logging step to the next; 0: there are none."""
        assert self._session is not None
        return (
            log_every(self._session.trainer) if self.every_n_steps is None else self.every_n_steps
        )

    def _look_for(self, step: Step, plan: Plan) -> tuple[bool, bool] | None:
        """Whether this step is to be measured: None, or `_Measured.due` and `_Measured.overdue`."""
        assert self._session is not None
        if self._off:
            return None
        trainer, now, number = (
            self._session.trainer,
            self._session.clock.now,
            self.number(step, plan),
        )
        if self._begun_at is None:
            self._begun_at = now
        ledger = self._ledger
        newest = ledger.measured.get(plan.index)
        for result in [*(r for sent in ledger.sent for r in sent.results), *ledger.results]:
            if result.plan.index != plan.index or result.optimizer_step == number:
                # of the same number: the device skipped that update, or it raised, and this is the
                # same step again
                continue
            if result.step == now:
                return None  # a row holds one step of each optimizer
            if result.due:
                newest = result.step
        # The last logging step up to now. An optimizer that was not measured at it or since is due,
        # whenever it steps next.
        logging_step = (now + 1) // self._every * self._every - 1 if self._every else -1
        overdue = (self._begun_at - 1 if newest is None else newest) < logging_step
        due = overdue or newest is None
        return (due, overdue) if due or trainer.should_stop or self._is_last(trainer) else None

    @staticmethod
    def _is_last(trainer: Trainer) -> bool:
        by_steps = (
            trainer.max_steps != -1
            and trainer.global_step + len(trainer.optimizers) >= trainer.max_steps
        )
        by_epochs = (
            trainer.max_epochs is not None
            and trainer.current_epoch + 1 == trainer.max_epochs
            and trainer.is_last_batch
        )
        return bool(by_steps or by_epochs)

    def _measure_weight(self, step: Step, plan: Plan) -> None:
        self._sums.pop(plan.index, None)  # of a step that raised
        look = self._look_for(step, plan)
        if look is None:
            return
        self._due_now[plan.index] = look
        if plan.index not in self._quantities:
            self._prepare(plan)
        vectors = plan.vectors
        weights, gradients = vectors.values(), vectors.gradients()
        pairs = (weights, weights), (weights, gradients), (gradients, gradients), (weights, None)
        exact = self._needs_exact[plan.index]
        # Where nothing changes the weights from here to the snapshot, that has the same norms, and
        # a CPU can take it in the same pass.
        unchanged = not exact and not step.bracket.acts_between(Phase.MEASURE, Phase.SNAPSHOT)
        early = (
            unchanged and vectors.device.type == "cpu"
        )  # elsewhere one kernel copies all weights
        copy = (weights, step.bracket.early_snapshot(vectors.storages())) if early else None
        ww, wg, gg, *w1 = vectors.inner(*pairs[: 4 if exact else 3], exact=exact, copy=copy)
        scale = getattr(step.optimizer, "grad_scale", None)
        if scale is not None:  # a fused optimizer unscales the gradients inside its kernel
            wg, gg = wg / scale.to(wg), gg / scale.to(gg) ** 2
        lr = plan.rates().clone()
        self._sums[plan.index] = sums = {"ww": ww, "wg": wg, "gg": gg, "lr": lr}
        if w1:
            sums["w1"] = w1[0]
        if unchanged:
            sums["norms"] = ww.sqrt()
        if not early:
            step.bracket.request_snapshot(vectors.storages())

    def _measure_step(self, step: Step, plan: Plan) -> None:
        sums = self._sums.pop(plan.index, None)
        if sums is None:
            return
        assert self._session is not None
        vectors = plan.vectors
        before, exact = vectors.snapshots(step.bracket), self._needs_exact[plan.index]
        ss, sd, dd = vectors.displacement(before, exact=exact, norms=sums.get("norms"))
        step_sums = self._step_sums(plan, sums, ss, sd, dd)
        names = self._quantities[plan.index]
        values = self._judged(plan, step_sums, self.number(step, plan))
        for name in names:
            formula = QUANTITIES[name].formula
            assert formula is not None
            values[name] = formula(step_sums)
        wanted = [*names, *INTERNAL]
        active = plan.active(step)
        diverged = torch.isfinite(step_sums.ww + step_sums.gg + ss + dd).logical_not_()
        measured = self._pack(
            [values[name] for name in wanted],
            step_sums.size,
            diverged.to(ss.dtype),
            active,
            self._spare.pop(plan.index, None),
        )
        for i, name in enumerate(names):
            if QUANTITIES[name].average == "rms":
                measured[i].square_()
        skipped = (
            measured.new_zeros(1)
            if step.skipped is None
            else step.skipped.to(measured.dtype).reshape(1)
        )
        trainer = self._session.trainer
        now, number = self._session.clock.now, self.number(step, plan)
        due, overdue = self._due_now.pop(plan.index)
        binned = None
        if self.histograms and self._binned(names) and can_show_histograms(trainer.loggers):
            binned = torch.stack([values[name] for name in self._binned(names)])
            binned = binned if active is None else torch.where(active, binned, float("nan"))
        kept = None
        if self.per_vector_history:
            decay = self._session.combined.applied_decay(plan, step, step_sums.norm, step_sums.std)
            kept = torch.stack([step_sums.norm, decay])
        # A copy of each group: a schedule may have moved on when this is read.
        copies = {
            id(group): with_plain_numbers({k: v for k, v in group.items() if k != "params"})
            for group, _ in plan.groups
        }
        groups = [copies[id(group)] for group in plan.groups_of(plan.targets)]
        result = _Measured(
            plan,
            now,
            number,
            wanted,
            due,
            overdue,
            measured,
            step_sums.size,
            active,
            binned,
            kept,
            skipped,
            groups,
        )
        # The same step again (a fused optimizer's update that was skipped, tried once more within a
        # batch) takes the place of the first.
        others = [r for r in self._ledger.results if r.plan.index != plan.index]
        self._ledger = replace(self._ledger, results=(*others, result))

    @staticmethod
    def _pack(
        values: list[Tensor],
        size: Tensor,
        diverged: Tensor,
        active: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        """What is to be summed over vectors, in one tensor; ``out`` is used again if it fits.

        A number that is not finite is left out (the effective learning rate of a vector of length 0
        is undefined), but not where the
        weight or its gradient is not finite either: there the mean over the vectors is not finite,
        and shall say so.
        """
        count = len(values)
        if out is None or out.shape != (2 * count + 1, len(size)):
            out = size.new_empty(2 * count + 1, len(size))
        numbers, counts = out[:count], out[count : 2 * count]
        torch.stack(values, out=numbers)
        torch.mul(numbers, 0, out=counts).eq_(
            0
        )  # 1 where a number is finite: 0 times infinity is none
        torch.maximum(counts, diverged, out=counts)
        if active is not None:
            counts.mul_(active)
        numbers.masked_fill_(counts == 0, 0.0)
        out[-1] = size  # an infinite length elsewhere must not make all the others look short
        out[-1].nan_to_num_(0.0, 0.0, 0.0)
        return out

    @staticmethod
    def _binned(names: list[str]) -> list[str]:
        """The measured quantities of which there are histograms."""
        return [name for name in names if QUANTITIES[name].histogram]

    def _step_sums(
        self, plan: Plan, sums: dict[str, Tensor], ss: Tensor, sd: Tensor, dd: Tensor
    ) -> StepSums:
        vectors = plan.vectors
        alpha, alpha_of_std = self._shrinks[plan.index]
        return StepSums(
            lr=sums["lr"],
            ww=sums["ww"],
            wg=sums["wg"],
            gg=sums["gg"],
            ss=ss,
            sd=sd,
            dd=dd,
            ones_w=sums.get("w1"),
            entries=vectors.length,
            standardized=self._standardized[plan.index],
            alpha=alpha,
            alpha_of_std=alpha_of_std,
        )

    def _judged(self, plan: Plan, sums: StepSums, number: int) -> dict[str, Tensor]:
        """What predictions and warnings rest on and no logger gets, by name."""
        radial = sums.radial_change
        last, dead = self._dead[plan.index]
        passed = max(0, min(number - last, VOUCHED))
        dead = torch.where((sums.gg == 0) & (radial < 0), dead + passed, torch.zeros_like(dead))
        self._dead[plan.index] = (number, dead)
        none, rate, left = (
            torch.zeros_like(dead),
            -torch.log1p(radial),
            sums.size.log() - self._log_smallest[plan.index],
        )
        is_dead = (dead >= DEAD_AFTER) | (
            (dead >= 3) & (left < DEAD_AFTER * rate)
        )  # or it would be over before we are sure
        self._to_fall[plan.index] = is_dead, left
        return {
            "lr": sums.lr,
            "gradient_scale": sums.gg * sums.ww,
            "dead": is_dead.to(sums.norm.dtype),
            "dead_rate": torch.where(is_dead, rate, none),
            "urgency": torch.where(is_dead, urgency(left), none),
        }

    def _vectors_of(self, plan: Plan, kept: Tensor) -> dict[str, Any]:
        """Every vector's norm and applied decay, for ridge plots and for EffectiveLRReplay.

        Empty but on rank zero; every rank must call it.
        """
        assert self._session is not None
        gathered = plan.vectors.gather(kept)
        if not self._session.trainer.is_global_zero:
            return {}
        rows: dict[str, Any] = {}
        for target, values in zip(plan.targets, gathered, strict=True):
            rows[f"weight_norm/{target.name}"], rows[f"decay/{target.name}"] = (
                values.float().cpu().numpy()
            )
            if target.weight.dtype == torch.float64:
                # What float32 leaves of the norm: an experiment in float64 is to be followed as
                # closely as training allows.
                rows[f"weight_norm_rest/{target.name}"] = (
                    (values[0] - values[0].float()).float().cpu().numpy()
                )
        return rows

    # -- publishing
    # ----------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Send what was measured in this batch to the host, and publish it when it is there: from a
        GPU one batch later."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._receive(trainer)
        results = self._ledger.results
        if results:
            sent = self._send(results)
            self._ledger = replace(self._ledger, results=(), sent=(sent,))
            # An accelerator's allocator keeps what is freed, and there others can use it until the
            # next logging step.
            self._spare = {r.plan.index: r.values for r in results if r.values.device.type == "cpu"}
            # Publishing takes collectives, so what decides must be the same on every rank: never
            # whether it has arrived by now.
            if not sent.numbers.arrives_later:
                self._receive(trainer)
            self._publish_about(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish what is still on its way."""
        self._receive(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def _send(self, results: tuple[_Measured, ...]) -> _Sent:
        """One transfer to the host for all optimizers of this batch. Changes nothing; every rank
        must call it."""
        assert self._session is not None
        clamped = self._session.combined.counted("clamped")
        vectors = [{} if r.kept is None else self._vectors_of(r.plan, r.kept) for r in results]
        packed = [r.reduce() for r in results]
        sizes = [p.numel() for p in packed]
        numbers = HostCopy(
            torch.cat([p.to(packed[0]) for p in [*packed, *([] if clamped is None else [clamped])]])
        )
        shown = bool(self._every) and (
            any(r.overdue for r in results) or self._session.trainer.should_stop
        )
        marked = self._session.combined.events()
        events = self._new_events(self._ledger, marked)
        skipped = self._skipped_before + self._session.attempts.skipped()
        return _Sent(list(results), sizes, numbers, vectors, events, marked, skipped, shown)

    @staticmethod
    def _new_events(ledger: Ledger, counts: dict[tuple[int, int, str], int]) -> tuple[str, ...]:
        """Kinds of what happened since the newest results that were sent."""
        known = ledger.sent[-1].marked if ledger.sent else ledger.marked
        kinds = [key[-1] for key, count in counts.items() if count > known.get(key, 0)]
        return tuple(dict.fromkeys(kinds))

    def _receive(self, trainer: Trainer) -> None:
        """Publish what is on its way, in order."""
        while self._ledger.sent:
            sent, *others = self._ledger.sent
            published = self._published(self._ledger, sent)
            is_first = not len(self.history)
            self._ledger = replace(published.ledger, sent=tuple(others))
            self.history.show(published.ledger.history)
            for warn in published.concerns:
                warn()
            if published.row is None:
                continue
            if trainer.is_global_zero:
                if is_first and self.tables:
                    self._say_idle_decay(trainer)
                if sent.shown:
                    shown = {
                        key: value for key, value in published.row.items() if self._asked_for(key)
                    }
                    publish_row(trainer.loggers, shown, published.histograms, published.step)
            publish_to_trainer(trainer, published.row)

    def _published(self, ledger: Ledger, sent: _Sent) -> _Published:
        """What becomes of results once their numbers are here. Changes nothing."""
        lasting = ledger.lasting
        due = [result.due for result in sent.results]
        if all(due):
            return self._with_row(lasting, sent, due)
        # Measured only because the fit may end here: if it goes on, or is resumed, the row is one
        # without these results.
        without = self._with_row(lasting, sent, due).ledger
        return self._with_row(lasting, sent, [True] * len(due), without)

    def _with_row(
        self, ledger: Ledger, sent: _Sent, chosen: list[bool], without: Ledger | None = None
    ) -> _Published:
        """`_published` for some of the results; with ``without`` as what lasts of them."""
        assert self._session is not None
        trainer = self._session.trainer
        row: dict[str, float] = {}
        histograms: dict[str, Histogram] = {}
        concerns: list[Callable[[], None]] = []
        overview: dict[str, list[float]] = {}  # over all scale-invariant vectors: sum and count
        predicted = measured = number = collapsed = (
            0.0  # squared angles and their count, of the vectors for which there is a prediction
        )
        dropped, step, optimizer_step = False, sent.results[0].step, 0
        courses, norms, rates = dict(ledger.courses), dict(ledger.norms), dict(ledger.rates)
        measured_at, counted, vectors = dict(ledger.measured), dict(ledger.counted), {}
        not_finite: list[str] = []
        numbers = sent.numbers.get().tolist()
        for result, size, mine_is_chosen, kept in zip(
            sent.results, sent.sizes, chosen, sent.vectors, strict=True
        ):
            mine, numbers = numbers[:size], numbers[size:]
            if not mine_is_chosen or mine[-1]:
                continue  # a fused optimizer skipped this update inside its kernel
            optimizer_step = optimizer_step or result.optimizer_step
            counted[result.plan.index] = result.optimizer_step
            if result.due:
                measured_at[result.plan.index] = step
            vectors.update(kept)
            kinds, width = result.quantities, len(result.plan.targets)
            if result.binned is not None:
                histograms.update(self._histograms(result, mine[(2 * len(kinds) + 1) * width : -1]))
            totals, counts = np.array(mine[: 2 * len(kinds) * width]).reshape(2, len(kinds), width)
            columns = zip(totals.T.tolist(), counts.T.tolist(), strict=True)
            for j, (target, group, column) in enumerate(
                zip(result.plan.targets, result.groups, columns, strict=True)
            ):
                sums = dict(zip(kinds, zip(*column, strict=True), strict=True))
                found = {
                    q: self._mean(q, total, count) for q, (total, count) in sums.items() if count
                }
                if not all(isfinite(value) for value in found.values()):
                    not_finite.append(target.name)
                course = courses.get(target.name, Course()).fork()
                if self._predict(
                    target, group, found, result.plan.optimizer, result.optimizer_step, course
                ):
                    courses[target.name] = course
                row.update({f"{q}/{target.name}": v for q, v in found.items() if q not in INTERNAL})
                norm = found.get("weight_norm")
                if norm is not None:
                    norms[target.name] = norms.get(target.name, Norms(norm)).seen_at(
                        result.optimizer_step, norm
                    )
                    concerns.append(
                        partial(self._warn_overflow, trainer, target, norms[target.name])
                    )
                if "lr" in found:
                    before = rates.get(target.name, ())
                    rates[target.name] = (*before[-1:], found["lr"])
                    dropped |= self._has_dropped(rates[target.name], before)
                if not target.scale_invariant:
                    continue
                collapsed += mine[2 * len(kinds) * width + j]
                concerns.append(partial(self._warn_dead, trainer, result.plan, target, group, sums))
                if "equilibrium_angular_update" in found:
                    total, count = sums["angular_update"]
                    predicted += found["equilibrium_angular_update"] ** 2 * count
                    measured += total
                    number += count
            pooled = [j for j, target in enumerate(result.plan.targets) if target.scale_invariant]
            for q, total, count in zip(
                kinds,
                totals[:, pooled].sum(1).tolist(),
                counts[:, pooled].sum(1).tolist(),
                strict=True,
            ):
                known = overview.setdefault(q, [0.0, 0.0])
                known[0] += total
                known[1] += count
        events = tuple(dict.fromkeys([*ledger.events, *sent.events]))
        ledger = replace(ledger, marked=sent.marked)
        if not optimizer_step:  # what happened is told with the next row
            return _Published(replace(ledger, events=events), None, {}, step, concerns)
        row.update(
            {
                f"normdyn/{q}": self._mean(q, t, n)
                for q, (t, n) in overview.items()
                if n and q not in INTERNAL
            }
        )
        if number:
            angle = QUANTITIES["angular_update"]
            row.update(
                self._from_prediction(
                    angle.mean(measured, number), angle.mean(predicted, number), "normdyn/"
                )
            )
        row["normdyn/optimizer_step"] = float(optimizer_step)
        row["normdyn/skipped_steps"] = float(sent.skipped_steps)
        row["normdyn/collapsed_vectors"] = collapsed
        if numbers:
            row["normdyn/clamped_vectors"] = numbers[-1]
        if not_finite:
            concerns.append(partial(self._warn_not_finite, trainer, not_finite, step, row))
        ledger = replace(
            ledger,
            courses=courses,
            norms=norms,
            rates=rates,
            measured=measured_at,
            counted=counted,
            events=(),
            last_step=step,
            promised={**ledger.promised, **told_to_trainer(row)},
        )
        # One who acts on drops marks them itself, at the step at which it acted.
        dropped &= not any("lr_drop" in member.rule.marks for member in self._session.members)
        events = (*events, "lr_drop") if dropped else events
        told = Row(step, optimizer_step, row, events, vectors)
        return _Published(self._recorded(ledger, told, without), row, histograms, step, concerns)

    def _recorded(self, ledger: Ledger, row: Row, without: Ledger | None = None) -> Ledger:
        """The ledger with the row, which on rank zero is in the history too; with ``without`` as
        what lasts if the run goes on."""
        assert self._session is not None
        if self._session.trainer.is_global_zero:
            ledger = ledger.with_row(row, self._asked_for)
        else:
            ledger = replace(ledger, last_step=row.step)
        return ledger if without is None else ledger.ending_with(row, without)

    @staticmethod
    def _histograms(result: _Measured, numbers: list[float]) -> dict[str, Histogram]:
        packed = iter([numbers[i : i + PACKED] for i in range(0, len(numbers), PACKED)])
        names = NormDynamicsMonitor._binned(result.quantities)
        by_quantity = unpack([[next(packed) for _ in result.plan.targets] for _ in names])
        return {
            f"{quantity}_histogram/{target.name}": histogram
            for quantity, histograms in zip(names, by_quantity, strict=True)
            for target, histogram in zip(result.plan.targets, histograms, strict=True)
            if histogram is not None
        }

    def _asked_for(self, key: str) -> bool:
        section, _, name = key.partition("/")
        quantity = name if section == "normdyn" else section
        known = QUANTITIES.get(quantity)
        is_optional = known is not None and known.scope == "both"
        return not is_optional or self.quantities is None or quantity in self.quantities

    # -- predictions and warnings
    # --------------------------------------------------------------------------------------

    def _predict(
        self,
        target: Target,
        group: dict[str, Any],
        found: dict[str, float],
        optimizer: Optimizer,
        step: int,
        course: Course,
    ) -> bool:
        """Add what this weight settles at, if it is scale-invariant and its optimizer is
        understood; whether the course has gone on."""
        if not target.scale_invariant or "lr" not in found or "weight_norm" not in found:
            return False
        if (
            found["lr"] == 0
        ):  # nothing moves: the step teaches nothing, and the last prediction stands
            return True
        effects, length = self._effects[target.name], self._length[target.name]
        if not all(
            isfinite(found.get(q, 0.0))
            for q in ("weight_norm", "gradient_scale", "equivalent_weight_decay")
        ):
            would_be = {
                **found,
                "weight_norm": 1.0,
                "gradient_scale": 1.0,
                "equivalent_weight_decay": 1.0,
            }
            if (
                course.latest is not None
                or predict(optimizer, group, effects, would_be, length) is not None
            ):
                found.update(self._from_prediction(nan, nan))
            return True
        prediction = predict(optimizer, group, effects, found, length)
        course.add(step, prediction)
        if prediction is not None and "angular_update" in found:
            measured = found["angular_update"]
            found.update(self._from_prediction(measured, prediction.angular_update))
        return True

    @staticmethod
    def _from_prediction(measured: float, predicted: float, prefix: str = "") -> dict[str, float]:
        """The quantities that compare the measured angular update with the predicted one."""
        return {
            f"{prefix}{quantity.name}": quantity.prediction(measured, predicted)
            for quantity in monitored()
            if quantity.prediction is not None
        }

    def _warn_dead(
        self,
        trainer: Trainer,
        plan: Plan,
        target: Target,
        group: dict[str, Any],
        sums: dict[str, tuple[float, float]],
    ) -> None:
        """A vector without gradient only decays: say so before something divides by its length."""
        count = sums["dead"][0]
        if not count or not sums["lr"][1] or (COLLAPSE, target.name) in self._reported:
            return
        e_foldings = least_of(sums["urgency"][0], plan.vectors.sum_dtype)
        rate = sums["dead_rate"][0] / count
        group, optimizer, effects = (
            {**group, "lr": self._mean("lr", *sums["lr"])},
            plan.optimizer,
            self._effects[target.name],
        )
        faster = falls_ever_faster(optimizer, group, effects)
        dying = self._dying(plan, target, group) if faster else []
        known = (
            bool(dying)
            if faster
            else step_response(class_for_predictions(optimizer), group) is not None
        )
        left = steps_to_collapse(optimizer, group, effects, e_foldings, rate, dying)
        if isfinite(left) and left <= self._steps_to_go(trainer):
            self._warn(
                trainer,
                COLLAPSE,
                target,
                f"{count:.0f} vector{'s get' if count > 1 else ' gets'} no gradient and only "
                f"shrink{'' if count > 1 else 's'}: at the "
                f"present learning rate the length underflows in about {left:.0f} "
                f"steps{'' if known else ' or sooner'}, and what divides "
                "by it (weight standardization, weight normalization) then gives NaN. Lower the "
                "decay of this weight, or use "
                "AdaptiveWeightShrink, which shrinks short vectors ever more slowly.",
            )

    def _dying(self, plan: Plan, target: Target, group: dict[str, Any]) -> list[Dying]:
        """Every vector without gradient of one weight. Rare, and a matter of all ranks: they have
        seen the same sums."""
        position = plan.targets.index(target)
        entries = entries_of_dying(plan.vectors, plan.optimizer.state, position, group)
        is_dead, left = self._to_fall[plan.index]
        of_all = plan.vectors.gather(torch.cat([torch.where(is_dead, left, inf)[None], entries]))[
            position
        ]
        return [
            Dying(*numbers)
            for numbers in of_all.T.tolist()
            if all(isfinite(number) for number in numbers)
        ]

    @staticmethod
    def _has_dropped(rates: tuple[float, ...], before: tuple[float, ...]) -> bool:
        """Whether the learning rate of a weight just fell by a jump, which pictures mark."""
        constant = bool(before) and abs(before[0] - before[-1]) <= 1e-3 * before[-1]
        return constant and 0 < rates[-1] <= before[-1] / LR_DROP

    def _warn_not_finite(
        self, trainer: Trainer, names: list[str], step: int, row: dict[str, float]
    ) -> None:
        """Say once that a run has diverged: its losses may be averaged away, and curves that end
        are easily overlooked."""
        if (DIVERGED, "") in self._reported:
            return
        self._reported.add((DIVERGED, ""))
        others = (
            f" and {len(names) - 1} more weights"
            if len(names) > 2
            else f" and `{names[1]}`"
            if len(names) == 2
            else ""
        )
        what = (
            "a gradient or an update"
            if isfinite(row.get(f"weight_norm/{names[0]}", nan))
            else "weights"
        )
        text = (
            f"{what} of `{names[0]}`{others} {'are' if what == 'weights' else 'is'} not finite at "
            f"step {step}: the run has diverged, and "
            "from here on its curves show NaN. Look at the loss and the learning rate before this "
            "step."
        )
        warn_once(text)
        if self.alert and trainer.is_global_zero:
            publish_alert(trainer.loggers, DIVERGED, text)

    def _warn_overflow(self, trainer: Trainer, target: Target, seen: Norms) -> None:
        """A norm that grows exponentially: say so before it overflows."""
        norm = seen.norms[-1]
        left = steps_until_overflow([0, *seen.steps], [seen.first, *seen.norms])
        if isfinite(left) and left <= self._steps_to_go(trainer):
            self._warn(
                trainer,
                "Weights explode",
                target,
                f"its norm has grown from {seen.first:.2g} to {norm:.2g} and grows exponentially: "
                f"at the present rate its square overflows "
                f"in about {left:.0f} steps. Lower the learning rate or the decay of this weight: "
                f"lr x decay must stay far below 2.",
            )

    def _warn(self, trainer: Trainer, title: str, target: Target, text: str) -> None:
        """Say it once per weight and kind of trouble, on rank zero."""
        if (title, target.name) in self._reported:
            return
        self._reported.add((title, target.name))
        text = f"`{target.name}`: {text}"
        warn_once(text)
        if self.alert and trainer.is_global_zero:
            publish_alert(trainer.loggers, title, text)

    @staticmethod
    def _steps_to_go(trainer: Trainer) -> float:
        """Optimizer steps until the end of the fit; infinite where nobody knows."""
        planned = trainer.estimated_stepping_batches
        return (
            planned - trainer.global_step / max(1, len(trainer.optimizers)) if planned > 0 else inf
        )

    def _say_idle_decay(self, trainer: Trainer) -> None:
        """The usual AdamW trap: a decay too small to change any norm within this run."""
        said: set[int] = set()
        for plan in self.plans.values():
            for target in plan.targets:
                group = plan.group_of(target)
                if (
                    id(group) in said
                    or not self._effects[target.name].none
                    or not target.scale_invariant
                ):
                    continue
                said.add(id(group))
                text = idle_decay(
                    class_for_predictions(plan.optimizer), group, trainer.estimated_stepping_batches
                )
                if text is not None:
                    show(trainer, f"lightning-normdyn: {text}")

    @staticmethod
    def _mean(quantity: str, total: float, count: float) -> float:
        return total / count if quantity in INTERNAL else QUANTITIES[quantity].mean(total, count)

    # -- a fit's beginning and end
    # -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new history."""
        super().on_fit_start(trainer, pl_module)
        self._off = bool(trainer.barebones)
        self._set(Ledger.new(separate=self.quantities is not None))
        if (
            self._restored is not None
        ):  # some strategies load a checkpoint before this, others after it
            self._take_up(trainer, self._restored)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every callback's; the rows can be seen at once, also where no step follows because the
        fit was finished."""
        super().load_state_dict(state_dict)
        if self._session is not None and self._restored is not None:
            self._take_up(self._session.trainer, self._restored)

    def _set(self, ledger: Ledger) -> None:
        self._ledger, self.history = ledger, History()
        self.history.show(ledger.history)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back what other callbacks were promised: the next row may be several epochs away."""
        super().on_train_start(trainer, pl_module)
        publish_to_trainer(trainer, self._ledger.promised)

    def _take_up(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """The rows of a checkpoint."""
        extra = state.get("extra", {})
        if self._off or "history" not in extra:
            return
        separate = self.quantities is not None
        try:
            ledger = Ledger.from_state(extra, separate=separate, asked_for=self._asked_for)
            position = [whole_number(x) for x in extra["position"]] if "position" in extra else None
            skipped = whole_number(extra.get("skipped_steps", 0))
        except NormDynError as error:
            warn_once(
                f"NormDynamicsMonitor starts a new history, because that of the checkpoint cannot "
                f"be read: {error}."
            )
            return
        self._position, self._skipped_before, self._taken_up, self._continued = (
            position,
            skipped,
            True,
            True,
        )
        self._set(ledger)
        publish_to_trainer(trainer, ledger.promised)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count on from a checkpoint before the first batch, then as every callback."""
        if self._taken_up:
            self._taken_up = False
            self._go_on()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _go_on(self) -> None:
        """A run that goes on has no row that only its end asked for, and counts from where it
        was."""
        assert self._session is not None
        known = self._ledger.lasting
        # A checkpoint of an earlier version does not say where it was saved: right after its newest
        # row, or not far from it.
        restored = (
            self._session.clock.go_on_from(self._position)
            if self._position is not None
            else known.last_step <= self._session.clock.now
        )
        now = self._session.clock.now
        if not restored and known.last_step >= now:
            warn_once(
                f"The history of the checkpoint reaches to step {known.last_step}, and this fit "
                f"counts from step {now}, because its loops "
                f"were not restored with the weights. Rows from step {now} on are dropped."
            )
        ledger = known.going_on_at(now)
        self._ledger = ledger
        self.history.show(ledger.history)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the last step if it was not foreseen, publish what came of the fit, and print the end
        table."""
        self._receive(trainer)
        norms = self._norms_now()
        if norms and not self._off:
            self._append_final(trainer, norms)
        self._publish_about(trainer)
        if self._session is not None and not self._session.closed:
            self._session.last_look()
        layers = self._layers(norms)
        text = self._end_table(layers) if self.tables else None
        super().on_train_end(trainer, pl_module)
        if text:
            show(trainer, text)
        if trainer.is_global_zero:
            for row in layers:  # a report of this history says what the table says
                self.history.meta["targets"][row["weight"]]["verdict"] = row["verdict"]
            self._write_history(trainer)
            self._ended = True
            quantities = self.quantities or [quantity.name for quantity in monitored()]
            outcome = Outcome(self.history, layers, quantities, self._label())
            publish_outcome(trainer.loggers, outcome)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the history beside the logs too: a run that is killed later can then be reported,
        whatever kills it."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._session is not None and not self._ended:
            self._write_history(trainer, self._completed().history)
            self.send_history(
                trainer
            )  # a process that the Trainer started gets no on_exception when it fails

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keep what was measured until the interruption (Ctrl-C, SIGTERM, an error)."""
        try:
            if (
                self._session is not None and not self._ended
            ):  # another callback may have closed the session already
                self._ended = True
                if (
                    trainer.world_size == 1
                ):  # of several ranks, the others may be anywhere: nothing that waits for them
                    self._receive(trainer)
                self._write_history(trainer)
        except (
            Exception
        ) as error:  # the person must see what interrupted the run, and not what came of it here
            warn_once(
                f"the history of the interrupted fit could not be written ({type(error).__name__}: "
                f"{error})."
            )
        finally:
            super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Send the history to the process that called ``fit``, if that is another one."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self.send_history(trainer)

    def _write_history(self, trainer: Trainer, history: History | None = None) -> None:
        """Rank zero: the history so far into a file beside each logger's own."""
        history = self.history if history is None else history
        if not trainer.is_global_zero or self._off:
            return
        if self._files is None:
            self._files = HistoryFiles(self._label(), continued=self._continued)
        publish_history(trainer.loggers, history, self._files)

    def _norms_now(self) -> dict[int, dict[str, float]]:
        """The mean norm of each weight at this moment, by optimizer. Every rank must call it."""
        norms: dict[int, dict[str, float]] = {}
        for index, plan in self.plans.items():
            lengths = plan.vectors.norms()
            means = (
                plan.vectors.totals(lengths) / plan.vectors.totals(torch.ones_like(lengths))
            ).tolist()
            norms[index] = {t.name: mean for t, mean in zip(plan.targets, means, strict=True)}
        return norms

    def _append_final(self, trainer: Trainer, norms: dict[int, dict[str, float]]) -> None:
        """The last norms of every optimizer that stepped after its newest row: the fit ended before
        its time (early stopping, a time
        limit), or another optimizer took the last turn. Its last angle is not known any more."""
        assert self._session is not None
        for bracket in self._session.attachment.brackets:
            bracket.settle()
        ledger, now = self._ledger, self._session.clock.now - 1
        is_newer = ledger.last_step < now
        moved = [i for i in norms if is_newer or self.steps_of(i) > ledger.counted.get(i, 0)]
        if ledger.last_step < 0 or not moved:
            return
        values = {f"weight_norm/{name}": norm for i in moved for name, norm in norms[i].items()}
        not_finite = [name for i in moved for name, norm in norms[i].items() if not isfinite(norm)]
        steps, lasting = max(self.steps_of(i) for i in self.plans), ledger.lasting
        if is_newer:
            ledger = self._recorded(
                replace(lasting, events=()), Row(now, steps, values, lasting.events), lasting
            )
        elif ledger.ending is None:
            ledger = self._recorded(ledger, Row(now, steps, values, amends=True), lasting)
        else:  # the row that was there, with more keys in it
            newest = ledger.ending.row
            row = replace(newest, values={**values, **newest.values})
            ledger = self._recorded(
                replace(ledger, history=lasting.history, evidence=lasting.evidence), row, lasting
            )
        self._ledger = ledger
        self.history.show(ledger.history)
        if not_finite:
            self._warn_not_finite(trainer, not_finite, now, values)

    def _publish_about(self, trainer: Trainer) -> None:
        """What the run consists of: at its first step, and again when more weights are trained
        (finetuning)."""
        assert self._session is not None
        targets = [t for plan in self.plans.values() for t in plan.targets]
        if len(targets) == self._told:
            return
        self._told = len(targets)
        callbacks: dict[str, dict[str, Any]] = {}
        for member in self._session.members:
            rule = member.rule
            kind = type(rule).__name__
            name = kind if kind not in callbacks else f"{kind}-{len(callbacks)}"
            callbacks[name] = {
                "params": rule.params,
                "granularity": rule.granularity,
                **rule.settings(),
            }
        treatments = self._session.combined.treatments()  # every rank takes part
        table = {
            t.name: {
                "shape": list(t.verdict.shape),
                "scale_invariant": t.verdict.kind,
                "norms": list(t.verdict.norms),
                "vectors": t.partition.n,
                "treated": treatments[t.weight],
            }
            for t in targets
        }
        about = json.loads(json.dumps({"callbacks": callbacks, "targets": table}, default=str))
        meta = self.history.meta
        # What a checkpoint says of a weight is what was true when the run began; only other
        # settings make another run of it.
        known = meta.get("targets", {}) if meta.get("callbacks") == about["callbacks"] else {}
        meta.update({**about, "targets": {**about["targets"], **known}})
        if trainer.is_global_zero:
            publish_about(trainer.loggers, about, self._label())

    def _label(self) -> str:
        """What tells this monitor's tables and files from those of others on the same Trainer."""
        assert self._session is not None
        rules = [member.rule for member in self._session.members]
        position = [r for r in rules if isinstance(r, NormDynamicsMonitor)].index(self)
        return f"-{position}" if position else ""

    def _layers(self, norms_now: dict[int, dict[str, float]] | None = None) -> list[dict[str, Any]]:
        """What came of each weight, for the end table; empty but on rank zero. Sharded over ranks,
        all of them must call it.

        Args:
            norms_now: `_norms_now`, at the end of a fit: an optimizer may have stepped many times
                since its newest row.
        """
        last = {name: norm for table in (norms_now or {}).values() for name, norm in table.items()}
        targets = [t for plan in self.plans.values() for t in plan.targets]
        # Every rank takes part in this; what follows is known to rank zero only.
        assert self._session is not None
        treatments = self._session.combined.treatments()
        evidence, courses = self._ledger.evidence, self._ledger.courses
        layers = []
        for target in targets:
            if not evidence.has(f"weight_norm/{target.name}"):
                continue
            norms = evidence.column(f"weight_norm/{target.name}")[1].tolist()
            course = courses.get(target.name, Course())
            said = judge(evidence, target.name, course)
            is_for_all = said in ("frozen", "collapsing") or said.startswith("not finite")
            layers.append(
                {
                    "weight": target.name,
                    "scale-invariant": target.verdict.kind,
                    "vectors": target.partition.n,
                    "treated how": treatments[target.weight] or "-",
                    "norm first": norms[0],
                    "norm last": last.get(target.name, norms[-1]),
                    "effective lr": self._latest("effective_lr", target),
                    "angular update": self._latest("angular_update", target),
                    "prediction": self._latest("equilibrium_angular_update", target),
                    "e-foldings": course.elapsed or None,
                    "verdict": said if target.scale_invariant or is_for_all else "-",
                }
            )
        return layers

    def end_table(self) -> str | None:
        """The table at the end of a fit as text; None if nothing was measured here. Sharded over
        ranks, all of them must call it."""
        return self._end_table(self._layers())

    def _end_table(self, layers: list[dict[str, Any]]) -> str | None:
        assert self._session is not None
        clamped = self._session.combined.counted_by_weight("clamped")
        if not layers:
            return None
        columns = (
            "weight",
            "treated how",
            "norm first → last",
            "effective lr",
            "angular update",
            "prediction",
            "e-foldings",
            "verdict",
        )

        def cell(row: dict[str, Any], column: str) -> str:
            if column == "norm first → last":
                return f"{row['norm first']:.3g}→{row['norm last']:.3g}"
            value = row[column]
            if isinstance(value, float):
                return f"{value:.1f}" if column == "e-foldings" else f"{value:.3g}"
            return "-" if value is None else str(value)

        title = f"lightning-normdyn: after {self.history[-1]['optimizer_step']:.0f} optimizer steps"
        cells = [[cell(row, column) for column in columns] for row in layers]
        text = render(
            title, columns, cells, noted=("treated how",), optional=("e-foldings", "treated how")
        )
        if clamped:
            named = ", ".join(f"{name}: {times}" for name, times in list(clamped.items())[:8]) + (
                ", ..." if len(clamped) > 8 else ""
            )
            times = sum(clamped.values())
            text += paragraph(
                f"The shrink factor was clamped at 0.5 {times} times ({named}): lr * alpha * norm "
                f"is too large there."
            )
        text += str(self._session.claims.losses_in_words())
        return text + "".join(paragraph(words) for words in self._session.closing_words())

    def _latest(self, quantity: str, target: Target) -> float | None:
        key = f"{quantity}/{target.name}"
        if not self._ledger.evidence.has(key):
            return None
        values = self._ledger.evidence.column(key)[1]
        return float(values[-1]) if len(values) else None

    def treatment(self, plan: Plan, target: Target) -> str:
        """Measuring is not treating."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """As every callback's; rows that were taken up from a checkpoint go on before the first
        step."""
        state = super().state_dict()
        if self._restored is None or self._session is None or not len(self._ledger.history):
            return state
        return seal({**state, "extra": self._extra()})

    def _forget_weight(self, name: str) -> None:
        super()._forget_weight(name)
        self._ledger = self._ledger.without(name)
        self._told = 0  # described anew to the loggers

    def _extra(self) -> dict[str, Any]:
        """The ledger as it will be when all that was measured is there. Changes nothing, so a
        signal handler may ask at any moment."""
        assert self._session is not None
        # Before the first batch of a fit that goes on, the loops are not yet where the checkpoint
        # was.
        position = (
            self._position
            if self._taken_up and self._position is not None
            else self._session.clock.position()
        )
        ledger = self._completed()
        happened = (
            []
            if self._session.closed
            else self._new_events(ledger, self._session.combined.events())
        )
        state = ledger.state()
        state["events"] = list(dict.fromkeys([*state["events"], *happened]))
        skipped = self._skipped_before + self._session.attempts.skipped()
        return {**state, "position": position, "skipped_steps": skipped}

    def _completed(self) -> Ledger:
        """The ledger as it will be when all that was measured is there; every rank must call it."""
        assert self._session is not None
        ledger = self._ledger
        for sent in ledger.sent:
            ledger = self._published(ledger, sent).ledger
        # What an update did in a batch that is not over will be done again after a resume, and
        # measured again.
        following, _ = self._session.clock.position()
        results = tuple(r for r in ledger.results if r.step < following)
        if results:
            ledger = self._published(ledger, self._send(results)).ledger
        return replace(ledger, results=(), sent=())

    def _load_extra(self, extra: dict[str, Any]) -> None:
        """Taken up before the first step already, in `on_train_start`."""
