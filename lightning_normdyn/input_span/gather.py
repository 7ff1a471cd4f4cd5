"""Gathers input rows of linear layers and convolutions while a model runs, without a forward pass
of its own.

`ReadableLayers` says which weights' inputs can be looked at. `InputGatherer` holds a forward hook
on each layer. Whoever runs the model tells it when a batch begins and ends; of what the layers are
given in between, it adds up mean and covariance (`Covariance`), batch after batch and rank beside
rank.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normdyn.engine.value_checks import DAMAGE
from lightning_normdyn.errors import NormDynError, NotSupportedError
from lightning_normdyn.invariance.visibility import compiled_parts, in_backward

from .rows import (
    LAYERS,
    InputRows,
    Shape,
    covariance_bytes,
    row_shape,
    share_filters,
    spread_rows,
    weight_shape,
)

# ------------------------------------------------------------------------------------- which layers

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
        self,
        module: nn.Module,
        shapes: Mapping[Tensor, Shape],
        *,
        eagerly: bool = False,
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


# ------------------------------------------------------------------------------------- sums of rows


class Covariance:
    """Adds up mean and covariance of rows.

    Sums are of deviations from the mean so far (Chan, Golub and LeVeque 1983): a plain sum of
    squares would lose its digits where the mean is large.

    Args:
        groups: ``g``.
        entries: ``d``.
        device: where to add up.

    Attributes:
        count: rows so far.
        mean: ``(g, d)``.

    Example:
        >>> stream = Covariance(1, 2, torch.device("cpu"))
        >>> stream.add(torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]]))
        >>> stream.count, stream.mean.tolist(), stream.covariance().tolist()
        (2, [[2.0, 0.0]], [[[1.0, 0.0], [0.0, 0.0]]])
    """

    def __init__(
        self,
        groups: int,
        entries: int,
        device: torch.device,
    ) -> None:
        # Apple GPUs have no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.count = 0
        self.mean = torch.zeros(groups, entries, dtype=dtype, device=device)
        # The sum of (x - mean)(x - mean)^T.
        self._scatter = torch.zeros(groups, entries, entries, dtype=dtype, device=device)

    def add(self, rows: Tensor) -> None:
        """Take ``(r, g, d)`` rows in."""
        count = len(rows)
        # The mean of no rows would be NaN, and everything after it.
        if not count:
            return
        by_group = rows.to(self.mean).transpose(0, 1)
        mean = by_group.mean(1)
        total = self.count + count
        change = mean - self.mean
        deviations = by_group - mean[:, None]
        shift = change * sqrt(self.count * count / total)
        # The shift of the mean enters as one more row, so that the scatter, which may have hundreds
        # of MiB, is read and written once.
        self._add_products(torch.cat([deviations, shift[:, None]], dim=1))
        self.mean += change * (count / total)
        self.count = total

    def merge(self, all_reduce: Callable[[Tensor], Any]) -> None:
        """Complete over ranks.

        Args:
            all_reduce: sums a tensor over the ranks in place; every rank must call this.
        """
        own_mean = self.mean.clone()
        own_count = self.count
        # Mean and count in one message; the scatter only where any rank has rows.
        sum_of_rows = own_mean.flatten() * own_count
        own_rows = own_mean.new_tensor([float(own_count)])
        sums = torch.cat([sum_of_rows, own_rows])
        all_reduce(sums)
        self.count = int(sums[-1])
        if self.count:
            self.mean = (sums[:-1] / sums[-1]).view_as(own_mean)
            # Deviations from the common mean instead of this rank's own.
            deviation = own_mean - self.mean
            self._add_products((deviation * sqrt(own_count))[:, None])
            all_reduce(self._scatter)

    @property
    def nbytes(self) -> int:
        """What its state takes in a checkpoint."""
        return self.mean.nbytes + self._scatter.nbytes

    def state(self) -> dict[str, Any]:
        """What was gathered so far, on the host."""
        mean = self.mean.cpu().clone()
        scatter = self._scatter.cpu().clone()
        return {"count": self.count, "mean": mean, "scatter": scatter}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError: if it is of rows of another form.
        """
        mean = state["mean"]
        scatter = state["scatter"]
        if mean.shape != self.mean.shape or scatter.shape != self._scatter.shape:
            raise ValueError("the sums in the checkpoint belong to a layer of another form")
        if state["count"] < 0:
            raise ValueError("the sums in the checkpoint are of less than no row")
        self.mean.copy_(mean)
        self._scatter.copy_(scatter)
        self.count = int(state["count"])

    def covariance(self) -> Tensor:
        """``(g, d, d)``, divided by the number of rows; hands its own memory over."""
        # In place: for a second matrix of this size there may be no memory.
        return self._scatter.div_(max(1, self.count))

    def _add_products(self, rows: Tensor) -> None:
        self._scatter.baddbmm_(rows.mT, rows)


class InputGatherer:
    """Mean and covariance of the input rows of layers, spread over batches.

    Nothing is copied to the host, and no random number of the training is used. Compiled code calls
    no hooks, so nothing is gathered there.

    Args:
        readers: for each weight the layers that read it.
        device: where to add up.
        most: most rows to take for a weight.
        seed: of the choice of rows.

    Attributes:
        streams: what was gathered, by weight.
        obstacles: why the inputs of a weight could not be taken, in words.
        seen: in how many batches a weight was read.
        batches: how many batches there were.
        thinned: weights of whose rows some were left out.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> gatherer = InputGatherer({layer.weight: [layer]}, torch.device("cpu"), most=10, seed=0)
        >>> gatherer.begin_batch(1)
        >>> _ = layer(torch.ones(4, 2))
        >>> gatherer.end_batch()
        >>> gatherer.close()
        >>> gatherer.streams[layer.weight].count
        4
    """

    def __init__(
        self,
        readers: Mapping[Tensor, Sequence[nn.Module]],
        device: torch.device,
        *,
        most: int,
        seed: int,
    ) -> None:
        self.streams: dict[Tensor, Covariance] = {}
        self.obstacles: dict[Tensor, str] = {}
        self.seen: Counter[Tensor] = Counter()
        self.thinned: set[Tensor] = set()
        self.batches = 0
        self._most = most
        self._generator = torch.Generator(device).manual_seed(seed)
        self._batches_left: int | None = None
        # Calls of each weight's layers, in this batch and in the one before.
        self._calls: Counter[Tensor] = Counter()
        self._usual_calls: Counter[Tensor] = Counter()
        self._weights_of: dict[nn.Module, list[Tensor]] = {}
        for weight, layers in readers.items():
            self.streams[weight] = Covariance(*row_shape(layers[0]), device)
            for layer in layers:
                self._weights_of.setdefault(layer, []).append(weight)
        self._hooks = [
            layer.register_forward_pre_hook(self._look, with_kwargs=True)
            for layer in self._weights_of
        ]

    def begin_batch(self, batches_left: int) -> None:
        """Take rows from now on.

        Args:
            batches_left: this batch and those after it, over which the rows are to be spread.
        """
        self._batches_left = batches_left
        self._usual_calls, self._calls = self._calls, Counter()

    def end_batch(self) -> None:
        """Take no more rows until the next batch begins; idempotent."""
        if self._batches_left is not None:
            self._batches_left = None
            self.batches += 1
            # By keys: a layer that is called twice in a batch was seen in one batch.
            self.seen.update(self._calls.keys())

    def state(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """What was gathered so far, for a checkpoint; a batch that is running counts as ended.

        Args:
            names: of the weights.
        """
        seen = Counter(self.seen)
        batches = self.batches
        if self._batches_left is not None:
            batches += 1
            seen.update(self._calls.keys())
        return {
            "batches": batches,
            "seen": _renamed(seen, names),
            "thinned": [names[weight] for weight in self.thinned],
            "calls": _renamed(self._calls, names),
            "generator": self._generator.get_state(),
            "sums": {names[weight]: stream.state() for weight, stream in self.streams.items()},
        }

    def load(
        self,
        state: Mapping[str, Any],
        names: Mapping[Tensor, str],
    ) -> None:
        """Go on from what `state` gave.

        Raises:
            NormDynError: if it is damaged, or belongs to other layers.
        """
        weights = {names[weight]: weight for weight in self.streams}
        try:
            for name, weight in weights.items():
                self.streams[weight].load(state["sums"][name])
            self._generator.set_state(state["generator"])
            self.batches = int(state["batches"])
            self.seen = Counter(_renamed(state["seen"], weights))
            self.thinned = {weights[name] for name in state["thinned"]}
            self._calls = Counter(_renamed(state["calls"], weights))
        except DAMAGE as error:
            raise NormDynError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Remove every hook; idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _look(
        self,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        # A compiler would trace what follows into the graph of the layer.
        if torch.compiler.is_compiling():
            return
        # In the backward pass, a checkpoint computes its forward again, on inputs seen already.
        if self._batches_left is None or in_backward():
            return
        # Linear layers and convolutions call their only argument so.
        x = args[0] if args else kwargs.get("input")
        for weight in self._weights_of[layer]:
            self._calls[weight] += 1
            try:
                rows = InputRows(layer, x)
            except NotSupportedError as error:
                # A training step must not fail because somebody watches it.
                self.obstacles[weight] = str(error)
                continue
            self._take(weight, rows)

    def _take(
        self,
        weight: Tensor,
        rows: InputRows,
    ) -> None:
        stream = self.streams[weight]
        quota = self._quota(weight)
        if quota < rows.count:
            self.thinned.add(weight)
        if not quota:
            return
        # On the device, and from a generator of its own: numbers made on the host would have to be
        # waited for, and those of the training are not ours.
        quantiles = torch.rand(
            min(quota, rows.count),
            generator=self._generator,
            dtype=stream.mean.dtype,
            device=stream.mean.device,
        )
        chosen = spread_rows(rows.count, quantiles)
        for portion in chosen.split(rows.at_once):  # type: ignore[no-untyped-call]
            stream.add(rows.take(portion))

    def _quota(self, weight: Tensor) -> int:
        """How many rows this call may take, so that later ones get as many."""
        left = self._most - self.streams[weight].count
        assert self._batches_left is not None
        # How often the layers will be called in this batch is not known yet: expect as often as in
        # the one before.
        calls = self._batches_left * max(1, self._usual_calls[weight])
        # At least one row while any are left: rounded down, a small quota would take none at all.
        return min(left, max(1, left // calls))


def _renamed(
    counts: Mapping[Any, int],
    names: Mapping[Any, Any],
) -> dict[Any, int]:
    """Counts by other keys: ``names`` holds the new one of each."""
    # A plain dict and no Counter: what goes into a checkpoint is made of plain containers.
    return {names[key]: count for key, count in counts.items()}
