"""Which weights are scale-invariant, at which granularity, because of which normalization, and how
that is known.

*Structure* is read from the autograd graph of a real training loss (`ScaleInvarianceSearch`; the
rules are in ``graph_rules.py``).
*Number* is a pooled Euler test on real gradients that can only withdraw a claim (`EulerTest`).
*Function* is
`verify_scale_invariance`: rescale what is claimed, compare outputs.

Letters: n vectors of one weight, d entries of a vector.
"""

from __future__ import annotations

import bisect
import difflib
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy

from lightning_normdyn.errors import NoTargetsError, NotSupportedError
from lightning_normdyn.geometry.vectors import Partition, renumbered
from lightning_normdyn.invariance.entry_masks import MaskMemory
from lightning_normdyn.invariance.graph_rules import (
    Edge,
    Link,
    Rows,
    Shape,
    distinct,
    follow,
    trace,
)
from lightning_normdyn.invariance.graph_state import Normalizations
from lightning_normdyn.invariance.names import WRAPPERS, clean_name
from lightning_normdyn.invariance.visibility import visible_graph
from lightning_normdyn.tables import render

# ------------------------------------------------------------------------------- names and patterns


def parameter_names(module: nn.Module) -> dict[Tensor, tuple[str, ...]]:
    """All names of every parameter, without wrappers; a tied weight has several.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
        >>> net[1].weight = net[0].weight
        >>> list(parameter_names(net).values())
        [('0.weight', '1.weight')]
    """
    names: dict[Tensor, tuple[str, ...]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known, clean = names.get(parameter, ()), clean_name(name)
        if clean not in known:
            names[parameter] = (*known, clean)
    return names


def normalize_params(params: str | Sequence[str]) -> list[str]:
    """Check the value of a ``params`` argument; returns a list of patterns, ``["auto"]`` for
    ``"auto"``.

    Raises:
        ValueError: for anything but ``"auto"``, a glob pattern, or a list of them.

    Example:
        >>> normalize_params("layer1.*")
        ['layer1.*']
    """
    patterns = [params] if isinstance(params, str) else params
    if isinstance(patterns, (bytes, Mapping)) or not isinstance(patterns, Iterable):
        raise ValueError(
            f"`params` must be 'auto', a glob pattern, or a list of them, got {params!r}."
        )
    patterns = list(patterns)
    if not patterns:
        raise ValueError("`params` is an empty list. Use 'auto', or name at least one pattern.")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.removeprefix("!"):
            raise ValueError(
                f"`params` must be 'auto', a glob pattern, or a list of them, got {pattern!r} in "
                f"it."
            )
    if "auto" in patterns and len(patterns) > 1:
        raise ValueError(
            f"`params={patterns}` mixes 'auto' with patterns. Only excludes (\"!pattern\") mean "
            f"'auto' minus them; leave 'auto' out."
        )
    return patterns


def match_patterns(
    params: str | Sequence[str],
    names: Sequence[tuple[str, ...]],
    what: str = "weights",
    *,
    all_must_match: bool = True,
) -> list[int]:
    """Indices of the weights that ``params`` means.

    Patterns are exact names, or else `fnmatch.fnmatchcase` globs on parameter names, so ``*``
    crosses dots. ``"!pattern"`` excludes, after
    all includes; only excludes mean all of ``names`` minus them. A tied weight matches under each
    of its names.

    Args:
        params: as `normalize_params` takes it.
        names: for each weight all its names.
        what: what the names are, for the message.
        all_must_match: whether a pattern that matches nothing is an error.

    Raises:
        NoTargetsError: if a pattern matches nothing.

    Example:
        >>> match_patterns(["conv*", "!*2*"], [("conv1.weight",), ("conv2.weight",), ("fc.weight",)])
        [0]
    """
    patterns = normalize_params(params)
    if patterns == ["auto"]:
        return list(range(len(names)))

    def matching(pattern: str) -> set[int]:
        # A name may hold a bracket, which a glob reads as a set of characters: an exact name comes
        # first.
        found = {i for i, aliases in enumerate(names) if pattern in aliases}
        if not found:
            found = {
                i
                for i, aliases in enumerate(names)
                if any(fnmatchcase(name, pattern) for name in aliases)
            }
        if not found and all_must_match:
            everything = [name for aliases in names for name in aliases]
            shown = ", ".join(everything[:12]) + (", ..." if len(everything) > 12 else "")
            near = difflib.get_close_matches(pattern, everything, n=3, cutoff=0.4)
            closest = f" The nearest: {', '.join(near)}." if near else ""
            raise NoTargetsError(
                f"`params` has the pattern {pattern!r}, which matches none of the {len(names)} "
                f"{what}: "
                f"{shown or '(there are none)'}.{closest} Correct the pattern, or use "
                f"params='auto'."
            )
        return found

    includes = [matching(p) for p in patterns if not p.startswith("!")]
    excludes = [matching(p[1:]) for p in patterns if p.startswith("!")]
    chosen = set().union(*includes) if includes else set(range(len(names)))
    return sorted(chosen.difference(*excludes))


# ----------------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True, eq=False)
class NormLink:
    """A normalization with running statistics that a weight's vectors feed.

    Args:
        module: its name.
        vector: int64 ``(channels,)``, which vector of the partition feeds each channel; -1 for
            none.
        degree: a vector scaled by c scales its channel by ``c ** degree``.
        offset: whether something that does not scale (a bias) was added before it.
        bias: the parameter that was added, entry for entry of the channels, if known.
    """

    module: str
    vector: Tensor
    degree: float
    offset: bool
    bias: str | None = None


@dataclass
class Verdict:
    """What is known about the scale invariance of one weight.

    Args:
        name: first name of the weight.
        shape: full shape.
        partition: its vectors; None if no row is scale-invariant, or not decided.
        kind: ``"filter"``, ``"group"``, ``"layer"``; ``"partly"`` (some rows belong to no vector);
            ``"no"``; ``"unknown"`` (in no loss).
        norms: names of the normalization modules that make it so; ``"DivBackward0 in block.attn"``
            where one was written by hand.
        reason: for ``"no"``, ``"partly"`` and ``"unknown"``: why, in words.
        eps: the claim rests on an epsilon or a padding value being negligible, or on a condition
            (``torch.where``) that does not change.
        batch_norms: normalizations with running statistics behind it, for correcting them after a
            rescale.
        stale_statistics: running statistics behind it that cannot be corrected.
        known: how it is known.
        withdrawn_partition: the vectors of a claim that the gradients have contradicted.
        read: bool, of the full shape: the entries that the loss reads, where a mask in the network
            hides the others (a masked
            autoencoder, torch's pruning); None: all. Only these count as length.
        unread: one vector: the entries that no loss has read so far. They belong to no vector of
            ``partition``. None if all were read.

    Example:
        >>> Verdict.unknown("fc.weight", (10, 4)).kind
        'unknown'
    """

    name: str
    shape: Shape
    partition: Partition | None
    kind: str
    norms: tuple[str, ...] = ()
    reason: str = ""
    eps: bool = False
    batch_norms: tuple[NormLink, ...] = ()
    stale_statistics: tuple[str, ...] = ()
    known: str = "graph"
    withdrawn_partition: Partition | None = None
    read: Tensor | None = None
    unread: Partition | None = None

    @classmethod
    def unknown(
        cls, name: str, shape: Shape, reason: str = "not part of any training loss so far"
    ) -> Verdict:
        """A weight that nothing is known about."""
        return cls(name, tuple(shape), None, "unknown", reason=reason, known="")

    @property
    def n(self) -> int:
        """Number of vectors."""
        return 0 if self.partition is None else self.partition.n

    @property
    def unread_rows(self) -> str:
        """How many rows no loss has read so far, in words; empty if there are none."""
        if self.unread is None:
            return ""
        labels = self.unread.labels
        return (
            f"{int((labels >= 0).sum())} of its {labels.numel()} rows not read by any loss so far"
        )

    @property
    def waits(self) -> bool:
        """Whether rows that are one vector have to wait for others, which no loss has read so far,
        before anything may scale them."""
        return self.kind == "unknown" and self.unread is not None

    def withdrawn(self, found: str, known: str) -> Verdict:
        """The claim after it was contradicted: by what, in words, and in what (``"gradients"`` or
        ``"function"``)."""
        by = ", ".join(self.norms) or "its graph"
        reason = f"{by} says {self.kind}, but {found}"
        gone = self.partition
        return replace(
            self,
            partition=None,
            kind="no",
            reason=reason,
            batch_norms=(),
            stale_statistics=(),
            known=known,
            withdrawn_partition=gone,
        )

    def state(self) -> dict[str, Any]:
        """As plain tensors, numbers and strings."""
        links = [
            {
                "module": b.module,
                "vector": b.vector,
                "degree": b.degree,
                "offset": b.offset,
                "bias": b.bias,
            }
            for b in self.batch_norms
        ]
        return {
            "shape": list(self.shape), "partition": _partition_state(self.partition), "kind": self.kind, "norms": list(self.norms),
            "reason": self.reason, "eps": self.eps,
            "batch_norms": links, "stale_statistics": list(self.stale_statistics), "known": self.known,
            "withdrawn_partition": _partition_state(self.withdrawn_partition), "read": self.read, "unread": _partition_state(self.unread),
        }  # fmt: skip

    @classmethod
    def from_state(cls, name: str, state: Mapping[str, Any]) -> Verdict:
        """The inverse of `state`."""
        links = tuple(NormLink(**link) for link in state["batch_norms"])
        return cls(
            name, tuple(state["shape"]), _partition_of(state["partition"]), state["kind"], tuple(state["norms"]), state["reason"],
            state["eps"], links,
            tuple(state["stale_statistics"]), state["known"], _partition_of(state.get("withdrawn_partition")),
            state.get("read"), _partition_of(state.get("unread")),
        )  # fmt: skip


def _partition_state(partition: Partition | None) -> dict[str, Any] | None:
    if partition is None:
        return None
    return {
        "keep": list(partition.keep),
        "labels": partition.labels,
        "granularity": partition.granularity,
    }


def _partition_of(state: Mapping[str, Any] | None) -> Partition | None:
    return (
        None
        if state is None
        else Partition(tuple(state["keep"]), state["labels"], state["granularity"])
    )


# --------------------------------------------------------------------------------------- partitions


def filter_partition(module: nn.Module, name: str, shape: Shape) -> Partition:
    """One vector per output channel: dim 0, but dim 1 within each group for transposed convolutions
    (also under parametrizations).

    Args:
        module: the module that ``name`` is relative to.
        name: name of the weight.
        shape: its full shape.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 6, 3, groups=2))
        >>> filter_partition(net, "0.weight", (4, 3, 3, 3)).n
        6
    """
    owner = _owner(module, name)
    if isinstance(owner, nn.modules.conv._ConvTransposeNd) and len(shape) > 2:
        return Partition.filters(tuple(shape), transposed_groups=owner.groups)
    return Partition.filters(tuple(shape))


def _owner(module: nn.Module, name: str) -> nn.Module | None:
    """The module that a weight, or the parametrization of one, belongs to."""
    path = clean_name(name).split(".")[:-1]
    if "parametrizations" in path:
        path = path[: path.index("parametrizations")]
    try:
        owner = module.get_submodule(".".join(path))
    except AttributeError:
        return None
    while wrapped := [m for name, m in owner.named_children() if name in WRAPPERS]:
        owner = wrapped[0]
    return owner


SINGLE_NUMBERS = "single numbers (a gain), which have no direction"


def is_gain(module: nn.Module, name: str, shape: Shape) -> bool:
    """Whether the filters of a weight are single numbers, or it is a factor for each channel (``1 x
    C x 1 x 1``).

    A vector along the last axis (a class token, the weight of ``Linear(n, 1)``) is none, and
    neither is the kernel of a convolution.

    Args:
        module: the module that ``name`` is relative to.
        name: name of the weight.
        shape: its full shape.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1, groups=8), torch.nn.Conv2d(8, 1, 1), torch.nn.Linear(8, 1))
        >>> [is_gain(net, name, tuple(p.shape)) for name, p in net.named_parameters() if p.ndim >= 2]
        [True, False, False]
    """
    numbers = math.prod(shape)
    if filter_partition(module, name, shape).n == numbers:
        return True
    layer = isinstance(_owner(module, name), (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd))
    return not layer and max(shape, default=1) == numbers and shape[-1] == 1


_FINENESS = ("filter", "group", "layer")


def choose_partition(verdict: Verdict, granularity: str, fallback: Partition) -> Partition:
    """The vectors to act on.

    Args:
        verdict: what is known about the weight.
        granularity: ``"auto"`` follows the verdict; else ``"filter"``, ``"group"`` or ``"layer"``.
        fallback: the filters, for a weight of which nothing is known ("by request"). Where the rows
            that were read are one vector, this is
            the whole weight.

    Raises:
        NotSupportedError: if ``granularity`` is finer than what the normalization allows (that
            would change the network's function), or
            ``"group"`` is asked for and no group structure is known.

    Example:
        >>> verdict = Verdict.unknown("fc.weight", (10, 4))
        >>> choose_partition(verdict, "auto", Partition.filters((10, 4))).granularity
        'filter'
    """
    known, withdrawn = verdict.partition, verdict.withdrawn_partition
    if known is None and withdrawn is not None and granularity in ("auto", withdrawn.granularity):
        return withdrawn  # who named the weight gets the same vectors as before the gradients spoke
    if verdict.waits and granularity in ("filter", "group"):
        raise NotSupportedError(
            f"granularity={granularity!r} was asked for `{verdict.name}`, but {verdict.reason}: "
            f"scaling its "
            f"{granularity}s separately would change the network's function. Use "
            f"granularity='auto' or 'layer'."
        )
    if verdict.waits:
        return Partition.layer(verdict.shape)
    if granularity == "auto" or (known is not None and granularity == known.granularity):
        return fallback if known is None else known
    if known is None:
        if granularity == "layer":
            return Partition.layer(verdict.shape)
        if granularity == "filter":
            return fallback
        raise NotSupportedError(
            f"granularity='group' was asked for `{verdict.name}`, but no normalization with groups "
            f"is known behind it. "
            "Use 'filter' or 'layer'."
        )
    by = ", ".join(verdict.norms) or "its graph"
    if granularity == "group" and known.granularity == "filter":
        raise NotSupportedError(
            f"granularity='group' was asked for `{verdict.name}`, but {by} normalizes single "
            f"filters, so no groups are known. "
            "Use 'auto', 'filter' or 'layer'."
        )
    if _FINENESS.index(granularity) < _FINENESS.index(known.granularity):
        raise NotSupportedError(
            f"granularity={granularity!r} was asked for `{verdict.name}`, but {by} makes it "
            f"scale-invariant only per {known.granularity}: "
            f"scaling its {granularity}s separately would change the network's function. Use "
            f"granularity='auto' or {known.granularity!r}."
        )
    return Partition(known.keep, known.labels.clamp(max=0), "layer")


# --------------------------------------------------------------------------------------- the search


def in_backward() -> bool:
    """Whether a backward pass is running, e.g. because a checkpoint computes its forward again."""
    return bool(torch._C._current_graph_task_id() != -1)


def _nodes_so_far() -> int:
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


class _Spans:
    """Which module's forward created an autograd node: nodes are numbered in the order of their
    creation."""

    def __init__(self) -> None:
        self._open: list[tuple[nn.Module, str, int]] = []
        self._closed: list[tuple[int, int, str, nn.Module]] = []
        self._painted: tuple[list[int], list[tuple[str, nn.Module | None]]] | None = None

    def enter(self, module: nn.Module, name: str) -> None:
        self._open.append((module, name, _nodes_so_far()))

    def leave(self, module: nn.Module) -> None:
        while any(
            m is module for m, _, _ in self._open
        ):  # modules above it in the stack ended by an exception
            m, name, start = self._open.pop()
            if m is module:
                self._closed.append((start, _nodes_so_far(), name, module))
                self._painted = None
                return

    def module_of(self, node: Node) -> tuple[str, nn.Module | None]:
        if self._painted is None:
            self._painted = self._paint()
        starts, owners = self._painted
        return owners[bisect.bisect_right(starts, node._sequence_nr())]

    def _paint(self) -> tuple[list[int], list[tuple[str, nn.Module | None]]]:
        """Breakpoints on the number line, and the innermost module between them."""
        nobody: tuple[str, nn.Module | None] = ("", None)
        # Open calls (a loss computed inside forward) last until now. Outer calls start no later and
        # end no earlier than inner ones.
        now = _nodes_so_far()
        calls = sorted(
            [
                *(
                    (start, -stop, -i, name, m)
                    for i, (start, stop, name, m) in enumerate(self._closed)
                ),
                *((s, -now, -(10**9), n, m) for m, n, s in self._open),
            ],
            key=lambda call: call[:3],
        )
        starts: list[int] = []
        owners = [nobody]
        stack: list[tuple[int, tuple[str, nn.Module | None]]] = []

        def mark(position: int) -> None:
            owner = stack[-1][1] if stack else nobody
            if starts and starts[-1] == position:
                owners[-1] = owner
            else:
                starts.append(position)
                owners.append(owner)

        for start, minus_stop, _, name, module in calls:
            while stack and stack[-1][0] <= start:
                stop = stack.pop()[0]
                mark(stop)
            if -minus_stop > start:
                stack.append((-minus_stop, (name, module)))
                mark(start)
        while stack:
            stop = stack.pop()[0]
            mark(stop)
        return starts, owners


def _numbers(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.long, device="cpu")


@dataclass
class _Candidate:
    """One way to cut a weight into rows, and what the graph says about these rows."""

    finest: Partition
    rows: Rows

    @classmethod
    def of_verdict(cls, verdict: Verdict) -> _Candidate | None:
        """What a verdict of an earlier fit says, so that later losses can add to it; None where it
        says nothing about rows."""
        known = verdict.partition or verdict.unread
        if known is None or verdict.kind == "unknown":
            return None
        finest = Partition(
            known.keep, _numbers(known.labels.numel()).reshape(known.labels.shape), "filter"
        )
        rows = Rows(finest.n)
        vector = (
            torch.full_like(finest.labels, -1).flatten()
            if verdict.partition is None
            else known.labels.flatten().cpu()
        )
        unread = torch.zeros_like(vector, dtype=torch.bool)
        if verdict.unread is not None:
            unread = verdict.unread.labels.flatten().cpu() >= 0
        # The first row of each vector stands for it: 1 + its number, by the vector's number. Vector
        # -1 is none.
        first = torch.zeros(max(0, verdict.n) + 1, dtype=torch.long, device="cpu")
        for row in reversed((vector >= 0).nonzero().flatten().tolist()):
            first[vector[row]] = row + 1
        rows.parent[1:] = torch.where(
            vector >= 0, first[vector], torch.where(unread, rows.parent[1:], 0)
        )
        rows.met[1:] = vector >= 0
        rows.varies = verdict.unread is not None
        rows.assumed = verdict.eps
        forbidden = ~unread & (vector < 0)
        rows.reasons = {verdict.reason: None} if bool(forbidden.any()) else {}
        rows.norms = dict.fromkeys(verdict.norms)
        rows.stale = dict.fromkeys(verdict.stale_statistics)
        for link in verdict.batch_norms:
            rows.link(
                Link(link.module, first[link.vector.cpu()], link.degree, link.offset, link.bias)
            )
        return cls(finest, rows)


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
        self._candidates: dict[str, list[_Candidate]] = {}
        self._hidden: dict[str, str] = {}
        self._shapes: dict[str, Shape] = {}
        self._normalizations = Normalizations(module)
        self._judged_in: tuple[Any, ...] | None = None
        self._earlier: dict[str, Verdict] = {}  # of an earlier fit: what is found adds to them
        self._edges: dict[Edge, str] = {}
        self._spans = _Spans()
        self._versions: dict[nn.Module, dict[str, tuple[Tensor, int]]] = {}
        self._rewritten: dict[
            str, str
        ] = {}  # weights that a forward pass writes in place, and whose
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
                self._rewritten,
            ):
                known.pop(name, None)
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
        self._edges, self._spans, self._versions = {}, _Spans(), {}

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
            self._versions[module] = self._versions_of(module)

        return hook

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        if in_backward():
            return
        self._spans.leave(module)
        before = self._versions.pop(module, {})
        for name, (parameter, version) in self._versions_of(module).items():
            if name in before and before[name][0] is parameter and before[name][1] != version:
                self._rewritten[name] = type(module).__name__

    def _versions_of(self, module: nn.Module) -> dict[str, tuple[Tensor, int]]:
        """The module's own weights, and how often each was written in place so far.

        Not the root's: a whole training step may run inside its forward, and an optimizer writes,
        too.
        """
        if module is self._module:
            return {}
        slots = [(name, module._parameters.get(key)) for key, name in self._slots.get(module, ())]
        # Views and emptied parameters are written by strategies that gather the weights.
        plain = [
            (name, p)
            for name, p in slots
            if p is not None and not is_lazy(p) and not p._is_view() and p.numel()
        ]
        return {name: (p, p._version) for name, p in plain}

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
        first_time = []
        for name in shapes:
            if name in self._candidates:
                continue
            known = _Candidate.of_verdict(self._earlier[name]) if name in self._earlier else None
            if known is None:
                first_time.append(name)
                finest = self._cuts(name, shapes[name])[0]
                known = _Candidate(finest, Rows(finest.n))
            self._candidates[name] = [known]
        self._follow(graph, {name: self._candidates[name][0] for name in shapes})
        for name in first_time:
            self._candidates[name] += [
                _Candidate(cut, Rows(cut.n)) for cut in self._further_cuts(name, shapes[name])
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

    def _follow(self, graph: Any, candidates: Mapping[str, _Candidate]) -> None:
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
        unread = next((found for c in candidates if (found := _unread(c)) is not None), None)
        numbers = [candidate for candidate in candidates if _frees_single_numbers(candidate, shape)]
        best = max(
            (_verdict(name, shape, candidate, unread) for candidate in numbers or candidates),
            key=_claimed,
        )
        if name in self._rewritten and (best.partition is not None or best.waits):
            reason = (
                f"the forward pass of {self._rewritten[name]} writes it in place (as max_norm does)"
            )
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
            self._candidates[name] = [_Candidate(finest, Rows(finest.n)) for finest in cuts]
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


def _unread(candidate: _Candidate) -> Partition | None:
    """The rows that no loss has read so far, as one vector; None if there are none."""
    rows, finest = candidate.rows, candidate.finest
    unread = ~rows.reached()[1:]
    if rows.picked.numel() and bool((rows.parent[rows.picked] == 0)[rows.picked > 0].any()):
        # the data say which rows are picked, and one of those that were must not be scaled: it
        # speaks for the others
        return None
    if not bool(unread.any()):
        return None
    return Partition(finest.keep, torch.where(unread, 0, -1)[finest.labels], "layer")


def _classes(candidate: _Candidate, shape: Shape) -> tuple[Tensor, Tensor]:
    """For each row its class number, or -1 where it belongs to none, and the size of each class in
    rows."""
    rows, finest = candidate.rows, candidate.finest
    root = torch.where(rows.reached()[1:], rows.parent[1:], 0)
    # Where the data say which rows meet, or are read at all, those that did speak for the others.
    picked = rows.picked[rows.picked > 0]
    if len(picked) and bool((rows.parent[picked] == 0).any()):
        root = torch.zeros_like(root)
    elif len(picked) or rows.varies:
        speaking = root[picked - 1] if len(picked) and not rows.varies else root[root > 0]
        if len(distinct(speaking)) < max(2, len(speaking)):
            forbidden = bool((rows.parent[1:] == 0).any())
            root = torch.zeros_like(root) if len(picked) and forbidden else (root > 0).long()
    entries = math.prod(shape) // max(1, finest.n)
    present, index, sizes = torch.unique(root, return_inverse=True, return_counts=True)
    vectors = (present > 0) & (sizes * entries > 1)  # a single number has no direction
    number = torch.where(vectors, vectors.cumsum(0) - 1, -1)
    return number[index], sizes[vectors]


def _frees_single_numbers(candidate: _Candidate, shape: Shape) -> bool:
    """Whether single numbers may be scaled each by its own factor: then no other cut has vectors
    with a direction that means something."""
    if candidate.finest.n != math.prod(shape):
        return False
    rows = candidate.rows
    root = torch.where(rows.reached()[1:], rows.parent[1:], 0)
    sizes = torch.bincount(root, minlength=1)
    return bool((sizes[root[root > 0]] == 1).any())


def _claimed(verdict: Verdict) -> tuple[float, int, bool]:
    if verdict.partition is None:
        return 0.0, 0, verdict.waits
    labels = verdict.partition.labels
    return float((labels >= 0).float().mean()), verdict.partition.n, False


def _verdict(name: str, shape: Shape, candidate: _Candidate, unread: Partition | None) -> Verdict:
    """What one cut of a weight says, ``unread`` being the entries that no loss has read, as this or
    another cut shows them."""
    rows, finest = candidate.rows, candidate.finest
    of_row, sizes = _classes(candidate, shape)
    left = replace(Verdict.unknown(name, shape), unread=unread).unread_rows
    reason = "; ".join([*list(rows.reasons)[:2], *([left] if left else [])])
    if not len(sizes):
        if math.prod(shape) == finest.n:
            return Verdict(name, shape, None, "no", reason=f"its rows are {SINGLE_NUMBERS}")
        nothing_read = unread is not None and not rows.reasons
        kind = "unknown" if nothing_read else "no"
        return Verdict(
            name,
            shape,
            None,
            kind,
            reason=reason or "its vectors are single numbers",
            unread=unread,
        )
    everything = bool((of_row >= 0).all())
    single = bool((sizes == 1).all())
    if unread is not None and not (single and len(sizes) > 1 and unread.keep == finest.keep):
        # A row that joins later would be mixed with rows that were scaled already. One row alone
        # does not show whether rows join.
        norms = tuple(rows.norms)
        waiting = f"the rows that were read are one vector ({', '.join(norms)}); {reason}"
        return Verdict(name, shape, None, "unknown", norms, waiting, unread=unread)
    granularity = "filter" if single else "layer" if len(sizes) == 1 and everything else "group"
    partition = Partition(finest.keep, of_row[finest.labels], granularity)
    links: list[NormLink] = []
    stale = list(rows.stale)
    for link in rows.links:
        vector = torch.where(link.rows > 0, of_row[link.rows - 1], -1)
        if any(link.module == known.module for known in links):
            stale.append(f"{link.module} is fed in different ways")
        links.append(NormLink(link.module, vector, link.degree, link.offset, link.bias))
        if link.offset and link.bias is None:
            stale.append(f"{link.module}: what is added before it is not a plain bias")
    kind, why = (
        (granularity, "")
        if everything
        else ("partly", reason or "some of its vectors are single numbers")
    )
    stale = list(dict.fromkeys(stale))
    return Verdict(
        name,
        shape,
        partition,
        kind,
        tuple(rows.norms),
        why,
        rows.assumed,
        tuple(links),
        tuple(stale),
        unread=unread,
    )


def unmasked(verdict: Verdict, read: Tensor | None) -> Verdict:
    """The verdict for a weight of which the loss reads only some entries: a vector that it reads
    less than two entries of is none.

    Args:
        verdict: as the scales of whole rows say.
        read: bool of the weight's shape, the entries that the loss reads; None: all.
    """
    if read is None or tuple(read.shape) != tuple(verdict.shape):
        return verdict
    if verdict.partition is None:
        return replace(verdict, read=read)
    kept = verdict.partition.lengths(verdict.shape, read) > 1  # a single number has no direction
    if bool(kept.all()):
        return replace(verdict, read=read)
    reason = "a mask hides all entries of some of its vectors"
    if not bool(kept.any()):
        reason = "a mask hides all entries of its vectors"
        return replace(
            verdict,
            partition=None,
            kind="no",
            reason=reason,
            batch_norms=(),
            stale_statistics=(),
            read=read,
        )
    number = renumbered(kept)
    links = tuple(replace(link, vector=number[link.vector]) for link in verdict.batch_norms)
    partition = verdict.partition.only(kept)
    return replace(
        verdict,
        partition=partition,
        kind="partly",
        reason=verdict.reason or reason,
        batch_norms=links,
        read=read,
    )


# ------------------------------------------------------------------------------------------- number

EULER_LIMIT, EULER_COUNT = 0.1, 8

# A weight whose <w, g> may be nothing but rounding: |w| |g| is this small beside that of another
# weight of the optimizer.
# 32 roundings of float32, also where weights are stored in float64: a gradient so much smaller
# tells nothing that would matter.
EULER_NOISE = 32 * torch.finfo(torch.float32).eps


def euler_sums(ww: Tensor, wg: Tensor, gg: Tensor, length: Tensor) -> Tensor:
    r"""What `euler_values` needs of each vector; sum it over the vectors of a weight, on all ranks.

    Args:
        ww: squared norms of the weight vectors, ``(n,)``.
        wg: inner products of weight and gradient.
        gg: squared norms of the gradients.
        length: d, entries per vector.

    Returns:
        ``(3, n)``: :math:`d \langle w, g\rangle^2`, the energy :math:`u = \|w\|^2 \|g\|^2`, and
        :math:`u^2`; zeros for vectors without
        a gradient and for what is not finite.
    """
    radial = length.to(ww.dtype) * wg.square()
    energy = ww * gg
    counts = torch.isfinite(radial) & torch.isfinite(energy) & (energy > 0)
    values = torch.stack([radial, energy, energy.square()])
    return torch.where(counts, values, torch.zeros_like(values))


def euler_values(sums: Tensor) -> Tensor:
    r"""The mean of :math:`z^2 = d \cos^2(w, g)` over the vectors of each weight, and over how many
    values it was taken.

    Every vector weighs by its energy :math:`u = \|w\|^2 \|g\|^2`, so that a vector whose gradient
    is rounding noise beside those of its
    weight's other vectors says nothing. n vectors of equal energy count as n values, one that
    outweighs all others as one:
    :math:`(\sum u)^2 / \sum u^2`. A weight whose gradients are all noise, measured against the
    weight with the largest, has no values.

    Args:
        sums: `euler_sums`, summed over the vectors of each weight: ``(3, weights)``.

    Returns:
        ``(2, weights)``: the means (0 where there is nothing) and the numbers of values.

    Example:
        >>> one = torch.ones(8, dtype=torch.float64)
        >>> euler_values(euler_sums(one, 0.5 * one, one, 16 * one).sum(1, keepdim=True)).flatten().tolist()
        [4.0, 8.0]
        >>> noise = torch.tensor([1.0, 1.0, 1e-18, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)  # squared norms of gradients
        >>> along = torch.tensor([0.0, 0.0, 1e-9, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # the third is noise along its weight
        >>> mean, number = euler_values(euler_sums(one, along, noise, 16 * one).sum(1, keepdim=True)).flatten().tolist()
        >>> mean < 1e-15, round(number)
        (True, 7)
    """
    radial, energy, squares = sums
    typical = squares / energy  # the energy of the vectors that count
    heard = energy > 0
    loudest = (
        torch.where(heard, typical, torch.zeros_like(typical)).max()
        if typical.numel()
        else typical.sum()
    )
    heard &= typical > EULER_NOISE**2 * loudest
    values = torch.stack([radial / energy, energy.square() / squares])
    return torch.where(heard, values, torch.zeros_like(values))


class EulerTest:
    r"""Tests claims of scale invariance on real gradients: :math:`\langle w, g\rangle = 0` for
    every vector (Euler's theorem).

    Pools :math:`z^2 = d \cos^2(w, g)` over the vectors of a weight and over steps, weighed as in
    `euler_values`. z is of the order of 1 for
    a weight that is not scale-invariant; for the 120 that are in the test networks, the worst root
    mean square over 20 steps is 0.005 in
    float32 and 0.016 in bfloat16. A weight is rejected above 0.1 once 8 values are pooled. It can
    only withdraw a claim: of the 78 weights
    that are not scale-invariant, 4 pass.

    Args:
        weights: how many weights are tested.
        device: where the sums are kept.

    Example:
        >>> test = EulerTest(1)
        >>> one = torch.ones(8, dtype=torch.float64)
        >>> test.update(0.5 * one, one, one, 16 * one, torch.zeros(8, dtype=torch.long))
        >>> test.result()
        [(2.0, 8)]
        >>> test.rejected()
        [0]
    """

    def __init__(self, weights: int, device: torch.device | str = "cpu") -> None:
        # Of z^2, and how many values.
        self.sums = torch.zeros(weights, 2, dtype=torch.float64, device=device)

    def update(
        self, wg: Tensor, ww: Tensor, gg: Tensor, length: Tensor, weight_index: Tensor
    ) -> None:
        """Add the vectors of one step; all arguments ``(n,)``, nothing is copied to the host.

        Args:
            wg: inner products of weight and gradient.
            ww: squared norms of the weight vectors.
            gg: squared norms of the gradients; vectors with 0 (or anything not finite) are skipped.
            length: d, entries per vector.
            weight_index: int64, which weight each vector belongs to.
        """
        per_vector = euler_sums(ww.double(), wg.double(), gg.double(), length).to(self.sums.device)
        per_weight = per_vector.new_zeros(3, len(self.sums)).index_add_(
            1, weight_index.to(self.sums.device), per_vector
        )
        mean, number = euler_values(per_weight)
        self.sums += torch.stack([mean * number, number], dim=1)

    def result(self) -> list[tuple[float, int]]:
        """For each weight the root mean square of z, and over how many values (nan over 0). Copies
        to the host."""
        return [
            (rms_of(total, number), whole_values(number)) for total, number in self.sums.tolist()
        ]

    @staticmethod
    def contradiction(rms: float, count: int) -> str:
        """A result in words."""
        return f"the gradient is not orthogonal: rms cos(w, g)*sqrt(d) = {rms:.2g} over {count} values (allowed {EULER_LIMIT})"

    def rejected(self) -> list[int]:
        """Weights whose claim is contradicted. Copies to the host."""
        return [
            i
            for i, (rms, number) in enumerate(self.result())
            if number >= EULER_COUNT and rms > EULER_LIMIT
        ]


def rms_of(total: float, number: float) -> float:
    """The root mean square of ``number`` values whose squares add up to ``total``; nan without
    any."""
    return math.sqrt(total / number) if number else math.nan


def whole_values(number: float) -> int:
    """How many values there are, where vectors of unequal energy make it a fraction: rounded down,
    but not by a rounding error."""
    return math.floor(number + 1e-6)


# ----------------------------------------------------------------------------------------- function


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
    """Test claims of scale invariance by what they mean: rescale every claimed vector by its own
    random factor, compare the outputs.

    All factors are drawn from 2**U(-1, 1) and applied at once. Weights, buffers, random states and
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
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = verify_scale_invariance(net, torch.randn(16, 4))
        >>> bool(report), [claim.name for claim in report.claims]
        (True, ['0.weight'])
    """
    found = _read_graph(module, inputs, loss, seed) if verdicts is None else list(verdicts)
    claims = tuple(v for v in found if v.partition is not None)
    weights = {
        name: parameter for parameter, names in parameter_names(module).items() for name in names
    }
    for claim in claims:
        weight = weights[claim.name]
        if not _is_whole(weight, claim):
            raise NotSupportedError(
                f"`{claim.name}` is sharded ({type(weight.data).__name__} of shape "
                f"{tuple(weight.shape)}, in full "
                f"{tuple(claim.shape)}), so its function cannot be compared here. "
                "Call verify_scale_invariance on the unwrapped module, on one process."
            )
    generator = torch.Generator().manual_seed(seed)

    def factors(n: int) -> Tensor:
        return torch.exp2(
            2 * torch.rand(n, generator=generator, dtype=torch.float64, device="cpu") - 1
        )

    before = _outputs(module, inputs, loss, seed)
    after = _outputs(
        module,
        inputs,
        loss,
        seed,
        [(weights[c.name], c.partition) for c in claims if c.partition is not None],
        factors,
    )
    return InvarianceReport(_largest_change(before, after), claims, tolerance)


def _is_whole(weight: Tensor, verdict: Verdict) -> bool:
    return type(weight.data) is Tensor and tuple(weight.shape) == tuple(verdict.shape)


def spread(partition: Partition, values: Tensor, weight: Tensor) -> Tensor:
    """``(n,)`` values at every entry's vector, broadcastable to ``weight``; 1 where an entry
    belongs to none."""
    extended = torch.cat([values, values.new_ones(1)])[partition.labels]  # -1 picks the last
    shape = [size if d in partition.keep else 1 for d, size in enumerate(weight.shape)]
    return extended.reshape(shape).to(weight.device, weight.dtype)


def inspect_module(
    module: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, seed: int = 0
) -> list[Verdict]:
    """Run a training-mode forward and say of every weight of two or more dimensions whether it is
    scale-invariant.

    The claims of the graph are then held against the function: the outputs must stay what they are
    when all claimed vectors are multiplied
    by up to 16. A claim that changes them by more than a tenth (a large epsilon, a padding value, a
    detached copy) is withdrawn. The module
    is left as it was: weights, buffers, random states, training flags.

    Args:
        module: any module.
        inputs: arguments of its forward.
        loss: from the module's output to the training loss; without it the sum of the outputs
            stands for it.
        seed: of the forward pass.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> [(v.name, v.kind) for v in inspect_module(net, torch.randn(2, 4))]
        [('0.weight', 'no')]
        >>> net[0].bias = None
        >>> [(v.name, v.kind) for v in inspect_module(net, torch.randn(2, 4))]
        [('0.weight', 'layer')]
    """
    return _withdraw_by_function(
        module, inputs, loss, seed, _read_graph(module, inputs, loss, seed)
    )


def _read_graph(
    module: nn.Module, inputs: tuple[Any, ...], loss: Callable[[Any], Tensor] | None, seed: int
) -> list[Verdict]:
    search = ScaleInvarianceSearch(module)
    with _restored(module), torch.enable_grad(), search:
        torch.manual_seed(seed)
        output = module(*_copied(inputs))
        sums = [t.sum() for t in _tensors(output) if t.requires_grad]
        if loss is not None:
            search.analyze(loss(output))
        elif sums:
            search.analyze(torch.stack(sums).sum() if len(sums) > 1 else sums[0])
    return list(search.verdicts.values())


FUNCTION_LIMIT = 0.1


def _withdraw_by_function(
    module: nn.Module,
    inputs: tuple[Any, ...],
    loss: Callable[[Any], Tensor] | None,
    seed: int,
    verdicts: list[Verdict],
) -> list[Verdict]:
    """The verdicts without the claims that the function contradicts."""
    weights = {
        name: parameter for parameter, names in parameter_names(module).items() for name in names
    }
    claims = [v for v in verdicts if v.partition is not None]
    if not claims or not all(_is_whole(weights[v.name], v) for v in claims):
        return verdicts
    before = _outputs(module, inputs, loss, seed)

    def change(*tested: Verdict) -> float:
        # Powers of two, which no precision rounds, and upwards, which makes an ordinary epsilon
        # matter less and a large one show.
        generator = torch.Generator().manual_seed(seed)

        def factors(n: int) -> Tensor:
            exponents = torch.randint(
                1, 5, (n,), generator=generator, dtype=torch.long, device="cpu"
            )
            exponents[0] = 4
            return torch.exp2(exponents.double())

        scaled = [(weights[v.name], v.partition) for v in tested if v.partition is not None]
        return _largest_change(before, _outputs(module, inputs, loss, seed, scaled, factors))

    if not change() <= FUNCTION_LIMIT / 10:  # two runs of the same differ: nothing can be told
        return verdicts
    wrong = {}
    if not change(*claims) <= FUNCTION_LIMIT:
        wrong = {v.name: by for v in claims if not (by := change(v)) <= FUNCTION_LIMIT}
    return [
        v.withdrawn(
            f"the outputs change by {wrong[v.name]:.2g} of their size when it is multiplied by up "
            f"to 16",
            "function",
        )
        if v.name in wrong
        else replace(v, known="graph and function")
        if v.partition is not None
        else v
        for v in verdicts
    ]


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Training mode inside; weights, buffers, random states and training flags as they were
    afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    weights = [(p, p.detach().clone()) for p in module.parameters() if not is_lazy(p)]
    buffers = [
        (m, name, b, b.detach().clone())
        for m in module.modules()
        for name, b in m._buffers.items()
        if b is not None
    ]
    devices = list({p.device.index for p, _ in weights if p.device.type == "cuda"})
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=devices):
        try:
            if not module.training:
                module.train()
            yield
        finally:
            with torch.no_grad():
                for parameter, saved in weights:
                    parameter.copy_(saved)
                for owner, name, buffer, saved in buffers:
                    buffer.copy_(saved)
                    owner._buffers[name] = buffer
            for m, mode in modes:
                m.training = mode
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def _outputs(
    module: nn.Module,
    inputs: tuple[Any, ...],
    loss: Callable[[Any], Tensor] | None,
    seed: int,
    scaled: Iterable[tuple[Tensor, Partition]] = (),
    factors: Callable[[int], Tensor] = torch.ones,
) -> list[Tensor]:
    """What the module gives in training mode when these weights are scaled; every call starts from,
    and leaves, the same state."""
    with (
        _restored(module),
        visible_graph(),
    ):  # also the same buffers: spectral_norm iterates in them
        with torch.no_grad():
            for weight, partition in scaled:
                weight.mul_(spread(partition, factors(partition.n), weight))
        torch.manual_seed(seed)
        torch.clear_autocast_cache()  # under autocast: casts of the weights as they were
        with torch.enable_grad():  # as in training: a gradient penalty needs it
            output = module(*_copied(inputs))
            tensors = list(_tensors(output))
            if loss is not None:
                tensors.append(loss(output))
            return [t.detach().clone() for t in tensors if t.is_floating_point()]


def _largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    return max((_change(a, b) for a, b in zip(before, after, strict=True)), default=0.0)


def _change(before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape:
        return math.inf
    scale = float(before.double().abs().max()) if before.numel() else 0.0
    change = float((before.double() - after.double()).abs().max()) if before.numel() else 0.0
    return math.inf if math.isnan(change) else change / scale if scale else change


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
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


# ---------------------------------------------------------------------------------------- the table

TABLE_COLUMNS = (
    "weight",
    "shape",
    "scale-invariant",
    "vectors",
    "normalized by",
    "how known",
    "why not",
)


def _cells(verdict: Verdict) -> tuple[str, ...]:
    known = verdict.known + (
        " (eps, padding or a condition assumed harmless)"
        if verdict.eps and verdict.partition is not None
        else ""
    )
    shape = " x ".join(str(n) for n in verdict.shape)
    return (
        verdict.name,
        shape,
        verdict.kind,
        str(verdict.n or ""),
        ", ".join(verdict.norms) if verdict.n else "",
        known,
        verdict.reason,
    )


def targets_table(verdicts: Iterable[Verdict], width: int | None = None) -> str:
    """The verdicts as a plain-text table.

    Args:
        verdicts: one per weight.
        width: columns of the terminal that the table shall fit; None: a line per weight, however
            long.

    Example:
        >>> print(targets_table([Verdict.unknown("fc.weight", (10, 4))]))
        weight     shape   scale-invariant  vectors  normalized by  how known  why not
        fc.weight  10 x 4  unknown                                             not part of any training loss so far
    """
    cells = [_cells(verdict) for verdict in verdicts]
    if width is not None:
        text = render(
            "",
            TABLE_COLUMNS,
            cells,
            noted=("why not",),
            optional=("how known", "shape"),
            width=width,
            most_rows=None,
        )
        return text.rstrip("\n")
    rows = [TABLE_COLUMNS, *cells]
    widths = [max(len(row[k]) for row in rows) for k in range(len(TABLE_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
