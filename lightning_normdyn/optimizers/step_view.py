"""What a step sees of its optimizer while a decay is taken over: the same, with split param groups.

torch hands ``step`` the object that a step pre-hook puts into its arguments, so the optimizer
itself need not be changed: `view_of` makes a second instance that shares its ``__dict__`` and
differs in ``param_groups`` only. Whoever else looks at the optimizer while ``step`` runs (a signal
handler that saves, a scheduler, another thread) finds the user's own groups, and nothing has to be
restored.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, MutableMapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .group_numbers import group_number, is_zero
from .same_weights import SameWeights

ParamGroup = dict[str, Any]
"""A param group, as in ``optimizer.param_groups``, that a step may write to."""

Split = Callable[[Sequence[ParamGroup]], "list[ParamGroup] | None"]
"""The groups of an optimizer -> what a step is to see of them; None: the same."""


class SplitGroup(dict[str, Any]):
    """A param group as a step sees it, with some entries replaced.

    What the step writes under any other key reaches the user's group at once, since some optimizers
    keep state there.

    Args:
        group: the user's group.
        replaced: entries that differ from it; writing to them changes nothing but this view.

    Example:
        >>> group = {"lr": 0.1, "weight_decay": 0.5}
        >>> shown = SplitGroup(group, {"weight_decay": 0.0})
        >>> shown["steps"] = 1
        >>> group
        {'lr': 0.1, 'weight_decay': 0.5, 'steps': 1}
    """

    __slots__ = ("_group", "_replaced")

    def __init__(self, group: ParamGroup, replaced: ParamGroup) -> None:
        super().__init__(group)
        super().update(replaced)
        self._group = group
        # What differs must not reach the user: that is the decay and the list of parameters.
        self._replaced = frozenset(replaced)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key not in self._replaced:
            self._group[key] = value

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        if key not in self._replaced:
            self._group.pop(key, None)

    # Those of dict would write to this view alone; these go through the two methods above.
    update = MutableMapping.update
    setdefault = MutableMapping.setdefault
    popitem = MutableMapping.popitem
    clear = MutableMapping.clear

    def pop(self, key: str, *default: Any) -> Any:
        """As of a dict."""
        # MutableMapping's own looks for a private default that is not here.
        if key not in self and default:
            return default[0]
        value = self[key]
        del self[key]
        return value

    def __ior__(self, other: Any) -> SplitGroup:  # type: ignore[override,misc]
        self.update(other)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy that somebody keeps is a plain group."""
        return dict, (dict(self),)


def part_of(
    group: ParamGroup,
    replaced: ParamGroup,
    *,
    write_through: bool,
) -> ParamGroup:
    """``group`` with some entries replaced.

    With ``write_through`` a `SplitGroup`, else a plain dict, which is all that torch's compiler
    understands.
    """
    if write_through:
        return SplitGroup(group, replaced)
    return {**group, **replaced}


class Taken(dict[Tensor, Any]):
    """The weights whose decay is taken over, and what of each; not to be changed once it was asked
    for the parts of a group.

    Example:
        >>> import torch
        >>> first, second = torch.ones(2), torch.ones(2)
        >>> taken = Taken({first: None})
        >>> mine, others = taken.parts_of([first, second])
        >>> mine[0] is first, others[0] is second
        (True, True)
    """

    def __init__(self, *entries: Any) -> None:
        super().__init__(*entries)
        self._parts: dict[int, _Parts] = {}

    def parts_of(self, params: list[Tensor]) -> list[list[Tensor]]:
        """Those of the weights of a group that are taken, and the others, for one step."""
        # Found by its first weight, since a strategy may make the list anew at every step.
        key = id(params[0]) if params else 0
        known = self._parts.get(key)
        # All of the same weights: a group may grow, or exchange one.
        if known is None or not known.weights.are_in([params]):
            mine = [p for p in params if p in self]
            others = [p for p in params if p not in self]
            known = self._parts[key] = _Parts(SameWeights([params]), (mine, others))
        return known.shown()


class _Parts:
    """The weights of a group, in two parts.

    Args:
        weights: of the group.
        parts: of it.
    """

    def __init__(self, weights: SameWeights, parts: tuple[list[Tensor], ...]) -> None:
        self.weights, self._parts = weights, parts
        self._unchanged = SameWeights(parts)
        self._shown = list(map(list, parts))

    def shown(self) -> list[list[Tensor]]:
        """The parts, as lists that a step may write to."""
        # A step that does gets new ones next time. None does, and copying touches every weight.
        if not self._unchanged.are_in(self._shown):
            self._shown = list(map(list, self._parts))
        return self._shown


def split_groups(
    groups: Sequence[ParamGroup],
    taken: Collection[Tensor],
    *,
    write_through: bool = True,
) -> list[ParamGroup] | None:
    """Param groups in which the weights whose decay is taken over stand apart, without decay.

    Args:
        groups: the optimizer's own.
        taken: the weights.
        write_through: whether what is written into a new group reaches the user's.

    Returns:
        New groups for those that had to be split, the others themselves; None if none has to be.

    Example:
        >>> import torch
        >>> first, second = torch.ones(2), torch.ones(2)
        >>> shown = split_groups([{"params": [first, second], "weight_decay": 0.5}], {first})
        >>> [group["weight_decay"] for group in shown]
        [0.0, 0.5]
    """
    shown = []
    changed = False
    if not isinstance(taken, Taken):
        taken = Taken(dict.fromkeys(taken))
    # Without the user's groups being touched: others look at them while the step runs.
    for group in groups:
        if is_zero(group_number(group, "weight_decay")):
            shown.append(group)
            continue
        without_decay, rest = taken.parts_of(group["params"])
        if not without_decay:
            shown.append(group)
            continue
        changed = True
        replaced = {"params": without_decay, "weight_decay": 0.0}
        shown.append(part_of(group, replaced, write_through=write_through))
        if rest:
            shown.append(part_of(group, {"params": rest}, write_through=write_through))
    return shown if changed else None


class _StepView:
    """What every view adds to the class of its optimizer, before which it is inherited."""

    __slots__ = ()

    # Slots of the view's own class: the instance shares its __dict__ with the optimizer.
    _normdyn_original: Any
    _normdyn_shown: tuple[Split, list[ParamGroup], list[ParamGroup]] | None

    @property
    def param_groups(self) -> list[ParamGroup]:
        own: list[ParamGroup] = self._normdyn_original.param_groups
        if self._normdyn_shown is None:
            return own
        split, before, shown = self._normdyn_shown
        # A step may itself add a group, or set new ones: then they are split anew.
        if len(before) != len(own) or not all(map(is_, before, own)):
            shown = split(own) or own
            show(self, split, own, shown)
        return shown

    @param_groups.setter
    def param_groups(self, groups: list[ParamGroup]) -> None:
        self._normdyn_original.param_groups = groups

    # A subclass that calls super().step() makes torch call all hooks again, with the view: others
    # must get the optimizer itself.
    @property
    def _optimizer_step_pre_hooks(self) -> OrderedDict[int, Any]:
        return _for_original(self, self._normdyn_original._optimizer_step_pre_hooks)

    @property
    def _optimizer_step_post_hooks(self) -> OrderedDict[int, Any]:
        return _for_original(self, self._normdyn_original._optimizer_step_post_hooks)

    # Equal, so that what is kept by the optimizer in a mapping is found by its view as well.
    def __eq__(self, other: object) -> bool:
        return other is self or other is self._normdyn_original

    def __hash__(self) -> int:
        return hash(self._normdyn_original)

    # A copy or a pickle is of the optimizer: its view is over with the step.
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self._normdyn_original,)

    def __copy__(self) -> Any:
        return copy.copy(self._normdyn_original)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self._normdyn_original, memo)

    def __repr__(self) -> str:
        return repr(self._normdyn_original)


def _itself(optimizer: Optimizer) -> Optimizer:
    """What the pickle of a view is loaded with: the pickle holds the optimizer."""
    return optimizer


def _for_original(view: _StepView, hooks: dict[int, Any]) -> OrderedDict[int, Any]:
    return OrderedDict((key, _on_original(view, hook)) for key, hook in hooks.items())


def _on_original(view: _StepView, hook: Any) -> Any:
    """``hook``, called with the optimizer where torch passes its view."""
    original = view._normdyn_original

    def call(_: Any, args: Any, kwargs: Any) -> Any:
        result = hook(original, (original, *args[1:]), kwargs)
        # What a pre-hook returns becomes the arguments of the step, which must go on with the view.
        if isinstance(result, tuple) and len(result) == 2 and result[0]:
            (stepping, *rest), kwargs = result
            if stepping is original:
                return (view, *rest), kwargs
        return result

    return call


def _forwarded(name: str) -> Any:
    """A method that reads or writes the groups for others than the step: that of the optimizer."""
    return lambda view, *args, **kwargs: getattr(view._normdyn_original, name)(*args, **kwargs)


def _slot(name: str) -> Any:
    """An attribute that the optimizer's class keeps outside of ``__dict__``."""
    return property(
        lambda view: getattr(view._normdyn_original, name),
        lambda view, value: setattr(view._normdyn_original, name, value),
        lambda view: delattr(view._normdyn_original, name),
    )


_FORWARDED = (
    "state_dict",
    "load_state_dict",
    "add_param_group",
    "register_step_pre_hook",
    "register_step_post_hook",
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


def view_class(kind: type[Optimizer]) -> Any:
    """The class of the views of optimizers of class ``kind``.

    None where Python does not let anything derive from it.
    """
    body: dict[str, Any] = {name: _forwarded(name) for name in _FORWARDED}
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        if isinstance(slots, str):
            slots = (slots,)
        for name in slots:
            if name in ("__dict__", "__weakref__"):
                continue
            # As Python mangles private names.
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{base.__name__.lstrip('_')}{name}"
            body[name] = _slot(name)
    body["__slots__"] = ("_normdyn_original", "_normdyn_shown")
    for name in ("__module__", "__qualname__", "__doc__"):
        body[name] = getattr(kind, name)
    metaclass: Any = type(kind)
    # Whatever somebody's metaclass or __init_subclass__ raises, there is no view of this class.
    try:
        return metaclass(kind.__name__, (_StepView, kind), body)
    except Exception:
        return None


def view_of(optimizer: Optimizer, kind: type[Any]) -> Optimizer:
    """A view of ``optimizer`` that shows its own param groups until `show` splits them.

    Args:
        optimizer: what a step is about to run on.
        kind: `view_class` of its class.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> sgd = torch.optim.SGD([weight], lr=0.1, weight_decay=0.5)
        >>> view = view_of(sgd, view_class(torch.optim.SGD))
        >>> split = lambda groups: split_groups(groups, {weight})
        >>> show(view, split, sgd.param_groups, split(sgd.param_groups))
        >>> view.param_groups[0]["weight_decay"], sgd.param_groups[0]["weight_decay"]
        (0.0, 0.5)
    """
    # Without __init__, which would make groups and hooks of its own.
    view: Optimizer = object.__new__(kind)
    # Not by plain assignment: the optimizer's class may have a __setattr__ of its own.
    object.__setattr__(view, "_normdyn_original", optimizer)
    object.__setattr__(view, "_normdyn_shown", None)
    object.__setattr__(view, "__dict__", vars(optimizer))
    return view


def show(
    view: Any,
    split: Split,
    groups: Sequence[ParamGroup],
    shown: list[ParamGroup],
) -> None:
    """From now on ``view`` shows split groups.

    Args:
        view: from `view_of`.
        split: how to split groups, should the step make new ones.
        groups: the optimizer's own.
        shown: what ``split`` has made of them.
    """
    object.__setattr__(view, "_normdyn_shown", (split, list(groups), shown))


def unsplit(view: Any) -> None:
    """From now on ``view`` shows the optimizer's own groups."""
    object.__setattr__(view, "_normdyn_shown", None)
