r"""Adams' predictor-corrector formulas that choose order and length of their steps, for each sample by itself.

A multistep method gets its order from what the network said at earlier places, so that a step costs one evaluation
where a Runge-Kutta method of the same order takes four to six. On the places p_n > p_(n-1) > ... that a sample has come
through, with slopes f of the flow (`sde.solvers.flow_steps`) there, a step to p = p_n + h

    predicts    Y* = Y_n + h sum_j b_j f_(n-j)                     (Adams-Bashforth)
    evaluates   f* = f(p, Y*)
    corrects    Y  = Y_n + h (c f* + sum_j c_j f_(n-j))            (Adams-Moulton, PEC mode)

with the weights that integrate the polynomial through all slopes used, whatever their distances: a small linear system
for each sample (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, III.5). The difference from the
corrector without its oldest slope estimates the error. A sample starts with short steps of order two and has its full
order as soon as it has the slopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.broadcast import expand
from sde.errors import UserError
from sde.processes import SDE
from sde.reverse import ReverseProcess
from sde.solvers.adaptive import PID, AdaptiveSolver, Draw, States, Stepper, Trial
from sde.solvers.base import register
from sde.solvers.flow_steps import FlowStepper, check_flow_options


@register("adams_adaptive")
@dataclass(frozen=True)
class AdamsAdaptive(AdaptiveSolver):
    """Variable-step Adams-Bashforth-Moulton in PEC mode with an error control of every sample by itself.

    Order `order`; one evaluation an attempted step, and two to begin. The number of steps follows from the tolerances;
    `steps` plays no part. At the same tolerance it takes half to two thirds of the evaluations of `dopri5`, on exact
    scores as on networks; with exact scores it leaves up to about ten times its error, for it takes more steps, each
    within the tolerance. What likelihoods and latent codes are computed with by default. For tolerances below 1e-6
    raise `order`, or take `dopri5`.

    Args:
        rtol: relative tolerance of a step; ten roundings of the data's type at least.
        atol: absolute tolerance of a step, in units of the data.
        order: largest order of a step, 2 to 6: slopes in the corrector.
        prediction: which part of the flow is solved exactly: "edm", "denoised" or "eps".
        variable: in which steps are taken: "angle", "log_snr", "noise_level" or "time".
        sigma_data: standard deviation of the data, for "edm", "angle" and the tolerances.
        pcoeff, icoeff, dcoeff: gains of the controller, over the order; 0, 1, 0 is the elementary one.
        safety: of the expected step.
        min_factor, max_factor: bounds of the change of the step.
        max_steps: attempts of any one sample before giving up.
        final: last-step policy, see `Solver`; "mean" is "none" here.
    """

    both_ways: ClassVar[bool] = True

    rtol: float = 1e-5
    atol: float = 1e-5
    order: int = 5
    prediction: str = "edm"
    variable: str = "angle"
    sigma_data: float = 0.5
    pcoeff: float = 0.2
    icoeff: float = 0.7
    dcoeff: float = 0.0
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 2.0
    max_steps: int = 10_000
    final: str = "none"

    def __post_init__(self) -> None:
        check_flow_options(self)
        if isinstance(self.order, bool) or not isinstance(self.order, int) or not 2 <= self.order <= 6:
            raise UserError(f"solver.order={self.order!r} must be a whole number from 2 to 6")
        self.check_final()

    @property
    def controller(self) -> PID:
        """The controller of the step size."""
        return PID(self.order, self.pcoeff, self.icoeff, self.dcoeff, self.safety, self.min_factor, self.max_factor)

    def stepper(self, sde: SDE, first: float, last: float, like: Tensor) -> Stepper:
        return AdamsStepper(self, sde, first, last, like)


class AdamsStepper(FlowStepper):
    """The stepper. Its states are Y, the number of slopes and their places (b, K), and the slopes, the newest first."""

    evaluations = 1

    def __init__(self, options: AdamsAdaptive, sde: SDE, first: float, last: float, like: Tensor) -> None:
        super().__init__(options, sde, first, last, like, first_order=2)
        self.kept = options.order - 1

    def begin(self, process: ReverseProcess, x: Tensor) -> tuple[States, Tensor]:
        (y, slope), step = super().begin(process, x)
        count = torch.ones(len(x), dtype=torch.int64, device=x.device)
        places = torch.full((len(x), self.kept), self.start, dtype=torch.float64, device=x.device)
        return (y, count, places, slope, *[torch.zeros_like(y)] * (self.kept - 1)), step

    def attempt(
        self, process: ReverseProcess, states: States, place: Tensor, step: Tensor, last: Tensor, draw: Draw
    ) -> Trial:
        y, count, places, *slopes = states
        predict, correct, lower = self.weights(count, (places - place[:, None]) / step[:, None])
        ahead = _advance(y, step, predict[:, : self.kept], slopes)
        newest = self.slope(process, ahead, self.field(place + step))
        slopes = [newest, *slopes]
        ahead = _advance(y, step, correct, slopes)
        change = _advance(torch.zeros_like(y), step, correct - lower, slopes)
        error = self.error(change, torch.maximum(y.abs(), ahead.abs()), place + step)
        self.ends = slopes[1], newest
        places = torch.cat([(place + step)[:, None], places[:, :-1]], 1)
        return Trial(error, (ahead, (count + 1).clamp_max(self.kept), places, *slopes[:-1]), states)

    def weights(self, count: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights over a step of the slopes at `offsets` (b, K), in steps from its start, of which `count` (b,) exist.

        Returns:
            Those of the predictor (b, K + 1), the last of them unused, and of the corrector and of the corrector
            without the oldest slope (b, K + 1), the first of them for the slope at the end of the step.
        """
        one = torch.ones_like(offsets[:, :1])
        nodes = torch.stack([torch.cat([offsets, one], 1), *[torch.cat([one, offsets], 1)] * 2])
        used = torch.stack([count, count + 1, count])
        return tuple(quadrature(nodes.flatten(0, 1), used.flatten()).view_as(nodes).unbind())  # type: ignore[return-value]

    def between(self, states: States, trial: Trial, place: Tensor, step: Tensor, where: float) -> Tensor:
        """Hermite's cubic through both ends and their slopes."""
        y, ahead = states[0], trial.ahead[0]
        share, h = (expand(c.to(y.dtype), y) for c in ((where - place) / step, step))
        rest, rise = 1 - share, ahead - y
        start, end = (h * slope - rise for slope in self.ends)
        found = y + share * rise + share * rest * (rest * start - share * end)
        return self.x((found,), torch.full_like(place, where))


def quadrature(nodes: Tensor, used: Tensor) -> Tensor:
    """Weights (b, n) with which values at the first `used` (b,) of `nodes` (b, n) integrate polynomials over (0, 1).

    Exact for powers below `used`; weights of other nodes are 0.
    """
    n = nodes.shape[1]
    index = torch.arange(n, device=nodes.device)
    inside = index < used[:, None]
    powers = nodes[:, None, :] ** index[:, None]  # (b, power, node)
    both = inside[:, :, None] & inside[:, None, :]
    system = torch.where(both, powers, torch.eye(n, dtype=nodes.dtype, device=nodes.device))
    moments = torch.where(inside, 1 / (index + 1).to(nodes.dtype), 0.0)
    # without the check for singular systems, which would wait for the device
    return torch.linalg.solve_ex(system, moments[..., None])[0][..., 0]


def _advance(y: Tensor, step: Tensor, weights: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    """y + step sum_j weights[:, j] slopes[j]."""
    for factor, slope in zip((step[:, None] * weights).to(y.dtype).unbind(1), slopes, strict=True):
        y = torch.addcmul(y, expand(factor, y), slope)
    return y
