"""DDPM++, the network of arXiv 2011.13456 for VP and sub-VP SDEs.

NCSN++ (`sde.models.ncsnpp`) without what made it best for the VE SDE: no FIR filters, no progressive input, sinusoidal
features of time instead of Fourier features of the noise level. The paper's size for CIFAR-10 is channels=128
channel_multipliers=[1,2,2,2] blocks_per_level=4, or 8 ("deep").
"""

from __future__ import annotations

from collections.abc import Sequence

from sde.models.base import register
from sde.models.settings import UNetSettings
from sde.models.unet import UNet


@register("ddpmpp")
class DDPMpp(UNet):
    """DDPM++ (arXiv 2011.13456).

    Args:
        shape: (C, H, W) of one picture; H and W divisible by 2^(levels - 1).
        num_classes: classes of the data, 0 for none.
        channels: channels of the first level, at least 4.
        channel_multipliers: factor on `channels` for each level, highest resolution first.
        blocks_per_level: residual blocks of a level on the way down; one more on the way up.
        attention_resolutions: longer sides in pixels of the levels that have attention.
        dropout: probability of dropping an entry inside residual blocks, 0 to below 1.
        activation: "swish", "elu", "relu" or "lrelu" (slope 0.2).
        skip_rescale: divide every sum with a shortcut by sqrt(2).
        init_scale: initialization scale of the last layer of each block and of the output, at least 0.
        classes_join: class vectors are added to the "output" of the embedding's two layers, or to their "features", as
            EDM does.
        centered: whether data is in [-1, 1]; otherwise it is in [0, 1] and the network maps x to 2x - 1.
        recompute_levels: highest levels whose activations are computed again in the backward pass instead of kept: less
            memory, up to a third more time. 0 to the number of levels.

    Raises:
        UserError: a setting out of range, or a shape or number of channels that cannot be divided.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        channels: int = 64,
        channel_multipliers: Sequence[int] = (1, 2, 2),
        blocks_per_level: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        activation: str = "swish",
        skip_rescale: bool = True,
        init_scale: float = 0.0,
        classes_join: str = "output",
        centered: bool = True,
        recompute_levels: int = 0,
    ) -> None:
        settings = UNetSettings(
            channels=channels,
            channel_multipliers=channel_multipliers,
            blocks_per_level=blocks_per_level,
            attention_resolutions=attention_resolutions,
            dropout=dropout,
            block="biggan",
            activation=activation,
            skip_rescale=skip_rescale,
            init_scale=init_scale,
            embedding="positional",
            classes_join=classes_join,
            centered=centered,
            recompute_levels=recompute_levels,
        )
        super().__init__(shape, num_classes, settings)
