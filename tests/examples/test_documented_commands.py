"""Every command that README, the examples and the docs show is run here as it is written, and its
result is looked at.

What a run of minutes would do is done in seconds: where `more` is given, these flags are appended
(a preset for tests, no GPU).
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from forked import run_script

from lightning_normdyn import load_history
from lightning_normdyn.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
TINY = "--preset tiny --accelerator cpu --logger none"
FEW = "--trainer.max_steps=3 --trainer.accelerator=cpu --model.width=4"
IS_A_COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:python|pip|make|lightning-normdyn)(?= )")


def documented() -> set[str]:
    """The commands in fenced blocks and in back quotes, and those in the docstrings of scripts."""
    found: set[str] = set()
    for page in [
        ROOT / "README.md",
        ROOT / "examples" / "README.md",
        ROOT / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
        lines = [line for kind, block in blocks if kind != "python" for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        found |= {command for line in lines if (command := cleaned(line))}
    for script in sorted((ROOT / "examples").rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        found |= {command for line in docstring.splitlines() if (command := cleaned(line))}
    return found


def cleaned(line: str) -> str | None:
    """A command without its prompt and its comment; None for other text."""
    line = re.split(r"\s#\s", line.strip().removeprefix("$ "))[0].strip()
    return line if IS_A_COMMAND.match(line) else None


@dataclass(frozen=True)
class Case:
    """How a command is run here and what must come of it.

    Args:
        check: gets the folder it ran in and what it printed.
        more: flags to append.
        instead: what to put in the place of placeholders.
        slow: whether it takes more than some seconds.
        here: call the command line in this process. Starting one takes seconds, and another
            command of the same kind has one.
    """

    check: Callable[[Path, str], None]
    more: str = ""
    instead: tuple[tuple[str, str], ...] = ()
    slow: bool = True
    here: bool = False


def leaves_history(place: str, weight: str = "") -> Callable[[Path, str], None]:
    def check(folder: Path, printed: str) -> None:
        history = load_history(folder / place / "history.npz")
        assert len(history) > 0
        keys = [key for key in set(history.keys()) if key.startswith("effective_lr/")]
        assert keys
        assert all(np.isfinite(history.column(key)[1]).all() for key in keys)
        assert "after" in printed
        assert "optimizer steps" in printed

    return check


def leaves(*files: str, says: str = "") -> Callable[[Path, str], None]:
    def check(folder: Path, printed: str) -> None:
        for file in files:
            assert (folder / file).stat().st_size > 1000
        assert says in printed

    return check


def shows(*texts: str) -> Callable[[Path, str], None]:
    def check(folder: Path, printed: str) -> None:
        for text in texts:
            assert text in printed

    return check


def aws_with(alpha: float) -> Callable[[Path, str], None]:
    """AWS began with a decay of ``alpha`` times the norm."""

    def check(folder: Path, printed: str) -> None:
        history = load_history(folder / "runs/cli/aws/history.npz")
        (name,) = [
            key.partition("/")[2]
            for key in set(history.keys())
            if key.startswith("equivalent_weight_decay/network.0.")
        ]
        decay, norm = (
            history.column(f"{quantity}/{name}")[1][0]
            for quantity in ("equivalent_weight_decay", "weight_norm")
        )
        assert decay / norm == pytest.approx(alpha, rel=1e-3)

    return check


CIFAR = "--cifar cifar-10-python.tar.gz"
GPU_PRESET = "--help"  # shows the values of the preset that is asked for, and runs nothing
CASES = {
    # README
    'pip install "lightning-normdyn[wandb,plot]"': Case(shows("wandb", "plot"), slow=False),
    "make demo": Case(shows("examples/digits_resnet.py --demo"), slow=False),
    "make test": Case(shows("-m pytest", "not slow and not deepspeed"), slow=False),
    "make docs": Case(shows("-m sphinx", "-W", "check_links.py"), slow=False),
    "make bench": Case(shows("benchmarks/cost.py"), slow=False),
    "make gpu": Case(shows("benchmarks/gpu.py"), slow=False),
    "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test": Case(
        shows("pip install", "-m pytest"), slow=False
    ),
    "lightning-normdyn inspect MODULE:CLASS": Case(
        shows("network.0.weight", "filter"),
        "--input-shape 1,8,8",
        (("MODULE:CLASS", "examples/digits_resnet.py:ResidualDigits"),),
    ),
    "lightning-normdyn report RUN... -o report.html": Case(
        leaves("report.html", says="report.html\n"), instead=(("RUN...", "recorded"),), slow=False
    ),
    "lightning-normdyn report FOLDER": Case(
        leaves("report.html"), instead=(("FOLDER", "recorded"),), slow=False, here=True
    ),
    # Sending it needs an account; tests/test_main.py and tests/monitor/test_workspace.py do the rest.
    "lightning-normdyn workspace ENTITY/PROJECT": Case(
        shows("ENTITY/PROJECT"), "--help", slow=False
    ),
    "pip install lightning-normdyn": Case(shows(), slow=False),
    # examples/README.md and the scripts
    'pip install "lightning-normdyn[examples]"': Case(shows("examples"), slow=False),
    "lightning-normdyn report history.npz": Case(
        leaves("history.html"),
        instead=(("history.npz", "recorded/history.npz -o history.html"),),
        slow=False,
        here=True,
    ),
    "python examples/digits_resnet.py --demo": Case(
        leaves("runs/demo/compare.png", "runs/demo/overview.png"), TINY
    ),
    "python examples/digits_resnet.py --method aws": Case(
        leaves_history("runs/digits_resnet/aws"), TINY
    ),
    "python examples/char_gpt.py --method aws": Case(leaves_history("runs/char_gpt/aws"), TINY),
    "python examples/char_gpt.py --method cautious": Case(
        leaves_history("runs/char_gpt/cautious"), TINY
    ),
    "python examples/char_gpt.py --norm plain --method rotation": Case(
        leaves_history("runs/char_gpt/rotation"), TINY
    ),
    "python examples/char_gpt.py --text my_book.txt --norm layer --method decay": Case(
        leaves_history("runs/char_gpt/decay"), TINY
    ),
    f"python examples/cifar_resnet18.py {CIFAR} --method wrs": Case(
        leaves_history("runs/cifar_resnet18/wrs"), TINY
    ),
    f"python examples/cifar_resnet18.py {CIFAR} --preset paper": Case(
        shows("--epochs"), GPU_PRESET
    ),
    f"python examples/cifar_vgg16_bn.py {CIFAR} --method wrs": Case(
        leaves_history("runs/cifar_vgg16_bn/wrs"), TINY
    ),
    f"python examples/cifar_vgg16_bn.py {CIFAR} --preset paper": Case(
        shows("--epochs"), GPU_PRESET
    ),
    "python examples/ws_resnet.py --norm bn --method aws": Case(
        leaves_history("runs/ws_resnet/aws"), TINY
    ),
    f"python examples/ws_resnet.py {CIFAR} --norm gn --method decay": Case(
        leaves_history("runs/ws_resnet/decay"), TINY
    ),
    "python examples/gan_manual_optimization.py --method aws": Case(
        leaves_history("runs/gan_manual_optimization/aws"), TINY
    ),
    "python examples/fsdp_transformer.py --devices 2 --accelerator cpu": Case(
        leaves_history("runs/fsdp_transformer/aws"), "--preset tiny --logger none --method aws"
    ),
    "python examples/fsdp_transformer.py --devices 8 --preset paper": Case(
        shows("--devices"), GPU_PRESET
    ),
    "python examples/noisy_rayleigh_quotient.py --out runs/nrq": Case(
        leaves("runs/nrq/figure2.png"), "--preset tiny"
    ),
    "python examples/noisy_rayleigh_quotient.py --preset tiny": Case(
        leaves("runs/noisy_rayleigh_quotient/figure2.png")
    ),
    "python examples/toy_2d.py --out runs/toy_2d": Case(leaves("runs/toy_2d/toy_2d.png")),
    # LightningCLI
    "python examples/cli/main.py fit --config examples/cli/aws.yaml": Case(aws_with(0.05), FEW),
    "python examples/cli/main.py fit --config examples/cli/aws.yaml --trainer.callbacks.alpha 0.1": Case(
        aws_with(0.1), FEW
    ),
    "python examples/cli/main.py fit --config examples/cli/wrs.yaml --trainer.max_epochs 5": Case(
        leaves_history("runs/cli/wrs"), FEW
    ),
    "python examples/cli/main.py fit "
    "--trainer.callbacks.help=lightning_normdyn.AdaptiveWeightShrink": Case(
        shows("alpha", "statistic")
    ),
    # docs
    # Its table is read in tests/test_main.py.
    "lightning-normdyn forecast examples/digits_resnet.py:ResidualDigits --steps 2000 --input-shape 1,8,8": Case(
        shows("forecast for 2,000 optimizer steps"), slow=True
    ),
    'pip install "lightning-normdyn[workspace]"': Case(shows("workspace"), slow=False),
    'pip install "lightning-normdyn[report]"': Case(shows("report"), slow=False),
    "lightning-normdyn demo": Case(
        leaves("runs/demo/report.html", "runs/demo/overview.png"), "--preset tiny"
    ),
    "lightning-normdyn inspect my_project.nets:LitResNet --input-shape 3,32,32": Case(
        shows("network.0.weight", "filter"),
        instead=(
            ("my_project.nets:LitResNet", "examples/digits_resnet.py:ResidualDigits"),
            ("3,32,32", "1,8,8"),
        ),
    ),
    "lightning-normdyn report runs/decay runs/aws -o report.html": Case(
        leaves("report.html", says="report.html\n"),
        instead=(("runs/decay runs/aws", "decay=recorded aws=recorded"),),
        here=True,
    ),
    "lightning-normdyn report narrow=runs/width64 wide=runs/width512 --compare": Case(
        leaves("report.html", says="narrow"),
        instead=(("runs/width64", "recorded"), ("runs/width512", "recorded")),
        here=True,
    ),
    "lightning-normdyn workspace my-team/my-project": Case(
        shows("ENTITY/PROJECT"), "--help", slow=False
    ),
    "make test-deepspeed": Case(shows("-m pytest -m deepspeed"), slow=False),
}
# Minutes even with the preset for tests; its module is trained in test_nrq_toy.py.
# The last two make environments of other versions and packages, in half an hour each.
TOO_LONG = {
    "python examples/noisy_rayleigh_quotient.py --lightning",
    "make test-clients",
    "make test-rare",
    "make test-versions",
}


def first_of_each_script() -> set[str]:
    """One command for each script, which tells whether the script imports all that it needs."""
    first: dict[str, str] = {}
    for command in CASES:
        script = re.search(r"^(lightning-normdyn)|python (\S+)", command)
        if script is not None:
            first.setdefault(script[0], command)
    return set(first.values())


# Commands that start processes themselves ask Python how it was started.
IN_ITS_OWN_PROCESS = first_of_each_script() | {c for c in CASES if "--devices 2" in c}


def test_every_documented_command_is_run_here() -> None:
    assert documented() == set(CASES) | TOO_LONG


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which the commands find what they name: the examples, an archive, a book, a
    recorded run."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "my_book.txt").write_text(
        "It was the best of times, it was the worst of times. " * 400, encoding="utf-8"
    )
    return tmp_path


def archive(folder: Path) -> None:
    import tarfile

    from cifar10 import FOLDER, TEST_BATCH, TRAIN_BATCHES

    inside = folder / FOLDER
    inside.mkdir()
    random = np.random.default_rng(0)
    for name in (*TRAIN_BATCHES, TEST_BATCH):
        batch = {
            b"data": random.integers(0, 256, (32, 3072), dtype=np.uint8),
            b"labels": random.integers(0, 10, 32).tolist(),
        }
        (inside / name).write_bytes(pickle.dumps(batch, protocol=4))
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(inside, FOLDER)


def recorded(folder: Path) -> None:
    import lightning as L
    from models import Net, convnet, loader

    from lightning_normdyn import NormDynamicsMonitor

    monitor = NormDynamicsMonitor(1, tables=False)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[monitor],
    )  # fmt: skip
    trainer.fit(Net(net=convnet()), loader())
    (folder / "recorded").mkdir()
    monitor.history.save(folder / "recorded" / "history.npz")


def ran(command: str, case: Case, folder: Path) -> str:
    for placeholder, value in case.instead:
        assert placeholder in command
        command = command.replace(placeholder, value)
    words = shlex.split(f"{command} {case.more}")
    # The script is this module, and may not be installed where tests run from a source tree.
    if words[0] == "lightning-normdyn":
        words[:1] = ["python", "-m", "lightning_normdyn"]
    if case.here:
        assert words[:3] == ["python", "-m", "lightning_normdyn"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main(words[3:]) == 0
        return printed.getvalue()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "Agg",
    }
    while "=" in words[0]:
        environment.update([words.pop(0).split("=", 1)])
    where = folder
    if words[0] == "make":  # what it would do: a machine without a network can do no more
        words, where = [*words, "-n", "-B"], ROOT
    elif words[0] == "python":
        if command not in IN_ITS_OWN_PROCESS:
            return run_script(words[1:], where, environment)
        words[0] = sys.executable
    done = subprocess.run(
        words, cwd=where, env=environment, capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def named_extras(command: str) -> str:
    """What a ``pip install`` asks for, if the package has it."""
    name, extras = re.fullmatch(r'pip install "?([\w-]+?)(?:\[([\w,]+)\]")?', command).groups("")  # type: ignore[union-attr]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nname = "{name}"\n' in project
    optional = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return " ".join(extra for extra in extras.split(",") if f"\n{extra} = [" in optional)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if case.slow else ())
        for command, case in CASES.items()
    ],
)
def test_a_documented_command_does_what_it_says(command: str, folder: Path) -> None:
    case = CASES[command]
    if CIFAR in command:
        archive(folder)
    if "recorded" in str(case.instead):
        recorded(folder)
    printed = named_extras(command) if command.startswith("pip") else ran(command, case, folder)
    case.check(folder, printed)


@pytest.mark.parametrize("config", ["aws", "wrs"])
def test_an_option_of_the_command_line_reaches_the_rule_of_a_configuration(config: str) -> None:
    """LightningCLI gives it to the last callback of the list, so the rule stands there."""
    import yaml

    callbacks = yaml.safe_load(
        (ROOT / "examples" / "cli" / f"{config}.yaml").read_text(encoding="utf-8")
    )["trainer"]["callbacks"]
    assert callbacks[-1]["class_path"] != "lightning_normdyn.NormDynamicsMonitor"
