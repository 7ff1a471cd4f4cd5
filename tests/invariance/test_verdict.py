"""Verdicts in tables and in checkpoints."""

from __future__ import annotations

import torch
from zoo import build, by_name

from lightning_normdyn.invariance.checks import inspect_module
from lightning_normdyn.invariance.verdict import Verdict, targets_table


def test_tables():
    module, inputs = build("attention_with_qk_norm")
    text = targets_table(inspect_module(module, *inputs))
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "weight"
    row = next(line for line in lines if line.startswith("qkv.weight"))
    assert "24 x 8" in row
    assert "partly" in row
    assert "nk" in row
    assert "nq" in row
    narrow = targets_table(inspect_module(module, *inputs), width=60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert {line.split()[0] for line in lines} <= {line.split()[0] for line in narrow.splitlines()}


def test_verdicts_survive_a_checkpoint(tmp_path):
    module, inputs = build("style_transfer")
    found = inspect_module(module, *inputs)
    torch.save({v.name: v.state() for v in found}, tmp_path / "verdicts.pt")
    for name, state in torch.load(tmp_path / "verdicts.pt", weights_only=True).items():
        again, original = Verdict.from_state(name, state), by_name(found)[name]
        assert again.state().keys() == original.state().keys()
        assert (again.kind, again.norms, again.shape, again.reason) == (
            original.kind,
            original.norms,
            original.shape,
            original.reason,
        )
        assert again.partition is None or torch.equal(
            again.partition.labels, original.partition.labels
        )
        assert [(b.module, b.vector.tolist(), b.bias) for b in again.batch_norms] == [
            (b.module, b.vector.tolist(), b.bias) for b in original.batch_norms
        ]
