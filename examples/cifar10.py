"""Read CIFAR-10 from the standard python archive, without running anything that the archive says.

The archive holds six pickles. A pickle is a small program: whoever wrote it decides which functions
run when it is loaded, and even without any function a few hundred bytes can keep an unpickler busy
for years (tuples of tuples, each held twice, as a dictionary's key). So no unpickler is used: the
operations are read one by one, the few that a batch of CIFAR-10 consists of are carried out on
inert records, all others are refused, and their number is bounded.
"""

from __future__ import annotations

import pickletools
import reprlib
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_BATCH = "test_batch"
FOLDER = "cifar-10-batches-py"
CLASSES = 10
PIXELS = 3 * 32 * 32
LARGEST_BATCH = (
    256 * 2**20
)  # bytes; a real batch has 31 MB. Bounds what a hostile compressed archive can make us hold.
MOST_MEMBERS = 100  # files and folders in the archive; the real one has 9
MOST_OPERATIONS = 200_000  # of a pickle; a real batch has 30,000: a label is one, a file name two


class Cifar10Error(ValueError):
    """The path given is not a readable CIFAR-10 python archive; the message says why and what to
    do."""


class Cifar10Images(NamedTuple):
    """Images as uint8 ``(n, 3, 32, 32)`` and labels as int64 ``(n,)``, of the training and of the
    test set."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def read_cifar10(path: str | Path) -> Cifar10Images:
    """Read the python version of CIFAR-10.

    Args:
        path: ``cifar-10-python.tar.gz``, the folder ``cifar-10-batches-py``, or a folder that holds
            either.

    Raises:
        Cifar10Error: Nothing is there, a batch is missing or damaged, or a file is something else
            than a batch of CIFAR-10.
    """
    try:
        files = _batch_files(Path(path))
    except OSError as error:  # no permission, a failing disk, a name too long
        raise Cifar10Error(
            f"CIFAR-10 was asked for at {path}, and it cannot be read: {error.strerror or error}."
        ) from error
    train = [_read_batch(name, files[name]) for name in TRAIN_BATCHES]
    test_images, test_labels = _read_batch(TEST_BATCH, files[TEST_BATCH])
    return Cifar10Images(
        np.concatenate([x for x, _ in train]),
        np.concatenate([y for _, y in train]),
        test_images,
        test_labels,
    )


def _batch_files(path: Path) -> dict[str, bytes]:
    """Find the six batches below ``path`` and return their bytes by name."""
    if not path.exists():
        raise Cifar10Error(
            f"CIFAR-10 was asked for at {path}, and nothing is there. Give the archive "
            f"cifar-10-python.tar.gz or its folder."
        )
    if path.is_dir():
        for folder in (path, path / FOLDER):
            if any((folder / name).is_file() for name in (*TRAIN_BATCHES, TEST_BATCH)):
                return _complete(
                    {
                        name: _bytes_of(folder / name)
                        for name in (*TRAIN_BATCHES, TEST_BATCH)
                        if (folder / name).is_file()
                    },
                    folder,
                )
        archives = sorted(path.glob("cifar-10-python.tar*"))
        if not archives:
            raise Cifar10Error(
                f"The folder {path} holds neither {FOLDER}/ nor the batches nor "
                f"cifar-10-python.tar.gz. Name the folder that does."
            )
        path = archives[0]
    if not path.is_file():  # opening a pipe would wait for ever
        raise Cifar10Error(
            f"{path} is neither a file nor a folder. Give the archive cifar-10-python.tar.gz or "
            f"its folder."
        )
    return _complete(_batches_in_archive(path), path)


def _bytes_of(file: Path) -> bytes:
    if file.stat().st_size > LARGEST_BATCH:
        raise Cifar10Error(
            f"{file} has {file.stat().st_size} bytes, far more than a batch of CIFAR-10 (31 MB)."
        )
    return file.read_bytes()


def _batches_in_archive(archive: Path) -> dict[str, bytes]:
    """Read the six members by name; nothing is written to disk, so a member's path cannot point
    anywhere."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for number, member in enumerate(tar, start=1):
                if number > MOST_MEMBERS:
                    raise Cifar10Error(
                        f"{archive} holds more than {MOST_MEMBERS} files; CIFAR-10 has 9."
                    )
                name = Path(member.name).name
                if (
                    member.size > LARGEST_BATCH
                ):  # of other members too: what is passed over has to be unpacked as well
                    raise Cifar10Error(
                        f"{name} in {archive} has {member.size} bytes, far more than a batch of "
                        f"CIFAR-10 (31 MB)."
                    )
                if not member.isfile() or name not in (*TRAIN_BATCHES, TEST_BATCH):
                    continue
                found[name] = tar.extractfile(member).read()  # type: ignore[union-attr]  # a regular file always opens
    except (Cifar10Error, PermissionError):
        raise
    except (
        Exception
    ) as error:  # tarfile, gzip, bz2, lzma and zlib each raise their own kinds on damaged input
        raise Cifar10Error(
            f"{archive} is damaged or no tar archive ({_in_words(error)}). Fetch it again."
        ) from error
    return found


def _complete(files: dict[str, bytes], place: Path) -> dict[str, bytes]:
    missing = [name for name in (*TRAIN_BATCHES, TEST_BATCH) if name not in files]
    if missing:
        raise Cifar10Error(
            f"{place} lacks {', '.join(missing)}: CIFAR-10 has five training batches and one test "
            f"batch. Unpack it again."
        )
    return files


class _DType:
    """Stands for ``numpy.dtype``: remembers the name, ignores the rest."""

    def __init__(self, name: Any) -> None:
        self.name = name


class _Array:
    """Stands for a pickled ``numpy.ndarray``: keeps shape, type and raw bytes; numpy sees them only
    after they were checked."""

    def __init__(self) -> None:
        self.state: Any = None

    def rows(self) -> np.ndarray:
        """Give the array as uint8 ``(n, 3072)``.

        Raises:
            ValueError: It is something else.
        """
        _, shape, dtype, fortran_order, raw = self.state
        type_name = dtype.name.decode("ascii") if isinstance(dtype.name, bytes) else dtype.name
        if not isinstance(type_name, str) or type_name not in ("u1", "|u1", "uint8"):
            raise ValueError(f"pixels of type {_shown(type_name)} instead of uint8")
        if (
            not isinstance(shape, tuple)
            or [type(size) for size in shape] != [int, int]
            or shape[1] != PIXELS
        ):
            raise ValueError(f"pixels of shape {_shown(shape)} instead of (n, {PIXELS})")
        if not isinstance(raw, bytes) or len(raw) != shape[0] * PIXELS:
            raise ValueError(f"pixels of shape {shape} that are not {shape[0] * PIXELS} bytes")
        return np.frombuffer(raw, np.uint8).reshape(
            shape, order="F" if fortran_order is True else "C"
        )


class _Name:
    """Stands for one of the names that a pickled array refers to, under numpy 1's and numpy 2's
    module names."""

    KNOWN = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    )

    def __init__(self, module: str, name: str) -> None:
        if (module, name) not in self.KNOWN:
            raise ValueError(
                f"it asks for {module}.{name}, which no batch of CIFAR-10 needs; nothing was run"
            )
        self.name = name

    def called_with(self, arguments: Any) -> _Array | _DType:
        """Give an empty record of what the call would have made."""
        if self.name != "dtype":
            return _Array()
        if not isinstance(arguments, tuple) or not arguments:
            raise ValueError("a dtype without a name")
        return _DType(arguments[0])


class _Reader:
    """Carries out the operations of a pickle that a batch of CIFAR-10 consists of.

    Nothing is compared, hashed or printed but numbers and strings, so that every operation costs no
    more than its bytes.
    """

    BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
    STRINGS_OF_PYTHON_2 = (
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
    )  # pickletools decodes them as Latin-1
    TEXT = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
    NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT")
    CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}  # noqa: RUF012
    SMALL_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}  # noqa: RUF012

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}

    def read(self, raw: bytes) -> Any:
        """Give what the pickle holds: dicts, lists, tuples, numbers, strings and our records."""
        for number, (operation, argument, _) in enumerate(pickletools.genops(raw), start=1):
            if number > MOST_OPERATIONS:
                raise ValueError(
                    f"it has more than {MOST_OPERATIONS} operations, and a batch of CIFAR-10 has "
                    f"30,000"
                )
            if operation.name == "STOP":
                return self.stack.pop()
            self._do(operation.name, argument)
        raise ValueError("it has no end")

    def _do(self, name: str, argument: Any) -> None:
        if name in ("PROTO", "FRAME"):
            return
        if name in self.STRINGS_OF_PYTHON_2:
            self.stack.append(argument.encode("latin-1"))
        elif name in self.BYTES or name in self.TEXT or name in self.NUMBERS:
            self.stack.append(argument)
        elif name in self.CONSTANTS:
            self.stack.append(self.CONSTANTS[name])
        elif name in self.SMALL_TUPLES:
            self.stack.append(tuple(self._pop(self.SMALL_TUPLES[name])))
        elif name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name in ("TUPLE", "LIST", "DICT"):
            items = self._pop_to_mark()
            self.stack.append({"TUPLE": tuple, "LIST": list, "DICT": self._dict}[name](items))
        elif name == "EMPTY_LIST":
            self.stack.append([])
        elif name == "EMPTY_DICT":
            self.stack.append({})
        elif name in ("APPEND", "APPENDS"):
            items = self._pop(1) if name == "APPEND" else self._pop_to_mark()
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._pop_to_mark()
            self._top(dict).update(self._dict(items))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(_Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            module, attribute = self._pop(2)
            self.stack.append(
                _Name(str(module)[:100], str(attribute)[:100])
                if isinstance(module, str)
                else _Name("?", "?")
            )
        elif name == "REDUCE":
            called, arguments = self._pop(2)
            if not isinstance(called, _Name):
                raise ValueError("it calls something that is no name; nothing was run")
            self.stack.append(called.called_with(arguments))
        elif name == "BUILD":
            (state,) = self._pop(1)
            built = self._top((_Array, _DType))
            if isinstance(built, _Array):
                built.state = state
        else:
            raise ValueError(
                f"it has the operation {name}, which no batch of CIFAR-10 needs; nothing was run"
            )

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("it takes more values than it has")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def _pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _top(self, kind: Any) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(
                f"it fills a {type(self.stack[-1]).__name__}, which cannot be filled so"
            )
        return self.stack[-1]

    @staticmethod
    def _dict(items: list[Any]) -> dict[Any, Any]:
        keys, values = items[0::2], items[1::2]
        for key in keys:
            if not isinstance(
                key, (bytes, str, int)
            ):  # hashing a tuple takes as long as whoever wrote it wants
                raise ValueError(f"a key of it is a {type(key).__name__}")
        return dict(zip(keys, values, strict=True))


def _shown(value: Any) -> str:
    """Give a value as text in bounded time and length."""
    return repr(value) if isinstance(value, (str, bytes)) else reprlib.repr(value)


def _read_batch(name: str, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the images ``(n, 3, 32, 32)`` and labels ``(n,)`` of one batch."""
    try:
        batch = _Reader().read(raw)
    # a damaged pickle raises almost anything: EOFError, KeyError, ValueError, UnicodeDecodeError,
    # ...
    except Exception as error:
        raise Cifar10Error(
            f"{name} is damaged or no batch of CIFAR-10: {_in_words(error)}."
        ) from error
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        found = (
            f"a dict with {sorted(str(key)[:40] for key in batch)[:6]}"
            if isinstance(batch, dict)
            else f"a {type(batch).__name__}"
        )
        raise Cifar10Error(
            f"{name} holds {found} instead of a dict with b'data' and b'labels'. Is it the "
            f"*python* version of CIFAR-10 (not CIFAR-100)?"
        )
    data, labels = batch[b"data"], batch[b"labels"]
    if not isinstance(data, _Array):
        raise Cifar10Error(
            f"{name}: b'data' is a {type(data).__name__} instead of an array of pixels."
        )
    try:
        rows = data.rows()
    except Exception as error:  # the state is whatever the file says
        raise Cifar10Error(
            f"{name}: b'data' is not as CIFAR-10 has it: {_in_words(error)}."
        ) from error
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise Cifar10Error(f"{name}: b'labels' is not a list of integers.")
    wrong = [label for label in labels if not 0 <= label < CLASSES]
    if wrong:
        raise Cifar10Error(
            f"{name}: {len(wrong)} labels are outside 0..{CLASSES - 1}, the first is {wrong[0]}. "
            f"Is it another data set?"
        )
    if len(labels) != len(rows) or not labels:
        raise Cifar10Error(f"{name}: {len(rows)} images and {len(labels)} labels.")
    return rows.reshape(-1, 3, 32, 32), np.asarray(labels, np.int64)


def _in_words(error: Exception) -> str:
    words = str(error) or type(error).__name__
    return (
        words if len(words) < 300 else f"{words[:300]}..."
    )  # a hostile file decides how long they are
