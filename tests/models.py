"""Small LightningModules, their data, and the plain-torch loop that tests compare a Trainer
with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import reference
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks
from lightning.pytorch.loops import training_epoch_loop
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from lightning_normdyn.invariance.rules import register_rule

BATCH = 8
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def weight_and_sgd(**options: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """One weight, and the plainest optimizer of it."""
    weight = nn.Parameter(torch.arange(1.0, 7.0).reshape(2, 3))
    return weight, torch.optim.SGD([weight], **{"lr": 0.1, **options})


def backward(*weights: nn.Parameter) -> None:
    """Leave a gradient of ones on each weight."""
    for weight in weights:
        weight.grad = torch.ones_like(weight)


def images(count: int = 4 * BATCH, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Noise images of two kinds that a network can tell apart."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(count) % 2
    pictures = torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    pictures[:, :, :3] += labels[:, None, None, None]
    return TensorDataset(pictures.to(dtype), labels)


def loader(
    count: int = 4 * BATCH, dtype: torch.dtype = torch.float64, batch_size: int = BATCH
) -> DataLoader[Any]:
    """Batches in a fixed order."""
    return DataLoader(images(count, dtype), batch_size=batch_size)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def convnet(bias: bool = False, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Two convolutions in front of a normalization, and a linear head that is not
    scale-invariant."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=bias),
        norm(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, bias=bias),
        norm(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


TARGETS = ["net.0.weight", "net.3.weight"]


class Net(L.LightningModule):
    """A classifier around ``net``; optimizer and scheduler are given as functions."""

    def __init__(
        self,
        make_optimizer: MakeOptimizer = sgd,
        net: nn.Module | None = None,
        make_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.net = (convnet() if net is None else net).to(dtype)
        self.make_optimizer, self.make_scheduler = make_optimizer, make_scheduler

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), prog_bar=False)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": "step"}]


class ManualNet(Net):
    """Two halves, two optimizers, manual optimization: each half steps in turn within a batch."""

    def __init__(
        self, make_optimizer: MakeOptimizer = sgd, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__(make_optimizer, dtype=dtype)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int = 0) -> None:
        for optimizer in self.optimizers():
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            self.make_optimizer(self.net[:3].parameters()),
            self.make_optimizer(self.net[3:].parameters()),
        ]


def make(model: Callable[..., Net] = Net, seed: int = 1, **arguments: Any) -> Net:
    """The same initial weights at every call."""
    torch.manual_seed(seed)
    return model(**arguments)


def trainer(callbacks: list[Any] | None = None, **arguments: Any) -> L.Trainer:
    """A silent Trainer on one CPU, or whatever ``arguments`` say."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=callbacks, **{**defaults, **arguments})


def fit(
    module: Net,
    callbacks: list[Any] | None = None,
    data: DataLoader[Any] | None = None,
    val_data: DataLoader[Any] | None = None,
    ckpt_path: Any = None,
    **arguments: Any,
) -> L.Trainer:
    """Fit in silence and hand back the Trainer."""
    runner = trainer(callbacks, **arguments)
    runner.fit(
        module,
        loader(dtype=next(module.parameters()).dtype) if data is None else data,
        val_data,
        ckpt_path=ckpt_path,
    )
    return runner


def fit_batches(
    model: L.LightningModule, callbacks: list[Any], batches: Any, **arguments: Any
) -> L.Trainer:
    """`fit` for one epoch of these batches."""
    loader = DataLoader(batches, batch_size=None)
    return fit(model, callbacks, loader, **{"max_epochs": 1, **arguments})


class Calls(L.Callback):
    """Does something at the start of a batch, before or after the callbacks of the suite."""

    def __init__(self, at, action):
        self.at, self.action = at, action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            self.action(trainer, pl_module)


BEFORE_2_5 = not hasattr(training_epoch_loop, "RestartStage")
"""Before Lightning 2.5, a batch in whose last hook a checkpoint was saved is trained a second time
by the resumed run, so that it does not equal an uninterrupted one, with or without our
callbacks."""

BEFORE_2_6 = not hasattr(callbacks, "EMAWeightAveraging")
"""Before Lightning 2.6, its tuner changes the fit that follows, and its rich bar writes past
pytest's capture; with or without our callbacks."""


class SavesAt(L.Callback):
    """A checkpoint after so many steps, in the middle of an epoch or at its end."""

    def __init__(self, step, path):
        if BEFORE_2_5:
            pytest.skip("this Lightning trains the last batch before a checkpoint a second time")
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class HiddenPenalty(torch.autograd.Function):
    """Hands ``x`` through and adds ``strength * weight`` to the gradient of ``weight``: a penalty
    that no graph of the loss shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, strength: float) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.strength = strength
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return gradient, ctx.strength * weight, None


# Of its own it would be an operation without a rule; here it pretends to depend on x alone.
register_rule("HiddenPenaltyBackward", lambda operation, flows: flows[0])


class Penalized(Net):
    """From batch ``since`` on, the gradient of net.3.weight has a part along the weight that the
    graph does not show."""

    def __init__(self, since: int = 0, strength: float = 1.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.since, self.strength = since, strength

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.fit_loop.epoch_loop._batches_that_stepped < self.since:
            return loss
        penalized: Tensor = HiddenPenalty.apply(loss, self.net[3].weight, self.strength)  # type: ignore[no-untyped-call]
        return penalized


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest weight of each tensor."""
    return max(
        float((a[k] - b[k].to(a[k].dtype)).abs().max() / b[k].abs().max().clamp_min(1e-30))
        for k in a
    )


def gradients(
    module: Net,
    batches: list[Any],
    accumulate: int = 1,
    transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Any:
    """What the reference needs: gradients of the loss of step t at given weights, averaged over
    ``accumulate`` batches."""
    buffers = {name: b.clone() for name, b in module.named_buffers()}

    def at(weights: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        leaves = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
        mine = {name: b.clone() for name, b in buffers.items()}
        total: Tensor = torch.zeros((), dtype=torch.float64)
        for k in range(accumulate):
            x, y = batches[(step * accumulate + k) % len(batches)]
            total = (
                total
                + F.cross_entropy(functional_call(module, {**leaves, **mine}, (x,)), y) / accumulate
            )
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        out = dict(zip(leaves, found, strict=True))
        return out if transform is None else transform(out)

    return at


def against_paper(
    callbacks: list[Any],
    make_optimizer: MakeOptimizer,
    optimizer: Any,
    *,
    lr: float,
    steps: int = 8,
    dtype: torch.dtype = torch.float64,
    make_scheduler: Any = None,
    reference_lr: Callable[[int], float] | None = None,
    accumulate: int = 1,
    transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    targets: list[str] | None = None,
    net: Callable[[], nn.Module] = convnet,
    state: dict[str, Any] | None = None,
    rules: dict[str, Any],
    **arguments: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same training by a Trainer with our callbacks and by `reference.train`, each with its own
    gradients: both final weights."""

    def fresh() -> Net:
        torch.manual_seed(1)
        return Net(make_optimizer, net(), make_scheduler, dtype)

    module = fresh()
    fit(
        module,
        callbacks,
        accumulate_grad_batches=accumulate,
        max_steps=steps,
        max_epochs=-1,
        **arguments,
    )
    other = fresh()
    expected = reference.train(
        weights_of(other),
        gradients(other, list(loader(dtype=dtype)), accumulate, transform),
        optimizer,
        lr=lr if reference_lr is None else reference_lr,
        steps=steps,
        targets=TARGETS if targets is None else targets,
        state=state,
        **rules,
    )[-1]
    return weights_of(module), expected


def clip_by_value(limit: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda grads: {name: g.clamp(-limit, limit) for name, g in grads.items()}


def clip_by_norm(limit: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def clip(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        total = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        return {
            name: g * min(1.0, limit / (float(total) + 1e-6)) for name, g in grads.items()
        }  # torch's 1e-6

    return clip
