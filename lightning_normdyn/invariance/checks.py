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

from .names import clean_name
from .search import ScaleInvarianceSearch
from .verdict import Verdict
from .visibility import restored, visible_graph


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
    """Test claims of scale invariance by what they mean.

    Every claimed vector is rescaled by its own random factor, and the outputs are compared. All
    factors are drawn from 2**U(-1, 1) and applied at once. Weights, buffers, random states and
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
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> report = verify_scale_invariance(net, torch.randn(16, 4))
        >>> bool(report), [claim.name for claim in report.claims]
        (True, ['0.weight'])
    """
    run = TrainingRun(module, inputs, loss, seed)
    found = run.verdicts() if verdicts is None else list(verdicts)
    # Only what claims something can be wrong.
    claims = tuple(claim for claim in found if claim.partition is not None)
    for claim in claims:
        weight = run.weights[claim.name]
        if not _is_whole(weight, claim):
            raise NotSupportedError(
                f"`{claim.name}` is sharded ({type(weight.data).__name__} of shape "
                f"{tuple(weight.shape)}, in full {claim.shape}), so its function cannot be "
                "compared here. Call verify_scale_invariance on the unwrapped module, on one "
                "process."
            )
    generator = torch.Generator().manual_seed(seed)

    def factors(n: int) -> Tensor:
        uniform = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")
        return torch.exp2(2 * uniform - 1)

    change = largest_change(run.outputs(), run.outputs(claims, factors))
    return InvarianceReport(change, claims, tolerance)


def _is_whole(weight: Tensor, verdict: Verdict) -> bool:
    return type(weight.data) is Tensor and weight.shape == verdict.shape


def spread(
    partition: Partition,
    values: Tensor,
    weight: Tensor,
) -> Tensor:
    """``(n,)`` values at every entry's vector, broadcastable to ``weight``.

    1 where an entry belongs to none.
    """
    # Label -1, of entries that belong to no vector, picks the 1 at the end.
    padded = torch.cat([values, values.new_ones(1)])
    of_labels = padded[partition.broadcastable(weight.ndim)]
    return of_labels.to(weight.device, weight.dtype)


def inspect_module(
    module: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, seed: int = 0
) -> list[Verdict]:
    """Say of every weight of two or more dimensions whether it is scale-invariant.

    The claims are read from the graph of one forward pass in training mode, and then held against
    the function: the outputs must stay what they are when all claimed vectors are multiplied by up
    to 16. A claim that changes them by more than a tenth (a large epsilon, a padding value, a
    detached copy) is withdrawn. The module is left as it was: weights, buffers, random states,
    training flags.

    Args:
        module: any module.
        inputs: arguments of its forward.
        loss: from the module's output to the training loss; without it the sum of the outputs
            stands for it.
        seed: of the forward pass.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> [(v.name, v.kind) for v in inspect_module(net, torch.randn(2, 4))]
        [('0.weight', 'no')]
        >>> net[0].bias = None
        >>> [(v.name, v.kind) for v in inspect_module(net, torch.randn(2, 4))]
        [('0.weight', 'layer')]
    """
    run = TrainingRun(module, inputs, loss, seed)
    return _withdraw_by_function(run, run.verdicts())


# A claim is withdrawn if the outputs change by more than this when it is rescaled.
FUNCTION_LIMIT = 0.1


def _withdraw_by_function(run: TrainingRun, verdicts: list[Verdict]) -> list[Verdict]:
    """The verdicts without the claims that the function contradicts."""
    claims = [verdict for verdict in verdicts if verdict.partition is not None]
    if not claims or not all(_is_whole(run.weights[claim.name], claim) for claim in claims):
        return verdicts
    before = run.outputs()

    def change_by(*tested: Verdict) -> float:
        generator = torch.Generator().manual_seed(run.seed)

        # Powers of two, which no precision rounds, and upwards, which makes an ordinary epsilon
        # matter less and a large one show.
        def factors(n: int) -> Tensor:
            exponents = torch.randint(
                1, 5, (n,), dtype=torch.double, device="cpu", generator=generator
            )
            # One is the largest, so that a weight of a single vector is tested as hard.
            exponents[0] = 4
            return torch.exp2(exponents)

        return largest_change(before, run.outputs(tested, factors))

    # "not <=": a change may be NaN, where outputs are infinite.
    if not change_by() <= FUNCTION_LIMIT / 10:
        # Two runs of the same differ: nothing can be told.
        return verdicts
    changes = {}
    if not change_by(*claims) <= FUNCTION_LIMIT:
        # Some claim is wrong: find out which.
        changes = {claim.name: change_by(claim) for claim in claims}
    judged = []
    for verdict in verdicts:
        change = changes.get(verdict.name, 0.0)
        if verdict.partition is None:
            judged.append(verdict)
        elif change <= FUNCTION_LIMIT:
            judged.append(replace(verdict, known="graph and function"))
        else:
            found = (
                f"the outputs change by {change:.2g} of their size "
                "when it is multiplied by up to 16"
            )
            judged.append(verdict.withdrawn(found, "function"))
    return judged


@dataclass(eq=False)
class TrainingRun:
    """Runs a module in training mode, every time from the same state, and leaves it as it was.

    Args:
        module: any module; if it is in training mode, parts that it holds in evaluation mode stay
            so.
        inputs: arguments of its forward.
        loss: from the module's output to the training loss; without it the sum of the outputs
            stands for it.
        seed: of every forward pass.

    Attributes:
        weights: the parameters, by each of their names.

    Example:
        >>> run = TrainingRun(nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5)), (torch.ones(8, 2),))
        >>> largest_change(run.outputs(), run.outputs())
        0.0
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    loss: Callable[[Any], Tensor] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        named = self.module.named_parameters(remove_duplicate=False)
        self.weights = {clean_name(name): parameter for name, parameter in named}

    def verdicts(self) -> list[Verdict]:
        """What the graph of its loss says of every weight."""
        search = ScaleInvarianceSearch(self.module)
        with self._training(), search:
            output = self.module(*_copied(self.inputs))
            sums = [t.sum() for t in _tensors(output) if t.requires_grad]
            if self.loss is not None:
                search.analyze(self.loss(output))
            elif len(sums) == 1:
                # Not a stack of one, which would be one more operation to follow.
                search.analyze(sums[0])
            elif sums:
                total = torch.stack(sums).sum()
                search.analyze(total)
        return list(search.verdicts.values())

    def outputs(
        self, scaled: Iterable[Verdict] = (), factors: Callable[[int], Tensor] = torch.ones
    ) -> list[Tensor]:
        """Outputs, and the loss if there is one, when the claimed vectors are scaled.

        Args:
            scaled: the claims whose vectors are.
            factors: gives ``(n,)`` factors for n vectors.
        """
        with self._training(), visible_graph():
            with torch.no_grad():
                for claim in scaled:
                    if claim.partition is not None:
                        weight = self.weights[claim.name]
                        weight.mul_(spread(claim.partition, factors(claim.partition.n), weight))
            # Under autocast: casts of the weights as they were.
            torch.clear_autocast_cache()
            output = self.module(*_copied(self.inputs))
            tensors = list(_tensors(output))
            if self.loss is not None:
                tensors.append(self.loss(output))
            return [t.detach().clone() for t in tensors if t.is_floating_point()]

    @contextmanager
    def _training(self) -> Iterator[None]:
        # Gradients: a penalty on them is a part of the forward. Buffers are put back as well, since
        # spectral_norm iterates in them.
        with restored(self.module), torch.enable_grad():
            if not self.module.training:
                self.module.train()
            torch.manual_seed(self.seed)
            yield


def largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest change of an entry of any tensor, beside the largest entry of that tensor."""
    changes = [_change(a, b) for a, b in zip(before, after, strict=True)]
    return max(changes, default=0.0)


def _change(before: Tensor, after: Tensor) -> float:
    # Where the shape of an output depends on the scale, the function does.
    if before.shape != after.shape:
        return math.inf
    if not before.numel():
        return 0.0
    before = before.double()
    change = float((before - after.double()).abs().max())
    # A NaN is neither more nor less than a limit: it would come out of `max` by chance.
    if math.isnan(change):
        return math.inf
    return change / (float(before.abs().max()) or 1.0)


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
        # A namedtuple takes its items one by one, a plain tuple all at once.
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    return value
