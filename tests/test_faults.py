"""Faults that a training meets, each done to a real process: kills, full disks, damaged files, signals, bad numbers.

What survives is compared with a training that nothing happened to: the same bits at the end, and the same record.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from PIL import Image

from sde import runs
from sde.runs import Run, open_checkpoint
from sde.training.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint, load_newest
from tests.commands import TINY_2D, command
from tests.faulty import FILLER, PATIENCE, Plan, Trainings, wait_until

EVERY = 5  # steps between checkpoints
STEPS = 40
WORDS = [
    *TINY_2D,
    "training.device=cpu",
    f"training.steps={STEPS}",
    f"training.log_every={EVERY}",
    f"training.checkpoint_every={EVERY}",
    "training.validate_every=10",
    "training.preview_every=0",
    "training.warmup=4",
    "ema.std=[0.1]",
    f"ema.snapshot_every={EVERY}",
]
TIMED = ("seconds", "train/pictures_per_second", "train/memory_gib")
GO_ON = "go on with: python -m sde.train resume="


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    process = Trainings(tmp_path_factory.mktemp("trainings"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def whole(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to which nothing happened, with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    done = trainings.run("sde.train", *WORDS, "training.keep=0", "hydra.run.dir=r", folder=folder)
    assert done.code == 0, done.err
    return folder / "r"


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of it after 20 steps of 40."""
    run = tmp_path / "r"
    shutil.copytree(whole, run)
    for step, path in list_checkpoints(run / "checkpoints"):
        if step > 20:
            path.unlink()
    return run


def steps_of(run: Path) -> list[int]:
    """The steps of its checkpoints."""
    return [step for step, _ in list_checkpoints(run / "checkpoints")]


def state_of(path: Path) -> dict[str, Any]:
    """All tensors and numbers of a checkpoint besides the configuration, each under its own name."""

    def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, child in items:
                yield from leaves(child, f"{name}/{key}")
        else:
            yield name, value

    content = load_checkpoint(path).content
    return dict(leaves({key: value for key, value in content.items() if key != "config"}, ""))


def differing(one: Path, other: Path) -> list[str]:
    """Names under which two checkpoints do not hold the same bits."""
    a, b = state_of(one), state_of(other)
    assert a.keys() == b.keys()
    return [
        name for name in a if not (torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name])
    ]


def record_of(run: Path) -> list[dict[str, Any]]:
    """The lines of its metrics, without the times that they took."""
    texts = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(text).items() if name not in TIMED} for text in texts]


def hidden(folder: Path) -> list[str]:
    """Temporary files and locks."""
    return sorted(path.name for path in folder.rglob(".*"))


def assert_same_end(run: Path, reference: Path, step: int = STEPS) -> None:
    """The same bits after `step` steps, the same record up to then and the same snapshots; nothing else left."""
    paths = [checkpoint_path(folder / "checkpoints", step) for folder in (run, reference)]
    assert differing(*paths) == []
    assert record_of(run) == [line for line in record_of(reference) if line["step"] <= step]
    snapshots = sorted((run / "ema").glob("snapshot-*"))
    assert snapshots
    assert [path.read_bytes() for path in snapshots] == [(reference / "ema" / p.name).read_bytes() for p in snapshots]
    assert hidden(run) == []


# Kills


@pytest.mark.slow
def test_kills_at_any_moment_lose_one_interval_at_most(
    trainings: Trainings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 kills from outside at random moments, and 14 at random events of a checkpoint that is being written."""
    draw = random.Random(0)
    words = [*WORDS, "training.steps=1000000", "training.keep_best=val/loss", "resume=auto", "hydra.run.dir=r"]
    run, left_behind, inside = tmp_path / "r", 0, 0
    events = [(draw.randrange(2), draw.randrange(80)) for _ in range(10)]
    for at in [None] * 6 + [*events, "synced", "renaming", "renamed", "removed"] + [None] * 6:
        since = steps_of(run)[-1] if steps_of(run) else 0
        plan = Plan() if at is None else Plan(kill=at if isinstance(at, tuple) else (1, at))
        trainings.start("sde.train", *words, folder=tmp_path, plan=plan)
        if at is None:
            trainings.wait_for("step", since + draw.randint(1, 3 * EVERY))
            for _ in range(draw.randrange(20_000)):  # a moment of any length
                pass
            os.kill(trainings.pid, signal.SIGKILL)
        killed = trainings.end()
        assert killed.code == -signal.SIGKILL, killed.err
        assert "falling back" not in killed.err
        notes = trainings.progress()
        made = max([since, *(number for what, number in notes if what == "step")])
        saved = max([since, *(number for what, number in notes if what == "saved")])
        began = max([since, *(number for what, number in notes if what == "saving")])
        inside += began > saved
        left_behind += any(name.startswith(".step-") for name in hidden(run))
        newest = load_newest(run / "checkpoints").step if steps_of(run) else 0
        assert saved <= newest <= began
        assert made - newest <= EVERY
        assert capsys.readouterr().err == ""
    assert inside >= 8
    assert left_behind >= 4
    end = newest + EVERY + 2
    done = trainings.run("sde.train", *words, f"training.steps={end}", folder=tmp_path)
    assert done.code == 0, done.err
    words = [*words[:-2], f"training.steps={end}", "hydra.run.dir=whole"]
    done = trainings.run("sde.train", *words, folder=tmp_path)
    assert done.code == 0, done.err
    assert_same_end(run, tmp_path / "whole", end)
    assert steps_of(run) == steps_of(tmp_path / "whole")
    assert [line["step"] for line in record_of(run)] == [*range(EVERY, end, EVERY), end]


@pytest.mark.slow
def test_kills_of_the_command_itself(trainings: Trainings, tmp_path: Path) -> None:
    words = [*WORDS, "training.steps=1000000", "training.keep=0", "resume=auto", "hydra.run.dir=r"]
    run = tmp_path / "r"
    for _ in range(2):
        before = len(steps_of(run))
        with process(*words, folder=tmp_path) as real:
            wait_until(lambda: len(steps_of(run)) > before + 2 or real.poll() is not None)  # noqa: B023
            real.kill()
        assert real.returncode == -signal.SIGKILL
    end = load_newest(run / "checkpoints").step + 3
    done = trainings.run("sde.train", *words, f"training.steps={end}", folder=tmp_path)
    assert done.code == 0, done.err
    words = [*words[:-2], f"training.steps={end}", "hydra.run.dir=whole"]
    assert trainings.run("sde.train", *words, folder=tmp_path).code == 0
    assert_same_end(run, tmp_path / "whole", end)


def process(*words: str, folder: Path, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A true `python -m sde.train`."""
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "sde.train", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# Full disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A small disk of so many KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], capture_output=True)
        except FileNotFoundError:
            pytest.skip("there is no mount")
        if done.returncode:
            pytest.skip("mounting is not permitted")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


def test_a_disk_that_is_full_for_a_while(
    trainings: Trainings, whole: Path, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    """Three checkpoints, three snapshots and a preview are left out, and what is there stays."""
    words = [*WORDS, "training.keep=1", "training.keep_every=10", "training.preview_every=15", "hydra.run.dir=r"]
    done = trainings.run("sde.train", *words, folder=disk(2000), plan=Plan(fill=(12, 27)))
    run = tmp_path / "disk" / "r"
    assert done.code == 0, done.err
    for step in (15, 20, 25):
        assert f"warning: no space is left on the disk for the checkpoint of step {step}: going on" in done.err
    assert done.err.count("left out this snapshot of averages") == 3
    assert done.err.count("left out this preview") == 1
    assert "lacks" not in done.err
    assert steps_of(run) == [10, 30, 40]
    assert differing(*(checkpoint_path(folder / "checkpoints", 10) for folder in (run, whole))) == []
    assert_same_end(run, whole)
    assert [path.name for path in sorted((run / "previews").glob("*.png"))] == [
        "step-00000030.png",
        "step-00000040.png",
    ]


def test_a_disk_that_stays_full_and_then_has_space(
    trainings: Trainings, whole: Path, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    """The last checkpoint has to be written; older ones make room as long as they can."""
    words = [*WORDS, "training.keep=2", "hydra.run.dir=r"]
    done = trainings.run("sde.train", *words, folder=disk(2000), plan=Plan(fill=(12, 1000)))
    run = tmp_path / "disk" / "r"
    assert done.code == 1, done.err
    (step,) = steps_of(run)
    assert step > 10  # those of steps 5 and 10 have made room for it
    assert done.sentence == (
        f"error: no space is left on the disk for the checkpoint of step 40: free some, and go on from step {step} "
        "with python -m sde.train resume=r"
    )
    assert "Traceback" not in done.err
    assert hidden(run) == []
    assert load_newest(run / "checkpoints").step == step
    (run.parent / FILLER).unlink()
    on = trainings.run("sde.train", "resume=r", folder=run.parent)
    assert on.code == 0, on.err
    assert_same_end(run, whole)


def test_a_signal_on_a_full_disk_is_not_told_to_be_saved(
    trainings: Trainings, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    plan = Plan(fill=(3, 1000), signals=(("step", 4, signal.SIGTERM),))
    done = trainings.run("sde.train", *WORDS, "hydra.run.dir=r", folder=disk(2000), plan=plan)
    assert done.code == 1
    assert done.sentence == (
        "error: no space is left on the disk for the checkpoint of step 4: free some, and train again, for there is "
        "none yet"
    )
    assert GO_ON not in done.err


@pytest.mark.parametrize(
    ("where", "number"), [("write", errno.ENOSPC), ("fsync", errno.EDQUOT)], ids=["write-ENOSPC", "fsync-EDQUOT"]
)
def test_writes_that_find_no_space(trainings: Trainings, whole: Path, tmp_path: Path, where: str, number: int) -> None:
    words = [*WORDS, "training.keep=1", "hydra.run.dir=r"]
    done = trainings.run("sde.train", *words, folder=tmp_path, plan=Plan(refuse=(where, 20, 30, number)))
    assert done.code == 0, done.err
    assert [f"checkpoint of step {step}" in done.err for step in (15, 20, 25, 30)] == [False, True, True, False]
    assert_same_end(tmp_path / "r", whole)


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_disk_that_fails_ends_the_training(trainings: Trainings, whole: Path, tmp_path: Path, where: str) -> None:
    plan = Plan(refuse=(where, 20, STEPS + 1, errno.EIO))
    done = trainings.run("sde.train", *WORDS, "hydra.run.dir=r", folder=tmp_path, plan=plan)
    assert done.code == 1
    assert done.sentence.startswith("error: Input/output error")
    assert "Traceback" not in done.err
    assert steps_of(tmp_path / "r") == [5, 10, 15]
    assert hidden(tmp_path / "r") == []
    on = trainings.run("sde.train", "resume=r", folder=tmp_path)
    assert on.code == 0, on.err
    assert_same_end(tmp_path / "r", whole)


# Damaged files


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_checkpoint_is_passed_over(trainings: Trainings, whole: Path, copied: Path, damage: str) -> None:
    path = checkpoint_path(copied / "checkpoints", 20)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda info: info.file_size)
        content[largest.header_offset + largest.file_size // 2] ^= 4  # the header is far shorter than half of a record
    path.write_bytes(content)
    done = trainings.run("sde.train", "resume=r", folder=copied.parent)
    assert done.code == 0, done.err
    assert "is damaged" in done.err
    assert "falling back to the one before" in done.err
    assert "going on from step 15" in done.out
    assert path.read_bytes() != content  # written again
    assert not path.with_suffix(".damaged").exists()
    assert_same_end(copied, whole)


def test_every_checkpoint_damaged(trainings: Trainings, copied: Path) -> None:
    for _, path in list_checkpoints(copied / "checkpoints"):
        path.write_bytes(b"")
    before = (copied / "metrics.jsonl").read_bytes()
    done = trainings.run("sde.train", "resume=r", folder=copied.parent)
    assert done.code == 2
    assert done.sentence == "error: all 4 checkpoints of r are damaged: train again"
    assert (copied / "metrics.jsonl").read_bytes() == before


def pictures(folder: Path) -> Path:
    """A folder of 40 small pictures."""
    folder.mkdir()
    for k in range(40):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:02}.{'png' if k % 2 else 'jpg'}")
    return folder


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


PICTURES = [word for word in WORDS if not word.startswith(("data", "model"))]
PICTURES = [*PICTURES, "data=images", "data.path=pictures", "data.size=8", "hydra.run.dir=runs/today/r"]
PICTURES = [*PICTURES, "model=ddpmpp", "model.channels=4", "model.channel_multipliers=[1]", "model.blocks_per_level=1"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("04.jpg", cut_in_half),
        ("05.png", cut_in_half),
        ("06.jpg", lambda path: path.with_name("06.png").write_text("a letter")),
    ],
    ids=["jpeg", "png", "text"],
)
def test_a_damaged_picture_is_named(
    trainings: Trainings, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(pictures(tmp_path / "pictures") / name)
    plan = Plan(environment={"SDE_CACHE": str(tmp_path / "cache")})
    done = trainings.run("sde.train", *PICTURES, folder=tmp_path, plan=plan)
    assert done.code == 2
    named = "06.png" if name == "06.jpg" else name
    assert f"{named}' is damaged or is not a picture (" in done.sentence
    assert done.sentence.endswith("replace it, or take it out")
    assert done.err.count("\n") == 1
    assert not list((tmp_path / "cache").rglob("*.npy"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["pictures"]


@pytest.mark.parametrize("damage", [cut_in_half, Path.unlink], ids=["cut", "deleted"])
def test_damaged_prepared_pictures_are_prepared_again(
    trainings: Trainings, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    pictures(tmp_path / "pictures")
    plan = Plan(environment={"SDE_CACHE": str(tmp_path / "cache")})
    words = [*PICTURES, "training.validate_every=0", "training.steps=10"]
    done = trainings.run("sde.train", *words, folder=tmp_path, plan=plan)
    assert done.code == 0, done.err
    (prepared,) = (tmp_path / "cache").rglob("train.npy")
    before = prepared.read_bytes()
    damage(prepared)
    done = trainings.run("sde.train", "resume=runs/today/r", "training.steps=15", folder=tmp_path, plan=plan)
    assert done.code == 0, done.err
    assert prepared.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [("cut", "is not a .npz"), ("bit", "damaged"), ("inf", "holds values that are not finite: remove those examples")],
)
def test_damaged_arrays_are_named(trainings: Trainings, tmp_path: Path, damage: str, said: str) -> None:
    path, values = tmp_path / "points.npz", np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    if damage == "inf":
        values[7, 1] = np.inf
    np.savez(path, x=values)
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    words = [word for word in WORDS if not word.startswith("data")]
    done = trainings.run(
        "sde.train", *words, "data=npz", "data.path=points.npz", "hydra.run.dir=runs/r", folder=tmp_path
    )
    assert done.code == 2
    assert "points.npz" in done.sentence
    assert said in done.sentence
    assert done.err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["points.npz"]


# Signals


@pytest.mark.parametrize(
    ("number", "where", "at"),
    [
        (signal.SIGTERM, "announce", 0),
        (signal.SIGINT, "announce", 0),
        (signal.SIGTERM, "step", 13),
        (signal.SIGINT, "step", 10),
        (signal.SIGTERM, "validate", 10),
        (signal.SIGTERM, "preview", 15),
        (signal.SIGTERM, "save", 20),
    ],
)
def test_a_signal_saves_and_the_training_goes_on(
    trainings: Trainings, whole: Path, tmp_path: Path, number: int, where: str, at: int
) -> None:
    preview = 15 if where == "preview" else 0
    words = [*WORDS, "training.keep=0", f"training.preview_every={preview}", "hydra.run.dir=r"]
    plan = Plan(signals=((where, at, number),))
    done = trainings.run("sde.train", *words, folder=tmp_path, plan=plan)
    assert done.code == (130 if number == signal.SIGINT else 0), done.err
    assert "Traceback" not in done.err
    assert f"stopped at step {at} and saved" in done.err
    assert done.sentence.startswith(GO_ON)
    run = tmp_path / "r"
    assert steps_of(run) == [*range(EVERY, at, EVERY), at]
    assert hidden(run) == []
    on = trainings.run("sde.train", "resume=r", "training.preview_every=0", folder=tmp_path)
    assert on.code == 0, on.err
    extra = [line for line in record_of(run) if line["step"] % EVERY]
    assert [line["step"] for line in extra] == [at] * (at % EVERY > 0)  # the interval was logged in two parts
    if extra:
        assert differing(*(checkpoint_path(folder / "checkpoints", STEPS) for folder in (run, whole))) == []
    else:
        assert_same_end(run, whole)


@pytest.mark.parametrize("where", ["step", "save"])
def test_a_second_interrupt_leaves_at_once(trainings: Trainings, whole: Path, tmp_path: Path, where: str) -> None:
    """In the middle of writing too, which leaves nothing of what was written."""
    plan = Plan(signals=((where, 15, signal.SIGINT), (where, 15, signal.SIGINT)))
    done = trainings.run("sde.train", *WORDS, "hydra.run.dir=r", folder=tmp_path, plan=plan)
    assert done.code == 130
    assert done.sentence == "interrupted; nothing was left half-written"
    assert "Traceback" not in done.err
    assert steps_of(tmp_path / "r") == [5, 10]
    assert hidden(tmp_path / "r") == []
    on = trainings.run("sde.train", "resume=r", folder=tmp_path)
    assert on.code == 0, on.err
    assert_same_end(tmp_path / "r", whole)


def test_an_interrupt_while_data_is_prepared_leaves_nothing(trainings: Trainings, tmp_path: Path) -> None:
    pictures(tmp_path / "pictures")
    plan = Plan(environment={"SDE_CACHE": str(tmp_path / "cache")}, signals=(("picture", 0, signal.SIGINT),))
    done = trainings.run("sde.train", *PICTURES, folder=tmp_path, plan=plan)
    assert done.code == 130, done.err
    assert done.err.strip() == "interrupted; nothing was left half-written"
    assert not list((tmp_path / "cache").rglob("*.npy"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["pictures"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="it is seen in /proc how far a process has come")
def test_an_interrupt_while_the_command_starts(tmp_path: Path) -> None:
    with process(*WORDS, folder=tmp_path) as real:
        maps = Path(f"/proc/{real.pid}/maps")
        wait_until(lambda: "libtorch_cpu" in maps.read_text())  # in the middle of the imports
        real.send_signal(signal.SIGINT)
        out, _ = real.communicate(timeout=PATIENCE)
    assert real.returncode == 130
    assert out == "interrupted; nothing was left half-written\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_all_processes_after_the_same_step(trainings: Trainings, tmp_path: Path) -> None:
    words = [*WORDS, "training.steps=1000000", "training.checkpoint_every=1000000", "training.validate_every=0"]
    words = [*words, "ema.snapshot_every=0", "hydra.run.dir=r"]
    launcher = ("-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d")
    run = tmp_path / "r"
    with process(*words, folder=tmp_path, launcher=(*launcher, "--rdzv-endpoint=localhost:0")) as agent:
        metrics = run / "metrics.jsonl"
        wait_until(lambda: (metrics.exists() and metrics.stat().st_size > 0) or agent.poll() is not None)
        agent.send_signal(signal.SIGTERM)
        out, _ = agent.communicate(timeout=PATIENCE)
    assert out.count("and saved") == 1, out
    assert out.count(GO_ON) == 1
    (step,) = steps_of(run)
    assert f"stopped at step {step} and saved" in out
    assert [line["step"] for line in record_of(run)][-1] == step
    assert hidden(run) == []
    on = trainings.run(
        "sde.train", "resume=r", f"training.steps={step + 3}", "training.checkpoint_every=1", folder=tmp_path
    )
    assert on.code == 0, on.err
    assert steps_of(run)[-3:] == [step + 1, step + 2, step + 3]


# Two processes


def test_a_run_that_is_being_written_is_refused(trainings: Trainings, tmp_path: Path) -> None:
    """Until the process is killed, though workers of it live on; its lock file stays, and blocks nobody."""
    words = [*WORDS, "training.steps=1000000", "training.workers=2", "training.keep=1"]
    trainings.start("sde.train", *words, "hydra.run.dir=r", folder=tmp_path)
    trainings.wait_for("saved", EVERY)
    run = tmp_path / "r"
    resumed, anew = (command("sde.train", word, folder=tmp_path) for word in ("resume=r", "hydra.run.dir=r"))
    os.kill(trainings.pid, signal.SIGKILL)
    trainings.end()
    assert resumed.code == anew.code == 2
    refused = "error: r is being written by another process: wait for it, or choose another hydra.run.dir"
    assert resumed.sentence == anew.sentence == refused
    assert (run / ".lock").exists()
    end = steps_of(run)[-1] + 1
    on = trainings.run("sde.train", "resume=r", f"training.steps={end}", folder=tmp_path)
    assert on.code == 0, on.err
    assert hidden(run) == []


def test_a_lock_on_a_file_that_is_being_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process before removes the file as it leaves, when the next one has opened it and not locked it yet."""
    run, lock, tried = Run(tmp_path / "r"), runs._lock, []

    def slow(handle: IO[str]) -> None:
        if not tried:
            (run.path / ".lock").unlink()
        tried.append(handle)
        lock(handle)

    monkeypatch.setattr(runs, "_lock", slow)
    with run.locked():
        assert len(tried) == 2
        assert run.is_locked()
    assert not run.is_locked()
    assert hidden(run.path) == []


# Numbers that are none


def faulty(how: str, *steps: int) -> list[str]:
    """Words for a loss that fails in some steps."""
    listed = ",".join(map(str, steps))
    return [
        "plugins=[tests.faulty]",
        "loss._target_=tests.faulty.FaultyLoss",
        f"+loss.how={how}",
        f"+loss.steps=[{listed}]",
    ]


EACH = ["training.steps=10", "training.checkpoint_every=1", "training.keep=0", "training.validate_every=0"]
EACH = [*EACH, "ema.snapshot_every=0", "hydra.run.dir=r"]


@pytest.mark.parametrize("how", ["both", "loss", "gradient"])
@pytest.mark.parametrize("fused", ["true", "false"])
def test_skipped_steps_leave_weights_and_optimizer(trainings: Trainings, tmp_path: Path, how: str, fused: str) -> None:
    """Steps 3 and 6 of 10: the weights after them are those before, and the optimizer has made two fewer steps."""
    words = [*WORDS, *EACH, f"optimizer.fused={fused}", "training.non_finite=skip", "training.clip=0.5"]
    done = trainings.run("sde.train", *words, *faulty(how, 3, 6), folder=tmp_path)
    assert done.code == 0, done.err
    paths = dict(list_checkpoints(tmp_path / "r" / "checkpoints"))
    for step in range(2, 10):
        changed = differing(paths[step], paths[step + 1])
        skipped = step in (3, 6)
        assert any(name.startswith("/model") for name in changed) is not skipped
        assert any(name.startswith("/optimizer/state") for name in changed) is not skipped
    state = load_checkpoint(paths[10]).content
    assert {float(numbers["step"]) for numbers in state["optimizer"]["state"].values()} == {8.0}
    assert state["skipped"] == 2
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert all(torch.isfinite(value).all() for value in state["ema"].values())
    counts = [line.get("train/skipped") for line in record_of(tmp_path / "r")]
    assert counts == [None] * 3 + [1.0] * 3 + [2.0] * 4
    assert "warning: the loss or gradient of step 3 was not finite: skipped, 1 in all" in done.err
    assert "warning: the loss or gradient of step 6 was not finite: skipped, 2 in all" in done.err


def test_nothing_but_skipped_steps_ends_the_training(trainings: Trainings, tmp_path: Path) -> None:
    words = [*WORDS, "training.non_finite=skip", "training.validate_every=0", "hydra.run.dir=r"]
    done = trainings.run("sde.train", *words, *faulty("both", *range(5, 10)), folder=tmp_path)
    assert done.code == 2
    assert "the loss of step 5 is nan and its gradient's norm nan, at noise levels from" in done.sentence
    assert "(5 steps in a row, none of which could be skipped)" in done.sentence
    assert done.sentence.endswith("the last good checkpoint is r/checkpoints/step-00000005.pt")
    assert steps_of(tmp_path / "r") == [5]


@pytest.mark.parametrize(("how", "values"), [("both", "nan and its gradient's norm nan"), ("loss", "inf and its")])
def test_bad_numbers_stop_the_training(
    trainings: Trainings, whole: Path, tmp_path: Path, how: str, values: str
) -> None:
    """Before anything of them is saved, averages included; without them it goes on as if nothing had happened."""
    words = [*WORDS, "training.validate_every=0", "ema.snapshot_every=1", "training.log_every=10", "hydra.run.dir=r"]
    done = trainings.run("sde.train", *words, *faulty(how, 12), folder=tmp_path)
    run = tmp_path / "r"
    assert done.code == 2
    assert f"the loss of step 12 is {values}" in done.sentence
    assert ", at noise levels from" in done.sentence
    assert done.sentence.endswith("the last good checkpoint is r/checkpoints/step-00000010.pt")
    assert "Traceback" not in done.err
    assert steps_of(run) == [5, 10]
    assert sorted(path.name for path in (run / "ema").iterdir())[-1] == "snapshot-00000012.safetensors"
    # this process counts its steps from 0 again, and does not come to number 12
    on = trainings.run("sde.train", "resume=r", "plugins=[tests.faulty]", "training.steps=20", folder=tmp_path)
    assert on.code == 0, on.err
    assert differing(*(checkpoint_path(folder / "checkpoints", 20) for folder in (run, whole))) == []


# Memory


def test_a_lack_of_memory_is_a_sentence(trainings: Trainings, tmp_path: Path) -> None:
    """A true one of the processor's memory, and one as a GPU tells it; what is saved stays."""
    for k, how in enumerate(("memory", "device")):
        words = [*WORDS, "training.accumulation=2", "training.validate_every=0", f"hydra.run.dir=r{k}"]
        done = trainings.run("sde.train", *words, *faulty(how, 7), folder=tmp_path)
        assert done.code == 1
        assert done.sentence == (
            "error: out of memory with training.batch_size=32 and training.accumulation=2: try "
            "training.accumulation=4, which is the same training in less memory, model.recompute_levels=1 where the "
            "model has it, training.precision=bf16, a smaller batch (auto is the largest that fits), or more processes"
        )
        assert "Traceback" not in done.err
        assert load_newest(tmp_path / f"r{k}" / "checkpoints").step == 5
        assert hidden(tmp_path / f"r{k}") == []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is one beyond what /proc says is in use")
def test_a_limit_on_memory_is_met(trainings: Trainings, tmp_path: Path) -> None:
    """600 MB for each activation of 150 000 examples, of 300 MB that are allowed."""
    words = [*WORDS, "model.width=1000", "training.batch_size=150000", "data.train_size=150000", "hydra.run.dir=r"]
    done = trainings.run("sde.train", *words, folder=tmp_path, plan=Plan(memory=300 * 2**20))
    assert done.code == 1, done.err
    assert "out of memory with training.batch_size=150000 and training.accumulation=1: try" in done.sentence
    assert "Traceback" not in done.err


# Which checkpoints stay


def test_the_newest_the_best_and_every_so_many_stay(trainings: Trainings, tmp_path: Path) -> None:
    """On resuming too; samples can be drawn from all that is left, from the best by that name.

    With this learning rate the loss on held-out examples goes up and down, so that the best is not the newest.
    """
    rules = ["training.keep=1", "training.keep_every=20", "training.keep_best=val/loss", "training.validate_every=0"]
    words = [*WORDS, *rules, "optimizer.lr=0.03", "ema.decay=0.5", "training.steps=20", "hydra.run.dir=r"]
    run, found = tmp_path / "r", []
    for end, arguments in ((20, words), (STEPS, ["resume=r", f"training.steps={STEPS}"])):
        done = trainings.run("sde.train", *arguments, folder=tmp_path)
        assert done.code == 0, done.err
        values = {line["step"]: line["val/loss"] for line in record_of(run)}
        assert [*values] == [*range(EVERY, end + 1, EVERY)]  # measured at every checkpoint
        found.append(min(values, key=lambda step: values[step]))
        assert found[-1] % 20
        assert steps_of(run) == sorted({found[-1], *range(20, end + 1, 20)})
    assert found[0] < found[1]  # the first one has gone
    for which in [*map(str, steps_of(run)), "best"]:
        words = ["run=r", f"checkpoint={which}", "n=4", "solver=euler", "steps=2", f"out=drawn-{which}"]
        drawn = trainings.run("sde.sample", *words, folder=tmp_path)
        assert drawn.code == 0, drawn.err
    files = {which: next((tmp_path / f"drawn-{which}").glob("*.npz")) for which in ("best", str(found[1]), str(STEPS))}
    best, named, newest = (np.load(file)["samples"] for file in files.values())
    assert np.array_equal(best, named)
    assert not np.array_equal(best, newest)


def test_a_best_one_by_a_metric_that_there_is_not_is_told(trainings: Trainings, tmp_path: Path) -> None:
    words = [*WORDS, "training.keep_best=val/los", f"training.steps={EVERY}", "hydra.run.dir=r"]
    done = trainings.run("sde.train", *words, folder=tmp_path)
    assert done.code == 0
    said = "warning: training.keep_best=val/los was measured at none of the checkpoints; did you mean 'val/loss'?"
    assert said in done.err


def test_the_best_of_checkpoints_that_were_not_measured(trainings: Trainings, whole: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "r")
    shutil.copytree(whole, run.path)
    values = {line["step"]: line["val/loss"] for line in record_of(run.path) if "val/loss" in line}
    assert open_checkpoint(run, "best").step == min(values, key=lambda step: values[step])
    for step in values:
        checkpoint_path(run.checkpoints, step).unlink()
    answer = command("sde.sample", "run=r", "checkpoint=best", folder=tmp_path)
    assert answer.code == 2
    assert answer.sentence == (
        "error: checkpoint=best: val/loss was measured at none of the checkpoints that r has: use latest, or train "
        "with training.keep_best=val/loss, which measures it at each"
    )
    run.metrics.unlink()
    assert (
        "checkpoint=best: val/loss was measured at none"
        in command("sde.sample", "run=r", "checkpoint=best", folder=tmp_path).sentence
    )
