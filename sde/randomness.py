r"""Where noise comes from.

Sample k of seed s is the same whatever the batch size, the number of processes or the order in which samples are
drawn: every sample owns a generator derived from (s, k). A solver asks for one normal tensor (B, *shape) at a time by
calling the noise object it was given, so noise can be fixed per sample, recorded, replayed and tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from sde.errors import UserError

Noise = Callable[[], Tensor]
"""What solvers draw from: each call gives fresh standard normals of the shape of the state, (B, *shape)."""

_MASK = 0xFFFFFFFF


def _mix32(value: int) -> int:
    """A bijection of 32-bit numbers that leaves no visible pattern (the finalizer of MurmurHash3)."""
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def sample_seed(seed: int, index: int) -> int:
    """The 64-bit seed of sample `index` of `seed`.

    PyTorch's CPU generator keeps only the low 32 bits of a seed. They are a bijection of the index, shifted by a
    hash of the seed, so no two of the first 2^32 samples of one seed ever share a generator; independent hashes would
    collide among 50,000 samples in one case of four.
    """
    if index < 0 or index > _MASK:
        raise UserError(f"sample index {index} is out of range: it must be between 0 and {_MASK}")
    high, low = np.random.SeedSequence([_check_seed(seed), 0x5DE]).generate_state(2, np.uint32).tolist()
    return (_mix32(high ^ (index & _MASK)) << 32) | _mix32((low + index) & _MASK)


def step_seed(seed: int, step: int, purpose: str) -> int:
    """A 64-bit seed for one training step's draws of one purpose, a function of (seed, step, purpose) alone."""
    words = [_check_seed(seed), step, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def _check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UserError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1")
    return seed


class SampleNoise:
    """Normals for samples `indices` of `seed`; row b of every draw depends on (seed, indices[b]) alone.

    Args:
        seed: the seed of the whole set of samples.
        indices: the number of each sample of the batch, (B,).
        shape: shape of one sample.
        dtype: type of the draws.
        device: where the generators live; the same seed gives the same samples on devices of one kind.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.generators = [torch.Generator(device).manual_seed(sample_seed(seed, k)) for k in indices]
        # Small samples are drawn many steps at once: a call per sample and step would cost more than the numbers. The
        # length of a block must depend on the shape alone, or the stream would depend on the batch.
        numel = max(int(np.prod(shape)), 1)
        block = min(max(2048 // numel, 1), 256)
        self._block = torch.empty((len(self.generators), block, *shape), dtype=dtype, device=device)
        self._next = block

    def __call__(self) -> Tensor:
        if self._next == self._block.shape[1]:
            block = torch.empty_like(self._block)  # earlier draws may still be in use
            for row, generator in zip(block, self.generators, strict=True):
                row.normal_(generator=generator)
            self._block, self._next = block, 0
        self._next += 1
        return self._block[:, self._next - 1]


class BatchNoise:
    """Normals for a whole batch from one generator: for when reproducing single samples does not matter.

    Args:
        like: a tensor of the shape (B, *shape), type and device that draws should have.
        generator: the source; None is PyTorch's global one.
    """

    def __init__(self, like: Tensor, generator: torch.Generator | None = None) -> None:
        self._like = like
        self._generator = generator

    def __call__(self) -> Tensor:
        return torch.empty_like(self._like).normal_(generator=self._generator)


class RecordedNoise:
    """Replays given draws in order; raises `UserError` when they run out.

    Args:
        draws: tensors (B, *shape).
    """

    def __init__(self, draws: Iterable[Tensor]) -> None:
        self._draws = iter(draws)
        self.used = 0

    def __call__(self) -> Tensor:
        draw = next(self._draws, None)
        if draw is None:
            raise UserError(f"the recorded noise has {self.used} draws and the solver asks for one more: record more")
        self.used += 1
        return draw
