r"""A U-Net for sequences: audio, time series, trajectories (the network of Diffuser, arXiv 2205.09991, has this form).

    embedding   noise level and class -> one vector e, which every residual block receives
    input       convolution (B, C, L) -> (B, channels, L)
    down        levels of half the length each: residual blocks, attention, resampling to the next level
    middle      residual block, attention, residual block, at the lowest level
    up          the same levels in rising order; each block also receives what a block of `down` (or `input`) gave
    output      normalization, activation, convolution

e scales and shifts what a residual block has normalized ("adaptive group normalization", arXiv 2105.05233):

    h = conv_1(act(norm_1(x))),    y = shortcut(x) + conv_2(dropout(act((1 + s) * norm_2(h) + b))),    (s, b) = W e

The network is told log(sigma / alpha) / 4 and not the time: that number alone decides how hard the denoising is, so it
means the same under every SDE, and it tells apart the low noise levels, which decide how smooth a sequence is and which
a VP SDE passes in the first hundredth of its time.

With circular padding every layer works on a ring: shifting a periodic sequence by a multiple of 2^(levels - 1) shifts
the output alike, with attention too, which has no positions of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sde.errors import UserError, check_choice, check_number
from sde.models.attention import attend
from sde.models.base import check_count, check_counts, check_shape, register
from sde.models.embeddings import ConditionEmbedding, FourierFeatures
from sde.models.layers import ACTIVATIONS, group_norm, initialize, linear
from sde.models.recompute import recompute

PADDING_MODES = ("zeros", "circular")
RESAMPLINGS = ("conv", "average")
TAPS = (1 / 8, 3 / 8, 3 / 8, 1 / 8)  # the binomial filter of StyleGAN2 (arXiv 1912.04958)


@dataclass(frozen=True)
class Settings:
    """What all layers of a network share; arguments as `UNet1d`."""

    kernel_size: int
    heads: int
    resample: str
    padding_mode: str
    dropout: float
    activation: nn.Module
    embedding_size: int

    def conv(self, in_channels: int, out_channels: int, scale: float = 1.0) -> nn.Conv1d:
        """A convolution that keeps the length, with variance-scaling weights and zero bias."""
        size, mode = self.kernel_size, cast(Literal["zeros", "circular"], self.padding_mode)
        layer = nn.Conv1d(in_channels, out_channels, size, padding=size // 2, padding_mode=mode)
        initialize(layer.weight, scale)
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        return layer

    def block(self, in_channels: int, out_channels: int) -> ResidualBlock1d:
        """A residual block."""
        return ResidualBlock1d(self, in_channels, out_channels)

    def attention(self, channels: int, wanted: bool) -> nn.Module:
        """An attention block, or the identity where none is wanted."""
        return SelfAttention1d(channels, self.heads) if wanted else nn.Identity()

    def down(self, channels: int) -> nn.Module:
        """From one level to the one of half the length."""
        return ConvDown(channels, self.padding_mode) if self.resample == "conv" else AverageDown(self.padding_mode)

    def up(self, channels: int) -> nn.Module:
        """From one level to the one of twice the length."""
        return ConvUp(channels, self.padding_mode) if self.resample == "conv" else AverageUp(self.padding_mode)


def halve(x: Tensor, weight: Tensor, bias: Tensor | None, padding_mode: str, groups: int = 1) -> Tensor:
    """(B, C, L) to (B, C', L/2): every second entry of a correlation with four taps, y_i = sum_k w_k x_{2i - 1 + k}."""
    if padding_mode == "circular":
        return F.conv1d(F.pad(x, (1, 1), mode="circular"), weight, bias, stride=2, groups=groups)
    return F.conv1d(x, weight, bias, stride=2, padding=1, groups=groups)


def double(x: Tensor, weight: Tensor, bias: Tensor | None, padding_mode: str, groups: int = 1) -> Tensor:
    """(B, C, L) to (B, C', 2L): the transpose of `halve`, y_j = sum_i w_{j + 1 - 2i} x_i."""
    if padding_mode == "circular":
        x = F.pad(x, (1, 1), mode="circular")  # two more entries, whose four outputs are cropped again
        return F.conv_transpose1d(x, weight, bias, stride=2, padding=3, groups=groups)
    return F.conv_transpose1d(x, weight, bias, stride=2, padding=1, groups=groups)


class ConvDown(nn.Module):
    """Half as long: a learned convolution of stride 2 with four taps, which lie evenly about each new entry."""

    def __init__(self, channels: int, padding_mode: str) -> None:
        super().__init__()
        self.padding_mode = padding_mode
        self.weight = nn.Parameter(torch.empty(channels, channels, 4))
        self.bias = nn.Parameter(torch.zeros(channels))
        initialize(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, L) to (B, channels, L/2)."""
        return halve(x, self.weight, self.bias, self.padding_mode)


class ConvUp(nn.Module):
    """Twice as long: a learned transposed convolution of stride 2 with four taps.

    Two taps reach each new entry, whatever its place, so that nothing favors every second one.
    """

    def __init__(self, channels: int, padding_mode: str) -> None:
        super().__init__()
        self.padding_mode = padding_mode
        self.weight = nn.Parameter(torch.empty(channels, channels, 4))
        self.bias = nn.Parameter(torch.zeros(channels))
        initialize(self.weight, 2.0)  # a sum over half of the taps keeps the variance

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, L) to (B, channels, 2L)."""
        return double(x, self.weight, self.bias, self.padding_mode)


class AverageDown(nn.Module):
    """Half as long: every second entry of a moving average with weights 1, 3, 3, 1, against aliasing."""

    taps: Tensor

    def __init__(self, padding_mode: str) -> None:
        super().__init__()
        self.padding_mode = padding_mode
        self.register_buffer("taps", torch.tensor(TAPS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) to (B, C, L/2)."""
        channels = x.shape[1]
        return halve(x, self.taps.to(x.dtype).expand(channels, 1, 4), None, self.padding_mode, channels)


class AverageUp(nn.Module):
    """Twice as long by linear interpolation: each new entry is 3/4 of the nearest old one and 1/4 of the next."""

    taps: Tensor

    def __init__(self, padding_mode: str) -> None:
        super().__init__()
        self.padding_mode = padding_mode
        self.register_buffer("taps", 2 * torch.tensor(TAPS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) to (B, C, 2L)."""
        channels = x.shape[1]
        return double(x, self.taps.to(x.dtype).expand(channels, 1, 4), None, self.padding_mode, channels)


class ResidualBlock1d(nn.Module):
    """Two convolutions around a shortcut; the embedding scales and shifts what is between them.

    Args:
        settings: of the network.
        in_channels: of the input.
        out_channels: of the output; where it differs, the shortcut is a linear layer at every entry.
    """

    def __init__(self, settings: Settings, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.activation = settings.activation
        self.norm_1 = group_norm(in_channels)
        self.conv_1 = settings.conv(in_channels, out_channels)
        self.condition = linear(settings.embedding_size, 2 * out_channels)
        self.norm_2 = group_norm(out_channels)
        self.dropout = nn.Dropout(settings.dropout)
        self.conv_2 = settings.conv(out_channels, out_channels, scale=0.0)
        self.shortcut = None if in_channels == out_channels else nn.Conv1d(in_channels, out_channels, 1)
        if self.shortcut is not None:
            initialize(self.shortcut.weight)
            nn.init.zeros_(self.shortcut.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, in_channels, L) and the activated embedding (B, embedding_size) to (B, out_channels, L)."""
        h = self.norm_2(self.conv_1(self.activation(self.norm_1(x))))
        scale, shift = self.condition(embedding)[:, :, None].chunk(2, dim=1)
        h = self.conv_2(self.dropout(self.activation(h * (1 + scale) + shift)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class SelfAttention1d(nn.Module):
    """Self-attention over the entries of a sequence, around a shortcut.

    Args:
        channels: of input and output.
        heads: number of heads, a divisor of `channels`.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.query_key_value = linear(channels, 3 * channels)
        self.output = linear(channels, channels)
        initialize(self.output.weight, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, L) to the same."""
        projected = self.query_key_value(self.norm(x).transpose(1, 2)).unflatten(2, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        h = attend(query, key, value)
        return x + self.output(h.transpose(1, 2).flatten(2)).transpose(1, 2)


class DownLevel1d(nn.Module):
    """One level on the way down.

    Args:
        settings: of the network.
        in_channels: of the input.
        channels: of the level.
        blocks: number of residual blocks.
        attention: whether attention follows each.
        lowest: whether there is no level below.
    """

    def __init__(
        self, settings: Settings, in_channels: int, channels: int, blocks: int, *, attention: bool, lowest: bool
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [channels] * (blocks - 1)
        self.blocks = nn.ModuleList(settings.block(size, channels) for size in inputs)
        self.attentions = nn.ModuleList(settings.attention(channels, attention) for _ in inputs)
        self.down = None if lowest else settings.down(channels)
        self.skip_channels = [channels] * (blocks + (not lowest))

    def forward(self, h: Tensor, embedding: Tensor) -> list[Tensor]:
        """What every layer gives, for the way up; the last is the input of the next level."""
        skips = []
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(h, embedding))
            skips.append(h)
        if self.down is not None:
            skips.append(self.down(h))
        return skips


class Middle1d(nn.Module):
    """Residual block, attention, residual block.

    Args:
        settings: of the network.
        channels: of input and output.
        attention: whether there is attention.
    """

    def __init__(self, settings: Settings, channels: int, *, attention: bool) -> None:
        super().__init__()
        self.block_1 = settings.block(channels, channels)
        self.attention = settings.attention(channels, attention)
        self.block_2 = settings.block(channels, channels)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(B, channels, L) to the same."""
        return self.block_2(self.attention(self.block_1(h, embedding)), embedding)


class UpLevel1d(nn.Module):
    """One level on the way up.

    Args:
        settings: of the network.
        in_channels: of the input.
        channels: of the level.
        skip_channels: of what each residual block receives from the way down.
        attention: whether attention follows each.
        highest: whether there is no level above.
    """

    def __init__(
        self,
        settings: Settings,
        in_channels: int,
        channels: int,
        skip_channels: Sequence[int],
        *,
        attention: bool,
        highest: bool,
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [channels] * (len(skip_channels) - 1)
        sums = [size + skip for size, skip in zip(inputs, skip_channels, strict=True)]
        self.blocks = nn.ModuleList(settings.block(size, channels) for size in sums)
        self.attentions = nn.ModuleList(settings.attention(channels, attention) for _ in sums)
        self.up = nn.Identity() if highest else settings.up(channels)

    def forward(self, h: Tensor, embedding: Tensor, *skips: Tensor) -> Tensor:
        """(B, in_channels, L) to (B, channels, 2L), or L at the highest level; `skips` in the order of the blocks."""
        for block, attention, skip in zip(self.blocks, self.attentions, skips, strict=True):
            h = attention(block(torch.cat((h, skip), dim=1), embedding))
        return self.up(h)


@register("unet1d")
class UNet1d(nn.Module):
    """A U-Net for sequences.

    Args:
        shape: (C, L) of one sequence; L divisible by 2^(levels - 1).
        num_classes: classes of the data, 0 for none.
        channels: channels of the first level, at least 4.
        channel_multipliers: factor on `channels` for each level, the longest first; each next level is half as long.
        blocks_per_level: residual blocks of a level on the way down; one more on the way up.
        kernel_size: entries that a convolution sees, an odd number.
        attention_lengths: lengths of the levels that have attention, L, L/2, L/4, ...; the cost is their square.
        heads: heads of attention, a divisor of the channels of the levels that have it.
        resample: "conv" for learned convolutions of stride 2; "average" for a fixed filter against aliasing.
        padding_mode: what lies outside of a sequence: "zeros", or "circular" for its other end (periodic sequences).
        dropout: probability of dropping an entry inside residual blocks, 0 to below 1.
        activation: "swish", "elu", "relu" or "lrelu" (slope 0.2).
        fourier_scale: standard deviation of the Fourier frequencies, in cycles per unit of the noise label
            log(sigma / alpha) / 4, which runs from about -1.7 to 1.3 for common SDEs.
        recompute_levels: how many levels, the longest first, keep only their inputs for the backward pass and compute
            the rest again; 0 to the number of levels.

    Raises:
        UserError: a setting out of range, or a length or number of channels that cannot be divided.
    """

    noise_label = "log_sigma"

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        channels: int = 64,
        channel_multipliers: Sequence[int] = (1, 2, 4),
        blocks_per_level: int = 2,
        kernel_size: int = 5,
        attention_lengths: Sequence[int] = (),
        heads: int = 4,
        resample: str = "conv",
        padding_mode: str = "zeros",
        dropout: float = 0.0,
        activation: str = "swish",
        fourier_scale: float = 1.0,
        recompute_levels: int = 0,
    ) -> None:
        super().__init__()
        check_shape("unet1d", shape, "CL")
        check_count("num_classes", num_classes, at_least=0)
        check_count("model.channels", channels, at_least=4)
        multipliers = check_counts("model.channel_multipliers", channel_multipliers)
        check_count("model.blocks_per_level", blocks_per_level)
        attention_lengths = check_counts("model.attention_lengths", attention_lengths)
        check_count("model.heads", heads)
        check_choice("model.resample", resample, RESAMPLINGS)
        check_choice("model.padding_mode", padding_mode, PADDING_MODES)
        check_number("model.dropout", dropout, at_least=0, below=1)
        check_choice("model.activation", activation, ACTIVATIONS)
        check_number("model.fourier_scale", fourier_scale, above=0)
        check_count("model.recompute_levels", recompute_levels, at_least=0, at_most=len(multipliers))
        lengths = _lengths(shape[1], len(multipliers))
        _check_kernel(kernel_size, padding_mode, lengths[-1])
        has_attention = _has_attention(lengths, [channels * m for m in multipliers], attention_lengths, heads)
        self.shape = shape
        self.num_classes = num_classes
        self.blocks_per_level = blocks_per_level
        self.recompute_levels = recompute_levels
        act = ACTIVATIONS[activation]()
        features = FourierFeatures(channels, fourier_scale)
        self.embedding = ConditionEmbedding(features, 4 * channels, num_classes, act)
        settings = Settings(kernel_size, heads, resample, padding_mode, dropout, act, 4 * channels)
        self._make_levels(settings, channels, multipliers, has_attention)

    def _make_levels(
        self, settings: Settings, channels: int, multipliers: Sequence[int], has_attention: Sequence[bool]
    ) -> None:
        """The modules from input to output; `skips` holds the channels of what `down` leaves for `up`."""
        widths = [channels * multiplier for multiplier in multipliers]
        blocks, last = self.blocks_per_level, len(widths) - 1
        self.input = settings.conv(self.shape[0], channels)
        self.down = nn.ModuleList()
        skips = [channels]
        for i, width in enumerate(widths):
            down = DownLevel1d(settings, skips[-1], width, blocks, attention=has_attention[i], lowest=i == last)
            self.down.append(down)
            skips += down.skip_channels
        self.middle = Middle1d(settings, widths[-1], attention=has_attention[-1])
        self.up = nn.ModuleList()
        for i in reversed(range(len(widths))):
            seen = [skips.pop() for _ in range(blocks + 1)]
            below = widths[min(i + 1, last)]
            self.up.append(UpLevel1d(settings, below, widths[i], seen, attention=has_attention[i], highest=i == 0))
        assert not skips
        self.output = nn.Sequential(
            group_norm(widths[0]), settings.activation, settings.conv(widths[0], self.shape[0], scale=0.0)
        )

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """The output at sequences `x` (B, C, L), of their shape and type.

        Args:
            noise: (B,), log(sigma / alpha) / 4.
            label: class labels (B,) int64, `num_classes` for "no label"; None for "no label" throughout.
        """
        embedding = self.embedding(noise, label)
        skips = [self.input(x)]
        for i, level in enumerate(self.down):
            again = i < self.recompute_levels
            skips += recompute(level, skips[-1], embedding) if again else level(skips[-1], embedding)
        h = self.middle(skips[-1], embedding)
        for i, level in enumerate(self.up):
            seen = [skips.pop() for _ in range(self.blocks_per_level + 1)]
            again = i >= len(self.up) - self.recompute_levels
            h = recompute(level, h, embedding, *seen) if again else level(h, embedding, *seen)
        return self.output(h).to(x.dtype)


def _lengths(length: int, levels: int) -> list[int]:
    """The length of every level; `UserError` when there is none, or `length` cannot be halved often enough."""
    if not levels:
        raise UserError("model.channel_multipliers is empty: give one number for each level, such as [1, 2, 4]")
    divisor = 2 ** (levels - 1)
    if length % divisor:
        raise UserError(
            f"sequences of length {length} cannot be halved {levels - 1} times: with {levels} levels the length must "
            f"be a multiple of {divisor}; pad or crop the data, or shorten model.channel_multipliers"
        )
    return [length // 2**i for i in range(levels)]


def _check_kernel(kernel_size: int, padding_mode: str, shortest: int) -> None:
    """Raise `UserError` unless the kernel is odd and, on a ring, wraps around the shortest level at most once."""
    check_count("model.kernel_size", kernel_size)
    if kernel_size % 2 == 0:
        raise UserError(f"model.kernel_size={kernel_size} is even and has no middle: use {kernel_size + 1}")
    if padding_mode == "circular" and kernel_size // 2 > shortest:
        raise UserError(
            f"model.kernel_size={kernel_size} wraps more than once around the lowest level, whose length is "
            f"{shortest}: with model.padding_mode=circular it is at most {2 * shortest + 1}; make it smaller, or "
            "shorten model.channel_multipliers"
        )


def _has_attention(
    lengths: Sequence[int], widths: Sequence[int], attention_lengths: Sequence[int], heads: int
) -> list[bool]:
    """Whether each level has attention; `UserError` when no level has a length asked for, or heads do not fit."""
    for i, length in enumerate(attention_lengths):
        if length not in lengths:
            known = ", ".join(map(str, lengths))
            raise UserError(f"model.attention_lengths[{i}]={length} is not the length of a level: they are {known}")
    for length, width in zip(lengths, widths, strict=True):
        if length in attention_lengths and width % heads:
            raise UserError(
                f"model.heads={heads} does not divide the {width} channels of the level of length {length}, which has "
                "attention: choose a divisor"
            )
    return [length in attention_lengths for length in lengths]
