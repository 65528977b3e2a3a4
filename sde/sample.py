"""`python -m sde.sample`: draw samples from a trained run, as arrays and pictures."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sde.cli import Interrupted, run_command
from sde.config import build
from sde.data import DataInfo
from sde.denoiser import Denoiser
from sde.devices import PRECISIONS, autocast, cast_weights, compile_network, keep_memory, pick_device
from sde.errors import UserError, check_choice, check_flag, check_number
from sde.files import atomic_write, write_json
from sde.grids import GRIDS, Grid
from sde.pictures import save_animation, save_grid, save_scatter, save_score_field, scatter, tile
from sde.progress import progress_bar
from sde.randomness import sample_seed
from sde.runs import Run, find_run, open_checkpoint, restore_denoiser
from sde.sampling import NOISES, Plan, denoised_at_the_end, draw, draw_batch, make_times
from sde.solvers import SOLVERS, Solver
from sde.training.checkpoint import Checkpoint
from sde.training.stopping import StopRequest

_FRAMES = 60  # of a trajectory
_SHOWN = 256  # pictures in a grid


def main() -> None:
    """Entry point of the command line."""
    run_command("sample", sample)


def sample(config: dict[str, Any]) -> None:
    """Draw `n` samples as `config` says and write them into the run's folder."""
    check_settings(config)
    check_flag("trajectory", config["trajectory"])
    check_choice("noise", config["noise"], NOISES)
    device = pick_device(config["device"])
    solver: Solver = build(config["solver"], "solver")
    grid = chosen_grid(config)
    run, checkpoint, denoiser, info = open_model(config, device)
    if config["noise"] == "path" and solver.stochastic and not solver.follows_path:
        raise UserError(
            f"noise=path cannot be followed by solver={SOLVERS.name_of(type(solver))}, whose draws do not belong to "
            f"steps: leave it out, or take a solver of the reverse SDE such as dpmpp_2m_sde or euler_maruyama"
        )
    times = make_times(solver, denoiser, grid, config["steps"])
    if config["denoise"]:
        solver = denoised_at_the_end(solver, denoiser, times)
    plan = Plan(solver, times, info.shape, config["seed"], device, noise=config["noise"])
    labels = class_labels(config["label"], config["n"], denoiser, info)
    folder = new_folder(run, config["out"], default_name(solver, plan))
    try:
        started = time.perf_counter()
        with autocast(device, config["precision"]):
            samples, nfe, asked_to_stop = draw_all(denoiser, plan, info, config["n"], config["batch_size"], labels)
        seconds = time.perf_counter() - started
        n = len(samples)
        write_samples(folder / "samples.npz", samples, info, None if labels is None else labels[:n])
        write_json(folder / "info.json", describe(config, solver, grid, plan, nfe, seconds, checkpoint, n))
        print(f"{n} samples in {seconds:.1f} s, {max(nfe)} evaluations each, from {checkpoint.path}")
        draw_pictures(folder, samples, info, denoiser, plan)
        if asked_to_stop is not None:
            raise Interrupted(f"interrupted: {n} of {config['n']} samples are in {folder}", 128 + asked_to_stop)
        if config["trajectory"]:
            with autocast(device, config["precision"]):
                draw_trajectory(folder / "trajectory.gif", denoiser, plan, info, min(config["n"], 64), labels)
    finally:
        with contextlib.suppress(OSError):  # not empty unless the first file could not be written
            folder.rmdir()
    for file in sorted(folder.iterdir()):
        print(file)


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
    for name in ("ema", "denoise"):
        check_flag(name, config[name])
    check_choice("precision", config["precision"], PRECISIONS)


def chosen_grid(config: dict[str, Any]) -> Grid | None:
    """The grid that was asked for; None for each solver's own."""
    return None if config["grid"].get("_target_") is None else build(config["grid"], "grid")


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


def describe(
    config: dict[str, Any],
    solver: Solver,
    grid: Grid | None,
    plan: Plan,
    nfe: list[int],
    seconds: float,
    checkpoint: Checkpoint,
    n: int,
) -> dict[str, Any]:
    """What info.json says: everything that made the samples, and what they cost."""
    return {
        "solver": SOLVERS.name_of(type(solver)),
        "options": asdict(solver),  # type: ignore[call-overload]  # solvers are dataclasses
        "grid": GRIDS.name_of(type(grid)) if grid is not None else solver.grid_name,
        "steps": None if solver.default_steps is None else len(plan.times) - 1,
        "times": list(plan.times),
        "nfe": max(nfe),
        "nfe_per_batch": nfe,
        "n": n,
        "seconds": round(seconds, 3),
        "seeds": {"seed": config["seed"], "samples": [0, n - 1]},
        "noise": plan.noise,
        "label": config["label"],
        "batch_size": config["batch_size"],
        "precision": config["precision"],
        "device": str(plan.device),
        "checkpoint": str(checkpoint.path),
        "ema": config["ema"],
    }


def locate(config: dict[str, Any]) -> tuple[Run, str]:
    """The run, and which of its checkpoints; a checkpoint given by its path names its run too."""
    which = str(config["checkpoint"])
    if which != "latest" and not which.isdigit() and config["run"] is None:
        path = Path(which).expanduser()
        return Run(path.parent.parent if path.parent.name == "checkpoints" else path.parent), which
    return find_run(config["run"], Path(str(config["runs"]))), which


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


def default_name(solver: Solver, plan: Plan) -> str:
    """What a folder of samples is called: after solver, steps and seed."""
    steps = "" if solver.default_steps is None else f"-{len(plan.times) - 1}"
    return f"{SOLVERS.name_of(type(solver))}{steps}-seed{plan.seed}"


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


def draw_all(
    denoiser: Denoiser, plan: Plan, info: DataInfo, n: int, batch_size: int, labels: Tensor | None
) -> tuple[Tensor, list[int], int | None]:
    """Samples, decoded (uint8 pixels or float32 vectors) on the CPU, and the evaluations of each batch.

    Asked to stop (SIGINT, SIGTERM), it leaves between two steps with the batches that are done, and gives the signal.

    Raises:
        Interrupted: when none is.
    """
    batches: list[Tensor] = []
    nfe: list[int] = []
    with StopRequest().listening() as stop, progress_bar(n, unit="sample", desc="sampling", bar_format=_BAR) as bar:

        def progress(share: float) -> None:
            if stop.signal is not None:
                raise _Stopped
            bar.update(share * n - bar.n)

        with contextlib.suppress(_Stopped):
            for solution in draw(denoiser, plan, n, batch_size, labels, progress):
                finite = torch.isfinite(solution.x)
                if not bool(finite.all()):
                    print(f"\nwarning: {int((~finite).sum())} values of this batch are not finite", flush=True)
                batches.append(info.decode(solution.x).cpu())
                nfe.append(solution.nfe)
    if not batches and stop.signal is not None:
        raise Interrupted("interrupted; nothing was left half-written", 128 + stop.signal)
    return torch.cat(batches), nfe, stop.signal


class _Stopped(Exception):
    """Leaves a solver between two steps."""


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


def write_samples(path: Path, samples: Tensor, info: DataInfo, labels: Tensor | None) -> None:
    """samples.npz: `samples` uint8 (N, H, W, C) or float32 (N, ...), and `labels` (N,) when there are any."""
    array = samples.permute(0, 2, 3, 1) if info.kind == "pixels" else samples
    arrays = {"samples": np.ascontiguousarray(array.numpy())}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def draw_pictures(folder: Path, samples: Tensor, info: DataInfo, denoiser: Denoiser, plan: Plan) -> None:
    """grid.png for pictures; scatter.png and score_field.png for points in the plane."""
    if info.kind == "pixels":
        save_grid(folder / "grid.png", samples[:_SHOWN])
    elif info.shape == (2,):
        save_scatter(folder / "grid.png", samples, title=f"{len(samples)} samples")
        finite = samples[torch.isfinite(samples).all(1)]
        limit = max(0.1, 1.2 * float(finite.abs().quantile(0.99)) if len(finite) else 0.0)
        save_score_field(folder / "score_field.png", denoiser, limit, plan.device)


@torch.no_grad()
def draw_trajectory(path: Path, denoiser: Denoiser, plan: Plan, info: DataInfo, n: int, labels: Tensor | None) -> None:
    """An animation of the first `n` samples' way from noise to data, scaled to constant spread."""
    if info.kind != "pixels" and info.shape != (2,):
        print(f"trajectory=true has no picture for data of shape {tuple(info.shape)}: left out")
        return
    sde, frames = denoiser.sde, []
    every = max(1, len(plan.times) // _FRAMES)
    seen = 0

    def keep(_share: float, t: float, x: Tensor | None) -> None:
        nonlocal seen
        if x is None:
            return
        seen += 1
        if seen % every == 0 or t == plan.times[-1]:
            # x_t of data with standard deviation 1/2, brought back to that standard deviation
            spread = float(torch.hypot(0.5 * sde.alpha(t), sde.sigma(t)))
            frames.append((x * (0.5 / spread)).cpu())

    label = None if labels is None else labels[:n].to(plan.device)
    solution = draw_batch(denoiser, plan, range(n), label, keep)
    frames.append(solution.x.cpu())
    if info.kind == "pixels":
        save_animation(path, [tile(info.decode(frame)) for frame in frames])
    else:
        limit = max(0.1, 1.2 * max(float(frame.nan_to_num(0, 0, 0).abs().quantile(0.995)) for frame in frames))
        save_animation(path, [scatter(frame, limit=limit) for frame in frames])


if __name__ == "__main__":
    main()
