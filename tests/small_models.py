"""Every registered model in a size for tests, with natural weights and suitable inputs.

A new model needs an entry in `SMALL`, and one in `SHAPES` if it is not for pictures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sde.models import MODELS

SMALL: dict[str, dict[str, Any]] = {
    name: {"channels": 8, "channel_multipliers": [1, 2], "blocks_per_level": 1, "attention_resolutions": [4]}
    for name in ("ncsnpp", "ddpmpp", "ddpm")
} | {
    "adm": {
        "channels": 8,
        "channel_multipliers": [1, 2],
        "blocks_per_level": 1,
        "attention_resolutions": [4],
        "head_channels": 4,
    },
    "mlp": {"width": 16, "depth": 2},
    "dit": {"patch_size": 2, "width": 16, "depth": 2, "heads": 2},
    "unet1d": {
        "channels": 8,
        "channel_multipliers": [1, 2],
        "blocks_per_level": 1,
        "attention_lengths": [8],
        "heads": 2,
    },
    "edm2": {
        "channels": 8,
        "channel_multipliers": [1, 2],
        "blocks_per_level": 1,
        "attention_resolutions": [4],
        "head_channels": 4,
    },
    "ncsn": {"channels": 8, "channel_multipliers": [1, 2], "dilations": [1, 1], "num_scales": 1300},
    "ncsnv2": {"channels": 8, "channel_multipliers": [1, 2, 2], "dilations": [1, 1, 2]},
}
PICTURE = (3, 8, 8)
SHAPES: dict[str, tuple[int, ...]] = {"mlp": (2,), "unet1d": (3, 16)}

# The range of each noise label, for times and noise levels that training meets.
LABELS = {"time": (0.01, 999.0), "sigma": (0.01, 50.0), "log_sigma": (-1.6, 1.3), "index": (0.0, 999.0)}


def shape_of(name: str) -> tuple[int, ...]:
    """The shape of one example for the model `name`."""
    return SHAPES.get(name, PICTURE)


def lively(model: nn.Module) -> nn.Module:
    """`model` with weights of natural size everywhere; a fresh one starts with many near zero and gives zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 10
            parameter.add_(torch.randn_like(parameter) / fan**0.5)
    return model


def build(name: str, num_classes: int = 0, **settings: Any) -> nn.Module:
    """The small model `name` with lively weights, in evaluation mode."""
    torch.manual_seed(0)
    return lively(MODELS.get(name)(shape_of(name), num_classes, **SMALL[name] | settings)).eval()


def inputs(name: str, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Examples (batch, *shape) and noise labels (batch,) for the model `name`."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((batch, *shape_of(name)), generator=generator, dtype=torch.float64)
    low, high = LABELS[build(name).noise_label]
    noise = low + (high - low) * torch.rand(batch, generator=generator, dtype=torch.float64)
    return x.to(dtype), noise.to(dtype)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative root-mean-square difference."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())
