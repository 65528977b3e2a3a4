"""DDIM: ancestral sampling with as much of its noise as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sde.errors import check_number
from sde.processes import SDE
from sde.solvers.ancestral import split
from sde.solvers.base import register
from sde.solvers.levels import Levels
from sde.solvers.linear import LinearSolver
from sde.solvers.stages import Draw, Step, arrive, evaluate_at


@register("ddim")
@dataclass(frozen=True)
class DDIM(LinearSolver):
    """x_s = alpha_s D + sqrt(sigma_s^2 - c^2) eps + c z, c = eta sigma_s sqrt(1 - (u_s / u_t)^2), u = sigma / alpha.

    D is the denoised x (arXiv 2010.02502, equations 12 and 16, whose c this is on VP). eta = 0 is the deterministic
    sampler: Euler's method on d(x / alpha) = eps du, which is `euler` and DPM-Solver-1. eta = 1 draws x_s from its law
    given x_t and x_0 = D: ancestral sampling, which is `ancestral`.

    Order 1 (weakly, with noise); one evaluation a step. A baseline, and what many published figures were made with.

    Args:
        eta: amount of noise, 0 to 1.
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    order: ClassVar[int] = 1
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 50

    eta: float = 0.0
    final: str = "none"

    def __post_init__(self) -> None:
        check_number("solver.eta", self.eta, at_least=0, at_most=1)
        self.check_final()

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels, steps = Levels(sde, times), []
        for i in range(levels.steps):
            t, s, alpha = levels.t[i], levels.t[i + 1], levels.alpha[i + 1]
            down, up = split(levels.u[i], levels.u[i + 1], self.eta)
            end = arrive(alpha / levels.alpha[i], (alpha * (down - levels.u[i]),), Draw(alpha * up, t, s))
            steps.append([evaluate_at(t), end])
        return steps
