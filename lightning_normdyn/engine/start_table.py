"""The table of targets that a person reads at the start of a fit: which weights are treated how,
and what is known about their scale invariance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lightning_normdyn.engine.member import Member
from lightning_normdyn.engine.target import Target
from lightning_normdyn.invariance.verdict import Verdict
from lightning_normdyn.tables import render

COLUMNS = ("weight", "shape", "scale-invariant", "vectors", "because of", "treated how")


def start_table(
    members: Sequence[Member],
    treatments: Mapping[Tensor, str],
    verdict_of: Callable[[Tensor], Verdict],
    shapes: Mapping[Tensor, Sequence[int]],
) -> str:
    """The table as text, one line for each target.

    Args:
        members: the callbacks of the fit.
        treatments: how they treat each target, in words; empty for one that is only measured.
        verdict_of: what is known about a weight.
        shapes: of the weights.
    """
    targets: dict[Tensor, Target] = {}
    written: set[Tensor] = set()
    for member in members:
        for plan in member.plans.values():
            for target in plan.targets:
                # Of several callbacks on one weight, the first says what its vectors are.
                targets.setdefault(target.weight, target)
                # A monitor measures every weight: that is no request to change one.
                if member.rule.writes:
                    written.add(target.weight)
    rows = []
    for weight, target in targets.items():
        verdict = verdict_of(weight)
        kind = verdict.kind
        if target.by_request and weight in written:
            kind = f"{kind} (by request)"
        row = (
            target.name,
            "×".join(map(str, shapes[weight])),
            kind,
            str(target.partition.n),
            _because(verdict),
            treatments[weight] or "measured",
        )
        rows.append(row)
    return render(
        "lightning-normdyn: targets",
        COLUMNS,
        rows,
        noted=("treated how", "because of"),
        optional=("shape", "vectors"),
    )


def _because(verdict: Verdict) -> str:
    """The normalizations that make a weight scale-invariant, or what speaks against it."""
    if not verdict.norms:
        return verdict.reason
    norms = ", ".join(verdict.norms)
    return f"{norms}; {verdict.unread_rows}" if verdict.unread_rows else norms
