r"""Maximum mean discrepancy: distances of means in the space of a kernel, and KID among them.

    MMD^2 = E k(X, X') + E k(Y, Y') - 2 E k(X, Y)

without the kernel of an example with itself is unbiased (Gretton et al., JMLR 2012): zero in the mean for two sets of
one law, whatever their size, and so at times negative. KID (arXiv 1801.01401) is that of features with the kernel
(<x, y> / D + 1)^3, averaged over random subsets.

Everything is made of sums of the kernel over pairs of groups of examples, tile by tile, so that leaving a group out
costs nothing more, and a subset is the same one with and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from sde.errors import UserError, check_number
from sde.metrics.base import Metric, Sets, check_sets, register
from sde.metrics.distances import TILE, shuffled

Kernel = Callable[[Tensor, Tensor], Tensor]  # of x (n, D) and y (m, D): (n, m)


def polynomial(x: Tensor, y: Tensor, degree: int, gamma: float, constant: float) -> Tensor:
    """(gamma <x, y> + constant)^degree, (n, m)."""
    return (x @ y.mT * gamma + constant).pow(degree)


def gaussian_mixture(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """The mean over bandwidths of exp(-|x - y|^2 / (2 bandwidth^2)), (n, m)."""
    squares = (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT).clamp(min=0)
    total = torch.zeros_like(squares)
    for bandwidth in bandwidths:
        total += (squares * (-0.5 / bandwidth**2)).exp()
    return total / len(bandwidths)


def unbiased_mmd(kernel: Kernel, x: list[Tensor], y: list[Tensor]) -> list[float]:
    """The unbiased estimate of MMD^2 between sets that are given as groups.

    Args:
        kernel: of two sets of vectors.
        x: groups of one set, each (n_g, D), float64.
        y: as many groups of the other.

    Returns:
        That of everything; where there are several groups, behind it those without each of them.
    """
    xx, yy = _sums(kernel, x), _sums(kernel, y)
    xy = torch.stack([torch.stack([_sum(kernel, a, b) for b in y]) for a in x])
    sizes = torch.tensor([[len(a), len(b)] for a, b in zip(x, y, strict=True)]).T
    found = []
    for left in range(-1, len(x) if len(x) > 1 else 0):
        kept = torch.arange(len(x)) != left
        n, m = sizes[:, kept].sum(1).tolist()
        within, between, across = (float(sums[kept][:, kept].sum()) for sums in (xx, yy, xy))
        found.append(within / (n * (n - 1)) + between / (m * (m - 1)) - 2 * across / (n * m))
    return found


def _sums(kernel: Kernel, x: list[Tensor]) -> Tensor:
    """Sums of the kernel over pairs of different examples of every two groups of one set, (G, G)."""
    sums = torch.zeros(len(x), len(x), dtype=torch.float64)
    for i, a in enumerate(x):
        sums[i, i] = _sum(kernel, a, a, same=True)
        for j, b in enumerate(x[:i]):
            sums[i, j] = sums[j, i] = _sum(kernel, a, b)
    return sums


def _sum(kernel: Kernel, x: Tensor, y: Tensor, same: bool = False) -> Tensor:
    """The sum of the kernel over all pairs, or over those of different rows of the `same` set."""
    total = torch.zeros((), dtype=torch.float64)
    for i, rows in enumerate(x.split(TILE)):
        for j, columns in enumerate(y.split(TILE)):
            if not same or j <= i:
                values = kernel(rows, columns)
                if same and i == j:
                    values.fill_diagonal_(0)
                total += values.sum().cpu() * (2 if same and j < i else 1)
    return total


def _grouped(x: Tensor, groups: int) -> list[Tensor]:
    """Every `groups`-th example, from each number on, in float64."""
    return [x[group::groups].double() for group in range(groups)]


def _check_left(name: str, groups: Iterable[list[Tensor]]) -> None:
    """Raise `UserError` unless two examples are left of each set whichever group goes."""
    for parts in groups:
        count = sum(len(part) for part in parts)
        if count - (max(len(part) for part in parts) if len(parts) > 1 else 0) < 2:
            raise UserError(
                f"{name}: {count} examples without one of {len(parts)} groups are fewer than two: take more examples, "
                "larger subsets or fewer groups"
            )


@register("kid")
@dataclass(frozen=True)
class KernelDistance(Metric):
    """Kernel Inception distance (arXiv 1801.01401): mean and standard deviation of unbiased MMD^2 of random subsets.

    The standard deviation is that of the subsets' values around their mean, as torch-fidelity reports it. It tells how
    far the value of one subset strays; the standard error of the mean comes from `errors`.

    Args:
        subsets: how many, each drawn without repetition from both sets. Where a subset is all there is, one is enough.
        subset_size: examples of each set in a subset; the size of the smaller set where that is less.
        degree: of the polynomial kernel.
        gamma: factor of the inner product in the kernel; one over the number of dimensions if None.
        constant: what the kernel adds to it.
    """

    better: ClassVar[dict[str, str | float]] = {"kid": "lower", "kid_std": ""}
    labels: ClassVar[dict[str, str]] = {"kid": "KID", "kid_std": "KID (std of subsets)"}

    subsets: int = 100
    subset_size: int = 1000
    degree: int = 3
    gamma: float | None = None
    constant: float = 1.0

    def __post_init__(self) -> None:
        check_number("subsets", self.subsets, at_least=1)
        check_number("subset_size", self.subset_size, at_least=2)
        check_number("degree", self.degree, at_least=1)
        if self.gamma is not None:
            check_number("gamma", self.gamma, above=0)
        check_number("constant", self.constant, at_least=0)

    def check_size(self, n: int, m: int, groups: int = 0, dimensions: int = 1, option: str = "n") -> None:
        super().check_size(n, m, groups, dimensions, option)
        size = min(self.subset_size, n, m)
        if groups == 0 or m == 0 or self._keeps_two(n, m, size, groups):
            return
        enough = next((k for k in (8, 16, 32) if k > size and self._keeps_two(max(n, k), max(m, k), k, groups)), 64)
        raise UserError(
            f"metric=kid takes subsets of {size} examples, of which fewer than two can be left with groups={groups}: "
            f"take kid.subset_size={enough}, and as many examples of each set at least"
        )

    def _keeps_two(self, n: int, m: int, size: int, groups: int) -> bool:
        """Whether all subsets of `size` examples keep two without any group; of 64 and more they do."""
        if size >= 64:
            return True
        parts = min(groups, n, m)
        for subset in range(1 if size == n == m else self.subsets):
            for side, count in enumerate((n, m)):
                chosen = shuffled(count, _seed(0, subset, side), size)
                if size - int(torch.bincount(chosen % parts).max()) < 2:
                    return False
        return True

    def __call__(self, sets: Sets) -> dict[str, float]:
        return self.both(sets, 0)[0]

    def both(self, sets: Sets, groups: int) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Values and deviations from the subsets, and from what is left of them without each group."""
        check_sets(sets, "kid", 2)
        x, y = sets.generated, sets.reference
        size = min(self.subset_size, len(x), len(y))
        kernel = partial(polynomial, degree=self.degree, gamma=self.gamma or 1 / x.shape[1], constant=self.constant)
        values = []
        for subset in range(1 if size == len(x) == len(y) else self.subsets):
            ours, theirs = (
                self._drawn(z, size, _seed(sets.seed, subset, side), groups) for side, z in enumerate((x, y))
            )
            _check_left("kid", (ours, theirs))
            values.append(unbiased_mmd(kernel, ours, theirs))
        columns = torch.tensor(values, dtype=torch.float64).unbind(1)
        found = [{"kid": float(v.mean()), "kid_std": float(v.std(correction=0))} for v in columns]
        return found[0], found[1:]

    @staticmethod
    def _drawn(x: Tensor, size: int, seed: int, groups: int) -> list[Tensor]:
        """Some examples in random order, by the groups that they are of in the whole set."""
        chosen, parts = shuffled(len(x), seed, size).to(x.device), max(groups, 1)
        return [x[chosen[chosen % parts == group]].double() for group in range(parts)]


def _seed(seed: int, subset: int, side: int) -> int:
    """A seed of its own for each draw."""
    return (seed * 1_000_003 + subset) * 2 + side


@register("mmd")
@dataclass(frozen=True)
class MeanDiscrepancy(Metric):
    """Unbiased MMD^2 (Gretton et al., JMLR 2012) of all examples with a mixture of Gaussian kernels.

    Args:
        bandwidth: standard deviation of the kernel, in units of the features; if None the median distance of pairs of
            reference examples, so that models held against the same data have the same kernel.
        scales: of the kernels of the mixture, multiples of the bandwidth.
        median_of: from how many reference examples, drawn at random, the median is taken.
    """

    better: ClassVar[dict[str, str | float]] = {"mmd": "lower"}
    labels: ClassVar[dict[str, str]] = {"mmd": "MMD (squared)"}

    bandwidth: float | None = None
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    median_of: int = 2000

    def __post_init__(self) -> None:
        if self.bandwidth is not None:
            check_number("bandwidth", self.bandwidth, above=0)
        if not self.scales:
            raise UserError("scales=() names no kernel: give at least one, such as scales=[1.0]")
        for scale in self.scales:
            check_number("scales", scale, above=0)
        check_number("median_of", self.median_of, at_least=2)

    def __call__(self, sets: Sets) -> dict[str, float]:
        return self.both(sets, 0)[0]

    def both(self, sets: Sets, groups: int) -> tuple[dict[str, float], list[dict[str, float]]]:
        """MMD^2, and that without each group; the kernel is that of all examples."""
        check_sets(sets, "mmd", 2)
        bandwidth = self.bandwidth or self._median(sets)
        kernel = partial(gaussian_mixture, bandwidths=[bandwidth * scale for scale in self.scales])
        # distances are the differences of large numbers where the mean is not taken away
        center = sets.reference.mean(0, dtype=torch.float64)
        x, y = (_grouped(z - center, max(groups, 1)) for z in (sets.generated, sets.reference))
        _check_left("mmd", (x, y))
        found = [{"mmd": value} for value in unbiased_mmd(kernel, x, y)]
        return found[0], found[1:]

    def _median(self, sets: Sets) -> float:
        order = shuffled(len(sets.reference), sets.seed, self.median_of)
        x = sets.reference[order.to(sets.reference.device)].double()
        median = float(torch.nn.functional.pdist(x).median())
        if median == 0:
            raise UserError("mmd: most reference examples are the same, and the median distance is 0: give a bandwidth")
        return median
