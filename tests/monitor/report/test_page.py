"""The page stands on its own, shows what was recorded, and takes hostile names as text."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from histories import reported_run, run_with_three_faults

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.group_sizes import GroupSizes, as_plain
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.report import document, page
from lightning_normdyn.monitor.report.page import write_report

pytest.importorskip("matplotlib")

# The script of the docs' picture has the run with faults that this picture is of.
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "docs"))

import draw_report

CHROMIUM = draw_report.chromium()


# Drawing a page's pictures takes seconds; the tests of plots/ draw every one of them.
BOTH = [
    pytest.param(True, id="still", marks=pytest.mark.slow),
    pytest.param(False, id="interactive"),
]


@pytest.fixture
def _no_pictures_of_runs(monkeypatch):
    """Drawing takes most of the time of a report: for tests that ask about something else."""
    monkeypatch.setattr(page, "pictures_of", lambda *_: [])
    monkeypatch.setattr(page, "plotly_script", lambda: None)


class Page(HTMLParser):
    """What a browser would see: tags, attributes, texts of cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.rows, self.scripts, self.policy = [], [], [], ""
        self._in_cell = self._in_script = False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        if tag == "script":
            self.scripts.append("")
            self._in_script = True
        if tag == "meta" and dict(attributes).get("http-equiv"):
            self.policy = dict(attributes)["content"]

    def handle_data(self, text):
        if self._in_cell:
            self.rows[-1][-1] += text.strip()
        if self._in_script:
            self.scripts[-1] += text

    def handle_endtag(self, tag):
        self._in_cell &= tag not in ("td", "th")
        self._in_script &= tag != "script"


@pytest.mark.parametrize("still", BOTH)
def test_the_page_needs_nothing_from_outside(tmp_path, still):
    runs = {"decay": reported_run(), "aws": reported_run(factor=2)}
    path = write_report(runs, tmp_path / "new" / "report.html", still=still)
    assert path.stat().st_size < 3_000_000
    shown = Page(path)
    assert not [
        tag for tag, _ in shown.tags if tag in ("link", "iframe", "object", "embed", "base", "form")
    ]
    for _, attributes in shown.tags:
        for name in ("src", "href", "action", "srcset", "background"):
            assert attributes.get(name, "data:").startswith("data:")
    # Without what is packed, in whose letters any word may stand by chance.
    unpacked = re.sub(r"base64,[A-Za-z0-9+/=]*|<template.*?</template>", "", shown.source)
    assert "http" not in unpacked.replace("http-equiv", "")
    assert "@import" not in shown.source
    assert "default-src 'none'" in shown.policy
    (script,) = shown.scripts
    allowed = [script]
    if not still:
        allowed.append(unpacked_template(shown.source, "plotly"))
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'"
        for each in allowed
    ]
    assert shown.policy.endswith(f"script-src {' '.join(hashes)}")
    assert "unsafe-eval" not in shown.policy
    assert os.listdir(tmp_path / "new") == ["report.html"]


def test_of_many_runs_the_sentences_are_seen_together(tmp_path):
    def folded(count: int) -> int:
        runs = {f"run {i}": reported_run(2, 3) for i in range(count)}
        source = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
        assert source.count('class="sentence"') == source.count('class="cards"') == count
        return len(re.findall(r"</p>\s*<details>\s*<summary>Nothing|<summary>To look", source))

    assert (folded(3), folded(4)) == (0, 4)


def unpacked_template(source: str, name: str) -> str:
    """What the page's script unpacks from it."""
    (packed,) = re.findall(rf'<template id="{name}">(.*?)</template>', source)
    return gzip.decompress(base64.b64decode(packed, validate=True)).decode()


def test_every_picture_is_a_picture_and_says_what_it_shows(tmp_path):
    history = reported_run()
    history.append_vectors(0, {"weight_norm/conv0.weight": np.arange(1.0, 9)})
    shown = Page(write_report({"run": history}, tmp_path / "report.html", still=True))
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


@pytest.mark.parametrize("still", BOTH)
def test_runs_of_different_kinds_are_shown_as_far_as_they_go(tmp_path, still):
    few = History()
    few.append(5, {"weight_norm/a.weight": 1.0}, optimizer_step=1)
    gap = History()
    gap.append(
        0, {"gradient_cosine/a.weight": float("nan"), "effective_lr/b": 1.0}, optimizer_step=1
    )
    runs = {"few": few, "gap": gap, "full": reported_run()}
    shown = Page(write_report(runs, tmp_path / "report.html", still=still))
    assert len(shown.rows) == 1 + 1 + 2 + 3


@pytest.mark.parametrize("still", BOTH)
def test_hostile_names_stay_text(tmp_path, still):
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'$title$`"
    history = reported_run(names=[attack, "$style", "${body}"])
    history.meta = {
        "targets": {attack: {"scale_invariant": attack, "vectors": attack}},
        attack: [attack],
        "note": attack,
    }
    history.mark(3, attack)
    history.append_vectors(0, {f"weight_norm/{attack}": np.arange(1.0, 4)})
    runs = {attack: history, "$title": reported_run()}
    shown = Page(write_report(runs, tmp_path / "report.html", still=still))
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
def test_which_kernels_ran_stands_on_the_page(tmp_path):
    history = reported_run()
    history.meta["kernels"] = "torch (on <CPU>)"
    shown = Page(write_report({"run": history}, tmp_path / "report.html"))
    assert "Kernels: torch (on &lt;CPU&gt;)." in shown.source
    history.meta["kernels"] = 3
    shown = Page(write_report({"run": history}, tmp_path / "report.html"))
    assert "Kernels: " not in shown.source


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


def test_without_anything_that_draws_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NormDynError, match=r"lightning-normdyn\[plot\]"):
        write_report({"run": reported_run()}, tmp_path / "report.html", still=True)
    monkeypatch.setattr(page, "plotly_script", lambda: None)
    with pytest.raises(NormDynError, match=r"lightning-normdyn\[report\]"):
        write_report({"run": reported_run()}, tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


def test_an_interactive_page_holds_what_its_charts_show(tmp_path, monkeypatch):
    # It needs no matplotlib: what only that can draw is left out.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write_report({"run": reported_run(), "two": reported_run()}, tmp_path / "report.html")
    source = path.read_text(encoding="utf-8")
    data = json.loads(unpacked_template(source, "data"))
    assert [run["layers"] for run in data["runs"]] == [[f"conv{i}.weight" for i in range(3)]] * 2
    angles = next(c for c in data["runs"][0]["charts"] if c["quantity"] == "angular_update")
    measured = [line for line in angles["lines"] if not line["beside"]]
    assert [line["y"][-1] for line in measured] == [0.01, 0.02, 0.03]
    # A place for each chart, and a row of the table for each layer that charts show.
    shown = Page(path)
    places = [a for tag, a in shown.tags if tag == "figure"]
    of_runs = [a for a in places if a["data-run"] != "compared"]
    assert len(of_runs) == sum(len(run["charts"]) for run in data["runs"])
    assert len(places) - len(of_runs) == len(data["compared"]) > 0
    rows = [(a["data-run"], a["data-layer"]) for tag, a in shown.tags if tag == "tr" and a]
    assert sorted(rows) == [(run, layer) for run in "01" for layer in "012"]


@pytest.mark.parametrize("still", [True, False], ids=["still", "interactive"])
@pytest.mark.usefixtures("_no_pictures_of_runs")
def test_the_summary_names_three_planted_faults(tmp_path, still, monkeypatch):
    if not still:
        monkeypatch.setattr(page, "plotly_script", document.plotly_script)
    path = write_report({"run": run_with_three_faults()}, tmp_path / "report.html", still=still)
    source = path.read_text(encoding="utf-8")
    summary = re.search(r'<div class="summary">.*?</div>\s*</section>', source, re.DOTALL).group()
    names = re.findall(r'<h3 title="(.*?)">', summary)
    assert names == ["block9.weight", "block3.weight", "block6.weight"]
    tags = re.findall(r'<p class="tag">(.*?)</p>', summary)
    assert tags == ["no gradient", "slower than the others", "faster than the others"]
    assert "11 of 12 weights turn as expected; block9.weight has no gradient" in summary
    # With its curve, and what it is to be compared with.
    assert summary.count("<svg") == 3
    assert source.index('class="summary"') < source.index("<table>")


def with_script(page: Path, script: str, tmp_path: Path) -> Path:
    """A copy of a page in which another script runs, allowed by name under the page's policy."""
    source = page.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    source = source.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    copy = tmp_path / "scripted.html"
    copy.write_text(source.replace("</body>", f"<script>{script}</script></body>"))
    return copy


def in_browser(page: Path, script: str, tmp_path: Path) -> str:
    """The page's title after ``script`` has run in it."""
    return title_of(dumped(with_script(page, script, tmp_path), tmp_path).stdout)


def title_of(source: str) -> str:
    return re.search(r"<title>(.*?)</title>", source, re.DOTALL).group(1)


def dumped(
    page: Path, tmp_path: Path, size: str = "1280,9000", scheme: str = "light"
) -> subprocess.CompletedProcess:
    """The page as it is after its scripts have run, and what they said on the console."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        # Until it has drawn: the page unpacks itself, and draws what is near the screen.
        "--virtual-time-budget=30000",
        f"--window-size={size}",
        f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    return subprocess.run(
        [CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=1000, check=True
    )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_under_its_own_policy_every_chart_is_drawn_and_the_console_is_silent(tmp_path):
    runs = {"faults": run_with_three_faults(), "<b>other</b>": reported_run()}
    done = dumped(write_report(runs, tmp_path / "report.html"), tmp_path)
    assert "CONSOLE" not in done.stderr
    assert "Content Security Policy" not in done.stderr
    figures = re.findall(r'<figure class="chart".*?</figure>', done.stdout, re.DOTALL)
    assert len(figures) > 10
    for figure in figures:
        # A line's path, or the picture that a map is.
        assert 'class="js-line"' in figure or "<image" in figure


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_charts_rows_and_legend_go_together(tmp_path):
    page = write_report({"run": run_with_three_faults()}, tmp_path / "report.html")
    script = """
      (async () => {
        const wait = async done => { while (!done()) await new Promise(go => setTimeout(go, 50)); };
        const plots = () => [...document.querySelectorAll(".plot")];
        await wait(() => plots().every(plot => plot.on));
        const [angles, rates] = plots(), seen = [];
        const picked = plot => plot.data.filter(trace => trace.line.width === 3).map(trace => trace.meta[0]);
        // A row picks its layer out in all charts, and a curve its row.
        document.querySelectorAll("tbody tr")[3].click();
        await wait(() => picked(angles).length && picked(rates).length);
        seen.push([...new Set([...picked(angles), ...picked(rates)])].join("+"));
        angles.emit("plotly_click", {points: [{data: angles.data.find(trace => trace.meta[0] === "block6.weight")}]});
        await wait(() => picked(rates)[0] === "block6.weight");
        seen.push(document.querySelector("tr.chosen td").textContent);
        document.querySelector("#picked button").click();
        await wait(() => !picked(rates).length);
        // One zoom for all, and back.
        await Plotly.relayout(rates, {"xaxis.range[0]": 50, "xaxis.range[1]": 150});
        await wait(() => plots().every(plot => plot.layout.xaxis.range[0] === 50));
        seen.push(plots().map(plot => plot.layout.xaxis.range.join("-")).join(" "));
        await Plotly.relayout(angles, {"xaxis.autorange": true});
        await wait(() => plots().every(plot => plot.layout.xaxis.range[0] < 50));
        // The legend switches a layer off, in all charts of curves.
        const count = rates.data.length;
        document.querySelector(".legend button").click();
        await wait(() => rates.data.length < count);
        seen.push(count - rates.data.length, rates.data.some(trace => trace.meta[0] === "block0.weight"));
        document.title = seen.join("|");
      })();
    """
    row, curve, ranges, fewer, left = in_browser(page, script, tmp_path).split("|")
    assert (row, curve) == ("block3.weight", "block6.weight")
    assert set(ranges.split()) == {"50-150"}
    assert (fewer, left) == ("1", "false")


@pytest.fixture(scope="module")
def faulty_report(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "report.html"
    return write_report({"three faults": draw_report.train()}, path)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (400, 850)], ids=["desk", "phone"])
def test_three_planted_faults_of_a_run_stand_on_its_first_screen(
    faulty_report, tmp_path, size, scheme
):
    script = """
      addEventListener("load", () => {
        const luminance = element => {
          const [r, g, b] = getComputedStyle(element).color.match(/[0-9.]+/g).map(Number);
          return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
        };
        const names = [...document.querySelectorAll(".card h3")].filter(name => {
          const box = name.getBoundingClientRect();
          return box.top >= 0 && box.bottom <= innerHeight && box.right <= innerWidth;
        });
        const sideways = document.documentElement.scrollWidth > innerWidth;
        const text = luminance(document.body) > 0.5 ? "bright" : "dark";
        parent.postMessage([innerWidth, sideways, text, ...names.map(name => name.title)].join(), "*");
      });
    """
    page = with_script(faulty_report, script, tmp_path)
    # In a frame: the window of a browser is not made narrower than 500 pixels.
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<!DOCTYPE html><title>-</title><script>"
        "addEventListener('message', event => document.title = event.data);</script>"
        f"<iframe src='{page.as_uri()}' width={size[0]} height={size[1]} style='border:0'></iframe>"
    )
    said = title_of(dumped(outer, tmp_path, "1400,1000", scheme).stdout)
    width, sideways, text, *names = said.split(",")
    assert (int(width), sideways) == (size[0], "false")
    assert text == {"light": "dark", "dark": "bright"}[scheme]
    module = draw_report.ThreeFaults
    faults = (module.long, module.fast, module.dead)
    assert set(names) == {f"layers.{i}.weight" for i in faults}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_picture_of_the_docs_can_be_made_anew(faulty_report, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    draw_report.photograph(CHROMIUM, faulty_report, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as anew, Image.open(draw_report.PICTURE) as committed:
        assert anew.size == committed.size
        # Fonts differ from machine to machine, so pixels are no matter.
        assert len(anew.convert("RGB").getcolors(2**24)) > 20


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
    assert title_of(dumped(page, tmp_path).stdout) == "Weight dynamics: run"


@pytest.mark.usefixtures("_no_pictures_of_runs")
def test_sizes_by_param_group_stand_on_the_page_once(tmp_path):
    history = reported_run()
    history.meta["groups"] = as_plain(
        [GroupSizes("AdamW", "filter", 3, 0.1, 0.2, 0.23, 0.01, None)]
    )
    source = Page(write_report({"run": history}, tmp_path / "report.html", still=True)).source
    assert "sizes by param group" in source
    assert "RMS update" in source
    assert "rms_update" not in source
