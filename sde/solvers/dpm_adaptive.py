r"""DPM-Solver with adaptive steps: DPM-Solver-12 and DPM-Solver-23, every sample by itself.

With u = sigma / alpha, y = x / alpha and lambda = -log u, the step h of lambda from place s to t of the flow
dy/du = eps is (arXiv 2206.00927, equations 3.7 and algorithms 1, 2)

    order 1   y - (u_s - u_t) eps_s
    order 2   y - (u_s - u_t) (eps_s + (eps_1 - eps_s) / (2 r_1))
    order 3   y - (u_s - u_t) eps_s - (u_t / r_2) ((e^h - 1) / h - 1) (eps_2 - eps_s)

with eps_1 and eps_2 evaluated at lambda_s + r_1 h and lambda_s + r_2 h. Two successive orders share their
evaluations, and their difference is the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.broadcast import expand
from sde.errors import UserError, check_number
from sde.processes import SDE
from sde.reverse import ReverseProcess
from sde.solvers.adaptive import AdaptiveSolver, Clock, Draw, States, Stepper, Trial, check_tolerances, rms
from sde.solvers.base import register


@register("dpm_adaptive")
@dataclass(frozen=True)
class DPMAdaptive(AdaptiveSolver):
    """DPM-Solver-12 or -23 (arXiv 2206.00927, appendix C) with k-diffusion's PID controller and ancestral noise.

    Order `order`; as many evaluations an attempt. It works in y = x / alpha, so that x / alpha is the same on every
    process. eta above 0 makes every step end at less noise than asked, the difference drawn afresh: the error is that
    of the deterministic part and the noise is drawn behind the decision, so rejections do not bias it; the last step
    adds none. The defaults are for pictures in a few dozen evaluations; `dopri5` is better at small tolerances.

    Args:
        order: 2 for DPM-Solver-12, 3 for -23.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step, in units of the data; 0.0078 is one of 256 levels in [-1, 1].
        h_init: length of the first step in lambda = log(alpha / sigma).
        pcoeff, icoeff, dcoeff: gains of the controller, over the order.
        accept_safety: smallest factor of a step's change with which the step is still taken.
        eta: amount of noise; 0 is the flow, 1 the ancestral step.
        s_noise: factor on the noise.
        max_steps: attempts of any one sample before giving up.
        final: last-step policy, see `Solver`; "mean" is "none" here.
    """

    both_ways: ClassVar[bool] = True

    order: int = 3
    rtol: float = 0.05
    atol: float = 0.0078
    h_init: float = 0.05
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    accept_safety: float = 0.81
    eta: float = 0.0
    s_noise: float = 1.0
    max_steps: int = 1000
    final: str = "none"

    def __post_init__(self) -> None:
        if self.order not in (2, 3) or isinstance(self.order, bool):
            raise UserError(f"solver.order={self.order!r} must be 2 or 3")
        check_tolerances(self.rtol, self.atol, self.max_steps)
        check_number("solver.h_init", self.h_init, above=0)
        for name in ("pcoeff", "icoeff", "dcoeff", "eta", "s_noise"):
            check_number(f"solver.{name}", getattr(self, name), at_least=0)
        check_number("solver.accept_safety", self.accept_safety, above=0, below=1)
        self.check_final()

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def stepper(self, sde: SDE, first: float, last: float, like: Tensor) -> Stepper:
        return DPM(self, sde, first, last)


@dataclass(frozen=True)
class SmoothPID:
    """k-diffusion's controller: the change of the step, bent by 1 + arctan(factor - 1), decides by itself.

    Args:
        order: the power of the step in the error estimate.
        p, i, d: the three gains.
        accept_safety: smallest change with which the step is taken.
    """

    order: float
    p: float
    i: float
    d: float
    accept_safety: float

    def judge(self, error: Tensor, before: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
        gains = self.p + self.i + self.d, -(self.p + 2 * self.d), self.d
        factor = torch.ones_like(error)
        for value, gain in zip((error, before, earlier), gains, strict=True):
            if gain:
                factor = factor * (value + 1e-8) ** (-gain / self.order)
        factor = torch.where(error.isfinite(), factor, 0.0)
        factor = 1 + torch.arctan(factor - 1)
        return factor >= self.accept_safety, factor


class DPM:
    """The stepper, in lambda. Its states are y and the lower order's end of the last step."""

    def __init__(self, options: DPMAdaptive, sde: SDE, first: float, last: float) -> None:
        self.options, self.sde = options, sde
        self.clock = Clock(sde, "log_snr", 1.0, first, last)
        self.start, self.end = self.place(first), self.place(last)
        self.evaluations = options.order
        order = 1.5 if options.eta else float(options.order)
        self.controller = SmoothPID(order, options.pcoeff, options.icoeff, options.dcoeff, options.accept_safety)

    def place(self, t: float) -> float:
        return 0.5 * self.clock.place(t)

    def time(self, place: Tensor) -> Tensor:
        return self.clock.time(2 * place)

    def begin(self, process: ReverseProcess, x: Tensor) -> tuple[States, Tensor]:
        start = torch.full((len(x),), self.start, dtype=torch.float64, device=x.device)
        y = x / expand(self._alpha(start).to(x.dtype), x)
        return (y, y), torch.full_like(start, self.options.h_init)

    def limit(self, place: Tensor, step: Tensor) -> Tensor:
        return step

    def attempt(
        self, process: ReverseProcess, states: States, place: Tensor, step: Tensor, last: Tensor, draw: Draw
    ) -> Trial:
        y, before = states
        target = torch.where(last, self.end, place + step)
        down, up = self._down(place, target) if self.options.eta else (target, None)
        low, high = self._orders(process, y, place, down)
        largest = torch.maximum(low.abs(), before.abs())
        error = rms((low - high) / torch.clamp_min(self.options.rtol * largest, self.options.atol))
        if up is not None:
            high = torch.addcmul(high, expand((self.options.s_noise * up).to(y.dtype), y), draw())
        return Trial(error, (high, low), states)

    def _down(self, place: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Where an ancestral step to `target` leads without its noise, and the standard deviation of that in y."""
        source, aim = torch.exp(-place), torch.exp(-target)
        most = self.options.eta * aim * torch.sqrt((1 - (aim / source) ** 2).clamp_min(0))
        rest = torch.sqrt((aim**2 - torch.minimum(aim, most) ** 2).clamp_min(0))
        down = (-torch.log(rest)).clamp_max(self.end)
        return down, torch.sqrt((aim**2 - torch.exp(-2 * down)).clamp_min(0))

    def _orders(self, process: ReverseProcess, y: Tensor, place: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Where steps of the lower and of the full order from `place` to `target` lead, (b, ...)."""
        h = target - place
        at = torch.exp(-place)

        def fall(share: float) -> Tensor:
            """u_s - u at a share of the step."""
            return -at * torch.expm1(-share * h)

        def coefficient(c: Tensor) -> Tensor:
            return expand(c.to(y.dtype), y)

        eps = self._eps(process, y, place)
        whole = fall(1.0)
        first = y - coefficient(whole) * eps
        r1 = 1 / 2 if self.options.order == 2 else 1 / 3
        inner = self._eps(process, y - coefficient(fall(r1)) * eps, place + r1 * h)
        second = first - coefficient(whole / (2 * r1)) * (inner - eps)
        if self.options.order == 2:
            return first, second
        r2 = 2 / 3
        bent = coefficient((r2 / r1) * self._bend(place, r2 * h)) * (inner - eps)
        outer = self._eps(process, y - coefficient(fall(r2)) * eps - bent, place + r2 * h)
        return second, first - coefficient(self._bend(place, h) / r2) * (outer - eps)

    @staticmethod
    def _bend(place: Tensor, h: Tensor) -> Tensor:
        """u (e^h - 1 - h) / h with u at place + h: what the eps that grows linearly by one over the step adds."""
        safe = torch.where(h == 0, 1.0, h)
        return torch.exp(-place - h) * (torch.expm1(safe) / safe - 1)

    def _alpha(self, place: Tensor) -> Tensor:
        return self.sde.alpha(self.time(place))

    def _eps(self, process: ReverseProcess, y: Tensor, place: Tensor) -> Tensor:
        t = self.time(place)
        return process.eps(expand(self.sde.alpha(t).to(y.dtype), y) * y, t)

    def between(self, states: States, trial: Trial, place: Tensor, step: Tensor, where: float) -> Tensor:
        share = torch.expm1(place - where) / torch.expm1(-step)
        y = torch.lerp(states[0], trial.ahead[0], expand(share.to(states[0].dtype), states[0]))
        return self.x((y,), torch.full_like(place, where))

    def x(self, states: States, place: Tensor) -> Tensor:
        return expand(self._alpha(place).to(states[0].dtype), states[0]) * states[0]
