"""A second optimizer of the same class with tiny weights of its own, to try on it how its class
steps.

``copy.deepcopy`` cannot serve: a copy loses what the optimizer keeps as attributes, and it doubles
the model. Here an instance is made
without ``__init__``, with a copy of the attributes, other weights in its param groups and no state.
The optimizer itself, its weights, its
hooks, class-level counters and all random generators are left as they are.
"""

from __future__ import annotations

import copy
import inspect
import random
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_normdyn.optimizers.group_numbers import as_number

Start: TypeAlias = Literal["new", "with state", "as it is"]

# Sizes of scratch weights by their number of dimensions: small, and different in each direction.
_SIZES: dict[int, tuple[int, ...]] = {
    0: (),
    1: (6,),
    2: (4, 6),
    3: (4, 3, 2),
    4: (4, 3, 2, 2),
    5: (3, 2, 2, 2, 2),
}
# Larger tensors in attributes belong to the real weights.
_LARGEST_COPY = 4096
# Attributes that belong to the life of the real optimizer and not to what it is.
_OF_ITS_LIFE = frozenset(
    {"state", "param_groups", "step", "_opt_called", "_step_count", "grad_scale", "found_inf"}
)
# Numbers of a group that steps count in; an optimizer without state has not counted yet.
_COUNTERS = frozenset({"step", "step_count", "prev_lr", "base_lr"})


class CannotTryError(Exception):
    """An optimizer of this kind cannot be tried on scratch weights; the message says why."""


class ScratchOptimizer:
    """An optimizer of the class of ``optimizer``, or of ``kind``, on two tiny weights for each
    group and number of dimensions.

    Args:
        optimizer: the real one; nothing of it is changed.
        kind: the class whose step is tried; by default that of ``optimizer``.
        weight_decay: replaces that of every param group; None leaves them.
        lr: replaces the learning rate of every param group where that is a number.
        dtype: of the scratch weights; None: that of the real ones.
        start: "new": as before its first step. "with state": scratch weights have zeros where the
            real ones have state. "as it is":
            numbers that steps count in the param groups are kept, too.

    Attributes:
        weights: of all groups; of each pair the first is the one that a take-over would take.
        taken: the first of each pair.

    Raises:
        CannotTryError: if it holds what cannot be copied.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        kind: type[Optimizer] | None = None,
        weight_decay: float | None = None,
        lr: float | None = None,
        dtype: torch.dtype | None = None,
        start: Start = "new",
    ) -> None:
        self.kind = type(optimizer) if kind is None else kind
        self.weights: list[nn.Parameter] = []
        self.taken: list[nn.Parameter] = []
        self.groups: list[dict[str, Any]] = []
        self._stands_for: dict[int, nn.Parameter] = {}
        state: defaultdict[Any, Any] = defaultdict(dict)
        for group in optimizer.param_groups:
            self._add_group(optimizer, group, dtype, None if start == "new" else state)
        if not self.weights:
            raise CannotTryError("it holds no dense weight of at most 5 dimensions")

        self.optimizer: Optimizer = object.__new__(self.kind)
        copier = _Copier(optimizer, self.optimizer, self._stands_for)
        attributes: dict[str, Any] = {}
        for name, value in vars(optimizer).items():
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                attributes[name] = (
                    OrderedDict()
                )  # whoever listens to the real optimizer must not hear the trial
            elif name not in _OF_ITS_LIFE:
                attributes[name] = copier.copy(value)
        # An optimizer may keep numbers of its own in its state from the start (MADGRAD, SPAM).
        state.update(
            {
                key: copier.copy(value)
                for key, value in optimizer.state.items()
                if isinstance(key, str)
            }
        )
        _scratch_optimizers.add(self.optimizer)
        vars(self.optimizer).update(attributes)
        vars(self.optimizer).update(state=state, param_groups=self.groups)
        real_groups = optimizer.param_groups
        for group, real in zip(self.groups, real_groups, strict=True):
            defaults = getattr(optimizer, "defaults", {})
            dropped = set() if start == "as it is" else _COUNTERS - set(defaults)
            options = {
                key: copier.copy(value)
                for key, value in real.items()
                if key != "params" and key not in dropped
            }
            group.update(options)
            if weight_decay is not None and "weight_decay" in group:
                group["weight_decay"] = weight_decay
            if lr is not None and as_number(group.get("lr")) is not None:
                group["lr"] = _like(group["lr"], lr)
            if "train_mode" in group:
                group["train_mode"] = True

    def _add_group(
        self,
        optimizer: Optimizer,
        group: Mapping[str, Any],
        dtype: torch.dtype | None,
        state: defaultdict[Any, Any] | None,
    ) -> None:
        weights: list[nn.Parameter] = []
        seen: dict[int, nn.Parameter] = {}
        for real in group["params"]:
            dims = real.dim()
            if dims in seen:
                self._stands_for[id(real)] = seen[dims]
                continue
            if dims not in _SIZES or real.is_complex() or not real.is_floating_point():
                continue
            pair = [self._scratch_like(real, dtype) for _ in range(2)]
            seen[dims] = self._stands_for[id(real)] = pair[0]
            weights += pair
            self.taken.append(pair[0])
            if state is not None and isinstance(optimizer.state.get(real), Mapping):
                for scratch in pair:
                    state[scratch] = {
                        key: _fresh_state(value, real, scratch)
                        for key, value in optimizer.state[real].items()
                    }
        self.weights += weights
        self.groups.append({"params": weights})

    def _scratch_like(self, real: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
        number = len(self.weights) + 2 * len(self.taken)
        values = _numbers(_SIZES[real.dim()], seed=1000 + number)
        return nn.Parameter(
            values.to(device=real.device, dtype=real.dtype if dtype is None else dtype)
        )

    def set_gradients(self, number: int) -> None:
        """Give every weight the gradient of step ``number``: the same in every trial, of changing
        size, independent of the weights."""
        scale = (1.0, 0.03, 20.0, 0.5)[number % 4]
        for position, weight in enumerate(self.weights):
            values = scale * _numbers(tuple(weight.shape), seed=31 * number + position)
            weight.grad = values.to(device=weight.device, dtype=weight.dtype)

    def step(self, on: Optimizer | None = None) -> None:
        """One step, as torch would call it, but without anybody's hooks.

        Args:
            on: a view of the scratch optimizer, to step on that.
        """
        step = getattr(self.kind, "step", None)
        while getattr(step, "hooked", False):
            step = step.__wrapped__  # type: ignore[union-attr]
        if step is None:
            raise CannotTryError("it has no step")
        with torch.enable_grad():
            step(self.optimizer if on is None else on)

    def values(self) -> list[Tensor]:
        """A copy of all weights as they are."""
        return [weight.detach().clone() for weight in self.weights]

    @staticmethod
    @contextmanager
    def untouched(optimizer: Optimizer) -> Iterator[None]:
        """Put back what a step may change beside its own optimizer: random generators, class-level
        numbers, the default dtype.

        Whatever the trial raises becomes `CannotTryError`: a trial must never end a fit.
        """
        if _others_listen() and _calls_a_hooked_step(type(optimizer)):
            raise CannotTryError("somebody listens to the steps of all optimizers")
        devices = {p.device for group in optimizer.param_groups for p in group["params"]}
        accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
        kind = accelerators[0].type if accelerators else "cuda"
        restore_classes = _remember_classes(type(optimizer))
        dtype, python, numpy = torch.get_default_dtype(), random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=accelerators, device_type=kind):
                yield
        except CannotTryError:
            raise
        except Exception as error:
            raise CannotTryError(
                f"its step raised {type(error).__name__}: {_first_line(error)}"
            ) from error
        finally:
            restore_classes()
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_default_dtype(dtype)


_scratch_optimizers: WeakSet[Optimizer] = WeakSet()


def is_scratch(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` is only tried: whoever listens to the steps of all optimizers leaves it
    alone.

    Example:
        >>> is_scratch(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1))
        False
    """
    return optimizer in _scratch_optimizers


def _others_listen() -> bool:
    """Whether somebody else has hooked the steps of all optimizers; our own hooks ask
    `is_scratch`."""
    hooks = [*_global_optimizer_pre_hooks.values(), *_global_optimizer_post_hooks.values()]
    return any(
        not type(getattr(hook, "__self__", None)).__module__.startswith("lightning_normdyn.")
        for hook in hooks
    )


def _calls_a_hooked_step(kind: type) -> bool:
    """Whether the step of ``kind`` may call that of a base class around which torch calls hooks."""
    steps = [vars(c)["step"] for c in kind.__mro__ if "step" in vars(c)]
    return any(getattr(step, "hooked", False) for step in steps[1:])


def seed_generators(device: torch.device) -> None:
    """Let every trial draw the same random numbers, without touching generators of other
    devices."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(0)


def _numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["(no message)"])[0][:120]


def _like(value: Any, number: float) -> Any:
    """``number`` in the form that ``value`` has: a tensor stays one."""
    if isinstance(value, Tensor):
        return torch.full_like(value, number)
    return number


def _fresh_state(value: Any, real: Tensor, scratch: Tensor) -> Any:
    """State of a scratch weight for one that the optimizer makes before its first step (torch's
    Adagrad)."""
    if isinstance(value, Tensor) and value.shape == real.shape and value.dim():
        return torch.zeros_like(scratch, dtype=value.dtype)
    if isinstance(value, Tensor) and value.dim() == 0:
        return torch.zeros_like(value)
    if as_number(value) is not None:
        return type(value)(0)
    if value is None or isinstance(value, (bool, str)):
        return value
    raise CannotTryError("what it keeps for each weight cannot be made for other weights")


def _remember_classes(kind: type) -> Callable[[], None]:
    """A function that sets class-level attributes back to what they are now."""
    classes = [c for c in kind.__mro__ if c not in (Optimizer, object)]
    before = {
        c: {
            name: (value, _shallow(value))
            for name, value in vars(c).items()
            if not name.startswith("__")
        }
        for c in classes
    }

    def restore() -> None:
        for c, attributes in before.items():
            for name, (value, contents) in attributes.items():
                if vars(c).get(name) is not value:
                    setattr(c, name, value)
                if contents is not None and value != contents:
                    _refill(value, contents)
            for name in set(vars(c)) - attributes.keys():
                if not name.startswith("__"):
                    delattr(c, name)

    return restore


def _shallow(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (list, dict, set)) else None


def _refill(value: Any, contents: Any) -> None:
    value.clear()
    if isinstance(value, list):
        value.extend(contents)
    else:
        value.update(contents)


_SHARED_TYPES: tuple[type, ...] = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type, types.ModuleType, types.BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size, torch.memory_format, np.generic,
)  # fmt: skip


class _Copier:
    """Copies what an optimizer keeps in its attributes, with scratch weights in the place of real
    ones.

    Args:
        optimizer: whose attributes are copied.
        scratch: what stands for it in the copies.
        stands_for: ``{id of a real weight: scratch weight}``.
    """

    def __init__(
        self, optimizer: Optimizer, scratch: Optimizer, stands_for: Mapping[int, Tensor]
    ) -> None:
        self._weights = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._stands_for = stands_for
        self._optimizer, self._scratch = optimizer, scratch
        self._done: dict[int, Any] = {id(optimizer): scratch}

    def copy(self, value: Any) -> Any:
        """A copy that shares nothing with ``value`` that a step could change."""
        if isinstance(value, _SHARED_TYPES):
            return value
        if id(value) not in self._done:
            self._done[id(value)] = self._copy(value)
        return self._done[id(value)]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (dict, list, tuple, set, frozenset, deque)):
            return self._container(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.copy(value.__self__))
        if isinstance(value, torch.Generator):
            other = torch.Generator(device=value.device)
            other.set_state(value.get_state())
            return other
        if isinstance(value, weakref.ref):
            return weakref.ref(self._scratch) if value() is self._optimizer else value
        if isinstance(value, (random.Random, np.random.Generator, np.ndarray)):
            return copy.deepcopy(value)
        if isinstance(value, (nn.Module, Optimizer)):
            raise CannotTryError(f"it holds a {type(value).__name__}")
        return self._object(value)

    def _tensor(self, value: Tensor) -> Tensor:
        if id(value) in self._weights:
            if id(value) not in self._stands_for:
                raise CannotTryError("it keeps its weights in attributes")
            return self._stands_for[id(value)]
        if value.numel() > _LARGEST_COPY:
            raise CannotTryError("it keeps large tensors in attributes")
        return value.detach().clone()

    def _container(self, value: Any) -> Any:
        if isinstance(value, defaultdict):
            other: Any = defaultdict(self.copy(value.default_factory))
        elif isinstance(value, dict):
            other = type(value)() if type(value) in (dict, OrderedDict) else None
        elif isinstance(value, list):
            other = [] if type(value) is list else None
        elif isinstance(value, deque):
            other = deque(maxlen=value.maxlen)
        elif isinstance(value, tuple):
            entries = [self.copy(entry) for entry in value]
            return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
        else:
            return type(value)(self.copy(entry) for entry in value)
        if other is None:
            raise CannotTryError(f"it holds a {type(value).__name__}")
        self._done[id(value)] = other
        if isinstance(value, dict):
            for key, entry in value.items():
                other[self.copy(key)] = self.copy(entry)
        else:
            other.extend(self.copy(entry) for entry in value)
        return other

    def _function(self, value: Any) -> Any:
        """A function is shared, unless it has the real optimizer or its weights in its closure."""
        for cell in value.__closure__ or ():
            held = cell.cell_contents
            if held is self._optimizer or id(held) in self._weights:
                raise CannotTryError("it holds a function around itself")
        return value

    def _object(self, value: Any) -> Any:
        """An object that is nothing but its attributes is rebuilt; one that lives outside of Python
        is shared."""
        if not hasattr(value, "__dict__") or not inspect.isclass(type(value)):
            return value
        try:
            other = object.__new__(type(value))
        except TypeError as error:
            raise CannotTryError(f"it holds a {type(value).__name__}") from error
        self._done[id(value)] = other
        for name, entry in vars(value).items():
            other.__dict__[name] = self.copy(entry)
        return other
