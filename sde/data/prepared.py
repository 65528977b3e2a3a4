"""Data that is worked out once and then memory-mapped: a folder of arrays in the cache.

    <cache>/<name>-<key>/index.json          the facts about the data, and the size of every other file
                         train.npy           uint8 (N, C, H, W)
                         train_labels.npy    int64 (N,), when there are labels
                         test.npy, test_labels.npy

The key stands for everything that the pictures depend on, so that a changed option or source makes a new folder.
A folder appears whole or not at all; one that is damaged later is recognized by its sizes and made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from sde.data.base import DataInfo, Split, check_split
from sde.data.cache import locked, new_folder
from sde.errors import UserError

VERSION = 1  # of the layout above and of how pictures are made; part of every key


@dataclass(frozen=True)
class Prepared:
    """A prepared folder.

    Args:
        folder: where the arrays are.
        info: the facts about them.
    """

    folder: Path
    info: DataInfo

    def split(self, name: str, fix: str) -> Split:
        """The split "train" or "test", its values memory-mapped; `fix` tells how to get a split that is missing."""
        check_split(name)
        file = self.folder / f"{name}.npy"
        if not file.exists():
            raise UserError(f"{self.info.name!r} has no {name} split: {fix}")
        # Copy-on-write, since PyTorch has no read-only tensors: nothing ever reaches the file.
        values = torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))
        labels = self.folder / f"{name}_labels.npy"
        return Split(values, torch.from_numpy(np.load(labels, allow_pickle=False)) if labels.exists() else None)


def load_or_prepare(folder: Path, prepare: Callable[[Path], DataInfo]) -> Prepared:
    """The prepared data at `folder`; `prepare(temporary)` fills a folder and returns the facts when there is none."""
    if info := _read_index(folder):  # without the lock, since a shared cache may be read-only
        return Prepared(folder, info)
    with locked(folder):
        info = _read_index(folder)  # another process may have been faster
        if info is None:
            shutil.rmtree(folder, ignore_errors=True)
            with new_folder(folder) as temporary:
                info = prepare(temporary)
                files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
                index = {"info": info.to_dict(), "files": files}
                (temporary / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return Prepared(folder, info)


def _read_index(folder: Path) -> DataInfo | None:
    """The facts of a folder that is whole, otherwise None."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in index["files"].items())
        return DataInfo.from_dict(index["info"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class SplitWriter:
    """Writes pictures to the files of a prepared folder in any order, holding none of them.

    Args:
        folder: where `train.npy` and `test.npy` go.
        in_test: bool (N,): which pictures belong to the test split.
        shape: of one picture, (C, H, W).
        labels: int64 (N,), or None.
    """

    def __init__(self, folder: Path, in_test: np.ndarray, shape: tuple[int, ...], labels: np.ndarray | None) -> None:
        self._in_test = in_test
        self._row = np.where(in_test, np.cumsum(in_test), np.cumsum(~in_test)) - 1
        self._arrays = {}
        for name, chosen in (("train", ~in_test), ("test", in_test)):
            if not chosen.any():  # an empty file cannot be memory-mapped
                continue
            size = (int(chosen.sum()), *shape)
            self._arrays[name] = open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=size)
            if labels is not None:
                np.save(folder / f"{name}_labels.npy", labels[chosen].astype(np.int64))

    def write(self, index: int, picture: np.ndarray) -> None:
        """Put picture `index` (uint8, (C, H, W)) in its place."""
        self._arrays["test" if self._in_test[index] else "train"][self._row[index]] = picture

    def close(self) -> None:
        """Flush what was written and let go of the files."""
        for array in self._arrays.values():
            array.flush()
        self._arrays.clear()


def held_out(names: Sequence[str] | Iterable[str], fraction: float, seed: int) -> np.ndarray:
    """Which examples make the test split: the `fraction` of them whose hashes of (seed, name) are smallest.

    A hash rather than a shuffle, so that the choice for one example hardly depends on which others there are, and
    not at all on the platform.

    Args:
        names: one for each example, all different.
        fraction: in [0, 1).
        seed: chooses another division.

    Returns:
        bool (N,), with round(fraction N) true; at least one when fraction > 0 and N > 1, and never all.
    """
    hashes = [hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest() for name in names]
    chosen = np.zeros(len(hashes), dtype=bool)
    count = round(fraction * len(hashes))
    if fraction > 0:
        count = min(max(count, 1), len(hashes) - 1)
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    chosen[order[:count]] = True
    return chosen
