"""The record of a run, metrics.jsonl: one JSON object a line, {"step": ..., "seconds": ..., name: value, ...}.

A command that evaluates a run later adds a line of its own with the checkpoint's step (`append_metrics`), without
"seconds", which are those of training.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """metrics.jsonl of a run.

    Args:
        path: the file; made when it does not exist.
        step: step from which the run goes on: later lines, of work that is done again, are dropped.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self._start = time.monotonic()
        self._before = 0.0
        kept = [line for line in read_metrics(path) if line["step"] <= step] if path.exists() and step else []
        if kept:
            self._before = max(float(line.get("seconds") or 0.0) for line in kept)
        text = "".join(json.dumps(line) + "\n" for line in kept)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)
        self._file = path.open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; numbers that JSON lacks are written as null."""
        seconds = round(self._before + time.monotonic() - self._start, 3)
        self._file.write(json.dumps({"step": step, "seconds": seconds, **_finite(metrics)}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close the file."""
        os.fsync(self._file.fileno())
        self._file.close()


def append_metrics(path: Path, step: int, metrics: Mapping[str, float], notes: Mapping[str, str] | None = None) -> None:
    """Add a line to a metrics.jsonl, whole and in one write: a training that has the file open may go on writing it.

    Args:
        path: the file.
        step: that the numbers belong to.
        metrics: numbers; those that JSON lacks are written as null.
        notes: words beside them.
    """
    line = (json.dumps({"step": step, **_finite(metrics), **(notes or {})}) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            cut_off = file.read(1) != b"\n"  # by a process that was killed
            line = b"\n" * cut_off + line
        file.write(line)
        os.fsync(file.fileno())


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The numbers, null for those that JSON lacks."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that was cut off is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
