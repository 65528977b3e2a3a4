"""Memory that this process may use, and has used: of the machine, of the control groups that hold it, of a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def peak_memory(device: torch.device) -> int | None:
    """The most bytes in use so far: of the GPU by this process's tensors, or of the process; None where not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def usable_memory(
    root: Path = CGROUPS, own: Path = OWN, info: Path = Path("/proc/meminfo")
) -> tuple[int | None, int | None]:
    """Bytes of memory and bytes that can be had, both within the limits of the control groups; None if unknown."""
    try:
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in info.read_text().splitlines() if line}
    except (OSError, ValueError, IndexError):
        return None, None
    total, free = sizes.get("MemTotal"), sizes.get("MemAvailable")
    if total is None or free is None:
        return None, None
    for folder in control_groups(root, own, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            words = [*read_words(folder / limit), *read_words(folder / used)]
            if len(words) == 2 and all(word.isdigit() for word in words):
                # what was read from files and can be forgotten again is no obstacle
                inside = int(words[0]) - int(words[1]) + forgettable(folder)
                total, free = min(total, int(words[0])), max(0, min(free, inside))
    return total, free


def forgettable(folder: Path) -> int:
    """Bytes of files that a control group keeps in memory and can drop."""
    words = read_words(folder / "memory.stat")
    counts = dict(zip(words[::2], words[1::2], strict=False))
    return int(counts.get("inactive_file", 0))


def control_groups(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's control groups that may limit `controller`, from its own up to the root."""
    for line in read_lines(own):
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        top = root if number == "0" else root / controllers
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            folder = top.joinpath(*parts[:depth])
            if folder.is_dir():
                yield folder


def read_lines(path: Path) -> list[str]:
    """The lines of a small file; none where it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def read_words(path: Path) -> list[str]:
    """The words of a small file; none where it cannot be read."""
    return " ".join(read_lines(path)).split()
