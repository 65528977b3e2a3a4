r"""RefineNets (arXiv 1611.06612) as score networks have them: NCSN (arXiv 1907.05600) and NCSNv2 (arXiv 2006.09011).

    stages    h_1 .. h_n: two residual blocks each. The first stage keeps the size of the picture, the next are halved
              by mean pooling, the last have dilated convolutions instead, which see as far and keep the size
    refine    r_n = refine(h_n),   r_k = refine(h_k, r_{k+1}): back up to the size and the channels of h_1
    output    3x3 convolution of act(norm(r_1))

One refine block is

    residual convolution units    x <- x + conv act conv act x, twice for each input
    multi-resolution fusion       sum over inputs of enlarge(conv x)
    chained residual pooling      x <- act x;  p <- conv pool p, x <- x + p, twice, from p = x, with a 5x5 pool
    residual convolution units    once; three times in the last block

In NCSN every convolution has a normalization before it and the pool takes means. In NCSNv2 the refine blocks have no
normalization and the pool takes maxima. Wherever there is a normalization, its coefficients may be chosen by rows of
tables, one row for each example: the noise level in NCSN, the class in both.

Weights start as PyTorch's layers do, as in the originals; only the last convolution starts near zero. The noise level
and the division by it are the business of `sde.models.ncsn` and `sde.models.ncsnv2`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sde.errors import UserError, check_choice, check_flag, check_number
from sde.models.base import check_count, check_counts, check_labels, check_unlabeled
from sde.models.layers import ACTIVATIONS, conv
from sde.models.recompute import recompute

EPSILON = 1e-5  # added to every variance, as in the originals
Rows = tuple[Tensor, ...]


class Coefficients(nn.Module):
    """Learned numbers for each channel: one set for all examples, or the sum of one row of each table.

    Args:
        channels: number of channels.
        means: for each coefficient 1 for a factor, which starts as N(1, 0.02^2), or 0 for an offset, which starts at 0.
        tables: number of rows of each table; none for one set. Rows of the first table start as above, others at 0.
    """

    def __init__(self, channels: int, means: Sequence[int], tables: Sequence[int]) -> None:
        super().__init__()
        self.count = len(means)
        embeddings = [nn.Embedding(rows, len(means) * channels) for rows in tables or (1,)]
        for i, table in enumerate(embeddings):
            weight = table.weight.detach().view(-1, len(means), channels)
            nn.init.zeros_(weight)
            for k, mean in enumerate(means):
                if mean and i == 0:
                    nn.init.normal_(weight[:, k], mean, 0.02)
        self.tables = nn.ModuleList(embeddings)

    def forward(self, rows: Rows) -> tuple[Tensor, ...]:
        """Rows (B,) int64 for each table to the coefficients, each (B, channels, 1, 1), or (1, ...) for one set."""
        if not rows:
            return self._split(cast(nn.Embedding, self.tables[0]).weight)
        chosen: list[Tensor] = [table(row) for table, row in zip(self.tables, rows, strict=True)]
        return self._split(sum(chosen[1:], chosen[0]))

    def _split(self, vectors: Tensor) -> tuple[Tensor, ...]:
        return vectors[:, :, None, None].chunk(self.count, 1)


class InstanceNormPlus(nn.Module):
    r"""Instance normalization that keeps how bright each channel is, compared with the others (arXiv 1907.05600, A.1).

        y_c = gamma_c ((x_c - mu_c) / s_c + alpha_c (mu_c - m) / v) + beta_c

    mu_c and s_c are mean and standard deviation over the pixels of channel c, m and v those of the mu_c over channels
    (v^2 with C - 1 in the denominator, s_c^2 with the number of pixels).

    Args:
        channels: of the input, at least 2.
        tables: numbers of rows that (gamma, alpha, beta) are chosen from; see `Coefficients`.
    """

    def __init__(self, channels: int, tables: Sequence[int]) -> None:
        super().__init__()
        self.coefficients = Coefficients(channels, (1, 1, 0), tables)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """(B, channels, H, W) to the same, computed in float32 or better."""
        h = at_least_float32(x)
        variance, mean = torch.var_mean(h, (2, 3), correction=0, keepdim=True)
        spread, center = torch.var_mean(mean, 1, keepdim=True)
        gamma, alpha, beta = self.coefficients(rows)
        offset = gamma * alpha * ((mean - center) * torch.rsqrt(spread + EPSILON)) + beta
        return torch.addcmul(offset, h - mean, gamma * torch.rsqrt(variance + EPSILON)).to(x.dtype)


class InstanceNorm(nn.Module):
    r"""Instance normalization: y = (x - mu) / s without tables, y = gamma (x - mu) / s + beta with them.

    Args:
        channels: of the input.
        tables: numbers of rows that (gamma, beta) are chosen from; see `Coefficients`.
    """

    def __init__(self, channels: int, tables: Sequence[int]) -> None:
        super().__init__()
        self.coefficients = Coefficients(channels, (1, 0), tables) if tables else None

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """(B, channels, H, W) to the same, computed in float32 or better."""
        h = at_least_float32(x)
        variance, mean = torch.var_mean(h, (2, 3), correction=0, keepdim=True)
        scale = torch.rsqrt(variance + EPSILON)
        if self.coefficients is None:
            return ((h - mean) * scale).to(x.dtype)
        gamma, beta = self.coefficients(rows)
        return torch.addcmul(beta, h - mean, gamma * scale).to(x.dtype)


class VarianceNorm(nn.Module):
    r"""Division by the standard deviation alone: y = gamma x / s, s^2 with the number of pixels less one.

    Args:
        channels: of the input.
        tables: numbers of rows that gamma is chosen from; see `Coefficients`.
    """

    def __init__(self, channels: int, tables: Sequence[int]) -> None:
        super().__init__()
        self.coefficients = Coefficients(channels, (1,), tables)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """(B, channels, H, W) to the same, computed in float32 or better."""
        h = at_least_float32(x)
        (gamma,) = self.coefficients(rows)
        return (h * (gamma * torch.rsqrt(h.var((2, 3), keepdim=True) + EPSILON))).to(x.dtype)


class NoNorm(nn.Module):
    """No normalization: y = x without tables, y = gamma x + beta with them.

    Args:
        channels: of the input.
        tables: numbers of rows that (gamma, beta) are chosen from; see `Coefficients`.
    """

    def __init__(self, channels: int, tables: Sequence[int]) -> None:
        super().__init__()
        self.coefficients = Coefficients(channels, (1, 0), tables) if tables else None

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """(B, channels, H, W) to the same."""
        if self.coefficients is None:
            return x
        gamma, beta = self.coefficients(rows)
        return torch.addcmul(beta, x, gamma).to(x.dtype)


NORMALIZATIONS: dict[str, Callable[[int, Sequence[int]], nn.Module]] = {
    "instance++": InstanceNormPlus,
    "instance": InstanceNorm,
    "variance": VarianceNorm,
    "none": NoNorm,
}


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 or better: statistics of half precision would keep two or three digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class RefineNetSettings:
    """Everything that tells one RefineNet from another.

    Attributes:
        channels: channels of the first stage, at least 4.
        channel_multipliers: factor on `channels` for each stage.
        dilations: of the convolutions of each stage. After the first stage, those with 1 halve the picture and those
            with more keep its size.
        normalization: one of `NORMALIZATIONS`.
        tables: numbers of rows of the tables that coefficients of normalizations are chosen from.
        normalize_refinement: put a normalization before every convolution of the refine blocks.
        pool: "max" or "mean", of chained residual pooling.
        activation: one of `sde.models.layers.ACTIVATIONS`.
        dropout: probability of dropping an entry inside residual blocks, 0 to below 1.
        recompute: keep only the input of each residual and refine block for the backward pass.
    """

    channels: int
    channel_multipliers: Sequence[int]
    dilations: Sequence[int]
    normalization: str
    tables: tuple[int, ...]
    normalize_refinement: bool
    pool: str
    activation: str
    dropout: float
    recompute: bool

    def __post_init__(self) -> None:
        check_count("model.channels", self.channels, at_least=4)
        multipliers = check_counts("model.channel_multipliers", self.channel_multipliers)
        dilations = check_counts("model.dilations", self.dilations)
        if not multipliers or len(multipliers) != len(dilations):
            raise UserError(
                f"model.channel_multipliers={list(multipliers)} and model.dilations={list(dilations)} must have one "
                "number for each stage, such as [1, 2, 2, 2] and [1, 1, 2, 4]"
            )
        check_choice("model.normalization", self.normalization, NORMALIZATIONS)
        check_choice("model.activation", self.activation, ACTIVATIONS)
        check_number("model.dropout", self.dropout, at_least=0, below=1)
        check_flag("model.recompute", self.recompute)

    def norm(self, channels: int) -> nn.Module:
        """The normalization of `channels` channels."""
        return NORMALIZATIONS[self.normalization](channels, self.tables)

    def refinement_norm(self, channels: int) -> nn.Module:
        """What is before a convolution of a refine block."""
        return self.norm(channels) if self.normalize_refinement else NoNorm(channels, ())


class ConvMeanPool(nn.Module):
    """A convolution, then the mean of each 2x2 pixels, as one convolution of stride 2 with the mean of four kernels.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        size: of the kernel, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H/2, W/2)."""
        spread = F.avg_pool2d(F.pad(self.conv.weight, (1, 1, 1, 1)), 2, stride=1)
        return F.conv2d(x, spread, self.conv.bias, stride=2, padding=self.conv.padding)


class ResidualBlock(nn.Module):
    """y = shortcut(x) + conv_2(dropout(act(norm_2(conv_1(act(norm_1(x)))))).

    Blocks that change the size or the channels have a shortcut of the kind of `conv_2`: a 3x3 convolution of the same
    dilation, or a 1x1 convolution with the same pooling. In others it is the identity.

    Args:
        in_channels: of the input and of `conv_1`.
        out_channels: of the output.
        dilation: of both convolutions.
        first: whether it is the first block of a stage after the first, which has a shortcut with weights.
        settings: of the RefineNet.
    """

    def __init__(
        self, in_channels: int, out_channels: int, dilation: int, first: bool, settings: RefineNetSettings
    ) -> None:
        super().__init__()

        def conv3x3(channels: int) -> nn.Conv2d:
            return nn.Conv2d(in_channels, channels, 3, padding=dilation, dilation=dilation)

        pooled = first and dilation == 1
        self.activation = ACTIVATIONS[settings.activation]()
        self.norm_1 = settings.norm(in_channels)
        self.conv_1 = conv3x3(in_channels)
        self.norm_2 = settings.norm(in_channels)
        self.dropout = nn.Dropout(settings.dropout)
        self.conv_2 = ConvMeanPool(in_channels, out_channels, 3) if pooled else conv3x3(out_channels)
        self.shortcut: nn.Module | None = None
        if first:
            self.shortcut = ConvMeanPool(in_channels, out_channels, 1) if pooled else conv3x3(out_channels)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H', W'), with H' = H / 2 if it pools."""
        h = self.conv_1(self.activation(self.norm_1(x, rows)))
        h = self.conv_2(self.dropout(self.activation(self.norm_2(h, rows))))
        return h + (x if self.shortcut is None else self.shortcut(x))


class ResidualConvUnits(nn.Module):
    """x <- x + conv_b(act(norm_b(conv_a(act(norm_a(x)))))), `count` times; the convolutions have no bias.

    Args:
        channels: of input and output.
        count: number of units.
        settings: of the RefineNet.
    """

    def __init__(self, channels: int, count: int, settings: RefineNetSettings) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[settings.activation]()
        self.norms = nn.ModuleList(settings.refinement_norm(channels) for _ in range(2 * count))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2 * count))

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """(B, channels, H, W) to the same."""
        h = x
        for i, (norm, layer) in enumerate(zip(self.norms, self.convs, strict=True)):
            h = layer(self.activation(norm(h, rows)))
            if i % 2:
                x = h = x + h
        return x


class MultiResolutionFusion(nn.Module):
    """The sum of all inputs, each normalized, convolved and enlarged to the size of the first.

    Enlarging is linear interpolation between the centers of pixels, where corners stay corners.

    Args:
        in_channels: of each input.
        out_channels: of the output.
        settings: of the RefineNet.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, settings: RefineNetSettings) -> None:
        super().__init__()
        self.norms = nn.ModuleList(settings.refinement_norm(channels) for channels in in_channels)
        self.convs = nn.ModuleList(nn.Conv2d(channels, out_channels, 3, padding=1) for channels in in_channels)

    def forward(self, xs: Sequence[Tensor], rows: Rows) -> Tensor:
        """Tensors (B, in_channels[i], H_i, W_i) to (B, out_channels, H_0, W_0)."""
        size = xs[0].shape[2:]
        hs = [layer(norm(x, rows)) for x, norm, layer in zip(xs, self.norms, self.convs, strict=True)]
        y = hs[0]
        for h in hs[1:]:
            same = h.shape[2:] == size
            y = y + (h if same else F.interpolate(h, size=size, mode="bilinear", align_corners=True))
        return y


class ChainedResidualPooling(nn.Module):
    """x <- act(x), p = x; then twice p <- conv(pool(norm(p))), x <- x + p, with a 5x5 pool of stride 1 and no bias.

    Args:
        channels: of input and output.
        settings: of the RefineNet.
    """

    def __init__(self, channels: int, settings: RefineNetSettings) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[settings.activation]()
        pool = nn.MaxPool2d if settings.pool == "max" else nn.AvgPool2d
        self.pool = pool(5, stride=1, padding=2)
        self.norms = nn.ModuleList(settings.refinement_norm(channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """(B, channels, H, W) to the same."""
        x = path = self.activation(x)
        for norm, layer in zip(self.norms, self.convs, strict=True):
            path = layer(self.pool(norm(path, rows)))
            x = x + path
        return x


class RefineBlock(nn.Module):
    """Residual convolution units for each input, fusion, chained residual pooling, residual convolution units.

    Args:
        in_channels: of each input; a single one must be `out_channels`, and is not fused.
        out_channels: of the output.
        last: whether it is the last of the network, which ends with three units.
        settings: of the RefineNet.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, last: bool, settings: RefineNetSettings) -> None:
        super().__init__()
        self.adapt = nn.ModuleList(ResidualConvUnits(channels, 2, settings) for channels in in_channels)
        self.fuse = MultiResolutionFusion(in_channels, out_channels, settings) if len(in_channels) > 1 else None
        self.pooling = ChainedResidualPooling(out_channels, settings)
        self.output = ResidualConvUnits(out_channels, 3 if last else 1, settings)

    def forward(self, xs: Sequence[Tensor], rows: Rows) -> Tensor:
        """Tensors (B, in_channels[i], H_i, W_i) to (B, out_channels, H_0, W_0)."""
        hs = [adapt(x, rows) for x, adapt in zip(xs, self.adapt, strict=True)]
        h = hs[0] if self.fuse is None else self.fuse(hs, rows)
        return self.output(self.pooling(h, rows), rows)


class RefineNet(nn.Module):
    """The network of `NCSN` and `NCSNv2`, from a picture to one of the same shape.

    Args:
        shape: (C, H, W) of one picture; H and W divisible by 2 for each stage that halves it.
        settings: what kind of RefineNet.

    Raises:
        UserError: the sides of the picture cannot be halved.
    """

    def __init__(self, shape: tuple[int, ...], settings: RefineNetSettings) -> None:
        super().__init__()
        _check_sides(shape, settings.dilations)
        widths = [settings.channels * multiplier for multiplier in settings.channel_multipliers]
        self.recompute = settings.recompute
        self.input = nn.Conv2d(shape[0], widths[0], 3, padding=1)
        self.stages = nn.ModuleList()
        channels = widths[0]
        for i, (width, dilation) in enumerate(zip(widths, settings.dilations, strict=True)):
            first = ResidualBlock(channels, width, dilation, i > 0, settings)
            self.stages.append(nn.ModuleList((first, ResidualBlock(width, width, dilation, False, settings))))
            channels = width
        self.refine = nn.ModuleList()
        for i in reversed(range(len(widths))):
            inputs = (widths[i],) if i == len(widths) - 1 else (widths[i], channels)
            channels = widths[i] if len(inputs) == 1 else widths[max(i - 1, 0)]
            self.refine.append(RefineBlock(inputs, channels, i == 0, settings))
        self.norm = settings.norm(channels)
        self.activation = ACTIVATIONS[settings.activation]()
        self.output = conv(channels, shape[0], scale=0.0)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Pictures (B, C, H, W), and rows (B,) int64 for each table of the settings, to (B, C, H, W)."""
        h = self.input(x)
        stages = []
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                h = self._call(block, h, rows)
            stages.append(h)
        h = self._call(self.refine[0], stages[-1:], rows)
        for refine, below in zip(self.refine[1:], reversed(stages[:-1]), strict=True):
            h = self._call(refine, (below, h), rows)
        return self.output(self.activation(self.norm(h, rows)))

    def _call(self, block: nn.Module, h: Tensor | Sequence[Tensor], rows: Rows) -> Tensor:
        return recompute(block, h, rows) if self.recompute else block(h, rows)


def _check_sides(shape: tuple[int, ...], dilations: Sequence[int]) -> None:
    halvings = sum(dilation == 1 for dilation in dilations[1:])
    height, width = shape[1:]
    divisor = 2**halvings
    if height % divisor or width % divisor:
        raise UserError(
            f"pictures of {height}x{width} cannot be halved {halvings} times: with model.dilations={list(dilations)} "
            f"the sides must be multiples of {divisor}; resize the data or choose more dilations above 1"
        )


def class_rows(label: Tensor | None, num_classes: int, like: Tensor) -> Rows:
    """The rows of a table of `num_classes` + 1 rows, of which the last means "no label"; none without classes.

    Args:
        label: class labels (B,) int64, or None for "no label".
        num_classes: number of classes, 0 for none.
        like: a tensor on the device of the rows.

    Raises:
        UserError: class labels for a network without classes, or (on the CPU) one out of range.
    """
    if not num_classes:
        check_unlabeled(label)
        return ()
    if label is None:
        return (like.new_full((1,), num_classes, dtype=torch.int64),)
    check_labels(label, num_classes)
    return (label,)
