r"""The probability-flow ODE by Dormand and Prince's adaptive method, on the device and for each sample by itself.

`sde.solvers.flow_steps` has the form of the flow that is integrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.broadcast import expand
from sde.processes import SDE
from sde.reverse import ReverseProcess
from sde.solvers.adaptive import PID, AdaptiveSolver, Draw, States, Stepper, Trial
from sde.solvers.base import register
from sde.solvers.flow_steps import Field, FlowStepper, check_flow_options

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
        check_flow_options(self)
        self.check_final()

    @property
    def controller(self) -> PID:
        """The controller of the step size."""
        return PID(self.order, self.pcoeff, self.icoeff, self.dcoeff, self.safety, self.min_factor, self.max_factor)

    def stepper(self, sde: SDE, first: float, last: float, like: Tensor) -> Stepper:
        return DormandPrince(self, sde, first, last, like)


class DormandPrince(FlowStepper):
    """The stepper. Its states are Y and dY by d place there, the step's first stage."""

    evaluations = 6

    def __init__(self, options: Dopri5, sde: SDE, first: float, last: float, like: Tensor) -> None:
        super().__init__(options, sde, first, last, like, options.order)

    def attempt(
        self, process: ReverseProcess, states: States, place: Tensor, step: Tensor, last: Tensor, draw: Draw
    ) -> Trial:
        y, slope = states
        h = expand(step.to(y.dtype), y)
        stages = self.field(torch.cat([place + c * step for c in _C]))
        slopes = [slope]
        for row, at in zip(_A, zip(*(c.view(len(_C), -1) for c in stages), strict=True), strict=True):
            ahead = torch.addcmul(y, h, combine(row, slopes))
            slopes.append(self.slope(process, ahead, Field(*at)))
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


def combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """sum_j weights[j] slopes[j], in the order of j for every entry alike."""
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total.add_(slope, alpha=weight)
    return total
