"""What `python -m sde.likelihood` is to do, what it found, and the files that say so."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde.commands import Model, note_result
from sde.data import DataInfo, Split
from sde.denoiser import AbstractDenoiser
from sde.density import bits_per_dim, times_to_noise
from sde.density.discrete import ChainBound, DiscreteLogProb, Discretization, Flow, Method
from sde.files import write_json, write_text
from sde.grids import GRIDS
from sde.pictures import save_captioned, save_histogram, save_terms
from sde.solvers import SOLVERS
from sde.training.logging import Logger

_SHOWN = 10  # pictures in a row of the best and the worst


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
        return bits_per_dim(log_prob, self.numel) + 0.0  # no -0.0


@dataclass(eq=False)
class Scores:
    """What was found of n examples, batch by batch.

    Attributes:
        index: which of the split each is, in the order in which they were taken.
        nfe: forward passes of the batch that each was in.
        found: the batches.
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
        """The attribute `name` of `DiscreteLogProb` for all examples, (n, ...) on the CPU."""
        return torch.cat([getattr(batch, name).cpu() for batch in self.found])

    @property
    def parts(self) -> dict[str, Tensor]:
        """name: (n,)."""
        return {name: torch.cat([batch.parts[name].cpu() for batch in self.found]) for name in self.found[0].parts}


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean of `values` (n,) and its standard error, None for one."""
    n = len(values)
    return float(values.mean()), None if n < 2 else float(values.std()) / math.sqrt(n)


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
        "standard_error_of": "the mean over examples, from their spread, which holds that of draws and probes too; "
        "the error of a solver's steps is not in it",
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


def record(config: Mapping[str, Any], task: Task, folder: Path, summary: Mapping[str, Any], logger: Logger) -> None:
    """A line in the run's metrics.jsonl, and what the logger is to show."""
    prefix = f"likelihood/{task.split_name}"
    numbers = {
        f"{prefix}/{name}": math.nan if summary[name] is None else float(summary[name])
        for name in ("bits_per_dim", "standard_error", "log_prob", "n")
    }
    notes = {f"{prefix}/kind": f"{config['method']}-{task.discretization.kind}", f"{prefix}/folder": str(folder)}
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
