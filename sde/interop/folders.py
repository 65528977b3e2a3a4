"""A trained denoiser as a folder to give away.

    model.safetensors   averaged weights, by the names of our network
    config.json         version, step, sde, parameterization, model, conditional, data

Nothing in it can run code: weights are tensors, and `sde.config.build` looks classes up without importing any.
`sde.interop.export` writes such folders, and wherever a run is asked for (`run=FOLDER`) one of them will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from sde.errors import UserError
from sde.files import new_file, write_json
from sde.interop.weights import read_json, read_tensors
from sde.training.checkpoint import Checkpoint

VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_PARTS = ("sde", "parameterization", "model", "conditional")


def is_exported(folder: Path) -> bool:
    """Whether `folder` is one that `write_folder` wrote."""
    return (folder / WEIGHTS).is_file()


def write_folder(
    folder: Path, config: Mapping[str, Any], data: Mapping[str, Any], weights: Mapping[str, Tensor], step: int
) -> None:
    """Write the two files, the configuration last: a folder without one is not whole.

    Args:
        folder: made if need be.
        config: of the run; what sampling needs is kept.
        data: the facts about the data.
        weights: averaged.
        step: optimizer steps made.
    """
    with new_file(folder / WEIGHTS) as temporary:
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    kept = {part: config.get(part, False) for part in _PARTS}
    write_json(folder / CONFIG, {"version": VERSION, "step": step, **kept, "data": dict(data)})


def read_folder(folder: Path) -> Checkpoint:
    """What `write_folder` wrote, as a checkpoint that has averaged weights alone.

    Raises:
        UserError: a file is missing, damaged, or of a later version.
    """
    content = read_json(folder / CONFIG, f"{folder} is not whole; export it again")
    missing = [key for key in ("version", "step", "data", *_PARTS) if key not in content]
    if missing:
        raise UserError(f"{folder / CONFIG} has no {missing[0]}: give a folder that python -m sde.interop.export wrote")
    if content["version"] != VERSION:
        raise UserError(
            f"{folder} has version {content['version']} and this package reads version {VERSION}: "
            "use the version of the package that wrote it"
        )
    weights = read_tensors(folder / WEIGHTS)
    config = {part: content[part] for part in _PARTS}
    found = {"version": VERSION, "step": content["step"], "data": content["data"], "config": config, "ema": weights}
    return Checkpoint(folder / WEIGHTS, found)
