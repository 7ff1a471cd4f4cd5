"""How an optimizer's steps answer gradients, together with what callbacks do to the weights.

These few numbers per param group are what every prediction follows from
(`lightning_normdyn.theory.equilibrium`). ``None`` means "not understood", never a guess. Numbers
may be floats or tensors. No tensor is read, so nothing waits for a device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

from .group_numbers import (
    Group,
    Number,
    as_number,
    group_number,
    is_zero,
    with_plain_numbers,
)
from .recognition import row_of
from .step_rules import StepResponse, Subject

if TYPE_CHECKING:
    from typing_extensions import Unpack

DecayRate = Literal["lr", "lr_squared", "schedule", "constant"]
"""What λ is multiplied by in one step: lr; lr²/lr_max (corrected decay, which keeps the norm
through a schedule); lr/lr_max, or 1 (independent decay)."""

# The power of lr that λ itself then stands for, since the decay of a step is lr times it.
_LR_POWERS = {"lr": 0, "lr_squared": 1, "schedule": 0, "constant": -1}


class Options(TypedDict, total=False):
    """What callbacks do to a weight beside its optimizer, and what of the weight some optimizers
    depend on; each may be left out.

    Args:
        shrink: the weight decay that AWS (Adaptive Weight Shrink) amounts to at the present norm,
            α‖w‖ or α·std; replaces the group's.
        projected: the radial part of each step is removed (RadialProjection). A coupled decay is
            removed with it: give ``decay``.
        decay: weight decay applied by a callback instead of the group's.
        coupled: ``shrink`` or ``decay`` is added to the gradient (SGD and Adam). The callbacks of
            this package apply theirs to the weight.
        decay_rate: what ``decay`` (or else the group's) is multiplied by in a step,
            :data:`DecayRate`. All but ``"lr"`` are applied to the weight.
        lr_max: largest learning rate of the schedule, for ``"lr_squared"`` and ``"schedule"``;
            left out: the largest that the group names (``max_lr``, ``initial_lr``, ``lr``).
        cautious: the decay acts only on entries that the step does not lengthen.
        shape: rows and columns of the matrix; Muon has no prediction without.
        step: number of the step, from 1; without it NAdam and RAdam are predicted in their limit.
    """

    shrink: Number | None
    projected: bool
    decay: Number | None
    coupled: bool
    decay_rate: DecayRate
    lr_max: Number | None
    cautious: bool
    shape: tuple[int, int] | None
    step: Number | None


def check_options(options: Options) -> None:
    """Refuse what is no option: a misspelled one would be a prediction for something else.

    Raises:
        TypeError: for an unknown name.
        ValueError: for an unknown ``decay_rate``.
    """
    for name in options:
        if name not in Options.__annotations__:
            raise TypeError(
                f"Unexpected keyword argument {name!r}; known are "
                f"{', '.join(Options.__annotations__)}."
            )
    rate = options.get("decay_rate", "lr")
    if rate not in _LR_POWERS:
        raise ValueError(f"`decay_rate` must be one of {', '.join(_LR_POWERS)}, got {rate!r}.")


class StepDecay(NamedTuple):
    """The decay of one step.

    Args:
        decay: λ in 1/(step·lr); None without decay, or where nobody has derived it.
        coupled: whether it is added to the gradient.
        adaptive: whether it is proportional to ‖w‖ (AWS).
        lr_power: the power of lr that it is proportional to.
    """

    decay: Number | None
    coupled: bool
    adaptive: bool = False
    lr_power: int = 0


def decay_under(options: Options, own: StepDecay, group: Group) -> StepDecay:
    """What the decay of an optimizer's step becomes under callbacks.

    Args:
        options: what they do.
        own: what the optimizer itself does to the weight.
        group: its param group.
    """
    shrink, decay = options.get("shrink"), options.get("decay")
    rate = options.get("decay_rate", "lr")
    coupled = options.get("coupled", False)
    # AWS is the decay where it acts, so it comes before any other.
    if shrink is not None:
        # Nobody has derived a shrink by another power of the rate.
        return StepDecay(shrink if rate == "lr" else None, coupled, adaptive=True)
    if rate == "lr":
        return own if decay is None else StepDecay(decay, coupled)
    # The number as it is written: such a decay is taken over from the optimizer, and with it goes
    # what momentum makes of it.
    written = group_number(group, "weight_decay") if decay is None else decay
    factor = rate_factor(rate, group, options.get("lr_max"))
    scaled = None if factor is None else written * factor
    return StepDecay(scaled, coupled=False, lr_power=_LR_POWERS[rate])


def rate_factor(rate: DecayRate, group: Group, lr_max: Number | None) -> Number | None:
    """What makes of λ the decay in 1/(step·lr); None at a learning rate of 0 where it matters."""
    if rate == "lr":
        return 1.0
    lr = as_number(group.get("lr"))
    if lr is None:
        return None
    if rate == "constant":
        return None if is_zero(lr) else 1 / lr
    largest = as_number(lr_max)
    if largest is None:
        largest = largest_rate(group)
    if largest is None or is_zero(largest):
        return None
    return lr / largest if rate == "lr_squared" else 1 / largest


def named_rates(group: Group) -> list[Number]:
    """The learning rates that a param group names: of its schedule and of now."""
    rates = [as_number(group.get(key)) for key in ("max_lr", "initial_lr", "lr")]
    return [rate for rate in rates if rate is not None]


def largest_rate(group: Group) -> Number | None:
    """The largest learning rate that a param group names; None if one lives on a device."""
    numbers = named_rates(group)
    # Comparing them would wait for the device.
    if not all(isinstance(number, float) for number in numbers):
        return None
    return max(numbers, default=None)


def own_response(
    optimizer_class: type, group: Group, subject: Subject | None = None
) -> StepResponse | None:
    """How the optimizer alone answers gradients, from its class and a param group.

    Unlike in `step_response`, a decay of 0 is the number that it is.
    """
    row = row_of(optimizer_class, group)
    if row is None:
        return None
    # The rules compute, and numpy numbers or Fractions would not go with tensors.
    plain = plain_group(group)
    if row.response_of is not None:
        return row.response_of(plain, subject or Subject())
    return None if row.response is None else row.response(plain)


def plain_group(group: Group) -> Group:
    """``group`` as rules read it: plain numbers, and always a ``weight_decay``."""
    return {**with_plain_numbers(group), "weight_decay": group_number(group, "weight_decay")}


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
        dampening, Nesterov), Adam and AdamW (no amsgrad), NAdam and RAdam with decoupled decay,
        Muon in its default setting, by name SGDP, AdamP, Lion and SOAP, and subclasses that keep
        the step of one of these.

    Raises:
        TypeError: for an option that does not exist.

    Example:
        >>> import torch
        >>> group = dict(lr=0.1, momentum=0.9, dampening=0, nesterov=False, weight_decay=5e-4)
        >>> response = step_response(torch.optim.SGD, group)
        >>> round(response.total, 6), round(response.turn, 4), response.power
        (10.0, 5.2632, 4)
    """
    check_options(options)
    subject = Subject(options.get("shape"), options.get("step"))
    own = own_response(optimizer_class, group, subject)
    return None if own is None else response_under(own, group, **options)


def response_under(own: StepResponse, group: Group, **options: Unpack[Options]) -> StepResponse:
    """What the response of an optimizer's steps becomes under callbacks.

    Args:
        own: how the optimizer alone answers gradients, which weights of a param group share.
        group: the param group.
        options: what callbacks do, as `check_options` allows it.
    """
    decay = decay_under(options, StepDecay(own.decay, own.coupled), group)
    response = replace(own, **decay._asdict(), cautious=options.get("cautious", False))
    if options.get("projected", False):
        # A coupled decay of the optimizer is inside the step, along the weight: the projection
        # removes it.
        replaced = options.get("shrink") is not None or options.get("decay") is not None
        if response.coupled and not replaced:
            response = replace(response, decay=None)
        response = response.projected()
    # Without decay there is no equilibrium, and so no prediction, not one of 0.
    if response.decay is not None and is_zero(response.decay):
        response = replace(response, decay=None)
    return response
