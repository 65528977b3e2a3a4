"""Solvers against exact end points and laws, the published algorithms written out, and each other.

Whatever is registered is tested with its defaults; `VARIANTS` adds the option sets that change what a solver does.
Laws are measured without Monte-Carlo error where the solver is affine in its draws: on Gaussian data every draw is fed
a unit impulse, and the sum of the squared answers is the variance.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from sde.denoiser import AbstractDenoiser, Denoiser, GaussianDenoiser, GaussianMixtureDenoiser
from sde.errors import UserError
from sde.grids import GRIDS, EDMGrid, ScoreSDEGrid
from sde.parameterizations import Eps, Parameterization, Score
from sde.processes import EDM, SDE, VE, VP, SubVP
from sde.randomness import BatchNoise, Noise, RecordedNoise, SampleNoise
from sde.reverse import ReverseProcess
from sde.solvers import (
    MALA,
    AnnealedLangevin,
    BoxLangevin,
    EulerMaruyama,
    Heun,
    Langevin,
    PredictorCorrector,
    SciPyODE,
    Solver,
)
from sde.solvers.predictors import ancestral, exact_kernel
from sde.solvers.scipy import METHODS, run_together
from tests.problems import (
    F64,
    ODD_SDES,
    NetworkFromDenoiser,
    RandomNetwork,
    all_sdes,
    flow_end_point,
    gaussian,
    gaussian_flow,
    generator,
    in_turn,
    marginal_of_gaussian,
    mixture,
    moderate,
    normal,
    observed_order,
    parameterizations,
    sdes,
    solvers,
    with_options,
)
from tests.solver_variants import MULTISTEP, STAYING, graded, stretched, uneven, uniform, variants

every_sde = pytest.mark.parametrize("sde", sdes())
plain_sde = pytest.mark.parametrize("sde", sdes(odd=False))


# Time grids


GRIDS_OF_ORDER = {"uniform": uniform, "stretched": stretched, "uneven": uneven}
PlaceTimes = Callable[[float, float, int], list[float]]


def orders_on() -> list[Any]:
    """(sde, grid): the default processes on smooth grids, the odd ones on the uneven grid."""
    named = all_sdes()
    return [
        pytest.param(sde, place, id=f"{name}-{grid}")
        for name, sde in named.items()
        for grid, place in GRIDS_OF_ORDER.items()
        if (grid == "uneven") == (name in ODD_SDES)
    ]


def solve(
    solver: Solver,
    denoiser: AbstractDenoiser,
    x: Tensor,
    times: list[float],
    noise: Noise | None = None,
    label: Tensor | None = None,
) -> Tensor:
    return solver.solve(ReverseProcess(denoiser, label), x, times, noise).x


def both_ways(solver: Solver) -> bool:
    """Whether `solver` carries data to noise as well."""
    return solver.both_ways and not solver.stochastic


# Convergence of the end point


@cache
def reference(sde: SDE) -> tuple[Tensor, Tensor]:
    """States at noise level 3 and where the flow carries them by level 0.3.

    Between these levels every process is smooth on the scale of a few dozen steps; at the ends of the full range, VE's
    and EDM's first uniform steps are far from the asymptotic regime and would need thousands.
    """
    low, high = moderate(sde)
    law = mixture()
    x = sde.perturb(law.denoiser(sde).sample(4, generator(1)), high, normal(4, 2, seed=2))
    return x, flow_end_point(law, sde, x, high, low, rtol=1e-13)


def steps_for(solver: Solver) -> int:
    """An n of `observed_order` at which the order is seen to 0.1.

    It is right to (c / n)^2 between n and 2n, and steps are smooth on the scale of c = 7 of them, and of more for
    formulas that reach over several; from order 4 on, n is bounded by the rounding of errors of 1e-12.
    """
    return {1: 24, 2: 48, 3: 144}.get(solver.order, 72)


@pytest.mark.parametrize(
    ("solver", "sde", "place"),
    [
        pytest.param(*solver.values, sde, GRIDS_OF_ORDER[grid], id=f"{solver.id}-{name}-{grid}")
        for i, solver in enumerate(variants(corrected=False, stepping=True, stochastic=False))
        for j, (name, sde) in enumerate(all_sdes().items())
        for grid in ("uneven" if name in ODD_SDES else ("uniform", "stretched")[(i + j) % 2],)
    ],
)
def test_order_of_the_end_point(solver: Solver, sde: SDE, place: PlaceTimes) -> None:
    x, exact = reference(sde)
    low, high = moderate(sde)
    denoiser = mixture().denoiser(sde)

    def error(n: int) -> Tensor:
        return solve(solver, denoiser, x, graded(place(high, low, n))) - exact

    assert observed_order(error, steps_for(solver), solver.order) == pytest.approx(solver.order, abs=0.1)


@pytest.mark.parametrize(("sde", "place"), [p for p in orders_on() if p.id in ("vp-uniform", "ve-odd-uneven")])
@pytest.mark.parametrize("solver", [p for p in variants(corrected=False, stepping=True) if both_ways(p.values[0])])
def test_order_on_the_way_to_noise(solver: Solver, sde: SDE, place: PlaceTimes) -> None:
    """From the end points of the flow back to the states that it started from."""
    exact, x = reference(sde)
    low, high = moderate(sde)
    denoiser = mixture().denoiser(sde)

    def error(n: int) -> Tensor:
        return solve(solver, denoiser, x, graded(place(high, low, n)[::-1])) - exact

    assert observed_order(error, steps_for(solver), solver.order) == pytest.approx(solver.order, abs=0.1)


@pytest.mark.parametrize(
    ("solver", "sde", "parameterization"),
    in_turn(variants(corrected=False, stepping=True, stochastic=False), sdes(odd=False), parameterizations()),
)
def test_end_point_under_any_parameterization(solver: Solver, sde: SDE, parameterization: Parameterization) -> None:
    """With the perfect network of each parameterization, a solver goes where the exact denoiser takes it."""
    x, _ = reference(sde)
    times = uniform(*reversed(moderate(sde)), 5)
    exact = mixture().denoiser(sde)
    network = Denoiser(NetworkFromDenoiser(exact, parameterization, "log_sigma"), sde, parameterization)
    # rounding, through a label and back and up to f^2 / alpha^2 in the velocity, 1e4 here
    torch.testing.assert_close(solve(solver, network, x, times), solve(solver, exact, x, times), rtol=1e-10, atol=1e-10)


# Convergence of the law


def wide_and_narrow(sde: SDE) -> GaussianDenoiser:
    """Two independent Gaussians, of standard deviations 0.3 and 1.1: errors of both signs cannot cancel."""
    variances = torch.tensor([0.09, 1.21], dtype=F64)
    return GaussianDenoiser(sde, torch.tensor([0.7, -0.4], dtype=F64), torch.diag(variances))


def law(solver: Solver, denoiser: AbstractDenoiser, times: list[float], m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and variance (D,) of the solver's answer for x ~ N(m, diag v), from its answers to unit impulses.

    Row 0 of the batch is silent, row 1 starts one higher, row 2 + j has its j-th draw equal to one, and the last row
    is random in everything: it must be what the others predict, or the solver is not affine and this is no law.
    """
    d = len(m)
    draws = 3 * (len(times) - 1)  # as many as any variant asks for; rows of draws that are not made answer with 0
    x, noise = torch.zeros(draws + 3, d, dtype=F64), torch.zeros(draws, draws + 3, d, dtype=F64)
    x[1], x[-1] = 1, normal(d, seed=8)
    noise[torch.arange(draws), torch.arange(draws) + 2] = 1
    noise[:, -1] = normal(draws, d, seed=9)
    answer = solve(solver, denoiser, x, times, RecordedNoise(noise))
    offset, gain, kicks = answer[0], answer[1] - answer[0], answer[2:-1] - answer[0]
    torch.testing.assert_close(answer[-1], offset + gain * x[-1] + (kicks * noise[:, -1]).sum(0), rtol=1e-9, atol=1e-9)
    return offset + gain * m, gain**2 * v + (kicks**2).sum(0)


def exact_law(denoiser: GaussianDenoiser, t: float) -> tuple[Tensor, Tensor]:
    """Mean and variance (D,) of x_t."""
    alpha, sigma = float(denoiser.sde.alpha(t)), float(denoiser.sde.sigma(t))
    return alpha * torch.tensor([0.7, -0.4], dtype=F64), alpha**2 * torch.tensor([0.09, 1.21], dtype=F64) + sigma**2


@pytest.mark.parametrize(("sde", "place"), orders_on())
@pytest.mark.parametrize("solver", variants(corrected=False, stepping=True, stochastic=True))
def test_weak_order(solver: Solver, sde: SDE, place: PlaceTimes) -> None:
    low, high = moderate(
        sde, 0.5, 2.0
    )  # h g^2 / variance, the steps' stiffness, is large at both ends of a wider range
    denoiser = wide_and_narrow(sde)
    m, v = exact_law(denoiser, high)
    mean, variance = exact_law(denoiser, low)

    def error(n: int) -> Tensor:
        got = law(solver, denoiser, place(high, low, n), m, v)
        return torch.cat([got[0] - mean, got[1] - variance])

    assert observed_order(error, 24, solver.order) == pytest.approx(solver.order, abs=0.03)


@every_sde
@pytest.mark.parametrize("corrector", ["ald", "langevin"])  # one method in few dimensions
def test_langevin_settles_at_its_own_variance(sde: SDE, corrector: str) -> None:
    """Correcting at ever closer times leaves N(m, v / (1 - e / 2v)), the fixed point of v' -> (1 - e/v)^2 v' + 2e."""
    low, high = moderate(sde, 0.5, 2.0)
    denoiser = wide_and_narrow(sde)
    m, v = exact_law(denoiser, high)
    mean, variance = exact_law(denoiser, low)
    snr = 0.7  # v forgets its past within 1 / (2 e / v) = 8 steps or fewer
    e = 2 * (snr * float(sde.sigma(low))) ** 2
    settled = variance / (1 - e / (2 * variance))
    options = {"predictor": "ancestral", "corrector": corrector, "corrector_position": "after", "final": "none"}
    solver = PredictorCorrector(snr=snr, **options)

    def error(n: int) -> Tensor:
        got_mean, got = law(solver, denoiser, uniform(high, low, n), m, v)
        torch.testing.assert_close(got_mean, mean, rtol=1e-9, atol=1e-9)  # this predictor's mean is exact
        return got - settled

    # what is left is the lag behind the moving law, of first order: 8 steps of 50
    assert observed_order(error, 50, 1) == pytest.approx(1, abs=0.1)


class Moments:
    """Pooled second moment of standardized samples with the standard error of independent normals."""

    def __init__(self, x: Tensor, mean: float, variance: float) -> None:
        z = (x - mean) / variance**0.5
        self.mean, self.variance = float(z.mean()), float((z**2).mean())
        self.mean_error, self.variance_error = z.numel() ** -0.5, (2 / z.numel()) ** 0.5


@every_sde
@pytest.mark.parametrize("position", ["before", "after"])
def test_law_under_the_langevin_corrector(sde: SDE, position: str) -> None:
    """The norm of the score in the step size makes the corrector nonlinear: moments by drawing, in 64 dimensions.

    With step e = 2 snr^2 D / |score|^2, close to 2 snr^2 v, the stationary variance is v / (1 - e / 2v), or v (1 +
    snr^2), and the norm acts like two dimensions more, 1 + 2 / D. The predictor's error is what it is without
    corrector, measured exactly.
    """
    d, samples, n, snr = 64, 500, 50, 0.16
    low, high = moderate(sde)
    mean, std = 0.7, 0.5
    times = uniform(high, low, n)
    one = gaussian(sde, mean, std)
    (m_high, v_high), (m_low, v_low) = (marginal_of_gaussian(sde, t, mean, std) for t in (high, low))
    bare = PredictorCorrector(corrector="none", final="none")
    at = law(bare, one, times, torch.tensor([m_high], dtype=F64), torch.tensor([v_high], dtype=F64))
    predictor = abs(float(at[1]) / v_low - 1) + 0.01  # what a step adds after the last correction is within it
    many = GaussianDenoiser(sde, torch.full((d,), mean, dtype=F64), torch.tensor(std**2, dtype=F64))
    x = m_high + v_high**0.5 * normal(samples, d, seed=3)
    solver = PredictorCorrector(snr=snr, corrector_position=position, final="none")
    got = Moments(solve(solver, many, x, times, BatchNoise(x, generator(4))), m_low, v_low)
    assert abs(got.mean) < 5 * got.mean_error + abs(float(at[0]) - m_low) / v_low**0.5
    assert abs(got.variance - 1) < 5 * got.variance_error + snr**2 + 2 / d + predictor
    # it does correct: without Langevin's noise the variance would fall by 2 snr^2 in every step
    assert got.variance > 0.9


@pytest.mark.parametrize(
    ("discretization", "d", "factor"),
    [
        ("score_sde", 16, (1 + 2 / 16) ** 2),  # drawn |z| and |score|
        ("score_sde", 64, (1 + 2 / 64) ** 2),
        ("exact", 64, 1 + 2 / 64),  # |score| alone
        ("exact", 16, 1.0),  # below 64 dimensions neither
    ],
)
def test_what_norms_do_to_the_stationary_variance(discretization: str, d: int, factor: float) -> None:
    """The module's account of Langevin dynamics whose step follows |z|^2 / |score|^2, at constant time."""
    sde, snr, samples = VE(), 0.1, 2000
    t, std = moderate(sde)[1], 0.5
    denoiser = GaussianDenoiser(sde, torch.zeros(d, dtype=F64), torch.tensor(std**2, dtype=F64))
    _, v = marginal_of_gaussian(sde, t, 0.0, std)
    options = {"predictor": "none", "corrector": "langevin", "discretization": discretization, "final": "none"}
    x = v**0.5 * normal(samples, d)
    # e / v = 2 snr^2: 400 steps are 16 relaxation times of the variance
    x = solve(
        PredictorCorrector(snr=snr, **options),
        denoiser,
        x,
        uniform(t * (1 + 1e-9), t, 400),
        BatchNoise(x, generator(1)),
    )
    got = Moments(x, 0.0, v * factor)
    # the finite step adds snr^2 = 0.01, somewhat more for the largest of steps that are drawn
    assert abs(got.variance - 1 - snr**2) < 5 * got.variance_error + 0.5 * snr**2


def test_langevin_step_as_documented() -> None:
    """One corrector step by hand, on VP, where the decay of the forward step enters."""
    sde, snr = VP(), 0.2
    t, s = 0.5, 0.45
    decay = float(sde.alpha(t) / sde.alpha(s))
    for d in (63, 64):
        denoiser = GaussianDenoiser(sde, normal(d, seed=2), torch.tensor(0.25, dtype=F64))
        x, z = normal(3, d), normal(1, 3, d, seed=1)
        score = denoiser.score(x, t)
        ratio = d**0.5 / score.norm(dim=1, keepdim=True) if d == 64 else float(sde.sigma(t))
        e = 2 * decay**2 * snr**2 * ratio**2
        solver = PredictorCorrector(predictor="none", snr=snr, final="none")
        got = solve(solver, denoiser, x, [t, s], RecordedNoise(z))
        torch.testing.assert_close(got, x + e * score + (2 * e) ** 0.5 * z[0], rtol=1e-12, atol=1e-12)


@every_sde
def test_langevin_alone_finds_the_law(sde: SDE) -> None:
    """Langevin dynamics at constant time, from a wrong law: the stationary variance, for the annealed step exactly."""
    mean, std, snr = 0.7, 0.5, 0.3
    _, t = moderate(sde)
    times = uniform(t * (1 + 1e-9), t, 200)  # in effect one time
    m, v = marginal_of_gaussian(sde, t, mean, std)
    e = 2 * (snr * float(sde.sigma(t))) ** 2
    solver = PredictorCorrector(predictor="none", corrector="ald", snr=snr, final="none")
    start = torch.tensor([m + 3.0], dtype=F64), torch.tensor([4 * v], dtype=F64)
    got_mean, got = law(solver, gaussian(sde, mean, std), times, *start)
    left = (1 - e / v) ** 200  # of the initial offset of 3 and, squared, of the variance
    assert float(got_mean) == pytest.approx(m, abs=4 * abs(left) + 1e-6)
    assert float(got) == pytest.approx(v / (1 - e / (2 * v)), rel=1e-6)


@every_sde
def test_law_of_a_mixture_under_churn(sde: SDE) -> None:
    """Heun with churn on the mixture: means, covariance and log-likelihood of its samples are those of p_t."""
    n = 8_000
    low, high = moderate(sde)
    denoiser = mixture().denoiser(sde)
    x = sde.perturb(denoiser.sample(n, generator(1)), high, normal(n, 2, seed=2))
    exact = sde.perturb(denoiser.sample(n, generator(3)), low, normal(n, 2, seed=4))
    solver = Heun(s_churn=10.0, final="none")
    got = solve(solver, denoiser, x, uniform(high, low, 32), BatchNoise(x, generator(5)))

    def statistics(y: Tensor) -> Tensor:
        products = (y[:, 0], y[:, 1], y[:, 0] ** 2, y[:, 1] ** 2, y[:, 0] * y[:, 1])
        return torch.stack([*products, denoiser.log_prob(y, low)], 1)

    a, b = statistics(got), statistics(exact)
    # Monte-Carlo error of two sets of draws, and Heun's own error: order 2, measured as 5e-5 at 256 steps, 4e-3 here
    assert ((a.mean(0) - b.mean(0)).abs() < 5 * (a.var(0) + b.var(0)).div(n).sqrt() + 4e-3).all()


# Special cases that must coincide


@every_sde
def test_euler_is_euler(sde: SDE) -> None:
    x, _ = reference(sde)
    times = uneven(*reversed(moderate(sde)), 10)
    process = ReverseProcess(mixture().denoiser(sde))
    by_hand = x
    for t, s in pairwise(times):
        by_hand = by_hand + process.drift(by_hand, t) * (s - t)
    got = solve(EulerMaruyama(eta=0, final="none"), process.denoiser, x, times)
    torch.testing.assert_close(got, by_hand, rtol=1e-12, atol=1e-12)


@every_sde
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_euler_maruyama_as_printed(sde: SDE, eta: float) -> None:
    x, _ = reference(sde)
    times = uneven(*reversed(moderate(sde)), 10)
    process = ReverseProcess(mixture().denoiser(sde))
    draws = normal(10, *x.shape, seed=6)
    by_hand = x
    for (t, s), z in zip(pairwise(times), draws, strict=True):
        drift = float(sde.f(t)) * by_hand - 0.5 * (1 + eta**2) * float(sde.g(t)) ** 2 * process.score(by_hand, t)
        by_hand = by_hand + drift * (s - t) + eta * float(sde.g(t)) * math.sqrt(t - s) * z
    got = solve(EulerMaruyama(eta=eta, final="none"), process.denoiser, x, times, RecordedNoise(draws))
    torch.testing.assert_close(got, by_hand, rtol=1e-12, atol=1e-12)


@every_sde
def test_a_predictor_by_itself_is_the_solver(sde: SDE) -> None:
    x, _ = reference(sde)
    times = uneven(*reversed(moderate(sde)), 10)
    denoiser, draws = mixture().denoiser(sde), normal(10, *x.shape, seed=6)
    for final in ("none", "mean", "tweedie"):
        pairs = [
            (PredictorCorrector(predictor="euler_maruyama", corrector="none", final=final), EulerMaruyama(final=final)),
            (
                PredictorCorrector(predictor="euler_maruyama", corrector="none", probability_flow=True, final=final),
                EulerMaruyama(eta=0, final=final),
            ),
        ]
        for a, b in pairs:
            got = [solve(s, denoiser, x, times, RecordedNoise(draws)) for s in (a, b)]
            torch.testing.assert_close(got[0], got[1], rtol=1e-14, atol=1e-14)


@every_sde
@pytest.mark.parametrize(
    "solver",
    # churn is shared out among all the steps of a grid
    [p for p in variants(stepping=True) if p.id.split("-")[0] not in MULTISTEP + STAYING and "churn" not in p.id],
)
def test_one_step_methods_can_be_interrupted(solver: Solver, sde: SDE) -> None:
    x, _ = reference(sde)
    times, denoiser = uneven(*reversed(moderate(sde)), 6), mixture().denoiser(sde)
    draws = list(normal(40, *x.shape, seed=6))
    recorded = RecordedNoise(draws)
    whole = solve(solver, denoiser, x, times, recorded)
    used = recorded.used
    recorded = RecordedNoise(draws)
    half = solve(solver, denoiser, x, times[:4], recorded)
    torch.testing.assert_close(solve(solver, denoiser, half, times[3:], recorded), whole, rtol=1e-13, atol=1e-13)
    assert recorded.used == used


@every_sde
def test_no_width_of_the_data(sde: SDE) -> None:
    """Of point data the noise in x_t is known: ancestral steps have the exact law, Heun the exact answer, at once."""
    low, high = moderate(sde)
    point = GaussianDenoiser(sde, torch.tensor([0.7], dtype=F64), torch.tensor(0.0, dtype=F64))
    m, v = (torch.tensor([value], dtype=F64) for value in marginal_of_gaussian(sde, high, 0.7, 0.0))
    mean, variance = marginal_of_gaussian(sde, low, 0.7, 0.0)
    solver = PredictorCorrector(predictor="ancestral", corrector="none", final="none")
    for n in (1, 2, 7):
        got = law(solver, point, uniform(high, low, n), m, v)
        assert float(got[0]) == pytest.approx(mean, abs=1e-12)
        assert float(got[1]) == pytest.approx(variance, rel=1e-12)
    x = normal(5, 1)
    for n in (1, 2, 7):
        got = solve(Heun(final="none"), point, x, uniform(high, low, n))
        torch.testing.assert_close(got, gaussian_flow(sde, x, high, low, 0.7, 0.0), rtol=1e-12, atol=1e-12)


@every_sde
def test_ancestral_step_as_printed(sde: SDE) -> None:
    """The posterior q(x_s | x_t, x_0) of arXiv 2006.11239, equation 7, with the denoised as x_0, on any SDE."""
    s, t = moderate(sde)
    x, _ = reference(sde)
    denoiser = mixture().denoiser(sde)
    step = ancestral(exact_kernel(sde, t, s))
    a = float(sde.alpha(t) / sde.alpha(s))
    var_s, var_t = float(sde.sigma(s)) ** 2, float(sde.sigma(t)) ** 2
    b2 = var_t - a**2 * var_s
    mean = (float(sde.alpha(s)) * b2 * denoiser.denoised(x, t) + a * var_s * x) / var_t
    torch.testing.assert_close(step.apply(x, denoiser.score(x, t), None), mean, rtol=1e-12, atol=1e-12)
    assert step.z**2 == pytest.approx(b2 * var_s / var_t, rel=1e-12)


@pytest.mark.parametrize("solver", variants(stepping=True))
@pytest.mark.parametrize("pair", [(VP(), VP(beta_min=0.025, beta_max=5.0, T=4.0)), (VE(), VE(T=4.0))])
def test_a_longer_clock_changes_nothing(solver: Solver, pair: tuple[SDE, SDE]) -> None:
    fast, slow = pair
    x, _ = reference(fast)
    low, high = moderate(fast)
    times, draws = uniform(high, low, 6), normal(40, *x.shape, seed=6)
    a, b = (
        solve(solver, mixture().denoiser(sde), x, [c * t for t in times], RecordedNoise(draws))
        for sde, c in ((fast, 1.0), (slow, 4.0))
    )
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# The published algorithms


def edm_algorithm(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    times: list[float],
    draws: list[Tensor],
    churn: float = 0.0,
    low: float = 0.0,
    high: float = math.inf,
    s_noise: float = 1.0,
    cap: float = math.inf,
) -> Tensor:
    """Algorithm 2 of arXiv 2206.00364 (1 without churn), line by line; `times` ends with 0.

    `cap` is the package's one deviation: no noise level is raised above the first.
    """
    n, draws = len(times) - 1, list(draws)
    for i in range(n):
        t, after = times[i], times[i + 1]
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= t <= high else 0.0
        t_hat = min(t + gamma * t, cap)
        if t_hat > t:
            x = x + math.sqrt(t_hat**2 - t**2) * s_noise * draws.pop(0)
        d = (x - denoise(x, t_hat)) / t_hat
        x_next = x + (after - t_hat) * d
        if after != 0:
            d_next = (x_next - denoise(x_next, after)) / after
            x_next = x + (after - t_hat) * (0.5 * d + 0.5 * d_next)
        x = x_next
    return x


def test_heun_is_algorithm_one() -> None:
    sde, steps = EDM(), 17
    denoiser = mixture().denoiser(sde)
    x = 80 * normal(6, 2)
    times = EDMGrid()(sde, steps)
    expected = edm_algorithm(denoiser.denoised, x, [*times, 0.0], [])
    # d = (x - D) / t loses three digits at t = 0.002
    process = ReverseProcess(denoiser)
    solution = Heun(final="tweedie").solve(process, x, times)
    torch.testing.assert_close(solution.x, expected, rtol=1e-11, atol=1e-11)
    assert solution.nfe == 2 * 18 - 1  # the paper's count for 18 levels
    # "tweedie" is the Euler step to zero
    to_zero = Heun(final="none").solve(process, x, [*times, 0.0])
    torch.testing.assert_close(to_zero.x, expected, rtol=1e-11, atol=1e-11)
    assert to_zero.nfe == 35


@pytest.mark.parametrize(
    "options",
    [
        {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},  # the paper's for ImageNet-64
        {"s_churn": 5.0},
        {"s_churn": 1000.0, "s_tmin": 1.0},
    ],
)
def test_heun_with_churn_is_algorithm_two(options: dict[str, float]) -> None:
    sde = EDM()
    denoiser = mixture().denoiser(sde)
    x, draws = 80 * normal(6, 2), list(normal(40, 6, 2, seed=1))
    times = [*EDMGrid()(sde, 17), 0.0]
    names = {"s_churn": "churn", "s_tmin": "low", "s_tmax": "high", "s_noise": "s_noise"}
    literal = {names[k]: v for k, v in options.items()}
    # with s_tmax = 50 the first step is not churned anyway and the cap, the package's deviation, plays no part
    cap = math.inf if "s_tmax" in options else 80.0
    expected = edm_algorithm(denoiser.denoised, x, times, draws, cap=cap, **literal)
    got = solve(Heun(final="none", **options), denoiser, x, times, RecordedNoise(draws))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@every_sde
def test_heun_is_algorithm_two_in_scaled_variables(sde: SDE) -> None:
    """On any SDE, x / alpha at noise level u follows EDM's algorithm on EDM's process."""
    low, high = moderate(sde)
    times = stretched(high, low, 8)
    levels = [float(sde.noise_level(t)) for t in times]
    denoiser, edm = mixture().denoiser(sde), mixture().denoiser(EDM())
    x, draws = normal(6, 2), list(normal(10, 6, 2, seed=1))
    for more in ({}, {"s_noise": 0.0}, {"s_noise": 1.1, "s_tmin": 0.8}):
        options = {"s_churn": 2.0, **more}
        names = {"s_churn": "churn", "s_tmin": "low", "s_noise": "s_noise"}
        literal = {names[k]: v for k, v in options.items()}
        expected = edm_algorithm(edm.denoised, x / float(sde.alpha(high)), levels, draws, cap=levels[0], **literal)
        got = solve(Heun(final="none", **options), denoiser, x, times, RecordedNoise(draws))
        torch.testing.assert_close(got / float(sde.alpha(low)), expected, rtol=1e-10, atol=1e-10)


def score_sde_sampler(
    sde: SDE,
    score: Callable[[Tensor, float], Tensor],
    x: Tensor,
    n: int,
    draws: list[Tensor],
    predictor: str,
    corrector: str,
    snr: float,
    corrector_steps: int,
    probability_flow: bool,
) -> Tensor:
    """pc_sampler of score_sde_pytorch, its tables included, for a batch of one (it averages norms over the batch)."""
    draws = list(draws)
    if isinstance(sde, VP):
        betas = torch.linspace(sde.beta_min / n, sde.beta_max / n, n, dtype=F64)
        alphas = 1 - betas
    if isinstance(sde, VE):
        sigmas = torch.exp(torch.linspace(math.log(sde.sigma_min), math.log(sde.sigma_max), n, dtype=F64))
    for t in torch.linspace(sde.T, sde.t_min_sampling, n, dtype=F64).tolist():
        i = int(t * (n - 1) / sde.T)
        alpha = float(alphas[i]) if isinstance(sde, VP) else 1.0
        for _ in range(corrector_steps if corrector != "none" else 0):
            grad, noise = score(x, t), draws.pop(0)
            if corrector == "langevin":
                step = (snr * noise.norm() / grad.norm()) ** 2 * 2 * alpha
            else:
                step = (snr * float(sde.sigma(t))) ** 2 * 2 * alpha
            x_mean = x + step * grad
            x = x_mean + math.sqrt(step * 2) * noise
        grad = score(x, t)
        factor = 0.5 if probability_flow else 1.0
        if predictor == "euler_maruyama":
            dt = -1 / n
            f, g = float(sde.f(t)), float(sde.g(t))
            x_mean = x + (f * x - g**2 * grad * factor) * dt
            spread = 0.0 if probability_flow else g * math.sqrt(-dt)
        elif predictor == "reverse_diffusion":
            if isinstance(sde, VP):
                f, g = (math.sqrt(alphas[i]) - 1) * x, math.sqrt(betas[i])
            elif isinstance(sde, VE):
                f, g = 0 * x, math.sqrt(sigmas[i] ** 2 - (sigmas[i - 1] ** 2 if i else 0))
            else:
                f, g = float(sde.f(t)) * x / n, float(sde.g(t)) / math.sqrt(n)
            x_mean = x - (f - g**2 * grad * factor)
            spread = 0.0 if probability_flow else g
        elif isinstance(sde, VP):
            x_mean = (x + float(betas[i]) * grad) / math.sqrt(1 - betas[i])
            spread = math.sqrt(betas[i])
        else:
            below = float(sigmas[i - 1]) if i else 0.0
            x_mean = x + grad * (float(sigmas[i]) ** 2 - below**2)
            spread = math.sqrt(below**2 * (float(sigmas[i]) ** 2 - below**2) / float(sigmas[i]) ** 2)
        x = x_mean + spread * draws.pop(0) if spread else x_mean
    return x_mean


def published() -> list[Any]:
    """(sde, predictor, corrector, probability_flow) that score_sde_pytorch can run."""
    found = []
    for name, sde in (("vp", VP()), ("ve", VE()), ("subvp", SubVP())):
        for predictor in ("reverse_diffusion", "euler_maruyama", "ancestral"):
            for corrector in ("langevin", "ald", "none"):
                for flow in (False, True):
                    if predictor == "ancestral" and flow:
                        continue  # refused there as here
                    if name == "subvp" and (predictor == "ancestral" or corrector != "none"):
                        continue  # its sub-VP has no tables and the published code fails
                    found.append(
                        pytest.param(sde, predictor, corrector, flow, id=f"{name}-{predictor}-{corrector}-{flow}")
                    )
    return found


@pytest.mark.parametrize(("sde", "predictor", "corrector", "flow"), published())
def test_pc_is_the_published_sampler(sde: SDE, predictor: str, corrector: str, flow: bool) -> None:
    n, repeats = 30, 2
    denoiser = mixture().denoiser(sde)
    x = sde.prior_std * normal(1, 2)
    draws = list(normal(n * (repeats + 1), 1, 2, seed=1))
    expected = score_sde_sampler(sde, denoiser.score, x, n, draws, predictor, corrector, 0.1, repeats, flow)
    solver = PredictorCorrector(
        predictor=predictor,
        corrector=corrector,
        snr=0.1,
        corrector_steps=repeats,
        probability_flow=flow,
        discretization="score_sde",
        final="mean",
    )
    assert solver.grid_name == "score_sde"
    recorded = RecordedNoise(draws)
    process = ReverseProcess(denoiser)
    solution = solver.solve(process, x, ScoreSDEGrid()(sde, n), recorded if solver.stochastic else None)
    # sigma_i^2 - sigma_(i-1)^2 and norms, rounded otherwise
    torch.testing.assert_close(solution.x, expected, rtol=1e-9, atol=1e-9)
    langevin = repeats if corrector != "none" else 0
    assert solution.nfe == n * (1 + langevin)
    assert recorded.used == n * langevin + (0 if flow else n - 1)  # none for the last update, whose mean it takes


# Last steps


@plain_sde
@pytest.mark.parametrize("solver", variants(stepping=True))
def test_last_step_policies(solver: Solver, sde: SDE) -> None:
    x, _ = reference(sde)
    times, denoiser = uniform(*reversed(moderate(sde)), 4), mixture().denoiser(sde)
    draws = list(normal(40, *x.shape, seed=6))

    def run(final: str, grid: list[float]) -> tuple[Tensor, int, int]:
        noise, process = RecordedNoise(draws), ReverseProcess(denoiser)
        solution = dataclasses.replace(solver, final=final).solve(process, x, grid, noise)
        return solution.x, solution.nfe, noise.used

    none, nfe, used = run("none", times)
    tweedie, more, same = run("tweedie", times)
    assert (more, same) == (nfe + 1, used)
    torch.testing.assert_close(tweedie, denoiser.denoised(none, times[-1]), rtol=1e-13, atol=1e-13)
    mean, equal, fewer = run("mean", times)
    assert equal == nfe
    if not solver.stochastic:
        assert fewer == used == 0
        assert torch.equal(mean, none)
    elif isinstance(solver, MALA):  # accepts or rejects moves with noise only
        assert fewer == used
        assert torch.equal(mean, none)
    elif isinstance(solver, Heun):
        assert fewer == used - 1
        # up to the last step the two are one; then it is Heun's without churn
        head, *_ = run("none", times[:-1])
        churned = dataclasses.replace(solver, s_churn=solver.s_churn * 3 / 4)  # a step's share must stay the same
        head = solve(churned, denoiser, x, times[:-1], RecordedNoise(draws))
        torch.testing.assert_close(mean, solve(Heun(final="none"), denoiser, head, times[-2:]), rtol=1e-12, atol=1e-12)
    else:
        # x = mean + c z with one c > 0 for all entries
        assert fewer == used - 1
        left = (none - mean) / draws[used - 1]
        torch.testing.assert_close(left, left[:1, :1].expand_as(left), rtol=1e-9, atol=1e-12)
        assert float(left[0, 0]) > 0


@pytest.mark.parametrize("sde", [VP(), SubVP(), EDM()], ids=["vp", "subvp", "edm"])
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("corrector", ["langevin", "ald"])
def test_the_mean_at_time_zero(sde: SDE, position: str, corrector: str) -> None:
    """On a grid that ends at t = 0 there is nothing to correct after the predictor, whose noise is then the last."""
    times = [*uniform(*reversed(moderate(sde)), 4), 0.0]
    solver = PredictorCorrector(corrector=corrector, corrector_position=position, final="mean")
    x, _ = reference(sde)
    draws = list(normal(12, *x.shape, seed=6))
    noise = RecordedNoise(draws)
    a = solver.solve(ReverseProcess(mixture().denoiser(sde)), x, times, noise)
    assert noise.used == (9 if position == "before" else 8)
    silent = draws[: noise.used] + [torch.full_like(x, math.nan)] * 3  # whatever else were drawn, it would show
    b = solve(solver, mixture().denoiser(sde), x, times, RecordedNoise(silent))
    assert torch.equal(a.x, b)
    assert torch.isfinite(a.x).all()


@every_sde
def test_tweedie_of_a_short_grid_is_nearly_data(sde: SDE) -> None:
    """Down to t_min_sampling and denoised, samples have the law of the data: for a Gaussian, without drawing."""
    mean, std = 0.7, 0.5
    t = float(sde.t_of_noise_level(20.0)) if float(sde.noise_level(sde.T)) > 20 else sde.T
    times = [t, *(s for s in GRIDS.get("logsnr")()(sde, 250) if s < t)]
    m, v = (torch.tensor([value], dtype=F64) for value in marginal_of_gaussian(sde, t, mean, std))
    solver = PredictorCorrector(predictor="ancestral", corrector="none", final="tweedie")
    got_mean, variance = law(solver, gaussian(sde, mean, std), times, m, v)
    assert float(got_mean) == pytest.approx(mean, abs=1e-6)
    # E[x_0 | x_t] lacks the posterior variance, of s^2 u^2 / (s^2 + u^2); steps are of h in log u, first order
    level = float(sde.noise_level(times[-1])) ** 2
    missing = std**2 * level / (std**2 + level)
    h = math.log(20.0 / math.sqrt(level)) / 250
    assert float(variance) == pytest.approx(std**2 - missing, rel=1.5 * h)


# Counting


class Counting(nn.Module):
    """A network that counts its calls and the rows it has seen."""

    noise_label = "log_sigma"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls, self.rows = inner, 0, 0

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        self.calls += 1
        self.rows += len(x)
        return self.inner(x, c_noise, label)


@pytest.mark.parametrize("final", ["none", "mean", "tweedie"])
@pytest.mark.parametrize("solver", variants())
def test_evaluations_are_counted(solver: Solver, final: str) -> None:
    sde, n = VP(), 7
    network = Counting(RandomNetwork(3, dtype=F64))
    process = ReverseProcess(Denoiser(network, sde, Eps()).requires_grad_(False))
    process.nfe = 5  # what was counted before is not this solution's
    solver = with_options(solver, final=final)
    x = normal(4, 3)
    solution = solver.solve(process, x, uniform(1.0, 0.01, n), BatchNoise(x, generator(0)))
    assert solution.nfe == network.calls
    assert process.nfe == 5 + network.calls
    extra = int(final == "tweedie")
    if isinstance(solver, EulerMaruyama):
        assert solution.nfe == n + extra
    elif isinstance(solver, Heun):
        assert solution.nfe == 2 * n + extra
        assert Heun(final="none").solve(process, x, [1.0, 0.5, 0.0]).nfe == 3  # one for a step that ends at u = 0
    elif isinstance(solver, PredictorCorrector):
        # acceptance takes the score at the start and, without a density, one more on the way to each proposal
        langevin = {"none": 0, "mala": 2 * solver.corrector_steps + 1}.get(solver.corrector, solver.corrector_steps)
        prediction = {"none": 0, "heun": 2, "dpmpp_2s_ancestral": 2}.get(solver.predictor, 1)
        assert solution.nfe == n * (prediction + langevin) + extra
    elif isinstance(solver, Langevin | AnnealedLangevin):
        assert solution.nfe == (n + 1) * solver.steps_per_level + extra
    elif isinstance(solver, MALA):
        assert solution.nfe == (n + 1) * (1 + 2 * (solver.warm_up + solver.steps_per_level)) + extra
    elif isinstance(solver, BoxLangevin):
        assert solution.nfe == solver.steps + extra


def test_evaluations_of_many_integrators() -> None:
    """More samples than threads are solved in groups: the count is that of the longest, as if side by side."""
    sde = VP()
    network = Counting(RandomNetwork(2, dtype=F64))
    process = ReverseProcess(Denoiser(network, sde, Eps()).requires_grad_(False))
    solver, x = SciPyODE(rtol=1e-2, atol=1e-2, final="none"), normal(300, 2)
    whole = solver.solve(process, x, [1.0, 0.1])
    first = solver.solve(process, x[:256], [1.0, 0.1])
    second = solver.solve(process, x[256:], [1.0, 0.1])
    assert whole.nfe == max(first.nfe, second.nfe)
    torch.testing.assert_close(whole.x, torch.cat([first.x, second.x]), rtol=1e-12, atol=1e-12)
    lsoda = dataclasses.replace(solver, method="LSODA")
    alone = [lsoda.solve(process, x[i : i + 1], [1.0, 0.1]).nfe for i in range(3)]
    assert lsoda.solve(process, x[:3], [1.0, 0.1]).nfe == max(alone)


# Independence of the batch


def batches(solver: Solver, denoiser: AbstractDenoiser, d: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Samples 0..63 of seed 3 solved together, and some of them in other batches and orders."""
    sde = denoiser.sde

    def run(indices: list[int]) -> Tensor:
        noise = SampleNoise(3, indices, (d,), dtype=dtype)
        label = torch.tensor([k % 10 for k in indices])
        # down to noise level 0.05 only: a random network's field is stiff next to the data
        times = np.geomspace(moderate(sde)[1], moderate(sde, low=0.05)[0], 9).tolist()
        return solve(solver, denoiser, 3 * noise(), times, noise, label)

    whole = run(list(range(64)))
    order = torch.randperm(64, generator=generator(2)).tolist()
    shuffled = torch.empty_like(whole)
    shuffled[order] = run(order)
    return whole, [shuffled - whole, run(list(range(10, 17))) - whole[10:17], run([13]) - whole[13:14]]


BATCHED = [
    pytest.param(with_options(p.values[0], rtol=1e-2, atol=1e-2), id=p.id) for p in variants()
]  # loose tolerances: an error control that looks at the batch is then off by 1e-2


@pytest.mark.parametrize("sde", [VP(), VE(), SubVP()], ids=["vp", "ve", "subvp"])
@pytest.mark.parametrize("solver", BATCHED)
def test_a_sample_does_not_depend_on_its_batch(solver: Solver, sde: SDE) -> None:
    """Sample k of seed s is the same in batches of 1, 7 and 64, in any order: exact denoiser, float64."""
    whole, differences = batches(solver, mixture().denoiser(sde), 2, F64)
    assert torch.isfinite(whole).all()
    for difference in differences:
        # sums over components and entries may be taken in another order: rounding, amplified by the flow
        assert float(difference.abs().max()) < 1e-11 * float(whole.abs().max())


@pytest.mark.parametrize("sde", [VP(), VE(), SubVP()], ids=["vp", "ve", "subvp"])
@pytest.mark.parametrize("solver", BATCHED)
def test_a_network_sample_does_not_depend_on_its_batch(solver: Solver, sde: SDE) -> None:
    """The same with a float32 network, whose matrix products round otherwise in another batch."""
    denoiser = Denoiser(RandomNetwork(24), sde, Eps()).requires_grad_(False)
    whole, differences = batches(solver, denoiser, 24, torch.float32)
    assert torch.isfinite(whole).all()
    for difference in differences:
        # 24 products a sum, some thirty evaluations: 1e-7 * sqrt(24 * 30) and a factor of ten for the field's growth
        assert float(difference.abs().max()) < 3e-5 * float(whole.abs().max())


def test_joint_error_control_does_depend_on_the_batch() -> None:
    # the control of the two tests above
    solver = SciPyODE(rtol=1e-2, atol=1e-2, per_sample=False, final="none")
    whole, differences = batches(solver, mixture().denoiser(VP()), 2, F64)
    assert max(float(d.abs().max()) for d in differences) > 1e-4 * float(whole.abs().max())


# Everything with everything


@pytest.mark.parametrize(
    ("solver", "sde", "parameterization"), in_turn(solvers(), sdes(odd=False), parameterizations())
)
def test_everything_runs_with_everything(solver: Solver, sde: SDE, parameterization: Parameterization) -> None:
    """Vectors, sequences and pictures with classes, in float32, over the whole range of the SDE."""
    solver = with_options(solver, rtol=5e-2, atol=5e-2)
    network = RandomNetwork(6)
    denoiser = Denoiser(network, sde, parameterization).requires_grad_(False)

    def run(shape: tuple[int, ...], times: list[float], scale: float, label: Tensor | None) -> Tensor:
        noise = SampleNoise(0, range(3), shape)
        return solve(solver, denoiser, scale * noise(), times, noise, label)

    classes = torch.tensor([1, 0, 7])
    whole = GRIDS.get(solver.grid_name)()(sde, 4)
    flat = run((6,), whole, sde.prior_std, classes)
    assert flat.dtype == torch.float32
    assert torch.isfinite(flat).all()
    assert all(seen is not None for seen in network.labels)
    # the same numbers, whatever the shape that holds them: float32 sums in one order
    for shape in ((2, 3), (1, 3, 2)):
        x = run(shape, whole, sde.prior_std, classes)
        assert x.shape == (3, *shape)
        torch.testing.assert_close(x.flatten(1), flat, rtol=1e-4, atol=1e-4 * float(flat.abs().max()))
    # and a class matters to its own sample alone, seen where four steps are not so long that the network saturates
    low, high = moderate(sde)
    x, none, other = (run((6,), uniform(high, low, 4), 3.0, c) for c in (classes, None, torch.tensor([1, 5, 7])))
    assert float((x - none).abs().amax(1).min()) > 1e-4
    changed = (x - other).abs().amax(1)
    assert float(changed[1]) > 1e-4
    assert float(changed[[0, 2]].max()) < 1e-2 * float(changed[1])


# SciPy


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sde", [VP(), VE(), ODD_SDES["subvp-odd"]], ids=["vp", "ve", "subvp-odd"])
def test_every_method_reaches_the_end_point(method: str, sde: SDE) -> None:
    x, exact = reference(sde)
    low, high = moderate(sde)
    solver = SciPyODE(method=method, rtol=1e-7, atol=1e-8, final="none")
    got = solve(solver, mixture().denoiser(sde), x, [high, low])
    # local errors of 1e-7 add up over a hundred steps at most; the multistep methods' tolerance is the loosest
    assert float((got - exact).abs().max()) < 1e-5


@pytest.mark.parametrize(("method", "order"), [("RK23", 3), ("RK45", 5)])
def test_order_of_the_adaptive_methods(method: str, order: int) -> None:
    """Error against evaluations: with local extrapolation both the error and the tolerance go as the step's power."""
    sde = VP()
    x, _ = reference(sde)
    low, high = moderate(sde)
    exact = flow_end_point(mixture(), sde, x, high, low, rtol=1e-13)
    points = []
    for rtol in np.geomspace(1e-7, 1e-9, 5) if method == "RK23" else np.geomspace(1e-10, 1e-12, 5):
        process = ReverseProcess(mixture().denoiser(sde))
        solver = SciPyODE(method=method, rtol=rtol, atol=rtol, per_sample=False, final="none")
        solution = solver.solve(process, x, [high, low])
        points.append((math.log(solution.nfe), math.log(float((solution.x - exact).norm()))))
    slope = np.polyfit(*np.array(points).T, 1)[0]
    # two decades of tolerance, over which the steps grow 2.5-fold (RK45: 28 to 69): one step more or less, and the
    # next order's 1 / n, turn the slope by 0.2
    assert -slope == pytest.approx(order, abs=0.25)
    if method == SciPyODE().method:
        assert order == SciPyODE.order


@every_sde
def test_ode_on_a_gaussian(sde: SDE) -> None:
    """Over the whole range, T to t_min_sampling, against the closed form of the flow."""
    mean, std = 0.7, 0.5
    m, v = marginal_of_gaussian(sde, sde.T, mean, std)
    x = m + v**0.5 * torch.tensor([[-2.0], [-0.5], [0.0], [1.0], [2.5]], dtype=F64)
    exact = gaussian_flow(sde, x, sde.T, sde.t_min_sampling, mean, std)
    got = solve(SciPyODE(rtol=1e-8, atol=1e-9, final="none"), gaussian(sde, mean, std), x, [sde.T, sde.t_min_sampling])
    # errors made at T shrink with the spread, from up to 80 to 0.5
    assert float((got - exact).abs().max()) < 1e-6


def test_joint_and_single_control_agree() -> None:
    sde = VP()
    x, exact = reference(sde)
    low, high = moderate(sde)
    for per_sample in (True, False):
        solver = SciPyODE(rtol=1e-9, atol=1e-10, per_sample=per_sample, final="none")
        assert float((solve(solver, mixture().denoiser(sde), x, [high, low]) - exact).abs().max()) < 1e-7


def test_single_control_is_scipy_itself() -> None:
    """Each sample is what solve_ivp makes of it alone, to the last digit but rounding in the batch."""
    sde = VE()
    x, _ = reference(sde)
    low, high = moderate(sde)
    process = ReverseProcess(mixture().denoiser(sde))
    got = solve(SciPyODE(rtol=1e-4, atol=1e-4, final="none"), process.denoiser, x, [high, low])
    most = 0
    for b in range(len(x)):
        alone = solve_ivp(
            lambda t, y: process.drift(torch.tensor(y)[None], t)[0].numpy(),
            (high, low),
            x[b].numpy(),
            rtol=1e-4,
            atol=1e-4,
        )
        torch.testing.assert_close(got[b], torch.tensor(alone.y[:, -1]), rtol=1e-11, atol=1e-11)
        most = max(most, alone.nfev)
    again = ReverseProcess(mixture().denoiser(sde))
    assert SciPyODE(rtol=1e-4, atol=1e-4, final="none").solve(again, x, [high, low]).nfe == again.nfe == most


@pytest.mark.parametrize("per_sample", [True, False])
def test_trajectories(per_sample: bool) -> None:
    sde, mean, std = VP(), 0.7, 0.5
    low, high = moderate(sde)
    times = uniform(high, low, 5)
    x = normal(3, 1)
    seen: list[tuple[float, float, Tensor]] = []
    progress: list[float] = []

    def callback(share: float, t: float, state: Tensor | None) -> None:
        progress.append(share)
        if state is not None:
            seen.append((share, t, state))

    solver = SciPyODE(rtol=1e-9, atol=1e-10, per_sample=per_sample, final="none")
    solution = solver.solve(ReverseProcess(gaussian(sde, mean, std)), x, times, callback=callback)
    assert [t for _, t, _ in seen] == times[1:]
    assert [share for share, *_ in seen] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    for _, t, state in seen:
        # between its steps RK45 interpolates to fourth order: (1e-9)^(4/5), with a factor of ten
        exact = gaussian_flow(sde, x, high, t, mean, std)
        assert float((state - exact).abs().max()) < 1e-6
    assert torch.equal(seen[-1][2], solution.x)
    assert solution.times == (high, low)
    assert all(0 <= share <= 1 for share in progress)


@pytest.mark.parametrize("solver", variants(stepping=True))
def test_progress_of_stepping_solvers(solver: Solver) -> None:
    sde = VP()
    x, _ = reference(sde)
    times = uneven(*reversed(moderate(sde)), 4)
    draws, told = normal(20, *x.shape), []
    process = ReverseProcess(mixture().denoiser(sde))
    solution = solver.solve(process, x, times, RecordedNoise(draws), lambda *told_of: told.append(told_of))
    assert [share for share, *_ in told] == [0.25, 0.5, 0.75, 1.0]
    assert [t for _, t, _ in told] == times[1:]
    assert torch.equal(told[-1][2], solution.x)
    assert solution.times == tuple(times)


class Broken(nn.Module):
    """A network that fails after some calls."""

    noise_label = "log_sigma"

    def __init__(self, after: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = after, error

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return torch.zeros_like(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [0, 1, 9])
@pytest.mark.parametrize("per_sample", [True, False])
def test_an_error_in_the_network_comes_through(method: str, after: int, per_sample: bool) -> None:
    before = threading.active_count()
    error = RuntimeError("the network fails")
    process = ReverseProcess(Denoiser(Broken(after, error), VP(), Score()))
    solver = SciPyODE(method=method, per_sample=per_sample)
    with pytest.raises(RuntimeError, match="the network fails"):
        solver.solve(process, normal(5, 2), [1.0, 0.01])
    assert threading.active_count() == before


def test_requests_are_answered_together_and_in_order() -> None:
    """`run_together`: ascending rows, every row its own answer, results in their places, however long each takes."""
    asked: list[list[int]] = []

    def integrate(i: int, derivative: Callable[[float, np.ndarray], np.ndarray]) -> float:
        return sum(float(derivative(10.0 * i + k, np.array([i, k]))[0]) for k in range(i % 4))

    def evaluate(rows: list[int], t: np.ndarray, y: np.ndarray) -> np.ndarray:
        asked.append(rows)
        assert rows == sorted(rows)
        np.testing.assert_array_equal(t, 10.0 * y[:, 0] + y[:, 1])
        np.testing.assert_array_equal(y[:, 0], rows)
        return 100.0 * y[:, :1] + y[:, 1:]

    results = run_together(40, integrate, evaluate)
    assert results == [sum(100.0 * i + k for k in range(i % 4)) for i in range(40)]
    assert asked == [[i for i in range(40) if i % 4 > k] for k in range(3)]


def test_an_interrupt_and_an_error_of_the_callback_come_through() -> None:
    before = threading.active_count()
    process = ReverseProcess(Denoiser(Broken(4, KeyboardInterrupt()), VP(), Score()))
    with pytest.raises(KeyboardInterrupt):
        SciPyODE().solve(process, normal(5, 2), [1.0, 0.01])

    def callback(*_: object) -> None:
        raise OSError("the bar fails")

    with pytest.raises(OSError, match="the bar fails"):
        SciPyODE().solve(ReverseProcess(gaussian(VP())), normal(5, 1), [1.0, 0.01], callback=callback)
    assert threading.active_count() == before


class Explosive(GaussianMixtureDenoiser):
    """A field without end: its solutions run away before the grid ends."""

    def output(self, name: str, x: Tensor, t: Any, label: Tensor | None = None) -> Tensor:
        return 1e3 * x**3


def test_a_failing_integrator_says_so() -> None:
    before = threading.active_count()
    bad = Explosive(VP(), torch.ones(1), torch.zeros(1, 1), torch.tensor(1.0))
    with pytest.raises(UserError, match=r"RK45 stopped at t=.*solver\.rtol"), np.errstate(all="ignore"):
        SciPyODE(final="none").solve(ReverseProcess(bad), 10 + normal(3, 1), [1.0, 0.01])
    assert threading.active_count() == before


def test_a_float32_network_is_integrated_in_float64() -> None:
    # data in float32 come back in float32, and are what float64 data would give to the network's rounding
    sde = VP()
    x, exact = reference(sde)
    low, high = moderate(sde)
    base = mixture()
    single = GaussianMixtureDenoiser(sde, base.weights.float(), base.means.float(), base.covariances.float())
    got = solve(SciPyODE(rtol=1e-6, atol=1e-6, final="none"), single, x.float(), [high, low])
    assert got.dtype == torch.float32
    # local errors of 1e-6 a step, and the right-hand side's own 1e-6
    assert float((got - exact).abs().max()) < 3e-5


# What is refused


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (EulerMaruyama, {"eta": -0.1}, "solver.eta=-0.1"),
        (EulerMaruyama, {"eta": math.nan}, "solver.eta=nan"),
        (EulerMaruyama, {"final": "tweedy"}, r"solver.final='tweedy'.*did you mean 'tweedie'"),
        (Heun, {"s_churn": -1.0}, "solver.s_churn=-1"),
        (Heun, {"s_tmin": -1.0}, "solver.s_tmin=-1"),
        (Heun, {"s_tmin": 2.0, "s_tmax": 1.0}, "solver.s_tmax=1"),
        (Heun, {"s_tmax": math.nan}, "solver.s_tmax=nan"),
        (Heun, {"s_noise": -1.0}, "solver.s_noise=-1"),
        (Heun, {"final": "euler"}, "solver.final='euler'"),
        (PredictorCorrector, {"predictor": "reverse_difusion"}, r"did you mean 'reverse_diffusion'"),
        (PredictorCorrector, {"corrector": "langevn"}, r"solver.corrector='langevn'.*did you mean 'langevin'"),
        (PredictorCorrector, {"corrector_position": "between"}, "solver.corrector_position='between'"),
        (PredictorCorrector, {"discretization": "ddpm"}, "solver.discretization='ddpm'"),
        (PredictorCorrector, {"corrector_steps": 0}, "solver.corrector_steps=0"),
        (PredictorCorrector, {"corrector_steps": 1.5}, "solver.corrector_steps=1.5"),
        (PredictorCorrector, {"snr": 0.0}, "solver.snr=0"),
        (PredictorCorrector, {"predictor": "none", "corrector": "none"}, "at least one"),
        (PredictorCorrector, {"predictor": "ancestral", "probability_flow": True}, "reverse_diffusion"),
        (SciPyODE, {"method": "rk45"}, r"solver.method='rk45'.*did you mean 'RK45'"),
        (SciPyODE, {"rtol": 0.0}, "solver.rtol=0"),
        (SciPyODE, {"rtol": 1.0}, "solver.rtol=1"),
        (SciPyODE, {"atol": -1e-5}, "solver.atol=-1e-05"),
    ],
)
def test_bad_options_are_named(cls: type[Solver], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        cls(**options)


@pytest.mark.parametrize("solver", variants())
def test_bad_grids_are_refused(solver: Solver) -> None:
    process, x = ReverseProcess(gaussian(VP())), normal(2, 1)
    for times in ([1.0, 0.5, 0.5], [1.0], [], [1.0, -0.1], [1.0, math.nan, 0.1]):
        with pytest.raises(UserError, match="decreasing"):
            solver.solve(process, x, times, BatchNoise(x))
    for times in ([0.0, 1.0], [0.1, 0.5, 0.5, 1.0], [-0.1, 1.0]) if both_ways(solver) else ([0.1, 1.0],):
        with pytest.raises(UserError, match="an increasing time grid"):
            solver.solve(process, x, times, BatchNoise(x))
    assert process.nfe == 0


@pytest.mark.parametrize("solver", variants())
def test_tweedie_needs_noise_to_remove(solver: Solver) -> None:
    process, x = ReverseProcess(gaussian(VP())), normal(2, 1)
    with pytest.raises(UserError, match=r"solver\.final=tweedie.*solver\.final=mean"):
        with_options(solver, final="tweedie").solve(process, x, [1.0, 0.0], BatchNoise(x))
    # VE's data carry sigma_min at t = 0, which can be removed
    ve = ReverseProcess(gaussian(VE()))
    assert torch.isfinite(with_options(solver, final="tweedie").solve(ve, x, [1.0, 0.5, 0.0], BatchNoise(x)).x).all()


@pytest.mark.parametrize("solver", variants())
def test_stochastic_solvers_need_noise_and_others_draw_none(solver: Solver) -> None:
    process, x = ReverseProcess(gaussian(VP())), normal(2, 1)
    if solver.stochastic:
        with pytest.raises(UserError, match="stochastic"):
            solver.solve(process, x, [1.0, 0.5, 0.1])
        noise = RecordedNoise(normal(200, 2, 1))
        solver.solve(process, x, [1.0, 0.5, 0.1], noise)
        assert noise.used > 0
    else:
        noise = RecordedNoise([])
        solver.solve(process, x, [1.0, 0.5, 0.1], noise)
        assert noise.used == 0


def test_chains_too_short_are_refused() -> None:
    solver = PredictorCorrector(discretization="score_sde", final="mean")
    x = normal(2, 1)
    with pytest.raises(UserError, match=r"steps=10 .* at least 20"):
        solver.solve(ReverseProcess(gaussian(VP())), x, ScoreSDEGrid()(VP(), 10), BatchNoise(x))


@pytest.mark.parametrize("solver", variants())
def test_the_start_is_left_alone(solver: Solver) -> None:
    x, draws = normal(3, 1), normal(200, 3, 1, seed=1)
    kept, kept_draws = x.clone(), draws.clone()
    solver.solve(ReverseProcess(gaussian(VP())), x, [1.0, 0.6, 0.1], RecordedNoise(draws))
    assert torch.equal(x, kept)
    assert torch.equal(draws, kept_draws)
