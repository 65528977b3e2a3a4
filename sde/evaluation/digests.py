"""What a set of numbers was made from, as a hash: the bytes, types and shapes of tensors, in their order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_BLOCK = 1 << 24  # bytes at a time, so that a memory-mapped file is not read into memory


def digest_of(*parts: Any) -> str:
    """SHA-256, hexadecimal, of values that JSON can hold; the same on every platform."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, hexadecimal, of tensors by name: of names, types, shapes and all bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        _feed(found, _blocks(tensor))
    return found.hexdigest()


def digest_of_examples(values: Tensor, indices: Tensor | None = None) -> str:
    """SHA-256, hexadecimal, of the examples `values[indices]` in this order; of all without `indices`."""
    count = len(values) if indices is None else len(indices)
    found = hashlib.sha256(f"{values.dtype}:{(count, *values.shape[1:])};".encode())
    _feed(found, _blocks(values) if indices is None else _chosen(values, indices))
    return found.hexdigest()


def _rows(values: Tensor) -> int:
    """How many examples make a block."""
    size = max(1, values[0].numel() * values.element_size()) if len(values) else 1
    return max(1, _BLOCK // size)


def _blocks(values: Tensor) -> Iterable[Tensor]:
    return values.detach().split(_rows(values)) if values.ndim else (values.detach(),)


def _chosen(values: Tensor, indices: Tensor) -> Iterable[Tensor]:
    return (values[some] for some in indices.split(_rows(values)))


def _feed(found: hashlib._Hash, blocks: Iterable[Tensor]) -> None:
    for block in blocks:
        # bytes are read in place where the block is contiguous and on the CPU
        found.update(block.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
