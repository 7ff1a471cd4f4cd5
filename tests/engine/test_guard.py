"""Whatever goes wrong in a watched forward pass, the watch ends."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from weakref import ref

from lightning.pytorch import Callback

from lightning_normdyn.engine.guard import Guard


class Watch:
    def __init__(self):
        self.stopped = 0
        self.guard = Guard(self.stop)

    def stop(self):
        self.stopped += 1


def test_it_stands_first_and_leaves_the_others_as_they_are():
    other, watch = Callback(), Watch()
    callbacks = [other]
    trainer = SimpleNamespace(callbacks=callbacks)
    for _ in range(2):
        watch.guard.stand_first(trainer)
    assert trainer.callbacks == [watch.guard, other]
    assert callbacks == [other]  # Lightning may be going through this list
    for _ in range(2):
        watch.guard.leave(trainer)
    assert trainer.callbacks == [other]


def test_it_ends_the_watch_at_an_exception_and_at_the_end():
    watch = Watch()
    watch.guard.on_exception(None, None, ValueError())
    watch.guard.teardown(None, None, "fit")
    assert watch.stopped == 2


def test_it_keeps_nothing_alive():
    watch = Watch()
    guard, kept = watch.guard, ref(watch)
    del watch
    gc.collect()
    assert kept() is None
    guard.teardown(None, None, "fit")
