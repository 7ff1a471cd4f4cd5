"""Which entries of a weight the loss reads: a mask that the network puts on a weight hides the
others.

A masked autoencoder, a masked convolution and torch's pruning all compute with ``weight * mask``.
The hidden entries still exist, they are
initialized and they decay, but the loss never sees them. So they must not count as length: the
norm, the angle of a step and the cosine
with the gradient are those of the entries that are read.

Recognized where the mask is put on the weight itself (also behind copies, casts, views and
permutations of it): a product with a constant,
``where``, ``masked_fill``, ``tril`` and ``triu``. Any other operation reads all entries that reach
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from lightning_normdyn.invariance.flow import Shape
from lightning_normdyn.invariance.graph import Graph
from lightning_normdyn.invariance.nodes import Edge, GraphNode
from lightning_normdyn.invariance.rows import Rows
from lightning_normdyn.invariance.rules import Operation
from lightning_normdyn.invariance.rules.elementwise import negated, unchanged
from lightning_normdyn.invariance.rules.registry import RULES

NO_ENTRY = -1
"""Stands in a map of entries where a constant has replaced the weight's entry."""


@dataclass(frozen=True)
class EntryMask:
    """The entries of one weight that one or more losses read.

    Args:
        read: bool, of the weight's shape, on the CPU: whether the loss reads an entry.
        sources: memory addresses of the tensors that hide entries, to find out whose buffers they
            are; 0 for ``tril`` and ``triu``,
            which need no tensor.
    """

    read: Tensor
    sources: frozenset[int] = frozenset()

    def joined(self, other: EntryMask) -> EntryMask:
        """What is read by one of two losses."""
        return EntryMask(self.read | other.read, self.sources | other.sources)

    def same_as(self, other: EntryMask) -> bool:
        """Whether both read the same entries."""
        return torch.equal(self.read, other.read)


def masked_weights(graph: Graph) -> dict[str, EntryMask]:
    """The weights of which ``graph`` does not read all entries.

    Args:
        graph: from `lightning_normdyn.invariance.graph.trace`.

    Returns:
        For each such weight, by its name, what is read of it. A weight whose mask cannot be seen
        (its tensor would have to be computed
        again by a checkpoint) is left out: all its entries count.

    Example:
        >>> from lightning_normdyn.invariance.graph import trace
        >>> weight, mask = torch.nn.Parameter(torch.ones(2, 2)), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> edge = torch.autograd.graph.get_gradient_edge(weight)
        >>> graph = trace((weight * mask).sum(), {(edge.node, edge.output_nr): "weight"}, lambda node: ("", None))
        >>> masked_weights(graph)["weight"].read.tolist()
        [[True, False], [True, True]]
    """
    if not any(_can_hide(step) for step in graph.nodes):
        return {}
    readers = _readers(graph)
    masks: dict[str, EntryMask] = {}
    whole: set[str] = set()  # all entries of these are read by some use
    for edge, name in graph.parameters.items():
        shape = graph.shapes.get(edge)
        if shape is None or len(shape) < 2:
            continue
        found = _Reading(graph, readers).of(edge, shape)
        if found is not None and not bool(found.read.any()):
            # a use that is switched off by a factor of 0 says nothing of which entries another one
            # reads
            continue
        if found is None:
            whole.add(name)
        else:
            masks[name] = masks[name].joined(found) if name in masks else found
    return {
        name: mask
        for name, mask in masks.items()
        if name not in whole and not bool(mask.read.all())
    }


def _readers(graph: Graph) -> dict[Edge, list[tuple[GraphNode, int]]]:
    """For each output of an operation the operations that read it, and as which of their inputs."""
    readers: dict[Edge, list[tuple[GraphNode, int]]] = {}
    for step in graph.nodes:
        for slot, source in enumerate(step.sources):
            if source is not None:
                readers.setdefault(source, []).append((step, slot))
    return readers


class _Reading:
    """Follows one use of a weight until an operation reads its numbers."""

    def __init__(self, graph: Graph, readers: dict[Edge, list[tuple[GraphNode, int]]]) -> None:
        self._graph, self._readers = graph, readers

    def of(self, edge: Edge, shape: Shape) -> EntryMask | None:
        """What this use reads; None: all entries."""
        # Nearly all weights meet no mask, and a map of the entries of a large one would take eight
        # bytes for each.
        if not self._meets_a_mask(edge):
            return None
        read = torch.zeros(math.prod(shape), dtype=torch.bool, device="cpu")
        sources: set[int] = set()
        entries = torch.arange(read.numel(), dtype=torch.long, device="cpu").reshape(shape)
        stack = [(edge, entries)]
        while stack:
            edge, entries = stack.pop()
            for step, slot in self._readers.get(edge, []):
                operation = Operation(step, Rows(0), self._graph)
                if _passes_on(step):
                    stack.append(
                        ((step.node, _output_of(step, slot)), _rearranged(operation, entries))
                    )
                    continue
                hidden = _hidden(operation, slot)
                left = None if hidden is None else _without(entries, hidden[0], step.outputs[0])
                if left is None or hidden is None:
                    read[entries[entries >= 0]] = True
                    continue
                sources.add(hidden[1])
                stack.append(((step.node, 0), left))
        return EntryMask(read.reshape(shape), frozenset(sources))

    def _meets_a_mask(self, edge: Edge) -> bool:
        stack = [edge]
        while stack:
            for step, slot in self._readers.get(stack.pop(), []):
                if _passes_on(step):
                    stack.append((step.node, _output_of(step, slot)))
                    continue
                hidden = _hidden(Operation(step, Rows(0), self._graph), slot)
                if hidden is None:
                    continue
                if bool(hidden[0].any()):
                    return True
                stack.append((step.node, 0))
        return False


def _without(entries: Tensor, hidden: Tensor, shape: Shape) -> Tensor | None:
    """The map of entries after a mask; None where the two do not fit (a rank's part of a mask
    beside a whole weight)."""
    try:
        return torch.where(hidden.expand(shape), NO_ENTRY, entries.expand(shape))
    except RuntimeError:
        return None


def _output_of(step: GraphNode, slot: int) -> int:
    """Which output of an operation that only passes tensors on is its input ``slot``."""
    return slot if len(step.outputs) > 1 else 0


def _rearranged(operation: Operation, entries: Tensor) -> Tensor:
    move = _MOVES.get(operation.name)
    return entries if move is None else move(operation, entries)


def _transposed(operation: Operation, entries: Tensor) -> Tensor:
    return entries.transpose(operation.attribute("dim0"), operation.attribute("dim1"))


def _reshaped(operation: Operation, entries: Tensor) -> Tensor:
    return entries.reshape(operation.outputs[0])


_MOVES: dict[str, Callable[[Operation, Tensor], Tensor]] = {
    "TBackward0": lambda operation, entries: entries.t(),
    "TransposeBackward0": _transposed,
    "PermuteBackward0": lambda operation, entries: entries.permute(operation.attribute("dims")),
    **dict.fromkeys(
        (
            "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1",
            "SqueezeBackward2", "SqueezeBackward3",
        ),
        _reshaped,
    ),
}  # fmt: skip


def _passes_on(step: GraphNode) -> bool:
    return step.name in _MOVES or RULES.get(step.name) in (unchanged, negated)


_HIDING = (
    "WhereBackward0",
    "MaskedFillBackward0",
    "MaskedFillBackward1",
    "TrilBackward0",
    "TriuBackward0",
)


def _can_hide(step: GraphNode) -> bool:
    """Whether this operation may put a constant in the place of entries; in most networks no
    operation does."""
    return step.name in _HIDING or (step.name == "MulBackward0" and None in step.sources)


def _hidden(operation: Operation, slot: int) -> tuple[Tensor, int] | None:
    """Where this operation puts a constant in the place of input ``slot``: a bool tensor, and the
    address of the mask.

    None: it hides nothing, or nobody can see what it hides.
    """
    name = operation.name
    if name in ("TrilBackward0", "TriuBackward0"):
        ones = torch.ones(operation.outputs[0], dtype=torch.bool, device="cpu")
        diagonal = operation.attribute("diagonal", 0)
        kept = ones.tril(diagonal) if name.startswith("Tril") else ones.triu(diagonal)
        return ~kept, 0
    if name == "MulBackward0":
        if operation.inputs[1 - slot : 2 - slot] not in ((), (None,)):
            return None  # the other factor is no constant
        saved = _saved(operation, "other" if slot == 0 else "self")
        return None if saved is None else ((saved == 0).cpu(), saved.data_ptr())
    if name == "WhereBackward0":
        saved = _saved(operation, "condition")
        if saved is None:
            return None
        return (~saved if slot == 0 else saved).cpu(), saved.data_ptr()
    if name in ("MaskedFillBackward0", "MaskedFillBackward1") and slot == 0:
        saved = _saved(operation, "mask")
        return None if saved is None else (saved.cpu(), saved.data_ptr())
    return None


def _saved(operation: Operation, name: str) -> Tensor | None:
    readable, value = operation.saved_tensor(name)
    return value if readable and type(value) in (Tensor, nn.Parameter, nn.Buffer) else None


MOST_EXTRA_LOOKS = 8


@dataclass
class _Known:
    """What is known about the mask of one weight.

    Args:
        mask: as it was seen last.
        batch: the number of the batch in which it was seen last.
        looks: how many batches have shown it.
        lasts: whether it is the same in every step, so that it may be relied on.
    """

    mask: EntryMask
    batch: int
    looks: int
    lasts: bool


class MaskMemory:
    """What is known about the masks of a network from the losses seen so far, and when to look
    again.

    A mask counts at once if it is a buffer or a parameter of the network, or the shape of a
    triangle. One that is computed in the forward
    pass counts once two batches have shown the same. A mask that is drawn anew in every step
    (DropConnect) hides no entry for long, so all
    of them count.

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._owners = [
            m
            for m in module.modules()
            if any(p.ndim >= 2 for p in m._parameters.values() if p is not None)
        ]
        self._known: dict[str, _Known] = {}
        self._whole: set[str] = set()  # some loss reads all of these
        self._buffers: list[tuple[nn.Module, str]] = []  # where the masks lie that have been seen
        self._batch = 0
        self._extra_looks = 0
        self._state = self._masking_state()

    def begin(self) -> None:
        """A batch begins that will be looked at."""
        self._batch += 1
        state = self._masking_state()
        if (
            state != self._state
        ):  # somebody has pruned: what was seen before says nothing about the masks of now
            self._known, self._whole, self._extra_looks = {}, set(), 0
            self._state = state
        if any(known.looks == 1 for known in self._known.values()):
            self._extra_looks += 1

    def see(self, graph: Graph) -> None:
        """Take in a loss of this batch."""
        masks = masked_weights(graph)
        names = {name for edge, name in graph.parameters.items() if edge in graph.shapes}
        self._whole |= names - masks.keys()
        for name in self._whole:
            self._known.pop(name, None)
            masks.pop(name, None)
        if not masks:
            return
        held = self._addresses()
        for name, mask in masks.items():
            self._take_in(name, mask, mask.sources <= held)
        self._state = self._masking_state()

    def _take_in(self, name: str, mask: EntryMask, is_held: bool) -> None:
        known = self._known.get(name)
        if known is None:
            self._known[name] = _Known(mask, self._batch, 1, is_held)
        elif known.batch == self._batch:
            known.mask = known.mask.joined(mask)  # a second loss of the same batch
        else:
            unchanged_since = known.mask.same_as(mask)
            known.lasts = unchanged_since and (known.lasts or known.looks == 1)
            known.mask, known.batch, known.looks = mask, self._batch, known.looks + 1

    def read(self, name: str) -> Tensor | None:
        """Which entries of a weight the losses read: bool, of its shape; None: all."""
        known = self._known.get(name)
        return known.mask.read if known is not None and known.lasts else None

    @property
    def wants_a_look(self) -> bool:
        """Whether the next batch should be looked at: a mask was seen only once, or somebody has
        pruned since."""
        if self._state != self._masking_state():
            return True
        seen_once = any(known.looks == 1 for known in self._known.values())
        return seen_once and self._extra_looks < MOST_EXTRA_LOOKS

    def _addresses(self) -> set[int]:
        """Of all tensors that the network keeps; remembers which buffers are masks of weights."""
        self._buffers = [
            (owner, name)
            for owner in self._owners
            for name, buffer in owner._buffers.items()
            if buffer is not None and buffer.ndim >= 2
        ]
        tensors = [*self._module.buffers(), *self._module.parameters()]
        return {0, *(tensor.data_ptr() for tensor in tensors)}

    def _masking_state(self) -> tuple[object, ...]:
        """What changes when weights are pruned: torch's pruning adds a hook and a buffer to the
        layer, and replaces or writes that."""
        # Only hooks of pruning: the search adds hooks of its own while it watches a batch.
        hooks = [
            (
                sum(
                    isinstance(hook, BasePruningMethod)
                    for hook in owner._forward_pre_hooks.values()
                ),
                len(owner._buffers),
            )
            for owner in self._owners
        ]
        masks = [
            (id(b), b._version)
            for owner, name in self._buffers
            if (b := owner._buffers.get(name)) is not None
        ]
        return (*hooks, *masks)


__all__ = ["EntryMask", "MaskMemory", "masked_weights"]
