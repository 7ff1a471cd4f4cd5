"""The Noisy Rayleigh Quotient: the smallest problem that shows how learning rate and weight decay
steer a scale-invariant weight.

Minimize L(X) = XᵀAX / 2XᵀX by SGD with weight decay and noisy gradients. Only the direction of X
counts, so the dynamics are those of one filter in front of a normalization, and everything can be
computed in closed form. Running this file writes the NRQ paper's Figure 2 as one picture, with the
*corrected* formulas drawn in (dashed; limits dotted):

- trade-off: a larger angular update, √(2 lr λ) at equilibrium, learns faster and ends at a higher
  risk; only the product lr x λ matters;
- escape: after the learning rate falls, the risk dips below its limit and returns, because the
  angular update recovers slowly; dividing the
  weights by drop^(1/4) at the drop puts the norm at its new equilibrium, and there is no escape;
- Corollary 3: (k X, k² lr, λ/k²) takes exactly the directions of (X, lr, λ).

    python examples/noisy_rayleigh_quotient.py --out runs/nrq
    python examples/noisy_rayleigh_quotient.py --preset tiny
    python examples/noisy_rayleigh_quotient.py --lightning  # through a Trainer (minutes)

`simulate` is fast (all trials at once, no autograd); `NoisyRayleighQuotient` is the same problem as
a LightningModule, for callbacks, and `train` runs it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_normdyn import LRDropRescaling
from lightning_normdyn.equilibrium import (
    equivalent_hyperparameters,
    nrq_concentration,
    nrq_limit_risk,
    nrq_limit_risk_first_order,
    nrq_norm,
)
from lightning_normdyn.functional import angular_update


@dataclass(frozen=True)
class Problem:
    """A in `dim` dimensions has the eigenvalue 0 once and `gap` otherwise; gradient noise has
    standard deviation `sigma` per coordinate."""

    dim: int = 20
    sigma: float = 1.0
    gap: float = 1.0
    trials: int = 100

    def equilibrium_norm(self, lr: float, weight_decay: float) -> float:
        return ((self.dim - 1) * self.sigma**2 * lr / (2 * weight_decay)) ** 0.25

    def limit_risk(self, lr: float, weight_decay: float) -> float:
        return nrq_limit_risk(
            nrq_concentration(lr, weight_decay, dim=self.dim, sigma=self.sigma, gap=self.gap),
            self.dim,
        )

    def start(self, norm: float, risk: float = 0.5, seed: int = 0) -> Tensor:
        """Random weights of the given norm and risk, (trials, dim)."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.trials, self.dim, generator=generator, dtype=torch.float64)
        x[:, 1:] *= math.sqrt(risk) / x[:, 1:].norm(dim=1, keepdim=True)
        x[:, 0] = math.sqrt(1 - risk)
        return x * norm


@dataclass(frozen=True)
class Schedule:
    """SGD at `lr`, divided by `drop` from step `drop_at` on; at the drop, X is divided by
    drop^exponent."""

    lr: float
    weight_decay: float
    steps: int
    drop_at: int | None = None
    drop: float = 10.0
    exponent: float = 0.0

    def lr_at(self, step: int) -> float:
        return self.lr if self.drop_at is None or step < self.drop_at else self.lr / self.drop


@dataclass(frozen=True)
class Curves:
    """Per step, over the trials: mean risk 1 - cos², RMS angular update in radians,
    (E‖X‖⁴)^(1/4)."""

    risk: Tensor
    angular_update: Tensor
    norm: Tensor


def risk_of(x: Tensor) -> Tensor:
    """1 - f for each row, f being the squared cosine to the eigenvector of the smallest eigenvalue
    (the first axis)."""
    return x[:, 1:].square().sum(1) / x.square().sum(1)


def simulate(problem: Problem, schedule: Schedule, start: Tensor, *, seed: int = 1) -> Curves:
    """All trials at once, from `start` of shape (trials, dim); gradient (P A x̂ + P sigma noise) /
    ‖X‖ (NRQ paper, eq. 3 and 4)."""
    x = start.clone()
    generator = torch.Generator().manual_seed(seed)
    eigenvalues = torch.full((problem.dim,), problem.gap, dtype=torch.float64)
    eigenvalues[0] = 0.0
    curves = torch.empty(3, schedule.steps, dtype=torch.float64)
    for step in range(schedule.steps):
        lr = schedule.lr_at(step)
        if step == schedule.drop_at:
            x /= schedule.drop**schedule.exponent
        norm = x.norm(dim=1, keepdim=True)
        unit = x / norm
        gradient = eigenvalues * unit + problem.sigma * torch.randn(
            x.shape, generator=generator, dtype=torch.float64
        )
        gradient -= unit * (gradient * unit).sum(1, keepdim=True)
        gradient /= norm
        curves[0, step] = risk_of(x).mean()
        shrunk = 1 - lr * schedule.weight_decay
        # The gradient is at right angles to X, so the new X is a right triangle.
        angles = torch.atan2(lr * gradient.norm(dim=1), shrunk * norm[:, 0])
        curves[1, step] = angles.square().mean().sqrt()
        curves[2, step] = norm.pow(4).mean() ** 0.25
        x = shrunk * x - lr * gradient
    return Curves(*curves)


def predict(problem: Problem, schedule: Schedule, start: Tensor) -> Curves:
    """The corrected closed forms: the norm (eq. 17), the angular update that follows, and the drift
    of the risk at that norm (eq. 16).

    The drift is taken at the mean risk, as if all trials were there: good for the course, and
    within (p-1)/2c of the limit.
    """
    p, sigma = problem.dim, problem.sigma
    risk, norm = risk_of(start).mean().item(), start[0].norm().item()
    since, norm_there = 0, norm
    rows = []
    for step in range(schedule.steps):
        lr = schedule.lr_at(step)
        if step == schedule.drop_at:
            since, norm_there = step, norm / schedule.drop**schedule.exponent
        norm = float(
            nrq_norm(step - since, norm_there, lr, schedule.weight_decay, dim=p, sigma=sigma)
        )
        pace = lr / norm**2
        rows.append((risk, pace * sigma * math.sqrt(p - 1), norm))
        risk += -2 * pace * problem.gap * risk * (1 - risk) + (pace * sigma) ** 2 * (
            p * (1 - risk) - 1
        )
    return Curves(*torch.tensor(rows, dtype=torch.float64).T)


# --- the same as a LightningModule
# --------------------------------------------------------------------------------------------------


class NoiseStream(IterableDataset[Tensor]):
    """One noise sample of shape (trials, dim) per optimizer step, the same as `simulate` draws for
    the same seed."""

    def __init__(self, problem: Problem, steps: int, seed: int = 1) -> None:
        super().__init__()
        self.problem, self.steps, self.seed = problem, steps, seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            yield torch.randn(
                self.problem.trials, self.problem.dim, generator=generator, dtype=torch.float64
            )


class NoisyRayleighQuotient(L.LightningModule):
    """One row of `weight` per trial: a filter each, as a callback sees it. Train with
    precision="64-true"."""

    def __init__(self, problem: Problem, schedule: Schedule, start: Tensor, seed: int = 1) -> None:
        super().__init__()
        self.problem, self.schedule, self.seed = problem, schedule, seed
        self.weight = torch.nn.Parameter(start.clone())
        self.risks: list[Tensor] = []
        self.angular_updates: list[Tensor] = []
        self.norms: list[Tensor] = []

    def training_step(self, noise: Tensor) -> Tensor:
        unit = self.weight / self.weight.norm(dim=1, keepdim=True)
        quotient = self.problem.gap * unit[:, 1:].square().sum() / 2
        self._before = self.weight.detach().clone()
        self.risks.append(risk_of(self._before).mean())
        self.log("risk", self.risks[-1])
        return (
            quotient + self.problem.sigma * (noise * unit).sum()
        )  # the gradient of the second term is the noise of eq. 4

    def on_train_batch_end(self, outputs: object, batch: Tensor, batch_idx: int) -> None:
        self.angular_updates.append(
            angular_update(self._before, self.weight.detach()).square().mean().sqrt()
        )
        self.norms.append(self._before.norm(dim=1).pow(4).mean() ** 0.25)

    def curves(self) -> Curves:
        return Curves(
            torch.stack(self.risks), torch.stack(self.angular_updates), torch.stack(self.norms)
        )

    def configure_optimizers(self) -> dict[str, object]:
        schedule = self.schedule
        optimizer = torch.optim.SGD(
            self.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay
        )
        milestones = [] if schedule.drop_at is None else [schedule.drop_at]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, milestones, gamma=1 / schedule.drop
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(
            NoiseStream(self.problem, self.schedule.steps, self.seed), batch_size=None
        )


def train(problem: Problem, schedule: Schedule, start: Tensor, *, seed: int = 1) -> Curves:
    """`simulate` through a Trainer: at the drop, LRDropRescaling finds the exponent 1/4 of SGD by
    itself."""
    module = NoisyRayleighQuotient(problem, schedule, start, seed)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="64-true",
        callbacks=[LRDropRescaling()] if schedule.exponent else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return module.curves()


# --- Figure 2
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One run in the picture."""

    label: str
    schedule: Schedule
    start: Tensor
    color: str
    style: str = "-"
    width: float = 1.2


def experiments(problem: Problem, scale: float) -> dict[str, list[Line]]:
    """The three rows of the figure; `scale` shortens them."""
    steps = round(5000 * scale)
    trade_off = []
    for lr, decay, color, style in (
        (0.01, 0.0025, "C0", "-"),
        (0.01, 0.01, "C1", "-"),
        (0.1, 0.001, "C3", ":"),
        (0.01, 0.04, "C2", "-"),
    ):
        start = problem.start(problem.equilibrium_norm(lr, decay))
        trade_off.append(
            Line(
                f"lr {lr:g}, λ {decay:g}",
                Schedule(lr, decay, steps),
                start,
                color,
                style,
                1.6 if style == ":" else 1.2,
            )
        )
    lr, decay, drop_at = 0.05, 0.02, round(3000 * scale)
    start = problem.start(problem.equilibrium_norm(lr, decay))
    escape = [
        Line("lr / 10", Schedule(lr, decay, round(15000 * scale), drop_at), start, "C0"),
        Line(
            "lr / 10, X / 10^(1/4)",
            Schedule(lr, decay, round(15000 * scale), drop_at, exponent=0.25),
            start,
            "C3",
        ),
    ]
    lr, decay, k, steps = 0.02, 0.01, 3.0, round(8000 * scale)
    plain = {"lr": lr, "weight_decay": decay, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
    same = equivalent_hyperparameters(torch.optim.SGD, plain, k)
    assert same is not None
    start = problem.start(2.0)
    corollary = [
        Line(f"lr {lr:g}, λ {decay:g}, X", Schedule(lr, decay, steps), start, "C0", "-", 2.5),
        Line(
            f"lr {same['lr']:g}, λ {same['weight_decay']:.3g}, {k:g} X",
            Schedule(same["lr"], same["weight_decay"], steps),
            k * start,
            "C8",
            "--",
        ),
        Line(f"lr {lr:g}, λ {decay:g}, {k:g} X", Schedule(lr, decay, steps), k * start, "C3"),
    ]
    return {"trade-off": trade_off, "escape": escape, "Corollary 3": corollary}


def draw(
    problem: Problem, rows: dict[str, list[Line]], measured: dict[str, list[Curves]], path: Path
) -> None:
    """Rows: experiments. Columns: risk, angular update, norm.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(len(rows), 3, figsize=(15, 11), layout="constrained")
    for row, (name, lines) in zip(axes, rows.items(), strict=True):
        for line, curves in zip(lines, measured[name], strict=True):
            predicted = predict(problem, line.schedule, line.start)
            pairs = (
                (curves.risk, predicted.risk),
                (curves.angular_update, predicted.angular_update),
                (curves.norm, predicted.norm),
            )
            for axis, (curve, prediction) in zip(row, pairs, strict=True):
                axis.plot(
                    curve, line.style, color=line.color, lw=line.width, label=line.label, alpha=0.85
                )
                axis.plot(prediction, "--", color="black", lw=0.8)
            final = line.schedule.lr_at(line.schedule.steps)
            row[0].axhline(
                problem.limit_risk(final, line.schedule.weight_decay),
                color=line.color,
                ls=(0, (1, 3)),
                lw=1.2,
            )
        row[0].set_ylabel("risk, 1 - cos²")
        row[0].set_title(f"{name}: risk (dotted: exact limit)")
        row[1].set_ylabel("RMS radians per step")
        row[1].set_title(f"{name}: angular update")
        row[2].set_ylabel("(E‖X‖⁴)^(1/4)")
        row[2].set_title(f"{name}: norm")
        row[0].legend(fontsize=9, loc="upper right")
        for axis in row:
            axis.set_yscale("linear" if axis is row[2] else "log")
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.set_xlabel("step")
            axis.grid(alpha=0.25)
    figure.suptitle(
        f"Noisy Rayleigh Quotient, p = {problem.dim}, mean of {problem.trials} trials. Dashed "
        f"black: corrected closed forms"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(
    problem: Problem, rows: dict[str, list[Line]], measured: dict[str, list[Curves]]
) -> list[str]:
    """What the picture shows, in numbers."""
    text = [
        "experiment   run                            limit risk: measured  exact    first order"
    ]
    for name, lines in rows.items():
        for line, curves in zip(lines, measured[name], strict=True):
            lr, decay = line.schedule.lr_at(line.schedule.steps), line.schedule.weight_decay
            tail = curves.risk[-len(curves.risk) // 5 :].mean().item()
            concentration = nrq_concentration(
                lr, decay, dim=problem.dim, sigma=problem.sigma, gap=problem.gap
            )
            first = nrq_limit_risk_first_order(concentration, problem.dim)
            text.append(
                f"{name:12} {line.label:30} {tail:20.5f}  {problem.limit_risk(lr, decay):.5f}  "
                f"{first:.5f}"
            )
    for line, curves in zip(rows["escape"], measured["escape"], strict=True):
        text.append(
            f"escape, {line.label}: lowest risk after the drop / final risk = "
            f"{escape_ratio(curves, line.schedule):.2f}"
        )
    same, equivalent = measured["Corollary 3"][:2]
    text.append(
        f"Corollary 3: largest difference of the two risk curves = "
        f"{(same.risk - equivalent.risk).abs().max():.1e}"
    )
    return text


def escape_ratio(curves: Curves, schedule: Schedule, window: int = 50) -> float:
    """Lowest risk after the drop over the final risk, both as means over `window` steps. Near 1: no
    escape."""
    assert schedule.drop_at is not None
    after = curves.risk[schedule.drop_at :]
    smooth = after.unfold(0, min(window, len(after)), 1).mean(1)
    return (smooth.min() / after[-len(after) // 5 :].mean()).item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Figure 2 of the Noisy Rayleigh Quotient paper, with corrected formulas."
    )
    parser.add_argument(
        "--preset",
        choices=("paper", "tiny"),
        default="paper",
        help="tiny: a tenth of the steps and trials, for a quick look",
    )
    parser.add_argument(
        "--lightning",
        action="store_true",
        help="train the LightningModule instead of simulating: slower, the same curves",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/noisy_rayleigh_quotient"),
        help="folder for the picture",
    )
    arguments = parser.parse_args()
    tiny = arguments.preset == "tiny"
    problem = Problem(trials=10 if tiny else 100)
    rows = experiments(problem, scale=0.1 if tiny else 1.0)
    run = train if arguments.lightning else simulate
    measured = {
        name: [run(problem, line.schedule, line.start) for line in lines]
        for name, lines in rows.items()
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "figure2.png"
    print("\n".join(report(problem, rows, measured)))
    try:
        draw(problem, rows, measured, path)
    except ModuleNotFoundError:
        print("matplotlib is not installed (pip install matplotlib): no picture.")
    else:
        print(f"picture: {path}")


if __name__ == "__main__":
    main()
