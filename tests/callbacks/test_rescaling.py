"""What the rescaling callbacks share: verification by the function itself, and what is refused beside them."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from models import Net, fit, images, make, same, weights_of
from torch import nn
from torch.utils.data import DataLoader

from lightning_normdyn import LRDropRescaling, NotSupportedError, WeightRescaling


class Detached(nn.Module):
    """A LayerNorm beside a copy of its input that no gradient passes: orthogonal gradients, but not scale-invariant."""

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
    """What is added in front of the first BatchNorm is twice the bias, and no rule corrects its statistics for that."""

    def __init__(self) -> None:
        super().__init__()
        self.stale, self.sound = nn.Linear(36, 8), nn.Linear(36, 8)
        self.one, self.two, self.head = nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(self.one(2 * self.stale(x)) + self.two(self.sound(x)))


@pytest.mark.parametrize("callback", [lambda **k: WeightRescaling(2, **k), lambda **k: LRDropRescaling(exponent=0.25, **k)])
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


@pytest.mark.parametrize("callback", [lambda **k: WeightRescaling(2, **k), lambda **k: LRDropRescaling(exponent=0.25, **k)])
def test_verify_leaves_a_sound_run_as_it_is(callback):
    runs = []
    for verify in (False, True):
        torch.manual_seed(2)
        module = make(net=nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 2)))
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


@pytest.mark.parametrize("averaging", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("callback", [WeightRescaling(2), LRDropRescaling()], ids=lambda c: type(c).__name__)
def test_averages_of_other_lengths_are_refused(averaging, callback):
    with pytest.raises(NotSupportedError, match=f"{type(callback).__name__} changes the length of weights that {type(averaging).__name__}"):
        fit(make(), [averaging, callback])
