"""Which entries of a weight are one vector: filters, groups or the whole layer."""

import math

from torch import nn

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.flow import Shape
from lightning_normdyn.invariance.names import WRAPPERS, clean_name
from lightning_normdyn.invariance.verdict import Verdict


def filter_partition(
    module: nn.Module,
    name: str,
    shape: Shape,
) -> Partition:
    """One vector per output channel, the finest partition that a layer has by itself.

    That is dim 0, but dim 1 within each group for transposed convolutions (also under
    parametrizations).

    Args:
        module: the module that ``name`` is relative to.
        name: name of the weight.
        shape: its full shape.

    Example:
        >>> net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2))
        >>> filter_partition(net, "0.weight", (4, 3, 3, 3)).n
        6
    """
    owner = _owner(module, name)
    if isinstance(owner, nn.modules.conv._ConvTransposeNd) and len(shape) > 2:
        return Partition.filters(tuple(shape), transposed_groups=owner.groups)
    return Partition.filters(tuple(shape))


def _owner(module: nn.Module, name: str) -> nn.Module | None:
    """The module that a weight, or the parametrization of one, belongs to."""
    path = clean_name(name).split(".")[:-1]
    if "parametrizations" in path:
        path = path[: path.index("parametrizations")]
    try:
        owner = module.get_submodule(".".join(path))
    except AttributeError:
        return None
    # A wrapper of FSDP or activation checkpointing has the clean name of what it wraps.
    while wrapped := [child for name, child in owner.named_children() if name in WRAPPERS]:
        owner = wrapped[0]
    return owner


SINGLE_NUMBERS = "single numbers (a gain), which have no direction"


def is_gain(
    module: nn.Module,
    name: str,
    shape: Shape,
) -> bool:
    """Whether a weight is a gain: its filters are single numbers, which have no direction.

    So is a factor for each channel (``1 x C x 1 x 1``). A vector along the last axis (a class
    token, the weight of ``Linear(n, 1)``) is none, and neither is the kernel of a convolution.

    Args:
        module: the module that ``name`` is relative to.
        name: name of the weight.
        shape: its full shape.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 1, 1), nn.Linear(8, 1))
        >>> [is_gain(net, f"{i}.weight", tuple(net[i].weight.shape)) for i in range(3)]
        [True, False, False]
    """
    numbers = math.prod(shape)
    # The shapes of nearly all weights tell at once, without a search for their layers.
    has_kernel = math.prod(shape[2:]) > 1
    if (len(shape) == 2 or has_kernel) and max(shape) < numbers:
        return False
    if filter_partition(module, name, shape).n == numbers:
        return True
    owner = _owner(module, name)
    is_layer = isinstance(owner, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd))
    return not is_layer and max(shape, default=1) == numbers and shape[-1] == 1


# From the finest to the coarsest.
_FINENESS = ("filter", "group", "layer")


def choose_partition(
    verdict: Verdict,
    granularity: str,
    fallback: Partition,
) -> Partition:
    """The vectors to act on.

    Args:
        verdict: what is known about the weight.
        granularity: ``"auto"`` follows the verdict; else ``"filter"``, ``"group"`` or ``"layer"``.
        fallback: the filters, for a weight of which nothing is known ("by request").

    Raises:
        NotSupportedError: if ``granularity`` is finer than what the normalization allows (that
            would change the network's function), or ``"group"`` is asked for and no group structure
            is known.

    Example:
        >>> verdict = Verdict.unknown("fc.weight", (10, 4))
        >>> choose_partition(verdict, "auto", Partition.filters((10, 4))).granularity
        'filter'
    """
    known = verdict.partition
    withdrawn = verdict.withdrawn_partition
    if known is None and withdrawn is not None and granularity in ("auto", withdrawn.granularity):
        # Who named the weight gets the same vectors as before the gradients spoke.
        return withdrawn
    asked = f"granularity={granularity!r} was asked for `{verdict.name}`, but"
    separately = f"scaling its {granularity}s separately would change the network's function."
    if known is None:
        # Rows that were read may be one vector, and others may belong to it: act on all or none.
        if verdict.waits and granularity in ("filter", "group"):
            raise NotSupportedError(
                f"{asked} {verdict.reason}: {separately} Use granularity='auto' or 'layer'."
            )
        if verdict.waits or granularity == "layer":
            return Partition.layer(verdict.shape)
        if granularity != "group":
            return fallback
        raise NotSupportedError(
            f"{asked} no normalization with groups is known behind it. Use 'filter' or 'layer'."
        )
    if granularity in ("auto", known.granularity):
        return known
    by = ", ".join(verdict.norms) or "its graph"
    if granularity == "group" and known.granularity == "filter":
        raise NotSupportedError(
            f"{asked} {by} normalizes single filters, so no groups are known. "
            "Use 'auto', 'filter' or 'layer'."
        )
    # Coarser is always right: what may be scaled separately may also be scaled together.
    if _FINENESS.index(granularity) < _FINENESS.index(known.granularity):
        raise NotSupportedError(
            f"{asked} {by} makes it scale-invariant only per {known.granularity}: {separately} "
            f"Use granularity='auto' or {known.granularity!r}."
        )
    # Rows that belong to no vector (-1) stay outside of the one that is made of all others.
    return Partition(known.keep, known.labels.clamp(max=0), "layer")
