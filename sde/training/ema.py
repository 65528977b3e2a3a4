r"""Averaged weights: what samples are drawn with.

    average <- d average + (1 - d) weights,    d = min(decay, (1 + n) / (10 + n)) at update n with warm-up,

so that the average follows quickly at first and forgets the initialization (arXiv 2011.13456 uses decay 0.9999 for VP
and 0.999 for VE).
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from sde.errors import check_number


class EMA:
    """An exponential moving average of a network's parameters, kept in a copy of the network.

    Args:
        network: what is trained.
        decay: in [0, 1); the average is over about 1 / (1 - decay) steps.
        warmup: shorten the average at the beginning, as above.

    Attributes:
        network: the copy, in evaluation mode, whose parameters are the averages.
    """

    def __init__(self, network: nn.Module, decay: float = 0.9999, warmup: bool = True) -> None:
        check_number("ema.decay", decay, at_least=0, below=1)
        self.decay = decay
        self.warmup = warmup
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._pairs = list(zip(self.network.parameters(), network.parameters(), strict=True))
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the network's present weights in; `step` is the number of updates before this one."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        averages, weights = zip(*self._pairs, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
