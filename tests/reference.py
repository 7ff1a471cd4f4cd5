"""The papers' algorithms written out naively: loops over weights and filters, nothing taken from
the package or torch.optim.

A run is a list of weights, ``trajectory[t][name]``, with the initial ones first. It has the dtype
of the initial weights: float64 for identities.

    gradients = gradients_of(lambda weights, step: loss)
    train(weights, gradients, SGD(momentum=0.9), lr=0.1, steps=50, shrink=Shrink(2.5e-3))

Symbols: w a weight, g its gradient, t the step (from 0), f the factor that a filter shrinks or
grows by. A filter is a slice of dim 0. Sources: AWS paper eq. 21; WRS paper section 5; SGDP and
AdamP, algorithms 1 and 2 with two corrections: the gradient in ``p`` is taken at w_t, and the gate
compares |cos(w, g)| with delta/sqrt(dim), not the signed product with delta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import atan, atan2, log, sqrt, tan
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Gradients = Callable[[Weights, int], dict[str, Any]]
Trajectory = list[Weights]
State = dict[str, dict[str, Any]]


def gradients_of(loss: Callable[[Weights, int], Tensor]) -> Gradients:
    """Gradients of ``loss(weights, step)`` by autograd; ``None`` for a weight that the loss of this
    step does not use."""

    def gradients(weights: Weights, step: int) -> dict[str, Any]:
        leaves = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
        grads = torch.autograd.grad(loss(leaves, step), list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, grads, strict=True))

    return gradients


# ---- Plain optimizers. step() returns what is kept of w and what is taken away: w <- kept * w -
# taken. ----


@dataclass
class SGD:
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    decay_through_momentum = property(
        lambda self: 1 / (1 - self.momentum)
    )  # a coupled decay adds up in the momentum buffer
    scale_exponents = {"momentum_buffer": -1}  # noqa: RUF012  when w is multiplied by f, the buffer is by f^-1

    def step(
        self, state: dict[str, Any], w: Tensor, g: Tensor, lr: float, weight_decay: float
    ) -> tuple[float, Tensor]:
        g = g + weight_decay * w
        if self.momentum == 0:
            return 1.0, lr * g
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = g
        else:
            state["momentum_buffer"] = (
                self.momentum * state["momentum_buffer"] + (1 - self.dampening) * g
            )
        p = state["momentum_buffer"]
        return 1.0, lr * (g + self.momentum * p if self.nesterov else p)


@dataclass
class Adam:
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    decay_through_momentum = 1.0
    scale_exponents = {"exp_avg": -1, "exp_avg_sq": -2}  # noqa: RUF012

    def step(
        self, state: dict[str, Any], w: Tensor, g: Tensor, lr: float, weight_decay: float
    ) -> tuple[float, Tensor]:
        if not self.decoupled:
            g = g + weight_decay * w
        b1, b2 = self.betas
        t = state["step"] = state.get("step", 0) + 1
        m = state["exp_avg"] = b1 * state.get("exp_avg", torch.zeros_like(w)) + (1 - b1) * g
        v = state["exp_avg_sq"] = (
            b2 * state.get("exp_avg_sq", torch.zeros_like(w)) + (1 - b2) * g * g
        )
        taken = lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)
        return (1 - lr * weight_decay if self.decoupled else 1.0), taken


def AdamW(
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01
) -> Adam:
    return Adam(betas, eps, weight_decay, decoupled=True)


# ---- The rules ----


@dataclass
class Shrink:
    """AWS, eq. 21: w <- (1 - lr alpha ‖w‖) w, then the optimizer's step with the gradient taken at
    the weight before; clamped at 0.5."""

    alpha: float
    statistic: str = "norm"  # or "std", biased
    # or "keep": the optimizer's own decay then acts on the weight that is already shrunk
    weight_decay: str = "replace"

    def __call__(self, w: Tensor, lr: float) -> Tensor:
        size = norm if self.statistic == "norm" else std
        return torch.stack(
            [max(0.5, 1 - lr * self.alpha * float(size(filter_))) * filter_ for filter_ in w]
        )


@dataclass
class Decay:
    """A decoupled decay in place of the optimizer's: every entry before the step, or with
    ``cautious`` after it those entries that the optimizer's own step does not lengthen. AdamC,
    arXiv 2506.02285; cautious weight decay, arXiv 2510.12402."""

    weight_decay: float | None = None  # None: the number of the optimizer, whatever its momentum
    rate: str = "lr"  # or "lr_squared", "schedule", "constant"
    cautious: bool = False

    def pull(self, optimizer: Any, lr: float, lr_max: float) -> float:
        own = optimizer.weight_decay if self.weight_decay is None else self.weight_decay
        if self.rate == "lr":
            pull = lr * own
        elif self.rate == "lr_squared":
            pull = lr * lr / lr_max * own
        elif self.rate == "schedule":
            pull = lr / lr_max * own
        else:
            pull = own
        return min(pull, 0.5)


def cautiously(end: Tensor, start: Tensor, own_end: Tensor, pull: float) -> Tensor:
    """Each entry by itself: ``own_end`` is where the optimizer's own step led."""
    entries = []
    for w, s, own in zip(
        end.flatten().tolist(), start.flatten().tolist(), own_end.flatten().tolist(), strict=True
    ):
        entries.append(w - pull * s if (own - s) * s <= 0 else w)
    return torch.tensor(entries, dtype=end.dtype).reshape(end.shape)


@dataclass
class Project:
    """SGDP and AdamP for any optimizer: the step loses its part along w; decay is decoupled and
    multiplied by ``weight_decay_ratio``."""

    gate: str = "always"  # every filter; or "cosine": the papers' rule, per tensor
    delta: float = 0.1
    weight_decay: float | None = None  # None: that of the optimizer
    weight_decay_ratio: float = 0.1

    def view(self, w: Tensor, g: Tensor) -> str | None:
        return "filter" if self.gate == "always" else open_gate(w, g, self.delta)


@dataclass
class Rescale:
    """WRS: after every ``every``-th step (counted from 1) each filter gets the norm ``target``; the
    optimizer's buffers may follow."""

    every: int
    target: float | str = 1.0  # or "initial"
    rescale_state: bool = True
    weight_decay: str = "replace"
    active: Callable[[int], bool] = lambda step: (
        True
    )  # stands for the epoch window; gets the step, counted from 0


@dataclass
class Drop:
    """NRQ paper, Corollary 2: where the learning rate falls by k >= ``min_drop``, weights are
    divided by k^exponent, and buffers follow."""

    exponent: float
    min_drop: float = 1.5


@dataclass
class Rotate:
    """Rotation control: each step is stretched until it turns a vector by an angle; its norm is
    held, or left."""

    angle: float | str  # or "lr"
    bound: str = "exact"
    hold: bool = True
    target: float | str = "initial"
    smoothing: float = 0.0
    follows: str = "lr"
    largest_lr: float = 0.0  # of the schedule, as far as the param group tells it
    weight_decay: str = "replace"
    view: str = "layer"  # or "filter"

    def target_angle(self, lr: float) -> float:
        self.largest_lr = max(self.largest_lr, lr)
        if self.angle == "lr":
            return atan(lr)
        share = lr / self.largest_lr if self.largest_lr else 0.0
        share = {"lr": share, "sqrt_lr": sqrt(share), "constant": 1.0}[self.follows]
        return float(self.angle) * share

    def __call__(self, s: Tensor, moved: Tensor, lr: float, memory: dict[str, Any]) -> Tensor:
        """``moved`` is where the optimizer has taken ``s``; ``memory`` is that of this weight."""
        theta, rows = self.target_angle(lr), []
        for i, (a, b) in enumerate(zip(_rows(s, self.view), _rows(moved, self.view), strict=True)):
            length = memory.setdefault(f"length {i}", norm(a))
            step = b - a
            f = self._stretch(a, step, theta, memory, i)
            new = a + f * step
            if self.hold:
                new = (length if self.target == "initial" else self.target) * new / norm(new)
            rows.append(new)
        return torch.stack(rows).reshape(s.shape)

    def _stretch(
        self, a: Tensor, step: Tensor, theta: float, memory: dict[str, Any], i: int
    ) -> float:
        along = float(step @ a / norm(a))
        across = float(norm(step - (step @ a) / (a @ a) * a))
        now = atan2(across, float(norm(a)) + along)
        if self.smoothing:
            q, t = memory.get(f"average {i}", (0.0, 0))
            q = self.smoothing * q + (1 - self.smoothing) * tan(now) ** 2
            memory[f"average {i}"] = q, t + 1
            now = atan(sqrt(q / (1 - self.smoothing ** (t + 1))))
            f = tan(theta) / tan(now)
        else:
            f = tan(theta) * float(norm(a)) / (across - tan(theta) * along)
        stays = {"exact": False, "at_least": now >= theta, "at_most": now <= theta}
        # A step that no stretch turns so far: it goes outwards too steeply.
        return 1.0 if stays[self.bound] or not f > 0 else f


@dataclass
class Brake:
    """Radial brake: only a share of each change of the norm is left."""

    outward: float = 0.5
    inward: float = 1.0
    change: str = "norm"
    view: str = "layer"

    def __call__(self, s: Tensor, moved: Tensor) -> Tensor:
        rows = []
        for a, b in zip(_rows(s, self.view), _rows(moved, self.view), strict=True):
            before, after = float(norm(a)), float(norm(b))
            grown = after - before if self.change == "norm" else float((b - a) @ a) / before
            kept = self.outward if grown > 0 else self.inward
            rows.append((before + kept * grown) / after * b)
        return torch.stack(rows).reshape(s.shape)


def train(
    weights: Weights,
    gradients: Gradients,
    optimizer: SGD | Adam,
    *,
    lr: float | Callable[[int], float],
    steps: int,
    shrink: Shrink | None = None,
    project: Project | None = None,
    rescale: Rescale | None = None,
    drop: Drop | None = None,
    rotate: Rotate | None = None,
    brake: Brake | None = None,
    decay_rule: Decay | None = None,
    targets: list[str] | None = None,
    state: State | None = None,
) -> Trajectory:
    """A run of ``optimizer`` under any of the rules.

    Args:
        weights: the initial weights; left alone.
        gradients: gets the weights and the step; a gradient of ``None`` means that this weight is
            neither stepped, shrunk nor decayed.
        optimizer: SGD, Adam or AdamW of this file.
        lr: a number, or the learning rate of each step.
        steps: how many.
        shrink: AWS.
        project: SGDP and AdamP.
        rescale: WRS.
        drop: rescaling at LR drops; ``gradients`` are then those that the optimizer receives, taken
            at the rescaled weight.
        rotate: rotation control.
        brake: the radial brake.
        decay_rule: a decay in place of the optimizer's.
        targets: the weights that the rules act on; by default all of two or more dimensions.
        state: filled with the optimizer's buffers, by weight.
    """
    targets = [name for name, w in weights.items() if w.dim() > 1] if targets is None else targets
    state = {} if state is None else state
    weights = {name: w.detach().clone() for name, w in weights.items()}
    initial = {name: [norm(filter_) for filter_ in weights[name]] for name in targets}
    last_lr: dict[str, float] = {}
    # A copy: what it finds out about the schedule belongs to this run.
    rotate = None if rotate is None else replace(rotate)
    steered: dict[str, dict[str, Any]] = {name: {} for name in targets}
    lr_max = 0.0
    trajectory = [dict(weights)]
    for t in range(steps):
        lr_t = lr(t) if callable(lr) else lr
        lr_max = max(lr_max, lr_t)
        for name, g in gradients(weights, t).items():
            if g is None:
                continue
            k = last_lr.get(name, lr_t) / lr_t
            last_lr[name] = lr_t
            if name in targets and drop and k >= drop.min_drop:
                _multiply_filters(
                    weights, name, [k**-drop.exponent] * len(weights[name]), state[name], optimizer
                )
            w, decay = weights[name], optimizer.weight_decay
            rules = name in targets
            view = project.view(w, g) if rules and project else None

            # Who owns the decay of a target: AWS, else WeightDecay, else the rotation, else the
            # projection, else WRS while it is active, else the optimizer.
            kept_by_projection = None
            kept_by_rotation = 1.0
            pull = 0.0
            if rules and shrink and shrink.weight_decay == "replace":
                decay = 0.0
            elif rules and decay_rule:
                pull = decay_rule.pull(optimizer, lr_t, lr_max)
                decay = 0.0
                kept_by_projection = 1.0
            elif rules and shrink:
                pass
            elif rules and rotate and rotate.weight_decay == "replace":
                if not rotate.hold:
                    kept_by_rotation = 1 - lr_t * decay * optimizer.decay_through_momentum
                decay = 0.0
                # A projection that leaves the decay to others.
                kept_by_projection = 1.0
            elif rules and project:
                strength = (
                    decay * optimizer.decay_through_momentum
                    if project.weight_decay is None
                    else project.weight_decay
                )
                kept_by_projection = 1 - lr_t * strength * (
                    1 if view is None else project.weight_decay_ratio
                )
                decay = 0.0
            elif rules and rescale and rescale.active(t):
                decay = 0.0 if rescale.weight_decay == "replace" else decay

            shrunk = shrink(w, lr_t) if rules and shrink else w
            is_cautious = decay_rule is not None and decay_rule.cautious
            if not is_cautious:
                shrunk = (1 - pull) * shrunk
            kept, taken = optimizer.step(state.setdefault(name, {}), shrunk, g, lr_t, decay)
            own_end = kept * shrunk - taken
            if view is not None:
                taken = tangent(taken, w, view)
            moved = (kept if kept_by_projection is None else kept_by_projection) * shrunk - taken
            if is_cautious:
                moved = cautiously(moved, shrunk, own_end, pull)
            if rules and rotate:
                # Decay comes first, so that the step starts from what it leaves.
                start = kept_by_rotation * shrunk
                moved = rotate(start, start + (moved - shrunk), lr_t, steered[name])
            if rules and brake:
                moved = brake(shrunk, moved)
            weights[name] = moved

            if rules and rescale and rescale.active(t) and (t + 1) % rescale.every == 0:
                _rescale_filters(weights, name, initial[name], state[name], rescale, optimizer)
        trajectory.append(dict(weights))
    return trajectory


def _rescale_filters(
    weights: Weights,
    name: str,
    initial: list[Tensor],
    buffers: dict[str, Any],
    rule: Rescale,
    optimizer: SGD | Adam,
) -> None:
    wanted = initial if rule.target == "initial" else [rule.target] * len(initial)
    factors = [
        target / norm(filter_) for target, filter_ in zip(wanted, weights[name], strict=True)
    ]
    _multiply_filters(weights, name, factors, buffers if rule.rescale_state else {}, optimizer)


def _multiply_filters(
    weights: Weights, name: str, factors: list[Any], buffers: dict[str, Any], optimizer: SGD | Adam
) -> None:
    weights[name] = _by_filter(weights[name], factors, 1)
    for key, exponent in optimizer.scale_exponents.items():
        if key in buffers:
            buffers[key] = _by_filter(buffers[key], factors, exponent)


def _by_filter(x: Tensor, factors: list[Any], exponent: int) -> Tensor:
    return torch.stack(
        [factor**exponent * filter_ for factor, filter_ in zip(factors, x, strict=True)]
    )


# ---- SGDP and AdamP as their algorithms 1 and 2 have them ----


def sgdp(
    weights: Weights,
    gradients: Gradients,
    *,
    lr: float,
    steps: int,
    momentum: float = 0.9,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
) -> Trajectory:
    """SGDP. The momentum buffer is never projected, only the step; weight decay is decoupled and
    stands for lambda/(1 - momentum)."""
    weights, p = dict(weights), {}
    trajectory = [dict(weights)]
    for _t in range(steps):
        for name, g in gradients(weights, _t).items():
            w = weights[name]
            p[name] = g if name not in p else momentum * p[name] + (1 - dampening) * g
            direction = g + momentum * p[name] if nesterov else p[name]
            view = open_gate(w, g, delta) if w.dim() > 1 else None
            if view is not None:
                direction = tangent(direction, w, view)
            ratio = 1 if view is None else wd_ratio
            weights[name] = (1 - lr * weight_decay * ratio / (1 - momentum)) * w - lr * direction
        trajectory.append(dict(weights))
    return trajectory


def adamp(
    weights: Weights,
    gradients: Gradients,
    *,
    lr: float,
    steps: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
) -> Trajectory:
    """AdamP, with Adam's bias correction (which the printed algorithm 2 leaves out); weight decay
    is decoupled."""
    b1, b2 = betas
    weights, m, v = dict(weights), {}, {}
    trajectory = [dict(weights)]
    for t in range(1, steps + 1):
        for name, g in gradients(weights, t - 1).items():
            w = weights[name]
            m[name] = b1 * m.get(name, 0) + (1 - b1) * g
            v[name] = b2 * v.get(name, 0) + (1 - b2) * g * g
            direction = m[name] / (1 - b1**t) / ((v[name] / (1 - b2**t)).sqrt() + eps)
            view = open_gate(w, g, delta) if w.dim() > 1 else None
            if view is not None:
                direction = tangent(direction, w, view)
            ratio = 1 if view is None else wd_ratio
            weights[name] = (1 - lr * weight_decay * ratio) * w - lr * direction
        trajectory.append(dict(weights))
    return trajectory


def open_gate(w: Tensor, g: Tensor, delta: float) -> str | None:
    """The first view, "filter" then "layer", in which |cos(w, g)| < delta/sqrt(dim) for *every*
    row; ``None`` if there is none."""
    for view in ("filter", "layer"):
        rows = list(zip(_rows(w, view), _rows(g, view), strict=True))
        if all(abs(cosine(a, b)) < delta / sqrt(len(a)) for a, b in rows):
            return view
    return None


def tangent(x: Tensor, w: Tensor, view: str) -> Tensor:
    """Each row of ``x`` without its part along the same row of ``w``."""
    rows = [a - (a @ b) / (b @ b) * b for a, b in zip(_rows(x, view), _rows(w, view), strict=True)]
    return torch.stack(rows).reshape(x.shape)


def _rows(x: Tensor, view: str) -> Tensor:
    return x.reshape(len(x) if view == "filter" else 1, -1)


# ---- One vector ----


def norm(v: Tensor) -> Tensor:
    return (v * v).sum().sqrt()


def std(v: Tensor) -> Tensor:
    return ((v - v.mean()) ** 2).mean().sqrt()


def cosine(a: Tensor, b: Tensor) -> float:
    product = float(norm(a) * norm(b))
    return float(a @ b) / product if product > 0 else 0.0


# ---- The expected course of a norm under an optimizer with one buffer, one scalar at a time ----
#
# A = E w.w, B = E w.m, C = E m.m for G = g + coupled * w, g.w = 0, E g.g = scale / A, and
#   m' = beta m + gamma G,   w' = (1 - lr decoupled) w - lr (a G + b m') / s.
# A step gives (a, b, beta, gamma, (kept, taken, correction), eps, factor on lr); no moment: s = 1.


def sgd_step(momentum: float, dampening: float = 0.0, *, nesterov: bool = False) -> Any:
    def step(t: int) -> Any:
        gamma = 1.0 if t == 1 else 1 - dampening
        a, b = (1.0, momentum) if nesterov else (0.0, 1.0)
        return a, b, momentum, gamma, None, 0.0, 1.0

    return step


def adam_step(b1: float, b2: float, *, eps: float = 0.0) -> Any:
    def step(t: int) -> Any:
        return 0.0, 1 / (1 - b1**t), b1, 1 - b1, (b2, 1 - b2, 1 - b2**t), eps, 1.0

    return step


def nadam_step(b1: float, b2: float, momentum_decay: float) -> Any:
    def mu(t: int) -> float:
        return b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))

    def step(t: int) -> Any:
        product = 1.0
        for i in range(1, t + 1):
            product *= mu(i)
        a = (1 - mu(t)) / (1 - product)
        b = mu(t + 1) / (1 - product * mu(t + 1))
        return a, b, b1, 1 - b1, (b2, 1 - b2, 1 - b2**t), 0.0, 1.0

    return step


def radam_step(b1: float, b2: float) -> Any:
    longest = 2 / (1 - b2) - 1

    def step(t: int) -> Any:
        rho = longest - 2 * t * b2**t / (1 - b2**t)
        r = 1.0
        if rho > 5:
            r = sqrt((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho))
        # Below, the second moment is filled, but the step is not divided by it.
        moment = (b2, 1 - b2, 1 - b2**t if rho > 5 else None)
        return 0.0, r / (1 - b1**t), b1, 1 - b1, moment, 0.0, 1.0

    return step


def rmsprop_step(alpha: float) -> Any:
    return lambda t: (1.0, 0.0, 0.0, 0.0, (alpha, 1 - alpha, 1.0), 0.0, 1.0)


def adagrad_step(lr_decay: float) -> Any:
    return lambda t: (1.0, 0.0, 0.0, 0.0, (1.0, 1.0, 1.0), 0.0, 1 / (1 + (t - 1) * lr_decay))


def course(
    step: Any,
    *,
    norm: float,
    dim: int,
    scale: float | list[float],
    rates: list[float],
    coupled: float = 0.0,
    decoupled: float = 0.0,
    projected: bool = False,
) -> tuple[list[float], list[float]]:
    """Angle of each step and norm after it; ``scale``: E|g|^2 |w|^2, one number or one per step."""
    scales = scale if isinstance(scale, list) else [scale] * len(rates)
    A, B, C, V = norm**2, 0.0, 0.0, 0.0
    angles, norms = [], []
    for t, rate in enumerate(rates, start=1):
        a, b, beta, gamma, moment, eps, factor = step(t)
        lr = rate * factor
        shrink = 1 - lr * decoupled
        GG, Gw, Gm = scales[t - 1] / A + coupled**2 * A, coupled * A, coupled * B
        if moment is not None:
            kept, taken, correction = moment
            V = kept * V + taken * GG / dim
            if correction is not None:
                s = sqrt(V / correction) + eps
                a, b = a / s, b / s
        mw = beta * B + gamma * Gw
        mm = beta**2 * C + 2 * beta * gamma * Gm + gamma**2 * GG
        mG = beta * Gm + gamma * GG
        uw, um = a * Gw + b * mw, a * mG + b * mm
        uu = a**2 * GG + 2 * a * b * mG + b**2 * mm
        across = uu - uw**2 / A
        if projected:
            radial = shrink
            A_next = shrink**2 * A + lr**2 * across
            B_next = shrink * mw - lr * (um - uw * mw / A)
        else:
            radial = shrink - lr * uw / A
            A_next = shrink**2 * A - 2 * shrink * lr * uw + lr**2 * uu
            B_next = shrink * mw - lr * um
        angles.append(atan2(sqrt(lr**2 * across / A), radial))
        A, B, C = A_next, B_next, mm
        norms.append(sqrt(A))
    return angles, norms


def coherence(
    norm_first: float, norm_last: float, pulls: list[float], squared_angles: list[float]
) -> float:
    """Growth of ln w.w per squared angle, decay apart."""
    growth = log(norm_last**2) - log(norm_first**2)
    for pull in pulls:
        growth -= 2 * log(1 - pull)
    return growth / sum(squared_angles)
