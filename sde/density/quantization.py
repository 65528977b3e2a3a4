r"""Pixels between bytes and real numbers: range, gray levels, bits per dimension, and decoders onto the levels.

Level p of a picture is seen by a network as x_p = low + w p, with w = (high - low) / (levels - 1), and stands for the
bucket [x_p - w/2, x_p + w/2]. Uniform dequantization spreads a pixel over its bucket (arXiv 1511.01844, section 3.1),

    x = x_p + w (u - 1/2),    u ~ U[0, 1),    so that    -log P(p) <= E_u[-log p(x)] - D log w,

and the right side in bits per dimension is -(log p(x) + D log w) / (D log 2). (The outer halves of
the end buckets lie beyond [low, high].)

A decoder gives every level a probability outright, and its probabilities sum to one:

    log_mass          the normal mass of the bucket, N(mean, std^2), those at the ends open (arXiv 2006.11239, eq. 13)
    log_mass_softmax  exp(-(x_p - value)^2 / (2 u^2)), normalized over the levels: the exact posterior of pixels whose
                      levels are equally likely, seen through noise of level u (arXiv 2107.00630)

score_sde_pytorch reports bits per dimension of other buckets. Its data are 2 (255 p' + u) / 256 - 1 with p' = p / 255
(for networks that see [0, 1], (255 p' + u) / 256): 256 buckets side by side that fill the range exactly, of width
2 / 256 (1 / 256), while its networks are trained on x_p as above, of spacing 2 / 255. The "offset" that it adds to
-log p / (D log 2) is -log2(width): 7 (8). `Quantization.score_sde` is that convention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.special import erfc, erfcx, log_ndtr

from sde.broadcast import Time, as_tensor, expand
from sde.errors import UserError, check_number

if TYPE_CHECKING:  # the sources of data need libraries that densities do not
    from sde.data.base import DataInfo

_AT_ONCE = 2**22  # numbers that the softmax over levels holds at a time


@dataclass(frozen=True)
class Quantization:
    """Gray levels and the values that a network sees for them.

    Args:
        low: value of level 0.
        high: value of the last level; above `low`.
        levels: how many there are, at least 2.

    Raises:
        UserError: a value is not of these.
    """

    low: float = -1.0
    high: float = 1.0
    levels: int = 256

    def __post_init__(self) -> None:
        check_number("low", self.low)
        check_number("high", self.high, above=self.low)
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 2:
            raise UserError(f"levels={self.levels!r} must be a whole number of at least 2")

    @classmethod
    def of(cls, info: DataInfo) -> Quantization:
        """That of a data set's pictures.

        Raises:
            UserError: for vectors, which are not quantized.
        """
        if info.kind != "pixels":
            raise UserError(f"the data set {info.name!r} holds {info.kind}, which are not quantized: give none")
        return cls(info.low, info.high)

    @classmethod
    def score_sde(cls, centered: bool = True) -> Quantization:
        """The 256 buckets of score_sde_pytorch's bits per dimension, which fill [-1, 1] (not `centered`: [0, 1])."""
        edge = 1 / 256 if centered else 1 / 512
        return cls(-1 + edge if centered else edge, 1 - edge)

    @property
    def width(self) -> float:
        """Width w of a bucket, which is the distance of two levels."""
        return (self.high - self.low) / (self.levels - 1)

    def encode(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values x_p of levels, any shape: what `DataInfo.encode` gives for uint8, and for other integers alike.

        Raises:
            UserError: for levels that are not integers.
        """
        if index.is_floating_point():
            raise UserError(f"levels to encode have dtype {index.dtype}: give integers")
        work = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.low + index.to(work) * self.width).to(dtype)

    def index(self, x: Tensor) -> Tensor:
        """The level (int64) whose bucket each entry of `x` lies in; beyond the range, that of the nearer end."""
        work = x if x.dtype == torch.float64 else x.to(torch.float32)
        level = (work - self.low) * ((self.levels - 1) / (self.high - self.low))
        return level.nan_to_num(nan=0.0).round().clamp(0, self.levels - 1).long()

    def dequantize(self, x: Tensor, u: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """x_p + w (u - 1/2): points of the buckets.

        Args:
            x: levels as integers, or their values x_p; any shape.
            u: places in the buckets, in [0, 1), of the same shape.
            dtype: of the result; computed in float64.
        """
        return (self._values(x) + self.width * (u.double() - 0.5)).to(dtype)

    def log_mass(self, x: Tensor, mean: Tensor, std: Time) -> Tensor:
        """Log probability in nats of the levels `x` when each is the bucket that a draw of N(mean, std^2) falls into.

        Exact to rounding however far the bucket lies from the mean and however narrow or wide it is in `std`, without
        a floor on probabilities, and differentiable in `mean` and `std`.

        Args:
            x: (B, ...), levels as integers, or their values, which are rounded to the nearest level.
            mean: (B, ...).
            std: a number or (B,), above 0.

        Returns:
            (B,) float64, summed over dimensions.
        """
        index = self._levels(x)
        scale = 1 / expand(as_tensor(std).to(x.device, torch.float64), x)
        center = (self._values(index) - mean.double()) * scale
        half = (0.5 * self.width * scale).expand_as(center)
        inner = _log_normal_mass(center, half)
        first, last = log_ndtr(center + half), log_ndtr(half - center)
        each = torch.where(index == 0, first, torch.where(index == self.levels - 1, last, inner))
        return each.flatten(1).sum(1)

    def log_mass_softmax(self, x: Tensor, value: Tensor, noise_level: Time) -> Tensor:
        """Log probability in nats of the levels `x`, each proportional to exp(-(x_p - value)^2 / (2 noise_level^2)).

        With `value` = x_t / alpha and `noise_level` = sigma / alpha it is the posterior of equally likely levels.

        Args:
            x: (B, ...), levels as integers, or their values, which are rounded to the nearest level.
            value: (B, ...).
            noise_level: a number or (B,), above 0.

        Returns:
            (B,) float64, summed over dimensions.
        """
        own = self._values(self._levels(x))
        level = expand(as_tensor(noise_level).to(x.device, torch.float64), x).expand_as(own)
        flat = (part.reshape(-1).split(max(_AT_ONCE // self.levels, 1)) for part in (own, value.double(), level))
        each = torch.cat([self._log_share(*parts) for parts in zip(*flat, strict=True)])
        return each.reshape(own.shape).flatten(1).sum(1)

    def _log_share(self, own: Tensor, value: Tensor, level: Tensor) -> Tensor:
        """log of exp(-(own - value)^2 / (2 level^2)) over its sum over all levels, (n,) each."""
        other = self._values(torch.arange(self.levels, device=own.device))
        # the difference of the squares, which are huge at small noise, as a product
        excess = (other - own[:, None]) * (other + (own - 2 * value)[:, None]) / (2 * level[:, None] ** 2)
        return -torch.logsumexp(-excess, 1)

    def _levels(self, x: Tensor) -> Tensor:
        return self.index(x) if x.is_floating_point() else x.long()

    def _values(self, x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else self.encode(x, torch.float64)


def bits_per_dim(log_prob: Tensor, numel: int, width: float | None = None) -> Tensor:
    """-(log_prob + numel log(width)) / (numel log 2), of the shape of `log_prob`.

    With `width` the bits of quantized data whose dequantized values have this density; without, those of a density of
    vectors, or of log probabilities (a bound through a decoder). `Quantization.score_sde().width` makes it -log_prob /
    (numel log 2) + 7, score_sde_pytorch's number.

    Args:
        log_prob: nats, summed over the dimensions.
        numel: number of dimensions D.
        width: width of a bucket in the units of the density, or None.

    Raises:
        UserError: a number is not above 0.
    """
    return -(log_prob / numel + _log_width(numel, width)) / math.log(2)


def nats(bits: Tensor, numel: int, width: float | None = None) -> Tensor:
    """The log density or log probability in nats that `bits_per_dim` turns into `bits`: its inverse."""
    return -numel * (bits * math.log(2) + _log_width(numel, width))


def change_of_units(log_prob: Tensor, scale: float, numel: int) -> Tensor:
    """The log density of scale * x, at the same points, when `log_prob` is that of x: log_prob - D log |scale|.

    Raises:
        UserError: `scale` is 0, or `numel` not above 0.
    """
    check_number("numel", numel, above=0)
    check_number("|scale|", abs(scale), above=0)
    return log_prob - numel * math.log(abs(scale))


def _log_width(numel: int, width: float | None) -> float:
    check_number("numel", numel, above=0)
    if width is None:
        return 0.0
    check_number("width", width, above=0)
    return math.log(width)


def _log_normal_mass(center: Tensor, half: Tensor) -> Tensor:
    r"""log of the standard normal mass of [center - half, center + half], exact to rounding.

    By symmetry the center c is at least 0; a = c - half, b = c + half. No difference of close numbers is left in
    any of the three ways, and each is used where it is exact:

        narrow   2 half max(1, c) < 1     log phi(c) + log int exp(-c s - s^2/2) ds over |s| < half, by Gauss-Legendre
        tail     a >= 0                   log phi(a) + log(R(a) - exp(-2 c half) R(b)), R = (1 - Phi) / phi
        central  a < 0                    log(1 - Phi(a) - Phi(-b))
    """
    c = center.abs()
    narrow = 2 * half * c.clamp_min(1) < 1
    tail = ~narrow & (c >= half)
    one = torch.ones_like(c)
    c1, h1 = torch.where(narrow, c, one), torch.where(narrow, half, one)
    c2, h2 = torch.where(tail, c, 2 * one), torch.where(tail, half, one)
    middle = ~(narrow | tail)
    c3, h3 = torch.where(middle, c, 0 * one), torch.where(middle, half, one)
    by_tail = _log_density(c2 - h2) + torch.log(_mills(c2 - h2) - torch.exp(-2 * c2 * h2) * _mills(c2 + h2))
    by_center = torch.log1p(-(_upper_tail(h3 - c3) + _upper_tail(h3 + c3)))
    return torch.where(narrow, _log_narrow(c1, h1), torch.where(tail, by_tail, by_center))


def _log_narrow(c: Tensor, half: Tensor) -> Tensor:
    """The integral for narrow buckets: 8 nodes leave less than a rounding of it, since |c s| and |s| are below 1/2."""
    total = torch.zeros_like(c)
    for node, weight in _NODES:
        s = node * half
        total = total + weight * torch.exp(-s * (c + 0.5 * s))
    return _log_density(c) + torch.log(half * total)


_NODES = tuple(zip(*(column.tolist() for column in np.polynomial.legendre.leggauss(8)), strict=True))


def _log_density(x: Tensor) -> Tensor:
    return -0.5 * x * x - 0.5 * math.log(2 * math.pi)


def _upper_tail(x: Tensor) -> Tensor:
    """1 - Phi(x) with all its digits, which torch's ndtr(-x) loses from x = 5 on."""
    return 0.5 * erfc(x * math.sqrt(0.5))


def _mills(x: Tensor) -> Tensor:
    """Mills' ratio (1 - Phi(x)) / phi(x) of x >= 0."""
    return math.sqrt(0.5 * math.pi) * erfcx(x * math.sqrt(0.5))
