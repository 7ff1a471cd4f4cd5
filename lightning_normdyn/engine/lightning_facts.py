"""The only file that reads what Lightning keeps private or does not declare: look here first when a
new release of Lightning breaks something.

Everything underscored of the Trainer, its loops, strategies, connectors and loggers is read here,
and what Lightning's connectors set on the Trainer without declaring it.
"""

from typing import Any

from torch import Tensor

from .flavours import FABRICS, PACKAGES, Callback, LightningModule, Logger, Trainer, classes


def is_rank_zero() -> bool:
    """Whether this process speaks for all: also before a process group exists, from the
    environment."""
    # As whichever of Lightning's packages is loaded reads it. Without one there are no other ranks.
    readers = classes("utilities.rank_zero", "_get_rank", FABRICS)
    return all(not get_rank() for get_rank in readers[:1])


def log_every(trainer: Trainer) -> int:
    """The Trainer's ``log_every_n_steps``; 0 if it never logs."""
    # Set by the logger connector.
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, in the order in which their hooks are called."""
    # Set by the callback connector.
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def set_callbacks(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Give the Trainer another list of callbacks."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def batches_that_stepped(trainer: Trainer) -> int:
    """The x axis of Lightning's loggers: how many batches have ended with an optimizer step."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def accumulates_batch(trainer: Trainer) -> bool:
    """Whether this batch only accumulates gradients, so that it counts for no step."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def wrapped_optimizers(trainer: Trainer) -> list[Any]:
    """The LightningOptimizers that automatic optimization steps; none before they are made."""
    return list(getattr(trainer.strategy, "_lightning_optimizers", []))


def callback_metrics(trainer: Trainer) -> dict[str, Tensor]:
    """The table behind ``trainer.callback_metrics``.

    The property computes the user's metrics when it is read; the table does not.
    """
    return trainer._logger_connector._callback_metrics


def progress_bar_metrics(trainer: Trainer) -> dict[str, Any]:
    """The table behind ``trainer.progress_bar_metrics``; as for `callback_metrics`."""
    return trainer._logger_connector._progress_bar_metrics


def prefix_of(logger: Logger) -> str:
    """What a logger puts in front of every key; empty for none."""
    return getattr(logger, "_prefix", "") or ""


def before_batch_transfer(module: LightningModule, batch: Any) -> Any:
    """A batch after the user's ``on_before_batch_transfer``, as Lightning's loops call it."""
    return module._on_before_batch_transfer(batch)


def package_of(module: object) -> str | None:
    """Which of Lightning's packages a LightningModule comes from; None for any other object."""
    for package in PACKAGES:
        if isinstance(module, classes("", "LightningModule", (package,))):
            return package
    return None


def configured_optimizers(module: LightningModule) -> tuple[list[Any], list[Any]]:
    """Optimizers and settings of learning rate schedulers, as a fit on the module's Trainer would
    make them."""
    package = package_of(module)
    makers = classes("core.optimizer", "_init_optimizers_and_lr_schedulers", (str(package),))
    optimizers, schedulers = makers[0](module)
    return list(optimizers), list(schedulers)
