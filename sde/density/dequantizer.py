r"""Variational dequantization: where in its bucket a pixel's value is put (arXiv 1902.00275, section 3.1).

A picture's probability is the integral of the density p over the buckets of its pixels, w wide. For any density
q(u | picture) on the unit cube Jensen's inequality bounds it,

    log P(picture) >= E_{u ~ q} [ log p(x + w (u - 1/2)) + D log w - log q(u | picture) ],

where x is the encoded picture and D the number of its pixels. Uniform dequantization has q = 1. The gap is the
Kullback-Leibler divergence of q from p inside the buckets, so a q that is learned for a fixed p makes the bound tighter
(for score models arXiv 2101.09258, section 5).

Here q is a flow. Noise is uniform on the cube after the normal distribution function, and goes through coupling layers:
one half of the pixels is changed, each by a monotone map of (0, 1) to itself, whose shape a small network reads from
the other half and the picture. The maps are rational-quadratic splines (arXiv 1906.04032): with knots (x_k, y_k),
slopes d_k there, s = (y_{k+1} - y_k) / (x_{k+1} - x_k) and a = (x - x_k) / (x_{k+1} - x_k),

    y = y_k + (y_{k+1} - y_k) (s a^2 + d_k a (1 - a)) / (s + (d_k + d_{k+1} - 2 s) a (1 - a)),

whose inverse is the root of a quadratic equation. All of it stays on the cube, where nothing overflows, and a new
flow is the identity: q = 1.

Where a narrow density lies in its bucket differs from one gray level to the next, which a network hardly sees in x. So
it is told the level as waves too, cos and sin of 2 pi level / 2^k for k = 1, 2, ..., after the Fourier features of
arXiv 2107.00630.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sde.density.quantization import Quantization
from sde.errors import UserError, check_number

_LEAST = 1e-3  # width and height of a bin of a spline
_STEEPEST = 5.0  # largest |log slope| at a knot


@dataclass(frozen=True)
class DequantizerOptions:
    """Size of a dequantizer.

    Args:
        channels: features of a pixel.
        blocks: residual blocks that read the picture.
        layers: coupling layers; two change every pixel once.
        bins: of a spline; a pixel's density has twice as many free values, and one more.
        frequencies: of the waves that tell gray levels apart, of periods 2, 4, ... levels; 0 for none.
    """

    channels: int = 32
    blocks: int = 2
    layers: int = 4
    bins: int = 8
    frequencies: int = 8

    def __post_init__(self) -> None:
        for name, least in (("channels", 1), ("blocks", 0), ("layers", 2), ("bins", 1), ("frequencies", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise UserError(f"flow.{name}={value!r} must be a whole number")
            check_number(f"flow.{name}", value, at_least=least)
        check_number("flow.bins", self.bins, at_most=256)
        check_number("flow.frequencies", self.frequencies, at_most=16)


class Dequantizer(nn.Module):
    """The conditional flow q(u | picture) on the unit cube.

    Args:
        shape: (C, H, W) of a picture, of any size.
        options: size of the networks.
        quantization: the gray levels, and their values in encoded pictures.

    Raises:
        UserError: when the shape is not that of pictures.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        options: DequantizerOptions | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise UserError(f"shape={tuple(shape)} has no pixels to dequantize: it must be (channels, height, width)")
        self.shape = tuple(shape)
        self.options = options = options or DequantizerOptions()
        self.quantization = quantization or Quantization()
        self.stem = nn.Conv2d(shape[0] * (1 + 2 * options.frequencies), options.channels, 3, padding=1)
        self.blocks = nn.ModuleList(_block(options.channels) for _ in range(options.blocks))
        masks = _masks(self.shape)
        self.layers = nn.ModuleList(_Coupling(masks[k % len(masks)], options) for k in range(options.layers))

    def context(self, x: Tensor) -> Tensor:
        """What the flow knows of pictures `x` (B, C, H, W), (B, channels, H, W): the same for all draws of u."""
        hidden = self.stem(torch.cat([x, *self._waves(x)], 1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden

    def _waves(self, x: Tensor) -> list[Tensor]:
        """cos and sin of the gray levels of `x` at all periods, of its shape each."""
        phase = 2 * math.pi * ((x - self.quantization.low) / self.quantization.width)
        return [f(phase / 2**k) for k in range(1, self.options.frequencies + 1) for f in (torch.cos, torch.sin)]

    def forward(self, x: Tensor, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws of u and their log density, differentiable in the weights.

        Args:
            x: encoded pictures (B, C, H, W), in the type of the weights.
            noise: standard normal noise of that shape.
            context: `context(x)`, for several draws for the same pictures; computed when it is None.

        Returns:
            u (B, C, H, W) inside (0, 1), and log q(u | x) in nats (B,).
        """
        context = self.context(x) if context is None else context
        u, log_q = uniform(noise), x.new_zeros(len(x))
        for layer in self.layers:
            u, log_slope = layer(u, context)
            log_q = log_q - log_slope
        return _inside(u), log_q

    def inverse(self, u: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The noise (B, C, H, W) that `forward` makes `u` of, and log q(u | x) in nats (B,); -inf outside (0, 1)."""
        context = self.context(x) if context is None else context
        outside = ((u < 0) | (u > 1)).flatten(1).any(1)
        u, log_q = _inside(u), x.new_zeros(len(x))
        for layer in reversed(self.layers):
            u, log_slope = layer(u, context, inverse=True)
            log_q = log_q - log_slope
        return torch.special.ndtri(_inside(u)), log_q.masked_fill(outside, -math.inf)

    def log_prob(self, u: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log q(u | x) in nats, (B,), of given `u` (B, C, H, W)."""
        return self.inverse(u, x, context)[1]


def uniform(noise: Tensor) -> Tensor:
    """Standard normal `noise` as uniform numbers inside (0, 1), of the same shape: what an untrained flow gives."""
    return _inside(torch.special.ndtr(noise))


def _inside(u: Tensor) -> Tensor:
    """`u` kept off 0 and 1 by half a unit in the last place of 1."""
    end = torch.finfo(u.dtype).eps / 2
    return u.clamp(end, 1 - end)


def _block(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def _masks(shape: tuple[int, ...]) -> list[Tensor]:
    """Which pixels (C, H, W) successive layers change: a checkerboard, the rest, and the same with channels."""
    c, h, w = (torch.arange(n) for n in shape)
    channel = (c % 2 == 0)[:, None, None].expand(shape)
    board = (h[:, None] + w) % 2 == 0
    halves = [board.expand(shape)] + ([channel] if len(c) > 1 else [])
    return [mask for half in halves for mask in (half, ~half)]


class _Coupling(nn.Module):
    """Changes the pixels of `mask` (C, H, W) by splines that depend on the others and on the picture."""

    mask: Tensor

    def __init__(self, mask: Tensor, options: DequantizerOptions) -> None:
        super().__init__()
        c, channels = mask.shape[0], options.channels
        self.numbers = 3 * options.bins + 1
        self.register_buffer("mask", mask.clone(), persistent=False)
        self.network = nn.Sequential(
            nn.Conv2d(2 * c + channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
        )
        self.last = nn.Conv2d(channels, c * self.numbers, 1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, u: Tensor, context: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """`u` (B, C, H, W) mapped, or mapped back, and the sum (B,) of the splines' log slopes, either way the same."""
        # of variance 1 when u is uniform
        seen = ((u - 0.5) * math.sqrt(12)).masked_fill(self.mask, 0)
        told = self.mask.to(u.dtype).expand_as(u)
        numbers = self.last(self.network(torch.cat([seen, told, context], 1))).unflatten(1, (-1, self.numbers))
        spline = _spline(numbers)
        moved, log_slope = (backward if inverse else along)(spline, u)
        return torch.where(self.mask, moved, u), log_slope.masked_fill(~self.mask, 0).flatten(1).sum(1)


class Spline(NamedTuple):
    """Knots x and y and slopes at them, (B, C, K + 1, H, W) each, all ends at 0 and 1."""

    x: Tensor
    y: Tensor
    slope: Tensor


class _Piece(NamedTuple):
    """The piece of a spline that each pixel is on, (B, C, H, W) each: where it begins, its size and its end slopes."""

    x: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    left: Tensor
    right: Tensor


def _spline(numbers: Tensor) -> Spline:
    """Monotone splines from any `numbers` (B, C, 3 K + 1, H, W); zeros give the identity."""
    bins = numbers.shape[2] // 3
    widths, heights, slopes = numbers.split([bins, bins, bins + 1], 2)
    return Spline(_knots(widths), _knots(heights), torch.exp(_STEEPEST * torch.tanh(slopes / _STEEPEST)))


def _knots(numbers: Tensor) -> Tensor:
    bins = numbers.shape[2]
    least = min(_LEAST, 0.5 / bins)
    shares = least + (1 - bins * least) * torch.softmax(numbers, 2)
    inner = shares.cumsum(2)[:, :, :-1]
    end = torch.zeros_like(shares[:, :, :1])
    return torch.cat([end, inner, end + 1], 2)


def _piece(spline: Spline, knots: Tensor, value: Tensor) -> _Piece:
    """The pieces of `spline` between those of `knots` that `value` (B, C, H, W) is between."""
    k = (value[:, :, None] >= knots[:, :, 1:-1]).sum(2, keepdim=True)
    (x, x_end), (y, y_end), (left, right) = ((v.gather(2, k)[:, :, 0], v.gather(2, k + 1)[:, :, 0]) for v in spline)
    return _Piece(x, y, x_end - x, y_end - y, left, right)


def along(spline: Spline, x: Tensor) -> tuple[Tensor, Tensor]:
    """The spline's value at `x` (B, C, H, W) and the log of its slope there."""
    piece = _piece(spline, spline.x, x)
    a = ((x - piece.x) / piece.width).clamp(0, 1)
    s = piece.height / piece.width
    top = s * a * a + piece.left * a * (1 - a)
    bottom = s + (piece.left + piece.right - 2 * s) * a * (1 - a)
    return piece.y + piece.height * top / bottom, _log_slope(piece, a)


def backward(spline: Spline, y: Tensor) -> tuple[Tensor, Tensor]:
    """Where the spline has the value `y` (B, C, H, W), and the log of its slope there."""
    piece = _piece(spline, spline.y, y)
    s = piece.height / piece.width
    rise = (y - piece.y).clamp_min(0)
    bend = rise * (piece.left + piece.right - 2 * s)
    # q2 a^2 + q1 a + q0 = 0; the root in [0, 1] in the form in which nothing cancels
    q2, q1, q0 = piece.height * (s - piece.left) + bend, piece.height * piece.left - bend, -s * rise
    a = (2 * q0 / (-q1 - (q1 * q1 - 4 * q2 * q0).clamp_min(0).sqrt())).clamp(0, 1)
    return piece.x + a * piece.width, _log_slope(piece, a)


def _log_slope(piece: _Piece, a: Tensor) -> Tensor:
    s = piece.height / piece.width
    b = 1 - a
    top = piece.right * a * a + 2 * s * a * b + piece.left * b * b
    bottom = s + (piece.left + piece.right - 2 * s) * a * b
    return 2 * torch.log(s) + torch.log(top) - 2 * torch.log(bottom)
