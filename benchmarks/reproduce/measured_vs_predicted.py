"""Measured angular update beside the predicted one, on a BatchNorm network: where the prediction
holds, and where it does not.

python benchmarks/reproduce/measured_vs_predicted.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import desk
import numpy as np
import torch

from lightning_normdyn import AdaptiveWeightShrink, RadialProjection
from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.monitor.plots.axes import OKABE_ITO
from lightning_normdyn.monitor.predictions import Prediction, predict
from lightning_normdyn.monitor.verdicts import Course, norm_has_settled
from lightning_normdyn.theory.words import AS_EXPECTED

DESK = {
    "width": 8,
    "lr": 0.1,
    "momentum": 0.9,
    "strong": 5e-3,
    "weak": 5e-4,
    "strong_steps": 1_500,
    "weak_steps": 3_500,
    "noise": 0.5,
}
TINY = {"width": 2, "strong_steps": 40, "weak_steps": 40}
WITHIN = 0.25

# Decays strong enough to settle within the same steps: RadialProjection applies a tenth of what it
# takes over.
METHODS: dict[str, tuple[dict[str, Any], Callable[[], list[Any]]]] = {
    "SGD without momentum": ({"lr": 0.5, "momentum": 0.0, "weight_decay": 0.01}, list),
    "AdamW": ({"optimizer": "adamw", "lr": 5e-3, "weight_decay": 1.0}, list),
    "SGDP": ({"lr": 0.1, "weight_decay": 0.05}, lambda: [RadialProjection()]),
    "AdamP": (
        {"optimizer": "adamw", "lr": 5e-3, "weight_decay": 10.0},
        lambda: [RadialProjection()],
    ),
    "AWS on SGD with momentum": ({"lr": 0.1}, lambda: [AdaptiveWeightShrink(0.06)]),
    "Adam with decay in the gradient": (
        {"optimizer": "adam", "lr": 3e-3, "weight_decay": 5e-3},
        list,
    ),
}
# Change of a norm up to which it stands still.
STILL = 0.05
ROUGH = "Adam with decay in the gradient"


def prediction(args: Any, weight_decay: float) -> Prediction:
    """The same for every layer: SGD's angle asks for neither norm nor gradient."""
    group = {
        "weight_decay": weight_decay,
        "momentum": args.momentum,
        "dampening": 0,
        "nesterov": False,
    }
    found = predict(torch.optim.SGD, group, Effects(), {"lr": args.lr, "weight_norm": 1.0}, 1)
    assert found is not None
    return found


def has_settled(run: desk.Run, layer: str, foreseen: Prediction) -> bool:
    """By its norm alone: angles are what is compared here."""
    course = Course()
    for step in run.history.column(f"angular_update/{layer}")[0].tolist():
        course.add(step + 1, foreseen)
    return norm_has_settled(run.history, layer, course)


def stands_still(run: desk.Run, layer: str) -> bool:
    """Whether the norm has hardly changed between the last two eighths of a run."""
    key = f"weight_norm/{layer}"
    before, after = (desk.window(run.history, key, start, start + 0.125) for start in (0.75, 0.875))
    return abs(after / before - 1) < STILL


def other_methods(report: desk.Report, args: Any, images: desk.Images) -> None:
    """The same network under other optimizers and rules, each layer against the prediction that the
    monitor logged for it."""
    rows = []
    for name, (options, callbacks) in METHODS.items():
        recipe = desk.Recipe(steps=args.strong_steps, **options)
        ratios, calm, predictions = [], [], []
        for seed in args.seeds:

            def build() -> Any:
                return desk.residual_network(images.channels, args.width)

            run = desk.fit(
                build,
                images._replace(noise=args.noise),
                recipe,
                seed,
                callbacks(),
                accelerator=args.accelerator,
            )
            for layer in desk.layers_of(run.history, "equilibrium_angular_update"):
                foreseen = desk.window(
                    run.history, f"equilibrium_angular_update/{layer}", 0.75, 1.0, rms=True
                )
                ratio = (
                    desk.window(run.history, f"angular_update/{layer}", 0.75, 1.0, rms=True)
                    / foreseen
                )
                ratios.append(ratio)
                predictions.append(foreseen)
                if stands_still(run, layer):
                    calm.append(ratio)
        setting = ", ".join(
            f"{key.replace('_', ' ')} {value:g}"
            for key, value in options.items()
            if key != "optimizer"
        )
        setting += "".join(
            f", alpha {c.alpha:g}" for c in callbacks() if isinstance(c, AdaptiveWeightShrink)
        )
        among = f"{min(calm):.2f} to {max(calm):.2f}" if calm else "-"
        spanned = f"{min(ratios):.2f} to {max(ratios):.2f}"
        span = sorted({f"{min(predictions):.3g}", f"{max(predictions):.3g}"})
        rows.append(
            (name, setting, " to ".join(span), spanned, f"{len(calm)} of {len(ratios)}", among)
        )
        rough = " (a rough prediction, known to be off)" if name == ROUGH else ""
        holds = bool(np.abs(np.array(calm) - 1).max() <= WITHIN) if calm else None
        why = (
            "Adam divides the decay by the same denominator as the gradient, which differs from "
            "entry to entry"
            if rough
            else ""
        )
        claim = f"{name}, noise {args.noise:g}: settled layers within {WITHIN:.0%} of the prediction{rough}"
        report.claim(
            claim,
            f"all layers {spanned}, {len(calm)} of {len(ratios)} settled"
            + (f"; those {among}" if calm else ""),
            holds,
            why,
        )
    report.table(
        f"Other optimizers and rules, noise {args.noise:g}, {args.strong_steps} steps",
        (
            "method",
            "settings",
            "predicted (rad per step)",
            "measured / predicted",
            "settled",
            "of those settled",
        ),
        rows,
    )


def main() -> None:
    args = desk.arguments(__doc__.splitlines()[0], DESK, TINY)
    images = desk.load_images(args)
    about = f"""A residual network of 9 convolutions with BatchNorm, width {args.width}, SGD with momentum {args.momentum:g}, constant
        learning rate {args.lr:g}, on {images.name}. Two decays of the convolutions: {args.strong:g} for {args.strong_steps} steps,
        {args.weak:g} for {args.weak_steps}; with pixel noise {args.noise:g} and without. The noise was added after a look at the runs
        without it. Ratio: RMS angular update over the last quarter of the run, divided by the prediction. Settled: the squared norm moves
        by less than a tenth per relaxation time, after 6 of them."""
    report = desk.Report("Measured and predicted angular updates", args, about)
    figure, axes = desk.figure(4, 2)
    decays = ((args.strong, args.strong_steps), (args.weak, args.weak_steps))
    arms = {(decay, noise): steps for noise in (args.noise, 0.0) for decay, steps in decays}
    settled_ratios: dict[tuple[float, float], list[float]] = {}
    all_ratios: dict[tuple[float, float], list[float]] = {}
    for column, (arm, steps) in enumerate(arms.items()):
        decay, noise = arm
        name = f"decay {decay:g}, noise {noise:g}"
        foreseen = prediction(args, decay)
        assert foreseen.relaxation is not None
        recipe = desk.Recipe(steps=steps, lr=args.lr, momentum=args.momentum, weight_decay=decay)

        def build() -> Any:
            return desk.residual_network(images.channels, args.width)

        runs = [
            desk.fit(
                build, images._replace(noise=noise), recipe, seed, accelerator=args.accelerator
            )
            for seed in args.seeds
        ]
        layers = desk.layers_of(runs[0].history, "angular_update")
        rows = []
        settled_ratios[arm], all_ratios[arm] = [], []
        for layer in layers:
            key = f"angular_update/{layer}"
            ratios = [
                desk.window(run.history, key, 0.75, 1.0, rms=True) / foreseen.angular_update
                for run in runs
            ]
            calm = [has_settled(run, layer, foreseen) for run in runs]
            all_ratios[arm] += ratios
            settled_ratios[arm] += [
                ratio for ratio, still in zip(ratios, calm, strict=True) if still
            ]
            verdicts = "; ".join(run.history.meta["targets"][layer]["verdict"] for run in runs)
            rows.append((layer, desk.spread(ratios, 2), verdicts))
        loss = desk.mean([run.running_loss(0.9, 1.0) for run in runs])
        report.table(
            f"{name.capitalize()}: predicted {foreseen.angular_update:.4f} rad per step, "
            f"relaxation {foreseen.relaxation:.0f} steps, "
            f"{steps / foreseen.relaxation:.0f} of them; training loss at the end {loss:.2g}",
            ("layer", "measured / predicted", "verdict, by seed"),
            rows,
        )
        for i, layer in enumerate(layers):
            color = OKABE_ITO[i % len(OKABE_ITO)]
            for ax, quantity in (
                (axes[column], "angular_update"),
                (axes[4 + column], "weight_norm"),
            ):
                at, values = desk.mean_curve(runs, f"{quantity}/{layer}")
                ax.plot(
                    at,
                    values,
                    color=color,
                    lw=0.9,
                    ls="-" if i < len(OKABE_ITO) else "--",
                    label=layer.removeprefix("network."),
                )
        axes[column].axhline(
            foreseen.angular_update, color="black", ls="--", lw=1.5, label="prediction"
        )
        low, high = (bound * foreseen.angular_update for bound in AS_EXPECTED)
        axes[column].axhspan(low, high, color="black", alpha=0.07, lw=0)
        axes[column].set_title(f"{name}: angular update")
        axes[4 + column].set_title(f"{name}: norm")
    for ax in axes:
        ax.set_yscale("log")
        ax.set_xlabel("step")
    axes[0].set_ylabel("RMS radians per step")
    axes[4].set_ylabel("mean norm of a filter")
    axes[7].legend(fontsize=7, ncols=2)
    for arm, ratios in all_ratios.items():
        decay, noise = arm
        calm = settled_ratios[arm]
        among = f"; those {min(calm):.2f} to {max(calm):.2f}" if calm else ""
        measured = f"all layers {min(ratios):.2f} to {max(ratios):.2f}, {len(calm)} of {len(ratios)} settled{among}"
        holds = bool(np.abs(np.array(calm) - 1).max() <= WITHIN) if calm else None
        report.claim(
            f"decay {decay:g}, noise {noise:g}: settled layers within {WITHIN:.0%} of the "
            f"prediction",
            measured,
            holds,
        )
    other_methods(report, args, images)
    report.note(
        """Under SGD a settled norm implies the predicted angle: growth and decay of the norm balance only there. A layer far from its
        prediction has a norm that still moves: without noise the digits are known by heart, gradients shrink (or come in bursts), and
        the norm cannot follow. "-" in the summary: no layer settled, so there was nothing to compare; these are the counter-examples."""
    )
    report.write("measured_vs_predicted", figure)


if __name__ == "__main__":
    main()
