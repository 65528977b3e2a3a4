r"""NCSN++, the network of arXiv 2011.13456 (section 4.1 and appendix H), with all of its settings.

A U-Net (`sde.models.unet`) that differs from DDPM's by the residual blocks of BigGAN, which resample inside, by FIR
filters against aliasing, by sums with a shortcut divided by sqrt(2), by progressive inputs and outputs, and by Fourier
features of the logarithm of the noise level where embedding is "fourier". The sizes of the paper:

    CIFAR-10, 32x32       channels=128 channel_multipliers=[1,2,2,2] blocks_per_level=4 (8: "deep")
    CelebA-HQ and FFHQ,   channels=128 channel_multipliers=[1,1,2,2,2,2,2] blocks_per_level=2 dropout=0
      256x256               progressive=output_skip progressive_input=input_skip
    FFHQ, 1024x1024       channels=16 channel_multipliers=[1,2,4,8,16,32,32,32] blocks_per_level=1 dropout=0
                            progressive=output_skip progressive_input=input_skip
"""

from __future__ import annotations

from collections.abc import Sequence

from sde.models.base import register
from sde.models.settings import UNetSettings
from sde.models.unet import UNet


@register("ncsnpp")
class NCSNpp(UNet):
    """NCSN++ (arXiv 2011.13456).

    Args:
        shape: (C, H, W) of one picture; H and W divisible by 2^(levels - 1).
        num_classes: classes of the data, 0 for none.
        channels: channels of the first level, at least 4.
        channel_multipliers: factor on `channels` for each level, highest resolution first.
        blocks_per_level: residual blocks of a level on the way down; one more on the way up.
        attention_resolutions: longer sides in pixels of the levels that have attention.
        dropout: probability of dropping an entry inside residual blocks, 0 to below 1.
        block: "biggan" (resampling inside residual blocks) or "ddpm" (between them).
        activation: "swish", "elu", "relu" or "lrelu" (slope 0.2).
        skip_rescale: divide every sum with a shortcut by sqrt(2).
        init_scale: initialization scale of the last layer of each block and of the output, at least 0.
        fir: resample through a filter against aliasing instead of averaging and repeating pixels.
        fir_kernel: taps of that filter along either axis.
        resample_with_conv: with block "ddpm", resample with a learned 3x3 convolution.
        embedding: "positional" features of time (the paper's VP), or "fourier" features of log noise level (its VE),
            whose many frequencies want long training.
        fourier_scale: standard deviation of the Fourier frequencies, in cycles per unit of log noise level.
        noise_conditional: whether the network is told the noise level.
        progressive: how levels add to the output: "none", "output_skip" or "residual".
        progressive_input: how levels see the input: "none", "input_skip" or "residual".
        progressive_combine: how "input_skip" joins it: "sum" or "cat".
        classes_join: class vectors are added to the "output" of the embedding's two layers, or to their "features", as
            EDM does.
        centered: whether data is in [-1, 1]; otherwise it is in [0, 1] and the network maps x to 2x - 1.
        scale_by_sigma: divide the output by the noise level; with positional embedding the network is told the index
            of that level in a geometric progression, 0 for the highest (`parameterization=smld_chain`).
        sigma_min: lowest noise level of positional embedding with `scale_by_sigma`.
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
        dropout: float = 0.1,
        block: str = "biggan",
        activation: str = "swish",
        skip_rescale: bool = True,
        init_scale: float = 0.0,
        fir: bool = True,
        fir_kernel: Sequence[float] = (1, 3, 3, 1),
        resample_with_conv: bool = True,
        embedding: str = "positional",
        fourier_scale: float = 16.0,
        noise_conditional: bool = True,
        progressive: str = "none",
        progressive_input: str = "residual",
        progressive_combine: str = "sum",
        classes_join: str = "output",
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
            dropout=dropout,
            block=block,
            activation=activation,
            skip_rescale=skip_rescale,
            init_scale=init_scale,
            fir_kernel=fir_kernel if fir else None,
            resample_with_conv=resample_with_conv,
            embedding=embedding,
            fourier_scale=fourier_scale,
            noise_conditional=noise_conditional,
            progressive=progressive,
            progressive_input=progressive_input,
            progressive_combine=progressive_combine,
            classes_join=classes_join,
            centered=centered,
            scale_by_sigma=scale_by_sigma,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            num_scales=num_scales,
            recompute_levels=recompute_levels,
        )
        super().__init__(shape, num_classes, settings)
