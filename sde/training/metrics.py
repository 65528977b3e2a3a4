"""The record of a run, metrics.jsonl: one JSON object a line, {"step": ..., "seconds": ..., name: value, ...}.

A command that evaluates a run later adds a line of its own with the checkpoint's step (`append_metrics`), without
"seconds", which are those of training. Both write whole lines in one unbuffered write at the end of the file, so that
two processes may write at once, and take back what a full disk let through of a line.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sde.files import atomic_write


class MetricsFile:
    """metrics.jsonl of a run, which never stops the run: lines that cannot be written wait until they can.

    Args:
        path: the file; made when it does not exist.
        step: step from which the run goes on: later lines, of work that is done again, are dropped, and "seconds" go
            on where the kept ones end. 0 begins the file anew.

    Raises:
        OSError: when the file cannot be opened for another reason than a full disk.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path, self._step = path, step
        self._file: BinaryIO | None = None
        self._waiting: list[bytes] = []
        self._warned = False
        kept = _kept(path, step)[1]
        self._before = max((float(line.get("seconds") or 0.0) for line in kept), default=0.0)
        self._start = time.monotonic()
        try:
            self._open()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._warn(error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; numbers that JSON lacks are written as null."""
        seconds = round(self._before + time.monotonic() - self._start, 3)
        self._waiting.append(_encode({"step": step, "seconds": seconds, **_finite(metrics)}))
        self._write()

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        self._write()
        try:
            if self._file is not None:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Sync and close the file; says so when lines could not be written until now."""
        self.sync()
        if self._file is not None:
            self._file.close()
        if self._waiting:
            first = json.loads(self._waiting[0])["step"]
            print(f"warning: {self.path} lacks {len(self._waiting)} lines, from step {first} on", file=sys.stderr)

    def _open(self) -> BinaryIO:
        """The file, without the lines that are to be dropped: rewritten as a whole, or left alone."""
        if self._file is None:
            new, _ = _kept(self.path, self._step)
            if not self.path.exists() or self.path.read_bytes() != new:
                with atomic_write(self.path) as file:
                    file.write(new)
            self._file = self.path.open("ab+", buffering=0)
        return self._file

    def _write(self) -> None:
        """Write the lines that wait, oldest first, as many as can be."""
        try:
            while self._waiting:
                _append(self._open(), self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            sentence = f"{self.path} cannot be written ({error.strerror}); its lines are kept until it can"
            print(f"\nwarning: {sentence}", file=sys.stderr)
        self._warned = True


def append_metrics(path: Path, step: int, metrics: Mapping[str, float], notes: Mapping[str, str] | None = None) -> None:
    """Add a line to a metrics.jsonl, whole and in one write: a training that has the file open may go on writing it.

    Args:
        path: the file.
        step: that the numbers belong to.
        metrics: numbers; those that JSON lacks are written as null.
        notes: words beside them.

    Raises:
        OSError: when the line cannot be written; the file is as it was then.
    """
    with path.open("ab+", buffering=0) as file:
        _append(file, _encode({"step": step, **_finite(metrics), **(notes or {})}))
        os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that was cut off is left out."""
    return [line for line in map(_decode, path.read_bytes().split(b"\n")) if line is not None]


def _encode(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line) + "\n").encode()


def _decode(text: bytes) -> dict[str, Any] | None:
    """The object in a line of the file; None for anything else."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _kept(path: Path, step: int) -> tuple[bytes, list[dict[str, Any]]]:
    """What of a file belongs to a run that goes on from `step`: its text, byte by byte, and its lines."""
    texts = path.read_bytes().split(b"\n") if path.exists() and step else []
    kept = [(text, line) for text in texts if (line := _decode(text)) is not None and line["step"] <= step]
    return b"".join(text + b"\n" for text, _ in kept), [line for _, line in kept]


def _append(file: BinaryIO, line: bytes) -> None:
    """Write a line at the end of an unbuffered file, all of it or nothing."""
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(-1, os.SEEK_END)
        line = b"\n" * (file.read(1) != b"\n") + line  # after what a process that was killed left of its line
    written = file.write(line)
    if written == len(line):
        return
    # a disk that fills up takes the beginning of a line; another process may have written behind it meanwhile
    if file.seek(0, os.SEEK_END) == end + written:
        file.truncate(end)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The numbers, null for those that JSON lacks."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
