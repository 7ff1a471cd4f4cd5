"""What a callback's state in a checkpoint may look like, and whether it still says what was saved.

A checkpoint comes back from disks, tools and other people. Its state decides which weights are
scaled and by how much, so it is believed only where three things hold: it has the version that this
package writes, its digest is that of its content, and every part has the type, shape and range that
such a part can have. Anything else is one `NormDynError`, which names the part. All of it is pure:
nothing here knows a fit.

The digest finds what types and ranges cannot: a number that was changed into another plausible one.
It is no signature: whoever wants to deceive can compute it, and can as well change the weights
beside it.
"""

import struct
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_normdyn.errors import NormDynError, shown

from .value_checks import (
    Check,
    dictionary,
    flag,
    many,
    number,
    numbers,
    optional,
    plain,
    record,
    require,
    table,
    text,
    vector,
    whole,
)

VERSION = 3
"""Of the state that is written; 1 had no digest, and 2 no workers."""

KINDS = ("filter", "group", "layer", "column", "partly", "no", "unknown")


# ---------------------------------------------------------------------------------------- the whole


def seal(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with its version and digests, as it goes into a checkpoint.

    What decides about weights has a digest of its own. Where Lightning's loops were (``position``)
    and a callback's own part (``extra``: a monitor's history, say) have another: two runs that
    treat their weights alike share the first one, whatever they recorded.

    Example:
        >>> sealed = seal({"steps": {0: 3}, "extra": {}})
        >>> sealed["version"], len(sealed["digest"]), [*sealed["extra"]]
        (3, 32, ['digest'])
    """
    # A state that comes from a checkpoint and goes into the next has digests in it.
    content = _compact(_without(state, "version", "digest", "extra"))
    extra = _compact(_without(state.get("extra", {}), "digest"))
    deciding, recorded = _digests(content, extra)
    return {
        "version": VERSION,
        **content,
        "extra": {**extra, "digest": recorded},
        "digest": deciding,
    }


def unseal(state: Any, extra: Check | None = None) -> dict[str, Any]:
    """The content of a sealed state, if all of it may be believed.

    Args:
        state: what a checkpoint holds, whatever it is.
        extra: checks the callback's own part, ``state["extra"]``.

    Raises:
        NormDynError: where something is wrong, with the place.

    Example:
        >>> empty = {"settings": {}, "per_vector": {}, "targets": {}, "extra": {}}
        >>> state = seal({**empty, "steps": {0: 3}})
        >>> unseal(state)["steps"]
        {0: 3}
        >>> unseal({**state, "steps": {0: 4}})
        Traceback (most recent call last):
        lightning_normdyn.errors.NormDynError: it was changed after it was saved (its digest is
        another one)
    """
    dictionary(state, "it")
    version = state.get("version")
    # By the exact type: a tensor is compared entry by entry, and an `if` on that may raise.
    if type(version) is not int or version != VERSION:
        raise NormDynError(
            f"it has version {shown(version)}, and this package reads version {VERSION}"
        )
    # First of all: what follows copies and hashes, which a hostile tensor could make endless.
    plain(state, "it")
    own = state.get("extra")
    dictionary(own, "its own part")
    content, own_content = _without(state, "version", "digest", "extra"), _without(own, "digest")
    sound = (state.get("digest"), own.get("digest")) == _digests(content, own_content)
    require(sound, "it was changed after it was saved (its digest is another one)")
    content["extra"] = own_content
    # The digest says that nothing was changed, not that it was right: so every part is looked at.
    _STATE(content, "state")
    if extra is not None:
        extra(own_content, "extra")
    return content


def _without(state: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in keys}


def _digests(content: Mapping[str, Any], extra: Mapping[str, Any]) -> tuple[str, str]:
    return digest(_without(content, "position")), digest([content.get("position"), extra])


def digest(value: Any) -> str:
    """A digest of plain values and tensors: the same on every device, in every order of keys, and
    for tuples and lists alike.

    Of anything else (a person's own callback may keep it) only the type counts; saving must not
    fail because of it.
    """
    hashed = blake2b(digest_size=16)
    _feed(hashed, value)
    return hashed.hexdigest()


def _compact(value: Any) -> Any:
    """Tensors that are views of larger ones, or of fewer numbers than they show, as tensors of
    their own: saved is what they show."""
    if isinstance(value, Tensor):
        alone = value.is_contiguous() and value.nbytes == value.untyped_storage().nbytes()
        return value if alone else _packed(value).reshape(value.shape)
    if isinstance(value, dict):
        return {key: _compact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_compact(item) for item in value]
    return value


def _packed(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in one row on the CPU, whatever its strides:
    ``(tensor.numel(),)``."""
    row = torch.empty(tensor.numel(), dtype=tensor.dtype, device="cpu")
    return row.reshape(tensor.shape).copy_(tensor.detach()).reshape(-1)


def _feed(hashed: blake2b, value: Any) -> None:
    if isinstance(value, Tensor):
        # The type and shape first: the same bytes are other numbers under another type.
        hashed.update(f"tensor {value.dtype} {list(value.shape)} ".encode())
        hashed.update(_packed(value).view(torch.uint8).numpy().data)
    # Before int: True is one, and would have the digest of 1.
    elif isinstance(value, bool) or value is None:
        hashed.update(f"constant {value} ".encode())
    # Before float: a numpy float64 is one and a float32 is not; both count as plain numbers.
    elif isinstance(value, np.generic):
        _feed(hashed, value.item())
    elif isinstance(value, int):
        # Hexadecimal: Python refuses to write very long integers in decimal digits.
        hashed.update(f"int {value:x} ".encode())
    elif isinstance(value, float):
        # The bits, in one byte order: the digest must be the same on every machine.
        hashed.update(b"float " + struct.pack("<d", value))
    elif isinstance(value, str):
        # Half of a surrogate pair (from a file name, say) is no UTF-8, and saving must not fail.
        encoded = value.encode("utf-8", "surrogatepass")
        hashed.update(f"text {len(encoded)} ".encode() + encoded)
    elif isinstance(value, (list, tuple)):
        hashed.update(f"list {len(value)} ".encode())
        for item in value:
            _feed(hashed, item)
    elif isinstance(value, dict):
        hashed.update(f"dict {len(value)} ".encode())
        # By type and text: keys of different types cannot be compared with each other, and the
        # order in which they were added must not count.
        for key in sorted(value, key=lambda key: (type(key).__name__, str(key))):
            _feed(hashed, key)
            _feed(hashed, value[key])
    else:
        hashed.update(f"{type(value).__name__} ".encode())


# ------------------------------------------------------------------------------ what ours look like


def _labels(value: Any, where: str) -> None:
    """Numbers of vectors: -1 or 0..n-1, and no more vectors than there are entries, so that nobody
    is asked for a table of a billion."""
    require(
        isinstance(value, Tensor) and value.dtype == torch.int64, f"{where} is no tensor of int64"
    )
    in_range = bool(((value >= -1) & (value < value.numel())).all())
    require(in_range, f"{where} numbers vectors that cannot be")


_PARTITION = record(
    {
        "keep": many(whole(0, 64)),
        "labels": _labels,
        "granularity": text("filter", "group", "layer", "column"),
    }
)
_LINK = record(
    {
        "module": text(),
        "vector": _labels,
        "degree": number(),
        "offset": flag,
        "bias": optional(text()),
    },
    closed=True,
)


def _verdict(value: Any, where: str) -> None:
    # First the type of each entry: the comparisons below rely on them.
    _VERDICT(value, where)
    shape = tuple(value["shape"])
    for key in ("partition", "withdrawn_partition", "unread"):
        partition = value.get(key)
        if partition is None:
            continue
        keep = list(partition["keep"])
        require(
            all(k < len(shape) for k in keep) and keep == sorted(set(keep)),
            f"{where}.{key} keeps dimensions that are not there",
        )
        expected = [shape[k] for k in keep]
        require(
            list(partition["labels"].shape) == expected,
            f"{where}.{key} has labels of another shape than its weight",
        )
    read = value.get("read")
    if read is not None:
        fits = isinstance(read, Tensor) and read.dtype == torch.bool and tuple(read.shape) == shape
        require(fits, f"{where}.read is no mask of its weight")


_VERDICT = record(
    {
        "shape": many(whole()),
        "partition": optional(_PARTITION),
        "kind": text(*KINDS),
        "norms": many(text()),
        "reason": text(),
        "eps": flag,
        "batch_norms": many(_LINK),
        "stale_statistics": many(text()),
        "known": text(),
    },
    {"withdrawn_partition": optional(_PARTITION), "unread": optional(_PARTITION)},
)
_GRAPH = record(
    {"network": text(), "frozen": many(text()), "normalizations": table(text(), text())}
)


def _per_vector(value: Any, where: str) -> None:
    table(text(), table(text(), vector))(value, where)
    # These become factors on weights: a negative one would turn a vector around, and one that is
    # not finite would destroy it.
    factors = (
        "initial_norm",
        "owed",
        "alpha",
        "lr_max",
        "mean_square_tangent",
        "averaged_steps",
    )
    for key in factors:
        for name, values in value.get(key, {}).items():
            numbers(0.0)(values, f"{where}.{key}[{shown(name)}]")
    # A logarithm has a sign.
    for name, values in value.get("log_scale", {}).items():
        numbers()(values, f"{where}.log_scale[{shown(name)}]")


def _positive(value: Any, where: str) -> None:
    numbers(0.0)(value, where)
    # What was done ahead is taken back by dividing by these.
    require(bool((value > 0).all()), f"{where} holds factors of 0")


def _scaled(value: Any, where: str) -> None:
    """What `lightning_normdyn.optimizers.scaling.Scaling.state` says of one weight."""
    _SCALED(value, where)
    keep = list(value["keep"])
    require(
        keep == sorted(set(keep)) and len(keep) == value["labels"].ndim,
        f"{where} keeps dimensions that its labels have not",
    )


_SCALED = record(
    {
        "factor": _positive,
        "keep": many(whole(0, 64)),
        "labels": _labels,
        "buffers": table(text(), number()),
    },
    {"owed": flag},
    closed=True,
)
_STATISTICS = record(
    {"factor": _positive, "bias": optional(numbers()), "done": many(text("mean", "var"))},
    closed=True,
)
_AHEAD = record(
    {"weights": table(text(), _scaled), "statistics": table(text(), _STATISTICS)}, closed=True
)


_STATE = record(
    {
        "settings": table(text(), plain),
        "steps": table(whole(), whole()),
        "per_vector": _per_vector,
        "targets": table(text(), _verdict),
        # Plain is all that can be asked here: only its own class knows what the callback stores.
        "extra": table(text(), plain),
    },
    {
        "graph": optional(_GRAPH),
        "evidence": plain,
        "losses": table(text(), text()),
        "position": many(whole()),
        "is_reading": flag,
        "ahead": _AHEAD,
    },
)
