"""metrics.py, tested as torchmetrics tests its own: functional = class = reference, one process and
two, pickled, in half precision."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from ranks import init_process_group, run_ranks
from torchmetrics import MetricCollection

from lightning_normdyn import functional as F
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.metrics import AngularUpdate, EffectiveLR, WeightNorm

UPDATES = 6
SHAPES = [(4, 3, 3, 3), (5, 7)]


def stream(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[dict]:
    """What one process passes to ``update``: two weights that walk, their copies from before, a
    learning rate that falls."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    updates = []
    for i in range(UPDATES):
        before = [weight.to(dtype) for weight in weights]
        weights = [
            weight + 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            for weight in weights
        ]
        updates.append(
            {
                "weight": [weight.to(dtype) for weight in weights],
                "weight_before": before,
                "lr": 0.1 / (i + 1),
            }
        )
    return updates


def rows(weights) -> list[np.ndarray]:
    return [row for weight in weights for row in weight.double().reshape(len(weight), -1).numpy()]


def reference_norm(updates) -> np.ndarray:
    return np.mean(
        [[np.sqrt((row**2).sum()) for row in rows(u["weight"])] for u in updates], axis=0
    )


def reference_lr(updates) -> np.ndarray:
    return np.mean(
        [[u["lr"] / np.sqrt((row**2).sum()) for row in rows(u["weight"])] for u in updates], axis=0
    )


def reference_lr_std(updates) -> np.ndarray:
    return np.mean([[u["lr"] / row.std() for row in rows(u["weight"])] for u in updates], axis=0)


def reference_angle(updates) -> np.ndarray:
    def angle(a, b):
        return np.arccos(
            (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
        )  # good enough in float64 for angles of 0.1

    angles = [
        [angle(a, b) for a, b in zip(rows(u["weight_before"]), rows(u["weight"]), strict=True)]
        for u in updates
    ]
    return np.sqrt(np.mean(np.square(angles), axis=0))


CASES = {
    "norm": (WeightNorm, ("weight",), reference_norm, lambda weight: F.weight_norm(weight)),
    "lr": (
        EffectiveLR,
        ("weight", "lr"),
        reference_lr,
        lambda weight, lr: F.effective_lr(lr, F.weight_norm(weight)),
    ),
    "lr_std": (
        partial(EffectiveLR, statistic="std"),
        ("weight", "lr"),
        reference_lr_std,
        lambda weight, lr: F.effective_lr(lr, F.weight_std(weight)),
    ),
    "angle": (
        AngularUpdate,
        ("weight", "weight_before"),
        reference_angle,
        lambda weight, weight_before: F.angular_update(weight_before, weight),
    ),
}
cases = pytest.mark.parametrize(
    ("make", "names", "reference", "function"), CASES.values(), ids=CASES
)
makers = pytest.mark.parametrize(
    ("make", "names"), [case[:2] for case in CASES.values()], ids=CASES
)


def arguments(update: dict, names) -> dict:
    return {name: update[name] for name in names}


def updated(metric, names, updates):
    for update in updates:
        metric.update(**arguments(update, names))
    return metric


@cases
def test_class_equals_reference(make, names, reference, function):
    np.testing.assert_allclose(
        updated(make(), names, stream()).compute(), reference(stream()), rtol=1e-12
    )


@cases
def test_class_equals_function_after_one_update(make, names, reference, function):
    one = {
        name: value[0] if isinstance(value, list) else value
        for name, value in arguments(stream()[0], names).items()
    }
    metric = make()
    metric.update(**one)
    torch.testing.assert_close(metric.compute(), function(**one), rtol=1e-12, atol=0)


@cases
def test_forward_gives_the_batch_and_keeps_the_average(make, names, reference, function):
    metric = make()
    for update in stream():
        np.testing.assert_allclose(
            metric(**arguments(update, names)), reference([update]), rtol=1e-12
        )
    np.testing.assert_allclose(metric.compute(), reference(stream()), rtol=1e-12)


@cases
def test_two_ranks_average_over_both(make, names, reference, function):
    def rank():
        init_process_group()
        seed = torch.distributed.get_rank()
        metric = updated(
            make(), names, stream(seed)[: UPDATES - seed]
        )  # one rank has fewer updates
        synced = metric.compute().numpy()
        with metric.sync_context(should_sync=False):
            pass
        metric.reset()
        again = updated(metric, names, stream(seed)[: UPDATES - seed]).compute().numpy()
        alone = updated(make(sync_on_compute=False), names, stream(seed)).compute().numpy()
        return synced, again, alone

    results = run_ranks(rank)
    expected = reference(stream(0) + stream(1)[: UPDATES - 1])
    for seed, (synced, again, alone) in results.items():
        np.testing.assert_allclose(synced, expected, rtol=1e-12)
        np.testing.assert_allclose(again, expected, rtol=1e-12)
        np.testing.assert_allclose(alone, reference(stream(seed)), rtol=1e-12)


@pytest.mark.sampled(4)
@cases
@pytest.mark.parametrize("idle", [0, 1])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_a_rank_without_updates_adds_nothing(make, names, reference, function, idle, reduction):
    def rank():
        init_process_group()
        metric = make(reduction=reduction)
        values = []
        for _ in range(2):  # and again after a reset, and after the state was put back
            if torch.distributed.get_rank() != idle:
                updated(metric, names, stream())
            values.append(metric.compute().numpy())
            metric.reset()
        updated(metric, names, stream())
        return [*values, metric.compute().numpy()]

    first, second = run_ranks(rank).values()
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
        if reduction == "none":
            np.testing.assert_allclose(one, reference(stream()), rtol=1e-12)
        else:
            assert one.ndim == 0


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_no_rank_with_updates_is_no_number_on_all():
    def rank():
        init_process_group()
        return WeightNorm().compute().item(), WeightNorm(num_vectors=9).compute().tolist()

    for one, nine in run_ranks(rank).values():
        assert np.isnan(one)
        assert np.isnan(nine).tolist() == [True] * 9


def test_ranks_with_other_weights_all_say_so():
    def rank():
        init_process_group()
        metric = WeightNorm()
        metric.update(torch.ones(2 + torch.distributed.get_rank(), 3))
        with pytest.raises(NormDynError, match=r"rank 0: 2, rank 1: 3"):
            metric.compute()
        return True

    assert run_ranks(rank) == {0: True, 1: True}


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_a_collection_takes_idle_ranks_too():
    def rank():
        init_process_group()
        metrics = MetricCollection([WeightNorm(), AngularUpdate()])
        if torch.distributed.get_rank():
            metrics.update(**stream()[0])
        return {name: value.numpy() for name, value in metrics.compute().items()}

    first, second = run_ranks(rank).values()
    assert first.keys() == second.keys() == {"WeightNorm", "AngularUpdate"}
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    np.testing.assert_allclose(first["WeightNorm"], reference_norm(stream()[:1]), rtol=1e-12)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_weights_are_measured_in_double(make, names, reference, function, dtype):
    result = updated(make(), names, stream(dtype=dtype)).compute()
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result, reference(stream(dtype=dtype)), rtol=1e-6)


@cases
def test_half_precision_states(make, names, reference, function):
    metric = make().set_dtype(torch.float16)
    np.testing.assert_allclose(
        updated(metric, names, stream(dtype=torch.float16)).compute(),
        reference(stream()),
        rtol=5e-3,
    )


@cases
def test_pickle_copies_and_state_dict_keep_the_states(make, names, reference, function):
    metric = updated(make(), names, stream()[:3])
    for other in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        np.testing.assert_allclose(
            updated(other, names, stream()[3:]).compute(), reference(stream()), rtol=1e-12
        )
    assert metric.state_dict() == {}
    metric.persistent(True)
    other = make()
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    np.testing.assert_allclose(
        updated(other, names, stream()[3:]).compute(), reference(stream()), rtol=1e-12
    )


@makers
def test_reset_forgets(make, names):
    metric = updated(make(), names, stream(1))
    metric.reset()
    torch.testing.assert_close(
        updated(metric, names, stream()).compute(), updated(make(), names, stream()).compute()
    )
    metric.reset()  # and takes another model
    metric.update(
        **{
            name: [value[1]] if isinstance(value, list) else value
            for name, value in arguments(stream()[0], names).items()
        }
    )
    assert metric.compute().shape == (5,)


@makers
def test_no_graph_is_kept(make, names):
    update = stream()[0]
    metric = make()
    metric.update(
        **{
            name: [w.requires_grad_() for w in value] if isinstance(value, list) else value
            for name, value in arguments(update, names).items()
        }
    )
    assert not metric.compute().requires_grad


@makers
def test_granularity_layer_takes_a_weight_as_one_vector(make, names):
    flat = [
        {
            name: [w.reshape(1, -1) for w in value] if isinstance(value, list) else value
            for name, value in update.items()
        }
        for update in stream()
    ]
    by_layer = updated(make(granularity="layer"), names, stream()).compute()
    assert by_layer.shape == (2,)
    torch.testing.assert_close(by_layer, updated(make(), names, flat).compute())


@makers
def test_reduction_mean_is_one_number(make, names):
    every, mean = (
        updated(make(), names, stream()).compute(),
        updated(make(reduction="mean"), names, stream()).compute(),
    )
    assert mean.shape == ()
    expected = every.square().mean().sqrt() if make is AngularUpdate else every.mean()
    torch.testing.assert_close(mean, expected)


def test_collection_passes_each_metric_what_it_takes():
    metrics = MetricCollection({name: make() for name, (make, *_) in CASES.items()})
    for update in stream():
        metrics.update(update["weight"], weight_before=update["weight_before"], lr=update["lr"])
    for name, value in metrics.compute().items():
        np.testing.assert_allclose(value, CASES[name][2](stream()), rtol=1e-12)


def test_collection_never_merges_metrics_that_happen_to_agree_at_first():
    metrics = MetricCollection([WeightNorm(), EffectiveLR()])
    metrics.update(torch.eye(3), lr=1.0)  # norm and effective LR are both 1
    metrics.update(2 * torch.eye(3), lr=1.0)
    assert metrics.compute()["WeightNorm"].tolist() == [1.5] * 3
    assert metrics.compute()["EffectiveLR"].tolist() == [0.75] * 3


def test_vectors_without_an_answer_are_left_out_of_the_average():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    metric = EffectiveLR()
    metric.update(weight, lr=1.0)
    assert metric.compute()[0] == pytest.approx(0.2)
    assert metric.compute()[1].isnan()
    metric.update(weight + 1, lr=1.0)
    assert metric.compute()[1] == pytest.approx(0.5**0.5)
    assert EffectiveLR(reduction="mean")(weight, lr=1.0) == pytest.approx(0.2)


def test_one_learning_rate_for_each_weight():
    metric = EffectiveLR()
    metric.update([torch.eye(2), 2 * torch.eye(1, 2)], lr=[0.1, 0.4])
    assert metric.compute().tolist() == pytest.approx([0.1, 0.1, 0.2])
    with pytest.raises(NormDynError, match="1 weights and 2 learning rates"):
        metric.update([torch.eye(2)], lr=[0.1, 0.2])


@makers
def test_other_weights_are_refused(make, names):
    metric = updated(make(), names, stream())
    other = {
        name: value[:1] if isinstance(value, list) else value
        for name, value in arguments(stream()[0], names).items()
    }
    with pytest.raises(NormDynError, match="4 weight vectors and has 9"):
        metric.update(**other)
    with pytest.raises(NormDynError, match="empty list"):
        metric.update(
            **{name: [] if isinstance(value, list) else value for name, value in other.items()}
        )


def test_as_many_weights_before_as_after():
    with pytest.raises(NormDynError, match="2 weights and 1 weights before"):
        AngularUpdate().update([torch.eye(2)] * 2, [torch.eye(2)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(WeightNorm, granularity="row"),
            "`granularity` must be 'filter' or 'layer', got 'row'",
        ),
        (
            partial(AngularUpdate, reduction="sum"),
            "`reduction` must be 'none' or 'mean', got 'sum'",
        ),
        (partial(EffectiveLR, statistic="var"), "`statistic` must be 'norm' or 'std', got 'var'"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@makers
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_plot(make, names, reduction):
    pytest.importorskip("matplotlib")
    metric = make(reduction=reduction)
    values = [metric(**arguments(update, names)) for update in stream()]
    vectors = 9 if reduction == "none" else 1
    _, ax = metric.plot()
    assert ax.get_ylabel() == metric.axis_label
    np.testing.assert_allclose(ax.collections[0].get_offsets()[:, 1], metric.compute().reshape(-1))
    fig, ax = metric.plot(values)
    assert len(ax.get_lines()) == vectors
    np.testing.assert_allclose(
        ax.get_lines()[0].get_ydata(), [value.reshape(-1)[0] for value in values]
    )
    assert metric.plot(values[0], ax=ax) == (fig, ax)


def test_plot_of_a_collection():
    pytest.importorskip("matplotlib")
    metrics = MetricCollection([WeightNorm(), AngularUpdate()])
    metrics.update(stream()[0]["weight"], weight_before=stream()[0]["weight_before"])
    assert len(metrics.plot()) == 2
