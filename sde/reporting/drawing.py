"""Charts and heat maps as SVG, as they are seen without JavaScript and until it draws them again."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from io import BytesIO

import numpy as np
from PIL import Image

from sde.reporting.axes import Axis, labels, linear_ticks, make_axis
from sde.reporting.html import Markup, element
from sde.reporting.series import Chart, Levels, Series, smoothed

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 36
COLORS = 8  # of page.css

# dark violet, blue, green, yellow: increasing in lightness, and told apart by every kind of color vision
_STOPS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)


def chart_axes(chart: Chart) -> tuple[Axis, Axis]:
    """The axes that a chart has at first."""
    values = [y for series in chart.series for y in series.y]
    zero = [0.0] if chart.zero and not chart.log else []
    x_axis = make_axis((x for series in chart.series for x in series.x), 6, pad=0.01)
    return x_axis, make_axis([*values, *zero], 5, log=chart.log, pad=0.0 if zero and not any(values) else 0.05)


def draw_chart(chart: Chart) -> Markup:
    """A chart with its axes; what it shows is said in its label."""
    x_axis, y_axis = chart_axes(chart)
    return element(
        "svg",
        frame(x_axis, y_axis, chart.x),
        *(part for series in chart.series for part in _curve(series, x_axis, y_axis)),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=describe(chart),
    )


def describe(chart: Chart) -> str:
    """A chart in words: its curves, and where they end."""
    ends = []
    for series in chart.series:
        last = next((y for y in reversed(series.y) if y is not None), None)
        ends.append(f"{series.label} {'has no finite number' if last is None else f'ends at {last:.4g}'}")
    return f"{chart.title}{f' ({chart.unit})' if chart.unit else ''} over {chart.x}: {'; '.join(ends)}"


def frame(x_axis: Axis, y_axis: Axis, x_name: str) -> Markup:
    """Grid lines, tick labels and the name of the axis below."""
    parts = []
    for tick, text in zip(y_axis.ticks, y_axis.labels, strict=True):
        y = _y(y_axis, tick)
        parts.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(element("text", text, class_="y", x=LEFT - 6, y=y, dy="0.32em"))
    for tick, text in zip(x_axis.ticks, x_axis.labels, strict=True):
        x = _x(x_axis, tick)
        parts.append(element("line", class_="grid", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM))
        parts.append(element("text", text, class_="x", x=x, y=HEIGHT - BOTTOM + 15))
    parts.append(element("text", x_name, class_="name", x=WIDTH - RIGHT, y=HEIGHT - 4))
    return element("g", *parts, class_="frame")


def _x(axis: Axis, value: float) -> float:
    return round(LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT), 1)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM), 1)


def _curve(series: Series, x_axis: Axis, y_axis: Axis) -> Iterator[Markup]:
    color = f"c{series.color % COLORS}"
    dashed = " dashed" * series.dashed
    behind = " behind" * (series.smooth or series.faint)
    yield element("path", class_=f"curve {color}{dashed}{behind}", d=path(series.x, series.y, x_axis, y_axis))
    if series.smooth:
        line = smoothed(series.mean or series.y)
        yield element("path", class_=f"curve {color}", d=path(series.x, line, x_axis, y_axis))
    for x, y in zip(series.x, series.y, strict=True):
        if y is None:
            place = _x(x_axis, x)
            bottom = HEIGHT - BOTTOM
            yield element("path", class_="bad", d=f"M{place} {bottom - 8}l4 8h-8z")
        elif (series.dashed or len(series.x) == 1) and len(series.x) <= 60 and (y > 0 or not y_axis.log):
            yield element("circle", class_=f"mark {color}{behind}", cx=_x(x_axis, x), cy=_y(y_axis, y), r=2.4)


def path(x: Sequence[float], y: Sequence[float | None], x_axis: Axis, y_axis: Axis) -> str:
    """Straight lines through the points, broken where there is none."""
    words, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if b is None or (y_axis.log and b <= 0):
            pen = "M"
        else:
            words.append(f"{pen}{_x(x_axis, a):g} {_y(y_axis, b):g}")
            pen = "L"
    return "".join(words)


# Maps over noise level and step


def draw_map(levels: Levels) -> Markup:
    """Colors over step (across) and noise level (up: less noise), logarithmic where all numbers are positive."""
    steps, rows = levels.columns()
    low, high, log = color_range(levels)
    box_height, gap = 216, 68
    width, height = 440, box_height + BOTTOM + 10
    inner = width - LEFT - gap
    span, count = steps[-1] - steps[0], len(steps)
    parts: list[Markup] = [
        element(
            "image",
            href=_picture(rows, low, high, log),
            x=LEFT, y=4, width=inner, height=box_height, preserveAspectRatio="none",
        )
    ]  # fmt: skip
    ticks = [tick for tick in linear_ticks(steps[0], steps[-1], 6) if steps[0] <= tick <= steps[-1]]
    for tick, text in zip(ticks, labels(ticks), strict=True):
        x = LEFT + inner * (0.5 + (tick - steps[0]) / span * (count - 1)) / count
        parts.append(element("text", text, class_="x", x=round(x, 1), y=box_height + 19))
    side = box_height / len(levels.centers)
    every = math.ceil(len(levels.centers) / 12)
    for k, center in enumerate(levels.centers):
        if k % every == 0:
            y = round(4 + box_height - (k + 0.5) * side, 1)
            parts.append(element("text", f"{center:g}", class_="y", x=LEFT - 6, y=y, dy="0.32em"))
    parts.append(element("text", "step", class_="name", x=LEFT + inner, y=height - 5))
    parts.append(element("text", "log SNR", class_="unit", x=2, y=height - 5))
    bar = LEFT + inner + 12
    scale = _encode(_colors(np.linspace(1, 0, 64))[:, None])
    parts.append(element("image", href=scale, x=bar, y=4, width=10, height=box_height, preserveAspectRatio="none"))
    for value, y in ((high, 13), (low, box_height + 3)):
        text = f"{value:.2g}" if abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")
        parts.append(element("text", text, class_="scale", x=bar + 14, y=y))
    return element(
        "svg", *parts, viewBox=f"0 0 {width} {height}", role="img", class_="map",
        aria_label=f"{levels.name} by log SNR over {len(levels.steps)} steps, from {low:.3g} to {high:.3g}",
    )  # fmt: skip


def color_range(levels: Levels) -> tuple[float, float, bool]:
    """(least, greatest, whether the colors are logarithmic)."""
    values = [v for row in levels.rows for v in row if v is not None and not math.isnan(v)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return low, high, low > 0


def _picture(rows: Sequence[Sequence[float | None]], low: float, high: float, log: bool) -> str:
    grid = np.array([[math.nan if v is None else v for v in row] for row in rows], dtype=float).T[::-1]
    if log:
        grid, low, high = np.log(grid), math.log(low), math.log(high)
    return _encode(_colors((grid - low) / (high - low or 1.0)))


def _colors(share: np.ndarray) -> np.ndarray:
    """Shares in [0, 1] as RGB; gray for NaN."""
    place = np.linspace(0, 1, len(_STOPS))
    known = np.nan_to_num(share)
    rgb = np.stack([np.interp(known, place, _STOPS[:, c]) for c in range(3)], axis=-1)
    rgb[np.isnan(share)] = 128
    return rgb.round().astype(np.uint8)


def _encode(rgb: np.ndarray) -> str:
    buffer = BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
