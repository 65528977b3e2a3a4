"""What a data set is: facts about its examples, and two splits of them.

A data set hands over its examples as they are stored - uint8 pixels, or float32 vectors - and `DataInfo` says how
they look to a network and how a network's output becomes pixels again:

    encode(p) = low + (high - low) p / 255,    decode(x) = round(255 (x - low) / (high - low)), clamped to 0 .. 255.

Keeping the pixels as bytes makes a data set a quarter of the size, lets it be a memory-mapped file, and makes the
round trip exact: decode(encode(p)) = p for all 256 values. `DataInfo` is also what a run remembers about its data
set, so that sampling needs neither the pictures nor the configuration that found them.

    from sde.data import DATASETS

    dataset = DATASETS.get("glyphs")(size=32)
    train = dataset.split("train")
    x = dataset.info.encode(train.values[:16])  # (16, 1, 32, 32), in [-1, 1]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sde.errors import UserError, check_choice, check_number
from sde.registry import Registry

KINDS = ("pixels", "vectors")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class DataInfo:
    """The facts about a data set that a model, a sampler and a run need; plain values, so it can be saved as JSON.

    Args:
        name: what the data set is called.
        shape: one example as the network sees it: (C, H, W) for pictures, (D,) or any other for vectors.
        num_classes: how many classes the labels tell apart; 0 when there are no labels.
        class_names: a name for each class, or empty.
        kind: "pixels" for uint8 pictures, "vectors" for float32 arrays that the network sees as they are.
        low: what pixel 0 becomes for the network (pictures only).
        high: what pixel 255 becomes; above `low`.

    Raises:
        UserError: a value is not of these.
    """

    name: str
    shape: tuple[int, ...]
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    kind: str = "pixels"
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UserError(f"name={self.name!r} of a data set must be a string that is not empty")
        if not self.shape or any(not _is_count(length) or length < 1 for length in self.shape):
            raise UserError(f"shape={self.shape!r} of a data set must be whole numbers above 0, such as (3, 32, 32)")
        check_choice("kind", self.kind, KINDS)
        if self.kind == "pixels" and len(self.shape) != 3:
            raise UserError(f"shape={self.shape!r} of pictures must be (channels, height, width)")
        if not _is_count(self.num_classes) or self.num_classes < 0:
            raise UserError(f"num_classes={self.num_classes!r} must be a whole number, 0 for data without labels")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise UserError(
                f"class_names has {len(self.class_names)} names for num_classes={self.num_classes}: "
                "give one for each class, or none"
            )
        check_number("low", self.low)
        check_number("high", self.high, above=self.low)

    def encode(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored examples as the network sees them.

        Args:
            pixels: uint8 of shape (B, C, H, W) for pictures; vectors of any shape are cast only.
            dtype: of the result. Computed in float64 when that is asked for and in float32 otherwise, so that
                half precision loses its bits once.

        Returns:
            A tensor of the same shape, in [low, high] for pictures.

        Raises:
            UserError: pictures that are not uint8.
        """
        if self.kind == "vectors":
            return pixels.to(dtype)
        if pixels.dtype != torch.uint8:
            raise UserError(f"pictures to encode have dtype {pixels.dtype}: give the uint8 pixels of a split")
        work = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.low + pixels.to(work) * ((self.high - self.low) / 255)).to(dtype)

    def decode(self, x: Tensor) -> Tensor:
        """What a network works on, as it is stored: the inverse of `encode`.

        Pixels are rounded to the nearest value, since truncation would darken every picture by half a level, and
        clamped to 0 .. 255. An entry that is not a number has no pixel and becomes 0.

        Args:
            x: (B, C, H, W), any floating dtype; for vectors any shape.

        Returns:
            uint8 of the same shape for pictures, float32 for vectors.
        """
        if self.kind == "vectors":
            return x.to(torch.float32)
        work = x if x.dtype == torch.float64 else x.to(torch.float32)
        pixels = (work - self.low) * (255 / (self.high - self.low))
        # The conversion of NaN to an integer differs from one device to the next.
        return pixels.nan_to_num(nan=0.0).round().clamp(0, 255).to(torch.uint8)

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON holds them: lists for tuples."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> DataInfo:
        """The inverse of `to_dict`.

        Raises:
            UserError: a key is missing or unknown, or a value is not allowed.
        """
        if not isinstance(d, Mapping):
            raise UserError(f"the facts about a data set must be a dictionary, not {d!r}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in d if key not in known)
        missing = [key for key in ("name", "shape") if key not in d]
        if unknown or missing:
            wrong = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
            raise UserError(f"the facts about a data set have {wrong}: the keys are {', '.join(known)}")
        values = dict(d)
        for key in ("shape", "class_names"):
            if key in values:
                if not isinstance(values[key], list | tuple):
                    raise UserError(f"{key}={values[key]!r} of a data set must be a list")
                values[key] = tuple(values[key])
        if any(not isinstance(name, str) for name in values.get("class_names", ())):
            raise UserError(f"class_names={values['class_names']!r} of a data set must be strings")
        return cls(**values)


@dataclass(frozen=True)
class Split:
    """The examples of one split, as they are stored.

    Args:
        values: uint8 (N, C, H, W) or float32 (N, *shape); may be backed by a memory-mapped file, so index it rather
            than copy it.
        labels: int64 (N,), in 0 .. num_classes - 1, or None for data without labels.

    Raises:
        UserError: dtypes or lengths are not these.
    """

    values: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.dtype not in (torch.uint8, torch.float32):
            raise UserError(f"the values of a split have dtype {self.values.dtype}: uint8 or float32 are allowed")
        if self.labels is None:
            return
        if self.labels.dtype != torch.int64 or self.labels.shape != self.values.shape[:1]:
            raise UserError(
                f"the labels of a split are {self.labels.dtype} of shape {tuple(self.labels.shape)}: "
                f"they must be int64 of shape ({len(self.values)},)"
            )

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device | str) -> Split:
        """The same examples on `device`; a memory-mapped file is read in full unless `device` is where it is."""
        return Split(self.values.to(device), None if self.labels is None else self.labels.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of values and labels, whether in memory or in a file."""
        labels = 0 if self.labels is None else math.prod(self.labels.shape) * self.labels.element_size()
        return math.prod(self.values.shape) * self.values.element_size() + labels


class Dataset(ABC):
    """A source of examples. Constructors take configuration values only and are cheap: files are opened, drawn or
    downloaded when `info` or a split is first asked for.

    Attributes:
        info: the facts about the examples; asking may prepare the data.
        random_flip: whether training mirrors pictures left to right at random; never for vectors.
    """

    random_flip: bool = False

    @property
    @abstractmethod
    def info(self) -> DataInfo:
        """The facts about the examples; asking may prepare the data."""

    @abstractmethod
    def split(self, name: str) -> Split:
        """The examples of "train" or "test".

        Raises:
            UserError: `name` is neither, or the data cannot be had.
        """


def check_split(name: str) -> None:
    """Raise `UserError` unless `name` is that of a split."""
    check_choice("split", name, SPLITS)


def check_whole(name: str, value: object, *, at_least: int, at_most: int | None = None) -> None:
    """Raise `UserError` unless `value` is a whole number in the range."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{name}={value!r} is not a whole number")
    check_number(name, value, at_least=at_least, at_most=math.inf if at_most is None else at_most)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


DATASETS: Registry[Dataset] = Registry("data")
register = DATASETS.register
