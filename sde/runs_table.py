"""`python -m sde.runs`: lists runs, compares their configurations, and prunes (`sde.runs_prune`).

The list reads configurations and records and opens no checkpoint. `compare=` shows what differs, in one column a run.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sde.cli import run_command
from sde.errors import UserError, check_choice, check_flag, check_number, suggest
from sde.runs_prune import prune
from sde.runs_summary import (
    STATES,
    Metric,
    Summary,
    Value,
    find_runs,
    matching,
    named_run,
    readable_age,
    readable_bytes,
    readable_time,
)

FORMATS = ("table", "json", "csv")
SORTS: dict[str, Callable[[Summary], Any]] = {  # the first comes first; what a run has not, comes last
    "age": lambda run: run.age,
    "name": lambda run: run.name,
    "state": lambda run: STATES.index(run.state),
    "step": lambda run: -run.step,
    "time": lambda run: _or_last(None if run.seconds is None else -run.seconds),
    "best": lambda run: _rank(run, run.best),
    "last": lambda run: _rank(run, run.last),
    "size": lambda run: -run.size,
}
_DROPPED = ("data", "model", "sde", "age", "last", "time", "size")  # in a narrow terminal, one after the other
_NARROW = 24  # characters of a name that are always shown


def main() -> None:
    """Entry point of the command line."""
    run_command("runs", runs)


def runs(config: dict[str, Any]) -> None:
    """List, compare or prune the runs below `config["runs"]`."""
    check_options(config)
    root = Path(str(config["runs"])).expanduser()
    found = find_runs(root, Metric(str(config["metric"]), config["maximize"]))
    if not found:
        raise UserError(f"there is no run in {root.resolve()}: train one with python -m sde.train, or give runs=")
    if config["compare"] is not None:
        print(compared([named_run(found, str(name), "compare") for name in config["compare"]], config["format"]))
        return
    chosen = matching(found, config["state"], config["match"], config["older_than"])
    if config["prune"] is not None:
        prune(root, found, chosen, config)
        return
    chosen.sort(key=SORTS[config["sort"]])
    check_metric(chosen)
    shown = chosen[: config["n"]]
    print(listed(shown, len(found), config["format"]))
    for run in shown:
        if run.damage is not None and run.checkpoint is not None:
            file = run.run.path / "config.yaml"
            print(f"warning: {file} is damaged ({run.damage}): a checkpoint holds a copy", file=sys.stderr)


def check_options(config: Mapping[str, Any]) -> None:
    """Raise `UserError` for an option that has no meaning."""
    check_choice("format", config["format"], FORMATS)
    check_choice("sort", config["sort"], SORTS)
    for name in ("maximize", "yes"):
        check_flag(name, config[name])
    if config["state"] is not None:
        check_choice("state", config["state"], STATES)
    if config["older_than"] is not None:
        check_number("older_than", config["older_than"], at_least=0)
    for name in ("n", "keep"):
        if config[name] is not None or name == "keep":
            if not isinstance(config[name], int) or isinstance(config[name], bool):
                raise UserError(f"{name}={config[name]!r} must be a whole number")
            check_number(name, config[name], at_least=1)
    compare = config["compare"]
    if compare is not None and (not isinstance(compare, list) or len(compare) < 2):
        raise UserError(f"compare={compare!r} must be a list of two runs or more: write compare=[RUN,RUN]")
    if compare is not None and config["prune"] is not None:
        raise UserError("compare= and prune= are two commands: give one of them")


def check_metric(chosen: Sequence[Summary]) -> None:
    """Raise `UserError` for a metric that none of the runs has, while they have others."""
    if any(run.last is not None for run in chosen):
        return
    known = sorted({name for run in chosen for name in run.metrics()})
    if chosen and known and chosen[0].metric.name != "val/loss":  # which a run without validations lacks
        wanted = chosen[0].metric.name
        levels = [name for name in known if "=" not in name]
        raise UserError(
            f"metric={wanted} is in none of the runs: there are {', '.join(levels)}{suggest(wanted, known)}"
        )


def _rank(run: Summary, value: Value | None) -> float:
    sign = -1.0 if run.metric.maximize else 1.0
    return _or_last(None if value is None else sign * value.value)


def _or_last(number: float | None) -> float:
    return math.inf if number is None or math.isnan(number) else number


# The list


def listed(shown: Sequence[Summary], total: int, form: str) -> str:
    """All of `shown` as a table with a last line that sums up, or as JSON or CSV."""
    if form == "json":
        return json.dumps([_finite(record(run)) for run in shown], indent=2, ensure_ascii=False)
    if form == "csv":
        return as_csv([list(record(run)) for run in shown[:1]] + [list(record(run).values()) for run in shown])
    metric = shown[0].metric.name if shown else ""
    rows = [{"run": "run", "state": "state", "step": "step", "time": "time", "best": f"best {metric}", "last": "last"}]
    rows[0] |= {name: name for name in ("sde", "model", "data", "size", "age")}
    rows += [row(run) for run in shown]
    counted = f"{len(shown)} of {total} runs, " if len(shown) != total else f"{total} run{'s' * (total > 1)}, "
    states = ", ".join(f"{n} {s}" for s in STATES if (n := sum(run.state == s for run in shown)))
    total_size = readable_bytes(sum(run.size for run in shown))
    return "\n".join([*fitted(rows, terminal_width()), counted + (f"{states}, " if states else "") + total_size])


def record(run: Summary) -> dict[str, Any]:
    """Everything that the list knows of a run, as plain values."""
    best, last = run.best, run.last
    return {
        "run": run.name,
        "path": str(run.run.path),
        "state": run.state,
        "step": run.step,
        "steps": run.steps,
        "checkpoint": run.checkpoint,
        "seconds": run.seconds,
        "metric": run.metric.name,
        "best": best.value if best else None,
        "best_step": best.step if best else None,
        "last": last.value if last else None,
        "last_step": last.step if last else None,
        **{group: run.part(group) for group in ("sde", "model", "data")},
        "bytes": run.size,
        "age": round(run.age, 1),
    }


def row(run: Summary) -> dict[str, str]:
    """A line of the table."""
    best, last = run.best, run.last
    return {
        "run": run.name,
        "state": run.state,
        "step": f"{run.step}/{run.steps}" if run.steps is not None else str(run.step),
        "time": readable_time(run.seconds),
        "best": f"{best.value:.4g} at {best.step}" if best else "-",
        "last": f"{last.value:.4g}" if last else "-",
        **{group: run.part(group) or "-" for group in ("sde", "model", "data")},
        "size": readable_bytes(run.size),
        "age": readable_age(run.age),
    }


def fitted(rows: Sequence[Mapping[str, str]], width: int | None) -> list[str]:
    """Lines of aligned columns; columns are left out, then names shortened, until they fit into `width`."""
    columns = list(rows[0])
    sizes = {column: max(len(line[column]) for line in rows) for column in columns}
    for column in filter(sizes.get, _DROPPED):
        least = sum(sizes[name] for name in columns if name != "run") + 2 * (len(columns) - 1)
        if width is None or least + min(sizes["run"], _NARROW) <= width:
            break
        columns.remove(column)
    rest = sum(sizes[name] for name in columns if name != "run") + 2 * (len(columns) - 1)
    sizes["run"] = sizes["run"] if width is None else max(min(sizes["run"], width - rest), 1)
    return [
        "  ".join(shortened(line[name], sizes[name]).ljust(sizes[name]) for name in columns).rstrip() for line in rows
    ]


# The comparison


def compared(chosen: Sequence[Summary], form: str) -> str:
    """What differs between runs: settings, results, versions; then how each was started."""
    settings = [flat(run.run.config()) for run in chosen]
    environments = [read_environment(run.run.path) for run in chosen]
    commands = [environment.pop("command", None) for environment in environments]
    facts = [{key: value for key, value in record(run).items() if key in _RESULTS} for run in chosen]
    versions = [flat(environment) for environment in environments]
    names = [run.name for run in chosen]
    parts = {"configuration": differing(settings), "results": transposed(facts), "versions": differing(versions)}
    if form == "json":
        everything = {"runs": names, **parts, "commands": commands}
        return json.dumps(_finite(everything), indent=2, ensure_ascii=False)
    if form == "csv":
        rows = [[part, key, *values] for part, table in parts.items() for key, values in table.items()]
        return as_csv([["part", "key", *names], *rows])
    lines = []
    for part, table in parts.items():
        titled = [[part, *distinct(names)], *([key, *map(readable_value, values)] for key, values in table.items())]
        lines += [*side_by_side(titled, terminal_width()), ""] if table else [f"{part}: no difference", ""]
    lines += [f"{name}: {readable_command(command)}" for name, command in zip(names, commands, strict=True)]
    return "\n".join(lines)


_RESULTS = ("state", "step", "seconds", "metric", "best", "best_step", "last", "last_step", "bytes")
_ABSENT = "(none)"


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        nested = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def transposed(tables: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of each key in all tables, in the order in which keys appear."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: [table.get(key, _ABSENT) for table in tables] for key in keys}


def differing(tables: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys that do not have the same value in all tables."""
    return {key: values for key, values in transposed(tables).items() if any(v != values[0] for v in values[1:])}


def read_environment(folder: Path) -> dict[str, Any]:
    """environment.json of a run; nothing where it has none."""
    try:
        found = json.loads((folder / "environment.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def distinct(names: Sequence[str]) -> list[str]:
    """The last parts of names, as many as tell them apart."""
    parts = [Path(name).parts for name in names]
    for count in range(1, max(map(len, parts))):
        short = ["/".join(part[-count:]) for part in parts]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def side_by_side(rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """A first column of keys and one column a run, of equal room where the terminal is too narrow for all of it."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None and sum(sizes) + 2 * (len(sizes) - 1) > width:
        room = max((width - sizes[0]) // (len(sizes) - 1) - 2, 8)
        sizes[1:] = [min(size, room) for size in sizes[1:]]
    return [
        "  ".join(shortened(cell, size).ljust(size) for cell, size in zip(line, sizes, strict=True)).rstrip()
        for line in rows
    ]


# Text


def readable_value(value: Any) -> str:
    """A setting as the command line would have it."""
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def readable_command(command: Any) -> str:
    """The command line of a run as environment.json has it, its module for the file."""
    if not isinstance(command, list) or not command:
        return _ABSENT
    return " ".join([Path(str(command[0])).name, *map(str, command[1:])])


def shortened(text: str, size: int) -> str:
    """`text` with its middle left out where it is longer than `size`."""
    if len(text) <= size:
        return text
    tail = (size - 1) * 2 // 3
    return f"{text[: size - 1 - tail]}…{text[len(text) - tail :]}"


def terminal_width() -> int | None:
    """Characters of a line; None for as many as are needed, where the output is no terminal."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit():
        return shutil.get_terminal_size().columns
    return None


def as_csv(rows: Sequence[Sequence[Any]]) -> str:
    """Comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n")


def _finite(node: Any) -> Any:
    """`node` with null for the numbers that JSON lacks."""
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


if __name__ == "__main__":
    main()
