"""Every reproduction of a claim runs, and leaves a table and a picture; what its verdicts rest on
does what it says."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "reproduce"
sys.path.insert(0, str(FOLDER))

import desk  # noqa: E402
import summary  # noqa: E402

SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("desk", "summary"))
TABLES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")


@pytest.fixture
def digits() -> desk.Images:
    return desk.load_images(desk.argparse.Namespace(cifar=None))


QUICK = ("effective_lr_curves",)


@pytest.mark.parametrize(
    "script",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in SCRIPTS],
)
def test_runs_tiny_and_leaves_table_and_picture(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--tiny", "--out", str(tmp_path)])
    # By its file: a folder of tests is named as one of the scripts.
    runpy.run_path(str(FOLDER / f"{script}.py"), run_name=script)["main"]()
    table = (tmp_path / f"{script}.md").read_text(encoding="utf-8")
    assert "| claim | measured here | reproduced |" in table
    assert f"]({script}.png)" in table
    assert f"benchmarks/reproduce/{script}.py --tiny" in table
    assert "the numbers mean nothing" in table
    assert (tmp_path / f"{script}.png").read_bytes().startswith(b"\x89PNG")
    # Whatever is printed is also what was written.
    assert table.strip() in capsys.readouterr().out


@pytest.mark.parametrize("script", TABLES)
def test_committed_table_comes_from_a_full_run(script):
    table = (FOLDER / f"{script}.md").read_text(encoding="utf-8")
    for said in (
        f"- command: `python benchmarks/reproduce/{script}.py",
        "- seeds: ",
        "- date: ",
        "- machine: ",
    ):
        assert said in table
    assert "--tiny" not in table
    assert (FOLDER / f"{script}.png").read_bytes().startswith(b"\x89PNG")
    for text in ((FOLDER / "README.md"), FOLDER.parent / "README.md"):
        assert f"{script}.md)" in text.read_text(encoding="utf-8"), (
            f"{text} does not link the table"
        )


def test_summary_of_all_claims_is_that_of_the_tables():
    assert summary.summary() in (FOLDER / "README.md").read_text(encoding="utf-8"), (
        "run python benchmarks/reproduce/summary.py"
    )


def test_summary_has_every_claim_with_its_outcome_and_the_guess(tmp_path):
    args = desk.arguments("text", {}, {}, ["--tiny", "--out", str(tmp_path)])
    report = desk.Report("A title", args, "About it.")
    report.claim("it holds", "|t| 5", True, "never shown")
    report.claim("it does |not|", "0.1", False, "too few steps")
    report.claim("it was looked at", "3", None)
    report.write("some", desk.figure(1)[0])
    assert summary.claims_of((tmp_path / "some.md").read_text(encoding="utf-8")) == [
        ("it holds", "\\|t\\| 5", "yes", ""),
        ("it does \\|not\\|", "0.1", "**no**", "too few steps"),
        ("it was looked at", "3", "-", ""),
    ]
    text = summary.summary(tmp_path)
    assert "1 of 3 hold here, 1 do not, 1 are shown and not judged." in text
    assert "| it does \\|not\\| | 0.1 | **no**. Perhaps: too few steps |" in text
    (tmp_path / "README.md").write_text(
        f"before\n{summary.START}\nold\n{summary.END}\nafter", encoding="utf-8"
    )
    summary.refresh(tmp_path)
    summary.refresh(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == f"before\n{text}\nafter"


def test_path_of_the_images_stays_private(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some.py", "--cifar", "/home/me/cifar", "--seeds", "3", "4"])
    assert (
        desk.arguments("text", {}, {}).command
        == "python benchmarks/reproduce/some.py --cifar PATH --seeds 3 4"
    )
    monkeypatch.setattr(sys, "argv", ["some.py", "--cifar=/home/me/cifar"])
    assert "/home/me" not in desk.arguments("text", {}, {}).command


def test_a_seed_decides_everything(digits):
    def losses(seed: int) -> np.ndarray:
        return desk.fit(lambda: desk.plain_network(1, 2), digits, desk.Recipe(3), seed).losses

    assert np.array_equal(losses(0), losses(0))
    assert not np.array_equal(losses(0), losses(1))


def test_a_fit_ends_at_the_first_loss_that_is_not_finite(digits):
    broken = digits._replace(train_x=torch.full_like(digits.train_x, math.nan))
    run = desk.fit(lambda: desk.plain_network(1, 2), broken, desk.Recipe(10), 0)
    assert run.failed_at == 0
    assert len(run.losses) == 1
    assert math.isnan(run.test_accuracy)


def test_a_plain_network_is_halved_twice_and_has_as_many_convolutions_as_asked_for():
    x = torch.zeros(2, 1, 8, 8)
    for pooled in (False, True):
        network = desk.plain_network(1, 2, convolutions=4, pooled=pooled)
        convolutions = [each for each in network if isinstance(each, torch.nn.Conv2d)]
        assert [each.out_channels for each in convolutions] == [2, 2, 4, 4]
        assert network[:-3](x).shape == (2, 4, 2, 2)
        assert network(x).shape == (2, 10)


def test_labels_that_stay_wrong_are_drawn_once(digits):
    from measured_vs_predicted import with_wrong_labels

    wrong = with_wrong_labels(digits._replace(label_noise=0.1), 0.1)
    # One in ten of those drawn is right by chance.
    share = (wrong.train_y != digits.train_y).float().mean()
    assert 0.06 < share < 0.12
    assert wrong.label_noise == 0.0
    assert torch.equal(wrong.train_y, with_wrong_labels(digits, 0.1).train_y)


def test_decay_reaches_the_convolutions_only():
    groups = (
        desk.Recipe(1, weight_decay=0.3, rest_decay=0.2, lr=0.5, rest_lr=0.1)
        .optimizer_for(desk.plain_network(1, 2))
        .param_groups
    )
    assert [(g["weight_decay"], g["lr"]) for g in groups] == [(0.3, 0.5), (0.2, 0.1), (0.0, 0.1)]
    assert all(p.dim() == 4 for p in groups[0]["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(desk.plain_network(1, 2).parameters()))


def test_paired_difference_and_its_t():
    difference, t = desk.paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert difference == 2.0
    assert t == pytest.approx(2.0 / (1.0 / 3**0.5))
    assert not desk.clear(t, seeds=3)  # 3.46 is no difference with three seeds
    assert desk.clear(t, seeds=4)
    assert desk.paired([2.0, 2.0], [2.0, 2.0]) == (0.0, 0.0)
    assert desk.paired([1.0, 2.0], [2.0, 3.0]) == (-1.0, -math.inf)


def test_stale_statistics_are_what_the_forward_pass_left(digits):
    """The arm without the correction differs from the arm with it by the running statistics, and by
    nothing else."""
    from wrs_against_decay import StaleStatistics

    from lightning_normdyn import WeightRescaling

    def train(*more):
        return desk.fit(
            lambda: desk.plain_network(1, 2),
            digits,
            desk.Recipe(4),
            0,
            [WeightRescaling(4, target_norm=0.1), *more],
        )

    follows, left = train(), train(StaleStatistics())
    same = {
        name: torch.equal(a, b)
        for (name, a), b in zip(
            follows.network.state_dict().items(), left.network.state_dict().values(), strict=True
        )
    }
    assert {name.rpartition(".")[2] for name, equal in same.items() if not equal} == {
        "running_mean",
        "running_var",
    }


def test_statistics_taken_anew_are_those_of_the_training_images(digits):
    from wrs_against_decay import renewed_accuracy

    run = desk.fit(lambda: desk.plain_network(1, 2), digits, desk.Recipe(30), 0)
    kept = {
        name: buffer.clone()
        for name, buffer in run.network.named_buffers()
        if name.endswith("running_mean")
    }
    for layer in run.network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.fill_(50.0)
    assert desk.evaluate(run.network, digits)[1] < 0.2
    renewed_accuracy(run.network, digits)
    for name, buffer in run.network.named_buffers():
        if name in kept:
            torch.testing.assert_close(buffer, kept[name], rtol=0.3, atol=0.3)


def test_decay_window_opens_and_closes_with_the_epochs(digits):
    from wrs_against_decay import DecayWindow

    digits = digits._replace(train_x=digits.train_x[:640], train_y=digits.train_y[:640])
    epoch = len(desk.Batches(digits, 64, 0))
    recipe = desk.Recipe(2 * epoch, weight_decay=0.3)
    build = lambda: desk.plain_network(1, 2)  # noqa: E731
    early, late, always = (
        desk.fit(build, digits, recipe, 0, [window], log_every=1).history.column(
            "normdyn/weight_norm"
        )[1]
        for window in (DecayWindow(stop=1), DecayWindow(start=1), DecayWindow())
    )
    never = desk.fit(build, digits, desk.Recipe(2 * epoch), 0, log_every=1).history.column(
        "normdyn/weight_norm"
    )[1]
    assert np.array_equal(early[: epoch + 1], always[: epoch + 1])
    assert np.array_equal(late[: epoch + 1], never[: epoch + 1])
    assert early[-1] > 1.2 * always[-1]
    assert late[-1] < never[-1] / 1.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("AdamW, cosine", 9),
        ("SGD with momentum, cosine", 9),
        ("AdamW, cosine, four convolutions", 4),
    ],
)
def test_angles_of_a_network_follow_from_its_start_and_the_schedule(name, layers, digits):
    import measured_vs_predicted as script

    steps = 800
    args = desk.arguments("text", {**script.DESK, "width": 4}, {}, [])
    arm = script.scheduled_arms(args, digits)[name]._replace(every=10)
    runs = script.scheduled_fits(arm, steps, 1, "cpu")
    now = script.Deviations.of(runs, "angular_update", "expected_angular_update")
    static = script.Deviations.of(runs, "angular_update", "equilibrium_angular_update")
    norms = script.Deviations.of(runs, "weight_norm", "expected_weight_norm")
    assert now.signed.shape == (layers, 8)
    # The first windows, in which all gradients point one way, are half of so short a run's error.
    assert now.quantile(0.5) < 0.15
    assert now.quantile(0.5) < static.quantile(0.5) / 2
    assert norms.quantile(0.9) < 0.15
    if arm.follows_from_start:
        alone = script.Deviations.from_start(runs, arm, steps)
        assert alone.signed.shape == now.signed.shape
        assert alone.quantile(0.5) < 0.2
        assert alone.quantile(0.5) < static.quantile(0.5) / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["AdamW 3e-3, decay .3, constant", "Muon 3e-3, decay .3, constant"]
)
def test_every_matrix_of_a_transformer_has_a_balance_and_a_verdict(name):
    import gpt_balance as script

    settings = {**script.DESK, "width": 32, "layers": 1, "heads": 2, "context": 32, "steps": 900}
    args = desk.arguments("text", settings, {}, [])
    text = script.Text(None, args.batch, args.context)
    fit = script.train(script.ARMS[name], text, args, seed=0)
    assert len(fit.names) == 9
    for weight in fit.names:
        assert fit.has_balance(weight), weight
        assert fit.is_judged(weight), fit.verdict(weight)
    results = script.look_at([fit])
    by_kappa, _, settled, _ = map(results.early.median, script.METHODS)
    assert by_kappa < settled
    # The present window says what comes next.
    assert results.neighbour.median(script.METHODS[0]) < 0.05
