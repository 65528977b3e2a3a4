"""From lines of metrics to charts.

`train/x` and `val/x` share the chart x; any other name has one of its own, so that whatever a run records is shown.
Numbers by noise level, `name/log_snr=<center>`, become curves over log SNR and a map over noise level and step.

A curve of more than `LIMIT` points is thinned to the least and the greatest of each of equal stretches, so that no
spike is lost, and keeps the stretch's mean for the smoothed line. That line is a mean with weights exp(-|i - j| / tau)
over the points i, tau being a share of their number: it has no lag, and thinning does not change it much.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sde.reporting.record import Record

LIMIT = 2000  # points of a curve
SMOOTHING = 0.02  # share of the run
CLOCK = 500  # points that tell the seconds of a step
COLUMNS = 240  # of a map

_AT_LEVEL = "/log_snr="
_LEVEL = re.compile(rf"(.+){_AT_LEVEL}([-+]?[\d.]+(?:[eE][-+]?\d+)?)")
_KNOWN = {  # title, unit
    "loss": ("Loss", ""),
    "gradient_norm": ("Gradient norm", ""),
    "lr": ("Learning rate", ""),
    "pictures_per_second": ("Throughput", "pictures/s"),
    "memory_gib": ("Peak memory", "GiB"),
    "skipped": ("Skipped steps", "since the beginning"),
    "epoch": ("Epochs", ""),
    "eps_mse": ("Error of predicted noise", "mean square"),
    "bits_per_dim": ("Bits per dimension", "bits/dim"),
    "log_prob": ("Log-density", "nats"),
}
_EXACT = {"lr", "memory_gib", "skipped", "epoch"}  # no noise to smooth away
_FROM_ZERO = {"pictures_per_second", "memory_gib", "skipped", "epoch"}
_NOT_CHARTED = ("/n", "/standard_error")

Curve = tuple[str, int, list[float], list[float | None]]  # label, number of the run, steps, values


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        label: what the legend says.
        x: increasing.
        y: values; None where one was no finite number.
        mean: of the stretch around each point, where the curve was thinned.
        run: number of the run it belongs to.
        color: number of its color.
        dashed: drawn so, with a mark at each point.
        faint: in the background.
        smooth: drawn again as a smoothed line.
    """

    label: str
    x: list[float]
    y: list[float | None]
    mean: list[float | None] | None = None
    run: int = 0
    color: int = 0
    dashed: bool = False
    faint: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves on one pair of axes.

    Args:
        key: what the page's address calls it.
        title: above it.
        unit: of y.
        x: what is along the axis: "step" or something else.
        series: its curves.
        log: whether y is logarithmic at first.
        zero: whether a linear y begins at 0.
    """

    key: str
    title: str
    unit: str
    x: str
    series: list[Series]
    log: bool = False
    zero: bool = False

    @property
    def positive(self) -> bool:
        """Whether there is anything for a logarithmic axis to show."""
        return any(y is not None and y > 0 for series in self.series for y in series.y)


@dataclass
class Levels:
    """Numbers by noise level over a run: `rows[k][j]` is that of step `steps[k]` at log SNR `centers[j]`.

    It is None where nothing was recorded, for want of examples at that level, and nan for what was not finite.
    """

    name: str
    run: int
    centers: list[float]
    steps: list[int] = field(default_factory=list)
    rows: list[list[float | None]] = field(default_factory=list)

    def columns(self, count: int = COLUMNS) -> tuple[list[int], list[list[float | None]]]:
        """Steps and values of at most `count` columns, evenly spaced over the steps, each the one nearest to it."""
        if len(self.steps) <= 1:
            return self.steps, self.rows
        gap = min(b - a for a, b in pairwise(self.steps))
        span = self.steps[-1] - self.steps[0]
        count = min(count, span // max(1, gap) + 1)
        chosen, k = [], 0
        for j in range(count):
            wanted = self.steps[0] + span * j / (count - 1)
            while k + 1 < len(self.steps) and abs(self.steps[k + 1] - wanted) <= abs(self.steps[k] - wanted):
                k += 1
            chosen.append(k)
        return [self.steps[k] for k in chosen], [self.rows[k] for k in chosen]


# Thinning, smoothing


def thin(
    x: Sequence[float], y: Sequence[float | None], limit: int = LIMIT
) -> tuple[list[float], list[float | None], list[float | None] | None]:
    """At most `limit` points (x, y, mean) of a curve: the first, the last, and each stretch's least and greatest.

    A stretch that has a None keeps one of those too. A curve that is short enough comes back as it is, without means.
    """
    n = len(x)
    if n <= limit:
        return list(x), list(y), None
    stretches = (limit - 2) // (3 if None in y else 2)
    kept: list[int] = []
    means: dict[int, float | None] = {}
    for s in range(stretches):
        inside = range(s * n // stretches, (s + 1) * n // stretches)
        finite = [(value, i) for i in inside if (value := y[i]) is not None]
        chosen = {min(finite)[1], max(finite)[1]} if finite else set()
        if len(finite) < len(inside):
            chosen.add(next(i for i in inside if y[i] is None))
        chosen |= {0} & set(inside) | {n - 1} & set(inside)
        mean = sum(value for value, _ in finite) / len(finite) if finite else None
        kept += sorted(chosen)
        means |= dict.fromkeys(chosen, mean)
    return [x[i] for i in kept], [y[i] for i in kept], [None if y[i] is None else means[i] for i in kept]


def smoothed(values: Sequence[float | None], share: float = SMOOTHING) -> list[float | None]:
    """Means with weights exp(-|i - j| / tau), tau = `share` of the number of values; None stays and weighs nothing."""
    if share <= 0:
        return list(values)
    decay = math.exp(-1 / (share * max(1, len(values))))
    total, weight = [0.0] * len(values), [0.0] * len(values)
    for order in (range(len(values)), range(len(values) - 1, -1, -1)):
        sums = weights = 0.0
        for i in order:
            value = values[i]
            total[i] += decay * sums
            weight[i] += decay * weights
            sums = decay * sums + (value or 0.0)
            weights = decay * weights + (value is not None)
    return [None if value is None else (total[i] + value) / (weight[i] + 1) for i, value in enumerate(values)]


def clock(record: Record) -> dict[str, list[float]]:
    """Steps and the seconds trained by then, at points that lie along the run."""
    lines = record.training
    every = max(1, math.ceil(len(lines) / CLOCK))
    chosen = lines[::every] + (lines[-1:] if (len(lines) - 1) % every else [])
    return {"step": [line["step"] for line in chosen], "seconds": [round(float(line["seconds"]), 1) for line in chosen]}


# Charts


def charts(records: Sequence[Record]) -> list[Chart]:
    """What training recorded, over its steps; the best-known names first."""
    found: dict[str, list[Curve]] = {}
    for number, record in enumerate(records):
        for name, (x, y) in columns(record.training).items():
            split, _, rest = name.partition("/")
            key, label = (rest, split) if split in ("train", "val") else (name, rest.rpartition("/")[2] or name)
            found.setdefault(key, []).append((label, number, x, y))
    order = {key: k for k, key in enumerate(_KNOWN)}
    return [_chart(key, found[key], records) for key in sorted(found, key=lambda key: (order.get(key, 99), key))]


def evaluation_charts(records: Sequence[Record]) -> list[Chart]:
    """What later evaluations recorded, one curve for each kind of evaluation, where there are several steps."""
    found: dict[str, list[Curve]] = {}
    for number, record in enumerate(records):
        kinds: dict[str, list[Mapping[str, Any]]] = {}
        for line in record.evaluations:
            kinds.setdefault(kind_of(line), []).append(line)
        for kind, lines in kinds.items():
            for name, (x, y) in columns(lines).items():
                if not name.endswith(_NOT_CHARTED):
                    found.setdefault(name, []).append((kind or name.rpartition("/")[2], number, x, y))
    several = {key: curves for key, curves in found.items() if len({x for curve in curves for x in curve[2]}) > 1}
    return [_chart(key, several[key], records) for key in sorted(several)]


def _chart(key: str, curves: list[Curve], records: Sequence[Record]) -> Chart:
    base = key.rpartition("/")[2]
    title, unit = _KNOWN.get(base, (base.replace("_", " "), ""))
    if "/" in key:
        title = f"{title} ({key.rpartition('/')[0]})"
    curves = sorted(curves, key=lambda curve: curve[1])
    series: list[Series] = []
    for label, run, x, y in curves:
        position = sum(s.run == run for s in series)  # among those of its run
        several = len(records) > 1
        series.append(
            Series(
                f"{records[run].name} {label}" if several else label,
                *thin(x, y),
                run=run,
                color=run if several else position,
                dashed=label != "train" and (several or len(curves) > 1 or len(x) < 50),
                smooth=base not in _EXACT and label == "train" and len(x) > 20,
            )
        )
    values = [v for curve in curves for v in curve[3] if v is not None]
    wide = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
    return Chart(key, title, unit, "step", series, wide and base not in _EXACT | _FROM_ZERO, base in _FROM_ZERO)


def columns(lines: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float | None]]]:
    """The steps and values of each name without a noise level; where a step was done twice, the later line counts."""
    found: dict[str, tuple[list[float], list[float | None]]] = {}
    for line in lines:
        step = line["step"]
        for name, value in line.items():
            if name in ("step", "seconds") or _AT_LEVEL in name or not (value is None or type(value) in (int, float)):
                continue
            x, y = found.setdefault(name, ([], []))
            if x and x[-1] == step:
                y[-1] = value
            else:
                x.append(step)
                y.append(value)
    return found


def kind_of(line: Mapping[str, Any]) -> str:
    """The words of an evaluation's line that say what was evaluated, and not where it lies."""
    return ", ".join(str(v) for v in line.values() if isinstance(v, str) and "/" not in v and "\\" not in v)


# By noise level


def read_levels(record: Record, run: int) -> list[Levels]:
    """The numbers by noise level of a run, one object for each name."""
    values: dict[str, dict[int, dict[float, float]]] = {}
    known: dict[str, tuple[str, float] | None] = {}
    for line in record.lines:
        for name, value in line.items():
            if name not in known:
                match = _LEVEL.fullmatch(name)
                known[name] = (match[1], float(match[2])) if match else None
            place = known[name]
            if place is not None and (value is None or type(value) in (int, float)):
                row = values.setdefault(place[0], {}).setdefault(line["step"], {})
                row[place[1]] = math.nan if value is None else value
    found = []
    for name, by_step in sorted(values.items()):
        levels = Levels(name, run, sorted({center for row in by_step.values() for center in row}))
        for step, row in by_step.items():
            levels.steps.append(step)
            levels.rows.append([row.get(center) for center in levels.centers])
        found.append(levels)
    return found


def level_charts(families: Sequence[Levels], records: Sequence[Record]) -> list[Chart]:
    """The newest numbers over log SNR, one chart for each quantity; those of the beginning and the middle faintly."""
    several = len(records) > 1
    names = {levels.name for levels in families}
    found: dict[str, list[Series]] = {}
    for levels in families:
        split, _, quantity = levels.name.partition("/")
        series = found.setdefault(quantity or split, [])
        last = len(levels.steps) - 1
        background = split == "val" or f"val/{quantity}" not in names  # one of the two is enough
        early = (0, last // 2) if background and not several and last >= 2 else ()
        position = levels.run if several else int(split != "train")
        for k in (*early, last):
            label = f"{records[levels.run].name} {split}" if several else split
            recorded = [(c, v) for c, v in zip(levels.centers, levels.rows[k], strict=True) if v is not None]
            series.append(
                Series(
                    f"{label}, step {levels.steps[k]}",
                    [center for center, _ in recorded],
                    [None if math.isnan(value) else value for _, value in recorded],
                    run=levels.run,
                    color=position,
                    dashed=split != "train" or k != last,
                    faint=k != last,
                )
            )
    result = []
    for quantity, series in found.items():
        title, unit = _KNOWN.get(quantity, (quantity.replace("_", " "), ""))
        values = [v for s in series for v in s.y if v is not None]
        log = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
        result.append(Chart(f"level-{quantity}", f"{title} by noise level", unit, "log SNR", series, log))
    return result
