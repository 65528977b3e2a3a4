"""Exported folders give what the run gives, and go to the hub and back; a stand-in answers for the hub."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from sde.errors import UserError
from sde.interop.export import load_pretrained
from sde.interop.folders import read_folder
from sde.interop.hub import pull, push
from sde.runs import Run, open_checkpoint, restore_denoiser
from tests.commands import TINY_2D, command

SAMPLE = ("solver=heun", "steps=3", "n=3", "seed=5")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a few steps in `run`, exported to `model`."""
    folder = tmp_path_factory.mktemp("export")
    done = command("sde.train", *TINY_2D, "hydra.run.dir=run", folder=folder)
    assert done.code == 0, done.err
    done = command("sde.interop.export", "run=run", "to=model", folder=folder)
    assert done.code == 0, done.err
    assert "python -m sde.sample run=model" in done.out
    return folder


def test_what_a_folder_holds(trained: Path) -> None:
    """Averaged weights bit by bit, the configuration that sampling needs, and a card with the command."""
    checkpoint = open_checkpoint(Run(trained / "run"), "latest")
    weights = safetensors.torch.load_file(trained / "model" / "model.safetensors")
    assert weights.keys() == checkpoint.content["ema"].keys()
    for name, tensor in checkpoint.content["ema"].items():
        assert torch.equal(weights[name], tensor), name
    assert any(not torch.equal(weights[name], checkpoint.content["model"][name]) for name in weights)
    config = json.loads((trained / "model" / "config.json").read_text())
    assert config["step"] == 20
    for part in ("sde", "parameterization", "model", "conditional"):
        assert config[part] == checkpoint.content["config"][part]
    assert config["data"] == checkpoint.content["data"]
    card = (trained / "model" / "README.md").read_text()
    assert "python -m sde.sample run=model" in card
    assert "20 steps" in card
    frequencies = weights["embedding.features.frequencies"].numel()  # a buffer
    count = sum(tensor.numel() for tensor in weights.values()) - frequencies
    assert f"{count:,} parameters" in card
    assert sorted(file.name for file in (trained / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_a_folder_denoises_as_the_run(trained: Path) -> None:
    denoiser, info = load_pretrained(trained / "model")
    original, data = restore_denoiser(open_checkpoint(Run(trained / "run"), "latest"))
    assert info == data
    assert (denoiser.sde, denoiser.parameterization) == (original.sde, original.parameterization)
    x = torch.randn(4, *info.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(denoiser.score(x, 0.3), original.score(x, 0.3))
    assert not denoiser.training
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


def test_a_folder_samples_as_the_run(trained: Path) -> None:
    for run in ("run", "model"):
        done = command("sde.sample", f"run={run}", *SAMPLE, f"out=samples_{run}", folder=trained)
        assert done.code == 0, done.err
    ours, theirs = (np.load(trained / f"samples_{run}" / "samples.npz")["samples"] for run in ("model", "run"))
    assert np.array_equal(ours, theirs)
    done = command("sde.sample", "run=model", *SAMPLE, "ema=false", "out=samples_last", folder=trained)
    assert done.code == 2
    assert "has averaged weights alone: use ema=true" in done.sentence


def test_an_exported_folder_can_be_exported(trained: Path, tmp_path: Path) -> None:
    done = command("sde.interop.export", "run=model", f"to={tmp_path / 'again'}", folder=trained)
    assert done.code == 0, done.err
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / "model" / name).read_bytes()
    done = command("sde.interop.export", "run=model", f"to={tmp_path / 'again'}", folder=trained)
    assert done.code == 2
    assert "exists and is not empty: choose a new folder" in done.sentence


def test_folders_that_are_damaged(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def changed(**parts: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trained / "model", folder)
        config = json.loads((folder / "config.json").read_text()) | parts
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    changed(version=2)
    with pytest.raises(UserError, match="has version 2 and this package reads version 1"):
        read_folder(folder)
    changed(model=None)
    with pytest.raises(UserError, match="has no model: give a folder that"):
        read_folder(folder)
    changed(sde={"_target_": "os.system"})
    with pytest.raises(UserError, match=r"_target_='os\.system' is not a registered sde"):
        load_pretrained(folder)
    changed()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_pretrained(folder)
    safetensors.torch.save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="does not fit its own configuration"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="export it again"):
        load_pretrained(folder)


class HubError(Exception):
    """An answer with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = SimpleNamespace(status_code=status)


class TokenError(OSError):
    """There is no token."""


class InvalidName(ValueError):
    """Not the name of a repository."""


class Hub:
    """A hub in a folder, in place of huggingface_hub; `failure` is raised by whatever is asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.failure: Exception | None = None
        self.asked: list[dict[str, Any]] = []
        module, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
        errors.LocalTokenNotFoundError = TokenError  # type: ignore[attr-defined]
        errors.HfHubHTTPError = HubError  # type: ignore[attr-defined]
        errors.HFValidationError = InvalidName  # type: ignore[attr-defined]
        module.errors = errors  # type: ignore[attr-defined]
        module.HfApi = lambda: self  # type: ignore[attr-defined]
        module.snapshot_download = self.snapshot_download  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)

    def _answer(self, **asked: Any) -> None:
        if self.failure is not None:
            raise self.failure
        self.asked.append(asked)

    def create_repo(self, *, repo_id: str, private: bool, exist_ok: bool) -> None:
        self._answer(private=private, exist_ok=exist_ok)
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: str, revision: str | None, allow_patterns: list[str]) -> None:
        self._answer(revision=revision)
        for name in allow_patterns:
            shutil.copy(Path(folder_path) / name, self.folder / repo_id / name)

    def snapshot_download(
        self, *, repo_id: str, revision: str | None, local_dir: str, allow_patterns: list[str]
    ) -> str:
        self._answer(revision=revision)
        Path(local_dir).mkdir(parents=True)
        for name in allow_patterns:
            shutil.copy(self.folder / repo_id / name, Path(local_dir) / name)
        return local_dir


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


def test_to_the_hub_and_back(trained: Path, tmp_path: Path, hub: Hub) -> None:
    """The three files of the folder travel, and no other."""
    shutil.copytree(trained / "model", tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    done = command("sde.interop.hub", "push", "folder=model", "repo=me/moons", "private=true", folder=tmp_path)
    assert done.code == 0, done.err
    assert done.out.strip() == "https://huggingface.co/me/moons"
    assert hub.asked[0] == {"private": True, "exist_ok": True}
    done = command("sde.interop.hub", "pull", "repo=me/moons", "revision=main", folder=tmp_path)
    assert done.code == 0, done.err
    assert hub.asked[-1] == {"revision": "main"}
    files = {file.name: file.read_bytes() for file in (tmp_path / "me" / "moons").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (trained / "model").iterdir()}
    done = command("sde.sample", "run=me/moons", *SAMPLE, "out=s", folder=tmp_path)
    assert done.code == 0, done.err


class ConnectTimeout(TimeoutError):
    """As a client of the network raises."""


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (TokenError("none"), "there is no token for the hub: run hf auth login, or set HF_TOKEN"),
        (HubError(401), "the hub knows no me/moons that it may show or change without a token"),
        (HubError(403), "the hub does not let this token change me/moons"),
        (HubError(404), "the hub has no me/moons or not this revision"),
        (HubError(500), r"the hub refused \(status 500\): try later"),
        (InvalidName("bad name"), r"repo=me/moons is not the name of a repository \(bad name\)"),
        (ConnectTimeout("no route"), r"the hub cannot be reached \(no route\): check the network"),
        (ConnectionError("offline"), r"the hub cannot be reached \(offline\)"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    failure: Exception, sentence: str, trained: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.failure = failure
    with pytest.raises(UserError, match=sentence):
        push(trained / "model", "me/moons")
    with pytest.raises(UserError, match=sentence):
        pull("me/moons", tmp_path / "new")


def test_offline_mode_is_said_and_long_reasons_end_with_a_word(
    trained: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.failure = ConnectionError("words " * 100)
    with pytest.raises(UserError, match=r"cannot be reached \((words )+\.\.\.\): check the network"):
        pull("me/moons", tmp_path / "new")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, so that the hub is not asked for me/moons"):
        pull("me/moons", tmp_path / "new")


def test_errors_before_the_hub_is_asked(
    trained: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="write it as user/name"):
        push(trained / "model", "moons")
    with pytest.raises(UserError, match="is not whole"):
        push(trained / "run", "me/moons")
    hub.failure = KeyError("a fault of ours")
    with pytest.raises(KeyError):
        pull("me/moons", tmp_path / "new")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="the hub needs the package huggingface_hub"):
        push(trained / "model", "me/moons")
    done = command("sde.interop.hub", "upload", folder=tmp_path)
    assert done.code == 2
    assert "'upload' is not one of push, pull" in done.sentence
    done = command("sde.interop.hub", "push", "repo=me/moons", folder=tmp_path)
    assert done.code == 2
    assert "folder= is missing" in done.sentence
