r"""Where noise comes from.

Sample k of seed s is the same whatever the batch size, the number of processes or the order in which samples are
drawn. A solver asks for one normal tensor (B, *shape) at a time by calling the noise object it was given, so noise can
be fixed per sample, recorded, replayed and tested.

Consecutive samples share a generator, because one call per sample would cost more than a small sample's numbers: group
g holds the samples from g r to (g + 1) r - 1 and owns a generator derived from (s, g). Each draw fills whole groups,
one call each, and keeps the rows asked for, so that what a sample gets depends on its number alone. r is the largest
power of two for which a group has at most 4096 numbers on a CPU, but at least 1 (a picture of 3 x 32 x 32 has a
generator of its own): a call costs there as much as some 300 numbers. On other devices, where a call launches a
kernel, it is 2^17 numbers. A function of the shape and the kind of device alone, or the stream would depend on the
batch; a power of two, because batches often are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sde.errors import UserError

MASK = 0xFFFFFFFF


class Noise(Protocol):
    """What solvers draw from: each call gives standard normals of the shape of the state, (B, *shape)."""

    def __call__(self, t: float | None = None, s: float | None = None) -> Tensor:
        """A draw that drives the state from time `t` to `s` < `t`, or, without an interval, one of no time.

        Sources of independent draws ignore the interval; `sde.brownian.BrownianNoise` gives the increment of a path.
        """


def mix32(value: int) -> int:
    """A bijection of 32-bit numbers that leaves no visible pattern (the finalizer of MurmurHash3)."""
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & MASK
    return value ^ (value >> 16)


def sample_seed(seed: int, index: int) -> int:
    """The 64-bit seed of generator number `index` of `seed`.

    PyTorch's CPU generator keeps only the low 32 bits of a seed. They are a bijection of the index, shifted by a
    hash of the seed, so no two of the first 2^32 generators of one seed ever coincide; independent hashes would
    collide among 50,000 in one case of four.
    """
    return _sample_seeds(seed, [index])[0]


def _sample_seeds(seed: int, indices: Iterable[int]) -> list[int]:
    high, low = seed_words(seed, 0x5DE, 2)
    return [(mix32(high ^ _check_index(k)) << 32) | mix32((low + k) & MASK) for k in indices]


def seed_words(seed: int, purpose: int, count: int) -> list[int]:
    """`count` 32-bit numbers without a pattern, a function of (seed, purpose) alone."""
    return np.random.SeedSequence([_check_seed(seed), purpose]).generate_state(count, np.uint32).tolist()


def step_seed(seed: int, step: int, purpose: str) -> int:
    """A 64-bit seed for one training step's draws of one purpose, a function of (seed, step, purpose) alone."""
    words = [_check_seed(seed), step, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def seed_global(seed: int, device: torch.device) -> None:
    """Seed the generators that dropout draws from, of the CPU and of `device`.

    As `torch.manual_seed`, which also leaves a note for each kind of device that may be used later, with a trace of the
    stack: half a millisecond and some memory in every step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UserError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1")
    return seed


def _check_index(index: int) -> int:
    if not 0 <= index <= MASK:
        raise UserError(f"sample index {index} is out of range: it must be between 0 and {MASK}")
    return index


class Groups:
    """The groups in which samples `indices` lie, and room for one draw of them.

    Attributes:
        numbers: the number of every group that is needed, (G,), increasing.
        parts: the room of each group, to be filled whole and in one call, (G,) tensors (rows, *shape).
        samples: gives the samples' part of the room, (B, *shape), valid until the next draw.
        copy: gives the same in memory of its own.

    Args:
        indices: the number of each sample of the batch, (B,).
        shape: shape of one sample.
        dtype: type of the draws.
        device: where they are made.

    Raises:
        UserError: for an index out of range.
    """

    samples: Callable[[], Tensor]
    copy: Callable[[], Tensor]

    def __init__(
        self, indices: Sequence[int], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        rows = _rows_of_group(math.prod(shape), torch.device(device).type)
        batch = _as_numbers(indices)
        if isinstance(batch, range):
            self.numbers = list(range(batch.start // rows, -(-batch.stop // rows)))
        else:
            numbers, group = np.unique(batch // rows, return_inverse=True)
            self.numbers = numbers.tolist()
        room = torch.empty((len(self.numbers), rows, *shape), dtype=dtype, device=device)
        self.parts = room.unbind()
        room = room.flatten(0, 1)
        if isinstance(batch, range):
            view = room[batch.start % rows :][: len(batch)]
            self.samples, self.copy = lambda: view, view.clone
        else:
            place = torch.from_numpy(group * rows + batch % rows).to(device)
            self.samples = self.copy = partial(room.index_select, 0, place)


def _rows_of_group(numel: int, device_type: str) -> int:
    """How many samples of `numel` numbers share a generator: must not depend on the batch."""
    at_most = 4096 if device_type == "cpu" else 2**17
    return 1 << (max(at_most // max(numel, 1), 1).bit_length() - 1)


def _as_numbers(indices: Sequence[int]) -> range | np.ndarray:
    """Sample numbers (B,), checked: as a range where they are consecutive, the usual case."""
    if len(indices) == 0:
        return range(0)
    if isinstance(indices, range) and indices.step == 1:
        _check_index(indices[0])
        _check_index(indices[-1])
        return indices
    numbers = np.asarray(indices)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise UserError(f"sample indices {indices!r} must be whole numbers, one for each sample")
    for end in (numbers.min(), numbers.max()):
        _check_index(int(end))
    first, consecutive = int(numbers[0]), bool((np.diff(numbers) == 1).all())
    return range(first, first + len(numbers)) if consecutive else numbers.astype(np.int64)


class SampleNoise:
    """Normals for samples `indices` of `seed`; row b of every draw depends on (seed, indices[b]) alone.

    Neighboring samples are drawn together, so a batch of consecutive ones costs least.

    Args:
        seed: the seed of the whole set of samples.
        indices: the number of each sample of the batch, (B,).
        shape: shape of one sample.
        dtype: type of the draws.
        device: where the generators live; the same seed gives the same samples on devices of one kind.

    Raises:
        UserError: for a seed or an index out of range.
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
        groups = Groups(indices, shape, dtype, device)
        seeds = _sample_seeds(seed, groups.numbers)
        generators = [torch.Generator(device).manual_seed(value) for value in seeds]
        self._fill = [partial(part.normal_, generator=g) for part, g in zip(groups.parts, generators, strict=True)]
        self._samples, self._copy = groups.samples, groups.copy

    def __call__(self, t: float | None = None, s: float | None = None) -> Tensor:
        for fill in self._fill:
            fill()
        return self._copy()  # a solver may hold a draw while the next is made

    def lend(self, t: float | None = None, s: float | None = None) -> Tensor:
        """The same draw in memory that the next one overwrites: for what is used at once."""
        for fill in self._fill:
            fill()
        return self._samples()


class BatchNoise:
    """Normals for a whole batch from one generator: for when reproducing single samples does not matter.

    Args:
        like: a tensor of the shape (B, *shape), type and device that draws should have.
        generator: the source; None is PyTorch's global one.
    """

    def __init__(self, like: Tensor, generator: torch.Generator | None = None) -> None:
        self._like = like
        self._generator = generator

    def __call__(self, t: float | None = None, s: float | None = None) -> Tensor:
        return torch.empty_like(self._like).normal_(generator=self._generator)


class RecordedNoise:
    """Replays given draws in order; raises `UserError` when they run out.

    Args:
        draws: tensors (B, *shape).
    """

    def __init__(self, draws: Iterable[Tensor]) -> None:
        self._draws = iter(draws)
        self.used = 0

    def __call__(self, t: float | None = None, s: float | None = None) -> Tensor:
        draw = next(self._draws, None)
        if draw is None:
            raise UserError(f"the recorded noise has {self.used} draws and the solver asks for one more: record more")
        self.used += 1
        return draw
