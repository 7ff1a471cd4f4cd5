"""How an optimizer's step answers its gradients: the few numbers from which every prediction
follows, per param group.

The arithmetic of each optimizer stands in `lightning_normdyn.optimizers.step_rules`, and which class follows
which rule in
`lightning_normdyn.optimizers.facts`. Here is what they come to together with what callbacks do to
the weights. ``None`` means "not
understood", never a guess. Numbers may be floats or tensors; no tensor is looked into, so nothing
waits for a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from lightning_normdyn.optimizers.facts import response_of_class, steps_like
from lightning_normdyn.optimizers.group_numbers import Number, is_zero
from lightning_normdyn.optimizers.step_rules import StepResponse

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Number",
    "Options",
    "StepResponse",
    "is_rough",
    "is_zero",
    "own_response",
    "step_response",
    "steps_like",
]


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


def own_response(optimizer_class: type, group: Mapping[str, Any]) -> StepResponse | None:
    """`step_response` of the optimizer alone, with a decay of 0 as the number that it is."""
    return response_of_class(optimizer_class, group)


def step_response(
    optimizer_class: type, group: Mapping[str, Any], **options: Unpack[Options]
) -> StepResponse | None:
    """How the steps of a param group turn, grow and decay its weights; ``None`` for an optimizer
    that is not understood.

    Understood are torch's SGD (momentum, dampening, Nesterov), Adam and AdamW (no amsgrad), and by
    name SGDP, AdamP and Lion; subclasses
    that keep the step, too.

    Args:
        optimizer_class: class of the optimizer.
        group: its param group, as in ``optimizer.param_groups``.
        options: what callbacks do to its weights, :class:`Options`.

    Example:
        >>> import torch
        >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 5e-4}
        >>> response = step_response(torch.optim.SGD, group)
        >>> round(response.total, 6), round(response.turn, 4), response.power
        (10.0, 5.2632, 4)
    """
    response = own_response(optimizer_class, group)
    if response is None:
        return None
    shrink, decay, coupled = (
        options.get("shrink"),
        options.get("decay"),
        options.get("coupled", False),
    )
    projected = options.get("projected", False)
    if shrink is not None:
        response = replace(response, decay=shrink, coupled=coupled, adaptive=True)
    elif decay is not None:
        response = replace(response, decay=decay, coupled=coupled)
    elif projected and response.coupled:
        response = replace(response, decay=None)
    if projected:
        response = replace(response, growth=response.turn)
    return (
        replace(response, decay=None)
        if response.decay is not None and is_zero(response.decay)
        else response
    )


def is_rough(optimizer_class: type, group: Mapping[str, Any], **options: Unpack[Options]) -> bool:
    """Whether a prediction for this group is a rough one: Adam with coupled decay. ``options``:
    :class:`Options`.

    Example:
        >>> import torch
        >>> is_rough(torch.optim.Adam, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-4})
        True
    """
    response = step_response(optimizer_class, group, **options)
    return response is not None and response.rough
