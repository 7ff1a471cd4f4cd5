"""The monitor: norms, effective learning rates and angular updates of every weight, in the loggers and in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_normdyn.callbacks.base import NormDynCallback, Plan, Target
from lightning_normdyn.callbacks.tables import render, show
from lightning_normdyn.functional import (
    angle_from_sums,
    cosine_from_sums,
    direction_lr,
    effective_lr,
    effective_step_size,
    equivalent_weight_decay,
    norm_from_sums,
    std_from_sums,
)
from lightning_normdyn.history import History
from lightning_normdyn.parametrizations import is_weight_standardized
from lightning_normdyn.steps import Phase, Step, StepBracket

# Averaged over the vectors of a weight as RMS, because that is what predictions are about; everything else as mean.
ROOT_MEAN_SQUARE = frozenset({"angular_update", "effective_step_size"})
QUANTITIES = (
    "weight_norm",
    "weight_std",
    "effective_lr",
    "direction_lr",
    "angular_update",
    "effective_step_size",
    "gradient_cosine",
    "radial_update",
    "equivalent_weight_decay",
)


@dataclass
class _Measured:
    """Packed results of one optimizer's step, still on the device."""

    plan: Plan
    step: int
    optimizer_step: int
    quantities: list[str]
    packed: Tensor


class NormDynamicsMonitor(NormDynCallback):
    r"""Logs norm, effective learning rate, angular update and their relatives for every weight, and prints what came of them.

    One ``log_metrics`` call per logging step and logger. Keys are ``<quantity>/<parameter name>`` (mean over the weight's vectors; RMS
    for ``angular_update`` and ``effective_step_size``) and ``normdyn/<quantity>`` over all scale-invariant vectors:

    ========================== ================================================================ ===================
    quantity                   meaning                                                          unit
    ========================== ================================================================ ===================
    ``weight_norm``            ‖w‖ at the weight that the gradient was taken at                 weight units
    ``weight_std``             biased standard deviation (weight-standardized weights)          weight units
    ``effective_lr``           η/‖w‖ (η/std after weight standardization)                       AWS paper, eq. 12
    ``direction_lr``           η/‖w‖²: the learning rate of the direction                       van Laarhoven
    ``angular_update``         angle between the weight before and after one optimizer step     radians per step
    ``effective_step_size``    2 sin(angle/2)                                                   chord per step
    ``gradient_cosine``        cos(w, g): 0 for a scale-invariant weight                        -
    ``radial_update``          ⟨Δ, ŵ⟩/‖w‖                                                       per step
    ``equivalent_weight_decay`` the decay that AWS amounts to                                   1/(step η)
    ========================== ================================================================ ===================

    Under SGD the direction follows ``direction_lr``; under Adam-like optimizers it follows ``effective_lr``.

    Args:
        every_n_steps: logging steps as the Trainer counts them; None: the Trainer's ``log_every_n_steps``.
        quantities: which of the above; None: all that apply.
        per_vector: also keep every vector's norm and applied decay in `history`.
        histograms: also send histograms over vectors to W&B and TensorBoard.
        tables: print the tables at the start and the end of a fit.
        alert: send W&B alerts for weights that collapse.
        params: ``"auto"`` (every weight of two or more dimensions that an optimizer owns), a glob pattern, or a list of them.
        granularity: ``"auto"``, ``"filter"``, ``"group"`` or ``"layer"``.

    Attributes:
        history: the same rows in memory, on rank zero, logger or not (`lightning_normdyn.history.History`).

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
        if every_n_steps is not None and (isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1):
            raise ValueError(f"`every_n_steps` must be None or an integer >= 1, got {every_n_steps!r}.")
        unknown = [q for q in quantities or [] if q not in QUANTITIES]
        if unknown or quantities == []:
            raise ValueError(f"`quantities` must be None or names out of {list(QUANTITIES)}, got {quantities!r}.")
        self.every_n_steps = every_n_steps
        self.quantities = None if quantities is None else list(quantities)
        self.per_vector_history = per_vector
        self.histograms = histograms
        self.tables = tables
        self.alert = alert
        self.history = History()
        self._off = False
        self._step_due: int | None = None
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._results: list[_Measured] = []
        self._standardized: dict[int, Tensor] = {}
        self._quantities: dict[int, list[str]] = {}
        self._last_step = -1

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
        """Which quantities apply to which weights."""
        assert self._session is not None
        module, vectors = self._session.module, plan.vectors
        standardized = torch.tensor([is_weight_standardized(module, t.name) for t in plan.targets], device=vectors.device)
        self._standardized[plan.index] = vectors.spread(standardized)
        wanted = list(QUANTITIES) if self.quantities is None else self.quantities
        if self.quantities is None and not bool(standardized.any()):
            wanted.remove("weight_std")
        if not any(self._influence(t).get("alpha") for t in plan.targets) and "equivalent_weight_decay" in wanted:
            wanted.remove("equivalent_weight_decay")
        self._quantities[plan.index] = wanted

    def _influence(self, target: Target) -> dict[str, Any]:
        """What the other callbacks do to this weight."""
        assert self._session is not None
        found: dict[str, Any] = {}
        for member in self._session.members:
            if any(t.weight is target.weight for plan in member.plans.values() for t in plan.targets):
                found.update(member.influence(target))
        return found

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _due(self, step: Step) -> bool:
        assert self._session is not None
        trainer = self._session.trainer
        if self._off:
            return False
        every = trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps
        now = trainer.fit_loop.epoch_loop._batches_that_stepped
        on_lattice = bool(every) and (now + 1) % every == 0
        return on_lattice or trainer.should_stop or self._last_step < 0 or self._is_last(trainer)

    @staticmethod
    def _is_last(trainer: Trainer) -> bool:
        by_steps = trainer.max_steps != -1 and trainer.global_step + len(trainer.optimizers) >= trainer.max_steps
        by_epochs = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs and trainer.is_last_batch
        return bool(by_steps or by_epochs)

    def _measure_weight(self, step: Step, plan: Plan) -> None:
        if not self._due(step):
            return
        vectors = plan.vectors
        weights, gradients = vectors.values(), vectors.gradients()
        ww, wg, gg, w1 = vectors.inner((weights, weights), (weights, gradients), (gradients, gradients), (weights, None))
        self._sums[plan.index] = {"ww": ww, "wg": wg, "gg": gg, "w1": w1, "lr": plan.group_values("lr").clone()}
        step.bracket.request_snapshot(dict(zip(vectors.weights, weights, strict=True)))

    def _measure_step(self, step: Step, plan: Plan) -> None:
        sums = self._sums.pop(plan.index, None)
        if sums is None:
            return
        assert self._session is not None
        vectors = plan.vectors
        ss, sd, dd = vectors.displacement(vectors.snapshots(step.bracket))
        wanted = self._quantities[plan.index]
        values = self._quantities_of(plan, sums, ss, sd, dd)
        stacked = torch.stack([values[q] for q in wanted])
        powers = torch.stack([v.square() if q in ROOT_MEAN_SQUARE else v for q, v in zip(wanted, stacked, strict=True)])
        valid = torch.isfinite(stacked)
        active = plan.active()
        if active is not None:
            valid &= active
        packed = vectors.totals(torch.cat([torch.where(valid, powers, torch.zeros_like(powers)), valid.to(powers.dtype)]))
        skipped = packed.new_zeros(1) if step.skipped is None else step.skipped.to(packed.dtype).reshape(1)
        now = self._session.trainer.fit_loop.epoch_loop._batches_that_stepped
        packed = torch.cat([packed.flatten(), skipped])
        self._results.append(_Measured(plan, now, self.number(step, plan), wanted, packed))
        if self.per_vector_history:
            self._keep_vectors(now, plan, norm_from_sums(sums["ww"]), sums["lr"])

    def _quantities_of(self, plan: Plan, sums: dict[str, Tensor], ss: Tensor, sd: Tensor, dd: Tensor) -> dict[str, Tensor]:
        norm = norm_from_sums(sums["ww"])
        std = std_from_sums(sums["ww"], sums["w1"], plan.vectors.length)
        size = torch.where(self._standardized[plan.index], std, norm)
        angle = angle_from_sums(ss, sd, dd)
        # From w_t to here: the shrink to s = f w, then the step from s.
        shrunk = norm_from_sums(ss) / norm
        found = {
            "weight_norm": norm,
            "weight_std": std,
            "effective_lr": effective_lr(sums["lr"], size),
            "direction_lr": direction_lr(sums["lr"], size),
            "angular_update": angle,
            "effective_step_size": effective_step_size(angle),
            "gradient_cosine": cosine_from_sums(sums["ww"], sums["wg"], sums["gg"]),
            "radial_update": shrunk - 1 + shrunk * sd / ss,
        }
        if "equivalent_weight_decay" in self._quantities[plan.index]:
            alphas = [self._influence(t).get("alpha", float("nan")) for t in plan.targets]
            alpha = plan.vectors.spread(torch.tensor(alphas, dtype=norm.dtype, device=norm.device))
            found["equivalent_weight_decay"] = equivalent_weight_decay(alpha, size)
        return found

    def _keep_vectors(self, now: int, plan: Plan, norm: Tensor, lr: Tensor) -> None:
        assert self._session is not None
        norms = plan.vectors.gather(norm)
        if not self._session.trainer.is_global_zero:
            return
        for target, values in zip(plan.targets, norms, strict=True):
            self.history.append_vectors(now, {f"weight_norm/{target.name}": values.float().cpu().numpy()})

    # -- publishing ----------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Publish what was measured in this batch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        results, self._results = self._results, []
        if results:
            self._publish(trainer, results)

    def _publish(self, trainer: Trainer, results: list[_Measured]) -> None:
        row: dict[str, float] = {}
        overview: dict[str, list[float]] = {}
        step, optimizer_step, stepped = results[0].step, results[0].optimizer_step, False
        # One transfer to the host for all optimizers of this batch.
        numbers = torch.cat([r.packed.to(results[0].packed.device) for r in results]).tolist()
        for result in results:
            mine, numbers = numbers[: result.packed.numel()], numbers[result.packed.numel() :]
            if mine[-1]:
                continue  # a fused optimizer skipped this update inside its kernel
            stepped = True
            width = len(result.plan.targets)
            for i, quantity in enumerate(result.quantities):
                for j, target in enumerate(result.plan.targets):
                    total, count = mine[i * width + j], mine[(len(result.quantities) + i) * width + j]
                    if not count:
                        continue
                    row[f"{quantity}/{target.name}"] = self._mean(quantity, total, count)
                    if target.scale_invariant:
                        sums = overview.setdefault(quantity, [0.0, 0.0])
                        sums[0] += total
                        sums[1] += count
        if not stepped:
            return
        self._last_step = step
        for quantity, (total, count) in overview.items():
            row[f"normdyn/{quantity}"] = self._mean(quantity, total, count)
        assert self._session is not None
        row["normdyn/skipped_steps"] = float(self._session.skipped_steps())
        clamped = self._session.counted("clamped")
        if clamped is not None:
            row["normdyn/clamped_vectors"] = clamped
        row = {key: value for key, value in row.items() if isfinite(value)}
        if trainer.is_global_zero:
            self.history.append(step, row, optimizer_step=optimizer_step)
            for event in self._session.take_events():
                self.history.mark(step, event)
            every = trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps
            if every and ((step + 1) % every == 0 or trainer.should_stop):
                for logger in trainer.loggers:
                    logger.log_metrics(row, step=step)
        self._to_progress_bar(row)

    @staticmethod
    def _mean(quantity: str, total: float, count: float) -> float:
        return sqrt(max(total, 0.0) / count) if quantity in ROOT_MEAN_SQUARE else total / count

    def _to_progress_bar(self, row: dict[str, float]) -> None:
        quiet = {"logger": False, "on_step": True, "on_epoch": False, "batch_size": 1}
        for key in ("normdyn/angular_update", "normdyn/equilibrium_ratio"):
            if key in row:
                self.log(key, row[key], **quiet)
        # rich prints three decimals: milliradians and norms stay readable, an effective learning rate would be 0.000.
        if "normdyn/angular_update" in row:
            self.log("turn_mrad", 1e3 * row["normdyn/angular_update"], prog_bar=True, **quiet)
        if "normdyn/weight_norm" in row:
            self.log("norm", row["normdyn/weight_norm"], prog_bar=True, **quiet)

    # -- a fit's beginning and end -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new history."""
        super().on_fit_start(trainer, pl_module)
        self._off = bool(trainer.barebones)
        self.history = History()
        self._last_step, self._results, self._sums = -1, [], {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the last step if it was not foreseen, and print the end table."""
        now = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        if not self._off and self.plans and 0 <= self._last_step < now:
            self._append_final(trainer, now)
        self.history.meta.update(self._meta())
        text = self.end_table() if self.tables and trainer.is_global_zero else None
        super().on_train_end(trainer, pl_module)
        if text:
            show(trainer, text)

    def _append_final(self, trainer: Trainer, now: int) -> None:
        """A run that ended before its time (early stopping, a time limit): the last weights at least, if not the last angle."""
        row: dict[str, float] = {}
        for plan in self.plans.values():
            norms = plan.vectors.norms()
            means = (plan.vectors.totals(norms) / plan.vectors.totals(torch.ones_like(norms))).tolist()
            row.update({f"weight_norm/{t.name}": m for t, m in zip(plan.targets, means, strict=True)})
        if trainer.is_global_zero:
            self.history.append(now, row, optimizer_step=max(self.steps_of(i) for i in self.plans))

    def _meta(self) -> dict[str, Any]:
        targets = {
            t.name: {
                "shape": list(t.verdict.shape),
                "scale_invariant": t.verdict.kind,
                "norms": list(t.verdict.norms),
                "vectors": t.partition.n,
            }
            for plan in self.plans.values()
            for t in plan.targets
        }
        return {"targets": targets, "settings": self.settings()}

    def end_table(self) -> str | None:
        """The table at the end of a fit as text; None if nothing was measured."""
        assert self._session is not None
        if not len(self.history) or not self.plans:
            return None
        rows, known = [], set(self.history.keys())
        for plan in self.plans.values():
            for target in plan.targets:
                key = f"weight_norm/{target.name}"
                if key not in known:
                    continue
                norms = self.history.column(key)[1]
                how = "; ".join(
                    m.treatment(p, t)
                    for m in self._session.members
                    if m is not self
                    for p in m.plans.values()
                    for t in p.targets
                    if t.weight is target.weight
                )
                rows.append(
                    (
                        target.name,
                        how or "-",
                        f"{norms[0]:.3g} → {norms[-1]:.3g}",
                        self._latest("effective_lr", target),
                        self._latest("angular_update", target),
                    )
                )
        title = f"lightning-normdyn: after {self.history[len(self.history) - 1]['optimizer_step']:.0f} optimizer steps"
        return render(title, ("weight", "treated how", "norm first → last", "effective lr", "angular update"), rows)

    def _latest(self, quantity: str, target: Target) -> str:
        key = f"{quantity}/{target.name}"
        if key not in set(self.history.keys()):
            return "-"
        values = self.history.column(key)[1]
        return f"{values[-1]:.3g}" if len(values) else "-"

    def treatment(self, plan: Plan, target: Target) -> str:
        """Measuring is not treating."""
        return ""

    def _extra(self) -> dict[str, Any]:
        return {"history": self.history.state_dict(), "last_step": self._last_step}

    def _load_extra(self, extra: dict[str, Any]) -> None:
        if "history" in extra:
            self.history.load_state_dict(extra["history"])
            self._last_step = int(extra["last_step"])
