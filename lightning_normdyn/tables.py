"""Tables as text that fit the terminal they are read in."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence

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
_PATH = re.compile(r"[A-Za-z_]\w*\.\w")
"""The beginning of a module path, in whatever column it stands; a number such as 0.0014 is none."""


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

    A table that is too wide moves the long, repeated cells of the columns ``noted`` into notes
    below it, wraps cells between words and
    module paths after dots, and leaves out the columns ``optional``, which it says. Nothing is ever
    cut off.

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
    width = _terminal(width)
    cells = [list(columns), *([*row] for row in rows[:most_rows])]
    notes, left_out = _make_room(cells, noted, optional, width)
    widths = _widths(cells, width)
    head, *body = (
        [
            _fold(cell, each, is_name=i == 0)
            for i, (cell, each) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    )
    lines = [*([title, ""] if title else []), *_beside(head, widths), "─" * _total(widths)]
    for row in body:
        lines += _beside(row, widths)
    if len(rows) > len(cells) - 1:
        lines.append(f"... and {len(rows) - len(cells) + 1} more weights")
    if left_out:
        notes.append(f"Not shown in a terminal of {width} columns: {', '.join(left_out)}")
    for note in notes:
        lines += _fold(note, width)
    return "\n".join(lines) + "\n"


def paragraph(text: str, width: int | None = None) -> str:
    """A sentence below a table, folded like its cells: between words, and module paths after dots.

    Args:
        text: one line.
        width: columns of the terminal; None: what the terminal has, 140 where there is none.

    Example:
        >>> print(paragraph("clamped 3 times: model.layers.10.self_attention.query.weight", width=40), end="")
        clamped 3 times: model.layers.10.
        self_attention.query.weight
    """
    return "\n".join(_fold(text, _terminal(width))) + "\n"


def _terminal(width: int | None) -> int:
    return max(40, width or shutil.get_terminal_size((140, 24)).columns)


def _make_room(
    cells: list[list[str]], noted: Sequence[str], optional: Sequence[str], width: int
) -> tuple[list[str], list[str]]:
    """Shorten a table that is too wide, in place: the notes that it needs, and the columns that it
    lost."""
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


def _pieces(text: str, is_name: bool = False) -> list[str]:
    """What stays in one line if there is room: words with the blanks behind them, of a module path
    each part with its dot."""
    pieces: list[str] = []
    for word in re.findall(r"\s*\S+\s*", text):
        at_dots = is_name or _PATH.search(word)
        pieces += re.findall(r"[^.]*\.|[^.]+", word) if at_dots else [word]
    return pieces


def _longest(cells: Sequence[Sequence[str]], split: Callable[[str, bool], list[str]]) -> list[int]:
    """The length of the longest part of each column; the first column holds names."""
    columns = zip(*cells, strict=True)
    return [
        max(len(part.strip()) for cell in column for part in split(cell, i == 0) or [""])
        for i, column in enumerate(columns)
    ]


def _least(cells: Sequence[Sequence[str]]) -> list[int]:
    """Widths below which a word, a part of a path or a name of ordinary length would be broken."""
    whole_name = _longest(cells, lambda text, _: text.split())[0]
    return [min(whole_name, NAME), *_longest(cells, _pieces)[1:]]


def _widths(cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """The widest column gives way first, down to its longest word; then the names do; words are
    broken only at last."""
    widths, least, parts = _natural(cells), _least(cells), _longest(cells, _pieces)
    floors = (
        least,
        [min(least[0], parts[0]), *least[1:]],  # names are folded after every dot, if need be
        [min(least[0], SHORTEST_NAME), *least[1:]],
        [1] * len(widths),
    )
    for floor in floors:
        while _total(widths) > width and any(w > f for w, f in zip(widths, floor, strict=True)):
            # The widest column that is still wider than its floor gives up one character.
            shrinkable = [i for i, w in enumerate(widths) if w > floor[i]]
            widest = max(shrinkable, key=widths.__getitem__)
            widths[widest] -= 1
    return widths


def _fold(text: str, width: int, is_name: bool = False) -> list[str]:
    """Lines of at most ``width`` characters: broken between words and after the dots of paths,
    within a word only where nothing else
    is enough, and then after an underscore if there is one."""
    lines = [""]
    for piece in _pieces(text, is_name):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
        while len(lines[-1].rstrip()) > width:
            end = lines[-1].rfind("_", 0, width) + 1 or width
            lines[-1:] = [lines[-1][:end], lines[-1][end:]]
    return [line.rstrip() for line in lines]


def _beside(row: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """Folded cells as lines."""
    height = max(map(len, row))
    lines = zip(*([*cell, *[""] * (height - len(cell))] for cell in row), strict=True)
    return [
        (" " * GAP)
        .join(part.ljust(width) for part, width in zip(line, widths, strict=True))
        .rstrip()
        for line in lines
    ]
