"""Read CIFAR-10 from the standard python archive, without running anything that the archive says.

The archive holds six pickles. A pickle is a small program: whoever wrote it decides which functions run when it is
loaded. Here none runs: the three names that a batch of CIFAR-10 needs (numpy's array rebuilder, ``ndarray`` and
``dtype``) are replaced by inert records, every other name is refused, and the pixels are taken from the raw bytes.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_BATCH = "test_batch"
FOLDER = "cifar-10-batches-py"
CLASSES = 10
PIXELS = 3 * 32 * 32
LARGEST_BATCH = 256 * 2**20  # bytes; a real batch has 31 MB. Bounds what a hostile compressed archive can make us hold.


class Cifar10Error(ValueError):
    """The path given is not a readable CIFAR-10 python archive; the message says why and what to do."""


class Cifar10Images(NamedTuple):
    """Images as uint8 ``(n, 3, 32, 32)`` and labels as int64 ``(n,)``, of the training and of the test set."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def read_cifar10(path: str | Path) -> Cifar10Images:
    """Read the python version of CIFAR-10.

    Args:
        path: ``cifar-10-python.tar.gz``, the folder ``cifar-10-batches-py``, or a folder that holds either.

    Raises:
        Cifar10Error: Nothing is there, a batch is missing or damaged, or a file is something else than a batch of CIFAR-10.
    """
    try:
        files = _batch_files(Path(path))
    except OSError as error:  # no permission, a failing disk, a name too long
        raise Cifar10Error(f"CIFAR-10 was asked for at {path}, and it cannot be read: {error.strerror or error}.") from error
    train = [_read_batch(name, files[name]) for name in TRAIN_BATCHES]
    test_images, test_labels = _read_batch(TEST_BATCH, files[TEST_BATCH])
    return Cifar10Images(np.concatenate([x for x, _ in train]), np.concatenate([y for _, y in train]), test_images, test_labels)


def _batch_files(path: Path) -> dict[str, bytes]:
    """Find the six batches below ``path`` and return their bytes by name."""
    if not path.exists():
        raise Cifar10Error(
            f"CIFAR-10 was asked for at {path}, and nothing is there. Give the archive cifar-10-python.tar.gz or its folder."
        )
    if path.is_dir():
        for folder in (path, path / FOLDER):
            if any((folder / name).is_file() for name in (*TRAIN_BATCHES, TEST_BATCH)):
                return _complete(
                    {name: _bytes_of(folder / name) for name in (*TRAIN_BATCHES, TEST_BATCH) if (folder / name).is_file()}, folder
                )
        archives = sorted(path.glob("cifar-10-python.tar*"))
        if not archives:
            raise Cifar10Error(
                f"The folder {path} holds neither {FOLDER}/ nor the batches nor cifar-10-python.tar.gz. Name the folder that does."
            )
        path = archives[0]
    if not path.is_file():  # opening a pipe would wait for ever
        raise Cifar10Error(f"{path} is neither a file nor a folder. Give the archive cifar-10-python.tar.gz or its folder.")
    return _complete(_batches_in_archive(path), path)


def _bytes_of(file: Path) -> bytes:
    if file.stat().st_size > LARGEST_BATCH:
        raise Cifar10Error(f"{file} has {file.stat().st_size} bytes, far more than a batch of CIFAR-10 (31 MB).")
    return file.read_bytes()


def _batches_in_archive(archive: Path) -> dict[str, bytes]:
    """Read the six members by name; nothing is written to disk, so a member's path cannot point anywhere."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                name = Path(member.name).name
                if not member.isfile() or name not in (*TRAIN_BATCHES, TEST_BATCH):
                    continue
                if member.size > LARGEST_BATCH:
                    raise Cifar10Error(f"{name} in {archive} has {member.size} bytes, far more than a batch of CIFAR-10 (31 MB).")
                found[name] = tar.extractfile(member).read()  # type: ignore[union-attr]  # a regular file always opens
    except (Cifar10Error, PermissionError):
        raise
    except Exception as error:  # tarfile, gzip, bz2, lzma and zlib each raise their own kinds on damaged input
        raise Cifar10Error(f"{archive} is damaged or no tar archive ({_in_words(error)}). Fetch it again.") from error
    return found


def _complete(files: dict[str, bytes], place: Path) -> dict[str, bytes]:
    missing = [name for name in (*TRAIN_BATCHES, TEST_BATCH) if name not in files]
    if missing:
        raise Cifar10Error(f"{place} lacks {', '.join(missing)}: CIFAR-10 has five training batches and one test batch. Unpack it again.")
    return files


class _DType:
    """Stands for ``numpy.dtype`` while a batch is read: remembers the name, ignores the rest."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands for a pickled ``numpy.ndarray``: keeps shape, type and raw bytes; numpy sees them only after they were checked."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def rows(self) -> np.ndarray:
        """Give the array as uint8 ``(n, 3072)``.

        Raises:
            ValueError: It is something else.
        """
        _, shape, dtype, fortran_order, raw = self.state
        type_name = dtype.name.decode("ascii") if isinstance(dtype.name, bytes) else dtype.name
        if type_name not in ("u1", "|u1", "uint8"):
            raise ValueError(f"pixels of type {type_name!r} instead of uint8")
        if not isinstance(shape, tuple) or [type(size) for size in shape] != [int, int] or shape[1] != PIXELS:
            raise ValueError(f"pixels of shape {shape} instead of (n, {PIXELS})")
        if not isinstance(raw, bytes) or len(raw) != shape[0] * PIXELS:
            raise ValueError(f"pixels of shape {shape} that are not {shape[0] * PIXELS} bytes")
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran_order else "C")


class _InertUnpickler(pickle.Unpickler):
    """Knows the three names of a pickled array, under numpy 1's and numpy 2's module names, and runs no foreign code."""

    _KNOWN = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR-10 needs; nothing was run") from None


def _read_batch(name: str, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the images ``(n, 3, 32, 32)`` and labels ``(n,)`` of one batch."""
    try:
        batch = _InertUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises almost anything: EOFError, KeyError, ValueError, UnicodeDecodeError, ...
        raise Cifar10Error(f"{name} is damaged or no batch of CIFAR-10: {_in_words(error)}.") from error
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        found = f"a dict with {sorted(map(str, batch))[:6]}" if isinstance(batch, dict) else f"a {type(batch).__name__}"
        raise Cifar10Error(
            f"{name} holds {found} instead of a dict with b'data' and b'labels'. Is it the *python* version of CIFAR-10 (not CIFAR-100)?"
        )
    data, labels = batch[b"data"], batch[b"labels"]
    if not isinstance(data, _Array):
        raise Cifar10Error(f"{name}: b'data' is a {type(data).__name__} instead of an array of pixels.")
    try:
        rows = data.rows()
    except Exception as error:  # the state is whatever the file says
        raise Cifar10Error(f"{name}: b'data' is not as CIFAR-10 has it: {_in_words(error)}.") from error
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise Cifar10Error(f"{name}: b'labels' is not a list of integers.")
    wrong = [label for label in labels if not 0 <= label < CLASSES]
    if wrong:
        raise Cifar10Error(f"{name}: {len(wrong)} labels are outside 0..{CLASSES - 1}, the first is {wrong[0]}. Is it another data set?")
    if len(labels) != len(rows) or not labels:
        raise Cifar10Error(f"{name}: {len(rows)} images and {len(labels)} labels.")
    return rows.reshape(-1, 3, 32, 32), np.asarray(labels, np.int64)


def _in_words(error: Exception) -> str:
    words = str(error) or type(error).__name__
    return words if len(words) < 300 else f"{words[:300]}..."  # a hostile file decides how long they are
