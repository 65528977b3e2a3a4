"""The objective of one process as that of several: DDP, a whole network in each, or FSDP2, a part of it in each.

DDP sums gradients while the backward pass is still at work. FSDP2 keeps a part of every weight, of its averages and of
the optimizer's numbers in each process, and puts a block of the network together when it is its turn.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sde.denoiser import Denoiser
from sde.distributed import is_sharded, world
from sde.errors import UserError
from sde.losses import DenoisingScoreMatching


class Objective(nn.Module):
    """The loss as a module, whose forward pass is the whole of what a process computes for its examples.

    Args:
        denoiser: what is trained.
        loss: the objective.
    """

    def __init__(self, denoiser: Denoiser, loss: DenoisingScoreMatching) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.loss = loss

    def forward(self, x0: Tensor, z: Tensor, t: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weighted loss and unweighted error of eps, (B,) each, as `DenoisingScoreMatching.at`."""
        return self.loss.at(self.denoiser, x0, z, t, label)


class Spread(ABC):
    """An objective, and how the gradients of several processes become one.

    Attributes:
        objective: what to call.
    """

    objective: nn.Module

    @abstractmethod
    def accumulating(self, more: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a forward pass: whether `more` parts of the batch follow, so that gradients need not be summed yet."""

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        """Scale the gradients so that their norm is at most `largest`; gives the norm that they had."""
        return nn.utils.clip_grad_norm_(parameters, largest, foreach=True)


class Alone(Spread):
    """One process."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager[Any]:
        """Nothing to do."""
        return contextlib.nullcontext()


class WholeCopies(Spread):
    """DDP."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        ids = [device.index] if device.type == "cuda" else None
        known = inspect.signature(DistributedDataParallel).parameters
        buffers: dict[str, Any] = {  # the name before PyTorch 2.13 makes a warning since
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        self.objective = DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True, **buffers)

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are summed in the backward pass of the last part."""
        return self.objective.no_sync() if more else contextlib.nullcontext()  # type: ignore[operator]


class Parts(Spread):
    """FSDP2; the network is spread already (`shard`)."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are summed in the backward pass of the last part."""
        self.objective.denoiser.network.set_requires_gradient_sync(not more)  # type: ignore[operator, union-attr]
        return contextlib.nullcontext()

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        """As in the base class, with the norm over all parts."""
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def spread_objective(objective: Objective, how: str, device: torch.device) -> Spread:
    """The objective for as many processes as there are; `how` is one of `options.PARALLEL`."""
    if world().size == 1:
        return Alone(objective)
    if how == "fsdp":
        assert is_sharded(objective.denoiser.network)
        return Parts(objective)
    return WholeCopies(objective, device)


def shard(network: nn.Module, device: torch.device) -> None:
    """Spread a network's parameters over all processes (FSDP2), block by block; the modules stay what they are.

    A block is what a list of modules of the network holds, of several layers: its weights are put together when it is
    called.

    Raises:
        UserError: for a network that FSDP2 cannot spread.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    scalars = [name for name, parameter in network.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise UserError(
            f"training.parallel=fsdp cannot spread {type(network).__name__}, whose weight {scalars[0]} is one number: "
            "use training.parallel=ddp"
        )
    mesh = init_device_mesh(device.type, (world().size,))
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    for block in [block for blocks in reversed(lists) for block in blocks]:
        # tables of numbers are read without being called, and lists cannot be called
        if any(True for _ in block.children()) and not isinstance(block, nn.ModuleList):
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
