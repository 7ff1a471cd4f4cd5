"""The first look at a run: which panels, and in which axes."""

from __future__ import annotations

import pytest
from histories import converging_run

from lightning_normdyn import plots
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History

pytest.importorskip("matplotlib")


def test_panels_are_what_was_recorded():
    _, axes = plots.plot_overview(converging_run())
    assert [ax.get_title() for ax in axes] == [
        "Effective learning rate",
        "Angular update",
        "Weight norm",
        "Angular update over its prediction",
    ]
    only_norms = History()
    only_norms.append(0, {"weight_norm/a": 1.0}, optimizer_step=1)
    fig, axes = plots.plot_overview(only_norms)
    assert [ax.get_title() for ax in axes] == ["Weight norm"]
    assert len(fig.axes) == 1


def test_too_few_axes_are_refused():
    with pytest.raises(NormDynError, match="4 panels, and `ax` holds 0"):
        plots.plot_overview(converging_run(), ax=[])
