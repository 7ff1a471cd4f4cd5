"""The forecast of a LightningModule without training it: ``python -m lightning_normdyn forecast``.

The module's own ``configure_optimizers`` is called on a Trainer that knows how many steps there
will be, and has no data.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_normdyn.engine.flavours import Trainer, classes
from lightning_normdyn.engine.lightning_facts import configured_optimizers, package_of
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.invariance.verdict import Verdict
from lightning_normdyn.optimizers.views import torch_optimizers
from lightning_normdyn.theory.forecast import GroupWeights, Shape
from lightning_normdyn.theory.forecast_words import MOST_GROUPS, GroupLine, as_table

from .forecasts import line_of, look_ahead, title_of
from .horizon import Horizon

__all__ = ["forecast_module"]


def forecast_module(
    module: nn.Module,
    verdicts: Sequence[Verdict],
    steps: int,
    *,
    steps_per_epoch: int | None = None,
    width: int | None = None,
) -> str:
    """What a fit of so many steps would do to the norms of each param group.

    Args:
        module: a LightningModule.
        verdicts: what is known of the scale invariance of its weights; of none, only what follows
            from the schedule is told.
        steps: optimizer steps of the fit.
        steps_per_epoch: of them, those of an epoch; a schedule that goes by epochs asks for it.
        width: columns of the terminal; None: what the terminal has.

    Raises:
        NormDynError: for a module without optimizers.
    """
    package = package_of(module)
    if package is None:
        raise NormDynError(
            f"a forecast needs a LightningModule, whose configure_optimizers says how it will be "
            f"trained; {type(module).__name__} is none."
        )
    trainer = _trainer(module, package, steps)
    given, configs = configured_optimizers(trainer.lightning_module)
    optimizers = []
    for optimizer in given:
        optimizers += torch_optimizers(optimizer)
    if not any(optimizer.param_groups for optimizer in optimizers):
        raise NormDynError(
            f"`{type(module).__name__}.configure_optimizers` gives no optimizer, and nothing can "
            f"be forecast without."
        )
    horizon = Horizon(steps, steps_per_epoch)
    note = ""
    # Lightning steps a scheduler once an epoch unless told otherwise.
    if steps_per_epoch is None and any(config.interval == "epoch" for config in configs):
        note = (
            "the learning rate is taken to stay as it is: its scheduler goes by epochs; give "
            "--steps-per-epoch"
        )
    claims = _claims(module, verdicts)
    lines: list[GroupLine] = []
    left_out = 0
    for ahead in look_ahead(optimizers, configs, horizon, trainer):
        for place, group in enumerate(ahead.optimizer.param_groups):
            # Biases and gains have no direction that their length would hide.
            matrices = [weight for weight in group["params"] if weight.dim() > 1]
            known = [claims[weight] for weight in matrices if weight in claims]
            if matrices and len(lines) == MOST_GROUPS:
                left_out += 1
            elif matrices:
                lines += line_of(ahead, place, len(matrices), GroupWeights.of(known), note=note)
    if not lines:
        raise NormDynError("no param group has weights of two or more dimensions to forecast.")
    return as_table(title_of(horizon), lines, left_out=left_out, width=width)


class _Claim(NamedTuple):
    """A scale-invariant weight before its first step.

    Args:
        norm: RMS norm of its vectors.
        dim: entries of one, on average.
        shape: rows and columns, of a matrix.
    """

    norm: float
    dim: int
    shape: Shape


def _trainer(
    module: Any,
    package: str,
    steps: int,
) -> Trainer:
    (kind,) = classes("", "Trainer", (package,))
    # What hardware there is does not matter here, and Lightning would tell.
    log = logging.getLogger(package)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        trainer: Trainer = kind(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    finally:
        log.setLevel(level)
    trainer.strategy.connect(module)
    module.trainer = trainer
    return trainer


def _claims(module: nn.Module, verdicts: Sequence[Verdict]) -> Mapping[Tensor, _Claim]:
    """The scale-invariant weights."""
    weights: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    claims = {}
    for verdict in verdicts:
        weight = weights.get(verdict.name)
        if verdict.partition is None or weight is None:
            continue
        vectors = WeightVectors([weight], [verdict.partition], [verdict.name], [verdict.read])
        norm = float(vectors.norms().square().mean().sqrt())
        lengths = verdict.partition.lengths(verdict.shape, verdict.read)
        dim = round(float(lengths.to(torch.float64).mean()))
        # A weight that starts at zero, or of single numbers, has no course.
        if norm > 0 and dim > 1:
            shape = verdict.shape
            claims[weight] = _Claim(norm, dim, (shape[0], shape[1]) if len(shape) == 2 else None)
    return claims
