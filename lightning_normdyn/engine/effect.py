"""What a callback does to one weight, typed, and what several of them do together: the ground that
predictions stand on.

A prediction may be made only where somebody has derived it. So an effect that is not known here,
two effects of one kind, and effects on different vectors of one weight all combine to "no
prediction" (`Effects.underived`).
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from lightning_normdyn.optimizers.decay import DecayOwner, DecayRule
from lightning_normdyn.optimizers.group_numbers import Number
from lightning_normdyn.optimizers.step_response import DecayRate


@dataclass(frozen=True)
class Effect:
    """What one callback does to one weight. A subclass that is not in this module has no
    prediction, and neither have weights under it."""


@dataclass(frozen=True)
class NoEffect(Effect):
    """The callback only looks."""


@dataclass(frozen=True)
class OnOtherVectors(Effect):
    """The callback splits the weight into other vectors than the one who asks: its numbers are not
    about the vectors that are asked about.

    Args:
        effect: what it does to its own.
    """

    effect: Effect


@dataclass(frozen=True)
class UnknownEffect(Effect):
    """The callback changes the weight, and nobody has derived what follows from that.

    Args:
        by: who does it, for messages.
    """

    by: str


@dataclass(frozen=True)
class LengthJumps(Effect):
    """The length jumps at single steps (LRDropRescaling) and is left alone between them, so
    predictions hold there.

    Args:
        min_drop: smallest drop of the learning rate at which it jumps.
        exponent: e of the factor k^-e for a drop by k; None while it is not known.
    """

    min_drop: float
    exponent: float | None


@dataclass(frozen=True)
class Shrink(Effect):
    """Before every step the weight is multiplied by 1 - lr · alpha · size (AWS).

    Args:
        alpha: strength, per weight norm.
        statistic: what the size is.
        replaces_decay: whether this takes the place of the optimizer's weight decay, or comes on
            top of it.
    """

    alpha: float
    statistic: Literal["norm", "std"]
    replaces_decay: bool

    @property
    def decay(self) -> DecayRule:
        """It is the decay of the weight."""
        return DecayRule(
            DecayOwner.SHRINK, self.replaces_decay, alpha=self.alpha, statistic=self.statistic
        )


def _by_group() -> None:
    """The largest rate is what the param group names."""


@dataclass(frozen=True)
class Decaying(Effect):
    """The weight has a decay of the callback's own in place of the optimizer's (WeightDecay).

    Args:
        weight_decay: λ, decoupled; ``"replace"``: the number in the param group as it stands.
        rate: what λ is multiplied by in a step.
        cautious: whether only entries decay that the step does not lengthen.
        lr_max: gives the largest learning rate so far; None: the largest that the param group
            names. It rises in a warm-up without being another effect.
    """

    weight_decay: float | Literal["replace"]
    rate: DecayRate = "lr"
    cautious: bool = False
    lr_max: Callable[[], Number | None] = field(default=_by_group, compare=False, repr=False)

    @property
    def decay(self) -> DecayRule:
        """It is the decay of the weight."""
        return DecayRule(
            DecayOwner.WEIGHT_DECAY,
            claims=True,
            rate="as_written" if self.weight_decay == "replace" else self.weight_decay,
            pace=self.rate,
            lr_max=self.lr_max(),
            cautious=self.cautious,
        )


@dataclass(frozen=True)
class Projection(Effect):
    """The radial part of every step is removed (RadialProjection), the optimizer's decay with it,
    and a decay of its own is applied.

    Args:
        gate: whether every step is projected, or those with a small gradient cosine: for a
            scale-invariant weight, practically all.
        weight_decay: λ, decoupled; ``"replace"``: what the optimizer's own amounts to.
        ratio: factor on it.
    """

    gate: Literal["always", "cosine"]
    weight_decay: float | Literal["replace"]
    ratio: float

    @property
    def decay(self) -> DecayRule:
        """Projecting would remove any other decay."""
        return DecayRule(
            DecayOwner.PROJECTION, claims=True, rate=self.weight_decay, ratio=self.ratio
        )


@dataclass(frozen=True)
class Rescaling(Effect):
    """The length is set to a fixed number every so many steps (WRS).

    Args:
        every_n_steps: optimizer steps from one rescaling to the next.
        target_norm: the length, or ``"initial"``: that of the start.
        replaces_decay: whether the weight has no decay while this goes on.
        window: whether its epochs are still to come, have come, or are over.
        rescales_state: whether the optimizer's buffers follow.
    """

    every_n_steps: int
    target_norm: float | Literal["initial"]
    replaces_decay: bool
    window: Literal["later", "now", "over"]
    rescales_state: bool = True

    @property
    def decay(self) -> DecayRule:
        """None, within its epochs."""
        return DecayRule(DecayOwner.RESCALING, self.replaces_decay and self.window == "now")


@dataclass(frozen=True)
class Rotation(Effect):
    """Steps are stretched until they turn the weight by an angle, and its norm may be held
    (RotationControl).

    Args:
        angle: radians per step at the largest learning rate; ``"equilibrium"``: what optimizer,
            learning rate and decay would settle at; ``"lr"``: the arc tangent of the learning rate.
        bound: whether every step turns by it, or it is a floor or a cap.
        norm: whether the norm is set after every step.
        target_norm: to what; ``"initial"``: that of the start.
        follows: what a number given as ``angle`` follows.
        smoothing: over how many steps' angles the stretch is taken; 0: each step's own.
        replaces_decay: whether this takes the place of the optimizer's weight decay.
    """

    angle: float | Literal["equilibrium", "lr"]
    bound: Literal["exact", "at_least", "at_most"]
    norm: Literal["hold", "free"]
    target_norm: float | Literal["initial"]
    follows: Literal["lr", "sqrt_lr", "constant"]
    smoothing: float
    replaces_decay: bool

    @property
    def sets_angle(self) -> bool:
        """Whether each step turns by the angle that was asked for."""
        return self.bound == "exact" and self.smoothing == 0

    @property
    def decay(self) -> DecayRule:
        """Of a norm that is held, none; of a free one that of the optimizer, decoupled."""
        rate: float | Literal["replace"] = 0.0 if self.norm == "hold" else "replace"
        return DecayRule(DecayOwner.ROTATION, self.replaces_decay, rate)


@dataclass(frozen=True)
class Brake(Effect):
    """Of each change of the norm only a share is left (RadialBrake).

    Args:
        outward: share of growth.
        inward: share of shrinking.
        change: of the whole change of the norm, or of its first-order part alone.
    """

    outward: float
    inward: float
    change: Literal["norm", "radial"]


@dataclass(frozen=True)
class ScaledSteps(Effect):
    """Steps are made longer or shorter by recorded factors (EffectiveLRReplay): there is no
    equilibrium to predict."""


@dataclass(frozen=True)
class Effects:
    """What all callbacks together do to one weight; made by `combine`.

    Args:
        shrink, decaying, projection, rescaling, jumps, rotation, brake: who does this, if somebody
            does.
        scaled_steps: whether steps have recorded lengths.
        underived: why nothing can be predicted; empty where it can.
        decay_untold: who decays the weight in a way that nobody can tell here.
    """

    shrink: Shrink | None = None
    decaying: Decaying | None = None
    projection: Projection | None = None
    rescaling: Rescaling | None = None
    jumps: LengthJumps | None = None
    rotation: Rotation | None = None
    brake: Brake | None = None
    scaled_steps: bool = False
    underived: tuple[str, ...] = ()
    decay_untold: tuple[str, ...] = ()

    # Asked for several times of each weight in every row, and made of all that is in it.
    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, each.name) for each in fields(self)))

    @cached_property
    def text(self) -> str:
        """All of it in one line, by which a checkpoint knows it again."""
        return str(self)

    @property
    def decay_rules(self) -> list[DecayRule]:
        """What callbacks make of the weight's decay."""
        claiming = (
            self.shrink,
            self.decaying,
            self.rotation,
            self.projection,
            self.rescaling,
        )
        return [effect.decay for effect in claiming if effect is not None]

    @property
    def none(self) -> bool:
        """Whether the optimizer alone acts on the weight, but for jumps of its length."""
        return replace(self, jumps=None) == Effects()

    @property
    def steered(self) -> bool:
        """Whether steps are stretched or norms set after each of them, so that what follows from
        the optimizer and its decay alone does not hold."""
        return self.rotation is not None or self.brake is not None

    @property
    def held(self) -> bool:
        """Whether the norm is set after every step."""
        return self.rotation is not None and self.rotation.norm == "hold"

    @property
    def rescaled_now(self) -> Rescaling | None:
        """The rescaling whose epochs have come."""
        if self.rescaling is not None and self.rescaling.window == "now":
            return self.rescaling
        return None


def combine(effects: Iterable[Effect]) -> Effects:
    """What several callbacks do to one weight together.

    Args:
        effects: one per callback, in any order.

    Example:
        >>> combine([NoEffect(), Shrink(0.1, "norm", replaces_decay=True)]).underived
        ()
        >>> combine([UnknownEffect("MyRule"), Shrink(0.1, "norm", replaces_decay=True)]).underived
        ('MyRule',)
    """
    known: dict[type[Effect], Any] = {}
    counts: Counter[type[Effect]] = Counter()
    jumps: LengthJumps | None = None
    underived: list[str] = []
    decay_untold: list[str] = []
    for effect in effects:
        if isinstance(effect, OnOtherVectors):
            # The effect itself is still known: a decay that is a number acts on any vectors alike.
            # A shrink goes by the size of the other vectors.
            effect = effect.effect
            reasons = decay_untold if type(effect) is Shrink else underived
            reasons.append(f"{type(effect).__name__} on other vectors")
        # By the exact class: what a subclass of an effect adds is derived nowhere.
        kind = type(effect)
        if kind in (Shrink, Decaying, Projection, Rescaling, Rotation, Brake, ScaledSteps):
            known.setdefault(kind, effect)
            counts[kind] += 1
        elif isinstance(effect, LengthJumps) and kind is LengthJumps:
            # Two of them jump one after the other, by how much nobody has derived.
            jumps = effect if jumps is None else LengthJumps(effect.min_drop, None)
        elif kind is not NoEffect:
            decay_untold.append(effect.by if isinstance(effect, UnknownEffect) else kind.__name__)
    # What two of one kind amount to has been derived nowhere.
    for kind, count in counts.items():
        if count > 1:
            decay_untold.append(f"{count} times {kind.__name__}")
    return Effects(
        shrink=known.get(Shrink),
        decaying=known.get(Decaying),
        projection=known.get(Projection),
        rescaling=known.get(Rescaling),
        jumps=jumps,
        rotation=known.get(Rotation),
        brake=known.get(Brake),
        scaled_steps=ScaledSteps in known,
        # Where nobody can tell the decay, nobody can predict either.
        underived=tuple(sorted(underived + decay_untold)),
        decay_untold=tuple(sorted(decay_untold)),
    )
