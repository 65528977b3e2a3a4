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
from itertools import pairwise
from typing import ClassVar

from sde.errors import check_choice, check_flag, check_number
from sde.processes import SDE
from sde.solvers.ancestral import split
from sde.solvers.base import register
from sde.solvers.levels import Levels
from sde.solvers.linear import LinearSolver
from sde.solvers.multistep import SOLVER_TYPES, counts
from sde.solvers.sa_solver import NoiseRate, predict
from sde.solvers.stages import Draw, Stage, Step, arrive, evaluate_at


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
    default_grid: ClassVar[str] = "focused"
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
        few_steps: with fewer steps than this the last one uses the newest value alone; 0 for never, as published.
        final: last-step policy, see `Solver`.
    """

    order: ClassVar[int] = 2
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 50
    evaluates: ClassVar[str] = "denoised"

    solver_type: str = "midpoint"
    eta: float = 1.0
    s_noise: float = 1.0
    few_steps: int = 30
    final: str = "none"

    def __post_init__(self) -> None:
        check_choice("solver.solver_type", self.solver_type, SOLVER_TYPES)
        check_number("solver.eta", self.eta, at_least=0, at_most=100)
        check_number("solver.s_noise", self.s_noise, at_least=0)
        check_number("solver.few_steps", self.few_steps, at_least=0)
        self.check_final()

    @property
    def stochastic(self) -> bool:
        return self.eta > 0 and self.s_noise > 0

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels = Levels(sde, times)
        steps = predict(levels, counts(levels.steps, 2, self.few_steps), NoiseRate(self.eta), self.s_noise)
        if self.solver_type == "midpoint":
            for i, step in enumerate(steps):
                if len(step[-1].terms) == 2 and levels.u[i + 1] > 0:
                    step[-1] = step[-1]._replace(terms=_midpoint(levels, i, step[-1].terms))
        return steps


def _midpoint(levels: Levels, i: int, terms: tuple[float, ...]) -> tuple[float, ...]:
    """`terms` of the straight line, with its value in the middle of the step for the whole of it."""
    last, h = (math.log(a / b) for a, b in pairwise(levels.u[i - 1 : i + 2]))
    gain = sum(terms)
    lean = 0.5 * gain * h / last
    return gain + lean, -lean


@register("dpmpp_3m_sde")
@dataclass(frozen=True)
class DPMpp3MSDE(LinearSolver):
    """DPM-Solver++(3M) with noise (k-diffusion, sample_dpmpp_3m_sde): D is the parabola through its last three values.

    It is SA-Solver's predictor of order 3. Order 3 without noise; weak order 2 with it, where it gains nothing on
    `dpmpp_2m_sde`. k-diffusion takes the second divided difference, half of the second derivative, for it: order 2 with
    and without noise, somewhat better than the exact integral in few steps with noise. One evaluation a step.

    Args:
        eta: amount of noise, tau^2 of `sa_solver`; 1 is the reverse SDE, 0 the ODE and DPM-Solver++(3M).
        s_noise: factor on the added noise; 1 keeps the law.
        few_steps: with fewer steps than this the last two use two values and one; 0 for never, as published.
        published: take half of the parabola's second derivative, as k-diffusion does.
        final: last-step policy, see `Solver`.
    """

    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 50
    evaluates: ClassVar[str] = "denoised"

    eta: float = 1.0
    s_noise: float = 1.0
    few_steps: int = 30
    published: bool = False
    final: str = "none"

    def __post_init__(self) -> None:
        check_number("solver.eta", self.eta, at_least=0, at_most=100)
        check_number("solver.s_noise", self.s_noise, at_least=0)
        check_number("solver.few_steps", self.few_steps, at_least=0)
        check_flag("solver.published", self.published)
        self.check_final()

    @property
    def order(self) -> int:
        return 2 if self.eta > 0 or self.published else 3

    @property
    def stochastic(self) -> bool:
        return self.eta > 0 and self.s_noise > 0

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels = Levels(sde, times)
        steps = predict(levels, counts(levels.steps, 3, self.few_steps), NoiseRate(self.eta), self.s_noise)
        if self.published:
            for i, step in enumerate(steps):
                if len(step[-1].terms) == 3 and levels.u[i + 1] > 0:
                    step[-1] = step[-1]._replace(terms=_halved(levels, i, step[-1].terms, self.eta))
        return steps


def _halved(levels: Levels, i: int, terms: tuple[float, ...], eta: float) -> tuple[float, ...]:
    """`terms` of the parabola, with half of its second derivative: k-diffusion's."""
    oldest, last, h = (math.log(a / b) for a, b in pairwise(levels.u[i - 2 : i + 2]))
    growth = (1 + eta) * h
    weight = levels.alpha[i + 1] * ((math.expm1(-growth) / growth + 1) / growth - 0.5) * h * h
    second = 1 / (last * (last + oldest)), -1 / (last * oldest), 1 / (oldest * (last + oldest))
    return tuple(term + weight * share for term, share in zip(terms, second, strict=True))
