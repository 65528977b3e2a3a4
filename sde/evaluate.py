"""`python -m sde.evaluate`: how good the samples of a trained run are, in numbers that say how sure they are.

Samples are drawn (or taken from files), described by features, and held against the training data; held-out data in
place of samples give the floor, the number that perfect samples would have at that size. `sde.evaluation` and
`sde.metrics` do the work; here it is composed.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde.cli import add_data_overrides, run_command
from sde.commands import (
    Model,
    check_settings,
    chosen_grid,
    class_labels,
    describe_way,
    note_result,
    open_model,
    run_dataset,
    watched,
)
from sde.config import build
from sde.data import DataInfo, Dataset, Order
from sde.devices import autocast, pick_device
from sde.distributed import is_main
from sde.errors import UserError, check_choice, check_number
from sde.evaluation.card import write_card, write_overview
from sde.evaluation.extractors import Extractor, chosen_for
from sde.evaluation.loader import load_samples
from sde.evaluation.reference import Reference, reference
from sde.evaluation.samples import Described, Drawn, describe_all
from sde.evaluation.scores import Scored, score, table, thousands
from sde.metrics import METRICS, Metric, Sets
from sde.pictures import save_grid, save_scatter
from sde.sampling import Plan, denoised_at_the_end, make_times
from sde.solvers import SOLVERS, Solver
from sde.training.logging import Logger

PICTURES = ("fd", "kid", "pr", "dc")
LABELED = ("is",)
POINTS = ("wasserstein", "grid_kl", "energy", "swd", "c2st")
_SHOWN = 100


def main() -> None:
    """Entry point of the command line."""
    add_data_overrides()
    run_command("evaluate", evaluate, several=True)


@dataclass(frozen=True)
class Task:
    """What is evaluated, by which metrics.

    Args:
        config: of the command.
        model: the run's.
        dataset: what samples are held against.
        extractor: ready.
        metrics: by their names.
        device: where.
    """

    config: Mapping[str, Any]
    model: Model
    dataset: Dataset
    extractor: Extractor
    metrics: Mapping[str, Metric]
    device: torch.device

    @property
    def info(self) -> DataInfo:
        """Of the data."""
        return self.model.info


def evaluate(config: dict[str, Any]) -> None:
    """Evaluate as `config` says, and write what was found."""
    check_options(config)
    device = pick_device(config["device"])
    logger: Logger = build(config["logger"], "logger")
    metrics = chosen_metrics(config)
    model = open_model(config, device)
    dataset = run_dataset(model, config["data"])
    extractor = chosen_extractor(config, model.info)
    extractor.prepare(dataset, device)
    names = metric_names(config, model.info, extractor)
    task = Task(config, model, dataset, extractor, {name: metrics[name] for name in names}, device)
    folder = model.run.path / "evaluations" if config["out"] is None else Path(str(config["out"])).expanduser()

    own = reference(dataset, config["reference_split"], extractor, device, config["batch_size"], config["reference_n"])
    other = "test" if config["reference_split"] == "train" else "train"
    held_out = None
    if len(dataset.split(other)):
        held_out = reference(dataset, other, extractor, device, config["batch_size"], None)
    drawn, about = samples_of(task, folder)
    if not is_main():
        return
    started = time.perf_counter()
    scores = all_scores(task, drawn, own, held_out)
    record = describe(task, drawn, about, own, scores, time.perf_counter() - started)
    folder.mkdir(parents=True, exist_ok=True)
    name = record_name(task, about, len(drawn[0]))
    record["picture"] = save_first(folder / f"{name}.png", drawn[0], model.info, dataset)
    path = write_card(folder, name, record)
    print_table(record)
    for written in (path, path.with_suffix(".json"), *write_overview(folder, record)):
        print(written)
    note(task, record, path, logger)
    for forget in about["forget"]:
        forget()


# Options


def check_options(config: Mapping[str, Any]) -> None:
    """Check what can be checked before anything is opened.

    Raises:
        UserError: for the first option that has no meaning.
    """
    check_settings({**config, "seed": 0})
    seeds = config["seeds"]
    if not isinstance(seeds, list) or not seeds or any(not isinstance(s, int) or isinstance(s, bool) for s in seeds):
        raise UserError(f"seeds={seeds!r} must be a list of whole numbers, such as [0] or [0,1,2]")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={seeds} draws the same samples twice: name each seed once")
    for option, least in (("examples", 2), ("groups", 2)):
        value = config[option]
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{option}={value!r} must be a whole number")
        check_number(option, value, at_least=least)
    check_choice("reference_split", config["reference_split"], ("train", "test"))
    if config["samples"] is not None and len(seeds) > 1:
        raise UserError(f"samples={config['samples']} is one set: leave seeds={seeds} out")


def chosen_metrics(config: Mapping[str, Any]) -> dict[str, Metric]:
    """Every metric with its options."""
    nodes = {name: config[name] for name in config if isinstance(config[name], Mapping) and name in METRICS}
    return {name: build(node, "metrics") for name, node in nodes.items()}


def chosen_extractor(config: Mapping[str, Any], info: DataInfo) -> Extractor:
    """The extractor that was asked for, or the one that suits the data."""
    node = config["features"]
    if node.get("_target_") is None:
        return chosen_for(info)
    return build(node, "features")


def metric_names(config: Mapping[str, Any], info: DataInfo, extractor: Extractor) -> list[str]:
    """The metrics that were asked for, or those that suit the data.

    Raises:
        UserError: for a metric that there is not, or that does not suit the data.
    """
    wanted = config["metric"]
    if wanted == "auto":
        if info.kind == "vectors":
            return [name for name in POINTS if info.shape == (2,) or not METRICS.get(name).planar]
        return [*PICTURES, *(LABELED if extractor.classifies else ())]
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        check_choice("metric", name, METRICS)
        metric = METRICS.get(name)
        if metric.planar and info.shape != (2,):
            raise UserError(f"metric={name} is for points in the plane and the data have shape {tuple(info.shape)}")
        if metric.of == "probabilities" and not extractor.classifies:
            raise UserError(f"metric={name} needs class probabilities: take features=classifier or features=inception")
    return list(dict.fromkeys(names))


# Samples


def samples_of(task: Task, folder: Path) -> tuple[list[Described], dict[str, Any]]:
    """The sets of samples, drawn or read, and what made them."""
    config, model = task.config, task.model
    if config["samples"] is not None:
        path = Path(str(config["samples"])).expanduser()
        batches = load_samples(path, model.info, config["batch_size"])
        found = describe_all(batches, task.extractor, config["examples"])
        return [found], {"sampling": {"samples": str(path)}, "forget": []}
    solver: Solver = build(config["solver"], "solver")
    grid = chosen_grid(dict(config))
    times = make_times(solver, model.denoiser, grid, config["steps"])
    solver = denoised_at_the_end(solver, model.denoiser, times) if config["denoise"] else solver
    labels = class_labels(config["label"], config["n"], model.denoiser, model.info)
    way = describe_way(solver, grid, list(times)) | {"denoise": config["denoise"], "noise": config["noise"]}
    identity = {
        "checkpoint": [str(model.checkpoint.path.resolve()), model.checkpoint.step],
        "ema": config["ema"],
        "label": config["label"],
        "precision": config["precision"],
        **way,
        "times": list(times),
    }
    sets, forget = [], []
    for seed in config["seeds"]:
        plan = Plan(solver, times, model.info.shape, seed, task.device, noise=config["noise"])
        drawn = Drawn(
            model.denoiser, plan, model.info, task.extractor, config["n"], config["batch_size"], labels,
            config["examples"], folder, identity,
        )  # fmt: skip
        with watched(f"samples of seed {seed}", config["n"]) as progress, autocast(task.device, config["precision"]):
            sets.append(drawn(progress))
        forget.append(drawn.forget)
    return sets, {"sampling": {**way, "seeds": config["seeds"]}, "forget": forget}


# Scores


def all_scores(task: Task, drawn: Sequence[Described], own: Reference, held_out: Reference | None) -> list[Scored]:
    """All numbers of all metrics."""
    config, found = task.config, []
    kinds = {metric.of == "examples" for metric in task.metrics.values()}
    by_kind = {
        examples: (sets_of(task, drawn, own, held_out, examples), floor_of(task, drawn, own, held_out, examples))
        for examples in kinds
    }
    for name, metric in task.metrics.items():
        sets, floor = by_kind[metric.of == "examples"]
        if metric.needs_held_out:
            if sets[0].held_out is None:
                raise UserError(f"metric={name} needs data that the model has not seen, and there is no such split")
            floor = None
        if metric.of == "probabilities" and floor is not None and floor.probabilities is None:
            floor = None
        found += score(name, metric, sets, task.extractor.name, floor, config["groups"])
    return found


def sets_of(
    task: Task, drawn: Sequence[Described], own: Reference, held_out: Reference | None, examples: bool
) -> list[Sets]:
    """The sets of a metric of features, or of examples themselves."""
    if not examples:
        rest = None if held_out is None else held_out.features
        return [Sets(each.features, own.features, rest, each.probabilities) for each in drawn]
    data, rest = (data_examples(task, held_out=is_rest) for is_rest in (False, True))
    return [Sets(flat(task.info, each.examples), data, rest) for each in drawn]


def floor_of(
    task: Task, drawn: Sequence[Described], own: Reference, held_out: Reference | None, examples: bool
) -> Sets | None:
    """Held-out data in place of samples, as many as there are of both."""
    if held_out is None:
        return None
    if examples:
        rest = data_examples(task, held_out=True)
        n = min(len(drawn[0].examples), len(rest))
        return Sets(rest[:n], data_examples(task, held_out=False))
    n = min(len(drawn[0]), len(held_out.features))
    chosen = Order(len(held_out.features), n, 0)(0)
    probabilities = None if held_out.probabilities is None else held_out.probabilities[chosen]
    return Sets(held_out.features[chosen], own.features, None, probabilities)


def data_examples(task: Task, held_out: bool) -> Tensor:
    """Examples of the data as vectors, as the network sees them, at most as many as `examples` says."""
    split = task.config["reference_split"]
    split = {"train": "test", "test": "train"}[split] if held_out else split
    values = task.dataset.split(split).values
    if not len(values):
        return torch.empty(0, 1)
    chosen = Order(len(values), min(len(values), task.config["examples"]), 1)(0)
    return flat(task.info, values[chosen])


def flat(info: DataInfo, stored: Tensor) -> Tensor:
    """Stored examples as vectors (n, D), as the network sees them."""
    return info.encode(stored).flatten(1)


# Results


def describe(
    task: Task,
    drawn: Sequence[Described],
    about: Mapping[str, Any],
    own: Reference,
    scores: Sequence[Scored],
    seconds: float,
) -> dict[str, Any]:
    """The record of an evaluation: all that its numbers depend on."""
    config, model, n = task.config, task.model, len(drawn[0])
    nfe = [count for each in drawn for count in each.nfe]
    spent = sum(each.seconds for each in drawn)
    cost: dict[str, Any] = {"evaluation_seconds": round(seconds, 2), "device": str(task.device)}
    if nfe:
        cost |= {"nfe": max(nfe), "milliseconds_per_sample": round(1000 * spent / (n * len(drawn)), 3)}
    trained = model.checkpoint.content["config"]
    several = len(drawn) > 1
    return {
        "scores": [each.to_dict() for each in scores],
        "errors_of": f"the mean over {len(drawn)} sets of samples, from their spread"
        if several
        else f"one set of samples, by the jackknife over {config['groups']} groups of examples of both sides",
        "n": n,
        "model": {
            "run": str(model.run.path),
            "checkpoint": model.checkpoint.path.name,
            "step": model.checkpoint.step,
            "weights": "averaged" if config["ema"] is True else config["ema"],
            "sde": trained.get("sde", {}).get("_target_", "").rsplit(".", 1)[-1],
            "network": trained.get("model", {}).get("_target_", "").rsplit(".", 1)[-1],
        },
        "sampling": {**about["sampling"], "precision": config["precision"], "batch_size": config["batch_size"]},
        "cost": cost,
        "features": task.extractor.describe(),
        "reference": {"split": config["reference_split"], "n": len(own.features), "key": own.key},
        "data": {
            "name": task.info.name,
            "shape": list(task.info.shape),
            "pixels": "rounded to the nearest of 256 gray levels, no compression" if task.info.kind == "pixels" else "",
        },
        "versions": {"torch": torch.__version__},
        "command": shlex.join(["python", "-m", "sde.evaluate", *sys.argv[1:]]),
    }


def record_name(task: Task, about: Mapping[str, Any], n: int) -> str:
    """What the files of an evaluation are called."""
    sampling = about["sampling"]
    if "samples" in sampling:
        way = Path(sampling["samples"]).stem
    else:
        steps = "" if sampling["steps"] is None else f"-{sampling['steps']}"
        way = f"{SOLVERS.name_of(type(build(task.config['solver'], 'solver')))}{steps}"
    return f"{way}-{task.extractor.name}-{thousands(n)}-step{task.model.checkpoint.step}"


def save_first(path: Path, drawn: Described, info: DataInfo, dataset: Dataset) -> str | None:
    """A picture of the first samples, and its name; None for data that have none."""
    if info.kind == "pixels":
        save_grid(path, drawn.examples[:_SHOWN])
    elif info.shape == (2,):
        save_scatter(path, drawn.examples, dataset.split("test").values)
    else:
        return None
    return path.name


def print_table(record: Mapping[str, Any]) -> None:
    """The scores, aligned."""
    rows = table(record["scores"])
    columns = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    for row in ({name: name for name in columns}, *rows):
        print("  ".join(row[name].ljust(widths[name]) for name in columns).rstrip())
    cost = record["cost"]
    if "nfe" in cost:
        print(f"{cost['nfe']} evaluations and {cost['milliseconds_per_sample']} ms a sample")


def note(task: Task, record: Mapping[str, Any], path: Path, logger: Logger) -> None:
    """A line in the run's metrics.jsonl, and what the logger is to show."""
    numbers = {f"evaluation/{each['label']}": each["value"] for each in record["scores"] if each["value"] is not None}
    notes = {"evaluation/kind": path.stem, "evaluation/folder": str(path.parent)}
    pictures = {f"evaluation/{file.stem}": file for file in path.parent.glob(f"{path.stem}.png")}
    note_result(task.model, numbers, notes, pictures, logger)


if __name__ == "__main__":
    main()
