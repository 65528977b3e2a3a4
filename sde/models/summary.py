r"""What a network costs: parameters, floating-point operations, memory.

All of it is found by running the network on the meta device, which has shapes and no numbers: it takes a second for the
largest network and no memory. Operations are those of convolutions, matrix products and attention, a multiplication
and an addition counting as two.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def on_meta(network: nn.Module) -> nn.Module:
    """A copy of `network` without numbers."""
    return copy.deepcopy(network).to("meta")


def count_flops(network: nn.Module) -> int:
    """Floating-point operations of one evaluation for one example."""
    network = on_meta(network).eval()
    shape: tuple[int, ...] = network.shape  # type: ignore[assignment]
    x = torch.zeros(1, *shape, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, torch.zeros(1, device="meta"))
    return counter.get_total_flops()
