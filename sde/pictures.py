"""Results as pictures: grids of samples, animations of their way from noise, scatter plots and score fields in 2-D,
rows of samples with captions, error against cost, and likelihoods.

Pixels are uint8 (N, C, H, W) with 1, 3 or any number of channels (of which the first is shown); points are (N, 2).
matplotlib is imported by the functions that need it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sde.denoiser import AbstractDenoiser
from sde.files import atomic_write

_MIN_SIDE = 512  # small grids are enlarged to about this many pixels
_NAMED = 10  # paths; a longer legend would hide them


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


def save_rows(path: Path, rows: Sequence[tuple[str, Tensor]], side: int = 48) -> None:
    """Write rows of pictures, each with its caption on the left, as a PNG.

    Args:
        path: the file.
        rows: (caption, pixels uint8 (N, C, H, W)); a caption may have several lines.
        side: pictures are enlarged by a whole factor to at least about this many pixels.
    """
    strips = [Image.fromarray(tile(pixels, columns=len(pixels))) for _, pixels in rows]
    factor = max(1, round(side / rows[0][1].shape[-2]))
    strips = [s.resize((s.width * factor, s.height * factor), Image.Resampling.NEAREST) for s in strips]
    font = ImageFont.load_default(size=13)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [measure.multiline_textbbox((0, 0), caption, font=font) for caption, _ in rows]
    margin = math.ceil(max(box[2] for box in boxes)) + 16
    heights = [max(s.height, math.ceil(box[3]) + 8) for s, box in zip(strips, boxes, strict=True)]
    canvas = Image.new("RGB", (margin + max(s.width for s in strips), sum(heights)), "white")
    draw, y = ImageDraw.Draw(canvas), 0
    for (caption, _), strip, box, height in zip(rows, strips, boxes, heights, strict=True):
        draw.multiline_text((8, y + (height - box[3]) / 2), caption, fill="black", font=font)
        canvas.paste(strip, (margin, y + (height - strip.height) // 2))
        y += height
    _save_png(path, canvas)


def save_captioned(path: Path, rows: Sequence[tuple[str, Tensor, Sequence[str]]], side: int = 64) -> None:
    """Write rows of pictures, each row under its title and each picture above its own caption, as a PNG.

    Args:
        path: the file.
        rows: (title, pixels uint8 (N, C, H, W), a caption for each).
        side: pictures are enlarged by a whole factor to at least about this many pixels.
    """
    font, gap, line = ImageFont.load_default(size=12), 6, 16
    height, width = rows[0][1].shape[-2:]
    factor = max(1, round(side / height))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    wide = max(measure.textlength(caption, font=font) for _, _, captions in rows for caption in captions)
    cell = max(width * factor, math.ceil(wide)) + gap
    row_height = line + height * factor + line + gap
    columns = max(len(pixels) for _, pixels, _ in rows)
    title = max(measure.textlength(text, font=font) for text, _, _ in rows)
    canvas = Image.new("RGB", (max(gap + columns * cell, math.ceil(title) + 2 * gap), len(rows) * row_height), "white")
    draw = ImageDraw.Draw(canvas)
    for r, (text, pixels, captions) in enumerate(rows):
        top = r * row_height
        draw.text((gap, top + 2), text, fill="black", font=font)
        for k, caption in enumerate(captions):
            left = gap + k * cell
            image = Image.fromarray(tile(pixels[k : k + 1], gap=0))
            image = image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
            canvas.paste(image, (left, top + line))
            draw.text((left, top + line + height * factor), caption, fill="black", font=font)
    _save_png(path, canvas)


def save_histogram(path: Path, values: Tensor, title: str, x_label: str) -> None:
    """Write a histogram of `values` (N,), those that are finite, with a line at their mean, as a PNG."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
    values = values[torch.isfinite(values)].double().cpu()
    if len(values):
        axes.hist(values.numpy(), bins=max(10, min(80, math.ceil(2 * len(values) ** 0.5))), color="tab:blue", alpha=0.8)
        mean = float(values.mean())
        axes.axvline(mean, color="black", lw=1.2, label=f"mean {mean:.4g}")
        axes.legend()
    axes.set(title=title, xlabel=x_label, ylabel="pictures")
    axes.title.set_fontsize(10)
    figure.tight_layout()
    _save_png(path, Image.fromarray(_rasterize(figure)).quantize(128))


def save_terms(path: Path, times: Sequence[float], terms: Sequence[float], errors: Sequence[float], title: str) -> None:
    """Write terms of a bound, with bands of one standard error, against the logarithm of time, as a PNG."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
    low, high = ([x + sign * e for x, e in zip(terms, errors, strict=True)] for sign in (-1, 1))
    axes.plot(times, terms, color="tab:blue", lw=1.2, marker="." if len(terms) <= 200 else None)
    axes.fill_between(times, low, high, color="tab:blue", alpha=0.25, lw=0)
    axes.set(xscale="log", xlabel="t", ylabel="bits/dim", title=title)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    _save_png(path, Image.fromarray(_rasterize(figure)).quantize(128))


def save_density(path: Path, log_density: Tensor, limit: float, title: str, points: Tensor | None = None) -> None:
    """Write a density on the square [-limit, limit]^2 as a PNG, with points of the data on the right.

    Args:
        path: the file.
        log_density: (side, side) in nats, rows from below along the second coordinate.
        limit: half the side of the square.
        title: above the density.
        points: (N, 2) data, shown beside it.
    """
    plt = _pyplot()
    figure, panels = plt.subplots(1, 1 if points is None else 2, figsize=(5.4 if points is None else 10, 4.6), dpi=110)
    axes = panels if points is None else panels[0]
    edges = (-limit, limit, -limit, limit)
    shown = axes.imshow(log_density.exp().cpu().numpy(), origin="lower", extent=edges, cmap="viridis")
    figure.colorbar(shown, ax=axes, fraction=0.046)
    axes.set(title=title, aspect="equal")
    if points is not None:
        panels[1].scatter(*points[:5000].cpu().T.tolist(), s=2, color="0.3", linewidths=0)
        panels[1].set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title="data")
    figure.tight_layout()
    _save_png(path, Image.fromarray(_rasterize(figure)))


def save_panels(path: Path, panels: Sequence[tuple[str, Tensor]], columns: int) -> None:
    """Write panels of points (N, 2) in the plane with captions, `columns` in a row and all to one scale, as a PNG."""
    plt = _pyplot()
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.9 * columns, 3.2 * rows), dpi=100, squeeze=False)
    reach = [float(p[torch.isfinite(p).all(1)].abs().quantile(0.99)) for _, p in panels if torch.isfinite(p).any()]
    limit = max(0.1, 1.2 * sorted(reach)[len(reach) // 2]) if reach else 1.0  # one that fails must not set the scale
    for ax in axes.flat:
        ax.axis("off")
    for ax, (caption, points) in zip(axes.flat, panels, strict=False):
        ax.axis("on")
        ax.scatter(*points[torch.isfinite(points).all(1)].T.tolist(), s=3, color="tab:blue", alpha=0.6, linewidths=0)
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
        ax.set_title(caption, fontsize=8)
    figure.tight_layout()
    _save_png(path, Image.fromarray(_rasterize(figure)))


class Path2D(NamedTuple):
    """One panel of `save_paths`: `paths`, (K, 2) points each, over points `ground` (N, 2) in gray."""

    title: str
    ground: Tensor
    paths: Sequence[Tensor]


def save_paths(path: Path, panels: Sequence[Path2D], names: Sequence[str]) -> None:
    """Write paths in the plane, one color and name for each, side by side in `panels` of their own scales, as a PNG."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 5.3), dpi=100, squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=True):
        ground = panel.ground[torch.isfinite(panel.ground).all(1)]
        reach = [float(points.abs().max()) for points in panel.paths]
        limit = 1.1 * max(0.1, *reach, *([float(ground.abs().quantile(0.99))] if len(ground) else []))
        ax.scatter(*ground.T.tolist(), s=3, color="0.8", linewidths=0)
        for name, points in zip(names, panel.paths, strict=True):
            ax.plot(*points.T.tolist(), marker="o", ms=3, lw=1, label=name)
        ax.set(title=panel.title, aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit))
    if len(names) <= _NAMED:
        axes.flat[0].legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    _save_png(path, Image.fromarray(_rasterize(figure)))


class Curve(NamedTuple):
    """One line of `save_curves`: `y` over `x`, both positive; in gray and without a label unless `shown`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    shown: bool = True
    dashed: bool = False


def save_curves(
    path: Path, curves: Sequence[Curve], title: str, y_label: str, floor: tuple[str, float] | None = None
) -> None:
    """Write error against evaluations, log-log with each shown curve named at its end, as a PNG.

    Args:
        path: the file.
        curves: any number; points that are not finite and positive are left out.
        title: above the plot.
        y_label: what the error is.
        floor: (what it is, error) of a dashed line below which errors tell nothing.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 6), dpi=110)
    axes.set(xscale="log", yscale="log", xlabel="NFE (network evaluations)", ylabel=y_label, title=title)
    colors = [*plt.get_cmap("tab10").colors, "black", "navy", "darkgreen", "maroon"]
    ends: list[tuple[float, float, str, object]] = []
    for curve in sorted(curves, key=lambda curve: curve.shown):
        points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if y > 0 and math.isfinite(y)]
        if not points:
            continue
        color = colors[len(ends) % len(colors)] if curve.shown else (0.82, 0.82, 0.82)
        width, size = (1.6, 3.5) if curve.shown else (0.8, 0)
        style = {"color": color, "lw": width, "ls": "--" if curve.dashed else "-", "zorder": 2 + curve.shown}
        axes.plot(*zip(*points, strict=True), marker="o", ms=size, **style)
        if curve.shown:
            ends.append((*points[-1], curve.name, color))
    if floor is not None:
        axes.axhline(floor[1], color="0.4", lw=1, ls="--")
        axes.annotate(floor[0], (0.01, floor[1]), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    ticks = _far_apart(sorted({x for curve in curves for x in curve.x}))
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.25)
    _label_ends(axes, ends)
    figure.tight_layout()
    _save_png(path, Image.fromarray(_rasterize(figure)).quantize(128))  # a palette: a quarter of the size


class CostCurve(NamedTuple):
    """One curve of `save_cost_curves`: values and their standard errors over numbers of evaluations."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float]


def save_cost_curves(path: Path, curves: Sequence[CostCurve], y_label: str, floor: float | None = None) -> None:
    """Write a number against network evaluations, with error bars, as a PNG.

    Args:
        path: the file.
        curves: one for each solver.
        y_label: what the number is.
        floor: the number that data themselves have, a dashed line.
    """
    plt = _pyplot()
    many = len(curves) > 6
    figure, axes = plt.subplots(figsize=(10 if many else 8, 5), dpi=100)
    axes.set(xscale="log", xlabel="NFE (network evaluations)", ylabel=y_label)
    for curve, (color, style) in zip(curves, _styles([curve.name for curve in curves]), strict=True):
        axes.errorbar(curve.x, curve.y, curve.error, color=color, ms=4, capsize=2, label=curve.name, **style)
    values = [y for curve in curves for y in curve.y]
    positive = [y for y in values if y > 0]
    if positive and max(positive) > 20 * min(positive):
        if min(values) > 0:
            axes.set_yscale("log")
        else:  # linear about 0, below the smallest number that is above it by more than its error
            sure = [y for curve in curves for y, error in zip(curve.y, curve.error, strict=True) if y > 2 * error]
            axes.set_yscale("symlog", linthresh=min(sure or positive))
    if floor is not None and not (axes.get_yscale() == "log" and floor <= 0):
        axes.axhline(floor, color="0.4", lw=1, ls="--", label="data themselves")
    ticks = _far_apart(sorted({x for curve in curves for x in curve.x}))
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, **({"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {}))
    figure.tight_layout()
    _save_png(path, Image.fromarray(_rasterize(figure)).quantize(128))


def _styles(names: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Color and line of each curve: "VP heun" has the color of heun and the line of VP, unless colors are enough."""
    heads = [name.split(",")[0].split()[-1] for name in names]
    rests = [name.replace(head, "", 1) for name, head in zip(names, heads, strict=True)]
    if len(names) <= 6 or len({*heads}) == 1:
        heads, rests = list(names), [""] * len(names)
    colors, lines = (list(dict.fromkeys(x)) for x in (heads, rests))
    shapes = [("o", "-"), ("s", "--"), ("^", ":"), ("D", "-.")]
    styles = []
    for head, rest in zip(heads, rests, strict=True):
        turn = colors.index(head) // 10 + lines.index(rest)
        marker, line = shapes[turn % len(shapes)]
        styles.append((f"C{colors.index(head) % 10}", {"marker": marker, "ls": line}))
    return styles


class Line(NamedTuple):
    """One line of `save_lines`: `y` over `x`, with the standard errors of `y` as bars where they are given."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    error: Sequence[float] | None = None


def save_lines(
    path: Path, pairs: Sequence[Sequence[Line]], title: str, x_label: str, y_label: str, log_y: bool = False
) -> None:
    """Write pairs of lines that are to be compared, both of a pair in one color, as a PNG.

    Args:
        path: the file.
        pairs: any number of them.
        title: above the plot.
        x_label: what x is.
        y_label: what y is.
        log_y: a logarithmic axis for y.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), dpi=100)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    for k, pair in enumerate(pairs):
        for line in pair:
            style = {"color": f"C{k % 10}", "lw": 1.4, "ls": "--" if line.dashed else "-", "label": line.name}
            axes.errorbar(line.x, line.y, line.error, capsize=0 if line.error is None else 2, **style)
    if log_y:
        axes.set_yscale("log")
    if 2 * len(pairs) <= _NAMED:
        axes.legend(loc="best", fontsize=8)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    _save_png(path, Image.fromarray(_rasterize(figure)))


def _label_ends(axes, ends: Sequence[tuple[float, float, str, object]]) -> None:  # type: ignore[no-untyped-def]
    """Names right of the axes at the heights of the curves' ends, moved apart where they would overlap."""
    bottom, top = (math.log(y) for y in axes.get_ylim())
    ends = sorted(ends, key=lambda end: end[1])
    places = _spread([(math.log(y) - bottom) / (top - bottom) for _, y, _, _ in ends], 0.036)
    for (x, y, name, color), place in zip(ends, places, strict=True):
        axes.annotate(
            name, (x, y), xytext=(1.03, place), textcoords="axes fraction", va="center", fontsize=9, color=color,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "ls": ":", "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Increasing `places` moved as little as possible (in squares) until neighbors are `gap` apart."""
    groups: list[tuple[int, float]] = []  # size, and the mean of the places less the gaps before them
    for i, place in enumerate(places):
        size, mean = 1, place - i * gap
        while groups and groups[-1][1] > mean:
            other, above = groups.pop()
            size, mean = size + other, (size * mean + other * above) / (size + other)
        groups.append((size, mean))
    levels = [mean for size, mean in groups for _ in range(size)]
    return [level + i * gap for i, level in enumerate(levels)]


def _far_apart(values: Sequence[float]) -> list[float]:
    """Those of the increasing `values` whose labels do not touch on a logarithmic axis, the last one among them."""
    kept: list[float] = []
    span = math.log(values[-1] / values[0]) if len(values) > 1 else 1.0
    for value in reversed(values):
        if not kept or math.log(kept[-1] / value) > 0.045 * span:
            kept.append(value)
    return kept


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
