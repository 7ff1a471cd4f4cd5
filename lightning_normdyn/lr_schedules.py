r"""Weight decay as a learning rate schedule (AWS paper, eq. 14-17).

A scale-invariant weight under SGD takes the same directions with weight decay and without it, if
the learning rate makes up for the length that the decay would have taken. One number per param
group carries the difference: let :math:`p_t` be a scalar weight stepped by the same SGD (same
learning rate, momentum, dampening and weight decay) with gradient zero from :math:`p_0 = 1`. Then
training without decay at the learning rates :math:`\eta_t / (p_t p_{t+1})` keeps :math:`w^{decay}_t
= p_t w_t` at every step. (The printed eq. 15 is off by one step.)
"""

import math
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_normdyn.errors import NormDynError, NotSupportedError, shown
from lightning_normdyn.optimizers.group_numbers import as_number
from lightning_normdyn.optimizers.recognition import facts_of

__all__ = ["WeightDecayEquivalentLR", "weight_decay_equivalent_lrs"]


def weight_decay_equivalent_lrs(
    lrs: Iterable[float], weight_decay: float, *, momentum: float = 0.0, dampening: float = 0.0
) -> list[float]:
    """The decay-free learning rates for a whole schedule that is known ahead.

    Args:
        lrs: learning rate of each optimizer step of the run with decay.
        weight_decay: its λ, coupled (torch's SGD).
        momentum, dampening: as in torch's SGD, without Nesterov.

    Returns:
        one learning rate per step.

    Raises:
        NotSupportedError: if the scalar that carries the decay does not stay positive.

    Example:
        >>> lrs = weight_decay_equivalent_lrs([0.1, 0.1, 0.01], 0.5)
        >>> [round(lr, 4) for lr in lrs]  # 0.1 · 0.95^-1, 0.1 · 0.95^-3, ...
        [0.1053, 0.1166, 0.0123]
    """
    decay = _Decay(weight_decay, momentum, dampening)
    scalar, velocity = 1.0, None
    compensated = []
    for step, lr in enumerate(lrs):
        compensated.append(decay.compensated(scalar, velocity, lr, step))
        scalar, velocity = decay.after(scalar, velocity, lr)
    return compensated


class _Decay(NamedTuple):
    """torch.optim.SGD on a number with gradient zero: the scalar that carries the decay."""

    weight_decay: float
    momentum: float
    dampening: float

    def after(self, scalar: float, velocity: float | None, lr: float) -> tuple[float, float]:
        """The number and its momentum buffer after one step."""
        pull = self.weight_decay * scalar
        # torch starts the buffer with the undamped first gradient, and keeps none without momentum.
        if velocity is None or not self.momentum:
            velocity = pull
        else:
            velocity = self.momentum * velocity + (1 - self.dampening) * pull
        return scalar - lr * velocity, velocity

    def compensated(self, scalar: float, velocity: float | None, lr: float, step: int) -> float:
        """lr / (p_t p_{t+1}), as long as there is one."""
        following, _ = self.after(scalar, velocity, lr)
        if not following > 0:
            raise NotSupportedError(
                f"A decay-free schedule equivalent to weight_decay={self.weight_decay:g} at "
                f"lr={lr:g}, momentum={self.momentum:g} was asked for, but the scalar that carries "
                f"the decay is not positive after step {step}: the decay turns weights around. At "
                f"a constant learning rate it stays positive while lr x weight_decay < (1 - "
                f"sqrt(momentum))² = {(1 - math.sqrt(self.momentum)) ** 2:.3g}: lower one of them."
            )
        # Divided twice: the product of two tiny scalars would underflow first.
        compensated = lr / scalar / following
        if compensated == math.inf:
            raise NotSupportedError(
                f"A decay-free schedule equivalent to weight_decay={self.weight_decay:g} was asked "
                f"for, but its learning rate overflows at step {step}, where decay has shrunk the "
                f"weights to {scalar:.1g} of their length. Train with the decay itself, or for "
                f"fewer steps."
            )
        return compensated


class WeightDecayEquivalentLR(LRScheduler):
    """Train without weight decay along the directions that weight decay would take (AWS paper).

    Eq. 14-17, index corrected. For SGD with heavy-ball momentum and dampening, on scale-invariant
    weights, under any inner schedule. Step it after every optimizer step (in Lightning:
    ``{"scheduler": ..., "interval": "step"}``); the inner schedule counts the same steps and is
    stepped from here. A step that the gradient scaler skips moves the inner schedule, as it would
    without this class, but not the decay.

    Exact for weight normalization and weight standardization (directions agree to 4e-15 over 500
    steps). Behind BatchNorm the deviation is proportional to its ``eps``, which matters the less
    the longer the weight: 2e-12 to 3e-11 with eps 1e-12, 2e-5 to 3e-4 with the default 1e-5,
    measured on a small network; up to order 1 where decay makes weights tiny. Clip no gradients by
    norm: those of the longer weights are smaller. A skip inside a fused optimizer is not seen.

    Args:
        optimizer: a ``torch.optim.SGD`` with ``weight_decay=0`` and without Nesterov.
        weight_decay: λ of the run to be reproduced, coupled (torch's SGD); or one per param group,
            where 0 leaves the group to the inner schedule. A group with a λ may hold
            scale-invariant weights only: others would feel the learning rate without the decay.
        inner: the schedule of the run to be reproduced, on the same optimizer; ``None`` for a
            constant learning rate.

    Raises:
        NotSupportedError: for another optimizer, Nesterov, a group that has a weight decay already
            or holds parameters of fewer than two dimensions, a ``ReduceLROnPlateau``; and for a
            learning rate and decay under which the scalar does not stay positive: at once for a
            constant learning rate, at the step in question under a schedule
            (:func:`weight_decay_equivalent_lrs` tells ahead).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3, 2))
        >>> weight.grad = torch.zeros(3, 2)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> inner = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30)
        >>> scheduler = WeightDecayEquivalentLR(optimizer, 5e-3, inner=inner)
        >>> for _ in range(2):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> round(scheduler.get_last_lr()[0], 5)
        0.10043
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weight_decay: float | Sequence[float],
        *,
        inner: LRScheduler | None = None,
    ) -> None:
        self._weight_decays = _one_per_group(weight_decay, optimizer)
        _refuse_what_is_not_exact(optimizer, self._weight_decays, inner)
        self.inner = inner
        groups = optimizer.param_groups
        self._inner_lrs = [float(group["lr"]) for group in groups]
        self._scalars = [1.0] * len(groups)
        self._velocities: list[float | None] = [None] * len(groups)
        self._steps_taken = 0
        # Real optimizer steps since the last step of this schedule.
        self._steps_unseen = 0
        self.optimizer = optimizer
        if inner is None:
            # Refuse at once a constant learning rate under which the decay turns weights around.
            for lr, decay in zip(self._inner_lrs, self._decays(), strict=True):
                pull = lr * decay.weight_decay
                if pull:
                    # By running its scalar ahead: if it changes its sign, it does so soon.
                    steps = min(10_000, math.ceil(30 / pull))
                    weight_decay_equivalent_lrs([lr] * steps, **decay._asdict())
        # The base class steps once in its __init__, to write the first learning rates: there is no
        # optimizer step to follow yet.
        self._constructed = False
        super().__init__(optimizer)
        self._constructed = True
        # Counted by the optimizer itself: a skipped step never calls its hooks.
        optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._steps_unseen += 1

    def step(self, epoch: int | None = None) -> None:
        """Follow one optimizer step: advance the scalars by it, and set the next learning rates."""
        if epoch is not None:
            raise NormDynError(
                f"`WeightDecayEquivalentLR` goes step by step, but was asked for epoch={epoch}. "
                "Call `step()`."
            )
        if self._constructed:
            self._follow()
        super().step()

    def _follow(self) -> None:
        groups = self.optimizer.param_groups
        # A group that joins later has no scalar, and its weights no history to make up for.
        if len(groups) != len(self._scalars):
            raise NotSupportedError(
                f"`WeightDecayEquivalentLR` was made for {len(self._scalars)} param groups, but "
                f"the optimizer now has {len(groups)}. Make the schedule after the last group is "
                "added."
            )
        if self._steps_unseen > 1:
            raise NormDynError(
                "`WeightDecayEquivalentLR` must be stepped after every optimizer step, but "
                f"{self._steps_unseen} were taken since its last step. In Lightning, return "
                '{"scheduler": ..., "interval": "step"} from configure_optimizers.'
            )
        # Without a real step (a gradient scaler skipped it) the decay does not act.
        if self._steps_unseen == 1:
            for i, decay in enumerate(self._decays()):
                self._scalars[i], self._velocities[i] = decay.after(
                    self._scalars[i], self._velocities[i], self._inner_lrs[i]
                )
            self._steps_taken += 1
            self._steps_unseen = 0
        if self.inner is not None:
            # An inner schedule goes on from the learning rate that it finds.
            for group, lr in zip(groups, self._inner_lrs, strict=True):
                # A tensor stays the same tensor: captured and compiled steps hold on to it.
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
            self.inner.step()
            self._inner_lrs = [float(group["lr"]) for group in groups]

    def _decays(self) -> list[_Decay]:
        """Of each group, with the numbers that it has now."""
        return [
            _Decay(weight_decay, float(group["momentum"]), float(group["dampening"]))
            for weight_decay, group in zip(
                self._weight_decays, self.optimizer.param_groups, strict=True
            )
        ]

    # Floats, where the base class also speaks of tensors.
    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rates of the next step: those of the inner schedule over p_t p_{t+1}."""
        # Without decay the scalar stays 1, and so does the learning rate of the schedule.
        return [
            decay.compensated(
                self._scalars[i], self._velocities[i], self._inner_lrs[i], self._steps_taken
            )
            for i, decay in enumerate(self._decays())
        ]

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists, and the inner schedule's own state under ``"inner"``."""
        state: dict[str, Any] = super().state_dict()
        if self.inner is not None:
            state["inner"] = self.inner.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Restore the optimizer as well: it holds the learning rate of the next step.
        """
        state = dict(state_dict)
        inner = state.pop("inner")
        if (inner is None) != (self.inner is None):
            raise NormDynError(
                f"A state of `WeightDecayEquivalentLR` saved {_with(inner)} an inner schedule was "
                f"given to one {_with(self.inner)}. Build the schedule as in the saved run."
            )
        self.__dict__.update(state)
        if self.inner is not None:
            self.inner.load_state_dict(inner)


def _with(inner: object) -> str:
    return "without" if inner is None else "with"


def _one_per_group(weight_decay: float | Sequence[float], optimizer: Optimizer) -> list[float]:
    groups = len(optimizer.param_groups)
    try:
        one = as_number(weight_decay)
        if one is None:
            decays = list(map(float, cast("Sequence[float]", weight_decay)))
        else:
            decays = [float(one)] * groups
    # An integer may be too large for a float.
    except OverflowError as error:
        raise NormDynError(f"`weight_decay` must be finite, got {shown(weight_decay)}.") from error
    if len(decays) != groups:
        raise NormDynError(
            f"`weight_decay` must be one number, or one per param group ({groups}), got "
            f"{len(decays)}."
        )
    # Per group, 0 means "as it is". Zeros alone would leave nothing to do, which nobody means.
    if not all(0 <= decay < math.inf for decay in decays) or not any(decays):
        raise NormDynError(
            f"`weight_decay` must be > 0 (per group: >= 0, and > 0 for at least one), got "
            f"{weight_decay!r}."
        )
    return decays


def _refuse_what_is_not_exact(
    optimizer: Optimizer, weight_decays: list[float], inner: LRScheduler | None
) -> None:
    """Everything that is known at construction."""
    if not facts_of(optimizer).proportional:
        raise NotSupportedError(
            f"`WeightDecayEquivalentLR` was asked for {type(optimizer).__name__}, but the "
            "equivalence holds for torch.optim.SGD only: other optimizers do not step in "
            "proportion to the gradient. Use the weight decay itself."
        )
    for i, group in enumerate(optimizer.param_groups):
        if not weight_decays[i]:
            continue
        if group["nesterov"]:
            raise NotSupportedError(
                f"`WeightDecayEquivalentLR` was asked for param group {i} with nesterov=True, "
                "where no scalar reproduces the decay (directions end 8e-3 apart after 500 steps). "
                "Use heavy-ball momentum."
            )
        if group["weight_decay"] != 0:
            raise NotSupportedError(
                f"`WeightDecayEquivalentLR` takes the place of weight decay, but param group {i} "
                f"has weight_decay={group['weight_decay']:g} as well. Set it to 0."
            )
        thin = _of_fewer_than_two_dimensions(group)
        if thin:
            raise NotSupportedError(
                f"`WeightDecayEquivalentLR` was asked for param group {i}, which mixes weights "
                f"with parameters of fewer than two dimensions ({thin}): those are not "
                "scale-invariant. Put them into a group of their own and give one `weight_decay` "
                "per group, 0 for that one."
            )
    if isinstance(inner, ReduceLROnPlateau | WeightDecayEquivalentLR):
        raise NotSupportedError(
            f"`inner` must be a schedule that `step()` moves, got {type(inner).__name__}. Use "
            f"MultiStepLR, for example."
        )
    if inner is not None and inner.optimizer is not optimizer:
        raise NormDynError(
            "`inner` belongs to another optimizer than the one given. Build both on the same."
        )


def _of_fewer_than_two_dimensions(group: dict[str, Any]) -> str:
    """The first three of these parameters with their shapes, in words."""
    names = group.get("param_names") or map("parameter {}".format, count())
    thin = []
    for name, parameter in zip(names, group["params"], strict=False):
        if parameter.dim() < 2:
            thin.append(f"{name} {list(parameter.shape)}")
    if len(thin) > 3:
        thin[3:] = ["..."]
    return ", ".join(thin)
