"""Training without weight decay on the trajectory of directions that weight decay would give, step
by step."""

import copy
import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

from lightning_normdyn.errors import NormDynError, NotSupportedError
from lightning_normdyn.lr_schedules import WeightDecayEquivalentLR, weight_decay_equivalent_lrs

DECAY = 0.02


def normalized(weight: Tensor) -> Tensor:
    return weight / weight.norm(dim=1, keepdim=True)


def standardized(weight: Tensor) -> Tensor:
    centered = weight - weight.mean(1, keepdim=True)
    return centered / centered.square().mean(1, keepdim=True).sqrt() / math.sqrt(weight.shape[1])


class Net(nn.Module):
    """Two layers whose weights count by direction only."""

    def __init__(self, reparametrization: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(16, 8, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(3, 16, dtype=torch.float64))
        self.reparametrization = reparametrization

    def forward(self, x: Tensor) -> Tensor:
        return (
            3
            * torch.tanh(2 * x @ self.reparametrization(self.first).T)
            @ self.reparametrization(self.second).T
        )

    def directions(self) -> list[Tensor]:
        return [self.reparametrization(weight.detach()) for weight in (self.first, self.second)]


class BatchNormNet(nn.Module):
    """Two layers, each in front of a BatchNorm without parameters of its own."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16, bias=False)
        self.second = nn.Linear(16, 3, bias=False)
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width, eps=eps, affine=False) for width in (16, 3)
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[1](self.second(torch.tanh(self.norms[0](self.first(x)))))

    def directions(self) -> list[Tensor]:
        return [normalized(layer.weight.detach()) for layer in (self.first, self.second)]


def step_at_300(optimizer: SGD) -> schedules.LRScheduler:
    return schedules.MultiStepLR(optimizer, [300], gamma=0.1)


def trajectories(
    net: nn.Module,
    *,
    steps: int = 500,
    lr: float = 0.1,
    decay: float = DECAY,
    schedule: Callable[[SGD], schedules.LRScheduler] | None = step_at_300,
    **hyper: float,
) -> float:
    """Largest difference of the directions of a run with decay and its decay-free equivalent, over
    all steps."""
    data = torch.Generator().manual_seed(1)
    inputs = torch.randn(steps, 24, 8, generator=data, dtype=torch.float64)
    labels = (inputs @ torch.randn(8, 3, generator=data, dtype=torch.float64)).argmax(2)
    nets = net, copy.deepcopy(net)
    lr *= 1 - hyper.get("momentum", 0.0)
    decayed = SGD(nets[0].parameters(), lr=lr, weight_decay=decay, **hyper)
    free = SGD(nets[1].parameters(), lr=lr, **hyper)
    schedule_of = [schedule(decayed)] if schedule else []
    schedule_of.append(
        WeightDecayEquivalentLR(free, decay, inner=schedule(free) if schedule else None)
    )
    worst = 0.0
    for x, y in zip(inputs, labels, strict=True):
        for model, optimizer in zip(nets, (decayed, free), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        for scheduler in schedule_of:
            scheduler.step()
        pairs = zip(nets[0].directions(), nets[1].directions(), strict=True)
        worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
    return worst


HYPER = [
    {},
    {"momentum": 0.5},
    {"momentum": 0.9},
    {"momentum": 0.5, "dampening": 0.5},
    {"momentum": 0.9, "dampening": 0.3},
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("hyper", HYPER, ids=str)
@pytest.mark.parametrize("reparametrization", [normalized, standardized])
def test_directions_are_those_of_weight_decay(
    reparametrization: Callable[[Tensor], Tensor], hyper: dict[str, float]
) -> None:
    torch.manual_seed(0)
    assert trajectories(Net(reparametrization), **hyper) < 1e-12


@pytest.mark.sampled(1)
@pytest.mark.parametrize("hyper", HYPER[:3], ids=str)
def test_directions_behind_batch_norm_agree_as_far_as_eps_is_small(hyper: dict[str, float]) -> None:
    torch.manual_seed(0)
    net = BatchNormNet(eps=1e-12)
    assert trajectories(copy.deepcopy(net), **hyper) < 1e-9
    for norm in net.norms:
        norm.eps = 1e-5
    assert trajectories(net, **hyper) > 1e-7


INNER = {
    "constant": None,
    "cosine": lambda optimizer: schedules.CosineAnnealingLR(optimizer, 100, eta_min=1e-3),
    "warm-up, then exponential": lambda optimizer: schedules.SequentialLR(
        optimizer,
        [
            schedules.LinearLR(optimizer, 0.1, total_iters=20),
            schedules.ExponentialLR(optimizer, 0.98),
        ],
        milestones=[20],
    ),
    "lambda, through 0": lambda optimizer: schedules.LambdaLR(
        optimizer, lambda step: abs(math.cos(step * math.pi / 20))
    ),
    "chained": lambda optimizer: schedules.ChainedScheduler(
        [
            schedules.StepLR(optimizer, 30, gamma=0.5),
            schedules.LinearLR(optimizer, 0.5, total_iters=10),
        ]
    ),
    "one cycle, which moves the momentum too": lambda optimizer: schedules.OneCycleLR(
        optimizer, 0.1, total_steps=101, base_momentum=0.6, max_momentum=0.9
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", INNER)
def test_any_inner_schedule(name: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's SequentialLR warns about itself
        assert trajectories(Net(normalized), steps=100, momentum=0.8, schedule=INNER[name]) < 1e-12


def test_without_the_schedule_directions_differ() -> None:
    torch.manual_seed(0)
    net = Net(normalized)
    free = copy.deepcopy(net)
    for model, decay in ((net, DECAY), (free, 0.0)):
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=decay)
        data = torch.Generator().manual_seed(1)
        for _ in range(200):
            optimizer.zero_grad()
            x = torch.randn(24, 8, generator=data, dtype=torch.float64)
            F.cross_entropy(model(x), torch.randint(0, 3, (24,), generator=data)).backward()
            optimizer.step()
    assert (net.directions()[0] - free.directions()[0]).abs().max() > 1e-3


# --- a real scheduler
# --------------------------------------------------------------------------------------------------


def weight_and_optimizer(**hyper: float) -> tuple[nn.Parameter, SGD]:
    weight = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    weight.grad = torch.zeros_like(weight)
    return weight, SGD([weight], lr=0.1, **hyper)


def lrs_over(steps: int, optimizer: SGD, scheduler: WeightDecayEquivalentLR) -> list[float]:
    lrs = []
    for _ in range(steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs


def test_a_constant_learning_rate_rises_exponentially() -> None:
    _, optimizer = weight_and_optimizer()
    lrs = lrs_over(50, optimizer, WeightDecayEquivalentLR(optimizer, 0.5))
    assert lrs == pytest.approx(
        [0.1 * 0.95 ** -(2 * step + 1) for step in range(50)], rel=1e-13
    )  # AWS paper, d_q at constant lr
    assert lrs == pytest.approx(weight_decay_equivalent_lrs([0.1] * 50, 0.5), rel=1e-15)


def test_known_ahead_is_what_the_schedule_gives() -> None:
    _, optimizer = weight_and_optimizer(momentum=0.8, dampening=0.3)
    inner = schedules.StepLR(optimizer, 7, gamma=0.3)
    lrs = lrs_over(30, optimizer, WeightDecayEquivalentLR(optimizer, 0.1, inner=inner))
    ahead = weight_decay_equivalent_lrs(
        [0.1 * 0.3 ** (step // 7) for step in range(30)], 0.1, momentum=0.8, dampening=0.3
    )
    assert lrs == pytest.approx(ahead, rel=1e-12)


@pytest.mark.parametrize("inner", [None, "step"])
def test_resume_goes_on_as_if_uninterrupted(inner: str | None, tmp_path: Path) -> None:
    def build() -> tuple[SGD, WeightDecayEquivalentLR]:
        _, optimizer = weight_and_optimizer(momentum=0.8)
        return optimizer, WeightDecayEquivalentLR(
            optimizer, 0.1, inner=schedules.StepLR(optimizer, 7, gamma=0.3) if inner else None
        )

    whole = lrs_over(30, *build())
    optimizer, scheduler = build()
    lrs_over(13, optimizer, scheduler)
    torch.save(
        {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()},
        tmp_path / "checkpoint.pt",
    )
    optimizer, scheduler = build()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    assert lrs_over(17, optimizer, scheduler) == whole[13:]
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]


def test_a_state_of_another_shape_is_refused() -> None:
    _, optimizer = weight_and_optimizer()
    with_inner = WeightDecayEquivalentLR(optimizer, 0.1, inner=schedules.StepLR(optimizer, 7))
    _, optimizer = weight_and_optimizer()
    without = WeightDecayEquivalentLR(optimizer, 0.1)
    with pytest.raises(NormDynError, match="saved with an inner schedule was given to one without"):
        without.load_state_dict(with_inner.state_dict())
    with pytest.raises(NormDynError, match="saved without an inner schedule was given to one with"):
        with_inner.load_state_dict(without.state_dict())


def test_a_tensor_learning_rate_stays_the_same_tensor() -> None:
    weight, _ = weight_and_optimizer()
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer = SGD([weight], lr=lr)
    scheduler = WeightDecayEquivalentLR(
        optimizer, 0.5, inner=schedules.ExponentialLR(optimizer, 0.9)
    )
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(weight_decay_equivalent_lrs([0.1, 0.09], 0.5)[1], rel=1e-12)


def test_a_skipped_step_moves_the_inner_schedule_only() -> None:
    _, optimizer = weight_and_optimizer()
    scheduler = WeightDecayEquivalentLR(
        optimizer, 0.5, inner=schedules.ExponentialLR(optimizer, 0.9)
    )
    optimizer.step()
    scheduler.step()
    scheduler.step()  # the gradient scaler found an infinity: no optimizer step
    assert optimizer.param_groups[0]["lr"] == pytest.approx(
        0.081 / 0.95 / (0.95 * (1 - 0.5 * 0.081)), rel=1e-12
    )


def test_a_group_without_decay_follows_the_inner_schedule() -> None:
    weight, _ = weight_and_optimizer()
    bias = nn.Parameter(torch.zeros(3))
    optimizer = SGD(
        [{"params": [weight]}, {"params": [bias], "weight_decay": 1e-4, "nesterov": True}],
        lr=0.1,
        momentum=0.5,
    )
    scheduler = WeightDecayEquivalentLR(
        optimizer, [0.5, 0.0], inner=schedules.ExponentialLR(optimizer, 0.9)
    )
    bias.grad = torch.ones(3)
    for step in range(5):
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1 * 0.9**step)
        assert optimizer.param_groups[0]["lr"] > 1.04 * 0.1 * 0.9**step
        optimizer.step()
        scheduler.step()


# --- what is refused
# --------------------------------------------------------------------------------------------------


class OtherStep(SGD):
    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.99)
        return loss


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop, OtherStep])
def test_other_optimizers_are_refused(optimizer: type) -> None:
    with pytest.raises(NotSupportedError, match=f"asked for {optimizer.__name__}, but .*SGD only"):
        WeightDecayEquivalentLR(optimizer([nn.Parameter(torch.ones(2, 2))], lr=0.1), 0.1)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"momentum": 0.9, "nesterov": True}, "group 0 with nesterov=True"),
        ({"weight_decay": 1e-4}, "group 0 has weight_decay=0.0001 as well"),
        ({"momentum": 0.9}, r"not positive after step \d+: .* < .* = 0.00263"),
    ],
)
def test_settings_are_refused_by_name(hyper: dict[str, float], message: str) -> None:
    _, optimizer = weight_and_optimizer(**hyper)
    with pytest.raises(NotSupportedError, match=message):
        WeightDecayEquivalentLR(optimizer, 0.05)


def test_a_group_that_mixes_weights_with_others_is_refused() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(NotSupportedError, match=r"group 0, which mixes .*\(parameter 1 \[2\]\)"):
        WeightDecayEquivalentLR(SGD(layer.parameters(), lr=0.1), 0.1)
    with pytest.raises(NotSupportedError, match=r"group 0, which mixes .*\(bias \[2\]\)"):
        WeightDecayEquivalentLR(SGD(layer.named_parameters(), lr=0.1), 0.1)


def test_inner_schedules_that_cannot_be_followed_are_refused() -> None:
    _, optimizer = weight_and_optimizer()
    with pytest.raises(NotSupportedError, match="got ReduceLROnPlateau"):
        WeightDecayEquivalentLR(optimizer, 0.1, inner=schedules.ReduceLROnPlateau(optimizer))
    with pytest.raises(NotSupportedError, match="got WeightDecayEquivalentLR"):
        WeightDecayEquivalentLR(optimizer, 0.1, inner=WeightDecayEquivalentLR(optimizer, 0.1))
    with pytest.raises(NormDynError, match="another optimizer"):
        WeightDecayEquivalentLR(
            optimizer, 0.1, inner=schedules.StepLR(weight_and_optimizer()[1], 3)
        )


@pytest.mark.parametrize("decay", [0.0, -1.0, math.inf, [0.1, 0.1], [0.0]])
def test_weight_decay_is_checked(decay: float | list[float]) -> None:
    with pytest.raises(NormDynError, match="`weight_decay` must be"):
        WeightDecayEquivalentLR(weight_and_optimizer()[1], decay)


def test_a_schedule_that_turns_weights_around_is_refused_where_it_does() -> None:
    _, optimizer = weight_and_optimizer()
    inner = schedules.LambdaLR(optimizer, lambda step: 1.0 if step < 5 else 30.0)
    scheduler = WeightDecayEquivalentLR(optimizer, 0.5, inner=inner)
    lrs_over(4, optimizer, scheduler)
    optimizer.step()
    with pytest.raises(NotSupportedError, match="not positive after step 5"):
        scheduler.step()


def test_an_overflow_is_refused() -> None:
    with pytest.raises(NotSupportedError, match="overflows at step"):
        weight_decay_equivalent_lrs([0.5] * 2000, 1.0)


def test_a_schedule_stepped_once_per_epoch_is_refused() -> None:
    _, optimizer = weight_and_optimizer()
    scheduler = WeightDecayEquivalentLR(optimizer, 0.1)
    optimizer.step()
    optimizer.step()
    with pytest.raises(NormDynError, match="after every optimizer step, but 2 were taken"):
        scheduler.step()


def test_epochs_and_late_groups_are_refused() -> None:
    _, optimizer = weight_and_optimizer()
    scheduler = WeightDecayEquivalentLR(optimizer, 0.1)
    with pytest.raises(NormDynError, match="epoch=3"):
        scheduler.step(3)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    with pytest.raises(
        NotSupportedError, match="made for 1 param groups, but the optimizer now has 2"
    ):
        scheduler.step()


# --- under Lightning
# --------------------------------------------------------------------------------------------------


class Module(L.LightningModule):
    """A `Net` on fixed batches; what is asked of the optimizer comes from outside."""

    def __init__(self, decay: float, equivalent: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.decay, self.equivalent = Net(normalized), decay, equivalent

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = SGD(
            self.parameters(),
            lr=0.1,
            momentum=0.5,
            weight_decay=0.0 if self.equivalent else self.decay,
        )
        scheduler = schedules.MultiStepLR(optimizer, [6], gamma=0.1)
        if self.equivalent:
            scheduler = WeightDecayEquivalentLR(optimizer, self.decay, inner=scheduler)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def fit(module: Module, folder: Path, epochs: int, resume_from: Path | None = None) -> L.Trainer:
    data = torch.Generator().manual_seed(1)
    inputs = torch.randn(16, 8, generator=data, dtype=torch.float64)
    loader = DataLoader(
        TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=2
    )  # 8 batches, 4 optimizer steps an epoch
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    options = {
        "accumulate_grad_batches": 2,
        "accelerator": "cpu",
        "precision": "64-true",
        "default_root_dir": folder,
        **quiet,
    }
    trainer = L.Trainer(max_epochs=epochs, **options)
    trainer.fit(module, loader, ckpt_path=resume_from)
    return trainer


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")  # Lightning has advice about workers
def test_a_fit_with_accumulation_and_resume_follows_the_decayed_one(tmp_path: Path) -> None:
    decayed, equivalent, resumed = Module(0.2, False), Module(0.2, True), Module(0.2, True)
    fit(decayed, tmp_path, 3)
    fit(equivalent, tmp_path, 1).save_checkpoint(tmp_path / "first.ckpt")
    assert fit(resumed, tmp_path, 3, resume_from=tmp_path / "first.ckpt").global_step == 12
    for a, b in zip(decayed.net.directions(), resumed.net.directions(), strict=True):
        assert (a - b).abs().max() < 1e-12
    shrunk = decayed.net.first.detach().norm() / resumed.net.first.detach().norm()
    assert shrunk < 0.95  # the decay was there, and only in the length


@pytest.mark.parametrize("form", [np.float32, Fraction])
def test_learning_rates_and_decays_in_every_form(form):
    def rates(number):
        optimizer = torch.optim.SGD(
            [nn.Parameter(torch.ones(3, 4))], lr=number(0.125), momentum=0.5
        )
        schedule = WeightDecayEquivalentLR(optimizer, number(0.25))
        for _ in range(3):
            optimizer.step()
            schedule.step()
        return schedule.get_last_lr()

    assert rates(form) == pytest.approx(rates(float))
