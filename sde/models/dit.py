r"""DiT, the diffusion transformer (arXiv 2212.09748): a picture as a sequence of patches, and no convolution.

A picture (B, C, H, W) is cut into n = (H/p)(W/p) patches of p x p pixels, each one token. With e the embedding of noise
level and class, norm a layer normalization without weights, and every (s, b, g) linear in e:

    h_0   = W_in patchify(x) + positions                                    (B, n, width)
    h'    = h_k + g_1 * attention((1 + s_1) * norm(h_k) + b_1)
    h_k+1 = h'  + g_2 * mlp((1 + s_2) * norm(h') + b_2),    mlp = W_b gelu(W_a .)
    y     = unpatchify(W_out((1 + s) * norm(h_depth) + b))

All (s, b, g) and W_out start at zero ("adaLN-zero"): a fresh block is the identity and a fresh network gives zero.
Positions are either added to h_0 once (`SinCosPositions`) or turn queries and keys in every block
(`RotaryPositions`). The sizes of the paper, each with patch_size 2, 4 or 8, for latents of 32x32x4:

    DiT-S     width=384  depth=12 heads=6     33 M parameters
    DiT-B     width=768  depth=12 heads=12   130 M
    DiT-L     width=1024 depth=24 heads=16   458 M
    DiT-XL    width=1152 depth=28 heads=16   675 M

Those numbers are for 1000 classes and count what is not here, the half of W_out that gives the variances of DDPM's
reverse steps: p^2 C (width + 1) parameters. The published network also counts its fixed table of positions, n vectors
of `width`. Its features of time end at a frequency of 1.07e-4 rad per step, and at 1e-4 here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sde.errors import UserError, check_choice, check_flag, check_number
from sde.models.attention import attend
from sde.models.base import check_count, check_shape, register
from sde.models.embeddings import ConditionEmbedding, SinusoidalFeatures
from sde.models.layers import linear
from sde.models.recompute import recompute as call_and_recompute

POSITIONS = ("sincos", "rotary")
TIME_FEATURES = 256  # of the paper

Rotation = tuple[Tensor, Tensor]


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Pictures (B, C, H, W) to patches (B, n, C p p), row by row; a patch holds channels, then rows, then columns."""
    batch, channels, height, width = x.shape
    cut = x.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Patches (B, n, C p p) of a `grid` of (rows, columns) to pictures (B, C, H, W): the inverse of `patchify`."""
    batch, (rows, columns), channels = len(patches), grid, patches.shape[2] // patch_size**2
    cut = patches.reshape(batch, rows, columns, channels, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(batch, channels, rows * patch_size, columns * patch_size)


def coordinates(grid: tuple[int, int], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Row and column (n,) of every patch of a `grid` of (rows, columns), row by row."""
    index = torch.arange(grid[0] * grid[1], device=device)
    return index // grid[1], index % grid[1]


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that gives exactly zero until it has learned."""
    layer = linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    return layer


def modulate(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(1 + scale) * norm(h) + shift for tokens (B, n, width), with scale and shift (B, width)."""
    normalized = F.layer_norm(h, h.shape[-1:], eps=1e-6)
    return normalized * (1 + scale[:, None]) + shift[:, None]


class SinCosPositions(nn.Module):
    """Adds a fixed vector for its position to every token: half of it for the column, half for the row.

    Each half is (sin w i, cos w i) of the coordinate i, with width/4 frequencies w = 10000^(-4k/width), k = 0, 1, ...,
    in radians per patch (arXiv 1706.03762; in two dimensions arXiv 2111.06377).

    Args:
        width: length of a token, divisible by 4.
        grid: (rows, columns) of patches.
    """

    table: Tensor

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) * 4 / width)
        rows, columns = (i[:, None] * frequencies for i in coordinates(grid))
        table = torch.cat((columns.sin(), columns.cos(), rows.sin(), rows.cos()), dim=1)
        self.register_buffer("table", table.to(torch.get_default_dtype()), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        """Tokens (B, n, width) to the same."""
        return h + self.table


class RotaryPositions(nn.Module):
    r"""The angles by which queries and keys turn, so that attention sees relative positions only (arXiv 2104.09864).

    Entries k and k + d/2 of a query or key of d entries are one pair, turned by w_k times a coordinate of its patch:
    the row for the first d/4 pairs, the column for the others. As a rotation by a and one by b leave a product that
    depends on a - b, so does attention. On both axes w_k = 100^(-4k/d) rad per patch, k = 0 ... d/4 - 1, where text has
    base 10000: a picture has fewer patches along a side than a text has words (arXiv 2403.13298).

    Args:
        head_size: d, divisible by 4.
        grid: (rows, columns) of patches.
    """

    frequencies: Tensor

    def __init__(self, head_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        frequencies = 100 ** -(torch.arange(head_size // 4, dtype=torch.float64) * 4 / head_size)
        self.register_buffer("frequencies", frequencies.to(torch.get_default_dtype()), persistent=False)

    def forward(self) -> Rotation:
        """Cosine and sine (n, head_size/2) of every pair's angle at every patch."""
        rows, columns = coordinates(self.grid, self.frequencies.device)
        angles = torch.cat((rows[:, None] * self.frequencies, columns[:, None] * self.frequencies), dim=1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """`x` (..., n, head_size) with every pair turned by its angle, in the type of the angles or a wider one."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Attention(nn.Module):
    """Self-attention of all tokens with several heads.

    Args:
        width: length of a token.
        heads: number of heads, a divisor of `width`.
        qk_norm: divide every query and key by its root mean square and multiply it by learned weights.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = linear(width, 3 * width)
        self.query_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None
        self.key_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None
        self.output = linear(width, width)

    def forward(self, h: Tensor, rotation: Rotation | None) -> Tensor:
        """Tokens (B, n, width) to the same; `rotation` turns queries and keys."""
        projected = self.query_key_value(h).unflatten(2, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        if self.query_norm is not None and self.key_norm is not None:
            exact = self.query_norm.weight.dtype  # autocast would mix types inside
            query, key = self.query_norm(query.to(exact)), self.key_norm(key.to(exact))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        h = attend(query.to(value.dtype), key.to(value.dtype), value)
        return self.output(h.transpose(1, 2).flatten(2))


class DiTBlock(nn.Module):
    """Attention, then a perceptron of one hidden layer, each scaled, shifted and gated by the embedding.

    Args:
        width: length of a token and of the embedding.
        heads: number of heads of attention.
        hidden: width of the perceptron's hidden layer.
        dropout: probability of dropping an entry of what either adds.
        qk_norm: whether attention normalizes queries and keys.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.condition = zero_linear(width, 6 * width)
        self.attention = Attention(width, heads, qk_norm)
        self.mlp = nn.Sequential(linear(width, hidden), nn.GELU(approximate="tanh"), linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, embedding: Tensor, rotation: Rotation | None) -> Tensor:
        """Tokens (B, n, width) and the activated embedding (B, width) to tokens of the same shape."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.condition(embedding).chunk(6, dim=1)
        h = h + gate_1[:, None] * self.dropout(self.attention(modulate(h, scale_1, shift_1), rotation))
        return h + gate_2[:, None] * self.dropout(self.mlp(modulate(h, scale_2, shift_2)))


class DiTHead(nn.Module):
    """From tokens to patches.

    Args:
        width: length of a token and of the embedding.
        out_features: numbers in a patch.
    """

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.condition = zero_linear(width, 2 * width)
        self.output = zero_linear(width, out_features)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Tokens (B, n, width) and the activated embedding (B, width) to (B, n, out_features)."""
        shift, scale = self.condition(embedding).chunk(2, dim=1)
        return self.output(modulate(h, scale, shift))


@register("dit")
class DiT(nn.Module):
    """The diffusion transformer (arXiv 2212.09748).

    Args:
        shape: (C, H, W) of one picture; H and W divisible by `patch_size`.
        num_classes: classes of the data, 0 for none.
        patch_size: side of a patch in pixels; half of it makes four times as many tokens.
        width: length of a token.
        depth: number of blocks.
        heads: heads of attention, a divisor of `width`.
        mlp_ratio: hidden width of the blocks' perceptrons, as a factor on `width`, above 0.
        dropout: probability of dropping an entry of what attention and perceptron add, 0 to below 1.
        positions: "sincos" adds a fixed vector for its position to every token; `width` must be divisible by 4.
            "rotary" turns queries and keys instead, so that attention knows where patches are relative to each other;
            `width / heads` must be divisible by 4.
        qk_norm: divide every query and key by its root mean square, against attention that saturates in long training
            (arXiv 2302.05442, which has layer normalization there).
        recompute: keep only each block's input for the backward pass and compute the rest again: a fraction of the
            memory for about a third more time.

    Raises:
        UserError: a setting out of range, or a shape or width that cannot be divided.
    """

    noise_label = "time"

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        patch_size: int = 4,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        positions: str = "sincos",
        qk_norm: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check_shape("dit", shape, "CHW")
        check_count("num_classes", num_classes, at_least=0)
        check_count("model.patch_size", patch_size)
        check_count("model.width", width, at_least=4)
        check_count("model.depth", depth)
        check_count("model.heads", heads)
        check_number("model.mlp_ratio", mlp_ratio, above=0)
        check_number("model.dropout", dropout, at_least=0, below=1)
        check_choice("model.positions", positions, POSITIONS)
        check_flag("model.qk_norm", qk_norm)
        check_flag("model.recompute", recompute)
        _check_width(width, heads, positions)
        self.shape = shape
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.grid = _grid(shape, patch_size)
        self.recompute = recompute
        patch = shape[0] * patch_size**2
        self.embedding = ConditionEmbedding(SinusoidalFeatures(TIME_FEATURES), width, num_classes, nn.SiLU())
        self.input = linear(patch, width)
        self.absolute = SinCosPositions(width, self.grid) if positions == "sincos" else nn.Identity()
        self.rotary = RotaryPositions(width // heads, self.grid) if positions == "rotary" else None
        hidden = max(1, round(mlp_ratio * width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads, hidden, dropout, qk_norm) for _ in range(depth))
        self.head = DiTHead(width, patch)
        for parameter in self.embedding.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """The output at pictures `x` (B, C, H, W), of their shape and type.

        Args:
            noise: (B,), 999 t / T.
            label: class labels (B,) int64, `num_classes` for "no label"; None for "no label" throughout.
        """
        embedding = self.embedding(noise, label)
        rotation = None if self.rotary is None else self.rotary()
        # under autocast too, what all blocks add up keeps the precision of x
        h = self.absolute(self.input(patchify(x, self.patch_size)).to(x.dtype))
        for block in self.blocks:
            arguments = (h, embedding, rotation)
            h = call_and_recompute(block, *arguments) if self.recompute else block(*arguments)
        return unpatchify(self.head(h, embedding), self.patch_size, self.grid).to(x.dtype)


def _check_width(width: int, heads: int, positions: str) -> None:
    """Raise `UserError` unless heads and positions can share `width` among themselves."""
    if width % heads:
        raise UserError(f"model.heads={heads} does not divide model.width={width}: choose a divisor of the width")
    if positions == "sincos" and width % 4:
        raise UserError(f"model.width={width} is not a multiple of 4, as model.positions=sincos needs it")
    if positions == "rotary" and (width // heads) % 4:
        raise UserError(
            f"model.width={width} with model.heads={heads} makes heads of {width // heads} entries, and "
            "model.positions=rotary needs a multiple of 4: change one of the two"
        )


def _grid(shape: tuple[int, ...], patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches; `UserError` when the sides cannot be divided."""
    _, height, width = shape
    if height % patch_size or width % patch_size:
        common = math.gcd(height, width)
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise UserError(
            f"pictures of {height}x{width} cannot be cut into patches of side model.patch_size={patch_size}: "
            f"it must divide both sides; choose one of {fitting}, or resize the data"
        )
    return height // patch_size, width // patch_size
