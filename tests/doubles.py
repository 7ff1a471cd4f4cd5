"""Small doubles of public optimizers that torch does not have; after their structure, not their
code."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer


class Plain(Optimizer):
    """w <- (1 - lr λ) w - lr g; subclasses say what else."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, params: Any, lr: Any = 0.1, weight_decay: Any = 0.0, **options: Any) -> None:
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, **self.options, **options}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.before_update()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, group, self.state[p])
        return loss

    def before_update(self) -> None:
        """Once per step."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(g, alpha=group["lr"])


class Options(Plain):
    """Decoupled, coupled or fixed decay, as pytorch_optimizer's options have it."""

    options: ClassVar[dict[str, Any]] = {
        "weight_decouple": True,
        "fixed_decay": False,
        "momentum": 0.9,
    }

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        group["step"] = group.get("step", 0) + 1
        if not group["weight_decouple"]:
            g = g.add(p, alpha=group["weight_decay"])
        else:
            p.mul_(1 - (1.0 if group["fixed_decay"] else group["lr"]) * group["weight_decay"])
        buffer = state.setdefault("buffer", torch.zeros_like(p))
        p.sub_(buffer.mul_(group["momentum"]).add_(g), alpha=group["lr"])


class ListPerGroup(Plain):
    """Keeps a number for each group in a list of its own (AdaBound)."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.base_lrs = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - self.base_lrs[i] * group["weight_decay"]).sub_(
                        p.grad, alpha=self.base_lrs[i]
                    )


class CachesDecay(Plain):
    """Reads its weight decay once, in ``__init__``."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.decay = self.param_groups[0]["weight_decay"]

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * self.decay).sub_(g, alpha=group["lr"])


class ByNumber(Plain):
    """Decays by the group's place among the groups, whatever the group says."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        p.mul_(1 - group["lr"] * group["weight_decay"] * (1 + number)).sub_(g, alpha=group["lr"])


class MatricesOnly(Plain):
    """Refuses vectors (Muon)."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if p.dim() < 2:
            raise ValueError("matrices only")
        super().update(p, g, group, state)


class Noisy(Plain):
    """Draws numbers, counts on the class and sets the default dtype: a trial must leave no trace of
    that."""

    steps: ClassVar[int] = 0
    seen: ClassVar[list[int]] = []

    def before_update(self) -> None:
        Noisy.steps += 1
        self.seen.append(1)
        torch.set_default_dtype(torch.float64)
        torch.rand(3)


class LoggingSGD(SGD):
    """Wraps the step and does nothing else."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class ClippingSGD(SGD):
    """Looks like `LoggingSGD`, but clips long gradients."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 5.0)
        return super().step(closure)


class SlowCopy(AdamW):
    """AdamW that goes back half of the way to a slow copy every sixth step (Ranger); the copy
    appears in its first step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "slow_buffer" not in state:
                    state["slow_buffer"], state["visits"] = p.clone(), 0
                state["visits"] += 1
                if state["visits"] % 6 == 0:
                    p.copy_(state["slow_buffer"].lerp_(p, 0.5))
        return loss


class ScheduleFree(Plain):
    """Trains at a point between an average and a fast weight; leaves no telling names in groups or
    state."""

    def train(self) -> None:
        """Back to the training point."""

    def eval(self) -> None:
        """To the average."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state["fast"], state["mean"], state["n"] = p.clone(), p.clone(), 0
        state["n"] += 1
        state["fast"].sub_(g, alpha=group["lr"])
        state["mean"].lerp_(state["fast"], 1 / state["n"])
        p.copy_(state["fast"].lerp(state["mean"], 0.9))


class HasModes(Plain):
    """Has modes for training and evaluation and an average of its weights, but steps as anybody
    (SPlus)."""

    options: ClassVar[dict[str, Any]] = {"train_mode": True}

    def train(self) -> None:
        """Back to the trained weights."""

    def eval(self) -> None:
        """To their average."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        super().update(p, g, group, state)
        state.setdefault("ema", p.clone()).lerp_(p, 0.1)


class DualAveraging(Plain):
    """Computes each weight anew from sums of its gradients (FTRL, MADGRAD); its sum is called "z",
    and it counts in ``state``."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.state["k"] = torch.tensor(0)

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state["start"], state["z"] = p.clone(), torch.zeros_like(p)
        p.copy_(state["start"] - group["lr"] * state["z"].add_(g))


class Counting(Plain):
    """Keeps numbers of its own in ``state`` (SPAM)."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.state["total_step"] = 0

    def before_update(self) -> None:
        self.state["total_step"] += 1


class Prodigy(Plain):
    """Adapts its rate: d·lr with an estimate d that each step moves on; decoupled decay at that
    rate."""

    options: ClassVar[dict[str, Any]] = {"d": 1e-2, "d0": 1e-2, "d_coef": 1.0}

    def before_update(self) -> None:
        self.rate = self.param_groups[0]["d"] * self.param_groups[0]["lr"]

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.mul_(1 - self.rate * group["weight_decay"]).sub_(g, alpha=self.rate)
        group["d"] = 1.25 * self.rate / group["lr"]


class RelativeStep(Plain):
    """Adafactor's rate: no learning rate, but 1/√t, scaled by the RMS of the weight."""

    options: ClassVar[dict[str, Any]] = {
        "relative_step": True,
        "scale_parameter": True,
        "warmup_init": False,
        "eps": (1e-30, 1e-3),
    }

    def __init__(self, params: Any, lr: Any = None, **options: Any) -> None:
        super().__init__(params, lr, **options)

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        state["step"] = state.get("step", 0) + 1
        rate = min(1e-2, 1 / math.sqrt(state["step"]))
        if group["scale_parameter"]:
            rate *= max(group["eps"][1], float(p.norm()) / math.sqrt(p.numel()))
        state["rate"] = rate
        p.mul_(1 - rate * group["weight_decay"]).sub_(g, alpha=rate)


class NoRate(Optimizer):
    """Its step has no learning rate (A2Grad), or one that the loss decides (AliG)."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.01)
        return loss


class OwnWarmup(Plain):
    """Warms up inside of its step, in attributes that only it understands (Ranger21)."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.num_warmup_iterations, self.done = 8, 0

    def before_update(self) -> None:
        self.done += 1

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        rate = group["lr"] * min(1.0, self.done / self.num_warmup_iterations)
        p.mul_(1 - rate * group["weight_decay"]).sub_(g, alpha=rate)


class WarmsUpSomethingElse(OwnWarmup):
    """The same attributes, and a plain rate (AdaGC)."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        Plain.update(self, p, g, group, state)


class Lion(Plain):
    """A third party's Lion, with options that change its decay."""

    options: ClassVar[dict[str, Any]] = {
        "betas": (0.9, 0.99),
        "weight_decouple": True,
        "fixed_decay": False,
    }

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        average = state.setdefault("exp_avg", torch.zeros_like(p))
        p.mul_(1 - (1.0 if group["fixed_decay"] else group["lr"]) * group["weight_decay"])
        p.sub_(
            (average * group["betas"][0] + g * (1 - group["betas"][0])).sign(), alpha=group["lr"]
        )
        average.lerp_(g, 1 - group["betas"][1])


class WantsClosure(Plain):
    """Cannot step without a closure (AliG)."""

    def step(self, closure: Any = None) -> Any:
        if closure is None:
            raise RuntimeError("a closure, please")
        return super().step(closure)
