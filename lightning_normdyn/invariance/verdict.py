"""What is known about the scale invariance of one weight, as a value that survives a checkpoint and
fits a table; and which entries of the weight are then one vector: filters, groups or the whole
layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.partition import Partition, renumbered
from lightning_normdyn.tables import aligned, render

from .flow import Shape
from .names import WRAPPERS, clean_name


# Not compared by value: two tensors are equal entry by entry, which is no yes or no.
@dataclass(frozen=True, eq=False)
class NormLink:
    """A normalization with running statistics that a weight's vectors feed.

    Args:
        module: its name.
        vector: int64 ``(channels,)``, which vector of the partition feeds each channel; -1 for
            none.
        degree: a vector scaled by c scales its channel by ``c ** degree``.
        offset: whether something that does not scale (a bias) was added before it.
        bias: the parameter that was added, entry for entry of the channels, if known.
    """

    module: str
    vector: Tensor
    degree: float
    offset: bool
    bias: str | None = None


@dataclass
class Verdict:
    """What is known about the scale invariance of one weight.

    A later loss, the gradients or a mask change what is known, and then there is a new verdict.

    Args:
        name: first name of the weight.
        shape: full shape.
        partition: its vectors; None if no row is scale-invariant, or not decided.
        kind: ``"filter"``, ``"group"``, ``"layer"``; ``"partly"`` (some rows belong to no vector);
            ``"no"``; ``"unknown"`` (in no loss).
        norms: names of the normalization modules that make it so; ``"DivBackward0 in block.attn"``
            where one was written by hand.
        reason: for ``"no"``, ``"partly"`` and ``"unknown"``: why, in words.
        eps: the claim rests on an epsilon or a padding value being negligible, or on a condition
            (``torch.where``) that does not change.
        batch_norms: normalizations with running statistics behind it, for correcting them after a
            rescale.
        stale_statistics: running statistics behind it that cannot be corrected.
        known: how it is known.
        withdrawn_partition: the vectors of a claim that the gradients have contradicted.
        read: bool, of the full shape: the entries that the loss reads, where a mask in the network
            hides the others (a masked autoencoder, torch's pruning); None: all. Only these count as
            length.
        unread: one vector: the entries that no loss has read so far. They belong to no vector of
            ``partition``. None if all were read.

    Example:
        >>> Verdict.unknown("fc.weight", (10, 4)).kind
        'unknown'
    """

    name: str
    shape: Shape
    partition: Partition | None
    kind: str
    norms: tuple[str, ...] = ()
    reason: str = ""
    eps: bool = False
    batch_norms: tuple[NormLink, ...] = ()
    stale_statistics: tuple[str, ...] = ()
    known: str = "graph"
    withdrawn_partition: Partition | None = None
    read: Tensor | None = None
    unread: Partition | None = None

    @classmethod
    def unknown(
        cls,
        name: str,
        shape: Shape,
        reason: str = "not part of any training loss so far",
    ) -> Verdict:
        """A weight that nothing is known about."""
        return cls(name, tuple(shape), None, "unknown", reason=reason, known="")

    @property
    def n(self) -> int:
        """Number of vectors."""
        if self.partition is None:
            return 0
        return self.partition.n

    @property
    def unread_rows(self) -> str:
        """How many rows no loss has read so far, in words; empty if there are none."""
        if self.unread is None:
            return ""
        return unread_in_words(self.unread)

    @property
    def waits(self) -> bool:
        """Whether rows that are one vector must not be scaled yet: others, which no loss has read
        so far, may belong to it."""
        # Rows that are free each by itself are claimed although others are unread.
        return self.kind == "unknown" and self.unread is not None

    def withdrawn(
        self,
        found: str,
        known: str,
    ) -> Verdict:
        """The claim after it was contradicted.

        Args:
            found: what contradicts it, in words.
            known: where that was found, ``"gradients"`` or ``"function"``.
        """
        by = ", ".join(self.norms) or "its graph"
        return replace(
            self._without_claim(f"{by} says {self.kind}, but {found}"),
            known=known,
            # The vectors are kept: who has named the weight goes on with the same ones.
            withdrawn_partition=self.partition,
        )

    def _without_claim(self, reason: str) -> Verdict:
        return replace(
            self, partition=None, kind="no", reason=reason, batch_norms=(), stale_statistics=()
        )

    def unmasked(self, read: Tensor | None) -> Verdict:
        """The verdict where the loss reads only some entries of the weight.

        A vector of which it reads less than two entries is none: a single number has no direction.

        Args:
            read: bool of the weight's shape, the entries that the loss reads; None: all.
        """
        # Another shape: the mask was seen of a weight that had this name before.
        if read is None or read.shape != self.shape:
            return self
        seen = replace(self, read=read)
        if self.partition is None:
            return seen
        kept = self.partition.lengths(self.shape, read) > 1
        if bool(kept.all()):
            return seen
        if not bool(kept.any()):
            return seen._without_claim("a mask hides all entries of its vectors")
        number = renumbered(kept)
        links = tuple(replace(link, vector=number[link.vector]) for link in self.batch_norms)
        return replace(
            seen,
            partition=self.partition.only(kept),
            kind="partly",
            reason=self.reason or "a mask hides all entries of some of its vectors",
            batch_norms=links,
        )

    def state(self) -> dict[str, Any]:
        """As plain tensors, numbers and strings, for a checkpoint."""
        # Not by `dataclasses.asdict`, which would copy every tensor.
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        # Whoever stores it keeps it by name.
        del state["name"]
        for key in _PARTITIONS:
            partition = state[key]
            if partition is not None:
                state[key] = {
                    "keep": list(partition.keep),
                    "labels": partition.labels,
                    "granularity": partition.granularity,
                }
        for key in _TUPLES:
            state[key] = list(state[key])
        state["batch_norms"] = [dict(vars(link)) for link in self.batch_norms]
        return state

    @classmethod
    def from_state(
        cls,
        name: str,
        state: Mapping[str, Any],
    ) -> Verdict:
        """The inverse of `state`."""
        # A checkpoint of a later version may hold more than this one knows.
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in state.items() if key in known}
        for key in _PARTITIONS:
            # Checkpoints of earlier versions do not have all of them.
            stored = values.get(key)
            if stored is not None:
                keep = tuple(stored["keep"])
                values[key] = Partition(keep, stored["labels"], stored["granularity"])
        for key in _TUPLES:
            values[key] = tuple(values[key])
        values["batch_norms"] = tuple(NormLink(**link) for link in values["batch_norms"])
        return cls(name, **values)


# Which parts of a verdict's state are partitions.
_PARTITIONS = ("partition", "withdrawn_partition", "unread")
# Which are tuples, and lists in a state.
_TUPLES = ("shape", "norms", "stale_statistics")


def unread_in_words(unread: Partition) -> str:
    """How many rows no loss has read so far.

    Example:
        >>> unread_in_words(Partition.layer((4, 2)))
        '4 of its 4 rows not read by any loss so far'
    """
    count = int((unread.labels >= 0).sum())
    return f"{count} of its {unread.labels.numel()} rows not read by any loss so far"


# ---------------------------------------------------------------------------------------- the table

TABLE_COLUMNS = (
    "weight",
    "shape",
    "scale-invariant",
    "vectors",
    "normalized by",
    "how known",
    "why not",
)


def cells_of(verdict: Verdict) -> dict[str, str]:
    """What a table says of a weight, by column: of `TABLE_COLUMNS`, and of the start of a fit."""
    known = verdict.known
    # Without a claim nothing rests on the assumption.
    if verdict.eps and verdict.partition is not None:
        known += " (eps, padding or a condition assumed harmless)"
    cells = (
        verdict.name,
        "×".join(map(str, verdict.shape)),
        verdict.kind,
        str(verdict.n or ""),
        # What normalizes a weight that has no vectors says nothing about it.
        ", ".join(verdict.norms) if verdict.n else "",
        known,
        verdict.reason,
    )
    return dict(zip(TABLE_COLUMNS, cells, strict=True))


def targets_table(verdicts: Iterable[Verdict], width: int | None = None) -> str:
    """The verdicts as a plain-text table.

    Args:
        verdicts: one per weight.
        width: columns of the terminal that the table shall fit; None: a line per weight, however
            long.

    Example:
        >>> print(targets_table([Verdict.unknown("fc.weight", (10, 4), reason="in no loss")]))
        weight     shape  scale-invariant  vectors  normalized by  how known  why not
        fc.weight  10×4   unknown                                             in no loss
    """
    cells = [tuple(cells_of(verdict).values()) for verdict in verdicts]
    if width is not None:
        text = render(
            "",
            TABLE_COLUMNS,
            cells,
            noted=("why not",),
            optional=("how known", "shape"),
            width=width,
            most_rows=None,
        )
        return text.rstrip("\n")
    return aligned(TABLE_COLUMNS, cells)


# -------------------------------------------------------------------------------- vectors to act on


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
        granularity: ``"auto"`` follows the verdict; else ``"filter"``, ``"group"``, ``"layer"``, or
            ``"column"``, which is always by request.
        fallback: the filters, for a weight of which nothing is known ("by request").

    Raises:
        NotSupportedError: if ``granularity`` is finer than what the normalization allows, or cuts
            across it (that would change the network's function), or ``"group"`` is asked for and no
            group structure is known.

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
        if verdict.waits and granularity in ("filter", "group", "column"):
            raise NotSupportedError(
                f"{asked} {verdict.reason}: {separately} Use granularity='auto' or 'layer'."
            )
        if verdict.waits or granularity == "layer":
            return Partition.layer(verdict.shape)
        if granularity == "column":
            return Partition.columns(tuple(verdict.shape))
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
    if granularity == "column":
        raise NotSupportedError(
            f"{asked} {by} makes it scale-invariant per {known.granularity}: {separately} "
            f"Use granularity='auto', or leave it out with params=[..., '!{verdict.name}']."
        )
    # Coarser is always right: what may be scaled separately may also be scaled together.
    if _FINENESS.index(granularity) < _FINENESS.index(known.granularity):
        raise NotSupportedError(
            f"{asked} {by} makes it scale-invariant only per {known.granularity}: {separately} "
            f"Use granularity='auto' or {known.granularity!r}."
        )
    # Rows that belong to no vector (-1) stay outside of the one that is made of all others.
    return Partition(known.keep, known.labels.clamp(max=0), "layer")
