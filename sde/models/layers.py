r"""The layers that the U-Nets are made of: convolutions with their initialization, normalization, residual blocks and
self-attention (arXiv 2006.11239; BigGAN residual blocks, arXiv 1809.11096; all as in arXiv 2011.13456, appendix H).

Everything is initialized by variance scaling: uniform with variance `scale / fan`, fan the mean of fan-in and fan-out.
A scale of 0 stands for 1e-10, which starts a residual branch as the identity without being exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sde.errors import UserError
from sde.models.attention import attend
from sde.models.winograd import conv3x3

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "swish": nn.SiLU,
    "elu": nn.ELU,
    "relu": nn.ReLU,
    "lrelu": partial(nn.LeakyReLU, negative_slope=0.2),
}
GROUPS = ("quarter", "thirty_two")


def initialize(weight: Tensor, scale: float = 1.0) -> None:
    """Fill `weight` (out, in, ...) or (in, out, ...) by variance scaling, in place."""
    fan = (weight.shape[0] + weight.shape[1]) / 2 * math.prod(weight.shape[2:])
    bound = math.sqrt(3 * (scale or 1e-10) / fan)
    nn.init.uniform_(weight, -bound, bound)


def linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer with variance-scaling weights and zero bias."""
    layer = nn.Linear(in_features, out_features)
    initialize(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Conv3x3(nn.Conv2d):
    """A convolution with 3x3 kernels and a border of zeros, which keeps the size; on a CPU in Winograd's form."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W), to which `offset` (B, out_channels) is added."""
        assert self.bias is not None
        return conv3x3(x, self.weight, self.bias if offset is None else self.bias + offset)


def conv(
    in_channels: int,
    out_channels: int,
    size: int = 3,
    *,
    scale: float = 1.0,
    stride: int = 1,
    padding: int | None = None,
) -> nn.Conv2d:
    """A convolution with variance-scaling weights and zero bias; `padding` keeps the size unless given."""
    padding = size // 2 if padding is None else padding
    layer: nn.Conv2d
    if (size, stride, padding) == (3, 1, 1):
        layer = Conv3x3(in_channels, out_channels)
    else:
        layer = nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=padding)
    initialize(layer.weight, scale)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def group_norm(channels: int, groups: str = "quarter", eps: float = 1e-6) -> nn.GroupNorm:
    """Group normalization.

    Args:
        channels: number of channels.
        groups: "quarter" for min(channels // 4, 32) groups, as NCSN++ has; "thirty_two" for 32 groups, as DDPM has.
            Where that number does not divide `channels`, it is the most groups of four channels or more that do.
        eps: added to the variance.

    Raises:
        UserError: there are fewer than four channels.
    """
    if channels < 4:
        raise UserError(f"a layer of {channels} channels is too small to normalize: make model.channels at least 4")
    most = min(channels // 4, 32)
    count = 32 if groups == "thirty_two" else most
    if channels % count:
        count = max(n for n in range(1, most + 1) if channels % n == 0)
    return GroupNorm(count, channels, eps=eps)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, which vectorized forward-mode derivatives work with too: PyTorch's own want contiguous input."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, C, ...) with mean 0 and variance 1 in each group of channels, scaled and shifted by channel."""
        if torch._C._are_functorch_transforms_active():
            x = x.clone(memory_format=torch.contiguous_format)
        return super().forward(x)


class Dropout(nn.Dropout):
    """Dropout that needs 16 random bits for an entry on a CPU, where drawing random numbers is what it costs.

    The probability is a multiple of 2^-16 there; the entries that stay are scaled for just that probability. One that
    is so near to 0 or 1 that this would change it by more than a hundredth is left to PyTorch.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape, to the same."""
        extreme = min(self.p, 1 - self.p) < 2**-10
        if not self.training or extreme or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return x * self.noise_like(x)

    @torch.no_grad()
    def noise_like(self, x: Tensor) -> Tensor:
        """Zeros, and the scale where an entry stays, of the shape, type and layout of `x`."""
        dropped = round(self.p * 2**16)
        numbers = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        noise = torch.empty_like(x, memory_format=torch.preserve_format)
        flat = noise.as_strided((x.numel(),), (1,))
        flat.copy_(numbers[: x.numel()] >= dropped - 2**15).mul_(2**16 / (2**16 - dropped))
        return noise


@dataclass(frozen=True)
class BlockSettings:
    """What the blocks of a network have in common.

    Attributes:
        activation: the nonlinearity.
        groups: rule of `group_norm`.
        norm_eps: what group normalization adds to the variance.
        dropout: probability of dropping an entry inside residual blocks, 0 to 1.
        init_scale: initialization scale of the last layer of each block.
        shortcut_scale: initialization scale of the 1x1 convolutions of shortcuts.
        skip_rescale: divide the sum with a shortcut by sqrt(2), so that its variance is that of its terms.
        embedding_size: length of the embedding that residual blocks receive; None when there is none.
        adaptive_norm: the embedding scales and shifts what the second normalization gives (arXiv 2105.05233, section
            3.1), instead of being added before it.
        project_resampled: a shortcut with resampling has a 1x1 convolution although it keeps the channels.
        head_channels: channels of one attention head; None for a single head.
    """

    activation: nn.Module
    groups: str
    norm_eps: float
    dropout: float
    init_scale: float
    shortcut_scale: float
    skip_rescale: bool
    embedding_size: int | None
    adaptive_norm: bool
    project_resampled: bool
    head_channels: int | None

    def norm(self, channels: int) -> nn.GroupNorm:
        """Group normalization of `channels`."""
        return group_norm(channels, self.groups, self.norm_eps)


class Head(nn.Module):
    """Normalization, activation and a 3x3 convolution.

    Args:
        channels: of the input.
        out_channels: of the output.
        settings: of the network's blocks.
        scale: initialization scale of the convolution.
    """

    def __init__(self, channels: int, out_channels: int, settings: BlockSettings, scale: float) -> None:
        super().__init__()
        self.norm = settings.norm(channels)
        self.activation = settings.activation
        self.conv = conv(channels, out_channels, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out_channels, H, W)."""
        return self.conv(activate(self.activation, self.norm(x)))


class ResidualBlock(nn.Module):
    r"""Two 3x3 convolutions around a shortcut; the embedding enters between them.

        h = conv_1(resample(act(norm_1(x)))) + condition(e)
        y = shortcut(resample(x)) + conv_2(dropout(act(norm_2(h))))

    With adaptive normalization, h has no condition and norm_2(h) becomes norm_2(h) (1 + scale) + shift, with scale and
    shift one number per channel from condition(e). The shortcut is a 1x1 convolution where the number of channels
    changes or, if the settings say so, where there is resampling; else it is the identity.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        settings: of the network's blocks.
        resample: makes the picture larger or smaller (BigGAN's residual blocks do); None keeps its size.
    """

    def __init__(
        self, in_channels: int, out_channels: int, settings: BlockSettings, resample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.activation = settings.activation
        self.resample = resample
        self.norm_1 = settings.norm(in_channels)
        self.conv_1 = conv(in_channels, out_channels)
        size = settings.embedding_size
        self.adaptive = settings.adaptive_norm and size is not None
        self.condition = None if size is None else linear(size, (2 if self.adaptive else 1) * out_channels)
        self.norm_2 = settings.norm(out_channels)
        self.dropout = Dropout(settings.dropout)
        self.conv_2 = conv(out_channels, out_channels, scale=settings.init_scale)
        project = in_channels != out_channels or (resample is not None and settings.project_resampled)
        self.shortcut = conv(in_channels, out_channels, 1, scale=settings.shortcut_scale) if project else None
        self.skip_rescale = settings.skip_rescale

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """(B, in_channels, H, W) and the activated embedding (B, embedding_size) to (B, out_channels, H', W')."""
        condition = None if self.condition is None else self.condition(embedding)
        h = activate(self.activation, self.norm_1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.norm_2(self.conv_1(h, None if self.adaptive else condition))
        if self.adaptive and condition is not None:
            scale, shift = condition[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        h = self.conv_2(self.dropout(activate(self.activation, h)))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return join(x, h, self.skip_rescale)


class SelfAttention(nn.Module):
    """Self-attention over the pixels of a picture, around a shortcut.

    Args:
        channels: of input and output.
        settings: of the network's blocks; `head_channels` divides `channels`.

    Raises:
        UserError: the heads do not come out even.
    """

    def __init__(self, channels: int, settings: BlockSettings) -> None:
        super().__init__()
        size = settings.head_channels or channels
        if channels % size:
            raise UserError(f"model.head_channels={size} does not divide {channels} channels: choose a divisor")
        self.heads = channels // size
        self.norm = settings.norm(channels)
        self.query_key_value = conv(channels, 3 * channels, 1)
        for weight in self.query_key_value.weight.detach().chunk(3):
            initialize(weight, 0.1)
        self.output = conv(channels, channels, 1, scale=settings.init_scale)
        self.skip_rescale = settings.skip_rescale

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same."""
        batch, channels, height, width = x.shape
        projected = self.query_key_value(self.norm(x)).permute(0, 2, 3, 1)
        projected = projected.reshape(batch, height * width, 3, self.heads, channels // self.heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        h = attend(query, key, value).transpose(1, 2)
        h = self.output(h.reshape(batch, height, width, channels).permute(0, 3, 1, 2))
        return join(x, h, self.skip_rescale)


_IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.SiLU: partial(F.silu, inplace=True),
    nn.ELU: partial(F.elu, inplace=True),
    nn.ReLU: partial(F.relu, inplace=True),
    nn.LeakyReLU: partial(F.leaky_relu, negative_slope=0.2, inplace=True),
}


def activate(activation: nn.Module, x: Tensor) -> Tensor:
    """`activation(x)` of an `x` that nobody else reads; in its own memory where no gradient is wanted."""
    return activation(x) if torch.is_grad_enabled() else _IN_PLACE[type(activation)](x)


def join(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    """x + h, divided by sqrt(2) if `rescale`; nobody else reads `h`, whose memory holds the sum if its type can."""
    y = h.add_(x) if h.dtype == x.dtype else x + h
    return y.mul_(math.sqrt(0.5)) if rescale else y
