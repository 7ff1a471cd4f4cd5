"""Files of this package, on this machine or at a URL (``s3://``, ``gs://``, ``memory://``), written
so that none is ever seen half-done.

URLs go through fsspec, which Lightning brings and uses for its own logs and checkpoints; each
scheme needs its own package there (s3fs, gcsfs, ...). fsspec is imported only when a URL is met.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from uuid import uuid4

from lightning_normdyn.errors import NormDynError

Location = str | os.PathLike[str]

# A scheme has two characters or more: a single one is a drive of Windows. fsspec chains schemes by
# `::`.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+://")


def is_remote(path: Location) -> bool:
    """Whether a path is a URL for fsspec, and not a place in the file system of this machine.

    Example:
        >>> is_remote("s3://bucket/run"), is_remote("runs/a"), is_remote("file:///tmp/run")
        (True, False, False)
    """
    text = os.fspath(path)
    return bool(_URL.match(text)) and not text.startswith("file://")


def local(path: Location) -> Path:
    """A path on this machine; ``file://`` in front of it is left out."""
    return Path(os.fspath(path).removeprefix("file://"))


def join(folder: Location, name: str) -> str | Path:
    """The place of ``name`` in a folder: a `Path`, or a URL where the folder is one (`Path` would
    make ``s3:/`` of ``s3://``).

    Example:
        >>> join("s3://bucket/run", "history.npz")
        's3://bucket/run/history.npz'
    """
    return f"{os.fspath(folder).rstrip('/')}/{name}" if is_remote(folder) else local(folder) / name


def exists(path: Location) -> bool:
    """Whether there is a file or folder."""
    if not is_remote(path):
        return local(path).exists()
    with _reached(path) as (filesystem, place):
        is_there = bool(filesystem.exists(place))
    return is_there


def read(path: Location) -> bytes:
    """The whole content of a file.

    Raises:
        OSError: where it is missing or cannot be read.
        NormDynError: for a URL whose scheme no installed package knows, or that cannot be reached.
    """
    if not is_remote(path):
        return local(path).read_bytes()
    with _reached(path) as (filesystem, place):
        content = bytes(filesystem.cat_file(place))
    return content


@contextmanager
def replacing(path: Location) -> Iterator[BinaryIO]:
    """A file to write whose content appears under ``path`` only when it is complete; folders are
    made as needed.

    Several threads and processes may write the same path at the same time: the one that ends last
    wins, and none sees another's parts.

    Raises:
        NormDynError: where ``path`` is a folder, a device or a pipe, which a file must not take the
            place of, or a URL that cannot be reached.
    """
    if is_remote(path):
        # In memory first: an object that is opened for writing would be completed by an exception,
        # too.
        buffer = io.BytesIO()
        yield buffer
        with _reached(path) as (filesystem, place):
            parent = str(PurePosixPath(place).parent)
            if parent not in ("", ".", "/"):
                filesystem.makedirs(parent, exist_ok=True)
            filesystem.pipe_file(place, buffer.getvalue())
        return
    # Of a link, what it points at is replaced, and the link stays.
    target = Path(os.path.realpath(local(path)))
    if target.exists() and not target.is_file():
        what = "folder" if target.is_dir() else "device or pipe"
        raise NormDynError(f"`{target}` is a {what}, not a file that can be written; name another.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name that nobody else has: not another thread, not a signal handler in the middle of this,
    # not a machine that shares the disk.
    beside = target.with_name(f".{uuid4().hex}.part")
    try:
        with open(beside, "xb") as file:
            yield file
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _reached(path: Location) -> Iterator[tuple[Any, str]]:
    """The file system behind a URL, and the place in it."""
    # Only whoever has URLs pays for this import.
    import fsspec

    try:
        filesystem, place = fsspec.core.url_to_fs(os.fspath(path))
        yield filesystem, str(place)
    # A missing file or a full disk says enough by itself.
    except OSError:
        raise
    # Whatever else a scheme's package raises (a missing package, unknown credentials, ...) is a
    # fact about the path.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise NormDynError(
            f"`{os.fspath(path)}` cannot be reached ({reason}). Install what its scheme needs, or "
            f"name a folder."
        ) from error
