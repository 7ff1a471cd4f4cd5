"""The callbacks with what the reference calls the same, every mode of training, and what tests
compare of two fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import reference
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loggers import Logger
from models import (
    TARGETS,
    ManualNet,
    Net,
    convnet,
    distance,
    fit,
    images,
    make,
    same,
    weights_of,
)
from reference import Brake, Decay, Drop, Project, Rescale, Rotate, Shrink
from replay import Recorder, replay
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    LRDropRescaling,
    NormDynamicsMonitor,
    RadialBrake,
    RadialProjection,
    RotationControl,
    WeightDecay,
    WeightRescaling,
)

# torch's optimizer, the reference's, and a learning rate; all with a decay that a callback has to
# take over or to leave.
DECAYING_OPTIMIZERS: dict[str, tuple[Any, Any, float]] = {
    "sgd": (
        lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
        reference.SGD(weight_decay=0.1),
        0.1,
    ),
    "momentum": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        reference.SGD(0.9, weight_decay=0.1),
        0.1,
    ),
    "nesterov": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        reference.SGD(0.9, nesterov=True, weight_decay=0.1),
        0.1,
    ),
    "adam": (
        lambda p: torch.optim.Adam(p, 0.02, weight_decay=0.1),
        reference.Adam(weight_decay=0.1),
        0.02,
    ),
    "adamw": (
        lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1),
        reference.AdamW(weight_decay=0.1),
        0.02,
    ),
}

EVERY_MATRIX = [*TARGETS, "net.8.weight"]


@dataclass
class Case:
    """Callbacks, and what the reference calls the same."""

    callbacks: Callable[[], list[Any]]
    rules: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = field(default_factory=lambda: TARGETS)
    make_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None  # instead of a mode's own


def dropping(optimizer: torch.optim.Optimizer) -> Any:
    """Two drops, of 10 and of 5."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 if step < 2 else 0.1 if step < 4 else 0.02
    )


CASES = {
    "aws": Case(lambda: [AdaptiveWeightShrink(0.5)], {"shrink": Shrink(0.5)}),
    "aws-std": Case(
        lambda: [AdaptiveWeightShrink(0.5, statistic="std")],
        {"shrink": Shrink(0.5, statistic="std")},
    ),
    "aws-keep": Case(
        lambda: [AdaptiveWeightShrink(0.5, weight_decay="keep")],
        {"shrink": Shrink(0.5, weight_decay="keep")},
    ),
    "wrs": Case(lambda: [WeightRescaling(3)], {"rescale": Rescale(3)}),
    "wrs-keep": Case(
        lambda: [
            WeightRescaling(2, target_norm="initial", optimizer_state="keep", weight_decay="keep")
        ],
        {"rescale": Rescale(2, target="initial", rescale_state=False, weight_decay="keep")},
    ),
    "projection": Case(lambda: [RadialProjection()], {"project": Project()}),
    "projection-cosine": Case(
        lambda: [RadialProjection(gate="cosine")], {"project": Project("cosine")}, EVERY_MATRIX
    ),
    "lr-drop": Case(
        lambda: [LRDropRescaling(exponent=0.3)], {"drop": Drop(0.3)}, make_scheduler=dropping
    ),
    "decay-corrected": Case(
        lambda: [WeightDecay(0.8, rate="lr_squared")], {"decay_rule": Decay(0.8, "lr_squared")}
    ),
    "decay-cautious": Case(
        lambda: [WeightDecay(0.8, cautious=True)],
        {"decay_rule": Decay(0.8, cautious=True)},
        EVERY_MATRIX,
    ),
    "rotation": Case(lambda: [RotationControl(0.05)], {"rotate": Rotate(0.05)}),
    "rotation-floor": Case(
        lambda: [
            RotationControl(0.1, bound="at_least", norm="free", granularity="filter"),
            RadialBrake(0.25, 0.5),
        ],
        {"rotate": Rotate(0.1, "at_least", hold=False, view="filter"), "brake": Brake(0.25, 0.5)},
    ),
    "rotation-smooth": Case(
        lambda: [RotationControl(0.01, smoothing=0.9, norm="free", weight_decay="keep")],
        {"rotate": Rotate(0.01, smoothing=0.9, hold=False, weight_decay="keep")},
    ),
    "brake": Case(lambda: [RadialBrake(0.0, 0.5)], {"brake": Brake(0.0, 0.5)}),
    "monitor": Case(lambda: [NormDynamicsMonitor(1, tables=False)]),
    "all": Case(
        lambda: [
            AdaptiveWeightShrink(0.5),
            RadialProjection(),
            WeightRescaling(3),
            NormDynamicsMonitor(1, tables=False),
        ],
        {"shrink": Shrink(0.5), "project": Project(), "rescale": Rescale(3)},
    ),
}


# What steers single steps is refused on weights of 16 bits, and is slow to go through all modes.
STEERING = ("rotation", "rotation-floor", "rotation-smooth", "brake")
ALL_CASES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in STEERING else []) for name in CASES
]


def sgd(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, **options}
    )


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **{"lr": 0.02, "weight_decay": 0.5, **options})


def in_groups(parameters: Any) -> torch.optim.Optimizer:
    """The second convolution slower and less decayed, in a group of its own with its bias-like
    neighbours."""
    first, second, *rest = (p for p in parameters if p.ndim > 1)
    return sgd(
        [
            {"params": [first, *rest]},
            {"params": [second], "lr": 0.05, "weight_decay": 0.02, "momentum": 0.5},
        ]
    )


def interleaved(parameters: Any) -> torch.optim.Optimizer:
    """Targets and others in one group, in an order that is not the module's."""
    parameters = list(parameters)
    return adamw([{"params": parameters[::-2]}, {"params": parameters[-2::-2], "lr": 0.01}])


def falling(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)


class TwoLosses(Net):
    """Uses its second convolution in every other batch only; in between its gradient is None."""

    def forward(self, x):
        x = self.net[:3](x)
        x = x[:, [0, 1, 2, 3, 0, 1]] if self.trainer.global_step % 2 else self.net[3:6](x)
        return self.net[6:](x)


class AddsGroup(L.Callback):
    """Gives the second convolution to the optimizer at step 3."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            trainer.optimizers[0].add_param_group({"params": [pl_module.net[3].weight], "lr": 0.03})


class Unfreezes(BaseFinetuning):
    """Lightning's own way of finetuning: the first convolution joins in epoch 1."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05)


def without_second(parameters: Any) -> torch.optim.Optimizer:
    parameters = list(parameters)
    return sgd([p for p in parameters if tuple(p.shape) != (6, 4, 3, 3)])


def trainable(parameters: Any) -> torch.optim.Optimizer:
    return sgd([p for p in parameters if p.requires_grad])


def compiled() -> nn.Sequential:
    """The convolutions inside a compiled submodule: their names get ``_orig_mod``."""
    net = convnet()
    return nn.Sequential(*[torch.compile(net[:6], backend="eager"), *net[6:]])


MODES: dict[str, dict[str, Any]] = {
    "sgd": {"make_optimizer": sgd},
    "sgd plain": {"make_optimizer": lambda p: sgd(p, momentum=0.0)},
    "nesterov": {"make_optimizer": lambda p: sgd(p, nesterov=True)},
    "dampening": {"make_optimizer": lambda p: sgd(p, dampening=0.5)},
    "adamw": {"make_optimizer": adamw},
    "no decay": {"make_optimizer": lambda p: adamw(p, weight_decay=0.0)},
    "fused": {"make_optimizer": lambda p: adamw(p, fused=True)},
    "fused sgd": {"make_optimizer": lambda p: sgd(p, fused=True)},
    "foreach": {"make_optimizer": lambda p: adamw(p, foreach=True)},
    "not foreach": {"make_optimizer": lambda p: adamw(p, foreach=False)},
    "maximize": {"make_optimizer": lambda p: sgd(p, maximize=True)},
    "tensor lr": {
        "make_optimizer": lambda p: adamw(
            p, lr=torch.tensor(0.02, dtype=torch.float64), foreach=False
        ),
        "make_scheduler": falling,
    },
    "schedule": {"make_optimizer": sgd, "make_scheduler": falling},
    "accumulation": {"make_optimizer": sgd, "accumulate_grad_batches": 2, "max_epochs": 3},
    "norm clipping": {"make_optimizer": sgd, "gradient_clip_val": 0.1},
    "value clipping": {
        "make_optimizer": adamw,
        "gradient_clip_val": 0.01,
        "gradient_clip_algorithm": "value",
    },
    "param groups": {"make_optimizer": in_groups, "make_scheduler": falling},
    "interleaved groups": {"make_optimizer": interleaved},
    "added group": {"make_optimizer": without_second, "extra": [AddsGroup]},
    "finetuning": {"make_optimizer": trainable, "extra": [Unfreezes]},
    "manual": {"model": ManualNet, "make_optimizer": sgd},
    "unused branch": {"model": TwoLosses, "make_optimizer": sgd},
    "conv bias": {"net": lambda: convnet(bias=True), "make_optimizer": sgd},
    "32-true": {"make_optimizer": sgd, "dtype": torch.float32},
    "bf16-mixed": {"make_optimizer": adamw, "dtype": torch.float32, "precision": "bf16-mixed"},
    "fast_dev_run": {"make_optimizer": sgd, "fast_dev_run": 4},
    "max_steps": {"make_optimizer": sgd, "max_steps": 5},
    "limited": {"make_optimizer": sgd, "limit_train_batches": 3},
}


def goes_with(case: str, mode: str) -> bool:
    """Whether a case can be run in a mode. One with a schedule cannot where nobody steps a
    scheduler, nor where torch's own does not bear a group that comes later."""
    if CASES[case].make_scheduler is None:
        return True
    return MODES[mode].get("model") is not ManualNet and "extra" not in MODES[mode]


def run(callbacks: list[Any], mode: dict[str, Any], **overrides: Any) -> tuple[Net, Recorder]:
    """Train the small network in this mode."""
    mode = {**mode, **overrides}
    model, dtype = mode.pop("model", Net), mode.pop("dtype", torch.float64)
    settings = {key: mode.pop(key) for key in ("make_optimizer", "make_scheduler") if key in mode}
    if "net" in mode:
        torch.manual_seed(1)
        settings["net"] = mode.pop("net")()
    extra = [make_callback() for make_callback in mode.pop("extra", [])]
    module, recorder = make(model, dtype=dtype, **settings), Recorder()
    fit(module, [*extra, recorder, *callbacks], **mode)
    return module, recorder


def check(module: Net, recorder: Recorder, case: Case, tolerance: float = 1e-12) -> None:
    """The run ended where the reference ends on the same gradients, and the callback made a
    difference."""
    got = weights_of(module)
    assert distance(got, replay(recorder, case.targets, **case.rules)) <= tolerance
    if case.rules:
        assert distance(got, replay(recorder, [])) > 1e-3


def identical(a: Any, b: Any) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


class ByStep(Net):
    """Takes its batch by the step that it is at, so that a resumed run sees what the uninterrupted
    one saw."""

    def training_step(self, batch, batch_idx=0):
        rows = slice(8 * (self.trainer.global_step % 4), 8 * (self.trainer.global_step % 4) + 8)
        return super().training_step([t[rows] for t in images().tensors])


def optimizer_state(trainer: L.Trainer) -> list[dict[str, Any]]:
    return [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]


def everything(module: Net, trainer: L.Trainer, callbacks: list[Any]) -> list[Any]:
    """All that a resumed run has to have in common with the uninterrupted one."""
    return [
        dict(module.state_dict()),
        optimizer_state(trainer),
        {c.state_key: c.state_dict() for c in callbacks if not isinstance(c, NormDynamicsMonitor)},
    ]


def hooks(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


class Remembers(Net):
    """Keeps its optimizers, and what their param groups were when they were made."""

    fails_at = -1

    def configure_optimizers(self):
        made = super().configure_optimizers()
        self.made = [made] if isinstance(made, torch.optim.Optimizer) else made
        self.groups = [
            [(id(g), g["weight_decay"], [id(p) for p in g["params"]]) for g in o.param_groups]
            for o in self.made
        ]
        return made

    def training_step(self, batch, batch_idx=0):
        if self.trainer.global_step == self.fails_at:
            raise RuntimeError("the training step fails")
        return super().training_step(batch, batch_idx)

    def as_made(self) -> bool:
        now = [
            [(id(g), g["weight_decay"], [id(p) for p in g["params"]]) for g in o.param_groups]
            for o in self.made
        ]
        forward_hooks = sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.modules()
        )
        return now == self.groups and sum(map(hooks, self.made)) == 0 and forward_hooks == 0


class KeepsRows(Logger):
    """A logger that does not look at its rank."""

    name, version = "rows", "0"

    def __init__(self):
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


# ---- The callbacks as tests of their common base build them ----

WRITERS = {
    "aws": lambda **common: AdaptiveWeightShrink(0.5, **common),
    "wrs": lambda **common: WeightRescaling(2, **common),
    "projection": lambda **common: RadialProjection(**common),
}
EVERYBODY = {**WRITERS, "monitor": lambda **common: NormDynamicsMonitor(1, tables=False, **common)}


def targets_of(callback):
    return [t.name for _, plan in sorted(callback.plans.items()) for t in plan.targets]


def refused(module, callbacks, error, says, **arguments):
    """The fit raises this, and no weight has been touched."""
    before = weights_of(module)
    with pytest.raises(error, match=says):
        fit(module, callbacks, **arguments)
    assert same(weights_of(module), before)
