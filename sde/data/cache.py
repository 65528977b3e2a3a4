"""Where downloads and prepared data are kept, and how files come to be there.

Nothing is ever visible half-written: a file or folder is made under a temporary name beside its place, synced, and
renamed. Renaming is atomic, so that two processes which prepare the same data at once do the work twice at worst;
where the system has file locks the second waits for the first instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sde import files
from sde.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no fcntl; the renames alone keep the cache whole there
    fcntl = None  # type: ignore[assignment]


def cache_dir() -> Path:
    """The cache: $SDE_CACHE, otherwise $XDG_CACHE_HOME/sde, otherwise ~/.cache/sde. Not created by asking."""
    if named := os.environ.get("SDE_CACHE"):
        return Path(named).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "sde"
    try:
        return Path.home() / ".cache" / "sde"
    except RuntimeError as error:
        raise UserError("there is no home folder to keep the cache in: set SDE_CACHE to a folder") from error


def make_folder(folder: Path) -> Path:
    """`folder`, created with its parents.

    Raises:
        UserError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
        reason = "no permission"
    except OSError as error:
        writable, reason = False, error.strerror or str(error)
    if not writable:
        raise UserError(
            f"the folder {str(folder)!r} cannot be written to ({reason}): choose another, or set SDE_CACHE to move the "
            "cache"
        )
    return folder


def key(*parts: object) -> str:
    """A short name for a combination of JSON-able values: 16 hexadecimal digits, the same on every platform."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path`.lock where the system and the file system have locks; it is let go when a process dies."""
    if fcntl is None:
        yield
        return
    make_folder(path.parent)
    with open(path.with_name(path.name + ".lock"), "a") as handle:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under; it becomes `path` when the block ends, and goes when it fails."""
    make_folder(path.parent)
    try:
        with files.new_file(path) as temporary:
            yield temporary
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `path` when the block ends, and goes when it fails.

    A folder that is already at `path` when the block ends wins: another process prepared the same data meanwhile.
    """
    make_folder(path.parent)
    temporary = files.temporary_beside(path)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            files.sync(file)
        with contextlib.suppress(FileExistsError):
            _rename_folder(temporary, path)
        files.sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_folder(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        if target.is_dir():  # "directory not empty" or "exists", depending on the system
            raise FileExistsError(target) from error
        raise


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{str(path)!r} cannot be written ({error.strerror or error}): make room there, or set SDE_CACHE to "
        "move the cache"
    )
