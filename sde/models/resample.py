r"""Making pictures half or twice as large.

Two kinds, each with and without a learned 3x3 convolution. The plain kind averages 2x2 pixels or repeats each pixel.
The FIR kind filters with a finite impulse response k so that nothing aliases (arXiv 1904.11486; StyleGAN2, arXiv
1912.04958, appendix B), by default k = [1, 3, 3, 1] along either axis, normalized to sum 1:

    down: y = (k * x) at every second pixel              up: y = 4 k * (x with a zero after every pixel)

Pixels outside are zero. Both are one depthwise convolution of stride 2 here, with no zeros inserted or multiplied. The
learned convolution comes after the filter on the way down and before it on the way up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sde.errors import UserError
from sde.models.layers import conv, initialize


def check_fir_kernel(kernel: Sequence[float]) -> tuple[float, ...]:
    """`kernel` as a tuple, or `UserError` unless it has two or more finite taps whose sum is not 0."""
    taps = tuple(float(tap) for tap in kernel)
    if len(taps) < 2 or not 0 < abs(sum(taps)) < float("inf"):
        raise UserError(f"model.fir_kernel={list(kernel)} is not a filter: give two or more taps with a sum above 0")
    return taps


def fir_kernel_2d(kernel: Sequence[float]) -> Tensor:
    """The outer product of `kernel` (K,) with itself, normalized to sum 1: (K, K) float32."""
    taps = torch.tensor(kernel, dtype=torch.float64)
    taps = taps / taps.sum()
    return torch.outer(taps, taps).float()


class FIRFilter(nn.Module):
    """A depthwise correlation with the mirrored kernel, which is the convolution k * x, after zero padding.

    Args:
        channels: of input and output.
        kernel: taps along either axis.
        gain: factor on the result.
        stride: 1, or 2 to keep every second pixel.
        pad: zeros (before, after) along either axis.
    """

    weight: Tensor

    def __init__(self, channels: int, kernel: Sequence[float], gain: float, stride: int, pad: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride
        self.pad = pad
        mirrored = gain * fir_kernel_2d(kernel).flip(0, 1)
        self.register_buffer("weight", mirrored.repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, channels, H', W') with H' = (H + before + after - K) // stride + 1."""
        before, after = self.pad
        if before != after:
            x = F.pad(x, (before, after, before, after))
        padding = before if before == after else 0
        return F.conv2d(x, self.weight.to(x.dtype), stride=self.stride, padding=padding, groups=x.shape[1])


class FIRUpsample(nn.Module):
    """Twice as large: a zero after every pixel, then the filter with gain 4, as one transposed convolution.

    Args:
        channels: of input and output.
        kernel: taps along either axis.
    """

    weight: Tensor

    def __init__(self, channels: int, kernel: Sequence[float]) -> None:
        super().__init__()
        self.crop = len(kernel) - 2 - (len(kernel) - 1) // 2
        self.register_buffer("weight", 4 * fir_kernel_2d(kernel).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, channels, 2H, 2W)."""
        channels, height, width = x.shape[1:]
        y = F.conv_transpose2d(x, self.weight.to(x.dtype), stride=2, padding=self.crop, groups=channels)
        return y[:, :, : 2 * height, : 2 * width]


class ConvDownsample(nn.Module):
    """Half as large: a 3x3 convolution of stride 2, with a row of zeros below and a column to the right.

    Args:
        channels: of the input.
        out_channels: of the output.
        pad_around: zeros on all four sides instead.
    """

    def __init__(self, channels: int, out_channels: int, *, pad_around: bool = False) -> None:
        super().__init__()
        self.pad_around = pad_around
        self.conv = conv(channels, out_channels, stride=2, padding=1 if pad_around else 0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out_channels, H/2, W/2)."""
        return self.conv(x if self.pad_around else F.pad(x, (0, 1, 0, 1)))


class ConvUpsample(nn.Module):
    """Twice as large: each pixel four times, then a 3x3 convolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.repeat = nn.Upsample(scale_factor=2, mode="nearest")
        self.conv = conv(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out_channels, 2H, 2W)."""
        return self.conv(self.repeat(x))


class FIRConvDownsample(nn.Module):
    """Half as large: the filter, then a 3x3 convolution of stride 2; zeros are added once, before the filter."""

    def __init__(self, channels: int, out_channels: int, kernel: Sequence[float]) -> None:
        super().__init__()
        pad = len(kernel)  # (K - 2) for the filter and 2 for the convolution
        self.filter = FIRFilter(channels, kernel, 1.0, stride=1, pad=((pad + 1) // 2, pad // 2))
        self.conv = conv(channels, out_channels, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out_channels, H/2, W/2)."""
        return self.conv(self.filter(x))


class FIRConvUpsample(nn.Module):
    """Twice as large: a zero after every pixel, a 3x3 correlation that grows the picture by a pixel, then the filter.

    The first two are a transposed convolution, whose weight (channels, out_channels, 3, 3) is the correlation's with
    its first two axes exchanged and the last two mirrored. The bias is added after the filter.
    """

    def __init__(self, channels: int, out_channels: int, kernel: Sequence[float]) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, out_channels, 3, stride=2, bias=False)
        initialize(self.conv.weight)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        pad = len(kernel) - 4  # (K - 2) for the filter less 2 for the pixels that the convolution has grown
        self.filter = FIRFilter(out_channels, kernel, 4.0, stride=1, pad=((pad + 1) // 2 + 1, pad // 2 + 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out_channels, 2H, 2W)."""
        return self.filter(self.conv(x)) + self.bias[:, None, None]


def downsample(
    channels: int,
    out_channels: int | None = None,
    *,
    with_conv: bool,
    fir_kernel: Sequence[float] | None,
    pad_around: bool = False,
) -> nn.Module:
    """A module from (B, channels, H, W) to (B, out_channels, H/2, W/2).

    Args:
        channels: of the input.
        out_channels: of the output; None for `channels`, the only choice without a convolution.
        with_conv: whether a learned 3x3 convolution takes part.
        fir_kernel: taps of the filter along either axis; None for the plain kind.
        pad_around: whether the plain convolution has zeros on all four sides, not two.
    """
    if with_conv:
        out_channels = out_channels or channels
        if fir_kernel is None:
            return ConvDownsample(channels, out_channels, pad_around=pad_around)
        return FIRConvDownsample(channels, out_channels, fir_kernel)
    assert out_channels in (None, channels)
    if fir_kernel is None:
        return nn.AvgPool2d(2)
    pad = len(fir_kernel) - 2
    return FIRFilter(channels, fir_kernel, 1.0, stride=2, pad=((pad + 1) // 2, pad // 2))


def upsample(
    channels: int, out_channels: int | None = None, *, with_conv: bool, fir_kernel: Sequence[float] | None
) -> nn.Module:
    """A module from (B, channels, H, W) to (B, out_channels, 2H, 2W); arguments as `downsample`."""
    if with_conv:
        out_channels = out_channels or channels
        if fir_kernel is None:
            return ConvUpsample(channels, out_channels)
        return FIRConvUpsample(channels, out_channels, fir_kernel)
    assert out_channels in (None, channels)
    return nn.Upsample(scale_factor=2, mode="nearest") if fir_kernel is None else FIRUpsample(channels, fir_kernel)
