"""A second optimizer of a class with tiny weights of its own, to try on it how the class steps.

``copy.deepcopy`` cannot serve: a copy loses what the optimizer keeps as attributes, and it doubles
the model. Here an instance is made without ``__init__``, with a copy of the attributes, other
weights in its param groups and no state. The optimizer itself, its weights, its hooks, class-level
counters and all random generators are left as they are.
"""

import copy
import random
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .group_numbers import as_number

Start = Literal["new", "with state", "as it is"]
"""How far along a scratch optimizer is. "new": as before its first step. "with state": scratch
weights have zeros where the real ones have state. "as it is": numbers that steps count in the param
groups are kept, too."""

# Sizes of scratch weights by their number of dimensions: small, and different in each direction.
_SIZES = (
    (),
    (6,),
    (4, 6),
    (4, 3, 2),
    (4, 3, 2, 2),
    (3, 2, 2, 2, 2),
)
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
    """An optimizer of the class of another one, on weights that nobody needs.

    It has a pair of tiny weights for each group and number of dimensions.

    Args:
        optimizer: the real one; nothing of it is changed.
        kind: the class whose step is tried; by default that of ``optimizer``.
        weight_decay: replaces that of every param group; None leaves them.
        lr: replaces the learning rate of every param group where that is a number.
        dtype: of the scratch weights; None: that of the real ones.
        start: how far along it is.

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
        self.kind = kind or type(optimizer)
        self.taken: list[nn.Parameter] = []
        self.groups: list[dict[str, Any]] = []
        self._stands_for: dict[int, nn.Parameter] = {}
        state: defaultdict[Any, Any] = defaultdict(dict)
        for real_group in optimizer.param_groups:
            pairs = self._pairs_for(real_group["params"], dtype)
            self.groups.append({"params": [weight for _, pair in pairs for weight in pair]})
            for real, pair in pairs:
                real_state = optimizer.state.get(real)
                # Some have state before their first step (Adagrad).
                if start != "new" and isinstance(real_state, Mapping):
                    for scratch in pair:
                        for key, value in real_state.items():
                            state[scratch][key] = _fresh_state(value, real, scratch)
        self.weights: list[nn.Parameter] = [w for group in self.groups for w in group["params"]]
        if not self.weights:
            raise CannotTryError("it holds no dense weight of at most 5 dimensions")

        # Without __init__, whose arguments nobody knows any more.
        self.optimizer: Optimizer = object.__new__(self.kind)
        _scratch_optimizers.add(self.optimizer)
        copier = _Copier(optimizer, self.optimizer, self._stands_for)
        attributes = vars(self.optimizer)
        for name, value in vars(optimizer).items():
            # Whoever listens to the real optimizer must not hear the trial.
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                attributes[name] = OrderedDict()
            elif name not in _OF_ITS_LIFE:
                attributes[name] = copier.copy(value)
        for key, entry in optimizer.state.items():
            # An optimizer may keep numbers of its own in its state from the start (MADGRAD, SPAM).
            if isinstance(key, str):
                state[key] = copier.copy(entry)
        attributes.update(state=state, param_groups=self.groups)

        left_out = {"params"}
        if start != "as it is":
            # A counter that is a default of the class is an option by another meaning.
            left_out |= _COUNTERS - set(getattr(optimizer, "defaults", {}))
        for group, real_group in zip(self.groups, optimizer.param_groups, strict=True):
            for option, value in real_group.items():
                if option not in left_out:
                    group[option] = copier.copy(value)
            if weight_decay is not None and "weight_decay" in group:
                group["weight_decay"] = weight_decay
            if lr is not None and as_number(group.get("lr")) is not None:
                # In the form that it has: a tensor stays one.
                is_tensor = isinstance(group["lr"], Tensor)
                group["lr"] = torch.full_like(group["lr"], lr) if is_tensor else lr
            # A schedule-free optimizer that was left in evaluation refuses to step.
            if "train_mode" in group:
                group["train_mode"] = True

    def _pairs_for(
        self, real_weights: list[Tensor], dtype: torch.dtype | None
    ) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """A pair of scratch weights for each number of dimensions in a group.

        It stands for all weights with as many dimensions; the first of them is its model.
        """
        pairs = {}
        for real in real_weights:
            dims = real.dim()
            if dims not in pairs:
                if dims >= len(_SIZES) or not real.is_floating_point():
                    continue
                values = _numbers(_SIZES[dims], seed=1000 + 2 * len(self.taken))
                values = values.to(device=real.device, dtype=dtype or real.dtype)
                pair = [nn.Parameter(values), nn.Parameter(values.clone())]
                pairs[dims] = (real, pair)
                self.taken.append(pair[0])
            self._stands_for[id(real)] = pairs[dims][1][0]
        return list(pairs.values())

    def set_gradients(self, number: int) -> None:
        """Give every weight the gradient of step ``number``.

        It is the same in every trial, of changing size, and independent of the weights.
        """
        # Of changing size, so that a second moment and a clipping are seen.
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
        # As within a fit: a step may take gradients of its own.
        with torch.enable_grad():
            step(on or self.optimizer)

    def values(self) -> list[Tensor]:
        """A copy of all weights as they are."""
        return [weight.detach().clone() for weight in self.weights]

    @staticmethod
    @contextmanager
    def untouched(optimizer: Optimizer) -> Iterator[None]:
        """Put back what a step may change beside its own optimizer.

        That is random generators, class-level numbers and the default dtype. Whatever the trial
        raises becomes `CannotTryError`: a trial must never end a fit.
        """
        if _others_listen() and _calls_a_hooked_step(type(optimizer)):
            raise CannotTryError("somebody listens to the steps of all optimizers")
        # Only the generators of devices that are in use: others may not even be initialized.
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
            message = (str(error).strip() or "(no message)").splitlines()[0][:120]
            raise CannotTryError(f"its step raised {type(error).__name__}: {message}") from error
        finally:
            restore_classes()
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_default_dtype(dtype)


_scratch_optimizers: WeakSet[Optimizer] = WeakSet()


def is_scratch(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` is only tried.

    Whoever listens to the steps of all optimizers leaves it alone.

    Example:
        >>> is_scratch(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1))
        False
    """
    return optimizer in _scratch_optimizers


def seed_generators(device: torch.device) -> None:
    """Let every trial draw the same random numbers; generators of other devices are not touched."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(0)


# -------------------------------------------------------------------------------- who would notice


def _others_listen() -> bool:
    """Whether somebody else has hooked the steps of all optimizers."""
    hooks = (*_global_optimizer_pre_hooks.values(), *_global_optimizer_post_hooks.values())
    owners = [type(getattr(hook, "__self__", None)) for hook in hooks]
    # Our own hooks ask `is_scratch`.
    return not all(owner.__module__.startswith("lightning_normdyn.") for owner in owners)


def _calls_a_hooked_step(kind: type) -> bool:
    """Whether the step of ``kind`` may call that of a base class around which torch calls hooks."""
    # torch hooks a step when a class is first instantiated; the outermost is called without hooks.
    steps = [vars(c)["step"] for c in kind.__mro__ if "step" in vars(c)]
    return any(getattr(step, "hooked", False) for step in steps[1:])


def _remember_classes(kind: type) -> Callable[[], None]:
    """A function that sets class-level attributes back to what they are now."""
    # Optimizers count their instances or steps on the class: attributes, and what containers hold.
    remembered = []
    for c in kind.__mro__:
        if c in (Optimizer, object):
            continue
        attributes = {name: value for name, value in vars(c).items() if name[:2] != "__"}
        containers = [
            (value, copy.copy(value))
            for value in attributes.values()
            if isinstance(value, (list, dict, set))
        ]
        remembered.append((c, attributes, containers))

    def restore() -> None:
        for c, attributes, containers in remembered:
            for name in [name for name in vars(c) if name[:2] != "__"]:
                if name not in attributes:
                    delattr(c, name)
            for name, value in attributes.items():
                if vars(c).get(name) is not value:
                    setattr(c, name, value)
            for container, contents in containers:
                if container != contents:
                    container.clear()
                    refill = container.extend if isinstance(container, list) else container.update
                    refill(contents)

    return restore


# ------------------------------------------------------------------------------- making the copy


def _numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _fresh_state(
    value: Any,
    real: Tensor,
    scratch: Tensor,
) -> Any:
    if isinstance(value, Tensor) and value.shape == real.shape and value.dim():
        return torch.zeros_like(scratch, dtype=value.dtype)
    if isinstance(value, Tensor) and value.dim() == 0:
        return torch.zeros_like(value)
    if as_number(value) is not None:
        return type(value)(0)
    if value is None or isinstance(value, (bool, str)):
        return value
    raise CannotTryError("what it keeps for each weight cannot be made for other weights")


# What a step cannot change.
_SHARED_TYPES: tuple[type, ...] = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type,
    types.ModuleType, types.BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size, torch.memory_format, np.generic,
)  # fmt: skip


class _Copier:
    """Copies what an optimizer keeps in its attributes, with scratch weights for real ones.

    Args:
        optimizer: whose attributes are copied.
        scratch: what stands for it in the copies.
        stands_for: ``{id of a real weight: scratch weight}``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scratch: Optimizer,
        stands_for: Mapping[int, Tensor],
    ) -> None:
        self._weights = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._optimizer, self._scratch = optimizer, scratch
        # By id, so that what is held twice, or holds itself, is copied once.
        self._copies: dict[int, Any] = {id(optimizer): scratch, **stands_for}

    def copy(self, value: Any) -> Any:
        """A copy that shares nothing with ``value`` that a step could change."""
        if isinstance(value, _SHARED_TYPES):
            return value
        if id(value) not in self._copies:
            self._copies[id(value)] = self._copy(value)
        return self._copies[id(value)]

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
            return value.clone_state()
        # What refers to the optimizer weakly must refer to the scratch one.
        if isinstance(value, weakref.ref):
            return weakref.ref(self._scratch) if value() is self._optimizer else value
        if isinstance(value, (random.Random, np.random.Generator, np.ndarray)):
            return copy.deepcopy(value)
        if isinstance(value, (nn.Module, Optimizer)):
            raise _holds(value)
        return self._object(value)

    def _tensor(self, value: Tensor) -> Tensor:
        # A weight that nothing stands for.
        if id(value) in self._weights:
            raise CannotTryError("it keeps its weights in attributes")
        # A copy of what belongs to the model would cost its memory once more.
        if value.numel() > _LARGEST_COPY:
            raise CannotTryError("it keeps large tensors in attributes")
        return value.detach().clone()

    def _container(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, tuple):
            entries = map(self.copy, value)
            return kind(*entries) if hasattr(value, "_fields") else tuple(entries)
        if isinstance(value, (set, frozenset)):
            return kind(map(self.copy, value))
        # A class of containers of somebody else may hold more than its entries.
        if kind not in (dict, OrderedDict, defaultdict, list, deque):
            raise _holds(value)
        # Emptied rather than made anew: a deque keeps its length so, a defaultdict its factory.
        self._copies[id(value)] = container = copy.copy(value)
        container.clear()
        self.copy(getattr(value, "default_factory", None))
        if isinstance(value, dict):
            for key, entry in value.items():
                container[self.copy(key)] = self.copy(entry)
        else:
            container.extend(map(self.copy, value))
        return container

    def _function(self, value: Any) -> Any:
        """A function is shared, unless it has the real optimizer or its weights in its closure."""
        for cell in value.__closure__ or ():
            held = cell.cell_contents
            # Called by the trial, it would step the real one.
            if held is self._optimizer or id(held) in self._weights:
                raise CannotTryError("it holds a function around itself")
        return value

    def _object(self, value: Any) -> Any:
        # An object that is nothing but its attributes is rebuilt, one outside of Python is shared.
        if not hasattr(value, "__dict__"):
            return value
        # Classes of C refuse to be made so.
        try:
            rebuilt = object.__new__(type(value))
        except TypeError as error:
            raise _holds(value) from error
        self._copies[id(value)] = rebuilt
        for name, entry in vars(value).items():
            rebuilt.__dict__[name] = self.copy(entry)
        return rebuilt


def _holds(value: object) -> CannotTryError:
    return CannotTryError(f"it holds a {type(value).__name__}")
