r"""Euclidean distances between many vectors, tile by tile: no matrix of all pairs is ever held.

In few dimensions the differences are formed. In many the squares come from a matrix product,

    |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y>,

of vectors from which the mean is taken away first, or the terms would cancel to the last digits. Nearest neighbors are
found so, in the type of the data, and their distances then computed anew from differences in float64: a copy has
distance zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sde.metrics.rows import Rows

TILE = 2048  # examples on either side of a tile: 32 MiB in float64
FEW = 16  # dimensions up to which differences are as fast as a product


def _tile(x: Tensor, y: Tensor) -> Tensor:
    few = x.shape[1] <= FEW
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist" if few else "use_mm_for_euclid_dist")


def _tiles(y: Tensor | Rows, center: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Parts of `y` (m, D) less the center, in `dtype`, each with the number of its first row."""
    for start in range(0, len(y), TILE):
        yield start, (y[start : start + TILE].double() - center).to(dtype)


def _center(x: Tensor | Rows) -> Tensor:
    if isinstance(x, Rows):
        return sum(block.sum(0, dtype=torch.float64) for block in x.blocks(TILE)) / len(x)  # type: ignore[return-value]
    return torch.mean(x, dim=0, dtype=torch.float64)


def distance_sum(x: Tensor, y: Tensor, *, same: bool = False) -> float:
    """The sum of |x_i - y_j| over all pairs of rows of x (n, D) and y (m, D), in float64.

    Where both are the `same` set, each row is at distance 0 from itself, which a product tells to 8 digits alone.
    """
    center = _center(y)
    total = 0.0
    for start, rows in _tiles(x, center, torch.float64):
        for first, columns in _tiles(y, center, torch.float64):
            distances = _tile(rows, columns)
            if same and start == first:
                distances.fill_diagonal_(0)
            total += float(distances.sum())
    return total


def nearest(x: Tensor, y: Tensor | Rows, count: int = 1, *, same: bool = False) -> tuple[Tensor, Tensor]:
    """The `count` nearest rows of y (m, D) for each row of x (n, D).

    Args:
        x: where to look from.
        y: among what to look; at least `count` rows. Of `Rows` no more than a tile is made at a time.
        count: neighbors of each.
        same: x and y are the same set, and no row is a neighbor of its own.

    Returns:
        Their distances (n, count), float64 and increasing, and their row numbers (n, count).
    """
    assert count + same <= len(y)
    center = _center(y)
    dtype = torch.float64 if x.shape[1] <= FEW else torch.promote_types(x.dtype, y.dtype)
    found = []
    for start, rows in _tiles(x, center, dtype):
        best = rows.new_full((len(rows), count), torch.inf)
        index = torch.zeros(len(rows), count, dtype=torch.long, device=x.device)
        for first, columns in _tiles(y, center, dtype):
            distances = _tile(rows, columns)
            if same and start == first:
                distances.fill_diagonal_(torch.inf)
            near, where = distances.topk(min(count, len(columns)), dim=1, largest=False)
            best, kept = torch.cat([best, near], dim=1).topk(count, dim=1, largest=False)
            index = torch.cat([index, where + first], dim=1).gather(1, kept)
        found.append(index)
    index = torch.cat(found)
    exact = torch.stack([_paired(x, y, column) for column in index.T], dim=1)
    exact, order = exact.sort(dim=1, stable=True)
    return exact, index.gather(1, order)


def _paired(x: Tensor, y: Tensor | Rows, index: Tensor) -> Tensor:
    """|x_i - y_index[i]|, (n,), float64."""
    parts = zip(x.split(TILE), index.split(TILE), strict=True)
    return torch.cat([(rows.double() - y[which].double()).norm(dim=1) for rows, which in parts])


def shuffled(n: int, seed: int, count: int | None = None) -> Tensor:
    """`count` (all, unless told otherwise) of the numbers below n in an order that n and the seed fix."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count]
