"""Forward passes that are run only to look at a network: all their operations are shown to
autograd, and no trace of them is left.

Compiled code runs eagerly, reentrant checkpoints become non-reentrant: both would otherwise be a
single node of the graph, for which no rule can be given. torch has these switches for the whole
process only. So they are counted: the first who needs one sets it, the last one who leaves puts
back what was there, in whatever order and thread. Code of other threads keeps its checkpoints as
they are, and runs eagerly for as long as somebody watches, which changes no result.
"""

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_LOCK = threading.RLock()
_HERE = threading.local()
"""How many `visible_graph` this thread is inside of."""


class _Counted:
    """A switch of the process that stays on while somebody needs it."""

    def __init__(self, switch_on: Callable[[], Callable[[], None]]) -> None:
        self._switch_on = switch_on
        self._users = 0
        self._undo = ExitStack()

    @contextmanager
    def on(self) -> Iterator[None]:
        with _LOCK:
            if not self._users:
                self._undo.callback(self._switch_on())
            self._users += 1
        try:
            yield
        finally:
            with _LOCK:
                self._users -= 1
                if not self._users:
                    self._undo.close()


def _force_eager() -> Callable[[], None]:
    from torch._dynamo import eval_frame

    ours: Any = torch.compiler.set_stance("force_eager")

    def undo() -> None:
        # Somebody may have chosen another stance meanwhile; that is theirs.
        if eval_frame._stance is ours.stance:
            ours.__exit__(None, None, None)

    return undo


def _show_checkpoints() -> Callable[[], None]:
    from torch.utils import checkpoint as module

    function = module.CheckpointFunction
    own = vars(function).get("apply")
    original: Callable[..., Any] = function.apply

    def apply(
        run: Callable[..., Any],
        preserve_rng_state: bool,
        *args: Any,
    ) -> Any:
        if not getattr(_HERE, "depth", 0):
            return original(run, preserve_rng_state, *args)

        def visible(*inputs: Any) -> Any:
            # Also when it is computed again, after we have left: nested checkpoints must do the
            # same as the first time.
            with visible_graph():
                return run(*inputs)

        return module.checkpoint(
            visible, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )

    ours = staticmethod(apply)
    setattr(function, "apply", ours)  # noqa: B010 (a method, to type checkers)

    def undo() -> None:
        # Somebody has patched it after us: theirs calls ours, which then does nothing.
        if vars(function).get("apply") is not ours:
            return
        if own is None:
            delattr(function, "apply")
        else:
            setattr(function, "apply", own)  # noqa: B010

    return undo


_EAGER = _Counted(_force_eager)
_CHECKPOINTS = _Counted(_show_checkpoints)


@contextmanager
def eager() -> Iterator[None]:
    """Compiled code runs eagerly inside, so that its modules' hooks are called.

    Example:
        >>> compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager")
        >>> with eager():
        ...     compiled(torch.ones(1, 2)).grad_fn.name()
        'AddmmBackward0'
    """
    with _EAGER.on():
        yield


@contextmanager
def visible_graph() -> Iterator[None]:
    """What runs inside shows all its operations to autograd. Memory stays that of a checkpoint."""
    with _EAGER.on(), _CHECKPOINTS.on():
        _HERE.depth = getattr(_HERE, "depth", 0) + 1
        try:
            yield
        finally:
            _HERE.depth -= 1


def in_backward() -> bool:
    """Whether a backward pass is running, e.g. because a checkpoint computes its forward again."""
    return bool(torch._C._current_graph_task_id() != -1)


def compiled_parts(module: nn.Module) -> set[nn.Module]:
    """The modules that run inside compiled code, which calls none of their hooks.

    Known from what `torch.compile` leaves on a module that it was called on, or on whose
    ``forward`` or ``training_step``.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> net[1].compile()
        >>> [part is net[1] for part in compiled_parts(net)]
        [True]
    """
    parts: set[nn.Module] = set()
    for part in module.modules():
        functions = [getattr(part, name, None) for name in ("forward", "training_step")]
        if part._compiled_call_impl is not None or any(map(_is_compiled, functions)):
            parts.update(part.modules())
    return parts


def _is_compiled(function: Any) -> bool:
    # `torch.compiler.disable` leaves the same mark, and one of its own.
    disabled = getattr(function, "_torchdynamo_disable", False)
    return hasattr(function, "_torchdynamo_orig_callable") and not disabled


@contextmanager
def restored(module: nn.Module, *, weights: bool = True) -> Iterator[None]:
    """Buffers, training flags and random states are afterwards what they were, bit for bit.

    Args:
        module: what is run inside.
        weights: whether weights are put back, too, which takes a copy of them.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with restored(norm):
        ...     _ = norm.eval()(torch.ones(4, 2)) + norm.train()(torch.rand(4, 2))
        >>> norm.training, norm.running_mean.tolist()
        (True, [0.0, 0.0])
    """
    parts = [(part, part.training, dict(part._buffers)) for part in module.modules()]
    # A lazy parameter has no values yet that could be copied.
    parameters = [p for p in module.parameters() if not is_lazy(p)]
    tensors = [*module.buffers(), *(parameters if weights else ())]
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors]
    devices = {p.device.index for p in parameters if p.device.type == "cuda"}
    # NumPy is optional: a generator that nobody has imported has not been used either.
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, copy in copies:
                    tensor.copy_(copy)
            for part, training, buffers in parts:
                part.training = training
                # A forward may have put another tensor in a buffer's place.
                part._buffers.update(buffers)
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
