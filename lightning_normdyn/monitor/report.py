"""One HTML file about one or several runs: pictures, comparisons, and the table of all layers.

The file needs no network and no server; it may be mailed. Everything that comes from a run is
escaped, and the page's own security policy
allows no script but its own.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History, load_history
from lightning_normdyn.storage import is_remote, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWN = ("effective_lr", "angular_update", "weight_norm", "weight_std")
_MAPPED = ("effective_lr", "angular_update", "equilibrium_ratio")
_COMPARED = ("effective_lr", "direction_lr", "angular_update", "equilibrium_ratio", "weight_norm")
_LAYER_QUANTITIES = (
    "weight_norm",
    "weight_std",
    "effective_lr",
    "direction_lr",
    "angular_update",
    "equilibrium_ratio",
    "gradient_cosine",
)
_RUNS = "a history file (.npz), a folder with metrics.csv, or an offline W&B run"
_MOST_COLUMNS = 10_000
_MOST_STEPS = 2**53
_CSV_STEP, _WANDB_STEPS = "step", ("trainer/global_step", "_step")
_READ_SECONDS = 300


# ------------------------------------------------------------------------------------- reading runs


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


# -------------------------------------------------------------------------------------- the numbers


class _Layer(NamedTuple):
    run: str
    name: str
    kind: str
    vectors: int | None
    first_norm: float | None
    last_norm: float | None
    effective_lr: float | None
    angular_update: float | None
    prediction: float | None
    ratio: float | None
    said: str | None
    """What the monitor said of it at the end of the fit, which knows more than the curves do."""

    @property
    def verdict(self) -> str:
        if self.said and self.said != "-":
            return self.said
        if self.ratio is None:
            return "–"
        return (
            "as predicted"
            if 0.9 <= self.ratio <= 1.1
            else "turns faster"
            if self.ratio > 1
            else "turns slower"
        )


def _layers(label: str, history: History) -> list[_Layer]:
    targets = history.meta.get("targets")
    keys = history.keys()
    names = dict.fromkeys(
        key.split("/", 1)[1]
        for key in keys
        if key.split("/")[0] in _LAYER_QUANTITIES and "/" in key
    )

    def values(quantity: str, name: str) -> list[float]:
        key = f"{quantity}/{name}"
        return history.column(key)[1].tolist() if key in keys else []

    layers = []
    for name in names:
        about = targets.get(name) if isinstance(targets, dict) else None
        about = about if isinstance(about, dict) else {}
        vectors = about.get("vectors")
        norms = values("weight_norm", name) or values("weight_std", name)
        angle = _late(values("angular_update", name), _root_mean_square)
        prediction = _late(values("equilibrium_angular_update", name), _root_mean_square)
        layers.append(
            _Layer(
                run=label,
                name=name,
                kind=str(about.get("scale_invariant", "–")),
                vectors=vectors
                if isinstance(vectors, int) and 0 <= vectors < _MOST_STEPS
                else None,
                first_norm=norms[0] if norms else None,
                last_norm=norms[-1] if norms else None,
                effective_lr=_late(values("effective_lr", name), np.mean),
                angular_update=angle,
                prediction=prediction,
                ratio=angle / prediction
                if angle is not None and prediction
                else _late(values("equilibrium_ratio", name), np.mean),
                said=about["verdict"] if isinstance(about.get("verdict"), str) else None,
            )
        )
    return layers


def _late(values: list[float], average: Callable[[Any], Any]) -> float | None:
    """The average over the last tenth of what was recorded: the last value alone is mostly
    noise."""
    last = [value for value in values[-max(1, len(values) // 10) :] if math.isfinite(value)]
    return float(average(np.asarray(last, dtype=np.float64))) if last else None


def _root_mean_square(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


# ------------------------------------------------------------------------------------------ writing


def write_report(
    runs: Mapping[str, History],
    path: str | os.PathLike[str],
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write one self-contained HTML file about one or several runs.

    Args:
        runs: histories by label.
        path: of the HTML file; an older one is replaced only when the new one is complete.
        say: is told what is being drawn.

    Returns:
        the path.

    Raises:
        NormDynError: where there is no run, a run has nothing to show, or matplotlib is missing.
    """
    if not runs:
        raise NormDynError("a report needs at least one run, got none.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise NormDynError(
            "a report needs matplotlib; `pip install 'lightning-normdyn[plot]'`."
        ) from error
    layers = {label: _layers(label, history) for label, history in runs.items()}
    for label, history in runs.items():
        if not layers[label]:
            keys = ", ".join(history.keys()[:5]) or "nothing at all"
            raise NormDynError(
                f"run `{label}` has no curves of layers, it has {keys}; record with "
                f"`NormDynamicsMonitor`."
            )

    parts = [_comparison(runs, say)] if len(runs) > 1 else []
    # The same layer of all runs side by side, in the order of the first run that has it.
    order = {
        name: i
        for i, name in enumerate(
            dict.fromkeys(layer.name for each in layers.values() for layer in each)
        )
    }
    side_by_side = sorted(
        (layer for each in layers.values() for layer in each), key=lambda layer: order[layer.name]
    )
    parts.append(_table(side_by_side, with_run=len(runs) > 1))
    from lightning_normdyn.monitor.plots import shared_limits

    limits = {
        quantity: shared_limits(list(runs.values()), quantity) for quantity in (*_DRAWN, *_MAPPED)
    }
    sections = []
    for label, history in runs.items():
        say(f"drawing {label}")
        sections.append(_section(label, history, limits))
    parts.append(f'<div class="runs">{"".join(sections)}</div>')
    page = _PAGE.substitute(
        title=html.escape(", ".join(runs)),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_hash(_SCRIPT)}'",
        style=_STYLE,
        script=_SCRIPT,
        body="".join(parts),
    )
    with replacing(path) as file:
        file.write(page.encode("utf-8", errors="replace"))
    return Path(path)


def _comparison(runs: Mapping[str, History], say: Callable[[str], None]) -> str:
    from lightning_normdyn.monitor.plots import plot_compare

    pictures = []
    for quantity in _COMPARED:
        having = {label: history for label, history in runs.items() if _has(history, quantity)}
        if len(having) > 1:
            say(f"comparing {quantity}")
            pictures.append(
                _picture(plot_compare(having, quantity)[0], f"{quantity} of {', '.join(having)}")
            )
    if not pictures:
        return ""
    note = "Median over the scale-invariant layers that all runs have; the band holds the middle 80 % of them."
    return f'<section><h2>Runs compared</h2><p>{note}</p><div class="pictures">{"".join(pictures)}</div></section>'


def _section(label: str, history: History, limits: Mapping[str, tuple[float, float] | None]) -> str:
    from lightning_normdyn.monitor import plots

    pictures = []
    for quantity in _DRAWN:
        if _has(history, quantity):
            draw = (
                plots.plot_angular_update
                if quantity == "angular_update"
                else partial(plots.plot_effective_lr, quantity=quantity)
            )
            fig, _ = draw(history, limits=limits[quantity])
            pictures.append(_picture(fig, f"{quantity} of {label}"))
    for quantity in _MAPPED:
        if _has(history, quantity):
            fig, _ = plots.plot_heatmap(history, quantity=quantity, limits=limits[quantity])
            pictures.append(_picture(fig, f"{quantity} of {label}, layer by step"))
    if any(name.startswith("weight_norm/") for name in history.vector_names()):
        try:
            pictures.append(
                _picture(plots.plot_norm_ridge(history)[0], f"norms of single vectors of {label}")
            )
        except (
            NormDynError
        ) as error:  # nothing finite in it; the other pictures still tell something
            pictures.append(f"<p>{html.escape(str(error))}</p>")
    first, last = history[0], history[-1]
    facts = f"{len(history)} records from step {first['step']} to {last['step']}."
    if last["optimizer_step"] != last["step"]:  # logs other than a history do not know it
        facts += f" {last['optimizer_step']} optimizer steps."
    others = {
        key: value
        for key, value in last.items()
        if key.split("/")[0] not in _LAYER_QUANTITIES and not key.startswith("equilibrium_")
    }
    about = {
        "last record": {
            key: value for key, value in others.items() if key not in ("step", "optimizer_step")
        },
        **history.meta,
    }
    note = html.escape(str(history.meta.get("note", "")))
    details = html.escape(json.dumps(about, indent=1, default=str, ensure_ascii=False))
    return (
        f"<section><h2>{html.escape(label)}</h2><p>{facts} {note}</p>"
        f'<div class="pictures">{"".join(pictures)}</div>'
        f"<details><summary>Settings and last "
        f"numbers</summary><pre>{details}</pre></details></section>"
    )


def _has(history: History, *quantities: str) -> bool:
    return any(
        key.startswith(f"{quantity}/") and len(history.column(key)[0])
        for key in history.keys()  # noqa: SIM118
        for quantity in quantities
    )


def _picture(fig: Figure, alt: str) -> str:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from"
        )  # a name in a script the font lacks
        fig.savefig(file, format="png", dpi=110)
    return f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


_COLUMNS = (
    ("weight", "the parameter's name"),
    ("scale-invariant", "per filter, group or layer"),
    ("vectors", "weight vectors in it"),
    ("norm, first", "at the first record"),
    ("norm, last", "at the last record"),
    ("effective LR", "mean over the last tenth of the records"),
    ("angular update", "radians per step, root mean square over the last tenth of the records"),
    ("prediction", "radians per step, for the same records"),
    ("ratio", "angular update over prediction"),
    ("verdict", "of the monitor at the end of the fit; else as predicted: within 10 %"),
)
_OFF = ("turns", "collapsing", "frozen", "not finite")
"""How the verdicts begin that a reader should not miss."""


def _table(layers: Iterable[_Layer], with_run: bool) -> str:
    columns = ((("run", "label of the run"),) if with_run else ()) + _COLUMNS
    head = "".join(
        f'<th scope="col" title="{html.escape(hint, quote=True)}"><button '
        f'type="button">{name}</button></th>'
        for name, hint in columns
    )
    rows = []
    for layer in layers:
        cells = [_text_cell(layer.run, "run")] if with_run else []
        cells += [_text_cell(layer.name, "name"), _text_cell(layer.kind)]
        numbers = (
            layer.vectors,
            layer.first_norm,
            layer.last_norm,
            layer.effective_lr,
            layer.angular_update,
            layer.prediction,
            layer.ratio,
        )
        cells += [_number_cell(number) for number in numbers]
        cells.append(_text_cell(layer.verdict, "off" if layer.verdict.startswith(_OFF) else ""))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = "Click a heading to sort. Numbers other than norms are averages over the last tenth of the records."
    return (
        f"<section><h2>Layers at the end</h2><p>{note}</p><div "
        f'class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _text_cell(text: str, style: str = "") -> str:
    return (
        f'<td class="{style}">{html.escape(text)}</td>'
        if style
        else f"<td>{html.escape(text)}</td>"
    )


def _number_cell(number: float | None) -> str:
    if number is None:
        return '<td class="number">–</td>'
    if math.isnan(number):  # recorded: the run diverged
        return '<td class="number">NaN</td>'
    return f'<td class="number" data-number="{float(number)!r}">{number:.3g}</td>'


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 1.5rem auto; padding: 0 1.5rem; max-width: 1800px; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; overflow-wrap: anywhere; }
p { max-width: 60rem; color: #444; }
img { display: block; max-width: 100%; margin: 0.8rem 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 600px), 1fr)); gap: 0 1rem; align-items: start; }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 620px), 1fr)); gap: 0 2rem; align-items: start; }
.runs > section { min-width: 0; }
.wide { overflow: auto; max-height: 32rem; border: 1px solid #ccc; }
table { border-collapse: collapse; font-size: 0.88rem; width: 100%; }
th { position: sticky; top: 0; background: #f1f3f5; text-align: left; white-space: nowrap; }
th button { font: inherit; font-weight: 600; border: 0; background: none; padding: 0.4rem 0.6rem; cursor: pointer; text-align: inherit; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
td { padding: 0.22rem 0.6rem; border-top: 1px solid #e6e6e6; overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.run { min-width: 4.5rem; } td.name { min-width: 11rem; } td:last-child { min-width: 7.5rem; }
td.off { color: #a33c00; font-weight: 600; }
tbody tr:hover { background: #f6f9fc; }
pre { overflow: auto; max-height: 30rem; background: #f6f6f6; padding: 0.8rem; font-size: 0.8rem; }
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => {
      const cell = row.cells[column];
      return cell.classList.contains("number") ? parseFloat(cell.dataset.number ?? "NaN") : cell.textContent;
    };
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (typeof x === "number") {
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);  // what is missing comes last, either way
        return up ? x - y : y - x;
      }
      return (up ? 1 : -1) * x.localeCompare(y, undefined, {numeric: true});
    };
    body.append(...[...body.rows].sort(order));
  }));
}
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Weight dynamics: $title</title><style>$style</style></head>
<body><h1>Weight dynamics: $title</h1>
<p>How far each step turns the weights. Under SGD the direction follows the learning rate of the direction, η/‖w‖²; under Adam-like
optimizers it follows the effective learning rate, η/‖w‖.
A layer far from its prediction, or far from the other layers, is worth a look.</p>
$body
<script>$script</script></body></html>
""")
