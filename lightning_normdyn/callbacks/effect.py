"""What a callback does to one weight, typed, and what several of them do together: the ground that predictions stand on.

A prediction may be made only where somebody has derived it. So an effect that is not known here, two effects of one kind, and effects on
different vectors of one weight all combine to "no prediction" (`Effects.underived`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Effect",
    "Effects",
    "LengthJumps",
    "NoEffect",
    "Projection",
    "Rescaling",
    "ScaledSteps",
    "Shrink",
    "UnknownEffect",
    "combine",
]


@dataclass(frozen=True)
class Effect:
    """What one callback does to one weight. A subclass that is not in this module has no prediction, and neither have weights under it."""


@dataclass(frozen=True)
class NoEffect(Effect):
    """The callback only looks."""


@dataclass(frozen=True)
class UnknownEffect(Effect):
    """The callback changes the weight, and nobody has derived what follows from that.

    Args:
        by: who does it, for messages.
    """

    by: str


@dataclass(frozen=True)
class LengthJumps(Effect):
    """The length jumps at single steps (LRDropRescaling) and is left alone between them, so predictions hold there."""


@dataclass(frozen=True)
class Shrink(Effect):
    """Before every step the weight is multiplied by 1 - lr · alpha · size (AWS).

    Args:
        alpha: strength, per weight norm.
        statistic: what the size is.
        replaces_decay: whether this takes the place of the optimizer's weight decay, or comes on top of it.
    """

    alpha: float
    statistic: Literal["norm", "std"]
    replaces_decay: bool


@dataclass(frozen=True)
class Projection(Effect):
    """The radial part of every step is removed (RadialProjection), the optimizer's decay with it, and a decay of its own is applied.

    Args:
        gate: whether every step is projected, or those with a small gradient cosine: for a scale-invariant weight, practically all.
        weight_decay: λ, decoupled; ``"replace"``: what the optimizer's own amounts to.
        ratio: factor on it.
    """

    gate: Literal["always", "cosine"]
    weight_decay: float | Literal["replace"]
    ratio: float


@dataclass(frozen=True)
class Rescaling(Effect):
    """The length is set to a fixed number every so many steps (WRS).

    Args:
        every_n_steps: optimizer steps from one rescaling to the next.
        target_norm: the length, or ``"initial"``: that of the start.
        replaces_decay: whether the weight has no decay while this goes on.
        window: whether its epochs are still to come, have come, or are over.
    """

    every_n_steps: int
    target_norm: float | Literal["initial"]
    replaces_decay: bool
    window: Literal["later", "now", "over"]


@dataclass(frozen=True)
class ScaledSteps(Effect):
    """Steps are made longer or shorter by recorded factors (EffectiveLRReplay): there is no equilibrium to predict."""


@dataclass(frozen=True)
class Effects:
    """What all callbacks together do to one weight; made by `combine`.

    Args:
        shrink, projection, rescaling: who does this, if somebody does.
        scaled_steps: whether steps have recorded lengths.
        underived: why nothing can be predicted; empty where it can.
    """

    shrink: Shrink | None = None
    projection: Projection | None = None
    rescaling: Rescaling | None = None
    scaled_steps: bool = False
    underived: tuple[str, ...] = ()

    @property
    def none(self) -> bool:
        """Whether the optimizer alone acts on the weight."""
        return self == Effects()

    @property
    def rescaled_now(self) -> Rescaling | None:
        """The rescaling whose epochs have come."""
        return self.rescaling if self.rescaling is not None and self.rescaling.window == "now" else None


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
    shrinks: list[Shrink] = []
    projections: list[Projection] = []
    rescalings: list[Rescaling] = []
    scaled_steps = 0
    underived = []
    for effect in effects:
        # By the exact class: what a subclass of an effect adds is derived nowhere.
        kind = type(effect)
        if kind is NoEffect or kind is LengthJumps:
            continue
        if kind is Shrink:
            shrinks.append(effect)  # type: ignore[arg-type]
        elif kind is Projection:
            projections.append(effect)  # type: ignore[arg-type]
        elif kind is Rescaling:
            rescalings.append(effect)  # type: ignore[arg-type]
        elif kind is ScaledSteps:
            scaled_steps += 1
        elif isinstance(effect, UnknownEffect):
            underived.append(effect.by)
        else:
            underived.append(kind.__name__)
    for found in (shrinks, projections, rescalings):
        if len(found) > 1:
            underived.append(f"{len(found)} times {type(found[0]).__name__}")
    if scaled_steps > 1:
        underived.append(f"{scaled_steps} times {ScaledSteps.__name__}")
    return Effects(
        shrink=shrinks[0] if shrinks else None,
        projection=projections[0] if projections else None,
        rescaling=rescalings[0] if rescalings else None,
        scaled_steps=scaled_steps > 0,
        underived=tuple(sorted(underived)),
    )
