"""Metrics of a model's samples: values, how sure they are, and what they would be for data themselves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sde.errors import UserError
from sde.metrics import Metric, Sets

_NAMES = {"inception": "", "dinov2": "DINOv2"}  # of features, in the names of numbers


@dataclass(frozen=True)
class Floor:
    """Held-out data in place of samples, and as many samples beside them.

    Args:
        data: the held-out data as what is generated, n of them.
        sets: the sets of samples, n of each; None where they are no more than that already.
    """

    data: Sets
    sets: Sequence[Sets] | None = None


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
        better: "lower", "higher", the number that is best, or "" of what is no measure of quality.
        floor: the same number for held-out examples of the data in place of samples, or None.
        floor_error: its standard error.
        floor_n: how many those were.
        value_at_floor_n: the value of that many samples only, where there are more; or None.
        error_at_floor_n: its standard error.
        n: samples of a set that it is of; the metric may have drawn them from more.
        reference_n: examples of the data that it is of.
        error_from: where its standard error comes from: "spread over 3 sets, 2 degrees of freedom", "jackknife over 10
            groups"; empty where there is none.
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
    value_at_floor_n: float | None = None
    error_at_floor_n: float | None = None
    n: int | None = None
    reference_n: int | None = None
    error_from: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; null for numbers that it lacks."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def score(
    name: str, metric: Metric, sets: Sequence[Sets], features: str, floor: Floor | None = None, groups: int = 10
) -> list[Scored]:
    """All numbers of a metric.

    Args:
        name: of the metric.
        metric: it.
        sets: one for each set of samples.
        features: what the features are called.
        floor: held-out data in place of samples; None where there are none.
        groups: of the jackknife.

    Raises:
        UserError: the samples are too few, or do not fit. Held-out data that are too few make no floor.
    """
    values, errors = _measure(metric, sets, groups)
    several = f"spread over {len(sets)} sets, {len(sets) - 1} degree{'s' * (len(sets) > 2)} of freedom"
    error_from = several if len(sets) > 1 else metric.error_from(sets[0], groups)
    floors: tuple[list[dict[str, float]], dict[str, float]] | None = None
    fewer: tuple[list[dict[str, float]], dict[str, float]] | None = None
    if floor is not None:
        try:
            floors = _measure(metric, [floor.data], groups)
            unlike = floor.sets is not None and metric.used(floor.sets[0])[0] < metric.used(sets[0])[0]
            fewer = _measure(metric, floor.sets, groups) if floor.sets is not None and unlike else None
        except UserError:
            floors = fewer = None
    n, reference_n = metric.used(sets[0])
    found = []
    for key in values[0]:
        scored = Scored(
            metric=name,
            name=key,
            label=label_of(metric, key, features, n),
            value=statistics.fmean(value[key] for value in values),
            error=errors[key],
            by_set=tuple(value[key] for value in values),
            better=metric.better[key],
            floor=floors[0][0][key] if floors else None,
            floor_error=floors[1][key] if floors else None,
            floor_n=metric.used(floor.data)[0] if floors and floor else None,
            value_at_floor_n=statistics.fmean(value[key] for value in fewer[0]) if fewer else None,
            error_at_floor_n=fewer[1][key] if fewer else None,
            n=n,
            reference_n=reference_n or None,  # none where statistics take the place of examples
            error_from=error_from if errors[key] else "",
        )
        found.append(scored)
    return found


def _measure(metric: Metric, sets: Sequence[Sets], groups: int) -> tuple[list[dict[str, float]], dict[str, float]]:
    """The numbers of each set, and the standard errors of their means."""
    if len(sets) == 1:
        value, errors = metric.with_errors(sets[0].shuffled(groups), groups)
        return [value], errors
    values = [metric(each.shuffled(groups)) for each in sets]
    return values, {key: statistics.stdev(value[key] for value in values) / math.sqrt(len(values)) for key in values[0]}


def label_of(metric: Metric, key: str, features: str, n: int) -> str:
    """A number's name with the features and the number of samples that belong to it: FID-50k, FD-random-1k, SWD-500."""
    label = metric.labels[key]
    if metric.of != "examples":
        if features == "inception" and label.startswith("FD"):
            label = "FID" + label[2:]
        name = _NAMES.get(features, features)
        label = f"{label}-{name}" if name else label
    return f"{label}-{thousands(n)}"


def thousands(n: int) -> str:
    """10k for 10000, 500 for 500."""
    return f"{n // 1000}k" if n >= 1000 and n % 1000 == 0 else str(n)


def table(scores: Sequence[Scored | Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows of a table: label, value with its error, that of data, and which way is better."""
    rows = []
    for each in scores:
        row = each.to_dict() if isinstance(each, Scored) else each
        data = "" if row["floor"] is None else f"{with_error(row['floor'], row['floor_error'])} (n = {row['floor_n']})"
        fewer = row.get("value_at_floor_n")
        better = row["better"] if isinstance(row["better"], str) else f"near {row['better']:g}"
        found = {"metric": row["label"], "value": with_error(row["value"], row["error"]), "data themselves": data}
        found["value at their n"] = "" if fewer is None else with_error(fewer, row["error_at_floor_n"])
        rows.append(found | {"better": better})
    if not any(row["value at their n"] for row in rows):
        for row in rows:
            del row["value at their n"]
    return rows


def with_error(value: float | None, error: float | None) -> str:
    """A value and its standard error to the error's second digit."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if error is None or not math.isfinite(error) or error == 0:
        return f"{value:.4g}"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 12)
    return f"{value:.{digits}f} +- {error:.{digits}f}"
