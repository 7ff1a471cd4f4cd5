"""What a person reads in the terminal: the table of targets at the start of a fit, the table of outcomes at its end."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_normdyn.callbacks.session import Session

MOST_ROWS = 60


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None) -> str:
    """A table as text: drawn by rich if it is installed, plain columns otherwise.

    Args:
        title: one line above.
        columns: the heads.
        rows: the cells.
        width: columns of the terminal; None: what the terminal has, at least 100.
    """
    hidden = max(0, len(rows) - MOST_ROWS)
    rows = rows[:MOST_ROWS]
    width = width or max(100, shutil.get_terminal_size((140, 24)).columns)
    tail = f"... and {hidden} more weights\n" if hidden else ""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        cells = [list(columns), *[list(r) for r in rows]]
        wide = [max(len(r[i]) for r in cells) for i in range(len(columns))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, wide, strict=True)).rstrip() for r in cells]
        return "\n".join([title, *lines]) + "\n" + tail
    # Names are read whole where there is room; a fixed width, because rich cuts the last columns off below a minimal one.
    names = min(48, 2 * width // 5, max((len(r[0]) for r in rows), default=1))
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", width=names if i == 0 else None)
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(table)
    return out.getvalue() + tail


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
        _, plan, target = found[0]
        how = "; ".join(text for m, p, t in found if (text := m.treatment(p, t)))
        kind = (
            verdict.kind
            if not target.by_request
            else f"{verdict.kind} (by request)"
            if any(m.writes for m, _, _ in found)
            else verdict.kind
        )
        because = ", ".join(verdict.norms) if verdict.norms else verdict.reason
        rows.append((target.name, "×".join(map(str, session.shapes[weight])), kind, str(target.partition.n), because, how or "measured"))
        del plan
    columns = ("weight", "shape", "scale-invariant", "vectors", "because of", "treated how")
    show(session.trainer, render("lightning-normdyn: targets", columns, rows))
