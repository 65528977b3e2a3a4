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
import inspect
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sde.cli import Interrupted, add_data_overrides, run_command, task_overrides
from sde.commands import Model, chosen_grid, condition, new_folder, open_model, run_dataset, was_dequantized
from sde.config import build
from sde.data import Dataset, Order, Split
from sde.data.base import SPLITS
from sde.density import DIVERGENCES, Likelihood, Quantization
from sde.density.discrete import (
    DEQUANTIZATIONS,
    ChainBound,
    ContinuousBound,
    DiscreteLogProb,
    Discretization,
    Flow,
    Method,
)
from sde.density.flow import SMALL
from sde.density.likelihood import Scores, check_arithmetic, check_kind, mean_and_error, suitable_dequantization
from sde.devices import PRECISIONS, pick_device
from sde.distributed import any_signal, collect, is_main, on_main, own_batches, world
from sde.errors import UserError, check_choice, check_flag, check_number
from sde.likelihood_results import Task, describe, draw_pictures, record, sentence, write_scores
from sde.pictures import save_density
from sde.progress import progress_bar
from sde.randomness import sample_seed
from sde.runs import check_ema
from sde.training.dequantization import load_dequantizer
from sde.training.logging import Logger
from sde.training.stopping import StopRequest

METHODS = tuple(method.name for method in (Flow, ContinuousBound, ChainBound))
BOUND_OPTIONS = {
    "continuous_bound": {"steps"},
    "discrete_bound": {"steps", "variance", "share", "subset"},
}


def main() -> None:
    """Entry point of the command line."""
    add_data_overrides()
    add_divergence()
    run_command("likelihood", likelihood, several=True)


def add_divergence() -> None:
    """Let divergence.probes=2 choose the estimator that has probes: the default one has no options to override."""
    options = [w.partition("=")[0].partition(".")[2] for w in sys.argv[1:] if w.startswith("divergence.")]
    chosen = any(word.startswith("divergence=") for word in sys.argv[1:])
    owners = [
        name for name, cls in DIVERGENCES.items() if options and {*options} <= {*inspect.signature(cls).parameters}
    ]
    if owners and not chosen:
        sys.argv.append(f"divergence={owners[0]}")


def likelihood(config: dict[str, Any]) -> None:
    """Evaluate examples as `config` says and write what was found into a new folder of the run."""
    config = {**config, "data": dict(config["data"])}
    config["split"] = config["data"].pop("split", config["split"])
    check_options(config)
    device = pick_device(config["device"])
    method = chosen_method(config)
    logger: Logger = build(config["logger"], "logger")
    model = open_model(config, device)
    task = make_task(config, model, method, device)
    folder = on_main(lambda: new_folder(model.run, config["out"], task.name(), "likelihood"))
    try:
        started = time.perf_counter()
        scores, asked_to_stop = score_all(task)
        if not is_main():
            return
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
        if is_main():
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
    check_ema(config["ema"])
    check_flag("importance", config["importance"])
    check_choice("split", config["split"], SPLITS)
    check_choice("method", config["method"], METHODS)
    check_choice("dequantization", config["dequantization"], ("auto", *DEQUANTIZATIONS))
    check_choice("precision", config["precision"], PRECISIONS)
    check_arithmetic(config["precision"], config["compile"])
    if config["t_min"] != "auto":
        check_number("t_min", config["t_min"], above=0)
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
    if name != "ode" and config["steps"] is not None:
        raise UserError(f"steps={config['steps']} are those of a solver and method={name} has none: use bound.steps")
    unused = {"continuous_bound": ("solver", "divergence", "grid"), "discrete_bound": ("solver", "divergence")}
    for override in task_overrides():
        if override.lstrip("+").partition("=")[0].partition(".")[0] in unused.get(name, ()):
            raise UserError(f"{override} means nothing to method={name}, which follows no flow: leave it out")
    if name == "continuous_bound":
        return ContinuousBound() if bound["steps"] is None else ContinuousBound(bound["steps"])
    grid = chosen_grid(dict(config))
    if name == "discrete_bound":
        if bound["subset"] is not None and bound["steps"] is not None and bound["subset"] > bound["steps"]:
            raise UserError(
                f"bound.subset={bound['subset']} is more than the bound.steps={bound['steps']} terms there are"
            )
        return ChainBound(grid, **{key: bound[key] for key in ("steps", "variance", "share", "subset")})
    auto = config["divergence"].get("_target_") is None
    divergence = None if auto else build(config["divergence"], "divergence")
    return Flow(build(config["solver"], "solver"), divergence, grid, config["steps"], truncation=True)


def chosen_dequantization(config: Mapping[str, Any], model: Model) -> str:
    """Which way from densities to levels: that asked for, or the one that suits the run."""
    trained = was_dequantized(model)
    name = str(config["dequantization"])
    if name == "auto":
        return suitable_dequantization(model.info.kind, trained)
    if model.info.kind == "pixels" and name in ("uniform", "variational") and not trained:
        print(
            f"warning: the run was trained without training.dequantize=true, so that its density may have peaks at the "
            f"gray levels, which dequantization={name} misses: compare dequantization=decoder, or train with it",
            file=sys.stderr,
        )
    return name


# What is to be done


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
    if config["importance"] and config["draws"] == 1:
        raise UserError("importance=true weighs draws against each other and draws=1 is a single one: take draws=8")
    exact = config["divergence"].get("_target_") is None and math.prod(info.shape) <= SMALL
    if config["draws"] > 1 and kind == "none" and exact and isinstance(method, Flow):
        raise UserError(
            f"draws={config['draws']} of an exact density are all alike: leave draws out, or estimate the trace with "
            f"divergence=hutchinson"
        )
    t_min = None if config["t_min"] == "auto" else float(config["t_min"])
    likelihood = Likelihood.of(model.denoiser, info, discretization, method, t_min)
    split = opened_split(config, model)
    n = len(split) if config["n"] is None else config["n"]
    if n > len(split):
        raise UserError(f"n={n} is more than the {len(split)} of split={config['split']}: take fewer, or null for all")
    indices = Order(len(split), n, config["seed"])(0)
    found = None if split.labels is None else split.labels[indices]
    labels = condition(config["label"], found, n, model, f"the {config['split']} split")
    return Task(
        model,
        likelihood,
        split,
        config["split"],
        indices,
        labels,
        config["batch_size"],
        config["seed"],
        device,
    )


def opened_split(config: Mapping[str, Any], model: Model) -> Split:
    """The split of the run's data.

    Raises:
        UserError: when the data are not there, do not look as the network expects them, or are none.
    """
    options = {**(model.checkpoint.content["config"].get("data") or {}), **config["data"]}
    place = next((name for name in ("root", "path") if name in options), None)
    there = place is None or (options[place] is not None and Path(str(options[place])).expanduser().exists())
    try:
        dataset: Dataset = run_dataset(model, config["data"])
        split = dataset.split(config["split"])
    except (UserError, OSError) as error:
        if there:
            raise
        raise UserError(f"{error} (data that lie elsewhere: data.{place}=...)") from error
    if len(split) == 0:
        other = next(name for name in SPLITS if name != config["split"])
        raise UserError(
            f"split={config['split']} of {dataset.info.name} is empty: take split={other}, or another data="
        )
    return split


# The computation


class _Stopped(Exception):
    """Leaves a solver between two steps."""


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def score_all(task: Task) -> tuple[Scores, int | None]:
    """Evaluate all examples; and the signal that asked to stop before the end, when there was one.

    Several processes share the batches; rank 0 gets all of them.

    Raises:
        Interrupted: when no batch was done by then.
    """
    n, scores = len(task.indices), Scores()
    own = own_batches(n, task.batch_size)
    mine = sum(len(indices) for indices in own.values())
    found: dict[int, tuple[list[int], DiscreteLogProb]] = {}
    with (
        StopRequest().listening() as stop,
        progress_bar(n, desc="likelihood", bar_format=_BAR) as bar,
        contextlib.suppress(_Stopped),
    ):
        for number, batch in own.items():
            rows = slice(batch.start, batch.stop)

            def progress(share: float, done: int = len(scores), size: int = len(batch)) -> None:
                if stop.signal is not None:
                    raise _Stopped
                bar.update((done + share * size) / mine * n - bar.n)

            found[number] = task.indices[rows].tolist(), score(task, rows, progress)
            scores.add(*found[number])
            bar.set_postfix_str(running(task, scores))
    signal = any_signal(stop.signal)
    scores = Scores()
    for index, batch_found in collect(found):
        scores.add(index, batch_found)
    if not len(scores) and signal is not None:
        raise Interrupted("interrupted; nothing was left half-written", 128 + signal)
    return scores, signal if len(scores) < n else None


def score(task: Task, rows: slice, progress: Any = None) -> DiscreteLogProb:
    """Evaluate the examples `rows` of the task's order."""
    numbers = task.indices[rows]
    label = None if task.labels is None else task.labels[rows].to(task.device)
    stored = task.split.values[numbers].to(task.device)
    found = task.likelihood(stored, label=label, seed=task.seed, indices=numbers.tolist(), progress=progress)
    if not bool(torch.isfinite(found.log_prob).all()):
        print(f"\nwarning: {int((~torch.isfinite(found.log_prob)).sum())} of this batch are not finite", flush=True)
    return found


def running(task: Task, scores: Scores) -> str:
    """The mean so far, for the progress bar; nothing where other processes have examples of their own."""
    if world().size > 1:
        return ""
    mean, error = mean_and_error(task.likelihood.bits(scores.column("log_prob")))
    return f"{mean:.4f}" + ("" if error is None else f" +- {error:.4f}") + " bits/dim"


def draw_density(path: Path, task: Task, side: int, label: Any) -> None:
    """The density on a square around the examples; of a class-conditional run for a class that is given alone."""
    if task.labels is not None and label is None:
        return
    data = task.split.values[task.indices]
    limit = 1.2 * max(0.1, float(data.abs().max()))
    axis = torch.linspace(-limit, limit, side, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    found = []
    with progress_bar(len(points), desc="density", bar_format=_BAR) as bar:
        for numbers in torch.arange(len(points)).split(max(task.batch_size, 1000)):
            same = None if task.labels is None else task.labels[:1].expand(len(numbers)).to(task.device)
            at = points[numbers].to(task.device)
            part = task.likelihood(at, label=same, seed=task.seed, indices=numbers.tolist())
            found.append(part.log_prob.cpu())
            bar.update(len(numbers))
    save_density(path, torch.cat(found).reshape(side, side), limit, "p at t_min", data)


if __name__ == "__main__":
    main()
