"""One HTML file about one or several runs: pictures, comparisons, and the table of all layers.

The file needs no network and no server; it may be mailed. Everything that comes from a run is
escaped, and the page's own security policy allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from string import Template

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.compare import plot_compare
from lightning_normdyn.monitor.plots.heat_map import plot_heatmap
from lightning_normdyn.monitor.plots.layers import (
    plot_angular_update,
    plot_effective_lr,
    shared_limits,
)
from lightning_normdyn.monitor.plots.norm_ridge import plot_norm_ridge
from lightning_normdyn.monitor.quantities import monitored, shown_in
from lightning_normdyn.monitor.report.layers import LayerSummary, summaries
from lightning_normdyn.monitor.report.pictures import has_curve, picture
from lightning_normdyn.storage import replacing


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
    layers = {label: summaries(label, history) for label, history in runs.items()}
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
    limits = {
        quantity: shared_limits(list(runs.values()), quantity)
        for quantity in (*shown_in("curves"), *shown_in("report map"))
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
    pictures = []
    for quantity in shown_in("comparison"):
        having = {label: history for label, history in runs.items() if has_curve(history, quantity)}
        if len(having) > 1:
            say(f"comparing {quantity}")
            pictures.append(
                picture(plot_compare(having, quantity)[0], f"{quantity} of {', '.join(having)}")
            )
    if not pictures:
        return ""
    note = "Median over the scale-invariant layers that all runs have; the band holds the middle 80 % of them."
    return f'<section><h2>Runs compared</h2><p>{note}</p><div class="pictures">{"".join(pictures)}</div></section>'


def _section(label: str, history: History, limits: Mapping[str, tuple[float, float] | None]) -> str:
    pictures = []
    for quantity in shown_in("curves"):
        if has_curve(history, quantity):
            draw = (
                plot_angular_update
                if quantity == "angular_update"
                else partial(plot_effective_lr, quantity=quantity)
            )
            fig, _ = draw(history, limits=limits[quantity])
            pictures.append(picture(fig, f"{quantity} of {label}"))
    for quantity in shown_in("report map"):
        if has_curve(history, quantity):
            fig, _ = plot_heatmap(history, quantity=quantity, limits=limits[quantity])
            pictures.append(picture(fig, f"{quantity} of {label}, layer by step"))
    if any(name.startswith("weight_norm/") for name in history.vector_names()):
        try:
            pictures.append(
                picture(plot_norm_ridge(history)[0], f"norms of single vectors of {label}")
            )
        except (
            NormDynError
        ) as error:  # nothing finite in it; the other pictures still tell something
            pictures.append(f"<p>{html.escape(str(error))}</p>")
    first, last = history[0], history[-1]
    facts = f"{len(history)} records from step {first['step']} to {last['step']}."
    if last["optimizer_step"] != last["step"]:  # logs other than a history do not know it
        facts += f" {last['optimizer_step']} optimizer steps."
    drawn = {quantity.name for quantity in monitored() if quantity.places or quantity.drawn_with}
    others = {key: value for key, value in last.items() if key.split("/")[0] not in drawn}
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


def _table(layers: Iterable[LayerSummary], with_run: bool) -> str:
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
