"""What callbacks do to a weight, taken together."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from cases import AddsGroup, without_second
from models import fit, make
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    NormDynWarning,
    RadialProjection,
    StepBracket,
    WeightRescaling,
)
from lightning_normdyn.engine import combined
from lightning_normdyn.optimizers.bracket import Phase


class Looks(L.Callback):
    """Asks a question in the middle of every step, and keeps the answers."""

    def __init__(self, monitor, question):
        self.monitor, self.question, self.answers = monitor, question, []

    def on_train_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        StepBracket.of(optimizer).add(Phase.SNAPSHOT, self.ask)

    def ask(self, step):
        plan = self.monitor.plans[0]
        self.answers.append(self.question(self.monitor.member.session.combined, plan, step))


def asked(question, *callbacks):
    monitor = NormDynamicsMonitor(1, tables=False)
    looks = Looks(monitor, question)
    fit(make(), [*callbacks, monitor, looks], max_epochs=1)
    return looks.answers


def shares(combined, plan, step):
    norm = plan.vectors.norms()
    before, within = combined.decay_shares(plan, step, norm)
    both = combined.applied_decay(plan, step, norm)
    assert torch.allclose(1 - both, (1 - before) * (1 - within))
    return before, within


def test_decay_is_taken_away_by_the_shrink_or_by_the_optimizer():
    (before, within), *_ = asked(shares, AdaptiveWeightShrink(0.5, params="net.0.weight"))
    assert (before[:4] > 0).all()
    assert (within[:4] == 0).all()  # the shrink replaces the decay
    assert (before[4:] == 0).all()
    assert (within[4:] > 0).all()


def test_decays_name_their_owner():
    def owners(combined, plan, step):
        named = zip(plan.targets, combined.decays(plan), strict=True)
        return {target.name: decay.owner is not None for target, decay in named}

    (first, *_) = asked(owners, AdaptiveWeightShrink(0.5, params="net.0.weight"))
    assert first == {"net.0.weight": True, "net.3.weight": False, "net.8.weight": False}


def test_effects_on_other_vectors_are_marked():
    def kinds(combined, plan, step):
        return combined.effects(plan.targets)

    rule = WeightRescaling(2, params="net.0.weight", granularity="layer")
    (first, second, *_), *_ = asked(kinds, rule)
    assert first != second
    whole = asked(kinds, WeightRescaling(2, params="net.0.weight"))[0][0]
    assert first != whole


def test_treatments_in_words():
    def words(combined, plan, step):
        texts = combined.treatments()
        return {target.name: texts[target.weight] for target in plan.targets}

    first, *_ = asked(words, RadialProjection(), AdaptiveWeightShrink(0.5))
    assert first["net.8.weight"] == ""
    assert first["net.0.weight"].count("; ") >= 1


@pytest.mark.parametrize("key", ["clamped", "nothing of this name"])
def test_counts_over_all_callbacks(key):
    def counts(combined, plan, step):
        total = combined.counted(key)
        by_weight = combined.counted_by_weight(key)
        return None if total is None else int(total), by_weight

    *_, (total, by_weight) = asked(counts, AdaptiveWeightShrink(50.0))
    if key == "clamped":
        assert total == sum(by_weight.values()) > 0
        assert set(by_weight) == {"net.0.weight", "net.3.weight"}
    else:
        assert (total, by_weight) == (None, {})


def rows(printed: str) -> dict[str, str]:
    """Weight name -> the rest of its line."""
    _, _, rest = printed.partition("lightning-normdyn: targets\n\n")
    table, *_ = rest.split("\n\n")
    lines = [line for line in table.splitlines() if line.startswith("net.")]
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def test_it_says_how_each_weight_is_treated_and_why(capsys):
    fit(make(), [AdaptiveWeightShrink(0.5), NormDynamicsMonitor(1)], max_epochs=1)
    table = rows(capsys.readouterr().out)
    assert list(table) == ["net.0.weight", "net.3.weight", "net.8.weight"]
    assert table["net.0.weight"].startswith("4×1×3×3 filter 4 net.1 AWS")
    assert table["net.8.weight"].startswith("2×6 no 2 ")
    assert table["net.8.weight"].endswith(
        "measured LogSoftmaxBackward0 does not commute with a change of scale"
    )


def row(name, **said):
    cells = dict.fromkeys(combined.COLUMNS, "")
    kinds = {"scale-invariant": "filter", "normalized by": f"bn{name[-1]}", "vectors": "4"}
    return {**cells, "weight": name, "treated how": "AWS, decay now 0.1", **kinds, **said}


def test_layers_that_are_built_and_treated_alike_are_one_row():
    rows = [row(f"layer1.{i}.conv{j}") for i in range(8) for j in (1, 2)]
    rows[3] |= {"vectors": "16", "treated how": "AWS, decay now 0.3"}
    rows.insert(0, row("stem", **{"scale-invariant": "no", "why not": "added"}))
    cells = combined._cells(rows, lambda norm: "BatchNorm")
    assert [cell[0] for cell in cells] == ["stem", "layer1.*.conv*: 16 weights"]
    said = dict(zip(combined.COLUMNS, cells[1], strict=True))
    assert said["normalized by"] == "BatchNorm"
    assert said["vectors"] == "4 to 16"
    assert said["treated how"] == "AWS, decay now 0.1 to 0.3"
    # Other normalizations, other treatments: other rows.
    rows[5]["treated how"] = "measured"
    cells = combined._cells(rows, lambda norm: "BatchNorm" if norm.endswith("1") else "LayerNorm")
    assert [cell[0] for cell in cells] == [
        "stem",
        "layer1.*.conv1: 7 weights",
        "layer1.*.conv2: 8 weights",
        "layer1.2.conv1",
    ]
    # Three are read as quickly as one.
    assert len(combined._cells(rows[:4], lambda norm: norm)) == 4


def test_deep_networks_have_a_start_table_that_fits(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    torch.manual_seed(0)
    layers = []
    for _ in range(160):
        layers += [nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU()]
    module = make()
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)]
    module.net = nn.Sequential(nn.Conv2d(1, 2, 1), *layers, *head).double()
    fit(module, [AdaptiveWeightShrink(0.5), NormDynamicsMonitor(1)], max_steps=1)
    table, _, _ = capsys.readouterr().out.partition("Kernels:")
    lines = table.splitlines()
    assert len(lines) < 20
    assert max(map(len, lines)) <= 80
    assert "160 weights" in " ".join(table.split())
    assert "BatchNorm" in table


def test_a_weight_that_a_person_names_is_marked(capsys):
    with pytest.warns(NormDynWarning, match="not known to be scale-invariant"):
        fit(make(), [WeightRescaling(1, params="net.8.weight")], max_epochs=1)
    table = rows(capsys.readouterr().out)
    assert "no (by request)" in table["net.8.weight"]


def test_it_says_which_kernels_run_and_why(capsys):
    fit(make(), [AdaptiveWeightShrink(0.5), NormDynamicsMonitor(1)], max_epochs=1)
    assert "\nKernels: torch (the weights are on the CPU)\n" in capsys.readouterr().out


def test_nobody_wants_tables(capsys):
    fit(make(), [NormDynamicsMonitor(1, tables=False)], max_epochs=1)
    assert "targets" not in capsys.readouterr().out


def test_it_is_shown_again_when_more_is_found(capsys):
    module = make(make_optimizer=without_second)
    fit(module, [AddsGroup(), AdaptiveWeightShrink(0.5)], max_epochs=2)
    _, first, second = capsys.readouterr().out.split("lightning-normdyn: targets")
    assert "net.3.weight" not in first
    assert "net.3.weight" in second
