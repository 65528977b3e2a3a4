"""The order in which training sees examples: endless, shuffled, and a function of (seed, step) alone.

Lay the shuffles of epoch 0, 1, 2, ... end to end; batch k is entries k B .. (k + 1) B - 1. Each epoch's shuffle
depends on (seed, epoch) only, so that a run which is interrupted, or continued on other hardware, sees what it would
have seen, and no state of an iterator has to be saved. Every example comes exactly once an epoch; a batch may
straddle two epochs, and may be larger than the data set.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sde.data.base import check_whole


class Order:
    """The batches of an endless sequence of shuffles.

    The shuffle of the current epoch is kept (8 bytes an example), so successive steps cost O(batch_size); a step
    elsewhere costs one shuffle.

    Args:
        n: number of examples, at least 1.
        batch_size: entries of a batch, at least 1; may exceed `n`.
        seed: any whole number from 0.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        check_whole("n", n, at_least=1)
        check_whole("batch_size", batch_size, at_least=1)
        check_whole("seed", seed, at_least=0)
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch = -1
        self._shuffle = np.empty(0, dtype=np.int64)

    def __call__(self, step: int) -> Tensor:
        """Indices of batch `step` (from 0): int64 of shape (batch_size,), in 0 .. n - 1."""
        check_whole("step", step, at_least=0)
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while position < end:
            epoch, start = divmod(position, self.n)
            stop = min(self.n, start + end - position)
            parts.append(self.shuffle(epoch)[start:stop])
            position += stop - start
        return torch.from_numpy(np.concatenate(parts))

    def epoch(self, step: int) -> float:
        """How many times the data has been seen before batch `step`."""
        return step * self.batch_size / self.n

    def shuffle(self, epoch: int) -> np.ndarray:
        """The order of one epoch: a permutation of 0 .. n - 1, int64."""
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._shuffle = generator.permutation(self.n)
            self._epoch = epoch
        return self._shuffle


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of batch `step`: int64 of shape (batch_size,). For many steps keep an `Order`, which is cheaper."""
    return Order(n, batch_size, seed)(step)
