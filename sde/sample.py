"""`python -m sde.sample`: draw samples from a trained run, as arrays and pictures."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde.cli import Interrupted, run_command
from sde.commands import (
    BAR,
    check_settings,
    chosen_grid,
    class_labels,
    new_folder,
    open_model,
    write_samples,
)
from sde.config import build
from sde.data import DataInfo
from sde.denoiser import Denoiser
from sde.devices import autocast, pick_device
from sde.distributed import any_signal, collect, is_main, on_main, own_batches, world
from sde.errors import UserError, check_choice, check_flag
from sde.files import write_json
from sde.grids import GRIDS, Grid
from sde.pictures import save_grid, save_scatter, save_score_field
from sde.progress import progress_bar
from sde.sampling import NOISES, Plan, denoised_at_the_end, draw_batch, make_times
from sde.solvers import SOLVERS, Solver
from sde.training.checkpoint import Checkpoint
from sde.training.stopping import StopRequest
from sde.trajectory import Trajectory, can_be_shown

_SHOWN = 256  # pictures in a grid


def main() -> None:
    """Entry point of the command line."""
    run_command("sample", sample, several=True)


def sample(config: dict[str, Any]) -> None:
    """Draw `n` samples as `config` says and write them into the run's folder. Several processes share the batches."""
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
    folder = on_main(lambda: new_folder(run, config["out"], default_name(solver, plan)))
    try:
        started = time.perf_counter()
        with autocast(device, config["precision"]):
            samples, nfe, asked_to_stop = draw_all(denoiser, plan, info, config["n"], config["batch_size"], labels)
        seconds = time.perf_counter() - started
        n = len(samples)
        if not is_main():
            return
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
        if is_main():
            with contextlib.suppress(OSError):  # not empty unless the first file could not be written
                folder.rmdir()
    for file in sorted(folder.iterdir()):
        print(file)


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
        "processes": world().size,
        "precision": config["precision"],
        "device": str(plan.device),
        "checkpoint": str(checkpoint.path),
        "ema": config["ema"],
    }


def default_name(solver: Solver, plan: Plan) -> str:
    """What a folder of samples is called: after solver, steps and seed."""
    steps = "" if solver.default_steps is None else f"-{len(plan.times) - 1}"
    return f"{SOLVERS.name_of(type(solver))}{steps}-seed{plan.seed}"


def draw_all(
    denoiser: Denoiser, plan: Plan, info: DataInfo, n: int, batch_size: int, labels: Tensor | None
) -> tuple[Tensor, list[int], int | None]:
    """Samples, decoded (uint8 pixels or float32 vectors) on the CPU, and the evaluations of each batch.

    Asked to stop (SIGINT, SIGTERM), it leaves between two steps with the batches that are done, and gives the signal.

    Raises:
        Interrupted: when none is.
    """
    own = own_batches(n, batch_size)
    mine = sum(len(indices) for indices in own.values())
    drawn: dict[int, tuple[Tensor, int]] = {}
    with StopRequest().listening() as stop, progress_bar(n, unit="sample", desc="sampling", bar_format=BAR) as bar:
        done = 0

        def progress(share: float, _t: float, _x: Tensor | None) -> None:
            if stop.signal is not None:
                raise _Stopped
            bar.update((done + share * len(indices)) / mine * n - bar.n)

        with contextlib.suppress(_Stopped):
            for number, indices in own.items():
                label = None if labels is None else labels[indices.start : indices.stop].to(plan.device)
                solution = draw_batch(denoiser, plan, indices, label, progress)
                finite = torch.isfinite(solution.x)
                if not bool(finite.all()):
                    warning = f"warning: {int((~finite).sum())} values of this batch are not finite"
                    print(f"\n{warning}", file=sys.stderr, flush=True)  # every process says it of its own batches
                drawn[number] = info.decode(solution.x).cpu(), solution.nfe
                done += len(indices)
    signal = any_signal(stop.signal)
    found = collect(drawn)
    if not found and signal is not None:
        raise Interrupted("interrupted; nothing was left half-written", 128 + signal)
    samples = torch.cat([x for x, _ in found]) if found else torch.empty(0)
    return samples, [nfe for _, nfe in found], signal


class _Stopped(Exception):
    """Leaves a solver between two steps."""


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
    """An animation of the first `n` samples' way from noise to data."""
    if not can_be_shown(info):
        print(f"trajectory=true has no picture for data of shape {tuple(info.shape)}: left out")
        return
    way = Trajectory(denoiser.sde, plan.times, n)
    label = None if labels is None else labels[:n].to(plan.device)
    solution = draw_batch(denoiser, plan, range(n), label, way.keep)
    way.save(path, solution.x, info)


if __name__ == "__main__":
    main()
