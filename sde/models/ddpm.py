"""The U-Net of DDPM (arXiv 2006.11239, appendix B), as arXiv 2011.13456 compares it.

Residual blocks of constant size with resampling between them, normalization in 32 groups, sinusoidal features of time.
The paper's size for CIFAR-10 is channels=128 channel_multipliers=[1,2,2,2] blocks_per_level=2.
"""

from __future__ import annotations

from collections.abc import Sequence

from sde.models.base import register
from sde.models.settings import UNetSettings
from sde.models.unet import UNet


@register("ddpm")
class DDPM(UNet):
    """The U-Net of DDPM (arXiv 2006.11239).

    Args:
        shape: (C, H, W) of one picture; H and W divisible by 2^(levels - 1).
        num_classes: classes of the data, 0 for none.
        channels: channels of the first level, at least 4. A layer whose channels 32 does not divide is normalized in
            as many groups of four channels or more as divide them.
        channel_multipliers: factor on `channels` for each level, highest resolution first.
        blocks_per_level: residual blocks of a level on the way down; one more on the way up.
        attention_resolutions: longer sides in pixels of the levels that have attention.
        attention_up: on the way up, attention after the "last" block of a level, as score_sde has it, or after "every"
            block, as the paper's code has it.
        norm_eps: what group normalization adds to the variance.
        dropout: probability of dropping an entry inside residual blocks, 0 to below 1.
        activation: "swish", "elu", "relu" or "lrelu" (slope 0.2).
        resample_with_conv: resample with a learned 3x3 convolution, not by averaging and repeating pixels alone.
        centered: whether data is in [-1, 1]; otherwise it is in [0, 1] and the network maps x to 2x - 1.
        scale_by_sigma: divide the output by the noise level; the network is told the index of that level in a
            geometric progression instead of the time, 0 for the highest (`parameterization=smld_chain`).
        sigma_min: lowest noise level of `scale_by_sigma`.
        sigma_max: highest noise level of the same.
        num_scales: number of noise levels of the same, in geometric progression.
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
        attention_up: str = "last",
        norm_eps: float = 1e-6,
        dropout: float = 0.1,
        activation: str = "swish",
        resample_with_conv: bool = True,
        centered: bool = True,
        scale_by_sigma: bool = False,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        num_scales: int = 1000,
        recompute_levels: int = 0,
    ) -> None:
        settings = UNetSettings(
            channels=channels,
            channel_multipliers=channel_multipliers,
            blocks_per_level=blocks_per_level,
            attention_resolutions=attention_resolutions,
            attention_up=attention_up,
            norm_eps=norm_eps,
            dropout=dropout,
            block="ddpm",
            groups="thirty_two",
            activation=activation,
            resample_with_conv=resample_with_conv,
            embedding="positional",
            centered=centered,
            scale_by_sigma=scale_by_sigma,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            num_scales=num_scales,
            recompute_levels=recompute_levels,
        )
        super().__init__(shape, num_classes, settings)
