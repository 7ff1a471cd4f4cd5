"""A run without weight decay, at the effective learning rates of one that had it."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from cases import MODES, ByStep, Remembers, adamw, run
from models import Net, SavesAt, distance, fit, images, loader, make, same, weights_of
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normdyn import (
    AdaptiveWeightShrink,
    EffectiveLRReplay,
    History,
    NormDynamicsMonitor,
    NormDynError,
    NormDynWarning,
    NotSupportedError,
    RadialProjection,
    load_history,
)
from lightning_normdyn.parametrizations import weight_normalization, weight_standardization


def net(normalize: Any) -> nn.Sequential:
    """Two convolutions that see the direction of their raw weights only, exactly: no normalization
    with an epsilon."""
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    for layer in (layers[0], layers[2]):
        if normalize is weight_standardization:
            with torch.no_grad():
                layer.weight.mul_(
                    4
                    # from shorter weights such a network starts with steps so large that rounding
                    # decides where it goes
                )
        normalize(layer)
    return layers


KINDS = {"wn": weight_normalization, "ws": weight_standardization}
# Under standardization the outputs, and with them the gradients, are larger; lr * decay is the
# same.
LR = {"wn": 0.3, "ws": 0.05}
DECAY = {"wn": 0.02, "ws": 0.12}


def raw(name: str) -> bool:
    return "original" in name and not name.endswith("original0")


class Normalized(Net):
    """Plain SGD with a drop of its learning rate; only the raw weights decay."""

    def __init__(
        self, kind: str, decay: float, drop_at: int = 10**9, momentum: float = 0.0
    ) -> None:
        super().__init__(net=net(KINDS[kind]))
        self.lr, self.decay, self.drop_at, self.momentum = LR[kind], decay, drop_at, momentum

    def configure_optimizers(self) -> Any:
        named = list(self.named_parameters())
        groups = [
            {"params": [p for n, p in named if raw(n)], "weight_decay": self.decay},
            {"params": [p for n, p in named if not raw(n)]},
        ]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        return [optimizer], [
            {
                "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [self.drop_at]),
                "interval": "step",
            }
        ]


class Directions(L.Callback):
    """Every filter's direction after every step."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.rows: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        weights = [p.detach().flatten(1) for name, p in pl_module.named_parameters() if raw(name)]
        if self.kind == "ws":
            weights = [w - w.mean(1, keepdim=True) for w in weights]
        self.rows.append(torch.cat([(w / w.norm(dim=1, keepdim=True)).flatten() for w in weights]))

    def apart(self, other: Directions) -> float:
        return float((torch.stack(self.rows) - torch.stack(other.rows)).abs().max())


def monitor(every: int = 1) -> NormDynamicsMonitor:
    return NormDynamicsMonitor(every, per_vector=True, tables=False)


def train(
    kind: str, steps: int, callbacks: list[Any], decay: float = 0.0, **arguments: Any
) -> Directions:
    torch.manual_seed(1)
    module, directions = (
        Normalized(kind, decay, drop_at=2 * steps // 3, **arguments),
        Directions(kind),
    )
    fit(module, [*callbacks, directions], max_epochs=-1, max_steps=steps)
    return directions


def record(
    path: Path, kind: str, steps: int, every: int = 1, callbacks: Any = (), **arguments: Any
) -> Directions:
    watching = monitor(every)
    directions = train(kind, steps, [*callbacks, watching], DECAY[kind], **arguments)
    watching.history.save(path)
    return directions


# ---- The experiment ----


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", KINDS)
def test_without_decay_the_replay_follows_the_decayed_run_and_a_uniform_factor_does_not(
    kind, tmp_path
):
    steps = 150
    recorded = record(tmp_path / "run.npz", kind, steps)
    assert train(kind, steps, [EffectiveLRReplay(tmp_path / "run.npz")]).apart(recorded) < 1e-9
    assert (
        train(kind, steps, [EffectiveLRReplay(tmp_path / "run.npz", uniform=True)]).apart(recorded)
        > 0.02
    )


def test_what_float32_leaves_of_the_norms_is_recorded_of_float64_weights_only(tmp_path):
    def recorded(dtype: torch.dtype) -> History:
        watching = monitor()
        fit(make(make_optimizer=plain_sgd, dtype=dtype), [watching], max_steps=3)
        return watching.history

    assert not [name for name in recorded(torch.float32).vector_names() if "rest" in name]
    history = recorded(torch.float64)
    module = make(make_optimizer=plain_sgd)
    norms = module.net[0].weight.detach().flatten(1).norm(dim=1).numpy()
    first, rest = (
        history.vectors(f"{key}/net.0.weight")[1][0].astype(np.float64)
        for key in ("weight_norm", "weight_norm_rest")
    )
    assert np.abs(first + rest - norms).max() < 1e-14
    assert np.abs(first - norms).max() > 1e-10
    # Without it the replay is as close as float32 is.
    path, thin = tmp_path / "run.npz", History()
    recorded_run = record(path, "wn", 20)
    whole = load_history(path)
    for step in range(20):
        thin.append_vectors(
            step,
            {
                name: whole.vectors(name)[1][step]
                for name in whole.vector_names()
                if "rest" not in name
            },
        )
    apart = [
        train("wn", 20, [EffectiveLRReplay(file)]).apart(recorded_run)
        for file in (path, thin.save(tmp_path / "thin.npz"))
    ]
    assert 100 * apart[0] < apart[1] < 1e-6


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("statistic", ["norm", "std"])
def test_what_adaptive_weight_shrink_did_is_replayed_too(kind, statistic, tmp_path):
    alpha = 5 * DECAY[kind]
    recorded = record(
        tmp_path / "run.npz", kind, 40, callbacks=[AdaptiveWeightShrink(alpha, statistic=statistic)]
    )
    assert train(kind, 40, [EffectiveLRReplay(tmp_path / "run.npz")]).apart(recorded) < 1e-6
    assert train(kind, 40, []).apart(recorded) > 1e-3


def test_a_run_with_another_decay_follows_as_well(tmp_path):
    recorded = record(tmp_path / "run.npz", "wn", 40)
    shrinking = [EffectiveLRReplay(tmp_path / "run.npz"), AdaptiveWeightShrink(0.3)]
    assert train("wn", 40, shrinking).apart(recorded) < 1e-6
    assert (
        train("wn", 40, [EffectiveLRReplay(tmp_path / "run.npz")], decay=0.1).apart(recorded) < 1e-6
    )


def test_the_uniform_factor_is_the_mean_of_what_the_decay_amounts_to(tmp_path):
    path = tmp_path / "run.npz"
    record(path, "wn", 30)
    p, logs = 1.0, []
    for lr in [0.3] * 20 + [
        0.03
    ] * 10:  # AWS paper, eq. 14 to 16: the length that decay alone would have left
        after = p * (1 - lr * DECAY["wn"])
        logs.append(-np.log(p * after))
        p = after
    replay = EffectiveLRReplay(path, uniform=True)
    train("wn", 30, [replay])
    assert replay.member.uniform_factor == pytest.approx(np.exp(np.mean(logs)), rel=1e-6)


# ---- Onto itself ----


def onto_itself(mode: dict[str, Any], path: Path) -> tuple[Net, Net]:
    watching = monitor()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", NormDynWarning
        )  # momentum, clipping, late weights: asked for elsewhere
        recorded, _ = run([watching], mode)
        watching.history.save(path)
        replayed, _ = run([EffectiveLRReplay(path)], mode)
    return recorded, replayed


def uses_sgd(mode: dict[str, Any]) -> bool:
    made = mode["make_optimizer"](
        [nn.Parameter(torch.zeros(size)) for size in ((4, 1, 3, 3), (6, 4, 3, 3), (2, 6))]
    )
    return isinstance(made, torch.optim.SGD)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if uses_sgd(mode)])
def test_a_replay_of_a_run_onto_itself_changes_nothing(mode, tmp_path):
    recorded, replayed = onto_itself(MODES[mode], tmp_path / "run.npz")
    assert same(weights_of(replayed), weights_of(recorded))


def test_onto_itself_with_two_optimizers_of_which_one_pauses(tmp_path):
    class InTurn(Net):
        """Each half has an optimizer; the second one steps in every other batch only."""

        def __init__(self, make_optimizer: Any, dtype: Any = torch.float64) -> None:
            super().__init__(make_optimizer, dtype=dtype)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx=0):
            first, second = self.optimizers()
            for optimizer in [first] if batch_idx % 2 else [first, second]:
                loss = super().training_step(batch, batch_idx)
                self.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [
                self.make_optimizer(self.net[:3].parameters()),
                self.make_optimizer(self.net[3:].parameters()),
            ]

    def plain(parameters):
        return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1)

    recorded, replayed = onto_itself(
        {"model": InTurn, "make_optimizer": plain}, tmp_path / "run.npz"
    )
    assert same(weights_of(replayed), weights_of(recorded))


# ---- What is said ----


def test_between_recorded_steps_norms_are_interpolated_and_it_says_so(tmp_path):
    recorded = record(tmp_path / "run.npz", "wn", 40, every=3)
    with pytest.warns(
        NormDynWarning, match="not recorded at every step; norms in between are interpolated"
    ):
        replayed = train("wn", 40, [EffectiveLRReplay(tmp_path / "run.npz")])
    assert 1e-6 < replayed.apart(recorded) < 0.3 * train("wn", 40, []).apart(recorded)


def test_momentum_is_followed_approximately_and_it_says_so(tmp_path):
    recorded = record(tmp_path / "run.npz", "wn", 40, momentum=0.5)
    with pytest.warns(NormDynWarning, match="exact for plain SGD; with momentum"):
        replayed = train("wn", 40, [EffectiveLRReplay(tmp_path / "run.npz")], momentum=0.5)
    assert replayed.apart(recorded) < 0.5 * train("wn", 40, [], momentum=0.5).apart(recorded)


def test_beyond_its_end_the_last_norms_are_held_and_it_says_so(tmp_path):
    record(tmp_path / "run.npz", "wn", 5)
    with pytest.warns(NormDynWarning, match=r"ends at step 4; its last norms are held") as said:
        train("wn", 9, [EffectiveLRReplay(tmp_path / "run.npz")])
    assert len([w for w in said if w.category is NormDynWarning]) == 1


def test_several_steps_of_one_batch_are_followed_approximately_and_it_says_so(tmp_path):
    class TwiceABatch(Net):
        def training_step(self, batch, batch_idx=0):
            optimizer = self.optimizers()
            for _ in range(2):
                loss = super().training_step(batch, batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    def twice() -> Net:
        module = make(TwiceABatch, make_optimizer=plain_sgd)
        module.automatic_optimization = False
        return module

    watching = monitor()
    fit(twice(), [watching])
    with pytest.warns(
        NormDynWarning,
        match=r"steps several times in a batch, and .* holds one norm for all of them",
    ):
        fit(twice(), [EffectiveLRReplay(watching.history.save(tmp_path / "run.npz"))])


def test_other_optimizers_are_refused(tmp_path):
    record(tmp_path / "run.npz", "wn", 3)
    torch.manual_seed(1)
    with pytest.raises(
        NotSupportedError,
        match=r"right for SGD, but the optimizer is AdamW. Use torch.optim.SGD in both runs",
    ):
        fit(Net(adamw, net(weight_normalization)), [EffectiveLRReplay(tmp_path / "run.npz")])


# ---- Files that do not fit ----


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.npz"
    watching = monitor()
    fit(make(make_optimizer=plain_sgd), [watching])
    watching.history.save(path)
    return path


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01)


def wider() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3, bias=False), nn.BatchNorm2d(6),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))  # fmt: skip


def shorter() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            wider,
            r"comes from another model: `net.0.weight` has shape \(4, 1, 3, 3\) there and \(5, 1, "
            r"3, 3\) here",
        ),
        (
            shorter,
            r"comes from another model: it has a weight `net.3.weight`, which this model has not",
        ),
    ],
)
def test_another_architecture_is_refused_by_the_first_mismatch(other, says, good):
    with pytest.raises(NormDynError, match=says):
        fit(make(make_optimizer=plain_sgd, net=other()), [EffectiveLRReplay(good)])


def test_other_vectors_and_weights_that_were_not_recorded_are_refused(good, tmp_path):
    with pytest.raises(NormDynError, match=r"`net.0.weight` has 4 vectors there and 1 here"):
        fit(make(make_optimizer=plain_sgd), [EffectiveLRReplay(good, granularity="layer")])
    history = load_history(good)
    partial = History()
    partial.append_vectors(
        0, {k: history.vectors(k)[1][0] for k in ("weight_norm/net.3.weight", "decay/net.3.weight")}
    )
    with pytest.raises(NormDynError, match=r"it has no weight `net.0.weight`, but net.3.weight"):
        fit(
            make(make_optimizer=plain_sgd),
            [EffectiveLRReplay(partial.save(tmp_path / "partial.npz"))],
        )


def test_a_damaged_or_missing_file_is_refused_at_fit_start(good, tmp_path):
    content = good.read_bytes()
    for name, text, says in (
        ("cut", content[: len(content) // 2], "cannot be read as a history"),
        ("other", b"no history", "cannot be read as a history"),
    ):
        (tmp_path / name).write_bytes(text)
        module = make(Remembers, make_optimizer=plain_sgd)
        with pytest.raises(NormDynError, match=says):
            fit(module, [EffectiveLRReplay(tmp_path / name)])
        assert module.as_made()
    with pytest.raises(NormDynError, match="there is no history file"):
        fit(make(), [EffectiveLRReplay(tmp_path / "missing.npz")])


def test_a_history_without_vectors_says_how_to_record_them(tmp_path):
    watching = NormDynamicsMonitor(1, tables=False)
    fit(make(), [watching])
    path = watching.history.save(tmp_path / "thin.npz")
    with pytest.raises(
        NormDynError,
        match=r"holds no per-vector norms. Record it with NormDynamicsMonitor\(every_n_steps=1, per_vector=True\)",
    ):
        fit(make(), [EffectiveLRReplay(path)])


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("decay", 1.0, r"holds decays that are not in \[0, 1\) for `net.0.weight`"),
        ("decay", -0.1, r"decays that are not in"),
        ("decay", np.inf, r"decays that are not in"),
        ("weight_norm", -1.0, r"holds norms below 0 for `net.0.weight`"),
        ("decay", None, r"holds norms without the decays that were applied for `net.0.weight`"),
        ("weight_norm_rest", None, r"holds norms that do not fit each other for `net.0.weight`"),
        ("weight_norm_rest", 1e9, r"holds norms that do not fit each other"),
    ],
)
@pytest.mark.parametrize("uniform", [False, True])
def test_a_record_that_no_run_can_have_left_is_refused_at_fit_start(
    key, value, says, uniform, good, tmp_path
):
    history, changed = load_history(good), History()
    for step in range(4):
        arrays = {name: history.vectors(name)[1][step] for name in history.vector_names()}
        if step == 2 and value is None:
            del arrays[f"{key}/net.0.weight"]
        elif step == 2:
            arrays[f"{key}/net.0.weight"] = np.full(4, value)
        changed.append_vectors(step, arrays)
    module = make(Remembers, make_optimizer=plain_sgd)
    with pytest.raises(NormDynError, match=says):
        fit(module, [EffectiveLRReplay(changed.save(tmp_path / "changed.npz"), uniform=uniform)])
    assert module.as_made()


@pytest.mark.parametrize("uniform", [False, True])
def test_a_weight_without_any_record_is_refused(uniform, good, tmp_path):
    history = load_history(good)
    history._contents.vectors.restore([], {}, {})
    with pytest.raises(NormDynError, match=r"holds no record at all for `net.0.weight`"):
        fit(
            make(make_optimizer=plain_sgd),
            [EffectiveLRReplay(history.save(tmp_path / "empty.npz"), uniform=uniform)],
        )


@pytest.mark.parametrize("norm", [np.inf, np.nan])
def test_vectors_of_a_run_that_diverged_are_left_alone(norm, good, tmp_path):
    history = load_history(good)
    for record in history._contents.vectors.records:
        record.content.arrays()["weight_norm/net.0.weight"][1] = norm
    replayed, recorded = make(make_optimizer=plain_sgd), make(make_optimizer=plain_sgd)
    fit(recorded)
    with pytest.warns(
        NormDynWarning,
        match=r"left vectors alone whose norm is zero or not finite: 1 in net.0.weight",
    ):
        fit(replayed, [EffectiveLRReplay(history.save(tmp_path / "inf.npz"))])
    assert distance(weights_of(replayed), weights_of(recorded)) < 1e-6


def test_vectors_of_zero_norm_are_left_alone(tmp_path):
    def dead() -> Net:
        module = make(make_optimizer=plain_sgd)
        with torch.no_grad():
            module.net[0].weight[1] = 0
        return module

    watching, module = monitor(), dead()
    fit(module, [watching])
    replayed, replay = dead(), EffectiveLRReplay(watching.history.save(tmp_path / "run.npz"))
    with pytest.warns(
        NormDynWarning,
        match=r"left vectors alone whose norm is zero or not finite: 1 in net.0.weight",
    ):
        fit(replayed, [replay])
    assert distance(weights_of(replayed), weights_of(module)) < 1e-6


# ---- Fits, interrupted, repeated, on two ranks ----


def decayed(path: Path) -> Path:
    """A run of another seed and decay, so that a replay makes a difference."""
    watching = monitor()
    fit(
        make(seed=2, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1.0)),
        [watching],
        max_epochs=3,
    )
    return watching.history.save(path)


def test_resume_equals_the_uninterrupted_run(tmp_path):
    path, middle = decayed(tmp_path / "run.npz"), tmp_path / "middle.ckpt"

    def go(*extra: Any, **arguments: Any) -> dict[str, Tensor]:
        module = make(ByStep, make_optimizer=plain_sgd)
        fit(module, [EffectiveLRReplay(path), *extra], max_epochs=3, **arguments)
        return weights_of(module)

    expected = go(SavesAt(5, middle))
    assert same(go(ckpt_path=middle), expected)
    torch.load(middle, weights_only=True)


def test_a_second_fit_starts_afresh(tmp_path):
    replay = EffectiveLRReplay(decayed(tmp_path / "run.npz"))
    weights = []
    for steps in (5, 8, 8):
        module = make(make_optimizer=plain_sgd)
        fit(module, [replay], max_steps=steps)
        weights.append(weights_of(module))
    assert same(weights[1], weights[2])
    assert replay.steps_of(0) == 8


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fails_at", [-1, 0, 3])
def test_leaves_nothing_behind(fails_at, tmp_path):
    module = make(Remembers, make_optimizer=plain_sgd)
    module.fails_at = fails_at
    with (
        pytest.raises(RuntimeError, match="the training step fails")
        if fails_at >= 0
        else contextlib.nullcontext()
    ):
        fit(module, [EffectiveLRReplay(decayed(tmp_path / "run.npz"))])
    assert module.as_made()


def _replay_under_ddp(path: Path) -> dict[str, Tensor]:
    module = make(make_optimizer=plain_sgd)
    fit(
        module,
        [EffectiveLRReplay(path)],
        DataLoader(images(16), batch_size=4),
        strategy="ddp",
        devices=2,
    )
    return weights_of(module)


def test_ddp_keeps_the_ranks_equal(tmp_path):
    path = decayed(tmp_path / "run.npz")
    first, second = run_ranks(_replay_under_ddp, args=(path,)).values()
    assert same(first, second)
    untouched = make(make_optimizer=plain_sgd)
    fit(untouched, [], DataLoader(images(16), batch_size=4))
    assert distance(first, weights_of(untouched)) > 1e-3


def test_a_recorder_on_two_ranks_is_replayed_on_one(tmp_path):
    data = TensorDataset(
        *(t[:8].repeat(2, *[1] * (t.dim() - 1)) for t in images().tensors)
    )  # both ranks see the same examples

    def on_two() -> Any:
        watching, module = monitor(), make(make_optimizer=plain_sgd, net=net(weight_normalization))
        fit(
            module,
            [watching],
            DataLoader(data, batch_size=8),
            strategy="ddp",
            devices=2,
            use_distributed_sampler=False,
        )
        if watching.history.vector_names():
            watching.history.save(tmp_path / "run.npz")
        return weights_of(module)

    recorded = run_ranks(on_two)[0]
    module = make(make_optimizer=plain_sgd, net=net(weight_normalization))
    fit(module, [EffectiveLRReplay(tmp_path / "run.npz")], DataLoader(data, batch_size=8))
    assert distance(weights_of(module), recorded) < 1e-6


def test_an_evaluation_changes_nothing(tmp_path):
    replay, module = (
        EffectiveLRReplay(decayed(tmp_path / "run.npz")),
        make(make_optimizer=plain_sgd),
    )
    before = weights_of(module)
    runner = L.Trainer(
        accelerator="cpu",
        callbacks=[replay],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    runner.validate(module, loader(), verbose=False)
    assert same(weights_of(module), before)


@pytest.mark.parametrize("order", [1, -1])
def test_beside_a_projection_the_step_that_is_left_of_it_is_scaled(order, tmp_path):
    """A run replayed onto itself has factors of 1, whatever else acts in the same phase, so it ends
    at the same weights."""

    def run(*callbacks):
        module = make(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05))
        fit(module, list(callbacks), max_steps=6)
        return weights_of(module)

    watching = monitor()
    recorded = run(RadialProjection(), watching)
    watching.history.save(tmp_path / "run.npz")
    assert same(
        run(*[RadialProjection(), EffectiveLRReplay(tmp_path / "run.npz")][::order]), recorded
    )


def test_a_weight_of_zeros_is_refused_by_name(tmp_path):
    watching = monitor()
    fit(make(make_optimizer=plain_sgd), [watching], max_steps=2)
    watching.history.save(tmp_path / "run.npz")
    module = make(make_optimizer=plain_sgd)
    nn.init.zeros_(module.net[3].weight)
    with pytest.raises(NotSupportedError, match=r"`net\.3\.weight`, but all entries are zero"):
        fit(module, [EffectiveLRReplay(tmp_path / "run.npz")], max_steps=2)
