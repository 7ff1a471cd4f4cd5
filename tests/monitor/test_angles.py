"""Medians of measured, predicted and expected angles are of the same layers at the same steps."""

from __future__ import annotations

import numpy as np
import pytest
from histories import converging_run, run_with_heads

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.angles import compared_angles
from lightning_normdyn.monitor.history import History


def test_medians_are_of_the_same_weights_at_every_step():
    history = History()
    for step in range(4):
        # "a" is measured and predicted always, "b" measured at every other step only.
        row = {"angular_update/a": 1.0, "equilibrium_angular_update/a": 1.0}
        row["equilibrium_angular_update/b"] = 4.0
        if step % 2:
            row["angular_update/b"] = 2.0
            row["expected_angular_update/b"] = 3.0
        # "c" has no prediction at the start, when its rate was 0.
        row["angular_update/c"] = 9.0
        if step > 1:
            row["equilibrium_angular_update/c"] = 9.0
        history.append(step, row, optimizer_step=step + 1)
    angles = compared_angles(history)
    # Where something is expected of "b" alone, all three medians are of "b".
    np.testing.assert_allclose(angles.measured, [1.0, 2.0, 5.0, 2.0])
    np.testing.assert_allclose(angles.predicted, [1.0, 4.0, 5.0, 4.0])
    np.testing.assert_allclose(angles.expected, [np.nan, 3.0, np.nan, 3.0])


def test_without_predictions_the_scale_invariant_layers_are_compared():
    angles = compared_angles(run_with_heads(kinds=True, predicted=False))
    assert angles.which == "scale-invariant layers"
    assert angles.measured == pytest.approx(np.full(20, 0.01))
    assert angles.predicted is None
    assert angles.expected is None
    assert compared_angles(converging_run(predictions=False)).which == "all layers"


def test_a_history_without_angles_is_refused():
    with pytest.raises(NormDynError, match="`angular_update` were asked for"):
        compared_angles(History())
