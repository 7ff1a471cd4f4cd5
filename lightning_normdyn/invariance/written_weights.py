"""Which weights a forward pass writes in place: those whose rows ``max_norm`` rescales, above all.

Such a weight has no length of its own that a rule could steer, and its graph does not show it,
since it is written without gradients. Torch counts every write to a tensor, and that is what is
compared here.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_normdyn.invariance.graph import Graph

_Versions = dict[str, tuple[Tensor, int]]
_LOOKUPS = ("EmbeddingBackward0", "EmbeddingBagBackward0")


class WrittenWeights:
    """Compares how often weights were written before and after a forward pass.

    Args:
        root: the network. Its own forward is not compared: a whole training step may run inside it,
            with the step of an optimizer, which writes, too. Instead, tables that are looked up are
            compared between the start of the batch and its first loss, where no optimizer steps.
        slots: for each module, under which key it keeps each of its own weights, and the weight's
            name. Read anew at every look.
    """

    def __init__(
        self,
        root: nn.Module,
        slots: Mapping[nn.Module, Sequence[tuple[str, str]]],
    ) -> None:
        self._root = root
        self._slots = slots
        self._running: dict[nn.Module, _Versions] = {}
        self._at_start: _Versions = {}
        self._writers: dict[str, str] = {}

    def start(self) -> None:
        """The next forward passes are watched."""
        self.stop()
        for owner in self._slots:
            self._at_start |= self._versions(owner)

    def enter(self, module: nn.Module) -> None:
        """A module's forward begins."""
        if module is not self._root:
            self._running[module] = self._versions(module)

    def leave(self, module: nn.Module) -> None:
        """A module's forward ends."""
        before = self._running.pop(module, {})
        if before:
            self._compare(before, self._versions(module), module)

    def see(self, graph: Graph) -> None:
        """A loss was computed: which of the tables that it looks up were written since the start?

        ``F.embedding(..., max_norm=...)`` in a training step is in no module's forward.
        """
        # Only lookups rescale rows in passing. Other weights may be written at the start of a
        # batch, by callbacks, and their length is still theirs.
        looked_up = {node.sources[0] for node in graph.nodes if node.name in _LOOKUPS}
        tables = {name for edge, name in graph.parameters.items() if edge in looked_up}
        if tables:
            for owner in self._slots:
                versions = self._versions(owner)
                after = {name: versions[name] for name in versions.keys() & tables}
                self._compare(self._at_start, after, self._root)
        # From here on a step of an optimizer may write the tables, too.
        self._at_start = {}

    def _compare(
        self,
        before: _Versions,
        after: _Versions,
        writer: nn.Module,
    ) -> None:
        for name, (weight, version) in after.items():
            # Another tensor under the same name (FSDP2) says nothing of writes.
            known = before.get(name)
            if known is not None and known[0] is weight and known[1] != version:
                self._writers.setdefault(name, type(writer).__name__)

    def forget(self, name: str) -> None:
        """Another weight is called so from now on."""
        self._writers.pop(name, None)

    def stop(self) -> None:
        """The forward passes are over: keep no weight alive."""
        self._running = {}
        self._at_start = {}

    def writer(self, name: str) -> str | None:
        """The class of the module whose forward pass writes this weight; None if none does."""
        return self._writers.get(name)

    def _versions(self, owner: nn.Module) -> _Versions:
        """How often each of a module's own weights was written so far."""
        versions: _Versions = {}
        for key, name in self._slots.get(owner, ()):
            weight = owner._parameters.get(key)
            # Views and emptied parameters are written by strategies that gather the weights.
            if weight is None or is_lazy(weight) or weight._is_view() or not weight.numel():
                continue
            versions[name] = (weight, weight._version)
        return versions
