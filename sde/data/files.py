"""A folder or a .zip as a set of named files, read without unpacking anything to disk."""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Protocol

from sde.errors import UserError

MAX_BYTES = 1 << 29  # of one file: more is a decompression bomb rather than a picture


class Files(Protocol):
    """Named files; names are relative and use forward slashes on every platform."""

    names: list[str]

    def read(self, name: str) -> bytes:
        """The content of one file; `UserError` when it is damaged or too large."""

    def describe(self, name: str) -> str:
        """What to call one file in a message."""

    def identity(self) -> list[object]:
        """JSON-able values that change when a file does."""


def open_files(path: Path) -> Files:
    """The files under a folder or in a .zip, sorted by name; hidden ones are left out.

    Raises:
        UserError: there is no such folder or .zip, or it cannot be read.
    """
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise UserError(f"path={str(path)!r} does not exist: give a folder of pictures or a .zip")
    return _Zip(path)


def _visible(name: str) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._states: dict[str, tuple[int, int]] = {}
        for folder, _, files in os.walk(path):
            for file in files:
                name = Path(folder, file).relative_to(path).as_posix()
                if _visible(name):
                    with contextlib.suppress(OSError):  # a link to nothing
                        status = os.stat(Path(folder, file))
                        self._states[name] = status.st_size, status.st_mtime_ns
        self.names = sorted(self._states)

    def read(self, name: str) -> bytes:
        try:
            if self._states[name][0] > MAX_BYTES:
                raise UserError(f"{self.describe(name)} is larger than {MAX_BYTES} bytes: take it out")
            return (self._path / name).read_bytes()
        except OSError as error:
            raise UserError(f"{self.describe(name)} cannot be read ({error.strerror}): mend or remove it") from error

    def describe(self, name: str) -> str:
        return repr(str(self._path / name))

    def identity(self) -> list[object]:
        return [str(self._path.resolve()), *([name, *self._states[name]] for name in self.names)]


class _Zip:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"path={str(path)!r} is not a folder or a .zip that can be read ({error})") from error
        entries = (info for info in self._zip.infolist() if not info.is_dir())
        self.names = sorted({info.filename for info in entries if _visible(info.filename)})

    def read(self, name: str) -> bytes:
        try:
            if self._zip.getinfo(name).file_size > MAX_BYTES:  # no more than this is ever decompressed
                raise UserError(f"{self.describe(name)} is larger than {MAX_BYTES} bytes: take it out")
            return self._zip.read(name)
        # RuntimeError: it wants a password; NotImplementedError: an unknown compression
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.describe(name)} is damaged or locked ({error}): make the .zip anew") from error

    def describe(self, name: str) -> str:
        return f"{name!r} in {str(self._path)!r}"

    def identity(self) -> list[object]:
        status = os.stat(self._path)
        return [str(self._path.resolve()), status.st_size, status.st_mtime_ns]
