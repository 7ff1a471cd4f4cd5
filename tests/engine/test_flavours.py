"""Lightning's two packages: callbacks work with both, in every order of imports, and a user of one
imports nothing of the other."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import pickle
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from cases import EVERYBODY
from flavour import FLAVOUR, OTHER
from models import TARGETS, convnet, fit, loader, make, same, sgd, weights_of
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    InputSpanMonitor,
    NormDynamicsMonitor,
    NormDynCallback,
    NormDynWarning,
    NotSupportedError,
)
from lightning_normdyn.engine.flavours import PACKAGES, classes
from lightning_normdyn.input_span.part import refuse_strategy
from lightning_normdyn.monitor.loggers import CSVPublisher, TensorBoardPublisher, publishers

# ---- Both in one process ----

# In a run of the tests under one flavour the other is not imported at all.
pytestmark = pytest.mark.skipif(
    FLAVOUR != "lightning.pytorch", reason="another run of the tests imports both"
)


@pytest.fixture(scope="module")
def other():
    """The package that the tests do not use themselves."""
    return importlib.import_module(OTHER)


@pytest.fixture(scope="module")
def make_other(other):
    """The tests' module as a user of the other package writes it; same weights at every call."""

    class Net(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = convnet().double()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return sgd(self.parameters())

    return lambda: make(Net)


SILENT = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 2,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.mark.parametrize("name", EVERYBODY)
def test_a_fit_is_the_same_with_both(name, other, make_other):
    module, callback = make(), EVERYBODY[name]()
    theirs, same_callback = make_other(), EVERYBODY[name]()
    assert isinstance(callback, classes("", "Callback")[0])
    assert isinstance(callback, classes("", "Callback")[1])
    fit(module, [callback])
    # Alone, not in a list.
    runner = other.Trainer(callbacks=same_callback, logger=False, **SILENT)
    runner.fit(theirs, loader())
    assert same(weights_of(module), weights_of(theirs))
    assert callback.steps_of(0) == same_callback.steps_of(0) == 8
    # One callback serves both, one after the other.
    again = make()
    fit(again, [same_callback])
    assert same(weights_of(again), weights_of(theirs))


@pytest.mark.parametrize("name", EVERYBODY)
def test_subclasses_and_copies_are_callbacks_of_both(name, other):
    class Mine(type(EVERYBODY[name]())):
        """A user's own."""

    original = EVERYBODY[name]()
    for callback in (original, copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert all(isinstance(callback, package) for package in classes("", "Callback"))
        assert callback.state_key == original.state_key
    assert all(issubclass(Mine, package) for package in classes("", "Callback"))
    # Ours comes before theirs: a hook that it defines is the one that is called.
    assert Mine.setup is NormDynCallback.setup


def test_a_checkpoint_of_one_is_resumed_by_the_other(other, make_other, tmp_path):
    path = tmp_path / "first.ckpt"
    callback = AdaptiveWeightShrink(0.5)
    fit(make(), [callback], max_epochs=1, enable_checkpointing=True).save_checkpoint(path)
    theirs, resumed = make_other(), AdaptiveWeightShrink(0.5)
    trainer = other.Trainer(callbacks=[resumed], logger=False, **SILENT)
    # Releases that read weights alone by default have an argument for the rest.
    has_argument = "weights_only" in inspect.signature(trainer.fit).parameters
    everything = {"weights_only": False} if has_argument else {}
    trainer.fit(theirs, loader(), ckpt_path=path, **everything)
    assert resumed.steps_of(0) == 8
    whole = make()
    fit(whole, [AdaptiveWeightShrink(0.5)])
    assert same(weights_of(whole), weights_of(theirs))


def test_the_trainer_of_a_third_package_is_refused():
    class Trainer:
        """Of nobody we know."""

    with pytest.raises(NotSupportedError, match=r"Trainer of `.+`; it works with those of `light"):
        AdaptiveWeightShrink(0.5).setup(Trainer(), make(), "fit")


def test_loggers_of_both(other, make_other, tmp_path):
    loggers = importlib.import_module(f"{OTHER}.loggers")
    ours = importlib.import_module(f"{FLAVOUR}.loggers")

    class Mine(loggers.CSVLogger):
        """A user's own."""

    kinds = [
        ours.CSVLogger(tmp_path / "a"),
        Mine(tmp_path / "b"),
        loggers.TensorBoardLogger(tmp_path),
    ]
    found = [type(publisher) for publisher in publishers(kinds)]
    assert found == [CSVPublisher, CSVPublisher, TensorBoardPublisher]
    monitor, logger = NormDynamicsMonitor(1, tables=False), loggers.CSVLogger(tmp_path, name="fit")
    other.Trainer(callbacks=monitor, logger=logger, **SILENT).fit(make_other(), loader())
    assert (Path(logger.log_dir) / "history.npz").exists()
    assert f"effective_lr/{TARGETS[0]}" in (Path(logger.log_dir) / "metrics.csv").read_text()


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_of_both_are_refused_where_they_cut_weights(package, name, other):
    strategy = getattr(importlib.import_module(f"{package}.strategies"), name)
    # Made without its constructor, which wants DeepSpeed or a GPU, and without a Trainer, which
    # would ask it for more than it knows.
    runner = SimpleNamespace(
        strategy=strategy.__new__(strategy), distributed_sampler_kwargs=None, world_size=1
    )
    with pytest.raises(NotSupportedError, match=f"which {name} does not keep"):
        refuse_strategy(runner)


@pytest.mark.parametrize("bar", ["RichProgressBar", "TQDMProgressBar"])
def test_tables_are_printed_by_the_bars_of_both(bar, other, make_other, capsys):
    bars = importlib.import_module(f"{OTHER}.callbacks")
    settings = {**SILENT, "enable_progress_bar": True, "logger": False}
    callbacks = [getattr(bars, bar)(), NormDynamicsMonitor(1), InputSpanMonitor()]
    other.Trainer(callbacks=callbacks, **settings).fit(make_other(), loader())
    assert capsys.readouterr().out.count("lightning-normdyn: targets") == 1


def test_finetuning_of_both_is_known(other, make_other, capsys):
    bases = importlib.import_module(f"{OTHER}.callbacks").BaseFinetuning

    class Unfreeze(bases):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[:6], train_bn=True)

        def finetune_function(self, pl_module, epoch, optimizer):
            """Never."""

    callbacks = [Unfreeze(), AdaptiveWeightShrink(0.5)]
    # Who brings such a callback means it so: told, and not warned of.
    with pytest.warns(NormDynWarning, match="AdaptiveWeightShrink did nothing in this fit"):
        other.Trainer(callbacks=callbacks, logger=False, **SILENT).fit(make_other(), loader())
    assert "It does nothing until" in capsys.readouterr().out


def test_the_command_line_of_the_other(other, make_other, tmp_path, monkeypatch):
    cli = importlib.import_module(f"{OTHER}.cli")
    config = {
        "trainer": {
            **SILENT,
            "logger": False,
            "callbacks": [
                {
                    "class_path": "lightning_normdyn.AdaptiveWeightShrink",
                    "init_args": {"alpha": 0.5},
                },
                {
                    "class_path": "lightning_normdyn.NormDynamicsMonitor",
                    "init_args": {"every_n_steps": 1, "tables": False},
                },
            ],
        }
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    module = type(make_other())

    class Data(other.LightningDataModule):
        def train_dataloader(self):
            return loader()

    ran = cli.LightningCLI(
        module,
        Data,
        args=["fit", "--config", str(tmp_path / "config.yaml")],
        save_config_callback=None,
    )
    shrink, monitor = ran.trainer.callbacks[:2]
    assert (shrink.alpha, shrink.steps_of(0), len(monitor.history)) == (0.5, 8, 8)


# ---- Every order of imports ----

SCRIPT = """
import copy, importlib, pickle, sys

def loaded():
    tops = {name.split(".")[0] for name in sys.modules}
    return tops & {"lightning", "lightning_fabric", "pytorch_lightning"}

def use(package):
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    class Net(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 2))

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for callback in (made, Mine(1, tables=False), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert isinstance(callback, package.Callback)
        package.Trainer(
            callbacks=callback, max_epochs=1, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(Net(), DataLoader(torch.randn(4, 4), batch_size=2))
        assert len(callback.history) == 2

packages = []
for word in sys.argv[1:]:
    before = loaded()
    if word == "ours":
        from lightning_normdyn import NormDynamicsMonitor, StepBracket
        class Mine(NormDynamicsMonitor):
            "A user's own."
        made = Mine(1, tables=False)
        assert loaded() == before, loaded()
    else:
        packages.append(importlib.import_module(word))
for package in packages:
    assert issubclass(Mine, package.Callback)
    use(package)
print(">", ",".join(sorted(loaded())))
"""

# What Lightning itself needs for seconds is imported once. Each script then runs in a fork, which
# has not imported Lightning or anything of ours.
FORKS = """
import os, sys
import torch, torch._dynamo, torchmetrics

script, *runs = sys.argv[1:]
for run in runs:
    child = os.fork()
    if child == 0:
        sys.argv = ["script", *run.split()]
        exec(script)
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"failed: {run}")
"""


def in_forks(script: str, *runs: str, folder: Path | None = None) -> list[str]:
    """Run a script once for each line of arguments, always as if in a fresh process.

    Returns:
        The line that each run has printed with "> " before it.
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS, script, *runs],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if line.startswith("> ")]


# What is loaded at the end, by what was imported.
ONE = {
    "lightning": "> lightning",
    "lightning.pytorch": "> lightning",
    "pytorch_lightning": "> lightning_fabric,pytorch_lightning",
}


@pytest.mark.slow
def test_ours_first_as_isort_has_it():
    assert in_forks(SCRIPT, "ours pytorch_lightning") == [ONE["pytorch_lightning"]]


@pytest.mark.slow
def test_every_order_of_imports():
    expected = {}
    for package, loaded in ONE.items():
        expected[f"ours {package}"] = expected[f"{package} ours"] = loaded
    for order in permutations(["ours", "lightning", "pytorch_lightning"]):
        expected[" ".join(order)] = "> lightning,lightning_fabric,pytorch_lightning"
    assert in_forks(SCRIPT, *expected) == list(expected.values())


COMMAND_LINE = """
import importlib
from lightning_normdyn import NormDynamicsMonitor

class Mine(NormDynamicsMonitor):
    "Older than the command line that is asked for it."

package, other = sys.argv[1:]
cli = importlib.import_module(f"{package}.cli")
classes = importlib.import_module(f"{package}.demos.boring_classes")

ran = cli.LightningCLI(
    classes.BoringModel, classes.BoringDataModule, save_config_callback=None,
    args=["fit", "--trainer.callbacks=Mine", "--trainer.callbacks.every_n_steps=1",
          "--trainer.callbacks+=lightning_normdyn.AdaptiveWeightShrink", "--trainer.callbacks.alpha=0.5",
          "--trainer.callbacks.params=layer.weight",
          "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.logger=false",
          "--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"],
)
assert len(ran.trainer.callbacks[0].history) == 2
assert other not in sys.modules
print(">", package)
"""


@pytest.mark.slow
def test_a_command_line_knows_classes_that_are_older_than_itself(tmp_path):
    runs = [" ".join(PACKAGES), " ".join(PACKAGES[::-1])]
    ran = in_forks(COMMAND_LINE, *runs, folder=tmp_path)
    assert ran == [f"> {package}" for package in PACKAGES]


# ---- The callbacks' tests once more ----

ROOM = Path(__file__).parents[1]
ONCE_MORE = [
    "callbacks input_span monitor/test_recording.py monitor/test_loggers.py "
    "monitor/test_history_files.py monitor/test_alarms.py monitor/report test_resume.py",
    "engine test_conformance.py test_strategies.py",
]


# What a test computes is the same under both names, so one of its parametrizations is enough;
# `make test-versions` runs them all.
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("files", ONCE_MORE)
def test_under_pytorch_lightning(files):
    """Quick tests once more, in a process that never imports ``lightning``."""
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"),
            *("-m", "not slow and not rare and not deepspeed", *files.split()),
        ],
        cwd=ROOM,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "NORMDYN_TEST_FLAVOUR": "pytorch_lightning",
            "NORMDYN_TEST_MEMBERS": "1",
        },
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
