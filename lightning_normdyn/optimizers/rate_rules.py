r"""The rate that an optimizer's next step really applies, where that is not ``group["lr"]``.

A rule is asked right before a step, with the state as the last step left it, and answers for that
step. What counts as the rate is the
factor :math:`\eta` in :math:`w' = w - \eta u` by the optimizer's own words: bias corrections and
trust ratios belong to the update
:math:`u`, a schedule inside of the optimizer (Adafactor's relative step, a warmup), the estimate
``d`` of D-Adaptation and Prodigy, and a
scale by the size of the weight belong to the rate.

``None`` means "nobody can tell", never a guess. Numbers are floats, or tensors without dimensions
where they live on an accelerator:
nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.optimizers.group_numbers import Number, as_number, group_number

__all__ = ["RateRule", "adagrad", "asgd", "by_keys", "has_own_schedule", "plain", "torch_adafactor"]

RateRule: TypeAlias = Callable[[Optimizer, Mapping[str, Any], Tensor], "Number | None"]
"""Optimizer, param group, weight of that group -> the rate of the weight's next step."""

# What D-Adaptation and Prodigy keep in a param group beside their estimate "d". Other optimizers
# call other things "d".
_ADAPTATION_KEYS = frozenset(
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
_ADAPTATION_NAMES = ("DAdapt", "Prodigy")


def plain(optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor) -> Number | None:
    """The rate is ``group["lr"]``; None where the group has none."""
    return as_number(group.get("lr"))


def adagrad(optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor) -> Number | None:
    """torch's Adagrad divides its learning rate by 1 + (steps so far) · ``lr_decay``."""
    lr = as_number(group.get("lr"))
    slower = group_number(group, "lr_decay")
    if lr is None or (isinstance(slower, float) and slower == 0):
        return lr
    return lr / (1 + _steps_so_far(optimizer, group, weight) * slower)


def asgd(optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor) -> Number | None:
    """torch's ASGD keeps the rate of its next step in the state, from the first step on."""
    kept = _state_of(optimizer, weight).get("eta")
    lr = as_number(group.get("lr"))
    return lr if kept is None else as_number(kept)


def torch_adafactor(
    optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor
) -> Number | None:
    """torch's Adafactor: min(lr, 1/√t) times the RMS of the weight."""
    lr = as_number(group.get("lr"))
    if lr is None:
        return None
    relative = _smaller(lr, (_steps_so_far(optimizer, group, weight) + 1) ** -0.5)
    return _scaled_by_size(relative, weight, _second(group.get("eps")))


def by_keys(optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor) -> Number | None:
    """The rate of a class of which only the param groups are known: its keys say of which family it
    is."""
    if "relative_step" in group or "scale_parameter" in group:
        return _adafactor(optimizer, group, weight)
    if "d" in group:
        return _adaptation(optimizer, group)
    lr = as_number(group.get("lr"))
    if lr is None:
        return None
    if "base_lr" in group or "step_count" in group or _is_heavyball(optimizer):
        return _heavyball(group, lr)
    if has_own_schedule(optimizer, group):
        return None
    return lr


def _adafactor(optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor) -> Number | None:
    """Adafactor as fairseq, transformers, timm and pytorch_optimizer write it: the relative step
    1/√t, scaled by the RMS of the weight."""
    relative = bool(group.get("relative_step"))
    if relative:
        step = _steps_so_far(optimizer, group, weight) + 1
        rate: Number | None = _smaller(
            1e-6 * step if group.get("warmup_init") else 1e-2, step**-0.5
        )
    else:
        rate = as_number(group.get("lr"))
    # timm scales a relative step only, and names the bound of the scale.
    scaled = bool(group.get("scale_parameter")) and (relative or "eps_scale" not in group)
    if rate is None or not scaled:
        return rate
    bound = next((group[key] for key in ("eps_scale", "eps2") if key in group), None)
    if bound is None:
        bound = getattr(optimizer, "eps2", None)
    if bound is None:
        bound = _second(group.get("eps"))
    return _scaled_by_size(rate, weight, bound)


def _adaptation(optimizer: Optimizer, group: Mapping[str, Any]) -> Number | None:
    """D-Adaptation and Prodigy: d·lr, with the estimate d that the last step left; their SGD also
    divides by its first gradient."""
    name = next(
        (c.__name__ for c in type(optimizer).__mro__ if c.__name__.startswith(_ADAPTATION_NAMES)),
        None,
    )
    if name is None and not _ADAPTATION_KEYS & group.keys():
        return None
    estimate = as_number(group.get("d"))
    if group.get("split_groups_mean") and group.get("shared_d"):
        estimate = as_number(group["shared_d"])
    lr = as_number(group.get("lr"))
    if estimate is None or lr is None:
        return None
    if name is not None and "SGD" in name and "g0_norm" not in group:
        return None  # the first step takes the norm of its gradient first
    first_gradient = as_number(group.get("g0_norm", 1.0))
    if first_gradient is None or (isinstance(first_gradient, float) and first_gradient <= 0):
        return None
    return estimate * lr / first_gradient


def _heavyball(group: Mapping[str, Any], lr: Number) -> Number | None:
    """HeavyBall warms up inside of the step: lr · t / max(t, warmup_steps + 1)."""
    warmup = group_number(group, "warmup_steps")
    if isinstance(warmup, float) and warmup <= 0:
        return lr
    step = group_number(group, "step_count") + 1
    if isinstance(step, Tensor) or isinstance(warmup, Tensor):
        device = step.device if isinstance(step, Tensor) else warmup.device  # type: ignore[union-attr]
        share = torch.as_tensor(step / (warmup + 1), dtype=torch.float32, device=device)
        return lr * share.clamp(max=1.0)
    return lr * min(1.0, step / (warmup + 1))


def _is_heavyball(optimizer: Optimizer) -> bool:
    return any(c.__module__.split(".")[0] == "heavyball" for c in type(optimizer).__mro__)


def has_own_schedule(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a number of the group or of the optimizer speaks of a warmup or warmdown that we do
    not know."""
    named = {**{k: v for k, v in vars(optimizer).items() if not k.startswith("_")}, **group}
    return any(
        "warm" in key.lower() and bool(as_number(value) or value is True)
        for key, value in named.items()
        if key != "params"
    )


def _state_of(optimizer: Optimizer, weight: Tensor) -> Mapping[str, Any]:
    """The state of one weight; empty before its first step, and where the optimizer keeps something
    else there."""
    state = optimizer.state.get(weight) if isinstance(optimizer.state, Mapping) else None
    return state if isinstance(state, Mapping) else {}


def _steps_so_far(optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor) -> Number:
    """Steps that this weight has made: counted in its state, or in the group for all of its
    weights."""
    kept = _state_of(optimizer, weight).get("step")
    return group_number(group if kept is None else {"step": kept}, "step")


def _second(eps: Any) -> Any:
    """The bound of Adafactor's scale: the second of its two eps."""
    return eps[1] if isinstance(eps, (tuple, list)) and len(eps) == 2 else None


def _smaller(a: Number, b: Number) -> Number:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        device = a.device if isinstance(a, Tensor) else b.device  # type: ignore[union-attr]
        return torch.minimum(
            torch.as_tensor(a, dtype=torch.float32, device=device),
            torch.as_tensor(b, dtype=torch.float32, device=device),
        )
    return min(a, b)


def _scaled_by_size(rate: Number, weight: Tensor, bound: object) -> Number | None:
    """``rate`` times the RMS of the weight, at least ``bound``: on the weight's device, since it is
    computed from it.

    Only for a weight that lies in one piece on this rank: what the optimizer computes from a shard
    is not known.
    """
    least = as_number(bound)
    if not isinstance(least, float) or type(weight) not in (Tensor, torch.nn.Parameter):
        return None
    values = weight.detach()
    accumulated = torch.promote_types(values.dtype, torch.float32)
    size: Tensor = torch.linalg.vector_norm(values, dtype=accumulated) / sqrt(
        max(1, values.numel())
    )
    return rate * size.clamp(min=least)
