r"""The numbers that are logged of one layer: the span of its inputs, and what part of its weights
lies in it; and how they are told: a row for history and loggers, and a note where inputs were
missing.

This is the input space projection of the WRS paper (Figures 4 to 6). Directions in which the input
rows do not vary get no gradient behind a normalization: whatever a weight has there is noise that
training cannot remove.

Letters: ``r`` rows, ``g`` groups of a convolution (1 for other layers), ``d`` entries of a row,
``m`` filters of a group.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_normdyn.engine.flavours import Logger
from lightning_normdyn.engine.messages import named, warn_once
from lightning_normdyn.engine.plan import Target
from lightning_normdyn.functional import (
    generalized_gaussian_shape,
    input_space_basis,
    spectral_rank,
)
from lightning_normdyn.monitor.history import History

from .gather import Covariance, InputGatherer, ReadableLayers

# Up to this many entries of a row the whole eigenbasis is computed. Beyond, only the leading
# directions, by a randomized method: eigh would take hours and three times the covariance's memory.
LARGEST_EXACT = 5120

# Inputs whose variance is below this share of their mean square differ by rounding only, so they
# count as constant.
CONSTANT = 1e-12

# Directions with less than this share of the largest variance are noise of float32 inputs.
IDLE = 1e-10

BINS = 61

# Histograms of weights span so many root mean squares to either side.
REACH = 6.0


@dataclass(frozen=True)
class SpanSummary:
    """What was found of one layer.

    Args:
        rows: how many input rows it rests on, of all ranks.
        numbers: share of the energy inside the span, directions in the span, shapes in the
            eigenbasis and as the weights are, then the histograms of both.

    Example:
        >>> SpanSummary(9, [0.75, 2.0, 1.9, 2.1, *[0.0] * 2 * BINS]).values()["input_span_noise"]
        0.25
    """

    rows: int
    numbers: Sequence[float]

    WIDTH: ClassVar[int] = 4 + 2 * BINS

    @property
    def broken(self) -> bool:
        """Whether inputs or weights were not finite."""
        return not isfinite(self.numbers[1])

    def values(self) -> dict[str, float]:
        """By quantity; NaN for what is undefined, such as the shape where inputs are constant."""
        energy, rank, shape_input, shape_parameter = self.numbers[:4]
        return {
            "input_span_energy": energy,
            "input_span_noise": 1 - energy,
            "input_span_rank": rank,
            "ggd_shape_input": shape_input,
            "ggd_shape_parameter": shape_parameter,
        }

    def histograms(self) -> dict[str, Sequence[float]]:
        """Counts of weights by size, for those that have any; none of what is not finite."""
        if self.broken:
            return {}
        counts = {
            "histogram_input": self.numbers[4 : 4 + BINS],
            "histogram_parameter": self.numbers[4 + BINS :],
        }
        return {kind: values for kind, values in counts.items() if sum(values)}


def summary_numbers(
    filters: Tensor,
    stream: Covariance,
    labels: Tensor,
    energy: float,
    method: Literal["moments", "mle"],
) -> Tensor:
    """The ``numbers`` of a `SpanSummary`, all NaN where inputs or weights are not finite.

    Args:
        filters: ``(g, m, d)``.
        stream: of the layer's input rows; its memory is used up.
        labels: ``(g, m)``: which weight vector each filter belongs to.
        energy: share of the inputs' variance that makes the span.
        method: how the shape is fitted, ``"moments"`` or ``"mle"``.

    Returns:
        float64 ``(SpanSummary.WIDTH,)``, on the host.
    """
    covariance = stream.covariance()
    is_finite = torch.isfinite(covariance).all() & torch.isfinite(filters).all()
    if not bool(is_finite):
        return torch.full((SpanSummary.WIDTH,), nan, dtype=torch.float64, device="cpu")
    span = input_span(filters, covariance, stream.mean, energy)
    shares = vector_shares(span, labels)
    # Where only the leading directions are known, there are no coordinates in the whole basis.
    rotated = filters[:0] if span.rotated is None else span.rotated
    # The same for both, since a rotation keeps it: the histograms can be laid over each other.
    root_mean_square = filters.square().mean().sqrt()
    shapes = []
    histograms = []
    for entries in (rotated, filters):
        shapes.append(generalized_gaussian_shape(entries, method=method))
        sizes = torch.nan_to_num(entries / root_mean_square).clamp(-REACH, REACH)
        # On the host: histc is not deterministic on a GPU, which a Trainer may have been told to
        # be.
        counts = torch.histc(sizes.float().cpu(), BINS, -REACH, REACH)
        histograms.append(counts.double())
    # nanmean: a vector of zeros has no share, and must not make the mean of the others NaN.
    share = float(shares.nanmean())
    rank = float(span.rank.double().mean())
    numbers = [share, rank, *map(float, shapes)]
    first = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    return torch.cat([first, *histograms])


# ---- The span of the inputs ----


class InputSpan(NamedTuple):
    """What the inputs of a layer see of its filters.

    Args:
        rank: int64 ``(g,)``: directions that hold the asked share of the inputs' variance; 0 for
            constant inputs.
        seen: ``(g, m)``: squared length of each filter within those directions (truncated).
        energy: ``(g, m)``: squared length of each filter.
        rotated: ``(g', m, d)``: the filters in the whole eigenbasis (norms kept), without groups
            whose inputs are constant; None where only the leading directions were computed.
    """

    rank: Tensor
    seen: Tensor
    energy: Tensor
    rotated: Tensor | None


def input_span(
    filters: Tensor,
    covariance: Tensor,
    mean: Tensor,
    energy: float,
) -> InputSpan:
    r"""Decompose filters along the directions in which their inputs vary.

    The leading directions together hold the share ``energy`` of the inputs' variance. Up to
    ``LARGEST_EXACT`` entries they come from ``torch.linalg.eigh``: about :math:`10 d^3` operations
    and memory for three covariances. Beyond, ``torch.svd_lowrank`` looks for as many as are needed,
    at about :math:`20 k d^2` operations for :math:`k` of them, with random numbers of its own.

    Args:
        filters: ``(g, m, d)``.
        covariance: ``(g, d, d)`` of the rows.
        mean: ``(g, d)`` of the rows.
        energy: share of the variance, in (0, 1].

    Example:
        >>> filters = torch.tensor([[[3.0, 4.0]]])
        >>> covariance = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        >>> span = input_span(filters, covariance, torch.zeros(1, 2), energy=0.99)
        >>> span.rank.tolist(), (span.seen / span.energy).tolist()
        ([1], [[0.36000001430511475]])
    """
    filters = filters.to(covariance.device, covariance.dtype)
    exact = covariance.shape[-1] <= LARGEST_EXACT
    ranks = []
    seen = []
    rotated = []
    for of_group, spread, middle in zip(filters, covariance, mean, strict=True):
        variance = float(spread.trace())
        if variance <= CONSTANT * (variance + float(middle.square().sum())):
            ranks.append(0)
            seen.append(torch.zeros_like(of_group[:, 0]))
            continue
        if exact:
            eigenvalues, basis = _eigenbasis(spread)
            rank = spectral_rank(eigenvalues, energy)
        else:
            basis = _leading_directions(spread, energy * variance)
            rank = basis.shape[1]
        coordinates = of_group @ basis
        ranks.append(rank)
        seen.append(coordinates[:, :rank].square().sum(1))
        rotated.append(coordinates)
    whole = None
    if exact:
        whole = torch.stack(rotated) if rotated else filters[:0]
    rank_of_group = torch.tensor(ranks, dtype=torch.long, device="cpu")
    length_seen = torch.stack(seen)
    length = filters.square().sum(-1)
    return InputSpan(rank_of_group, length_seen, length, whole)


def _eigenbasis(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """As `input_space_basis`, with one answer also where the inputs do not vary.

    There any basis would do, and rounding would choose it.
    """
    eigenvalues, basis = (x.to(covariance.dtype) for x in input_space_basis(covariance))
    idle = int((eigenvalues <= IDLE * eigenvalues[0]).sum())
    if idle:
        varied = basis[:, :-idle]
        rest = basis[:, -idle:]
        # Choose the basis in which the place of an entry within the row is diagonal: for entries
        # that are always 0, that is those entries themselves.
        place = torch.linspace(0, 1, len(covariance), dtype=rest.dtype, device=rest.device)
        place_in_rest = rest.T @ (place[:, None] * rest)
        turned = torch.linalg.eigh(place_in_rest)[1]
        basis = torch.cat([varied, rest @ turned], dim=1)
    return eigenvalues, basis


def _leading_directions(
    covariance: Tensor,
    variance: float,
) -> Tensor:
    """As many eigenvectors as hold ``variance``, ``(d, k)``."""
    most = len(covariance)
    k = min(most, 64)
    while True:
        with _own_random_numbers(covariance.device):
            vectors, values, _ = torch.svd_lowrank(covariance, q=k, niter=4)
        held = values.cumsum(0)
        rounding = 1e-12 * float(held[-1])
        # A randomized method finds a little less than is there, so an energy of 1 could ask for
        # more than it can ever find.
        enough = int((held < variance - rounding).sum()) + 1
        if enough <= k or k == most:
            return vectors[:, : min(enough, k)]
        k = min(most, 2 * k)


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """The same random numbers at every call, and those of the training left as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def vector_shares(
    span: InputSpan,
    labels: Tensor,
) -> Tensor:
    """Share of each weight vector that the inputs see; NaN for a vector of zeros.

    Args:
        span: of the layer.
        labels: ``(g, m)``, from `lightning_normdyn.input_span.rows.filter_labels`.

    Returns:
        ``(n,)``, in [0, 1].

    Example:
        >>> seen, energy = torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> span = InputSpan(torch.tensor([1]), seen, energy, None)
        >>> vector_shares(span, torch.tensor([[0, 1]])).tolist()
        [0.25, nan]
    """
    labels = labels.flatten().to(span.seen.device)
    belongs = labels >= 0
    n = int(labels.max()) + 1 if len(labels) else 0

    def per_vector(of_filters: Tensor) -> Tensor:
        zeros = torch.zeros(n, dtype=of_filters.dtype, device=of_filters.device)
        return zeros.index_add_(0, labels[belongs], of_filters.flatten()[belongs])

    seen = per_vector(span.seen)
    energy = per_vector(span.energy)
    return (seen / energy).clamp(max=1)


# --------------------------------------------------------------------------- telling what was found


def publish(
    history: History,
    loggers: Iterable[Logger],
    summaries: Mapping[str, SpanSummary],
    step: int,
    optimizer_step: int,
    meta: Mapping[str, Any],
) -> None:
    """Add a row to the history, and send it to the loggers.

    Args:
        history: of the fit.
        loggers: the Trainer's.
        summaries: what was found, by weight name.
        step: the x axis of the loggers.
        optimizer_step: real steps of the optimizer so far.
        meta: facts for the history's ``meta``.
    """
    # Of a run that diverged a row is still made, so that the plots show where.
    broken = [name for name, summary in summaries.items() if summary.broken]
    if broken:
        warn_once(
            f"InputSpanMonitor: inputs or weights of {named(broken)} are not finite at "
            f"step {step}; NaN is logged for them."
        )
    row = {}
    histograms = {}
    for name, summary in summaries.items():
        for quantity, value in summary.values().items():
            # NaN shows where a run has diverged. What is undefined, as the shape where inputs are
            # constant, is left out.
            if isfinite(value) or summary.broken:
                row[f"{quantity}/{name}"] = value
        for kind, counts in summary.histograms().items():
            histograms[f"{kind}/{name}"] = np.asarray(counts)
    # Write to a copy, which then takes its place at once: a signal handler may save a checkpoint at
    # any moment.
    grown = history.fork()
    newest = grown.newest_step
    if newest is not None and newest > step:
        warn_once(
            f"InputSpanMonitor's history reaches to step {newest}, and this fit counts from an "
            f"earlier one, because its loops were not "
            f"restored with the weights. Rows from step {step} on are dropped."
        )
        grown.truncate_after(step - 1)
    grown.append(step, row, optimizer_step=optimizer_step)
    grown.append_vectors(step, histograms)
    grown.meta = {**grown.meta, **meta, "histogram_reach": REACH}
    history.show(grown)
    for logger in loggers:
        logger.log_metrics(row, step=step)


def facts_of(
    targets: Iterable[Target], summaries: Mapping[str, SpanSummary]
) -> dict[str, dict[str, Any]]:
    """What a history says of each weight that was measured, by name."""
    return {
        target.name: {
            "shape": list(target.verdict.shape),
            "scale_invariant": target.verdict.kind,
            "vectors": target.partition.n,
            "rows": summaries[target.name].rows,
        }
        for target in targets
        if target.name in summaries
    }


@dataclass
class GapReporter:
    """Says, once for each weight, that inputs are missing or few.

    Args:
        layers: of the network.
        by_name: whether a person has named the weights, and so expects to find them; ``"auto"``
            takes what it can see.
    """

    layers: ReadableLayers
    by_name: bool
    _reported: set[str] = field(default_factory=set)

    def report(
        self,
        gatherer: InputGatherer,
        targets: Iterable[Target],
        summaries: Mapping[str, SpanSummary],
    ) -> None:
        """Look at what was gathered."""
        few = []
        rare = []
        for target in targets:
            weight = target.weight
            name = target.name
            if weight not in gatherer.streams or name in self._reported:
                continue
            entries = self.layers.row_entries(weight)
            seen = gatherer.seen[weight]
            summary = summaries.get(name)
            if summary is None:
                self._report_unseen(target, gatherer)
            # Only where rows were left out: of inputs that are few, no setting can take more.
            elif summary.rows <= entries and weight in gatherer.thinned:
                few.append(f"`{name}` ({summary.rows} for {entries} entries)")
            elif 2 * seen < gatherer.batches:
                rare.append(f"`{name}` ({seen} of {gatherer.batches})")
            else:
                continue
            self._reported.add(name)
        if few:
            rank_zero_info(
                f"InputSpanMonitor took fewer rows than a filter has entries of {_first(few)}: "
                "their inputs may vary in more directions than so few rows show. Raise "
                "`max_samples`."
            )

        if rare:
            rank_zero_info(
                f"InputSpanMonitor saw inputs in less than half of the batches of {_first(rare)}: "
                "in the others their layers were not called, or only inside compiled code, which "
                "calls no hooks (pass dataloader=... then)."
            )

    def _report_unseen(self, target: Target, gatherer: InputGatherer) -> None:
        reason = gatherer.obstacles.get(target.weight) or (
            "its layer was not called in the training step, or only inside compiled code, which "
            "calls no hooks (pass dataloader=... then)"
        )
        text = f"InputSpanMonitor saw no inputs of `{target.name}`: {reason}."
        # Who has named a weight expects it to be measured, which "auto" never promised.
        if self.by_name:
            warn_once(text)
        else:
            rank_zero_info(text)


def _first(items: Sequence[str]) -> str:
    text = ", ".join(items[:4])
    if len(items) > 4:
        text += " and more"
    return text
