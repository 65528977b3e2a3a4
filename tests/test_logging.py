"""Weights & Biases gets what metrics.jsonl gets; wandb itself is played by a stand-in, so that no test needs it."""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sde.training import logging
from sde.training.logging import WandB
from sde.training.metrics import read_metrics
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
        self.axes: dict[str, dict[str, Any]] = {}
        self.summary: dict[str, float] = {}
        self.starting_step = 0
        self.fails: set[str] = set()

    def Settings(self, **settings: float) -> dict[str, float]:
        return settings

    def init(self, **options: Any) -> StandIn:
        self.started.append(options)
        if f"init {options['mode']}" in self.fails:
            raise ConnectionError(f"no answer\nin {options['settings']['init_timeout']} seconds")
        self.id, self.url = options["id"], "https://wandb.example/run"
        return self

    def define_metric(self, name: str, **options: Any) -> None:
        self.axes[name] = options

    def log(self, values: dict[str, Any], step: int, commit: bool) -> None:
        assert commit
        if "log" in self.fails:
            raise BrokenPipeError("the service has gone")
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        if "finish" in self.fails:
            raise TimeoutError
        self.codes.append(exit_code)

    def Image(self, path: str, caption: str) -> tuple[str, bool, str]:
        return ("image", Path(path).is_file(), caption)

    def Video(self, path: str, caption: str, format: str) -> tuple[str, bool, str]:
        return (format, Path(path).is_file(), caption)

    def Table(self, data: list[list[float]], columns: list[str]) -> tuple[str, list[list[float]]]:
        return ("table", data)

    def Histogram(self, np_histogram: tuple[list[float], list[float]]) -> tuple[str, list[float], list[float]]:
        return ("histogram", *np_histogram)


def install(monkeypatch: pytest.MonkeyPatch, api_key: str | None = None) -> StandIn:
    wandb = StandIn(api_key)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
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
        numbers = {name: value for name, value in values.items() if not name.startswith("noise_levels/")}
        assert numbers == {name: value for name, value in line.items() if name != "seconds"}
    assert ("image", True, "step 20") in [values.get("media/samples") for _, values in wandb.logged]
    assert wandb.codes == [0]
    done = command("sde.train", "resume=r", "training.steps=30", folder=tmp_path)
    assert done.code == 0, done.err
    assert wandb.started[1]["id"] == wandb.started[0]["id"]


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
    wandb = install(monkeypatch, api_key)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    WandB(mode=option).start(tmp_path, {}, 0)
    assert wandb.started[0]["mode"] == expected


def rows(wandb: StandIn, start: int = 0) -> list[tuple[int, int]]:
    """Of every row W&B's step and the training step."""
    return [(row, values["step"]) for row, values in wandb.logged[start:]]


def test_errors_by_noise_level_are_a_chart_and_a_heat_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = install(monkeypatch)
    clock = 1000.0
    monkeypatch.setattr(logging.time, "monotonic", lambda: clock)
    logger = WandB()
    logger.start(tmp_path, {}, 0)
    values = {f"{kind}/eps_mse/log_snr={level}": level**2 for kind in ("val", "train") for level in (4.0, -6.0, 0.0)}
    expected = ("line", ("table", [[-6.0, 36.0], [0.0, 0.0], [4.0, 16.0]]), "val/eps_mse by noise level")
    heat = ("histogram", [36.0, 0.0, 16.0], [-9.0, -3.0, 2.0, 6.0])
    logger.log(10, values)
    for kind in ("val", "train"):
        name = f"noise_levels/{kind}_eps_mse"
        assert wandb.logged[0][1][name] == (*expected[:2], f"{kind}/eps_mse by noise level")
        assert wandb.logged[0][1][f"{name}_over_steps"] == heat
    # ten panels for ten levels would bury the rest
    assert {name for name, options in wandb.axes.items() if options["hidden"]} == {*values, "step"}
    assert all(options["step_metric"] == "step" for name, options in wandb.axes.items() if name != "step")
    # the heat map gets a column at every log; the chart, which is a file, at validations and once a minute
    clock += 59
    logger.log(20, {**values, "val/eps_mse/log_snr=4.0": float("nan")})
    shown = wandb.logged[1][1]
    assert "noise_levels/train_eps_mse" not in shown
    assert shown["noise_levels/train_eps_mse_over_steps"] == heat
    assert shown["noise_levels/val_eps_mse"][1] == ("table", expected[1][1][:2])
    assert shown["noise_levels/val_eps_mse_over_steps"] == ("histogram", [36.0, 0.0], [-9.0, -3.0, 3.0])
    clock += 1
    logger.log(30, values)
    assert "noise_levels/train_eps_mse" in wandb.logged[2][1]


def test_a_run_that_goes_back_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B drops rows at or below its newest step, so that its step goes on while training's goes back."""
    wandb = install(monkeypatch)
    picture = tmp_path / "a.png"
    picture.touch()
    logger = WandB()
    logger.start(tmp_path, {}, 0)
    for step in (10, 20, 30):
        logger.log(step, {"train/loss": 1 / step, "val/loss": float(step)})
        logger.image(step, "samples", picture)
        logger.animation(step, "trajectories", picture)
    assert rows(wandb) == [(10, 10), (11, 10), (12, 10), (20, 20), (21, 20), (22, 20), (30, 30), (31, 30), (32, 30)]
    assert wandb.logged[2][1]["media/trajectories"] == ("gif", True, "step 10")
    assert wandb.summary == {"best/train_loss": 1 / 30, "best/val_loss": 10.0}
    logger.finish(0)
    # the next leg; its best begins with the lines that are kept
    wandb.summary.clear()
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 10, "val/loss": 10.0, "train/loss": 0.1}\n{"step": 30, "train/loss": 0.01}\n'
    )
    logger.start(tmp_path, {}, 20)
    for step in (30, 40):
        logger.log(step, {"train/loss": 1 / step, "val/loss": float(step)})
    assert rows(wandb, 9) == [(33, 30), (40, 40)]
    assert wandb.summary == {"best/train_loss": 1 / 40}
    # of another leg W&B's server may know more
    wandb.starting_step = 60
    logger.start(tmp_path, {}, 40)
    logger.evaluation(40, {"bits": 1.0}, {})
    logger.log(50, {"train/loss": 1.0})
    (tmp_path / "wandb-step.txt").write_text("")  # written to a full disk
    logger.start(tmp_path, {}, 50)
    logger.log(70, {"train/loss": 1.0})
    assert wandb.logged[-3] == (60, {"evaluation/step": 40, "bits": 1.0})
    assert rows(wandb, 12) == [(61, 50), (70, 70)]


@pytest.mark.parametrize(
    ("place", "above", "group"),
    [
        ("runs/multirun/2026-01-02/03-04-05/0_vp", None, "2026-01-02/03-04-05"),
        ("runs/2026-01-02/03-04-05_vp", None, None),
        ("sweeps/lr/0", "multirun.yaml", "lr"),
        ("sweeps/lr/0", None, None),
    ],
)
def test_the_runs_of_a_multirun_are_a_group(
    place: str, above: str | None, group: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = install(monkeypatch)
    folder = tmp_path / place
    folder.mkdir(parents=True)
    if above:
        (folder.parent / above).touch()
    WandB().start(folder, {}, 0)
    WandB(group="mine", name="n", notes="why", job_type="ablation").start(folder, {}, 0)
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    monkeypatch.setenv("WANDB_NAME", "m")
    WandB().start(folder, {}, 0)
    assert [(start["group"], start["name"]) for start in wandb.started] == [
        (group, folder.name),
        ("mine", "n"),
        ("theirs", "m"),
    ]
    assert (wandb.started[1]["notes"], wandb.started[1]["job_type"]) == ("why", "ablation")


# Faults


def test_without_wandb_there_is_a_sentence_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as an import finds it that is not installed
    done = command("sde.train", *TINY_2D, "logger=wandb", "hydra.run.dir=r", folder=tmp_path)
    assert done.code == 0, done.err
    sentence = "wandb is not installed (pip install wandb), so that the run is recorded in metrics.jsonl alone"
    assert done.err.count("wandb") == 2  # the sentence and nothing else
    assert f"warning: {sentence}" in done.err
    assert [line["step"] for line in read_metrics(tmp_path / "r" / "metrics.jsonl")] == [10, 20]


def test_a_run_that_cannot_be_online_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = install(monkeypatch, "key")
    wandb.fails = {"init online"}
    logger = WandB(timeout=5.0)
    logger.start(tmp_path, {}, 0)
    logger.log(10, {"train/loss": 1.0})
    logger.finish(0)
    assert [start["mode"] for start in wandb.started] == ["online", "offline"]
    assert [step for step, _ in wandb.logged] == [10]
    err = capsys.readouterr().err
    assert "W&B cannot be reached (no answer), so that the run is offline until it is resumed" in err
    assert f"(upload it with wandb sync {tmp_path / 'wandb'})" in err
    assert wandb.started[0]["id"] == wandb.started[1]["id"] == (tmp_path / "wandb-id.txt").read_text()
    assert err.count("warning") == 1


@pytest.mark.parametrize("fails", [{"init online", "init offline"}, {"log"}, {"finish"}, {"log", "finish"}])
def test_training_goes_on_whatever_wandb_does(fails: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = install(monkeypatch, "key")
    wandb.fails = fails
    done = command("sde.train", *TINY_2D, "logger=wandb", "hydra.run.dir=r", folder=tmp_path)
    assert done.code == 0, done.err
    assert [line["step"] for line in read_metrics(tmp_path / "r" / "metrics.jsonl")] == [10, 20]
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: W&B")]
    assert len(warnings) == (2 if "init online" in fails else 1), done.err
    reasons = {"init online": "no answer", "log": "the service has gone", "finish": "TimeoutError"}
    assert next(reasons[what] for what in ("init online", "log", "finish") if what in fails) in warnings[0]
