"""One HTML file about one or several runs: pictures, comparisons, and the table of all layers.

The file needs no network and no server; it may be mailed. The page is the template ``page.html``
beside this file. Everything that comes from a run is escaped, and the page's own security policy
allows no script but its own.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.curves import as_table, notes_on_layers, recorded_curves
from lightning_normdyn.monitor.history import History, load_history
from lightning_normdyn.monitor.plots.compare import plot_compare
from lightning_normdyn.monitor.plots.layers import plot_curves, plot_heatmap, shared_limits
from lightning_normdyn.monitor.plots.vectors import plot_norm_ridge
from lightning_normdyn.monitor.quantities import monitored, shown_in
from lightning_normdyn.storage import is_remote, replacing
from lightning_normdyn.theory.words import AS_EXPECTED, times

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Limits = Mapping[str, tuple[float, float] | None]

_MOST_VECTORS = 2**53
# How the verdicts begin that a reader should not miss; "collapsing" was said by older versions.
_OFF = ("turns", "no gradient", "collapsing", "frozen", "not finite")


class Column(NamedTuple):
    """A column of the table."""

    field: str
    """Of :class:`LayerSummary`."""
    head: str
    hint: str
    style: str = "number"
    """The class of its cells."""


COLUMNS = (
    Column("run", "run", "label of the run", "run"),
    Column("name", "weight", "the parameter's name", "name"),
    Column("kind", "scale-invariant", "per filter, group or layer", ""),
    Column("vectors", "vectors", "weight vectors in it"),
    Column("first_norm", "norm, first", "at the first record"),
    Column("last_norm", "norm, last", "at the last record"),
    Column("effective_lr", "effective LR", "mean over the last tenth of the records"),
    Column(
        "angular_update",
        "angular update",
        "radians per step, root mean square over the last tenth of the records",
    ),
    Column("prediction", "prediction", "radians per step, for the same records"),
    Column("ratio", "ratio", "angular update over prediction"),
    Column(
        "now",
        "ratio now",
        "angular update over what is expected at these steps; without scale invariance, over its "
        "balance",
    ),
    Column(
        "verdict",
        "verdict",
        "of the monitor at the end of the fit; else by the ratio now, or without one by the ratio",
        "",
    ),
)


class LayerSummary(NamedTuple):
    """A layer of a run at its end; None where the run did not record a number."""

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
    now: float | None
    verdict: str

    @property
    def is_off(self) -> bool:
        """Whether its verdict is one that a reader should not miss."""
        return self.verdict.startswith(_OFF)


class Picture(NamedTuple):
    """An image that is part of the page."""

    alt: str
    png: str
    """Base64; empty where there is none, and ``alt`` says why."""


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
    # All that can be refused is refused before minutes of drawing.
    if not runs:
        raise NormDynError("a report needs at least one run, got none.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise NormDynError(
            "a report needs matplotlib; `pip install 'lightning-normdyn[plot]'`."
        ) from error

    several = len(runs) > 1
    layers = _side_by_side(runs)
    compared = list(pictures_of_all(runs, say)) if several else []
    limits = common_limits(runs)
    sections = []
    for label, history in runs.items():
        say(f"drawing {label}")
        sections.append(_section(label, history, limits))

    # A single run needs no column that says which it is.
    columns = COLUMNS if several else COLUMNS[1:]
    page = _template().render(
        title=", ".join(runs), columns=columns, layers=layers, compared=compared, sections=sections
    )
    with replacing(path) as file:
        # A name may hold half of a surrogate pair, which UTF-8 cannot express.
        file.write(page.encode("utf-8", errors="replace"))
    return Path(path)


def _side_by_side(runs: Mapping[str, History]) -> list[LayerSummary]:
    """The same layer of all runs in neighbouring rows, in the order of the first run that has
    it."""
    by_name: dict[str, list[LayerSummary]] = {}
    for label, history in runs.items():
        layers = summaries(label, history)
        if not layers:
            keys = ", ".join(history.keys()[:5]) or "nothing at all"
            raise NormDynError(
                f"run `{label}` has no curves of layers, it has {keys}; record with "
                f"`NormDynamicsMonitor`."
            )
        for layer in layers:
            by_name.setdefault(layer.name, []).append(layer)
    return [layer for layers in by_name.values() for layer in layers]


def summaries(label: str, history: History) -> list[LayerSummary]:
    """One row per layer of a run, in the order of the network."""
    measured = {quantity.name for quantity in monitored()}
    # A dict, and not a set, because it keeps the order.
    names: dict[str, None] = {}
    for key in history.keys():  # noqa: SIM118
        quantity, _, name = key.partition("/")
        if name and quantity in measured:
            names[name] = None
    return [_summary(label, name, history) for name in names]


def _summary(label: str, name: str, history: History) -> LayerSummary:
    def values(quantity: str) -> list[float]:
        recorded: list[float] = history.curve(f"{quantity}/{name}")[1].tolist()
        return recorded

    notes = notes_on_layers(history).get(name, {})
    vectors = notes.get("vectors")
    known_vectors = isinstance(vectors, int) and 0 <= vectors < _MOST_VECTORS
    # A standardized weight has no norm that matters: its standard deviation takes the place.
    norms = values("weight_norm") or values("weight_std")
    # As root mean squares, since that is what predictions are.
    angle = _late(values("angular_update"), _root_mean_square)
    prediction = _late(values("equilibrium_angular_update"), _root_mean_square)
    # Not a mean of ratios, which the steps with the smallest predictions would rule.
    ratio = _late_ratio(history, name, "equilibrium")
    now = _late_ratio(history, name, "expected")
    if now is None:
        now = _late(values("balance_ratio"), np.mean)
    return LayerSummary(
        run=label,
        name=name,
        kind=str(notes.get("scale_invariant", "–")),
        vectors=vectors if known_vectors else None,
        first_norm=norms[0] if norms else None,
        last_norm=norms[-1] if norms else None,
        effective_lr=_late(values("effective_lr"), np.mean),
        angular_update=angle,
        prediction=prediction,
        ratio=ratio,
        now=now,
        verdict=_verdict(notes.get("verdict"), now, ratio),
    )


def _late_ratio(history: History, name: str, foreseen: str) -> float | None:
    """The angular update over another angle, as root mean squares of the same records: of the last
    tenth, those with both."""
    quantities = ("angular_update", f"{foreseen}_angular_update")
    curves = {key: history.curve(f"{key}/{name}") for key in quantities}
    if not all(len(steps) for steps, _ in curves.values()):
        # A log may have the ratios alone.
        ratios: list[float] = history.curve(f"{foreseen}_ratio/{name}")[1].tolist()
        return _late(ratios, np.mean)
    _, table = as_table(curves)
    measured, other = table[:, -max(1, table.shape[1] // 10) :]
    both = np.isfinite(measured) & (other > 0)
    if not both.any():
        return None
    return _root_mean_square(measured[both]) / _root_mean_square(other[both])


def _verdict(of_monitor: object, now: float | None, ratio: float | None) -> str:
    """The monitor's, which knows more than the curves do; else how the angular update compares with
    what is expected now, or with its prediction."""
    if isinstance(of_monitor, str) and of_monitor not in ("", "-"):
        return of_monitor
    compared, what = (ratio, "predicted") if now is None else (now, "expected")
    if compared is None:
        return "–"
    low, high = AS_EXPECTED
    if low <= compared <= high:
        return f"as {what}"
    return f"turns too {'fast' if compared > 1 else 'slow'}: {times(compared)} what is {what}"


def _late(values: list[float], average: Callable[[Any], Any]) -> float | None:
    """The average over the last tenth of what was recorded: the last value alone is mostly
    noise."""
    # At least one, of however few records.
    tenth = np.array(values[-max(1, len(values) // 10) :], dtype=np.float64)
    finite = tenth[np.isfinite(tenth)]
    return float(average(finite)) if finite.size else None


def _root_mean_square(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _section(label: str, history: History, limits: Limits) -> dict[str, Any]:
    """What the page says of one run."""
    first, last = history[0], history[-1]
    facts = f"{len(history)} records from step {first['step']} to {last['step']}."
    # Logs other than a history do not count optimizer steps apart.
    if last["optimizer_step"] != last["step"]:
        facts += f" {last['optimizer_step']} optimizer steps."

    # What no picture shows is given as the numbers of the last record.
    drawn = {quantity.name for quantity in monitored() if quantity.places or quantity.drawn_with}
    others = {key: value for key, value in last.items() if key.split("/")[0] not in drawn}
    del others["step"], others["optimizer_step"]
    forecasts = _forecasts(history)
    about = {"last record": others, **history.meta}
    if forecasts:
        # It stands on the page already.
        del about["forecast"]
    return {
        "label": label,
        "facts": facts,
        "note": history.meta.get("note", ""),
        "forecasts": forecasts,
        "pictures": list(pictures_of(label, history, limits)),
        # default=str: a report is for reading, and `meta` may hold what JSON cannot express.
        "details": json.dumps(
            about,
            indent=1,
            default=str,
            ensure_ascii=False,
        ),
    }


def _forecasts(history: History) -> list[str]:
    """What the monitor has said of where norms will go: at the start, and with what the run has
    shown."""
    known = history.meta.get("forecast")
    # A file from elsewhere may hold anything there.
    if not isinstance(known, dict):
        return []
    return [text for text in (known.get("start"), known.get("end")) if isinstance(text, str)]


def common_limits(runs: Mapping[str, History]) -> Limits:
    """Of each quantity, the values that the axes of all runs hold: pictures side by side are
    compared by eye."""
    histories = list(runs.values())
    shown = (*shown_in("curves"), *shown_in("report map"))
    return {quantity: shared_limits(histories, quantity) for quantity in shown}


def pictures_of_all(runs: Mapping[str, History], say: Callable[[str], None]) -> Iterator[Picture]:
    """Several runs in one picture, a quantity each."""
    for quantity in shown_in("comparison"):
        recorded = {}
        for label, history in runs.items():
            if recorded_curves(history, quantity):
                recorded[label] = history
        # A comparison of one run would repeat its own picture.
        if len(recorded) > 1:
            say(f"comparing {quantity}")
            fig, _ = plot_compare(recorded, quantity)
            yield _picture(fig, f"{quantity} of {', '.join(recorded)}")


def pictures_of(label: str, history: History, limits: Limits) -> Iterator[Picture]:
    """The curves, heat maps and the ridge of one run, as far as it recorded them."""
    for quantity in shown_in("curves"):
        if recorded_curves(history, quantity):
            fig, _ = plot_curves(history, quantity, limits=limits[quantity])
            yield _picture(fig, f"{quantity} of {label}")
    for quantity in shown_in("report map"):
        if recorded_curves(history, quantity):
            fig, _ = plot_heatmap(
                history,
                quantity=quantity,
                limits=limits[quantity],
            )
            yield _picture(fig, f"{quantity} of {label}, layer by step")
    if any(name.startswith("weight_norm/") for name in history.vector_names()):
        try:
            fig, _ = plot_norm_ridge(history)
            yield _picture(fig, f"norms of single vectors of {label}")
        # No norm in it is finite. The other pictures of a run that diverged still tell something.
        except NormDynError as error:
            yield Picture(str(error), png="")


def _picture(fig: Figure, alt: str) -> Picture:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # PNG, not SVG: the lines of 160 layers would make a page of many megabytes.
        fig.savefig(file, format="png", dpi=110)
    return Picture(alt, base64.b64encode(file.getvalue()).decode())


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Names of layers and runs are text, whatever markup they hold.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["policy_hash"] = _policy_hash
    return environment.get_template("page.html")


def _policy_hash(script: str) -> str:
    """What a Content-Security-Policy names a script by."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def runs_in(path: str | os.PathLike[str]) -> list[str | Path]:
    """The runs that a path names: itself, or the histories in a folder, any number of levels down.

    Raises:
        NormDynError: for a folder without one.
    """
    if is_remote(path) or not Path(path).is_dir():
        return [os.fspath(path)]
    folder = Path(path)
    runs: list[Path] = []
    for place, below, files in os.walk(folder):
        # By their names: other .npz files may be data sets.
        own = sorted(fnmatch.filter(files, "history*.npz"))
        runs += [Path(place, name) for name in own]
        # Below a history lie copies of it, beside the logs of its loggers.
        below[:] = [] if own else sorted(below)
    runs = runs or sorted(folder.glob("*.npz"))
    if not runs:
        raise NormDynError(
            f"`{folder}` holds no run, nor does any folder below it; name a history file (.npz)."
        )
    return list(runs)


def load_run(path: str | os.PathLike[str]) -> History:
    """Read a run.

    Args:
        path: a history file (``.npz``), also at a URL (``s3://``), or a folder that holds one, at
            any level below it, as every logger's folder does.

    Raises:
        NormDynError: where there is no such run, several, or a damaged one; nothing in it is
            executed.
    """
    runs = runs_in(path)
    if len(runs) > 1:
        raise NormDynError(
            f"`{path}` holds {len(runs)} runs; name one of {', '.join(map(str, runs[:3]))}."
        )
    (run,) = runs
    if not is_remote(run) and not Path(run).is_file():
        raise NormDynError(f"there is no run `{path}`; name a history file (.npz) or its folder.")
    return load_history(run)
