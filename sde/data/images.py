"""Any folder or .zip of pictures.

Pictures are found in all sub-folders, brought to one size and kept as bytes in one memory-mapped file in the cache, so
that the work is done once and no number of pictures fills the memory. A changed picture or option makes a new file.

Labels are described in `labels`. The test split is the folder `test` (or `val`, `valid`, `validation`) beside `train`
when there are both, otherwise a fraction that is held out by a hash of the file names.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from sde.data.base import DataInfo, Dataset, Split, check_whole, register
from sde.data.cache import cache_dir, key
from sde.data.files import Files, open_files
from sde.data.labels import MODES, find_labels
from sde.data.pictures import SUFFIXES, Shaping, decode
from sde.data.prepared import VERSION, Prepared, SplitWriter, held_out, load_or_prepare
from sde.errors import UserError, check_choice, check_flag, check_number

TEST_FOLDERS = ("test", "val", "valid", "validation")
WINDOW = 256  # pictures that are decoded at a time


@register("images")
class Images(Dataset):
    """Pictures in files, with labels if there are any.

    Args:
        path: a folder, with all its sub-folders (links to folders are not followed), or a .zip; hidden files are left
            out. Read are .png, .jpg, .webp, .bmp, .gif and .tif (their first frame) and .ppm and its kin.
        size: side of the pictures in pixels; null with resize=none: as large as they are.
        resize: `crop` scales the largest centered square, `squash` the whole picture, both with the Lanczos filter;
            `none` takes only pictures that have the size.
        channels: 3 for color, 1 for gray.
        labels: `json` (`dataset.json`), `folders` (the first folder under `path`, or under train and test), `none`, or
            `auto`: the first of these that there is.
        test_fraction: share held out when there are no folders train and test, 0 up to 1 (exclusive).
        seed: chooses which are held out.
        random_flip: whether training mirrors pictures left to right at random.

    Raises:
        UserError: a value is not allowed, there are no pictures, one is damaged (it is named), or a label is missing.
    """

    def __init__(
        self,
        path: str,
        size: int | None = 32,
        resize: str = "crop",
        channels: int = 3,
        labels: str = "auto",
        test_fraction: float = 0.1,
        seed: int = 0,
        random_flip: bool = False,
    ) -> None:
        self._shaping = Shaping(size, resize, channels)
        check_choice("labels", labels, MODES)
        check_number("test_fraction", test_fraction, at_least=0, below=1)
        check_whole("seed", seed, at_least=0)
        check_flag("random_flip", random_flip)
        self._path, self._labels = Path(path).expanduser(), labels
        self._test_fraction, self._seed = float(test_fraction), seed
        self.random_flip = random_flip
        self._prepared: Prepared | None = None

    @property
    def info(self) -> DataInfo:
        """(channels, size, size) pictures."""
        return self._prepare().info

    def split(self, name: str) -> Split:
        """uint8 values (N, channels, size, size), memory-mapped, and labels or None."""
        return self._prepare().split(name, "set test_fraction above 0, or put pictures in folders train and test")

    def _prepare(self) -> Prepared:
        if self._prepared is None:
            files = open_files(self._path)
            options = [asdict(self._shaping), self._labels, self._test_fraction, self._seed]
            folder = cache_dir() / f"images-{key(VERSION, files.identity(), options)}"
            self._prepared = load_or_prepare(folder, lambda temporary: self._fill(files, temporary))
        return self._prepared

    def _fill(self, files: Files, folder: Path) -> DataInfo:
        pictures = [name for name in files.names if name.lower().endswith(SUFFIXES)]
        if not pictures:
            raise UserError(f"path={str(self._path)!r} holds no pictures: they end in {', '.join(SUFFIXES)}")
        inner = _without_common_folder(pictures)
        splits = _split_folders(inner)
        if splits is not None:
            kept = [i for i, split in enumerate(splits) if split is not None]
            pictures, inner = [pictures[i] for i in kept], [_without_first(inner[i]) for i in kept]
            in_test = np.array([splits[i] == "test" for i in kept])
        else:
            in_test = held_out(pictures, self._test_fraction, self._seed)
        folders = [path.parts[0] if len(path.parts) > 1 else None for path in inner]
        labels = find_labels(self._labels, files, pictures, folders)
        shape = self._decode(files, pictures[0]).shape
        writer = SplitWriter(folder, in_test, shape, None if labels is None else labels.values)
        for index, pixels in enumerate(self._decode_all(files, pictures)):
            if pixels.shape != shape:
                raise UserError(
                    f"{files.describe(pictures[index])} has shape {pixels.shape} and the first picture {shape}: "
                    "give a size, and set resize to crop or squash"
                )
            writer.write(index, pixels)
        writer.close()
        if labels is None:
            return DataInfo("images", shape)
        return DataInfo("images", shape, labels.num_classes, labels.class_names)

    def _decode(self, files: Files, name: str) -> np.ndarray:
        return decode(files.read(name), self._shaping, files.describe(name))

    def _decode_all(self, files: Files, pictures: list[str]) -> Iterator[np.ndarray]:
        """The pixels of all pictures in order, by threads: Pillow decodes outside of the interpreter lock."""
        bar = tqdm(total=len(pictures), desc="preparing pictures", unit="picture", leave=False, disable=None)
        with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(pictures), WINDOW):
                window = pictures[start : start + WINDOW]
                yield from pool.map(lambda name: self._decode(files, name), window)
                bar.update(len(window))


def _without_common_folder(names: list[str]) -> list[PurePosixPath]:
    """Paths without the folders that all of them are in: a .zip often holds one folder with everything."""
    paths = [PurePosixPath(name.lstrip("/")) for name in names]
    shared = posixpath.commonpath([path.parent for path in paths])
    return [path.relative_to(shared) for path in paths]


def _without_first(path: PurePosixPath) -> PurePosixPath:
    return PurePosixPath(*path.parts[1:])


def _split_folders(paths: list[PurePosixPath]) -> list[str | None] | None:
    """ "train", "test" or None (neither) for each picture, or None when the folders do not say."""
    tops = {path.parts[0] for path in paths if len(path.parts) > 1}
    test = next((name for name in TEST_FOLDERS if name in tops), None)
    everywhere = all(len(path.parts) > 1 and path.parts[0] in ("train", *TEST_FOLDERS) for path in paths)
    if test is None or "train" not in tops or not everywhere:
        return None
    meaning = {"train": "train", test: "test"}
    return [meaning.get(path.parts[0]) for path in paths]
