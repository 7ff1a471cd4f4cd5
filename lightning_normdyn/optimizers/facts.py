"""What is known about each optimizer, in one table: a row per class.

Everything that has to know what an optimizer is asks here: how its steps answer gradients
(predictions), what a change of a weight's scale
does to its buffers (rescaling), how it applies weight decay and whether that may be taken over,
which rate its next step really applies,
and which buffer tells what the last step was.

A torch class, and a subclass that keeps its step, is recognized by the step function. A class of
another package is recognized by its name
together with the keys of its param groups: then only predictions are known from the table. A class
with a step of its own is unknown until
a trial shows how it steps (`lightning_normdyn.optimizers.trial`). Unknown means: no prediction, and
refusals by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.optimizers import rate_rules, step_rules
from lightning_normdyn.optimizers.group_numbers import (
    Number,
    as_number,
    group_number,
    with_plain_numbers,
)
from lightning_normdyn.optimizers.rate_rules import RateRule
from lightning_normdyn.optimizers.scratch import is_scratch
from lightning_normdyn.optimizers.step_rules import ResponseRule, StepResponse
from lightning_normdyn.optimizers.trial import (
    DecayTrial,
    Kind,
    Pace,
    remembers_weights,
    steps_as,
    try_decay,
    undoes_changes,
)

__all__ = [
    "AppliedDecay",
    "OptimizerFacts",
    "Unknown",
    "applied_decay",
    "applied_rate",
    "check_rate",
    "class_for_predictions",
    "decay_trial",
    "decays_at_its_rate",
    "facts_of",
    "has_plain_rate",
    "law_of",
    "rate_differs_within",
    "response_of_class",
    "row_of_class",
    "sets_weights_back",
    "steps_like",
    "why_not_as_base",
]

_Law: TypeAlias = "tuple[Kind, Pace] | None"
_LawRule: TypeAlias = Callable[[Mapping[str, Any]], _Law]

_Muon: type[Optimizer] | None = getattr(torch.optim, "Muon", None)  # newer torch only
_Adafactor: type[Optimizer] | None = getattr(torch.optim, "Adafactor", None)

# Keys that schedulers, loggers and recipes leave in any param group; no step reads them.
_FOREIGN_KEYS = frozenset(
    {
        "params",
        "lr",
        "weight_decay",
        "initial_lr",
        "max_lr",
        "min_lr",
        "max_momentum",
        "base_momentum",
        "swa_lr",
        "name",
        "param_names",
    }
    | {"lr_scale", "layer_id", "group_name", "step", "max_lr_snapshot"}
)
# Options of a step that change how it is computed and not what it does.
_KERNEL_KEYS = frozenset(
    {"foreach", "fused", "capturable", "differentiable", "maximize", "eps", "delta"}
)


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


@dataclass(frozen=True)
class OptimizerFacts:
    """A row of the table.

    Args:
        name: of the class whose step this is.
        known_class: the torch class that is recognized by its step function; None for a row by
            name.
        response: how its steps answer gradients; None if nobody has derived it.
        exponents: ``{buffer: e}``: w -> f w makes the buffer f^e times what it was. Only per-entry
            buffers; step counts and the like do
            not change. None if what a rescale does to its state is not known.
        decay_law: kind of its decay, and what that is multiplied by, from the param group; None if
            not known.
        reads_decay: whether its step is known to read ``weight_decay`` from its group every time
            and to write nothing into the group, so
            that the decay of single weights can be taken over.
        rate: the rate of its next step.
        rate_by_weight: whether that rate differs between weights of one group.
        step_buffer: the buffer b such that the last step was -lr · b, from the param group; None if
            there is none.
        per_matrix: whether a rescale must use one factor for a whole matrix.
        keys: a row by name: keys that a param group must have.
        neutral: a row by name: further keys, with the only value that the row knows about. Any
            other key that is set makes it unknown.
    """

    name: str
    known_class: type[Optimizer] | None = None
    response: ResponseRule | None = None
    exponents: Mapping[str, float] | None = None
    decay_law: _LawRule | None = None
    reads_decay: bool = False
    rate: RateRule = rate_rules.by_keys
    rate_by_weight: bool = False
    step_buffer: Callable[[Mapping[str, Any]], str | None] | None = None
    per_matrix: bool = False
    keys: tuple[str, ...] = ()
    neutral: Mapping[str, Any] = field(default_factory=dict)


def _always(kind: Kind, pace: Pace = "lr") -> _LawRule:
    return lambda group: (kind, pace)


def _flagged(group: Mapping[str, Any]) -> _Law:
    """torch's Adam family carries a flag in the group."""
    return ("decoupled" if group.get("decoupled_weight_decay") else "coupled", "lr")


def _sgd_buffer(group: Mapping[str, Any]) -> str | None:
    """SGD with momentum and without Nesterov: coupled decay, dampening and ``maximize`` are in the
    buffer."""
    momentum = as_number(group["momentum"])
    has_momentum = isinstance(momentum, Tensor) or bool(momentum)
    return "momentum_buffer" if has_momentum and not group["nesterov"] else None


def _torch_row(known: type[Optimizer], **facts: Any) -> OptimizerFacts:
    """torch's own steps were read, all of them: they read the decay from the group at every
    step."""
    return OptimizerFacts(
        known.__name__, known, reads_decay=True, **{"rate": rate_rules.plain, **facts}
    )


_ADAM_STATE = {"exp_avg": -1.0, "exp_avg_sq": -2.0, "max_exp_avg_sq": -2.0}
_RMSPROP_STATE = {
    "square_avg": -2.0,
    "grad_avg": -1.0,
    "momentum_buffer": 0.0,
}  # this momentum holds g/√v, which has no scale
_ADAMAX_STATE = {"exp_avg": -1.0, "exp_inf": -1.0}  # exp_inf is a maximum of |g|, not of g²


def _rows() -> Iterator[OptimizerFacts]:
    optim, coupled = torch.optim, _always("coupled")
    yield _torch_row(
        optim.SGD,
        response=step_rules.sgd,
        exponents={"momentum_buffer": -1.0},
        decay_law=coupled,
        step_buffer=_sgd_buffer,
    )
    # AdamW before Adam: it derives from it. torch before 2.7 has it without the flag in the group.
    yield _torch_row(
        optim.AdamW,
        response=step_rules.adamw,
        exponents=_ADAM_STATE,
        decay_law=_always("decoupled"),
    )
    yield _torch_row(
        optim.Adam, response=step_rules.adam, exponents=_ADAM_STATE, decay_law=_flagged
    )
    yield _torch_row(optim.NAdam, exponents=_ADAM_STATE, decay_law=_flagged)
    yield _torch_row(optim.RAdam, exponents=_ADAM_STATE, decay_law=_flagged)
    yield _torch_row(optim.Adamax, exponents=_ADAMAX_STATE, decay_law=coupled)
    yield _torch_row(optim.RMSprop, exponents=_RMSPROP_STATE, decay_law=coupled)
    yield _torch_row(
        optim.Adagrad,
        exponents={"sum": -2.0},
        decay_law=coupled,
        rate=rate_rules.adagrad,
        rate_by_weight=True,
    )
    yield _torch_row(optim.Adadelta, decay_law=coupled)
    yield _torch_row(optim.ASGD, decay_law=coupled, rate=rate_rules.asgd, rate_by_weight=True)
    yield _torch_row(optim.Rprop)
    yield _torch_row(optim.SparseAdam)
    yield _torch_row(optim.LBFGS)
    if _Adafactor is not None:  # the decay uses the learning rate as it is written
        yield _torch_row(
            _Adafactor,
            decay_law=_always("decoupled"),
            rate=rate_rules.torch_adafactor,
            rate_by_weight=True,
        )
    if _Muon is not None:
        yield _torch_row(
            _Muon,
            exponents={"momentum_buffer": -1.0},
            decay_law=_always("decoupled"),
            per_matrix=True,
        )
    # The others live in several packages (adamp, timm, lion_pytorch, pytorch_optimizer, ...).
    yield OptimizerFacts(
        "SGDP",
        response=step_rules.sgdp,
        keys=("momentum", "dampening", "nesterov", "wd_ratio"),
        neutral={"weight_decouple": True, "fixed_decay": False},
    )
    yield OptimizerFacts(
        "AdamP",
        response=step_rules.adamp,
        keys=("betas", "wd_ratio"),
        neutral={"nesterov": False, "weight_decouple": True, "fixed_decay": False},
    )
    yield OptimizerFacts(
        "Lion",
        response=step_rules.lion,
        keys=("betas",),
        decay_law=_always("decoupled"),
        neutral={"weight_decouple": True, "fixed_decay": False},
    )


TABLE: tuple[OptimizerFacts, ...] = tuple(_rows())


# ------------------------------------------------------------------------------------------------------------------------------------------
# Recognition
# ------------------------------------------------------------------------------------------------------------------------------------------


def _step_of(optimizer_class: type) -> Any:
    """The step function as it was written: torch wraps ``step`` on a class when the class is first
    instantiated."""
    return inspect.unwrap(getattr(optimizer_class, "step", _step_of))


# What a subclass may define without stepping otherwise.
_OUTSIDE_OF_STEP = frozenset(
    {
        "__init__",
        "__setstate__",
        "__getstate__",
        "__repr__",
        "zero_grad",
        "state_dict",
        "load_state_dict",
        "step",
    }
)


def steps_like(optimizer_class: type, known: type) -> bool:
    """Whether ``optimizer_class`` steps exactly as ``known``: the same step function, and the same
    functions that it calls on itself.

    A subclass with a step of its own is an optimizer nobody has derived.

    Example:
        >>> class Named(torch.optim.SGD): pass
        >>> steps_like(Named, torch.optim.SGD), steps_like(torch.optim.AdamW, torch.optim.SGD)
        (True, False)
    """
    if not issubclass(optimizer_class, known) or _step_of(optimizer_class) is not _step_of(known):
        return False
    return all(
        getattr(optimizer_class, name, None) is getattr(known, name, None)
        for name in _helpers_of(known)
    )


def _helpers_of(known: type) -> set[str]:
    """Names of the functions that a step may call on its optimizer: all that stand between
    ``known`` and torch's base class."""
    helpers: set[str] = set()
    for c in known.__mro__:
        if c in (Optimizer, object):
            break
        helpers |= {name for name, value in vars(c).items() if callable(value)}
    return helpers - _OUTSIDE_OF_STEP


# A class is looked up once; its step function stands beside the answer, since a person may patch it
# later.
_rows_of_classes: WeakKeyDictionary[type, tuple[Any, OptimizerFacts | None]] = WeakKeyDictionary()


def row_of_class(optimizer_class: type) -> OptimizerFacts | None:
    """The row of `TABLE` that ``optimizer_class`` steps by: a torch class by its step function,
    another one by its name; None if there
    is none."""
    step = _step_of(optimizer_class)
    known = _rows_of_classes.get(optimizer_class)
    if known is None or known[0] is not step:
        known = (step, _torch_row_of(optimizer_class) or _named_row_of(optimizer_class))
        _rows_of_classes[optimizer_class] = known
    return known[1]


def _torch_row_of(optimizer_class: type) -> OptimizerFacts | None:
    for row in TABLE:
        if row.known_class is not None and steps_like(optimizer_class, row.known_class):
            return row
    return None


def _named_row_of(optimizer_class: type) -> OptimizerFacts | None:
    """The row of the name that ``optimizer_class``, or a class whose step it keeps, bears."""
    for known in optimizer_class.__mro__:
        for row in TABLE:
            if (
                row.known_class is None
                and row.name == known.__name__
                and steps_like(optimizer_class, known)
            ):
                return row
    return None


def _knows_all_that_is_set(row: OptimizerFacts, group: Mapping[str, Any]) -> bool:
    """Whether the group has the keys that a row by name needs, and sets no option that the row does
    not know about."""
    if not all(key in group for key in ("lr", "weight_decay", *row.keys)):
        return False
    known = _FOREIGN_KEYS | _KERNEL_KEYS | set(row.keys)
    for key, value in group.items():
        if key in row.neutral:
            if value is not None and bool(value) != bool(row.neutral[key]):
                return False
        elif key not in known and _is_set(value):
            return False
    return True


def _is_set(value: Any) -> bool:
    """Whether an option is anything but switched off. A number on an accelerator counts as set:
    nothing here waits for a device."""
    number = as_number(value)
    if number is not None:
        return isinstance(number, Tensor) or number != 0
    return value is not None and value is not False


def response_of_class(optimizer_class: type, group: Mapping[str, Any]) -> StepResponse | None:
    """How the steps of a param group answer gradients, from the class and the group alone; None if
    not understood.

    What an instance says beside its groups (attributes, a step of its own that a trial has looked
    at) is known to `facts_of` only.
    """
    row = row_of_class(optimizer_class)
    if row is None or row.response is None:
        return None
    if row.known_class is None and not _knows_all_that_is_set(row, group):
        return None
    plain = with_plain_numbers(group)
    plain["weight_decay"] = group_number(group, "weight_decay")
    return row.response(plain)


def facts_of(optimizer: Optimizer) -> OptimizerFacts:
    """What is known about ``optimizer``: a row of `TABLE`, or one with nothing but the name.

    A subclass with a step of its own has the row of its base if a trial shows that it steps as its
    base does.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1, momentum=0.9)
        >>> facts_of(sgd).name, facts_of(sgd).exponents
        ('SGD', {'momentum_buffer': -1.0})
    """
    row = row_of_class(type(optimizer))
    if row is not None:
        return row
    base = _known_base(type(optimizer))
    if base is not None and why_not_as_base(optimizer) is None:
        row = row_of_class(base)
    return row or OptimizerFacts(type(optimizer).__name__)


def _known_base(optimizer_class: type) -> type[Optimizer] | None:
    """The nearest base class with a row."""
    for base in optimizer_class.__mro__[1:]:
        if base is not Optimizer and issubclass(base, Optimizer) and row_of_class(base) is not None:
            return base
    return None


def why_not_as_base(optimizer: Optimizer) -> str | None:
    """Why the step of ``optimizer`` is not that of the nearest class that is known; None if it is,
    or if no base class is known."""
    base = _known_base(type(optimizer))
    if row_of_class(type(optimizer)) is not None or base is None:
        return None
    return _tried(optimizer, "base", lambda: steps_as(optimizer, base))


def class_for_predictions(optimizer: Optimizer | type[Optimizer]) -> type[Optimizer]:
    """The class whose predictions hold for ``optimizer``; `Unknown` where its attributes change
    what the class alone would say.

    Example:
        >>> class Logging(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         return super().step(closure)
        >>> class_for_predictions(Logging([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1)).__name__
        'SGD'
    """
    if isinstance(optimizer, type):
        return optimizer
    row = row_of_class(type(optimizer))
    if row is not None and row.known_class is not None:
        return type(optimizer)
    base = type(optimizer) if row is not None else _known_base(type(optimizer))
    if base is None or facts_of(optimizer).response is None:
        return Unknown
    if facts_of(optimizer).known_class is None and _has_options_of_its_own(optimizer):
        return Unknown
    return base


class Unknown(Optimizer):
    """Stands for an optimizer that nobody has derived."""


# Attributes of optimizers of other packages that change how a step is computed and not what it
# does.
_HARMLESS_ATTRIBUTES = frozenset({"defaults", "state", "param_groups", "maximize", "foreach"})


def _has_options_of_its_own(optimizer: Optimizer) -> bool:
    """Whether an attribute switches something on (gradient centralization, another decay) that a
    row by name does not know about."""
    options = {
        name: value
        for name, value in vars(optimizer).items()
        if not name.startswith("_") and name not in _HARMLESS_ATTRIBUTES
    }
    return any(value is True for value in options.values())


# ------------------------------------------------------------------------------------------------------------------------------------------
# Trials: each once per optimizer, and again when an option of its param groups changes
# ------------------------------------------------------------------------------------------------------------------------------------------

_T = TypeVar("_T")
_trials: WeakKeyDictionary[Optimizer, tuple[Any, dict[str, Any]]] = WeakKeyDictionary()


def _tried(optimizer: Optimizer, question: str, trial: Callable[[], _T]) -> _T:
    """The answer of a trial; it is not made again while the optimizer's options stay the same."""
    options = [
        [
            (key, value)
            for key, value in group.items()
            if value is None or isinstance(value, (bool, str))
        ]
        for group in optimizer.param_groups
    ]
    known = _trials.get(optimizer)
    if known is None or known[0] != options:
        known = _trials[optimizer] = (options, {})
    answers = known[1]
    if question not in answers:
        answers[question] = trial()
    return answers[question]  # type: ignore[no-any-return]


def decay_trial(optimizer: Optimizer) -> DecayTrial:
    """What a trial says about the weight decay of an optimizer that is in no row
    (`lightning_normdyn.optimizers.trial.try_decay`)."""
    return _tried(optimizer, "decay", lambda: try_decay(optimizer, applied_rate))


def sets_weights_back(optimizer: Optimizer) -> float | None:
    """The share that is left, a dozen steps later, of a change made to the weights of ``optimizer``
    from outside; None if it stays.

    Where little is left, the optimizer sets weights back to something that it remembers (a slow
    copy, the start of a dual averaging), so
    what a callback does to them is undone. torch's own optimizers do not.

    Example:
        >>> sets_weights_back(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1)) is None
        True
    """
    if facts_of(optimizer).known_class is not None:
        return None
    left = _tried(optimizer, "memory", lambda: remembers_weights(optimizer))
    return left if undoes_changes(left) else None


# ------------------------------------------------------------------------------------------------------------------------------------------
# The rate and the decay of the next step
# ------------------------------------------------------------------------------------------------------------------------------------------


def applied_rate(optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor) -> Number | None:
    """The rate that the next step of ``optimizer`` really applies to ``weight``; None if nobody can
    tell.

    Args:
        optimizer: the optimizer, right before its step.
        group: the param group of ``weight``.
        weight: the parameter.

    Returns:
        A float, or a tensor without dimensions on the weight's device; nothing waits for a device.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> applied_rate(sgd, sgd.param_groups[0], weight)
        0.1
    """
    rate = facts_of(optimizer).rate(optimizer, group, weight)
    lr = as_number(group.get("lr"))
    if rate is not None or lr is None or not rate_rules.has_own_schedule(optimizer, group):
        return rate
    if is_scratch(optimizer):
        return None  # the trial that is being made must not rest on another of the same kind
    # It speaks of a warmup, which may be one of the rate or of something else: a trial of its
    # weight decay tells.
    trial = decay_trial(optimizer)
    return lr if (trial.kind, trial.pace) == ("decoupled", "lr") else None


def has_plain_rate(optimizer: Optimizer) -> bool:
    """Whether the rate is the learning rate of the param group for certain; else a step itself may
    move it on."""
    return facts_of(optimizer).rate is rate_rules.plain


def rate_differs_within(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether `applied_rate` may differ between the weights of one group, or is one number for all
    of them."""
    return (
        facts_of(optimizer).rate_by_weight or "relative_step" in group or "scale_parameter" in group
    )


def check_rate(optimizer: Optimizer, weights: Iterable[Tensor]) -> None:
    """Refuse, for callbacks that act in proportion to the rate, an optimizer whose rate nobody can
    tell.

    Args:
        optimizer: right before its first step.
        weights: the weights that the callback acts on.

    Raises:
        NotSupportedError: naming the class and what it lacks.
    """
    ours = {id(weight) for weight in weights}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if id(weight) not in ours or applied_rate(optimizer, group, weight) is not None:
                continue
            lr = group.get("lr", "no 'lr' at all")
            raise NotSupportedError(
                f"This callback acts in proportion to the learning rate that "
                f"{type(optimizer).__name__} applies in each step, but that "
                f"cannot be told from its param group (lr: {lr!r}) and its state. Use an optimizer "
                f"with a learning rate of its param "
                "group, such as AdamW or SGD, or remove the callback."
            )


def applied_decay(
    optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor
) -> AppliedDecay | None:
    """How the next step of ``optimizer`` decays ``weight``; None if it has no ``weight_decay``, or
    if nobody can tell.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> adamw = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.01)
        >>> applied_decay(adamw, adamw.param_groups[0], weight)
        AppliedDecay(kind='decoupled', amount=0.001, factor=0.999)
    """
    law = law_of(optimizer, group)
    if law is None:
        return None
    kind, pace = law
    if kind == "coupled":
        return AppliedDecay(kind, group_number(group, "weight_decay"))
    decay: Any = group["weight_decay"] or 0.0
    if getattr(optimizer, "decoupled_wd", False):  # lion_pytorch's option
        decay = decay / optimizer._init_lr  # type: ignore[attr-defined]
    rate: Any = 1.0
    if pace == "lr":
        rate = group.get("lr")
    elif pace == "rate":
        rate = applied_rate(optimizer, group, weight)
    if rate is None:
        return None
    # The numbers as they are written: an optimizer that multiplies float32 tensors, or numpy's
    # float32, rounds to float32.
    share, factor = as_number(rate * decay), as_number(1 - rate * decay)
    return None if share is None or factor is None else AppliedDecay(kind, share, factor)


def decays_at_its_rate(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a decoupled decay shrinks a weight by `applied_rate` · λ in a step, and not by
    another multiple of λ."""
    law = law_of(optimizer, group)
    if law is None or law[0] != "decoupled":
        return False
    return law[1] == "rate" or (
        law[1] == "lr" and facts_of(optimizer).rate in (rate_rules.plain, rate_rules.by_keys)
    )


def law_of(optimizer: Optimizer, group: Mapping[str, Any]) -> _Law:
    """Kind of the decay of ``group`` and what it is multiplied by; None if the group has none, or
    if nobody can tell."""
    if "weight_decay" not in group:
        return None
    row = facts_of(optimizer)
    if row.decay_law is not None and (
        row.known_class is not None or _knows_all_that_is_set(row, group)
    ):
        return row.decay_law(group)
    decay = as_number(group["weight_decay"])
    if row.known_class is not None or decay is None or (isinstance(decay, float) and decay == 0):
        return None
    trial = decay_trial(optimizer)
    return None if trial.kind is None else (trial.kind, trial.pace or "lr")
