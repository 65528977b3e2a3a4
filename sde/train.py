"""`python -m sde.train`: compose a run, train it, and leave a folder that `python -m sde.sample` draws from."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from sde.cli import RESUMABLE, Interrupted, argument, choices, output_dir, run_command, task_overrides
from sde.config import build
from sde.data import DataInfo, Dataset, measure_sigma_data
from sde.devices import compile_network, computes_in, keep_memory, pick_device
from sde.errors import UserError, check_flag
from sde.models.summary import summarize
from sde.pictures import save_grid, save_scatter
from sde.runs import Run, build_denoiser, find_run
from sde.sampling import Plan, denoised_at_the_end, draw, make_times
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
    resumed = argument("resume")
    if resumed is not None:
        # the run goes on in its own folder, which has to exist before Hydra would make one of that name
        path = str(find_run_or_leave(resumed).path).replace("'", "\\'")
        sys.argv = [word.lstrip("+") if word.lstrip("+").startswith("resume=") else word for word in sys.argv]
        sys.argv.append(f"hydra.run.dir='{path}'")
    run_command("train", train)


def find_run_or_leave(path: str) -> Run:
    """The run to resume; leaves with one sentence when there is none."""
    try:
        if {"-m", "--multirun"} & set(sys.argv):
            raise UserError("resume= goes on with one run: leave --multirun out")
        return find_run(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def train(config: dict[str, Any]) -> None:
    """Train as `config` says, from the beginning or on from the newest checkpoint of `resume`."""
    run = Run(Path(output_dir()))
    resumed = config.pop("resume", None) is not None
    if resumed:
        config = resumed_config(run)
    elif list_checkpoints(run.checkpoints):
        raise UserError(f"{run.path} holds a run already: use resume={run.path}, or another hydra.run.dir")
    options: TrainingOptions = build(config["training"], "training")
    check_flag("conditional", config["conditional"])
    check_flag("ema.warmup", config["ema"]["warmup"])
    device = pick_device(options.device, "training.device")
    keep_memory(device)
    dataset: Dataset = build(config["data"], "data")
    measure_auto(config, dataset)
    if isinstance(config["preview_solver"], str):
        raise UserError(f"preview_solver={config['preview_solver']}: write solver@preview_solver=... to choose it")
    solver: Solver = build(config["preview_solver"], "solver")
    torch.manual_seed(options.seed)
    denoiser = build_denoiser(config, dataset.info).to(device)
    if len(dataset.info.shape) == 3:
        denoiser.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    labeled = config["conditional"]
    trainer = Trainer(
        denoiser=denoiser,
        ema=EMA(denoiser.network, **config["ema"]),
        loss=build(config["loss"], "loss"),
        optimizer=build(config["optimizer"], "optimizer", params=denoiser.network.parameters()),
        options=options,
        batches=Batches(dataset, options.batch_size, options.seed, device, labeled, options.dequantize),
    )
    if resumed:
        go_on(run, trainer)
    times = make_times(solver, denoiser, None, config["preview_steps"])
    solver = denoised_at_the_end(solver, denoiser, times)
    plan = Plan(solver, times, dataset.info.shape, options.seed, device)
    validation = Validation(dataset, options, device, labeled)
    logger: Logger = build(config["logger"], "logger")
    compile_network(denoiser.network, device, options.compile)
    with run.locked():
        run.write_beginning(config, dataset.info, device)
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
    """The run's own configuration with this command's overrides, which may concern how it is trained and no more."""
    config = run.config()
    groups = choices()
    for override in task_overrides():
        key, _, value = override.lstrip("+").partition("=")
        if key == "resume" or key.startswith("hydra"):
            continue
        if key in groups or not key.startswith(("training.", "ema.", "optimizer.", "logger.", "preview_")):
            raise UserError(
                f"{override} cannot change in the middle of a run, where only the options of {RESUMABLE} can: "
                "leave it out, or train a new run"
            )
        settings = OmegaConf.create(config)
        OmegaConf.set_struct(settings, True)
        if OmegaConf.select(settings, key, default=...) is ...:
            raise UserError(f"{override}: {run.path / 'config.yaml'} has no option {key}")
        OmegaConf.update(settings, key, OmegaConf.from_dotlist([f"v={value}"])["v"])
        assert isinstance(settings, DictConfig)
        config = {str(k): v for k, v in OmegaConf.to_container(settings).items()}  # type: ignore[union-attr]
    return config


def go_on(run: Run, trainer: Trainer) -> None:
    """Load the newest whole checkpoint; damaged newer ones are renamed, so that nobody takes them for good again."""
    checkpoint = load_newest(run.checkpoints)
    try:
        trainer.load_state(checkpoint.content)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{checkpoint.path} does not fit the run's config.yaml ({reason}): restore it") from error
    if trainer.step >= trainer.options.steps:
        raise UserError(
            f"{run.path} has made {trainer.step} steps and training.steps={trainer.options.steps} asks for no more: "
            "raise training.steps to go on"
        )
    for step, path in list_checkpoints(run.checkpoints):
        if step > trainer.step:
            path.rename(path.with_suffix(".damaged"))


def measure_auto(config: dict[str, Any], dataset: Dataset) -> None:
    """Replace `sigma_data: auto` by the standard deviation of the training data."""
    for group in ("parameterization", "loss"):
        if config[group].get("sigma_data") == "auto":
            config[group]["sigma_data"] = round(measure_sigma_data(dataset.split("train"), dataset.info), 4)


def announce(run: Run, trainer: Trainer, dataset: Dataset) -> None:
    """Say what is about to happen, in four lines."""
    info, network, options = dataset.info, trainer.denoiser.network, trainer.options
    costs, examples = summarize(network), options.batch_size // options.accumulation
    memory = costs.training_memory(examples) / 2**30
    classes = f", {info.num_classes} classes" if info.num_classes else ""
    print(f"data      {info.name}: {len(trainer.batches.split)} examples of shape {tuple(info.shape)}{classes}")
    print(f"model     {type(network).__name__}, {costs}")
    precision = computes_in(trainer.device, options.precision)
    print(
        f"device    {trainer.device}, {precision}, about {memory:.2g} GiB for {examples} examples at a time in float32"
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
    print(f"draw samples with: python -m sde.sample {shlex.quote(f'run={run.path}')}")


if __name__ == "__main__":
    main()
