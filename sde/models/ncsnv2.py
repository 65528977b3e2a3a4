r"""NCSNv2 (arXiv 2006.09011): a RefineNet that is not told the noise level, whose output is divided by it.

    y = R(x) / sigma

As a score, -z / sigma, that leaves R the same task at every noise level: to tell the noise, of variance 1, from what it
sees ("technique 3"). So R has no part that belongs to one level, and works for levels it was not trained on.

The noise level is the network's label itself (`noise_label: sigma`), for any SDE and parameterization; or, as in the
original, it is looked up by its index i of n levels in geometric progression (`noise_label: index`):

    sigma_i = sigma_max (sigma_min / sigma_max)^(i / (n - 1))

The paper's sizes (appendix B), all with channels=128:

    CIFAR-10, CelebA at 64 px     channel_multipliers=[1,2,2,2] dilations=[1,1,2,4]
    LSUN at 64 to 128 px          channel_multipliers=[1,2,2,4,4] dilations=[1,1,1,2,4]
    FFHQ at 256 px                channel_multipliers=[1,2,2,2,4,4] dilations=[1,1,1,1,2,4]

Classes, which the original has not, choose the coefficients of every normalization, as the noise level does in NCSN.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sde.errors import check_choice, check_flag, check_number
from sde.models.base import check_count, check_shape, register
from sde.models.embeddings import NoiseScales
from sde.models.refinenet import RefineNet, RefineNetSettings, class_rows


@register("ncsnv2")
class NCSNv2(nn.Module):
    """NCSNv2 (arXiv 2006.09011).

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
            standard deviation) or "none". "variance" and "none" keep the mean of every channel.
        centered: whether data is in [-1, 1]; otherwise it is in [0, 1] and the network maps x to 2x - 1.
        scale_by_sigma: divide the output by the noise level; without it, the network is not told the noise level.
        noise_label: "sigma" for the noise level sigma(t) / alpha(t) itself, or "index" for its index in a geometric
            progression, 0 for the highest (`parameterization=smld_chain`).
        sigma_min: lowest noise level of the progression, for "index".
        sigma_max: highest noise level of the same.
        num_scales: number of noise levels of the same.
        recompute: keep only the input of each residual and refine block for the backward pass and compute the rest
            again: less memory for a third to a half more time.

    Raises:
        UserError: a setting out of range, or a picture that cannot be halved.
    """

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
        scale_by_sigma: bool = True,
        noise_label: str = "sigma",
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        num_scales: int = 1000,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check_shape("ncsnv2", shape, "CHW")
        check_count("num_classes", num_classes, at_least=0)
        check_flag("model.centered", centered)
        check_flag("model.scale_by_sigma", scale_by_sigma)
        check_choice("model.noise_label", noise_label, ("sigma", "index"))
        check_number("model.sigma_min", sigma_min, above=0)
        check_number("model.sigma_max", sigma_max, above=sigma_min)
        check_count("model.num_scales", num_scales, at_least=2)
        settings = RefineNetSettings(
            channels=channels,
            channel_multipliers=channel_multipliers,
            dilations=dilations,
            normalization=normalization,
            tables=(num_classes + 1,) if num_classes else (),
            normalize_refinement=False,
            pool="max",
            activation=activation,
            dropout=dropout,
            recompute=recompute,
        )
        self.shape = shape
        self.num_classes = num_classes
        self.noise_label = noise_label
        self.centered = centered
        self.scale_by_sigma = scale_by_sigma
        self.scales = NoiseScales(sigma_min, sigma_max, num_scales)
        self.refinenet = RefineNet(shape, settings)

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """The output at pictures `x` (B, C, H, W), of their shape and type.

        Args:
            noise: (B,), the number that `noise_label` names.
            label: class labels (B,) int64, `num_classes` for "no label"; None for "no label" throughout.

        Raises:
            UserError: class labels for a network without classes.
        """
        rows = class_rows(label, self.num_classes, x)
        y = self.refinenet(x if self.centered else 2 * x - 1, rows)
        if self.scale_by_sigma:
            sigma = noise if self.noise_label == "sigma" else self.scales.sigma(noise)
            y = y / sigma[:, None, None, None]
        return y.to(x.dtype)
