"""`python -m sde.encode` and `sde.decode` from end to end: what they write, what must coincide, and mistakes."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sde import density
from sde.config import build
from sde.encode import magnification, shaded
from sde.latents import Latents, read_latents, sde_facts, write_latents
from sde.processes import VE, VP
from sde.runs import find_run, open_checkpoint, restore_denoiser
from tests.commands import Answer, command

CODES = "runs/p/latents/test-8"  # of the points' run, made by a fixture


@pytest.fixture(scope="module")
def point_run(point_run: Path) -> Path:
    """A folder with one run, runs/p, of points in the plane, and codes of eight of them."""
    ok("sde.encode", "n=8", folder=point_run)
    return point_run


def ok(*arguments: str, folder: Path) -> Answer:
    """A command that must not fail."""
    done = command(*arguments, folder=folder)
    assert done.code == 0, done.err
    return done


def info_of(folder: Path) -> dict[str, Any]:
    """What info.json in `folder` says."""
    found: dict[str, Any] = json.loads((folder / "info.json").read_text())
    return found


def samples_of(folder: Path) -> np.ndarray:
    """The samples in `folder`."""
    found: np.ndarray = np.load(folder / "samples.npz")["samples"]
    return found


def names(folder: Path) -> list[str]:
    """The files in `folder`."""
    return sorted(path.name for path in folder.iterdir())


# Pictures, with classes


def test_pictures_go_there_and_back(glyph_run: Path) -> None:
    done = ok("sde.encode", "n=5", "batch_size=2", "solver=heun", "steps=20", "data.split=train", folder=glyph_run)
    folder = glyph_run / "runs" / "g" / "latents" / "train-5"
    assert names(folder) == ["info.json", "latents.npz", "round_trip.png"]
    latents, facts = read_latents(folder), info_of(folder)
    assert latents.values.shape == (5, 1, 8, 8)
    assert latents.labels is not None
    assert latents.indices is not None
    assert latents.indices.tolist() == [0, 1, 2, 3, 4]
    assert (facts["solver"], facts["steps"], facts["nfe"], facts["n"]) == ("heun", 20, 40, 5)
    assert facts["nfe_per_batch"] == [40, 40, 40]
    assert facts["sde"] == latents.about["sde"] == sde_facts(VP())
    assert (facts["t_min"], facts["T"], facts["prior_std"]) == (1e-5, 1.0, 1.0)
    assert len(facts["normality"]["squared_norm"]) == 5
    trip = facts["round_trip"]
    assert trip["rms"] < trip["max"] < 0.5 * 2 / 255  # half a gray level
    assert trip["rms_gray_levels"] == pytest.approx(127.5 * trip["rms"])
    assert trip["exact"] == 1.0
    assert "100 % of the pixels come back" in done.out
    assert "5 latents in" in done.out
    with Image.open(folder / "round_trip.png") as image:
        assert image.height >= 4 * 48  # data, latents, decoded, difference

    # the decoder finds the data, with the labels of the file
    ok("sde.decode", f"latents={folder}", "solver=heun", "steps=20", "out=back", folder=glyph_run)
    assert (glyph_run / "back" / "grid.png").is_file()
    arrays = np.load(glyph_run / "back" / "samples.npz")
    assert arrays["labels"].tolist() == latents.labels.tolist()
    ok("sde.encode", "input=back/samples.npz", "solver=heun", "steps=20", "out=again", folder=glyph_run)
    again = read_latents(glyph_run / "again")
    torch.testing.assert_close(again.values, latents.values, rtol=0, atol=1e-5)  # the very pictures
    assert again.labels is not None
    assert again.labels.tolist() == latents.labels.tolist()


def test_a_class_of_ones_own_and_chosen_examples(glyph_run: Path) -> None:
    arguments = ["sde.encode", "indices=[7,2]", "solver=heun", "steps=4", "round_trip=false", "split=train"]
    ok(*arguments, "out=own", folder=glyph_run)
    ok(*arguments, "label=[3,5]", "out=told", folder=glyph_run)
    own, told = (read_latents(glyph_run / name) for name in ("own", "told"))
    assert own.indices is not None
    assert told.labels is not None
    assert own.indices.tolist() == [7, 2]
    assert told.labels.tolist() == [3, 5]
    assert names(glyph_run / "own") == ["info.json", "latents.npz", "latents.png"]
    assert info_of(glyph_run / "own")["round_trip"] is None
    assert float((own.values - told.values).abs().max()) > 1e-6
    whole = command("sde.encode", *arguments[2:], "n=8", "out=eight", folder=glyph_run)
    assert whole.code == 0, whole.err
    torch.testing.assert_close(read_latents(glyph_run / "eight").values[[7, 2]], own.values, rtol=0, atol=1e-5)


def test_a_folder_of_pictures(glyph_run: Path) -> None:
    (glyph_run / "mine").mkdir()
    for k in range(3):
        Image.fromarray(np.full((8, 8), 80 * k, np.uint8)).save(glyph_run / "mine" / f"{k}.png")
    arguments = ["input=mine", "label=2", "solver=heun", "steps=20"]
    ok("sde.encode", *arguments, folder=glyph_run)
    facts = info_of(glyph_run / "runs" / "g" / "latents" / "mine-3")
    assert facts["round_trip"]["exact"] == 1.0
    refused = command("sde.encode", "input=mine", folder=glyph_run)
    assert (refused.code, "has no labels: give label=CLASS" in refused.sentence) == (2, True)


def test_rows_of_pictures(glyph_run: Path) -> None:
    """Interpolations and temperatures; a point between two classes has that of the nearer."""
    arguments = ["solver=heun", "steps=3", "seed=4", "label=[3,1]"]
    ok(
        "sde.decode",
        *arguments,
        "interpolate=[[0,1],[2,5]]",
        "points=5",
        "temperature=[0.5,1]",
        "out=rows",
        folder=glyph_run,
    )
    folder = glyph_run / "rows"
    assert names(folder) == ["grid.png", "info.json", "interpolation.png", "samples.npz"]
    facts = info_of(folder)
    assert [(row["pair"], row["temperature"], row["first"], row["n"]) for row in facts["rows"]] == [
        ([0, 1], 0.5, 0, 5), ([2, 5], 0.5, 5, 5), ([0, 1], 1.0, 10, 5), ([2, 5], 1.0, 15, 5),
    ]  # fmt: skip
    assert np.load(folder / "samples.npz")["labels"].tolist() == [3, 3, 3, 1, 1] * 4
    with Image.open(folder / "interpolation.png") as image:
        assert image.height >= 4 * 48
    # the ends are samples of the seed
    ok("sde.sample", *arguments, "n=6", "out=seed", folder=glyph_run)
    ends, seed = samples_of(folder)[[10, 14, 15, 19]].astype(int), samples_of(glyph_run / "seed").astype(int)
    assert abs(ends - seed[[0, 1, 2, 5]]).max() <= 1  # rounding to a pixel may fall on either side
    ok("sde.decode", *arguments, "temperature=[0.5,1]", "n=4", "out=heat", folder=glyph_run)
    assert names(glyph_run / "heat") == ["grid.png", "info.json", "samples.npz", "temperatures.png"]
    heat = samples_of(glyph_run / "heat").astype(int)
    assert abs(heat[4:] - seed[:4]).max() <= 1
    assert abs(heat[:4] - seed[:4]).max() > 1
    assert abs(heat[[0, 1]] - samples_of(folder)[[0, 4]]).max() <= 1


# A seed is that of sde.sample


@pytest.mark.parametrize(
    ("run", "way"),
    [
        ("points", ["solver=dopri5"]),
        ("points", ["solver=adams", "denoise=false"]),
        ("glyphs", ["solver=heun", "steps=6"]),
    ],
)
def test_latents_of_a_seed_decode_to_its_samples(run: str, way: list[str], request: pytest.FixtureRequest) -> None:
    """To the last bit: the same noise, the same grid, the same last step and the same labels."""
    folder = request.getfixturevalue("point_run" if run == "points" else "glyph_run")
    for module in ("sample", "decode"):
        ok(f"sde.{module}", *way, "n=4", "batch_size=3", "seed=11", f"out=same-{module}", folder=folder)
    sampled, decoded = (np.load(folder / f"same-{module}" / "samples.npz") for module in ("sample", "decode"))
    assert sorted(sampled.files) == sorted(decoded.files)
    for name in sampled.files:
        np.testing.assert_array_equal(sampled[name], decoded[name])
        assert sampled[name].dtype == decoded[name].dtype
    first, second = (info_of(folder / f"same-{module}") for module in ("sample", "decode"))
    assert first["nfe_per_batch"] == second["nfe_per_batch"]
    assert first["times"] == second["times"]
    for module in ("sample", "decode"):
        shutil.rmtree(folder / f"same-{module}")


# Points in the plane


def test_points_go_there_and_back(point_run: Path) -> None:
    folder = point_run / CODES
    assert names(folder) == ["info.json", "latents.npz", "round_trip.png"]
    latents, trip = read_latents(folder), info_of(folder)["round_trip"]
    assert latents.labels is not None  # of the data, though the run is not conditional
    checkpoint = open_checkpoint(find_run(str(point_run / "runs" / "p")), "latest")
    denoiser, _ = restore_denoiser(checkpoint)
    data = build(checkpoint.content["config"]["data"], "data").split("test").values[:8]
    error = density.decode(denoiser, latents.values)[0] - data
    assert trip == pytest.approx(
        {"rms": float(error.square().mean().sqrt()), "max": float(error.abs().max())}, rel=1e-6
    )
    # a network of 20 training steps is not smooth in time: hundreds of steps, each within the tolerance
    assert 0 < trip["rms"] < 1e-1
    ok("sde.decode", f"latents={folder}", "out=points-back", folder=point_run)
    back = samples_of(point_run / "points-back")
    torch.testing.assert_close(torch.from_numpy(back), (data + error).float(), rtol=0, atol=1e-5)
    ok("sde.encode", "input=points-back/samples.npz", "round_trip=false", "out=points-again", folder=point_run)
    torch.testing.assert_close(
        read_latents(point_run / "points-again").values, read_latents(folder).values, rtol=0, atol=1e-2
    )
    ok("sde.decode", f"latents={folder}", "denoise=true", "n=3", "out=points-denoised", folder=point_run)
    moved = samples_of(point_run / "points-denoised") - back[:3]
    assert 0 < abs(moved).max() < 0.02  # E[x_0 | x] is sigma(t_min) = 1e-3 times eps away


def test_paths_in_the_plane(point_run: Path) -> None:
    arguments = [f"latents={CODES}", "solver=heun", "steps=8"]
    for kind in ("spherical", "linear", "gaussian"):
        ok(
            "sde.decode", *arguments, "interpolate=[[0,1],[6,2]]", f"interpolation={kind}", f"out=way-{kind}",
            folder=point_run,
        )  # fmt: skip
    ways = {kind: samples_of(point_run / f"way-{kind}") for kind in ("spherical", "linear", "gaussian")}
    ok("sde.decode", *arguments, "out=ends", folder=point_run)
    ends = samples_of(point_run / "ends")
    for way in ways.values():
        assert way.shape == (18, 2)
        np.testing.assert_allclose(way[[0, 8, 9, 17]], ends[[0, 1, 6, 2]], rtol=0, atol=1e-5)
    assert abs(ways["linear"] - ways["spherical"]).max() > 1e-3
    assert names(point_run / "way-linear") == ["grid.png", "info.json", "interpolation.png", "samples.npz"]
    assert info_of(point_run / "way-linear")["interpolation"] == "linear"
    ok("sde.decode", *arguments, "temperature=[0.5,1]", folder=point_run)
    folder = point_run / "runs" / "p" / "samples" / "decode-heun-8-test-8"
    assert names(folder) == ["grid.png", "info.json", "samples.npz", "temperatures.png"]


def test_codes_that_somebody_else_made(point_run: Path) -> None:
    """An array of latents and no more."""
    np.savez(point_run / "bare.npz", latents=np.array([[0.5, 1.0], [-1.0, 0.2]]))
    ok("sde.decode", "latents=bare.npz", "solver=heun", "steps=5", "out=bare", folder=point_run)
    assert samples_of(point_run / "bare").shape == (2, 2)


# Mistakes


@pytest.fixture(scope="module")
def mistaken(point_run: Path) -> Path:
    """`point_run` with files that cannot be used."""
    codes = read_latents(point_run / CODES)
    write_latents(point_run / "ve.npz", Latents(codes.values, about={"sde": sde_facts(VE())}))
    write_latents(point_run / "three.npz", Latents(torch.zeros(4, 3)))
    np.savez(point_run / "nan.npz", latents=np.full((2, 2), np.nan))
    (point_run / "damaged.npz").write_bytes((point_run / CODES / "latents.npz").read_bytes()[:300])
    np.savez(point_run / "pictures.npz", samples=np.zeros((2, 8, 8, 1), np.uint8))
    np.savez(point_run / "unnamed.npz", np.zeros((2, 2), np.float32))
    np.savez(point_run / "words.npz", samples=np.array(["a", "b"]))
    np.savez(point_run / "infinite.npz", samples=np.full((2, 2), np.inf, np.float32))
    (point_run / "folder").mkdir()
    return point_run


C = f"latents={CODES}"
MISTAKES = [
    ("decode", ["latents=nothing.npz"], ["latents=nothing.npz does not exist"]),
    ("decode", ["latents=runs/p"], ["runs/p/latents.npz does not exist"]),
    ("decode", ["latents=damaged.npz"], ["damaged.npz is damaged"]),
    ("decode", ["latents=three.npz"], ["three.npz has latents of shape (3,)", "data of shape (2,)"]),
    ("decode", ["latents=ve.npz"], ["sde=ve and the run has sde=vp"]),
    ("decode", ["latents=nan.npz"], ["nan.npz has latents that are not finite"]),
    ("decode", ["latents=pictures.npz"], ["holds no latents (but samples)"]),
    ("decode", [C, "n=9"], ["n=9", "holds 8 latents"]),
    ("decode", [C, "n=0"], ["n=0", "at least 1"]),
    ("decode", [C, "interpolate=[0,8]"], ["latent 8", "numbers 0 to 7"]),
    ("decode", [C, "interpolate=[-1,2]"], ["latent -1"]),
    ("decode", ["interpolate=[0,4294967296]"], ["sample 4294967296"]),
    ("decode", [C, "interpolate=[3,3]"], ["goes from 3 to itself", "two different"]),
    ("decode", [C, "interpolate=[[0,1],[2]]"], ["is no pair", "[[0,1],[2,5]]"]),
    ("decode", [C, "interpolate=[0,1,2]"], ["is no pair"]),
    ("decode", [C, "interpolate=[]"], ["is no pair"]),
    ("decode", [C, "interpolate=3"], ["interpolate=3 is no pair"]),
    ("decode", [C, "interpolate=[0,a]"], ["is no pair"]),
    ("decode", ["points=1"], ["points=1", "at least 2"]),
    ("decode", ["points=2.5"], ["points=2.5", "whole number"]),
    ("decode", ["temperature=0"], ["temperature=0", "above 0"]),
    ("decode", ["temperature=[1,-2]"], ["temperature=-2", "above 0"]),
    ("decode", ["temperature=[]"], ["temperature=[]"]),
    ("decode", ["temperature=hot"], ["temperature='hot'", "not a number"]),
    ("decode", ["interpolation=sphere"], ["interpolation='sphere'", "spherical, linear, gaussian"]),
    ("decode", ["solver=pc"], ["solver=pc draws noise"]),
    ("decode", ["solver=heun", "solver.s_churn=5"], ["solver=heun draws noise"]),
    ("decode", [C, "solver=heun", "solver.final=tweedie"], ["solver.final=none"]),
    ("decode", [C, "steps=5"], ["steps means nothing to AdamsAdaptive"]),
    ("decode", ["steps=5"], ["steps=5 means nothing"]),
    ("decode", ["label=1"], ["label=1 needs a class-conditional run"]),
    ("decode", ["denoise=3"], ["denoise=3", "true or false"]),
    ("decode", ["seed=-1"], ["seed=-1"]),
    ("decode", ["run=nope"], ["run=nope", "does not exist"]),
    ("decode", ["out=runs"], ["out=runs", "not empty"]),
    ("decode", ["temprature=1"], ["temprature", "did you mean 'temperature'"]),
    ("encode", ["solver=pc"], ["cannot go", "probability-flow ODE"]),
    ("encode", ["solver=heun", "solver.s_churn=5"], ["cannot go"]),
    ("encode", ["solver=ddim", "solver.eta=1"], ["cannot go"]),
    ("encode", ["steps=5"], ["steps means nothing to AdamsAdaptive"]),
    ("encode", ["n=65"], ["n=65 is more than the test split of moons has: it holds 64"]),
    ("encode", ["n=0"], ["n=0", "at least 1"]),
    ("encode", ["n=many"], ["n='many'", "whole number"]),
    ("encode", ["split=val"], ["split='val'", "train, test"]),
    ("encode", ["data.split=val"], ["split='val'"]),
    ("encode", ["data.noise=-1"], ["noise=-1"]),
    ("encode", ["data=glyphs"], ["data=glyphs has kind='pixels'"]),
    ("encode", ["indices=[0,64]"], ["64", "examples 0 to 63"]),
    ("encode", ["indices=[1,1]"], ["names an example twice"]),
    ("encode", ["indices=4"], ["indices=4 is not a list"]),
    ("encode", ["input=nothing.npz"], ["input=nothing.npz does not exist"]),
    ("encode", ["input=damaged.npz"], ["input=damaged.npz is damaged"]),
    ("encode", ["input=unnamed.npz"], ["no array `samples` (but arr_0)"]),
    ("encode", ["input=pictures.npz"], ["uint8 of shape (2, 8, 8, 1)", "float32 of shape (N, 2)"]),
    ("encode", ["input=words.npz"], ["words.npz"]),
    ("encode", ["input=infinite.npz"], ["not finite"]),
    ("encode", ["input=folder"], ["input=folder is a folder", "square pictures"]),
    ("encode", ["round_trip=maybe"], ["round_trip='maybe'", "true or false"]),
    ("encode", ["label=1"], ["label=1 needs a class-conditional run"]),
    ("encode", ["run=nope"], ["run=nope", "does not exist"]),
    ("encode", ["checkpoint=7"], ["checkpoint=7"]),
    ("encode", ["precision=fp8"], ["precision='fp8'"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "arguments", "expected"), MISTAKES, ids=[f"{m} {' '.join(a)}" for m, a, _ in MISTAKES]
)
def test_a_mistake_gets_one_sentence(module: str, arguments: list[str], expected: list[str], mistaken: Path) -> None:
    before = sorted(mistaken.rglob("*"))
    done = command(f"sde.{module}", *arguments, folder=mistaken)
    assert done.code == 2, done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert done.err.startswith("error: ")
    for text in expected:
        assert text in done.err
    assert sorted(mistaken.rglob("*")) == before


def test_labels_beyond_those_of_the_run(glyph_run: Path) -> None:
    np.savez(glyph_run / "eleven.npz", samples=np.zeros((2, 8, 8, 1), np.uint8), labels=np.array([0, 10]))
    refused = command("sde.encode", "input=eleven.npz", folder=glyph_run)
    assert refused.code == 2
    assert "labels 0 to 10 and the run has classes 0 to 9" in refused.sentence


@pytest.mark.parametrize("module", ["encode", "decode"])
def test_what_is_not_finite_is_not_kept(module: str, point_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that left the numbers: one sentence and no file."""
    entry = importlib.import_module(f"sde.{module}")
    name = "encode" if module == "encode" else "decode"
    original = getattr(entry, name)
    monkeypatch.setattr(entry, name, lambda *a, **k: (original(*a, **k)[0] * float("nan"), 1))
    before = sorted(point_run.rglob("*"))
    done = command(f"sde.{module}", *([C] if module == "decode" else []), "n=2", folder=point_run)
    assert done.code == 2
    assert "2 of 2 " in done.sentence
    assert "are not finite" in done.sentence
    assert sorted(point_run.rglob("*")) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("module", "arguments"), [("encode", []), ("decode", [C]), ("decode", [])])
def test_an_interrupted_command_leaves_nothing(
    module: str, arguments: list[str], number: int, code: int, point_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to stop in the second batch."""
    entry = importlib.import_module("sde.commands")
    original, batches = entry.in_batches, []

    def in_batches(carry: Any, *others: Any) -> Any:
        def counted(*batch: Any) -> Any:
            batches.append(batch)
            if len(batches) == 2:
                os.kill(os.getpid(), number)
            return carry(*batch)

        return original(counted, *others)

    monkeypatch.setattr(entry, "in_batches", in_batches)
    before = sorted(point_run.rglob("*"))
    done = command(f"sde.{module}", *arguments, "n=6", "batch_size=2", folder=point_run)
    assert (done.code, done.sentence) == (code, "interrupted; nothing was left half-written")
    assert len(batches) == 2
    assert sorted(point_run.rglob("*")) == before


@pytest.mark.parametrize(("module", "arguments"), [("encode", []), ("decode", [C])])
def test_interrupted_while_writing_nothing_is_left(
    module: str, arguments: list[str], point_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays without the picture beside them are no result."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"sde.{module}"), "draw_pictures", interrupted)
    before = sorted(point_run.rglob("*"))
    done = command(f"sde.{module}", *arguments, "n=2", "out=torn", folder=point_run)
    assert (done.code, done.sentence) == (130, "interrupted; nothing was left half-written")
    assert sorted(point_run.rglob("*")) == before


# Pictures of small things


def test_differences_are_enlarged_by_round_factors() -> None:
    for largest, factor in (
        (0.3, 2.0),
        (0.15, 5.0),
        (0.099, 10.0),
        (9e-4, 1000.0),
        (3e-3, 200.0),
        (2.0, 1.0),
        (0.0, 1.0),
    ):
        assert magnification(torch.tensor([0.0, -largest]), 1.0) == pytest.approx(factor, rel=1e-9)
    assert shaded(torch.tensor([-9.0, -3.0, 0.0, 3.0]), 3.0).tolist() == [0, 0, 128, 255]
