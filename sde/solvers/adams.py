"""Adams' predictor-corrector formulas on the probability-flow ODE, with the linear part of Gaussian data solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sde.errors import UserError, check_choice, check_flag
from sde.processes import SDE
from sde.solvers.base import register
from sde.solvers.levels import PREDICTIONS, VARIABLES, Interpolation, Levels
from sde.solvers.linear import LinearSolver, Stage, Step, arrive, evaluate_at


@register("adams")
@dataclass(frozen=True)
class Adams(LinearSolver):
    """Adams-Bashforth prediction, Adams-Moulton correction from the same evaluation, on any grid.

    What the network says is replaced by the polynomial through its last `order` values and integrated exactly
    (`sde.solvers.levels`). When the value at the predicted place is known, the step that led there is done again with
    it, at no further evaluation (PEC mode): order `order` with and without it, with a much smaller error. The defaults
    interpolate EDM's F over the angle arctan(sigma / (alpha sigma_data)), which leaves nothing to approximate but how
    the data differ from a Gaussian.

    Order `order`; one evaluation a step. The fewest evaluations for a given accuracy of all solvers here: take it
    unless you need noise.

    Args:
        order: values that are interpolated, 1 to 6; 4 and more pay from some 15 steps on.
        corrector: whether to correct.
        prediction: what is interpolated: "edm", "denoised" or "eps".
        variable: over what: "angle", "log_snr", "noise_level" or "time".
        sigma_data: standard deviation of the data, for "edm" and "angle".
        final: last-step policy, see `Solver`.
    """

    default_grid: ClassVar[str] = "logsnr"
    default_steps: ClassVar[int | None] = 20

    order: int = 3
    corrector: bool = True
    prediction: str = "edm"
    variable: str = "angle"
    sigma_data: float = 0.5
    final: str = "none"

    def __post_init__(self) -> None:
        check_order(self.order, 6)
        check_flag("solver.corrector", self.corrector)
        check_choice("solver.prediction", self.prediction, PREDICTIONS)
        check_choice("solver.variable", self.variable, VARIABLES)
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
        return multistep(levels, self.rule, self.order, self.order - 1 if self.corrector else None)


def multistep(levels: Levels, rule: Interpolation, order: int, corrected: int | None = None) -> list[Step]:
    """Steps that predict with the last `order` values, on any grid.

    Args:
        levels: the grid; its first places are used, whatever was added behind them.
        rule: what is interpolated.
        order: values of the predictor.
        corrected: values of the corrector beside the one at the predicted place; None for no corrector.

    Predictor and corrector start with what values there are.
    """
    steps: list[Step] = []
    for i in range(levels.steps):
        step = [evaluate_at(levels.t[i], levels.mix(rule, i))]
        newest = list(range(i, -1, -1))  # places of the values, as the history has them
        if corrected is not None and i > 0:
            corrects = levels.formula(rule, i - 1, i, newest[: corrected + 1])
            step.append(Stage(*corrects, keep=True, again=True))
        step.append(arrive(*levels.formula(rule, i, i + 1, newest[:order])))
        steps.append(step)
    return steps


def check_order(order: int, most: int) -> None:
    """Raise `UserError` unless `order` is a whole number from 1 to `most`."""
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= most:
        raise UserError(f"solver.order={order!r} must be a whole number from 1 to {most}")
