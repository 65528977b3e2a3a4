"""Time per step beyond the network: what solvers cost when the network costs nothing.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --docs docs/solvers.md

The denoiser returns a fixed tensor. Every fixed-step solver of the registry is held against a bare loop of the same
kind: the same arithmetic on tensors in straight-line Python, all scalars computed beforehand, nothing counted, nothing
checked, nothing chosen. For a `LinearSolver` that loop is written out from its table of coefficients, step by step; for
the others it is one of four written by hand (Euler, Heun, DPM-Solver++ 2M, Euler-Maruyama): as many steps of Euler's or
Euler and Maruyama's as they have evaluations. Bare loops draw noise for the whole batch from one generator; ours per
sample (`SampleNoise`), its generators made anew for each run. Schedulers of diffusers run where that is installed.

All take turns within a round, each with a run that is not counted before one that is; times are medians over rounds,
ratios the medians of each round's ratio, so that a machine that gets slower meanwhile does not change them. With one
thread it is the time of that thread on the processor, which does not count what other programs take. A run is a whole
`solve`, divided by its steps; planning, which is done once for a grid and kept, has a column of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import chain
from benchmarks.report import markdown_table, replace_section
from sde.broadcast import Time
from sde.denoiser import AbstractDenoiser, Denoiser, Evaluation
from sde.errors import UserError
from sde.parameterizations import Eps
from sde.processes import SDE, VP
from sde.randomness import SampleNoise
from sde.reverse import ReverseProcess
from sde.sampling import count_evaluations, make_times
from sde.solvers import SOLVERS, Solver
from sde.solvers.linear import LinearSolver
from sde.solvers.stages import Stage

CASES = {"points": (10_000, 2), "pictures": (64, 3, 32, 32)}
SLOW = ("torchsde",)  # makes every sample's Brownian path by itself: milliseconds a sample and step
Run = Callable[[Tensor], object]
Loop = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


class Fixed(AbstractDenoiser):
    """A denoiser that returns the same tensor whatever it is asked."""

    def __init__(self, sde: SDE, answer: Tensor) -> None:
        super().__init__()
        self.sde = sde
        self.answer = answer

    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        return self.answer

    def evaluations(
        self, name: str, times: Sequence[float], like: Tensor, label: Tensor | None = None
    ) -> list[Evaluation]:
        answer = self.answer
        return [lambda x: answer] * len(times)


class FixedNetwork(nn.Module):
    """A network that does the same."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None) -> Tensor:
        return self.answer


# Bare loops


def euler_loop(steps: int) -> Loop:
    """x <- a x + b eps."""

    def loop(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        for a, b in [(0.99, 0.01)] * steps:
            e = f(x)
            x = x * a
            x.add_(e, alpha=b)
        return x

    return loop


def heun_loop(steps: int) -> Loop:
    """x <- a x + b (eps + eps'), with eps' at a x + 2 b eps."""

    def loop(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        for a, b in [(0.99, 0.005)] * steps:
            e = f(x)
            x = x * a
            e2 = f(torch.add(x, e, alpha=2 * b))
            x.add_(e, alpha=b).add_(e2, alpha=b)
        return x

    return loop


def multistep_loop(steps: int) -> Loop:
    """x <- a x + b m + c m', with m' the value of the step before."""

    def loop(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        old = f(x)
        for a, b, c in [(0.99, 0.015, -0.005)] * steps:
            new = f(x)
            x = x * a
            x.add_(new, alpha=b).add_(old, alpha=c)
            old = new
        return x

    return loop


def euler_maruyama_loop(steps: int) -> Loop:
    """x <- a x + b eps + c z."""

    def loop(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        for a, b, c in [(0.99, 0.01, 0.1)] * steps:
            e = f(x)
            x = x * a
            x.add_(e, alpha=b).add_(torch.randn_like(x), alpha=c)
        return x

    return loop


HAND_WRITTEN: dict[str, Callable[[int], Loop]] = {
    "Euler": euler_loop,
    "Heun": heun_loop,
    "DPM++ 2M": multistep_loop,
    "Euler-Maruyama": euler_maruyama_loop,
}


def written_out(solver: LinearSolver, sde: SDE, times: Sequence[float]) -> Loop:
    """A linear solver's steps as one straight Python function, a line for each operation on tensors."""
    steps = solver.plan(sde, times)
    depth = max(len(stage.terms) for step in steps for stage in step)
    corrects = any(stage.again for step in steps for stage in step)
    lines, values = ["def loop(f, x):"], 0
    for step in steps:
        for stage in step:
            combined = _combination(stage, values, depth)
            lines += [f"    {line}" for line in combined]
            if stage.keep and combined:
                lines.append("    before, x = x, y" if corrects else "    x = y")
            if stage.time is not None:
                y, m = "y" if combined else "x", f"m{values % depth}"
                lines.append(f"    {m} = add(f({y}), {y}, alpha={stage.mix!r})" if stage.mix else f"    {m} = f({y})")
                values += 1
        if corrects:
            lines.append("    origin = before")
    names: dict[str, Any] = {"add": torch.add, "randn_like": torch.randn_like}
    exec(compile("\n".join([*lines, "    return x"]), "<written out>", "exec"), names)  # of numbers alone
    loop: Loop = names["loop"]
    return loop


def _combination(stage: Stage, values: int, depth: int) -> list[str]:
    """Lines that make y of one stage, none where it is x itself; the last `depth` of the `values` have names."""
    x = "origin" if stage.again else "x"
    parts = [(f"m{(values - 1 - j) % depth}", weight) for j, weight in enumerate(stage.terms) if weight != 0]
    parts += [("randn_like(x)", draw.scale) for draw in stage.draws]
    if stage.base != 1:
        return [f"y = {x} * {stage.base!r}", *(f"y.add_({name}, alpha={weight!r})" for name, weight in parts)]
    if not parts:
        return [f"y = {x}"] if stage.again else []
    (name, weight), *rest = parts
    return [f"y = add({x}, {name}, alpha={weight!r})", *(f"y.add_({n}, alpha={w!r})" for n, w in rest)]


# What is timed


@dataclass(frozen=True)
class Runner:
    """Something to be timed.

    Args:
        name: in the table.
        run: carries x along all steps.
        bare: the name of the runner it is compared with; empty for a bare loop.
        times: how often a step of that is compared with one of this.
        planning: seconds of what is done once for a grid.
    """

    name: str
    run: Run
    bare: str = ""
    times: float = 1
    planning: float | None = None


def runners(shape: tuple[int, ...], steps: int, names: Sequence[str], with_network: bool) -> list[Runner]:
    """Bare loops, the solvers `names` and diffusers' schedulers on a batch of `shape`."""
    sde, answer = VP(), torch.randn(shape)
    network, label = FixedNetwork(answer), torch.zeros(shape[0])
    fixed = Denoiser(network, sde, Eps()) if with_network else Fixed(sde, answer)

    def f(x: Tensor) -> Tensor:
        return network(x, label, None) if with_network else answer

    def bare(name: str, loop: Loop) -> Runner:
        return Runner(name, lambda x: loop(f, x))

    found = [bare(f"bare {name}", make(steps)) for name, make in HAND_WRITTEN.items()]
    for name in names:
        solver = SOLVERS.get(name)()
        times = make_times(solver, fixed, None, steps)
        times_evaluated = 1.0
        if isinstance(solver, LinearSolver):
            found.append(bare(f"bare {name}", written_out(solver, sde, times)))
            like = f"bare {name}"
        else:
            like = "bare Euler-Maruyama" if solver.stochastic else "bare Euler"
            times_evaluated = count_evaluations(solver, sde, times) / steps
        found.append(ours(name, solver, fixed, times, shape, like, times_evaluated))
    return found + schedulers(f, sde, steps)


def ours(
    name: str,
    solver: Solver,
    denoiser: AbstractDenoiser,
    times: Sequence[float],
    shape: tuple[int, ...],
    like: str,
    often: float,
) -> Runner:
    """A solver of the registry; its noise per sample."""

    def run(x: Tensor) -> object:
        noise = SampleNoise(0, range(shape[0]), shape[1:]) if solver.stochastic else None
        return solver.solve(ReverseProcess(denoiser), x, times, noise)

    started = time.perf_counter()
    solver.init(ReverseProcess(denoiser), times, torch.zeros(shape))
    return Runner(name, run, like, often, time.perf_counter() - started)


def schedulers(f: Callable[[Tensor], Tensor], sde: SDE, steps: int) -> list[Runner]:
    """diffusers' loops, as its pipelines write them."""
    try:
        import diffusers
    except ImportError:
        return []
    diffusers.utils.logging.set_verbosity_error()
    rows: list[tuple[str, str, dict[str, Any], str]] = [
        ("Euler", "EulerDiscreteScheduler", {}, "Euler"),
        ("DDIM", "DDIMScheduler", {"clip_sample": False}, "Euler"),
        ("Heun", "HeunDiscreteScheduler", {}, "Heun"),
        ("DPM++ 2M", "DPMSolverMultistepScheduler", {}, "DPM++ 2M"),
        ("UniPC", "UniPCMultistepScheduler", {}, "DPM++ 2M"),
        ("Euler ancestral", "EulerAncestralDiscreteScheduler", {}, "Euler-Maruyama"),
    ]
    found = []
    for name, cls, options, like in rows:
        scheduler = getattr(diffusers, cls)(trained_betas=chain(sde), prediction_type="epsilon", **options)

        def run(x: Tensor, scheduler: Any = scheduler) -> object:
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                x = scheduler.step(f(scheduler.scale_model_input(x, t)), t, x).prev_sample
            return x

        found.append(Runner(f"diffusers {name}", run, f"bare {like}"))
    return found


@torch.no_grad()
def measure(found: Sequence[Runner], shape: tuple[int, ...], steps: int, rounds: int) -> list[dict[str, Any]]:
    """Rows: microseconds a step, and the ratio to the bare loop, of each runner."""
    x = torch.randn(shape)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {runner.name: [] for runner in found}
    for _ in range(rounds):
        for runner in found:
            runner.run(x)  # brings it back into the caches
            started = clock()
            runner.run(x)
            taken[runner.name].append((clock() - started) / steps * 1e6)
    rows = []
    for runner in found:
        row: dict[str, Any] = {"name": runner.name, "us": statistics.median(taken[runner.name])}
        if runner.bare:
            pairs = zip(taken[runner.name], taken[runner.bare], strict=True)
            ratio = statistics.median(ours / bare for ours, bare in pairs) / runner.times
            row |= {"bare": runner.bare, "times": runner.times, "ratio": ratio}
        rows.append(row | {"planning": runner.planning})
    return rows


def report(results: dict[str, list[dict[str, Any]]], steps: int) -> str:
    """One table: a row for each solver, columns for each case."""
    by_case = {case: {row["name"]: row for row in rows} for case, rows in results.items()}
    names = next(iter(by_case.values()))
    lines = []
    for name, row in names.items():
        own = name in SOLVERS
        if not row.get("bare") and name.removeprefix("bare ") not in HAND_WRITTEN:
            continue  # a loop that was written out: it is in the ratio
        cells = [f"`{name}`" if own else name]
        for rows in by_case.values():
            ratio = rows[name].get("ratio")
            cells += [f"{rows[name]['us']:.1f}", "" if ratio is None else f"{ratio:.2f}"]
        like = (row.get("bare") or "").removeprefix("bare ")
        often = "" if row.get("times", 1) == 1 else f"{row['times']:.3g} x "
        cells += ["its own" if like == name else f"{often}{like}"]
        cells += ["" if row["planning"] is None else f"{1e3 * row['planning'] / steps:.2f}"]
        lines.append(cells)
    head = [""]
    for case in by_case:
        head += [f"{case}, us a step", "x bare"]
    return markdown_table([*head, "bare loop", "planning, ms a step"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--solvers", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--network", action="store_true", help="a Denoiser over a network that costs nothing")
    parser.add_argument("--docs", metavar="FILE", help="Markdown file to put the table into")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    try:
        for name in options.solvers or []:
            SOLVERS.get(name)
        torch.set_num_threads(options.threads)
        names = options.solvers or [n for n, cls in SOLVERS.items() if cls.default_steps is not None and n not in SLOW]
        rounds = 5 if options.quick else options.rounds
        results = {
            case: measure(runners(shape, options.steps, names, options.network), shape, options.steps, rounds)
            for case, shape in CASES.items()
        }
        what = "a Denoiser over a network" if options.network else "a denoiser"
        shapes = ", ".join(f"{case} {' x '.join(map(str, shape))}" for case, shape in CASES.items())
        text = (
            f"{what} that costs nothing; {shapes}, float32; {options.steps} steps, {rounds} rounds, {options.threads} "
            f"thread{'s' if options.threads > 1 else ''}, torch {torch.__version__}\n\n{report(results, options.steps)}"
        )
        print(text)
        if options.docs is not None:
            replace_section(Path(options.docs), "overhead", text)
    except UserError as error:
        parser.error(str(error))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
