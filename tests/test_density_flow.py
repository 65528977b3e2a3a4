"""log p by the probability-flow ODE, against densities that are known.

The model's density at t_min is the prior's, carried back; with the exact score it is the true density but for the
prior, a Gaussian that stands in for the law at T. Both are known here, so the two are told apart.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sde.denoiser import AbstractDenoiser, Denoiser, GaussianDenoiser, GaussianMixtureDenoiser
from sde.density import (
    Divergence,
    Exact,
    Hutchinson,
    HutchPlusPlus,
    LogProb,
    change_of_units,
    decode,
    encode,
    log_prob,
    times_to_noise,
)
from sde.errors import UserError
from sde.grids import GRIDS
from sde.parameterizations import Eps
from sde.processes import EDM, SDE, VE, VP, RectifiedFlow, SubVP
from sde.solvers import SOLVERS, Solver
from tests.problems import F64, NetworkFromDenoiser, RandomNetwork, all_sdes, mixture, normal, observed_order, sdes
from tests.solver_variants import graded, variants

PUBLISHED: dict[str, SDE] = {"vp": VP(), "ve": VE(), "subvp": SubVP(), "edm": EDM()}
published = pytest.mark.parametrize("sde", [pytest.param(s, id=n) for n, s in PUBLISHED.items()])
every_sde = pytest.mark.parametrize("sde", sdes())


def random_covariance(d: int, seed: int = 0) -> Tensor:
    """Eigenvalues from 0.01 to 1."""
    axes, _ = torch.linalg.qr(normal(d, d, seed=seed))
    return axes @ torch.diag(torch.logspace(-2, 0, d, dtype=F64)) @ axes.T


def isotropic(sde: SDE, d: int) -> GaussianDenoiser:
    return GaussianDenoiser(sde, 0.3 * normal(d, seed=1), torch.tensor(0.16, dtype=F64))


def correlated(sde: SDE, d: int) -> GaussianDenoiser:
    return GaussianDenoiser(sde, 0.3 * normal(d, seed=1), random_covariance(d))


def three_modes(sde: SDE, d: int) -> GaussianMixtureDenoiser:
    weights, variances = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.04, 0.2, 0.1], dtype=F64)
    if d > 8:
        return GaussianMixtureDenoiser(sde, weights, 0.4 * normal(3, d, seed=2), variances)
    full = torch.stack([v * 10 * random_covariance(d, seed) for seed, v in enumerate(variances)])
    return GaussianMixtureDenoiser(sde, weights, 0.4 * normal(3, d, seed=2), full)


def without_prior(result: LogProb, exact: Any) -> Tensor:
    """log p with the true law at T in place of the prior, (B,)."""
    return result.log_prob - result.prior + exact.log_prob(result.latent, exact.sde.T)


@published
@pytest.mark.parametrize("d", [2, 8, 192])
@pytest.mark.parametrize("make", [isotropic, correlated, three_modes])
def test_exact_log_densities(make: Any, d: int, sde: SDE) -> None:
    """At the default tolerance, 1e-5 a step, log p is right to 1e-4 nats a dimension; so is what the prior adds."""
    exact = make(sde, d)
    x = exact.sample(1 if d == 192 else 8, torch.Generator().manual_seed(3))
    result = log_prob(exact, x, divergence=Exact(), truncation=True)
    assert result.truncation is not None
    true = exact.log_prob(x, sde.t_min)
    assert float((without_prior(result, exact) - true).abs().max()) < 1e-4 * d
    # the prior is right but for the data's mean and variance at T, of which alpha / sigma is left
    left = float(sde.alpha(sde.T) / sde.sigma(sde.T))
    assert float((result.log_prob - true).abs().max()) < (1e-4 + 4 * left) * d
    without_noise = true if isinstance(sde, VE) else exact.log_prob(x, 0.0)
    if not isinstance(sde, VE):
        assert float((true + result.truncation - without_noise).abs().max()) < 1e-6 * d
    assert float(result.standard_error.abs().max()) == 0
    assert result.latent.shape == x.shape


@published
def test_tight_tolerances(sde: SDE) -> None:
    exact = three_modes(sde, 8)
    x = exact.sample(2, torch.Generator().manual_seed(3))
    solver = SOLVERS.get("dopri5")(rtol=1e-9, atol=1e-9)
    result = log_prob(exact, x, divergence=Exact(), solver=solver)
    assert float((without_prior(result, exact) - exact.log_prob(x, sde.t_min)).abs().max()) < 1e-7 * 8


@every_sde
def test_truncation_is_of_second_order(sde: SDE) -> None:
    """The estimate of log p_0 - log p_t errs by the square of what it estimates."""
    law = mixture()
    x = law.denoiser(sde).sample(16, torch.Generator().manual_seed(1))
    errors, sizes = [], []
    for level in (0.04, 0.02) if float(sde.noise_level(0.0)) < 0.02 else (0.08, 0.04):
        t = float(sde.t_of_noise_level(level))
        shifted = dataclasses.replace(sde, t_min=t)  # type: ignore[type-var]
        denoiser = law.denoiser(shifted)
        # where the flow leads does not matter here: two steps will do
        result = log_prob(denoiser, x, solver=SOLVERS.get("heun")(), steps=2, divergence=Exact(), truncation=True)
        true = law.marginal(1.0, 0.0).log_prob(x) - law.marginal(float(sde.alpha(t)), float(sde.sigma(t))).log_prob(x)
        assert result.truncation is not None
        errors.append(float((result.truncation - true).norm()))
        sizes.append(float(true.norm()))
    assert errors[0] < 0.2 * sizes[0]
    # u^4; but 1 - alpha, of second order in u on VP, is of first on sub-VP and the straight path
    falls = 2.0 if isinstance(sde, RectifiedFlow | SubVP) else 4.0
    assert np.log2(errors[0] / errors[1]) > falls - 0.5


MODERATE = {
    "edm": EDM(T=3.0, t_min=0.3, t_min_sampling=0.3),
    "vp": VP(beta_min=0.5, beta_max=3.0, t_min=0.15, t_min_sampling=0.15),
}
SECOND = [p for p in variants(corrected=False, stepping=True) if p.values[0].both_ways and p.values[0].order > 1]


@cache
def _to_many_digits(sde: SDE) -> tuple[AbstractDenoiser, Tensor, Tensor]:
    """An exact denoiser, four points and their log densities to 1e-12."""
    denoiser = mixture().denoiser(sde)
    x = denoiser.sample(4, torch.Generator().manual_seed(2))
    tight = SOLVERS.get("dopri5")(rtol=1e-13, atol=1e-13)
    return denoiser, x, log_prob(denoiser, x, solver=tight, divergence=Exact()).log_prob


@pytest.mark.parametrize("sde", [pytest.param(s, id=n) for n, s in MODERATE.items()])
@pytest.mark.parametrize("solver", [p for p in SECOND if not p.values[0].stochastic])
def test_every_solver_integrates_the_density_at_its_order(solver: Solver, sde: SDE) -> None:
    denoiser, x, exact = _to_many_digits(sde)
    levels = [float(sde.noise_level(t)) for t in (sde.t_min, sde.T)]

    def error(n: int) -> Tensor:
        places = torch.logspace(*np.log10(levels), n + 1, dtype=F64)
        times = [sde.t_min, *sde.t_of_noise_level(places).tolist()[1:-1], sde.T]
        grid = GRIDS.get("explicit")(times=graded(times)[::-1])
        return log_prob(denoiser, x, solver=solver, grid=grid, divergence=Exact()).log_prob - exact

    n, tolerance = {2: (20, 0.06), 3: (34, 0.1)}.get(solver.order, (20, 0.15))
    assert observed_order(error, n, solver.order) == pytest.approx(solver.order, abs=tolerance)


@pytest.mark.parametrize("name", ["dopri5", "ode", "dpm_adaptive"])
def test_solvers_with_steps_of_their_own(name: str) -> None:
    sde = VP()
    exact = three_modes(sde, 2)
    x = exact.sample(5, torch.Generator().manual_seed(3))
    tolerance = 1e-4 if name == "dpm_adaptive" else 1e-7
    solver = SOLVERS.get(name)(rtol=tolerance, atol=tolerance)
    result = log_prob(exact, x, divergence=Exact(), solver=solver)
    assert float((without_prior(result, exact) - exact.log_prob(x, sde.t_min)).abs().max()) < 20 * tolerance


@every_sde
def test_any_network_has_a_density_that_integrates_to_one(sde: SDE) -> None:
    """The flow is a bijection whatever the network says, so the sum over a grid in the plane is one."""
    network = RandomNetwork(2, dtype=F64).requires_grad_(False)
    denoiser = Denoiser(_Tamed(network), sde, Eps(noise_label="log_sigma"))
    total, spread = _integral(denoiser, 0.0, 1.0, 1), 6.0
    assert total > 0  # the density is finite where it is looked for
    center, width = _where(denoiser, spread)
    assert _integral(denoiser, center, width, 72) == pytest.approx(1.0, abs=5e-3)


class _Tamed(torch.nn.Module):
    """A network whose eps is that of Gaussian data, x sigma / (s^2 alpha^2 + sigma^2), bent by a random network.

    Without the Gaussian's pull the mass would lie where no grid of a reasonable size finds it.
    """

    noise_label = "log_sigma"

    def __init__(self, network: RandomNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        u = torch.exp(4 * c_noise)[:, None]
        return x * u / (0.25 + u**2) + 0.3 * u / (1 + u**2) * self.network(x / (1 + u), c_noise)


def _where(denoiser: Denoiser, spread: float) -> tuple[Tensor, Tensor]:
    """Center and half-widths of the mass, from decoded draws of the prior."""
    z = denoiser.sde.prior_std * normal(400, 2, seed=8)
    x, _ = decode(denoiser, z)
    return x.mean(0), spread * x.std(0)


def _integral(denoiser: Denoiser, center: Tensor | float, half: Tensor | float, n: int) -> float:
    axis = torch.linspace(-1, 1, n, dtype=F64) if n > 1 else torch.zeros(1, dtype=F64)
    unit = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    values = log_prob(denoiser, center + half * unit, divergence=Exact()).log_prob
    assert torch.isfinite(values).all()
    cell = float((torch.as_tensor(half) * torch.ones(2)).prod()) * (2 / max(n - 1, 1)) ** 2
    return float(values.exp().sum()) * cell


@pytest.mark.parametrize(
    ("divergence", "n"),
    [
        (Hutchinson(probes=16), 400),
        (Hutchinson(probes=16, distribution="gaussian"), 400),
        (HutchPlusPlus(rank=4), 100),
    ],
)
def test_probes_are_unbiased_and_their_error_bars_calibrated(divergence: Divergence, n: int) -> None:
    """On the same few steps as the exact trace, so that probes are all that the two differ in."""
    sde = VP()
    exact = correlated(sde, 8)
    x = exact.sample(n, torch.Generator().manual_seed(5))
    steps: dict[str, Any] = {"solver": SOLVERS.get("heun")(), "steps": 20}
    true = log_prob(exact, x, divergence=Exact(), **steps).log_prob
    result = log_prob(exact, x, divergence=divergence, seed=1, **steps)
    assert result.estimates.shape == (n, divergence.estimates)
    error = result.log_prob - true
    assert abs(float(error.mean())) < 4 * float(error.std()) / n**0.5
    inside = float((error.abs() < result.standard_error).double().mean())
    # Student's t with K - 1 degrees of freedom: 0.67 for K = 16, 0.61 for K = 4
    expected = {16: 0.667, 4: 0.609}[divergence.estimates]
    assert abs(inside - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


def test_a_single_probe_has_no_error_bar() -> None:
    exact = correlated(VP(), 8)
    result = log_prob(exact, exact.sample(3), divergence=Hutchinson())
    assert torch.isnan(result.standard_error).all()
    assert torch.isfinite(result.log_prob).all()


def test_change_of_units() -> None:
    """Data in other units on a process in the same units have a density that differs by D log |scale| exactly."""
    sde, scale, d = EDM(), 3.0, 4
    covariance, mean = random_covariance(d), 0.3 * normal(d, seed=1)
    one = GaussianDenoiser(sde, mean, covariance)
    other = GaussianDenoiser(
        EDM(T=scale * sde.T, t_min=scale * sde.t_min, t_min_sampling=scale * sde.t_min_sampling),
        scale * mean,
        scale**2 * covariance,
    )
    x = one.sample(5, torch.Generator().manual_seed(0))
    solvers = [SOLVERS.get("dopri5")(sigma_data=s * 0.5, rtol=1e-10, atol=s * 1e-10) for s in (1.0, scale)]
    here = log_prob(one, x, divergence=Exact(), solver=solvers[0]).log_prob
    there = log_prob(other, scale * x, divergence=Exact(), solver=solvers[1], sigma_data=scale * 0.5).log_prob
    torch.testing.assert_close(there, change_of_units(here, scale, d), rtol=0, atol=1e-8)


@every_sde
@pytest.mark.parametrize(
    "solver", [SOLVERS.get("dopri5")(), SOLVERS.get("ode")(rtol=1e-6, atol=1e-6), SOLVERS.get("adams")()]
)
def test_encode_and_decode_are_inverse(solver: Solver, sde: SDE) -> None:
    exact = three_modes(sde, 2)
    x = exact.sample(6, torch.Generator().manual_seed(4))
    steps = None if solver.default_steps is None else 200
    z, nfe = encode(exact, x, solver=solver, steps=steps)
    back, _ = decode(exact, z, solver=solver, steps=steps)
    assert nfe > 0
    assert float((back - x).square().mean().sqrt()) < 1e-4
    with_density = log_prob(exact, x, solver=solver, steps=steps).latent
    assert float((z - with_density).square().mean().sqrt()) < 1e-3 * sde.prior_std


@pytest.mark.parametrize("name", ["dopri5", "ode", "unipc"])
def test_an_example_does_not_depend_on_its_batch(name: str) -> None:
    """Probes belong to the number of an example, steps to itself."""
    sde = EDM()
    exact, solver = three_modes(sde, 8), SOLVERS.get(name)()
    x = exact.sample(7, torch.Generator().manual_seed(4))
    options: dict[str, Any] = {"solver": solver, "divergence": Hutchinson(probes=2), "seed": 9}
    whole = log_prob(exact, x, **options)
    for rows in ([0, 1, 2], [6], [5, 3]):
        part = log_prob(exact, x[rows], indices=rows, **options)
        torch.testing.assert_close(part.estimates, whole.estimates[rows], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(part.latent, whole.latent[rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["dopri5", "ode", "adams"])
@pytest.mark.parametrize("divergence", [Exact(), Exact(chunk=3), Hutchinson(probes=2), HutchPlusPlus(rank=1)])
def test_forward_passes_are_counted(name: str, divergence: Divergence) -> None:
    sde = VP()
    exact = three_modes(sde, 8)
    network = NetworkFromDenoiser(exact, Eps(), "log_sigma")
    denoiser = Denoiser(network, sde, Eps())
    result = log_prob(denoiser, exact.sample(3), solver=SOLVERS.get(name)(), divergence=divergence, truncation=True)
    assert result.nfe == network.calls
    steps = SOLVERS.get(name)().default_steps
    if steps is not None:
        assert result.nfe == (steps + 1) * divergence.passes(8)


def test_labels_reach_the_network() -> None:
    network = RandomNetwork(3, dtype=torch.float32)
    denoiser = Denoiser(network, VP(), Eps())
    label = torch.tensor([4, 2])
    log_prob(denoiser, normal(2, 3, dtype=torch.float32), label=label, solver=SOLVERS.get("heun")(), steps=3)
    assert all(given is not None and torch.equal(given, label) for given in network.labels)
    one = log_prob(denoiser, normal(2, 3), label=label, solver=SOLVERS.get("ode")())
    other = log_prob(denoiser, normal(2, 3)[1:], label=label[1:], solver=SOLVERS.get("ode")(), indices=[1])
    torch.testing.assert_close(one.log_prob[1:], other.log_prob, rtol=1e-4, atol=1e-3)


def test_a_network_that_is_trained_is_left_alone() -> None:
    """The graph is made inside and goes: weights get no gradients, results carry none, and the state is float64."""
    network = RandomNetwork(3, dtype=torch.float32)
    denoiser = Denoiser(network, VP(), Eps())
    result = log_prob(denoiser, normal(2, 3, dtype=torch.float32), solver=SOLVERS.get("heun")(), steps=3)
    assert result.log_prob.dtype == result.latent.dtype == torch.float64
    assert not result.log_prob.requires_grad
    assert all(weight.grad is None for weight in network.parameters())


def test_dropout_is_off() -> None:
    """A density is one of a function: a network that is being trained is asked in evaluation mode, and given back."""
    network = _Dropping(RandomNetwork(3, dtype=torch.float32))
    denoiser = Denoiser(network.train(), VP(), Eps(noise_label="log_sigma"))
    x = normal(2, 3, dtype=torch.float32)
    options: dict[str, Any] = {"solver": SOLVERS.get("heun")(), "steps": 3}
    first, second = (log_prob(denoiser, x, **options) for _ in range(2))
    assert torch.equal(first.log_prob, second.log_prob)
    assert torch.equal(encode(denoiser, x, **options)[0], encode(denoiser, x, **options)[0])
    assert network.training
    assert network.drop.training


class _Dropping(torch.nn.Module):
    noise_label = "log_sigma"

    def __init__(self, body: RandomNetwork) -> None:
        super().__init__()
        self.body, self.drop = body, torch.nn.Dropout(0.5)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return self.drop(self.body(x, c_noise, label))


def test_error_bars_of_probes_that_agree() -> None:
    """In the plane two vectors of signs agree up to a sign half of the time, and then say nothing of their error."""
    exact = three_modes(VP(), 2)
    result = log_prob(exact, exact.sample(40), divergence=Hutchinson(probes=2))
    alike = (result.estimates[:, 0] - result.estimates[:, 1]).abs() < 1e-12
    assert 5 < int(alike.sum()) < 35
    assert torch.equal(torch.isnan(result.standard_error), alike)


def test_an_empty_batch_and_examples_that_are_none() -> None:
    exact = three_modes(VP(), 2)
    x = exact.sample(3)
    assert log_prob(exact, x[:0]).log_prob.shape == (0,)
    for bad, options, said in (
        (torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), {}, "1 of 2 examples are not finite, number 1"),
        (x, {"label": torch.tensor([1])}, r"label of shape \(1,\) does not fit 3 examples"),
        (x, {"indices": [1, 2]}, r"indices of shape \(2,\) does not fit 3 examples"),
        (x[0], {}, "are no batch"),
        (x.int(), {}, "are no batch"),
    ):
        with pytest.raises(UserError, match=said):
            log_prob(exact, bad, **options)  # type: ignore[arg-type]


def test_times_to_noise() -> None:
    for sde in all_sdes().values():
        for name, cls in SOLVERS.items():
            solver = cls()
            if not solver.both_ways or solver.stochastic:
                with pytest.raises(UserError, match="cannot go"):
                    times_to_noise(solver, sde)
                continue
            times = times_to_noise(solver, sde)
            assert (times[0], times[-1]) == (sde.t_min, sde.T)
            assert len(times) == 2 if solver.default_steps is None else solver.default_steps + 1, name


def test_ways_that_are_none() -> None:
    denoiser: AbstractDenoiser = three_modes(VP(), 2)
    x = normal(2, 2)
    for options, said in (
        ({"solver": SOLVERS.get("euler_maruyama")()}, "EulerMaruyama with these options cannot go"),
        ({"solver": SOLVERS.get("heun")(final="tweedie")}, "cannot go"),
        ({"solver": SOLVERS.get("dopri5")(), "steps": 10}, "steps means nothing to Dopri5"),
        ({"solver": SOLVERS.get("ode")(), "grid": GRIDS.get("uniform")()}, "grid means nothing to SciPyODE"),
        (
            {"solver": SOLVERS.get("heun")(), "grid": GRIDS.get("explicit")(times=[1.0, 0.5])},
            "all the way from T=1 to t_min=1e-05",
        ),
        ({"divergence": Hutchinson(), "probes": normal(2, 1, 3)}, r"probes of shape \(2, 1, 3\) do not fit"),
        ({"divergence": HutchPlusPlus(rank=3)}, "more than the 2 dimensions"),
    ):
        with pytest.raises(UserError, match=said):
            log_prob(denoiser, x, **options)  # type: ignore[arg-type]


def test_progress_is_told() -> None:
    shares: list[float] = []
    log_prob(three_modes(VP(), 2), normal(2, 2), progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
