"""Sizes of weights and steps by param group, from real fits and against sums over all entries."""

from __future__ import annotations

import math

import pytest
import torch
from models import fit, make
from torch import nn

from lightning_normdyn import NormDynamicsMonitor
from lightning_normdyn.monitor.group_sizes import (
    MOST_GROUPS,
    GroupSizes,
    as_plain,
    as_text,
    from_plain,
    group_names,
    of_runs_as_text,
)

ROW = GroupSizes("AdamW 0", "filter", 9, 0.108, 0.203, 0.229, 0.00314, None)


def fitted(groups, steps):
    """The meta of a run, its newest step by weight (what it was made from, and the change), and the
    module; ``groups``: param groups of it."""
    module = make()
    before, newest = {}, {}

    def keep(optimizer, *_):
        for group in optimizer.param_groups:
            before.update((p, p.detach().clone()) for p in group["params"])

    def compare(*_):
        newest.update((p, (old, p.detach() - old)) for p, old in before.items())

    def configure():
        optimizer = torch.optim.AdamW(groups(module), lr=1e-2, weight_decay=0.3)
        optimizer.register_step_pre_hook(keep)
        optimizer.register_step_post_hook(compare)
        return optimizer

    module.configure_optimizers = configure
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(module, [monitor], max_steps=steps)
    return monitor.history.meta, newest, module


def test_the_table_of_a_fit_is_that_of_sums_over_entries():
    def groups(module):
        weights = [p for p in module.parameters() if p.ndim > 1]
        others = [p for p in module.parameters() if p.ndim < 2]
        return [{"params": weights}, {"params": others}]

    # Two rows: the newer half of the window is the newest step alone.
    meta, newest, module = fitted(groups, steps=2)
    rows = list(from_plain(meta["groups"]))
    assert {row.group for row in rows} == {"AdamW 0"}
    kinds = {name: notes["scale_invariant"] for name, notes in meta["targets"].items()}
    assert sum(row.weights for row in rows) == len(kinds)
    for row in rows:
        squares = across = entries = 0.0
        for name, weight in module.named_parameters():
            if kinds.get(name) != row.kind:
                continue
            old, step = (each.double() for each in newest[weight])
            # At right angles to the weight, per length along it: the tangent of the angle.
            along = (old * step).sum() / (old * old).sum()
            square = (step - along * old).square().sum() / (1 + along) ** 2
            across += float(square) / 1e-2**2
            squares += float(old.square().sum())
            entries += old.numel()
        assert row.rms_weight == pytest.approx(math.sqrt(squares / entries), rel=1e-5)
        assert row.rms_update == pytest.approx(math.sqrt(across / entries), rel=1e-4)
        assert row.rms_of_noise == pytest.approx(math.sqrt(0.1 / 1.9), rel=1e-6)


def test_weights_of_16_bits_have_sizes_and_no_steps():
    module = make().to(torch.bfloat16)
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(module, [monitor], max_steps=3)
    rows = list(from_plain(monitor.history.meta["groups"]))
    assert rows
    for row in rows:
        assert row.rms_weight > 0
        assert (row.rms_update, row.angle, row.balanced) == (None, None, None)


def test_param_groups_are_called_by_what_tells_them_apart():
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    two = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=0.1)
    one = torch.optim.SGD(weights, lr=0.1)
    other = torch.optim.AdamW(weights)
    assert group_names([two, other]) == [["SGD 0", "SGD 1"], ["AdamW"]]
    assert group_names([two, one]) == [["SGD-0 0", "SGD-0 1"], ["SGD-1"]]


def test_the_table_fits_a_terminal_and_says_what_it_leaves_out():
    text = as_text([ROW] * (MOST_GROUPS + 3), 80)
    assert text.count("AdamW 0") == MOST_GROUPS
    assert "and 3 more rows" in text
    assert max(map(len, text.splitlines())) <= 80
    assert as_text([]) == ""
    both = of_runs_as_text({"narrow": [ROW], "wide": [ROW], "none": []}, 80)
    assert [line.split()[0] for line in both.splitlines() if "AdamW" in line] == ["narrow", "wide"]
    assert of_runs_as_text({"none": []}) == ""


def test_a_history_keeps_the_rows_and_a_file_from_elsewhere_may_hold_anything():
    assert list(from_plain(as_plain([ROW]))) == [ROW]
    row = ROW._asdict()
    wrong = [
        {**row, "weights": "9"},
        {**row, "group": 1},
        {**row, "angle": "fast"},
        {**row, "angle": float("inf")},
        {**row, "more": 1},
        {"group": "AdamW"},
        "AdamW",
    ]
    for known in (None, "text", {"a": 1}, wrong):
        assert list(from_plain(known)) == []
