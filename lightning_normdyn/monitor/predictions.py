"""What a weight settles at if its hyperparameters stay as they are: the prediction beside each
curve of angular updates.

Numbers of the host. Formulas: `lightning_normdyn.theory.equilibrium`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan, nan
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_normdyn.engine.effect import Effects, Rescaling
from lightning_normdyn.optimizers.decay import AnOptimizer, Decay, decay_of, highest_claim
from lightning_normdyn.optimizers.group_numbers import Number
from lightning_normdyn.optimizers.recognition import class_for_predictions
from lightning_normdyn.optimizers.step_response import own_response, response_under
from lightning_normdyn.optimizers.step_rules import StepResponse, Subject
from lightning_normdyn.theory.equilibrium import settles_at, wrs_angular_update

from .by_weight import Doubles
from .pulls import paced_decay


def balance(
    effects: Effects,
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
    shrink: float | None = None,
) -> dict[str, Any] | None:
    """What pulls a weight shorter and what its steps lose, in the words of
    `lightning_normdyn.theory.equilibrium`.

    Args:
        effects: what the callbacks do to the weight.
        optimizer: its optimizer, or the class of it.
        group: its param group.
        shrink: the decay that AWS amounts to now.

    Returns:
        The options ``shrink``, ``projected``, and ``decay`` with what belongs to it; None where
        nothing has been derived: a callback of somebody else, two decays at once, a cautious decay
        of projected steps, steps of a recorded length or a given angle, a norm that is braked or
        that WRS sets now and then (for which there is
        `lightning_normdyn.theory.equilibrium.wrs_angular_update`).
    """
    if effects.underived or effects.scaled_steps or effects.rescaled_now is not None:
        return None
    if effects.steered:
        return None
    decay = _decay(effects, optimizer, group)
    if decay.doubled:
        return None
    options: dict[str, Any] = {}
    if effects.projection is not None:
        options["projected"] = True
    # It owns the decay where it acts, and so does not come on top of another one here.
    if effects.shrink is not None:
        options["shrink"] = shrink
    elif effects.decaying is not None:
        paced = paced_decay(effects, optimizer, group)
        return None if paced is None else dict(paced)
    # A step that is not projected needs no such option: the theory reads the group's decay.
    elif effects.projection is not None:
        if decay.rate is None:
            return None
        options["decay"] = decay.rate
    return options


def noise_coherence(
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
    effects: Effects,
    shape: tuple[int, int] | None,
) -> float | None:
    """κ of steps of pure noise, which the measured coherence is compared with; None where nobody
    has derived it.

    Args:
        optimizer: the optimizer, or its class.
        group: the weight's param group.
        effects: what callbacks do to the weight.
        shape: rows and columns, of a matrix.
    """
    # A stretched step is no sum of gradients; a brake only multiplies what a step ends at.
    if effects.underived or effects.scaled_steps or effects.rotation is not None:
        return None
    response = own_response(class_for_predictions(optimizer), group, Subject(shape))
    if response is None:
        return None
    if effects.projection is not None:
        response = response.projected()
    coherence = response.coherence
    # A number on an accelerator would have to be waited for.
    return None if isinstance(coherence, Tensor) else float(coherence)


def is_proportional(
    optimizer: AnOptimizer, group: Mapping[str, Any], shape: tuple[int, int] | None
) -> bool:
    """Whether the steps of a weight are proportional to its gradient, as those of SGD are; False
    where nobody knows.

    Args:
        optimizer: the optimizer, or its class.
        group: the weight's param group.
        shape: rows and columns, of a matrix.
    """
    response = own_response(class_for_predictions(optimizer), group, Subject(shape))
    return response is not None and not response.normalized


def relaxation_power(
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
    effects: Effects,
    shape: tuple[int, int] | None,
) -> float:
    """P of a norm that relaxes in 1/(P · pull) steps: 4 under SGD; 2 where steps do not depend on
    the size of the gradient, and where nobody has derived it.

    Args:
        optimizer: the optimizer, or its class.
        group: the weight's param group.
        effects: what callbacks do to the weight.
        shape: rows and columns, of a matrix.
    """
    response = own_response(class_for_predictions(optimizer), group, Subject(shape))
    power = 2.0 if response is None else float(response.power)
    # A shrink in proportion to the norm relaxes faster.
    return power + (effects.shrink is not None)


def _decay(
    effects: Effects,
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
) -> Decay:
    """Who decays the weight, and by how much."""
    rules = effects.decay_rules
    return decay_of(optimizer, group, rules, highest_claim(rules))


@dataclass(frozen=True)
class Prediction:
    """What a weight settles at if its hyperparameters stay as they are.

    Args:
        angular_update: RMS, radians per optimizer step.
        relaxation: optimizer steps in which a deviation of the norm falls by e; None where WRS sets
            the norm.
        power: P of `lightning_normdyn.theory.equilibrium`.
        pull: lr x decay; under AWS, lr x alpha. Changes with the schedule only.
        rough: 13-38 % off on a real network (Adam with coupled decay).
    """

    angular_update: float
    relaxation: float | None
    power: float
    pull: float
    rough: bool = False


class Predicted(NamedTuple):
    """A `Prediction` of each of several weights, ``(k,)`` each but for what they have in common.

    Args:
        angular_update: NaN of weights that have no prediction.
        relaxation: see `Prediction`; NaN for None.
        power: see there.
        pull: see there.
        rough: see there.
    """

    angular_update: Doubles
    relaxation: Doubles
    power: float
    pull: Doubles
    rough: bool


def predict(
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
    effects: Effects,
    measured: Mapping[str, float],
    length: int,
    subject: Subject | None = None,
) -> Prediction | None:
    """What a scale-invariant weight settles at; None where nothing has been derived, never a guess.

    Args:
        optimizer: the optimizer, or its class.
        group: the weight's param group at this step.
        effects: what the callbacks do to the weight.
        measured: means over the weight's vectors at this step: ``lr``, ``weight_norm``, and where
            they are asked for ``gradient_scale`` (E‖g‖²‖w‖²: WRS on SGD, Adam with coupled decay)
            and ``equivalent_weight_decay`` (AWS).
        length: entries of a vector.
        subject: which matrix at which step; asked for by Muon, NAdam and RAdam.

    Example:
        >>> import torch
        >>> group = {"weight_decay": 5e-4, "momentum": 0.9, "dampening": 0, "nesterov": False}
        >>> found = predict(torch.optim.SGD, group, Effects(), {"lr": 0.1, "weight_norm": 2.0}, 27)
        >>> round(found.angular_update, 6), round(found.relaxation)
        (0.007255, 500)
    """
    subject = subject or Subject()
    predictor = Predictor(optimizer, [group], subject.step)
    return predictor.predict(0, effects, measured, length, subject.shape)


class Predictor:
    """`predict` for many weights of one optimizer at one step.

    A thousand layers may share a param group: how its steps answer gradients, and who decays its
    weights, is worked out once.

    Args:
        optimizer: the optimizer, or its class.
        groups: its param groups at this step.
        number: of the step, from 1; None: in the limit of many steps.
    """

    def __init__(
        self,
        optimizer: AnOptimizer,
        groups: Sequence[Mapping[str, Any]],
        number: Number | None,
    ) -> None:
        self._optimizer = optimizer
        self._kind = class_for_predictions(optimizer)
        self._groups = groups
        self._number = number
        # By place and rate: the rate that the step applied, since some optimizers scale the one in
        # the param group.
        self._at_rate: dict[tuple[int, float], Mapping[str, Any]] = {}
        self._balances: dict[tuple[int, float, Effects], dict[str, Any] | None] = {}
        self._responses: dict[tuple[int, float, Any], StepResponse | None] = {}
        # Of weights that share a param group, effects and shape, unless a shrink goes by their
        # size.
        self._under: dict[tuple[Any, ...], StepResponse] = {}

    def are_alike(
        self,
        place: int,
        lr: float,
        effects: Effects,
        shape: tuple[int, int] | None,
    ) -> bool:
        """Whether all weights of a param group, treated alike and of one shape, settle at the same,
        whatever their size and their gradients."""
        if effects.rescaled_now is not None:
            return False
        options = self._balance(place, lr, effects)
        own = self._response(place, lr, shape)
        if options is None or own is None:
            return True
        if "shrink" in options:
            return False
        response = self._response_under(place, lr, effects, shape, own, options)
        return not (response.rough or response.adaptive)

    def predict(
        self,
        place: int,
        effects: Effects,
        measured: Mapping[str, float],
        length: int,
        shape: tuple[int, int] | None,
    ) -> Prediction | None:
        """What a scale-invariant weight settles at.

        Args:
            place: of its param group.
            effects: as in `predict`, as are the others.
            measured: see there.
            length: see there.
            shape: rows and columns, of a matrix.
        """
        try:
            return self._predict(place, effects, measured, length, shape)
        # A run that diverges in float64, or one whose weights vanish, comes by norms whose fourth
        # power is no number any more, or 0.
        except (OverflowError, ZeroDivisionError):
            return None

    def predict_each(
        self,
        place: int,
        lr: float,
        effects: Effects,
        measured: Mapping[str, Doubles],
        lengths: Doubles,
        shape: tuple[int, int] | None,
    ) -> Predicted | None:
        """`predict` for weights that are not `are_alike`, ``(k,)``; None where none has a
        prediction.

        Args:
            place: of their param group.
            lr: of all of them.
            effects: as in `predict`, the same for all.
            measured: see there, ``(k,)``, with a ``gradient_scale`` that is 0 for all of them or
                for none.
            lengths: see there, ``(k,)``.
            shape: rows and columns, of matrices.
        """
        # As tensors, which the formulas take in the place of numbers.
        of_each = {name: torch.from_numpy(values) for name, values in measured.items()}
        scale = of_each.get("gradient_scale")
        if scale is not None and not measured["gradient_scale"].any():
            scale = None
        dims = torch.from_numpy(lengths)
        return self._settled(place, lr, effects, of_each, scale, dims, shape)

    def _predict(
        self,
        place: int,
        effects: Effects,
        measured: Mapping[str, float],
        length: int,
        shape: tuple[int, int] | None,
    ) -> Prediction | None:
        lr = measured["lr"]
        # 0 stands for no gradient at all, and a formula would divide by it.
        scale = measured.get("gradient_scale") or None
        found = self._settled(place, lr, effects, measured, scale, length, shape)
        if found is None or isnan(found.angular_update[0]):
            return None
        relaxation = found.relaxation[0].item()
        return Prediction(
            found.angular_update[0].item(),
            None if isnan(relaxation) else relaxation,
            found.power,
            found.pull[0].item(),
            found.rough,
        )

    def _settled(
        self,
        place: int,
        lr: float,
        effects: Effects,
        measured: Mapping[str, Number],
        scale: Number | None,
        length: Any,
        shape: tuple[int, int] | None,
    ) -> Predicted | None:
        """What a weight settles at, or several whose numbers stand in tensors."""
        norm = measured["weight_norm"]
        if effects.rescaled_now is not None:
            return _settled_rescaled(
                self._optimizer,
                self._group(place, lr),
                effects,
                effects.rescaled_now,
                norm,
                scale,
                length,
            )
        options = self._balance(place, lr, effects)
        if options is None:
            return None
        own = self._response(place, lr, shape)
        if own is None:
            return None
        # What alone differs between weights of a group.
        if "shrink" in options:
            options = {**options, "shrink": measured.get("equivalent_weight_decay")}
            response = response_under(own, self._group(place, lr), **options)
        else:
            response = self._response_under(place, lr, effects, shape, own, options)
        if response.decay is None:
            return None
        settled = settles_at(response, gradient_scale=scale, dim=length, norm=norm)
        if settled is None:
            return None
        angle, relaxation = settled
        pull = response.lr * response.decay / (norm if response.adaptive else 1.0)
        return _predicted(angle, relaxation, float(response.power), pull, response.rough)

    def _response_under(
        self,
        place: int,
        lr: float,
        effects: Effects,
        shape: tuple[int, int] | None,
        own: StepResponse,
        options: dict[str, Any],
    ) -> StepResponse:
        key = (place, lr, effects, shape)
        if key not in self._under:
            self._under[key] = response_under(own, self._group(place, lr), **options)
        return self._under[key]

    def _group(self, place: int, lr: float) -> Mapping[str, Any]:
        key = (place, lr)
        if key not in self._at_rate:
            self._at_rate[key] = {**self._groups[place], "lr": lr}
        return self._at_rate[key]

    def _balance(
        self,
        place: int,
        lr: float,
        effects: Effects,
    ) -> dict[str, Any] | None:
        key = (place, lr, effects)
        if key not in self._balances:
            self._balances[key] = balance(effects, self._optimizer, self._group(place, lr))
        return self._balances[key]

    def _response(
        self, place: int, lr: float, shape: tuple[int, int] | None
    ) -> StepResponse | None:
        key = (place, lr, shape)
        if key not in self._responses:
            group = self._group(place, lr)
            self._responses[key] = own_response(self._kind, group, Subject(shape, self._number))
        return self._responses[key]


def _predicted(
    angle: Number, relaxation: Number, power: float, pull: Number, rough: bool
) -> Predicted:
    """What formulas gave for one weight or for several, as arrays."""
    # Some formulas have one number for all weights: the rate of a pull, no relaxation.
    columns = map(np.atleast_1d, map(np.asarray, (angle, relaxation, pull)))
    angles, relaxations, pulls = np.broadcast_arrays(*columns)
    # A formula at its limits (no decay, a vanishing rate) gives 0 or infinity, which no run
    # reaches.
    are_reached = (angles > 0) & (angles < inf)
    return Predicted(np.where(are_reached, angles, nan), relaxations, power, pulls, rough)


def _settled_rescaled(
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
    effects: Effects,
    rescaling: Rescaling,
    norm: Number,
    scale: Number | None,
    length: Any,
) -> Predicted | None:
    """Under WRS, which has been derived for steps without any decay."""
    if effects.underived or effects.scaled_steps or effects.shrink is not None:
        return None
    if effects.steered or not _decay(effects, optimizer, group).is_none:
        return None
    angle = wrs_angular_update(
        class_for_predictions(optimizer),
        group,
        rescaling.every_n_steps,
        gradient_scale=scale,
        dim=length,
        # The initial norm was not recorded here; WRS holds the weight at it, so today's will do.
        target_norm=norm if rescaling.target_norm == "initial" else rescaling.target_norm,
        projected=effects.projection is not None,
    )
    if angle is None:
        return None
    # WRS sets the norm, so nothing relaxes; the angle changes with the learning rate alone.
    return _predicted(angle, nan, 0.0, float(group["lr"]), rough=False)
