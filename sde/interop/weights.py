"""Files of tensors by name, read without running anything that they hold."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sde.errors import UserError


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """A state dictionary on the CPU, from a .safetensors file or from one that `torch.save` wrote (.pt, .pth, .bin).

    Raises:
        UserError: there is no such file, it is damaged, or it holds anything but tensors by name.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"there is no checkpoint {file}: give the path of a file")
    if file.suffix == ".pkl":
        raise UserError(
            f"{file} is a pickle, which runs code when it is read: write its weights as {file.stem}.safetensors"
        )
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is not a checkpoint that can be read safely, or is damaged: {reason}") from error
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{file} is not a state dictionary: save network.state_dict() and nothing around it")
    return {str(name): tensor for name, tensor in content.items()}


def read_json(path: str | Path, how: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        how: how to make such a file, for the message.

    Raises:
        UserError: there is no such file, or it is not a JSON object.
    """
    file = Path(path).expanduser()
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"config={path} does not exist: {how}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config={path} is not JSON ({error}): {how}") from None
    if not isinstance(content, dict):
        raise UserError(f"config={path} is not a configuration: {how}")
    return content
