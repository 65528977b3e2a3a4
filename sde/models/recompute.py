"""Trading time for memory: activations that are computed again in the backward pass instead of being kept (arXiv
1604.06174, "activation checkpointing")."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(module: nn.Module, *args: Any) -> Any:
    """`module(*args)`, of which only the arguments are kept for the backward pass, which calls `module` once more.

    Gradients are the same to the bit, dropout included. Without gradients (in sampling) it is a plain call.
    """
    if not torch.is_grad_enabled():
        return module(*args)
    return checkpoint(module, *args, use_reentrant=False)
