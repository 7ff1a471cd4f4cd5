"""The rate that the next step of an optimizer really applies to a weight.

Rules that act in proportion to the rate (Adaptive Weight Shrink, a decay of their own) and the
effective learning rates that are logged ask here. For most optimizers it is the learning rate of
the param group; the rules for the others stand in `lightning_normdyn.optimizers.rate_rules`.
"""

from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.optimizers import rate_rules
from lightning_normdyn.optimizers.facts import DecayLaw
from lightning_normdyn.optimizers.group_numbers import Group, Number, as_number
from lightning_normdyn.optimizers.recognition import answer_once, facts_of
from lightning_normdyn.optimizers.scratch import is_scratch
from lightning_normdyn.optimizers.trial import DecayTrial, try_decay


def applied_rate(
    optimizer: Optimizer,
    group: Group,
    weight: Tensor,
) -> Number | None:
    """The rate that the next step of ``optimizer`` really applies to ``weight``.

    Args:
        optimizer: the optimizer, right before its step.
        group: the param group of ``weight``.
        weight: the parameter.

    Returns:
        A float, or a tensor without dimensions on the weight's device: nothing waits for a device.
        None if nobody can tell.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> applied_rate(sgd, sgd.param_groups[0], weight)
        0.1
    """
    rate = facts_of(optimizer, group).rate(optimizer, group, weight)
    lr = as_number(group.get("lr"))
    if rate is not None or lr is None or not rate_rules.has_own_schedule(optimizer, group):
        return rate
    # The trial of a decay asks for the rate, so it must not be made on top of itself.
    if is_scratch(optimizer):
        return None
    # The optimizer speaks of a warmup, of its rate or of something else. Its weight decay tells: if
    # that acts in proportion to the learning rate as it is written, so does the step.
    at_lr = decay_trial(optimizer).law == DecayLaw("decoupled", "lr")
    return lr if at_lr else None


def decay_trial(optimizer: Optimizer) -> DecayTrial:
    """What a trial says about the weight decay of an optimizer whose step nobody has read.

    It stands beside `applied_rate` because each of the two may have to ask the other.
    """
    return answer_once(optimizer, "decay", lambda: try_decay(optimizer, applied_rate))


def has_plain_rate(optimizer: Optimizer) -> bool:
    """Whether the rate is the learning rate of the param group for certain.

    Of any other optimizer, a step itself may move the rate on.
    """
    return facts_of(optimizer).rate is rate_rules.plain


def rate_differs_within(optimizer: Optimizer, group: Group) -> bool:
    """Whether `applied_rate` may differ between the weights of one group."""
    return facts_of(optimizer, group).rate_by_weight
