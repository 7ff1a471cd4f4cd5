"""Callbacks that mean the same weights: what two of them may not both do, and who comes first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from lightning_normdyn.engine.member import Member
from lightning_normdyn.engine.messages import warn_once
from lightning_normdyn.engine.target import Target
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.optimizers.bracket import StepBracket


def refuse_rivals(member: Member, weights: Iterable[Tensor], members: Sequence[Member]) -> None:
    """Refuse two callbacks of one kind on one weight.

    Args:
        member: who is to act.
        weights: on these.
        members: all callbacks of the fit.

    Raises:
        NotSupportedError: naming the weight.
    """
    for other in members:
        if other is member or other.rule.kind is not member.rule.kind:
            continue
        theirs = _targeted(other)
        if other.rule.by_name:
            theirs |= other.matched
        # A name is enough for "by name": whoever is named will be acted on as soon as it trains.
        both = [member.name_of(w) for w in weights if w in theirs]
        if both:
            more = f" and {len(both) - 1} more" if len(both) > 1 else ""
            raise NotSupportedError(
                f"Two {member.rule.kind.__name__} callbacks target `{both[0]}`{more}. "
                "Give them different `params`, or remove one."
            )


def without_unranked(
    member: Member,
    targets: list[Target],
    bracket: StepBracket,
    members: Sequence[Member],
) -> list[Target]:
    """Those targets that no callback of another kind changes in the same phase with the same rank.

    Whose turn it is must not depend on names or on the order of the list. Before the first step
    such a pair is refused; later, weights that join are left to the one who has them.

    Raises:
        NotSupportedError: naming both classes, the weight and the phase.
    """
    rule = member.rule
    for other in members:
        # Two of one kind have been refused on sight, whatever their phases.
        if other is member or other.rule.kind is rule.kind or other.rule.rank != rule.rank:
            continue
        phases = member.acting_phases & other.acting_phases
        theirs = _targeted(other)
        both = [t for t in targets if t.weight in theirs]
        if not phases or not both:
            continue
        name, others_name = type(rule).__name__, type(other.rule).__name__
        text = (
            f"{others_name} and {name} both change `{both[0].name}` in phase {min(phases).name} of "
            f"a step, and nothing says who comes first"
        )
        if bracket.steps == 0:
            raise NotSupportedError(
                f"{text}. Give one of the classes another `rank`, or the callbacks different "
                f"`params`."
            )
        warn_once(f"{text}: it is left to {others_name}.")
        targets = [t for t in targets if t.weight not in theirs]
    return targets


def _targeted(member: Member) -> set[Tensor]:
    weights: set[Tensor] = set()
    for plan in member.plans.values():
        weights.update(plan.claimed)
    return weights


__all__ = ["refuse_rivals", "without_unranked"]
