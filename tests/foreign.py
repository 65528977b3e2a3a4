"""Networks of other projects, written from scratch over tensors by name; shared by the tests of the importers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights:
    """Random float64 tensors by name, made when they are first asked for: a checkpoint that a forward pass writes."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.state: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`, about as large as keeps the variance of what passes."""
        if name not in self.state:
            numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            if len(shape) > 1:
                numbers /= math.sqrt(math.prod(shape[1:]))
            else:
                numbers = 0.3 * numbers + ("norm" in name and name.endswith("weight"))
            self.state[name] = numbers
        assert self.state[name].shape == shape, name
        return self.state[name]

    def linear(self, name: str, x: Tensor, out: int, bias: bool = True) -> Tensor:
        """A linear layer from the last axis of `x`."""
        y = x @ self(f"{name}.weight", out, x.shape[-1]).T
        return y + self(f"{name}.bias", out) if bias else y

    def conv(self, name: str, x: Tensor, out: int, size: int = 3, stride: int = 1) -> Tensor:
        """A convolution with a border of zeros that keeps the size."""
        weight, bias = self(f"{name}.weight", out, x.shape[1], size, size), self(f"{name}.bias", out)
        return F.conv2d(x, weight, bias, stride=stride, padding=size // 2)

    def norm(self, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
        """Group normalization by its definition."""
        channels = x.shape[1]
        parts = x.reshape(len(x), groups, -1)
        deviation = parts - parts.mean(2, keepdim=True)
        normal = (deviation / (deviation.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)
        weight, bias = self(f"{name}.weight", channels), self(f"{name}.bias", channels)
        return normal * weight[:, None, None] + bias[:, None, None]


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q^T k / sqrt(c)) v for tensors (batch, channels, pixels)."""
    weights = torch.einsum("bct,bcs->bts", queries, keys) / math.sqrt(queries.shape[1])
    return torch.einsum("bts,bcs->bct", weights.softmax(2), values)


def sinusoids(label: Tensor, size: int, endpoint: bool, cosines_first: bool) -> Tensor:
    """Positional features; frequencies are float32 on every side."""
    half = size // 2
    step = math.log(10_000) / (half - 1 if endpoint else half)
    phase = label[:, None] * torch.exp(-step * torch.arange(half, dtype=torch.float32))
    parts = [phase.sin(), phase.cos()]
    return torch.cat(parts[::-1] if cosines_first else parts, 1)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((ours - theirs).norm() / theirs.norm())
