"""Files of tensors by name, read without running anything that they hold."""

from __future__ import annotations

import json
import pickle
import warnings
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
    content = load_safely(path)
    if not is_state(content):
        raise UserError(f"{path} is not a state dictionary: save network.state_dict() and nothing around it")
    return dict(content)


def is_state(content: Any) -> bool:
    """Whether this is a mapping of names to tensors, as `state_dict()` gives it."""
    return isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )


def load_safely(path: str | Path) -> Any:
    """What a .safetensors file or one of `torch.save` holds, on the CPU; nothing that it holds is run.

    Raises:
        UserError: there is no such file, it is damaged, or holds anything but tensors and plain values.
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual versions of pickle
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        # in torch's own words, which advise to read the file unsafely, a GLOBAL is a function or class that it names
        unsafe = isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error)
        reason = "it holds something other than tensors" if unsafe else "it is damaged, or of another kind"
        raise UserError(f"{file} is not a checkpoint that can be read safely: {reason}") from error


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
