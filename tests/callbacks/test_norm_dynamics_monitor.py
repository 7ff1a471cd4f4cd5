"""The monitor's numbers against their definitions, step by step; when it measures; and what it
keeps."""

from __future__ import annotations

from math import atan2, isnan, sin, sqrt

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from models import TARGETS, Net, convnet, fit, loader, make
from monitoring import KeepsRowsWithSteps, Trajectory, momentum, monitor
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    RadialProjection,
    WeightRescaling,
)
from lightning_normdyn.errors import NormDynWarning
from lightning_normdyn.parametrizations import weight_standardization

# Beside the ratio to what is expected, or to its balance.
LOGGED = ("angular_update", "effective_lr", "direction_lr", "weight_norm")


def mean(values):
    return sum(values) / len(values)


def root_mean_square(values):
    return sqrt(mean([v * v for v in values]))


def naive(before, after, grad, lr, alpha=None, standardized=False):
    """Every quantity of one weight by its definition, filter by filter."""
    rows: dict[str, list[float]] = {}
    for w, v, g in zip(before.flatten(1), after.flatten(1), grad.flatten(1), strict=True):
        norm, std = float(w.norm()), float(((w - w.mean()) ** 2).mean().sqrt())
        size = std if standardized else norm
        unit = w / w.norm()
        along = float(v @ unit)
        angle = atan2(float((v - along * unit).norm()), along)
        found = {
            "weight_norm": norm,
            "weight_std": std,
            "effective_lr": lr / size,
            "direction_lr": lr / size**2,
            "angular_update": angle,
            "effective_step_size": 2 * sin(angle / 2),
            "gradient_cosine": float(w @ g / (w.norm() * g.norm())),
            "radial_update": float((v - w) @ unit) / norm,
            **({} if alpha is None else {"equivalent_weight_decay": alpha * size}),
        }
        for key, value in found.items():
            rows.setdefault(key, []).append(value)
    return {
        k: (root_mean_square if k in ("angular_update", "effective_step_size") else mean)(v)
        for k, v in rows.items()
    }


ALONE = {
    "plain": ([], None),
    "aws": ([lambda: AdaptiveWeightShrink(0.5)], 0.5),
    "projection": ([lambda: RadialProjection()], None),
}


@pytest.mark.usefixtures("arrival")
@pytest.mark.parametrize("case", ALONE)
def test_every_quantity_is_what_its_name_says(case):
    others, alpha = ALONE[case]
    asked = [*naive(*torch.ones(3, 2, 2), lr=1.0, alpha=1.0)]
    look, watch = Trajectory(), monitor(quantities=asked)
    schedule = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8)  # noqa: E731
    fit(
        make(make_optimizer=momentum, make_scheduler=schedule),
        [look, watch, *(c() for c in others)],
    )
    assert len(watch.history) == 8
    for t, row in enumerate(watch.history):
        every = {}
        for name in [*TARGETS, "net.8.weight"]:
            mine = alpha if name in TARGETS else None
            expected = naive(
                look.weights[t][name],
                look.weights[t + 1][name],
                look.steps[0][t][name][0],
                0.1 * 0.8**t,
                mine,
            )
            every[name] = expected
            for quantity, value in expected.items():
                assert row[f"{quantity}/{name}"] == pytest.approx(value, rel=1e-6, abs=1e-15), (
                    t,
                    quantity,
                    name,
                )
        for quantity in (
            "weight_norm",
            "effective_lr",
            "gradient_cosine",
        ):  # 4 and 6 filters; the head is not scale-invariant
            pooled = (4 * every[TARGETS[0]][quantity] + 6 * every[TARGETS[1]][quantity]) / 10
            assert row[f"normdyn/{quantity}"] == pytest.approx(pooled, rel=1e-6, abs=1e-15)
        pooled = sqrt(
            (
                4 * every[TARGETS[0]]["angular_update"] ** 2
                + 6 * every[TARGETS[1]]["angular_update"] ** 2
            )
            / 10
        )
        assert row["normdyn/angular_update"] == pytest.approx(pooled, rel=1e-6)


def test_the_gradient_is_orthogonal_where_the_loss_does_not_see_the_length():
    watch = monitor()
    fit(make(net=convnet(norm=lambda c: nn.BatchNorm2d(c, eps=1e-12))), [watch])
    for row in watch.history:
        assert all(abs(row[f"gradient_cosine/{name}"]) < 1e-6 for name in TARGETS)
        assert abs(row["gradient_cosine/net.8.weight"]) > 1e-4


def test_a_rescale_is_in_no_angle_and_in_the_next_norm():
    look, watch = Trajectory(), monitor()
    fit(make(make_optimizer=momentum), [look, watch, WeightRescaling(2, target_norm=3.0)])
    norms = watch.history.column("weight_norm/net.0.weight")[1]
    assert norms[2::2] == pytest.approx([3.0] * 3, rel=1e-6)
    angles = watch.history.column("angular_update/net.0.weight")[1]
    for t in range(8):
        expected = naive(
            look.weights[t]["net.0.weight"],
            look.weights[t + 1]["net.0.weight"],
            look.steps[0][t]["net.0.weight"][0],
            0.1,
        )
        assert angles[t] == pytest.approx(
            expected["angular_update"], rel=1e-6
        )  # a rescale turns nothing
    assert [event.kind for event in watch.history.events] == ["rescale"] * 4


def test_weight_standardized_weights_are_measured_by_their_std():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    weight_standardization(net[0])
    look, watch, name = Trajectory(), monitor(), "net.0.parametrizations.weight.original"
    fit(Net(momentum, net), [look, watch])
    for t, row in enumerate(watch.history):
        expected = naive(
            look.weights[t][name],
            look.weights[t + 1][name],
            look.steps[0][t][name][0],
            0.1,
            standardized=True,
        )
        for quantity in ("weight_std", "effective_lr", "direction_lr", "angular_update"):
            assert row[f"{quantity}/{name}"] == pytest.approx(expected[quantity], rel=1e-6)


def test_small_angles_keep_their_digits_in_float32():
    # 1e-6 rad per step while the norm shrinks by 1e-3: what a difference of cosines could not see.
    look, watch = Trajectory(), monitor()
    module = make(
        make_optimizer=lambda p: torch.optim.SGD(p, lr=1e-5, weight_decay=100.0),
        dtype=torch.float32,
    )
    fit(module, [look, watch], max_steps=3)
    for t, row in enumerate(watch.history):
        before, after = (look.weights[i]["net.3.weight"].double() for i in (t, t + 1))
        angle = naive(before, after, before, 0.1)["angular_update"]
        assert angle < 1e-4
        assert row["angular_update/net.3.weight"] == pytest.approx(angle, rel=1e-3)


def test_a_weight_without_gradient_enters_no_average():
    class HalfTrained(Net):
        def forward(self, x):
            if self.trainer.global_step < 2:
                return self.net(x)
            with torch.no_grad():
                x = self.net[:3](x)
            return self.net[3:](x)

    watch = monitor()
    fit(make(HalfTrained, make_optimizer=momentum), [watch])
    rows = list(watch.history)
    assert "angular_update/net.0.weight" in rows[1]
    assert not any(key.endswith("net.0.weight") for key in rows[2])
    assert rows[2]["normdyn/angular_update"] == rows[2]["angular_update/net.3.weight"]


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}, {"max_steps": 5}])
def test_the_x_axis_is_that_of_the_learning_rate_monitor(arguments):
    rows = KeepsRowsWithSteps()
    fit(
        make(),
        [monitor(2), LearningRateMonitor("step")],
        logger=rows,
        log_every_n_steps=2,
        **arguments,
    )
    lr = sorted(
        {step for step, row in rows.rows if "lr-SGD" in row}
    )  # it repeats a row for every batch of a step
    assert [step for step, _ in rows.ours()] == lr
    assert len(lr) >= 2


def test_one_call_per_logging_step_and_logger(tmp_path):
    first, second = KeepsRowsWithSteps(), KeepsRowsWithSteps()
    fit(make(), [monitor(2)], logger=[first, second, CSVLogger(tmp_path)])
    assert [step for step, _ in first.ours()] == [1, 3, 5, 7]
    assert first.ours() == second.ours()
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {
        "effective_lr/net.0.weight",
        "angular_update/net.8.weight",
        "normdyn/effective_lr",
        "step",
    } <= set(header)


def test_log_keys():
    rows, watch = KeepsRowsWithSteps(), monitor()
    fit(
        make(make_optimizer=momentum),
        [watch, AdaptiveWeightShrink(0.5)],
        logger=rows,
        max_steps=1,
    )
    keys = set(rows.ours()[0][1])
    quantities = {
        "weight_norm", "effective_lr", "direction_lr", "angular_update", "effective_step_size", "gradient_cosine", "radial_update",
        "equivalent_weight_decay",
    }  # fmt: skip
    assert {f"{q}/net.0.weight" for q in LOGGED} <= keys
    assert {f"{q}/net.0.weight" for q in quantities} <= set(watch.history.keys())
    assert {f"normdyn/{q}" for q in quantities} | {
        "normdyn/skipped_steps",
        "normdyn/clamped_vectors",
    } <= keys
    assert "equivalent_weight_decay/net.8.weight" not in keys
    assert not any("bias" in key or "net.1." in key for key in keys)


def test_what_was_asked_for_is_logged_and_everything_is_kept():
    rows, watch = KeepsRowsWithSteps(), NormDynamicsMonitor(1, quantities=["effective_lr"])
    fit(make(), [watch], logger=rows)
    logged = {key for _, row in rows.rows for key in row}
    assert logged == {
        "effective_lr/net.0.weight", "effective_lr/net.3.weight", "effective_lr/net.8.weight", "normdyn/effective_lr",
        "normdyn/optimizer_step", "normdyn/skipped_steps", "normdyn/collapsed_vectors",
    }  # fmt: skip
    every = NormDynamicsMonitor(1)
    fit(make(), [every])
    assert list(watch.history) == list(every.history)
    assert logged < set(watch.history.keys())
    assert "as expected" in watch.end_table()  # the verdict has all it needs


def test_the_history_keeps_the_rows_that_are_logged_and_more():
    rows, watch = KeepsRowsWithSteps(), monitor()
    fit(make(), [watch, AdaptiveWeightShrink(0.5)], logger=rows)
    assert len(watch.history) == len(rows.rows) == 8
    for (step, logged), kept in zip(rows.rows, watch.history, strict=True):
        assert (kept["step"], kept["optimizer_step"]) == (step, step + 1)
        for key, value in logged.items():
            assert kept[key] == pytest.approx(value, rel=1e-6)
        overview = {key for key in kept if key.startswith("normdyn/")}
        assert overview <= logged.keys()
        for name in TARGETS:
            of_weight = {key.split("/")[0] for key in logged if key.endswith(f"/{name}")}
            assert of_weight == {*LOGGED, "expected_ratio"}
        of_head = {key.split("/")[0] for key in logged if key.endswith("/net.8.weight")}
        # Too few rows for a balance, which is given up in the middle of the fit.
        assert of_head == {*LOGGED, *(["norm_drift"] if step >= 4 else [])}
        assert {"radial_update/net.0.weight", "coherence/net.8.weight"} & kept.keys()


@pytest.mark.usefixtures("arrival")
@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_are_counted_and_measure_nothing(fused):
    class Overflows(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (
                float("inf") if batch_idx in (0, 2) else 1.0
            )

    watch = monitor()
    module = make(
        Overflows,
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, fused=fused),
        dtype=torch.float32,
    )
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    fit(module, [watch], plugins=[precision], max_epochs=1)
    rows = list(watch.history)
    assert [int(row["step"]) for row in rows] == [1, 3]
    assert [int(row["optimizer_step"]) for row in rows] == [1, 2]
    assert [row["normdyn/skipped_steps"] for row in rows] == [1.0, 2.0]
    assert watch.steps_of(0) == 2


def test_history_and_callback_metrics_need_no_logger():
    watch = monitor()
    runner = fit(make(), [watch])
    assert len(watch.history) == 8
    assert float(runner.callback_metrics["normdyn/angular_update"]) == pytest.approx(
        watch.history[7]["normdyn/angular_update"], rel=1e-6
    )


def test_every_vector_can_be_kept():
    watch, look = monitor(2, per_vector=True), Trajectory()
    fit(make(make_optimizer=momentum), [watch, look, AdaptiveWeightShrink(0.5)])
    assert "weight_norm/net.0.weight" in watch.history.vector_names()
    steps, norms = watch.history.vectors("weight_norm/net.0.weight")
    for step, values in zip(steps, norms, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(values).double(),
            look.weights[int(step)]["net.0.weight"].flatten(1).norm(dim=1),
            rtol=1e-6,
            atol=0,
        )


def test_barebones_measures_nothing():
    watch = NormDynamicsMonitor(1)
    L.Trainer(callbacks=[watch], barebones=True, max_steps=2, accelerator="cpu").fit(
        make(), loader()
    )
    assert len(watch.history) == 0


def test_numbers_that_are_not_finite_are_left_out():
    module, rows = make(make_optimizer=momentum), KeepsRowsWithSteps()
    with torch.no_grad():
        module.net[0].weight.zero_()
    module.net[0].weight.register_hook(torch.zeros_like)
    fit(module, [monitor()], logger=rows, max_steps=2)
    for _, row in rows.ours():
        assert all(value == value and abs(value) < float("inf") for value in row.values())
        assert "effective_lr/net.0.weight" not in row
        assert "effective_lr/net.3.weight" in row


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be None or an integer >= 1, got 0"),
        ({"every_n_steps": True}, "`every_n_steps` must be None or an integer >= 1, got True"),
        ({"every_n_steps": 1.5}, r"`every_n_steps` must be None or an integer >= 1, got 1\.5"),
        (
            {"quantities": ["weight_nrom"]},
            r"`quantities` must be None or names out of .*'weight_norm'.*got \['weight_nrom'\]\. Did you mean `weight_norm`\?",
        ),
        ({"quantities": []}, r"`quantities` must be None or names out of .*got \[\]"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        NormDynamicsMonitor(**arguments)


class Diverges(Net):
    """From batch ``since`` on its loss is NaN."""

    since = 5

    def training_step(self, batch, batch_idx=0):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step >= self.since else loss


@pytest.mark.usefixtures("arrival")
@pytest.mark.parametrize("every", [1, 3])
def test_a_run_that_turns_nan_says_so_once_and_shows_it(every, capsys):
    watch, rows, module = (
        NormDynamicsMonitor(every),
        KeepsRowsWithSteps(),
        make(Diverges, make_optimizer=momentum),
    )
    with pytest.warns(NormDynWarning, match="not finite at step 5") as said:
        runner = fit(module, [watch], loader(12 * 8), max_epochs=1, logger=rows)
    assert len([w for w in said if issubclass(w.category, NormDynWarning)]) == 1
    for row in watch.history:
        assert (
            isnan(row["angular_update/net.0.weight"])
            == isnan(row["normdyn/equilibrium_ratio"])
            == (row["step"] >= 5)
        )
        assert (
            isnan(row["weight_norm/net.0.weight"])
            == isnan(row["effective_lr/net.3.weight"])
            == (row["step"] > 5)
        )
    logged = [row for step, row in rows.ours() if step > 5]
    assert logged
    assert all(isnan(row["weight_norm/net.0.weight"]) for row in logged)
    for key in ("normdyn/angular_update", "normdyn/equilibrium_ratio"):
        assert isnan(runner.callback_metrics[key])
    table = capsys.readouterr().out.split("optimizer steps")[-1]
    assert table.count("not finite since step 5") == 3 or "not finite" in table
    assert not any(word in table for word in ("settled", "as expected"))


def test_a_run_that_turns_nan_between_its_last_rows_says_so_at_its_end():
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 7:
                raise KeyboardInterrupt

    watch, module = monitor(100), make(Diverges, make_optimizer=momentum)
    with pytest.warns(NormDynWarning, match="not finite at step 7"):
        fit(module, [watch], loader(8 * 8), max_epochs=1)
    assert {row["verdict"] for row in watch.member.layers()} == {"not finite since step 7"}


def test_early_stopping_sees_that_a_run_has_diverged():
    module = make(Diverges, make_optimizer=momentum)
    stop = EarlyStopping(
        "normdyn/angular_update", check_finite=True, check_on_train_epoch_end=True, patience=100
    )
    with pytest.warns(NormDynWarning, match="not finite"):
        runner = fit(module, [monitor(), stop], max_epochs=6)
    assert runner.current_epoch == 2
    assert stop.stopped_epoch == 1


def test_one_vector_that_is_not_finite_shows_in_the_mean_of_its_weight_alone():
    module = make(make_optimizer=momentum, net=convnet(norm=lambda c: nn.GroupNorm(1, c)))
    module.net[8].weight.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), float("nan")))
    watch = monitor()
    with pytest.warns(
        NormDynWarning, match=r"a gradient or an update of `net\.8\.weight` is not finite at step 0"
    ):
        fit(module, [watch], max_steps=1)
    row = watch.history[0]
    assert isnan(row["angular_update/net.8.weight"])
    assert isnan(row["gradient_cosine/net.8.weight"])
    assert not isnan(row["weight_norm/net.8.weight"])
    assert not any(isnan(value) for key, value in row.items() if "net.8" not in key)
