"""The command line: results on stdout, errors in one line, exit codes, nothing half written."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lightning_normdyn.__main__ as command_line
from lightning_normdyn.monitor import workspace
from lightning_normdyn.monitor.history import History, load_history
from lightning_normdyn.monitor.report import page
from lightning_normdyn.monitor.report import runs as run_files

main = command_line.main
SOURCE_TREE = Path(__file__).parents[1]


def run_of(layers: int = 2) -> History:
    history = History()
    for step in range(5):
        row = {f"effective_lr/conv{i}.weight": 0.1 * (i + 1) for i in range(layers)}
        history.append(step, row, optimizer_step=step + 1)
    return history


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments: str) -> str:
    """The one line that a failing command says."""
    assert main(arguments) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def usage_error(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    return capsys.readouterr().err


# --- all commands


@pytest.mark.parametrize("command", ["demo", "inspect", "forecast", "report", "workspace"])
def test_help_shows_examples(capsys, command):
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0
        assert f"  lightning-normdyn {command}" in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['lightning_normdyn', 'report', '--help']\n"
        "try:\n    runpy.run_module('lightning_normdyn', run_name='__main__')\n"
        "finally:\n    assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "one self-contained HTML file" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["draw"],
        ["report"],
        ["inspect"],
        ["forecast", "a:B"],
        ["forecast", "a:B", "--steps", "0"],
        ["demo", "--preset", "huge"],
        ["inspect", "torch.nn"],
        ["inspect", "torch.nn:"],
        ["workspace", "no-slash"],
        ["workspace", "a/b/c"],
        ["workspace", "/b"],
    ]
    + [
        ["inspect", "a:B", *rest]
        for rest in (
            ["--input-shape", "3,x"],
            ["--input-shape", "0"],
            ["--set", "depth"],
            ["--batch-size", "-1"],
        )
    ],
)
def test_wrong_usage_is_2(capsys, arguments):
    assert "usage:" in usage_error(capsys, *arguments)


def test_a_failure_that_nobody_foresaw_is_one_line_too(capsys, monkeypatch):
    run_of().save("run.npz")
    monkeypatch.setattr(page, "write_report", lambda *_, **__: {}["missing"])
    assert "KeyError; run again with --traceback" in refused(capsys, "report", "run.npz")
    with pytest.raises(KeyError):
        main(["report", "run.npz", "--traceback"])


def test_ctrl_c_is_quiet(capsys, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_files, "load_run", interrupted)
    assert main(["report", "run.npz"]) == 130
    assert capsys.readouterr().err == ""


def test_as_a_process_it_is_quiet_and_its_reader_may_leave():
    run_of().save("run.npz")
    # What it prints to a reader who stays, test_documented_commands.py asks of a process.
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "lightning_normdyn", "report", "run.npz"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=1000,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("report.html").is_file()


# --- forecast


def test_the_documented_forecast_is_what_the_command_prints(capsys, monkeypatch):
    page = (SOURCE_TREE / "docs" / "getting_started.md").read_text(encoding="utf-8")
    command, printed = re.search(
        r"```console\n\$ (lightning-normdyn forecast [^\n]*)\n(.*?)```", page, re.DOTALL
    ).groups()
    monkeypatch.chdir(SOURCE_TREE)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(command.split()[1:]) == 0
    out = capsys.readouterr().out
    assert out == printed
    (row,) = [line.split() for line in out.splitlines() if line.startswith("SGD 0 ")]
    # lr 0.1, decay 5e-3, momentum 0.9, 2000 steps.
    memory = 1 / (0.1 * 5e-3 / (1 - 0.9))
    angle = math.sqrt(2 * 0.1 * 5e-3 / (1 + 0.9))
    assert row[2:] == [
        "10", "0.1", "0.005", f"{memory:.0f}", f"{memory / 2000:.0%}"[:-1], "%", "-",
        f"{angle:.2g}", f"{memory / 4:.0f}",
    ]  # fmt: skip


def test_forecast_says_what_is_wrong(capsys, model):
    steps = ["--steps", "10"]
    assert "needs a LightningModule" in refused(capsys, "forecast", f"{model}:Lit", *steps)
    said = refused(capsys, "forecast", f"{model}:Untrained", *steps)
    assert "cannot be made without training: ZeroDivisionError" in said
    said = refused(capsys, "forecast", f"{model}:Untrained", *steps, "--input-shape", "5")
    assert "Check --input-shape" in said


# --- report


def test_report_of_one_and_of_several_runs(capsys):
    run_of().save("decay/history.npz")
    run_of(3).save("aws/history.npz")
    run_of(2).save("mnist/version_0/history.npz")
    assert main(["report", "decay/history.npz"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert main(["report", "decay", "best=aws", "mnist/version_0", "-o", "new/all.html"]) == 0
    page = Path("new/all.html").read_text()
    assert "<h2>decay</h2>" in page
    assert "<h2>best</h2>" in page
    # A reader knows the folder, and not which of its runs was the first.
    assert "<h2>mnist</h2>" in page
    assert "version_0" not in page


def test_runs_are_held_against_the_first(capsys):
    for name, angle in (("narrow", 0.01), ("wide", 0.02)):
        history = run_of()
        history.append(9, {"angular_update/conv0.weight": angle}, optimizer_step=10)
        history.save(f"{name}.npz")
    assert main(["report", "narrow.npz", "w=wide.npz", "--compare", "-o", "page.html"]) == 0
    out = capsys.readouterr().out
    assert "w over narrow" in out
    assert re.search(r"conv0.weight( +-){3} +2.00", out)
    assert out.endswith("\npage.html\n")
    assert "<h2>w over narrow</h2>" in Path("page.html").read_text()
    Path("page.html").unlink()
    assert "at least two" in refused(capsys, "report", "wide.npz", "--compare", "-o", "page.html")
    assert not Path("page.html").exists()


def test_report_of_a_folder_has_all_runs_below_it(capsys):
    run_of().save("runs/decay/version_0/history.npz")
    run_of(3).save("runs/aws/version_0/history.npz")
    assert main(["report", "runs"]) == 0
    page = Path("report.html").read_text()
    assert "<h2>decay</h2>" in page
    assert "<h2>aws</h2>" in page
    capsys.readouterr()
    Path("empty").mkdir()
    assert "holds no run" in refused(capsys, "report", "empty")


@pytest.mark.parametrize(
    ("output", "says"),
    [("run.npz/report.html", "File exists"), ("/proc/nowhere/report.html", "No such file")],
)
def test_what_cannot_be_written_is_said_in_words(capsys, output, says):
    run_of().save("run.npz")
    assert main(["report", "run.npz", "-o", output]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert "Errno" not in said
    assert os.listdir() == ["run.npz"]


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/decay/history.npz", "runs/aws/history.npz"], ["decay", "aws"]),
        (["a/x/history.npz", "b/x/history.npz", "b/y"], ["a/x", "b/x", "y"]),
        (["one.npz", "two.npz", "three"], ["one", "two", "three"]),
        (["one.npz", "one.npz"], None),
        (["mnist/lightning_logs/version_0/history.npz"], ["mnist"]),
        (["a/version_0", "a/version_1", "b/version_0"], ["a (version 0)", "a (version 1)", "b"]),
        (["L=one.npz", "L=two.npz"], ["L", "L (2)"]),
    ],
)
def test_labels_tell_runs_apart(paths, labels):
    found = [
        label
        for label, _ in command_line._distinct([command_line._named_run(path) for path in paths])
    ]
    assert len(set(found)) == len(paths)
    assert labels is None or found == labels


def test_a_still_report_is_asked_for_or_made_without_plotly_and_says_so(capsys, monkeypatch):
    run_of().save("run.npz")
    assert main(["report", "run.npz", "--still"]) == 0
    assert capsys.readouterr() == ("report.html\n", "")
    asked = Path("report.html").read_text()
    monkeypatch.setattr(page, "plotly_script", lambda: None)
    assert main(["report", "run.npz"]) == 0
    assert "lightning-normdyn[report]" in capsys.readouterr().err
    missing = Path("report.html").read_text()
    assert "as was asked for" in asked
    assert "lightning-normdyn[report]" in missing
    assert "<template" not in asked + missing


def test_a_path_with_an_equals_sign_is_a_path():
    run_of().save("lr=0.1/history.npz")
    assert main(["report", "lr=0.1"]) == 0
    assert "<h2>lr=0.1</h2>" in Path("report.html").read_text()


HOSTILE = {
    "no.npz": b"",
    "pickle.npz": b"\x80\x04cos\nsystem\n(S'touch executed'\ntR.",
    "half.npz": None,
    "binary.npz": b"\x00\xff" * 100,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_run_writes_nothing_and_runs_nothing(capsys, name):
    run_of().save("good.npz")
    content = HOSTILE[name] if HOSTILE[name] is not None else Path("good.npz").read_bytes()[:500]
    Path(name).write_bytes(content)
    assert name in refused(capsys, "report", "good.npz", name, "-o", "report.html")
    assert sorted(os.listdir()) == sorted(["good.npz", name])


def test_object_arrays_are_not_unpickled(capsys):
    np.savez("objects.npz", header=np.array([print], dtype=object))
    assert "objects.npz" in refused(capsys, "report", "objects.npz")


def test_report_never_overwrites_a_run_or_a_folder(capsys):
    run_of().save("run.npz")
    assert "one of the runs" in refused(capsys, "report", "run.npz", "-o", "./run.npz")
    assert len(load_history("run.npz")) == 5
    assert "is a folder" in refused(capsys, "report", "run.npz", "-o", ".")
    Path("file").touch()
    assert "file" in refused(capsys, "report", "run.npz", "-o", "file/report.html")


# --- inspect

MODEL = """
import lightning.pytorch as pl
from torch import nn
import neighbour

class Net(nn.Module):
    def __init__(self, width=4, norm="batch"):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width) if norm == "batch" else nn.Identity()

    def forward(self, x):
        return self.norm(self.conv(x))

class Lit(Net):
    def __init__(self):
        import torch
        super().__init__()
        self.example_input_array = torch.zeros(2, 3, 8, 8)

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 6), nn.Linear(6, 5, bias=False)

    def forward(self, ids):
        return nn.functional.layer_norm(self.head(self.table(ids)), (5,))

class Broken(nn.Module):
    def __init__(self):
        raise RuntimeError("no such luck\\nsecond line")

class Untrained(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)

    def configure_optimizers(self):
        return 1 / 0

nothing = dict
"""


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "my_model.py").write_text(MODEL)
    (folder / "neighbour.py").write_text("")
    yield f"{folder}/my_model.py"
    for name in ("my_model", "neighbour"):
        sys.modules.pop(name, None)


def table(capsys, *arguments: str) -> dict[str, str]:
    """The verdict of each weight."""
    path = list(sys.path)
    assert main(["inspect", *arguments]) == 0
    assert sys.path == path
    lines = capsys.readouterr().out.splitlines()
    place = lines[0].index("scale-invariant")
    return {line.split()[0]: line[place:].split()[0] for line in lines[1:]}


def test_inspect_says_which_weights_are_scale_invariant(capsys, model):
    assert table(capsys, f"{model}:Net", "--input-shape", "3,8,8") == {"conv.weight": "filter"}
    assert table(
        capsys, f"{model}:Net", "--input-shape", "3,8,8", "--set", "norm=none", "--set", "width=2"
    ) == {"conv.weight": "no"}
    assert table(capsys, f"{model}:Lit") == {"conv.weight": "filter"}
    assert (
        table(capsys, f"{model}:Words", "--input-shape", "7", "--integers", "10")["head.weight"]
        == "layer"
    )


def test_inspect_takes_a_module_of_the_working_folder(capsys, model, monkeypatch):
    monkeypatch.chdir(Path(model).parent)
    assert table(capsys, "my_model:Lit") == {"conv.weight": "filter"}


def test_inspect_says_what_is_wrong(capsys, model):
    assert "give --input-shape" in refused(capsys, "inspect", f"{model}:Net")
    assert "Check --input-shape" in refused(capsys, "inspect", f"{model}:Net", "--input-shape", "5")
    assert "cannot be built: TypeError" in refused(
        capsys, "inspect", f"{model}:Net", "--set", "depth=3"
    )
    assert "cannot be built: RuntimeError: no such luck. " in refused(
        capsys, "inspect", f"{model}:Broken"
    )
    assert "has no `Other`" in refused(capsys, "inspect", f"{model}:Other")
    assert "gives dict" in refused(capsys, "inspect", f"{model}:nothing")
    assert "cannot be imported: ModuleNotFoundError" in refused(
        capsys, "inspect", "nowhere_at_all:Net"
    )
    assert "cannot be imported: FileNotFoundError" in refused(capsys, "inspect", "nowhere.py:Net")


# --- demo


def installed_with(monkeypatch, tmp_path: Path, example: str | None) -> None:
    """As if the package lay in a folder of its own, with or without the example beside it."""
    (tmp_path / "site" / "lightning_normdyn").mkdir(parents=True)
    monkeypatch.setattr(
        command_line, "__file__", str(tmp_path / "site" / "lightning_normdyn" / "__main__.py")
    )
    if example is not None:
        (tmp_path / "site" / "examples").mkdir()
        (tmp_path / "site" / "examples" / "digits_resnet.py").write_text(example)


ENDS = {
    "import": """
import sys
sys.exit({code})
""",
    "construction": """
import sys

class Model:
    def __init__(self):
        sys.exit({code})
""",
    "forward": """
import sys
from torch import nn

class Model(nn.Module):
    def forward(self, x):
        sys.exit({code})
""",
    "example": """
import sys
from torch import nn

class Model(nn.Module):
    @property
    def example_input_array(self):
        sys.exit({code})
""",
}


@pytest.mark.parametrize("code", ["", "0", "3", "'usage: train.py'"])
@pytest.mark.parametrize("where", ENDS)
def test_inspect_of_code_that_ends_the_process_says_so(capsys, where, code, request):
    name = f"ends_{abs(hash(request.node.name))}"
    Path(f"{name}.py").write_text(ENDS[where].format(code=code))
    shape = () if where == "example" else ("--input-shape", "3")
    said = refused(capsys, "inspect", f"{name}:Model", *shape)
    assert "SystemExit" in said
    assert code.strip("'") in said


def test_inspect_of_a_module_with_an_attribute_error_of_its_own_names_that(capsys):
    Path("broken_inside.py").write_text("import math\nmath.nothing\n")
    assert "cannot be imported: AttributeError" in refused(
        capsys, "inspect", "broken_inside:Model", "--input-shape", "3"
    )


def test_demo_without_the_example_says_where_to_get_it(capsys, monkeypatch, tmp_path):
    installed_with(monkeypatch, tmp_path, None)
    assert "'lightning-normdyn[examples]'" in refused(capsys, "demo")


def test_demo_without_what_it_needs_names_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(command_line, "_NEEDED_BY_DEMO", {"no_such_module": "scikit-learn"})
    said = refused(capsys, "demo")
    assert "needs scikit-learn. `pip install 'lightning-normdyn[examples]'`" in said


def test_demo_runs_the_example_and_reports_its_runs(capsys, monkeypatch, tmp_path):
    run_of().save("run.npz")
    example = """
import pathlib, shutil, sys
assert sys.argv[1:] == ["--demo", "--preset", "tiny", "--out", "there", "--logger", "csv"], sys.argv
for name in ("decay", "aws"):
    pathlib.Path("there", name).mkdir(parents=True)
    shutil.copy("run.npz", pathlib.Path("there", name, "history.npz"))
pathlib.Path("there/compare.png").touch()
print("chatter"); print("chatter", file=sys.stderr)
"""
    installed_with(monkeypatch, tmp_path, example)
    assert main(["demo", "--preset", "tiny", "--out", "there"]) == 0
    out, error = capsys.readouterr()
    assert out.split() == ["there/compare.png", "there/report.html"]
    assert error == ""
    page = Path("there/report.html").read_text()
    assert "<h2>weight decay</h2>" in page
    assert "<h2>AdaptiveWeightShrink</h2>" in page


def test_demo_that_fails_says_why(capsys, monkeypatch, tmp_path):
    installed_with(monkeypatch, tmp_path, "import sys\nsys.exit('error: scikit-learn is missing')")
    assert "the demonstration failed: scikit-learn is missing." in refused(capsys, "demo")


@pytest.mark.slow
def test_demo_for_real():
    pytest.importorskip("sklearn")
    assert main(["demo", "--preset", "tiny", "--out", "there"]) == 0
    assert len(load_history("there/decay/history.npz")) > 1
    assert len(load_history("there/aws/history.npz")) > 1
    assert Path("there/report.html").is_file()


# --- workspace


class Saved:
    """A workspace, and what became of it."""

    url = "https://wandb.example/team/project?nw=1"

    def __init__(self, *names: str, name: str, layers: list[str]) -> None:
        self.made_of = (*names, name, layers)

    def save(self) -> None:
        assert self.made_of[:3] == ("team", "project", "AWS")
        assert self.made_of[3] in ([], ["b", "a"])


def test_workspace_is_saved_and_its_place_printed(capsys, monkeypatch):
    monkeypatch.setattr(workspace, "wandb_workspace", Saved)
    assert main(["workspace", "team/project", "--name", "AWS"]) == 0
    assert capsys.readouterr().out == f"{Saved.url}\n"


def test_workspace_takes_the_layers_of_a_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(workspace, "wandb_workspace", Saved)
    history = History()
    history.append(0, {"weight_norm/a": 1.0, "weight_norm/b": 1.0}, optimizer_step=1)
    history.meta["targets"] = {"b": {}, "a": {}}
    place = str(history.save(tmp_path / "history.npz"))
    assert main(["workspace", "team/project", "--name", "AWS", "--layers", place]) == 0
    assert capsys.readouterr().out == f"{Saved.url}\n"


def test_workspace_that_cannot_be_sent_says_what_to_do(capsys, monkeypatch):
    class Refused(Saved):
        def save(self) -> None:
            raise RuntimeError("api_key not configured")

    monkeypatch.setattr(workspace, "wandb_workspace", Refused)
    said = refused(capsys, "workspace", "team/project")
    assert "RuntimeError: api_key not configured" in said
    assert "`wandb login`" in said
