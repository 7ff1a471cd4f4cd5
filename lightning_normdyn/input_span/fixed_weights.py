"""A pass over data at fixed weights, in the middle of a fit, without a trace in it."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch

from lightning_normdyn.engine.flavours import LightningModule, Trainer, classes
from lightning_normdyn.invariance.visibility import eager, restored


@contextmanager
def at_fixed_weights(
    module: LightningModule,
    seed: int,
) -> Iterator[None]:
    """Evaluation mode without gradients or logging; the module and random states stay as they were.

    Args:
        module: the model.
        seed: what random numbers start from inside.
    """
    attributes = vars(module)
    own_log = attributes.get("log")
    # Compiled code calls no hooks, so it runs eagerly.
    with restored(module, weights=False), torch.no_grad(), eager():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        # This is no training step: what `forward` logs must not reach the loggers.
        attributes["log"] = lambda *_, **__: None
        module.eval()
        try:
            yield
        finally:
            # Without the attribute of the instance, Lightning's own method shows again.
            del attributes["log"]
            if own_log is not None:
                attributes["log"] = own_log
            _reshard(module)


def _reshard(module: LightningModule) -> None:
    """A forward pass without gradients leaves the root of an FSDP2 model whole."""
    for part in module.modules():
        reshard: Any = getattr(part, "reshard", None)
        if reshard is not None and hasattr(part, "unshard"):
            reshard()


def share_of_batches(
    batches: Iterable[Any],
    rank: int,
    world_size: int,
) -> Iterator[tuple[Any, bool]]:
    """This rank's batches, and whether they count.

    Every rank runs equally many, as sharded weights need it: where the last round has too few
    batches, some run one that counts elsewhere.

    Example:
        >>> list(share_of_batches("abc", rank=1, world_size=2))
        [('b', True), ('c', False)]
    """
    remaining = iter(batches)
    while batches_of_a_round := list(islice(remaining, world_size)):
        last = len(batches_of_a_round) - 1
        yield batches_of_a_round[min(rank, last)], rank <= last


def rounds_of(
    batches: Iterable[Any],
    world_size: int,
) -> int | None:
    """How many batches each rank runs; None where that is not known in advance."""
    try:
        total = len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None
    # Rounded up: the last round may be short, and every rank runs it.
    return -(-total // world_size)


@contextmanager
def progress(
    trainer: Trainer,
    total: int | None,
    what: str,
) -> Iterator[Callable[[], None]]:
    """A bar on rank zero's terminal, where the Trainer shows one too; gives what moves it on.

    Args:
        trainer: whose terminal it is.
        total: how many batches there will be; None if that is not known.
        what: what they are read for, beginning in lower case.
    """
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero or not sys.stderr.isatty():
        yield lambda: None
    elif isinstance(bar, classes("callbacks", "RichProgressBar")):
        # It owns the screen, so that no other bar can be shown.
        bar.print(f"lightning-normdyn: {what}")
        yield lambda: None
    else:
        # Any package's: they differ in nothing.
        tqdm = classes("callbacks.progress.tqdm_progress", "Tqdm")[0]
        with tqdm(total=total, desc=what.capitalize(), leave=False, dynamic_ncols=True) as shown:
            yield lambda: shown.update() and None
