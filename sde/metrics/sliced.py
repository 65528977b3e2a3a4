r"""Distances of two sets of examples by their projections on lines: sliced Wasserstein, and the energy distance.

With F and G the distribution functions of the projections on a direction w, the mean being over all directions,

    sliced Wasserstein     SW_p^p = mean over w of  int_0^1 |F^-1(u) - G^-1(u)|^p du           (Bonneel et al., 2015)
    energy distance        D^2 = 2 E|X - Y| - E|X - X'| - E|Y - Y'|
                               = mean over w of  2 int (F - G)^2 dz  /  kappa_d             (Székely and Rizzo, 2013)

where kappa_d = E|w_1| is the mean length of the projection of a unit vector of d dimensions, 2 / pi in the plane and
about sqrt(2 / (pi d)) in many dimensions. Sliced Wasserstein distances are not divided by it, as in the literature:
sets that lie v apart are kappa_d |v| apart for p = 1 and |v| / sqrt(d) for p = 2.

In the plane the directions divide the half circle evenly, and 32 of them give the mean to 1e-3. In more dimensions they
are random; the relative error that they leave falls with the root of their number and is not in the standard errors.
Two sets of one law are not at distance zero either: SW_1 is then of order n^-1/2, whatever the dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from sde.errors import check_flag, check_number
from sde.metrics.base import Metric, Sets, check_sets, register
from sde.metrics.distances import TILE, distance_sum

BLOCK = 1 << 22  # projections in memory at a time

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
Values = TypeVar("Values", float, np.ndarray)


def directions(d: int, count: int, seed: int = 0) -> Tensor:
    """Unit vectors (count, d), float64: evenly spread in the plane, otherwise random; one on the line."""
    if d == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if d == 2:
        angle = math.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return torch.stack([angle.cos(), angle.sin()], dim=1)
    normal = torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normal / normal.norm(dim=1, keepdim=True)


def kappa(d: int) -> float:
    """E|w_1| for w uniform on the unit sphere of d dimensions: 1, 2 / pi, 1 / 2, ..."""
    return math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)


def wasserstein_on_lines(a: np.ndarray, b: np.ndarray, p: int = 1) -> np.ndarray:
    """W_p^p of each row of sorted values `a` (rows, n) and `b` (rows, m), (rows,) in float64.

    Both quantile functions are steps, at multiples of 1/n and of 1/m: the integral is a sum over the steps of both,
    whose lengths are whole numbers of 1/(n m).
    """
    n, m = a.shape[1], b.shape[1]
    if n == m:
        return (np.abs(a - b) ** p).mean(axis=1, dtype=np.float64)
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    lengths = np.diff(ends, prepend=0) / (n * m)
    return np.abs(a[:, (ends - 1) // m] - b[:, (ends - 1) // n]) ** p @ lengths


def pair_sum(z: np.ndarray) -> np.ndarray:
    """The sum of |z_i - z_j| over all pairs i < j of each row of sorted values."""
    n = z.shape[1]
    return z @ (2.0 * np.arange(n) - n + 1)  # float64, by the type of the factors


def energy_on_lines(a: np.ndarray, b: np.ndarray, unbiased: bool = False) -> np.ndarray:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of each row of sorted values `a` (rows, n) and `b` (rows, m), (rows,)."""
    within = pair_sum(a), pair_sum(b)
    both = np.sort(np.concatenate([a, b], axis=1), axis=1, kind="stable")  # two sorted runs are merged
    across = pair_sum(both) - within[0] - within[1]
    return _energy(across, 2 * within[0], 2 * within[1], a.shape[1], b.shape[1], unbiased)


def _energy(across: Values, within_x: Values, within_y: Values, n: int, m: int, unbiased: bool) -> Values:
    """The square of the energy distance from sums of distances over ordered pairs."""
    return 2 * across / (n * m) - within_x / (n * (n - unbiased)) - within_y / (m * (m - unbiased))


def sliced_mean(sets: Sets, statistic: Statistic, count: int, groups: int = 0) -> list[float]:
    """The mean over directions of a statistic of sorted projections.

    Args:
        sets: generated (n, D) and reference (m, D).
        statistic: of sorted rows (rows, n) and (rows, m), (rows,).
        count: directions.
        groups: of examples.

    Returns:
        The mean from all examples, and behind it those without each of the groups.
    """
    w = directions(sets.generated.shape[1], count, sets.seed)
    totals = [0.0] * (1 + groups)
    for part in w.split(max(1, BLOCK // (len(sets.generated) + len(sets.reference)))):
        projected = [_project(x, part) for x in (sets.generated, sets.reference)]
        if groups == 0:
            totals[0] += float(statistic(*(np.sort(values, axis=1) for values in projected)).sum())
            continue
        order = [np.argsort(values, axis=1) for values in projected]
        rows = [np.take_along_axis(values, number, axis=1) for values, number in zip(projected, order, strict=True)]
        totals[0] += float(statistic(*rows).sum())
        for group in range(groups):
            # every row loses as many
            kept = [z[number % groups != group].reshape(len(z), -1) for z, number in zip(rows, order, strict=True)]
            totals[1 + group] += float(statistic(*kept).sum())
    return [total / len(w) for total in totals]


def _project(x: Tensor, w: Tensor) -> np.ndarray:
    """Projections of x (n, D) on w (rows, D), in float64, (rows, n)."""
    return torch.cat([w @ part.cpu().double().T for part in x.split(TILE)], dim=1).numpy()


@register("swd")
@dataclass(frozen=True)
class SlicedWasserstein(Metric):
    """The sliced Wasserstein distance SW_p in the units of the examples.

    Bonneel, Rabin, Peyré and Pfister, Sliced and Radon Wasserstein barycenters of measures, 2015.

    Sets may differ in size: the quantile functions of their projections are integrated exactly.

    Args:
        p: 1 for the mean of |F^-1 - G^-1|, 2 for the root of the mean square.
        directions: lines that the examples are projected on.

    Raises:
        UserError: an option is out of range.
    """

    better: ClassVar[dict[str, str | float]] = {"swd": "lower"}
    labels: ClassVar[dict[str, str]] = {"swd": "SWD"}
    of: ClassVar[str] = "examples"

    p: int = 1
    directions: int = 256

    def __post_init__(self) -> None:
        check_number("p", self.p, at_least=1, at_most=2)
        check_number("directions", self.directions, at_least=1)

    def __call__(self, sets: Sets) -> dict[str, float]:
        return self.both(sets, 0)[0]

    def both(self, sets: Sets, groups: int) -> tuple[dict[str, float], list[dict[str, float]]]:
        check_sets(sets, "swd", 2)
        means = sliced_mean(sets, lambda a, b: wasserstein_on_lines(a, b, self.p), self.directions, groups)
        found = [{"swd": value ** (1 / self.p)} for value in means]
        return found[0], found[1:]


@register("energy")
@dataclass(frozen=True)
class EnergyDistance(Metric):
    """The square D^2 of the energy distance (Székely and Rizzo, Energy statistics, 2013), in the examples' units.

    Libraries that give the energy distance itself, as SciPy does, give its root. The unbiased estimate of D^2 is zero
    in the mean for two sets of one law, and so at times negative, which is why no root is taken.

    Args:
        unbiased: leave the distance of an example to itself out of the means (a U-statistic); otherwise D^2 is that of
            the sets as they are, never negative, and sets of one law are about 2 E|X - X'| / n apart.
        exact: up to how many examples in the larger set all distances are computed; larger sets are projected.
        directions: lines that larger sets are projected on.

    Raises:
        UserError: an option is out of range.
    """

    better: ClassVar[dict[str, str | float]] = {"energy": "lower"}
    labels: ClassVar[dict[str, str]] = {"energy": "energy distance^2"}
    of: ClassVar[str] = "examples"

    unbiased: bool = True
    exact: int = 5000
    directions: int = 256

    def __post_init__(self) -> None:
        check_flag("unbiased", self.unbiased)
        check_number("exact", self.exact, at_least=0)
        check_number("directions", self.directions, at_least=1)

    def __call__(self, sets: Sets) -> dict[str, float]:
        return self.both(sets, 0)[0]

    def both(self, sets: Sets, groups: int) -> tuple[dict[str, float], list[dict[str, float]]]:
        check_sets(sets, "energy", 2)
        if max(len(sets.generated), len(sets.reference)) <= self.exact:
            found = self._exact(sets, groups)
        else:
            lines = sliced_mean(sets, lambda a, b: energy_on_lines(a, b, self.unbiased), self.directions, groups)
            found = [value / kappa(sets.generated.shape[1]) for value in lines]
        numbers = [{"energy": value} for value in found]
        return numbers[0], numbers[1:]

    def _exact(self, sets: Sets, groups: int) -> list[float]:
        """From all distances, summed over pairs of groups once for all that are left out; first with none left out."""
        x, y = sets.generated, sets.reference
        parts = max(groups, 1)
        sums = [_group_sums(x, y, parts), _group_sums(x, x, parts), _group_sums(y, y, parts)]
        sizes = [np.bincount(np.arange(len(z)) % parts, minlength=parts) for z in (x, y)]
        found = []
        for group in range(-1, groups):
            kept = [k for k in range(parts) if k != group]
            n, m = (int(size[kept].sum()) for size in sizes)
            across, within_x, within_y = (float(s[np.ix_(kept, kept)].sum()) for s in sums)
            found.append(_energy(across, within_x, within_y, n, m, self.unbiased))
        return found


def _group_sums(x: Tensor, y: Tensor, groups: int) -> np.ndarray:
    """Sums of distances between every group of x and every group of y, (groups, groups)."""
    sums = np.zeros((groups, groups))
    for g in range(groups):
        for h in range(groups):
            # those within a set are alike on both sides
            mirrored = x is y and h < g
            sums[g, h] = sums[h, g] if mirrored else distance_sum(x[g::groups], y[h::groups], same=x is y and g == h)
    return sums
