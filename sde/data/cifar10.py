"""CIFAR-10: 60,000 color photographs of ten things, 32 x 32 (Krizhevsky 2009).

Two published archives hold the same pictures. In the binary one a record is a label byte and 3072 pixel bytes, red,
green and blue plane, each row by row; in the Python one the same rows are arrays in pickles, which are read without
running anything in them (`unpickle`). Archives are read where they lie and never unpacked to disk.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch

from sde.data.base import DataInfo, Dataset, Split, check_split, register
from sde.data.cache import cache_dir
from sde.data.download import fetch
from sde.data.unpickle import load_arrays
from sde.errors import UserError, check_flag

ARCHIVE = "cifar-10-binary.tar.gz"
URLS = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "https://cave.cs.toronto.edu/kriz/cifar-10-binary.tar.gz",
    "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
)
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
RECORD = 1 + PIXELS
BATCH = 10_000  # pictures in a file of either archive

# What an archive unpacks to, and the files of each split in it.
BINARY = ("cifar-10-batches-bin", {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]})
PYTHON = ("cifar-10-batches-py", {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]})
FORMS = {ARCHIVE: BINARY, "cifar-10-python.tar.gz": PYTHON}


@register("cifar10")
class CIFAR10(Dataset):
    """Photographs of ten classes; 50,000 to train on and 10,000 to test.

    Args:
        root: folder of `cifar-10-binary.tar.gz`, `cifar-10-python.tar.gz` or what they unpack to
            (`cifar-10-batches-bin`, `cifar-10-batches-py`), or one of these itself; null for `cifar10` in the cache.
            When none is there the binary archive (170 MB) is downloaded to it.
        download: whether the archive may be downloaded.
        random_flip: whether training mirrors pictures left to right at random.

    Raises:
        UserError: a value is not allowed, or the data is missing, cannot be downloaded or is damaged.
    """

    def __init__(self, root: str | None = None, download: bool = True, random_flip: bool = True) -> None:
        check_flag("download", download)
        check_flag("random_flip", random_flip)
        self._root = None if root is None else Path(root).expanduser()
        self._download, self.random_flip = download, random_flip
        self._info = DataInfo("cifar10", SHAPE, len(CLASSES), CLASSES)

    @property
    def info(self) -> DataInfo:
        """(3, 32, 32) pictures of ten classes; opens no file."""
        return self._info

    def split(self, name: str) -> Split:
        """uint8 values (N, 3, 32, 32) and labels, held in memory (154 MB and 31 MB of pixels)."""
        check_split(name)
        values, labels = _read(self._find(), name)
        return Split(torch.from_numpy(values), torch.from_numpy(labels))

    def _find(self) -> Path:
        root = self._root or cache_dir() / "cifar10"
        names = [*FORMS, *(folder for folder, _ in FORMS.values())]
        if root.name in names and root.exists():
            return root
        for folder in (root, root / "cifar10"):
            for name in names:
                if (folder / name).exists():
                    return folder / name
        if not self._download:
            raise UserError(
                f"none of {', '.join(names)} is in {str(root)!r}: set root to its folder, or download to true"
            )
        if root.name in FORMS or root.is_file():
            raise UserError(f"root={str(root)!r} must be a folder, or one of {', '.join(names)} that is there")
        return fetch(root / ARCHIVE, URLS, SHA256)


def _read(source: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, 3, 32, 32) and int64 (N,) of one split, from an archive or the folder that it unpacks to."""
    folder, files = FORMS[source.name] if source.is_file() else next(f for f in FORMS.values() if f[0] == source.name)
    parse = _parse_binary if folder == BINARY[0] else _parse_python
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    try:
        if source.is_dir():
            for name in files[split]:
                with open(source / name, "rb") as file:
                    parts[name] = parse(file, str(source / name))
        else:
            # One pass in the order of the archive: seeking back in a .gz means to decompress it again.
            with tarfile.open(source, "r|gz") as archive:
                for member in archive:
                    name = member.name.removeprefix("./").removeprefix(f"{folder}/")
                    content = archive.extractfile(member) if name in files[split] and member.isfile() else None
                    if content is not None:
                        parts[name] = parse(content, f"{source}: {member.name}")
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(
            f"{str(source)!r} is damaged or cannot be read ({error}): delete it to fetch it anew"
        ) from error
    missing = [name for name in files[split] if name not in parts]
    if missing:
        raise UserError(f"{str(source)!r} lacks {', '.join(missing)}: delete it to fetch it anew")
    values, labels = zip(*(parts[name] for name in files[split]), strict=True)
    return np.concatenate(values), np.concatenate(labels)


def _parse_binary(file: IO[bytes], name: str) -> tuple[np.ndarray, np.ndarray]:
    content = file.read(BATCH * RECORD + 1)
    if not content or len(content) % RECORD:
        raise UserError(f"{name} is not whole records of {RECORD} bytes: fetch the archive anew")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, RECORD)
    return _checked(records[:, 1:], records[:, 0], name)


def _parse_python(file: IO[bytes], name: str) -> tuple[np.ndarray, np.ndarray]:
    batch = load_arrays(file, name)
    if isinstance(batch, dict):  # the keys are bytes or text, depending on who wrote the pickle
        batch = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
        raise UserError(f"{name} has no data and labels: fetch the archive anew")
    data, labels = batch["data"], batch["labels"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        raise UserError(f"{name} does not hold uint8 data of shape (N, {PIXELS}): fetch the archive anew")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise UserError(f"{name} does not hold a list of whole numbers as labels: fetch the archive anew")
    return _checked(data, np.array(labels), name)


def _checked(rows: np.ndarray, labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    if len(rows) != len(labels):
        raise UserError(f"{name} holds {len(rows)} pictures and {len(labels)} labels: fetch the archive anew")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise UserError(f"{name} holds a label outside of 0 .. {len(CLASSES) - 1}: fetch the archive anew")
    return rows.reshape(-1, *SHAPE), labels.astype(np.int64)
