"""Denoisers against autograd of torch.distributions' densities and each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from sde.broadcast import expand
from sde.denoiser import Denoiser, GaussianDenoiser, GaussianMixtureDenoiser
from sde.errors import UserError
from sde.parameterizations import OUTPUTS, Eps, Parameterization
from sde.processes import SDE, VE, VP
from sde.reverse import ReverseProcess
from tests.problems import (
    EPS64,
    F64,
    Mixture,
    NetworkFromDenoiser,
    RandomNetwork,
    gaussian,
    generator,
    marginal_of_gaussian,
    mixture,
    moderate,
    normal,
    parameterizations,
    sdes,
    times_of,
)

every_sde = pytest.mark.parametrize("sde", sdes())


def isotropic(k: int = 3, d: int = 2) -> Mixture:
    """Three round Gaussians of unequal width."""
    variance = torch.tensor([0.04, 0.25, 1.0], dtype=F64)
    return Mixture(
        torch.tensor([0.2, 0.5, 0.3], dtype=F64),
        normal(k, d, seed=4),
        variance[:, None, None] * torch.eye(d, dtype=F64),
    )


# Densities and scores


@every_sde
def test_mixture_is_torch_distributions(sde: SDE) -> None:
    law = mixture()
    denoiser = law.denoiser(sde)
    for t in times_of(sde, 5).tolist():
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        x = sde.perturb(denoiser.sample(50, generator(1)), t, normal(50, 2))
        # a Cholesky solve against an eigenbasis: condition number of the covariances, below 100, times rounding, and
        # squared distances of up to some twenty standard deviations
        torch.testing.assert_close(
            denoiser.log_prob(x, t), law.marginal(alpha, sigma).log_prob(x), rtol=1e-11, atol=1e-11
        )
        score = law.score(x, alpha, sigma)
        torch.testing.assert_close(denoiser.score(x, t), score, rtol=1e-9, atol=1e-10 * float(score.abs().max()))


@every_sde
def test_isotropic_covariances_in_every_form(sde: SDE) -> None:
    law = isotropic()
    variances = law.covariances[:, 0, 0]
    full, short = law.denoiser(sde), GaussianMixtureDenoiser(sde, law.weights, law.means, variances)
    one = GaussianMixtureDenoiser(sde, law.weights, law.means, torch.tensor(0.25, dtype=F64))
    same = GaussianMixtureDenoiser(sde, law.weights, law.means, 0.25 * torch.eye(2, dtype=F64).expand(3, 2, 2))
    t = times_of(sde, 6)
    x = sde.perturb(full.sample(len(t), generator(2)), t, normal(len(t), 2))
    for a, b in ((full, short), (one, same)):
        torch.testing.assert_close(a.log_prob(x, t), b.log_prob(x, t), rtol=1e-12, atol=1e-12)
        for name in OUTPUTS:
            torch.testing.assert_close(a.output(name, x, t), b.output(name, x, t), rtol=1e-11, atol=1e-12)


@every_sde
def test_gaussian_is_the_textbook_posterior(sde: SDE) -> None:
    mean, std = 0.7, 0.5
    denoiser, t = gaussian(sde, mean, std), times_of(sde)
    x = sde.perturb(normal(len(t), 1), t, normal(len(t), 1, seed=1))
    alpha, sigma = expand(sde.alpha(t), x), expand(sde.sigma(t), x)
    variance = alpha**2 * std**2 + sigma**2
    gain = alpha * std**2 / variance  # of the Kalman filter
    expected = {
        "score": (alpha * mean - x) / variance,
        "eps": sigma * (x - alpha * mean) / variance,
        "denoised": mean + gain * (x - alpha * mean),
    }
    expected["v"] = alpha * expected["eps"] - sigma * expected["denoised"]
    for name, value in expected.items():
        torch.testing.assert_close(denoiser.output(name, x, t), value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        denoiser.log_prob(x, t),
        (-0.5 * (x - alpha * mean) ** 2 / variance - 0.5 * torch.log(2 * math.pi * variance))[:, 0],
        rtol=1e-12,
        atol=1e-13,
    )


@every_sde
def test_one_full_gaussian(sde: SDE) -> None:
    law = mixture()
    denoiser = GaussianDenoiser(sde, law.means[0], law.covariances[0])
    t = moderate(sde)[0]
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    marginal = MultivariateNormal(
        alpha * law.means[0], alpha**2 * law.covariances[0] + sigma**2 * torch.eye(2, dtype=F64)
    )
    x = normal(20, 2).requires_grad_()
    log_prob = marginal.log_prob(x)
    torch.testing.assert_close(denoiser.log_prob(x, t), log_prob, rtol=1e-12, atol=1e-12)
    (score,) = torch.autograd.grad(log_prob.sum(), x)
    torch.testing.assert_close(denoiser.score(x, t), score, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3)], ids=["vector", "sequence", "picture"])
@pytest.mark.parametrize("form", ["full", "isotropic", "shared"])
def test_mixtures_of_any_shape(shape: tuple[int, ...], form: str) -> None:
    """A mixture of pictures is the mixture of its flattened entries."""
    sde, d = VP(), math.prod(shape)
    means, weights = normal(2, *shape, seed=3), torch.tensor([1.0, 3.0], dtype=F64)
    root = normal(2, d, d, seed=5) / d**0.5
    covariances = {
        "full": root @ root.mT,
        "isotropic": torch.tensor([0.3, 0.6], dtype=F64),
        "shared": torch.tensor(0.4, dtype=F64),
    }[form]
    shaped = GaussianMixtureDenoiser(sde, weights, means, covariances)
    flat = GaussianMixtureDenoiser(sde, weights, means.flatten(1), covariances)
    x, t = normal(7, *shape), torch.linspace(0.05, 0.9, 7, dtype=F64)
    assert torch.equal(shaped.log_prob(x, t), flat.log_prob(x.flatten(1), t))
    for name in OUTPUTS:
        assert torch.equal(shaped.output(name, x, t), flat.output(name, x.flatten(1), t).reshape(x.shape))
    assert torch.equal(shaped.sample(5, generator(1)), flat.sample(5, generator(1)).reshape(5, *shape))


@every_sde
def test_identities_between_outputs(sde: SDE) -> None:
    denoiser, t = mixture().denoiser(sde), times_of(sde)
    x = sde.perturb(denoiser.sample(len(t), generator(3)), t, normal(len(t), 2))
    alpha, sigma = expand(sde.alpha(t), x), expand(sde.sigma(t), x)
    denoised, eps, score, v = (getattr(denoiser, n)(x, t) for n in ("denoised", "eps", "score", "v"))
    # rounding, amplified in the first line by x - alpha denoised at small noise; covariances of condition below 100
    lost = EPS64 * 400 * (x.abs() + (alpha * denoised).abs())
    assert ((sigma * eps - (x - alpha * denoised)).abs() <= lost).all()
    torch.testing.assert_close(score * sigma, -eps, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(v, alpha * eps - sigma * denoised, rtol=1e-13, atol=1e-13)


def test_the_score_follows_from_the_density() -> None:
    # autograd through the package's own log_prob, on its own terms
    denoiser = mixture().denoiser(VP())
    x, t = normal(30, 2).requires_grad_(), torch.linspace(0.01, 1, 30, dtype=F64)
    (score,) = torch.autograd.grad(denoiser.log_prob(x, t).sum(), x)
    torch.testing.assert_close(denoiser.score(x, t), score, rtol=1e-10, atol=1e-11)


@every_sde
def test_densities_solve_the_fokker_planck_equation(sde: SDE) -> None:
    """dp/dt = -div(f x p) + g^2/2 lap p, which in log p ties density, score, f and g together without a formula."""
    denoiser = mixture().denoiser(sde)
    t = torch.tensor(moderate(sde)[1], dtype=F64).expand(20).clone().requires_grad_()
    x = normal(20, 2).requires_grad_()
    log_p = denoiser.log_prob(x, t)
    dt, score = torch.autograd.grad(log_p.sum(), (t, x), create_graph=True)
    laplacian = sum(torch.autograd.grad(score[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    f, g = sde.f(t), sde.g(t)
    right = -2 * f - f * (x * score).sum(1) + 0.5 * g**2 * (laplacian + (score**2).sum(1))
    torch.testing.assert_close(dt, right, rtol=1e-10, atol=1e-10 * float(right.detach().abs().max()))


def test_no_width_and_no_noise() -> None:
    # point masses: the posterior mean is a softmax of the points
    points = torch.tensor([[-1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], dtype=F64)
    denoiser = GaussianMixtureDenoiser(VE(), torch.ones(3, dtype=F64), points, torch.tensor(0.0, dtype=F64))
    x, t = normal(9, 2), 0.4
    share = torch.softmax(-0.5 * torch.cdist(x, points) ** 2 / float(VE().sigma(t)) ** 2, dim=1)
    torch.testing.assert_close(denoiser.denoised(x, t), share @ points, rtol=1e-12, atol=1e-12)
    # and at t = 0 of an SDE without noise there, every state is its own denoised
    law = mixture().denoiser(VP())
    torch.testing.assert_close(law.denoised(x, 0.0), x, rtol=1e-12, atol=1e-12)
    assert torch.equal(law.eps(x, 0.0), torch.zeros_like(x))


# Draws


@pytest.mark.parametrize("law", [mixture(), isotropic()], ids=["full", "isotropic"])
def test_samples_have_the_moments_of_the_mixture(law: Mixture) -> None:
    n = 100_000
    draws = law.denoiser(VP()).sample(n, generator(5))
    weights, means = law.weights, law.means
    mean = weights @ means
    spread = means - mean
    covariance = torch.einsum("k,kij->ij", weights, law.covariances + spread[:, :, None] * spread[:, None, :])
    # five standard errors, the fourth moment for the covariance's taken from the draws
    assert ((draws.mean(0) - mean).abs() < 5 * (covariance.diagonal() / n).sqrt()).all()
    centered = draws - mean
    products = centered[:, :, None] * centered[:, None, :]
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / n**0.5).all()


def test_samples_have_the_density_of_the_mixture() -> None:
    # E log p(x) of draws at t = 0 is minus the entropy, which torch.distributions' own draws give too
    law = mixture()
    denoiser, n = law.denoiser(VP()), 50_000
    torch.manual_seed(0)
    theirs = law.marginal(1.0, 0.0).sample((n,))
    a, b = denoiser.log_prob(denoiser.sample(n, generator(6)), 0.0), denoiser.log_prob(theirs, 0.0)
    assert abs(float(a.mean() - b.mean())) < 5 * math.hypot(float(a.std()), float(b.std())) / n**0.5


# Times, types and labels


@every_sde
def test_a_time_is_a_number_or_a_tensor(sde: SDE) -> None:
    law = mixture().denoiser(sde)
    network = Denoiser(RandomNetwork(2, dtype=F64), sde, Eps()).requires_grad_(False)
    x = normal(4, 2)
    for t in (sde.t_min, 0.4 * sde.T, sde.T):
        for denoiser in (law, network):
            for name in OUTPUTS:
                number = denoiser.output(name, x, t)
                for same in (torch.tensor(t, dtype=F64), torch.full((4,), t, dtype=F64)):
                    got = denoiser.output(name, x, same)
                    torch.testing.assert_close(got, number, rtol=1e-12, atol=1e-12 * float(number.abs().max()))


@pytest.mark.parametrize("parameterization", parameterizations())
@every_sde
def test_networks_see_one_time_in_every_form(sde: SDE, parameterization: Parameterization) -> None:
    denoiser = Denoiser(RandomNetwork(6, dtype=F64), sde, parameterization).requires_grad_(False)
    x = normal(3, 6)
    for t in (sde.t_min, 0.4 * sde.T, sde.T):
        for name in OUTPUTS:
            number = denoiser.output(name, x, t)
            assert number.dtype == F64
            scale = 1e-12 * float(number.abs().max())
            for same in (torch.tensor(t, dtype=F64), torch.full((3,), t, dtype=F64)):
                torch.testing.assert_close(denoiser.output(name, x, same), number, rtol=1e-10, atol=scale)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_outputs_have_the_type_of_the_data(dtype: torch.dtype) -> None:
    sde = VP()
    law = GaussianMixtureDenoiser(
        sde, torch.ones(2, dtype=dtype), normal(2, 3, dtype=dtype), torch.tensor([0.1, 0.2], dtype=dtype)
    )
    network = Denoiser(RandomNetwork(3, dtype=dtype), sde, Eps())
    x = normal(4, 3, dtype=dtype)
    for denoiser in (law, network):
        for t in (0.3, torch.tensor(0.3), torch.full((4,), 0.3), torch.full((4,), 0.3, dtype=F64)):
            for name in OUTPUTS:
                assert denoiser.output(name, x, t).dtype == dtype


@every_sde
def test_float32_times_are_taken_as_exact(sde: SDE) -> None:
    # an exact denoiser asked at a float32 time answers for that very time, as a Denoiser does
    t32 = torch.tensor([sde.t_min, 0.3 * sde.T, 0.99 * sde.T], dtype=torch.float32)
    x, law = normal(3, 2), mixture().denoiser(sde)
    for name in OUTPUTS:
        expected = law.output(name, x, t32.double())
        torch.testing.assert_close(law.output(name, x, t32), expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(law.log_prob(x, t32), law.log_prob(x, t32.double()))


def test_labels_reach_the_network() -> None:
    network = RandomNetwork(2, dtype=F64)
    denoiser, x, label = Denoiser(network, VP(), Eps()), normal(4, 2), torch.tensor([1, 0, 3, 2])
    labeled = ReverseProcess(denoiser, label)
    for t in (0.5, torch.full((4,), 0.5, dtype=F64)):
        together = labeled.score(x, t)
        assert network.labels[-1] is label
        for b in range(4):
            alone = denoiser.score(x[b : b + 1], 0.5, label[b : b + 1])
            torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(labeled.score(x, 0.5), denoiser.score(x, 0.5))
    part = labeled.select(torch.tensor([2, 0]))
    torch.testing.assert_close(part.score(x[[2, 0]], 0.5), labeled.score(x, 0.5)[[2, 0]], rtol=1e-12, atol=1e-12)
    assert part.nfe == 1


# The reverse process


@every_sde
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_reverse_drifts(sde: SDE, eta: float) -> None:
    law, x = mixture(), normal(5, 2)
    process = ReverseProcess(law.denoiser(sde))
    t = moderate(sde)[0]
    score = law.score(x, float(sde.alpha(t)), float(sde.sigma(t)))
    expected = float(sde.f(t)) * x - (1 + eta**2) / 2 * float(sde.g(t)) ** 2 * score
    for time in (t, torch.tensor(t, dtype=F64), torch.full((5,), t, dtype=F64)):
        torch.testing.assert_close(process.drift(x, time, eta), expected, rtol=1e-11, atol=1e-11)
    assert process.nfe == 3


@every_sde
def test_the_probability_flow_keeps_the_marginals(sde: SDE) -> None:
    # d mean/dt and d var/dt of the flow of a Gaussian, exact, against finite differences of the closed form
    mean, std, t = 0.7, 0.5, moderate(sde)[1]
    process, h = ReverseProcess(gaussian(sde, mean, std)), 1e-5 * moderate(sde)[1]
    (m, v), low, high = (marginal_of_gaussian(sde, s, mean, std) for s in (t, t - h, t + h))
    at = process.drift(torch.tensor([[m], [m + v**0.5]], dtype=F64), t)[:, 0]
    # central differences: relative h^2 = 1e-10 and rounding EPS64 / 1e-5
    assert float(at[0]) == pytest.approx((high[0] - low[0]) / (2 * h), rel=1e-7, abs=1e-8 / t)
    assert float(at[1] - at[0]) * 2 * v**0.5 == pytest.approx((high[1] - low[1]) / (2 * h), rel=1e-7)


# Errors


def test_perfect_network_counts_itself() -> None:
    law = mixture().denoiser(VP())
    network = NetworkFromDenoiser(law, Eps(), "time")
    process = ReverseProcess(Denoiser(network, VP(), Eps()))
    for method in (process.denoised, process.eps, process.score, process.drift):
        method(normal(2, 2), 0.4)
    assert process.nfe == network.calls == 4


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "said"),
    [
        (torch.ones(2), torch.zeros(3, 2), torch.tensor(1.0), r"\(2,\).*\(3, 2\)"),
        (torch.tensor([1.0, 0.0]), torch.zeros(2, 2), torch.tensor(1.0), "positive"),
        (torch.tensor([1.0, math.nan]), torch.zeros(2, 2), torch.tensor(1.0), "positive"),
        (torch.ones(2, 1), torch.zeros(2, 2), torch.tensor(1.0), r"\(2, 1\)"),
        (torch.ones(2), torch.zeros(2, 3), torch.ones(3), r"\(3,\).*\(2, 3, 3\)"),
        (torch.ones(2), torch.zeros(2, 3), torch.eye(3), r"\(3, 3\)"),
    ],
)
def test_what_is_not_a_mixture(weights: Tensor, means: Tensor, covariances: Tensor, said: str) -> None:
    with pytest.raises(UserError, match=said):
        GaussianMixtureDenoiser(VP(), weights, means, covariances)
