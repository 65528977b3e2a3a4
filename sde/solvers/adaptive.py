r"""Solvers that choose their own steps: one loop in which every sample has a place, a step and an error of its own.

A method says how to attempt a step (`Stepper`). The loop (`integrate`) attempts one for all samples of the batch
together, each from its own place, accepts or rejects it for each sample by itself, and lets a controller (`PID`) choose
each next step. Samples that have arrived leave the batch. So no sample changes another one's steps, and the number of
evaluations is that of the sample that needs most. All decisions are masks on the device; one transfer of four numbers
per attempt tells the host whether anybody is still on the way.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sde.errors import UserError, check_choice, check_number
from sde.processes import SDE
from sde.randomness import Noise
from sde.reverse import ReverseProcess
from sde.solvers.base import Callback, Solution, Solver, State

VARIABLES = ("angle", "log_snr", "noise_level", "time")  # those of `sde.solvers.levels` that have a closed inverse

States = tuple[Tensor, ...]
"""What a stepper carries for each sample, every tensor (b, ...); the first is the one that is integrated."""

Draw = Callable[[], Tensor]
"""Standard normals (b, ...) for the samples that are on the way."""


class Trial(NamedTuple):
    """An attempted step.

    Attributes:
        error: (b,) over the tolerance; up to 1 is within it.
        ahead: the states behind the step, for samples that take it.
        behind: the states of samples that do not, and of those that have arrived: the first as it was.
    """

    error: Tensor
    ahead: States
    behind: States


class Controller(Protocol):
    """Decides on attempts."""

    def judge(self, error: Tensor, before: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
        """(accept, factor), each (b,): whether to take the step, and what to multiply its length by for the next.

        Args:
            error: of this attempt, over the tolerance, (b,).
            before: error of the last step that was taken; that of this attempt where there is none.
            earlier: and of the one before it.
        """


@dataclass(frozen=True)
class PID:
    """The controller of Gustafsson and Söderlind: factor = safety e_n^(-b1) e_(n-1)^(-b2) e_(n-2)^(-b3).

    b1 = (p + i + d) / k, b2 = -(p + 2 d) / k, b3 = d / k; i = 1 alone is the elementary controller. After a rejection
    it is the elementary one, and the step never grows.

    Args:
        order: k, the power of the step in the error estimate.
        p, i, d: the three gains.
        safety: of the expected step.
        least, most: bounds of the factor.
    """

    order: float
    p: float = 0.0
    i: float = 1.0
    d: float = 0.0
    safety: float = 0.9
    least: float = 0.2
    most: float = 10.0

    def judge(self, error: Tensor, before: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
        accept = error <= 1
        e, e1, e2 = (value.clamp(1e-10, 1e10) for value in (error, before, earlier))
        smooth = e ** (-(self.p + self.i + self.d) / self.order) * e1 ** ((self.p + 2 * self.d) / self.order)
        if self.d:
            smooth = smooth * e2 ** (-self.d / self.order)
        factor = self.safety * torch.where(accept, smooth, e ** (-1 / self.order))
        factor = torch.where(accept, factor.clamp(self.least, self.most), factor.clamp(self.least, 1.0))
        return accept, torch.where(error.isfinite(), factor, self.least)


class Stepper(Protocol):
    """One adaptive method on its way from `start` to `end`, whichever is larger.

    Attributes:
        start, end: the places where the way begins and ends, in the method's own variable.
        evaluations: of an attempt.
    """

    start: float
    end: float
    evaluations: int

    @property
    def controller(self) -> Controller:
        """What decides."""

    def begin(self, process: ReverseProcess, x: Tensor) -> tuple[States, Tensor]:
        """The states of samples `x` (B, ...) at the start, and the lengths (B,) of their first steps."""

    def limit(self, place: Tensor, step: Tensor) -> Tensor:
        """The length (b,) of the step to attempt at `place` (b,), where the controller asks for `step` (b,)."""

    def attempt(
        self, process: ReverseProcess, states: States, place: Tensor, step: Tensor, last: Tensor, draw: Draw
    ) -> Trial:
        """Steps from `place` (b,) float64 by `step` (b,) float64, signed; `last` (b,): whether it ends at the end."""

    def between(self, states: States, trial: Trial, place: Tensor, step: Tensor, where: float) -> Tensor:
        """x (b, ...) at `where`, for samples whose step has passed it; anything for others."""

    def x(self, states: States, place: Tensor) -> Tensor:
        """x (b, ...) at `place` (b,)."""

    def place(self, t: float) -> float:
        """Where time `t` is."""

    def time(self, place: Tensor) -> Tensor:
        """The time at `place`."""


class Clock:
    """The variable in which steps are taken, on the device: places as float64 tensors of any one shape.

    Args:
        sde: the process.
        variable: "angle" arctan(u / sigma_data), "log_snr" -2 log u, "noise_level" u = sigma / alpha, or "time".
        sigma_data: standard deviation of the data, for "angle".
        first, last: the two ends of the way in time.
    """

    def __init__(self, sde: SDE, variable: str, sigma_data: float, first: float, last: float) -> None:
        self.sde, self.variable, self.sigma_data = sde, variable, sigma_data
        self.first, self.last = first, last

    def place(self, t: float) -> float:
        """Where time `t` is."""
        u = float(self.sde.noise_level(t))
        if self.variable == "angle":
            return math.atan(u / self.sigma_data)
        if self.variable == "time":
            return t
        return u if self.variable == "noise_level" else -2 * math.log(u)

    def noise_level(self, place: Tensor) -> Tensor:
        """u at `place`."""
        if self.variable == "angle":
            return self.sigma_data * torch.tan(place)
        if self.variable == "time":
            return self.sde.noise_level(place)
        return place if self.variable == "noise_level" else torch.exp(-0.5 * place)

    def rate(self, place: Tensor, u: Tensor) -> Tensor:
        """du by d place."""
        if self.variable == "angle":
            return (u**2 + self.sigma_data**2) / self.sigma_data
        if self.variable == "time":
            return u * (self.sde.g(place) / self.sde.sigma(place)) ** 2 / 2
        return torch.ones_like(u) if self.variable == "noise_level" else -0.5 * u

    def time(self, place: Tensor) -> Tensor:
        """The time; never outside of the way, which rounding might do."""
        t = place if self.variable == "time" else self.sde.t_of_noise_level(self.noise_level(place))
        return t.clamp(min(self.first, self.last), max(self.first, self.last))


def check_variable(variable: str, sigma_data: float) -> None:
    """Raise `UserError` for arguments that no `Clock` has."""
    check_choice("solver.variable", variable, VARIABLES)
    check_number("solver.sigma_data", sigma_data, above=0)


def check_tolerances(rtol: float, atol: float, max_steps: int) -> None:
    """Raise `UserError` for tolerances, or a number of attempts, that make no sense."""
    check_number("solver.rtol", rtol, at_least=0, below=1)
    check_number("solver.atol", atol, at_least=0)
    if rtol == 0 and atol == 0:
        raise UserError("solver.rtol=0 and solver.atol=0 leave no tolerance: let one of them be above 0")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise UserError(f"solver.max_steps={max_steps!r} must be a whole number, at least 1")


def rounding(tolerance: float, like: Tensor) -> float:
    """`tolerance`, but at least ten roundings in the type of `like`, below which errors do not fall."""
    return max(tolerance, 10 * torch.finfo(like.dtype).eps) if tolerance else 0.0


def rms(x: Tensor) -> Tensor:
    """Root mean square over each sample's entries, (b,) float64."""
    return x.square().flatten(1).mean(1).sqrt().double()


def coarse(step: Tensor) -> Tensor:
    """`step` to eight binary digits: powers are rounded otherwise in another batch, which must not change the step."""
    mantissa, exponent = torch.frexp(step)
    return torch.ldexp(torch.round(256 * mantissa) / 256, exponent)


def choose(mask: Tensor, yes: States, no: States) -> States:
    """Each sample's states from `yes` where `mask` (b,), else from `no`."""
    return tuple(torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(yes, no, strict=True))


class AdaptiveSolver(Solver):
    """A solver that chooses its own steps, for each sample by itself.

    Of the grid only the ends matter; its interior times are where a trajectory is shown. A grid that ends without noise
    (t = 0, where eps has no meaning) is followed down to `t_min`, and the noise that is left there removed by one more
    evaluation.

    Attributes:
        max_steps: attempts of any one sample before giving up.
    """

    default_grid: ClassVar[str] = "logsnr"
    default_steps: ClassVar[int | None] = None

    max_steps: int

    @abstractmethod
    def stepper(self, sde: SDE, first: float, last: float, like: Tensor) -> Stepper:
        """The method on its way from time `first` to `last`, for states like `like` (B, ...)."""

    def init(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> State:
        return State()

    def step(self, process: ReverseProcess, x: Tensor, t: float, s: float, state: State, noise: Noise) -> Tensor:
        """One interval by itself, to the same tolerances."""
        return integrate(self.stepper(process.sde, t, s, x), process, x, [], self.max_steps, noise)[0]

    @torch.no_grad()
    def solve(
        self,
        process: ReverseProcess,
        x: Tensor,
        times: Sequence[float],
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        times = self.check_times(process.sde, times)
        self._check_noise(noise)
        sde, before = process.sde, process.nfe
        noisy = float(sde.sigma(times[-1])) > 0
        last = times[-1] if noisy else min(sde.t_min, 0.5 * times[-2])
        stepper = self.stepper(sde, times[0], last, x)
        x, _ = integrate(stepper, process, x, times[1:-1], self.max_steps, noise, callback)
        if not noisy or self.final == "tweedie":
            x = process.denoised(x, last)
        if callback is not None:
            callback(1.0, times[-1], x)
        return Solution(x, process.nfe - before, (times[0], times[-1]))


def integrate(
    stepper: Stepper,
    process: ReverseProcess,
    x: Tensor,
    shown: Sequence[float],
    max_steps: int,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> tuple[Tensor, Tensor]:
    """Carry `x` (B, ...) from the stepper's start to its end.

    Args:
        stepper: the method, used once.
        process: counts one evaluation for each one of the batch.
        x: states at the start.
        shown: decreasing times at which `callback` is shown the states.
        max_steps: attempts of any one sample.
        noise: of stochastic methods.
        callback: told of the progress.

    Returns:
        The states at the end (B, ...), and how many attempts each sample took, (B,) int64.

    Raises:
        UserError: when a sample needs more than `max_steps` attempts, or meets values that are not finite.
    """
    if not len(x):
        return x.clone(), torch.zeros(0, dtype=torch.int64, device=x.device)
    way = _Way(stepper, process, x, noise)
    frames = _Frames(stepper, x, shown, callback)
    for _ in range(max_steps):
        way.attempt(frames)
        if way.active == 0:
            break
        way.check()
        if way.active <= 0.75 * len(way.rows):  # a batch of another size costs a copy, and compiled networks more
            way.leave()
    else:
        slowest = int((way.place * way.direction).argmin())
        more = f"needs more than solver.max_steps={max_steps} steps: allow more, or loosen solver.rtol and solver.atol"
        way.fail(slowest, more)
    way.put()
    return way.arrived, way.attempts


class _Way:
    """The samples that are on the way."""

    def __init__(self, stepper: Stepper, process: ReverseProcess, x: Tensor, noise: Noise | None) -> None:
        self.stepper, self.process, self.noise = stepper, process, noise
        self.direction = 1.0 if stepper.end > stepper.start else -1.0
        self.rows = torch.arange(len(x), device=x.device)  # numbers of the samples in the batch
        self.part = process
        self.arrived = torch.empty_like(x)
        self.attempts = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.active = len(x)
        self.stuck = -1  # the first sample in the batch that cannot go on
        self.states, self.step = stepper.begin(process, x)
        self.place = torch.full_like(self.step, stepper.start)
        # errors of the last two steps that were taken; NaN for none
        self.errors = self.step.new_full((2, len(x)), math.nan)

    def draw(self) -> Tensor:
        """Each sample's own next normals: the j-th attempt has the j-th draw, whoever else is in the batch."""
        assert self.noise is not None
        draw = self.noise()
        return draw if len(self.rows) == len(draw) else draw[self.rows]

    def attempt(self, frames: _Frames) -> None:
        """One attempt of every sample."""
        stepper, place = self.stepper, self.place
        left = (stepper.end - place).abs()
        active = left > 0
        step = stepper.limit(place, self.step)
        last = step >= left / 1.01  # no last step that is a hundredth of the one before
        step = torch.where(last, left, step) * self.direction
        before = self.part.nfe
        trial = stepper.attempt(self.part, self.states, place, step, last, self.draw)
        if self.part is not self.process:
            self.process.nfe += self.part.nfe - before
        previous = torch.where(self.errors.isnan(), trial.error, self.errors)
        accept, factor = stepper.controller.judge(trial.error, *previous)
        accept = accept & active
        reached = torch.where(accept, torch.where(last, stepper.end, place + step), place)
        self.attempts[self.rows] += active
        self._tell(reached, step, active & ~accept)
        frames.collect(self, trial, step, reached)
        self.states = choose(accept, trial.ahead, trial.behind)
        self.errors = torch.where(accept, torch.stack([trial.error, previous[0]]), self.errors)
        self.step = torch.where(active, step.abs() * coarse(factor), self.step)
        self.place = reached

    def _tell(self, reached: Tensor, step: Tensor, rejected: Tensor) -> None:
        """The one transfer to the host."""
        still = reached != self.stepper.end
        shortest = 16 * torch.finfo(torch.float64).eps * reached.abs()
        stuck = rejected & ~(step.abs() > shortest)  # NaN, from a first answer that is not finite, among them
        ahead = reached * self.direction
        first_stuck = torch.where(stuck.any(), stuck.int().argmax(), -1)
        numbers = torch.stack([still.sum().double(), first_stuck.double(), ahead.min(), ahead.max()]).tolist()
        self.active, self.stuck = int(numbers[0]), int(numbers[1])
        self.slowest, self.fastest = numbers[2], numbers[3]

    def check(self) -> None:
        """Raise `UserError` when a sample cannot go on."""
        if self.stuck >= 0:
            self.fail(
                self.stuck,
                "cannot go on with steps of any length: the network's answers there are not finite, or the states run "
                "away; check the network, or take solver.prediction and solver.variable that suit it",
            )

    def leave(self) -> None:
        """Let those that have arrived leave the batch."""
        self.put()
        keep = torch.nonzero(self.place != self.stepper.end)[:, 0]
        self.rows, self.place, self.step = self.rows[keep], self.place[keep], self.step[keep]
        self.states = tuple(state[keep] for state in self.states)
        self.errors = self.errors[:, keep]
        self.part = self.process.select(self.rows)

    def put(self) -> None:
        """Note where the samples of the batch are."""
        self.arrived[self.rows] = self.stepper.x(self.states, self.place)

    def fail(self, position: int, why: str) -> None:
        """Raise `UserError` that names the sample at `position` in the batch and its time."""
        t = float(self.stepper.time(self.place[position]))
        raise UserError(f"sample {int(self.rows[position])} of the batch at t={t:.4g} {why}")


class _Frames:
    """States at the times of the grid, put together from samples that pass them at different attempts."""

    def __init__(self, stepper: Stepper, x: Tensor, shown: Sequence[float], callback: Callback | None) -> None:
        self.x, self.shown, self.callback = x, shown, callback
        self.places = [stepper.place(t) for t in shown] if callback is not None else []
        self.open: dict[int, Tensor] = {}
        self.next = 0  # the first that is not complete

    def collect(self, way: _Way, trial: Trial, step: Tensor, reached: Tensor) -> None:
        """Fill in what this attempt has passed, and show what is complete."""
        if self.callback is None:
            return
        sign, told = way.direction, False
        for j in range(self.next, len(self.places)):
            place = self.places[j]
            if place * sign > way.fastest:
                break
            passed = (way.place * sign < place * sign) & (reached * sign >= place * sign)
            frame = self.open.setdefault(j, torch.empty_like(self.x))
            here = way.stepper.between(way.states, trial, way.place, step, place)
            frame[way.rows] = choose(passed, (here,), (frame[way.rows],))[0]
            if place * sign <= way.slowest:
                self.next, told = j + 1, True
                self.callback(self._share(j), self.shown[j], self.open.pop(j))
        if not told:
            t = float(way.stepper.time(torch.tensor(way.slowest * sign, dtype=torch.float64)))
            self.callback(self._share(self.next - 1), t, None)

    def _share(self, j: int) -> float:
        return (j + 1) / (len(self.shown) + 1)
