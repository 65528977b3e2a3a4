"""Training a dequantizer: its objective, what it gains on a density that is known, and the command line."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from sde.config import conf_dir
from sde.data import DataInfo, Dataset, Split
from sde.denoiser import AbstractDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from sde.density.dequantizer import Dequantizer, DequantizerOptions, uniform
from sde.errors import UserError
from sde.processes import SDE, VP, SubVP
from sde.training.batches import Batches
from sde.training.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from sde.training.dequantization import (
    DequantizationOptions,
    DequantizerTrainer,
    GainValidation,
    Objective,
    load_dequantizer,
)
from sde.training.ema import EMA
from tests.commands import command
from tests.problems import F64, generator, normal, sdes

WIDTH = 2 / 255
PAIR = DataInfo("pairs", (1, 1, 2))
SMALL = ["flow.channels=4", "flow.blocks=1", "flow.layers=2", "flow.bins=4"]
SHORT = [*SMALL, "training.steps=4", "training.batch_size=4", "training.log_every=2", "training.validation_examples=6"]


class Pairs(Dataset):
    """Pictures of two pixels, given."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    @property
    def info(self) -> DataInfo:
        return PAIR

    def split(self, name: str) -> Split:
        return Split(self.pixels)


def trainer_of(denoiser: AbstractDenoiser, dataset: Dataset, **options: Any) -> DequantizerTrainer:
    """A trainer of a small dequantizer on the CPU."""
    settings = DequantizationOptions(**options)
    torch.manual_seed(settings.seed)
    flow = Dequantizer(dataset.info.shape, DequantizerOptions(channels=8, blocks=1, layers=3, bins=8))
    return DequantizerTrainer(
        flow=flow,
        ema=EMA(flow, settings.ema_decay),
        objective=Objective(denoiser, dataset.info),
        optimizer=torch.optim.Adam(flow.parameters(), lr=1e-2),
        options=settings,
        batches=Batches(dataset, settings.batch_size, settings.seed, torch.device("cpu"), False),
    )


# The objective


@pytest.mark.parametrize("sde", sdes())
@pytest.mark.parametrize("n", [8, 512])
def test_levels_are_drawn_with_the_weight_of_their_density(sde: SDE, n: int) -> None:
    """The mean of weight times a function of the level is its integral over the log-SNR."""
    objective = Objective(GaussianDenoiser(sde, torch.zeros(2), torch.tensor(1.0)), PAIR)
    levels = [objective.draw(n, generator(k), "cpu") for k in range(8192 // n)]
    t, weight = (torch.cat([getattr(part, name) for part in levels]) for name in ("t", "weight"))
    assert t.dtype == weight.dtype == F64
    assert sde.t_min <= float(t.min())
    assert float(t.max()) <= sde.T
    low, high = float(sde.log_snr(sde.T)), float(sde.log_snr(sde.t_min))
    place = (sde.log_snr(t) - low) / (high - low)
    for values, exact in ((torch.ones_like(place), 1.0), (place, 1 / 2), (torch.cos(6 * place), math.sin(6) / 6)):
        products = weight * values / (high - low)
        # strata make it less than independent draws would have
        assert abs(float(products.mean()) - exact) < 4 * float(products.std()) / math.sqrt(len(products)) + 1e-6


@pytest.mark.parametrize(("sde", "finest"), [(VP(), 0.0), (SubVP(), 1 / 16)])
def test_half_of_the_levels_are_about_a_bucket_wide(sde: SDE, finest: float) -> None:
    """Between a sixteenth of a bucket and four, as far as there are such levels, beside their share of the others."""
    objective = Objective(GaussianDenoiser(sde, torch.zeros(2), torch.tensor(1.0)), PAIR)
    t, _ = objective.draw(4000, generator(), "cpu")
    low, high = float(sde.log_snr(sde.T)), float(sde.log_snr(sde.t_min))
    upper = min(high, -2 * math.log(finest * WIDTH)) if finest else high
    share = (upper + 2 * math.log(4 * WIDTH)) / (high - low)  # of the axis
    level = sde.noise_level(t)
    fine = float(((level >= finest * WIDTH) & (level < 4 * WIDTH)).double().mean())
    assert fine == pytest.approx(0.5 + 0.5 * share, abs=1e-3)


def test_the_bound_is_that_of_a_gaussian() -> None:
    """For an exact denoiser it is exact: differences of B are those of -log N, averaged over noise of level t_min.

    With data N(m, v) the part of B in x is that of the prior and sum (x - m)^2 / (2 v) times the difference of
    SNR v / (1 + SNR v) between t_min and T.
    """
    sde, variance = VP(), 0.03
    m = torch.tensor([[[0.1, -0.2]]], dtype=F64)
    objective = Objective(GaussianDenoiser(sde, m, torch.tensor(variance, dtype=F64)), PAIR)
    a, b = (normal(1, 1, 1, 2, seed=k) * 0.3 for k in (1, 2))
    n = 20_000
    levels = objective.draw(n, generator(), "cpu")
    z = normal(n, 1, 1, 2, seed=3)

    def mean(x: Tensor) -> float:
        # the error is linear in z: what is odd in it cancels
        both = [objective(x.expand(n, 1, 1, 2), noise, levels) for noise in (z, -z)]
        return float(torch.stack(both).mean())

    snr = torch.exp(torch.stack([sde.log_snr(sde.t_min), sde.log_snr(sde.T)])) * variance
    shrink = float((snr / (1 + snr)).diff().neg())

    def exact(x: Tensor) -> float:
        prior = float(sde.alpha(sde.T)) ** 2 * float(x.square().sum()) / 2
        return prior + shrink * float((x - m).square().sum()) / (2 * variance)

    # strata: the error of the rule is of order n^-3/2 here
    assert mean(a) - mean(b) == pytest.approx(exact(a) - exact(b), rel=1e-3)


def test_gradients_reach_the_flow_through_a_frozen_model() -> None:
    denoiser = GaussianDenoiser(VP(), torch.zeros(1, 1, 2), torch.tensor(1e-5))
    trainer = trainer_of(denoiser, Pairs(torch.full((4, 1, 1, 2), 128, dtype=torch.uint8)), batch_size=4)
    before = [p.clone() for p in trainer.flow.parameters()]
    for _ in range(3):
        trainer.make_step()
    assert all(not torch.equal(p, q) for p, q in zip(trainer.flow.parameters(), before, strict=True))
    assert trainer.flush()["train/gradient_norm"] > 0


# A density that is known


def square(n: int) -> tuple[Tensor, Tensor]:
    """Points (n^2, 1, 1, 2) and weights (n^2,) of the Gauss-Legendre rule on the unit square, each side in 4 parts."""
    nodes, weights = np.polynomial.legendre.leggauss(n // 4)
    side = torch.cat([torch.from_numpy((nodes + 1) / 8 + k / 4) for k in range(4)])
    weight = torch.from_numpy(weights / 8).repeat(4)
    return torch.cartesian_prod(side, side).reshape(-1, 1, 1, 2), torch.outer(weight, weight).flatten()


def known_model(dtype: torch.dtype) -> GaussianMixtureDenoiser:
    """Two narrow, oblique Gaussians, of a quarter of a bucket, off the centers of buckets."""
    means = torch.tensor([[40.2, 200.8], [180.7, 90.1]], dtype=dtype) * WIDTH - 1
    spread = (0.25 * WIDTH) ** 2
    covariances = spread * torch.tensor([[[1.0, 0.6], [0.6, 1.0]], [[1.0, -0.4], [-0.4, 0.7]]], dtype=dtype)
    weights = torch.tensor([0.6, 0.4], dtype=dtype)
    return GaussianMixtureDenoiser(VP(), weights, means.reshape(2, 1, 1, 2), covariances)


def test_a_trained_dequantizer_makes_the_bound_tighter_and_keeps_it_a_bound() -> None:
    """All integrals over a bucket are computed on a grid: the bounds of q and of uniform u, and log P itself."""
    exact = known_model(F64)
    drawn = PAIR.decode(exact.sample(1024, generator()).float())
    trainer = trainer_of(known_model(torch.float32), Pairs(drawn), batch_size=128, ema_decay=0.9, warmup=10)
    for _ in range(150):
        trainer.make_step()
    flow = trainer.ema.network.double()
    assert isinstance(flow, Dequantizer)
    u, weight = square(64)
    gained, gaps = [], []
    pictures, counts = drawn.unique(dim=0, return_counts=True)
    for picture in pictures[counts > 60]:
        x = PAIR.encode(picture[None], F64).expand(len(u), 1, 1, 2)
        log_p = exact.log_prob(x + WIDTH * (u - 0.5), VP().t_min) + 2 * math.log(WIDTH)
        log_q = flow.log_prob(u, x).detach()
        q = weight * log_q.exp()
        assert float(q.sum()) == pytest.approx(1, abs=5e-3)  # the rule, across the knots of steep splines
        log_probability = float(torch.logsumexp(log_p + weight.log(), 0))
        bound, plain = float((q * (log_p - log_q)).sum() / q.sum()), float((weight * log_p).sum())
        # Jensen's inequality for the sums themselves, whatever the error of the rule
        assert bound <= log_probability - math.log(float(q.sum())) + 1e-9
        assert plain <= log_probability
        gained.append(bound - plain)
        gaps.append(log_probability - plain)
    assert len(gained) == 5
    assert all(gain > 0.8 * gap for gain, gap in zip(gained, gaps, strict=True))
    assert sum(gaps) / len(gaps) > 0.5  # nats: there was something to gain


def test_what_is_measured_is_what_is_gained() -> None:
    """The validation's estimate against the exact bounds, for the blurred density that the objective sees."""
    variance, low = (0.3 * WIDTH) ** 2, VP().t_min
    denoiser = GaussianDenoiser(VP(), torch.full((1, 1, 2), 100.3 * WIDTH - 1), torch.tensor(variance))
    pixels = torch.full((4096, 1, 1, 2), 100, dtype=torch.uint8)
    options = {"batch_size": 512, "ema_decay": 0.9, "warmup": 10, "validation_examples": 4096}
    trainer = trainer_of(denoiser, Pairs(pixels), **options)
    for _ in range(60):
        trainer.make_step()
    measured = GainValidation(Pairs(pixels), trainer, False)()
    flow = trainer.ema.network.double()
    assert isinstance(flow, Dequantizer)
    u, weight = square(48)
    x = PAIR.encode(pixels[:1], F64).expand(len(u), 1, 1, 2)
    log_q = flow.log_prob(u, x).detach()
    # -log p_{t_min} averaged over noise of level t_min is a quadratic with the same curvature
    alpha2, sigma2 = float(VP().alpha(low)) ** 2, float(VP().sigma(low)) ** 2
    log_p = -alpha2 * (WIDTH * (u - 0.5) - 0.3 * WIDTH).square().flatten(1).sum(1) / (2 * (alpha2 * variance + sigma2))
    gain = float((weight * (log_q.exp() * (log_p - log_q) - log_p)).sum()) / (2 * math.log(2))
    assert gain > 0.2
    assert abs(measured["val/bits_gained"] - gain) < 4 * measured["val/bits_gained_error"] + 1e-3
    assert measured["val/bits_gained_error"] < 0.1 * gain
    bits = float((weight * log_q.exp() * log_q).sum()) / (2 * math.log(2))
    assert measured["val/bits_of_q"] == pytest.approx(bits, abs=0.02)


def test_nothing_is_gained_by_a_new_dequantizer() -> None:
    denoiser = GaussianDenoiser(VP(), torch.zeros(1, 1, 2), torch.tensor(1e-5))
    pixels = torch.full((64, 1, 1, 2), 127, dtype=torch.uint8)
    trainer = trainer_of(denoiser, Pairs(pixels), batch_size=16, validation_examples=64)
    measured = GainValidation(Pairs(pixels), trainer, False)()
    assert abs(measured["val/bits_gained"]) < 1e-2
    noise, x = normal(8, 1, 1, 2).float(), PAIR.encode(pixels[:8])
    u, _ = trainer.flow(x, noise)
    torch.testing.assert_close(u.detach(), uniform(noise), rtol=0, atol=1e-6)


def test_a_loss_that_is_not_finite_is_named() -> None:
    denoiser = GaussianDenoiser(VP(), torch.full((1, 1, 2), math.nan), torch.tensor(1e-5))
    trainer = trainer_of(denoiser, Pairs(torch.zeros(4, 1, 1, 2, dtype=torch.uint8)), batch_size=4)
    trainer.make_step()
    with pytest.raises(UserError, match="the loss of step 0 is nan"):
        trainer.flush()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "training.steps=0 is out of range"),
        ({"ema_decay": 1.0}, "training.ema_decay=1.0 is out of range"),
        ({"clip": -1.0}, "training.clip=-1.0 is out of range"),
        ({"compare_every": 0}, "training.compare_every=0 is out of range"),
    ],
)
def test_options_are_checked(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DequantizationOptions(**options)


# The command line


def test_the_file_and_the_options_have_the_same_defaults() -> None:
    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "dequantize.yaml"))
    assert isinstance(node, dict)
    assert node["flow"] == asdict(DequantizerOptions())
    assert node["training"] == asdict(DequantizationOptions())


@pytest.fixture(scope="module")
def trained(glyph_run: Path, point_run: Path) -> Path:
    """A folder with a run of pictures, runs/g, told their classes, and one of points, runs/p."""
    shutil.copytree(point_run, glyph_run, dirs_exist_ok=True, symlinks=True)
    return glyph_run


@pytest.fixture
def fresh(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder, for one test."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of the dequantizer of runs/g."""
    return [json.loads(line) for line in (folder / "runs/g/dequantizer/metrics.jsonl").read_text().splitlines()]


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dictionaries, lists and tensors are equal to the bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_from_a_run_to_a_dequantizer(fresh: Path) -> None:
    done = command("sde.dequantize", "run=runs/g", *SHORT, "training.validate_every=2", folder=fresh)
    assert done.code == 0, done.err
    assert "bits/dim over uniform dequantization" in done.out
    folder = fresh / "runs/g/dequantizer"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "step-00000004.pt"]
    assert not list(fresh.glob("[!r]*")), "nothing is written beside the runs"
    first, last = lines_of(fresh)
    assert (first["step"], last["step"]) == (2, 4)
    names = {"train/loss", "train/gradient_norm", "train/bits_of_q", "train/pictures_per_second", "train/lr"}
    assert names | {"val/bits_gained", "val/bits_gained_error", "val/bits_of_q"} <= last.keys()
    assert "train/bits_gained" in first
    content = load_checkpoint(checkpoint_path(folder, 4)).content
    assert content["config"]["flow"] == {"channels": 4, "blocks": 1, "layers": 2, "bins": 4, "frequencies": 8}
    assert content["config"]["score_model"] == {"checkpoint": "step-00000004.pt", "step": 4, "ema": True}
    flow = load_dequantizer(fresh / "runs/g")
    assert not flow.training
    assert not any(p.requires_grad for p in flow.parameters())
    assert same(dict(flow.state_dict()), content["ema"])
    u, log_q = flow(torch.zeros(2, 1, 8, 8), torch.randn(2, 1, 8, 8))
    assert u.shape == (2, 1, 8, 8)
    assert log_q.shape == (2,)


def test_the_newest_run_is_taken(fresh: Path) -> None:
    path = fresh / "runs/g/checkpoints/step-00000004.pt"
    os.utime(path, (2e9, 2e9))
    done = command("sde.dequantize", *SHORT, folder=fresh)
    assert done.code == 0, done.err
    assert list_checkpoints(fresh / "runs/g/dequantizer")


def test_going_on_is_exact(fresh: Path) -> None:
    """Six steps at once, and two, two and two: the same weights, averages and optimizer to the bit."""
    shutil.copytree(fresh / "runs/g", fresh / "runs/h")
    whole = [*SHORT, "training.validate_every=0"]
    assert command("sde.dequantize", "run=runs/h", *whole, "training.steps=6", folder=fresh).code == 0
    assert command("sde.dequantize", "run=runs/g", *whole, "training.steps=2", folder=fresh).code == 0
    # what is not said again stays as it was
    assert command("sde.dequantize", "run=runs/g", "training.steps=4", folder=fresh).code == 0
    done = command("sde.dequantize", "run=runs/g", "training.steps=6", "training.keep=1", folder=fresh)
    assert done.code == 0, done.err
    assert "was trained for" not in done.err
    assert "going on from step 4" in done.out
    parts, once = (load_checkpoint(checkpoint_path(fresh / f"runs/{k}/dequantizer", 6)).content for k in "gh")
    for name in ("model", "ema", "optimizer"):
        assert same(parts[name], once[name]), name
    assert [line["step"] for line in lines_of(fresh)] == [2, 4, 6]
    assert len(list_checkpoints(fresh / "runs/g/dequantizer")) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_asked_to_stop_it_saves_and_leaves(
    number: int, code: int, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DequantizerTrainer.make_step

    def make_step(self: DequantizerTrainer) -> None:
        original(self)
        if self.step == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(DequantizerTrainer, "make_step", make_step)
    done = command("sde.dequantize", "run=runs/g", *SHORT, "training.steps=9", folder=fresh)
    assert done.code == code
    assert "stopped at step 3 and saved" in done.err
    assert "go on with: python -m sde.dequantize run=runs/g" in done.err
    assert [step for step, _ in list_checkpoints(fresh / "runs/g/dequantizer")] == [3]
    done = command("sde.dequantize", "run=runs/g", "training.steps=5", folder=fresh)
    assert done.code == 0, done.err
    assert [line["step"] for line in lines_of(fresh)] == [2, 3, 4, 5]


def test_a_damaged_dequantizer(fresh: Path) -> None:
    done = command("sde.dequantize", "run=runs/g", *SHORT, "training.checkpoint_every=2", folder=fresh)
    assert done.code == 0, done.err
    folder = fresh / "runs/g/dequantizer"
    newest = checkpoint_path(folder, 4)
    newest.write_bytes(newest.read_bytes()[:-100])
    done = command("sde.dequantize", "run=runs/g", "training.steps=5", folder=fresh)
    assert done.code == 0, done.err
    assert "step-00000004.pt is damaged" in done.err
    assert "going on from step 2" in done.out
    assert [step for step, _ in list_checkpoints(folder)] == [4, 5]  # 4 was made again
    assert not newest.with_suffix(".damaged").exists()  # set aside, and gone with the next one
    for _, path in list_checkpoints(folder):
        path.write_bytes(b"nothing")
    done = command("sde.dequantize", "run=runs/g", "training.steps=6", folder=fresh)
    assert done.code == 2
    assert done.sentence.startswith("error: no dequantizer in runs/g/dequantizer can be read")
    with pytest.raises(UserError, match="can be read"):
        load_dequantizer(fresh / "runs/g")


def test_a_dequantizer_of_other_pictures(fresh: Path) -> None:
    assert command("sde.dequantize", "run=runs/g", *SHORT, folder=fresh).code == 0
    path = checkpoint_path(fresh / "runs/g/dequantizer", 4)
    info = DataInfo.from_dict(load_checkpoint(path).content["data"])
    assert load_dequantizer(fresh / "runs/g", info=info).shape == (1, 8, 8)
    wider = DataInfo("wider", (1, 8, 8), low=0.0)
    with pytest.raises(UserError, match=r"made for pictures with low=-1.0 and these have low=0.0"):
        load_dequantizer(fresh / "runs/g", info=wider)
    content = load_checkpoint(path).content
    content["data"]["shape"] = [1, 16, 16]
    torch.save(content, path)
    done = command("sde.dequantize", "run=runs/g", "training.steps=6", folder=fresh)
    assert done.code == 2
    assert "was made for pictures with shape=(1, 16, 16) and these have shape=(1, 8, 8)" in done.sentence
    shutil.copy(fresh / "runs/g/checkpoints/step-00000004.pt", path)
    with pytest.raises(UserError, match="does not hold a dequantizer"):
        load_dequantizer(fresh / "runs/g")


def test_the_data_may_have_moved(fresh: Path) -> None:
    """Options of the data replace the run's, with and without a plus, and so does another data set of the same kind."""
    for option in ("data.margin=0.1", "+data.margin=0.1"):
        done = command("sde.dequantize", "run=runs/g", *SHORT, option, folder=fresh)
        assert done.code == 0, done.err
        shutil.rmtree(fresh / "runs/g/dequantizer")
    other = ["data=glyphs", "data.size=8", "data.characters=digits"]
    done = command("sde.dequantize", "run=runs/g", *SHORT, *other, folder=fresh)
    assert done.code == 0, done.err


MISTAKES: list[tuple[list[str], list[str]]] = [
    (["run=runs/p"], ["run=runs/p has data of kind vectors", "no gray levels"]),
    (["run=nope"], ["run=nope", "does not exist"]),
    (["run=empty"], ["empty has no checkpoint"]),
    (["run=runs/g", "ema=maybe"], ["ema='maybe'", "true or false"]),
    (["run=runs/g", "precision=fp64"], ["fp64", "fp32, tf32, bf16"]),
    (["run=runs/g", "device=mps"], ["'mps'", "auto, cpu, cuda"]),
    (["run=runs/g", "flow.layers=1"], ["flow.layers=1", "at least 2"]),
    (["run=runs/g", "flow.bins=many"], ["flow.bins='many' must be a whole number"]),
    (["run=runs/g", "flow=4"], ["flow"]),
    (["run=runs/g", "+flow.width=4"], ["flow.width is not an option", "channels"]),
    (["run=runs/g", "training.stepps=4"], ["there is no option 'training.stepps'", "training.steps"]),
    (["run=runs/g", "training.steps=0"], ["training.steps=0", "at least 1"]),
    (["run=runs/g", "data.size=16"], ["data=glyphs has shape=(1, 16, 16)", "trained with shape=(1, 8, 8)"]),
    (["run=runs/g", "data.characters=greek"], ["num_classes=", "trained with num_classes=10"]),
    (["run=runs/g", "data.sizes=16"], ["data.sizes is not an option"]),
    (["run=runs/g", "data=moons"], ["kind='vectors'"]),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_gets_one_sentence_and_changes_nothing(
    arguments: list[str], expected: list[str], trained: Path
) -> None:
    (trained / "empty/checkpoints").mkdir(parents=True, exist_ok=True)
    before = sorted(trained.rglob("*"))
    done = command("sde.dequantize", *arguments, folder=trained)
    assert done.code == 2, done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert done.err.startswith("error: ")
    for text in expected:
        assert text in done.err
    assert sorted(trained.rglob("*")) == before


def test_what_cannot_change_any_more(fresh: Path) -> None:
    assert command("sde.dequantize", "run=runs/g", *SHORT, folder=fresh).code == 0
    done = command("sde.dequantize", "run=runs/g", "flow.bins=6", "training.steps=5", folder=fresh)
    assert done.code == 2
    assert "flow.bins=6 cannot change" in done.sentence
    done = command("sde.dequantize", "run=runs/g", "optimizer=adamw", "training.steps=5", folder=fresh)
    assert done.code == 2
    assert "optimizer=adamw cannot change" in done.sentence
    done = command("sde.dequantize", "run=runs/g", "flow.bins=4", folder=fresh)
    assert done.code == 2
    assert "has made 4 steps and training.steps=4 asks for no more" in done.sentence


def test_a_run_that_does_not_say_where_its_pictures_are(fresh: Path) -> None:
    path = fresh / "runs/g/checkpoints/step-00000004.pt"
    content = load_checkpoint(path).content
    del content["config"]["data"]
    torch.save(content, path)
    done = command("sde.dequantize", "run=runs/g", *SHORT, folder=fresh)
    assert done.code == 2
    assert "runs/g does not say where its pictures are: name the data set, as data=cifar10" in done.sentence
    done = command(
        "sde.dequantize", "run=runs/g", *SHORT, "data=glyphs", "data.size=8", "data.characters=digits", folder=fresh
    )
    assert done.code == 0, done.err


def test_a_score_model_that_has_changed_is_named(fresh: Path) -> None:
    assert command("sde.dequantize", "run=runs/g", *SHORT, folder=fresh).code == 0
    done = command("sde.dequantize", "run=runs/g", "training.steps=5", "ema=false", folder=fresh)
    assert done.code == 0, done.err
    assert "was trained for step 4, ema=true, and goes on for step 4, ema=false" in done.err


def test_no_dequantizer_yet(fresh: Path) -> None:
    with pytest.raises(UserError, match=r"has no dequantizer: train one with python -m sde.dequantize run="):
        load_dequantizer(fresh / "runs/g")
