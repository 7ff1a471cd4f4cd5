"""Which weights' inputs can be looked at: those of linear layers and convolutions, and why not the
others."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lightning_normdyn.input_span.gather import InputGatherer
from lightning_normdyn.input_span.rows import (
    LAYERS,
    Shape,
    covariance_bytes,
    row_shape,
    share_filters,
    weight_shape,
)
from lightning_normdyn.invariance.visibility import compiled_parts

# Weights, and the layers that read each.
Readers = dict[Tensor, list[nn.Module]]

# Covariances held at once. Layers that do not fit together take turns.
BLOCK_BYTES = 2**31


class ReadableLayers:
    """The layers of a network that read a weight, by weight.

    Args:
        module: the network.
        shapes: full shapes of its weights.
        eagerly: whether compiled code will run eagerly when inputs are gathered. If not, it calls
            no hooks.

    Attributes:
        readers: the layers of each weight; of no weight that belongs to another kind of module.
        trial: what a pass that was tried has reached, if there was one.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 2))
        >>> layers = ReadableLayers(net, {p: tuple(p.shape) for p in net.parameters()})
        >>> layers.obstacle(net[0].weight) is None
        True
        >>> layers.obstacle(net[1].weight)
        'it is not the weight of a linear layer or a convolution, so it has no input rows'
    """

    def __init__(
        self, module: nn.Module, shapes: Mapping[Tensor, Shape], *, eagerly: bool = False
    ) -> None:
        self.readers: Readers = {}
        self.trial: InputGatherer | None = None
        self._compiled = set() if eagerly else compiled_parts(module)
        for layer in module.modules():
            if not isinstance(layer, LAYERS):
                continue
            # Also the parameters of its parametrizations: one of them has the weight's shape.
            for weight in layer.parameters():
                if shapes.get(weight) == weight_shape(layer):
                    self.readers.setdefault(weight, []).append(layer)

    def row_entries(self, weight: Tensor) -> int:
        """``d``, the entries of one filter."""
        # Of the first layer: those that share a weight have the same rows, or it is refused.
        return row_shape(self.readers[weight][0])[1]

    def obstacle(self, weight: Tensor) -> str | None:
        """Why the inputs of ``weight`` cannot be looked at; None if they can."""
        if weight not in self.readers:
            return (
                "it is not the weight of a linear layer or a convolution, so it has no input rows"
            )
        reason = self.standing_obstacle(weight)
        # What a layer shows by itself comes first: it holds whatever the model does.
        if reason is None and self.trial is not None:
            reason = self.trial.obstacles.get(weight)
            if not self.trial.seen[weight]:
                reason = "`forward` does not call the layer that it belongs to"
        return reason

    def standing_obstacle(self, weight: Tensor) -> str | None:
        """Why its layers cannot be measured, whatever a model does with them."""
        layers = self.readers[weight]
        if not share_filters(layers):
            kinds = " and ".join(dict.fromkeys(type(layer).__name__ for layer in layers))
            return f"it is shared by layers ({kinds}) that divide it into different filters"
        # All layers of a weight have rows of the same shape by now.
        need = covariance_bytes(layers[0])
        if need > BLOCK_BYTES:
            groups, entries = row_shape(layers[0])
            return (
                f"its rows of {entries} entries need {need / 2**30:.1f} GiB for {groups} "
                f"covariance(s), and at most {BLOCK_BYTES / 2**30:g} GiB are spent"
            )
        if not self._compiled.isdisjoint(layers):
            return (
                "its layer runs inside compiled code (torch.compile), which calls no hooks; pass "
                "dataloader=..., whose passes run eagerly"
            )
        return None

    def blocks(self, weights: Iterable[Tensor]) -> list[Readers]:
        """Weights, with their layers, whose covariances fit into memory together."""
        blocks: list[Readers] = [{}]
        held = 0
        for weight in weights:
            layers = self.readers[weight]
            need = covariance_bytes(layers[0])
            # An empty block would be a turn, and so an epoch, in which nothing is measured.
            if held + need > BLOCK_BYTES and blocks[-1]:
                blocks.append({})
                held = 0
            blocks[-1][weight] = layers
            held += need
        return blocks
