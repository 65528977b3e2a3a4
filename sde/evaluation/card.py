"""What an evaluation leaves: a record, a card that a person reads, and quality against cost over all of them.

evaluations/NAME.json     everything: numbers, errors, floors, what made them
evaluations/NAME.md       the card
evaluations/NAME.png      the first samples
evaluations/table.md      all evaluations of the same data, features and number of samples, side by side
evaluations/quality_cost_METRIC.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sde.evaluation.scores import table, with_error
from sde.files import write_json, write_text
from sde.pictures import CostCurve, save_cost_curves

_COMPARABLE = ("n", "features", "reference", "data")


def write_card(folder: Path, name: str, record: Mapping[str, Any]) -> Path:
    """Write NAME.json and NAME.md; gives the card's path."""
    write_json(folder / f"{name}.json", record)
    path = folder / f"{name}.md"
    write_text(path, card(name, record))
    return path


def card(name: str, record: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    lines = [f"# {name}", "", *markdown(table(record["scores"])), ""]
    lines += [
        f"Errors are standard errors: {record['errors_of']}. *Data themselves* is the same number for held-out data in "
        "place of samples, at the number of examples given: no model should be expected to be better at that number.",
        "",
    ]
    if (folder_picture := record.get("picture")) is not None:
        lines += [f"![the first samples]({folder_picture})", ""]
    lines += ["## What was evaluated", ""]
    for section in ("model", "sampling", "cost", "features", "reference", "data"):
        facts = record.get(section)
        if facts:
            lines += [f"- **{section}**: " + "; ".join(f"{key} {_short(value)}" for key, value in facts.items())]
    lines += ["", "## Model", "", *markdown(record["diagnostics"]), ""] if record.get("diagnostics") else []
    lines += ["", "Made by:", "", f"    {record['command']}", ""]
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str) if isinstance(value, Mapping | list | tuple) else str(value)
    return text if len(text) <= 200 else text[:200] + "..."


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as a Markdown table."""
    if not rows:
        return []
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All evaluations in a folder, oldest first; files that are none are left out."""
    found = []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
        try:
            record = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError):
            continue
        if isinstance(record, dict) and {"scores", "cost", *_COMPARABLE} <= record.keys():
            found.append({**record, "name": path.stem})
    return found


def write_overview(folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """table.md and the plots of quality against cost, over all evaluations that can be compared with `record`."""
    same = [r for r in read_records(folder) if all(r[key] == record[key] for key in _COMPARABLE)]
    rows = []
    for each in same:
        cost = each["cost"]
        scores = {s["label"]: with_error(s["value"], s["error"]) for s in each["scores"]}
        about = {"solver": each["sampling"].get("solver", each["name"]), "NFE": cost.get("nfe", "")}
        rows.append(about | {"ms a sample": cost.get("milliseconds_per_sample", "")} | scores)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{key: row.get(key, "") for key in columns} for row in rows]
    rows.sort(key=lambda row: (str(row["solver"]), row["NFE"] or 0))
    written = [folder / "table.md"]
    write_text(written[0], "\n".join([f"# {len(rows)} evaluations", "", *markdown(rows), ""]))
    drawn = [each for each in same if each["cost"].get("nfe")]
    for label, name in {s["label"]: f"{s['metric']}_{s['name']}" for s in record["scores"]}.items():
        curves = cost_curves(drawn, label)
        if sum(len(curve.x) for curve in curves) > 1:
            floor = next((s["floor"] for s in record["scores"] if s["label"] == label), None)
            written.append(folder / f"quality_cost_{name}.png")
            save_cost_curves(written[-1], curves, label, floor)
    return written


def cost_curves(records: Sequence[Mapping[str, Any]], label: str) -> list[CostCurve]:
    """For each solver one number over evaluations of the network, with its errors."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for record in records:
        for each in record["scores"]:
            if each["label"] == label and each["value"] is not None:
                place = (float(record["cost"]["nfe"]), each["value"], each["error"] or 0.0)
                points.setdefault(record["sampling"]["solver"], []).append(place)
    return [CostCurve(name, *map(list, zip(*sorted(found), strict=True))) for name, found in sorted(points.items())]
