"""SGDP slides, Figure 3 and Table 2: momentum makes weights grow, radial projection stops it.

python benchmarks/reproduce/projection_norm_growth.py --cifar PATH
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import desk
import numpy as np

from lightning_normdyn import RadialProjection
from lightning_normdyn.monitor.plots.axes import OKABE_ITO

DESK = {
    "growth_steps": 100,
    "steps": 1_200,
    "width": 8,
    "train_images": 1_000,
    "lr": 0.1,
    "adam_lr": 1e-3,
    "weight_decay": 5e-3,
    "drop": 0.6,
}
TINY = {"growth_steps": 10, "steps": 10, "width": 2}
MOMENTA = (0.5, 0.9, 0.95)


def growth(run: desk.Run) -> np.ndarray:
    """Of each layer, how much the sum of squares has grown, relative to the start."""
    found = []
    for name in desk.layers_of(run.history, "weight_norm"):
        squares = (run.history.vectors(f"weight_norm/{name}")[1].astype(float) ** 2).sum(1)
        found.append(squares[-1] / squares[0] - 1)
    return np.array(found)


def growth_ratios(
    report: desk.Report, args: Any, images: desk.Images
) -> list[tuple[str, np.ndarray, float]]:
    """Growth without projection over growth with it, per layer (mean over seeds), and what theory
    says."""
    settings = [
        (
            f"SGD, momentum {m:g}",
            desk.Recipe(args.growth_steps, lr=args.lr, momentum=m, batch_size=32),
            m,
        )
        for m in MOMENTA
    ]
    adam = desk.Recipe(args.growth_steps, optimizer="adamw", lr=args.adam_lr, batch_size=32)
    settings.append(("AdamW, beta1 0.9", adam, 0.9))
    rows, ratios = [], []
    for name, recipe, momentum in settings:
        free, projected = (
            np.mean(
                [
                    growth(
                        desk.fit(
                            lambda: desk.plain_network(images.channels, args.width),
                            images,
                            recipe,
                            seed,
                            [RadialProjection()] if project else [],
                            per_vector=True,
                            accelerator=args.accelerator,
                        )
                    )
                    for seed in args.seeds
                ],
                axis=0,
            )
            for project in (False, True)
        )
        theory = (1 + momentum) / (1 - momentum)
        ratios.append((name, free / projected, theory))
        ratio = " ".join(f"{r:.1f}" for r in free / projected)
        rows.append(
            (
                name,
                " ".join(f"{g:.3f}" for g in free),
                " ".join(f"{g:.4f}" for g in projected),
                ratio,
                f"{theory:.0f}",
            )
        )
    report.table(
        f"Growth of the squared norm in the first {args.growth_steps} steps without decay, layers "
        f"1 to 6, mean over seeds",
        ("optimizer", "as it is", "projected", "ratio", "(1 + beta) / (1 - beta)"),
        rows,
    )
    report.claim(
        "SGD without projection grows (1 + beta) / (1 - beta) times as fast",
        "; ".join(
            f"beta {m:g}: {r.min():.1f} to {r.max():.1f} over layers, theory {t:.0f}"
            for m, (_, r, t) in zip(MOMENTA, ratios, strict=False)
        ),
        all(0.6 < np.median(r) / t < 1.4 for _, r, t in ratios[: len(MOMENTA)]),
        "theory assumes gradients that are all noise; here successive gradients also share a "
        "direction",
    )
    name, ratio, theory = ratios[-1]
    report.claim(
        "the same for Adam (AdamP)",
        f"{ratio.min():.1f} to {ratio.max():.1f} over layers, theory {theory:.0f}",
        0.6 < float(np.median(ratio)) / theory < 1.4,
        "theory assumes gradients that are all noise; early Adam steps are all of one size and "
        "share a direction",
    )
    return ratios


def accuracies(report: desk.Report, args: Any, images: desk.Images) -> dict[str, list[desk.Run]]:
    sgd = desk.Recipe(
        args.steps,
        lr=args.lr,
        batch_size=32,
        drops=(args.drop, (1 + args.drop) / 2),
        rest_decay=5e-4,
    )
    decayed, adam = (
        replace(sgd, weight_decay=args.weight_decay),
        replace(sgd, optimizer="adamw", lr=args.adam_lr),
    )
    arms = {
        "SGD": (sgd, False),
        "SGD, decay": (decayed, False),
        "SGDP": (sgd, True),
        "SGDP, decay": (decayed, True),
        "AdamW": (adam, False),
        "AdamP": (adam, True),
    }
    runs = {
        name: [
            desk.fit(
                lambda: desk.plain_network(images.channels, args.width),
                images,
                recipe,
                seed,
                [RadialProjection()] if project else [],
                log_every=20,
                accelerator=args.accelerator,
            )
            for seed in args.seeds
        ]
        for name, (recipe, project) in arms.items()
    }
    before = 0.98 * args.drop * args.steps

    def at_drop(name: str, key: str) -> float:
        return desk.mean([desk.near(run.history, f"normdyn/{key}", before) for run in runs[name]])

    report.table(
        f"{args.steps} steps; SGDP and AdamP: RadialProjection on torch's SGD and AdamW",
        (
            "run",
            "decay",
            "test accuracy",
            "test loss",
            "effective step before the drop",
            "norm before the drop",
        ),
        [
            (
                name,
                f"{arms[name][0].weight_decay:g}",
                desk.spread([r.test_accuracy for r in found]),
                desk.spread([r.test_loss for r in found]),
                f"{at_drop(name, 'effective_step_size'):.3g}",
                f"{at_drop(name, 'weight_norm'):.3g}",
            )
            for name, found in runs.items()
        ],
    )
    step = at_drop("SGDP", "effective_step_size") / at_drop("SGD", "effective_step_size")
    report.claim(
        "projected, the effective step stays larger (no decay)",
        f"SGDP's is {step:.1f} times SGD's before the drop",
        step > 1.2,
    )

    def better(text: str, these: str, those: str, otherwise: str) -> None:
        difference, t = desk.paired(
            [r.test_accuracy for r in runs[these]], [r.test_accuracy for r in runs[those]]
        )
        report.claim(
            text,
            f"{100 * difference:+.1f} points, t {t:.1f}",
            difference > 0 and desk.clear(t, len(args.seeds)),
            otherwise,
        )

    noise = "there may be no difference at this size; three seeds would show only a large one"
    better("SGDP is more accurate than SGD without decay", "SGDP", "SGD", noise)
    better("SGDP is more accurate than SGD with decay", "SGDP, decay", "SGD, decay", noise)
    better(
        "AdamP is more accurate than AdamW without decay",
        "AdamP",
        "AdamW",
        "Adam's norms hardly grow in so few steps, projected or not",
    )
    costs = {
        n: desk.paired(
            [r.test_accuracy for r in runs[f"{n}, decay"]], [r.test_accuracy for r in runs[n]]
        )
        for n in ("SGD", "SGDP")
    }
    report.claim(
        "leaving decay out costs less under SGDP than under SGD (Figure 3)",
        ", ".join(
            f"{name} {100 * cost:.1f} points (t {t:.1f})" for name, (cost, t) in costs.items()
        ),
        desk.clear(costs["SGD"][1], len(args.seeds))
        and costs["SGD"][0] > max(0.0, costs["SGDP"][0]),
        "at this size decay hardly changes the accuracy in the first place",
    )
    return runs


def main() -> None:
    args = desk.arguments(__doc__.splitlines()[0], DESK, TINY)
    images = desk.load_images(args)
    about = f"""Six convolutions with BatchNorm, width {args.width}, batch 32; on {images.name}. With momentum, the part of a step that
        comes from older gradients points along the weight and lengthens it; RadialProjection takes that part out. Nothing was tuned."""
    report = desk.Report("Momentum makes weights grow; radial projection stops it", args, about)
    ratios = growth_ratios(report, args, images)
    runs = accuracies(report, args, images)
    picture, axes = desk.figure(3)
    for i, (name, ratio, theory) in enumerate(ratios):
        axes[0].plot(
            range(1, len(ratio) + 1), ratio, "o-", color=OKABE_ITO[i], label=name, linewidth=1
        )
        if i < len(MOMENTA):
            axes[0].axhline(theory, color=OKABE_ITO[i], linestyle=(0, (4, 2)), linewidth=1)
    axes[0].set(
        yscale="log",
        xlabel="layer",
        ylabel="ratio",
        title="Growth as it is / projected (dashed: theory)",
    )
    axes[0].legend(fontsize=8, frameon=False)
    for i, name in enumerate(("SGD", "SGD, decay", "SGDP", "SGDP, decay")):
        style = {"color": OKABE_ITO[i], "label": name, "linewidth": 1.4}
        axes[1].plot(*desk.mean_curve(runs[name], "normdyn/weight_norm"), **style)
        axes[2].plot(*desk.mean_curve(runs[name], "normdyn/effective_step_size"), **style)
    axes[1].set(yscale="log", xlabel="step", ylabel="norm (mean over filters)", title="Weight norm")
    axes[2].set(
        yscale="log", xlabel="step", ylabel="chord per step (RMS)", title="Effective step size"
    )
    axes[1].legend(fontsize=8, frameon=False)
    report.write("projection_norm_growth", picture)


if __name__ == "__main__":
    main()
