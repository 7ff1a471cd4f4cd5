"""Every test runs with small models, our own warnings as errors (pyproject.toml), and nothing of
W&B outside its temporary folder."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import sys
from collections import Counter
from heapq import heapify, heappop, heappush
from itertools import combinations

import pytest
import torch
from flavour import FLAVOUR, OTHER, use_flavour

from lightning_normdyn.optimizers.step import HostCopy

os.environ.setdefault("WANDB_SILENT", "true")

# A script of its own, which a test runs. To look for doctests in it would import Triton, which is
# not installed everywhere.
collect_ignore = ["geometry/compile_programs.py"]

use_flavour()

# Every Trainer reads the entry points of every installed package: a tenth of the time of a short
# fit. What is installed does not change while the tests run. Before Lightning is imported: it takes
# the function by its name.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """What imports and collection made lives until the end, so that Python's collector need not
    walk it again and again: that took a tenth of the suite's time. Garbage of the tests themselves
    is found as before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_flavour():
    """A user of ``pytorch_lightning`` imports nothing of ``lightning``."""
    yield
    if FLAVOUR != "lightning.pytorch":
        assert OTHER not in sys.modules


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items):
    """A fault shows in most members of a kind, so a few of them are enough for the quick suite: of
    a test that is marked ``sampled``, all but a sample are slow. And it shows under most
    neighbours of the two values that it needs, so of a test that is marked ``pairwise`` what the
    slow suite need not run is ``rare``.

    With ``NORMDYN_TEST_MEMBERS=1`` one parametrization of each test is enough, and the rest is rare."""
    for (_, *numbers), family in families_of(items, "sampled").items():
        # What `make test` leaves out anyway would be no sample of it.
        candidates = [item for item in family if not is_left_out(item)]
        quick = spread(candidates, *numbers)
        for item in candidates:
            if item not in quick:
                item.add_marker(pytest.mark.slow)
    for (_, *axes), family in families_of(items, "pairwise").items():
        quick = [item for item in family if not is_left_out(item)]
        slow = [item for item in family if item.get_closest_marker("slow")]
        chosen = pairwise(slow, quick, axes)
        for item in slow:
            if item not in chosen:
                item.add_marker(pytest.mark.rare)
    members = os.environ.get("NORMDYN_TEST_MEMBERS")
    if members is not None:
        for family in parametrizations(items).values():
            candidates = [item for item in family if not is_left_out(item)]
            chosen = spread(candidates, int(members))
            for item in candidates:
                if item not in chosen:
                    item.add_marker(pytest.mark.rare)
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def parametrizations(items):
    """The parametrizations of each test, by the test."""
    families = {}
    for item in items:
        if hasattr(item, "callspec"):
            test, _, _ = item.nodeid.partition("[")
            families.setdefault(test, []).append(item)
    return families


def families_of(items, name):
    """The parametrizations of each test with the mark ``name``, by the test and the mark's
    arguments."""
    families = {}
    for test, family in parametrizations(items).items():
        mark = family[0].get_closest_marker(name)
        if mark is not None:
            families[(test, *mark.args)] = family
    return families


def is_left_out(item):
    """Whether `make test` does not run it."""
    return bool(item.get_closest_marker("slow") or item.get_closest_marker("deepspeed"))


def values_of(item):
    """The value that the item has on each axis of its test.

    By identity: values need not be comparable, and all combinations hold the same objects.
    """
    return [(name, id(value)) for name, value in item.callspec.params.items()]


def scattered(items):
    """The items in an order that jumps (multiples of the golden section): neighbours are alike, so
    the first of a list would be a poor sample."""
    order = sorted(range(len(items)), key=lambda i: i * 0.6180339887 % 1)
    return [items[i] for i in order]


def pairwise(items, done, axes):
    """So many of the items that any two values of two axes occur together, as far as they do in
    all of them.

    Args:
        items: parametrizations of one test.
        done: others of the same test, whose pairs need no further member.
        axes: names; of all pairs only those with a value of one of these axes count. None: all.
    """

    def pairs_of(item):
        pairs = combinations(values_of(item), 2)
        return {pair for pair in pairs if not axes or any(name in axes for name, _ in pair)}

    seen = set().union(*map(pairs_of, done))
    # The member with the most new pairs first. What a member brings only becomes less while others
    # are chosen, so one that is still the best when it is looked at anew is the best of all.
    queue = []
    for place, item in enumerate(scattered(items)):
        pairs = pairs_of(item)
        queue.append((-len(pairs), place, item, pairs))
    heapify(queue)
    chosen = set()
    while queue:
        _, place, item, pairs = heappop(queue)
        new = len(pairs - seen)
        if new and queue and -new > queue[0][0]:
            heappush(queue, (-new, place, item, pairs))
        elif new:
            seen |= pairs
            chosen.add(item)
    return chosen


def spread(items, number=None):
    """So many of the items that each value of each axis occurs about equally often.

    Args:
        items: the parametrizations of one test.
        number: how many; None: as many as the longest axis has, so that each value occurs.
    """
    axes = {item: values_of(item) for item in items}
    if number is None:
        values = Counter(name for name, _ in set().union(*axes.values()))
        number = max(values.values())
    left = scattered(items)
    used = Counter()
    chosen = []
    while left and len(chosen) < number:
        best = min(left, key=lambda item: sum(used[value] for value in axes[item]))
        left.remove(best)
        used.update(axes[best])
        chosen.append(best)
    return chosen


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """A test leaves no file in the repository and no W&B setting behind."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    # Tables are read whole, whatever terminal or worker runs the tests.
    monkeypatch.setenv("COLUMNS", "200")
    # WandbLogger(offline=True) sets this for the whole process.
    monkeypatch.setenv("WANDB_MODE", "offline")
    torch.manual_seed(0)
    yield
    # What a test has compiled is not compiled for the next one: claims ask torch.compile's
    # counters.
    if "torch._dynamo.utils" in sys.modules:
        sys.modules["torch._dynamo.utils"].counters.clear()


@pytest.fixture(params=["at once", "later"])
def arrival(request, monkeypatch):
    """Both ways for numbers to come to the host: from the CPU, and as from a GPU, one batch
    later."""
    if request.param == "later":
        monkeypatch.setattr(HostCopy, "arrives_later", True)


@pytest.fixture(scope="module")
def _no_settings_left():
    # W&B keeps the settings of its first use in a process, and the examples' tests use it as a
    # person would who is logged in.
    import wandb

    wandb.finish()
    wandb.teardown()


@pytest.fixture
def _no_run_left(monkeypatch, _no_settings_left):
    # MLflow 3 wants a database, which its light package (mlflow-skinny) does not bring; and it
    # would report its use to its makers.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    yield
    # Only tests of loggers import it: it takes a while.
    import wandb

    wandb.finish()
