r"""What a solver is, and the one loop that all stepping solvers share.

A solver walks a time grid t_0 = T > t_1 > ... > t_n from noise to data. A stepping solver writes two methods:

    init(process, times, x) -> State     whatever depends on the grid alone, computed once: `State.plan`
    step(process, x, t, s, state, noise) the state at s < t, from the state at t

and declares its order. Solvers that choose their own steps override `solve`. To add one: a file in this folder with
`@register("name")` on the class, its import in `sde/solvers/__init__.py`, and `conf/solver/name.yaml`; the tests of
order, law and batch-invariance pick it up by themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from sde.errors import UserError, check_choice
from sde.processes import SDE
from sde.randomness import Noise
from sde.registry import Registry
from sde.reverse import ReverseProcess

SOLVERS: Registry[Solver] = Registry("solver")
register = SOLVERS.register

FINAL = ("none", "mean", "tweedie")

Callback = Callable[[float, float, Tensor | None], None]
"""Called as (share of the way done, time reached, state there or None when the solver has none to show)."""


@dataclass
class State:
    """What a stepping solver carries along the grid.

    Attributes:
        plan: what the solver computed beforehand; one entry per step for those that use `now`.
        index: number of the step, from 0.
        quiet: this is the last step and its noise is to be left out (`final="mean"`).
        history: for multistep solvers, the newest first.
        origin: for correctors, the state that the previous step ended from.
    """

    plan: Any = ()
    index: int = 0
    quiet: bool = False
    history: list[Any] = field(default_factory=list)
    origin: Any = None

    @property
    def now(self) -> Any:
        """The plan of this step."""
        return self.plan[self.index]


@dataclass(frozen=True)
class Solution:
    """Where a solver arrived.

    Attributes:
        x: the sample (B, ...).
        nfe: evaluations of the denoiser on the batch, counted by the process.
        times: the grid, or the two ends for a solver that chose its own steps.
    """

    x: Tensor
    nfe: int
    times: tuple[float, ...]


class Solver(ABC):
    """A way from noise to data. Leaves are frozen dataclasses of their options.

    Attributes:
        both_ways: whether, without noise, it carries data to noise as well, along an increasing time grid. True of
            solvers of the probability-flow ODE; those of the reverse SDE know one direction.
        default_grid: name of the grid used when none is asked for.
        default_steps: number of steps used when none is asked for; None for a solver that chooses its own.
        final: what happens at the end of the grid, where x still holds noise of standard deviation sigma(t_n):
            "none" leaves it; "mean" leaves the noise of the last update out; "tweedie" replaces x by
            E[x_0 | x] at the cost of one evaluation. "none" by default: the end of the grid is where a solver is
            asked to go. `python -m sde.sample denoise=true` asks for "tweedie".
    """

    both_ways: ClassVar[bool] = False
    default_grid: ClassVar[str] = "uniform"
    default_steps: ClassVar[int | None]
    final: str

    @property
    @abstractmethod
    def order(self) -> int:
        """Order of convergence in the largest step: of the end point for a deterministic solver, of moments (weak) for
        a stochastic one. Tests measure it. Leaves give it as a class variable, or as an option."""

    @property
    def stochastic(self) -> bool:
        """Whether solving draws noise."""
        return False

    @property
    def follows_path(self) -> bool:
        """Whether all draws belong to the intervals of steps, so that on a Brownian path more steps refine a sample."""
        return False

    @property
    def grid_name(self) -> str:
        """The grid that suits these options; `default_grid` unless a leaf says otherwise."""
        return self.default_grid

    def check_final(self) -> None:
        """Raise `UserError` for a last-step policy that does not exist."""
        check_choice("solver.final", self.final, FINAL)

    @abstractmethod
    def init(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> State:
        """The state before the first step; computes per-step numbers once, in float64."""

    @abstractmethod
    def step(self, process: ReverseProcess, x: Tensor, t: float, s: float, state: State, noise: Noise) -> Tensor:
        """The state at time `s`, given `x` (B, ...) at time `t` > `s`."""

    @torch.no_grad()
    def solve(
        self,
        process: ReverseProcess,
        x: Tensor,
        times: Sequence[float],
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Carry `x` (B, ...), a draw of the prior at `times[0]`, along the grid.

        Args:
            process: the denoiser, counted.
            x: state at `times[0]`.
            times: decreasing times, at least two; or increasing ones, along which a deterministic solver carries data
                to noise.
            noise: source of standard normals shaped like `x`; needed by stochastic solvers.
            callback: told of the progress after each step.

        Raises:
            UserError: for a grid that is no way, or a stochastic solver without noise.
        """
        times = self.check_times(process.sde, times)
        self._check_noise(noise)
        before = process.nfe
        state = self.init(process, times, x)
        n = len(times) - 1
        for i, (t, s) in enumerate(pairwise(times)):
            state.index, state.quiet = i, self.final == "mean" and i == n - 1
            x = self.step(process, x, t, s, state, noise or _no_noise)
            if callback is not None:
                callback((i + 1) / n, s, x)
        if self.final == "tweedie":
            x = process.denoised(x, times[-1])
        return Solution(x, process.nfe - before, tuple(times))

    def check_times(self, sde: SDE, times: Sequence[float]) -> list[float]:
        """`times` as numbers.

        Raises:
            UserError: when they are no grid for this solver.
        """
        times = [float(t) for t in times]
        if len(times) > 1 and times[0] < times[-1]:
            return self._check_way_to_noise(sde, times)
        if len(times) < 2 or not all(t > s >= 0 for t, s in pairwise(times)):  # NaN does not pass
            raise UserError("the time grid must be at least two decreasing times, none negative")
        if self.final == "tweedie" and float(sde.sigma(times[-1])) == 0:
            raise UserError(
                "solver.final=tweedie has nothing to remove where the time grid ends without noise (t = 0): "
                "use solver.final=mean"
            )
        return times

    def _check_way_to_noise(self, sde: SDE, times: list[float]) -> list[float]:
        if not self.both_ways or self.stochastic or self.final != "none":
            raise UserError(
                f"an increasing time grid leads from data to noise, where {type(self).__name__} with these options "
                f"cannot go: take a solver of the probability-flow ODE (adams, heun, dopri5, ...) without noise and "
                f"with solver.final=none, or decreasing times"
            )
        if not all(t < s for t, s in pairwise(times)) or times[0] < 0 or float(sde.sigma(times[0])) == 0:
            raise UserError(
                f"an increasing time grid must start at a time with noise, such as t_min={sde.t_min:g}, and have no "
                f"time twice"
            )
        return times

    def _check_noise(self, noise: Noise | None) -> None:
        if self.stochastic and noise is None:
            raise UserError("this solver is stochastic and was given no noise: pass SampleNoise or BatchNoise")


def _no_noise(t: float | None = None, s: float | None = None) -> Tensor:
    raise AssertionError("a solver that is not stochastic asked for noise")
