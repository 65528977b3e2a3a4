"""Exact resumption: a training that is saved, left and gone on with holds the same bits as one that never stopped.

Everything random in step k is a function of (seed, k), so there is no random state to save. Each case here makes four
steps at once, and two and two with a checkpoint file and a new trainer in between, for which PyTorch's, NumPy's and
Python's generators are set to something else before each step.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sde.data import Order
from sde.errors import UserError
from sde.losses import TIMES, WEIGHTINGS
from sde.models import MODELS
from sde.processes import SDES
from sde.training.checkpoint import load_checkpoint
from sde.training.loop import Trainer
from sde.training.schedules import SCHEDULES
from tests.commands import TINY_2D, command
from tests.small_trainings import TINY, Examples, build, configuration, differing, examples_for, model_words, save

POINTS = ("model=mlp", "model.width=8", "model.depth=1", "model.dropout=0.3")
PICTURES = ("model=ddpmpp", "model.channels=4", "model.channel_multipliers=[1]", "model.blocks_per_level=1")
PICTURES = (*PICTURES, "model.attention_resolutions=[]", "model.dropout=0.3")


def disturb(seed: int) -> None:
    """Let all global generators be somewhere else."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the one that others share
    random.seed(seed)


def steps(trainer: Trainer, count: int, disturbed: int | None = None) -> list[dict[str, float]]:
    """Make `count` steps; what is logged of each, in all digits."""
    lines = []
    for _ in range(count):
        if disturbed is not None:
            disturb(disturbed + trainer.step)
        trainer.make_step()
        lines.append(trainer.flush(str))
    return lines


def assert_goes_on(
    config: dict[str, Any], dataset: Examples, folder: Path, first: int = 2, then: int = 2
) -> dict[str, Any]:
    """Check that an interrupted training ends with the bits of one that was not; gives the state at the end."""
    whole = build(config, dataset)
    steps(whole, first)
    path = save(whole, config, folder)
    before = load_checkpoint(path).content
    expected = steps(whole, then)
    resumed = build(config, dataset)
    resumed.load_state(load_checkpoint(path).content)
    assert (resumed.step, resumed.skipped) == (first, before["skipped"])
    assert not differing(before["model"], resumed.state()["model"])
    seen = steps(resumed, then, disturbed=1000)
    assert seen == expected or repr(seen) == repr(expected)  # a number that is none is not equal to itself
    assert not differing(whole.state(), resumed.state())
    moved = differing(before["model"], resumed.state()["model"])
    assert moved  # or there would be nothing to see
    assert differing(before["ema"], resumed.state()["ema"])
    return resumed.state()


def test_configurations_are_those_of_the_command_line() -> None:
    from hydra import compose, initialize_config_dir

    from sde.config import conf_dir, plain

    words = ["model=mlp", "sde=ve", "training.steps=7", "schedule=cosine", "ema.decay=[0.9,0.99]"]
    quick = configuration(*words)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert quick == plain(compose("train", overrides=words))


@pytest.mark.parametrize("conditional", [False, True], ids=["", "conditional"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_goes_on(name: str, conditional: bool, tmp_path: Path) -> None:
    words = [*model_words(name), f"conditional={str(conditional).lower()}"]
    config, dataset = configuration(*TINY, *words), examples_for(name)
    try:
        build(config, dataset)
    except UserError as error:
        assert conditional  # some take no labels, and say so
        assert "label" in str(error) or "class" in str(error)  # noqa: PT017
        return
    assert_goes_on(config, dataset, tmp_path)


@pytest.mark.parametrize("parameterization", ["edm", "eps", "score", "v", "velocity", "x0"])
@pytest.mark.parametrize("sde", sorted(SDES))
def test_every_process_and_parameterization_goes_on(sde: str, parameterization: str, tmp_path: Path) -> None:
    config = configuration(*TINY, *POINTS, f"sde={sde}", f"parameterization={parameterization}")
    assert_goes_on(config, Examples((2,)), tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["sde=vp", "parameterization=ddpm_chain"],
        ["sde=ve", "parameterization=smld_chain"],
        ["sde=vp", "parameterization=beta_chain", "parameterization.predicts=v"],
        ["sde=cosine", "parameterization=beta_chain", "parameterization.schedule=cosine"],
    ],
    ids=["ddpm", "smld", "beta", "beta-cosine"],
)
def test_chains_go_on(words: list[str], tmp_path: Path) -> None:
    assert_goes_on(configuration(*TINY, *POINTS, *words), Examples((2,)), tmp_path)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_and_distribution_of_times_goes_on(weighting: str, time: str, tmp_path: Path) -> None:
    other = ["loss.stratified=false", "loss.reweight=false"] if time in ("log_normal", "log_snr") else []
    config = configuration(*TINY, *POINTS, f"loss.weighting={weighting}", f"loss.time={time}", *other)
    assert_goes_on(config, Examples((2,)), tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["training.accumulation=4", "conditional=true"],
        ["training.dequantize=true", "training.precision=fp64"],
        ["training.deterministic=true", "training.clip=0"],
        ["training.workers=2", "training.batch_size=5"],
        ["training.precision=tf32", "ema.decay=[0.9,0.99]", "ema.std=[0.05,0.1]"],
        ["training.precision=fp16", "training.accumulation=2", "training.dequantize=true"],
        ["training.non_finite=skip", "optimizer=adamw"],
    ],
    ids=["accumulation", "dequantize-fp64", "deterministic", "workers", "averages", "fp16", "skip"],
)
def test_pictures_go_on(words: list[str], tmp_path: Path) -> None:
    """With flips and dropout; batches go over the end of an epoch."""
    config = configuration(*TINY, *PICTURES, *words)
    assert_goes_on(config, Examples((1, 8, 8), count=10, flip=True), tmp_path)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("units", [False, True], ids=["float32", "half"])
def test_half_precision_goes_on(precision: str, units: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As this CPU computes it, in float32, and with products of half precision."""
    monkeypatch.setattr("sde.devices.multiplies_bfloat16", lambda: units)
    seen: list[torch.dtype] = []
    config = configuration(*TINY, *PICTURES, f"training.precision={precision}")
    dataset = Examples((1, 8, 8), flip=True)
    probe = build(config, dataset)
    convolution = next(m for m in probe.denoiser.network.modules() if isinstance(m, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    steps(probe, 1)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert set(seen) == {half if units else torch.float32}
    assert_goes_on(config, dataset, tmp_path)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "RAdam": {"decoupled_weight_decay": True, "weight_decay": 1e-3},
    "NAdam": {},
    "Adamax": {},
    "Adagrad": {"lr_decay": 0.1},
    "Adadelta": {},
    "ASGD": {"t0": 1},
    "Rprop": {},
    "Adafactor": {},
    "Adam": {"amsgrad": True, "fused": False},
}


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_pytorch_go_on(name: str, precision: str, tmp_path: Path) -> None:
    node = {"_target_": f"torch.optim.{name}", "lr": 1e-2, **OPTIMIZERS[name]}
    config = configuration(*TINY, *POINTS, f"training.precision={precision}", optimizer=node)
    assert_goes_on(config, Examples((2,)), tmp_path, first=3, then=3)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_goes_on(schedule: str, optimizer: str, tmp_path: Path) -> None:
    """The learning rate, too, is a function of the step."""
    options = {"inverse_sqrt": ["schedule.start=2"], "linear": ["schedule.start=1"]}.get(schedule, [])
    words = [f"optimizer={optimizer}", f"schedule={schedule}", "training.warmup=1", *options]
    config = configuration(*TINY, *POINTS, *words)
    state = assert_goes_on(config, Examples((2,)), tmp_path)
    factor = build(config, Examples((2,))).schedule(3, 6, 1)
    assert state["optimizer"]["param_groups"][0]["lr"] == 1e-2 * factor
    assert (factor == 1.0) == (schedule == "constant")


def test_options_of_the_optimizer_are_those_asked_for_now(tmp_path: Path) -> None:
    """A run that goes on with another learning rate has it from there on, and keeps the optimizer's memory."""
    config, dataset = configuration(*TINY, *POINTS, "training.warmup=0"), Examples((2,))
    first = build(config, dataset)
    steps(first, 2)
    path = save(first, config, tmp_path)
    again = build(config | {"optimizer": config["optimizer"] | {"lr": 1e-3, "weight_decay": 0.1}}, dataset)
    again.load_state(load_checkpoint(path).content)
    steps(again, 1)
    group = again.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1)
    assert {float(state["step"]) for state in again.optimizer.state.values()} == {3.0}


# Steps that are left out


def with_bad_steps(*bad: int, batch_size: int = 4, count: int = 24) -> Examples:
    """Points of which one is infinite in each of the steps `bad`."""
    order = Order(count, batch_size, seed=0)
    return Examples((2,), count=count, bad=tuple(int(order(step)[-1]) for step in bad))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp64"])
@pytest.mark.parametrize("optimizer", ["fused", "plain", "sgd"])
def test_skipped_steps_go_on(optimizer: str, precision: str, tmp_path: Path) -> None:
    """A step with an infinite example leaves weights, moments and their count as they were."""
    node = {"_target_": "torch.optim.SGD" if optimizer == "sgd" else "torch.optim.Adam", "lr": 1e-2}
    if optimizer != "sgd":
        node["fused"] = optimizer == "fused"
    words = [*TINY, "ema.decay=[0.9,0.5]", "ema.std=[0.1]", *POINTS, f"training.precision={precision}"]
    config = configuration(*words, "training.non_finite=skip", "training.log_every=2", optimizer=node)
    dataset = with_bad_steps(1, 3)
    assert_skips(config, dataset)
    state = assert_goes_on_in_lines(config, dataset, tmp_path)
    assert state["skipped"] == 2
    if optimizer != "sgd":
        assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {2.0}
    if precision == "fp16":
        assert state["scaler"]["scale"] == 2.0**16 / 4
        assert state["scaler"]["_growth_tracker"] == 0


def assert_skips(config: dict[str, Any], dataset: Examples) -> None:
    trainer = build(config, dataset)
    trainer.make_step()
    before = trainer.state()
    trainer.make_step()
    after = trainer.state()
    assert not differing(before["model"], after["model"])
    assert not differing(before["optimizer"]["state"], after["optimizer"]["state"])


def assert_goes_on_in_lines(config: dict[str, Any], dataset: Examples, folder: Path) -> dict[str, Any]:
    """Two lines of two steps each, at once and with a break between them."""

    def line(trainer: Trainer) -> dict[str, float]:
        trainer.make_step()
        trainer.make_step()
        return trainer.flush(str)

    whole = build(config, dataset)
    line(whole)
    path = save(whole, config, folder)
    expected = line(whole)
    resumed = build(config, dataset)
    resumed.load_state(load_checkpoint(path).content)
    disturb(5)
    assert line(resumed) == expected
    assert expected["train/skipped"] == 2
    assert np.isfinite(list(expected.values())).all()
    assert not differing(whole.state(), resumed.state())
    return resumed.state()


def test_the_scale_of_a_loss_goes_on_growing(tmp_path: Path) -> None:
    """The count of good steps since the scale last changed is saved: it doubles when that is full."""
    config, dataset = configuration(*TINY, *POINTS, "training.precision=fp16"), Examples((2,))
    whole = build(config, dataset)
    whole.scaler.set_growth_interval(3)
    steps(whole, 2)
    path = save(whole, config, tmp_path)
    resumed = build(config, dataset)
    assert resumed.scaler.get_growth_interval() == 2000
    resumed.load_state(load_checkpoint(path).content)
    lines = steps(resumed, 2)
    assert [line["train/loss_scale"] for line in lines] == [2.0**17, 2.0**17]
    assert resumed.state()["scaler"]["_growth_tracker"] == 1


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_a_loss_that_stays_infinite_ends_the_training(how: str) -> None:
    dataset = with_bad_steps(2, 3)
    config = configuration(*TINY, *POINTS, f"training.non_finite={how}", "training.log_every=2")
    trainer = build(config, dataset)
    for _ in range(2):
        trainer.make_step()
    trainer.flush(str)
    for _ in range(2):
        trainer.make_step()
    with pytest.raises(UserError, match=r"the loss of step 2 is (inf|nan)") as caught:
        trainer.flush(lambda: "there is no checkpoint yet")
    assert ("2 steps in a row, none of which could be skipped" in str(caught.value)) == (how == "skip")


# What is done besides steps


def test_watching_a_training_does_not_change_it(tmp_path: Path) -> None:
    """Lines of the log, validations, previews and checkpoints after every step leave no trace in the weights."""
    common = [*TINY_2D, "training.steps=3", "model.dropout=0.3", "ema.decay=[0.9,0.99]", "ema.std=[0.1]"]
    every = [f"training.{name}_every=1" for name in ("log", "validate", "preview", "checkpoint")]
    never = ["training.log_every=100", "training.validate_every=0", "training.preview_every=0"]
    contents = []
    for name, words in (("watched", every), ("alone", never)):
        answer = command("sde.train", *common, *words, f"hydra.run.dir={name}", folder=tmp_path)
        assert answer.code == 0, answer.err
        contents.append(load_checkpoint(tmp_path / name / "checkpoints" / "step-00000003.pt").content)
    parts = ("model", "ema", "averages", "optimizer", "step", "skipped")
    assert not differing(*({part: content[part] for part in parts} for content in contents))


def test_reading_ahead_changes_nothing() -> None:
    """Workers give the same batches, also from the middle on and after jumping."""
    config, dataset = configuration(*TINY, *PICTURES, "conditional=true"), Examples((1, 8, 8), count=10, flip=True)
    trainers = [
        build(config | {"training": config["training"] | {"workers": workers, "dequantize": True}}, dataset)
        for workers in (0, 2)
    ]
    for step in (0, 1, 2, 7, 8, 3):
        (x, label), (y, other) = (trainer.batches(step) for trainer in trainers)
        assert torch.equal(x, y)
        assert label is not None
        assert other is not None
        assert torch.equal(label, other)


# The command line


def test_resume_auto_begins_goes_on_and_refuses_other_options(tmp_path: Path) -> None:
    words = [*TINY_2D, "training.precision=fp64", "training.log_every=5", "resume=auto", "hydra.run.dir=r"]
    begun = command("sde.train", *words, "training.steps=10", folder=tmp_path)
    assert begun.code == 0, begun.err
    assert "going on" not in begun.out
    on = command("sde.train", *words, folder=tmp_path)
    assert on.code == 0, on.err
    assert "going on from step 10" in on.out
    whole = command("sde.train", *words[:-2], "hydra.run.dir=whole", folder=tmp_path)
    assert whole.code == 0, whole.err
    ends = [load_checkpoint(tmp_path / run / "checkpoints" / "step-00000020.pt").content for run in ("r", "whole")]
    for part in ("model", "ema", "optimizer"):
        assert not differing(ends[0][part], ends[1][part])
    done = command("sde.train", *words, folder=tmp_path)
    assert (done.code, done.err) == (0, ""), done.err
    assert "has made 20 steps" in done.out
    other = command("sde.train", *words, "sde=ve", folder=tmp_path)
    assert other.code == 2
    assert other.sentence.startswith("error: resume=auto: ")
    assert "holds a run with sde._target_=sde.processes.VP and not sde.processes.VE" in other.sentence
    size = command("sde.train", *words, "model.width=8", "training.steps=30", folder=tmp_path)
    assert size.code == 2
    assert "model.width=16 and not 8: give the same options" in size.sentence
    nowhere = command("sde.train", *TINY_2D, "resume=auto", folder=tmp_path)
    assert nowhere.sentence == "error: resume=auto goes on in the folder that hydra.run.dir=FOLDER names: give it"


def test_the_largest_batch_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`batch_size=auto` on a CPU: by the estimate, what is found fits into the free memory and a fifth more does not.

    The run keeps the number, also when there is another amount of memory.
    """
    from sde.models.summary import summarize
    from sde.training.batch_size import MARGIN

    words = [*TINY_2D, "training.steps=1", "training.batch_size=auto", "training.accumulation=2"]
    silent = ["training.validate_every=0", "training.preview_every=0", "hydra.run.dir=r"]
    memory: list[float] = []
    monkeypatch.setattr("sde.training.batch_size.usable_memory", lambda: (None, int(memory[-1])))
    config, dataset = configuration(*words, "training.device=cpu"), Examples((2,), count=256)
    costs = summarize(build(config | {"training": config["training"] | {"batch_size": 2}}, dataset).denoiser.network)
    memory.append(costs.training_memory(50) / MARGIN + 1)
    found = build(config, dataset).options.batch_size // 2  # examples of one pass, of two
    assert costs.training_memory(found) <= MARGIN * memory[-1]
    assert costs.training_memory(-(-found * 6 // 5)) > MARGIN * memory[-1]

    begun = command("sde.train", *words, *silent, folder=tmp_path)
    assert begun.code == 0, begun.err
    file = tmp_path / "r" / "config.yaml"
    content = load_checkpoint(tmp_path / "r" / "checkpoints" / "step-00000001.pt").content
    assert content["config"]["training"]["batch_size"] == 2 * found
    assert f"batch_size: {2 * found}\n" in file.read_text()
    memory.append(3 * memory[-1])
    for steps_in_all, how in ((2, ["resume=r"]), (3, [*words, *silent, "resume=auto"])):
        on = command("sde.train", *how, f"training.steps={steps_in_all}", folder=tmp_path)
        assert on.code == 0, on.err
        assert f"batch_size: {2 * found}\n" in file.read_text()
    memory.append(1000.0)
    none = command("sde.train", *words, *silent[:-1], "hydra.run.dir=s", folder=tmp_path)
    assert none.code == 1
    assert none.sentence.startswith("error: training.batch_size=auto: not even one example fits")
