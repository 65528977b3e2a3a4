"""`python -m sde.ema`: averaged weights of another width, after the training.

    python -m sde.train ... ema.std=[0.05,0.1] ema.snapshot_every=1000
    python -m sde.ema run=RUN std=[0.03,0.07,0.15]
    python -m sde.sample checkpoint=RUN/ema/std0.070-step-00100000.pt

The snapshots in RUN/ema are summed up to the power-function average of any relative width (`sde.training.posthoc`).
What is written is a checkpoint with averaged weights alone, which every command takes, and profiles.png, which shows
how the wanted average weighs the training and how the sum does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sde.cli import run_command
from sde.data import DataInfo
from sde.errors import UserError, check_number
from sde.files import atomic_write
from sde.pictures import Line, save_lines
from sde.runs import Run, build_denoiser, find_run, open_checkpoint
from sde.training.checkpoint import VERSION, Checkpoint
from sde.training.ema import FOLDER, WIDEST, EMAOptions
from sde.training.posthoc import Fit, Profile, Snapshot, fit_profile, list_snapshots, profiles_of, weighted_sum

_POOR = 0.05  # a relative error of the profile that the user is warned of
_POINTS = 2000  # of a plotted profile


def main() -> None:
    """Entry point of the command line."""
    run_command("ema", make_averages)


def make_averages(config: dict[str, Any]) -> None:
    """Write the averages of all widths in `std` at `step` as `config` says."""
    widths = chosen_widths(config["std"])
    run = find_run(config["run"], Path(str(config["runs"])))
    checkpoint = open_checkpoint(run, "latest")
    info = DataInfo.from_dict(checkpoint.content["data"])
    network = build_denoiser(checkpoint.content["config"], info).network
    snapshots = list_snapshots(run.path / FOLDER, network)
    if not snapshots:
        raise UserError(
            f"{run.path / FOLDER} has no snapshots to make an average of: train with "
            "ema.std=[0.05,0.1] ema.snapshot_every=STEPS"
        )
    step = chosen_step(config["step"], run, snapshots)
    folder = run.path / FOLDER if config["out"] is None else Path(str(config["out"])).expanduser()
    known = profiles_of(snapshots)
    wanted = [Profile(step, std) for std in widths]
    fits = [fit_profile(known, profile) for profile in wanted]
    for profile, fit in zip(wanted, fits, strict=True):
        state = weighted_sum(snapshots, fit.coefficients, network)
        path = save_average(folder, checkpoint, profile, fit, snapshots, state)
        print(f"{path}: relative error of the profile {fit.error:.1e}, from {len(known)} averages")
        if fit.error > _POOR:
            print(f"warning: {advice(profile, fit, snapshots)}", file=sys.stderr)
    picture = folder / "profiles.png"
    plot(picture, known, wanted, fits)
    print(picture)


def chosen_widths(given: Any) -> list[float]:
    """The relative widths that `std` lists, each once.

    Raises:
        UserError: without any, or for one that is out of range.
    """
    widths = given if isinstance(given, list) else [given]
    if not widths or widths in ([None], [""]):
        written = "[]" if given == [] else ""
        raise UserError(f"std={written} names no width: give one or several, such as std=[0.05,0.1]")
    for std in widths:
        if isinstance(std, bool) or not isinstance(std, int | float):
            raise UserError(
                f"std={std!r} is not a number: it is the relative width of the average to make, such as std=0.1"
            )
        check_number("std", std, above=0, below=WIDEST)
    return list(dict.fromkeys(float(std) for std in widths))


def chosen_step(given: Any, run: Run, snapshots: Sequence[Snapshot]) -> int:
    """The step at which the average ends: `step`, or that of the last snapshot.

    Raises:
        UserError: for one that is before the first snapshot or after the last.
    """
    first, last = snapshots[0].step, snapshots[-1].step
    if given is None:
        return last
    if not isinstance(given, int) or isinstance(given, bool):
        raise UserError(f"step={given!r} must be a whole number")
    if not first <= given <= last:
        raise UserError(f"step={given} is outside the snapshots of {run.path}: give one from {first} to {last}")
    return given


def advice(profile: Profile, fit: Fit, snapshots: Sequence[Snapshot]) -> str:
    """What to say of a poor fit."""
    steps = [snapshot.step for snapshot in snapshots]
    text = f"these snapshots cannot give std={profile.std:g} at step {profile.step} (error {fit.error:.1g})"
    if profile.step not in steps:
        near = min(steps, key=lambda step: abs(step - profile.step))
        return f"{text}: take the step of one, such as step={near}, or keep them more often (ema.snapshot_every)"
    return f"{text}: keep them more often (ema.snapshot_every), or take a width nearer to those that were tracked"


def checkpoint_name(profile: Profile) -> str:
    """What the file of an average is called: std0.070-step-00001000.pt."""
    rounded = f"{profile.std:.3f}"
    text = rounded if float(rounded) == profile.std else repr(profile.std)
    return f"std{text}-step-{int(profile.step):08d}.pt"


def save_average(
    folder: Path,
    checkpoint: Checkpoint,
    profile: Profile,
    fit: Fit,
    snapshots: Sequence[Snapshot],
    state: dict[str, torch.Tensor],
) -> Path:
    """Write a checkpoint that holds one average alone, with the configuration of the run's own `checkpoint`."""
    options = asdict(EMAOptions(decay=(), std=(profile.std,)))
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    content = {
        "version": VERSION,
        "step": int(profile.step),
        "config": {**checkpoint.content["config"], "ema": listed},
        "data": checkpoint.content["data"],
        "model": None,
        "ema": state,
        "made_of": {"snapshots": [snapshot.path.name for snapshot in snapshots], "error": fit.error},
    }
    path = folder / checkpoint_name(profile)
    with atomic_write(path) as file:
        torch.save(content, file)
    return path


def plot(path: Path, known: Sequence[Profile], wanted: Sequence[Profile], fits: Sequence[Fit]) -> None:
    """Draw how the wanted averages weigh the training (dashed), and how the sums of snapshots do."""
    tau = torch.linspace(0, float(known[-1].step), _POINTS + 1, dtype=torch.float64)[1:]
    table = torch.stack([profile(tau) for profile in known])
    pairs = []
    for profile, fit in zip(wanted, fits, strict=True):
        made = torch.tensor(fit.coefficients, dtype=torch.float64) @ table
        name = f"std {profile.std:g}"
        pairs.append(
            (
                Line(f"{name}, error {fit.error:.1e}", tau.tolist(), made.tolist()),
                Line(f"{name}, wanted", tau.tolist(), profile(tau).tolist(), dashed=True),
            )
        )
    save_lines(path, pairs, f"averages at step {int(wanted[0].step)}", "step", "weight of a step")


if __name__ == "__main__":
    main()
