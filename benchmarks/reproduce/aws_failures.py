"""AWS paper, Tables 1 and 2: a fixed decay makes weight-standardized networks fail,
AdaptiveWeightShrink never does.

    python benchmarks/reproduce/aws_failures.py

Where the failures come from: a filter that no gradient reaches only decays. Under a fixed decay its
length falls like exp(-t) until its square rounds to zero, and weight standardization divides by it.
Under AWS it falls like 1/t. First the filter alone, then networks.
"""

from __future__ import annotations

import math
from typing import Any

import desk
import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_normdyn import AdaptiveWeightShrink
from lightning_normdyn.monitor.plots.axes import OKABE_ITO
from lightning_normdyn.parametrizations import weight_standardization
from lightning_normdyn.theory.outlook import free_decay_rate, steps_to_underflow

DESK = {
    "lone_steps": 60_000,
    "aws_steps": 5_000,
    "steps": 1_300,
    "adam_steps": 3_600,
    "width": 4,
    "lr": 0.5,
    "weight_decay": 1e-2,
    "alpha": 1e-1,
}
TINY = {"lone_steps": 300, "aws_steps": 30, "steps": 20, "adam_steps": 20, "width": 2}
DECAYS = (1e-2, 1e-3, 1e-4, 1e-5)
ALPHAS = (1e-1, 1e-3, 1e-5)
STD = 0.17  # of a 3x3 filter over 8 channels as usually initialized
STEPS_PER_EPOCH = 5005  # of ImageNet at batch size 256
DENORMAL = 2.6e-23  # below this standard deviation the variance is 0 in float32


# --------------------------------------------------------------------------------- one filter alone


def lone_filter(seed: int = 0) -> Tensor:
    w = torch.randn(1, 8, 3, 3, generator=torch.Generator().manual_seed(seed))
    return (w - w.mean()) / w.std(correction=0) * STD


def variance(w: Tensor) -> float:
    """As weight standardization computes it, in float32."""
    return float((w - w.mean()).square().mean())


def decay_alone(
    optimizer_class: type, settings: dict[str, Any], steps: int
) -> tuple[int | None, list[tuple[int, float]]]:
    """Decay a filter without gradient until its variance is 0: at which step (None: not within
    ``steps``), and its std on the way."""
    w = nn.Parameter(lone_filter())
    w.grad = torch.zeros_like(w)
    optimizer = optimizer_class([w], foreach=False, **settings)
    curve = [(1, STD)]
    for step in range(1, steps + 1):
        optimizer.step()
        if step % 10 == 0:
            found = variance(w.detach())
            if step >= 1.1 * curve[-1][0] or found == 0:
                curve.append((step, found**0.5))
            if found == 0:
                return step, curve
    return None, curve


class LoneFilters(L.LightningModule):
    """One filter per alpha, with a loss that has no gradient; AdaptiveWeightShrink is all that
    moves them."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.filters = nn.ParameterList([lone_filter() for _ in ALPHAS])
        self.curve: list[list[float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx % 50 == 0 or batch_idx == len(self.trainer.train_dataloader) - 1:
            self.curve.append([batch_idx, *[variance(w.detach()) ** 0.5 for w in self.filters]])
        return sum((0 * w).sum() for w in self.filters)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def shrink_alone(optimizer: str, steps: int) -> np.ndarray:
    """Rows of (step, std under each alpha)."""
    module = LoneFilters(optimizer)
    callbacks = [
        AdaptiveWeightShrink(alpha, statistic="std", params=f"filters.{i}")
        for i, alpha in enumerate(ALPHAS)
    ]
    desk.fit_quietly(module, torch.arange(steps), max_steps=steps, callbacks=callbacks)
    return np.array(module.curve)


def lone_filters(report: desk.Report, args: Any, ax: Any) -> None:
    rows, independent, errors = [], [], []
    sgd = {"lr": 0.1, "momentum": 0.9}
    group = {**sgd, "dampening": 0, "nesterov": False}
    for decay, colour in zip(DECAYS, OKABE_ITO, strict=False):
        found, curve = decay_alone(torch.optim.SGD, {**sgd, "weight_decay": decay}, args.lone_steps)
        rate = free_decay_rate(torch.optim.SGD, {**group, "weight_decay": decay})
        assert rate is not None
        predicted = steps_to_underflow(STD, rate)
        if found:
            errors.append(abs(found / predicted - 1))
        step, std = curve[-1]
        measured = (
            str(found)
            if found
            else f"not within {step}; std {std:.3g}, formula {STD * math.exp(-rate * step):.3g}"
        )
        rows.append(
            (
                "SGD, momentum .9, lr .1",
                f"{decay:g}",
                measured,
                f"{predicted:.0f}",
                f"{predicted / STEPS_PER_EPOCH:.2g}",
            )
        )
        ax.plot(*zip(*curve, strict=True), color=colour, label=f"SGD, decay {decay:g}")
    for decay in DECAYS:
        found, curve = decay_alone(
            torch.optim.Adam, {"lr": 1e-3, "weight_decay": decay}, min(args.lone_steps, 20_000)
        )
        independent.append(found)
        epochs = f"{found / STEPS_PER_EPOCH:.2g}" if found else "-"
        rows.append(
            (
                "Adam, lr .001",
                f"{decay:g}",
                found or f"not within {curve[-1][0]}",
                "the same for every decay",
                epochs,
            )
        )
        label = "Adam, all four decays" if decay == DECAYS[0] else None
        ax.plot(*zip(*curve, strict=True), color="black", linestyle=":", label=label)
    report.table(
        "A filter without gradient, float32: steps until its variance is 0",
        (
            "optimizer",
            "decay",
            "measured",
            "formula",
            "in epochs of ImageNet (arithmetic, batch 256)",
        ),
        rows,
    )
    report.claim(
        "a dead filter under SGD underflows when the formula says so",
        f"{len(errors)} of {len(DECAYS)} decays run to the end, off by at most {max(errors):.1%}"
        if errors
        else "none run to the end",
        bool(errors) and max(errors) < 0.02,
    )
    times = [t for t in independent if t]
    report.claim(
        "under Adam (decay in the gradient) it underflows just as fast with every decay",
        f"{min(times)} to {max(times)} steps for decays {DECAYS[0]:g} to {DECAYS[-1]:g}"
        if times
        else "none within the steps given",
        len(times) == len(DECAYS) and max(times) < 1.1 * min(times),
    )
    aws_rows, worst = [], 0.0
    for optimizer, lr in (("sgd", 0.1), ("adam", 1e-3)):
        curve = shrink_alone(optimizer, args.aws_steps)
        for i, alpha in enumerate(ALPHAS):
            formula = 1 / (1 / STD + lr * alpha * curve[-1, 0])
            worst = max(worst, abs(curve[-1, i + 1] / formula - 1))
            aws_rows.append((optimizer, f"{alpha:g}", f"{curve[-1, i + 1]:.4g}", f"{formula:.4g}"))
            if optimizer == "sgd" and i == 0:
                ax.plot(
                    curve[1:, 0],
                    curve[1:, 1],
                    color=OKABE_ITO[4],
                    linewidth=2,
                    label=f"SGD, AWS {alpha:g}",
                )
    report.table(
        f"The same filter under AdaptiveWeightShrink: std after {args.aws_steps} steps, from {STD}",
        ("optimizer", "alpha", "measured", "1 / (1/std0 + lr alpha t)"),
        aws_rows,
    )
    report.claim(
        "under AWS it shrinks like 1/t, for every alpha and optimizer",
        f"off by at most {worst:.1%}",
        worst < 0.02,
    )
    ax.axhline(DENORMAL, color="grey", linewidth=0.8)
    ax.text(12, DENORMAL * 4, "variance 0 in float32", color="grey", fontsize=8)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="step",
        ylabel="std of the filter",
        title="A filter without gradient",
        ylim=(1e-24, 3),
    )
    ax.legend(fontsize=8, loc="center left", frameon=False)


# ----------------------------------------------------------------------------------- whole networks


class UnguardedStandardization(nn.Module):
    """Eq. 3 as it is printed, without any guard against a standard deviation of 0."""

    statistic = "std"  # tells AdaptiveWeightShrink to go by the standard deviation

    def forward(self, weight: Tensor) -> Tensor:
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        return centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt()


def standardize(network: nn.Module, kind: str) -> nn.Module:
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            if kind == "as printed":
                parametrize.register_parametrization(layer, "weight", UnguardedStandardization())
            else:
                weight_standardization(layer, eps=1e-5 if kind == "std + 1e-5" else 0.0)
    return network


def shortest_filter(run: desk.Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the smallest norm of all filters at each."""
    names = [
        name
        for name in run.history.vector_names()
        if name.startswith("weight_norm/") and name.endswith("original")
    ]
    curves = [run.history.vectors(name) for name in names]
    return curves[0][0], np.min([values.min(1) for _, values in curves], axis=0)


def networks(report: desk.Report, args: Any, axes: list[Any]) -> None:
    # Without noise the few digits are soon known by heart: gradients vanish, and filters die as
    # they do late in a long training.
    images = desk.load_images(args)._replace(noise=0.0)
    report.about += (
        f" Networks: residual, 9 convolutions, width {args.width}, weight-standardized, "
        f"each followed by BatchNorm; on {images.name}."
    )
    arms = (
        ("as printed", "decay", "sgd"),
        ("std + 1e-5", "decay", "sgd"),
        ("this package's", "decay", "sgd"),
        ("as printed", "AWS", "sgd"),
        ("as printed", "decay", "adam"),
        ("as printed", "AWS", "adam"),
    )
    rows, failed, accuracy, warned = [], {}, {}, 0
    styles = {
        "as printed": "-",
        "std + 1e-5": (0, (4, 2)),
        "this package's": (0, (1, 2)),
    }  # under decay their curves coincide
    for arm in arms:
        kind, rule, optimizer = arm
        colour = OKABE_ITO[4] if rule == "AWS" else OKABE_ITO[list(styles).index(kind)]
        recipe = desk.Recipe(
            steps=args.steps if optimizer == "sgd" else args.adam_steps,
            optimizer=optimizer,
            lr=args.lr if optimizer == "sgd" else 1e-2,
            weight_decay=args.weight_decay if rule == "decay" else 0.0,
            batch_size=32,
        )
        runs = []
        for seed in args.seeds:
            callbacks = [AdaptiveWeightShrink(args.alpha)] if rule == "AWS" else []
            run = desk.fit(
                lambda kind=kind: standardize(
                    desk.residual_network(images.channels, args.width), kind
                ),
                images,
                recipe,
                seed,
                callbacks,
                log_every=20,
                per_vector=True,
                accelerator=args.accelerator,
            )
            runs.append(run)
            ax = axes[0] if optimizer == "sgd" else axes[1]
            steps, shortest = shortest_filter(run)
            label = f"{rule}, {kind}" if seed == args.seeds[0] else None
            ax.plot(
                steps, shortest, color=colour, linestyle=styles[kind], linewidth=1.2, label=label
            )
            if run.failed_at:
                ax.plot(steps[-1], shortest[-1], "x", color=colour)
        failed[arm] = [run.failed_at for run in runs]
        accuracy[arm] = [run.test_accuracy for run in runs if run.failed_at is None]
        if kind == "as printed" and rule == "decay":
            warned += sum(
                bool(run.failed_at)
                and any("no gradient and only shrink" in text for text in run.said)
                for run in runs
            )
        strength = f"{rule} {args.weight_decay if rule == 'decay' else args.alpha:g}"
        ends = ", ".join("none" if step is None else str(step) for step in failed[arm])
        last = [shortest_filter(run)[1][-1] for run in runs if run.failed_at is None]
        rows.append(
            (
                f"{optimizer}, lr {recipe.lr:g}, {recipe.steps} steps",
                kind,
                strength,
                ends,
                desk.spread(accuracy[arm]) if accuracy[arm] else "-",
                f"{min(last):.1e}" if last else "-",
            )
        )
    report.table(
        "Whole networks: step of the first loss that is not finite, per seed",
        (
            "optimizer",
            "standardization",
            "rule",
            "failed at",
            "test accuracy (of those that did not fail)",
            "shortest filter at the end",
        ),
        rows,
    )
    printed = [arm for arm in arms if arm[0] == "as printed"]
    lengths = {"sgd": args.steps, "adam": args.adam_steps}
    for optimizer, name in (("sgd", "SGD"), ("adam", "Adam")):
        fails = [step for arm in printed if arm[1:] == ("decay", optimizer) for step in failed[arm]]
        report.claim(
            f"networks standardized as printed fail under decay {args.weight_decay:g} and {name}",
            f"{sum(step is not None for step in fails)} of {len(fails)} runs in "
            f"{lengths[optimizer]} steps",
            all(step is not None for step in fails),
            "filters collapse in every run (see the picture), but few die for good early enough; "
            "more steps would be needed",
        )
    shrunk = [step for arm in printed if arm[1] == "AWS" for step in failed[arm]]
    report.claim(
        "under AWS none fails",
        f"{sum(step is not None for step in shrunk)} of {len(shrunk)} runs failed",
        all(step is None for step in shrunk),
    )
    guarded = [step for arm in arms if arm[0] != "as printed" for step in failed[arm]]
    report.claim(
        "with eps in the standardization, or this package's guard, decay does not fail either "
        "(filters collapse silently)",
        f"{sum(step is not None for step in guarded)} of {len(guarded)} runs failed",
        all(step is None for step in guarded),
    )
    fails = [step for arm in printed for step in failed[arm] if step is not None]
    report.claim(
        "NormDynamicsMonitor warns of the dead filter beforehand",
        f"in {warned} of the {len(fails)} runs that failed",
        None,
    )
    for ax, title in zip(
        axes, (f"Networks, SGD lr {args.lr:g}", "Networks, Adam lr 0.01"), strict=True
    ):
        ax.axhline(DENORMAL, color="grey", linewidth=0.8)
        ax.set(
            yscale="log",
            xlabel="step",
            ylabel="shortest filter (norm)",
            title=f"{title} (x: failed)",
            ylim=(1e-31, 10),
        )
        ax.legend(fontsize=8, loc="center left", frameon=False)


def main() -> None:
    args = desk.arguments(__doc__.splitlines()[0], DESK, TINY)
    about = """The AWS paper's Tables 1 and 2 (WS-ResNet50 on ImageNet): training fails for decays 1e-2 and 1e-3 with SGD, for every decay
        with Adam, and for no alpha of AWS. Here: the mechanism on one filter, where every decay can be run to its end, and small networks
        at the decay where failures come soon."""
    report = desk.Report(
        "A fixed decay can make training fail; AdaptiveWeightShrink does not", args, about
    )
    picture, axes = desk.figure(3)
    lone_filters(report, args, axes[0])
    networks(report, args, axes[1:])
    report.note("""The failures at 1e-3 and below with SGD, and with Adam at its usual learning rate, take more steps than these networks
        are trained for; the lone filter shows when they would come. Accuracies under decay and AWS are not comparable: their strengths
        were not matched.""")
    report.write("aws_failures", picture)


if __name__ == "__main__":
    main()
