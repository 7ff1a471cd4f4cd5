"""Runs to report on, read from whatever recorded them: a history, a CSV log, an offline W&B run."""

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
# The history first: it knows more than a log of the same run.
_PATTERNS = ("*.npz", "metrics.csv", "*.wandb")
_MOST_SERIES = 10_000
# Lightning's own x axis; W&B counts calls of `log` where a run has none.
_CSV_STEP = "step"
_WANDB_STEPS = ("trainer/global_step", "_step")
_WANDB_SECONDS = 300
# Reading a file must not reach for the network.
_WANDB_OFFLINE = {
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
}

# Numbers by log key, by step. Of what was logged twice for a step (a run that crashed and went on)
# the later one stands here.
Rows = dict[int, dict[str, float]]


def load_run(path: str | os.PathLike[str]) -> History:
    """Read a run, whoever wrote it down.

    Args:
        path: a history file (``.npz``), a CSV log (``metrics.csv`` or the ``version_N`` folder with
            it), or an offline W&B run (the folder ``offline-run-*`` or its ``.wandb`` file; needs
            ``wandb``). A folder that holds a history file is read from that. Of what lies at a URL
            (``s3://``), the history file.

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
        return _as_history(_read_csv(path), path)
    return load_history(path)


def _run_in(folder: Path) -> Path:
    """The one file in a folder that holds a run: the history, if there is one."""
    for pattern in _PATTERNS:
        matches = sorted(map(str, folder.glob(pattern)))
        if len(matches) == 1:
            return Path(matches[0])
        if matches:
            raise NormDynError(
                f"`{folder}` holds {len(matches)} runs; name one of {', '.join(matches[:3])}."
            )
    below = {str(match.parent) for pattern in _PATTERNS for match in folder.glob(f"*/{pattern}")}
    hint = f"below it there is {', '.join(sorted(below)[:3])}" if below else f"name {_RUNS}"
    raise NormDynError(f"`{folder}` holds no run; {hint}.")


def _read_csv(path: Path) -> Rows:
    rows: Rows = {}
    line = 1
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            if _CSV_STEP not in names:
                raise NormDynError(
                    f"`{path}` is no CSV log of Lightning: it has no column `{_CSV_STEP}`."
                )
            if len(set(names)) < len(names):
                raise NormDynError(f"`{path}` is damaged: two of its columns have the same name.")
            # By lines, so that the message can name the one that is damaged.
            for cells in reader:
                line = reader.line_num
                # An empty cell: Lightning logged nothing under this name at this step.
                logged = [pair for pair in zip(names, cells, strict=True) if pair[1]]
                values = {name: float(cell) for name, cell in logged}
                step = int(values.pop(_CSV_STEP))
                rows.setdefault(step, {}).update(values)
    except NormDynError:
        raise
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise NormDynError(f"`{path}` cannot be read as a CSV log ({error}).") from error
    except (ValueError, KeyError, OverflowError) as error:
        raise NormDynError(
            f"`{path}` is damaged: line {line} is no row of numbers with a step ({error})."
        ) from error
    return rows


def _load_wandb(path: Path) -> History:
    # W&B's own reader, in a process of its own: the format of `.wandb` files is not documented.
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path.resolve())]
    # Files, not pipes: a long run need not fit in memory, and waiting for the end of a pipe would
    # hang on a process that the reader left behind.
    with tempfile.TemporaryFile() as records, tempfile.TemporaryFile() as messages:
        environment = {**os.environ, **_WANDB_OFFLINE}
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=records,
                stderr=messages,
                env=environment,
                timeout=_WANDB_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise NormDynError(
                f"W&B's reader did not finish `{path}` within {_WANDB_SECONDS} seconds."
            ) from error
        messages.seek(0)
        message = messages.read().decode(errors="replace").strip()
        # The reader may skip corrupt parts and report success: half a run would pass for a whole
        # one.
        if done.returncode or "corrupt" in message:
            _, _, reason = message.rpartition("\n")
            raise NormDynError(
                f"`{path}` cannot be read as a W&B run: {reason or 'its reader failed'}. That "
                "needs W&B's reader; `pip install 'wandb>=0.30'`."
            )
        records.seek(0)
        history = _parse_wandb(records, path)
    if "incomplete" in message:
        history.meta["note"] = "The run was still active, or was interrupted."
    return history


def _parse_wandb(lines: Iterable[bytes], path: Path) -> History:
    rows: Rows = {}
    meta: dict[str, Any] = {}
    try:
        for line in lines:
            record = json.loads(line)
            if record["type"] == "history":
                item = record["history"]["item"]
                step = int(next(item[key] for key in _WANDB_STEPS if key in item))
                rows.setdefault(step, {}).update(_numbers(item))
            # What the monitor wrote into W&B's config, as the run started or later.
            config = record.get("config") or record.get("run", {}).get("config", {})
            settings = config.get("update", {}).get("normdyn")
            if isinstance(settings, dict):
                meta.update(settings)
    # Another version of W&B may say anything: whatever that provokes, the run cannot be read.
    except Exception as error:
        raise NormDynError(
            f"`{path}` cannot be read as a W&B run: its reader gave something unknown "
            f"({type(error).__name__}: {error})."
        ) from error
    history = _as_history(rows, path)
    history.meta.update(meta)
    return history


def _numbers(item: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers of a row: no bookkeeping of W&B, and no parts of histograms and tables."""
    media = tuple(key.removesuffix("_type") for key in item if key.endswith("._type"))
    numbers: dict[str, float] = {}
    for key, value in item.items():
        if key.startswith(("_", *media)) or key in _WANDB_STEPS:
            continue
        # JSON has no word for what diverged; W&B writes text.
        if value in ("Infinity", "-Infinity", "NaN"):
            numbers[key] = float(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[key] = value
    return numbers


def _as_history(rows: Rows, path: Path) -> History:
    if not rows:
        raise NormDynError(f"`{path}` holds no logged rows.")
    # Each series has a cell in every row of a history, even where few rows have a number for it.
    if len({key for row in rows.values() for key in row}) > _MOST_SERIES:
        raise NormDynError(
            f"`{path}` holds more than {_MOST_SERIES} different series; this is no log of layers."
        )
    history = History()
    try:
        for step in sorted(rows):
            # Logs of other packages do not count optimizer steps.
            optimizer_step = int(rows[step].get("normdyn/optimizer_step", step))
            history.append(step, rows[step], optimizer_step=optimizer_step)
    except (ValueError, OverflowError) as error:
        raise NormDynError(
            f"`{path}` is damaged: a number in it is none that a run can log ({error})."
        ) from error
    return history
