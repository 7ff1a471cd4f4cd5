"""What the balance of an early window says ahead, on a pre-LN transformer: the forecast by the
measured coherence, beside "the norm stays as it is" and the formula of pure noise.

python benchmarks/reproduce/gpt_balance.py
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import desk
import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normdyn import NormDynamicsMonitor
from lightning_normdyn.equilibrium import equilibrium_angular_update
from lightning_normdyn.functional import coherence
from lightning_normdyn.history import History
from lightning_normdyn.monitor.plots.axes import OKABE_ITO
from lightning_normdyn.theory.course import norm_course
from lightning_normdyn.theory.forecast import forecast_group
from lightning_normdyn.theory.group_norms import GroupWeights, Measured
from lightning_normdyn.theory.schedule import Schedule
from lightning_normdyn.theory.words import TOO_EARLY

sys.path.append(str(desk.HERE.parents[1] / "examples"))
from char_gpt import GPT
from data_modules import Text

Doubles = NDArray[np.float64]

DESK = {"width": 64, "layers": 2, "heads": 4, "context": 48, "batch": 12, "steps": 3_000}
TINY = {"width": 8, "layers": 1, "heads": 2, "context": 8, "batch": 4, "steps": 150}
WARM_UP = 1 / 15
EVERY = 10
# Of the run: the window that is measured, the one that is forecast from it, and two neighbours.
EARLY, LATE = (1 / 15, 1 / 3), (0.6, 1.0)
BEFORE, AFTER = (0.6, 0.8), (0.8, 1.0)
# The weights in the picture: of each kind one that the loss pulls in another direction.
SHOWN = ("head.weight", "attention.query.weight", "attention.out.weight", "mlp.2.weight")


@dataclass(frozen=True)
class Arm:
    """One way to train: hidden matrices under ``optimizer``, the other weights under AdamW."""

    optimizer: str
    lr: float
    decay: float
    schedule: str

    def factor(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0, over the largest."""
        warm_up = round(steps * WARM_UP)
        if step < warm_up:
            return (step + 1) / warm_up
        share = (step - warm_up) / (steps - warm_up)
        falls = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * share)) / 2}
        return falls.get(self.schedule, 1 - share)


ARMS = {
    "AdamW 3e-3, decay .3, constant": Arm("adamw", 3e-3, 0.3, "constant"),
    "AdamW 3e-3, decay .1, constant": Arm("adamw", 3e-3, 0.1, "constant"),
    "AdamW 3e-3, decay .3, cosine": Arm("adamw", 3e-3, 0.3, "cosine"),
    "Muon 3e-3, decay .3, constant": Arm("muon", 3e-3, 0.3, "constant"),
    "Muon 3e-3, decay .3, linear to 0": Arm("muon", 3e-3, 0.3, "linear"),
}


# ------------------------------------------------------------------------------------ one fit


def network(characters: int, args: argparse.Namespace) -> GPT:
    """The example's GPT with LayerNorm, and without its QK-norm: no matrix is scale-invariant."""
    gpt = GPT(characters, args.context, args.width, args.layers, args.heads, nn.LayerNorm)
    for block in gpt.blocks:
        block.attention.query_norm = block.attention.key_norm = nn.Identity()
    for parameter in gpt.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    return gpt


class Windows:
    """Random windows of the text, as many batches as the run has steps."""

    def __init__(self, text: Text, args: argparse.Namespace, seed: int) -> None:
        text.setup()
        codes, following = text.train.tensors
        self.codes = torch.cat([codes.flatten(), following[-1, -1:]])
        self.context, self.batch, self.steps = args.context, args.batch, args.steps
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.steps):
            last = len(self.codes) - self.context
            starts = torch.randint(last, (self.batch, 1), generator=self.generator)
            places = starts + torch.arange(self.context)
            yield self.codes[places], self.codes[places + 1]


class Transformer(L.LightningModule):
    """Predicts the next character; keeps the length of each matrix at the end of the early
    window."""

    def __init__(self, gpt: GPT, arm: Arm, steps: int) -> None:
        super().__init__()
        # Lightning steps only a single optimizer by itself.
        self.automatic_optimization = False
        self.gpt, self.arm, self.steps = gpt, arm, steps
        self.matrices = {n: p for n, p in self.named_parameters() if p.dim() == 2}
        self.lengths: dict[str, float] = {}
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if batch_idx == row_at(EARLY[1], self.steps):
            self.lengths = {n: float(p.detach().norm()) for n, p in self.matrices.items()}
        codes, following = batch
        loss = F.cross_entropy(self.gpt(codes).flatten(0, 1), following.flatten())
        self.losses.append(float(loss.detach()))
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.arm.lr * self.arm.factor(batch_idx, self.steps)
            optimizer.step()

    def is_hidden(self, name: str) -> bool:
        return "blocks." in name

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        arm, matrices = self.arm, self.matrices
        hidden = [p for n, p in matrices.items() if self.is_hidden(n)]
        others = [p for n, p in matrices.items() if not self.is_hidden(n)]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        decayed = others if arm.optimizer == "muon" else [*hidden, *others]
        groups = [
            {"params": decayed, "weight_decay": arm.decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=arm.lr, betas=(0.9, 0.99))
        if arm.optimizer == "adamw":
            return [adamw]
        muon = torch.optim.Muon(
            hidden, lr=arm.lr, weight_decay=arm.decay, adjust_lr_fn="match_rms_adamw"
        )
        return [muon, adamw]


@dataclass
class Fit:
    """What one run leaves behind."""

    module: Transformer
    history: History

    @property
    def names(self) -> list[str]:
        return list(self.module.matrices)

    def verdict(self, name: str) -> str:
        return str(self.history.meta["targets"][name]["verdict"])

    def is_judged(self, name: str) -> bool:
        """Whether the verdict says more than why there is none."""
        verdict = self.verdict(name)
        return verdict not in TOO_EARLY and not verdict.startswith("no balance")

    def has_balance(self, name: str) -> bool:
        """A number, or the finding that there is none because the loss alone holds the norm."""
        ratios = self.history.curve(f"balance_ratio/{name}")[1]
        coherences = self.history.curve(f"coherence/{name}")[1]
        return len(ratios) > 0 or (len(coherences) > 0 and coherences[-1] < 0)


def train(arm: Arm, text: Text, args: argparse.Namespace, seed: int) -> Fit:
    torch.manual_seed(seed)
    module = Transformer(network(len(text.characters), args), arm, args.steps)
    monitor = NormDynamicsMonitor(EVERY, tables=False)
    settings = {"max_epochs": 1, "accelerator": args.accelerator, "callbacks": [monitor]}
    desk.fit_quietly(module, Windows(text, args, seed), **settings)
    return Fit(module, monitor.history)


# ---------------------------------------------------------------------------------- forecasts


def row_at(share: float, steps: int) -> int:
    """The step of the last row before a share of the run is over; Lightning logs in the last of
    every ten steps."""
    return round(share * steps / EVERY) * EVERY - 1


@dataclass
class Matrix:
    """One matrix of one run, its rows and its param group at each step."""

    fit: Fit
    name: str

    def __post_init__(self) -> None:
        history, module = self.fit.history, self.fit.module
        self.rows, self.angles = history.curve(f"matrix_angle/{self.name}")
        drift_rows, drifts = history.curve(f"norm_drift/{self.name}")
        assert np.array_equal(drift_rows, self.rows[1:])
        # ln of the norm over that at the first row.
        self.log_norms = np.concatenate([[0.0], np.cumsum(drifts * np.diff(self.rows))])
        weight = module.matrices[self.name]
        self.entries, self.shape = weight.numel(), (weight.shape[0], weight.shape[1])
        self.optimizer, self.group = self._optimizer_of(weight)

    def _optimizer_of(self, weight: nn.Parameter) -> tuple[type, Mapping[str, Any]]:
        for optimizer in self.fit.module.trainer.optimizers:
            for group in optimizer.param_groups:
                if any(weight is member for member in group["params"]):
                    settings = {key: value for key, value in group.items() if key != "params"}
                    return type(optimizer), settings
        raise LookupError(self.name)

    def groups(self, first: int, last: int) -> list[Mapping[str, Any]]:
        """Its param group at steps ``first`` to ``last - 1``."""
        module = self.fit.module
        rates = [module.arm.lr * module.arm.factor(s, module.steps) for s in range(first, last)]
        return [{**self.group, "lr": lr} for lr in rates]

    def between(self, first: int, last: int) -> NDArray[np.bool_]:
        return (self.rows >= first) & (self.rows <= last)

    def measured_angle(self, first: int, last: int) -> float:
        """Root mean square over the rows from ``first`` up to, not including, ``last``."""
        return root_mean_square(self.angles[self.between(first, last - 1)])

    def log_norm_at(self, step: int) -> float:
        return float(self.log_norms[self.rows == step][0])

    def measure(self, first: int, last: int) -> Measured:
        """Coherence and energy of the steps from row ``first`` to row ``last``, in units of the
        norm at ``last``."""
        chosen = self.between(first, last)
        rows, squares = self.rows[chosen], self.angles[chosen] ** 2
        # Angles are known at rows: between two of them they are taken to change evenly.
        turned = np.diff(rows) * (squares[1:] + squares[:-1]) / 2
        rates = np.array([group["lr"] for group in self.groups(first, last + 1)])
        pulls = rates[:-1] * self.group["weight_decay"]
        growth = self.log_norm_at(last) - self.log_norm_at(first)
        kappa = float(coherence(1.0, math.exp(growth), pulls, turned))

        newer = rows >= (first + last) / 2
        relative = np.exp(2 * (self.log_norms[chosen] - self.log_norm_at(last)))
        tangents = np.tan(self.angles[chosen]) ** 2
        energies = tangents * relative / rates[rows - first] ** 2
        return Measured([kappa], [float(energies[newer].mean())])


METHODS = ("measured coherence", "norm stays", "noise formula", "noise, norm integrated")


def forecasts(matrix: Matrix, window: tuple[float, float]) -> dict[str, Doubles]:
    """The angles of all steps after a window, by two methods that know nothing else."""
    steps = matrix.fit.module.steps
    first, now = (row_at(share, steps) for share in window)
    groups = matrix.groups(now, steps)
    rates = np.array([group["lr"] for group in groups])
    measured = matrix.measure(first, now)
    size = math.sqrt(measured.energy[0])

    weights = GroupWeights([1.0], [matrix.entries], [matrix.shape])
    forecast = forecast_group(matrix.optimizer, Schedule(tuple(groups)), weights, measured=measured)
    assert forecast.norms is not None
    # The last norm is that after the last step.
    by_coherence = np.arctan(rates * size / forecast.norms[:-1, 0])
    return dict(zip(METHODS[:2], (by_coherence, np.arctan(rates * size)), strict=True))


def noise_forecasts(matrix: Matrix) -> dict[str, Doubles]:
    """The angles of all steps after the early window, if gradients were noise: settled at every
    moment, and from the norm at the end of the window."""
    steps = matrix.fit.module.steps
    groups = matrix.groups(row_at(EARLY[1], steps), steps)
    settled = [
        equilibrium_angular_update(matrix.optimizer, group, shape=matrix.shape) for group in groups
    ]
    length = matrix.fit.module.lengths[matrix.name]
    course = norm_course(matrix.optimizer, groups[0], [length], matrix.entries, shape=matrix.shape)
    assert course is not None
    on_the_way = []
    for group in groups:
        course.advance(group)
        on_the_way.append(float(course.angular_update[0]))
    columns = (np.array(settled, dtype=np.float64), np.array(on_the_way))
    return dict(zip(METHODS[2:], columns, strict=True))


def errors_of(
    matrix: Matrix, angles: Mapping[str, Doubles], now: float, later: tuple[float, float]
) -> dict[str, float]:
    """Forecast over measured angle of the window ``later``, minus 1, by method; the forecasts begin
    at the share ``now`` of the run."""
    steps = matrix.fit.module.steps
    begin, end = (row_at(share, steps) for share in later)
    # The same steps as those of the rows.
    rows = matrix.rows[matrix.between(begin, end - 1)] - row_at(now, steps)
    found = matrix.measured_angle(begin, end)
    return {method: root_mean_square(a[rows]) / found - 1 for method, a in angles.items()}


def root_mean_square(values: Doubles) -> float:
    return float(np.sqrt(np.square(values).mean()))


# ------------------------------------------------------------------------------------ the table


class Errors:
    """Sizes of errors over matrices and seeds, by method."""

    def __init__(self) -> None:
        self.sizes: dict[str, list[float]] = {}

    def add(self, errors: Mapping[str, float]) -> None:
        for method, error in errors.items():
            self.sizes.setdefault(method, []).append(abs(error))

    def median(self, method: str) -> float:
        return float(np.median(self.sizes[method]))

    def cells(self) -> list[str]:
        """Median and largest, in percent, by method."""
        return [
            f"{100 * self.median(method):.3g} / {100 * max(sizes):.3g}"
            for method, sizes in self.sizes.items()
        ]


@dataclass
class Results:
    """All runs of one arm."""

    early: Errors
    neighbour: Errors
    moved: list[float]
    balanced: int = 0
    judged: int = 0
    matrices: int = 0


def look_at(fits: Sequence[Fit]) -> Results:
    results = Results(Errors(), Errors(), [])
    for fit in fits:
        for name in fit.names:
            matrix = Matrix(fit, name)
            now = row_at(EARLY[1], fit.module.steps)
            angles = {**forecasts(matrix, EARLY), **noise_forecasts(matrix)}
            results.early.add(errors_of(matrix, angles, EARLY[1], LATE))
            results.neighbour.add(errors_of(matrix, forecasts(matrix, BEFORE), BEFORE[1], AFTER))
            results.moved.append(abs(math.expm1(matrix.log_norms[-1] - matrix.log_norm_at(now))))
            results.matrices += 1
            results.balanced += fit.has_balance(name)
            results.judged += fit.is_judged(name)
    return results


def claims(report: desk.Report, arm: str, results: Results) -> None:
    by_kappa, stays, settled, integrated = map(results.early.median, METHODS)
    words = f"median error {by_kappa:.1%}; norm stays {stays:.1%}; noise {settled:.1%}, integrated {integrated:.1%}"
    moved = float(np.median(results.moved))
    report.claim(
        f"{arm}: the forecast by the measured coherence beats the noise formula, integrated or not",
        words,
        by_kappa < min(settled, integrated),
        "once the learning rate falls to 0, the present norm decides, and any rule that starts from it is near",
    )
    report.claim(
        f"{arm}: it beats 'the norm stays'",
        f"median error {by_kappa:.1%} against {stays:.1%}; norms moved by {moved:.0%}",
        by_kappa < stays,
        "norms hardly move any more, and the coherence of the early window is not that of the later one",
    )


def table_of_matrices(report: desk.Report, arm: str, fit: Fit) -> None:
    rows = []
    for name in fit.names:
        kappa = fit.history.curve(f"coherence/{name}")[1]
        ratio = fit.history.curve(f"balance_ratio/{name}")[1]
        loss = fit.history.curve(f"loss_decay/{name}")[1]
        rows.append(
            (
                name.removeprefix("gpt."),
                f"{kappa[-1]:.3g}" if len(kappa) else "-",
                f"{ratio[-1]:.2f}" if len(ratio) else "-",
                f"{loss[-1] / fit.module.arm.decay:+.2f}" if len(loss) else "-",
                fit.verdict(name),
            )
        )
    columns = ("matrix", "coherence", "balance ratio", "loss / decay", "verdict")
    report.table(f"{arm}: balances at the end, seed {report.args.seeds[0]}", columns, rows)


def draw(ax: Any, title: str, fit: Fit) -> None:
    steps = fit.module.steps
    now = row_at(EARLY[1], steps)
    for color, kind in zip(OKABE_ITO, SHOWN, strict=False):
        name = [known for known in fit.names if known.endswith(kind)][-1]
        matrix = Matrix(fit, name)
        ax.plot(matrix.rows, matrix.angles, color=color, lw=0.8, label=name.removeprefix("gpt."))
        for method, style in zip(METHODS[:2], ("--", ":"), strict=True):
            angles = forecasts(matrix, EARLY)[method]
            ax.plot(np.arange(now, steps), angles, color=color, ls=style, lw=1.4)
    ax.axvspan(*(share * steps for share in EARLY), color="black", alpha=0.07, lw=0)
    ax.set_title(title)
    ax.set_yscale("log")
    ax.set_xlabel("step")


def main() -> None:
    args = desk.arguments(__doc__.splitlines()[0], DESK, TINY)
    text = Text(None, args.batch, args.context)
    about = f"""A pre-LN GPT without QK-norm: {args.layers} layers, width {args.width}, {args.heads} heads, context
        {args.context}, batch {args.batch}, on characters of Python's help texts; float32, all matrices from a
        normal distribution of .02, warm-up over a fifteenth of {args.steps} steps. No matrix is scale-invariant. Muon (hidden matrices,
        adjusted to AdamW's size of steps) has AdamW beside it for the rest. Coherence and energy of each matrix are measured over the
        second to fifth fifteenth of the run; from its norm there, the norm is integrated under the known schedule, and the root mean
        square angle of the last two fifths is compared. Errors: |forecast / measured - 1|, median / largest over matrices and seeds."""
    report = desk.Report("What a measured balance says ahead", args, about)
    picture, axes = desk.figure(len(ARMS))
    early, neighbour, counts = [], [], []
    later_parts = []
    for ax, (title, arm) in zip(axes, ARMS.items(), strict=True):
        fits = [train(arm, text, args, seed) for seed in args.seeds]
        results = look_at(fits)
        print(title, results.early.cells(), results.neighbour.cells(), file=sys.stderr, flush=True)
        moved = float(np.median(results.moved))
        early.append((title, f"{moved:.0%}", *results.early.cells()))
        neighbour.append((title, *results.neighbour.cells()))
        counts.append(results)
        later_parts.append((title, fits[0]))
        claims(report, title, results)
        draw(ax, title, fits[0])
    matrices = sum(results.matrices for results in counts)
    balanced = sum(results.balanced for results in counts)
    judged = sum(results.judged for results in counts)
    report.claim(
        "every matrix has a balance and a verdict",
        f"{balanced} balances and {judged} verdicts of {matrices} matrices",
        balanced == judged == matrices,
    )
    columns = ("run", "norms moved since", *METHODS)
    report.table("Angles of the last two fifths, forecast from the first third", columns, early)
    report.table(
        "One window ahead: angles of the last fifth, forecast from the fifth before",
        ("run", *METHODS[:2]),
        neighbour,
    )
    for title, fit in later_parts:
        table_of_matrices(report, title, fit)
    axes[0].set_ylabel("angle of the matrix, radians per step")
    axes[0].legend(fontsize=7)
    report.note(
        """Picture: measured (thin), forecast by the measured coherence (dashed), the norm stays (dotted); grey: the window they rest on.
        Loss / decay: the pull of the loss on the norm, as a weight decay over the one that was set; negative: the loss pushes outwards."""
    )
    report.write("gpt_balance", picture)


if __name__ == "__main__":
    main()
