"""Hooks on thousands of modules at once, taken off without a handle for each."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def take_off(modules: Iterable[nn.Module], *hooks: Callable[..., Any]) -> None:
    """Remove these forward hooks and forward pre-hooks, wherever they are set.

    Who sets the same hook on every module need not keep what torch returns: a handle holds weak
    references, and some thousands of such objects make Python's garbage collector go through all of
    its memory, which takes longer than a batch.

    Args:
        modules: where they may be set.
        hooks: what was registered.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> for hook in (print, repr):
        ...     _ = layer.register_forward_pre_hook(hook)
        >>> take_off([layer], print)
        >>> list(layer._forward_pre_hooks.values())
        [<built-in function repr>]
    """
    for module in modules:
        for registered in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in registered.items() if hook in hooks]:
                del registered[key]
                module._forward_hooks_always_called.pop(key, None)
