"""What a callback's state in a checkpoint may look like, and whether it still says what was saved.

A checkpoint comes back from disks, tools and other people. Its state decides which weights are
scaled and by how much, so it is believed
only where three things hold: it has the version that this package writes, its digest is that of its
content, and every part has the
type, shape and range that such a part can have. Anything else is one `NormDynError`, which names
the part. All of it is pure: nothing here
knows a fit.

The digest finds what types and ranges cannot: a number that was changed into another plausible one.
It is no signature: whoever wants to
deceive can compute it, and can as well change the weights beside it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from hashlib import blake2b
from math import inf, isnan
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_normdyn.errors import NormDynError, shown
from lightning_normdyn.monitor.history import History

VERSION = 3
"""Of the state that is written; 1 had no digest, and 2 no workers."""

MOST = 2**53
"""No run counts as far."""

DEEPEST = 32
"""Levels of lists and dictionaries within each other; ours have eight."""

Check = Callable[[Any, str], None]
"""Raises `NormDynError` where a value is none of its kind; the text says where the value stands."""

KINDS = ("filter", "group", "layer", "column", "partly", "no", "unknown")


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


# ---------------------------------------------------------------------------------------- the whole


def seal(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with its version and digests, as it goes into a checkpoint.

    What decides about weights has a digest of its own. Where Lightning's loops were (``position``)
    and a callback's own part (``extra``: a
    monitor's history, say) have another: two runs that treat their weights alike share the first
    one, whatever they recorded.

    Example:
        >>> sealed = seal({"steps": {0: 3}, "extra": {}})
        >>> sealed["version"], len(sealed["digest"]), [*sealed["extra"]]
        (3, 32, ['digest'])
    """
    content = {
        key: _compact(value) for key, value in state.items() if key not in ("version", "digest")
    }
    extra = {key: value for key, value in content.pop("extra", {}).items() if key != "digest"}
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
        >>> state = seal({"settings": {}, "steps": {0: 3}, "per_vector": {}, "targets": {}, "extra": {}})
        >>> unseal(state)["steps"]
        {0: 3}
        >>> unseal({**state, "steps": {0: 4}})
        Traceback (most recent call last):
        lightning_normdyn.errors.NormDynError: it was changed after it was saved (its digest is
        another one)
    """
    _require(isinstance(state, dict), f"it is a {type(state).__name__}, where a dictionary belongs")
    version = state.get("version")
    if type(version) is not int or version != VERSION:
        raise NormDynError(
            f"it has version {shown(version)}, and this package reads version {VERSION}"
        )
    plain(state, "it")
    own = state.get("extra")
    if not isinstance(own, dict):
        raise NormDynError(f"its own part is a {type(own).__name__}, where a dictionary belongs")
    content = {
        key: value for key, value in state.items() if key not in ("version", "digest", "extra")
    }
    own_content = {key: value for key, value in own.items() if key != "digest"}
    sound = (state.get("digest"), own.get("digest")) == _digests(content, own_content)
    _require(sound, "it was changed after it was saved (its digest is another one)")
    content["extra"] = own_content
    _STATE(content, "state")
    if extra is not None:
        extra(own_content, "extra")
    return content


def _digests(content: Mapping[str, Any], extra: Mapping[str, Any]) -> tuple[str, str]:
    deciding = {key: value for key, value in content.items() if key != "position"}
    return digest(deciding), digest([content.get("position"), extra])


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
        alone = (
            value.is_contiguous()
            and value.numel() * value.element_size() == value.untyped_storage().nbytes()
        )
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


def _feed(hashed: _Hash, value: Any) -> None:
    if isinstance(value, Tensor):
        hashed.update(f"tensor {value.dtype} {list(value.shape)} ".encode())
        hashed.update(_packed(value).view(torch.uint8).numpy().data)
    elif isinstance(value, bool) or value is None:
        hashed.update(f"constant {value} ".encode())
    elif isinstance(value, np.generic):
        _feed(hashed, value.item())
    elif isinstance(value, int):
        hashed.update(f"int {value:x} ".encode())
    elif isinstance(value, float):
        hashed.update(b"float " + struct.pack("<d", value))
    elif isinstance(value, str):
        encoded = value.encode("utf-8", "surrogatepass")
        hashed.update(f"text {len(encoded)} ".encode() + encoded)
    elif isinstance(value, (list, tuple)):
        hashed.update(f"list {len(value)} ".encode())
        for item in value:
            _feed(hashed, item)
    elif isinstance(value, dict):
        hashed.update(f"dict {len(value)} ".encode())
        for key in sorted(value, key=lambda key: (type(key).__name__, str(key))):
            _feed(hashed, key)
            _feed(hashed, value[key])
    else:
        hashed.update(f"{type(value).__name__} ".encode())


# ---------------------------------------------------------------------------------- kinds of values


def plain(value: Any, where: str, depth: int = 0) -> None:
    """Anything that a state may consist of: numbers, texts, tensors that lie in memory as they are,
    and lists and dictionaries of these."""
    _require(depth <= DEEPEST, f"{where} goes on in itself, or is far too deep")
    if value is None or isinstance(value, (bool, int, float, str, np.generic)):
        return
    if isinstance(value, Tensor):
        kind = type(value.data)
        _require(
            kind is Tensor and value.layout == torch.strided and value.device.type != "meta",
            f"{where} is a tensor of a strange kind",
        )
        _require(
            not value.is_quantized and not value.is_complex(),
            f"{where} is a tensor of {value.dtype}",
        )
        # A tensor may claim any size over a few bytes (strides of 0); to copy it would take all the
        # memory there is.
        _require(
            value.numel() * value.element_size() <= value.untyped_storage().nbytes(),
            f"{where} claims more numbers than it has",
        )
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            plain(item, f"{where}[{i}]", depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            _require(type(key) in (str, int), f"a key of {where} is a {type(key).__name__}")
            plain(item, f"{where}[{shown(key)}]", depth + 1)
    else:
        raise NormDynError(f"{where} is a {type(value).__name__}")


def whole(least: int = 0, most: int = MOST) -> Check:
    """An integer within a range."""

    def check(value: Any, where: str) -> None:
        _require(
            type(value) is int and least <= value < most,
            f"{where} is {shown(value)}, where an integer from {least} belongs",
        )

    return check


def number(least: float = -inf, *, finite: bool = True) -> Check:
    """A number from ``least`` on; ``finite`` refuses NaN and infinity."""

    def check(value: Any, where: str) -> None:
        fits = type(value) in (int, float) and (value >= least or (not finite and isnan(value)))
        fits = fits and not (finite and abs(value) == inf)
        _require(
            fits,
            f"{where} is {shown(value)}, where a {'finite ' if finite else ''}number from "
            f"{least:g} belongs",
        )

    return check


def text(*among: str) -> Check:
    """A text, or one of some."""

    def check(value: Any, where: str) -> None:
        _require(
            isinstance(value, str) and (not among or value in among), f"{where} is {shown(value)}"
        )

    return check


def flag(value: Any, where: str) -> None:
    """True or False."""
    _require(isinstance(value, bool), f"{where} is {shown(value)}, where True or False belongs")


def optional(check: Check) -> Check:
    """None, or what ``check`` takes."""

    def either(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return either


def many(check: Check) -> Check:
    """A list or tuple of such values."""

    def each(value: Any, where: str) -> None:
        _require(
            isinstance(value, (list, tuple)),
            f"{where} is a {type(value).__name__}, where a list belongs",
        )
        for i, item in enumerate(value):
            check(item, f"{where}[{i}]")

    return each


def table(key: Check, value: Check) -> Check:
    """A dictionary whose keys and values are of one kind each."""

    def every(found: Any, where: str) -> None:
        _require(
            isinstance(found, dict),
            f"{where} is a {type(found).__name__}, where a dictionary belongs",
        )
        for name, item in found.items():
            key(name, f"a key of {where}")
            value(item, f"{where}[{shown(name)}]")

    return every


def record(
    needed: Mapping[str, Check], others: Mapping[str, Check] | None = None, *, closed: bool = False
) -> Check:
    """A dictionary with these keys.

    Args:
        needed: keys that must be there.
        others: keys that may be there.
        closed: whether any further key is refused.
    """

    def check(found: Any, where: str) -> None:
        _require(
            isinstance(found, dict),
            f"{where} is a {type(found).__name__}, where a dictionary belongs",
        )
        missing = [key for key in needed if key not in found]
        _require(not missing, f"{where} lacks {missing}")
        foreign = [key for key in found if key not in needed and key not in (others or {})]
        _require(not (closed and foreign), f"{where} has {shown(foreign)}, which nobody knows")
        for key, each in {**needed, **(others or {})}.items():
            if key in found:
                each(found[key], f"{where}.{key}")

    return check


def numbers(least: float = -inf) -> Check:
    """A tensor ``(n,)`` of finite numbers from ``least`` on."""

    def check(value: Any, where: str) -> None:
        _require(
            isinstance(value, Tensor) and value.ndim == 1, f"{where} is no tensor of one dimension"
        )
        sound = torch.isfinite(value).all() and (value >= least).all()
        _require(bool(sound), f"{where} holds numbers that are not finite or below {least:g}")

    return check


def history(value: Any, where: str) -> None:
    """What `History.state_dict` gives."""
    _require(
        isinstance(value, dict) and isinstance(value.get("header"), str), f"{where} is no history"
    )
    try:
        History().load_state_dict(value)
    except (
        NormDynError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        RuntimeError,
        RecursionError,
    ) as error:
        raise NormDynError(f"{where} is no history ({type(error).__name__}: {error})") from error


# ------------------------------------------------------------------------------ what ours look like


def _labels(value: Any, where: str) -> None:
    """Numbers of vectors: -1 or 0..n-1, and no more vectors than there are entries, so that nobody
    is asked for a table of a billion."""
    _require(
        isinstance(value, Tensor) and value.dtype == torch.int64, f"{where} is no tensor of int64"
    )
    in_range = bool(((value >= -1) & (value < value.numel())).all())
    _require(in_range, f"{where} numbers vectors that cannot be")


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
    _VERDICT(value, where)
    shape = tuple(value["shape"])
    for key in ("partition", "withdrawn_partition", "unread"):
        partition = value.get(key)
        if partition is None:
            continue
        keep = list(partition["keep"])
        _require(
            all(k < len(shape) for k in keep) and keep == sorted(set(keep)),
            f"{where}.{key} keeps dimensions that are not there",
        )
        expected = [shape[k] for k in keep]
        _require(
            list(partition["labels"].shape) == expected,
            f"{where}.{key} has labels of another shape than its weight",
        )
    read = value.get("read")
    if read is not None:
        fits = isinstance(read, Tensor) and read.dtype == torch.bool and tuple(read.shape) == shape
        _require(fits, f"{where}.read is no mask of its weight")


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
    table(text(), table(text(), _one_per_vector))(value, where)
    for key in ("initial_norm", "owed"):
        for name, values in value.get(key, {}).items():
            numbers(0.0)(values, f"{where}.{key}[{shown(name)}]")


def _one_per_vector(value: Any, where: str) -> None:
    _require(
        isinstance(value, Tensor) and value.ndim == 1, f"{where} is no tensor of one dimension"
    )


def _positive(value: Any, where: str) -> None:
    numbers(0.0)(value, where)
    _require(bool((value > 0).all()), f"{where} holds factors of 0")


def _scaled(value: Any, where: str) -> None:
    """What `lightning_normdyn.optimizers.scaling.Scaling.state` says of one weight."""
    _SCALED(value, where)
    keep = list(value["keep"])
    _require(
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


def _require(sound: bool, otherwise: str) -> None:
    if not sound:
        raise NormDynError(otherwise)


__all__ = [
    "VERSION",
    "digest",
    "flag",
    "history",
    "many",
    "number",
    "numbers",
    "optional",
    "plain",
    "record",
    "seal",
    "table",
    "text",
    "unseal",
    "whole",
]
