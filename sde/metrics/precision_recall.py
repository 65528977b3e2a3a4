r"""Are generated examples like data, and is all of the data like something generated? By balls to nearest neighbors.

Around each example of a set lies the ball that reaches to its k-th nearest neighbor of the same set. With the balls of
the reference Y and those of the generated examples X,

    precision  share of X in any ball of Y         density   mean over X of (balls of Y that hold it) / k
    recall     share of Y in any ball of X         coverage  share of the balls of Y that hold any of X

(improved precision and recall, arXiv 1904.06991; density and coverage, arXiv 2002.09797). One reference example far
from the others has a large ball, which raises precision but hardly density.

Squares of distances come from matrix products of centered vectors in float64, in blocks; a copy is at distance zero up
to rounding. Distances that differ by no more than rounding count as equal, as those of copies have to.

Standard errors by the jackknife are bounds here. It counts c times the variance that c examples have only together
(Efron and Stein, Annals of Statistics 1981), and nearest neighbors are little else: on Gaussians of 3 to 30 dimensions
they were 1 to 3.3 times the spread of repeated draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.errors import UserError, check_number
from sde.metrics.base import Metric, Sets, check_sets, fewest, register
from sde.metrics.distances import shuffled

_BLOCK = 1 << 24  # distances in memory at a time: 128 MiB in float64
_ROUNDING = 1e-12  # of a square of a distance, relative to the squares of the two vectors


@dataclass(frozen=True)
class _Balls:
    """Vectors, centered and in float64, and the squared radii of their balls.

    Args:
        x: (n, D).
        radii: (1 + groups, n), a row for all examples, and one for each group that is left out. -inf, a ball that holds
            nothing, for the examples of the group.
    """

    x: Tensor
    radii: Tensor

    @classmethod
    def of(cls, x: Tensor, k: int, groups: int) -> _Balls:
        """Those of x (n, D), to the k-th neighbor among all, and among those without each of `groups` groups."""
        parts = max(groups, 1)
        found = []
        for start, rows in _blocks(x, len(x)):
            near = []
            for group in range(parts):
                squares = _squares(rows, x[group::parts])
                own = torch.arange(start, start + len(rows), device=x.device)
                own = own[own % parts == group]
                squares[own - start, own // parts] = torch.inf  # none is a neighbor of its own
                near.append(_smallest(squares, k))
            kept = [near, *(near[:left] + near[left + 1 :] for left in range(groups))]
            others = [torch.cat(each, dim=1) for each in kept]
            found.append(torch.stack([_smallest(each, k)[:, -1] for each in others], dim=1))
        radii = torch.cat(found).T.contiguous()
        numbers = torch.arange(len(x), device=x.device)
        for group in range(groups):
            radii[1 + group, numbers % groups == group] = -torch.inf
        return cls(x, radii)


def _blocks(x: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    """Parts of x, each with the number of its first row, for matrices of as many columns as `width`."""
    rows = max(1, _BLOCK // width)
    for start in range(0, len(x), rows):
        yield start, x[start : start + rows]


def _squares(x: Tensor, y: Tensor, rounding: float = 0.0) -> Tensor:
    """|x_i - y_j|^2 + rounding (|x_i|^2 + |y_j|^2), (n, m)."""
    squares = torch.addmm(y.square().sum(1) * (1 + rounding), x, y.mT, alpha=-2)
    return squares.add_((x.square().sum(1) * (1 + rounding))[:, None])


def _smallest(x: Tensor, k: int) -> Tensor:
    """The k smallest entries of each row, increasing; all of them where there are fewer."""
    return x.topk(min(k, x.shape[1]), dim=1, largest=False).values


def _drawn(x: Tensor, examples: int | None, seed: int) -> Tensor:
    """At most so many of x, chosen by the seed; x itself where it has no more."""
    return x if examples is None or len(x) <= examples else x[shuffled(len(x), seed, examples).to(x.device)]


def _counts(n: int, m: int, examples: int | None) -> tuple[int, int]:
    """How many of either set are drawn."""
    return (n, m) if examples is None else (min(n, examples), min(m, examples))


def _prepared(sets: Sets, name: str, k: int, examples: int | None, groups: int) -> tuple[Tensor, Tensor]:
    """Generated and reference vectors, at most so many examples of either, centered and in float64.

    Raises:
        UserError: when there are too few for k neighbors besides the example itself, whichever group is left out.
    """
    check_sets(sets, name, k + 1)
    ours, theirs = (_drawn(x, examples, sets.seed) for x in (sets.generated, sets.reference))
    for x in (ours, theirs):
        if groups and len(x) - -(-len(x) // groups) <= k:
            raise UserError(
                f"{name}.k={k} neighbors cannot be found among {len(x)} examples without one of {groups} groups: take "
                "more examples, or a smaller k"
            )
    center = theirs.mean(0, dtype=torch.float64)
    return ours - center, theirs - center


def _left(groups: int, numbers: Tensor) -> list[Tensor]:
    """Which examples stay: all, and then for each group that is left out those of the others."""
    return [numbers >= 0, *(numbers % groups != group for group in range(groups))]


def _check_options(k: int, examples: int | None) -> None:
    check_number("k", k, at_least=1)
    if examples is not None:
        check_number("examples", examples, at_least=k + 1)


@register("pr")
@dataclass(frozen=True)
class PrecisionRecall(Metric):
    """Improved precision and recall (arXiv 1904.06991); balls are closed, as there.

    Args:
        k: a ball reaches to the k-th nearest neighbor. Numbers grow with k and depend on the number of examples.
        examples: at most as many of either set, drawn by the seed; None for all. The work grows with their square.
    """

    better: ClassVar[dict[str, str | float]] = {"precision": "higher", "recall": "higher"}
    labels: ClassVar[dict[str, str]] = {"precision": "precision", "recall": "recall"}
    cap: ClassVar[str] = "examples"

    k: int = 3
    examples: int | None = None

    def __post_init__(self) -> None:
        _check_options(self.k, self.examples)

    def counts(self, n: int, m: int) -> tuple[int, int]:
        return _counts(n, m, self.examples)

    def least(self, groups: int = 0, dimensions: int = 1) -> tuple[int, int]:
        return fewest(self.k + 1, groups), fewest(self.k + 1, groups)

    def __call__(self, sets: Sets) -> dict[str, float]:
        return self.both(sets, 0)[0]

    def both(self, sets: Sets, groups: int) -> tuple[dict[str, float], list[dict[str, float]]]:
        x, y = _prepared(sets, "pr", self.k, self.examples, groups)
        ours, theirs = _Balls.of(x, self.k, groups), _Balls.of(y, self.k, groups)
        held = torch.zeros(len(theirs.radii), len(x), dtype=torch.bool, device=x.device)
        reached = torch.zeros(len(theirs.radii), len(y), dtype=torch.bool, device=x.device)
        for start, rows in _blocks(x, len(y)):
            squares = _squares(rows, y, -_ROUNDING)
            for left, (own, other) in enumerate(zip(ours.radii, theirs.radii, strict=True)):
                end = start + len(rows)
                held[left, start:end] = (squares <= other).any(1)
                reached[left] |= (squares <= own[start:end, None]).any(0)
        numbers = [_left(groups, torch.arange(len(z), device=z.device)) for z in (x, y)]
        found = [
            {"precision": float(in_data[a].double().mean()), "recall": float(in_model[b].double().mean())}
            for in_data, in_model, a, b in zip(held, reached, *numbers, strict=True)
        ]
        return found[0], found[1:]


@register("dc")
@dataclass(frozen=True)
class DensityCoverage(Metric):
    """Density and coverage (arXiv 2002.09797); balls are open, as in its authors' code.

    For two samples of one law of the same size density is 1 in the mean, and coverage close to 1 - 2^-k. Density is
    above 1 where generated examples crowd in the middle of the data.

    Args:
        k: a ball reaches to the k-th nearest neighbor.
        examples: at most as many of either set, drawn by the seed; None for all. The work grows with their square.
    """

    better: ClassVar[dict[str, str | float]] = {"density": 1.0, "coverage": "higher"}
    labels: ClassVar[dict[str, str]] = {"density": "density", "coverage": "coverage"}
    cap: ClassVar[str] = "examples"

    k: int = 5
    examples: int | None = None

    def __post_init__(self) -> None:
        _check_options(self.k, self.examples)

    def counts(self, n: int, m: int) -> tuple[int, int]:
        return _counts(n, m, self.examples)

    def least(self, groups: int = 0, dimensions: int = 1) -> tuple[int, int]:
        return fewest(self.k + 1, groups), fewest(self.k + 1, groups)

    def __call__(self, sets: Sets) -> dict[str, float]:
        return self.both(sets, 0)[0]

    def both(self, sets: Sets, groups: int) -> tuple[dict[str, float], list[dict[str, float]]]:
        x, y = _prepared(sets, "dc", self.k, self.examples, groups)
        radii = _Balls.of(y, self.k, groups).radii
        held = torch.zeros(radii.shape, dtype=torch.long, device=x.device)  # generated examples in each ball
        stay = _left(groups, torch.arange(len(x), device=x.device))
        for start, rows in _blocks(x, len(y)):
            squares = _squares(rows, y, _ROUNDING)
            for left, own in enumerate(radii):
                kept = stay[left][start : start + len(rows)]
                held[left] += ((squares < own) & kept[:, None]).sum(0)
        numbers = _left(groups, torch.arange(len(y), device=y.device))
        found = [
            {
                "density": float(counts.sum()) / (self.k * int(kept.sum())),
                "coverage": float((counts[those] > 0).double().mean()),
            }
            for counts, kept, those in zip(held, stay, numbers, strict=True)
        ]
        return found[0], found[1:]
