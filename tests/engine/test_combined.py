"""What callbacks do to a weight, taken together."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from models import fit, make

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
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
