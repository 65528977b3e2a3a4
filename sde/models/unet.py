r"""The U-Net of score-based models, from which NCSN++, DDPM++, DDPM and ADM differ by settings only.

    embedding   noise label and class label -> one vector, which every residual block receives
    input       3x3 convolution
    down        levels of falling resolution: residual blocks, attention, resampling to the next level
    middle      residual block, attention, residual block, at the lowest resolution
    up          the same levels in rising order; each block also receives what a block of `down` (or `input`) gave
    output      normalization, activation, 3x3 convolution

Progressive inputs bring the input picture, made smaller, to every level; progressive outputs sum what every level says
of the output picture, made larger (StyleGAN2, arXiv 1912.04958). Every variant is in arXiv 2011.13456, appendix H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sde.errors import UserError
from sde.models.base import MODELS, check_count, check_shape
from sde.models.embeddings import ConditionEmbedding, FourierFeatures, NoiseScales, SinusoidalFeatures
from sde.models.layers import ACTIVATIONS, conv
from sde.models.levels import DownLevel, Middle, Parts, UpLevel
from sde.models.recompute import recompute
from sde.models.settings import UNetSettings


class UNet(nn.Module):
    """The U-Net; `NCSNpp`, `DDPMpp`, `DDPM` and `ADM` give it their settings.

    Args:
        shape: (C, H, W) of one picture; H and W divisible by 2^(levels - 1), C any.
        num_classes: classes of the data, 0 for none.
        settings: what kind of U-Net.

    Attributes:
        noise_label: "sigma" with Fourier features, which take its logarithm; with positional features "time", or
            "index" with `scale_by_sigma`, which looks the noise level up.

    Raises:
        UserError: a setting out of range, or a shape or number of channels that cannot be divided.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, settings: UNetSettings) -> None:
        super().__init__()
        check_shape(MODELS.name_of(type(self)), shape, "CHW")
        check_count("num_classes", num_classes, at_least=0)
        self.settings = settings
        self.shape = shape
        self.num_classes = num_classes
        positional = "index" if settings.scale_by_sigma else "time"
        self.noise_label = "sigma" if settings.embedding == "fourier" else positional
        self.scales = NoiseScales(settings.sigma_min, settings.sigma_max, settings.num_scales)
        self.embedding = self._make_embedding()
        self._make_levels(Parts(settings, shape[0], None if self.embedding.is_empty else 4 * settings.channels))

    def _make_embedding(self) -> ConditionEmbedding:
        settings = self.settings
        features: FourierFeatures | SinusoidalFeatures | None = None
        if settings.noise_conditional and settings.embedding == "fourier":
            features = FourierFeatures(settings.channels, settings.fourier_scale)
        elif settings.noise_conditional:
            features = SinusoidalFeatures(settings.channels, endpoint=settings.lowest_frequency)
        activation = ACTIVATIONS[settings.activation]()
        return ConditionEmbedding(features, 4 * settings.channels, self.num_classes, activation, settings.classes_join)

    def _make_levels(self, parts: Parts) -> None:
        """The modules from input to output; `skips` holds the channels of what `down` leaves for `up`."""
        settings = self.settings
        widths = [settings.channels * multiplier for multiplier in settings.channel_multipliers]
        has_attention = self._levels_with_attention(len(widths))
        depth = len(widths)

        self.input = conv(self.shape[0], settings.channels)
        self.down = nn.ModuleList()
        skips, pyramid_channels = [settings.channels], self.shape[0]
        for i in range(depth):
            down = DownLevel(
                parts, skips[-1], widths[i], pyramid_channels, attention=has_attention[i], lowest=i == depth - 1
            )
            self.down.append(down)
            skips += down.skip_channels
            pyramid_channels = down.pyramid_channels
        channels = skips[-1]
        self.middle = Middle(parts, channels)
        self.up = nn.ModuleList()
        for i in reversed(range(depth)):
            seen = [skips.pop() for _ in range(settings.blocks_per_level + 1)]
            below = None if i == depth - 1 else widths[i + 1]
            up = UpLevel(parts, channels, widths[i], seen, below, attention=has_attention[i], highest=i == 0)
            self.up.append(up)
            channels = widths[i]
        assert not skips
        self.output = None if settings.progressive == "output_skip" else parts.head(channels)

    def _levels_with_attention(self, depth: int) -> list[bool]:
        """Whether each level has attention; `UserError` when the sides cannot be halved from level to level."""
        height, width = self.shape[1:]
        divisor = 2 ** (depth - 1)
        if height % divisor or width % divisor:
            raise UserError(
                f"pictures of {height}x{width} cannot be halved {depth - 1} times: with {depth} levels the sides must "
                f"be multiples of {divisor}; resize the data or shorten model.channel_multipliers"
            )
        return [max(height, width) // 2**i in self.settings.attention_resolutions for i in range(depth)]

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """The output at pictures `x` (B, C, H, W), of their shape and type.

        Args:
            noise: (B,), the number that `noise_label` names.
            label: class labels (B,) int64, `num_classes` for "no label"; None for "no label" throughout.
        """
        fourier = self.settings.embedding == "fourier"
        embedding = self.embedding(torch.log(noise) if fourier else noise, label)
        h = pyramid = x if self.settings.centered else 2 * x - 1

        skips = [self.input(h)]
        recomputed = self.settings.recompute_levels
        for i, level in enumerate(self.down):
            call = recompute if i < recomputed else _call
            level_skips, pyramid = call(level, skips[-1], embedding, pyramid)
            skips.extend(level_skips)
        h = self.middle(skips[-1], embedding)
        result: Tensor | None = None
        for i, level in zip(reversed(range(len(self.up))), self.up, strict=True):
            call = recompute if i < recomputed else _call
            seen = [skips.pop() for _ in level.blocks]  # type: ignore[union-attr]
            h, result = call(level, h, seen, embedding, result)
        if self.output is not None:
            result = self.output(h)
        assert result is not None

        y = result.to(x.dtype)
        if self.settings.scale_by_sigma:
            sigma = noise if fourier else self.scales.sigma(noise)
            y = y / sigma.to(x.dtype)[:, None, None, None]
        return y


def _call(module: nn.Module, *args: Any) -> Any:
    return module(*args)
