"""Running the command lines inside the test process, and what they answer."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from hydra.core.global_hydra import GlobalHydra

TINY = [
    "model.channels=8",
    "model.channel_multipliers=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[]",
    "data.size=8",
    "training.steps=4",
    "training.batch_size=4",
    "training.log_every=2",
    "training.validation_examples=8",
    "training.preview_samples=4",
    "training.warmup=2",
    "preview_steps=2",
]
"""A glyph run of some seconds."""

TINY_2D = [
    "model=mlp",
    "model.width=16",
    "model.depth=1",
    "data=moons",
    "data.train_size=256",
    "data.test_size=64",
    "training.steps=20",
    "training.batch_size=32",
    "training.log_every=10",
    "training.validation_examples=32",
    "training.preview_samples=16",
    "preview_steps=4",
]


@dataclass(frozen=True)
class Answer:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The last line on standard error."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else ""


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in `folder` for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def command(module: str, *arguments: str, folder: Path) -> Answer:
    """`python -m module arguments`, run in `folder` by this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    GlobalHydra.instance().clear()
    entry = importlib.import_module(module)
    with (
        inside(folder),
        mock.patch.object(sys, "argv", [f"{module}.py", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            entry.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return Answer(code, out.getvalue(), err.getvalue())
