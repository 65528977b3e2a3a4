r"""The reverse SDE with adaptive steps: "Gotta Go Fast" (arXiv 2105.14080), on a path that rejections leave alone.

A step is made by Euler-Maruyama, x', and by improved Euler with the same noise, x'': the difference is the error, and
x'' is taken. In the variable "time" this is the paper's algorithm 1,

    x'  = x - h b(x, t) + g(t) dW,    x'' = x - h (b(x, t) + b(x', t - h)) / 2 + (g(t) + g(t - h)) / 2 dW,

b = f x - g^2 score. In "snr", v = (alpha / sigma)^2, the reverse SDE of y = x / alpha is the plain dZ = D dv + dB for
Z = v y, with D the denoised x_0: constant noise, a bounded drift, and nothing stiff next to the data, so that

    y'  = y + (h (D - y) + dB) / (v + h),    y'' = y' + h (D' - D) / (2 (v + h)).

Whether a step is rejected depends on its noise. Drawing other noise then, as the paper does, favors small increments
and biases the law; here what has been drawn is kept. Each sample knows its Brownian path at the places that it has
tried, and a shorter step meets a Brownian bridge between them (Rackauckas and Nie, "Adaptive methods for stochastic
differential equations via natural embeddings and rejection sampling with memory", 2017).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.broadcast import expand
from sde.errors import check_choice, check_number
from sde.processes import SDE
from sde.reverse import ReverseProcess
from sde.solvers.adaptive import PID, AdaptiveSolver, Draw, States, Stepper, Trial, check_tolerances, rms
from sde.solvers.base import register

_VARIABLES = ("snr", "time")
_SAME = 1e-9  # places this close, relative to the step, are one: rounding must not draw a sqrt(rounding) of noise


@register("adaptive_sde")
@dataclass(frozen=True)
class AdaptiveSDE(AdaptiveSolver):
    """Improved Euler on the reverse SDE, with steps and errors of every sample by itself (arXiv 2105.14080).

    Weak order 2 for the additive noise of these processes; two evaluations an attempt. The number of steps follows
    from the tolerances. For samples of the reverse SDE without a number of steps to be found.

    Args:
        rtol: relative tolerance of a step, of the larger of this and the last Euler step; the paper's epsilon_rel.
        atol: absolute tolerance of a step, in units of the state; the paper's 0.0078 is one of 256 levels in [-1, 1].
        variable: in which steps are taken: "snr", or the paper's "time".
        h_init: first step, as a share of the place it starts from (time T or signal-to-noise ratio); the paper's is
            0.01.
        max_share: longest step, as a share of the place it starts from; 1 is no limit in "time", as in the paper. The
            error of single steps does not see how all of them together narrow the law; this does.
        exponent: of the error in the change of the step, the paper's r; 0.5 is that of the estimate's order.
        safety: of the expected step, the paper's theta.
        min_factor, max_factor: bounds of the change of the step.
        max_steps: attempts of any one sample before giving up.
        final: last-step policy, see `Solver`.
    """

    order: ClassVar[int] = 2

    rtol: float = 0.05
    atol: float = 0.0078
    variable: str = "snr"
    h_init: float = 0.1
    max_share: float = 0.3
    exponent: float = 0.9
    safety: float = 0.9
    min_factor: float = 0.1
    max_factor: float = 10.0
    max_steps: int = 10000
    final: str = "none"

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol, self.max_steps)
        check_choice("solver.variable", self.variable, _VARIABLES)
        check_number("solver.h_init", self.h_init, above=0)
        check_number("solver.max_share", self.max_share, above=0)
        check_number("solver.exponent", self.exponent, at_least=0.5, at_most=1)
        check_number("solver.safety", self.safety, above=0, at_most=1)
        check_number("solver.min_factor", self.min_factor, above=0, below=1)
        check_number("solver.max_factor", self.max_factor, above=1)
        self.check_final()

    @property
    def stochastic(self) -> bool:
        return True

    def stepper(self, sde: SDE, first: float, last: float, like: Tensor) -> Stepper:
        return (_InSNR if self.variable == "snr" else _InTime)(self, sde, first, last)


class _ImprovedEuler(ABC):
    """What both variables share. The states: the integrated one, the last Euler step, and the known path (`Path`)."""

    evaluations = 2
    start: float
    end: float

    def __init__(self, options: AdaptiveSDE, sde: SDE, first: float, last: float) -> None:
        self.options, self.sde = options, sde
        self.first, self.last = first, last
        self.start, self.end = self.place(first), self.place(last)
        self.controller = PID(
            1 / options.exponent, safety=options.safety, least=options.min_factor, most=options.max_factor
        )
        self.path = Path()

    @abstractmethod
    def place(self, t: float) -> float:
        """Where time `t` is."""

    @abstractmethod
    def time(self, place: Tensor) -> Tensor:
        """The time at `place`."""

    @abstractmethod
    def scale(self, place: Tensor) -> Tensor:
        """x over the integrated state."""

    @abstractmethod
    def move(
        self, process: ReverseProcess, y: Tensor, place: Tensor, target: Tensor, increment: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The Euler step, the improved one minus it, and the noise in the improved one, (b, ...)."""

    def begin(self, process: ReverseProcess, x: Tensor) -> tuple[States, Tensor]:
        start = torch.full((len(x),), self.start, dtype=torch.float64, device=x.device)
        y = x / expand(self.scale(start).to(x.dtype), x)
        return (y, y, *self.path.begin(y)), self.options.h_init * start

    def limit(self, place: Tensor, step: Tensor) -> Tensor:
        return torch.minimum(step, self.options.max_share * place)

    def attempt(
        self, process: ReverseProcess, states: States, place: Tensor, step: Tensor, last: Tensor, draw: Draw
    ) -> Trial:
        y, before, *known = states
        h = step.abs()
        increment, ahead, behind = self.path.walk((known[0], known[1]), h, draw())
        euler, change, noise = self.move(process, y, place, torch.where(last, self.end, place + step), increment)
        error = change.abs() / torch.clamp_min(
            self.options.rtol * torch.maximum(euler.abs(), before.abs()), self.options.atol
        )
        reached = euler + change
        if self.options.final == "mean":
            reached = torch.where(expand(last, y), reached - noise, reached)
        return Trial(rms(error), (reached, euler, *ahead), (y, before, *behind))

    def between(self, states: States, trial: Trial, place: Tensor, step: Tensor, where: float) -> Tensor:
        y = states[0]
        share = expand(((where - place) / step).to(y.dtype), y)
        return self.x((torch.lerp(y, trial.ahead[0], share),), torch.full_like(place, where))

    def x(self, states: States, place: Tensor) -> Tensor:
        return expand(self.scale(place).to(states[0].dtype), states[0]) * states[0]


class _InSNR(_ImprovedEuler):
    """y = x / alpha over v = (alpha / sigma)^2."""

    def place(self, t: float) -> float:
        return float(self.sde.noise_level(t)) ** -2

    def time(self, place: Tensor) -> Tensor:
        return self.sde.t_of_noise_level(place**-0.5).clamp(self.last, self.first)

    def scale(self, place: Tensor) -> Tensor:
        return self.sde.alpha(self.time(place))

    def move(
        self, process: ReverseProcess, y: Tensor, place: Tensor, target: Tensor, increment: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        share = expand(((target - place) / target).to(y.dtype), y)
        noise = increment / expand(target.to(y.dtype), y)
        denoised = self._denoised(process, y, place)
        euler = y + share * (denoised - y) + noise
        return euler, 0.5 * share * (self._denoised(process, euler, target) - denoised), noise

    def _denoised(self, process: ReverseProcess, y: Tensor, place: Tensor) -> Tensor:
        t = self.time(place)
        return process.denoised(expand(self.sde.alpha(t).to(y.dtype), y) * y, t)


class _InTime(_ImprovedEuler):
    """x over t, as published."""

    def place(self, t: float) -> float:
        return t

    def time(self, place: Tensor) -> Tensor:
        return place

    def scale(self, place: Tensor) -> Tensor:
        return torch.ones_like(place)

    def move(
        self, process: ReverseProcess, y: Tensor, place: Tensor, target: Tensor, increment: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = expand((target - place).to(y.dtype), y)
        g, g_after = (expand(self.sde.g(t).to(y.dtype), y) for t in (place, target))
        drift = process.drift(y, place, eta=1.0)
        euler = y + h * drift + g * increment
        more = 0.5 * (g_after - g) * increment
        change = 0.5 * h * (process.drift(euler, target, eta=1.0) - drift) + more
        return euler, change, g * increment + more


Known = tuple[Tensor, Tensor]
"""How far ahead a sample's path is known, (b, K) float64 with inf for free slots, and its values there, (b, K, ...)."""


class Path:
    """Brownian paths of many samples, each known at places of its own, counted from where the sample is."""

    def __init__(self) -> None:
        self._used = 0  # slots of any one sample, at most

    def begin(self, like: Tensor) -> Known:
        """Nothing is known."""
        slots = 4
        self._used = 0
        far = torch.full((len(like), slots), math.inf, dtype=torch.float64, device=like.device)
        return far, like.new_zeros(len(like), slots, *like.shape[1:])

    def walk(self, known: Known, h: Tensor, z: Tensor) -> tuple[Tensor, Known, Known]:
        """The increments over `h` (b,), and what is known then: by those who go that far, and by those who stay.

        Args:
            known: as it was.
            h: how far, at least 0.
            z: standard normals (b, ...).
        """
        far, values = self._room(known)
        within = far <= h[:, None] * (1 + _SAME)
        a, left = self._nearest(far, values, torch.where(within, far, -1.0).max(1), 0.0)
        b, right = self._nearest(far, values, torch.where(within, math.inf, far).min(1), math.inf)
        gap = torch.where(h - a > _SAME * h, h - a, 0.0)
        share = torch.where(b.isinf(), 0.0, gap / (b - a))
        spread = torch.sqrt(gap * (1 - share))
        here = left + expand(share.to(z.dtype), z) * (right - left) + expand(spread.to(z.dtype), z) * z
        free = far.isinf().int().argmax(1, keepdim=True)
        slot = torch.arange(far.shape[1], device=far.device) == free
        far = torch.where(slot, h[:, None], far)
        values = torch.where(slot.reshape(*slot.shape, *[1] * (z.ndim - 1)), here[:, None], values)
        passed = torch.where(within | slot, math.inf, far - h[:, None])
        return here, (passed, values - here[:, None]), (far, values)

    @staticmethod
    def _nearest(far: Tensor, values: Tensor, found: tuple[Tensor, Tensor], none: float) -> tuple[Tensor, Tensor]:
        """Distance (b,) and value (b, ...) of the slots that were found; `none` and zero where there is none."""
        distance, slot = found
        missing = (distance < 0) | distance.isinf()
        value = values[torch.arange(len(slot), device=slot.device), slot]
        return torch.where(missing, none, distance), torch.where(expand(missing, value), 0.0, value)

    def _room(self, known: Known) -> Known:
        """The same with at least one free slot for everyone. The host looks only when there might be none."""
        far, values = known
        if self._used == far.shape[1]:
            self._used = int(far.isfinite().sum(1).max())
            if self._used == far.shape[1]:
                far = torch.cat([far, torch.full_like(far, math.inf)], 1)
                values = torch.cat([values, torch.zeros_like(values)], 1)
        self._used += 1
        return far, values
