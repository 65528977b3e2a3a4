"""Adams' predictor-corrector formulas on the probability-flow ODE, with the linear part of Gaussian data solved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sde.errors import check_flag, check_number
from sde.processes import SDE
from sde.solvers.base import register
from sde.solvers.levels import Interpolation, Levels
from sde.solvers.linear import LinearSolver, check_order
from sde.solvers.stages import Stage, Step, arrive, evaluate_at


@register("adams")
@dataclass(frozen=True)
class Adams(LinearSolver):
    """Adams-Bashforth prediction, Adams-Moulton correction from the same evaluation, on any grid.

    What the network says is replaced by the polynomial through its last `order` values and integrated exactly
    (`sde.solvers.levels`). When the value at the predicted place is known, the step that led there is done again with
    it, at no further evaluation (PEC mode). The defaults interpolate EDM's F, which leaves nothing to approximate but
    how the data differ from a Gaussian of their standard deviation.

    Order `order`; one evaluation a step. Among the smallest errors of all solvers here with 6 to 80 evaluations: take
    it unless you need noise. For more digits raise `order`, or take `unipc` or `dopri5`. Two guards keep it from
    overshooting: formulas of three and more values are used neither with few steps nor at noise levels above
    10 sigma_data, where networks that predict the noise are rough in time.

    Args:
        order: values that are interpolated, 1 to 6; 4 and more pay from some 50 steps on.
        corrector: whether to correct.
        prediction: what is interpolated: "edm", "denoised" or "eps".
        variable: over what: "focused", "angle", "log_snr", "noise_level" or "time".
        sigma_data: standard deviation of the data, for "edm", "focused" and "angle", and for the second guard.
        few_steps: with fewer steps than this the order is 2 at most, and with fewer than half as many nothing is
            corrected.
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 20

    order: int = 3
    corrector: bool = True
    prediction: str = "edm"
    variable: str = "focused"
    sigma_data: float = 0.5
    few_steps: int = 12
    final: str = "none"

    def __post_init__(self) -> None:
        check_order(self.order, 6)
        check_flag("solver.corrector", self.corrector)
        check_number("solver.few_steps", self.few_steps, at_least=0)
        _ = self.rule
        self.check_final()

    @property
    def rule(self) -> Interpolation:
        """What is interpolated."""
        return Interpolation(self.prediction, self.variable, self.sigma_data)

    @property
    def output(self) -> str:
        return "denoised" if self.prediction == "denoised" else "eps"

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels = Levels(sde, times)
        order = min(self.order, 2) if levels.steps < self.few_steps else self.order
        corrects = self.corrector and 2 * levels.steps >= self.few_steps
        return multistep(levels, self.rule, order, order - 1 if corrects else None, 10 * self.sigma_data)


def multistep(
    levels: Levels, rule: Interpolation, order: int, corrected: int | None = None, rough_above: float = math.inf
) -> list[Step]:
    """Steps that predict with the last `order` values, on any grid.

    Args:
        levels: the grid; its first places are used, whatever was added behind them.
        rule: what is interpolated.
        order: values of the predictor.
        corrected: values of the corrector beside the one at the predicted place; None for no corrector.
        rough_above: noise level above which at most two values are used.

    Predictor and corrector start with what values there are.
    """

    def nodes(i: int, most: int) -> list[int]:
        """Places of the values to use when the newest is at i, in the order of the history."""
        count = min(most, i + 1)
        while count > 2 and levels.u[i - count + 1] > rough_above:
            count -= 1
        return list(range(i, i - count, -1))

    steps: list[Step] = []
    for i in range(levels.steps):
        step = [evaluate_at(levels.t[i], levels.mix(rule, i))]
        if corrected is not None and i > 0:
            corrects = levels.formula(rule, i - 1, i, nodes(i, corrected + 1))
            step.append(Stage(*corrects, keep=True, again=True))
        step.append(arrive(*levels.formula(rule, i, i + 1, nodes(i, order))))
        steps.append(step)
    return steps
