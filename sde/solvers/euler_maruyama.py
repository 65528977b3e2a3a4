"""Euler-Maruyama on the reverse SDE, continuous in its amount of noise down to Euler on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from sde.errors import check_number
from sde.processes import SDE
from sde.solvers.base import register
from sde.solvers.linear import LinearSolver
from sde.solvers.predictors import euler_maruyama
from sde.solvers.stages import Draw, Step, arrive, evaluate_at


@register("euler_maruyama")
@dataclass(frozen=True)
class EulerMaruyama(LinearSolver):
    """x_s = x - [f x - (1 + eta^2)/2 g^2 score] (t - s) + eta g sqrt(t - s) z (arXiv 2011.13456, appendix D and E).

    Weak order 1; one evaluation a step. The simplest sampler: take it as a baseline, with hundreds of steps.

    Args:
        eta: amount of noise; 1 is the reverse SDE, 0 Euler's method on the probability-flow ODE.
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
        steps = []
        for t, s in pairwise(times):
            step = euler_maruyama(sde, t, t - s, self.eta)
            steps.append([evaluate_at(t), arrive(step.x, (step.score,), Draw(step.z, t, s))])
        return steps
