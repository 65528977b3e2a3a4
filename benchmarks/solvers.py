r"""How close the solvers come for a given number of network evaluations.

    python -m benchmarks.solvers                    # every registered solver, and peers that are installed
    python -m benchmarks.solvers --quick            # a minute: fewer samples, fewer budgets, two problems
    python -m benchmarks.solvers --run runs/...     # on a trained model too
    python -m benchmarks.solvers --docs docs/solvers.md     # and write tables and curves there
    python -m benchmarks.solvers --earlier solvers-benchmark/solvers.json --solvers adams    # that one again

Where the score is known exactly (`benchmarks.targets`) all error is the solver's. Solvers run with their defaults and
their own grids, with as many steps as a budget of evaluations allows (`sde.sampling.times_within`), from T to
t_min_sampling, without a denoising step; peers (`benchmarks.peers`) with theirs, those that end in data held against
the denoised end points.

    error   deterministic solvers: sqrt(E |x - x*|^2), x* where the probability-flow ODE leads from the same noise,
            solved to 1e-10 by SciPy's DOP853
    sw1     sliced Wasserstein-1 distance between 20,000 samples and 20,000 draws of the exact law, a mean over 3 seeds
    energy  the energy distance of the same sets

Two sets of exact draws are apart from each other as well: this floor is the first row of a table of the last two kinds.
Adaptive solvers run at several tolerances and have a table of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import math
import multiprocessing
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measures import energy_distance, projections, sliced_wasserstein
from benchmarks.peers import Peer, peers
from benchmarks.report import markdown_table, replace_section
from benchmarks.targets import TARGETS, end_points
from sde.compare import Trial, at_tolerance, distance, reference_trials, row_of, run_trials, takes_tolerance
from sde.denoiser import AbstractDenoiser, GaussianDenoiser
from sde.errors import UserError
from sde.files import write_json
from sde.pictures import Curve, save_curves
from sde.processes import SDES
from sde.progress import progress_bar
from sde.randomness import BatchNoise
from sde.reverse import ReverseProcess
from sde.runs import find_run, open_checkpoint, restore_denoiser
from sde.sampling import Plan, count_evaluations, make_times, times_within
from sde.solvers import SOLVERS, Solver

Row = dict[str, Any]

_FLOORS = 20  # pairs of exact sets
_COLORED = 12
_JUDGED = (8, 100)  # budgets by which solvers are sorted
_DIVERGED = 10.0
LEFT_OUT = {"torchsde": "makes every sample's Brownian path by itself: minutes for 20,000 of them"}


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Args:
        cases: (target, SDE) pairs.
        budgets: evaluations of the deterministic solvers' errors.
        law_budgets: evaluations of the laws' distances, in the plane.
        law_budgets_16: the same in 16 dimensions, where only stochastic solvers are measured so.
        starts: number of end points for each target.
        samples: size of the sets.
        seeds: number of sets.
        tolerances: of the adaptive solvers that are deterministic.
        law_tolerances: and of those that are not.
        adaptive_starts: end points for them, some of which integrate one sample at a time.
    """

    cases: tuple[tuple[str, str], ...] = (
        ("ring", "vp"), ("ring", "ve"), ("sixteen", "vp"), ("sixteen", "edm"), ("sixteen", "rectified_flow"),
    )  # fmt: skip
    budgets: tuple[int, ...] = (5, 8, 10, 15, 20, 35, 50, 100, 1000)
    law_budgets: tuple[int, ...] = (5, 8, 10, 15, 20, 35, 50, 100, 1000)
    law_budgets_16: tuple[int, ...] = (10, 20, 50)
    starts: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"ring": 10_000, "sixteen": 1_000})
    samples: int = 20_000
    seeds: int = 3
    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
    law_tolerances: tuple[float, ...] = (1e-1, 3e-2, 1e-2)
    adaptive_starts: int = 100

    def law_budgets_of(self, target: str, stochastic: bool) -> tuple[int, ...]:
        """The budgets at which laws are measured on `target`."""
        if target == "ring":
            return self.law_budgets
        return self.law_budgets_16 if stochastic else ()


QUICK = Settings(
    cases=(("ring", "vp"), ("sixteen", "rectified_flow")),
    budgets=(5, 10, 20, 50),
    law_budgets=(10, 20, 50),
    law_budgets_16=(),
    starts={"ring": 1_000, "sixteen": 200},
    samples=4_000,
    seeds=1,
    tolerances=(1e-2, 1e-4),
    law_tolerances=(3e-2,),
    adaptive_starts=20,
)


@dataclass(frozen=True)
class Job:
    """One solver or peer on one target and SDE."""

    target: str
    sde: str
    name: str  # of the registry, or of a peer
    settings: Settings


# What runs


def entries(sde: str) -> list[str]:
    """Names of all that run on `sde`: the registry's but for those `LEFT_OUT`, then the peers'."""
    own = [name for name in SOLVERS if name not in LEFT_OUT]
    return [*own, *(peer.name for peer in _peers() if not peer.processes or sde in peer.processes)]


@cache
def _peers() -> list[Peer]:
    return peers()


def _peer(name: str) -> Peer | None:
    return next((peer for peer in _peers() if peer.name == name), None)


def is_stochastic(name: str) -> bool:
    """Whether it draws noise."""
    peer = _peer(name)
    return SOLVERS.get(name)().stochastic if peer is None else peer.stochastic


@torch.no_grad()
def run_once(name: str, denoiser: AbstractDenoiser, x: Tensor, budget: int, seed: int = 0) -> tuple[Tensor, int]:
    """Where `name` leads from `x` at T with at most `budget` evaluations, and how many it used.

    Raises:
        UserError: when the budget is too small.
    """
    peer = _peer(name)
    if peer is not None:
        if peer.steps(budget) < 1:
            raise UserError(f"{budget} evaluations are not enough for {name}")
        torch.manual_seed(seed)
        counted = Counted(denoiser)
        end = peer.draw(counted, x, budget)
        return end, counted.calls
    solver = SOLVERS.get(name)()
    solution = _solve(solver, denoiser, x, times_within(solver, denoiser, None, budget), seed)
    return solution


def _solve(
    solver: Solver, denoiser: AbstractDenoiser, x: Tensor, times: Sequence[float], seed: int
) -> tuple[Tensor, int]:
    noise = BatchNoise(x, torch.Generator().manual_seed(seed))
    solution = solver.solve(ReverseProcess(denoiser), x, times, noise)
    return solution.x, solution.nfe


class Counted(AbstractDenoiser):
    """A denoiser that counts: what a peer needs is measured too."""

    def __init__(self, denoiser: AbstractDenoiser) -> None:
        super().__init__()
        self.sde = denoiser.sde
        self.denoiser = denoiser
        self.calls = 0

    def output(self, name: str, x: Tensor, t: Any, label: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.denoiser.output(name, x, t, label)


# What is measured


def starting_noise(target: str, sde: str, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """x_T (n, D) for end points and laws alike."""
    denoiser = TARGETS[target](SDES.get(sde)())
    d = 2 if target == "ring" else 16
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
    return (denoiser.sde.prior_std * noise).to(dtype)


@cache
def references(target: str, sde: str, n: int) -> tuple[Tensor, Tensor]:
    """End points (n, D) and what is left of them after denoising."""
    denoiser = TARGETS[target](SDES.get(sde)())
    end = end_points(denoiser, starting_noise(target, sde, n, 0, torch.float64))
    return end, denoiser.denoised(end, denoiser.sde.t_min_sampling)


@cache
def exact_law(target: str, sde: str, n: int, seed: int, denoised: bool) -> np.ndarray:
    """Projections of `n` draws of the law at t_min_sampling, or of their denoised values."""
    denoiser = TARGETS[target](SDES.get(sde)())
    generator = torch.Generator().manual_seed(2000 + seed)
    x0 = denoiser.sample(n, generator)  # type: ignore[operator]  # both targets can
    t = torch.tensor(denoiser.sde.t_min_sampling, dtype=torch.float64)
    x = denoiser.sde.perturb(x0, t, torch.randn(x0.shape, generator=generator, dtype=x0.dtype))
    return projections(denoiser.denoised(x, float(t)) if denoised else x)


def work(job: Job) -> list[Row]:
    """All rows of one job; a budget that is too small leaves its row out, any other failure is told in it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    peer, rows = _peer(job.name), []
    base: Row = {"target": job.target, "sde": job.sde, "solver": job.name, "peer": peer is not None}
    base["stochastic"] = is_stochastic(job.name)
    for measure, budgets in measures_of(job):
        for budget in budgets:
            started = time.perf_counter()
            try:
                found = measure(job, budget)
            except UserError:
                continue
            except Exception as error:  # a benchmark goes on and tells what failed
                found = {"failed": f"{type(error).__name__}: {error}"}
            rows.append(base | {"budget": budget} | found | {"seconds": round(time.perf_counter() - started, 3)})
    return rows


def measures_of(job: Job) -> list[tuple[Callable[..., Row], Sequence[float]]]:
    """What to measure of a solver, and at which budgets or tolerances."""
    settings, stochastic = job.settings, is_stochastic(job.name)
    solver = None if _peer(job.name) is not None else SOLVERS.get(job.name)()
    if solver is not None and solver.default_steps is None:
        if not takes_tolerance(solver):
            return [(measure_adaptive, (0.0,))]
        return [(measure_adaptive, settings.law_tolerances if stochastic else settings.tolerances)]
    law: tuple[Callable[..., Row], Sequence[float]] = (measure_law, settings.law_budgets_of(job.target, stochastic))
    return [law] if stochastic else [(measure_error, settings.budgets), law]


def root_mean_square(x: Tensor, y: Tensor) -> float:
    """sqrt(E |x - y|^2), the norm that of a sample."""
    return float((x.double() - y).square().flatten(1).sum(1).mean().sqrt())


def measure_error(job: Job, budget: int) -> Row:
    """The end-point error in float64."""
    n = job.settings.starts[job.target]
    end, data = references(job.target, job.sde, n)
    x = starting_noise(job.target, job.sde, n, 0, torch.float64)
    found, nfe = run_once(job.name, TARGETS[job.target](SDES.get(job.sde)()), x, budget)
    peer = _peer(job.name)
    exact = data if peer is not None and peer.ends_in_data else end
    median = float((found.double() - exact).square().flatten(1).sum(1).sqrt().median())
    return {"nfe": nfe, "error": root_mean_square(found, exact), "median_error": median}


def measure_law(job: Job, budget: int) -> Row:
    """Distances of the samples from the exact law, in float32."""
    settings, peer = job.settings, _peer(job.name)
    denoiser = TARGETS[job.target](SDES.get(job.sde)(), torch.float32)
    found: dict[str, list[float]] = {"sw1": [], "energy": []}
    nfe = 0
    for seed in range(settings.seeds):
        x = starting_noise(job.target, job.sde, settings.samples, seed, torch.float32)
        end, nfe = run_once(job.name, denoiser, x, budget, seed)
        exact = exact_law(job.target, job.sde, settings.samples, seed, peer is not None and peer.ends_in_data)
        for key, value in distances(end, exact).items():
            found[key].append(value)
    return {"nfe": nfe} | {key: float(np.mean(values)) for key, values in found.items()}


def distances(x: Tensor, exact: np.ndarray) -> dict[str, float]:
    """Both distances of samples `x` (n, D) from a law; infinite where a sample is not finite."""
    if not bool(torch.isfinite(x).all()) or float(x.abs().max()) > 1e6:
        return {"sw1": math.inf, "energy": math.inf}
    found = projections(x)
    return {"sw1": sliced_wasserstein(found, exact), "energy": energy_distance(found, exact, x.shape[1])}


def measure_adaptive(job: Job, tolerance: float) -> Row:
    """What a solver that chooses its own steps makes of a tolerance (0: its own): evaluations, error or distances."""
    solver = at_tolerance(SOLVERS.get(job.name)(), tolerance or None)
    sde, settings = SDES.get(job.sde)(), job.settings
    if solver.stochastic:
        denoiser = TARGETS[job.target](sde, torch.float32)
        x = starting_noise(job.target, job.sde, settings.samples, 0, torch.float32)
        end, nfe = _solve(solver, denoiser, x, make_times(solver, denoiser, None, None), 0)
        exact = exact_law(job.target, job.sde, settings.samples, 0, False)
        return {"tolerance": tolerance, "nfe": nfe} | distances(end, exact)
    denoiser = TARGETS[job.target](sde)
    x = starting_noise(job.target, job.sde, settings.starts[job.target], 0, torch.float64)[: settings.adaptive_starts]
    end, nfe = _solve(solver, denoiser, x, make_times(solver, denoiser, None, None), 0)
    exact_end = references(job.target, job.sde, settings.starts[job.target])[0][: len(x)]
    return {"tolerance": tolerance, "nfe": nfe, "error": root_mean_square(end, exact_end)}


def floors(target: str, sde: str, settings: Settings) -> dict[str, float]:
    """The distances of two exact sets: means, and the sw1 below which 95 % of pairs lie."""
    d = 2 if target == "ring" else 16
    sets = [
        exact_law(target, sde, settings.samples, 10_000 + k, False) for k in range(min(_FLOORS, 7 * settings.seeds))
    ]
    pairs = list(zip(sets, [*sets[1:], sets[0]], strict=True))
    sw1 = [sliced_wasserstein(a, b) for a, b in pairs]
    energy = [energy_distance(a, b, d) for a, b in pairs]
    return {"sw1": float(np.mean(sw1)), "energy": float(np.mean(energy)), "sw1_95": float(np.quantile(sw1, 0.95))}


def measure_all(jobs: Sequence[Job], processes: int) -> list[Row]:
    """All jobs' rows, with a progress bar."""
    rows = []
    with progress_bar(len(jobs), unit="job", desc="solvers") as bar:
        for found in _in_processes(jobs, processes):
            rows += found
            bar.update()
    return rows


def _in_processes(jobs: Sequence[Job], processes: int) -> Iterator[list[Row]]:
    if processes == 1:
        yield from map(work, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(work, jobs)


# Tables and curves


def select(rows: Sequence[Row], target: str, sde: str, key: str) -> dict[str, dict[int, Row]]:
    """Rows of one problem that hold `key`, by solver and budget, adaptive ones left out."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if (row["target"], row["sde"]) == (target, sde) and key in row and "tolerance" not in row:
            found.setdefault(row["solver"], {})[row["budget"]] = row
    return dict(sorted(found.items(), key=lambda item: judged(item[1], key)))


def judged(by_budget: Mapping[int, Row], key: str) -> float:
    """The mean logarithm of the error over the budgets one samples with: what rows are sorted by."""
    values = [row[key] for budget, row in by_budget.items() if _JUDGED[0] <= budget <= _JUDGED[1]]
    if not values or not all(math.isfinite(value) for value in values):
        return math.inf
    return float(np.mean([math.log(max(value, 1e-16)) for value in values]))


def table(found: Mapping[str, Mapping[int, Row]], budgets: Sequence[int], key: str, floor: float | None = None) -> str:
    """Solvers by budgets; the package's own solvers in code letters."""
    rows = []
    if floor is not None:
        rows.append(["*two exact sets*", *([number(floor, key)] * len(budgets))])
    for name, by_budget in found.items():
        peer = next(iter(by_budget.values()))["peer"]
        cells = [number(by_budget[b][key], key) if b in by_budget else "" for b in budgets]
        rows.append([name if peer else f"`{name}`", *cells])
    return markdown_table(["NFE", *(str(b) for b in budgets)], rows)


def number(value: float, key: str) -> str:
    """An error as 1.2e-3, distances times 1000; "div." for what went astray."""
    if not math.isfinite(value) or value > _DIVERGED:
        return "div."
    return f"{value:.1e}" if key == "error" else f"{1e3 * value:.1f}"


def adaptive_table(rows: Sequence[Row], target: str, sde: str) -> str:
    """Tolerance, evaluations and error of the solvers that choose their own steps."""
    cells = [
        [
            f"`{row['solver']}`", f"{row['tolerance']:g}" if row["tolerance"] else "its own", str(row["nfe"]),
            number(row["error"], "error") if "error" in row else "",
            number(row["sw1"], "sw1") if "sw1" in row else "",
        ]
        for row in sorted(rows, key=lambda row: (row["solver"], -row["budget"]))
        if (row["target"], row["sde"]) == (target, sde) and "tolerance" in row and "failed" not in row
    ]  # fmt: skip
    return markdown_table(["solver", "tolerance", "NFE", "error", "sw1 x 1000"], cells) if cells else ""


TITLES = {"ring": "8 modes on a ring", "sixteen": "5 modes in 16 dimensions"}
KEYS = {
    "error": "root-mean-square error of the end point",
    "sw1": "sliced Wasserstein-1 distance",
    "energy": "energy distance",
}


def report(rows: Sequence[Row], settings: Settings, floor: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    """All tables."""
    parts = []
    for target, sde in settings.cases:
        for key, title in KEYS.items():
            found = select(rows, target, sde, key)
            if not found:
                continue
            budgets = sorted({b for by_budget in found.values() for b in by_budget})
            unit = "" if key == "error" else " x 1000"
            lowest = None if key == "error" else floor[target, sde][key]
            parts += [f"#### {TITLES[target]}, {sde}: {title}{unit}", table(found, budgets, key, lowest)]
            if key == "sw1":
                parts.append(f"95 % of pairs of exact sets are within {1e3 * floor[target, sde]['sw1_95']:.1f}.")
        adaptive = adaptive_table(rows, target, sde)
        if adaptive:
            parts += [f"#### {TITLES[target]}, {sde}: solvers that choose their own steps", adaptive]
    failures = sorted({f"{row['solver']}: {row['failed']}" for row in rows if "failed" in row})
    parts += [f"Failed: {failure}." for failure in failures]
    parts += [f"Left out: `{name}`, which {reason}." for name, reason in LEFT_OUT.items() if name in SOLVERS]
    return "\n\n".join(parts)


def draw(
    rows: Sequence[Row], settings: Settings, floor: Mapping[tuple[str, str], Mapping[str, float]], folder: Path
) -> list[Path]:
    """Error and distance against evaluations for each problem: the best dozen in color."""
    files = []
    for target, sde in settings.cases:
        for key in ("error", "sw1"):
            found = select(rows, target, sde, key)
            if not found:
                continue
            name = f"solvers_{key}_{sde}.png" if target == "ring" else f"solvers_{key}_{target}_{sde}.png"
            lowest = None if key == "error" else ("two exact sets", floor[target, sde][key])
            curves = []
            for rank, (solver, by_budget) in enumerate(found.items()):
                points = sorted((row["nfe"], row[key]) for row in by_budget.values())
                x, y = [n for n, _ in points], [min(value, _DIVERGED) for _, value in points]
                curves.append(Curve(solver, x, y, rank < _COLORED, dashed=by_budget[min(by_budget)]["peer"]))
            save_curves(folder / name, curves, f"{TITLES[target]}, {sde}", KEYS[key], lowest)
            files.append(folder / name)
    return files


# What the solvers are


def overview() -> str:
    """A table of the registry, from the classes themselves: what each is, its order, cost, grid and papers."""
    denoiser = GaussianDenoiser(SDES.get("vp")(), torch.zeros(2), torch.tensor(0.25))
    rows = []
    for name, cls in SOLVERS.items():
        solver, doc = cls(), inspect.getdoc(cls) or ""
        module = inspect.getmodule(cls)
        papers = re.findall(r"\d{4}\.\d{4,5}", doc) or re.findall(r"\d{4}\.\d{4,5}", (module and module.__doc__) or "")
        cost = "its own"
        if solver.default_steps is not None:
            few, many = (
                count_evaluations(solver, denoiser.sde, make_times(solver, denoiser, None, n)) for n in (9, 18)
            )
            cost = f"{(many - few) / 9:.3g}"
        links = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in dict.fromkeys(papers))
        kind = "SDE" if solver.stochastic else "ODE"
        first = " ".join(doc.split("\n\n")[0].split()).replace("|", "\\|").replace(" (see the module)", "")
        first = first.rstrip(":.")
        rows.append([f"`{name}`", first, kind, str(solver.order), cost, f"`{solver.grid_name}`", links])
    head = ["solver=", "what it is", "of the", "order", "NFE a step", "grid", "arXiv"]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


# A trained model


def on_model(run: str, budgets: Sequence[int], n: int) -> tuple[str, list[Row]]:
    """The end-point errors of all deterministic solvers on a trained run: a Markdown report and its rows."""
    denoiser, info = restore_denoiser(open_checkpoint(find_run(run), "latest"))
    known = int(getattr(denoiser.network, "num_classes", 0))
    labels = torch.arange(n) % known if known else None
    effort = {"reference_tolerance": 1e-5, "reference_steps": 1000}
    exact = reference_trials("adams", SOLVERS.get("adams")(), denoiser, effort)
    trials = []
    for name, cls in SOLVERS.items():
        solver = cls()
        if solver.stochastic or solver.default_steps is None:
            continue
        for budget in budgets:
            try:
                trials.append(Trial(name, solver, times_within(solver, denoiser, None, budget), budget))
            except UserError:
                continue
    plan = Plan(trials[0].solver, trials[0].times, info.shape)
    outcomes = run_trials([*exact, *trials], denoiser, plan, n, n, labels, denoise=False)
    rows = [row_of(outcome, outcomes[:2]) | {"peer": False} for outcome in outcomes[2:]]
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row["solver"], {})[row["budget"]] = row
    ordered = dict(sorted(found.items(), key=lambda item: judged(item[1], "error")))
    shape = " x ".join(str(length) for length in info.shape)
    text = (
        f"{n} samples of {shape} values, {type(denoiser.sde).__name__}, {type(denoiser.network).__name__}, float32; "
        f"root-mean-square error per value. The reference, `adams` with 1000 steps, moves by "
        f"{distance(outcomes[0].x, outcomes[1].x):.1e} when solved with 500.\n\n{table(ordered, budgets, 'error')}"
    )
    return text, rows


# Command line


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples, budgets and problems")
    parser.add_argument("--solvers", nargs="+", metavar="NAME", help="only these of the registry and of the peers")
    parser.add_argument(
        "--earlier", metavar="FILE", help="a solvers.json: only what --solvers names is measured again, if anything"
    )
    parser.add_argument("--run", metavar="FOLDER", help="also on this trained run (or: latest)")
    parser.add_argument("--only-run", action="store_true", help="nothing but the trained run")
    parser.add_argument("--run-samples", type=int, default=16, help="samples of the trained run")
    parser.add_argument("--samples", type=int, help="size of a set of samples")
    parser.add_argument("--seeds", type=int, help="sets of samples")
    parser.add_argument("--processes", type=int, default=0, help="0 for one for each core, 2 at most")
    parser.add_argument("--out", default="solvers-benchmark", help="folder for solvers.json and the curves")
    parser.add_argument("--docs", metavar="FILE", help="Markdown file to put tables into, curves beside it")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except UserError as error:
        parser.error(str(error))


def run(options: argparse.Namespace) -> None:
    """What the options ask for."""
    settings = QUICK if options.quick else Settings()
    changes = {key: getattr(options, key) for key in ("samples", "seeds") if getattr(options, key) is not None}
    if any(value < 1 for value in (*changes.values(), options.run_samples)):
        raise UserError("samples and seeds must be at least 1")
    settings = dataclasses.replace(settings, **changes)
    docs = None if options.docs is None else Path(options.docs)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    if options.run is not None:
        budgets = [b for b in settings.budgets if b <= 100]
        text, result["model"] = on_model(options.run, budgets, options.run_samples)
        print(text, end="\n\n", flush=True)
        if docs is not None:
            replace_section(docs, "solvers on a trained model", text)
    if not options.only_run:
        result |= on_targets(settings, options, folder if docs is None else docs.parent, docs)
    write_json(folder / "solvers.json", result)


def on_targets(settings: Settings, options: argparse.Namespace, pictures: Path, docs: Path | None) -> dict[str, Any]:
    """All exact problems: prints and draws what was found, and returns it."""
    earlier = [] if options.earlier is None else earlier_rows(Path(options.earlier))
    wanted = options.solvers if options.solvers is not None else [] if earlier else None
    known = {name for _, sde in settings.cases for name in entries(sde)}
    unknown = sorted(set(wanted or []) - known)
    if unknown:
        raise UserError(f"{unknown[0]!r} is neither a solver nor a peer: there are {', '.join(sorted(known))}")
    jobs = [
        Job(target, sde, name, settings)
        for target, sde in settings.cases
        for name in entries(sde)
        if wanted is None or name in wanted
    ]
    processes = options.processes or min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    threads = torch.get_num_threads()
    started = time.perf_counter()
    rows = [row for row in earlier if row["solver"] not in (wanted or [])] + measure_all(jobs, processes)
    torch.set_num_threads(threads)
    floor = {case: floors(*case, settings) for case in settings.cases}
    text = report(rows, settings, floor)
    print(f"{text}\n\n{len(jobs)} jobs in {time.perf_counter() - started:.0f} s, {processes} processes", flush=True)
    for file in draw(rows, settings, floor, pictures):
        print(file)
    if docs is not None:
        replace_section(docs, "solvers", overview())
        replace_section(docs, "solvers on exact scores", text)
    return {
        "settings": dataclasses.asdict(settings),
        "floors": [{"target": target, "sde": sde, **values} for (target, sde), values in floor.items()],
        "rows": rows,
    }


def earlier_rows(path: Path) -> list[Row]:
    """The rows of a solvers.json.

    Raises:
        UserError: when there is none.
    """
    try:
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"earlier={path} is no solvers.json of this benchmark ({error}): leave it out") from error
    return rows


if __name__ == "__main__":
    main()
