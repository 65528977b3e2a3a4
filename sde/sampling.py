"""Drawing samples in batches: what the command lines, previews during training and benchmarks share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sde.broadcast import Time
from sde.brownian import BrownianNoise
from sde.denoiser import AbstractDenoiser
from sde.errors import UserError
from sde.grids import GRIDS, Grid
from sde.processes import SDE
from sde.randomness import BatchNoise, SampleNoise
from sde.reverse import ReverseProcess
from sde.solvers import Callback, Solution, Solver

NOISES = ("independent", "path")
_SHOWN_STEPS = 50  # of a trajectory, for a solver that chooses its own


@dataclass(frozen=True)
class Plan:
    """How samples are drawn.

    Args:
        solver: the way from noise to data.
        times: the time grid.
        shape: of one sample.
        seed: sample k of this seed is the same however samples are split into batches.
        device: where to compute.
        dtype: of the state.
        noise: "independent" draws, or the increments of one Brownian "path" per sample, with which stochastic solvers
            refine one picture the more steps they take.
    """

    solver: Solver
    times: tuple[float, ...]
    shape: tuple[int, ...]
    seed: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    dtype: torch.dtype = torch.float32
    noise: str = "independent"


def make_times(solver: Solver, denoiser: AbstractDenoiser, grid: Grid | None, steps: int | None) -> tuple[float, ...]:
    """The time grid for a solver: the solver's own grid and number of steps where None is given."""
    chosen = grid if grid is not None else GRIDS.get(solver.grid_name)()
    if steps is not None and solver.default_steps is None:
        raise UserError(
            f"steps={steps} means nothing to this solver, which has no use for a grid: set "
            + ("solver.rtol and solver.atol" if hasattr(solver, "rtol") else "solver.steps")
        )
    default = _SHOWN_STEPS if solver.default_steps is None else solver.default_steps
    times = chosen.place(denoiser.sde, steps, default)
    start, noise = times[0], denoiser.sde.noise_level
    if float(noise(start)) < 0.9 * float(noise(denoiser.sde.T)):
        raise UserError(
            f"the time grid starts at t={start:g}, where data is left: samples start from noise, so let the first time "
            f"be T={denoiser.sde.T:g} (noise level {float(noise(denoiser.sde.T)):.4g})"
        )
    return tuple(solver.check_times(denoiser.sde, times))


def denoised_at_the_end(solver: Solver, denoiser: AbstractDenoiser, times: Sequence[float]) -> Solver:
    """`solver` with a last denoising step, unless it has a last step of its own or its grid ends without noise."""
    if solver.final != "none" or float(denoiser.sde.sigma(times[-1])) == 0:
        return solver
    return dataclasses.replace(solver, final="tweedie")  # type: ignore[type-var]  # solvers are dataclasses


@lru_cache(maxsize=4096)
def count_evaluations(solver: Solver, sde: SDE, times: tuple[float, ...]) -> int:
    """How often `solver`, one that does not choose its own steps, asks the denoiser on the grid `times`."""
    x = torch.zeros(1, 1, dtype=torch.float64)
    noise = BatchNoise(x, torch.Generator().manual_seed(0))
    return solver.solve(ReverseProcess(_Free(sde)), x, times, noise).nfe


class _Free(AbstractDenoiser):
    """A denoiser that costs nothing and says nothing."""

    def __init__(self, sde: SDE) -> None:
        super().__init__()
        self.sde = sde

    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


def times_within(solver: Solver, denoiser: AbstractDenoiser, grid: Grid | None, budget: int) -> tuple[float, ...]:
    """The grid of `make_times` with the most steps for which `solver` needs at most `budget` evaluations.

    Evaluations are counted, since not all solvers need the same number in every step.

    Raises:
        UserError: when one step needs more, or the solver chooses its own steps.
    """

    def count(steps: int) -> int:
        return count_evaluations(solver, denoiser.sde, make_times(solver, denoiser, grid, steps))

    steps = budget
    while (needed := count(steps)) > budget:
        if steps == 1:
            raise UserError(
                f"{budget} evaluation{'s are' if budget != 1 else ' is'} not enough for {type(solver).__name__}, whose "
                f"first step takes {needed}: allow {needed} or more"
            )
        steps = max(1, min(steps - 1, steps * budget // needed))
    while steps < budget and count(steps + 1) <= budget:
        steps += 1
    return make_times(solver, denoiser, grid, steps)


def noise_of(plan: Plan, sde: SDE, indices: Sequence[int]) -> SampleNoise | BrownianNoise:
    """Where samples number `indices` get their draws from."""
    where: dict[str, Any] = {"dtype": plan.dtype, "device": plan.device}
    if plan.noise == "independent":
        return SampleNoise(plan.seed, indices, plan.shape, **where)
    return BrownianNoise(plan.seed, indices, plan.shape, lambda t: 0.5 * float(sde.log_snr(t)), **where)


def draw_batch(
    denoiser: AbstractDenoiser,
    plan: Plan,
    indices: Sequence[int],
    label: Tensor | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Samples number `indices` of the plan's seed: a `Solution` with x (B, *shape).

    Args:
        denoiser: on `plan.device`.
        plan: how.
        indices: which samples, (B,).
        label: class labels (B,) or None.
        callback: told of the progress.
    """
    noise = noise_of(plan, denoiser.sde, indices)
    x = noise() * denoiser.sde.prior_std
    return plan.solver.solve(ReverseProcess(denoiser, label), x, plan.times, noise, callback)


def draw(
    denoiser: AbstractDenoiser,
    plan: Plan,
    n: int,
    batch_size: int,
    labels: Tensor | None = None,
    progress: Callable[[float], None] | None = None,
) -> Iterator[Solution]:
    """Samples 0 .. n - 1 in batches of at most `batch_size`.

    Args:
        denoiser: on `plan.device`.
        plan: how.
        n: number of samples.
        batch_size: most samples at once.
        labels: class labels (n,) or None.
        progress: called with the share of all samples' way that is done.

    Yields:
        A `Solution` for each batch, in order.
    """
    for start in range(0, n, batch_size):
        indices = range(start, min(start + batch_size, n))
        label = None if labels is None else labels[start : indices.stop].to(plan.device)

        def report(share: float, _t: float, _x: Tensor | None, start: int = start, size: int = len(indices)) -> None:
            if progress is not None:
                progress((start + share * size) / n)

        yield draw_batch(denoiser, plan, indices, label, report)
