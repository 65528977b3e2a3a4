"""Fetching a published file: several mirrors, a checksum, and never a half-written file."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

from sde.data.cache import locked, new_file
from sde.errors import UserError

TIMEOUT = 30  # seconds without an answer before the next mirror is tried
BLOCK = 1 << 20


class _MirrorFailed(Exception):
    """One mirror does not have the file; leaving `new_file` by it discards what was written."""


def fetch(
    target: Path,
    urls: Sequence[str],
    sha256: str,
    open_content: Callable[[Path], IO[bytes]] | None = None,
) -> Path:
    """Download `target` from the first of `urls` that has the right content, unless it is there already.

    Progress goes to standard error.

    Args:
        target: where the file goes.
        urls: the same file in several places, in the order to try.
        sha256: hexadecimal SHA-256 of the content.
        open_content: opens what the checksum is of, when that is not the file itself: mirrors may have compressed
            the same content in different ways.

    Returns:
        `target`.

    Raises:
        UserError: no mirror has the file, or it cannot be written.
    """
    if target.exists():
        return target
    with locked(target):
        failures = []
        for url in urls:
            if target.exists():  # another process was faster
                break
            try:
                with new_file(target) as temporary:
                    _download(url, temporary, target.name)
                    _verify(temporary, sha256, open_content)
            except _MirrorFailed as failure:
                failures.append(f"{url}: {failure}")
    if not target.exists():
        raise UserError(
            f"{target.name} could not be downloaded ({'; '.join(failures)}): "
            f"download it by hand and put it in {str(target.parent)!r}"
        )
    return target


def _download(url: str, path: Path, name: str) -> None:
    with contextlib.ExitStack() as stack:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "sde (Python)"})  # some refuse the default
            answer = stack.enter_context(urllib.request.urlopen(request, timeout=TIMEOUT))
        except (OSError, http.client.HTTPException) as error:
            raise _MirrorFailed(_reason(error)) from error
        length = answer.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        file = stack.enter_context(open(path, "wb"))
        bar = stack.enter_context(tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=None))
        received = 0
        while block := _read(answer):
            file.write(block)
            bar.update(len(block))
            received += len(block)
        if total is not None and received < total:
            raise _MirrorFailed(f"it ended after {received} of {total} bytes")


def _read(answer: IO[bytes]) -> bytes:
    try:
        return answer.read(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _MirrorFailed(_reason(error)) from error


def _verify(path: Path, sha256: str, open_content: Callable[[Path], IO[bytes]] | None) -> None:
    digest = hashlib.sha256()
    try:
        with open_content(path) if open_content else open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except (OSError, EOFError, ValueError) as error:
        raise _MirrorFailed(f"what came is damaged ({_reason(error)})") from error
    if digest.hexdigest() != sha256:
        raise _MirrorFailed("what came has the wrong checksum")


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error or type(error).__name__)
