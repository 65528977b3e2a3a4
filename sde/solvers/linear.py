r"""Solvers that are tables of coefficients, and the one loop body that carries them out.

A solver states the `Stage`s (`sde.solvers.stages`) of every step of a grid in `plan`. They are computed in float64,
once for a grid and a process; `LinearSolver.step` is all that runs beside the network.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sde.errors import UserError, check_flag
from sde.processes import SDE
from sde.randomness import Noise
from sde.reverse import ReverseProcess
from sde.solvers.base import Solver, State
from sde.solvers.captured import CapturedLoop, captured_loop
from sde.solvers.stages import Draw, Stage, Step


def check_order(order: int, most: int, name: str = "order") -> None:
    """Raise `UserError` unless the option `name` is a whole number from 1 to `most`."""
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= most:
        raise UserError(f"solver.{name}={order!r} must be a whole number from 1 to {most}")


@dataclass(frozen=True)
class LinearSolver(Solver):
    """A solver given by its stages.

    Args:
        compile: on a CUDA device, capture a step of the whole loop, network included, as a CUDA graph and replay it:
            what Python takes to launch kernels no longer counts. Worth it where the network is small; the network must
            not need the CPU while it computes, nor be compiled with CUDA graphs of its own.

    Attributes:
        evaluates: what of the denoiser the stages combine: "eps", "denoised" or "score".
    """

    evaluates: ClassVar[str] = "eps"

    compile: bool = field(default=False, kw_only=True)

    @property
    def output(self) -> str:
        """What of the denoiser is evaluated; `evaluates` unless the options decide."""
        return self.evaluates

    @property
    def follows_path(self) -> bool:
        return True

    @abstractmethod
    def plan(self, sde: SDE, times: Sequence[float]) -> Sequence[Step]:
        """The stages of each step of the grid `times`: one entry less than there are times.

        The last stage of a step ends it and has to `keep`.
        """

    def init(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> State:
        check_flag("solver.compile", self.compile)
        if self.compile:
            steps = _planned(self, process.sde, tuple(times))
            return State(plan=self._capture(steps, process, tuple(times), x))
        ready, at, corrects = _readied(self, process.sde, tuple(times))
        return State(plan=(ready, process.evaluations(self.output, at, x), corrects))

    def _capture(
        self, steps: Sequence[Step], process: ReverseProcess, times: tuple[float, ...], x: Tensor
    ) -> CapturedLoop:
        if x.device.type != "cuda":
            raise UserError(f"solver.compile=true captures a CUDA graph and the device is {x.device}: leave it out")
        loop = captured_loop((self, times), steps, self.output, process.denoiser, x, process.label)
        loop.start(x, process.label)
        return loop

    def step(self, process: ReverseProcess, x: Tensor, t: float, s: float, state: State, noise: Noise) -> Tensor:
        if self.compile:
            loop: CapturedLoop = state.plan
            loop.advance(state.index, noise)
            process.nfe += loop.evaluations[state.index]
            return loop.x.clone()
        steps, evaluations, corrects = state.plan
        history, origin = state.history, x
        for base, terms, draws, moves, keep, again, evaluation, mix, depth in steps[state.index]:
            y = x
            if moves:
                y = _combine(state.origin if again else x, base, terms, history)
                if draws:
                    lend = getattr(noise, "lend", noise)  # a draw that is used at once needs no memory of its own
                    for scale, t, s in draws:
                        y.add_(lend(t, s), alpha=scale)
                if keep:
                    if corrects:
                        origin = x
                    x = y
            if evaluation is not None:
                m = evaluations[evaluation](y)
                history.insert(0, torch.add(m, y, alpha=mix) if mix else m)
                del history[depth:]
        if corrects:  # or a state that nobody needs would take a place in the cache
            state.origin = origin
        return x


class _Ready(NamedTuple):
    """A `Stage` with its zeros gone; what is asked of it in every step, in the order in which `step` unpacks it."""

    base: float
    terms: tuple[tuple[int, float], ...]
    draws: tuple[Draw, ...]
    moves: bool
    keep: bool
    again: bool
    evaluation: int | None  # which of the grid's evaluations
    mix: float
    depth: int  # of the history


def _combine(x: Tensor, base: float, terms: Sequence[tuple[int, float]], history: Sequence[Tensor]) -> Tensor:
    """y without its draws, in memory of its own."""
    if base == 1 and terms:
        (j, weight), *terms = terms
        y = torch.add(x, history[j], alpha=weight)
    else:
        y = x * base
    for j, weight in terms:
        y.add_(history[j], alpha=weight)
    return y


@lru_cache(maxsize=256)
def _readied(
    solver: LinearSolver, sde: SDE, times: tuple[float, ...]
) -> tuple[tuple[tuple[_Ready, ...], ...], list[float], bool]:
    """The plan as `step` reads it, the times of the evaluations in it, and whether it has correctors."""
    steps = _planned(solver, sde, times)
    depth = max((len(stage.terms) for step in steps for stage in step), default=0)
    at: list[float] = []

    def ready(stage: Stage) -> _Ready:
        terms = tuple((j, weight) for j, weight in enumerate(stage.terms) if weight != 0)
        place = None if stage.time is None else len(at)
        if stage.time is not None:
            at.append(stage.time)
        return _Ready(
            stage.base, terms, stage.draws, stage.moves, stage.keep, stage.again, place, stage.mix, depth
        )  # fmt: skip

    corrects = any(stage.again for step in steps for stage in step)
    return tuple(tuple(ready(stage) for stage in step) for step in steps), at, corrects


@lru_cache(maxsize=256)
def _planned(solver: LinearSolver, sde: SDE, times: tuple[float, ...]) -> tuple[tuple[Stage, ...], ...]:
    """The plan, once for all batches; without the noise of the last update where that is asked for."""
    steps = [list(step) for step in solver.plan(sde, times)]
    assert len(steps) == len(times) - 1
    assert all(step[-1].keep for step in steps)
    if solver.final == "mean":
        steps[-1][-1] = steps[-1][-1]._replace(draws=())
    return tuple(tuple(step) for step in steps)
