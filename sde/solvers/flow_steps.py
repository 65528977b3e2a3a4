r"""The probability-flow ODE as adaptive methods of each sample by itself see it.

With u = sigma / alpha and y = x / alpha the flow is dy/du = eps. `sde.solvers.levels` explains the three forms in which
a part of it is solved exactly; the default integrates EDM's, in the angle phi = arctan(u / s) with s = sigma_data:

    Y = y / r,  r = sqrt(1 + (u / s)^2),    dY/dphi = s r (eps - u y / (u^2 + s^2))

whose right-hand side is EDM's F, of order one at all noise levels and zero for Gaussian data of standard deviation s.
An error in Y reaches the data as it is, if they are Gaussian, so that tolerances are in units of the data.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sde.broadcast import expand
from sde.errors import check_choice, check_number
from sde.processes import SDE
from sde.reverse import ReverseProcess
from sde.solvers.adaptive import PID, Clock, States, check_tolerances, check_variable, coarse, rms, rounding
from sde.solvers.levels import PREDICTIONS


class FlowOptions(Protocol):
    """What a solver says about the form of the flow and its tolerances."""

    @property
    def rtol(self) -> float:
        """Relative tolerance of a step."""

    @property
    def atol(self) -> float:
        """Absolute tolerance of a step, in units of the data."""

    @property
    def prediction(self) -> str:
        """Which part of the flow is solved exactly: "edm", "denoised" or "eps"."""

    @property
    def variable(self) -> str:
        """In which steps are taken."""

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data."""

    @property
    def max_steps(self) -> int:
        """Attempts of any one sample before giving up."""

    @property
    def controller(self) -> PID:
        """The controller of the step size."""


def check_flow_options(options: FlowOptions) -> None:
    """Raise `UserError` for options that make no sense."""
    check_tolerances(options.rtol, options.atol, options.max_steps)
    check_choice("solver.prediction", options.prediction, PREDICTIONS)
    check_variable(options.variable, options.sigma_data)
    pid = options.controller
    for name, gain in (("pcoeff", pid.p), ("icoeff", pid.i), ("dcoeff", pid.d)):
        check_number(f"solver.{name}", gain, at_least=0)
    check_number("solver.safety", pid.safety, above=0, at_most=1)
    check_number("solver.min_factor", pid.least, above=0, below=1)
    check_number("solver.max_factor", pid.most, above=1)


class Field(NamedTuple):
    """dY by d place = on_output m + on_state Y with m the network's answer at x = scale Y and time t; shape (n,)."""

    t: Tensor
    scale: Tensor
    on_output: Tensor
    on_state: Tensor


class FlowStepper:
    """What steppers of the flow share: its form, its tolerances, and the length of a first step.

    Args:
        options: of the solver.
        sde: the process.
        first, last: the two ends of the way in time.
        like: a state (B, ...).
        first_order: of the first step that is taken, for its length.
    """

    def __init__(
        self, options: FlowOptions, sde: SDE, first: float, last: float, like: Tensor, first_order: int
    ) -> None:
        self.options, self.sde = options, sde
        self.clock = Clock(sde, options.variable, options.sigma_data, first, last)
        self.place, self.time = self.clock.place, self.clock.time
        self.start, self.end = self.place(first), self.place(last)
        self.controller = options.controller
        self.rtol, self.atol = rounding(options.rtol, like), rounding(options.atol, like)
        self.first_order = first_order
        self.output = "denoised" if options.prediction == "denoised" else "eps"

    def scale(self, u: Tensor) -> Tensor:
        """r(u), in which Y = y / r."""
        if self.options.prediction == "edm":
            return torch.sqrt(1 + (u / self.options.sigma_data) ** 2)
        return u if self.options.prediction == "denoised" else torch.ones_like(u)

    def field(self, place: Tensor) -> Field:
        """The ODE at `place` (n,)."""
        u, t = self.clock.noise_level(place), self.time(place)
        r, rate = self.scale(u), self.clock.rate(place, u)
        on_state = torch.zeros_like(u)
        if self.options.prediction == "edm":
            on_state = -rate * u / (u**2 + self.options.sigma_data**2)
        on_output = -rate / u**2 if self.options.prediction == "denoised" else rate / r
        return Field(t, self.sde.alpha(t) * r, on_output, on_state)

    def slope(self, process: ReverseProcess, y: Tensor, at: Field) -> Tensor:
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
        """Y and its slope at the start, and the first step, at two evaluations.

        The step is that of Hairer, Norsett and Wanner, II.4: explicit Euler's error, from a small step of it. Where the
        flow hardly moves, small is a hundredth of the way, and the first step may be the whole of it.
        """
        place = torch.full((len(x),), self.start, dtype=torch.float64, device=x.device)
        at = self.field(place)
        y = x / expand(at.scale.to(x.dtype), x)
        slope = self.slope(process, y, at)
        left = abs(self.end - self.start)
        size, speed = (self.error(value, y, place) for value in (y, slope))
        tiny = (size < 1e-5) | (speed < 1e-5)
        h = torch.where(tiny, 0.01 * left, 0.01 * size / speed).clamp_max(left)
        sign = 1.0 if self.end > self.start else -1.0
        guess = y + expand((sign * h).to(y.dtype), y) * slope
        bend = self.error(self.slope(process, guess, self.field(place + sign * h)) - slope, y, place) / h
        most = torch.maximum(speed, bend)
        longer = torch.where(most <= 1e-15, left, (0.01 / most) ** (1 / self.first_order))
        return (y, slope), coarse(torch.minimum(100 * h, longer))

    def limit(self, place: Tensor, step: Tensor) -> Tensor:
        return step

    def x(self, states: States, place: Tensor) -> Tensor:
        return expand(self.field(place).scale.to(states[0].dtype), states[0]) * states[0]
