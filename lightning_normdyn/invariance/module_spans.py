"""Which module's forward created an autograd node, to say where an operation stands."""

import bisect

import torch
from torch import nn
from torch.autograd.graph import Node

# Name and module of a forward; ``("", None)`` outside of all.
Owner = tuple[str, nn.Module | None]


class ModuleSpans:
    """Forward passes as intervals on the number line of autograd nodes.

    Nodes are numbered in the order of their creation, so that a node belongs to the forward passes
    whose interval its number lies in.
    """

    def __init__(self) -> None:
        # Those that are running, the innermost last.
        self._open: list[Owner] = [("", None)]
        # From which node on somebody owns them, and who, in the order of time.
        self._starts: list[int] = [0]
        self._owners: list[Owner] = self._open.copy()

    def enter(self, module: nn.Module, name: str) -> None:
        """The forward of ``module`` begins."""
        self._open.append((name, module))
        self._mark()

    def leave(self, module: nn.Module) -> None:
        """The forward of ``module`` is over."""
        if not any(entered is module for _, entered in self._open):
            return
        # Modules above it in the stack were ended by an exception.
        entered = None
        while entered is not module:
            _, entered = self._open.pop()
        self._mark()

    def _mark(self) -> None:
        """Whose the nodes are from now on."""
        self._starts.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._owners.append(self._open[-1])

    def module_of(self, node: Node) -> Owner:
        """Name and module of the innermost forward in which ``node`` was created; ``("", None)``
        outside of all."""
        # Of several that begin at one number the last is meant: the others created no node.
        k = bisect.bisect_right(self._starts, node._sequence_nr())
        return self._owners[k - 1]
