"""Euler-Maruyama on the reverse SDE, continuous in its amount of noise down to Euler on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from sde.errors import check_number
from sde.randomness import Noise
from sde.reverse import ReverseProcess
from sde.solvers.base import Solver, State, register
from sde.solvers.predictors import LinearStep, euler_maruyama


@register("euler_maruyama")
@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """x_s = x - [f x - (1 + eta^2)/2 g^2 score] (t - s) + eta g sqrt(t - s) z (arXiv 2011.13456, appendix D and E).

    Weak order 1; one evaluation a step. The simplest sampler: take it as a baseline, with hundreds of steps.

    Args:
        eta: amount of noise; 1 is the reverse SDE, 0 Euler's method on the probability-flow ODE.
        final: last-step policy, see `Solver`.
    """

    order: ClassVar[int] = 1
    default_grid: ClassVar[str] = "logsnr"
    default_steps: ClassVar[int | None] = 500

    eta: float = 1.0
    final: str = "none"

    def __post_init__(self) -> None:
        check_number("solver.eta", self.eta, at_least=0)
        self.check_final()

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def init(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> State:
        return State(plan=[euler_maruyama(process.sde, t, t - s, self.eta) for t, s in pairwise(times)])

    def step(self, process: ReverseProcess, x: Tensor, t: float, s: float, state: State, noise: Noise) -> Tensor:
        now: LinearStep = state.now
        score = process.score(x, t)
        return now.apply(x, score, None if state.quiet or now.z == 0 else noise())
