"""What the rescaling callbacks share: verification by the function itself, and what is refused
beside them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks as of_lightning
from models import Net, fit, images, loader, make, same, weights_of
from torch import nn
from torch.utils.data import DataLoader

from lightning_normdyn import (
    LRDropRescaling,
    NormDynWarning,
    NotSupportedError,
    Phase,
    StepBracket,
    WeightRescaling,
)


class Detached(nn.Module):
    """A LayerNorm beside a copy of its input that no gradient passes: orthogonal gradients, but not
    scale-invariant."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(36, 8, bias=False), nn.LayerNorm(8)
        self.outer, self.bn = nn.Linear(36, 8, bias=False), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = x.flatten(1)
        y = self.inner(x)
        return self.head(self.norm(y) + y.detach() + self.bn(self.outer(x)))


class Doubled(nn.Module):
    """What is added in front of the first BatchNorm is twice the bias, and no rule corrects its
    statistics for that."""

    def __init__(self) -> None:
        super().__init__()
        self.stale, self.sound = nn.Linear(36, 8), nn.Linear(36, 8)
        self.one, self.two, self.head = nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(self.one(2 * self.stale(x)) + self.two(self.sound(x)))


@pytest.mark.parametrize(
    "callback",
    [lambda **k: WeightRescaling(2, **k), lambda **k: LRDropRescaling(exponent=0.25, **k)],
)
def test_statistics_that_cannot_follow_are_refused_and_the_way_out_works(callback):
    module = make(net=Doubled())
    before = weights_of(module)
    way_out = r"`net\.stale\.weight` is followed by running statistics .*Leave it out with params='!net\.stale\.weight'"
    with pytest.raises(NotSupportedError, match=way_out):
        fit(module, [callback()])
    assert same(weights_of(module), before)
    rescaling = callback(params="!net.stale.weight")
    fit(module, [rescaling])
    assert [t.name for t in rescaling.plans[0].targets] == ["net.sound.weight"]


def test_verify_names_the_weight_whose_length_the_function_sees():
    module = make(net=Detached())
    before = weights_of(module)
    with pytest.raises(NotSupportedError, match=r"length of `net\.inner\.weight`"):
        fit(module, [WeightRescaling(1, verify=True)])
    assert same(weights_of(module), before), "refused before anything was touched"


@pytest.mark.parametrize(
    "callback",
    [lambda **k: WeightRescaling(2, **k), lambda **k: LRDropRescaling(exponent=0.25, **k)],
)
def test_verify_leaves_a_sound_run_as_it_is(callback):
    runs = []
    for verify in (False, True):
        torch.manual_seed(2)
        module = make(
            net=nn.Sequential(
                nn.Conv2d(1, 4, 3),
                nn.BatchNorm2d(4),
                nn.Dropout(0.3),
                nn.Flatten(),
                nn.Linear(64, 2),
            )
        )
        torch.manual_seed(3)
        fit(module, [callback(verify=verify)])
        runs.append({**weights_of(module), **{k: b.double() for k, b in module.named_buffers()}})
    assert same(*runs)


def test_verify_wants_a_tensor():
    class Mapped(Net):
        def training_step(self, batch, batch_idx=0):
            return super().training_step((batch["x"], batch["y"]))

    data = DataLoader([{"x": x, "y": y} for x, y in images()], batch_size=8)
    with pytest.raises(NotSupportedError, match="first element, but that is a dict"):
        fit(make(Mapped), [WeightRescaling(1, verify=True)], data)


@pytest.mark.parametrize(
    "averaging", [("EMAWeightAveraging", {}), ("StochasticWeightAveraging", {"swa_lrs": 0.1})]
)
@pytest.mark.parametrize(
    "callback", [WeightRescaling(2), LRDropRescaling()], ids=lambda c: type(c).__name__
)
def test_averages_of_other_lengths_are_refused(averaging, callback):
    name, arguments = averaging
    if not hasattr(of_lightning, name):
        pytest.skip(f"this Lightning has no {name}")
    averages = getattr(of_lightning, name)(**arguments)
    with pytest.raises(
        NotSupportedError,
        match=f"{type(callback).__name__} changes the length of weights that {name}",
    ):
        fit(make(), [averages, callback])


# ---- Coarser vectors than the normalization has ----


class EvaluatesAround(L.Callback):
    """What the network gives in evaluation before and after the last rescale of a fit."""

    def __init__(self, phase: Phase) -> None:
        self.phase, self.seen = phase, []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        x = next(iter(loader()))[0].to(next(pl_module.parameters()).dtype)

        def evaluate(step: Any) -> None:
            pl_module.eval()
            self.seen.append(pl_module(x).detach().clone())
            pl_module.train()

        bracket = StepBracket.of(trainer.optimizers[0])
        for rank in (-10, 10):
            bracket.add(self.phase, evaluate, rank=rank)


def convolutions(filters: int) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(1, filters, 3),
        nn.BatchNorm2d(filters),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * filters, 2),
    )
    with torch.no_grad():
        net[0].bias.copy_(torch.linspace(-1, 1, filters))
    return net


@pytest.mark.parametrize("filters", [1, 2, 3, 6])
@pytest.mark.parametrize("granularity", ["filter", "layer"])
def test_running_statistics_follow_whatever_counts_as_one_vector(
    filters: int, granularity: Any
) -> None:
    look = EvaluatesAround(Phase.RESCALE)
    rescaling = WeightRescaling(1, target_norm=5.0, granularity=granularity)
    module = make(net=convolutions(filters))
    fit(module, [rescaling, look], max_steps=2)
    torch.testing.assert_close(look.seen[1], look.seen[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(look.seen[3], look.seen[2], rtol=0, atol=1e-10)
    vectors = module.net[0].weight.detach().reshape(1 if granularity == "layer" else filters, -1)
    torch.testing.assert_close(
        vectors.norm(dim=1), torch.full((len(vectors),), 5.0, dtype=torch.float64)
    )


@pytest.mark.parametrize("filters", [2, 3, 6])
def test_running_statistics_follow_a_layer_at_a_drop_too(filters: int) -> None:
    look = EvaluatesAround(Phase.LR_DROP)
    module = make(
        net=convolutions(filters),
        make_scheduler=lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2], 0.01),
    )
    before = float(module.net[0].weight.detach().norm())
    fit(module, [LRDropRescaling(exponent=0.5, granularity="layer"), look], max_steps=3)
    torch.testing.assert_close(look.seen[-1], look.seen[-2], rtol=0, atol=1e-10)
    assert float(module.net[0].weight.detach().norm()) < 0.5 * before, "nothing was rescaled"


def linears() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, 5, bias=False),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 4, bias=False),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Linear(4, 2, bias=False),
    )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="newer torch only")
def test_muon_can_be_rescaled_by_the_layer_as_its_refusal_says() -> None:
    def optimizer(p: Any) -> Any:
        return torch.optim.Muon(
            [w for w in p if w.dim() == 2], lr=0.02, momentum=0.9, weight_decay=0.1
        )

    data = loader(dtype=torch.float32)
    with pytest.raises(
        NotSupportedError, match=r"orthogonalizes whole matrices.*Use granularity='layer'"
    ):
        fit(
            make(make_optimizer=optimizer, net=linears(), dtype=torch.float32),
            [WeightRescaling(2)],
            data,
        )
    look = EvaluatesAround(Phase.RESCALE)
    module = make(make_optimizer=optimizer, net=linears(), dtype=torch.float32)
    fit(module, [WeightRescaling(1, target_norm=3.0, granularity="layer"), look], data, max_steps=6)
    for before, after in zip(look.seen[::2], look.seen[1::2], strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert [float(module.net[i].weight.detach().norm()) for i in (1, 4)] == pytest.approx(
        [3.0, 3.0], rel=1e-5
    )


# ---- verify=True with other forwards ----


class TwoInputs(Net):
    def forward(self, x, y):  # type: ignore[override]
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx=0):
        return self(*batch)


class Keywords(TwoInputs):
    def forward(self, *, x, y):  # type: ignore[override]
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx=0):
        return self(x=batch[0], y=batch[1])


class Raises(Net):
    """Its forward wants something else than it is given, and says so late."""

    def forward(self, x):
        return self.net(x.pixels)

    def training_step(self, batch, batch_idx=0):
        return F.cross_entropy(self(SimpleNamespace(pixels=batch[0])), batch[1])


class WholeBatch(Net):
    def forward(self, batch):  # type: ignore[override]
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx=0):
        return self(batch)


def test_verify_calls_a_forward_with_as_many_inputs_as_it_asks_for() -> None:
    for model in (TwoInputs, WholeBatch):
        fit(make(model), [WeightRescaling(2, verify=True)])
        with pytest.raises(NotSupportedError, match=r"length of `net\.inner\.weight`"):
            fit(make(model, net=Detached()), [WeightRescaling(1, verify=True)])


@pytest.mark.parametrize(
    ("model", "says"),
    [(Keywords, r"takes other arguments"), (Raises, r"its forward raised \w+Error: ")],
)
def test_verify_refuses_by_name_what_it_cannot_call(model, says) -> None:
    with pytest.raises(
        NotSupportedError, match=rf"{says}.*Leave verify off, and call .*verify_scale_invariance"
    ):
        fit(make(model), [WeightRescaling(2, verify=True)])


# ---- Weights whose length the network sees ----


@pytest.mark.parametrize(
    "callback",
    [lambda **k: WeightRescaling(2, **k), lambda **k: LRDropRescaling(exponent=0.25, **k)],
)
def test_a_rescale_that_changes_the_function_is_announced(callback, capsys) -> None:
    with pytest.warns(
        NormDynWarning, match=r"which changes the network's function: `net\.8\.weight` \("
    ) as said:
        fit(make(), [callback(params=["net.8.weight", "net.0.weight"])])
    ours = [str(w.message) for w in said if "network's function" in str(w.message)]
    assert len(ours) == 1
    assert "net.0.weight" not in ours[0]
    table = capsys.readouterr().out
    assert "changes the network's function" in " ".join(table.split())


def test_a_rescale_that_changes_nothing_is_not(capsys, recwarn) -> None:
    fit(make(), [WeightRescaling(2)])
    assert not [w for w in recwarn if "network's function" in str(w.message)]
    assert "function" not in capsys.readouterr().out
