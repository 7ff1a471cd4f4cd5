"""Reading CIFAR-10: what a right archive gives, and that a wrong, damaged or hostile one gives one
clear error and runs nothing."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar10 import FOLDER, TEST_BATCH, TRAIN_BATCHES, Cifar10Error, read_cifar10
from data_modules import Cifar10, random_crop, random_flip

PER_BATCH = 3


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8)


def batch(seed: int) -> dict:
    return {b"data": pixels(seed), b"labels": [seed % 10] * PER_BATCH, b"batch_label": b"a batch"}


def write_folder(folder: Path, **replaced: bytes | None) -> Path:
    """Write the six batches; ``replaced`` gives other bytes for some of them, None for a missing
    one."""
    folder = folder / FOLDER
    folder.mkdir(parents=True)
    for seed, name in enumerate((*TRAIN_BATCHES, TEST_BATCH)):
        raw = replaced.get(name, pickle.dumps(batch(seed), protocol=4))
        if raw is not None:
            (folder / name).write_bytes(raw)
    return folder


def as_python_2_wrote_it(rows: np.ndarray, labels: list[int]) -> bytes:
    """The bytes of the real archive's batches: protocol 2, byte strings as ``str``, numpy 1's
    module names."""

    def string(text: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(text)) + text

    array = b"".join(
        [
            b"cnumpy.core.multiarray\n_reconstruct\n",
            b"(cnumpy\nndarray\nK\x00\x85",
            string(b"b"),
            b"tR(K\x01",
            struct.pack("<cBcH", b"K", len(rows), b"M", 3072),
            b"\x86cnumpy\ndtype\n(",
            string(b"u1"),
            b"K\x00K\x01tR(K\x03",
            string(b"|"),
            b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
            string(rows.tobytes()),
            b"tb",
        ]
    )
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    return (
        b"\x80\x02}("
        + string(b"data")
        + array
        + string(b"labels")
        + b"]("
        + numbers
        + b"e"
        + string(b"batch_label")
        + string(b"x")
        + b"u."
    )


def archive(folder: Path, path: Path, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        tar.add(folder, FOLDER)
    return path


@pytest.mark.parametrize("place", ["folder", "parent", "archive", "parent of archive"])
def test_reads_images_and_labels_wherever_the_archive_lies(tmp_path: Path, place: str) -> None:
    folder = write_folder(tmp_path / "a")
    tar = archive(folder, tmp_path / "cifar-10-python.tar.gz")
    path = {
        "folder": folder,
        "parent": folder.parent,
        "archive": tar,
        "parent of archive": tmp_path,
    }[place]
    data = read_cifar10(path)
    assert data.train_images.shape == (5 * PER_BATCH, 3, 32, 32)
    assert data.train_images.dtype == np.uint8
    np.testing.assert_array_equal(data.train_images[:PER_BATCH].reshape(PER_BATCH, -1), pixels(0))
    np.testing.assert_array_equal(data.test_images.reshape(PER_BATCH, -1), pixels(5))
    assert data.train_labels.tolist() == [label for label in range(5) for _ in range(PER_BATCH)]
    assert data.test_labels.tolist() == [5] * PER_BATCH


def test_reads_a_batch_as_python_2_wrote_it(tmp_path: Path) -> None:
    raw = as_python_2_wrote_it(pixels(7), [7, 8, 9])
    data = read_cifar10(write_folder(tmp_path, test_batch=raw))
    np.testing.assert_array_equal(data.test_images.reshape(PER_BATCH, -1), pixels(7))
    assert data.test_labels.tolist() == [7, 8, 9]


def test_missing_path_and_folder_without_batches(tmp_path: Path) -> None:
    with pytest.raises(Cifar10Error, match="nothing is there"):
        read_cifar10(tmp_path / "no")
    with pytest.raises(Cifar10Error, match="holds neither"):
        read_cifar10(tmp_path)


def test_missing_batch_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", data_batch_3=None)
    with pytest.raises(Cifar10Error, match="lacks data_batch_3"):
        read_cifar10(folder)
    with pytest.raises(Cifar10Error, match="lacks data_batch_3"):
        read_cifar10(archive(folder, tmp_path / "cifar-10-python.tar.gz"))


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_truncated_batch(tmp_path: Path, kept: float) -> None:
    raw = pickle.dumps(batch(1), protocol=4)
    with pytest.raises(Cifar10Error, match="data_batch_2 is damaged or no batch"):
        read_cifar10(write_folder(tmp_path, data_batch_2=raw[: int(kept * len(raw))]))


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.98])
def test_truncated_archive(tmp_path: Path, kept: float) -> None:
    tar = archive(write_folder(tmp_path / "a"), tmp_path / "cifar-10-python.tar.gz")
    raw = tar.read_bytes()
    tar.write_bytes(raw[: kept if kept > 1 else int(kept * len(raw))])
    with pytest.raises(Cifar10Error, match="damaged"):
        read_cifar10(tar)


def test_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no archive")
    with pytest.raises(Cifar10Error, match="no tar archive"):
        read_cifar10(tmp_path / "notes.txt")


CIFAR_100 = {b"data": pixels(0), b"fine_labels": [1] * PER_BATCH, b"coarse_labels": [1] * PER_BATCH}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2, 3], "holds a list instead of a dict"),
        (CIFAR_100, "not CIFAR-100"),
        ({b"data": b"raw", b"labels": [1]}, "is a bytes instead of an array"),
        (
            {b"data": pixels(0).astype(np.float32), b"labels": [1] * PER_BATCH},
            "type 'f4' instead of uint8",
        ),
        (
            {b"data": pixels(0).astype(">u2"), b"labels": [1] * PER_BATCH},
            "type 'u2' instead of uint8",
        ),
        (
            {b"data": pixels(0).astype("<u2"), b"labels": [1] * PER_BATCH},
            "type 'u2' instead of uint8",
        ),
        (
            {b"data": pixels(0).astype(np.int8), b"labels": [1] * PER_BATCH},
            "type 'i1' instead of uint8",
        ),
        (
            {b"data": pixels(0).astype(object), b"labels": [1] * PER_BATCH},
            "type 'O8' instead of uint8",
        ),
        (
            {b"data": pixels(0).view([("a", "u1")]), b"labels": [1] * PER_BATCH},
            "type 'V1' instead of uint8",
        ),
        (
            {b"data": pixels(0).reshape(-1), b"labels": [1] * PER_BATCH},
            r"shape \(9216,\) instead of \(n, 3072\)",
        ),
        (
            {b"data": pixels(0).reshape(-1, 3, 32, 32), b"labels": [1] * PER_BATCH},
            r"shape \(3, 3, 32, 32\) instead of \(n, 3072\)",
        ),
        ({b"data": pixels(0)[:0], b"labels": []}, "0 images and 0 labels"),
        ({b"data": pixels(0), b"labels": np.ones(PER_BATCH, np.int64)}, "not a list of integers"),
        (
            {b"data": pixels(0), b"labels": [1, 2, 2**70]},
            r"1 labels are outside 0\.\.9, the first is 1180591620717411303424",
        ),
        (
            {"data": pixels(0), "labels": [1] * PER_BATCH},
            "instead of a dict with b'data' and b'labels'",
        ),
        (
            {b"data": pixels(0)[:, :1024].copy(), b"labels": [1] * PER_BATCH},
            r"shape \(3, 1024\) instead of \(n, 3072\)",
        ),
        ({b"data": pixels(0), b"labels": "abc"}, "not a list of integers"),
        ({b"data": pixels(0), b"labels": [1, True, 2]}, "not a list of integers"),
        ({b"data": pixels(0), b"labels": [1, 2]}, "3 images and 2 labels"),
        (
            {b"data": pixels(0), b"labels": [1, 10, 99]},
            r"2 labels are outside 0\.\.9, the first is 10",
        ),
        (
            {b"data": pixels(0), b"labels": [1, -1, 2]},
            r"1 labels are outside 0\.\.9, the first is -1",
        ),
    ],
)
def test_wrong_content_says_what_it_is(tmp_path: Path, content: object, words: str) -> None:
    with pytest.raises(Cifar10Error, match=words):
        read_cifar10(write_folder(tmp_path, data_batch_1=pickle.dumps(content, protocol=4)))


class Hostile:
    """Runs a shell command when it is unpickled the ordinary way."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("inside", ["the file", "data", "labels", "an entry nobody reads"])
def test_pickle_that_would_run_a_command_runs_nothing(
    tmp_path: Path, inside: str, protocol: int
) -> None:
    witness = tmp_path / "it ran"
    hostile = Hostile(f"touch '{witness}'")
    content = {
        "the file": hostile,
        "data": batch(0) | {b"data": hostile},
        "labels": batch(0) | {b"labels": [hostile]},
        "an entry nobody reads": batch(0) | {b"x": hostile},
    }[inside]
    raw = pickle.dumps(content, protocol=protocol)
    pickle.loads(pickle.dumps(hostile))
    assert witness.exists(), "the pickle must be one that acts, or this test shows nothing"
    witness.unlink()
    folder = write_folder(tmp_path / "a", data_batch_1=raw)
    for path in (folder, archive(folder, tmp_path / "cifar-10-python.tar.gz")):
        with pytest.raises(Cifar10Error, match="nothing was run"):
            read_cifar10(path)
        assert not witness.exists()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("(I1\n(I3\nI3072\ntVu1\nI00\nS'short'\nt", "is not as CIFAR-10 has it"),
        ("(I1\n(S'3'\nI3072\ntcnumpy\ndtype\n(S'u1'\ntRI00\nS'short'\nt", "shape .* instead of"),
        (
            "(I1\n(I-3\nI3072\ntcnumpy\ndtype\n(S'u1'\ntRI00\nS'short'\nt",
            "that are not -9216 bytes",
        ),
        ("(I1\n(I3\nI3072\ntcnumpy\ndtype\n(S'u1'\ntRI00\nS'short'\nt", "that are not 9216 bytes"),
        (
            "(I1\n(I3\nI3072\ntcnumpy\ndtype\n(S'" + "u" * 5000 + "'\ntRI00\nS'short'\nt",
            r"pixels of type 'u{200,300}\.\.\.",
        ),
        ("N", "is not as CIFAR-10 has it"),
    ],
)
def test_array_whose_parts_do_not_fit_each_other(tmp_path: Path, state: str, words: str) -> None:
    array = f"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR{state}b"
    raw = f"(dS'data'\n{array}sS'labels'\n(lI1\naI2\naI3\nas.".encode()
    with pytest.raises(Cifar10Error, match=words):
        read_cifar10(write_folder(tmp_path, data_batch_1=raw))


@pytest.mark.parametrize(
    "name",
    [
        "builtins\neval",
        "builtins\ngetattr",
        "numpy\nload",
        "numpy.core.multiarray\nfromfile",
        "os\nsystem",
    ],
)
def test_only_the_three_names_of_an_array_are_known(tmp_path: Path, name: str) -> None:
    module, attribute = name.split("\n")
    with pytest.raises(Cifar10Error, match=f"asks for {module}.{attribute}.*nothing was run"):
        read_cifar10(write_folder(tmp_path, data_batch_1=f"c{name}\n(S'1'\ntR.".encode()))


def bomb(where: bytes) -> bytes:
    """A tuple of two times a tuple of two times ..., 100 deep: 2^100 steps for who hashes, compares
    or prints it."""
    levels = b"".join(
        b"q\x00h\x00\x86" for _ in range(100)
    )  # remember it, take it again, make a pair
    return where.replace(b"BOMB", b"K\x01" + levels)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\x80\x02}BOMBK\x01s.", "a key of it is a tuple"),
        (b"\x80\x02(BOMBK\x01d.", "a key of it is a tuple"),
        (b"\x80\x02\x8fBOMB.", "the operation EMPTY_SET"),
        (b"\x80\x02BOMB.", "holds a tuple instead of a dict"),
        (b"\x80\x02}(U\x04dataBOMBU\x06labels]u.", "b'data' is a tuple"),
        (b"\x80\x02}(U\x04dataK\x01U\x06labels]BOMBau.", "b'data' is a int"),
        (
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n)R(K\x01BOMBcnumpy\ndtype\nU\x02u1\x85RK\x00Nt"
            + b"bU\x06labels]u.",
            "pixels of shape",
        ),
        (
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n)R(K\x01)cnumpy\ndtype\nBOMB\x85RK\x00Nt"
            + b"bU\x06labels]u.",
            "pixels of type",
        ),
        (
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n)R(K\x01)cnumpy\ndtype\n)RBOMBtbU\x06labels]u.",
            "without a name",
        ),
        (b"\x80\x02" + b"]" * 200_001 + b".", "more than 200000 operations"),
        (
            b"\x80\x04\x8b" + (2**24).to_bytes(4, "little") + b"\x01" * 2**24 + b".",
            "the operation LONG4",
        ),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "the operation NEWOBJ"),
        (b"\x80\x02K\x01K\x01R.", "calls something that is no name"),
        (b"\x80\x02K\x01K\x01b.", "fills a int"),
        (b"\x80\x02R.", "takes more values than it has"),
    ],
)
def test_a_small_file_does_not_keep_the_reader_busy(tmp_path: Path, raw: bytes, words: str) -> None:
    with pytest.raises(Cifar10Error, match=words) as said:
        read_cifar10(write_folder(tmp_path, data_batch_1=bomb(raw)))
    assert len(str(said.value)) < 600


def test_a_flood_of_members_or_a_large_one_beside_the_batches_is_refused(tmp_path: Path) -> None:
    flood, large = tmp_path / "flood.tar", tmp_path / "large.tar"
    with tarfile.open(flood, "w") as tar:
        for i in range(101):
            tar.addfile(tarfile.TarInfo(f"readme {i}"))
    member = tarfile.TarInfo("readme")
    member.size = 2**40
    large.write_bytes(member.tobuf() + bytes(1024))
    with pytest.raises(Cifar10Error, match="more than 100 files"):
        read_cifar10(flood)
    with pytest.raises(Cifar10Error, match=r"readme in .* far more than a batch"):
        read_cifar10(large)


def test_archive_writes_nothing_wherever_its_members_point(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "cifar-10-python.tar"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for seed, name in enumerate((*TRAIN_BATCHES, TEST_BATCH)):
            raw = pickle.dumps(batch(seed), protocol=4)
            member = tarfile.TarInfo(f"../../{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    before = sorted(tmp_path.rglob("*"))
    assert len(read_cifar10(path).train_labels) == 5 * PER_BATCH
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_member_that_is_a_link_or_no_file_is_not_followed(tmp_path: Path, kind: bytes) -> None:
    """A link out of the archive to a file that has the right content: it is not read, and nothing
    is made on disk."""
    secret = tmp_path / "secret"
    secret.write_bytes(pickle.dumps(batch(0), protocol=4))
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for seed, name in enumerate((*TRAIN_BATCHES, TEST_BATCH)):
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            raw = pickle.dumps(batch(seed), protocol=4)
            if name == "data_batch_4":
                member.type, member.linkname, raw = kind, str(secret), b""
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Cifar10Error, match="lacks data_batch_4"):
        read_cifar10(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_member_that_unpacks_to_far_too_much_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar"
    member = tarfile.TarInfo("data_batch_1")
    member.size = 2**40
    path.write_bytes(member.tobuf() + bytes(1024))
    with pytest.raises(
        Cifar10Error, match=r"data_batch_1 in .* has 1099511627776 bytes, far more than a batch"
    ):
        read_cifar10(path)


def test_folder_in_place_of_a_batch_is_a_missing_batch(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, data_batch_2=None)
    (folder / "data_batch_2").mkdir()
    with pytest.raises(Cifar10Error, match="lacks data_batch_2"):
        read_cifar10(folder)


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Cifar10Error, match="neither a file nor a folder"):
        read_cifar10(tmp_path / "pipe")


def test_what_the_system_refuses_to_read_is_told_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "a")
    tar = archive(folder, tmp_path / "cifar-10-python.tar.gz")
    with pytest.raises(Cifar10Error, match="cannot be read: File name too long"):
        read_cifar10(tmp_path / ("x" * 5000))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(tarfile, "open", refuse)
    for path in (folder, tar):
        with pytest.raises(Cifar10Error, match="cannot be read: Permission denied"):
            read_cifar10(path)


def test_pixels_column_by_column_are_the_same_pixels(tmp_path: Path) -> None:
    raw = pickle.dumps(batch(3) | {b"data": np.asfortranarray(pixels(3))}, protocol=4)
    data = read_cifar10(write_folder(tmp_path, test_batch=raw))
    np.testing.assert_array_equal(data.test_images.reshape(PER_BATCH, -1), pixels(3))


def test_data_module_averages_down_and_takes_a_subset(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    data = Cifar10(folder, batch_size=2, resolution=16, train_images=4)
    data.setup()
    images, labels = data.train.tensors
    assert images.shape == (4, 3, 16, 16)
    assert labels.tolist() == [0, 0, 0, 1]
    block = read_cifar10(folder).train_images[0, 0, :2, :2].astype(float).mean()
    assert abs(float(images[0, 0, 0, 0]) - block) <= 0.5
    with pytest.raises(ValueError, match="`resolution` must be 8, 16 or 32, got 24"):
        Cifar10(folder, resolution=24)


def test_crop_is_a_window_of_the_padded_image_and_flip_mirrors() -> None:
    torch.manual_seed(0)
    images = torch.arange(1, 1 + 200 * 16, dtype=torch.float32).view(200, 1, 4, 4)
    cropped = random_crop(images, pad=1)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    places = set()
    for image, frame in zip(cropped, padded, strict=True):
        matches = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if torch.equal(image, frame[:, y : y + 4, x : x + 4])
        ]
        assert len(matches) == 1
        places.add(matches[0])
    assert len(places) == 9
    flipped = random_flip(images)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, images, strict=True)]
    untouched = [torch.equal(a, b) for a, b in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, untouched, strict=True))
    assert 60 < sum(mirrored) < 140
