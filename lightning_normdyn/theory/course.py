r"""The expected course of a norm: how far a weight turns in every single step, under any schedule.

`lightning_normdyn.theory.equilibrium` says where a norm settles if the learning rate stays. Under a
warm-up or a cosine no norm ever gets there, and an angle can only be judged against the norm that
the weight should have *by now*. That follows from the norm at the start and from the numbers of the
param group at each step.

For an optimizer with one buffer m, the means A = E⟨w, w⟩, B = E⟨w, m⟩ and C = E⟨m, m⟩ obey an exact
recursion as long as gradients are noise: g = g̃/‖w‖ at right angles to w, independent from step to
step. Coupled decay adds λ·w to the gradient, a second moment V divides the step:

    G = g + λ_c w        E‖G‖² = L/A + λ_c² A        V' = kept·V + taken·E‖G‖²/d
    m' = β m + γ G       w' = (1 - lr·λ_d) w - lr (a G + b m')/s

In the Adam family with decoupled decay the level of L = E‖g̃‖² cancels, and only its course is
left: a loss that falls takes L with it, while V still remembers larger gradients, so that steps are
shorter by sqrt(L/(A d V)). Without a measured L its size is taken to stay, and all follows from the
norm at the start and the schedule. Of an optimizer that does more than this (Lion, Muon) only the
noise coherence κ and the energy s of a step are known, and the norm follows the rule of
`lightning_normdyn.theory.growth`.

Numbers of the host, in numpy's float64: 20 to 50 operations on (n,) a step. Over 500 lines, because
the recursion and the rule for all others go on from one state, under one reading of a decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.functional import MIN_SHRINK_FACTOR
from lightning_normdyn.optimizers.facts import OptimizerFacts
from lightning_normdyn.optimizers.group_numbers import Group
from lightning_normdyn.optimizers.recognition import row_of
from lightning_normdyn.optimizers.recursion_rules import BufferStep
from lightning_normdyn.optimizers.step_response import (
    Options,
    StepDecay,
    check_options,
    decay_under,
    largest_rate,
    own_response,
    plain_group,
)
from lightning_normdyn.optimizers.step_rules import Subject

from .growth import Array, grown, noise_energy, squared_step

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["NormCourse", "norm_course"]

# Where only coherence and energy of steps are known, they have to forget each other well before the
# norm changes: with a memory of 100 steps and a relaxation of 333, the norm is 8 % off.
_LONGEST_MEMORY = 0.2


Numbers = Any
"""A numpy float64 for all vectors, or ``(n,)``."""

_NOTHING = np.float64(0.0)
_UNKNOWN = np.float64(math.nan)


def _double(value: Any) -> Numbers:
    # Of numpy, also where it is one number: Python raises where numpy gives infinity.
    if isinstance(value, np.ndarray):
        return value
    return np.float64(value)


def _as_doubles(value: Any) -> Numbers | None:
    """A number, or one per vector, as an option gives them; None if it is missing."""
    if value is None or isinstance(value, float):
        return None if value is None else np.float64(value)
    if isinstance(value, Tensor):
        value = value.numpy(force=True)
    found = np.asarray(value, dtype=np.float64)
    return found if found.ndim else np.float64(found)


@dataclass
class _State:
    """What the next step needs.

    Args:
        ww, wm, mm, moment: A, B, C and V of the module's docstring, ``(n,)`` each.
        angle: of the last step.
        scale: the unit of the gradients in the buffers; NaN before the first step.
        steps: taken so far.
        carried: what the rule of the optimizer has carried from the last one.
        largest_rate: the largest learning rate so far.
        moment_is_new: whether V has still to start.
        in_real_units: whether ``scale`` is the gradients' own.
        rough: whether the last step was predicted some percent off only.
    """

    ww: Array
    wm: Array
    mm: Array
    moment: Array
    angle: Array
    scale: Array
    steps: int = 0
    carried: float = 0.0
    largest_rate: float = 0.0
    moment_is_new: bool = True
    in_real_units: bool = False
    rough: bool = False


class Treatment(NamedTuple):
    """What is the same of consecutive steps, made by `NormCourse.under`.

    Args:
        group: the param group, in plain numbers; its learning rate may be another in each step.
        row: what is known about the optimizer.
        options: what callbacks do, its numbers as float64 or ``(n,)``.
        is_derived: whether anybody can tell what such a step does.
    """

    group: Group
    row: OptimizerFacts | None
    options: Options
    is_derived: bool


class NormCourse:
    r"""How norms go, and how far vectors turn in each step, if gradients are noise.

    Args:
        optimizer_class: class of the optimizer.
        group: its param group at the first step. It is read again at every :meth:`advance`, so it
            may be the optimizer's own.
        norms: ``(n,)``, the norm of each vector before its first step, in weight units; for several
            vectors that are followed as one, the root of their mean square.
        dim: entries of a vector; one number, or one per vector.
        shape: rows and columns of the matrix that the vectors are of; asked for by Muon.

    Raises:
        NotSupportedError: where it is not understood: amsgrad, RMSprop with momentum or centered,
            Adafactor, subclasses with a step of their own, Muon without ``shape``, ...
        ValueError: for a norm that is not positive and finite, a ``dim`` below 2, lengths that do
            not fit.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(4, 9))
        >>> adamw = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1)
        >>> course = NormCourse(torch.optim.AdamW, adamw.param_groups[0], [3.0] * 4, dim=9)
        >>> for step in range(100):
        ...     course.advance(adamw.param_groups[0])
        >>> course.angular_update.round(6), course.weight_norm.round(4)
        (array([0.000233, 0.000233, 0.000233, 0.000233]), array([2.9703, 2.9703, 2.9703, 2.9703]))
    """

    def __init__(
        self,
        optimizer_class: type,
        group: Group,
        norms: Sequence[float] | ArrayLike,
        dim: int | Sequence[int] | ArrayLike,
        *,
        shape: tuple[int, int] | None = None,
    ) -> None:
        start = np.atleast_1d(np.asarray(norms, dtype=np.float64))
        entries = np.asarray(dim, dtype=np.float64)
        if start.ndim != 1 or start.size == 0 or not np.all((start > 0) & np.isfinite(start)):
            raise ValueError(f"`norms` must be positive finite numbers, one per vector: {norms!r}.")
        if entries.shape not in ((), start.shape) or not np.all(entries >= 2):
            raise ValueError(
                f"`dim` must be one number >= 2, or one for each of {start.size} vectors: {dim!r}."
            )
        self._optimizer_class = optimizer_class
        self._shape = shape
        self._dim = np.broadcast_to(entries, start.shape)
        self._check_understood(group)

        empty, unknown = np.zeros_like(start), np.full_like(start, math.nan)
        self._state = _State(start**2, empty, empty, empty, unknown, unknown)

    @classmethod
    def going_on(
        cls,
        optimizer_class: type,
        state: Mapping[str, Any],
        dim: Array,
        *,
        shape: tuple[int, int] | None = None,
    ) -> NormCourse:
        """A course that goes on from what `arrays` gave. Nothing is checked: for one who has made
        sure that it `is_understood`.

        Args:
            optimizer_class: class of the optimizer.
            state: of a course over as many vectors.
            dim: entries of each vector, ``(n,)``.
            shape: as for the course that it was.
        """
        course = cls.__new__(cls)
        course._optimizer_class = optimizer_class
        course._shape = shape
        course._dim = dim
        course._state = _State(**state)
        return course

    def _check_understood(self, group: Group) -> None:
        lacks = ""
        try:
            if _has_rule(self._optimizer_class, group, self._shape):
                return
        except KeyError as error:
            lacks = f" (the param group lacks {error})"
        raise NotSupportedError(
            f"No course of the norm is known of {self._optimizer_class.__name__} with these "
            f"settings{lacks}. Muon asks for shape=(rows, columns)."
        )

    # ------------------------------------------------------------------------------ what to read

    @property
    def weight_norm(self) -> Array:
        """``(n,)``, norms as the next step will find them, in weight units."""
        with np.errstate(invalid="ignore"):
            return np.sqrt(self._state.ww)

    @property
    def angular_update(self) -> Array:
        """``(n,)``, RMS angle of the last step, in radians; NaN before the first."""
        return self._state.angle.copy()

    @property
    def rough(self) -> bool:
        """Whether the last step was predicted some percent off only.

        So it is for Lion and Muon where their memory is longer than a fifth of the relaxation time,
        and for Muon without a measured ``energy``.
        """
        return self._state.rough

    # --------------------------------------------------------------------------------- one step

    def advance(
        self,
        group: Group,
        gradient_scale: float | ArrayLike | None = None,
        *,
        energy: float | ArrayLike | None = None,
        **options: Unpack[Options],
    ) -> None:
        """One optimizer step.

        A number that is missing (a learning rate of None, a gradient scale that is needed, settings
        that are no longer understood) makes everything NaN from there on: nobody knows where the
        norm went. Nothing is raised for it, since this runs inside of a fit.

        Args:
            group: the param group as the step finds it. A number that lives on an accelerator is
                missing: looking at it would wait for the device.
            gradient_scale: L = E‖g‖²‖w‖² at this step, one number or ``(n,)``; needed by SGD, for
                coupled decay, and by RAdam in its first steps. In the rest of the Adam family only
                its changes matter, and it is taken to stay where it is not given: from the first
                step on, or since it was given last.
            energy: for Lion and Muon: s, measured: tan²θ ‖w‖²/lr² of recent steps; None: that of
                noise.
            options: what callbacks do to the vectors,
                :class:`lightning_normdyn.optimizers.step_response.Options`. ``shrink`` is α times
                :attr:`weight_norm` (AWS), for the standard deviation divided by √d.

        Raises:
            TypeError: for an option that does not exist.
        """
        treatment = self.under(group, **options)
        self.step(treatment, treatment.group.get("lr"), gradient_scale, energy=energy)

    def under(self, group: Group, **options: Unpack[Options]) -> Treatment:
        """What many steps have in common, worked out once for all of them.

        Args:
            group: as of :meth:`advance`, but for the learning rate.
            options: see there.

        Raises:
            TypeError: for an option that does not exist.
        """
        check_options(options)
        decays: dict[str, Any] = {}
        for name in ("shrink", "decay"):
            decays[name] = _as_doubles(options.get(name))
        plain = plain_group(group)
        # What a cautious decay does off its equilibrium was not derived. And settings on a device
        # are as unknown as those that nobody has derived.
        on_device = any(isinstance(value, Tensor) for value in plain.values())
        is_derived = not (options.get("cautious", False) or on_device)
        row = row_of(self._optimizer_class, plain)
        return Treatment(plain, row, cast(Options, {**options, **decays}), is_derived)

    def step(
        self,
        treatment: Treatment,
        lr: object,
        gradient_scale: float | ArrayLike | None = None,
        *,
        energy: float | ArrayLike | None = None,
        shrink: Array | None = None,
        wants_angle: bool = True,
    ) -> None:
        """One optimizer step, as :meth:`advance`.

        Args:
            treatment: what it has in common with others.
            lr: its learning rate; everything is lost unless this is a float.
            gradient_scale: see there.
            energy: see there.
            shrink: ``(n,)``, the option of that name, which follows the norm from step to step.
            wants_angle: whether anybody asks for the angle of this step, on which no later one
                rests; else :attr:`angular_update` may still be that of an earlier one.
        """
        self._state.steps += 1
        options = treatment.options
        if shrink is not None:
            options = {**options, "shrink": shrink}  # type: ignore[typeddict-item]
        scale, square = self._per_vector(gradient_scale), self._per_vector(energy)
        # Numbers that are not finite are the answer here, and not a fault.
        with np.errstate(all="ignore"):
            try:
                self._step(treatment, lr, scale, square, options, wants_angle)
            except (KeyError, TypeError, ArithmeticError):
                self._lose()

    def _step(
        self,
        treatment: Treatment,
        lr: object,
        scale: Array | None,
        energy: Array | None,
        options: Options,
        wants_angle: bool,
    ) -> None:
        row = treatment.row
        if row is None or not treatment.is_derived or not isinstance(lr, float):
            self._lose()
            return
        state, group = self._state, treatment.group
        is_written = group.get("lr") == lr
        if not is_written:
            group = {**group, "lr": lr}
        state.largest_rate = max(state.largest_rate, lr)
        # Only a decay that is not in proportion to the rate asks for the largest one.
        if options.get("decay_rate", "lr") != "lr":
            options = self._with_largest_rate(group, options)
        # Where every step is known, that is better than what steps come to on average.
        if row.recursion is None:
            self._advance_by_coherence(group, scale, energy, options)
            return
        step = row.recursion(group, state.steps, state.carried)
        if step is None:
            self._lose()
            return
        state.carried = step.carried
        if step.rests:
            state.angle = self._array(0.0)
            return
        self._advance_by_recursion(step, group, scale, options, wants_angle)

    def _lose(self) -> None:
        """Where the norms went is not known."""
        state, unknown = self._state, self._array(math.nan)
        state.ww = state.wm = state.mm = state.moment = state.angle = unknown

    def _with_largest_rate(self, group: Group, options: Options) -> Options:
        """A decay in proportion to lr/lr_max needs the largest rate so far, also of a schedule that
        does not leave it in the group."""
        if options.get("lr_max") is not None:
            return options
        rates = [self._state.largest_rate, largest_rate(group)]
        return {**options, "lr_max": max(rate for rate in rates if isinstance(rate, float))}

    def _per_vector(self, value: Any) -> Array | None:
        """A number or one per vector, as (n,); None if it is missing."""
        if value is None:
            return None
        return self._array(value)

    def _array(self, value: Any) -> Array:
        present = self._state.angle
        # Most are one number, or one for each already, and a broadcast costs ten times as much.
        if isinstance(value, float):
            return np.full_like(present, value)
        if isinstance(value, np.ndarray) and value.shape == present.shape:
            return value.astype(np.float64, copy=False)
        if isinstance(value, Tensor):
            value = value.numpy(force=True)
        return np.broadcast_to(np.asarray(value, dtype=np.float64), present.shape)

    def _decays(
        self, own: StepDecay, group: Group, lr: float, options: Options
    ) -> tuple[Numbers, Numbers, bool]:
        """The share that a decoupled decay takes of the vectors in this step, λ of a coupled one,
        and whether the decay is AWS's."""
        decay = decay_under(options, own, group)
        # A shrink by another power of the rate.
        if decay.adaptive and decay.decay is None:
            return _UNKNOWN, _NOTHING, False
        if options.get("decay_rate") == "constant":
            # Also at a learning rate of 0, where there is no λ in 1/(step·lr).
            given = options.get("decay")
            return _double(group["weight_decay"] if given is None else given), _NOTHING, False
        if decay.decay is None:
            return _NOTHING, _NOTHING, False
        amount = _double(decay.decay)
        if decay.coupled:
            return _NOTHING, amount, decay.adaptive
        return lr * amount, _NOTHING, decay.adaptive

    def _advance_by_recursion(
        self,
        step: BufferStep,
        group: Group,
        scale: Array | None,
        options: Options,
        wants_angle: bool,
    ) -> None:
        """One step of the recursion of the module's docstring.

        What is the same of all vectors stays one number, and squares are products: numpy takes a
        power of an array for a product, and one of a number not.
        """
        state = self._state
        lr = group["lr"] * step.rate_factor
        own = StepDecay(step.decay, step.coupled)
        pull, inside, adaptive = self._decays(own, group, lr, options)
        unit = self._unit(step, inside, scale)
        ww, wm, mm, moment = state.ww, state.wm, state.mm, state.moment

        # E of ⟨G, G⟩, ⟨w, G⟩ and ⟨m, G⟩. Only a decay in the gradient is correlated with w and m:
        # without one, a third of what follows would be sums with 0.
        gg = unit / ww
        wg = mg = None
        if inside is not _NOTHING:
            gg = gg + inside * inside * ww
            wg, mg = inside * ww, inside * wm

        newest: Numbers = _double(step.newest)
        buffered: Numbers = _double(step.buffered)
        second = step.second
        if second is not None:
            if state.moment_is_new:
                moment = self._array(second.start)
                state.moment_is_new = False
            # One second moment for all entries: those of noise are alike.
            moment = second.kept * moment + second.taken * gg / self._dim
            if step.divides:
                size = np.sqrt(moment / second.correction)
                # In any other unit than the gradients' own, eps has no meaning.
                if state.in_real_units:
                    size = size + step.eps
                newest, buffered = newest / size, buffered / size

        # The buffer m', and its products with w and itself.
        memory, taken = step.memory, step.taken
        w_buffer = memory * wm
        buffer_buffer = memory**2 * mm
        if wg is not None and mg is not None:
            w_buffer = w_buffer + taken * wg
            buffer_buffer = buffer_buffer + 2 * memory * taken * mg
        buffer_buffer = buffer_buffer + taken**2 * gg

        # The update u = a G + b m', and its products with w, m' and itself.
        w_update = buffered * w_buffer
        update_buffer = buffered * buffer_buffer
        update_update = buffered * buffered * buffer_buffer
        # Most optimizers take the gradient from the buffer alone.
        if step.newest != 0:
            buffer_g = taken * gg
            if wg is not None and mg is not None:
                buffer_g = memory * mg + buffer_g
                w_update = newest * wg + w_update
            update_buffer = newest * buffer_g + update_buffer
            crossed = 2 * newest * buffered * buffer_g
            update_update = newest * newest * gg + crossed + update_update

        # The decay acts first, on the weight that the gradient was taken at.
        kept = 1 - pull
        if adaptive:
            kept = np.maximum(kept, MIN_SHRINK_FACTOR)
        is_projected = step.projected or options.get("projected", False)
        if is_projected or wants_angle:
            # What of the update is at right angles to w turns the vector.
            across = update_update - w_update**2 / ww
        if is_projected:
            along = kept
            grown = kept * kept * ww + lr**2 * across
            update_buffer = update_buffer - w_update * w_buffer / ww
        else:
            grown = kept * kept * ww - 2 * kept * lr * w_update + lr**2 * update_update
        if wants_angle:
            if not is_projected:
                along = kept - lr * w_update / ww
            # Where gradients explode, a tangent of thousands is an angle of a quarter turn.
            state.angle = np.arctan2(lr * np.sqrt(across / ww), along)
        # The weight has moved, so the buffer's product with it has, too.
        state.wm = kept * w_buffer - lr * update_buffer
        state.ww, state.mm, state.moment = grown, buffer_buffer, moment

    def _unit(self, step: BufferStep, inside: Numbers, scale: Array | None) -> Array:
        """L of this step."""
        state, second = self._state, step.second
        # In the gradients' own units already, as nearly every step is.
        if scale is not None and state.in_real_units:
            state.scale = scale
            return scale
        is_first = not state.in_real_units and bool(np.isnan(state.scale).all())
        # Buffers that were filled in another unit cannot go on in the real one.
        if scale is not None and is_first:
            state.scale = scale
            state.in_real_units = True
            return scale
        # Divided by their own size, gradients may be of any, as long as it stays.
        divided = second is not None and step.divides and second.start == 0
        if divided and not np.any(inside != 0):
            if is_first:
                state.scale = self._array(1.0)
            return state.scale
        state.scale = self._array(math.nan)
        state.in_real_units = True
        return state.scale

    def _advance_by_coherence(
        self, group: Group, scale: Array | None, energy: Array | None, options: Options
    ) -> None:
        """One step where only κ and s are known."""
        subject = Subject(options.get("shape") or self._shape, options.get("step"))
        response = own_response(self._optimizer_class, group, subject)
        if response is None:
            self._lose()
            return
        lr = group["lr"]
        own = StepDecay(response.decay, response.coupled)
        pull, inside, _ = self._decays(own, group, lr, options)
        if np.any(inside != 0):
            # Inside the gradient a decay acts as often as a gradient does. Divided by the
            # gradient's size, it is nobody knows what.
            pull = lr * inside * float(response.total)
            if response.normalized:
                pull = _UNKNOWN
        if options.get("projected", False):
            response = response.projected()

        state = self._state
        is_measured = energy is not None
        if energy is None:
            energy = noise_energy(response, self._dim, scale)
        if energy is None:
            energy = self._array(math.nan)
        step = squared_step(response, energy, state.ww, lr**2)
        state.angle = np.arctan(np.sqrt(step / state.ww))
        state.ww = grown(state.ww, 1 - pull, float(response.coherence), step)
        memory = 1 / (1 - float(response.memory))
        forgets_late = memory * response.power * float(np.max(pull)) > _LONGEST_MEMORY
        state.rough = forgets_late or (response.energy_is_rough and not is_measured)

    def rescale(self, factor: float | ArrayLike, *, buffers: bool = True) -> None:
        """The vectors are multiplied by ``factor`` between two steps (WRS, LRDropRescaling).

        Args:
            factor: one number or ``(n,)``. For WRS, the target norm over :attr:`weight_norm`; for a
                drop of the learning rate by k, k^-e.
            buffers: whether the optimizer's buffers follow, as these callbacks have it by default:
                m by 1/factor, the second moment by 1/factor².
        """
        state, f = self._state, np.asarray(factor, dtype=np.float64)
        with np.errstate(all="ignore"):
            state.ww = state.ww * f**2
            if buffers:
                # ⟨w, m⟩ stays: one grows as the other shrinks.
                state.mm = state.mm / f**2
                state.moment = state.moment / f**2
            else:
                state.wm = state.wm * f

    def arrays(self) -> dict[str, Any]:
        """As :meth:`state_dict`, with ``(n,)`` arrays in the place of lists: not to be changed."""
        return dict(vars(self._state))  # a step replaces arrays and writes to none

    def state_dict(self) -> dict[str, Any]:
        """All that the next step needs, in plain numbers and lists."""
        return {name: np.asarray(value).tolist() for name, value in self.arrays().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As :meth:`state_dict` gave it, of a course over as many vectors.

        Raises:
            ValueError: if it is another course's.
        """
        loaded: dict[str, Any] = {}
        for name, present in vars(self._state).items():
            if name not in state:
                raise ValueError(f"The state of a course lacks {name}.")
            value = np.array(state[name], dtype=np.asarray(present).dtype)
            if value.shape != np.shape(present):
                raise ValueError(
                    f"The state of a course is of {value.size} vectors ({name}), but there are "
                    f"{np.size(present)}."
                )
            loaded[name] = value if isinstance(present, np.ndarray) else value.item()
        self._state = _State(**loaded)


def is_understood(
    optimizer_class: type, group: Group, shape: tuple[int, int] | None = None
) -> bool:
    """Whether there is a :class:`NormCourse` under these settings; arguments as there.

    Example:
        >>> import torch
        >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False}
        >>> is_understood(torch.optim.SGD, group), is_understood(torch.optim.SGD, {"lr": 0.1})
        (True, False)
    """
    try:
        return _has_rule(optimizer_class, group, shape)
    # A setting without which nobody can tell.
    except KeyError:
        return False


def _has_rule(optimizer_class: type, group: Group, shape: tuple[int, int] | None) -> bool:
    row = row_of(optimizer_class, group)
    if row is None:
        return False
    if row.recursion is not None:
        return row.recursion(plain_group(group), 1, 0.0) is not None
    response = own_response(optimizer_class, group, Subject(shape))
    # A decay inside the gradient of such an optimizer is divided by nobody knows what.
    return response is not None and not response.rough


def norm_course(
    optimizer_class: type,
    group: Group,
    norms: Sequence[float] | ArrayLike,
    dim: int | Sequence[int] | ArrayLike,
    *,
    shape: tuple[int, int] | None = None,
) -> NormCourse | None:
    """A :class:`NormCourse`; None where it is not understood.

    Arguments and errors besides as there.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(4, 9))
        >>> amsgrad = torch.optim.Adam([weight], amsgrad=True)
        >>> norm_course(torch.optim.Adam, amsgrad.param_groups[0], [3.0], dim=9) is None
        True
    """
    try:
        return NormCourse(optimizer_class, group, norms, dim, shape=shape)
    except NotSupportedError:
        return None
