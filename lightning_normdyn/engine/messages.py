"""How this package speaks to a person during a fit: warnings, lines above the progress bar, and
lists of names that stay readable."""

import warnings
from collections.abc import Sequence

from lightning_normdyn.errors import NormDynWarning

from .flavours import Trainer
from .lightning_facts import is_rank_zero

# Names that a message lists before it says how many more there are.
MOST_NAMES = 8


def warn_once(message: str) -> None:
    """Warn on rank zero, with the line of the caller's caller."""
    if is_rank_zero():
        warnings.warn(message, NormDynWarning, stacklevel=3)


def show(trainer: Trainer, text: str) -> None:
    """Print on rank zero, above a progress bar if there is one."""
    if not trainer.is_global_zero:
        return
    # Written to stdout, a text would end up in the middle of the bar.
    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.print(text)
    else:
        print(text)


def named(names: Sequence[str]) -> str:
    """The first names, for a message.

    Example:
        >>> named(["conv.weight", "fc.weight"])
        '`conv.weight`, `fc.weight`'
    """
    text = ", ".join(map("`{}`".format, names[:MOST_NAMES]))
    further = len(names) - MOST_NAMES
    return f"{text} and {further} more" if further > 0 else text
