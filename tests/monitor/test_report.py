"""report.py: runs are read whoever wrote them down, the page stands on its own, and hostile input
is refused or shown as text."""

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

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.report import page
from lightning_normdyn.monitor.report import runs as run_reading
from lightning_normdyn.monitor.report.page import write_report
from lightning_normdyn.monitor.report.runs import load_run

pytest.importorskip("matplotlib")

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


def synthetic(layers: int = 3, steps: int = 20, *, factor: float = 1.0, names=None) -> History:
    history = History()
    names = names or [f"conv{i}.weight" for i in range(layers)]
    for step in range(steps):
        row = {"train_loss": 1.0 / (step + 1), "normdyn/effective_lr": 0.1}
        for i, name in enumerate(names):
            row[f"weight_norm/{name}"] = factor * (i + 1) * (2 - step / steps)
            row[f"effective_lr/{name}"] = 0.1 / row[f"weight_norm/{name}"]
            row[f"angular_update/{name}"] = 0.01 * (i + 1)
            row[f"equilibrium_angular_update/{name}"] = 0.02
        history.append(10 * step, row, optimizer_step=step + 1)
    history.meta = {
        "targets": {names[0]: {"scale_invariant": "filter", "vectors": 8}},
        "settings": {"alpha": 0.0025},
    }
    return history


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


def write_csv(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


# --- reading


def test_a_history_file_and_the_folder_with_it(tmp_path):
    path = synthetic().save(tmp_path / "run" / "history.npz")
    assert list(load_run(path)) == list(load_run(path.parent)) == list(synthetic())


def test_a_csv_log_as_lightning_writes_it(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    logger.log_metrics({"train_loss": 2.0}, step=0)
    logger.log_metrics({"effective_lr/conv.weight": 0.5, "angular_update/conv.weight": 0.1}, step=0)
    logger.log_metrics(
        {"effective_lr/conv.weight": 0.25, "angular_update/conv.weight": float("nan")}, step=9
    )
    logger.log_metrics(
        {"val_loss": 1.0, "epoch": 0}, step=7
    )  # validation may be logged for an earlier step
    logger.save()
    for run in (load_run(logger.log_dir), load_run(Path(logger.log_dir) / "metrics.csv")):
        assert list(run) == [
            {
                "step": 0,
                "optimizer_step": 0,
                "train_loss": 2.0,
                "effective_lr/conv.weight": 0.5,
                "angular_update/conv.weight": pytest.approx(0.1),
            },
            {"step": 7, "optimizer_step": 7, "val_loss": 1.0, "epoch": 0.0},
            {
                "step": 9,
                "optimizer_step": 9,
                "effective_lr/conv.weight": 0.25,
                "angular_update/conv.weight": pytest.approx(float("nan"), nan_ok=True),
            },
        ]


def test_a_csv_log_of_a_run_that_crashed_and_went_on(tmp_path):
    path = write_csv(
        tmp_path / "metrics.csv",
        "step,effective_lr/a",
        "0,1",
        "10,2",
        "20,3",
        "10,4",
        "20,5",
        "30,6",
    )
    steps, values = load_run(path).column("effective_lr/a")
    assert steps.tolist() == [0, 10, 20, 30]
    assert values.tolist() == [1, 4, 5, 6]


@pytest.fixture
def wandb_run(tmp_path, monkeypatch):
    """A real offline run, with everything that a row of W&B may hold."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = wandb.Settings(x_disable_stats=True, console="off")
    config = {"lr": 0.1, "normdyn": {"targets": {"a.weight": {"vectors": 3}}}}
    run = wandb.init(mode="offline", project="test", config=config, settings=settings)
    for step in range(5):
        run.log(
            {
                "effective_lr/a.weight": 1.0 / (step + 1),
                "angular_update/a.weight": float("nan") if step == 2 else 0.5,
                "weight_norm/a.weight": float("inf") if step == 3 else 2.0,
                "filter_norm/a.weight": wandb.Histogram(np.arange(5.0)),
                "text": "hello",
                "flag": True,
                "epoch": 0,
                "trainer/global_step": 10 * step,
            }
        )
    folder = Path(run.dir).parent
    run.finish()
    wandb.teardown()  # its service may still be writing when finish() returns
    return folder


def test_an_offline_wandb_run(wandb_run):
    for path in (wandb_run, next(wandb_run.glob("*.wandb"))):
        history = load_run(path)
        assert history.column("effective_lr/a.weight")[0].tolist() == [0, 10, 20, 30, 40]
        np.testing.assert_allclose(
            history.column("effective_lr/a.weight")[1], [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
        )
        assert history.column("angular_update/a.weight")[0].tolist() == [0, 10, 20, 30, 40]
        np.testing.assert_array_equal(
            history.column("angular_update/a.weight")[1], np.float32([0.5, 0.5, np.nan, 0.5, 0.5])
        )
        assert history.column("weight_norm/a.weight")[1].tolist() == [2, 2, 2, float("inf"), 2]
        assert history.meta == {"targets": {"a.weight": {"vectors": 3}}}
        assert set(history.keys()) == {
            "effective_lr/a.weight",
            "angular_update/a.weight",
            "weight_norm/a.weight",
            "epoch",
        }


def test_an_interrupted_wandb_run_is_read_as_far_as_it_goes(wandb_run):
    path = next(wandb_run.glob("*.wandb"))
    content = path.read_bytes()
    mentions = [found.start() for found in re.finditer(rb"effective_lr", content)]
    path.write_bytes(content[: mentions[len(mentions) // 2]])
    history = load_run(path)
    assert 1 <= len(history) < 5
    assert "interrupted" in history.meta["note"]


def test_a_damaged_wandb_run_is_refused(wandb_run):
    path = next(wandb_run.glob("*.wandb"))
    content = path.read_bytes()
    inside = content.index(b"effective_lr")
    for damaged in (b"", b"junk" * 1000, content[:inside] + b"\xff" + content[inside + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(NormDynError, match=r"cannot be read as a W&B run|holds no logged rows"):
            load_run(wandb_run)


def reader_that(monkeypatch, *, stdout: str = "", stderr: str = "", code: int = 0):
    def run(command, **options):
        options["stdout"].write(stdout.encode())
        options["stderr"].write(stderr.encode())
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(run_reading.subprocess, "run", run)


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        "[" * 100_000,
        '{"type": "history"}',
        '{"type": "run", "run": {"config": []}}',
        '{"type": "history", "history": {"item": {"a": 1}}}',
        '{"type": "history", "history": {"item": {"_step": "x", "a": 1}}}',
        '{"type": "history", "history": {"item": {"_step": 1e400}}}',
        '{"type": "history", "history": {"item": {"_step": 1000000000000000000000000000000, "a": '
        "1}}}",
    ],
)
def test_what_the_wandb_reader_might_say_is_not_trusted(tmp_path, monkeypatch, line):
    (tmp_path / "run.wandb").write_bytes(b"")
    reader_that(monkeypatch, stdout=line + "\n")
    with pytest.raises(NormDynError, match=r"run\.wandb"):
        load_run(tmp_path)


def test_a_number_too_large_for_any_run_is_refused(tmp_path, monkeypatch):
    (tmp_path / "run.wandb").write_bytes(b"")
    reader_that(
        monkeypatch,
        stdout='{"type": "history", "history": {"item": {"_step": 1, "a": %s}}}\n' % 10**400,
    )
    with pytest.raises(NormDynError, match="none that a run can log"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    "said", ["/usr/bin/python: No module named wandb", "Error: No such command 'leet'."]
)
def test_without_a_wandb_that_can_read_it_is_said_which_one_can(tmp_path, monkeypatch, said):
    (tmp_path / "run.wandb").write_bytes(b"")
    reader_that(monkeypatch, stderr=said, code=1)
    with pytest.raises(NormDynError, match=r"pip install 'wandb>=0\.30'"):
        load_run(tmp_path)


def test_a_wandb_reader_that_hangs_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "run.wandb").write_bytes(b"")
    monkeypatch.setattr(run_reading, "_READ_SECONDS", 0.2)
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\nsleep 5\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hangs))
    with pytest.raises(NormDynError, match="did not finish"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "": "no column `step`",
        "epoch,loss\n0,1\n": "no column `step`",
        "step,a\n": "holds no logged rows",
        "step,a\n0,1\n1\n": "line 3 has 1 cells under 2 names",
        "step,a\n0,one\n": "line 2 is no row of numbers",
        "step,a\n,1\n": "line 2 is no row of numbers with a step",
        "step,a\nnan,1\n": "line 2 is no row of numbers",
        "step,a\n1e400,1\n": "line 2 is no row of numbers",
        "step,a\n1e30,1\n": "its steps go from",
        "step,a,a\n0,1,2\n": "3 columns, 2 of them different",
        'step,a\n0,"1': "cannot be read as a CSV log",
        "step,a\n0," + "1" * 200_000: "cannot be read as a CSV log",
        "step," + ",".join(f"k{i}" for i in range(10_001)) + "\n": "10002 columns",
        "step,a,normdyn/optimizer_step\n0,1,inf\n": "none that a run can log",
        "step,=cmd()\n0,=cmd()\n": "line 2 is no row of numbers",
    }.items(),
)
def test_a_damaged_csv_log_is_refused(tmp_path, text, message):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(NormDynError, match=re.escape(message)) as error:
        load_run(tmp_path)
    assert "metrics.csv" in str(error.value)


def test_a_csv_log_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"step,a\n\xff\xfe\x00,1\n")
    with pytest.raises(NormDynError, match="cannot be read as a CSV log"):
        load_run(tmp_path)


def test_a_folder_without_a_run_says_what_is_below_it(tmp_path):
    with pytest.raises(NormDynError, match="holds no run; name a history file"):
        load_run(tmp_path)
    write_csv(tmp_path / "version_0" / "metrics.csv", "step,a", "0,1")
    with pytest.raises(NormDynError, match="version_0"):
        load_run(tmp_path)
    with pytest.raises(NormDynError, match="there is no run"):
        load_run(tmp_path / "nowhere")


def test_a_folder_with_two_runs_asks_which(tmp_path):
    synthetic().save(tmp_path / "a.npz")
    synthetic().save(tmp_path / "b.npz")
    with pytest.raises(NormDynError, match=r"holds 2 runs; name one of .*a\.npz, .*b\.npz"):
        load_run(tmp_path)


# --- writing


def test_the_page_needs_nothing_from_outside(tmp_path):
    shown = Page(
        write_report(
            {"decay": synthetic(), "aws": synthetic(factor=2)}, tmp_path / "new" / "report.html"
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
    history = synthetic()
    history.append_vectors(0, {"weight_norm/conv0.weight": np.arange(1.0, 9)})
    shown = Page(write_report({"run": history}, tmp_path / "report.html"))
    images = [attributes for tag, attributes in shown.tags if tag == "img"]
    assert len(images) == 6  # three sets of curves, two heat maps, a ridge
    for image in images:
        assert base64.b64decode(image["src"].split(",")[1], validate=True).startswith(b"\x89PNG")
        assert "run" in image["alt"]


def test_the_table_holds_the_numbers(tmp_path):
    shown = Page(write_report({"run": synthetic()}, tmp_path / "report.html"))
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
            "turns slower",
        ],
        ["conv1.weight", "–", "–", "4", "2.1", "0.0465", "0.02", "0.02", "1", "as predicted"],
        ["conv2.weight", "–", "–", "6", "3.15", "0.031", "0.03", "0.02", "1.5", "turns faster"],
    ]


def test_the_verdict_is_what_the_monitor_said(tmp_path):
    history = synthetic()
    history.meta["targets"] = {
        "conv0.weight": {"verdict": "settled, 0.5x the prediction (below)"},
        "conv1.weight": {"verdict": "-"},
        "conv2.weight": {"verdict": 3},
    }
    shown = Page(write_report({"run": history}, tmp_path / "report.html"))
    assert [row[-1] for row in shown.rows[1:]] == [
        "settled, 0.5x the prediction (below)",
        "as predicted",
        "turns faster",
    ]


def test_several_runs_stand_side_by_side_and_are_compared(tmp_path):
    runs = {"decay": synthetic(2), "aws": synthetic(3, factor=2)}
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
        write_report({"few": few, "gap": gap, "full": synthetic()}, tmp_path / "report.html")
    )
    assert len(shown.rows) == 1 + 1 + 2 + 3


def test_hostile_names_stay_text(tmp_path):
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'$title$`"
    history = synthetic(names=[attack, "$style", "${body}"])
    history.meta = {
        "targets": {attack: {"scale_invariant": attack, "vectors": attack}},
        attack: [attack],
        "note": attack,
    }
    history.mark(3, attack)
    history.append_vectors(0, {f"weight_norm/{attack}": np.arange(1.0, 4)})
    shown = Page(write_report({attack: history, "$title": synthetic()}, tmp_path / "report.html"))
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


def test_meta_of_any_shape_is_shown(tmp_path):
    for targets in (
        [],
        "text",
        {"conv0.weight": 3},
        {"conv0.weight": {"vectors": "many", "scale_invariant": None}},
    ):
        history = synthetic()
        history.meta["targets"] = targets
        assert len(Page(write_report({"run": history}, tmp_path / "report.html")).rows) == 4


def test_an_error_leaves_the_older_report_as_it_was(tmp_path, monkeypatch):
    path = write_report({"run": synthetic()}, tmp_path / "report.html")
    before = path.read_bytes()
    without = History()
    without.append(0, {"train_loss": 1.0}, optimizer_step=1)
    for runs, message in (
        ({}, "at least one run"),
        (
            {"run": synthetic(), "other": without},
            "run `other` has no curves of layers, it has train_loss",
        ),
        ({"empty": History()}, "nothing at all"),
    ):
        with pytest.raises(NormDynError, match=message):
            write_report(runs, path)
    monkeypatch.setattr(page, "_section", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report({"run": synthetic(2)}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["report.html"]


def test_without_matplotlib_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NormDynError, match=r"lightning-normdyn\[plot\]"):
        write_report({"run": synthetic()}, tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


# --- in a browser


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
    page = write_report({"run": synthetic(12)}, tmp_path / "report.html")
    script = """
      const column = (i) => [...document.querySelectorAll("tbody tr")].map(row => row.cells[i].textContent).join(" ");
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
    page = write_report({"run": synthetic()}, tmp_path / "report.html")
    page.write_text(
        page.read_text().replace("</body>", "<script>document.title = 'attacked'</script></body>")
    )
    assert dumped_title(page, tmp_path) == "Weight dynamics: run"


@pytest.mark.parametrize(
    "number",
    [10**4000, -(10**4000), True, 1.5, "7", None],
    ids=["huge", "negative", "true", "float", "text", "none"],
)
def test_a_number_in_the_notes_of_a_run_that_is_none_is_left_out(number, tmp_path):
    history = synthetic(1, 2)
    history.meta["targets"] = {
        "conv0.weight": {"vectors": number, "scale_invariant": number, "verdict": number}
    }
    run = load_run(history.save(tmp_path / "run.npz"))
    shown = Page(write_report({"run": run}, tmp_path / "report.html"))
    assert ["–" if number is not True else shown.rows[1][2]] == [shown.rows[1][2]]


@pytest.mark.parametrize("cell", ["9" * 4000, "-" + "9" * 4000, "1e999"])
@pytest.mark.parametrize("column", ["step", "effective_lr/conv.weight", "normdyn/optimizer_step"])
def test_a_number_of_thousands_of_digits_in_a_log_is_refused_or_infinite(cell, column, tmp_path):
    cells = {
        "step": "1",
        "effective_lr/conv.weight": "0.5",
        "normdyn/optimizer_step": "2",
        column: cell,
    }
    (tmp_path / "metrics.csv").write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
    if column == "effective_lr/conv.weight":
        assert abs(load_run(tmp_path)[0][column]) == float("inf")
    else:
        with pytest.raises(NormDynError, match="is damaged") as said:
            load_run(tmp_path)
        assert len(str(said.value)) < 500
