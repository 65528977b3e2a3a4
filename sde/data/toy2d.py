"""Points in the plane: four distributions that one can look at, two of them with exact densities.

All are centered and scaled as a whole (not per axis, which would deform them) by their exact moments, so that the
root mean square of the two standard deviations is 0.5: points have the scale of pictures in [-1, 1], and noise levels
mean the same. `gaussians` is as its options say; its defaults give 0.4975.

    x = (y - E y) / s,    s^2 = 4 (Var y_1 + Var y_2) / 2

Points are drawn from (seed, split) alone, and the density is that of the distribution rather than of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sde.data.base import SPLITS, DataInfo, Dataset, Split, check_split, check_whole, register
from sde.errors import UserError, check_number

SIGMA_DATA = 0.5
QUADRATURE = 1 << 16  # nodes of the midpoint rule for moments along a curve

Draw = Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray | None]]


class Mixture(NamedTuple):
    """A mixture of isotropic Gaussians: sum_k weights[k] N(means[k], std^2 I).

    Args:
        weights: (K,), positive, summing to 1; float64.
        means: (K, 2), float64.
        std: standard deviation of every component.
    """

    weights: Tensor
    means: Tensor
    std: float


@register("swissroll")
class SwissRoll(Dataset):
    """A spiral of one and a half turns, with noise; no labels.

        y = (phi cos phi, phi sin phi) + noise * n,    phi = 1.5 pi (1 + 2 u),  u uniform in [0, 1],  n ~ N(0, I)

    Args:
        noise: standard deviation of the noise before scaling, where the spiral's radius goes from 4.7 to 14.1.
        train_size: points of the train split.
        test_size: points of the test split.
        seed: of the draws.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(self, noise: float = 0.5, train_size: int = 50_000, test_size: int = 10_000, seed: int = 0) -> None:
        check_number("noise", noise, at_least=0)
        self._sizes = _check_sizes(train_size, test_size, seed)
        self._noise, self._seed = float(noise), seed
        self._center, self._scale = _moments(self._curve(_midpoints()), self._noise)

    @property
    def info(self) -> DataInfo:
        """Vectors of shape (2,) without labels."""
        return DataInfo("swissroll", (2,), kind="vectors")

    def split(self, name: str) -> Split:
        """float32 values (N, 2)."""
        return _split(name, self._sizes, self._seed, self._draw)

    def _draw(self, n: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        points = self._curve(generator.random(n)) + self._noise * generator.standard_normal((n, 2))
        return (points - self._center) / self._scale, None

    @staticmethod
    def _curve(u: np.ndarray) -> np.ndarray:
        phi = 1.5 * math.pi * (1 + 2 * u)
        return np.stack([phi * np.cos(phi), phi * np.sin(phi)], axis=1)


@register("moons")
class Moons(Dataset):
    """Two half circles of radius 1, interleaved, with noise; the label says which.

        y = (cos phi, sin phi) or (1 - cos phi, 1/2 - sin phi),    phi uniform in [0, pi],  plus noise * n

    Args:
        noise: standard deviation of the noise before scaling, relative to the radius.
        train_size: points of the train split.
        test_size: points of the test split.
        seed: of the draws.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(self, noise: float = 0.05, train_size: int = 50_000, test_size: int = 10_000, seed: int = 0) -> None:
        check_number("noise", noise, at_least=0)
        self._sizes = _check_sizes(train_size, test_size, seed)
        self._noise, self._seed = float(noise), seed
        nodes = _midpoints()
        both = np.concatenate([self._curve(nodes, np.full(len(nodes), moon)) for moon in (0, 1)])
        self._center, self._scale = _moments(both, self._noise)

    @property
    def info(self) -> DataInfo:
        """Vectors of shape (2,) of two classes."""
        return DataInfo("moons", (2,), 2, ("upper", "lower"), kind="vectors")

    def split(self, name: str) -> Split:
        """float32 values (N, 2) and labels."""
        return _split(name, self._sizes, self._seed, self._draw)

    def _draw(self, n: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        labels = generator.integers(0, 2, n)
        points = self._curve(generator.random(n), labels) + self._noise * generator.standard_normal((n, 2))
        return (points - self._center) / self._scale, labels

    @staticmethod
    def _curve(u: np.ndarray, moon: np.ndarray) -> np.ndarray:
        x, y = np.cos(math.pi * u), np.sin(math.pi * u)
        return np.stack([np.where(moon == 0, x, 1 - x), np.where(moon == 0, y, 0.5 - y)], axis=1)


@register("checkerboard")
class Checkerboard(Dataset):
    """Uniform on every second cell of a square board; no labels.

    The board is [-a, a]^2. With an even number of cells a side both coordinates are uniform in [-a, a], so that
    a = sqrt(3) / 2 makes their standard deviations 0.5.

    Args:
        cells: cells a side, an even number from 2.
        train_size: points of the train split.
        test_size: points of the test split.
        seed: of the draws.

    Raises:
        UserError: a value is out of range.
    """

    HALF = math.sqrt(3) * SIGMA_DATA

    def __init__(self, cells: int = 4, train_size: int = 50_000, test_size: int = 10_000, seed: int = 0) -> None:
        check_whole("cells", cells, at_least=2, at_most=1000)
        if cells % 2:
            raise UserError(f"cells={cells} is odd: an even number makes the board symmetric")
        self._sizes = _check_sizes(train_size, test_size, seed)
        self._cells, self._seed = cells, seed

    @property
    def info(self) -> DataInfo:
        """Vectors of shape (2,) without labels."""
        return DataInfo("checkerboard", (2,), kind="vectors")

    def split(self, name: str) -> Split:
        """float32 values (N, 2)."""
        return _split(name, self._sizes, self._seed, self._draw)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of points (N, 2): (N,), in nats; -inf where the board is empty."""
        cell = torch.floor((x / self.HALF + 1) * (self._cells / 2))
        on_board = ((cell >= 0) & (cell < self._cells)).all(dim=1)
        filled = on_board & (cell.sum(dim=1) % 2 == 0)
        inside = -math.log((2 * self.HALF) ** 2 / 2)  # half of the board's area is filled
        return torch.where(filled, torch.full_like(x[:, 0], inside), torch.full_like(x[:, 0], -math.inf))

    def _draw(self, n: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        column = generator.integers(0, self._cells, n)
        row = 2 * generator.integers(0, self._cells // 2, n) + column % 2
        points = np.stack([column, row], axis=1) + generator.random((n, 2))
        return (points / (self._cells / 2) - 1) * self.HALF, None


@register("gaussians")
class Gaussians(Dataset):
    """A ring of Gaussians, labelled by the one that a point was drawn from; exact density, score and denoiser.

        p(x) = sum_k w_k N(x; m_k, std^2 I),    m_k = radius (cos 2 pi k / K, sin 2 pi k / K)

    Args:
        modes: number of Gaussians K, from 1; their centers are equally spaced on the ring.
        radius: of the ring.
        std: standard deviation of each Gaussian, above 0.
        weights: relative frequency of each, above 0; null for equal ones.
        train_size: points of the train split.
        test_size: points of the test split.
        seed: of the draws.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(
        self,
        modes: int = 8,
        radius: float = 0.7,
        std: float = 0.05,
        weights: Sequence[float] | None = None,
        train_size: int = 50_000,
        test_size: int = 10_000,
        seed: int = 0,
    ) -> None:
        check_whole("modes", modes, at_least=1, at_most=10_000)
        check_number("radius", radius, at_least=0)
        check_number("std", std, above=0)
        self._sizes = _check_sizes(train_size, test_size, seed)
        self._seed = seed
        share = torch.tensor(_check_weights(weights, modes), dtype=torch.float64)
        angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        self._mixture = Mixture(share / share.sum(), means, float(std))

    @property
    def info(self) -> DataInfo:
        """Vectors of shape (2,), one class a mode."""
        modes = len(self._mixture.weights)
        return DataInfo("gaussians", (2,), modes, tuple(str(k) for k in range(modes)), kind="vectors")

    @property
    def mixture(self) -> Mixture:
        """Weights (K,), means (K, 2) and standard deviation, from which an exact denoiser can be made."""
        return self._mixture

    def split(self, name: str) -> Split:
        """float32 values (N, 2) and labels."""
        return _split(name, self._sizes, self._seed, self._draw)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of points (N, 2): (N,), in nats, in the dtype of `x`."""
        weights, means, std = self._mixture
        squares = (x[:, None, :] - means.to(x)).square().sum(dim=2)
        log_normal = -squares / (2 * std**2) - math.log(2 * math.pi * std**2)
        return torch.logsumexp(weights.log().to(x) + log_normal, dim=1)

    def _draw(self, n: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        weights, means, std = self._mixture
        labels = generator.choice(len(weights), size=n, p=weights.numpy())
        return means.numpy()[labels] + std * generator.standard_normal((n, 2)), labels


def _check_weights(weights: Sequence[float] | None, modes: int) -> list[float]:
    if weights is None:
        return [1.0] * modes
    values = list(weights)
    if len(values) != modes:
        raise UserError(f"weights has {len(values)} numbers for modes={modes}: give one for each mode, or null")
    for value in values:
        check_number("weights", value, above=0)
    return [float(value) for value in values]


def _check_sizes(train_size: int, test_size: int, seed: int) -> dict[str, int]:
    check_whole("train_size", train_size, at_least=1)
    check_whole("test_size", test_size, at_least=1)
    check_whole("seed", seed, at_least=0)
    return {"train": train_size, "test": test_size}


def _split(name: str, sizes: dict[str, int], seed: int, draw: Draw) -> Split:
    check_split(name)
    generator = np.random.Generator(np.random.PCG64([seed, SPLITS.index(name)]))
    points, labels = draw(sizes[name], generator)
    values = torch.from_numpy(points.astype(np.float32))
    return Split(values, None if labels is None else torch.from_numpy(labels.astype(np.int64)))


def _midpoints() -> np.ndarray:
    return (np.arange(QUADRATURE) + 0.5) / QUADRATURE


def _moments(curve: np.ndarray, noise: float) -> tuple[np.ndarray, float]:
    """Mean and scale of points spread evenly along `curve` (N, 2) plus noise: divide by it for `SIGMA_DATA`."""
    variance = curve.var(axis=0).mean() + noise**2
    return curve.mean(axis=0), math.sqrt(variance) / SIGMA_DATA
