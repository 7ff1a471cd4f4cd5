"""THE table of what is logged: each quantity's formula, average, unit, title and axis, and where it
is shown.

Monitor, loggers, plots, report, workspace and the docs' table are made from `QUANTITIES`, and ask
it at every use. A new quantity is one entry here, with its formula over `StepSums`.

Over 500 lines, most of them rows of this one table.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

from torch import Tensor

from lightning_normdyn.functional import (
    cosine_from_sums,
    direction_lr,
    effective_lr,
    effective_step_size,
)

from .step_sums import StepSums

OVERVIEW = "normdyn"
"""Section of the numbers over all scale-invariant vectors, and of the counts of a run."""

Place = Literal["curves", "live curves", "chart", "map", "live map", "report map", "comparison"]


@dataclass(frozen=True)
class Quantity:
    """One row of the table.

    Args:
        name: in log keys: ``<name>/<parameter name>`` and ``normdyn/<name>``.
        title: of its picture or panel.
        meaning: for tables in the documentation.
        symbol: of its axis.
        unit: of its axis; empty for a plain number.
        scale: of its axis: ``"log"``, ``"linear"``, or ``"ratio"``, logarithmic around 1.
        average: over vectors: ``"rms"`` for what predictions compare as root mean square.
        formula: from the sums of a step to ``(n,)``; None for what is not measured by
            NormDynamicsMonitor.
        prediction: from the measured and the predicted angular update to this quantity, over all
            vectors or ``(w,)`` of many weights; None for what needs no prediction.
        of_matrix: whether it is a number of a whole matrix as one vector, worked out on the host
            by `lightning_normdyn.monitor.measured_balance`; shown for weights that are not
            scale-invariant, or by name.
        of_every_weight: whether such a number is kept of scale-invariant weights as well: what
            decay takes of a weight is compared between runs.
        expectation: from the measured angle, the expected one and the expected norm to this
            quantity, numbers or arrays as there; None for what is compared with no expectation.
        scope: ``"both"``: a curve for each weight, and the overview over all scale-invariant
            vectors; ``"weight"`` or ``"overview"``: one of them.
        measured: ``"always"``; ``"standardized"``: where a weight is standardized, or by name;
            ``"shrunk"``: where AdaptiveWeightShrink or WeightDecay acts; ``"by name"``: only if the
            user names it.
        exact: whether its formula needs ⟨1, w⟩, and sums without the rounding of float32.
        logged: whether loggers get it of each weight without being asked; the history keeps all.
        in_place_of: the quantity whose place it takes, for weights that have none of that.
        steps: of the two learning rates, which steps follow it: those proportional to the gradient
            (SGD), or those that do not depend on its size (Adam and its relatives).
        places: ``"curves"``: one picture with the curves of all weights (loggers, report,
            overview); ``"chart"``: a W&B chart; ``"map"``: a heat map, weight by step (loggers,
            overview); ``"live curves"`` and ``"live map"``: what of these is drawn anew during a
            fit, if it is asked for; ``"report map"``: one in the report; ``"comparison"``: where
            runs are compared.
        drawn_with: the quantity in whose picture and panel this one is drawn.
        histogram: whether it is worth a histogram over vectors.
        callback_metric: whether EarlyStopping and ModelCheckpoint can see its overview.
        progress_bar: name and factor of its overview in the progress bar. Rich prints three
            decimals: an angle must be in milliradians, and an effective learning rate would be 0.
    """

    name: str
    title: str
    meaning: str
    symbol: str
    unit: str = ""
    scale: Literal["log", "linear", "ratio"] = "log"
    average: Literal["mean", "rms"] = "mean"
    formula: Callable[[StepSums], Tensor] | None = None
    prediction: Callable[[Any, Any], Any] | None = None
    of_matrix: bool = False
    expectation: Callable[[Any, Any, Any], Any] | None = None
    of_every_weight: bool = False
    scope: Literal["both", "weight", "overview"] = "both"
    measured: Literal["always", "standardized", "shrunk", "by name"] = "always"
    exact: bool = False
    logged: bool = False
    in_place_of: str = ""
    steps: Literal["", "proportional", "normalized"] = ""
    places: tuple[Place, ...] = ()
    drawn_with: str = ""
    histogram: bool = False
    callback_metric: bool = False
    progress_bar: tuple[str, float] | None = None

    @property
    def axis(self) -> str:
        """The label of its axis."""
        # A plain number has no unit, and empty brackets would look like a mistake.
        if not self.unit:
            return self.symbol
        return f"{self.symbol}  ({self.unit})"

    def mean(self, total: float, count: float) -> float:
        """The average of ``count`` values whose sum is ``total``; the sum of squares for RMS.

        Example:
            >>> QUANTITIES["angular_update"].mean(8.0, 2), QUANTITIES["weight_norm"].mean(8.0, 2)
            (2.0, 4.0)
        """
        if self.average == "rms":
            return sqrt(max(total, 0.0) / count)
        return total / count


# Name, title, meaning and symbol of each, then what is not as usual. In the order of pictures,
# panels and tables: what is read first comes first.
_TABLE = (
    Quantity(
        "angular_update",
        "Angular update",
        "angle between the weight before and after one optimizer step",
        "angle",
        unit="radians per step",
        average="rms",
        formula=lambda step: step.angle,
        places=("curves", "live curves", "chart", "report map", "comparison"),
        logged=True,
        histogram=True,
        callback_metric=True,
        progress_bar=("normdyn/turn_mrad", 1e3),
    ),
    # Expectations and predictions have no formula over vectors: they are made for the mean of a
    # weight, on the host.
    Quantity(
        "expected_angular_update",
        "Expected angular update",
        "the RMS angle of this very step that follows from the norm at the start and the "
        "schedule so far",
        "angle",
        unit="radians per step",
        average="rms",
        expectation=lambda measured, angle, norm: angle,
        drawn_with="angular_update",
    ),
    Quantity(
        "expected_ratio",
        "Angular update over what is expected now",
        "measured / expected angle: 1 where a weight turns as it should at this step",
        "ratio",
        scale="ratio",
        expectation=lambda measured, angle, norm: measured / angle,
        logged=True,
        places=("chart", "map", "live map", "report map", "comparison"),
        callback_metric=True,
    ),
    Quantity(
        "equilibrium_angular_update",
        "Predicted angular update",
        "the RMS angle that optimizer, lr and decay settle at; none where it is not known",
        "angle",
        unit="radians per step",
        average="rms",
        prediction=lambda measured, predicted: predicted,
        drawn_with="angular_update",
    ),
    Quantity(
        "equilibrium_ratio",
        "Angular update over its prediction",
        "measured / predicted angle",
        "ratio",
        scale="ratio",
        prediction=lambda measured, predicted: measured / predicted,
        places=("chart", "comparison"),
        callback_metric=True,
    ),
    Quantity(
        "effective_lr",
        "Effective learning rate",
        "lr/‖w‖ (lr/std after weight standardization): read this one under Adam-like optimizers",
        "η/‖w‖",
        formula=lambda step: effective_lr(step.lr, step.size),
        logged=True,
        steps="normalized",
        places=("curves", "live curves", "chart", "map", "report map", "comparison"),
    ),
    Quantity(
        "direction_lr",
        "Learning rate of the direction",
        "lr/‖w‖²: the learning rate of the direction; read this one under SGD",
        "η/‖w‖²",
        formula=lambda step: direction_lr(step.lr, step.size),
        logged=True,
        steps="proportional",
        places=("curves", "live curves", "chart", "map", "report map", "comparison"),
    ),
    Quantity(
        "weight_norm",
        "Weight norm",
        "‖w‖, at the weight that the gradient was taken at",
        "‖w‖",
        unit="weight units",
        formula=lambda step: step.norm,
        logged=True,
        places=("curves", "live curves", "chart", "comparison"),
        histogram=True,
        progress_bar=("normdyn/weight_norm", 1.0),
    ),
    Quantity(
        "expected_weight_norm",
        "Expected weight norm",
        "the RMS norm that follows from the norm at the start and the schedule so far",
        "‖w‖",
        unit="weight units",
        average="rms",
        expectation=lambda measured, angle, norm: norm,
        scope="weight",
        drawn_with="weight_norm",
    ),
    Quantity(
        "weight_std",
        "Weight standard deviation",
        "biased standard deviation; for weight-standardized weights",
        "std(w)",
        unit="weight units",
        formula=lambda step: step.std,
        measured="standardized",
        exact=True,
        places=("curves", "chart"),
    ),
    Quantity(
        "effective_step_size",
        "Effective step size",
        "2 sin(angle/2)",
        "chord",
        unit="per step",
        average="rms",
        formula=lambda step: effective_step_size(step.angle),
    ),
    Quantity(
        "equivalent_weight_decay",
        "Equivalent weight decay",
        "the decay that AdaptiveWeightShrink or WeightDecay amounts to now",
        "decay/lr",
        unit="per step and lr",
        formula=lambda step: step.equivalent_decay,
        measured="shrunk",
    ),
    # These two have a sign, of which a logarithmic axis would hide one half.
    Quantity(
        "gradient_cosine",
        "Gradient-weight cosine",
        "cos(w, g): 0 for a scale-invariant weight",
        "cos(w, g)",
        scale="linear",
        formula=lambda step: cosine_from_sums(step.ww, step.wg, step.gg),
    ),
    Quantity(
        "radial_update",
        "Radial update",
        "⟨Δ, ŵ⟩/‖w‖: growth of the norm",
        "Δ along w, over ‖w‖",
        unit="per step",
        scale="linear",
        formula=lambda step: step.radial_change,
    ),
    # Of whole matrices, each as one vector: they need neither scale invariance nor a known
    # optimizer.
    Quantity(
        "matrix_angle",
        "Angle of the whole matrix",
        "angle between the whole weight before and after one optimizer step",
        "angle",
        unit="radians per step",
        of_matrix=True,
        scope="weight",
        places=("curves",),
    ),
    Quantity(
        "norm_drift",
        "Drift of the norm",
        "change of ln‖w‖ since the last row",
        "d ln‖w‖",
        unit="per step",
        scale="linear",
        of_matrix=True,
        scope="weight",
        logged=True,
        in_place_of="balance_ratio",
    ),
    Quantity(
        "coherence",
        "Coherence of the steps",
        "growth of ln‖w‖² per squared angle, decay apart: 1 for steps that forget each "
        "other, larger where the loss pushes outwards, negative where it holds the norm",
        "κ",
        scale="linear",
        of_matrix=True,
        scope="weight",
    ),
    Quantity(
        "balanced_angular_update",
        "Balanced angular update",
        "the angle at which turning and decay would hold the norm",
        "angle",
        unit="radians per step",
        of_matrix=True,
        scope="weight",
        drawn_with="matrix_angle",
    ),
    Quantity(
        "balance_ratio",
        "Angle over its balance",
        "how fast a weight turned against what would hold its norm: 1 where it is settled",
        "ratio",
        scale="ratio",
        of_matrix=True,
        logged=True,
        in_place_of="expected_ratio",
        places=("chart", "map", "live map", "report map", "comparison"),
        callback_metric=True,
    ),
    Quantity(
        "loss_decay",
        "Decay by the loss",
        "how strongly the loss itself pulls the norm inwards, as a weight decay",
        "λ",
        unit="per step and lr",
        scale="linear",
        of_matrix=True,
        scope="weight",
    ),
    Quantity(
        "pull",
        "Pull of the decay",
        "the share of the weight that decay takes away in a step, whoever applies it",
        "lr·λ",
        unit="per step",
        of_matrix=True,
        scope="weight",
        of_every_weight=True,
    ),
    # Counts of the run. They have no formula over vectors, so they stand in the overview alone.
    Quantity(
        "optimizer_step",
        "Optimizer steps",
        "optimizer steps that really happened",
        "steps",
        scope="overview",
    ),
    Quantity(
        "skipped_steps",
        "Skipped steps",
        "steps that a gradient scaler skipped",
        "steps",
        scale="linear",
        scope="overview",
        places=("comparison",),
    ),
    Quantity(
        "clamped_vectors",
        "Clamped vectors",
        "vectors whose decay in a step had to be clamped, or that a step could not be steered for, "
        "over all steps",
        "vectors",
        scale="linear",
        scope="overview",
        drawn_with="skipped_steps",
    ),
    Quantity(
        "collapsed_vectors",
        "Collapsed vectors",
        "vectors a thousand times shorter than the mean of their weight",
        "vectors",
        scale="linear",
        scope="overview",
        drawn_with="skipped_steps",
    ),
    # Of InputSpanMonitor, which measures them at its own times; here for titles and axes.
    Quantity(
        "input_span_energy",
        "Weight energy inside the input span",
        "share of a weight vector's squared norm inside the span of its inputs",
        "share",
        scale="linear",
        scope="weight",
    ),
    Quantity(
        "input_span_noise",
        "Weight noise outside the input span",
        "the rest: what the data cannot see",
        "share",
        scale="linear",
        scope="weight",
    ),
    Quantity(
        "input_span_rank",
        "Rank of the inputs",
        "directions in the span",
        "directions",
        scope="weight",
    ),
    Quantity(
        "ggd_shape_input",
        "Shape of the weights in input space",
        "generalized-Gaussian shape of the weights in the eigenbasis of their inputs",
        "β  (2: Gaussian, 1: Laplace)",
        scope="weight",
    ),
    Quantity(
        "ggd_shape_parameter",
        "Shape of the weights as they are",
        "generalized-Gaussian shape of the weights",
        "β  (2: Gaussian, 1: Laplace)",
        scope="weight",
    ),
)
QUANTITIES: dict[str, Quantity] = {quantity.name: quantity for quantity in _TABLE}


def monitored() -> list[Quantity]:
    """What NormDynamicsMonitor keeps of each weight: all that its argument ``quantities`` may
    name."""
    # Counts are always logged, and InputSpanMonitor logs its own: neither can be chosen here.
    chosen = []
    for quantity in QUANTITIES.values():
        is_ours = quantity.of_matrix or quantity.expectation is not None
        if quantity.scope == "both" or is_ours:
            chosen.append(quantity)
    return chosen


def of_matrices(
    names: Sequence[str] | None, scale_invariant: bool, *, steered: bool = False
) -> list[str]:
    """The quantities of whole matrices that are kept of a weight.

    Args:
        names: what the user named, which is kept of every weight.
        scale_invariant: whether the weight is: then its vectors tell more.
        steered: whether RotationControl sets by how much it turns, which it may do for the whole.

    Example:
        >>> of_matrices(["balance_ratio", "weight_norm"], scale_invariant=True)
        ['balance_ratio', 'pull']
    """
    known = [quantity for quantity in monitored() if quantity.of_matrix]
    wanted = {*(names or ()), *(["matrix_angle"] if steered else [])}
    if scale_invariant:
        known = [each for each in known if each.of_every_weight or each.name in wanted]
    return [quantity.name for quantity in known]


def for_loggers(
    values: Mapping[str, float],
    names: Sequence[str] | None,
    unbalanced: Collection[str] = (),
) -> dict[str, float]:
    """What loggers get of a row.

    Args:
        values: the row, by log key.
        names: what the user named; None: of each weight what the table has as ``logged``, and the
            whole overview. A page of hundreds of charts is one that nobody reads.
        unbalanced: weights without a balance, of which the drift of the norm takes its place; see
            `lightning_normdyn.monitor.stand_ins`.

    Example:
        >>> row = {"angular_update/a": 0.1, "radial_update/a": 0.0, "normdyn/radial_update": 0.0}
        >>> for_loggers(row, None)
        {'angular_update/a': 0.1, 'normdyn/radial_update': 0.0}
        >>> for_loggers(row, ["radial_update"])
        {'radial_update/a': 0.0, 'normdyn/radial_update': 0.0}
        >>> for_loggers({"norm_drift/a": 0.1, "norm_drift/b": 0.1}, None, unbalanced=["b"])
        {'norm_drift/b': 0.1}
    """
    chosen = {}
    for key, value in values.items():
        section, _, weight = key.partition("/")
        is_overview = section == OVERVIEW
        quantity = QUANTITIES[weight if is_overview else section]
        if names is not None:
            # Counts of the run are no quantity that one could name.
            wanted = quantity.name in names or quantity.scope == "overview"
        else:
            wanted = is_overview or _is_logged(quantity, weight, values, unbalanced)
        if wanted:
            chosen[key] = value
    return chosen


def _is_logged(
    quantity: Quantity, weight: str, values: Mapping[str, float], unbalanced: Collection[str]
) -> bool:
    """Whether loggers get a quantity of a weight without being asked."""
    if not quantity.logged:
        return False
    if quantity.in_place_of == "balance_ratio":
        return weight in unbalanced
    # A weight keeps what it has: a balance that is known at last does not end another chart.
    if quantity.name == "balance_ratio" and weight in unbalanced:
        return False
    return f"{quantity.in_place_of}/{weight}" not in values


def rate_followed(*, proportional: bool) -> str:
    """The learning rate that tells how fast a direction changes.

    Args:
        proportional: whether steps are proportional to the gradient, which is the longer the
            shorter the weight is: such a step turns it by lr/‖w‖², any other by lr/‖w‖.

    Example:
        >>> rate_followed(proportional=True), rate_followed(proportional=False)
        ('direction_lr', 'effective_lr')
    """
    kind = "proportional" if proportional else "normalized"
    return next(quantity.name for quantity in QUANTITIES.values() if quantity.steps == kind)


def shown_in(place: Place) -> list[str]:
    """Names of the quantities that have a picture of their own in a place, in the table's order."""
    return [quantity.name for quantity in QUANTITIES.values() if place in quantity.places]


def drawn_with(name: str) -> list[str]:
    """A quantity and those that are drawn in its picture.

    Example:
        >>> drawn_with("angular_update")
        ['angular_update', 'expected_angular_update', 'equilibrium_angular_update']
    """
    return [name, *(q.name for q in QUANTITIES.values() if q.drawn_with == name)]


def to_measure(
    names: Sequence[str] | None,
    *,
    standardized: bool,
    shrunk: bool,
) -> list[str]:
    """The quantities with a formula that are measured of the weights of one optimizer.

    Args:
        names: what the user named, which is measured beside what applies.
        standardized: whether a weight is standardized.
        shrunk: whether AdaptiveWeightShrink or WeightDecay acts on one.

    Example:
        >>> chosen = to_measure(["weight_std"], standardized=False, shrunk=False)
        >>> "weight_std" in chosen, "weight_norm" in chosen, "equivalent_weight_decay" in chosen
        (True, True, False)
    """
    # Whoever names a quantity gets it, also where no weight would make it worth its cost.
    applies = {"always": True, "standardized": standardized, "shrunk": shrunk, "by name": False}
    chosen = []
    for quantity in monitored():
        wanted = applies[quantity.measured] or quantity.name in (names or ())
        if quantity.measured == "shrunk" and not shrunk:
            wanted = False  # of a shrink that does not exist there is no strength
        if wanted and quantity.formula is not None:
            chosen.append(quantity.name)
    return chosen


def markdown_table() -> str:
    """Key, meaning and unit of all that NormDynamicsMonitor logs, as the docs' Markdown table."""
    counts = [quantity for quantity in QUANTITIES.values() if quantity.scope == "overview"]
    lines = ["| key | meaning | unit |", "|---|---|---|"]
    # The rest is measured by InputSpanMonitor, whose documentation has them.
    for quantity in [*monitored(), *counts]:
        key = f"normdyn/{quantity.name}" if quantity.scope == "overview" else quantity.name
        lines.append(f"| `{key}` | {quantity.meaning} | {quantity.unit} |")
    return "\n".join(lines) + "\n"
