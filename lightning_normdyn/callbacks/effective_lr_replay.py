"""Replay of a recorded effective learning rate: what weight decay does, without weight decay."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_normdyn.callbacks.base import NormDynCallback, Plan, Target, warn_once
from lightning_normdyn.errors import NormDynError, NotSupportedError
from lightning_normdyn.functional import norm_from_sums
from lightning_normdyn.history import load_history
from lightning_normdyn.steps import Phase, Step, StepBracket


class EffectiveLRReplay(NormDynCallback):
    r"""Trains with the effective learning rates of another run: each step is scaled, per weight vector, by

    .. math:: \left(\frac{n}{n_{ref}}\right)^2 \frac{1 - d}{1 - d_{ref}}

    with :math:`n`, :math:`n_{ref}` the norms of this run and of the recorded one before the step, and :math:`d`, :math:`d_{ref}` the decay
    that each applies in the step (WRS paper, "scale lr", with the norm ratio squared and the decay accounted for). A run without weight
    decay then turns its weights as the recorded run with decay did: what the decay did was its effective learning rate.

    Exact for plain SGD; approximate with momentum (it says so). Between recorded steps, norms are interpolated.

    Args:
        history: file saved from ``NormDynamicsMonitor(every_n_steps=1, per_vector=True).history``.
        uniform: one factor for all weights and all steps, the geometric mean of what the recorded decay amounts to: the paper's control,
            which does not follow the recorded directions.
        params: ``"auto"`` (scale-invariant weights), a glob pattern, or a list of them.
        granularity: as in the recorded run.

    Raises:
        NormDynError: for a file that is damaged, holds no per-vector norms, or comes from another architecture.

    Example:
        >>> from lightning_normdyn import EffectiveLRReplay
        >>> EffectiveLRReplay("run/history.npz").uniform
        False
    """

    def __init__(
        self,
        history: str | os.PathLike[str],
        *,
        uniform: bool = False,
        params: str | list[str] = "auto",
        granularity: Literal["auto", "filter", "group", "layer"] = "auto",
    ) -> None:
        super().__init__(params, granularity)
        self.path = os.fspath(history)
        self.uniform = uniform
        self._steps: list[int] = []
        self._log_norms: dict[int, list[Tensor]] = {}
        self._decays: dict[int, list[Tensor]] = {}
        self._factors: dict[int, Tensor] = {}
        self._mean_log = 0.0
        self._told: set[str] = set()

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {"history": self.path, "uniform": self.uniform}

    def handlers(self) -> dict[Phase, Callable[[Step, Plan], None]]:
        """Looks at `ready`, scales the step at `stepped`."""
        return {Phase.MEASURE: self._look, Phase.PROJECT: self._scale}

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """The factor is SGD's: its steps are proportional to the gradient."""
        if weights and not isinstance(optimizer, SGD):
            raise NotSupportedError(
                f"EffectiveLRReplay scales steps by a ratio of squared norms, which is right for SGD, but the optimizer is "
                f"{type(optimizer).__name__}. Use torch.optim.SGD in both runs."
            )

    def on_plan(self, plan: Plan, bracket: StepBracket) -> None:
        """Read the record, and refuse one of another architecture."""
        history = load_history(self.path)
        known = set(history.vector_names())
        if not any(name.startswith("weight_norm/") for name in known):
            raise NormDynError(
                f"`{self.path}` holds no per-vector norms. Record it with NormDynamicsMonitor(every_n_steps=1, per_vector=True) and "
                "save its history."
            )
        norms, decays = [], []
        for target in plan.targets:
            key = f"weight_norm/{target.name}"
            if key not in known:
                there = sorted(n.partition("/")[2] for n in known if n.startswith("weight_norm/"))
                raise NormDynError(
                    f"`{self.path}` comes from another model: it has no weight `{target.name}`, but {', '.join(there[:4])}. "
                    "Replay it on the same architecture."
                )
            steps, values = history.vectors(key)
            if values.shape[1] != target.partition.n:
                raise NormDynError(
                    f"`{self.path}` comes from another model: `{target.name}` had {values.shape[1]} vectors there and has "
                    f"{target.partition.n} here. Replay it on the same architecture."
                )
            self._steps = [int(s) for s in steps]
            norms.append(torch.from_numpy(values.copy()))
            decays.append(torch.from_numpy(history.vectors(f"decay/{target.name}")[1].copy()))
        # On the host until a row is wanted: for each weight, s recorded steps of all its vectors.
        self._log_norms[plan.index] = [n.double().log() for n in norms]
        self._decays[plan.index] = [d.double() for d in decays]
        self._mean_log = self._mean_log_factor(self._decays[plan.index])
        if any(group.get("momentum") for group, _ in plan.groups):
            self._say("momentum", "EffectiveLRReplay is exact for plain SGD; with momentum the recorded rates are followed approximately.")
        if any(b - a > 1 for a, b in zip(self._steps, self._steps[1:], strict=False)):
            self._say("gaps", f"`{self.path}` was not recorded at every step; norms in between are interpolated.")

    def _mean_log_factor(self, decays: list[Tensor]) -> float:
        """Mean over steps and vectors of the log factor that the recorded decay amounts to in a run without decay (AWS paper, eq. 16)."""
        steps = torch.tensor(self._steps, dtype=torch.float64)
        gaps = torch.diff(steps, append=steps[-1:] + 1)[:, None]
        log_kept = torch.log1p(-torch.cat(decays, dim=1))
        shrunk = torch.cumsum(log_kept * gaps, dim=0) - log_kept * gaps  # of p, the length that is left, before each step
        return float(((-2 * shrunk - log_kept) * gaps).nanmean(dim=1).sum() / gaps.sum())

    def _say(self, key: str, text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            warn_once(text)

    def _recorded(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Log norm and decay of the recorded run at the present step, ``(n,)`` each."""
        assert self._session is not None
        now = self._session.trainer.fit_loop.epoch_loop._batches_that_stepped
        steps, log_norms, decays = self._steps, self._log_norms[plan.index], self._decays[plan.index]
        after = min(bisect_right(steps, now), len(steps) - 1)
        before = max(after - 1, 0) if steps[after] > now else after
        if now > steps[-1]:
            self._say("end", f"`{self.path}` ends at step {steps[-1]}; its last norms are held from there on.")
        share = (now - steps[before]) / (steps[after] - steps[before]) if steps[after] > steps[before] else 0.0
        share = min(max(share, 0.0), 1.0)

        def at(tables: list[Tensor]) -> Tensor:
            return plan.vectors.scatter([torch.lerp(t[before], t[after], share) for t in tables])

        return at(log_norms), at(decays)

    def _look(self, step: Step, plan: Plan) -> None:
        vectors = plan.vectors
        step.bracket.request_snapshot(vectors.storages())
        weights = vectors.values()
        norm = norm_from_sums(vectors.inner((weights, weights))[0])
        log_reference, reference_decay = self._recorded(plan)
        assert self._session is not None
        decay = self._session.applied_decay(plan, norm)
        factor = 2 * (norm.log() - log_reference) + torch.log1p(-decay) - torch.log1p(-reference_decay)
        if self.uniform:
            factor = torch.full_like(factor, self._mean_log)
        self._factors[plan.index] = plan.guard(factor.exp(), 1.0, step)

    def _scale(self, step: Step, plan: Plan) -> None:
        vectors, factor = plan.vectors, self._factors.pop(plan.index)
        # w' = (1 - d) s + step, with d the decay that the optimizer itself applied: only the step is scaled.
        kept = 1 - plan.optimizer_decay(step)
        vectors.scale_(factor)
        vectors.add_scaled_((1 - factor) * kept, vectors.snapshots(step.bracket))

    def treatment(self, plan: Plan, target: Target) -> str:
        """What the start table says."""
        return "replays a recorded effective lr"

    def influence(self, target: Target) -> dict[str, Any]:
        """For predictions: nobody has derived any for steps of a recorded length."""
        return {"scales_steps": True}
