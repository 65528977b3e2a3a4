"""Samples from files: what `python -m sde.sample` writes, arrays of others, and pictures in a folder or .zip.

Samples are read a batch at a time, so that any number of them fits. Pictures are taken as they are: scaling or
compressing them would change every number that is made of them (arXiv 2104.11222), so a picture of another size is
refused, and JPEG is told, as is what has to be changed to have 8 bits a channel and no transparency.
An array is read from the .npz as it is unpacked, without pickle, so that nothing can run.

    samples = load_samples(Path("samples.npz"), info, batch_size=64)
    for batch in samples:                 # uint8 (B, C, H, W), or float32 (B, ...)
        ...
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import sys
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sde.data import DataInfo
from sde.data.files import Files, open_files
from sde.data.pictures import FORMATS, SUFFIXES, Shaping, decode
from sde.distributed import say_once
from sde.errors import UserError, check_number

KEYS = ("samples", "images", "x", "data", "arr_0", "x_train")  # the first that there is
WRITTEN = "samples.npz"  # by this package, with an info.json beside it
LOSSY = (".jfif", ".jpeg", ".jpg", ".webp")  # .webp can be lossless, and seldom is
CHANGES = (
    *("reduced_from_16_bits", "alpha_on_white", "reduced_to_gray", "from_palette", "from_other_color_space"),
    "turned_by_exif",
)
"""What decoding does to pictures besides unpacking them; a gray picture becomes a colored one without loss."""
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")  # modes with transparency
_ORIENTATION = 0x0112  # tag of EXIF
_MAX_INFO = 1 << 24  # bytes of an info.json
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_DAMAGE = (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError)


class Samples(ABC):
    """Stored examples, read a batch at a time.

    Args:
        path: where they are.
        like: what they have to be like; None: they say it themselves.
        batch_size: examples of a batch when it is iterated over.

    Attributes:
        shape: of an example.
        info: how they were drawn, as the info.json of `python -m sde.sample` (or `sde.decode`) beside its samples.npz
            says; None where there is none that can be read and tells of as many. Infinities in it are words.
    """

    shape: tuple[int, ...]
    info: dict[str, Any] | None = None

    def __init__(self, path: Path, like: DataInfo | None, batch_size: int) -> None:
        check_number("batch_size", batch_size, at_least=1)
        self.path, self.like, self.batch_size = path, like, batch_size

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @property
    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What the card says of them: format, n, and of pictures how many have to be changed in which way."""

    @abstractmethod
    def read(self, rows: range) -> Tensor:
        """Examples number `rows` (of step 1): uint8 (B, C, H, W) or float32 (B, ...). Fastest in ascending order.

        Raises:
            UserError: one is damaged, unlike the others, or not finite.
        """

    @abstractmethod
    def digest(self) -> str:
        """SHA-256, hexadecimal, of what is stored: of the bytes of an array's file, as `sha256sum` has it; of pictures,
        of the names and bytes of all of them in order, the same in a folder and in a .zip of it. All is read for it.

        Raises:
            UserError: it cannot be read.
        """

    def __iter__(self) -> Iterator[Tensor]:
        """Batches of at most `batch_size` examples, in order."""
        for start in range(0, len(self), self.batch_size):
            yield self.read(range(start, min(start + self.batch_size, len(self))))

    def _check_like_data(self, kind: str) -> None:
        """Raise `UserError` unless the samples are like the data."""
        if self.like is None:
            return
        if kind != self.like.kind:
            fix = (
                "save pictures as uint8, rounded to the nearest gray level"
                if kind == "vectors"
                else "save vectors as float32"
            )
            raise UserError(f"samples={self.path} holds {kind} and {self.like.name} {self.like.kind}: {fix}")
        if self.shape != tuple(self.like.shape):
            raise UserError(
                f"samples={self.path} holds examples of shape {self.shape} and {self.like.name} has "
                f"{tuple(self.like.shape)}: give samples of the same size and channels (they are not scaled here, "
                "since how that is done changes the numbers)"
            )


def load_samples(path: str | Path, info: DataInfo | None = None, batch_size: int = 64) -> Samples:
    """The samples in a file or folder.

    Args:
        path: .npz of arrays (uint8 (N, H, W, C), (N, C, H, W) or (N, H, W), or floats (N, ...)), .npy, or a folder or
            .zip of pictures, which are taken in the order of their names; or a folder of `python -m sde.sample`.
        info: of the data that they are to be compared with; None to take them as they are.
        batch_size: examples of a batch.

    Raises:
        UserError: there is nothing there, it cannot be read, or it is unlike the data.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"samples={path} does not exist: give an .npz or .npy file, or a folder or .zip of pictures")
    if (path / WRITTEN).is_file():
        path = path / WRITTEN
    if path.is_dir() or path.suffix == ".zip":
        return PictureFiles(path, info, batch_size)
    if path.suffix in (".npz", ".npy"):
        return Array(path, info, batch_size)
    raise UserError(f"samples={path} is not an .npz or .npy file, nor a folder or .zip of pictures")


# Arrays


class Array(Samples):
    """The examples of an array in a .npz or .npy file."""

    def __init__(self, path: Path, like: DataInfo | None, batch_size: int) -> None:
        super().__init__(path, like, batch_size)
        self._key = self._find_key()
        with reading(path):
            self._stream = self._open()
            stored, fortran, self._dtype = read_header(self._stream, path)
            self._start = self._stream.tell()
            self._stored, self._whole = stored, self._read_whole() if fortran else None
        if len(stored) < 2 or 0 in stored:
            raise UserError(f"samples={path} has the shape {stored}: it must be (N, ...) with at least one value")
        if self._dtype == np.uint8:
            self._layout = layout_of(stored, like, path)
        elif self._dtype.kind == "f":
            self._layout = "floats"
        else:
            raise UserError(f"samples={path} has the type {self._dtype}: pictures are uint8, vectors float32")
        self.shape = tuple(self._arrange(np.empty((0, *stored[1:]), self._dtype)).shape[1:])
        self._check_like_data("vectors" if self._layout == "floats" else "pixels")
        if path.name == WRITTEN:
            self.info = info_beside(path, len(self))

    def __len__(self) -> int:
        return int(self._stored[0])

    @property
    def about(self) -> dict[str, Any]:
        form = self.path.suffix[1:]
        return {"format": form, "array": self._key, "type": str(self._dtype), "n": len(self)}

    def read(self, rows: range) -> Tensor:
        found = self._read(rows)
        if self._layout == "floats" and not bool(torch.isfinite(found).all()):
            self._refuse_infinite()
        return found

    def _refuse_infinite(self) -> None:
        """Look through all, so that each of several processes says the same."""
        first, count = None, 0
        for start in range(0, len(self), self.batch_size):
            bad = ~torch.isfinite(self._read(range(start, min(start + self.batch_size, len(self))))).flatten(1).all(1)
            if first is None and bool(bad.any()):
                first = start + int(bad.int().argmax())
            count += int(bad.sum())
        raise UserError(
            f"samples={self.path}: {count} of the {len(self)} examples are not finite in float32, the first of them "
            f"number {first}, counted from 0: find out why, as leaving them out would make samples look better"
        )

    def _read(self, rows: range) -> Tensor:
        if self._whole is not None:
            return self._arrange(self._whole[rows.start : rows.stop])
        count, size = len(rows), int(np.prod(self._stored[1:])) * self._dtype.itemsize
        with reading(self.path):
            # what is packed is unpacked from where the last batch ended, or from the beginning
            self._stream.seek(self._start + rows.start * size)
            content = self._stream.read(count * size)
        if len(content) != count * size:
            raise UserError(f"samples={self.path} ends before example {rows.stop}: write the file anew")
        return self._arrange(np.frombuffer(content, self._dtype).reshape(count, *self._stored[1:]))

    def digest(self) -> str:
        with reading(self.path), open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _arrange(self, array: np.ndarray) -> Tensor:
        if self._layout == "floats":
            with np.errstate(over="ignore", invalid="ignore"):  # becomes infinite, which `read` finds
                return torch.from_numpy(array.astype(np.float32))
        if self._layout == "nhw":
            array = array[:, None]
        elif self._layout == "nhwc":
            array = array.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.array(array, order="C"))

    def _find_key(self) -> str | None:
        """The name of the array in an .npz."""
        if self.path.suffix == ".npy":
            return None
        with reading(self.path), zipfile.ZipFile(self.path) as file:
            names = [name.removesuffix(".npy") for name in file.namelist()]
        found = next((name for name in KEYS if name in names), None)
        if found is None:
            raise UserError(
                f"samples={self.path} has {', '.join(names) or 'no arrays'}: call the array of samples `samples`"
            )
        return found

    def _open(self) -> IO[bytes]:
        return open(self.path, "rb") if self._key is None else zipfile.ZipFile(self.path).open(f"{self._key}.npy")

    def _read_whole(self) -> np.ndarray:
        content = np.load(self.path, allow_pickle=False)
        return content if self._key is None else content[self._key]


def layout_of(stored: tuple[int, ...], info: DataInfo | None, path: Path) -> str:
    """Where an array of pictures has its channels: nhw, nhwc or nchw; like the data if one of them is, else by length.

    Raises:
        UserError: that cannot be told.
    """
    if len(stored) == 3:
        return "nhw"
    if len(stored) == 4:
        _, a, b, c = stored
        if info is not None and tuple(info.shape) in ((c, a, b), (a, b, c)):
            return "nhwc" if tuple(info.shape) == (c, a, b) else "nchw"
        fits = [name for name, length in (("nhwc", c), ("nchw", a)) if length in (1, 3)]
        if len(fits) == 1:
            return fits[0]
    raise UserError(f"samples={path} has the shape {stored}: pictures are stored as (N, H, W, C) with 1 or 3 channels")


def read_header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape of a stored array, whether it is stored column by column, and its type; `stream` is left at its values."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format")
    shape, fortran, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise UserError(
            f"samples={path} holds Python objects, which are never loaded, since that can run any program: save an "
            "array of uint8 or float32"
        )
    return shape, fortran, dtype


def info_beside(path: Path, n: int) -> dict[str, Any] | None:
    """What the info.json beside a file says of its n samples; None if there is none, or it is damaged or of others."""
    try:
        with open(path.with_name("info.json"), "rb") as file:
            content = file.read(_MAX_INFO + 1)
        found = json.loads(content, parse_constant=str, parse_float=_number) if len(content) <= _MAX_INFO else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("n") == n else None


def _number(text: str) -> float | str:
    """A number of JSON; as it is written where it is too large."""
    return value if math.isfinite(value := float(text)) else text


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """A context in which whatever a damaged file of arrays leads to becomes one sentence."""
    try:
        yield
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"samples={path} is damaged or is not a file of arrays ({error}): write it anew") from error


# Pictures


class PictureFiles(Samples):
    """The pictures in a folder, with its sub-folders, or in a .zip."""

    def __init__(self, path: Path, like: DataInfo | None, batch_size: int) -> None:
        super().__init__(path, like, batch_size)
        try:
            self._files: Files = open_files(path)
        except UserError as error:
            raise UserError(f"samples={path} is not a .zip that can be read: make it anew") from error
        self._names = [name for name in self._files.names if name.lower().endswith(SUFFIXES)]
        if not self._names:
            raise UserError(f"samples={path} holds no pictures: they end in {', '.join(SUFFIXES)}")
        first = self._files.read(self._names[0])
        self._gray = is_gray(first) if like is None or like.kind != "pixels" else like.shape[0] == 1
        self.shape = tuple(self._decode(self._names[0]).shape)
        self._check_like_data("pixels")
        self._lossy = sum(name.lower().endswith(LOSSY) for name in self._names)
        if self._lossy:
            self._warn()

    def __len__(self) -> int:
        return len(self._names)

    @property
    def about(self) -> dict[str, Any]:
        return {"format": "pictures", "n": len(self), "compressed": self._lossy, **self._survey[1]}

    def read(self, rows: range) -> Tensor:
        names = self._names[rows.start : rows.stop]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside of the interpreter lock
            found = list(pool.map(self._decode, names))
        for name, pixels in zip(names, found, strict=True):
            if pixels.shape != self.shape:
                raise UserError(
                    f"{self._files.describe(name)} has shape {pixels.shape} and the first of the samples {self.shape}: "
                    "all must have the same size"
                )
        return torch.from_numpy(np.stack(found))

    def digest(self) -> str:
        return self._survey[0]

    @cached_property
    def _survey(self) -> tuple[str, dict[str, int]]:
        """The digest, and how many are changed in which way, as their headers say; all files are read once for it."""
        digest, changes = hashlib.sha256(), Counter[str]()
        for name in self._names:
            content = self._files.read(name)
            # lengths keep apart what stands in a name, in its file and in the next name
            for part in (name.encode("utf-8", "surrogateescape"), content):
                digest.update(len(part).to_bytes(8, "big"))
                digest.update(part)
            changes.update(changes_of(content, self._gray))
        return digest.hexdigest(), {name: changes[name] for name in CHANGES if changes[name]}

    def _decode(self, name: str) -> np.ndarray:
        """uint8 (C, H, W). Gray pictures become colored ones without loss; the other way only if they have no color."""
        pixels = decode(self._files.read(name), Shaping(None, "none", 3), self._files.describe(name))
        if not self._gray:
            return pixels
        if (pixels != pixels[:1]).any():
            raise UserError(f"{self._files.describe(name)} has colors among gray pictures: save it with one channel")
        return np.ascontiguousarray(pixels[:1])

    def _warn(self) -> None:
        sentence = (
            f"warning: {self._lossy} of the {len(self)} pictures in samples={self.path} are JPEG or WebP, whose "
            "compression alone changes FID and its kin: compare with others that are saved so, or save PNG"
        )
        if say_once(sentence):
            print(sentence, file=sys.stderr)


def is_gray(content: bytes) -> bool:
    """Whether a picture file has one channel, as it is stored; False for what cannot be opened."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return _is_gray(image)
    except Exception:  # `decode` says what is wrong
        return False


def changes_of(content: bytes, to_gray: bool) -> list[str]:
    """Those of `CHANGES` that `decode` makes to a picture file, by its header alone.

    Args:
        content: the bytes of the file; nothing is found in what cannot be opened.
        to_gray: whether one channel is kept.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            has_exif = image.format != "PNG" or "exif" in image.info  # looking further decodes a PNG
            found = {
                "reduced_from_16_bits": _is_wide(image),
                "alpha_on_white": image.mode in _ALPHA or "transparency" in image.info,
                "reduced_to_gray": to_gray and not _is_gray(image),
                "from_palette": image.mode in ("P", "PA"),
                "from_other_color_space": image.mode in ("CMYK", "HSV", "LAB", "YCbCr"),
                "turned_by_exif": has_exif and image.getexif().get(_ORIENTATION, 1) in range(2, 9),
            }
            return [name for name in CHANGES if found[name]]
    except Exception:  # `decode` says what is wrong
        return []


def _layout(image: Image.Image) -> str:
    """How the pixels of an opened picture are stored ("LA;16B"), which its mode ("RGBA") need not tell."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else None  # type: ignore[attr-defined]
    first = arguments[0] if isinstance(arguments, tuple | list) and arguments else arguments
    return first if isinstance(first, str) else image.mode


def _is_gray(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I") or _layout(image).startswith("LA;")


def _is_wide(image: Image.Image) -> bool:
    """Whether channels have more than 8 bits."""
    if image.mode.startswith("I"):
        return True
    if image.format == "PPM":
        arguments = image.tile[0][3]  # type: ignore[attr-defined]
        return isinstance(arguments, tuple) and arguments[-1] > 255  # the largest value
    return image.format in ("PNG", "TIFF") and ";16" in _layout(image)  # a BMP has 16 bits of all channels together
