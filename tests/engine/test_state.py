"""Callback state is checked before it is believed: what does not fit is dropped and said, and the
fit starts as a fresh one would."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from balances import after, shown_of, sums_of
from containers import holder_of, places
from expectations import WeightStep, follow_each
from models import SavesAt, fit, make, same, weights_of

from lightning_normdyn import (
    AdaptiveWeightShrink,
    EffectiveLRReplay,
    InputSpanMonitor,
    LRDropRescaling,
    NormDynamicsMonitor,
    NormDynError,
    NormDynWarning,
    RadialBrake,
    RadialProjection,
    RotationControl,
    WeightDecay,
    WeightRescaling,
)
from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.engine.state import VERSION, digest, seal, unseal
from lightning_normdyn.engine.value_checks import plain
from lightning_normdyn.monitor import balance
from lightning_normdyn.monitor.expected_norms import Interval
from lightning_normdyn.monitor.ledger import Ledger
from lightning_normdyn.monitor.passed_steps import PassedSteps
from lightning_normdyn.monitor.pulls import Strength, Taken

CASES = 1300
DROPPED = r"cannot use its state in the checkpoint: .* starts as in a fresh fit"


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1)


def steps_down(optimizer):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 6], 0.1)


MAKERS: dict[str, Callable[[], Any]] = {
    "aws": lambda: AdaptiveWeightShrink(0.5),
    "rescaling": lambda: WeightRescaling(2, target_norm="initial"),
    "projection": lambda: RadialProjection(),
    "drop": lambda: LRDropRescaling(exponent=0.25),
    "aws match": lambda: AdaptiveWeightShrink("match"),
    "decay": lambda: WeightDecay(rate="lr_squared"),
    "cautious decay": lambda: WeightDecay(0.3, rate="schedule", cautious=True),
    "rotation": lambda: RotationControl(0.05, smoothing=0.9),
    "brake": lambda: RadialBrake(),
    "monitor": lambda: NormDynamicsMonitor(1, tables=False, per_vector=True),
    "some quantities": lambda: NormDynamicsMonitor(1, tables=False, quantities=["effective_lr"]),
    "span": lambda: InputSpanMonitor(),
    "replay": lambda: EffectiveLRReplay("run.npz"),
}
WRITERS = [
    "aws",
    "aws match",
    "rescaling",
    "projection",
    "drop",
    "decay",
    "cautious decay",
    "rotation",
    "brake",
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of a fit with each callback, saved after four of eight steps."""
    saved = {}
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recorded = NormDynamicsMonitor(1, tables=False, per_vector=True)
        fit(make(make_optimizer=plain_sgd), [recorded])
        recorded.history.save("run.npz")
        for name, maker in MAKERS.items():
            module = (
                make(make_optimizer=plain_sgd)
                if name == "replay"
                else make(make_optimizer=momentum, make_scheduler=steps_down)
            )
            path = folder / f"{name}.ckpt"
            fit(module, [maker(), SavesAt(4, path)])
            saved[name] = torch.load(path, weights_only=True)
    return saved


def state_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    (state,) = checkpoint["callbacks"].values()
    return state


# ---- The fuzzer ----


def itself() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


def spoiled_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    flat = tensor.clone().reshape(-1)
    choices: list[Callable[[], torch.Tensor]] = [
        lambda: flat[:-1] if flat.numel() else torch.ones(3),
        lambda: torch.cat([flat, flat[:1]]) if flat.numel() else torch.ones(3),
        lambda: tensor.to(torch.float16) if tensor.dtype != torch.float16 else tensor.float(),
        lambda: tensor.reshape(1, *tensor.shape),
        lambda: torch.zeros(1).expand(10**12),  # four bytes that claim four terabytes
        lambda: torch.empty(tensor.shape, device="meta"),
        lambda: tensor.to(torch.complex64),
    ]
    if tensor.is_floating_point() and tensor.numel():
        choices += [
            lambda v=v: torch.full_like(tensor, v) for v in (float("nan"), float("inf"), 1e30, -1.0)
        ]
    if tensor.dtype == torch.int64 and tensor.numel():
        choices += [lambda v=v: torch.full_like(tensor, v) for v in (10**9, -7, 2**62)]
    if tensor.numel():
        choices.append(
            lambda: (tensor + 1).to(tensor.dtype) if tensor.dtype != torch.bool else ~tensor
        )
    return rng.choice(choices)()


def spoil(state: dict[str, Any], rng: random.Random) -> str:
    """Change one part of a state; what was done."""
    way = rng.choice(list(places(state)))
    holder = holder_of(state, way)
    key, value = way[-1], holder[way[-1]]
    kind = rng.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
        return f"{way} left out"
    if kind == 1 and isinstance(holder, dict):
        foreign = rng.choice(["net.9.weight", "__class__", "", "net.8.weight", 7, "x" * 5000])
        if foreign not in holder:
            holder[foreign] = copy.deepcopy(value)
            return f"{foreign!r} beside {way}"
    if kind == 2 and isinstance(value, torch.Tensor):
        holder[key] = spoiled_tensor(value, rng)
        return f"{way} spoiled"
    others = [
        None,
        True,
        0,
        -1,
        3,
        10**9,
        10**400,
        10**5000,
        0.5,
        float("nan"),
        float("inf"),
        1e30,
        "",
        "x",
        "\ud800",
        [],
        [[]],
        {},
        (),
        {"a": 1},
    ]
    others += [
        torch.zeros(2),
        torch.zeros(()),
        torch.full((3,), float("nan")),
        object(),
        b"bytes",
        {1, 2},
        1j,
        itself(),
        np.float32(2),
        print,
    ]
    choice = rng.choice(others)
    holder[key] = choice
    return f"{way} = {type(choice).__name__}"


def the_same(a: Any, b: Any) -> bool:
    try:
        plain(a, "it")
    except NormDynError:
        return False
    return digest(a) == digest(b)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MAKERS)
def test_no_spoiled_state_is_believed(name, checkpoints):
    whole, rng = state_of(checkpoints[name]), random.Random(name)
    dropped, tries = 0, -(-CASES // len(MAKERS))
    for _ in range(tries):
        state = copy.deepcopy(whole)
        what = spoil(state, rng)
        if the_same(state, whole):
            continue
        callback = MAKERS[name]()
        with pytest.warns(NormDynWarning, match=DROPPED) as said:
            callback.load_state_dict(state)
        assert callback._restored is None, what
        assert len(said) == 1
        assert str(said[0].message).startswith(type(callback).__name__), what
        assert len(str(said[0].message)) < 1000, what
        dropped += 1
    assert dropped > 0.9 * tries


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        "state",
        7,
        {},
        {"version": VERSION},
        {"version": VERSION, "digest": 3, "extra": []},
        itself(),
    ],
    ids=repr,
)
def test_what_is_no_state_at_all_is_dropped(state):
    for maker in MAKERS.values():
        callback = maker()
        with pytest.warns(NormDynWarning, match=DROPPED):
            callback.load_state_dict(state)
        assert callback._restored is None


@pytest.mark.parametrize("version", [1, 2, 4, 99, True, "3", None, 3.0])
def test_the_version_is_read(version, checkpoints):
    state = {**state_of(checkpoints["aws"]), "version": version}
    with pytest.warns(NormDynWarning, match="it has version"):
        AdaptiveWeightShrink(0.5).load_state_dict(state)


@pytest.mark.parametrize("name", MAKERS)
def test_a_sound_state_is_believed_wherever_it_was(name, checkpoints, tmp_path):
    state = state_of(checkpoints[name])
    shuffled = dict(reversed(list(state.items())))
    torch.save(shuffled, tmp_path / "state.pt")
    for each in (state, shuffled, torch.load(tmp_path / "state.pt", weights_only=True)):
        callback = MAKERS[name]()
        callback.load_state_dict(copy.deepcopy(each))
        assert callback._restored is not None
        assert digest(callback.state_dict()) == digest(
            state
        )  # handed on as it came, where no step follows


# ---- In a fit ----


def claims_the_head(state: dict[str, Any]) -> None:
    conv = state["targets"]["net.3.weight"]
    state["targets"]["net.8.weight"] = {
        **conv,
        "shape": [2, 6],
        "partition": {**conv["partition"], "labels": torch.arange(2)},
    }


def numbers_a_billion_vectors(state: dict[str, Any]) -> None:
    state["targets"]["net.3.weight"]["partition"]["labels"][0] = 10**9


def counts_wrong(state: dict[str, Any]) -> None:
    state["steps"][0] = 3


DAMAGES = {
    "the head is claimed": claims_the_head,
    "a billion vectors": numbers_a_billion_vectors,
    "another count": counts_wrong,
    "nothing left": lambda state: state.clear(),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_fit_with_a_damaged_state_is_one_without_that_state(name, damage, checkpoints, tmp_path):
    def go(change: Callable[[dict[str, Any]], Any]) -> dict[str, torch.Tensor]:
        checkpoint = copy.deepcopy(checkpoints[name])
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        module = make(make_optimizer=momentum, make_scheduler=steps_down)
        fit(module, [MAKERS[name]()], ckpt_path=tmp_path / "changed.ckpt")
        return weights_of(module)

    fresh = go(lambda checkpoint: checkpoint.update(callbacks={}))
    if damage == "nothing left":  # Lightning does not hand on an empty state
        assert same(go(lambda checkpoint: state_of(checkpoint).clear()), fresh)
        return
    with pytest.warns(NormDynWarning, match=DROPPED):
        assert same(go(lambda checkpoint: DAMAGES[damage](state_of(checkpoint))), fresh)


@pytest.mark.parametrize(
    ("maker", "key"),
    [
        ("rescaling", "initial_norm"),
        ("rotation", "initial_norm"),
        ("rotation", "mean_square_tangent"),
        ("rotation", "lr_max"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), 1e30, -1.0, float("inf")])
def test_an_initial_norm_that_is_none_is_not_used(maker, key, value, checkpoints, tmp_path):
    checkpoint = copy.deepcopy(checkpoints[maker])
    for norms in state_of(checkpoint)["per_vector"][key].values():
        norms.fill_(value)
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    module = make(make_optimizer=momentum, make_scheduler=steps_down)
    with pytest.warns(NormDynWarning, match=DROPPED):
        fit(module, [MAKERS[maker]()], ckpt_path=tmp_path / "changed.ckpt")
    assert all(
        0 < float(weight.norm()) < 100
        for name, weight in weights_of(module).items()
        if name.endswith("weight")
    )


def test_what_belongs_to_another_model_of_the_same_names_is_not_used(checkpoints, tmp_path):
    state = copy.deepcopy(state_of(checkpoints["aws"]))
    del state["version"], state["digest"]
    verdict = state["targets"]["net.3.weight"]
    verdict["shape"][0] = 3
    verdict["partition"]["labels"] = torch.arange(3)
    checkpoint = copy.deepcopy(checkpoints["aws"])
    checkpoint["callbacks"] = dict.fromkeys(checkpoint["callbacks"], seal(state))
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.warns(NormDynWarning, match=r"`net\.3\.weight` is not used"):
        fit(
            make(make_optimizer=momentum, make_scheduler=steps_down),
            [MAKERS["aws"]()],
            ckpt_path=tmp_path / "changed.ckpt",
        )


# ---- The parts: what types and ranges say where a digest was made anew ----


def resealed(state: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    state = copy.deepcopy(state)
    change(state)
    return seal(state)


def verdict_of(state: dict[str, Any]) -> dict[str, Any]:
    return state["targets"]["net.0.weight"]


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "steps": lambda s: s.update(steps={0: -1}),
    "steps as text": lambda s: s.update(steps={0: "3"}),
    "steps beyond reach": lambda s: s.update(steps={0: 10**400}),
    "no steps": lambda s: s.pop("steps"),
    "settings": lambda s: s.update(settings=[1]),
    "per vector": lambda s: s.update(
        per_vector={"owed": {"net.0.weight": torch.tensor([float("nan")] * 4)}}
    ),
    "per vector shape": lambda s: s.update(
        per_vector={"other": {"net.0.weight": torch.ones(2, 2)}}
    ),
    "per vector type": lambda s: s.update(per_vector={"other": {"net.0.weight": [1.0]}}),
    "label": lambda s: verdict_of(s)["partition"]["labels"].fill_(10**9),
    "label below": lambda s: verdict_of(s)["partition"]["labels"].fill_(-2),
    "labels of floats": lambda s: verdict_of(s)["partition"].update(labels=torch.zeros(4)),
    "labels of another shape": lambda s: verdict_of(s)["partition"].update(labels=torch.arange(5)),
    "a dimension that is not there": lambda s: verdict_of(s)["partition"].update(keep=[4]),
    "kind": lambda s: verdict_of(s).update(kind="everything"),
    "eps": lambda s: verdict_of(s).update(eps="no"),
    "mask": lambda s: verdict_of(s).update(read=torch.ones(2, dtype=torch.bool)),
    "link": lambda s: verdict_of(s)["batch_norms"].append({"module": "net.1"}),
    "foreign link": lambda s: [link.update(run="rm") for link in verdict_of(s)["batch_norms"]],
    "norms": lambda s: verdict_of(s).update(norms="net.1"),
    "graph": lambda s: s.update(graph={"network": 3}),
    "losses": lambda s: s.update(losses={"net.0.weight": 3}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_types_shapes_and_ranges_are_checked_too(wrong, checkpoints):
    state = state_of(checkpoints["aws"])
    unseal(resealed(state, lambda s: None))
    with pytest.raises(NormDynError):
        unseal(resealed(state, WRONG[wrong]))


@pytest.mark.parametrize("rate", ["fast", float("nan"), -1.0, float("inf"), None, torch.ones(1)])
def test_the_rates_of_an_lr_drop_are_checked(rate, checkpoints):
    state = resealed(
        state_of(checkpoints["drop"]),
        lambda s: s["extra"]["workers"][0].update(last_lr={"net.0.weight": rate}),
    )
    with pytest.warns(NormDynWarning, match=DROPPED):
        LRDropRescaling(exponent=0.25).load_state_dict(state)


@pytest.mark.parametrize("header", ["{}", "[", 3, None])
def test_the_history_of_a_monitor_is_checked(header, checkpoints):
    state = resealed(
        state_of(checkpoints["span"]), lambda s: s["extra"]["history"].update(header=header)
    )
    with pytest.warns(NormDynWarning, match=DROPPED):
        InputSpanMonitor().load_state_dict(state)


def test_what_is_saved_of_a_view_is_what_it_shows(tmp_path):
    tensors = {
        "few": torch.zeros(1).expand(1000),
        "part": torch.arange(10**5)[3:5],
        "across": torch.arange(6).reshape(2, 3).T,
    }
    sealed = seal({"settings": {}, "steps": {}, "per_vector": {}, "targets": {}, "extra": tensors})
    torch.save(sealed, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 20_000
    back = unseal(torch.load(tmp_path / "state.pt", weights_only=True))["extra"]
    assert all(torch.equal(back[key], value) for key, value in tensors.items())


def test_saving_does_not_fail_because_of_what_a_persons_own_callback_keeps():
    sealed = seal(
        {
            "settings": {"own": object(), "rate": np.float32(0.5)},
            "steps": {},
            "per_vector": {},
            "targets": {},
            "extra": {},
        }
    )
    with pytest.raises(NormDynError, match=r"own.* is a object"):
        unseal(sealed)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ({"a": 1, 2: "b"}, {2: "b", "a": 1}, True),
        ([1, 2], (1, 2), True),
        ([1, 2], [12], False),
        (["ab", "c"], ["a", "bc"], False),
        (1, True, False),
        (1, 1.0, False),
        (0.0, -0.0, False),
        (float("nan"), float("nan"), True),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2, 1), torch.ones(1, 2), False),
        (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16), True),
        (torch.ones(3, 2).T, torch.ones(2, 3), True),
        (torch.tensor(3), torch.tensor(3), True),
        ({"a": None}, {"a": "None"}, False),
    ],
)
def test_a_digest_tells_contents_apart_and_nothing_else(one, other, equal):
    assert (digest(one) == digest(other)) == equal


OF_STEPS = ("expectations", "balances", "workers", "counted", "jumped")


def go_on(extra: dict[str, Any]) -> None:
    """What a monitor makes of its own part of a state at its next row."""
    ledger = Ledger.from_state(extra)
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": False, "weight_decay": 0.1}
    passed = PassedSteps()
    for worker in extra.get("workers", {}).values():
        passed.load(worker["passed"])
    number = 5
    passed.note(number, [group])
    for known in ledger.balances.values():
        since = 0 if known.end is None else known.end.number
        stretches = [Taken(s.first, s.last, Strength(0.1), 0.1) for s in passed.since(since)]
        row = after(known, number, sums_of(4.0, 4.0, 0.0, 1e-3), 0.1, Strength(0.1), stretches)
        shown_of(row, 36, 19.0)
    newest = ledger.counted.get(0, 0)
    interval = Interval(torch.optim.SGD, [group], number, passed.since(newest))
    steps = []
    for name in ledger.expectations:
        steps.append(WeightStep(name, 0, Effects(), 9, (4, 9), 2.0, 0.01, 0.1, 3.0))
    follow_each(interval, steps, ledger.expectations)


def test_courses_and_windows_that_were_sealed_anew_raise_nothing_else(
    checkpoints: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the digest, which would find every change at once."""
    monkeypatch.setattr(balance, "LEAST_STEPS", 2)
    monkeypatch.setattr(balance, "MOST_ERROR", float("inf"))
    whole, rng = state_of(checkpoints["monitor"]), random.Random("sealed anew")
    go_on(whole["extra"])
    refused = believed = 0
    for _ in range(200):
        own = copy.deepcopy({key: whole["extra"][key] for key in OF_STEPS})
        what = spoil(own, rng)
        try:
            plain(own, "it")
        except NormDynError:
            continue  # nothing that could be sealed
        others = {key: whole["extra"][key] for key in whole["extra"] if key not in OF_STEPS}
        state = seal({**whole, "extra": {**others, **own}})
        callback = MAKERS["monitor"]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NormDynWarning)
            callback.load_state_dict(state)
        if callback._restored is None:
            refused += 1
            continue
        try:
            go_on(callback._restored["extra"])
        except NormDynError:
            refused += 1
        except Exception as error:
            raise AssertionError(what) from error
        else:
            believed += 1
    assert refused > 50
    assert believed > 5  # a plausible number in the place of another


# ---- What is done for a step that is not over ----


def unfinished() -> dict[str, Any]:
    weight = {
        "factor": torch.tensor([0.5, 0.9]),
        "keep": [0],
        "labels": torch.tensor([0, 1]),
        "buffers": {"momentum_buffer": -1.0},
    }
    statistics = {"factor": torch.tensor([0.5, 0.9]), "bias": None, "done": ["mean"]}
    return {"weights": {"net.weight": weight}, "statistics": {"norm": statistics}}


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("weights", "factor", torch.tensor([0.5, 0.0])),
        ("weights", "factor", torch.tensor([0.5, float("nan")])),
        ("weights", "factor", [0.5, 0.9]),
        ("weights", "keep", [0, 0]),
        ("weights", "keep", [-1]),
        ("weights", "labels", torch.tensor([0, 10**9])),
        ("weights", "buffers", {"momentum_buffer": float("inf")}),
        ("weights", "owed", 1),
        ("weights", "foreign", 1),
        ("statistics", "factor", torch.tensor([-0.5, 0.9])),
        ("statistics", "bias", torch.tensor([[0.1]])),
        ("statistics", "done", ["weight"]),
    ],
)
def test_what_is_said_of_an_unfinished_step_is_checked(part, key, value):
    content = {
        "settings": {},
        "steps": {},
        "per_vector": {},
        "targets": {},
        "extra": {},
        "ahead": unfinished(),
    }
    assert set(unseal(seal(content))["ahead"]) == {"weights", "statistics"}
    next(iter(content["ahead"][part].values()))[key] = value
    with pytest.raises(NormDynError, match="ahead"):
        unseal(seal(content))
