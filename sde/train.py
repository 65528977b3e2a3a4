"""`python -m sde.train`: compose a run, train it, and leave a folder that `python -m sde.sample` draws from.

Several processes that torchrun starts train one run together: each composes the same configuration and makes its part
of every batch. Rank 0 has the folder, and writes.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from sde.cli import Interrupted, output_dir, run_command
from sde.config import build
from sde.data import Dataset
from sde.devices import compile_network, computes_in, keep_memory, pick_device
from sde.distributed import (
    any_signal,
    is_main,
    is_sharded,
    on_main,
    remembered,
    share,
    world,
)
from sde.errors import UserError
from sde.models.summary import summarize
from sde.runs import Run
from sde.sampling import Plan, denoised_at_the_end, make_times
from sde.solvers import Solver
from sde.train_folder import as_written, choose_folder, go_on, settle
from sde.train_hooks import hooks, records
from sde.train_setup import make_trainer, memory_explained, prepared
from sde.training.checkpoint import (
    list_checkpoints,
    remove_leftovers,
)
from sde.training.logging import Logger
from sde.training.loop import Trainer, fit
from sde.training.stopping import StopRequest
from sde.training.validation import Validation


def main() -> None:
    """Entry point of the command line."""
    try:
        if is_main():
            choose_folder()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run_command("train", train, several=True)


def train(config: dict[str, Any]) -> None:
    """Train as `config` says, from the beginning or on from the newest checkpoint of `resume`."""
    run = Run(as_written(Path(share(str(Path(output_dir()).resolve())))))
    automatic = config.get("resume") == "auto"
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(run.locked()))
        settled, resumed = on_main(lambda: settle(run, config))
        train_run(run, settled, resumed, automatic)


def train_run(run: Run, config: dict[str, Any], resumed: bool, automatic: bool) -> None:
    """Train the run, whose folder nobody else is writing; `automatic` is content with one that is at its end."""
    device = pick_device(str(config["training"]["device"]), "training.device")
    keep_memory(device)
    dataset = prepared(config)
    if isinstance(config["preview_solver"], str):
        raise UserError(f"preview_solver={config['preview_solver']}: write solver@preview_solver=... to choose it")
    solver: Solver = build(config["preview_solver"], "solver")
    with memory_explained(config):
        trainer = make_trainer(config, dataset, device)
        if resumed and not go_on(run, trainer):
            made = (
                f"{run.path} has made {trainer.step} steps and training.steps={trainer.options.steps} asks for no more"
            )
            if not automatic:
                raise UserError(f"{made}: raise training.steps to go on")
            print(made)
            return
        labeled = config["conditional"]
        times = make_times(solver, trainer.denoiser, None, config["preview_steps"])
        solver = denoised_at_the_end(solver, trainer.denoiser, times)
        plan = Plan(solver, times, dataset.info.shape, trainer.options.seed, device, dtype=trainer.options.dtype)
        validation = Validation(dataset, trainer.options, device, labeled)
        logger: Logger = build(config["logger"], "logger")
        compile_network(trainer.denoiser.network, device, trainer.options.compile)
        with StopRequest().listening() as stop:
            if is_main():
                run.write_beginning(config, dataset.info, device)
                remembered("run", str(run.path.resolve()))
                remove_leftovers(run.path)
                announce(run, trainer, dataset)
            with records(run, trainer, config, logger) as metrics:
                fit(trainer, hooks(run, trainer, config, dataset, validation, plan, metrics, logger), stop)
    finish(run, trainer, stop)


def announce(run: Run, trainer: Trainer, dataset: Dataset) -> None:
    """Say what is about to happen, in four lines."""
    info, network, options = dataset.info, trainer.denoiser.network, trainer.options
    classes = f", {info.num_classes} classes" if info.num_classes else ""
    print(f"data      {info.name}: {len(trainer.batches.split)} examples of shape {tuple(info.shape)}{classes}")
    precision = computes_in(trainer.device, options.precision)
    size = world().size
    several = f", {size} processes ({options.parallel})" if size > 1 else ""
    if is_sharded(network):
        count = sum(parameter.numel() for parameter in network.parameters())
        print(f"model     {type(network).__name__}, {count / 1e6:.2f} M parameters, spread over {size} processes")
        print(f"device    {trainer.device}, {precision}{several}")
    else:
        costs, examples = summarize(network), len(trainer._parts[0][1])
        memory = costs.training_memory(examples) / 2**30
        print(f"model     {type(network).__name__}, {costs}")
        needs = f"about {memory:.2g} GiB for {examples} examples at a time in float32"
        print(f"device    {trainer.device}, {precision}{several}, {needs}")
    print(f"run       {run.path}" + (f", going on from step {trainer.step}" if trainer.step else ""), flush=True)


def finish(run: Run, trainer: Trainer, stop: StopRequest) -> None:
    """Say where everything is; leave with the code of the signal when there was one, in whichever process."""
    number = any_signal(stop.signal)
    stopped = trainer.step < trainer.options.steps
    checkpoint = on_main(lambda: str(list_checkpoints(run.checkpoints)[-1][1]))
    if stopped:
        raise Interrupted(
            f"stopped at step {trainer.step} and saved {checkpoint}\n"
            f"go on with: python -m sde.train {shlex.quote(f'resume={run.path}')}",
            130 if number == signal.SIGINT else 0,
        )
    print(f"checkpoint {checkpoint}\nmetrics    {run.metrics}")
    print(f"draw samples with: python -m sde.sample {shlex.quote(f'run={run.path}')}")


if __name__ == "__main__":
    main()
