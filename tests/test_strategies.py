"""The same numbers on every strategy: each callback on several ranks against one process and the
same global batches."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import strategies
import torch
from ranks import RankError, run_ranks
from strategies import DEEPSPEED, STEPS, STRATEGIES, adamw, fit, sgd
from torch import Tensor, nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    NotSupportedError,
    RadialBrake,
    RadialProjection,
    RotationControl,
    WeightDecay,
    WeightRescaling,
)
from lightning_normdyn.callbacks.radial_projection import ProjectWorker, gates
from lightning_normdyn.engine.worker import during
from lightning_normdyn.monitor import balance
from lightning_normdyn.optimizers.step import Phase

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

# The monitor goes with each of them, so that logged values are compared where somebody writes, too.
CALLBACKS: dict[str, tuple[Callable[[], list[Any]], Callable[[Any], Any]]] = {
    "AWS norm": (lambda: [AdaptiveWeightShrink(0.5)], sgd),
    "AWS std": (lambda: [AdaptiveWeightShrink(1.0, statistic="std")], adamw),
    "WRS": (lambda: [WeightRescaling(2)], adamw),
    "WRS to initial norms": (lambda: [WeightRescaling(3, target_norm="initial")], sgd),
    "projection always": (lambda: [RadialProjection()], adamw),
    "projection cosine": (lambda: [RadialProjection(gate="cosine", delta=0.5)], sgd),
    "AWS + projection": (lambda: [RadialProjection(), AdaptiveWeightShrink(0.5)], sgd),
    "corrected and cautious decay": (
        lambda: [
            WeightDecay(0.5, rate="lr_squared", params=["!net.block*"]),
            WeightDecay(0.5, cautious=True, params="net.block*"),
        ],
        sgd,
    ),
    "matched AWS and rescaled columns": (
        lambda: [
            AdaptiveWeightShrink("match"),
            WeightRescaling(
                2, target_norm="sqrt_fan_in", granularity="column", params="net.block.up.weight"
            ),
        ],
        adamw,
    ),
    "rotation": (lambda: [RotationControl(0.05, params="*weight")], adamw),
    "floor and brake": (
        lambda: [
            RotationControl(0.1, bound="at_least", norm="free", granularity="auto"),
            RadialBrake(0.25, 0.5, granularity="auto", params="*weight"),
        ],
        sgd,
    ),
    "monitor": (lambda: [], adamw),
}


def fits(strategy: strategies.Strategy, dtype: torch.dtype) -> dict[str, Any]:
    """In a rank: what every entry of CALLBACKS leads to."""
    found = {}
    for name, (writers, optimizer) in CALLBACKS.items():
        monitor = NormDynamicsMonitor(1, per_vector=True)
        _, module, _ = fit(
            strategy, lambda w=writers, m=monitor: [*w(), m], dtype=dtype, optimizer=optimizer
        )  # type: ignore[misc]
        found[name] = (module.final, list(monitor.history), monitor.history.meta["targets"])
    return found


def require(name: str) -> None:
    """Skip, saying why, where DeepSpeed is asked for and not there."""
    if name in DEEPSPEED and find_spec("deepspeed") is None:
        pytest.skip(
            "DeepSpeed is not installed: `make test-deepspeed` does it in an environment of its own"
        )


@functools.cache
def outcome(name: str, dtype: torch.dtype) -> dict[int, Any]:
    """All ranks of one strategy; forked once."""
    require(name)
    strategy = {**STRATEGIES, **DEEPSPEED}[name]
    return run_ranks(fits, strategy.world, (strategy, dtype))


@functools.cache
def reference(dtype: torch.dtype) -> dict[str, Any]:
    """One process. ddp as well, since that is how Lightning treats data alike."""
    return run_ranks(fits, 1, (STRATEGIES["ddp"], dtype))[0]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative to the largest entry of each tensor."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max() / b[k].abs().max()) for k in b)


def assert_same_rows(
    ours: list[dict[str, float]],
    theirs: list[dict[str, float]],
    tolerance: float,
    angle_tolerance: float,
) -> None:
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            if key.removeprefix("normdyn/").split("/")[0] in ANGLES:
                assert mine[key] == pytest.approx(value, rel=angle_tolerance), key
            else:
                assert abs(mine[key] - value) <= tolerance * max(1, abs(value)) or math.isnan(
                    value
                ), (key, mine[key], value)


def assert_same_targets(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """What histories say of weights: the same words, and ratios as near as angles are."""
    assert ours.keys() == theirs.keys()
    for name, facts in theirs.items():
        mine = dict(ours[name])
        # NaN and not None: a weight may have none yet.
        found, expected = mine.pop("ratio") or math.nan, facts["ratio"] or math.nan
        assert found == pytest.approx(expected, rel=1e-3, nan_ok=True), name
        assert mine == {key: value for key, value in facts.items() if key != "ratio"}, name


# Angles are small differences of large sums: each strategy adds these up in another order.
ANGLES = {"angular_update", "effective_step_size", "matrix_angle", "expected_ratio"}
# The others have quick members in the tests of resumes, collectives and searches.
QUICK = ["FSDP2"]
MATRIX = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in STRATEGIES
]
MATRIX += [pytest.param(name, marks=pytest.mark.deepspeed) for name in DEEPSPEED]


@pytest.mark.parametrize("strategy", MATRIX)
def test_matrix(strategy: str):
    """One test for all callbacks: the ranks of a strategy are forked once for them all."""
    dtype = {**STRATEGIES, **DEEPSPEED}[strategy].dtypes[0]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for callbacks, (expected, rows, targets) in reference(dtype).items():
        answers = {rank: found[callbacks] for rank, found in outcome(strategy, dtype).items()}
        for weights, _, _ in answers.values():
            assert distance(weights, expected) <= tolerance, callbacks
        assert_same_targets(answers[0][2], targets)
        # Values are logged in float32.
        assert_same_rows(answers[0][1], rows, 1e-5, 1e-3)
        recorded = [rank for rank, (_, history, _) in answers.items() if len(history)]
        assert recorded == [0], callbacks


COSINE_STEPS, COSINE_EVERY = 28, 4
COURSES = ("expected_angular_update", "expected_ratio", "expected_weight_norm")
BALANCES = ("matrix_angle", "norm_drift", "coherence", "balanced_angular_update", "balance_ratio")


class CosineModule(strategies.Module):
    """Under a schedule that no static prediction could follow."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * COSINE_STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def courses_and_balances(strategy: strategies.Strategy, dtype: torch.dtype) -> dict[str, Any]:
    """In a rank: rows under a cosine, by optimizer."""
    # So short a fit has too few steps for an exact coherence; the same one is enough here.
    balance.LEAST_STEPS, balance.MOST_ERROR = 8, math.inf
    found = {}
    named = {*COURSES, *BALANCES, "loss_decay"}
    for name, optimizer in {"sgd": sgd, "adamw": adamw}.items():
        monitor = NormDynamicsMonitor(COSINE_EVERY, quantities=[*named], tables=False)
        fit(
            strategy,
            lambda m=monitor: [m],  # type: ignore[misc]
            dtype=dtype,
            optimizer=optimizer,
            steps=COSINE_STEPS,
            model=CosineModule,
        )
        # The history has all the rest, too, some of it around 0, where nothing is relative.
        found[name] = []
        for row in monitor.history:
            shown = {key: row[key] for key in row if not named.isdisjoint(key.split("/"))}
            found[name].append(shown)
    return found


@functools.cache
def courses_and_balances_of_one(dtype: torch.dtype) -> dict[str, Any]:
    return run_ranks(courses_and_balances, 1, (STRATEGIES["ddp"], dtype))[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("strategy", MATRIX)
def test_expectations_and_balances_are_those_of_one_process(strategy: str):
    """Of normalized weights and of others, on vectors that lie on several ranks."""
    require(strategy)
    chosen = {**STRATEGIES, **DEEPSPEED}[strategy]
    dtype = chosen.dtypes[0]
    relative, drift = (1e-5, 1e-8) if dtype == torch.float64 else (1e-2, 1e-5)
    expected = courses_and_balances_of_one(dtype)
    found = run_ranks(courses_and_balances, chosen.world, (chosen, dtype))[0]
    for optimizer, rows in expected.items():
        assert len(found[optimizer]) == len(rows) > COSINE_STEPS // COSINE_EVERY
        for mine, other in zip(found[optimizer], rows, strict=True):
            assert mine.keys() == other.keys()
            for key, value in other.items():
                is_drift = key.startswith("norm_drift/")
                close = pytest.approx(value, **({"abs": drift} if is_drift else {"rel": relative}))
                assert mine[key] == close, (optimizer, key)
        last = rows[-2]
        for quantity in (*COURSES, *BALANCES):
            assert f"{quantity}/net.conv.weight" in last, optimizer
        for quantity in (*BALANCES, "loss_decay"):
            assert f"{quantity}/net.block.up.weight" in last, optimizer
        assert "expected_ratio/net.block.up.weight" not in last
    # The first gradients are steep, so the norms move, and an expectation that stood still would
    # be wrong.
    norms = [row["expected_weight_norm/net.conv.weight"] for row in expected["adamw"]]
    assert max(norms) > 1.02 * min(norms)


def test_the_matrix_says_something():
    """Each writer changes the weights, and the cosine gate opens for some weights and not for
    others."""
    found = reference(torch.float64)
    quiet = {adamw: found["monitor"][0]}
    quiet[sgd] = run_ranks(lambda: fit(STRATEGIES["ddp"], lambda: [], optimizer=sgd)[1].final, 1)[0]
    for name, (_, optimizer) in CALLBACKS.items():
        if name != "monitor":
            assert distance(found[name][0], quiet[optimizer]) > 1e-4, name

    def watched_gates() -> list[bool]:
        seen: list[bool] = []

        class Watching(ProjectWorker):
            @during(Phase.PROJECT)
            def project(self, step: Any) -> None:
                by_filter, by_layer = gates(self.rule.delta, *self.gate_totals)
                seen.extend((by_filter | by_layer).tolist())
                super().project(step)

        class Watched(RadialProjection):
            worker = Watching

        fit(STRATEGIES["ddp"], lambda: [Watched(gate="cosine", delta=0.5)], optimizer=sgd)
        return seen

    opened = run_ranks(watched_gates, 1)[0]
    assert any(opened)
    assert not all(opened)


def test_a_broken_reduction_is_seen():
    """Without completing sums over ranks, tensor parallelism trains other weights."""

    def broken() -> dict[str, Tensor]:
        from lightning_normdyn.geometry.reduction import Reduction

        Reduction.sum_ = lambda self, packed: packed  # type: ignore[method-assign]
        return fit(STRATEGIES["TP"], lambda: [AdaptiveWeightShrink(0.5)], optimizer=sgd)[1].final

    assert distance(run_ranks(broken)[0], reference(torch.float64)["AWS norm"][0]) > 1e-4


class ManyKindsModule(strategies.Module):
    """`ManyKinds`, with filters that have collapsed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        torch.manual_seed(3)
        self.net = strategies.ManyKinds().to(self.dtype_)
        with torch.no_grad():
            self.net.conv.weight[5:] *= 1e-5


def kinds(strategy: strategies.Strategy) -> dict[str, Any]:
    """In a rank: what callbacks make of `ManyKinds`, with everything that the monitor can keep."""
    found = {}
    several = ["net.transposed.weight", "net.grouped.weight"]
    writers: dict[str, Callable[[], list[Any]]] = {
        "groups": lambda: [
            AdaptiveWeightShrink(1.0, statistic="std", params=several, granularity="group"),
            RadialProjection(),
        ],
        "layers": lambda: [
            WeightRescaling(
                2,
                params=["net.tall.weight", "net.linear.weight", "net.one.weight"],
                granularity="layer",
            )
        ],
        "all": lambda: [WeightRescaling(4, target_norm="initial"), AdaptiveWeightShrink(0.3)],
    }
    for name, make in writers.items():
        monitor = NormDynamicsMonitor(1, per_vector=True)
        _, module, _ = fit(
            strategy, lambda w=make, m=monitor: [*w(), m], optimizer=adamw, model=ManyKindsModule
        )  # type: ignore[misc]
        vectors = {
            key: torch.from_numpy(monitor.history.vectors(key)[1])
            for key in monitor.history.vector_names()
        }
        found[name] = (module.final, list(monitor.history), vectors)
    return found


@pytest.mark.parametrize(
    "strategy",
    [
        "FSDP2, 3 ranks",
        *[
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("HSDP", "FSDP1 FULL_SHARD, one unit, 3 ranks")
        ],
    ],
)
def test_kinds_of_layers(strategy: str):
    """Vectors across rank borders, more ranks than filters, collapsed filters on one rank only; the
    same numbers for every vector."""
    expected = run_ranks(kinds, 1, (STRATEGIES["ddp"],))[0]
    answers = run_ranks(kinds, STRATEGIES[strategy].world, (STRATEGIES[strategy],))
    for name, (weights, rows, vectors) in expected.items():
        assert all(distance(found[name][0], weights) <= 1e-12 for found in answers.values())
        assert_same_rows(answers[0][name][1], rows, 1e-5, 1e-3)
        assert rows[0]["normdyn/collapsed_vectors"] == 2
        assert answers[0][name][2].keys() == vectors.keys()
        for key, values in vectors.items():
            torch.testing.assert_close(answers[0][name][2][key], values, rtol=1e-6, atol=1e-12)


class TwoOptimizers(strategies.Module):
    """The second one steps for the first time when the claims of the first one's weights have long
    been decided."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first = [p for n, p in self.named_parameters() if ".conv" in n]
        ours = {id(p) for p in first}
        return [
            torch.optim.SGD(ps, lr=0.05)
            for ps in (first, [p for p in self.parameters() if id(p) not in ours])
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers()[: 1 if batch_idx < STEPS - 1 else 2]:
            optimizer.step()
            optimizer.zero_grad()


def test_what_gradients_have_confirmed_stays_confirmed_when_another_optimizer_joins():
    """The ranks then put together anew what their graphs say."""

    def main() -> str:
        shrink = AdaptiveWeightShrink(0.1)
        fit(STRATEGIES["ddp"], lambda: [shrink], model=TwoOptimizers)
        return shrink.state_dict()["targets"]["net.conv.weight"]["known"]

    assert set(run_ranks(main).values()) == {"graph and gradients"}


class CompiledModule(strategies.Module):
    """The whole net and a part of it compiled in place, before a strategy wraps them."""

    def configure_model(self) -> None:
        super().configure_model()
        self.net.block.compile(backend="eager")
        self.net.compile(backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["ddp", "FSDP2", "FSDP1 FULL_SHARD", "FSDP1 FULL_SHARD, one unit"]
)
def test_compiled_modules(strategy: str):
    """The first batch is watched uncompiled, so the compiler sees weights that have gradients
    already."""

    def main(name: str, model: Any) -> dict[str, Tensor]:
        return fit(
            STRATEGIES[name],
            lambda: [AdaptiveWeightShrink(0.5), WeightRescaling(3)],
            optimizer=adamw,
            model=model,
        )[1].final

    expected = run_ranks(main, 1, ("ddp", strategies.Module))[0]
    for found in run_ranks(main, 2, (strategy, CompiledModule)).values():
        assert distance(found, expected) <= 1e-12


# ------------------------------------------------------------------------------------ communication

FILTERS = {"params": ["net.conv.weight", "net.block.up.weight"], "granularity": "filter"}
WRITERS: dict[str, Callable[..., Any]] = {
    "AWS norm": lambda **k: AdaptiveWeightShrink(0.01, **k),
    "AWS std": lambda **k: AdaptiveWeightShrink(0.01, statistic="std", **k),
    "WRS": lambda **k: WeightRescaling(1, **k),
    "projection always": lambda **k: RadialProjection(**k),
    "projection cosine": lambda **k: RadialProjection(
        gate="cosine", params=k.get("params", "auto")
    ),
    "decay": lambda **k: WeightDecay(0.1, params=k.get("params", "auto")),
    "cautious decay": lambda **k: WeightDecay(0.1, cautious=True, params=k.get("params", "auto")),
    "rotation": lambda **k: RotationControl(0.05, smoothing=0.9, **{"granularity": "auto", **k}),
    "brake": lambda **k: RadialBrake(**{"granularity": "auto", **k}),
}


def collectives(
    strategy: str, writers: list[str], arguments: dict[str, Any]
) -> dict[str, dict[str, int]]:
    """In a rank: for each writer the largest number of collectives in each phase, over the last
    steps of a fit that logs nothing in them."""
    from torch.distributed.tensor.debug import CommDebugMode

    from lightning_normdyn.optimizers.bracket import StepBracket

    most: dict[str, int] = {}
    add = StepBracket.add

    def counting_add(self: StepBracket, phase: Phase, handler: Any, **place: Any) -> Any:
        def counted(step: Any) -> None:
            # The claims of the graph are held against the first 16 gradients; the monitor measures
            # the very last step.
            if not 16 < step.number < 19:
                handler(step)
                return
            with CommDebugMode() as mode:
                handler(step)
            most[phase.name] = max(most.get(phase.name, 0), mode.get_total_counts())

        return add(self, phase, counted, **place)

    StepBracket.add = counting_add  # type: ignore[method-assign]
    found = {}
    for writer in writers:
        most.clear()
        callbacks = [WRITERS[writer](**arguments), NormDynamicsMonitor(50, tables=False)]
        fit(STRATEGIES[strategy], lambda c=callbacks: c, optimizer=sgd, steps=19)  # type: ignore[misc]
        found[writer] = dict(most)
    return found


# The largest number of collectives in a phase: 0 where every vector is whole on its rank.
SHARDINGS = [
    ("ddp", {}, 0),
    ("FSDP2", FILTERS, 0),
    ("FSDP2", {}, 1),
    ("TP", {}, 1),
    ("FSDP1 FULL_SHARD", {}, 1),
    ("FSDP2 + TP", {}, 1),
    ("HSDP", FILTERS, 0),
]


def check_collectives(
    strategy: str, arguments: dict[str, Any], most: int, writers: list[str]
) -> None:
    answers = run_ranks(collectives, STRATEGIES[strategy].world, (strategy, writers, arguments))
    for found in answers.values():
        for writer, counts in found.items():
            expected = most
            if writer == "projection cosine" and strategy != "ddp":
                expected = 1  # the gate's tests look at all filters of a weight
            if writer.endswith("decay"):
                expected = 0  # each entry by itself
            assert counts.pop("RESOLVE") == 0, writer
            assert max(counts.values()) == expected, (writer, counts)


@pytest.mark.parametrize(
    ("sharding", "writer"), [(0, "AWS norm"), (2, "projection always"), (3, "WRS")], ids=str
)
def test_collectives_per_phase(sharding: int, writer: str):
    check_collectives(*SHARDINGS[sharding], [writer])


def every_sharding_and_writer():
    """Many writers in one test: the ranks of a strategy are forked once for them."""
    for strategy, arguments, most in SHARDINGS:
        name = f"{strategy}-{'filters' if arguments else 'auto'}"
        writers = list(WRITERS)
        if STRATEGIES[strategy].world == 2:
            yield pytest.param(strategy, arguments, most, writers, id=name)
            continue
        # Four ranks take three times as long, and each writer has been on two.
        sample = writers[1::3]
        rest = [writer for writer in writers if writer not in sample]
        yield pytest.param(strategy, arguments, most, sample, id=name)
        yield pytest.param(
            strategy, arguments, most, rest, id=f"{name}-rest", marks=pytest.mark.rare
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "arguments", "most", "writers"), list(every_sharding_and_writer())
)
def test_collectives_per_phase_of_every_writer(
    strategy: str, arguments: dict[str, Any], most: int, writers: list[str]
):
    check_collectives(strategy, arguments, most, writers)


def traffic(strategy: str, arguments: dict[str, Any]) -> tuple[dict[str, list[int]], int, int, int]:
    """In a rank: the bytes of every collective of a step that logs, by phase; the monitor's cut
    vectors, weights and measured numbers."""
    from lightning_normdyn.geometry import reduction
    from lightning_normdyn.monitor.recording import Recording
    from lightning_normdyn.optimizers.bracket import StepBracket

    sent: list[int] = []
    found: dict[str, list[int]] = {}
    add, all_reduce = StepBracket.add, reduction.all_reduce

    def noting(values: Tensor, group: Any) -> Tensor:
        sent.append(values.numel() * values.element_size())
        return all_reduce(values, group)

    def watching(moment: str, call: Callable[..., Any], *given: Any) -> None:
        sent.clear()
        call(*given)
        found[moment] = list(sent)

    def noting_add(self: StepBracket, phase: Phase, handler: Any, **place: Any) -> Any:
        return add(self, phase, lambda step: watching(phase.name, handler, step), **place)

    class Watched(Recording):
        def _send(self, *given: Any) -> Any:
            sent: list[Any] = []
            watching("send", lambda: sent.append(super(Watched, self)._send(*given)))
            return sent[0]

    reduction.all_reduce = noting
    StepBracket.add = noting_add  # type: ignore[method-assign]
    monitor = NormDynamicsMonitor(1, tables=False, **arguments)
    monitor.part = Watched  # type: ignore[misc]
    fit(STRATEGIES[strategy], lambda: [monitor], optimizer=sgd, steps=2)
    (plan,) = monitor.plans.values()
    cut = sum(int(p.sharing.cut.sum()) for p in plan.vectors._placements if p.sharing is not None)
    numbers = len(monitor.member.gauges[plan.index].names) + 5
    return {k: v for k, v in found.items() if k != "RESOLVE"}, cut, len(plan.targets), numbers


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("strategy", "arguments"),
    [("ddp", {}), ("FSDP2", FILTERS), ("FSDP2", {}), ("FSDP1 FULL_SHARD, one unit", {})],
)
def test_what_the_monitor_sends(strategy: str, arguments: dict[str, Any]):
    """One collective in each phase of a step, as large as docs/strategies.md says."""
    for found, cut, weights, numbers in run_ranks(traffic, 2, (strategy, arguments)).values():
        assert (cut == 0) == (strategy == "ddp" or arguments == FILTERS)
        send = [] if strategy == "ddp" else [8 * (2 * numbers + 8) * weights, 8 * weights]
        assert found == {
            "MEASURE": [24 * cut] if cut else [],
            "MEASURE_STEP": [24 * cut] if cut else [],
            "send": send,
        }


# -------------------------------------------------------------------------------------------- traps


class Sometimes(torch.nn.Module):
    """Every second step leaves a weight out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(1, 7, 3, bias=False)
        self.conv_norm = torch.nn.GroupNorm(7, 7)
        self.extra = torch.nn.Linear(11, 11, bias=False)
        self.extra_norm = torch.nn.LayerNorm(11)
        self.block = torch.nn.Linear(11, 5, bias=False)
        self.block_norm = torch.nn.LayerNorm(5)
        self.head = torch.nn.Linear(5, 1)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv_norm(self.conv(x[:, None]))).mean(1)
        if self.passes % 2 == 0:
            x = x + self.extra_norm(self.extra(x))
        self.passes += 1
        return self.head(torch.tanh(self.block_norm(self.block(x))))


class SometimesModule(strategies.Module):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        torch.manual_seed(3)
        self.net = Sometimes().to(self.dtype_)


@pytest.mark.parametrize(
    ("strategy", "alone"),
    [
        ("FSDP2, 3 ranks", "ddp"),
        pytest.param(
            "FSDP1 FULL_SHARD, one unit, 3 ranks",
            "FSDP1 NO_SHARD, one unit",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_steps_without_some_gradients(strategy: str, alone: str):
    """Under FSDP1 a weight that was left out has a gradient of zeros, on one rank as well."""

    def main(how: strategies.Strategy) -> list[Any]:
        found = []
        for writers in (
            lambda: [AdaptiveWeightShrink(0.5), WeightRescaling(3, target_norm="initial")],
            lambda: [RadialProjection(gate="cosine", delta=0.5)],
        ):
            monitor = NormDynamicsMonitor(1, tables=False)
            _, module, _ = fit(
                how, lambda w=writers, m=monitor: [*w(), m], optimizer=adamw, model=SometimesModule
            )  # type: ignore[misc]
            found.append((module.final, list(monitor.history)))
        return found

    def on_one_rank() -> Any:
        from lightning.pytorch.strategies import DDPStrategy

        if alone == "ddp":
            return DDPStrategy(
                process_group_backend="gloo",
                timeout=strategies.TIMEOUT,
                find_unused_parameters=True,
            )
        return strategies.fsdp1("NO_SHARD", units=False)()

    expected = run_ranks(main, 1, (strategies.Strategy(1, on_one_rank),))[0]
    answers = run_ranks(main, STRATEGIES[strategy].world, (STRATEGIES[strategy],))
    for i, (weights, rows) in enumerate(expected):
        assert ("angular_update/net.extra.weight" in rows[1]) == (alone != "ddp")
        assert all(distance(found[i][0], weights) <= 1e-12 for found in answers.values())
        assert_same_rows(answers[0][i][1], rows, 1e-5, 1e-3)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "strategy",
    [
        "FSDP2",
        "FSDP1 SHARD_GRAD_OP",
        pytest.param("HSDP", marks=pytest.mark.slow),
        pytest.param("FSDP2 + TP", marks=pytest.mark.slow),
        *[pytest.param(name, marks=pytest.mark.deepspeed) for name in DEEPSPEED],
    ],
)
def test_validation_does_not_lead_astray(strategy: str):
    """After a forward pass without gradients FSDP shows whole parameters that are not the
    optimizer's; writing to them would be lost.

    And before the first training step DeepSpeed's stage 3 has nothing to show.
    """
    require(strategy)
    how = {**STRATEGIES, **DEEPSPEED}[strategy]
    dtype = how.dtypes[0]

    def main() -> dict[str, Tensor]:
        shrink = AdaptiveWeightShrink(0.5)
        _, module, _ = fit(
            how,
            lambda: [shrink, WeightRescaling(3), NormDynamicsMonitor(1, tables=False)],
            dtype=dtype,
            optimizer=sgd,
            limit_val_batches=1,
            num_sanity_val_steps=1,
            val_check_interval=2,
        )
        (plan,) = shrink.plans.values()
        owned = [p for group in plan.optimizer.param_groups for p in group["params"]]
        assert all(any(w is p for p in owned) for w in plan.vectors.weights)
        return module.final

    def reference_without() -> dict[str, Tensor]:
        return fit(
            STRATEGIES["ddp"],
            lambda: [AdaptiveWeightShrink(0.5), WeightRescaling(3)],
            dtype=dtype,
            optimizer=sgd,
        )[1].final

    expected = run_ranks(reference_without, 1)[0]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert all(
        distance(found, expected) <= tolerance for found in run_ranks(main, how.world).values()
    )


def resumable() -> list[Any]:
    """Counters that do not divide the epoch, and a length remembered from the start."""
    return [
        WeightRescaling(4, target_norm="initial"),
        AdaptiveWeightShrink(0.2),
        NormDynamicsMonitor(1, tables=False),
    ]


def train_two_epochs(
    strategy: strategies.Strategy, folder: str, ckpt_path: str | None, dtype: torch.dtype
) -> Any:
    """In a rank: two epochs of three steps with a checkpoint after each, or what is left of them
    after a checkpoint."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    keeper = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer, module, callbacks = fit(
        strategy,
        lambda: [*resumable(), keeper],
        # torch takes the optimizer state of an FSDP1 checkpoint for that of other weights if groups
        # are not in the module's order.
        optimizer=sgd if isinstance(strategy.make(), strategies.CPUFSDPStrategy) else adamw,
        steps=3,
        dtype=dtype,
        max_epochs=2,
        enable_checkpointing=True,
        ckpt_path=ckpt_path,
        limit_val_batches=1,
    )
    return (
        module.final,
        [c.state_dict() for c in callbacks[:2]],
        list(callbacks[2].history),
        trainer.global_step,
    )


def full_checkpoints(name: str) -> strategies.Strategy:
    """The strategy, saving its weights in one file."""
    from dataclasses import replace

    strategy = STRATEGIES[name]

    def make() -> Any:
        made = strategy.make()
        made._save_distributed_checkpoint = False
        return made

    return replace(strategy, make=make)


def sharded_checkpoints() -> strategies.Strategy:
    """FSDP1, each rank saving what it holds."""
    from dataclasses import replace

    return replace(
        STRATEGIES["FSDP1 FULL_SHARD"],
        make=strategies.fsdp1("FULL_SHARD", state_dict_type="sharded"),
    )


RESUMES: dict[str, Callable[[], strategies.Strategy]] = {
    "ddp": lambda: STRATEGIES["ddp"],
    "ddp, ZeroRedundancyOptimizer": lambda: STRATEGIES["ddp, ZeroRedundancyOptimizer"],
    "HSDP, sharded": lambda: STRATEGIES["HSDP"],
    "FSDP2, sharded": lambda: STRATEGIES["FSDP2"],
    "FSDP2, full": lambda: full_checkpoints("FSDP2"),
    "TP, full": lambda: full_checkpoints("TP"),
    "FSDP2 + TP, sharded": lambda: STRATEGIES["FSDP2 + TP"],
    "FSDP2 + TP, full": lambda: full_checkpoints("FSDP2 + TP"),
    "FSDP1, full": lambda: STRATEGIES["FSDP1 FULL_SHARD"],
    "FSDP1, sharded": sharded_checkpoints,
    **{name: functools.partial(DEEPSPEED.__getitem__, name) for name in DEEPSPEED},
}
# FSDP2 resumes quickly on another number of ranks.
QUICK_RESUMES = ["FSDP1, full"]


def _resume_marks(name: str) -> Any:
    return (
        pytest.mark.deepspeed
        if name in DEEPSPEED
        else ()
        if name in QUICK_RESUMES
        else pytest.mark.slow
    )


RESUME_MARKS = [pytest.param(n, marks=_resume_marks(n)) for n in RESUMES]


def assert_same_state(ours: Any, theirs: Any, tolerance: float) -> None:
    """Two state_dicts of a callback, whatever ranks they come from."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            if key != "digest" or not tolerance:  # sums in another order have other last bits
                assert_same_state(ours[key], theirs[key], tolerance)
    elif isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", RESUME_MARKS)
def test_resume_equals_uninterrupted(name: str, tmp_path: Any):
    require(name)
    strategy = RESUMES[name]()
    dtype = strategy.dtypes[0]
    whole = run_ranks(
        train_two_epochs, strategy.world, (strategy, str(tmp_path / "a"), None, dtype), timeout=120
    )
    resumed = run_ranks(
        train_two_epochs,
        strategy.world,
        (strategy, str(tmp_path / "b"), str(tmp_path / "a" / "epoch=0.ckpt"), dtype),
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for rank in whole:
        assert distance(resumed[rank][0], whole[rank][0]) <= tolerance
        assert resumed[rank][3] == whole[rank][3] == 6
        for mine, other in zip(resumed[rank][1], whole[rank][1], strict=True):
            assert other["steps"][0] == 6
            assert_same_state(mine, other, tolerance)
    assert_same_rows_of(resumed[0][2], whole[0][2])


def assert_same_rows_of(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in mine.items() if "turn" not in k} == pytest.approx(
            other, rel=1e-4, abs=1e-7, nan_ok=True
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FSDP2, full", "FSDP1, full"])
@pytest.mark.parametrize("ranks", [3, 4])
def test_resume_on_another_number_of_ranks(name: str, ranks: int, tmp_path: Any):
    strategy = RESUMES[name]()
    more = strategies.with_ranks(strategy, ranks)
    whole = run_ranks(
        train_two_epochs, strategy.world, (strategy, str(tmp_path / "a"), None, torch.float64)
    )
    resumed = run_ranks(
        train_two_epochs,
        ranks,
        (more, str(tmp_path / "b"), str(tmp_path / "a" / "epoch=0.ckpt"), torch.float64),
    )
    last = ranks - 1
    assert distance(resumed[last][0], whole[0][0]) <= 1e-12
    for mine, other in zip(resumed[last][1], whole[0][1], strict=True):
        assert_same_state(mine, other, 1e-12)


class BatchNormModule(strategies.Module):
    """A convolution whose bias lies in front of a BatchNorm with running statistics."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.net.conv = torch.nn.Conv1d(1, 5, 3, bias=True).to(self.dtype_)
        self.net.conv_norm = torch.nn.BatchNorm1d(5).to(self.dtype_)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "strategy", ["FSDP2", "TP", pytest.param("FSDP1 FULL_SHARD, one unit", marks=pytest.mark.slow)]
)
def test_batch_norm_follows_a_rescale(strategy: str):
    """Weight and bias lie in pieces, the statistics behind them are whole on every rank."""

    def main(name: str) -> Any:
        _, module, _ = fit(
            STRATEGIES[name],
            lambda: [WeightRescaling(2, target_norm=3.0)],
            optimizer=sgd,
            model=BatchNormModule,
        )
        return module.final, module.net.conv_norm.running_mean, module.net.conv_norm.running_var

    # As many BatchNorm batches as there are shares of the data; DDP hands rank zero's statistics to
    # all.
    expected = run_ranks(main, 1 if strategy == "TP" else 2, ("ddp",))[0]
    weights, *statistics = run_ranks(main, 2, (strategy,))[0]
    assert distance(weights, expected[0]) <= 1e-11
    torch.testing.assert_close(statistics, list(expected[1:]), rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.sampled(1)
@pytest.mark.parametrize("strategy", ["FSDP2", "FSDP1 FULL_SHARD"])
def test_what_bfloat16_swallows_is_kept_per_vector(strategy: str):
    """Shrinks below the rounding of bfloat16 add up, wherever the vectors lie, and go into
    checkpoints whole."""

    def main() -> Any:
        shrink = AdaptiveWeightShrink(0.02)
        fit(
            STRATEGIES[strategy],
            lambda: [shrink],
            dtype=torch.bfloat16,
            optimizer=sgd,
            precision="bf16-true",
        )
        return shrink.state_dict()["per_vector"]["owed"]

    for owed in run_ranks(main).values():
        assert {name: values.numel() for name, values in owed.items()} == {
            "net.conv.weight": 5,
            "net.grouped.weight": 3,
            "net.block.down.weight": 1,
        }
        assert all(bool(((values > 0.9) & (values < 1)).all()) for values in owed.values())


@pytest.mark.deepspeed
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_deepspeed_writes_to_the_float32_masters(precision: str):
    """Norms are right to float32 although the weights that take part in the forward pass are
    rounded to bfloat16."""
    found = {}
    for stage in (1, 2, 3):
        require(f"DeepSpeed ZeRO-{stage}")

        def main(stage: int = stage) -> Any:
            rescale = WeightRescaling(1)
            shrink = AdaptiveWeightShrink(0.2, params=["net.block.up.weight"])
            _, module, _ = fit(
                DEEPSPEED[f"DeepSpeed ZeRO-{stage}"],
                lambda: [rescale, shrink],
                dtype=torch.float32,
                optimizer=adamw,
                precision=precision,
            )
            norms = {
                t.name: v
                for p in rescale.plans.values()
                for t, v in zip(p.targets, p.vectors.gather(p.vectors.norms()), strict=True)
            }
            return module.final, norms, rescale.state_dict()["steps"]

        found[stage] = run_ranks(main)[0]
    for weights, norms, steps in found.values():
        assert len(norms) == 3
        assert all(float((values - 1).abs().max()) < 1e-6 for values in norms.values())
        assert set(steps.values()) == {STEPS}  # once per real step, however many groups it has
        assert distance(weights, found[1][0]) < 1e-6


@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", DEEPSPEED)
def test_deepspeed_accumulates_without_skipping(strategy: str):
    """DeepSpeed is told to step at every batch; the steps in between are no steps, and none that a
    scaler has skipped."""
    require(strategy)

    def main() -> Any:
        rescale, monitor = WeightRescaling(1), NormDynamicsMonitor(1, tables=False)
        fit(
            DEEPSPEED[strategy],
            lambda: [rescale, monitor],
            dtype=torch.float32,
            optimizer=adamw,
            accumulate_grad_batches=2,
        )
        return rescale.state_dict()["steps"], list(monitor.history)

    steps, rows = run_ranks(main)[0]
    assert set(steps.values()) == {STEPS // 2}
    assert [row["optimizer_step"] for row in rows] == [1, 2, 3]
    assert all(row["normdyn/skipped_steps"] == 0 for row in rows)


# --------------------------------------------------------------- losses and weights that come later


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.na, self.b = (
            nn.Linear(13, 8, bias=False),
            nn.LayerNorm(8),
            nn.Linear(8, 12, bias=False),
        )
        self.nb, self.c = nn.GroupNorm(3, 12), nn.Linear(12, 13)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.nb(self.b(torch.relu(self.na(self.a(x)))))))


class Gan(strategies.Module):
    """Manual optimization; the generator joins at the third batch."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        torch.manual_seed(3)
        critic = nn.Sequential(
            nn.Linear(13, 9, bias=False), nn.LayerNorm(9), nn.LeakyReLU(), nn.Linear(9, 1)
        )
        self.net = nn.ModuleDict({"generator": Generator(), "critic": critic}).to(self.dtype_)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, loss = batch[0], nn.functional.softplus
        for optimizer, fooling in zip(self.optimizers(), (False, True), strict=True):
            if fooling and batch_idx < 2:
                continue
            fake = self.net["generator"](real.flip(0))
            if fooling:
                value = loss(-self.net["critic"](fake)).mean()
            else:
                value = (
                    loss(self.net["critic"](fake.detach())).mean()
                    + loss(-self.net["critic"](real)).mean()
                )
            optimizer.zero_grad()
            self.manual_backward(value)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.net[part].parameters(), lr=0.01, weight_decay=0.1)
            for part in ("critic", "generator")
        ]


class LateNet(nn.Module):
    """Its block is used from the third batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.block, self.head = (
            nn.Linear(13, 12, bias=False),
            nn.LayerNorm(12),
            Late(),
            nn.Linear(12, 1),
        )

    def forward(self, x: Tensor, late: bool) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(self.block(x) if late else x)


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down, self.last = (
            nn.Linear(12, 10, bias=False),
            nn.GroupNorm(2, 10),
            nn.Linear(10, 12, bias=False),
            None,
        )
        self.last = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.down(torch.relu(self.norm(self.up(x)))))


class LateModule(strategies.Module):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        torch.manual_seed(3)
        self.net = LateNet().to(self.dtype_)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0], batch_idx >= 2), batch[1])


def _each_part(net: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    parts = net.values() if isinstance(net, nn.ModuleDict) else (net.block, net)
    for part in parts:
        fully_shard(part, mesh=mesh["data_parallel"])


def joining(name: str, model: Any) -> Any:
    """In a rank: weights at the end, the table, and the targets."""
    from dataclasses import replace

    from lightning.pytorch.strategies import DDPStrategy
    from torch.distributed.fsdp import MixedPrecision

    make: dict[str, Any] = {
        "ddp": lambda: DDPStrategy(
            process_group_backend="gloo", timeout=strategies.TIMEOUT, find_unused_parameters=True
        ),
        "FSDP1 FULL_SHARD": lambda: strategies.CPUFSDPStrategy(
            auto_wrap_policy={Late},
            mixed_precision=MixedPrecision(),
            process_group_backend="gloo",
            timeout=strategies.TIMEOUT,
        ),
    }
    strategy = STRATEGIES[name]
    strategy = replace(
        strategy,
        make=make.get(name, strategy.make),
        parallelize=_each_part if name == "FSDP2" else None,
    )
    shrink = AdaptiveWeightShrink(0.5)

    def optimizer(module: Any) -> Any:
        return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)

    _, module, _ = fit(
        strategy, lambda: [shrink, WeightRescaling(3)], optimizer=optimizer, model=model, steps=8
    )
    table = {
        v.name: (v.kind, v.n, v.reason) for v in shrink.member.session.search.verdicts.values()
    }
    return (
        module.final,
        table,
        sorted(t.name for plan in shrink.plans.values() for t in plan.targets),
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("FSDP1 FULL_SHARD", LateModule),
        ("FSDP2", Gan),
        pytest.param("FSDP2", LateModule, marks=pytest.mark.slow),
        pytest.param("ddp", LateModule, marks=pytest.mark.slow),
        pytest.param("ddp", Gan, marks=pytest.mark.slow),
    ],
)
def test_weights_that_join_later_are_found_at_the_same_step(name: str, model: Any):
    expected, table, targets = run_ranks(joining, 1, ("ddp", model))[0]
    assert len(targets) == 3
    for weights, found, theirs in run_ranks(joining, 2, (name, model)).values():
        assert (found, theirs) == (table, targets)
        assert distance(weights, expected) <= 1e-12


class Lengths(nn.Module):
    """A table of positions that is longer than most inputs; what is read of it goes through a
    LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.norm = nn.Parameter(torch.randn(9, 6)), nn.LayerNorm(6, eps=1e-12)
        self.block = nn.Sequential(nn.Linear(6, 5, bias=False), nn.LayerNorm(5, eps=1e-12))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x * self.norm(self.positions[: x.shape[1]]))


class LengthsModule(strategies.Module):
    """Each rank has inputs of its own lengths; a single process has all of them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        torch.manual_seed(3)
        self.net = Lengths().to(self.dtype_)  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack([self.net(x).sin().mean() for x in batch]).mean()

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(5)
        inputs = [
            [
                torch.randn(2, n, 6, generator=generator, dtype=torch.float64).to(self.dtype_)
                for n in lengths
            ]
            for lengths in ((3, 4), (3, 4), (5, 9), (5, 9), (3, 9), (6, 7))
        ]
        share = self.trainer.strategy.distributed_sampler_kwargs
        count, rank = share["num_replicas"], share["rank"]
        return torch.utils.data.DataLoader(
            [each if count == 1 else [each[rank]] for each in inputs], batch_size=None
        )


def reading(name: str) -> Any:
    """In a rank: weights at the end, what is known of the table of positions, and the lengths that
    its vectors are kept at."""
    from dataclasses import replace

    strategy = STRATEGIES[name]
    strategy = replace(strategy, parallelize=_each_part if name == "FSDP2" else None)
    rule, shrink = WeightRescaling(2, target_norm="initial"), AdaptiveWeightShrink(6.0)
    _, module, _ = fit(
        strategy, lambda: [rule, shrink], optimizer=strategies.sgd, model=LengthsModule, steps=6
    )
    verdict = rule.member.session.search.verdicts["net.positions"]
    clamped = shrink.member.session.combined.counted_by_weight("clamped")
    return (
        module.final,
        (verdict.kind, verdict.n),
        rule.state_dict()["per_vector"]["initial_norm"]["net.positions"],
        clamped,
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["ddp", "FSDP2", "FSDP1 FULL_SHARD, one unit"])
def test_rows_that_one_rank_reads_later_are_treated_by_all(name: str):
    expected, known, lengths, clamped = run_ranks(reading, 1, ("ddp",))[0]
    assert known == ("filter", 9)
    assert clamped["net.positions"]
    for weights, found, theirs, counted in run_ranks(reading, 2, (name,)).values():
        assert (found, counted) == (known, clamped)
        assert distance(weights, expected) <= 1e-12
        assert torch.allclose(theirs, lengths, atol=1e-12)


# ----------------------------------------------------------------------------------------- refusals


def test_flat_parameters_are_refused():
    from dataclasses import replace

    strategy = replace(
        STRATEGIES["FSDP1 FULL_SHARD"],
        make=strategies.fsdp1("FULL_SHARD", units=False, use_orig_params=False),
    )

    def main() -> str:
        with pytest.raises(NotSupportedError) as error:
            fit(strategy, lambda: [AdaptiveWeightShrink(0.1)], optimizer=sgd)
        return str(error.value)

    assert all("use_orig_params=True" in message for message in run_ranks(main).values())


@pytest.mark.deepspeed
def test_deepspeed_stage_0_in_bfloat16_is_refused():
    require("DeepSpeed ZeRO-0")

    def main() -> str:
        with pytest.raises(NotSupportedError) as error:
            fit(
                DEEPSPEED["DeepSpeed ZeRO-0"],
                lambda: [AdaptiveWeightShrink(0.1)],
                dtype=torch.float32,
                precision="bf16-mixed",
            )
        return str(error.value)

    assert all("ZeRO" in message and "32-true" in message for message in run_ranks(main).values())


def test_a_rank_that_raises_is_named():
    """The others wait for it in a collective, no longer than its limit; the message names rank and
    reason."""

    class Failing(strategies.Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.trainer.global_rank == 1 and self.trainer.global_step == 2:
                raise RuntimeError("out of luck")

    def main() -> None:
        fit(STRATEGIES["TP"], lambda: [AdaptiveWeightShrink(0.1)], optimizer=sgd, model=Failing)

    with pytest.raises(RankError, match=r"(?s)rank 1 raised.*out of luck"):
        run_ranks(main)
