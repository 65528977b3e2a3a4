r"""Metropolis-adjusted Langevin dynamics: p_t is its stationary law whatever the step size (Roberts and Tweedie,
"Exponential convergence of Langevin distributions and their discrete approximations", Bernoulli 2, 1996).

A Langevin step y = x + e s(x) + sqrt(2 e) z, s the score, is a proposal; it is accepted with probability min(1, exp r),

    r = log p(y) - log p(x) + log q(x | y) - log q(y | x),

and x stays where it is otherwise. With d = y - x the two proposal densities are, without loss of digits for small e,

    log q(x | y) - log q(y | x) = -d (s(x) + s(y)) / 2 - e (|s(y)|^2 - |s(x)|^2) / 4.

A network gives no density, but the score is its gradient: along the segment from x to y

    log p(y) - log p(x) = int_0^1 d s(x + a d) da,

here by the Gauss-Lobatto rule of n nodes, two of which, the ends, are evaluated anyway: n - 2 evaluations more for a
rule exact to degree 2 n - 3. n = 2 is the trapezoidal rule, which cancels the first term of the proposals; n = 3 is
Simpson's, exact where log p is a polynomial of degree 4. A learned score is no exact gradient; p is then what the
segments make of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sde.broadcast import expand
from sde.denoiser import Evaluation
from sde.errors import UserError, check_choice, check_number
from sde.randomness import Noise
from sde.reverse import ReverseProcess
from sde.solvers.base import Callback, Solution, register
from sde.solvers.langevin import Move, Stay, check_count, levels

DENSITIES = ("auto", "exact", "line")
LogProb = Callable[[Tensor], Tensor]
"""log p (B,) of states (B, ...), up to a constant of one's own for each sample."""


@dataclass(frozen=True)
class MALASolution(Solution):
    """What `MALA` returns.

    Attributes:
        acceptance: share of the proposals that were accepted at each time of the grid, over the batch, those of the
            warm-up not counted. 0.574 is best in many dimensions; next to 1 steps could be longer, and below 0.2
            samples hardly move.
    """

    acceptance: tuple[float, ...]


@register("mala")
@dataclass(frozen=True)
class MALA(Stay):
    """Annealed Langevin dynamics with every step accepted or rejected, so that p_t is invariant (see the module).

    Samples start at the first time of the grid and stay `warm_up` + `steps_per_level` at each of its times, the last
    included. A level takes 1 evaluation and one for each step, and `nodes` - 2 more for each step without a density; a
    density that is evaluated counts as an evaluation. No order: exact in the limit of many steps at the last level,
    whatever their size, given an exact score. Separate modes keep the shares that earlier levels gave them, as under
    Langevin dynamics: for checking other samplers, and for the last digits of a law. `solve` returns a `MALASolution`
    with the acceptance rates.

    Args:
        steps_per_level: steps at each time.
        step_size: e / sigma(t)^2, D^(-1/3) for D dimensions that are alike, up to a factor of about one.
        warm_up: steps at each time before those, in which each sample adapts its own step size towards
            `target_acceptance` (by 1 / sqrt(k) times what is missing, in the logarithm). Afterwards it stays.
        target_acceptance: 0.574, the best for many dimensions (Roberts and Rosenthal, 1998).
        density: "exact" takes the denoiser's `log_prob`, which exact denoisers have; "line" the line integral of the
            score; "auto" the first where there is one.
        nodes: of the line integral, 2 to 10.
        final: last-step policy, see `Solver`; "mean" is "none" here, since no move without noise can be accepted.
    """

    default_steps: ClassVar[int | None] = 200

    steps_per_level: int = 5
    step_size: float = 0.2
    warm_up: int = 0
    target_acceptance: float = 0.574
    density: str = "auto"
    nodes: int = 3
    final: str = "none"

    def __post_init__(self) -> None:
        check_count("solver.steps_per_level", self.steps_per_level)
        check_number("solver.step_size", self.step_size, above=0)
        check_count("solver.warm_up", self.warm_up, at_least=0)
        check_number("solver.target_acceptance", self.target_acceptance, above=0, below=1)
        check_choice("solver.density", self.density, DENSITIES)
        check_count("solver.nodes", self.nodes, at_least=2)
        check_number("solver.nodes", self.nodes, at_most=10)
        self.check_final()

    def moves(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> Sequence[Sequence[Move]]:
        return self._moves(process, times, x, [])

    def _moves(
        self, process: ReverseProcess, times: Sequence[float], x: Tensor, accepted: list[Tensor]
    ) -> list[list[Move]]:
        """One move for each time, all of its steps, which adds the share it accepted to `accepted`."""
        at, sigmas = levels(process.sde, times)
        scores = process.evaluations("score", at, x)
        target = self.target_acceptance
        stays = [
            metropolis_move(
                process,
                t,
                score,
                self.step_size * sigma * sigma,
                self.steps_per_level,
                warm_up=self.warm_up,
                target=target,
                density=self.density,
                nodes=self.nodes,
                accepted=accepted,
            )
            for t, score, sigma in zip(at, scores, sigmas, strict=True)
        ]
        return [[stay] for stay in stays] + [[] for _ in range(len(times) - len(at))]

    @torch.no_grad()
    def solve(
        self,
        process: ReverseProcess,
        x: Tensor,
        times: Sequence[float],
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> MALASolution:
        """As in `Solver`, with the acceptance rates."""
        accepted: list[Tensor] = []
        walk = _Recorded(self, accepted).solve(process, x, times, noise, callback)
        return MALASolution(walk.x, walk.nfe, walk.times, tuple(torch.stack(accepted).tolist()))


class _Recorded(Stay):
    """A `MALA` that keeps the acceptance rates of one solution."""

    default_steps: ClassVar[int | None] = MALA.default_steps

    def __init__(self, options: MALA, accepted: list[Tensor]) -> None:
        self.options, self.final, self.accepted = options, options.final, accepted

    def moves(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> Sequence[Sequence[Move]]:
        return self.options._moves(process, times, x, self.accepted)


def metropolis_move(
    process: ReverseProcess,
    t: float,
    score: Evaluation,
    size: float,
    steps: int,
    *,
    warm_up: int = 0,
    target: float = 0.574,
    density: str = "auto",
    nodes: int = 3,
    accepted: list[Tensor] | None = None,
) -> Move:
    """`warm_up` + `steps` of Metropolis-adjusted Langevin dynamics at time `t`; see `MALA`.

    Args:
        process: where a density is looked for.
        t: the time.
        score: at that time.
        size: e, of which adapting starts.
        steps: how many are taken after the warm-up.
        warm_up: how many adapt the step sizes.
        target: acceptance they are adapted to.
        density: one of `DENSITIES`.
        nodes: of the line integral.
        accepted: gets the share of proposals accepted after the warm-up, a tensor of shape ().

    Raises:
        UserError: for density="exact" on a denoiser without `log_prob`.
    """
    log_prob = _density(process, t, density)
    rule = lobatto(nodes)

    def move(x: Tensor, noise: Noise) -> Tensor:
        uniforms = _LogUniforms(x, noise)
        e: float | Tensor = size if warm_up == 0 else x.new_full((len(x),), size)
        s, taken = score(x), x.new_zeros(len(x))
        log_p = None if log_prob is None else log_prob(x)
        for k in range(warm_up + steps):
            y, s_y, log_p_y, log_ratio = _propose(x, s, log_p, e, noise, score, log_prob, rule)
            accept = uniforms() < log_ratio  # false for NaN: x stays
            here = expand(accept, x)
            x, s = torch.where(here, y, x), torch.where(here, s_y, s)
            if log_p is not None and log_p_y is not None:
                log_p = torch.where(accept, log_p_y, log_p)
            if k >= warm_up:
                taken += accept
            elif isinstance(e, Tensor):
                chance = log_ratio.clamp(max=0).exp().nan_to_num(0)
                e = e * torch.exp((chance - target) / math.sqrt(k + 1))
        if accepted is not None:
            accepted.append(taken.mean() / steps)
        return x

    return move


def _propose(
    x: Tensor,
    s: Tensor,
    log_p: Tensor | None,
    e: float | Tensor,
    noise: Noise,
    score: Evaluation,
    log_prob: LogProb | None,
    rule: Sequence[tuple[float, float]],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """y, its score, its log density where there is one, and the logarithm r (B,) of the acceptance ratio."""
    wide = expand(e, x) if isinstance(e, Tensor) else e
    if isinstance(wide, Tensor):
        d = torch.addcmul(wide * s, (2 * wide).sqrt(), noise())
    else:
        d = (wide * s).add_(noise(), alpha=math.sqrt(2 * wide))
    y = x + d
    s_y = score(y)
    both = s + s_y
    # everything that is a scalar product with d, or with s(x) + s(y)
    ends = d * -0.5 - 0.25 * wide * (s_y - s)
    if log_prob is not None and log_p is not None:
        log_p_y = log_prob(y)
        return y, s_y, log_p_y, log_p_y - log_p + (both * ends).flatten(1).sum(1)
    along = rule[0][1] * both
    for place, weight in rule[1:-1]:
        along.add_(score(torch.add(x, d, alpha=place)), alpha=weight)
    return y, s_y, None, torch.addcmul(both * ends, along, d).flatten(1).sum(1)


def _density(process: ReverseProcess, t: float, density: str) -> LogProb | None:
    """The denoiser's log p_t, counted; None for the line integral."""
    log_prob = getattr(process.denoiser, "log_prob", None)
    if density == "line" or (density == "auto" and log_prob is None):
        return None
    if log_prob is None:
        raise UserError("solver.density='exact' needs a denoiser with log_prob, which this one has not: use 'line'")

    def counted(x: Tensor) -> Tensor:
        process.nfe += 1
        value: Tensor = log_prob(x, t)
        return value

    return counted


class _LogUniforms:
    """Logarithms of uniform variates (B,), one per call: normals through their distribution function.

    A draw has D normals per sample; they are used up one after the other.
    """

    def __init__(self, x: Tensor, noise: Noise) -> None:
        self.noise, self.d, self.used = noise, x[0].numel(), 0
        self.draw = x

    def __call__(self) -> Tensor:
        k = self.used % self.d
        if k == 0:
            self.draw = torch.special.log_ndtr(self.noise().flatten(1))
        self.used += 1
        return self.draw[:, k]


def lobatto(n: int) -> list[tuple[float, float]]:
    """(node, weight) of the Gauss-Lobatto rule of n nodes on [0, 1]: the ends, and where P_(n-1) is stationary."""
    legendre = np.polynomial.legendre.Legendre.basis(n - 1)
    nodes = np.concatenate([[-1.0], np.sort(legendre.deriv().roots().real), [1.0]])
    weights = 2 / (n * (n - 1) * legendre(nodes) ** 2)
    return [(0.5 * (float(x) + 1), 0.5 * float(w)) for x, w in zip(nodes, weights, strict=True)]
