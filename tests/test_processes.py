"""Forward processes against autograd, 50-digit arithmetic, the paper's formulas and an independent simulator."""

from __future__ import annotations

import dataclasses
import math

import mpmath
import numpy as np
import pytest
import torch
import torchsde
from torch import Tensor
from torch.distributions import Normal

from sde.errors import UserError
from sde.processes import EDM, SDE, VE, VP, Cosine, RectifiedFlow, SubVP
from tests.problems import EPS32, EPS64, F64, all_sdes, generator, moderate, normal, sdes, times_of

every_sde = pytest.mark.parametrize("sde", sdes())
RANKS = [(3,), (2, 4), (3, 2, 2)]


def derivative(function, t: Tensor) -> Tensor:
    t = t.clone().requires_grad_()
    value = function(t)
    return torch.autograd.grad(value.sum(), t)[0]


# The two curves and their derivatives


@every_sde
def test_f_is_the_derivative_of_log_alpha(sde: SDE) -> None:
    # rounding alone: 1 - v in the cosine's log1p(-v) falls to 1e-3 and loses three digits
    t = times_of(sde)
    torch.testing.assert_close(sde.f(t), derivative(sde.log_alpha, t), rtol=1e-11, atol=1e-14)


@every_sde
def test_g_squared_is_the_growth_of_the_variance(sde: SDE) -> None:
    t = times_of(sde)
    growth = derivative(lambda t: sde.sigma(t) ** 2, t) - 2 * sde.f(t) * sde.sigma(t) ** 2
    torch.testing.assert_close(sde.g(t) ** 2, growth, rtol=1e-10, atol=0)


def literal_curves(sde: SDE, t: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
    """alpha and sigma in 50 digits from the formulas of the papers, with 1 - exp as it stands."""
    if isinstance(sde, VP | SubVP):
        low, high, end = mpmath.mpf(sde.beta_min), mpmath.mpf(sde.beta_max), mpmath.mpf(sde.T)
        mean = mpmath.exp(-(t**2) * (high - low) / (4 * end) - t * low / 2)  # 2011.13456, equation 29, at T = 1
        return mean, (mpmath.sqrt(1 - mean**2) if isinstance(sde, VP) else 1 - mean**2)
    if isinstance(sde, VE):
        low = mpmath.mpf(sde.sigma_min)
        return mpmath.mpf(1), low * (sde.sigma_max / low) ** (t / sde.T)
    if isinstance(sde, Cosine):
        s = mpmath.mpf(sde.s)
        alpha = mpmath.cos((t + s) / (1 + s) * mpmath.pi / 2) / mpmath.cos(s / (1 + s) * mpmath.pi / 2)
        return alpha, mpmath.sqrt(1 - alpha**2)
    return (mpmath.mpf(1), t) if isinstance(sde, EDM) else (1 - t, t)


known_sde = pytest.mark.parametrize(
    "sde", [p for p in sdes() if isinstance(p.values[0], VP | SubVP | VE | Cosine | EDM | RectifiedFlow)]
)


@known_sde
def test_curves_in_fifty_digits(sde: SDE) -> None:
    with mpmath.workdps(50):
        for t in [1e-9, 1e-5, *times_of(sde, 8).tolist()]:
            alpha, sigma = literal_curves(sde, mpmath.mpf(t))
            # a dozen roundings; where alpha ends at 1e-3 its own conditioning t alpha' / alpha costs 1e3 more
            conditioning = 1 + abs(float(sde.f(t))) * t
            assert float(abs(sde.alpha(t).item() / alpha - 1)) < 16 * EPS64 * conditioning
            assert float(abs(sde.sigma(t).item() / sigma - 1)) < 32 * EPS64


@every_sde
def test_float32_sigma_keeps_its_digits(sde: SDE) -> None:
    # the promise of the module: 1e-6 at t = 1e-5; float64 gets the very same time
    t = torch.tensor([1e-5, 1e-4, 1e-3, 1e-2], dtype=torch.float32)
    small, exact = sde.sigma(t), sde.sigma(t.double())
    assert small.dtype == torch.float32
    assert ((small.double() - exact) / exact).abs().max() < 1e-6


@every_sde
@pytest.mark.parametrize("name", ["alpha", "log_alpha", "sigma", "f", "g", "log_snr", "noise_level", "diffusion"])
def test_types_and_shapes_of_time(sde: SDE, name: str) -> None:
    curve = getattr(sde, name)
    number = 0.4 * sde.T
    for dtype in (torch.float32, F64):
        t = torch.tensor([number, 0.2 * sde.T], dtype=dtype)
        assert curve(t).dtype == dtype
        assert curve(t).shape == (2,)
        assert curve(t[0]).shape == ()
        # vectorized loops of the library may round otherwise than its scalar ones
        torch.testing.assert_close(curve(t)[0], curve(t[0]), rtol=4 * torch.finfo(dtype).eps, atol=1e-30)
        torch.testing.assert_close(
            curve(t)[0].double(), curve(float(t[0])), rtol=1e-4 if dtype != F64 else 1e-15, atol=0
        )
    assert curve(number).dtype == F64
    assert curve(number).shape == ()


@every_sde
def test_constructing_does_not_share_memory_with_the_time(sde: SDE) -> None:
    t = torch.tensor([0.3 * sde.T, 0.6 * sde.T], dtype=F64)
    before = t.clone()
    for name in ("alpha", "log_alpha", "sigma", "f", "g", "log_snr", "noise_level"):
        getattr(sde, name)(t).mul_(7)
    assert torch.equal(t, before)


# Signal to noise


@every_sde
def test_log_snr_decreases_and_is_the_definition(sde: SDE) -> None:
    t = times_of(sde, 200)
    log_snr = sde.log_snr(t)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(log_snr, torch.log(sde.alpha(t) ** 2 / sde.sigma(t) ** 2), rtol=0, atol=1e-11)
    torch.testing.assert_close(sde.noise_level(t), sde.sigma(t) / sde.alpha(t), rtol=1e-12, atol=0)


@every_sde
def test_slope_of_the_log_snr(sde: SDE) -> None:
    # d log_snr / dt = -g^2 / sigma^2 for every linear process: ties f, g, sigma and alpha together
    t = times_of(sde)
    slope = derivative(sde.log_snr, t)
    torch.testing.assert_close(slope, -((sde.g(t) / sde.sigma(t)) ** 2), rtol=1e-10, atol=0)


@every_sde
def test_time_of_a_log_snr(sde: SDE) -> None:
    t = times_of(sde)
    log_snr, slope = sde.log_snr(t), (sde.g(t) / sde.sigma(t)) ** 2
    # the log-SNR is rounded (and computed as a sum of terms of its size): that alone moves the time by this much
    tolerance = 8 * EPS64 * (1 + log_snr.abs() + sde.log_alpha(t).abs()) / slope + 16 * EPS64 * t
    assert ((sde.t_of_log_snr(log_snr) - t).abs() <= tolerance).all()
    level = sde.noise_level(t)
    assert ((sde.t_of_noise_level(level) - t).abs() <= tolerance + 8 * EPS64 / slope).all()


@every_sde
def test_time_without_noise(sde: SDE) -> None:
    if float(sde.sigma(0.0)) > 0:  # VE: the data itself carries sigma_min
        assert float(sde.t_of_noise_level(float(sde.noise_level(0.0)))) == pytest.approx(0, abs=1e-15)
    else:
        assert float(sde.t_of_noise_level(0.0)) == 0
        assert float(sde.log_snr(0.0)) == math.inf
    assert float(sde.alpha(0.0)) == 1


def test_stated_ends() -> None:
    # the docstrings' "leaves a signal-to-noise ratio of"
    assert math.exp(Cosine().log_snr(0.999)) == pytest.approx(2e-6, rel=0.3)
    assert math.exp(RectifiedFlow().log_snr(0.999)) == pytest.approx(1e-6, rel=0.01)
    assert float(VE().sigma(0.0)) == VE().sigma_min


@pytest.mark.parametrize("odd", [False, True])
def test_subvp_variance_is_below_vp(odd: bool) -> None:
    options = {"beta_min": 0.05, "beta_max": 6.0, "T": 3.0} if odd else {}
    vp, subvp = VP(**options), SubVP(**options)
    t = times_of(vp)
    assert (subvp.sigma(t) < vp.sigma(t)).all()
    torch.testing.assert_close(subvp.sigma(t), vp.sigma(t) ** 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(subvp.alpha(t), vp.alpha(t), rtol=0, atol=0)


@pytest.mark.parametrize("cls", [VP, SubVP, VE])
def test_a_longer_clock_is_the_same_process(cls: type[SDE]) -> None:
    # x at c t of the process slowed down by c has the law of x at t: curves agree, f scales by 1/c, g by 1/sqrt(c)
    c, fast = 4.0, cls()
    slow = cls(T=c) if cls is VE else cls(beta_min=0.1 / c, beta_max=20.0 / c, T=c)
    t = times_of(fast)
    for name, scale in (("alpha", 1.0), ("sigma", 1.0), ("f", c), ("g", math.sqrt(c))):
        torch.testing.assert_close(scale * getattr(slow, name)(c * t), getattr(fast, name)(t), rtol=1e-13, atol=1e-16)


# Kernels


@every_sde
def test_kernels_compose(sde: SDE) -> None:
    """Chapman-Kolmogorov: going from s to t directly is going through u."""
    uniform = torch.rand(300, 3, generator=generator(1), dtype=F64).sort(1).values
    s, u, t = (sde.T * uniform).unbind(1)
    s[:100] = 0  # from data itself
    t[100:200] = u[100:200] * (1 + 1e-3 * uniform[100:200, 0])  # and close together
    t = t.clamp_max(sde.T)
    (a_st, b_st), (a_su, b_su), (a_ut, b_ut) = sde.transition(s, t), sde.transition(s, u), sde.transition(u, t)
    torch.testing.assert_close(a_st, a_ut * a_su, rtol=1e-11, atol=0)
    # every squared spread is a fraction of sigma_t^2 that carries the rounding of two log-SNRs of size below 40
    error = (b_st**2 - (a_ut**2 * b_su**2 + b_ut**2)).abs()
    assert (error <= 4 * 40 * EPS64 * sde.sigma(t) ** 2 + 1e-14 * b_st**2).all()


@every_sde
def test_kernel_from_data_is_the_marginal(sde: SDE) -> None:
    t = times_of(sde)
    a, b = sde.transition(0.0, t)
    torch.testing.assert_close(a, sde.alpha(t), rtol=1e-14, atol=0)
    start = sde.sigma(0.0)  # zero, but sigma_min for VE: its x_0 is noisy already
    expected = torch.sqrt(sde.sigma(t) ** 2 - (sde.alpha(t) * start) ** 2)
    scale = (1 + (start / expected) ** 2) * (1 + sde.log_snr(t).abs())  # digits lost by either difference
    assert ((b / expected - 1).abs() <= 32 * EPS64 * scale).all()


@every_sde
def test_kernel_over_no_time_and_over_little(sde: SDE) -> None:
    t = times_of(sde)[:-1]
    a, b = sde.transition(t, t)
    assert torch.equal(a, torch.ones_like(t))
    assert torch.equal(b, torch.zeros_like(t))
    # b^2 = g^2 h (1 + O(h)): the second-order term is measured by halving h, the rest is rounding of the log-SNR
    h = 1e-6 * t
    rate = [sde.transition(t, t + step)[1] ** 2 / step for step in (h, 2 * h)]
    limit = 2 * rate[0] - rate[1]
    # d log_snr over h is rate / sigma^2 h; its rounding error, relative, three times over in the extrapolation
    rounding = 3 * 8 * EPS64 * (1 + sde.log_snr(t).abs()) * sde.sigma(t) ** 2 / (sde.g(t) ** 2 * h)
    stiff = 1e-10 * (1 + (sde.f(t) * t).abs() ** 2)  # next to a pole of f the derivatives in t grow
    assert ((limit / sde.g(t) ** 2 - 1).abs() <= rounding + stiff).all()


@known_sde
def test_spread_of_a_short_step_in_fifty_digits(sde: SDE) -> None:
    """The docstring's promise: the relative error grows as (1 + |log_snr|) / (log_snr_s - log_snr_t), no faster."""
    with mpmath.workdps(50):
        for t in times_of(sde, 6).tolist()[:-1]:
            for ratio in (1e-2, 1e-4, 1e-7):
                end = t * (1 + ratio)
                if end > sde.T:
                    continue
                (a_s, s_s), (a_t, s_t) = literal_curves(sde, mpmath.mpf(t)), literal_curves(sde, mpmath.mpf(end))
                exact = mpmath.sqrt(s_t**2 - (a_t / a_s) ** 2 * s_s**2)
                drop = float(2 * mpmath.log(a_s / s_s) - 2 * mpmath.log(a_t / s_t))
                size = 1 + abs(float(sde.log_snr(t))) + float(abs(mpmath.log(a_t)))
                # log(alpha) next to alpha = 0 has the conditioning of `test_curves_in_fifty_digits`
                size += abs(float(sde.f(end))) * end
                got = sde.transition(t, end)[1].item()
                assert float(abs(got / exact - 1)) < 16 * EPS64 * (1 + size / drop)


# Data of any shape


@every_sde
@pytest.mark.parametrize("shape", RANKS, ids=["vector", "sequence", "picture"])
def test_data_of_any_shape(sde: SDE, shape: tuple[int, ...]) -> None:
    x, z = normal(5, *shape), normal(5, *shape, seed=1)
    t = sde.T * torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7], dtype=F64)
    at = sde.perturb(x, t, z)
    mean, std = sde.marginal(x, t)
    drift = sde.drift(x, t)
    for b, time in enumerate(t.tolist()):
        alpha, sigma, f = float(sde.alpha(time)), float(sde.sigma(time)), float(sde.f(time))
        # addition of two rounded products
        torch.testing.assert_close(at[b], alpha * x[b] + sigma * z[b], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(mean[b] + std[b] * z[b], at[b], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(drift[b], f * x[b], rtol=1e-13, atol=1e-13)
        # a time for all: a number, a tensor of shape () and of shape (B,)
        for same in (time, t[b], t[b].expand(5)):
            torch.testing.assert_close(sde.perturb(x, same, z)[b], at[b], rtol=1e-13, atol=1e-13)


@every_sde
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_data_keep_their_type(sde: SDE, dtype: torch.dtype) -> None:
    x = normal(2, 3, dtype=dtype)
    number = 0.5 * sde.T
    for t in (number, torch.tensor(number), torch.full((2,), number), torch.full((2,), number, dtype=F64)):
        assert sde.perturb(x, t, x).dtype == dtype
        assert sde.drift(x, t).dtype == dtype
        assert sde.marginal(x, t)[0].dtype == dtype


def test_times_that_do_not_fit_the_data_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 4\)"):
        VP().drift(normal(2, 4), torch.rand(3))
    with pytest.raises(ValueError, match="shape"):
        VP().drift(normal(2, 4), torch.rand(2, 1))


# The prior


@every_sde
def test_prior(sde: SDE) -> None:
    z = normal(6, 2, 3)
    expected = (
        Normal(torch.tensor(0.0, dtype=F64), torch.tensor(sde.prior_std, dtype=F64)).log_prob(z).flatten(1).sum(1)
    )
    torch.testing.assert_close(sde.prior_log_prob(z), expected, rtol=1e-13, atol=0)
    draw = sde.prior_sample((4, 3), generator=generator(3), dtype=F64)
    torch.testing.assert_close(draw, sde.prior_std * normal(4, 3, seed=3), rtol=0, atol=0)
    # it stands in for x_T of data of unit variance, whose signal is all but gone
    law_std = math.hypot(float(sde.alpha(sde.T)), float(sde.sigma(sde.T)))
    if sde in [known for name, known in all_sdes().items() if "odd" not in name]:
        assert sde.prior_std == pytest.approx(law_std, rel=2e-3)


# Literally arXiv 2011.13456, on [0, 1]


@pytest.mark.parametrize(("low", "high"), [(0.1, 20.0), (0.3, 7.0)])
def test_vp_and_subvp_as_printed(low: float, high: float) -> None:
    t = np.linspace(0.01, 1, 100)
    beta = low + t * (high - low)
    log_mean = -0.25 * t**2 * (high - low) - 0.5 * t * low  # equation 29
    discount = 1 - np.exp(-2 * low * t - (high - low) * t**2)
    printed = {
        VP: (np.sqrt(beta), np.sqrt(1 - np.exp(-0.5 * t**2 * (high - low) - t * low))),
        SubVP: (np.sqrt(beta * discount), 1 - np.exp(2 * log_mean)),
    }
    for cls, (diffusion, std) in printed.items():
        sde = cls(beta_min=low, beta_max=high)
        mean, sigma = sde.marginal(torch.ones(100, 1, dtype=F64), torch.tensor(t))
        # 1 - exp as printed loses two digits at t = 0.01
        np.testing.assert_allclose(mean[:, 0], np.exp(log_mean), rtol=1e-13)
        np.testing.assert_allclose(sigma, std, rtol=1e-12)
        np.testing.assert_allclose(sde.diffusion(torch.tensor(t)), diffusion, rtol=1e-12)
        np.testing.assert_allclose(sde.drift(torch.ones(100, 1, dtype=F64), torch.tensor(t))[:, 0], -0.5 * beta)


@pytest.mark.parametrize(("low", "high"), [(0.01, 50.0), (0.02, 7.0)])
def test_ve_as_printed(low: float, high: float) -> None:
    sde, t = VE(sigma_min=low, sigma_max=high), np.linspace(0, 1, 100)
    std = low * (high / low) ** t  # equation 30
    np.testing.assert_allclose(sde.sigma(torch.tensor(t)), std, rtol=1e-13)
    np.testing.assert_allclose(sde.g(torch.tensor(t)), std * np.sqrt(2 * np.log(high / low)), rtol=1e-13)
    assert torch.equal(sde.drift(normal(100, 2), torch.tensor(t)), torch.zeros(100, 2, dtype=F64))
    assert sde.prior_std == high


# The chains of the published samplers


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_ddpm_chain_is_the_published_table(n: int) -> None:
    for sde in (VP(), VP(beta_min=0.2, beta_max=5.0)):
        betas = np.linspace(sde.beta_min / n, sde.beta_max / n, n)
        for t in [1.0, 0.7311, 0.5003, 0.0137, 1e-3, 1e-5, *np.linspace(1, 1e-3, n)[:7].tolist()]:
            beta = betas[int(t * (n - 1))]
            if beta > 1:  # too few steps for the schedule: the chain has no real decay
                with pytest.raises(UserError, match=f"steps={n} .* at least {math.ceil(sde.beta_max)}"):
                    sde.discretize(t, n)
                continue
            chain = sde.discretize(t, n)
            assert chain.decay == pytest.approx(math.sqrt(1 - beta), rel=1e-13)
            assert chain.spread == pytest.approx(math.sqrt(beta), rel=1e-13)
            assert chain.ancestral_spread == pytest.approx(math.sqrt(beta), rel=1e-13)


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_smld_chain_is_the_published_table(n: int) -> None:
    sde = VE()
    sigmas = np.exp(np.linspace(np.log(sde.sigma_min), np.log(sde.sigma_max), n))
    for t in [1.0, 0.7311, 0.5003, 0.0137, 1e-5, *np.linspace(1, 1e-5, n)[:7].tolist()]:
        i = int(t * (n - 1))
        below = sigmas[i - 1] if i > 0 else 0.0
        chain = sde.discretize(t, n)
        assert chain.decay == 1
        # the difference of squares of neighbors, ratio exp(8.5 / n), loses up to three digits
        assert chain.spread == pytest.approx(math.sqrt(sigmas[i] ** 2 - below**2), rel=1e-11)
        ancestral = math.sqrt(below**2 * (sigmas[i] ** 2 - below**2) / sigmas[i] ** 2)
        assert chain.ancestral_spread == pytest.approx(ancestral, rel=1e-11)


@every_sde
def test_chains_are_first_order_in_the_transition(sde: SDE) -> None:
    """x_t | x_(t - T/n) of the chain tends to the transition's as 1 / n^2 a step, 1 / n in the coefficients."""
    t = 0.6 * sde.T
    errors = []
    for n in (1000, 4000):
        # a chain's time is rounded down to one of its own: compare on the mean of the neighborhood, here one cell
        a, b = (float(v) for v in sde.transition(t - sde.T / n, t))
        chain = sde.discretize(t, n)
        errors.append([abs(chain.decay - a) * n, abs(chain.spread / b - 1), abs(chain.ancestral_spread / b - 1)])
    coarse, fine = np.array(errors)
    assert (fine <= coarse / 2 + 1e-12).all()
    assert (fine < 0.05).all()


def test_chains_of_one_step_are_refused() -> None:
    for sde in (VP(), VE()):
        with pytest.raises(UserError, match="steps=1"):
            sde.discretize(1.0, 1)


# An independent simulator


class Forward(torch.nn.Module):
    """The forward SDE as torchsde wants it."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, sde: SDE) -> None:
        super().__init__()
        self.sde = sde

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.sde.drift(y, t)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.sde.diffusion(t).expand_as(y)


@pytest.mark.parametrize("sde", sdes(odd=False))
def test_simulated_paths_have_the_marginal(sde: SDE) -> None:
    paths, steps, x0 = 40_000, 200, 1.5
    end = moderate(sde)[1]  # short of the poles of f where alpha = 0
    h = end / steps
    start = x0 + float(sde.sigma(0.0)) * normal(paths, 1, seed=1)  # VE begins with sigma_min
    bm = torchsde.BrownianInterval(0.0, end, size=(paths, 1), dtype=F64, entropy=7)
    ends = torchsde.sdeint(Forward(sde), start, torch.tensor([0.0, end], dtype=F64), bm=bm, method="euler", dt=h)[-1]
    mean, var = float(sde.alpha(end)) * x0, float(sde.sigma(end)) ** 2

    # Euler's bias, to first order in h: local errors h^2/2 (f^2 + f') m in the mean and h^2 (f^2 v - v''/2) in the
    # variance, carried to the end; the factor 2 covers the higher orders, and the bound itself has to be small
    t = torch.linspace(h / 2, end - h / 2, 4000, dtype=F64).requires_grad_()
    m, v, f, g = sde.alpha(t) * x0, sde.sigma(t) ** 2, sde.f(t), sde.g(t)
    (m2,) = torch.autograd.grad((f * m).sum(), t, retain_graph=True)
    (v2,) = torch.autograd.grad((2 * f * v + g**2).sum(), t)
    carried = sde.alpha(end) / sde.alpha(t).detach()
    mean_bias = 2 * h * end * float((carried * (0.5 * m2).abs()).mean())
    var_bias = 2 * h * end * float((carried**2 * (f**2 * v - 0.5 * v2).detach().abs()).mean())
    assert mean_bias < 0.03 * x0
    assert var_bias < 0.06 * var

    assert abs(float(ends.mean()) - mean) < mean_bias + 5 * math.sqrt(var / paths)
    assert abs(float(ends.var()) - var) < var_bias + 5 * var * math.sqrt(2 / paths)


# What constructors refuse


@pytest.mark.parametrize(
    ("cls", "options", "named"),
    [
        (VP, {"beta_min": -0.1}, "beta_min=-0.1"),
        (VP, {"beta_min": 20.0, "beta_max": 0.1}, "beta_max=0.1"),
        (VP, {"beta_max": math.nan}, "beta_max=nan"),
        (VP, {"beta_max": math.inf}, "beta_max=inf"),
        (VP, {"T": 0}, "T=0"),
        (VP, {"T": True}, "T=True"),
        (VP, {"beta_min": "0.1"}, "beta_min='0.1'"),
        (VP, {"t_min": 0.0}, "t_min=0"),
        (VP, {"t_min": 1.0}, "t_min=1"),
        (VP, {"t_min_sampling": -1e-3}, "t_min_sampling=-0.001"),
        (VP, {"t_min_sampling": 2.0}, "t_min_sampling=2"),
        (SubVP, {"beta_max": -1.0}, "beta_max=-1"),
        (SubVP, {"T": None}, "T=None"),
        (VE, {"sigma_min": 0.0}, "sigma_min=0"),
        (VE, {"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_max=1"),
        (VE, {"T": -1.0}, "T=-1"),
        (Cosine, {"T": 1.0}, "T=1"),
        (Cosine, {"s": -0.1}, "s=-0.1"),
        (Cosine, {"s": 1.0}, "s=1"),
        (EDM, {"T": math.nan}, "T=nan"),
        (EDM, {"t_min": 100.0}, "t_min=100"),
        (RectifiedFlow, {"T": 1.0}, "T=1"),
    ],
)
def test_bad_values_are_named(cls: type[SDE], options: dict, named: str) -> None:
    with pytest.raises(UserError) as error:
        cls(**options)
    assert named in str(error.value)


@every_sde
def test_processes_are_values(sde: SDE) -> None:
    assert dataclasses.replace(sde) == sde
    assert hash(dataclasses.replace(sde)) == hash(sde)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sde.T = 2.0
    assert EPS32 > EPS64  # the two units of rounding used above
