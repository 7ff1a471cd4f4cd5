"""An interruption changes nothing: a fit resumed from any of its steps ends as the fit that was
never interrupted."""

from __future__ import annotations

import functools
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from models import Net, fit, images, make

from lightning_normdyn import (
    AdaptiveWeightShrink,
    EffectiveLRReplay,
    InputSpanMonitor,
    LRDropRescaling,
    NormDynamicsMonitor,
    RadialBrake,
    RadialProjection,
    RotationControl,
    WeightDecay,
    WeightRescaling,
)
from lightning_normdyn.monitor import balance

STEPS, BATCHES = 20, 5


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch):
    """A coherence is shown after a few steps already, so that it is compared, too."""
    monkeypatch.setattr(balance, "LEAST_STEPS", 2)
    monkeypatch.setattr(balance, "LEAST_ROWS", 2)
    monkeypatch.setattr(balance, "MOST_ERROR", math.inf)


OVERFLOWS = (0, 4, 9, 11, 15)


class ByStep(Net):
    """Takes its batch by the step that it is at, so that a resumed run sees what the uninterrupted
    one saw."""

    overflows: tuple[int, ...] = ()

    def training_step(self, batch, batch_idx=0):
        step = self.trainer.global_step
        rows = slice(8 * (step % 4), 8 * (step % 4) + 8)
        dtype = self.net[0].weight.dtype
        loss = super().training_step(
            [t[rows].to(dtype) if t.is_floating_point() else t[rows] for t in images().tensors]
        )
        return loss * (float("inf") if step in self.overflows else 1.0)


class SavesEveryStep(L.Callback):
    """A checkpoint at the end of every batch, or wherever ``hook`` says."""

    def __init__(self, folder, hook="on_train_batch_end"):
        self.folder, self.paths = folder, []
        setattr(self, hook, self._save)

    def _save(self, trainer, *args):
        if (
            trainer.sanity_checking
            or (path := self.folder / f"{trainer.global_step}.ckpt") in self.paths
        ):
            return
        trainer.save_checkpoint(path)
        self.paths.append(path)


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, **{"lr": 0.02, "weight_decay": 0.5, **options})


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def dropping(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 if step < 7 else 0.1 if step < 13 else 0.02
    )


def without_decay(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@functools.cache
def recorded() -> Path:
    """The history of a fit with decay, for a fit without decay to follow."""
    monitor = NormDynamicsMonitor(1, per_vector=True, tables=False)
    decaying = make(
        ByStep,
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
        make_scheduler=dropping,
        dtype=torch.float64,
    )
    data = torch.utils.data.DataLoader(images(8 * BATCHES, torch.float64), batch_size=8)
    fit(decaying, [monitor], data, max_epochs=STEPS // BATCHES, logger=False)
    path = Path(tempfile.mkdtemp()) / "history.npz"
    monitor.history.save(path)
    return path


@dataclass
class Case:
    callbacks: Callable[[], list[Any]]
    make_optimizer: Callable[[Any], Any] = adamw
    make_scheduler: Callable[[Any], Any] | None = None


class SpanOfOtherImages(InputSpanMonitor):
    """Of a loader of its own, at fixed weights."""

    def __init__(self, every_n_epochs: int, max_samples: int) -> None:
        own = torch.utils.data.DataLoader(images(24), batch_size=8)
        super().__init__(every_n_epochs, max_samples=max_samples, dataloader=own)

    def call_model(self, module: L.LightningModule, batch: Any) -> None:
        module(batch[0].to(next(module.parameters()).dtype))


CASES = {
    "aws": Case(lambda: [AdaptiveWeightShrink(0.5)]),
    "aws-clamped": Case(lambda: [AdaptiveWeightShrink(50.0)]),
    "wrs": Case(lambda: [WeightRescaling(3, target_norm="initial")], sgd),
    "wrs-window": Case(lambda: [WeightRescaling(2, start_epoch=1, stop_epoch=3)]),
    "projection": Case(lambda: [RadialProjection()], sgd),
    "projection-cosine": Case(lambda: [RadialProjection(gate="cosine")]),
    "lr-drop": Case(lambda: [LRDropRescaling(exponent=0.3)], make_scheduler=dropping),
    "input-span": Case(lambda: [InputSpanMonitor(1, max_samples=200)]),
    "input-span of a loader": Case(lambda: [SpanOfOtherImages(1, max_samples=200)]),
    "replay": Case(lambda: [EffectiveLRReplay(recorded())], without_decay),
    "decay-corrected": Case(lambda: [WeightDecay(rate="lr_squared")], sgd, dropping),
    "decay-cautious": Case(lambda: [WeightDecay(cautious=True)], make_scheduler=dropping),
    "aws-match": Case(lambda: [AdaptiveWeightShrink("match")], sgd),
    "rotation": Case(lambda: [RotationControl(0.05)], make_scheduler=dropping),
    "rotation-smooth": Case(
        lambda: [RotationControl(0.05, smoothing=0.9, norm="free", follows="sqrt_lr")],
        sgd,
        dropping,
    ),
    "floor and brake": Case(
        lambda: [
            RotationControl(0.1, bound="at_least", norm="free", granularity="filter"),
            RadialBrake(0.25, 0.5),
        ]
    ),
    "monitor": Case(lambda: [], make_scheduler=dropping),
    "all": Case(
        lambda: [
            AdaptiveWeightShrink(50.0),
            RadialProjection(),
            WeightRescaling(3),
            InputSpanMonitor(2, max_samples=99),
        ],
        sgd,
        dropping,
    ),
    "aws and lr-drop": Case(
        lambda: [AdaptiveWeightShrink(5.0), LRDropRescaling(exponent=0.3)], sgd, dropping
    ),
}


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two nested states are not bit for bit the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        if list(map(str, a)) != list(map(str, b)):
            yield f"{path}: keys {[*a]} and {[*b]}"
        for key in a:
            if key in b:
                yield from differences(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            yield f"{path}: {len(a)} and {len(b)} entries"
        for i, pair in enumerate(zip(a, b, strict=False)):
            yield from differences(*pair, f"{path}/{i}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (
            a.dtype != b.dtype
            or a.shape != b.shape
            or not torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30))
        ):
            yield f"{path}: {a} and {b}"
    elif path.endswith(("/position/1", "/extra/digest")):
        # Lightning's own count, which depends on the hook in which a checkpoint is saved, and a
        # digest of it
        pass
    elif path.endswith("header"):  # of a history: JSON
        yield from differences(
            *(
                {**json.loads(header), "meta": settled(json.loads(header)["meta"])}
                for header in (a, b)
            ),
            path,
        )
    elif a != b and not (a != a and b != b):
        yield f"{path}: {a} and {b}"


def settled(meta: dict[str, Any]) -> dict[str, Any]:
    """Without verdicts and the sizes at the end, since a fit that was finished when the checkpoint
    was saved judges nothing; and without the strength of AWS at the first row, which a checkpoint
    saved within the end of that very batch does not know yet. A forecast is of the steps of its
    own fit, and is made once its first row has arrived."""
    moving = ("verdict", "finding", "ratio", "treated")
    # Left out and not emptied: which of them comes first depends on when each was known.
    lasting = {key: value for key, value in meta.items() if key not in ("forecast", "groups")}
    return {
        **lasting,
        "targets": {
            n: {k: v for k, v in t.items() if k not in moving}
            for n, t in meta.get("targets", {}).items()
        },
    }


def rows_of(callback: Any) -> dict[str, Any]:
    history = callback.history
    vectors = {
        name: [torch.from_numpy(part) for part in history.vectors(name)]
        for name in history.vector_names()
    }
    return {
        "rows": list(history),
        "events": [tuple(event) for event in history.events],
        "vectors": vectors,
    }


def everything(module: Net, trainer: L.Trainer, callbacks: list[Any]) -> dict[str, Any]:
    """All that a resumed run has to have in common with the uninterrupted one."""
    return {
        "weights": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "callbacks": {c.state_key: c.state_dict() for c in callbacks},
        "histories": [
            rows_of(c)
            for c in callbacks
            if hasattr(c, "history") and not isinstance(c, EffectiveLRReplay)
        ],
        "metrics": {k: v for k, v in trainer.callback_metrics.items() if k.startswith("normdyn/")},
    }


def go(
    case: Case,
    every: int,
    scaler: str,
    saver: Any = None,
    saves: str = "last",
    ckpt_path: Any = None,
    val_data: Any = None,
    **arguments: Any,
) -> Any:
    """One fit of 20 steps; with a gradient scaler some of them are skipped."""
    callbacks = [*case.callbacks(), NormDynamicsMonitor(every, per_vector=True, tables=False)]
    inserted = [] if saver is None else [saver]
    dtype, plugins, make_optimizer = torch.float64, [], case.make_optimizer
    if scaler:
        dtype = torch.float32
        plugins = [
            MixedPrecision(
                "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
            )
        ]
    if (
        scaler == "fused"
        # not SGD: after a skipped first step torch's fused one reads a momentum that nobody has
        # written
    ):
        make_optimizer = lambda p: adamw(p, fused=True)  # noqa: E731
    module = make(
        ByStep, make_optimizer=make_optimizer, make_scheduler=case.make_scheduler, dtype=dtype
    )
    module.overflows = OVERFLOWS if scaler else ()
    trainer = fit(
        module,
        [*inserted, *callbacks] if saves == "first" else [*callbacks, *inserted],
        torch.utils.data.DataLoader(images(8 * BATCHES, dtype), batch_size=8),
        val_data,
        ckpt_path=ckpt_path,
        plugins=plugins,
        **{"max_epochs": STEPS // BATCHES, "logger": False, **arguments},
    )
    return everything(module, trainer, callbacks)


def check(
    case: Case,
    every: int,
    scaler: str,
    saves: str,
    folder: Any,
    hook: str = "on_train_batch_end",
    steps: Any = None,
) -> None:
    saver = SavesEveryStep(folder, hook)
    expected = go(case, every, scaler, saver, saves)
    assert len(saver.paths) >= (STEPS if hook == "on_train_batch_end" else 4)
    for path in saver.paths if steps is None else [saver.paths[i] for i in steps]:
        if path == saver.paths[-1] and any(
            isinstance(c, InputSpanMonitor) for c in case.callbacks()
        ):
            # Lightning never comes back to the end of an epoch that was the last, where this
            # callback measures.
            continue
        found = [*differences(expected, go(case, every, scaler, ckpt_path=path))]
        assert not found, (path.name, found[:5])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("saves", ["first", "last"])
def test_a_fit_with_all_callbacks_and_skipped_steps_resumes_from_some_of_its_steps(saves, tmp_path):
    check(CASES["all"], 5, "scaler", saves, tmp_path, steps=[0, 7, 14, 19])


@pytest.mark.parametrize(
    "case",
    [
        "rotation-smooth",
        "decay-corrected",
        pytest.param("floor and brake", marks=pytest.mark.slow),
        pytest.param("decay-cautious", marks=pytest.mark.slow),
        pytest.param("aws-match", marks=pytest.mark.slow),
    ],
)
def test_what_steers_steps_resumes_from_some_of_them(case, tmp_path):
    check(CASES[case], 5, "scaler", "last", tmp_path, steps=[0, 14])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", ["monitor", "lr-drop"])
def test_expectations_and_balances_go_on(case, tmp_path):
    rows = go(CASES[case], 3, "")["histories"][-1]["rows"]
    shown = {key.split("/")[0] for row in rows for key in row}
    assert {"expected_ratio", "expected_weight_norm", "matrix_angle", "norm_drift"} <= shown
    assert {"coherence", "balance_ratio", "loss_decay", "balanced_angular_update"} <= shown
    # The rate falls at the steps 7 and 13: between two rows, and just before or after a save.
    check(CASES[case], 3, "", "last", tmp_path, steps=[6, 7, 13])


def every_case_and_scaler():
    for case, scaler in itertools.product(CASES, ["", "scaler", "fused"]):
        # The replay refuses AdamW, which is the fused optimizer here; and for the gate by cosines
        # one optimizer is enough.
        if scaler == "fused" and case in ("replay", "projection-cosine"):
            continue
        yield case, scaler


@pytest.mark.slow
@pytest.mark.pairwise
@pytest.mark.parametrize("saves", ["first", "last"])
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize(("case", "scaler"), list(every_case_and_scaler()))
def test_a_fit_resumes_from_every_step(case, every, scaler, saves, tmp_path):
    check(CASES[case], every, scaler, saves, tmp_path)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_epoch_start", "on_train_end"])
def test_a_fit_resumes_from_the_ends_of_its_epochs(hook, tmp_path):
    saver = SavesEveryStep(tmp_path, hook)
    expected = go(CASES["aws"], 3, "", saver, "last")
    assert saver.paths
    for path in saver.paths:
        if (
            hook == "on_train_epoch_start"
        ):  # plain Lightning itself goes on differently; only its rows must not end the fit
            go(CASES["aws"], 3, "", ckpt_path=path)
            continue
        found = [*differences(expected, go(CASES["aws"], 3, "", ckpt_path=path))]
        assert not found, (path.name, found[:5])


def test_rows_go_on_from_a_checkpoint_of_a_validation_in_the_middle_of_an_epoch(tmp_path):
    """Where most checkpoints are saved; Lightning's own count of batches goes on one too low
    there."""
    validates = {
        "val_data": torch.utils.data.DataLoader(images(8), batch_size=8),
        "val_check_interval": 2,
        "num_sanity_val_steps": 0,
    }
    saver = SavesEveryStep(tmp_path, "on_validation_end")
    expected = go(CASES["aws"], 3, "", saver, "last", **validates)
    assert [int(path.stem) for path in saver.paths][:4] == [2, 4, 7, 9]
    for path in saver.paths[:5]:
        again = go(CASES["aws"], 3, "", ckpt_path=path, **validates)
        assert not [*differences(expected["histories"], again["histories"])], path.name
        assert not [*differences(expected["weights"], again["weights"])], path.name


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_after_backward", "on_before_optimizer_step"]
)
def test_rows_and_counts_go_on_from_the_middle_of_a_batch(hook, tmp_path):
    """Lightning trains on such a batch again. Its running statistics have then seen it twice, with
    or without our callbacks."""
    saver = SavesEveryStep(tmp_path, hook)
    expected = go(CASES["wrs-window"], 5, "scaler", saver, "last")
    for path in [saver.paths[i] for i in (0, 5, 10, 12)]:
        again = go(CASES["wrs-window"], 5, "scaler", ckpt_path=path)
        if hook == "on_train_batch_start":
            assert not [*differences(expected, again)], path.name
        for key in ("step", "optimizer_step", "normdyn/skipped_steps"):
            assert [row[key] for row in again["histories"][0]["rows"]] == [
                row[key] for row in expected["histories"][0]["rows"]
            ]
