"""What is told of a fit as a whole: its settings and weights, the table at its end with what came
of each weight, and the pictures, charts and tables that loggers show of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_normdyn.engine.plan import Target
from lightning_normdyn.engine.session import Session
from lightning_normdyn.tables import LEAST_FOLDED, name_pattern, paragraph, render
from lightning_normdyn.theory.words import Finding, folded, in_short, skeleton

from .curves import Curves, numbered, pictured, rates_followed, recorded_curves, thinned_evenly
from .history import History
from .interactive import can_interact, interactive_curves, interactive_map
from .plots.heatmap import plot_heatmap
from .plots.layers import plot_curves
from .plots.vectors import plot_norm_ridge
from .quantities import Place
from .verdicts import Course, Grounds, judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# W&B draws no more of a custom chart than this.
MOST_CHART_ROWS = 10_000
DOTS_PER_INCH = 110
MOST_NAMED = 8
"""Weights that a sentence names."""
MOST_ROWS = 20
"""Of the table at the end, the most abnormal ones first."""
_OFF = ("too fast", "too slow", "no gradient", "frozen", "not finite")

_NORMS = "norm first → last"
# The learning rates that directions follow come between these.
_COLUMNS = ("weight", "treated how", _NORMS, "angular update", "prediction")
_LAST_COLUMNS = ("e-foldings", "verdict")


# -------------------------------------------------------------------------- the run and its weights


def about_run(
    session: Session, targets: Sequence[Target], rates: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """For loggers and the history's ``meta``, as plain JSON. Every rank must call it.

    Args:
        session: the fit.
        targets: the weights.
        rates: by weight, the learning rate that its direction follows.

    Returns:
        ``"callbacks"``: settings by callback; ``"targets"``: facts by weight.
    """
    treatments = session.combined.treatments()
    facts = {}
    for target in targets:
        facts[target.name] = {
            "shape": list(target.verdict.shape),
            "scale_invariant": target.verdict.kind,
            "norms": list(target.verdict.norms),
            "vectors": target.partition.n,
            "follows": rates[target.name],
            "treated": treatments[target.weight],
        }
    about = {"callbacks": _settings(session), "targets": facts}
    # To JSON and back: a person's own callback may have settings that JSON does not know, and a
    # resumed run compares these settings with those in its checkpoint, which are JSON, too.
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(about, default=str))
    return plain


def facts_of(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `about_run` says of the weights as rows of a table, in the order of the network."""
    targets = about["targets"]
    numbers = numbered(list(targets))
    rows = []
    for name, facts in targets.items():
        rows.append(
            {
                "number": numbers[name],
                "weight": name,
                "shape": "×".join(map(str, facts["shape"])),
                "scale-invariant": facts["scale_invariant"],
                "vectors": facts["vectors"],
                "normalized by": ", ".join(facts["norms"]),
                "follows": facts["follows"],
                "treated how": facts["treated"] or "measured",
            }
        )
    return rows


def _settings(session: Session) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {}
    for member in session.members:
        rule = member.rule
        name = type(rule).__name__
        # A second callback of the class must not take the first one's place.
        if name in settings:
            name = f"{name}-{len(settings)}"
        common = {"params": rule.params, "granularity": rule.granularity}
        settings[name] = {**common, **rule.settings()}
    return settings


def summarize(
    targets: Sequence[Target],
    history: History,
    courses: Mapping[str, Course],
    grounds: Mapping[str, Grounds],
    treatments: Mapping[str, str],
    last_norms: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One row for each weight that was measured.

    Args:
        targets: the weights.
        history: the rows, which verdicts rest on.
        courses: by weight, what happened to its prediction.
        grounds: by weight, what else its verdict rests on.
        treatments: by weight, which rules act on it, in words.
        last_norms: by weight, its norm at the end: an optimizer may have stepped many times since
            its newest row.
    """
    rows = []
    numbers = numbered([target.name for target in targets])
    for target in targets:
        name = target.name
        # A weight that was never measured would give a row of nothing but dashes.
        if not history.has(f"weight_norm/{name}"):
            continue
        norms = history.column(f"weight_norm/{name}")[1].tolist()
        course = courses.get(name, Course())
        ground = grounds.get(name, Grounds())
        elapsed = course.elapsed
        if not elapsed and ground.balanced is not None:
            elapsed = ground.balanced.elapsed
        finding = judge(history, name, course, ground)
        rows.append(
            {
                "number": numbers[name],
                "weight": name,
                "scale-invariant": target.verdict.kind,
                "vectors": target.partition.n,
                "treated how": treatments[name] or "measured",
                "norm first": norms[0],
                "norm last": last_norms.get(name, norms[-1]),
                "angular update": _newest(history, f"angular_update/{name}"),
                "prediction": _newest(history, f"equilibrium_angular_update/{name}"),
                "effective lr": _newest(history, f"effective_lr/{name}"),
                "direction lr": _newest(history, f"direction_lr/{name}"),
                # 0 means that nothing was ever known of it, not that no time has passed.
                "e-foldings": elapsed or None,
                "ratio": finding.ratio,
                "finding": finding.kind,
                "verdict": finding.words,
            }
        )
    return rows


def _newest(history: History, key: str) -> float | None:
    # An unknown key only means that the quantity does not apply to the weight.
    values = history.curve(key)[1]
    return float(values[-1]) if len(values) else None


def as_text(
    rows: Sequence[Mapping[str, Any]],
    history: History,
    clamped: Mapping[str, int],
    session: Session,
    places: Sequence[str] = (),
) -> str:
    """The rows as a table that fits the terminal, and below it what else a person should read.

    Args:
        rows: from `summarize`.
        history: all that was recorded.
        clamped: by weight, how often a rule could not do what it was to do.
        session: the fit.
        places: where all rows can be seen.
    """
    found = [(row["weight"], _finding(row)) for row in rows]
    title = f"lightning-normdyn: after {history[-1]['optimizer_step']:.0f} optimizer steps"
    rates = [rate.replace("_", " ") for rate in rates_followed(history)]
    columns = [*_COLUMNS, *rates, *_LAST_COLUMNS]
    shown = _worst_first(rows)
    table = render(
        f"{title}\n{paragraph(in_short(found))}".rstrip(),
        columns,
        [[_end_cell(row, column) for column in columns] for row in shown[:MOST_ROWS]],
        noted=("treated how",),
        optional=("e-foldings", "treated how", "prediction", *rates),
        roomy=("verdict",),
    )
    rest = ""
    if len(shown) > MOST_ROWS or len(shown) < len(rows):
        rest = paragraph(_where_all_are(len(rows), len(shown) - MOST_ROWS, places))
    losses = session.claims.losses_in_words()
    closing = "".join(paragraph(words) for words in session.closing_words())
    return table + rest + _clamps_in_words(clamped) + losses + closing


def _where_all_are(
    count: int,
    left_out: int,
    places: Sequence[str],
) -> str:
    """Where a person sees every weight, of a table that shows the most abnormal ones.

    Args:
        count: of weights.
        left_out: rows that the table does not show.
        places: of loggers; without any, the history in memory is the only one.
    """
    where = "; ".join(places) or "`history` of the monitor; save it for `lightning-normdyn report`"
    rows = f"{left_out} more rows are not shown. " if left_out > 0 else ""
    return f"{rows}All {count} weights one by one: {where}."


def _finding(row: Mapping[str, Any]) -> Finding:
    return Finding(row["finding"], row["verdict"], row["ratio"])


def _worst_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows by health, about `MOST_ROWS`; many of which the same is said as one, with the median
    of their numbers."""
    # Stable: of the same health, in the order of the network.
    ordered = sorted(rows, key=_health, reverse=True)
    alike: dict[Any, list[Mapping[str, Any]]] = {}
    for row in ordered:
        key = (skeleton(row["verdict"]), row["treated how"])
        alike.setdefault(key, []).append(row)
    # Of what is wrong, a person has to see a weight by its name. All others may be one row a kind.
    off = [row["weight"] for row in ordered if row["finding"] in _OFF]
    by_name = set(off[: max(0, MOST_ROWS - len(alike))])
    shown: list[Mapping[str, Any]] = []
    for together in alike.values():
        named = [row for row in together if row["weight"] in by_name]
        rest = [row for row in together if row["weight"] not in by_name]
        shown += named
        shown += [_folded(rest, bool(named))] if len(rest) >= LEAST_FOLDED else rest
    return sorted(shown, key=_health, reverse=True)


def _health(row: Mapping[str, Any]) -> float:
    return _finding(row).health


def _folded(rows: Sequence[Mapping[str, Any]], is_rest: bool) -> dict[str, Any]:
    """One row for several; ``is_rest``: whether others of them have rows of their own."""
    findings = [_finding(row) for row in rows]
    worst = max(findings, key=lambda finding: finding.health)
    together = dict(rows[0])
    for column, value in rows[0].items():
        numbers = [row[column] for row in rows if row[column] is not None]
        if isinstance(value, float) and numbers:
            together[column] = median(numbers)
    count = f"{len(rows)} {'more' if is_rest else 'weights'} (medians)"
    pattern = name_pattern([row["weight"] for row in rows])
    return {
        **together,
        "weight": f"{pattern}: {count}" if pattern else count,
        "ratio": worst.ratio,
        "verdict": folded([row["verdict"] for row in rows]),
    }


def _end_cell(row: Mapping[str, Any], column: str) -> str:
    if column == _NORMS:
        return f"{row['norm first']:.3g}→{row['norm last']:.3g}"
    value = row[column]
    # E-foldings are a rough count: three digits would pretend to more.
    if isinstance(value, float):
        return f"{value:.1f}" if column == "e-foldings" else f"{value:.3g}"
    return "-" if value is None else str(value)


def _clamps_in_words(clamped: Mapping[str, int]) -> str:
    """How often a rule could not do to a vector what it was to do, by weight."""
    if not clamped:
        return ""
    # A network may have hundreds of weights; the first few show where to look.
    named = [f"{name}: {times}" for name, times in clamped.items()][:MOST_NAMED]
    if len(clamped) > MOST_NAMED:
        named.append("...")
    return paragraph(
        f"Rules were clamped {sum(clamped.values())} times ({', '.join(named)}): lr * alpha * norm "
        f"is too large there for a shrink, which takes half of a vector at most, or no stretch of "
        f"a step turns it by the angle that was asked for."
    )


# -------------------------------------------------------------------------------------- for loggers


@dataclass(frozen=True)
class Outcome:
    """What came of a fit.

    Args:
        history: all rows.
        layers: one row per weight, the same keys in each; None where a number is not known.
        quantities: what the user named, which pictures then show; None: what applies.
        label: appended to names, so that a second monitor does not overwrite the first one's.
        is_final: whether the fit is over; while it goes on, only what is looked at first is drawn.
    """

    history: History
    layers: list[dict[str, Any]]
    quantities: Sequence[str] | None = None
    label: str = ""
    is_final: bool = True

    @property
    def step(self) -> int:
        """The x value: the last row's."""
        return int(self.history[-1]["step"])

    @property
    def final(self) -> dict[str, float]:
        """The overview at the last row, by log key."""
        return {key: value for key, value in self.history[-1].items() if key.startswith("normdyn/")}

    @cached_property
    def pictures(self) -> dict[str, Any]:
        """By name, each ``(height, width, 3)`` uint8: drawn once for all loggers. Empty without
        matplotlib."""
        if not can_draw():
            return {}
        drawn = {name: _pixels(figure) for name, figure in self._figures()}
        return {**drawn, **self.still_pictures}

    @cached_property
    def interactive(self) -> dict[str, Any]:
        """Figures of plotly under the names of the pictures whose place they take. Empty without
        plotly."""
        if not can_interact():
            return {}
        figures = {}
        for quantity in self._curves():
            figure = interactive_curves(self.history, quantity, MOST_CHART_ROWS)
            figures[f"{quantity}{self.label}"] = figure
        for quantity in self._maps():
            figures[f"heat_map_{quantity}{self.label}"] = interactive_map(self.history, quantity)
        return figures

    def _figures(self) -> Iterator[tuple[str, Figure]]:
        for quantity in self._curves():
            figure, _ = plot_curves(self.history, quantity)
            yield f"{quantity}{self.label}", figure
        for quantity in self._maps():
            figure, _ = plot_heatmap(self.history, quantity=quantity)
            yield f"heat_map_{quantity}{self.label}", figure

    @cached_property
    def still_pictures(self) -> dict[str, Any]:
        """Of `pictures` those that no interactive chart takes the place of."""
        if not can_draw():
            return {}
        return {name: _pixels(figure) for name, figure in self._still_only()}

    def _still_only(self) -> Iterator[tuple[str, Figure]]:
        # Hundreds of curves of single vectors take long to draw.
        if not self.is_final:
            return
        # A ridge shows single vectors, which the history keeps only if they were asked for.
        if any(name.startswith("weight_norm/") for name in self.history.vector_names()):
            figure, _ = plot_norm_ridge(self.history)
            yield f"norm_ridge{self.label}", figure

    def _curves(self) -> list[str]:
        """The quantities whose curves are drawn."""
        return self.shown_in("curves" if self.is_final else "live curves")

    def _maps(self) -> list[str]:
        """The quantities of which there is a map."""
        recorded = self.shown_in("map")
        if self.is_final:
            return recorded
        # Where nothing is known that layers could be held against, what there is.
        return self.shown_in("live map") or recorded[:1]

    def shown_in(self, place: Place) -> list[str]:
        """The quantities for a place that were recorded, and asked for where a user did so."""
        return pictured(self.history, place, self.quantities)

    def chart(self, quantity: str) -> Curves:
        """The curves of all layers, thinned to what W&B draws, each under its name with its number:
        W&B sorts them as text."""
        curves = recorded_curves(self.history, quantity)
        numbers = numbered(self.history.meta.get("targets") or list(curves))
        fewer = thinned_evenly(curves, MOST_CHART_ROWS)
        return {f"{numbers[name]} {name}": curve for name, curve in fewer.items()}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    # Found, not imported: the import takes a second, even for a fit that draws nothing.
    return find_spec("matplotlib") is not None


def _pixels(figure: Figure) -> Any:
    figure.set_dpi(DOTS_PER_INCH)
    canvas: Any = figure.canvas
    with warnings.catch_warnings():
        # A weight's name may be in a script that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.draw()
    # A copy without the alpha channel: a view would keep the whole canvas in memory.
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    if not rows:
        return ""
    cells = [list(map(str, rows[0])), ["---"] * len(rows[0])]
    for row in rows:
        cells.append([_cell(value) for value in row.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    if isinstance(value, (list, tuple)):
        text = ", ".join(map(str, value))
    # A bar would begin another column.
    return text.replace("|", "\\|")
