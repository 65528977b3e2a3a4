"""Writing files so that a half-written one never replaces a good one.

A file is made under a temporary name beside its place, synced to the disk and renamed, which is atomic.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under; it becomes `path` when the block ends, and goes when it fails.

    Raises:
        OSError: when the system refuses something, such as more space, whatever the library that writes makes of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except Exception as error:
        refused = refusal(error)
        if refused is None:
            raise
        refused.filename = refused.filename or str(path)
        if refused is error:
            raise
        raise refused from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` only once it is complete; on an error what was there stays."""
    with new_file(path) as temporary, temporary.open("wb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def temporary_beside(path: Path) -> Path:
    """A hidden name beside `path` that nobody else has, with the permissions that any new file gets."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")


def refusal(error: Exception) -> OSError | None:
    """What the system refused a library that was writing a file; None when the library failed for another reason.

    PyTorch raises an error of its own while it handles that of the file, and safetensors tells its number.
    """
    if isinstance(error, OSError):
        return error
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__
    number = re.search(r"\(os error (\d+)\)", str(error))
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename durable where folders can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
