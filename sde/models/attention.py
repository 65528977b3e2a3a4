"""Attention as all networks call it, by the fastest kernel of the device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED_ON_META: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(size)) value for (B, heads, n, size) each.

    The meta device, on which costs are counted (`sde.models.summary`), has no kernel that does this in one; one of
    another device stands for it there, which keeps the same tensors for the backward pass as all fused ones.
    """
    if query.device.type == "meta":
        return FUSED_ON_META(query, key, value)[0]
    return F.scaled_dot_product_attention(query, key, value)
