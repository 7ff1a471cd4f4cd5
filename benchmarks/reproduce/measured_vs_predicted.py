"""Measured angular update beside the one that weights settle at and the one expected by now, on a
BatchNorm network: where each holds, and where it does not.

python benchmarks/reproduce/measured_vs_predicted.py

Over 500 lines, since one page holds the constant rates beside the schedules.
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
from lightning_normdyn.theory.course import NormCourse
from lightning_normdyn.theory.words import AS_EXPECTED

DESK = {
    "width": 8,
    "plain_width": 16,
    "lr": 0.1,
    "momentum": 0.9,
    "strong": 5e-3,
    "weak": 5e-4,
    "strong_steps": 1_500,
    "weak_steps": 3_500,
    "scheduled_steps": 2_000,
    "scheduled_seeds": 3,
    "variants": 8,
    "noise": 0.5,
    "label_noise": 0.1,
}
TINY = {
    "width": 2,
    "plain_width": 2,
    "strong_steps": 40,
    "weak_steps": 40,
    "scheduled_steps": 40,
    "scheduled_seeds": 1,
    "variants": 1,
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
    steps = [int(step) + 1 for step in run.history.column(f"angular_update/{layer}")[0]]
    # One prediction holds for the whole run, so relaxation times go by evenly.
    elapsed = steps[-1] / foreseen.relaxation
    course = Course(foreseen, steps[-1], elapsed, [(steps[0], foreseen.pull)])
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
    """A fit under a schedule, and how far off it may be. ``build``: from channels and width to a
    network; ``every``: steps from row to row."""

    options: dict[str, Any]
    schedule: str
    images: desk.Images
    bar: tuple[float, float | None]
    build: Callable[[int, int], Any] = desk.residual_network
    width: int = 8
    every: int = 10
    warms_up: bool = True

    def network(self) -> Any:
        return self.build(self.images.channels, self.width)

    def recipe(self, steps: int) -> desk.Recipe:
        warm_up = steps // 20 if self.warms_up else 0
        return desk.Recipe(steps, schedule=self.schedule, warm_up=warm_up, **self.options)

    @property
    def follows_from_start(self) -> bool:
        """Whether norms at the start and the schedule say it all; SGD's steps are as long as its
        gradients."""
        return "optimizer" in self.options


def four_convolutions(channels: int, width: int) -> Any:
    return desk.plain_network(channels, width, convolutions=4)


def four_pooled(channels: int, width: int) -> Any:
    return desk.plain_network(channels, width, convolutions=4, pooled=True)


def scheduled_arms(args: Any, images: desk.Images) -> dict[str, Arm]:
    adamw = {"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.3}
    beta2 = {**adamw, "beta2": 0.99}
    sgd = {"lr": args.lr, "momentum": args.momentum, "weight_decay": args.strong}
    truth = images._replace(noise=args.noise)
    noisy = truth._replace(label_noise=args.label_noise)
    plain = {"build": four_convolutions, "width": args.plain_width, "every": 2}
    pooled = {**plain, "build": four_pooled}
    residual = {"width": args.width}
    return {
        "AdamW, cosine, four convolutions": Arm(adamw, "cosine", noisy, ADAMW_BAR, **plain),
        "AdamW, WSD, four convolutions": Arm(adamw, "wsd", noisy, ADAMW_BAR, **plain),
        "AdamW, cosine, four with pooling": Arm(adamw, "cosine", noisy, ADAMW_BAR, **pooled),
        "AdamW, WSD, four with pooling": Arm(adamw, "wsd", noisy, ADAMW_BAR, **pooled),
        "AdamW, cosine": Arm(adamw, "cosine", noisy, ADAMW_BAR, **residual),
        "AdamW, WSD": Arm(adamw, "wsd", noisy, ADAMW_BAR, **residual),
        "AdamW with beta2 .99, cosine": Arm(beta2, "cosine", noisy, ADAMW_BAR, **residual),
        "SGD with momentum, cosine": Arm(sgd, "cosine", noisy, SGD_BAR, **residual),
        "SGD with momentum, WSD": Arm(sgd, "wsd", noisy, SGD_BAR, **residual),
        "AdamW, cosine, true labels": Arm(adamw, "cosine", truth, ADAMW_BAR, **residual),
    }


def variants(args: Any, images: desk.Images) -> dict[str, Arm]:
    """The arm of four convolutions under a cosine, with one thing changed at a time."""
    arm = scheduled_arms(args, images)["AdamW, cosine, four convolutions"]._replace(every=10)
    clean = arm.images._replace(noise=0.0)
    by_heart = with_wrong_labels(arm.images, args.label_noise)
    return {
        f"half the width, {args.plain_width // 2}": arm._replace(width=args.plain_width // 2),
        f"twice the width, {args.plain_width * 2}": arm._replace(width=args.plain_width * 2),
        "batches of 128": arm._replace(options={**arm.options, "batch_size": 128}),
        "beta2 .99": arm._replace(options={**arm.options, "beta2": 0.99}),
        "no warm-up": arm._replace(warms_up=False),
        "no pixel noise": arm._replace(images=clean),
        "wrong labels that stay": arm._replace(images=by_heart),
        "both": arm._replace(images=by_heart._replace(noise=0.0)),
    }


def with_wrong_labels(images: desk.Images, share: float) -> desk.Images:
    """A share of the labels drawn once for the whole fit, which a network can learn by heart."""
    chance = torch.Generator().manual_seed(0)
    labels = images.train_y
    is_wrong = torch.rand(labels.shape, generator=chance) < share
    drawn = torch.randint(int(labels.max()) + 1, labels.shape, generator=chance)
    return images._replace(train_y=drawn.where(is_wrong, labels), label_noise=0.0)


def window_sizes(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Root mean square of a curve over each window; NaN where it has no row."""
    count = int(steps[-1]) // WINDOW + 1
    sizes = np.full(count, np.nan)
    for window in range(count):
        inside = values[steps // WINDOW == window].astype(float)
        if len(inside):
            sizes[window] = np.sqrt(np.square(inside).mean())
    return sizes


class Deviations:
    """|measured / foreseen - 1| by layer and window, ``(layers, windows)`` after each other."""

    def __init__(self, signed: Sequence[np.ndarray]) -> None:
        self.signed = np.array(signed)

    @classmethod
    def of(cls, runs: Sequence[desk.Run], measured: str, foreseen: str) -> Deviations:
        rows = []
        for run in runs:
            for layer in desk.layers_of(run.history, foreseen):
                found = window_sizes(*run.history.column(f"{measured}/{layer}"))
                expected = window_sizes(*run.history.column(f"{foreseen}/{layer}"))
                rows.append(found / expected - 1)
        return cls(rows)

    @classmethod
    def from_start(cls, runs: Sequence[desk.Run], arm: Arm, steps: int) -> Deviations:
        """Of angles from what they follow from if nothing of the run is known but its start."""
        rows = []
        for seed, run in enumerate(runs):
            for layer, angles in angles_from_start(arm, steps, seed).items():
                at, measured = run.history.column(f"angular_update/{layer}")
                rows.append(window_sizes(at, measured) / window_sizes(at, angles[at]) - 1)
        return cls(rows)

    def quantile(self, q: float) -> float:
        return float(np.nanquantile(np.abs(self.signed), q))

    def within(self, bar: tuple[float, float | None]) -> bool:
        """Whether median and 90th percentile are."""
        most, most_of_90 = bar
        return self.quantile(0.5) <= most and (
            most_of_90 is None or self.quantile(0.9) <= most_of_90
        )

    @property
    def in_percent(self) -> str:
        """Median and 90th percentile."""
        return f"{100 * self.quantile(0.5):.3g} / {100 * self.quantile(0.9):.3g}"

    @property
    def by_window(self) -> str:
        return ", ".join(f"{100 * error:+.0f}" for error in np.nanmedian(self.signed, axis=0))


def angles_from_start(arm: Arm, steps: int, seed: int) -> dict[str, np.ndarray]:
    """By layer, the angle of each step that follows from the norms of the network that a fit with
    this seed starts from, and from the schedule."""
    torch.manual_seed(seed)
    recipe = arm.recipe(steps)
    module = desk.Classifier(arm.network(), recipe)
    optimizer = recipe.optimizer_for(module)
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    filters = {name: p.detach().flatten(1) for name, p in module.named_parameters() if p.dim() == 4}
    norms = [float(rows.square().sum(1).mean().sqrt()) for rows in filters.values()]
    dims = [rows.shape[1] for rows in filters.values()]
    course = NormCourse(type(optimizer), group, norms, dims)
    angles = []
    for step in range(steps):
        course.advance({**group, "lr": recipe.lr * recipe.lr_factor(step)})
        angles.append(course.angular_update)
    return dict(zip(filters, np.array(angles).T, strict=True))


def under_schedules(report: desk.Report, args: Any, images: desk.Images) -> None:
    """Each layer against what was expected of it from its norm at the start, the schedule and the
    size of its gradients, against the same without that size, and against where it would have
    settled."""
    rows, windows = [], []
    for name, arm in scheduled_arms(args, images).items():
        runs = scheduled_fits(arm, args.scheduled_steps, args.scheduled_seeds, args.accelerator)
        now = Deviations.of(runs, "angular_update", "expected_angular_update")
        static = Deviations.of(runs, "angular_update", "equilibrium_angular_update")
        norms = Deviations.of(runs, "weight_norm", "expected_weight_norm")
        loss = desk.mean([run.running_loss(0.9, 1.0) for run in runs])
        windows.append((name, "with the size of gradients", now.by_window))
        of_start = None
        if arm.follows_from_start:
            of_start = Deviations.from_start(runs, arm, args.scheduled_steps)
            windows.append((name, "from start and schedule alone", of_start.by_window))
        alone = of_start.in_percent if of_start else "-"
        rows.append(
            (name, now.in_percent, alone, static.in_percent, norms.in_percent, f"{loss:.2g}")
        )
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
        claim_of_arm(report, name, arm, now, static)
        if of_start:
            claim_of_start(report, name, arm, of_start)
    report.table(
        f"Under a schedule: |measured / foreseen - 1| per layer and {WINDOW} steps, median / 90th "
        f"percentile in percent",
        (
            "run",
            "expected now",
            "from start and schedule alone",
            "where it settles",
            "expected norm",
            "loss at the end",
        ),
        rows,
    )
    report.table(
        f"Under a schedule: measured / expected, minus 1, in percent; median over layers and "
        f"seeds of each {WINDOW} steps",
        ("run", "expected", "window by window"),
        windows,
    )


def of_variants(report: desk.Report, args: Any, images: desk.Images) -> None:
    """Where norms at the start and the schedule alone are enough, and where they are not."""
    rows = []
    for name, arm in list(variants(args, images).items())[: args.variants]:
        runs = scheduled_fits(arm, args.scheduled_steps, 1, args.accelerator)
        now = Deviations.of(runs, "angular_update", "expected_angular_update")
        alone = Deviations.from_start(runs, arm, args.scheduled_steps)
        holds = "yes" if alone.within(arm.bar) else "no"
        loss = f"{runs[0].running_loss(0.9, 1.0):.2g}"
        rows.append((name, alone.in_percent, holds, now.in_percent, alone.by_window, loss))
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    report.table(
        "Four convolutions under AdamW and a cosine, one thing changed, one seed: |measured / "
        "expected - 1|, median / 90th percentile in percent",
        (
            "changed",
            "from start and schedule alone",
            "within 6 / 16 %",
            "expected now",
            "from start and schedule alone, window by window",
            "loss at the end",
        ),
        rows,
    )


def scheduled_fits(arm: Arm, steps: int, seeds: int, accelerator: str) -> list[desk.Run]:
    runs = []
    for seed in range(seeds):
        settings = {"log_every": arm.every, "accelerator": accelerator}
        runs.append(desk.fit(arm.network, arm.images, arm.recipe(steps), seed, **settings))
    return runs


def bound(bar: tuple[float, float | None]) -> str:
    """A bar in words."""
    most, most_of_90 = bar
    of_90 = "" if most_of_90 is None else f", 90th percentile within {most_of_90:.0%}"
    return f"median within {most:.0%}{of_90}"


def claim_of_arm(
    report: desk.Report, name: str, arm: Arm, now: Deviations, static: Deviations
) -> None:
    report.claim(
        f"{name}: angles as expected by norm at the start, schedule and gradients, {bound(arm.bar)}",
        f"off by {now.in_percent} %; by {static.in_percent} % from where they would settle",
        now.within(arm.bar),
        "a network that knows its images by heart has gradients in bursts, whose size a row every "
        "few steps does not tell",
    )


def claim_of_start(report: desk.Report, name: str, arm: Arm, of_start: Deviations) -> None:
    report.claim(
        f"{name}: angles as expected by norm at the start and schedule alone, {bound(arm.bar)}",
        f"off by {of_start.in_percent} %",
        of_start.within(arm.bar),
        "gradients get smaller as the loss falls, and a second moment with a memory of 1,000 steps "
        "still divides by the larger ones of before",
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
        .3, SGD as above, {args.scheduled_seeds} seeds each, whatever the others have; {args.label_noise:.0%} of the labels are drawn anew in each batch, so that the loss cannot vanish.
        Four convolutions: 3x3 with BatchNorm, the second and the fourth with stride 2 (or followed by a pooling), width {args.plain_width}; rows every 2 steps, else every 10.
        From start and schedule alone: the same recursion, told the norms at the start and the learning rates, and nothing that was measured in the run."""
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
    of_variants(report, args, images)
    report.note(
        """Under SGD a settled norm implies the predicted angle: growth and decay of the norm balance only there. A layer far from its
        prediction has a norm that still moves: without noise the digits are known by heart, gradients shrink (or come in bursts), and
        the norm cannot follow. "-" in the summary: no layer settled, so there was nothing to compare; these are the counter-examples."""
    )
    report.note(
        """Start and schedule alone are enough under AdamW as long as gradients keep their size, times the norm. Three things break it. In the
        first 100 steps gradients of successive batches point one way, so steps add up and weights turn faster than noise would turn them,
        whatever is known of sizes. Then gradients fall with the loss, while a second moment with a memory of 1,000 steps still divides by
        the larger ones of before: angles are smaller than expected in the middle of the run, less so with pixel noise, with beta2 .99, or
        where sizes are followed. Last, wrong labels that stay are learnt by heart without pixel noise: gradients vanish, and no schedule
        tells that.
        In narrow networks the size of gradients rises at first instead, so that early windows are too fast. SGD's steps are as long as its
        gradients, so there is nothing to expect without their size ("-")."""
    )
    report.write("measured_vs_predicted", figure)


if __name__ == "__main__":
    main()
