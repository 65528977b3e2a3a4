"""What the training loop calls to log, validate, preview and save; of several processes, rank 0 writes."""

from __future__ import annotations

import contextlib
import errno
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sde.data import DataInfo, Dataset
from sde.distributed import (
    gather,
    is_main,
    is_sharded,
    share_of,
)
from sde.errors import Fault, suggest
from sde.pictures import save_grid, save_scatter
from sde.runs import Run
from sde.sampling import Plan, draw_batch
from sde.training.checkpoint import (
    best_step,
    list_checkpoints,
    prune_checkpoints,
    remove_damaged,
    save_checkpoint,
)
from sde.training.ema import FOLDER as AVERAGES_FOLDER
from sde.training.logging import Logger
from sde.training.loop import Hooks, Trainer
from sde.training.metrics import MetricsFile, read_metrics
from sde.training.options import TrainingOptions
from sde.training.validation import Validation
from sde.trajectory import Trajectory, can_be_shown

_SHOWN = 16  # samples of a preview whose way is animated
FULL = (errno.ENOSPC, errno.EDQUOT)


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
        remove_damaged(run.checkpoints, content["step"])
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
