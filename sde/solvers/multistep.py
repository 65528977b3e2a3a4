r"""Multistep solvers of the probability-flow ODE: one evaluation a step, the earlier ones used again.

With u = sigma / alpha, the ODE is d(x / alpha) / du = eps, or with lambda = -log u and D = E[x_0 | x_t]

    d(x / sigma) / dlambda = exp(lambda) D.

What the network says is continued from its last values and integrated. The solvers differ in what they continue, in
which variable, and whether the integral is exact (`sde.solvers.levels`) or in closed form for steps of one kind:

    lms                  eps        in u             exact
    deis                 eps        in log-SNR, t, u exact
    ipndm                eps        coefficients of equal steps, whatever the steps are
    gradient_estimation  eps        two coefficients of one's own
    dpmpp_2m             denoised   in log-SNR       as published, or exact
    dpmpp_3m             denoised   in log-SNR       exact

A start without history takes the values there are, so that equal steps from the start end with an error of order two at
most: the first step's local error of h^2 remains. A step to u = 0, where log-SNR ends, takes the newest value alone in
those formulas that need log-SNR or exact integrals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from sde.errors import check_choice, check_number
from sde.processes import SDE
from sde.solvers.base import register
from sde.solvers.levels import Interpolation, Levels
from sde.solvers.linear import LinearSolver, check_order
from sde.solvers.stages import Step, arrive, evaluate_at

Formula = Callable[[int, int, Sequence[int]], tuple[float, tuple[float, ...]]]
"""(decay, weights) of the step from place i to place j with the values at some nodes, as `Levels.formula` has it."""

SOLVER_TYPES = ("midpoint", "heun")
DEIS_VARIABLES = ("log_snr", "time", "noise_level")
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def counts(steps: int, most: int, few_steps: int) -> list[int]:
    """How many values each step uses: all there are, up to `most`; on short grids also no more than steps are left.

    Where log-SNR makes long steps near the data, as every grid of few steps does, high orders overshoot last.
    """
    left = [steps - i if steps < few_steps else most for i in range(steps)]
    return [min(most, i + 1, left[i]) for i in range(steps)]


def newest(i: int, count: int) -> list[int]:
    """The places of the last `count` values when the newest is at i, in the order of the history."""
    return list(range(i, i - count, -1))


def predict(levels: Levels, formula: Formula, values: Sequence[int]) -> list[Step]:
    """Steps that evaluate once and use the last `values[i]` values in step i."""
    return [[evaluate_at(levels.t[i]), arrive(*formula(i, i + 1, newest(i, count)))] for i, count in enumerate(values)]


def transfer(levels: Levels, coefficients: Callable[[int], Sequence[float]]) -> Formula:
    """DDIM's step (arXiv 2010.02502, equation 13) with the sum of `coefficients(count)` times the last eps for eps."""

    def formula(i: int, j: int, nodes: Sequence[int]) -> tuple[float, tuple[float, ...]]:
        reach = levels.alpha[j] * (levels.u[j] - levels.u[i])
        return levels.alpha[j] / levels.alpha[i], tuple(reach * c for c in coefficients(len(nodes)))

    return formula


@register("lms")
@dataclass(frozen=True)
class LMS(LinearSolver):
    """Linear multistep: Adams-Bashforth for d(x / alpha) / du = eps on any grid (k-diffusion's sample_lms).

    eps is replaced by the polynomial in u = sigma / alpha through its last `order` values, integrated exactly. Order
    `order`; one evaluation a step. The tamest of these solvers with few steps: earlier values lie far away in u and
    count little.

    Args:
        order: number of values, 1 to 6; 1 is DDIM, Euler's method in u.
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 25

    order: int = 4
    final: str = "none"

    def __post_init__(self) -> None:
        check_order(self.order, 6)
        self.check_final()

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels = Levels(sde, times)
        formula = partial(levels.formula, Interpolation("eps", "noise_level"))
        return predict(levels, formula, counts(levels.steps, self.order, few_steps=0))


@register("deis")
@dataclass(frozen=True)
class DEIS(LinearSolver):
    """Diffusion exponential integrator sampler, AB-DEIS (arXiv 2204.13902).

    eps is replaced by the polynomial through its last `order` values, in t (tAB) or another variable, integrated
    exactly over u = sigma / alpha. Order `order`, one more than the polynomial's degree, by which the paper counts; one
    evaluation a step. In "noise_level" (the paper's rho) it is `lms`; "log_snr", as in diffusers, is the most accurate.

    Args:
        order: number of values, 1 to 4; 1 is DDIM.
        variable: "log_snr", "time" or "noise_level".
        few_steps: with fewer steps than this the last steps use 3, 2 and 1 values at most (diffusers'
            lower_order_final); 0 for never.
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 20

    order: int = 3
    variable: str = "log_snr"
    few_steps: int = 15
    final: str = "none"

    def __post_init__(self) -> None:
        check_order(self.order, 4)
        check_choice("solver.variable", self.variable, DEIS_VARIABLES)
        check_number("solver.few_steps", self.few_steps, at_least=0)
        self.check_final()

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels = Levels(sde, times)
        formula = partial(levels.formula, Interpolation("eps", self.variable))
        return predict(levels, formula, counts(levels.steps, self.order, self.few_steps))


@register("ipndm")
@dataclass(frozen=True)
class IPNDM(LinearSolver):
    """iPNDM: DDIM's step with eps continued by Adams-Bashforth's formula for equal steps (arXiv 2204.13902).

        x_s = alpha_s (x_t / alpha_t + (u_s - u_t) (55 eps_0 - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24)

    The coefficients are those of equal steps in u = sigma / alpha, where the order is `solver_order`; with the
    coefficients that its steps really have it would be `lms`. On any other grid of smooth steps the order is 2 at most,
    as declared, on uneven ones 1. Steps that shrink towards the data make the published coefficients lean further on
    the slope than the true ones: with 10 to 50 steps the error is below that of `lms` and `deis`.

    Args:
        solver_order: number of values, 1 to 4; 1 is DDIM.
        few_steps: with fewer steps than this the last steps use 3, 2 and 1 values at most; 0 for never, as published.
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 20

    solver_order: int = 4
    few_steps: int = 15
    final: str = "none"

    def __post_init__(self) -> None:
        check_order(self.solver_order, 4, "solver_order")
        check_number("solver.few_steps", self.few_steps, at_least=0)
        self.check_final()

    @property
    def order(self) -> int:
        return min(self.solver_order, 2)

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels = Levels(sde, times)
        formula = transfer(levels, lambda count: ADAMS_BASHFORTH[count - 1])
        return predict(levels, formula, counts(levels.steps, self.solver_order, self.few_steps))


@register("gradient_estimation")
@dataclass(frozen=True)
class GradientEstimation(LinearSolver):
    """Gradient estimation: DDIM's step with gamma eps + (1 - gamma) eps_previous (arXiv 2306.04848, section 5).

    Sampling as descent on the distance to the data, whose gradient the noise estimates; two estimates make a better
    one. One evaluation a step.

    Order 1, for all gamma but 3/2, which is `ipndm` of two values. The published 2 leans twice as far as the slope of
    eps asks for: an error as large as DDIM's and of the other sign where steps are many, but smaller where data have
    separate modes, from some 10 steps on.

    Args:
        gamma: weight of the newest eps; 1 is DDIM.
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    order: ClassVar[int] = 1
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 20

    gamma: float = 2.0
    final: str = "none"

    def __post_init__(self) -> None:
        check_number("solver.gamma", self.gamma, above=0)
        self.check_final()

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels = Levels(sde, times)
        formula = transfer(levels, lambda count: (1.0,) if count == 1 else (self.gamma, 1 - self.gamma))
        return predict(levels, formula, counts(levels.steps, 2, few_steps=0))


@register("dpmpp_2m")
@dataclass(frozen=True)
class DPMpp2M(LinearSolver):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2; k-diffusion's sample_dpmpp_2m).

    With h the step in lambda, r the step before in units of h, and D_0, D_1 the last two denoised

        x_s = sigma_s / sigma_t x - alpha_s (exp(-h) - 1) [(1 + 1 / 2r) D_0 - 1 / 2r D_1]

    which is "midpoint"; "heun" integrates the straight line through the two values exactly. Order 2, one evaluation a
    step. The field's usual choice for guided sampling in 20 steps and more.

    Args:
        solver_type: "midpoint" or "heun" (diffusers' names).
        few_steps: with fewer steps than this the last one uses the newest value alone (diffusers' lower_order_final);
            0 for never.
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    order: ClassVar[int] = 2
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 20
    evaluates: ClassVar[str] = "denoised"

    solver_type: str = "midpoint"
    few_steps: int = 15
    final: str = "none"

    def __post_init__(self) -> None:
        check_choice("solver.solver_type", self.solver_type, SOLVER_TYPES)
        check_number("solver.few_steps", self.few_steps, at_least=0)
        self.check_final()

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels = Levels(sde, times)
        exact = partial(levels.formula, Interpolation("denoised", "log_snr"))

        def midpoint(i: int, j: int, nodes: Sequence[int]) -> tuple[float, tuple[float, ...]]:
            u = levels.u
            decay, (gain,) = exact(i, j, nodes[:1])
            if len(nodes) == 1 or u[j] == 0:
                return decay, (gain,)
            lean = 0.5 * gain * math.log(u[i] / u[j]) / math.log(u[nodes[1]] / u[i])
            return decay, (gain + lean, -lean)

        formula = midpoint if self.solver_type == "midpoint" else exact
        return predict(levels, formula, counts(levels.steps, 2, self.few_steps))


@register("dpmpp_3m")
@dataclass(frozen=True)
class DPMpp3M(LinearSolver):
    """DPM-Solver++(3M): the parabola in lambda through the last three denoised, integrated exactly (arXiv 2211.01095).

    With D' and D'' the parabola's derivatives at t times h and h^2, h the step in lambda,

        x_s = sigma_s / sigma_t x + alpha_s [(1 - exp(-h)) D_0 + phi_2 D' - phi_3 D''],
        phi_2 = (exp(-h) - 1) / h + 1,    phi_3 = phi_2 / h - 1/2.

    Order 3, one evaluation a step; without guidance better than `dpmpp_2m` from some 20 steps on. The published code
    (dpm-solver, k-diffusion's sample_dpmpp_3m_sde at eta = 0, diffusers) takes the second divided difference, half of
    D'', for D'' and so has order 2.

    Args:
        few_steps: with fewer steps than this the last two use two values and one (diffusers' lower_order_final); 0 for
            never.
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    order: ClassVar[int] = 3
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 20
    evaluates: ClassVar[str] = "denoised"

    few_steps: int = 15
    final: str = "none"

    def __post_init__(self) -> None:
        check_number("solver.few_steps", self.few_steps, at_least=0)
        self.check_final()

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels = Levels(sde, times)
        formula = partial(levels.formula, Interpolation("denoised", "log_snr"))
        return predict(levels, formula, counts(levels.steps, 3, self.few_steps))
