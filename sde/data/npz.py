"""Arrays in a NumPy file: pictures (uint8), or vectors and sequences (floats).

The arrays are read without pickle, so that nothing in the file can run. A .npy file is memory-mapped when the whole of
it is the train split.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from sde.data.base import DataInfo, Dataset, Split, check_split, check_whole, register
from sde.data.labels import Labels, number
from sde.data.prepared import held_out
from sde.errors import UserError, check_choice, check_flag, check_number, suggest

KEYS = ("x_train", "x", "images", "samples", "data", "arr_0")
LABEL_KEYS = ("y_train", "y", "labels", "label", "arr_1")
PICTURES = {"nhwc": 4, "nchw": 4, "nhw": 3}  # layouts and how many axes they have
SEQUENCES = {"ncl": 3, "nlc": 3, "nl": 2}
LAYOUTS = ("auto", *PICTURES, *SEQUENCES)
TRAIN, TEST = "_train", "_test"


@register("npz")
class Npz(Dataset):
    """The arrays of a .npz or .npy file.

    uint8 arrays are pictures: (N, H, W, C), (N, C, H, W) or (N, H, W). Arrays of floats are vectors (N, D), sequences
    (N, C, L) of length L with C values at each place, or of any other shape. They are shown to the network as they are,
    so they should have a standard deviation near 0.5.

    Args:
        path: the file.
        key: name of the array; null: the first there is of x_train, x, images, samples, data, arr_0.
        label_key: name of the array of labels (N,), whole numbers from 0; null: the first there is of y_train, y,
            labels, label, arr_1 (this one only if it holds one whole number an example); `none`: no labels.
        layout: of pictures `nhwc`, `nchw`, `nhw`, or `auto`: the axis of length 1 or 3 is that of the channels. Of
            floats `auto`: as they are; or for sequences `ncl`, `nlc`, or `nl` (one value at each place), each of which
            gives (N, C, L).
        test_fraction: share held out, 0 up to 1 (exclusive). When `key` ends in _train and its sibling in _test is
            there too, that one is the test split.
        seed: chooses which are held out.
        random_flip: whether training mirrors pictures left to right at random.

    Raises:
        UserError: a value is not allowed, or the file cannot be read or holds something else.
    """

    def __init__(
        self,
        path: str,
        key: str | None = None,
        label_key: str | None = None,
        layout: str = "auto",
        test_fraction: float = 0.1,
        seed: int = 0,
        random_flip: bool = False,
    ) -> None:
        check_choice("layout", layout, LAYOUTS)
        check_number("test_fraction", test_fraction, at_least=0, below=1)
        check_whole("seed", seed, at_least=0)
        check_flag("random_flip", random_flip)
        self._path, self._key, self._label_key = Path(path).expanduser(), key, label_key
        self._layout, self._test_fraction, self._seed = layout, float(test_fraction), seed
        self.random_flip = random_flip
        self._loaded: tuple[DataInfo, dict[str, Split]] | None = None

    @property
    def info(self) -> DataInfo:
        """(C, H, W) pictures, or vectors of the shape that the file has."""
        return self._load()[0]

    def split(self, name: str) -> Split:
        """uint8 values (N, C, H, W) or float32 (N, *shape), and labels or None."""
        check_split(name)
        splits = self._load()[1]
        if name not in splits:
            raise UserError(f"{str(self._path)!r} has no test split: set test_fraction above 0 to hold examples out")
        return splits[name]

    def _load(self) -> tuple[DataInfo, dict[str, Split]]:
        if self._loaded is None:
            arrays = _open(self._path)
            key = _choose(arrays, self._key, KEYS, "key", self._path)
            label_key = self._choose_labels(arrays, key)
            sibling, label_sibling = (_sibling(arrays, name) for name in (key, label_key))
            parts = [(key, label_key)]
            if sibling is not None and (label_key is None or label_sibling is not None):
                parts.append((sibling, label_sibling))
            values = [self._values(arrays, name) for name, _ in parts]
            labels = self._labels(arrays, [name for _, name in parts], [len(value) for value in values])
            if any(value.shape[1:] != values[0].shape[1:] or value.dtype != values[0].dtype for value in values):
                raise UserError(
                    f"{key} and {sibling} in {str(self._path)!r} hold examples of different shapes or types"
                )
            self._loaded = self._facts(values[0], labels), self._divide(values, labels)
            if self.random_flip and self._loaded[0].kind == "vectors":
                raise UserError(f"random_flip=true, and {str(self._path)!r} holds vectors: set it to false")
        return self._loaded

    def _choose_labels(self, arrays: Mapping[str, np.ndarray], key: str) -> str | None:
        if self._label_key == "none":
            return None
        if self._label_key is not None:
            return _choose(arrays, self._label_key, LABEL_KEYS, "label_key", self._path)
        found = next((name for name in LABEL_KEYS if name in arrays and name != key), None)
        if found == "arr_1":  # a name that says nothing
            guess = _read(arrays, found, self._path)
            return found if guess.dtype.kind in "iu" and guess.shape == (len(_read(arrays, key, self._path)),) else None
        return found

    def _values(self, arrays: Mapping[str, np.ndarray], key: str) -> torch.Tensor:
        array, where = _read(arrays, key, self._path), f"{key} in {str(self._path)!r}"
        if array.ndim < 2 or not array.size:
            raise UserError(f"{where} has shape {array.shape}: it must be (N, ...) with at least one value")
        if array.dtype == np.uint8:
            return _as_tensor(_channels_first(array, self._layout, where))
        if array.dtype.kind != "f":
            raise UserError(f"{where} has dtype {array.dtype}: pictures are uint8 (0 to 255), vectors float32")
        vectors = _as_sequences(array, self._layout, where).astype(np.float32, copy=False)
        if not all(np.isfinite(block).all() for block in np.array_split(vectors, max(1, vectors.size >> 24))):
            raise UserError(f"{where} holds values that are not finite: remove those examples")
        return _as_tensor(vectors)

    def _labels(self, arrays: Mapping[str, np.ndarray], keys: list[str | None], sizes: list[int]) -> Labels | None:
        """The labels of all parts, end to end."""
        parts = []
        for key, size in zip(keys, sizes, strict=True):
            if key is None:
                return None
            array = _read(arrays, key, self._path)
            if array.shape == (size, 1):  # as Keras keeps those of CIFAR
                array = array[:, 0]
            if array.dtype.kind not in "iu" or array.shape != (size,):
                raise UserError(
                    f"{key} in {str(self._path)!r} is {array.dtype} of shape {array.shape}: labels must be whole "
                    f"numbers of shape ({size},); label_key=none does without"
                )
            parts.append(array.astype(np.int64))
        return number(np.concatenate(parts).tolist(), None, repr(str(self._path)))

    def _facts(self, values: torch.Tensor, labels: Labels | None) -> DataInfo:
        kind = "pixels" if values.dtype == torch.uint8 else "vectors"
        return DataInfo("npz", tuple(values.shape[1:]), 0 if labels is None else labels.num_classes, kind=kind)

    def _divide(self, values: list[torch.Tensor], labels: Labels | None) -> dict[str, Split]:
        numbers = None if labels is None else torch.from_numpy(labels.values)
        if len(values) == 2:
            n = len(values[0])
            train_labels, test_labels = (None, None) if numbers is None else (numbers[:n], numbers[n:])
            return {"train": Split(values[0], train_labels), "test": Split(values[1], test_labels)}
        if self._test_fraction == 0:
            return {"train": Split(values[0], numbers)}
        in_test = torch.from_numpy(held_out(map(str, range(len(values[0]))), self._test_fraction, self._seed))
        splits = {"train": ~in_test, "test": in_test}
        if not in_test.any():  # a single example
            del splits["test"]
        return {
            name: Split(values[0][chosen], None if numbers is None else numbers[chosen])
            for name, chosen in splits.items()
        }


def _open(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of the file by name; that of a .npy is memory-mapped and called arr_0."""
    try:
        content = np.load(path, mmap_mode="c" if path.suffix == ".npy" else None, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"path={str(path)!r} does not exist: give a .npz or .npy file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if "pickle" in str(error):
            raise _objects(f"path={str(path)!r}") from error
        raise UserError(f"path={str(path)!r} is damaged or is not a .npz or .npy file ({error})") from error
    return {"arr_0": content} if isinstance(content, np.ndarray) else content


def _read(arrays: Mapping[str, np.ndarray], key: str, path: Path) -> np.ndarray:
    try:
        return arrays[key]
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        if "Object arrays" in str(error):
            raise _objects(f"{key} in {str(path)!r}") from error
        raise UserError(f"{key} in {str(path)!r} is damaged ({error}): write the file anew") from error


def _objects(where: str) -> UserError:
    return UserError(
        f"{where} holds Python objects, which are never loaded, since that can run any program: save an array of "
        "uint8 or float32 (examples of different shapes do not make one)"
    )


def _choose(arrays: Mapping[str, np.ndarray], given: str | None, usual: Sequence[str], option: str, path: Path) -> str:
    there = list(arrays)
    if given is not None:
        if given not in there:
            raise UserError(
                f"{option}={given!r} is not in {str(path)!r}, which has {', '.join(there)}{suggest(given, there)}"
            )
        return given
    found = next((name for name in usual if name in there), None)
    if found is None:
        raise UserError(f"{str(path)!r} has {', '.join(there) or 'no arrays'}: say with {option} which to use")
    return found


def _sibling(arrays: Mapping[str, np.ndarray], key: str | None) -> str | None:
    """The name of the test array that belongs to a train array."""
    name = key.removesuffix(TRAIN) + TEST if key is not None and key.endswith(TRAIN) else None
    return name if name in arrays else None


def _channels_first(array: np.ndarray, layout: str, where: str) -> np.ndarray:
    """(N, C, H, W), as a view."""
    if layout == "auto":
        layout = _guess_layout(array.shape, where)
    _check_layout(array, layout, PICTURES, where)
    if layout == "nhw":
        return array[:, None]
    return array if layout == "nchw" else array.transpose(0, 3, 1, 2)


def _as_sequences(array: np.ndarray, layout: str, where: str) -> np.ndarray:
    """(N, C, L), as a view; the array itself with layout `auto`."""
    if layout == "auto":
        return array
    _check_layout(array, layout, SEQUENCES, where)
    if layout == "nl":
        return array[:, None]
    return array if layout == "ncl" else array.transpose(0, 2, 1)


def _check_layout(array: np.ndarray, layout: str, known: Mapping[str, int], where: str) -> None:
    if layout not in known:
        kind, allowed = "sequences" if layout in SEQUENCES else "pictures", ", ".join(["auto", *known])
        raise UserError(f"layout={layout} is for {kind}, and {where} has dtype {array.dtype}: use one of {allowed}")
    if array.ndim != known[layout]:
        raise UserError(f"{where} has shape {array.shape}, and layout={layout} has {known[layout]} axes")


def _guess_layout(shape: tuple[int, ...], where: str) -> str:
    if len(shape) == 3:
        return "nhw"
    fits = [name for name, axis in (("nhwc", 3), ("nchw", 1)) if len(shape) == 4 and shape[axis] in (1, 3)]
    if len(fits) != 1:
        raise UserError(
            f"{where} has shape {shape}, which does not tell where the channels are: set layout to nhwc or nchw, or "
            "save vectors as float32"
        )
    return fits[0]


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.byteorder == ">" or not array.flags.writeable:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array)
