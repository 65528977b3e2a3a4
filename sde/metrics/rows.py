"""Vectors that are made of stored examples when they are asked for, some at a time: a million pictures stay bytes.

Whoever goes through them block by block (`sde.metrics.distances`) needs the memory of a block; a number of 8 bytes for
each row says which of the stored ones it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Rows:
    """Rows (n, D) of vectors, like a tensor that is indexed, but for that indexing makes none of them.

    Args:
        stored: the examples as they are stored, (N, ...).
        encode: makes vectors (k, D) of some of them (k, ...), each by itself.
        index: which of them the rows are, (n,); None for all in their order.
    """

    def __init__(self, stored: Tensor, encode: Callable[[Tensor], Tensor], index: Tensor | None = None) -> None:
        self.stored, self.encode = stored, encode
        self.index = torch.arange(len(stored)) if index is None else index
        none = encode(stored[:0])
        self.shape = torch.Size([len(self.index), none.shape[1]])
        self.dtype, self.device, self.ndim = none.dtype, none.device, 2

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        """Some rows, by a slice, by their numbers or by a mask."""
        return Rows(self.stored, self.encode, self.index[rows])

    def tensor(self) -> Tensor:
        """The vectors, all of them."""
        return self.encode(self.stored[self.index])

    def double(self) -> Tensor:
        """The vectors in float64."""
        return self.tensor().double()

    def blocks(self, size: int) -> Iterator[Tensor]:
        """The vectors, `size` of them at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size].tensor()
