"""Checkpoints: whole or not there, checked when read, and unable to run code.

A checkpoint is what `torch.save` makes of state dictionaries and plain values: a zip archive in which every record
carries a CRC-32 checksum. It is written under a temporary name, synced and renamed (`sde.files.atomic_write`). Reading
checks every record first, then loads with `weights_only=True`, which builds tensors and plain values and nothing else.

    version   1
    step      number of optimizer steps made
    config    the run's configuration       data   the facts about its data
    model     state of the network          ema    the same with averaged weights
    averages  states of further averages by name (`ema`)
    optimizer state of the optimizer        scaler that of the scale of a loss in fp16
    skipped   steps left out for a gradient that was not finite

One that is damaged and newer than the one that a training goes on from is renamed to step-....damaged, and deleted once
the training has written a whole one of that step or a later one.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sde.distributed import say_once
from sde.errors import UserError
from sde.files import atomic_write

VERSION = 1
REQUIRED = ("version", "step", "config", "data", "model", "ema")
_ADVICE = ": take an earlier checkpoint"
_NAME = re.compile(r"step-(\d+)\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Args:
        path: where it was read.
        content: what it holds, on the CPU.
    """

    path: Path
    content: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps made when it was written."""
        return int(self.content["step"])


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}.pt"


def save_checkpoint(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write the checkpoint of step `content["step"]` and return its path."""
    path = checkpoint_path(folder, content["step"])
    with atomic_write(path) as file:
        torch.save({"version": VERSION, **content}, file)
    return path


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match)


def prune_checkpoints(folder: Path, keep: int, every: int = 0, best: int | None = None) -> None:
    """Delete old checkpoints.

    Args:
        folder: where they lie.
        keep: newest ones that stay; 0 for all.
        every: steps of which multiples stay; 0 for none.
        best: a step whose checkpoint stays.
    """
    for step, path in list_checkpoints(folder)[:-keep] if keep else []:
        if step != best and not (every and step % every == 0):
            path.unlink(missing_ok=True)


def set_aside(folder: Path, after: int) -> None:
    """Rename the checkpoints of steps after `after`, which are damaged, so that nobody takes them for good again."""
    for step, path in list_checkpoints(folder):
        if step > after:
            path.rename(path.with_suffix(".damaged"))


def remove_damaged(folder: Path, upto: int) -> None:
    """Delete what was set aside of the steps up to `upto`, of which there is a whole checkpoint."""
    for path in folder.glob("step-*.damaged"):
        match = _NAME.fullmatch(path.with_suffix(".pt").name)
        if match and int(match[1]) <= upto:
            path.unlink(missing_ok=True)


def best_step(steps: Iterable[int], metrics: Iterable[Mapping[str, Any]], name: str) -> int | None:
    """Which of the checkpoints' `steps` has the lowest value of a metric, the earliest of equal ones.

    Args:
        steps: of checkpoints.
        metrics: lines of a metrics.jsonl; those with a checkpoint's step count.
        name: of the metric.
    """
    known, found = set(steps), {}
    for line in metrics:
        if line["step"] in known and isinstance(line.get(name), int | float):
            found[line["step"]] = line[name]
    return min(found, key=lambda step: (found[step], step), default=None)


def remove_leftovers(run: Path) -> None:
    """Delete what trainings left in a run's folder that were killed in the middle of writing; none may be at work."""
    folders = ("checkpoints/.step-*", "previews/.step-*", "ema/.snapshot-*")
    for pattern in (*folders, ".config.yaml.*", ".data.json.*", ".environment.json.*", ".metrics.jsonl.*"):
        for path in run.glob(pattern):
            path.unlink(missing_ok=True)


class DamagedCheckpoint(UserError):
    """A checkpoint whose bytes are not what was written."""


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint.

    Raises:
        UserError: when there is no such file or it is not a checkpoint of this package.
        DamagedCheckpoint: when it is truncated or a checksum does not match.
    """
    if not path.is_file():
        raise UserError(f"checkpoint={path} does not exist: give latest, a step, or the path of a file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged archive makes the readers stumble over
        raise DamagedCheckpoint(f"{path} is damaged ({_reason(error)}){_ADVICE}") from error
    if damaged is not None:
        raise DamagedCheckpoint(f"{path} is damaged (the checksum of {damaged} is wrong){_ADVICE}")
    if not isinstance(content, dict) or any(key not in content for key in REQUIRED):
        raise UserError(f"{path} is not a checkpoint of this package: give one that python -m sde.train wrote")
    if content["version"] != VERSION:
        raise UserError(
            f"{path} has version {content['version']} and this package reads version {VERSION}: "
            "use the version of the package that wrote it"
        )
    return Checkpoint(path, content)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def load_newest(folder: Path) -> Checkpoint:
    """The newest checkpoint of `folder` that is whole; a damaged one is named on standard error and passed over.

    Raises:
        UserError: when there is none.
    """
    known = list_checkpoints(folder)
    if not known:
        raise UserError(f"{folder.parent} has no checkpoint: train it first, or give another run=")
    for number, (_, path) in reversed([*enumerate(known)]):
        try:
            return load_checkpoint(path)
        except DamagedCheckpoint as error:
            damage = str(error).removesuffix(_ADVICE)
            sentence = f"warning: {damage}" + (": falling back to the one before" if number else "")
            if say_once(sentence):
                print(sentence, file=sys.stderr)
    raise UserError(f"all {len(known)} checkpoints of {folder.parent} are damaged: train again")
