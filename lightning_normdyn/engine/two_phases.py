"""Whether the step of an optimizer in two phases can be seen at all.

SAM and its like take the gradient at other weights than those that they step from. Their step is
the inner optimizer's only if they bring the weights back before it and leave them alone after it.
Nothing announces that, so the weights' places are compared once, around the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError


class ReturnCheck:
    """Compares where weights are with where they must be, around the first step of one optimizer.

    Args:
        outer: the optimizer in two phases.
        inner: the optimizer that steps inside it.
        weights: gives the weights to look at, as they are at that moment.
        name: gives the name of a weight.
    """

    def __init__(
        self,
        outer: Any,
        inner: Optimizer,
        weights: Callable[[], list[Tensor]],
        name: Callable[[Tensor], str],
    ) -> None:
        self._outer, self._inner = outer, inner
        self._weights, self._name = weights, name
        self._places: list[tuple[Tensor, Tensor]] = []
        self.has_stepped = False

    def begin_batch(self) -> None:
        """Before the first step: the weights must be back here when the inner optimizer steps."""
        if not self.has_stepped:
            self._remember()

    def stepped(self) -> None:
        """After the first step of the inner optimizer: the weights must still be here when the
        batch ends."""
        if not self.has_stepped:
            self.has_stepped = True
            self._remember()

    def refusal(self) -> NotSupportedError | None:
        """What speaks against this optimizer, judged by where its weights are now.

        Nothing is compared before the next call of `begin_batch` or `stepped`.
        """
        places, self._places = self._places, []
        for weight, place in places:
            if not _is_back(weight.detach(), place):
                return self._error(weight)
        return None

    def _remember(self) -> None:
        self._places = []
        for weight in self._weights():
            # A sharded weight cannot be compared without the other ranks.
            if weight.requires_grad and type(weight.data) is Tensor:
                self._places.append((weight, weight.detach().clone()))

    def _error(self, weight: Tensor) -> NotSupportedError:
        outer, inner = type(self._outer).__name__, type(self._inner).__name__
        return NotSupportedError(
            f"{outer} takes its gradient at other weights, and the step that {inner} makes inside "
            f"it is not all that moves `{self._name(weight)}`: it does not start where the weights "
            f"were, or they are moved on after it. So the step of {outer} cannot be seen. Use a "
            f"form that brings the weights back first and ends with the inner step."
        )


def _is_back(weight: Tensor, before: Tensor) -> bool:
    """Whether a weight is where it was, but for the roundings of a way there and back."""
    distance = torch.linalg.vector_norm((weight - before).float())
    length = torch.linalg.vector_norm(before.float())
    return bool(distance <= 8 * torch.finfo(weight.dtype).eps * length)
