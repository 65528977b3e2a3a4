"""Multistep solvers against their printed formulas, SciPy's quadrature and diffusers; their orders, starts and ends.

The printed formulas are written for x itself, in alpha, sigma and lambda = log(alpha / sigma), one step at a time.
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

from sde.denoiser import AbstractDenoiser
from sde.errors import UserError
from sde.processes import EDM, SDE, VE, VP, SubVP
from sde.reverse import ReverseProcess
from sde.solvers import DEIS, IPNDM, LMS, DPMpp2M, DPMpp3M, GradientEstimation, Solver, UniPC
from tests.problems import flow_end_point, generator, mixture, moderate, normal, observed_order, sdes
from tests.solver_variants import graded, stretched, uneven, uniform

every_sde = pytest.mark.parametrize("sde", sdes())
Coefficients = tuple[float, float, float]


def start(sde: SDE) -> Tensor:
    """Four states at noise level 3."""
    high = moderate(sde)[1]
    return sde.perturb(mixture().denoiser(sde).sample(4, generator(1)), high, normal(4, 2, seed=2))


def solve(solver: Solver, sde: SDE, x: Tensor, times: list[float]) -> Tensor:
    return solver.solve(ReverseProcess(mixture().denoiser(sde)), x, times).x


def coefficients(sde: SDE, times: Sequence[float]) -> list[Coefficients]:
    """(alpha, sigma, lambda) at each time."""
    pairs = [(float(sde.alpha(t)), float(sde.sigma(t))) for t in times]
    return [(a, s, math.log(a / s) if s > 0 else math.inf) for a, s in pairs]


Update = Callable[[list[Coefficients], int, Tensor, list[Tensor]], Tensor]


def march(update: Update, output: str, denoiser: AbstractDenoiser, x: Tensor, times: list[float]) -> Tensor:
    """`update(places, i, x, m)` from place i to the next, m the values of the network up to the one at i."""
    places, values = coefficients(denoiser.sde, times), list[Tensor]()
    for i in range(len(times) - 1):
        values.append(denoiser.output(output, x, times[i]))
        x = update(places, i, x, values)
    return x


# One value is DDIM


@every_sde
@pytest.mark.parametrize(
    "solver",
    [
        LMS(order=1),
        DEIS(order=1),
        DEIS(order=1, variable="time"),
        IPNDM(solver_order=1),
        GradientEstimation(gamma=1.0),
        UniPC(solver_order=1, corrector=False),
        UniPC(solver_order=1, corrector=False, variant="bh1", prediction="eps"),
    ],
    ids=repr,
)
def test_one_value_is_ddim(solver: Solver, sde: SDE) -> None:
    """x_s = alpha_s D + sigma_s eps: Euler's method in u = sigma / alpha."""
    denoiser, times = mixture().denoiser(sde), uneven(*reversed(moderate(sde)), 6)
    x = y = start(sde)
    for t, s in pairwise(times):
        eps = denoiser.eps(y, t)
        scaled = y / float(sde.alpha(t)) + (float(sde.noise_level(s)) - float(sde.noise_level(t))) * eps
        y = float(sde.alpha(s)) * denoiser.denoised(y, t) + float(sde.sigma(s)) * eps
        torch.testing.assert_close(y, float(sde.alpha(s)) * scaled, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(solve(solver, sde, x, times), y, rtol=1e-10, atol=1e-10)


@every_sde
def test_deis_in_the_noise_level_is_lms(sde: SDE) -> None:
    times = uneven(*reversed(moderate(sde)), 8)
    got = [solve(s, sde, start(sde), times) for s in (LMS(), DEIS(order=4, variable="noise_level", few_steps=0))]
    torch.testing.assert_close(got[0], got[1], rtol=1e-13, atol=1e-13)


# The weights


def quadrature(sde: SDE, solver: Solver, times: list[float], i: int) -> list[float]:
    """Weights of step i by SciPy: the Lagrange polynomials of the values, times what the flow multiplies them with."""
    denoised = isinstance(solver, DPMpp3M)
    variable: dict[str, Callable[[float], float]] = {
        "log_snr": math.log,
        "noise_level": lambda u: u,
        "time": lambda u: float(sde.t_of_noise_level(u)),
    }
    v = variable["log_snr" if denoised else getattr(solver, "variable", "noise_level")]
    u = [float(sde.noise_level(t)) for t in times]
    nodes = [v(u[i - k]) for k in range(min(solver.order, i + 1))]
    # d(x / alpha) = eps du; d(x / sigma) = D dlambda / u = -D du / u^2
    reach = float(sde.alpha(times[i + 1])) * (u[i + 1] if denoised else 1.0)

    def weight(k: int) -> float:
        def integrand(at: float) -> float:
            factors = [(v(at) - n) / (nodes[k] - n) for n in nodes if n != nodes[k]]
            return math.prod(factors) * (-1 / at**2 if denoised else 1.0)

        return reach * quad(integrand, u[i], u[i + 1], epsabs=1e-13, epsrel=1e-13)[0]

    return [weight(k) for k in range(len(nodes))]


@pytest.mark.parametrize("sde", [VP(), VE(), SubVP()], ids=["vp", "ve", "subvp"])
@pytest.mark.parametrize(
    "solver",
    [LMS(order=5), DEIS(order=4), DEIS(variable="time"), DEIS(variable="noise_level"), DPMpp3M(few_steps=0)],
    ids=repr,
)
def test_weights_against_quadrature(solver: Any, sde: SDE) -> None:
    times = uneven(sde.T, sde.t_min_sampling, 16)
    for i, step in enumerate(solver.plan(sde, times)):
        expected = quadrature(sde, solver, times, i)
        scale = sum(abs(w) for w in expected)
        assert list(step[-1].terms) == pytest.approx(expected, rel=1e-9, abs=1e-10 * scale), i


# The printed formulas


def adams_bashforth(i: int, m: list[Tensor], order: int) -> Tensor:
    """eps of iPNDM, with its start."""
    count = min(order, i + 1)
    if count == 1:
        return m[-1]
    if count == 2:
        return (3 * m[-1] - m[-2]) / 2
    if count == 3:
        return (23 * m[-1] - 16 * m[-2] + 5 * m[-3]) / 12
    return (55 * m[-1] - 59 * m[-2] + 37 * m[-3] - 9 * m[-4]) / 24


def ddim(places: list[Coefficients], i: int, x: Tensor, eps: Tensor) -> Tensor:
    (a, s, _), (a_next, s_next, _) = places[i : i + 2]
    return a_next * (x - s * eps) / a + s_next * eps


@every_sde
@pytest.mark.parametrize("order", [2, 3, 4])
def test_ipndm_as_printed(sde: SDE, order: int) -> None:
    times, x = uneven(*reversed(moderate(sde)), 8), start(sde)
    expected = march(
        lambda places, i, x, m: ddim(places, i, x, adams_bashforth(i, m, order)),
        "eps",
        mixture().denoiser(sde),
        x,
        times,
    )
    got = solve(IPNDM(solver_order=order, few_steps=0), sde, x, times)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@every_sde
@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_gradient_estimation_as_printed(sde: SDE, gamma: float) -> None:
    times, x = uneven(*reversed(moderate(sde)), 8), start(sde)

    def update(places: list[Coefficients], i: int, x: Tensor, m: list[Tensor]) -> Tensor:
        return ddim(places, i, x, gamma * m[-1] + (1 - gamma) * m[-2] if i > 0 else m[-1])

    expected = march(update, "eps", mixture().denoiser(sde), x, times)
    got = solve(GradientEstimation(gamma=gamma), sde, x, times)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    if gamma == 1.5:
        assert torch.equal(got, solve(IPNDM(solver_order=2, few_steps=0), sde, x, times))


def dpmpp_2m(places: list[Coefficients], i: int, x: Tensor, m: list[Tensor], first: bool) -> Tensor:
    """Algorithm 2 of arXiv 2211.01095."""
    (_, sigma, lam), (alpha_next, sigma_next, lam_next) = places[i : i + 2]
    h, d = lam_next - lam, m[-1]
    if not first:
        r = (lam - places[i - 1][2]) / h
        d = (1 + 1 / (2 * r)) * m[-1] - 1 / (2 * r) * m[-2]
    return sigma_next / sigma * x - alpha_next * (math.exp(-h) - 1) * d


@every_sde
@pytest.mark.parametrize("few_steps", [0, 15])
def test_dpmpp_2m_as_printed(sde: SDE, few_steps: int) -> None:
    n, x = 8, start(sde)
    times = uneven(*reversed(moderate(sde)), n)
    firsts = {0} if few_steps == 0 else {0, n - 1}  # lower_order_final
    expected = march(
        lambda places, i, x, m: dpmpp_2m(places, i, x, m, i in firsts),
        "denoised",
        mixture().denoiser(sde),
        x,
        times,
    )
    torch.testing.assert_close(solve(DPMpp2M(few_steps=few_steps), sde, x, times), expected, rtol=1e-11, atol=1e-11)


def dpmpp_3m(
    places: list[Coefficients], i: int, x: Tensor, m: list[Tensor], second: float, orders: list[int]
) -> Tensor:
    """sample_dpmpp_3m_sde of k-diffusion at eta = 0, which has `second` = 1, the factor on the divided difference."""
    (_, sigma, lam), (alpha_next, sigma_next, lam_next) = places[i : i + 2]
    h = lam_next - lam
    phi_2 = math.expm1(-h) / h + 1
    phi_3 = phi_2 / h - 0.5
    x = sigma_next / sigma * x - alpha_next * math.expm1(-h) * m[-1]
    if orders[i] == 1:
        return x
    r0 = (lam - places[i - 1][2]) / h
    d1_0 = (m[-1] - m[-2]) / r0
    if orders[i] == 2:
        return x + alpha_next * phi_2 * d1_0
    r1 = (places[i - 1][2] - places[i - 2][2]) / h
    d1_1 = (m[-2] - m[-3]) / r1
    d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
    d2 = second * (d1_0 - d1_1) / (r0 + r1)
    return x + alpha_next * (phi_2 * d1 - phi_3 * d2)


def rising(n: int, most: int) -> list[int]:
    return [min(i + 1, most) for i in range(n)]


@every_sde
@pytest.mark.parametrize("few_steps", [0, 15])
def test_dpmpp_3m_in_closed_form(sde: SDE, few_steps: int) -> None:
    n, x = 8, start(sde)
    times = uneven(*reversed(moderate(sde)), n)
    orders = rising(n, 3) if few_steps == 0 else [1, 2, 3, 3, 3, 3, 2, 1]
    expected = march(
        lambda places, i, x, m: dpmpp_3m(places, i, x, m, 2.0, orders), "denoised", mixture().denoiser(sde), x, times
    )
    # phi_3 loses four digits at h = 0.04
    torch.testing.assert_close(solve(DPMpp3M(few_steps=few_steps), sde, x, times), expected, rtol=1e-9, atol=1e-9)


def unipc(
    places: list[Coefficients], t: int, s: int, x: Tensor, known: dict[int, Tensor], p: int, how: UniPC
) -> Tensor:
    """UniP-p, and UniC-p if the value at s is `known`, from place t to s (arXiv 2302.04867): R a = phi / B(h)."""
    (alpha, sigma, lam), (alpha_s, sigma_s, lam_s) = places[t], places[s]
    h, m0 = lam_s - lam, known[t]
    others = [t - k for k in range(1, p)] + [s] * (s in known)
    r = np.array([(places[k][2] - lam) / h for k in others])
    data = how.prediction == "denoised"
    z = -h if data else h
    b = z if how.variant == "bh1" else math.expm1(z)
    base, scale = (sigma_s / sigma, alpha_s) if data else (alpha_s / alpha, sigma_s)
    x = base * x - scale * math.expm1(z) * m0
    if not others:
        return x
    if len(others) == 1:
        a = np.array([0.5])
    else:
        # phi_n(h) / B(h) = n! h^n varphi_(n+1)(h) / (h^(n-1) B(h)) for the rows r^(n-1)
        varphi = [math.expm1(z) / z]
        for n in range(1, len(others) + 1):
            varphi.append((varphi[-1] - 1 / math.factorial(n)) / z)
        right = [math.factorial(n) * z * varphi[n] / b for n in range(1, len(others) + 1)]
        a = np.linalg.solve(np.vander(r, increasing=True).T, right)
    difference = sum(float(c / rk) * (known[k] - m0) for c, rk, k in zip(a, r, others, strict=True))
    return x - scale * b * difference


@every_sde
@pytest.mark.parametrize("prediction", ["denoised", "eps"])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("few_steps", [0, 15])
def test_unipc_as_printed(sde: SDE, prediction: str, variant: str, few_steps: int) -> None:
    n, x0, denoiser = 7, start(sde), mixture().denoiser(sde)
    times = uneven(*reversed(moderate(sde)), n + 1)[1:]
    places = coefficients(sde, times)
    for p in (1, 2, 3):
        for corrector in (True, False):
            how = UniPC(p, corrector, variant, prediction, few_steps)
            orders = [min(p, i + 1, n - i if few_steps else p) for i in range(n)]
            x, before, known = x0, x0, dict[int, Tensor]()
            for i in range(n):
                known[i] = denoiser.output(prediction, x, times[i])
                if corrector and i > 0:
                    x = unipc(places, i - 1, i, before, known, orders[i - 1], how)
                before = x
                x = unipc(places, i, i + 1, x, known, orders[i], how)
            # varphi_4 loses digits to h^3
            torch.testing.assert_close(solve(how, sde, x0, times), x, rtol=1e-8, atol=1e-8)


# Orders


@cache
def end_point(sde: SDE) -> Tensor:
    low, high = moderate(sde)
    return flow_end_point(mixture(), sde, start(sde), high, low, rtol=1e-13)


def error_of(solver: Solver, sde: SDE, place: Callable[[float, float, int], list[float]]) -> Callable[[int], Tensor]:
    """The error of the end point with n steps that `place` puts between the levels 3 and 0.3."""
    low, high = moderate(sde)
    return lambda n: solve(solver, sde, start(sde), place(high, low, n)) - end_point(sde)


def smooth(high: float, low: float, n: int) -> list[float]:
    return graded(stretched(high, low, n))


def rough(high: float, low: float, n: int) -> list[float]:
    return graded(uneven(high, low, n))


@pytest.mark.parametrize("sde", [VP(), EDM()], ids=["vp", "edm"])
@pytest.mark.parametrize(
    "solver",
    [
        LMS(order=2),
        LMS(order=3),
        DEIS(order=4),
        DEIS(order=3, variable="time"),
        UniPC(solver_order=1, prediction="eps"),
        UniPC(solver_order=2),
        UniPC(solver_order=2, prediction="eps", variant="bh1"),
        UniPC(solver_order=2, corrector=False),
        UniPC(solver_order=3, corrector=False, prediction="eps"),
        UniPC(solver_order=3, prediction="eps"),
    ],
    ids=repr,
)
def test_order_of_further_options(solver: Solver, sde: SDE) -> None:
    # right to (c / n)^2; steps are smooth on the scale of c = 18 of them for two values, 35 for four and a corrector
    steps = {2: 80, 3: 100}.get(solver.order, 160)
    assert observed_order(error_of(solver, sde, rough), steps, solver.order) == pytest.approx(solver.order, abs=0.05)


def published_3m(sde: SDE, x: Tensor, times: list[float]) -> Tensor:
    orders = rising(len(times) - 1, 3)
    return march(
        lambda places, i, x, m: dpmpp_3m(places, i, x, m, 1.0, orders), "denoised", mixture().denoiser(sde), x, times
    )


@pytest.mark.parametrize("place", [smooth, rough])
def test_the_published_3m_has_order_two(place: Callable[[float, float, int], list[float]]) -> None:
    sde = VP()
    low, high = moderate(sde)

    def error(n: int) -> Tensor:
        return published_3m(sde, start(sde), place(high, low, n)) - end_point(sde)

    assert observed_order(error, 100, 2) == pytest.approx(2, abs=0.05)
    assert observed_order(error_of(DPMpp3M(), sde, place), 100, 3) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_on_equal_steps_of_the_noise_level_is_lms(order: int) -> None:
    """There its order is `solver_order`."""
    sde = EDM()
    times = uniform(*reversed(moderate(sde)), 20)
    for a, b in zip(IPNDM(solver_order=order).plan(sde, times), LMS(order=order).plan(sde, times), strict=True):
        assert a[-1].base == pytest.approx(b[-1].base, rel=1e-14)
        assert a[-1].terms == pytest.approx(b[-1].terms, rel=1e-10)


@pytest.mark.parametrize("sde", [VP(), VE(), SubVP()], ids=["vp", "ve", "subvp"])
@pytest.mark.parametrize("solver", [IPNDM(solver_order=2), IPNDM(solver_order=3), IPNDM()], ids=repr)
def test_order_of_ipndm(solver: Solver, sde: SDE) -> None:
    """What it declares where steps change smoothly, 1 where they do not."""
    assert observed_order(error_of(solver, sde, smooth), 100, 2) == pytest.approx(solver.order, abs=0.05)
    assert observed_order(error_of(solver, sde, rough), 100, 1) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (LMS(), 2),
        (DEIS(), 2),
        (IPNDM(), 2),
        (GradientEstimation(gamma=1.5), 2),
        (DPMpp2M(), 2),
        (DPMpp3M(), 2),
        (UniPC(solver_order=1), 2),
        (UniPC(corrector=False), 2),
        (UniPC(solver_order=2), 3),
        (UniPC(), 3),
    ],
    ids=repr,
)
def test_order_from_a_start_without_history(solver: Solver, order: int) -> None:
    """The first step's error of h^2 remains; with the corrector it is h^3."""
    assert observed_order(error_of(solver, VP(), uniform), 200, order) == pytest.approx(order, abs=0.05)


# Ends


def last(solver: Solver, sde: SDE, times: list[float]) -> Tensor:
    return solve(solver, sde, start(sde), times)


@pytest.mark.parametrize("sde", [VP(), SubVP(), EDM()], ids=["vp", "subvp", "edm"])
@pytest.mark.parametrize(
    "solver",
    [LMS(), DEIS(), DEIS(variable="time"), DPMpp2M(), DPMpp3M(), UniPC(corrector=False), UniPC()],
    ids=repr,
)
def test_a_step_to_zero_noise_denoises(solver: Any, sde: SDE) -> None:
    """It takes the newest value alone, so that the state before it becomes E[x_0 | x]."""
    times = [*uniform(*reversed(moderate(sde)), 20), 0.0]
    got = last(solver, sde, times)
    x = last(solver, sde, times[:-1])
    torch.testing.assert_close(got, mixture().denoiser(sde).denoised(x, times[-2]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("few_steps", [0, 15])
def test_few_steps_end_at_low_order(few_steps: int) -> None:
    """On short grids the last step uses one value, the one before two; from `few_steps` steps on they use all."""
    sde = VP()
    for n in (14, 15):
        times = uniform(*reversed(moderate(sde)), n)
        for solver in (DEIS(order=4, few_steps=few_steps), IPNDM(few_steps=few_steps), DPMpp3M(few_steps=few_steps)):
            used = [len(step[-1].terms) for step in solver.plan(sde, times)]
            most = 3 if isinstance(solver, DPMpp3M) else 4
            end = sorted(min(most, k) for k in (1, 2, 3))[::-1] if n < few_steps else [most] * 3
            assert used[:3] == [1, 2, 3]
            assert used[-3:] == end


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (LMS, {"order": 0}, "solver.order=0"),
        (LMS, {"order": 7}, "solver.order=7.* 1 to 6"),
        (DEIS, {"order": 5}, "solver.order=5"),
        (DEIS, {"variable": "rho"}, "solver.variable='rho'"),
        (DEIS, {"few_steps": -1}, "solver.few_steps=-1"),
        (IPNDM, {"solver_order": 2.0}, "solver.solver_order=2.0"),
        (IPNDM, {"few_steps": math.nan}, "solver.few_steps=nan"),
        (GradientEstimation, {"gamma": 0.0}, "solver.gamma=0"),
        (DPMpp2M, {"solver_type": "midpiont"}, "did you mean 'midpoint'"),
        (DPMpp2M, {"few_steps": -1}, "solver.few_steps=-1"),
        (DPMpp3M, {"final": "zero"}, "solver.final='zero'"),
        (UniPC, {"solver_order": 4}, "solver.solver_order=4.* 1 to 3"),
        (UniPC, {"corrector": 1}, "solver.corrector=1"),
        (UniPC, {"variant": "bh3"}, "solver.variant='bh3'"),
        (UniPC, {"prediction": "v"}, "solver.prediction='v'"),
    ],
)
def test_bad_options_are_named(cls: type[Solver], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        cls(**options)


# diffusers


def scheduled(name: str, levels: list[float], **options: Any) -> Any:
    """A scheduler of diffusers on noise levels of one's own, in float64; its first argument to `step` only counts."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(levels) - 1)
    return scheduler


def run(scheduler: Any, output: Callable[[Tensor, float], Tensor], x: Tensor, times: list[float]) -> Tensor:
    scheduler.is_scale_input_called = True  # LMS asks for it, and we scale ourselves
    for count, t in zip(scheduler.timesteps, times, strict=False):
        x = scheduler.step(output(x, t), count, x).prev_sample
    return x


def levels_of(sde: SDE, times: list[float]) -> list[float]:
    return [float(sde.noise_level(t)) for t in times]


GRIDS = {"smooth": stretched(*reversed(moderate(VP())), 20), "uneven": uneven(*reversed(moderate(VP())), 8)}
every_grid = pytest.mark.parametrize("times", GRIDS.values(), ids=GRIDS)


@every_grid
@pytest.mark.parametrize("order", [1, 2, 4])
def test_lms_is_that_of_diffusers(times: list[float], order: int) -> None:
    # its x is x / alpha; polynomials are exact in its quadrature, whatever tolerance it asks for
    sde, levels = EDM(), levels_of(VP(), times)
    scheduler, denoiser, x = scheduled("LMSDiscreteScheduler", levels), mixture().denoiser(sde), start(sde)
    for count, t in zip(scheduler.timesteps, levels, strict=False):
        scheduler.is_scale_input_called = True
        y = scheduler.step(denoiser.eps(x, t), count, x, order=order).prev_sample
        x = y
    torch.testing.assert_close(solve(LMS(order=order), sde, start(sde), levels), x, rtol=1e-11, atol=1e-11)


@every_grid
def test_ipndm_is_that_of_diffusers(times: list[float]) -> None:
    # which takes v = alpha eps - sigma x_0 for the network's answer, as its formula for eps shows
    sde, denoiser = VP(), mixture().denoiser(VP())
    scheduler = scheduled("IPNDMScheduler", levels_of(sde, times))
    scheduler.alphas, scheduler.betas = (f(torch.tensor(times, dtype=torch.float64)) for f in (sde.alpha, sde.sigma))
    expected = run(scheduler, lambda x, t: denoiser.output("v", x, t), start(sde), times)
    got = solve(IPNDM(few_steps=0), sde, start(sde), times)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@every_grid
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lower", [False, True])
def test_deis_is_that_of_diffusers(times: list[float], order: int, lower: bool) -> None:
    sde = VP()
    options = {"solver_order": order, "lower_order_final": lower}
    scheduler = scheduled("DEISMultistepScheduler", levels_of(sde, times), **options)
    expected = run(scheduler, mixture().denoiser(sde).eps, start(sde), times)
    got = solve(DEIS(order=order, few_steps=15 if lower else 0), sde, start(sde), times)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@every_grid
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("kind", ["midpoint", "heun", "third"])
def test_dpmpp_is_that_of_diffusers(times: list[float], lower: bool, kind: str) -> None:
    # which computes in float32; "zero" would force a last step of order one whatever lower_order_final says
    sde, n = VP(), len(times) - 1
    order, solver_type = (3, "heun") if kind == "third" else (2, kind)
    scheduler = scheduled(
        "DPMSolverMultistepScheduler",
        levels_of(sde, times),
        lower_order_final=lower,
        final_sigmas_type="sigma_min",
        solver_order=order,
        solver_type=solver_type,  # of the third order's start as well
    )
    expected = run(scheduler, mixture().denoiser(sde).eps, start(sde), times)
    few_steps = 15 if lower else 0
    if kind != "third":
        got = solve(DPMpp2M(solver_type=kind, few_steps=few_steps), sde, start(sde), times)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        return
    orders = [min(3, i + 1, n - i if n < few_steps else 3) for i in range(n)]

    def with_second(factor: float) -> Tensor:
        return march(
            lambda places, i, x, m: dpmpp_3m(places, i, x, m, factor, orders),
            "denoised",
            mixture().denoiser(sde),
            start(sde),
            times,
        )

    # its D2 is the second divided difference where phi_3 asks for the second derivative, twice that: order 2, not 3
    torch.testing.assert_close(with_second(1.0), expected, rtol=1e-5, atol=1e-5)
    ours = solve(DPMpp3M(few_steps=few_steps), sde, start(sde), times)
    torch.testing.assert_close(ours, with_second(2.0), rtol=1e-9, atol=1e-9)
    assert float((ours - expected).abs().max()) > 1e-4


@every_grid
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("prediction", ["denoised", "eps"])
@pytest.mark.parametrize("corrector", [True, False])
def test_unipc_is_that_of_diffusers(
    times: list[float], order: int, variant: str, prediction: str, corrector: bool
) -> None:
    sde, n = VP(), len(times) - 1
    scheduler = scheduled(
        "UniPCMultistepScheduler",
        levels_of(sde, times),
        solver_order=order,
        solver_type=variant,
        predict_x0=prediction == "denoised",
        lower_order_final=n < 15,  # there it is so for any number of steps
        disable_corrector=[] if corrector else list(range(n)),
    )
    # its einsum wants two dimensions of data and more
    x = start(sde)[:, :, None]
    denoiser = mixture().denoiser(sde)
    expected = run(scheduler, lambda x, t: denoiser.eps(x[:, :, 0], t)[:, :, None], x, times)[:, :, 0]
    got = solve(UniPC(order, corrector, variant, prediction), sde, start(sde), times)
    # its R and phi lose digits as ours do not
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
