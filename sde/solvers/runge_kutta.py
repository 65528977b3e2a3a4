r"""Runge-Kutta methods on the probability-flow ODE, in a variable of one's choice.

With u = sigma / alpha the state y = x / alpha obeys dy/du = eps, and Y = y / r(u) obeys dY/du = N / r with N = eps -
(r' / r) y (`sde.solvers.levels`). In a variable v that rises or falls with u this is dY/dv = (N / r) du/dv, which an
explicit method with nodes c, rows a and weights b carries from v to v + h by stages at v + c_k h:

    Y_k = Y + h sum_l a_kl K_l,    Y_new = Y + h sum_k b_k K_k,    K = (N / r) du/dv.

With r = 1 and v = u these are the textbook methods on EDM's ODE; other choices keep Y straighter. A step to u = 0,
where the network cannot be asked, is of order one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from sde.errors import check_choice
from sde.processes import SDE
from sde.solvers.base import register
from sde.solvers.churn import Churn
from sde.solvers.levels import Interpolation, Levels
from sde.solvers.linear import LinearSolver
from sde.solvers.stages import Stage, Step, arrive, evaluate_at

VARIABLES = ("angle", "log_snr", "noise_level", "time")

FLOW = Interpolation("eps", "noise_level")
"""r = 1 and v = u: d(x / alpha) = eps du, as it stands."""


class Tableau(NamedTuple):
    """An explicit method; its first stage is the beginning of the step, and has no node and no row."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


MIDPOINT = Tableau((1 / 2,), ((1 / 2,),), (0, 1))
TRAPEZOID = Tableau((1,), ((1,),), (1 / 2, 1 / 2))
CLASSICAL = Tableau((1 / 2, 1 / 2, 1), ((1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def runge_kutta(levels: Levels, rule: Interpolation, i: int, j: int, tableau: Tableau) -> list[Stage]:
    """The stages from place i, where the network has been evaluated last, to place j."""
    if levels.u[j] == 0:
        return [arrive(*levels.formula(rule, i, j, [i]))]
    start, end = (float(rule.coordinate(levels.sde, np.array(levels.u[k]))) for k in (i, j))
    h = end - start
    places: dict[float, int] = {0: i, 1: j}
    for c in tableau.nodes:
        if c not in places:
            places[c] = levels.add(_noise_level(rule, levels.sde, start + c * h))
    at = [i, *(places[c] for c in tableau.nodes)]
    slopes = [_slope(rule, levels, k) for k in at]

    def combination(to: int, row: Sequence[float]) -> tuple[float, tuple[float, ...]]:
        reach = _scale(rule, levels, to)
        terms = [reach * h * a * slope for a, slope in zip(row, slopes, strict=False)]
        return reach / _scale(rule, levels, i), tuple(reversed(terms))

    stages = [
        Stage(*combination(k, row), time=levels.t[k], mix=levels.mix(rule, k))
        for k, row in zip(at[1:], tableau.rows, strict=True)
    ]
    return [*stages, arrive(*combination(j, tableau.weights))]


def _scale(rule: Interpolation, levels: Levels, i: int) -> float:
    """x / Y at place i."""
    return levels.alpha[i] * float(rule.scale(np.array(levels.u[i])))


def _slope(rule: Interpolation, levels: Levels, i: int) -> float:
    """K over what the network says at place i: eps, denoised, or eps + `mix` x, which is N of "edm"."""
    u = np.array(levels.u[i])
    of_level = 1 / rule.scale(u) if rule.prediction == "edm" else rule.density(u)
    return float(of_level) * _speed(rule, levels, i)


def _speed(rule: Interpolation, levels: Levels, i: int) -> float:
    """du/dv at place i."""
    u = levels.u[i]
    if rule.variable == "time":  # from d(u^2) / dt = g^2 / alpha^2
        return float(levels.sde.g(levels.t[i])) ** 2 / (2 * levels.alpha[i] * levels.sigma[i])
    if rule.variable == "angle":
        return (u**2 + rule.sigma_data**2) / rule.sigma_data
    return 1.0 if rule.variable == "noise_level" else -0.5 * u


def _noise_level(rule: Interpolation, sde: SDE, v: float) -> float:
    """u at the value `v` of the variable: the inverse of `rule.coordinate`."""
    if rule.variable == "time":
        return float(sde.noise_level(v))
    if rule.variable == "angle":
        return rule.sigma_data * math.tan(v)
    return v if rule.variable == "noise_level" else math.exp(-0.5 * v)


@register("euler")
@dataclass(frozen=True)
class Euler(LinearSolver):
    """x_s = (alpha_s / alpha_t) x + alpha_s (u_s - u_t) eps, u = sigma / alpha: Euler on d(x / alpha) = eps du.

    Without churn this is DDIM with eta = 0 (arXiv 2010.02502, equation 13) and DPM-Solver-1; with its options,
    k-diffusion's `euler`. Order 1 (weakly, with churn); one evaluation a step. A baseline: any method of higher order
    is closer to the flow from some 50 evaluations on.

    Args:
        s_churn: amount of churn, see `Churn`; 0 solves the ODE.
        s_tmin: smallest noise level (sigma / alpha) that is churned.
        s_tmax: largest noise level that is churned.
        s_noise: factor on the added noise.
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    order: ClassVar[int] = 1
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 50

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    final: str = "none"

    def __post_init__(self) -> None:
        _ = self.churn
        self.check_final()

    @property
    def churn(self) -> Churn:
        """The noise that is added before a step."""
        return Churn(self.s_churn, self.s_tmin, self.s_tmax, self.s_noise)

    @property
    def stochastic(self) -> bool:
        return self.s_churn > 0

    @property
    def follows_path(self) -> bool:
        return False  # a level that is raised reaches back into the step before

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels, steps = Levels(sde, times), []
        for i in range(levels.steps):
            start, begin = self.churn.begin(levels, i, self.final)
            steps.append([begin, arrive(*levels.formula(FLOW, start, i + 1, [start]))])
        return steps


@register("dpm_2")
@dataclass(frozen=True)
class DPM2(LinearSolver):
    """The midpoint method in u = sigma / alpha with its stage at the geometric mean of the step's noise levels.

    x_m = (alpha_m / alpha_t) x + alpha_m (u_m - u_t) eps(x, t), u_m^2 = u_t u_s, then x_s = (alpha_s / alpha_t) x +
    alpha_s (u_s - u_t) eps(x_m, m): k-diffusion's `dpm_2`, with its options. Without churn it is DPM-Solver-2 with r1
    = 1/2 (arXiv 2206.00927, algorithm 1). Order 2; two evaluations a step (one for a step that ends at u = 0).

    Args:
        s_churn: amount of churn, see `Churn`; 0 solves the ODE.
        s_tmin: smallest noise level (sigma / alpha) that is churned.
        s_tmax: largest noise level that is churned.
        s_noise: factor on the added noise.
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    order: ClassVar[int] = 2
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 25

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    final: str = "none"

    def __post_init__(self) -> None:
        _ = self.churn
        self.check_final()

    @property
    def churn(self) -> Churn:
        """The noise that is added before a step."""
        return Churn(self.s_churn, self.s_tmin, self.s_tmax, self.s_noise)

    @property
    def stochastic(self) -> bool:
        return self.s_churn > 0

    @property
    def follows_path(self) -> bool:
        return False  # a level that is raised reaches back into the step before

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels, steps = Levels(sde, times), []
        for i in range(levels.steps):
            start, begin = self.churn.begin(levels, i, self.final)
            step = [begin]
            if levels.u[i + 1] > 0:
                middle = levels.between(start, i + 1, 0.5)
                step.append(Stage(*levels.formula(FLOW, start, middle, [start]), time=levels.t[middle]))
            steps.append([*step, arrive(*levels.formula(FLOW, start, i + 1, [start]))])
        return steps


@register("midpoint")
@dataclass(frozen=True)
class Midpoint(LinearSolver):
    """The midpoint method on the probability-flow ODE: an Euler step to the middle, whose slope serves for the whole.

    Order 2; two evaluations a step (one for a step that ends at u = 0). The defaults work on EDM's F and the angle
    arctan(sigma / (alpha sigma_data)), which are exact on Gaussian data of that width; prediction "eps" with variable
    "noise_level" is the textbook method on EDM's ODE.

    Args:
        prediction: what the linear part is solved for, see `sde.solvers.levels`: "edm", "denoised" or "eps".
        variable: the variable of integration: "angle", "log_snr", "noise_level" or "time".
        sigma_data: standard deviation of the data, for "edm" and "angle".
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    order: ClassVar[int] = 2
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 25

    prediction: str = "edm"
    variable: str = "angle"
    sigma_data: float = 0.5
    final: str = "none"

    def __post_init__(self) -> None:
        check_choice("solver.variable", self.variable, VARIABLES)
        _ = self.rule
        self.check_final()

    @property
    def rule(self) -> Interpolation:
        """r and v."""
        return Interpolation(self.prediction, self.variable, self.sigma_data)

    @property
    def output(self) -> str:
        return "denoised" if self.prediction == "denoised" else "eps"

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        return one_step(Levels(sde, times), self.rule, MIDPOINT)


@register("rk4")
@dataclass(frozen=True)
class RK4(LinearSolver):
    """The classical Runge-Kutta method of order 4 on the probability-flow ODE.

    Order 4; four evaluations a step (one for a step that ends at u = 0). The smallest error of the one-step methods
    from some 50 evaluations on; `adams` needs fewer evaluations for the same until they are about a thousand. The
    defaults work on EDM's F and the angle arctan(sigma / (alpha sigma_data)), which are exact on Gaussian data of that
    width; with prediction "eps" a few long steps go far astray.

    Args:
        prediction: what the linear part is solved for, see `sde.solvers.levels`: "edm", "denoised" or "eps".
        variable: the variable of integration: "angle", "log_snr", "noise_level" or "time".
        sigma_data: standard deviation of the data, for "edm" and "angle".
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    order: ClassVar[int] = 4
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 20

    prediction: str = "edm"
    variable: str = "angle"
    sigma_data: float = 0.5
    final: str = "none"

    def __post_init__(self) -> None:
        check_choice("solver.variable", self.variable, VARIABLES)
        _ = self.rule
        self.check_final()

    @property
    def rule(self) -> Interpolation:
        """r and v."""
        return Interpolation(self.prediction, self.variable, self.sigma_data)

    @property
    def output(self) -> str:
        return "denoised" if self.prediction == "denoised" else "eps"

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        return one_step(Levels(sde, times), self.rule, CLASSICAL)


def one_step(levels: Levels, rule: Interpolation, tableau: Tableau) -> list[Step]:
    """The plan of a Runge-Kutta method."""
    return [
        [evaluate_at(levels.t[i], levels.mix(rule, i)), *runge_kutta(levels, rule, i, i + 1, tableau)]
        for i in range(levels.steps)
    ]
