r"""Predictor-corrector sampling (arXiv 2011.13456, section 4.2 and appendix G).

A predictor carries the state from t to s; a corrector then spends evaluations at one time to bring its law closer to
p_t by Langevin dynamics, x <- x + e score + sqrt(2 e) z, with one step size e per sample:

    langevin   e = 2 a^2 (snr |z| / |score|)^2, norms of each sample by itself
    ald        e = 2 a^2 (snr sigma(t))^2 (annealed Langevin dynamics, arXiv 1907.05600)

with a the decay of the forward step (1 for VE). A step size that depends on the state and on the draw does not leave
p_t invariant: with the norms of one sample of D dimensions, 1 / |score|^2 acts like two dimensions more, and |z|^2
like another two: the stationary variance is off by (1 + 2 / D)^2. Among the thousands of a picture that is nothing, in
the plane it is fourfold. (The paper averages the norms over the batch instead, which ties samples together.) So
`langevin` takes |z| as sqrt(D), its expectation, and below `LOW_DIMENSION` dimensions |z| / |score| as sigma(t), what
it is for pure noise. The "score_sde" discretization keeps the drawn |z|.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from sde.broadcast import expand
from sde.errors import UserError, check_choice, check_number
from sde.processes import SDE
from sde.randomness import Noise
from sde.reverse import ReverseProcess
from sde.solvers.base import Solver, State, register
from sde.solvers.predictors import LinearStep, ancestral, euler_maruyama, exact_kernel, reverse_diffusion

PREDICTORS = ("reverse_diffusion", "euler_maruyama", "ancestral", "none")
CORRECTORS = ("langevin", "ald", "none")
LOW_DIMENSION = 64


@register("pc")
@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """Alternates a first-order step of the reverse SDE with Langevin steps at constant time.

    Weak order 1 (of the predictor; a corrector has none). 1 + corrector_steps evaluations a step. The classic sampler
    of VE models, robust when there are hundreds of steps to spend.

    Args:
        predictor: one of `PREDICTORS`; "none" leaves Langevin dynamics alone.
        corrector: one of `CORRECTORS`.
        corrector_steps: Langevin steps at each time.
        corrector_position: "before" the predictor, at t (the paper's code), or "after" it, at s (its algorithm 1).
        snr: signal-to-noise ratio of a Langevin step; 0.16 for CIFAR-10, 0.075 for 1024-pixel pictures in the paper.
        probability_flow: let the predictor follow the ODE: half the score, no noise.
        discretization: "exact" uses the transition of the SDE between the times of any grid; "score_sde" the n-step
            chains of score_sde_pytorch, of DDPM for VP, SMLD for VE and Euler-Maruyama otherwise.
        final: last-step policy, see `Solver`; "mean" with the "score_sde" discretization, whose grid ends at t = 0.
    """

    order: ClassVar[int] = 1
    default_grid: ClassVar[str] = "logsnr"
    default_steps: ClassVar[int | None] = 250

    predictor: str = "reverse_diffusion"
    corrector: str = "langevin"
    corrector_steps: int = 1
    corrector_position: str = "before"
    snr: float = 0.16
    probability_flow: bool = False
    discretization: str = "exact"
    final: str = "none"

    def __post_init__(self) -> None:
        check_choice("solver.predictor", self.predictor, PREDICTORS)
        check_choice("solver.corrector", self.corrector, CORRECTORS)
        check_choice("solver.corrector_position", self.corrector_position, ("before", "after"))
        check_choice("solver.discretization", self.discretization, ("exact", "score_sde"))
        check_number("solver.corrector_steps", self.corrector_steps, at_least=1)
        if not isinstance(self.corrector_steps, int):
            raise UserError(f"solver.corrector_steps={self.corrector_steps!r} must be a whole number")
        check_number("solver.snr", self.snr, above=0)
        self.check_final()
        if self.predictor == "none" and self.corrector == "none":
            raise UserError("solver.predictor=none with solver.corrector=none does nothing: choose at least one")
        if self.predictor == "ancestral" and self.probability_flow:
            raise UserError("solver.probability_flow=true has no ancestral predictor: use reverse_diffusion")

    @property
    def stochastic(self) -> bool:
        return self.corrector != "none" or not self.probability_flow

    @property
    def grid_name(self) -> str:
        return "score_sde" if self.discretization == "score_sde" else self.default_grid

    def init(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> State:
        n = len(times) - 1
        return State(plan=[self._plan(process.sde, t, s, n) for t, s in pairwise(times)])

    def _plan(self, sde: SDE, t: float, s: float, n: int) -> LinearStep:
        chain = self.discretization == "score_sde"
        kernel = sde.discretize(t, n) if chain else exact_kernel(sde, t, s)
        if self.predictor == "euler_maruyama":
            step = euler_maruyama(sde, t, sde.T / n if chain else t - s)._replace(decay=kernel.decay)
        elif self.predictor == "ancestral":
            step = ancestral(kernel)
        else:
            step = reverse_diffusion(kernel)
        if self.probability_flow:
            step = step._replace(score=0.5 * step.score, z=0.0)
        return step

    def step(self, process: ReverseProcess, x: Tensor, t: float, s: float, state: State, noise: Noise) -> Tensor:
        before = self.corrector_position == "before"
        predicts = self.predictor != "none"
        if before:
            x = self._correct(process, x, t, state, noise, quiet=state.quiet and not predicts)
        if predicts:
            last = before or self.corrector == "none" or float(process.sde.sigma(s)) == 0
            silent = (state.quiet and last) or state.now.z == 0
            x = state.now.apply(x, process.score(x, t), None if silent else noise())
        if not before:
            x = self._correct(process, x, s, state, noise, quiet=state.quiet)
        return x

    def _correct(self, process: ReverseProcess, x: Tensor, t: float, state: State, noise: Noise, quiet: bool) -> Tensor:
        """`corrector_steps` of Langevin dynamics at time `t`; `quiet` leaves the noise of the last one out."""
        sigma = float(process.sde.sigma(t))
        if self.corrector == "none" or sigma == 0:
            return x
        scale = 2 * (state.now.decay * self.snr) ** 2
        for i in range(self.corrector_steps):
            score, z = process.score(x, t), noise()
            size = scale * self._ratio(score, z, sigma) ** 2
            x = x + expand(size, x) * score
            if not (quiet and i == self.corrector_steps - 1):
                x = x.addcmul_(expand((2 * size).sqrt(), x), z)
        return x

    def _ratio(self, score: Tensor, z: Tensor, sigma: float) -> Tensor:
        """|z| / |score|, or what stands for it: shape () or (B,)."""
        d = score[0].numel()
        drawn = self.discretization == "score_sde"
        if self.corrector == "ald" or (d < LOW_DIMENSION and not drawn):
            return torch.full((), sigma, dtype=score.dtype, device=score.device)
        norm = _norms(z) if drawn else math.sqrt(d)
        return norm / _norms(score).clamp_min(torch.finfo(score.dtype).tiny)


def _norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, (B,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)
