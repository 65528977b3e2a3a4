"""The progress bar of long work: what is done, how fast, and how long it will take."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from sde.distributed import is_main


def progress_bar(total: int, **options: Any) -> tqdm:
    """A bar on standard error, redrawn often on a terminal and every ten seconds in a log file.

    Of several processes, one shows it.

    Args:
        total: units of work.
        options: of `tqdm.tqdm`.
    """
    every = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, dynamic_ncols=True, mininterval=every, disable=not is_main(), **options)
