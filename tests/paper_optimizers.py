"""Optimizers that torch does not have, written from their papers."""

from typing import Any

import torch
from torch import Tensor


def tangential(update: Tensor, weight: Tensor) -> Tensor:
    return update - weight * (
        (update * weight).sum(1, keepdim=True) / weight.square().sum(1, keepdim=True)
    )


class SGDP(torch.optim.Optimizer):
    """AdamP slides, Algorithm 1, with the gate open."""

    def __init__(
        self,
        params,
        lr,
        momentum=0.0,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        delta=0.1,
        wd_ratio=0.1,
    ):
        super().__init__(
            params, {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for w in group["params"]:
                buffer = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
                buffer.mul_(group["momentum"]).add_(w.grad, alpha=1 - group["dampening"])
                step = w.grad + group["momentum"] * buffer if group["nesterov"] else buffer
                step = tangential(step, w)
                w.mul_(
                    1
                    - group["lr"]
                    * group["weight_decay"]
                    * group["wd_ratio"]
                    / (1 - group["momentum"])
                )
                w.add_(step, alpha=-group["lr"])


class AdamP(torch.optim.Optimizer):
    """AdamP slides, Algorithm 2 with bias correction, with the gate open."""

    def __init__(
        self,
        params,
        lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        delta=0.1,
        wd_ratio=0.1,
        nesterov=False,
    ):
        super().__init__(
            params, {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        )
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for w in group["params"]:
                m = self.state[w].setdefault("exp_avg", torch.zeros_like(w))
                v = self.state[w].setdefault("exp_avg_sq", torch.zeros_like(w))
                m.lerp_(w.grad, 1 - b1)
                v.lerp_(w.grad**2, 1 - b2)
                step = (m / (1 - b1**self.steps)) / (
                    (v / (1 - b2**self.steps)).sqrt() + group["eps"]
                )
                step = tangential(step, w)
                w.mul_(1 - group["lr"] * group["weight_decay"] * group["wd_ratio"]).add_(
                    step, alpha=-group["lr"]
                )


class Lion(torch.optim.Optimizer):
    """Symbolic Discovery of Optimization Algorithms, Algorithm 2."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(
            params, {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for w in group["params"]:
                m = self.state[w].setdefault("exp_avg", torch.zeros_like(w))
                step = torch.lerp(m, w.grad, 1 - b1).sign_()
                w.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"])
                m.lerp_(w.grad, 1 - b2)


class SOAP(torch.optim.Optimizer):
    """SOAP, Algorithm 3, for matrices: AdamW in the eigenbases of Shampoo's two factors."""

    def __init__(
        self,
        params,
        lr,
        betas=(0.95, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        precondition_frequency=10,
    ):
        super().__init__(
            params, {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        )
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for w in group["params"]:
                state = self.state[w]
                rows, columns = w.shape
                m = state.setdefault("exp_avg", torch.zeros_like(w))
                v = state.setdefault("exp_avg_sq", torch.zeros_like(w))
                left = state.setdefault("left", torch.zeros(rows, rows, dtype=w.dtype))
                right = state.setdefault("right", torch.zeros(columns, columns, dtype=w.dtype))
                left.lerp_(w.grad @ w.grad.T, 1 - b2)
                right.lerp_(w.grad.T @ w.grad, 1 - b2)
                if "bases" not in state or self.steps % group["precondition_frequency"] == 0:
                    state["bases"] = (torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])
                to_rows, to_columns = state["bases"]
                # The authors' code uses no gradient in a basis that is made of it.
                if self.steps == 1:
                    continue
                m.lerp_(w.grad, 1 - b1)
                v.lerp_((to_rows.T @ w.grad @ to_columns) ** 2, 1 - b2)
                t = self.steps - 1
                size = (v / (1 - b2**t)).sqrt() + group["eps"]
                step = to_rows.T @ m @ to_columns / (1 - b1**t) / size
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.sub_(to_rows @ step @ to_columns.T, alpha=group["lr"])


def group_of(optimizer: type, **hyper: Any) -> dict[str, Any]:
    return optimizer([torch.nn.Parameter(torch.ones(2, 2))], **hyper).param_groups[0]
