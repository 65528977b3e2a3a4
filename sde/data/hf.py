"""Any picture data set of the Hugging Face Hub, through the library `datasets`.

It is downloaded by that library, brought to one size and kept in the cache; from then on neither the library nor the
network is needed. Install it with `pip install 'sde[hf]'`. Data sets that want to run code of their own are not
allowed to.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from sde.data.base import DataInfo, Dataset, Split, check_whole, register
from sde.data.cache import cache_dir, key
from sde.data.labels import Labels, number
from sde.data.pictures import Shaping, decode
from sde.data.prepared import VERSION, Prepared, SplitWriter, held_out, load_or_prepare
from sde.errors import UserError, check_flag, check_number, suggest

TEST_SPLITS = ("test", "validation", "valid", "val")
LABEL_COLUMNS = ("label", "labels")


@register("hf")
class HuggingFace(Dataset):
    """Pictures of a data set of the Hub, with labels if there are any.

    What is prepared is kept under the options alone: a data set that changes on the Hub is read anew when `revision`
    names another version.

    Args:
        path: name on the Hub (`uoft-cs/cifar10`), or a folder that `datasets.load_dataset` reads.
        name: configuration of the data set, for those with several.
        revision: branch, tag or commit; null for the newest.
        train_split: the split to train on.
        test_split: the split to test on; null: the first there is of test, validation, valid, val, and otherwise
            `test_fraction` of the train split.
        image_key: column of the pictures; null: the only one that holds pictures.
        label_key: column of the labels; null: the only one that holds classes, or one called label or labels; `none`:
            no labels.
        size: side of the pictures in pixels; null with resize=none: as large as they are.
        resize: `crop` scales the largest centered square, `squash` the whole picture; `none` takes only pictures that
            have the size.
        channels: 3 for color, 1 for gray.
        test_fraction: share held out when there is no test split, 0 up to 1 (exclusive).
        seed: chooses which are held out.
        random_flip: whether training mirrors pictures left to right at random.

    Raises:
        UserError: a value is not allowed, `datasets` is not installed, or the data set cannot be had or has no such
            split or column.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        revision: str | None = None,
        train_split: str = "train",
        test_split: str | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
        size: int | None = 32,
        resize: str = "crop",
        channels: int = 3,
        test_fraction: float = 0.1,
        seed: int = 0,
        random_flip: bool = False,
    ) -> None:
        if not isinstance(path, str) or not path:
            raise UserError(f"path={path!r} must be the name of a data set, such as uoft-cs/cifar10")
        self._shaping = Shaping(size, resize, channels)
        check_number("test_fraction", test_fraction, at_least=0, below=1)
        check_whole("seed", seed, at_least=0)
        check_flag("random_flip", random_flip)
        self._path, self._name, self._revision = path, name, revision
        self._train_split, self._test_split = train_split, test_split
        self._image_key, self._label_key = image_key, label_key
        self._test_fraction, self._seed = float(test_fraction), seed
        self.random_flip = random_flip
        self._prepared: Prepared | None = None

    @property
    def info(self) -> DataInfo:
        """(channels, size, size) pictures."""
        return self._prepare().info

    def split(self, name: str) -> Split:
        """uint8 values (N, channels, size, size), memory-mapped, and labels or None."""
        return self._prepare().split(name, "name one with test_split, or set test_fraction above 0")

    def _prepare(self) -> Prepared:
        if self._prepared is None:
            source = [self._path, self._name, self._revision, self._train_split, self._test_split]
            columns = [self._image_key, self._label_key]
            options = [asdict(self._shaping), self._test_fraction, self._seed]
            folder = cache_dir() / f"hf-{key(VERSION, source, columns, options)}"
            self._prepared = load_or_prepare(folder, self._fill)
        return self._prepared

    def _fill(self, folder: Path) -> DataInfo:
        parts = self._load()
        train = parts[0]
        if not len(train):
            raise UserError(f"the split {self._train_split!r} of {self._path!r} is empty: choose another train_split")
        image_key = self._find_images(train.features)
        label_key = self._find_labels(train.features)
        sizes = [len(part) for part in parts]
        if len(parts) == 2:
            in_test = np.arange(sum(sizes)) >= sizes[0]
        else:
            in_test = held_out(map(str, range(sizes[0])), self._test_fraction, self._seed)
        labels = None if label_key is None else self._labels(parts, label_key)
        pictures = self._pictures(parts, image_key)
        index, first = 0, next(pictures)
        writer = SplitWriter(folder, in_test, first.shape, None if labels is None else labels.values)
        writer.write(index, first)
        for index, pixels in enumerate(pictures, start=1):
            if pixels.shape != first.shape:
                raise UserError(
                    f"picture {index} of {self._path!r} has shape {pixels.shape} and the first {first.shape}: give a "
                    "size, and set resize to crop or squash"
                )
            writer.write(index, pixels)
        writer.close()
        if labels is None:
            return DataInfo("hf", first.shape)
        return DataInfo("hf", first.shape, labels.num_classes, labels.class_names)

    def _load(self) -> list[Any]:
        """The train split, and the test split if there is one."""
        library = _library()
        try:
            splits = library.load_dataset(self._path, self._name, revision=self._revision)
        except Exception as error:  # the library raises dozens of kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"the data set {self._path!r} cannot be had ({reason}): check path, name and revision"
            ) from error
        if not isinstance(splits, Mapping):
            raise UserError(f"the data set {self._path!r} has no splits: choose another")
        for option, split in (("train_split", self._train_split), ("test_split", self._test_split)):
            if split is not None and split not in splits:
                there = list(splits)
                raise UserError(
                    f"{option}={split!r} is not in {self._path!r}, which has {', '.join(there)}{suggest(split, there)}"
                )
        others = (name for name in TEST_SPLITS if name in splits and name != self._train_split)
        test = self._test_split or next(others, None)
        return [splits[self._train_split]] + ([] if test is None else [splits[test]])

    def _find_images(self, features: Mapping[str, Any]) -> str:
        if self._image_key is not None:
            return self._column("image_key", self._image_key, features)
        found = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
        if len(found) != 1:
            many = f"several columns of pictures ({', '.join(found)})" if found else "no column of pictures"
            raise UserError(f"{self._path!r} has {many}: set image_key to one of {', '.join(features)}")
        return found[0]

    def _find_labels(self, features: Mapping[str, Any]) -> str | None:
        if self._label_key == "none":
            return None
        if self._label_key is not None:
            return self._column("label_key", self._label_key, features)
        classes = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
        named = [name for name in LABEL_COLUMNS if name in (classes or features)]
        if len(classes) > 1 and not named:
            raise UserError(
                f"{self._path!r} has several columns of classes: set label_key to one of {', '.join(classes)}"
            )
        found = named or classes
        return found[0] if found else None

    def _column(self, option: str, value: str, features: Mapping[str, Any]) -> str:
        if value not in features:
            raise UserError(
                f"{option}={value!r} is not a column of {self._path!r}, which has {', '.join(features)}"
                f"{suggest(value, features)}"
            )
        return value

    def _labels(self, parts: Sequence[Any], label_key: str) -> Labels:
        values = [label for part in parts for label in part[label_key]]
        where = f"the column {label_key!r} of {self._path!r}"
        if any(label == -1 for label in values):  # how the Hub marks a test split whose classes are secret
            raise UserError(f"{where} does not tell all classes: set test_split to another, or label_key to none")
        return number(values, getattr(parts[0].features[label_key], "names", None), where)

    def _pictures(self, parts: Sequence[Any], image_key: str) -> Iterator[np.ndarray]:
        total, index = sum(len(part) for part in parts), 0
        with tqdm(total=total, desc="preparing pictures", unit="picture", leave=False, disable=None) as bar:
            for part in parts:
                for row in part.select_columns([image_key]):
                    yield self._pixels(row[image_key], f"picture {index} of {self._path!r}")
                    index += 1
                    bar.update()

    def _pixels(self, value: Any, name: str) -> np.ndarray:
        if isinstance(value, Image.Image):
            return self._shaping(value, name)
        if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):  # a picture that is not decoded
            value = value["bytes"]
        if isinstance(value, bytes):
            return decode(value, self._shaping, name)
        try:
            return self._shaping(Image.fromarray(np.asarray(value, dtype=np.uint8)), name)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{name} is {type(value).__name__}, not a picture: set image_key to another column"
            ) from error


def _library() -> ModuleType:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError("data=hf needs the library datasets: pip install 'sde[hf]'") from error
