r"""One Brownian path per sample: more steps refine the same picture.

Independent draws change the sample with every change of the grid. Here each sample of a seed owns a path B in the
clock c = half log-SNR, log(alpha / sigma), in which the reverse SDE of every linear process is driven alike, and a step
from t to s gets the path's normalized increment

    z = (B(c(t)) - B(c(s))) / sqrt(|c(t) - c(s)|):

standard normal, independent on intervals that do not overlap, and a sum of those of the parts on an interval that is
cut. So Euler-Maruyama and its relatives converge to one path's solution in the size of the step (strong convergence).

The path is Lévy's construction on [-reach, reach] (P. Lévy, Processus stochastiques et mouvement brownien, 1948;
random access to it as in arXiv 2001.01328): B(-reach) = 0, B(reach) is one draw, and inside a cell whose
ends l and r are known, B is normal with

    mean ((r - c) B(l) + (c - l) B(r)) / (r - l),    variance (c - l) (r - c) / (r - l).

Cells are halved 16 times, then the point itself is drawn inside its cell. Every point has a generator seeded by (seed,
group of samples, point), so that B at a point is a function of the sample and the point alone, whatever was asked
before and however samples are split into batches. Cells on the way to the last point are kept: a march along a grid
draws few of them again.

The joint law is exact for points in different cells of length reach / 2^15, which is 5e-4 where the half log-SNR
stays within 16: a change of the noise level by 0.05 %, where published samplers take at most a few thousand steps of
0.2 % or more over a range of about ten. Two points inside one cell would be too independent of each other, so an
interval shorter than a cell is refused. The clock is rounded to reach / 2^30, lest a rounding error of a time make
another point of it: the variance of z is right to 3e-5 for a step of one cell and to 1.5e-6 for one of 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sde.errors import UserError, check_number
from sde.randomness import MASK, Groups, SampleNoise, mix32, seed_words

_END = 1 << 31  # points are whole numbers from 0 at -reach to 2^31 at reach, and fit 32 bits of a seed
_CELL = 1 << 15  # length of the smallest cells


@dataclass
class _Cell:
    """An interval of points whose ends are known: B(low) and B(high), and B in the middle once it was asked for."""

    low: int
    high: int
    at_low: Tensor
    at_high: Tensor
    at_middle: Tensor | None = None


class BrownianNoise:
    """Increments of one Brownian path for each of the samples `indices` of `seed`.

    Called as `noise(t, s)` it gives the normalized increment over the interval, (B, *shape). Called as `noise()`, for
    draws that belong to no interval (the prior, Langevin steps), it gives `SampleNoise`'s draws in order, which are
    independent of the path. Intervals that overlap give dependent draws, as they must.

    It keeps up to 18 tensors of the batch's size. A step of a march along n equal steps over a range r of the clock
    costs about 17 - log2(n reach / r) plain draws.

    Args:
        seed: the seed of the whole set of samples.
        indices: the number of each sample of the batch, (B,).
        shape: shape of one sample.
        clock: time -> c, strictly monotone; for an SDE half its log-SNR: `lambda t: 0.5 * float(sde.log_snr(t))`.
        reach: the clock stays within [-reach, reach]; another reach is another path.
        dtype: type of the draws.
        device: where the generators live; the same seed gives the same paths on devices of one kind.

    Raises:
        UserError: for a seed, an index or a reach out of range, and from a call for times at which the clock is beyond
            `reach`, or so close together that it moves by less than the smallest cell.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: tuple[int, ...],
        clock: Callable[[float], float],
        *,
        reach: float = 16.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_number("reach", reach, above=0)
        self.clock, self.reach = clock, float(reach)
        self._plain = SampleNoise(seed, indices, shape, dtype=dtype, device=device)
        self._groups = Groups(indices, shape, dtype, device)
        self._generator = torch.Generator(device)
        # The low 32 bits of a seed, all that PyTorch's CPU generator keeps, are a bijection of the point within a
        # group and of the group at a point: no two draws of one sample coincide, nor two samples' draws of one point.
        self._point_word, group_word, self._high_word = seed_words(seed, 0xB20, 3)
        self._group_words = [mix32((group_word + g) & MASK) for g in self._groups.numbers]
        self._path: list[_Cell] = []
        self._last: tuple[int, Tensor] | None = None

    def __call__(self, t: float | None = None, s: float | None = None) -> Tensor:
        if t is None and s is None:
            return self._plain()
        if t is None or s is None:
            raise UserError(f"noise(t={t}, s={s}) names half an interval: give both times or neither")
        c_t, c_s = self.clock(t), self.clock(s)
        point_t, point_s = self._point(c_t, t), self._point(c_s, s)
        if abs(point_t - point_s) < _CELL:
            raise UserError(
                f"the step from t={t:g} to s={s:g} is too short for a Brownian path: the clock moves by "
                f"{abs(c_t - c_s):.2g}, less than its smallest cell of {self.reach / 2**15:.2g}; take fewer steps, "
                "or independent draws (noise=independent, SampleNoise)"
            )
        at_t = self._value(point_t)
        at_s = self._value(point_s)
        self._last = point_s, at_s
        return (at_t - at_s).mul_(abs(c_t - c_s) ** -0.5)

    def _point(self, c: float, t: float) -> int:
        """The number of the point at which the clock is `c`."""
        if not abs(c) <= self.reach:
            raise UserError(
                f"a Brownian path has no value at time {t:g}: the clock is {c:g}, beyond reach={self.reach:g}; end the "
                "time grid earlier or raise reach"
            )
        return round((c / self.reach + 1) * (_END // 2))

    def _value(self, point: int) -> Tensor:
        """B at `point`, (B, *shape): not to be written to."""
        if self._last is not None and self._last[0] == point:
            return self._last[1]
        cell = self._cell(point)
        while cell.high - cell.low > _CELL and point not in (cell.low, cell.high):
            middle = (cell.low + cell.high) // 2
            at_middle = cell.at_middle if cell.at_middle is not None else self._bridge(cell, middle)
            cell.at_middle = at_middle
            if point <= middle:
                cell = _Cell(cell.low, middle, cell.at_low, at_middle)
            else:
                cell = _Cell(middle, cell.high, at_middle, cell.at_high)
            self._path.append(cell)
        if point == cell.low:
            return cell.at_low
        return cell.at_high if point == cell.high else self._bridge(cell, point)

    def _cell(self, point: int) -> _Cell:
        """The smallest cell kept that holds `point`; smaller ones are let go."""
        while self._path and not self._path[-1].low <= point <= self._path[-1].high:
            self._path.pop()
        if not self._path:
            end = self._draw(_END) * math.sqrt(2 * self.reach)
            self._path.append(_Cell(0, _END, torch.zeros_like(end), end))
        return self._path[-1]

    def _bridge(self, cell: _Cell, point: int) -> Tensor:
        """B at `point`, given its values at the ends of `cell`."""
        share = (point - cell.low) / (cell.high - cell.low)
        length = (cell.high - cell.low) * (2 * self.reach / _END)
        deviation = math.sqrt(share * (1 - share) * length)
        return torch.lerp(cell.at_low, cell.at_high, share).add_(self._draw(point), alpha=deviation)

    def _draw(self, point: int) -> Tensor:
        """The standard normals of `point`, (B, *shape): valid until the next draw."""
        word, high = mix32((self._point_word + point) & MASK), (self._high_word + point) & MASK
        for part, group_word in zip(self._groups.parts, self._group_words, strict=True):
            part.normal_(generator=self._generator.manual_seed((high << 32) | mix32(group_word ^ word)))
        return self._groups.samples()
