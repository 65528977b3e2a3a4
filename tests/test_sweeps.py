"""Sweeps: jobs here and in other processes, failures that do not cost the others, and what docs/clusters.md shows."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

import sde.cli
from sde.cli import Failure, Interrupted, flags_first
from sde.config import conf_dir
from sde.distributed import World, meeting
from sde.runs_summary import Metric, find_runs
from tests.commands import TINY_2D, command

ROOT = conf_dir().parent
DOCUMENT = ROOT / "docs" / "clusters.md"
SCRIPTS = sorted((ROOT / "docs" / "slurm").glob("*.sbatch"))
LAUNCHERS = {"joblib": "hydra_joblib_launcher", "submitit_local": "hydra_submitit_launcher"}


def trained(folder: Path) -> dict[str, list[str]]:
    """The number of each finished run of a sweep in `folder`, and the overrides that it was given."""
    found = find_runs(folder / "runs", Metric("val/loss"))
    assert all(run.state == "finished" for run in found)
    commands = {
        run.run.path.name[0]: json.loads((run.run.path / "environment.json").read_text())["command"] for run in found
    }
    return {number: words[1:] for number, words in sorted(commands.items())}


def test_one_after_the_other_with_the_flag_anywhere(tmp_path: Path) -> None:
    """The second of three jobs fails, and the third is run all the same."""
    done = command("sde.train", "training.seed=0,-1,2", "--multirun", *TINY_2D, folder=tmp_path)
    assert done.code == 2
    assert trained(tmp_path) == {str(k): [f"training.seed={k}", *TINY_2D] for k in (0, 2)}
    said = "error: job 1 (training.seed=-1): training.seed=-1 is out of range: it must be at least 0"
    assert [line for line in done.err.splitlines() if line.startswith("error")] == [
        said,
        said,
    ]  # at once, and at the end
    (sweep,) = (tmp_path / "runs" / "multirun").glob("*/*")
    assert sorted(path.name[:2] for path in sweep.iterdir()) == ["0_", "2_", "mu"]  # what failed left nothing


def installed(package: str) -> bool:
    """Whether a launcher of Hydra is there; without any, the package that holds them is not either."""
    return importlib.util.find_spec("hydra_plugins") is not None and (
        importlib.util.find_spec(f"hydra_plugins.{package}") is not None
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_in_other_processes(launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they trained is there, and what failed comes back with its sentence."""
    if not installed(LAUNCHERS[launcher]):
        pytest.skip(f"{LAUNCHERS[launcher]} is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = [f"hydra/launcher={launcher}", "resume=auto", "hydra.sweep.dir=runs/s", "training.seed=0,-1"]
    done = command("sde.train", "-m", *options, *TINY_2D, folder=tmp_path)
    assert done.code == 2
    assert done.sentence == "error: job 1 (training.seed=-1): training.seed=-1 is out of range: it must be at least 0"
    assert trained(tmp_path) == {"0": ["resume=auto", "training.seed=0", *TINY_2D]}


def test_an_interrupted_job_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def stopped(config: dict[str, Any]) -> None:
        seeds.append(config["training"]["seed"])
        if len(seeds) == 2:
            raise Interrupted("stopped at step 7", 0)

    monkeypatch.setattr("sde.train.train", stopped)
    done = command("sde.train", "-m", "training.seed=1,2,3,4", folder=tmp_path)
    assert (done.code, seeds) == (0, [1, 2])
    assert done.sentence == "job 1 (training.seed=2): stopped at step 7"


def test_a_fault_of_a_job_shows_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def faulty(config: dict[str, Any]) -> None:
        seeds.append(config["training"]["seed"])
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr("sde.train.train", faulty)
    done = command("sde.train", "-m", "training.seed=1,2", folder=tmp_path)
    assert (done.code, seeds) == (1, [1, 2])
    assert done.sentence == "error: job 1 (training.seed=2): ZeroDivisionError: by accident"
    assert done.err.count("Traceback") == 2
    with pytest.raises(ZeroDivisionError):
        command("sde.train", folder=tmp_path)


def test_a_sweep_that_can_be_given_again_names_its_folder(tmp_path: Path) -> None:
    done = command("sde.train", "-m", "resume=auto", "training.seed=1,2", folder=tmp_path)
    assert done.code == 2
    assert "resume=auto goes on in the folder that hydra.sweep.dir=FOLDER names" in done.sentence


def test_a_sweep_given_again_makes_what_is_missing(tmp_path: Path) -> None:
    options = ["--multirun", "resume=auto", "hydra.sweep.dir=runs/s", *TINY_2D]
    assert command("sde.train", *options, "training.seed=0,1", folder=tmp_path).code == 0
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.pt")}
    assert len(kept) == 2
    done = command("sde.train", *options, "training.seed=0,1,2", folder=tmp_path)
    assert done.code == 0, done.err
    assert done.out.count("asks for no more") == 2
    assert set(trained(tmp_path)) == {"0", "1", "2"}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_failure_enters_the_list_of_the_process_that_it_arrives_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sde.cli, "_FAILURES", [])
    failure = Failure("no", 3)
    assert sde.cli._FAILURES == []
    assert pickle.loads(pickle.dumps(failure)) == failure
    assert [failure] == sde.cli._FAILURES


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a=1 --multirun b=2", "--multirun a=1 b=2"),
        ("a=1 --config-dir folder b=2 -m", "--config-dir folder -m a=1 b=2"),
        ("--config-dir=x/y=z a=1", "--config-dir=x/y=z a=1"),
        ("b=2 a=1 c", "c b=2 a=1"),
        ("--help", "--help"),
    ],
)
def test_flags_stand_anywhere(words: str, expected: str) -> None:
    assert flags_first(words.split()) == expected.split()


@pytest.mark.parametrize("late", [0, 1, 2])
def test_processes_that_are_started_again_agree_on_their_attempt(late: int) -> None:
    """Whoever comes last, and whatever processes of an earlier attempt have left in torchrun's store."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    names = []
    for _ in range(2):
        ready, found = threading.Event(), {}

        def meet(rank: int, ready: threading.Event, found: dict[int, str]) -> None:
            if rank == late:
                ready.wait()
            own = torch.distributed.TCPStore("localhost", store.port, is_master=False)
            found[rank] = meeting(own, World(rank, 3))

        threads = [threading.Thread(target=meet, args=(rank, ready, found), daemon=True) for rank in range(3)]
        for thread in threads:
            thread.start()
        other = 1 if late != 1 else 2
        if late == 0:
            store.wait([f"sde/here/{other}"])
        ready.set()
        for thread in threads:
            thread.join(timeout=60)
        assert len(found) == 3
        names += list(set(found.values()))
    assert len(names) == len(set(names)) == 2


# The commands of the document and of the scripts can be composed


def documented() -> Iterator[tuple[str, list[str]]]:
    """(module, words) of every `-m sde.MODULE` in docs/clusters.md and the scripts."""
    for text in (DOCUMENT.read_text(), *(script.read_text() for script in SCRIPTS)):
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            if "-m sde." in line and line.startswith(("    ", "srun")) and "#" not in line.split("-m sde.")[0]:
                words = shlex.split(line.rstrip("&").replace("...", ""), comments=True)
                at = next(k for k, word in enumerate(words) if word.startswith("sde."))
                yield words[at], [word for word in words[at + 1 :] if word != "$@"]


COMMANDS = list(dict.fromkeys((module, tuple(words)) for module, words in documented()))


def test_there_are_commands_in_the_document() -> None:
    assert len(COMMANDS) > 15
    assert {module for module, _ in COMMANDS} == {"sde.train", "sde.runs"}
    assert len(SCRIPTS) == 2


@pytest.mark.parametrize(("module", "words"), COMMANDS, ids=[" ".join(words) or module for module, words in COMMANDS])
def test_the_commands_of_the_document_can_be_composed(module: str, words: tuple[str, ...]) -> None:
    launchers = [word.partition("=")[2] for word in words if word.startswith("hydra/launcher=")]
    for launcher in launchers:
        package = "hydra_submitit_launcher" if launcher.startswith("submitit") else LAUNCHERS[launcher]
        if not installed(package):
            pytest.skip(f"{package} is not installed")
    overrides = []
    for word in words:
        if word in ("--multirun", "-m"):
            continue
        word = re.sub(r"\$\w+", "0", word)
        override = OverridesParser.create().parse_override(word)
        swept = override.is_sweep_override()
        overrides.append(
            f"{override.input_line.partition('=')[0]}={next(override.sweep_string_iterator())}" if swept else word
        )
    assert "--multirun" in words or not any("," in word and "[" not in word for word in words)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        compose(module.removeprefix("sde."), overrides=overrides, return_hydra_config=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_the_scripts_are_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    text = script.read_text()
    assert "--signal=B:USR1@" in text
    assert "trap" in text
    assert " USR1" in text.split("trap", 1)[1].splitlines()[0]  # TERM is what scancel sends
    if "--array" in text:
        assert '"$SLURM_JOB_ID"' not in text


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
@pytest.mark.parametrize("ending", ["end", "failure", "time"])
def test_the_scripts_wait_save_and_requeue(ending: str, script: Path, tmp_path: Path) -> None:
    """Programs in the place of SLURM's: on USR1 the training is asked to save, then the job is requeued; else never."""
    programs = {
        "srun": 'echo "srun $*" >> log; echo $$ > pid; trap "touch asked" TERM\n'
        "case $ENDING in end) exit 0;; failure) exit 3;; esac\n"
        "kill -USR1 $PPID; while ! test -e asked; do read -t 0.05 < <(:) || :; done; echo saved >> log; exit 1",
        "scancel": 'echo "scancel $*" >> log; kill -TERM $(cat pid)',
        "scontrol": 'if test $1 = show; then echo node1; else echo "scontrol $*" >> log; fi',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "ENDING": ending,
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_CPUS_PER_TASK": "1",
    }
    done = subprocess.run(
        ["bash", str(script), "name", "a=b c"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    started, *rest = (tmp_path / "log").read_text().splitlines()
    job = "7_2" if script.name == "seeds.sbatch" else "7"
    assert started.endswith("a=b c")
    assert "resume=auto hydra.run.dir=runs/name" in started
    if ending == "time":
        assert rest == [f"scancel --signal=TERM {job}", "saved", f"scontrol requeue {job}"]
    else:
        assert (rest, done.returncode) == ([], {"end": 0, "failure": 3}[ending])
    assert done.stderr == ""


def test_the_module_that_is_run_can_be_imported_by_others() -> None:
    """`python -m sde.train` has its command in __main__, which other processes know as sde.train."""
    program = (
        "import sys, runpy, importlib; from sde import cli;"
        "cli.run_command = lambda name, command, **k: print(command.__module__, cli.importable(command).__module__);"
        "sys.argv = ['train.py']; runpy._run_module_as_main('sde.train', alter_argv=False)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["__main__", "sde.train"], done.stderr
