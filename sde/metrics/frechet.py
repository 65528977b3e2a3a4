r"""Fréchet distance: how far apart two sets of vectors are, each taken for a Gaussian.

    FD = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2}),

the squared 2-Wasserstein distance of N(mu_a, S_a) and N(mu_b, S_b). With features of the Inception network it is FID
(arXiv 1706.08500). For any roots R_a, R_b with R^T R = S the last trace is the sum of the singular values of
R_a R_b^T: symmetric roots need not be found, nothing is complex, and S may be singular. Of fewer examples than
dimensions the root is the examples themselves, centered; of more it is a Cholesky factor.

FD of finite sets is too large by about c_a / n_a + c_b / n_b. With `extrapolate` it is computed for halves and quarters
of the sets as well, and a line in 1 / n through them gives FD of infinitely many (after arXiv 1911.07023, where
the parts are random subsets of the generated examples alone).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sde.errors import UserError, check_flag, check_number
from sde.metrics.base import Metric, Sets, check_sets, fewest, register
from sde.metrics.distances import shuffled

_CHUNK = 8192  # examples that are turned into float64 at a time


@dataclass
class Moments:
    """Number, mean and scatter of vectors, in float64; put together from batches in any order.

    Args:
        n: how many vectors.
        mean: of them, (D,).
        scatter: sum of (x - mean)(x - mean)^T, (D, D). Sums of x x^T would lose the digits that the mean takes.
    """

    n: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, dimensions: int, device: torch.device | str = "cpu") -> Moments:
        """Those of no vectors."""
        scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)
        return cls(0, scatter.new_zeros(dimensions), scatter)

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Those of the vectors x, (n, D), on their device."""
        moments = cls.empty(x.shape[1], x.device)
        for batch in x.split(_CHUNK):
            moments.update(batch)
        return moments

    @classmethod
    def from_covariance(cls, n: int, mean: Tensor, covariance: Tensor, unbiased: bool = True) -> Moments:
        """Those whose mean and covariance somebody has published; `unbiased` as in `covariance`."""
        return cls(n, mean.double(), covariance.double() * (n - 1 if unbiased else n))

    def update(self, batch: Tensor) -> None:
        """Take in a batch of vectors, (B, D)."""
        x = batch.to(self.mean)
        mean = x.mean(0) if len(x) else self.mean
        centered = x - mean
        self.merge(Moments(len(x), mean, centered.mT @ centered))

    def merge(self, other: Moments) -> None:
        """Take in the vectors of other moments."""
        n = self.n + other.n
        if n == 0:
            return
        shift = other.mean.to(self.mean) - self.mean
        self.scatter += other.scatter.to(self.scatter) + torch.outer(shift, shift) * (self.n * other.n / n)
        self.mean = self.mean + shift * (other.n / n)
        self.n = n

    def without(self, part: Moments) -> Moments:
        """The moments of the vectors that are not in `part`, some of these."""
        n = self.n - part.n
        mean = self.mean + (self.mean - part.mean) * (part.n / n)
        shift = mean - part.mean
        scatter = self.scatter - part.scatter - torch.outer(shift, shift) * (n * part.n / self.n)
        return Moments(n, mean, scatter)

    def covariance(self, unbiased: bool = True) -> Tensor:
        """(D, D): the scatter over n - 1, or over n."""
        return self.scatter / (self.n - 1 if unbiased else self.n)


class Gaussian(NamedTuple):
    """A mean, (D,), and a root R of the covariance R^T R, (r, D)."""

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, x: Tensor, unbiased: bool) -> Gaussian:
        """That of vectors; of few the root is exact."""
        if len(x) > x.shape[1]:
            return cls.of_moments(Moments.of(x), unbiased)
        mean = x.double().mean(0)
        return cls(mean, (x - mean) / (len(x) - unbiased) ** 0.5)

    @classmethod
    def of_moments(cls, moments: Moments, unbiased: bool) -> Gaussian:
        """That of moments."""
        return cls(moments.mean, _root(moments.covariance(unbiased)))

    def distance(self, other: Gaussian) -> float:
        """The Fréchet distance to another; it is accurate to rounding of the traces."""
        traces = self.root.square().sum() + other.root.square().sum()
        fidelity = torch.linalg.svdvals(self.root @ other.root.mT).sum()
        return max(0.0, float((self.mean - other.mean).square().sum() + traces - 2 * fidelity))


def _root(covariance: Tensor) -> Tensor:
    """R, (r, D), with R^T R = covariance and r its rank as far as float64 can tell.

    The covariance is scaled to a diagonal of ones first, so that a coordinate counts whatever its unit is.
    """
    scale = covariance.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    correlation = covariance * inverse * inverse[:, None]
    rounding = len(scale) * torch.finfo(torch.float64).eps
    factor, failed = torch.linalg.cholesky_ex(correlation)
    if not bool(failed) and float(factor.diagonal().square().min()) > rounding:
        return factor.mT * scale
    # singular: what lies below rounding is noise, and its square root would be seen
    values, vectors = torch.linalg.eigh(correlation)
    kept = values > rounding * values[-1]
    return values[kept].sqrt()[:, None] * vectors[:, kept].mT * scale


def frechet_distance(a: Moments, b: Moments, unbiased: bool = True) -> float:
    """The Fréchet distance of Gaussians with these moments, in squared units of the features.

    Args:
        a: of one set.
        b: of the other.
        unbiased: covariances are scatters over n - 1, as np.cov and pytorch-fid have them; otherwise over n.

    Raises:
        UserError: when one has fewer than two examples, or their dimensions differ.
    """
    if min(a.n, b.n) < 2 or len(a.mean) != len(b.mean):
        raise UserError(
            f"fd cannot compare {a.n} vectors of {len(a.mean)} with {b.n} of {len(b.mean)} dimensions: it needs two of "
            "each at least, from the same extractor"
        )
    return Gaussian.of_moments(a, unbiased).distance(Gaussian.of_moments(b, unbiased))


@register("fd")
@dataclass(frozen=True)
class FrechetDistance(Metric):
    """Fréchet distance of the features' Gaussians (arXiv 1706.08500), and extrapolated to infinitely many examples.

    Args:
        unbiased: covariances over n - 1, as np.cov and pytorch-fid have them; otherwise over n.
        extrapolate: also give `fd_infinity`, the intercept of a line in 1 / n through FD of all examples and the mean
            FD of their halves, quarters, ... in random order. Costs a decomposition for each of the parts.
        levels: how many numbers of examples the line goes through: 3 are all, halves and quarters. Parts with fewer
            than twice as many examples as dimensions are left out, as FD is no line there.
        whole_reference: do not divide the reference; its own bias stays then, as in arXiv 1911.07023.
    """

    better: ClassVar[dict[str, str | float]] = {"fd": "lower", "fd_infinity": "lower"}
    labels: ClassVar[dict[str, str]] = {"fd": "FD", "fd_infinity": "FD infinity"}

    unbiased: bool = True
    extrapolate: bool = False
    levels: int = 3
    whole_reference: bool = False

    def __post_init__(self) -> None:
        check_flag("unbiased", self.unbiased)
        check_flag("extrapolate", self.extrapolate)
        check_number("levels", self.levels, at_least=2, at_most=8)
        check_flag("whole_reference", self.whole_reference)

    def __call__(self, sets: Sets) -> dict[str, float]:
        check_sets(sets, "fd", 2)
        if not self.extrapolate:
            ours, theirs = (Gaussian.of(x, self.unbiased) for x in (sets.generated, sets.reference))
            return {"fd": ours.distance(theirs)}
        generated, reference = ([Moments.of(x[part]) for part in parts] for x, parts in self._indexed(sets))
        return self._numbers(generated, reference)

    def least(self, groups: int = 0, dimensions: int = 1) -> tuple[int, int]:
        few, many = fewest(2, groups), max(64, 4 * dimensions)  # halves of twice as many as dimensions
        return (many, few if self.whole_reference else many) if self.extrapolate else (few, few)

    def both(self, sets: Sets, groups: int) -> tuple[dict[str, float], list[dict[str, float]]]:
        check_sets(sets, "fd", fewest(2, groups))
        if self.extrapolate:
            parts = zip(*(_parts_without(x, p, groups) for x, p in self._indexed(sets)), strict=True)
            return self(sets), [self._numbers(generated, reference) for generated, reference in parts]
        pairs = zip(
            *(_gaussians_without(x, groups, self.unbiased) for x in (sets.generated, sets.reference)), strict=True
        )
        return self(sets), [{"fd": ours.distance(theirs)} for ours, theirs in pairs]

    def _indexed(self, sets: Sets) -> list[tuple[Tensor, list[Tensor]]]:
        """Both sets, each with the numbers of the examples of its parts."""
        divided = [sets.generated] if self.whole_reference else [sets.generated, sets.reference]
        fewest, dimensions = min(len(x) for x in divided), sets.generated.shape[1]
        levels = next((k for k in range(self.levels, 1, -1) if fewest >= 2 * dimensions << (k - 1)), 1)
        if levels < 2 or fewest < 64:
            raise UserError(
                f"fd.extrapolate needs halves of twice as many examples as dimensions, here {max(64, 4 * dimensions)} "
                f"examples of each set, and got {fewest}: take more, or fd.extrapolate=false"
            )
        ours, theirs = 1 << (levels - 1), 1 if self.whole_reference else 1 << (levels - 1)
        found = []
        for x, parts, seed in ((sets.generated, ours, sets.seed), (sets.reference, theirs, sets.seed + 1)):
            order = shuffled(len(x), seed).to(x.device)
            found.append((x, [order[part::parts] for part in range(parts)]))
        return found

    def _numbers(self, generated: list[Moments], reference: list[Moments]) -> dict[str, float]:
        """The distance, and the intercept of the line, from moments of parts, which are merged two by two."""
        found: list[tuple[int, float]] = []  # (number of parts, mean distance)
        while True:
            ours, theirs = ([Gaussian.of_moments(m, self.unbiased) for m in part] for part in (generated, reference))
            pairs = zip(ours, theirs if len(theirs) > 1 else theirs * len(ours), strict=True)
            found.append((len(ours), sum(a.distance(b) for a, b in pairs) / len(ours)))
            if len(generated) == 1:
                return {"fd": found[-1][1], "fd_infinity": _intercept(found)}
            generated, reference = _merged(generated), _merged(reference)


def _merged(parts: list[Moments]) -> list[Moments]:
    """Each of the first half of the parts merged with one of the second; one alone stays what it is."""
    half = len(parts) // 2
    for first, second in zip(parts[:half], parts[half:], strict=True) if half else ():
        first.merge(second)
    return parts[: max(1, half)]


def _intercept(points: list[tuple[int, float]]) -> float:
    """Where the line of least squares through the points meets x = 0."""
    x, y = torch.tensor(points, dtype=torch.float64).unbind(1)
    shift = x - x.mean()
    slope = (shift * y).sum() / shift.square().sum()
    return float(y.mean() - slope * x.mean())


def _gaussians_without(x: Tensor, groups: int, unbiased: bool) -> Iterator[Gaussian]:
    """Those of the vectors without each group; from the moments of the groups alone where these tell the root."""
    if len(x) - -(-len(x) // groups) <= x.shape[1]:
        numbers = torch.arange(len(x), device=x.device) % groups
        yield from (Gaussian.of(x[numbers != group], unbiased) for group in range(groups))
        return
    whole = Moments.of(x)
    for group in range(groups):
        yield Gaussian.of_moments(whole.without(Moments.of(x[group::groups])), unbiased)


def _parts_without(x: Tensor, parts: list[Tensor], groups: int) -> Iterator[list[Moments]]:
    """The moments of parts of x, given by numbers of examples, without each group."""
    whole = [Moments.of(x[part]) for part in parts]
    for group in range(groups):
        lost = (Moments.of(x[part[part % groups == group]]) for part in parts)
        yield [moments.without(gone) for moments, gone in zip(whole, lost, strict=True)]
