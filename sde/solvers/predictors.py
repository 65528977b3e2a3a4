r"""First-order steps of the reverse SDE, each a combination of the state, the score and one normal draw:

    x_s = x * x_t + score * score(x_t, t) + z * z.

They are the predictors of predictor-corrector sampling (arXiv 2011.13456, section 4.2 and appendix E and F), and
Euler-Maruyama is a solver by itself. A step needs the forward kernel x_t | x_s ~ N(a x_s, b^2 I). It is the exact
transition of the SDE between the two times, or, to reproduce the published samplers, the chain of n equal steps that
the paper discretizes the SDE with (`SDE.discretize`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

from torch import Tensor

from sde.errors import UserError
from sde.processes import SDE, Discretization
from sde.solvers.linear import LinearSolver
from sde.solvers.stages import Draw, Step, arrive, evaluate_at


class LinearStep(NamedTuple):
    """The three coefficients, and `decay` = a of the forward kernel, which scales Langevin steps."""

    x: float
    score: float
    z: float
    decay: float

    def apply(self, x: Tensor, score: Tensor, z: Tensor | None) -> Tensor:
        """x_s of the shape of `x`; `z` None gives its mean."""
        mean = (self.x * x).add_(score, alpha=self.score)
        return mean if z is None or self.z == 0 else mean.add_(z, alpha=self.z)


Kernel = Callable[[SDE, float, float], Discretization]


def exact_kernel(sde: SDE, t: float, s: float) -> Discretization:
    """The forward transition from s to t, and the standard deviation of x_s given x_t and x_0."""
    a, b = (float(value) for value in sde.transition(s, t))
    return Discretization(decay=a, spread=b, ancestral_spread=b * float(sde.sigma(s) / sde.sigma(t)))


def reverse_diffusion(kernel: Discretization) -> LinearStep:
    """The forward step run backwards: x_s = x - (a - 1) x + b^2 score + b z."""
    a, b = kernel.decay, kernel.spread
    return LinearStep(2 - a, b * b, b, a)


def ancestral(kernel: Discretization) -> LinearStep:
    """x_s from its law given x_t and the denoised x_0 (arXiv 2006.11239): (x + b^2 score) / a plus noise."""
    a, b = kernel.decay, kernel.spread
    if a <= 0:
        raise UserError("the steps are too long for the ancestral predictor, which divides by their decay: take more")
    return LinearStep(1 / a, b * b / a, kernel.ancestral_spread, a)


def euler_maruyama(sde: SDE, t: float, h: float, eta: float = 1.0) -> LinearStep:
    """One step of length h > 0 of dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dw, against time."""
    f, g = float(sde.f(t)), float(sde.g(t))
    return LinearStep(1 - f * h, 0.5 * (1 + eta * eta) * g * g * h, eta * g * math.sqrt(h), 1 + f * h)


@dataclass(frozen=True)
class Chain(LinearSolver):
    """The n-step chain of score_sde_pytorch run backwards: a predictor of `pc` under its "score_sde" discretization.

    Args:
        predictor: "reverse_diffusion", "ancestral" or "euler_maruyama".
        probability_flow: half the score, no noise.
        final: last-step policy, see `Solver`.
    """

    order: ClassVar[int] = 1
    default_grid: ClassVar[str] = "score_sde"
    default_steps: ClassVar[int | None] = 1000
    evaluates: ClassVar[str] = "score"

    predictor: str
    probability_flow: bool
    final: str

    @property
    def stochastic(self) -> bool:
        return not self.probability_flow

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        n, steps = len(times) - 1, []
        for t, s in pairwise(times):
            x, score, z, _ = self._step(sde, t, n)
            if self.probability_flow:
                score, z = 0.5 * score, 0.0
            steps.append([evaluate_at(t), arrive(x, (score,), Draw(z, t, s))])
        return steps

    def _step(self, sde: SDE, t: float, n: int) -> LinearStep:
        if self.predictor == "euler_maruyama":
            return euler_maruyama(sde, t, sde.T / n)
        return (ancestral if self.predictor == "ancestral" else reverse_diffusion)(sde.discretize(t, n))
