"""Which module's forward created an autograd node, to say where an operation stands."""

from __future__ import annotations

import bisect
from math import inf

import torch
from torch import nn
from torch.autograd.graph import Node

# Name and module of a forward; ``("", None)`` outside of all.
Owner = tuple[str, nn.Module | None]


def _nodes_so_far() -> int:
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


class ModuleSpans:
    """Forward passes as intervals on the number line of autograd nodes.

    Nodes are numbered in the order of their creation, so that a node belongs to the forward passes
    whose interval its number lies in.
    """

    def __init__(self) -> None:
        self._open: list[tuple[nn.Module, str, int]] = []
        self._closed: list[tuple[int, int, str, nn.Module]] = []
        self._painted: tuple[list[int], list[Owner]] | None = None

    def enter(self, module: nn.Module, name: str) -> None:
        """The forward of ``module`` begins."""
        self._open.append((module, name, _nodes_so_far()))

    def leave(self, module: nn.Module) -> None:
        """The forward of ``module`` is over."""
        if not any(entered is module for entered, _, _ in self._open):
            return
        # Modules above it in the stack were ended by an exception.
        entered = None
        while entered is not module:
            entered, name, start = self._open.pop()
        self._closed.append((start, _nodes_so_far(), name, module))
        self._painted = None

    def module_of(self, node: Node) -> Owner:
        """Name and module of the innermost forward in which ``node`` was created; ``("", None)``
        outside of all."""
        # Painted once for all nodes of a graph: a search through all calls for each would be slow.
        if self._painted is None:
            self._painted = self._paint()
        starts, owners = self._painted
        return owners[bisect.bisect_right(starts, node._sequence_nr())]

    def _paint(self) -> tuple[list[int], list[Owner]]:
        """Breakpoints on the number line, and the innermost module between them."""
        nobody: Owner = ("", None)
        calls = []
        for i, (start, stop, name, module) in enumerate(self._closed):
            calls.append((start, stop, i, name, module))
        # Open calls (a loss computed inside a forward) last until now, and are around all others.
        now = _nodes_so_far()
        for module, name, start in self._open:
            calls.append((start, now, 10**9, name, module))
        # Outer calls start no later and end no earlier than inner ones, and are closed after them.
        calls.sort(key=lambda call: (call[0], -call[1], -call[2]))
        starts: list[int] = []
        owners = [nobody]
        stack: list[tuple[int, Owner]] = []

        def mark(position: int) -> None:
            owner = stack[-1][1] if stack else nobody
            if starts and starts[-1] == position:
                owners[-1] = owner
            else:
                starts.append(position)
                owners.append(owner)

        def end_calls_before(position: float) -> None:
            while stack and stack[-1][0] <= position:
                stop, _ = stack.pop()
                mark(stop)

        for start, stop, _, name, module in calls:
            end_calls_before(start)
            # A forward that created no node is nowhere.
            if stop > start:
                stack.append((stop, (name, module)))
                mark(start)
        end_calls_before(inf)
        return starts, owners
