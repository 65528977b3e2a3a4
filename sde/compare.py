"""`python -m sde.compare`: the same samples by several solvers at several budgets, side by side.

Every solver starts from the same noise. A deterministic one solves the probability-flow ODE, so its error is the
root-mean-square distance per value from the end point of that ODE, which a reference solver computes with many steps;
how well that is known is measured too, by solving again with half of them. A stochastic solver has no end point to
miss; its samples and its cost are shown, and no error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde.cli import group_file, run_command
from sde.commands import check_settings, chosen_grid, class_labels, new_folder, open_model
from sde.config import build
from sde.data import DataInfo
from sde.denoiser import AbstractDenoiser
from sde.devices import autocast, pick_device
from sde.errors import UserError, check_choice, check_number
from sde.files import write_json, write_text
from sde.grids import Grid
from sde.pictures import Curve, save_curves, save_panels, save_rows
from sde.progress import progress_bar
from sde.sampling import Plan, count_evaluations, denoised_at_the_end, draw, make_times, times_within
from sde.solvers import Solver

BUDGETS = ("nfe", "steps")
_SHOWN = 16  # pictures in a row
_COLORED = 12  # curves
_GUESS = 100  # evaluations of a solver that chooses its own steps, for the progress bar


def main() -> None:
    """Entry point of the command line."""
    run_command("compare", compare)


@dataclass(frozen=True)
class Trial:
    """One solver at one budget.

    Args:
        name: what the solver was called.
        solver: it, with its last step.
        times: its grid.
        budget: as asked for; None for a solver that chooses its own steps.
        tolerance: that of a solver that does; None for others and for its own.
    """

    name: str
    solver: Solver
    times: tuple[float, ...]
    budget: int | None = None
    tolerance: float | None = None

    @property
    def steps(self) -> int | None:
        """Steps of the grid."""
        return None if self.solver.default_steps is None else len(self.times) - 1

    @property
    def size(self) -> str:
        """The budget in words."""
        if self.steps is not None:
            return f"{self.steps} step{'s' if self.steps != 1 else ''}"
        return "own tolerance" if self.tolerance is None else f"tolerance {self.tolerance:g}"


@dataclass(frozen=True)
class Outcome:
    """What a trial gave: samples x (N, *shape), the largest number of evaluations of a batch, and seconds for all."""

    trial: Trial
    x: Tensor
    nfe: int
    seconds: float


def compare(config: dict[str, Any]) -> None:
    """Draw samples as `config` says and write pictures, tables and curves into a new folder."""
    check_settings(config)
    budgets, tolerances = check_lists(config)
    device = pick_device(config["device"])
    solvers = [named_solver(entry) for entry in config["solvers"]]
    reference = None if config["reference"] is None else named_solver(config["reference"])
    grid = chosen_grid(config)
    run, checkpoint, denoiser, info = open_model(config, device)
    trials = [
        trial
        for name, solver in solvers
        for trial in trials_of(name, solver, denoiser, grid, budgets, config["budget"], tolerances or [None])
    ]
    exact = [] if reference is None else reference_trials(*reference, denoiser, config)
    labels = class_labels(config["label"], config["n"], denoiser, info)
    plan = Plan(solvers[0][1], trials[0].times, info.shape, config["seed"], device)

    folder = new_folder(run, config["out"], f"compare-seed{config['seed']}")
    try:
        with autocast(device, config["precision"]):
            outcomes = run_trials(
                [*exact, *trials], denoiser, plan, config["n"], config["batch_size"], labels, config["denoise"]
            )
        exact_outcomes, outcomes = outcomes[: len(exact)], outcomes[len(exact) :]
        rows = [row_of(outcome, exact_outcomes) for outcome in outcomes]
        about = describe_reference(exact_outcomes)
        write_json(
            folder / "compare.json",
            {key: config[key] for key in ("n", "seed", "label", "denoise", "precision", "ema", "budget")}
            | {"device": str(device), "checkpoint": str(checkpoint.path), "reference": about, "rows": rows},
        )
        table = markdown(rows, about)
        write_text(folder / "compare.md", table)
        draw_pictures(folder, rows, outcomes, exact_outcomes, info)
        print(table)
    finally:
        with contextlib.suppress(OSError):  # not empty unless the first file could not be written
            folder.rmdir()
    for file in sorted(folder.iterdir()):
        print(file)


def check_lists(config: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """The budgets and the tolerances.

    Raises:
        UserError: for a list that is none or is empty, or a number that is no budget or tolerance.
    """
    check_choice("budget", config["budget"], BUDGETS)
    for name, example in (("solvers", "[heun,adams]"), ("steps", "[10,20]"), ("tolerances", "[1e-3]")):
        if not isinstance(config[name], list):
            raise UserError(f"{name}={config[name]!r} is not a list: write {name}={example}")
        if not config[name] and name != "tolerances":
            raise UserError(f"{name}=[] leaves nothing to compare: write {name}={example}")
    for steps in config["steps"]:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise UserError(f"steps={config['steps']} holds {steps!r}: budgets must be whole numbers of at least 1")
    for tolerance in (*config["tolerances"], config["reference_tolerance"]):
        check_number("tolerances", tolerance, above=0, below=1)
    check_number("reference_steps", config["reference_steps"], at_least=2)
    return list(dict.fromkeys(config["steps"])), list(dict.fromkeys(config["tolerances"]))


def named_solver(entry: Any) -> tuple[str, Solver]:
    """(name, solver) for the name of a file in conf/solver, or {name: {option: value, ...}}."""
    options: Any = {}
    if isinstance(entry, Mapping):
        if len(entry) != 1:
            raise UserError(f"solvers holds {dict(entry)!r}: write {{name: {{option: value}}}}, one solver in each")
        entry, options = next(iter(entry.items()))
        if not isinstance(options, Mapping):
            raise UserError(f"the options {options!r} of {entry} are no options: write {{{entry}: {{option: value}}}}")
    solver: Solver = build(group_file("solver", str(entry)) | dict(options), "solver")
    changed = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{entry} {changed}".strip(), solver


def trials_of(
    name: str,
    solver: Solver,
    denoiser: AbstractDenoiser,
    grid: Grid | None,
    budgets: Sequence[int],
    budget: str,
    tolerances: Sequence[float | None],
) -> list[Trial]:
    """A solver at each budget, or at each tolerance where it chooses its own steps.

    Budgets that come to the same number of steps give one trial.
    """
    if solver.default_steps is None:
        times = make_times(solver, denoiser, None, None)
        wanted_tolerances = tolerances if takes_tolerance(solver) else [None]
        return [Trial(name, at_tolerance(solver, value), times, None, value) for value in wanted_tolerances]
    trials: dict[tuple[float, ...], Trial] = {}
    for wanted in budgets:
        try:
            count = times_within if budget == "nfe" else make_times
            times = count(solver, denoiser, grid, wanted)
        except UserError as error:
            raise UserError(f"steps={wanted} for {name}: {error}") from error
        trials.setdefault(times, Trial(name, solver, times, wanted))
    return list(trials.values())


def takes_tolerance(solver: Solver) -> bool:
    """Whether it has tolerances to set."""
    return bool(_tolerances(solver))


def _tolerances(solver: Solver) -> set[str]:
    return {field.name for field in dataclasses.fields(solver)} & {"rtol", "atol"}  # type: ignore[arg-type]


def at_tolerance(solver: Solver, tolerance: float | None) -> Solver:
    """`solver` with this rtol and atol, as far as it has them; its own for None."""
    if tolerance is None:
        return solver
    return dataclasses.replace(solver, **dict.fromkeys(_tolerances(solver), tolerance))  # type: ignore[type-var]


def reference_trials(name: str, solver: Solver, denoiser: AbstractDenoiser, config: Mapping[str, Any]) -> list[Trial]:
    """The reference, and the same with half the steps or ten times the tolerance, which tells how good it is.

    Raises:
        UserError: for a stochastic solver.
    """
    if solver.stochastic:
        raise UserError(f"reference={name} is stochastic and has no end point: take adams, ode, or null for none")
    if solver.default_steps is None:
        tolerance, times = float(config["reference_tolerance"]), make_times(solver, denoiser, None, None)
        return [Trial(name, at_tolerance(solver, t), times, None, t) for t in (tolerance, min(10 * tolerance, 0.5))]
    steps = int(config["reference_steps"])
    return [Trial(name, solver, make_times(solver, denoiser, None, n), n) for n in (steps, steps // 2)]


def run_trials(
    trials: Sequence[Trial],
    denoiser: AbstractDenoiser,
    plan: Plan,
    n: int,
    batch_size: int,
    labels: Tensor | None,
    denoise: bool,
) -> list[Outcome]:
    """All trials, one after the other, from the noise of `plan`."""
    outcomes = []
    costs = [
        _GUESS if trial.steps is None else count_evaluations(trial.solver, denoiser.sde, trial.times)
        for trial in trials
    ]
    with progress_bar(sum(costs), unit="evaluation", bar_format=_BAR) as bar:
        for trial, cost, before in zip(trials, costs, [sum(costs[:i]) for i in range(len(costs))], strict=True):
            bar.set_description(f"{trial.name}, {trial.size}")

            def progress(share: float, before: int = before, cost: int = cost) -> None:
                bar.update(before + share * cost - bar.n)

            solver = denoised_at_the_end(trial.solver, denoiser, trial.times) if denoise else trial.solver
            own = dataclasses.replace(plan, solver=solver, times=trial.times)
            outcomes.append(run_trial(trial, own, denoiser, n, batch_size, labels, progress))
    return outcomes


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} evaluations [{elapsed}<{remaining}]"


def run_trial(
    trial: Trial,
    plan: Plan,
    denoiser: AbstractDenoiser,
    n: int,
    batch_size: int,
    labels: Tensor | None,
    progress: Callable[[float], None] | None = None,
) -> Outcome:
    """Draw `n` samples as `plan` says, timed."""
    if plan.device.type == "cuda":
        torch.cuda.synchronize(plan.device)
    started = time.perf_counter()
    solutions = list(draw(denoiser, plan, n, batch_size, labels, progress))
    x = torch.cat([solution.x for solution in solutions]).cpu()  # waits for the device
    return Outcome(trial, x, max(solution.nfe for solution in solutions), time.perf_counter() - started)


def distance(x: Tensor, y: Tensor) -> float:
    """Root-mean-square distance per value."""
    return float((x.double() - y.double()).square().mean().sqrt())


def row_of(outcome: Outcome, exact: Sequence[Outcome]) -> dict[str, Any]:
    """The row of a table: what was run, what it cost and how far it ended from the reference."""
    trial, n = outcome.trial, len(outcome.x)
    error = None
    if exact and not trial.solver.stochastic:
        error = distance(outcome.x, exact[0].x)
    return {
        "solver": trial.name,
        "options": dataclasses.asdict(trial.solver),  # type: ignore[call-overload]  # solvers are dataclasses
        "budget": trial.budget,
        "steps": trial.steps,
        "tolerance": trial.tolerance,
        "nfe": outcome.nfe,
        "seconds_per_sample": outcome.seconds / n,
        "stochastic": trial.solver.stochastic,
        "error": error,
        "finite": bool(torch.isfinite(outcome.x).all()),
    }


def describe_reference(exact: Sequence[Outcome]) -> dict[str, Any] | None:
    """What the errors are measured from, and how far it is from itself at half the effort."""
    if not exact:
        return None
    full, half = exact
    about = {key: value for key, value in row_of(full, []).items() if key not in ("budget", "error", "stochastic")}
    return about | {"uncertainty": distance(full.x, half.x), "size": full.trial.size}


def markdown(rows: Sequence[Mapping[str, Any]], reference: Mapping[str, Any] | None) -> str:
    """The table of all rows and a sentence about the reference."""
    lines = ["| solver | steps | NFE | ms a sample | error |", "|---|---|---|---|---|"]
    for row in rows:
        steps = row["steps"] or ("its own" if row["tolerance"] is None else f"tolerance {row['tolerance']:g}")
        lines.append(f"| {row['solver']} | {steps} | {row['nfe']} | {milliseconds(row)} | {error_text(row)} |")
    if reference is not None:
        lines += [
            "",
            f"error: root-mean-square distance per value from {reference['solver']} ({reference['size']}, "
            f"{reference['nfe']} evaluations), which moves by {reference['uncertainty']:.1e} when solved with half the "
            "effort.",
        ]
    return "\n".join(lines) + "\n"


def milliseconds(row: Mapping[str, Any]) -> str:
    """The time of one sample, to three digits."""
    value = 1e3 * row["seconds_per_sample"]
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def error_text(row: Mapping[str, Any]) -> str:
    """The error of a row in words."""
    if row["stochastic"]:
        return "stochastic: has no end point"
    return "" if row["error"] is None else f"{row['error']:.1e}"


def caption(row: Mapping[str, Any], size: str) -> str:
    """What stands beside a row's samples."""
    error = "stochastic" if row["stochastic"] else "" if row["error"] is None else f"error {row['error']:.1e}"
    cost = f"{row['nfe']} NFE, {milliseconds(row)} ms a sample"
    return "\n".join(line for line in (f"{row['solver']}, {size}", cost, error) if line)


def draw_pictures(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Outcome],
    exact: Sequence[Outcome],
    info: DataInfo,
) -> None:
    """compare.png for pictures and points in the plane, and error_vs_nfe.png."""
    shown = [(caption(row, o.trial.size), o.x) for row, o in zip(rows, outcomes, strict=True)]
    shown = [(f"reference: {o.trial.name}, {o.trial.size}\n{o.nfe} NFE", o.x) for o in exact[:1]] + shown
    if info.kind == "pixels":
        save_rows(folder / "compare.png", [(text, info.decode(x[:_SHOWN])) for text, x in shown])
    elif info.shape == (2,):
        save_panels(folder / "compare.png", shown, columns=min(4, len(shown)))
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["error"] is not None:
            curves.setdefault(row["solver"], []).append((row["nfe"], row["error"]))
    best = sorted(curves, key=lambda name: min(error for _, error in curves[name]))[:_COLORED]
    lines = [
        Curve(name, [nfe for nfe, _ in sorted(points)], [error for _, error in sorted(points)], name in best)
        for name, points in curves.items()
    ]
    if lines:
        title = "Distance from the end point of the probability-flow ODE"
        floor = "the reference is known to this", distance(exact[0].x, exact[1].x)
        save_curves(folder / "error_vs_nfe.png", lines, title, "root-mean-square error per value", floor)


if __name__ == "__main__":
    main()
