"""The LightningCLI configurations: each trains, and each callback of the package has one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

import lightning_normdyn

CLI = Path(__file__).resolve().parents[2] / "examples" / "cli"
CONFIGS = sorted(CLI.glob("*.yaml"))


def load_main():
    sys.path.insert(0, str(CLI))
    try:
        import main
    finally:
        sys.path.remove(str(CLI))
    return main.main


@pytest.mark.sampled(2)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configuration_trains(config: Path) -> None:
    if config.stem == "replay":
        train(CLI / "monitor.yaml")  # what it replays
    cli = train(config)
    assert cli.trainer.global_step == 3
    assert len(lightning_normdyn.load_history(Path("runs/cli") / config.stem / "history.npz")) > 0


def train(config: Path):
    return load_main()(
        [
            "fit",
            "--config",
            str(config),
            "--trainer.max_steps=3",
            "--trainer.accelerator=cpu",
            "--model.width=4",
        ]
    )


def test_replay_without_a_record_says_what_is_missing() -> None:
    with pytest.raises((lightning_normdyn.NormDynError, OSError), match=r"history\.npz"):
        train(CLI / "replay.yaml")


def test_every_callback_has_a_configuration() -> None:
    from lightning import Callback

    public = {
        f"lightning_normdyn.{name}"
        for name in lightning_normdyn.__all__
        if _is_a(getattr(lightning_normdyn, name), Callback) and name != "NormDynCallback"
    }
    shown = {
        entry["class_path"]
        for config in CONFIGS
        for entry in yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    }
    assert public <= shown


def _is_a(thing: object, kind: type) -> bool:
    return isinstance(thing, type) and issubclass(thing, kind)


def test_wrong_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_main()(["fit", "--config", str(CLI / "aws.yaml"), "--trainer.callbacks.alpha=big"])
    assert "alpha" in capsys.readouterr().err
