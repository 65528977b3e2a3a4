"""`python -m sde.likelihood` from end to end: every example counted, files that agree, one sentence for a mistake."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sde.data import Split
from sde.distributed import World
from sde.likelihood import mean_and_error
from sde.runs import Run
from sde.training.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from sde.training.metrics import MetricsFile, append_metrics, read_metrics
from tests.commands import TINY, Answer, command
from tests.test_logging import install

QUICK = [
    "solver=heun",
    "steps=3",
    "divergence=hutchinson",
]  # far from the ODE's answer, and as good for what is tested here


@pytest.fixture(scope="module")
def pixel_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run runs/g of class-conditional dequantized digits, whose test split has 21."""
    folder = tmp_path_factory.mktemp("pixels")
    options = ["data.characters=digits", "conditional=true", "training.dequantize=true", "hydra.run.dir=runs/g"]
    done = command("sde.train", *TINY, *options, folder=folder)
    assert done.code == 0, done.err
    return folder


def evaluated(folder: Path, *arguments: str, out: str) -> tuple[dict[str, Any], list[dict[str, str]], Answer]:
    """likelihood.json, the rows of pictures.csv, and what the command printed."""
    done = command("sde.likelihood", *arguments, f"out={out}", folder=folder)
    assert done.code == 0, done.err
    return (*read(folder / out), done)


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    summary: dict[str, Any] = json.loads((folder / "likelihood.json").read_text())
    with (folder / "pictures.csv").open() as file:
        return summary, list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


@pytest.fixture(scope="module")
def whole(pixel_run: Path) -> tuple[dict[str, Any], list[dict[str, str]], Answer]:
    """What is found of the whole split."""
    return evaluated(pixel_run, *QUICK, "batch_size=8", out="eights")


# What is counted


def test_every_picture_has_its_row_whatever_the_batch(pixel_run: Path, whole: Any) -> None:
    """The whole split, with a last batch that is not full; the same numbers from batches of another size."""
    summary, rows, done = whole
    n = summary["split_size"]
    assert n % 8
    assert [int(row["index"]) for row in rows] == list(range(n))
    assert summary["n"] == summary["asked_for"] == n
    bits = column(rows, "bits_per_dim")
    assert summary["bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-12)
    assert summary["standard_error"] == pytest.approx(bits.std(ddof=1) / math.sqrt(n), rel=1e-9)
    assert summary["median"] == pytest.approx(np.median(bits))
    np.testing.assert_allclose(column(rows, "log_prob"), -bits * 64 * math.log(2), rtol=1e-9)
    parts = [name for name in rows[0] if name.startswith("bits_") and name != "bits_per_dim"]
    assert set(parts) == {"bits_density", "bits_width"}
    np.testing.assert_allclose(sum(column(rows, name) for name in parts), bits, rtol=1e-9)
    assert f"{summary['bits_per_dim']:.4f} +- {summary['standard_error']:.4f} bits/dim" in done.out
    assert "+-" in done.err.splitlines()[-1]  # the progress bar
    with pytest.MonkeyPatch.context() as patch:  # which shows no mean of a part of the examples
        patch.setattr("sde.likelihood.world", lambda: World(0, 2))
        _, _, shared = evaluated(pixel_run, *QUICK, "batch_size=8", "n=16", out="shared")
    assert "+-" not in shared.err
    assert "likelihood: 100%" in shared.err
    _, others, _ = evaluated(pixel_run, *QUICK, "batch_size=5", out="fives")
    np.testing.assert_allclose(column(others, "bits_per_dim"), bits, atol=2e-5)  # float32
    _, others, _ = evaluated(pixel_run, *QUICK, "seed=1", out="seed")
    assert (abs(column(others, "bits_per_dim") - bits) > 1e-4).all()
    for name in ("fives", "seed"):
        shutil.rmtree(pixel_run / name)


def test_a_subset_is_a_fixed_random_one(pixel_run: Path, whole: Any) -> None:
    """The first n of one shuffle: the same pictures with the same numbers as in the whole, and not the first ones."""
    by_index = {row["index"]: float(row["bits_per_dim"]) for row in whole[1]}
    chosen = {}
    for seed, n in ((0, 4), (0, 9), (1, 9)):
        _, rows, _ = evaluated(pixel_run, *QUICK, f"n={n}", f"seed={seed}", out="some")
        chosen[seed, n] = {row["index"] for row in rows}
        assert len(chosen[seed, n]) == n
        if seed == 0:
            for row in rows:
                assert float(row["bits_per_dim"]) == pytest.approx(by_index[row["index"]], abs=2e-5)
        shutil.rmtree(pixel_run / "some")
    assert chosen[0, 4] < chosen[0, 9]
    assert chosen[0, 9] != chosen[1, 9]
    assert max(int(k) for k in chosen[0, 9]) > 9


def test_labels_are_the_datas_own_unless_one_is_given(pixel_run: Path) -> None:
    _, own, _ = evaluated(pixel_run, *QUICK, "n=6", out="own")
    _, three, _ = evaluated(pixel_run, *QUICK, "n=6", "label=3", out="three")
    same = np.array([row["label"] == "3" for row in own])
    differs = abs(column(own, "bits_per_dim") - column(three, "bits_per_dim")) > 1e-6
    assert [row["label"] for row in own] == [row["label"] for row in three]
    assert not (differs & same).any()
    assert differs[~same].any()
    for name in ("own", "three"):
        shutil.rmtree(pixel_run / name)


# Ways


@pytest.mark.parametrize(
    ("arguments", "folder", "parts"),
    [
        ([*QUICK, "divergence.probes=2"], "ode-uniform-test-seed0", {"density", "width"}),
        ([*QUICK, "dequantization=decoder"], "ode-decoder-test-seed0", {"density", "decoder", "noise"}),
        (["method=continuous_bound", "bound.steps=3"], "continuous_bound-uniform-test-seed0", None),
        (
            ["method=discrete_bound", "bound.steps=3", "dequantization=decoder", "split=train", "seed=2"],
            "discrete_bound-decoder-train-seed2",
            {"prior", "diffusion", "decoder"},
        ),
    ],
)
def test_what_is_written_for_pictures(
    arguments: list[str], folder: str, parts: set[str] | None, pixel_run: Path
) -> None:
    run = pixel_run / "runs" / "g"
    lines = (run / "metrics.jsonl").read_text()
    done = command("sde.likelihood", *arguments, "n=3", folder=pixel_run)
    assert done.code == 0, done.err
    place = run / "likelihood" / folder
    summary, rows = read(place)
    assert set(summary["parts"]) == (parts or {"prior", "diffusion", "decoder", "width"})
    assert sum(summary["parts"].values()) == pytest.approx(summary["bits_per_dim"], rel=1e-9)
    assert summary["meaning"].startswith("upper bound")
    assert summary["meaning"] in done.out
    bound = "terms.csv" in {path.name for path in place.iterdir()}
    assert sorted(path.name for path in place.iterdir()) == sorted(
        ["best_worst.png", "histogram.png", "likelihood.json", "pictures.csv"]
        + (["terms.csv", "terms.png"] if bound else [])
    )
    assert bound == ("bound" in folder)
    if bound:
        with (place / "terms.csv").open() as file:
            terms = list(csv.DictReader(file))
        assert len(terms) == 3
        assert column(terms, "bits_per_dim").sum() == pytest.approx(summary["parts"]["diffusion"], rel=1e-9)
        assert all(row["trace_error"] == "" for row in rows)
    else:
        assert summary["steps"] == 3
        assert all((row["trace_error"] == "") == (summary["divergence_options"]["probes"] == 1) for row in rows)
    width = 2 / 255
    assert summary["quantization"] == {"low": -1.0, "high": 1.0, "levels": 256, "width": width}
    if summary["dequantization"] == "decoder":
        assert summary["noise_level_at_t_min"] == pytest.approx(width / 4, rel=1e-6)
    for path in place.glob("*.png"):
        with Image.open(path) as image:
            assert image.size[0] > 100
    # the run's record has one line more, and the rest as it was
    after = (run / "metrics.jsonl").read_text()
    assert after.startswith(lines)
    (line,) = after[len(lines) :].splitlines()
    split = summary["split"]
    found = json.loads(line)
    assert found["step"] == 4
    assert found[f"likelihood/{split}/bits_per_dim"] == summary["bits_per_dim"]
    assert found[f"likelihood/{split}/kind"] == f"{summary['method']}-{summary['dequantization']}"


def test_a_trained_dequantizer_is_used(pixel_run: Path) -> None:
    refused = command("sde.likelihood", "dequantization=variational", *QUICK, "n=2", folder=pixel_run)
    assert refused.code == 2
    assert "python -m sde.dequantize run=" in refused.sentence
    small = ["flow.channels=4", "flow.blocks=1", "flow.layers=2", "flow.bins=4", "training.batch_size=4"]
    short = ["training.steps=2", "training.log_every=1", "training.validation_examples=4"]
    done = command("sde.dequantize", *small, *short, folder=pixel_run)
    assert done.code == 0, done.err
    summary, rows, _ = evaluated(
        pixel_run, "dequantization=variational", *QUICK, "n=3", "draws=2", "importance=true", out="variational"
    )
    assert set(summary["parts"]) == {"density", "width", "dequantizer"}
    assert (summary["draws"], summary["importance"]) == (2, True)
    assert "importance-weighted, 2 draws" in summary["meaning"]
    assert all(row["standard_error"] == "" for row in rows)  # two weights do not tell
    # weighted by importance: not below the mean of the two, the sum of the parts
    assert summary["bits_per_dim"] <= sum(summary["parts"].values()) + 1e-12
    shutil.rmtree(pixel_run / "variational")


def test_points_in_the_plane_have_a_density(point_run: Path) -> None:
    """Exact traces, the default in two dimensions; one entry per dimension; and a picture of the density."""
    summary, rows, _ = evaluated(point_run, "n=20", "density_side=12", "solver=heun", "steps=6", out="p")
    assert (summary["method"], summary["dequantization"], summary["divergence"]) == ("ode", "none", "exact")
    assert summary["quantization"] is None
    assert "no bound" in summary["meaning"]
    assert summary["bits_per_dim"] == pytest.approx(-summary["log_prob"] / (2 * math.log(2)), rel=1e-9)
    assert all(float(row["trace_error"]) == 0 and row["standard_error"] == "" for row in rows)
    assert np.isfinite(column(rows, "truncation")).all()
    assert "label" in rows[0]
    assert sorted(path.name for path in (point_run / "p").iterdir()) == [
        "density.png",
        "histogram.png",
        "likelihood.json",
        "pictures.csv",
    ]
    summary, _, _ = evaluated(point_run, "method=continuous_bound", "n=20", "bound.steps=8", out="b")
    assert "reverse SDE" in summary["meaning"]
    assert not (point_run / "b" / "density.png").exists()
    for name in ("p", "b"):
        shutil.rmtree(point_run / name)


def test_auto_takes_a_decoder_for_pictures_that_were_not_dequantized(pixel_run: Path, tmp_path: Path) -> None:
    content = load_checkpoint(checkpoint_path(pixel_run / "runs" / "g" / "checkpoints", 4)).content
    content["config"]["training"]["dequantize"] = False
    save_checkpoint(tmp_path / "r" / "checkpoints", content)
    summary, _, done = evaluated(tmp_path, *QUICK, "run=r", "n=2", out="auto")
    assert summary["dequantization"] == "decoder"
    assert "warning" not in done.err
    summary, _, done = evaluated(tmp_path, *QUICK, "run=r", "n=2", "dequantization=uniform", out="uniform")
    assert "warning: the run was trained without training.dequantize=true" in done.err
    assert not (tmp_path / "r" / "metrics.jsonl").exists()  # this run has no record to add to


# Data


def test_data_that_have_moved(tmp_path: Path) -> None:
    """Options of the data replace the run's, and a message names the one to give."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    options = [o for o in TINY if not o.startswith("data.")]
    path = tmp_path / "a.npz"
    done = command("sde.train", *options, "data=npz", f"data.path={path}", "hydra.run.dir=r", folder=tmp_path)
    assert done.code == 0, done.err
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    missing = command("sde.likelihood", *QUICK, "run=r", "split=train", folder=tmp_path)
    assert missing.code == 2
    assert "a.npz" in missing.sentence
    assert "data.path=" in missing.sentence
    moved = f"data.path={tmp_path / 'b.npz'}"
    empty = command("sde.likelihood", *QUICK, "run=r", moved, "data.test_fraction=0", folder=tmp_path)
    assert empty.code == 2
    assert "no test split" in empty.sentence
    assert "data.path=" not in empty.sentence
    summary, _, _ = evaluated(tmp_path, *QUICK, "run=r", moved, "data.split=train", "n=2", out="found")
    assert summary["split"] == "train"
    assert not (tmp_path / "r" / "likelihood").exists()


def test_a_split_without_examples(point_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("sde.likelihood")
    original = module.run_dataset

    def without_test(*arguments: Any) -> Any:
        dataset = original(*arguments)
        monkeypatch.setattr(type(dataset), "split", lambda self, name: Split(torch.zeros(0, 2)))
        return dataset

    monkeypatch.setattr(module, "run_dataset", without_test)
    refused(point_run, [], ["split=test of moons is empty", "take split=train"])


# Interruption


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_keeps_what_is_done(
    number: int, code: int, pixel_run: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_index = {row["index"]: float(row["bits_per_dim"]) for row in whole[1]}
    module = importlib.import_module("sde.density.likelihood")
    original, batches = module.discrete_log_prob, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        batches.append(1)
        if len(batches) == 3:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(module, "discrete_log_prob", interrupted)
    done = command("sde.likelihood", *QUICK, "n=12", "batch_size=3", "out=part", folder=pixel_run)
    assert done.code == code
    assert "6 of 12 are in part" in done.sentence
    summary, rows = read(pixel_run / "part")
    assert (summary["n"], summary["asked_for"], len(rows)) == (6, 12, 6)
    for row in rows:
        assert float(row["bits_per_dim"]) == pytest.approx(by_index[row["index"]], abs=2e-5)
    batches[:] = [1, 1]
    done = command("sde.likelihood", *QUICK, "n=12", "batch_size=3", "out=nothing", folder=pixel_run)
    assert (done.code, done.sentence) == (code, "interrupted; nothing was left half-written")
    assert not (pixel_run / "nothing").exists()
    shutil.rmtree(pixel_run / "part")


# The record


def test_a_line_is_added_while_a_training_writes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    training = MetricsFile(path)
    training.log(10, {"loss": 1.0})
    append_metrics(path, 5, {"bits": 2.0, "error": math.nan}, {"kind": "ode"})
    training.log(20, {"loss": 0.5})
    training.close()
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [10, 5, 20]
    assert lines[1] == {"step": 5, "bits": 2.0, "error": None, "kind": "ode"}
    # a training that goes on keeps it, and its own clock
    append_metrics(path, 20, {"bits": 3.0})
    MetricsFile(path, 20).close()
    assert [line["step"] for line in read_metrics(path)] == [10, 5, 20, 20]
    again = MetricsFile(path, 20)
    again.log(30, {})
    again.close()
    assert read_metrics(path)[-1]["seconds"] >= lines[2]["seconds"]


def test_a_line_that_was_cut_off_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    append_metrics(path, 1, {"bits": 2.0})
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 1, "bits": 2.0}]


def test_the_clock_of_a_training_that_goes_on_is_the_last_of_training(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 500.0}\n')
    append_metrics(path, 1, {"bits": 2.0})
    training = MetricsFile(path, 1)
    training.log(2, {})
    training.close()
    assert read_metrics(path)[-1]["seconds"] >= 500


def test_wandb_gets_it_beside_trainings_own_steps(point_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the run's own W&B run, on an axis of its own, and in the summary."""
    wandb: Any = install(monkeypatch)
    run = point_run / "runs" / "p"
    (run / "wandb-id.txt").write_text("own123")
    arguments = ["logger=wandb", "method=continuous_bound", "bound.steps=2", "n=4"]
    summary, _, _ = evaluated(point_run, *arguments, out="w")
    assert wandb.started[0]["id"] == "own123"
    ((_, values),) = wandb.logged
    assert values["evaluation/step"] == 20
    assert values["likelihood/test/bits_per_dim"] == summary["bits_per_dim"]
    assert values["likelihood/test/histogram"] == ("image", True, "step 20")
    assert wandb.axes["likelihood/test/bits_per_dim"] == {"step_metric": "evaluation/step"}
    assert wandb.summary["likelihood/test/bits_per_dim"] == summary["bits_per_dim"]
    assert wandb.codes == [0]
    with Run(run).locked():  # by a training
        _, _, done = evaluated(point_run, *arguments, out="v")
    assert "is being trained, so its W&B run was left alone" in done.err
    assert len(wandb.logged) == 1
    (run / "wandb-id.txt").unlink()
    for name in ("w", "v"):
        shutil.rmtree(point_run / name)


def test_the_error_of_one_is_not_known() -> None:
    assert mean_and_error(torch.tensor([2.0])) == (2.0, None)


# Mistakes

PIXELS = [
    (["dequantization=none"], ["dequantization=none", "take uniform, variational or decoder"]),
    (["dequantization=even"], ["dequantization='even'", "auto, uniform"]),
    (["method=elbo"], ["method='elbo'", "continuous_bound"]),
    (["solver=pc"], ["solver=pc cannot go from data to noise", "dopri5"]),
    (["solver=heun", "solver.s_churn=3"], ["solver=heun cannot go from data to noise", "without noise"]),
    (["solver=heun", "solver.final=tweedie"], ["solver.final=none"]),
    (["steps=5"], ["steps means nothing to AdamsAdaptive"]),
    (["steps=5", "method=continuous_bound"], ["steps=5", "bound.steps"]),
    (["bound.steps=5"], ["bound.steps=5 means nothing to method=ode"]),
    (["bound.variance=forward", "method=continuous_bound"], ["bound.variance=forward means nothing"]),
    (["bound.variance=big", "method=discrete_bound", "bound.steps=2"], ["variance='big'"]),
    (["bound.steps=0", "method=discrete_bound"], ["bound.steps=0", "at least 1"]),
    (["n=1000"], ["n=1000 is more than the", "split=test"]),
    (["n=0"], ["n=0", "at least 1"]),
    (["n=two"], ["n='two'", "whole number"]),
    (["batch_size=0"], ["batch_size=0"]),
    (["draws=0"], ["draws=0"]),
    (["seed=-1"], ["seed=-1"]),
    (["split=val"], ["split='val'", "train, test"]),
    (["t_min=2"], ["t_min=2", "below 1"]),
    (["t_min=1e-9"], ["t_min=1e-09", "at least 1e-05"]),
    (["t_min=early"], ["t_min='early' is not a number"]),
    (["importance=true", "method=continuous_bound", "bound.steps=2"], ["importance=true", "method=ode"]),
    (["importance=true"], ["importance=true", "take draws=8"]),
    (["method=continuous_bound", "solver=heun"], ["solver=heun means nothing to method=continuous_bound"]),
    (["method=continuous_bound", "grid=edm"], ["grid=edm means nothing"]),
    (["method=discrete_bound", "bound.steps=2", "divergence=exact"], ["divergence=exact means nothing"]),
    (["method=discrete_bound", "bound.steps=2", "bound.subset=3"], ["bound.subset=3 is more than the bound.steps=2"]),
    (["data.root=nowhere", "data=mnist"], ["data.root=..."]),
    (["decoder=softmax"], ["decoder=softmax", "dequantization=decoder"]),
    (["dequantization=decoder", "decoder=logistic"], ["decoder='logistic'", "gaussian, softmax"]),
    (["dequantization=decoder", "decoder=softmax", "decoder_std=1"], ["decoder_std=1"]),
    (["label=[1,2]"], ["label=[1, 2] is not one class"]),
    (["label=12"], ["label=12 is not a class"]),
    (["precision=bf16"], ["precision=bf16", "take fp32"]),
    (["compile=graphs"], ["compile=graphs"]),
    (["divergence=hutchpp", "divergence.rank=65"], ["divergence.rank=65", "64 dimensions"]),
    (["divergence=exactly"], ["divergence=exactly", "did you mean 'exact'"]),
    (["data.size=16"], ["shape=(1, 16, 16)", "shape=(1, 8, 8)"]),
    (["data.charakters=digits"], ["data.charakters", "did you mean 'characters'"]),
    (["data.test_fraction=0"], ["no test split", "test_fraction"]),
    (["drws=2"], ["'drws'", "did you mean 'draws'"]),
    (["run=nope"], ["run=nope", "does not exist"]),
    (["checkpoint=7"], ["checkpoint=7", "4"]),
    (["out=runs"], ["out=runs", "not empty"]),
]
POINTS = [
    (["dequantization=uniform"], ["dequantization=uniform is for pixels", "vectors"]),
    (["importance=true"], ["importance=true weighs draws"]),
    (["draws=3"], ["draws=3 of an exact density are all alike"]),
    (["density_side=1"], ["density_side=1"]),
    (["label=1"], ["label=1", "conditional=true"]),
]


def refused(folder: Path, arguments: list[str], expected: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    done = command("sde.likelihood", *arguments, folder=folder)
    assert done.code == 2, done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert done.err.startswith("error: ")
    for text in expected:
        assert text in done.err, done.err
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == before


@pytest.mark.parametrize(("arguments", "expected"), PIXELS, ids=[" ".join(a) for a, _ in PIXELS])
def test_a_mistake_gets_one_sentence(arguments: list[str], expected: list[str], pixel_run: Path) -> None:
    refused(pixel_run, arguments, expected)


@pytest.mark.parametrize(("arguments", "expected"), POINTS, ids=[" ".join(a) for a, _ in POINTS])
def test_a_mistake_with_points_gets_one_sentence(arguments: list[str], expected: list[str], point_run: Path) -> None:
    refused(point_run, arguments, expected)


def test_no_run(tmp_path: Path) -> None:
    done = command("sde.likelihood", folder=tmp_path)
    assert done.code == 2
    assert "there is no run" in done.sentence
