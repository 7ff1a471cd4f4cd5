"""WRS paper, Figure 1, "scale lr": is what weight decay does its effective learning rate? With the
multiplier corrected.

    python benchmarks/reproduce/scale_lr.py --cifar PATH

The paper multiplies the learning rate of a run without decay by the ratio of its weight norms to
those of a run with decay. The direction of a weight follows lr/norm^2, so the ratio has to be
squared. First networks in which nothing but the direction matters, in float64, where the two runs
can be compared step by step; then the accuracies of networks with BatchNorm.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import desk
import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from lightning_normdyn import EffectiveLRReplay, NormDynamicsMonitor, WeightRescaling
from lightning_normdyn.callbacks.effective_lr_replay import ReplayWorker
from lightning_normdyn.engine.effect import Effect, ScaledSteps
from lightning_normdyn.engine.plan import Target
from lightning_normdyn.monitor.plots.axes import OKABE_ITO
from lightning_normdyn.optimizers.step import Step
from lightning_normdyn.parametrizations import weight_normalization, weight_standardization

DESK = {
    "exact_steps": 300,
    "steps": 1_000,
    "width": 8,
    "train_images": 4_000,
    "test_images": 2_000,
    "lr": 0.5,
    "weight_decay": 4e-3,
    "every": 20,
    "look_every": 50,
}
TINY = {"exact_steps": 9, "steps": 12, "width": 2, "every": 5, "look_every": 4}
KINDS = {
    "weight normalization": (weight_normalization, 0.3, 0.02, 1.0),
    "weight standardization": (weight_standardization, 0.02, 0.3, 4.0),
}
DISTURBED = "decay, start rounded to float32"
LAYER = "network.9.weight"  # the fourth of six convolutions


class PrintedWorker(ReplayWorker):
    """The ratio of the norms as the paper words it, without the square."""

    def look(self, step: Step) -> None:
        """The square root of the corrected factor."""
        super().look(step)
        self.factor = self.factor.sqrt()

    def effect(self, target: Target) -> Effect:
        """As the rule itself: only the length of steps is another one."""
        return ScaledSteps()


class Printed(EffectiveLRReplay):
    """A replay as the paper words it."""

    worker = PrintedWorker


class KeepingWorker(ReplayWorker):
    """Keeps the multipliers of one layer."""

    def look(self, step: Step) -> None:
        """Keep those of every so many steps."""
        super().look(step)
        rule: Any = self.rule
        if (step.number - 1) % rule.every == 0:
            names = [target.name for target in self.plan.targets]
            where = self.plan.vectors.slices[names.index(LAYER)]
            rule.steps.append(step.number - 1)
            rule.factors.append(self.factor[where].clone())

    def effect(self, target: Target) -> Effect:
        """As the rule itself, which is only looked at."""
        return ScaledSteps()


class Replay(EffectiveLRReplay):
    """A replay whose multipliers are kept for the figure."""

    worker = KeepingWorker

    def __init__(self, history: Path, every: int) -> None:
        super().__init__(history)
        self.every = every
        self.steps: list[int] = []
        self.factors: list[Tensor] = []


# ------------------------------------------------------------------------------------- step by step


class Exact(L.LightningModule):
    """Two convolutions of which only the direction matters, under plain SGD whose learning rate
    drops; only they decay."""

    def __init__(self, kind: str, channels: int, width: int, decay: float, drop_at: int) -> None:
        super().__init__()
        normalize, self.lr, self.decay, scale = (
            KINDS[kind][0],
            KINDS[kind][1],
            decay,
            KINDS[kind][3],
        )
        self.drop_at = drop_at
        net = nn.Sequential(
            nn.Conv2d(channels, width, 3, 2), nn.Tanh(), nn.Conv2d(width, 2 * width, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(2 * width, 10),
        )  # fmt: skip
        for layer in (net[0], net[2]):
            with torch.no_grad():
                layer.weight.mul_(scale)
            normalize(layer)
        self.net = net.double()

    def raw(self) -> list[nn.Parameter]:
        return [
            p for n, p in self.named_parameters() if "original" in n and not n.endswith("original0")
        ]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0].double()), batch[1])

    def configure_optimizers(self) -> Any:
        raw = {id(p) for p in self.raw()}
        groups = [
            {"params": self.raw(), "weight_decay": self.decay},
            {"params": [p for p in self.parameters() if id(p) not in raw]},
        ]
        optimizer = torch.optim.SGD(groups, lr=self.lr)
        return [optimizer], [
            {
                "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [self.drop_at]),
                "interval": "step",
            }
        ]


class Directions(L.Callback):
    """The direction of every filter after every step; under standardization of the centred
    filter."""

    def __init__(self, centred: bool) -> None:
        self.centred = centred
        self.rows: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        found = []
        for p in module.raw():
            w = p.detach().flatten(1)
            w = w - w.mean(1, keepdim=True) if self.centred else w
            found.append(
                nn.functional.pad(w / w.norm(dim=1, keepdim=True), (0, 9 * 64 - w.shape[1]))
            )
        self.rows.append(torch.cat(found))

    def apart(self, other: Directions) -> np.ndarray:
        """Largest distance of two filters' directions, at every step."""
        return (torch.stack(self.rows) - torch.stack(other.rows)).norm(dim=2).amax(1).numpy()


def step_by_step(args: Any, images: desk.Images, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for kind in KINDS:

        def train(
            decay: float, callbacks: list[L.Callback], kind: str = kind, disturb: float = 0.0
        ) -> Directions:
            torch.manual_seed(0)
            module, directions = (
                Exact(kind, images.channels, args.width, decay, 2 * args.exact_steps // 3),
                Directions("stand" in kind),
            )
            with torch.no_grad():
                for p in module.raw():
                    p.mul_(1 + disturb * torch.randn_like(p))
            desk.fit_quietly(
                module,
                desk.Batches(images, 64, seed=0),
                max_steps=args.exact_steps,
                callbacks=[*callbacks, directions],
            )
            return directions

        monitor = NormDynamicsMonitor(1, per_vector=True, tables=False)
        decayed = train(KINDS[kind][2], [monitor])
        path = monitor.history.save(folder / "exact.npz")
        arms = {
            "scale lr, squared ratio": [EffectiveLRReplay(path)],
            "scale lr, ratio as printed": [Printed(path)],
            "uniform lr": [EffectiveLRReplay(path, uniform=True)],
            "no decay": [],
        }
        found[kind] = {
            name: train(0.0, list(callbacks)).apart(decayed) for name, callbacks in arms.items()
        }
        found[kind][DISTURBED] = train(KINDS[kind][2], [], disturb=6e-8).apart(decayed)
    return found


# --------------------------------------------------------------------------------------- accuracies


class Accuracy(L.Callback):
    """Test accuracy along the way."""

    def __init__(self, images: desk.Images, every: int) -> None:
        self.images, self.every = images, every
        self.steps: list[int] = []
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.steps.append(trainer.global_step)
            self.values.append(desk.evaluate(module, self.images)[1])


def accuracies(
    args: Any, images: desk.Images, folder: Path
) -> tuple[dict[str, list[desk.Run]], dict[str, list[Accuracy]], Replay]:
    plain = desk.Recipe(args.steps, lr=args.lr, momentum=0.0, rest_lr=0.1, drops=(0.6, 0.85))
    runs: dict[str, list[desk.Run]] = {}
    curves: dict[str, list[Accuracy]] = {}
    kept: Replay | None = None
    for seed in args.seeds:
        path = folder / f"run{seed}.npz"
        replay = Replay(path, max(1, args.steps // 200))
        kept = replay if kept is None else kept
        arms: dict[str, tuple[float, list[L.Callback]]] = {
            "decay": (args.weight_decay, []),
            "no decay": (0.0, []),
            "scale lr, squared ratio": (0.0, [replay]),
            "scale lr, ratio as printed": (0.0, [Printed(path)]),
            "uniform lr": (0.0, [EffectiveLRReplay(path, uniform=True)]),
            "WRS": (0.0, [WeightRescaling(args.every)]),
        }
        for name, (decay, callbacks) in arms.items():
            accuracy = Accuracy(images, args.look_every)
            run = desk.fit(
                lambda: desk.plain_network(images.channels, args.width),
                images,
                desk.Recipe(**{**vars(plain), "weight_decay": decay}),
                seed,
                [*callbacks, accuracy],
                log_every=1 if name == "decay" else max(1, args.steps // 100),
                per_vector=name == "decay",
                accelerator=args.accelerator,
            )
            if name == "decay":
                run.history.save(path)
            runs.setdefault(name, []).append(run)
            curves.setdefault(name, []).append(accuracy)
    assert kept is not None
    return runs, curves, kept


# --------------------------------------------------------------------------------------- the report


def main() -> None:
    args = desk.arguments(__doc__.splitlines()[0], DESK, TINY)
    images = desk.load_images(args)
    report = desk.Report(
        "What weight decay does is its effective learning rate",
        args,
        f"""WRS paper, Figure 1: a run without weight decay whose learning rates are scaled, filter by filter, by how much shorter the
        weights of a run with decay are ("scale lr"), and one whose learning rates are all scaled by the same number ("uniform lr").
        Images: {images.name}. Optimizer: plain SGD, for which the multiplier (n/n_ref)^2 (1 - d)/(1 - d_ref) of EffectiveLRReplay is
        exact.""",
    )
    with tempfile.TemporaryDirectory() as folder:
        apart = step_by_step(args, images, Path(folder))
        runs, curves, replay = accuracies(args, images, Path(folder))

    for kind, arms in apart.items():
        worst = {name: float(values.max()) for name, values in arms.items()}
        squared, printed, uniform = (
            worst[n]
            for n in ("scale lr, squared ratio", "scale lr, ratio as printed", "uniform lr")
        )
        report.claim(
            f"{kind}, float64: with the ratio squared, the directions of the decayed run are "
            f"followed over {args.exact_steps} steps",
            f"largest distance {squared:.1e}; the decayed run from a start changed by 6e-8: "
            f"{worst[DISTURBED]:.1e}",
            squared < 1e-6,
            "rounding of the record to float32, amplified by training itself",
        )
        report.claim(
            f"{kind}: with the ratio as printed, they are not", f"{printed:.2f}", printed > 1e-2
        )
        report.claim(
            f"{kind}: with one factor for all, they are not", f"{uniform:.2f}", uniform > 1e-2
        )

    def accuracy(name: str) -> list[float]:
        return [run.test_accuracy for run in runs[name]]

    def compared(text: str, these: str, those: str, want: str, otherwise: str) -> None:
        difference, t = desk.paired(accuracy(these), accuracy(those))
        clear = desk.clear(t, len(args.seeds))
        holds = {
            "same": not clear,
            "less": clear and difference < 0,
            "more": clear and difference > 0,
        }[want]
        report.claim(text, f"{100 * difference:+.1f} points, t {t:.1f}", holds, otherwise)

    few = "these few seeds would show only a large difference"
    compared(
        "BatchNorm: scale lr is as accurate as the decay (no difference is seen)",
        "scale lr, squared ratio",
        "decay",
        "same",
        "",
    )
    compared("BatchNorm: the decay is more accurate than none", "decay", "no decay", "more", few)
    compared(
        "BatchNorm: uniform lr is less accurate than the decay", "uniform lr", "decay", "less", few
    )
    compared(
        "BatchNorm: uniform lr is less accurate than no decay at the usual lr",
        "uniform lr",
        "no decay",
        "less",
        few,
    )
    compared(
        "BatchNorm: WRS is as accurate as the decay (no difference is seen)",
        "WRS",
        "decay",
        "same",
        few,
    )

    report.table(
        "Networks with BatchNorm",
        (
            "run",
            "test accuracy",
            "test loss",
            "training loss, last tenth",
            "norm at the end",
            "angular update before the first drop",
        ),
        [
            (
                name,
                desk.spread(accuracy(name)),
                desk.spread([r.test_loss for r in found]),
                desk.spread([r.running_loss(0.9, 1) for r in found]),
                f"{desk.mean([desk.near(r.history, 'normdyn/weight_norm', args.steps) for r in found]):.2g}",
                f"{desk.mean([desk.window(r.history, 'normdyn/angular_update', 0.4, 0.59, rms=True) for r in found]):.2g}",
            )
            for name, found in runs.items()
        ],
    )
    report.note("""Where the weights only count by their direction, one run can be followed step by step, and the multiplier has to be the
        squared ratio. How closely depends on the network: the record is in float32, and where steps are large, training itself drives
        two runs apart that differ by rounding (the run from a disturbed start shows how fast). With BatchNorm, its epsilon and float32 make
        two runs part after some hundred steps whatever one does; what can be compared is where they arrive, and how far they turn per
        step.""")

    picture, (first, second, third, fourth) = desk.figure(2, 2)
    names = list(next(iter(apart.values())))
    colour = dict(zip([*names, "decay", "WRS"], OKABE_ITO, strict=False))
    for ax, (kind, arms) in zip((first, second), apart.items(), strict=True):
        for name, values in arms.items():
            ax.plot(np.arange(1, len(values) + 1), values, color=colour[name], label=name)
        ax.set(
            title=f"{kind}, float64",
            xlabel="step",
            ylabel="distance to the decayed run's directions",
            yscale="log",
        )
    first.legend(fontsize=8)
    for name, found in curves.items():
        style = "--" if name == "decay" else "-"
        values = np.mean([c.values for c in found], axis=0)
        third.plot(
            found[0].steps,
            values,
            color=colour[name],
            linestyle=style,
            label=name,
            zorder=3 if name == "decay" else 2,
        )
    third.set(title="BatchNorm, mean over seeds (Figure 1)", xlabel="step", ylabel="test accuracy")
    third.legend(fontsize=8)
    factors = torch.stack(replay.factors).numpy()
    for i in range(factors.shape[1]):
        fourth.plot(replay.steps, factors[:, i], color=OKABE_ITO[0], alpha=0.5, linewidth=0.8)
    fourth.set(
        title=f"multipliers of the filters of {LAYER.removesuffix('.weight')} (Figure S1)",
        xlabel="step",
        ylabel="factor",
        yscale="log",
    )
    report.write("scale_lr", picture)


if __name__ == "__main__":
    sys.exit(main())
