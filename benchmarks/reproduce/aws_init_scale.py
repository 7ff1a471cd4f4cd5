"""AWS paper, Figures 5 and 6: weights that start 20 or 100 times too long, under weight decay and
under AdaptiveWeightShrink.

python benchmarks/reproduce/aws_init_scale.py --cifar PATH
"""

from __future__ import annotations

from typing import Any

import desk
from aws_failures import standardize

from lightning_normdyn import AdaptiveWeightShrink
from lightning_normdyn.monitor.plots.axes import OKABE_ITO

# Decay and alpha are such that weights of the usual initialization get about as long under both;
# small_alpha is the paper's own.
DESK = {
    "steps": 1_200,
    "width": 8,
    "lr": 0.1,
    "weight_decay": 1e-3,
    "alpha": 3e-2,
    "small_alpha": 2.5e-3,
    "drop": 0.75,
}
TINY = {"steps": 20, "width": 2}
SCALES = (1, 20, 100)


def run(args: Any, images: desk.Images, rule: str, strength: float, scale: int) -> list[desk.Run]:
    recipe = desk.Recipe(
        steps=args.steps,
        lr=args.lr,
        weight_decay=strength if rule == "decay" else 0.0,
        drops=(args.drop,),
        rest_decay=1e-4,
    )
    return [
        desk.fit(
            lambda: desk.scale_convolutions(
                standardize(desk.plain_network(images.channels, args.width), "this package's"),
                scale,
            ),
            images,
            recipe,
            seed,
            [AdaptiveWeightShrink(strength)] if rule == "AWS" else [],
            accelerator=args.accelerator,
        )
        for seed in args.seeds
    ]


def main() -> None:
    args = desk.arguments(__doc__.splitlines()[0], DESK, TINY)
    images = desk.load_images(args)
    about = f"""Six weight-standardized convolutions with BatchNorm, width {args.width}, SGD with momentum .9, lr {args.lr}, divided by 10
        after {args.drop:.0%} of {args.steps} steps; on {images.name}. All convolutions start x1, x20 or x100 as long as usual: the
        network's function is the same, the steps turn its weights 1, 400 or 10000 times less."""
    report = desk.Report(
        "Weights that start too long: AdaptiveWeightShrink recovers, weight decay does not",
        args,
        about,
    )
    arms = (
        [("decay", args.weight_decay, s) for s in SCALES]
        + [("AWS", args.alpha, s) for s in SCALES]
        + [("AWS", args.small_alpha, 100)]
    )
    runs = {arm: run(args, images, *arm) for arm in arms}
    before = 0.98 * args.drop * args.steps  # the last look before the drop

    def std(arm: tuple[str, float, int]) -> float:
        return desk.mean([desk.near(r.history, "normdyn/weight_std", before) for r in runs[arm]])

    def accuracy(arm: tuple[str, float, int]) -> list[float]:
        return [r.test_accuracy for r in runs[arm]]

    rows, settled = [], std(("AWS", args.alpha, 1))
    for arm in arms:
        rule, strength, scale = arm
        pull = (
            args.lr
            * strength
            * args.drop
            * args.steps
            * (settled if rule == "AWS" else 1 / (1 - 0.9))
        )
        angle = desk.mean(
            [desk.near(r.history, "normdyn/angular_update", before) for r in runs[arm]]
        )
        loss = desk.spread([r.running_loss(0.9, 1.0) for r in runs[arm]])
        rows.append(
            (
                f"{rule} {strength:g}",
                f"x{scale}",
                desk.spread(accuracy(arm)),
                loss,
                f"{std(arm):.3g}",
                f"{angle:.2g}",
                f"{pull:.2g}",
            )
        )
    report.table(
        "Test accuracy, and the state just before the drop",
        (
            "rule",
            "start",
            "test accuracy",
            "training loss, last tenth",
            "std of the filters",
            "angular update",
            "total shrink",
        ),
        rows,
    )
    report.note("""Total shrink: lr x steps at full learning rate x alpha x the std where x1 settles (AWS), or x decay / (1 - momentum)
        (SGD's coupled decay): by how many powers of e the rule shortens a weight of that length that gets no gradient. AWS forgets its
        start if this is of the order of 1 or more, however long the start; decay needs ln 100 = 4.6 to shed a factor of 100.""")
    decay_far, aws_far = ("decay", args.weight_decay, 100), ("AWS", args.alpha, 100)
    ratios = [std(("AWS", args.alpha, s)) / settled for s in SCALES[1:]]
    report.claim(
        "AWS brings x20 and x100 to the length that x1 has",
        "x20 and x100 end " + " and ".join(f"{r:.2f}" for r in ratios) + " times as long as x1",
        all(0.8 < r < 1.25 for r in ratios),
        "both forget how long they were, and are still on their way: the total shrink (table) is "
        "below 1 in so few steps",
    )
    left = [
        std(("decay", args.weight_decay, s)) / std(("decay", args.weight_decay, 1))
        for s in SCALES[1:]
    ]
    report.claim(
        "weight decay does not, in the same time",
        "x20 and x100 end " + " and ".join(f"{r:.3g}" for r in left) + " times as long as x1",
        min(left) > 1.25,
    )
    for scale in SCALES[1:]:
        difference, t = desk.paired(
            accuracy(("AWS", args.alpha, scale)), accuracy(("decay", args.weight_decay, scale))
        )
        report.claim(
            f"from x{scale}, AWS ends with a better accuracy than decay",
            f"{100 * difference:+.1f} points, t {t:.1f}",
            difference > 0 and desk.clear(t, len(args.seeds)),
            "the difference is within the noise of these few seeds",
        )
    lost, t = desk.paired(accuracy(("AWS", args.alpha, 1)), accuracy(aws_far))
    report.claim(
        "under AWS the start does not matter for the accuracy (x1 against x100)",
        f"x100 ends {100 * lost:.1f} points lower, t {t:.1f}",
        abs(lost) < 0.01,
        "the steps spent on shrinking are lost; the paper's schedule has a hundred times more of "
        "them",
    )
    small = ("AWS", args.small_alpha, 100)
    difference, t = desk.paired(accuracy(small), accuracy(decay_far))
    report.claim(
        f"the condition on alpha x steps: with the paper's alpha {args.small_alpha:g} and so few "
        f"steps, AWS from x100 stays too long",
        f"{std(small) / settled:.1f} times as long as at alpha {args.alpha:g}; "
        f"{100 * difference:+.1f} points against decay (t {t:.1f})",
        std(small) / settled > 2,
    )

    picture, axes = desk.figure(2, width=6)
    for arm in arms:
        rule, strength, scale = arm
        style = {
            "color": OKABE_ITO[3 if arm == small else SCALES.index(scale)],
            "linestyle": "-" if rule == "AWS" else (0, (4, 2)),
            "label": f"{rule} {strength:g}, x{scale}",
            "linewidth": 1.4,
        }
        axes[0].plot(*desk.mean_curve(runs[arm], "normdyn/weight_std"), **style)
        axes[1].plot(*desk.mean_loss(runs[arm]), **style)
    axes[0].set(yscale="log", xlabel="step", ylabel="std of the filters (mean)", title="Length")
    axes[1].set(xlabel="step", ylabel="training loss (running mean)", title="Loss")
    axes[1].legend(fontsize=8, frameon=False)
    report.write("aws_init_scale", picture)


if __name__ == "__main__":
    main()
