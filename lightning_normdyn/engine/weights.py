"""The weights of the network during one fit: what they are called, who holds them, which shape they
have as a whole, and which of them come later."""

from collections.abc import Iterator, Mapping
from operator import is_
from typing import Any, NewType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.placement import check_weight, full_shape
from lightning_normdyn.invariance.names import parameter_names
from lightning_normdyn.invariance.verdict import is_gain
from lightning_normdyn.optimizers.group_numbers import HELD
from lightning_normdyn.optimizers.same_weights import SameWeights
from lightning_normdyn.optimizers.views import survey

from .flavours import LightningModule, Trainer

Names = tuple[str, ...]
Shape = tuple[int, ...]

Layout = NewType("Layout", object)
"""Stands for what the param groups of an optimizer hold, in their order: another object for
anything else that they hold later. Not the ids of the weights: the id of one that is gone may pass
on to another."""


class Weights:
    """Names, holders and shapes of all parameters, by identity.

    Args:
        trainer: of the fit.
        module: the LightningModule.

    Attributes:
        names: all names of each parameter; several where it is tied.
        holders: the modules that hold it; several where it is tied.
        shapes: of the whole parameter, wherever its parts lie.
        lazy: those that have no shape yet.
        layouts: by optimizer, its param groups when all their weights were known.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
    ) -> None:
        self._trainer, self.module = trainer, module
        self.names: dict[Tensor, Names] = {}
        self.shapes: dict[Tensor, Shape] = {}
        self.lazy: set[Tensor] = set()
        self.layouts: dict[int, Layout] = {}
        # Map parameters to names now, by identity: after a no-grad forward, FSDP2 exposes other
        # Parameter objects than the optimizer holds.
        self._add(parameter_names(module))

    def _add(self, new: Mapping[Tensor, Names]) -> None:
        self.names.update(new)
        # The strategy's model wraps the module, and what FSDP1 flattens is only seen from there.
        survey(self._trainer.strategy.model or self.module, self._trainer.optimizers)
        self.holders: dict[Tensor, list[nn.Module]] = {}
        for submodule in self.module.modules():
            for parameter in submodule.parameters(recurse=False):
                self.holders.setdefault(parameter, []).append(submodule)
        for weight in new:
            self.shapes[weight] = full_shape(weight)
            if is_lazy(weight):
                self.lazy.add(weight)
        # Before any step, and anew when weights come: their layers may be others now.
        self._gains = set(filter(self._has_single_numbers, self.names))

    def _has_single_numbers(self, weight: Tensor) -> bool:
        if weight in self.lazy or not self.is_matrix(weight):
            return False
        return is_gain(self.module, self.name(weight), self.shapes[weight])

    def name(self, weight: Tensor) -> str:
        """The first of its names, by which messages and log keys call it."""
        return self.names[weight][0]

    def by_name(self) -> dict[str, Tensor]:
        """Every name of every parameter."""
        return weights_by_name(self.names)

    def owned(self, optimizer: Optimizer) -> list[Tensor]:
        """Weights of two or more dimensions that ``optimizer`` holds, in its order."""
        return [p for p in held_by(optimizer) if p in self.names and self.is_matrix(p)]

    def is_matrix(self, weight: Tensor) -> bool:
        """Whether it has two dimensions or more: one of fewer is never a target."""
        # Of the whole: FSDP and DeepSpeed may flatten what this rank holds to one dimension.
        return len(self.shapes[weight]) >= 2

    def is_gain(self, weight: Tensor) -> bool:
        """Whether its rows are single numbers, such as the scales of a LayerScale."""
        return weight in self._gains

    def take_in(
        self,
        index: int,
        optimizer: Optimizer,
        layout: Layout,
        *,
        final: bool,
    ) -> dict[Tensor, Names]:
        """Map the weights of an optimizer that have come since the start of the fit: layers that
        grew, a head that was exchanged.

        Args:
            index: the number of the optimizer.
            optimizer: whose param groups may have changed.
            layout: of its param groups now.
            final: whether the module shows the optimizer's own parameters for certain, as it does
                when a step is due.

        Returns:
            The new weights and their names. Weights that had these names before are gone.
        """
        held, new = set(held_by(optimizer)), {}
        if not held <= self.names.keys():
            for weight, names in parameter_names(self.module).items():
                if weight in held and weight not in self.names:
                    new[weight] = names
        # FSDP2 may show other parameters in a forward pass: then ask again at the step.
        if final or held <= self.names.keys() | new.keys():
            self.layouts[index] = layout
        if new:
            self._take_names(set().union(*new.values()))
            self._add(new)
        return new

    def _take_names(self, taken: set[str]) -> None:
        """Weights that were called by these names have others left, or are gone."""
        for weight, names in list(self.names.items()):
            rest = tuple(name for name in names if name not in taken)
            if rest:
                self.names[weight] = rest
            else:
                del self.names[weight]


def weights_by_name(names: Mapping[Tensor, Names]) -> dict[str, Tensor]:
    """The inverse of `parameter_names`."""
    weights = {}
    for weight, its_names in names.items():
        for name in its_names:
            weights[name] = weight
    return weights


def held_by(optimizer: Optimizer) -> Iterator[Tensor]:
    """All parameters of an optimizer, in its order."""
    # One by one: usually the first that is asked has a gradient.
    for group in optimizer.param_groups:
        yield from group["params"]


class LayoutReader:
    """Reads the param groups of one optimizer by identity, at every batch and step: what it gives
    changes when a group joins, grows, or gets other weights.

    Attributes:
        latest: what was read last.

    Example:
        >>> reader, first = LayoutReader(), torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([first], lr=0.1)
        >>> before = reader.read(optimizer)
        >>> reader.read(optimizer) is before
        True
        >>> optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(2))
        >>> reader.read(optimizer) == before
        False
    """

    def __init__(self) -> None:
        self.latest = Layout(object())
        self._groups: list[Any] = []
        self._weights = SameWeights([])

    def read(self, optimizer: Optimizer) -> Layout:
        """The layout as it is now; the same object as before where nothing has changed."""
        groups = optimizer.param_groups
        held = list(map(HELD, groups))
        if not (self._weights.are_in(held) and all(map(is_, groups, self._groups))):
            self._groups, self._weights = list(groups), SameWeights(held)
            self.latest = Layout(object())
        return self.latest


def is_measurable(weight: Tensor) -> bool:
    """Whether sums can be taken over this weight and its gradient."""
    try:
        check_weight(weight, "weight")
    except NotSupportedError:
        return False
    return not has_sparse_gradient(weight)


def has_sparse_gradient(weight: Tensor) -> bool:
    """Whether the last backward pass left a sparse gradient."""
    return weight.grad is not None and weight.grad.layout != torch.strided
