"""The Noisy Rayleigh Quotient against its corrected closed forms, and the 2-D toy against its
published norms."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import noisy_rayleigh_quotient as nrq
import pytest
import torch
import toy_2d
from noisy_rayleigh_quotient import Problem, Schedule, predict, risk_of, simulate

from lightning_normdyn.theory.equilibrium import equivalent_hyperparameters


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("problem", "lr", "weight_decay"),
    [
        (Problem(dim=12, sigma=0.6, gap=1.7), 0.03, 0.015),
        (Problem(dim=30, sigma=1.5, gap=0.8), 0.06, 0.012),
        (Problem(dim=5, sigma=1.0, gap=1.5), 0.02, 0.02),
    ],
)
def test_risk_reaches_the_exact_limit(problem: Problem, lr: float, weight_decay: float) -> None:
    schedule = Schedule(lr, weight_decay, steps=5000)
    curves = simulate(
        problem, schedule, problem.start(problem.equilibrium_norm(lr, weight_decay), risk=0.2)
    )
    assert curves.risk[1000:].mean().item() == pytest.approx(
        problem.limit_risk(lr, weight_decay), rel=0.05
    )
    assert curves.angular_update[1000:].square().mean().sqrt().item() == pytest.approx(
        (2 * lr * weight_decay) ** 0.5, rel=0.01
    )


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_the_norm_follows_its_closed_form_along_the_transient(factor: float) -> None:
    problem = Problem(dim=25, sigma=0.8)
    schedule = Schedule(0.05, 0.01, steps=2500)
    # A small risk: the closed forms count the noise only, and the signal adds gap² risk (1 - risk)
    # to the squared gradient.
    start = problem.start(
        factor * problem.equilibrium_norm(schedule.lr, schedule.weight_decay), risk=0.05
    )
    measured, predicted = simulate(problem, schedule, start), predict(problem, schedule, start)
    assert (measured.norm / predicted.norm - 1).abs().max() < 0.01
    assert (measured.angular_update / predicted.angular_update - 1).unfold(0, 100, 100).mean(
        1
    ).abs().max() < 0.01


def test_the_risk_follows_its_corrected_drift() -> None:
    problem = Problem(trials=300)
    schedule = Schedule(0.01, 0.01, steps=800)
    start = problem.start(problem.equilibrium_norm(schedule.lr, schedule.weight_decay))
    measured, predicted = simulate(problem, schedule, start), predict(problem, schedule, start)
    assert (measured.risk / predicted.risk - 1).abs().max() < 0.06
    assert measured.risk[-1] < 0.1 < measured.risk[200]


@pytest.mark.parametrize("scale", [2.0, 10.0])
def test_corollary_3_is_exact(scale: float) -> None:
    problem = Problem(trials=20)
    hyper = {"lr": 0.05, "weight_decay": 0.02, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
    same = equivalent_hyperparameters(torch.optim.SGD, hyper, scale)
    start = problem.start(2.0)
    plain = simulate(problem, Schedule(0.05, 0.02, steps=500), start)
    scaled = simulate(problem, Schedule(same["lr"], same["weight_decay"], steps=500), scale * start)
    assert (plain.risk - scaled.risk).abs().max() < 1e-12
    assert (plain.angular_update - scaled.angular_update).abs().max() < 1e-12
    assert (scale * plain.norm - scaled.norm).abs().max() < 1e-11


@pytest.mark.slow
def test_risk_escapes_after_the_drop_unless_weights_are_rescaled() -> None:
    problem = Problem()
    ratios, at_drop = [], []
    for exponent in (0.0, 0.25):
        schedule = Schedule(0.1, 0.02, steps=9000, drop_at=1500, exponent=exponent)
        start = problem.start(problem.equilibrium_norm(schedule.lr, schedule.weight_decay))
        curves = simulate(problem, schedule, start)
        ratios.append(nrq.escape_ratio(curves, schedule))
        at_drop.append(curves.angular_update[1500].item() / (2 * 0.01 * 0.02) ** 0.5)
    assert ratios[0] < 0.6
    assert ratios[1] > 0.85
    assert at_drop[0] == pytest.approx(10**-0.5, rel=0.05)
    assert at_drop[1] == pytest.approx(1, rel=0.05)


@pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning"
)  # Lightning has advice about workers, log intervals and logger folders
def test_the_lightning_module_is_the_simulation(tmp_path: Path) -> None:
    problem = Problem(dim=6, trials=4)
    schedule = Schedule(0.1, 0.02, steps=30, drop_at=20)
    start = problem.start(1.5)
    module = nrq.NoisyRayleighQuotient(problem, schedule, start)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module)
    assert trainer.global_step == 30
    assert torch.stack(module.risks).tolist() == pytest.approx(
        simulate(problem, schedule, start).risk.tolist(), abs=1e-12
    )
    assert trainer.callback_metrics["risk"].item() == pytest.approx(module.risks[-1].item())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize(
    ("problem", "plain"),
    [
        (Problem(dim=10, sigma=0.5, gap=3.0), Schedule(0.3, 0.1, steps=600, drop_at=100)),
        (Problem(dim=20, sigma=0.5, gap=2.0), Schedule(0.1, 0.1, steps=3000, drop_at=300)),
    ],
)
def test_lr_drop_rescaling_prevents_the_escape(problem: Problem, plain: Schedule) -> None:
    start = problem.start(
        problem.equilibrium_norm(plain.lr, plain.weight_decay),
        risk=problem.limit_risk(plain.lr, plain.weight_decay),
    )
    ratios, at_drop = [], []
    for schedule in (plain, replace(plain, exponent=0.25)):
        curves = nrq.train(problem, schedule, start)
        assert len(curves.risk) == plain.steps
        ratios.append(nrq.escape_ratio(curves, schedule))
        at_drop.append(
            curves.angular_update[plain.drop_at].item()
            / (2 * plain.lr / plain.drop * plain.weight_decay) ** 0.5
        )
    assert ratios[0] < 0.6
    assert ratios[1] > 0.85
    assert at_drop == pytest.approx([plain.drop**-0.5, 1], rel=0.03)


def test_train_is_simulate_at_every_step() -> None:
    problem = Problem(dim=6, trials=4)
    schedule = Schedule(0.1, 0.02, steps=30, drop_at=20, exponent=0.25)
    start = problem.start(1.5)
    trained, simulated = nrq.train(problem, schedule, start), nrq.simulate(problem, schedule, start)
    simulated.norm[20] *= (
        10**0.25
    )  # what was trained is recorded before the optimizer's step, within which the drop is answered
    for curve in ("risk", "angular_update", "norm"):
        assert getattr(trained, curve).tolist() == pytest.approx(
            getattr(simulated, curve).tolist(), rel=1e-9
        )


def test_starts_have_the_norm_and_risk_asked_for() -> None:
    start = Problem(dim=7, trials=9).start(3.0, risk=0.3)
    assert start.norm(dim=1).tolist() == pytest.approx([3.0] * 9)
    assert risk_of(start).tolist() == pytest.approx([0.3] * 9)


def test_the_seven_published_norms() -> None:
    for run in (toy_2d.GRADIENT_DESCENT, *(run for pair in toy_2d.PANELS.values() for run in pair)):
        path = toy_2d.train(run)
        assert path[-1].norm().item() == pytest.approx(run.published_norm, rel=0.01)
        assert len(path) == 492
        if run.project or not run.momentum:  # the losses that reproduce
            assert toy_2d.loss(path[-1]).item() == pytest.approx(
                0.0 if run.project else 0.009, abs=3e-4
            )


@pytest.mark.slow
@pytest.mark.parametrize("module", [nrq, toy_2d], ids=["nrq", "toy_2d"])
def test_the_scripts_write_a_picture_and_say_where(
    module, monkeypatch, capsys, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        sys, "argv", [module.__file__, "--preset", "tiny", "--out", str(tmp_path / "made" / "here")]
    )
    module.main()
    (picture,) = (tmp_path / "made" / "here").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"picture: {picture}" in capsys.readouterr().out
