"""WRS paper, Figures 4 to 6: does weight decay, or rescaling, rid weights of what their inputs
cannot see?

    python benchmarks/reproduce/input_span.py --cifar PATH

The paper turns the filters of each layer into the eigenbasis of the layer's inputs ("input space
projection", ISP), fits a generalized Gaussian to their entries, and reads its shape as sparsity: 2
is Gaussian, 1 Laplace, less is sparser. Beside its three runs (no decay, decay, WRS) there is a
fourth here, without decay and with the decayed run's effective learning rates replayed: what this
one shows as well, decay does by its effective learning rate.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import desk
import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_normdyn import (
    EffectiveLRReplay,
    InputSpanMonitor,
    NormDynamicsMonitor,
    WeightRescaling,
)
from lightning_normdyn.errors import NormDynWarning
from lightning_normdyn.functional import generalized_gaussian_shape
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.axes import OKABE_ITO

DESK = {
    "resolution": 8,
    "train_images": 10_000,
    "epochs": 6,
    "width": 8,
    "lr": 0.1,
    "weight_decay": 5e-3,
    "every": 20,
    "max_samples": 3_000,
    "energy": 0.99,
}
TINY = {"resolution": 8, "epochs": 2, "width": 2, "max_samples": 200}
DROPS = (0.6, 0.85)
# As in the paper's Figure 6: the 6th convolution, and the 9th, which is the last one here.
MIDDLE, LAST = 5, 8
EARLY, LATE = slice(0, 4), slice(6, 9)
NOT_THERE = "as in the paper, which sees it in input space only"
WEAKER = (
    "a decay strong enough for so few steps turns the weights further than WRS does (table of runs)"
)
SPACES = {"ggd_shape_input": "input space", "ggd_shape_parameter": "parameter space"}


def network(channels: int, width: int) -> nn.Sequential:
    """Nine 3x3 convolutions at three resolutions, each followed by BatchNorm and ReLU: VGG16
    without its last four."""
    widths = [channels, *[width] * 2, *[2 * width] * 3, *[4 * width] * 4]
    layers: list[nn.Module] = []
    for i in range(9):
        stride = 2 if i and widths[i] != widths[i + 1] else 1
        convolution = nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight)
        layers += [convolution, nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


class Examples(Dataset[Any]):
    """Training images, mirrored at random if they are photographs."""

    def __init__(self, images: desk.Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images.train_y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        x, y = self.images.train_x[indices], self.images.train_y[indices]
        if self.images.noise:
            x = x + self.images.noise * torch.randn_like(x)
        else:
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
        return list(zip(x, y, strict=True))


class Spans(InputSpanMonitor):
    """Of the network inside a LightningModule that has no ``forward``."""

    def call_model(self, module: L.LightningModule, batch: Any) -> None:
        module.network(batch[0])


@dataclass
class Run:
    """``span``: a row per epoch; ``norms``: of NormDynamicsMonitor; ``network``: at the end."""

    network: nn.Module
    span: History
    norms: History
    losses: np.ndarray
    test_accuracy: float
    said: list[str]

    def curve(self, quantity: str, layer: int) -> np.ndarray:
        return self.span.column(f"{quantity}/{layers(self.span)[layer]}")[1]

    def last(self, quantity: str) -> np.ndarray:
        """The newest value of every layer."""
        return np.array(
            [self.span.column(f"{quantity}/{name}")[1][-1] for name in layers(self.span)]
        )

    def filters(self) -> list[Tensor]:
        """The filters of every layer at the end, one a row."""
        return [p.detach().flatten(1) for p in self.network.parameters() if p.dim() == 4]

    def equally_long(self) -> np.ndarray:
        """The shape of every layer in parameter space, had its filters all the same length."""
        return np.array(
            [generalized_gaussian_shape(w / w.norm(dim=1, keepdim=True)) for w in self.filters()]
        )

    def unequal(self) -> float:
        """How different the lengths of a layer's filters are: deviation over mean, the mean over
        layers."""
        return desk.mean(
            [float(w.norm(dim=1).std(correction=0) / w.norm(dim=1).mean()) for w in self.filters()]
        )


def layers(span: History) -> list[str]:
    """The convolutions, first layer first."""
    return [name for name, about in span.meta["targets"].items() if len(about["shape"]) == 4]


def train(
    args: Any,
    images: desk.Images,
    seed: int,
    decay: float,
    callbacks: list[L.Callback],
    record: Path | None,
) -> Run:
    loader: DataLoader[Any] = DataLoader(
        Examples(images),
        batch_size=64,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    torch.manual_seed(seed)
    recipe = desk.Recipe(
        steps=args.epochs * len(loader),
        lr=args.lr,
        weight_decay=decay,
        rest_decay=5e-4,
        drops=DROPS,
    )
    module = desk.Classifier(network(images.channels, args.width), recipe)
    # At fixed weights, as in the paper.
    count = len(images.train_y)
    drawn = random.Random(0).sample(range(count), min(args.max_samples, count))
    sample: DataLoader[Any] = DataLoader(Subset(Examples(images), drawn), batch_size=64)
    span = Spans(dataloader=sample, max_samples=args.max_samples, energy=args.energy)
    norms = NormDynamicsMonitor(1 if record else 20, per_vector=record is not None, tables=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NormDynWarning)
        settings = {"max_epochs": args.epochs, "accelerator": args.accelerator}
        desk.fit_quietly(module, loader, callbacks=[*callbacks, span, norms], **settings)
    if record:
        norms.history.save(record)
    said = [str(w.message) for w in caught if issubclass(w.category, NormDynWarning)]
    return Run(
        module.network,
        span.history,
        norms.history,
        np.array(module.losses),
        desk.evaluate(module, images)[1],
        said,
    )


def train_all(args: Any, images: desk.Images) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            path = Path(folder) / f"decay{seed}.npz"
            arms: dict[str, tuple[float, list[L.Callback], Path | None]] = {
                "decay": (args.weight_decay, [], path),
                "WRS": (0.0, [WeightRescaling(args.every)], None),
                "no decay": (0.0, [], None),
                "scale lr": (0.0, [EffectiveLRReplay(path)], None),
            }
            for name, (decay, callbacks, record) in arms.items():
                runs.setdefault(name, []).append(
                    train(args, images, seed, decay, callbacks, record)
                )
    return runs


# --------------------------------------------------------------------------------------- the report


class Judge:
    """Compares arms, seed by seed, by a mean over layers at the end of training."""

    def __init__(self, report: desk.Report, runs: dict[str, list[Run]]) -> None:
        self.report, self.runs = report, runs

    def values(self, arm: str, quantity: str, where: slice) -> list[float]:
        return [float(run.last(quantity)[where].mean()) for run in self.runs[arm]]

    def less(
        self, text: str, these: str, those: str, quantity: str, where: slice, otherwise: str = ""
    ) -> None:
        """``these`` have less of it than ``those``."""
        first, second = self.values(these, quantity, where), self.values(those, quantity, where)
        difference, t = desk.paired(first, second)
        holds = difference < 0 and desk.clear(t, len(first))
        self.report.claim(
            text,
            f"{desk.mean(first):.3g} against {desk.mean(second):.3g}, t {t:.1f}",
            holds,
            otherwise,
        )

    def near(
        self,
        text: str,
        these: str,
        those: str,
        apart: str,
        quantity: str,
        where: slice,
        otherwise: str = "",
    ) -> None:
        """``these`` are nearer to ``those`` than to ``apart``, in every seed."""
        first, second, third = (self.values(arm, quantity, where) for arm in (these, those, apart))
        nearer = [abs(a - b) < abs(a - c) for a, b, c in zip(first, second, third, strict=True)]
        measured = f"{desk.mean(first):.3g}; {those} {desk.mean(second):.3g}, {apart} {desk.mean(third):.3g}"
        self.report.claim(text, measured, all(nearer), otherwise)


def judge(report: desk.Report, runs: dict[str, list[Run]], args: Any) -> None:
    shape, as_is, noise = "ggd_shape_input", "ggd_shape_parameter", "input_span_noise"
    by = Judge(report, runs)
    for arm in ("decay", "no decay"):
        early, late = by.values(arm, shape, EARLY), by.values(arm, shape, LATE)
        report.claim(
            f"Figure 5a, {arm}: seen in input space, weights get less sparse with depth (layers "
            f"1-4 against 7-9)",
            f"shape {desk.mean(early):.3g} against {desk.mean(late):.3g}",
            all(a < b for a, b in zip(early, late, strict=True)),
            "deeper layers' inputs span a smaller part of a filter (table of directions): a decay "
            "that acts within so few steps leaves "
            "little of the rest",
        )
    for arm in ("decay", "WRS"):
        by.less(
            f"Figure 5a: in input space, {arm} makes early layers sparser than no decay",
            arm,
            "no decay",
            shape,
            EARLY,
        )
    for arm in ("decay", "WRS"):
        by.less(
            f"Figure 5b: in parameter space, {arm} makes early layers sparser, too",
            arm,
            "no decay",
            as_is,
            EARLY,
            NOT_THERE,
        )
    middle, last = slice(MIDDLE, MIDDLE + 1), slice(LAST, LAST + 1)
    by.near(
        "Figure 6: in the 6th layer, in input space, WRS is nearer to decay than to none",
        "WRS",
        "decay",
        "no decay",
        shape,
        middle,
        WEAKER,
    )
    there = {arm: by.values(arm, shape, last) for arm in ("decay", "WRS", "no decay")}
    report.claim(
        "Figure 6: in the 9th layer, in input space, WRS lies between decay and none",
        "; ".join(f"{arm} {desk.mean(values):.3g}" for arm, values in there.items()),
        all(min(d, n) < w < max(d, n) for d, w, n in zip(*there.values(), strict=True)),
    )
    for where, name in ((middle, "6th"), (last, "9th")):
        found = {arm: by.values(arm, as_is, where) for arm in ("WRS", "decay", "no decay")}
        report.claim(
            f"Figure 6: in the {name} layer, in parameter space, WRS is the least sparse",
            "; ".join(f"{arm} {desk.mean(values):.3g}" for arm, values in found.items()),
            all(w > max(d, n) for w, d, n in zip(*found.values(), strict=True)),
            "where decay and WRS leave little outside the span, the weights as they are get "
            "sparser, too",
        )
    moved = {}
    for arm in ("decay", "WRS", "no decay"):
        curves = np.array([[run.curve(shape, i) for i in (MIDDLE, LAST)] for run in runs[arm]])
        at_drop = (
            min(round(DROPS[0] * args.epochs), curves.shape[2]) - 1
        )  # rows are of ends of epochs
        # From 2, which is what a Gaussian initialization has in every basis.
        moved[arm] = (
            float(np.abs(curves[..., at_drop] - 2).mean()),
            float(np.abs(curves[..., -1] - curves[..., at_drop]).mean()),
        )
    report.claim(
        "Figure 6: shapes change before the learning rate is first dropped, and little afterwards",
        "; ".join(
            f"{arm}: by {before:.2g} before, {after:.2g} after"
            for arm, (before, after) in moved.items()
        ),
        all(after < before / 3 for before, after in moved.values()),
    )
    for arm in ("decay", "WRS"):
        by.less(
            f"Figure 4: {arm} leaves less of the weights outside the span than no decay (all "
            f"layers)",
            arm,
            "no decay",
            noise,
            slice(None),
        )
    started = [1 - run.last("input_span_rank") / entries(run.span) for run in runs["no decay"]]
    ends = by.values("no decay", noise, slice(None))
    report.claim(
        "Figure 4: without decay the share outside the span is not less than that of the random "
        "start (1 - rank/entries)",
        f"{desk.mean(ends):.3g} against {desk.mean([float(s.mean()) for s in started]):.3g}",
        all(e >= s.mean() for e, s in zip(ends, started, strict=True)),
        "gradients make the weights longer inside the span, so that the share outside falls though "
        "nothing is removed",
    )
    for quantity, where, what in (
        (shape, EARLY, "shape in input space, layers 1-4"),
        (noise, slice(None), "share outside the span"),
    ):
        text = f"Not in the paper: with decay's effective learning rate replayed, a run without decay ends nearer to decay ({what})"
        by.near(text, "scale lr", "decay", "no decay", quantity, where)


def entries(span: History) -> np.ndarray:
    """Entries of one filter, layer by layer."""
    return np.array(
        [int(np.prod(span.meta["targets"][name]["shape"][1:])) for name in layers(span)]
    )


def tables(report: desk.Report, runs: dict[str, list[Run]]) -> None:
    some = next(iter(runs.values()))[0].span
    numbers = [f"{i + 1} ({n})" for i, n in enumerate(entries(some))]
    captions = {
        "ggd_shape_input": "Generalized-Gaussian shape in input space at the end (2 Gaussian, 1 Laplace)",
        "ggd_shape_parameter": "The same of the weights as they are",
        "input_span_noise": "Share of the weights' energy outside the span",
        "input_span_rank": "Directions that hold the span's share of the inputs' variance",
    }
    for quantity, caption in captions.items():
        rows = []
        for arm, found in runs.items():
            values = np.array([run.last(quantity) for run in found])
            digits = 0 if quantity.endswith("rank") else 2 if quantity.startswith("ggd") else 3
            rows.append((arm, *[desk.spread(list(column), digits) for column in values.T]))
        if quantity == "ggd_shape_parameter":
            equal = {
                arm: np.array([run.equally_long() for run in found]) for arm, found in runs.items()
            }
            rows += [
                (f"{arm}, filters equally long", *[desk.spread(list(c), 2) for c in values.T])
                for arm, values in equal.items()
            ]
        report.table(caption, ("run", *numbers), rows)
    report.table(
        "The runs",
        (
            "run",
            "test accuracy",
            "training loss, last tenth",
            "norm at the end",
            "deviation / mean of norms in a layer",
            "angular update before the first drop",
        ),
        [
            (
                arm,
                desk.spread([r.test_accuracy for r in found]),
                desk.spread([float(r.losses[-(len(r.losses) // 10) :].mean()) for r in found]),
                f"{desk.mean([desk.near(r.norms, 'normdyn/weight_norm', len(r.losses)) for r in found]):.2g}",
                desk.spread([r.unequal() for r in found], 2),
                f"{desk.mean([desk.window(r.norms, 'normdyn/angular_update', 0.4, DROPS[0] - 0.01, rms=True) for r in found]):.2g}",
            )
            for arm, found in runs.items()
        ],
    )


def picture_of(runs: dict[str, list[Run]]) -> Any:
    picture, axes = desk.figure(3, 2)
    colour = dict(zip(runs, OKABE_ITO, strict=False))
    panels = {
        **{q: f"Shape in {name}, last epoch" for q, name in SPACES.items()},
        "input_span_noise": "Share outside the span, last epoch",
    }
    for ax, (quantity, title) in zip(axes, panels.items(), strict=False):
        for (arm, found), line in zip(runs.items(), ("-", "--", "-.", ":"), strict=False):
            values = np.array([run.last(quantity) for run in found])
            deviation = values.std(0, ddof=1) if len(found) > 1 else np.zeros(values.shape[1])
            x = np.arange(1, values.shape[1] + 1)
            ax.errorbar(
                x,
                values.mean(0),
                deviation,
                color=colour[arm],
                linestyle=line,
                marker="o",
                markersize=3,
                capsize=2,
                label=arm,
            )
        ax.set(title=title, xlabel="convolution")
        if quantity in SPACES:
            ax.axhline(2, color="black", linewidth=0.8, linestyle=(0, (2, 2)))
            ax.set_ylabel("generalized-Gaussian shape")
    axes[0].legend(fontsize=8)
    axes[2].set(ylabel="share of squared norm", ylim=(0, None))
    for ax, layer in zip(axes[3:5], (MIDDLE, LAST), strict=True):
        for arm, found in runs.items():
            for quantity, line in (("ggd_shape_input", "-"), ("ggd_shape_parameter", "--")):
                values = np.mean([run.curve(quantity, layer) for run in found], axis=0)
                # A Gaussian start has shape 2 in every basis.
                ax.plot(
                    range(len(values) + 1),
                    [2, *values],
                    color=colour[arm],
                    linestyle=line,
                    linewidth=1.4,
                )
        ax.set(
            title=f"Convolution {layer + 1} over training",
            xlabel="epoch",
            ylabel="generalized-Gaussian shape",
        )
    for line, space in (("-", "input space"), ("--", "parameter space")):
        axes[3].plot([], [], color="black", linestyle=line, label=space)
    axes[3].legend(fontsize=8, loc="lower left")
    for arm, found in runs.items():
        span = found[0].span
        counts = span.vectors(f"histogram_input/{layers(span)[MIDDLE]}")[1][-1].astype(float)
        reach = span.meta["histogram_reach"]
        edges = np.linspace(-reach, reach, len(counts) + 1)
        axes[5].stairs(
            counts / counts.sum() / (edges[1] - edges[0]),
            edges,
            color=colour[arm],
            label=arm,
            linewidth=1.3,
        )
    axes[5].set(
        title=f"Weights of convolution {MIDDLE + 1} in input space",
        xlabel="in units of their root mean square",
        ylabel="density",
    )
    axes[5].set_yscale("log")
    return picture


def main() -> None:
    args = desk.arguments(__doc__.splitlines()[0], DESK, TINY)
    images = desk.load_images(args)
    about = f"""The WRS paper's Figures 4 to 6 (VGG16 on CIFAR10, 200 epochs, decay 5e-4), on nine convolutions with BatchNorm, width
        {args.width}, SGD with momentum .9, lr {args.lr}, divided by 10 after {DROPS[0]:.0%} and {DROPS[1]:.0%} of {args.epochs} epochs;
        on {images.name}. Shapes are fitted to the entries of all filters of a layer, in the whole eigenbasis of the layer's inputs (a
        rotation); the span is the leading eigenvectors, which hold {args.energy:.0%} of the variance. "scale lr": no decay, with the
        decayed run's effective learning rates (EffectiveLRReplay, approximate with momentum)."""
    report = desk.Report(
        "What the inputs see of the weights, with decay, with rescaling, and without", args, about
    )
    runs = train_all(args, images)
    judge(report, runs, args)
    tables(report, runs)
    report.note("""In brackets: entries of one filter; epoch 0 in the picture is the Gaussian start, whose shape is 2 in every basis. Where
        the filters of a layer differ in length, their pooled entries look sparse in any basis. Rescaling makes filters equally long, and
        replaying another run's rates makes them very unequal, so the shape in parameter space is given once more for filters made equally
        long, and "scale lr" is to be compared by that and by the share outside the span. Under plain SGD, decay is exactly a
        learning-rate schedule of the direction (scale_lr.md), so nothing that depends on directions alone can be due to anything else;
        with momentum, as here, nearly so.""")
    report.write("input_span", picture_of(runs))


if __name__ == "__main__":
    main()
