"""Learning-rate schedules: exact values, what holds at the ends, and the optimizers whose learning rate they set."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sde.errors import UserError
from sde.training.schedules import SCHEDULES, Constant, CosineDecay, InverseSquareRoot, LinearDecay, Schedule
from tests.commands import TINY_2D, command
from tests.small_trainings import TINY, Examples, build, configuration

ROOT = math.sqrt(0.5)

# (schedule, steps, warm-up): exact factors by step
VALUES: dict[str, tuple[Schedule, int, int, dict[int, float]]] = {
    "constant": (Constant(), 10, 0, {0: 1.0, 9: 1.0, 10**6: 1.0}),
    "constant-warmup": (Constant(), 10, 4, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 9: 1.0}),
    "cosine": (CosineDecay(), 101, 0, {0: 1.0, 25: (1 + ROOT) / 2, 50: 0.5, 75: (1 - ROOT) / 2, 100: 0.0, 200: 0.0}),
    "cosine-warmup": (CosineDecay(end=0.2), 105, 4, {0: 0.25, 3: 1.0, 4: 1.0, 54: 0.6, 104: 0.2}),
    "cosine-steps": (CosineDecay(end=0.5, steps=11), 1000, 0, {0: 1.0, 5: 0.75, 10: 0.5, 11: 0.5, 999: 0.5}),
    "linear": (LinearDecay(), 11, 0, {0: 1.0, 1: 0.9, 5: 0.5, 10: 0.0, 11: 0.0}),
    "linear-start": (LinearDecay(start=5, end=0.5), 16, 2, {0: 0.5, 1: 1.0, 5: 1.0, 10: 0.75, 15: 0.5, 99: 0.5}),
    "linear-warmup": (LinearDecay(start=1, steps=15), 99, 4, {0: 0.25, 3: 1.0, 4: 1.0, 9: 0.5, 14: 0.0, 98: 0.0}),
    "inverse_sqrt": (InverseSquareRoot(start=100), 10, 0, {0: 1.0, 99: 1.0, 100: 1.0, 400: 0.5, 10_000: 0.1}),
    "inverse_sqrt-warmup": (InverseSquareRoot(start=4), 10, 32, {0: 1 / 32, 3: 1 / 8, 16: 17 / 64, 64: 0.25}),
}


@pytest.mark.parametrize("name", VALUES)
def test_exact_values(name: str) -> None:
    schedule, steps, warmup, values = VALUES[name]
    for step, factor in values.items():
        assert schedule(step, steps, warmup) == pytest.approx(factor, rel=1e-15, abs=1e-16), step


def test_every_schedule_has_exact_values() -> None:
    assert {type(schedule) for schedule, *_ in VALUES.values()} == {SCHEDULES.get(name) for name in SCHEDULES}


@pytest.mark.parametrize("warmup", [0, 1, 7, 40, 100])
@pytest.mark.parametrize(
    "schedule", [CosineDecay(0.1), LinearDecay(10, 0.1), LinearDecay(100), InverseSquareRoot(10)], ids=str
)
def test_factors_rise_once_and_fall_once(schedule: Schedule, warmup: int) -> None:
    """Whatever the warm-up, also if it takes longer than the training or the decay begins within it."""
    factors = [schedule(step, 50, warmup) for step in range(60)]
    assert all(0 <= factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


def test_the_last_step_has_the_last_factor() -> None:
    """And not the one that would come after it; a training of one step has no way to go."""
    for schedule in (CosineDecay(end=0.25), LinearDecay(end=0.25)):
        assert schedule(99, 100, 10) == pytest.approx(0.25, rel=1e-15)
        assert schedule(98, 100, 10) > 0.25
        assert schedule(0, 1, 0) == 1.0
        assert 0.25 <= schedule(5, 6, 6) <= 1.0  # warm-up up to the end


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: CosineDecay(end=1.5), r"schedule\.end=1\.5"),
        (lambda: CosineDecay(steps=0), r"schedule\.steps=0"),
        (lambda: LinearDecay(start=-1), r"schedule\.start=-1"),
        (lambda: LinearDecay(end=-0.1), r"schedule\.end=-0\.1"),
        (lambda: InverseSquareRoot(start=0), r"schedule\.start=0"),
    ],
    ids=["end", "steps", "start", "negative", "inverse"],
)
def test_values_out_of_range_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()


def test_each_group_of_parameters_has_its_own_learning_rate() -> None:
    """The factor multiplies what each group began with, whatever it was multiplied by before."""
    trainer = build(configuration(*TINY, "model=mlp", "model.width=8", "model.depth=1"), Examples((2,)))
    weights = list(trainer.denoiser.network.parameters())
    groups = [{"params": weights[:2], "lr": 1e-3}, {"params": weights[2:], "lr": 4e-3}]
    trainer.optimizer = torch.optim.SGD(groups)
    trainer.lr = [1e-3, 4e-3]
    trainer.schedule = CosineDecay()
    for step in range(5):
        trainer.make_step()
        rise = min(1.0, (step + 1) / 3)
        factor = rise * (1 + math.cos(math.pi * max(step - 3, 0) / 2)) / 2
        assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx(
            [1e-3 * factor, 4e-3 * factor]
        )


def test_schedules_on_the_command_line(tmp_path: Path) -> None:
    """The learning rate in metrics.jsonl; a longer training goes on along the longer curve."""
    words = [*TINY_2D, "schedule=linear", "training.steps=6", "training.log_every=1", "training.warmup=2"]
    silent = ["training.validate_every=0", "training.preview_every=0", "hydra.run.dir=r", "optimizer.lr=1e-3"]
    assert command("sde.train", *words, *silent, folder=tmp_path).code == 0
    on = command("sde.train", "resume=r", "training.steps=9", "schedule.end=0.5", folder=tmp_path)
    assert on.code == 0, on.err
    found = [
        float(number)
        for number in re.findall(r'"train/lr": ([\d.e-]+)', (tmp_path / "r" / "metrics.jsonl").read_text())
    ]
    expected = [0.5, 1, 1, 2 / 3, 1 / 3, 0, 1 - 0.5 * 4 / 6, 1 - 0.5 * 5 / 6, 0.5]
    assert found == pytest.approx([1e-3 * factor for factor in expected], rel=1e-12, abs=1e-18)
    misspelt = command("sde.train", "resume=r", "schedule.ende=0.5", "training.steps=20", folder=tmp_path)
    assert misspelt.code == 2
    assert misspelt.sentence.startswith("error: schedule.ende=0.5: ")
    assert misspelt.sentence.endswith("config.yaml has no option schedule.ende")


# Optimizers


def optimizer(**node: Any) -> torch.optim.Optimizer:
    """As a configuration with this section makes it."""
    config = configuration(*TINY[:-2], "model=mlp", "model.width=8", "model.depth=1", optimizer=node)
    return build(config, Examples((2,))).optimizer


def test_optimizers_of_pytorch_are_built_by_target() -> None:
    sgd = optimizer(_target_="torch.optim.SGD", lr=0.1, momentum=0.9, nesterov=True)
    assert type(sgd) is torch.optim.SGD
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.1, 0.9, True)
    adam = optimizer(_target_="torch.optim.AdamW", lr=1, betas=[0.5, 0.6])
    assert type(adam) is torch.optim.AdamW
    assert adam.defaults["betas"] == (0.5, 0.6)
    assert adam.defaults["lr"] == 1.0


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        ({"_target_": "torch.optim.Adamm"}, r"'torch\.optim\.Adamm' is not a registered optimizer.*did you mean"),
        ({"_target_": "os.system"}, r"'os\.system' is not a registered optimizer"),
        ({"_target_": "torch.optim.Adam", "rate": 1.0}, r"optimizer\.rate is not an option of Adam"),
        ({"_target_": "torch.optim.Adam", "lr": "fast"}, r"optimizer\.lr='fast' must be a number"),
        ({"_target_": "torch.optim.Adam", "lr": -1.0}, r"torch\.optim\.Adam: Invalid learning rate: -1\.0: change"),
        (
            {"_target_": "torch.optim.Adam", "betas": [0.5, 1.0]},
            r"torch\.optim\.Adam: Invalid beta parameter.*: change",
        ),
        (
            {"_target_": "torch.optim.Adam", "fused": True, "foreach": True},
            r"torch\.optim\.Adam: `fused` and `foreach`",
        ),
        ({"_target_": "torch.optim.LBFGS"}, r"torch\.optim\.LBFGS needs the loss again within a step"),
        ({"_target_": "torch.optim.SparseAdam"}, r"torch\.optim\.SparseAdam needs sparse gradients"),
    ],
    ids=["misspelt", "module", "option", "word", "negative", "beta", "both", "lbfgs", "sparse"],
)
def test_optimizers_that_cannot_be_are_refused_in_a_sentence(node: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        optimizer(**node)


def test_deterministic_training_asks_pytorch_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is not to be takes it back."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    words = [*TINY, "model=mlp", "model.width=8", "model.depth=1"]
    try:
        build(configuration(*words, "training.deterministic=true"), Examples((2,)))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        build(configuration(*words), Examples((2,)))
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
