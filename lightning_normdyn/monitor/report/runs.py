"""Runs to report on, read from whatever recorded them: a history, a CSV log, an offline W&B run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History, load_history
from lightning_normdyn.storage import is_remote

_RUNS = "a history file (.npz), a folder with metrics.csv, or an offline W&B run"


_MOST_COLUMNS = 10_000


_MOST_STEPS = 2**53


_CSV_STEP, _WANDB_STEPS = "step", ("trainer/global_step", "_step")


_READ_SECONDS = 300


def load_run(path: str | os.PathLike[str]) -> History:
    """Read a run, whoever wrote it down.

    Args:
        path: a history file (``.npz``), a CSV log (``metrics.csv`` or the ``version_N`` folder with
            it), or an offline W&B run (the folder
            ``offline-run-*`` or its ``.wandb`` file; needs ``wandb``). A folder that holds a
            history file is read from that. Of what lies
            at a URL (``s3://``), the history file.

    Raises:
        NormDynError: where there is no such run, or it is damaged; nothing in it is executed.
    """
    if is_remote(path):
        return load_history(path)
    path = Path(path)
    if path.is_dir():
        path = _run_in(path)
    if not path.is_file():
        raise NormDynError(f"there is no run `{path}`; name {_RUNS}.")
    if path.suffix == ".wandb":
        return _load_wandb(path)
    if path.suffix == ".csv":
        return _load_csv(path)
    return load_history(path)


def _run_in(folder: Path) -> Path:
    for pattern in ("*.npz", "metrics.csv", "*.wandb"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise NormDynError(
                f"`{folder}` holds {len(found)} runs; name one of "
                f"{', '.join(str(each) for each in found[:3])}."
            )
    below = sorted(
        {
            str(each.parent)
            for pattern in ("*.npz", "metrics.csv", "*.wandb")
            for each in folder.glob(f"*/{pattern}")
        }
    )
    hint = f"below it there is {', '.join(below[:3])}" if below else f"name {_RUNS}"
    raise NormDynError(f"`{folder}` holds no run; {hint}.")


def _load_csv(path: Path) -> History:
    rows: dict[int, dict[str, float]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            if _CSV_STEP not in names:
                raise NormDynError(
                    f"`{path}` is no CSV log of Lightning: it has no column `{_CSV_STEP}`."
                )
            if len(names) > _MOST_COLUMNS or len(set(names)) < len(names):
                found = f"{len(names)} columns, {len(set(names))} of them different"
                raise NormDynError(
                    f"`{path}` has {found}; up to {_MOST_COLUMNS} are read, each with a name of "
                    f"its own."
                )
            for cells in reader:
                if len(cells) != len(names):
                    raise NormDynError(
                        f"`{path}` is damaged: line {reader.line_num} has {len(cells)} cells under "
                        f"{len(names)} names."
                    )
                try:
                    values = {
                        name: float(cell) for name, cell in zip(names, cells, strict=True) if cell
                    }
                    step = int(values.pop(_CSV_STEP))
                except (ValueError, KeyError, OverflowError) as error:
                    raise NormDynError(
                        f"`{path}` is damaged: line {reader.line_num} is no row of numbers with a "
                        f"step ({error})."
                    ) from error
                rows.setdefault(step, {}).update(values)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise NormDynError(f"`{path}` cannot be read as a CSV log ({error}).") from error
    return _as_history(rows, path)


def _load_wandb(path: Path) -> History:
    """W&B's own reader, in a process of its own: the format of ``.wandb`` files is nobody else's
    business."""
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
    }
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path.resolve())]
    # Files, not pipes: a long run need not fit in memory, and a process that the reader left behind
    # cannot hold us up.
    with tempfile.TemporaryFile() as records, tempfile.TemporaryFile() as messages:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=records,
                stderr=messages,
                env=environment,
                timeout=_READ_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise NormDynError(
                f"W&B's reader did not finish `{path}` within {_READ_SECONDS} seconds."
            ) from error
        messages.seek(0)
        said = messages.read().decode(errors="replace").strip()
        if "No module named" in said or "No such command" in said:
            raise NormDynError(f"reading `{path}` needs W&B's reader; `pip install 'wandb>=0.30'`.")
        if done.returncode or "corrupt" in said:
            raise NormDynError(
                f"`{path}` cannot be read as a W&B run: "
                f"{said.splitlines()[-1] if said else 'its reader failed'}."
            )
        records.seek(0)
        history = _parse_wandb(records, path)
    if "incomplete" in said:
        history.meta["note"] = "The run was still active, or was interrupted."
    return history


def _parse_wandb(lines: Iterable[bytes], path: Path) -> History:
    rows: dict[int, dict[str, float]] = {}
    config: dict[str, Any] = {}
    try:
        for line in lines:
            record = json.loads(line)
            if record["type"] == "history":
                item = record["history"]["item"]
                step = int(next(item[key] for key in _WANDB_STEPS if key in item))
                rows.setdefault(step, {}).update(_numbers(item))
            elif record["type"] == "run":
                config.update(record["run"].get("config", {}).get("update", {}))
            elif record["type"] == "config":
                config.update(record["config"].get("update", {}))
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        StopIteration,
        RecursionError,
        OverflowError,
    ) as error:
        raise NormDynError(
            f"`{path}` cannot be read as a W&B run: its reader gave something unknown "
            f"({type(error).__name__}: {error})."
        ) from error
    history = _as_history(rows, path)
    settings = config.get("normdyn")
    if isinstance(settings, dict):
        history.meta.update(settings)
    return history


def _numbers(item: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers of a row that W&B's reader gave: no bookkeeping, and no parts of
    histograms, tables and pictures."""
    media = tuple(key.removesuffix("_type") for key in item if key.endswith("._type"))
    found: dict[str, float] = {}
    for key, value in item.items():
        if key.startswith("_") or key == _WANDB_STEPS[0] or (media and key.startswith(media)):
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key] = value
        elif value in ("Infinity", "-Infinity", "NaN"):
            found[key] = float(value)
    return found


def _as_history(rows: Mapping[int, Mapping[str, float]], path: Path) -> History:
    """A history of rows by step. What was logged twice for a step (a run that crashed and went on)
    stands there once, the later one."""
    if not rows:
        raise NormDynError(f"`{path}` holds no logged rows.")
    if len({key for row in rows.values() for key in row}) > _MOST_COLUMNS:
        raise NormDynError(
            f"`{path}` holds more than {_MOST_COLUMNS} different series; this is no log of layers."
        )
    if not -_MOST_STEPS < min(rows) <= max(rows) < _MOST_STEPS:
        raise NormDynError(f"`{path}` is damaged: its steps go from {min(rows)} to {max(rows)}.")
    history = History()
    try:
        for step in sorted(rows):
            history.append(
                step, rows[step], optimizer_step=int(rows[step].get("normdyn/optimizer_step", step))
            )
        return history
    except (ValueError, OverflowError) as error:
        raise NormDynError(
            f"`{path}` is damaged: a number in it is none that a run can log ({error})."
        ) from error
