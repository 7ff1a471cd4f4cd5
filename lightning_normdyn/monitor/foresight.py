"""When a monitor forecasts its fit, whom it tells, and that no forecast ever ends a fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_normdyn.engine.flavours import Trainer
from lightning_normdyn.engine.messages import show, warn_once

from .forecasts import Forecasts
from .ledger import Ledger
from .measure import StepGauge

__all__ = ["Foresight"]


class Foresight:
    """The forecasts of one fit, on rank zero.

    Schedulers, optimizers and loaders are anybody's code. If what they hold cannot be forecast, one
    warning says so, and the fit goes on without.

    Args:
        trainer: of the fit.
        rule: the monitor; its history takes the texts up, for reports.
    """

    def __init__(self, trainer: Trainer, rule: Any) -> None:
        self._trainer = trainer
        self._rule = rule
        self._forecasts: Forecasts | None = None
        self._counted: list[int] = []
        # Of the optimizers that were told of in this fit.
        self._started: list[str] = []

    def begin(self, optimizers: Sequence[Optimizer], counted: Sequence[int]) -> None:
        """Step the schedulers ahead, before the fit steps them.

        Args:
            optimizers: those that step.
            counted: steps that each has made, over resumes.
        """
        if self._trainer.barebones or not self._trainer.is_global_zero:
            return
        self._counted = list(counted)
        self._forecasts = self._attempt(lambda: Forecasts(self._trainer, optimizers))

    def tell(self, gauges: Mapping[int, StepGauge], ledger: Ledger) -> None:
        """Print what is foreseen of optimizers whose first row has arrived.

        Args:
            gauges: by optimizer.
            ledger: all that is recorded so far.
        """
        forecasts = self._forecasts
        if forecasts is None or not forecasts.has_more:
            return
        arrived = {index: g for index, g in gauges.items() if index in ledger.counted}
        new = forecasts.awaited(arrived)
        if not new:
            return
        text = self._attempt(lambda: forecasts.at_start(new, ledger.expectations, ledger.balances))
        if text:
            self._keep_start(text)
            if self._rule.tables:
                show(self._trainer, text)

    def at_end(
        self, gauges: Mapping[int, StepGauge], ledger: Ledger, counted: Sequence[int]
    ) -> str:
        """The forecast of the same run with what it has shown; empty where there is none.

        Args:
            gauges: by optimizer.
            ledger: all that is recorded.
            counted: steps that each optimizer has made, over resumes.
        """
        forecasts = self._forecasts
        if forecasts is None:
            return ""
        # An optimizer that came later has no forecast.
        made = [now - before for now, before in zip(counted, self._counted, strict=False)]
        text = self._attempt(lambda: forecasts.at_end(gauges, ledger.balances, made))
        if text:
            self._keep("end", text)
        return text or ""

    def _attempt(self, forecast: Callable[[], Any]) -> Any:
        try:
            return forecast()
        except Exception as error:
            self._forecasts = None
            warn_once(f"there is no forecast of this fit ({type(error).__name__}: {error}).")
            return None

    def _keep_start(self, text: str) -> None:
        known = self._rule.history.meta.get("forecast", {})
        # What was foreseen before the first step of the run is not that of a fit that goes on.
        if "start" in known and not self._started:
            return
        # Optimizers that step later (a GAN's) are told of by themselves.
        self._started.append(text)
        self._keep("start", "\n".join(self._started))

    def _keep(self, when: str, text: str) -> None:
        meta = self._rule.history.meta
        meta["forecast"] = {**meta.get("forecast", {}), when: text}
