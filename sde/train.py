"""`python -m sde.train`: compose a run, train it, and leave a folder that `python -m sde.sample` draws from.

Several processes that torchrun starts train one run together: each composes the same configuration and makes its part
of every batch. Rank 0 has the folder, and writes.
"""

from __future__ import annotations

import contextlib
import errno
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from sde.cli import RESUMABLE, Interrupted, argument, choices, output_dir, run_command, task_overrides
from sde.config import build
from sde.data import DataInfo, Dataset, measure_sigma_data
from sde.data.base import SPLITS
from sde.devices import compile_network, compute_repeatably, computes_in, keep_memory, pick_device
from sde.distributed import (
    any_signal,
    gather,
    is_main,
    is_sharded,
    least,
    on_main,
    part_of,
    remembered,
    share,
    share_of,
    world,
)
from sde.errors import Fault, UserError, check_flag, suggest
from sde.models.summary import summarize
from sde.pictures import save_grid, save_scatter
from sde.runs import Run, build_denoiser, ema_options, find_run
from sde.sampling import Plan, denoised_at_the_end, draw_batch, make_times
from sde.solvers import Solver
from sde.training.batch_size import largest_batch
from sde.training.batches import Batches
from sde.training.checkpoint import (
    best_step,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    prune_checkpoints,
    remove_leftovers,
    save_checkpoint,
)
from sde.training.ema import FOLDER as AVERAGES_FOLDER
from sde.training.ema import Averages
from sde.training.logging import Logger
from sde.training.loop import Hooks, Trainer, fit
from sde.training.metrics import MetricsFile, read_metrics
from sde.training.options import TrainingOptions
from sde.training.parallel import shard
from sde.training.stopping import StopRequest
from sde.training.validation import Validation
from sde.trajectory import Trajectory, can_be_shown

_SHOWN = 16  # samples of a preview whose way is animated
_SECTIONS = ("training", "ema", "optimizer", "schedule", "logger", "preview_solver", "preview_steps")  # may change


def main() -> None:
    """Entry point of the command line."""
    try:
        if is_main():
            choose_folder()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run_command("train", train, several=True)


# Which folder, and whether to go on


def choose_folder() -> None:
    """Tell Hydra the folder of a run that goes on, which has to exist before Hydra would make one of that name.

    That is the run that `resume=` names, or the one that torchrun has started again.

    Raises:
        UserError: when there is no such run.
    """
    wanted = argument("resume")
    before = remembered("run")
    if before is not None:
        folder = before
        if wanted is None:
            sys.argv.append("resume=auto")
    elif wanted is None or wanted == "auto":
        option = "hydra.sweep.dir" if {"-m", "--multirun"} & set(sys.argv) else "hydra.run.dir"
        if wanted == "auto" and argument(option) is None:
            raise UserError(f"resume=auto goes on in the folder that {option}=FOLDER names: give it")
        return
    else:
        if {"-m", "--multirun"} & set(sys.argv):
            raise UserError("resume= goes on with one run: leave --multirun out")
        folder = str(find_run(wanted).path)
        sys.argv[1:] = [addressed_to_run(word) for word in sys.argv[1:]]
    escaped = folder.replace("'", "\\'")
    sys.argv.append(f"hydra.run.dir='{escaped}'")


def addressed_to_run(word: str) -> str:
    """An override as Hydra takes it for a run of another schedule, optimizer or logger than this command's own."""
    bare = word.lstrip("+")
    if bare.startswith("resume="):
        return bare
    return f"++{bare}" if bare.startswith(("schedule.", "optimizer.", "logger.", "preview_solver.")) else word


def as_written(folder: Path) -> Path:
    """`folder` as seen from where the command was given, if it lies there."""
    here = Path.cwd().resolve()
    return folder.relative_to(here) if folder.is_relative_to(here) and folder != here else folder


def settle(run: Run, config: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The configuration to train with, and whether the run goes on.

    Raises:
        UserError: when the folder holds a run and none was to be resumed, or what was asked for cannot change.
    """
    wanted = config.pop("resume", None)
    known = bool(list_checkpoints(run.checkpoints))
    if wanted is None and known:
        raise UserError(f"{run.path} holds a run already: use resume={run.path}, resume=auto, or another hydra.run.dir")
    if wanted == "auto":
        return (same_run(run, config), True) if known else (config, False)
    return (config, False) if wanted is None else (resumed_config(run), True)


def resumed_config(run: Run) -> dict[str, Any]:
    """The run's own configuration with this command's overrides, which may concern how it is trained and no more."""
    config = with_new_options(run.config())
    groups = choices()
    for override in task_overrides():
        override = override.lstrip("+")
        key, _, value = override.partition("=")
        if key in ("resume", "plugins") or key.startswith("hydra"):
            continue
        if key in groups or not key.startswith(("training.", "ema.", "optimizer.", "schedule.", "logger.", "preview_")):
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


def with_new_options(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration with the options that there were not yet when it began, at their defaults."""
    config = {**config, "schedule": config.get("schedule", {"_target_": "sde.training.schedules.Constant"})}
    known = {name: value for name, value in vars(TrainingOptions()).items() if name not in config["training"]}
    return {**config, "training": {**config["training"], **known}}


def same_run(run: Run, config: dict[str, Any]) -> dict[str, Any]:
    """The run's own configuration with the sections of `config` that may change in the middle of a run.

    Raises:
        UserError: when `config` differs from the run's own in any other.
    """
    own = with_new_options(run.config())
    for key, value in config.items():
        found = None if key in _SECTIONS else first_difference(key, value, own.get(key))
        if found is not None:
            raise UserError(
                f"resume=auto: {run.path} holds a run with {found[0]}={found[2]} and not {found[1]}: give the same "
                "options as before, or another hydra.run.dir"
            )
    settings = {**own, **{key: config[key] for key in _SECTIONS if key in config}}
    if settings["training"]["batch_size"] == "auto":
        settings["training"] = {**settings["training"], "batch_size": own["training"]["batch_size"]}
    return settings


def first_difference(name: str, wanted: Any, own: Any) -> tuple[str, Any, Any] | None:
    """Where two configurations differ first: option, value wanted and own value; "auto" has become a number."""
    if isinstance(wanted, Mapping) and isinstance(own, Mapping):
        keys = [*wanted, *(key for key in own if key not in wanted)]
        found = (first_difference(f"{name}.{key}", wanted.get(key), own.get(key)) for key in keys)
        return next((difference for difference in found if difference is not None), None)
    return None if wanted == own or wanted == "auto" else (name, wanted, own)


# Training


def train(config: dict[str, Any]) -> None:
    """Train as `config` says, from the beginning or on from the newest checkpoint of `resume`."""
    run = Run(as_written(Path(share(str(Path(output_dir()).resolve())))))
    automatic = config.get("resume") == "auto"
    with contextlib.ExitStack() as stack:
        settled, resumed = on_main(lambda: settle(run, config))
        on_main(lambda: stack.enter_context(run.locked()))
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


def prepared(config: Mapping[str, Any]) -> Dataset:
    """The data set, the files that it needs made by rank 0 before other processes look for them."""
    made: list[Dataset] = []

    def make() -> None:
        dataset: Dataset = build(config["data"], "data")
        for name in SPLITS:
            dataset.split(name)
        made.append(dataset)

    on_main(make)
    if not made:
        make()
    return made[0]


def make_trainer(config: dict[str, Any], dataset: Dataset, device: torch.device) -> Trainer:
    """All that is trained, as `config` says, which gets the numbers that "auto" stands for.

    Raises:
        UserError: a value that cannot be, or parts that do not fit together.
    """
    check_flag("conditional", config["conditional"])
    measure_auto(config, dataset)
    automatic = config["training"]["batch_size"] == "auto"
    if automatic:
        config["training"] = {**config["training"], "batch_size": config["training"].get("accumulation", 1)}
    options: TrainingOptions = build(config["training"], "training")
    if options.precision == "fp16" and options.parallel == "fsdp" and world().size > 1:
        raise UserError("training.precision=fp16 scales a loss, which training.parallel=fsdp cannot do: take bf16")
    compute_repeatably(options.deterministic)
    averages = ema_options(config["ema"])
    loss = build(config["loss"], "loss")
    torch.manual_seed(options.seed)
    denoiser = build_denoiser(config, dataset.info).to(device, options.dtype)
    if automatic:
        options = with_largest_batch(config, options, denoiser, loss, dataset, device)
    network = denoiser.network
    in_parts = options.parallel == "fsdp" and world().size > 1
    if len(dataset.info.shape) == 3 and not in_parts:  # FSDP2 takes contiguous weights alone
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kept = Averages(network, averages)
    if in_parts:
        for each in (network, *kept.networks.values()):
            shard(each, device)
    parts = options.parts(world().size)
    own = part_of(parts, world().rank, world().size)
    rows = range(
        part_of(options.batch_size, own.start, parts).start, part_of(options.batch_size, own.stop - 1, parts).stop
    )
    return Trainer(
        denoiser=denoiser,
        averages=kept,
        loss=loss,
        optimizer=make_optimizer(config["optimizer"], network),
        options=options,
        batches=Batches(
            dataset,
            options.batch_size,
            options.seed,
            device,
            config["conditional"],
            options.dequantize,
            options.dtype,
            rows,
            options.workers,
        ),
        schedule=build(config["schedule"], "schedule"),
    )


def make_optimizer(node: Mapping[str, Any], network: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a network's weights.

    Raises:
        UserError: for options that PyTorch refuses, or an optimizer that does not go with this training.
    """
    try:
        optimizer: torch.optim.Optimizer = build(node, "optimizer", params=network.parameters())
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"optimizer._target_={node['_target_']}: {reason}: change its options, or take adam") from error
    if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
        needs = "the loss again within a step" if isinstance(optimizer, torch.optim.LBFGS) else "sparse gradients"
        raise UserError(f"optimizer._target_={node['_target_']} needs {needs}, which there is not: take adam")
    if isinstance(optimizer, torch.optim.Adafactor) and is_sharded(network):
        raise UserError("optimizer._target_=torch.optim.Adafactor cannot work on training.parallel=fsdp: take adam")
    return optimizer


def with_largest_batch(
    config: dict[str, Any],
    options: TrainingOptions,
    denoiser: Any,
    loss: Any,
    dataset: Dataset,
    device: torch.device,
) -> TrainingOptions:
    """The options with the largest batch that fits, which `config` gets too."""
    examples = len(dataset.split("train"))
    found = least(largest_batch(denoiser, loss, dataset.info, device, options.precision, examples))
    size = max(1, min(found * world().size, examples // options.accumulation)) * options.accumulation
    config["training"] = {**config["training"], "batch_size": size}
    return build(config["training"], "training")


def go_on(run: Run, trainer: Trainer) -> bool:
    """Load the newest whole checkpoint; whether there is anything left to do.

    Damaged newer ones are renamed, so that nobody takes them for good again.
    """
    path = on_main(lambda: str(load_newest(run.checkpoints).path))
    checkpoint = load_checkpoint(Path(path))
    try:
        trainer.load_state(checkpoint.content)
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{checkpoint.path} does not fit the run's config.yaml ({reason}): restore it") from error
    if trainer.step >= trainer.options.steps:
        return False
    for step, newer in list_checkpoints(run.checkpoints) if is_main() else []:
        if step > trainer.step:
            newer.rename(newer.with_suffix(".damaged"))
    return True


def measure_auto(config: dict[str, Any], dataset: Dataset) -> None:
    """Replace `sigma_data: auto` by the standard deviation of the training data."""
    for group in ("parameterization", "loss"):
        if config[group].get("sigma_data") == "auto":
            config[group]["sigma_data"] = round(measure_sigma_data(dataset.split("train"), dataset.info), 4)


@contextlib.contextmanager
def memory_explained(config: Mapping[str, Any]) -> Iterator[None]:
    """Turn a lack of memory into a sentence that says what to try.

    Raises:
        Fault: in place of what PyTorch raises.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise Fault(out_of_memory(config)) from error
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise Fault(out_of_memory(config)) from error


def out_of_memory(config: Mapping[str, Any]) -> str:
    """What to say when memory runs out."""
    options = config["training"]
    size, parts = options["batch_size"], options.get("accumulation", 1)
    return (
        f"out of memory with training.batch_size={size} and training.accumulation={parts}: try "
        f"training.accumulation={2 * parts}, which is the same training in less memory, model.recompute_levels=1 where "
        "the model has it, training.precision=bf16, a smaller batch (auto is the largest that fits), or more processes"
    )


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


# What the loop calls


@contextlib.contextmanager
def records(run: Run, trainer: Trainer, config: Mapping[str, Any], logger: Logger) -> Iterator[MetricsFile | None]:
    """metrics.jsonl and the logger, open; rank 0 alone has them."""
    if not is_main():
        yield None
        return
    metrics = MetricsFile(run.metrics, trainer.step)
    logger.start(run.path, config, trainer.step)
    code = 1
    try:
        yield metrics
        code = 0
    finally:
        metrics.close()
        logger.finish(code)


def hooks(
    run: Run,
    trainer: Trainer,
    config: Mapping[str, Any],
    dataset: Dataset,
    validation: Validation,
    plan: Plan,
    metrics: MetricsFile | None,
    logger: Logger,
) -> Hooks:
    """What the loop calls to log, validate, preview and save; of several processes, rank 0 writes."""
    info, options = dataset.info, trainer.options

    def log(values: dict[str, float]) -> None:
        if metrics is not None:
            metrics.log(trainer.step, values)
            logger.log(trainer.step, values)

    def preview() -> None:
        labels = torch.arange(options.preview_samples) % info.num_classes if config["conditional"] else None
        x, way = draw_preview(trainer, plan, labels)
        if not is_main():
            return
        path = run.path / "previews" / f"step-{trainer.step:08d}.png"
        with disk_may_be_full("this preview"):
            if save_samples_picture(path, x, dataset):
                logger.image(trainer.step, "samples", path)
                way.save(path.with_suffix(".gif"), x, info)
                logger.animation(trainer.step, "trajectories", path.with_suffix(".gif"))

    def snapshot() -> None:
        with disk_may_be_full("this snapshot of averages"):
            trainer.averages.snapshot(run.path / AVERAGES_FOLDER, trainer.step)

    def save(needed: bool) -> None:
        content = {"config": dict(config), "data": info.to_dict(), **trainer.state()}
        if metrics is None:
            return
        metrics.sync()
        write_checkpoint(run, content, options, metrics, needed)

    def last_good() -> str:
        known = list_checkpoints(run.checkpoints)
        return f"the last good checkpoint is {known[-1][1]}" if known else "there is no checkpoint yet"

    return Hooks(
        log, lambda: validation(trainer.averaged, trainer.loss, trainer.denoiser), preview, snapshot, save, last_good
    )


def draw_preview(trainer: Trainer, plan: Plan, labels: torch.Tensor | None) -> tuple[torch.Tensor, Trajectory]:
    """The samples of a preview (n, ...) on the CPU, and the way of the first ones; several processes share them."""
    n = trainer.options.preview_samples
    together = is_sharded(trainer.averages.primary)  # all have to work on what they share
    own = range(n) if together else share_of(n)
    way = Trajectory(trainer.averaged.sde, plan.times, min(_SHOWN, len(own)))
    x = torch.empty(0, *plan.shape)
    if len(own):
        label = None if labels is None else labels[own.start : own.stop].to(plan.device)
        keep = way.keep if is_main() and can_be_shown(trainer.batches.info) else None
        x = draw_batch(trainer.averaged, plan, own, label, keep).x.cpu()
    return (x if together else torch.cat(gather(x) or [x])), way


FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def disk_may_be_full(what: str) -> Iterator[None]:
    """Go on without a file for which there is no space, saying so."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"\nwarning: no space is left on the disk: left out {what}", file=sys.stderr)


def write_checkpoint(
    run: Run, content: Mapping[str, Any], options: TrainingOptions, metrics: MetricsFile, needed: bool
) -> None:
    """Write a checkpoint and delete those that are no longer kept.

    On a full disk older ones make room, but for the newest and those that are kept for good. If that does not help,
    training goes on without this checkpoint, in the hope of space for the next, unless there will be no next one.

    Raises:
        Fault: when there is no space for a checkpoint that is needed.
        OSError: when it cannot be written for another reason.
    """
    saved = has_saved(run, content)
    if not saved and options.keep:
        prune(run, options, 1)
        metrics.sync()
        saved = has_saved(run, content)
    if saved:
        prune(run, options, options.keep)
        return
    full = f"no space is left on the disk for the checkpoint of step {content['step']}"
    if needed:
        go_on_with = f"python -m sde.train {shlex.quote(f'resume={run.path}')}"
        known = list_checkpoints(run.checkpoints)
        kept = f"go on from step {known[-1][0]} with {go_on_with}" if known else "train again, for there is none yet"
        raise Fault(f"{full}: free some, and {kept}")
    print(f"\nwarning: {full}: going on without it; free some before the next one", file=sys.stderr)


def has_saved(run: Run, content: Mapping[str, Any]) -> bool:
    """Write a checkpoint; False when there is no space for it."""
    try:
        save_checkpoint(run.checkpoints, content)
    except OSError as error:
        if error.errno not in FULL:
            raise
        return False
    return True


def prune(run: Run, options: TrainingOptions, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and those that are kept for good."""
    steps = [step for step, _ in list_checkpoints(run.checkpoints)]
    lines = read_metrics(run.metrics) if options.keep_best and run.metrics.exists() else []
    best = best_step(steps, lines, options.keep_best) if options.keep_best else None
    if options.keep_best and best is None:
        known = sorted({name for line in lines for name in line})
        print(
            f"\nwarning: training.keep_best={options.keep_best} was measured at none of the checkpoints"
            f"{suggest(options.keep_best, known)}",
            file=sys.stderr,
        )
    prune_checkpoints(run.checkpoints, keep, options.keep_every, best)


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
