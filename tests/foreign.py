"""Networks of other projects, written from scratch over tensors by name; shared by the tests of the importers."""

from __future__ import annotations

import math
from typing import Any

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


class Layout:
    """Names of the layers of a U-Net with blocks, attention and resampling, and how its attention is projected.

    Args:
        block: names of norm, convolution, embedding, norm, convolution and shortcut in a residual block.
        place: name of what is at (way, level or place in the middle, kind, index), kind "block", "attention" or
            "resample".
        project: queries, keys and values of all heads from (weights, name, normalized input (B, C, N), heads), each
            (B, heads, C / heads, N).
        ends: names of input, first and second layer of the embedding, last norm and last convolution.
        attention: names of its norm and its last layer.
    """

    def __init__(self, block: str, place: Any, project: Any, ends: str, attention: str) -> None:
        self.block = block.split()
        self.place = place
        self.project = project
        self.ends = ends.split()
        self.attention = attention.split()


class PlainUNet:
    """The U-Net of DDPM and ADM over a layout.

    Args:
        layout: the names.
        widths: channels of the levels.
        count: blocks of a level on the way down.
        attention: whether each level has attention.
        heads: number of heads for a number of channels.
        inside: resample inside of blocks.
        scale_shift: the embedding scales and shifts.
        pad: zeros (before, after) of convolutions that halve.
        eps: of normalization.
    """

    def __init__(
        self,
        layout: Layout,
        widths: list[int],
        count: int,
        attention: list[bool],
        heads: Any,
        inside: bool,
        scale_shift: bool,
        pad: tuple[int, int],
        eps: float = 1e-5,
    ) -> None:
        self.layout, self.widths, self.count, self.seen = layout, widths, count, attention
        self.heads, self.inside, self.scale_shift, self.pad, self.eps = heads, inside, scale_shift, pad, eps
        self.weights = Weights()

    def residual(self, name: str, x: Tensor, emb: Tensor, out: int, how: str = "") -> Tensor:
        w = self.weights
        norm_1, conv_1, condition, norm_2, conv_2, shortcut = (f"{name}.{part}" for part in self.layout.block)
        h = F.silu(w.norm(norm_1, x, 32, self.eps))
        h, x = self.scaled(h, how), self.scaled(x, how)
        h = w.conv(conv_1, h, out)
        c = w.linear(condition, F.silu(emb), out * (1 + self.scale_shift))[:, :, None, None]
        if self.scale_shift:
            h = w.norm(norm_2, h, 32, self.eps) * (1 + c[:, :out]) + c[:, out:]
        else:
            h = w.norm(norm_2, h + c, 32, self.eps)
        h = w.conv(conv_2, F.silu(h), out)
        return h + (x if x.shape[1] == out else w.conv(shortcut, x, out, 1))

    @staticmethod
    def scaled(x: Tensor, how: str) -> Tensor:
        if how == "down":
            return 0.25 * (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2])
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if how == "up" else x

    def attend(self, name: str, x: Tensor) -> Tensor:
        channels = x.shape[1]
        heads, (norm, last) = self.heads(channels), self.layout.attention
        flat = self.weights.norm(f"{name}.{norm}", x, 32, self.eps).flatten(2)
        queries, keys, values = self.layout.project(self.weights, name, flat, heads)
        seen = torch.cat([attend(queries[:, k], keys[:, k], values[:, k]) for k in range(heads)], 1)
        return x + self.layout_linear(f"{name}.{last}", seen, channels).unflatten(2, x.shape[2:])

    def layout_linear(self, name: str, flat: Tensor, out: int) -> Tensor:
        """A layer on every pixel of (B, C, N), stored (out, C) or, where so named, (out, C, 1)."""
        shape = (out, flat.shape[1], 1) if name.endswith("proj_out") else (out, flat.shape[1])
        weight = self.weights(f"{name}.weight", *shape).reshape(out, flat.shape[1])
        return weight @ flat + self.weights(f"{name}.bias", out)[:, None]

    def resampled(self, name: str, x: Tensor, emb: Tensor, how: str) -> Tensor:
        if self.inside:
            return self.residual(name, x, emb, x.shape[1], how)
        if how == "up":
            return self.weights.conv(f"{name}.conv", self.scaled(x, "up"), x.shape[1])
        low, high = self.pad
        name = f"{name}.op" if name.startswith("input_blocks") else f"{name}.conv"
        weight, bias = (
            self.weights(f"{name}.weight", x.shape[1], x.shape[1], 3, 3),
            self.weights(f"{name}.bias", x.shape[1]),
        )
        return F.conv2d(F.pad(x, (low, high, low, high)), weight, bias, stride=2)

    def __call__(self, x: Tensor, features: Tensor, vector: Tensor | None, out: int) -> Tensor:
        """The output (B, out, H, W), given features of time (B, channels) and a vector (B, 4 channels) of the class."""
        w, place, lowest = self.weights, self.layout.place, len(self.widths) - 1
        first, linear_1, linear_2, norm, last = self.layout.ends
        emb = w.linear(linear_2, F.silu(w.linear(linear_1, features, 4 * self.widths[0])), 4 * self.widths[0])
        emb = emb if vector is None else emb + vector
        h = w.conv(first, x, self.widths[0])
        skips = [h]
        for i, width in enumerate(self.widths):
            for j in range(self.count):
                h = self.residual(place("down", i, "block", j), h, emb, width)
                h = self.attend(place("down", i, "attention", j), h) if self.seen[i] else h
                skips.append(h)
            if i < lowest:
                h = self.resampled(place("down", i, "resample", 0), h, emb, "down")
                skips.append(h)
        h = self.residual(place("mid", 0, "block", 0), h, emb, h.shape[1])
        h = self.attend(place("mid", 1, "attention", 0), h)
        h = self.residual(place("mid", 2, "block", 1), h, emb, h.shape[1])
        for k, width in enumerate(reversed(self.widths)):
            for j in range(self.count + 1):
                h = self.residual(place("up", k, "block", j), torch.cat([h, skips.pop()], 1), emb, width)
                h = self.attend(place("up", k, "attention", j), h) if self.seen[lowest - k] else h
            if k < lowest:
                h = self.resampled(place("up", k, "resample", 0), h, emb, "up")
        return w.conv(last, F.silu(w.norm(norm, h, 32, self.eps)), out)
