"""A change of scale that changes nothing else: weights, optimizer state and the normalization
behind them together.

Shared by the callbacks that rescale (WeightRescaling, LRDropRescaling).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normdyn.engine.lightning_facts import callbacks_of
from lightning_normdyn.engine.messages import warn_once
from lightning_normdyn.engine.part import Part
from lightning_normdyn.engine.plan import Plan
from lightning_normdyn.engine.rule import Rule
from lightning_normdyn.engine.session import Session
from lightning_normdyn.engine.target import Target
from lightning_normdyn.errors import NormDynError, NotSupportedError
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.invariance.checks import verify_scale_invariance
from lightning_normdyn.optimizers.scaling import Scaling, Statistics
from lightning_normdyn.optimizers.state import per_matrix_only, state_exponents


class Rescaler:
    """Applies one factor per vector to the weights of a plan and to everything whose meaning
    depends on their scale.

    Args:
        plan: the targets.
        session: the fit.
        optimizer_state: ``"rescale"`` or ``"keep"``.

    Raises:
        NotSupportedError: for statistics behind a target that cannot follow, and for per-vector
            factors under an optimizer that allows
        one per matrix only.
    """

    def __init__(self, plan: Plan, session: Session, optimizer_state: str) -> None:
        self.plan = plan
        self._exponents = state_exponents(plan.optimizer) if optimizer_state == "rescale" else {}
        if self._exponents and per_matrix_only(plan.optimizer):
            for target in plan.targets:
                if target.partition.n > 1:
                    raise NotSupportedError(
                        f"{type(plan.optimizer).__name__} orthogonalizes whole matrices, so "
                        f"`{target.name}` can only be "
                        f"rescaled by one factor, but it has {target.partition.n} vectors. "
                        "Use granularity='layer', or optimizer_state='keep' where the callback has "
                        "it."
                    )
        # Normalizations whose running statistics were gathered at the old scale: (name, module,
        # position of the weight, vector of each
        # channel, degree, position of the bias).
        self._norms: list[tuple[str, nn.Module, int, Tensor, float, int | None]] = []
        parameters = {
            name: weight for weight, names in session.weights.names.items() for name in names
        }
        biases: list[Tensor] = []
        for position, target in enumerate(plan.targets):
            verdict = target.verdict
            if verdict.stale_statistics:
                raise NotSupportedError(
                    f"`{target.name}` is followed by running statistics that cannot be corrected "
                    f"({', '.join(verdict.stale_statistics)}), so evaluation after a rescale would "
                    f"be wrong. "
                    f"Leave it out with params='!{target.name}', or use track_running_stats=False."
                )
            if not verdict.batch_norms:
                continue
            # The links count the vectors of the verdict, the factors those of the target, which may
            # be coarser (granularity="layer").
            # The last entry stands for channels that no vector feeds.
            partition = verdict.partition
            assert partition is not None, "a link leads from a vector"
            nowhere = target.partition.n
            vector_of = torch.cat(
                [
                    partition.within(target.partition),
                    torch.tensor([-1], dtype=torch.long, device="cpu"),
                ]
            )
            vector_of = torch.where(vector_of >= 0, vector_of, nowhere)
            for link in verdict.batch_norms:
                module = session.module.get_submodule(link.module)
                index = vector_of[link.vector.cpu()]
                bias = parameters.get(link.bias) if link.bias else None
                place = None if bias is None else len(biases)
                self._norms.append(
                    (
                        link.module,
                        module,
                        position,
                        index.to(plan.vectors.device),
                        link.degree,
                        place,
                    )
                )
                if bias is not None:
                    biases.append(bias)
        # Statistics are whole on every rank; a bias may lie in pieces like any weight.
        self._biases = WeightVectors(
            biases, [Partition.filters(session.weights.shapes[b]) for b in biases]
        )

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
            state=self.plan.optimizer.state,
            exponents=self._exponents,
            gradients=gradients,
            statistics=self._statistics(factor),
            invariant=self.plan.invariant,
        )

    def _statistics(self, factor: Tensor) -> list[Statistics]:
        if not self._norms:
            return []
        factors = self.plan.vectors.gather(factor)
        biases = self._biases.gather(self._biases.inner((self._biases.values(), None))[0])
        found = []
        for name, module, position, index, degree, bias in self._norms:
            mean, var = module.running_mean, module.running_var
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                extended = torch.cat([factors[position], factor.new_ones(1)])
                channel = (extended[index] ** degree).to(mean.device)
                offset = None if bias is None else biases[bias].to(mean.device)
                found.append(Statistics(name, module, position, channel, offset))
        return found


def changes_function(target: Target) -> str:
    """What tables add for a target whose length the network's function depends on, or may do."""
    if target.scale_invariant:
        return ""
    return f"; {'changes' if target.verdict.kind == 'no' else 'may change'} the network's function"


def warn_of_changed_function(rule: Rule, plan: Plan) -> None:
    """Say once that a rescale of weights named by a person, and not known to be scale-invariant,
    changes what the network computes."""
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
    weight's output. Everything is put back
    bit for bit.

    Raises:
        NotSupportedError: naming the weights on whose length the function depends; or for a batch
            that the forward cannot be called with.
    """
    claims = [t.verdict for t in plan.targets if t.verdict.partition is not None]
    with session.trainer.precision_plugin.forward_context():
        for inputs in _inputs_of(session):
            try:
                if verify_scale_invariance(session.module, *inputs, verdicts=claims):
                    return
            except NormDynError:
                raise
            except Exception as error:  # whatever a forward raises that expects something else
                refusal = error
                continue
            guilty = [
                c.name
                for c in claims
                if not verify_scale_invariance(session.module, *inputs, verdicts=[c])
            ]
            break
        else:
            raise NotSupportedError(
                f"verify=True calls the LightningModule with the batch, and its forward raised "
                f"{type(refusal).__name__}: {refusal}. "
                f"{_BY_HAND}"
            ) from refusal
    raise NotSupportedError(
        f"The function changes with the length of "
        f"{', '.join(f'`{name}`' for name in guilty) or 'these weights together'}, although the "
        "gradients do not show it. Exclude them: params=['!NAME'] means all scale-invariant "
        "weights but that one."
    )


_BY_HAND = "Leave verify off, and call lightning_normdyn.targets.verify_scale_invariance yourself."


def _inputs_of(session: Session) -> list[tuple[Any, ...]]:
    """With what to try to call the LightningModule's forward: the first element of the batch, the
    first two, ..., the whole batch.

    Raises:
        NotSupportedError: if its signature takes none of them.
    """
    batch = session.batch
    parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    candidates: list[tuple[Any, ...]] = [tuple(parts[:count]) for count in range(1, len(parts) + 1)]
    if not isinstance(batch, Tensor):
        candidates.append((batch,))
    signature = inspect.signature(session.module.forward)
    fitting = [inputs for inputs in candidates if _takes(signature, inputs) and _tensors_of(inputs)]
    if fitting:
        return fitting
    if parts and isinstance(parts[0], Tensor):
        reason = f", but its forward{signature} takes other arguments"
    else:
        reason = (
            f", or its first element, but that is a {type(parts[0] if parts else batch).__name__}"
        )
    raise NotSupportedError(
        f"verify=True calls the LightningModule with the batch{reason}. {_BY_HAND}"
    )


def _takes(signature: inspect.Signature, inputs: tuple[Any, ...]) -> bool:
    try:
        signature.bind(*inputs)
    except TypeError:
        return False
    return True


def _tensors_of(inputs: tuple[Any, ...]) -> bool:
    """Whether these are tensors, or sequences of tensors."""
    return all(
        isinstance(x, Tensor)
        or (isinstance(x, (tuple, list)) and bool(x) and _tensors_of(tuple(x)))
        for x in inputs
    )


class RescalingPart(Part[Any]):
    """The part in a fit of a callback that changes the scale of weights by leaps."""

    def fit_start(self) -> None:
        """Refuse Lightning's averages of weights.

        An average over weights of different lengths points elsewhere than any of them, and its
        BatchNorm statistics belong to none.

        Raises:
            NotSupportedError: naming both callbacks.
        """
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
