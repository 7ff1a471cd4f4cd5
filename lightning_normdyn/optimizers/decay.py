r"""Who decays a weight, and by how much: the one place.

A weight has the decay of its optimizer, unless a callback claims it. Predictions, tables, records
and the callbacks that replace a decay all ask here, and are told the *decoupled equivalent*
:math:`\lambda`: in one step the weight is multiplied by :math:`1 - \eta\lambda`, whatever form the
decay was written in.

- Decoupled decay (AdamW) is that already.
- Coupled decay is added to the gradient, so momentum repeats it: under SGD with momentum
  :math:`\beta` and dampening :math:`d` it acts like :math:`\lambda (1-d)/(1-\beta)`, ten times what
  is written at :math:`\beta = 0.9`. Exact in the mean, once the buffer is filled.
- Coupled decay under Adam is divided by the size of the gradient: no number says what it comes to.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.functional import MIN_SHRINK_FACTOR

from . import rate_rules
from .facts import DecayLaw, Kind
from .group_numbers import Group, Number, as_number, group_number, is_zero
from .recognition import (
    applied_rate,
    class_for_predictions,
    decay_trial,
    facts_of,
    is_schedule_free,
)
from .step_response import DecayRate, own_response, rate_factor

AnOptimizer = Optimizer | type[Optimizer]
"""An optimizer, or its class where nothing about the instance matters."""

LARGEST_SHARE = 1 - MIN_SHRINK_FACTOR
"""Of a weight, no decay of ours takes away more in one step: at 1 its direction would be lost."""


# ------------------------------------------------------------------- what the optimizer itself does


@dataclass(frozen=True)
class AppliedDecay:
    """How an optimizer decays one weight in its next step.

    Args:
        kind: "coupled": λ·w is added to the gradient. "decoupled": the weight is multiplied by 1 -
            share.
        amount: λ of a coupled decay; the share of a decoupled one.
        factor: what a decoupled decay multiplies the weight by: 1 - share, rounded as the optimizer
            rounds it.
    """

    kind: Kind
    amount: Number
    factor: Number = 1.0


def decay_law(optimizer: Optimizer, group: Group) -> DecayLaw | None:
    """How ``optimizer`` decays the weights of ``group``.

    Returns:
        None if the group has no ``weight_decay``, or if nobody can tell.

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(4, 3))])
        >>> decay_law(adam, adam.param_groups[0])
        DecayLaw(kind='coupled', pace='lr')
    """
    if "weight_decay" not in group:
        return None
    facts = facts_of(optimizer, group)
    if facts.decay_law is not None:
        return facts.decay_law(group)
    # An optimizer that was read and has no law here has no decay. Without a decay in the group a
    # trial would answer, too, but nobody would need its answer.
    decay = as_number(group["weight_decay"])
    if facts.step_was_read or decay is None or is_zero(decay):
        return None
    return decay_trial(optimizer).law


def decay_kind(optimizer: Optimizer, group: Group) -> Kind | None:
    """Whether ``optimizer`` decays ``group`` inside the gradient ("coupled") or apart from it.

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([torch.nn.Parameter(torch.randn(4, 3))])
        >>> decay_kind(adam, adam.param_groups[0])
        'coupled'
    """
    law = decay_law(optimizer, group)
    return None if law is None else law.kind


def applied_decay(
    optimizer: Optimizer,
    group: Group,
    weight: Tensor,
) -> AppliedDecay | None:
    """How the next step of ``optimizer`` decays ``weight``.

    Returns:
        None if the group has no ``weight_decay``, or if nobody can tell.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> adamw = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.01)
        >>> applied_decay(adamw, adamw.param_groups[0], weight)
        AppliedDecay(kind='decoupled', amount=0.001, factor=0.999)
    """
    law = decay_law(optimizer, group)
    if law is None:
        return None
    if law.kind == "coupled":
        return AppliedDecay(law.kind, group_number(group, "weight_decay"))
    rate: Any = 1.0
    if law.pace == "lr":
        rate = group.get("lr")
    elif law.pace == "rate":
        rate = applied_rate(optimizer, group, weight)
    if rate is None:
        return None
    # Multiplied as they are written: an optimizer that multiplies float32 tensors, or numpy's
    # float32, rounds to float32.
    decay = _as_read(optimizer, group)
    share, factor = as_number(rate * decay), as_number(1 - rate * decay)
    if share is None or factor is None:
        return None
    return AppliedDecay(law.kind, share, factor)


def _as_read(optimizer: AnOptimizer, group: Group) -> Any:
    """λ of a group as ``optimizer`` reads it, in whatever type it is written."""
    if isinstance(optimizer, Optimizer):
        read = facts_of(optimizer, group).written_decay
        if read is not None:
            return read(optimizer, group)
    decay = group.get("weight_decay")
    return 0.0 if decay is None else decay


def written_decay(optimizer: AnOptimizer, group: Group) -> Number:
    """λ of a param group as ``optimizer`` reads it at this step; 0 without any.

    Example:
        >>> from torch.optim import SGD
        >>> written_decay(SGD, {"lr": 0.1, "weight_decay": 5e-4})
        0.0005
    """
    decay = as_number(_as_read(optimizer, group))
    return 0.0 if decay is None else decay


def optimizer_decay(optimizer: AnOptimizer, group: Group) -> Number | None:
    """The decoupled equivalent λ of what ``optimizer`` itself does to the weights of a param group.

    Args:
        optimizer: the optimizer, or its class.
        group: the param group at this step.

    Returns:
        In 1/(step·lr). 0 without decay; ``None`` where no number says what it comes to (Adam with
        coupled decay) or the optimizer is not understood.

    Example:
        >>> from torch.optim import SGD, Adam
        >>> group = dict(lr=0.1, momentum=0.9, dampening=0, nesterov=False, weight_decay=5e-3)
        >>> round(optimizer_decay(SGD, group), 6)
        0.05
        >>> optimizer_decay(Adam, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 5e-3}) is None
        True
    """
    decay = written_decay(optimizer, group)
    # Even of an optimizer that nobody understands: 0 times anything.
    if is_zero(decay):
        return 0.0
    if isinstance(optimizer, Optimizer):
        law = decay_law(optimizer, group)
        if law is not None and law.kind == "decoupled":
            return decay if _acts_at_the_rate(optimizer, group, law) else None
    # A coupled decay acts as often as a gradient does, which the step's response tells.
    response = own_response(class_for_predictions(optimizer), group)
    if response is None or response.rough:
        return None
    return response.effective_decay


def _acts_at_the_rate(
    optimizer: Optimizer,
    group: Group,
    law: DecayLaw,
) -> bool:
    """Whether a decoupled decay shrinks a weight by `applied_rate` · λ in a step."""
    rate_is_lr = facts_of(optimizer, group).rate in (
        rate_rules.plain,
        rate_rules.lr_without_schedule,
    )
    return law.pace == "rate" or (law.pace == "lr" and rate_is_lr)


def replaced_decay(optimizer: AnOptimizer, group: Group) -> str:
    """What is no longer applied when the decay of a weight is taken over, for tables.

    Returns:
        The decay as it is written, and what it acted like; ``""`` without decay.

    Example:
        >>> from torch.optim import SGD, AdamW
        >>> group = dict(lr=0.1, momentum=0.9, dampening=0, nesterov=False, weight_decay=5e-3)
        >>> replaced_decay(SGD, group)
        'replaces 0.005, acting like 0.05'
        >>> replaced_decay(AdamW, {"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 5e-3})
        'replaces 0.005'
    """
    written = float(written_decay(optimizer, group))
    if not written:
        return ""
    replaces = f"replaces {written:g}"
    acted = optimizer_decay(optimizer, group)
    if acted is not None:
        acts_as_written = abs(float(acted) / written - 1) < 1e-6
        return replaces if acts_as_written else f"{replaces}, acting like {float(acted):.3g}"
    if isinstance(optimizer, Optimizer) and decay_kind(optimizer, group) == "coupled":
        return f"{replaces} inside the gradient"
    return replaces


# -------------------------------------------------------------------------- whether it can be taken


def supports_decay_takeover(optimizer: Optimizer) -> str | None:
    """Why the weight decay of single weights cannot be taken over, or ``None`` if it can.

    To take over a decay, a param group is shown to the step as two. That is right only if ``step``
    reads ``weight_decay`` from the group each time. torch's own optimizers do; for any other class
    a trial on scratch weights tells (`lightning_normdyn.optimizers.trial.try_decay`).

    Example:
        >>> import torch
        >>> adamw = torch.optim.AdamW([torch.nn.Parameter(torch.randn(4, 3))])
        >>> supports_decay_takeover(adamw) is None
        True
    """
    name = type(optimizer).__name__
    if is_schedule_free(optimizer):
        return f"{name} is schedule-free and keeps a second copy of the weights"
    if facts_of(optimizer).step_was_read:
        return None
    refusal = decay_trial(optimizer).refusal
    return None if refusal is None else f"of {name} it is not known how it decays: {refusal}"


def taken_over_by_trial(optimizer: Optimizer) -> bool:
    """Whether it is a trial, and not the table, that says the decay can be taken over.

    Example:
        >>> import torch
        >>> taken_over_by_trial(torch.optim.AdamW([torch.nn.Parameter(torch.randn(4, 3))]))
        False
    """
    return not facts_of(optimizer).step_was_read and supports_decay_takeover(optimizer) is None


# ------------------------------------------------------------------------ what callbacks make of it


class DecayOwner(IntEnum):
    """Who applies the weight decay of a target; the highest claim wins.

    The optimizer itself is the default.
    """

    RESCALING = 1
    PROJECTION = 2
    ROTATION = 3
    WEIGHT_DECAY = 4
    SHRINK = 5


@dataclass(frozen=True)
class DecayRule:
    """What a callback makes of a weight's decay.

    Args:
        owner: as whom it claims the decay.
        claims: whether it takes the decay over at present. If not, what it does itself comes on
            top.
        rate: λ that it applies, decoupled; ``"replace"``: the decoupled equivalent of the
            optimizer's own; ``"as_written"``: the number of the param group as it stands.
        ratio: factor on ``rate``.
        pace: what λ is multiplied by in a step.
        lr_max: the largest learning rate of the schedule, for a pace that asks for it; None: the
            largest that the param group names.
        cautious: whether only entries decay that the step does not lengthen: of those nobody knows
            how many they are.
        alpha: λ per unit of the weight's size, for a decay that grows with the size (AWS).
        statistic: what that size is.
    """

    owner: DecayOwner
    claims: bool
    rate: float | Literal["replace", "as_written"] = 0.0
    ratio: float = 1.0
    pace: DecayRate = "lr"
    lr_max: Number | None = None
    cautious: bool = False
    alpha: float = 0.0
    statistic: Literal["norm", "std"] = "norm"

    def strength(self, optimizer: AnOptimizer, group: Group) -> Number | None:
        """λ before its pace, decoupled; None where nobody can tell.

        Example:
            >>> from torch.optim import SGD
            >>> group = dict(lr=0.1, momentum=0.9, dampening=0, nesterov=False, weight_decay=5e-3)
            >>> DecayRule(DecayOwner.WEIGHT_DECAY, True, "as_written").strength(SGD, group)
            0.005
        """
        if self.rate == "as_written":
            return written_decay(optimizer, group) * self.ratio
        if self.rate != "replace":
            return self.rate * self.ratio
        # SGDP's convention is λ/(1-β), also with dampening.
        replaced = optimizer_decay(optimizer, {**group, "dampening": 0})
        return None if replaced is None else replaced * self.ratio

    def applied(self, optimizer: AnOptimizer, group: Group) -> Number | None:
        """λ in 1/(step·lr) that it applies to weights of ``group`` whose decay it owns, ``alpha``
        and `per_step` aside.

        None where nobody can tell.

        Example:
            >>> from torch.optim import SGD
            >>> group = dict(lr=0.1, momentum=0.9, dampening=0, nesterov=False, weight_decay=5e-3)
            >>> rule = DecayRule(DecayOwner.PROJECTION, True, "replace", ratio=0.1)
            >>> round(rule.applied(SGD, group), 6)
            0.005
        """
        if self.cautious:
            return None
        # At a learning rate of 0 nothing is multiplied, whatever the largest one was.
        is_at_rest = self.pace != "lr" and is_zero(group_number(group, "lr"))
        if self.pace == "constant" or is_at_rest:
            return 0.0
        return self.equivalent(optimizer, group)

    def equivalent(self, optimizer: AnOptimizer, group: Group) -> Number | None:
        """λ in 1/(step·lr) that it amounts to at this learning rate, on the entries that decay;
        None where nobody can tell, and where the rate is 0 but the decay is not.

        Example:
            >>> from torch.optim import SGD
            >>> rule = DecayRule(DecayOwner.WEIGHT_DECAY, True, 0.1, pace="lr_squared", lr_max=0.4)
            >>> round(rule.equivalent(SGD, {"lr": 0.1}), 6)
            0.025
        """
        strength = self.strength(optimizer, group)
        factor = rate_factor(self.pace, group, self.lr_max)
        if strength is None or factor is None:
            return None
        return strength * factor

    def per_step(self, optimizer: AnOptimizer, group: Group) -> Number:
        """The share of a weight that it takes away in a step whatever the learning rate is."""
        strength = self.strength(optimizer, group)
        if self.pace != "constant" or strength is None or self.cautious:
            return 0.0
        return strength


@dataclass(frozen=True)
class Decay:
    """The decay of one weight in one step.

    Its length is multiplied by (1 - lr · ``rate`` - ``per_step``)(1 - lr · ``alpha`` · size).

    Args:
        owner: who applies ``rate``; None: the optimizer.
        rate: decoupled equivalent, in 1/(step·lr); None where nobody can tell.
        alpha: per unit of size (AWS), applied before the step.
        statistic: what that size is.
        per_step: share of the weight that goes whatever the learning rate is.
    """

    owner: DecayOwner | None
    rate: Number | None
    alpha: float = 0.0
    statistic: Literal["norm", "std"] = "norm"
    per_step: Number = 0.0

    @property
    def is_none(self) -> bool:
        """Whether nothing decays the weight, ``alpha`` aside."""
        return self.rate is not None and is_zero(self.rate) and is_zero(self.per_step)

    @property
    def doubled(self) -> bool:
        """Whether two decays act at once, or may do."""
        return self.alpha > 0 and not self.is_none


def highest_claim(rules: Iterable[DecayRule]) -> DecayOwner | None:
    """Who owns the decay of a weight under these rules; None: the optimizer.

    Example:
        >>> shrinks = DecayRule(DecayOwner.SHRINK, claims=False)
        >>> rescales = DecayRule(DecayOwner.RESCALING, claims=True)
        >>> highest_claim([shrinks, rescales]).name
        'RESCALING'
    """
    return max((rule.owner for rule in rules if rule.claims), default=None)


def decay_of(
    optimizer: AnOptimizer,
    group: Group,
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
        >>> group = dict(lr=0.1, momentum=0.9, dampening=0, nesterov=False, weight_decay=5e-3)
        >>> round(decay_of(SGD, group, [], None).rate, 6)
        0.05
        >>> shrinks = DecayRule(DecayOwner.SHRINK, claims=True, alpha=2.5e-3)
        >>> decay_of(SGD, group, [shrinks], DecayOwner.SHRINK)
        Decay(owner=<DecayOwner.SHRINK: 5>, rate=0.0, alpha=0.0025, statistic='norm', per_step=0.0)
    """
    rate: Number | None = None
    per_step: Number = 0.0
    owners = [rule for rule in rules if rule.claims and rule.owner == owner]
    if owner is None:
        rate = optimizer_decay(optimizer, group)
    # A claim whose rule is not among these is somebody else's, who says nothing of it.
    elif len(owners) == 1:
        rate = owners[0].applied(optimizer, group)
        per_step = owners[0].per_step(optimizer, group)
    # Whoever claims a decay and is outbid applies nothing. Whoever leaves the decay where it is
    # acts besides.
    shrinks = [rule for rule in rules if rule.alpha and (rule.owner == owner or not rule.claims)]
    if not shrinks:
        return Decay(owner, rate, per_step=per_step)
    # Two of them at once are refused elsewhere; here nobody can tell what they come to.
    if len(shrinks) > 1:
        return Decay(owner, None)
    return Decay(owner, rate, shrinks[0].alpha, shrinks[0].statistic, per_step)
