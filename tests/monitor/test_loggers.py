"""What each logger gets, read back with that logger's own reader."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from models import ManualNet, Net, SavesAt, fit, loader, make
from ranks import run_ranks

from lightning_normdyn import AdaptiveWeightShrink, NormDynamicsMonitor
from lightning_normdyn.errors import NormDynWarning
from lightning_normdyn.monitor.history import History, load_history
from lightning_normdyn.monitor.loggers import publish_alert, publish_outcome
from lightning_normdyn.monitor.outcome import Outcome
from lightning_normdyn.monitor.report.runs import load_run
from lightning_normdyn.optimizers.step import HostCopy

NAMES = ["net.0.weight", "net.3.weight", "net.8.weight"]


INVARIANT = NAMES[:2]


VECTORS = {"net.0.weight": 4, "net.3.weight": 6, "net.8.weight": 2}


# Of every weight, beside the ratio to what is expected of it.
LOGGED = ("angular_update", "effective_lr", "direction_lr", "weight_norm")


OF_ALL = (*LOGGED, "effective_step_size", "gradient_cosine", "radial_update", "equilibrium_ratio")


# Under SGD: the learning rate that its directions follow.
PICTURES = (
    "angular_update",
    "direction_lr",
    "weight_norm",
    "matrix_angle",
    "heat_map_direction_lr",
    "heat_map_expected_ratio",
)


pytestmark = pytest.mark.usefixtures("_no_run_left")


def wandb_logger(folder: Path, **arguments: Any) -> WandbLogger:
    settings = wandb.Settings(x_disable_stats=True, console="off", silent=True)
    return WandbLogger(
        project="tests", offline=True, save_dir=str(folder), settings=settings, **arguments
    )


class WandbRun:
    """An offline run as W&B's own reader gives it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        output = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=1000
        ).stdout
        records = [json.loads(line) for line in output.splitlines()]
        self.kinds = [record["type"] for record in records]
        self.history = [
            record["history"]["item"] for record in records if record["type"] == "history"
        ]
        self.alerts = [record["alert"] for record in records if record["type"] == "alert"]
        self.id = next(record["run"]["run_id"] for record in records if record["type"] == "run")
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        for record in records:
            if record["type"] in ("run", "config"):
                changes = (
                    record["run"].get("config", {}) if record["type"] == "run" else record["config"]
                )
                self.config.update(changes.get("update", {}))
            elif record["type"] == "summary":
                self.summary.update(record["summary"].get("update", {}))

    def rows(self, key: str = "normdyn/weight_norm") -> list[dict[str, Any]]:
        return [item for item in self.history if key in item]

    def curve(self, key: str) -> dict[int, float]:
        """Values by x; a second value at an x replaces the first one."""
        return {item["trainer/global_step"]: item[key] for item in self.history if key in item}

    def media(self, key: str) -> Path:
        return self.folder / "files" / self.rows(f"{key}.path")[-1][f"{key}.path"]

    def table(self, key: str) -> list[dict[str, Any]]:
        content = json.loads(self.media(key).read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def wandb_runs(folder: Path) -> list[WandbRun]:
    wandb.teardown()  # its service may still be writing when finish() returns
    return [
        WandbRun(each)
        for each in sorted(
            (folder / "wandb").glob("offline-run-*"), key=lambda each: each.stat().st_ctime_ns
        )
    ]


def by_weight(keys: Iterable[str]) -> dict[str, set[str]]:
    """Quantities of each weight among log keys; histograms apart."""
    found: dict[str, set[str]] = {name: set() for name in NAMES}
    for key in keys:
        quantity, _, name = key.partition("/")
        if name in found and not quantity.endswith("_histogram"):
            found[name].add(quantity)
    return found


def same_rows(run: WandbRun, history: History) -> None:
    """The W&B rows say what the history says, at the same x, though not all of it."""
    rows = run.rows()
    assert [row["trainer/global_step"] for row in rows] == [row["step"] for row in history]
    for row, expected in zip(rows, history, strict=True):
        overview = {key for key in expected if key.startswith("normdyn/")}
        assert overview <= row.keys()
        assert row["normdyn/optimizer_step"] == expected["optimizer_step"]
        for quantities in by_weight(row).values():
            assert {"angular_update", "weight_norm"} <= quantities
        for key in row.keys() & expected.keys():
            assert row[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-30), key


class Memory(Logger):
    """A logger that the package does not know: it takes numbers and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("nobody asked for this")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert all(type(value) is float for value in metrics.values())
        assert step is not None
        self.calls.append((step, metrics))


@pytest.fixture(scope="module")
def full(tmp_path_factory, _no_settings_left):
    """One run with everything switched on, shared because starting W&B takes seconds."""
    folder = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(folder))
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr("lightning_normdyn.monitor.refresh.SHARE", 1e9)
        monitor = NormDynamicsMonitor(1, histograms=True, per_vector=True, pictures_every_n_steps=5)
        logger = wandb_logger(folder)
        logger.log_hyperparams({"batch_size": 8})
        module = make()
        printed = io.StringIO()
        with redirect_stdout(printed):
            fit(module, [AdaptiveWeightShrink(0.1), monitor], logger=logger, max_epochs=3)
        wandb.finish()
    norms = {
        name: float(weight.flatten(1).norm(dim=1).mean())
        for name, weight in module.named_parameters()
        if weight.ndim > 1
    }
    return SimpleNamespace(
        run=wandb_runs(folder)[0],
        history=monitor.history,
        norms=norms,
        printed=printed.getvalue(),
    )


def test_wandb_has_five_series_of_every_weight_and_the_overview_at_their_steps(full):
    overview = {f"normdyn/{name}" for name in (*OF_ALL, "skipped_steps", "clamped_vectors")}
    for row in full.run.rows():
        assert overview <= row.keys()
        of_weights = by_weight(row)
        for name in INVARIANT:
            assert of_weights[name] == {*LOGGED, "expected_ratio"}
        # Of a head nothing is expected, and twelve steps are too few for a balance.
        is_late = row["trainer/global_step"] >= 6
        assert of_weights["net.8.weight"] == {*LOGGED, *(["norm_drift"] if is_late else [])}
    assert list(full.run.curve("effective_lr/net.0.weight")) == list(range(12))
    same_rows(full.run, full.history)


def deep(layers: int) -> torch.nn.Sequential:
    """Linear layers in front of BatchNorm, and a head of whose weight nothing is expected."""
    net = torch.nn.Sequential(torch.nn.Flatten())
    for index in range(layers - 1):
        net.append(torch.nn.Linear(36 if index == 0 else 4, 4, bias=False))
        net.append(torch.nn.BatchNorm1d(4))
    return net.append(torch.nn.Linear(4, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "decay"), [(30, 0.01), (160, 0.0)])
def test_a_deep_run_read_back_has_five_keys_of_every_weight(layers, decay, tmp_path):
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=decay)

    module = make(net=deep(layers), make_optimizer=optimizer)
    monitor = NormDynamicsMonitor(2, tables=False)
    fit(module, [monitor], logger=wandb_logger(tmp_path), max_epochs=3)
    wandb.finish()
    [run] = wandb_runs(tmp_path)
    weights = [name for name, weight in module.named_parameters() if weight.ndim > 1]
    assert len(weights) == layers
    of_weights: dict[str, set[str]] = {name: set() for name in weights}
    for row in run.rows():
        for key in row:
            quantity, _, name = key.partition("/")
            if name in of_weights:
                of_weights[name].add(quantity)
    *invariant, head = of_weights.values()
    assert all(quantities == {*LOGGED, "expected_ratio"} for quantities in invariant)
    assert head == {*LOGGED, "norm_drift"}


def test_a_matrix_keeps_the_one_chart_of_its_balance():
    """Large enough to know it early in the fit."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 32))
    seen = Memory()
    fit(make(net=net), [NormDynamicsMonitor(5, tables=False)], logger=seen, max_epochs=40)
    names = {key.split("/")[0] for _, row in seen.calls for key in row if key.endswith("1.weight")}
    assert names == {*LOGGED, "balance_ratio"}


def test_wandb_gets_one_row_per_logging_step_and_one_for_all_that_is_no_number(full):
    ours = [
        item
        for item in full.run.history
        if any(key.split("/")[0].startswith(("normdyn", "weight_norm")) for key in item)
    ]
    # The table of targets at the start, what has come of it by then, twice, and in the end.
    assert len(ours) == len(full.history) + 4
    assert ours[-1]["trainer/global_step"] == 11


def test_wandb_histograms_hold_every_vector_where_it_lies(full):
    for name, count in VECTORS.items():
        steps, norms = full.history.vectors(f"weight_norm/{name}")
        rows = full.run.rows(f"weight_norm_histogram/{name}._type")
        assert [row["trainer/global_step"] for row in rows] == steps.tolist()
        for row, values in zip(rows, norms, strict=True):
            edges, counts = (
                row[f"weight_norm_histogram/{name}.bins"],
                row[f"weight_norm_histogram/{name}.values"],
            )
            assert len(edges) == len(counts) + 1
            assert sum(counts) == count
            assert edges[0] < values.min() <= values.max() < edges[-1]
            moved = np.abs(np.cumsum(np.histogram(values, edges)[0]) - np.cumsum(counts)).max()
            assert moved <= 1  # a value on an edge may fall to either side
    for row in full.run.rows("angular_update_histogram/net.3.weight._type"):
        assert sum(row["angular_update_histogram/net.3.weight.values"]) == 6


def test_wandb_table_has_a_row_per_layer(full):
    rows = full.run.table("normdyn_tables/layers")
    assert [row["weight"] for row in rows] == NAMES
    assert [row["vectors"] for row in rows] == list(VECTORS.values())
    assert [row["scale-invariant"] for row in rows] == ["filter", "filter", "no"]
    assert rows[0]["treated how"].startswith("AWS")
    for row in rows:
        norms = full.history.column(f"weight_norm/{row['weight']}")[1]
        last = full.norms[row["weight"]]  # taken anew after the last step
        assert (row["norm first"], row["norm last"]) == pytest.approx((norms[0], last))
        assert row["angular update"] == pytest.approx(
            full.history.column(f"angular_update/{row['weight']}")[1][-1]
        )
    assert rows[0]["prediction"] > 0
    assert rows[2]["prediction"] is None


@pytest.mark.parametrize(
    "quantity", ["direction_lr", "angular_update", "weight_norm", "equilibrium_ratio"]
)
def test_wandb_chart_has_a_line_per_layer(full, quantity):
    key = f"normdyn_charts/{quantity}"
    panel = full.run.config[f"_wandb.visualize.{key}"]["panel_config"]
    assert panel["panelDefId"] == "wandb/lineseries/v0"
    assert panel["stringSettings"] == {"title": f"{quantity} of all layers", "xname": "step"}
    rows = full.run.table(f"{key}_table")
    for name in INVARIANT if quantity == "equilibrium_ratio" else NAMES:
        steps, values = full.history.column(f"{quantity}/{name}")
        key = f"{NAMES.index(name) + 1} {name}"
        line = [(row["step"], row["lineVal"]) for row in rows if row["lineKey"] == key]
        assert [x for x, _ in line] == steps.tolist()
        assert [y for _, y in line] == pytest.approx(values.tolist())


def test_wandb_has_the_pictures_as_charts_that_one_can_zoom_into(full):
    for picture in PICTURES:
        chart = json.loads(full.run.media(f"normdyn_pictures/{picture}").read_text())
        kinds = {trace["type"] for trace in chart["data"]}
        assert kinds == {"heatmap" if picture.startswith("heat_map") else "scatter"}


def test_wandb_has_pictures_where_there_is_no_such_chart(full):
    from PIL import Image

    with Image.open(full.run.media("normdyn_pictures/norm_ridge")) as image:
        assert min(image.size) > 200
        assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_wandb_gets_what_is_looked_at_first_during_the_run_too(full):
    steps = {}
    for kind in ("pictures/angular_update", "pictures/matrix_angle", "tables/layers"):
        key = f"normdyn_{kind}"
        steps[kind] = [row["trainer/global_step"] for row in full.run.rows(f"{key}.path")]
    assert steps == {
        "pictures/angular_update": [4, 9, 11],
        "pictures/matrix_angle": [11],
        "tables/layers": [4, 9, 11],
    }
    assert len(full.run.rows("normdyn_charts/angular_update_table.path")) == 1


def test_wandb_config_holds_settings_alone_and_keeps_what_was_there(full):
    config = full.run.config
    assert config["batch_size"] == 8
    assert list(config["normdyn"]) == ["callbacks"]
    callbacks = config["normdyn"]["callbacks"]
    assert callbacks["AdaptiveWeightShrink"]["alpha"] == 0.1
    assert callbacks["AdaptiveWeightShrink"]["params"] == ["auto"]
    assert callbacks["NormDynamicsMonitor"]["every_n_steps"] == 1


def test_wandb_has_the_facts_about_weights_as_a_table(full):
    rows = full.run.table("normdyn_tables/targets")
    assert [row["weight"] for row in rows] == NAMES
    assert [row["number"] for row in rows] == ["1", "2", "3"]
    first = rows[0]
    assert (first["shape"], first["scale-invariant"], first["vectors"]) == ("4×1×3×3", "filter", 4)
    assert first["follows"] == "direction_lr"
    assert first["treated how"].startswith("AWS")


def test_the_start_says_how_to_lay_out_the_page_of_wandb(full):
    (line,) = [line for line in full.printed.splitlines() if "workspace" in line]
    assert "`python -m lightning_normdyn workspace ENTITY/tests`" in line
    assert "sorts charts by name" in line


def test_wandb_summary_holds_the_last_overview(full):
    last = full.history[-1]
    for quantity in ("weight_norm", "angular_update", "equilibrium_ratio", "effective_lr"):
        assert full.run.summary[f"normdyn/{quantity}"] == pytest.approx(last[f"normdyn/{quantity}"])


def test_the_history_lies_beside_a_wandb_run_and_report_reads_it(full):
    assert not list((full.run.folder / "files").glob("*.npz"))  # what lies there is uploaded
    again = load_run(full.run.folder)
    assert list(again) == list(full.history)
    assert again.meta["targets"].keys() == set(NAMES)


@pytest.mark.slow
def test_what_the_last_logging_step_missed_is_in_the_summary(tmp_path):
    monitor = NormDynamicsMonitor(3, tables=False)
    fit(make(), [monitor], logger=wandb_logger(tmp_path), max_epochs=2)
    wandb.finish()
    [run] = wandb_runs(tmp_path)
    assert list(run.curve("normdyn/weight_norm")) == [2, 5]
    assert [row["step"] for row in monitor.history] == [0, 2, 5, 7]
    assert run.summary["normdyn/weight_norm"] == pytest.approx(
        monitor.history[-1]["normdyn/weight_norm"]
    )


class Crash(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 6:
            raise RuntimeError("crash")


@pytest.mark.slow
def test_resume_after_a_crash_continues_the_curves(tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        fit(
            make(),
            [NormDynamicsMonitor(1, tables=False), SavesAt(4, "at4.ckpt"), Crash()],
            logger=wandb_logger(tmp_path, id="same"),
            max_epochs=3,
        )
    wandb.finish()
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(
        make(),
        [monitor],
        logger=wandb_logger(tmp_path, id="same", resume="allow"),
        ckpt_path="at4.ckpt",
        max_epochs=3,
    )
    wandb.finish()
    first, second = wandb_runs(tmp_path)
    assert first.id == second.id == "same"
    assert list(first.curve("weight_norm/net.0.weight")) == [0, 1, 2, 3, 4, 5]
    assert list(second.curve("weight_norm/net.0.weight")) == list(range(4, 12))
    # W&B may show steps 4 and 5 twice, with the same values; the history has them once.
    assert [row["step"] for row in monitor.history] == list(range(12))
    assert [row["optimizer_step"] for row in monitor.history] == list(range(1, 13))
    for key in ("weight_norm/net.0.weight", "angular_update/net.3.weight"):
        curve = {**first.curve(key), **second.curve(key)}
        assert [curve[step] for step in range(12)] == pytest.approx(
            monitor.history.column(key)[1].tolist(), rel=1e-6
        )
        assert first.curve(key)[4] == pytest.approx(second.curve(key)[4], rel=1e-6)
    reference = NormDynamicsMonitor(1, tables=False)
    fit(make(), [reference], max_epochs=3)
    key = "angular_update/net.0.weight"
    assert monitor.history.column(key)[1].tolist() == pytest.approx(
        reference.history.column(key)[1].tolist(), rel=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["accumulation", "two optimizers"])
def test_wandb_rows_under(kind, tmp_path):
    monitor = NormDynamicsMonitor(1, tables=False)
    arguments = {"accumulate_grad_batches": 2} if kind == "accumulation" else {}
    module = make(ManualNet if kind == "two optimizers" else Net)
    fit(module, [monitor], logger=wandb_logger(tmp_path), max_epochs=2, **arguments)
    wandb.finish()
    [run] = wandb_runs(tmp_path)
    same_rows(run, monitor.history)
    steps = list(range(4 if kind == "accumulation" else 8))
    for name in NAMES:
        assert list(run.curve(f"angular_update/{name}")) == steps


def fit_on_two_ranks(folder: Path) -> tuple[int, int]:
    monitor = NormDynamicsMonitor(1, histograms=True, tables=False, alert=True)
    mlflow = MLFlowLogger(save_dir=str(folder / "mlruns"))
    loggers = [
        wandb_logger(folder),
        TensorBoardLogger(folder / "tb"),
        CSVLogger(folder / "csv"),
        mlflow,
    ]
    runner = fit(
        make(),
        [AdaptiveWeightShrink(0.1), monitor],
        logger=loggers,
        strategy="ddp",
        devices=2,
        max_epochs=2,
    )
    if runner.is_global_zero:
        monitor.history.save(folder / "expected.npz")
    wandb.finish()
    return len(monitor.history), runner.global_step


@pytest.mark.slow
def test_of_two_ranks_one_publishes(tmp_path):
    assert run_ranks(fit_on_two_ranks, args=(tmp_path,)) == {0: (4, 4), 1: (0, 4)}
    [run] = wandb_runs(tmp_path)
    same_rows(run, load_history(tmp_path / "expected.npz"))
    assert sum(run.rows()[0]["weight_norm_histogram/net.3.weight.values"]) == 6
    assert "normdyn" in run.config
    assert len(list((tmp_path / "tb").rglob("events.out*"))) == 1
    assert len(list((tmp_path / "csv").rglob("metrics.csv"))) == 1
    [mlflow] = [folder.parent for folder in (tmp_path / "mlruns").glob("*/*/metrics")]  # one run
    assert (mlflow / "artifacts" / "normdyn" / "history.npz").exists()


def test_wandb_gets_each_alert(tmp_path):
    logger = wandb_logger(tmp_path)
    for name in NAMES:
        publish_alert([logger, CSVLogger(tmp_path), Memory()], "Weights collapse", f"of {name}")
    wandb.finish()
    [run] = wandb_runs(tmp_path)
    assert [(alert["title"], alert["level"], alert["text"]) for alert in run.alerts] == [
        ("Weights collapse", "WARN", f"of {name}") for name in NAMES
    ]


class Dying(Net):
    """Two filters of the first layer get no gradient, and decay would end them within the run."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)
        with torch.no_grad():
            self.net[1].weight[:2] = 0
        self.net[1].weight.requires_grad_(False)

    def configure_optimizers(self):
        groups = [
            {"params": self.net[0].parameters(), "weight_decay": 6.0},
            {"params": self.net[2:].parameters()},
        ]
        return torch.optim.SGD(groups, lr=0.1)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("wanted", [True, False])
def test_a_collapse_is_alerted_if_asked_for(wanted, monkeypatch):
    sent = []
    monkeypatch.setattr(
        "lightning_normdyn.monitor.alarms.publish_alert",
        lambda *arguments: sent.append(arguments[1:]),
    )
    with pytest.warns(NormDynWarning, match="only shrink"):
        fit(make(Dying), [NormDynamicsMonitor(1, tables=False, alert=wanted)], max_epochs=30)
    assert [title for title, _ in sent] == (["Weights collapse"] if wanted else [])
    assert all("net.0.weight" in text for _, text in sent)


def test_a_disabled_wandb_run_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = WandbLogger(save_dir=str(tmp_path), settings=wandb.Settings(mode="disabled"))
    fit(
        make(), [NormDynamicsMonitor(1, histograms=True, tables=False)], logger=logger, max_epochs=1
    )
    assert not list(tmp_path.rglob("history*"))


def tensorboard(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    )
    reader.Reload()
    return reader


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """TensorBoard, CSV and an unknown logger at once."""
    folder = tmp_path_factory.mktemp("several")
    loggers = [TensorBoardLogger(folder, name="tb"), CSVLogger(folder, name="csv"), Memory()]
    monitor = NormDynamicsMonitor(2, histograms=True, per_vector=True, tables=False)
    fit(make(), [AdaptiveWeightShrink(0.1), monitor], logger=loggers, max_epochs=2)
    return SimpleNamespace(
        tb=Path(loggers[0].log_dir),
        csv=Path(loggers[1].log_dir),
        memory=loggers[2],
        history=monitor.history,
    )


def logged(history: History) -> list[dict[str, float]]:
    """The rows that belong to a logging step of every second step."""
    return [row for row in history if row["step"] % 2 == 1]


def test_an_unknown_logger_gets_scalars_in_one_call_per_logging_step(several):
    assert (
        [step for step, _ in several.memory.calls]
        == [row["step"] for row in logged(several.history)]
        == [1, 3, 5, 7]
    )
    for (_, values), row in zip(several.memory.calls, logged(several.history), strict=True):
        overview = {key for key in row if key.startswith("normdyn/")}
        assert overview <= values.keys() <= {*row, "normdyn/optimizer_step"}
        assert all(len(quantities) in (4, 5) for quantities in by_weight(values).values())


def test_tensorboard_has_scalars(several):
    reader = tensorboard(several.tb)
    keys = {f"{quantity}/{name}" for quantity in LOGGED for name in NAMES}
    keys |= {f"normdyn/{quantity}" for quantity in OF_ALL}
    assert keys <= set(reader.Tags()["scalars"])
    assert "radial_update/net.0.weight" not in reader.Tags()["scalars"]
    assert "hp_metric" not in reader.Tags()["scalars"]
    for key in ("effective_lr/net.0.weight", "normdyn/angular_update"):
        expected = [(row["step"], pytest.approx(row[key])) for row in logged(several.history)]
        assert [(event.step, event.value) for event in reader.Scalars(key)] == expected


def test_tensorboard_has_histograms(several):
    reader = tensorboard(several.tb)
    assert set(reader.Tags()["histograms"]) == {
        f"{q}_histogram/{n}" for q in ("weight_norm", "angular_update") for n in NAMES
    }
    steps, norms = several.history.vectors("weight_norm/net.3.weight")
    for event in reader.Histograms("weight_norm_histogram/net.3.weight"):
        values = norms[steps.tolist().index(event.step)]
        found = event.histogram_value
        assert found.num == sum(found.bucket) == 6
        assert found.min <= values.min() <= values.max() <= found.max
        assert found.sum / found.num == pytest.approx(values.mean(), rel=0.1)
        assert found.sum_squares / found.num == pytest.approx((values**2).mean(), rel=0.2)


def test_tensorboard_has_pictures_and_tables(several):
    reader = tensorboard(several.tb)
    assert set(reader.Tags()["images"]) == {f"normdyn/{name}" for name in (*PICTURES, "norm_ridge")}
    [image] = reader.Images("normdyn/angular_update")
    assert image.step == 7
    assert min(image.width, image.height) > 200
    texts = {
        tag: reader.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
        for tag in ("normdyn/callbacks", "normdyn/targets", "normdyn/layers")
    }
    assert "alpha = `0.1`" in texts["normdyn/callbacks"]
    for name in NAMES:
        assert name in texts["normdyn/targets"]
        assert name in texts["normdyn/layers"]


def test_csv_has_scalars_and_pictures_beside_them(several):
    with open(several.csv / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7]
    for row, expected in zip(rows, logged(several.history), strict=True):
        for key in ("effective_lr/net.0.weight", "normdyn/equilibrium_ratio"):
            assert float(row[key]) == pytest.approx(expected[key], rel=1e-6)
    assert {path.stem for path in several.csv.glob("*.png")} == {*PICTURES, "norm_ridge"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in several.csv.glob("*.png"))


@pytest.mark.parametrize("which", ["csv", "tb"])
def test_report_reads_the_folder_of_the_logger(several, which):
    assert list(load_run(getattr(several, which))) == list(several.history)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:mlflow")
def test_mlflow(tmp_path):
    store = str(tmp_path / "mlruns")
    first = MLFlowLogger(save_dir=store)
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(make(), [AdaptiveWeightShrink(0.1), monitor], logger=first, max_epochs=2)
    client, run = first.experiment, first.run_id
    for key in ("effective_lr/net.0.weight", "normdyn/equilibrium_ratio"):
        found = [(metric.step, metric.value) for metric in client.get_metric_history(run, key)]
        assert found == [
            (row["step"], pytest.approx(row[key], rel=1e-6)) for row in monitor.history
        ]
    params = client.get_run(run).data.params
    assert params["normdyn/AdaptiveWeightShrink/alpha"] == "0.1"
    names = {Path(each.path).name for each in client.list_artifacts(run, "normdyn")}
    assert names == {f"{name}.png" for name in PICTURES} | {
        "about.json",
        "layers.json",
        "history.npz",
    }
    about = json.loads(Path(client.download_artifacts(run, "normdyn/about.json")).read_text())
    assert list(about["targets"]) == NAMES
    assert list(load_history(client.download_artifacts(run, "normdyn/history.npz"))) == list(
        monitor.history
    )

    # The same run again, with another alpha: a parameter of MLflow cannot change, and that is no
    # reason to fail.
    again = MLFlowLogger(save_dir=store, run_id=run)
    fit(
        make(),
        [AdaptiveWeightShrink(0.2), NormDynamicsMonitor(1, tables=False)],
        logger=again,
        max_epochs=1,
    )
    assert client.get_run(run).data.params == params


def test_without_a_logger_the_history_is_all_there_is(tmp_path):
    monitor = NormDynamicsMonitor(1, histograms=True, tables=False)
    fit(make(), [monitor], max_epochs=1)
    assert len(monitor.history) == 4
    assert {"callbacks", "targets", "forecast"} <= set(monitor.history.meta)
    assert not list(tmp_path.iterdir())


def test_a_fast_dev_run_publishes_nothing(tmp_path):
    monitor = NormDynamicsMonitor(1, histograms=True, tables=False)
    fit(make(), [monitor], logger=CSVLogger(tmp_path), fast_dev_run=True)
    assert len(monitor.history) == 1
    assert not list(tmp_path.rglob("*.*"))


def test_only_what_was_asked_for_is_published(tmp_path):
    memory, logger = Memory(), CSVLogger(tmp_path)
    monitor = NormDynamicsMonitor(1, quantities=["effective_lr"], tables=False)
    fit(make(), [monitor], logger=[memory, logger], max_epochs=1)
    quantities = {key.split("/")[0] for _, values in memory.calls for key in values} - {"normdyn"}
    assert quantities == {"effective_lr"}
    assert {path.stem for path in Path(logger.log_dir).glob("*.png")} == {
        "effective_lr",
        "heat_map_effective_lr",
    }


def test_two_monitors_do_not_overwrite_each_other(tmp_path):
    logger = CSVLogger(tmp_path)
    monitors = [NormDynamicsMonitor(1, params=name, tables=False) for name in INVARIANT]
    fit(make(), monitors, logger=logger, max_epochs=1)
    for monitor, file in zip(monitors, ("history.npz", "history-1.npz"), strict=True):
        assert list(load_history(Path(logger.log_dir) / file)) == list(monitor.history)
    assert (Path(logger.log_dir) / "angular_update-1.png").exists()


def test_without_matplotlib_it_says_what_is_left_out_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    loggers = [CSVLogger(tmp_path, name="one"), CSVLogger(tmp_path, name="two")]
    with pytest.warns(NormDynWarning, match="matplotlib is not installed") as said:
        fit(make(), [NormDynamicsMonitor(1, tables=False)], logger=loggers, max_epochs=1)
    assert len([each for each in said if each.category is NormDynWarning]) == 1
    assert not list(tmp_path.rglob("*.png"))
    assert len(list(tmp_path.rglob("history.npz"))) == 2


def test_a_picture_that_fails_does_not_end_the_fit(tmp_path, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lightning_normdyn.monitor.loggers._write_png", fail)
    with pytest.warns(
        NormDynWarning, match=r"CSVLogger did not get pictures and tables \(OSError: disk full\)"
    ):
        runner = fit(
            make(), [NormDynamicsMonitor(1, tables=False)], logger=CSVLogger(tmp_path), max_epochs=1
        )
    assert runner.state.finished


def test_an_empty_history_publishes_nothing(tmp_path):
    publish_outcome([CSVLogger(tmp_path)], Outcome(History(), [], ["effective_lr"]))
    assert not list(tmp_path.iterdir())


def test_a_logger_prefix_is_kept_everywhere(tmp_path):
    logger = TensorBoardLogger(tmp_path, prefix="mine")
    fit(
        make(), [NormDynamicsMonitor(1, histograms=True, tables=False)], logger=logger, max_epochs=1
    )
    tags = tensorboard(Path(logger.log_dir)).Tags()
    for kind in ("scalars", "histograms", "images", "tensors"):
        assert tags[kind]
        assert all(tag.startswith("mine-") for tag in tags[kind] if tag != "mine-epoch"), kind


def test_one_transfer_to_the_host_per_logging_step(monkeypatch):
    """However many weights, quantities, histograms and optimizers: counted are copies to the host,
    and tensors that leave as Python numbers without one."""
    leaving: list[tuple[int, ...]] = []
    real = torch.Tensor.tolist
    real_copy = HostCopy.__init__
    monitor = NormDynamicsMonitor(1, histograms=True, tables=False)

    def tolist(self: torch.Tensor) -> Any:
        leaving.append(tuple(self.shape))
        return real(self)

    def copy(self: HostCopy, tensor: torch.Tensor) -> None:
        leaving.append(tuple(tensor.shape))
        real_copy(self, tensor)

    class Watch(Memory):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            super().log_metrics(metrics, step)
            counted.append(len(leaving))
            leaving.clear()

    counted: list[int] = []
    monkeypatch.setattr("torch.Tensor.tolist", tolist)
    monkeypatch.setattr(HostCopy, "__init__", copy)
    fit(
        make(ManualNet),
        [AdaptiveWeightShrink(0.1), monitor],
        logger=Watch(),
        data=loader(32 * 8),
        max_epochs=1,
    )
    assert counted[20:] == [1] * len(
        counted[20:]
    )  # the first steps also question what the graph claims
    assert len(counted) == 32
    assert os.environ["WANDB_MODE"] == "offline"


class LogsItsOwn(Net):
    """A LightningModule whose own metrics have the names of our quantities, in every hook of a
    batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("weight_norm", 7.0, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.log("angular_update", 8.0)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("turn_mrad", 9.0, on_step=False, on_epoch=True, prog_bar=True)

    def on_train_epoch_end(self):
        self.log("equilibrium_ratio", 10.0)


class LogsDifferently(Net):
    """A LightningModule that means something else by ``log``."""

    def log(self, message):
        raise AssertionError("the user's own `log` was called")


def bar_of(rich: bool) -> Any:
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

    class Keeps(RichProgressBar if rich else TQDMProgressBar):
        def get_metrics(self, trainer, pl_module):
            self.seen = super().get_metrics(trainer, pl_module)
            return self.seen

    return Keeps()


@pytest.mark.parametrize("rich", [False, True])
def test_the_users_own_metrics_stay_theirs(rich, capsys):
    bar, watch = bar_of(rich), NormDynamicsMonitor(1, tables=False)
    told = fit(
        make(LogsItsOwn), [watch, bar], enable_progress_bar=True, log_every_n_steps=1
    ).callback_metrics
    theirs = {
        "weight_norm": 7.0,
        "angular_update": 8.0,
        "turn_mrad": 9.0,
        "equilibrium_ratio": 10.0,
    }
    assert {key: float(told[key]) for key in theirs} == theirs
    assert {key for key in told if key.startswith("normdyn/")} <= {
        "normdyn/angular_update",
        "normdyn/expected_ratio",
        "normdyn/equilibrium_ratio",
        "normdyn/balance_ratio",
    }
    last = watch.history[-1]
    assert float(told["normdyn/angular_update"]) == pytest.approx(last["normdyn/angular_update"])
    assert (bar.seen["weight_norm"], bar.seen["turn_mrad"]) == (7.0, 9.0)
    assert bar.seen["normdyn/weight_norm"] == pytest.approx(last["normdyn/weight_norm"])
    assert bar.seen["normdyn/turn_mrad"] == pytest.approx(1e3 * last["normdyn/angular_update"])


def test_everything_of_ours_carries_the_prefix():
    watch = NormDynamicsMonitor(1, tables=False)
    runner = fit(make(), [watch, AdaptiveWeightShrink(0.5)])
    ours = {*runner.callback_metrics, *runner.progress_bar_metrics, *runner.logged_metrics}
    assert ours >= {"normdyn/angular_update", "normdyn/weight_norm"}
    assert all(key.startswith("normdyn/") for key in ours)


def test_a_module_that_means_something_else_by_log_is_not_asked():
    runner = fit(make(LogsDifferently), [NormDynamicsMonitor(1, tables=False)])
    assert "normdyn/angular_update" in runner.callback_metrics


@pytest.mark.parametrize("key", ["normdyn/angular_update", "normdyn/equilibrium_ratio"])
def test_early_stopping_and_checkpoints_read_our_metrics(key, tmp_path):
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    stopping = EarlyStopping(key, patience=5, check_on_train_epoch_end=True)
    keeping = ModelCheckpoint(tmp_path, monitor=key, save_top_k=1)
    decays = make(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1))
    fit(
        decays, [NormDynamicsMonitor(1, tables=False), stopping, keeping], enable_checkpointing=True
    )
    assert torch.isfinite(stopping.best_score)
    assert torch.isfinite(keeping.best_model_score)
