"""Names that fit a picture and stay apart."""

from __future__ import annotations

import pytest

from lightning_normdyn.monitor.plots.labels import fitted, in_legend, layer_labels


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["net.0.weight", "net.8.weight"], ["net.0", "net.8"]),
        (["x.weight", "x.weight_v"], ["x", "x.weight_v"]),
        ([f"a.{'b' * 30}.c.weight", f"a.{'b' * 30}.d.weight"], ["c", "d"]),
        (
            [f"{'a' * 30}.weight", f"{'a' * 30}.d.weight"],
            [f"{'a' * 13}…{'a' * 14}", f"{'a' * 13}…{'a' * 12}.d"],
        ),
        (
            [f"x.{i}{'y' * 99}.weight" for i in range(3)],
            [f"{i}{'y' * 12}…{'y' * 14}" for i in range(3)],
        ),
    ],
)
def test_labels_of_long_names_leave_out_what_all_of_them_begin_with(names, labels):
    assert layer_labels(names) == labels


def test_texts_are_short_and_drawn_as_they_stand():
    assert fitted("abcdefghij", 10) == "abcdefghij"
    assert fitted("abcdefghijk", 6) == "ab…ijk"
    assert fitted("abcdefghijk", 7) == "ab…hijk"
    assert fitted("a$b\x00", 10) == r"a\$b?"
    assert (in_legend("_run"), in_legend("run")) == (" _run", "run")
