"""python -m sde.runs: what it says of runs, what it compares, and that nothing goes that should stay."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import sde.runs_prune
from sde.errors import UserError
from sde.runs import Run, find_run
from sde.runs_summary import Metric, find_runs, named_run, readable_age, readable_bytes, readable_time
from sde.runs_table import distinct, fitted, flat, shortened
from sde.training.checkpoint import checkpoint_path, list_checkpoints
from tests.commands import TINY_2D, Answer, command

DAY = 86400.0
CONFIG: dict[str, Any] = {
    "sde": {"_target_": "sde.processes.VP", "beta_max": 20.0},
    "model": {"_target_": "sde.models.mlp.MLP", "width": 16},
    "data": {"_target_": "sde.data.toy2d.Moons", "noise": 0.1},
    "training": {"steps": 100, "seed": 0},
    **{name: {} for name in ("parameterization", "loss", "optimizer", "ema", "logger", "preview_solver")},
}


def make_run(
    root: Path,
    name: str,
    checkpoints: tuple[int, ...] = (),
    losses: dict[int, float | None] | None = None,
    age: float = 0.0,
    **changes: Any,
) -> Path:
    """A run folder as training leaves it, with 100 bytes in the place of each checkpoint.

    Args:
        root: the folder of all runs.
        name: its path below.
        checkpoints: their steps.
        losses: val/loss by step.
        age: days since anything was written.
        changes: of groups of the configuration, which is that of 100 steps.
    """
    path = root / name
    path.mkdir(parents=True)
    config = {group: {**node, **changes.get(group, {})} for group, node in CONFIG.items()}
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (path / "data.json").write_text("{}")
    environment = {"command": ["/x/sde/train.py", f"training.seed={config['training']['seed']}"], "python": "3.11.7"}
    (path / "environment.json").write_text(json.dumps(environment))
    lines = [
        {"step": step, "seconds": 1.5 * step, "train/loss": 1.0, "val/loss": loss}
        for step, loss in (losses or {}).items()
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in checkpoints:
        file = checkpoint_path(path / "checkpoints", step)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(100))
    then = time.time() - age * DAY
    for file in path.rglob("*"):
        os.utime(file, (then, then))
    return path


def runs(folder: Path, *options: str) -> Answer:
    """python -m sde.runs in a folder."""
    return command("sde.runs_table", *options, folder=folder)


def rows(folder: Path, *options: str) -> list[dict[str, Any]]:
    """The list as JSON."""
    done = runs(folder, "format=json", *options)
    assert done.code == 0, done.err
    return json.loads(done.out)


def everything(folder: Path) -> dict[str, bytes | None]:
    """All paths below a folder, with the content of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """A folder with four runs, from the newest: stopped, finished, empty, stopped."""
    root = tmp_path / "runs"
    make_run(root, "day/c_stopped", (50,), {10: 0.5, 50: 0.3, 60: 0.4}, 1, training={"seed": 3})
    make_run(root, "multirun/day/0_finished", (50, 100), {50: 0.2, 100: None}, 2, model={"width": 32})
    make_run(root, "day/a_empty", (), {10: 0.9}, 3)
    make_run(root, "day/b_stopped", (20, 40, 60, 80), {20: 0.7, 40: 0.1, 60: 0.6, 80: 0.15}, 40)
    return tmp_path


# The list


def test_the_list_says_what_the_files_say(four: Path) -> None:
    found = {row["run"]: row for row in rows(four)}
    assert list(found) == ["day/c_stopped", "multirun/day/0_finished", "day/a_empty", "day/b_stopped"]
    assert [row["state"] for row in found.values()] == ["stopped", "finished", "empty", "stopped"]
    assert [(row["step"], row["steps"]) for row in found.values()] == [(50, 100), (100, 100), (0, 100), (80, 100)]
    assert [row["seconds"] for row in found.values()] == [90.0, 150.0, 15.0, 120.0]
    assert [(row["best"], row["best_step"]) for row in found.values()] == [(0.3, 50), (0.2, 50), (0.9, 10), (0.1, 40)]
    assert [(row["last"], row["last_step"]) for row in found.values()] == [
        (0.4, 60),
        (None, 100),
        (0.9, 10),
        (0.15, 80),
    ]
    assert {(row["sde"], row["model"], row["data"]) for row in found.values()} == {("vp", "mlp", "moons")}
    for name, row in found.items():
        sizes = [path.stat().st_size for path in (four / "runs" / name).rglob("*") if path.is_file()]
        assert row["bytes"] == sum(sizes)
        assert row["path"] == str(four / "runs" / name)
    assert found["day/b_stopped"]["age"] == pytest.approx(40 * DAY, abs=60)


def test_a_run_is_running_while_its_lock_is_held(four: Path) -> None:
    """Asking does not disturb: the lock is still held, nothing is written, and a run that is free can be locked."""
    path = four / "runs" / "day" / "c_stopped"
    before = everything(four)
    with Run(path).locked():
        (row,) = rows(four, "state=running")
        assert (row["run"], row["step"]) == ("day/c_stopped", 60)  # what it has logged, not what it has saved
        assert Run(path).is_locked()
        with pytest.raises(UserError, match="written by another process"), Run(path).locked():
            pass
    assert rows(four, "state=running") == []
    assert everything(four) == before
    (path / ".lock").touch()  # left by a process that was killed
    assert not Run(path).is_locked()
    with Run(path).locked():
        assert Run(path).is_locked()


@pytest.mark.parametrize(
    ("options", "order"),
    [
        (["sort=age"], "c0ab"),
        (["sort=name"], "abc0"),
        (["sort=state"], "0cba"),
        (["sort=step"], "0bca"),
        (["sort=time"], "0bca"),
        (["sort=best"], "b0ca"),
        (["sort=best", "maximize=true"], "abc0"),
        (["sort=last"], "bca0"),  # one that is not finite stands last
        (["sort=last", "maximize=true"], "acb0"),
        (["sort=size"], "b0ca"),
        (["n=2"], "c0"),
        (["state=stopped"], "cb"),
        (["match=day/*"], "cab"),
        (["match=?_stopped"], "cb"),
        (["older_than=2.5"], "ab"),
        (["state=stopped", "older_than=30"], "b"),
    ],
)
def test_sorting_and_choosing(options: list[str], order: str, four: Path) -> None:
    found = [row["run"].rpartition("/")[2][0] for row in rows(four, *options)]
    if options == ["sort=state"]:  # the two stopped ones are equal
        assert found[0] == "0"
        assert found[-1] == "a"
    else:
        assert "".join(found) == order


def test_the_highest_value_is_the_best_where_it_is_wanted(four: Path) -> None:
    found = {row["run"]: (row["best"], row["best_step"]) for row in rows(four, "maximize=true")}
    assert found["day/b_stopped"] == (0.7, 20)


def test_any_number_of_the_record_can_be_shown(four: Path) -> None:
    assert {row["best"] for row in rows(four, "metric=train/loss")} == {1.0}
    with (four / "runs" / "day" / "a_empty" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "likelihood/bits": 3.5, "kind": "\\"val/loss\\": 0.0"}\n{"step": 12, "val/lo')
    found = {row["run"]: row for row in rows(four, "metric=likelihood/bits")}
    assert found["day/a_empty"]["best"] == 3.5
    assert found["day/a_empty"]["seconds"] == 15.0
    assert found["day/b_stopped"]["best"] is None
    assert [row["best"] for row in rows(four, "match=*a_empty")] == [0.9]
    done = runs(four, "metric=val/los")
    assert done.code == 2
    assert "metric=val/los is in none of the runs" in done.sentence
    assert "did you mean 'val/loss'" in done.sentence


def test_the_table(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    head, *lines, end = runs(four).out.splitlines()
    assert head.split() == [
        "run",
        "state",
        "step",
        "time",
        "best",
        "val/loss",
        "last",
        "sde",
        "model",
        "data",
        "size",
        "age",
    ]
    expected = ["day/c_stopped", "stopped", "50/100", "1:30", "0.3", "at", "50", "0.4", "vp", "mlp", "moons"]
    assert lines[0].split()[: len(expected)] == expected
    assert lines[1].split()[5:8] == ["at", "50", "nan"]
    assert len({line.index(" moons ") for line in lines}) == 1
    assert end.startswith("4 runs, 1 finished, 2 stopped, 1 empty, ")
    assert runs(four, "n=1").out.splitlines()[-1].startswith("1 of 4 runs, 1 stopped, ")


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_table_fits_the_terminal(width: int, four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(four / "runs", "multirun/2026-11-21/19-23-46/12_rectified_flow_ncsnpp_cifar10", (100,))
    monkeypatch.setenv("COLUMNS", str(width))
    for options in ([], ["compare=[day/c,day/b]"]):
        lines = runs(four, *options).out.splitlines()
        assert max(len(line) for line in lines[:6]) <= width
    head = runs(four).out.splitlines()[0]
    assert {"run", "state", "step", "best"} <= set(head.split())
    assert ("data" in head.split()) == (width == 200)


def test_csv_has_all_columns(four: Path) -> None:
    head, *lines = csv.reader(io.StringIO(runs(four, "format=csv").out))
    assert head == list(rows(four)[0])
    assert [line[0] for line in lines] == [row["run"] for row in rows(four)]
    assert float(lines[0][head.index("best")]) == 0.3
    assert math.isnan(float(lines[1][head.index("last")]))


def test_what_is_no_run_is_not_listed(four: Path) -> None:
    """Runs within runs, W&B's config.yaml, links, hidden folders, somebody's config.yaml."""
    root = four / "runs"
    make_run(root, "day/c_stopped/samples/inner", (1,))
    make_run(root, ".trash-old", (1,))
    (root / "other" / "files").mkdir(parents=True)
    (root / "other" / "files" / "config.yaml").write_text("a: 1\n")
    make_run(four, "elsewhere/outside", (1,))
    (root / "link").symlink_to(four / "elsewhere")
    assert len(rows(four)) == 4
    (four / "linked").symlink_to(root)  # the folder of all runs may be a link
    assert len(rows(four, "runs=linked")) == 4


def test_a_damaged_configuration_does_not_hide_the_others(four: Path) -> None:
    (four / "runs" / "day" / "b_stopped" / "config.yaml").write_text("a: [1,\n")
    found = {row["run"]: row for row in rows(four)}
    assert len(found) == 4
    assert (found["day/b_stopped"]["state"], found["day/b_stopped"]["sde"]) == ("stopped", None)


def test_a_run_without_a_number_of_steps_is_finished(four: Path) -> None:
    """One that was made from a network trained elsewhere."""
    make_run(four / "runs", "foreign", (7,), training={"steps": None})
    assert {row["run"]: row["state"] for row in rows(four)}["foreign"] == "finished"


def test_a_trained_run(tmp_path: Path) -> None:
    done = command("sde.train", *TINY_2D, "training.checkpoint_every=10", "hydra.run.dir=runs/p", folder=tmp_path)
    assert done.code == 0, done.err
    (row,) = rows(tmp_path)
    record = [json.loads(line) for line in (tmp_path / "runs" / "p" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss"] for line in record if "val/loss" in line]
    assert (row["state"], row["step"], row["steps"], row["checkpoint"]) == ("finished", 20, 20, 20)
    assert (row["best"], row["last"], row["seconds"]) == (min(losses), losses[-1], record[-1]["seconds"])
    assert (row["sde"], row["model"], row["data"]) == ("vp", "mlp", "moons")
    removed = runs(tmp_path, "prune=checkpoints", "metric=train/lr", "maximize=true", "yes=true")
    assert removed.code == 0, removed.err
    assert [step for step, _ in list_checkpoints(tmp_path / "runs" / "p" / "checkpoints")] == [20]


# The comparison


def test_the_comparison_shows_what_differs_and_nothing_else(four: Path) -> None:
    (four / "runs" / "day" / "b_stopped" / "environment.json").write_text(
        json.dumps({"command": ["/x/sde/train.py", "a b"], "python": "3.12.1", "packages": {"torch": "2.6"}})
    )
    done = runs(four, "compare=[c_stop,multirun,day/b]", "format=json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["runs"] == ["day/c_stopped", "multirun/day/0_finished", "day/b_stopped"]
    assert found["configuration"] == {"model.width": [16, 32, 16], "training.seed": [3, 0, 0]}
    assert found["results"]["best"] == [0.3, 0.2, 0.1]
    assert found["results"]["state"] == ["stopped", "finished", "stopped"]
    assert found["results"]["last"] == [0.4, None, 0.15]
    assert found["versions"] == {
        "python": ["3.11.7", "3.11.7", "3.12.1"],
        "packages.torch": ["(none)", "(none)", "2.6"],
    }
    assert found["commands"][0] == ["/x/sde/train.py", "training.seed=3"]


def test_the_comparison_as_a_table(four: Path) -> None:
    lines = runs(four, "compare=[latest,0_fin]").out.splitlines()
    assert lines[0].split() == ["configuration", "c_stopped", "0_finished"]
    assert lines[1].split() == ["model.width", "16", "32"]
    assert lines[2].split() == ["training.seed", "3", "0"]
    assert "versions: no difference" in lines
    assert lines[-1] == "multirun/day/0_finished: train.py training.seed=0"
    table = list(csv.reader(io.StringIO(runs(four, "compare=[latest,0_fin]", "format=csv").out)))
    assert ["configuration", "model.width", "16", "32"] in table
    assert {len(line) for line in table} == {4}


def test_names_of_runs(four: Path) -> None:
    found = find_runs(four / "runs", Metric("val/loss"))
    c = four / "runs" / "day" / "c_stopped"
    for name in ("latest", "day/c_stopped", "c_stopped", "c_", str(c), str(c) + "/"):
        assert named_run(found, name, "compare").run.path == c.resolve(), name
    make_run(four / "runs", "day/c_stopped2")
    found = find_runs(four / "runs", Metric("val/loss"))
    assert named_run(found, "c_stopped", "compare").name == "day/c_stopped"  # a whole name is not ambiguous
    with pytest.raises(UserError, match=r"compare=day/c could be any of 2 runs \(day/c_stopped2, day/c_stopped\)"):
        named_run(found, "day/c", "compare")
    with pytest.raises(UserError, match="did you mean 'day/c_stopped'"):
        named_run(found, "day/c_stoped", "compare")


# Pruning


def kept(root: Path) -> dict[str, list[int]]:
    """The steps of the checkpoints of each run."""
    return {run.name: [step for step, _ in list_checkpoints(run.run.checkpoints)] for run in find_runs(root, METRIC)}


METRIC = Metric("val/loss")


@pytest.mark.parametrize("rule", ["checkpoints", "empty", "[c_stopped,0_finished]"])
def test_without_yes_nothing_goes(rule: str, four: Path) -> None:
    before = everything(four)
    done = runs(four, f"prune={rule}")
    assert done.code == 0, done.err
    assert "would remove" in done.out
    assert "add yes=true" in done.out
    assert everything(four) == before


def test_old_checkpoints_go_but_not_the_best(four: Path) -> None:
    """b_stopped has 20, 40, 60 and 80, and its loss was the lowest at 40."""
    asked = runs(four, "prune=checkpoints")
    assert "2 of 4 checkpoints of day/b_stopped (20, 60), 200 B" in asked.out
    assert "this would free 200 B" in asked.out  # 50 of 0_finished is its best
    done = runs(four, "prune=checkpoints", "yes=true")
    assert done.out.splitlines()[-1] == "freed 200 B"
    assert kept(four / "runs") == {
        "day/c_stopped": [50],
        "multirun/day/0_finished": [50, 100],
        "day/a_empty": [],
        "day/b_stopped": [40, 80],
    }
    assert runs(four, "prune=checkpoints", "yes=true").out == "there is nothing to remove\n"
    assert runs(four, "prune=checkpoints", "metric=train/loss", "yes=true").code == 0
    assert kept(four / "runs")["day/b_stopped"] == [40, 80]  # all equal: the first


@pytest.mark.parametrize(
    ("training", "options", "expected"),
    [
        ({}, ["keep=2"], [40, 60, 80]),
        ({}, ["keep=4"], [20, 40, 60, 80]),
        ({}, ["maximize=true"], [20, 80]),
        ({"keep_every": 60}, [], [40, 60, 80]),
        ({"keep_best": "val/loss"}, ["maximize=true"], [20, 40, 80]),
    ],
)
def test_what_is_kept(training: dict[str, Any], options: list[str], expected: list[int], tmp_path: Path) -> None:
    losses: dict[int, float | None] = {20: 0.7, 40: 0.1, 60: 0.6, 80: 0.15}
    make_run(tmp_path / "runs", "r", (20, 40, 60, 80), losses, training=training)
    done = runs(tmp_path, "prune=checkpoints", "yes=true", *options)
    assert done.code == 0, done.err
    assert kept(tmp_path / "runs") == {"r": expected}


def test_a_metric_measured_between_checkpoints_belongs_to_the_next_one(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "r", (20, 40, 60), {15: 0.5, 35: 0.1, 55: 0.6})
    runs(tmp_path, "prune=checkpoints", "yes=true")
    assert kept(tmp_path / "runs") == {"r": [40, 60]}


def test_empty_runs_go_and_the_folders_that_held_nothing_else(four: Path) -> None:
    make_run(four / "runs", "old/e", (), {})
    (four / "runs" / "day" / "a_empty" / "previews").mkdir()
    assert runs(four, "prune=empty", "older_than=10").out == "there is nothing to remove\n"
    done = runs(four, "prune=empty", "yes=true")
    assert done.code == 0, done.err
    assert sorted(kept(four / "runs")) == ["day/b_stopped", "day/c_stopped", "multirun/day/0_finished"]
    assert sorted(path.name for path in (four / "runs").iterdir()) == ["day", "multirun"]
    assert (four / "runs" / "day" / "c_stopped" / "config.yaml").is_file()


@pytest.mark.parametrize(
    "name",
    [
        "thesis.txt",
        "config.yaml.bak",
        "samples/heun-18-seed0/samples.npz",
        "checkpoints/step-00000020.damaged",
        "checkpoints/mine.pt",
        "previews/mine.png",
        ".notes",
    ],
)
def test_a_run_without_a_checkpoint_stays_with_files_that_no_training_writes(name: str, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for run in ("a/r", "a/s"):
        path = make_run(root, run)
        written = (
            "checkpoints/.step-00000005.pt.1.ab",
            "wandb-id.txt",
            "previews/step-00000004.png",
            "wandb/x/y",
            ".config.yaml.7.c",
        )
        for file in (*written, "ema/snapshot-00000004.safetensors", *([name] if run == "a/r" else [])):
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_text("x")
    before = everything(root / "a" / "r")
    for option in ([], ["yes=true"]):
        done = runs(tmp_path, "prune=empty", *option)
        assert done.code == 0, done.err
        assert f"left a/r: it holds more than what a run without a checkpoint is made of: {name}\n" in done.out
        assert f"{'removed' if option else 'would remove'} the run a/s" in done.out
    assert everything(root / "a" / "r") == before
    assert not (root / "a" / "s").exists()


def test_a_file_that_comes_in_between_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_run(tmp_path / "runs", "r")
    whole = sde.runs_prune.whole

    def late(*arguments: Any, **named: Any) -> Any:
        (path / "thesis.txt").write_text("done")
        return whole(*arguments, **named)

    monkeypatch.setattr(sde.runs_prune, "whole", late)
    assert "somebody has begun to use it" in runs(tmp_path, "prune=empty", "yes=true").out
    assert (path / "thesis.txt").read_text() == "done"


def test_hidden_folders_of_others_are_no_rest_of_a_removal(four: Path) -> None:
    for name in (".trash-mine", ".trash-1000", ".trash-a-0123456", ".trash-a-0123456g"):
        (four / "runs" / name).mkdir()
        (four / "runs" / name / "precious").touch()
    before = everything(four)
    assert ".trash" not in runs(four, "prune=checkpoints").out
    runs(four, "prune=[c_stopped]", "yes=true")
    assert {k for k in before if ".trash" in k} == {k for k in everything(four) if ".trash" in k}


def test_the_last_run_leaves_the_folder_of_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "a/b/r")
    assert runs(tmp_path, "prune=empty", "yes=true").code == 0
    assert everything(tmp_path) == {"runs": None}


def test_named_runs_go_as_far_as_they_match(four: Path) -> None:
    done = runs(four, "prune=[c_stopped,b_stopped]", "older_than=30", "yes=true")
    assert done.code == 0, done.err
    assert "left day/c_stopped: " in done.out
    assert "removed the run day/b_stopped (stopped, step 80 of 100)" in done.out
    assert sorted(kept(four / "runs")) == ["day/a_empty", "day/c_stopped", "multirun/day/0_finished"]


@pytest.mark.parametrize("rule", ["checkpoints", "empty", "[r]"])
def test_what_is_being_trained_is_left_alone(rule: str, tmp_path: Path) -> None:
    path = make_run(tmp_path / "runs", "r", () if rule == "empty" else (20, 40), age=50)
    with Run(path).locked():
        before = everything(tmp_path)
        done = runs(tmp_path, f"prune={rule}", "yes=true")
        assert done.code == 0, done.err
        assert "left r: it is being trained" in done.out
        assert everything(tmp_path) == before


def test_a_training_that_begins_in_between_keeps_its_run(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the lock, or its first checkpoint, by the time that the run would go."""
    path = four / "runs" / "day" / "a_empty"
    plan = sde.runs_prune.planned

    def late(*arguments: Any) -> Any:
        yield from list(plan(*arguments))
        checkpoint_path(path / "checkpoints", 5).parent.mkdir(exist_ok=True)
        checkpoint_path(path / "checkpoints", 5).write_bytes(b"new")

    monkeypatch.setattr(sde.runs_prune, "planned", lambda *arguments: list(late(*arguments)))
    done = runs(four, "prune=empty", "yes=true")
    assert "somebody has begun to use it" in done.out
    assert done.out.endswith("freed 0 B\n")
    assert kept(four / "runs")["day/a_empty"] == [5]
    monkeypatch.setattr(sde.runs_prune, "why_left", lambda run: None)
    with Run(path).locked():
        assert "somebody has begun to use it" in runs(four, "prune=[a_empty]", "yes=true").out
    assert kept(four / "runs")["day/a_empty"] == [5]


def test_a_lock_of_another_machine_counts_for_an_hour(tmp_path: Path) -> None:
    """Where a file system does not share its locks, a lock file and a run that was just written have to do."""
    path = make_run(tmp_path / "runs", "r")
    (path / ".lock").touch()
    done = runs(tmp_path, "prune=empty", "yes=true")
    assert "perhaps by another machine" in done.out
    assert path.is_dir()
    for file in (path / "config.yaml", path / "metrics.jsonl"):
        os.utime(file, (time.time() - 4000,) * 2)
    assert runs(tmp_path, "prune=empty", "yes=true").code == 0
    assert not path.exists()


def test_nothing_outside_the_folder_of_runs_goes(four: Path) -> None:
    outside = make_run(four, "elsewhere/outside", age=9)
    root = four / "runs"
    (root / "gate").symlink_to(outside)
    elsewhere = make_run(four, "other/r", (20, 40, 60))
    r = make_run(root, "day/linked", ())
    (r / "checkpoints").symlink_to(elsewhere / "checkpoints")
    (r / "samples").symlink_to(outside)
    before = everything(outside), everything(elsewhere)
    for rule in ("checkpoints", "empty"):
        done = runs(four, f"prune={rule}", "yes=true")
        assert done.code == 0, done.err
    assert "left day/linked: its checkpoints are a link" in runs(four, "prune=checkpoints", "yes=true").out
    for name in (str(outside), "gate", "../elsewhere/outside"):
        refused = runs(four, f"prune=['{name}']", "yes=true")
        assert refused.code == 2
        assert "is none of the" in refused.sentence
    (r / "checkpoints").unlink()
    kept_for_it = runs(four, "prune=empty", "yes=true")
    assert "left day/linked: it holds more than what a run without a checkpoint is made of: samples" in kept_for_it.out
    assert runs(four, "prune=[day/linked]", "yes=true").code == 0
    assert not r.exists()
    assert (everything(outside), everything(elsewhere)) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    for name in ("config.yaml", "data.json", "precious"):
        (tmp_path / "runs" / "project").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "project" / name).write_text("{}")
    done = runs(tmp_path, "prune=empty", "yes=true")
    assert "left project: its config.yaml is not that of a run" in done.out
    assert (tmp_path / "runs" / "project" / "precious").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_removal_leaves_nothing_that_looks_like_a_run(
    error: type[BaseException], four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> None:
        raise error

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    done = runs(four, "prune=[c_stopped]", "yes=true")
    assert done.code in (1, 130)
    (trash,) = (four / "runs" / "day").glob(".trash-*")
    assert list_checkpoints(trash / "checkpoints")
    assert "day/c_stopped" not in kept(four / "runs")
    assert find_run("latest", four / "runs").path.name != trash.name
    assert not (trash / "config.yaml").exists()
    monkeypatch.undo()
    asked = runs(four, "prune=checkpoints")
    assert f"would remove day/{trash.name}, the rest of a removal" in asked.out
    assert runs(four, "prune=checkpoints", "yes=true").code == 0
    assert not trash.exists()


def test_a_look_at_the_lock_does_not_turn_a_training_away(tmp_path: Path) -> None:
    """A training that begins while `is_locked` holds the file for a moment tries again."""
    fcntl = pytest.importorskip("fcntl")
    run = Run(tmp_path)
    calls = []

    class Busy:
        def __getattr__(self, name: str) -> Any:
            return getattr(fcntl, name)

        def flock(self, handle: Any, how: int) -> None:
            calls.append(how)
            if len(calls) == 1:
                raise BlockingIOError
            fcntl.flock(handle, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sde.runs.fcntl", Busy())
        with run.locked():
            assert len(calls) == 2
            assert run.is_locked()


MISTAKES = [
    (["format=xml"], "format='xml' is not one of table, json, csv"),
    (["sort=loss"], "sort='loss' is not one of age, name"),
    (["state=failed"], "state='failed' is not one of running, finished, stopped, empty"),
    (["n=0"], "n=0 is out of range"),
    (["keep=0"], "keep=0 is out of range"),
    (["keep=all"], "keep='all' must be a whole number"),
    (["older_than=-1"], "older_than=-1 is out of range"),
    (["yes=maybe"], "yes='maybe' must be true or false"),
    (["compare=latest"], "compare='latest' must be a list of two runs or more"),
    (["compare=[latest]"], "must be a list of two runs or more"),
    (["compare=[latest,x]"], "compare=x is none of the 4 runs"),
    (["prune=checkpoint"], "prune='checkpoint' is no rule: it is checkpoints, empty, or a list"),
    (["prune=[]"], "prune=[] is no rule"),
    (["prune=[x]"], "prune=x is none of the 4 runs"),
    (["prune=[day]"], "prune=day could be any of 3 runs"),
    (["prune=empty", "compare=[a,b]"], "two commands"),
    (["runs=nowhere"], "there is no run in"),
    (["prun=empty"], "did you mean 'prune'"),
]


@pytest.mark.parametrize(("options", "expected"), MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES])
def test_a_mistake_gets_one_sentence(options: list[str], expected: str, four: Path) -> None:
    before = everything(four)
    done = runs(four, *options, "yes=true") if "yes" not in options[0] else runs(four, *options)
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1
    assert expected in done.err
    assert everything(four) == before


def test_words_for_numbers() -> None:
    assert [readable_bytes(n) for n in (0, 1023, 1024, 10240, 1.5 * 2**30, 2**50)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "10 KiB",
        "1.5 GiB",
        "1024.0 TiB",
    ]
    assert [readable_time(s) for s in (None, 0, 59.6, 3599, 3600, 360061)] == [
        "-",
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "100:01:01",
    ]
    assert [readable_age(s) for s in (3, 60, 3600, 5 * DAY)] == ["3 s", "1 min", "1 h", "5 d"]
    assert shortened("abcdefghij", 7) == "ab…ghij"
    assert all(len(shortened("abcdefghij", k)) == k for k in range(1, 11))
    assert distinct(["a/x/1", "b/x/1", "b/y/1"]) == ["a/x/1", "b/x/1", "b/y/1"]
    assert distinct(["a/x", "b/y"]) == ["x", "y"]
    assert flat({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert fitted([{"run": "run", "age": "age"}, {"run": "r" * 30, "age": "1"}], 26) == [
        "run",
        "r" * 9 + "…" + "r" * 16,
    ]


def test_the_module_is_a_command(four: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sde.runs", "state=finished", "sort=best"],
        cwd=four,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(sde.__file__).parent.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("multirun/day/0_finished  finished  100/100")
    assert done.stderr == ""
