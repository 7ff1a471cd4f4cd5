"""Takes the weight decay of single weights over from their optimizer, for the duration of a step.

From ``ready`` to ``stepped`` the step sees the claimed weights in param groups of their own with
``weight_decay=0``, which is exact to the bit in every precision. The step alone does
(`lightning_normdyn.optimizers.step_view`): the optimizer keeps its param groups, whoever looks at
it meanwhile. Subtracting λ·w from the gradient instead would round, and miss what an optimizer does
with its decay.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.placement import full_shape
from lightning_normdyn.geometry.vectors import WeightVectors

from .decay import AppliedDecay, DecayOwner, applied_decay
from .group_numbers import Number, group_number, is_zero
from .recognition import writes_into_groups
from .scaling import Scaling
from .step import Step
from .step_view import ParamGroup, Taken, show, unsplit, view_class, view_of
from .views import groups_for_step, steps_as_one

Claimed = Set[Tensor] | Mapping[Tensor, Partition]
"""Weights whose decay is taken over: whole, or only in the rows that belong to a vector of their
partition."""


class _Rest(NamedTuple):
    """Entries that nobody claimed of a weight that the step sees without decay."""

    weight: Tensor
    claimed: Partition | None  # the partition whose vectors were claimed; None: nothing was
    group: ParamGroup


_Claim = tuple[DecayOwner, Claimed, int]


def _is_same_claim(claim: _Claim, known: _Claim) -> bool:
    # By identity: comparing sets of weights would take as long as working them out.
    return claim[0] == known[0] and claim[1] is known[1] and claim[2] == known[2]


class DecayTakeover:
    """The claims on the decay of one optimizer's weights, and how a step is made without it."""

    def __init__(self) -> None:
        self._claims: dict[object, tuple[DecayOwner, Callable[[], Claimed]]] = {}
        # Weak: a view shares the optimizer's __dict__, whose hooks hold this object.
        self._view: ref[Optimizer] | None = None
        self._stepping_class: type[Optimizer] | None = None
        self._view_class: type[Any] | None = None
        self._writes_into_groups = True
        # What the claims of the last step came to. They are asked at every step, and nearly always
        # say the same.
        self._known: list[_Claim] = []
        self._owners: dict[Tensor, DecayOwner] = {}
        self._taken = Taken()
        self._has_partial = False
        self._rests: list[_Rest] = []
        self._rest_vectors: WeightVectors | None = None
        # Gradients that were changed for the step: what they were before, and their version
        # afterwards.
        self._gradients: list[tuple[Tensor, Tensor, int]] = []

    # ------------------------------------------------------------------------------- claims

    def claim(
        self,
        claimant: object,
        owner: DecayOwner,
        weights: Claimed | Callable[[], Claimed],
    ) -> Callable[[], None]:
        """See `lightning_normdyn.optimizers.bracket.StepBracket.claim_decay`."""
        self._claims[claimant] = (owner, weights if callable(weights) else lambda: weights)

        def remove() -> None:
            self._claims.pop(claimant, None)

        return remove

    def owners(self) -> dict[Tensor, DecayOwner]:
        """Who applies the decay of each weight that somebody has claimed; not to be changed."""
        self._ask()
        return self._owners

    def _partitions(self) -> Taken:
        """What of each claimed weight is taken over; None: the whole weight."""
        self._ask()
        return self._taken

    def _ask(self) -> None:
        """Work out anew what is claimed, unless all claims are the same objects as before."""
        claims = []
        for owner, ask in self._claims.values():
            claimed = ask()
            # With its size: somebody may have added to a set of his own.
            claims.append((owner, claimed, len(claimed)))
        if len(claims) == len(self._known) and all(map(_is_same_claim, claims, self._known)):
            return
        self._known, self._owners, self._taken = claims, {}, Taken()
        # The highest owner last: it is the one that counts.
        for owner, weights, _ in sorted(claims, key=lambda claim: claim[0]):
            self._owners.update(dict.fromkeys(weights, owner))
            parts = weights if isinstance(weights, Mapping) else dict.fromkeys(weights)
            self._taken.update(parts)
        self._has_partial = any(p is not None and p.partial for p in self._taken.values())

    # ----------------------------------------------------------------------------- one step

    @property
    def view(self) -> Optimizer | None:
        """What the step that goes on runs on, if that is a view; nobody else holds it."""
        return None if self._view is None else self._view()

    @property
    def changes_gradients(self) -> bool:
        """Whether gradients are changed for the step that goes on."""
        return bool(self._gradients)

    def view_for(self, stepping: Optimizer) -> Optimizer:
        """What ``step`` is to run on: a view of what was about to step.

        That itself where no view can be made.
        """
        kind = type(stepping)
        # Making a class is slow, and a strategy may step another object than the optimizer.
        if self._stepping_class is not kind:
            self._stepping_class, self._view_class = kind, view_class(kind)
            self._writes_into_groups = writes_into_groups(kind)
        if self._view_class is None:
            self._view = None
            return stepping
        view = view_of(stepping, self._view_class)
        self._view = ref(view)
        return view

    def begin(
        self,
        stepping: Optimizer,
        step: Step,
        *,
        again: bool,
    ) -> Callable[[], None] | None:
        """Let the step see the claimed weights without weight decay.

        What it then sees without decay although nobody claimed it gets the optimizer's own from
        here: a decoupled one at once, a coupled one by what is returned.

        Args:
            stepping: what steps.
            step: the step.
            again: whether the last step raised, and its weights are as they were left for it.

        Returns:
            What adds a coupled decay to the gradients, for after they are sealed; None if there is
            none to add.
        """
        # Most rules leave the decay to the optimizer.
        if not self._claims:
            return None
        taken = self._partitions()
        if not taken:
            return None
        optimizer, write_through = step.optimizer, self._writes_into_groups

        def split(groups: Sequence[ParamGroup]) -> list[ParamGroup] | None:
            return groups_for_step(optimizer, groups, taken, write_through=write_through)

        groups = stepping.param_groups
        shown = split(groups)
        # No group that holds a claimed weight decays at present: schedules may change that.
        if shown is None:
            return None
        # A step without a view would decay what a callback decays already.
        view = self.view
        if view is None:
            raise NotSupportedError(
                f"The weight decay of {type(optimizer).__name__} would have to be taken over, but "
                "its class cannot be derived from. Set weight_decay=0 in the param groups of these "
                "weights, or use weight_decay='keep' where the callback has it."
            )
        add_decay = self._decay_rest(taken, step, again=again)
        show(view, split, groups, shown)
        return add_decay

    def end(self, step: Step | None, *, after_update: bool) -> None:
        """Give the optimizer its own gradients back, and show nobody split groups any more.

        Args:
            step: the step that is over, or did not come to its end.
            after_update: whether only the update has been there since. If the step raised, somebody
                may have written new gradients into the same memory: these stay.
        """
        if self._gradients:
            self._put_gradients_back(step, after_update=after_update)
        view = self.view
        self._view = None
        if view is not None:
            unsplit(view)

    @torch.no_grad()
    def _put_gradients_back(self, step: Step | None, *, after_update: bool) -> None:
        changed, self._gradients = self._gradients, []
        for gradient, before, version in changed:
            if after_update or gradient._version == version:
                gradient.copy_(before)
        # Putting them back has raised their versions, which must not look like new gradients.
        if step is not None:
            for scaling in step.scalings:
                scaling.seal_gradients()

    # -------------------------------------------------- what nobody claimed and loses its decay

    def _decay_rest(
        self,
        taken: Mapping[Tensor, Partition | None],
        step: Step,
        *,
        again: bool,
    ) -> Callable[[], None] | None:
        """Apply the optimizer's decay to `_Rest`, as the optimizer itself would."""
        optimizer = step.optimizer
        if not self._has_partial and not steps_as_one(optimizer):
            return None
        rests = _rests_of(optimizer, taken)
        if not rests:
            return None
        vectors = self._vectors_of(rests)
        factors: list[Any] = []
        amounts: list[Any] = []
        for rest, has_gradient in zip(rests, vectors.has_gradient(step), strict=True):
            # A weight without gradient is neither stepped nor decayed.
            decay = applied_decay(optimizer, rest.group, rest.weight) if has_gradient else None
            decay = decay or AppliedDecay("decoupled", 0.0)
            amount: Number = 0.0
            if decay.kind == "coupled":
                # torch turns the gradient around before it adds the decay.
                sign = -1.0 if rest.group.get("maximize") else 1.0
                amount = sign * decay.amount
            factors.append(decay.factor)
            amounts.append(amount)
        if not again and any(isinstance(f, Tensor) or f != 1 for f in factors):
            factor_of_vectors = step.unless_skipped(_spread(vectors, factors), 1.0)
            step.scale(Scaling(vectors, factor_of_vectors, invariant=[False] * len(rests)))
        if all(is_zero(amount) for amount in amounts):
            return None
        return partial(self._add_to_gradients, optimizer, vectors, _spread(vectors, amounts))

    def _vectors_of(self, rests: list[_Rest]) -> WeightVectors:
        """The index space of these entries, made anew only when others are meant."""
        ids = [(id(rest.weight), id(rest.claimed)) for rest in rests]
        known = [(id(rest.weight), id(rest.claimed)) for rest in self._rests]
        # The rests are kept with them, so that an id is not given to another object meanwhile.
        if self._rest_vectors is None or ids != known:
            weights = [rest.weight for rest in rests]
            partitions = [
                Partition.layer(full_shape(rest.weight))
                if rest.claimed is None
                else rest.claimed.rest()
                for rest in rests
            ]
            self._rests, self._rest_vectors = rests, WeightVectors(weights, partitions)
        return self._rest_vectors

    def _add_to_gradients(
        self,
        optimizer: Optimizer,
        vectors: WeightVectors,
        amounts: Tensor,
    ) -> None:
        # A fused optimizer divides by the scale of a GradScaler in its kernel, before the decay.
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            amounts = amounts * scale.to(amounts)
        gradients = vectors.gradients()
        # Copied, since subtracting again would leave a rounding behind.
        before = [(g, g.clone()) for g in gradients if g is not None]
        vectors.add_scaled_(amounts, vectors.values(), gradients)
        self._gradients = [(g, copy, g._version) for g, copy in before]


def _rests_of(optimizer: Optimizer, taken: Mapping[Tensor, Partition | None]) -> list[_Rest]:
    """What the step sees without its decay although nobody claimed it.

    That is rows of claimed weights, and whole weights where a strategy steps all weights of a group
    as one tensor.
    """
    as_one = steps_as_one(optimizer)
    rests = []
    for group in optimizer.param_groups:
        # A decay that lives on a device counts as one, since nothing waits for it.
        if is_zero(group_number(group, "weight_decay")):
            continue
        for weight in group["params"]:
            claimed = taken.get(weight)
            partly = claimed is not None and claimed.partial
            if partly or (as_one and weight not in taken):
                rests.append(_Rest(weight, claimed, group))
    return rests


def _spread(vectors: WeightVectors, values: list[Any]) -> Tensor:
    """One number per weight, for each vector."""
    per_weight = [
        torch.as_tensor(value, dtype=vectors.sum_dtype, device=vectors.device) for value in values
    ]
    return vectors.spread(torch.stack(per_weight))
