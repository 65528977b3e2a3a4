"""CIFAR-10: archives and folders of both published forms made here, damaged ones, and pickles that run nothing."""

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sde.data.cifar10 import CIFAR10, CLASSES
from sde.data.unpickle import load_arrays
from sde.errors import UserError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDE_CACHE", str(tmp_path / "cache"))


PHOTOS = {name: RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8) for name in "12345t"}
PHOTO_LABELS = {name: RNG.integers(0, 10, 4).tolist() for name in PHOTOS}


def _file(name: str, ending: str) -> str:
    return f"test_batch{ending}" if name == "t" else f"data_batch_{name}{ending}"


def binary_files() -> dict[str, bytes]:
    def records(name: str) -> bytes:
        rows = zip(PHOTO_LABELS[name], PHOTOS[name], strict=True)
        return b"".join(bytes([label]) + photo.tobytes() for label, photo in rows)

    return {"batches.meta.txt": b"airplane\n"} | {_file(name, ".bin"): records(name) for name in PHOTOS}


def python_files(protocol: int = 2) -> dict[str, bytes]:
    def batch(name: str) -> bytes:
        rows = PHOTOS[name].reshape(4, -1)
        content = {
            b"batch_label": b"a batch",
            b"labels": PHOTO_LABELS[name],
            b"data": rows,
            b"filenames": [b"x.png"] * 4,
        }
        return pickle.dumps(content, protocol=protocol)

    return {"batches.meta": pickle.dumps({"label_names": CLASSES})} | {_file(name, ""): batch(name) for name in PHOTOS}


def write_archive(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in sorted(files.items(), reverse=True):  # the order in an archive says nothing
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def _check_photos(dataset: CIFAR10) -> None:
    for split, names in (("train", "12345"), ("test", "t")):
        got = dataset.split(split)
        assert (got.values.numpy() == np.concatenate([PHOTOS[name] for name in names])).all()
        assert got.labels is not None
        assert got.labels.tolist() == [label for name in names for label in PHOTO_LABELS[name]]


@pytest.mark.parametrize("form", ["binary", "python"])
@pytest.mark.parametrize("direct", [True, False])
def test_cifar10_is_read_from_archives_and_folders(tmp_path: Path, form: str, direct: bool) -> None:
    files, short = (binary_files(), "bin") if form == "binary" else (python_files(), "py")
    folder = f"cifar-10-batches-{short}"
    archives, folders = tmp_path / "archives", tmp_path / "folders"
    archives.mkdir()
    folders.mkdir()
    archive = write_archive(archives / f"cifar-10-{form}.tar.gz", folder, files)
    unpacked = write_folder(folders / folder, files)
    _check_photos(CIFAR10(str(archive if direct else archives), download=False))
    _check_photos(CIFAR10(str(unpacked if direct else folders), download=False))


def test_cifar10_pickles_of_every_writer(tmp_path: Path) -> None:
    """Python 2 wrote text where Python 3 has bytes, and NumPy 1 names modules that NumPy 2 has renamed."""
    files = python_files(protocol=0)
    old = {name: content.replace(b"numpy._core", b"numpy.core") for name, content in python_files(protocol=2).items()}
    assert b"numpy.core" in old["data_batch_1"]
    _check_photos(CIFAR10(str(write_folder(tmp_path / "cifar-10-batches-py", old)), download=False))
    other = tmp_path / "other"
    other.mkdir()
    _check_photos(CIFAR10(str(write_folder(other / "cifar-10-batches-py", files)), download=False))


def test_cifar10_is_downloaded_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_archive(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", binary_files())
    monkeypatch.setattr("sde.data.cifar10.URLS", (archive.as_uri(),))
    with pytest.raises(UserError, match="wrong checksum"):
        CIFAR10().split("train")
    monkeypatch.setattr("sde.data.cifar10.SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    _check_photos(CIFAR10())
    assert (tmp_path / "cache" / "cifar10" / archive.name).exists()


def test_cifar10_facts() -> None:
    dataset = CIFAR10()
    assert dataset.info.shape == (3, 32, 32)
    assert dataset.info.class_names[3] == "cat"
    assert dataset.random_flip
    assert not CIFAR10(random_flip=False).random_flip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_batch_2.bin": None}, "lacks data_batch_2.bin"),
        ({"data_batch_2.bin": binary_files()["data_batch_2.bin"][:-1]}, "not whole records of 3073 bytes"),
        ({"data_batch_2.bin": b""}, "not whole records"),
        ({"data_batch_2.bin": b"\x0a" + bytes(3072)}, r"label outside of 0 \.\. 9"),
    ],
)
def test_damaged_cifar10_is_named(tmp_path: Path, change: dict[str, bytes | None], message: str) -> None:
    files = {name: content for name, content in (binary_files() | change).items() if content is not None}
    archive = write_archive(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", files)
    with pytest.raises(UserError, match=message):
        CIFAR10(str(archive)).split("train")
    assert len(CIFAR10(str(archive)).split("test")) == 4
    folder = write_folder(tmp_path / "cifar-10-batches-bin", files)
    with pytest.raises(UserError, match=message if "lacks" not in message else "No such file"):
        CIFAR10(str(folder)).split("train")


def test_truncated_cifar10_is_named(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", binary_files())
    archive.write_bytes(archive.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"cifar-10-binary.tar.gz.*(damaged|lacks)"):
        CIFAR10(str(archive)).split("train")
    archive.write_bytes(b"<html>")
    with pytest.raises(UserError, match="damaged"):
        CIFAR10(str(archive)).split("train")


def test_cifar10_that_is_absent_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of cifar-10-binary.tar.gz, .*download to true"):
        CIFAR10(str(tmp_path), download=False).split("train")
    with pytest.raises(UserError, match="must be a folder"):
        CIFAR10(str(tmp_path / "cifar-10-binary.tar.gz")).split("train")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "has no data and labels"),
        ({"data": 1}, "has no data and labels"),
        ({"data": np.zeros((1, 3072)), "labels": [0]}, "uint8 data"),
        ({"data": np.zeros((1, 3071), np.uint8), "labels": [0]}, "uint8 data"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [0.5]}, "whole numbers"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [0, 1]}, "1 pictures and 2 labels"),
    ],
)
def test_pickles_of_something_else_are_named(tmp_path: Path, batch: Any, message: str) -> None:
    files = python_files() | {"test_batch": pickle.dumps(batch, protocol=2)}
    folder = write_folder(tmp_path / "cifar-10-batches-py", files)
    with pytest.raises(UserError, match=rf"test_batch.*{message}"):
        CIFAR10(str(folder)).split("test")


class Malicious:
    """Its pickle runs a program when it is loaded in the ordinary way."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_run_nothing(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    content = pickle.dumps({"data": Malicious(exec, f"open({str(marker)!r}, 'w')")}, protocol=protocol)
    with pytest.raises(UserError, match=r"asks to run .*exec.*do not trust"):
        load_arrays(io.BytesIO(content), "the file")
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cposix\nsystem\n(S'true'\ntR.",
        b"cnumpy\ntestmods\n.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"c_codecs\ndecode\n.",
        b"cbuiltins\ngetattr\n.",
        pickle.dumps(np.array([object()]), protocol=2),
        pickle.dumps(np.zeros(2, dtype=[("a", "u1")]), protocol=2),
        pickle.dumps(np.array(["2020-01-01"], dtype="M8[D]"), protocol=2),
        pickle.dumps(CLASSES.__class__, protocol=2),
        b"",
        b"no pickle",
        pickle.dumps({"a": np.zeros(3)}, protocol=2)[:-20],
        b"Pid\n.",
    ],
)
def test_pickles_that_name_anything_else_are_refused(content: bytes) -> None:
    with pytest.raises(UserError, match=r"the file .*do not trust it"):
        load_arrays(io.BytesIO(content), "the file")


def test_an_array_with_the_wrong_length_is_refused() -> None:
    content = pickle.dumps(np.arange(6, dtype=np.uint8).reshape(2, 3), protocol=2).replace(b"K\x02K\x03", b"K\x02K\x09")
    with pytest.raises(UserError, match=r"6 numbers for an array of shape \(2, 9\)"):
        load_arrays(io.BytesIO(content), "the file")


def test_arrays_in_pickles_are_what_numpy_reads() -> None:
    arrays: dict[str, Any] = {
        "row": np.arange(12, dtype="<i4").reshape(3, 4),
        "column": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "big": np.arange(5, dtype=">u2"),
        "list": [np.zeros(2, dtype=bool), b"\x00\xff", "Ж", None, 2.5],
    }
    for protocol in (0, 1, 2, 3, 4):
        got = load_arrays(io.BytesIO(pickle.dumps(arrays, protocol=protocol)), "the file")
        for key in ("row", "column", "big"):
            np.testing.assert_array_equal(got[key], arrays[key])
        assert got["list"][0].tolist() == [False, False]
        assert got["list"][1:] == arrays["list"][1:]
