"""What `python -m sde.evaluate` is to do, what it found, and the files that say so."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from torch import Tensor

from sde.commands import Model, note_result
from sde.config import build
from sde.data import DataInfo, Dataset
from sde.distributed import world
from sde.evaluation.card import free_name, write_card
from sde.evaluation.diagnostics import Diagnostic, save_diagnostics
from sde.evaluation.digests import digest_of_tensors
from sde.evaluation.extractors import Extractor
from sde.evaluation.likelihood import likelihood_numbers, likelihood_rows, likelihood_way
from sde.evaluation.model import Asked, exact_of, means
from sde.evaluation.overview import write_overview
from sde.evaluation.reference import Reference, Statistics
from sde.evaluation.samples import Described
from sde.evaluation.scores import Scored, table, thousands
from sde.metrics import Metric
from sde.metrics.distances import nearest
from sde.pictures import save_grid, save_rows, save_scatter
from sde.runs import environment
from sde.solvers import SOLVERS
from sde.training.logging import Logger
from sde.training.metrics import read_metrics

_SHOWN = 100  # samples in the picture
_BESIDE = 12  # samples beside their nearest training examples
_BLOCK = 4096  # training examples that are compared at a time


@dataclass(frozen=True)
class Task:
    """What is evaluated, by which metrics.

    Args:
        config: of the command.
        model: the run's.
        dataset: what samples are held against.
        extractor: ready.
        metrics: by their names.
        asked: of the model itself.
        device: where.
    """

    config: Mapping[str, Any]
    model: Model
    dataset: Dataset
    extractor: Extractor
    metrics: Mapping[str, Metric]
    asked: Asked
    device: torch.device

    @property
    def info(self) -> DataInfo:
        """Of the data."""
        return self.model.info

    @property
    def labeled(self) -> bool:
        """Whether the network is told classes."""
        return bool(getattr(self.model.denoiser.network, "num_classes", 0))


@dataclass(frozen=True)
class Against:
    """What samples are held against.

    Args:
        own: features of the data; None where statistics are given.
        held_out: those of the other split; None where it is empty.
        statistics: a mean and a covariance in place of the features.
    """

    own: Reference | None
    held_out: Reference | None
    statistics: Statistics | None = None

    def describe(self) -> dict[str, Any]:
        """For the record."""
        if self.statistics is not None:
            return {"file": self.statistics.source, "note": self.statistics.note, "hash": self.statistics_hash()}
        assert self.own is not None
        return {**self.own.about, "hash": self.own.key}

    def statistics_hash(self) -> str:
        """Of mean and covariance."""
        assert self.statistics is not None
        return digest_of_tensors({"mu": self.statistics.mean, "sigma": self.statistics.covariance})


@dataclass(frozen=True)
class Found:
    """What was found.

    Args:
        drawn: the sets of samples.
        sampling: how they came to be.
        scores: numbers of the samples.
        diagnostics: of the model.
        likelihood: of training and of held-out examples, as `TrainAndTest` gives it; None where it was not asked for.
        seconds: that the numbers took.
    """

    drawn: Sequence[Described]
    sampling: Mapping[str, Any]
    scores: Sequence[Scored]
    diagnostics: Sequence[Diagnostic]
    likelihood: Mapping[str, Any] | None
    seconds: float


# The record


def describe(task: Task, against: Against, found: Found) -> dict[str, Any]:
    """The record of an evaluation: all that its numbers depend on."""
    n = len(found.drawn[0])
    return {
        "scores": [each.to_dict() for each in found.scores],
        "errors_of": errors_of(task.config["groups"], len(found.drawn), against.statistics is not None),
        "n": n,
        "model": describe_model(task),
        "sampling": dict(found.sampling),
        "cost": cost(task, found),
        "features": task.extractor.describe(),
        "reference": against.describe(),
        "data": describe_data(task),
        "metrics": {name: options_of(metric) for name, metric in task.metrics.items()},
        "likelihood": known_likelihood(task),
        "likelihood_of_splits": found.likelihood,
        "likelihood_of": likelihood_way(found.likelihood) if found.likelihood else None,
        "diagnostics": [each.to_dict() for each in found.diagnostics],
        "diagnostics_of": diagnostics_of(task) if found.diagnostics else None,
        "diagnostic_pictures": [],
        "pictures": {},
        "versions": versions(task.device),
        "command": shlex.join(["python", "-m", "sde.evaluate", *sys.argv[1:]]),
    }


def errors_of(groups: int, sets: int, statistics: bool) -> str:
    """What the errors are, in words.

    Args:
        groups: of the jackknife.
        sets: of samples.
        statistics: that the data are known by mean and covariance alone.
    """
    if sets == 1:
        sides = "of the samples" if statistics else "of both sides"
        return f"standard errors of one set, by the jackknife over {groups} groups of examples at most {sides}"
    once, twice = (2 * scipy.stats.t.cdf(k, sets - 1) - 1 for k in (1, 2))
    return (
        f"standard errors of the mean over {sets} sets of samples, from their spread: of so few, +- 1 covers "
        f"{once:.0%} and +- 2 {twice:.0%} of cases; the data are the same for all (errors of their "
        f"own numbers: by the jackknife over {groups} groups of examples)"
    )


def describe_model(task: Task) -> dict[str, Any]:
    """Which model it is."""
    model, trained = task.model, task.model.checkpoint.content["config"]
    names = {key: str(trained.get(key, {}).get("_target_", "")).rsplit(".", 1)[-1] for key in ("sde", "model")}
    ema = task.config["ema"]
    return {
        "run": str(model.run.path),
        "checkpoint": model.checkpoint.path.name,
        "step": model.checkpoint.step,
        "weights": {True: "averaged", False: "last"}.get(ema, f"averaged, {ema}"),
        "hash": weights_hash(model),
        "sde": names["sde"],
        "network": names["model"],
    }


def weights_hash(model: Model) -> str:
    """SHA-256 of the network's weights as they are used."""
    return digest_of_tensors(dict(model.denoiser.network.state_dict()))


def describe_data(task: Task) -> dict[str, Any]:
    """The data, and what becomes of a network's output before it is compared with them."""
    info = task.info
    changes = dict(task.config["data"])
    own = (
        changes if "_target_" in changes else {**(task.model.checkpoint.content["config"].get("data") or {}), **changes}
    )
    options = {key: value for key, value in own.items() if key not in ("_target_", "root", "path", "download")}
    found = {"data": info.name, "kind": info.kind, "shape": list(info.shape), "options": options}
    if info.kind == "pixels":
        found["decoding"] = (
            f"[{info.low:g}, {info.high:g}] to 0 .. 255, rounded to the nearest whole number and cut off, before "
            "features are computed"
        )
    return found


def cost(task: Task, found: Found) -> dict[str, Any]:
    """NFE and time per sample, and where."""
    rows: dict[str, Any] = {}
    n = sum(map(len, found.drawn))
    nfe = [each.nfe for each in found.drawn if each.nfe is not None]
    if nfe:
        seconds = sum(each.seconds for each in found.drawn)
        mean = sum(nfe) / len(nfe)
        rows = {"nfe": int(mean) if mean == int(mean) else round(mean, 2)}
        rows["milliseconds_per_sample"] = round(1000 * seconds / n, 3)
        rows["processes"] = world().size  # whose times are added
    elif (drawn := found.sampling.get("drawn")) and isinstance(drawn.get("nfe"), int | float):
        rows = {"nfe": drawn["nfe"]}
    return rows | {"seconds_of_metrics": round(found.seconds, 2)}


def options_of(metric: Metric) -> dict[str, Any]:
    """The options of a metric, plain values."""
    found = {item.name: getattr(metric, item.name) for item in fields(metric)}  # type: ignore[arg-type]  # dataclasses
    return {key: list(x) if isinstance(x, tuple) else x for key, x in found.items()}


def diagnostics_of(task: Task) -> str:
    """What the diagnostics were computed from, in words."""
    asked = asdict(task.asked)
    text = f"{asked['examples']} examples of a split at most, chosen by seed {asked['seed']}, {asked['repeats']} "
    text += f"draw{'s' if asked['repeats'] > 1 else ''} of noise each; errors over examples"
    if "score" in asked["names"]:
        text += f"; the exact score is that of {exact_of(task.dataset, task.labeled)}"
    return text


def versions(device: torch.device) -> dict[str, Any]:
    """Of what computed the numbers, and where."""
    here = environment(device)
    packages = {key: value for key, value in here["packages"].items() if key in ("sde", "torch", "numpy", "scipy")}
    return {"python": here["python"], **packages, "git": here["git"], "device": here["device"]}


def known_likelihood(task: Task) -> dict[str, Any] | None:
    """The newest likelihood of this checkpoint that the run's metrics.jsonl has; None for none."""
    run, step = task.model.run, task.model.checkpoint.step
    if not run.metrics.is_file():
        return None
    for line in reversed(read_metrics(run.metrics)):
        for key, value in line.items():
            parts = key.split("/")
            if line["step"] == step and parts[0] == "likelihood" and parts[-1] == "bits_per_dim":
                prefix = f"likelihood/{parts[1]}"
                known = {name: line.get(f"{prefix}/{name}") for name in ("standard_error", "n", "kind", "folder")}
                return {"bits_per_dim": value, "split": parts[1], **known, **_place(run.path, str(known["folder"]))}
    return None


def _place(run: Path, folder: str) -> dict[str, Any]:
    """Where the folder of a likelihood is now, and which weights it is of."""
    places = [Path(folder), run / "likelihood" / Path(folder).name]
    place = next((each for each in places if (each / "likelihood.json").is_file()), None)
    if place is None:
        return {"link": None, "ema": "unknown"}
    return {"link": str(place.resolve()), "ema": json.loads((place / "likelihood.json").read_text()).get("ema")}


def record_name(task: Task, sampling: Mapping[str, Any], n: int) -> str:
    """What the files of an evaluation are called."""
    if "samples" in sampling:
        way = Path(sampling["samples"]).stem
    else:
        steps = "" if sampling["steps"] is None else f"-{sampling['steps']}"
        way = f"{SOLVERS.name_of(type(build(task.config['solver'], 'solver')))}{steps}"
    return f"{way}-{task.extractor.name}-{thousands(n)}-step{task.model.checkpoint.step}"


# Files


def write_all(task: Task, record: dict[str, Any], found: Found, folder: Path) -> list[Path]:
    """Record, card, pictures and overview; gives the files, the card first."""
    folder.mkdir(parents=True, exist_ok=True)
    name = free_name(folder, record_name(task, found.sampling, record["n"]), record)
    if record["likelihood"] is not None and record["likelihood"]["link"] is not None:
        record["likelihood"]["link"] = os.path.relpath(record["likelihood"]["link"], folder.resolve())
    record["pictures"] = save_samples(task, found.drawn[0], folder, name)
    if found.diagnostics:
        (folder / f"{name}-diagnostics").mkdir(exist_ok=True)
        paths = save_diagnostics(folder / f"{name}-diagnostics", found.diagnostics)
        record["diagnostic_pictures"] = [str(path.relative_to(folder)) for path in paths]
    card = write_card(folder, name, record)
    return [card, card.with_suffix(".json"), *write_overview(folder, record)]


def save_samples(task: Task, drawn: Described, folder: Path, name: str) -> dict[str, str]:
    """Pictures of samples, by their names with what they show."""
    found = {}
    if task.info.kind == "pixels":
        save_grid(folder / f"{name}.png", drawn.examples[:_SHOWN])
        found[f"{name}.png"] = f"{min(_SHOWN, len(drawn.examples))} samples"
        if "memorization" in task.metrics:
            x = drawn.examples[:_BESIDE]
            save_rows(folder / f"{name}-nearest.png", [("samples", x), ("nearest\nin training", closest(task, x))])
            found[f"{name}-nearest.png"] = "samples, and below each the training example that is nearest to it"
    elif task.info.shape == (2,):
        data = task.dataset.split("test").values
        save_scatter(folder / f"{name}.png", drawn.examples, data if len(data) else None)
        found[f"{name}.png"] = "samples, and held-out data in gray"
    return found


def closest(task: Task, x: Tensor) -> Tensor:
    """For each of the stored examples x (k, ...) the training example that is nearest to it, as it is stored."""
    values, ours = task.dataset.split("train").values, task.info.encode(x).flatten(1)
    best, index = torch.full((len(x),), torch.inf, dtype=torch.float64), torch.zeros(len(x), dtype=torch.long)
    for start in range(0, len(values), _BLOCK):
        distance, row = (y[:, 0] for y in nearest(ours, task.info.encode(values[start : start + _BLOCK]).flatten(1)))
        index = torch.where(distance < best, row + start, index)
        best = torch.minimum(distance, best)
    return values[index]


# What is told


def print_table(record: Mapping[str, Any]) -> None:
    """The scores, and the likelihood where it was computed, aligned."""
    print_rows(table(record["scores"]))
    if record["likelihood_of_splits"]:
        print_rows(likelihood_rows(record["likelihood_of_splits"]))
    if "milliseconds_per_sample" in record["cost"]:
        print(f"{record['cost']['nfe']} evaluations and {record['cost']['milliseconds_per_sample']} ms a sample")


def print_rows(rows: Sequence[Mapping[str, str]]) -> None:
    """A table on the terminal."""
    columns = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    for row in ({name: name for name in columns}, *rows):
        print("  ".join(row[name].ljust(widths[name]) for name in columns).rstrip())


def note(task: Task, record: Mapping[str, Any], card: Path, logger: Logger) -> None:
    """A line in the run's metrics.jsonl, and what the logger is to show; not of samples that may be another's."""
    ours = record["sampling"].get("of_the_model", True)
    scores = record["scores"] if ours else []
    if not ours:
        print(f"not in the metrics of {task.model.run.path}: nothing says that these samples are of its checkpoint")
        if not record["diagnostics"] and not record["likelihood_of_splits"]:
            return
    numbers = {f"evaluation/{each['label']}": each["value"] for each in scores if each["value"] is not None}
    errors = {f"evaluation/{each['label']}/error": each["error"] for each in scores if each["error"] is not None}
    diagnostics = {f"evaluation/{name}": value for name, value in means(record["diagnostics"]).items()}
    cost = {f"evaluation/{name}": record["cost"][name] for name in ("nfe",) if name in record["cost"]}
    measured = record["likelihood_of_splits"]
    likelihood, words = likelihood_numbers(measured) if measured else ({}, {})
    notes = {"evaluation/kind": card.stem, "evaluation/folder": str(card.parent), **words}
    shown = [*(record["pictures"] if ours else ()), *record["diagnostic_pictures"]]
    files = [card.parent / name for name in shown]
    pictures = {f"evaluation/{file.stem}": file for file in files}
    note_result(task.model, numbers | errors | diagnostics | likelihood | cost, notes, pictures, logger)
