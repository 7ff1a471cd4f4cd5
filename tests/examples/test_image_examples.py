"""ResNet18, VGG16 and the weight-standardized ResNet, on digits and on a CIFAR-10 archive of random
pixels."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import ModuleType

import cifar_resnet18
import cifar_vgg16_bn
import numpy as np
import pytest
import running
import ws_resnet
from cifar10 import FOLDER, TEST_BATCH, TRAIN_BATCHES

TINY = ("--preset", "tiny", "--accelerator", "cpu", "--logger", "none")


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    folder = tmp_path / FOLDER
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in (*TRAIN_BATCHES, TEST_BATCH):
        batch = {
            b"data": random.integers(0, 256, (32, 3072), dtype=np.uint8),
            b"labels": random.integers(0, 10, 32).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=4))
    return folder


def scale_invariant(run: running.Run) -> dict[str, bool]:
    """Whether each weight was found scale-invariant, by name."""
    return {
        name: target["scale_invariant"] in ("filter", "group", "layer")
        for name, target in run.history.meta["targets"].items()
    }


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", running.METHODS)
@pytest.mark.parametrize(
    "example", [cifar_resnet18, cifar_vgg16_bn, ws_resnet], ids=lambda module: module.__name__
)
@pytest.mark.usefixtures("_no_pictures")
def test_runs_on_digits_and_says_so(
    example: ModuleType, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = example.main([*TINY, "--method", method])
    assert run.trainer.global_step == 4
    assert (
        "uses scikit-learn's digits, enlarged, instead of CIFAR-10" in capsys.readouterr().out
        or run.trainer.datamodule.resolution == 8
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "example", [cifar_resnet18, cifar_vgg16_bn, ws_resnet], ids=lambda module: module.__name__
)
def test_runs_on_cifar_and_leaves_a_picture(
    example: ModuleType, cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = example.main([*TINY, "--cifar", str(cifar)])
    assert run.trainer.global_step == 4
    assert run.trainer.datamodule.channels == 3
    assert (run.out / "effective_lr.png").stat().st_size > 1000
    assert "digits" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "example", [cifar_resnet18, cifar_vgg16_bn, ws_resnet], ids=lambda module: module.__name__
)
def test_unreadable_cifar_ends_in_one_line_and_starts_nothing(
    example: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(
        SystemExit, match=r"error: CIFAR-10 was asked for at .*, and nothing is there"
    ):
        running.run_as_script(lambda: example.main([*TINY, "--cifar", str(tmp_path / "no")]))


def test_full_size_networks_have_the_papers_parameter_counts() -> None:
    resnet = cifar_resnet18.ResNet18("wrs", width=64)
    assert sum(p.numel() for p in resnet.parameters()) == 11_173_962
    vgg = cifar_vgg16_bn.VGG16(width=64)
    assert (
        sum(p.numel() for p in vgg.parameters()) == 14_728_266 - 4_224
    )  # the usual one has biases in its convolutions


@pytest.mark.usefixtures("_no_pictures")
def test_original_resnet_has_three_convolutions_that_are_not_scale_invariant() -> None:
    found = scale_invariant(cifar_resnet18.main([*TINY, "--arch", "original"]))
    shortcuts = {name for name in found if "shortcut" in name}
    assert len(shortcuts) == 3
    assert {name for name, yes in found.items() if not yes} == shortcuts | {"network.13.weight"}
    found = scale_invariant(cifar_resnet18.main([*TINY, "--arch", "wrs"]))
    assert {name for name, yes in found.items() if not yes} == {"network.13.weight"}


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_aws_goes_by_the_deviation_of_standardized_weights(norm: str) -> None:
    run = ws_resnet.main([*TINY, "--norm", norm, "--method", "aws", "--drops", ""])
    deviations = {
        name
        for name in run.history.meta["targets"]
        if len(run.history.column(f"weight_std/{name}")[0])
    }
    assert len(deviations & {name for name, yes in scale_invariant(run).items() if yes}) == 9
    lr, alpha = ws_resnet.PRESETS["default"]["lr"], ws_resnet.PRESETS["default"]["alpha"]
    name = "network.3.conv2.parametrizations.weight.original"
    std, effective, equivalent = (
        run.history.column(f"{quantity}/{name}")[1]
        for quantity in ("weight_std", "effective_lr", "equivalent_weight_decay")
    )
    np.testing.assert_allclose(
        effective, lr / std, rtol=0.02
    )  # means over filters: of a quotient, and a quotient of means
    np.testing.assert_allclose(equivalent, alpha * std, rtol=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "example", [cifar_resnet18, cifar_vgg16_bn, ws_resnet], ids=lambda module: module.__name__
)
@pytest.mark.usefixtures("_no_pictures")
def test_adamw_has_defaults_of_its_own_and_flags_still_count(example: ModuleType) -> None:
    def groups(*flags: str) -> list[tuple[float, float]]:
        run = example.main(
            [*TINY, "--method", "decay", "--max-steps", "1", "--optimizer", "adamw", *flags]
        )
        return [
            (group["initial_lr"], group["weight_decay"])
            for group in run.trainer.optimizers[0].param_groups
        ]

    assert groups() == [(1e-3, 1.0), (1e-3, 0.0)]
    assert groups("--weight-decay", "0.25") == [(1e-3, 0.25), (1e-3, 0.0)]
    if example is cifar_vgg16_bn:
        assert groups(
            "--preset", "paper", "--width", "4", "--resolution", "8", "--batch-size", "8"
        ) == [(1e-3, 1.0), (1e-3, 0.0)]


@pytest.mark.usefixtures("_no_pictures")
def test_drops_divide_the_learning_rate(capsys: pytest.CaptureFixture[str]) -> None:
    run = cifar_vgg16_bn.main([*TINY, "--method", "decay", "--drops", "0.25,0.75"])
    _, lr_over_norm = run.history.column("effective_lr/network.0.weight")
    _, norm = run.history.column("weight_norm/network.0.weight")
    np.testing.assert_allclose(
        lr_over_norm * norm, [0.1, 0.01, 0.01, 0.001], rtol=0.05
    )  # means over filters
    with pytest.raises(SystemExit):
        cifar_vgg16_bn.main([*TINY, "--drops", "0.5,2"])
    assert (
        "argument --drops: must be fractions between 0 and 1 such as 0.3,0.6,0.8, got 0.5,2"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "example", [cifar_resnet18, cifar_vgg16_bn, ws_resnet], ids=lambda module: module.__name__
)
def test_help_shows_the_defaults_of_the_preset_asked_for(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        example.main(["--preset", "paper", "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"passes through the training set (default: {example.PRESETS['paper']['epochs']})" in said
    )
    assert "(default: None)" not in said


def test_width_that_groups_do_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ws_resnet.main([*TINY, "--width", "6"])
    assert "argument --width: must be a multiple of 4" in capsys.readouterr().err
