"""Pictures of a report are drawn as far as a run recorded them, and share their scales."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from histories import reported_run

from lightning_normdyn.monitor.report.stills import (
    common_limits,
    pictures_of,
    pictures_of_all,
)

pytest.importorskip("matplotlib")


def test_one_run_has_curves_maps_and_a_ridge_as_far_as_recorded():
    history = reported_run()
    history.append_vectors(0, {"weight_norm/conv0.weight": np.arange(1.0, 9)})
    pictures = list(pictures_of("run", history, common_limits({"run": history})))
    assert [picture.alt for picture in pictures] == [
        "angular_update of run",
        "effective_lr of run",
        "weight_norm of run",
        "angular_update of run, layer by step",
        "effective_lr of run, layer by step",
        "norms of single vectors of run",
    ]
    for picture in pictures:
        assert base64.b64decode(picture.png, validate=True).startswith(b"\x89PNG")


def test_norms_that_cannot_be_drawn_are_a_sentence():
    history = reported_run()
    history.append_vectors(0, {"weight_norm/conv0.weight": np.full(3, np.nan)})
    *_, last = pictures_of("run", history, common_limits({"run": history}))
    assert last.png == ""
    assert "no vector with a finite norm" in last.alt


def test_runs_share_their_limits_and_are_compared_where_two_recorded_a_quantity():
    runs = {"one": reported_run(), "two": reported_run(factor=2.0)}
    low, high = common_limits(runs)["weight_norm"]
    assert (low, high) == pytest.approx((1.05, 12.0))
    said = []
    pictures = list(pictures_of_all(runs, said.append))
    assert [picture.alt for picture in pictures] == [
        "angular_update of one, two",
        "effective_lr of one, two",
        "weight_norm of one, two",
    ]
    assert len(said) == 3
    assert not list(pictures_of_all({"one": runs["one"]}, said.append))
