"""How an optimizer's steps answer gradients, together with what callbacks do to the weights.

These few numbers per param group are what every prediction follows from
(`lightning_normdyn.theory.equilibrium`). ``None`` means "not understood", never a guess. Numbers
may be floats or tensors. No tensor is read, so nothing waits for a device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict

from .group_numbers import Group, Number, group_number, is_zero, with_plain_numbers
from .recognition import row_of
from .step_rules import StepResponse

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """What callbacks do to a weight beside its optimizer; each may be left out.

    Args:
        shrink: the weight decay that AWS (Adaptive Weight Shrink) amounts to at the present norm,
            α‖w‖ or α·std; replaces the group's.
        projected: the radial part of each step is removed (RadialProjection). A coupled decay is
            removed with it: give ``decay``.
        decay: weight decay applied by a callback instead of the group's.
        coupled: ``shrink`` or ``decay`` is added to the gradient (SGD and Adam). The callbacks of
            this package apply theirs to the weight.
    """

    shrink: Number | None
    projected: bool
    decay: Number | None
    coupled: bool


def own_response(optimizer_class: type, group: Group) -> StepResponse | None:
    """How the optimizer alone answers gradients, from its class and a param group.

    Unlike in `step_response`, a decay of 0 is the number that it is.
    """
    row = row_of(optimizer_class, group)
    if row is None or row.response is None:
        return None
    # The rules compute, and numpy numbers or Fractions would not go with tensors.
    plain = with_plain_numbers(group)
    plain["weight_decay"] = group_number(group, "weight_decay")
    return row.response(plain)


def step_response(
    optimizer_class: type, group: Group, **options: Unpack[Options]
) -> StepResponse | None:
    """How the steps of a param group turn, grow and decay its weights.

    Args:
        optimizer_class: class of the optimizer.
        group: its param group, as in ``optimizer.param_groups``.
        options: what callbacks do to its weights, :class:`Options`.

    Returns:
        ``None`` for an optimizer that is not understood. Understood are torch's SGD (momentum,
        dampening, Nesterov), Adam and AdamW (no amsgrad), by name SGDP, AdamP and Lion, and
        subclasses that keep the step of one of these.

    Example:
        >>> import torch
        >>> group = dict(lr=0.1, momentum=0.9, dampening=0, nesterov=False, weight_decay=5e-4)
        >>> response = step_response(torch.optim.SGD, group)
        >>> round(response.total, 6), round(response.turn, 4), response.power
        (10.0, 5.2632, 4)
    """
    response = own_response(optimizer_class, group)
    if response is None:
        return None
    shrink, decay = options.get("shrink"), options.get("decay")
    coupled = options.get("coupled", False)
    projected = options.get("projected", False)
    # AWS is the decay where it acts, so it comes before any other.
    if shrink is not None:
        response = replace(response, decay=shrink, coupled=coupled, adaptive=True)
    elif decay is not None:
        response = replace(response, decay=decay, coupled=coupled)
    elif projected and response.coupled:
        # The decay is inside the step, along the weight: the projection removes it.
        response = replace(response, decay=None)
    if projected:
        response = response.projected()
    # Without decay there is no equilibrium, and so no prediction, not one of 0.
    if response.decay is not None and is_zero(response.decay):
        response = replace(response, decay=None)
    return response
