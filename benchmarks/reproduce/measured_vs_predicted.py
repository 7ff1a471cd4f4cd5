"""Measured angular update beside the one that weights settle at and the one expected by now, on a
BatchNorm network: where each holds, and where it does not.

python benchmarks/reproduce/measured_vs_predicted.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    "scheduled_steps": 2_000,
    "scheduled_seeds": 3,
    "noise": 0.5,
    "label_noise": 0.1,
}
TINY = {
    "width": 2,
    "strong_steps": 40,
    "weak_steps": 40,
    "scheduled_steps": 40,
    "scheduled_seeds": 1,
}
WITHIN = 0.25
# Steps of a window in which angles are compared under a schedule.
WINDOW = 100
# The largest median and 90th percentile of the error that is still called as expected.
ADAMW_BAR, SGD_BAR = (0.06, 0.16), (0.12, None)

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


def expected_ratio(run: desk.Run, layer: str) -> float:
    """Angle over what is expected of a layer by now, over the last quarter of a run."""
    measured, expected = (
        desk.window(run.history, f"{quantity}/{layer}", 0.75, 1.0, rms=True)
        for quantity in ("angular_update", "expected_angular_update")
    )
    return measured / expected


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
        ratios, calm, predictions, now = [], [], [], []
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
                now.append(expected_ratio(run, layer))
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
            (
                name,
                setting,
                " to ".join(span),
                spanned,
                f"{min(now):.2f} to {max(now):.2f}",
                f"{len(calm)} of {len(ratios)}",
                among,
            )
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
            "measured / expected now",
            "settled",
            "of those settled",
        ),
        rows,
    )


class Arm(NamedTuple):
    """A fit under a schedule, and how far off it may be."""

    options: dict[str, Any]
    schedule: str
    has_label_noise: bool
    bar: tuple[float, float | None]

    def recipe(self, steps: int) -> desk.Recipe:
        warm_up = steps // 20
        return desk.Recipe(steps, schedule=self.schedule, warm_up=warm_up, **self.options)


def scheduled_arms(args: Any) -> dict[str, Arm]:
    adamw = {"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.3}
    sgd = {"lr": args.lr, "momentum": args.momentum, "weight_decay": args.strong}
    return {
        "AdamW, cosine": Arm(adamw, "cosine", True, ADAMW_BAR),
        "AdamW, WSD": Arm(adamw, "wsd", True, ADAMW_BAR),
        "AdamW with beta2 .99, cosine": Arm({**adamw, "beta2": 0.99}, "cosine", True, ADAMW_BAR),
        "SGD with momentum, cosine": Arm(sgd, "cosine", True, SGD_BAR),
        "SGD with momentum, WSD": Arm(sgd, "wsd", True, SGD_BAR),
        "AdamW, cosine, true labels": Arm(adamw, "cosine", False, ADAMW_BAR),
    }


def window_sizes(history: desk.History, key: str) -> np.ndarray:
    """Root mean square of a curve over each window; NaN where it has no row."""
    steps, values = history.column(key)
    count = int(steps[-1]) // WINDOW + 1
    sizes = np.full(count, np.nan)
    for window in range(count):
        inside = values[steps // WINDOW == window].astype(float)
        if len(inside):
            sizes[window] = np.sqrt(np.square(inside).mean())
    return sizes


class Deviations:
    """|measured / foreseen - 1| by layer and window, ``(layers, windows)`` after each other."""

    def __init__(self, runs: Sequence[desk.Run], measured: str, foreseen: str) -> None:
        rows = []
        for run in runs:
            for layer in desk.layers_of(run.history, foreseen):
                found = window_sizes(run.history, f"{measured}/{layer}")
                rows.append(found / window_sizes(run.history, f"{foreseen}/{layer}") - 1)
        self.signed = np.array(rows)

    def quantile(self, q: float) -> float:
        return float(np.nanquantile(np.abs(self.signed), q))

    @property
    def in_percent(self) -> str:
        """Median and 90th percentile."""
        return f"{100 * self.quantile(0.5):.3g} / {100 * self.quantile(0.9):.3g}"


def under_schedules(report: desk.Report, args: Any, images: desk.Images) -> None:
    """Each layer against what was expected of it from its norm at the start, the schedule and the
    size of its gradients, and against where it would have settled."""
    rows, windows = [], []
    for name, arm in scheduled_arms(args).items():
        noise = args.label_noise if arm.has_label_noise else 0.0
        runs = scheduled_fits(arm, args, images._replace(noise=args.noise, label_noise=noise))
        now = Deviations(runs, "angular_update", "expected_angular_update")
        static = Deviations(runs, "angular_update", "equilibrium_angular_update")
        norms = Deviations(runs, "weight_norm", "expected_weight_norm")
        loss = desk.mean([run.running_loss(0.9, 1.0) for run in runs])
        cells = (now.in_percent, static.in_percent, norms.in_percent)
        rows.append((name, *cells, f"{loss:.2g}"))
        middle = np.nanmedian(now.signed, axis=0)
        windows.append((name, ", ".join(f"{100 * error:+.0f}" for error in middle)))
        print(*rows[-1], windows[-1][1], sep=" | ", file=sys.stderr, flush=True)
        claim_of_arm(report, name, arm, now, static)
    columns = ("run", "expected now", "where it settles", "expected norm", "loss at the end")
    report.table(
        f"Under a schedule: |measured / foreseen - 1| per layer and {WINDOW} steps, median / 90th "
        f"percentile in percent",
        columns,
        rows,
    )
    report.table(
        f"Under a schedule: measured / expected now, minus 1, in percent; median over layers and "
        f"seeds of each {WINDOW} steps",
        ("run", "window by window"),
        windows,
    )


def scheduled_fits(arm: Arm, args: Any, images: desk.Images) -> list[desk.Run]:
    def build() -> Any:
        return desk.residual_network(images.channels, args.width)

    recipe = arm.recipe(args.scheduled_steps)
    return [
        desk.fit(build, images, recipe, seed, accelerator=args.accelerator)
        for seed in range(args.scheduled_seeds)
    ]


def claim_of_arm(
    report: desk.Report, name: str, arm: Arm, now: Deviations, static: Deviations
) -> None:
    most, most_of_90 = arm.bar
    bound = f"median within {most:.0%}"
    holds = now.quantile(0.5) <= most
    if most_of_90 is not None:
        bound += f", 90th percentile within {most_of_90:.0%}"
        holds = holds and now.quantile(0.9) <= most_of_90
    report.claim(
        f"{name}: angles as expected by norm at the start, schedule and gradients, {bound}",
        f"off by {now.in_percent} %; by {static.in_percent} % from where they would settle",
        holds,
        "a network that knows its images by heart has gradients in bursts, whose size a row every "
        "few steps does not tell",
    )


def main() -> None:
    args = desk.arguments(__doc__.splitlines()[0], DESK, TINY)
    images = desk.load_images(args)
    about = f"""A residual network of 9 convolutions with BatchNorm, width {args.width}, SGD with momentum {args.momentum:g}, constant
        learning rate {args.lr:g}, on {images.name}. Two decays of the convolutions: {args.strong:g} for {args.strong_steps} steps,
        {args.weak:g} for {args.weak_steps}; with pixel noise {args.noise:g} and without. The noise was added after a look at the runs
        without it. Ratio: RMS angular update over the last quarter of the run, divided by the prediction. Settled: the squared norm moves
        by less than a tenth per relaxation time, after 6 of them. Expected now: from the norm at the start, the schedule so far, and the
        size of the gradients at the rows. Under a schedule: warm-up over a twentieth of
        {args.scheduled_steps} steps, then a cosine to 0, or constant with a linear fall to 0 over the last fifth (WSD); AdamW 3e-3 with decay
        .3, SGD as above, {args.scheduled_seeds} seeds each, whatever the others have; {args.label_noise:.0%} of the labels are drawn anew in each batch, so that the loss cannot vanish."""
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
            now = [expected_ratio(run, layer) for run in runs]
            rows.append((layer, desk.spread(ratios, 2), desk.spread(now, 2), verdicts))
        loss = desk.mean([run.running_loss(0.9, 1.0) for run in runs])
        report.table(
            f"{name.capitalize()}: predicted {foreseen.angular_update:.4f} rad per step, "
            f"relaxation {foreseen.relaxation:.0f} steps, "
            f"{steps / foreseen.relaxation:.0f} of them; training loss at the end {loss:.2g}",
            ("layer", "measured / predicted", "measured / expected now", "verdict, by seed"),
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
    under_schedules(report, args, images)
    report.note(
        """Under SGD a settled norm implies the predicted angle: growth and decay of the norm balance only there. A layer far from its
        prediction has a norm that still moves: without noise the digits are known by heart, gradients shrink (or come in bursts), and
        the norm cannot follow. "-" in the summary: no layer settled, so there was nothing to compare; these are the counter-examples."""
    )
    report.write("measured_vs_predicted", figure)


if __name__ == "__main__":
    main()
