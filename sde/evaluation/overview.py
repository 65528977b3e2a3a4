"""All evaluations of a folder that can be compared, side by side: a table, and quality against cost.

evaluations/table.md      evaluations of the same data, features and number of samples
evaluations/quality_cost_METRIC.png

A row is a way of drawing: a model, a solver, steps, seeds. A column is a number of a metric; the same number under
other options of its metric is a column of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sde.evaluation.card import comparable, identity, markdown, read_record, short
from sde.evaluation.scores import with_error
from sde.files import write_text
from sde.pictures import CostCurve, save_cost_curves

_FACTS = ("solver", "grid", "denoise", "noise", "label", "precision")
Record = Mapping[str, Any]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All evaluations in a folder, oldest first; files that are none are left out."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    return [{**record, "name": path.stem} for path in paths if (record := read_record(path)) is not None]


def write_overview(folder: Path, record: Record) -> list[Path]:
    """table.md and the plots of quality against cost, over all evaluations that can be compared with `record`."""
    same = [r for r in read_records(folder) if comparable(r) == comparable(record)]
    names, columns = names_of(same), columns_of(same)
    written = [folder / "table.md"]
    write_text(written[0], "\n".join([f"# {_counted(len(same))}", "", *markdown(overview(same, names, columns)), ""]))
    own = next(c for r, c in zip(same, columns, strict=True) if identity(r) == identity(record))
    shown = [s for s in record["scores"] if s["better"] != ""]  # spreads of subsets are no quality
    for score in shown:
        label = own[score["label"]]
        curves = cost_curves(same, names, columns, label)
        if sum(len(curve.x) for curve in curves) > 1:
            fewer = "" if score.get("n") in (None, record["n"]) else f"_{score['n']}"
            place = f"{score['metric']}_{score['name']}{fewer}{label.removeprefix(score['label'])}"
            plain = "".join(c if c.isalnum() or c in "_.-" else "_" for c in place.rstrip(")"))
            written.append(folder / f"quality_cost_{plain}.png")
            save_cost_curves(written[-1], curves, label, score["floor"] if _level(score) else None)
    return written


def _counted(count: int) -> str:
    return "1 evaluation" if count == 1 else f"{count} evaluations"


def columns_of(records: Sequence[Record]) -> list[dict[str, str]]:
    """For each evaluation the columns that its numbers stand in, by their labels.

    That is the label, and behind it the options of the metric that are not the same in all evaluations that have it.
    """
    columns = []
    for record in records:
        found = {}
        for score in record["scores"]:
            of = [r["metrics"].get(score["metric"], {}) for r in records if score["label"] in _labels(r)]
            own = record["metrics"].get(score["metric"], {})
            differing = [key for key in own if any(other.get(key) != own[key] for other in of)]
            options = ", ".join(f"{key} {short(own[key])}" for key in differing)
            found[score["label"]] = score["label"] + (f" ({options})" if options else "")
        columns.append(found)
    return columns


def _labels(record: Record) -> set[str]:
    return {score["label"] for score in record["scores"]}


def overview(
    records: Sequence[Record], names: Sequence[str], columns: Sequence[Mapping[str, str]]
) -> list[dict[str, str]]:
    """A row for each way of drawing: its cost and all its numbers, of whichever evaluations."""
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for record, name, column in zip(records, names, columns, strict=True):
        cost, seeds = record["cost"], tuple(record["sampling"].get("seeds", [0]))
        row = rows.setdefault((name, cost.get("nfe") or 0, len(seeds), seeds), {})
        row |= {"samples of": name, "NFE": _number(cost.get("nfe"))}
        row |= {"ms a sample": _number(cost.get("milliseconds_per_sample")), "sets": str(len(seeds))}
        row |= {column[s["label"]]: with_error(s["value"], s["error"]) for s in record["scores"]}
    for (name, nfe, _, seeds), row in rows.items():
        if sum(other[:2] == (name, nfe) for other in rows) > 1:
            row["sets"] += f" (seeds {short(list(seeds))})"
    found = list(dict.fromkeys(key for row in rows.values() for key in row))
    floors = {
        column[s["label"]]: with_error(s["floor"], s["floor_error"])
        for record, column in zip(records, columns, strict=True)
        for s in record["scores"]
        if _level(s)
    }
    last = [{"samples of": "data themselves", **floors}] if floors else []
    return [{key: row.get(key, "") for key in found} for row in [*(rows[place] for place in sorted(rows)), *last]]


def _level(score: Record) -> bool:
    """Whether the floor of a number is of as many examples as the number itself, so that the two can be compared."""
    return score["floor"] is not None and score["value_at_floor_n"] is None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def names_of(records: Sequence[Record]) -> list[str]:
    """A name for each: its solver, and whatever else differs between those of the same solver besides the steps."""
    known = [_facts(record) for record in records]
    differing = [
        key
        for key in dict.fromkeys(key for facts in known for key in facts)
        if any(
            key in a and a["solver"] == b["solver"] and a.get(key) != b.get(key)
            for a, b in itertools.permutations(known, 2)
        )
    ]
    if len({str(facts["sde"]) for facts in known}) == len({str(facts["run"]) for facts in known}):
        differing = [key for key in differing if key != "run"]  # the SDE tells runs apart
    names = []
    for facts in known:
        rest = [_fact(key, facts[key]) for key in differing if key in facts and facts[key] is not None]
        names.append(" ".join([*[word for word in rest if word == facts["sde"]], str(facts["solver"])]))
        names[-1] += "".join(f", {word}" for word in rest if word != facts["sde"])
    names = _told_apart(names, [record["model"].get("hash") for record in records], "weights")
    return _told_apart(names, [record["sampling"].get("digest") for record in records], "content")


def _told_apart(names: Sequence[str], hashes: Sequence[str | None], what: str) -> list[str]:
    """The names, with the beginning of a hash where the same name stands for several."""
    several = {name for name in names if len({h for n, h in zip(names, hashes, strict=True) if n == name}) > 1}
    return [
        f"{name}, {what} {hash_[:8]}" if name in several and hash_ else name
        for name, hash_ in zip(names, hashes, strict=True)
    ]


def _facts(record: Record) -> dict[str, Any]:
    model, sampling = record["model"], record["sampling"]
    facts = {"sde": model["sde"], "run": Path(model["run"]).name, "step": model["step"], "weights": model["weights"]}
    facts |= {key: sampling[key] for key in _FACTS if key in sampling}
    facts["solver"] = sampling.get("solver", sampling.get("samples"))
    return facts | {key: value for key, value in sampling.get("options", {}).items() if key != "compile"}


def _fact(key: str, value: Any) -> str:
    return str(value) if key in ("sde", "run") else f"{key} {short(value)}"


def cost_curves(
    records: Sequence[Record], names: Sequence[str], columns: Sequence[Mapping[str, str]], label: str
) -> list[CostCurve]:
    """For each way one column over evaluations of the network, with its errors; the newest of each place."""
    points: dict[str, dict[float, tuple[float, float]]] = {}
    for record, name, column in zip(records, names, columns, strict=True):
        for each in record["scores"]:
            if column[each["label"]] == label and each["value"] is not None and record["cost"].get("nfe"):
                found = points.setdefault(name, {})
                found[float(record["cost"]["nfe"])] = (each["value"], each["error"] or 0.0)
    curves = []
    for name, found in sorted(points.items()):
        values = [found[nfe] for nfe in sorted(found)]
        curves.append(CostCurve(name, sorted(found), [v for v, _ in values], [e for _, e in values]))
    return curves
