"""Where `python -m sde.train` writes, what it goes on with, and what cannot change in the middle of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import sde.train
from sde.runs import Run, lacking
from sde.training.checkpoint import list_checkpoints, load_checkpoint
from tests.commands import TINY_2D, Answer, command
from tests.test_logging import install

QUIET = ["training.validate_every=0", "training.preview_every=0", "training.checkpoint_every=2"]
WORDS = [*TINY_2D, *QUIET, "training.steps=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with Adam, with checkpoints of the second and the last."""
    folder = tmp_path_factory.mktemp("trained")
    done = command("sde.train", *WORDS, "hydra.run.dir=r", folder=folder)
    assert done.code == 0, done.err
    return folder / "r"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, called r."""
    return Path(shutil.copytree(trained, tmp_path / "r"))


def train(run: Path, *words: str) -> Answer:
    """Train in the folder that the run lies in."""
    return command("sde.train", *words, folder=run.parent)


def newest(run: Path) -> Mapping[str, Any]:
    """What the newest checkpoint holds."""
    return load_checkpoint(list_checkpoints(run / "checkpoints")[-1][1]).content


# A damaged config.yaml


def without_its_end(text: str) -> str:
    """Cut off where the training options are told."""
    return text[: text.index("\n  log_every")]


DAMAGES = {
    "empty": (lambda text: "", "it holds no settings"),
    "cut": (without_its_end, "it has no logger"),
    "steps": (lambda text: "training:\n  steps: 20\n", "it has no sde"),
    "word": (lambda text: text.replace("optimizer:\n", "optimizer: adam\nother:\n"), "it has no optimizer"),
    "binary": (lambda text: "\0\1", "special characters are not allowed"),
    "yaml": (lambda text: text.replace("sde:\n", "sde: {\n"), "while parsing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_configuration_is_that_of_the_newest_checkpoint(damage: str, run: Path) -> None:
    """Which is whole again afterwards; the newest checkpoint that can be read counts."""
    file = run / "config.yaml"
    whole, (make, reason) = file.read_text(), DAMAGES[damage]
    file.write_text(make(whole))
    assert file.read_text() != whole
    listed = command("sde.runs_table", "runs=.", folder=run.parent)
    assert "finished" not in listed.out
    assert f"{file} is damaged (" in listed.err
    how = ["resume=r"] if damage != "steps" else [*WORDS, "resume=auto", "hydra.run.dir=r"]
    done = train(run, *how, "training.steps=6")
    assert done.code == 0, done.err
    (warning,) = (line for line in done.err.splitlines() if line.startswith("warning"))
    assert warning.startswith("warning: r/config.yaml is damaged (")
    assert reason in warning
    assert warning.endswith("): taking the copy in r/checkpoints/step-00000004.pt")
    assert "going on from step 4" in done.out
    assert OmegaConf.load(file) == OmegaConf.create(whole.replace("\n  steps: 4\n", "\n  steps: 6\n"))
    assert command("sde.runs_table", "runs=.", folder=run.parent).err == ""


def test_a_missing_configuration_is_that_of_the_newest_checkpoint(run: Path) -> None:
    (run / "config.yaml").unlink()
    done = train(run, "resume=r", "training.steps=6")
    assert done.code == 0, done.err
    assert "warning: run=r has no config.yaml: taking the copy in r/checkpoints/step-00000004.pt" in done.err
    assert (run / "config.yaml").is_file()


@pytest.mark.parametrize("how", [["resume=r"], [*WORDS, "resume=auto", "hydra.run.dir=r"]], ids=["run", "auto"])
def test_a_damaged_configuration_with_no_copy_gets_one_sentence(how: list[str], run: Path) -> None:
    (run / "config.yaml").write_text("training:\n  steps: 20\n")
    for _, path in list_checkpoints(run / "checkpoints"):
        path.write_bytes(b"")
    done = train(run, *how, "training.steps=6")
    assert done.code == 2
    assert done.sentence == ("error: r/config.yaml is damaged (it has no sde): restore it (a checkpoint holds a copy)")


def test_what_a_run_of_a_foreign_network_lacks() -> None:
    network: dict[str, Any] = {"sde": {}, "model": {}, "parameterization": {}, "conditional": False}
    assert lacking(network) is None
    assert lacking({**network, "preview_steps": 18}) == "data"
    assert lacking({**network, "model": None}) == "model"


# What can change, and what cannot


KIND = "optimizer._target_=torch.optim.SGD cannot change in the middle of a run, which has torch.optim.Adam"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optimizer=sgd"], KIND),
        (["optimizer=sgd", "optimizer.lr=1e-3"], KIND),
        (["optimizer._target_=torch.optim.SGD"], KIND),
        (["training.seed=9"], "training.seed=9 cannot change in the middle of a run, which has 0: leave it out"),
        (["sde=ve"], "sde=ve cannot change in the middle of a run, where only the options of training, ema"),
        (["schedule=cosin"], "schedule=cosin is not one of"),
        (["schedule=cosine", "schedule.ende=1"], "schedule.ende=1: r/config.yaml has no option schedule.ende"),
    ],
)
def test_what_a_run_is_does_not_change(words: list[str], sentence: str, run: Path) -> None:
    before = (run / "config.yaml").read_bytes()
    done = train(run, "resume=r", "training.steps=6", *words)
    assert done.code == 2
    assert sentence in done.sentence
    assert len(done.err.splitlines()) == 1
    assert (run / "config.yaml").read_bytes() == before
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [2, 4]


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("optimizer=sgd", "optimizer._target_=torch.optim.Adam and not torch.optim.SGD"),
        ("training.seed=9", "training.seed=0 and not 9"),
    ],
)
def test_nor_does_it_by_the_same_command_again(word: str, found: str, run: Path) -> None:
    done = train(run, *WORDS, "resume=auto", "hydra.run.dir=r", "training.steps=6", word)
    assert done.code == 2
    assert done.sentence.startswith(f"error: resume=auto: r holds a run with {found}: give the same options as before")


def test_files_of_groups_can_be_chosen_in_the_middle_of_a_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With options of their own, wherever these stand; and the run's own optimizer with other options."""
    install(monkeypatch)
    words = ["schedule.end=0.25", "schedule=cosine", "optimizer=adam", "optimizer.lr=3e-4", "training.warmup=0"]
    words += ["logger=wandb", "logger.project=other's", "solver@preview_solver=ddim", "preview_solver.eta=0.5"]
    done = train(run, "resume=r", "training.steps=6", *words)
    assert done.code == 0, done.err
    config = newest(run)["config"]
    assert config == json.loads(json.dumps(Run(run).config()))
    assert config["schedule"] == {"_target_": "sde.training.schedules.CosineDecay", "end": 0.25, "steps": None}
    assert config["optimizer"]["_target_"] == "torch.optim.Adam"
    assert config["optimizer"]["lr"] == 3e-4
    assert config["logger"]["_target_"] == "sde.training.logging.WandB"
    assert (config["logger"]["project"], config["logger"]["mode"]) == ("other's", "auto")
    assert config["preview_solver"]["_target_"] == "sde.solvers.ddim.DDIM"
    assert config["preview_solver"]["eta"] == 0.5
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train/lr"] == pytest.approx(3e-4 * 0.25)  # at the end of the cosine


# Where a run may begin


@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": "mine: 1\n"},
        {"config.yaml": "mine: 1\n", "data.json": "{}"},
        {"data.json": "{}"},
        {"thesis.txt": "", "slurm-7.out": ""},
        {"notes/a.md": ""},
        {"metrics.jsonl": "{}"},
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("how", [[], ["resume=auto"]], ids=["new", "auto"])
def test_a_run_does_not_begin_among_files_of_others(files: dict[str, str], how: list[str], tmp_path: Path) -> None:
    own = tmp_path / "own"
    for name, text in files.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(text)
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    done = command("sde.train", *WORDS, *how, "hydra.run.dir=own", folder=tmp_path)
    assert done.code == 2
    assert done.sentence.startswith("error: own is no run and holds ")
    assert "choose another hydra.run.dir" in done.sentence
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before


def test_a_run_begins_beside_what_belongs_to_the_command(tmp_path: Path) -> None:
    own = tmp_path / "own"
    for name in (".hydra/config.yaml", ".submitit/7/log", "wandb/run/x", "multirun.yaml", "slurm-7.out", "a-7.log"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text("")
    done = command("sde.train", *WORDS, "hydra.run.dir=own", folder=tmp_path)
    assert done.code == 0, done.err


@pytest.mark.parametrize("name", ["environment.json", "config.yaml", "data.json"])
def test_a_run_that_died_before_its_first_checkpoint_begins_again(name: str, run: Path) -> None:
    """Also if it died after the first of its files, or as one was written that a full disk cut off."""
    for path in [run / "checkpoints", *run.glob("previews")]:
        shutil.rmtree(path)
    if name == "config.yaml":
        (run / name).write_text("")
    else:
        (run / name).unlink()
    (run / "thesis.txt").touch()
    done = train(run, *WORDS, "hydra.run.dir=r")
    assert done.code == 0, done.err
    assert (run / "thesis.txt").is_file()


# The lock


def test_what_a_run_goes_on_with_is_read_with_its_lock_held(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle, held = sde.train.settle, []

    def watched(which: Run, config: dict[str, Any]) -> Any:
        held.append(which.is_locked())
        return settle(which, config)

    monkeypatch.setattr(sde.train, "settle", watched)
    assert train(run, "resume=r", "training.steps=6").code == 0
    assert held == [True]
    assert not (run / ".lock").exists()
    with Run(run).locked():
        refused = train(run, "hydra.run.dir=r")
    assert "r is being written by another process" in refused.sentence
