"""Which device and precision to compute on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import nn

from sde.distributed import world
from sde.errors import UserError, check_choice, suggest

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE = (False, True, "auto", "graphs")


def pick_device(name: str, option: str = "device") -> torch.device:
    """The device called `name`: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1".

    Of several processes on one machine, each has a GPU of its own unless one is named by its number.

    Apple's "mps" is not among them: it has no float64, in which times and coefficients are computed.

    Raises:
        UserError: for a name that is none, or a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world().size > 1:
        name = f"cuda:{world().local_rank}"
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
        torch.cuda.set_device(device)  # where nccl and unnamed allocations go
    elif device.type != "cpu":
        raise UserError(f"{option}={name!r} is not supported: it is auto, cpu, cuda or cuda:0, ...")
    return device


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether this CPU has units for products of bfloat16 matrices (AMX); without them float32 is faster."""
    supported: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return supported()


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """A context in which networks compute in `precision`, one of `PRECISIONS`.

    "fp32" is what PyTorch makes of float32: convolutions of a GPU may use TF32, matrix products do not. "tf32" lets
    both, from here on. On a CPU that has no units for bfloat16, where half precision would be slower and less accurate,
    it is float32.
    """
    dtype = _dtype(device, precision)
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype)


def computes_in(device: torch.device, precision: str) -> str:
    """What `autocast` makes of `precision` on this device, in words."""
    if precision == "fp64":
        return "float64"
    dtype = _dtype(device, precision)
    if dtype is not PRECISIONS[precision]:
        return f"float32 (faster than {str(PRECISIONS[precision]).removeprefix('torch.')} on this CPU)"
    if precision == "tf32" and device.type == "cuda":
        return "float32 (products in TF32)"
    return str(dtype).removeprefix("torch.")


def cast_weights(network: nn.Module, device: torch.device, precision: str) -> None:
    """Cast once, for sampling, the weights that `autocast` would cast in every evaluation."""
    dtype = _dtype(device, precision)
    for module in network.modules():
        if dtype is not torch.float32 and isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)


def _dtype(device: torch.device, precision: str) -> torch.dtype:
    if precision == "fp64":  # of training, where all is float64
        return torch.float32
    check_choice("precision", precision, PRECISIONS)
    slow = device.type == "cpu" and not multiplies_bfloat16()
    return torch.float32 if slow else PRECISIONS[precision]


def check_compile(name: str, how: object) -> None:
    """Raise `UserError` unless `how`, called `name`, is one of `COMPILE`."""
    if not isinstance(how, bool) and how not in ("auto", "graphs"):
        names = [str(choice).lower() for choice in COMPILE]
        raise UserError(f"{name}={how!r} is not one of {', '.join(names)}{suggest(how, names)}")


def compile_network(network: nn.Module, device: torch.device, how: bool | str) -> None:
    """Compile a network in place with torch.compile, as one of `COMPILE` says.

    On a CPU compiling costs minutes and makes U-Nets slower: a compiled graph lacks the faster convolutions of
    `sde/models/winograd.py`. So "auto" and "graphs" leave a network on a CPU as it is, which
    is said for "graphs", asked for by name.

    Args:
        network: on its device.
        device: where it is.
        how: False: not at all. True: in PyTorch's default mode. "auto": the same, on a GPU. "graphs": on a GPU, with
            measured kernels and CUDA graphs ("max-autotune"), which takes longer to compile and more memory.
    """
    check_compile("compile", how)
    if how == "graphs" and device.type == "cpu":
        print("compile=graphs is for a GPU: left out on this CPU", file=sys.stderr)
    if how is True or (how == "auto" and device.type == "cuda"):
        network.compile()
    elif how == "graphs" and device.type == "cuda":
        network.compile(mode="max-autotune")
        network.reuses_output = True  # type: ignore[assignment]  # a graph answers in one place, see `Denoiser`


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h


def keep_memory(device: torch.device) -> bool:
    """Let this process keep the memory that it frees on a CPU, for its next allocations.

    Otherwise the C library returns large tensors to the system as soon as they are freed, and each step gets its pages
    again one by one, cleared: with many large tensors, a tenth to a quarter of the time of a training step.

    Returns:
        Whether that was done: on the CPU, with glibc.
    """
    if device.type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    wanted = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26))
    return [mallopt(option, value) for option, value in wanted] == [1, 1, 1]


def compute_repeatably(yes: bool) -> None:
    """Let the same computation give the same bits on a GPU too, at some cost in time; on a CPU it does so anyway.

    Otherwise let cuDNN measure which of its convolutions is fastest for the shapes it meets.
    """
    if yes:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(yes)
    torch.backends.cudnn.benchmark = not yes
