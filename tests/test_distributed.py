"""Several processes: the training that one process makes, from any number of them, and what happens when one dies.

Losses, weights, averages and moments are compared in float64. They differ in the order in which gradients are added up,
so by some rounding errors; the examples, their flips and their noise are the same bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sde.errors import UserError
from sde.models import MODELS
from sde.training.checkpoint import load_checkpoint
from sde.training.metrics import read_metrics
from tests.commands import TINY_2D, command
from tests.distributed_worker import Worlds
from tests.small_models import shape_of
from tests.small_trainings import TINY, build, configuration, differing, examples_for, flat, model_words
from tests.test_resume import with_bad_steps

Case = dict[str, Any]

POINTS = [
    *("model=mlp", "model.width=16", "model.depth=2"),
    *("training.precision=fp64", "training.batch_size=32", "training.steps=50", "optimizer.lr=1e-3"),
    *("ema.decay=[0.9,0.99]", "ema.std=[0.1]"),
]
PICTURES = [
    *("model=ddpmpp", "model.channels=8", "model.channel_multipliers=[1,2]", "model.blocks_per_level=1"),
    *("model.attention_resolutions=[4]", "training.precision=fp64", "conditional=true", "training.dequantize=true"),
    *("training.validation_examples=10", "training.preview_samples=5", "ema.std=[0.1]"),
]
# Adam divides gradients by their size plus this: gradients of 0 up to rounding would become noise of size 1
ADAM = "optimizer.eps=1e-3"


def case(name: str, *words: str, steps: int, **more: Any) -> Case:
    """A training for `Worlds.train`."""
    return {"name": name, "words": [*TINY, *words], "steps": steps, "disturb": True, **more}


def but(base: Case, *words: str, **more: Any) -> Case:
    """The same with further options."""
    return {**base, "words": [*base["words"], *words], **more}


def cut(base: Case, parts: int) -> Case:
    """The same with a batch in so many parts."""
    return but(base, f"training.accumulation={parts}")


POINTS_CASE = case("points", *POINTS, steps=50, examples={"shape": (2,), "count": 200})
PICTURES_CASE = case(
    "pictures",
    *PICTURES,
    *("training.batch_size=8", "model.dropout=0", ADAM),
    steps=6,
    examples={"shape": (1, 8, 8), "count": 20, "flip": True},
    watch=True,
)
DROPOUT_CASE = case(
    "dropout",
    *PICTURES,
    *("training.batch_size=12", "model.dropout=0.3", ADAM),
    steps=4,
    examples={"shape": (3, 8, 8), "count": 20, "flip": True},
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    found = Worlds(tmp_path_factory.mktemp("worlds"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def one_process(worlds: Worlds) -> Any:
    """What one process makes of a case; each is made once."""

    @cache
    def made(text: str) -> Any:
        single = json.loads(text)
        return worlds.train(1, [single])[single["name"]]

    return lambda single: made(json.dumps(single))


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference relative to the largest entry."""
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo().tiny)) if a.numel() else 0.0


def assert_same_training(found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float = 1e-12) -> None:
    """The same losses, weights, averages and moments to rounding, from the same examples."""
    assert len(found["lines"]) == len(expected["lines"]) > 0
    for line, other in zip(found["lines"], expected["lines"], strict=True):
        assert line == pytest.approx(other, rel=tolerance, nan_ok=True)
    for batch, other in zip(found["batches"], expected["batches"], strict=True):
        assert len(batch) == len(other) >= 2
        assert all(torch.equal(x, y) for x, y in zip(batch, other, strict=True))
    state, reference = flat(found["state"]), flat(expected["state"])
    assert state.keys() == reference.keys()
    tensors = [name for name, value in reference.items() if isinstance(value, torch.Tensor)]
    assert {name for name in tensors if off(state[name], reference[name]) > tolerance} == set()
    assert {name: state[name] for name in state.keys() - tensors} == {n: reference[n] for n in state.keys() - tensors}


# As one process


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_processes_makes_the_training_of_one(size: int, worlds: Worlds, one_process: Any) -> None:
    """Fifty steps of points with several averages, and pictures with flips and dequantization; 3 divides no batch."""
    cases = [
        but(base, f"training.parallel={how}", name=f"{base['name']}-{how}")
        for base, how in [
            (POINTS_CASE, "ddp"),
            (POINTS_CASE, "fsdp"),
            (PICTURES_CASE, "ddp"),
            *([(PICTURES_CASE, "fsdp")] if size == 2 else []),
        ]
    ]
    for name, found in worlds.train(size, cases).items():
        expected = one_process(POINTS_CASE if name.startswith("points") else PICTURES_CASE)
        assert_same_training(found, expected)
        if "preview" in expected:
            assert found["own"] < expected["own"] == 5
            assert found["validation"] == pytest.approx(expected["validation"], rel=1e-12)
            assert off(found["preview"], expected["preview"]) < 1e-12


@pytest.mark.parametrize(("size", "accumulation", "parts"), [(2, 1, 2), (2, 2, 4), (3, 1, 3), (4, 1, 4)])
def test_with_dropout_it_is_the_number_of_parts_that_counts(
    size: int, accumulation: int, parts: int, worlds: Worlds, one_process: Any
) -> None:
    spread = cut(DROPOUT_CASE, accumulation)
    ways = ("ddp", "fsdp") if size == 2 else ("ddp",)
    found = worlds.train(size, [but(spread, f"training.parallel={how}", name=how) for how in ways])
    expected = one_process(cut(DROPOUT_CASE, parts))
    for result in found.values():
        assert_same_training(result, expected)
    other = one_process(cut(DROPOUT_CASE, 1))  # other parts have other dropout
    assert found["ddp"]["lines"][-1]["train/loss"] != pytest.approx(other["lines"][-1]["train/loss"], rel=1e-6)


def test_two_processes_make_the_bits_of_one_with_as_many_parts(worlds: Worlds, one_process: Any) -> None:
    """Two numbers have one sum: in float32 as well, with dropout."""
    single = but(cut(DROPOUT_CASE, 2), "training.precision=fp32", "optimizer.eps=1e-8")
    expected = one_process(single)
    found = worlds.train(2, [cut(single, 1)])["dropout"]
    assert not differing(found["state"] | {"optimizer": 0}, expected["state"] | {"optimizer": 0})
    assert not differing(found["state"]["optimizer"]["state"], expected["state"]["optimizer"]["state"])
    assert [line["train/loss"] for line in found["lines"]] == pytest.approx(
        [line["train/loss"] for line in expected["lines"]], rel=2**-22
    )


def model_case(name: str) -> Case:
    """Three steps of the small model `name`, with classes where it takes them."""
    words = [*model_words(name), "training.precision=fp64", ADAM]
    if name == "edm2":  # it puts its weights back in every forward pass, so that each part changes them a little
        words.append("model.dropout=0")
    conditional = [*words, "conditional=true"]
    try:
        build(configuration(*TINY, *conditional), examples_for(name))
    except UserError:
        conditional = words
    return case(name, *conditional, steps=3, examples={"shape": shape_of(name), "count": 12})


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_can_be_spread_or_says_that_it_cannot(
    name: str, how: str, worlds: Worlds, one_process: Any, tmp_path: Path
) -> None:
    single = model_case(name)
    if (name, how) == ("edm2", "fsdp"):
        words = [word for word in single["words"] if word != "conditional=true"]
        answers = worlds.command(
            2, "sde.train", *words, "data=glyphs", "data.size=8", "training.parallel=fsdp", folder=tmp_path
        )
        assert [code for code, *_ in answers] == [2, 2]
        assert "".join(err for *_, err in answers).strip() == (
            "error: training.parallel=fsdp cannot spread EDM2, whose weight output_gain is one number: "
            "use training.parallel=ddp"
        )
        return
    expected = one_process(single if name == "edm2" else cut(single, 2))
    found = worlds.train(2, [but(single, f"training.parallel={how}")])[name]
    assert_same_training(found, expected)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("optimizer", ["fused", "plain", "sgd"])
def test_all_processes_skip_a_step_that_one_of_them_cannot_make(
    how: str, optimizer: str, worlds: Worlds, one_process: Any
) -> None:
    """The infinite example is in the last row of the batch: with the last process alone."""
    node = {"_target_": "torch.optim.SGD" if optimizer == "sgd" else "torch.optim.Adam", "lr": 1e-3}
    if optimizer != "sgd":
        node["fused"] = optimizer == "fused"
    bad = with_bad_steps(1, 3)
    numbers = (~torch.isfinite(bad.split("train").values[:, 0])).nonzero().flatten().tolist()
    single = case(
        f"skip-{optimizer}",
        *(word for word in POINTS if not word.startswith("optimizer.")),
        *("training.batch_size=4", "training.non_finite=skip", "training.steps=6", f"training.parallel={how}"),
        steps=6,
        optimizer=node,
        examples={"shape": (2,), "count": 24, "bad": numbers},
    )
    expected = one_process(single)
    assert expected["state"]["skipped"] == len(numbers) == 2
    assert_same_training(worlds.train(2, [single])[single["name"]], expected)


def test_half_precision_and_workers_in_two_processes(worlds: Worlds, one_process: Any) -> None:
    """The scale of the loss is the same in all processes, which read ahead."""
    numbers = (~torch.isfinite(with_bad_steps(1).split("train").values[:, 0])).nonzero().flatten().tolist()
    words = [word for word in POINTS if not word.startswith("training.precision")]
    single = case(
        "fp16",
        *words,
        *("training.batch_size=4", "training.precision=fp16", "training.non_finite=skip", "training.steps=5"),
        steps=5,
        examples={"shape": (2,), "count": 24, "bad": numbers},
    )
    expected = one_process(cut(single, 2))
    found = worlds.train(2, [but(single, "training.workers=1")])["fp16"]
    assert found["state"]["scaler"] == expected["state"]["scaler"]
    assert found["state"]["scaler"]["scale"] == 2.0**15
    assert not differing(found["state"]["model"], expected["state"]["model"])


# Going on


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "NAdam"])
def test_the_number_of_processes_changes_between_runs(
    optimizer: str, worlds: Worlds, one_process: Any, tmp_path: Path
) -> None:
    """One process, two (ddp), three (fsdp), two (fsdp), one again: as one that was never interrupted."""
    node = {"_target_": f"torch.optim.{optimizer}", "lr": 1e-3} | ({"momentum": 0.9} if optimizer == "SGD" else {})
    whole = but(POINTS_CASE, name="whole", optimizer=node, steps=20)
    expected = one_process(whole)
    lines: list[Any] = []
    path: str | None = None
    for leg, (size, how) in enumerate([(1, "ddp"), (2, "ddp"), (3, "fsdp"), (2, "fsdp"), (1, "fsdp")]):
        following = but(whole, f"training.parallel={how}", name=f"leg{leg}", steps=4 * (leg + 1))
        following["save"] = str(tmp_path / f"leg{leg}.pt")
        found = worlds.train(size, [following if path is None else {**following, "load": path}])[f"leg{leg}"]
        path, lines = following["save"], lines + found["lines"]
    assert_same_training({**found, "lines": lines, "batches": expected["batches"]}, expected)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_go_on_bit_for_bit(how: str, worlds: Worlds, tmp_path: Path) -> None:
    path = str(tmp_path / "middle.pt")
    base = but(DROPOUT_CASE, f"training.parallel={how}", "training.precision=fp32", "ema.decay=[0.9,0.5]")
    cases = [
        but(base, name="whole"),
        but(base, name="first", steps=2, save=path),
        but(base, name="second", load=path, disturb=False),
    ]
    found = worlds.train(2, cases)
    assert not differing(found["whole"]["state"], found["second"]["state"])
    assert found["whole"]["lines"] == found["first"]["lines"] + found["second"]["lines"]


# The command line


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


COMMAND = [
    *TINY_2D,
    *("training.precision=fp64", "training.device=cpu", "training.log_every=4", "training.checkpoint_every=4"),
    *("training.preview_every=10", "training.validate_every=10", "ema.std=[0.1]", "ema.snapshot_every=10"),
]


def single_run(folder: Path) -> Path:
    """What `COMMAND` gives in one process."""
    answer = command("sde.train", *COMMAND, "hydra.run.dir=single", folder=folder)
    assert answer.code == 0, answer.err
    return folder / "single"


def assert_same_run(run: Path, single: Path) -> None:
    """The same files, curve and last checkpoint as those of a run of one process."""
    assert files_of(run) == files_of(single)
    lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in (run, single))
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        compared = [
            key for key in other if key.startswith(("val/", "train/")) and "memory" not in key and "per_s" not in key
        ]
        assert {key: line[key] for key in compared} == pytest.approx({key: other[key] for key in compared}, rel=1e-9)
    contents = [load_checkpoint(folder / "checkpoints" / "step-00000020.pt").content for folder in (run, single)]
    for part in ("model", "ema", "averages", "optimizer"):
        state, reference = (flat(content[part]) for content in contents)
        assert state.keys() == reference.keys()
        assert {n for n, x in reference.items() if isinstance(x, torch.Tensor) and off(state[n], x) > 1e-12} == set()


def test_rank_0_alone_writes_and_prints(worlds: Worlds, tmp_path: Path) -> None:
    """Two processes, interrupted and gone on with by three (of parts each): the files of one process and no others."""
    single = single_run(tmp_path)
    several = tmp_path / "several"
    several.mkdir()
    words = [*COMMAND, "resume=auto", "hydra.run.dir=run"]
    for size, more in ((2, ["training.steps=8"]), (3, ["training.parallel=fsdp"])):
        answers = worlds.command(size, "sde.train", *words, *more, folder=several)
        assert [code for code, *_ in answers] == [0] * size, answers
        assert f"{size} processes" in answers[0][1]
        assert ("going on from step 8" in answers[0][1]) == (size == 3)
        assert all(out == err == "" for _, out, err in answers[1:])
    again = worlds.command(2, "sde.train", *words, folder=several)
    assert [code for code, *_ in again] == [0, 0]
    assert "has made 20 steps" in again[0][1]
    other = worlds.command(2, "sde.train", *words, "sde=ve", folder=several)
    assert [code for code, *_ in other] == [2, 2]
    assert "".join(err for *_, err in other).count("error: resume=auto: ") == 1
    assert {path.name for path in several.iterdir()} == {"run"}
    shorter = [f"run/{name}" for name in files_of(single)]
    assert set(shorter) <= set(files_of(several))
    extra = set(files_of(several)) - set(shorter)  # the first leg ended at step 8, with a preview and a snapshot
    assert all("00000008" in name for name in extra), extra


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["training.batch_size=1"], "error: training.batch_size=1 is less than one example for each of 2 processes"),
        (["training.precision=fp16", "training.parallel=fsdp"], "error: training.precision=fp16 scales a loss"),
        (["model.width=-1"], "error: model.width=-1"),
        (["model.depht=1"], "error: there is no option 'model.depht'"),
        (["optimizer.lr=1e300", "training.clip=0", "training.warmup=0"], "error: the loss of step"),
        (["--multirun", "sde=vp,ve"], "error: --multirun starts one run after the other"),
    ],
    ids=["batch", "fp16", "model", "option", "loss", "sweep"],
)
def test_a_mistake_is_said_once(words: Sequence[str], sentence: str, worlds: Worlds, tmp_path: Path) -> None:
    answers = worlds.command(2, "sde.train", *TINY_2D, *words, "hydra.run.dir=run", folder=tmp_path)
    assert [code for code, *_ in answers] == [2, 2]
    said = "".join(err for *_, err in answers)
    assert said.count("error: ") == said.count(sentence) == 1, said
    assert "Traceback" not in said


def test_commands_for_one_process_say_so_once(worlds: Worlds, tmp_path: Path) -> None:
    for name in ("compare", "summary"):
        answers = worlds.command(2, f"sde.{name}", folder=tmp_path)
        assert [code for code, *_ in answers] == [2, 2]
        assert "".join(err for *_, err in answers).strip() == (
            f"error: python -m sde.{name} works in one process: start it without torchrun"
        )
    assert not list(tmp_path.iterdir())


# A process that dies


DYING = """
import os, signal
from pathlib import Path
from sde.distributed import world
from sde.errors import UserError
from sde.training.loop import Trainer

make_step = Trainer.make_step

def dying(self):
    if world().rank == 1 and self.step == 10 and not Path("died").exists():
        Path("died").touch()
        how = os.environ["DIE"]
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("rank 1 has had enough") if how == "sentence" else KeyError("rank 1 is at fault")
    make_step(self)

Trainer.make_step = dying
"""


@pytest.mark.parametrize("how", ["kill", "sentence", "fault"])
def test_when_one_dies_the_others_end_with_a_sentence(how: str, worlds: Worlds, tmp_path: Path) -> None:
    """A fault has one traceback, in the process that it happened in; what was saved can be gone on with."""
    (tmp_path / "dying.py").write_text(DYING)
    words = [*COMMAND, "plugins=[dying]", "hydra.run.dir=run"]
    answers = worlds.command(2, "sde.train", *words, folder=tmp_path, environment={"DIE": how})
    (code, _, err), (other_code, _, other_err) = answers
    assert (code, other_code) == (1, {"kill": -9, "sentence": 2, "fault": 1}[how])
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: another process has ended in the middle of the work (")
    assert last.endswith("): its reason stands above or below")
    assert "Traceback" not in err
    assert other_err.count("rank 1") == {"kill": 0, "sentence": 1, "fault": 1}[how] or how == "fault"
    assert ("Traceback" in other_err) == (how == "fault")
    assert ("error: rank 1 has had enough" in other_err) == (how == "sentence")
    on = worlds.command(2, "sde.train", "resume=run", folder=tmp_path, environment={"DIE": how})
    assert [code for code, *_ in on] == [0, 0], on
    assert "going on from step 8" in on[0][1]
    assert_same_run(tmp_path / "run", single_run(tmp_path))


def torchrun(folder: Path, *words: str, restarts: int, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(f"--max-restarts={restarts}", "--monitor-interval=0.1", "-m", "sde.train", *words),
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_goes_on_by_itself(tmp_path: Path) -> None:
    """One process is killed at step 10: with --max-restarts=1 the run ends as one that nothing happened to."""
    (tmp_path / "dying.py").write_text(DYING)
    words = [*COMMAND, "plugins=[dying]", "hydra.run.dir=run"]
    done = torchrun(tmp_path, *words, restarts=1, DIE="kill")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    assert done.stdout.count("going on from step 8") == 1
    assert_same_run(tmp_path / "run", single_run(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "single", "died", "dying.py", "__pycache__"}


@pytest.mark.slow
def test_torchrun_ends_with_the_reason_of_the_one_that_failed(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    done = torchrun(tmp_path, *COMMAND, "plugins=[dying]", "hydra.run.dir=run", restarts=0, DIE="sentence")
    assert done.returncode != 0
    assert done.stderr.count("error: rank 1 has had enough") == 1
    assert f'File "{Path(__file__).resolve().parent.parent / "sde"}' not in done.stderr


def test_optimizers_that_cannot_work_on_parts_are_refused(worlds: Worlds, tmp_path: Path) -> None:
    single = but(POINTS_CASE, "training.parallel=fsdp", steps=1, optimizer={"_target_": "torch.optim.Adafactor"})
    with pytest.raises(AssertionError, match=r"Adafactor cannot work on training\.parallel=fsdp: take adam"):
        worlds.train(2, [single])
