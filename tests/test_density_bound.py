"""Variational bounds against closed forms for Gaussian data, torch.distributions, and DDPM's formulas written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from sde.broadcast import Time, expand
from sde.denoiser import AbstractDenoiser, Denoiser, GaussianMixtureDenoiser
from sde.density.bound import (
    VARIANCES,
    Bound,
    Decoder,
    continuous_bound,
    discrete_bound,
    integrand,
    log_snr_range,
    prior_term,
    quantile,
)
from sde.density.quantization import Quantization, bits_per_dim
from sde.errors import UserError
from sde.parameterizations import Eps
from sde.processes import EDM, SDE, VE, VP, SubVP
from tests.problems import F64, RandomNetwork, all_grids, gaussian, mixture, normal, observed_order, sdes

every_sde = pytest.mark.parametrize("sde", sdes())
MEAN, STD = 0.7, 0.5
ENDS = torch.tensor([[MEAN - STD], [MEAN + STD]], dtype=F64)
"""Two data points with the mean and the variance of N(MEAN, STD^2), hence with its mean of everything quadratic."""


class MeanError(AbstractDenoiser):
    """The exact denoiser of N(MEAN, STD^2), its squared error replaced by the mean over z for the given x_0.

    With u = sigma / alpha, eps - z = (u (x_0 - MEAN) - STD^2 z) / (STD^2 + u^2): bounds, in which nothing but squared
    errors appears, come out as their expectation, whatever the noise.
    """

    def __init__(self, sde: SDE) -> None:
        super().__init__()
        self.sde = sde

    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        raise AssertionError("bounds ask for the error of eps")

    def eps_error(self, x0: Tensor, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        u = expand(self.sde.noise_level(t), x0)
        return torch.sqrt((u * (x0 - MEAN)) ** 2 + STD**4) / (STD**2 + u**2)


class Recorder(AbstractDenoiser):
    """Another denoiser, with what its errors were asked at."""

    def __init__(self, inner: AbstractDenoiser) -> None:
        super().__init__()
        self.inner, self.sde = inner, inner.sde
        self.asked: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        return self.inner.output(name, x, t, label)

    def eps_error(self, x0: Tensor, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.asked.append((z.clone(), t.clone(), label))
        return self.inner.eps_error(x0, z, t, label)


def network(sde: SDE, numel: int = 6) -> Denoiser:
    return Denoiser(RandomNetwork(numel, F64), sde, Eps())


def share_known(sde: SDE, t: Tensor) -> Tensor:
    """The mean square error of eps for data N(MEAN, STD^2): the variance of z given x_t."""
    return STD**2 / (STD**2 + sde.noise_level(t) ** 2)


def best_decoder_std(sde: SDE, t: float) -> float:
    """Standard deviation of x_0 given x_t for data N(MEAN, STD^2)."""
    u = float(sde.noise_level(t))
    return u * STD / math.hypot(u, STD)


def tight(sde: SDE, T: float) -> float:
    """Mean of -log p over the data, plus KL(p_T || prior): the least that a bound with this prior can be on average."""
    alpha, sigma = float(sde.alpha(T)), float(sde.sigma(T))
    law = Normal(torch.tensor(alpha * MEAN, dtype=F64), math.hypot(alpha * STD, sigma))
    prior = Normal(torch.tensor(0.0, dtype=F64), sde.prior_std)
    return 0.5 * math.log(2 * math.pi * math.e * STD**2) + float(kl_divergence(law, prior))


def levels(sde: SDE, low: float, high: float, steps: int) -> list[float]:
    """Times of steps that are equal in the log-SNR, between two noise levels."""
    return sde.t_of_noise_level(torch.logspace(math.log10(high), math.log10(low), steps + 1, dtype=F64)).tolist()


def integral(sde: SDE, x0: Tensor, t_min: float, T: float) -> Tensor:
    """L_diffusion (B,) of the continuous bound by Gauss-Legendre quadrature of `integrand` of `MeanError`.

    In log u the integrand has poles at a distance of pi / 2 from the real axis: of panels of length 1 each takes 20
    nodes to rounding.
    """
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(20))
    panels = math.ceil(0.5 * log_snr_range(sde, t_min, T))
    u = ((torch.arange(panels, dtype=F64)[:, None] + 0.5 * (nodes + 1)) / panels).flatten()
    t = quantile(sde, u, t_min, T)
    values = torch.stack([integrand(MeanError(sde), x0, x0, s.expand(len(x0))) for s in t], 1)
    return log_snr_range(sde, t_min, T) * (values * (0.5 * weights / panels).repeat(panels)).sum(1)


# Tight where theory says so


@every_sde
def test_continuous_bound_of_gaussian_data_is_tight(sde: SDE) -> None:
    """With the exact score and decoder all that is left is the prior's error."""
    for t_min, T in ((sde.t_min, sde.T), (float(sde.t_of_noise_level(0.2)), float(sde.t_of_noise_level(4.0)))):
        decoder = Decoder(std=best_decoder_std(sde, t_min))
        last = decoder.term(MeanError(sde), ENDS, ENDS, torch.full((2,), t_min, dtype=F64))
        total = prior_term(sde, ENDS, T) + integral(sde, ENDS, t_min, T) + last
        # L_diffusion is up to 15 nats; log(SNR) at t_min is known to some 1e-14, times of it less
        assert float(total.mean()) == pytest.approx(tight(sde, T), abs=1e-11)


@every_sde
@pytest.mark.parametrize("steps", [1, 6])
def test_chain_with_the_best_variance_is_tight(sde: SDE, steps: int) -> None:
    """exp(kappa) = 1 + expm1(lambda) E||e||^2 / D makes every step the exact reverse one, however long."""
    for grid in (all_grids()["uniform"], all_grids()["edm"]):
        times = sorted(grid(sde, steps))
        t = torch.tensor(times, dtype=F64)
        kappa = torch.log1p(torch.expm1(-sde.log_snr(t).diff()) * share_known(sde, t[1:]))
        share = kappa / (2 * torch.log(sde.sigma(t)).diff())

        def at(offset: float, times: list[float] = times, share: Tensor = share) -> float:
            bound = discrete_bound(
                MeanError(sde),
                ENDS,
                times,
                variance="interpolated",
                share=(share + offset).tolist(),
                decoder_std=best_decoder_std(sde, times[0]),
            )
            return float(bound.total.mean())

        assert at(0) == pytest.approx(tight(sde, times[-1]), abs=1e-11)
        # and no other is better
        assert at(0) < min(at(0.01), at(-0.01))


@every_sde
@pytest.mark.parametrize("variance", VARIANCES)
def test_chain_goes_to_the_continuous_bound_at_first_order(sde: SDE, variance: str) -> None:
    low, high = 0.05, 5.0
    t_min, T = levels(sde, low, high, 1)[::-1]
    limit = integral(sde, ENDS, t_min, T)

    def error(steps: int) -> Tensor:
        bound = discrete_bound(MeanError(sde), ENDS, levels(sde, low, high, steps), variance=variance)
        return bound.terms.sum(1) - limit

    n = 64
    assert observed_order(error, n, 1) == pytest.approx(1, abs=0.05)
    if variance == "posterior":
        # A step's expm1(lambda) f at its noisy end, against the integral of f over l = log(1 / SNR), is too much by
        # lambda^2 / 4 (f + f'). Here f = m on average, m' = -m (1 - m): int m^2 dl = int m / (1 - m) dm.
        m = [float(share_known(sde, torch.tensor(t, dtype=F64))) for t in (t_min, T)]
        above, below = (-v - math.log1p(-v) for v in m)
        span = 2 * math.log(high / low)
        coefficient = 0.25 * span * (above - below)
        measured = float((2 * (2 * n) * error(2 * n) - n * error(n)).mean())
        # extrapolated: what is left is of order lambda^2 of it
        assert measured == pytest.approx(coefficient, rel=(span / n) ** 2)


@pytest.mark.parametrize("grid", [pytest.param(g, id=n) for n, g in all_grids().items() if n != "score_sde"])
def test_any_grid_gives_a_bound(grid: Any) -> None:
    sde = SubVP()
    times = grid(sde, 50)
    down = discrete_bound(MeanError(sde), ENDS, times)
    up = discrete_bound(MeanError(sde), ENDS, times[::-1])
    assert torch.equal(down.total, up.total)
    assert down.times.tolist() == sorted(times)[1:]
    assert float(down.total.mean()) > tight(sde, sde.T)
    finer = discrete_bound(MeanError(sde), ENDS, grid(sde, 200))
    assert tight(sde, sde.T) < float(finer.total.mean()) < float(down.total.mean())


# Estimates against expectations


REPEATS = 3000


def repeated(x0: Tensor) -> Tensor:
    """REPEATS samples of each data point: their draws are independent, for each sample has its own."""
    return x0.repeat(REPEATS, 1)


def within(estimates: Tensor, exact: Tensor, deviations: float = 4.0) -> None:
    """Means (n, ...) of estimates (REPEATS n, ...), every one `deviations` of its standard error from the exact."""
    each = estimates.reshape(REPEATS, *exact.shape)
    error = each.std(0) / REPEATS**0.5
    assert ((each.mean(0) - exact).abs() < deviations * error).all(), (each.mean(0) - exact) / error


@pytest.mark.parametrize("sde", sdes(odd=False))
def test_draws_average_to_the_expectation(sde: SDE) -> None:
    denoiser = gaussian(sde, MEAN, STD)
    x0 = torch.tensor([[0.1], [0.9], [1.8]], dtype=F64)
    times = levels(sde, 0.1, 3.0, 8)
    exact = discrete_bound(MeanError(sde), x0, times)
    full = discrete_bound(denoiser, repeated(x0), times, seed=3)
    within(full.terms, exact.terms)
    within(full.decoder, exact.decoder)
    within(full.total, exact.total)
    within(discrete_bound(denoiser, repeated(x0), times, seed=4, subset=3).total, exact.total)
    t_min, T = times[-1], times[0]
    diffusion = integral(sde, x0, t_min, T)
    free = continuous_bound(denoiser, repeated(x0), t_min=t_min, T=T, points=4, draws=2, seed=5)
    within(free.terms.sum(1), diffusion)
    within(free.decoder, exact.decoder)
    edges = [t_min, *free.times.tolist()]
    strata = torch.stack([integral(sde, x0, low, high) for low, high in pairwise(edges)], 1)
    torch.testing.assert_close(strata.sum(1), diffusion, rtol=1e-9, atol=0)
    within(free.terms, strata)


def test_standard_error_is_that_of_the_mean() -> None:
    """The variance of estimates of four draws each is what they say on average."""
    bounds = [
        continuous_bound(gaussian(VP(), MEAN, STD), repeated(ENDS), points=4, draws=4),
        discrete_bound(gaussian(VP(), MEAN, STD), repeated(ENDS), levels(VP(), 0.1, 3.0, 4), draws=4),
    ]
    for bound in bounds:
        assert bound.standard_error is not None
        for half in (slice(0, None, 2), slice(1, None, 2)):
            seen = (bound.total[half] - bound.total[half].mean()).square()
            said = bound.standard_error[half].square()
            assert abs(float((seen - said).mean())) < 4 * float((seen - said).std()) / REPEATS**0.5


def test_subset_is_unbiased_term_by_term() -> None:
    sde, subset = VP(), 5
    times = all_grids()["uniform"](sde, 12)  # the weights of the terms differ by factors of hundreds
    full = discrete_bound(MeanError(sde), ENDS, times, variance="forward")
    drawn = discrete_bound(MeanError(sde), repeated(ENDS), times, variance="forward", subset=subset)
    assert drawn.nfe == subset + 1
    assert drawn.standard_error is None
    # nothing is left to chance but which terms are taken
    assert torch.equal(drawn.decoder, repeated(full.decoder[:, None])[:, 0])
    taken = (drawn.terms[::2] > drawn.terms[::2].min(0).values).sum(0)
    often = (taken >= 100) & (taken < REPEATS)
    assert often.sum() >= 2
    within(drawn.terms[:, often], full.terms[:, often])
    within(drawn.total, full.total)


def test_subset_does_not_repeat_itself_on_equal_weights() -> None:
    """With equal weights and as many draws as terms every term is drawn once: the full bound."""
    sde = EDM()
    times = levels(sde, 0.1, 3.0, 6)
    full = discrete_bound(MeanError(sde), ENDS, times)
    drawn = discrete_bound(MeanError(sde), ENDS, times, subset=6)
    torch.testing.assert_close(drawn.terms, full.terms, rtol=1e-12, atol=0)


def test_bounds_of_a_mixture_lie_above() -> None:
    law = mixture()
    for sde in (VP(), VE(sigma_max=10.0)):
        denoiser = law.denoiser(sde)
        x0 = denoiser.sample(400, torch.Generator().manual_seed(2))
        nll = -law.marginal(1.0, 0.0).log_prob(x0)

        def gap(bound: Bound, nll: Tensor = nll) -> tuple[float, float]:
            excess = bound.total - nll
            return float(excess.mean()), float(excess.std()) / len(excess) ** 0.5

        mean, error = gap(continuous_bound(denoiser, x0, points=32, draws=2))
        # tight but for 1e-4 of the prior, and a decoder whose variance is u^2 / S^2 of itself too large
        assert abs(mean) < 4 * error + 1e-3
        mean, error = gap(discrete_bound(denoiser, x0, all_grids()["logsnr"](sde, 20)))
        assert mean > 4 * error
        wrong = law.denoiser(sde)
        wrong.means = wrong.means + 0.3
        mean, error = gap(continuous_bound(wrong, x0, points=32, draws=2))
        assert mean > 4 * error


# The terms


@every_sde
@pytest.mark.parametrize("variance", VARIANCES)
def test_terms_are_divergences_of_gaussians(sde: SDE, variance: str) -> None:
    """Bayes' rule for the posterior, torch.distributions for the divergence."""
    denoiser = Recorder(network(sde))
    x0, share = normal(3, 1, 2, 3), 0.3
    times = sorted(levels(sde, 0.2, 4.0, 5))
    bound = discrete_bound(denoiser, x0, times, variance=variance, share=share)
    assert len(denoiser.asked) == bound.nfe == 6
    for i, (z, t, _) in enumerate(denoiser.asked[1:]):
        s = times[i]
        assert t.tolist() == [times[i + 1]] * 3
        x = sde.perturb(x0, t, z)
        a, b = (float(c) for c in sde.transition(s, times[i + 1]))
        alpha, sigma = float(sde.alpha(s)), float(sde.sigma(s))
        posterior = 1 / (1 / sigma**2 + (a / b) ** 2)

        def mean(
            x0: Tensor,
            x: Tensor = x,
            alpha: float = alpha,
            sigma: float = sigma,
            v: float = posterior,
            a: float = a,
            b: float = b,
        ) -> Tensor:
            return v * (alpha * x0 / sigma**2 + a * x / b**2)

        ratio = {"posterior": 1.0, "forward": b**2 / posterior, "interpolated": (b**2 / posterior) ** share}[variance]
        q = Normal(mean(x0), posterior**0.5)
        p = Normal(mean(denoiser.denoised(x, t)), (posterior * ratio) ** 0.5)
        expected = kl_divergence(q, p).flatten(1).sum(1)
        # differences of means and of variances that are some hundredths of them
        torch.testing.assert_close(bound.terms[:, i], expected, rtol=1e-9, atol=0)
    noise, prior = sde.marginal(x0, times[-1]), Normal(torch.tensor(0.0, dtype=F64), sde.prior_std)
    expected = kl_divergence(Normal(noise[0], noise[1]), prior).flatten(1).sum(1)
    torch.testing.assert_close(bound.prior, expected, rtol=1e-10, atol=1e-12)
    z, t, _ = denoiser.asked[0]
    law = Normal(denoiser.denoised(sde.perturb(x0, t, z), t), float(sde.noise_level(times[0])))
    torch.testing.assert_close(bound.decoder, -law.log_prob(x0).flatten(1).sum(1), rtol=1e-10, atol=1e-10)
    assert torch.equal(bound.total, bound.prior + bound.terms.sum(1) + bound.decoder)


@torch.no_grad()
@pytest.mark.parametrize("variance", ["posterior", "forward"])
def test_ddpm_as_printed(variance: str) -> None:
    """arXiv 2006.11239, equations 6, 7, 12 and 13 on a table of betas; VP is asked at the times of its levels."""
    beta = torch.linspace(1e-4, 0.2, 40, dtype=F64)
    alpha, alpha_bar = 1 - beta, torch.cumprod(1 - beta, 0)
    sde, q = VP(), Quantization()
    times = sde.t_of_log_snr(torch.log(alpha_bar) - torch.log1p(-alpha_bar)).tolist()
    denoiser = Recorder(network(sde))
    pixels = torch.randint(0, 256, (3, 1, 2, 3), generator=torch.Generator().manual_seed(3))
    x0 = q.encode(pixels, F64)
    bound = discrete_bound(denoiser, x0, times, quantization=q, variance=variance, decoder_std=float(beta[0]) ** 0.5)
    d = 6
    for i, (z, t, _) in enumerate(denoiser.asked[1:], start=1):
        x = alpha_bar[i].sqrt() * x0 + (1 - alpha_bar[i]).sqrt() * z
        square = (z - denoiser.eps(x, t)).square().flatten(1).sum(1)
        tilde = (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * beta[i]
        chosen = tilde if variance == "posterior" else beta[i]
        expected = beta[i] ** 2 / (2 * chosen * alpha[i] * (1 - alpha_bar[i])) * square
        expected = expected + 0.5 * d * (tilde / chosen - 1 - torch.log(tilde / chosen))
        torch.testing.assert_close(bound.terms[:, i - 1], expected, rtol=1e-10, atol=0)
    expected = 0.5 * (alpha_bar[-1] * x0.square() - alpha_bar[-1] - torch.log1p(-alpha_bar[-1])).flatten(1).sum(1)
    torch.testing.assert_close(bound.prior, expected, rtol=1e-10, atol=0)
    # the decoder: mean (x_1 - beta_1 / sqrt(1 - alpha_bar_1) eps) / sqrt(alpha_1), deltas of 1 / 255 to both sides
    z, t, _ = denoiser.asked[0]
    x = alpha_bar[0].sqrt() * x0 + (1 - alpha_bar[0]).sqrt() * z
    mean = (x - beta[0] / (1 - alpha_bar[0]).sqrt() * denoiser.eps(x, t)) / alpha[0].sqrt()
    law = Normal(mean, beta[0].sqrt())
    above, below = law.cdf(x0 + 1 / 255), law.cdf(x0 - 1 / 255)
    above, below = torch.where(pixels == 255, 1.0, above), torch.where(pixels == 0, 0.0, below)
    assert float((above - below).min()) > 1e-6  # so that their difference has ten digits
    expected = -torch.log(above - below).flatten(1).sum(1)
    torch.testing.assert_close(bound.decoder, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("noise_level", [0.01, 0.1, 0.5])
def test_gray_levels_that_are_equally_likely(noise_level: float) -> None:
    """With the exact score and posterior the bound is log2 of their number, however the two share the work."""
    q, sde = Quantization(levels=4), VP()
    x0 = q.encode(torch.arange(4), F64)[:, None]
    denoiser = GaussianMixtureDenoiser(sde, torch.ones(4, dtype=F64), x0, torch.zeros(4, dtype=F64))
    decoder, t_min = Decoder("softmax", quantization=q), float(sde.t_of_noise_level(noise_level))
    # both expectations by the trapezoid rule, which is exact to rounding for what is smooth and falls like a normal
    z = torch.linspace(-9, 9, 721, dtype=F64)[:, None]
    density = torch.exp(-0.5 * z[:, 0] ** 2) / math.sqrt(2 * math.pi) * 18 / 720

    def mean(term: Callable[[Tensor, Tensor, Tensor], Tensor], t: float) -> float:
        of_level = [term(x.expand_as(z), z, torch.full((len(z),), t, dtype=F64)) for x in x0]
        return float((torch.stack(of_level).mean(0) * density).sum())

    nodes, weights = np.polynomial.legendre.leggauss(60)
    times = quantile(sde, torch.from_numpy(0.5 * (nodes + 1)), t_min).tolist()
    values = [mean(lambda x, z, t: integrand(denoiser, x, z, t), t) for t in times]
    diffusion = log_snr_range(sde, t_min) * 0.5 * float(weights @ np.array(values))
    last = mean(lambda x, z, t: decoder.term(denoiser, x, z, t), t_min)
    assert (last > 0.5) == (noise_level == 0.5)  # of 2 log 2 nats, which the noise leaves to the decoder
    prior = float(prior_term(sde, x0).mean())
    assert prior < 1e-4
    # the prior costs KL(p_T || N(0, 1)) alone, which is of fourth order in alpha_T = 0.0066
    assert (prior + diffusion + last) / math.log(2) == pytest.approx(2, abs=1e-7)
    # and estimates agree
    bound = continuous_bound(denoiser, repeated(x0), quantization=q, decoder="softmax", t_min=t_min, points=8, draws=1)
    assert bound.nfe == 8
    each = bits_per_dim(-bound.total, 1)
    assert abs(float(each.mean()) - 2) < 4 * float(each.std()) / (4 * REPEATS) ** 0.5


def test_discretized_decoder_on_pictures() -> None:
    """The mass of the buckets at the denoised, 8 bits or less for a decoder that knows the pixel or nothing."""
    sde, q = EDM(), Quantization()
    x0 = q.encode(torch.randint(0, 256, (2, 1, 4, 4), generator=torch.Generator().manual_seed(4)), F64)
    z, t = normal(2, 1, 4, 4), torch.tensor([2e-3, 0.5], dtype=F64)
    denoiser = network(sde, 16)
    denoised = denoiser.denoised(sde.perturb(x0, t, z), t)
    for std in (None, 0.01):
        got = Decoder(std=std, quantization=q).term(denoiser, x0, z, t)
        expected = -q.log_mass(x0, denoised, t if std is None else std)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


# Draws, gradients, errors


def run_all(denoiser: AbstractDenoiser, x0: Tensor, times: Sequence[float], **options: Any) -> list[Bound]:
    return [
        discrete_bound(denoiser, x0, times, draws=2, **options),
        discrete_bound(denoiser, x0, times, subset=3, **options),
        continuous_bound(denoiser, x0, points=3, draws=2, **options),
    ]


def test_draws_do_not_depend_on_the_batch() -> None:
    sde = VP()
    denoiser, x0, times = network(sde), normal(7, 1, 2, 3), all_grids()["logsnr"](sde, 6)
    together = run_all(denoiser, x0, times, seed=5)
    parts = [run_all(denoiser, x0[i], times, seed=5, indices=list(i)) for i in (range(2), range(2, 7))]
    for whole, first, second in zip(together, *parts, strict=True):
        for name in ("terms", "decoder", "prior"):
            split = torch.cat([getattr(first, name), getattr(second, name)])
            torch.testing.assert_close(split, getattr(whole, name), rtol=1e-12, atol=0)
    alone = run_all(denoiser, x0[[6, 3]], times, seed=5, indices=[6, 3])
    for whole, part in zip(together, alone, strict=True):
        torch.testing.assert_close(part.total, whole.total[[6, 3]], rtol=1e-12, atol=0)
    for whole, other in zip(together, run_all(denoiser, x0, times, seed=6), strict=True):
        assert (whole.total != other.total).all()
    # samples do not share their noise
    same = run_all(denoiser, x0[:1].expand(7, 1, 2, 3), times)
    assert all(len(bound.total.unique()) == 7 for bound in same)


def test_noise_and_times_are_independent() -> None:
    """Of one sample: the normals that times are made of are not those of its noise."""
    denoiser = Recorder(network(VP(), 1))
    continuous_bound(denoiser, normal(500, 1), points=1, draws=1)
    (z, _, _), (z1, t, _) = denoiser.asked
    place = torch.special.ndtri((float(VP().log_snr(VP().t_min)) - VP().log_snr(t)) / log_snr_range(VP()))
    for a, b in ((z, z1), (z, place), (z1, place)):
        correlation = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
        assert abs(correlation) < 4 / 500**0.5


def test_counts_labels_and_progress() -> None:
    sde = VP()
    denoiser, x0, label = Recorder(network(sde)), normal(2, 1, 2, 3), torch.tensor([1, 7])
    seen: list[tuple[float, float, Tensor | None]] = []
    bounds = run_all(denoiser, x0, all_grids()["logsnr"](sde, 6), label=label, callback=lambda *done: seen.append(done))
    assert [bound.nfe for bound in bounds] == [14, 4, 8]
    assert len(denoiser.asked) == 26
    assert all(given is label for _, _, given in denoiser.asked)
    assert len(seen) == 12 + 3 + 6
    assert [share for share, _, _ in seen[:12]] == pytest.approx([(i + 1) / 12 for i in range(12)])
    assert [share for share, _, _ in seen[-6:]] == pytest.approx([(i + 1) / 6 for i in range(6)])
    plain = run_all(Recorder(denoiser.inner), x0, all_grids()["logsnr"](sde, 6))
    assert all((a.total != b.total).all() for a, b in zip(bounds, plain, strict=True))
    for bound, terms in zip(bounds, (6, 6, 3), strict=True):
        assert bound.terms.shape == (2, terms)
        assert bound.times.shape == (terms,)
        assert bound.total.dtype == bound.terms.dtype == F64
    assert bounds[2].times[-1] == sde.T


def test_float32_data_give_float64_bounds() -> None:
    sde = VP()
    narrow = Denoiser(RandomNetwork(6), sde, Eps())
    wide = Denoiser(RandomNetwork(6).double(), sde, Eps())
    x0, z = normal(3, 1, 2, 3, dtype=torch.float32), normal(3, 1, 2, 3, dtype=torch.float32)
    t = torch.tensor([sde.t_min, 0.01, sde.T], dtype=F64)
    got, exact = integrand(narrow, x0, z, t), integrand(wide, x0.double(), z.double(), t)
    assert got.dtype == F64
    # a network of some dozen float32 operations in front of the error itself
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=0)


def test_continuous_bound_is_differentiable() -> None:
    sde = VP()
    denoiser, x0 = network(sde), normal(2, 1, 2, 3)

    def total(x0: Tensor) -> Tensor:
        return continuous_bound(denoiser, x0, points=3, draws=1).total

    assert torch.autograd.gradcheck(total, (x0.requires_grad_(),), eps=1e-6, rtol=1e-5, atol=1e-5)
    total(x0).sum().backward()
    assert all(float(p.grad.norm()) > 0 for n, p in denoiser.named_parameters() if p.grad is not None)
    assert denoiser.network.out.grad is not None
    bound = continuous_bound(denoiser, x0, points=3, draws=2)
    assert bound.standard_error is not None
    assert not bound.standard_error.requires_grad
    assert not discrete_bound(denoiser, x0, [0.1, 0.2]).total.requires_grad


def test_quantile_and_range() -> None:
    for sde in (VP(), EDM(), VE()):
        u = torch.linspace(0, 1, 11, dtype=F64)
        t = quantile(sde, u)
        assert float(t[0]) == pytest.approx(sde.t_min, rel=1e-9)
        assert float(t[-1]) == pytest.approx(sde.T, rel=1e-9)
        steps = -sde.log_snr(t).diff()
        torch.testing.assert_close(steps, (log_snr_range(sde) / 10 * torch.ones(10, dtype=F64)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": "learned"}, "variance='learned'"),
        ({"decoder": "laplace"}, "decoder='laplace'"),
        ({"decoder": "softmax"}, "give a quantization"),
        ({"decoder": "softmax", "quantization": Quantization(), "decoder_std": 0.1}, "decoder_std=0.1"),
        ({"decoder_std": 0.0}, "decoder_std=0.0"),
        ({"variance": "interpolated", "share": [0.1, 0.2, 0.3]}, "each of 2 steps"),
        ({"variance": "interpolated", "share": math.nan}, "finite"),
        ({"draws": 0}, "draws=0"),
        ({"subset": 2.5}, "subset=2.5"),
        ({"indices": [1]}, "1 numbers for 2 samples"),
        ({"times": [0.1]}, "at least two"),
        ({"times": [0.1, 0.3, 0.2]}, "all increasing"),
        ({"times": [0.0, 0.5]}, "no noise"),
        ({"times": [0.1, 1.5]}, "the largest time"),
    ],
)
def test_what_cannot_be_bounded_is_refused(options: dict[str, Any], message: str) -> None:
    sde = VP()
    arguments = {"times": [0.9, 0.5, 0.1]} | options
    with pytest.raises(UserError, match=message):
        discrete_bound(network(sde), normal(2, 1, 2, 3), **arguments)


def test_what_has_no_continuous_bound_is_refused() -> None:
    x0 = normal(2, 1, 2, 3)
    for options, message in (
        ({"t_min": 0.0}, "no noise"),
        ({"T": 2.0}, "largest"),
        ({"t_min": 0.5, "T": 0.4}, "smallest"),
        ({"points": 0}, "points=0"),
    ):
        with pytest.raises(UserError, match=message):
            continuous_bound(network(VP()), x0, **options)  # type: ignore[arg-type]
