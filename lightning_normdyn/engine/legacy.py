"""For callbacks that still keep the state of a fit themselves; goes when both monitors have workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.effect import NoEffect
from lightning_normdyn.engine.part import Part
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.optimizers.step import Phase
from lightning_normdyn.optimizers.views import torch_optimizers


class _Worker(Worker[Any]):
    def __init__(self, part: Any, plan: Any) -> None:
        super().__init__(part, plan)
        self.rule.on_plan(plan, plan.bracket)

    def effect(self, target: Any) -> Any:
        return NoEffect()

    def treatment(self, target: Any) -> str:
        return ""


def _acting(phase: Phase) -> Any:
    @during(phase)
    def act(self: Any, step: Any) -> None:
        self.rule.handlers()[phase](step, self.plan)

    return act


class _Part(Part[Any]):
    def check_weight(self, weight: Tensor, name: str) -> None:
        super().check_weight(weight, name)
        self.rule._check_weight(weight, name)

    def forget(self, name: str) -> None:
        super().forget(name)
        self.rule._forget_weight(name)

    def extra(self) -> dict[str, Any]:
        return self.rule._extra()  # type: ignore[no-any-return]

    def load_extra(self, extra: dict[str, Any]) -> None:
        self.rule._load_extra(extra)


class LegacyCallback(NormDynCallback):
    """Keeps the state of a fit itself."""

    part = _Part

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        phases = (Phase.MEASURE, Phase.MEASURE_STEP) if "Dynamics" in cls.__name__ else ()
        cls.worker = type(
            "Work",
            (_Worker,),
            {**{p.name.lower(): _acting(p) for p in phases}, "effect": _Worker.effect},
        )

    @property
    def kind(self) -> type:
        """The class below this one."""
        return type(self).__mro__[type(self).__mro__.index(LegacyCallback) - 1]

    def __getstate__(self) -> dict[str, Any]:
        """Without the fit."""
        other = object.__new__(type(self))
        vars(other).update({**super().__getstate__(), "_stored": None})
        other._forget()
        return vars(other)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()

    @property
    def _session(self) -> Any:
        return None if self._member is None else self._member.session

    @property
    def _restored(self) -> Any:
        part = self._member
        return self._stored if part is None or part.restored is None else part.restored

    @_restored.setter
    def _restored(self, state: Any) -> None:
        if state is None or self._member is None:
            self._stored = state
        else:
            self._member.restored = state

    @property
    def _by_name(self) -> bool:
        return self.by_name

    @property
    def _matched(self) -> Any:
        return self.member.matched

    def handlers(self) -> dict[Phase, Callable[..., None]]:
        """Phases."""
        raise NotImplementedError

    def on_plan(self, plan: Any, bracket: Any) -> None:
        """Prepare."""

    def number(self, step: Any, plan: Any) -> int:
        """Over resumes."""
        return int(plan.number(step))

    def _forget(self) -> None: ...
    def _forget_weight(self, name: str) -> None: ...
    def _check_weight(self, weight: Tensor, name: str) -> None: ...
    def _extra(self) -> dict[str, Any]:
        return {}

    def _load_extra(self, extra: Any) -> None: ...
    def _check_extra(self, extra: Any, where: str) -> None: ...
    def check_extra(self, extra: Any, where: str) -> None:
        """Check."""
        self._check_extra(extra, where)

    def _check_patterns(self, trainer: Any) -> None:
        self.member.check_patterns([p for o in trainer.optimizers for p in torch_optimizers(o)])

    def _can_measure(self, weight: Any) -> bool:
        return self.member.can_treat(weight)

    def _select(self, owned: Any) -> Any:
        return self.member.select(owned)

    def _target(self, weight: Any) -> Any:
        return self.member.target(weight)
