"""Metrics of a model's samples: values, how sure they are, and what they would be for data themselves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sde.metrics import Metric, Sets


@dataclass(frozen=True)
class Scored:
    """One number of a metric.

    Args:
        metric: name of the metric.
        name: of the number, unique within the metric.
        label: what a table calls it: metric, features and number of samples, "FD-classifier-10k".
        value: mean over the sets of samples.
        error: its standard error: of the mean over several sets, or by the jackknife over the examples of one.
        by_set: the value of each set.
        better: "lower", "higher", or the number that is best.
        floor: the same number for as many held-out examples of the data in place of samples, or None.
        floor_error: its standard error.
        floor_n: how many those were.
    """

    metric: str
    name: str
    label: str
    value: float
    error: float
    by_set: tuple[float, ...]
    better: str | float
    floor: float | None = None
    floor_error: float | None = None
    floor_n: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; null for numbers that it lacks."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def score(
    name: str, metric: Metric, sets: Sequence[Sets], features: str, floor: Sets | None = None, groups: int = 10
) -> list[Scored]:
    """All numbers of a metric.

    Args:
        name: of the metric.
        metric: it.
        sets: one for each set of samples.
        features: what the features are called.
        floor: held-out data in place of samples; None where there are none.
        groups: of the jackknife.
    """
    values = [metric(each) for each in sets]
    errors = metric.errors(sets[0], groups) if len(sets) == 1 else None
    floors = metric(floor) if floor is not None else None
    floor_errors = metric.errors(floor, groups) if floor is not None else None
    found = []
    for key in values[0]:
        by_set = tuple(value[key] for value in values)
        error = errors[key] if errors else statistics.stdev(by_set) / math.sqrt(len(by_set))
        found.append(
            Scored(
                metric=name,
                name=key,
                label=label_of(metric, key, features, len(sets[0].generated)),
                value=statistics.fmean(by_set),
                error=error,
                by_set=by_set,
                better=metric.better[key],
                floor=None if floors is None else floors[key],
                floor_error=None if floor_errors is None else floor_errors[key],
                floor_n=None if floor is None else len(floor.generated),
            )
        )
    return found


def label_of(metric: Metric, key: str, features: str, n: int) -> str:
    """A number's name with the features and the number of samples that belong to it: FID-50k, FD-random-1k, SWD-500."""
    label = metric.labels[key]
    if metric.of == "features" and features == "inception":
        label = label.replace("FD", "FID")
    elif metric.of != "examples":
        label = f"{label}-{features}"
    return f"{label}-{thousands(n)}"


def thousands(n: int) -> str:
    """10k for 10000, 500 for 500."""
    return f"{n // 1000}k" if n >= 1000 and n % 1000 == 0 else str(n)


def table(scores: Sequence[Scored | Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows of a table: label, value with its error, floor, and which way is better."""
    rows = []
    for each in scores:
        row = each.to_dict() if isinstance(each, Scored) else each
        floor = "" if row["floor"] is None else f"{with_error(row['floor'], row['floor_error'])} (n = {row['floor_n']})"
        better = row["better"] if isinstance(row["better"], str) else f"near {row['better']:g}"
        value = with_error(row["value"], row["error"])
        rows.append({"metric": row["label"], "value": value, "data themselves": floor, "better": better})
    return rows


def with_error(value: float | None, error: float | None) -> str:
    """A value and its standard error to the error's second digit."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if error is None or not math.isfinite(error) or error == 0:
        return f"{value:.4g}"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 12)
    return f"{value:.{digits}f} +- {error:.{digits}f}"
