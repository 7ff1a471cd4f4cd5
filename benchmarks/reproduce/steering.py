"""Steering a pre-LN transformer: does a cap of the angle replace a warm-up, does Hyperball's rule
make the best learning rate depend less on the width, and does a brake slow norm growth as computed?

python benchmarks/reproduce/steering.py
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import desk
import lightning as L
import numpy as np
import torch
from gpt_balance import Windows, network
from torch import Tensor
from torch.nn import functional as F

from lightning_normdyn import NormDynCallback, RadialBrake, RotationControl
from lightning_normdyn.monitor.plots.axes import OKABE_ITO

sys.path.append(str(desk.HERE.parents[1] / "examples"))
from data_modules import Text

DESK = {"width": 64, "layers": 2, "heads": 4, "context": 48, "batch": 12, "steps": 500}
TINY = {"width": 8, "layers": 1, "heads": 2, "context": 8, "batch": 4, "steps": 20}
HIDDEN = "*blocks.*"
# Embeddings and head are trained alike in all runs, by AdamW at this rate, so that only what is
# steered differs.
OTHERS_LR = 3e-3
# Of the hidden matrices; of Hyperball's rule the angle of each step.
ADAMW_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
HYPERBALL_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
DECAY = 0.1
# Radians per step that the cap allows at the peak of the schedule.
CAP = 0.05
WARM_UP = 0.1
# The last losses of a run are its result: a single batch is noise.
LAST = 0.1
# Losses closer than this count as equal.
SAME_LOSS = 0.02


@dataclass(frozen=True)
class Arm:
    """One way to train the hidden matrices under AdamW."""

    warms_up: bool = True
    callbacks: Any = tuple
    decay: float = DECAY

    def factor(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0, over the largest: a warm-up, if there is one,
        and a cosine to a tenth."""
        warm_up = max(1, round(steps * WARM_UP)) if self.warms_up else 0
        if step < warm_up:
            return (step + 1) / warm_up
        share = (step - warm_up) / (steps - warm_up)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2


def cap() -> list[NormDynCallback]:
    return [RotationControl(CAP, bound="at_most", norm="free", params=HIDDEN)]


def hyperball() -> list[NormDynCallback]:
    return [RotationControl("lr", params=HIDDEN)]


def brake() -> list[NormDynCallback]:
    return [RadialBrake(0.5, 0.5, params=HIDDEN)]


WARM_UPS = {
    "warm-up": Arm(),
    "no warm-up": Arm(warms_up=False),
    "no warm-up, angle capped": Arm(warms_up=False, callbacks=cap),
}
WIDTHS = {"AdamW": Arm(), "Hyperball": Arm(callbacks=hyperball)}
BRAKES = {"free": Arm(decay=0.0), "braked": Arm(decay=0.0, callbacks=brake)}


# ------------------------------------------------------------------------------------ one fit


class Transformer(L.LightningModule):
    """Predicts the next character."""

    def __init__(self, gpt: torch.nn.Module, arm: Arm, lr: float, steps: int) -> None:
        super().__init__()
        self.gpt, self.arm, self.lr, self.steps = gpt, arm, lr, steps
        self.losses: list[float] = []

    def hidden(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.named_parameters() if "blocks." in n and p.dim() == 2}

    def squared_norms(self) -> dict[str, float]:
        return {name: float(p.detach().square().sum()) for name, p in self.hidden().items()}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        codes, following = batch
        loss = F.cross_entropy(self.gpt(codes).flatten(0, 1), following.flatten())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        hidden = list(self.hidden().values())
        known = set(hidden)
        others = [p for p in self.parameters() if p not in known]
        groups = [
            {"params": hidden, "lr": self.lr, "weight_decay": self.arm.decay},
            {"params": others, "lr": OTHERS_LR, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.arm.factor(step, self.steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


@dataclass
class Fit:
    """What one run leaves behind: its losses, and how much N = ‖w‖² of each hidden matrix grew."""

    losses: list[float]
    growth: dict[str, float]

    @property
    def loss(self) -> float:
        """Of the last steps; one that is not finite is infinite, since the run is lost."""
        last = self.losses[-max(1, round(LAST * len(self.losses))) :]
        loss = float(np.mean(last))
        return loss if math.isfinite(loss) else math.inf


def train(arm: Arm, lr: float, text: Text, args: argparse.Namespace, seed: int, width: int) -> Fit:
    torch.manual_seed(seed)
    settings = argparse.Namespace(**{**vars(args), "width": width})
    module = Transformer(network(len(text.characters), settings), arm, lr, args.steps)
    before = module.squared_norms()
    trainer = {"max_epochs": 1, "accelerator": args.accelerator, "callbacks": list(arm.callbacks())}
    desk.fit_quietly(module, Windows(text, args, seed), **trainer)
    after = module.squared_norms()
    return Fit(module.losses, {name: after[name] - before[name] for name in after})


# ------------------------------------------------------------------------------------ the tables

Grid = dict[str, dict[float, list[Fit]]]


def grid(
    arms: Mapping[str, tuple[Arm, Sequence[float]]],
    text: Text,
    args: argparse.Namespace,
    width: int,
) -> Grid:
    """All seeds of every arm at each of its rates."""
    found: Grid = {}
    for name, (arm, rates) in arms.items():
        found[name] = {}
        for lr in rates:
            found[name][lr] = [train(arm, lr, text, args, seed, width) for seed in args.seeds]
            print(name, width, lr, losses_in_words(found[name][lr]), file=sys.stderr, flush=True)
    return found


def mean_loss(fits: Sequence[Fit]) -> float:
    return float(np.mean([fit.loss for fit in fits]))


def losses_in_words(fits: Sequence[Fit]) -> str:
    return desk.spread([fit.loss for fit in fits])


def best(fits: Mapping[float, Sequence[Fit]]) -> float:
    """The rate of the smallest loss."""
    return min(fits, key=lambda lr: mean_loss(fits[lr]))


def about_warm_up(report: desk.Report, found: Grid) -> None:
    rows = []
    for name, by_rate in found.items():
        rows.append((name, *(losses_in_words(fits) for fits in by_rate.values())))
    columns = ("loss of the last tenth", *(f"lr {lr:g}" for lr in ADAMW_RATES))
    report.table("A cap of the angle in place of a warm-up, AdamW", columns, rows)

    with_it, without, capped = (found[name] for name in WARM_UPS)
    largest = ADAMW_RATES[-1]
    lost = mean_loss(without[largest]) - mean_loss(with_it[largest])
    report.claim(
        f"at the largest rate ({largest:g}) AdamW needs its warm-up",
        f"without it the loss is {lost:+.3f} higher",
        lost > SAME_LOSS,
        "a small network with LayerNorm survives its first steps",
    )
    gaps = {lr: mean_loss(capped[lr]) - mean_loss(with_it[lr]) for lr in ADAMW_RATES}
    words = ", ".join(f"{gap:+.3f} at {lr:g}" for lr, gap in gaps.items())
    report.claim(
        f"with no step above {CAP:g} rad (at_most), a run without warm-up is as good at every rate",
        f"loss against the run with warm-up: {words}",
        max(gaps.values()) <= SAME_LOSS,
        "the first steps also go in a poor direction, which no cap of their length mends",
    )


def about_widths(report: desk.Report, found: Mapping[int, Grid]) -> None:
    narrow, wide = found
    rows = []
    regrets = {}
    for name in WIDTHS:
        for width in found:
            by_rate = found[width][name]
            rates = [f"{lr:g}: {losses_in_words(fits)}" for lr, fits in by_rate.items()]
            rows.append((name, width, f"{best(by_rate):g}", *rates))
        # What it costs to take the narrow network's best rate at the larger width.
        at_wide = found[wide][name]
        chosen = best(found[narrow][name])
        regrets[name] = mean_loss(at_wide[chosen]) - mean_loss(at_wide[best(at_wide)])
    columns = ("rule", "width", "best", *("rate: loss of the last tenth",) * len(ADAMW_RATES))
    report.table("Rates and widths", columns, rows)
    words = []
    for name in WIDTHS:
        words.append(
            f"{name}: best {best(found[narrow][name]):g} at width {narrow}, "
            f"{best(found[wide][name]):g} at {wide}, regret {regrets[name]:.3f}"
        )
    adamw, ball = (regrets[name] for name in WIDTHS)
    report.claim(
        "under Hyperball's rule the best rate of the narrow network costs less at twice the width",
        "; ".join(words),
        ball < adamw,
        "four rates half a decade apart do not tell rates apart that differ by the width alone",
    )


def about_brake(report: desk.Report, found: Grid, lr: float) -> None:
    rows = []
    ratios: list[float] = []
    free, braked = (found[name][lr] for name in BRAKES)
    for matrix in free[0].growth:
        without = [fit.growth[matrix] for fit in free]
        with_it = [fit.growth[matrix] for fit in braked]
        ratio = float(np.mean(with_it) / np.mean(without))
        ratios.append(ratio)
        name = matrix.removeprefix("gpt.")
        rows.append((name, f"{np.mean(without):.3g}", f"{np.mean(with_it):.3g}", f"{ratio:.2f}"))
    columns = ("matrix", "growth of ‖w‖²", "braked", "ratio")
    report.table(f"Growth of norms without decay, AdamW {lr:g}", columns, rows)
    middle = float(np.median(ratios))
    report.claim(
        "a brake of one half (outward and inward) halves the growth of ‖w‖²",
        f"median over matrices {middle:.2f}, from {min(ratios):.2f} to {max(ratios):.2f}",
        abs(middle - 0.5) <= 0.05,
        "steps of another direction: shorter weights turn further, and the loss pulls otherwise",
    )
    losses = [mean_loss(fits) for fits in (free, braked)]
    report.claim(
        "its loss",
        f"free {losses[0]:.3f}, braked {losses[1]:.3f}",
        None,
    )


def draw(axes: Sequence[Any], warm_ups: Grid, widths: Mapping[int, Grid]) -> None:
    for color, (name, by_rate) in zip(OKABE_ITO, warm_ups.items(), strict=False):
        losses = [mean_loss(fits) for fits in by_rate.values()]
        axes[0].plot(list(by_rate), losses, color=color, marker="o", label=name)
    axes[0].set_title("a cap in place of a warm-up")
    for ax, name in zip(axes[1:], WIDTHS, strict=True):
        for color, (width, found) in zip(OKABE_ITO, widths.items(), strict=False):
            losses = [mean_loss(fits) for fits in found[name].values()]
            ax.plot(list(found[name]), losses, color=color, marker="o", label=f"width {width}")
        ax.set_title(f"{name}: rate and width")
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xlabel("learning rate of the hidden matrices")
        ax.legend(fontsize=8)
    axes[0].set_ylabel("loss of the last tenth")


def main() -> None:
    args = desk.arguments(__doc__.splitlines()[0], DESK, TINY)
    text = Text(None, args.batch, args.context)
    text.setup()
    narrow, wide = args.width, 2 * args.width
    about = f"""A pre-LN GPT without QK-norm ({args.layers} layers, widths {narrow} and {wide}, {args.heads} heads, context
        {args.context}, batch {args.batch}, {args.steps} steps, warm-up over a tenth of them, cosine to a tenth), on characters of
        Python's help texts. Only the hidden matrices are steered; embeddings, head and gains are under AdamW at {OTHERS_LR:g} in all
        runs. Losses are the mean training loss of the last tenth of the steps. The bars (losses within {SAME_LOSS:g}, growth within
        .05 of one half), the rates and the cap of {CAP:g} rad were set before the first run."""
    report = desk.Report("Steering a transformer", args, about)
    print("widths", narrow, wide, file=sys.stderr, flush=True)
    rates = {"AdamW": ADAMW_RATES, "Hyperball": HYPERBALL_RATES}
    arms = {name: (arm, rates[name]) for name, arm in WIDTHS.items()}
    widths = {width: grid(arms, text, args, width) for width in (narrow, wide)}
    others = {name: (arm, ADAMW_RATES) for name, arm in WARM_UPS.items() if name != "warm-up"}
    # AdamW with its warm-up has been run already.
    warm_ups = {
        "warm-up": widths[narrow]["AdamW"],
        **grid(others, text, args, narrow),
    }
    brake_lr = ADAMW_RATES[1]
    brakes = grid({name: (arm, (brake_lr,)) for name, arm in BRAKES.items()}, text, args, narrow)
    about_warm_up(report, warm_ups)
    about_widths(report, widths)
    about_brake(report, brakes, brake_lr)
    picture, axes = desk.figure(3)
    draw(axes, warm_ups, widths)
    report.write("steering", picture)


if __name__ == "__main__":
    main()
