"""What the real wandb records offline, read back from its files: they are what `wandb sync` uploads."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from sde.training.logging import WandB
from sde.training.metrics import read_metrics
from tests.commands import TINY_2D, command

wandb = pytest.importorskip("wandb")
pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")

SWEEP = Path(__file__).parents[1] / "docs" / "wandb_sweep.yaml"


@dataclass
class Leg:
    """What one .wandb file holds."""

    path: Path
    run: Any = None
    code: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, tuple[str, bool]] = field(default_factory=dict)
    uploads: set[str] = field(default_factory=set)

    def numbers(self, name: str) -> dict[int, Any]:
        """The training step of every row that has the metric, and its value."""
        return {row["step"]: row[name] for row in self.rows if name in row}

    def bytes(self, path: str) -> bytes:
        """The content of a file that is to be uploaded."""
        assert path in self.uploads
        return (self.path.parent / "files" / path).read_bytes()


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a header of 7 bytes, then a LevelDB log in blocks of 32 KiB."""
    data, position, part = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block that has no room for a head
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = pb.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def nested(items: Any) -> dict[str, Any]:
    """Keys with their parts joined by dots, and their values."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_leg(path: Path) -> Leg:
    leg = Leg(path)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            leg.run = record.run
            leg.config.update(nested(record.run.config.update))
        elif kind == "config":
            leg.config.update(nested(record.config.update))
        elif kind == "history":
            leg.rows.append(nested(record.history.item))
        elif kind == "summary":
            leg.summary.update(nested(record.summary.update))
        elif kind == "metric":
            leg.axes[record.metric.name] = (record.metric.step_metric, record.metric.options.hidden)
        elif kind == "files":
            leg.uploads |= {file.path for file in record.files.files}
        elif kind == "exit":
            leg.code = record.exit.exit_code
    return leg


def read_legs(folder: Path) -> list[Leg]:
    """The legs of the run in a folder, in the order in which they were begun, which is that of `wandb sync`."""
    wandb.teardown()  # waits for the service, which writes the last rows after `finish` has returned
    legs = [read_leg(path) for path in folder.glob("wandb/offline-run-*/*.wandb")]
    return sorted(legs, key=lambda leg: leg.run.start_time.ToMicroseconds())


@pytest.fixture(scope="module", autouse=True)
def _away(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No account, no network and nothing written outside of the tests' folder."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR", "ARTIFACT_DIR"):
            patch.setenv(f"WANDB_{name}", str(folder))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody answers
        for name in ("SWEEP_ID", "RUN_ID", "SWEEP_PARAM_PATH"):  # which an agent sets
            patch.setenv(f"WANDB_{name}", "x")
            patch.delenv(f"WANDB_{name}")
        wandb.teardown()
        yield
        wandb.teardown()


# The logger, by hand

LEVELS = (-6.0, 0.0, 4.0)


def numbers(step: int) -> dict[str, float]:
    """What the loop logs at a step; validations are at every second one."""
    line = {"train/loss": 1 / step, "train/gradient_norm": 2.0, "train/lr": 1e-4 * step, "train/memory_gib": 0.5}
    line |= {f"train/eps_mse/log_snr={level:.1f}": level + step for level in LEVELS}
    if step % 20 == 0:
        line |= {"val/loss": abs(step - 40.0) + 1}
        for name in ("eps_mse", "gradient_norm"):
            line |= {f"val/{name}/log_snr={level:.1f}": 2 * level + step for level in LEVELS}
    return line


def picture(path: Path, step: int, frames: int = 1) -> Path:
    images = [Image.new("RGB", (4, 4), (step, 60 * i, 0)) for i in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:]) if frames > 1 else images[0].save(path)
    return path


def drive(folder: Path, start: int, stop: int, code: int) -> None:
    """A leg of a run from one step to another."""
    logger = WandB(mode="offline", tags=("a", "b"), notes="why")
    logger.start(folder, {"sde": {"beta_max": 20.0}, "model": {"channels": [8, 16]}}, start)
    for step in range(start + 10, stop + 1, 10):
        logger.log(step, numbers(step))
        if step % 20 == 0:
            logger.image(step, "samples", picture(folder / f"{step}.png", step))
            logger.animation(step, "trajectories", picture(folder / f"{step}.gif", step, frames=3))
    logger.evaluation(stop, {"likelihood/test/bits_per_dim": 3.0}, {"likelihood/test/h": folder / f"{stop}.png"})
    logger.finish(code)


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> list[Leg]:
    """A run of a multirun that failed at step 40, and went on from step 20 to 60."""
    folder = tmp_path_factory.mktemp("runs") / "multirun" / "2026-01-02" / "03-04-05" / "0_vp"
    folder.mkdir(parents=True)
    drive(folder, 0, 40, 1)
    lines = [json.dumps({"step": step, **numbers(step)}) for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    drive(folder, 20, 60, 0)
    found = read_legs(folder)
    assert len(found) == 2
    return found


def test_both_legs_are_one_run_of_a_group(legs: list[Leg]) -> None:
    folder = legs[0].path.parents[2]
    assert [leg.run.run_id for leg in legs] == [(folder / "wandb-id.txt").read_text()] * 2
    assert all(leg.run.resume for leg in legs)  # so that sync appends
    for leg in legs:
        assert (leg.run.run_group, leg.run.display_name, leg.run.notes) == ("2026-01-02/03-04-05", "0_vp", "why")
        assert (leg.run.project, list(leg.run.tags)) == ("sde", ["a", "b"])
        assert leg.config["sde"] == {"beta_max": 20.0}
        assert leg.config["model"] == {"channels": [8, 16]}
    assert [leg.code for leg in legs] == [1, 0]


def test_every_number_is_at_its_step(legs: list[Leg]) -> None:
    for leg, steps in zip(legs, ((10, 20, 30, 40), (30, 40, 50, 60)), strict=True):
        for name in numbers(20):
            expected = {step: numbers(step)[name] for step in steps if name in numbers(step)}
            assert leg.numbers(name) == pytest.approx(expected, rel=1e-12), name


def test_no_row_of_any_leg_is_behind_another(legs: list[Leg]) -> None:
    """W&B would drop it."""
    rows = [row["_step"] for leg in legs for row in leg.rows]
    assert len(rows) == 2 * (4 + 2 + 2 + 1)
    assert all(a < b for a, b in pairwise(rows))
    assert [row["_step"] for row in legs[0].rows if "train/loss" in row] == [10, 20, 30, 40]


def test_charts_have_the_training_step_as_their_axis_and_levels_no_panels(legs: list[Leg]) -> None:
    for leg in legs:
        levels = {name for name in numbers(20) if "log_snr" in name}
        assert {name for name, (_, hidden) in leg.axes.items() if hidden} == {*levels, "step"}
        for name in (*numbers(20), "media/samples", "media/trajectories", "noise_levels/train_eps_mse_over_steps"):
            assert leg.axes[name][0] == "step"
        assert leg.axes["likelihood/test/bits_per_dim"][0] == "evaluation/step"


@pytest.mark.parametrize("quantity", ["train_eps_mse", "val_eps_mse", "val_gradient_norm"])
def test_quantities_by_noise_level_are_charts_and_heat_maps(quantity: str, legs: list[Leg]) -> None:
    factor = 1 if quantity.startswith("train") else 2
    name = f"noise_levels/{quantity}"
    for leg, steps in zip(legs, ((10, 20, 30, 40), (30, 40, 50, 60)), strict=True):
        steps = steps if factor == 1 else tuple(step for step in steps if step % 20 == 0)
        heat = {row["step"]: row for row in leg.rows if f"{name}_over_steps.values" in row}
        assert tuple(heat) == steps
        for step, row in heat.items():
            assert row[f"{name}_over_steps._type"] == "histogram"
            assert row[f"{name}_over_steps.values"] == [factor * level + step for level in LEVELS]
            assert row[f"{name}_over_steps.bins"] == [-9.0, -3.0, 2.0, 6.0]
        charts = {row["step"]: row for row in leg.rows if f"{name}_table.path" in row}
        assert tuple(charts) == (steps if factor == 2 else steps[:1])  # those of training are once a minute
        for step, row in charts.items():
            table = json.loads(leg.bytes(row[f"{name}_table.path"]))
            assert table["data"] == [[level, factor * level + step] for level in LEVELS]
        panel = leg.config[f"_wandb.visualize.{name}"]["panel_config"]
        assert panel["panelDefId"] == "wandb/line/v0"
        assert panel["fieldSettings"]["x"] == "log SNR"


def test_pictures_and_animations_are_there_with_their_steps(legs: list[Leg]) -> None:
    folder = legs[0].path.parents[2]
    for leg, steps in zip(legs, ((20, 40), (40, 60)), strict=True):
        for name, kind, suffix in (("samples", "image-file", "png"), ("trajectories", "video-file", "gif")):
            rows = [row for row in leg.rows if f"media/{name}.path" in row]
            assert [row["step"] for row in rows] == list(steps)
            for row, step in zip(rows, steps, strict=True):
                assert row[f"media/{name}._type"] == kind
                assert row[f"media/{name}.caption"] == f"step {step}"
                stored = leg.bytes(row[f"media/{name}.path"])
                # the last leg's picture of a step is the one that lies in the folder; both are the same here
                assert stored == (folder / f"{step}.{suffix}").read_bytes()


def test_evaluations_have_an_axis_of_their_own(legs: list[Leg]) -> None:
    for leg, step in zip(legs, (40, 60), strict=True):
        (row,) = [row for row in leg.rows if "evaluation/step" in row]
        assert (row["evaluation/step"], row["likelihood/test/bits_per_dim"]) == (step, 3.0)
        assert leg.bytes(row["likelihood/test/h.path"])
        assert leg.summary["likelihood/test/bits_per_dim"] == 3.0


def test_the_summary_has_the_last_and_the_best(legs: list[Leg]) -> None:
    first, second = legs
    assert first.summary["val/loss"] == 1.0
    assert (first.summary["best/val_loss"], first.summary["best/train_loss"]) == (1.0, 1 / 40)
    # the second leg begins with the best of what is kept, which is 21 at step 20, and ends worse than it was at 40
    assert second.summary["val/loss"] == 21.0
    assert (second.summary["best/val_loss"], second.summary["best/train_loss"]) == (1.0, 1 / 60)


def test_a_service_that_dies_stops_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One sentence; the next run, of a --multirun, has a service again."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    logger = WandB(mode="offline")
    logger.start(tmp_path / "a", {}, 0)
    process = wandb.sdk.wandb_setup.singleton().ensure_service()._proc._process
    process.kill()
    process.wait()
    for step in (10, 20):
        logger.log(step, {"train/loss": 1.0})
    logger.finish(0)
    err = capfd.readouterr().err
    assert err.count("warning: W&B does not take what is logged") == 1
    assert "Traceback" not in err
    logger.start(tmp_path / "b", {}, 0)
    logger.log(10, {"train/loss": 1.0})
    logger.finish(0)
    (leg,) = read_legs(tmp_path / "b")
    assert leg.numbers("train/loss") == {10: 1.0}
    assert "warning" not in capfd.readouterr().err


# A run of python -m sde.train, as a sweep starts it


def drawn(parameter: dict[str, Any]) -> Any:
    """A value as W&B's server draws one."""
    if "values" in parameter:
        return parameter["values"][-1]
    low, high = parameter["min"], parameter["max"]
    return {"log_uniform_values": math.sqrt(low * high), "int_uniform": (low + high) // 2}[parameter["distribution"]]


def agents_command(sweep: dict[str, Any], run_id: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What W&B's agent would start."""
    agents = pytest.importorskip("wandb.wandb_agent")
    commands: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            commands.append(command)

    monkeypatch.setattr(agents, "AgentProcess", Process)
    agent = agents.Agent(None, None)
    agent._sweep_command = list(sweep["command"])
    args = {name: {"value": drawn(parameter)} for name, parameter in sweep["parameters"].items()}
    agent._command_run({"run_id": run_id, "program": sweep["program"], "args": args})
    return commands[0]


def test_a_sweep_runs_and_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = yaml.safe_load(SWEEP.read_text())
    assert sweep["method"] == "bayes"
    assert sweep["metric"] == {"name": "val/loss", "goal": "minimize"}
    started = agents_command(sweep, "sweep001", monkeypatch)
    assert started[:4] == ["/usr/bin/env", "python", "-m", "sde.train"]
    small = [option for option in TINY_2D if option.split("=")[0] not in sweep["parameters"]]
    done = command("sde.train", *started[4:], *small, folder=tmp_path)
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "sweeps" / "sweep001"
    monkeypatch.delenv("WANDB_RUN_ID")  # who resumes a run of a sweep is no agent
    lines = [read_metrics(folder / "metrics.jsonl")]
    done = command("sde.train", f"resume={folder}", "training.steps=30", folder=tmp_path)
    assert done.code == 0, done.err
    lines.append(read_metrics(folder / "metrics.jsonl")[len(lines[0]) :])
    legs = read_legs(folder)
    assert [leg.run.run_id for leg in legs] == ["sweep001", "sweep001"]
    assert [leg.code for leg in legs] == [0, 0]
    config = legs[0].config
    assert config["optimizer"]["lr"] == pytest.approx(3e-4)
    assert (config["training"]["batch_size"], config["training"]["warmup"]) == (256, 1000)
    assert config["training"]["log_every"] == 10  # what the sweep chose stands beside the rest, not in its place
    for leg, expected in zip(legs, lines, strict=True):
        assert expected
        for line in expected:
            for name, value in line.items():
                if name not in ("step", "seconds"):
                    assert leg.numbers(name)[line["step"]] == value, name
    assert legs[0].summary["val/loss"] == lines[0][-1]["val/loss"]
    # every preview, byte by byte
    for suffix, kind in (("png", "samples"), ("gif", "trajectories")):
        previews = {path.read_bytes() for path in (folder / "previews").glob(f"*.{suffix}")}
        stored = {
            leg.bytes(row[f"media/{kind}.path"]) for leg in legs for row in leg.rows if f"media/{kind}.path" in row
        }
        assert previews
        assert stored == previews
