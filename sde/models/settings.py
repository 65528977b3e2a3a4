"""The settings of a U-Net, checked. What they mean is shown in `sde.models.unet`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sde.errors import UserError, check_choice, check_number
from sde.models.base import check_count, check_counts
from sde.models.layers import ACTIVATIONS, GROUPS
from sde.models.resample import check_fir_kernel


@dataclass(frozen=True)
class UNetSettings:
    """Everything that tells one U-Net from another.

    Attributes:
        channels: channels of the first level, at least 4.
        channel_multipliers: factor on `channels` for each level, highest resolution first; each level has half the
            resolution of the one before.
        blocks_per_level: residual blocks of a level on the way down; there is one more on the way up.
        attention_resolutions: longer sides in pixels of the levels that have attention; those that no level has are
            ignored. The lowest level always has one in the middle.
        dropout: probability of dropping an entry inside residual blocks, 0 to below 1.
        block: "biggan" for residual blocks that resample inside, "ddpm" for resampling between blocks.
        groups: rule of `sde.models.layers.group_norm`.
        activation: one of `sde.models.layers.ACTIVATIONS`.
        skip_rescale: divide every sum with a shortcut by sqrt(2).
        init_scale: initialization scale of the last layer of each residual and attention block and of the output.
        fir_kernel: taps of the resampling filter along either axis; None averages and repeats pixels instead.
        resample_with_conv: whether resampling between blocks has a learned convolution (block "ddpm").
        pad_around: whether that convolution, on the way down, has zeros on all four sides instead of below and to the
            right.
        project_resampled: whether the shortcut of a block that resamples has a 1x1 convolution (block "biggan").
        norm_eps: what group normalization adds to the variance.
        adaptive_norm: whether the embedding scales and shifts instead of being added (arXiv 2105.05233, section 3.1).
        head_channels: channels of one attention head; None for a single head.
        attention_up: on the way up, attention after the "last" block of a level or after "every" block.
        embedding: "fourier" or "positional" features of the noise level.
        fourier_scale: standard deviation of the Fourier frequencies, in cycles per unit of log noise level.
        lowest_frequency: whether positional frequencies reach 1e-4 rad or stop one step before, as ADM's do.
        classes_join: class vectors are added to the "output" of the embedding's two layers, or to their "features".
        noise_conditional: whether the network is told the noise level.
        progressive: how levels add to the output: "none", "output_skip" or "residual".
        progressive_input: how levels see the input: "none", "input_skip" or "residual".
        progressive_combine: how "input_skip" joins it: "sum" or "cat".
        centered: whether data is in [-1, 1]; otherwise it is in [0, 1] and the network maps x to 2x - 1.
        scale_by_sigma: divide the output by the noise level.
        sigma_min, sigma_max, num_scales: the noise levels, in geometric progression, of a network with
            `scale_by_sigma` and positional embedding, which is told an index into them, 0 for `sigma_max`.
        recompute_levels: highest levels whose activations are computed again in the backward pass instead of kept.
    """

    channels: int
    channel_multipliers: Sequence[int]
    blocks_per_level: int
    attention_resolutions: Sequence[int]
    dropout: float
    block: str = "biggan"
    groups: str = "quarter"
    activation: str = "swish"
    skip_rescale: bool = False
    init_scale: float = 0.0
    fir_kernel: Sequence[float] | None = None
    resample_with_conv: bool = True
    pad_around: bool = False
    project_resampled: bool = True
    norm_eps: float = 1e-6
    adaptive_norm: bool = False
    head_channels: int | None = None
    attention_up: str = "last"
    embedding: str = "positional"
    fourier_scale: float = 16.0
    lowest_frequency: bool = True
    classes_join: str = "output"
    noise_conditional: bool = True
    progressive: str = "none"
    progressive_input: str = "none"
    progressive_combine: str = "sum"
    centered: bool = True
    scale_by_sigma: bool = False
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    num_scales: int = 1000
    recompute_levels: int = 0

    def __post_init__(self) -> None:
        def store(name: str, value: object) -> None:
            object.__setattr__(self, name, value)  # lists of the configuration become tuples

        check_count("model.channels", self.channels, at_least=4)
        store("channel_multipliers", check_counts("model.channel_multipliers", self.channel_multipliers))
        if not self.channel_multipliers:
            raise UserError("model.channel_multipliers is empty: give one number for each level, such as [1, 2, 2]")
        check_count("model.blocks_per_level", self.blocks_per_level)
        store("attention_resolutions", check_counts("model.attention_resolutions", self.attention_resolutions))
        check_number("model.dropout", self.dropout, at_least=0, below=1)
        check_choice("model.block", self.block, ("biggan", "ddpm"))
        check_choice("model.groups", self.groups, GROUPS)
        check_choice("model.activation", self.activation, ACTIVATIONS)
        check_number("model.init_scale", self.init_scale, at_least=0)
        if self.fir_kernel is not None:
            store("fir_kernel", check_fir_kernel(self.fir_kernel))
        check_number("model.norm_eps", self.norm_eps, above=0)
        if self.head_channels is not None:
            check_count("model.head_channels", self.head_channels)
        check_choice("model.attention_up", self.attention_up, ("last", "every"))
        check_choice("model.classes_join", self.classes_join, ("output", "features"))
        check_choice("model.embedding", self.embedding, ("fourier", "positional"))
        check_number("model.fourier_scale", self.fourier_scale, above=0)
        check_choice("model.progressive", self.progressive, ("none", "output_skip", "residual"))
        check_choice("model.progressive_input", self.progressive_input, ("none", "input_skip", "residual"))
        check_choice("model.progressive_combine", self.progressive_combine, ("sum", "cat"))
        check_number("model.sigma_min", self.sigma_min, above=0)
        check_number("model.sigma_max", self.sigma_max, above=self.sigma_min)
        check_count("model.num_scales", self.num_scales, at_least=2)
        levels = len(self.channel_multipliers)
        check_count("model.recompute_levels", self.recompute_levels, at_least=0, at_most=levels)
