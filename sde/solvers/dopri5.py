r"""The probability-flow ODE by Dormand and Prince's adaptive method, on the device and for each sample by itself.

With u = sigma / alpha and y = x / alpha the flow is dy/du = eps. `sde.solvers.levels` explains the three forms in which
a part of it is solved exactly; the default integrates EDM's, in the angle phi = arctan(u / s) with s = sigma_data:

    Y = y / r,  r = sqrt(1 + (u / s)^2),    dY/dphi = s r (eps - u y / (u^2 + s^2))

whose right-hand side is EDM's F, of order one at all noise levels and zero for Gaussian data of standard deviation s.
An error in Y reaches the data as it is, if they are Gaussian, so that tolerances are in units of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sde.broadcast import expand
from sde.errors import check_choice, check_number
from sde.processes import SDE
from sde.reverse import ReverseProcess
from sde.solvers.adaptive import (
    PID,
    AdaptiveSolver,
    Clock,
    Draw,
    States,
    Stepper,
    Trial,
    check_tolerances,
    check_variable,
    coarse,
    rms,
    rounding,
)
from sde.solvers.base import register
from sde.solvers.levels import PREDICTIONS

# Dormand and Prince (1980), table 2: stages, weights of order 5, and those minus the ones of order 4
_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
# Dense output of order 4 (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.6)
_D = (
    -12715105075 / 11282082432,
    0.0,
    87487479700 / 32700410799,
    -10690763975 / 1880347072,
    701980252875 / 199316789632,
    -1453857185 / 822651844,
    69997945 / 29380423,
)


@register("dopri5")
@dataclass(frozen=True)
class Dopri5(AdaptiveSolver):
    """Dormand-Prince 5(4) with local extrapolation, a PI controller and an error control of every sample by itself.

    Order 5; six evaluations a step, since the last one is the next step's first, and two to begin. The number of steps
    follows from the tolerances; `steps` plays no part. For an end point of known accuracy; where the number of
    evaluations is what is given, take a multistep solver.

    Args:
        rtol: relative tolerance of a step; ten roundings of the data's type at least.
        atol: absolute tolerance of a step, in units of the data.
        prediction: which part of the flow is solved exactly: "edm", "denoised" or "eps".
        variable: in which steps are taken: "angle", "log_snr", "noise_level" or "time".
        sigma_data: standard deviation of the data, for "edm", "angle" and the tolerances.
        pcoeff, icoeff, dcoeff: gains of the controller, over the order 5; 0, 1, 0 is the elementary one.
        safety: of the expected step.
        min_factor, max_factor: bounds of the change of the step.
        max_steps: attempts of any one sample before giving up.
        final: last-step policy, see `Solver`; "mean" is "none" here.
    """

    both_ways: ClassVar[bool] = True
    order: ClassVar[int] = 5

    rtol: float = 1e-5
    atol: float = 1e-5
    prediction: str = "edm"
    variable: str = "angle"
    sigma_data: float = 0.5
    pcoeff: float = 0.3
    icoeff: float = 0.4
    dcoeff: float = 0.0
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0
    max_steps: int = 1000
    final: str = "none"

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol, self.max_steps)
        check_choice("solver.prediction", self.prediction, PREDICTIONS)
        check_variable(self.variable, self.sigma_data)
        for name in ("pcoeff", "icoeff", "dcoeff"):
            check_number(f"solver.{name}", getattr(self, name), at_least=0)
        check_number("solver.safety", self.safety, above=0, at_most=1)
        check_number("solver.min_factor", self.min_factor, above=0, below=1)
        check_number("solver.max_factor", self.max_factor, above=1)
        self.check_final()

    @property
    def controller(self) -> PID:
        """The controller of the step size."""
        return PID(self.order, self.pcoeff, self.icoeff, self.dcoeff, self.safety, self.min_factor, self.max_factor)

    def stepper(self, sde: SDE, first: float, last: float, like: Tensor) -> Stepper:
        return DormandPrince(self, sde, first, last, like)


class _Field(NamedTuple):
    """dY by d place = on_output m + on_state Y with m the network's answer at x = scale Y and time t; shape (n,)."""

    t: Tensor
    scale: Tensor
    on_output: Tensor
    on_state: Tensor


class DormandPrince:
    """The stepper. Its states are Y and dY by d place there, the step's first stage."""

    evaluations = 6

    def __init__(self, options: Dopri5, sde: SDE, first: float, last: float, like: Tensor) -> None:
        self.options, self.sde = options, sde
        self.clock = Clock(sde, options.variable, options.sigma_data, first, last)
        self.place, self.time = self.clock.place, self.clock.time
        self.start, self.end = self.place(first), self.place(last)
        self.controller = options.controller
        self.rtol, self.atol = rounding(options.rtol, like), rounding(options.atol, like)
        self.output = "denoised" if options.prediction == "denoised" else "eps"

    def scale(self, u: Tensor) -> Tensor:
        """r(u), in which Y = y / r."""
        if self.options.prediction == "edm":
            return torch.sqrt(1 + (u / self.options.sigma_data) ** 2)
        return u if self.options.prediction == "denoised" else torch.ones_like(u)

    def field(self, place: Tensor) -> _Field:
        """The ODE at `place` (n,)."""
        u, t = self.clock.noise_level(place), self.time(place)
        r, rate = self.scale(u), self.clock.rate(place, u)
        on_state = torch.zeros_like(u)
        if self.options.prediction == "edm":
            on_state = -rate * u / (u**2 + self.options.sigma_data**2)
        on_output = -rate / u**2 if self.options.prediction == "denoised" else rate / r
        return _Field(t, self.sde.alpha(t) * r, on_output, on_state)

    def slope(self, process: ReverseProcess, y: Tensor, at: _Field) -> Tensor:
        """dY by d place, one evaluation."""
        scale, on_output, on_state = (expand(c.to(y.dtype), y) for c in at[1:])
        x = scale * y
        answer = process.denoised(x, at.t) if self.output == "denoised" else process.eps(x, at.t)
        slope = on_output * answer
        return slope if self.options.prediction != "edm" else slope.add_(on_state * y)

    def error(self, change: Tensor, y: Tensor, place: Tensor) -> Tensor:
        """(b,): a change of `y` at `place`, over the tolerance, in units of the data."""
        u = self.clock.noise_level(place)
        unit = self.scale(u) / torch.sqrt(1 + (u / self.options.sigma_data) ** 2)
        tolerance = self.rtol * y.abs() + expand((self.atol / unit).to(y.dtype), y)
        return rms(change / tolerance)

    def begin(self, process: ReverseProcess, x: Tensor) -> tuple[States, Tensor]:
        """The first step by Hairer, Norsett and Wanner, II.4: explicit Euler's error, from a small step of it."""
        place = torch.full((len(x),), self.start, dtype=torch.float64, device=x.device)
        at = self.field(place)
        y = x / expand(at.scale.to(x.dtype), x)
        slope = self.slope(process, y, at)
        left = abs(self.end - self.start)
        size, speed = (self.error(value, y, place) for value in (y, slope))
        tiny = (size < 1e-5) | (speed < 1e-5)
        h = torch.where(tiny, 1e-6 * left, 0.01 * size / speed).clamp_max(left)
        sign = 1.0 if self.end > self.start else -1.0
        guess = y + expand((sign * h).to(y.dtype), y) * slope
        bend = self.error(self.slope(process, guess, self.field(place + sign * h)) - slope, y, place) / h
        most = torch.maximum(speed, bend)
        longer = torch.where(
            most <= 1e-15, (1e-3 * h).clamp_min(1e-6 * left), (0.01 / most) ** (1 / self.options.order)
        )
        return (y, slope), coarse(torch.minimum(100 * h, longer))

    def limit(self, place: Tensor, step: Tensor) -> Tensor:
        return step

    def attempt(
        self, process: ReverseProcess, states: States, place: Tensor, step: Tensor, last: Tensor, draw: Draw
    ) -> Trial:
        y, slope = states
        h = expand(step.to(y.dtype), y)
        stages = self.field(torch.cat([place + c * step for c in _C]))
        slopes = [slope]
        for row, at in zip(_A, zip(*(c.view(len(_C), -1) for c in stages), strict=True), strict=True):
            ahead = torch.addcmul(y, h, combine(row, slopes))
            slopes.append(self.slope(process, ahead, _Field(*at)))
        # the tolerance is that of the larger of both ends
        error = self.error(h * combine(_E, slopes), torch.maximum(y.abs(), ahead.abs()), place + step)
        self.slopes = slopes
        return Trial(error, (ahead, slopes[-1]), (y, slope))

    def between(self, states: States, trial: Trial, place: Tensor, step: Tensor, where: float) -> Tensor:
        """The interpolation of order 4 that is as smooth as the solution's derivative."""
        y, ahead = states[0], trial.ahead[0]
        share, h = (expand(c.to(y.dtype), y) for c in ((where - place) / step, step))
        rest = 1 - share
        rise = ahead - y
        bulge = h * self.slopes[0] - rise
        skew = rise - h * self.slopes[-1] - bulge
        inner = skew + rest * h * combine(_D, self.slopes)
        found = y + share * (rise + rest * (bulge + share * inner))
        return self.x((found,), torch.full_like(place, where))

    def x(self, states: States, place: Tensor) -> Tensor:
        return expand(self.field(place).scale.to(states[0].dtype), states[0]) * states[0]


def combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """sum_j weights[j] slopes[j], in the order of j for every entry alike."""
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total.add_(slope, alpha=weight)
    return total
