r"""What a network costs: parameters, floating-point operations, memory.

All of it is found by running the network on the meta device, which has shapes and no numbers: that takes a second for
the largest network, and no memory. Operations are those of convolutions, matrix products and attention, a
multiplication and an addition counting as two. The memory of training is

    4 numbers per parameter (weight, averaged weight, two moments of Adam) and one more for its gradient
    + batch size * what an example leaves behind for the backward pass, before any of it is freed

in float32. Beside it a little is in use for a short time: the layer at work, and levels that are being recomputed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

NUMBERS_PER_PARAMETER = 5
BYTES = 4


@dataclass(frozen=True)
class Summary:
    """What a network costs.

    Attributes:
        parameters: numbers that are learned.
        flops: floating-point operations of one evaluation for one example; a training step takes about three times as
            many.
        activations: bytes that one example leaves for the backward pass in float32.
    """

    parameters: int
    flops: int
    activations: int

    def training_memory(self, batch_size: int) -> int:
        """Bytes that training with Adam and averaged weights takes in float32, at least."""
        return BYTES * NUMBERS_PER_PARAMETER * self.parameters + batch_size * self.activations

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:.2f} M parameters, {self.flops / 1e9:.3g} GFLOP an evaluation, "
            f"{self.activations / 2**20:.3g} MiB of activations an example"
        )


def summarize(network: nn.Module) -> Summary:
    """The costs of a network, which stays as it is, on whatever device."""
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Summary(parameters, count_flops(network), count_activations(network))


def count_flops(network: nn.Module) -> int:
    """Floating-point operations of one evaluation for one example."""
    network = _on_meta(network).eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*_inputs(network))
    return counter.get_total_flops()


def count_activations(network: nn.Module) -> int:
    """Bytes that one example leaves for the backward pass of a training step in float32.

    Several layers may need the same tensor, which counts once; weights do not count.
    """
    network = _on_meta(network).train()
    known = {_storage(tensor) for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, Tensor] = {}  # by storage; holding the tensors keeps their storages from being used again

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept.setdefault(_storage(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = network(*_inputs(network))
    del y
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _on_meta(network: nn.Module) -> nn.Module:
    """A copy without numbers."""
    return copy.deepcopy(network).to("meta")


def _inputs(network: Any) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, *network.shape, device="meta"), torch.zeros(1, device="meta")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
