"""Langevin dynamics: laws of chains, acceptance, the box, and predictors under correction.

Where a chain is affine its law is a recursion, compared exactly. One-dimensional chains have a transition density,
whose stationary law a quadrature finds; samples are held against it by the probability integral transform: under the
right law F(x) is uniform, and the chi-square statistic of its histogram known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from sde.broadcast import Time
from sde.denoiser import AbstractDenoiser, Denoiser, GaussianDenoiser, GaussianMixtureDenoiser
from sde.errors import UserError
from sde.parameterizations import Eps
from sde.processes import EDM, SDE, VE, VP
from sde.randomness import BatchNoise, RecordedNoise, SampleNoise
from sde.reverse import ReverseProcess
from sde.solvers import MALA, SOLVERS, AnnealedLangevin, BoxLangevin, Langevin, PredictorCorrector, Solver
from sde.solvers.langevin import consistent_step
from sde.solvers.mala import lobatto
from tests.problems import (
    F64,
    RandomNetwork,
    gaussian,
    generator,
    marginal_of_gaussian,
    mixture,
    moderate,
    normal,
    sdes,
)
from tests.solver_variants import SEEDED, STAYING, uniform

every_sde = pytest.mark.parametrize("sde", sdes())

BINS = 50


def chi_square(shares: Tensor) -> float:
    """(chi^2 - its mean) / its standard deviation, of values (N,) that should be uniform on [0, 1]."""
    counts = torch.histc(shares, BINS, 0, 1)
    expected = len(shares) / BINS
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (BINS - 1)) / math.sqrt(2 * (BINS - 1))


def between(sde: SDE, n: int) -> list[float]:
    """`n` equal steps between moderate noise levels."""
    low, high = moderate(sde)
    return uniform(high, low, n)


# Unadjusted dynamics


def affine_law(
    solver: Solver, denoiser: AbstractDenoiser, times: list[float], m: float, v: float, draws: int
) -> tuple[float, float]:
    """Exact mean and variance of the answer to x ~ N(m, v): row 2 + j has draw j equal to one and all others zero."""
    x, noise = torch.zeros(draws + 2, 1, dtype=F64), torch.zeros(draws, draws + 2, 1, dtype=F64)
    x[1] = 1
    noise[torch.arange(draws), torch.arange(draws) + 2] = 1
    recorded = RecordedNoise(noise)
    answer = solver.solve(ReverseProcess(denoiser), x, times, recorded).x[:, 0]
    assert recorded.used == draws
    offset, gain, kicks = answer[0], answer[1] - answer[0], answer[2:] - answer[0]
    return float(offset + gain * m), float(gain**2 * v + (kicks**2).sum())


@every_sde
@pytest.mark.parametrize(
    ("solver", "relative"),
    [
        (Langevin(steps_per_level=3, snr=0.3), 2 * 0.3**2),
        (AnnealedLangevin(steps_per_level=3, step_size=0.15), 0.15),
    ],
    ids=["langevin", "ald"],
)
def test_law_of_annealed_dynamics(solver: Solver, relative: float, sde: SDE) -> None:
    """On a Gaussian, e = relative sigma^2: at every time, the first and last included, three times
    m <- m_t + (1 - e / v_t) (m - m_t),  v <- (1 - e / v_t)^2 v + 2 e."""
    mean, std = 0.7, 0.5
    times = between(sde, 6)
    m, v = -1.0, 3.0
    got = affine_law(solver, gaussian(sde, mean, std), times, m, v, 21)
    for t in times:
        m_t, v_t = marginal_of_gaussian(sde, t, mean, std)
        e = relative * float(sde.sigma(t)) ** 2
        for _ in range(3):
            m, v = m_t + (1 - e / v_t) * (m - m_t), (1 - e / v_t) ** 2 * v + 2 * e
    assert got == pytest.approx((m, v), rel=1e-10)


@pytest.mark.parametrize("d", [63, 64])
def test_step_of_langevin_by_hand(d: int) -> None:
    """Norms of each sample in 64 dimensions, sigma(t) below; the last noise left out with final=mean."""
    sde, snr = VE(), 0.2
    times = [0.6, 0.5]
    denoiser = GaussianDenoiser(sde, normal(d, seed=2), torch.tensor(0.25, dtype=F64))
    x, draws = normal(3, d), normal(4, 3, d, seed=1)
    by_hand = x
    for k in range(4):
        t = times[k // 2]
        score = denoiser.score(by_hand, t)
        ratio = d**0.5 / score.norm(dim=1, keepdim=True)
        if d == 63:
            ratio = torch.full_like(ratio, float(sde.sigma(t)))
        e = 2 * (snr * ratio) ** 2
        mean = by_hand + e * score
        by_hand = mean + (2 * e) ** 0.5 * draws[k]
    for final, expected, used in (("none", by_hand, 4), ("mean", mean, 3)):
        recorded = RecordedNoise(draws)
        solver = Langevin(steps_per_level=2, snr=snr, final=final)
        got = solver.solve(ReverseProcess(denoiser), x, times, recorded).x
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert recorded.used == used


def test_ald_is_the_published_algorithm() -> None:
    """arXiv 2006.09011, algorithm 1: L levels, T steps of epsilon sigma_i^2 / sigma_L^2 at each, a last denoising."""
    sigmas, steps, epsilon = np.geomspace(3.0, 0.1, 6), 4, 8e-4
    law, sde = mixture(), EDM()
    x, draws = 3 * normal(5, 2), normal(len(sigmas) * steps, 5, 2, seed=1)
    by_hand, k = x, 0
    for sigma in sigmas:
        alpha = epsilon * sigma**2 / sigmas[-1] ** 2
        for _ in range(steps):
            by_hand = by_hand + alpha * law.score(by_hand, 1.0, float(sigma)) + math.sqrt(2 * alpha) * draws[k]
            k += 1
    by_hand = by_hand + sigmas[-1] ** 2 * law.score(by_hand, 1.0, float(sigmas[-1]))
    solver = AnnealedLangevin(steps_per_level=steps, step_size=epsilon / sigmas[-1] ** 2, final="tweedie")
    solution = solver.solve(ReverseProcess(law.denoiser(sde)), x, sigmas.tolist(), RecordedNoise(draws))
    torch.testing.assert_close(solution.x, by_hand, rtol=1e-10, atol=1e-10)
    assert solution.nfe == len(sigmas) * steps + 1


@pytest.mark.parametrize(
    ("sigma_1", "count", "steps", "published"),
    [(50, 232, 5, "6.2e-06"), (90, 500, 5, "3.3e-06"), (190, 1086, 3, "1.8e-06"), (348, 2311, 3, "9e-07")],
    ids=["cifar10", "celeba64", "bedroom128", "ffhq256"],
)
def test_steps_of_technique_4(sigma_1: float, count: int, steps: int, published: str) -> None:
    """To the digits that ncsnv2's configurations give; sigma_L = 0.01."""
    ratio = (sigma_1 / 0.01) ** (1 / (count - 1))
    digits = len(published.split("e")[0].replace(".", ""))
    assert f"{consistent_step(ratio, steps) * 1e-4:.{digits - 1}e}" == f"{float(published):.{digits - 1}e}"


def test_the_chosen_step_keeps_noise_at_its_level() -> None:
    """From point data, where the papers' recursion is exact, no other step comes closer to sigma_n."""
    sde, times = EDM(), np.geomspace(2.0, 0.02, 12).tolist()
    point = GaussianDenoiser(sde, torch.tensor([0.7], dtype=F64), torch.tensor(0.0, dtype=F64))

    def off(step_size: float | None) -> float:
        solver = AnnealedLangevin(steps_per_level=2, step_size=step_size)
        return abs(affine_law(solver, point, times, 0.7, 4.0, 24)[1] / 0.02**2 - 1)

    chosen = consistent_step(times[0] / times[1], 2)
    assert off(None) == pytest.approx(off(chosen), rel=1e-6)
    settled = 1 / (1 - chosen / 2)
    levels_apart = (1 - chosen) ** 4 * ((times[0] / times[1]) ** 2 - settled) + settled
    # one level's recursion starts from variance 1 where the chain carries what the last one left
    assert off(None) < 1.1 * (levels_apart - 1) / (1 - (1 - chosen) ** 4 * (times[0] / times[1]) ** 2)


# Acceptance


def target(sde: SDE, t: float) -> tuple[GaussianMixtureDenoiser, MixtureSameFamily]:
    """Two unequal modes in one dimension, and p_t."""
    weights, means, std = torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([-0.9, 0.6], dtype=F64), 0.2
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    p = MixtureSameFamily(Categorical(weights), Normal(alpha * means, math.hypot(alpha * std, sigma)))
    return GaussianMixtureDenoiser(sde, weights, means[:, None], torch.tensor(std**2, dtype=F64)), p


def mala_by_hand(
    log_p: Callable[[Tensor], Tensor], x: Tensor, e: float, steps: int, draws: Iterable[Tensor]
) -> tuple[Tensor, Tensor]:
    """The textbook: proposal densities as densities, the score by autograd. Also how often each sample moved, (B,)."""

    def proposal(y: Tensor) -> Normal:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            (score,) = torch.autograd.grad(log_p(y).sum(), y)
        return Normal(y.detach() + e * score, math.sqrt(2 * e))

    moved, left = torch.zeros(len(x), dtype=F64), iter(draws)
    for k in range(steps):
        forth = proposal(x)
        y = forth.mean + forth.stddev * next(left)
        if k % x.shape[1] == 0:
            variates = Normal(0.0, 1.0).cdf(next(left))
        back = proposal(y).log_prob(x).sum(1) - forth.log_prob(y).sum(1)
        accept = variates[:, k % x.shape[1]] < torch.exp(log_p(y) - log_p(x) + back)
        x = torch.where(accept[:, None], y, x)
        moved += accept
    return x, moved


@every_sde
def test_mala_by_hand(sde: SDE) -> None:
    times = between(sde, 2)
    law, x, draws = mixture(), normal(40, 2), list(normal(30, 40, 2, seed=1))
    by_hand, rates, left = x, [], iter(draws)
    for t in times:
        p = law.marginal(float(sde.alpha(t)), float(sde.sigma(t)))
        by_hand, moved = mala_by_hand(p.log_prob, by_hand, 0.9 * float(sde.sigma(t)) ** 2, 5, left)
        rates.append(float(moved.mean()) / 5)
    solver = MALA(steps_per_level=5, step_size=0.9)
    process, recorded = ReverseProcess(law.denoiser(sde)), RecordedNoise(draws)
    solution = solver.solve(process, x, times, recorded)
    torch.testing.assert_close(solution.x, by_hand, rtol=1e-9, atol=1e-9)
    assert solution.acceptance == pytest.approx(rates, abs=1e-12)
    assert 0.05 < min(rates) < max(rates) < 0.95  # both answers were given
    assert solution.nfe == process.nfe == 3 * (1 + 5) * 2  # scores and densities
    assert recorded.used == 3 * (5 + 3)  # a draw holds the variates of two steps in the plane


def test_mala_as_a_corrector() -> None:
    sde, (t, s), snr = VP(), (0.5, 0.45), 0.5
    law, x, draws = mixture(), normal(40, 2), list(normal(8, 40, 2, seed=1))
    p = law.marginal(float(sde.alpha(t)), float(sde.sigma(t)))
    e = 2 * (snr * float(sde.alpha(t) / sde.alpha(s)) * float(sde.sigma(t))) ** 2
    by_hand, _ = mala_by_hand(p.log_prob, x, e, 4, draws)
    solver = PredictorCorrector(predictor="none", corrector="mala", corrector_steps=4, snr=snr)
    got = solver.solve(ReverseProcess(law.denoiser(sde)), x, [t, s], RecordedNoise(draws)).x
    torch.testing.assert_close(got, by_hand, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("density", ["exact", "line"])
def test_mala_leaves_the_law_alone_and_plain_langevin_does_not(density: str) -> None:
    """30 steps of e = 1.2 v from exact draws of p_t: F(x) stays uniform under acceptance, and only under it."""
    sde, n = VE(), 20_000
    t = float(sde.t_of_noise_level(0.3))
    denoiser, p = target(sde, t)
    start = p.sample((n, 1))
    e = 1.2 * (0.3**2 + 0.2**2)
    options: dict[str, Any] = {"steps_per_level": 15, "step_size": e / 0.3**2}
    process = ReverseProcess(denoiser)
    # ten nodes are exact to 1e-6 over the longest moves: see the test of the line integral
    adjusted = MALA(**options, density=density, nodes=10).solve(
        process, start, [t, 0.999999 * t], BatchNoise(start, generator(2))
    )
    plain = AnnealedLangevin(**options).solve(process, start, [t, 0.999999 * t], BatchNoise(start, generator(2)))
    assert abs(chi_square(p.cdf(start)[:, 0])) < 5
    assert abs(chi_square(p.cdf(adjusted.x)[:, 0])) < 5
    assert chi_square(p.cdf(plain.x)[:, 0]) > 50
    assert all(0.2 < rate < 0.9 for rate in adjusted.acceptance)


def test_mala_finds_the_law() -> None:
    """From one point, on a Gaussian with steps far too long for plain Langevin dynamics: e = 1.5 v."""
    sde, n = VP(), 20_000
    t = moderate(sde)[1]
    m, v = marginal_of_gaussian(sde, t, 0.7, 0.5)
    denoiser = GaussianDenoiser(sde, torch.tensor([0.7], dtype=F64), torch.tensor(0.25, dtype=F64))
    x = torch.full((n, 1), m + 1.0, dtype=F64)
    solver = MALA(steps_per_level=30, step_size=1.5 * v / float(sde.sigma(t)) ** 2)
    solution = solver.solve(ReverseProcess(denoiser), x, [t, 0.999999 * t], BatchNoise(x, generator(1)))
    # the chance to be still at the start is (1 - acceptance)^60, and a move forgets all but (1 - 1.5)^2 of a variance
    assert abs(chi_square(Normal(m, v**0.5).cdf(solution.x)[:, 0])) < 5


def test_acceptance_rate_of_a_gaussian() -> None:
    """In stationarity r = -(e / 4) (y^2 - x^2) / v^2 by the quadratic log p: its mean chance, by quadrature."""
    sde, n, share = VE(), 40_000, 0.8
    t = float(sde.t_of_noise_level(0.5))
    _, v = marginal_of_gaussian(sde, t, 0.0, 0.5)
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    x, z = np.meshgrid(nodes, nodes)
    y = (1 - share) * x + math.sqrt(2 * share) * z
    chance = np.minimum(1, np.exp(-share / 4 * (y**2 - x**2)))
    exact = float((weights[:, None] * weights * chance).sum() / weights.sum() ** 2)
    denoiser = GaussianDenoiser(sde, torch.zeros(1, dtype=F64), torch.tensor(0.25, dtype=F64))
    start = v**0.5 * normal(n, 1)
    for density in ("exact", "line"):
        solver = MALA(steps_per_level=1, step_size=share * v / 0.25, density=density, nodes=2)
        noise = BatchNoise(start, generator(3))
        got = solver.solve(ReverseProcess(denoiser), start, [t, 0.999999 * t], noise).acceptance
        for rate in got:
            # a binomial share, and the kink of min(1, .) under 200 nodes: 1 / 200^2
            assert rate == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / n) + 1e-4)


def test_warm_up_adapts_each_sample() -> None:
    """From steps ten times too short or a hundred times too long to the acceptance that is asked for.

    After k = 100 steps of size 1 / sqrt(k), log e is right to its own fluctuation of sqrt(0.1 var / 2 slope) = 0.15,
    with a chance of variance 0.1 and slope 0.25 in log e: rates are off by 0.25 x 0.15 a sample, less on average.
    """
    sde, d, n = VE(), 16, 300
    t = float(sde.t_of_noise_level(1.0))
    denoiser = GaussianDenoiser(sde, torch.zeros(d, dtype=F64), torch.tensor(0.0, dtype=F64))
    x = normal(n, d)
    for step_size in (0.04, 50.0):
        for asked in (0.574, 0.8):
            solver = MALA(steps_per_level=20, step_size=step_size, warm_up=100, target_acceptance=asked)
            noise = BatchNoise(x, generator(1))
            got = solver.solve(ReverseProcess(denoiser), x, [t, 0.999999 * t], noise).acceptance
            assert got == pytest.approx((asked, asked), abs=0.04)
    fixed = MALA(steps_per_level=20, step_size=50.0).solve(
        ReverseProcess(denoiser), x, [t, 0.999999 * t], BatchNoise(x, generator(1))
    )
    assert max(fixed.acceptance) < 0.01


@pytest.mark.parametrize("n", range(2, 11))
def test_gauss_lobatto(n: int) -> None:
    """Exact to degree 2 n - 3 and no further, with both ends among the nodes."""
    rule = lobatto(n)
    assert [rule[0][0], rule[-1][0]] == [0.0, 1.0]
    for degree in range(2 * n - 1):
        error = sum(w * x**degree for x, w in rule) - 1 / (degree + 1)
        assert (abs(error) < 1e-14) == (degree <= 2 * n - 3)


def test_the_line_integral_is_the_difference_of_log_densities() -> None:
    sde = VP()
    t = float(sde.t_of_noise_level(0.3))
    denoiser = mixture().denoiser(sde)
    x, y = 0.8 * normal(200, 2), 0.8 * normal(200, 2, seed=1)
    d = 0.25 * (y - x)
    exact = denoiser.log_prob(x + d, t) - denoiser.log_prob(x, t)

    def error(n: int, parts: int = 1) -> float:
        total = torch.zeros(200, dtype=F64)
        for part in range(parts):
            for place, weight in lobatto(n):
                total += weight / parts * (denoiser.score(x + (part + place) / parts * d, t) * d).sum(1)
        return float((total - exact).norm())

    assert error(10, 8) < 1e-12 * float(exact.norm())  # rounding
    for n in (2, 3, 4):  # composite rules: order 2 n - 2
        assert math.log2(error(n, 16) / error(n, 32)) == pytest.approx(2 * n - 2, abs=0.05)


def test_density_and_line_integral_accept_alike() -> None:
    sde = VP()
    draws, x = normal(60, 100, 2, seed=1), normal(100, 2)
    times = np.geomspace(0.5, 0.2, 4).tolist()
    one = GaussianDenoiser(sde, torch.tensor([0.2, -0.1], dtype=F64), 0.25 * torch.eye(2, dtype=F64))
    # quadratic: two nodes are exact; smooth: ten are all but exact, and no variate falls into the difference
    for denoiser, nodes in ((one, 2), (mixture().denoiser(sde), 10)):
        a, b = (
            MALA(steps_per_level=6, step_size=0.7, density=density, nodes=nodes).solve(
                ReverseProcess(denoiser), x, times, RecordedNoise(draws)
            )
            for density in ("exact", "line")
        )
        torch.testing.assert_close(a.x, b.x, rtol=1e-11, atol=1e-11)
        assert a.acceptance == b.acceptance
        assert max(a.acceptance) < 1
        assert a.nfe == 4 * 2 * (1 + 6)
        assert b.nfe == 4 * (1 + 6 * (nodes - 1))


def test_exact_acceptance_needs_a_density() -> None:
    x = normal(2, 3)
    network = Denoiser(RandomNetwork(3, dtype=F64), VP(), Eps()).requires_grad_(False)
    with pytest.raises(UserError, match=r"solver\.density='exact'.*log_prob.*'line'"):
        MALA(density="exact").solve(ReverseProcess(network), x, [1.0, 0.5], BatchNoise(x))


# The box


class Flat(AbstractDenoiser):
    """A uniform law: no score."""

    def __init__(self, sde: SDE) -> None:
        super().__init__()
        self.sde = sde

    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        assert name == "score"
        return torch.zeros_like(x)


class Chain1D:
    """x <- x + e s(x) + sqrt(2 e) z on a fine lattice: its stationary law and that of the diffusion it stands for.

    Both are found with the trapezoidal rule, exact to rounding for the chain, whose densities are sums of Gaussians
    sampled 8 times a standard deviation, and to 1e-3 for the kinks of the diffusion's.
    """

    def __init__(self, score: Callable[[np.ndarray], np.ndarray], log_p: Callable[[np.ndarray], np.ndarray], e: float):
        spread = math.sqrt(2 * e)
        self.x = np.arange(-2.5, 2.5, spread / 8)
        h = self.x[1] - self.x[0]
        drifted = self.x + e * score(self.x)
        kernel = np.exp(-((self.x[:, None] - drifted) ** 2) / (4 * e)) * h / math.sqrt(4 * math.pi * e)
        density = np.exp(log_p(self.x) - log_p(self.x).max())
        self.diffusion = density / density.sum() / h
        stationary = np.ones_like(self.x)
        for _ in range(30):  # squarings
            kernel = kernel @ kernel
            kernel /= kernel.sum(0)
        stationary = kernel @ self.diffusion
        self.chain = stationary / stationary.sum() / h
        self.h = h

    def cdf(self, x: Tensor) -> Tensor:
        cumulated = (np.cumsum(self.chain) - 0.5 * self.chain) * self.h
        return torch.from_numpy(np.interp(x.numpy(), self.x, cumulated))

    @property
    def bias(self) -> float:
        """Total variation between the two."""
        return 0.5 * float(np.abs(self.chain - self.diffusion).sum()) * self.h


def box_of(
    sde: SDE, solver: BoxLangevin, mean: float | None
) -> tuple[AbstractDenoiser, Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """A denoiser, of N(mean, 0.6^2) or flat, and the score and log density of its box, at the solver's level."""
    t = float(sde.t_of_noise_level(solver.noise_level))
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    low, high, width = alpha * solver.low, alpha * solver.high, alpha * solver.width
    v = math.inf if mean is None else alpha**2 * 0.36 + sigma**2
    m = alpha * (mean or 0.0)
    data: AbstractDenoiser = Flat(sde)
    if mean is not None:
        data = GaussianDenoiser(sde, torch.tensor([mean], dtype=F64), torch.tensor(0.36, dtype=F64))
    adds = solver.outside == "add"

    def score(x: np.ndarray) -> np.ndarray:
        outside = x - np.clip(x, low, high)
        return -(x - m) / v * (adds | (outside == 0)) - outside / width**2

    def log_p(x: np.ndarray) -> np.ndarray:
        nearest = np.clip(x, low, high)
        return -(((x if adds else nearest) - m) ** 2) / (2 * v) - (x - nearest) ** 2 / (2 * width**2)

    return data, score, log_p


@pytest.mark.parametrize("sde", [VP(), VE()], ids=["vp", "ve"])
@pytest.mark.parametrize("mean", [None, 0.8], ids=["uniform", "gaussian"])
@pytest.mark.parametrize("outside", ["replace", "add"])
def test_law_in_the_box(outside: str, mean: float | None, sde: SDE) -> None:
    """Samples follow the stationary law of the chain, which is that of the box up to a bias of first order in e."""
    n = 20_000
    options: dict[str, Any] = {"noise_level": 0.4, "low": -0.9, "high": 1.1, "width": 0.2, "outside": outside}
    solver = BoxLangevin(steps=150, step_size=0.1, **options)
    denoiser, score, log_p = box_of(sde, solver, mean)
    t = float(sde.t_of_noise_level(0.4))
    e = 0.1 * float(sde.sigma(t)) ** 2
    chain = Chain1D(score, log_p, e)
    x = sde.prior_std * normal(n, 1)
    solution = solver.solve(ReverseProcess(denoiser), x, [sde.T, 0.01], BatchNoise(x, generator(5)))
    assert solution.times == (sde.T, t)
    assert solution.nfe == 150
    # the slowest mode of the flat box, cos(pi y / 2), falls by exp(-pi^2 / 4 x 150 e) = 0.003 from a start near it
    assert abs(chi_square(chain.cdf(solution.x[:, 0]))) < 5
    # e / width^2 = 0.4, so that kinks at the faces show: a few per cent, and half of it at half the step
    assert chain.bias < 0.05
    assert math.log2(chain.bias / Chain1D(score, log_p, e / 2).bias) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("final", ["none", "mean", "tweedie"])
@pytest.mark.parametrize("outside", ["replace", "add"])
def test_box_step_by_hand(outside: str, final: str) -> None:
    sde, level = VP(), 0.5
    solver = BoxLangevin(noise_level=level, steps=3, step_size=0.3, low=-0.5, high=0.4, width=0.3, outside=outside)
    solver = BoxLangevin(**{**vars(solver), "final": final, "start": "normal"})
    t = float(sde.t_of_noise_level(level))
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    denoiser, z, draws = mixture().denoiser(sde), 2 * normal(50, 2), normal(3, 50, 2, seed=1)
    x, e = alpha * (-0.05 + 0.45 * z), 0.3 * sigma**2
    seen = 0
    for draw in draws:
        near = torch.minimum(torch.maximum(x, torch.tensor(-0.5 * alpha)), torch.tensor(0.4 * alpha))
        near = torch.where((x < -0.5 * alpha), -0.5 * alpha, torch.where(x > 0.4 * alpha, 0.4 * alpha, x))
        force = -(x - near) / (0.3 * alpha) ** 2
        if outside == "add":
            s = denoiser.score(x, t) + force
        else:
            s = torch.where(x == near, denoiser.score(near, t), force)
        seen += int((x != near).sum())
        mean = x + e * s
        x = mean + math.sqrt(2 * e) * draw
    assert 50 < seen < 250
    expected = {"none": x, "mean": mean, "tweedie": denoiser.denoised(x, t)}[final]
    process = ReverseProcess(denoiser)
    solution = solver.solve(process, z, [1.0, 0.01], RecordedNoise(draws))
    torch.testing.assert_close(solution.x, expected, rtol=1e-11, atol=1e-11)
    assert solution.nfe == process.nfe == 3 + (final == "tweedie")


def test_a_uniform_start() -> None:
    sde, n = VE(), 20_000
    solver = BoxLangevin(noise_level=0.1, low=-0.3, high=0.8)
    t = solver.time(ReverseProcess(Flat(sde)))
    x = solver.begin(ReverseProcess(Flat(sde)), sde.prior_std * normal(n, 1), t)
    assert abs(chi_square((x[:, 0] + 0.3) / 1.1)) < 5


def test_progress_in_the_box() -> None:
    x, told = normal(3, 2), []
    solver = BoxLangevin(steps=25)
    process = ReverseProcess(mixture().denoiser(VP()))
    times = uniform(1.0, 0.01, 10)
    solution = solver.solve(process, x, times, BatchNoise(x, generator()), lambda *args: told.append(args))
    assert [share for share, *_ in told] == [math.ceil(2.5 * k) / 25 for k in range(1, 11)]
    assert torch.equal(told[-1][2], solution.x)


# Predictors


@pytest.mark.parametrize(
    "name", [name for name, cls in SOLVERS.items() if cls.default_steps is not None and name not in SEEDED]
)
def test_any_solver_of_single_steps_predicts(name: str) -> None:
    """Without corrector `pc` is the solver; solvers that remember, or stay, are refused by name."""
    sde = VP()
    times = between(sde, 6)
    x, draws = normal(5, 2), list(normal(40, 5, 2, seed=1))
    denoiser = mixture().denoiser(sde)

    def run(solver: Solver) -> tuple[Tensor, int, int]:
        process, noise = ReverseProcess(denoiser), RecordedNoise(draws)
        solution = solver.solve(process, x, times, noise)
        return solution.x, solution.nfe, noise.used

    if name in [*STAYING, "pc"]:
        with pytest.raises(UserError, match=f"solver.predictor='{name}' does not take the steps"):
            PredictorCorrector(predictor=name)
        return
    whole, left, halves = run(SOLVERS.get(name)())[0], RecordedNoise(draws), x
    for part in (times[:4], times[3:]):
        halves = SOLVERS.get(name)().solve(ReverseProcess(denoiser), halves, part, left).x
    if not torch.allclose(halves, whole, rtol=1e-9):  # it remembers
        with pytest.raises(UserError, match=f"solver.predictor='{name}' remembers earlier steps"):
            run(PredictorCorrector(predictor=name))
        return
    for final in ("none", "mean", "tweedie"):
        alone: Any = SOLVERS.get(name)
        a, b = run(PredictorCorrector(predictor=name, corrector="none", final=final)), run(alone(final=final))
        assert torch.equal(a[0], b[0])
        assert a[1:] == b[1:]


@every_sde
@pytest.mark.parametrize("name", ["heun", "dpmpp_2s_ancestral"])
@pytest.mark.parametrize("position", ["before", "after"])
def test_prediction_and_correction_in_turn(name: str, position: str, sde: SDE) -> None:
    times = between(sde, 3)
    x, draws = normal(5, 2), list(normal(40, 5, 2, seed=1))
    denoiser, left, by_hand = mixture().denoiser(sde), RecordedNoise(draws), x
    for t, s in pairwise(times):
        for part in ("correct", "predict") if position == "before" else ("predict", "correct"):
            if part == "predict":
                by_hand = SOLVERS.get(name)().solve(ReverseProcess(denoiser), by_hand, [t, s], left).x
                continue
            at = t if position == "before" else s
            e = 2 * (0.16 * float(sde.alpha(t) / sde.alpha(s)) * float(sde.sigma(at))) ** 2
            for _ in range(2):
                by_hand = by_hand + e * denoiser.score(by_hand, at) + math.sqrt(2 * e) * left()
    solver = PredictorCorrector(predictor=name, corrector_steps=2, corrector_position=position)
    got = solver.solve(ReverseProcess(denoiser), x, times, RecordedNoise(draws)).x
    torch.testing.assert_close(got, by_hand, rtol=1e-11, atol=1e-11)


# Independence of the batch


def test_acceptance_belongs_to_the_sample() -> None:
    """Adapted step sizes, many rejections: samples 10 to 16 alone are what they are among 64."""
    denoiser, d = mixture().denoiser(VP()), 2

    def run(indices: range) -> Tensor:
        noise = SampleNoise(3, indices, (d,), dtype=F64)
        solver = MALA(steps_per_level=4, warm_up=6, step_size=5.0)
        return solver.solve(ReverseProcess(denoiser), noise(), uniform(0.6, 0.2, 5), noise).x

    torch.testing.assert_close(run(range(64))[10:17], run(range(10, 17)), rtol=1e-11, atol=1e-11)


# What is refused


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (Langevin, {"steps_per_level": 0}, "solver.steps_per_level=0"),
        (Langevin, {"steps_per_level": 1.5}, r"solver.steps_per_level=1.5.*whole"),
        (Langevin, {"snr": -0.1}, "solver.snr=-0.1"),
        (Langevin, {"final": "last"}, "solver.final='last'"),
        (AnnealedLangevin, {"steps_per_level": 0}, "solver.steps_per_level=0"),
        (AnnealedLangevin, {"step_size": 2.0}, r"solver.step_size=2.*below 2"),
        (MALA, {"step_size": 0.0}, "solver.step_size=0"),
        (MALA, {"warm_up": -1}, "solver.warm_up=-1"),
        (MALA, {"target_acceptance": 1.0}, "solver.target_acceptance=1"),
        (MALA, {"density": "lines"}, r"solver.density='lines'.*did you mean 'line'"),
        (MALA, {"nodes": 1}, r"solver.nodes=1.*at least 2"),
        (MALA, {"nodes": 11}, r"solver.nodes=11.*at most 10"),
        (BoxLangevin, {"noise_level": 0.0}, "solver.noise_level=0"),
        (BoxLangevin, {"steps": 0}, "solver.steps=0"),
        (BoxLangevin, {"high": -1.0}, "solver.high=-1"),
        (BoxLangevin, {"width": 0.01}, r"solver.width=0.01.*overshoot.*at least 0.0316"),
        (BoxLangevin, {"outside": "clip"}, "solver.outside='clip'"),
        (BoxLangevin, {"start": "prior"}, "solver.start='prior'"),
        (PredictorCorrector, {"predictor": "ode"}, "solver.predictor='ode' does not take the steps"),
        (PredictorCorrector, {"predictor": "hoin"}, r"solver.predictor='hoin'"),
        (PredictorCorrector, {"predictor": "heun", "probability_flow": True}, "solver.probability_flow=true"),
        (PredictorCorrector, {"predictor": "heun", "discretization": "score_sde"}, "solver.predictor='heun'"),
    ],
)
def test_bad_options_are_named(cls: type[Solver], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        cls(**options)


def test_a_level_that_the_process_has_not() -> None:
    x = normal(2, 2)
    with pytest.raises(UserError, match=r"solver.noise_level=100 is not between 0.010\d* and 50"):
        BoxLangevin(noise_level=100.0, width=50.0).solve(ReverseProcess(Flat(VE())), x, [1.0, 0.5], BatchNoise(x))
