"""What the command lines that work on a trained run share: opening it, its data, its labels, a folder for results."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sde.cli import Interrupted
from sde.config import build
from sde.data import DataInfo, Dataset
from sde.denoiser import Denoiser
from sde.devices import PRECISIONS, autocast, cast_weights, compile_network, keep_memory
from sde.errors import UserError, check_choice, check_flag, check_number
from sde.files import atomic_write
from sde.grids import GRIDS, Grid
from sde.latents import Carry, in_batches
from sde.progress import progress_bar
from sde.randomness import sample_seed
from sde.runs import Run, check_ema, find_run, open_checkpoint, restore_denoiser
from sde.solvers import SOLVERS, Solver
from sde.training.checkpoint import Checkpoint
from sde.training.ema import FOLDER
from sde.training.logging import Logger
from sde.training.metrics import append_metrics
from sde.training.stopping import StopRequest

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"  # of progress


# The options


def check_settings(config: dict[str, Any]) -> None:
    """Check the options that all commands drawing samples have.

    Raises:
        UserError: for the first that has no meaning.
    """
    for name in ("n", "batch_size"):
        if not isinstance(config[name], int) or isinstance(config[name], bool):
            raise UserError(f"{name}={config[name]!r} must be a whole number")
        check_number(name, config[name], at_least=1)
    sample_seed(config["seed"], 0)
    check_ema(config["ema"])
    check_flag("denoise", config["denoise"])
    check_choice("precision", config["precision"], PRECISIONS)


def chosen_grid(config: dict[str, Any]) -> Grid | None:
    """The grid that was asked for; None for each solver's own."""
    return None if config["grid"].get("_target_") is None else build(config["grid"], "grid")


# The run


class Model(NamedTuple):
    """A trained model, ready to draw from, and where it comes from."""

    run: Run
    checkpoint: Checkpoint
    denoiser: Denoiser
    info: DataInfo


def open_model(config: dict[str, Any], device: torch.device) -> Model:
    """The model that `run`, `checkpoint` and `ema` name, on `device`, in the wanted precision, compiled if asked."""
    keep_memory(device)
    run, which = locate(config)
    checkpoint = open_checkpoint(run, which)
    denoiser, info = restore_denoiser(checkpoint, ema=config["ema"])
    denoiser.to(device)
    if len(info.shape) == 3:
        denoiser.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    cast_weights(denoiser.network, device, config["precision"])
    compile_network(denoiser.network, device, config["compile"])
    return Model(run, checkpoint, denoiser, info)


def locate(config: dict[str, Any]) -> tuple[Run, str]:
    """The run, and which of its checkpoints; a checkpoint given by its path names its run too."""
    which = str(config["checkpoint"])
    if which != "latest" and not which.isdigit() and config["run"] is None:
        path = Path(which).expanduser()
        return Run(path.parent.parent if path.parent.name in ("checkpoints", FOLDER) else path.parent), which
    return find_run(config["run"], Path(str(config["runs"]))), which


# Its data and labels


def run_dataset(model: Model, changes: Mapping[str, Any]) -> Dataset:
    """The data set of a run, with `changes` to its options, or another one when they name it.

    Raises:
        UserError: when the run does not say which it is, or it does not look as the network expects it.
    """
    own = dict(model.checkpoint.content["config"].get("data") or {})
    node = dict(changes) if "_target_" in changes else {**own, **changes}
    if "_target_" not in node:
        raise UserError(f"run={model.run.path} does not say where its pictures are: name the data set, as data=cifar10")
    dataset: Dataset = build(node, "data")
    check_same_facts(dataset.info, model.info, bool(getattr(model.denoiser.network, "num_classes", 0)))
    return dataset


def was_dequantized(model: Model) -> bool:
    """Whether a run was trained on dequantized pictures."""
    return bool(model.checkpoint.content["config"].get("training", {}).get("dequantize", False))


def check_same_facts(found: DataInfo, wanted: DataInfo, labeled: bool) -> None:
    """Raise `UserError` unless the data `found` look as the network was trained to see them."""
    for name in ("kind", "shape", "low", "high", *(["num_classes"] if labeled else [])):
        theirs, ours = getattr(found, name), getattr(wanted, name)
        if theirs != ours:
            raise UserError(
                f"data={found.name} has {name}={theirs!r} and the run was trained with {name}={ours!r}: "
                "give the data of the run, with data=NAME and data.OPTION=..."
            )


def class_labels(label: Any, n: int, denoiser: Denoiser, info: DataInfo) -> Tensor | None:
    """Labels (n,) as asked: one class, a list of classes in turn, or "all" for each class in turn.

    A class is a number or one of the data's class names. A class-conditional network has to be told one, so None is
    "all" for it; for any other network None is all there is.
    """
    known = int(getattr(denoiser.network, "num_classes", 0))
    if label is None and known == 0:
        return None
    label = "all" if label is None else label
    if known == 0:
        raise UserError(f"label={label!r} needs a class-conditional run and this one is not: train conditional=true")
    wanted: Sequence[Any] = range(known) if label == "all" else label if isinstance(label, list) else [label]
    if not wanted:
        raise UserError("label=[] names no class: give a class, a list of classes, or all")
    numbers = []
    for item in wanted:
        if str(item) in info.class_names:
            numbers.append(info.class_names.index(str(item)))
        elif isinstance(item, int) and 0 <= item < known:
            numbers.append(item)
        else:
            raise UserError(f"label={item!r} is not a class: it is 0 to {known - 1}, or one of the data's class names")
    return torch.tensor([numbers[k % len(numbers)] for k in range(n)])


def condition(label: Any, found: Tensor | None, n: int, model: Model, source: str) -> Tensor | None:
    """The classes (n,) that the network is told: those asked for, or those found beside the examples.

    Raises:
        UserError: when a class-conditional network has none, or one that it does not know.
    """
    known = int(getattr(model.denoiser.network, "num_classes", 0))
    if label is not None or known == 0:
        return class_labels(label, n, model.denoiser, model.info)
    if found is None:
        raise UserError(f"the run is class-conditional and {source} has no labels: give label=CLASS, or a list of them")
    if int(found.min()) < 0 or int(found.max()) >= known:
        raise UserError(
            f"{source} has the labels {int(found.min())} to {int(found.max())} and the run has classes 0 to "
            f"{known - 1}: give label=CLASS"
        )
    return found


# A folder for results


def new_folder(run: Run, out: Any, name: str, below: str = "samples") -> Path:
    """A new folder for results: `out`, or one called `name` in the run's `below`/, with a number where that is taken.

    Raises:
        UserError: when `out` is a folder with something in it.
    """
    if out is not None:
        folder = Path(str(out)).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"out={folder} exists and is not empty: choose a new folder")
    else:
        taken = [""] + [f"-{k}" for k in range(2, 10_000)]
        folder = next(f for f in (run.path / below / (name + suffix) for suffix in taken) if not f.exists())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[None]:
    """Keep a new folder for results only when all of them are in it."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent.name in ("latents", "samples"):
            with contextlib.suppress(OSError):  # others are in it
                folder.parent.rmdir()
        raise


def write_samples(path: Path, samples: Tensor, info: DataInfo, labels: Tensor | None) -> None:
    """samples.npz: `samples` uint8 (N, H, W, C) or float32 (N, ...), and `labels` (N,) when there are any."""
    array = samples.permute(0, 2, 3, 1) if info.kind == "pixels" else samples
    arrays = {"samples": np.ascontiguousarray(array.numpy())}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def note_result(
    model: Model,
    numbers: Mapping[str, float],
    notes: Mapping[str, str],
    pictures: Mapping[str, Path],
    logger: Logger,
) -> None:
    """A line about a checkpoint in the run's metrics.jsonl, where it has one, and what the logger is to show.

    Args:
        model: that was evaluated.
        numbers: by their names.
        notes: words beside them.
        pictures: for the logger.
        logger: is told unless the run is being trained.
    """
    run, step = model.run, model.checkpoint.step
    if run.metrics.is_file():
        try:
            append_metrics(run.metrics, step, numbers, notes)
        except OSError as error:
            print(f"warning: {run.metrics} does not have the result ({error.strerror})", file=sys.stderr)
    if not logger.elsewhere:
        return
    try:
        with run.locked():
            logger.start(run.path, model.checkpoint.content["config"], step)
            try:
                logger.evaluation(step, numbers, pictures)
            finally:
                logger.finish(0)
    except UserError:
        print(f"warning: {run.path} is being trained, so its W&B run was left alone", file=sys.stderr)


# The way between data and codes


def carry_all(
    name: str, carry: Carry, x: Tensor, labels: Tensor | None, config: Mapping[str, Any], device: torch.device
) -> tuple[Tensor, list[int]]:
    """`in_batches` with a progress bar called `name`, which can be interrupted.

    Raises:
        Interrupted: when asked to stop (SIGINT, SIGTERM), between two steps.
    """
    with watched(name, len(x)) as progress, autocast(device, config["precision"]):
        return in_batches(carry, x, config["batch_size"], labels, device, progress)


@contextlib.contextmanager
def watched(name: str, n: int) -> Iterator[Callable[[float], None]]:
    """A bar for `n` examples; gives what to tell the share that is done."""
    with StopRequest().listening() as stop, progress_bar(n, unit="example", desc=name, bar_format=BAR) as bar:

        def progress(share: float) -> None:
            if stop.signal is not None:
                raise Interrupted("interrupted; nothing was left half-written", 128 + stop.signal)
            bar.update(share * n - bar.n)

        yield progress


def check_finite(x: Tensor, what: str = "latents") -> None:
    """Raise `UserError` for codes or samples that are not finite."""
    bad = ~torch.isfinite(x).flatten(1).all(1)
    if bool(bad.any()):
        raise UserError(
            f"{int(bad.sum())} of {len(x)} {what} are not finite: the solver is not stable with these steps, so take "
            "more of them, or solver=dopri5"
        )


def describe_way(solver: Solver, grid: Grid | None, times: list[float]) -> dict[str, Any]:
    """Solver, options and grid for info.json."""
    own = solver.default_steps is None
    return {
        "solver": SOLVERS.name_of(type(solver)),
        "options": asdict(solver),  # type: ignore[call-overload]  # solvers are dataclasses
        "grid": None if own else GRIDS.name_of(type(grid)) if grid is not None else solver.grid_name,
        "steps": None if own else len(times) - 1,
        "t_min": min(times),
        "T": max(times),
    }
