"""Whether lists hold the weights that they held before: asked several times in every batch, of all
weights of an optimizer."""

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_

from torch import Tensor, nn


class SameWeights:
    """Remembers the weights of some lists, by identity.

    Args:
        lists: of weights.

    Example:
        >>> import torch
        >>> first, second = torch.ones(1), torch.ones(1)  # equal, and not the same
        >>> known = SameWeights([[first]])
        >>> known.are_in([[first]]), known.are_in([[second]]), known.are_in([[first], []])
        (True, False, False)
    """

    def __init__(self, lists: Iterable[Sequence[Tensor]]) -> None:
        # The weights themselves and not their ids: an id may pass on to another object. Each as it
        # came: a person may have put a tuple into a group, which equals no list.
        self._lists = [weights[:] for weights in lists]
        self._equal_no_others = all(map(_equals_no_other, chain.from_iterable(self._lists)))

    def are_in(self, lists: Sequence[Sequence[Tensor]]) -> bool:
        """Whether ``lists`` hold the same objects in the same places."""
        # `==` compares by identity first. It takes a twentieth of the time of `is`, weight by
        # weight, and does not touch the weights, which hardly ever lie in a cache.
        try:
            if lists != self._lists:
                return False
        except Exception:
            # Two different weights were compared.
            return False
        if self._equal_no_others:
            return True
        return all(map(is_, chain.from_iterable(lists), chain.from_iterable(self._lists)))


def _equals_no_other(weight: Tensor) -> bool:
    """Whether ``weight == other`` is never true of another tensor: a comparison of several numbers
    is no truth, so it raises."""
    return type(weight) in (Tensor, nn.Parameter) and weight.numel() > 1
