r"""3x3 convolutions on a CPU with a quarter of the multiplications: Winograd's minimal filtering F(4x4, 3x3).

A tile d of 6x6 pixels gives 4x4 pixels of the output y with kernel g (Lavin & Gray, arXiv 1509.09308, section 4):

    y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A

The products in brackets are elementwise in the tile and sums over channels: 36 matrix products of (tiles x channels)
and (channels x outputs), in place of 16 * 9 multiplications per channel and output. The three transforms are
matrix products too, so that all of the work is done by the matrix library; gradients are their exact adjoints. Tiles
are worked on in portions that stay in the processor's cache, and in memory that is kept from call to call: fresh
memory costs more than the arithmetic.

The transforms interpolate at the points 0, +-5/8, +-3/2 and infinity. With them the rounding error is less than half of
that at the customary 0, +-1, +-2 (on such choices: arXiv 1803.10986): about 1e-6 in float32, where a plain convolution
has 5e-7. The points are binary fractions, so that the tables below are exact to float64.

On two cores with AVX-512 it is 1.5 to 2.3 times as fast as the plain convolution from 96 channels on. Fewer channels or
tiles, other types and devices take the plain one; so does a graph that torch.compile makes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sde.devices import multiplies_bfloat16

TILE, KERNEL = 4, 3  # pixels of the output that a tile gives, taps of the kernel, along either axis
WINDOW = TILE + KERNEL - 1
POINTS = (0.0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)
PORTION = 5 * 2**19  # numbers in the transformed tiles of a portion

# Below these a plain convolution is faster, as measured on two cores with AVX-512.
LEAST_CHANNELS = 96
LEAST_TILES = 32


def interpolation_matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A^T (4, 6), G (6, 3) and B^T (6, 6) in float64, for one axis: correlate(d, g) = A^T ((G g) * (B^T d)).

    Row i of G evaluates a polynomial at point i, row i of B^T is the i-th Lagrange numerator. Row i of G is multiplied
    by a power of two and row i of B^T divided by it, so that their sizes are alike.
    """
    points = np.array(POINTS)
    others = [np.delete(points, i) for i in range(len(points))]
    G = np.zeros((WINDOW, KERNEL))
    A = np.zeros((WINDOW, TILE))
    B = np.zeros((WINDOW, WINDOW))
    for i, (point, rest) in enumerate(zip(points, others, strict=True)):
        G[i] = point ** np.arange(KERNEL) / np.prod(point - rest)
        A[i] = point ** np.arange(TILE)
        B[i, : WINDOW - 1] = np.poly(rest)[::-1]
    G[-1, -1] = A[-1, -1] = 1
    B[-1] = np.poly(points)[::-1]
    scale = 2.0 ** np.round(0.5 * np.log2(np.abs(B).sum(1) / np.abs(G).sum(1)))
    return A.T, G * scale[:, None], B / scale[:, None]


@lru_cache(maxsize=8)
def transforms(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A^T . A (16, 36), G . G^T (36, 9) and B^T . B (36, 36) as matrices that act on flattened tiles."""
    with torch.inference_mode(False):
        A, G, B = (torch.from_numpy(np.kron(m, m)).to(dtype) for m in interpolation_matrices())
    return A, G, B


def portions(batch: int, rows: int, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Images and rows of tiles to work on at a time, where a row of tiles has `numbers` numbers after its transform."""
    fitting = max(1, PORTION // numbers)
    images = _even(batch, max(1, fitting // rows))
    rows_at_once = _even(rows, min(rows, fitting))
    for i in range(0, batch, images):
        for r in range(0, rows, rows_at_once):
            yield slice(i, min(i + images, batch)), slice(r, min(r + rows_at_once, rows))


def _even(count: int, most: int) -> int:
    """The size of as few and as equal portions of `count` as there are with at most `most` in each."""
    return -(-count // -(-count // most))


class Workspace(threading.local):
    """Memory of one thread for intermediate results, by name; it grows to the largest that was asked for."""

    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """An uninitialized tensor of `shape`, valid until the name is asked for again."""
        size = math.prod(shape)
        known = self.memory.get((name, dtype))
        if known is None or len(known) < size:
            with torch.inference_mode(False):
                known = self.memory[name, dtype] = torch.empty(size, dtype=dtype)
        return known[:size].view(shape)


workspace = Workspace()


def windows_of(x: Tensor) -> Tensor:
    """(B, H, W, C) to a view (B, H / 4, W / 4, 6, 6, C) of its overlapping windows, with zeros around the picture."""
    batch, height, width, channels = x.shape
    padded = workspace("padded", x.dtype, batch, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1] = x
    padded[:, :: height + 1] = 0
    padded[:, :, :: width + 1] = 0
    b, h, w, c = padded.stride()
    shape = (batch, height // TILE, width // TILE, WINDOW, WINDOW, channels)
    return padded.as_strided(shape, (b, TILE * h, TILE * w, h, w, c))


def add_windows(tiles: Tensor, windows: Tensor, images: slice, rows: slice) -> None:
    """The adjoint of `windows_of` for a portion: add `windows` (6, 6, B, R, W / 4, C) to the `tiles` of all pictures.

    A window is a tile and one pixel of its neighbors all around. These pixels are handed to the neighbors' windows,
    first sideways, then up and down, and what is within tiles then is the sum. `windows` are used up. The tiles may be
    uninitialized if `rows` are all rows.
    """
    windows[:, 4, :, :, :-1] += windows[:, 0, :, :, 1:]
    windows[:, 1, :, :, 1:] += windows[:, 5, :, :, :-1]
    windows = windows[:, 1:5]
    windows[4, :, :, :-1] += windows[0, :, :, 1:]
    windows[1, :, :, 1:] += windows[5, :, :, :-1]
    if rows.stop - rows.start == tiles.shape[3]:
        tiles[:, :, images] = windows[1:5]
        return
    tiles[:, :, images, rows] += windows[1:5]
    if rows.start > 0:
        tiles[3, :, images, rows.start - 1] += windows[0, :, :, 0]
    if rows.stop < tiles.shape[3]:
        tiles[0, :, images, rows.stop] += windows[5, :, :, -1]


def tiles_of(y: Tensor) -> Tensor:
    """(B, H, W, C) to a view (4, 4, B, H / 4, W / 4, C) of its tiles."""
    batch, height, width, channels = y.shape
    return y.view(batch, height // TILE, TILE, width // TILE, TILE, channels).permute(2, 4, 0, 1, 3, 5)


def transform_weight(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) to (O, 36, C), without a copy of it when it is channels-last."""
    outputs, channels = weight.shape[:2]
    rows = weight.permute(0, 2, 3, 1).reshape(outputs, KERNEL * KERNEL, channels)
    matrix = transforms(weight.dtype)[1].expand(outputs, -1, -1)
    kernels = workspace("kernels", weight.dtype, outputs, WINDOW * WINDOW, channels)
    return torch.bmm(matrix, rows, out=kernels)


def transform_windows(windows: Tensor) -> Tensor:
    """Windows (B, R, W / 4, 6, 6, C) to (36, tiles, C)."""
    tiles, channels = math.prod(windows.shape[:3]), windows.shape[-1]
    rows = workspace("windows", windows.dtype, tiles, WINDOW * WINDOW, channels)
    rows.view(windows.shape).copy_(windows)
    matrix = transforms(windows.dtype)[2].expand(tiles, -1, -1)
    return torch.bmm(matrix, rows, out=workspace("transformed", rows.dtype, *rows.shape)).transpose(0, 1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, C, H, W), channels-last, with kernels (O, C, 3, 3) and zeros around, plus `bias`: (B, O, H, W)."""
    batch, channels, height, width = x.shape
    outputs = len(weight)
    A = transforms(x.dtype)[0]
    kernels = transform_weight(weight).permute(1, 2, 0)
    windows = windows_of(x.permute(0, 2, 3, 1))
    y = torch.empty_like(x[:, :1].expand(-1, outputs, -1, -1), memory_format=torch.channels_last)
    tiles = tiles_of(y.permute(0, 2, 3, 1))
    for images, rows in portions(batch, height // TILE, width // TILE * WINDOW**2 * max(channels, outputs)):
        target = tiles[:, :, images, rows]
        factor = transform_windows(windows[images, rows])
        products = workspace("products", x.dtype, WINDOW * WINDOW, factor.shape[1], outputs)
        torch.bmm(factor, kernels, out=products)
        result = workspace("tiles", x.dtype, TILE * TILE, factor.shape[1] * outputs)
        torch.mm(A, products.view(WINDOW * WINDOW, -1), out=result)
        if bias is None:
            target.copy_(result.view(target.shape))
        else:
            torch.add(result.view(target.shape), bias if bias.ndim == 1 else bias[images, None, None], out=target)
    return y


def convolve_backward(
    dy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `x` and of `weight`, None for the one that is not asked for; `dy` and `x` channels-last."""
    batch, channels, height, width = x.shape
    outputs = len(weight)
    A = transforms(x.dtype)[0]
    dtiles = tiles_of(dy.permute(0, 2, 3, 1))
    strips = list(portions(batch, height // TILE, width // TILE * WINDOW**2 * max(channels, outputs)))
    kernels = transform_weight(weight).transpose(0, 1) if of_x else None
    windows = windows_of(x.permute(0, 2, 3, 1)) if of_weight else None
    dx: Tensor | None = None
    if of_x:
        new = torch.empty_like if strips[0][1].stop == height // TILE else torch.zeros_like
        dx = new(x, memory_format=torch.channels_last)
    dkernels = workspace("dkernels", x.dtype, WINDOW * WINDOW, outputs, channels) if of_weight else None
    for images, rows in strips:
        part = dtiles[:, :, images, rows]
        tiles = workspace("tiles", x.dtype, *part.shape)
        tiles.copy_(part)
        count = math.prod(part.shape[2:5])
        products = workspace("products", x.dtype, WINDOW * WINDOW, count, outputs)
        torch.mm(A.t(), tiles.view(TILE * TILE, -1), out=products.view(WINDOW * WINDOW, -1))
        if windows is not None and dkernels is not None:
            first = (images, rows) == strips[0]
            torch.baddbmm(
                dkernels,
                products.transpose(1, 2),
                transform_windows(windows[images, rows]),
                beta=0 if first else 1,
                out=dkernels,
            )
        if dx is not None and kernels is not None:
            _add_dx(tiles_of(dx.permute(0, 2, 3, 1)), products, kernels, images, rows)
    return dx, None if dkernels is None else _from_kernels(dkernels)


def _add_dx(dx: Tensor, products: Tensor, kernels: Tensor, images: slice, rows: slice) -> None:
    """What the transformed dy (36, tiles, O) of a portion contributes to the tiles of dx."""
    count, channels = products.shape[1], kernels.shape[2]
    transformed = workspace("transformed", dx.dtype, WINDOW * WINDOW, count, channels)
    torch.bmm(products, kernels, out=transformed)
    windows = workspace("windows", dx.dtype, WINDOW * WINDOW, count * channels)
    torch.mm(transforms(dx.dtype)[2].t(), transformed.view(WINDOW * WINDOW, -1), out=windows)
    add_windows(dx, windows.view(WINDOW, WINDOW, *dx[0, 0, images, rows].shape), images, rows)


def _from_kernels(dkernels: Tensor) -> Tensor:
    """The gradient of the transformed kernels (36, O, C) to that of the weight (O, C, 3, 3), channels-last."""
    outputs, channels = dkernels.shape[1:]
    rows = torch.matmul(transforms(dkernels.dtype)[1].t(), dkernels.transpose(0, 1))
    return rows.view(outputs, KERNEL, KERNEL, channels).permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class WinogradConvolution(torch.autograd.Function):
    """`F.conv2d(x, weight, padding=1) + bias` with its first derivatives in Winograd's form.

    Derivatives of derivatives and forward-mode derivatives are those of the plain convolution.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x` (B, C, H, W), `weight` (O, C, 3, 3), `bias` (O,), (B, O) or None to (B, O, H, W)."""
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        ctx.axes = (0, 2, 3) if bias is None or bias.ndim == 1 else (2, 3)
        return convolve(_channels_last(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: the plain convolution's backward can be differentiated
            dx, dweight, _ = torch.ops.aten.convolution_backward(
                dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [of_x, of_weight, False]
            )
        else:
            dx, dweight = convolve_backward(_channels_last(dy), _channels_last(x), weight, of_x, of_weight)
        return dx, dweight, dy.sum(ctx.axes) if of_bias else None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> Tensor:
        """The derivative of the result along a direction."""
        x, weight = ctx.saved_tensors
        dy = x.new_zeros(()) if dbias is None else dbias[..., None, None]
        if dx is not None:
            dy = dy + F.conv2d(dx, weight, padding=1)
        if dweight is not None:
            dy = dy + F.conv2d(x, dweight, padding=1)
        return dy


def suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `WinogradConvolution` works for this input and is the faster way.

    What does not fit together takes the plain way too, which says so.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if x.device.type != "cpu" or x.dtype is not torch.float32 or weight.dtype is not torch.float32:
        return False
    if x.ndim != 4 or weight.shape[1:] != (x.shape[1], KERNEL, KERNEL):
        return False
    if bias is not None and bias.shape not in (weight.shape[:1], (len(x), len(weight))):
        return False
    batch, channels, height, width = x.shape
    if height % TILE or width % TILE or batch * height * width < LEAST_TILES * TILE**2:
        return False
    return min(channels, len(weight)) >= LEAST_CHANNELS


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution with 3x3 kernels and a border of zeros, in the faster way.

    Under bfloat16 autocast on a CPU that has no units for it, this computes in float32 and gives bfloat16.

    Args:
        x: (B, C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,), or (B, O) for one that differs from example to example.

    Returns:
        (B, O, H, W).
    """
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        if multiplies_bfloat16():
            return _plain(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            y = conv3x3(x.float(), weight.float(), None if bias is None else bias.float())
        return y.to(torch.get_autocast_dtype("cpu"))
    return WinogradConvolution.apply(x, weight, bias) if suits(x, weight, bias) else _plain(x, weight, bias)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None or bias.ndim == 1:
        return F.conv2d(x, weight, bias, padding=1)
    y = F.conv2d(x, weight, padding=1)
    return y + bias[:, :, None, None].to(y.dtype)
