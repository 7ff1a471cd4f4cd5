"""Weights that a rule is refused by name: on which it would have no effect, and which another
callback means, too, that cannot act beside it."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.recognition import sets_weights_back
from lightning_normdyn.optimizers.wrappers import copies_of_weights

from .member import Member
from .messages import named, warn_once
from .plan import Plan, Target


def refuse_copies(
    name: str,
    optimizer: Optimizer,
    targets: Sequence[Target],
) -> None:
    """Refuse to change weights that the optimizer sets back to a copy of its own.

    Args:
        name: of the callback.
        optimizer: as it is now; most have no copy before their first step.
        targets: the weights.

    Raises:
        NotSupportedError: naming a weight.
    """
    kind = type(optimizer).__name__
    left = sets_weights_back(optimizer)
    if left is not None:
        raise NotSupportedError(
            f"{kind} sets weights back to points that it remembers: of a change made to "
            f"weights from outside, a trial found {left:.0%} left a dozen steps later. That "
            f"would undo what {name} does to `{targets[0].name}`. Use an optimizer that "
            f"steps from where a weight is, such as AdamW or SGD, or remove the callback."
        )
    # A sharded weight lies beside a sharded copy, and ranks might find different things.
    plain = [t for t in targets if type(t.weight.data) is Tensor]
    copies = copies_of_weights(optimizer, [t.weight for t in plain])
    if copies:
        raise NotSupportedError(
            f"{kind} keeps a second copy of the weights ({named(copies)}) and moves them "
            f"towards it, which would undo what {name} does to `{plain[0].name}`. Use the "
            f"optimizer without that copy, or remove the callback."
        )


def find_zeros(plan: Plan, *, any_vector: bool = False) -> dict[str, int]:
    """How many vectors are zero, by name, of targets that are new in this plan and cannot be
    treated; every rank must call it.

    Args:
        plan: the targets.
        any_vector: whether one vector of zeros is enough; else all of a weight must be.
    """
    # A target that was there before has had a length: it may pass through zero later.
    if plan.before.keys() >= {t.name for t in plan.targets}:
        return {}
    is_zero = plan.vectors.norms() == 0
    counts = plan.vectors.totals(is_zero.to(plan.vectors.sum_dtype)).tolist()
    zeros = {}
    for target, count in zip(plan.targets, counts, strict=True):
        least = 1 if any_vector else target.partition.n
        if count >= least and target.name not in plan.before:
            zeros[target.name] = int(count)
    return zeros


def refuse_zeros(
    name: str,
    zeros: Mapping[str, int],
    *,
    is_error: bool,
    way_out: str = "",
) -> None:
    """Refuse weights that have no length and no direction.

    Args:
        name: of the callback.
        zeros: the weights, and how many of their vectors are zero.
        is_error: before the first step of a fresh run; later they are left alone with a warning.
        way_out: what a person may do instead, where one vector of zeros is enough.

    Raises:
        NotSupportedError: naming the weights and a way out.
    """
    text = (
        f"{name} was to act on {named(list(zeros))}, but all entries are zero: that has no length "
        f"and no direction, so nothing would be done to it"
    )
    first = next(iter(zeros))
    ways_out = f"Initialize it with other numbers, or leave it out with params=[..., '!{first}']."
    if way_out:
        counted = [f"{count} of `{weight}`" for weight, count in zeros.items()]
        text = (
            f"{name} was to hold vectors at their initial norm, but some are zero: "
            f"{', '.join(counted[:4])}{' ...' if len(counted) > 4 else ''}"
        )
        ways_out = f"{way_out} {ways_out}"
    if is_error:
        raise NotSupportedError(f"{text}. {ways_out}")
    warn_once(f"{text}; it is left to its optimizer.")


def refuse_16_bits(name: str, plan: Plan) -> None:
    """Refuse weights that are stored in bfloat16 or float16 without a float32 copy that the
    optimizer steps: what a rule does within one step is less than their rounding.

    Args:
        name: of the callback.
        plan: the targets, as the optimizer has them.

    Raises:
        NotSupportedError: naming the weights and a way out.
    """
    if not plan.vectors.low_precision:
        return
    stored = zip(plan.vectors.names, plan.vectors.values(), strict=True)
    coarse = [weight for weight, value in stored if value.dtype.itemsize < 4]
    raise NotSupportedError(
        f"{name} is about what single steps change, but {named(coarse)} lies in 16 bits, "
        f"whose rounding is larger than that. Keep the weights in float32: "
        f"Trainer(precision='bf16-mixed') instead of 'bf16-true', or leave it out with "
        f"params=[..., '!{coarse[0]}']."
    )


def refuse_rivals(
    member: Member,
    weights: Iterable[Tensor],
    members: Sequence[Member],
) -> None:
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
        theirs = _meant(other)
        both = [member.name_of(w) for w in weights if w in theirs]
        if both:
            more = f" and {len(both) - 1} more" if len(both) > 1 else ""
            raise NotSupportedError(
                f"Two {member.rule.kind.__name__} callbacks target `{both[0]}`{more}. "
                "Give them different `params`, or remove one."
            )


def refuse_clashes(
    member: Member,
    weights: Iterable[Tensor],
    members: Sequence[Member],
) -> None:
    """Refuse two callbacks of different kinds on one weight, if one of them says that they cannot
    share it.

    Args:
        member: who is to act.
        weights: on these.
        members: all callbacks of the fit.

    Raises:
        NotSupportedError: naming both classes, the weight and the reason.
    """
    asked = list(weights)
    rule, kind = member.rule, member.rule.kind.__name__
    for other in members:
        if other is member:
            continue
        others_kind = other.rule.kind.__name__
        reason = rule.refuses_beside.get(others_kind) or other.rule.refuses_beside.get(kind)
        if not reason:
            continue
        both = [member.name_of(w) for w in asked if w in _meant(other)]
        if both:
            more = f" and {len(both) - 1} more" if len(both) > 1 else ""
            raise NotSupportedError(
                f"{kind} and {others_kind} both target `{both[0]}`{more}, but {reason}. Give them "
                f"different `params`, or remove one."
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


def _meant(member: Member) -> set[Tensor]:
    """What a callback acts on, and what it will act on."""
    # A name is enough for "by name": whoever is named will be acted on as soon as it trains.
    return _targeted(member) | (member.matched if member.rule.by_name else set())


def _targeted(member: Member) -> set[Tensor]:
    return set[Tensor]().union(*(plan.claimed for plan in member.plans.values()))
