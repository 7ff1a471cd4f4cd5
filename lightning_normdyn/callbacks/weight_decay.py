"""Weight decay apart from the optimizer: at its own pace through a schedule, and only where the
step does not work against it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.arguments import Params, check_choice, check_number
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.effect import Decaying, Effect
from lightning_normdyn.engine.part import Part
from lightning_normdyn.engine.plan import Target, are_treated, guarded
from lightning_normdyn.engine.refusals import refuse_16_bits
from lightning_normdyn.engine.rule import Turn
from lightning_normdyn.engine.session import Session
from lightning_normdyn.engine.shrinking import Shrinker
from lightning_normdyn.engine.value_checks import number, record, table, text
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.geometry.formulas import work_out
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.optimizers.checks import check_decay_takeover, check_rate
from lightning_normdyn.optimizers.decay import LARGEST_SHARE, DecayOwner, replaced_decay
from lightning_normdyn.optimizers.group_numbers import (
    Group,
    Number,
    group_number,
    is_zero,
    largest_number,
)
from lightning_normdyn.optimizers.step import Phase, Step
from lightning_normdyn.optimizers.step_response import DecayRate, named_rates


class DecayPart(Part["WeightDecay"]):
    """The part in a fit of a decay: which weights it means, and whole weights where it can."""

    def __init__(
        self,
        rule: WeightDecay,
        worker: type[Worker[Any]],
        session: Session,
    ) -> None:
        # Two workers, since a decay before the step is refused under optimizers that evaluate their
        # closure twice, and a cautious one after the step is not.
        super().__init__(rule, CautiousDecayWorker if rule.cautious else worker, session)

    def select(self, owned: Sequence[Tensor]) -> list[Tensor]:
        """Under "auto", of the weights that are meant those that decay."""
        selected = super().select(owned)
        if self.rule.by_name:
            return selected
        decayed = self._decayed()
        # Whoever gives a number and has no decay in the optimizer wants that number everywhere.
        if self.rule.weight_decay != "replace" and not decayed:
            return selected
        return [weight for weight in selected if weight in decayed]

    def _decayed(self) -> set[Tensor]:
        """The weights in param groups with a decay."""
        decayed: set[Tensor] = set()
        for optimizer in self.session.attachment.optimizers:
            for group in optimizer.param_groups:
                # A decay that lives on a device counts as one, since nothing waits for it.
                if not is_zero(group_number(group, "weight_decay")):
                    decayed.update(group["params"])
        return decayed

    def target(self, weight: Tensor) -> Target | None:
        """The whole weight, also where only some of its rows are scale-invariant."""
        target = super().target(weight)
        by_invariance = self.rule.writes and not self.rule.by_name
        if target is not None and target.partition.partial and not by_invariance:
            target.partition = Partition.layer(self.session.weights.shapes[weight])
        return target


def pulled(
    shares: Tensor,
    rates: Tensor | None,
    owned: Tensor,
    counts: Tensor,
    bad: Tensor,
    active: Tensor | None,
    skipped: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each vector loses in one step.

    Args:
        shares: ``(n,)``, of the weight, or of the weight times the learning rate.
        rates: learning rates; None: the shares are without.
        owned: bool: vectors whose decay this is.
        counts: how often the share of each vector was clamped.
        bad: as `lightning_normdyn.engine.plan.guarded` takes it; ``active`` and ``skipped`` too.
        active: the same.
        skipped: the same.

    Returns:
        The share that it loses, the factor that this leaves, ``bad`` and ``counts``.
    """
    pull = shares if rates is None else shares * rates
    pull = pull * owned
    is_clamped = are_treated(pull > LARGEST_SHARE, active, skipped)
    pull, bad = guarded(pull.clamp(max=LARGEST_SHARE), 0.0, bad, active, skipped)
    return pull, 1 - pull, bad, counts + is_clamped


class PacedDecay(Worker["WeightDecay"]):
    """How strongly the targets of one optimizer decay, and since when."""

    STATE = record({"lr_max": table(text(), number(0.0))}, closed=True)

    def prepare(self) -> None:
        """Take the decay over from the optimizer; of its schedule only the group's numbers are
        known yet."""
        self.largest: dict[int, Number] = {}
        """The largest learning rate so far, by the place of the param group in the plan."""
        self.plan.counter("clamped")
        self.claim_decay(DecayOwner.WEIGHT_DECAY)

    # -- how strongly

    def _pull(self, step: Step) -> Tensor:
        """The share that each vector loses, ``(n,)``, 0 where somebody else owns its decay or it
        cannot be treated."""
        known = self._known_pulls(step)
        if known is not None:
            return self.plan.spread_groups("pull", known)
        return self._counted(step)[0]

    def _kept(self, step: Step) -> Tensor:
        """The factor that `_pull` leaves of each vector, ``(n,)``."""
        known = self._known_pulls(step)
        if known is not None:
            return self.plan.spread_groups("kept", [1 - pull for pull in known])
        return self._counted(step)[1]

    def _known_pulls(self, step: Step) -> list[Number] | None:
        """`pulled` by param group, where the host knows all of it: then nothing is launched as long
        as no number changes. None where it does not."""
        plan = self.plan
        shares = self._shares()
        rates = plan.group_rates() if self._goes_by_rate else [1.0] * len(shares)
        is_plain = step.skipped is None and plan.active(step) is None
        if not is_plain or rates is None or not plan.owns_all(step, DecayOwner.WEIGHT_DECAY):
            return None
        pulls: list[Number] = []
        for share, rate in zip(shares, rates, strict=True):
            if isinstance(share, Tensor) or isinstance(rate, Tensor):
                return None
            # What is clamped, or no number, is counted vector by vector.
            if not 0 <= share * rate <= LARGEST_SHARE:
                return None
            pulls.append(share * rate)
        # Nothing of it is needed, but the step counts as one in which the rule acted.
        plan.guards(step)
        return pulls

    def _counted(self, step: Step) -> tuple[Tensor, ...]:
        results = self._worked_out(self.plan.guards(step), step)
        self.plan.count("clamped", results[3], step)
        return results

    def _worked_out(self, guards: tuple[Tensor | None, ...], step: Step) -> tuple[Tensor, ...]:
        """What `pulled` returns."""
        plan = self.plan
        # Read at every step: a rate that was remembered would miss what a schedule does.
        rates = plan.rates() if self._goes_by_rate else None
        # AWS goes first where both are on a weight: one decay, not two.
        owned = plan.owns_decay(step, DecayOwner.WEIGHT_DECAY)
        shares = plan.spread_groups("decay_share", self._shares())
        numbers = shares, rates, owned, plan.counters["clamped"], *guards
        return work_out(plan.vectors, pulled, None, numbers, (None, None, plan.bad))

    @property
    def _goes_by_rate(self) -> bool:
        return self.rule.rate in ("lr", "lr_squared")

    def _shares(self) -> list[Number]:
        """By param group: what a vector loses, or what times the learning rate it loses."""
        shares: list[Number] = []
        for place, (group, _) in enumerate(self.plan.groups):
            share = self._strength(group)
            if self.rule.rate in ("lr_squared", "schedule"):
                share = share * self._of_largest(place, group)
            shares.append(share)
        return shares

    def _strength(self, group: Group) -> Number:
        """λ of a param group."""
        if self.rule.weight_decay == "replace":
            # As it stands: what momentum makes of a coupled decay was never asked for.
            return group_number(group, "weight_decay")
        return self.rule.weight_decay

    def _of_largest(self, place: int, group: Group) -> Number:
        """The learning rate as a part of the largest, which may be the present one."""
        lr = group_number(group, "lr")
        largest = largest_number(self.largest.get(place, 0.0), *named_rates(group))
        self.largest[place] = largest
        # Before the first step of a warm-up that starts at 0 the largest is 0, too.
        if isinstance(largest, Tensor):
            return torch.nan_to_num(lr / largest, nan=0.0)
        return 0.0 if largest == 0 else lr / largest

    def _largest_of(self, place: int) -> Number | None:
        return self.largest.get(place)

    # -- over plans and checkpoints

    def state(self) -> dict[str, Any]:
        """The largest learning rates: a schedule may not name its own."""
        rates = {}
        for target in self.plan.targets:
            place = self._place_of(target)
            if place in self.largest:
                rates[target.name] = float(self.largest[place])
        return {"lr_max": rates}

    def load(self, state: dict[str, Any]) -> None:
        """As `state` gave it."""
        for target in self.plan.targets:
            if target.name in state["lr_max"]:
                self._raise_largest(target, state["lr_max"][target.name])

    def inherit(self, earlier: PacedDecay) -> None:
        """The largest learning rates of weights that stay."""
        before = {target.name: target for target in earlier.plan.targets}
        for target in self.plan.targets:
            if target.name not in before:
                continue
            place = earlier._place_of(before[target.name])
            if place in earlier.largest:
                self._raise_largest(target, earlier.largest[place])

    def _raise_largest(self, target: Target, rate: Number) -> None:
        place = self._place_of(target)
        self.largest[place] = largest_number(self.largest.get(place, 0.0), rate)

    def _place_of(self, target: Target) -> int:
        """The place of its param group among those of the plan."""
        group = self.plan.group_of(target)
        # By identity: groups of equal numbers are not the same group.
        return next(i for i, (known, _) in enumerate(self.plan.groups) if known is group)

    # -- what tables and predictions say

    def stated(self, target: Target, *, cautious: bool) -> Decaying:
        """What is done to ``target``."""
        largest = partial(self._largest_of, self._place_of(target))
        return Decaying(self.rule.weight_decay, self.rule.rate, cautious, largest)

    def treatments(self) -> list[str]:
        """What the tables say."""
        plan = self.plan
        owners = plan.bracket.decay_owners()
        # Once a group, not a weight: there may be thousands of weights.
        texts = {id(group): self._in_words(group) for group, _ in plan.groups}
        words = []
        for target, group in zip(plan.targets, plan.groups_of(plan.targets), strict=True):
            is_ours = owners.get(target.weight) in (DecayOwner.WEIGHT_DECAY, None)
            words.append(texts[id(group)] if is_ours else "its decay left to AdaptiveWeightShrink")
        return words

    def _in_words(self, group: Group) -> str:
        rule = self.rule
        kind = "cautious decay" if rule.cautious else "decay"
        text = f"{kind} {float(self._strength(group)):.2g} {_PER_STEP[rule.rate]}"
        replaced = replaced_decay(self.plan.optimizer, group)
        return f"{text} ({replaced})" if replaced else text


class DecayWorker(PacedDecay):
    """Decays the targets of one optimizer right before its step."""

    def prepare(self) -> None:
        """As above, and room for factors that rounding would swallow."""
        super().prepare()
        self.shrinker = Shrinker(self.plan)

    @during(Phase.SHRINK)
    def decay(self, step: Step) -> None:
        """w <- (1 - p) w, at the weight that the gradient was taken at."""
        self.shrinker.shrink(step, self._kept(step))

    def rehearse(self, step: Step) -> None:
        """The factors, where the host does not know them, and the shrink."""
        factor = self._worked_out(self.plan.expected_guards(step), step)[1]
        self.shrinker.rehearse(factor)

    def effect(self, target: Target) -> Effect:
        """It shrinks the whole weight."""
        return self.stated(target, cautious=False)


class CautiousDecayWorker(PacedDecay):
    """Decays, right after a step, the entries that it does not lengthen."""

    def prepare(self) -> None:
        """As above; refuse weights that cannot hold so small a change."""
        super().prepare()
        refuse_16_bits("WeightDecay(cautious=True)", self.plan)
        self.pull: Tensor
        """Of this step, ``(n,)``: the share that each vector would lose."""
        self.shortened: list[Tensor | None] | None = None
        """Of this step, bool like the weights: which entries it does not lengthen; None: not told
        in advance."""

    @during(Phase.MEASURE)
    def look(self, step: Step) -> None:
        """Have the weights copied before the update: only the step tells which entries decay."""
        self.shortened = None
        step.bracket.request_snapshot(self.plan.vectors.storages())
        self.pull = self._pull(step)

    def rehearse(self, step: Step) -> None:
        """The shares, where the host does not know them, and the decay."""
        vectors = self.plan.vectors
        pull = self._worked_out(self.plan.expected_guards(step), step)[0]
        # The weights stand in for the copy that is not there yet: only its layout matters.
        vectors.decay_shortened_(pull, vectors.values())

    @during(Phase.LOOK_AGAIN)
    def keep_signs(self, step: Step) -> None:
        """Tell the optimizer's own step before a projection changes it."""
        if step.bracket.acts_between(Phase.LOOK_AGAIN, Phase.PROJECT, before_rank=self.rule.rank):
            self.shortened = self.plan.vectors.shortened(self.plan.vectors.snapshots(step.bracket))

    @during(Phase.PROJECT)
    def decay(self, step: Step) -> None:
        """w' <- w' - p s 1[(w' - s) s <= 0] (cautious weight decay, arXiv 2510.12402)."""
        vectors = self.plan.vectors
        shortened, self.shortened = self.shortened, None
        vectors.decay_shortened_(self.pull, vectors.snapshots(step.bracket), shortened)

    def effect(self, target: Target) -> Effect:
        """It shrinks some entries, and nobody knows in advance which."""
        return self.stated(target, cautious=True)


_PER_STEP = {
    "lr": "per lr",
    "lr_squared": "per lr²/lr_max",
    "schedule": "per step at the largest lr",
    "constant": "per step",
}


class WeightDecay(NormDynCallback):
    r"""A decoupled weight decay of the targets in place of the optimizer's own.

    .. math:: w \leftarrow (1 - p_t)\,w

    before every step. With :math:`\lambda` = ``weight_decay``, :math:`\eta` the learning rate of
    the weight's param group at this very step and :math:`\eta_{max}` the largest one, ``rate`` says
    what :math:`p_t` is:

    - ``"lr"``: :math:`\eta\lambda`, as in AdamW. Adam becomes AdamW, SGD becomes SGDW.
    - ``"lr_squared"``: :math:`\lambda\eta^2/\eta_{max}`, corrected decay (AdamC, arXiv 2506.02285):
      the equilibrium norm stays when the learning rate falls.
    - ``"schedule"``: :math:`\lambda\eta/\eta_{max}`, which follows the shape of the schedule and
      not its height.
    - ``"constant"``: :math:`\lambda`, independent decay, also at a learning rate of 0.

    With ``cautious`` (cautious weight decay, arXiv 2510.12402) the decay comes after the step and
    spares the entries that the optimizer's own step :math:`\Delta` lengthens:
    :math:`w' \leftarrow w' - p_t\,w\,1[\Delta w \le 0]`, entry by entry.

    :math:`\eta_{max}` is the largest of the group's ``max_lr``, its ``initial_lr`` and all rates so
    far. Of a warm-up that is written by hand only the last are known: its own maximum until now.

    The share is exact up to 0.5 and clamped there. Where AdaptiveWeightShrink is the decay of a
    weight, this callback leaves it to that.

    Args:
        weight_decay: λ; ``"replace"``: the number in the param group as it stands, which is never
            divided by 1 - momentum. Either way the optimizer's own decay of the targets is taken
            over.
        rate: what λ is multiplied by in a step: ``"lr"``, ``"lr_squared"``, ``"schedule"`` or
            ``"constant"``.
        cautious: whether entries that the step lengthens are spared.
        params: ``"auto"``: with ``rate="lr_squared"`` the scale-invariant weights (the paper's
            rule), else every weight of two or more dimensions whose rows are no single numbers; of
            either those whose param group decays (with a number, all if none does). Or a glob
            pattern, or a list of them.

    Raises:
        ValueError: for a decay below 0 or NaN, and for unknown words.

    Example:
        >>> from lightning_normdyn import WeightDecay
        >>> WeightDecay(0.1, rate="lr_squared").rate
        'lr_squared'
    """

    worker = DecayWorker
    part = DecayPart
    numbers = ("weight_decay", "rate", "cautious")
    # Whichever weights "auto" means.
    acts = True
    rank = Turn.DECAY

    def __init__(
        self,
        weight_decay: float | Literal["replace"] = "replace",
        *,
        rate: DecayRate = "lr",
        cautious: bool = False,
        params: Params = "auto",
    ) -> None:
        super().__init__(params)
        self.weight_decay: float | Literal["replace"] = "replace"
        if weight_decay != "replace":
            self.weight_decay = check_number("weight_decay", weight_decay, ">= 0", " or 'replace'")
        self.rate = check_choice("rate", rate, get_args(DecayRate))
        self.cautious = bool(cautious)
        # Only a corrected decay is about weights whose norm alone matters.
        self.writes = rate == "lr_squared"

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """The rate must be known where it counts, and the decay of the targets ours to take
        over."""
        if self.rate in ("lr", "lr_squared"):
            check_rate(optimizer, weights)
        check_decay_takeover(optimizer, weights)
