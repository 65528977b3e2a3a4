"""One thread per test process: the suite runs in parallel, and bit-for-bit tests depend on the number of threads.

Tests send themselves and others Ctrl-C, which a shell lets its background jobs ignore: here it is heard again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared data of tests goes to a folder of their own, not to the user's cache."""
    before = os.environ.get("SDE_CACHE")
    os.environ["SDE_CACHE"] = str(tmp_path_factory.getbasetemp().parent / "sde-cache")
    yield
    if before is None:
        del os.environ["SDE_CACHE"]
    else:
        os.environ["SDE_CACHE"] = before


@pytest.fixture
def shared() -> Path:
    """The folder of real pictures and recorded results beside the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not there")
    return SHARED
