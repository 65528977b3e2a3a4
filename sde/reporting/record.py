"""What a run folder holds, for a reader who may come while it is being written and touches nothing."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sde.config import path_of
from sde.data import DataInfo
from sde.errors import UserError
from sde.runs import Run, build_denoiser, find_run
from sde.runs_summary import Metric, Summary
from sde.solvers import SOLVERS
from sde.training.metrics import read_metrics

_RECENT = 20  # lines that tell the pace
_LARGEST = 1e300  # what is larger has no place on an axis, and what is smaller than its inverse is 0 there


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it.

    Args:
        summary: its state and its parts, and what the page calls it.
        lines: all lines of metrics.jsonl in the order of their steps, numbers that are none as None.
        config: its configuration.
        data: data.json; empty where there is none.
        environment: environment.json; empty where there is none.
    """

    summary: Summary
    lines: list[dict[str, Any]]
    config: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]

    @property
    def path(self) -> Path:
        """The folder."""
        return self.summary.run.path

    @property
    def name(self) -> str:
        """What the page calls the run."""
        return self.summary.name

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """The lines that training wrote."""
        return [line for line in self.lines if type(line.get("seconds")) in (int, float)]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines that later evaluations wrote."""
        return [line for line in self.lines if type(line.get("seconds")) not in (int, float)]

    @property
    def step(self) -> int:
        """Of the newest line of training; 0 before the first."""
        return int(self.training[-1]["step"]) if self.training else 0

    @property
    def steps(self) -> int | None:
        """How many the run shall have."""
        return self.summary.steps

    @property
    def seconds(self) -> float:
        """Trained so far."""
        return max((float(line["seconds"]) for line in self.training), default=0.0)

    @property
    def seconds_to_go(self) -> float | None:
        """At the pace of the newest lines, with the validations and previews among them; None before there is one."""
        recent = self.training[-_RECENT:]
        made = recent[-1]["step"] - recent[0]["step"] if recent else 0
        if self.steps is None or made <= 0:
            return None
        return max(0, self.steps - self.step) * (recent[-1]["seconds"] - recent[0]["seconds"]) / made

    @property
    def state(self) -> str:
        """running, finished, stopped or empty."""
        return self.summary.state

    def part(self, group: str) -> str:
        """What the command line calls the class of a group: "vp"."""
        if group == "preview_solver":
            node = self.config.get(group)
            target = node.get("_target_") if isinstance(node, dict) else None
            return next((name for name, cls in SOLVERS.items() if path_of(cls) == target), "-")
        return self.summary.part(group) or "-"

    @cached_property
    def parameters(self) -> int | None:
        """Numbers that are learned; None where this version cannot build the network that the run describes."""
        try:
            with torch.device("meta"):
                network = build_denoiser(self.config, DataInfo.from_dict(self.data)).network
        except Exception:  # a record of any age and origin is shown with what it has
            return None
        return sum(p.numel() for p in network.parameters() if p.requires_grad)

    def newest(self, name: str) -> float | None:
        """The newest number called `name`."""
        values = (line[name] for line in reversed(self.lines) if isinstance(line.get(name), float | int))
        return next(values, None)

    def best(self, name: str) -> tuple[int, float] | None:
        """(step, value) of the least number called `name`."""
        found = [(line[name], line["step"]) for line in self.lines if isinstance(line.get(name), float | int)]
        return None if not found else (min(found)[1], min(found)[0])

    def commands(self) -> list[tuple[str, str]]:
        """(what it does, command line) that a reader may want next."""
        path = Path(os.path.relpath(self.path)) if self.path.resolve().is_relative_to(Path.cwd()) else self.path
        more = f" training.steps={2 * self.step}" if self.state == "finished" else ""
        resume = shlex.join(["python", "-m", "sde.train", f"resume={path}"]) + more
        sample = shlex.join(["python", "-m", "sde.sample", f"run={path}"])
        return [("goes on", resume), ("draws samples", sample)]


def choose_runs(wanted: Any, root: Path) -> list[Run]:
    """The runs that `run=` names: a folder, a list of folders, or the newest below `root` that has a record.

    Raises:
        UserError: when one does not exist, or there is none.
    """
    if isinstance(wanted, list):
        if not wanted:
            raise UserError("run=[] leaves nothing to show: name a folder, as run=FOLDER, or several, as run=[A,B]")
        runs = [find_run(path, root) for path in wanted]
        return list({run.path.resolve(): run for run in runs}.values())
    if wanted not in (None, "latest"):
        return [find_run(wanted, root)]
    files = [file for file in root.glob("**/metrics.jsonl") if file.with_name("config.yaml").is_file()]
    if not files:
        raise UserError(f"there is no run to show in {root.resolve()}: make one with python -m sde.train, or give run=")
    return [Run(max(files, key=lambda file: file.stat().st_mtime).parent)]


def read_record(run: Run, name: str | None = None) -> Record:
    """Read the folder of a run.

    Raises:
        UserError: when it has no configuration or no metrics, or they are damaged.
    """
    config = run.config()
    try:
        lines = read_metrics(run.metrics)
    except FileNotFoundError:
        raise UserError(f"run={run.path} has no metrics.jsonl: give the folder that training made") from None
    for line in lines:
        for key, value in line.items():
            if type(value) in (int, float) and not abs(value) <= _LARGEST:  # nan among them
                line[key] = None
            elif type(value) is float and abs(value) < 1 / _LARGEST:
                line[key] = 0.0
    lines.sort(key=lambda line: line["step"])
    return Record(
        summary=Summary(run, name or run.path.resolve().name, Metric("val/loss")),
        lines=lines,
        config=config,
        data=_read_object(run.path / "data.json"),
        environment=_read_object(run.path / "environment.json"),
    )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def short_names(runs: list[Run]) -> list[str]:
    """The last part of each run's path, and as many before it as tell the runs apart."""
    paths = [run.path.resolve().parts for run in runs]
    for parts in range(1, max(len(path) for path in paths) + 1):
        names = ["/".join(path[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
