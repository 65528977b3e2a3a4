"""An independent network in the original's layout: one list of layers, walked in order, everything spelled out.

Written from the description of the networks of arXiv 2011.13456, slowly and literally: zeros are inserted, attention
is an einsum over four axes, nothing is fused. The names and the order of its weights are those of the original's
checkpoints, so that it makes checkpoints for any configuration, and says what a network read from one must compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "swish": F.silu,
    "elu": F.elu,
    "relu": torch.relu,
    "lrelu": lambda x: torch.where(x > 0, x, 0.2 * x),
}


def upfirdn(x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Insert zeros after every pixel, pad, convolve every channel with `kernel` (K, K), keep every n-th pixel."""
    batch, channels, height, width = x.shape
    y = F.pad(x.reshape(-1, height, 1, width, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(-1, 1, height * up, width * up)
    y = F.pad(y, (pad[0], pad[1], pad[0], pad[1]))
    y = F.conv2d(y, kernel.flip(0, 1).to(x)[None, None])
    return y.reshape(batch, channels, *y.shape[2:])[:, :, ::down, ::down]


def square(kernel: list[float]) -> Tensor:
    """The normalized outer product of a kernel with itself."""
    taps = np.asarray(kernel, dtype=np.float32)
    taps = np.outer(taps, taps)
    return torch.from_numpy(taps / taps.sum())


def fir_up(x: Tensor, kernel: list[float]) -> Tensor:
    p = len(kernel) - 2
    return upfirdn(x, 4 * square(kernel), up=2, pad=((p + 1) // 2 + 1, p // 2))


def fir_down(x: Tensor, kernel: list[float]) -> Tensor:
    p = len(kernel) - 2
    return upfirdn(x, square(kernel), down=2, pad=((p + 1) // 2, p // 2))


def fir_conv_down(x: Tensor, weight: Tensor, kernel: list[float]) -> Tensor:
    p = (len(kernel) - 2) + 2
    return F.conv2d(upfirdn(x, square(kernel), pad=((p + 1) // 2, p // 2)), weight, stride=2)


def fir_conv_up(x: Tensor, weight: Tensor, kernel: list[float]) -> Tensor:
    """Zeros after every pixel (none after the last), correlation with all overlaps, filter."""
    batch, channels, height, width = x.shape
    y = x.new_zeros(batch, channels, 2 * height - 1, 2 * width - 1)
    y[:, :, ::2, ::2] = x
    y = F.conv2d(F.pad(y, (2, 2, 2, 2)), weight)
    p = (len(kernel) - 2) - 2
    return upfirdn(y, 4 * square(kernel), pad=((p + 1) // 2 + 1, p // 2 + 1))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head over the pixels of (B, C, H, W)."""
    logits = torch.einsum("bchw,bcij->bhwij", q, k) / math.sqrt(q.shape[1])
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    return torch.einsum("bhwij,bcij->bchw", weights, v)


def timestep_features(t: Tensor, size: int) -> Tensor:
    half = size // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    phase = t[:, None] * frequencies[None].to(t)
    return F.pad(torch.cat((torch.sin(phase), torch.cos(phase)), 1), (0, size % 2))


class Fourier(nn.Module):
    def __init__(self, size: int, scale: float) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(size) * scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        phase = x[:, None] * self.W[None] * 2 * math.pi
        return torch.cat((torch.sin(phase), torch.cos(phase)), 1)


class Nin(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(in_channels, out_channels))
        self.b = nn.Parameter(torch.empty(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bhwi,io->bhwo", x.permute(0, 2, 3, 1), self.W) + self.b
        return y.permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self, channels: int, groups: int, rescale: bool) -> None:
        super().__init__()
        self.GroupNorm_0 = nn.GroupNorm(groups, channels, eps=1e-6)
        for i in range(4):
            self.add_module(f"NIN_{i}", Nin(channels, channels))
        self.rescale = rescale

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        y = x + self.NIN_3(attention(self.NIN_0(h), self.NIN_1(h), self.NIN_2(h)))
        return y / math.sqrt(2) if self.rescale else y


class FirConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(out_channels))


class Resample(nn.Module):
    """The original's Upsample and Downsample."""

    def __init__(
        self, up: bool, in_channels: int, out_channels: int, with_conv: bool, kernel: list[float] | None
    ) -> None:
        super().__init__()
        self.up, self.with_conv, self.kernel = up, with_conv, kernel
        if with_conv and kernel:
            self.Conv2d_0 = FirConv(in_channels, out_channels)
        elif with_conv:
            self.Conv_0 = nn.Conv2d(in_channels, out_channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel and self.with_conv:
            f = fir_conv_up if self.up else fir_conv_down
            return f(x, self.Conv2d_0.weight, self.kernel) + self.Conv2d_0.bias[None, :, None, None]
        if self.kernel:
            return (fir_up if self.up else fir_down)(x, self.kernel)
        if self.up:
            y = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            return self.Conv_0(y) if self.with_conv else y
        if self.with_conv:
            return self.Conv_0(F.pad(x, (0, 1, 0, 1)))
        return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))


class Combine(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, method: str) -> None:
        super().__init__()
        self.Conv_0 = nn.Conv2d(in_channels, out_channels, 1)
        self.method = method

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.Conv_0(x)
        return torch.cat((h, y), 1) if self.method == "cat" else h + y


class Block(nn.Module):
    """The original's residual blocks; `resample` is None, "up" or "down" (BigGAN only)."""

    def __init__(self, net: ListNetwork, in_channels: int, out_channels: int, resample: str | None = None) -> None:
        super().__init__()
        self.act, self.rescale, self.resample = net.act, net.rescale, None
        self.GroupNorm_0 = net.norm(in_channels)
        self.Conv_0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.Dense_0 = nn.Linear(4 * net.nf, out_channels)
        self.GroupNorm_1 = net.norm(out_channels)
        self.dropout = nn.Dropout(net.model["dropout"])
        self.Conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if net.biggan and (in_channels != out_channels or resample):
            self.Conv_2 = nn.Conv2d(in_channels, out_channels, 1)
        elif in_channels != out_channels:
            self.NIN_0 = Nin(in_channels, out_channels)
        if resample:
            self.resample = Resample(resample == "up", in_channels, in_channels, False, net.kernel)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        h = self.act(self.GroupNorm_0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.Conv_0(h)
        if embedding is not None:
            h = h + self.Dense_0(self.act(embedding))[:, :, None, None]
        h = self.Conv_1(self.dropout(self.act(self.GroupNorm_1(h))))
        x = self.Conv_2(x) if hasattr(self, "Conv_2") else self.NIN_0(x) if hasattr(self, "NIN_0") else x
        return (x + h) / math.sqrt(2) if self.rescale else x + h


class ListNetwork(nn.Module):
    """The original's `ncsnpp` or `ddpm`, called with the original's label: time, noise level or index of it.

    Args:
        config: the original's configuration, "data" and "model".
        seed: of the weights, all of which are of natural size (a fresh original starts with many near zero).
    """

    def __init__(self, config: dict[str, Any], seed: int = 0) -> None:
        super().__init__()
        model, self.data = config["model"], config["data"]
        self.ddpm = model["name"] == "ddpm"
        self.model = {
            "resblock_type": "ddpm", "embedding_type": "positional", "progressive": "none", "progressive_input": "none",
            "progressive_combine": "sum", "fir": False, "skip_rescale": False, "fir_kernel": [1, 3, 3, 1],
            "dropout": 0.0,
        } | model  # fmt: skip
        if self.ddpm:
            self.model |= {"embedding_type": "positional", "conditional": True}
        self.nf, self.act = model["nf"], ACTIVATIONS[model["nonlinearity"]]
        self.biggan = self.model["resblock_type"] == "biggan"
        self.rescale = self.model["skip_rescale"]
        self.kernel = list(self.model["fir_kernel"]) if self.model["fir"] else None
        levels = np.linspace(np.log(model["sigma_max"]), np.log(model["sigma_min"]), model["num_scales"])
        self.register_buffer("sigmas", torch.tensor(np.exp(levels)))
        torch.manual_seed(seed)
        self.all_modules = nn.ModuleList(self.make())
        for name, parameter in self.named_parameters():
            if name == "all_modules.0.W" and parameter.ndim == 1:
                continue
            fan = parameter[0].numel() if parameter.ndim > 1 else 100
            if parameter.ndim == 2 and name.endswith(".W"):
                fan = parameter.shape[0]
            offset = 1.0 if "GroupNorm" in name and name.endswith("weight") else 0.0
            parameter.data = offset + torch.randn(parameter.shape, dtype=torch.float64) / math.sqrt(fan)
        self.double().eval()

    def norm(self, channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(32 if self.ddpm else min(channels // 4, 32), channels, eps=1e-6)

    def attention(self, channels: int) -> Attention:
        return Attention(channels, self.norm(channels).num_groups, self.rescale)

    def has_attention(self, level: int) -> bool:
        return self.data["image_size"] // 2**level in self.model["attn_resolutions"]

    def make(self) -> Iterator[nn.Module]:
        model, nf, pictures = self.model, self.nf, self.data["num_channels"]
        widths = [nf * m for m in model["ch_mult"]]
        last = len(widths) - 1
        if model["embedding_type"] == "fourier":
            yield Fourier(nf, model["fourier_scale"])
        if model["conditional"]:
            yield nn.Linear(2 * nf if model["embedding_type"] == "fourier" else nf, 4 * nf)
            yield nn.Linear(4 * nf, 4 * nf)
        yield nn.Conv2d(pictures, nf, 3, padding=1)
        channels, skips, pyramid = nf, [nf], pictures
        for i, width in enumerate(widths):
            for _ in range(model["num_res_blocks"]):
                yield Block(self, channels, width)
                channels = width
                if self.has_attention(i):
                    yield self.attention(channels)
                skips.append(channels)
            if i == last:
                continue
            if self.biggan:
                yield Block(self, channels, channels, "down")
            else:
                yield Resample(False, channels, channels, model["resamp_with_conv"], self.kernel)
            if model["progressive_input"] == "input_skip":
                yield Combine(pictures, channels, model["progressive_combine"])
                channels *= 2 if model["progressive_combine"] == "cat" else 1
            elif model["progressive_input"] == "residual":
                yield Resample(False, pyramid, channels, True, self.kernel)
                pyramid = channels
            skips.append(channels)
        yield Block(self, channels, channels)
        yield self.attention(channels)
        yield Block(self, channels, channels)
        for i in reversed(range(len(widths))):
            for _ in range(model["num_res_blocks"] + 1):
                yield Block(self, channels + skips.pop(), widths[i])
                channels = widths[i]
            if self.has_attention(i):
                yield self.attention(channels)
            if model["progressive"] == "output_skip" or (model["progressive"] == "residual" and i == last):
                yield self.norm(channels)
                yield nn.Conv2d(channels, pictures if model["progressive"] == "output_skip" else channels, 3, padding=1)
            elif model["progressive"] == "residual":
                yield Resample(True, widths[i + 1], channels, True, self.kernel)
            if i and self.biggan:
                yield Block(self, channels, channels, "up")
            elif i:
                yield Resample(True, channels, channels, model["resamp_with_conv"], self.kernel)
        if model["progressive"] != "output_skip":
            yield self.norm(channels)
            yield nn.Conv2d(channels, pictures, 3, padding=1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        model, walk = self.model, iter(self.all_modules)
        last = len(model["ch_mult"]) - 1
        embedding: Tensor | None
        if model["embedding_type"] == "fourier":
            sigma, embedding = label, next(walk)(torch.log(label))
        else:
            sigma, embedding = self.sigmas[label.long()], timestep_features(label.to(x), self.nf)
        if model["conditional"]:
            embedding = next(walk)(embedding)
            embedding = next(walk)(self.act(embedding))
        else:
            embedding = None
        picture = x if self.data["centered"] else 2 * x - 1
        hs = [next(walk)(picture)]
        for i in range(last + 1):
            for _ in range(model["num_res_blocks"]):
                h = next(walk)(hs[-1], embedding)
                hs.append(next(walk)(h) if self.has_attention(i) else h)
            if i == last:
                continue
            h = next(walk)(hs[-1], embedding) if self.biggan else next(walk)(hs[-1])
            if model["progressive_input"] == "input_skip":
                picture = Resample(False, 1, 1, False, self.kernel)(picture)
                h = next(walk)(picture, h)
            elif model["progressive_input"] == "residual":
                h = picture = self.add(next(walk)(picture), h)
            hs.append(h)
        h = next(walk)(hs[-1], embedding)
        h = next(walk)(h)
        h = next(walk)(h, embedding)
        pyramid: Tensor | None = None
        for i in reversed(range(last + 1)):
            for _ in range(model["num_res_blocks"] + 1):
                h = next(walk)(torch.cat((h, hs.pop()), 1), embedding)
            if self.has_attention(i):
                h = next(walk)(h)
            if model["progressive"] == "output_skip":
                said = self.last(walk, h)
                pyramid = said if pyramid is None else Resample(True, 1, 1, False, self.kernel)(pyramid) + said
            elif model["progressive"] == "residual":
                if pyramid is None:
                    pyramid = self.last(walk, h)
                else:
                    h = pyramid = self.add(next(walk)(pyramid), h)
            if i:
                h = next(walk)(h, embedding) if self.biggan else next(walk)(h)
        y = pyramid if model["progressive"] == "output_skip" else self.last(walk, h)
        assert next(walk, None) is None
        return y / sigma[:, None, None, None] if model["scale_by_sigma"] else y

    def last(self, walk: Iterator[nn.Module], h: Tensor) -> Tensor:
        h = self.act(next(walk)(h))
        return next(walk)(h)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y) / math.sqrt(2) if self.rescale else x + y

    def checkpoint(self) -> dict[str, Any]:
        """A checkpoint as the original writes it; the averages differ from the weights."""
        averages = [p.detach() * 1.1 for p in self.parameters() if p.requires_grad]
        return {
            "model": {f"module.{name}": tensor for name, tensor in self.state_dict().items()},
            "ema": {"decay": 0.999, "num_updates": 1, "shadow_params": averages},
            "optimizer": {},
            "step": 1,
        }
