"""Claims of scale invariance held against the function: rescale what is claimed, compare
outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.names import parameter_names
from lightning_normdyn.invariance.restored import restored
from lightning_normdyn.invariance.search import ScaleInvarianceSearch
from lightning_normdyn.invariance.verdict import Verdict
from lightning_normdyn.invariance.visibility import visible_graph


@dataclass(frozen=True)
class InvarianceReport:
    """What `verify_scale_invariance` found; true if the function did not change by more than
    ``tolerance``.

    Args:
        max_relative_change: largest change of an output tensor, relative to its largest entry.
        claims: the verdicts that were tested (those that claim something).
        tolerance: what still counts as unchanged (epsilons leave up to 3e-3).
    """

    max_relative_change: float
    claims: tuple[Verdict, ...]
    tolerance: float

    def __bool__(self) -> bool:
        return self.max_relative_change <= self.tolerance


def verify_scale_invariance(
    module: nn.Module,
    *inputs: Any,
    seed: int = 0,
    loss: Callable[[Any], Tensor] | None = None,
    verdicts: Iterable[Verdict] | None = None,
    tolerance: float = 1e-2,
) -> InvarianceReport:
    """Test claims of scale invariance by what they mean: rescale every claimed vector by its own
    random factor, compare the outputs.

    All factors are drawn from 2**U(-1, 1) and applied at once. Weights, buffers, random states and
    training flags are restored bit for bit.

    Args:
        module: any module on one process; run in training mode (a module in evaluation mode inside
            it, e.g. a frozen BatchNorm, stays so).
        inputs: arguments of its forward.
        seed: of the factors, and of every forward pass (dropout).
        loss: from the module's output to the training loss, which is then compared too; without it
            the sum of the outputs stands for it.
        verdicts: the claims; found by running the module once if not given.
        tolerance: largest relative change that counts as none.

    Raises:
        NotSupportedError: for sharded weights.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = verify_scale_invariance(net, torch.randn(16, 4))
        >>> bool(report), [claim.name for claim in report.claims]
        (True, ['0.weight'])
    """
    found = _read_graph(module, inputs, loss, seed) if verdicts is None else list(verdicts)
    claims = tuple(v for v in found if v.partition is not None)
    weights = {
        name: parameter for parameter, names in parameter_names(module).items() for name in names
    }
    for claim in claims:
        weight = weights[claim.name]
        if not _is_whole(weight, claim):
            raise NotSupportedError(
                f"`{claim.name}` is sharded ({type(weight.data).__name__} of shape "
                f"{tuple(weight.shape)}, in full "
                f"{tuple(claim.shape)}), so its function cannot be compared here. "
                "Call verify_scale_invariance on the unwrapped module, on one process."
            )
    generator = torch.Generator().manual_seed(seed)

    def factors(n: int) -> Tensor:
        return torch.exp2(
            2 * torch.rand(n, generator=generator, dtype=torch.float64, device="cpu") - 1
        )

    before = _outputs(module, inputs, loss, seed)
    after = _outputs(
        module,
        inputs,
        loss,
        seed,
        [(weights[c.name], c.partition) for c in claims if c.partition is not None],
        factors,
    )
    return InvarianceReport(_largest_change(before, after), claims, tolerance)


def _is_whole(weight: Tensor, verdict: Verdict) -> bool:
    return type(weight.data) is Tensor and tuple(weight.shape) == tuple(verdict.shape)


def spread(partition: Partition, values: Tensor, weight: Tensor) -> Tensor:
    """``(n,)`` values at every entry's vector, broadcastable to ``weight``; 1 where an entry
    belongs to none."""
    extended = torch.cat([values, values.new_ones(1)])[partition.labels]  # -1 picks the last
    shape = [size if d in partition.keep else 1 for d, size in enumerate(weight.shape)]
    return extended.reshape(shape).to(weight.device, weight.dtype)


def inspect_module(
    module: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, seed: int = 0
) -> list[Verdict]:
    """Run a training-mode forward and say of every weight of two or more dimensions whether it is
    scale-invariant.

    The claims of the graph are then held against the function: the outputs must stay what they are
    when all claimed vectors are multiplied
    by up to 16. A claim that changes them by more than a tenth (a large epsilon, a padding value, a
    detached copy) is withdrawn. The module
    is left as it was: weights, buffers, random states, training flags.

    Args:
        module: any module.
        inputs: arguments of its forward.
        loss: from the module's output to the training loss; without it the sum of the outputs
            stands for it.
        seed: of the forward pass.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> [(v.name, v.kind) for v in inspect_module(net, torch.randn(2, 4))]
        [('0.weight', 'no')]
        >>> net[0].bias = None
        >>> [(v.name, v.kind) for v in inspect_module(net, torch.randn(2, 4))]
        [('0.weight', 'layer')]
    """
    return _withdraw_by_function(
        module, inputs, loss, seed, _read_graph(module, inputs, loss, seed)
    )


def _read_graph(
    module: nn.Module, inputs: tuple[Any, ...], loss: Callable[[Any], Tensor] | None, seed: int
) -> list[Verdict]:
    search = ScaleInvarianceSearch(module)
    with _in_training_mode(module), torch.enable_grad(), search:
        torch.manual_seed(seed)
        output = module(*_copied(inputs))
        sums = [t.sum() for t in _tensors(output) if t.requires_grad]
        if loss is not None:
            search.analyze(loss(output))
        elif sums:
            search.analyze(torch.stack(sums).sum() if len(sums) > 1 else sums[0])
    return list(search.verdicts.values())


FUNCTION_LIMIT = 0.1


def _withdraw_by_function(
    module: nn.Module,
    inputs: tuple[Any, ...],
    loss: Callable[[Any], Tensor] | None,
    seed: int,
    verdicts: list[Verdict],
) -> list[Verdict]:
    """The verdicts without the claims that the function contradicts."""
    weights = {
        name: parameter for parameter, names in parameter_names(module).items() for name in names
    }
    claims = [v for v in verdicts if v.partition is not None]
    if not claims or not all(_is_whole(weights[v.name], v) for v in claims):
        return verdicts
    before = _outputs(module, inputs, loss, seed)

    def change(*tested: Verdict) -> float:
        # Powers of two, which no precision rounds, and upwards, which makes an ordinary epsilon
        # matter less and a large one show.
        generator = torch.Generator().manual_seed(seed)

        def factors(n: int) -> Tensor:
            exponents = torch.randint(
                1, 5, (n,), generator=generator, dtype=torch.long, device="cpu"
            )
            exponents[0] = 4
            return torch.exp2(exponents.double())

        scaled = [(weights[v.name], v.partition) for v in tested if v.partition is not None]
        return _largest_change(before, _outputs(module, inputs, loss, seed, scaled, factors))

    if not change() <= FUNCTION_LIMIT / 10:  # two runs of the same differ: nothing can be told
        return verdicts
    wrong = {}
    if not change(*claims) <= FUNCTION_LIMIT:
        wrong = {v.name: by for v in claims if not (by := change(v)) <= FUNCTION_LIMIT}
    return [
        v.withdrawn(
            f"the outputs change by {wrong[v.name]:.2g} of their size when it is multiplied by up "
            f"to 16",
            "function",
        )
        if v.name in wrong
        else replace(v, known="graph and function")
        if v.partition is not None
        else v
        for v in verdicts
    ]


@contextmanager
def _in_training_mode(module: nn.Module) -> Iterator[None]:
    """Training runs inside, which leave the module as it was."""
    with restored(module):
        # A module in training mode keeps the parts that it holds in evaluation mode.
        if not module.training:
            module.train()
        yield


def _outputs(
    module: nn.Module,
    inputs: tuple[Any, ...],
    loss: Callable[[Any], Tensor] | None,
    seed: int,
    scaled: Iterable[tuple[Tensor, Partition]] = (),
    factors: Callable[[int], Tensor] = torch.ones,
) -> list[Tensor]:
    """What the module gives in training mode when these weights are scaled; every call starts from,
    and leaves, the same state."""
    with (
        _in_training_mode(module),
        visible_graph(),
    ):  # also the same buffers: spectral_norm iterates in them
        with torch.no_grad():
            for weight, partition in scaled:
                weight.mul_(spread(partition, factors(partition.n), weight))
        torch.manual_seed(seed)
        torch.clear_autocast_cache()  # under autocast: casts of the weights as they were
        with torch.enable_grad():  # as in training: a gradient penalty needs it
            output = module(*_copied(inputs))
            tensors = list(_tensors(output))
            if loss is not None:
                tensors.append(loss(output))
            return [t.detach().clone() for t in tensors if t.is_floating_point()]


def _largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    return max((_change(a, b) for a, b in zip(before, after, strict=True)), default=0.0)


def _change(before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape:
        return math.inf
    scale = float(before.double().abs().max()) if before.numel() else 0.0
    change = float((before.double() - after.double()).abs().max()) if before.numel() else 0.0
    return math.inf if math.isnan(change) else change / scale if scale else change


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _copied(value: Any) -> Any:
    """Inputs that a forward may change in place."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_copied(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
