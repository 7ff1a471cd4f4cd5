"""A look at the training data in mid-fit: which examples, with which random numbers, and that all
generators are left as they were."""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from models import fit, make, same, weights_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler

from lightning_normdyn import InputSpanMonitor
from lightning_normdyn.input_span.training_sample import Sample, generators_in, undisturbed


class Noisy(Dataset):
    """Augments with every kind of generator that a dataset may own."""

    def __init__(self, count: int = 24) -> None:
        self.x = torch.randn(
            count, 1, 6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64
        )
        python, modern, old, torch_ = (
            random.Random(1),
            np.random.default_rng(1),
            np.random.RandomState(1),
            torch.Generator(),
        )
        self.generator = torch_
        self.transforms = [
            functools.partial(self._shift, rng=old),
            {"inner": SimpleNamespace(rng=python)},
        ]
        self.draw = lambda: modern.random() + self.transforms[1]["inner"].rng.random()

    @staticmethod
    def _shift(x: Tensor, rng: Any) -> Tensor:
        return x + rng.rand()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        noise = torch.randn(1, 6, 6, generator=self.generator, dtype=torch.float64)
        return self.transforms[0](self.x[i]) + self.draw() * noise, i % 2

    def states(self) -> list[Any]:
        """In text, to be compared."""
        states: list[Any] = []
        for g in generators_in([self]):
            if isinstance(g, np.random.Generator):
                states.append(g.bit_generator.state)
            else:
                states.append(g.getstate() if isinstance(g, random.Random) else g.get_state())
        return [repr(s.tolist() if isinstance(s, Tensor) else s) for s in states]


def sample(loader: DataLoader[Any], most: int = 12, seed: int = 0) -> Sample:
    return Sample(
        SimpleNamespace(train_dataloader=loader, world_size=1, fast_dev_run=False), most, seed
    )


def examples(loader: DataLoader[Any], most: int = 12, seed: int = 0) -> Tensor:
    """The first elements of all batches of the sample, one after the other."""
    return torch.cat([batch[0] for _, batch in sample(loader, most, seed).share(0, 1)])


def test_generators_are_found_wherever_they_are_held():
    found = generators_in([Noisy()])
    assert {type(g) for g in found} == {
        random.Random,
        np.random.Generator,
        np.random.RandomState,
        torch.Generator,
    }
    assert (
        generators_in([[random.Random()] * 1001, random.SystemRandom(), np.random, L.Trainer]) == []
    )

    def not_bound_yet() -> Any:
        return later

    itself: list[Any] = [not_bound_yet]
    itself.append(itself)
    assert generators_in(itself) == []
    later = random.Random(3)
    assert generators_in(itself) == [later]


@pytest.mark.parametrize("subset", [False, True])
def test_an_example_has_its_random_numbers_whatever_batch_it_is_in(subset):
    def dataset() -> Any:
        return Subset(Noisy(), range(24)) if subset else Noisy()

    one = examples(DataLoader(dataset(), batch_size=4))
    assert torch.equal(examples(DataLoader(dataset(), batch_size=5)), one)
    used = dataset()
    for _ in range(3):
        used[0]
    assert torch.equal(examples(DataLoader(used, batch_size=4)), one)
    assert not torch.equal(examples(DataLoader(dataset(), batch_size=4), seed=1), one)


def test_what_a_sampler_holds_out_is_not_looked_at():
    class Remembers(Noisy):
        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            seen.append(i)
            return super().__getitem__(i)

    seen: list[int] = []
    kept = [1, 2, 3, 5, 8, 13, 21]
    few = sample(DataLoader(Remembers(), batch_size=4, sampler=SubsetRandomSampler(kept)), most=100)
    list(few.share(0, 1))
    assert sorted(seen) == kept
    assert (few.count, few.whole) == (7, True)
    # As Lightning wraps it for several ranks.
    wrapped = L.fabric.utilities.distributed.DistributedSamplerWrapper(
        SubsetRandomSampler(kept), num_replicas=2, rank=0
    )
    part = sample(DataLoader(Remembers(), batch_size=4, sampler=wrapped), most=5)
    seen.clear()
    list(part.share(0, 1))
    assert len(seen) == 5
    assert set(seen) < set(kept)
    assert not part.whole


class Restless(nn.Module):
    """A layer with a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rng = nn.Linear(36, 2), np.random.default_rng(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1) + self.rng.random())


def test_the_users_own_generators_are_left_as_they_were():
    def go(callbacks: list[Any]) -> tuple[dict[str, Tensor], list[str], float]:
        torch.manual_seed(3)
        dataset, module = Noisy(), make(net=Restless())
        fit(module, callbacks, DataLoader(dataset, batch_size=8), max_epochs=3)
        return weights_of(module), dataset.states(), module.net.rng.random()

    (expected, states, draw), (weights, found, drawn) = go([]), go([InputSpanMonitor()])
    assert same(weights, expected)
    assert (found, drawn) == (states, draw)


def test_they_are_restored_after_an_exception_too():
    module, dataset = make(net=Restless()), Noisy()
    before = (
        dataset.states(),
        str(module.net.rng.bit_generator.state),
        torch.get_rng_state().tolist(),
    )

    def fails() -> None:
        with undisturbed(module, 0, [dataset]):
            dataset[0]
            module(torch.zeros(1, 1, 6, 6, dtype=torch.float64))
            torch.rand(1)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert (
        dataset.states(),
        str(module.net.rng.bit_generator.state),
        torch.get_rng_state().tolist(),
    ) == before
    assert module.training
