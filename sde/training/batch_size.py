"""The largest batch that fits: tried on a GPU, estimated on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sde.data import DataInfo
from sde.denoiser import Denoiser
from sde.devices import autocast
from sde.distributed import world
from sde.errors import Fault
from sde.losses import DenoisingScoreMatching
from sde.memory import usable_memory
from sde.models.summary import summarize

MARGIN = 0.85  # share of the free memory that is used: allocators leave holes, and validation needs some
_MOST = 1 << 16


def largest_batch(
    denoiser: Denoiser,
    loss: DenoisingScoreMatching,
    info: DataInfo,
    device: torch.device,
    precision: str,
    most: int,
    averages: int = 1,
) -> int:
    """How many examples fit in one forward and backward pass, besides what an optimizer and averages need.

    On a GPU steps are made with 1, 2, 4, ... examples until memory runs out, then with numbers in between. On a CPU the
    memory that a step takes (`sde.models.summary`) is compared with what is free.

    Args:
        denoiser: on `device`; its weights are left as they are.
        loss: the objective.
        info: of the data.
        device: where to train.
        precision: of the network.
        most: more are of no use, such as the number of examples.
        averages: how many averages of the weights are kept.

    Raises:
        Fault: when not even one fits.
    """
    most = min(most, _MOST)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(
            MARGIN * free / torch.cuda.get_device_properties(device).total_memory
        )
        try:
            found = _largest(lambda n: _fits_on_gpu(denoiser, loss, info, device, precision, n, 2 + averages), most)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    else:
        costs, (_, left) = summarize(denoiser.network), usable_memory()
        if left is None:
            raise Fault("training.batch_size=auto: this system does not say how much memory is free: give a number")
        size = 8 if precision == "fp64" else 4
        room = MARGIN * left / world().local_size - size * (averages - 1) * costs.parameters
        found = _largest(lambda n: size / 4 * costs.training_memory(n) <= room, most)
    if found == 0:
        raise Fault(
            "training.batch_size=auto: not even one example fits: take a smaller model, or model.recompute_levels=1"
        )
    return found


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, to an eighth; 0 for none. What fits is below what does not."""
    low = 0
    while low < most and fits(min(max(1, 2 * low), most)):
        low = min(max(1, 2 * low), most)
    high = min(max(1, 2 * low), most + 1)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits_on_gpu(
    denoiser: Denoiser,
    loss: DenoisingScoreMatching,
    info: DataInfo,
    device: torch.device,
    precision: str,
    n: int,
    more: int,
) -> bool:
    """Whether a forward and a backward pass of `n` examples fit beside `more` further numbers for each parameter."""
    network, reserve = denoiser.network, []
    parameters = [p for p in network.parameters() if p.requires_grad]
    dtype = parameters[0].dtype
    try:
        reserve = [torch.empty(more * p.numel(), dtype=p.dtype, device=device) for p in parameters]
        x0 = torch.zeros(n, *info.shape, device=device, dtype=dtype)
        t = torch.full((n,), float(denoiser.sde.T), dtype=torch.float64, device=device)
        known = int(getattr(network, "num_classes", 0))
        label = torch.zeros(n, dtype=torch.int64, device=device) if known else None
        with autocast(device, precision):
            weighted, _ = loss.at(denoiser, x0, torch.ones_like(x0), t, label)
        weighted.mean().backward()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        del reserve
        for p in parameters:
            p.grad = None
        torch.cuda.empty_cache()
    return True
