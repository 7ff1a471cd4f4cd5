"""Gathers input rows of layers while a model runs, without a forward pass of its own.

`InputGatherer` holds a forward hook on each layer. Whoever runs the model tells it when a batch
begins and ends; of what the layers are given in between, it adds up mean and covariance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normdyn.engine.value_checks import DAMAGE
from lightning_normdyn.errors import NormDynError, NotSupportedError
from lightning_normdyn.input_span.covariance import Covariance
from lightning_normdyn.input_span.rows import InputRows, row_shape, spread_rows
from lightning_normdyn.invariance.visibility import in_backward


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

    def load(self, state: Mapping[str, Any], names: Mapping[Tensor, str]) -> None:
        """Go on from what `state` gave.

        Raises:
            NormDynError: if it is damaged, or belongs to other layers.
        """
        try:
            self._load(state, names)
        except DAMAGE as error:
            raise NormDynError(f"{type(error).__name__}: {error}") from error

    def _load(self, state: Mapping[str, Any], names: Mapping[Tensor, str]) -> None:
        for weight, stream in self.streams.items():
            stream.load(state["sums"][names[weight]])
        self._generator.set_state(state["generator"])
        weights = {names[weight]: weight for weight in self.streams}
        self.batches = int(state["batches"])
        self.seen = Counter(_renamed(state["seen"], weights))
        self.thinned = {weights[name] for name in state["thinned"]}
        self._calls = Counter(_renamed(state["calls"], weights))

    def close(self) -> None:
        """Remove every hook; idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _look(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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

    def _take(self, weight: Tensor, rows: InputRows) -> None:
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


def _renamed(counts: Mapping[Any, int], names: Mapping[Any, Any]) -> dict[Any, int]:
    """Counts by other keys: ``names`` holds the new one of each."""
    # A plain dict and no Counter: what goes into a checkpoint is made of plain containers.
    return {names[key]: count for key, count in counts.items()}
