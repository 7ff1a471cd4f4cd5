"""Small doubles of public optimizers that step around another optimizer, or twice; after their
structure, not their code."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch.optim import Optimizer


class Wrapper(Optimizer):
    """As recent packages wrap: no ``super().__init__()``, but torch's own way to have ``step`` call
    hooks; groups are the inner ones'."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._patch_step_function()
        self.state = defaultdict(dict)
        self.defaults = inner.defaults

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def weights(self):
        return [p for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        return self.optimizer.step(closure)


class PullsBack(Wrapper):
    """Every ``k`` steps half of the way back to where it was ``k`` steps ago (Lookahead)."""

    k = 2

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner)
        self.count = 0
        for p in self.weights():
            self.state[p]["slow_params"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for p in self.weights():
                p.lerp_(self.state[p]["slow_params"], 0.5)
                self.state[p]["slow_params"].copy_(p)
        return loss


class PullsBackFromLists(PullsBack):
    """The same with its copies in a list of lists, made in the first step."""

    def __init__(self, inner: Optimizer) -> None:
        Wrapper.__init__(self, inner)
        self.count, self.remembered = 0, []

    @torch.no_grad()
    def step(self, closure=None):
        if not self.remembered:
            self.remembered = [
                [p.detach().clone() for p in group["params"]] for group in self.param_groups
            ]
        loss = self.optimizer.step(closure)
        for group, copies in zip(self.param_groups, self.remembered, strict=True):
            for p, copy in zip(group["params"], copies, strict=True):
                p.lerp_(copy, 0.1)
        return loss


class Damps(Wrapper):
    """Halves every step and remembers nothing: a wrapper that undoes nobody's work."""

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in self.weights():
            if p.grad is not None:
                p.grad.mul_(0.5)
        self.optimizer.step()
        return loss if closure is not None else None


class Unhooked(Optimizer):
    """A wrapper as older ones are written: no ``super().__init__()``, and nobody tells torch of its
    ``step``."""

    def __init__(self, inner: Optimizer) -> None:
        self.base_optimizer = inner
        self.param_groups = inner.param_groups
        self.defaults = inner.defaults
        self.state = defaultdict(dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.base_optimizer.step(closure)


class UnhookedWithHookLists(Unhooked):
    """The same with places for hooks that nobody calls."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner)
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()


class HookedLate(Optimizer):
    """A wrapper with places for hooks whose ``step`` torch itself gets hold of at its first
    ``zero_grad`` (timm's Lookahead)."""

    def __init__(self, inner: Optimizer) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._base_optimizer = inner
        self.param_groups = inner.param_groups
        self.defaults = inner.defaults
        self.state = defaultdict(dict)
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = self._base_optimizer.step(closure)
        self.count += 1
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self._base_optimizer.state[p]
            slow = state.setdefault("lookahead_slow_buff", p.detach().clone())
            if self.count % 2 == 0:
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


class CopiesDict(Optimizer):
    """A wrapper that takes the inner optimizer's attributes over."""

    def __init__(self, inner: Optimizer) -> None:
        self.__dict__.update(inner.__dict__)
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


class TwoPhases(Optimizer):
    """Sharpness-aware: the gradient of a step is taken aside, ``rho`` up the slope (SAM around a
    base optimizer)."""

    def __init__(
        self,
        params: Any,
        base: type[Optimizer],
        rho: float = 0.5,
        comes_back: bool = True,
        moves_on: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.comes_back, self.moves_on = comes_back, moves_on

    def _with_gradient(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        weights = self._with_gradient()
        length = torch.stack([p.grad.norm() for p in weights]).norm()
        for p in weights:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / length))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        if self.comes_back:
            for p in self._with_gradient():
                p.data = self.state[p]["old"]
        self.base_optimizer.step()
        for p in self._with_gradient():
            p.add_(p.grad, alpha=-self.moves_on)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        loss = closure()
        self.first_step()
        closure()
        self.second_step()
        return loss


class TwiceEvaluated(torch.optim.SGD):
    """Sharpness-aware in one class: evaluates its closure, goes aside, evaluates it again, comes
    back, steps."""

    rho = 0.5

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        loss = closure()
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        length = torch.stack([p.grad.norm() for p in weights]).norm()
        aside = [p.grad * (self.rho / length) for p in weights]
        torch._foreach_add_(weights, aside)
        closure()
        torch._foreach_sub_(weights, aside)
        super().step()
        return loss
