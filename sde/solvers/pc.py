r"""Predictor-corrector sampling (arXiv 2011.13456, section 4.2 and appendix G).

A predictor carries the state from t to s; a corrector then spends evaluations at one time to bring its law closer to
p_t. Any solver can predict whose steps stand by themselves. Correctors are Langevin dynamics, x <- x + e score +
sqrt(2 e) z, with one step size e per sample:

    langevin   e = 2 a^2 (snr |z| / |score|)^2, norms of each sample by itself
    ald        e = 2 a^2 (snr sigma(t))^2 (annealed Langevin dynamics, arXiv 1907.05600)
    mala       e = that of ald, and the move is accepted or rejected so that p_t is its law exactly (`sde.solvers.mala`)

with a the decay of the forward step (1 for VE). A step size that depends on the state and on the draw does not leave
p_t invariant: with the norms of one sample of D dimensions, 1 / |score|^2 acts like two dimensions more, and |z|^2
like another two: the stationary variance is off by (1 + 2 / D)^2. Among the thousands of a picture that is nothing, in
the plane it is fourfold. (The paper averages the norms over the batch instead, which ties samples together.) So
`langevin` takes |z| as sqrt(D), its expectation, and below `LOW_DIMENSION` dimensions |z| / |score| as sigma(t), what
it is for pure noise. The "score_sde" discretization keeps the drawn |z|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sde.denoiser import Evaluation
from sde.errors import UserError, check_choice, check_flag, check_number, suggest
from sde.processes import SDE
from sde.randomness import Noise
from sde.reverse import ReverseProcess
from sde.solvers.base import SOLVERS, Solver, State, register
from sde.solvers.langevin import LOW_DIMENSION, Move, Stay, check_count, fixed_move, norm_move
from sde.solvers.linear import LinearSolver
from sde.solvers.mala import metropolis_move
from sde.solvers.predictors import Chain

CHAINS = ("reverse_diffusion", "euler_maruyama", "ancestral")
"""The predictors of the paper."""
CORRECTORS = ("langevin", "ald", "mala", "none")


class _At(NamedTuple):
    """One corrector in numbers."""

    time: float
    sigma: float
    gain: float  # sqrt(2) snr a: a step is of e = (gain |z| / |score|)^2


@register("pc")
@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """Alternates a step of another solver with Langevin steps at constant time.

    Weak order 1 with the predictors of the paper; a corrector has none. A step takes the predictor's evaluations, 1 for
    those of the paper, and `corrector_steps` (with "mala" 2 corrector_steps + 1). The classic sampler of VE models,
    robust when there are hundreds of steps to spend.

    Args:
        predictor: the name of a solver whose steps stand by themselves, with that solver's defaults:
            "reverse_diffusion" (the paper's choice for VE and VP), "euler_maruyama", "ancestral", "heun", ... Neither
            one that chooses its own steps nor one that remembers earlier ones, which correctors would make untrue.
            "none" leaves Langevin dynamics alone.
        corrector: one of `CORRECTORS`.
        corrector_steps: Langevin steps at each time.
        corrector_position: "before" the predictor, at t (the paper's code), or "after" it, at s (its algorithm 1).
        snr: signal-to-noise ratio of a Langevin step; 0.16 for CIFAR-10, 0.075 for 1024-pixel pictures in the paper.
        probability_flow: let a predictor of the reverse SDE follow the ODE: half the score, no noise.
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
        check_choice("solver.corrector", self.corrector, CORRECTORS)
        check_choice("solver.corrector_position", self.corrector_position, ("before", "after"))
        check_choice("solver.discretization", self.discretization, ("exact", "score_sde"))
        check_count("solver.corrector_steps", self.corrector_steps)
        check_number("solver.snr", self.snr, above=0)
        check_flag("solver.probability_flow", self.probability_flow)
        self.check_final()
        if self.predictor == "none" and self.corrector == "none":
            raise UserError("solver.predictor=none with solver.corrector=none does nothing: choose at least one")
        if self.predictor == "ancestral" and self.probability_flow:
            raise UserError("solver.probability_flow=true has no ancestral predictor: use reverse_diffusion")
        self._check_predictor()

    def _check_predictor(self) -> None:
        name = self.predictor
        if self.discretization == "score_sde" and name != "none":
            check_choice("solver.predictor", name, [*CHAINS, "none"])
            return
        if name != "none" and name not in SOLVERS:
            raise UserError(
                f"solver.predictor={name!r} is neither a solver nor none{suggest(name, SOLVERS)}: take one whose steps "
                f"stand by themselves, such as {', '.join(CHAINS)}"
            )
        cls = type(self) if name == "none" else SOLVERS.get(name)
        if name != "none" and (cls.default_steps is None or issubclass(cls, Stay) or cls is type(self)):
            raise UserError(
                f"solver.predictor={name!r} does not take the steps of a grid by itself: take one that does, such as "
                f"{', '.join(CHAINS)}"
            )
        if self.probability_flow and name != "none" and not hasattr(cls, "eta"):
            raise UserError(f"solver.probability_flow=true means nothing to solver.predictor={name!r}: leave it out")

    def _predictor(self, final: str = "none") -> Solver | None:
        """The solver that predicts, with a last-step policy; None for none."""
        if self.predictor == "none":
            return None
        if self.discretization == "score_sde":
            return Chain(self.predictor, self.probability_flow, final)
        make: Callable[..., Solver] = SOLVERS.get(self.predictor)
        return make(final=final, eta=0.0) if self.probability_flow else make(final=final)

    @property
    def stochastic(self) -> bool:
        predictor = self._predictor()
        return self.corrector != "none" or (predictor is not None and predictor.stochastic)

    @property
    def grid_name(self) -> str:
        return "score_sde" if self.discretization == "score_sde" else self.default_grid

    def check_times(self, sde: SDE, times: Sequence[float]) -> list[float]:
        """As in `Solver`, and that the predictor's steps stand by themselves on this grid."""
        checked = super().check_times(sde, times)
        predictor = self._predictor()
        if isinstance(predictor, LinearSolver):
            _check_steps(self.predictor, predictor, sde, tuple(checked))
        return checked

    def init(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> State:
        places = _places(self, process.sde, tuple(times))
        scores = iter(process.evaluations("score", [at.time for at in places if at is not None], x))
        before, last = self.corrector_position == "before", len(times) - 2
        predicts_last = self.predictor != "none" and (before or places[-1] is None)
        quiet = self.final == "mean" and not predicts_last
        steps = [
            [] if at is None else self._correct(process, at, next(scores), x, quiet and i == last)
            for i, at in enumerate(places)
        ]
        predictor = self._predictor("mean" if self.final == "mean" and predicts_last else "none")
        if predictor is not None:
            for moves, prediction in zip(steps, _predictions(predictor, process, times, x), strict=True):
                moves.insert(len(moves) if before else 0, prediction)
        return State(plan=steps)

    def step(self, process: ReverseProcess, x: Tensor, t: float, s: float, state: State, noise: Noise) -> Tensor:
        for move in state.now:
            x = move(x, noise)
        return x

    def _correct(self, process: ReverseProcess, at: _At, score: Evaluation, x: Tensor, quiet: bool) -> list[Move]:
        """`corrector_steps` of Langevin dynamics; `quiet` leaves the noise of the last one out."""
        drawn, size = self.discretization == "score_sde", (at.gain * at.sigma) ** 2
        if self.corrector == "mala":
            return [metropolis_move(process, at.time, score, size, self.corrector_steps)]
        fixed = self.corrector == "ald" or (x[0].numel() < LOW_DIMENSION and not drawn)

        def move(last: bool) -> Move:
            return fixed_move(score, size, last) if fixed else norm_move(score, x, at.gain, drawn, last)

        return [move(quiet and k == self.corrector_steps - 1) for k in range(self.corrector_steps)]


def _predictions(solver: Solver, process: ReverseProcess, times: Sequence[float], x: Tensor) -> list[Move]:
    """The steps of `solver`, each as a move."""
    state, n = solver.init(process, times, x), len(times) - 1

    def step(i: int, t: float, s: float) -> Move:
        quiet = solver.final == "mean" and i == n - 1

        def move(x: Tensor, noise: Noise) -> Tensor:
            state.index, state.quiet = i, quiet
            return solver.step(process, x, t, s, state, noise)

        return move

    return [step(i, t, s) for i, (t, s) in enumerate(pairwise(times))]


@lru_cache(maxsize=256)
def _places(solver: PredictorCorrector, sde: SDE, times: tuple[float, ...]) -> tuple[_At | None, ...]:
    """The corrector of each step, once for all batches; None where there is nothing to correct."""
    n = len(times) - 1
    if solver.corrector == "none":
        return (None,) * n
    t = torch.tensor(times, dtype=torch.float64)
    if solver.discretization == "score_sde":
        decays = [sde.discretize(time, n).decay for time in times[:-1]]
    else:
        decays = torch.exp(sde.log_alpha(t[:-1]) - sde.log_alpha(t[1:])).tolist()
    t = t[:-1] if solver.corrector_position == "before" else t[1:]
    gain = math.sqrt(2) * solver.snr
    return tuple(
        _At(time, sigma, gain * decay) if sigma > 0 else None
        for time, sigma, decay in zip(t.tolist(), sde.sigma(t).tolist(), decays, strict=True)
    )


@lru_cache(maxsize=256)
def _check_steps(name: str, solver: LinearSolver, sde: SDE, times: tuple[float, ...]) -> None:
    """Raise `UserError` when steps of the predictor `solver` make use of what earlier ones evaluated."""
    for step in solver.plan(sde, times):
        made = 0
        for stage in step:
            if stage.again or any(stage.terms[made:]):
                raise UserError(
                    f"solver.predictor={name!r} remembers earlier steps, which a corrector makes untrue: take a solver "
                    f"whose steps stand by themselves, such as {', '.join(CHAINS)}"
                )
            made += stage.time is not None
