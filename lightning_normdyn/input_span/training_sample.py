"""A bounded, seeded look at the training data in mid-fit, without a trace in the model, its random
numbers or the order of its data."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler

from lightning_normdyn.engine.lightning_facts import RUNNER_ATTRIBUTES, users_sampler
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.invariance.visibility import eager

# --------------------------------------------------------------------------------------- the sample


class Sample:
    """A bounded, seeded sample of the training set, in batches as its loader makes them: the same
    on any number of ranks.

    Args:
        trainer: whose training set.
        most: most examples.
        seed: what they depend on.

    Attributes:
        count: examples in the sample.
        whole: whether that is all there are.
        quantiles: for each batch ``(examples, rows per example)``: which rows to look at
            (`lightning_normdyn.input_span.span.spread_rows`).

    Raises:
        NotSupportedError: where the training data are no DataLoader over a map-style dataset.
    """

    def __init__(self, trainer: Trainer, most: int, seed: int) -> None:
        loader = trainer.train_dataloader
        if (
            not isinstance(loader, DataLoader)
            or isinstance(loader.dataset, IterableDataset)
            or not hasattr(loader.dataset, "__len__")
        ):
            found = (
                f"a DataLoader over the iterable {type(loader.dataset).__name__}"
                if isinstance(loader, DataLoader)
                else type(loader).__name__
            )
            raise NotSupportedError(
                "InputSpanMonitor draws a sample from the training set, so it needs one DataLoader "
                "over a map-style dataset "
                f"(with __len__ and __getitem__), and found {found}. Give it one, or remove the "
                f"callback."
            )
        chosen = _trained_on(loader)
        size = len(chosen)
        if trainer.world_size > 1:  # somebody may have cut the dataset by rank
            sizes = torch.tensor([size], device=trainer.strategy.root_device, dtype=torch.long)
            dist.all_reduce(sizes, dist.ReduceOp.MIN)
            size = int(sizes)
        batch = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning's connectors
            most = min(most, int(trainer.num_training_batches) * batch)
        self.count = min(size, most)
        self.whole = self.count == size
        self._loader, self._seed = loader, seed
        self._data_module: Any = getattr(trainer, "datamodule", None)
        # Not randperm, whose memory grows with the dataset.
        drawn = [int(chosen[i]) for i in random.Random(seed).sample(range(size), self.count)]
        self._batches = [drawn[start : start + batch] for start in range(0, self.count, batch)]
        generator = torch.Generator().manual_seed(seed)
        quantiles = torch.rand(
            self.count,
            most // max(1, self.count),
            generator=generator,
            dtype=torch.float64,
            device="cpu",
        )
        self.quantiles = quantiles.split(batch)  # type: ignore[no-untyped-call]

    def rounds(self, world: int) -> int:
        """Batches that each of ``world`` ranks runs."""
        return -(-len(self._batches) // world)

    def share(self, rank: int, world: int) -> Iterator[tuple[int | None, Any]]:
        """This rank's batches with their numbers; with the number None, one that only keeps step
        with the others."""
        mine: list[int | None] = list(range(rank, len(self._batches), world))
        mine += [None] * (self.rounds(world) - len(mine))
        source = self._loader
        workers = (
            {}
            if not source.num_workers
            else {"multiprocessing_context": source.multiprocessing_context}
        )
        data: DataLoader[Any] = DataLoader(
            _Fetch(source, self._batches, self._seed),
            batch_size=None,
            sampler=[0 if number is None else number for number in mine],
            collate_fn=_as_it_is,
            num_workers=source.num_workers,
            worker_init_fn=source.worker_init_fn,
            generator=torch.Generator().manual_seed(self._seed),
            **workers,
        )
        yield from zip(mine, data, strict=True)

    def small_batch(self) -> Any:
        """Two examples, or one item of a dataset of batches."""
        return _Fetch(self._loader, [self._batches[0][:2]], self._seed)[0]

    def seed_of(self, number: int | None) -> int:
        """What the random numbers of a batch start from."""
        return self._seed + (number or 0)

    @property
    def sources(self) -> list[Any]:
        """What of the user's is asked for batches."""
        return [self._loader.dataset, self._loader.collate_fn, self._data_module]


def _trained_on(loader: DataLoader[Any]) -> Sequence[int]:
    """Indices of the examples that the loader can draw: all, unless a sampler keeps to a part, such
    as one that holds others out."""
    sampler = users_sampler(loader.sampler)
    if isinstance(sampler, SubsetRandomSampler):
        return sampler.indices
    return range(len(loader.dataset))  # type: ignore[arg-type]  # has __len__, as checked


class _Fetch(Dataset[Any]):
    """Whole batches of a dataset. Every example has random numbers of its own, so that it matters
    neither who fetches it nor with which
    others; those of a dataset that fetches several at once depend on the batch."""

    def __init__(
        self, loader: DataLoader[Any], batches: Sequence[Sequence[int]], seed: int
    ) -> None:
        self.dataset, self.collate = loader.dataset, loader.collate_fn
        self.whole = loader.batch_sampler is None  # an item is a batch already
        # A Subset has this method whatever it is a subset of.
        self.several = (
            None
            if isinstance(self.dataset, Subset)
            else getattr(self.dataset, "__getitems__", None)
        )
        self.batches, self.seed = batches, seed
        self.starts = [0, *accumulate(len(batch) for batch in batches)]
        self.own: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        if self.own is None:  # in this process
            self.own = generators_in([self.dataset, self.collate])
        indices = self.batches[number]
        self._start_from(self.seed + number)
        if self.whole:
            return self.collate(self.dataset[indices[0]])
        if self.several is not None:
            return self.collate(self.several(indices))
        examples = []
        for place, index in enumerate(indices, self.starts[number]):
            self._start_from(self.seed + place)
            examples.append(self.dataset[index])
        self._start_from(self.seed + number)
        return self.collate(examples)

    def _start_from(self, seed: int) -> None:
        seed_everything(seed)
        for generator in self.own or ():
            _restart(generator, seed)


def _as_it_is(batch: Any) -> Any:
    return batch


# ----------------------------------------------------------------------------------- random numbers


def seed_everything(seed: int, device: torch.device | None = None) -> None:
    """Seed Python's, NumPy's and torch's own generators, and that of ``device``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_MOST_LOOKED_AT = 20_000
_LONGEST = 1_000
_LEAVES = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    Tensor,
    np.ndarray,
    type,
    ModuleType,
    Trainer,
    random.SystemRandom,
)


def generators_in(roots: Iterable[Any]) -> list[Any]:
    """Generators of random numbers that objects hold: in attributes, containers, closures and
    arguments already bound, at any depth.

    Of containers with more than 1000 entries nothing is looked at: those hold data.

    Example:
        >>> class Noisy:
        ...     def __init__(self):
        ...         self.transforms = [lambda x, rng=np.random.default_rng(0): x + rng.normal()]
        >>> [type(found).__name__ for found in generators_in([Noisy()])]
        ['Generator']
    """
    found: list[Any] = []
    seen: dict[int, Any] = {}  # keeps what it saw alive, or an id could come twice
    open_ = list(roots)
    while open_ and len(seen) < _MOST_LOOKED_AT:
        it = open_.pop()
        if id(it) in seen or isinstance(it, _LEAVES):
            continue
        seen[id(it)] = it
        if isinstance(it, _GENERATORS):
            found.append(it)
        elif isinstance(it, dict):
            open_ += it.values() if len(it) <= _LONGEST else ()
        elif isinstance(it, (list, tuple, set, frozenset)):
            open_ += it if len(it) <= _LONGEST else ()
        elif isinstance(it, FunctionType):
            open_ += [
                *map(_content, it.__closure__ or ()),
                *(it.__defaults__ or ()),
                *(it.__kwdefaults__ or {}).values(),
            ]
        elif isinstance(it, MethodType):
            open_.append(it.__self__)
        elif isinstance(it, functools.partial):
            open_ += [it.func, it.args, it.keywords]
        else:
            open_ += list(getattr(it, "__dict__", {}).values())
    return found


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _restart(generator: Any, seed: int) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    else:
        generator.seed(seed if isinstance(generator, random.Random) else seed % 2**32)


# --------------------------------------------------------------------------------- leaving no trace


@contextmanager
def undisturbed(module: LightningModule, seed: int, sources: Sequence[Any] = ()) -> Iterator[None]:
    """What runs inside finds ``module`` in evaluation mode without gradients, and leaves it and all
    random numbers as they were.

    Args:
        module: the model.
        seed: what random numbers start from inside.
        sources: other objects that may hold generators of their own (`Sample.sources`).
    """
    flags = [(m, m.training) for m in module.modules()]
    buffers = [
        (m, dict(m._buffers), [None if b is None else b.clone() for b in m._buffers.values()])
        for m in module.modules()
    ]
    numbers, numpy_numbers = random.getstate(), np.random.get_state()
    own = [
        (generator, _state_of(generator))
        for generator in generators_in([*sources, *_attributes(module)])
    ]
    devices = [module.device.index or 0] if module.device.type == "cuda" else []
    own_log = vars(module).get("log")
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(eager())  # hooks inside compiled code are not called
        seed_everything(seed, module.device)
        # A `self.log` inside forward must not reach the loggers: this is no training step.
        vars(module)["log"] = lambda *_, **__: None
        try:
            module.eval()
            yield
        finally:
            vars(module).pop("log")
            if own_log is not None:
                vars(module)["log"] = own_log
            for m, training in flags:
                m.training = training
            for m, held, values in buffers:
                for buffer, value in zip(held.values(), values, strict=True):
                    if buffer is not None and value is not None and not torch.equal(buffer, value):
                        buffer.copy_(value)
                m._buffers.clear()
                m._buffers.update(held)
            for m in module.modules():
                reshard: Any = getattr(m, "reshard", None)
                if reshard is not None and hasattr(
                    m, "unshard"
                ):  # FSDP2: a forward without gradients leaves the root whole
                    reshard()
            random.setstate(numbers)
            np.random.set_state(numpy_numbers)
            for generator, state in own:
                _set_state(generator, state)


def _attributes(module: LightningModule) -> list[Any]:
    """What the modules hold beside parameters, buffers, and the Trainer."""
    return [
        value for m in module.modules() for name, value in vars(m).items() if name not in _TORCH
    ]


_TORCH = frozenset(vars(nn.Module())) | RUNNER_ATTRIBUTES
