"""Heun's method on the probability-flow ODE, with EDM's optional churn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

from torch import Tensor

from sde.errors import check_number
from sde.processes import SDE
from sde.randomness import Noise
from sde.reverse import ReverseProcess
from sde.solvers.base import Solver, State, register


class _Plan(NamedTuple):
    """One step in numbers: noise is added up to `t`, then the ODE is solved over `h` of the noise level."""

    t: float
    lift: float  # factor on x when noise is added
    added: float  # standard deviation of the noise that is added
    decay: float  # alpha_s / alpha_t
    h: float  # alpha_s (u_s - u_t), with u = sigma / alpha
    corrects: bool


@register("heun")
@dataclass(frozen=True)
class Heun(Solver):
    """Heun's second-order method in the variables of EDM (arXiv 2206.00364, algorithms 1 and 2), on any SDE.

    With u = sigma / alpha the probability-flow ODE is d(x / alpha) = eps(x, u) du: the linear part is solved exactly.
    Order 2; two evaluations a step (one for a step that ends at u = 0). Good from some 10 steps on, the standard
    choice without tuning.

    Churn first raises the noise level of a step by a factor 1 + gamma, gamma = min(s_churn / steps, sqrt(2) - 1), where
    it lies within [s_tmin, s_tmax], and adds the noise that belongs there. The level is never raised above that of the
    grid's beginning, for which no network was trained.

    Args:
        s_churn: amount of churn; 0 solves the ODE.
        s_tmin: smallest noise level (sigma / alpha) that is churned.
        s_tmax: largest noise level that is churned.
        s_noise: factor on the added noise; slightly above 1 makes up for lost detail.
        final: last-step policy, see `Solver`; "tweedie" is EDM's Euler step to zero noise.
    """

    order: ClassVar[int] = 2
    default_grid: ClassVar[str] = "edm"
    default_steps: ClassVar[int | None] = 18

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    final: str = "none"

    def __post_init__(self) -> None:
        check_number("solver.s_churn", self.s_churn, at_least=0)
        check_number("solver.s_tmin", self.s_tmin, at_least=0)
        check_number("solver.s_noise", self.s_noise, at_least=0)
        if not self.s_tmax > self.s_tmin:
            check_number("solver.s_tmax", self.s_tmax, above=self.s_tmin)
        self.check_final()

    @property
    def stochastic(self) -> bool:
        return self.s_churn > 0

    def init(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> State:
        gamma = min(self.s_churn / (len(times) - 1), math.sqrt(2) - 1)
        highest = float(process.sde.noise_level(times[0]))
        plan = [self._plan(process.sde, t, s, gamma, highest) for t, s in pairwise(times)]
        if self.final == "mean":
            plan[-1] = self._plan(process.sde, times[-2], times[-1], 0.0, highest)
        return State(plan=plan)

    def _plan(self, sde: SDE, t: float, s: float, gamma: float, highest: float) -> _Plan:
        u = float(sde.noise_level(t))
        from_t, from_u, lift, added = t, u, 1.0, 0.0
        if gamma > 0 and self.s_tmin <= u <= self.s_tmax and u < highest:
            from_u = min(u * (1 + gamma), highest)
            from_t = float(sde.t_of_noise_level(from_u))
            lift = float(sde.alpha(from_t) / sde.alpha(t))
            added = float(sde.alpha(from_t)) * math.sqrt(from_u**2 - u**2) * self.s_noise
        to_u, alpha = float(sde.noise_level(s)), float(sde.alpha(s))
        decay = alpha / float(sde.alpha(from_t))
        return _Plan(from_t, lift, added, decay, alpha * (to_u - from_u), corrects=to_u > 0)

    def step(self, process: ReverseProcess, x: Tensor, t: float, s: float, state: State, noise: Noise) -> Tensor:
        now: _Plan = state.now
        if now.t > t:
            x = (now.lift * x).add_(noise(), alpha=now.added)
        eps = process.eps(x, now.t)
        base = now.decay * x
        guess = base.add(eps, alpha=now.h)
        if not now.corrects:
            return guess
        return base.add_(eps.add_(process.eps(guess, s)), alpha=0.5 * now.h)
