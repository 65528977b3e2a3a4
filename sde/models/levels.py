"""The levels of a U-Net, and the parts they are built of.

`Parts` makes every layer whose form is a setting of the network; the levels only arrange them. All tensors are
(B, channels, H, W); the embedding is (B, size), or None in a network that is told neither noise level nor class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sde.models.layers import ACTIVATIONS, BlockSettings, Head, ResidualBlock, SelfAttention, conv, join
from sde.models.resample import downsample, upsample
from sde.models.settings import UNetSettings


class Parts:
    """Makes the layers of one network.

    Args:
        settings: of the network.
        picture_channels: channels of its input and output.
        embedding_size: length of the embedding that residual blocks receive; None when there is none.
    """

    def __init__(self, settings: UNetSettings, picture_channels: int, embedding_size: int | None) -> None:
        self.settings = settings
        self.picture_channels = picture_channels
        self.blocks = BlockSettings(
            activation=ACTIVATIONS[settings.activation](),
            groups=settings.groups,
            norm_eps=settings.norm_eps,
            dropout=settings.dropout,
            init_scale=settings.init_scale,
            shortcut_scale=1.0 if settings.block == "biggan" else 0.1,
            skip_rescale=settings.skip_rescale,
            embedding_size=embedding_size,
            adaptive_norm=settings.adaptive_norm,
            project_resampled=settings.project_resampled,
            head_channels=settings.head_channels,
        )

    def block(self, in_channels: int, out_channels: int, resample: nn.Module | None = None) -> ResidualBlock:
        """A residual block."""
        return ResidualBlock(in_channels, out_channels, self.blocks, resample)

    def attention(self, channels: int) -> SelfAttention:
        """An attention block."""
        return SelfAttention(channels, self.blocks)

    def head(self, channels: int, out_channels: int | None = None, scale: float | None = None) -> Head:
        """Normalization, activation and convolution, by default to the channels of the picture."""
        scale = self.settings.init_scale if scale is None else scale
        return Head(channels, out_channels or self.picture_channels, self.blocks, scale)

    def down(self, channels: int) -> nn.Module:
        """From one level to the one below."""
        settings = self.settings
        if settings.block == "ddpm":
            return downsample(
                channels,
                with_conv=settings.resample_with_conv,
                fir_kernel=settings.fir_kernel,
                pad_around=settings.pad_around,
            )
        return self.block(channels, channels, downsample(channels, with_conv=False, fir_kernel=settings.fir_kernel))

    def up(self, channels: int) -> nn.Module:
        """From one level to the one above."""
        settings = self.settings
        if settings.block == "ddpm":
            return upsample(channels, with_conv=settings.resample_with_conv, fir_kernel=settings.fir_kernel)
        return self.block(channels, channels, upsample(channels, with_conv=False, fir_kernel=settings.fir_kernel))

    def input_pyramid(self, channels: int, pyramid_channels: int) -> InputSkip | InputResidual | None:
        """What brings the input picture to a level of `channels` channels; None when nothing does."""
        settings = self.settings
        if settings.progressive_input == "none":
            return None
        if settings.progressive_input == "residual":
            shrink = downsample(pyramid_channels, channels, with_conv=True, fir_kernel=settings.fir_kernel)
            return InputResidual(shrink, channels, skip_rescale=settings.skip_rescale)
        shrink = downsample(pyramid_channels, with_conv=False, fir_kernel=settings.fir_kernel)
        return InputSkip(shrink, pyramid_channels, channels, concatenate=settings.progressive_combine == "cat")

    def output_pyramid(self, channels: int, channels_below: int | None) -> OutputSkip | OutputResidual | None:
        """What brings a level of `channels` channels to the output; `channels_below` is None at the lowest level."""
        settings = self.settings
        if settings.progressive == "none":
            return None
        grow: nn.Module | None = None
        if settings.progressive == "output_skip":
            if channels_below is not None:
                grow = upsample(self.picture_channels, with_conv=False, fir_kernel=settings.fir_kernel)
            return OutputSkip(self.head(channels), grow)
        if channels_below is None:
            return OutputResidual(self.head(channels, channels, scale=1.0), None, skip_rescale=settings.skip_rescale)
        grow = upsample(channels_below, channels, with_conv=True, fir_kernel=settings.fir_kernel)
        return OutputResidual(None, grow, skip_rescale=settings.skip_rescale)


class InputSkip(nn.Module):
    """The input picture, made smaller and passed through a 1x1 convolution, joins what the level hands on.

    Args:
        shrink: halves the picture.
        picture_channels: channels of the picture.
        channels: channels of the level.
        concatenate: put it before the level's channels instead of adding it to them.
    """

    def __init__(self, shrink: nn.Module, picture_channels: int, channels: int, *, concatenate: bool) -> None:
        super().__init__()
        self.shrink = shrink
        self.conv = conv(picture_channels, channels, 1)
        self.concatenate = concatenate
        self.out_channels = 2 * channels if concatenate else channels
        self.pyramid_channels = picture_channels

    def forward(self, pyramid: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The pyramid of the level above and this level's `h` to this level's pyramid and `h`."""
        pyramid = self.shrink(pyramid)
        seen = self.conv(pyramid)
        return pyramid, torch.cat((seen, h), dim=1) if self.concatenate else seen + h


class InputResidual(nn.Module):
    """The pyramid of the level above, made smaller by a convolution, is added to what the level hands on.

    Args:
        shrink: halves the pyramid and gives it the channels of the level.
        channels: channels of the level.
        skip_rescale: divide the sum by sqrt(2).
    """

    def __init__(self, shrink: nn.Module, channels: int, *, skip_rescale: bool) -> None:
        super().__init__()
        self.shrink = shrink
        self.skip_rescale = skip_rescale
        self.out_channels = self.pyramid_channels = channels

    def forward(self, pyramid: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The pyramid of the level above and this level's `h` to the sum, which is both from here on."""
        h = join(h, self.shrink(pyramid), self.skip_rescale)
        return h, h


class OutputSkip(nn.Module):
    """What this level says of the output picture is added to what the levels below said, made larger.

    Args:
        head: from the level to a picture.
        grow: doubles a picture; None at the lowest level.
    """

    def __init__(self, head: Head, grow: nn.Module | None) -> None:
        super().__init__()
        self.grow = grow
        self.head = head

    def forward(self, pyramid: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        """The pyramid of the level below (None at the lowest) and this level's `h` to this level's pyramid and `h`."""
        said = self.head(h)
        return (said if self.grow is None else self.grow(pyramid) + said), h


class OutputResidual(nn.Module):
    """The pyramid of the level below, made larger by a convolution, is added to this level.

    Args:
        head: at the lowest level, what the pyramid starts from; None above it.
        grow: doubles the pyramid and gives it the channels of the level; None at the lowest level.
        skip_rescale: divide the sum by sqrt(2).
    """

    def __init__(self, head: Head | None, grow: nn.Module | None, *, skip_rescale: bool) -> None:
        super().__init__()
        self.head = head
        self.grow = grow
        self.skip_rescale = skip_rescale

    def forward(self, pyramid: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        """The pyramid of the level below (None at the lowest) and this level's `h` to this level's pyramid and `h`."""
        if self.head is not None:
            return self.head(h), h
        assert self.grow is not None
        h = join(h, self.grow(pyramid), self.skip_rescale)
        return h, h


class DownLevel(nn.Module):
    """One resolution on the way down: blocks, each followed by attention where there is any, then resampling.

    Args:
        parts: makes the layers.
        in_channels: channels that come in.
        channels: channels of the level.
        pyramid_channels: channels of the input pyramid that comes in.
        attention: whether there is attention.
        lowest: whether this is the lowest level, from which nothing is resampled.

    Attributes:
        skip_channels: channels of each tensor that the level leaves for the way up, the last of which goes on down.
        pyramid_channels: channels of the input pyramid that goes on down.
    """

    def __init__(
        self, parts: Parts, in_channels: int, channels: int, pyramid_channels: int, *, attention: bool, lowest: bool
    ) -> None:
        super().__init__()
        count = parts.settings.blocks_per_level
        self.blocks = nn.ModuleList(parts.block(channels if i else in_channels, channels) for i in range(count))
        self.attentions = nn.ModuleList(parts.attention(channels) if attention else nn.Identity() for _ in self.blocks)
        self.down = None if lowest else parts.down(channels)
        self.input_pyramid = None if lowest else parts.input_pyramid(channels, pyramid_channels)
        self.pyramid_channels = pyramid_channels
        self.skip_channels = [channels] * count
        if self.input_pyramid is not None:
            self.pyramid_channels = self.input_pyramid.pyramid_channels
            self.skip_channels.append(self.input_pyramid.out_channels)
        elif not lowest:
            self.skip_channels.append(channels)

    def forward(self, h: Tensor, embedding: Tensor | None, pyramid: Tensor) -> tuple[list[Tensor], Tensor]:
        """What comes from above and its input pyramid to the tensors left for the way up and the new pyramid."""
        skips = []
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(h, embedding))
            skips.append(h)
        if self.down is not None:
            h = _resample(self.down, h, embedding)
            if self.input_pyramid is not None:
                pyramid, h = self.input_pyramid(pyramid, h)
            skips.append(h)
        return skips, pyramid


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution.

    Args:
        parts: makes the layers.
        channels: channels of input and output.
    """

    def __init__(self, parts: Parts, channels: int) -> None:
        super().__init__()
        self.block_1 = parts.block(channels, channels)
        self.attention = parts.attention(channels)
        self.block_2 = parts.block(channels, channels)

    def forward(self, h: Tensor, embedding: Tensor | None) -> Tensor:
        """(B, channels, H, W) to the same."""
        return self.block_2(self.attention(self.block_1(h, embedding)), embedding)


class UpLevel(nn.Module):
    """One resolution on the way up: blocks that also see what the way down left, attention, resampling.

    Args:
        parts: makes the layers.
        in_channels: channels that come in from below.
        channels: channels of the level.
        skip_channels: channels of what each block sees of the way down, in the order of the blocks.
        channels_below: channels of the level below; None for the lowest level.
        attention: whether there is attention.
        highest: whether this is the highest level, from which nothing is resampled.
    """

    def __init__(
        self,
        parts: Parts,
        in_channels: int,
        channels: int,
        skip_channels: Sequence[int],
        channels_below: int | None,
        *,
        attention: bool,
        highest: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            parts.block((channels if i else in_channels) + skip, channels) for i, skip in enumerate(skip_channels)
        )
        every = parts.settings.attention_up == "every"
        self.attentions = nn.ModuleList(
            parts.attention(channels) if attention and (every or i == len(skip_channels) - 1) else nn.Identity()
            for i in range(len(skip_channels))
        )
        self.output_pyramid = parts.output_pyramid(channels, channels_below)
        self.up = None if highest else parts.up(channels)

    def forward(
        self, h: Tensor, skips: Sequence[Tensor], embedding: Tensor | None, pyramid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What comes from below and its output pyramid to the same for the level above; one of `skips` for a block."""
        for block, attention, skip in zip(self.blocks, self.attentions, skips, strict=True):
            h = attention(block(torch.cat((h, skip), dim=1), embedding))
        if self.output_pyramid is not None:
            pyramid, h = self.output_pyramid(pyramid, h)
        if self.up is not None:
            h = _resample(self.up, h, embedding)
        return h, pyramid


def _resample(module: nn.Module, h: Tensor, embedding: Tensor | None) -> Tensor:
    """`module` at `h`: a residual block that resamples also receives the embedding."""
    return module(h, embedding) if isinstance(module, ResidualBlock) else module(h)
