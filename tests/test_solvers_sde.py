"""Stochastic solvers of fixed steps: the published formulas written out, their laws, and their limits without noise.

`tests/test_solvers.py` holds what every solver must do; here is what these do beyond that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from sde.brownian import BrownianNoise
from sde.denoiser import GaussianDenoiser
from sde.errors import UserError
from sde.processes import EDM, SDE, VE, VP, RectifiedFlow
from sde.randomness import BatchNoise, Noise, RecordedNoise
from sde.reverse import ReverseProcess
from sde.solvers import (
    DDIM,
    Adams,
    Ancestral,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp2SAncestral,
    DPMpp3M,
    DPMpp3MSDE,
    DPMppSDE,
    EulerAncestral,
    EulerMaruyama,
    PredictorCorrector,
    ReverseDiffusion,
    SASolver,
    Solver,
)
from sde.solvers.levels import Levels
from sde.solvers.sa_solver import NoiseRate, noisy_formula
from tests.problems import (
    F64,
    ODD_SDES,
    generator,
    marginal_of_gaussian,
    mixture,
    moderate,
    normal,
    observed_order,
    sdes,
    with_options,
)
from tests.solver_variants import uneven
from tests.test_solvers import exact_law, law, wide_and_narrow

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'

every_sde = pytest.mark.parametrize("sde", sdes())
some_sdes = pytest.mark.parametrize(
    "sde", [VP(), VE(), RectifiedFlow(), ODD_SDES["edm-odd"]], ids=["vp", "ve", "flow", "edm-odd"]
)
Denoise = Callable[[Tensor, float], Tensor]

# one of each, with options under which the published formulas are run to the letter
ALL: list[Solver] = [
    EulerMaruyama(),
    ReverseDiffusion(),
    Ancestral(),
    EulerAncestral(),
    DPMpp2SAncestral(),
    DPMppSDE(),
    DPMpp2MSDE(few_steps=0),
    DPMpp3MSDE(few_steps=0),
    SASolver(few_steps=0),
]


def name(value: Any) -> str | None:
    return type(value).__name__ if isinstance(value, Solver) else None


def run(solver: Solver, sde: SDE, x: Tensor, times: Sequence[float], noise: Noise | None = None) -> Tensor:
    return solver.solve(ReverseProcess(mixture().denoiser(sde)), x, times, noise).x


def places(sde: SDE, low: float = 0.3, high: float = 3.0, n: int = 8) -> list[float]:
    """Long and short steps between two noise levels."""
    end, start = moderate(sde, low, high)
    return uneven(start, end, n)


def even(sde: SDE, low: float, high: float, n: int) -> list[float]:
    """Equal steps in log-SNR."""
    return sde.t_of_noise_level(torch.from_numpy(np.geomspace(high, low, n + 1))).tolist()


# k-diffusion's samplers, in y = x / alpha and u = sigma / alpha, which it calls x and sigma


def ancestral_pair(u: float, s: float, eta: float) -> tuple[float, float]:
    up = min(s, eta * math.sqrt(s**2 * (u**2 - s**2) / u**2))
    return math.sqrt(s**2 - up**2), up


def k_euler_ancestral(
    denoise: Denoise, y: Tensor, levels: Sequence[float], z: Sequence[Tensor], eta: float, s_noise: float
) -> Tensor:
    for (u, s), draw in zip(pairwise(levels), z, strict=False):
        down, up = ancestral_pair(u, s, eta)
        y = y + (y - denoise(y, u)) / u * (down - u) + draw * s_noise * up
    return y


def k_2s_ancestral(
    denoise: Denoise, y: Tensor, levels: Sequence[float], z: Sequence[Tensor], eta: float, s_noise: float
) -> Tensor:
    for (u, s), draw in zip(pairwise(levels), z, strict=False):
        down, up = ancestral_pair(u, s, eta)
        d = denoise(y, u)
        if down == 0:
            y = d
            continue
        h = math.log(u / down)
        middle = math.exp(-0.5 * h) * y - math.expm1(-0.5 * h) * d
        y = math.exp(-h) * y - math.expm1(-h) * denoise(middle, u * math.exp(-0.5 * h)) + draw * s_noise * up
    return y


def k_sde(
    denoise: Denoise, y: Tensor, levels: Sequence[float], z: Sequence[Tensor], eta: float, s_noise: float, r: float
) -> Tensor:
    """Two draws a step: the second noise of a step contains what the first has become on the way to the end."""
    z = list(z)
    for u, s in pairwise(levels):
        d = denoise(y, u)
        if s == 0:
            y = d
            continue
        m = u * (s / u) ** r
        down, up = ancestral_pair(u, m, eta)
        whole_down, whole_up = ancestral_pair(u, s, eta)
        first = z.pop(0)
        inherited = up * whole_down / down
        rest = math.sqrt(max(whole_up**2 - inherited**2, 0.0))
        total = inherited * first + (rest * z.pop(0) if r < 1 else 0.0)  # of standard deviation whole_up
        middle = down / u * y + (1 - down / u) * d + s_noise * up * first
        d_middle = denoise(middle, m)
        lean = 1 / (2 * r)
        y = whole_down / u * y + (1 - whole_down / u) * ((1 - lean) * d + lean * d_middle) + s_noise * total
    return y


def k_multistep_sde(
    denoise: Denoise, y: Tensor, levels: Sequence[float], z: Sequence[Tensor], eta: float, s_noise: float, kind: str
) -> Tensor:
    """sample_dpmpp_2m_sde for the kinds "midpoint" and "heun", sample_dpmpp_3m_sde for "3m"."""
    steps: list[float] = []
    old: list[Tensor] = []
    for (u, s), draw in zip(pairwise(levels), z, strict=False):
        d = denoise(y, u)
        if s == 0:
            return d
        h = math.log(u / s)
        g = h * (eta + 1)
        y = math.exp(-g) * y - math.expm1(-g) * d
        phi_2 = math.expm1(-g) / g + 1
        if kind == "3m" and len(old) >= 2:
            r0, r1 = steps[-1] / h, steps[-2] / h
            d1_0, d1_1 = (d - old[-1]) / r0, (old[-1] - old[-2]) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            y = y + phi_2 * d1 - (phi_2 / g - 0.5) * d2
        elif old and kind == "midpoint":
            y = y - 0.5 * math.expm1(-g) * (d - old[-1]) * h / steps[-1]
        elif old:
            y = y + phi_2 * (d - old[-1]) * h / steps[-1]
        y = y + draw * s * math.sqrt(-math.expm1(-2 * h * eta)) * s_noise
        steps.append(h)
        old.append(d)
    return y


K_DIFFUSION: list[tuple[str, Callable[..., Tensor], Callable[..., Solver], dict[str, Any]]] = [
    ("euler_ancestral", k_euler_ancestral, EulerAncestral, {}),
    ("dpmpp_2s_ancestral", k_2s_ancestral, DPMpp2SAncestral, {}),
    ("dpmpp_sde", k_sde, DPMppSDE, {"r": 0.5}),
    ("dpmpp_sde-third", k_sde, DPMppSDE, {"r": 1 / 3}),
    ("dpmpp_sde-whole", k_sde, DPMppSDE, {"r": 1.0}),
    ("dpmpp_2m_sde", k_multistep_sde, DPMpp2MSDE, {"kind": "midpoint"}),
    ("dpmpp_2m_sde-heun", k_multistep_sde, DPMpp2MSDE, {"kind": "heun"}),
    ("dpmpp_3m_sde", k_multistep_sde, DPMpp3MSDE, {"kind": "3m"}),
]
OURS: dict[str, dict[str, Any]] = {
    "midpoint": {"solver_type": "midpoint", "few_steps": 0},
    "heun": {"solver_type": "heun", "few_steps": 0},
    "3m": {"published": True, "few_steps": 0},
}


@every_sde
@pytest.mark.parametrize(("literal", "cls", "options"), [pytest.param(*c[1:], id=c[0]) for c in K_DIFFUSION])
def test_k_diffusion_to_the_letter(
    literal: Callable[..., Tensor], cls: Callable[..., Solver], options: dict[str, Any], sde: SDE
) -> None:
    """On any SDE x / alpha follows k-diffusion's formulas at sigma / alpha, to u = 0 where there is such a place."""
    x, draws = normal(5, 2, seed=1), list(normal(20, 5, 2, seed=2))
    times = places(sde)
    if float(sde.sigma(0.0)) == 0:
        times.append(0.0)
    levels = [float(sde.noise_level(t)) for t in times]
    denoise = mixture().denoiser(EDM()).denoised
    own = OURS[options["kind"]] if "kind" in options else options
    for eta, s_noise in ((1.0, 1.0), (0.6, 1.0), (1.0, 0.9), (0.0, 1.0)):
        expected = literal(denoise, x / float(sde.alpha(times[0])), levels, draws, eta, s_noise, **options)
        got = run(cls(eta=eta, s_noise=s_noise, **own), sde, x, times, RecordedNoise(draws))
        # the process knows times, whose noise levels come back with a rounding error, times 30 on EDM's odd process
        torch.testing.assert_close(got / float(sde.alpha(times[-1])), expected, rtol=1e-12, atol=1e-11)


# diffusers' schedulers, fed the same draws. Their tables are float32 and the levels of a chain of 1000: they are made
# float64, and the solvers go from level to level of the same chain.


def chain(cls: str, **options: Any) -> Any:
    """A scheduler over 10 steps, whose tables are float64."""
    schedulers = pytest.importorskip("diffusers")
    scheduler = getattr(schedulers, cls)(num_train_timesteps=1000, beta_schedule="linear", **options)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(10)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def seeded(count: int) -> tuple[torch.Generator, list[Tensor]]:
    """A generator and what it will give in float64."""
    given = generator(7)
    return generator(7), [torch.randn(5, 2, generator=given, dtype=F64) for _ in range(count)]


def march(scheduler: Any, levels: Sequence[float], steps: int, scaled: bool = False, **more: Any) -> Tensor:
    """`steps` steps of the scheduler on eps of the mixture; `scaled` for those whose state is x / alpha."""
    sde, x = VP(), normal(5, 2, seed=1)
    denoiser = mixture().denoiser(sde)
    alphas = [(1 + u * u) ** -0.5 for u in levels]
    y = x / alphas[0] if scaled else x
    for i, time in enumerate(scheduler.timesteps[:steps]):
        state = y * alphas[i] if scaled else y
        if scaled:
            scheduler.scale_model_input(y, time)
        options = {k: v[i] if isinstance(v, list) else v for k, v in more.items()}
        eps = denoiser.eps(state, float(sde.t_of_noise_level(levels[i])))
        y = scheduler.step(eps, time, y, **options).prev_sample
    return y * alphas[steps] if scaled else y


def along(solver: Solver, levels: Sequence[float], draws: Sequence[Tensor]) -> Tensor:
    times = [float(VP().t_of_noise_level(u)) if u > 0 else 0.0 for u in levels]
    return run(solver, VP(), normal(5, 2, seed=1), times, RecordedNoise(draws))


def test_ddpm_of_diffusers() -> None:
    """The last step, to a chain's x_0, is the one to u = 0."""
    scheduler = chain("DDPMScheduler", clip_sample=False)
    given, draws = seeded(10)
    kept = scheduler.alphas_cumprod[scheduler.timesteps]
    levels = [*((1 - kept) / kept).sqrt().tolist(), 0.0]
    got = march(scheduler, levels, 10, generator=given)
    # it forms 1 - product in float64 from float32 tables; the mean's two coefficients cancel to five digits
    torch.testing.assert_close(along(Ancestral(), levels, draws), got, rtol=1e-9, atol=1e-9)


def test_euler_ancestral_of_diffusers() -> None:
    scheduler = chain("EulerAncestralDiscreteScheduler")
    given, draws = seeded(10)
    levels = scheduler.sigmas.tolist()
    got = march(scheduler, levels, 10, scaled=True, generator=given)
    # it rounds its state, of up to 160, to float32 in each step
    torch.testing.assert_close(along(EulerAncestral(), levels, draws), got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["midpoint", "heun"])
def test_dpmpp_2m_sde_of_diffusers(kind: str) -> None:
    """Lower orders at the end of a short grid included."""
    options = {"algorithm_type": "sde-dpmsolver++", "solver_type": kind, "final_sigmas_type": "sigma_min"}
    scheduler = chain("DPMSolverMultistepScheduler", **options)
    draws = list(normal(10, 5, 2, seed=2))
    levels = scheduler.sigmas.tolist()
    got = march(scheduler, levels, 10, variance_noise=draws)
    # it rounds state and draws to float32 in each step
    torch.testing.assert_close(along(DPMpp2MSDE(solver_type=kind), levels, draws), got, rtol=1e-5, atol=1e-6)


def test_dpmpp_sde_of_diffusers() -> None:
    """With a Brownian path in the clock in which the noise is exact; its own runs in sigma."""
    pytest.importorskip("torchsde")
    scheduler = chain("DPMSolverSDEScheduler")
    draws = normal(20, 5, 2, seed=2)
    levels = [*scheduler.sigmas[::2].tolist()]
    asked: list[tuple[float, float]] = []

    def noise(u: Tensor, s: Tensor) -> Tensor:
        """The first of a step is one draw; the second has what it became, by the variances of the levels."""
        i = len(asked)
        asked.append((float(u), float(s)))
        if i % 2 == 0:
            return draws[i]
        middle = asked[i - 1][1]
        share = (middle**-2 - float(u) ** -2) / (float(s) ** -2 - float(u) ** -2)
        return share**0.5 * draws[i - 1] + (1 - share) ** 0.5 * draws[i]

    scheduler.noise_sampler = noise
    sde, count = VP(), 8
    denoiser, alphas = mixture().denoiser(sde), [(1 + u * u) ** -0.5 for u in levels]
    y = normal(5, 2, seed=1) / alphas[0]
    for i in range(count):
        for j, u in enumerate((levels[i], math.sqrt(levels[i] * levels[i + 1]))):
            eps = denoiser.eps(y * (1 + u * u) ** -0.5, float(sde.t_of_noise_level(u)))
            y = scheduler.step(eps, scheduler.timesteps[2 * i + j], y).prev_sample
    got = along(DPMppSDE(), levels[: count + 1], list(draws))
    torch.testing.assert_close(got, y * alphas[count], rtol=1e-9, atol=1e-9)


def test_first_order_sa_solver_of_diffusers() -> None:
    """(With two values it adds a term of third order that the paper does not have.)"""
    tau = 0.8
    scheduler = chain("SASolverScheduler", predictor_order=1, corrector_order=1, tau_func=lambda t: tau)
    given, draws = seeded(10)
    levels = scheduler.sigmas.tolist()
    got = march(scheduler, levels, 9, generator=given)
    solver = SASolver(1, 1, tau=tau, few_steps=0)
    torch.testing.assert_close(along(solver, levels[:10], draws), got, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
def test_sa_solver_coefficients_of_diffusers(tau: float) -> None:
    """Its predictor of three values."""
    scheduler = chain("SASolverScheduler", predictor_order=3, corrector_order=3)
    levels = scheduler.sigmas.tolist()
    values, x, z = list(normal(3, 5, 2, seed=3)), normal(5, 2, seed=1), normal(5, 2, seed=2)
    scheduler.model_outputs = values[::-1]
    scheduler._step_index = 4
    expected = scheduler.stochastic_adams_bashforth_update(
        model_output=values[0], sample=x, noise=z, order=3, tau=torch.tensor(tau, dtype=F64)
    )
    sde = VP()
    at = Levels(sde, [float(sde.t_of_noise_level(u)) for u in levels[:6]])
    decay, weights, spread = noisy_formula(at, 4, 5, [4, 3, 2], NoiseRate(tau**2))
    got = decay * x + sum(w * value for w, value in zip(weights, values, strict=True)) + spread * z
    # the primitives of its integrals cancel
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# Special cases that must coincide


def coincide(a: Solver, b: Solver, sde: SDE, times: list[float], rtol: float = 1e-12) -> None:
    x, draws = normal(5, 2, seed=1), list(normal(40, 5, 2, seed=2))
    got = [run(solver, sde, x, times, RecordedNoise(draws) if solver.stochastic else None) for solver in (a, b)]
    torch.testing.assert_close(*got, rtol=rtol, atol=rtol)


TWINS: list[tuple[Solver, Solver]] = [
    (EulerMaruyama(eta=0), PredictorCorrector(predictor="euler_maruyama", corrector="none", probability_flow=True)),
    (ReverseDiffusion(eta=0), PredictorCorrector(corrector="none", probability_flow=True)),
    (Ancestral(eta=0), DDIM()),
    (EulerAncestral(eta=0), DDIM()),
    (DPMpp2SAncestral(eta=0), DPMpp2S()),
    (DPMppSDE(eta=0), DPMpp2S()),
    (DPMpp2MSDE(eta=0, few_steps=0), DPMpp2M(few_steps=0)),
    (DPMpp2MSDE(eta=0, few_steps=20), DPMpp2M(few_steps=20)),
    (DPMpp2MSDE(eta=0, solver_type="heun", few_steps=0), DPMpp2M(solver_type="heun", few_steps=0)),
    (DPMpp3MSDE(eta=0, few_steps=0), DPMpp3M(few_steps=0)),
    (DPMpp3MSDE(eta=0, few_steps=20), DPMpp3M(few_steps=20)),
    (SASolver(1, 0, tau=0), DDIM()),
    (SASolver(2, 0, tau=0, few_steps=0), DPMpp2M(solver_type="heun", few_steps=0)),
    (SASolver(3, 0, tau=0, few_steps=20), DPMpp3M(few_steps=20)),
    *(
        (
            SASolver(order, order, tau=0, few_steps=0),
            Adams(order, prediction="denoised", variable="log_snr", few_steps=0),
        )
        for order in (1, 2, 3, 4)
    ),
]
ALIKE: list[tuple[Solver, Solver]] = [
    (ReverseDiffusion(), PredictorCorrector(corrector="none")),
    (Ancestral(), PredictorCorrector(predictor="ancestral", corrector="none")),
    *((Ancestral(eta), DDIM(eta)) for eta in (0.3, 1.0)),
    *((Ancestral(eta), EulerAncestral(eta)) for eta in (0.3, 1.0)),
    (Ancestral(), SASolver(1, 0)),
    (DPMpp2MSDE(eta=0.49, solver_type="heun"), SASolver(2, 0, tau=0.7)),
    (DPMpp3MSDE(eta=0.49), SASolver(3, 0, tau=0.7)),
]


@every_sde
@pytest.mark.parametrize(("a", "b"), TWINS, ids=name)
def test_no_noise_is_the_ode_twin(a: Solver, b: Solver, sde: SDE) -> None:
    coincide(a, b, sde, places(sde, 0.1, 3.0))
    if float(sde.sigma(0.0)) == 0:
        coincide(a, b, sde, [*places(sde, 0.1, 3.0, 4), 0.0])


@every_sde
@pytest.mark.parametrize(("a", "b"), ALIKE, ids=name)
def test_two_names_for_one_method(a: Solver, b: Solver, sde: SDE) -> None:
    coincide(a, b, sde, places(sde, 0.1, 3.0))


@some_sdes
@pytest.mark.parametrize("solver", ALL, ids=name)
def test_the_way_to_no_noise_is_continuous(solver: Solver, sde: SDE) -> None:
    x, draws = normal(5, 2, seed=1), list(normal(40, 5, 2, seed=2))
    none, little, more = (
        run(with_options(solver, eta=e, tau=e**0.5), sde, x, places(sde), RecordedNoise(draws)) for e in (0, 1e-8, 4e-8)
    )
    # noise and what it does are of the order of eta, or its square root where eta is a variance
    change, larger = float((little - none).norm()), float((more - none).norm())
    assert 0 < change < 1e-2
    assert larger / change == pytest.approx(4 if not hasattr(solver, "few_steps") else 2, rel=1e-2)


@some_sdes
def test_first_order_sa_solver_is_ddim(sde: SDE) -> None:
    """x_s = alpha_s D + sqrt(sigma_s^2 - c^2) eps + c z with c^2 = sigma_s^2 (1 - exp(-2 tau^2 h))."""
    tau, denoiser = 0.7, mixture().denoiser(sde)
    s, t = moderate(sde)
    x, z = normal(5, 2, seed=1), normal(1, 5, 2, seed=2)
    h = 0.5 * float(sde.log_snr(s) - sde.log_snr(t))
    alpha, sigma = float(sde.alpha(s)), float(sde.sigma(s))
    c = sigma * math.sqrt(-math.expm1(-2 * tau**2 * h))
    expected = alpha * denoiser.denoised(x, t) + math.sqrt(sigma**2 - c**2) * denoiser.eps(x, t) + c * z[0]
    got = run(SASolver(1, 0, tau=tau), sde, x, [t, s], RecordedNoise(z))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# SA-Solver's integrals


@pytest.mark.parametrize(
    "noise", [NoiseRate(0.0), NoiseRate(1.0), NoiseRate(0.3, low=0.6), NoiseRate(9.0, low=0.4, high=1.1)], ids=str
)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_weights_are_the_integrals(noise: NoiseRate, count: int) -> None:
    """y_s by SciPy's quadrature of the integrals as they stand, the polynomials from numpy's fit."""
    sde = VP()
    levels = Levels(sde, even(sde, 0.3, 3.0, 4))
    i, j, nodes = 3, 4, [3, 2, 1, 0][:count]
    decay, weights, spread = noisy_formula(levels, i, j, nodes, noise)
    at = [-math.log(levels.u[k]) for k in nodes]
    start, end = -math.log(levels.u[i]), -math.log(levels.u[j])

    def rate(point: float) -> float:
        return noise.rate * (noise.low < math.exp(-point) < noise.high)

    breaks = [
        p for p in (-math.log(u) if 0 < u < math.inf else end for u in (noise.high, noise.low)) if start < p < end
    ]

    def between(point: float) -> float:
        """The integral of tau^2 from a place to the end."""
        low, high = (min(max(-math.log(u) if u > 0 else math.inf, point), end) for u in (noise.high, noise.low))
        return noise.rate * (high - low)

    assert decay == pytest.approx(levels.alpha[j] / levels.alpha[i] * math.exp(start - end - between(start)), rel=1e-12)
    assert spread**2 == pytest.approx(levels.sigma[j] ** 2 * -math.expm1(-2 * between(start)), rel=1e-12, abs=1e-15)
    for k, weight in enumerate(weights):
        basis = np.linalg.solve(np.vander(at), np.eye(count)[k])

        def integrand(point: float, basis: np.ndarray = basis) -> float:
            return (1 + rate(point)) * math.exp(point - end - between(point)) * float(np.polyval(basis, point))

        expected, _ = quad(integrand, start, end, points=breaks or None, epsabs=1e-13, epsrel=1e-13)
        # the Vandermonde system costs four digits
        assert weight == pytest.approx(levels.alpha[j] * expected, rel=1e-9, abs=1e-11)


def test_weights_of_long_steps_and_much_noise() -> None:
    """A constant D is integrated exactly: weights sum up to alpha_s - alpha_t decay, whatever the exponents."""
    sde = VE()
    levels = Levels(sde, [1.0, 0.6, 0.1])
    for tau in (0.0, 1.0, 5.0, 20.0):
        for nodes in ([1], [1, 0]):
            decay, weights, _ = noisy_formula(levels, 1, 2, nodes, NoiseRate(tau**2))
            assert sum(weights) == pytest.approx(1 - decay, rel=1e-13)


# Laws

POINTWISE: list[Solver] = [
    Ancestral(),
    Ancestral(eta=0.4),
    DPMpp2SAncestral(),
    DPMpp2SAncestral(eta=0.4),
    DPMppSDE(r=0.3),
    DPMppSDE(eta=0.4),
    DPMppSDE(r=1.0),
    DPMpp2MSDE(),
    DPMpp2MSDE(solver_type="heun", eta=2.0),
    DPMpp3MSDE(),
    DPMpp3MSDE(eta=0.4, published=True),
    SASolver(),
    SASolver(3, 4, tau=0.6),
    SASolver(tau=1.5, tau_low=0.5, tau_high=1.2),
]


@every_sde
@pytest.mark.parametrize("solver", POINTWISE, ids=name)
def test_noise_is_exact(solver: Solver, sde: SDE) -> None:
    """Of data that are one point D is known: any number of steps and any amount of noise leave the exact law."""
    low, high = moderate(sde)
    point = GaussianDenoiser(sde, torch.tensor([0.7], dtype=F64), torch.tensor(0.0, dtype=F64))
    m, v = (torch.tensor([value], dtype=F64) for value in marginal_of_gaussian(sde, high, 0.7, 0.0))
    mean, variance = marginal_of_gaussian(sde, low, 0.7, 0.0)
    for n in (1, 2, 6):
        got = law(solver, point, uneven(high, low, n) if n > 1 else [high, low], m, v)
        assert float(got[0]) == pytest.approx(mean, abs=1e-12)
        assert float(got[1]) == pytest.approx(variance, rel=1e-12)


def law_error(solver: Solver, sde: SDE, times: list[float]) -> Tensor:
    """Errors of mean and variance on two Gaussians, without drawing."""
    denoiser = wide_and_narrow(sde)
    m, v = exact_law(denoiser, times[0])
    mean, variance = exact_law(denoiser, times[-1])
    got = law(solver, denoiser, times, m, v)
    return torch.cat([got[0] - mean, got[1] - variance])


@pytest.mark.parametrize(
    ("solver", "steps"),
    [
        (EulerMaruyama(eta=0.5), 24),
        (ReverseDiffusion(eta=0.5), 24),
        (Ancestral(eta=0.5), 24),
        (DPMpp2SAncestral(eta=0.5), 24),
        (DPMppSDE(eta=0.5), 24),
        (DPMppSDE(r=0.3), 24),
        (DPMppSDE(r=1.0), 24),
        (DPMpp2MSDE(eta=0.5, few_steps=0), 24),
        (DPMpp2MSDE(few_steps=1000), 24),  # one step of order 1 at the end costs no order
        (DPMpp3MSDE(), 60),
        (DPMpp3MSDE(eta=0.5), 60),
        (DPMpp3MSDE(published=True), 60),
        (SASolver(2, 0, tau=0.5), 60),
        (SASolver(3, 3), 100),
        (SASolver(3, 4, tau=0.5), 60),
        # the interval's ends are places of every grid
        (SASolver(tau_low=2**-0.5, tau_high=2**0.5), 100),
    ],
    ids=name,
)
def test_weak_order_of_other_options(solver: Solver, steps: int) -> None:
    """As `test_weak_order`, for amounts of noise in between and formulas that need more steps to show their order.

    But for the first two, the law of x / alpha at the same noise levels is the same on every process.
    """
    sde = RectifiedFlow()
    order = observed_order(lambda n: law_error(solver, sde, even(sde, 0.5, 2.0, n)), steps, solver.order)
    assert order == pytest.approx(solver.order, abs=0.03)


def test_independent_noises_would_cost_an_order() -> None:
    """DPM-Solver++ (stochastic) with a noise of its own in its intermediate place: weak order 1."""
    sde = VP()
    times = {n: even(sde, 0.5, 2.0, n) for n in (12, 24, 48, 96)}
    denoiser = wide_and_narrow(sde)
    _, v = exact_law(denoiser, float(sde.t_of_noise_level(2.0)))
    _, variance = exact_law(denoiser, float(sde.t_of_noise_level(0.5)))

    def error(n: int) -> Tensor:
        """Of the variance, propagated by hand: D is affine in y with slope k(u)."""
        scale = float(sde.alpha(times[n][0]))
        got, sizes = v / scale**2, torch.tensor([0.09, 1.21], dtype=F64)
        levels = [float(sde.noise_level(t)) for t in times[n]]
        for u, s in pairwise(levels):
            middle = math.sqrt(u * s)
            k, k_middle = sizes / (sizes + u**2), sizes / (sizes + middle**2)
            (down, up), (whole, whole_up) = ancestral_pair(u, middle, 1.0), ancestral_pair(u, s, 1.0)
            to_middle = down / u + (1 - down / u) * k
            gain = whole / u + (1 - whole / u) * k_middle * to_middle
            got = gain**2 * got + ((1 - whole / u) * k_middle * up) ** 2 + whole_up**2
        return got * float(sde.alpha(times[n][-1])) ** 2 - variance

    assert observed_order(error, 24, 1) == pytest.approx(1, abs=0.03)
    assert float(error(24).norm()) > 10 * float(law_error(DPMppSDE(), sde, times[24]).norm())


@cache
def mixture_moments(sde: SDE, samples: int = 100_000) -> tuple[Tensor, Tensor]:
    """Samples at noise level 2, and E[(x, y, x^2, y^2, x y, cos 2x, cos 2y)] at level 0.3, in closed form."""
    low, high = moderate(sde, 0.3, 2.0)
    target = mixture()
    x = sde.perturb(target.denoiser(sde).sample(samples, generator(1)), high, normal(samples, 2, seed=2))
    alpha, sigma = float(sde.alpha(low)), float(sde.sigma(low))
    means = alpha * target.means
    covariances = alpha**2 * target.covariances + sigma**2 * torch.eye(2, dtype=F64)
    variances = covariances.diagonal(dim1=1, dim2=2)
    second = variances + means**2
    product = covariances[:, 0, 1] + means[:, 0] * means[:, 1]
    waves = torch.cos(2 * means / alpha) * torch.exp(-2 * variances / alpha**2)
    each = torch.cat([means, second, product[:, None], waves], 1)
    return x, target.weights @ each


def moments_of(sde: SDE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of samples, with standard errors."""
    alpha = float(sde.alpha(moderate(sde, 0.3, 2.0)[0]))
    each = torch.cat([x, x**2, x[:, :1] * x[:, 1:], torch.cos(2 * x / alpha)], 1)
    return each.mean(0), each.std(0) / len(x) ** 0.5


@pytest.mark.parametrize(
    "solver",
    [
        Ancestral(),
        DPMpp2SAncestral(),
        DPMppSDE(),
        DPMpp2MSDE(few_steps=0),
        DPMpp3MSDE(few_steps=0),
        SASolver(few_steps=0),
    ],
    ids=name,
)
def test_weak_error_on_a_mixture(solver: Solver) -> None:
    """Moments where D is not linear: steps of a quarter divide the error by 4^order, within the Monte-Carlo error."""
    sde = VP()
    x, exact = mixture_moments(sde)
    errors, bars = [], []
    for n in (3, 12):
        mean, bar = moments_of(sde, run(solver, sde, x, even(sde, 0.3, 2.0, n), BatchNoise(x, generator(n))))
        errors.append(float((mean - exact).norm()))
        bars.append(float(bar.norm()))
    coarse, fine = errors
    # seen against the bars, the length of the Monte-Carlo error: 0.007, and at most twice that in 1 case of 400. The
    # next order's share of the error grows as the steps, 0.6 and 0.16 in log u
    assert coarse > 10 * bars[0]
    assert fine < 1.5 * coarse / 4**solver.order + 2 * bars[1]
    if solver.order == 1:
        assert fine > coarse / 4 / 1.5 - 2 * bars[1]


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_one_brownian_path_is_refined(solver: Solver) -> None:
    """On a fixed path the end point converges, of strong order 1: draws of a step lie side by side on the path."""
    sde = VP()
    x = normal(64, 2, seed=1)
    path = BrownianNoise(3, range(64), (2,), lambda t: 0.5 * float(sde.log_snr(t)), dtype=F64)
    ends = [run(solver, sde, x, even(sde, 0.4, 1.6, n), path) for n in (16, 32, 64, 256)]
    errors = [float((end - ends[-1]).norm()) for end in ends[:-1]]
    # the finest has 1/16 to 1/4 of the others' error: ratios of first order are 2.1 and 2.3, of order 1/2 1.6 and 2
    assert errors[0] / errors[2] > 2**1.6
    assert errors[2] < 0.05 * float(ends[-1].norm())


# Steps to u = 0


@pytest.mark.parametrize("sde", [VP(), EDM(), RectifiedFlow()], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("solver", [s for s in ALL if not isinstance(s, EulerMaruyama)], ids=name)
def test_steps_to_no_noise(solver: Solver, sde: SDE) -> None:
    """The last step of a grid to u = 0 is the denoised, without a draw; of reverse diffusion it is so to O(1 - a)."""
    times, x = places(sde, 0.02, 3.0), normal(5, 2, seed=1)
    draws = list(normal(40, 5, 2, seed=2))
    before, whole = RecordedNoise(draws), RecordedNoise(draws)
    denoiser = mixture().denoiser(sde)
    # a corrector still moves the place before the last
    head = with_options(solver, corrector_order=0)
    x_end = run(head, sde, x, times, before)
    got = run(head, sde, x, [*times, 0.0], whole)
    assert before.used == whole.used
    expected = denoiser.denoised(x_end, times[-1])
    if isinstance(solver, ReverseDiffusion):
        a = float(sde.alpha(times[-1]))
        torch.testing.assert_close(got, (2 - a) * x_end + a * (expected - x_end / a), rtol=1e-10, atol=1e-10)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.isfinite(run(solver, sde, x, [*times, 0.0], RecordedNoise(draws))).all()
    single = run(with_options(solver, eta=0.0, tau=0.0), sde, x, [times[-1], 0.0])
    assert torch.isfinite(single).all()


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_evaluations(solver: Solver) -> None:
    sde, x = VP(), normal(3, 2)
    twice = isinstance(solver, DPMppSDE | DPMpp2SAncestral)
    for times, expected in (([1.0, 0.5, 0.2, 0.1], 6 if twice else 3), ([1.0, 0.5, 0.2, 0.0], 5 if twice else 3)):
        process = ReverseProcess(mixture().denoiser(sde))
        assert solver.solve(process, x, times, BatchNoise(x, generator(1))).nfe == expected


# Options


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (ReverseDiffusion, {"eta": -0.5}, "solver.eta=-0.5"),
        (Ancestral, {"eta": 1.5}, "solver.eta=1.5.*at most 1"),
        (EulerAncestral, {"eta": 1.5}, "solver.eta=1.5.*at most 1"),
        (EulerAncestral, {"s_noise": -1.0}, "solver.s_noise=-1"),
        (DPMpp2SAncestral, {"eta": -1}, "solver.eta=-1"),
        (DPMpp2SAncestral, {"s_noise": math.nan}, "solver.s_noise=nan"),
        (DPMppSDE, {"r": 0.0}, "solver.r=0"),
        (DPMppSDE, {"r": 1.1}, "solver.r=1.1"),
        (DPMppSDE, {"eta": 1.1}, "solver.eta=1.1"),
        (DPMpp2MSDE, {"solver_type": "huen"}, "did you mean 'heun'"),
        (DPMpp2MSDE, {"eta": -1.0}, "solver.eta=-1"),
        (DPMpp2MSDE, {"few_steps": -1}, "solver.few_steps=-1"),
        (DPMpp3MSDE, {"eta": math.inf}, "solver.eta=inf"),
        (DPMpp3MSDE, {"published": 1}, "solver.published=1"),
        (SASolver, {"predictor_order": 0}, "solver.predictor_order=0.*1 to 4"),
        (SASolver, {"predictor_order": 5}, "solver.predictor_order=5"),
        (SASolver, {"corrector_order": 6}, "solver.corrector_order=6"),
        (SASolver, {"corrector_order": True}, "solver.corrector_order=True"),
        (SASolver, {"tau": -1.0}, "solver.tau=-1"),
        (SASolver, {"tau_low": 2.0, "tau_high": 1.0}, "solver.tau_high=1.0.*solver.tau_low=2.0"),
        (SASolver, {"tau_high": math.nan}, "solver.tau_high=nan"),
        (SASolver, {"few_steps": -1}, "solver.few_steps=-1"),
        *((type(solver), {"final": "zero"}, "solver.final='zero'") for solver in ALL),
    ],
)
def test_bad_options_are_named(cls: type[Solver], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        cls(**options)


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_no_noise_needs_no_source(solver: Solver) -> None:
    silent = with_options(solver, eta=0.0, tau=0.0)
    assert not silent.stochastic
    assert torch.isfinite(run(silent, VP(), normal(2, 2), [1.0, 0.5, 0.1])).all()
    if hasattr(solver, "s_noise"):
        quiet = with_options(solver, s_noise=0.0)
        assert not quiet.stochastic
        assert torch.isfinite(run(quiet, VP(), normal(2, 2), [1.0, 0.5, 0.1])).all()
