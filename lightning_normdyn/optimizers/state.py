r"""What a change of a weight's scale does to everything that was gathered at the old scale, and how
each optimizer decays.

A loss that does not see the length of :math:`w` has gradients that go as :math:`1/\lVert w\rVert`.
So when a weight vector is
multiplied by :math:`f`, a buffer that holds gradients has to be multiplied by :math:`f^{-1}` and
one that holds squared gradients
by :math:`f^{-2}`: then the buffers are those that a run at the new scale would hold, and the
direction goes on undisturbed. Left
alone, they make AdamW turn three times too fast for hundreds of steps. The same holds for the
running statistics of a BatchNorm
behind a rescaled filter.

Everything here takes plain tensors and optimizers; where a buffer lies in pieces, it lies as its
weight does, and the caller
applies the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.optimizers.facts import (
    TABLE,
    decay_trial,
    facts_of,
    law_of,
    sets_weights_back,
    why_not_as_base,
)
from lightning_normdyn.optimizers.group_numbers import as_number

__all__ = [
    "decay_kind",
    "is_schedule_free",
    "per_matrix_only",
    "rescale_batch_norm_",
    "state_exponents",
    "step_buffer",
    "supports_decay_takeover",
    "taken_over_by_trial",
]


def state_exponents(optimizer: Optimizer) -> dict[str, float]:
    r"""How each buffer of ``optimizer`` follows its weight: when :math:`w` is multiplied by
    :math:`f`, the buffer is by :math:`f^e`.

    Classes: SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Muon (see
    :func:`per_matrix_only`) of torch.optim, with
    any of their options (amsgrad, centered, capturable, fused, ...), and subclasses that keep no
    further per-entry buffers.

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
    asked = (
        f"Rescaling the state of {type(optimizer).__name__} together with its weights was asked for"
    )
    way_out = "Use another optimizer, or optimizer_state='keep' where the callback has it."
    if is_schedule_free(optimizer):
        raise NotSupportedError(
            f"{asked}, but a schedule-free optimizer keeps a second copy of the weights, which "
            f"would stay at the old scale. "
            "Use another optimizer."
        )
    known = facts_of(optimizer).exponents
    if known is None:
        names = ", ".join(sorted(row.name for row in TABLE if row.exponents is not None))
        own_step = why_not_as_base(optimizer)
        because = "" if own_step is None else f" ({own_step})"
        raise NotSupportedError(
            f"{asked}, but only the state of {names} is understood{because}. {way_out}"
        )
    if unknown := sorted(_buffers_of(optimizer) - known.keys()):
        raise NotSupportedError(
            f"{asked}, but what a change of scale does to its buffers {unknown} is not known. "
            f"{way_out}"
        )
    return {key: exponent for key, exponent in known.items() if exponent}


def _buffers_of(optimizer: Optimizer) -> set[str]:
    """Names of everything in the state of single weights that may depend on their scale: tensors
    that are no mere numbers, alone or in
    containers, and objects that may hold some.

    Optimizers also keep numbers of their own in ``state`` (MADGRAD's "k", SPAM's "total_step"):
    those belong to no weight.
    """
    names: set[str] = set()
    for state in optimizer.state.values():
        if isinstance(state, Mapping):
            names |= {str(key) for key, value in state.items() if not _is_plain(value)}
    return names


def _is_plain(value: Any) -> bool:
    """Whether a value in the state is a number, a flag or a name, alone or in containers."""
    if isinstance(value, Tensor):
        return value.dim() == 0
    if isinstance(value, Mapping):
        return all(_is_plain(entry) for entry in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, (bool, str)) or as_number(value) is not None


def per_matrix_only(optimizer: Optimizer) -> bool:
    """Whether a rescale must use one factor for a whole matrix: Muon orthogonalises it, and
    per-filter factors do not commute with that.

    Example:
        >>> per_matrix_only(torch.optim.SGD([torch.nn.Parameter(torch.randn(4, 3))], lr=0.1))
        False
    """
    return facts_of(optimizer).per_matrix


def decay_kind(
    optimizer: Optimizer, group: dict[str, Any]
) -> Literal["coupled", "decoupled"] | None:
    r"""How ``optimizer`` applies ``weight_decay``.

    "coupled": :math:`\lambda w` is added to the gradient (SGD, Adam). "decoupled": the weight is
    multiplied by
    :math:`1-\eta\lambda` (AdamW).

    Args:
        optimizer: the optimizer; a subclass of a torch.optim class decays like that class.
        group: one of its param groups; torch's Adam family carries a flag there.

    Returns:
        ``None`` for an optimizer that is not known or has no ``weight_decay``.

    Example:
        >>> adam = torch.optim.Adam([torch.nn.Parameter(torch.randn(4, 3))])
        >>> decay_kind(adam, adam.param_groups[0])
        'coupled'
    """
    law = law_of(optimizer, group)
    return None if law is None else law[0]


def supports_decay_takeover(optimizer: Optimizer) -> str | None:
    """Why the weight decay of single weights cannot be taken over from ``optimizer``, or ``None``
    if it can.

    To take over the decay, a param group is shown to the optimizer as two for the duration of one
    step. That is right only if ``step``
    reads ``weight_decay`` from the group each time. torch's own optimizers do; for any other class
    a trial on scratch weights tells
    (`lightning_normdyn.optimizers.trial.try_decay`).

    Example:
        >>> supports_decay_takeover(torch.optim.AdamW([torch.nn.Parameter(torch.randn(4, 3))])) is None
        True
    """
    name = type(optimizer).__name__
    if is_schedule_free(optimizer):
        return f"{name} is schedule-free and keeps a second copy of the weights"
    if facts_of(optimizer).reads_decay:
        return None
    refusal = decay_trial(optimizer).refusal
    return None if refusal is None else f"of {name} it is not known how it decays: {refusal}"


def taken_over_by_trial(optimizer: Optimizer) -> bool:
    """Whether it is a trial, and not the table, that says the weight decay of ``optimizer`` can be
    taken over.

    Example:
        >>> taken_over_by_trial(torch.optim.AdamW([torch.nn.Parameter(torch.randn(4, 3))]))
        False
    """
    return not facts_of(optimizer).reads_decay and supports_decay_takeover(optimizer) is None


def step_buffer(optimizer: Optimizer, group: dict[str, Any]) -> str | None:
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


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` trains a weight that is an interpolation of others in its state
    (schedule-free): no rule here is right for it.

    Told by what it does: it has a mode for training and one for evaluation, and it sets weights
    back to points that it remembers. Names of
    attributes do not tell: SPlus has the modes as well, DAdaptSGD and FTRL have a buffer called
    "z".

    Example:
        >>> is_schedule_free(torch.optim.SGD([torch.nn.Parameter(torch.randn(2, 2))], lr=0.1))
        False
    """
    kind = type(optimizer)
    if facts_of(optimizer).known_class is not None:
        return False
    if any(c.__module__.split(".")[0] == "schedulefree" for c in kind.__mro__):
        return True
    has_modes = callable(getattr(kind, "train", None)) and callable(getattr(kind, "eval", None))
    return has_modes and sets_weights_back(optimizer) is not None


@torch.no_grad()
def rescale_batch_norm_(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    factor: Tensor,
    bias: Tensor | None,
    eps: float,
) -> None:
    r"""Make the running statistics behind rescaled filters those that the new weights would have
    gathered, in place.

    With :math:`c` = ``factor``, :math:`b` = ``bias``: mean :math:`m\to c\,m+(1-c)\,b`, variance
    :math:`v\to
    c^2(v+\epsilon)-\epsilon`. Evaluation right after equals evaluation right before, eps included.
    The variance may come out
    slightly negative (never below :math:`-\epsilon`); clamping it would be an error, since what the
    normalization uses is
    :math:`v+\epsilon`.

    For BatchNorm, SyncBatchNorm and InstanceNorm with running statistics, any ``momentum``
    (``None`` too), affine or not.

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
    # float64: the statistics of a float32 network then change by one rounding only
    c = factor.double()
    if running_mean is not None:
        mean = c * running_mean.double()
        running_mean.copy_(mean if bias is None else mean + (1 - c) * bias.double())
    if running_var is not None:
        var = running_var.double()
        running_var.copy_(
            torch.where(c == 1, var, c.square() * (var + eps) - eps)
        )  # v + eps - eps is not always v
