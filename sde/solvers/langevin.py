r"""Langevin dynamics at the times of a grid: samples stay at each noise level instead of stepping between them.

For any step size e > 0 the chain

    x <- x + e score(x, t) + sqrt(2 e) z

has nearly p_t as its stationary law; where p_t is Gaussian of variance v it settles at v / (1 - e / 2v), too wide, and
forgets its past like (1 - e / v)^k. Annealing carries samples down the noise levels: what is far from its place at one
level was close to it at the last (arXiv 1907.05600, algorithm 1). Steps are unadjusted: `sde.solvers.mala` accepts and
rejects.

A `Move` is one such step at one time, with its numbers settled and its network evaluation ready; `Stay` is the solver
that carries out lists of moves. `pc` makes its correctors of the same moves.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sde.denoiser import Evaluation
from sde.errors import UserError, check_number
from sde.processes import SDE
from sde.randomness import Noise
from sde.reverse import ReverseProcess
from sde.solvers.base import Solver, State, register

Move = Callable[[Tensor, Noise], Tensor]
"""From a state (B, ...) to the next one, in memory of its own."""

LOW_DIMENSION = 64
"""Below as many dimensions |z| / |score| is taken as sigma(t): see `sde.solvers.pc`."""

_ROOT2 = math.sqrt(2)


def fixed_move(score: Evaluation, size: float, quiet: bool = False) -> Move:
    """x + e score + sqrt(2 e) z with e = `size`; `quiet` leaves the noise out."""
    spread = math.sqrt(2 * size)

    def move(x: Tensor, noise: Noise) -> Tensor:
        mean = torch.add(x, score(x), alpha=size)
        return mean if quiet else mean.add_(noise(), alpha=spread)

    return move


def norm_move(score: Evaluation, like: Tensor, gain: float, drawn: bool = False, quiet: bool = False) -> Move:
    """The same with sqrt(e) = `gain` |z| / |score|, one e per sample.

    Args:
        score: at the time of the move.
        like: a state (B, ...).
        gain: sqrt(2) snr a.
        drawn: take |z| of the draw; otherwise its expectation, the square root of the dimension.
        quiet: leave the noise out.
    """
    dims, length = tuple(range(1, like.ndim)), math.sqrt(like[0].numel())
    tiny = torch.finfo(like.dtype).tiny

    def move(x: Tensor, noise: Noise) -> Tensor:
        s = score(x)
        z = noise() if drawn or not quiet else None
        root = torch.linalg.vector_norm(s, dim=dims, keepdim=True).clamp_min_(tiny)
        if drawn and z is not None:
            root = torch.div(torch.linalg.vector_norm(z, dim=dims, keepdim=True), root).mul_(gain)
        else:
            root = torch.reciprocal(root).mul_(gain * length)
        way = s * root  # x + root (root score + sqrt(2) z)
        if z is not None and not quiet:
            way.add_(z, alpha=_ROOT2)
        return torch.addcmul(x, root, way)

    return move


class Stay(Solver):
    """A solver whose plan holds, for each step, the moves that it is made of.

    Attributes:
        order: 0. Langevin dynamics leaves an error that no number of levels removes.
    """

    order: ClassVar[int] = 0
    default_grid: ClassVar[str] = "logsnr"

    @property
    def stochastic(self) -> bool:
        return True

    @abstractmethod
    def moves(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> Sequence[Sequence[Move]]:
        """The moves at each of `times`, for states shaped like `x`; none where no noise is left (sigma = 0)."""

    def init(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> State:
        first, *rest = self.moves(process, times, x)
        return State(plan=[[*first, *rest[0]], *rest[1:]])

    def step(self, process: ReverseProcess, x: Tensor, t: float, s: float, state: State, noise: Noise) -> Tensor:
        for move in state.now:
            x = move(x, noise)
        return x


def check_count(name: str, value: int, at_least: int = 1) -> None:
    """Raise `UserError` unless `value` is a whole number of at least `at_least`."""
    check_number(name, value, at_least=at_least)
    if not isinstance(value, int):
        raise UserError(f"{name}={value!r} must be a whole number")


def levels(sde: SDE, times: Sequence[float]) -> tuple[list[float], list[float]]:
    """The times at which there is noise, and their sigma."""
    t = torch.tensor(list(times), dtype=torch.float64)
    sigma = sde.sigma(t)
    kept = sigma > 0
    return t[kept].tolist(), sigma[kept].tolist()


@register("langevin")
@dataclass(frozen=True)
class Langevin(Stay):
    """Annealed Langevin dynamics with steps by signal-to-noise ratio, one step size per sample and step:

        e = 2 (snr sqrt(D) / |score|)^2,

    or 2 (snr sigma(t))^2 below 64 dimensions, where the norm of one sample's score would distort the law. On pure noise
    both are the same. Samples start at the first time of the grid and stay `steps_per_level` at each of its times, the
    last included: steps_per_level (steps + 1) evaluations. No order: the law is that of p_t at the last time but for a
    variance larger by about snr^2 and what was not forgotten of earlier levels.

    The corrector of `pc` (arXiv 2011.13456, appendix G) without predictor. Take `pc` to get somewhere; take this one
    for networks that know some noise levels only, or to let samples mix at a level.

    Args:
        steps_per_level: steps at each time.
        snr: signal-to-noise ratio of a step.
        final: last-step policy, see `Solver`.
    """

    default_steps: ClassVar[int | None] = 200

    steps_per_level: int = 5
    snr: float = 0.16
    final: str = "none"

    def __post_init__(self) -> None:
        check_count("solver.steps_per_level", self.steps_per_level)
        check_number("solver.snr", self.snr, above=0)
        self.check_final()

    def moves(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> Sequence[Sequence[Move]]:
        at, sigmas = levels(process.sde, times)
        last = len(at) * self.steps_per_level - 1

        def move(score: Evaluation, sigma: float, number: int) -> Move:
            quiet = self.final == "mean" and number == last
            if x[0].numel() < LOW_DIMENSION:
                return fixed_move(score, 2 * (self.snr * sigma) ** 2, quiet)
            return norm_move(score, x, _ROOT2 * self.snr, quiet=quiet)

        return _by_level(process, times, at, sigmas, x, self.steps_per_level, move)


@register("ald")
@dataclass(frozen=True)
class AnnealedLangevin(Stay):
    """Annealed Langevin dynamics of NCSN (arXiv 1907.05600, algorithm 1; arXiv 2006.09011, algorithm 1):

        e_i = step_size sigma_i^2,    step_size = epsilon / sigma_n^2 of the papers,

    so that signal and noise of a step keep their proportion at all levels. Samples start at the first time of the grid
    and stay `steps_per_level` at each of its times, the last included: steps_per_level (steps + 1) evaluations, one
    more for the denoising at the end that the second paper adds (`final="tweedie"`). The papers' L levels are L - 1
    steps. No order.

    The step size matters; without one it is that of the second paper's technique 4. Noise around a point that came from
    a level gamma times as wide has, after T steps and in units of sigma^2, the variance

        (1 - step)^(2T) (gamma^2 - S) + S,    S = 1 / (1 - step / 2),

    and the step is chosen to bring it closest to 1. The original sampler of NCSN and NCSNv2 models; for others `pc`.

    Args:
        steps_per_level: steps at each time; 5 in the second paper, 100 in the first.
        step_size: e / sigma^2, 0 to 2; None chooses it from the grid. The second paper's for CIFAR-10, 232 levels from
            50 to 0.01, is 0.062.
        final: last-step policy, see `Solver`.
    """

    default_steps: ClassVar[int | None] = 231

    steps_per_level: int = 5
    step_size: float | None = None
    final: str = "none"

    def __post_init__(self) -> None:
        check_count("solver.steps_per_level", self.steps_per_level)
        if self.step_size is not None:
            check_number("solver.step_size", self.step_size, above=0, below=2)
        self.check_final()

    def moves(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> Sequence[Sequence[Move]]:
        at, sigmas = levels(process.sde, times)
        step = self.step_size
        if step is None:
            step = consistent_step(max((a / b for a, b in pairwise(sigmas)), default=1.0), self.steps_per_level)
        last = len(at) * self.steps_per_level - 1

        def move(score: Evaluation, sigma: float, number: int) -> Move:
            return fixed_move(score, step * sigma * sigma, self.final == "mean" and number == last)

        return _by_level(process, times, at, sigmas, x, self.steps_per_level, move)


def _by_level(
    process: ReverseProcess,
    times: Sequence[float],
    at: Sequence[float],
    sigmas: Sequence[float],
    x: Tensor,
    count: int,
    move: Callable[[Evaluation, float, int], Move],
) -> list[list[Move]]:
    """`count` of `move(score, sigma, number of the move)` at each of the times `at`, none at the rest of `times`."""
    scores = process.evaluations("score", at, x)
    stays = [
        [move(score, sigma, i * count + k) for k in range(count)]
        for i, (score, sigma) in enumerate(zip(scores, sigmas, strict=True))
    ]
    return stays + [[] for _ in range(len(times) - len(at))]


def consistent_step(ratio: float, steps: int) -> float:
    """The e / sigma^2 for which the variance of noise stays closest to sigma^2 (arXiv 2006.09011, technique 4).

    Args:
        ratio: of the noise levels of neighbors, gamma >= 1.
        steps: Langevin steps at each level.
    """

    def off(step: np.ndarray) -> np.ndarray:
        settled = 1 / (1 - step / 2)
        return np.abs((1 - step) ** (2 * steps) * (ratio**2 - settled) + settled - 1)

    low, high = 1e-8, 1.0
    for _ in range(8):  # a grid of a hundred, eight times finer and finer: to the last digit that matters
        tried = np.geomspace(low, high, 100)
        best = int(np.argmin(off(tried)))
        low, high = float(tried[max(best - 1, 0)]), float(tried[min(best + 1, 99)])
    return math.sqrt(low * high)
