r"""First-order transitions of the reverse SDE, and ancestral sampling: less noise by the flow than the next level has,
then fresh noise.

With u = sigma / alpha and y = x / alpha, an ancestral step from u_t to u_s follows the probability-flow ODE down to
u_down and adds noise of standard deviation u_up:

    u_up = eta u_s sqrt(1 - (u_s / u_t)^2),    u_down^2 = u_s^2 - u_up^2,    0 <= eta <= 1.

If the flow is followed exactly, y has the law of level u_s whatever eta and the length of the step. With eta = 1 and
one first-order step, y_s = D + (u_down / u_t) (y - D) + u_up z with D = E[x_0 | x_t] is a draw from the law of y_s
given x_t and x_0 = D: ancestral sampling of a DDPM (arXiv 2006.11239, equation 7). eta = 0 leaves the flow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sde.errors import check_number
from sde.processes import SDE
from sde.solvers.base import register
from sde.solvers.levels import Levels
from sde.solvers.linear import LinearSolver
from sde.solvers.predictors import exact_kernel, reverse_diffusion
from sde.solvers.stages import Draw, Stage, Step, arrive, evaluate_at


def split(u_t: float, u_s: float, eta: float) -> tuple[float, float]:
    """(u_down, u_up) of a step from noise level u_t to u_s."""
    share = eta * eta * (u_t - u_s) * (u_t + u_s) / u_t**2
    return u_s * math.sqrt(1 - share), u_s * math.sqrt(share)


@register("reverse_diffusion")
@dataclass(frozen=True)
class ReverseDiffusion(LinearSolver):
    """The forward transition x_t = a x_s + b z run backwards (arXiv 2011.13456, appendix E):

        x_s = (2 - a) x + (1 + eta^2)/2 b^2 score + eta b z.

    Weak order 1; one evaluation a step. The predictor of `pc` by itself, with the exact transition between any two
    times. A step to u = 0 adds no noise. Take `ancestral`, which bears longer steps, unless this one is asked for.

    Args:
        eta: amount of noise; 1 is the reverse SDE, 0 a first-order method on the probability-flow ODE.
        final: last-step policy, see `Solver`.
    """

    order: ClassVar[int] = 1
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 500
    evaluates: ClassVar[str] = "score"

    eta: float = 1.0
    final: str = "none"

    def __post_init__(self) -> None:
        check_number("solver.eta", self.eta, at_least=0)
        self.check_final()

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels, steps = Levels(sde, times), []
        for i in range(levels.steps):
            t, s = levels.t[i], levels.t[i + 1]
            step = reverse_diffusion(exact_kernel(sde, t, s))
            score = 0.5 * (1 + self.eta**2) * step.score
            noise = self.eta * step.z if levels.u[i + 1] > 0 else 0.0
            steps.append([evaluate_at(t), arrive(step.x, (score,), Draw(noise, t, s))])
        return steps


def ancestral_steps(sde: SDE, times: Sequence[float], eta: float, s_noise: float) -> list[Step]:
    """Steps that take the denoised as x_0: one evaluation each."""
    levels = Levels(sde, times)
    steps: list[Step] = []
    for i in range(levels.steps):
        down, up = split(levels.u[i], levels.u[i + 1], eta)
        kept, alpha = down / levels.u[i], levels.alpha[i + 1]
        noise = Draw(alpha * up * s_noise, levels.t[i], levels.t[i + 1])
        end = arrive(alpha / levels.alpha[i] * kept, (alpha * (1 - kept),), noise)
        steps.append([evaluate_at(levels.t[i]), end])
    return steps


@register("ancestral")
@dataclass(frozen=True)
class Ancestral(LinearSolver):
    """Draws x_s from its law given x_t and the denoised x_0 (DDPM, arXiv 2006.11239; DDIM, arXiv 2010.02502):

        x_s = alpha_s D + sqrt(sigma_s^2 - c^2) eps + c z,    c = eta sigma_s sqrt(1 - (u_s / u_t)^2).

    Weak order 1; one evaluation a step. The noise is exact for data that are one point, so that it is the first-order
    solver that bears the longest steps. `dpmpp_2m_sde` is as cheap and of second order.

    Args:
        eta: amount of noise, 0 to 1: 1 is DDPM, 0 DDIM.
        final: last-step policy, see `Solver`.
    """

    order: ClassVar[int] = 1
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 250
    evaluates: ClassVar[str] = "denoised"

    eta: float = 1.0
    final: str = "none"

    def __post_init__(self) -> None:
        check_number("solver.eta", self.eta, at_least=0, at_most=1)
        self.check_final()

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        return ancestral_steps(sde, times, self.eta, 1.0)


@register("euler_ancestral")
@dataclass(frozen=True)
class EulerAncestral(LinearSolver):
    """Euler's step in y over u down to u_down, then noise (k-diffusion, sample_euler_ancestral):

        y_s = y + (u_down - u_t) eps + s_noise u_up z.

    Weak order 1; one evaluation a step. On every process it is `ancestral`, with a factor on the noise.

    Args:
        eta: amount of noise, 0 to 1; 0 is Euler's method in u, which is DDIM.
        s_noise: factor on the added noise; 1 keeps the law.
        final: last-step policy, see `Solver`.
    """

    order: ClassVar[int] = 1
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 250
    evaluates: ClassVar[str] = "denoised"

    eta: float = 1.0
    s_noise: float = 1.0
    final: str = "none"

    def __post_init__(self) -> None:
        check_number("solver.eta", self.eta, at_least=0, at_most=1)
        check_number("solver.s_noise", self.s_noise, at_least=0)
        self.check_final()

    @property
    def stochastic(self) -> bool:
        return self.eta > 0 and self.s_noise > 0

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        return ancestral_steps(sde, times, self.eta, self.s_noise)


@register("dpmpp_2s_ancestral")
@dataclass(frozen=True)
class DPMpp2SAncestral(LinearSolver):
    """DPM-Solver++(2S) (arXiv 2211.01095) down to u_down, then noise (k-diffusion, sample_dpmpp_2s_ancestral):

        y_m = (u_m / u_t) y + (1 - u_m / u_t) D(y, u_t),    u_m^2 = u_t u_down,
        y_s = (u_down / u_t) y + (1 - u_down / u_t) D(y_m, u_m) + s_noise u_up z.

    Weak order 2, since what the flow of second order leaves is the only error; two evaluations a step, one in a step
    to u = 0.

    Args:
        eta: amount of noise, 0 to 1; 0 is DPM-Solver++(2S).
        s_noise: factor on the added noise; 1 keeps the law.
        final: last-step policy, see `Solver`.
    """

    order: ClassVar[int] = 2
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 25
    evaluates: ClassVar[str] = "denoised"

    eta: float = 1.0
    s_noise: float = 1.0
    final: str = "none"

    def __post_init__(self) -> None:
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
        down, up = split(u[i], u[j], self.eta)
        m = levels.add(math.sqrt(u[i] * down))
        kept = u[m] / u[i]
        middle = Stage(alpha[m] / alpha[i] * kept, (alpha[m] * (1 - kept),), time=t[m])
        kept = down / u[i]
        noise = Draw(alpha[j] * up * self.s_noise, t[i], t[j])
        return [evaluate_at(t[i]), middle, arrive(alpha[j] / alpha[i] * kept, (alpha[j] * (1 - kept),), noise)]
