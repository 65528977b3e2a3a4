r"""UniPC: a predictor and a corrector from one evaluation a step (arXiv 2302.04867).

In lambda = log(alpha / sigma), with h the step and m the denoised D or eps, both update with

    x_s = first-order update - scale B(h) sum_k a_k D_k / r_k,    D_k = m_k - m_0,    r_k = (lambda_k - lambda_t) / h,

scale = alpha_s for D and sigma_s for eps, m_0 the value at t and m_k those of earlier places; the corrector, which does
the step again when m_s is known, has k = s with r = 1 among them. B(h) a solves the paper's order
conditions, whatever B(h): the interpolating polynomial is integrated exactly. With a single k the paper takes a = 1/2
instead, and B(h) = h ("bh1") or exp(h) - 1 ("bh2") matters; for D, -h stands for h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sde.errors import check_choice, check_flag, check_number
from sde.processes import SDE
from sde.solvers.base import register
from sde.solvers.levels import Interpolation, Levels
from sde.solvers.linear import LinearSolver, check_order
from sde.solvers.multistep import counts, newest, predict
from sde.solvers.stages import Stage, Step

VARIANTS = ("bh1", "bh2")
PREDICTIONS = ("denoised", "eps")


@register("unipc")
@dataclass(frozen=True)
class UniPC(LinearSolver):
    """UniPC-p, p = `solver_order`: UniP-p predicts, UniC-p corrects (arXiv 2302.04867).

    Order p + 1, or p without the corrector, which costs no evaluation: what the network says at the predicted place
    serves the correction of the step that led there and the prediction of the next. One evaluation a step. The most
    accurate of the published multistep solvers from some 50 steps on.

    Args:
        solver_order: p, values of the predictor, 1 to 3; 1 without corrector is DDIM. 2 is the choice with guidance,
            and for rough networks in 20 steps and fewer.
        corrector: whether to correct.
        variant: "bh1" or "bh2": see above.
        prediction: what is interpolated: "denoised" or "eps".
        few_steps: with fewer steps than this the last steps have p = 2 and 1 at most (diffusers' lower_order_final); 0
            for never.
        final: last-step policy, see `Solver`.
    """

    both_ways: ClassVar[bool] = True
    default_grid: ClassVar[str] = "focused"
    default_steps: ClassVar[int | None] = 20

    solver_order: int = 3
    corrector: bool = True
    variant: str = "bh2"
    prediction: str = "denoised"
    few_steps: int = 15
    final: str = "none"

    def __post_init__(self) -> None:
        check_order(self.solver_order, 3, "solver_order")
        check_flag("solver.corrector", self.corrector)
        check_choice("solver.variant", self.variant, VARIANTS)
        check_choice("solver.prediction", self.prediction, PREDICTIONS)
        check_number("solver.few_steps", self.few_steps, at_least=0)
        self.check_final()

    @property
    def order(self) -> int:
        return self.solver_order + self.corrector

    @property
    def output(self) -> str:
        return self.prediction

    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        levels = Levels(sde, times)

        def formula(i: int, j: int, nodes: Sequence[int]) -> tuple[float, tuple[float, ...]]:
            return self._update(levels, i, j, nodes)

        values = counts(levels.steps, self.solver_order, self.few_steps)
        steps = predict(levels, formula, values)
        if not self.corrector:
            return steps
        corrected = steps[:1]
        for i in range(1, levels.steps):
            evaluate, arrive = steps[i]
            again = Stage(*formula(i - 1, i, newest(i, values[i - 1] + 1)), keep=True, again=True)
            corrected.append([evaluate, again, arrive])
        return corrected

    def _update(self, levels: Levels, i: int, j: int, nodes: Sequence[int]) -> tuple[float, tuple[float, ...]]:
        """(decay, weights) of the step from i to j with the values at `nodes`, i among them."""
        u, exact = levels.u, Interpolation(self.prediction, "log_snr")
        if len(nodes) != 2 or u[j] == 0:
            return levels.formula(exact, i, j, nodes)
        decay, (gain,) = levels.formula(exact, i, j, [i])
        (other,) = (k for k in nodes if k != i)
        h = math.log(u[i] / u[j])
        r = math.log(u[i] / u[other]) / h
        signed = -h if self.prediction == "denoised" else h
        scale = levels.alpha[j] if self.prediction == "denoised" else levels.sigma[j]
        lean = -0.5 * scale * (signed if self.variant == "bh1" else math.expm1(signed)) / r
        return decay, tuple(lean if k == other else gain - lean for k in nodes)
