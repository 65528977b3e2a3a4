r"""NCSN (arXiv 1907.05600): a RefineNet whose normalizations have coefficients of their own for each noise level.

The label is the index i of one of n noise levels, 0 for the highest (`parameterization=smld_chain`, whose n must be the
model's `num_scales`). Every normalization, and there is one before every convolution, has a table of n rows,

    y_c = gamma_ic ((x_c - mu_c) / s_c + alpha_ic (mu_c - m) / v) + beta_ic

(`sde.models.refinenet.InstanceNormPlus`), so the network grows with n and knows nothing between its levels: what arXiv
2006.09011 found in the way of many levels, and NCSNv2 mended. The output is not divided by the noise level.

The paper's size for 32 pixels is channels=128 channel_multipliers=[1,2,2,2] dilations=[1,1,2,4] num_scales=10, with
noise levels from 1 to 0.01. Classes, which the original has not, add a row of a second table, which starts at zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sde.errors import UserError, check_flag
from sde.models.base import check_count, check_shape, register
from sde.models.refinenet import RefineNet, RefineNetSettings, Rows, class_rows


@register("ncsn")
class NCSN(nn.Module):
    """NCSN (arXiv 1907.05600).

    Args:
        shape: (C, H, W) of one picture; H and W divisible by 2 for each stage that halves it.
        num_classes: classes of the data, 0 for none.
        channels: channels of the first stage, at least 4.
        channel_multipliers: factor on `channels` for each stage.
        dilations: of the convolutions of each stage. After the first stage, those with 1 halve the picture and those
            with more keep its size.
        dropout: probability of dropping an entry inside residual blocks, 0 to below 1.
        activation: "swish", "elu", "relu" or "lrelu" (slope 0.2).
        normalization: "instance++" (`sde.models.refinenet.InstanceNormPlus`), "instance", "variance" (division by the
            standard deviation) or "none"; the noise level chooses the coefficients of each.
        centered: whether data is in [-1, 1]; otherwise it is in [0, 1] and the network maps x to 2x - 1.
        num_scales: number of noise levels; must be `parameterization.n`.
        recompute: keep only the input of each residual and refine block for the backward pass and compute the rest
            again: less memory for a third to a half more time.

    Raises:
        UserError: a setting out of range, or a picture that cannot be halved.
    """

    noise_label = "index"

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        channels: int = 64,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 2, 4),
        dropout: float = 0.0,
        activation: str = "elu",
        normalization: str = "instance++",
        centered: bool = True,
        num_scales: int = 1000,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check_shape("ncsn", shape, "CHW")
        check_count("num_classes", num_classes, at_least=0)
        check_flag("model.centered", centered)
        check_count("model.num_scales", num_scales, at_least=2)
        settings = RefineNetSettings(
            channels=channels,
            channel_multipliers=channel_multipliers,
            dilations=dilations,
            normalization=normalization,
            tables=(num_scales, num_classes + 1) if num_classes else (num_scales,),
            normalize_refinement=True,
            pool="mean",
            activation=activation,
            dropout=dropout,
            recompute=recompute,
        )
        self.shape = shape
        self.num_classes = num_classes
        self.num_scales = num_scales
        self.centered = centered
        self.refinenet = RefineNet(shape, settings)

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """The output at pictures `x` (B, C, H, W), of their shape and type.

        Args:
            noise: (B,), index of the noise level, 0 to `num_scales` - 1; rounded down.
            label: class labels (B,) int64, `num_classes` for "no label"; None for "no label" throughout.

        Raises:
            UserError: class labels for a network without classes, or (on the CPU; elsewhere it is the device that
                stops) an index out of range.
        """
        self.check_noise(noise)
        rows: Rows = (noise.floor().to(torch.int64), *class_rows(label, self.num_classes, x))
        return self.refinenet(x if self.centered else 2 * x - 1, rows).to(x.dtype)

    def check_noise(self, noise: Tensor) -> None:
        """Raise `UserError` unless noise labels (on the CPU) are indices of the network's levels."""
        if noise.device.type != "cpu" or torch.compiler.is_compiling():
            return
        outside = noise[(noise < 0) | (noise >= self.num_scales)]
        if outside.numel():
            raise UserError(
                f"noise level {float(outside[0]):g} is not one of the {self.num_scales} of the model: "
                "use parameterization=smld_chain with parameterization.n equal to model.num_scales"
            )
