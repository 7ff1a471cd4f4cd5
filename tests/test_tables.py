"""tables.py: tables fit the terminal, and nothing in them is lost."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lightning_normdyn import tables
from lightning_normdyn.tables import MOST_ROWS, aligned, paragraph, render

COLUMNS = ["weight", "treated how", "norm first → last", "effective lr", "e-foldings", "verdict"]
WRS = "WRS to its initial norm every 20 steps"
VERDICT = "as expected now (1.1x); its length is held by WeightRescaling"
NAMES = [
    "network.0.weight",
    "network.4.shortcut.0.weight",
    "model.transformer.encoder.layers.11.attention.output.dense.weight",
]
ROWS = [[name, WRS, "0.57→0.809", "0.0252", "-", VERDICT] for name in NAMES] + [
    ["head.weight", "-", "1→2", "0.1", "3.5", "-"]
]


def table(width: int) -> list[str]:
    return render(
        "a title",
        COLUMNS,
        ROWS,
        noted=["treated how"],
        optional=["e-foldings", "treated how"],
        width=width,
    ).splitlines()


def cells(lines: list[str], columns: list[str]) -> list[list[str]]:
    """The cells below the rule, each read down its column and put together again, blanks left
    out."""
    rule = next(i for i, line in enumerate(lines) if line.startswith("──"))
    starts = [0]
    for column in columns[1:]:
        starts.append(lines[2].index(column.split()[0], starts[-1] + 1))
    rows: list[list[str]] = []
    for line in lines[rule + 1 :]:
        if line.startswith(("[", "Not shown", "...")):
            break
        parts = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        if parts[2]:  # the norms stand in a row's first line only
            rows.append(parts)
        else:
            rows[-1] = [above + part for above, part in zip(rows[-1], parts, strict=True)]
    return rows


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 200, 400])
def test_no_line_is_wider_than_the_terminal(width):
    assert max(map(len, table(width))) <= width


@pytest.mark.parametrize(
    ("width", "left_out", "noted"),
    [
        (400, [], False),
        (200, [], True),
        (140, [], True),
        (80, ["e-foldings", "treated how"], False),
    ],
)
def test_every_cell_is_there_whole_or_as_a_note_or_said_to_be_missing(width, left_out, noted):
    lines = table(width)
    columns = [column for column in COLUMNS if column not in left_out]
    expected = [[*row] for row in ROWS]
    if noted:
        assert f"[1] {WRS}" in lines
        expected = [["[1]" if cell == WRS else cell for cell in row] for row in expected]
    kept = [
        [
            cell.replace(" ", "")
            for cell, column in zip(row, COLUMNS, strict=True)
            if column in columns
        ]
        for row in expected
    ]
    found = [[cell.replace(" ", "") for cell in row] for row in cells(lines, columns)]
    assert found == kept
    said = [line for line in lines if line.startswith("Not shown")]
    assert said == (
        [f"Not shown in a terminal of {width} columns: {', '.join(left_out)}"] if left_out else []
    )


def test_names_break_after_dots_and_numbers_do_not():
    lines = table(80)
    assert any(
        line.startswith("shortcut.0.weight") or line.startswith("network.4.shortcut.0.weight")
        for line in lines
    )
    assert sum("0.57→0.809" in line for line in lines) == 3


LAYERS = [f"model.language_model.layers.{i}" for i in (0, 1, 11)]
TARGETS = [
    [
        f"{layer}.{part}.weight",
        "4096×4096",
        f"layer{asked}",
        "1",
        f"{layer}.{norm}, {layer}.norm",
        "AWS, decay now 0.0014 (replaces 0.005)",
    ]
    for layer, asked in zip(LAYERS, ("", " (by request)", ""), strict=True)
    for part, norm in (
        ("self_attn.q_proj", "input_layernorm"),
        ("mlp.gate_proj", "post_attention_layernorm"),
    )
]
TARGETS += [
    [
        "head.weight",
        "10×64",
        "no",
        "10",
        "LogSoftmaxBackward0 does not commute with a change of scale",
        "measured",
    ]
]
HEADINGS = ("weight", "shape", "scale-invariant", "vectors", "because of", "treated how")


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("noted", [("treated how", "because of"), ("treated how",), ()])
def test_module_paths_fold_at_dots_in_every_column_and_no_word_is_broken(width, noted):
    lines = render(
        "title", HEADINGS, TARGETS, noted=noted, optional=("shape", "vectors"), width=width
    ).splitlines()
    assert max(map(len, lines)) <= width
    whole = {
        part for row in TARGETS for cell in row for word in cell.split() for part in word.split(".")
    }
    rule = next(i for i, line in enumerate(lines) if line.startswith("──"))
    for line in lines[rule + 1 :]:
        for word in line.split():
            if line.startswith(("Not shown", "[")):
                continue
            assert {part for part in word.split(".") if part} <= whole | {"[1]", "[2]"}, line
    assert "0.0014" in "".join(lines)  # a number is no path


def test_a_name_has_the_room_that_it_needs_at_80_columns():
    lines = render(
        "",
        HEADINGS,
        TARGETS,
        noted=("treated how", "because of"),
        optional=("shape", "vectors"),
        width=80,
    ).splitlines()
    first = [number for number, line in enumerate(lines) if line.startswith(("model.", "head."))]
    assert len(first) == 7
    assert max(b - a for a, b in pairwise(first)) <= 5


def test_a_part_of_a_path_that_is_too_long_breaks_after_an_underscore_first():
    name = "post_attention_layernorm_of_the_very_long_name_of_a_block"
    lines = render("", ["weight", "norm"], [[f"{name}.weight", "1"]], width=40).splitlines()
    assert lines[2].split()[0].endswith("_")
    assert name in "".join("".join(line.split()).removesuffix("1") for line in lines[2:])


def test_a_sentence_below_a_table_folds_as_its_cells_do():
    counts = ", ".join(f"{layer}.mlp.weight: 4" for layer in LAYERS)
    text = f"clamped 12 times ({counts}): lr * alpha * norm is too large there."
    folded = paragraph(text, 80)
    assert max(map(len, folded.splitlines())) <= 80
    assert "".join(folded.split()) == "".join(text.split())
    assert all(
        line.endswith((".", ",", "(", ")", ":", "4")) or " " in line for line in folded.splitlines()
    )


def test_many_different_texts_stay_in_the_table():
    rows = [[f"conv{i}.weight", f"AWS, decay now 0.{i} (replaces 0.0005)"] for i in range(1, 10)]
    lines = render(
        "title", ["weight", "treated how"], rows, noted=["treated how"], width=40
    ).splitlines()
    assert not [line for line in lines if line.startswith("[")]
    assert sum("AWS, decay" in line for line in lines) == 9


def test_a_long_table_says_how_much_it_leaves_out():
    rows = [[f"conv{i}.weight", "1"] for i in range(MOST_ROWS + 100)]
    lines = render("title", ["weight", "norm"], rows).splitlines()
    assert lines[-1] == "... and 100 more weights"
    assert len(lines) == MOST_ROWS + 5


def test_it_asks_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    lines = render("title", COLUMNS, ROWS).splitlines()
    assert 60 < max(map(len, lines)) <= 70


@pytest.mark.parametrize(
    "text", ["", "   ", "a" * 500, "x.y." * 100, "...", "[1]", "ein\nanderer", "[bold]name[/bold]"]
)
def test_strange_cells_do_not_break_it(text):
    rendered = render("title", ["weight", "norm"], [[text, text]], width=60)
    assert max(map(len, rendered.splitlines())) <= 60
    together = "".join(rendered.split())
    assert all(
        together.count(character) >= text.count(character)
        for character in set("".join(text.split()))
    )


HEADS = (
    "weight",
    "treated",
    "norm, first → last",
    "effective lr",
    "angular update",
    "equilibrium",
    "ratio",
    "verdict",
)
DIGITS = (
    "0" * 60,
    "1 1111 1111 11 (11111 11)",
    "22222 22222",
    "33333333",
    "4444444",
    "5555555",
    "666",
    "777777 77 7777777777 7777",
)


@pytest.mark.parametrize("width", [100, 120, 139, 140, 141, 200, 400])
def test_no_part_of_a_cell_is_cut_off(width):
    text = render("title", HEADS, [DIGITS, (*DIGITS[:-1], "7")], width=width)
    assert max(map(len, text.splitlines())) <= width
    for i, cell in enumerate(DIGITS[:-1]):
        assert text.count(str(i)) == 2 * cell.count(str(i)), cell
    assert text.count("7") == DIGITS[-1].count("7") + 1


@pytest.mark.parametrize("width", [120, 140, 200])
def test_a_usual_name_is_read_in_one_piece(width):
    name = "model.layers.10.self_attn.q_proj.weight"
    assert name in render("title", HEADS, [(name, *DIGITS[1:])], width=width)


@pytest.mark.parametrize("columns", [HEADINGS, HEADINGS[:1]])
def test_aligned_rows_stay_on_one_line_each(columns):
    rows = [row[: len(columns)] for row in TARGETS]
    lines = aligned(columns, rows).splitlines()
    assert len(lines) == len(rows) + 1
    for heads_or_cells, line in zip([columns, *rows], lines, strict=True):
        assert all(cell in line for cell in heads_or_cells)
    second = [
        line.index(row[1]) for row, line in zip([columns, *rows], lines, strict=True) if row[1:]
    ]
    assert len(set(second)) <= 1


def test_names_that_differ_in_numbers_are_one_pattern():
    names = [f"layer{i}.{j}.conv1.weight" for i in (1, 2) for j in (0, 1, 10)]
    assert {tables.name_skeleton(name) for name in names} == {"layer#.#.conv#.weight"}
    assert tables.name_pattern(names) == "layer*.*.conv1.weight"
    assert tables.name_pattern(names[:1]) == names[0]
    assert tables.name_pattern([*names, "head.weight"]) == ""


def test_a_column_in_which_nothing_is_said_is_left_out():
    columns, rows = tables.without_empty(["a", "b", "c"], [["1", "", "x"], ["2", "", ""]])
    assert columns == ["a", "c"]
    assert rows == [["1", "x"], ["2", ""]]
