"""Axes: which range is shown, where the ticks are and what they say.

page.js has the same rules, to draw a chart again; a test holds both to the same ticks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple


class Axis(NamedTuple):
    """A range of numbers on a linear or logarithmic axis, and its ticks."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def make_axis(values: Iterable[float | None], count: int, *, log: bool = False, pad: float = 0.05) -> Axis:
    """An axis that shows all `values` (None and, where it is logarithmic, those not positive left out).

    Args:
        values: what is to be shown.
        count: about how many ticks there is room for.
        log: logarithmic.
        pad: empty share of the axis at either end.
    """
    shown = [v for v in values if v is not None and (v > 0 or not log)]
    low, high = (min(shown), max(shown)) if shown else (1.0, 10.0) if log else (0.0, 1.0)
    if log:
        if high / low < 1.0001:
            low, high = low / 1.5, high * 1.5
        room = (high / low) ** pad
        low, high = low / room, high * room
        ticks = log_ticks(low, high, count)
    else:
        if high - low <= 1e-9 * max(abs(high), abs(low)):
            room = abs(high) / 10 or 1.0
            low, high = low - room, high + room
        room = pad * (high - low)
        low, high = low - room, high + room
        ticks = linear_ticks(low, high, count)
    return Axis(low, high, log, tuple(ticks), tuple(labels(ticks)))


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about `count` of them."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= 0.8 * raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten, with their multiples by 2 and 5 where there is room; linear ticks within less than a decade."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**k for k in range(first, last + 1) for m in multiples if low <= m * 10.0**k <= high]
        if len(ticks) <= count + 1:
            break
    if len(ticks) > count + 1:
        every = math.ceil(len(ticks) / count)
        ticks = [tick for k, tick in enumerate(ticks) if k % every == 0]
    return ticks if len(ticks) >= 3 else [tick for tick in linear_ticks(low, high, count) if tick > 0]


def labels(ticks: Sequence[float]) -> list[str]:
    """What each tick says; with as many decimals as the gap to its neighbors needs."""
    gaps = [abs(b - a) for a, b in pairwise(ticks)]
    return [tick_label(tick, min(gaps[max(0, k - 1) : k + 1], default=abs(tick))) for k, tick in enumerate(ticks)]


def tick_label(value: float, gap: float) -> str:
    """`value` to the precision of `gap`: 0, 1e-4, 0.05, 120, 20k, 1.5M."""
    size = abs(value)
    if size < 1e-3 * gap:
        return "0"
    for unit, suffix, least in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if size >= least * (1 - 1e-9):
            return _fixed(value / unit, gap / unit) + suffix
    if size < 1e-3 * (1 - 1e-9):
        exponent = math.floor(math.log10(size) + 1e-9)
        return f"{_fixed(value / 10.0**exponent, gap / 10.0**exponent)}e{exponent}"
    return _fixed(value, gap)


def _fixed(value: float, gap: float) -> str:
    decimals = min(8, max(0, -math.floor(math.log10(gap) + 1e-9))) if gap > 0 else 0
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
