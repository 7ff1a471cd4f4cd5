"""Which entries of a weight the loss reads: a mask that the network puts on a weight hides the
others.

A masked autoencoder, a masked convolution and torch's pruning all compute with ``weight * mask``.
The hidden entries still exist, they are initialized and they decay, but the loss never sees them.
So they must not count as length: the norm, the angle of a step and the cosine with the gradient are
those of the entries that are read.

Recognized where the mask is put on the weight itself (also behind copies, casts, views and
permutations of it): a product with a constant, ``where``, ``masked_fill``, ``tril`` and ``triu``.
Any other operation reads all entries that reach it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_normdyn.geometry.partition import indices

from .flow import Flow, Shape
from .graph import Edge, Graph, GraphNode
from .rows import Rows
from .rules.elementwise import negated, unchanged
from .rules.operation import RULES, Operation
from .rules.views import permute, transpose, view

# Stands in a map of entries where a constant has replaced the weight's entry.
NO_ENTRY = -1

# --------------------------------------------------------------------------------------- one graph


@dataclass(frozen=True)
class EntryMask:
    """The entries of one weight that one or more losses read.

    Args:
        read: bool, of the weight's shape, on the CPU: whether the loss reads an entry.
        sources: memory addresses of the tensors that hide entries, to find out whose buffers they
            are; 0 for ``tril`` and ``triu``, which need no tensor.
    """

    read: Tensor
    sources: frozenset[int] = frozenset()

    def joined(self, other: EntryMask) -> EntryMask:
        """What is read by one of two losses."""
        return EntryMask(self.read | other.read, self.sources | other.sources)


def masked_weights(graph: Graph) -> dict[str, EntryMask]:
    """The weights of which ``graph`` does not read all entries.

    Args:
        graph: from `lightning_normdyn.invariance.graph.trace`.

    Returns:
        For each such weight, by its name, what is read of it. A weight whose mask cannot be seen
        (its tensor would have to be computed again by a checkpoint) is left out: all its entries
        count.

    Example:
        >>> from lightning_normdyn.invariance.graph import trace
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> edge = torch.autograd.graph.get_gradient_edge(weight)
        >>> names = {(edge.node, edge.output_nr): "weight"}
        >>> graph = trace((weight * mask).sum(), names, lambda node: ("", None))
        >>> masked_weights(graph)["weight"].read.tolist()
        [[True, False], [True, True]]
    """
    # In most networks nothing puts a constant in the place of entries: the rest would be in vain.
    if not any(
        node.name in _HIDING or (node.name == "MulBackward0" and None in node.sources)
        for node in graph.nodes
    ):
        return {}
    uses = _Uses(graph)
    masks: dict[str, EntryMask] = {}
    read_whole = set()
    for edge, shape in graph.shapes.items():
        if len(shape) < 2:
            continue
        name = graph.parameters[edge]
        mask = uses.mask(edge, shape)
        if mask is None:
            read_whole.add(name)
        # A use that is switched off by a factor of 0 says nothing of which entries another one
        # reads.
        elif bool(mask.read.any()):
            masks[name] = masks[name].joined(mask) if name in masks else mask
    read_whole |= {name for name, mask in masks.items() if bool(mask.read.all())}
    return {name: mask for name, mask in masks.items() if name not in read_whole}


class _Uses:
    """Follows the uses of a weight until an operation reads its numbers."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        # For each output of an operation the operations that read it, and as which of their inputs.
        self._readers: dict[Edge, list[tuple[GraphNode, int]]] = {}
        for node in graph.nodes:
            for slot, source in enumerate(node.sources):
                if source is not None:
                    self._readers.setdefault(source, []).append((node, slot))

    def mask(
        self,
        edge: Edge,
        shape: Shape,
    ) -> EntryMask | None:
        """What is read of this weight; None: all entries."""
        # Nearly all weights meet no mask, and a map of the entries of a large one would take eight
        # bytes for each.
        if not self._meets_a_mask(edge):
            return None
        read = torch.zeros(math.prod(shape), dtype=torch.bool, device="cpu")
        sources = set()
        stack = [(edge, indices(read.numel()).reshape(shape))]
        while stack:
            edge, entries = stack.pop()
            for operation, slot, out in self._readers_of(edge):
                if _passes_on(operation.name):
                    stack.append((out, _rearranged(operation, entries)))
                    continue
                hidden = _hidden(operation, slot)
                left = hidden and _without(entries, hidden[0], operation.out)
                if hidden is None or left is None:
                    # What hides nothing reads everything that has come so far.
                    read[entries[entries != NO_ENTRY]] = True
                else:
                    sources.add(hidden[1])
                    stack.append((out, left))
        return EntryMask(read.reshape(shape), frozenset(sources))

    def _meets_a_mask(self, edge: Edge) -> bool:
        stack = [edge]
        while stack:
            for operation, slot, out in self._readers_of(stack.pop()):
                if not _passes_on(operation.name):
                    hidden = _hidden(operation, slot)
                    if hidden is None:
                        continue
                    if bool(hidden[0].any()):
                        return True
                stack.append(out)
        return False

    def _readers_of(self, edge: Edge) -> Iterator[tuple[Operation, int, Edge]]:
        """The operations that read a tensor, as which input, and the output that goes on from
        there."""
        for node, slot in self._readers.get(edge, []):
            # An operation with several outputs that only passes tensors on has one for each input.
            out = slot if len(node.outputs) > 1 else 0
            yield Operation(**vars(node), rows=Rows(0), graph=self._graph), slot, (node.node, out)


def _without(
    entries: Tensor,
    hidden: Tensor,
    shape: Shape,
) -> Tensor | None:
    """The map of entries after a mask; None where the two do not fit (a rank's part of a mask
    beside a whole weight)."""
    try:
        # Both are broadcast to the result, as the operation does it.
        return torch.where(hidden.expand(shape), NO_ENTRY, entries.expand(shape))
    except RuntimeError:
        return None


# Their rules say where entries go, and nothing else happens to these.
_REARRANGING = (view, permute, transpose)


def _passes_on(name: str) -> bool:
    """Whether operations of this name move all entries on, and read none."""
    return RULES.get(name) in (*_REARRANGING, unchanged, negated)


def _rearranged(operation: Operation, entries: Tensor) -> Tensor:
    rule = RULES[operation.name]
    if rule not in _REARRANGING:
        return entries
    moved = rule(operation, [Flow(1, entries)])
    assert isinstance(moved, Flow)
    # Where nothing differs, a rule leaves one row for all.
    return moved.rows.expand(operation.out)


_HIDING = (
    "WhereBackward0",
    "MaskedFillBackward0",
    "MaskedFillBackward1",
    "TrilBackward0",
    "TriuBackward0",
)


def _hidden(operation: Operation, slot: int) -> tuple[Tensor, int] | None:
    """Where this operation puts a constant in the place of input ``slot``: a bool tensor, and the
    address of the mask.

    None: it hides nothing, or nobody can see what it hides.
    """
    name = operation.name
    if name in ("TrilBackward0", "TriuBackward0"):
        return _outside_triangle(operation), 0
    # Only a constant factor can be a mask.
    if name == "MulBackward0" and operation.source(1 - slot) is None:
        saved = ("other", "self")[slot]
    elif name == "WhereBackward0":
        saved = "condition"
    elif name in ("MaskedFillBackward0", "MaskedFillBackward1") and slot == 0:
        saved = "mask"
    else:
        return None
    _, mask = operation.saved_tensor(saved)
    # No subclass: a DTensor, say, would have to be gathered.
    if type(mask) not in (Tensor, nn.Parameter, nn.Buffer):
        return None
    hidden: Tensor = mask
    if name == "MulBackward0":
        hidden = mask == 0
    elif name == "WhereBackward0" and slot == 0:
        hidden = ~mask
    return hidden.cpu(), mask.data_ptr()


def _outside_triangle(operation: Operation) -> Tensor:
    ones = torch.ones(operation.out, dtype=torch.bool, device="cpu")
    cut = torch.tril if operation.name.startswith("Tril") else torch.triu
    return ~cut(ones, operation.attribute("diagonal", 0))


# --------------------------------------------------------------------------------- several batches

# A mask that is drawn anew would ask for a look in every batch.
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
    triangle. One that is computed in the forward pass counts once two batches have shown the same.
    A mask that is drawn anew in every step (DropConnect) hides no entry for long, so all of them
    count.

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._owners = [owner for owner in module.modules() if _owns_a_matrix(owner)]
        # Their own dictionaries, which are looked at in every batch.
        self._buffers_of_owners = [owner._buffers for owner in self._owners]
        self._known: dict[str, _Known] = {}
        # Some loss reads all entries of these.
        self._whole: set[str] = set()
        # Where the masks lie that have been seen.
        self._buffers: list[tuple[nn.Module, str]] = []
        self._batch = 0
        self._extra_looks = 0
        self._state = self._masking_state()

    def begin(self) -> None:
        """A batch begins that will be looked at."""
        self._batch += 1
        state = self._masking_state()
        if state != self._state:
            # Somebody has pruned: what was seen before says nothing about the masks of now.
            self._known, self._whole, self._extra_looks = {}, set(), 0
            self._state = state
        # This batch is looked at for the sake of such a mask.
        if self._some_seen_once():
            self._extra_looks += 1

    def see(self, graph: Graph) -> None:
        """Take in a loss of this batch."""
        masks = masked_weights(graph)
        names = {graph.parameters[edge] for edge in graph.shapes}
        self._whole |= names - masks.keys()
        for name in self._whole:
            self._known.pop(name, None)
            masks.pop(name, None)
        if not masks:
            return
        # By address: the mask in the graph may be a view of the buffer.
        held = self._addresses()
        for name, mask in masks.items():
            self._take_in(name, mask, mask.sources <= held)
        self._state = self._masking_state()

    def _take_in(
        self,
        name: str,
        mask: EntryMask,
        is_held: bool,
    ) -> None:
        known = self._known.get(name)
        if known is None:
            self._known[name] = _Known(mask, self._batch, 1, is_held)
        elif known.batch == self._batch:
            # A second loss of the same batch.
            known.mask = known.mask.joined(mask)
        else:
            # A mask that was held or seen twice lasts only as long as every batch shows the same.
            is_same = torch.equal(known.mask.read, mask.read)
            known.lasts = is_same and (known.lasts or known.looks == 1)
            known.mask = mask
            known.batch = self._batch
            known.looks += 1

    def read(self, name: str) -> Tensor | None:
        """Which entries of a weight the losses read: bool, of its shape; None: all."""
        known = self._known.get(name)
        if known is not None and known.lasts:
            return known.mask.read
        return None

    @property
    def wants_a_look(self) -> bool:
        """Whether the next batch should be looked at: a mask was seen only once, or somebody has
        pruned since."""
        if self._state != self._masking_state():
            return True
        # Most networks have no masks.
        if not self._known:
            return False
        return self._some_seen_once() and self._extra_looks < MOST_EXTRA_LOOKS

    def _some_seen_once(self) -> bool:
        return any(known.looks == 1 for known in self._known.values())

    def _addresses(self) -> set[int]:
        """Of all tensors that the network keeps; remembers which buffers are masks of weights."""
        self._buffers = []
        for owner in self._owners:
            for name, buffer in owner._buffers.items():
                if buffer is not None and buffer.ndim >= 2:
                    self._buffers.append((owner, name))
        tensors = [*self._module.buffers(), *self._module.parameters()]
        # 0 is the address of triangles, which need no tensor.
        return {0, *(tensor.data_ptr() for tensor in tensors)}

    def _masking_state(self) -> list[object]:
        """What changes when weights are pruned: torch's pruning adds a buffer to the layer, and
        replaces or writes it."""
        # Asked in every batch. The hook that pruning adds comes and goes with the buffer.
        state: list[object] = list(map(len, self._buffers_of_owners))
        for owner, name in self._buffers:
            buffer = owner._buffers.get(name)
            if buffer is not None:
                state.append((id(buffer), buffer._version))
        return state


def _owns_a_matrix(module: nn.Module) -> bool:
    return any(p is not None and p.ndim >= 2 for p in module._parameters.values())
