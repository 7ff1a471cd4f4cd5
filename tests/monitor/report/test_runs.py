"""A path names the runs at it and below it; what is no run is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from histories import reported_run

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.report.runs import load_run, runs_in


def test_a_run_is_its_history_file_or_the_folder_with_it(tmp_path):
    path = reported_run().save(tmp_path / "run" / "history.npz")
    assert list(load_run(path)) == list(load_run(path.parent)) == list(reported_run())


def test_a_folder_without_a_run_says_so(tmp_path):
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "images.npz", images=np.zeros(3))
    with pytest.raises(NormDynError, match="holds no run, nor does any folder below it"):
        load_run(tmp_path)
    with pytest.raises(NormDynError, match="there is no run"):
        load_run(tmp_path / "nowhere")


def test_runs_are_found_any_number_of_levels_down(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros(3))
    deep = reported_run().save(tmp_path / "a" / "b" / "version_0" / "history.npz")
    assert runs_in(tmp_path) == [deep]
    assert list(load_run(tmp_path)) == list(reported_run())
    again = reported_run().save(deep.with_name("history.fit2.npz"))
    near = reported_run().save(tmp_path / "c" / "history.npz")
    # The copy beside the log of a logger is no other run.
    reported_run().save(tmp_path / "c" / "csv" / "history.npz")
    assert runs_in(tmp_path) == sorted([deep, again, near])
    assert runs_in(deep) == [str(deep)]
    assert runs_in("s3://bucket/run") == ["s3://bucket/run"]


def test_a_folder_with_two_runs_asks_which(tmp_path):
    reported_run().save(tmp_path / "a.npz")
    reported_run().save(tmp_path / "b.npz")
    with pytest.raises(NormDynError, match=r"holds 2 runs; name one of .*a\.npz, .*b\.npz"):
        load_run(tmp_path)
