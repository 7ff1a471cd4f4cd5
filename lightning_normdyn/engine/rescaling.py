"""A change of scale that changes nothing else: weights, optimizer state and the normalization
behind them together.

Shared by the callbacks that rescale (WeightRescaling, LRDropRescaling).
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normdyn.errors import NormDynError, NotSupportedError
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.invariance.checks import verify_scale_invariance
from lightning_normdyn.invariance.verdict import Verdict
from lightning_normdyn.optimizers.scaling import Scaling, Statistics
from lightning_normdyn.optimizers.state import StateOf, per_matrix_only, state_exponents

from .lightning_facts import callbacks_of
from .messages import named, warn_once
from .part import Part
from .plan import Plan, Target
from .rule import Rule
from .selection import AnyRule
from .session import Session
from .value_checks import Check, flag, record
from .worker import Worker


@dataclass
class _Follower:
    """A normalization whose running statistics were gathered at the old scale of a weight.

    Args:
        name: of the module.
        module: a BatchNorm.
        position: of the weight among the targets.
        vector: int64 ``(channels,)``: the vector that feeds each channel; the number of vectors for
            a channel that none feeds.
        degree: the channel goes as this power of the vector's length.
        bias: position among the biases of what is added in front of it; None: nothing is.
    """

    name: str
    module: nn.Module
    position: int
    vector: Tensor
    degree: float
    bias: int | None


class Rescaler:
    """Applies one factor per vector to the weights of a plan and to everything whose meaning
    depends on their scale.

    Args:
        plan: the targets.
        session: the fit.
        optimizer_state: ``"rescale"`` or ``"keep"``.

    Raises:
        NotSupportedError: for statistics behind a target that cannot follow, and for per-vector
            factors under an optimizer that allows one per matrix only.
    """

    def __init__(
        self,
        plan: Plan,
        session: Session,
        optimizer_state: str,
    ) -> None:
        self.plan = plan
        self._exponents = state_exponents(plan.optimizer) if optimizer_state == "rescale" else {}
        # With its state kept, a matrix-wise optimizer does not notice what is done to its rows.
        if self._exponents and per_matrix_only(plan.optimizer):
            self._refuse_vectors()
        self._states = StateOf(plan.vectors.weights)
        self._followers: list[_Follower] = []
        biases: list[Tensor] = []
        for position, target in enumerate(plan.targets):
            self._follow(position, target, session, biases)
        # Statistics are whole on every rank; a bias may lie in pieces like any weight.
        shapes = session.weights.shapes
        self._biases = WeightVectors(biases, [Partition.filters(shapes[b]) for b in biases])

    def _refuse_vectors(self) -> None:
        for target in self.plan.targets:
            if target.partition.n > 1:
                raise NotSupportedError(
                    f"{type(self.plan.optimizer).__name__} orthogonalizes whole matrices, so "
                    f"`{target.name}` can only be rescaled by one factor, but it has "
                    f"{target.partition.n} vectors. Use granularity='layer', or "
                    f"optimizer_state='keep' where the callback has it."
                )

    def _follow(
        self, position: int, target: Target, session: Session, biases: list[Tensor]
    ) -> None:
        """Find the normalizations behind a target, and the biases in front of them."""
        verdict, partition = target.verdict, target.verdict.partition
        if verdict.stale_statistics:
            raise NotSupportedError(
                f"`{target.name}` is followed by running statistics that cannot be corrected "
                f"({', '.join(verdict.stale_statistics)}), so evaluation after a rescale would be "
                f"wrong. Leave it out with params='!{target.name}', or use "
                f"track_running_stats=False."
            )
        if partition is None or not verdict.batch_norms:
            return
        # The links count the vectors of the verdict, the factors those of the target, which may be
        # coarser (granularity="layer"). The last entry stands for channels that no vector feeds.
        vector_of = torch.nn.functional.pad(partition.within(target.partition), (0, 1), value=-1)
        vector_of = torch.where(vector_of >= 0, vector_of, target.partition.n)
        parameters = session.weights.by_name()
        for link in verdict.batch_norms:
            module = session.module.get_submodule(link.module)
            vector = vector_of[link.vector.cpu()].to(self.plan.vectors.device)
            # The mean of a channel holds the bias, which does not scale with the weight.
            bias = parameters.get(link.bias) if link.bias else None
            place = None if bias is None else len(biases)
            if bias is not None:
                biases.append(bias)
            follower = _Follower(link.module, module, position, vector, link.degree, place)
            self._followers.append(follower)

    @staticmethod
    def check(optimizer: Optimizer, optimizer_state: str) -> None:
        """Refuse, before training, an optimizer whose state we cannot rescale.

        Raises:
            NotSupportedError: naming ``optimizer_state="keep"`` as the way out.
        """
        if optimizer_state == "rescale":
            state_exponents(optimizer)

    def scaling(self, factor: Tensor, *, gradients: bool = False) -> Scaling:
        """What multiplies every vector by ``factor`` (``(n,)``); state, statistics and, on request,
        this step's gradients follow."""
        return Scaling(
            self.plan.vectors,
            factor,
            states=self._states.now(self.plan.optimizer) if self._exponents else (),
            exponents=self._exponents,
            gradients=gradients,
            statistics=self._statistics(factor),
            invariant=self.plan.invariant,
        )

    def rehearse(self, factor: Tensor) -> None:
        """As `Worker.rehearse`: what `scaling` takes, and what it does to the weights."""
        self._statistics(factor)
        self.plan.vectors.scale_(factor)

    def _statistics(self, factor: Tensor) -> list[Statistics]:
        if not self._followers:
            return []
        # The 1 at the end is for channels that no vector feeds: their statistics stay.
        factors = [*self.plan.vectors.gather(factor), factor.new_ones(1)]
        channels = torch.cat(factors)[self._vector_of_channel]
        biases = self._gathered_biases()
        statistics = []
        of_followers = self._by_follower(self._powers(channels))
        for follower, of_follower in zip(self._followers, of_followers, strict=True):
            mean, var = follower.module.running_mean, follower.module.running_var
            # A person may have taken the statistics away since.
            if not (isinstance(mean, Tensor) and isinstance(var, Tensor)):
                continue
            channel = of_follower.to(mean.device)
            offset = None if follower.bias is None else biases[follower.bias].to(mean.device)
            statistics.append(
                Statistics(follower.name, follower.module, follower.position, channel, offset)
            )
        return statistics

    @cached_property
    def _vector_of_channel(self) -> Tensor:
        """int64: for each channel of all followers the vector that feeds it, among those of all
        targets; their number where none does."""
        sizes = [target.partition.n for target in self.plan.targets]
        starts = list(accumulate(sizes, initial=0))
        found = []
        for follower in self._followers:
            place, size = starts[follower.position], sizes[follower.position]
            is_fed = follower.vector < size
            found.append(torch.where(is_fed, follower.vector + place, starts[-1]))
        return torch.cat(found)

    def _powers(self, channels: Tensor) -> Tensor:
        """Factors of the channels of all followers, each by the degree of its own."""
        degrees = {follower.degree for follower in self._followers}
        if len(degrees) == 1:
            return channels ** degrees.pop()
        pairs = zip(self._by_follower(channels), self._followers, strict=True)
        return torch.cat([part**follower.degree for part, follower in pairs])

    def _by_follower(self, channels: Tensor) -> Sequence[Tensor]:
        return channels.split_with_sizes([len(follower.vector) for follower in self._followers])

    def _gathered_biases(self) -> list[Tensor]:
        """Whole, from wherever they lie."""
        if not self._biases.weights:
            return []
        # A filter of one entry is its sum.
        return self._biases.gather(self._biases.inner((self._biases.values(), None))[0])


def changes_function(target: Target) -> str:
    """What tables add for a target whose length the network's function depends on, or may do."""
    if target.scale_invariant:
        return ""
    how = "changes" if target.verdict.kind == "no" else "may change"
    return f"; {how} the network's function"


def warn_of_changed_function(rule: Rule, plan: Plan) -> None:
    """Say once that a rescale of weights named by a person, and not known to be scale-invariant,
    changes what the network computes."""
    # Plans are made anew whenever weights join, and the same weights would be warned of again.
    told = {name for name, target in plan.before.items() if not target.scale_invariant}
    targets = [t for t in plan.targets if not t.scale_invariant and t.name not in told]
    if not targets:
        return
    reasons = [f"`{t.name}` ({t.verdict.reason or t.verdict.kind})" for t in targets[:4]]
    more = f" and {len(targets) - 4} more" if len(targets) > 4 else ""
    warn_once(
        f"{type(rule).__name__} rescales weights that are not known to be scale-invariant, which "
        f"changes the network's function: {', '.join(reasons)}{more}. Leave them out of `params` "
        f"unless that is meant."
    )


def verify_targets(plan: Plan, session: Session) -> None:
    """Rescale all claimed vectors of a plan by random factors on the present batch: the outputs
    must not change.

    The one test that also catches what gradients cannot show, such as a detached copy of the
    weight's output. Everything is put back bit for bit.

    Raises:
        NotSupportedError: naming the weights on whose length the function depends; or for a batch
            that the forward cannot be called with.
    """
    # Nothing is claimed of a weight that only a person has named: a rescale of it may change
    # the outputs, and `warn_of_changed_function` says so.
    claims = [t.verdict for t in plan.targets if t.verdict.partition is not None]

    def holds(verdicts: list[Verdict], inputs: tuple[Any, ...]) -> bool:
        return bool(verify_scale_invariance(session.module, *inputs, verdicts=verdicts))

    # In the precision of the training: the claims are about the function that is trained.
    with session.trainer.precision_plugin.forward_context():
        inputs = _first_accepted(_inputs_of(session), lambda inputs: holds(claims, inputs))
        if inputs is None:
            return
        # One by one, to name them; together they may fail where each alone does not.
        guilty = [claim.name for claim in claims if not holds([claim], inputs)]
    raise NotSupportedError(
        f"The function changes with the length of {named(guilty) or 'these weights together'}, "
        f"although the gradients do not show it. Exclude them: params=['!NAME'] means all "
        f"scale-invariant weights but that one."
    )


def _first_accepted(
    candidates: list[tuple[Any, ...]], holds: Callable[[tuple[Any, ...]], bool]
) -> tuple[Any, ...] | None:
    """The first inputs that the forward takes, if the claims do not hold on them; None if they
    do."""
    refusal: Exception | None = None
    for inputs in candidates:
        try:
            return None if holds(inputs) else inputs
        # This says that the weights cannot be tested (they are sharded), whatever the inputs.
        except NormDynError:
            raise
        except Exception as error:  # whatever a forward raises that expects something else
            refusal = error
    raise NotSupportedError(
        f"verify=True calls the LightningModule with the batch, and its forward raised "
        f"{type(refusal).__name__}: {refusal}. {_BY_HAND}"
    ) from refusal


_BY_HAND = "Leave verify off, and call lightning_normdyn.targets.verify_scale_invariance yourself."


def _inputs_of(session: Session) -> list[tuple[Any, ...]]:
    """With what to try to call the LightningModule's forward: the first element of the batch, the
    first two, ..., the whole batch.

    Raises:
        NotSupportedError: if its signature takes none of them.
    """
    batch = session.batch
    parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    # A forward usually takes the inputs, and training_step the labels behind them.
    candidates: list[tuple[Any, ...]] = [tuple(parts[:count]) for count in range(1, len(parts) + 1)]
    # A forward may take the whole batch as one argument; a tensor is a candidate already.
    if not isinstance(batch, Tensor):
        candidates.append((batch,))
    signature = inspect.signature(session.module.forward)
    fitting = [each for each in candidates if _takes(signature, each) and _holds_tensors_only(each)]
    if fitting:
        return fitting
    first = parts[0] if parts else batch
    if isinstance(first, Tensor):
        reason = f", but its forward{signature} takes other arguments"
    else:
        reason = f", or its first element, but that is a {type(first).__name__}"
    raise NotSupportedError(
        f"verify=True calls the LightningModule with the batch{reason}. {_BY_HAND}"
    )


def _takes(signature: inspect.Signature, inputs: tuple[Any, ...]) -> bool:
    try:
        signature.bind(*inputs)
    except TypeError:
        return False
    return True


def _holds_tensors_only(inputs: Any) -> bool:
    """Whether this is a tensor, or a sequence of nothing but such."""
    if isinstance(inputs, (tuple, list)):
        return bool(inputs) and all(map(_holds_tensors_only, inputs))
    return isinstance(inputs, Tensor)


class RescalingWorker(Worker[AnyRule]):
    """What the workers of these callbacks share: the rescaler, and marks that come late.

    Args:
        part: as for every worker; its rule has ``verify``, and ``optimizer_state``, which is
            ``"rescale"`` or ``"keep"``.
        plan: as for every worker.
    """

    STATE: ClassVar[Check] = staticmethod(record({"unmarked": flag}, closed=True))

    event: ClassVar[str]
    """What a change of length is called in the monitor's history."""

    def prepare(self) -> None:
        """Hold the claims against the function itself, if that was asked for; find what has to
        follow a change of length."""
        rule: Any = self.rule
        warn_of_changed_function(rule, self.plan)
        if rule.verify:
            verify_targets(self.plan, self.session)
        self.rescaler = Rescaler(self.plan, self.session, rule.optimizer_state)
        self.unmarked = False
        """Whether a fused update turned out to have happened, so that the next row must tell of the
        change of length that belongs to it."""

    def _mark_now(self) -> None:
        self.plan.mark(self.event)

    def _mark_later(self) -> None:
        self.unmarked = True

    def _mark_what_is_late(self) -> None:
        # Marked in the next step and not as soon as it is known: that depends on when somebody
        # saves a checkpoint.
        if self.unmarked:
            self.unmarked = False
            self._mark_now()

    def inherit(self, earlier: Any) -> None:
        """A change of length after a fused update is still to be told."""
        self.unmarked = earlier.unmarked

    def state(self) -> dict[str, Any]:
        """Whether a change of length is still to be told."""
        return {"unmarked": self.unmarked}

    def load(self, state: dict[str, Any]) -> None:
        """As `state` gave it."""
        self.unmarked = state["unmarked"]


class RescalingPart(Part[Any]):
    """The part in a fit of a callback that changes the scale of weights by leaps."""

    def fit_start(self) -> None:
        """Refuse Lightning's averages of weights.

        An average over weights of different lengths points elsewhere than any of them, and its
        BatchNorm statistics belong to none.

        Raises:
            NotSupportedError: naming both callbacks.
        """
        # By name: the oldest Lightning that we support has no `WeightAveraging` to import. Base
        # classes count, since a subclass (EMAWeightAveraging) averages as well.
        names = {"WeightAveraging", "StochasticWeightAveraging"}
        for callback in callbacks_of(self.session.trainer):
            if names & {kind.__name__ for kind in type(callback).__mro__}:
                raise NotSupportedError(
                    f"{self.name} changes the length of weights that {type(callback).__name__} "
                    f"averages, so the average would mix weights of different scales. Remove one "
                    f"of the two; AdaptiveWeightShrink and RadialProjection change lengths "
                    f"smoothly."
                )
        super().fit_start()
