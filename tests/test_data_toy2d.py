"""Points in the plane: exact densities, exact moments, and draws that follow them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sde.data import measure_sigma_data
from sde.data.toy2d import Checkerboard, Gaussians, Moons, SwissRoll
from sde.errors import UserError

ALL: list[Any] = [SwissRoll, Moons, Checkerboard, Gaussians]


def grid(n: int, half: float) -> tuple[Tensor, float]:
    """The midpoints of n x n cells of [-half, half]^2 in float64, and the area of one."""
    ticks = (torch.arange(n, dtype=torch.float64) + 0.5) * (2 * half / n) - half
    return torch.cartesian_prod(ticks, ticks), (2 * half / n) ** 2


@pytest.mark.parametrize("cls", ALL)
def test_points_have_the_scale_of_pictures(cls: Any) -> None:
    """Root mean square standard deviation 0.5 (0.4975 for the mixture), centered, to the Monte-Carlo error."""
    dataset = cls()
    split = dataset.split("train")
    exact = math.sqrt(0.7**2 / 2 + 0.05**2) if cls is Gaussians else 0.5
    n = len(split)
    assert n == 50_000
    assert split.values.mean(dim=0).abs().max() < 5 * 0.65 / math.sqrt(n)
    # A variance has the relative error sqrt((kurtosis - 1) / n), below sqrt(2 / n) for these light tails.
    assert measure_sigma_data(split, dataset.info) == pytest.approx(exact, rel=5 * math.sqrt(2 / n) / 2)
    assert dataset.info.shape == (2,)
    assert dataset.info.kind == "vectors"
    assert not dataset.random_flip


@pytest.mark.parametrize("cls", ALL)
def test_draws_depend_on_seed_and_split_alone(cls: Any) -> None:
    a, b = cls(train_size=50, test_size=20), cls(train_size=50, test_size=20)
    assert torch.equal(a.split("train").values, b.split("train").values)
    assert torch.equal(a.split("test").values, b.split("test").values)
    assert (len(a.split("train")), len(a.split("test"))) == (50, 20)
    assert not torch.equal(a.split("train").values[:20], a.split("test").values)
    assert not torch.equal(cls(train_size=50, seed=1).split("train").values, a.split("train").values)
    with pytest.raises(UserError, match="split='all'"):
        a.split("all")


@pytest.mark.parametrize("cls", [Moons, Gaussians])
def test_labels_are_those_of_the_classes(cls: Any) -> None:
    dataset = cls(train_size=1000)
    labels = dataset.split("train").labels
    assert labels.unique().tolist() == list(range(dataset.info.num_classes))


@pytest.mark.parametrize("cells", [2, 4, 8])
def test_the_checkerboard_has_density_one(cells: int) -> None:
    board = Checkerboard(cells=cells)
    x, area = grid(8 * 40, 1.2 * Checkerboard.HALF)
    fine, fine_area = grid(cells * 16, Checkerboard.HALF)
    assert board.log_prob(fine).exp().sum() * fine_area == pytest.approx(1, abs=1e-12)
    assert board.log_prob(x).exp().sum() * area == pytest.approx(1, abs=0.05)
    assert board.log_prob(torch.tensor([[2.0, 0.0], [0.0, -2.0]])).tolist() == [-math.inf, -math.inf]


def test_points_of_the_checkerboard_are_on_its_cells() -> None:
    board = Checkerboard()
    values = board.split("train").values.double()
    # float32 rounding may put a point of the very edge on the wrong side
    assert board.log_prob(values).isinf().sum() <= 2
    cell = ((values / Checkerboard.HALF + 1) * 2).long()
    counts = torch.bincount(cell[:, 0] * 4 + cell[:, 1], minlength=16).double()
    filled = counts[counts > 2]
    assert len(filled) == 8
    chi_squared = ((filled - len(values) / 8) ** 2 / (len(values) / 8)).sum()
    assert chi_squared < 30  # 7 degrees of freedom: exceeded once in 10^4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modes": 1, "radius": 0.0, "std": 0.5},
        {"modes": 3, "std": 0.1, "weights": [1, 2, 3.0]},
        {"modes": 5, "std": 0.2},
    ],
)
def test_the_mixture_has_density_one(options: dict) -> None:
    mixture = Gaussians(**options)
    x, area = grid(600, 4.0)
    assert mixture.log_prob(x).exp().sum() * area == pytest.approx(1, abs=1e-9)


def test_the_mixture_against_an_independent_implementation() -> None:
    dataset = Gaussians(modes=5, radius=0.6, std=0.1, weights=[1, 2, 3, 4, 5])
    weights, means, std = dataset.mixture
    assert weights.tolist() == pytest.approx([k / 15 for k in range(1, 6)])
    assert means.norm(dim=1).tolist() == pytest.approx([0.6] * 5)
    assert means[0].tolist() == pytest.approx([0.6, 0.0])
    assert (means[1] - means[0]).norm().item() == pytest.approx(2 * 0.6 * math.sin(math.pi / 5))
    family = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights),
        torch.distributions.Independent(torch.distributions.Normal(means, torch.full_like(means, std)), 1),
    )
    x = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dataset.log_prob(x), family.log_prob(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(dataset.log_prob(x.float()).double(), family.log_prob(x), rtol=1e-5, atol=1e-5)


def test_points_of_the_mixture_follow_it() -> None:
    dataset = Gaussians(modes=4, weights=[1, 2, 3, 4])
    split = dataset.split("train")
    assert split.labels is not None
    weights, means, std = dataset.mixture
    n = len(split)
    counts = torch.bincount(split.labels).double()
    assert ((counts - n * weights) ** 2 / (n * weights)).sum() < 21  # chi^2, 3 degrees of freedom: once in 10^4
    noise = (split.values.double() - means[split.labels]) / std
    assert noise.mean(dim=0).abs().max() < 5 / math.sqrt(n)
    assert noise.std(dim=0).sub(1).abs().max() < 5 / math.sqrt(2 * n)


def test_moons_without_noise_lie_on_half_circles() -> None:
    dataset = Moons(noise=0, train_size=2000)
    split = dataset.split("train")
    # Exact moments: means (1/2, 1/4), and variances 1/2 + 1/4 - ... of the two arcs together.
    u = (np.arange(1 << 18) + 0.5) / (1 << 18) * math.pi
    arcs = np.concatenate([np.stack([np.cos(u), np.sin(u)], 1), np.stack([1 - np.cos(u), 0.5 - np.sin(u)], 1)])
    assert arcs.mean(axis=0) == pytest.approx([0.5, 0.25])
    scale = 2 * math.sqrt(arcs.var(axis=0).mean())
    points = split.values.double().numpy() * scale + [0.5, 0.25]
    assert split.labels is not None
    upper, lower = points[split.labels.numpy() == 0], points[split.labels.numpy() == 1]
    np.testing.assert_allclose(np.hypot(*upper.T), 1, atol=1e-5)
    np.testing.assert_allclose(np.hypot(lower[:, 0] - 1, lower[:, 1] - 0.5), 1, atol=1e-5)
    assert upper[:, 1].min() > -1e-5
    assert lower[:, 1].max() < 0.5 + 1e-5


def test_the_swiss_roll_without_noise_is_a_spiral() -> None:
    values = SwissRoll(noise=0, train_size=2000).split("train").values.double().numpy()
    phi = 1.5 * math.pi * (1 + 2 * (np.arange(1 << 18) + 0.5) / (1 << 18))
    curve = np.stack([phi * np.cos(phi), phi * np.sin(phi)], axis=1)
    points = values * (2 * math.sqrt(curve.var(axis=0).mean())) + curve.mean(axis=0)
    radius = np.hypot(*points.T)
    # on the spiral the radius is the angle, up to whole turns
    turns = (radius - np.arctan2(points[:, 1], points[:, 0])) / (2 * math.pi)
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-5)
    assert radius.min() == pytest.approx(1.5 * math.pi, rel=0.01)
    assert radius.max() == pytest.approx(4.5 * math.pi, rel=0.01)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (SwissRoll, {"noise": -1}, "noise=-1"),
        (Moons, {"noise": math.nan}, "noise=nan"),
        (Moons, {"train_size": 0}, "train_size=0"),
        (SwissRoll, {"test_size": 1.5}, "test_size=1.5"),
        (Checkerboard, {"cells": 3}, "cells=3 is odd"),
        (Checkerboard, {"cells": 0}, "cells=0"),
        (Checkerboard, {"seed": -1}, "seed=-1"),
        (Gaussians, {"modes": 0}, "modes=0"),
        (Gaussians, {"radius": -0.1}, "radius=-0.1"),
        (Gaussians, {"std": 0}, "std=0"),
        (Gaussians, {"weights": [1, 2]}, "2 numbers for modes=8"),
        (Gaussians, {"modes": 2, "weights": [1, 0]}, "weights=0"),
        (Gaussians, {"modes": 2, "weights": ["a", 0]}, "weights='a'"),
    ],
)
def test_options_out_of_range_are_refused(cls: Any, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cls(**options)
