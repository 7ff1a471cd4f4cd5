"""WRS paper: does Weight Rescaling generalize better than weight decay, when does it act, and what
does evaluation see?

python benchmarks/reproduce/wrs_against_decay.py --cifar PATH
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import desk
import lightning as L
import torch
from torch import Tensor, nn

from lightning_normdyn import WeightRescaling
from lightning_normdyn.monitor.plots.axes import OKABE_ITO
from lightning_normdyn.theory.outlook import total_decay

DESK = {
    "steps": 1_500,
    "width": 8,
    "train_images": 1_000,
    "sgd_lr": 0.1,
    "larger_lr": 0.5,
    "sgd_decay": 5e-3,
    "adamw_lr": 1e-3,
    "published_decay": 5e-4,
    "adamw_decay": 1.0,
    "every": 20,
    "drop": 0.6,
    "bn_steps": 300,
}
TINY = {"steps": 10, "width": 2, "bn_steps": 5, "every": 5}


class DecayWindow(L.Callback):
    """The decay of the convolutions acts in epochs ``start`` to ``stop`` only."""

    def __init__(self, start: int = 0, stop: float = math.inf) -> None:
        self.start, self.stop = start, stop

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        inside = self.start <= trainer.current_epoch < self.stop
        trainer.optimizers[0].param_groups[0]["weight_decay"] = (
            module.recipe.weight_decay if inside else 0.0
        )


class StaleStatistics(L.Callback):
    """Undoes what WeightRescaling does to BatchNorm's running statistics: evaluation then sees them
    as the forward pass left them."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: nn.Module, optimizer: Any
    ) -> None:
        self.kept = [
            (b, b.clone())
            for n, b in module.named_buffers()
            if n.endswith(("running_mean", "running_var"))
        ]

    def on_train_batch_end(self, *_: Any) -> None:
        for buffer, before in self.kept:
            buffer.copy_(before)


def compare(report: desk.Report, args: Any, images: desk.Images) -> Any:
    epoch = len(desk.Batches(images, 32, 0))
    first_drop = max(1, round(args.drop * args.steps / epoch))  # in epochs
    drop = min(
        0.9, first_drop * epoch / args.steps
    )  # at the start of an epoch, so that early ends and late begins exactly there
    sgd = desk.Recipe(
        args.steps, lr=args.sgd_lr, batch_size=32, drops=(drop, (1 + drop) / 2), rest_decay=5e-4
    )
    adamw = replace(sgd, optimizer="adamw", lr=args.adamw_lr)
    decayed = replace(sgd, weight_decay=args.sgd_decay)

    def rescale(**when: int) -> list[L.Callback]:
        return [WeightRescaling(args.every, **when)]

    arms: dict[str, tuple[desk.Recipe, Any]] = {
        "SGD, none": (sgd, list),
        "SGD, none, larger lr": (replace(sgd, lr=args.larger_lr, rest_lr=args.sgd_lr), list),
        "SGD, decay": (decayed, list),
        "SGD, decay early": (decayed, lambda: [DecayWindow(stop=first_drop)]),
        "SGD, decay late": (decayed, lambda: [DecayWindow(start=first_drop)]),
        "SGD, WRS": (sgd, rescale),
        "SGD, WRS early": (sgd, lambda: rescale(stop_epoch=first_drop)),
        "SGD, WRS late": (sgd, lambda: rescale(start_epoch=first_drop)),
        "AdamW, published decay": (replace(adamw, weight_decay=args.published_decay), list),
        "AdamW, decay": (replace(adamw, weight_decay=args.adamw_decay), list),
        "AdamW, WRS": (adamw, rescale),
    }
    runs = {
        name: [
            desk.fit(
                lambda: desk.plain_network(images.channels, args.width),
                images,
                recipe,
                seed,
                callbacks(),
                log_every=20,
                accelerator=args.accelerator,
            )
            for seed in args.seeds
        ]
        for name, (recipe, callbacks) in arms.items()
    }
    before, after = (
        0.98 * drop * args.steps,
        (1 + 3 * drop) / 4 * args.steps,
    )  # the second drop is half way from the first to the end

    def loss(name: str) -> list[float]:
        return [r.test_loss for r in runs[name]]

    def accuracy(name: str) -> list[float]:
        return [r.test_accuracy for r in runs[name]]

    report.table(
        "Weight Rescaling and weight decay",
        (
            "run",
            "decay",
            "test accuracy",
            "test loss",
            "training loss, last tenth",
            "angular update before the drop",
            "and after it",
            "norm before the drop",
            "norm at the end",
        ),
        [
            (
                name,
                f"{arms[name][0].weight_decay:g}",
                desk.spread(accuracy(name)),
                desk.spread(loss(name)),
                f"{desk.mean([r.running_loss(0.9, 1) for r in found]):.3f}",
                f"{desk.mean([desk.near(r.history, 'normdyn/angular_update', before) for r in found]):.2g}",
                f"{desk.mean([desk.near(r.history, 'normdyn/angular_update', after) for r in found]):.2g}",
                f"{desk.mean([desk.near(r.history, 'normdyn/weight_norm', before) for r in found]):.2g}",
                f"{desk.mean([desk.near(r.history, 'normdyn/weight_norm', args.steps) for r in found]):.2g}",
            )
            for name, found in runs.items()
        ],
    )
    report.note(f"""WRS sets every filter to norm 1 every {args.every} steps; the last layer, which the WRS paper rescales as well, is left
        alone, because it is not scale-invariant. Early: epochs before the first drop of the learning rate, late: from it on. Larger lr:
        {args.larger_lr:g} for the convolutions only, to see what a larger step does without a rule; the norms grow with it, so that it
        turns the filters less than a rule. Look at the angular updates of two runs before comparing their losses.""")

    compared = 0

    def comparison(values: Any, these: str, those: str) -> tuple[float, float, bool]:
        """Paired mean difference, its t, and whether it is clear."""
        nonlocal compared
        compared += 1
        difference, t = desk.paired(values(these), values(those))
        return difference, t, desk.clear(t, len(args.seeds))

    def better(text: str, these: str, those: str, otherwise: str) -> None:
        difference, t, is_clear = comparison(accuracy, these, those)
        report.claim(
            text,
            f"{100 * difference:+.1f} points, t {t:.1f}",
            difference > 0 and is_clear,
            otherwise,
        )

    def lower(text: str, these: str, those: str, otherwise: str) -> None:
        difference, t, is_clear = comparison(loss, these, those)
        report.claim(
            text, f"test loss {difference:+.3f}, t {t:.1f}", difference < 0 and is_clear, otherwise
        )

    noise = "there may be no difference at this size; these seeds would show only a large one"
    better("SGD: WRS is more accurate than a decay that acts", "SGD, WRS", "SGD, decay", noise)
    better(
        "AdamW: WRS is more accurate than the published decay 5e-4",
        "AdamW, WRS",
        "AdamW, published decay",
        noise,
    )
    better(
        "AdamW: WRS is more accurate than a decay that acts",
        "AdamW, WRS",
        "AdamW, decay",
        "the published comparison was with a decay that does next to nothing at this learning rate",
    )
    group = {
        "lr": args.adamw_lr,
        "betas": (0.9, 0.999),
        "weight_decay": args.published_decay,
        "decoupled_weight_decay": True,
        "amsgrad": False,
    }
    idle = total_decay(torch.optim.AdamW, group, round(args.drop * args.steps))
    report.claim(
        f"AdamW's decoupled decay {args.published_decay:g} at lr {args.adamw_lr:g} acts",
        f"it shrinks a weight by {1 - math.exp(-(idle or 0)):.3%} until the first drop",
        (idle or 0) > 0.1,
        "lr x decay x steps is far below 1",
    )
    lower("SGD: WRS lowers the test loss against no rule", "SGD, WRS", "SGD, none", noise)
    lower(
        "... and by more than a larger learning rate of the convolutions does",
        "SGD, WRS",
        "SGD, none, larger lr",
        "what lowers the loss is that the filters turn further per step, by whatever means",
    )
    lower(
        "SGD: WRS lowers the test loss against a decay that acts", "SGD, WRS", "SGD, decay", noise
    )
    guesses = {
        "decay": "the effect of the rule as a whole is too small here to be split",
        "WRS": """without a rule the filters have grown until the drop; set to norm 1 after it, they turn further per step than before it
            (lr / norm² rises by more than the drop lowers it), so late acts as much as early, by undoing the drop""",
    }
    for rule in guesses:
        always, t_always, acts = comparison(loss, f"SGD, {rule}", "SGD, none")
        early, _ = desk.paired(loss(f"SGD, {rule} early"), loss("SGD, none"))
        late, _ = desk.paired(loss(f"SGD, {rule} late"), loss("SGD, none"))
        difference, t, differs = comparison(loss, f"SGD, {rule} early", f"SGD, {rule} late")
        report.claim(
            f"{rule} acts early: in the test loss, early does what always does, late does less "
            f"(Figure 7)",
            f"against none: always {always:+.3f} (t {t_always:.1f}), early {early:+.3f}, late "
            f"{late:+.3f}; early - late t {t:.1f}",
            always < 0
            and acts
            and difference < 0
            and differs
            and abs(early - always) < abs(late - always),
            guesses[rule],
        )
        better(
            f"{rule} acts early: early is more accurate than late (Figure 7)",
            f"SGD, {rule} early",
            f"SGD, {rule} late",
            noise,
        )
    seeds = len(args.seeds)
    report.note(f"""{compared} paired comparisons are made here. Of so many, chance alone makes one in twenty look clear (|t| above
        {desk.T_AT_5_PERCENT.get(seeds, 2.2):g} with {seeds} seeds): a t just above it is a hint, not a finding.""")
    return runs


@torch.no_grad()
def renewed_accuracy(network: nn.Module, images: desk.Images) -> float:
    """Test accuracy with BatchNorm's running statistics taken anew, as the mean over batches of the
    training images."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    network.train()
    for x, _ in desk.Batches(images, 64, 0):
        network(x.to(next(network.parameters())))
    return desk.evaluate(network, images)[1]


def evaluation(report: desk.Report, args: Any, images: desk.Images) -> dict[str, list[float]]:
    recipe = desk.Recipe(args.bn_steps, lr=args.sgd_lr, batch_size=32)
    once, often = args.bn_steps, args.every
    arms: dict[str, Any] = {
        "no rule": list,
        "one rescale, statistics follow": lambda: [WeightRescaling(once)],
        "one rescale, statistics left": lambda: [WeightRescaling(once), StaleStatistics()],
        f"every {often} steps, follow": lambda: [WeightRescaling(often)],
        f"every {often} steps, left": lambda: [WeightRescaling(often), StaleStatistics()],
    }
    found = {
        name: [
            desk.fit(
                lambda: desk.plain_network(images.channels, args.width),
                images,
                recipe,
                seed,
                callbacks(),
                accelerator=args.accelerator,
            )
            for seed in args.seeds
        ]
        for name, callbacks in arms.items()
    }
    accuracies = {name: [r.test_accuracy for r in runs] for name, runs in found.items()}
    renewed = {
        name: [renewed_accuracy(r.network, images) for r in runs] for name, runs in found.items()
    }
    report.table(
        f"Evaluated straight after a rescale, {args.bn_steps} steps at lr {args.sgd_lr}",
        ("WRS", "test accuracy", "test loss", "test accuracy, statistics taken anew"),
        [
            (
                name,
                desk.spread(accuracies[name]),
                desk.spread([r.test_loss for r in runs]),
                desk.spread(renewed[name]),
            )
            for name, runs in found.items()
        ],
    )
    none, follows, left = (accuracies[name] for name in list(arms)[:3])
    gained = desk.mean(renewed[list(arms)[2]])
    report.claim(
        "a rescale leaves evaluation as it is, if BatchNorm's running statistics follow (as "
        "WeightRescaling has it)",
        f"accuracy {desk.mean(none):.3f} without, {desk.mean(follows):.3f} with one rescale just "
        f"before",
        abs(desk.mean(none) - desk.mean(follows)) < 0.005,
    )
    report.claim(
        "without that, evaluation after a rescale is wrong (the paper is silent about it)",
        f"accuracy {desk.mean(left):.3f}; the same weights with statistics taken anew {gained:.3f}",
        desk.mean(left) < desk.mean(none) - 0.05 and desk.mean(left) < gained - 0.05,
        "the weights were about as long before the rescale as after",
    )
    return accuracies


def bars(
    ax: Any, names: Sequence[str], values: Sequence[Sequence[float]], title: str, label: str
) -> None:
    """A dot per seed and a tick at the mean."""
    for i, seeds in enumerate(values):
        ax.plot(seeds, [i] * len(seeds), "o", color=OKABE_ITO[0], alpha=0.5, markersize=5)
        ax.plot(desk.mean(seeds), i, "|", color=OKABE_ITO[1], markersize=16, markeredgewidth=2)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(title=title, xlabel=label)


def main() -> None:
    args = desk.arguments(__doc__.splitlines()[0], DESK, TINY)
    images = desk.load_images(args)
    about = f"""Six convolutions with BatchNorm, width {args.width}, batch 32, {args.steps} steps, lr divided by 10 after {args.drop:.0%}
        and {(1 + args.drop) / 2:.0%}; on {images.name}: few enough that the network overfits, where a rule could help. One learning rate
        per optimizer, nothing was tuned."""
    report = desk.Report("Weight Rescaling against weight decay", args, about)
    runs = compare(report, args, images)
    accuracies = evaluation(report, args, images)
    picture, axes = desk.figure(3, width=5, height=4.6)
    bars(
        axes[0],
        list(runs),
        [[r.test_accuracy for r in found] for found in runs.values()],
        "Accuracy",
        "test accuracy (dots: seeds, tick: mean)",
    )
    bars(
        axes[1],
        list(runs),
        [[r.test_loss for r in found] for found in runs.values()],
        "Loss",
        "test loss",
    )
    bars(
        axes[2],
        list(accuracies),
        list(accuracies.values()),
        "Evaluated straight after a rescale",
        "test accuracy",
    )
    report.write("wrs_against_decay", picture)


if __name__ == "__main__":
    main()
