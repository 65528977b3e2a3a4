"""Reading a pickle of arrays without running what is in it.

A pickle is a program: to load one is to call whatever functions it names. The Python archive of CIFAR holds
dictionaries of text, bytes, numbers, lists and one NumPy array, for which it names four functions. Here each of the
four is a stand-in of a few lines that checks what it is given; any other name is refused before anything is called,
and not even NumPy's own rebuilding of arrays sees unchecked values.
"""

from __future__ import annotations

import math
import pickle
from typing import IO, Any

import numpy as np

from sde.errors import UserError

FIX = "do not trust it, and fetch the published file"


def load_arrays(file: IO[bytes], name: str) -> Any:
    """The plain value in a pickle: dictionaries, lists, tuples, text, bytes, numbers and NumPy arrays of numbers.

    Text of Python 2 is decoded as Latin-1. Arrays are found as values of dictionaries and items of lists.

    Args:
        file: where to read.
        name: what to call it in messages.

    Raises:
        UserError: it is damaged, or names anything else.
    """
    try:
        return _unwrap(_Unpickler(file, encoding="latin1").load())
    except UserError as error:
        raise UserError(f"{name} {error}: {FIX}") from error
    except Exception as error:  # a damaged pickle can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is damaged or is not a pickle ({reason}): {FIX}") from error


class _Dtype:
    """Stands in for `numpy.dtype`; a pickle calls it with ("u1", False, True) and then sets its state."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or np.dtype(code).kind not in "biuf":
            raise UserError(f"holds an array of {code!r} instead of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, item size, alignment, flags)
        if not isinstance(state, tuple) or state[1] not in ("|", "<", ">", "=") or any(state[2:5]):
            raise UserError("holds an array of an unknown type")
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """Stands in for the empty array that a pickle makes first and fills by setting its state."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, column_major, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise UserError("holds an array of an unknown type")
        flat = np.frombuffer(content, dtype=dtype.dtype)
        if not isinstance(shape, tuple) or math.prod(shape) != len(flat):
            raise UserError(f"holds {len(flat)} numbers for an array of shape {shape!r}")
        self.value = flat.reshape(shape, order="F" if column_major else "C")


class _Ndarray:
    """Stands in for the name `numpy.ndarray`, which is given to `_Array` and not used."""


def _encode(text: Any, encoding: Any) -> bytes:
    """Stands in for `codecs.encode`: Python 3 writes bytes as Latin-1 text in older protocols."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UserError("holds text in an unknown encoding")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise UserError(f"asks to run {module}.{name}, which no data set needs")
        return _STAND_INS[module, name]


def _unwrap(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _unwrap(item) for key, item in value.items()}
    if isinstance(value, list):
        return [item if isinstance(item, int | str) else _unwrap(item) for item in value]
    return value
