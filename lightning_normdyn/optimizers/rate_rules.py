r"""The rate that an optimizer's next step really applies, as one rule per kind of optimizer.

A rule is asked right before a step, with the state as the last step left it, and answers for that
step. What counts as the rate is the factor :math:`\eta` in :math:`w' = w - \eta u` by the
optimizer's own words: bias corrections and trust ratios belong to the update :math:`u`, while a
schedule inside of the optimizer (Adafactor's relative step, a warmup), the estimate ``d`` of
D-Adaptation and Prodigy, and a scale by the size of the weight belong to the rate.

``None`` means "nobody can tell", never a guess. Numbers are floats, or tensors without dimensions
where they live on an accelerator: nothing here waits for a device. Which optimizer has which rule
stands in `lightning_normdyn.optimizers.facts`.
"""

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .group_numbers import Group, Number, as_number, group_number, is_zero

RateRule = Callable[[Optimizer, Group, Tensor], "Number | None"]
"""Optimizer, param group, weight of that group -> the rate of the weight's next step."""

# What D-Adaptation and Prodigy keep in a param group beside their estimate.
ADAPTATION_KEYS = frozenset(
    {
        "d0",
        "d_coef",
        "d_numerator",
        "numerator_weighted",
        "growth_rate",
        "gsq_weighted",
        "numerator",
    }
)


def plain(
    optimizer: Optimizer,
    group: Group,
    weight: Tensor,
) -> Number | None:
    """The rate is ``group["lr"]``; None where the group has none."""
    return as_number(group.get("lr"))


def lr_without_schedule(
    optimizer: Optimizer,
    group: Group,
    weight: Tensor,
) -> Number | None:
    """The rate is ``group["lr"]`` unless something speaks of another one."""
    # A "d" that no rule knows may be an estimate that the learning rate is multiplied by.
    if "d" in group or has_own_schedule(optimizer, group):
        return None
    return as_number(group.get("lr"))


def has_own_schedule(optimizer: Optimizer, group: Group) -> bool:
    """Whether a number of the group or of the optimizer speaks of a warmup that no rule knows."""
    for name, value in (*vars(optimizer).items(), *group.items()):
        speaks_of_it = "warm" in name.lower() and not name.startswith("_")
        if speaks_of_it and (value is True or as_number(value)):
            return True
    return False


def adagrad(
    optimizer: Optimizer,
    group: Group,
    weight: Tensor,
) -> Number | None:
    """torch's Adagrad divides its learning rate by 1 + (steps so far) · ``lr_decay``."""
    lr = as_number(group.get("lr"))
    slower = group_number(group, "lr_decay")
    if lr is None or is_zero(slower):
        return lr
    return lr / (1 + _steps_so_far(optimizer, group, weight) * slower)


def asgd(
    optimizer: Optimizer,
    group: Group,
    weight: Tensor,
) -> Number | None:
    """torch's ASGD keeps the rate of its next step in the state, from the first step on."""
    rate = _state_of(optimizer, weight).get("eta")
    return as_number(group.get("lr") if rate is None else rate)


def torch_adafactor(
    optimizer: Optimizer,
    group: Group,
    weight: Tensor,
) -> Number | None:
    """torch's Adafactor: min(lr, 1/√t) times the RMS of the weight."""
    lr = as_number(group.get("lr"))
    if lr is None:
        return None
    # The relative step of the paper, with the learning rate as its bound.
    relative = _smaller(lr, (_steps_so_far(optimizer, group, weight) + 1) ** -0.5)
    return _scaled_by_size(relative, weight, _second(group.get("eps")))


def adafactor(
    optimizer: Optimizer,
    group: Group,
    weight: Tensor,
) -> Number | None:
    """Adafactor as fairseq, transformers, timm and pytorch_optimizer write it.

    The rate is the learning rate or the relative step 1/√t, scaled by the RMS of the weight.
    """
    relative = bool(group.get("relative_step"))
    rate = as_number(group.get("lr"))
    if relative:
        step = _steps_so_far(optimizer, group, weight) + 1
        largest = 1e-6 * step if group.get("warmup_init") else 1e-2
        rate = _smaller(largest, step**-0.5)
    # timm names the bound of the scale, and scales a relative step only.
    scaled = bool(group.get("scale_parameter")) and (relative or "eps_scale" not in group)
    if rate is None or not scaled:
        return rate
    # Each package has its own place for the bound.
    bounds = (
        group.get("eps_scale"),
        group.get("eps2"),
        getattr(optimizer, "eps2", None),
        _second(group.get("eps")),
    )
    bound = next((bound for bound in bounds if bound is not None), None)
    return _scaled_by_size(rate, weight, bound)


def adaptation_name(optimizer_class: type) -> str | None:
    """The class of D-Adaptation or Prodigy that ``optimizer_class`` is or derives from."""
    names = (base.__name__ for base in optimizer_class.__mro__)
    return next((name for name in names if name.startswith(("DAdapt", "Prodigy"))), None)


def adaptation(
    optimizer: Optimizer,
    group: Group,
    weight: Tensor,
) -> Number | None:
    """D-Adaptation and Prodigy: d·lr, with the estimate d that the last step left."""
    # Prodigy with split groups keeps one estimate for each and may share the mean.
    is_shared = group.get("split_groups_mean") and group.get("shared_d")
    estimate = as_number(group.get("shared_d" if is_shared else "d"))
    lr = as_number(group.get("lr"))
    if estimate is None or lr is None:
        return None
    # Their SGD also divides by the norm of its first gradient, which the first step itself takes.
    if "SGD" in (adaptation_name(type(optimizer)) or "") and "g0_norm" not in group:
        return None
    first_gradient = as_number(group.get("g0_norm", 1.0))
    if first_gradient is None or (isinstance(first_gradient, float) and first_gradient <= 0):
        return None
    return estimate * lr / first_gradient


def heavyball(
    optimizer: Optimizer,
    group: Group,
    weight: Tensor,
) -> Number | None:
    """HeavyBall warms up inside of the step: lr · t / max(t, warmup_steps + 1)."""
    lr = as_number(group.get("lr"))
    warmup = group_number(group, "warmup_steps")
    if lr is None or (isinstance(warmup, float) and warmup <= 0):
        return lr
    # The count is of the steps before, and the coming one is asked for.
    step = group_number(group, "step_count") + 1
    return lr * _smaller(1.0, step / (warmup + 1))


def _state_of(optimizer: Optimizer, weight: Tensor) -> Group:
    """The state of one weight; empty before its first step, and where it is of another form."""
    # An optimizer of somebody may keep a list or an object there.
    states = optimizer.state if isinstance(optimizer.state, Mapping) else {}
    state = states.get(weight)
    return state if isinstance(state, Mapping) else {}


def _steps_so_far(
    optimizer: Optimizer,
    group: Group,
    weight: Tensor,
) -> Number:
    """Steps that this weight has made: counted in its state, or in the group for all weights."""
    state = _state_of(optimizer, weight)
    return group_number(group if state.get("step") is None else state, "step")


def _second(eps: Any) -> Any:
    """The bound of Adafactor's scale: the second of its two eps."""
    if isinstance(eps, (tuple, list)) and len(eps) == 2:
        return eps[1]
    return None


def _smaller(a: Number, b: Number) -> Number:
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    if isinstance(b, Tensor):
        return b.clamp(max=a)
    return min(a, b)


def _scaled_by_size(
    rate: Number,
    weight: Tensor,
    bound: object,
) -> Number | None:
    """``rate`` times the RMS of the weight, at least ``bound``: a tensor on the weight's device."""
    least = as_number(bound)
    # Only for a weight that lies in one piece on this rank: nobody knows what the optimizer
    # computes from a shard.
    in_one_piece = type(weight) in (Tensor, torch.nn.Parameter)
    if not isinstance(least, float) or not in_one_piece:
        return None
    values = weight.detach()
    # float32 at least: squares of a low-precision weight would overflow or vanish.
    accumulated = torch.promote_types(values.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=accumulated)
    size = norm / sqrt(max(1, values.numel()))
    return rate * size.clamp(min=least)
