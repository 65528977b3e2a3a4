"""Which device and precision to compute on."""

from __future__ import annotations

import contextlib

import torch

from sde.errors import UserError, check_choice

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str, option: str = "device") -> torch.device:
    """The device called `name`: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1".

    Apple's "mps" is not among them: it has no float64, in which times and coefficients are computed.

    Raises:
        UserError: for a name that is none, or a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{option}={name!r} is not a device: it is auto, cpu, cuda or cuda:0, ...") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            build = "this build of PyTorch has no CUDA" if torch.version.cuda is None else "no GPU is visible"
            raise UserError(f"{option}={name} is not there ({build}): use {option}=cpu or {option}=auto")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"{option}={name} is not there: this machine has {torch.cuda.device_count()} GPU(s)")
    elif device.type != "cpu":
        raise UserError(f"{option}={name!r} is not supported: it is auto, cpu, cuda or cuda:0, ...")
    return device


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """A context in which networks compute in `precision`, "fp32" or "bf16"."""
    check_choice("precision", precision, PRECISIONS)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])
