"""Which module's forward created an autograd node."""

from __future__ import annotations

import bisect

import torch
from torch import nn
from torch.autograd.graph import Node


def _nodes_so_far() -> int:
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


class ModuleSpans:
    """Which module's forward created an autograd node: nodes are numbered in the order of their
    creation."""

    def __init__(self) -> None:
        self._open: list[tuple[nn.Module, str, int]] = []
        self._closed: list[tuple[int, int, str, nn.Module]] = []
        self._painted: tuple[list[int], list[tuple[str, nn.Module | None]]] | None = None

    def enter(self, module: nn.Module, name: str) -> None:
        """The forward of ``module`` begins."""
        self._open.append((module, name, _nodes_so_far()))

    def leave(self, module: nn.Module) -> None:
        """The forward of ``module`` is over."""
        while any(
            m is module for m, _, _ in self._open
        ):  # modules above it in the stack ended by an exception
            m, name, start = self._open.pop()
            if m is module:
                self._closed.append((start, _nodes_so_far(), name, module))
                self._painted = None
                return

    def module_of(self, node: Node) -> tuple[str, nn.Module | None]:
        """Name and module of the innermost forward in which ``node`` was created; ``("", None)``
        outside of
        all."""
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
