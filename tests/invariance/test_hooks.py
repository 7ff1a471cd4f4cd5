"""Hooks are taken off from every module that has them, and nobody else's."""

from __future__ import annotations

import torch
from torch import nn

from lightning_normdyn.invariance.hooks import take_off


class Listener:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def enter(self, module: nn.Module, args: object) -> None:
        self.heard.append("enter")

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        self.heard.append("leave")


def test_hooks_of_all_modules_are_taken_off_and_no_other():
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.ReLU())
    ours, other = Listener(), Listener()
    for module in net[:2]:
        for listener in (ours, other):
            module.register_forward_pre_hook(listener.enter)
            module.register_forward_hook(listener.leave, always_call=True)
    # Also from modules that never had any.
    take_off(net.modules(), ours.enter, ours.leave)
    net(torch.ones(1, 2))
    assert not ours.heard
    assert other.heard == ["enter", "leave"] * 2

    take_off(net.modules(), other.enter, other.leave)
    assert not any(module._forward_hooks_always_called for module in net.modules())
    net(torch.ones(1, 2))
    assert len(other.heard) == 4
