r"""Who decays a weight, and by how much: the one place.

A weight has the decay of its optimizer, unless a callback claims it. What is told here is the
*decoupled equivalent* :math:`\lambda`: in
one step the weight is multiplied by :math:`1 - \eta\lambda`, whatever form the decay was written
in.

- Decoupled decay (AdamW) is that already.
- Coupled decay is added to the gradient, so momentum repeats it: under SGD with momentum
  :math:`\beta` and dampening :math:`d` it acts like
  :math:`\lambda (1-d)/(1-\beta)`, ten times what is written at :math:`\beta = 0.9`. Exact in the
  mean, once the buffer is filled.
- Coupled decay under Adam is divided by the size of the gradient: no number says what it comes to.

The act (RadialProjection), the record and the replay of it, predictions and tables all ask here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.optimizers.facts import class_for_predictions, decays_at_its_rate, law_of
from lightning_normdyn.optimizers.group_numbers import Number, as_number, group_number
from lightning_normdyn.optimizers.step_response import own_response

__all__ = [
    "AnOptimizer",
    "Decay",
    "DecayOwner",
    "DecayRule",
    "decay_of",
    "highest_claim",
    "optimizer_decay",
    "replaced_decay",
    "written_decay",
]


AnOptimizer: TypeAlias = Optimizer | type[Optimizer]
"""An optimizer, or its class where nothing about the instance matters."""


class DecayOwner(IntEnum):
    """Who applies the weight decay of a target; the highest claim wins, the optimizer itself is the
    default."""

    RESCALING = 1
    PROJECTION = 2
    SHRINK = 3


@dataclass(frozen=True)
class DecayRule:
    """What a callback makes of a weight's decay.

    Args:
        owner: as whom it claims the decay.
        claims: whether it takes the decay over at present. If not, what it does itself comes on
            top.
        rate: λ that it applies, decoupled, in 1/(step·lr); ``"replace"``: the decoupled equivalent
            of the optimizer's own.
        ratio: factor on ``rate``.
        alpha: λ per unit of the weight's size, for a decay that grows with the size (AWS).
        statistic: what that size is.
    """

    owner: DecayOwner
    claims: bool
    rate: float | Literal["replace"] = 0.0
    ratio: float = 1.0
    alpha: float = 0.0
    statistic: Literal["norm", "std"] = "norm"

    def applied(self, optimizer: AnOptimizer, group: Mapping[str, Any]) -> Number | None:
        """λ that it applies to weights of ``group`` where it owns their decay, ``alpha`` aside;
        None where nobody can tell.

        Example:
            >>> from torch.optim import SGD
            >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 5e-3}
            >>> rule = DecayRule(DecayOwner.PROJECTION, True, "replace", ratio=0.1)
            >>> round(rule.applied(SGD, group), 6)
            0.005
        """
        # SGDP's convention is λ/(1-β), also with dampening.
        rate = (
            optimizer_decay(optimizer, {**group, "dampening": 0})
            if self.rate == "replace"
            else self.rate
        )
        return None if rate is None else rate * self.ratio


@dataclass(frozen=True)
class Decay:
    """The decay of one weight in one step: its length is multiplied by (1 - lr · ``rate``)(1 - lr ·
    ``alpha`` · size).

    Args:
        owner: who applies ``rate``; None: the optimizer.
        rate: decoupled equivalent, in 1/(step·lr); None where nobody can tell.
        alpha: per unit of size (AWS), applied before the step.
        statistic: what that size is.
    """

    owner: DecayOwner | None
    rate: Number | None
    alpha: float = 0.0
    statistic: Literal["norm", "std"] = "norm"

    @property
    def doubled(self) -> bool:
        """Whether two decays act at once, or may do."""
        return self.alpha > 0 and (
            self.rate is None or isinstance(self.rate, Tensor) or self.rate != 0
        )


def written_decay(optimizer: AnOptimizer, group: Mapping[str, Any]) -> Number:
    """λ of a param group as ``optimizer`` reads it at this step; 0 without any.

    Example:
        >>> from torch.optim import SGD
        >>> written_decay(SGD, {"lr": 0.1, "weight_decay": 5e-4})
        0.0005
    """
    decay = group_number(group, "weight_decay")
    if getattr(optimizer, "decoupled_wd", False):
        first_lr = as_number(getattr(optimizer, "_init_lr", None))
        return (
            decay if first_lr is None else decay / first_lr
        )  # an option of lion_pytorch: lr x decay is meant, at the first lr
    return decay


def optimizer_decay(optimizer: AnOptimizer, group: Mapping[str, Any]) -> Number | None:
    """The decoupled equivalent λ of what ``optimizer`` itself does to the weights of a param group,
    in 1/(step·lr).

    Args:
        optimizer: the optimizer, or its class.
        group: the param group at this step.

    Returns:
        0 without decay; ``None`` where no number says what it comes to (Adam with coupled decay) or
        the optimizer is not understood.

    Example:
        >>> from torch.optim import SGD, Adam
        >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 5e-3}
        >>> round(optimizer_decay(SGD, group), 6)
        0.05
        >>> optimizer_decay(Adam, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 5e-3}) is None
        True
    """
    decay = written_decay(optimizer, group)
    if not isinstance(decay, Tensor) and decay == 0:
        return 0.0
    if isinstance(optimizer, Optimizer):
        law = law_of(optimizer, group)
        if law is not None and law[0] == "decoupled":
            return decay if decays_at_its_rate(optimizer, group) else None
    response = own_response(class_for_predictions(optimizer), group)
    if response is None or response.rough:
        return None
    return response.effective_decay


def highest_claim(rules: Iterable[DecayRule]) -> DecayOwner | None:
    """Who owns the decay of a weight under these rules; None: the optimizer.

    Example:
        >>> highest_claim([DecayRule(DecayOwner.SHRINK, claims=False), DecayRule(DecayOwner.RESCALING, claims=True)]).name
        'RESCALING'
    """
    return max((rule.owner for rule in rules if rule.claims), default=None)


def decay_of(
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
    rules: Sequence[DecayRule],
    owner: DecayOwner | None,
) -> Decay:
    """The decay of a weight in ``group`` of ``optimizer``, on which callbacks follow ``rules``.

    Args:
        optimizer: the optimizer, or its class.
        group: the param group at this step.
        rules: what the callbacks on the weight make of its decay.
        owner: who has claimed it (`StepBracket.decay_owner`, or `highest_claim`).

    Example:
        >>> from torch.optim import SGD
        >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 5e-3}
        >>> round(decay_of(SGD, group, [], None).rate, 6)
        0.05
        >>> decay_of(SGD, group, [DecayRule(DecayOwner.SHRINK, claims=True, alpha=2.5e-3)], DecayOwner.SHRINK)
        Decay(owner=<DecayOwner.SHRINK: 3>, rate=0.0, alpha=0.0025, statistic='norm')
    """
    if owner is None:
        rate = optimizer_decay(optimizer, group)
    else:
        named = [rule for rule in rules if rule.owner == owner and rule.claims]
        rate = (
            named[0].applied(optimizer, group) if len(named) == 1 else None
        )  # somebody who claims it and says nothing
    # Who claims a decay and is outbid applies nothing; who leaves the decay where it is acts
    # besides.
    shrinks = [rule for rule in rules if rule.alpha and (rule.owner == owner or not rule.claims)]
    if not shrinks:
        return Decay(owner, rate)
    if len(shrinks) > 1:
        return Decay(owner, None)
    return Decay(owner, rate, shrinks[0].alpha, shrinks[0].statistic)


def replaced_decay(optimizer: AnOptimizer, group: Mapping[str, Any]) -> str:
    """What is no longer applied when the decay of a weight is taken over, for tables: as it is
    written, and what it acted like.

    Returns:
        ``""`` without decay.

    Example:
        >>> from torch.optim import SGD, AdamW
        >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 5e-3}
        >>> replaced_decay(SGD, group)
        'replaces 0.005, acting like 0.05'
        >>> replaced_decay(AdamW, {"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 5e-3})
        'replaces 0.005'
    """
    written = float(written_decay(optimizer, group))
    if not written:
        return ""
    acted = optimizer_decay(optimizer, group)
    if acted is None:
        law = law_of(optimizer, group) if isinstance(optimizer, Optimizer) else None
        return f"replaces {written:g}" + (
            " inside the gradient" if law is not None and law[0] == "coupled" else ""
        )
    if abs(float(acted) / written - 1) < 1e-6:
        return f"replaces {written:g}"
    return f"replaces {written:g}, acting like {float(acted):.3g}"
