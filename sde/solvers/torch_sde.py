r"""The reverse SDE by torchsde (arXiv 2001.01328): another library's solvers on paths of one's own.

torchsde integrates dx = a(x, s) ds + b(s) dW forwards; with s = t_0 - t that is the reverse process of every eta,

    a = -(f x - (1 + eta^2)/2 g^2 score),    b = eta g.

Each sample has a `BrownianInterval` of its own, a random-access Brownian path, seeded by the sample's first draws of
noise: sample k of a seed does not depend on its batch. With other steps it is on another path, since torchsde draws a
path as it is asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sde.errors import UserError, check_choice, check_flag, check_number
from sde.randomness import Noise
from sde.reverse import ReverseProcess
from sde.solvers.base import Callback, Solution, Solver, State, register
from sde.solvers.scipy import run_together

METHODS = ("euler", "milstein", "srk")
_THREADS = 256
_SEED_NUMBERS = 6  # normals that a path's seed is made of: more than 128 bits in float32


@register("torchsde")
@dataclass(frozen=True)
class TorchSDE(Solver):
    """torchsde's solvers for additive noise, in steps of the grid or with its adaptive steps.

    "euler" and "milstein" are one method here, where the noise does not depend on the state: order 1, one evaluation a
    step. "srk" is Rößler's SRA1: order 2 of the law (1.5 of the path), two evaluations a step. An independent
    implementation to hold others against; the loop over the samples' paths takes some 0.1 ms per sample and step.

    With `adaptive` each sample is integrated by itself in float64: a step, and two of half its length, whose difference
    is the error; the grid's first step is tried first, and its times are where a trajectory is shown.

    Args:
        method: "euler", "milstein" or "srk".
        eta: amount of noise; 1 is the reverse SDE, 0 the probability-flow ODE.
        adaptive: let torchsde choose the steps.
        rtol: relative tolerance of an adaptive step.
        atol: absolute tolerance of an adaptive step, in units of the state.
        final: last-step policy, see `Solver`; "mean" is "none" with `adaptive`.
    """

    default_grid: ClassVar[str] = "logsnr"
    default_steps: ClassVar[int | None] = 200

    method: str = "srk"
    eta: float = 1.0
    adaptive: bool = False
    rtol: float = 0.01
    atol: float = 0.001
    final: str = "none"

    def __post_init__(self) -> None:
        check_choice("solver.method", self.method, METHODS)
        check_number("solver.eta", self.eta, at_least=0)
        check_flag("solver.adaptive", self.adaptive)
        check_number("solver.rtol", self.rtol, above=0, below=1)
        check_number("solver.atol", self.atol, above=0)
        self.check_final()

    @property
    def order(self) -> int:
        return 2 if self.method == "srk" else 1

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def init(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> State:
        return State(plan=[(times[0], times[-1])] * (len(times) - 1))

    def step(self, process: ReverseProcess, x: Tensor, t: float, s: float, state: State, noise: Noise) -> Tensor:
        first, last = state.now
        if state.origin is None:
            state.origin = self._paths(x, first - last, noise)
        eta = 0.0 if state.quiet else self.eta
        flow = _Reverse(first, eta, lambda y, time: process.drift(y.view_as(x), time, eta).flatten(1), process)
        ends = torch.tensor([first - t, first - s], dtype=torch.float64)
        # twice the step, so that rounding cannot leave a rest of it
        options = {"bm": state.origin, "method": self.method, "dt": 2 * (t - s)}
        return _library().sdeint(flow, x.flatten(1), ends, **options)[-1].view_as(x)

    @torch.no_grad()
    def solve(
        self,
        process: ReverseProcess,
        x: Tensor,
        times: Sequence[float],
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        _library()
        if not self.adaptive:
            return super().solve(process, x, times, noise, callback)
        times = self.check_times(process.sde, times)
        self._check_noise(noise)
        before, most = process.nfe, 0
        paths = self._paths(x.cpu().double(), times[0] - times[-1], noise)
        shown = x.new_empty((len(times), *x.shape))
        for start in range(0, len(x), _THREADS):
            rows = torch.arange(start, min(start + _THREADS, len(x)), device=x.device)
            part = process.select(rows)
            shown[:, rows] = self._together(part, x[rows], times, paths.part(rows.tolist()), callback)
            most = max(most, part.nfe)
        process.nfe += most
        if callback is not None:
            for i, (t, state) in enumerate(zip(times[1:], shown[1:], strict=True)):
                callback((i + 1) / (len(times) - 1), t, state)
        x = shown[-1]
        if self.final == "tweedie":
            x = process.denoised(x, times[-1])
        return Solution(x, process.nfe - before, (times[0], times[-1]))

    def _together(
        self, process: ReverseProcess, x: Tensor, times: list[float], paths: _Paths, callback: Callback | None
    ) -> Tensor:
        """States (len(times), B, ...) of samples that are integrated side by side, each with steps of its own."""
        start = x.flatten(1).cpu().double()
        at = torch.tensor([times[0] - t for t in times], dtype=torch.float64)

        def evaluate(rows: list[int], t: np.ndarray, y: np.ndarray) -> np.ndarray:
            where = torch.tensor(rows, device=x.device)
            part = process.select(where)
            states = torch.from_numpy(y).to(x.device, x.dtype).reshape(-1, *x.shape[1:])
            drift = part.drift(states, torch.from_numpy(t).to(x.device), self.eta)
            process.nfe += 1
            if callback is not None:
                callback((times[0] - float(t.max())) / (times[0] - times[-1]), float(t.max()), None)
            return drift.reshape(len(rows), -1).double().cpu().numpy()

        def integrate(i: int, derivative: Callable[[float, np.ndarray], np.ndarray]) -> Tensor:
            def drift(y: Tensor, time: float) -> Tensor:
                return torch.from_numpy(derivative(time, y[0].numpy()))[None]

            flow = _Reverse(times[0], self.eta, drift, process)
            options = {"bm": paths.part([i]), "method": self.method, "dt": times[0] - times[1], "adaptive": True}
            try:
                return _library().sdeint(flow, start[i : i + 1], at, **options, rtol=self.rtol, atol=self.atol)
            except AssertionError as error:  # what torchsde has for an error that is not a number
                raise UserError(
                    "torchsde met values that are not finite: the network's answers are not, or the states run away"
                ) from error

        found = run_together(len(x), integrate, evaluate)
        return torch.cat(found, 1).to(x.device, x.dtype).reshape(len(times), *x.shape)

    def _paths(self, x: Tensor, span: float, noise: Noise | None) -> _Paths:
        """The samples' Brownian paths over `span`."""
        library, size = _library(), (1, x[0].numel() if len(x) else 1)
        kind = "space-time" if self.method == "srk" else "none"
        if self.eta == 0 or noise is None:
            return _Paths([], (len(x), size[1]), kind)
        draws = [noise() for _ in range(-(-_SEED_NUMBERS // size[1]))]
        numbers = torch.cat([draw.flatten(1) for draw in draws], 1).cpu().numpy()
        seeds = [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=16).digest()) for row in numbers]
        intervals = [
            library.BrownianInterval(
                t0=0.0,
                t1=span,
                size=size,
                dtype=x.dtype,
                device=x.device,
                entropy=seed,
                levy_area_approximation=kind,
            )
            for seed in seeds
        ]
        return _Paths(intervals, (len(x), size[1]), kind)


class _Reverse:
    """What torchsde asks of an equation."""

    noise_type = "additive"
    sde_type = "ito"

    def __init__(
        self, first: float, eta: float, drift: Callable[[Tensor, float], Tensor], process: ReverseProcess
    ) -> None:
        self.first, self.eta, self.drift, self.sde = first, eta, drift, process.sde
        self._asked: tuple[float, Tensor, Tensor] | None = None

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """a(y, s). torchsde begins with a call that only looks at the shape: its answer is kept for the first step."""
        t = self.first - float(s)
        if self._asked is None or self._asked[0] != t or self._asked[1] is not y:
            self._asked = t, y, -self.drift(y, t)
        return self._asked[2]

    def g_prod(self, s: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """b(s) v."""
        return self.eta * float(self.sde.g(self.first - float(s))) * v


class _Paths:
    """Brownian paths side by side, as torchsde wants one of many rows; none at all for no noise."""

    def __init__(self, intervals: list[Any], shape: tuple[int, int], levy_area_approximation: str) -> None:
        self.intervals, self.shape = intervals, shape
        self.levy_area_approximation = levy_area_approximation

    def part(self, rows: list[int]) -> _Paths:
        """The paths of some samples."""
        chosen = [self.intervals[i] for i in rows] if self.intervals else []
        return _Paths(chosen, (len(rows), self.shape[1]), self.levy_area_approximation)

    def __call__(self, ta: Tensor, tb: Tensor, return_U: bool = False) -> Any:
        """The increments (B, d) from `ta` to `tb`, and their integrals over it if `return_U`."""
        if not self.intervals:
            zero = torch.zeros(self.shape)
            return (zero, zero) if return_U else zero
        found = [interval(ta, tb, return_U=return_U) for interval in self.intervals]
        if return_U:
            return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
        return torch.cat(found)


def _library() -> Any:
    """torchsde.

    Raises:
        UserError: where it is not installed.
    """
    try:
        import torchsde
    except ImportError as error:
        raise UserError("solver=torchsde needs the library of that name: pip install torchsde") from error
    return torchsde
