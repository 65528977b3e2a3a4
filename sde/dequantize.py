"""`python -m sde.dequantize`: train a variational dequantizer for the score model of a run, into RUN/dequantizer/.

What it learns and why is in `sde.density.dequantizer`; how, and how others read it, in `sde.training.dequantization`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sde.cli import Interrupted, add_data_overrides, run_command, task_overrides
from sde.commands import Model, open_model, run_dataset
from sde.config import build, options_of
from sde.data import Dataset
from sde.density.dequantizer import Dequantizer, DequantizerOptions
from sde.density.quantization import Quantization
from sde.devices import PRECISIONS, pick_device
from sde.errors import UserError, check_choice
from sde.runs import Run, check_ema
from sde.training.batches import Batches
from sde.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    prune_checkpoints,
    remove_damaged,
    save_checkpoint,
    set_aside,
)
from sde.training.dequantization import (
    FOLDER,
    DequantizationOptions,
    DequantizerTrainer,
    GainValidation,
    Objective,
    fit_dequantizer,
    newest_dequantizer,
    restore_dequantizer,
)
from sde.training.ema import EMA
from sde.training.metrics import MetricsFile, read_metrics
from sde.training.stopping import StopRequest

KEPT = ("flow", "training", "optimizer")  # settings that belong to a dequantizer and not to one command


def main() -> None:
    """Entry point of the command line."""
    add_data_overrides()
    run_command("dequantize", dequantize)


def dequantize(config: dict[str, Any]) -> None:
    """Train a dequantizer as `config` says, from the beginning or on from the newest one of the run."""
    check_ema(config["ema"])
    check_choice("precision", config["precision"], PRECISIONS)
    device = pick_device(config["device"])
    model = open_model({**config, "compile": False}, device)
    check_pixels(model)
    folder = model.run.path / FOLDER
    before = newest_dequantizer(model.run.path) if list_checkpoints(folder) else None
    if before is not None:
        restore_dequantizer(before, model.info)  # whole, and made for these pictures
        config = resumed_config(config, before)
    flow_options = options_of(DequantizerOptions, config["flow"], "flow")
    options = options_of(DequantizationOptions, config["training"], "training")
    dataset = run_dataset(model, config["data"])
    torch.manual_seed(options.seed)
    flow = Dequantizer(model.info.shape, flow_options, Quantization.of(model.info)).to(device)
    labeled = bool(getattr(model.denoiser.network, "num_classes", 0))
    trainer = DequantizerTrainer(
        flow=flow,
        ema=EMA(flow, options.ema_decay),
        objective=Objective(model.denoiser, model.info),
        optimizer=build(config["optimizer"], "optimizer", params=flow.parameters()),
        options=options,
        batches=Batches(dataset, options.batch_size, options.seed, device, labeled),
        precision=config["precision"],
    )
    with Run(folder).locked():
        if before is not None:
            go_on(trainer, before, folder)
            warn_of_change(before, score_model(config, model))
        train(trainer, model, dataset, folder, remembered(config, flow_options, options, model))


def train(
    trainer: DequantizerTrainer, model: Model, dataset: Dataset, folder: Path, settings: Mapping[str, Any]
) -> None:
    """Run the loop, with files in `folder`, and say how it ended."""
    numbers = sum(p.numel() for p in trainer.flow.parameters())
    print(f"data        {dataset.info.name}: {len(trainer.batches.split)} examples of shape {tuple(model.info.shape)}")
    print(f"model       {model.checkpoint.path}")
    going_on = f", going on from step {trainer.step}" if trainer.step else ""
    print(f"dequantizer {folder}, {numbers:,} parameters{going_on}", flush=True)
    metrics = MetricsFile(folder / "metrics.jsonl", trainer.step)
    labeled = trainer.batches.labels is not None
    content = {"config": dict(settings), "data": model.info.to_dict()}

    def save() -> None:
        save_checkpoint(folder, {**content, **trainer.state()})
        prune_checkpoints(folder, trainer.options.keep)
        remove_damaged(folder, trainer.step)

    try:
        with StopRequest().listening() as stop:
            fit_dequantizer(trainer, metrics.log, GainValidation(dataset, trainer, labeled), save, stop)
    finally:
        metrics.close()
    finish(model.run, trainer, folder, stop)


def finish(run: Run, trainer: DequantizerTrainer, folder: Path, stop: StopRequest) -> None:
    """Say what was gained and where it is; leave with the code of the signal when there was one."""
    checkpoint = list_checkpoints(folder)[-1][1]
    if stop.signal is not None:
        raise Interrupted(
            f"stopped at step {trainer.step} and saved {checkpoint}\n"
            f"go on with: python -m sde.dequantize run={run.path}",
            130 if stop.signal == 2 else 0,
        )
    last = read_metrics(folder / "metrics.jsonl")[-1]
    if last.get("val/bits_gained") is not None:
        spread = last["val/bits_gained_error"]
        more_or_less = "" if spread is None else f" +- {spread:.4f}"
        print(f"gained      {last['val/bits_gained']:.4f}{more_or_less} bits/dim over uniform dequantization")
    print(f"checkpoint  {checkpoint}\nmetrics     {folder / 'metrics.jsonl'}")


def check_pixels(model: Model) -> None:
    """Raise `UserError` unless the run has pictures."""
    if model.info.kind != "pixels":
        raise UserError(
            f"run={model.run.path} has data of kind {model.info.kind}, which have no gray levels to dequantize: "
            "give a run of pictures"
        )


def resumed_config(config: Mapping[str, Any], before: Checkpoint) -> dict[str, Any]:
    """`config` with the settings that the dequantizer has, but for those that this command line gives.

    Raises:
        UserError: for a setting that cannot change any more.
    """
    saved = before.content["config"]
    kept = {name: dict(saved[name]) for name in KEPT}
    for override in task_overrides():
        key = override.lstrip("+~").partition("=")[0]
        group, _, name = key.partition(".")
        if group not in KEPT:
            continue
        if group == "flow" or not name:
            value = config[group].get(name) if name else None
            if name and value == kept[group].get(name):
                continue
            raise UserError(
                f"{override} cannot change for the dequantizer that {before.path.parent} holds: leave it out, "
                "or remove that folder to begin anew"
            )
        kept[group][name] = config[group].get(name)
    return {**config, **kept}


def remembered(
    config: Mapping[str, Any], flow: DequantizerOptions, options: DequantizationOptions, model: Model
) -> dict[str, Any]:
    """The settings that a checkpoint holds: plain values."""
    return {
        "flow": asdict(flow),
        "training": asdict(options),
        "optimizer": dict(config["optimizer"]),
        "score_model": score_model(config, model),
    }


def score_model(config: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """Which weights a dequantizer is trained for."""
    return {"checkpoint": model.checkpoint.path.name, "step": model.checkpoint.step, "ema": config["ema"]}


def warn_of_change(before: Checkpoint, now: Mapping[str, Any]) -> None:
    """Say on standard error when the score model is not the one that a dequantizer was trained for so far."""
    then = before.content["config"]["score_model"]
    if then != now:
        ago, present = (f"step {which['step']}, ema={str(which['ema']).lower()}" for which in (then, now))
        print(f"warning: {before.path} was trained for {ago}, and goes on for {present}", file=sys.stderr)


def go_on(trainer: DequantizerTrainer, before: Checkpoint, folder: Path) -> None:
    """Load the newest whole checkpoint; damaged newer ones are renamed, so that nobody takes them for good again."""
    try:
        trainer.load_state(before.content)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{before.path} does not fit its own settings ({reason}): remove {folder}") from error
    if trainer.step >= trainer.options.steps:
        raise UserError(
            f"{folder} has made {trainer.step} steps and training.steps={trainer.options.steps} asks for no more: "
            "raise training.steps to go on, or remove that folder to begin anew"
        )
    set_aside(folder, trainer.step)


if __name__ == "__main__":
    main()
