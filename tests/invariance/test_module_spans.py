"""Which module's forward created a node: the innermost, also after an exception and inside an open
forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_normdyn.invariance.module_spans import ModuleSpans


def node_of(spans: ModuleSpans, x: Tensor) -> tuple[str, nn.Module | None]:
    assert x.grad_fn is not None
    return spans.module_of(x.grad_fn)


def test_a_node_belongs_to_the_innermost_forward():
    spans, outer, inner = ModuleSpans(), nn.Identity(), nn.Identity()
    x = torch.ones(2, requires_grad=True)
    before = x * 2
    spans.enter(outer, "outer")
    first = before * 2
    spans.enter(inner, "outer.inner")
    second = first * 2
    spans.leave(inner)
    third = second * 2
    spans.leave(outer)
    after = third * 2
    assert [node_of(spans, y) for y in (before, first, second, third, after)] == [
        ("", None),
        ("outer", outer),
        ("outer.inner", inner),
        ("outer", outer),
        ("", None),
    ]


def test_a_forward_that_is_still_open_reaches_until_now():
    spans, module = ModuleSpans(), nn.Identity()
    spans.enter(module, "root")
    x = torch.ones(2, requires_grad=True) * 2
    assert node_of(spans, x) == ("root", module)


def test_modules_that_an_exception_ended_are_left_with_the_one_above_them():
    spans, outer, broken = ModuleSpans(), nn.Identity(), nn.Identity()
    x = torch.ones(2, requires_grad=True)
    spans.enter(outer, "outer")
    spans.enter(broken, "outer.broken")
    spans.leave(outer)
    after = x * 2
    assert node_of(spans, after) == ("", None)
    spans.leave(broken)  # it was never closed: nothing to do
