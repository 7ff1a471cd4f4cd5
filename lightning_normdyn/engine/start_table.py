"""What a person reads in the terminal: the table of targets at the start of a fit, and where both
tables are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_normdyn.engine.messages import show
from lightning_normdyn.tables import render

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_normdyn.engine.plan import Target
    from lightning_normdyn.engine.session import Session


def print_start_table(session: Session) -> None:
    """Which weights are treated how, and what is known about their scale invariance."""
    members = [m for m in session.members if m.shows_tables]
    if not members:
        return
    first: dict[Tensor, Target] = {}
    written: set[Tensor] = set()
    for member in session.members:
        for plan in member.plans.values():
            for target in plan.targets:
                first.setdefault(target.weight, target)
                if member.writes:
                    written.add(target.weight)
    treatments = session.treatments()
    rows = []
    for weight, target in first.items():
        verdict = session.verdict(weight)
        how = treatments[weight]
        asked = target.by_request and weight in written
        kind = f"{verdict.kind} (by request)" if asked else verdict.kind
        because = (
            "; ".join(text for text in (", ".join(verdict.norms), verdict.unread_rows) if text)
            if verdict.norms
            else verdict.reason
        )
        rows.append(
            (
                target.name,
                "×".join(map(str, session.shapes[weight])),
                kind,
                str(target.partition.n),
                because,
                how or "measured",
            )
        )
    columns = ("weight", "shape", "scale-invariant", "vectors", "because of", "treated how")
    text = render(
        "lightning-normdyn: targets",
        columns,
        rows,
        noted=("treated how", "because of"),
        optional=("shape", "vectors"),
    )
    show(session.trainer, text)
