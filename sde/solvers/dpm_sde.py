r"""DPM-Solver++ for the reverse SDE, as k-diffusion has it (arXiv 2211.01095, section 5 and appendix A).

In lambda = log(alpha / sigma), with D = E[x_0 | x_t] and y = x / alpha, a step of length h solves

    dy = (1 + eta) (D - y) dlambda + sqrt(2 eta) exp(-lambda) dw

with its linear part and its noise exact, and D from one or more values: the same equation as SA-Solver's
(`sde.solvers.sa_solver`) with eta for tau^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sde.errors import check_choice, check_number
from sde.processes import SDE
from sde.solvers.ancestral import split
from sde.solvers.base import register
from sde.solvers.levels import Levels
from sde.solvers.linear import Draw, LinearSolver, Stage, Step, arrive, evaluate_at
from sde.solvers.sa_solver import NoiseRate, noisy_formula

SOLVER_TYPES = ("midpoint", "heun")


@register("dpmpp_sde")
@dataclass(frozen=True)
class DPMppSDE(LinearSolver):
    """DPM-Solver++ (stochastic) with two evaluations a step (k-diffusion, sample_dpmpp_sde).

    Two ancestral steps from the same place (`sde.solvers.ancestral`): one to the noise level a share r of h away gives
    D_m, one all the way uses D + (D_m - D) / (2 r). The noise of the first is part of that of the second: what it has
    become at the end, and an independent draw for the rest of the interval.

    Weak order 2. Independent noises in the two would make it 1: a noise moves D within its own step.

    Args:
        r: place of the intermediate evaluation, as a share of the step in log-SNR, above 0 and up to 1.
        eta: amount of noise of each ancestral step, 0 to 1; 0 is DPM-Solver++(2S).
        s_noise: factor on the added noise; 1 keeps the law.
        final: last-step policy, see `Solver`.
    """

    order: ClassVar[int] = 2
    default_grid: ClassVar[str] = "logsnr"
    default_steps: ClassVar[int | None] = 25
    evaluates: ClassVar[str] = "denoised"

    r: float = 0.5
    eta: float = 1.0
    s_noise: float = 1.0
    final: str = "none"

    def __post_init__(self) -> None:
        check_number("solver.r", self.r, above=0, at_most=1)
        check_number("solver.eta", self.eta, at_least=0, at_most=1)
        check_number("solver.s_noise", self.s_noise, at_least=0)
        self.check_final()

    @property
    def stochastic(self) -> bool:
        return self.eta > 0 and self.s_noise > 0

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels = Levels(sde, times)
        return [self._step(levels, i, i + 1) for i in range(levels.steps)]

    def _step(self, levels: Levels, i: int, j: int) -> Step:
        u, alpha, t = levels.u, levels.alpha, levels.t
        if u[j] == 0:
            return [evaluate_at(t[i]), arrive(0.0, (alpha[j],))]
        m = levels.between(i, j, self.r)
        (down_m, up_m), (down, _) = split(u[i], u[m], self.eta), split(u[i], u[j], self.eta)
        kept_m, kept = down_m / u[i], down / u[i]
        middle = Stage(
            alpha[m] / alpha[i] * kept_m,
            (alpha[m] * (1 - kept_m),),
            (Draw(alpha[m] * up_m * self.s_noise, t[i], t[m]),) if self.stochastic else (),
            keep=True,
            time=t[m],
        )
        # from y_m on, without what it has of D: its y and its noise shrink by the same factor on the way to the end
        share, decay = 1 / (2 * self.r), down / down_m
        terms = (1 - kept) * share, (1 - kept) * (1 - share) - decay * (1 - kept_m)
        # the rest of the variance, u_up^2 - (decay u_up_m)^2, without the subtraction
        rest = self.eta * u[j] / down_m * u[m] / u[i] * math.sqrt((u[m] - u[j]) * (u[m] + u[j]))
        draw = Draw(alpha[j] * rest * self.s_noise, t[m], t[j])
        end = arrive(alpha[j] / alpha[m] * decay, [alpha[j] * term for term in terms], draw)
        return [evaluate_at(t[i]), middle, end]


@register("dpmpp_2m_sde")
@dataclass(frozen=True)
class DPMpp2MSDE(LinearSolver):
    """DPM-Solver++(2M) with noise (k-diffusion, sample_dpmpp_2m_sde): D is extrapolated from its last two values.

    With k = 1 - exp(-(1 + eta) h) and D' the slope through the two values, y_s = (1 - k) y + k D + c D' and noise of
    variance u_s^2 (1 - exp(-2 eta h)), where

        midpoint    c = k h / 2
        heun        c = h - k / (1 + eta), the exact integral of the straight line: SA-Solver's predictor of order 2.

    Weak order 2: the slope carries the noise of the step before in place of its own, which sums up to the same. One
    evaluation a step.

    Args:
        solver_type: "midpoint" or "heun".
        eta: amount of noise, tau^2 of `sa_solver`; 1 is the reverse SDE, 0 the ODE and DPM-Solver++(2M).
        s_noise: factor on the added noise; 1 keeps the law.
        final: last-step policy, see `Solver`.
    """

    order: ClassVar[int] = 2
    default_grid: ClassVar[str] = "logsnr"
    default_steps: ClassVar[int | None] = 50
    evaluates: ClassVar[str] = "denoised"

    solver_type: str = "midpoint"
    eta: float = 1.0
    s_noise: float = 1.0
    final: str = "none"

    def __post_init__(self) -> None:
        check_choice("solver.solver_type", self.solver_type, SOLVER_TYPES)
        check_number("solver.eta", self.eta, at_least=0)
        check_number("solver.s_noise", self.s_noise, at_least=0)
        self.check_final()

    @property
    def stochastic(self) -> bool:
        return self.eta > 0 and self.s_noise > 0

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels, noise = Levels(sde, times), NoiseRate(self.eta)
        steps: list[Step] = []
        for i in range(levels.steps):
            nodes = [i, i - 1][: i + 1]
            decay, terms, spread = noisy_formula(levels, i, i + 1, nodes, noise)
            if self.solver_type == "midpoint" and i > 0 and levels.u[i + 1] > 0:
                shift = 0.5 * math.log(levels.u[i] / levels.u[i + 1]) / math.log(levels.u[i - 1] / levels.u[i])
                terms = sum(terms) * (1 + shift), -sum(terms) * shift
            draw = Draw(spread * self.s_noise, levels.t[i], levels.t[i + 1])
            steps.append([evaluate_at(levels.t[i]), arrive(decay, terms, draw)])
        return steps


@register("dpmpp_3m_sde")
@dataclass(frozen=True)
class DPMpp3MSDE(LinearSolver):
    """DPM-Solver++(3M) with noise (k-diffusion, sample_dpmpp_3m_sde): D is a parabola through three values.

    One evaluation a step. Order 3 without noise, weak order 2 with it.

    Args:
        eta: amount of noise, tau^2 of `sa_solver`; 1 is the reverse SDE, 0 the ODE and DPM-Solver++(3M).
        s_noise: factor on the added noise; 1 keeps the law.
        final: last-step policy, see `Solver`.
    """

    default_grid: ClassVar[str] = "logsnr"
    default_steps: ClassVar[int | None] = 50
    evaluates: ClassVar[str] = "denoised"

    eta: float = 1.0
    s_noise: float = 1.0
    final: str = "none"

    def __post_init__(self) -> None:
        check_number("solver.eta", self.eta, at_least=0)
        check_number("solver.s_noise", self.s_noise, at_least=0)
        self.check_final()

    @property
    def order(self) -> int:
        return 2 if self.eta > 0 else 3

    @property
    def stochastic(self) -> bool:
        return self.eta > 0 and self.s_noise > 0

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels, noise = Levels(sde, times), NoiseRate(self.eta)
        steps: list[Step] = []
        for i in range(levels.steps):
            nodes = [i, i - 1, i - 2][: i + 1]
            decay, terms, spread = noisy_formula(levels, i, i + 1, nodes, noise)
            draw = Draw(spread * self.s_noise, levels.t[i], levels.t[i + 1])
            steps.append([evaluate_at(levels.t[i]), arrive(decay, terms, draw)])
        return steps
