"""Tables as text that fit the terminal they are read in."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence

MOST_ROWS = 60
MOST_NOTES = 4
"""More different texts than this stay in the table: nobody looks up ten notes."""
LONG = 24
"""Characters beyond which a cell may become a note."""
NAME = 40
"""Characters of a name that stay on one line as long as other cells can be wrapped."""
SHORTEST_NAME = 12
GAP = 2
"""Blanks between two columns."""


def render(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    noted: Sequence[str] = (),
    optional: Sequence[str] = (),
    width: int | None = None,
    most_rows: int | None = MOST_ROWS,
) -> str:
    """A table as text that fits the terminal; the first column holds names.

    A table that is too wide moves the long, repeated cells of the columns ``noted`` into notes below it, wraps cells between words and
    names after dots, and leaves out the columns ``optional``, which it says. Nothing is ever cut off.

    Args:
        title: a line above; none if empty.
        columns: the heads.
        rows: the cells.
        noted: columns whose cells may become notes.
        optional: columns that may be left out, the most dispensable one first.
        width: columns of the terminal; None: what the terminal has, 140 where there is none.
        most_rows: what a person would still read; None: all.

    Example:
        >>> print(render("two weights", ["weight", "norm"], [["conv1.weight", "1.5"], ["conv2.weight", "2"]]))
        two weights
        <BLANKLINE>
        weight        norm
        ──────────────────
        conv1.weight  1.5
        conv2.weight  2
        <BLANKLINE>
    """
    width = max(40, width or shutil.get_terminal_size((140, 24)).columns)
    cells = [list(columns), *([*row] for row in rows[:most_rows])]
    notes, left_out = _make_room(cells, noted, optional, width)
    widths = _widths(cells, width)
    head, *body = ([_fold(cell, each, is_name=i == 0) for i, (cell, each) in enumerate(zip(row, widths, strict=True))] for row in cells)
    lines = [*([title, ""] if title else []), *_beside(head, widths), "─" * _total(widths)]
    for row in body:
        lines += _beside(row, widths)
    if len(rows) > len(cells) - 1:
        lines.append(f"... and {len(rows) - len(cells) + 1} more weights")
    if left_out:
        notes.append(f"Not shown in a terminal of {width} columns: {', '.join(left_out)}")
    for note in notes:
        lines += textwrap.wrap(note, width)
    return "\n".join(lines) + "\n"


def _make_room(cells: list[list[str]], noted: Sequence[str], optional: Sequence[str], width: int) -> tuple[list[str], list[str]]:
    """Shorten a table that is too wide, in place: the notes that it needs, and the columns that it lost."""
    if _total(_natural(cells)) <= width:
        return [], []
    left_out: list[str] = []
    while True:
        trial = [list(row) for row in cells]
        notes = _move_to_notes(trial, [column for column in noted if column not in left_out])
        dispensable = [column for column in optional if column not in left_out]
        if _total(_least(trial)) <= width or not dispensable:
            cells[:] = trial
            return notes, left_out
        left_out.append(dispensable[0])
        position = cells[0].index(dispensable[0])
        for row in cells:
            del row[position]


def _move_to_notes(cells: list[list[str]], noted: Sequence[str]) -> list[str]:
    """Put marks in the place of the long texts of these columns; the notes that explain them."""
    notes: list[str] = []
    for column in noted:
        position = cells[0].index(column)
        texts = list(dict.fromkeys(row[position] for row in cells[1:] if len(row[position]) > LONG))
        if len(texts) > MOST_NOTES:
            continue
        marks = {text: f"[{len(notes) + i}]" for i, text in enumerate(texts, start=1)}
        notes += [f"{mark} {text}" for text, mark in marks.items()]
        for row in cells[1:]:
            row[position] = marks.get(row[position], row[position])
    return notes


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _natural(cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*cells, strict=True)]


def _least(cells: Sequence[Sequence[str]]) -> list[int]:
    """Widths below which a word would be broken, or a name of ordinary length."""
    least = [max(len(word) for cell in column for word in cell.split() or [""]) for column in zip(*cells, strict=True)]
    return [min(least[0], NAME), *least[1:]]


def _widths(cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """The widest column gives way first, down to its longest word; then the names do; words are broken only at last."""
    widths, least = _natural(cells), _least(cells)
    for floor in (least, [min(least[0], SHORTEST_NAME), *least[1:]], [1] * len(widths)):
        while _total(widths) > width and any(w > f for w, f in zip(widths, floor, strict=True)):
            widths[max(range(len(widths)), key=lambda i, floor=floor: (widths[i] > floor[i], widths[i]))] -= 1  # type: ignore[misc]
    return widths


def _fold(text: str, width: int, is_name: bool) -> list[str]:
    """Lines of at most ``width`` characters: broken between words, a name also after a dot, and anywhere where neither is enough."""
    lines = [""]
    for part in re.findall(r"[^.]*\.|[^.]+" if is_name else r"\S+\s*", text):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return [line.rstrip() for line in lines]


def _beside(row: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """Folded cells as lines."""
    height = max(map(len, row))
    lines = zip(*([*cell, *[""] * (height - len(cell))] for cell in row), strict=True)
    return [(" " * GAP).join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines]
