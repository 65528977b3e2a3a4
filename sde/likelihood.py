"""`python -m sde.likelihood`: the log-likelihood of a trained run on its data, as bits per dimension or densities.

What is computed, and what kind of bound it is, is in `sde.density.discrete`. Examples are taken in an order that the
seed shuffles, so that those which are done when the command is interrupted are a fair sample too.

    likelihood.json    the mean, its standard error, what it bounds, and everything that made it
    pictures.csv       one row for each example
    histogram.png      of bits per dimension
    best_worst.png     pictures with the fewest and the most bits; density.png for points in the plane
    terms.csv, .png    of a bound's diffusion part, by time
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde.cli import Interrupted, run_command
from sde.config import build
from sde.data import DataInfo, Dataset, Order, Split
from sde.data.base import SPLITS
from sde.denoiser import AbstractDenoiser
from sde.density import Divergence, Exact, Hutchinson, Quantization, bits_per_dim, times_to_noise
from sde.density.discrete import (
    DEQUANTIZATIONS,
    ChainBound,
    ContinuousBound,
    DiscreteLogProb,
    Discretization,
    Flow,
    Method,
    discrete_log_prob,
    from_time,
)
from sde.density.flow import SMALL
from sde.dequantize import load_dequantizer, run_dataset
from sde.devices import PRECISIONS, autocast, pick_device
from sde.encode import condition
from sde.errors import UserError, check_choice, check_flag, check_number
from sde.files import write_json, write_text
from sde.grids import GRIDS
from sde.pictures import save_captioned, save_density, save_histogram, save_terms
from sde.progress import progress_bar
from sde.randomness import sample_seed
from sde.sample import Model, chosen_grid, new_folder, open_model
from sde.solvers import SOLVERS, Solver
from sde.training.logging import Logger, append_metrics
from sde.training.stopping import StopRequest

METHODS = ("ode", "continuous_bound", "discrete_bound")
BOUND_OPTIONS = {
    "continuous_bound": {"steps"},
    "discrete_bound": {"steps", "variance", "share", "subset"},
}
_SHOWN = 10  # pictures in a row of the best and the worst


def main() -> None:
    """Entry point of the command line."""
    # the data set is the run's, so Hydra has none to override
    words = [word.removeprefix("data.") if word.startswith("data.split=") else word for word in sys.argv]
    sys.argv = [f"+{word}" if word.startswith(("data=", "data.")) else word for word in words]
    run_command("likelihood", likelihood)


def likelihood(config: dict[str, Any]) -> None:
    """Evaluate examples as `config` says and write what was found into a new folder of the run."""
    check_options(config)
    device = pick_device(config["device"])
    method = chosen_method(config)
    logger: Logger = build(config["logger"], "logger")
    model = open_model(config, device)
    task = make_task(config, model, method, device)
    folder = new_folder(model.run, config["out"], task.name(config), "likelihood")
    try:
        started = time.perf_counter()
        scores, asked_to_stop = score_all(task)
        summary = describe(config, task, scores, time.perf_counter() - started)
        write_scores(folder, summary, scores, task)
        draw_pictures(folder, summary, scores, task)
        record(config, task, folder, summary, logger)
        print(sentence(summary))
        if asked_to_stop is not None:
            wanted = len(task.indices)
            raise Interrupted(f"interrupted: {len(scores)} of {wanted} are in {folder}", 128 + asked_to_stop)
        if isinstance(method, Flow) and task.info.shape == (2,) and config["density_side"]:
            draw_density(folder / "density.png", task, config["density_side"], config["label"])
    finally:
        with contextlib.suppress(OSError):  # not empty unless the first file could not be written
            folder.rmdir()
    for file in sorted(folder.iterdir()):
        print(file)


# Options


def check_options(config: Mapping[str, Any]) -> None:
    """Check the options that can be checked before anything is opened.

    Raises:
        UserError: for the first that has no meaning.
    """
    for name, least in (("n", 1), ("batch_size", 1), ("draws", 1), ("density_side", 0)):
        value = config[name]
        if value is None and name == "n":
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{name}={value!r} must be a whole number")
        check_number(name, value, at_least=least)
    if config["density_side"] == 1:
        raise UserError("density_side=1 makes no picture: take 2 or more, or 0 for none")
    sample_seed(config["seed"], 0)
    for name in ("ema", "importance"):
        check_flag(name, config[name])
    check_choice("split", config["split"], SPLITS)
    check_choice("method", config["method"], METHODS)
    check_choice("dequantization", config["dequantization"], ("auto", *DEQUANTIZATIONS))
    check_choice("precision", config["precision"], PRECISIONS)
    if config["compile"] == "graphs":
        raise UserError("compile=graphs replays one forward pass and a density needs its derivative: take auto")
    if isinstance(config["label"], list) or config["label"] == "all":
        raise UserError(f"label={config['label']!r} is not one class: give one, or null for each example's own")


def chosen_method(config: Mapping[str, Any]) -> Method:
    """The method, with the options that belong to it.

    Raises:
        UserError: for an option of another method, or a value that cannot be.
    """
    name, bound = config["method"], config["bound"]
    own = BOUND_OPTIONS.get(name, set())
    defaults = {"steps": None, "variance": "posterior", "share": 0.5, "subset": None}
    for option, default in defaults.items():
        if bound[option] != default and option not in own:
            raise UserError(f"bound.{option}={bound[option]} means nothing to method={name}: leave it out")
    for option in ("steps", "subset"):
        value = bound[option]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"bound.{option}={value!r} must be a whole number of at least 1, or null")
    if name != "ode" and config["steps"] is not None:
        raise UserError(f"steps={config['steps']} are those of a solver and method={name} has none: use bound.steps")
    if name == "continuous_bound":
        return ContinuousBound(ContinuousBound.points if bound["steps"] is None else bound["steps"])
    grid = chosen_grid(dict(config))
    if name == "discrete_bound":
        return ChainBound(grid, **{key: bound[key] for key in ("steps", "variance", "share", "subset")})
    auto = config["divergence"].get("_target_") is None
    divergence = None if auto else build(config["divergence"], "divergence")
    return Flow(build(config["solver"], "solver"), divergence, grid, config["steps"], truncation=True)


def chosen_dequantization(config: Mapping[str, Any], model: Model) -> str:
    """Which way from densities to levels: that asked for, or the one that suits the run."""
    trained = bool(model.checkpoint.content["config"].get("training", {}).get("dequantize", False))
    name = str(config["dequantization"])
    if name == "auto":
        return "none" if model.info.kind == "vectors" else "uniform" if trained else "decoder"
    if model.info.kind == "pixels" and name in ("uniform", "variational") and not trained:
        print(
            f"warning: the run was trained without training.dequantize=true, so that its density has peaks at the gray "
            f"levels and the bits of dequantization={name} will be many: take decoder, or train with it",
            file=sys.stderr,
        )
    return name


# What is to be done


@dataclass(frozen=True, eq=False)
class Task:
    """Which examples are evaluated, and how.

    Args:
        model: the run's.
        denoiser: the model, from the time on whose density is meant.
        method: how log p is had.
        discretization: how pixels are.
        split: the examples of the data's split.
        split_name: what it is called.
        indices: which of them, (n,), in the order in which they are taken.
        labels: what the network is told of each, (n,), or None.
        batch_size: examples at once.
        seed: of all draws.
        precision: of the network.
        device: where it is.
    """

    model: Model
    denoiser: AbstractDenoiser
    method: Method
    discretization: Discretization
    split: Split
    split_name: str
    indices: Tensor
    labels: Tensor | None
    batch_size: int
    seed: int
    precision: str
    device: torch.device

    @property
    def info(self) -> DataInfo:
        """The facts about the data."""
        return self.model.info

    @property
    def numel(self) -> int:
        """Dimensions of an example."""
        return math.prod(self.info.shape)

    def name(self, config: Mapping[str, Any]) -> str:
        """What to call a folder of the results."""
        return f"{config['method']}-{self.discretization.kind}-{self.split_name}-seed{self.seed}"

    def bits(self, log_prob: Tensor) -> Tensor:
        """Bits per dimension of a log-probability in nats, any shape."""
        return bits_per_dim(log_prob, self.numel)


def make_task(config: Mapping[str, Any], model: Model, method: Method, device: torch.device) -> Task:
    """Everything that the computation needs, checked.

    Raises:
        UserError: for options that do not go together, with the run or with its data.
    """
    info, kind = model.info, chosen_dequantization(config, model)
    check_kind(kind, info.kind)
    discretization = Discretization(
        kind,
        Quantization.of(info) if info.kind == "pixels" else None,
        load_dequantizer(model.run.path, device, info) if kind == "variational" else None,
        config["decoder"],
        config["decoder_std"],
        config["draws"],
        config["importance"],
    )
    discretization.check(method)
    denoiser = from_time(model.denoiser, config["t_min"])
    numel = math.prod(info.shape)
    if isinstance(method, Flow):
        assert method.solver is not None
        check_way(method.solver, denoiser, method)
        method = Flow(method.solver, settled(method.divergence, numel), method.grid, method.steps, kind == "none")
    elif isinstance(method, ChainBound):
        method.times(denoiser.sde)
    split = opened_split(config, model)
    n = len(split) if config["n"] is None else config["n"]
    if n > len(split):
        raise UserError(f"n={n} is more than the {len(split)} of split={config['split']}: take fewer, or null for all")
    indices = Order(len(split), n, config["seed"])(0)
    found = None if split.labels is None else split.labels[indices]
    labels = condition(config["label"], found, n, model, f"the {config['split']} split")
    return Task(
        model,
        denoiser,
        method,
        discretization,
        split,
        config["split"],
        indices,
        labels,
        config["batch_size"],
        config["seed"],
        config["precision"],
        device,
    )


def check_kind(dequantization: str, kind: str) -> None:
    """Raise `UserError` unless a way to gray levels suits data of this kind."""
    if kind == "pixels" and dequantization == "none":
        raise UserError(
            "dequantization=none gives a density and pixels have probabilities: take uniform, variational or decoder"
        )
    if kind == "vectors" and dequantization != "none":
        raise UserError(f"dequantization={dequantization} is for pixels and this run has vectors: take none or auto")


def check_way(solver: Solver, denoiser: AbstractDenoiser, method: Flow) -> None:
    """Raise `UserError` unless `solver` goes from data to noise on its grid."""
    if not solver.both_ways or solver.stochastic or solver.final != "none":
        able = [name for name, cls in SOLVERS.items() if cls.both_ways]
        raise UserError(
            f"solver={SOLVERS.name_of(type(solver))} cannot go from data to noise with these options: take one of "
            f"{', '.join(able)}, without noise and with solver.final=none"
        )
    times_to_noise(solver, denoiser.sde, method.grid, method.steps)


def settled(divergence: Divergence | None, numel: int) -> Divergence:
    """The divergence that was asked for, or the one that suits data of `numel` dimensions."""
    chosen = divergence if divergence is not None else Exact() if numel <= SMALL else Hutchinson()
    chosen.check(numel)
    return chosen


def opened_split(config: Mapping[str, Any], model: Model) -> Split:
    """The split of the run's data.

    Raises:
        UserError: when the data are not there, do not look as the network expects them, or are none.
    """
    try:
        dataset: Dataset = run_dataset(model, config["data"])
        split = dataset.split(config["split"])
    except (UserError, OSError) as error:
        own = model.checkpoint.content["config"].get("data") or {}
        place = next((name for name in ("root", "path") if name in own), None)
        if place is None or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
            raise
        raise UserError(f"{error} (data that lie elsewhere: data.{place}=...)") from error
    if len(split) == 0:
        other = next(name for name in SPLITS if name != config["split"])
        raise UserError(
            f"split={config['split']} of {dataset.info.name} is empty: take split={other}, or another data="
        )
    return split


# The computation


@dataclass(eq=False)
class Scores:
    """What was found of n examples, in the order in which they were taken; float64, on the CPU.

    Attributes:
        index: which of the split, (n,).
        log_prob: nats, (n,).
        standard_error, trace_error: see `DiscreteLogProb`.
        parts: name: nats (n,).
        nfe: forward passes of the batch that each was in, (n,).
        terms: (n, N) or None; times (N,).
        truncation: (n,) or None.
    """

    index: list[int] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    found: list[DiscreteLogProb] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.index)

    def add(self, index: Sequence[int], found: DiscreteLogProb) -> None:
        """Take one batch in."""
        self.index += [int(k) for k in index]
        self.nfe += [found.nfe] * len(index)
        self.found.append(found)

    def column(self, name: str) -> Tensor:
        """`name` of all examples."""
        return torch.cat([getattr(batch, name).cpu() for batch in self.found])

    @property
    def parts(self) -> dict[str, Tensor]:
        """name: (n,)."""
        return {name: torch.cat([batch.parts[name].cpu() for batch in self.found]) for name in self.found[0].parts}


class _Stopped(Exception):
    """Leaves a solver between two steps."""


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def score_all(task: Task) -> tuple[Scores, int | None]:
    """Evaluate all examples; and the signal that asked to stop before the end, when there was one.

    Raises:
        Interrupted: when no batch was done by then.
    """
    n, scores = len(task.indices), Scores()
    with (
        StopRequest().listening() as stop,
        progress_bar(n, desc="likelihood", bar_format=_BAR) as bar,
        contextlib.suppress(_Stopped),
    ):
        for start in range(0, n, task.batch_size):
            rows = slice(start, min(start + task.batch_size, n))

            def progress(share: float, start: int = rows.start, size: int = rows.stop - rows.start) -> None:
                if stop.signal is not None:
                    raise _Stopped
                bar.update(start + share * size - bar.n)

            scores.add(task.indices[rows].tolist(), score(task, rows, progress))
            bar.set_postfix_str(running(task, scores))
    if not len(scores):
        assert stop.signal is not None
        raise Interrupted("interrupted; nothing was left half-written", 128 + stop.signal)
    return scores, stop.signal if len(scores) < n else None


def score(task: Task, rows: slice, progress: Any = None) -> DiscreteLogProb:
    """Evaluate the examples `rows` of the task's order."""
    numbers = task.indices[rows]
    x = task.info.encode(task.split.values[numbers].to(task.device), torch.float64)
    label = None if task.labels is None else task.labels[rows].to(task.device)
    with autocast(task.device, task.precision):
        found = discrete_log_prob(
            task.denoiser,
            x,
            task.discretization,
            task.method,
            label=label,
            seed=task.seed,
            indices=numbers.tolist(),
            progress=progress,
        )
    if not bool(torch.isfinite(found.log_prob).all()):
        print(f"\nwarning: {int((~torch.isfinite(found.log_prob)).sum())} of this batch are not finite", flush=True)
    return found


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean of `values` (n,) and its standard error, None for one."""
    n = len(values)
    return float(values.mean()), None if n < 2 else float(values.std()) / math.sqrt(n)


def running(task: Task, scores: Scores) -> str:
    """The mean so far, for the progress bar."""
    mean, error = mean_and_error(task.bits(scores.column("log_prob")))
    return f"{mean:.4f}" + ("" if error is None else f" +- {error:.4f}") + " bits/dim"


# What is written


def describe(config: Mapping[str, Any], task: Task, scores: Scores, seconds: float) -> dict[str, Any]:
    """What likelihood.json says."""
    log_prob, per_bit = scores.column("log_prob"), task.numel * math.log(2)
    bits, n = task.bits(log_prob), len(scores)
    mean, error = mean_and_error(bits)
    nats, nats_error = mean_and_error(log_prob)
    ordered = sorted(bits.tolist())
    return {
        "bits_per_dim": mean,
        "standard_error": error,
        "standard_error_of": "the mean over examples, from their spread, which holds that of draws and probes too",
        "standard_error_of_draws": mean_of_independent(scores.column("standard_error") / per_bit),
        "standard_error_of_trace": mean_of_independent(scores.column("trace_error") / per_bit),
        "meaning": task.discretization.meaning(task.method),
        "log_prob": nats,
        "log_prob_standard_error": nats_error,
        "median": statistics.median(ordered),
        "least": ordered[0],
        "most": ordered[-1],
        "parts": {name: float(task.bits(part).mean()) for name, part in scores.parts.items()},
        "truncation": None
        if scores.found[0].truncation is None
        else float(task.bits(scores.column("truncation")).mean()),
        "n": n,
        "asked_for": len(task.indices),
        "split": task.split_name,
        "split_size": len(task.split),
        "dimensions": task.numel,
        "nfe": sum(scores.nfe) / n,
        "seconds": round(seconds, 3),
        "seed": task.seed,
        **describe_way(config, task),
        "step": task.model.checkpoint.step,
        "checkpoint": str(task.model.checkpoint.path),
        **{key: config[key] for key in ("ema", "label", "batch_size", "precision", "compile")},
        "device": str(task.device),
    }


def mean_of_independent(errors: Tensor) -> float | None:
    """The standard error of a mean of numbers with independent `errors` (n,); None when one is not known."""
    value = float(errors.square().sum().sqrt()) / len(errors)
    return value if math.isfinite(value) else None


def describe_way(config: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """How it was computed: method, dequantization, times and options."""
    ways, sde, method = task.discretization, task.denoiser.sde, task.method
    about: dict[str, Any] = {
        "method": config["method"],
        "dequantization": ways.kind,
        "draws": ways.draws,
        "importance": ways.importance,
        "decoder": None if ways.decoder_kind is None else {"kind": ways.decoder, "std": ways.decoder_std},
        "quantization": None
        if ways.quantization is None
        else {**asdict(ways.quantization), "width": ways.quantization.width},
        "t_min": sde.t_min,
        "noise_level_at_t_min": float(sde.noise_level(sde.t_min)),
        "T": sde.T,
    }
    if isinstance(method, Flow):
        assert method.solver is not None
        assert method.divergence is not None
        solver, divergence = method.solver, method.divergence
        times = times_to_noise(solver, sde, method.grid, method.steps)
        return about | {
            "solver": SOLVERS.name_of(type(solver)),
            "solver_options": plain_options(solver),
            "grid": GRIDS.name_of(type(method.grid)) if method.grid is not None else solver.grid_name,
            "steps": None if solver.default_steps is None else len(times) - 1,
            "divergence": type(divergence).__name__.lower(),
            "divergence_options": plain_options(divergence),
        }
    if isinstance(method, ChainBound):
        chain = {key: getattr(method, key) for key in ("variance", "share", "subset")}
        grid = GRIDS.name_of(type(method.grid)) if method.grid is not None else "logsnr"
        return about | {"bound": {"grid": grid, "steps": len(method.times(sde)) - 1, **chain}}
    return about | {"bound": plain_options(method)}


def plain_options(of: Any) -> dict[str, Any]:
    """The options of a dataclass, infinities as JSON has none."""
    values = {item.name: getattr(of, item.name) for item in fields(of)}
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def write_scores(folder: Path, summary: Mapping[str, Any], scores: Scores, task: Task) -> None:
    """likelihood.json and pictures.csv; terms.csv for a bound."""
    write_json(folder / "likelihood.json", without_nan(dict(summary)))
    write_text(folder / "pictures.csv", table(rows_of(scores, task)))
    terms = terms_of(scores, task)
    if terms:
        write_text(folder / "terms.csv", table(terms))


def without_nan(value: Any) -> Any:
    """`value` with null for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rows_of(scores: Scores, task: Task) -> list[dict[str, Any]]:
    """A row for each example by its number in the split. Parts are in bits per dimension and add up to
    bits_per_dim, unless draws are weighted by importance."""
    columns: dict[str, list[Any]] = {"index": scores.index}
    if task.split.labels is not None:
        columns["label"] = task.split.labels[torch.tensor(scores.index)].tolist()
    columns["bits_per_dim"] = task.bits(scores.column("log_prob")).tolist()
    for name in ("log_prob", "standard_error", "trace_error"):
        columns[name] = scores.column(name).tolist()
    if scores.found[0].truncation is not None:
        columns["truncation"] = scores.column("truncation").tolist()
    columns |= {f"bits_{name}": task.bits(part).tolist() for name, part in scores.parts.items()}
    columns["nfe"] = scores.nfe
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return sorted(rows, key=lambda row: int(row["index"]))


def terms_of(scores: Scores, task: Task) -> list[dict[str, Any]]:
    """A bound's terms in bits per dimension, by the later time of each, and their standard errors over examples."""
    times = scores.found[0].times
    if times is None:
        return []
    bits = task.bits(scores.column("terms"))
    errors = bits.std(0) / math.sqrt(len(bits)) if len(bits) > 1 else torch.full_like(bits[0], math.nan)
    snr = task.denoiser.sde.log_snr(times)
    columns = (times.tolist(), snr.tolist(), bits.mean(0).tolist(), errors.tolist())
    return [
        {"t": t, "log_snr": level, "bits_per_dim": value, "standard_error": error}
        for t, level, value, error in zip(*columns, strict=True)
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, what is not known left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return text.getvalue()


def draw_pictures(folder: Path, summary: Mapping[str, Any], scores: Scores, task: Task) -> None:
    """histogram.png, best_worst.png for pictures, terms.png for a bound."""
    bits = task.bits(scores.column("log_prob"))
    title = f"{len(scores)} of {task.info.name} ({task.split_name}): {task.discretization.kind}, {summary['method']}"
    save_histogram(folder / "histogram.png", bits, title, "bits/dim")
    if task.info.kind == "pixels":
        order = bits.nan_to_num(nan=math.inf).argsort()
        shown = min(_SHOWN, (len(order) + 1) // 2)
        rows = []
        for name, chosen in (("fewest bits/dim", order[:shown]), ("most bits/dim", order.flip(0)[:shown])):
            pixels = task.split.values[torch.tensor(scores.index)[chosen]]
            captions = [f"{scores.index[int(k)]}: {float(bits[k]):.3f}" for k in chosen]
            rows.append((name, pixels, captions))
        save_captioned(folder / "best_worst.png", rows)
    terms = terms_of(scores, task)
    if terms:
        t, values, errors = ([row[name] for row in terms] for name in ("t", "bits_per_dim", "standard_error"))
        save_terms(folder / "terms.png", t, values, errors, f"terms of the bound, {sum(values):.4g} bits/dim in all")


def draw_density(path: Path, task: Task, side: int, label: Any) -> None:
    """The density on a square around the examples; of a class-conditional run for a class that is given alone."""
    if task.labels is not None and label is None:
        return
    data = task.split.values[task.indices]
    limit = 1.2 * max(0.1, float(data.abs().max()))
    axis = torch.linspace(-limit, limit, side, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    found = []
    with progress_bar(len(points), desc="density", bar_format=_BAR) as bar, autocast(task.device, task.precision):
        for numbers in torch.arange(len(points)).split(max(task.batch_size, 1000)):
            same = None if task.labels is None else task.labels[:1].expand(len(numbers)).to(task.device)
            part = discrete_log_prob(
                task.denoiser, points[numbers].to(task.device), task.discretization, task.method,
                label=same, seed=task.seed, indices=numbers.tolist(),
            )  # fmt: skip
            found.append(part.log_prob.cpu())
            bar.update(len(numbers))
    save_density(path, torch.cat(found).reshape(side, side), limit, "p at t_min", data)


def record(config: Mapping[str, Any], task: Task, folder: Path, summary: Mapping[str, Any], logger: Logger) -> None:
    """A line in the run's metrics.jsonl, where it has one, and what the logger is to show."""
    run, step, prefix = task.model.run, task.model.checkpoint.step, f"likelihood/{task.split_name}"
    numbers = {
        f"{prefix}/{name}": math.nan if summary[name] is None else float(summary[name])
        for name in ("bits_per_dim", "standard_error", "log_prob", "n")
    }
    if run.metrics.is_file():
        kind = f"{config['method']}-{task.discretization.kind}"
        try:
            append_metrics(run.metrics, step, numbers, {f"{prefix}/kind": kind, f"{prefix}/folder": str(folder)})
        except OSError as error:
            print(f"warning: {run.metrics} does not have the result ({error.strerror})", file=sys.stderr)
    pictures = {f"{prefix}/{path.stem}": path for path in sorted(folder.glob("*.png"))}
    if not logger.elsewhere:
        return
    try:
        with run.locked():
            logger.start(run.path, task.model.checkpoint.content["config"], step)
            try:
                logger.evaluation(step, numbers, pictures)
            finally:
                logger.finish(0)
    except UserError:
        print(f"warning: {run.path} is being trained, so its W&B run was left alone", file=sys.stderr)


def sentence(summary: Mapping[str, Any]) -> str:
    """The result in a line or two."""
    spread = "" if summary["standard_error"] is None else f" +- {summary['standard_error']:.4f}"
    return (
        f"{summary['bits_per_dim']:.4f}{spread} bits/dim ({summary['log_prob']:.2f} nats) over {summary['n']} of "
        f"{summary['split_size']} in split={summary['split']}, {summary['seconds']:.1f} s, {summary['nfe']:.0f} "
        f"evaluations each, from {summary['checkpoint']}\n{summary['meaning']}"
    )


if __name__ == "__main__":
    main()
