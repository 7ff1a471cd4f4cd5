"""What of the weights of an optimizer stays the same."""

from __future__ import annotations

import numpy as np
from models import fit, make
from monitoring import momentum, monitor

from lightning_normdyn.engine.effect import Effects, Shrink
from lightning_normdyn.monitor.measured_balance import SHOWN


def weights_of_a_fit():
    watch = monitor()
    fit(make(make_optimizer=momentum), [watch], max_epochs=1)
    (gauge,) = watch._member.gauges.values()
    return gauge


def test_arrays_say_of_each_weight_what_its_target_says():
    gauge = weights_of_a_fit()
    weights = gauge.weights
    for place, target in enumerate(gauge.plan.targets):
        assert weights.names[place] == target.name
        assert weights.invariant[place] == target.scale_invariant
        assert weights.entries[place] == target.entries == gauge.entries[target.name]
        assert weights.counts[place] == target.partition.n
        assert weights.lengths[place] == target.entries // target.partition.n
        shown = weights.of_matrices[SHOWN.index("coherence"), place]
        assert shown == (not target.scale_invariant)


def test_kinds_are_weights_that_share_group_shape_and_effects():
    gauge = weights_of_a_fit()
    weights, targets = gauge.weights, gauge.plan.targets
    groups = [place % 2 for place in range(len(targets))]
    shrunk = Effects(shrink=Shrink(0.1, "norm", replaces_decay=True))
    effects = [Effects()] * (len(targets) - 1) + [shrunk]
    weights.take_effects(effects)
    kinds = weights.kinds(groups)
    assert weights.kinds(list(groups)) is kinds
    together = np.concatenate([kind.weights for kind in kinds])
    assert sorted(together.tolist()) == list(range(len(targets)))
    for kind in kinds:
        for place in kind.weights.tolist():
            key = groups[place], effects[place], targets[place].matrix
            assert key == (kind.group, kind.effects, kind.shape)
    assert weights.kinds([0] * len(targets)) is not kinds
