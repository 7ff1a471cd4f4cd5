"""The table of optimizers: all that is known about each one is one row.

How its steps answer gradients (predictions), what a change of a weight's scale does to its buffers
(rescaling), how it decays weights and whether that may be taken over, which rate its next step
really applies, which buffer tells what the last step was. A new optimizer is one entry in `TABLE`;
`lightning_normdyn.optimizers.recognition` finds the row of an optimizer.

A row is found in one of three ways. torch's optimizers were read, so theirs are found by the step
function itself. The optimizers of other packages are found by name together with the keys of their
param groups. Families, of which only the rate or the kind of weights is known, are found by what
their class and param groups show. What is in no row is unknown: no prediction, and refusals by
name, except where a trial on scratch weights shows how it steps
(`lightning_normdyn.optimizers.trial`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch.optim import Optimizer

from . import rate_rules, recursion_rules, step_rules
from .group_numbers import Group, group_number, is_zero
from .rate_rules import RateRule
from .recursion_rules import RecursionRule
from .step_rules import ResponseRule, SubjectRule

Kind = Literal["coupled", "decoupled"]
"""Whether λ·w is added to the gradient, or the weight is multiplied by 1 - share."""

Pace = Literal["rate", "lr", "step"]
"""What a decoupled decay is multiplied by: the rate of the step, the learning rate as it is
written, or nothing (once per step)."""


class DecayLaw(NamedTuple):
    """How an optimizer decays the weights of a param group."""

    kind: Kind
    pace: Pace = "lr"


@dataclass(frozen=True)
class OptimizerFacts:
    """A row of the table. Every column but the name may be left out; then nothing is known there.

    Args:
        name: of the class whose step this is.
        known_class: found by its step function: the torch class.
        keys: found by name: keys that a param group must have.
        neutral: found by name: further keys, with the only value that the row knows about. Any
            other key that is set makes the optimizer unknown.
        indifferent: found by name: further keys whose value changes nothing that the row says.
        family: found by what class and param group show.
        response: how its steps answer gradients; None if nobody has derived it.
        response_of: the same, where it depends on the weight or on the number of the step.
        recursion: what its step number t does with a gradient and a buffer, for a course of the
            norm through any schedule; None where only ``response`` tells.
        never_settles: why its weights have no equilibrium.
        exponents: ``{buffer: e}``: w -> f w makes the buffer f^e times what it was. Only per-entry
            buffers; step counts and the like do not change. None if what a rescale does to its
            state is not known.
        decay_law: how it decays, from the param group; None if not known.
        written_decay: λ as the optimizer reads it, of one step; None: ``group["weight_decay"]``.
        step_was_read: whether a person has read the code of its step: it reads ``weight_decay``
            from its group every time, so that the decay of single weights can be taken over; it
            writes nothing into the group; and it goes on from wherever a weight is. For any other
            optimizer a trial has to tell.
        rate: the rate of its next step.
        rate_by_weight: whether that rate differs between weights of one group.
        step_buffer: the buffer b such that the last step was -lr · b, from the param group; None if
            there is none.
        per_matrix: whether a rescale must use one factor for a whole matrix.
        proportional: whether its step is that of torch's SGD, which is proportional to gradients.
            Only then can a learning rate stand in for the length of a weight exactly.
        many_closures: whether it evaluates its closure several times within one step.
        schedule_free: whether the weight is an interpolation of others that are in its state.
    """

    name: str
    known_class: type[Optimizer] | None = None
    keys: tuple[str, ...] = ()
    neutral: Group = field(default_factory=dict)
    indifferent: tuple[str, ...] = ()
    family: Callable[[type, Group], bool] | None = None
    response: ResponseRule | None = None
    response_of: SubjectRule | None = None
    recursion: RecursionRule | None = None
    never_settles: str | None = None
    exponents: Mapping[str, float] | None = None
    decay_law: Callable[[Group], DecayLaw] | None = None
    written_decay: Callable[[Optimizer, Group], Any] | None = None
    step_was_read: bool = False
    rate: RateRule = rate_rules.lr_without_schedule
    rate_by_weight: bool = False
    step_buffer: Callable[[Group], str | None] | None = None
    per_matrix: bool = False
    proportional: bool = False
    many_closures: bool = False
    schedule_free: bool = False


# ---------------------------------------------------------------------------------- torch's own


def _coupled(group: Group) -> DecayLaw:
    return DecayLaw("coupled")


def _decoupled(group: Group) -> DecayLaw:
    return DecayLaw("decoupled")


def _flagged(group: Group) -> DecayLaw:
    """torch's Adam family carries a flag in the group."""
    if group.get("decoupled_weight_decay"):
        return DecayLaw("decoupled")
    return DecayLaw("coupled")


def _sgd_buffer(group: Group) -> str | None:
    """Coupled decay, dampening and ``maximize`` are in the buffer, but Nesterov's step is not."""
    if is_zero(group_number(group, "momentum")) or group["nesterov"]:
        return None
    return "momentum_buffer"


def _torch_row(class_name: str, **facts: Any) -> OptimizerFacts | None:
    """A row of an optimizer of torch; None where this version of torch does not have it."""
    known_class = getattr(torch.optim, class_name, None)
    if known_class is None:
        return None
    rate = facts.pop("rate", rate_rules.plain)
    return OptimizerFacts(class_name, known_class, step_was_read=True, rate=rate, **facts)


_ADAM_STATE = {"exp_avg": -1.0, "exp_avg_sq": -2.0, "max_exp_avg_sq": -2.0}
# exp_inf is a running maximum of |g|, not of g².
_ADAMAX_STATE = {"exp_avg": -1.0, "exp_inf": -1.0}
# This momentum gathers g/√v, which has no scale.
_RMSPROP_STATE = {"square_avg": -2.0, "grad_avg": -1.0, "momentum_buffer": 0.0}
# A step of a fixed share of the weight turns it by min(lr, 1/√t), whatever its norm.
_ADAFACTOR_NEVER_SETTLES = "norms grow for decay < lr/2 and shrink for decay > lr/2"

_TORCH = (
    _torch_row(
        "SGD",
        response=step_rules.sgd,
        recursion=recursion_rules.sgd,
        exponents={"momentum_buffer": -1.0},
        decay_law=_coupled,
        step_buffer=_sgd_buffer,
        proportional=True,
    ),
    # AdamW before Adam, which it derives from: the first row that fits is taken. Before torch 2.7
    # its groups have no flag, so its decay is told from the class.
    _torch_row(
        "AdamW",
        response=step_rules.adamw,
        recursion=recursion_rules.adamw,
        exponents=_ADAM_STATE,
        decay_law=_decoupled,
    ),
    _torch_row(
        "Adam",
        response=step_rules.adam,
        recursion=recursion_rules.adam,
        exponents=_ADAM_STATE,
        decay_law=_flagged,
    ),
    _torch_row(
        "NAdam",
        response_of=step_rules.nadam,
        recursion=recursion_rules.nadam,
        exponents=_ADAM_STATE,
        decay_law=_flagged,
    ),
    _torch_row(
        "RAdam",
        response_of=step_rules.radam,
        recursion=recursion_rules.radam,
        exponents=_ADAM_STATE,
        decay_law=_flagged,
    ),
    _torch_row("Adamax", exponents=_ADAMAX_STATE, decay_law=_coupled),
    _torch_row(
        "RMSprop",
        recursion=recursion_rules.rmsprop,
        exponents=_RMSPROP_STATE,
        decay_law=_coupled,
    ),
    _torch_row(
        "Adagrad",
        recursion=recursion_rules.adagrad,
        never_settles="its steps become ever shorter, as 1/√t",
        exponents={"sum": -2.0},
        decay_law=_coupled,
        rate=rate_rules.adagrad,
        rate_by_weight=True,
    ),
    _torch_row("Adadelta", decay_law=_coupled),
    _torch_row("ASGD", decay_law=_coupled, rate=rate_rules.asgd, rate_by_weight=True),
    _torch_row("Rprop"),
    _torch_row("SparseAdam"),
    _torch_row("LBFGS", many_closures=True),
    # Its decay is multiplied by the learning rate as it is written, its step by another rate.
    _torch_row(
        "Adafactor",
        never_settles=_ADAFACTOR_NEVER_SETTLES,
        decay_law=_decoupled,
        rate=rate_rules.torch_adafactor,
        rate_by_weight=True,
    ),
    # Muon orthogonalises a matrix as a whole, and factors per filter do not commute with that.
    _torch_row(
        "Muon",
        response_of=step_rules.muon,
        exponents={"momentum_buffer": -1.0},
        decay_law=_decoupled,
        per_matrix=True,
    ),
)

# ------------------------------------------------------------------- of other packages, by name


def _over_first_lr(optimizer: Optimizer, group: Group) -> Any:
    """lion_pytorch has an option under which lr · λ is meant at the first learning rate."""
    decay = group["weight_decay"] or 0.0
    if getattr(optimizer, "decoupled_wd", False):
        return decay / optimizer._init_lr  # type: ignore[attr-defined]
    return decay


# Options of pytorch_optimizer's forms, and the only values under which they step as derived here.
_AS_DERIVED = {"weight_decouple": True, "fixed_decay": False}

# Which basis SOAP steps in does not matter: noise is the same in every one.
_BASIS_OF_SOAP = (
    "shampoo_beta",
    "merge_dims",
    "precondition_1d",
    "max_precondition_dim",
    "max_precond_dim",
)

# Each of these is in several packages (adamp, timm, lion_pytorch, pytorch_optimizer, ...). Their
# code differs, so none counts as read: what is written here is what all of them share.
_BY_NAME = (
    OptimizerFacts(
        "SGDP",
        keys=("momentum", "dampening", "nesterov", "wd_ratio"),
        neutral=_AS_DERIVED,
        response=step_rules.sgdp,
        recursion=recursion_rules.sgdp,
    ),
    OptimizerFacts(
        "AdamP",
        keys=("betas", "wd_ratio"),
        neutral={"nesterov": False, **_AS_DERIVED},
        response=step_rules.adamp,
        recursion=recursion_rules.adamp,
    ),
    OptimizerFacts(
        "Lion",
        keys=("betas",),
        neutral=_AS_DERIVED,
        response=step_rules.lion,
        decay_law=_decoupled,
        written_decay=_over_first_lr,
    ),
    OptimizerFacts(
        "SOAP",
        keys=("betas", "precondition_frequency"),
        # Two spellings of one option.
        neutral={"normalize_gradient": False, "normalize_grads": False, "correct_bias": True},
        indifferent=_BASIS_OF_SOAP,
        response=step_rules.soap,
        recursion=recursion_rules.soap,
        decay_law=_decoupled,
    ),
)

# --------------------------------------------------------------------- families, by what they show


def _in_package(optimizer_class: type, package: str) -> bool:
    return any(c.__module__.split(".")[0] == package for c in optimizer_class.__mro__)


def _is_schedule_free(optimizer_class: type, group: Group) -> bool:
    return _in_package(optimizer_class, "schedulefree")


def _is_adafactor(optimizer_class: type, group: Group) -> bool:
    return "relative_step" in group or "scale_parameter" in group


def _adapts_its_rate(optimizer_class: type, group: Group) -> bool:
    # D-Adaptation and Prodigy keep their estimate as "d", but others call other things so.
    if "d" not in group:
        return False
    name = rate_rules.adaptation_name(optimizer_class)
    return name is not None or not rate_rules.ADAPTATION_KEYS.isdisjoint(group)


def _is_heavyball(optimizer_class: type, group: Group) -> bool:
    return "base_lr" in group or "step_count" in group or _in_package(optimizer_class, "heavyball")


_FAMILIES = (
    OptimizerFacts("ScheduleFree", family=_is_schedule_free, schedule_free=True),
    OptimizerFacts(
        "Adafactor", family=_is_adafactor, rate=rate_rules.adafactor, rate_by_weight=True
    ),
    OptimizerFacts("DAdaptation", family=_adapts_its_rate, rate=rate_rules.adaptation),
    OptimizerFacts("HeavyBall", family=_is_heavyball, rate=rate_rules.heavyball),
)

_TORCH_ROWS = tuple(row for row in _TORCH if row is not None)
TABLE: tuple[OptimizerFacts, ...] = (*_TORCH_ROWS, *_BY_NAME, *_FAMILIES)
"""The first row that fits is an optimizer's."""
