"""Ctrl-C while a command line starts: importing PyTorch takes seconds, in which there is nothing to save."""

from __future__ import annotations

import os
import signal
from types import FrameType

SENTENCE = "interrupted; nothing was left half-written"


def leave_at_once() -> None:
    """Let Ctrl-C end this process with a sentence and exit code 130, until `raise_again`.

    A process that is to pay no heed to Ctrl-C, as one that was started in the background, goes on paying none.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_again() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, as Python does."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(_number: int, _frame: FrameType | None) -> None:
    # not by an exception, which may come up in the middle of an import that takes it for a failure of its own
    os.write(2, f"{SENTENCE}\n".encode())
    os._exit(130)
