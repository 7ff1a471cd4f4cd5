"""The judge of every client: weights copied before and after each step, the angles between them in
float64, and whether the monitor said the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_normdyn import NormDynamicsMonitor
from lightning_normdyn.engine.flavours import Callback
from lightning_normdyn.geometry.partition import Partition

# Relative, and in radians. The monitor takes its sums in float32.
TOLERANCE, SMALLEST = 2e-3, 1e-8


@dataclass
class Result:
    """What came of one client.

    Args:
        client: the model or optimizer, as its package calls it.
        state: ``"right"``, ``"refused"``, ``"skipped"`` or ``"wrong"``.
        why: in words; empty for what is right.
        weights: how many weights were compared, and how many of them are scale-invariant.
        steps: at how many steps.
    """

    client: str
    state: str
    why: str = ""
    weights: int = 0
    scale_invariant: int = 0
    steps: int = 0


class Copies(Callback):
    """Keeps every matrix of the model before and after each batch, in order."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.before.append(_matrices(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        self.after.append(_matrices(pl_module))


def _matrices(module: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.ndim > 1
    }


def measuring() -> tuple[Copies, NormDynamicsMonitor]:
    """The callbacks of one fit: the judge, and a monitor that logs every step."""
    return Copies(), NormDynamicsMonitor(1, tables=False)


def angle(before: Tensor, after: Tensor, partition: Partition) -> float:
    """The root mean square over a weight's vectors of their angles, in radians; a vector of length
    zero, such as a padding embedding, has none."""
    labels = partition.labels.flatten()
    kept = tuple(partition.keep)
    in_front = tuple(range(len(kept)))
    rows = [
        weight.double().movedim(kept, in_front).reshape(labels.numel(), -1)
        for weight in (before, after)
    ]

    def per_vector(values: Tensor) -> Tensor:
        sums = torch.zeros(partition.n, dtype=torch.float64)
        return sums.index_add(0, labels[labels >= 0], values.sum(1)[labels >= 0])

    lengths = [per_vector(row.square()).sqrt() for row in rows]
    units = []
    for row, length in zip(rows, lengths, strict=True):
        unit = row.clone()
        unit[labels >= 0] /= length[labels[labels >= 0], None]
        units.append(unit)
    apart = per_vector((units[0] - units[1]).square()).sqrt()
    along = per_vector((units[0] + units[1]).square()).sqrt()
    angles = 2 * torch.atan2(apart, along)
    return float(angles.square().nanmean().sqrt())


def judge(client: str, copies: Copies, monitor: NormDynamicsMonitor) -> Result:
    """Compare every angle that the monitor has recorded, and look for weights it has missed."""
    targets = {t.name: t for plan in monitor.plans.values() for t in plan.targets}
    first, last = copies.before[0], copies.after[-1]
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    compared, faults = 0, []
    for name, target in targets.items():
        steps, angles = monitor.history.curve(f"angular_update/{name}")
        for step, recorded in zip(steps.tolist(), angles.tolist(), strict=True):
            expected = angle(copies.before[step][name], copies.after[step][name], target.partition)
            compared += 1
            close = abs(recorded - expected) <= TOLERANCE * expected + SMALLEST
            # A vector of length zero has no angle, to either.
            if not close and not (recorded != recorded and expected != expected):
                faults.append(f"{name} at step {step}: {recorded:.3g} instead of {expected:.3g}")
        if not len(steps) and name in moved:
            faults.append(f"{name} was never measured")
    faults += [
        f"{name} moved and is no target"
        for name in moved
        if name not in targets and not _is_gain(first[name])
    ]
    if not compared and not faults:
        faults.append("nothing was compared")
    return Result(
        client,
        "wrong" if faults else "right",
        "; ".join(faults[:3]),
        len(targets),
        sum(target.scale_invariant for target in targets.values()),
        len(monitor.history),
    )


def _is_gain(weight: Tensor) -> bool:
    """Rows that are single numbers have a length and no direction."""
    return weight[0].numel() == 1 or weight.numel() == weight.shape[-1] or weight.shape[0] == 1
