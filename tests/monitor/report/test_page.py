"""The page stands on its own, shows what was recorded, and takes hostile names as text."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from histories import reported_run

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.report import page
from lightning_normdyn.monitor.report.page import (
    COLUMNS,
    LayerSummary,
    common_limits,
    load_run,
    pictures_of,
    pictures_of_all,
    runs_in,
    summaries,
    write_report,
)

pytest.importorskip("matplotlib")


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.fixture
def _no_pictures_of_runs(monkeypatch):
    """Drawing takes most of the time of a report: for tests that ask about something else."""
    monkeypatch.setattr(page, "pictures_of", lambda *_: [])


class Page(HTMLParser):
    """What a browser would see: tags, attributes, texts of cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.rows, self.scripts, self.policy = [], [], [], ""
        self._open = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = tag
        if tag == "tr":
            self.rows.append([])
        if tag == "script":
            self.scripts.append("")
        if tag == "meta" and dict(attributes).get("http-equiv"):
            self.policy = dict(attributes)["content"]

    def handle_data(self, text):
        if self._open in ("td", "button") and text.strip():
            self.rows[-1].append(text)
        if self._open == "script":
            self.scripts[-1] += text

    def handle_endtag(self, tag):
        self._open = ""


def test_the_page_needs_nothing_from_outside(tmp_path):
    shown = Page(
        write_report(
            {"decay": reported_run(), "aws": reported_run(factor=2)},
            tmp_path / "new" / "report.html",
        )
    )
    assert not [
        tag for tag, _ in shown.tags if tag in ("link", "iframe", "object", "embed", "base", "form")
    ]
    for _, attributes in shown.tags:
        for name in ("src", "href", "action", "srcset", "background"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", shown.source).replace(
        "http-equiv", ""
    )
    assert "@import" not in shown.source
    assert "default-src 'none'" in shown.policy
    (script,) = shown.scripts
    assert (
        f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        in shown.policy
    )
    assert os.listdir(tmp_path / "new") == ["report.html"]


def test_every_picture_is_a_picture_and_says_what_it_shows(tmp_path):
    history = reported_run()
    history.append_vectors(0, {"weight_norm/conv0.weight": np.arange(1.0, 9)})
    shown = Page(write_report({"run": history}, tmp_path / "report.html"))
    images = [attributes for tag, attributes in shown.tags if tag == "img"]
    assert len(images) == 6  # three sets of curves, two heat maps, a ridge
    for image in images:
        assert base64.b64decode(image["src"].split(",")[1], validate=True).startswith(b"\x89PNG")
        assert "run" in image["alt"]


@pytest.mark.usefixtures("_no_pictures_of_runs")
def test_the_table_holds_the_numbers(tmp_path):
    shown = Page(write_report({"run": reported_run()}, tmp_path / "report.html"))
    head, *rows = shown.rows
    assert head[0] == "weight"
    assert rows == [
        [
            "conv0.weight",
            "filter",
            "8",
            "2",
            "1.05",
            "0.0931",
            "0.01",
            "0.02",
            "0.5",
            "–",
            "turns too slow: 0.50x what is predicted",
        ],
        ["conv1.weight", "–", "–", "4", "2.1", "0.0465", "0.02", "0.02", "1", "–", "as predicted"],
        [
            "conv2.weight",
            "–",
            "–",
            "6",
            "3.15",
            "0.031",
            "0.03",
            "0.02",
            "1.5",
            "–",
            "turns too fast: 1.5x what is predicted",
        ],
    ]


@pytest.mark.usefixtures("_no_pictures_of_runs")
def test_several_runs_stand_side_by_side_and_are_compared(tmp_path):
    runs = {"decay": reported_run(2), "aws": reported_run(3, factor=2)}
    shown = Page(write_report(runs, tmp_path / "report.html"))
    assert [row[:2] for row in shown.rows[1:]] == [
        ["decay", "conv0.weight"],
        ["aws", "conv0.weight"],
        ["decay", "conv1.weight"],
        ["aws", "conv1.weight"],
        ["aws", "conv2.weight"],
    ]
    assert sum("of decay, aws" in attributes.get("alt", "") for _, attributes in shown.tags) == 3
    assert "Runs compared" in shown.source


def test_runs_of_different_kinds_are_shown_as_far_as_they_go(tmp_path):
    few = History()
    few.append(5, {"weight_norm/a.weight": 1.0}, optimizer_step=1)
    gap = History()
    gap.append(
        0, {"gradient_cosine/a.weight": float("nan"), "effective_lr/b": 1.0}, optimizer_step=1
    )
    shown = Page(
        write_report({"few": few, "gap": gap, "full": reported_run()}, tmp_path / "report.html")
    )
    assert len(shown.rows) == 1 + 1 + 2 + 3


def test_hostile_names_stay_text(tmp_path):
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'$title$`"
    history = reported_run(names=[attack, "$style", "${body}"])
    history.meta = {
        "targets": {attack: {"scale_invariant": attack, "vectors": attack}},
        attack: [attack],
        "note": attack,
    }
    history.mark(3, attack)
    history.append_vectors(0, {f"weight_norm/{attack}": np.arange(1.0, 4)})
    shown = Page(
        write_report({attack: history, "$title": reported_run()}, tmp_path / "report.html")
    )
    assert len(shown.scripts) == 1
    assert "alert" not in shown.scripts[0]
    assert all(
        attributes["src"].startswith("data:image/png")
        for tag, attributes in shown.tags
        if tag == "img"
    )
    assert not [
        name for _, attributes in shown.tags for name in attributes if name.startswith("on")
    ]
    assert "".join(shown.rows[1]).count("<script>alert(1)</script>") == 3
    assert "$style" in str(shown.rows)


@pytest.mark.usefixtures("_no_pictures_of_runs")
def test_meta_of_any_shape_is_shown(tmp_path):
    for targets in (
        [],
        "text",
        {"conv0.weight": 3},
        {"conv0.weight": {"vectors": "many", "scale_invariant": None}},
    ):
        history = reported_run()
        history.meta["targets"] = targets
        assert len(Page(write_report({"run": history}, tmp_path / "report.html")).rows) == 4


@pytest.mark.usefixtures("_no_pictures_of_runs")
def test_forecasts_stand_on_the_page(tmp_path):
    history = reported_run()
    history.meta["forecast"] = {"start": "for <3> steps", "end": "the same run", "other": "?"}
    shown = Page(write_report({"run": history}, tmp_path / "report.html"))
    assert "for &lt;3&gt; steps" in shown.source
    assert shown.source.index("for &lt;3&gt; steps") < shown.source.index("the same run")
    for strange in (["for 3 steps"], {"start": 3}, None):
        history.meta["forecast"] = strange
        page = Page(write_report({"run": history}, tmp_path / "report.html"))
        assert "Forecast and advice" not in page.source


@pytest.mark.usefixtures("_no_pictures_of_runs")
def test_an_error_leaves_the_older_report_as_it_was(tmp_path, monkeypatch):
    path = write_report({"run": reported_run()}, tmp_path / "report.html")
    before = path.read_bytes()
    without = History()
    without.append(0, {"train_loss": 1.0}, optimizer_step=1)
    for runs, message in (
        ({}, "at least one run"),
        (
            {"run": reported_run(), "other": without},
            "run `other` has no curves of layers, it has train_loss",
        ),
        ({"empty": History()}, "nothing at all"),
    ):
        with pytest.raises(NormDynError, match=message):
            write_report(runs, path)
    monkeypatch.setattr(page, "pictures_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report({"run": reported_run(2)}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["report.html"]


def test_without_matplotlib_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NormDynError, match=r"lightning-normdyn\[plot\]"):
        write_report({"run": reported_run()}, tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


def in_browser(page: Path, script: str, tmp_path: Path) -> str:
    """The page's title after ``script`` has run in it; the page's own policy is lifted for that."""
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    copy = tmp_path / "scripted.html"
    copy.write_text(source.replace("</body>", f"<script>{script}</script></body>"))
    return dumped_title(copy, tmp_path)


def dumped_title(page: Path, tmp_path: Path) -> str:
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run(
        [CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=1000, check=True
    )
    return re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL).group(1)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_headings_sort_the_table(tmp_path):
    page = write_report({"run": reported_run(12)}, tmp_path / "report.html")
    script = """
      const rows = () => [...document.querySelectorAll("tbody tr")];
      const column = (i) => rows().map(row => row.cells[i].textContent).join(" ");
      const press = (i) => document.querySelectorAll("th button")[i].click();
      const seen = [];
      press(4); seen.push(column(4)); press(4); seen.push(column(4));
      press(2); seen.push(column(2)); press(2); seen.push(column(2));
      press(0); press(0); seen.push(column(0));
      document.title = seen.join("|");
    """
    up, down, vectors_up, vectors_down, names = in_browser(page, script, tmp_path).split("|")
    norms = [float(number) for number in up.split()]
    assert norms == sorted(norms)
    assert [float(number) for number in down.split()] == norms[::-1]
    assert (
        vectors_up == vectors_down == " ".join(["8"] + ["–"] * 11)
    )  # what is missing comes last, either way
    assert names.split() == [
        f"conv{i}.weight" for i in range(11, -1, -1)
    ]  # 11 before 10 before 9, not 9 before 8 before 11


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_policy_stops_a_script_that_slipped_through(tmp_path):
    page = write_report({"run": reported_run()}, tmp_path / "report.html")
    page.write_text(
        page.read_text().replace("</body>", "<script>document.title = 'attacked'</script></body>")
    )
    assert dumped_title(page, tmp_path) == "Weight dynamics: run"


def test_one_run_has_curves_maps_and_a_ridge_as_far_as_recorded():
    history = reported_run()
    history.append_vectors(0, {"weight_norm/conv0.weight": np.arange(1.0, 9)})
    pictures = list(pictures_of("run", history, common_limits({"run": history})))
    assert [picture.alt for picture in pictures] == [
        "effective_lr of run",
        "angular_update of run",
        "weight_norm of run",
        "effective_lr of run, layer by step",
        "angular_update of run, layer by step",
        "norms of single vectors of run",
    ]
    for picture in pictures:
        assert base64.b64decode(picture.png, validate=True).startswith(b"\x89PNG")


def test_norms_that_cannot_be_drawn_are_a_sentence():
    history = reported_run()
    history.append_vectors(0, {"weight_norm/conv0.weight": np.full(3, np.nan)})
    *_, last = pictures_of("run", history, common_limits({"run": history}))
    assert last.png == ""
    assert "no vector with a finite norm" in last.alt


def test_runs_share_their_limits_and_are_compared_where_two_recorded_a_quantity():
    runs = {"one": reported_run(), "two": reported_run(factor=2.0)}
    low, high = common_limits(runs)["weight_norm"]
    assert (low, high) == pytest.approx((1.05, 12.0))
    said = []
    pictures = list(pictures_of_all(runs, said.append))
    assert [picture.alt for picture in pictures] == [
        "effective_lr of one, two",
        "angular_update of one, two",
        "weight_norm of one, two",
    ]
    assert len(said) == 3
    assert not list(pictures_of_all({"one": runs["one"]}, said.append))


def test_a_column_shows_a_field_of_a_row():
    fields = [column.field for column in COLUMNS]
    assert fields == list(LayerSummary._fields)


def test_the_verdict_is_what_the_monitor_said():
    history = reported_run()
    history.meta["targets"] = {
        "conv0.weight": {"verdict": "as expected now (1.0x); settled"},
        "conv1.weight": {"verdict": "-"},
        "conv2.weight": {"verdict": 3},
    }
    layers = summaries("run", history)
    assert [layer.verdict for layer in layers] == [
        "as expected now (1.0x); settled",
        "as predicted",
        "turns too fast: 1.5x what is predicted",
    ]
    assert [layer.is_off for layer in layers] == [False, False, True]


def test_what_is_expected_now_comes_before_the_prediction():
    history = History()
    for step in range(20):
        row = {"angular_update/a": 2.0, "equilibrium_angular_update/a": 4.0}
        # Not of the first half, nor of a weight whose expectation has ended.
        if step >= 10:
            row["expected_angular_update/a"] = 2.0
        history.append(
            step, {**row, "angular_update/b": 1.0, "balance_ratio/b": 1.6}, optimizer_step=step
        )
    invariant, other = summaries("run", history)
    assert (invariant.ratio, invariant.now, invariant.verdict) == (0.5, 1.0, "as expected")
    assert (other.ratio, other.now) == (None, pytest.approx(1.6))
    assert other.is_off
    for step in range(20, 40):
        history.append(step, {"angular_update/a": 2.0}, optimizer_step=step)
    (ended, _) = summaries("run", history)
    assert (ended.ratio, ended.now) == (None, None)


def test_averages_are_of_the_last_tenth_and_of_finite_numbers():
    history = History()
    for step in range(40):
        angle = {37: float("nan"), 38: 3.0, 39: 4.0}.get(step, 1.0)
        row = {"angular_update/a": angle, "effective_lr/a": angle, "weight_norm/a": step + 1.0}
        history.append(step, row, optimizer_step=step)
    (layer,) = summaries("run", history)
    assert layer.effective_lr == pytest.approx((1 + 3 + 4) / 3)
    assert layer.angular_update == pytest.approx(((1 + 9 + 16) / 3) ** 0.5)
    assert (layer.first_norm, layer.last_norm, layer.ratio) == (1.0, 40.0, None)
    assert layer.verdict == "–"


@pytest.mark.parametrize(
    "number",
    [10**4000, -(10**4000), 1.5, "7", None],
    ids=["huge", "negative", "float", "text", "none"],
)
def test_a_number_in_the_notes_of_a_run_that_is_none_is_left_out(number, tmp_path):
    history = reported_run(1, 2)
    history.meta["targets"] = {
        "conv0.weight": {"vectors": number, "scale_invariant": number, "verdict": number}
    }
    (layer,) = summaries("run", load_run(history.save(tmp_path / "run.npz")))
    assert layer.vectors is None


@pytest.mark.parametrize("targets", [[], "text", {"conv0.weight": 3}])
def test_notes_of_any_shape_are_no_obstacle(targets):
    history = reported_run(1)
    history.meta["targets"] = targets
    (layer,) = summaries("run", history)
    assert (layer.kind, layer.vectors) == ("–", None)


def test_a_run_is_its_history_file_or_the_folder_with_it(tmp_path):
    path = reported_run().save(tmp_path / "run" / "history.npz")
    assert list(load_run(path)) == list(load_run(path.parent)) == list(reported_run())


def test_a_folder_without_a_run_says_so(tmp_path):
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "images.npz", images=np.zeros(3))
    with pytest.raises(NormDynError, match="holds no run, nor does any folder below it"):
        load_run(tmp_path)
    with pytest.raises(NormDynError, match="there is no run"):
        load_run(tmp_path / "nowhere")


def test_runs_are_found_any_number_of_levels_down(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros(3))
    deep = reported_run().save(tmp_path / "a" / "b" / "version_0" / "history.npz")
    assert runs_in(tmp_path) == [deep]
    assert list(load_run(tmp_path)) == list(reported_run())
    again = reported_run().save(deep.with_name("history.fit2.npz"))
    near = reported_run().save(tmp_path / "c" / "history.npz")
    # The copy beside the log of a logger is no other run.
    reported_run().save(tmp_path / "c" / "csv" / "history.npz")
    assert runs_in(tmp_path) == sorted([deep, again, near])
    assert runs_in(deep) == [str(deep)]
    assert runs_in("s3://bucket/run") == ["s3://bucket/run"]


def test_a_folder_with_two_runs_asks_which(tmp_path):
    reported_run().save(tmp_path / "a.npz")
    reported_run().save(tmp_path / "b.npz")
    with pytest.raises(NormDynError, match=r"holds 2 runs; name one of .*a\.npz, .*b\.npz"):
        load_run(tmp_path)
