"""Results as pictures: grids of samples, animations of their way from noise, scatter plots and score fields in 2-D.

Pixels are uint8 (N, C, H, W) with 1, 3 or any number of channels (of which the first is shown); points are (N, 2).
matplotlib is imported by the functions that need it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sde.denoiser import AbstractDenoiser
from sde.files import atomic_write

_MIN_SIDE = 512  # small grids are enlarged to about this many pixels


def tile(pixels: Tensor, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Pictures side by side on a dark gray ground.

    Args:
        pixels: uint8 (N, C, H, W).
        columns: pictures in a row; None makes the grid about square.
        gap: pixels between pictures.

    Returns:
        uint8 (H', W', 3).
    """
    n, c, h, w = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    shown = pixels if c == 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 40, dtype=np.uint8)
    for i, picture in enumerate(shown.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        canvas[y : y + h, x : x + w] = picture
    return canvas


def save_grid(path: Path, pixels: Tensor, columns: int | None = None) -> None:
    """Write `tile(pixels)` as a PNG, enlarged by a whole factor when it is small."""
    image = Image.fromarray(tile(pixels, columns))
    _save_png(path, _enlarge(image))


def _enlarge(image: Image.Image) -> Image.Image:
    factor = max(1, round(_MIN_SIDE / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _save_png(path: Path, image: Image.Image) -> None:
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def save_animation(path: Path, frames: Sequence[np.ndarray], seconds: float = 4.0) -> None:
    """Write frames, uint8 (H, W, 3) each, as a GIF that holds its last frame for a while."""
    images = [_enlarge(Image.fromarray(frame)) for frame in frames]
    duration = [max(20, round(1000 * seconds / len(images)))] * (len(images) - 1) + [1500]
    with atomic_write(path) as file:
        images[0].save(file, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)


def scatter(points: Tensor, data: Tensor | None = None, title: str = "", limit: float | None = None) -> np.ndarray:
    """Points (N, 2) in the plane, over points of the data in gray, as uint8 (H, W, 3)."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(5, 5), dpi=100)
    points = points[torch.isfinite(points).all(1)]
    shown = points if data is None else data
    limit = limit or max(0.1, 1.1 * float(shown.abs().max()) if len(shown) else 0.0)
    if data is not None:
        axes.scatter(*data[:5000].T.tolist(), s=2, color="0.8", label="data")
    axes.scatter(*points.T.tolist(), s=3, color="tab:blue", alpha=0.6, linewidths=0, label="samples")
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=title)
    if data is not None:
        axes.legend(loc="upper right", fontsize=8)
    return _rasterize(figure)


def save_scatter(path: Path, points: Tensor, data: Tensor | None = None, title: str = "") -> None:
    """Write `scatter` as a PNG."""
    _save_png(path, Image.fromarray(scatter(points.cpu(), data, title)))


@torch.no_grad()
def save_score_field(path: Path, denoiser: AbstractDenoiser, limit: float, device: torch.device) -> None:
    """Write the direction and size of the score in the plane at four noise levels as a PNG."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, 4, figsize=(16, 4.4), dpi=100)
    axis = torch.linspace(-limit, limit, 24)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2)
    sde = denoiser.sde
    ends = [math.log(float(sde.noise_level(t))) for t in (sde.t_min_sampling, sde.T)]
    low, high = max(ends[0], math.log(0.02)), min(ends[1], math.log(5.0))
    for panel, level in zip(panels, torch.linspace(high, low, 4).exp().tolist(), strict=True):
        t = float(sde.t_of_noise_level(level))
        alpha = float(sde.alpha(t))
        field = sde.sigma(t).item() * denoiser.score((alpha * grid).to(device), t).cpu()
        size = field.norm(dim=1)
        arrows = field / size.clamp_min(1e-9)[:, None]
        shown = panel.quiver(*grid.T.tolist(), *arrows.T.tolist(), size.tolist(), cmap="viridis", scale=30, width=0.004)
        figure.colorbar(shown, ax=panel, fraction=0.046)
        panel.set(title=f"noise level {level:.2g}: sigma |score|", aspect="equal")
    figure.tight_layout()
    _save_png(path, Image.fromarray(_rasterize(figure)))


def _pyplot():  # type: ignore[no-untyped-def]  # matplotlib's own module type
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _rasterize(figure) -> np.ndarray:  # type: ignore[no-untyped-def]
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    _pyplot().close(figure)
    buffer.seek(0)
    return np.asarray(Image.open(buffer).convert("RGB"))
