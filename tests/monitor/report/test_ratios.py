"""The page that holds runs against the first of them: its numbers, and that it takes names as
text."""

from __future__ import annotations

import re

import pytest
from histories import reported_run

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.group_sizes import GroupSizes, as_plain
from lightning_normdyn.monitor.report.ratios import (
    compared_runs,
    comparison_text,
    write_comparison,
)


def turning(times, label="AdamW"):
    """A run that turns so many times as fast as another."""
    history = reported_run()
    for step in range(20, 40):
        row = {f"angular_update/conv{i}.weight": 0.01 * times for i in range(3)}
        row |= {f"pull/conv{i}.weight": 1e-4 for i in range(3)}
        history.append(10 * step, row, optimizer_step=step + 1)
    history.meta["groups"] = as_plain([GroupSizes(label, "filter", 3, 0.1, 0.2, 0.229, 0.01, None)])
    return history


def test_page_and_text_hold_the_ratios_and_the_groups_of_all_runs(tmp_path):
    runs = {"base": turning(1), "fast": turning(3), "slow": turning(0.5)}
    compared = compared_runs(runs)
    text = comparison_text(compared, runs, 80)
    page = write_comparison(compared, runs, tmp_path / "new" / "page.html").read_text()
    for told in (text, page):
        assert "fast over base" in told
        assert "slow over base" in told
        assert "base over" not in told
        assert len(re.findall("filter", told)) == 3
    assert re.search(r"conv2.weight +1.00 +1.00 +3.00 +3.00 +- +- +1.00 +1.00", text)
    assert page.count('class="number off" data-number="3.0') == 2 * (3 + 1)
    assert page.count('class="number less" data-number="0.5') == 2 * (3 + 1)
    assert page.count("(median)") == 2


def test_a_run_of_an_older_version_has_ratios_and_no_groups(tmp_path):
    runs = {"one": reported_run(), "two": reported_run(factor=2)}
    compared = compared_runs(runs)
    page = write_comparison(compared, runs, tmp_path / "page.html").read_text()
    assert "Sizes by param group" not in page
    assert "RMS weight" not in comparison_text(compared, runs, 80)


def test_hostile_names_stay_text(tmp_path):
    attack = "</script><img src=x onerror=alert(1)>"
    runs = {attack: reported_run(names=[attack]), "b": reported_run(names=[attack])}
    runs["b"].meta["groups"] = as_plain([GroupSizes(attack, attack, 1, *[None] * 5)])
    page = write_comparison(compared_runs(runs), runs, tmp_path / "page.html").read_text()
    assert "<img" not in page
    assert page.count("<script>") == page.count("</script>") == 1


def test_one_run_alone_and_runs_without_a_common_weight_are_refused():
    with pytest.raises(NormDynError, match="at least two runs"):
        compared_runs({"alone": reported_run()})
    with pytest.raises(NormDynError, match=r"`other` over `base`.*no weight in common"):
        compared_runs({"base": reported_run(), "other": reported_run(names=["fc"])})
