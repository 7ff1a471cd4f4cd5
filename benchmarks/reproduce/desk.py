"""What the claims here share: two small networks, real images, one fit under the package's
callbacks, and the table a run leaves behind.

Each script of this folder looks at one claim, and writes ``<script>.md`` and ``<script>.png``.
Legend: ``n`` images, ``s`` steps.
"""

from __future__ import annotations

import argparse
import datetime
import io
import logging
import math
import os
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import summary
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normdyn import NormDynamicsMonitor
from lightning_normdyn.errors import NormDynWarning
from lightning_normdyn.monitor.history import History

HERE = Path(__file__).resolve().parent
# Two-sided 5 % for one comparison of n paired seeds; with many comparisons in one table, expect
# chance to exceed it once.
T_AT_5_PERCENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


# ----------------------------------------------------------------------------------------- networks


def plain_network(
    channels: int,
    width: int,
    classes: int = 10,
    *,
    convolutions: int = 6,
    pooled: bool = False,
) -> nn.Sequential:
    """Up to six 3x3 convolutions, each followed by BatchNorm and ReLU: every filter is
    scale-invariant. The second and the fourth have stride 2, or are followed by a pooling."""
    widths = [channels, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths[: convolutions + 1])):
        halves = i in (1, 3)
        stride = 2 if halves and not pooled else 1
        layers += [_convolution(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU()]
        if halves and pooled:
            layers.append(nn.MaxPool2d(2))
    head = nn.Linear(widths[convolutions], classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def residual_network(channels: int, width: int, classes: int = 10) -> nn.Sequential:
    """A stem and three residual blocks, every convolution followed by BatchNorm."""
    return nn.Sequential(
        _convolution(channels, width),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _Residual(width, width, 1),
        _Residual(width, 2 * width, 2),
        _Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def _convolution(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    return layer


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _convolution(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            _convolution(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(_convolution(inputs, outputs, stride, 1), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def scale_convolutions(network: nn.Module, factor: float) -> nn.Module:
    """Multiply every convolution by ``factor``: the function stays, the length changes."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 4:
                parameter.mul_(factor)
    return network


# ------------------------------------------------------------------------------------------- images


class Images(NamedTuple):
    """Standardized float images ``(n, channels, h, w)`` and labels ``(n,)``; ``noise``: deviation
    of the pixel noise on training images; ``label_noise``: share of their labels that are drawn
    anew in each batch."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    noise: float
    label_noise: float = 0.0

    @property
    def channels(self) -> int:
        return self.train_x.shape[1]


def load_images(args: argparse.Namespace) -> Images:
    """CIFAR-10, if a path was given, else scikit-learn's digits."""
    return (
        _digits()
        if args.cifar is None
        else _cifar10(args.cifar, args.resolution, args.train_images, args.test_images)
    )


def _digits() -> Images:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = (torch.from_numpy(data.images).float().unsqueeze(1) / 16 - 0.305) / 0.376
    y = torch.from_numpy(data.target).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order[:500], order[500:]
    # Without noise such a network soon knows the few digits by heart: no gradients, nothing to see.
    return Images(
        f"digits, 8x8, {len(train)} for training", x[train], y[train], x[test], y[test], noise=0.5
    )


def _cifar10(path: Path, resolution: int, train: int, test: int) -> Images:
    sys.path.append(str(HERE.parents[1] / "examples"))
    from cifar10 import read_cifar10

    data = read_cifar10(path)

    def prepare(pixels: np.ndarray) -> Tensor:
        images = F.avg_pool2d(torch.from_numpy(pixels.copy()).float() / 255, 32 // resolution)
        mean, deviation = (
            torch.tensor([0.4914, 0.4822, 0.4465]),
            torch.tensor([0.2470, 0.2435, 0.2616]),
        )
        return (images - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)

    labels = [torch.from_numpy(y) for y in (data.train_labels[:train], data.test_labels[:test])]
    x, test_x = prepare(data.train_images[:train]), prepare(data.test_images[:test])
    name = f"CIFAR-10 averaged down to {resolution}x{resolution}, the first {len(x)} for training, {len(test_x)} for testing"
    return Images(name, x, labels[0], test_x, labels[1], noise=0.0)


class Batches:
    """Epochs of shuffled batches from a generator of their own: every arm of a seed sees the same
    batches."""

    def __init__(self, images: Images, size: int, seed: int) -> None:
        self.images, self.size = images, size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images.train_y) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images.train_y), generator=self.generator)
        for chosen in order[: len(self) * self.size].split(self.size):
            x = self.images.train_x[chosen]
            if self.images.noise:
                x = x + self.images.noise * torch.randn(x.shape, generator=self.generator)
            yield x, self._labels(chosen)

    def _labels(self, chosen: Tensor) -> Tensor:
        labels = self.images.train_y[chosen]
        # No draw without noise: the batches of older tables stay what they were.
        if not self.images.label_noise:
            return labels
        is_wrong = torch.rand(labels.shape, generator=self.generator) < self.images.label_noise
        classes = int(self.images.train_y.max()) + 1
        drawn = torch.randint(classes, labels.shape, generator=self.generator)
        return drawn.where(is_wrong, labels)


# ------------------------------------------------------------------------------------------ one fit


@dataclass(frozen=True)
class Recipe:
    """How to train. ``weight_decay`` is that of the convolutions (the scale-invariant weights);
    biases have none.

    Args:
        optimizer: "sgd" (decay in the gradient), "adam" (decay in the gradient) or "adamw"
            (decoupled).
        lr: of the convolutions; and of the rest, unless ``rest_lr`` says otherwise.
        beta2: of Adam's second moment.
        drops: when to divide the learning rate by ``drop_factor``, as fractions of ``steps``.
        schedule: "drops", or "cosine" and "wsd", which go to 0: from the warm-up on, or over the
            last fifth.
        warm_up: steps over which the learning rate rises, for "cosine" and "wsd".
    """

    steps: int
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    rest_lr: float | None = None
    rest_decay: float = 1e-4
    beta2: float = 0.999
    drops: tuple[float, ...] = ()
    drop_factor: float = 10.0
    schedule: str = "drops"
    warm_up: int = 0
    batch_size: int = 64

    @property
    def drop_steps(self) -> list[int]:
        return [max(1, round(fraction * self.steps)) for fraction in self.drops]

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step, counted from 0, as a share of the largest."""
        if self.schedule == "drops":
            return self.drop_factor ** -sum(step >= drop for drop in self.drop_steps)
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * (step - self.warm_up) / (self.steps - self.warm_up))) / 2
        cool_down = self.steps / 5
        return min(1.0, (self.steps - step) / cool_down)

    def optimizer_for(self, module: nn.Module) -> torch.optim.Optimizer:
        rest_lr = self.lr if self.rest_lr is None else self.rest_lr
        named = list(module.named_parameters())
        groups: list[dict[str, Any]] = [
            {
                "params": [p for _, p in named if p.dim() == 4],
                "weight_decay": self.weight_decay,
                "lr": self.lr,
            },
            {
                "params": [p for n, p in named if p.dim() != 4 and not n.endswith("bias")],
                "weight_decay": self.rest_decay,
                "lr": rest_lr,
            },
            {
                "params": [p for n, p in named if n.endswith("bias")],
                "weight_decay": 0.0,
                "lr": rest_lr,
            },
        ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer]
        return kind(groups, lr=self.lr, betas=(0.9, self.beta2))


class Classifier(L.LightningModule):
    """An ordinary LightningModule; it keeps its losses and ends the fit at the first that is not
    finite."""

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.network, self.recipe = network, recipe
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.network(x), y)
        self.losses.append(float(loss.detach()))
        if not math.isfinite(self.losses[-1]):
            self.trainer.should_stop = True
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.recipe.optimizer_for(self)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.recipe.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass
class Run:
    """What a fit leaves behind. ``failed_at``: the step of the first loss that was not finite; None
    if all were."""

    network: nn.Module
    history: History
    losses: np.ndarray
    failed_at: int | None
    test_loss: float
    test_accuracy: float
    said: list[str] = field(default_factory=list)

    def running_loss(self, first: float, last: float) -> float:
        """Mean training loss between two fractions of the run."""
        return float(
            self.losses[int(first * len(self.losses)) : max(1, int(last * len(self.losses)))].mean()
        )


def fit(
    build: Callable[[], nn.Module],
    images: Images,
    recipe: Recipe,
    seed: int,
    callbacks: Iterable[L.Callback] = (),
    *,
    log_every: int = 10,
    per_vector: bool = False,
    accelerator: str = "cpu",
    precision: Any = "32-true",
) -> Run:
    """Train once under the callbacks and a monitor, and evaluate at the end. The seed decides
    initialization, batches and noise."""
    torch.manual_seed(seed)
    module = Classifier(build(), recipe)
    monitor = NormDynamicsMonitor(log_every, per_vector=per_vector, tables=False)
    batches = Batches(images, recipe.batch_size, seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NormDynWarning)
        settings = {"max_steps": recipe.steps, "accelerator": accelerator, "precision": precision}
        fit_quietly(module, batches, callbacks=[*callbacks, monitor], **settings)
    losses = np.array(module.losses)
    bad = np.flatnonzero(~np.isfinite(losses))
    loss, accuracy = evaluate(module, images) if not len(bad) else (math.nan, math.nan)
    said = [str(w.message) for w in caught if issubclass(w.category, NormDynWarning)]
    return Run(
        module.network,
        monitor.history,
        losses,
        int(bad[0]) if len(bad) else None,
        loss,
        accuracy,
        said,
    )


def fit_quietly(module: L.LightningModule, batches: Any, **settings: Any) -> None:
    """One fit that writes nothing, neither files nor lines; the tables of targets would be the same
    for every run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", module=r"lightning\."
    )  # not this package, whose name begins like it
    trainer = L.Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accelerator": "cpu", "devices": 1, **settings},
    )
    with redirect_stdout(io.StringIO()):
        trainer.fit(module, batches)


@torch.no_grad()
def evaluate(module: nn.Module, images: Images) -> tuple[float, float]:
    """Mean loss and accuracy on the test images, with BatchNorm's running statistics."""
    network = module.network if isinstance(module, Classifier) else module
    parameter = next(network.parameters())
    training = network.training
    network.eval()
    logits = torch.cat([network(x.to(parameter)) for x in images.test_x.split(1000)]).float().cpu()
    network.train(training)
    return float(F.cross_entropy(logits, images.test_y)), float(
        (logits.argmax(1) == images.test_y).float().mean()
    )


# ------------------------------------------------------------------------------------------ numbers


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def paired(these: Sequence[float], those: Sequence[float]) -> tuple[float, float]:
    """Mean difference over seeds, and its t: with three seeds, |t| < 4.3 is no difference."""
    differences = [a - b for a, b in zip(these, those, strict=True)]
    if len(differences) < 2:
        return differences[0], math.nan
    difference, error = mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    if error == 0:
        return difference, math.copysign(math.inf, difference) if difference else 0.0
    return difference, difference / error


def clear(t: float, seeds: int) -> bool:
    """Whether a paired difference is more than chance at 5 %, were it the only comparison made."""
    return abs(t) > T_AT_5_PERCENT.get(seeds, 2.2)


def window(history: History, key: str, first: float, last: float, *, rms: bool = False) -> float:
    """Mean (or root mean square) of a curve between two fractions of its steps."""
    steps, values = history.column(key)
    chosen = values[(steps >= first * steps[-1]) & (steps <= last * steps[-1])].astype(float)
    return float(np.sqrt((chosen**2).mean()) if rms else chosen.mean())


def near(history: History, key: str, step: float) -> float:
    """The value recorded nearest to a step."""
    steps, values = history.column(key)
    return float(values[np.abs(steps - step).argmin()])


def mean_curve(runs: Sequence[Run], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean over seeds of a curve; a run that ended early ends it."""
    curves = [run.history.column(key) for run in runs]
    length = min(len(steps) for steps, _ in curves)
    return curves[0][0][:length], np.mean([values[:length] for _, values in curves], axis=0)


def mean_loss(runs: Sequence[Run], over: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the training loss: mean over seeds and over blocks of ``over`` steps (fewer in a
    very short run)."""
    length = min(len(run.losses) for run in runs)
    over = max(1, min(over, length // 4))
    losses = np.mean([run.losses[: length // over * over] for run in runs], axis=0).reshape(
        -1, over
    )
    return np.arange(len(losses)) * over + over / 2, losses.mean(1)


def layers_of(history: History, quantity: str) -> list[str]:
    """Names of the weights that have this quantity, the scale-invariant ones only, first layer
    first."""
    known = history.meta["targets"]
    prefix = f"{quantity}/"
    measured = [key[len(prefix) :] for key in history.keys() if key.startswith(prefix)]  # noqa: SIM118 (a History is no dict)
    return [name for name in measured if known[name]["scale_invariant"] not in ("no", "unknown")]


# ------------------------------------------------------------------------------ command line, table


def arguments(
    description: str, desk: dict[str, Any], tiny: dict[str, Any], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """The flags of a script: every key of ``desk`` is one, and ``--tiny`` changes the defaults to
    ``tiny``.

    Resolution and numbers of images concern CIFAR-10 only, which is averaged down to the
    resolution.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument(
        "--tiny",
        action="store_true",
        help="seconds instead of minutes, to see that it runs; the numbers mean nothing",
    )
    is_tiny = first.parse_known_args(argv)[0].tiny
    defaults = {
        "resolution": 8,
        "train_images": 10_000,
        "test_images": 5_000,
        **desk,
        **(tiny if is_tiny else {}),
    }
    parser = argparse.ArgumentParser(
        description=description,
        parents=[first],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0] if is_tiny else [0, 1, 2])
    parser.add_argument(
        "--cifar",
        type=Path,
        help="cifar-10-python.tar.gz or its folder; without it, scikit-learn's digits",
    )
    parser.add_argument("--accelerator", default="cpu", help="as Lightning's Trainer has it")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/reproduce-tiny") if is_tiny else HERE,
        help="folder of table and picture",
    )
    for key, value in defaults.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args(argv)
    args.command = shlex.join(
        ["python", f"benchmarks/reproduce/{Path(sys.argv[0]).name}", *_without_paths(sys.argv[1:])]
    )
    args.started, args.cpu_started = time.perf_counter(), time.process_time()
    # Such small matrices are slower on several threads, and much slower while others use the
    # machine.
    torch.set_num_threads(1)
    return args


def _without_paths(words: Sequence[str]) -> list[str]:
    """The words of a command line without the places where somebody keeps data and results."""
    shown: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, _ = word.partition("=")
        if "--out" not in (before, flag):
            shown.append(
                "PATH"
                if before == "--cifar"
                else f"{flag}=PATH"
                if equals and flag == "--cifar"
                else word
            )
    return shown


class Report:
    """Collects claims, tables and one picture, and writes them beside the script."""

    def __init__(self, title: str, args: argparse.Namespace, about: str) -> None:
        self.title, self.args, self.about = title, args, " ".join(about.split())
        self.claims: list[tuple[str, str, bool | None, str]] = []
        self.parts: list[str] = []

    def claim(self, text: str, measured: str, holds: bool | None, otherwise: str = "") -> None:
        """One line of the summary; ``holds`` None: looked at, not judged. ``otherwise``: a guess
        why, shown where it does not hold."""
        self.claims.append((text, measured, holds, otherwise))

    def table(self, caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        self.parts += [f"## {caption}", "", _markdown(columns, rows), ""]

    def note(self, text: str) -> None:
        self.parts += [" ".join(text.split()), ""]

    def write(self, name: str, figure: Any) -> Path:
        """Write ``name.md`` and ``name.png``, and print the table."""
        out: Path = self.args.out
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / f"{name}.png", dpi=110)
        words = {True: "yes", False: "**no**", None: "-"}
        rows = [(text, measured, words[holds]) for text, measured, holds, _ in self.claims]
        whys = [
            f"*{text}:* not reproduced. Perhaps: {why}"
            for text, _, holds, why in self.claims
            if holds is False and why
        ]
        text = "\n".join(
            [
                f"# {self.title}",
                "",
                self.about,
                "",
                _markdown(("claim", "measured here", "reproduced"), rows),
                "",
                *[line for why in whys for line in (why, "")],
                f"![{self.title}]({name}.png)",
                "",
                *self.parts,
                "## How this was made",
                "",
                *self._circumstances(),
                "",
            ]
        )
        (out / f"{name}.md").write_text(text, encoding="utf-8")
        print(text)
        if out.resolve() == HERE:
            summary.refresh()
        return out / f"{name}.md"

    def _circumstances(self) -> list[str]:
        wall, cpu = (
            time.perf_counter() - self.args.started,
            time.process_time() - self.args.cpu_started,
        )
        settings = vars(self.args).items()
        hidden = {"cifar", "out", "command", "started", "cpu_started", "tiny", "seeds"}
        if self.args.cifar is None:
            hidden |= {"resolution", "train_images", "test_images"}
        return [
            f"- command: `{self.args.command}`"
            + (" (`--tiny`: the numbers mean nothing)" if self.args.tiny else ""),
            "- settings: "
            + ", ".join(f"{key} {value}" for key, value in settings if key not in hidden),
            f"- seeds: {', '.join(map(str, self.args.seeds))}; ± is the standard deviation over "
            f"seeds",
            f"- date: {datetime.date.today().isoformat()}; {wall:.0f} s, of which {cpu:.0f} s on "
            f"the CPU",
            f"- machine: {_machine()}; one thread",
            f"- Python {platform.python_version()}, torch {torch.__version__}, lightning "
            f"{L.__version__}",
        ]


def _machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (
                line.split(":")[1].strip()
                for line in info.read_text().splitlines()
                if line.startswith("model name")
            ),
            model,
        )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{os.cpu_count()} cores of {model}{gpu}"


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def figure(
    columns: int, rows: int = 1, width: float = 5.2, height: float = 4.0
) -> tuple[Any, list[Any]]:
    """An empty picture and its axes, row by row; no screen needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes:
        ax.grid(True, color="#DDDDDD", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return picture, axes
