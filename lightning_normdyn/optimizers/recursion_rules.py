"""What step number t of each understood optimizer does with its gradient g and its buffer m.

The rules of `lightning_normdyn.optimizers.step_rules` say what a step comes to once the buffers are
filled. These say it of every single step, from the first on, so that the norm of a weight can be
followed through any schedule (`lightning_normdyn.theory.course`):

    m' = memory · m + taken · g        w' = (1 - lr·λ) w - lr · (newest · g + buffered · m') / s

Numbers are floats of the host. A rule answers ``None`` for settings that nobody has derived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from . import step_rules
from .group_numbers import Group, Number


@dataclass(frozen=True)
class SecondMoment:
    """V' = kept · V + taken · g², by which a step divides: s = √(V'/correction) + eps.

    Args:
        kept: share of the moment so far.
        taken: share of the present gradient.
        correction: of the bias of a young moment.
        start: V before the first step.
    """

    kept: float
    taken: float
    correction: float = 1.0
    start: float = 0.0


@dataclass(frozen=True)
class BufferStep:
    """One step of an optimizer with one buffer; symbols as in the module's docstring.

    Args:
        newest, buffered, memory, taken: the coefficients.
        second: None where the step is not divided by the size of the gradient.
        divides: whether the step is divided by the second moment already.
        eps: what is added to s.
        rate_factor: what the learning rate of the group is multiplied by.
        decay: λ, as the optimizer applies it.
        coupled: whether λ·w is added to the gradient.
        projected: whether the radial part of the step is removed.
        carried: the number that the next step is told.
        rests: whether the step leaves the weight as it is.
    """

    newest: float
    buffered: float
    memory: float = 0.0
    taken: float = 0.0
    second: SecondMoment | None = None
    divides: bool = True
    eps: float = 0.0
    rate_factor: float = 1.0
    decay: Number | None = 0.0
    coupled: bool = True
    projected: bool = False
    carried: float = 0.0
    rests: bool = False


RecursionRule = Callable[[Group, int, float], BufferStep | None]
"""Param group, number of the step from 1, what the step before has carried (0 at the first) -> what
the step does."""


def sgd(group: Group, step: int, has_buffer: float) -> BufferStep:
    """torch's SGD: momentum, dampening, Nesterov. It carries whether there is a buffer."""
    momentum, decay = group["momentum"], group["weight_decay"]
    if momentum == 0:
        # A buffer from earlier steps stays as it is.
        return BufferStep(1.0, 0.0, memory=1.0, decay=decay, carried=has_buffer)
    # The first buffer is the gradient itself.
    taken = 1 - group["dampening"] if has_buffer else 1.0
    newest, buffered = (1.0, momentum) if group["nesterov"] else (0.0, 1.0)
    return BufferStep(newest, buffered, momentum, taken, decay=decay, carried=1.0)


def sgdp(group: Group, step: int, carried: float) -> BufferStep | None:
    """SGDP (adamp): its buffer starts at zero."""
    response = step_rules.sgdp(group)
    if response is None:
        return None
    like_sgd = sgd(group, step, has_buffer=1.0)
    return replace(like_sgd, decay=response.decay, coupled=False, projected=True)


def adam(group: Group, step: int, carried: float) -> BufferStep | None:
    """torch's Adam without amsgrad."""
    response = step_rules.adam(group)
    return None if response is None else _adam(group, step, response.decay, response.coupled)


def adamw(group: Group, step: int, carried: float) -> BufferStep | None:
    """torch's AdamW without amsgrad."""
    response = step_rules.adamw(group)
    return None if response is None else _adam(group, step, response.decay, response.coupled)


def adamp(group: Group, step: int, carried: float) -> BufferStep | None:
    """AdamP (adamp): Adam whose steps are projected."""
    response = step_rules.adamp(group)
    if response is None:
        return None
    return replace(_adam(group, step, response.decay, coupled=False), projected=True)


def _adam(group: Group, step: int, decay: Number | None, coupled: bool) -> BufferStep:
    first, second = group["betas"]
    return BufferStep(
        0.0,
        1 / (1 - first**step),
        first,
        1 - first,
        SecondMoment(second, 1 - second, 1 - second**step),
        eps=group.get("eps", 0.0),
        decay=decay,
        coupled=coupled,
    )


def soap(group: Group, step: int, carried: float) -> BufferStep | None:
    """SOAP: Adam in another basis, which its first gradient only makes."""
    if step == 1:
        return BufferStep(0.0, 0.0, rests=True)
    response = step_rules.soap(group)
    return None if response is None else _adam(group, step - 1, response.decay, coupled=False)


def nadam(group: Group, step: int, product: float) -> BufferStep:
    """torch's NAdam. It carries the product of all μ so far."""
    present, following = map(float, step_rules.nadam_momenta(group, step))
    product = present * (product if step > 1 else 1.0)
    like_adam = _torch_adam(group, step)
    return replace(
        like_adam,
        newest=(1 - present) / (1 - product),
        buffered=following / (1 - product * following),
        carried=product,
    )


def radam(group: Group, step: int, carried: float) -> BufferStep:
    """torch's RAdam. Its first steps are not divided by the second moment."""
    like_adam = _torch_adam(group, step)
    rectified = step_rules.radam_rectification(group["betas"][1], step)
    if rectified is None:
        return replace(like_adam, divides=False)
    return replace(like_adam, buffered=like_adam.buffered * float(rectified))


def _torch_adam(group: Group, step: int) -> BufferStep:
    """One of torch's Adam family that decouples its decay by a flag."""
    decoupled = bool(group.get("decoupled_weight_decay"))
    return _adam(group, step, group["weight_decay"], coupled=not decoupled)


def rmsprop(group: Group, step: int, carried: float) -> BufferStep | None:
    """torch's RMSprop without momentum, not centered."""
    # Its momentum gathers steps that are divided already, each by the moment of its own time.
    if group["momentum"] != 0 or group["centered"]:
        return None
    alpha = group["alpha"]
    return BufferStep(
        1.0,
        0.0,
        second=SecondMoment(alpha, 1 - alpha),
        eps=group["eps"],
        decay=group["weight_decay"],
    )


def adagrad(group: Group, step: int, carried: float) -> BufferStep:
    """torch's Adagrad."""
    return BufferStep(
        1.0,
        0.0,
        second=SecondMoment(1.0, 1.0, start=group["initial_accumulator_value"]),
        eps=group["eps"],
        rate_factor=1 / (1 + (step - 1) * group["lr_decay"]),
        decay=group["weight_decay"],
    )
