"""EDM's churn: noise is added before a step of an ODE solver, which then starts from a higher noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sde.errors import check_number
from sde.solvers.levels import Levels
from sde.solvers.stages import Draw, Stage, arrive, evaluate_at


@dataclass(frozen=True)
class Churn:
    """How much noise is added, and where (arXiv 2206.00364, algorithm 2).

    The noise level u = sigma / alpha of a step is raised by a factor 1 + gamma, gamma = min(s_churn / steps, sqrt(2) -
    1), where it lies within [s_tmin, s_tmax], and the noise that belongs there is added. The level is never raised
    above that of the grid's beginning, for which no network was trained.

    Args:
        s_churn: amount of churn; 0 for none.
        s_tmin: smallest noise level that is churned.
        s_tmax: largest noise level that is churned.
        s_noise: factor on the added noise.
    """

    s_churn: float
    s_tmin: float
    s_tmax: float
    s_noise: float

    def __post_init__(self) -> None:
        check_number("solver.s_churn", self.s_churn, at_least=0)
        check_number("solver.s_tmin", self.s_tmin, at_least=0)
        check_number("solver.s_noise", self.s_noise, at_least=0)
        if not self.s_tmax > self.s_tmin:
            check_number("solver.s_tmax", self.s_tmax, above=self.s_tmin)

    def begin(self, levels: Levels, i: int, final: str) -> tuple[int, Stage]:
        """Where step i starts, and the stage that goes there and evaluates the network.

        For `final` "mean" the last step is left without noise.
        """
        gamma = min(self.s_churn / levels.steps, math.sqrt(2) - 1)
        u, highest = levels.u[i], levels.u[0]
        if gamma == 0 or not self.s_tmin <= u <= self.s_tmax or u >= highest:
            return i, evaluate_at(levels.t[i])
        if final == "mean" and i == levels.steps - 1:
            return i, evaluate_at(levels.t[i])
        raised = min(u * (1 + gamma), highest)
        start = levels.add(raised)
        scale = levels.alpha[start] * math.sqrt(raised**2 - u**2) * self.s_noise
        added = arrive(levels.alpha[start] / levels.alpha[i], (), Draw(scale))
        return start, added._replace(time=levels.t[start])
