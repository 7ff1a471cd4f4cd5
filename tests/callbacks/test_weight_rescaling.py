"""WRS against its paper; when it acts; and that a rescale changes nothing but lengths."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from cases import DECAYING_OPTIMIZERS, refused
from models import (
    TARGETS,
    Net,
    SavesAt,
    against_paper,
    convnet,
    distance,
    fit,
    images,
    make,
    same,
    weights_of,
)
from reference import Rescale
from replay import Recorder, replay
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynWarning,
    NotSupportedError,
    Phase,
    StepBracket,
    WeightRescaling,
)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("weight_decay", ["replace", "keep"])
@pytest.mark.parametrize("target", [2.0, "initial"])
@pytest.mark.parametrize("state", ["keep", "rescale"])
@pytest.mark.parametrize("name", DECAYING_OPTIMIZERS)
def test_equals_the_paper_in_float64(name, state, target, weight_decay):
    make_optimizer, optimizer, lr = DECAYING_OPTIMIZERS[name]
    callback = WeightRescaling(
        3, target_norm=target, optimizer_state=state, weight_decay=weight_decay
    )
    rules = {"rescale": Rescale(3, target, state == "rescale", weight_decay)}
    assert (
        distance(*against_paper([callback], make_optimizer, optimizer, lr=lr, rules=rules)) <= 1e-12
    )


@pytest.mark.sampled(5)
@pytest.mark.parametrize("state", ["keep", "rescale"])
@pytest.mark.parametrize("name", DECAYING_OPTIMIZERS)
def test_equals_the_paper_in_float32(name, state):
    make_optimizer, optimizer, lr = DECAYING_OPTIMIZERS[name]
    callback, rules = (
        WeightRescaling(2, optimizer_state=state),
        {"rescale": Rescale(2, 1.0, state == "rescale")},
    )
    got, expected = against_paper(
        [callback], make_optimizer, optimizer, lr=lr, rules=rules, dtype=torch.float32, steps=4
    )
    assert distance(got, expected) <= 1e-6


# ---- When ----


class Lengths(Recorder):
    """The length of every filter after every batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = weights_of(pl_module)
        self.lengths = [
            *getattr(self, "lengths", []),
            torch.cat([weights[n].flatten(1).norm(dim=1) for n in TARGETS]),
        ]


def rescaled_after(callback, **arguments):
    """The batches (from 1) after which every filter has norm 1."""
    look = Lengths()
    fit(make(), [callback, look], **arguments)
    return [
        i + 1 for i, lengths in enumerate(look.lengths) if bool(((lengths - 1).abs() < 1e-12).all())
    ]


def test_steps_are_counted_from_one():
    assert rescaled_after(WeightRescaling(3)) == [3, 6]
    assert rescaled_after(WeightRescaling(1)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rescaled_after(WeightRescaling(9)) == []


def test_optimizer_steps_are_counted_not_batches():
    # Two batches make a step: steps 2 and 4 are batches 4 and 8; after 5 nothing has moved since
    # the rescale.
    assert rescaled_after(WeightRescaling(2), accumulate_grad_batches=2) == [4, 5, 8]


@pytest.mark.parametrize(
    ("start", "stop", "steps"),
    [
        (0, 1, [2, 4]),
        (1, 2, [6, 8]),
        (1, None, [6, 8, 10, 12]),
        (2, 3, [10, 12]),
        (0, None, [2, 4, 6, 8, 10, 12]),
        (5, 6, []),
    ],
)
def test_the_epoch_window_is_half_open(start, stop, steps):
    assert (
        rescaled_after(WeightRescaling(2, start_epoch=start, stop_epoch=stop), max_epochs=3)
        == steps
    )


def test_outside_its_window_the_optimizer_decays():
    module, recorder = make(make_optimizer=DECAYING_OPTIMIZERS["momentum"][0]), Recorder()
    fit(module, [WeightRescaling(2, start_epoch=1, stop_epoch=2), recorder], max_epochs=3)
    rule = Rescale(2, active=lambda step: 4 <= step < 8)
    assert distance(weights_of(module), replay(recorder, TARGETS, rescale=rule)) <= 1e-12
    assert (
        distance(
            weights_of(module),
            replay(recorder, TARGETS, rescale=Rescale(2, weight_decay="keep", active=rule.active)),
        )
        > 1e-4
    )


def test_aws_owns_the_decay_also_inside_the_window():
    module, recorder = make(make_optimizer=DECAYING_OPTIMIZERS["momentum"][0]), Recorder()
    fit(module, [WeightRescaling(3), AdaptiveWeightShrink(0.5), recorder])
    rules = {"rescale": Rescale(3), "shrink": reference.Shrink(0.5)}
    assert distance(weights_of(module), replay(recorder, TARGETS, **rules)) <= 1e-12


# ---- Nothing changes but lengths ----


class EvaluatesAroundRescale(Recorder):
    """The outputs in evaluation mode right before the last phase of a step, and after the step."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.before, self.after, self.module = [], [], pl_module
        bracket = StepBracket.of(trainer.optimizers[0])
        bracket.add(Phase.MEASURE_STEP, lambda step: self.before.append(self.outputs()))

    def outputs(self):
        training = {m: m.training for m in self.module.modules()}
        self.module.eval()
        with torch.no_grad():
            result = self.module(images(dtype=next(self.module.parameters()).dtype).tensors[0])
        for module, mode in training.items():
            module.training = mode
        return result

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(self.outputs())


def no_statistics(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


def large_eps(channels):
    return nn.BatchNorm2d(channels, eps=1e-3)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d,
        large_eps,
        no_statistics,
        lambda c: nn.InstanceNorm2d(c, track_running_stats=True),
    ],
)
def test_evaluation_right_after_a_rescale_equals_evaluation_right_before(norm, bias, dtype):
    torch.manual_seed(1)
    module, look = Net(net=convnet(bias, norm), dtype=dtype), EvaluatesAroundRescale()
    fit(module, [WeightRescaling(2, target_norm=3.0), look], data=None)
    for step, (before, after) in enumerate(zip(look.before, look.after, strict=True), start=1):
        if step % 2:
            assert torch.equal(before, after)
        else:
            # Without running statistics nothing corrects for eps: the batch is normalized anew.
            exact = getattr(module.net[1], "running_var", None) is not None
            tolerance = (1e-12 if dtype == torch.float64 else 1e-5) if exact else 1e-3
            torch.testing.assert_close(after, before, rtol=0, atol=tolerance)
    lengths = torch.cat([module.net[i].weight.detach().flatten(1).norm(dim=1) for i in (0, 3)])
    torch.testing.assert_close(lengths, torch.full_like(lengths, 3.0), rtol=1e-5, atol=0)


class FrozenFirst(Net):
    """The first normalization stays in evaluation mode: what is in front of it is not
    scale-invariant."""

    def __init__(self, **arguments):
        super().__init__(net=convnet(bias=True), **arguments)

    def on_train_batch_start(self, batch, batch_idx):
        self.net[1].eval()


def classifier(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2))


BEHIND = {
    "linear, BatchNorm1d": lambda: classifier(
        nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6), nn.ReLU()
    ),
    "conv, BatchNorm1d": lambda: classifier(
        nn.Flatten(2), nn.Conv1d(1, 6, 5, stride=2), nn.BatchNorm1d(6), nn.ReLU()
    ),
    "conv, BatchNorm3d": lambda: classifier(
        nn.Unflatten(3, (3, 2)), nn.Conv3d(1, 6, 2), nn.BatchNorm3d(6), nn.ReLU()
    ),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(convnet(bias=True)),
    "momentum=None": lambda: convnet(bias=True, norm=lambda c: nn.BatchNorm2d(c, momentum=None)),
    "affine=False": lambda: convnet(bias=True, norm=lambda c: nn.BatchNorm2d(c, affine=False)),
    "grouped": lambda: classifier(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.BatchNorm2d(6),
    ),
    "depthwise": lambda: classifier(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.BatchNorm2d(8),
    ),
    "transposed": lambda: classifier(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    ),
    "transposed, grouped": lambda: classifier(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.BatchNorm2d(6),
    ),
}


def around_one_rescale(module, **arguments):
    """Outputs before and after the rescale of step 2, and by how much it changed a weight."""
    look = EvaluatesAroundRescale()
    weights = []

    class Weights(Recorder):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            weights.append(weights_of(pl_module))

    fit(module, [WeightRescaling(2, target_norm=3.0, **arguments), look, Weights()], max_steps=2)
    now = weights_of(module)
    lengthened = {
        name
        for name, w in now.items()
        if w.dim() > 1 and float(w.norm() / weights[-1][name].norm()) > 1.5
    }
    return look.before[1], look.after[1], lengthened


@pytest.mark.sampled(10)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", BEHIND)
def test_evaluation_is_unchanged_behind_every_kind_of_batch_norm_and_layer(name, dtype):
    torch.manual_seed(1)
    net = BEHIND[name]()
    with torch.no_grad():
        net(images(dtype=torch.float32).tensors[0])  # the lazy head gets its shape
    before, after, lengthened = around_one_rescale(Net(net=net, dtype=dtype))
    assert lengthened
    torch.testing.assert_close(
        after, before, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_filter_in_front_of_a_frozen_batch_norm_is_left_alone(dtype):
    before, after, lengthened = around_one_rescale(make(FrozenFirst, dtype=dtype))
    assert lengthened == {"net.3.weight"}
    torch.testing.assert_close(
        after, before, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5
    )


def test_without_the_correction_evaluation_would_change(monkeypatch):
    monkeypatch.setattr(
        "lightning_normdyn.optimizers.scaling.rescale_batch_norms_", lambda norms: None
    )
    look = EvaluatesAroundRescale()
    fit(make(), [WeightRescaling(2, target_norm=3.0), look])
    assert float((look.after[1] - look.before[1]).abs().max()) > 0.1


def test_evaluation_of_a_compiled_submodule():
    torch.manual_seed(1)
    net = convnet(bias=True)
    net = nn.Sequential(torch.compile(net[:6], backend="eager"), *net[6:])
    look = EvaluatesAroundRescale()
    fit(Net(net=net), [WeightRescaling(2, target_norm=3.0), look], max_steps=2)
    torch.testing.assert_close(look.after[1], look.before[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_factor_of_one_changes_no_bit(dtype):
    """What a step that the device skips, a zero filter and a weight without gradient get."""
    module, callback = (
        make(make_optimizer=DECAYING_OPTIMIZERS["adamw"][0], dtype=dtype, net=convnet(bias=True)),
        WeightRescaling(1000),
    )
    optimizer = fit(module, [callback]).optimizers[0]
    module.net[1].running_var.mul_(1e-7)  # far below eps, where v + eps - eps is not v

    def everything():
        state = optimizer.state_dict()["state"].values()
        return {
            **module.state_dict(),
            **{f"{i}.{k}": v for i, s in enumerate(state) for k, v in s.items()},
        }

    before = {name: value.clone() for name, value in everything().items()}
    callback.member.workers[0].rescaler.scaling(
        torch.ones(callback.plans[0].vectors.n, dtype=torch.float64)
    ).apply()
    assert same(everything(), before)


# ---- Edges ----


def test_a_zero_filter_stays_and_is_named():
    module, recorder = make(make_optimizer=DECAYING_OPTIMIZERS["sgd"][0]), Recorder()
    with torch.no_grad():
        module.net[3].weight[4] = 0
    module.net[3].weight.register_hook(
        lambda g: g * torch.tensor([1.0, 1, 1, 1, 0, 1]).view(6, 1, 1, 1)
    )
    with pytest.warns(
        NormDynWarning, match=r"WeightRescaling left vectors alone .*: 1 in net\.3\.weight\.$"
    ):
        fit(module, [WeightRescaling(2), recorder])
    weight = weights_of(module)["net.3.weight"]
    lengths = weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1, 1, 1, 0, 1], dtype=torch.float64))


def test_groups_get_one_length_together():
    module = make(net=convnet(norm=lambda c: nn.GroupNorm(2, c)))
    fit(module, [WeightRescaling(4, target_norm=2.0)])
    for name in TARGETS:
        assert [float(part.norm()) for part in weights_of(module)[name].chunk(2)] == pytest.approx(
            [2.0, 2.0]
        )


def test_an_optimizer_whose_state_is_not_understood_is_refused_and_can_be_kept():
    def make_optimizer(p):
        return torch.optim.Adadelta(p, lr=0.1)

    with pytest.raises(NotSupportedError, match=r"state of Adadelta .*optimizer_state='keep'"):
        fit(make(make_optimizer=make_optimizer), [WeightRescaling(2)])
    module = make(make_optimizer=make_optimizer)
    fit(module, [WeightRescaling(4, optimizer_state="keep")])
    assert float(module.net[0].weight.detach()[0].norm()) == pytest.approx(1.0)


def test_named_weights_of_such_an_optimizer_are_refused_at_fit_start():
    class Untouched(Net):
        def training_step(self, batch, batch_idx=0):
            raise AssertionError("a training step was run")

    with pytest.raises(NotSupportedError, match="state of Adadelta"):
        fit(
            make(Untouched, make_optimizer=lambda p: torch.optim.Adadelta(p, lr=0.1)),
            [WeightRescaling(2, params="net.0.weight")],
        )


def test_resuming_with_other_settings_is_said_once_and_keeps_the_count(tmp_path):
    fit(make(), [WeightRescaling(3), SavesAt(5, tmp_path / "five.ckpt")], max_steps=9, max_epochs=3)
    again, look = WeightRescaling(4, target_norm=1.0), Lengths()
    with pytest.warns(NormDynWarning) as caught:
        fit(make(), [again, look], ckpt_path=tmp_path / "five.ckpt", max_steps=9, max_epochs=3)
    ours = [str(w.message) for w in caught if w.category is NormDynWarning]
    assert len(ours) == 1
    assert (
        "WeightRescaling resumes with other settings than the checkpoint's (every_n_steps: 3 -> 4)"
        in ours[0]
    )
    # Steps 6, 7, 8, 9: the eighth since the beginning is the one.
    assert [bool(((x - 1).abs() < 1e-12).all()) for x in look.lengths] == [
        False,
        False,
        True,
        False,
    ]
    assert again.steps_of(0) == 9


@pytest.mark.parametrize("granularity", ["auto", "column"])
def test_a_vector_of_ones_on_average_and_slices_along_dimension_one(granularity, capsys):
    """EDM2's norm of every vector; and the columns of an output projection, as nGPT has them."""
    module = make()
    rule = WeightRescaling(1, target_norm="sqrt_fan_in", params="net.8*", granularity=granularity)
    with pytest.warns(NormDynWarning, match="changes the network's function"):
        fit(module, [rule], max_steps=2)
    squares = module.net[8].weight.detach().square()
    means = squares.mean(1 if granularity == "auto" else 0)
    assert means.tolist() == pytest.approx([1.0] * (2 if granularity == "auto" else 6))
    assert "(by request)" in capsys.readouterr().out


def test_columns_of_a_scale_invariant_weight_are_refused():
    says = r"column.*`net\.0\.weight`, but net\.1 makes it scale-invariant per filter"
    refused(make(), [WeightRescaling(1, granularity="column")], NotSupportedError, says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer >= 1, got 0"),
        ({"every_n_steps": 2.0}, "`every_n_steps` must be an integer >= 1, got 2.0"),
        ({"every_n_steps": True}, "`every_n_steps` must be an integer >= 1, got True"),
        ({"target_norm": 0.0}, "`target_norm` must be > 0, 'initial' or 'sqrt_fan_in', got 0.0"),
        (
            {"target_norm": "first"},
            "`target_norm` must be > 0, 'initial' or 'sqrt_fan_in', got 'first'",
        ),
        ({"start_epoch": -1}, "`start_epoch` must be an integer >= 0, got -1"),
        (
            {"start_epoch": 3, "stop_epoch": 3},
            "`stop_epoch` must be None or an integer > start_epoch=3, got 3",
        ),
        ({"optimizer_state": "drop"}, "`optimizer_state` must be 'rescale' or 'keep', got 'drop'"),
        ({"weight_decay": 0.1}, "`weight_decay` must be 'replace' or 'keep', got 0.1"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        WeightRescaling(**{"every_n_steps": 10, **arguments})


# ---- A weight that starts at zero ----


def zeroed(*rows: int) -> Net:
    """A network whose second convolution is zero, wholly or in these rows."""
    module = make(make_optimizer=DECAYING_OPTIMIZERS["sgd"][0])
    with torch.no_grad():
        module.net[3].weight[list(rows) or slice(None)] = 0
    return module


def test_an_initial_norm_of_zero_is_refused_by_name_before_anything_is_touched():
    module = zeroed()
    before = weights_of(module)
    with pytest.raises(
        NotSupportedError, match=r"`net\.3\.weight`, but all entries are zero.*'!net\.3\.weight'"
    ):
        fit(module, [WeightRescaling(2, target_norm="initial")])
    assert same(weights_of(module), before)
    rescaling = WeightRescaling(2, target_norm="initial", params="!net.3.weight")  # the way out
    fit(zeroed(), [rescaling])
    assert [t.name for t in rescaling.plans[0].targets] == ["net.0.weight"]


def test_a_row_that_starts_at_zero_is_left_alone_and_named_and_the_others_are_rescaled():
    module = zeroed(4)
    torch.nn.init.ones_(module.net[4].bias)  # behind a ReLU it gets a gradient only so
    lengths = module.net[3].weight.detach().flatten(1).norm(dim=1)
    with pytest.warns(
        NormDynWarning,
        match=r"WeightRescaling left vectors alone whose norm is zero.*: 1 in net\.3\.weight",
    ):
        fit(module, [WeightRescaling(1, target_norm="initial")])
    now = module.net[3].weight.detach().flatten(1).norm(dim=1)
    others = [0, 1, 2, 3, 5]
    torch.testing.assert_close(now[others], lengths[others])
    assert now[4] > 0, "its steps were undone"


def test_numbers_of_numpy_are_numbers():
    rescaling = WeightRescaling(
        np.int64(10), target_norm=np.float32(2), start_epoch=np.int32(1), stop_epoch=np.uint8(3)
    )
    assert rescaling.settings() == {
        **rescaling.settings(),
        "every_n_steps": 10,
        "target_norm": 2.0,
        "start_epoch": 1,
        "stop_epoch": 3,
    }
    # A checkpoint holds plain numbers, which torch loads with weights_only=True.
    assert {type(value) for value in rescaling.settings().values()} <= {int, float, str}
