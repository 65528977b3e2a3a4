"""What `python -m sde.likelihood` is to do, what it found, and the files that say so."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde.commands import Model, note_result
from sde.data import DataInfo, Split
from sde.density.likelihood import Likelihood, Scores, without_nan
from sde.files import write_json, write_text
from sde.pictures import save_captioned, save_histogram, save_terms
from sde.training.logging import Logger

_SHOWN = 10  # pictures in a row of the best and the worst


@dataclass(frozen=True, eq=False)
class Task:
    """Which examples are evaluated, and how.

    Args:
        model: the run's.
        likelihood: how.
        split: the examples of the data's split.
        split_name: what it is called.
        indices: which of them, (n,), in the order in which they are taken.
        labels: what the network is told of each, (n,), or None.
        batch_size: examples at once.
        seed: of all draws.
        device: where it is.
    """

    model: Model
    likelihood: Likelihood
    split: Split
    split_name: str
    indices: Tensor
    labels: Tensor | None
    batch_size: int
    seed: int
    device: torch.device

    @property
    def info(self) -> DataInfo:
        """The facts about the data."""
        return self.model.info

    def name(self) -> str:
        """What to call a folder of the results."""
        return f"{self.likelihood.name}-{self.split_name}-seed{self.seed}"


def describe(config: Mapping[str, Any], task: Task, scores: Scores, seconds: float) -> dict[str, Any]:
    """What likelihood.json says."""
    return {
        **task.likelihood.summary(scores),
        "asked_for": len(task.indices),
        "split": task.split_name,
        "split_size": len(task.split),
        "seconds": round(seconds, 3),
        "seed": task.seed,
        **task.likelihood.describe(),
        "step": task.model.checkpoint.step,
        "checkpoint": str(task.model.checkpoint.path),
        **{key: config[key] for key in ("ema", "label", "batch_size", "precision", "compile")},
        "device": str(task.device),
    }


def write_scores(folder: Path, summary: Mapping[str, Any], scores: Scores, task: Task) -> None:
    """likelihood.json and pictures.csv; terms.csv for a bound."""
    write_json(folder / "likelihood.json", without_nan(dict(summary)))
    write_text(folder / "pictures.csv", table(rows_of(scores, task)))
    terms = terms_of(scores, task)
    if terms:
        write_text(folder / "terms.csv", table(terms))


def rows_of(scores: Scores, task: Task) -> list[dict[str, Any]]:
    """A row for each example by its number in the split. Parts are in bits per dimension and add up to
    bits_per_dim, unless draws are weighted by importance."""
    columns: dict[str, list[Any]] = {"index": scores.index}
    if task.split.labels is not None:
        columns["label"] = task.split.labels[torch.tensor(scores.index)].tolist()
    columns["bits_per_dim"] = task.likelihood.bits(scores.column("log_prob")).tolist()
    for name in ("log_prob", "standard_error", "trace_error"):
        columns[name] = scores.column(name).tolist()
    if scores.found[0].truncation is not None:
        columns["truncation"] = scores.column("truncation").tolist()
    columns |= {f"bits_{name}": task.likelihood.bits(part).tolist() for name, part in scores.parts.items()}
    columns["nfe"] = scores.nfe
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return sorted(rows, key=lambda row: int(row["index"]))


def terms_of(scores: Scores, task: Task) -> list[dict[str, Any]]:
    """A bound's terms in bits per dimension, by the later time of each, and their standard errors over examples."""
    times = scores.found[0].times
    if times is None:
        return []
    bits = task.likelihood.bits(scores.column("terms"))
    errors = bits.std(0) / math.sqrt(len(bits)) if len(bits) > 1 else torch.full_like(bits[0], math.nan)
    snr = task.likelihood.denoiser.sde.log_snr(times)
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
    bits = task.likelihood.bits(scores.column("log_prob"))
    title = f"{len(scores)} of {task.info.name} ({task.split_name}): {task.likelihood.name}"
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


def record(config: Mapping[str, Any], task: Task, folder: Path, summary: Mapping[str, Any], logger: Logger) -> None:
    """A line in the run's metrics.jsonl, and what the logger is to show."""
    prefix = f"likelihood/{task.split_name}"
    numbers = {
        f"{prefix}/{name}": math.nan if summary[name] is None else float(summary[name])
        for name in ("bits_per_dim", "standard_error", "log_prob", "n")
    }
    notes = {f"{prefix}/kind": task.likelihood.name, f"{prefix}/folder": str(folder)}
    pictures = {f"{prefix}/{path.stem}": path for path in sorted(folder.glob("*.png"))}
    note_result(task.model, numbers, notes, pictures, logger)


def sentence(summary: Mapping[str, Any]) -> str:
    """The result in a line or two."""
    spread = "" if summary["standard_error"] is None else f" +- {summary['standard_error']:.4f}"
    wrong = ""
    if summary["quantization"] is not None and summary["bits_per_dim"] < 0:
        wrong = (
            "\nwarning: no picture is more than certain, so that bits below 0 are the error of the solver's steps: "
            "take more of them, a smaller tolerance, or solver=adams_adaptive"
        )
    return (
        f"{summary['bits_per_dim']:.4f}{spread} bits/dim ({summary['log_prob']:.2f} nats) over {summary['n']} of "
        f"{summary['split_size']} in split={summary['split']}, {summary['seconds']:.1f} s, {summary['nfe']:.0f} "
        f"evaluations each, from {summary['checkpoint']}\n{summary['meaning']}{wrong}"
    )
