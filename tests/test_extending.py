"""What docs/extending.md adds works as it is written there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import fit, make, sgd, weights_of
from torch import nn

from lightning_normdyn import NormDynamicsMonitor
from lightning_normdyn.invariance.checks import inspect_module
from lightning_normdyn.invariance.rules.operation import RULES
from lightning_normdyn.monitor.quantities import QUANTITIES
from lightning_normdyn.optimizers import recognition

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def section(title: str) -> dict[str, Any]:
    """The names that the snippet of a section defines, as a module would hold them."""
    text = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module = ModuleType(f"extending_{title.split()[-1]}")
    sys.modules[module.__name__] = module  # where generics and pickles look their names up
    exec(compile(code, module.__name__, "exec"), vars(module))
    return vars(module)


def test_a_rule(capsys):
    rule = section("A rule")["FixedNorm"](2.0, params="net.0.weight")
    module = make(make_optimizer=sgd)
    first = weights_of(module)["net.0.weight"].flatten(1).norm(dim=1)
    fit(module, [rule, NormDynamicsMonitor(1)], max_steps=4)
    last = weights_of(module)["net.0.weight"].flatten(1).norm(dim=1)
    assert torch.allclose(last, 2 * first, rtol=1e-12)
    assert "norm held at 2 times the first" in capsys.readouterr().out


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rule_checks_its_numbers(scale):
    with pytest.raises(ValueError, match="`scale` must be > 0 and finite"):
        section("A rule")["FixedNorm"](scale)


class SignMomentum(torch.optim.Optimizer):
    """Named as the optimizer of the page, with the keys that its row asks for."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(group["lr"] * weight.grad.sign())


def test_an_optimizer(monkeypatch):
    row = section("An optimizer")["SIGN_MOMENTUM"]
    optimizer = SignMomentum([nn.Parameter(torch.ones(2, 2))])
    assert row not in recognition.TABLE
    monkeypatch.setattr(recognition, "TABLE", (row, *recognition.TABLE))
    assert recognition.facts_of(optimizer).response is row.response


def test_a_quantity(monkeypatch):
    entry = section("A quantity")["RELATIVE_UPDATE"]
    monkeypatch.setitem(QUANTITIES, entry.name, entry)
    monitor = NormDynamicsMonitor(1, tables=False)
    module = make(make_optimizer=sgd)
    before = weights_of(module)["net.8.weight"]
    fit(module, [monitor], max_steps=1)
    turned = (weights_of(module)["net.8.weight"] - before).norm(dim=1) / before.norm(dim=1)
    logged = monitor.history[0]["relative_update/net.8.weight"]
    assert logged == pytest.approx(float(turned.square().mean().sqrt()), rel=1e-5)


def test_a_normalization():
    names = section("A normalization")
    try:

        class Norm(nn.Module):
            def forward(self, x):
                return names["FastRMSNorm"].apply(x)

        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6, bias=False), Norm(), nn.Linear(6, 2))
        verdicts = {v.name: v for v in inspect_module(net, torch.randn(8, 4))}
        assert verdicts["0.weight"].kind == "layer"
    finally:
        del RULES["FastRMSNormBackward"]


def test_a_logger(monkeypatch, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    from lightning_normdyn.monitor import loggers

    class NotebookLogger(CSVLogger):
        pass

    publisher = section("A logger")["NotebookPublisher"]
    monkeypatch.setattr(loggers, "_PUBLISHERS", ((NotebookLogger, publisher), *loggers._PUBLISHERS))
    fit(
        make(make_optimizer=sgd),
        [NormDynamicsMonitor(1, tables=False)],
        max_steps=3,
        logger=NotebookLogger(tmp_path),
    )
    assert publisher.shown
