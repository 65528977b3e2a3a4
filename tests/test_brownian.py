"""A Brownian path per sample: its law, its additivity, and that it is a function of sample and time alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from sde.brownian import BrownianNoise
from sde.errors import UserError
from sde.processes import VP
from sde.randomness import Noise, SampleNoise
from tests.problems import F64, generator, normal, sdes

CELL = 2.0**-15  # of a path with reach 1


def half_log_snr(sde: VP) -> Callable[[float], float]:
    return lambda t: 0.5 * float(sde.log_snr(t))


def identity(t: float) -> float:
    return t


def path(indices: object = range(4), shape: tuple[int, ...] = (3,), seed: int = 0, **options: object) -> BrownianNoise:
    """A path in the time -1 to 1 itself."""
    return BrownianNoise(seed, indices, shape, identity, **{"reach": 1.0, "dtype": F64, **options})


def increments(noise: BrownianNoise, times: list[float]) -> Tensor:
    """z of every step of a grid, (len(times) - 1, B, *shape)."""
    return torch.stack([noise(t, s) for t, s in pairwise(times)])


# The law


# unequal steps, from the length of a cell to half of the range, with ends at nodes (0, 0.5) and between; the points
# 0.1, 0.1 + cell and 0.1 + 2 cells lie in neighboring cells, as does 0.5 + cell with the node 0.5
TIMES = [1.0, 0.6, 0.5 + CELL, 0.5, 0.1 + 2 * CELL, 0.1 + CELL, 0.1, 0.07, 0.0, -1e-3, -0.4, -0.93]


@pytest.mark.parametrize("order", ["march", "scattered"])
def test_increments_are_standard_normal_and_independent(order: str) -> None:
    """Means, variances and all covariances of eleven unequal steps within five and six standard errors."""
    noise = path(range(5000), (4,))
    steps = list(pairwise(TIMES))
    sequence = range(len(steps)) if order == "march" else torch.randperm(len(steps), generator=generator(1)).tolist()
    drawn = {k: noise(*steps[k]).flatten() for k in sequence}
    z = torch.stack([drawn[k] for k in range(len(steps))])
    n = z.shape[1]
    assert z.mean(1).abs().max() < 5 / math.sqrt(n)
    assert (z.square().mean(1) - 1).abs().max() < 5 * math.sqrt(2 / n)
    assert (z.pow(4).mean(1) - 3).abs().max() < 5 * math.sqrt(96 / n)  # 105 - 9
    assert (z @ z.T / n).triu(1).abs().max() < 6 / math.sqrt(n)
    distance = np.abs(torch.special.ndtr(z.sort().values).numpy() - (np.arange(n) + 0.5) / n).max()
    assert distance * math.sqrt(n) < 2.7  # Kolmogorov: exceeded with odds 2 exp(-2 * 2.7^2) = 1e-6 for each step


def test_overlapping_intervals_have_the_covariance_of_brownian_motion() -> None:
    """Cov((B_t - B_s) (B_u - B_v)) is the length of the overlap, on random intervals, out of order."""
    noise = path(range(5000), (4,))
    pairs = np.sort(np.random.default_rng(0).uniform(-1, 1, (12, 2)))
    z = torch.stack([noise(high, low).flatten() for low, high in pairs])
    length = pairs[:, 1] - pairs[:, 0]
    overlap = np.minimum(pairs[:, None, 1], pairs[None, :, 1]) - np.maximum(pairs[:, None, 0], pairs[None, :, 0])
    exact = overlap.clip(min=0) / np.sqrt(length[:, None] * length[None])
    got = (z @ z.T / z.shape[1]).numpy()
    error = np.sqrt((1 + exact**2) / z.shape[1])  # the variance of a product of two normals
    assert (np.abs(got - exact) / error).max() < 5.5  # 78 of them


def test_samples_and_entries_are_independent() -> None:
    """Neighboring samples, entries and seeds on a march: no correlation."""
    z = increments(path(range(2000), (3,)), [0.9, 0.5, 0.3, -0.2])
    other = increments(path(range(2000), (3,), seed=1), [0.9, 0.5, 0.3, -0.2])
    for a, b in ((z[:, 1:], z[:, :-1]), (z[..., 1:], z[..., :-1]), (z, other)):
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())


def test_plain_draws_are_those_of_samples_and_independent_of_the_path() -> None:
    noise, plain = path(range(5000), (4,)), SampleNoise(0, range(5000), (4,), dtype=F64)
    first = plain()
    assert torch.equal(noise(), first)
    rest = [noise(0.9, -0.9), noise(0.9, 0.1), noise(0.3, 0.3 - CELL)]
    second = plain()
    assert torch.equal(noise(), second)  # the path takes nothing from their stream
    for draw in rest:
        for z in (first, second):
            assert abs(float((draw * z).mean())) < 5 / math.sqrt(z.numel())


# One path


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (F64, 1e-12)])
@pytest.mark.parametrize("sde", sdes())
def test_parts_add_up(sde: VP, dtype: torch.dtype, tolerance: float) -> None:
    clock = half_log_snr(sde)
    noise = BrownianNoise(0, range(5), (7,), clock, dtype=dtype)
    rng = np.random.default_rng(0)
    for _ in range(10):
        s, u, t = np.sort(rng.uniform(sde.t_min_sampling, sde.T, 3)).tolist()
        whole, a, b = (
            noise(*ends) * math.sqrt(abs(clock(ends[0]) - clock(ends[1]))) for ends in ((t, s), (t, u), (u, s))
        )
        # each of the three is rounded three times: in the difference, its normalization and the product here
        assert float((a + b - whole).abs().max()) < tolerance * max(float(x.abs().max()) for x in (whole, a, b))


def test_the_way_back_is_the_way() -> None:
    noise = path()
    assert torch.equal(noise(0.3, -0.2), -noise(-0.2, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(), (5,), (17,), (3, 8, 8), (70, 70)], ids=str)
def test_a_path_does_not_depend_on_its_batch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    order = torch.randperm(32, generator=generator(0)).tolist()
    times = [0.9, 0.4, 0.25, 0.1234, -0.3]
    whole = increments(path(range(32), shape, dtype=dtype), times)
    for rows in (order, range(10, 17), [13], [7, 7, 9], []):
        got = increments(path(rows, shape, dtype=dtype), times)
        assert got.dtype == dtype
        assert torch.equal(got, whole[:, list(rows)])


def test_a_path_does_not_depend_on_the_order_of_questions() -> None:
    pairs = [*pairwise(np.linspace(0.97, -0.93, 30).tolist()), (0.5, 0.25), (1.0, -1.0), (0.1, 0.1 - CELL)]
    march = path()
    answers = {ends: march(*ends) for ends in pairs}
    for seed in range(3):
        noise = path()
        for k in torch.randperm(len(pairs), generator=generator(seed)).tolist():
            assert torch.equal(noise(*pairs[k]), answers[pairs[k]])
            noise()
    for ends in pairs[::7]:
        assert torch.equal(path()(*ends), answers[ends])


def test_a_draw_stays_what_it_was() -> None:
    times = np.linspace(0.97, -0.93, 30).tolist()
    noise = path()
    held = [(noise(t, s), noise(t, s)) for t, s in pairwise(times)]
    for (a, b), (t, s) in zip(held, pairwise(times), strict=True):
        assert torch.equal(a, b)
        a.zero_()
        assert torch.equal(b, noise(t, s))


def test_a_rounding_error_of_time_does_not_change_the_path() -> None:
    rng = np.random.default_rng(0)
    a, b = path(), path()
    for t in rng.uniform(0.1, 1, 50):
        near = float(np.nextafter(t, 0))
        assert float((a(float(t), 0.0) - b(near, 0.0)).abs().max()) < 1e-14


# Strong convergence


def euler_maruyama(noise: Noise, x: Tensor, times: list[float]) -> Tensor:
    """dx = -2 x dt + dB from x at -0.9, in the clock of the path itself."""
    for t, s in pairwise(times):
        x = x - 2 * (s - t) * x + math.sqrt(s - t) * noise(t, s)
    return x


def ornstein_uhlenbeck(noise: BrownianNoise, x: Tensor, times: list[float]) -> Tensor:
    """The exact solution, as far as values of the path on a grid tell it.

    x e^(-2 T) + int e^(-2 (T - t)) dB, by parts and the trapezoidal rule: off by O(h) with a small constant.
    """
    start, b = times[0], torch.zeros_like(x)
    length = times[-1] - start
    total = torch.zeros_like(x)
    for t, s in pairwise(times):
        after = b + math.sqrt(s - t) * noise(t, s)
        total += 0.5 * (s - t) * (math.exp(-2 * (times[-1] - t)) * b + math.exp(-2 * (times[-1] - s)) * after)
        b = after
    return math.exp(-2 * length) * x + b - 2 * total


def strong_errors(source: Callable[[int], Noise]) -> list[float]:
    """Root mean square distance to the exact solution of path 0 in n = 16, 32, 64 steps from -0.9 to 0.83."""
    x = normal(250, 4)
    fine = ornstein_uhlenbeck(path(range(250), (4,)), x, np.linspace(-0.9, 0.83, 1025).tolist())
    ends = (euler_maruyama(source(n), x, np.linspace(-0.9, 0.83, n + 1).tolist()) for n in (16, 32, 64))
    return [float((end - fine).square().mean().sqrt()) for end in ends]


def test_more_steps_refine_the_same_sample() -> None:
    """Euler-Maruyama with additive noise has strong order 1; with independent draws it goes nowhere."""
    a, b, c = strong_errors(lambda n: path(range(250), (4,)))
    assert math.log2(a / b) > 0.9
    assert math.log2(b / c) > 0.9
    # solutions of independent paths differ by twice the variance (1 - e^(-4 1.73)) / 4; its root is known from 1000
    # draws to 1 / sqrt(2000), and Euler's own variance is off by a share of 1.73 / 64
    apart = math.sqrt((1 - math.exp(-4 * 1.73)) / 2)
    *_, independent = strong_errors(lambda n: SampleNoise(n, range(250), (4,), dtype=F64))
    assert c < 0.05 * apart
    assert abs(independent / apart - 1) < 0.1 + 1.73 / 64


# Refusals


def test_times_that_a_path_cannot_serve() -> None:
    sde = VP()
    noise = BrownianNoise(0, [0], (2,), half_log_snr(sde))
    with pytest.raises(UserError, match=r"at time 0: the clock is inf, beyond reach=16"):
        noise(0.1, 0.0)
    with pytest.raises(UserError, match="the clock is nan"):
        BrownianNoise(0, [0], (2,), lambda t: math.nan)(0.2, 0.1)
    with pytest.raises(UserError, match="too short"):
        noise(0.5, 0.5)
    with pytest.raises(UserError, match="too short"):
        path()(0.1, 0.1 - 0.99 * CELL)
    with pytest.raises(UserError, match="half an interval"):
        noise(0.5)
    with pytest.raises(UserError, match="reach=0"):
        BrownianNoise(0, [0], (2,), identity, reach=0.0)
