"""Training: exact resumption, averaged weights, checkpoints that are whole or refused, and stopping cleanly."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sde.data import DATASETS, DataInfo, Dataset, Split
from sde.denoiser import Denoiser
from sde.errors import UserError
from sde.losses import DenoisingScoreMatching
from sde.models import MODELS
from sde.parameterizations import Eps
from sde.processes import VP
from sde.training.batches import Batches, dequantize
from sde.training.checkpoint import (
    DamagedCheckpoint,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    prune_checkpoints,
    save_checkpoint,
)
from sde.training.ema import EMA, Averages, EMAOptions
from sde.training.loop import Trainer
from sde.training.metrics import MetricsFile, read_metrics
from sde.training.options import TrainingOptions
from sde.training.validation import Validation
from tests.commands import TINY, TINY_2D, command

CONTENT = {
    "step": 3,
    "config": {"a": [1, 2.5, "b", None]},
    "data": {"name": "x", "shape": [2]},
    "model": {"w": torch.arange(1000.0)},
    "ema": {"w": torch.arange(1000.0)},
}


def trainer(**options: object) -> Trainer:
    values = {"steps": 20, "batch_size": 8, "log_every": 5, "device": "cpu", "warmup": 4, **options}
    settings = TrainingOptions(**values)  # type: ignore[arg-type]
    dataset = DATASETS.get("moons")(train_size=64, test_size=16)
    torch.manual_seed(settings.seed)
    network = MODELS.get("mlp")((2,), width=16, depth=1, dropout=0.3)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    batches = Batches(dataset, settings.batch_size, settings.seed, torch.device("cpu"), labeled=False)
    averages = Averages(network, EMAOptions(decay=0.9))
    return Trainer(Denoiser(network, VP(), Eps()), averages, DenoisingScoreMatching(), optimizer, settings, batches)


def weights(path: Path) -> dict[str, torch.Tensor]:
    content = load_checkpoint(path).content
    state = {f"optimizer.{i}.{k}": v for i, s in content["optimizer"]["state"].items() for k, v in s.items()}
    return {**{f"{part}.{k}": v for part in ("model", "ema") for k, v in content[part].items()}, **state}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.parametrize(
    "options",
    [
        [*TINY, "model.dropout=0.2", "data.characters=digits"],
        [*TINY, "training.accumulation=2", "sde=ve", "parameterization=edm", "parameterization.sigma_data=auto"],
        [*TINY, "conditional=true", "training.precision=bf16", "model=ddpmpp", "loss.time=importance"],
        [*TINY_2D, "training.steps=4", "training.log_every=2", "sde=subvp", "model.dropout=0.1", "optimizer=adamw"],
        [*TINY, "training.dequantize=true", "training.validate_every=2"],
    ],
    ids=["dropout", "accumulation-ve-edm", "classes-bf16", "points", "dequantized"],
)
def test_interrupted_training_goes_on_bit_for_bit(options: list[str], tmp_path: Path) -> None:
    whole = command("sde.train", *options, "hydra.run.dir=whole", folder=tmp_path)
    assert whole.code == 0, whole.err
    first = command("sde.train", *options, "training.steps=2", "hydra.run.dir=parts", folder=tmp_path)
    assert first.code == 0, first.err
    second = command("sde.train", "resume=parts", "training.steps=4", folder=tmp_path)
    assert second.code == 0, second.err
    assert "going on from step 2" in second.out
    last = checkpoint_path(tmp_path / "whole" / "checkpoints", 4)
    resumed = checkpoint_path(tmp_path / "parts" / "checkpoints", 4)
    assert_same_bits(weights(last), weights(resumed))
    lines = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    whole_lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    compared = [key for key in lines[1] if key.startswith("val/")] + ["train/loss"]
    assert [lines[1][key] for key in compared] == [whole_lines[1][key] for key in compared]


def test_every_step_is_a_function_of_seed_and_step() -> None:
    """Whatever else draws random numbers in between."""
    one, two = trainer(), trainer()
    for _ in range(5):
        one.make_step()
        torch.rand(7)
        two.make_step()
    assert_same_bits(dict(one.denoiser.network.state_dict()), dict(two.denoiser.network.state_dict()))
    other = trainer(seed=1)
    for _ in range(5):
        other.make_step()
    assert not torch.equal(other._losses[:5, 0], one._losses[:5, 0])


def test_accumulation_gives_the_same_gradient() -> None:
    """Parts of a batch add up to the batch: without dropout the steps agree to rounding."""
    runs = [trainer(accumulation=parts) for parts in (1, 2, 4)]
    for run in runs:
        run.denoiser.network.eval()
        run.make_step()
    reference = runs[0].flush(str)
    for run in runs[1:]:
        assert run.flush(str) == pytest.approx(reference, rel=1e-5)


class Levels(Dataset):
    """Pictures with every gray level once, every other one upside down; the network sees them in [-1, 2]."""

    info = DataInfo("levels", (1, 16, 16), low=-1.0, high=2.0)

    def __init__(self, examples: int) -> None:
        levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
        self.values = torch.stack([levels, levels.flip(1)] * (examples // 2))

    def split(self, name: str) -> Split:
        return Split(self.values)


def test_dequantized_pixels_are_uniform_on_their_buckets() -> None:
    """Kolmogorov's distance from the uniform law on 4 million draws, and the buckets of all gray levels."""
    info, examples = Levels.info, 16_384
    pixels = Levels(2).values[:1].expand(examples, -1, -1, -1)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = dequantize(info.encode(pixels, torch.float64), info, noise)
    u = (spread - info.encode(pixels, torch.float64)) * (255 / (info.high - info.low)) + 0.5
    ordered, n = u.flatten().sort().values, u.numel()
    margin = 2.0**-13
    assert ordered[0] == pytest.approx(margin, abs=20 / n)
    assert ordered[-1] == pytest.approx(1 - margin, abs=20 / n)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((ordered - steps[:-1]).abs().max(), (ordered - steps[1:]).abs().max()).item()
    # exceeded with probability 2 exp(-2 n d^2) = 1e-5, besides the ends that are left out
    assert distance < math.sqrt(0.5 * math.log(2e5) / n) + margin
    one, other = u[:, 0, 0, 0], u[:, 0, 0, 1]
    correlation = torch.corrcoef(torch.stack([one, other, u[:, 0, 1, 0]])).tril(-1).abs().max().item()
    assert correlation < 4.5 / math.sqrt(examples)  # pixels of a picture are independent


@pytest.mark.parametrize("low", [-1.0, 0.0, -0.37])
def test_dequantized_pixels_come_back_in_float32(low: float) -> None:
    """All gray levels, at both ends of a bucket, where rounding would first take one into the next."""
    info = DataInfo("levels", (1, 16, 16), low=low, high=1.0)
    pixels = Levels(2).values[:1].expand(8192, -1, -1, -1)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
    x = dequantize(info.encode(pixels), info, noise)
    u = (x - info.encode(pixels)) * (255 / (info.high - info.low)) + 0.5
    assert u.min() < 1.4e-4  # a part of 2^-13 = 1.2e-4 is left out
    assert u.max() > 1 - 1.4e-4
    assert torch.equal(info.decode(x), pixels)


def test_batches_are_dequantized_by_seed_and_step_alone() -> None:
    dataset, cpu = Levels(64), torch.device("cpu")
    plain, spread, again = (Batches(dataset, 8, 5, cpu, False, on) for on in (False, True, True))
    again(0)
    torch.rand(3)
    x, _ = spread(3)
    assert torch.equal(x, again(3)[0])
    assert torch.equal(dataset.info.decode(x), dataset.info.decode(plain(3)[0]))
    noise = {step: spread(step)[0] - plain(step)[0] for step in (3, 4)}
    assert not torch.allclose(noise[3], noise[4], atol=1e-3)
    other = Batches(dataset, 8, 6, cpu, False, True)(3)[0]
    assert not torch.allclose(noise[3], other - dataset.info.encode(dataset.info.decode(other)), atol=1e-3)


def test_validation_always_adds_the_same_noise() -> None:
    """The examples of every call are the same, and within the buckets of the pixels."""
    seen: list[torch.Tensor] = []

    class Recording(DenoisingScoreMatching):
        def at(self, denoiser, x0, z, t, label=None):  # type: ignore[no-untyped-def]
            seen.append(x0)
            return super().at(denoiser, x0, z, t, label)

    dataset = Levels(24)
    denoiser = Denoiser(MODELS.get("ddpmpp")((1, 16, 16), channels=4, channel_multipliers=[1]), VP(), Eps())
    results = {}
    for on in (False, True):
        options = TrainingOptions(batch_size=8, validation_examples=24, dequantize=on, device="cpu")
        validation = Validation(dataset, options, torch.device("cpu"), labeled=False)
        results[on] = [validation(denoiser, Recording()) for _ in range(2)]
        assert results[on][0] == results[on][1]
    plain, spread = (torch.cat(seen[i : i + 6 : 2]) for i in (0, 12))
    assert len(seen) == 24
    assert results[True][0] != results[False][0]
    assert torch.equal(torch.cat(seen[12:18]), torch.cat(seen[18:24]))
    assert torch.equal(torch.cat(seen[12:18:2]), torch.cat(seen[13:18:2]))  # at both kinds of times
    assert not torch.equal(plain, spread)
    assert torch.equal(dataset.info.decode(spread), dataset.info.decode(plain))


def test_vectors_are_not_dequantized(tmp_path: Path) -> None:
    answer = command("sde.train", *TINY_2D, "training.dequantize=true", "hydra.run.dir=r", folder=tmp_path)
    assert answer.code == 2
    assert answer.sentence == (
        "error: training.dequantize=true: data=moons has vectors and no gray levels: leave it out"
    )
    with pytest.raises(UserError, match=r"training\.dequantize='yes'"):
        TrainingOptions(dequantize="yes")  # type: ignore[arg-type]


def test_warm_up_raises_the_learning_rate_linearly() -> None:
    run = trainer()
    rates = []
    for _ in range(6):
        run.make_step()
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_gradients_are_clipped_to_the_norm_asked_for() -> None:
    run = trainer(clip=1e-3)
    seen = []
    run.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None]).norm())
    )
    run.make_step()
    assert seen[0].item() == pytest.approx(1e-3, rel=1e-3)
    assert run.flush(str)["train/gradient_norm"] > 1e-2  # what is reported is the norm before clipping


def test_a_loss_scale_that_collapses_ends_the_training() -> None:
    """In fp16 single overflows are a matter of the scale; gradients that are never finite are not, at any policy."""
    for policy in ("stop", "skip"):
        run = trainer(precision="fp16", non_finite=policy, log_every=15)
        before = [p.clone() for p in run.parameters]
        run.parameters[0].register_hook(lambda g: g * math.nan)
        for _ in range(15):
            run.make_step()
        assert run.flush(str)["train/skipped"] == 15  # the scale is 2^16 at first and halves: 2 after 15 steps
        for _ in range(15):
            run.make_step()
        with pytest.raises(UserError, match="its gradient's norm nan"):
            run.flush(str)
        assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))


def test_errors_by_noise_level_do_not_depend_on_how_many_steps_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kept in (64, 3):
        monkeypatch.setattr("sde.training.loop._KEPT", kept)
        run = trainer(log_every=20)
        for _ in range(20):
            run.make_step()
        found.append(run.flush(str))
    levels = [name for name in found[0] if "log_snr" in name]
    assert len(levels) > 5
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_ema_is_the_weighted_sum_of_all_weights() -> None:
    """average_n = sum_k w_k (1 - d_k) prod_{j > k} d_j + w_0 prod_j d_j, with d_j of the docstring."""
    network = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    history = [network.weight.item()]
    ema = EMA(network, decay=0.5, warmup=True)
    for step in range(12):
        with torch.no_grad():
            network.weight.fill_(float(step) ** 2)
        history.append(network.weight.item())
        ema.update(step)
    decays = [min(0.5, (1 + n) / (10 + n)) for n in range(12)]
    expected = history[0]
    for weight, decay in zip(history[1:], decays, strict=True):
        expected = decay * expected + (1 - decay) * weight
    assert ema.network.weight.item() == pytest.approx(expected, rel=1e-14)
    assert not ema.network.weight.requires_grad
    with pytest.raises(UserError, match=r"ema.decay=1.0"):
        EMA(network, decay=1.0)


def test_a_loss_that_is_not_finite_stops_with_step_noise_levels_and_checkpoint(tmp_path: Path) -> None:
    done = command(
        "sde.train",
        *TINY_2D,
        "optimizer.lr=1e30",
        "training.clip=0",
        "training.warmup=0",
        "training.checkpoint_every=10",
        "hydra.run.dir=r",
        folder=tmp_path,
    )
    assert done.code == 2
    assert "the loss of step" in done.sentence
    assert "noise levels from" in done.sentence
    assert "there is no checkpoint yet" in done.sentence
    assert "Traceback" not in done.err
    assert not list_checkpoints(tmp_path / "r" / "checkpoints")


def test_checkpoints_hold_what_was_saved(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, CONTENT)
    assert path.name == "step-00000003.pt"
    loaded = load_checkpoint(path)
    assert loaded.step == 3
    assert loaded.content["config"] == CONTENT["config"]
    assert torch.equal(loaded.content["model"]["w"], torch.arange(1000.0))
    assert list(tmp_path.iterdir()) == [path]


def test_a_flipped_bit_or_a_cut_is_found_and_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every flipped bit either is found, or lies where it changes nothing that is loaded."""
    good = save_checkpoint(tmp_path, {**CONTENT, "step": 2})
    path = save_checkpoint(tmp_path, CONTENT)
    original = path.read_bytes()
    draw, found = random.Random(0), 0
    for _ in range(200):
        changed = bytearray(original)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            content = load_checkpoint(path).content
        except UserError:
            found += 1
        else:
            assert torch.equal(content["model"]["w"], torch.arange(1000.0))
            assert content["config"] == CONTENT["config"]
    assert found > 150
    for length in (0, 1, 100, len(original) // 2, len(original) - 1):
        path.write_bytes(original[:length])
        with pytest.raises(DamagedCheckpoint, match="is damaged"):
            load_checkpoint(path)
    assert load_newest(tmp_path).path == good
    assert "falling back to the one before" in capsys.readouterr().err
    good.write_bytes(b"")
    with pytest.raises(UserError, match="all 2 checkpoints"):
        load_newest(tmp_path)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-00000001.pt"
    torch.save({**CONTENT, "version": 1, "model": Malicious()}, path)
    with pytest.raises(UserError):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    for step in (1, 5, 20, 100):
        save_checkpoint(tmp_path, {**CONTENT, "step": step})
    prune_checkpoints(tmp_path, 0)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 5, 20, 100]
    prune_checkpoints(tmp_path, 2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 100]


def test_a_failed_write_leaves_the_good_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, CONTENT)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as raised:
        save_checkpoint(tmp_path, {**CONTENT, "model": {}})
    assert raised.value.filename == str(path)  # which the system does not say
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_go_on_without_duplicates_or_holes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = MetricsFile(path)
    for step in (10, 20, 30):
        record.log(step, {"loss": float(step), "bad": float("nan")})
    record.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # a line that was cut off
    record = MetricsFile(path, step=20)
    record.log(30, {"loss": 31.0})
    record.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 10.0), (20, 20.0), (30, 31.0)]
    assert lines[0]["bad"] is None
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_saves_and_leaves_and_resume_goes_on(number: int, code: int, tmp_path: Path) -> None:
    arguments = [*TINY_2D, "training.steps=1000000", "training.log_every=20", "training.validate_every=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sde.train", *arguments, "training.preview_every=0", "hydra.run.dir=r"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    seen = ""
    while "training" not in seen:  # the bar appears when the loop, which listens for signals, has begun
        seen += process.stderr.read(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "go on with: python -m sde.train resume=" in err
    assert "Traceback" not in err
    step, _ = list_checkpoints(tmp_path / "r" / "checkpoints")[-1]
    steps = [line["step"] for line in read_metrics(tmp_path / "r" / "metrics.jsonl")]
    assert steps[-1:] == ([step] if step else [])  # the signal may come before the first step
    on = command("sde.train", "resume=r", f"training.steps={step + 20}", folder=tmp_path)
    assert on.code == 0, on.err
    assert list_checkpoints(tmp_path / "r" / "checkpoints")[-1][0] == step + 20
