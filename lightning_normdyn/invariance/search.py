"""Which weights are scale-invariant, read from the autograd graph of a real training loss.

A weight that a forward pass writes in place, such as one whose rows ``max_norm`` rescales, has no
length of its own that a rule could steer. Its graph does not show it, since it is written without
gradients. Torch counts every write to a tensor, and that is what is compared here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.reduction import of_all_ranks, world_size

from .candidates import Candidate, Known, judge
from .entry_masks import MaskMemory
from .flow import Shape
from .follow import follow
from .graph import Edge, Graph, ModuleSpans, trace
from .graph_state import Normalizations
from .hooks import take_off
from .names import clean_name, parameter_names
from .verdict import Verdict, filter_partition
from .visibility import in_backward, visible_graph

# ------------------------------------------------------------------------- weights that are written

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

    Attributes:
        writers: by name of a weight the class of the module whose forward pass writes it.
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
        self.writers: dict[str, str] = {}

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
                self.writers.setdefault(name, type(writer).__name__)

    def stop(self) -> None:
        """The forward passes are over: keep no weight alive."""
        self._running = {}
        self._at_start = {}

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


# --------------------------------------------------------------------------------------- the search


class ScaleInvarianceSearch:
    """Finds the scale-invariant weights of a module from the graph of its training losses.

    Call ``watch()`` before a forward pass, ``analyze(loss)`` right before each backward, and
    ``close()`` once that backward is over: a checkpoint computes its forward again in the backward,
    and must find things as they were.

    ``verdicts`` then holds a `Verdict` for each weight, by its first name. Several losses are
    combined: a vector is scale-invariant if it is in all of them that read it. Weights that no loss
    contained stay ``"unknown"``, and rows that none has read (`Verdict.unread`) belong to no
    vector; watch a later batch for them. When normalizations were switched between training and
    evaluation in between, everything is judged afresh.

    Args:
        module: any module; made before a strategy has shown sharded or temporary parameters, e.g.
            in ``on_fit_start``.

    Example:
        >>> layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)
        >>> net = nn.Sequential(*layers)
        >>> with ScaleInvarianceSearch(net) as search:
        ...     search.analyze(net(torch.randn(8, 1, 4, 4)).square().sum())
        >>> search.verdicts["0.weight"].kind, search.verdicts["0.weight"].norms
        ('filter', ('1',))
        >>> search.verdicts["3.weight"].kind
        'no'
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.verdicts: dict[str, Verdict] = {}
        self.masks = MaskMemory(module)
        self.normalizations = Normalizations(module)
        # Where each module's parameters are looked up at the moment of use, and their names.
        self._slots: dict[nn.Module, list[tuple[str, str]]] = {}
        self._look_parameters_up()

        # What the losses so far have shown, by weight name: its cuts, what hides a part of its
        # graph, its shape, and what an earlier fit has found, to which this one adds.
        self._candidates: dict[str, list[Candidate]] = {}
        self._hidden: dict[str, str] = {}
        self._shapes: dict[str, Shape] = {}
        self._earlier: dict[str, Verdict] = {}
        self._by_name = (self._candidates, self._hidden, self._shapes, self._earlier)
        # The state of the normalizations in which all that was judged.
        self._judged_in: tuple[Any, ...] | None = None
        self._written = WrittenWeights(module, self._slots)

        # Of the forward passes that are being watched.
        self._stack: ExitStack | None = None
        self._module_names: dict[nn.Module, str] = {}
        self._forget_passes()

    def _forget_passes(self) -> None:
        take_off(self._module_names, self._enter, self._leave)
        self._edges: dict[Edge, str] = {}
        self._recorded: dict[str, Tensor] = {}
        self._spans = ModuleSpans()
        self._module_names = {}
        self._written.stop()

    def _look_parameters_up(self) -> None:
        names = parameter_names(self._module)
        # In place: `WrittenWeights` has them, too.
        self._slots.clear()
        for owner in self._module.modules():
            owned = [(key, names[p][0]) for key, p in owner._parameters.items() if p is not None]
            if owned:
                self._slots[owner] = owned
        for parameter, (name, *_) in names.items():
            if name not in self.verdicts and not is_lazy(parameter) and parameter.ndim >= 2:
                reason = () if parameter.requires_grad else ("frozen: requires_grad is False",)
                self.verdicts[name] = Verdict.unknown(name, tuple(parameter.shape), *reason)

    def take_in(self, changed: Iterable[str]) -> None:
        """Weights of these names are new, or others than before under the same name: nothing is
        known about them."""
        for name in changed:
            self.verdicts.pop(name, None)
            for known in self._by_name:
                known.pop(name, None)
            self._written.writers.pop(name, None)
        self._look_parameters_up()
        # Both hold on to places in the module tree, which is another one now.
        self.normalizations = Normalizations(self._module)
        self.masks = MaskMemory(self._module)

    def __enter__(self) -> ScaleInvarianceSearch:
        self.watch()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def watch(self) -> None:
        """Record the next forward passes, and make their graph visible; idempotent."""
        if self._stack is not None:
            return
        state = self.normalizations.state()
        # A BatchNorm in evaluation mode normalizes no more: what was learnt holds for another
        # function than the one to come.
        if state != self._judged_in:
            self._judged_in = state
            for known in self._by_name:
                known.clear()
        with ExitStack() as stack:
            stack.callback(self._forget_passes)
            stack.enter_context(visible_graph())
            # One bound method for all modules, and not a new one for each.
            enter = self._enter
            leave = self._leave
            for name, module in self._module.named_modules():
                self._module_names[module] = clean_name(name)
                module.register_forward_pre_hook(enter)
                # Also after an exception: who catches it goes on, and owns what comes then.
                module.register_forward_hook(leave, always_call=True)
            # Kept only here: had anything above raised, leaving the block would have removed the
            # hooks that were set by then.
            self._stack = stack.pop_all()
        self.masks.begin()
        self._written.start()

    def take_up(self, verdicts: Mapping[str, Verdict]) -> None:
        """Go on from what an earlier fit found.

        Normalizations are taken to be switched as they were then.
        """
        self.verdicts.update(verdicts)
        self._earlier.update(verdicts)
        self._judged_in = self.normalizations.state()

    def start_afresh(self, verdicts: Mapping[str, Verdict]) -> None:
        """Forget what was found, but for ``verdicts``: the network is another one."""
        self.verdicts = dict(verdicts)
        self._earlier.clear()
        self._judged_in = None

    def close(self) -> None:
        """Remove every hook and restore compilation and checkpoints; idempotent."""
        stack = self._stack
        self._stack = None
        if stack is not None:
            stack.close()

    def _enter(
        self,
        module: nn.Module,
        args: Any,
    ) -> None:
        if in_backward() or not torch.is_grad_enabled():
            return
        # Also the weights of its children: a module may read them and never call the child.
        self._record(module)
        self._spans.enter(module, self._module_names[module])
        self._written.enter(module)

    def _leave(
        self,
        module: nn.Module,
        args: Any,
        output: Any,
    ) -> None:
        if in_backward():
            return
        self._spans.leave(module)
        self._written.leave(module)

    def _record(self, module: nn.Module) -> None:
        """Which graph edge is which parameter of a module and of those below it.

        Right now: FSDP1 shows a new view, FSDP2 another parameter at every use.
        """
        for owner in module.modules():
            for key, name in self._slots.get(owner, ()):
                # torch's pruning keeps the parameter under another name and puts what is left of it
                # in its place.
                original = owner._parameters.get(f"{key}_orig")
                tensor = getattr(owner, key, None) if original is None else original
                if not isinstance(tensor, Tensor) or self._recorded.get(name) is tensor:
                    continue
                # Asking for the edge of what a strategy has emptied (DeepSpeed stage 3) would make
                # a node of that shape, for whoever uses the weight next.
                if not tensor.requires_grad or is_lazy(tensor) or not tensor.numel():
                    continue
                edge = torch.autograd.graph.get_gradient_edge(tensor)
                self._edges[edge.node, edge.output_nr] = name
                # A leaf keeps its edge, but a view gets another one when its base is written.
                if tensor.is_leaf:
                    self._recorded[name] = tensor

    def analyze(self, loss: Tensor) -> None:
        """Judge the weights that ``loss`` depends on; call it right before ``loss.backward()``.

        Keeps nothing of the graph.
        """
        if in_backward() or not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        # Weights may have been used without any module's forward, as in F.linear(x, layer.weight).
        self._record(self._module)
        graph = trace(loss, self._edges, self._spans.module_of)
        shapes = {}
        for edge, shape in graph.shapes.items():
            if len(shape) >= 2:
                shapes[self._edges[edge]] = shape
        self._shapes |= shapes
        self.masks.see(graph)
        self._written.see(graph)

        # Several losses are combined: a weight that is known goes on with what they have shown.
        undecided = []
        for name, shape in shapes.items():
            if name in self._candidates:
                continue
            candidate = None
            if name in self._earlier:
                candidate = Candidate.of_verdict(self._earlier[name])
            if candidate is None:
                undecided.append(name)
                candidate = Candidate.of_cut(filter_partition(self._module, name, shape))
            self._candidates[name] = [candidate]
        self._follow(graph, shapes, 0)
        for name in undecided:
            cuts = self._further_cuts(name, shapes[name])
            self._candidates[name] += map(Candidate.of_cut, cuts)
        for k in range(1, max(map(len, self._candidates.values()), default=0)):
            self._follow(graph, shapes, k)

        # An operation that cannot be looked into may hide any of the weights behind it.
        for hiding in graph.opaque:
            self._hidden |= dict.fromkeys(shapes, hiding)
        self._judge_all(shapes)

    def _follow(
        self,
        graph: Graph,
        shapes: Mapping[str, Shape],
        k: int,
    ) -> None:
        """Follow the ``k``-th cut of every weight that has so many."""
        leaves = {}
        rows = {}
        for name, shape in shapes.items():
            for candidate in self._candidates[name][k : k + 1]:
                # Rows count from 1.
                leaves[name] = candidate.finest.broadcastable(len(shape)) + 1
                rows[name] = candidate.rows
        if leaves:
            follow(graph, leaves, rows)

    def _further_cuts(
        self,
        name: str,
        shape: Shape,
    ) -> list[Partition]:
        """Other cuts that are worth a look, after the first one was followed."""
        first = self._candidates[name][0]
        if first.rows.cut_elsewhere:
            # Only another cut can show which entries were left out (``pos[:, :, :n]``).
            return self._cuts(name, shape)[1:]
        # A cut along the other axis (``x @ W``) may be finer.
        if first.is_finest:
            return []
        return self._cuts(name, shape)[1:2]

    def _judge_all(self, shapes: Mapping[str, Shape]) -> None:
        known: Known = {}
        for name, shape in shapes.items():
            verdict = self._doubted(judge(name, shape, self._candidates[name], known))
            self.verdicts[name] = verdict.unmasked(self.masks.read(name))

    def _doubted(self, verdict: Verdict) -> Verdict:
        """The verdict, or none where something else speaks against the claim that it makes."""
        name = verdict.name
        shape = verdict.shape
        if verdict.partition is None and not verdict.waits:
            return verdict
        writer = self._written.writers.get(name)
        if writer:
            reason = f"the forward pass of {writer} writes it in place (as max_norm does)"
            return Verdict(name, shape, None, "no", reason=reason)
        if verdict.partition is None:
            return verdict
        all_rows = [candidate.rows for candidate in self._candidates[name]]
        for rows in all_rows:
            for reason in rows.veiled:
                return Verdict(name, shape, None, "no", reason=reason)
        if name in self._hidden:
            reason = f"{self._hidden[name]} hides part of the graph (the loss was not watched)"
            return Verdict.unknown(name, shape, reason)
        if any(rows.elsewhere for rows in all_rows):
            reason = "other ranks hold some of its rows (they have not been asked yet)"
            return Verdict.unknown(name, shape, reason)
        return verdict

    def agree(self) -> None:
        """Combine what all ranks found, so that all hold the same verdicts.

        A collective; without a process group nothing happens. What one rank must not scale
        separately, none does (its batch may have routed tokens differently), and what tensor
        parallelism shows to each rank in part is put together.
        """
        if world_size() == 1:
            return
        # By axis and not by position: ranks may have looked at different cuts.
        own_rows = {}
        for name, candidates in self._candidates.items():
            own_rows[name] = {candidate.finest.keep: candidate.rows for candidate in candidates}
        of_ranks = of_all_ranks((own_rows, self._hidden, self._shapes))
        self._hidden.clear()
        self._shapes.clear()
        # The lowest rank that knows a weight has the last word, on every rank.
        for _, hidden, shapes in reversed(of_ranks):
            self._hidden |= hidden
            self._shapes |= shapes
        for name, shape in self._shapes.items():
            found = [rows[name] for rows, _, _ in of_ranks if name in rows]
            self._candidates[name] = []
            for cut in self._cuts(name, shape):
                candidate = Candidate.of_cut(cut)
                # In the order of the ranks, so that all end with the same.
                looks = [by_cut[cut.keep] for by_cut in found if cut.keep in by_cut]
                for rows in looks:
                    candidate.rows.merge(rows)
                # A cut that some rank did not look at reads whole rows there, so nothing is left
                # unread of it.
                if len(looks) == len(found):
                    self._candidates[name].append(candidate)
        self._judge_all(self._shapes)

    def _cuts(
        self,
        name: str,
        shape: Shape,
    ) -> list[Partition]:
        """The finest vectors along the filter axis, along the other, and along those behind."""
        filters = filter_partition(self._module, name, shape)
        other_axis = 0 if filters.keep == (0, 1) else 1
        behind = [axis for axis in range(2, len(shape)) if shape[axis] > 1]
        cuts = [Partition.filters(shape, axis=axis) for axis in (other_axis, *behind)]
        return [filters, *cuts]
