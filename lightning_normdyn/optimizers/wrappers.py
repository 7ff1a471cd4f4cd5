"""Optimizers around other optimizers: which of the two makes the step, and what the outer one adds.

A framework's wrapper (Lightning, Fabric, Accelerate) passes everything on. A person's wrapper
(Lookahead, schedule-free wrappers, TRAC) steps itself: what it does to the weights after the inner
step is part of its step. An optimizer in two phases (SAM) steps by the inner one.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError

_FRAMEWORK_WRAPPERS = frozenset({"LightningOptimizer", "_FabricOptimizer", "AcceleratedOptimizer"})
_FRAMEWORKS = frozenset({"lightning", "pytorch_lightning", "lightning_fabric", "accelerate"})


def without_framework(optimizer: Any) -> Any:
    """The optimizer that a person has made, inside of what a framework has put around it."""
    while _is_framework_wrapper(type(optimizer)):
        optimizer = optimizer.optimizer
    return optimizer


def _is_framework_wrapper(kind: type) -> bool:
    for each in kind.__mro__:
        # By its name first, of which nearly all have another.
        if each.__name__ in _FRAMEWORK_WRAPPERS and each.__module__.split(".")[0] in _FRAMEWORKS:
            return True
    return False


def closure_does_nothing(closure: Any) -> bool:
    """Whether no gradient comes from ``closure``: Lightning passes one where a person passes none.

    Lightning wraps it, together with what its precision plugin does before a step, in partial
    functions.

    Example:
        >>> closure_does_nothing(lambda: None)
        False
    """
    if isinstance(closure, partial):
        return any(map(closure_does_nothing, (closure.func, *closure.args)))
    name = getattr(closure, "__name__", "")
    package = str(getattr(closure, "__module__", "")).split(".")[0]
    return name == "do_nothing_closure" and package in _FRAMEWORKS


def fires_step_hooks(optimizer: Any) -> bool:
    """Whether torch calls the step hooks of ``optimizer``.

    It does so once ``torch.optim.Optimizer.__init__`` has run for its class. A wrapper that leaves
    ``super().__init__()`` out, as many forms of Lookahead do, has a ``step`` that nobody is told
    about.

    Example:
        >>> fires_step_hooks(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1))
        True
    """
    step = getattr(type(optimizer), "step", None)
    return _has_hook_lists(optimizer) and bool(getattr(step, "hooked", False))


def _has_hook_lists(optimizer: Any) -> bool:
    return all(hasattr(optimizer, f"_optimizer_step_{moment}_hooks") for moment in ("pre", "post"))


def prepare_step_hooks(optimizer: Any) -> None:
    """Let torch call step hooks around the ``step`` of ``optimizer`` from now on.

    Some wrappers (timm's Lookahead) leave ``super().__init__()`` out but have lists for hooks, and
    torch's own ``zero_grad``, which would do this at its first call. By then a step may be missed.
    """
    if fires_step_hooks(optimizer) or not _has_hook_lists(optimizer):
        return
    by_torch = getattr(type(optimizer), "zero_grad", None) is Optimizer.zero_grad
    if by_torch and not hasattr(optimizer, "_zero_grad_profile_name"):
        optimizer._patch_step_function()


def inner_optimizers(optimizer: Any) -> list[Optimizer]:
    """The torch optimizers that ``optimizer`` holds in its attributes, alone or in containers.

    It is then a wrapper around them.

    Example:
        >>> inner_optimizers(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1))
        []
    """
    attributes = dict(getattr(optimizer, "__dict__", {}))
    for name in ("state", "param_groups"):
        attributes.pop(name, None)
    # By id: a wrapper may hold the same one twice.
    inner = {}
    for _, entry in _walk(attributes, "", 2):
        if isinstance(entry, Optimizer) and entry is not optimizer:
            inner[id(entry)] = entry
    return list(inner.values())


def steps_in_two_phases(optimizer: Any) -> bool:
    """Whether ``optimizer`` has the two phases of SAM.

    ``first_step`` moves the weights aside, ``second_step`` moves them back and steps.
    """
    return all(callable(getattr(optimizer, n, None)) for n in ("first_step", "second_step"))


def second_phase(optimizer: Optimizer) -> Optimizer:
    """The optimizer that makes the step of one in two phases.

    Raises:
        NotSupportedError: if it does not hold exactly one torch optimizer of the same weights.
    """
    weights = _ids_of_weights(optimizer)
    steppers = []
    for inner in inner_optimizers(optimizer):
        if fires_step_hooks(inner) and _ids_of_weights(inner) == weights:
            steppers.append(inner)
    if len(steppers) == 1:
        return steppers[0]
    raise NotSupportedError(
        f"{type(optimizer).__name__} steps in two phases (first_step, second_step), and "
        f"{len(steppers)} torch optimizers of the same weights were found inside that could make "
        "the step, so its real step cannot be seen. Use a form around one torch optimizer, such as "
        "SAM(params, torch.optim.SGD, ...)."
    )


def _ids_of_weights(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


# A copy that is this close to a weight, relative to its length, is one of this weight: a momentum
# or a second moment never is.
_CLOSE = 0.5
# Containers within containers that are searched for copies.
_DEPTH = 4
# In the state of an optimizer that wraps none, a copy of the weights may be a point that distances
# are measured from (Prodigy, DoG). Under these names it is a second weight that the first is set
# back to.
_SLOW = re.compile(r"slow|lookahead", re.IGNORECASE)


@torch.no_grad()
def copies_of_weights(optimizer: Optimizer, weights: Sequence[Tensor]) -> list[str]:
    """Where ``optimizer`` keeps second copies of ``weights`` that its step may set them back to.

    Lookahead, schedule-free wrappers and TRAC do. Looks at numbers, so it waits for the device: for
    the start of a fit.

    Args:
        optimizer: the optimizer, with state or without.
        weights: plain tensors that it updates.

    Returns:
        Names of attributes or entries of its state; empty if there are none.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> sgd.state[weight]["slow_buffer"] = torch.full((2, 3), 0.9)
        >>> copies_of_weights(sgd, [weight])
        ['slow_buffer']
    """
    inner = inner_optimizers(optimizer)
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for weight in weights:
        by_shape.setdefault(tuple(weight.shape), []).append(weight.detach())
    stepped = _ids_of_weights(optimizer)
    # A dictionary, since a name may stand for a tensor of each weight.
    names: dict[str, None] = {}
    for name, tensor in _entries_of([optimizer, *inner]):
        if not isinstance(tensor, Tensor):
            continue
        may_be_copy = id(tensor) not in stepped and bool(inner or _SLOW.search(name))
        alike = by_shape.get(tuple(tensor.shape), []) if may_be_copy else []
        if any(_is_copy(tensor, weight) for weight in alike):
            names[name] = None
    return list(names)


def _is_copy(tensor: Tensor, weight: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.device != weight.device:
        return False
    # The weight itself, under another name.
    if tensor.data_ptr() == weight.data_ptr():
        return False
    # float32: in half precision the square of a length overflows at 256.
    length = torch.linalg.vector_norm(weight.float())
    distance = torch.linalg.vector_norm(tensor.float() - weight.float())
    return bool((length > 0) & (distance <= _CLOSE * length))


def _entries_of(optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Any]]:
    """Everything in the attributes and the state of ``optimizers``, and what holds it."""
    for optimizer in optimizers:
        # The state may be an attribute or, of a wrapper, a property.
        held = {"state": optimizer.state, **vars(optimizer)}
        held.pop("param_groups", None)
        yield from _walk(held, "", _DEPTH)


def _walk(
    value: Any,
    name: str,
    depth: int,
) -> Iterator[tuple[str, Any]]:
    """What ``depth`` containers within each other hold in the end, and the name it is held by."""
    if depth and isinstance(value, dict):
        for key, entry in list(value.items()):
            yield from _walk(entry, key if isinstance(key, str) else name, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for entry in value:
            yield from _walk(entry, name, depth - 1)
    else:
        yield name, value
