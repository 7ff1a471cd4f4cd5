"""The monitor: norms, effective learning rates and angular updates of every weight, in the loggers and in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, log, prod, sqrt
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_normdyn.callbacks.base import NormDynCallback, Plan, Target, balance, log_every, warn_once
from lightning_normdyn.callbacks.publishing import (
    Outcome,
    can_show_histograms,
    publish_about,
    publish_alert,
    publish_outcome,
    publish_row,
)
from lightning_normdyn.callbacks.tables import render, show
from lightning_normdyn.equilibrium import (
    equilibrium_angular_update,
    relaxation_steps,
    total_decay,
    verdict,
    wrs_angular_update,
)
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
from lightning_normdyn.histograms import PACKED, Histogram, bin_vectors, unpack
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
    "equilibrium_angular_update",
    "equilibrium_ratio",
)
PREDICTED = ("equilibrium_angular_update", "equilibrium_ratio")
# Shown as histograms over vectors, in the section `<quantity>_histogram`.
BINNED = ("weight_norm", "angular_update")
# Measured for the predictions and the warnings, not logged.
INTERNAL = ("lr", "gradient_scale", "dead", "steps_left", "collapsed")
# E-foldings of the norm after which a run may be called settled.
SETTLED_AFTER = 6
# Logging steps in a row without any gradient before a vector counts as dead.
DEAD_AFTER = 3
# A vector this much shorter than the mean of its weight has collapsed.
COLLAPSED = 1e-3


@dataclass
class _Measured:
    """Packed results of one optimizer's step, still on the device."""

    plan: Plan
    step: int
    optimizer_step: int
    quantities: list[str]
    packed: Tensor
    binned: bool  # whether histograms are in it
    groups: list[dict[str, Any]]  # hyperparameters of each target's group at this very step


class NormDynamicsMonitor(NormDynCallback):
    r"""Logs norm, effective learning rate, angular update and their relatives for every weight, and prints what came of them.

    One ``log_metrics`` call per logging step and logger. Keys are ``<quantity>/<parameter name>`` (mean over the weight's vectors; RMS
    for ``angular_update`` and ``effective_step_size``) and ``normdyn/<quantity>`` over all scale-invariant vectors:

    ============================== ============================================================ =====================
    quantity                       meaning                                                      unit
    ============================== ============================================================ =====================
    ``weight_norm``                ‖w‖ at the weight that the gradient was taken at             weight units
    ``weight_std``                 biased standard deviation (weight-standardized weights)      weight units
    ``effective_lr``               η/‖w‖ (η/std after weight standardization)                   AWS paper, eq. 12, 13
    ``direction_lr``               η/‖w‖²: the learning rate of the direction                   van Laarhoven
    ``angular_update``             angle between the weight before and after one optimizer step radians per step
    ``effective_step_size``        2 sin(angle/2)                                               chord per step
    ``gradient_cosine``            cos(w, g): 0 for a scale-invariant weight                    -
    ``radial_update``              ⟨Δ, ŵ⟩/‖w‖                                                   per step
    ``equivalent_weight_decay``    the decay that AWS amounts to                                1/(step η)
    ``equilibrium_angular_update`` RMS angle that optimizer, lr and decay settle at             radians per step
    ``equilibrium_ratio``          ``angular_update`` / ``equilibrium_angular_update``          -
    ============================== ============================================================ =====================

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
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._results: list[_Measured] = []
        self._standardized: dict[int, Tensor] = {}
        self._quantities: dict[int, list[str]] = {}
        self._influences: dict[str, dict[str, Any]] = {}
        self._length: dict[str, int] = {}
        self._dead: dict[int, Tensor] = {}
        self._relaxation: dict[str, float] = {}
        self._reported: set[str] = set()
        self._last_step = -1
        self._told = 0  # how many targets the loggers know of

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
        wanted = [q for q in self.quantities or QUANTITIES if q not in PREDICTED]
        if self.quantities is None and not bool(standardized.any()):
            wanted.remove("weight_std")
        self._influences.update({t.name: self._session.influence(t, besides=self) for t in plan.targets})
        shrunk = any("alpha" in self._influences[t.name] for t in plan.targets)
        if not shrunk and "equivalent_weight_decay" in wanted:
            wanted.remove("equivalent_weight_decay")
        # Predictions and verdicts rest on the norm, the angle, and the present strength of AWS.
        needed = ["weight_norm", "angular_update", *(["equivalent_weight_decay"] if shrunk else [])]
        self._quantities[plan.index] = list(dict.fromkeys([*wanted, *needed]))
        self._dead[plan.index] = torch.zeros(vectors.n, dtype=vectors.sum_dtype, device=vectors.device)
        for target in plan.targets:
            labels = target.partition.labels
            members = int((labels >= 0).sum()) * (prod(self._session.shapes[target.weight]) // max(1, labels.numel()))
            self._length[target.name] = max(1, members // max(1, target.partition.n))

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _due(self, step: Step) -> bool:
        assert self._session is not None
        trainer = self._session.trainer
        if self._off:
            return False
        every = log_every(trainer) if self.every_n_steps is None else self.every_n_steps
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
        scale = getattr(step.optimizer, "grad_scale", None)
        if scale is not None:  # a fused optimizer unscales the gradients inside its kernel
            wg, gg = wg / scale.to(wg), gg / scale.to(gg) ** 2
        self._sums[plan.index] = {"ww": ww, "wg": wg, "gg": gg, "w1": w1, "lr": plan.group_values("lr").clone()}
        step.bracket.request_snapshot(vectors.storages())

    def _measure_step(self, step: Step, plan: Plan) -> None:
        sums = self._sums.pop(plan.index, None)
        if sums is None:
            return
        assert self._session is not None
        vectors = plan.vectors
        ss, sd, dd = vectors.displacement(vectors.snapshots(step.bracket))
        wanted = [*self._quantities[plan.index], *INTERNAL]
        values = self._quantities_of(plan, sums, ss, sd, dd)
        stacked = torch.stack([values[q] for q in wanted])
        powers = torch.stack([v.square() if q in ROOT_MEAN_SQUARE else v for q, v in zip(wanted, stacked, strict=True)])
        valid = torch.isfinite(stacked)
        active = plan.active()
        if active is not None:
            valid &= active
        packed = vectors.totals(torch.cat([torch.where(valid, powers, torch.zeros_like(powers)), valid.to(powers.dtype)]))
        skipped = packed.new_zeros(1) if step.skipped is None else step.skipped.to(packed.dtype).reshape(1)
        trainer = self._session.trainer
        now = trainer.fit_loop.epoch_loop._batches_that_stepped
        binned = self.histograms and can_show_histograms(trainer.loggers)
        histograms = packed.new_zeros(0)
        if binned:
            chosen = torch.stack([values[q] for q in BINNED])
            histograms = bin_vectors(vectors, chosen if active is None else torch.where(active, chosen, float("nan")))
        packed = torch.cat([packed.flatten(), histograms.flatten(), skipped])
        groups = [{k: v for k, v in plan.group_of(t).items() if k != "params"} for t in plan.targets]
        self._results.append(_Measured(plan, now, self.number(step, plan), wanted, packed, binned, groups))
        if self.per_vector_history:
            self._keep_vectors(now, plan, sums)

    def _quantities_of(self, plan: Plan, sums: dict[str, Tensor], ss: Tensor, sd: Tensor, dd: Tensor) -> dict[str, Tensor]:
        vectors = plan.vectors
        norm = norm_from_sums(sums["ww"])
        std = std_from_sums(sums["ww"], sums["w1"], vectors.length)
        size = torch.where(self._standardized[plan.index], std, norm)
        angle = angle_from_sums(ss, sd, dd)
        # From w_t to here: the shrink to s = f w, then the step from s.
        shrunk = norm_from_sums(ss) / norm
        radial = shrunk - 1 + shrunk * sd / ss
        dead = self._dead[plan.index]
        dead = self._dead[plan.index] = torch.where((sums["gg"] == 0) & (radial < 0), dead + 1, torch.zeros_like(dead))
        is_dead = (dead >= DEAD_AFTER).to(norm.dtype)
        least = torch.finfo(torch.float32).smallest_normal ** 0.5  # below it squares vanish in float32
        left = (size / least).log() / -torch.log1p(radial)
        mean = vectors.spread(vectors.totals(torch.nan_to_num(size)) / vectors.count)
        found = {
            "lr": sums["lr"],
            "gradient_scale": sums["gg"] * sums["ww"],
            "dead": is_dead,
            "steps_left": torch.where(is_dead > 0, left, torch.full_like(left, float("nan"))),
            "collapsed": (size < COLLAPSED * mean).to(norm.dtype),
            "weight_norm": norm,
            "weight_std": std,
            "effective_lr": effective_lr(sums["lr"], size),
            "direction_lr": direction_lr(sums["lr"], size),
            "angular_update": angle,
            "effective_step_size": effective_step_size(angle),
            "gradient_cosine": cosine_from_sums(sums["ww"], sums["wg"], sums["gg"]),
            "radial_update": radial,
        }
        if "equivalent_weight_decay" in self._quantities[plan.index]:
            alphas = [self._influences[t.name].get("alpha", float("nan")) for t in plan.targets]
            alpha = vectors.spread(torch.tensor(alphas, dtype=norm.dtype, device=norm.device))
            found["equivalent_weight_decay"] = equivalent_weight_decay(alpha, size)
        return found

    def _keep_vectors(self, now: int, plan: Plan, sums: dict[str, Tensor]) -> None:
        """Every vector's norm and applied decay, for ridge plots and for EffectiveLRReplay."""
        assert self._session is not None
        norm, std = norm_from_sums(sums["ww"]), std_from_sums(sums["ww"], sums["w1"], plan.vectors.length)
        decay = self._session.applied_decay(plan, norm, std)
        gathered = plan.vectors.gather(torch.stack([norm, decay]))
        if not self._session.trainer.is_global_zero:
            return
        rows: dict[str, Any] = {}
        for target, values in zip(plan.targets, gathered, strict=True):
            rows[f"weight_norm/{target.name}"], rows[f"decay/{target.name}"] = values.float().cpu().numpy()
        self.history.append_vectors(now, rows)

    # -- publishing ----------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Publish what was measured in this batch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        results, self._results = self._results, []
        if results:
            self._publish(trainer, results)
            self._publish_about(trainer)

    def _publish(self, trainer: Trainer, results: list[_Measured]) -> None:
        assert self._session is not None
        row: dict[str, float] = {}
        histograms: dict[str, Histogram] = {}
        overview: dict[str, list[float]] = {}
        step, optimizer_step, stepped, collapsed = results[0].step, results[0].optimizer_step, False, 0.0
        # One transfer to the host for all optimizers of this batch.
        clamped = self._session.counted("clamped")
        packed = [r.packed for r in results] + ([] if clamped is None else [clamped])
        numbers = torch.cat([p.to(packed[0]) for p in packed]).tolist()
        for result in results:
            mine, numbers = numbers[: result.packed.numel()], numbers[result.packed.numel() :]
            if mine[-1]:
                continue  # a fused optimizer skipped this update inside its kernel
            stepped = True
            kinds, width = result.quantities, len(result.plan.targets)
            if result.binned:
                histograms.update(self._histograms(result, mine[2 * len(kinds) * width : -1]))
            for j, (target, group) in enumerate(zip(result.plan.targets, result.groups, strict=True)):
                sums = {q: (mine[i * width + j], mine[(len(kinds) + i) * width + j]) for i, q in enumerate(kinds)}
                found = {q: self._mean(q, total, count) for q, (total, count) in sums.items() if count}
                self._predict(target, group, found, type(result.plan.optimizer))
                row.update({f"{q}/{target.name}": v for q, v in found.items() if q not in INTERNAL})
                collapsed += sums["collapsed"][0]
                self._warn_dead(trainer, target, sums["dead"][0], found.get("steps_left"))
                if not target.scale_invariant:
                    continue
                if "equilibrium_ratio" in found:
                    total, count = sums["angular_update"]
                    sums["predicted"] = (found["equilibrium_angular_update"] ** 2 * count, count)
                    sums["measured"] = (total, count)
                for q, (total, count) in sums.items():
                    known = overview.setdefault(q, [0.0, 0.0])
                    known[0] += total
                    known[1] += count
        if not stepped:
            return
        self._last_step = step
        row.update({f"normdyn/{q}": self._mean(q, t, n) for q, (t, n) in overview.items() if n and q in QUANTITIES})
        if "predicted" in overview:
            total, count = overview["predicted"]
            row["normdyn/equilibrium_angular_update"] = sqrt(total / count)
            row["normdyn/equilibrium_ratio"] = sqrt(overview["measured"][0] / total)
        row["normdyn/skipped_steps"] = float(self._session.skipped_steps())
        row["normdyn/collapsed_vectors"] = collapsed
        if clamped is not None:
            row["normdyn/clamped_vectors"] = numbers[-1]
        row = {key: value for key, value in row.items() if isfinite(value)}
        if trainer.is_global_zero:
            self._keep(trainer, row, histograms, step, optimizer_step)
        self._to_progress_bar(row)

    @staticmethod
    def _histograms(result: _Measured, numbers: list[float]) -> dict[str, Histogram]:
        packed = iter([numbers[i : i + PACKED] for i in range(0, len(numbers), PACKED)])
        by_quantity = unpack([[next(packed) for _ in result.plan.targets] for _ in BINNED])
        return {
            f"{quantity}_histogram/{target.name}": histogram
            for quantity, histograms in zip(BINNED, by_quantity, strict=True)
            for target, histogram in zip(result.plan.targets, histograms, strict=True)
            if histogram is not None
        }

    def _keep(self, trainer: Trainer, row: dict[str, float], histograms: dict[str, Histogram], step: int, optimizer_step: int) -> None:
        """Rank zero: into the history with everything, into the loggers with what was asked for."""
        assert self._session is not None
        first = not len(self.history)
        self.history.append(step, row, optimizer_step=optimizer_step)
        for event in self._session.take_events():
            self.history.mark(step, event)
        if first:
            self._say_idle_decay(trainer)
        every = log_every(trainer) if self.every_n_steps is None else self.every_n_steps
        if every and ((step + 1) % every == 0 or trainer.should_stop):
            shown = {key: value for key, value in row.items() if self._asked_for(key)}
            shown["normdyn/optimizer_step"] = float(optimizer_step)
            publish_row(trainer.loggers, shown, histograms, step)

    def _asked_for(self, key: str) -> bool:
        section, _, name = key.partition("/")
        quantity = name if section == "normdyn" else section
        return quantity not in QUANTITIES or quantity in (self.quantities or QUANTITIES)

    # -- predictions and warnings --------------------------------------------------------------------------------------

    def _predict(self, target: Target, group: dict[str, Any], found: dict[str, float], optimizer_class: type) -> None:
        """Add what this weight settles at, if it is scale-invariant and its optimizer is understood."""
        if not target.scale_invariant or "lr" not in found or "weight_norm" not in found:
            return
        group = {**group, "lr": found["lr"]}
        influence = self._influences.get(target.name, {})
        options = balance(influence, group, found.get("equivalent_weight_decay"))
        if options is None:
            return
        scale, dim, norm = found.get("gradient_scale"), self._length[target.name], found["weight_norm"]
        if "every_n_steps" in influence and "alpha" not in influence:
            length = norm if influence["target_norm"] == "initial" else influence["target_norm"]
            predicted = wrs_angular_update(
                optimizer_class,
                group,
                influence["every_n_steps"],
                gradient_scale=scale,
                dim=dim,
                target_norm=length,
                projected="projected" in options,
            )
            relaxation = None
        else:
            predicted = equilibrium_angular_update(optimizer_class, group, gradient_scale=scale, dim=dim, norm=norm, **options)
            relaxation = relaxation_steps(optimizer_class, group, gradient_scale=scale, dim=dim, norm=norm, **options)
        if predicted is None or not isfinite(float(predicted)) or float(predicted) <= 0:
            return
        found["equilibrium_angular_update"] = float(predicted)
        if "angular_update" in found:
            found["equilibrium_ratio"] = found["angular_update"] / float(predicted)
        if relaxation is not None:
            self._relaxation[target.name] = float(relaxation)

    def _warn_dead(self, trainer: Trainer, target: Target, dead: float, left: float | None) -> None:
        """A vector without gradient only decays: say so before something divides by its length."""
        if not dead or left is None or target.name in self._reported:
            return
        if left > trainer.estimated_stepping_batches - trainer.global_step:
            return
        self._reported.add(target.name)
        text = (
            f"{dead:.0f} vector{'s' if dead > 1 else ''} of `{target.name}` get no gradient and only shrink: at the present rate their "
            f"length underflows in about {left:.0f} steps, and a division by it gives NaN. Lower the decay of this weight, or use "
            "AdaptiveWeightShrink."
        )
        warn_once(text)
        if self.alert and trainer.is_global_zero:
            publish_alert(trainer.loggers, "Weights collapse", text)

    def _say_idle_decay(self, trainer: Trainer) -> None:
        """The usual AdamW trap: a decay too small to change any norm within this run."""
        steps = trainer.estimated_stepping_batches
        if not self.tables or not isfinite(steps):
            return
        said: set[int] = set()
        for plan in self.plans.values():
            for target in plan.targets:
                group = plan.group_of(target)
                if id(group) in said or self._influences[target.name] or not target.scale_invariant:
                    continue
                said.add(id(group))
                decay, lr = float(group.get("weight_decay") or 0.0), float(group["lr"])
                pull = total_decay(type(plan.optimizer), {**group, "lr": lr}, int(steps))
                if pull is not None and 0 < pull < 0.1:
                    much = f"shrinks a weight by {100 * pull:.2g} % over the {steps:.0f} steps of this run"
                    show(trainer, f"lightning-normdyn: weight decay {decay:g} at lr {lr:g} {much}: it does next to nothing.")

    @staticmethod
    def _mean(quantity: str, total: float, count: float) -> float:
        return sqrt(max(total, 0.0) / count) if quantity in ROOT_MEAN_SQUARE else total / count

    def _to_progress_bar(self, row: dict[str, float]) -> None:
        assert self._session is not None
        module = self._session.module

        def tell(key: str, value: float, prog_bar: bool) -> None:
            module.log(key, value, prog_bar=prog_bar, logger=False, on_step=True, on_epoch=False, batch_size=1)

        for key in ("normdyn/angular_update", "normdyn/equilibrium_ratio"):
            if key in row:
                tell(key, row[key], prog_bar=False)
        # rich prints three decimals: milliradians and norms stay readable, an effective learning rate would be 0.000.
        if "normdyn/angular_update" in row:
            tell("turn_mrad", 1e3 * row["normdyn/angular_update"], prog_bar=True)
        if "normdyn/weight_norm" in row:
            tell("weight_norm", row["normdyn/weight_norm"], prog_bar=True)

    # -- a fit's beginning and end -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new history."""
        super().on_fit_start(trainer, pl_module)
        self._off = bool(trainer.barebones)
        self.history = History()
        self._last_step, self._told, self._results, self._sums = -1, 0, [], {}
        self._influences, self._length, self._relaxation, self._reported = {}, {}, {}, set()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the last step if it was not foreseen, publish what came of the fit, and print the end table."""
        now = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        if not self._off and self.plans and 0 <= self._last_step < now:
            self._append_final(trainer, now)
        self._publish_about(trainer)
        layers = self._layers()
        text = self._end_table(layers) if self.tables else None
        super().on_train_end(trainer, pl_module)
        if text:
            show(trainer, text)
        if trainer.is_global_zero:
            outcome = Outcome(self.history, layers, self.quantities or QUANTITIES, self._label())
            publish_outcome(trainer.loggers, outcome)

    def _append_final(self, trainer: Trainer, now: int) -> None:
        """A run that ended before its time (early stopping, a time limit): the last weights at least, if not the last angle."""
        row: dict[str, float] = {}
        for plan in self.plans.values():
            norms = plan.vectors.norms()
            means = (plan.vectors.totals(norms) / plan.vectors.totals(torch.ones_like(norms))).tolist()
            row.update({f"weight_norm/{t.name}": m for t, m in zip(plan.targets, means, strict=True)})
        if trainer.is_global_zero:
            self.history.append(now, row, optimizer_step=max(self.steps_of(i) for i in self.plans))

    def _publish_about(self, trainer: Trainer) -> None:
        """What the run consists of: at its first step, and again when more weights are trained (finetuning)."""
        assert self._session is not None
        targets = [t for plan in self.plans.values() for t in plan.targets]
        if len(targets) == self._told:
            return
        self._told = len(targets)
        callbacks: dict[str, dict[str, Any]] = {}
        for member in self._session.members:
            kind = type(member).__name__
            name = kind if kind not in callbacks else f"{kind}-{len(callbacks)}"
            callbacks[name] = {"params": member.params, "granularity": member.granularity, **member.settings()}
        # Every rank takes part in the treatments.
        table = {
            t.name: {
                "shape": list(t.verdict.shape),
                "scale_invariant": t.verdict.kind,
                "norms": list(t.verdict.norms),
                "vectors": t.partition.n,
                "treated": self._treatment_of(t),
            }
            for t in targets
        }
        about = {"callbacks": callbacks, "targets": table}
        self.history.meta.update(about)
        if trainer.is_global_zero:
            publish_about(trainer.loggers, about, self._label())

    def _label(self) -> str:
        """What tells this monitor's tables and files from those of others on the same Trainer."""
        assert self._session is not None
        position = [m for m in self._session.members if isinstance(m, NormDynamicsMonitor)].index(self)
        return f"-{position}" if position else ""

    def _layers(self) -> list[dict[str, Any]]:
        """What came of each weight, for the end table; empty but on rank zero. Sharded over ranks, all of them must call it."""
        targets = [t for plan in self.plans.values() for t in plan.targets]
        # Every rank takes part in this; what follows is known to rank zero only.
        treated = [self._treatment_of(t) for t in targets]
        layers, known = [], set(self.history.keys())
        for target, how in zip(targets, treated, strict=True):
            if f"weight_norm/{target.name}" not in known:
                continue
            norms = self.history.column(f"weight_norm/{target.name}")[1].tolist()
            elapsed, verdict = self._judge(target)
            layers.append(
                {
                    "weight": target.name,
                    "scale-invariant": target.verdict.kind,
                    "vectors": target.partition.n,
                    "treated how": how or "-",
                    "norm first": norms[0],
                    "norm last": norms[-1],
                    "effective lr": self._latest("effective_lr", target),
                    "angular update": self._latest("angular_update", target),
                    "prediction": self._latest("equilibrium_angular_update", target),
                    "e-foldings": None if elapsed == "-" else float(elapsed),
                    "verdict": verdict,
                }
            )
        return layers

    def end_table(self) -> str | None:
        """The table at the end of a fit as text; None if nothing was measured here. Sharded over ranks, all of them must call it."""
        return self._end_table(self._layers())

    def _end_table(self, layers: list[dict[str, Any]]) -> str | None:
        assert self._session is not None
        clamped = self._session.counted("clamped")
        if not layers:
            return None
        columns = ("weight", "treated how", "norm first → last", "effective lr", "angular update", "prediction", "e-foldings", "verdict")

        def cell(row: dict[str, Any], column: str) -> str:
            if column == "norm first → last":
                return f"{row['norm first']:.3g} → {row['norm last']:.3g}"
            value = row[column]
            if isinstance(value, float):
                return f"{value:.1f}" if column == "e-foldings" else f"{value:.3g}"
            return "-" if value is None else str(value)

        title = f"lightning-normdyn: after {self.history[-1]['optimizer_step']:.0f} optimizer steps"
        text = render(title, columns, [[cell(row, column) for column in columns] for row in layers])
        if clamped is not None and clamped:
            text += f"The shrink factor was clamped at 0.5 {int(clamped)} times: lr * alpha * norm is too large for these weights.\n"
        return text

    def _judge(self, target: Target) -> tuple[str, str]:
        """E-foldings elapsed, and the verdict from the drift of the norm."""
        name = target.name
        norm, angle, predicted = (f"{q}/{name}" for q in ("weight_norm", "angular_update", "equilibrium_angular_update"))
        rows = [r for r in self.history if norm in r and angle in r and predicted in r]
        if name not in self._relaxation or len(rows) < 4:
            return "-", "-" if not target.scale_invariant else "no prediction" if name not in self._relaxation else "too few rows"
        relaxation, adaptive = self._relaxation[name], "alpha" in self._influences.get(name, {})
        steps = [r["optimizer_step"] for r in rows]
        # lr x decay, up to a constant: the square of the prediction (under AWS per unit of norm).
        pulls = [r[predicted] ** 2 / (r[norm] if adaptive else 1.0) for r in rows]
        elapsed = sum((b - a) * pull / pulls[-1] for a, b, pull in zip(steps, steps[1:], pulls[1:], strict=False)) / relaxation
        window = min(relaxation, (steps[-1] - steps[0]) / 2)
        recent = [i for i, at in enumerate(steps) if at >= steps[-1] - window][-len(rows) :]
        recent = recent if len(recent) > 1 else [len(rows) - 2, len(rows) - 1]
        x = torch.tensor([steps[i] for i in recent], dtype=torch.float64)
        y = torch.tensor([2 * log(max(rows[i][norm], 1e-300)) for i in recent], dtype=torch.float64)
        drift = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
        turned, foreseen = (sqrt(sum(rows[i][key] ** 2 for i in recent) / len(recent)) for key in (angle, predicted))
        changed = max(abs(pulls[i] / pulls[-1] - 1) for i in recent)
        said = verdict(drift, relaxation, turned / foreseen, changed, angular_update=turned)
        if elapsed < SETTLED_AFTER and said.startswith("settled"):
            said = f"not settled yet ({turned / foreseen:.2g}x the prediction)"
        return f"{elapsed:.1f}", said

    def _treatment_of(self, target: Target) -> str:
        assert self._session is not None
        others = [(m, p, t) for m in self._session.members if m is not self for p in m.plans.values() for t in p.targets]
        return "; ".join(m.treatment(p, t) for m, p, t in others if t.weight is target.weight)

    def _latest(self, quantity: str, target: Target) -> float | None:
        key = f"{quantity}/{target.name}"
        if key not in set(self.history.keys()):
            return None
        values = self.history.column(key)[1]
        return float(values[-1]) if len(values) else None

    def treatment(self, plan: Plan, target: Target) -> str:
        """Measuring is not treating."""
        return ""

    def _extra(self) -> dict[str, Any]:
        return {"history": self.history.state_dict(), "last_step": self._last_step}

    def _load_extra(self, extra: dict[str, Any]) -> None:
        if "history" in extra:
            self.history.load_state_dict(extra["history"])
            self._last_step = int(extra["last_step"])
