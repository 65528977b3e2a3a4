"""`python -m sde.doctor`: what training would meet here - machine, data, noise levels, memory, speed - and advice.

It takes the options of `python -m sde.train`, trains for some seconds, and writes nothing but what out= names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sde.cli import run_command
from sde.config import build
from sde.data import Dataset
from sde.devices import keep_memory, pick_device
from sde.distributed import is_main, world
from sde.doctoring.advice import advise
from sde.doctoring.data import examine_data
from sde.doctoring.findings import Findings
from sde.doctoring.machine import Machine, examine_machine
from sde.doctoring.model import ModelFacts, examine_model
from sde.doctoring.noise import examine_noise
from sde.doctoring.report import (
    data_lines,
    machine_lines,
    model_lines,
    noise_lines,
    numbered,
    section,
    speed_lines,
)
from sde.doctoring.speed import Speed, measure_speed
from sde.errors import UserError, check_flag, check_number
from sde.files import write_json
from sde.processes import SDE
from sde.runs import RUNS, ema_options
from sde.train_setup import make_trainer
from sde.training.ema import EMAOptions
from sde.training.options import TrainingOptions


def main() -> None:
    """Entry point of the command line."""
    run_command("doctor", doctor, several=True)


def doctor(config: dict[str, Any]) -> None:
    """Print what a training of `config` would meet, section by section, and advice."""
    seconds, out = config.pop("seconds"), config.pop("out")
    check_number("seconds", seconds, above=0)
    target = None if out is None else checked_file(out)
    if config.pop("resume", None) is not None:
        raise UserError("resume= is for python -m sde.train: leave it out, and give the options of the run instead")
    check_flag("conditional", config["conditional"])
    options = preliminary(config)
    ema = ema_options(config["ema"])
    sde: SDE = build(config["sde"], "sde")
    if isinstance(config["preview_solver"], str):
        raise UserError(f"preview_solver={config['preview_solver']}: write solver@preview_solver=... to choose it")
    for node, group in (("logger", "logger"), ("preview_solver", "solver")):
        build(config[node], group)  # what is wrong with them is said before anything is measured
    if not is_main():  # of several processes one says what all would say
        return
    device = pick_device(options.device, "training.device")
    keep_memory(device)
    found = diagnose(config, options, ema, sde, device, seconds)
    advice = advise(found)
    print(numbered("Advice", advice) if advice else "Advice\n  none: all is well")
    if target is not None:
        write_json(target, {**record(found), "advice": advice})


def preliminary(config: Mapping[str, Any]) -> TrainingOptions:
    """The options of training, with the least batch for one that is yet to be found.

    Raises:
        UserError: for a value that cannot be, or one that several processes would have to find together.
    """
    node = config["training"]
    if node["batch_size"] == "auto":
        if world().size > 1:
            raise UserError("training.batch_size=auto is found by all processes together: give a number, or leave them")
        node = {**node, "batch_size": node["accumulation"]}
    options: TrainingOptions = build(node, "training")
    return options


def diagnose(
    config: dict[str, Any],
    options: TrainingOptions,
    ema: EMAOptions,
    sde: SDE,
    device: torch.device,
    seconds: float,
) -> Findings:
    """Find everything out, printing each section as soon as it is known."""
    machine = examine_machine(RUNS)
    show("Machine", machine_lines(machine, device.type, options.precision))
    dataset: Dataset = build(config["data"], "data")
    data = examine_data(dataset, options.seed, device)
    show("Data", data_lines(data))
    noise = examine_noise(sde, data)
    show("Noise", noise_lines(noise, data))
    if config["training"]["batch_size"] == "auto":
        options = make_trainer(config, dataset, device).options
        config = {**config, "training": {**config["training"], "batch_size": options.batch_size}}
    free = free_memory(machine, device)
    model = examine_model(config, dataset.info, options, free, len(ema.names), machine.processes)
    show("Network", model_lines(model))
    speed = None if machine.processes > 1 else measured(config, dataset, device, model, options, seconds)
    show("Speed", speed_lines(speed, machine))
    return Findings(config, options, ema, device.type, machine, data, noise, model, speed)


def show(title: str, lines: list[tuple[str, str]]) -> None:
    """Print a section at once, for what follows may take long."""
    print(section(title, lines) + "\n", flush=True)


def free_memory(machine: Machine, device: torch.device) -> int | None:
    """Bytes that training could have on `device`; None if unknown."""
    return machine.memory_free if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def measured(
    config: Mapping[str, Any],
    dataset: Dataset,
    device: torch.device,
    model: ModelFacts,
    options: TrainingOptions,
    seconds: float,
) -> Speed | None:
    """The speed, in as few parts of a batch as fit; None when one example is too much."""
    fewest = options.accumulation if model.free is None else model.fitting
    if fewest is None:
        return None
    for parts in range(fewest, options.batch_size + 1):
        if options.batch_size % parts == 0:
            try:
                return measure_speed(config, dataset, device, options, model.flops, parts, seconds)
            except torch.OutOfMemoryError:  # what kernels take for themselves is not in the estimate
                torch.cuda.empty_cache()
    return None


def checked_file(out: object) -> Path:
    """The file to write the findings to.

    Raises:
        UserError: when it is a folder.
    """
    path = Path(str(out)).expanduser()
    if path.is_dir():
        raise UserError(f"out={out} is a folder: name a file, such as out={path / 'doctor.json'}")
    return path


def record(found: Findings) -> dict[str, Any]:
    """The findings as plain values; what is not a finite number is null."""
    parts: dict[str, Any] = {name: asdict(getattr(found, name)) for name in ("machine", "data", "noise", "model")}
    speed = None if found.speed is None else asdict(found.speed) | found.speed.derived()
    return finite({"device": found.device, **parts, "speed": speed, "config": found.config})


def finite(value: Any) -> Any:
    """Plain values without infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
