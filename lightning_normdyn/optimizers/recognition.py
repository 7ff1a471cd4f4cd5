"""Which row of the table of optimizers an optimizer steps by, and at which rate.

A class is recognized by the function that steps, and not by ``isinstance``: a subclass with a step
of its own is an optimizer that nobody has derived. It gets the row of its base only if a trial on
scratch weights shows that it steps as its base does (many only log around ``super().step()``).
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from . import rate_rules
from .facts import TABLE, DecayLaw, OptimizerFacts
from .group_numbers import Group, Number, as_number, is_zero
from .scratch import is_scratch
from .trial import DecayTrial, remembers_weights, steps_as, try_decay

# ------------------------------------------------------------------------------- the step function


def _step_of(optimizer_class: type) -> Any:
    """The step function as it was written.

    torch wraps ``step`` on a class when the class is first instantiated.
    """
    return inspect.unwrap(getattr(optimizer_class, "step", _step_of))


# What a subclass may define without stepping otherwise. Its step is compared by itself.
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
    """Whether ``optimizer_class`` steps exactly as ``known``.

    That is the case if it has the same step function and the same functions that the step may call
    on its optimizer.

    Example:
        >>> import torch
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
    """Names of the functions between ``known`` and torch's base class, which a step may call."""
    helpers: set[str] = set()
    for c in known.__mro__:
        if c in (Optimizer, object):
            break
        helpers |= {name for name, value in vars(c).items() if callable(value)}
    return helpers - _OUTSIDE_OF_STEP


# ---------------------------------------------------------------------------- the row of a class

# Looking a class up compares many functions, and rates are asked for at every step. The step
# function stands beside the answer, since a person may patch it later.
_known_steps: WeakKeyDictionary[type, tuple[Any, OptimizerFacts | None]] = WeakKeyDictionary()


def _row_of_step(optimizer_class: type) -> OptimizerFacts | None:
    """The row whose step ``optimizer_class`` has, before its param groups are looked at."""
    # As it stands on the class, with whatever torch has wrapped around it: taking that off at every
    # question costs more than one more search after torch has wrapped it.
    step = getattr(optimizer_class, "step", None)
    known = _known_steps.get(optimizer_class)
    if known is None or known[0] is not step:
        known = _known_steps[optimizer_class] = (step, _find_row_of_step(optimizer_class))
    return known[1]


def _find_row_of_step(optimizer_class: type) -> OptimizerFacts | None:
    for row in TABLE:
        if row.known_class is not None and steps_like(optimizer_class, row.known_class):
            return row
    # The name may be that of a base class whose step this class keeps.
    for base in optimizer_class.__mro__:
        for row in TABLE:
            by_name = row.known_class is None and row.family is None
            if by_name and row.name == base.__name__ and steps_like(optimizer_class, base):
                return row
    return None


# Keys that schedulers, loggers and recipes leave in any param group; no step reads them.
_HARMLESS_KEYS = frozenset(
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
        "lr_scale",
        "layer_id",
        "group_name",
        "step",
        "max_lr_snapshot",
        # Options of a step that change how it is computed and not what it does.
        "foreach",
        "fused",
        "capturable",
        "differentiable",
        "maximize",
        "eps",
        "delta",
    }
)


def _knows_all_that_is_set(row: OptimizerFacts, group: Group) -> bool:
    """Whether a row by name holds for a group.

    The group must have the keys that the row needs, and set no option that the row does not know:
    packages add options of their own under the same name.
    """
    if not all(key in group for key in ("lr", "weight_decay", *row.keys)):
        return False
    for key, value in group.items():
        # None means "as by default", whatever that is called.
        if key in row.neutral:
            if value is not None and bool(value) != bool(row.neutral[key]):
                return False
        elif key in _HARMLESS_KEYS or key in row.keys or key in row.indifferent:
            continue
        elif _is_set(value):
            return False
    return True


def _is_set(value: Any) -> bool:
    """Whether an option is anything but switched off."""
    number = as_number(value)
    if number is None:
        return value is not None and value is not False
    # A number on an accelerator counts as set, since nothing here waits for a device.
    return not is_zero(number)


def row_of(optimizer_class: type, group: Group) -> OptimizerFacts | None:
    """The row of `TABLE` for a param group of an optimizer; None if none fits.

    What an instance says beside its groups (attributes, a step of its own that a trial has looked
    at) is known to `facts_of` only.
    """
    row = _row_of_step(optimizer_class)
    if row is not None and (row.known_class is not None or _knows_all_that_is_set(row, group)):
        return row
    for row in TABLE:
        if row.family is not None and row.family(optimizer_class, group):
            return row
    return None


def writes_into_groups(optimizer_class: type) -> bool:
    """Whether a step of this class may keep state in its param groups."""
    row = _row_of_step(optimizer_class)
    return row is None or not row.step_was_read


def follows_from_groups(optimizer: Optimizer | type[Optimizer]) -> bool:
    """Whether what ``optimizer`` does follows from its class and its param groups alone.

    So it is of torch's own. An optimizer that is known by name or from a trial may have attributes
    that count.
    """
    row = _row_of_step(optimizer if isinstance(optimizer, type) else type(optimizer))
    return row is not None and row.known_class is not None


def evaluates_closure_often(optimizer: Optimizer) -> bool:
    """Whether ``optimizer``, or a class of that name that it derives from, is one of many closures.

    By name alone: a form of LBFGS in another package has a step of its own and the same trait.
    """
    names = {c.__name__ for c in type(optimizer).__mro__}
    return any(row.many_closures and row.name in names for row in TABLE)


# ------------------------------------------------------------------------- the row of an optimizer


def facts_of(optimizer: Optimizer, group: Group | None = None) -> OptimizerFacts:
    """What is known about ``optimizer``: a row of `TABLE`, or one with nothing but the name.

    Args:
        optimizer: the optimizer.
        group: the param group in question; None: the first.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1, momentum=0.9)
        >>> facts_of(sgd).name, facts_of(sgd).exponents
        ('SGD', {'momentum_buffer': -1.0})
    """
    # Asked a dozen times in every step, and nearly always of an optimizer that was read.
    row = _row_of_step(type(optimizer))
    if row is not None and row.known_class is not None:
        return row
    stepping = _stepping_class(optimizer) or type(optimizer)
    row = row_of(stepping, optimizer.param_groups[0] if group is None else group)
    return row or OptimizerFacts(type(optimizer).__name__)


def _stepping_class(optimizer: Optimizer) -> type[Optimizer] | None:
    """The class, or the base class, whose step ``optimizer`` makes; None if it has no row."""
    if _row_of_step(type(optimizer)) is not None:
        return type(optimizer)
    if why_not_as_base(optimizer) is None:
        return _known_base(type(optimizer))
    return None


def _known_base(optimizer_class: type) -> type[Optimizer] | None:
    """The nearest base class with a row."""
    for base in optimizer_class.__mro__[1:]:
        if issubclass(base, Optimizer) and _row_of_step(base) is not None:
            return base
    return None


def why_not_as_base(optimizer: Optimizer) -> str | None:
    """Why the step of ``optimizer`` is not that of the nearest class that is known.

    None if it is, or if no base class is known.
    """
    base = _known_base(type(optimizer))
    if base is None or _row_of_step(type(optimizer)) is not None:
        return None
    return answer_once(optimizer, "base", lambda: steps_as(optimizer, base))


class Unknown(Optimizer):
    """Stands for an optimizer that nobody has derived."""


def class_for_predictions(optimizer: Optimizer | type[Optimizer]) -> type[Optimizer]:
    """The class whose predictions hold for ``optimizer``, `Unknown` if there is none.

    Example:
        >>> import torch
        >>> class Logging(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         return super().step(closure)
        >>> class_for_predictions(Logging([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1)).__name__
        'SGD'
    """
    if isinstance(optimizer, type):
        return optimizer
    stepping = _stepping_class(optimizer)
    if stepping is None:
        return Unknown
    row = _row_of_step(stepping)
    by_name = row is not None and row.known_class is None
    if by_name and _has_options_of_its_own(optimizer):
        return Unknown
    return stepping


# Attributes of optimizers of other packages that change how a step is computed and not what it
# does.
_HARMLESS_ATTRIBUTES = frozenset({"defaults", "state", "param_groups", "maximize", "foreach"})


def _has_options_of_its_own(optimizer: Optimizer) -> bool:
    """Whether an attribute switches something on that a row by name does not know about.

    Gradient centralization, for example, or another form of decay.
    """
    switched_on = {name for name, value in vars(optimizer).items() if value is True}
    return any(not name.startswith("_") for name in switched_on - _HARMLESS_ATTRIBUTES)


# ------------------------------------------------------------------------- what only a trial tells

_Answer = TypeVar("_Answer")
_answers: WeakKeyDictionary[Optimizer, tuple[Any, dict[str, Any]]] = WeakKeyDictionary()


def answer_once(optimizer: Optimizer, question: str, trial: Callable[[], _Answer]) -> _Answer:
    """The answer of a trial, which is made once while the optimizer's options stay the same."""
    # Numbers do not count as options: schedules change them at every step.
    options = []
    for group in optimizer.param_groups:
        for key, value in group.items():
            if value is None or isinstance(value, (bool, str)):
                options.append((key, value))
    known = _answers.get(optimizer)
    if known is None or known[0] != options:
        known = _answers[optimizer] = (options, {})
    answers = known[1]
    if question not in answers:
        answers[question] = trial()
    return answers[question]  # type: ignore[no-any-return]


def sets_weights_back(optimizer: Optimizer) -> float | None:
    """The share that is left, a dozen steps later, of a change made to the weights from outside.

    Where little is left, the optimizer sets weights back to something that it remembers (a slow
    copy, the start of a dual averaging), so what a callback does to them is undone.

    Returns:
        None if the change stays, as under torch's own optimizers.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1)
        >>> sets_weights_back(sgd) is None
        True
    """
    if facts_of(optimizer).step_was_read:
        return None
    return answer_once(optimizer, "memory", lambda: remembers_weights(optimizer))


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` trains weights that are interpolations of others in its state.

    No rule here is right for such a (schedule-free) one. Names of attributes do not tell: SPlus has
    modes for training and evaluation as well, and DAdaptSGD and FTRL have a buffer called "z". So
    outside of the package of that name it is told by what it does: it has the two modes, and it
    sets weights back to points that it remembers.

    Example:
        >>> import torch
        >>> is_schedule_free(torch.optim.SGD([torch.nn.Parameter(torch.randn(2, 2))], lr=0.1))
        False
    """
    facts = facts_of(optimizer)
    if facts.schedule_free or facts.step_was_read:
        return facts.schedule_free
    kind = type(optimizer)
    has_modes = callable(getattr(kind, "train", None)) and callable(getattr(kind, "eval", None))
    return has_modes and sets_weights_back(optimizer) is not None


# ------------------------------------------------------------------------ the rate of the next step


def applied_rate(
    optimizer: Optimizer,
    group: Group,
    weight: Tensor,
) -> Number | None:
    """The rate that the next step of ``optimizer`` really applies to ``weight``.

    Rules that act in proportion to the rate (Adaptive Weight Shrink, a decay of their own) and the
    effective learning rates that are logged ask here. For most optimizers it is the learning rate
    of the param group.

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
