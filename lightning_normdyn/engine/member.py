"""What a fit asks of each callback of this package.

The session drives the callbacks and knows them by this protocol only, so that `NormDynCallback` can
build on the session and not the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from lightning_normdyn.engine.effect import Effect
from lightning_normdyn.engine.plan import Plan, Target
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.optimizers.decay import Decay


class Member(Protocol):
    """A callback that takes part in a fit; `NormDynCallback` is the one that does."""

    plans: dict[int, Plan]
    _matched: set[Tensor]
    _restored: dict[str, Any] | None
    _counted: dict[int, int]
    _attached_at: dict[int, int]
    _steps_of_gone: int

    @property
    def writes(self) -> bool:
        """Whether it changes weights."""

    @property
    def acts(self) -> bool:
        """Whether it is an error if it finds no weight."""

    @property
    def acts_around_steps(self) -> bool:
        """Whether it leaves a weight alone between its gradient and its update."""

    @property
    def shows_tables(self) -> bool:
        """Whether it wants the tables printed."""

    def stated_effect(self, target: Target) -> Effect:
        """What it does to ``target``."""

    def treatments(self, plan: Plan) -> list[str]:
        """How it treats each target of ``plan``, in words; every rank must call it."""

    def correct_decays(self, plan: Plan, decays: Sequence[Decay], rates: Tensor) -> None:
        """Put right, in this step, the decay ``rates`` that it changes; ``(targets,)``."""

    def steps_of(self, index: int) -> int:
        """Real steps of an optimizer that it has seen, over resumes."""

    def idle_in_words(self) -> str:
        """A sentence if it never could act; else empty."""

    def tally_in_words(self) -> str:
        """A sentence if it did not act in all steps that it was to act in; else empty."""

    def _resolve(self, index: int) -> None:
        """Make a plan for an optimizer: what is known of its weights has changed."""

    def _refuse(self, index: int, error: NormDynError, *, first: bool | None = None) -> None:
        """Raise, or stop acting on an optimizer and say so."""

    def _take_in(self, new: Mapping[Tensor, Sequence[str]], changed: Iterable[str]) -> None:
        """Weights have come; others may have had their names."""

    def _drop_handlers(self, index: int) -> None:
        """Take its handlers away from an optimizer."""

    def _check_found(self) -> None:
        """Every optimizer has stepped: refuse the fit if there is nothing to act on."""


AnyMember = TypeVar("AnyMember", bound=Member)


__all__ = ["AnyMember", "Member"]
