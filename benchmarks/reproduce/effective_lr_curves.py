"""AWS paper, Figures 2 and 4: effective learning rates with and without decay, with the angular
update beside them.

python benchmarks/reproduce/effective_lr_curves.py --cifar PATH
"""

from __future__ import annotations

from typing import Any

import desk
import numpy as np

from lightning_normdyn import AdaptiveWeightShrink
from lightning_normdyn.monitor.plots.axes import OKABE_ITO

DESK = {
    "steps": 1_000,
    "width": 8,
    "lr": 0.1,
    "weight_decay": 2e-3,
    "alpha": 5e-3,
    "drop": 0.75,
    "scale": 10.0,
}
TINY = {"steps": 20, "width": 2}


def main() -> None:
    args = desk.arguments(__doc__.splitlines()[0], DESK, TINY)
    images = desk.load_images(args)
    about = f"""Six convolutions with BatchNorm, width {args.width}, SGD with momentum .9, lr {args.lr}, divided by 10 after
        {args.drop:.0%} of {args.steps} steps; on {images.name}. Four runs: no decay; decay {args.weight_decay:g} from the usual
        initialization; the same, and AdaptiveWeightShrink, from weights {args.scale:g} times as long. Effective learning rate: lr / norm,
        the mean over all filters; under SGD the weights turn as lr / norm² does."""
    report = desk.Report(
        "Effective learning rates: what they show, and what only the angular update shows",
        args,
        about,
    )
    arms: dict[str, tuple[float, float, list[Any]]] = {
        "no decay": (0.0, 1.0, []),
        "decay": (args.weight_decay, 1.0, []),
        f"decay, x{args.scale:g}": (args.weight_decay, args.scale, []),
        f"AWS, x{args.scale:g}": (0.0, args.scale, [args.alpha]),
    }
    runs: dict[str, list[desk.Run]] = {}
    for name, (decay, scale, alpha) in arms.items():
        recipe = desk.Recipe(steps=args.steps, lr=args.lr, weight_decay=decay, drops=(args.drop,))
        runs[name] = [
            desk.fit(
                lambda scale=scale: desk.scale_convolutions(
                    desk.plain_network(images.channels, args.width), scale
                ),
                images,
                recipe,
                seed,
                [AdaptiveWeightShrink(a) for a in alpha],
                accelerator=args.accelerator,
            )
            for seed in args.seeds
        ]
    before = 0.98 * args.drop * args.steps
    # Not the first step: until momentum has filled, steps are short whatever the norms are.
    filled = min(30.0, before / 8)
    moments = {
        f"step {filled:.0f}": filled,
        "1/4 of the way to the drop": before / 4,
        "before the drop": before,
        "end": float(args.steps),
    }
    layers = desk.layers_of(runs["no decay"][0].history, "effective_lr")
    shown = {"first layer": layers[0], "fourth layer": layers[3]}

    def at(name: str, key: str, step: float) -> float:
        return desk.mean([desk.near(run.history, key, step) for run in runs[name]])

    for quantity in ("effective_lr", "angular_update"):
        rows = [
            (
                name,
                where,
                *[f"{at(name, f'{quantity}/{layer}', step):.2g}" for step in moments.values()],
            )
            for name in arms
            for where, layer in shown.items()
        ]
        report.table(f"`{quantity}` (mean over seeds)", ("run", "weight", *moments), rows)
    report.table(
        "Accuracy",
        ("run", "test accuracy", "training loss, last tenth"),
        [
            (
                name,
                desk.spread([r.test_accuracy for r in found]),
                desk.spread([r.running_loss(0.9, 1.0) for r in found]),
            )
            for name, found in runs.items()
        ],
    )
    key = "normdyn/effective_lr"
    falls = at("no decay", key, before) / at("no decay", key, 0)
    stays = at("decay", key, before) / at("decay", key, 0)
    report.claim(
        "without decay the effective learning rate only falls (Figure 2, red)",
        f"x{falls:.2f} before the drop",
        falls < 0.9,
    )
    report.claim(
        "decay keeps it up",
        f"x{stays:.2f} before the drop, "
        f"{at('decay', key, before) / at('no decay', key, before):.1f} times that without decay",
        at("decay", key, before) > 1.2 * at("no decay", key, before),
    )
    rises = {name: at(name, key, before) / at(name, key, 0) for name in list(arms)[2:]}
    report.claim(
        "from weights longer than their equilibrium it rises at first, like a warm-up (Figure 4)",
        ", ".join(f"{name}: x{rise:.1f}" for name, rise in rises.items()),
        min(rises.values()) > 2,
    )
    highest = desk.mean(
        [
            float(np.max(run.history.column(key)[1]) / run.history.column(key)[1][0])
            for run in runs["decay"]
        ]
    )
    report.claim(
        "it rises from the usual initialization, too",
        f"at most x{highest:.2f} of its first value",
        highest > 1.1,
        "this initialization is no longer than the equilibrium of this learning rate and decay: "
        "nothing has to shrink",
    )
    early = before / 4
    fall = at("no decay", key, early) / at("no decay", key, filled)
    turn = at("no decay", "normdyn/angular_update", early) / at(
        "no decay", "normdyn/angular_update", filled
    )
    report.claim(
        "the effective learning rate alone misleads: without decay it falls at first, while the "
        "weights turn faster",
        f"effective learning rate x{fall:.2f}, angular update x{turn:.2f}, from step {filled:.0f} "
        f"to a quarter of the way",
        fall < 1 < turn,
        "gradients shrink as well, so the angle falls by about the square of the effective "
        "learning rate; "
        "only while momentum fills (the first steps of the picture) does it rise",
    )
    difference, t = desk.paired(
        [r.test_accuracy for r in runs["decay"]], [r.test_accuracy for r in runs["no decay"]]
    )
    report.claim(
        "without decay the network ends severely underfitted (Figure 1)",
        f"{-100 * difference:+.1f} points of test accuracy against decay, t {-t:.1f}",
        difference > 0.05 and desk.clear(t, len(args.seeds)),
        f"""far too few steps: without decay the norms grow by {1 / falls:.1f} times here, and keep growing in the paper's 500,000 steps""",
    )

    picture, axes = desk.figure(2, width=6)
    for i, name in enumerate(arms):
        for ax, quantity in zip(axes, ("effective_lr", "angular_update"), strict=True):
            ax.plot(
                *desk.mean_curve(runs[name], f"normdyn/{quantity}"),
                color=OKABE_ITO[i],
                linewidth=1.4,
                label=name,
            )
    for ax, label in zip(
        axes, ("effective learning rate", "angular update (radians per step)"), strict=True
    ):
        ax.axvline(args.drop * args.steps, color="grey", linestyle=(0, (4, 2)), linewidth=0.8)
        ax.set(
            yscale="log",
            xlabel="step",
            ylabel=label,
            title=f"{label.split(' (')[0].capitalize()}, all filters",
        )
    axes[0].legend(fontsize=8, frameon=False, loc="lower left")
    report.write("effective_lr_curves", picture)


if __name__ == "__main__":
    main()
