r"""The U-Net of EDM2 (arXiv 2312.02696), config G: everything in it preserves magnitude.

    embedding   e = silu(sum(W_noise fourier(c), W_class one-hot(label)))
    input       3x3 convolution of x with a channel of ones, which stands for biases everywhere
    down        levels of falling resolution: the mean of 2x2 pixels, then blocks
    middle      a block with attention and one without, at the lowest resolution
    up          the same levels in rising order: every pixel four times, then blocks; each block also receives what a
                block of `down` (or `input`) gave
    output      3x3 convolution times a learned gain, which starts at 0

silu, sum, concatenation and every W are those of `sde.models.magnitude`. A block, with g a learned gain that starts at
0, is

    x <- x / |x| at every pixel, after the shortcut            on the way down
    h = W_2 dropout(silu((1 + g W_e e) W_1 silu(x)))
    y = sum(x, h),    y = sum(y, attention(y)),                x through the shortcut on the way up

where the shortcut is a 1x1 convolution if the number of channels changes. Attention divides queries, keys and values
by their magnitude ("cosine attention"), so that its logits are bounded.

The paper's networks have channel_multipliers=[1,2,3,4] blocks_per_level=3 attention_resolutions=[16,8] and, for
ImageNet-512 in latents of 64x64 (table 6; dropout as their training script has it):

    size           XS     S      M      L      XL     XXL
    channels       128    192    256    320    384    448
    parameters     125 M  280 M  498 M  777 M  1119 M 1523 M
    dropout        0      0      0.1    0.1    0.1    0.1
    lr of Adam     0.012  0.010  0.009  0.008  0.007  0.0065

They are trained with parameterization=edm, without clipping and weight decay, and with a learning rate that falls with
1 / sqrt(step): weights cannot grow here, so that nothing else makes the steps smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sde.errors import UserError, check_number
from sde.models.attention import attend
from sde.models.base import check_count, check_counts, check_shape, check_unlabeled, register
from sde.models.magnitude import (
    MPClassEmbedding,
    MPConv,
    MPFourier,
    MPLinear,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    normalize_weights,
)
from sde.models.recompute import recompute

# Names of tensors here, and those of the same tensors in the authors' checkpoints; see `EDM2.published_names`.
PUBLISHED = {
    "embedding.features.frequencies": "emb_fourier.freqs",
    "embedding.features.phases": "emb_fourier.phases",
    "embedding.noise.weight": "emb_noise.weight",
    "embedding.classes.weight": "emb_label.weight",
    "output.weight": "out_conv.weight",
    "output_gain": "out_gain",
}
PUBLISHED_IN_BLOCKS = {
    "shortcut.weight": "conv_skip.weight",
    "conv_1.weight": "conv_res0.weight",
    "condition.weight": "emb_linear.weight",
    "condition_gain": "emb_gain",
    "conv_2.weight": "conv_res1.weight",
    "attention.query_key_value.weight": "attn_qkv.weight",
    "attention.output.weight": "attn_proj.weight",
}


class CosineAttention(nn.Module):
    """Self-attention over the pixels of a picture, with queries, keys and values of magnitude 1.

    Args:
        channels: of input and output.
        head_channels: channels of one head; divides `channels`.
    """

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.query_key_value = MPConv(channels, 3 * channels, 1)
        self.output = MPConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same."""
        batch, channels, height, width = x.shape
        projected = self.query_key_value(x).permute(0, 2, 3, 1)
        number = channels // self.head_channels
        heads = projected.reshape(batch, height * width, number, self.head_channels, 3).transpose(1, 2)
        # One by one, so that each result is dense: fast attention kernels want adjacent channels.
        query, key, value = (normalize(part, (3,)) for part in heads.unbind(4))
        h = attend(query, key, value)
        return self.output(h.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2))


class Block(nn.Module):
    """A residual block with optional attention, as above.

    Args:
        in_channels: of the input, together with what the way down left.
        out_channels: of the output.
        embedding_size: length of the embedding.
        encoder: whether the block is on the way down, where the input is normalized at every pixel.
        attention: attention over pixels; None for none.
        dropout: probability of dropping an entry before the last convolution.
        residual_balance: share t of the residual branch in its sum with the shortcut.
        attention_balance: share t of attention in its sum with what it reads.
        concat_balance: share t of what the way down left.
        clip: bound on the absolute value of the output; None for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_size: int,
        encoder: bool,
        attention: CosineAttention | None,
        dropout: float,
        residual_balance: float,
        attention_balance: float,
        concat_balance: float,
        clip: float | None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.residual_balance = residual_balance
        self.attention_balance = attention_balance
        self.concat_balance = concat_balance
        self.clip = clip
        self.shortcut = nn.Identity() if in_channels == out_channels else MPConv(in_channels, out_channels, 1)
        self.conv_1 = MPConv(out_channels if encoder else in_channels, out_channels, 3)
        self.condition = MPLinear(embedding_size, out_channels)
        self.condition_gain = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = MPConv(out_channels, out_channels, 3)
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """The input, the embedding (B, embedding_size) and what the way down left to (B, out_channels, H, W)."""
        if skip is not None:
            x = mp_cat(x, skip, self.concat_balance)
        if self.encoder:
            x = normalize(self.shortcut(x), (1,))
        h = self.conv_1(mp_silu(x))
        factor = 1 + self.condition(embedding, self.condition_gain)
        h = self.conv_2(self.dropout(mp_silu(h * factor[:, :, None, None].to(h.dtype))))
        y = mp_sum(x if self.encoder else self.shortcut(x), h, self.residual_balance)
        if self.attention is not None:
            y = mp_sum(y, self.attention(y), self.attention_balance)
        return y if self.clip is None else y.clamp(-self.clip, self.clip)


def run(block: nn.Module, again: bool, *args: Tensor) -> Tensor:
    """`block(*args)`, computed again in the backward pass if `again`."""
    return recompute(block, *args) if again else block(*args)


class DownLevel(nn.Module):
    """One resolution on the way down.

    Args:
        entry: the block after the picture was halved; none at the highest resolution, where it is not.
        blocks: the blocks that follow.
        recompute: compute activations again in the backward pass.
    """

    def __init__(self, entry: Sequence[Block], blocks: Sequence[Block], *, recompute: bool) -> None:
        super().__init__()
        self.entry = nn.ModuleList(entry)
        self.blocks = nn.ModuleList(blocks)
        self.recompute = recompute

    def forward(self, h: Tensor, embedding: Tensor) -> list[Tensor]:
        """What comes from above to what every block gives, the last of which goes on down."""
        outputs = []
        if len(self.entry):
            h = F.avg_pool2d(h, 2, ceil_mode=True)
        for block in (*self.entry, *self.blocks):
            h = run(block, self.recompute, h, embedding)
            outputs.append(h)
        return outputs


class UpLevel(nn.Module):
    """One resolution on the way up.

    Args:
        entry: blocks that what comes from below passes first.
        blocks: blocks each of which also sees what the way down left.
        grow: whether what comes from below is smaller.
        recompute: compute activations again in the backward pass.
    """

    def __init__(self, entry: Sequence[Block], blocks: Sequence[Block], *, grow: bool, recompute: bool) -> None:
        super().__init__()
        self.entry = nn.ModuleList(entry)
        self.blocks = nn.ModuleList(blocks)
        self.grow = grow
        self.recompute = recompute

    def forward(self, h: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        """What comes from below to what goes on up; takes its part of `skips`."""
        if self.grow:
            height, width = skips[-1].shape[2:]
            h = F.interpolate(h, scale_factor=2, mode="nearest")[:, :, :height, :width]
        for block in self.entry:
            h = run(block, self.recompute, h, embedding)
        for block in self.blocks:
            h = run(block, self.recompute, h, embedding, skips.pop())
        return h


class Embedding(nn.Module):
    """Noise label and class label as one vector.

    Args:
        features: number of Fourier features of the noise label.
        size: length of the vector.
        num_classes: number of classes; 0 for none.
        fourier_scale: standard deviation of the Fourier frequencies.
        label_balance: share t of the class in its sum with the noise level.
    """

    def __init__(self, features: int, size: int, num_classes: int, fourier_scale: float, label_balance: float) -> None:
        super().__init__()
        self.features = MPFourier(features, fourier_scale)
        self.noise = MPLinear(features, size)
        self.classes = MPClassEmbedding(num_classes, size) if num_classes else None
        self.label_balance = label_balance

    def forward(self, noise: Tensor, label: Tensor | None) -> Tensor:
        """Noise labels (B,) and class labels (B,) to (B, size).

        Raises:
            UserError: class labels for a network without classes.
        """
        e = self.noise(self.features(noise).to(self.noise.weight.dtype))
        if self.classes is not None:
            e = mp_sum(e, self.classes(label), self.label_balance)
        else:
            check_unlabeled(label)
        return mp_silu(e)


@register("edm2")
class EDM2(nn.Module):
    """The U-Net of EDM2 (arXiv 2312.02696).

    In training mode every call first puts the weights back onto the sphere, in place and outside of compiled graphs, of
    which there is a new one from there on. In evaluation mode, as copies with averaged weights are, nothing changes.

    Args:
        shape: (C, H, W) of one picture, of any size. Where a side is odd, the last row or column is halved alone.
        num_classes: classes of the data, 0 for none.
        channels: channels of the first level before its factor.
        channel_multipliers: factor on `channels` for each level, highest resolution first.
        blocks_per_level: residual blocks of a level on the way down; one more on the way up.
        attention_resolutions: longer sides in pixels of the levels whose blocks have attention; the middle always has.
        head_channels: channels of one head of attention; divides the channels of every level that has attention.
        dropout: probability of dropping an entry inside residual blocks, 0 to below 1.
        residual_balance: share t of the residual branch in its sum with the shortcut, 0 to 1.
        attention_balance: share t of attention in its sum with what it reads, 0 to 1.
        label_balance: share t of the class in its sum with the noise level, 0 to 1.
        concat_balance: share t of what the way down left in what blocks on the way up see, 0 to 1.
        fourier_scale: standard deviation of the Fourier frequencies, in cycles per unit of the noise label
            log(sigma / alpha) / 4, which runs from about -1.7 to 1.3 for common SDEs.
        clip: bound on the absolute value of what a block gives, which keeps float16 finite; None for none.
        recompute_levels: highest levels whose activations are computed again in the backward pass, not kept; 0 to the
            number of levels.

    Raises:
        UserError: a setting out of range, data that are not pictures, or channels that heads do not divide.
    """

    noise_label = "log_sigma"

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        channels: int = 64,
        channel_multipliers: Sequence[int] = (1, 2, 2),
        blocks_per_level: int = 2,
        attention_resolutions: Sequence[int] = (16, 8),
        head_channels: int = 64,
        dropout: float = 0.0,
        residual_balance: float = 0.3,
        attention_balance: float = 0.3,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        fourier_scale: float = 1.0,
        clip: float | None = 256.0,
        recompute_levels: int = 0,
    ) -> None:
        super().__init__()
        check_shape("edm2", shape, "CHW")
        check_count("num_classes", num_classes, at_least=0)
        check_count("model.channels", channels)
        multipliers = check_counts("model.channel_multipliers", channel_multipliers)
        if not multipliers:
            raise UserError("model.channel_multipliers is empty: give one factor for each level, such as [1, 2, 2]")
        self.blocks_per_level = check_count("model.blocks_per_level", blocks_per_level)
        check_number("model.dropout", dropout, at_least=0, below=1)
        balances: dict[str, Any] = {
            "residual_balance": residual_balance,
            "attention_balance": attention_balance,
            "concat_balance": concat_balance,
        }
        for name, balance in (balances | {"label_balance": label_balance}).items():
            check_number(f"model.{name}", balance, at_least=0, at_most=1)
        check_number("model.fourier_scale", fourier_scale, above=0)
        if clip is not None:
            check_number("model.clip", clip, above=0)
        self.shape = shape
        self.num_classes = num_classes
        self.attention_resolutions = check_counts("model.attention_resolutions", attention_resolutions)
        self.head_channels = check_count("model.head_channels", head_channels)
        self.recompute_levels = check_count("model.recompute_levels", recompute_levels, 0, len(multipliers))
        widths = [channels * multiplier for multiplier in multipliers]
        self.embedding = Embedding(widths[0], max(widths), num_classes, fourier_scale, label_balance)
        self.block_settings = {"embedding_size": max(widths), "dropout": dropout, "clip": clip} | balances
        self._make_levels(widths)

    def _make_levels(self, widths: Sequence[int]) -> None:
        """The modules from input to output; `skips` holds the channels of what the way down leaves for the way up."""
        attention = [side in self.attention_resolutions for side in self._sides(len(widths))]
        lowest = len(widths) - 1
        again = [i < self.recompute_levels for i in range(len(widths))]
        self.input = MPConv(self.shape[0] + 1, widths[0], 3)
        self.down = nn.ModuleList()
        skips = [widths[0]]
        for i, width in enumerate(widths):
            entry = [self._block(skips[-1], skips[-1], encoder=True)] if i > 0 else []
            skips += [skips[-1]] * len(entry)
            blocks = []
            for _ in range(self.blocks_per_level):
                blocks.append(self._block(skips[-1], width, encoder=True, attention=attention[i]))
                skips.append(width)
            self.down.append(DownLevel(entry, blocks, recompute=again[i]))
        h = widths[-1]
        self.up = nn.ModuleList()
        for i in reversed(range(len(widths))):
            entry = [self._block(h, h, attention=i == lowest)]
            entry += [self._block(h, h)] if i == lowest else []
            blocks = []
            for _ in range(self.blocks_per_level + 1):
                blocks.append(self._block(h + skips.pop(), widths[i], attention=attention[i]))
                h = widths[i]
            self.up.append(UpLevel(entry, blocks, grow=i < lowest, recompute=again[i]))
        assert not skips
        self.output = MPConv(h, self.shape[0], 3)
        self.output_gain = nn.Parameter(torch.zeros(()))

    def _sides(self, levels: int) -> list[int]:
        """The longer side of each level in pixels."""
        return [-(-max(self.shape[1:]) // 2**i) for i in range(levels)]

    def _block(self, in_channels: int, out_channels: int, *, encoder: bool = False, attention: bool = False) -> Block:
        """A block; `UserError` when heads do not divide the channels of its attention."""
        if attention and out_channels % self.head_channels:
            raise UserError(
                f"heads of model.head_channels={self.head_channels} do not divide the {out_channels} channels "
                "of a level with attention: choose a divisor, or other model.channels"
            )
        reader = CosineAttention(out_channels, self.head_channels) if attention else None
        return Block(in_channels, out_channels, encoder=encoder, attention=reader, **self.block_settings)

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """The output at pictures `x` (B, C, H, W), of their shape and type.

        Args:
            noise: (B,), log(sigma / alpha) / 4.
            label: class labels (B,) int64, `num_classes` for "no label"; None for "no label" throughout.
        """
        if self.training:
            normalize_weights(self)
        return self.evaluate(x, noise, label)

    def evaluate(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """`forward` with the weights as they are: one graph without breaks, in training too."""
        embedding = self.embedding(noise, label)
        h = self.input(torch.cat((x, torch.ones_like(x[:, :1])), dim=1))
        skips = [h]
        for level in self.down:
            skips.extend(level(skips[-1], embedding))
        h = skips[-1]
        for level in self.up:
            h = level(h, skips, embedding)
        return self.output(h, self.output_gain).to(x.dtype)

    def published_names(self) -> dict[str, str]:
        """The name in `state_dict()` of each tensor, and its name in the `unet` of the authors' checkpoints.

        The tensors are the same in shape and order of entries, except `embedding.classes.weight`, which has a column
        more, for "no label". Filled with the magnitude of its row it leaves the rest of the function as it is.
        """
        sizes = [f"{side}x{side}" for side in self._sides(len(self.down))]
        lowest = len(sizes) - 1
        blocks: dict[str, str] = {}
        for i, size in enumerate(sizes):
            down, up = f"down.{i}", f"up.{lowest - i}"
            blocks |= {f"{down}.entry.0": f"enc.{size}_down", f"{up}.entry.0": f"dec.{size}_up"}
            if i == lowest:
                blocks |= {f"{up}.entry.{j}": f"dec.{size}_in{j}" for j in range(2)}
            for j in range(self.blocks_per_level + 1):
                blocks |= {f"{down}.blocks.{j}": f"enc.{size}_block{j}", f"{up}.blocks.{j}": f"dec.{size}_block{j}"}
        names = PUBLISHED | {"input.weight": f"enc.{sizes[0]}_conv.weight"}
        for ours, theirs in blocks.items():
            names |= {f"{ours}.{one}": f"{theirs}.{other}" for one, other in PUBLISHED_IN_BLOCKS.items()}
        return {name: names[name] for name in self.state_dict()}
