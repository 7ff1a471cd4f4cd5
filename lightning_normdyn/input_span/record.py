"""Tells what was measured: a row for history and loggers, and a note where inputs were missing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from lightning_normdyn.engine.messages import named, warn_once
from lightning_normdyn.engine.plan import Target
from lightning_normdyn.input_span.gather import InputGatherer, ReadableLayers
from lightning_normdyn.input_span.summary import REACH, SpanSummary
from lightning_normdyn.monitor.history import History


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
