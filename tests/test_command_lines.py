"""The command lines from end to end: what they write, and one sentence for every mistake."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from sde.cli import in_quotes, out_of_quotes
from sde.data import DataInfo
from sde.errors import UserError
from sde.runs import Run
from sde.solvers import SOLVERS
from sde.training.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    remove_damaged,
    save_checkpoint,
    set_aside,
)
from tests.commands import TINY, TINY_2D, command


def test_a_run_is_a_complete_folder(glyph_run: Path) -> None:
    run = glyph_run / "runs" / "g"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "data.json",
        "environment.json",
        "metrics.jsonl",
        "previews",
    ]
    info = DataInfo.from_dict(json.loads((run / "data.json").read_text()))
    assert (info.shape, info.num_classes) == ((1, 8, 8), 10)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4
    assert {"train/loss", "train/gradient_norm", "train/pictures_per_second", "train/lr", "val/loss"} <= last.keys()
    levels = [name for name in last if name.startswith("val/eps_mse/log_snr=")]
    assert len(levels) == 8  # an example each
    assert Image.open(run / "previews" / "step-00000004.png").size[0] >= 256


@pytest.mark.parametrize("name", list(SOLVERS))
def test_every_solver_samples_a_run(name: str, glyph_run: Path) -> None:
    steps = [] if SOLVERS.get(name).default_steps is None else ["steps=3"]
    options = {"box_langevin": ["solver.steps=5"], "adaptive_sde": ["solver.rtol=0.1"]}.get(name, [])
    out = f"out-{name}"
    done = command(
        "sde.sample",
        f"solver={name}",
        "n=5",
        "batch_size=2",
        f"out={out}",
        "label=[3,1]",
        *steps,
        *options,
        folder=glyph_run,
    )
    assert done.code == 0, done.err
    folder = glyph_run / out
    arrays = np.load(folder / "samples.npz")
    assert arrays["samples"].shape == (5, 8, 8, 1)
    assert arrays["samples"].dtype == np.uint8
    assert arrays["labels"].tolist() == [3, 1, 3, 1, 3]
    info = json.loads((folder / "info.json").read_text())
    assert info["solver"] == name
    assert info["checkpoint"].endswith("step-00000004.pt")
    assert info["seeds"] == {"seed": 0, "samples": [0, 4]}
    assert info["seconds"] > 0
    assert set(info["options"]) >= {"final"}
    if steps:
        assert (info["steps"], len(info["times"])) == (3, 4)
        exact = {"euler_maruyama": 3, "adams": 3, "heun": 6, "rk4": 12, "pc": 6}
        # and one to denoise; `test_evaluations_are_counted` has all solvers
        assert info["nfe"] == exact.get(name, info["nfe"] - 1) + 1
        assert info["nfe"] > 3
    assert Image.open(folder / "grid.png").format == "PNG"


def test_samples_do_not_depend_on_the_batch(glyph_run: Path) -> None:
    pictures = []
    for size in (1, 3, 7):
        out = f"batch-{size}"
        arguments = ["solver=pc", "steps=4", "n=7", "seed=5", f"batch_size={size}", f"out={out}"]
        done = command("sde.sample", *arguments, folder=glyph_run)
        assert done.code == 0, done.err
        pictures.append(np.load(glyph_run / out / "samples.npz")["samples"].astype(int))
    # rounding to a pixel may fall on either side
    assert abs(pictures[0] - pictures[1]).max() <= 1
    assert abs(pictures[0] - pictures[2]).max() <= 1
    assert len(np.unique(pictures[0], axis=0)) == 7


def test_a_conditional_run_draws_each_class_in_turn_unless_told(glyph_run: Path) -> None:
    """Its network has not learned to go without a class."""
    for arguments, expected in (([], [0, 1, 2, 3]), (["label=7"], [7] * 4), (["label=['3',1]"], [3, 1, 3, 1])):
        out = f"classes-{expected[0]}-{expected[1]}"
        done = command("sde.sample", "solver=heun", "steps=2", "n=4", f"out={out}", *arguments, folder=glyph_run)
        assert done.code == 0, done.err
        assert np.load(glyph_run / out / "samples.npz")["labels"].tolist() == expected
    done = command("sde.sample", "label=12", folder=glyph_run)
    assert done.code == 2
    assert "label=12 is not a class: it is 0 to 9" in done.sentence


def test_folders_of_samples_are_never_overwritten(point_run: Path) -> None:
    arguments = ["sde.sample", "run=runs/p", "solver=heun", "steps=2", "n=4"]
    for _ in range(3):
        assert command(*arguments, folder=point_run).code == 0
    names = sorted(path.name for path in (point_run / "runs" / "p" / "samples").iterdir())
    assert names == ["heun-2-seed0", "heun-2-seed0-2", "heun-2-seed0-3"]


def test_points_get_a_scatter_plot_a_score_field_and_an_animation(point_run: Path) -> None:
    done = command("sde.sample", "n=20", "steps=5", "trajectory=true", "out=plane", folder=point_run)
    assert done.code == 0, done.err
    assert sorted(path.name for path in (point_run / "plane").iterdir()) == [
        "grid.png",
        "info.json",
        "samples.npz",
        "score_field.png",
        "trajectory.gif",
    ]
    samples = np.load(point_run / "plane" / "samples.npz")["samples"]
    assert samples.shape == (20, 2)
    assert samples.dtype == np.float32
    with Image.open(point_run / "plane" / "trajectory.gif") as animation:
        assert animation.n_frames >= 5


def test_a_trajectory_of_pictures_ends_in_the_samples(glyph_run: Path) -> None:
    done = command("sde.sample", "n=4", "steps=6", "solver=heun", "trajectory=true", "out=movie", folder=glyph_run)
    assert done.code == 0, done.err
    with Image.open(glyph_run / "movie" / "trajectory.gif") as animation:
        animation.seek(animation.n_frames - 1)
        last = np.asarray(animation.convert("L")).astype(int)
    grid = np.asarray(Image.open(glyph_run / "movie" / "grid.png").convert("L")).astype(int)
    assert last.shape == grid.shape
    assert abs(last - grid).mean() < 2  # 256 colors of a GIF


def test_checkpoints_by_latest_step_and_path(point_run: Path) -> None:
    path = checkpoint_path(point_run / "runs" / "p" / "checkpoints", 20)
    for k, which in enumerate(("latest", "20", str(path))):
        done = command("sde.sample", f"checkpoint={which}", "steps=2", "n=2", f"out=by-{k}", folder=point_run)
        assert done.code == 0, done.err
    samples = [np.load(point_run / f"by-{k}" / "samples.npz")["samples"] for k in range(3)]
    assert np.array_equal(samples[0], samples[1])
    assert np.array_equal(samples[0], samples[2])


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path: Path) -> None:
    done = command("sde.train", *TINY_2D, "training.checkpoint_every=10", "hydra.run.dir=r", folder=tmp_path)
    assert done.code == 0, done.err
    newest = list_checkpoints(tmp_path / "r" / "checkpoints")[-1][1]
    newest.write_bytes(newest.read_bytes()[:-200])
    done = command("sde.sample", "run=r", "steps=2", "n=2", "out=s", folder=tmp_path)
    assert done.code == 0, done.err
    assert f"{newest.name} is damaged" in done.err
    assert json.loads((tmp_path / "s" / "info.json").read_text())["checkpoint"].endswith("step-00000010.pt")
    asked = command("sde.sample", "run=r", "checkpoint=20", "steps=2", "n=2", folder=tmp_path)
    assert asked.code == 2
    assert "is damaged" in asked.sentence


def test_resuming_from_a_damaged_newest_checkpoint_goes_on_from_the_one_before(tmp_path: Path) -> None:
    arguments = [*TINY_2D, "training.checkpoint_every=10", "hydra.run.dir=r"]
    assert command("sde.train", *arguments, folder=tmp_path).code == 0
    newest = list_checkpoints(tmp_path / "r" / "checkpoints")[-1][1]
    newest.write_bytes(b"not a checkpoint")
    done = command("sde.train", "resume=r", folder=tmp_path)
    assert done.code == 0, done.err
    assert "going on from step 10" in done.out
    assert [step for step, _ in list_checkpoints(tmp_path / "r" / "checkpoints")] == [10, 20]
    assert not list((tmp_path / "r" / "checkpoints").glob("*.damaged"))  # there is a whole one of that step now
    steps = [json.loads(line)["step"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20]


def test_damaged_checkpoints_stay_until_there_is_a_newer_one(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint_path(tmp_path, step).write_bytes(b"not a checkpoint")
    (tmp_path / "step-mine.damaged").touch()
    set_aside(tmp_path, 10)
    names = ["step-00000010.pt", "step-00000020.damaged", "step-00000030.damaged", "step-mine.damaged"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    remove_damaged(tmp_path, 19)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    remove_damaged(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], *names[2:]]


def test_there_is_none_before_the_oldest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20):
        checkpoint_path(tmp_path / "checkpoints", step).parent.mkdir(exist_ok=True)
        checkpoint_path(tmp_path / "checkpoints", step).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="all 2 checkpoints"):
        load_newest(tmp_path / "checkpoints")
    newer, oldest = capsys.readouterr().err.splitlines()
    assert newer.endswith(": falling back to the one before")
    assert "step-00000010.pt is damaged" in oldest
    assert "falling back" not in oldest
    assert "earlier" not in oldest


def test_a_run_of_an_earlier_version_is_told_that_its_draws_are_others(tmp_path: Path) -> None:
    """Once: what it writes then is of this version."""
    assert command("sde.train", *TINY_2D, "hydra.run.dir=r", folder=tmp_path).code == 0
    path = checkpoint_path(tmp_path / "r" / "checkpoints", 20)
    content = load_checkpoint(path).content
    del content["skipped"]
    save_checkpoint(path.parent, content)
    sentence = "warning: r was begun with an earlier version: its steps go on with other random draws"
    for steps, count in ((22, 1), (24, 0)):
        done = command("sde.train", "resume=r", f"training.steps={steps}", folder=tmp_path)
        assert done.code == 0, done.err
        assert done.err.count(sentence) == count


MISTAKES = [
    ("sde.train", ["sdee=vp"], ["'sdee'", "did you mean 'sde'"]),
    ("sde.train", ["sde=vpp"], ["sde=vpp", "cosine, edm, rectified_flow, subvp, ve, vp", "did you mean 'vp'"]),
    ("sde.train", ["model=unet"], ["model=unet", "ncsnpp"]),
    ("sde.train", ["training.stepz=5"], ["'training.stepz'", "did you mean 'training.steps'"]),
    ("sde.train", ["trainig.steps=5"], ["'trainig.steps'", "there are conditional, ", "did you mean 'training.steps'"]),
    ("sde.train", ["data=moons", "data.nois=1"], ["'data.nois'", "did you mean 'data.noise'"]),
    ("sde.train", ["training.steps"], ["training.steps", "key=value"]),
    ("sde.train", ["training.steps=abc"], ["training.steps='abc'", "whole number"]),
    ("sde.train", ["training.steps=0"], ["training.steps=0", "at least 1"]),
    ("sde.train", ["training.batch_size=6", "training.accumulation=4"], ["does not divide"]),
    ("sde.train", ["training.precision=fp8"], ["fp8", "fp32, tf32, bf16"]),
    ("sde.train", ["optimizer.lr=fast"], ["optimizer.lr='fast'", "number"]),
    ("sde.train", ["sde.beta_min=-1"], ["beta_min=-1", "at least 0"]),
    ("sde.train", ["sde=ve", "sde.sigma_max=0.001"], ["sigma_max=0.001", "above 0.01"]),
    ("sde.train", ["loss.weighting=sigma"], ["sigma2, likelihood", "did you mean 'sigma2'"]),
    ("sde.train", ["ema.decay=1"], ["ema.decay=1", "below 1"]),
    ("sde.train", ["data.size=30"], ["30x30", "multiples of 4"]),
    ("sde.train", ["model=mlp"], ["mlp", "(1, 32, 32)"]),
    ("sde.train", ["data=moons"], ["(2,)"]),
    ("sde.train", ["data=images", "data.path=/no/such/folder"], ["/no/such/folder"]),
    ("sde.train", ["data=swissroll", "model=mlp", "conditional=true"], ["conditional=true", "no"]),
    ("sde.train", ["conditional=no"], ["conditional='no'", "true or false"]),
    ("sde.train", ["training.device=mps"], ["'mps'", "auto, cpu, cuda"]),
    ("sde.train", ["-m", "resume=runs/p"], ["leave --multirun out"]),
    ("sde.train", ["resume=runs/p", "sde.beta_max=3"], ["sde.beta_max=3 cannot change", "optimizer"]),
    ("sde.train", ["resume=runs/p", "model.width=20"], ["'model.width'", "in the middle of a run"]),
    ("sde.train", ["+resume=nothing-here"], ["nothing-here", "does not exist"]),
    ("sde.train", ["resume=nothing-here"], ["nothing-here", "does not exist"]),
    ("sde.train", ["preview_solver=pc"], ["solver@preview_solver"]),
    ("sde.train", ["plugins=[no_such_module]"], ["no_such_module", "install it"]),
    ("sde.sample", ["runs=empty"], ["there is no run", "python -m sde.train"]),
    ("sde.sample", ["run=5"], ["run=5", "does not exist"]),
    ("sde.sample", ["run=ein Läufer"], ["run=ein Läufer", "does not exist"]),
    ("sde.sample", ["ema=maybe"], ["ema='maybe'", "true or false"]),
    ("sde.sample", ["grid=explicit", "grid.noise_levels=[0.5,0.1]", "solver=heun"], ["start from noise", "T=1"]),
    ("sde.sample", ["run=nope"], ["run=nope", "does not exist"]),
    ("sde.sample", ["n=0"], ["n=0", "at least 1"]),
    ("sde.sample", ["n=two"], ["n='two'", "whole number"]),
    ("sde.sample", ["batch_size=0"], ["batch_size=0", "at least 1"]),
    ("sde.sample", ["seed=-1"], ["seed=-1"]),
    ("sde.sample", ["steps=0"], ["steps=0", "at least 1"]),
    ("sde.sample", ["solver=pcc"], ["solver=pcc", "did you mean 'pc'"]),
    ("sde.sample", ["solver.snr=0"], ["solver.snr=0", "above 0"]),
    ("sde.sample", ["solver.predictor=adams"], ["solver.predictor='adams'", "ancestral"]),
    ("sde.sample", ["solver.predictor=none", "solver.corrector=none"], ["does nothing"]),
    ("sde.sample", ["solver=ode", "steps=5"], ["steps=5", "solver.rtol"]),
    ("sde.sample", ["solver=ode", "solver.method=RK54"], ["RK54", "did you mean 'RK45'"]),
    ("sde.sample", ["grid=karas"], ["grid=karas", "did you mean 'karras'"]),
    ("sde.sample", ["grid=explicit", "grid.times=[0.1,0.5]"], ["decreasing"]),
    ("sde.sample", ["grid=score_sde", "solver.final=tweedie"], ["solver.final=mean"]),
    ("sde.sample", ["checkpoint=7"], ["checkpoint=7", "20"]),
    ("sde.sample", ["checkpoint=none.pt"], ["none.pt", "does not exist"]),
    ("sde.sample", ["label=1"], ["label=1", "conditional=true"]),
    ("sde.sample", ["precision=fp64"], ["fp64", "fp32, tf32, bf16"]),
    ("sde.sample", ["out=runs"], ["out=runs", "not empty"]),
    ("sde.interop.score_sde", [], ["needs a value"]),
    ("sde.interop.score_sde", ["checkpoint=a.pth", "config=b.json"], ["b.json", "does not exist"]),
]


@pytest.mark.parametrize(("module", "arguments", "expected"), MISTAKES, ids=[" ".join(a) for _, a, _ in MISTAKES])
def test_a_mistake_gets_one_sentence_and_changes_nothing(
    module: str, arguments: list[str], expected: list[str], point_run: Path
) -> None:
    before = sorted(point_run.rglob("*"))
    done = command(module, *arguments, folder=point_run)
    assert done.code == 2, done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert done.err.startswith("error: ")
    for text in expected:
        assert text in done.err
    assert sorted(point_run.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("module", "option"), [("sde.train", "training.device=cuda"), ("sde.sample", "device=cuda")])
def test_a_gpu_that_is_not_there(module: str, option: str, point_run: Path) -> None:
    done = command(module, option, folder=point_run)
    assert done.code == 2
    assert f"{option} is not there" in done.sentence
    assert "use" in done.sentence


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)
    done = command("sde.sample", "run=r", folder=tmp_path)
    assert done.code == 2
    assert "r has no checkpoint" in done.sentence


def test_a_run_is_not_trained_over(point_run: Path) -> None:
    done = command("sde.train", *TINY_2D, "hydra.run.dir=runs/p", folder=point_run)
    assert done.code == 2
    assert "holds a run already" in done.sentence
    assert "resume=" in done.sentence


def test_components_do_not_change_in_the_middle_of_a_run(point_run: Path) -> None:
    done = command("sde.train", "resume=runs/p", "sde=ve", folder=point_run)
    assert done.code == 2
    assert "sde=ve cannot change" in done.sentence
    done = command("sde.train", "resume=runs/p", folder=point_run)
    assert done.code == 2
    assert "raise training.steps" in done.sentence


def test_folders_with_spaces_and_letters_of_any_kind(tmp_path: Path) -> None:
    """The shell has taken the quotes away; what is printed to go on with can be pasted back."""
    done = command("sde.train", *TINY_2D, "hydra.run.dir=ein Ordner é", folder=tmp_path)
    assert done.code == 0, done.err
    line = done.out.splitlines()[-1]
    word = shlex.split(line.split("sde.sample ")[1])[0]
    assert command("sde.sample", word, "n=2", "steps=2", "out=zwei Bilder", folder=tmp_path).code == 0
    assert (tmp_path / "zwei Bilder" / "samples.npz").is_file()
    again = command("sde.train", word.replace("run=", "resume="), "training.steps=30", folder=tmp_path)
    assert again.code == 0, again.err
    assert "going on from step 20" in again.out


def test_a_folder_with_an_apostrophe(tmp_path: Path) -> None:
    done = command("sde.train", *TINY_2D, "training.steps=2", "hydra.run.dir=runs/x's é", folder=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "runs" / "x's é" / "config.yaml").is_file()
    word = shlex.split(done.out.splitlines()[-1].split("sde.sample ")[1])[0]
    again = command("sde.train", word.replace("run=", "resume="), "training.steps=4", folder=tmp_path)
    assert again.code == 0, again.err
    assert "going on from step 2" in again.out
    broken = command("sde.train", "hydra.run.dir='x", folder=tmp_path)
    assert broken.code == 2
    assert "cannot read an option" in broken.err
    assert len(broken.err.splitlines()) == 1


@pytest.mark.parametrize("text", ["x's", "a\\b", "a\\", "'", "it's 'q' \\' é", 'x"y', "", "a\\\\b"])
def test_quotes_hold_any_text(text: str) -> None:
    """As Hydra's own parser reads it, and as this package does."""
    value = OverridesParser.create().parse_override(f"key={in_quotes(text)}").value()
    assert value == text
    assert out_of_quotes(in_quotes(text)) == text


@pytest.mark.parametrize(
    ("option", "mine"),
    [
        ("hydra.run.dir=mine/inner/x", ["mine", "mine/inner", "mine/inner/x"]),
        ("hydra.run.dir=mine/inner/x", ["mine"]),
        ("hydra.run.dir='mine/${sde._target_}/x'", ["mine/sde.processes.VP"]),
        ("data=moons", ["runs"]),
        ("data=moons", []),
    ],
    ids=["own", "above", "filled", "default", "none"],
)
def test_a_command_that_fails_removes_the_folders_that_it_made_and_no_other(
    option: str, mine: list[str], tmp_path: Path
) -> None:
    for name in mine:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    assert command("sde.train", "training.steps=0", option, folder=tmp_path).code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_one_process_writes_a_run(tmp_path: Path) -> None:
    """The second is told so, and touches nothing; the lock goes with the process that held it."""
    with Run(tmp_path / "r").locked():
        done = command("sde.train", *TINY_2D, "hydra.run.dir=r", folder=tmp_path)
        assert done.code == 2
        assert "is being written by another process" in done.sentence
        assert [path.name for path in (tmp_path / "r").iterdir()] == [".lock"]
    done = command("sde.train", *TINY_2D, "hydra.run.dir=r", folder=tmp_path)
    assert done.code == 0, done.err
    assert not (tmp_path / "r" / ".lock").exists()


def test_resuming_takes_new_options_of_the_optimizer(tmp_path: Path) -> None:
    assert command("sde.train", *TINY_2D, "hydra.run.dir=r", folder=tmp_path).code == 0
    options = ["optimizer.weight_decay=0.25", "optimizer.betas=[0.5,0.6]", "optimizer.lr=0.01", "training.steps=22"]
    done = command("sde.train", "resume=r", *options, folder=tmp_path)
    assert done.code == 0, done.err
    content = load_checkpoint(checkpoint_path(tmp_path / "r" / "checkpoints", 22)).content
    (group,) = content["optimizer"]["param_groups"]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.25, (0.5, 0.6))
    assert group["lr"] == pytest.approx(0.01 * 22 / 1000)  # warm-up
    assert content["config"]["optimizer"]["weight_decay"] == 0.25


def test_samples_that_are_not_finite_still_get_their_files(point_run: Path) -> None:
    done = command(
        "sde.sample", "solver.snr=1e15", "solver.corrector=ald", "steps=5", "n=8", "out=nan", folder=point_run
    )
    assert done.code == 0, done.err
    assert "are not finite" in done.err  # where processes that are not the first can say it too
    assert "are not finite" not in done.out
    assert (point_run / "nan" / "grid.png").is_file()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = command("sde.train", *TINY_2D, "hydra.run.dir=file/run", folder=tmp_path)
    assert done.code == 1
    assert "file/run" in done.sentence
    assert "Traceback" not in done.err


def test_a_disk_that_is_full_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*TINY_2D, "hydra.run.dir=r", "training.checkpoint_every=10"]
    import sde.training.checkpoint as module

    save, calls = module.torch.save, []

    def full(content: object, file: object) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        save(content, file)  # type: ignore[arg-type]

    monkeypatch.setattr(module.torch, "save", full)
    done = command("sde.train", *arguments, folder=tmp_path)
    assert done.code == 1
    assert "no space is left" in done.sentence
    folder = tmp_path / "r" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000010.pt"]


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(8):
        Image.new("RGB", (8, 8), (20 * k, 0, 0)).save(folder / f"{k}.png")
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:40])
    options = [o for o in TINY if not o.startswith("data.")]
    done = command("sde.train", *options, "data=images", f"data.path={folder}", "data.size=8", folder=tmp_path)
    assert done.code == 2
    assert "5.png" in done.sentence


def test_a_configuration_from_elsewhere_cannot_run_code(point_run: Path, tmp_path: Path) -> None:
    """A checkpoint whose configuration names something else than a registered class is refused."""
    from sde.training.checkpoint import save_checkpoint

    content = load_checkpoint(checkpoint_path(point_run / "runs" / "p" / "checkpoints", 20)).content
    content["config"]["model"]["_target_"] = "os.system"
    save_checkpoint(tmp_path / "r" / "checkpoints", content)
    done = command("sde.sample", "run=r", folder=tmp_path)
    assert done.code == 2
    assert "model._target_='os.system' is not a registered model" in done.sentence


@pytest.mark.slow
def test_the_modules_run_as_commands_from_any_folder(tmp_path: Path) -> None:
    """Real processes: python -m, no traceback, exit codes, and importing neither wandb nor torchsde."""

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
        )

    done = python("-X", "importtime", "-m", "sde.train", *TINY_2D)
    assert done.returncode == 0, done.stderr
    assert "wandb" not in done.stderr
    assert "torchsde" not in done.stderr
    assert list(tmp_path.glob("runs/*/*_vp_mlp_moons/checkpoints/step-00000020.pt"))
    done = python("-m", "sde.sample", "solver=heun", "n=4", "steps=3")
    assert done.returncode == 0, done.stderr
    assert "4 samples in" in done.stdout
    done = python("-m", "sde.sample", "n=0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_help_shows_what_can_be_chosen(tmp_path: Path) -> None:
    shown = command("sde.train", "--help", folder=tmp_path)
    assert (shown.code, shown.err) == (0, "")
    assert "preview_solver" in shown.out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_wheel_works_from_another_folder(tmp_path: Path) -> None:
    """The configuration travels in the wheel: unpacked elsewhere it trains and samples."""
    root = Path(__file__).resolve().parent.parent
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    work = tmp_path / "work"
    work.mkdir()
    # what `-m` does to a module, behind a line that says where it comes from
    program = "import runpy, sys; from sde.config import conf_dir; print(conf_dir()); "
    program += "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    for arguments in (["-m", "sde.train", *TINY_2D], ["-c", program, "sde.sample", "n=4", "steps=3"]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    where = done.stdout.splitlines()[0]
    assert where == str(tmp_path / "site" / "sde" / "conf")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_sampling_keeps_its_batches(
    number: int, code: int, point_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to stop in the third batch: two are kept, the same samples as those of a run to the end."""
    whole = command("sde.sample", "solver=heun", "steps=4", "n=12", "batch_size=3", "out=whole", folder=point_run)
    assert whole.code == 0, whole.err
    sampling = importlib.import_module("sde.sample")
    original, batches = sampling.draw_batch, []

    def draw_batch(denoiser: Any, plan: Any, indices: Any, *others: Any) -> Any:
        batches.append(indices)
        if len(batches) == 3:
            os.kill(os.getpid(), number)
        return original(denoiser, plan, indices, *others)

    monkeypatch.setattr(sampling, "draw_batch", draw_batch)
    out = f"stopped-{code}"
    done = command("sde.sample", "solver=heun", "steps=4", "n=12", "batch_size=3", f"out={out}", folder=point_run)
    assert done.code == code
    assert "6 of 12 samples are in" in done.sentence
    kept, full = (np.load(point_run / name / "samples.npz")["samples"] for name in (out, "whole"))
    np.testing.assert_array_equal(kept, full[:6])
    info = json.loads((point_run / out / "info.json").read_text())
    assert (info["n"], info["seeds"]["samples"]) == (6, [0, 5])
    batches.clear()
    batches += [None, None]
    done = command("sde.sample", "solver=heun", "steps=4", "n=12", "batch_size=3", "out=nothing", folder=point_run)
    assert (done.code, done.sentence) == (code, "interrupted; nothing was left half-written")
    assert not (point_run / "nothing").exists()
    shutil.rmtree(point_run / out)
    shutil.rmtree(point_run / "whole")


def test_a_path_needs_draws_that_belong_to_steps(point_run: Path) -> None:
    refused = command("sde.sample", "solver=pc", "noise=path", folder=point_run)
    assert refused.code == 2
    assert "noise=path cannot be followed by solver=pc" in refused.sentence
    done = command("sde.sample", "solver=dpmpp_2m_sde", "noise=path", "steps=3", "n=2", "out=along", folder=point_run)
    assert done.code == 0, done.err
    assert json.loads((point_run / "along" / "info.json").read_text())["noise"] == "path"
    shutil.rmtree(point_run / "along")
