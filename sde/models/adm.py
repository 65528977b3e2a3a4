"""ADM, the U-Net of "Diffusion Models Beat GANs" (arXiv 2105.05233, section 3), with the classes that made it known.

Residual blocks that resample inside, the noise level and the class as scale and shift of the second normalization,
and attention with many heads at several resolutions, after every block. EDM (arXiv 2206.00364) trains the same network
(there "ADM" or "DhariwalUNet") with `parameterization=edm parameterization.noise_label=log_sigma`. The paper's sizes:

    ImageNet, 64x64    channels=192 channel_multipliers=[1,2,3,4] blocks_per_level=3 attention_resolutions=[32,16,8]
                         dropout=0.1
    ImageNet, 128x128  channels=256 channel_multipliers=[1,1,2,3,4] blocks_per_level=2
    ImageNet, 256x256  channels=256 channel_multipliers=[1,1,2,2,4,4] blocks_per_level=2
    ImageNet, 512x512  channels=128 channel_multipliers=[1,2,2,4,4,8,8] blocks_per_level=2

The originals predict a variance too; ours are their functions without it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sde.models.base import register
from sde.models.settings import UNetSettings
from sde.models.unet import UNet


@register("adm")
class ADM(UNet):
    """ADM (arXiv 2105.05233).

    Args:
        shape: (C, H, W) of one picture; H and W divisible by 2^(levels - 1).
        num_classes: classes of the data, 0 for none.
        channels: channels of the first level, at least 4. A layer whose channels 32 does not divide is normalized in
            as many groups of four channels or more as divide them.
        channel_multipliers: factor on `channels` for each level, highest resolution first.
        blocks_per_level: residual blocks of a level on the way down; one more on the way up.
        attention_resolutions: longer sides in pixels of the levels that have attention.
        head_channels: channels of one attention head; they divide those of each level with attention. None for a
            single head.
        dropout: probability of dropping an entry inside residual blocks, 0 to below 1.
        activation: "swish", "elu", "relu" or "lrelu" (slope 0.2).
        adaptive_norm: the embedding scales and shifts what the second normalization gives, instead of being added.
        attention_up: on the way up, attention after "every" block or the "last" block of a level.
        resample_inside: resample inside residual blocks; otherwise between them, by learned convolutions.
        pad_around: of those on the way down, zeros on all four sides, as guided-diffusion has them, instead of below
            and to the right.
        norm_eps: what group normalization adds to the variance.
        lowest_frequency: whether the features of time reach down to 1e-4 rad, or stop one step before as the original.
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
        attention_resolutions: Sequence[int] = (16, 8),
        head_channels: int | None = 64,
        dropout: float = 0.1,
        activation: str = "swish",
        adaptive_norm: bool = True,
        attention_up: str = "every",
        resample_inside: bool = True,
        pad_around: bool = False,
        norm_eps: float = 1e-5,
        lowest_frequency: bool = False,
        centered: bool = True,
        recompute_levels: int = 0,
    ) -> None:
        settings = UNetSettings(
            channels=channels,
            channel_multipliers=channel_multipliers,
            blocks_per_level=blocks_per_level,
            attention_resolutions=attention_resolutions,
            head_channels=head_channels,
            dropout=dropout,
            activation=activation,
            adaptive_norm=adaptive_norm,
            attention_up=attention_up,
            block="biggan" if resample_inside else "ddpm",
            pad_around=pad_around,
            project_resampled=False,
            groups="thirty_two",
            norm_eps=norm_eps,
            embedding="positional",
            lowest_frequency=lowest_frequency,
            centered=centered,
            recompute_levels=recompute_levels,
        )
        super().__init__(shape, num_classes, settings)
