"""Which weights are scale-invariant, read from the autograd graph of a real training loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.candidates import (
    Candidate,
    claimed,
    frees_single_numbers,
    unread_part,
    verdict_of,
)
from lightning_normdyn.invariance.entry_masks import MaskMemory
from lightning_normdyn.invariance.flow import Shape
from lightning_normdyn.invariance.follow import follow
from lightning_normdyn.invariance.graph import trace
from lightning_normdyn.invariance.graph_state import Normalizations
from lightning_normdyn.invariance.module_spans import ModuleSpans
from lightning_normdyn.invariance.names import clean_name, parameter_names
from lightning_normdyn.invariance.nodes import Edge
from lightning_normdyn.invariance.partitions import filter_partition
from lightning_normdyn.invariance.rows import Rows, distinct
from lightning_normdyn.invariance.verdict import Verdict, unmasked
from lightning_normdyn.invariance.visibility import in_backward, visible_graph
from lightning_normdyn.invariance.written_weights import WrittenWeights


class ScaleInvarianceSearch:
    """Finds the scale-invariant weights of a module from the graph of its training losses.

    ``watch()`` before a forward pass, ``analyze(loss)`` right before each backward, ``close()``
    once that backward is over (a checkpoint
    computes its forward again in the backward and must find things as they were). ``verdicts`` then
    holds a `Verdict` for each
    weight, by its first name. Several losses are combined: a vector is scale-invariant if it is in
    all of them that read it. Weights that
    no loss contained stay ``"unknown"``, and rows that none has read (`Verdict.unread`) belong to
    no vector; watch a later batch for them.
    When normalizations were switched between training and evaluation in between, everything is
    judged afresh.

    Args:
        module: any module; made before a strategy has shown sharded or temporary parameters, e.g.
            in ``on_fit_start``.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 2))
        >>> with ScaleInvarianceSearch(net) as search:
        ...     search.analyze(net(torch.randn(8, 1, 4, 4)).square().sum())
        >>> search.verdicts["0.weight"].kind, search.verdicts["0.weight"].norms
        ('filter', ('1',))
        >>> search.verdicts["3.weight"].kind
        'no'
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._slots: dict[
            nn.Module, list[tuple[str, str]]
        ] = {}  # where each parameter is looked up at the moment of use, and its name
        self.verdicts: dict[str, Verdict] = {}
        self._look_parameters_up()
        self.masks = MaskMemory(module)
        self._candidates: dict[str, list[Candidate]] = {}
        self._hidden: dict[str, str] = {}
        self._shapes: dict[str, Shape] = {}
        self._normalizations = Normalizations(module)
        self._judged_in: tuple[Any, ...] | None = None
        self._earlier: dict[str, Verdict] = {}  # of an earlier fit: what is found adds to them
        self._edges: dict[Edge, str] = {}
        self._spans = ModuleSpans()
        self._written = WrittenWeights(module)
        self._stack: ExitStack | None = None

    def _look_parameters_up(self) -> None:
        names = parameter_names(self._module)
        self._slots = {}
        for owner in self._module.modules():
            self._slots[owner] = [
                (key, names[p][0]) for key, p in owner._parameters.items() if p is not None
            ]
        for parameter, (name, *_) in names.items():
            if name not in self.verdicts and not is_lazy(parameter) and parameter.ndim >= 2:
                reason = () if parameter.requires_grad else ("frozen: requires_grad is False",)
                self.verdicts[name] = Verdict.unknown(name, tuple(parameter.shape), *reason)

    def take_in(self, changed: Iterable[str]) -> None:
        """Weights of these names are new, or others than before under the same name: nothing is
        known about them."""
        for name in changed:
            for known in (
                self.verdicts,
                self._candidates,
                self._hidden,
                self._shapes,
                self._earlier,
            ):
                known.pop(name, None)
            self._written.forget(name)
        self._look_parameters_up()
        self._normalizations = Normalizations(self._module)
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
        state = self._normalizations.state()
        if state != self._judged_in:
            self._candidates, self._hidden, self._shapes, self._earlier, self._judged_in = (
                {},
                {},
                {},
                {},
                state,
            )
        with ExitStack() as stack:
            stack.callback(self._forget)
            stack.enter_context(visible_graph())
            for name, module in self._module.named_modules():
                below = [
                    (owner, key, parameter)
                    for owner in module.modules()
                    for key, parameter in self._slots.get(owner, ())
                ]
                stack.callback(
                    module.register_forward_pre_hook(self._entering(clean_name(name), below)).remove
                )
                stack.callback(module.register_forward_hook(self._leaving).remove)
            self._stack = stack.pop_all()
        self.masks.begin()
        self._written.start(self._slots)

    def take_up(self, verdicts: Mapping[str, Verdict]) -> None:
        """Go on from what an earlier fit found, under the normalizations as they are switched
        now."""
        self.verdicts.update(verdicts)
        self._earlier.update(verdicts)
        self._judged_in = self._normalizations.state()

    def start_afresh(self, verdicts: Mapping[str, Verdict]) -> None:
        """Forget what was found, but for ``verdicts``: the network is another one."""
        self.verdicts, self._earlier, self._judged_in = dict(verdicts), {}, None

    def close(self) -> None:
        """Remove every hook and restore compilation and checkpoints; idempotent."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def _forget(self) -> None:
        self._edges, self._spans = {}, ModuleSpans()
        self._written.stop()

    def _entering(
        self, name: str, below: list[tuple[nn.Module, str, str]]
    ) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if in_backward() or not torch.is_grad_enabled():
                return
            self._record(
                below
            )  # also those below: a module may read the weights of a child it never calls
            self._spans.enter(module, name)
            self._written.enter(module, self._slots)

        return hook

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        if in_backward():
            return
        self._spans.leave(module)
        self._written.leave(module, self._slots)

    def _record(self, slots: Iterable[tuple[nn.Module, str, str]]) -> None:
        """Which graph edge is which parameter, right now (FSDP1 shows a new view, FSDP2 another
        parameter at every use)."""
        for owner, key, name in slots:
            # torch's pruning keeps the parameter under another name and puts what is left of it in
            # its place.
            original = owner._parameters.get(f"{key}_orig")
            tensor = getattr(owner, key, None) if original is None else original
            # Asking for the edge of what a strategy has emptied (DeepSpeed stage 3) would make a
            # node of that shape, for whoever uses
            # the weight next.
            if (
                isinstance(tensor, Tensor)
                and tensor.requires_grad
                and not is_lazy(tensor)
                and tensor.numel()
            ):
                edge = torch.autograd.graph.get_gradient_edge(tensor)
                self._edges[edge.node, edge.output_nr] = name

    def analyze(self, loss: Tensor) -> None:
        """Judge the weights that ``loss`` depends on; call it right before ``loss.backward()``.
        Keeps nothing of the graph."""
        if in_backward() or not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        # Weights used without any module's forward (F.linear(x, self.layer.weight) in
        # training_step).
        self._record(
            (owner, key, name) for owner, slots in self._slots.items() for key, name in slots
        )
        graph = trace(loss, self._edges, self._spans.module_of)
        shapes = {
            self._edges[edge]: shape for edge, shape in graph.shapes.items() if len(shape) >= 2
        }
        self._shapes |= shapes
        self.masks.see(graph)
        self._written.see(graph, self._slots)
        first_time = []
        for name in shapes:
            if name in self._candidates:
                continue
            known = Candidate.of_verdict(self._earlier[name]) if name in self._earlier else None
            if known is None:
                first_time.append(name)
                finest = self._cuts(name, shapes[name])[0]
                known = Candidate(finest, Rows(finest.n))
            self._candidates[name] = [known]
        self._follow(graph, {name: self._candidates[name][0] for name in shapes})
        for name in first_time:
            self._candidates[name] += [
                Candidate(cut, Rows(cut.n)) for cut in self._further_cuts(name, shapes[name])
            ]
        for k in range(1, max(map(len, self._candidates.values()), default=0)):
            self._follow(
                graph,
                {
                    name: self._candidates[name][k]
                    for name in shapes
                    if len(self._candidates[name]) > k
                },
            )
        for hiding in graph.opaque:
            self._hidden |= dict.fromkeys(shapes, hiding)
        for name, shape in shapes.items():
            self.verdicts[name] = unmasked(self._judge(name, shape), self.masks.read(name))

    def _follow(self, graph: Any, candidates: Mapping[str, Candidate]) -> None:
        leaves = {}
        shapes = {self._edges[edge]: shape for edge, shape in graph.shapes.items()}
        for name, candidate in candidates.items():
            keep, labels = candidate.finest.keep, candidate.finest.labels
            leaves[name] = (labels + 1).reshape(
                [n if d in keep else 1 for d, n in enumerate(shapes[name])]
            )
        if leaves:
            follow(graph, leaves, {name: candidate.rows for name, candidate in candidates.items()})

    def _further_cuts(self, name: str, shape: Shape) -> list[Partition]:
        """Other cuts that are worth a look, after the first one was followed."""
        first = self._candidates[name][0]
        classes = first.rows.parent[1:][first.rows.parent[1:] > 0]
        # A finer cut along the other axis (x @ W) only where the first is not the finest already,
        # or cuts nothing.
        whole = (
            first.finest.n > 1
            and len(distinct(classes)) == first.finest.n
            and bool(first.rows.reached().all())
        )
        cuts = [] if whole else self._cuts(name, shape)[1:2]
        if (
            first.rows.cut_elsewhere
        ):  # only another cut can show which entries were left out (``pos[:, :, :n]``)
            cuts = self._cuts(name, shape)[1:]
        return cuts

    def _judge(self, name: str, shape: Shape) -> Verdict:
        candidates = self._candidates[name]
        unread = next((found for c in candidates if (found := unread_part(c)) is not None), None)
        numbers = [candidate for candidate in candidates if frees_single_numbers(candidate, shape)]
        best = max(
            (verdict_of(name, shape, candidate, unread) for candidate in numbers or candidates),
            key=claimed,
        )
        writer = self._written.writer(name)
        if writer is not None and (best.partition is not None or best.waits):
            reason = f"the forward pass of {writer} writes it in place (as max_norm does)"
            return Verdict(name, shape, None, "no", reason=reason)
        veils = list(
            dict.fromkeys(place for candidate in candidates for place in candidate.rows.veiled)
        )
        if veils and best.partition is not None:
            reason = f"the indices of {veils[0]} are inside a checkpoint, so that it is not known which rows are read"
            return Verdict(name, shape, None, "no", reason=reason)
        doubts = (
            [f"{self._hidden[name]} hides part of the graph (the loss was not watched)"]
            if name in self._hidden
            else []
        )
        if any(candidate.rows.elsewhere for candidate in self._candidates[name]):
            doubts.append("other ranks hold some of its rows (they have not been asked yet)")
        if doubts and best.partition is not None:
            return Verdict.unknown(name, shape, doubts[0])
        return best

    def agree(self) -> None:
        """Combine what all ranks found, so that all hold the same verdicts; a collective, and
        nothing without a process group.

        What one rank must not scale separately, none does (its batch may have routed tokens
        differently), and what tensor parallelism
        shows to each rank in part is put together.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        found_here = {
            name: [(c.finest.keep, c.rows) for c in candidates]
            for name, candidates in self._candidates.items()
        }
        mine = (found_here, self._hidden, self._shapes)
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, mine)
        self._hidden = {
            name: hiding for _, hidden, _ in reversed(everybody) for name, hiding in hidden.items()
        }
        self._shapes = {
            name: shape for _, _, shapes in reversed(everybody) for name, shape in shapes.items()
        }
        for name, shape in self._shapes.items():
            found = [rows[name] for rows, _, _ in everybody if name in rows]
            # A cut that some rank did not look at reads whole rows there, so nothing is left unread
            # of it.
            cuts = [
                cut
                for cut in self._cuts(name, shape)
                if all(cut.keep in dict(rows) for rows in found)
            ]
            self._candidates[name] = [Candidate(finest, Rows(finest.n)) for finest in cuts]
            for candidate in self._candidates[name]:
                for rows in found:  # in the order of the ranks, so that all end with the same
                    candidate.rows.merge(dict(rows)[candidate.finest.keep])
            self.verdicts[name] = unmasked(self._judge(name, shape), self.masks.read(name))

    def _cuts(self, name: str, shape: Shape) -> list[Partition]:
        """The finest vectors along the filter axis, along the other, and along those behind."""
        filters = filter_partition(self._module, name, shape)
        other = Partition.filters(shape, axis=0 if filters.keep == (0, 1) else 1)
        return [
            filters,
            other,
            *(
                Partition.filters(shape, axis=axis)
                for axis in range(2, len(shape))
                if shape[axis] > 1
            ),
        ]
