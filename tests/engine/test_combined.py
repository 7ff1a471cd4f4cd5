"""What callbacks do to a weight, taken together."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from cases import AddsGroup, without_second
from models import fit, make

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    NormDynWarning,
    RadialProjection,
    StepBracket,
    WeightRescaling,
)
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
    assert table["net.8.weight"].endswith("measured")


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
