"""`python -m sde.evaluate` from end to end: its numbers are those of the metrics by hand, whatever the way to them."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sde.data import DATASETS, Dataset, Order
from sde.denoiser import GaussianMixtureDenoiser
from sde.evaluate_results import errors_of
from sde.evaluation import samples as drawing
from sde.evaluation.extractors import EXTRACTORS, Extractor
from sde.evaluation.gaussian import ToGaussian
from sde.evaluation.model import Asked
from sde.evaluation.overview import names_of
from sde.evaluation.reference import Statistics
from sde.evaluation.scores import label_of, score, with_error
from sde.metrics import METRICS, Sets
from sde.processes import VP
from sde.training.metrics import read_metrics
from tests.commands import TINY, TINY_2D, Answer, command
from tests.distributed_worker import Worlds
from tests.test_logging import install

DRAWN = ["solver=heun", "steps=2", "n=40", "features=random", "groups=4"]
DIGITS = {"characters": "digits", "size": 8}


@pytest.fixture(scope="module")
def pixel_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run runs/g of class-conditional digits: 198 in the training split, 22 in the other."""
    folder = tmp_path_factory.mktemp("pixels")
    done = command(
        "sde.train", *TINY, "data.characters=digits", "conditional=true", "hydra.run.dir=runs/g", folder=folder
    )
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def point_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run runs/p of points in the plane."""
    folder = tmp_path_factory.mktemp("points")
    done = command("sde.train", *TINY_2D, "hydra.run.dir=runs/p", folder=folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return DATASETS.get("glyphs")(**DIGITS)


@pytest.fixture(scope="module")
def random_features(digits: Dataset) -> Extractor:
    extractor = EXTRACTORS.get("random")()
    extractor.prepare(digits, torch.device("cpu"))
    return extractor


@pytest.fixture(scope="module")
def drawn(pixel_run: Path) -> dict[str, Any]:
    """The record of an evaluation that others are compared with."""
    return evaluated(pixel_run, *DRAWN, "metric=[fd,kid,swd]", out="drawn")


def evaluated(folder: Path, *arguments: str, out: str) -> dict[str, Any]:
    """The record of an evaluation into a folder of its own."""
    done = command("sde.evaluate", *arguments, f"out={out}", folder=folder)
    assert done.code == 0, done.err
    path = next(Path(line) for line in done.out.splitlines() if line.endswith(".json"))
    return read(folder / path)


def read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def values(record: dict[str, Any], name: str = "value") -> dict[str, float]:
    return {each["name"]: each[name] for each in record["scores"]}


def write(path: Path, x: Tensor) -> str:
    """Pictures (N, C, H, W) or points as samples=; gives the override."""
    np.savez(path, samples=x.permute(0, 2, 3, 1).numpy() if x.ndim == 4 else x.numpy())
    return f"samples={path}"


# Numbers


def test_numbers_are_those_of_the_metrics(
    pixel_run: Path, digits: Dataset, random_features: Extractor, drawn: dict[str, Any]
) -> None:
    """The same samples by python -m sde.sample, the metrics called by hand: values, errors, floors, fewer samples."""
    done = command("sde.sample", *DRAWN[:3], "out=samples", folder=pixel_run)
    assert done.code == 0, done.err
    x = torch.from_numpy(np.load(pixel_run / "samples" / "samples.npz")["samples"]).permute(0, 3, 1, 2)
    train, test = digits.split("train").values, digits.split("test").values
    ours, reference, held_out = (random_features(each).features for each in (x, train, test))
    fewer = ours[Order(40, 22, 0)(0)]
    shuffled = held_out[Order(22, 22, 0)(0)]
    for name in ("fd", "kid"):
        metric = METRICS.get(name)()
        rows = Order(40, 22, 0)(0)
        for prefix, y, classes in (
            ("value", ours, torch.arange(40) % 10),
            ("floor", shuffled, None),
            ("value_at_floor_n", fewer, rows % 10),
        ):
            sets = Sets(y, reference, strata=classes).shuffled(4)
            expected, errors = metric(sets), metric.errors(sets, 4)
            error = {"value": "error", "floor": "floor_error", "value_at_floor_n": "error_at_floor_n"}[prefix]
            for key in expected:
                assert values(drawn, prefix)[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-9)
                assert values(drawn, error)[key] == pytest.approx(errors[key], rel=1e-5, abs=1e-9)
    data = digits.info.encode(train[Order(len(train), len(train), 1)(0)]).flatten(1)
    swd = METRICS.get("swd")()(Sets(digits.info.encode(x).flatten(1), data))  # whatever the order
    assert values(drawn)["swd"] == pytest.approx(swd["swd"], rel=1e-6)
    assert {each["floor_n"] for each in drawn["scores"]} == {22}
    assert [each["label"] for each in drawn["scores"]] == [
        "FD-random-40",
        "KID-random-40",
        "KID (std of subsets)-random-40",
        "SWD-40",
    ]
    assert drawn["cost"]["nfe"] == 5  # two steps of two evaluations, and one at the end
    assert drawn["sampling"]["label"] == "each class in turn"


def test_errors_of_samples_of_each_class_in_turn() -> None:
    """Ten classes in turn, against data in random order: every tenth example would be a class, which no set lacks."""
    centers = 5 * torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.Generator().manual_seed(1)
    metric, found, classes, naive = METRICS.get("fd")(), [], torch.arange(200) % 10, []
    for _ in range(40):
        others = torch.randperm(20_000, generator=draws) % 10
        x, y = (centers[each] + torch.randn(len(each), 4, generator=draws).double() for each in (classes, others))
        x = x + 1
        (scored,) = score("fd", metric, [Sets(x, y, strata=classes)], "none")
        found.append((scored.value, scored.error))
        naive.append(metric.errors(Sets(x, y))["fd"])
    spread = statistics.stdev(value for value, _ in found)
    assert 0.8 < statistics.fmean(error for _, error in found) / spread < 1.8
    assert statistics.fmean(naive) > 20 * spread
    for groups in (1, 7, 10):  # what takes consecutive examples finds all classes in them, as in any order
        order = Sets(x, y, strata=classes).shuffled(groups)
        assert len(order.strata[:60].unique()) == 10
        counts = [order.strata[group::groups].bincount(minlength=10) for group in range(groups)]
        assert max(int(count.max() - count.min()) for count in counts) <= 1
        assert torch.equal(order.generated.sort(0).values, x.sort(0).values)


@pytest.mark.parametrize("way", ["other batches", "npz", "folder"])
def test_every_way_to_the_same_samples(
    way: str, pixel_run: Path, drawn: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if way == "other batches":
        found = evaluated(pixel_run, *DRAWN, "metric=[fd,kid,swd]", "batch_size=7", out=str(tmp_path / "o"))
        assert values(found) == pytest.approx(values(drawn), rel=1e-6, abs=1e-9)
        return
    done = command("sde.sample", *DRAWN[:3], f"out={tmp_path / 's'}", folder=pixel_run)
    assert done.code == 0, done.err
    source = tmp_path / "s" / "samples.npz"
    if way == "folder":
        pictures = tmp_path / "pictures"
        pictures.mkdir()
        for k, picture in enumerate(np.load(source)["samples"]):
            Image.fromarray(picture[..., 0]).save(pictures / f"{k:03d}.png")
        source = pictures
    options = [f"samples={source}", "features=random", "groups=4", "metric=[fd,kid,swd]", "batch_size=16"]
    found = evaluated(pixel_run, *options, out=str(tmp_path / "o"))
    assert values(found)["fd"] == pytest.approx(values(drawn)["fd"], rel=1e-6)
    assert values(found) == pytest.approx(values(drawn), rel=1e-6, abs=1e-9)
    assert found["sampling"]["file"]["n"] == 40
    if way == "npz":  # an info.json says how they were drawn
        assert found["cost"]["nfe"] == 5
        assert found["sampling"]["drawn"]["solver"] == "heun"
        assert found["sampling"]["of_the_model"]
        last = evaluated(pixel_run, *options, "ema=false", out=str(tmp_path / "last"))
        assert not last["sampling"]["of_the_model"]  # they are of the averaged weights
        assert values(found)["fd"] == read_metrics(pixel_run / "runs/g/metrics.jsonl")[-1]["evaluation/FD-random-40"]
    else:
        assert "nfe" not in found["cost"]
        assert not found["sampling"]["of_the_model"]


def test_samples_of_others_are_not_the_models(pixel_run: Path, tmp_path: Path) -> None:
    """What is in a file tells evaluations apart, and no number of foreign samples becomes one of the run."""
    lines = len(read_metrics(pixel_run / "runs/g/metrics.jsonl"))
    options = ["features=random", "groups=3", "metric=fd", f"out={tmp_path / 'o'}"]
    for seed in (0, 1, 1):
        x = torch.randint(0, 256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        done = command("sde.evaluate", write(tmp_path / "x.npz", x), *options, folder=pixel_run)
        assert done.code == 0, done.err
        assert "nothing says that these samples are of its checkpoint" in done.out
    assert len(read_metrics(pixel_run / "runs/g/metrics.jsonl")) == lines
    records = [read(path) for path in (tmp_path / "o").glob("*.json")]
    digests = {record["sampling"]["digest"] for record in records}
    assert len(records) == len(digests) == 2
    table = (tmp_path / "o" / "table.md").read_text()
    card = next((tmp_path / "o").glob("x-*.md")).read_text()
    assert all(f"content {digest[:8]}" in table for digest in digests)
    assert "nothing says that the samples are its own" in card
    assert any(f"SHA-256 {digest[:16]}" in card for digest in digests)


def test_a_column_is_of_the_same_options(point_run: Path, tmp_path: Path) -> None:
    """The same name under other options of the metric, or of other seeds, never shares a column, a row or a curve."""
    options = ["solver=euler", "n=20", "groups=2", f"out={tmp_path / 'o'}"]
    for words in (
        ["metric=swd", "steps=2", "swd.p=1"],
        ["metric=swd", "steps=3", "swd.p=2"],
        ["metric=swd", "steps=4", "swd.p=2"],
        ["metric=wasserstein", "steps=2", "seeds=[7]"],
    ):
        done = command("sde.evaluate", *options, *words, folder=point_run)
        assert done.code == 0, done.err
    header, _, *rows = [line for line in (tmp_path / "o" / "table.md").read_text().splitlines() if line[:1] == "|"]
    titles = [title.strip() for title in header.split("|")[1:-1]]
    cells = [dict(zip(titles, map(str.strip, row.split("|")[1:-1]), strict=True)) for row in rows]
    assert {"SWD-20 (p 1)", "SWD-20 (p 2)", "Wasserstein-20"} < {*titles}
    filled = [[title for title in titles[4:] if cell[title]] for cell in cells if cell["NFE"]]
    assert sorted(filled) == [["SWD-20 (p 1)"], ["SWD-20 (p 2)"], ["SWD-20 (p 2)"], ["Wasserstein-20"]]
    assert {cell["sets"] for cell in cells if cell["NFE"] == "3"} == {"1 (seeds 0)", "1 (seeds 7)"}
    curves = {path.name for path in (tmp_path / "o").glob("quality_cost_*")}
    assert curves == {"quality_cost_swd_swd__p_2.png"}


def test_few_sets_cover_less(pixel_run: Path) -> None:
    """+- one and two standard errors of k normal numbers cover what Student's t says: 0.58 and 0.82 for three."""
    assert "+- 1 covers 58% and +- 2 82%" in errors_of(10, 3, False)
    assert "covers 50%" in errors_of(10, 2, False)  # Cauchy
    draws = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covered = (draws.mean(1).abs() <= draws.std(1) / math.sqrt(3)).double().mean()
    assert float(covered) == pytest.approx(0.5774, abs=0.015)


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[Worlds]:
    (tmp_path / "notes").mkdir()
    made = Worlds(tmp_path / "notes")
    yield made
    made.close()


def test_two_processes_find_the_numbers_of_one(
    worlds: Worlds, pixel_run: Path, drawn: dict[str, Any], tmp_path: Path
) -> None:
    words = [*DRAWN, "metric=[fd,kid,swd]", "batch_size=8", f"out={tmp_path / 'two'}"]
    for code, _, err in worlds.command(2, "sde.evaluate", *words, folder=pixel_run):
        assert code == 0, err
    (path,) = (tmp_path / "two").glob("*.json")
    for name in ("value", "error", "floor"):
        assert values(read(path), name) == pytest.approx(values(drawn, name), rel=1e-6, abs=1e-9)
    assert not list((tmp_path / "two").glob(".*"))


def test_two_processes_find_the_likelihood_of_one(worlds: Worlds, point_run: Path, tmp_path: Path) -> None:
    words = [write(tmp_path / "x.npz", torch.randn(12, 2)), "metric=energy", "groups=2", "batch_size=2"]
    words += ["diagnostics=likelihood", "diagnostics_options.examples=5"]
    for code, _, err in worlds.command(2, "sde.evaluate", *words, f"out={tmp_path / 'two'}", folder=point_run):
        assert code == 0, err
    (path,) = (tmp_path / "two").glob("*.json")
    found = read(path)["likelihood_of_splits"]
    alone = evaluated(point_run, *words, out=str(tmp_path / "one"))["likelihood_of_splits"]
    for split in ("train", "test", "gap"):
        for name in ("bits_per_dim", "standard_error", "log_prob", "least", "most", "truncation", "n", "nfe"):
            if split != "gap" or name in found[split]:
                assert found[split][name] == pytest.approx(alone[split][name], rel=1e-6), name


def test_several_seeds_tell_their_spread(pixel_run: Path, drawn: dict[str, Any], tmp_path: Path) -> None:
    options = [*DRAWN, "metric=[fd,kid]"]
    found = evaluated(pixel_run, *options, "seeds=[0,1,2]", out=str(tmp_path / "several"))
    alone = evaluated(pixel_run, *options, "seeds=[2]", out=str(tmp_path / "alone"))
    for each in found["scores"]:
        assert each["value"] == pytest.approx(statistics.fmean(each["by_set"]))
        assert each["error"] == pytest.approx(statistics.stdev(each["by_set"]) / math.sqrt(3))
        assert each["by_set"][0] == pytest.approx(values(drawn)[each["name"]], rel=1e-9, abs=1e-12)
        assert each["by_set"][2] == pytest.approx(values(alone)[each["name"]], rel=1e-9, abs=1e-12)
    assert len(set(found["scores"][0]["by_set"])) == 3
    assert "3 sets" in found["errors_of"]


def test_held_out_data_as_samples_are_the_floor(pixel_run: Path, digits: Dataset, tmp_path: Path) -> None:
    test = digits.split("test").values
    options = [write(tmp_path / "test.npz", test), "features=random", "metric=[fd,kid]"]
    record = evaluated(pixel_run, *options, "groups=4", out=str(tmp_path / "o"))
    assert values(record)["fd"] == pytest.approx(values(record, "floor")["fd"], rel=1e-9)
    assert abs(values(record)["kid"]) < 3 * values(record, "error")["kid"]  # unbiased: zero but for chance
    assert values(record, "value_at_floor_n")["fd"] is None  # there are no more of them


def test_noise_makes_every_number_worse(pixel_run: Path, digits: Dataset, tmp_path: Path) -> None:
    clean = digits.split("train").values[Order(198, 60, 3)(0)]
    z = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for std in (0, 8, 24, 72):
        x = (clean + std * z).round().clamp(0, 255).to(torch.uint8)
        options = [write(tmp_path / f"{std}.npz", x), "features=random", "metric=[fd,mmd,swd]", "groups=4"]
        found.append(values(evaluated(pixel_run, *options, out=str(tmp_path / "o"))))
    for name in ("fd", "mmd", "swd"):
        assert [each[name] for each in found] == sorted(each[name] for each in found), name
        assert found[3][name] > found[0][name]


def test_a_classifier_gives_scores_of_labels(pixel_run: Path, tmp_path: Path) -> None:
    options = [
        "solver=euler",
        "steps=1",
        "n=24",
        "features=classifier",
        "features.steps=4",
        "features.width=4",
        "is.splits=2",
    ]
    record = evaluated(pixel_run, *options, "groups=3", "pr.examples=16", out=str(tmp_path / "o"))
    assert {each["metric"] for each in record["scores"]} == {"fd", "kid", "pr", "dc", "is"}
    labels = {each["name"]: each["label"] for each in record["scores"]}
    assert labels["fd"] == "FD-classifier-24"
    assert (labels["recall"], labels["coverage"]) == ("recall-classifier-16", "coverage-classifier-24")
    (card,) = (tmp_path / "o").glob("euler*.md")
    drawn = "of 16 samples and 16 examples of the data, drawn by seed 0 where there are more (pr.examples=16)"
    assert drawn in card.read_text()
    file = record["features"]["file"]
    for words in (["features=module", f"features.path={file}"], [f"features.path={file}"], [f"features={file}"]):
        again = evaluated(pixel_run, *options[:3], *words, "metric=fd", "groups=3", out=str(tmp_path / "m"))
        assert values(again)["fd"] == pytest.approx(values(record)["fd"], rel=1e-9)
        assert again["scores"][0]["label"] == "FD-module-24"


def test_points_in_the_plane(point_run: Path, tmp_path: Path) -> None:
    """What suits them, exact distances among it; held-out points are at the floor."""
    record = evaluated(point_run, "solver=heun", "steps=4", "n=64", "groups=4", out=str(tmp_path / "o"))
    assert {each["metric"] for each in record["scores"]} == {"wasserstein", "grid_kl", "energy", "swd", "c2st"}
    assert record["features"]["features"] == "none"
    assert all(each["floor"] is not None for each in record["scores"])
    assert "| data themselves |" in (tmp_path / "o" / "table.md").read_text()
    assert (tmp_path / "o" / next(iter(record["pictures"]))).is_file()


# What is written


def test_the_card_states_what_the_numbers_depend_on(pixel_run: Path) -> None:
    lines = len(read_metrics(pixel_run / "runs/g/metrics.jsonl"))
    likelihood = command("sde.likelihood", "solver=heun", "steps=2", "divergence=hutchinson", "n=4", folder=pixel_run)
    assert likelihood.code == 0, likelihood.err
    asked = ["diagnostics=[denoising,curl,fokker_planck,score]", "diagnostics_options.levels=2"]
    done = command(
        "sde.evaluate", *DRAWN, "metric=[fd,memorization]", *asked, "diagnostics_options.examples=4", folder=pixel_run
    )
    assert done.code == 0, done.err
    folder = pixel_run / "runs/g/evaluations"
    name = "heun-2-random-40-step4"
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.json",
        f"{name}.md",
        f"{name}.png",
        f"{name}-nearest.png",
        f"{name}-diagnostics",
        "table.md",
    }  # no plot of a single point, nothing hidden
    card, record = (folder / f"{name}.md").read_text(), read(folder / f"{name}.json")
    for fact in (
        "rounded to the nearest whole number",
        "| compression | none",
        "| resizing | none |",
        record["features"]["identity"][:16],
        record["reference"]["hash"][:16],
        "split train, n 198, of 198",
        "40 of seed 0",
        "heun, 2 steps of the grid edm",
        "final tweedie",
        "precision fp32",
        "weights averaged",
        "each class in turn",
        f"torch {torch.__version__}",
        "device cpu",
        "nfe 5",
        "(n = 22)",
        "value at their n",
        "python -m sde.evaluate",
        "bits/dim of this checkpoint (ode-decoder, 4 of split=test, ema=True)",
        "(../likelihood/ode-decoder-test-seed0)",
        "denoising error gap",
        "fokker planck residual",
        "curl asymmetry",
        "0 would be a model that copies",
    ):
        assert fact in card, fact
    for part in card.split("](")[1:]:
        assert (folder / part.partition(")")[0]).exists(), part
    gap = record["diagnostics"][0]["curves"]["gap"]["values"]
    first, last = read_metrics(pixel_run / "runs/g/metrics.jsonl")[-2:]
    assert len(read_metrics(pixel_run / "runs/g/metrics.jsonl")) == lines + 2
    assert "likelihood/test/bits_per_dim" in first
    assert last["step"] == 4
    assert "seconds" not in last
    assert last["evaluation/FD-random-40"] == values(record)["fd"]
    assert last["evaluation/FD-random-40/error"] == values(record, "error")["fd"]
    assert last["evaluation/denoising_error/gap"] == pytest.approx(statistics.fmean(gap))
    assert last["evaluation/kind"] == name


def test_the_report_and_the_logger_have_the_numbers(pixel_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = install(monkeypatch)
    done = command("sde.evaluate", *DRAWN, "metric=fd", "logger=wandb", "out=logged", folder=pixel_run)
    assert done.code == 0, done.err
    told = {key: value for _, line in wandb.logged for key, value in line.items()}
    assert told["evaluation/FD-random-40"] > 0
    assert told["evaluation/heun-2-random-40-step4"][0] == "image"
    done = command("sde.report", "run=runs/g", "out=page.html", folder=pixel_run)
    assert done.code == 0, done.err
    assert "FD-random-40" in (pixel_run / "page.html").read_text()


def test_a_sweep_makes_a_table_and_curves(pixel_run: Path) -> None:
    options = ["features=random", "n=24", "groups=3", "metric=fd", "out=sweep"]
    done = command("sde.evaluate", "--multirun", *options, "solver=euler,heun", "steps=2,3", folder=pixel_run)
    assert done.code == 0, done.err
    folder = pixel_run / "sweep"
    rows = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in rows] == [
        ("euler", "3"),
        ("euler", "4"),
        ("heun", "5"),
        ("heun", "7"),
    ]
    assert {path.name for path in folder.glob("*.png") if path.name.startswith("quality")} == {
        "quality_cost_fd_fd.png",
    }
    # what else differs gets a name and a file of its own; the same settings replace what was there
    more = ["solver=heun", "steps=2", "denoise=false"]
    assert command("sde.evaluate", *options, *more, folder=pixel_run).code == 0
    assert command("sde.evaluate", *options, "solver=heun", "steps=2", folder=pixel_run).code == 0
    assert {path.stem for path in folder.glob("heun-2*.json")} == {
        "heun-2-random-24-step4",
        "heun-2-random-24-step4-2",
    }
    table = (folder / "table.md").read_text()
    assert "heun, denoise no" in table
    assert "heun, denoise yes" in table
    assert "data themselves" not in table  # held-out data are fewer than the samples


def test_what_was_given_up_goes_after_a_week(tmp_path: Path) -> None:
    for name, days in ((".samples-old", 8), (".samples-new", 6), ("other", 80)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00000000-00000008.safetensors").write_bytes(b"x")
        for path in (tmp_path / name / "00000000-00000008.safetensors", tmp_path / name):
            os.utime(path, (time.time() - days * 86400,) * 2)
    drawing.forget_given_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".samples-new", "other"]
    drawing.forget_given_up(tmp_path / "none")


# Going on


def test_an_interrupted_evaluation_goes_on(pixel_run: Path, drawn: dict[str, Any], tmp_path: Path) -> None:
    """What was drawn is kept, is not mixed with samples of other settings, and is gone in the end."""
    options = [*DRAWN, "metric=[fd,kid,swd]", "batch_size=8", f"out={tmp_path / 'o'}"]
    draw, starts, asked = drawing.draw_batch, list[int](), list[bool]()  # batches, and whether Ctrl-C was pressed

    def counting(denoiser: Any, plan: Any, indices: range, *rest: Any) -> Any:
        starts.append(indices.start)
        if indices.start == 16 and not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return draw(denoiser, plan, indices, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "draw_batch", counting)
        done = command("sde.evaluate", *options, folder=pixel_run)
        assert done.code == 130
        assert done.sentence == (
            "interrupted: 16 of 40 samples of seed 0 are kept, and the same command goes on from there"
        )
        assert not list((tmp_path / "o").glob("*.json"))
        (kept,) = (tmp_path / "o").glob(".samples-*")
        starts.clear()
        other = command("sde.evaluate", *[o.replace("steps=2", "steps=3") for o in options], folder=pixel_run)
        assert other.code == 0, other.err
        assert starts == [0, 8, 16, 24, 32]
        assert [path.name for path in (tmp_path / "o").glob(".*")] == [kept.name]
        starts.clear()
        first = next(kept.iterdir())
        with open(first, "r+b") as file:  # cut off, as by a full disk
            file.truncate(8)
        done = command("sde.evaluate", *options, folder=pixel_run)
        assert done.code == 0, done.err
    assert sorted(starts) == sorted([int(first.stem[:8]), 16, 24, 32])
    assert not list((tmp_path / "o").glob(".*"))
    assert values(read(tmp_path / "o/heun-2-random-40-step4.json")) == pytest.approx(values(drawn), rel=1e-6, abs=1e-9)


# References


def test_references_of_ones_own_and_of_others(pixel_run: Path, drawn: dict[str, Any], tmp_path: Path) -> None:
    for kind in ("npz", "safetensors"):
        options = [*DRAWN, "metric=fd", f"out={tmp_path / kind}"]
        assert command("sde.evaluate", *options, f"export={tmp_path / f'r.{kind}'}", folder=pixel_run).code == 0
        found = evaluated(
            pixel_run, *DRAWN, "metric=fd", f"reference={tmp_path / f'r.{kind}'}", out=str(tmp_path / "o")
        )
        for name in ("value", "floor", "value_at_floor_n"):
            assert values(found, name)["fd"] == pytest.approx(values(drawn, name)["fd"], rel=1e-6)
        if kind == "npz":
            assert "cannot be checked" in found["reference"]["note"]
            assert "of the samples" in found["errors_of"]
        else:
            assert found["reference"]["hash"] == drawn["reference"]["hash"]
    ours = f"reference={tmp_path / 'r.safetensors'}"
    for words, sentence in (
        ([ours, "features.seed=1"], "was made by another features=random"),
        ([ours, "features=none"], "holds features=random and these are features=none"),
        ([ours, "data.seed=3"], "make it anew"),
        ([ours, "reference_split=test"], "give one of the same data"),
        ([f"reference={tmp_path / 'r.npz'}", "metric=kid"], "which are enough for fd and not for kid"),
        ([f"reference={tmp_path / 'r.npz'}", "features=none"], "has 512 dimensions and the features have 64"),
        ([f"reference={tmp_path / 'r.npz'}", "fd.extrapolate=true"], "cannot be divided"),
        ([f"reference={tmp_path / 'none.npz'}"], "does not exist"),
        ([ours, "reference_n=10"], "leave reference_n out"),
    ):
        done = command("sde.evaluate", *DRAWN, "metric=fd", *words, "out=never", folder=pixel_run)
        assert done.code == 2
        assert sentence in done.sentence


def test_distance_to_a_gaussian_is_that_to_examples_of_its_moments() -> None:
    """The jackknife too, when the reference is left whole; of more and of fewer examples than dimensions."""
    draws = torch.Generator().manual_seed(0)
    y = torch.randn(500, 6, generator=draws, dtype=torch.float64)
    metric = ToGaussian.from_statistics(Statistics(y.mean(0), torch.cov(y.T), "file"), unbiased=True)
    for n in (300, 6):
        x = 1.3 * torch.randn(n, 6, generator=draws, dtype=torch.float64) + 0.2
        fd = METRICS.get("fd")()
        assert metric(Sets(x, y[:0]))["fd"] == pytest.approx(fd(Sets(x, y))["fd"], rel=1e-9)
        left = metric.leave_out(Sets(x, y[:0]), 3)
        for group, found in enumerate(left):
            assert found["fd"] == pytest.approx(fd(Sets(Sets(x, y).without(group, 3).generated, y))["fd"], rel=1e-9)


# The model itself


def test_the_score_is_held_against_the_law_of_the_data_where_that_is_known() -> None:
    dataset = DATASETS.get("gaussians")(train_size=50, test_size=20)
    mixture, device = dataset.mixture, torch.device("cpu")  # type: ignore[attr-defined]
    variance = torch.tensor(mixture.std**2, dtype=torch.float64)
    exact = GaussianMixtureDenoiser(VP(), mixture.weights, mixture.means, variance)
    shares: list[float] = []
    (found,) = Asked(("score",), levels=3)(exact, dataset, False, device, shares.append)
    assert max(found.curves["error"].values) < 1e-12
    assert shares == sorted(shares)
    assert shares[-1] == 1
    # of a model that is told classes there are the examples: it is not one that copies
    (found,) = Asked(("score",), levels=3)(
        exact, DATASETS.get("moons")(train_size=50, test_size=20), False, device, shares.append
    )
    assert max(found.curves["error"].values) > 0.01


@pytest.mark.parametrize("kind", ["pixels", "points"])
def test_likelihoods_are_those_of_the_tool(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Every number of either split, for the same examples; and they reach the card, the terminal and metrics.jsonl."""
    folder, run = (request.getfixturevalue(f"{kind[:-1]}_run"), {"pixels": "g", "points": "p"}[kind])
    x = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8) if kind == "pixels" else torch.randn(12, 2)
    words = [write(tmp_path / "x.npz", x), "metric=energy", "groups=2", "diagnostics=likelihood", "features=none"]
    done = command("sde.evaluate", *words, "diagnostics_options.examples=2", f"out={tmp_path / 'o'}", folder=folder)
    assert done.code == 0, done.err
    (path,) = (tmp_path / "o").glob("*.json")
    record, card = read(path), path.with_suffix(".md").read_text()
    found = record["likelihood_of_splits"]
    line = read_metrics(folder / f"runs/{run}/metrics.jsonl")[-1]
    for split in ("train", "test"):
        arguments = ["n=2", f"split={split}", "density_side=0", f"out={tmp_path / split}"]
        assert command("sde.likelihood", *arguments, folder=folder).code == 0
        tool = read(tmp_path / split / "likelihood.json")
        shared = found[split].keys() & tool.keys()
        assert {"bits_per_dim", "standard_error", "log_prob", "meaning", "n", "split_size", "nfe", "parts"} <= shared
        assert {name: found[split][name] for name in shared} == {name: tool[name] for name in shared}
        assert found["about"] == {name: tool[name] for name in found["about"]}
        assert line[f"evaluation/likelihood/{split}/bits_per_dim"] == tool["bits_per_dim"]
    assert found["gap"]["bits_per_dim"] == found["test"]["bits_per_dim"] - found["train"]["bits_per_dim"]
    assert not any(key.startswith("evaluation/energy") for key in line)  # whose samples these are nothing says
    assert line["evaluation/likelihood/kind"] == {"pixels": "ode-decoder", "points": "ode-none"}[kind]
    unit = {"pixels": "bits/dim", "points": "nats"}[kind]
    for fact in (f"| {unit}, train | ", f"| {unit}, test | ", "| gap, test - train | ", "A gap above 0 is overfitting"):
        assert fact in card, fact
    for fact in ("divergence exact", "solver adams_adaptive (rtol 1e-05", "1 draw", found["test"]["meaning"]):
        assert fact in card, fact
    assert "gap, test - train" in done.out
    assert "likelihood: 100%" in done.err


# Names


def test_names_of_numbers() -> None:
    fd, kid, swd = (METRICS.get(name)() for name in ("fd", "kid", "swd"))
    assert label_of(fd, "fd", "inception", 50_000) == "FID-50k"
    assert label_of(fd, "fd_infinity", "inception", 5000) == "FID infinity-5k"
    assert label_of(kid, "kid", "inception", 10_000) == "KID-10k"
    assert label_of(fd, "fd", "dinov2", 50_000) == "FD-DINOv2-50k"
    assert label_of(fd, "fd", "classifier", 1234) == "FD-classifier-1234"
    assert label_of(swd, "swd", "inception", 500) == "SWD-500"
    assert with_error(1.23456, 0.0123) == "1.235 +- 0.012"
    assert with_error(1234.56, 123.0) == "1235 +- 123"
    assert with_error(0.5, 0.0) == "0.5"
    assert with_error(None, 0.1) == "not finite"


def test_names_tell_apart_what_differs() -> None:
    def record(sde: str, run: str, solver: str, **options: Any) -> dict[str, Any]:
        model = {"sde": sde, "run": run, "step": 5, "weights": "averaged"}
        return {"model": model, "sampling": {"solver": solver, "grid": "edm", "options": options}}

    found = [
        record("VP", "a", "heun", order=2),
        record("VE", "b", "heun", order=2),
        record("VP", "a", "adams", order=3),
    ]
    assert names_of(found) == ["VP heun", "VE heun", "VP adams"]
    found = [record("VP", "a", "heun", s_churn=0), record("VP", "b", "heun", s_churn=9)]
    assert names_of(found) == ["heun, a, s_churn 0", "heun, b, s_churn 9"]


# Mistakes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["metric=fdd"], "metric='fdd' is not one of"),
        (["metric=[kid,precison]"], "metric='precison' is not one of"),
        (["metric=[]"], "must be a metric, a list of them, or auto"),
        (["metric=fid", "features=random"], "leave features out, or take metric=fd"),
        (["metric=[fid,fd_dinov2]"], "are of different features"),
        (["metric=wasserstein"], "is for points in the plane and the data have shape (1, 8, 8)"),
        (["metric=is"], "needs class probabilities"),
        (["seeds=[1,1]"], "name each seed once"),
        (["seeds=3"], "must be a list of whole numbers"),
        (["n=1000000000000"], "n=1000000000000 is out of range: it must be at most 1e+08"),
        (["n=7", "samples=x.npz"], "samples=x.npz is taken whole: leave n=7 out"),
        (["n=2", "metric=fd"], "metric=fd needs at least 3 generated examples with groups=10 and gets 2: take n=3 or"),
        (
            ["n=3", "metric=[fd,dc,kid]"],
            "metric=dc needs at least 7 generated examples with groups=10 and gets 3: take",
        ),
        (
            ["n=3", "metric=[fd,dc]", "seeds=[0,1]"],
            "metric=dc needs at least 6 generated examples and gets 3: take n=6",
        ),
        (
            ["metric=c2st", "examples=3"],
            "metric=c2st needs at least 4 generated examples with groups=10 and gets 3: take",
        ),
        (["metric=c2st", "c2st.neighbors=9", "c2st.examples=5"], "take c2st.examples=9 or more"),
        (["samples=few.npz", "metric=pr"], "metric=pr needs at least 5 generated examples with groups=10 and gets 4: "),
        (
            ["diagnostics=[curls]"],
            "diagnostics='curls' is not one of denoising, curl, fokker_planck, score, likelihood",
        ),
        (["diagnostics=[likelihood]", "precision=bf16"], "is too coarse for a likelihood"),
        (["diagnostics=[likelihood]", "compile=graphs"], "compile=graphs replays one forward pass"),
        (["diagnostics=[likelihood]", "data.test_fraction=0"], "has no test split: set test_fraction above 0"),
        (["diagnostics_options.levels=0"], "diagnostics_options.levels"),
        (["diagnostics=[curl]", "diagnostics_options.example=3"], "did you mean 'diagnostics_options.examples'?"),
        (["export=a.txt"], ".npz for mu and sigma"),
        (["samples=nowhere.npz"], "does not exist"),
        (["samples=wrong_size.npz"], "give samples of the same size and channels"),
        (["samples=channels.npz"], "give samples of the same size and channels"),
        (["samples=floats.npz"], "save pictures as uint8"),
        (["samples=empty"], "holds no pictures"),
        (["samples=good.npz", "seeds=[0,1]"], "is one set"),
        (["label=12"], "is not a class"),
        (["features=classifer"], "did you mean 'classifier'?"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], sentence: str, pixel_run: Path) -> None:
    draws = np.random.default_rng(0)
    (pixel_run / "empty").mkdir(exist_ok=True)
    for name, shape in (
        ("wrong_size", (20, 9, 9, 1)), ("channels", (20, 8, 8, 3)), ("good", (20, 8, 8, 1)), ("few", (4, 8, 8, 1)),
    ):  # fmt: skip
        np.savez(pixel_run / f"{name}.npz", samples=draws.integers(0, 256, shape, dtype=np.uint8))
    np.savez(pixel_run / "floats.npz", samples=draws.random((20, 8, 8, 1), dtype=np.float32))
    quick = ["solver=euler", "steps=1", "out=never"]
    quick += [] if any(word.startswith("samples=") for word in words) else ["n=20"]
    features = [] if any(word.startswith("features=") or "fid" in word for word in words) else ["features=random"]
    done = command("sde.evaluate", *quick, *features, *words, folder=pixel_run)
    assert done.code == 2, done.out
    assert sentence in done.sentence
    assert done.sentence.startswith("error: ")
    assert not list(pixel_run.glob("never/*.json"))


def test_torch_fidelity_is_named_where_it_is_missing(pixel_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    done: Answer = command("sde.evaluate", "metric=fid", folder=pixel_run)
    assert done.code == 2
    assert 'pip install "sde[fid]"' in done.sentence
    assert not (pixel_run / "never").exists() or not list((pixel_run / "never").glob("*.json"))


def test_memorization_needs_data_that_were_held_out(pixel_run: Path, tmp_path: Path) -> None:
    """Copies are found among all training examples, not among a few of them."""
    x = DATASETS.get("glyphs")(**DIGITS).split("train").values[:30]
    options = [write(tmp_path / "copies.npz", x), "features=random", "metric=memorization", "examples=30", "groups=3"]
    record = evaluated(pixel_run, *options, out=str(tmp_path / "o"))
    assert values(record)["memorization_copies"] == 1
    picture = np.asarray(Image.open(tmp_path / "o/copies-random-30-step4-nearest.png").convert("L")).astype(int)
    top, bottom = np.split(picture[: picture.shape[0] // 2 * 2, -100:], 2)
    assert abs(top - bottom).mean() < 0.02 * 255  # each beside itself
