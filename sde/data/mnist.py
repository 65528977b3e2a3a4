"""MNIST: 70,000 handwritten digits, 28 x 28, gray (LeCun, Cortes and Burges 1998).

Read from the four original files, in the idx format: a magic number 00 00 08 d (08: unsigned bytes, d: number of
dimensions), the d lengths as big-endian 32-bit integers, and the bytes. Files of the same names with other content in
that format, such as Fashion-MNIST, are read as well when they lie in `root`.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch

from sde.data.base import DataInfo, Dataset, Split, check_split, check_whole, register
from sde.data.cache import cache_dir
from sde.data.download import fetch
from sde.errors import UserError, check_flag

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
# SHA-256 of the uncompressed files (their MD5 sums are 6bbc9ace..., a25bea73..., 2646ac64... and 27ae3e4e...).
FILES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "train": (
        ("train-images-idx3-ubyte", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        ("train-labels-idx1-ubyte", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    ),
    "test": (
        ("t10k-images-idx3-ubyte", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        ("t10k-labels-idx1-ubyte", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    ),
}
NATIVE, PADDED = 28, 32
CLASSES = tuple("0123456789")
MAX_BYTES = 1 << 30  # of one array, so that a damaged header asks for no more memory than there is


@register("mnist")
class MNIST(Dataset):
    """Handwritten digits, white on black, labelled 0 .. 9; 60,000 to train on and 10,000 to test.

    Args:
        root: folder of the four files, compressed (.gz) or not, directly or in `MNIST/raw`; null for `mnist` in the
            cache. What is missing there is downloaded to it.
        size: 28 as published, or 32 with two black pixels on every side, which can be halved often enough for a
            network of several resolutions.
        download: whether files that are missing may be downloaded.
        random_flip: whether training mirrors pictures; a mirrored digit is not a digit.

    Raises:
        UserError: a value is not allowed, or a file is missing, cannot be downloaded or is damaged.
    """

    def __init__(
        self, root: str | None = None, size: int = 32, download: bool = True, random_flip: bool = False
    ) -> None:
        check_whole("size", size, at_least=1)
        if size not in (NATIVE, PADDED):
            raise UserError(f"size={size} is not one of 28 (as published), 32 (with a black border)")
        check_flag("download", download)
        check_flag("random_flip", random_flip)
        self._root = None if root is None else Path(root).expanduser()
        self._size, self._download, self.random_flip = size, download, random_flip
        self._info = DataInfo("mnist", (1, size, size), len(CLASSES), CLASSES)

    @property
    def info(self) -> DataInfo:
        """(1, size, size) pictures of ten classes; opens no file."""
        return self._info

    def split(self, name: str) -> Split:
        """uint8 values (N, 1, size, size) and labels, held in memory (47 MB of pixels as published)."""
        check_split(name)
        pictures_path, labels_path = (self._find(file, sha256) for file, sha256 in FILES[name])
        pictures, labels = read_idx(pictures_path, 3), read_idx(labels_path, 1)
        if pictures.shape[1:] != (NATIVE, NATIVE):
            raise UserError(f"{str(pictures_path)!r} holds pictures of {pictures.shape[1:]}, not of (28, 28) pixels")
        if len(pictures) != len(labels):
            raise UserError(
                f"{str(pictures_path)!r} holds {len(pictures)} pictures and {str(labels_path)!r} {len(labels)} "
                "labels: they must come from the same data set"
            )
        if len(labels) and labels.max() >= len(CLASSES):
            raise UserError(f"{str(labels_path)!r} holds the label {labels.max()}: labels are 0 .. 9")
        border = (self._size - NATIVE) // 2
        padded = np.pad(pictures, ((0, 0), (border, border), (border, border)))
        return Split(torch.from_numpy(padded).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))

    def _find(self, file: str, sha256: str) -> Path:
        root = self._root or cache_dir() / "mnist"
        for folder in (root, root / "MNIST" / "raw"):
            for name in (f"{file}.gz", file):
                if (folder / name).is_file():
                    return folder / name
        if not self._download:
            raise UserError(f"{file}.gz is not in {str(root)!r}: set root to its folder, or download to true")
        urls = [f"{mirror}{file}.gz" for mirror in MIRRORS]
        return fetch(root / f"{file}.gz", urls, sha256, _open)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an idx file, compressed or not.

    Args:
        path: the file.
        dimensions: how many it must have.

    Raises:
        UserError: the file cannot be read, or is not exactly such an array.
    """
    try:
        with _open(path) as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes((0, 0, 8, dimensions)) or len(header) < 4 + 4 * dimensions:
                raise UserError(
                    f"{str(path)!r} is not an idx file of unsigned bytes in {dimensions} dimensions (it starts with "
                    f"{header[:4].hex() or 'nothing'}, not 00000{0x800 + dimensions:x}): put the published file there"
                )
            shape = struct.unpack(f">{dimensions}I", header[4:])
            count = int(np.prod(shape, dtype=object))
            content = file.read(min(count, MAX_BYTES) + 1)  # one more, to see that nothing follows
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{str(path)!r} is damaged or cannot be read ({error}): delete it to fetch it anew") from error
    if len(content) != count:
        amount = "more" if len(content) > count else f"only {len(content)}"
        raise UserError(f"{str(path)!r} announces {count} bytes and has {amount}: delete it to fetch it anew")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if _is_gzip(path) else open(path, "rb")


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"
