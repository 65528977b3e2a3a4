"""Denoising score matching against the weights as defined, quadrature, and closed forms for Gaussian data."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from sde.broadcast import expand
from sde.denoiser import Denoiser, GaussianDenoiser
from sde.errors import UserError
from sde.losses import TIMES, WEIGHTINGS, DenoisingScoreMatching
from sde.parameterizations import Eps, Parameterization
from sde.processes import EDM, SDE, VE, VP
from tests.problems import (
    F64,
    ODD_SDES,
    Fixed,
    NetworkFromDenoiser,
    RandomNetwork,
    gaussian,
    generator,
    mixture,
    moderate,
    normal,
    parameterizations,
    sdes,
    times_of,
)

every_sde = pytest.mark.parametrize("sde", sdes())
every_time = pytest.mark.parametrize("time", TIMES)
every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS)
CELLS = 1024  # of the importance distribution


def levels(sde: SDE) -> tuple[float, float]:
    """log(sigma / alpha) at t_min and T, from the definition."""
    low, high = (math.log(float(sde.sigma(t)) / float(sde.alpha(t))) for t in (sde.t_min, sde.T))
    return low, high


# Weights


@every_sde
def test_weights_as_defined(sde: SDE) -> None:
    t = times_of(sde)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    u, gamma, s_data = sigma / alpha, 3.0, 0.4
    snr = (alpha / sigma) ** 2
    # lambda on the score or on x_0, brought to the error of eps: score = -eps / sigma, x_0 = (x - sigma eps) / alpha
    expected = {
        "sigma2": sigma**2 / sigma**2,
        "likelihood": sde.g(t) ** 2 / sigma**2,
        "uniform": 1 / sigma**2,
        "edm": (u**2 + s_data**2) / (u * s_data) ** 2 * u**2,
        "min_snr": torch.minimum(snr, torch.tensor(gamma)) * u**2,
    }
    assert set(expected) == set(WEIGHTINGS)
    for weighting, weight in expected.items():
        loss = DenoisingScoreMatching(weighting=weighting, gamma=gamma, sigma_data=s_data)
        torch.testing.assert_close(loss.weight(sde, t), weight, rtol=1e-11, atol=0)


@every_weighting
@every_sde
def test_weights_in_terms_of_the_score_and_of_x0(sde: SDE, weighting: str) -> None:
    """The weighted loss of a denoiser that is wrong is lambda times its error in the score, or in x_0."""
    t = torch.tensor(moderate(sde), dtype=F64)
    x0, z = normal(2, 3), normal(2, 3, seed=1)
    wrong = Denoiser(Fixed(z + 0.1 * normal(2, 3, seed=2)), sde, Eps())
    x = sde.perturb(x0, t, z)
    sigma, alpha = sde.sigma(t), sde.alpha(t)
    score_error = (wrong.score(x, t) + z / expand(sigma, z)).square().mean(1)
    x0_error = (wrong.denoised(x, t) - x0).square().mean(1)
    u = sigma / alpha
    expected = {
        "sigma2": sigma**2 * score_error,
        "likelihood": sde.g(t) ** 2 * score_error,
        "uniform": score_error,
        "edm": (u**2 + 0.25) / (0.5 * u) ** 2 * x0_error,
        "min_snr": (1 / u**2).clamp_max(5.0) * x0_error,
    }[weighting]
    loss, eps_error = DenoisingScoreMatching(weighting=weighting).at(wrong, x0, z, t)
    # x_0 and the score are recovered from sums of numbers of size x: condition below 1e3 at these noise levels
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(eps_error, (0.1 * normal(2, 3, seed=2)).square().mean(1), rtol=1e-11, atol=0)


# Distributions of t


@every_time
@every_sde
def test_density_integrates_to_one(sde: SDE, time: str) -> None:
    loss = DenoisingScoreMatching(time=time, weighting="likelihood" if time == "importance" else "sigma2")
    low, high = levels(sde)

    # over log u, in which every density is smooth: dt = du-slope 2 sigma^2 / g^2
    def integrand(level: float) -> float:
        t = sde.t_of_noise_level(math.exp(level)).clamp(sde.t_min, sde.T)
        return float(loss.density(sde, t) * 2 * sde.sigma(t) ** 2 / sde.g(t) ** 2)

    total, _ = quad(integrand, low, high, epsabs=1e-10, epsrel=1e-10, limit=200)
    assert total == pytest.approx(1, abs=1e-8)


@every_weighting
@every_sde
def test_importance_is_proportional_to_the_weight(sde: SDE, weighting: str) -> None:
    loss = DenoisingScoreMatching(time="importance", weighting=weighting)
    t = sde.t_of_noise_level(torch.exp(torch.linspace(*levels(sde), 400, dtype=F64)[1:-1]))
    ratio = torch.log(loss.weight(sde, t) / loss.density(sde, t))
    # constant but for the steps of the table: over half a cell, log w - log speed moves by half a cell times its slope
    low, high = levels(sde)
    fine = torch.linspace(low, high, 20_000, dtype=F64)[1:-1]
    at = sde.t_of_noise_level(torch.exp(fine))
    slope = (torch.log(loss.weight(sde, at) / (sde.g(at) / sde.sigma(at)) ** 2).diff() / fine.diff()).abs().max()
    assert float(ratio.max() - ratio.min()) <= 1.01 * float(slope) * (high - low) / CELLS + 1e-9
    # and it is the distribution with density w / integral of w, to the order of the midpoint rule
    integral = np.trapezoid((loss.weight(sde, at) * 2 * sde.sigma(at) ** 2 / sde.g(at) ** 2).numpy(), fine.numpy())
    assert float(ratio.mean()) == pytest.approx(
        math.log(integral), abs=1.01 * float(slope) * (high - low) / CELLS + 1e-3
    )


def quantile_and_density(loss: DenoisingScoreMatching, sde: SDE, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t, dt/du by autograd, and the stated density at t."""
    u = u.clone().requires_grad_()
    t = loss.quantile(sde, u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    return t.detach(), slope, loss.density(sde, t.detach())


@every_time
@every_sde
def test_density_is_the_derivative_of_the_quantile(sde: SDE, time: str) -> None:
    for weighting in WEIGHTINGS if time == "importance" else ("sigma2",):
        loss = DenoisingScoreMatching(time=time, weighting=weighting)
        u = (torch.arange(997, dtype=F64) + 0.5) / 997
        t, slope, density = quantile_and_density(loss, sde, u)
        assert float(t.min()) >= sde.t_min
        assert float(t.max()) <= sde.T
        inside = slope != 0  # a draw on the very end is cut to it
        # t may fall with u or rise; the tails of the normal are known to 1e-9 of themselves or better
        torch.testing.assert_close(
            (slope.abs() * density)[inside], torch.ones(int(inside.sum()), dtype=F64), rtol=1e-7, atol=0
        )
        assert int(inside.sum()) > 900
        steps = t.diff()
        assert (steps >= 0).all() or (steps <= 0).all()


@every_sde
def test_quantiles_as_defined(sde: SDE) -> None:
    u = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    low, high = levels(sde)
    uniform = DenoisingScoreMatching().quantile(sde, u)
    torch.testing.assert_close(uniform, sde.t_min + u * (sde.T - sde.t_min), rtol=1e-14, atol=0)
    level = torch.log(sde.noise_level(DenoisingScoreMatching(time="log_snr").quantile(sde, u)))
    torch.testing.assert_close(level, low + u * (high - low), rtol=1e-9, atol=1e-9)
    mean, std = 0.5 * (low + high), 0.1 * (high - low)  # five deviations inside: the cut does not matter to 1e-6
    loss = DenoisingScoreMatching(time="log_normal", log_normal_mean=mean, log_normal_std=std)
    level = torch.log(sde.noise_level(loss.quantile(sde, u)))
    torch.testing.assert_close(
        (level - mean) / std, torch.tensor([-1.2815515655, 0, 1.2815515655], dtype=F64), rtol=0, atol=1e-5
    )


@every_sde
def test_likelihood_importance_is_uniform_in_the_log_snr(sde: SDE) -> None:
    # w = g^2 / sigma^2 = 2 d log u / dt: arXiv 2106.02808's invariance
    u = torch.linspace(0.01, 0.99, 50, dtype=F64)
    a = DenoisingScoreMatching(time="importance", weighting="likelihood")
    b = DenoisingScoreMatching(time="log_snr", weighting="likelihood")
    # 1024 shares that are equal to rounding, summed
    torch.testing.assert_close(a.quantile(sde, u), b.quantile(sde, u), rtol=1e-10, atol=1e-15)
    t = b.quantile(sde, u)
    torch.testing.assert_close(a.density(sde, t), b.density(sde, t), rtol=1e-10, atol=0)
    # and every example then counts alike
    weight = a.weight(sde, t) / a.density(sde, t)
    torch.testing.assert_close(weight, weight.mean().expand(50), rtol=1e-10, atol=0)


@pytest.mark.parametrize("sde", [VP(), VE(), EDM()])
def test_far_tails_of_the_log_normal(sde: SDE) -> None:
    """A normal that lies beside the range of noise levels, or is far wider, is still cut correctly."""
    low, high = levels(sde)
    # what is above 1 - 1e-16 has no float64: on the lower side of the range it may lie only some deviations away
    for mean, std in ((low - 2.0, 0.5), (high + 15.0, 0.5), (0.5 * (low + high), 100.0)):
        loss = DenoisingScoreMatching(time="log_normal", log_normal_mean=mean, log_normal_std=std)
        u = torch.linspace(0.05, 0.95, 19, dtype=F64)
        t, slope, density = quantile_and_density(loss, sde, u)
        torch.testing.assert_close(slope.abs() * density, torch.ones(19, dtype=F64), rtol=1e-5, atol=0)
        assert float(t.min()) > sde.t_min
        assert float(t.max()) < sde.T


# The expectation does not depend on how t is drawn


def expected_error(sde: SDE, t: Tensor, std: float) -> Tensor:
    """E |eps - z|^2 / D of the exact denoiser of N(m, std^2): the variance of z given x_t."""
    signal = (sde.alpha(t) * std) ** 2
    return signal / (signal + sde.sigma(t) ** 2)


def example_weight(loss: DenoisingScoreMatching, sde: SDE, t: Tensor) -> Tensor:
    """The weight that `at` puts on the error of an example at each of the times."""
    always_wrong = Denoiser(Fixed(torch.ones(len(t), 1, dtype=F64)), sde, Eps())
    zero = torch.zeros(len(t), 1, dtype=F64)
    weighted, error = loss.at(always_wrong, zero, zero, t)
    assert torch.equal(error, torch.ones_like(t))
    return weighted


@every_time
@every_weighting
@every_sde
def test_expectation_is_that_of_uniform_t(sde: SDE, weighting: str, time: str) -> None:
    """Quadrature in u through the quantile function = quadrature in t, with the weights that training uses.

    u runs through tanh-sinh nodes, for the integrand may rise steeply at either end.
    """
    std = 0.5
    loss = DenoisingScoreMatching(weighting=weighting, time=time)
    nodes = torch.linspace(-5, 5, 7001, dtype=F64)
    inner = 0.5 * math.pi * torch.sinh(nodes)
    u, slope = torch.sigmoid(2 * inner), 0.5 * 0.5 * math.pi * torch.cosh(nodes) / torch.cosh(inner) ** 2
    keep = (u > 0) & (u < 1)
    u, slope = u[keep], slope[keep]
    t = loss.quantile(sde, u)
    by_draws = float((example_weight(loss, sde, t) * expected_error(sde, t, std) * slope).sum() * (10 / 7000))

    # in log t, in which the integrand is smooth
    log_t = torch.linspace(math.log(sde.t_min), math.log(sde.T), 200_001, dtype=F64)
    at = torch.exp(log_t).clamp(sde.t_min, sde.T)
    plain = replace(loss, time="uniform")
    values = plain.weight(sde, at) * expected_error(sde, at, std) * at / (sde.T - sde.t_min)
    by_time = float(torch.trapezoid(values, log_t))
    # importance: a staircase of 1024 steps of at most 2 % each, averaged by 7001 nodes; else the trapezoid's 1e-8 and
    # the tails of the normal, of which u in steps of 1e-16 resolves what lies below 1 - 1e-13
    assert by_draws == pytest.approx(by_time, rel=2e-3 if time == "importance" else 1e-4)


@pytest.mark.parametrize("sde", sdes(odd=False))
@pytest.mark.parametrize("weighting", ["sigma2", "min_snr", "likelihood"])
def test_expectation_by_drawing(sde: SDE, weighting: str) -> None:
    """The same through `__call__`: draws of t and z and a batch of data, within five standard errors."""
    std, n = 0.5, 20_000
    denoiser = gaussian(sde, 0.7, std)
    x0 = denoiser.sample(n, generator(1))
    at = torch.exp(torch.linspace(math.log(sde.t_min), math.log(sde.T), 100_001, dtype=F64)).clamp(sde.t_min, sde.T)
    for time in ("uniform", "log_snr", "importance"):
        for stratified in (False, True):
            loss = DenoisingScoreMatching(weighting=weighting, time=time, stratified=stratified)
            values = loss.weight(sde, at) * expected_error(sde, at, std) / (sde.T - sde.t_min)
            exact = float(torch.trapezoid(values, at))
            got = loss(denoiser, x0, generator(2)).loss
            # the spread of single losses overstates the error of a stratified mean
            assert abs(float(got.mean()) - exact) < 5 * float(got.std()) / n**0.5


@every_time
def test_without_reweighting_the_density_is_the_objective(time: str) -> None:
    sde = EDM()
    loss = DenoisingScoreMatching(weighting="edm", time=time, reweight=False)
    t = times_of(sde, 10)
    torch.testing.assert_close(example_weight(loss, sde, t), loss.weight(sde, t), rtol=1e-14, atol=0)


def test_edm_loss_as_printed() -> None:
    # arXiv 2206.00364, table 1: ln sigma ~ N(-1.2, 1.2^2), lambda = (sigma^2 + sd^2) / (sigma sd)^2 on D
    sde, n, s_data = EDM(), 200_000, 0.5
    loss = DenoisingScoreMatching(weighting="edm", time="log_normal", reweight=False, sigma_data=s_data)
    t = loss.draw_times(sde, n, generator(3), "cpu")
    # cut at 4.7 deviations on either side: 3e-6 of the mass
    level = torch.log(t)
    assert float(level.mean()) == pytest.approx(-1.2, abs=1e-3)
    assert float(level.std()) == pytest.approx(1.2, abs=1e-3)
    x0, z = normal(5, 4), normal(5, 4, seed=1)
    sigma = t[:5]
    network = Denoiser(RandomNetwork(4, dtype=F64), sde, Eps())
    denoised = network.denoised(x0 + sigma[:, None] * z, sigma)
    printed = (sigma**2 + s_data**2) / (sigma * s_data) ** 2 * (denoised - x0).square().mean(1)
    torch.testing.assert_close(loss.at(network, x0, z, sigma)[0], printed, rtol=1e-9, atol=0)


# Drawing


@every_time
@every_sde
def test_one_draw_in_each_stratum(sde: SDE, time: str) -> None:
    loss, n = DenoisingScoreMatching(time=time, weighting="likelihood"), 64
    t = loss.draw_times(sde, n, generator(4), "cpu")
    edges = loss.quantile(sde, torch.arange(1, n, dtype=F64) / n).sort().values
    assert t.dtype == F64
    counts = torch.bincount(torch.bucketize(t, edges), minlength=n)
    assert torch.equal(counts, torch.ones_like(counts))
    free = replace(loss, stratified=False).draw_times(sde, n, generator(4), "cpu")
    assert torch.bincount(torch.bucketize(free, edges), minlength=n).max() > 1


def test_stratifying_keeps_the_mean_and_lowers_the_variance() -> None:
    sde, n, repeats = VP(), 64, 400

    def estimates(stratified: bool) -> Tensor:
        loss = DenoisingScoreMatching(stratified=stratified)
        source = generator(5)
        draws = (loss.draw_times(sde, n, source, "cpu") for _ in range(repeats))
        return torch.stack([expected_error(sde, t, 0.5).mean() for t in draws])

    free, strata = estimates(False), estimates(True)
    t = torch.linspace(sde.t_min, sde.T, 100_001, dtype=F64)
    exact = float(torch.trapezoid(expected_error(sde, t, 0.5), t) / (sde.T - sde.t_min))
    for values in (free, strata):
        assert abs(float(values.mean()) - exact) < 5 * float(values.std()) / repeats**0.5
    # a smooth integrand: variance n^-3 instead of n^-1, times (range of the integrand)^2 over its variance, here 1 / 4
    assert float(strata.var() / free.var()) < 20 / n**2


def test_the_generator_decides() -> None:
    denoiser, x0 = gaussian(VP()), normal(8, 1)
    a, b, c = (DenoisingScoreMatching()(denoiser, x0, generator(s)) for s in (1, 1, 2))
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.t, b.t)
    assert not torch.equal(a.t, c.t)
    again, error = DenoisingScoreMatching().at(denoiser, x0, noise_of(a.t, x0, 1), a.t)
    torch.testing.assert_close(again, a.loss, rtol=0, atol=0)
    torch.testing.assert_close(error, a.eps_error, rtol=0, atol=0)


def noise_of(t: Tensor, x0: Tensor, seed: int) -> Tensor:
    """The noise that `__call__` drew: after the times, from the same generator."""
    source = generator(seed)
    torch.rand(len(t), generator=source, dtype=F64)
    return torch.empty_like(x0).normal_(generator=source)


# The loss of the exact score


@every_sde
def test_loss_of_the_exact_score_of_a_gaussian(sde: SDE) -> None:
    n, std = 200_000, 0.5
    denoiser = gaussian(sde, 0.7, std)
    x0, z = denoiser.sample(n, generator(1)), normal(n, 1, seed=2)
    for t in moderate(sde):
        _, error = DenoisingScoreMatching().at(denoiser, x0, z, torch.full((n,), t, dtype=F64))
        exact = float(expected_error(sde, torch.tensor(t, dtype=F64), std))
        # the error is a centered normal: the variance of its square is 2 exact^2
        assert abs(float(error.mean()) - exact) < 5 * exact * math.sqrt(2 / n)


@pytest.mark.parametrize("sde", sdes(odd=False))
def test_loss_of_the_exact_score_of_a_mixture(sde: SDE) -> None:
    """E |eps(x_t) - z|^2 = D - sigma^2 E |score|^2, the last by quadrature over the plane."""
    law, n = mixture(), 100_000
    denoiser = law.denoiser(sde)
    x0, z = denoiser.sample(n, generator(1)), normal(n, 2, seed=2)
    for t in moderate(sde):
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        side = torch.linspace(-1, 1, 201, dtype=F64) * (3.5 * alpha + 7 * sigma)
        points = torch.cartesian_prod(side, side)
        density = law.marginal(alpha, sigma).log_prob(points).exp() * float(side[1] - side[0]) ** 2
        assert float(density.sum()) == pytest.approx(1, abs=1e-9)
        exact = (2 - sigma**2 * float((law.score(points, alpha, sigma).square().sum(1) * density).sum())) / 2
        _, error = DenoisingScoreMatching().at(denoiser, x0, z, torch.full((n,), t, dtype=F64))
        assert abs(float(error.mean()) - exact) < 5 * float(error.std()) / n**0.5
        # no score does better: the loss of any other exceeds it by the error of its eps
        worse = GaussianDenoiser(sde, law.weights @ law.means, torch.tensor(0.6, dtype=F64))
        _, more = DenoisingScoreMatching().at(worse, x0, z, torch.full((n,), t, dtype=F64))
        assert float(more.mean()) > float(error.mean())


@pytest.mark.parametrize("parameterization", parameterizations())
@every_sde
def test_loss_of_a_perfect_network_is_that_of_the_denoiser(sde: SDE, parameterization: Parameterization) -> None:
    # Denoiser compares F to its own target; the exact denoiser goes through eps
    exact = mixture().denoiser(sde)
    perfect = Denoiser(NetworkFromDenoiser(exact, parameterization, "log_sigma"), sde, parameterization)
    t = times_of(sde, 5)[:-1]
    x0, z = exact.sample(len(t), generator(1)), normal(len(t), 2)
    for weighting in WEIGHTINGS:
        loss = DenoisingScoreMatching(weighting=weighting)
        # the time read back from a label, and for x_0 the division by sigma, down to 1e-10 here
        torch.testing.assert_close(loss.at(perfect, x0, z, t)[0], loss.at(exact, x0, z, t)[0], rtol=1e-5, atol=1e-12)


# Types, gradients


@pytest.mark.parametrize("parameterization", parameterizations())
@pytest.mark.parametrize("sde", sdes(odd=False))
def test_losses_in_float32_next_to_the_data(sde: SDE, parameterization: Parameterization) -> None:
    """At t_min, in float32, the loss is that of float64 to a few roundings of the error's own condition."""
    n = 64
    x0, z = normal(n, 5).float(), normal(n, 5, seed=1).float()
    t = torch.full((n,), sde.t_min, dtype=F64)
    p, q = (expand(c, x0) for c in parameterization.direction(sde, t))
    f = (p * x0 + q * z) * (1 + 0.3 * normal(n, 5, seed=2))  # a network that is off by 30 %
    loss = DenoisingScoreMatching(weighting="uniform")
    single = loss.at(Denoiser(Fixed(f.float()), sde, parameterization), x0, z, t)[0]
    double = loss.at(Denoiser(Fixed(f), sde, parameterization), x0.double(), z.double(), t)[0]
    assert single.dtype == torch.float32
    # f - target with both rounded: relative error 2^-23 / 0.3 of a typical entry, doubled by the square
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)


class HalfNetwork(nn.Module):
    """A network that computes in bfloat16 and says so in its output."""

    noise_label = "log_sigma"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return self.inner(x, c_noise, label).bfloat16()


@pytest.mark.parametrize("sde", sdes(odd=False))
def test_a_bfloat16_network_has_a_float32_loss(sde: SDE) -> None:
    inner, x0 = RandomNetwork(6), normal(32, 6).float()
    loss = DenoisingScoreMatching()
    full = loss(Denoiser(inner, sde, Eps()), x0, generator(1))
    half = loss(Denoiser(HalfNetwork(inner), sde, Eps()), x0, generator(1))
    assert half.loss.dtype == torch.float32
    # eps in bfloat16 is off by 2^-9 of itself: |e + d|^2 - |e|^2 <= 2 |e| |d| + |d|^2 with |F| below 2 a entry
    bound = 2 * (full.eps_error.sqrt() * 2 * 2**-9) + (2 * 2**-9) ** 2
    assert ((half.loss - full.loss).abs() <= bound).all()
    assert not torch.equal(half.loss, full.loss)
    # and under autocast
    with torch.autocast("cpu", torch.bfloat16):
        auto = loss(Denoiser(inner, sde, Eps()), x0, generator(1))
    assert auto.loss.dtype == torch.float32
    # three roundings in a row, of the input, the hidden layer and the product
    assert ((auto.loss - full.loss).abs() <= 8 * bound).all()


def test_data_in_bfloat16_still_have_a_float32_loss() -> None:
    x0 = normal(4, 6).bfloat16()
    got = DenoisingScoreMatching()(Denoiser(RandomNetwork(6, dtype=torch.bfloat16), VP(), Eps()), x0, generator(1))
    assert got.loss.dtype == got.eps_error.dtype == torch.float32


@pytest.mark.parametrize("parameterization", parameterizations())
@every_sde
def test_gradients_are_finite_next_to_the_data(sde: SDE, parameterization: Parameterization) -> None:
    for weighting in WEIGHTINGS:
        network = RandomNetwork(5)
        denoiser = Denoiser(network, sde, parameterization)
        t = torch.tensor([sde.t_min, sde.T], dtype=F64)
        loss, _ = DenoisingScoreMatching(weighting=weighting).at(
            denoiser, normal(2, 5).float(), normal(2, 5).float(), t
        )
        loss.sum().backward()
        grads = [p.grad for p in (network.into, network.time, network.out)]
        assert all(bool(torch.isfinite(g).all()) for g in grads)
        assert all(float(g.abs().max()) > 0 for g in grads)


def test_gradient_is_that_of_the_squared_error() -> None:
    # float64 central differences in one weight
    sde, x0, z = VP(), normal(6, 3), normal(6, 3, seed=1)
    network, t = RandomNetwork(3, dtype=F64), torch.linspace(0.1, 0.9, 6, dtype=F64)
    denoiser, loss = Denoiser(network, sde, Eps()), DenoisingScoreMatching(weighting="likelihood")
    loss.at(denoiser, x0, z, t)[0].mean().backward()
    values, h = [], 1e-5
    for sign in (1, -1):
        with torch.no_grad():
            network.out[2, 1] += sign * h
            values.append(float(loss.at(denoiser, x0, z, t)[0].mean()))
            network.out[2, 1] -= sign * h
    assert float(network.out.grad[2, 1]) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-7)


def test_labels_are_passed_on() -> None:
    network, label = RandomNetwork(3, dtype=F64), torch.tensor([1, 2])
    DenoisingScoreMatching()(Denoiser(network, VP(), Eps()), normal(2, 3), generator(0), label)
    assert network.labels == [label]


# Errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weighting": "sigma"}, r"loss.weighting='sigma'.*did you mean 'sigma2'"),
        ({"time": "lognormal"}, r"loss.time='lognormal'.*did you mean 'log_normal'"),
        ({"gamma": 0.0}, "loss.gamma=0"),
        ({"sigma_data": -1.0}, "loss.sigma_data=-1"),
        ({"log_normal_std": 0.0}, "loss.log_normal_std=0"),
        ({"log_normal_mean": math.nan}, "loss.log_normal_mean=nan"),
    ],
)
def test_bad_options_are_named(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        DenoisingScoreMatching(**options)


def test_odd_processes_are_distinct() -> None:
    # cached tables belong to one SDE and one loss: two that differ in T alone must not share them
    loss = DenoisingScoreMatching(time="importance", weighting="likelihood")
    u = torch.tensor([0.5], dtype=F64)
    values = {float(loss.quantile(sde, u)) for sde in (VP(), VP(T=2.0), ODD_SDES["vp-odd"])}
    assert len(values) == 3
