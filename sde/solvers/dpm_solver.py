r"""DPM-Solver and DPM-Solver++ as one-step methods, and exponential Runge-Kutta in general.

With lambda = log(alpha / sigma) and h = lambda_s - lambda_t the probability-flow ODE is, in either form exactly,

    x_s = (alpha_s / alpha_t) x_t - alpha_s int exp(-lambda) eps dlambda       (arXiv 2206.00927, equation 3.4)
    x_s = (sigma_s / sigma_t) x_t + sigma_s int exp(lambda) denoised dlambda   (arXiv 2211.01095, equation 8)

A one-step method replaces eps, denoised or EDM's F by a polynomial through its values within the step and integrates
that exactly (`Levels.formula`). A step to u = sigma / alpha = 0, where the network cannot be asked, is of order one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sde.errors import check_choice, check_number
from sde.processes import SDE
from sde.solvers.adams import check_order
from sde.solvers.base import register
from sde.solvers.levels import Interpolation, Levels
from sde.solvers.linear import LinearSolver
from sde.solvers.stages import Stage, Step, arrive, evaluate_at

SOLVER_TYPES = ("dpmsolver", "taylor")
_R2 = 2 / 3  # third order asks for this place of the last stage, wherever the other one is


def second_order(levels: Levels, rule: Interpolation, i: int, j: int, r1: float, solver_type: str) -> list[Stage]:
    """From place i, just evaluated, by one stage at a share `r1` of the step in log-SNR to place j."""
    middle = levels.between(i, j, r1)
    stage = Stage(*levels.formula(rule, i, middle, [i]), time=levels.t[middle], mix=levels.mix(rule, middle))
    if solver_type == "taylor":
        return [stage, arrive(*levels.formula(rule, i, j, [middle, i]))]
    decay, (weight,) = levels.formula(rule, i, j, [i])
    slope = weight / (2 * r1)  # as if the line through both values were constant at its middle
    return [stage, arrive(decay, (slope, weight - slope))]


def third_order(levels: Levels, rule: Interpolation, i: int, j: int, r1: float, solver_type: str) -> list[Stage]:
    """The same by stages at `r1` and 2/3; the last combination does without the value at `r1` unless "taylor"."""
    early, late = levels.between(i, j, r1), levels.between(i, j, _R2)
    stages = [
        Stage(*levels.formula(rule, i, early, [i]), time=levels.t[early], mix=levels.mix(rule, early)),
        Stage(*levels.formula(rule, i, late, [early, i]), time=levels.t[late], mix=levels.mix(rule, late)),
    ]
    if solver_type == "taylor":
        return [*stages, arrive(*levels.formula(rule, i, j, [late, early, i]))]
    decay, (newest, oldest) = levels.formula(rule, i, j, [late, i])
    return [*stages, arrive(decay, (newest, 0.0, oldest))]


def single_step(sde: SDE, times: Sequence[float], prediction: str, order: int, r1: float, kind: str) -> list[Step]:
    """The plan of a method of `order` 1, 2 or 3 that interpolates `prediction` over the log-SNR."""
    levels, rule = Levels(sde, times), Interpolation(prediction, "log_snr")
    steps: list[Step] = []
    for i in range(levels.steps):
        begin, j = evaluate_at(levels.t[i]), i + 1
        if order == 1 or levels.u[j] == 0:
            steps.append([begin, arrive(*levels.formula(rule, i, j, [i]))])
        else:
            stages = second_order if order == 2 else third_order
            steps.append([begin, *stages(levels, rule, i, j, r1, kind)])
    return steps


@register("dpm_solver")
@dataclass(frozen=True)
class DPMSolver(LinearSolver):
    """DPM-Solver-1, -2 and -3 (arXiv 2206.00927, algorithms 1 and 2; with r1 of one's choice, 4 and 5).

    Order `order`; as many evaluations a step (one for a step that ends at u = 0). Order 1 is DDIM. Order 3 with many
    steps, where `rk4` is the other choice; with few, a multistep method has more steps for the same evaluations.

    Args:
        order: 1, 2 or 3.
        r1: place of the first stage as a share of the step in log-SNR, below 1 (order 3: not 2/3, the place of the
            second); null for the paper's 1/2 (order 2) and 1/3 (order 3).
        solver_type: "dpmsolver", the paper's formulas, or "taylor", the exact integral of the interpolating
            polynomial; named as in the authors' code. diffusers calls them "midpoint" and "heun".
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 17

    order: int = 3
    r1: float | None = None
    solver_type: str = "dpmsolver"
    final: str = "none"

    def __post_init__(self) -> None:
        check_order(self.order, 3)
        check_share(self.r1, self.order)
        check_choice("solver.solver_type", self.solver_type, SOLVER_TYPES)
        self.check_final()

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        r1 = self.r1 or (1 / 2 if self.order == 2 else 1 / 3)
        return single_step(sde, times, "eps", self.order, r1, self.solver_type)


@register("dpmpp_2s")
@dataclass(frozen=True)
class DPMpp2S(LinearSolver):
    """DPM-Solver++(2S): DPM-Solver-2 for the denoised x_0 instead of eps (arXiv 2211.01095, algorithm 1).

    Order 2; two evaluations a step (one for a step that ends at u = 0). Without noise k-diffusion's
    `dpmpp_2s_ancestral` is this.

    Args:
        r1: place of the stage as a share of the step in log-SNR, below 1.
        solver_type: "dpmsolver", the paper's formula, or "taylor", the exact integral of the interpolating polynomial.
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    order: ClassVar[int] = 2
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 25
    evaluates: ClassVar[str] = "denoised"

    r1: float = 0.5
    solver_type: str = "dpmsolver"
    final: str = "none"

    def __post_init__(self) -> None:
        check_share(self.r1, self.order)
        check_choice("solver.solver_type", self.solver_type, SOLVER_TYPES)
        self.check_final()

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        return single_step(sde, times, "denoised", 2, self.r1, self.solver_type)


@register("dpmpp_3s")
@dataclass(frozen=True)
class DPMpp3S(LinearSolver):
    """DPM-Solver++ of third order in one step: DPM-Solver-3 for the denoised x_0 (arXiv 2211.01095).

    Order 3; three evaluations a step (one for a step that ends at u = 0).

    Args:
        r1: place of the first stage as a share of the step in log-SNR, below 1 and not 2/3, the place of the second.
        solver_type: "dpmsolver", the paper's formula, or "taylor", the exact integral of the interpolating polynomial.
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    order: ClassVar[int] = 3
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 17
    evaluates: ClassVar[str] = "denoised"

    r1: float = 1 / 3
    solver_type: str = "dpmsolver"
    final: str = "none"

    def __post_init__(self) -> None:
        check_share(self.r1, self.order)
        check_choice("solver.solver_type", self.solver_type, SOLVER_TYPES)
        self.check_final()

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        return single_step(sde, times, "denoised", 3, self.r1, self.solver_type)


@register("exponential")
@dataclass(frozen=True)
class Exponential(LinearSolver):
    """Exponential Euler and exponential Heun: the value at the beginning held, or a line through those at both ends.

    Order `order`; as many evaluations a step (one for a step that ends at u = 0). With prediction "eps" or
    "denoised" order 1 is DDIM, and order 2 over "noise_level" with "eps" is `heun`. The defaults interpolate EDM's F,
    which leaves nothing to approximate but how the data differ from a Gaussian of their standard deviation.

    Args:
        order: 1 (Euler) or 2 (Heun).
        prediction: what is interpolated: "edm", "denoised" or "eps".
        variable: over what: "log_snr", "angle", "focused", "noise_level" or "time".
        sigma_data: standard deviation of the data, for "edm", "angle" and "focused".
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 25

    order: int = 2
    prediction: str = "edm"
    variable: str = "log_snr"
    sigma_data: float = 0.5
    final: str = "none"

    def __post_init__(self) -> None:
        check_order(self.order, 2)
        _ = self.rule
        self.check_final()

    @property
    def rule(self) -> Interpolation:
        """What is interpolated."""
        return Interpolation(self.prediction, self.variable, self.sigma_data)

    @property
    def output(self) -> str:
        return "denoised" if self.prediction == "denoised" else "eps"

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels, rule, steps = Levels(sde, times), self.rule, []
        for i in range(levels.steps):
            step, j = [evaluate_at(levels.t[i], levels.mix(rule, i))], i + 1
            nodes = [i]
            if self.order == 2 and levels.u[j] > 0:
                step.append(Stage(*levels.formula(rule, i, j, [i]), time=levels.t[j], mix=levels.mix(rule, j)))
                nodes = [j, i]
            steps.append([*step, arrive(*levels.formula(rule, i, j, nodes))])
        return steps


def check_share(r1: float | None, order: int) -> None:
    """Raise `UserError` unless `r1` is a place within a step, other than that of the last stage of order 3."""
    if r1 is not None:
        check_number("solver.r1", r1, above=0, below=_R2 if order == 3 else 1)
