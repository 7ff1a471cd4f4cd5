"""What a person reads in the terminal: the table of targets at the start of a fit, and where both tables are printed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lightning_normdyn.tables import render

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_normdyn.callbacks.session import Session


def show(trainer: Trainer, text: str) -> None:
    """Print on rank zero, above a progress bar if there is one."""
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.print(text)
    else:
        sys.stdout.write(text + "\n")


def print_start_table(session: Session) -> None:
    """Which weights are treated how, and what is known about their scale invariance."""
    members = [m for m in session.members if m.shows_tables]
    if not members:
        return
    weights = list(dict.fromkeys(t.weight for m in session.members for p in m.plans.values() for t in p.targets))
    rows = []
    for weight in weights:
        verdict = session.verdict(weight)
        found = [(m, p, t) for m in session.members for p in m.plans.values() for t in p.targets if t.weight is weight]
        target = found[0][2]
        how = "; ".join(text for m, p, t in found if (text := m.treatment(p, t)))
        asked = target.by_request and any(m.writes for m, _, _ in found)
        kind = f"{verdict.kind} (by request)" if asked else verdict.kind
        because = ", ".join(verdict.norms) if verdict.norms else verdict.reason
        rows.append((target.name, "×".join(map(str, session.shapes[weight])), kind, str(target.partition.n), because, how or "measured"))
    columns = ("weight", "shape", "scale-invariant", "vectors", "because of", "treated how")
    text = render("lightning-normdyn: targets", columns, rows, noted=("treated how", "because of"), optional=("shape", "vectors"))
    show(session.trainer, text)
