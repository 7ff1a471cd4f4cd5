"""What a session asks of the callbacks that take part in a fit.

A callback's part in a fit (`lightning_normdyn.engine.part.Part`) is built on the session, so the
session knows it by this interface alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.decay import Decay
from lightning_normdyn.optimizers.step import Phase, Step

from .effect import Effect
from .plan import Plan, Target
from .rule import Rule


class Member(Protocol):
    """One callback's part in one fit."""

    # A property, so that it is read-only. A plain attribute of a Protocol must have exactly this
    # type, and a part whose rule is a subclass of `Rule` would not fit.
    @property
    def rule(self) -> Rule:
        """What the person has constructed."""

    matched: set[Tensor]
    """Weights that ``params`` lets in, whoever owns them."""

    restored: dict[str, Any] | None
    """The callback's state in a checkpoint, until the first step takes it up."""

    attached_at: dict[int, int]
    """By optimizer, the steps that its bracket had counted when this fit began."""

    @property
    def plans(self) -> Mapping[int, Plan]:
        """The targets by optimizer."""

    @property
    def acting_phases(self) -> set[Phase]:
        """The phases in which it may change weights."""

    @property
    def acts_around_steps(self) -> bool:
        """Whether nothing that it does lies between a gradient and the update that follows."""

    def name_of(self, weight: Tensor) -> str:
        """The first name of ``weight`` in the LightningModule."""

    def steps_of(self, index: int) -> int:
        """Real steps of optimizer ``index`` that it has seen, over resumes."""

    def resolve(self, index: int) -> None:
        """Find out which weights of optimizer ``index`` are meant, and act on them from now on."""

    def rehearse(self, index: int, step: Step) -> None:
        """Have compiled what acting on them takes, before anybody writes to a weight."""

    def refuse(
        self,
        index: int,
        error: NormDynError,
        *,
        first: bool,
    ) -> None:
        """Raise ``error`` in the first step; later stop acting, and say so."""

    def take_in(self, new: Mapping[Tensor, Sequence[str]], changed: Iterable[str]) -> None:
        """Weights with these names have come; ``changed`` names belonged to others before."""

    def replace_optimizer(
        self,
        index: int,
        gone: StepBracket | None,
        new: StepBracket,
    ) -> None:
        """Optimizer ``index`` is another one from now on, or has joined."""

    def close(self) -> None:
        """Leave no handler behind, and keep what was counted."""

    def check_found(self) -> None:
        """After every optimizer's first step: there must be something to act on."""

    def effect(self, index: int, target: Target) -> Effect:
        """What is done to ``target`` of optimizer ``index``."""

    def correct_decays(
        self,
        plan: Plan,
        decays: Sequence[Decay],
        rates: Tensor,
    ) -> None:
        """Put right what effects can only say of the usual case; see `Worker.correct_decays`."""

    def treatments(self, index: int) -> list[str]:
        """How tables say what happens to each target of optimizer ``index``; a collective."""

    def idle_in_words(self) -> str:
        """A callback that was to act and never could, in a sentence; empty for any other."""

    def tally_in_words(self) -> str:
        """In how many steps it acted, unless it did in all that it was to act in."""
