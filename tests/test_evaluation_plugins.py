"""An extractor and a metric of one's own: the example of docs/evaluation.md, run as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sde.data import DATASETS
from sde.evaluation.extractors import EXTRACTORS
from sde.metrics import METRICS
from tests.commands import command

DOCUMENT = Path(__file__).parent.parent / "docs" / "evaluation.md"
HEADING = "## Features and metrics of your own\n"
SECTION = DOCUMENT.read_text().partition(HEADING)[2].partition("\n## ")[0]
FILES = {
    text.partition("\n")[0].removeprefix("# "): text
    for text in re.findall(r"^```(?:python|yaml)\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)
}
COMMANDS = re.findall(r"^    python -m sde\.evaluate (.*)$", re.sub(r"\\\n\s*", "", SECTION), re.MULTILINE)


@pytest.fixture
def folder(glyph_run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a run, with the files of the document; what they register is forgotten afterwards."""
    for name, text in FILES.items():
        (glyph_run / name).parent.mkdir(parents=True, exist_ok=True)
        (glyph_run / name).write_text(text)
    monkeypatch.syspath_prepend(str(glyph_run))  # as `python -m` does
    for registry in (EXTRACTORS, METRICS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    yield glyph_run
    sys.modules.pop("my_evaluation", None)


def test_the_example_is_whole() -> None:
    assert sorted(FILES) == ["mine/features/coarse.yaml", "mine/metrics/mean_gap.yaml", "my_evaluation.py"]
    assert len(COMMANDS) == 1


def test_the_example_of_the_document_runs(folder: Path) -> None:
    """Its numbers are those of four averages of each picture by NumPy."""
    train, test = (DATASETS.get("glyphs")(characters="digits", size=8).split(each).values for each in ("train", "test"))
    noise = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    np.savez(folder / "noise.npz", samples=noise)
    words = [word.replace("RUN", "runs/g") for word in shlex.split(COMMANDS[0])]
    plain = [word for word in words if "mean_gap=" not in word and "mean_gap." not in word]  # the options as they are
    done = command("sde.evaluate", *plain, "samples=noise.npz", "out=plain", folder=folder)
    assert done.code == 0, done.err
    assert "mean gap-coarse-40" in done.out
    done = command("sde.evaluate", *words, "samples=noise.npz", "out=results", folder=folder)
    assert done.code == 0, done.err
    path = next(Path(line) for line in done.out.splitlines() if line.endswith(".json"))
    record = json.loads((folder / path).read_text())

    def mean(pictures: np.ndarray) -> np.ndarray:
        cells = pictures.astype(np.float64).reshape(-1, 2, 4, 2, 4).mean((2, 4)) / 127.5 - 1
        return cells.reshape(-1, 4).mean(0)

    scores = {each["name"]: each for each in record["scores"]}
    assert set(scores) == {"fd", "mean_gap"}
    for what, pictures in (("value", noise), ("floor", test.numpy())):
        expected = np.abs(mean(pictures) - mean(train.numpy())).sum()
        assert scores["mean_gap"][what] == pytest.approx(expected, rel=1e-5)  # features are float32
    assert 0 < scores["mean_gap"]["error"] < scores["mean_gap"]["value"]
    assert scores["mean_gap"]["label"] == "mean gap-coarse-40"
    assert "mean gap-coarse-40" in done.out
    assert record["metrics"]["mean_gap"] == {"p": 1.0}
