r"""The probability-flow ODE by SciPy's adaptive solvers: the reference that other solvers are held against.

Each sample is integrated by itself, with its own steps and its own error control, so a hard sample neither slows nor
changes its neighbors and a sample does not depend on its batch. The integrators run side by side, one thread each;
whenever all of them wait for a right-hand side, the requests - each at its own time - go through the network as one
batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from sde.errors import UserError, check_choice, check_number
from sde.randomness import Noise
from sde.reverse import ReverseProcess
from sde.solvers.base import Callback, Solution, Solver, State, register

METHODS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
_THREADS = 256

Derivative = Callable[[float, np.ndarray], np.ndarray]
Integrate = Callable[[int, Derivative], Any]
Evaluate = Callable[[list[int], np.ndarray, np.ndarray], np.ndarray]


@register("ode")
@dataclass(frozen=True)
class SciPyODE(Solver):
    """dx/dt = f x - g^2/2 score by `scipy.integrate.solve_ivp`, in float64 with the network in the type of the data.

    The number of evaluations follows from the tolerances; `steps` plays no part, and of the grid only the ends do (its
    interior times are where a trajectory is shown). Order: that of the method.

    Args:
        method: one of `METHODS`. The implicit ones estimate Jacobians by finite differences, D + 1 evaluations each.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step, in units of the data.
        per_sample: control each sample's error by itself; off, the batch is one large system as in score_sde, whose
            steps, and therefore samples, depend on the batch.
        final: last-step policy, see `Solver`; "mean" is "none" here.
    """

    both_ways: ClassVar[bool] = True
    order: ClassVar[int] = 5
    default_steps: ClassVar[int | None] = None

    method: str = "RK45"
    rtol: float = 1e-5
    atol: float = 1e-5
    per_sample: bool = True
    final: str = "none"

    def __post_init__(self) -> None:
        check_choice("solver.method", self.method, METHODS)
        check_number("solver.rtol", self.rtol, above=0, below=1)
        check_number("solver.atol", self.atol, above=0)
        self.check_final()

    def init(self, process: ReverseProcess, times: Sequence[float], x: Tensor) -> State:
        return State()

    def step(self, process: ReverseProcess, x: Tensor, t: float, s: float, state: State, noise: Noise) -> Tensor:
        """One interval by itself, to the same tolerances."""
        return self._integrate(process, x, [t, s], None)[-1]

    @torch.no_grad()
    def solve(
        self,
        process: ReverseProcess,
        x: Tensor,
        times: Sequence[float],
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        times = self.check_times(process.sde, times)
        before = process.nfe
        path = self._integrate(process, x, times, callback)
        if callback is not None:
            for i, (t, state) in enumerate(zip(times[1:], path[1:], strict=True)):
                callback((i + 1) / (len(times) - 1), t, state)
        x = path[-1]
        if self.final == "tweedie":
            x = process.denoised(x, times[-1])
        return Solution(x, process.nfe - before, (times[0], times[-1]))

    def _integrate(
        self, process: ReverseProcess, x: Tensor, times: Sequence[float], callback: Callback | None
    ) -> list[Tensor]:
        """The states at `times`, each (B, ...)."""
        if not self.per_sample:
            groups, size = [list(range(x.shape[0]))], x.shape[0]
        else:
            # LSODA keeps its state in Fortran common blocks: only one may run at a time
            size = 1 if self.method == "LSODA" else _THREADS
            indices = list(range(x.shape[0]))
            groups = [indices[i : i + size] for i in range(0, len(indices), size)]
        path = x.new_empty((len(times), *x.shape))
        start, most = process.nfe, 0
        for group in groups:
            process.nfe = start
            rows = torch.tensor(group, device=x.device)
            path[:, rows] = self._solve_group(process.select(rows), process, x[rows], times, callback)
            most = max(most, process.nfe)
        process.nfe = most
        return list(path)

    def _solve_group(
        self,
        part: ReverseProcess,
        counter: ReverseProcess,
        x: Tensor,
        times: Sequence[float],
        callback: Callback | None,
    ) -> Tensor:
        """The states (len(times), B, ...) of samples that are integrated side by side."""

        def evaluate(rows: list[int], t: np.ndarray, y: np.ndarray) -> np.ndarray:
            where = torch.tensor(rows, device=x.device)
            states = torch.from_numpy(y).to(x.device, x.dtype).reshape(-1, *x.shape[1:])
            at = torch.from_numpy(t).to(x.device) if len(set(t.tolist())) > 1 else float(t[0])
            derivative = part.select(where).drift(states, at)
            counter.nfe += 1
            if callback is not None:
                callback((times[0] - float(t.max())) / (times[0] - times[-1]), float(t.max()), None)
            return derivative.reshape(len(rows), -1).double().cpu().numpy()

        def integrate(start: np.ndarray, derivative: Derivative) -> np.ndarray:
            solution = solve_ivp(
                derivative,
                (times[0], times[-1]),
                start,
                method=self.method,
                t_eval=times,
                rtol=self.rtol,
                atol=self.atol,
            )
            if not solution.success:
                raise UserError(
                    f"SciPy's {self.method} stopped at t={solution.t[-1] if len(solution.t) else times[0]:g}: "
                    f"{solution.message.rstrip('.')}; loosen solver.rtol={self.rtol:g} or take another solver.method"
                )
            return solution.y.T

        flat = x.flatten(1).double().cpu().numpy()
        if self.per_sample:
            paths = run_together(len(flat), lambda i, derivative: integrate(flat[i], derivative), evaluate)
            joined = np.stack(paths, axis=1)
        else:
            rows = list(range(len(flat)))

            def joint(t: float, y: np.ndarray) -> np.ndarray:
                return evaluate(rows, np.full(len(rows), t), y.reshape(len(rows), -1)).reshape(-1)

            joined = integrate(flat.reshape(-1), joint).reshape(len(times), *flat.shape)
        return torch.from_numpy(joined).to(x.device, x.dtype).reshape(len(times), *x.shape)


def run_together(n: int, integrate: Integrate, evaluate: Evaluate) -> list[Any]:
    """Run `n` integrators in threads and answer their requests in batches.

    Args:
        n: number of integrators.
        integrate: called as `integrate(i, derivative)` in thread i; its result is returned. `derivative(t, y)` blocks
            until the batch with this request has been evaluated.
        evaluate: called in the calling thread as `evaluate(rows, t, y)` with the numbers of the integrators that wait
            (ascending), their times (b,) and states (b, D); gives the derivatives (b, D).

    Returns:
        What each integrator returned. An error in any of them, or in `evaluate`, is raised here after all have ended.
    """
    requests: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
    answers: list[queue.SimpleQueue[np.ndarray | None]] = [queue.SimpleQueue() for _ in range(n)]

    def work(i: int) -> None:
        def derivative(t: float, y: np.ndarray) -> np.ndarray:
            requests.put((i, "ask", (t, y)))
            answer = answers[i].get()
            if answer is None:
                raise _Abandoned
            return answer

        try:
            requests.put((i, "done", integrate(i, derivative)))
        except BaseException as error:
            requests.put((i, "failed", error))

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(n)]
    for thread in threads:
        thread.start()
    results: list[Any] = [None] * n
    active, failure = n, None
    while active:
        waiting: dict[int, tuple[float, np.ndarray]] = {}
        while len(waiting) < active:
            i, kind, value = requests.get()
            if kind == "ask":
                waiting[i] = value
                continue
            active -= 1
            if kind == "done":
                results[i] = value
            elif failure is None and not isinstance(value, _Abandoned):
                failure = value
        rows = sorted(waiting)
        derivatives: Sequence[np.ndarray | None] = [None] * len(rows)
        if rows and failure is None:
            try:
                derivatives = list(
                    evaluate(rows, np.array([waiting[i][0] for i in rows]), np.stack([waiting[i][1] for i in rows]))
                )
            except BaseException as error:
                failure = error
        for i, answer in zip(rows, derivatives, strict=True):
            answers[i].put(None if failure is not None else answer)
    for thread in threads:
        thread.join()
    if failure is not None:
        raise failure
    return results


class _Abandoned(Exception):
    """Ends an integrator after another one, or the network, has failed."""
