"""The tables in the terminal: nothing of a cell is lost, whatever the width."""

from __future__ import annotations

import builtins

import pytest

from lightning_normdyn.callbacks.tables import MOST_ROWS, render

COLUMNS = ("weight", "treated", "norm, first → last", "effective lr", "angular update", "equilibrium", "ratio", "verdict")
ROW = ("0" * 60, "1 1111 1111 11 (11111 11)", "22222 22222", "33333333", "4444444", "5555555", "666", "777777 77 7777777777 7777")


@pytest.mark.parametrize("width", [100, 120, 139, 140, 141, 200, 400])
def test_no_part_of_a_cell_is_cut_off(width: int) -> None:
    text = render("title", COLUMNS, [ROW, (*ROW[:-1], "7")], width=width)
    assert max(map(len, text.splitlines())) <= width
    for i, cell in enumerate(ROW[:-1]):
        assert text.count(str(i)) == 2 * cell.count(str(i)), cell
    assert text.count("7") == ROW[-1].count("7") + 1


@pytest.mark.parametrize("width", [100, 140, 200])
def test_a_usual_name_is_read_in_one_piece(width: int) -> None:
    name = "model.layers.10.self_attn.q_proj.weight"
    assert name in render("title", COLUMNS, [(name, *ROW[1:])], width=width)


def test_without_rich_the_table_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    known = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return known(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    lines = render("title", ("a", "b"), [("1", "22"), ("333", "4")]).splitlines()
    assert lines == ["title", "a    b", "1    22", "333  4"]


def test_a_very_long_table_says_how_much_it_leaves_out() -> None:
    text = render("title", ("a",), [(f"w{i}",) for i in range(MOST_ROWS + 7)], width=100)
    assert f"w{MOST_ROWS - 1}" in text
    assert f"w{MOST_ROWS} " not in text
    assert "... and 7 more weights" in text
