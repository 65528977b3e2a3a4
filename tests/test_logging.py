"""Weights & Biases gets what metrics.jsonl gets; wandb itself is played by a stand-in, so that no test needs it."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.commands import TINY_2D, command


class StandIn(ModuleType):
    """As much of wandb as the logger uses, which writes down what it is told."""

    def __init__(self, api_key: str | None) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.api = type("Api", (), {"api_key": api_key})()
        self.plot = type("Plot", (), {"line": staticmethod(lambda table, x, y, title: ("line", table, title))})()
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.codes: list[int] = []

    def init(self, **settings: Any) -> StandIn:
        self.started.append(settings)
        self.id, self.url = settings["id"] or "abc123", "https://wandb.example/run"
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)

    def Image(self, path: str) -> tuple[str, bool]:
        return ("image", Path(path).is_file())

    def Table(self, data: list[list[float]], columns: list[str]) -> tuple[str, list[list[float]]]:
        return ("table", data)


def install(monkeypatch: pytest.MonkeyPatch, api_key: str | None = None) -> StandIn:
    wandb = StandIn(api_key)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return wandb


def test_everything_goes_to_wandb_and_a_resumed_run_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = install(monkeypatch)
    done = command("sde.train", *TINY_2D, "logger=wandb", "logger.tags=[a]", "hydra.run.dir=r", folder=tmp_path)
    assert done.code == 0, done.err
    (start,) = wandb.started
    assert start["mode"] == "offline"
    assert start["config"]["sde"]["beta_max"] == 20.0
    assert start["tags"] == ["a"]
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    scalars = [(step, values) for step, values in wandb.logged if "train/loss" in values]
    assert [step for step, _ in scalars] == [line["step"] for line in lines]
    for (_, values), line in zip(scalars, lines, strict=True):
        assert values == {name: value for name, value in line.items() if name not in ("step", "seconds")}
    charts = [values["val/loss_by_noise_level"] for _, values in wandb.logged if "val/loss_by_noise_level" in values]
    kind, (_, rows), _ = charts[0]
    assert kind == "line"
    assert len(rows) == 10
    assert all(lines[-1][f"val/eps_mse/log_snr={level:.1f}"] == value for level, value in rows)
    assert ("image", True) in [values.get("samples") for _, values in wandb.logged]
    assert wandb.codes == [0]
    done = command("sde.train", "resume=r", "training.steps=30", folder=tmp_path)
    assert done.code == 0, done.err
    assert wandb.started[1]["id"] == "abc123"


@pytest.mark.parametrize(
    ("api_key", "environment", "option", "expected"),
    [
        (None, {}, "auto", "offline"),
        ("key", {}, "auto", "online"),
        (None, {"WANDB_API_KEY": "key"}, "auto", "online"),
        ("key", {"WANDB_MODE": "offline"}, "auto", "offline"),
        ("key", {}, "offline", "offline"),
        (None, {}, "online", "online"),
    ],
)
def test_online_only_for_users_who_have_logged_in(
    api_key: str | None,
    environment: dict[str, str],
    option: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sde.training.logging import WandB

    wandb = install(monkeypatch, api_key)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    WandB(mode=option).start(tmp_path, {}, 0)
    assert wandb.started[0]["mode"] == expected


def test_without_wandb_there_is_a_sentence_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    done = command("sde.train", *TINY_2D, "logger=wandb", "hydra.run.dir=r", folder=tmp_path)
    assert done.code == 2
    assert done.sentence == "error: logger=wandb needs the package wandb: pip install wandb, or use logger=none"
    assert not (tmp_path / "r").exists()
