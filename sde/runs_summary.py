"""What a run folder says about its run without a checkpoint being opened: state, step, metrics, size.

    running    another process holds the run's lock
    finished   the newest checkpoint has made all the steps that the configuration asks for
    stopped    it has not, or config.yaml is damaged: `python -m sde.train resume=RUN` goes on
    empty      there is no checkpoint

A run is a folder with a config.yaml and a data.json. Nothing below a run is looked at for further runs, links to
folders are not followed, hidden folders are passed over.
"""

from __future__ import annotations

import fnmatch
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from sde.config import path_of
from sde.errors import UserError, suggest
from sde.registry import Registry
from sde.runs import Run, lacking
from sde.training.checkpoint import list_checkpoints

STATES = ("running", "finished", "stopped", "empty")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # OmegaConf's takes ten times as long


@dataclass(frozen=True)
class Metric:
    """A key of metrics.jsonl and which of its values is the best.

    Args:
        name: such as val/loss.
        maximize: the highest is the best, not the lowest.
    """

    name: str
    maximize: bool = False


@dataclass(frozen=True)
class Value:
    """A number of metrics.jsonl; nan where it was not finite."""

    value: float
    step: int


@dataclass(frozen=True)
class Summary:
    """What can be said about a run at a glance; what is not there is None.

    Args:
        run: the folder.
        name: its path below the folder of all runs.
        metric: of which `best` and `last` are.
    """

    run: Run
    name: str
    metric: Metric

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration as it is written; empty when the file cannot be read."""
        try:
            config = yaml.load((self.run.path / "config.yaml").read_text(), _Loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return {}
        return config if isinstance(config, dict) else {}

    @property
    def damage(self) -> str | None:
        """What is wrong with config.yaml; None if nothing is."""
        missing = lacking(self.config)
        return None if missing is None else f"it has no {missing}" if self.config else "it cannot be read"

    @cached_property
    def checkpoint(self) -> int | None:
        """The step of the newest checkpoint."""
        known = list_checkpoints(self.run.checkpoints)
        return known[-1][0] if known else None

    @cached_property
    def steps(self) -> int | None:
        """The steps that the configuration asks for; a run made from a foreign network asks for none."""
        training = self.config.get("training")
        steps = training.get("steps") if isinstance(training, dict) else None
        return steps if isinstance(steps, int) else None

    @cached_property
    def state(self) -> str:
        """One of `STATES`."""
        if self.run.is_locked():
            return "running"
        if self.checkpoint is None:
            return "empty"
        ended = self.damage is None and (self.steps is None or self.checkpoint >= self.steps)
        return "finished" if ended else "stopped"

    @cached_property
    def step(self) -> int:
        """Where training would go on, or is now while it runs."""
        logged = self._trained.get("step", 0) if self.state == "running" else 0
        return max(self.checkpoint or 0, logged)

    @property
    def seconds(self) -> float | None:
        """Time trained."""
        return self._trained.get("seconds")

    @property
    def best(self) -> Value | None:
        """The best value of the metric, the earliest of equal ones."""
        finite = [value for value in self._values if value.value == value.value]
        choose = max if self.metric.maximize else min
        return choose(finite, key=lambda value: value.value) if finite else None

    @property
    def last(self) -> Value | None:
        """The last value of the metric."""
        return self._values[-1] if self._values else None

    def protected(self) -> set[int]:
        """The steps whose checkpoints are worth more than their age says.

        That where the metric was the best, that of the run's own `training.keep_best`, and multiples of its
        `training.keep_every`.
        """
        training = self.config.get("training")
        own = training if isinstance(training, dict) else {}
        steps = [step for step, _ in list_checkpoints(self.run.checkpoints)]
        every = own.get("keep_every")
        kept = {step for step in steps if isinstance(every, int) and every > 0 and step % every == 0}
        metrics = [self.metric, *([Metric(str(own["keep_best"]))] if own.get("keep_best") else [])]
        return kept | {step for metric in metrics if (step := self._best_of(steps, metric)) is not None}

    def _best_of(self, steps: Sequence[int], metric: Metric) -> int | None:
        """Which of `steps` had the best value of a metric, the last one measured by then."""
        values = [value for value in self._values_of(metric.name) if value.value == value.value]
        at = {step: [value.value for value in values if value.step <= step] for step in steps}
        measured = [step for step in steps if at[step]]
        choose = max if metric.maximize else min
        return choose(measured, key=lambda step: at[step][-1]) if measured else None

    def part(self, group: str) -> str | None:
        """The name of the class that `group` of the configuration builds."""
        node = self.config.get(group)
        target = str(node.get("_target_")) if isinstance(node, dict) and "_target_" in node else None
        return None if target is None else _names(group).get(target, target.rpartition(".")[2])

    @cached_property
    def size(self) -> int:
        """Bytes of all files, those of links not counted."""
        return bytes_below(self.run.path)

    @cached_property
    def written(self) -> float:
        """When training last wrote something, in seconds since the epoch."""
        newest = [path for _, path in list_checkpoints(self.run.checkpoints)[-1:]]
        return max(_modified(path) for path in (self.run.metrics, self.run.path / "config.yaml", *newest))

    @property
    def age(self) -> float:
        """Seconds since then."""
        return max(time.time() - self.written, 0.0)

    def metrics(self) -> list[str]:
        """The numbers that metrics.jsonl has, in the order of their first appearance."""
        lines = [line for raw in self._lines if (line := _parsed(raw)) is not None]
        numbers = (key for line in lines for key, value in line.items() if isinstance(value, float))
        return [name for name in dict.fromkeys(numbers) if name != "seconds"]

    @cached_property
    def _lines(self) -> list[bytes]:
        try:
            return self.run.metrics.read_bytes().splitlines()
        except OSError:
            return []

    @cached_property
    def _values(self) -> list[Value]:
        return self._values_of(self.metric.name)

    def _values_of(self, name: str) -> list[Value]:
        key = json.dumps(name).encode()
        lines = [_parsed(raw) for raw in self._lines if key in raw]  # most lines are not parsed
        numbers = [(line.get(name, ""), line["step"]) for line in lines if line is not None]
        return [
            Value(float("nan") if value is None else float(value), step)
            for value, step in numbers
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        ]

    @cached_property
    def _trained(self) -> dict[str, Any]:
        """The last line that training wrote."""
        lines = (_parsed(raw) for raw in reversed(self._lines) if b'"seconds"' in raw)
        return next((line for line in lines if line is not None), {})


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that was cut off."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


@cache
def _names(group: str) -> dict[str, str]:
    """The registered name of each class of a group, by its path."""
    found = [registry for registry in Registry.all if registry.kind == group]
    return {path_of(cls): name for registry in found for name, cls in registry.items()}


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _files(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(entry.path)
                else:
                    yield entry
    except FileNotFoundError:  # somebody deletes at the same time
        return


def bytes_below(folder: Path) -> int:
    """Bytes of all files in `folder` and below."""
    return sum(entry.stat(follow_symlinks=False).st_size for entry in _files(folder))


def find_runs(root: Path, metric: Metric) -> list[Summary]:
    """All runs below `root`, the one that was written last first."""
    root = root.resolve()
    found = [Summary(Run(path), str(path.relative_to(root)), metric) for path in _run_folders(root)]
    return sorted(found, key=lambda summary: (-summary.written, summary.name))


def _run_folders(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
            continue
        if all(os.path.isfile(os.path.join(entry.path, name)) for name in ("config.yaml", "data.json")):
            yield Path(entry.path)
        else:
            yield from _run_folders(Path(entry.path))


def matching(runs: Sequence[Summary], state: str | None, match: str | None, older_than: float | None) -> list[Summary]:
    """The runs in a state, of a name (a pattern such as *_vp_*), last written more than `older_than` days ago."""
    return [
        run
        for run in runs
        if (match is None or fnmatch.fnmatchcase(run.name, match) or fnmatch.fnmatchcase(run.run.path.name, match))
        and (older_than is None or run.age > older_than * 86400)
        and (state is None or run.state == state)
    ]


def named_run(runs: Sequence[Summary], name: str, option: str) -> Summary:
    """The run of `runs` that `name` means: a path, "latest", a name, or the beginning of a single one's name.

    Raises:
        UserError: when there is none, or several.
    """
    if name == "latest":
        with_checkpoint = [run for run in runs if run.checkpoint is not None]
        if not with_checkpoint:
            raise UserError(f"{option}=latest: none of the {len(runs)} runs has a checkpoint yet")
        return with_checkpoint[0]
    path = Path(name).expanduser()
    exact = [run for run in runs if run.name == name or (path.exists() and run.run.path == path.resolve())]
    exact = exact or [run for run in runs if run.run.path.name == name]
    found = exact or [run for run in runs if run.name.startswith(name) or run.run.path.name.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(run.name for run in found[:4]) + (", ..." if len(found) > 4 else "")
        raise UserError(f"{option}={name} could be any of {len(found)} runs ({some}): write more of the name")
    hint = suggest(name, [run.name for run in runs] + [run.run.path.name for run in runs])
    raise UserError(f"{option}={name} is none of the {len(runs)} runs that python -m sde.runs lists{hint}")


# Words for numbers


def readable_bytes(count: float) -> str:
    """Such as 1.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def readable_time(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def readable_age(seconds: float) -> str:
    """Such as 5 min."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
