r"""The reverse SDE with its linear part solved, for any amount of noise tau, and Adams' formulas on it: SA-Solver.

With lambda = log(alpha / sigma), u = exp(-lambda), y = x / alpha and D = E[x_0 | x_t], the reverse process of noise tau
(eta in `sde.reverse`) is dy = (1 + tau^2) (D - y) dlambda + sqrt(2) tau u dw. So from u_t to u_s, with A(l, l') the
integral of tau^2 over lambda (arXiv 2309.05019, proposition 4.2),

    y_s = (u_s / u_t) e^-A(t, s) y_t + int_t^s (1 + tau^2) e^(lambda - lambda_s - A(lambda, s)) D dlambda
        + u_s sqrt(1 - e^(-2 A(t, s))) z.

D is replaced by the polynomial in lambda through its values at some nodes; the noise is exact whatever the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from sde.errors import UserError, check_number
from sde.processes import SDE
from sde.solvers.base import register
from sde.solvers.levels import Levels, lagrange
from sde.solvers.linear import LinearSolver, check_order
from sde.solvers.multistep import counts, newest
from sde.solvers.stages import Draw, Stage, Step, arrive, evaluate_at

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)
_REACH = 8.0  # growth exponent over which 20 nodes integrate to rounding


@dataclass(frozen=True)
class NoiseRate:
    """tau^2: `rate` at noise levels u from `low` to `high`, 0 elsewhere."""

    rate: float
    low: float = 0.0
    high: float = math.inf

    def pieces(self, u_t: float, u_s: float) -> list[tuple[float, float, float]]:
        """(u, u', tau^2) of the parts of the way from u_t down to u_s > 0 on which tau is constant."""
        ends = [u_t, *(u for u in (self.high, self.low) if u_s < u < u_t), u_s]
        return [(a, b, self.rate * (self.low <= math.sqrt(a * b) <= self.high)) for a, b in pairwise(ends)]


def noisy_formula(
    levels: Levels, i: int, j: int, nodes: Sequence[int], noise: NoiseRate
) -> tuple[float, tuple[float, ...], float]:
    """(decay, weights, spread) of x_j = decay x_i + sum_k weights[k] D[k] + spread z, with D[k] at place `nodes[k]`.

    A step to u = 0 ends at the newest D, `nodes[0]`, without noise.
    """
    u, alpha = levels.u, levels.alpha
    if u[j] == 0:
        return 0.0, (alpha[j], *(0.0 for _ in nodes[1:])), 0.0
    at = -np.log([u[k] for k in nodes])
    kept, total, lost = 1.0, np.zeros(len(nodes)), 0.0  # from the end of the piece to u_j
    for a, b, rate in reversed(noise.pieces(u[i], u[j])):
        growth, length = 1 + rate, math.log(a / b)
        count = math.ceil(growth * length / _REACH)
        for part in range(count):
            reach = length / count * (part + 0.5 - 0.5 * _NODES)  # distance from b, in lambda
            mass = 0.5 * length / count * _WEIGHTS * growth * np.exp(-growth * reach)
            total += kept * (lagrange(-math.log(b) - reach, at) @ mass)
        kept *= math.exp(-growth * length)
        lost += rate * length
    spread = levels.sigma[j] * math.sqrt(-math.expm1(-2 * lost))
    return alpha[j] / alpha[i] * kept, tuple((alpha[j] * total).tolist()), spread


@register("sa_solver")
@dataclass(frozen=True)
class SASolver(LinearSolver):
    """Stochastic Adams: prediction, and correction from the same evaluation (arXiv 2309.05019, algorithm 1).

    The corrector does the step again with the value at its predicted end and the same noise (PEC mode). Without noise
    (tau = 0) the order is predictor_order, or min(corrector_order, predictor_order + 1) with a corrector. With noise
    the weak order is 2 at most: what the noise within a step does to D is known to formulas of more values to first
    order only. One evaluation a step. The best of the stochastic solvers here in few evaluations.

    Predictor order 1 without corrector is DDIM, x_s = alpha_s D + sqrt(sigma_s^2 - c^2) eps + c z, with the noise
    c = sigma_s sqrt(1 - exp(-2 tau^2 h)), h the step in lambda: ancestral sampling for tau = 1.

    Args:
        predictor_order: values of D that predict, 1 to 4.
        corrector_order: values of D that correct, the one at the predicted end included, 1 to 5; 0 for no corrector.
        tau: amount of noise; 1 is the reverse SDE, 0 the probability-flow ODE.
        tau_low: smallest noise level sigma / alpha at which noise is added.
        tau_high: largest noise level at which it is.
        s_noise: factor on the added noise; 1 keeps the law.
        few_steps: with fewer steps than this the last ones use 4, 3, 2 and 1 values at most; 0 for never.
        final: last-step policy, see `Solver`.
    """

    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 50
    evaluates: ClassVar[str] = "denoised"

    predictor_order: int = 2
    corrector_order: int = 2
    tau: float = 1.0
    tau_low: float = 0.0
    tau_high: float = math.inf
    s_noise: float = 1.0
    few_steps: int = 30
    final: str = "none"

    def __post_init__(self) -> None:
        check_order(self.predictor_order, 4, "predictor_order")
        if self.corrector_order != 0 or isinstance(self.corrector_order, bool):
            check_order(self.corrector_order, 5, "corrector_order")
        check_number("solver.tau", self.tau, at_least=0, at_most=100)
        check_number("solver.tau_low", self.tau_low, at_least=0)
        if not self.tau_high > self.tau_low:  # infinity passes, NaN does not
            raise UserError(
                f"solver.tau_high={self.tau_high!r} must be a noise level above solver.tau_low={self.tau_low!r}"
            )
        check_number("solver.s_noise", self.s_noise, at_least=0)
        check_number("solver.few_steps", self.few_steps, at_least=0)
        self.check_final()

    @property
    def order(self) -> int:
        reached = self.predictor_order
        if self.corrector_order:
            reached = min(self.corrector_order, self.predictor_order + 1)
        return min(reached, 2) if self.tau > 0 else reached

    @property
    def stochastic(self) -> bool:
        return self.tau > 0 and self.s_noise > 0

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels, noise = Levels(sde, times), NoiseRate(self.tau**2, self.tau_low, self.tau_high)
        values = counts(levels.steps, self.predictor_order, self.few_steps)
        steps = predict(levels, values, noise, self.s_noise)
        if self.corrector_order:
            for i in range(1, levels.steps):
                _, corrected, _ = noisy_formula(levels, i - 1, i, newest(i, min(self.corrector_order, i + 1)), noise)
                change = _difference(corrected, (0.0, *steps[i - 1][-1].terms))
                steps[i].insert(1, Stage(terms=change, keep=True))
        return steps


def predict(levels: Levels, values: Sequence[int], noise: NoiseRate, s_noise: float) -> list[list[Stage]]:
    """Steps that evaluate once and use the last `values[i]` values in step i."""
    steps = []
    for i, count in enumerate(values):
        decay, terms, spread = noisy_formula(levels, i, i + 1, newest(i, count), noise)
        draw = Draw(spread * s_noise, levels.t[i], levels.t[i + 1])
        steps.append([evaluate_at(levels.t[i]), arrive(decay, terms, draw)])
    return steps


def _difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
    """a - b, the shorter one filled up with zeros."""
    size = max(len(a), len(b))
    a, b = ((*c, *(0.0,) * (size - len(c))) for c in (a, b))
    return tuple(p - q for p, q in zip(a, b, strict=True))
