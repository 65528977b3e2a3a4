"""One thread per test process: the suite runs in parallel, and bit-for-bit tests depend on the number of threads.

Tests send themselves and others Ctrl-C, which a shell lets its background jobs ignore: here it is heard again.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.commands import TINY, TINY_2D, command

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


def _trained(folder: Path, *words: str) -> Path:
    done = command("sde.train", *words, folder=folder)
    assert done.code == 0, done.err
    return folder


def _copy(trained: Path, folder: Path) -> Path:
    return Path(shutil.copytree(trained, folder, dirs_exist_ok=True, symlinks=True))


@pytest.fixture(scope="session")
def _glyphs_trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [*TINY, "data.characters=digits", "conditional=true", "hydra.run.dir=runs/g"]
    return _trained(tmp_path_factory.mktemp("glyphs"), *words)


@pytest.fixture(scope="session")
def _points_trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _trained(tmp_path_factory.mktemp("points"), *TINY_2D, "hydra.run.dir=runs/p")


@pytest.fixture(scope="module")
def glyph_run(_glyphs_trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test file with one run, runs/g, of class-conditional digits."""
    return _copy(_glyphs_trained_once, tmp_path_factory.mktemp("glyphs"))


@pytest.fixture(scope="module")
def point_run(_points_trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test file with one run, runs/p, of points in the plane."""
    return _copy(_points_trained_once, tmp_path_factory.mktemp("points"))


@pytest.fixture
def shared() -> Path:
    """The folder of real pictures and recorded results beside the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not there")
    return SHARED
