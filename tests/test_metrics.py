"""metrics.jsonl: every line whole and exactly once, whatever the disk and other processes do."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sde.training import metrics
from sde.training.metrics import MetricsFile, append_metrics, read_metrics


class Disk(io.FileIO):
    """A file on a disk with `room` bytes left, that takes the beginning of what it cannot take as a whole."""

    def __init__(self, path: Path, room: int) -> None:
        super().__init__(path, "ab+")
        self.room = room
        self.behind: tuple[Path, int] | None = None

    def write(self, data: bytes) -> int:  # type: ignore[override]
        written = min(len(data), self.room)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(data[:written])
        self.room -= written
        if self.behind is not None:
            append_metrics(*self.behind, {"bits": 2.0})
            self.behind = None
        return written


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def on_a_disk(path: Path, room: int) -> tuple[MetricsFile, Disk]:
    """A record with a line, on a disk that then has `room` bytes left."""
    record = MetricsFile(path)
    record.log(1, {"loss": 1.0})
    assert record._file is not None
    record._file.close()
    disk = Disk(path, room)
    record._file = disk
    return record, disk


@pytest.mark.parametrize("room", [0, 1, 20])
def test_a_full_disk_takes_whole_lines_later(room: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    record, disk = on_a_disk(path, room)
    before = path.read_bytes()
    for step in (2, 3):
        record.log(step, {"loss": 1.0})
        record.sync()
        assert path.read_bytes() == before  # no half line
        disk.room = room
    disk.room = 10**6
    record.log(4, {"loss": 1.0})
    record.close()
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2, 3, 4]
    err = capsys.readouterr().err
    assert err.count("warning") == 1
    assert f"{path} cannot be written (No space left on device)" in err
    seconds = [line["seconds"] for line in read_metrics(path)]
    assert seconds == sorted(seconds)  # of when the lines were made


def test_lines_that_never_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    record, _ = on_a_disk(path, 5)
    record.log(20, {"loss": 1.0})
    record.log(30, {"loss": 1.0})
    record.close()
    assert f"warning: {path} lacks 2 lines, from step 20 on" in capsys.readouterr().err
    assert steps(path) == [1]


def test_a_half_line_is_not_cut_off_with_what_another_wrote_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record, disk = on_a_disk(path, 20)
    disk.behind = (path, 1)
    record.log(2, {"loss": 1.0})
    disk.room = 10**6
    record.log(3, {"loss": 1.0})
    record.close()
    assert steps(path) == [1, 1, 2, 3]
    assert read_metrics(path)[1] == {"step": 1, "bits": 2.0}


def test_a_line_added_to_a_full_disk_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, 1, {"bits": 2.0})
    before = path.read_bytes()
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Disk(self, 7))
    with pytest.raises(OSError, match="No space"):
        append_metrics(path, 2, {"bits": 2.0})
    monkeypatch.undo()
    assert path.read_bytes() == before


def test_a_run_goes_on_over_a_disk_that_is_full_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is rewritten without the lines of work that is done again once there is room for it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 5.0}\n{"step": 2, "seconds": 9.0}\n')
    before = path.read_bytes()

    def full(path: Path) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "atomic_write", full)
        record = MetricsFile(path, 1)
        record.log(2, {"loss": 1.0})
        assert path.read_bytes() == before
    record.log(3, {"loss": 1.0})
    record.close()
    assert steps(path) == [1, 2, 3]
    assert 5 <= read_metrics(path)[1]["seconds"] < 9


def test_what_is_not_a_full_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        MetricsFile(tmp_path)


def test_a_disk_that_does_not_sync_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    record = MetricsFile(path)
    record.log(1, {})

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        record.sync()
    record.close()
    assert steps(path) == [1]
    assert "Input/output error" in capsys.readouterr().err


LIMITED = """
import resource, sys
from pathlib import Path
from sde.training.metrics import MetricsFile
path = Path(sys.argv[1])
record = MetricsFile(path)
record.log(1, {"loss": 1.0})
for step, limit in ((2, path.stat().st_size + 10), (3, path.stat().st_size + 10), (4, 10**6)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    record.log(step, {"loss": 1.0})
    print(path.read_bytes().count(b"step"), path.read_bytes().endswith(b"\\n"))
record.close()
"""


def test_the_kernels_short_writes(tmp_path: Path) -> None:
    """A limit on the size of files lets the beginning of a line through, as a full disk does."""
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["1 True", "1 True", "4 True"]
    assert done.stderr.count("warning") == 1
    assert steps(path) == [1, 2, 3, 4]


def test_what_is_kept_is_kept_byte_by_byte_and_once(tmp_path: Path) -> None:
    """Of a run that goes back to step 20, later lines go, and a late evaluation of an earlier checkpoint stays."""
    path = tmp_path / "metrics.jsonl"
    texts = [
        '{"step": 10, "seconds": 1.5, "train/loss": 0.25}',
        '{"step":20,"seconds":3.0,"train/loss":1e-3}',
        '{"step": 30, "seconds": 4.0}',
        '{"step": 10, "likelihood/test/kind": "ode-\\u00fc"}',
        '{"step": 30, "likelihood/test/kind": "ode"}',
        '{"step": 20, "bits": 2.0}',
    ]
    path.write_text("\n".join([*texts, "\x00\x00", '{"step": 4']))
    MetricsFile(path, 20).close()
    assert path.read_text().split("\n") == [texts[0], texts[1], texts[3], texts[5], ""]
    file = path.stat().st_ino
    MetricsFile(path, 20).close()
    assert path.stat().st_ino == file  # nothing to drop: not even rewritten, for another process may be adding a line
    again = MetricsFile(path, 20)
    again.log(30, {})
    again.close()
    assert 3.0 <= read_metrics(path)[-1]["seconds"] < 4.0
    MetricsFile(path).close()
    assert path.read_bytes() == b""
