r"""What a change of a weight's scale does to everything that was gathered at the old scale.

A loss that does not see the length of :math:`w` has gradients that go as :math:`1/\lVert w\rVert`.
So when a weight vector is multiplied by :math:`f`, a buffer that holds gradients has to be
multiplied by :math:`f^{-1}` and one that holds squared gradients by :math:`f^{-2}`. The buffers are
then those that a run at the new scale would hold, and the direction goes on undisturbed. Left
alone, they make AdamW turn three times too fast for hundreds of steps. The same holds for the
running statistics of a BatchNorm behind a rescaled filter.

Everything here takes plain tensors and optimizers. Where a buffer lies in pieces, it lies as its
weight does, and the caller applies the factors.
"""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError

from .facts import TABLE
from .group_numbers import Group, as_number
from .recognition import facts_of, is_schedule_free, why_not_as_base


def has_stepped(optimizer: Optimizer, weight: Tensor, number: int = 1) -> bool:
    """Whether an optimizer has stepped a weight before its step ``number``, as far as its state
    tells.

    Nothing waits for a device: of a count that lives there it is taken that it is not 0.
    """
    state = optimizer.state.get(weight)
    if not state:
        return False
    # Later on a state was filled by a step, and to read its count costs a call a weight.
    if number > 1:
        return True
    count = as_number(state.get("step"))
    # Some make their buffers with the optimizer (Adagrad), and then their count is 0.
    return count != 0 if isinstance(count, float) else True


class StateOf:
    """The state that an optimizer keeps of some weights, in their order.

    Args:
        weights: the parameters.

    Example:
        >>> weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        >>> sgd = torch.optim.SGD(weights, lr=0.1)
        >>> sgd.state[weights[1]]["momentum_buffer"] = torch.zeros(2)
        >>> StateOf(weights).now(sgd)
        [{}, {'momentum_buffer': tensor([0., 0.])}]
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = list(weights)
        # Where they stand among the keys of the state. Not the states themselves, which would be
        # kept alive: as large as the model.
        self._places: list[int] = []

    def now(self, optimizer: Optimizer) -> list[Mapping[Any, Any]]:
        """What is known of each weight; empty where nothing is."""
        state = optimizer.state
        keys = list(state)
        if not self._stand_in(keys):
            place_of = {id(key): place for place, key in enumerate(keys)}
            self._places = [place_of.get(id(weight), -1) for weight in self._weights]
        # By their places, and not as keys: to look for a tensor costs a call of Python.
        if -1 in self._places:
            return [state.get(weight, {}) for weight in self._weights]
        states = list(state.values())
        return [states[place] for place in self._places]

    def _stand_in(self, keys: Sequence[Any]) -> bool:
        """Whether the weights stand where they were found last."""
        places = self._places
        if not places or -1 in places or max(places) >= len(keys):
            return False
        return all(map(is_, map(keys.__getitem__, places), self._weights))


def state_exponents(optimizer: Optimizer) -> dict[str, float]:
    r"""How each buffer of ``optimizer`` follows its weight.

    When :math:`w` is multiplied by :math:`f`, the buffer has to be by :math:`f^e`. Known for SGD,
    Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad and Muon (see :func:`per_matrix_only`) of
    torch.optim with any of their options (amsgrad, centered, capturable, fused, ...), and for
    subclasses that keep no further per-entry buffers.

    Args:
        optimizer: the optimizer; with state or without.

    Returns:
        ``{buffer: e}``. Buffers that do not change are not named, and a buffer that is named need
        not exist (or may be ``None``).

    Raises:
        NotSupportedError: for another class, for a buffer that is not known, and for schedule-free
            optimizers.

    Example:
        >>> weight = torch.nn.Parameter(torch.randn(4, 3))
        >>> state_exponents(torch.optim.SGD([weight], lr=0.1, momentum=0.9))
        {'momentum_buffer': -1.0}
        >>> state_exponents(torch.optim.RMSprop([weight], lr=0.1, momentum=0.9))
        {'square_avg': -2.0, 'grad_avg': -1.0}
    """
    name = type(optimizer).__name__
    asked = f"Rescaling the state of {name} together with its weights was asked for"
    way_out = "Use another optimizer, or optimizer_state='keep' where the callback has it."
    if is_schedule_free(optimizer):
        raise NotSupportedError(
            f"{asked}, but a schedule-free optimizer keeps a second copy of the weights, which "
            "would stay at the old scale. Use another optimizer."
        )
    exponents = facts_of(optimizer).exponents
    if exponents is None:
        understood = ", ".join(sorted(row.name for row in TABLE if row.exponents is not None))
        own_step = why_not_as_base(optimizer)
        because = "" if own_step is None else f" ({own_step})"
        raise NotSupportedError(
            f"{asked}, but only the state of {understood} is understood{because}. {way_out}"
        )
    # A subclass may keep more than its base does: half of a state rescaled is worse than none.
    unknown = sorted(_buffers_of(optimizer) - exponents.keys())
    if unknown:
        raise NotSupportedError(
            f"{asked}, but what a change of scale does to its buffers {unknown} is not known. "
            f"{way_out}"
        )
    return {buffer: exponent for buffer, exponent in exponents.items() if exponent}


def _buffers_of(optimizer: Optimizer) -> set[str]:
    """Names of everything in the state of single weights that may depend on their scale.

    Those are tensors that are no mere numbers, alone or in containers, and objects that may hold
    some.
    """
    names: set[str] = set()
    for state in optimizer.state.values():
        # Optimizers also keep numbers of their own in ``state`` (MADGRAD's "k", SPAM's
        # "total_step"): those belong to no weight.
        if not isinstance(state, Mapping):
            continue
        for buffer, value in state.items():
            if not _is_plain(value):
                names.add(str(buffer))
    return names


def _is_plain(value: Any) -> bool:
    """Whether a value in the state is a number, a flag or a name, alone or in containers."""
    if isinstance(value, Tensor):
        return value.dim() == 0
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, str)) or as_number(value) is not None


def per_matrix_only(optimizer: Optimizer) -> bool:
    """Whether a rescale must use one factor for a whole matrix (Muon).

    Example:
        >>> per_matrix_only(torch.optim.SGD([torch.nn.Parameter(torch.randn(4, 3))], lr=0.1))
        False
    """
    return facts_of(optimizer).per_matrix


def step_buffer(optimizer: Optimizer, group: Group) -> str | None:
    r"""The buffer :math:`b` that tells what the last step was: after it, every weight has moved by
    :math:`-\eta b`.

    So it is for SGD with momentum and without Nesterov, whatever else is set: coupled decay,
    dampening and ``maximize`` are in the buffer.

    Args:
        optimizer: the optimizer itself; a subclass may step otherwise.
        group: one of its param groups.

    Returns:
        The name of the buffer in the state of each weight that was stepped; ``None`` where a step
        cannot be told from one buffer.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.randn(4, 3))], lr=0.1, momentum=0.9)
        >>> step_buffer(sgd, sgd.param_groups[0])
        'momentum_buffer'
    """
    facts = facts_of(optimizer)
    if facts.step_buffer is None or type(optimizer) is not facts.known_class:
        return None
    return facts.step_buffer(group)


class RunningStatistics(NamedTuple):
    """What `rescale_batch_norm_` takes."""

    mean: Tensor | None
    var: Tensor | None
    factor: Tensor
    bias: Tensor | None
    eps: float


@torch.no_grad()
def rescale_batch_norms_(norms: Sequence[RunningStatistics]) -> None:
    """`rescale_batch_norm_` of several normalizations, those that are alike at once.

    Example:
        >>> means = [torch.ones(2), torch.ones(1)]
        >>> factors = torch.tensor([3.0, 4.0]), torch.tensor([5.0])
        >>> rescale_batch_norms_(
        ...     [RunningStatistics(m, None, f, None, 0.0) for m, f in zip(means, factors)]
        ... )
        >>> means
        [tensor([3., 4.]), tensor([5.])]
    """
    ids = [id(tensor) for norm in norms for tensor in norm[:2] if tensor is not None]
    are_apart = len(set(ids)) == len(ids)
    alike: dict[Any, list[RunningStatistics]] = {}
    for number, norm in enumerate(norms):
        # Two weights in front of one normalization rescale it one after the other.
        key: Any = number
        if are_apart:
            kinds = [None if each is None else (each.dtype, each.device) for each in norm[:4]]
            key = (*kinds, norm.eps)
        alike.setdefault(key, []).append(norm)
    for several in alike.values():
        if len(several) == 1:
            rescale_batch_norm_(*several[0])
            continue
        means, variances, factors, biases, (eps, *_) = zip(*several, strict=True)
        mean, var = _joined(means), _joined(variances)
        rescale_batch_norm_(mean, var, torch.cat(factors), _joined(biases), eps)
        sizes = [len(factor) for factor in factors]
        for buffers, changed in ((means, mean), (variances, var)):
            if changed is not None:
                torch._foreach_copy_(list(buffers), list(changed.split_with_sizes(sizes)))


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """All of them in one; None where there are none."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


@torch.no_grad()
def rescale_batch_norm_(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    factor: Tensor,
    bias: Tensor | None,
    eps: float,
) -> None:
    r"""Make the running statistics behind rescaled filters those of the new weights, in place.

    With :math:`c` = ``factor``, :math:`b` = ``bias``: mean :math:`m\to c\,m+(1-c)\,b`, variance
    :math:`v\to c^2(v+\epsilon)-\epsilon`. Evaluation right after then equals evaluation right
    before, eps included. For BatchNorm, SyncBatchNorm and InstanceNorm with running statistics, any
    ``momentum`` (``None`` too), affine or not.

    Args:
        running_mean: ``(C,)``; ``None`` (no running statistics): nothing happens.
        running_var: ``(C,)`` or ``None``.
        factor: ``(C,)``, by how much the input of each channel was multiplied, its bias aside.
        bias: ``(C,)``, what was added to the input after the weights (the bias of the layer in
            front), or ``None``.
        eps: eps of the normalization.

    Example:
        >>> mean, var = torch.tensor([1.0]), torch.tensor([4.0])
        >>> rescale_batch_norm_(mean, var, torch.tensor([3.0]), torch.tensor([0.5]), eps=0.0)
        >>> mean, var
        (tensor([2.]), tensor([36.]))
    """
    # float64: the statistics of a float32 network then change by one rounding only.
    c = factor.double()
    if running_mean is not None:
        mean = c * running_mean.double()
        if bias is not None:
            mean = mean + (1 - c) * bias.double()
        running_mean.copy_(mean)
    if running_var is not None:
        var = running_var.double()
        # Not clamped at 0: the normalization uses v + eps, which stays positive where v does not.
        rescaled = c.square() * (var + eps) - eps
        # A factor of 1 must change nothing, and v + eps - eps is not always v.
        running_var.copy_(torch.where(c == 1, var, rescaled))
