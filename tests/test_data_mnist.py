"""MNIST: the published files, files of the same format made here, and damaged ones."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sde.data import measure_sigma_data
from sde.data.mnist import FILES, MNIST, read_idx
from sde.errors import UserError

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "mnist"
RNG = np.random.default_rng(0)
DIGITS = RNG.integers(0, 256, (7, 28, 28), dtype=np.uint8)
DIGIT_LABELS = RNG.integers(0, 10, 7, dtype=np.uint8)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDE_CACHE", str(tmp_path / "cache"))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(root: Path, compress: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for (pictures, _), (labels, _) in FILES.values():
        for name, array in ((pictures, DIGITS), (labels, DIGIT_LABELS)):
            content = idx(array)
            (root / (f"{name}.gz" if compress else name)).write_bytes(gzip.compress(content) if compress else content)
    return root


@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs the published files")
def test_published_mnist() -> None:
    dataset = MNIST(str(PUBLISHED), size=28)
    train, test = dataset.split("train"), dataset.split("test")
    assert train.labels is not None
    assert test.labels is not None
    assert (train.values.shape, test.values.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    # the published MD5 sum, of the file without its 16 bytes of header in front
    content = struct.pack(">4I", 2051, 60000, 28, 28) + train.values.numpy().tobytes()
    assert hashlib.md5(content, usedforsecurity=False).hexdigest() == "6bbc9ace898e44ae57da46a324031adb"
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert torch.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    # mean 0.1307 and standard deviation 0.3081 of pixels in [0, 1] are what everyone normalizes by
    assert measure_sigma_data(train, dataset.info) / 2 == pytest.approx(0.3081, abs=5e-5)
    assert train.values.double().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs the published files")
def test_checksums_of_mnist_are_those_of_the_published_files() -> None:
    for files in FILES.values():
        for name, sha256 in files:
            content = gzip.decompress((PUBLISHED / f"{name}.gz").read_bytes())
            assert hashlib.sha256(content).hexdigest() == sha256


@pytest.mark.parametrize("where", [".", "MNIST/raw"])
@pytest.mark.parametrize("compress", [True, False])
def test_mnist_is_found_in_its_usual_places(tmp_path: Path, where: str, compress: bool) -> None:
    write_mnist(tmp_path / where, compress)
    split = MNIST(str(tmp_path), size=28, download=False).split("train")
    assert (split.values[:, 0].numpy() == DIGITS).all()
    assert split.labels is not None
    assert split.labels.tolist() == DIGIT_LABELS.tolist()


def test_mnist_is_padded_with_black(tmp_path: Path) -> None:
    dataset = MNIST(str(write_mnist(tmp_path)))
    values = dataset.split("test").values
    assert dataset.info.shape == values.shape[1:] == (1, 32, 32)
    assert (values[:, 0, 2:30, 2:30].numpy() == DIGITS).all()
    assert values.sum(dtype=torch.int64) == DIGITS.sum(dtype=np.int64)


def test_mnist_is_downloaded_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = write_mnist(tmp_path / "mirror")
    files = {
        split: tuple(
            (name, hashlib.sha256(gzip.decompress((mirror / f"{name}.gz").read_bytes())).hexdigest())
            for name, _ in pair
        )
        for split, pair in FILES.items()
    }
    monkeypatch.setattr("sde.data.mnist.MIRRORS", (f"{mirror.as_uri()}/absent/", f"{mirror.as_uri()}/"))
    with pytest.raises(UserError, match="wrong checksum"):
        MNIST().split("train")
    monkeypatch.setattr("sde.data.mnist.FILES", files)
    assert (MNIST(size=28).split("train").values[:, 0].numpy() == DIGITS).all()
    assert (tmp_path / "cache" / "mnist" / "train-images-idx3-ubyte.gz").exists()
    monkeypatch.setattr("sde.data.mnist.MIRRORS", ())
    assert len(MNIST().split("train")) == 7


WHOLE = gzip.compress(idx(DIGITS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WHOLE[:-20], "damaged"),
        (WHOLE[:100] + b"\0\0\0\0" + WHOLE[104:], "damaged"),
        (idx(DIGITS)[:-1], r"announces 5488 bytes and has only 5487"),
        (idx(DIGITS) + b"\0", "5488 bytes and has more"),
        (idx(DIGITS)[:10], "starts with 00000803"),
        (b"", "starts with nothing"),
        (idx(DIGITS[:, 0]), "not 00000803"),
        (b"<html>not found</html>", "starts with 3c68746d, not 00000803"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1) + b"12", "has only 2"),
        (idx(DIGITS[:, :27]), r"\(27, 28\)"),
        (idx(DIGITS[:6]), "6 pictures and .* 7 labels"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = write_mnist(tmp_path) / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        MNIST(str(tmp_path)).split("train")
    assert str(path) in str(caught.value)
    assert len(MNIST(str(tmp_path)).split("test")) == 7


def test_labels_beyond_nine_are_refused(tmp_path: Path) -> None:
    path = write_mnist(tmp_path) / "train-labels-idx1-ubyte.gz"
    path.write_bytes(idx(DIGIT_LABELS + 10))
    with pytest.raises(UserError, match=r"labels are 0 \.\. 9"):
        MNIST(str(tmp_path)).split("train")
    assert read_idx(path, 1).tolist() == (DIGIT_LABELS + 10).tolist()


def test_mnist_that_is_absent_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set root to its folder, or download to true"):
        MNIST(str(tmp_path), download=False).split("train")
    with pytest.raises(UserError, match="size=30 is not one of 28"):
        MNIST(size=30)
    with pytest.raises(UserError, match="download='yes'"):
        MNIST(download="yes")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean 'test'"):
        MNIST().split("tests")
