"""Forward passes that leave no trace in a module or in the random numbers of the process."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy


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
