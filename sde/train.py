"""`python -m sde.train`: compose a run, train it, and leave a folder that `python -m sde.sample` draws from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from sde.cli import Interrupted, choices, output_dir, run_command, task_overrides
from sde.config import build
from sde.data import DataInfo, Dataset, measure_sigma_data
from sde.devices import pick_device
from sde.errors import UserError
from sde.pictures import save_grid, save_scatter
from sde.runs import Run, build_denoiser, find_run
from sde.sampling import Plan, draw, make_times
from sde.solvers import Solver
from sde.training.batches import Batches
from sde.training.checkpoint import list_checkpoints, load_newest, prune_checkpoints, save_checkpoint
from sde.training.ema import EMA
from sde.training.logging import Logger, MetricsFile
from sde.training.loop import Hooks, Trainer, fit
from sde.training.options import TrainingOptions
from sde.training.stopping import StopRequest
from sde.training.validation import Validation


def main() -> None:
    """Entry point of the command line."""
    resumed = _argument("resume")
    if resumed is not None:
        # the run goes on in its own folder, which has to exist before Hydra would make one of that name
        sys.argv.append(f"hydra.run.dir='{find_run_or_leave(resumed).path}'")
    run_command("train", train)


def find_run_or_leave(path: str) -> Run:
    """The run to resume; leaves with one sentence when there is none."""
    try:
        return find_run(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _argument(name: str) -> str | None:
    values = [word.split("=", 1)[1] for word in sys.argv[1:] if word.startswith(f"{name}=")]
    return values[-1] if values and values[-1] not in ("", "null") else None


def train(config: dict[str, Any]) -> None:
    """Train as `config` says, from the beginning or on from the newest checkpoint of `resume`."""
    run = Run(Path(output_dir()))
    resumed = config.pop("resume", None) is not None
    if resumed:
        config = resumed_config(run)
    elif list_checkpoints(run.checkpoints):
        raise UserError(f"{run.path} holds a run already: use resume={run.path}, or another hydra.run.dir")
    options: TrainingOptions = build(config["training"], "training")
    device = pick_device(options.device, "training.device")
    dataset: Dataset = build(config["data"], "data")
    measure_auto(config, dataset)
    if isinstance(config["preview_solver"], str):
        raise UserError(f"preview_solver={config['preview_solver']}: write solver@preview_solver=... to choose it")
    solver: Solver = build(config["preview_solver"], "solver")
    torch.manual_seed(options.seed)
    denoiser = build_denoiser(config, dataset.info).to(device)
    if len(dataset.info.shape) == 3:
        denoiser.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    labeled = bool(config["conditional"])
    trainer = Trainer(
        denoiser=denoiser,
        ema=EMA(denoiser.network, **config["ema"]),
        loss=build(config["loss"], "loss"),
        optimizer=build(config["optimizer"], "optimizer", params=denoiser.network.parameters()),
        options=options,
        batches=Batches(dataset, options.batch_size, options.seed, device, labeled),
    )
    if resumed:
        trainer.load_state(load_newest(run.checkpoints).content)
        if trainer.step >= options.steps:
            raise UserError(f"{run.path} has made all its {options.steps} steps: raise training.steps to go on")
    times = make_times(solver, denoiser, None, config["preview_steps"])
    plan = Plan(solver, times, dataset.info.shape, options.seed, device)
    validation = Validation(dataset, options, device, labeled)
    logger: Logger = build(config["logger"], "logger")
    run.write_beginning(config, dataset.info, device)
    if options.compile:
        denoiser.network.compile()
    announce(run, trainer, dataset)
    logger.start(run.path, config, trainer.step)
    metrics = MetricsFile(run.metrics, trainer.step)
    code = 1
    try:
        with StopRequest().listening() as stop:
            fit(trainer, hooks(run, trainer, config, dataset, validation, plan, metrics, logger), stop)
        code = 0
    finally:
        metrics.close()
        logger.finish(code)
    finish(run, trainer, stop)


def resumed_config(run: Run) -> dict[str, Any]:
    """The run's own configuration with this command's overrides; components cannot change in the middle of a run."""
    config = run.config()
    groups = choices()
    for override in task_overrides():
        key, _, value = override.lstrip("+").partition("=")
        if key == "resume" or key.startswith("hydra"):
            continue
        if key in groups:
            raise UserError(f"{override} cannot change in the middle of a run: leave it out, or train a new run")
        settings = OmegaConf.create(config)
        OmegaConf.set_struct(settings, True)
        if OmegaConf.select(settings, key, default=...) is ...:
            raise UserError(f"{override}: {run.path / 'config.yaml'} has no option {key}")
        OmegaConf.update(settings, key, OmegaConf.from_dotlist([f"v={value}"])["v"])
        assert isinstance(settings, DictConfig)
        config = {str(k): v for k, v in OmegaConf.to_container(settings).items()}  # type: ignore[union-attr]
    return config


def measure_auto(config: dict[str, Any], dataset: Dataset) -> None:
    """Replace `sigma_data: auto` by the standard deviation of the training data."""
    for group in ("parameterization", "loss"):
        if config[group].get("sigma_data") == "auto":
            config[group]["sigma_data"] = round(measure_sigma_data(dataset.split("train"), dataset.info), 4)


def announce(run: Run, trainer: Trainer, dataset: Dataset) -> None:
    """Say what is about to happen, in three lines."""
    parameters = sum(p.numel() for p in trainer.parameters)
    info = dataset.info
    classes = f", {info.num_classes} classes" if info.num_classes else ""
    print(f"data      {info.name}: {len(trainer.batches.split)} examples of shape {tuple(info.shape)}{classes}")
    print(
        f"model     {type(trainer.denoiser.network).__name__}, {parameters / 1e6:.2f} M parameters, on {trainer.device}"
    )
    print(f"run       {run.path}" + (f", going on from step {trainer.step}" if trainer.step else ""), flush=True)


def hooks(
    run: Run,
    trainer: Trainer,
    config: Mapping[str, Any],
    dataset: Dataset,
    validation: Validation,
    plan: Plan,
    metrics: MetricsFile,
    logger: Logger,
) -> Hooks:
    """What the loop calls to log, validate, preview and save."""
    info = dataset.info

    def log(values: dict[str, float]) -> None:
        metrics.log(trainer.step, values)
        logger.log(trainer.step, values)

    def preview() -> None:
        n = trainer.options.preview_samples
        labels = torch.arange(n) % info.num_classes if config["conditional"] else None
        x = torch.cat([solution.x for solution in draw(trainer.averaged, plan, n, n, labels)])
        path = run.path / "previews" / f"step-{trainer.step:08d}.png"
        if save_samples_picture(path, x, dataset):
            logger.image(trainer.step, "samples", path)

    def save() -> None:
        save_checkpoint(run.checkpoints, {"config": dict(config), "data": info.to_dict(), **trainer.state()})
        prune_checkpoints(run.checkpoints, trainer.options.keep)

    def last_good() -> str:
        known = list_checkpoints(run.checkpoints)
        return f"the last good checkpoint is {known[-1][1]}" if known else "there is no checkpoint yet"

    return Hooks(log, lambda: validation(trainer.averaged, trainer.loss), preview, save, last_good)


def save_samples_picture(path: Path, x: torch.Tensor, dataset: Dataset) -> bool:
    """A grid of pictures or a scatter plot of points; nothing for other shapes. Whether something was written."""
    info: DataInfo = dataset.info
    if info.kind == "pixels":
        save_grid(path, info.decode(x))
        return True
    if info.shape == (2,):
        save_scatter(path, x, dataset.split("test").values)
        return True
    return False


def finish(run: Run, trainer: Trainer, stop: StopRequest) -> None:
    """Say where everything is; leave with the code of the signal when there was one."""
    checkpoint = list_checkpoints(run.checkpoints)[-1][1]
    if stop.signal is not None:
        raise Interrupted(
            f"stopped at step {trainer.step} and saved {checkpoint}\ngo on with: python -m sde.train resume={run.path}",
            130 if stop.signal == 2 else 0,
        )
    print(f"checkpoint {checkpoint}\nmetrics    {run.metrics}")
    print(f"draw samples with: python -m sde.sample run={run.path}")


if __name__ == "__main__":
    main()
