"""What all callbacks of a fit do to a weight, taken together: their effects in words and numbers,
who decays it and by how much, and what was counted."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import nan
from typing import Any

import torch
from torch import Tensor

from lightning_normdyn.geometry.kernel_choice import paths_in_words
from lightning_normdyn.invariance.verdict import Verdict, cells_of
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.decay import (
    LARGEST_SHARE,
    Decay,
    DecayOwner,
    decay_of,
    highest_claim,
    taken_over_by_trial,
)
from lightning_normdyn.optimizers.group_numbers import group_number, is_zero
from lightning_normdyn.optimizers.step import Step
from lightning_normdyn.tables import (
    LEAST_FOLDED,
    name_pattern,
    name_skeleton,
    render,
    without_empty,
)
from lightning_normdyn.theory.words import folded, skeleton

from .attachment import Attachment
from .effect import (
    Decaying,
    Effect,
    Effects,
    LengthJumps,
    NoEffect,
    OnOtherVectors,
    Projection,
    combine,
)
from .member import Member
from .plan import Plan, Target
from .rule import Rule

COLUMNS = (
    "weight",
    "shape",
    "scale-invariant",
    "vectors",
    "normalized by",
    "treated how",
    "why not",
)


class Combined:
    """The callbacks of one fit as one rule.

    Args:
        members: the callbacks.
        attachment: their optimizers.
    """

    def __init__(self, members: Sequence[Member], attachment: Attachment) -> None:
        self._members, self._attachment = members, attachment

    @property
    def plans(self) -> list[Plan]:
        """All plans of all callbacks."""
        return [plan for _, plan in self.shares()]

    def shares(self) -> Iterator[tuple[Member, Plan]]:
        """Each plan, with the one whose it is."""
        for member in self._members:
            for plan in member.plans.values():
                yield member, plan

    # -- in words and types

    def effects(self, targets: Sequence[Target], besides: Rule | None = None) -> list[Effects]:
        """What the callbacks, ``besides`` one, do to each of these weights, in one pass over all
        plans."""
        asked = {target.weight: target for target in targets}
        stated: dict[Tensor, list[Effect]] = {weight: [] for weight in asked}
        for member, plan in self.shares():
            if member.rule is besides:
                continue
            for theirs in plan.targets:
                ours = asked.get(theirs.weight)
                if ours is not None:
                    effect = member.effect(plan.index, theirs)
                    stated[ours.weight].append(_effect_on(ours, theirs, effect))
        return [combine(stated[target.weight]) for target in targets]

    def treatments(self) -> dict[Tensor, str]:
        """How the callbacks treat each targeted weight, in words; empty for one that is only
        measured.

        Takes norms once for each plan, over all ranks: every rank must call it.
        """
        texts: dict[Tensor, list[str]] = {}
        for member, plan in self.shares():
            words = member.treatments(plan.index)
            for target, text in zip(plan.targets, words, strict=True):
                texts.setdefault(target.weight, []).append(text)
        for weight in self._decays_taken_by_trial() & texts.keys():
            texts[weight].append("its decay taken over, as a trial showed to be exact")
        return {weight: "; ".join(filter(None, parts)) for weight, parts in texts.items()}

    def _decays_taken_by_trial(self) -> set[Tensor]:
        """Weights whose decay is taken over from an optimizer of which nobody has read the step."""
        weights: set[Tensor] = set()
        for bracket in self._attachment.brackets:
            owners, taken_over = bracket.decay_owners(), set()
            for group in bracket.optimizer.param_groups:
                if not is_zero(group_number(group, "weight_decay")):
                    taken_over.update(owners.keys() & set(group["params"]))
            # The trial costs some steps of the optimizer, so it comes last.
            if taken_over and taken_over_by_trial(bracket.optimizer):
                weights |= taken_over
        return weights

    def start_table(
        self, verdict_of: Callable[[Tensor], Verdict], kind_of: Callable[[str], str]
    ) -> str:
        """The table of targets that a person reads at the start of a fit: how they are treated, and
        what is known about their scale invariance. Layers that are built and treated alike are one
        row.

        Args:
            verdict_of: what is known about a weight.
            kind_of: from the name of a normalization to what it is, such as BatchNorm.
        """
        targets: dict[Tensor, Target] = {}
        written: set[Tensor] = set()
        for member, plan in self.shares():
            for target in plan.targets:
                # Of several callbacks on one weight, the first says what its vectors are.
                targets.setdefault(target.weight, target)
                # A monitor measures every weight: that is no request to change one.
                if member.rule.writes:
                    written.add(target.weight)
        treatments = self.treatments()
        rows = []
        for weight, target in targets.items():
            verdict = verdict_of(weight)
            row = cells_of(verdict)
            if target.by_request and weight in written:
                row["scale-invariant"] += " (by request)"
            # As this fit has them: a granularity may have been asked for.
            row["vectors"] = str(target.partition.n)
            row["treated how"] = treatments[weight] or "measured"
            row["why not"] = verdict.unread_rows or ("" if verdict.n else verdict.reason)
            rows.append(row)
        columns, cells = without_empty(COLUMNS, _cells(rows, kind_of))
        table = render(
            "lightning-normdyn: targets",
            columns,
            cells,
            noted=("treated how", "why not"),
            optional=("shape", "vectors"),
        )
        return f"{table}Kernels: {self.kernels()}\n"

    def kernels(self) -> str:
        """Which kernels read and write the weights, and why: ``torch (the weights are on the
        CPU)``."""
        return paths_in_words([plan.vectors.kernel_path for plan in self.plans])

    # -- decay

    def decays(self, plan: Plan) -> list[Decay]:
        """Who decays each target of ``plan`` in this step, and by how much; ``rate`` None where
        nobody can tell."""
        owners = StepBracket.of(plan.optimizer).decay_owners()
        groups, all_effects = plan.groups_of(plan.targets), self.effects(plan.targets)
        # Most weights of a group are treated alike, and this may be asked at every step.
        known: dict[Any, Decay] = {}
        decays = []
        for target, group, effects in zip(plan.targets, groups, all_effects, strict=True):
            # Claims say who decays it, also where somebody claims it who is no callback; after a
            # fit there are none any more.
            owner = owners.get(target.weight, highest_claim(effects.decay_rules))
            alike = id(group), effects, owner
            if alike not in known:
                known[alike] = decay_of(plan.optimizer, group, effects.decay_rules, owner)
            decays.append(Decay(owner, None) if effects.decay_untold else known[alike])
        return decays

    def decay_shares(
        self, plan: Plan, step: Step, norm: Tensor, std: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The share of each vector that AWS or WeightDecay takes away before this step, and that
        decay takes away within it, whoever applies it.

        Args:
            plan: the vectors.
            step: the step.
            norm: their norms, ``(n,)``.
            std: their standard deviations, for AWS on weight-standardized weights.

        Returns:
            Two ``(n,)``, at most 0.5 each; the second is NaN where nobody can tell. Exact for plain
            SGD and decoupled decays; of a coupled decay under momentum, the mean.
        """
        decays = self.decays(plan)
        vectors = plan.vectors
        tensor = partial(torch.tensor, device=norm.device)

        # AWS measures weight-standardized weights by their standard deviation.
        size = norm
        if std is not None:
            by_std = tensor([decay.statistic == "std" for decay in decays], dtype=torch.bool)
            size = torch.where(vectors.spread(by_std), std, norm)
        alphas = tensor([decay.alpha for decay in decays], dtype=norm.dtype)
        rates = tensor([_on_host(decay.rate) for decay in decays], dtype=norm.dtype)
        for i, decay in enumerate(decays):
            # A rate may lie on the device: it is copied there, so that nothing waits for it.
            if isinstance(decay.rate, Tensor):
                rates[i] = decay.rate
        for member in self._members:
            member.correct_decays(plan, decays, rates)

        per_step = tensor([_on_host(decay.per_step) for decay in decays], dtype=norm.dtype)
        for i, decay in enumerate(decays):
            if isinstance(decay.per_step, Tensor):
                per_step[i] = decay.per_step

        lr = plan.rates()
        shrunk = (lr * vectors.spread(alphas) * size).clamp(max=LARGEST_SHARE)
        decayed = (lr * vectors.spread(rates) + vectors.spread(per_step)).clamp(max=LARGEST_SHARE)
        # WeightDecay shrinks a weight before the step as AWS does, whose factor comes on top.
        comes_first = plan.spread([d.owner == DecayOwner.WEIGHT_DECAY for d in decays])
        before = torch.where(comes_first, shrunk + decayed - shrunk * decayed, shrunk)
        within = torch.where(comes_first, 0.0, decayed)
        active = plan.active(step)
        if active is None:
            return before, within
        return torch.where(active, before, 0.0), torch.where(active, within, 0.0)

    def applied_decay(
        self, plan: Plan, step: Step, norm: Tensor, std: Tensor | None = None
    ) -> Tensor:
        """The share of each vector that all decay takes away in this step: ``(n,)``. Arguments as
        for `decay_shares`."""
        before, within = self.decay_shares(plan, step, norm, std)
        return before + within - before * within

    # -- what rules tell of single steps

    def published(self, plan: Plan, key: str) -> Tensor | None:
        """What callbacks tell of each vector of ``plan``, added up: ``(n,)``, 0 for weights that
        none of them speaks of, NaN where their vectors are others; None if nobody speaks.

        ``"log_scale"``: Σ ln c over all steps so far, of rules that multiply a weight by c after
        each step. ``"target_angle"``: the angle that the newest step was to turn it by.
        """
        total = None
        for theirs in self.plans:
            if theirs.index == plan.index and key in theirs.published:
                share = plan.taken_from(theirs, theirs.published[key])
                total = share if total is None else total + share
        return total

    # -- counts

    def events(self) -> dict[tuple[int, int, str], int]:
        """How often each kind of event has happened in this fit, by callback (its place in the
        list), optimizer and kind."""
        counts = {}
        for place, member in enumerate(self._members):
            for plan in member.plans.values():
                for kind, count in plan.events.items():
                    counts[place, plan.index, kind] = count
        return counts

    def counted(self, key: str) -> Tensor | None:
        """Sum of a counter over all vectors of all callbacks, ``(1,)`` on the device; None if
        nobody counts it."""
        total = None
        for _, by_weight in self._totals(key):
            share = by_weight.sum(0, keepdim=True)
            # On the first one's device, if plans lie on several.
            total = share if total is None else total + share.to(total.device)
        return total

    def counted_by_weight(self, key: str) -> dict[str, int]:
        """Sum of a counter over the vectors of each weight where it is not 0; every rank must call
        it."""
        counts: Counter[str] = Counter()
        for plan, totals in self._totals(key):
            for target, total in zip(plan.targets, totals.tolist(), strict=True):
                counts[target.name] += int(total)
        return dict(+counts)

    def _totals(self, key: str) -> Iterator[tuple[Plan, Tensor]]:
        """The plans that count, and the sum of the counter for each of their weights."""
        for plan in self.plans:
            if key in plan.counters:
                yield plan, plan.vectors.totals(plan.counters[key])


def _effect_on(
    ours: Target,
    theirs: Target,
    effect: Effect,
) -> Effect:
    """What ``effect`` on the vectors of ``theirs`` is for those of ``ours``."""
    # What is said of no vector in particular holds for all.
    if isinstance(effect, (NoEffect, LengthJumps)) or theirs.partition.equal(ours.partition):
        return effect
    # A decay of the whole weight shrinks all vectors alike, however it is split.
    if isinstance(effect, Decaying) and not theirs.partition.partial:
        return effect
    # Gated projection takes the filter view or else the layer view, whichever is at right angles to
    # the gradient.
    if isinstance(effect, Projection) and effect.gate == "cosine" and ours.partition.n == 1:
        return effect
    return OnOtherVectors(effect)


def _on_host(rate: float | Tensor | None) -> float:
    """A rate as a float; NaN where nobody can tell, 0 in place of a tensor, which is copied
    later."""
    if rate is None:
        return nan
    return 0.0 if isinstance(rate, Tensor) else float(rate)


def _cells(rows: Sequence[dict[str, str]], kind_of: Callable[[str], str]) -> list[list[str]]:
    """The start table's cells, in the order of the network; rows of which the same is said, under
    names that differ in numbers alone, as one."""
    rows = _with_one_text_a_treatment(rows)
    alike: dict[Any, list[dict[str, str]]] = {}
    for row in rows:
        norms = row["normalized by"].split(", ")
        said = [skeleton(row[column]) for column in ("treated how", "why not")]
        kinds = tuple(map(kind_of, norms))
        key = (name_skeleton(row["weight"]), row["scale-invariant"], kinds, *said)
        alike.setdefault(key, []).append(row)
    cells = []
    for (_, _, kinds, *_), together in alike.items():
        shown = together
        if len(together) >= LEAST_FOLDED:
            shown = [_as_one(together, ", ".join(dict.fromkeys(kinds)))]
        cells += [[row[column] for column in COLUMNS] for row in shown]
    return cells


def _with_one_text_a_treatment(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with ranges in place of numbers where many weights are treated alike: notes that
    differ in a digit are read by nobody."""
    texts: dict[str, list[str]] = {}
    for row in rows:
        text = row["treated how"]
        texts.setdefault(skeleton(text), []).append(text)
    ranges = {}
    for kind, alike in texts.items():
        if len(alike) >= LEAST_FOLDED:
            ranges[kind] = folded(alike)
    return [
        {**row, "treated how": ranges.get(skeleton(row["treated how"]), row["treated how"])}
        for row in rows
    ]


def _as_one(rows: Sequence[dict[str, str]], kinds: str) -> dict[str, str]:
    """One row for several; ``kinds``: what normalizes them."""
    pattern = name_pattern([row["weight"] for row in rows])
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    return {
        "weight": f"{pattern}: {len(rows)} weights",
        "shape": shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes",
        "scale-invariant": rows[0]["scale-invariant"],
        "normalized by": kinds,
        # Numbers in them as ranges.
        "vectors": folded([row["vectors"] for row in rows]),
        "treated how": rows[0]["treated how"],
        "why not": folded([row["why not"] for row in rows]),
    }
