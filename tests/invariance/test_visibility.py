"""Switches of the process are off again, whoever leaves first and whatever goes
wrong."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from models import Net, convnet, fit, loader, make
from torch import nn
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint

from lightning_normdyn import AdaptiveWeightShrink, InputSpanMonitor, NormDynamicsMonitor
from lightning_normdyn.invariance.visibility import eager, restored, visible_graph


def compiles() -> bool:
    """Whether torch.compile compiles."""
    torch.compiler.reset()
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    return bool(compiled)


def reentrant() -> bool:
    """Whether a reentrant checkpoint is one node of the graph."""
    x = torch.ones(2, requires_grad=True)
    return (
        checkpoint(lambda x: x.sin(), x, use_reentrant=True).grad_fn.name()
        == "CheckpointFunctionBackward"
    )


@pytest.fixture(autouse=True)
def _as_before():
    assert compiles()
    assert reentrant()
    yield
    assert compiles(), "torch.compile was left switched off for the whole process"
    assert reentrant()
    assert "apply" not in vars(checkpoints.CheckpointFunction)


def test_inside_everything_is_seen_and_afterwards_nothing_is_changed():
    with visible_graph():
        assert not compiles()
        assert not reentrant()
        with visible_graph(), eager():
            assert not reentrant()
        assert not compiles()
    with eager():
        assert not compiles()
        assert reentrant()


@pytest.mark.parametrize("first_out", ["first", "second"])
def test_two_threads_that_overlap_leave_nothing_switched(first_out):
    inside, leave = (
        {n: threading.Event() for n in ("first", "second")},
        {n: threading.Event() for n in ("first", "second")},
    )

    def watch(name: str) -> None:
        with visible_graph():
            inside[name].set()
            leave[name].wait(20)

    threads = {}
    for name in ("first", "second"):
        threads[name] = threading.Thread(target=watch, args=(name,))
        threads[name].start()
        assert inside[name].wait(20)
    assert reentrant()  # this thread watches nothing
    for name in (first_out, *({"first", "second"} - {first_out})):
        assert not compiles()
        leave[name].set()
        threads[name].join()


def test_a_stance_that_somebody_chose_meanwhile_stays_theirs():
    with visible_graph():
        theirs = torch.compiler.set_stance("eager_on_recompile")
    assert torch._dynamo.eval_frame._stance is theirs.stance
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("watch", [visible_graph, eager])
def test_an_exception_inside_switches_back(watch):
    with pytest.raises(KeyboardInterrupt), watch():
        raise KeyboardInterrupt


# ---- In a fit ----


class Fails(L.Callback):
    """Raises in one hook of the first batch; in on_exception too, before anything that stands
    behind it is asked."""

    def __init__(self, hook: str) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("the first error")

        setattr(self, hook, fail)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        raise RuntimeError("another error, in on_exception")


HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
WATCHERS: dict[str, Callable[[], Any]] = {
    "aws": lambda: AdaptiveWeightShrink(0.5),
    "monitor": lambda: NormDynamicsMonitor(1, tables=False),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("watcher", WATCHERS)
def test_another_callbacks_on_exception_that_raises_leaves_nothing_switched(watcher, hook, first):
    ours, theirs = WATCHERS[watcher](), Fails(hook)
    with pytest.raises(RuntimeError, match="another error"):
        fit(make(), [ours, theirs] if first else [theirs, ours])
    # the fixture looks at the switches


class ErrsInForward(Net):
    def training_step(self, batch: Any, batch_idx: int = 0) -> torch.Tensor:
        raise KeyError("user")


def test_an_error_of_the_model_leaves_nothing_switched_either():
    theirs = Fails("on_fit_end")
    with pytest.raises(RuntimeError, match="another error"):
        fit(make(ErrsInForward), [theirs, AdaptiveWeightShrink(0.5)])


def test_the_list_of_callbacks_is_the_users_again_after_the_watched_batches():
    seen = []

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append([type(c).__name__ for c in trainer.callbacks])

    before = [AdaptiveWeightShrink(0.5), Looks()]
    runner = fit(make(), before)
    assert runner.callbacks == before
    assert seen[-1] == ["AdaptiveWeightShrink", "Looks"]


class Meets(Net):
    """Two fits wait for each other in the first two batches, so that both watch at the same
    time."""

    barrier: threading.Barrier

    def training_step(self, batch: Any, batch_idx: int = 0) -> torch.Tensor:
        if self.trainer.global_step < 2:
            self.barrier.wait(30)
        return super().training_step(batch, batch_idx)


def test_two_trainers_in_two_threads_leave_nothing_switched_and_find_their_targets():
    Meets.barrier, found, failed = threading.Barrier(2), {}, []

    def go(name: str, epochs: int) -> None:
        try:
            watch = NormDynamicsMonitor(1, tables=False)
            net = nn.Sequential(torch.compile(convnet(), backend="eager"))
            fit(
                make(Meets, net=net),
                [watch, AdaptiveWeightShrink(0.5)],
                loader(),
                max_epochs=epochs,
            )
            found[name] = {
                n: t["scale_invariant"] for n, t in watch.history.meta["targets"].items()
            }
        except BaseException as error:
            failed.append(error)
            Meets.barrier.abort()

    threads = [
        threading.Thread(target=go, args=(name, epochs))
        for name, epochs in (("short", 1), ("long", 2))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert found["short"] == found["long"]
    assert list(found["short"].values()).count("filter") == 2


def test_the_input_span_leaves_nothing_switched():
    fit(make(), [InputSpanMonitor()], max_epochs=1)


class Moves(nn.Module):
    """Changes all that a forward pass may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        with torch.no_grad():
            self.fc.weight.add_(random.random() + np.random.rand())
        return self.fc(self.norm(x + torch.rand_like(x)))


@pytest.mark.parametrize("weights", [True, False])
def test_everything_is_put_back_also_after_an_exception(weights):
    module = Moves()
    module.norm.eval()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    calls, states = module.calls, (random.getstate(), str(np.random.get_state()))
    torch_state = torch.get_rng_state()

    def go() -> None:
        with restored(module, weights=weights):
            module.norm.train()
            module(torch.randn(4, 3))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        go()
    after = module.state_dict()
    changed = [name for name, t in after.items() if not torch.equal(t, before[name])]
    assert changed == ([] if weights else ["fc.weight"])
    assert module.calls is calls
    assert not module.norm.training
    assert (random.getstate(), str(np.random.get_state())) == states
    assert torch.equal(torch.get_rng_state(), torch_state)
