"""Files on this machine and at URLs: complete or not there, whoever writes at the same time."""

from __future__ import annotations

import threading
from pathlib import Path

import fsspec
import pytest

from lightning_normdyn import load_history
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.report.runs import load_run
from lightning_normdyn.storage import exists, is_remote, join, read, replacing


@pytest.fixture
def remote(request):
    """A folder in fsspec's memory, which behaves as a bucket does."""
    yield f"memory://{request.node.name}"
    fsspec.filesystem("memory").store.clear()


def some_history() -> History:
    history = History()
    for step in range(5):
        history.append(step, {"weight_norm/conv.weight": 2.0 - step / 10}, optimizer_step=step + 1)
    return history


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("s3://bucket/run", True),
        ("gs://bucket", True),
        ("simplecache::s3://bucket/run", True),
        ("memory://run", True),
        ("runs/a", False),
        (Path("runs/a"), False),
        ("C:\\runs", False),
        ("C:/runs", False),
        ("a::b", False),
        ("file:///tmp/run", False),
    ],
)
def test_urls_are_told_from_paths(path, expected):
    assert is_remote(path) == expected


def test_a_history_goes_to_a_url_and_comes_back(remote, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = join(remote, "history.npz")
    assert not exists(place)
    assert some_history().save(place) == place
    assert exists(place)
    for back in (load_history(place), load_run(place)):
        assert list(back) == list(some_history())
    assert not list(tmp_path.iterdir())  # no folder named "memory:"


def test_a_file_url_is_a_path(tmp_path):
    path = some_history().save(f"file://{tmp_path}/run.npz")
    assert path == tmp_path / "run.npz"
    assert list(load_history(f"file://{path}")) == list(some_history())


@pytest.mark.parametrize("url", [True, False], ids=["url", "path"])
def test_an_interrupted_write_leaves_the_old_file(url, remote, tmp_path):
    place = join(remote if url else tmp_path, "file")

    def write(content: bytes, fails: bool) -> None:
        with replacing(place) as file:
            file.write(content)
            if fails:
                raise KeyboardInterrupt

    write(b"old", fails=False)
    with pytest.raises(KeyboardInterrupt):
        write(b"half", fails=True)
    assert read(place) == b"old"
    write(b"new", fails=False)
    assert read(place) == b"new"
    assert url or [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "place",
    ["memory://nowhere/history.npz", "nosuchscheme://bucket/history.npz", "runs/history.npz"],
)
def test_what_is_not_there_is_said_by_name(place):
    with pytest.raises(NormDynError, match=r"there is no history file|cannot be reached") as said:
        load_history(place)
    assert place in str(said.value)


def test_an_unknown_scheme_is_refused_where_it_is_written():
    with pytest.raises(NormDynError, match=r"`nosuchscheme://bucket/run\.npz` cannot be reached"):
        some_history().save("nosuchscheme://bucket/run.npz")


def test_many_threads_may_save_one_file(tmp_path):
    history, path, failed = some_history(), tmp_path / "run.npz", []

    def save() -> None:
        try:
            for _ in range(20):
                history.save(path)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert list(load_history(path)) == list(history)
    assert [each.name for each in tmp_path.iterdir()] == ["run.npz"]
