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

Numbers of the host, in numpy's float64: about 50 operations on (n,) a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.functional import MIN_SHRINK_FACTOR
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

    def _check_understood(self, group: Group) -> None:
        lacks = ""
        try:
            if self._has_rule(group):
                return
        except KeyError as error:
            lacks = f" (the param group lacks {error})"
        raise NotSupportedError(
            f"No course of the norm is known of {self._optimizer_class.__name__} with these "
            f"settings{lacks}. Muon asks for shape=(rows, columns)."
        )

    def _has_rule(self, group: Group) -> bool:
        row = row_of(self._optimizer_class, group)
        if row is None:
            return False
        if row.recursion is not None:
            return row.recursion(plain_group(group), 1, 0.0) is not None
        response = own_response(self._optimizer_class, group, Subject(self._shape))
        # A decay inside the gradient of such an optimizer is divided by nobody knows what.
        return response is not None and not response.rough

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
        check_options(options)
        decays: dict[str, Any] = {
            "shrink": self._per_vector(options.get("shrink")),
            "decay": self._per_vector(options.get("decay")),
        }
        acting = cast(Options, {**options, **decays})
        scale, square = self._per_vector(gradient_scale), self._per_vector(energy)
        self._state.steps += 1
        # Numbers that are not finite are the answer here, and not a fault.
        with np.errstate(all="ignore"):
            try:
                self._advance(plain_group(group), scale, square, acting)
            except (KeyError, TypeError, ArithmeticError):
                self._lose()

    def _advance(
        self, group: Group, scale: Array | None, energy: Array | None, options: Options
    ) -> None:
        row = row_of(self._optimizer_class, group)
        lr = group.get("lr")
        # Settings on a device are as unknown as those that nobody has derived.
        on_device = any(isinstance(value, Tensor) for value in group.values())
        # What a cautious decay does off its equilibrium was not derived.
        underived = options.get("cautious", False)
        if row is None or underived or on_device or not isinstance(lr, float):
            self._lose()
            return
        self._state.largest_rate = max(self._state.largest_rate, lr)
        options = self._with_largest_rate(group, options)
        # Where every step is known, that is better than what steps come to on average.
        if row.recursion is None:
            self._advance_by_coherence(group, scale, energy, options)
            return
        step = row.recursion(group, self._state.steps, self._state.carried)
        if step is None:
            self._lose()
            return
        self._state.carried = step.carried
        if step.rests:
            self._state.angle = self._array(0.0)
            return
        self._advance_by_recursion(step, group, scale, options)

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
        # Most are one number, and a broadcast costs ten times as much.
        if isinstance(value, float):
            return np.full_like(self._state.angle, value)
        if isinstance(value, Tensor):
            value = value.numpy(force=True)
        return np.broadcast_to(np.asarray(value, dtype=np.float64), self._state.angle.shape)

    def _decays(
        self, own: StepDecay, group: Group, lr: float, options: Options
    ) -> tuple[Array, Array, bool]:
        """The share that a decoupled decay takes of the vectors in this step, λ of a coupled one,
        and whether the decay is AWS's."""
        decay = decay_under(options, own, group)
        nothing = self._array(0.0)
        # A shrink by another power of the rate.
        if decay.adaptive and decay.decay is None:
            return self._array(math.nan), nothing, False
        if options.get("decay_rate") == "constant":
            # Also at a learning rate of 0, where there is no λ in 1/(step·lr).
            given = self._per_vector(options.get("decay"))
            return self._array(group["weight_decay"]) if given is None else given, nothing, False
        if decay.decay is None:
            return nothing, nothing, False
        if decay.coupled:
            return nothing, self._array(decay.decay), decay.adaptive
        return lr * self._array(decay.decay), nothing, decay.adaptive

    def _advance_by_recursion(
        self, step: BufferStep, group: Group, scale: Array | None, options: Options
    ) -> None:
        """One step of the recursion of the module's docstring."""
        state = self._state
        lr = group["lr"] * step.rate_factor
        own = StepDecay(step.decay, step.coupled)
        pull, inside, adaptive = self._decays(own, group, lr, options)
        unit = self._unit(step, inside, scale)
        ww, wm, mm, moment = state.ww, state.wm, state.mm, state.moment

        # E of ⟨G, G⟩, ⟨w, G⟩ and ⟨m, G⟩: only the decay in it is correlated with w and m.
        gg = unit / ww + inside**2 * ww
        wg = inside * ww
        mg = inside * wm

        newest = self._array(step.newest)
        buffered = self._array(step.buffered)
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

        # The buffer m', and its products with w, G and itself.
        memory, taken = step.memory, step.taken
        w_buffer = memory * wm + taken * wg
        buffer_g = memory * mg + taken * gg
        buffer_buffer = memory**2 * mm + 2 * memory * taken * mg + taken**2 * gg

        # The update u = a G + b m', and its products with w, m' and itself.
        w_update = newest * wg + buffered * w_buffer
        update_buffer = newest * buffer_g + buffered * buffer_buffer
        crossed = 2 * newest * buffered * buffer_g
        update_update = newest**2 * gg + crossed + buffered**2 * buffer_buffer
        # What of it is at right angles to w turns the vector.
        across = update_update - w_update**2 / ww

        # The decay acts first, on the weight that the gradient was taken at.
        kept = 1 - pull
        if adaptive:
            kept = np.maximum(kept, MIN_SHRINK_FACTOR)
        if step.projected or options.get("projected", False):
            along = kept
            grown = kept**2 * ww + lr**2 * across
            update_buffer = update_buffer - w_update * w_buffer / ww
        else:
            along = kept - lr * w_update / ww
            grown = kept**2 * ww - 2 * kept * lr * w_update + lr**2 * update_update
        # Where gradients explode, a tangent of thousands is an angle of a quarter turn.
        state.angle = np.arctan2(lr * np.sqrt(across / ww), along)
        # The weight has moved, so the buffer's product with it has, too.
        state.wm = kept * w_buffer - lr * update_buffer
        state.ww, state.mm, state.moment = grown, buffer_buffer, moment

    def _unit(self, step: BufferStep, inside: Array, scale: Array | None) -> Array:
        """L of this step."""
        state, second = self._state, step.second
        is_first = not state.in_real_units and bool(np.isnan(state.scale).all())
        # Buffers that were filled in another unit cannot go on in the real one.
        if scale is not None and (is_first or state.in_real_units):
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
                pull = self._array(math.nan)
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
