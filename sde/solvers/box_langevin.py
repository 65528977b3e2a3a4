r"""Langevin dynamics at one noise level, kept in a box by a linear restoring force.

Data on a bounded domain (pixels in [-1, 1], points on a table) are sampled by the chain

    x <- x + e s(x) + sqrt(2 e) z

where outside the box [low, high], taken entry by entry, a force -(x - clip(x)) / width^2 pulls back. With it as the
score of the entries outside, and the network asked at clip(x), the nearest point of the box, s is the gradient of

    log p_t(clip(x)) - |x - clip(x)|^2 / (2 width^2),

a density that is p_t inside and has Gaussian tails of standard deviation `width` outside: the smaller `width`, the
closer to p_t cut off at the faces, and the network is never asked where it was not trained. Added to the score at x
instead, the law is p_t(x) exp(-|x - clip(x)|^2 / (2 width^2)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.denoiser import Evaluation
from sde.errors import UserError, check_choice, check_number
from sde.randomness import Noise
from sde.reverse import ReverseProcess
from sde.solvers.base import Callback, Solution, Solver, State, register
from sde.solvers.langevin import Move, check_count

OUTSIDE = ("replace", "add")
STARTS = ("uniform", "normal")


@register("box_langevin")
@dataclass(frozen=True)
class BoxLangevin(Solver):
    """Langevin dynamics for targets on a box, at one noise level (see the module).

    Lengths are in units of the data, so that x / alpha is what the box holds; the state returned is at the time of
    `noise_level`, the second of the solution's times. `steps` evaluations. Of the grid nothing is used but its first
    time. No order: what is left at the end is a bias of the order of the step size, and the start's influence, which is
    gone when 2 steps step_size noise_level^2, the square of how far samples diffuse, exceeds the square of the box's
    width. For targets without separate modes; multimodal ones need annealing.

    Args:
        noise_level: sigma / alpha at which the score is taken.
        steps: of Langevin dynamics.
        step_size: e / noise_level^2.
        low: lower face of the box.
        high: upper face.
        width: standard deviation of what the force leaves outside; its strength is 1 / width^2. At least
            noise_level sqrt(step_size): a step must not overshoot the face it is pulled back to.
        outside: "replace" the score of the entries outside by the force, or "add" the force to it.
        start: "uniform" in the box, the prior's draw mapped by its distribution function, or "normal", the draw scaled
            to the middle of the box and half its width.
        final: last-step policy, see `Solver`: "mean" leaves the noise of the last step out, "tweedie" denoises from
            `noise_level`.
    """

    order: ClassVar[int] = 0
    default_steps: ClassVar[int | None] = None

    noise_level: float = 0.1
    steps: int = 1000
    step_size: float = 0.1
    low: float = -1.0
    high: float = 1.0
    width: float = 0.05
    outside: str = "replace"
    start: str = "uniform"
    final: str = "none"

    def __post_init__(self) -> None:
        check_number("solver.noise_level", self.noise_level, above=0)
        check_count("solver.steps", self.steps)
        check_number("solver.step_size", self.step_size, above=0)
        check_number("solver.low", self.low)
        check_number("solver.high", self.high, above=self.low)
        check_number("solver.width", self.width, above=0)
        least = self.noise_level * math.sqrt(self.step_size)
        if self.width < least:
            raise UserError(
                f"solver.width={self.width:g} is too narrow for these steps, which would overshoot: take at least "
                f"{least:g} (noise_level times the root of step_size), or a smaller step_size"
            )
        check_choice("solver.outside", self.outside, OUTSIDE)
        check_choice("solver.start", self.start, STARTS)
        self.check_final()

    @property
    def stochastic(self) -> bool:
        return True

    def time(self, process: ReverseProcess) -> float:
        """The time of `noise_level`.

        Raises:
            UserError: when the process has no such level.
        """
        sde = process.sde
        high, low = float(sde.noise_level(sde.T)), float(sde.noise_level(sde.t_min))
        if not low <= self.noise_level <= high:
            raise UserError(
                f"solver.noise_level={self.noise_level:g} is not between {low:g} and {high:g}, the noise levels of "
                f"this SDE: choose one of those"
            )
        return float(sde.t_of_noise_level(self.noise_level))

    def init(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> State:
        t = self.time(process)
        (score,) = process.evaluations("score", [t], x)
        return State(plan=[self._move(score, float(process.sde.alpha(t)), quiet) for quiet in (False, True)])

    def step(self, process: ReverseProcess, x: Tensor, t: float, s: float, state: State, noise: Noise) -> Tensor:
        """One Langevin step, whatever the times."""
        move: Move = state.plan[int(state.quiet)]
        return move(x, noise)

    def begin(self, process: ReverseProcess, x: Tensor, t: float) -> Tensor:
        """The first state, from `x`, a draw of the prior."""
        z = x / process.sde.prior_std
        share = torch.special.ndtr(z) if self.start == "uniform" else 0.5 + 0.5 * z
        return float(process.sde.alpha(t)) * (self.low + (self.high - self.low) * share)

    @torch.no_grad()
    def solve(
        self,
        process: ReverseProcess,
        x: Tensor,
        times: Sequence[float],
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """As in `Solver`; the callback is told of the state as often as the grid has steps."""
        times = self.check_times(process.sde, times)
        self._check_noise(noise)
        assert noise is not None
        t, before = self.time(process), process.nfe
        state, shown = self.init(process, times, x), len(times) - 1
        x = self.begin(process, x, t)
        for k in range(self.steps):
            state.quiet = self.final == "mean" and k == self.steps - 1
            x = self.step(process, x, t, t, state, noise)
            if callback is not None and (k + 1) * shown // self.steps > k * shown // self.steps:
                callback((k + 1) / self.steps, t, x)
        if self.final == "tweedie":
            x = process.denoised(x, t)
        return Solution(x, process.nfe - before, (times[0], t))

    def _move(self, score: Evaluation, alpha: float, quiet: bool) -> Move:
        size = self.step_size * (alpha * self.noise_level) ** 2
        pull, spread = size / (alpha * self.width) ** 2, math.sqrt(2 * size)
        low, high, replaces = alpha * self.low, alpha * self.high, self.outside == "replace"

        def move(x: Tensor, noise: Noise) -> Tensor:
            inside = x.clamp(low, high)
            s = score(inside) * (x == inside) if replaces else score(x)
            mean = torch.lerp(x, inside, pull).add_(s, alpha=size)
            return mean if quiet else mean.add_(noise(), alpha=spread)

        return move
