"""Tables as text that fit the terminal they are read in: the one place that lays out rows and
columns."""

import re
import shutil
from collections.abc import Iterable, Sequence
from itertools import zip_longest

# What a person would still read.
MOST_ROWS = 60
# More different texts than this stay in the table: nobody looks up ten notes.
MOST_NOTES = 6
# Characters beyond which a cell may become a note.
LONG = 24
# Characters of a name that stay on one line as long as other cells can be wrapped.
NAME = 40
SHORTEST_NAME = 12
# Characters of a line in which a sentence can be read.
SENTENCE = 32
GAP = "  "
# The beginning of a module path, in whatever column it stands. A number such as 0.0014 is none.
_PATH = re.compile(r"[A-Za-z_]\w*\.\w")

# Rows of which the same is said that become one.
LEAST_FOLDED = 4
# By column: the head, then the cells.
Table = list[list[str]]


def render(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    noted: Sequence[str] = (),
    optional: Sequence[str] = (),
    roomy: Sequence[str] = (),
    width: int | None = None,
    most_rows: int | None = MOST_ROWS,
) -> str:
    """A table as text that fits the terminal; the first column holds names.

    A table that is too wide moves the long, repeated cells of the columns ``noted`` into notes
    below it, wraps cells between words and module paths after dots, and leaves out the columns
    ``optional``, which it says. Nothing is ever cut off.

    Args:
        title: a line above; none if empty.
        columns: the heads.
        rows: the cells.
        noted: columns whose cells may become notes.
        optional: columns that may be left out, the most dispensable one first.
        roomy: columns of sentences, which get room for several words before optional columns do.
        width: columns of the terminal; None: what the terminal has, 140 where there is none.
        most_rows: what a person would still read; None: all.

    Example:
        >>> rows = [["conv1.weight", "1.5"], ["conv2.weight", "2"]]
        >>> print(render("two weights", ["weight", "norm"], rows))
        two weights
        <BLANKLINE>
        weight        norm
        ──────────────────
        conv1.weight  1.5
        conv2.weight  2
        <BLANKLINE>
    """
    width = _terminal(width)
    shown = rows[:most_rows]
    table = [list(texts) for texts in zip(columns, *shown, strict=True)]
    table, notes = _make_room(table, noted, optional, roomy, width)
    widths = _widths(table, roomy, width)

    lines = [title, ""] if title else []
    head, *body = zip(*table, strict=True)
    lines += _beside(head, widths)
    lines.append("─" * _total(widths))
    for texts in body:
        lines += _beside(texts, widths)
    if len(rows) > len(shown):
        lines.append(f"... and {len(rows) - len(shown)} more weights")
    for note in notes:
        lines += _fold(note, width)
    return "\n".join(lines) + "\n"


def name_skeleton(name: str) -> str:
    """A name without its numbers: what is alike of layers that are built alike.

    Example:
        >>> name_skeleton("layer1.0.conv2.weight")
        'layer#.#.conv#.weight'
    """
    return re.sub(r"\d+", "#", name)


def name_pattern(names: Sequence[str]) -> str:
    """One name for several with the same `name_skeleton`; empty for others.

    Example:
        >>> name_pattern(["layer1.0.conv1", "layer1.0.conv2", "layer1.3.conv1"])
        'layer1.*.conv*'
        >>> name_pattern(["stem", "head"])
        ''
    """
    if len(set(map(name_skeleton, names))) > 1:
        return ""
    # Texts and numbers in turn, as many of every name.
    columns = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(parts[0] if len(set(parts)) == 1 else "*" for parts in columns)


def without_empty(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows without the columns in which no row says anything.

    Example:
        >>> without_empty(["weight", "why not"], [["conv", ""], ["fc", ""]])
        (['weight'], [['conv'], ['fc']])
    """
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def aligned(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> str:
    """The same table without a rule and a line per row, however long.

    Example:
        >>> print(aligned(["weight", "norm"], [["conv1.weight", "1.5"]]))
        weight        norm
        conv1.weight  1.5
    """
    lines = [columns, *rows]
    widths = _natural(zip(*lines, strict=True))
    return "\n".join(_line(texts, widths) for texts in lines)


def paragraph(text: str, width: int | None = None) -> str:
    """A sentence below a table, folded like its cells: between words, and module paths after dots.

    Args:
        text: one line.
        width: columns of the terminal; None: what the terminal has, 140 where there is none.

    Example:
        >>> text = "clamped 3 times: model.layers.10.self_attention.query.weight"
        >>> print(paragraph(text, width=40), end="")
        clamped 3 times: model.layers.10.
        self_attention.query.weight
    """
    return "\n".join(_fold(text, _terminal(width))) + "\n"


def _terminal(width: int | None) -> int:
    # In a narrower one nothing could be read.
    return max(40, width or shutil.get_terminal_size((140, 24)).columns)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _natural(table: Iterable[Sequence[str]]) -> list[int]:
    """The widths at which no cell is folded."""
    return [max(map(len, texts)) for texts in table]


def _make_room(
    table: Table,
    noted: Sequence[str],
    optional: Sequence[str],
    roomy: Sequence[str],
    width: int,
) -> tuple[Table, list[str]]:
    """A table that is too wide with notes in the place of long cells, and without the columns that
    still do not fit; and these notes."""
    if _total(_natural(table)) <= width:
        return table, []
    left_out: list[str] = []
    while True:
        shorter, notes = _with_notes(table, noted)
        least, *_ = _floors(shorter, roomy)
        if _total(least) <= width or len(left_out) == len(optional):
            break
        dispensable = optional[len(left_out)]
        left_out.append(dispensable)
        table = [texts for texts in table if texts[0] != dispensable]
    if left_out:
        notes.append(f"Not shown in a terminal of {width} columns: {', '.join(left_out)}")
    return shorter, notes


def _with_notes(
    table: Table,
    noted: Sequence[str],
) -> tuple[Table, list[str]]:
    """The table with marks in the place of the long texts of some columns, and the notes that
    explain the marks."""
    notes: list[str] = []
    # In the order of `noted`, so that the notes of the first one come first.
    by_head = {texts[0]: texts for texts in table}
    for head in noted:
        texts = by_head.get(head, [])
        long_texts = dict.fromkeys(text for text in texts[1:] if len(text) > LONG)
        if len(long_texts) > MOST_NOTES:
            continue
        for text in long_texts:
            mark = f"[{len(notes) + 1}]"
            notes.append(f"{mark} {text}")
            texts = [mark if cell == text else cell for cell in texts]
        by_head[head] = texts
    return [by_head[texts[0]] for texts in table], notes


def _floors(table: Table, roomy: Sequence[str]) -> tuple[list[int], ...]:
    """How narrow each column may become, one after the other, as long as the table is too wide."""
    words = [_longest(_pieces(" ".join(texts))) for texts in table]
    readable = []
    for texts, word in zip(table, words, strict=True):
        wanted = min(SENTENCE, _longest(texts)) if texts[0] in roomy else 0
        readable.append(max(word, wanted))
    # The first column holds names: those of ordinary length stay whole at first.
    names = " ".join(table[0])
    name = min(_longest(names.split()), NAME)
    part = _longest(_pieces(names, is_name=True))
    return (
        [name, *readable[1:]],
        [name, *words[1:]],
        # Then they are folded after every dot.
        [min(name, part), *words[1:]],
        [min(name, SHORTEST_NAME), *words[1:]],
        [1] * len(table),
    )


def _longest(texts: Sequence[str]) -> int:
    return max(map(len, map(str.strip, texts)), default=0)


def _widths(table: Table, roomy: Sequence[str], width: int) -> list[int]:
    """The widest column gives way first, down to its longest word; then the names do; words are
    broken only at last."""
    widths = _natural(table)
    for floor in _floors(table, roomy):
        while _total(widths) > width:
            shrinkable = [i for i, least in enumerate(floor) if widths[i] > least]
            if not shrinkable:
                break
            # One character at a time, from the widest of those that are still wider than they must
            # be.
            widest = max(shrinkable, key=widths.__getitem__)
            widths[widest] -= 1
    return widths


def _pieces(text: str, is_name: bool = False) -> list[str]:
    """What stays in one line if there is room: words with the blanks behind them, of a module path
    each part with its dot."""
    pieces: list[str] = []
    for word in re.findall(r"\s*\S+\s*", text):
        if is_name or _PATH.search(word):
            pieces += re.findall(r"[^.]*\.|[^.]+", word)
        else:
            pieces.append(word)
    return pieces


def _fold(
    text: str,
    width: int,
    is_name: bool = False,
) -> list[str]:
    """Lines of at most ``width`` characters, broken between words and after the dots of paths.

    A word is broken only where nothing else is enough, and then after an underscore if there is
    one.
    """
    lines = [""]
    for piece in _pieces(text, is_name):
        line = lines.pop()
        # Blanks at the end of a line are not seen.
        if line and len(line) + len(piece.rstrip()) > width:
            lines.append(line)
            line = ""
        line += piece
        while len(line.rstrip()) > width:
            # A name reads best in its words.
            end = line.rfind("_", 0, width) + 1 or width
            lines.append(line[:end])
            line = line[end:]
        lines.append(line)
    return list(map(str.rstrip, lines))


def _beside(texts: Sequence[str], widths: Sequence[int]) -> list[str]:
    """One row as lines: each text folded into its column, the first one as a name."""
    folded: list[list[str]] = []
    for text, width in zip(texts, widths, strict=True):
        folded.append(_fold(text, width, is_name=not folded))
    return [_line(parts, widths) for parts in zip_longest(*folded, fillvalue="")]


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    return GAP.join(map(str.ljust, texts, widths)).rstrip()
