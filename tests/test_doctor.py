"""The doctor: what it measures is right, its rules speak when they should and not otherwise, its command line."""

from __future__ import annotations

import json
import math
import os
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sde.doctoring.advice as rules
from sde.data import DataInfo, Dataset, Split
from sde.distributed import World
from sde.doctor import measured, record
from sde.doctoring import machine
from sde.doctoring.advice import RULES, advise
from sde.doctoring.data import DataFacts, distance_examples, examine_data, largest_distance, repeated_share
from sde.doctoring.findings import Findings
from sde.doctoring.machine import GPU, Machine
from sde.doctoring.model import ModelFacts, examine_model, fewest_parts, largest_batch
from sde.doctoring.noise import NoiseFacts, examine_noise, prior_bits
from sde.doctoring.report import WIDTH, count, duration, numbered, operations, percent, section, size, speed_lines
from sde.doctoring.speed import Speed, Timing, affordable_batch, kept_checkpoints, known_peak, repeat
from sde.errors import UserError
from sde.models.summary import Summary
from sde.processes import EDM, VE, VP
from sde.training.ema import EMAOptions
from sde.training.options import TrainingOptions
from tests.commands import TINY, TINY_2D, Answer, command

# The data


class Given(Dataset):
    """A data set of given training examples."""

    def __init__(self, values: torch.Tensor, **info: Any) -> None:
        self._values = values
        kind = "pixels" if values.dtype == torch.uint8 else "vectors"
        self._info = DataInfo(name="given", shape=tuple(values.shape[1:]), kind=kind, **info)

    @property
    def info(self) -> DataInfo:
        return self._info

    def split(self, name: str) -> Split:
        if name == "test":
            raise UserError("there is no test split")
        return Split(self._values)


@pytest.mark.parametrize(("n", "d", "block"), [(2, 1, 1), (7, 3, 2), (50, 4, 16), (65, 2, 64), (40, 5, 1024)])
def test_the_largest_distance_is_that_of_all_pairs(n: int, d: int, block: int) -> None:
    x = 3 + torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    brute = max(math.dist(a, b) for a, b in combinations(x.tolist(), 2))
    assert largest_distance(x, block) == pytest.approx(brute, rel=1e-14)
    # the pair that wins in float32 is one that is as far apart to its rounding
    assert largest_distance(x.float() + 100, block) == pytest.approx(brute, rel=1e-4)


def test_the_largest_distance_leaves_out_what_is_not_finite() -> None:
    x = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [3.0, 4.0], [math.inf, 0.0]])
    assert largest_distance(x) == 5.0
    assert largest_distance(x[1:3]) == 0.0


def test_all_examples_of_small_data_are_compared() -> None:
    assert distance_examples(2) == 16384
    assert distance_examples(32 * 32) > 8000
    assert 3000 < distance_examples(3 * 32 * 32) < 10000
    assert distance_examples(10**9) == 2


def test_vectors_are_measured() -> None:
    """Half the values at -1 and half at 3: mean 1, deviation 2, exactly."""
    values = torch.tensor([[-1.0, 3.0], [3.0, -1.0], [-1.0, 3.0], [3.0, -1.0]])
    found = examine_data(Given(values), 0, torch.device("cpu"))
    assert (found.train, found.test, found.kind, found.shape) == (4, 0, "vectors", (2,))
    assert (found.low, found.high, found.mean, found.std, found.sigma_data) == (-1, 3, 1, 2, 2)
    assert found.distance == pytest.approx(4 * math.sqrt(2), rel=1e-7)
    assert (found.sample, found.sigma_examples, found.distance_examples) == (4, 4, 4)
    assert (found.repeated, found.constant, found.not_finite, found.gray_level) == (0.5, 0, 0, None)


def test_pictures_are_measured_as_the_network_sees_them() -> None:
    """One black, one white and two gray pictures; levels 0, 255 and 51 become -1, 1 and -0.6."""
    values = torch.tensor([0, 255, 51, 51], dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2).contiguous()
    values[0, 0, 0, 0] = 255
    found = examine_data(Given(values), 0, torch.device("cpu"))
    assert (found.low, found.high, found.constant, found.repeated) == (-1, 1, 0.75, 0.25)
    assert found.mean == pytest.approx((-3 + 1 + 4 - 8 * 0.6) / 16, rel=1e-6)
    assert found.distance == pytest.approx(math.sqrt(3 * 2**2), rel=1e-6)
    assert found.gray_level == pytest.approx(2 / 255, rel=1e-12)


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    values = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [1.0, 0.0], [0.0, -math.inf]])
    found = examine_data(Given(values), 0, torch.device("cpu"))
    assert (found.not_finite, found.low, found.high) == (0.5, 0, 1)
    assert found.distance == pytest.approx(math.sqrt(2), rel=1e-7)
    everywhere = examine_data(Given(torch.full((3, 2), math.nan)), 0, torch.device("cpu"))
    assert everywhere.not_finite == 1
    # a scale that is not a number gives rise to no advice of its own
    said = advise(healthy(data=everywhere, noise=examine_noise(VP(), everywhere)))
    assert len([sentence for sentence in said if "not finite" in sentence]) == 1
    assert not [sentence for sentence in said if "nan" in sentence]


def test_data_without_a_scale_or_without_examples() -> None:
    found = examine_data(Given(torch.ones(5, 3)), 0, torch.device("cpu"))
    assert (found.sigma_data, found.distance, found.constant) == (0, 0, 1)
    assert examine_noise(VE(), found).to_distance == math.inf
    with pytest.raises(UserError, match="has no training examples"):
        examine_data(Given(torch.ones(0, 3)), 0, torch.device("cpu"))


def test_large_data_is_measured_on_a_sample_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sde.doctoring.data.SAMPLE_EXAMPLES", 100)
    monkeypatch.setattr("sde.doctoring.data.SIGMA_VALUES", 100)
    monkeypatch.setattr("sde.doctoring.data.DISTANCE_WORK", 50**2 * 33.0)
    values = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    whole = largest_distance(values)
    found = examine_data(Given(values), 3, torch.device("cpu"))
    assert (found.sample, found.sigma_examples, found.distance_examples) == (100, 100, 50)
    assert 0 < found.distance <= whole
    assert found == examine_data(Given(values), 3, torch.device("cpu"))
    assert found != examine_data(Given(values), 4, torch.device("cpu"))
    # 200 normal draws give their standard deviation to 5 %
    assert found.sigma_data == pytest.approx(1, abs=0.2)


def test_repetitions_are_those_of_earlier_examples() -> None:
    values = torch.tensor([[1.0], [2.0], [1.0], [1.0]])
    assert repeated_share(values) == 0.5
    assert repeated_share(values[:2]) == 0


# Noise levels


def test_the_ends_of_a_process_beside_the_data() -> None:
    data = replace(HEALTHY_DATA, sigma_data=0.5, distance=20.0, mean=0.0, std=0.5)
    ve = examine_noise(VE(sigma_min=0.02, sigma_max=40), data)
    assert (ve.keeps_scale, ve.option, ve.largest, ve.to_distance) == (True, "sde.sigma_max", 40, 2)
    # samples start at N(0, sigma_max^2), where x_T has the variance of the data on top
    assert ve.prior_bits == pytest.approx(0.5 * 0.25 / 1600 / math.log(2), rel=1e-9)
    assert ve.smallest == pytest.approx(0.02, rel=1e-3)
    assert examine_noise(EDM(T=10), data).option == "sde.T"
    vp = examine_noise(VP(), data)
    alpha = math.exp(-0.5 * 10.05)
    assert not vp.keeps_scale
    assert vp.signal_left == pytest.approx(alpha * 0.5 / math.sqrt(1 - alpha**2), rel=1e-9)


def test_the_divergence_from_the_prior_is_that_of_torch() -> None:
    x, alpha, sigma, prior = 1.7, 0.3, 0.9, 1.1
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(
        normal(torch.tensor(alpha * x, dtype=torch.float64), sigma),
        normal(torch.tensor(0.0, dtype=torch.float64), prior),
    )
    assert prior_bits(alpha, sigma, prior, x**2) == pytest.approx(float(exact) / math.log(2), rel=1e-12)


# The network


def test_the_largest_batch_is_the_last_that_fits() -> None:
    costs = Summary(parameters=1000, flops=1, lines=((500, 300), (4000, 100)))
    for free in (20_000, 20_500, 24_100, 60_000):
        n = largest_batch(costs, free)
        assert n == 0 or costs.training_memory(n) <= free
        assert costs.training_memory(n + 1) > free
    assert largest_batch(costs, 10) == 0


def test_parts_of_a_batch_that_fit() -> None:
    assert [fewest_parts(12, largest) for largest in (12, 11, 5, 1, 0)] == [1, 2, 3, 12, None]
    # the share of each of 2 processes is 6, of 5 at most 3
    assert [fewest_parts(12, largest, 2) for largest in (6, 5, 1, 0)] == [1, 2, 6, None]
    assert [fewest_parts(12, largest, 5) for largest in (3, 2)] == [1, 2]


def test_memory_that_is_too_small_is_found_before_anything_is_made() -> None:
    info = DataInfo(name="given", shape=(1, 16, 16))
    config = {
        "conditional": False,
        "model": {
            "_target_": "sde.models.ncsnpp.NCSNpp",
            "channels": 8,
            "channel_multipliers": [1, 2],
            "blocks_per_level": 1,
            "attention_resolutions": [],
            "recompute_levels": 0,
        },
    }
    options = TrainingOptions(batch_size=64)
    enough = examine_model(config, info, options, 2**40)
    assert enough.fits
    assert (enough.fitting, enough.recompute, enough.at_once) == (1, None, 64)
    short = examine_model(config, info, options, enough.memory - 1)
    assert not short.fits
    assert short.largest == 63
    assert short.fitting == 2
    assert short.recompute == 1


def test_averages_take_memory_and_parts_are_kept() -> None:
    info = DataInfo(name="given", shape=(2,), kind="vectors")
    config = {"conditional": False, "model": {"_target_": "sde.models.mlp.MLP", "width": 16, "depth": 1}}
    options = TrainingOptions(batch_size=64, accumulation=4)
    one = examine_model(config, info, options, None)
    assert (one.fitting, one.at_once, one.largest, one.fits) == (4, 16, None, True)
    three = examine_model(config, info, options, None, averages=3)
    assert three.memory == one.memory + 2 * 4 * one.parameters
    none = examine_model(config, info, options, 10)
    assert (none.fitting, none.largest, none.recompute, none.fits) == (None, 0, None, False)
    double = examine_model(config, info, replace(options, precision="fp64"), None, averages=3)
    assert double.memory == 2 * three.memory
    # three processes: 64 examples in 12 parts, of which the largest has 6
    shared = examine_model(config, info, options, 2**40, processes=3)
    assert shared.at_once == 6


# The machine


def test_quotas_of_control_groups_cut_cores(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    inner = tmp_path / "root" / "job" / "step"
    inner.mkdir(parents=True)
    root = tmp_path / "root"
    assert machine.cpu_quota(root, own) == math.inf
    (inner / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_quota(root, own) == math.inf
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert machine.cpu_quota(root, own) == 1.5
    (inner / "cpu.max").write_text("50000 100000\n")
    assert machine.cpu_quota(root, own) == 0.5
    assert machine.usable_cores(root, own) == 0.5


def test_quotas_of_the_first_version_of_control_groups(tmp_path: Path) -> None:
    own, folder = tmp_path / "own", tmp_path / "cpu,cpuacct"
    own.write_text("4:memory:/\n3:cpu,cpuacct:/elsewhere\n")  # a path that the container does not see
    folder.mkdir()
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpu_quota(tmp_path, own) == math.inf
    (folder / "cpu.cfs_quota_us").write_text("300000\n")
    assert machine.cpu_quota(tmp_path, own) == 3


def test_limits_of_control_groups_cut_memory(tmp_path: Path) -> None:
    own, info = tmp_path / "own", tmp_path / "meminfo"
    own.write_text("0::/\n")
    info.write_text("MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 800 kB\n")
    assert machine.usable_memory(tmp_path, own, info) == (1000 * 1024, 800 * 1024)
    (tmp_path / "memory.max").write_text(f"{500 * 1024}\n")
    (tmp_path / "memory.current").write_text(f"{400 * 1024}\n")
    (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_file {100 * 1024}\n")
    assert machine.usable_memory(tmp_path, own, info) == (500 * 1024, 200 * 1024)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.usable_memory(tmp_path, own, info) == (1000 * 1024, 800 * 1024)
    assert machine.usable_memory(tmp_path, own, tmp_path / "none") == (None, None)


def test_extras_are_those_of_the_project() -> None:
    file = Path(machine.__file__).parents[2] / "pyproject.toml"
    if not file.is_file():
        pytest.skip("not a checkout")
    extras = tomllib.loads(file.read_text())["project"]["optional-dependencies"]
    for package, extra in machine.EXTRAS.items():
        assert any(line.startswith(package) for line in extras[extra]), package


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("sde.doctoring.machine.world", lambda: World(rank=3, size=8, local_rank=3))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found = machine.examine_machine(tmp_path / "not" / "there")
    assert (found.processes, found.rank, found.processes_here) == (8, 3, 4)
    assert not found.wandb_login
    assert "cpu" in found.fused
    assert found.disk_free > 0
    assert 0 < found.cores <= (os.cpu_count() or 1)
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n")
    assert machine.knows_wandb()
    assert not (tmp_path / "not").exists()


# Speed


def test_timings() -> None:
    timing = Timing((4.0, 1.0, 2.0, 3.0, 100.0), 9.0, warm=True)
    assert timing.median == 3
    assert timing.quartiles == (2, 4)
    assert Timing((5.0,), 5.0, warm=False).quartiles == (5, 5)


def test_a_call_longer_than_the_time_there_is_is_made_once() -> None:
    calls: list[int] = []

    def slow() -> None:
        calls.append(1)
        begin = time.perf_counter()
        while time.perf_counter() - begin < 0.01:
            pass

    once = repeat(slow, 0.005, torch.device("cpu"))
    assert (len(calls), len(once.seconds), once.warm) == (1, 1, False)
    compiled = repeat(slow, 0.005, torch.device("cpu"), compiled=True)
    assert compiled.warm
    assert len(compiled.seconds) >= 1
    several = repeat(slow, 0.1, torch.device("cpu"))
    assert several.warm
    assert min(several.seconds) >= 0.01


def test_what_follows_from_a_step() -> None:
    speed = replace(HEALTHY_SPEED, steps=1000, batch_size=32, timed=32, timing=Timing((0.5,), 1.0, True), flops=10**9)
    assert speed.step == 0.5
    assert speed.training == 500
    assert speed.pictures == 64
    assert speed.rate == 3e9 * 64
    # all but the optimizer's 0.1 s grows with the batch
    part = replace(speed, timed=8, optimizer=0.1)
    assert part.step == pytest.approx(0.1 + 4 * 0.4)
    assert replace(speed, evaluation=0.01).sampling(20) == pytest.approx(12.8)
    assert replace(speed, evaluation=0.01, preview_evaluations=3, preview_samples=5).preview == pytest.approx(0.15)


def test_checkpoints_that_are_there_at_a_time() -> None:
    options = TrainingOptions(steps=100, checkpoint_every=30, keep=2)
    assert kept_checkpoints(options) == 3
    assert kept_checkpoints(replace(options, keep=0)) == 4
    assert kept_checkpoints(replace(options, checkpoint_every=200)) == 1
    assert kept_checkpoints(replace(options, checkpoint_every=1, keep_every=20)) == 8
    assert kept_checkpoints(replace(options, checkpoint_every=1, keep_best="val/loss")) == 4


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("NVIDIA H100 80GB HBM3", (989, 494, 67)),
        ("NVIDIA H100 PCIe", (756, 378, 51)),
        ("NVIDIA A100-SXM4-80GB", (312, 156, 19.5)),
        ("NVIDIA L40S", (362, 183, 91.6)),
        ("NVIDIA L4", (121, 60, 30.3)),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_known_peaks(name: str, rates: tuple[float, float, float] | None) -> None:
    found = [known_peak(name, precision, tf32) for precision, tf32 in (("bf16", True), ("fp32", True), ("fp32", False))]
    assert known_peak(name, "fp64", True) is None
    assert known_peak(name, "tf32", False) == found[1]
    assert found == [None] * 3 if rates is None else found == [rate * 1e12 for rate in rates]


# Text


def test_units() -> None:
    assert [size(n) for n in (512, 3 * 2**20, 1.5 * 2**30, 2**41, None)] == [
        "0.5 KiB",
        "3 MiB",
        "1.5 GiB",
        "2 TiB",
        "unknown",
    ]
    assert [duration(s) for s in (0.0123, 3.25, 61, 120, 3600, 5430, 86400 * 3, 86400 * 365.25 * 4)] == [
        "12.3 ms",
        "3.25 s",
        "1 min 1 s",
        "2 min",
        "1 h",
        "1 h 30 min",
        "3.0 days",
        "4 years",
    ]
    assert (count(1, "example"), count(2201, "example"), count(2, "class", "classes")) == (
        "1 example",
        "2,201 examples",
        "2 classes",
    )
    assert (percent(0.25), percent(0), percent(1e-6)) == ("25 %", "0 %", "less than 0.01 %")
    assert [operations(n) for n in (2e6, 3.5e9, 1.25e12)] == ["2 MFLOP", "3.5 GFLOP", "1.25 TFLOP"]


def test_lines_are_aligned_and_not_longer_than_a_terminal() -> None:
    text = section("Title", [("a", "word " * 60), ("name", "value")])
    lines = text.splitlines()
    assert lines[0] == "Title"
    assert max(map(len, lines)) <= WIDTH
    assert {line.index("w") for line in lines[1:-1]} == {lines[-1].index("value")}
    assert numbered("Advice", ["one", "two"]).splitlines() == ["Advice", "   1. one", "   2. two"]


def test_one_step_and_none_are_said() -> None:
    once = replace(HEALTHY_SPEED, timing=Timing((60.0,), 60.0, warm=False), timed=4)
    text = dict(speed_lines(once, CPU))["step"]
    assert "1 step measured, scaled from steps of 4 examples" in text
    assert "the first" in text
    compiled = replace(HEALTHY_SPEED, timing=Timing((0.1, 0.1), 63.0, warm=True))
    assert "the first took 1 min 3 s" in dict(speed_lines(compiled, CPU))["step"]
    assert "fits" in dict(speed_lines(None, CPU))["not measured"]
    assert "one of 2 processes" in dict(speed_lines(None, replace(CPU, processes=2)))["not measured"]


# Advice

CPU = Machine(
    system="Linux",
    python="3.11",
    cpu="a CPU",
    cores=4,
    cores_there=8,
    load=0.5,
    threads=4,
    threads_asked=None,
    bf16=False,
    fused=("cpu",),
    memory=2**35,
    memory_free=2**34,
    gpus=(),
    cuda=None,
    cudnn=None,
    shared_memory=2**34,
    disk="runs",
    disk_free=2**40,
    packages={"torch": "2.6"},
    missing={},
    wandb_login=False,
    processes=1,
    rank=0,
    processes_here=1,
)
H100 = GPU("NVIDIA H100", 2**36, 2**36, (9, 0))
V100 = GPU("NVIDIA V100", 2**34, 2**34, (7, 0))
HEALTHY_DATA = DataFacts(
    name="pictures",
    kind="pixels",
    shape=(3, 32, 32),
    train=50_000,
    test=10_000,
    classes=0,
    sample=5000,
    low=-1,
    high=1,
    mean=-0.1,
    std=0.5,
    constant=0,
    repeated=0,
    not_finite=0,
    sigma_data=0.5,
    sigma_examples=50_000,
    distance=100.0,
    distance_examples=4000,
    gray_level=2 / 255,
)
VECTORS = replace(HEALTHY_DATA, kind="vectors", shape=(2,), gray_level=None, distance=3.0)
HEALTHY_SPEED = Speed(
    device="cpu",
    steps=100_000,
    batch_size=128,
    accumulation=1,
    timed=128,
    timing=Timing((0.1, 0.1, 0.1), 0.5, warm=True),
    evaluation=1e-4,
    evaluated=64,
    loading=0.001,
    optimizer=0.002,
    flops=10**9,
    peak=None,
    memory=2**32,
    checkpoint=2**28,
    checkpoints=4,
    preview_evaluations=35,
    preview_samples=36,
    previews=20,
)
HEALTHY_MODEL = ModelFacts(
    name="NCSNpp",
    parameters=10**7,
    flops=10**9,
    activations=2**24,
    at_once=128,
    memory=2**31,
    free=2**34,
    largest=1000,
    fitting=1,
    recompute=None,
)
CONFIG: dict[str, Any] = {
    "conditional": False,
    "optimizer": {"_target_": "torch.optim.Adam", "lr": 2e-4},
    "parameterization": {"_target_": "sde.parameterizations.Eps"},
    "loss": {"weighting": "sigma2", "sigma_data": 0.7},
    "logger": {"_target_": "sde.training.logging.NoLogger"},
}


def healthy(**changed: Any) -> Findings:
    """Findings in which nothing is wrong, but for what is changed."""
    data = changed.get("data", HEALTHY_DATA)
    found = Findings(
        config=CONFIG,
        options=TrainingOptions(),
        ema=EMAOptions(),
        device="cpu",
        machine=CPU,
        data=data,
        noise=examine_noise(VP(), data),
        model=HEALTHY_MODEL,
        speed=HEALTHY_SPEED,
    )
    return replace(found, **changed)


def configured(**changed: Any) -> dict[str, Any]:
    """A configuration with some nodes changed."""
    return {**CONFIG, **changed}


def noise_of(process: Any, data: DataFacts = HEALTHY_DATA) -> NoiseFacts:
    return examine_noise(process, data)


SICK: dict[str, list[tuple[dict[str, Any], str]]] = {
    "memory": [
        (
            {"model": replace(HEALTHY_MODEL, memory=2**35, largest=50, fitting=4, recompute=2)},
            "training.accumulation=4 or model.recompute_levels=2 or training.batch_size=50",
        ),
        ({"model": replace(HEALTHY_MODEL, memory=2**35, largest=0, fitting=None)}, "smaller network"),
    ],
    "bad_values": [({"data": replace(VECTORS, not_finite=0.25)}, "25 % of the examples")],
    "odd_pictures": [
        ({"data": replace(HEALTHY_DATA, repeated=0.2)}, "20 % are repetitions of others"),
        ({"data": replace(HEALTHY_DATA, constant=0.1)}, "10 % have the same value everywhere"),
    ],
    "data_range": [
        ({"data": replace(HEALTHY_DATA, low=0, high=1)}, "from 0 to 1"),
        ({"data": replace(VECTORS, std=50)}, "standard deviation of 50"),
        ({"data": replace(VECTORS, std=0.001)}, "about 0.5"),
    ],
    "unused_labels": [({"data": replace(HEALTHY_DATA, classes=10)}, "10 classes")],
    "epochs": [
        ({"options": TrainingOptions(steps=700, warmup=0), "ema": EMAOptions(decay=0.99)}, "seen 1.8 times"),
        ({"options": TrainingOptions(steps=10**7)}, "by heart"),
    ],
    "sigma_max": [
        ({"noise": noise_of(VE(sigma_max=20))}, "sde.sigma_max=20 is 0.2 times the largest distance"),
        ({"noise": noise_of(VE(sigma_max=1000))}, "sde.sigma_max=100 (arXiv"),
        ({"noise": noise_of(EDM(T=800))}, "sde.T=800"),
    ],
    "signal_left": [({"noise": noise_of(VP(beta_max=5))}, "sde.beta_max")],
    "smallest_noise": [
        ({"noise": noise_of(VE(sigma_min=0.05, sigma_max=100))}, "6.4 gray levels"),
        ({"noise": noise_of(VP(t_min_sampling=0.1), VECTORS), "data": VECTORS}, "sde.t_min_sampling"),
    ],
    "sigma_data": [
        (
            {"config": configured(parameterization={"sigma_data": 0.6})},
            "parameterization.sigma_data=0.6, and the data's is 0.5",
        ),
        ({"config": configured(loss={"weighting": "edm", "sigma_data": 0.44})}, "loss.sigma_data=auto"),
    ],
    "idle_gpu": [({"machine": replace(CPU, gpus=(H100,))}, "training.device=auto")],
    "precision": [
        ({"machine": replace(CPU, bf16=True)}, "training.precision=bf16"),
        (
            {"machine": replace(CPU, gpus=(H100,)), "device": "cuda", "options": TrainingOptions(compile="auto")},
            "training.precision=bf16",
        ),
    ],
    "compilation": [
        ({"machine": replace(CPU, gpus=(V100,)), "device": "cuda"}, "training.compile=auto"),
    ],
    "threads": [
        ({"machine": replace(CPU, threads=1, threads_asked="1")}, "1 of 4 usable cores (OMP_NUM_THREADS=1)"),
        ({"machine": replace(CPU, threads=1)}, "use 1 of 4 usable cores: OMP"),
        ({"machine": replace(CPU, threads=8)}, "8 threads share 4 usable cores"),
        ({"machine": replace(CPU, threads=4, processes=2, processes_here=2)}, "OMP_NUM_THREADS=2"),
    ],
    "busy": [({"machine": replace(CPU, load=5.2)}, "load was 5.2 before this began, on 8 cores")],
    "loading": [({"speed": replace(HEALTHY_SPEED, loading=0.03)}, "30 ms of a step's 100 ms")],
    "warmup": [({"options": TrainingOptions(warmup=100_000)}, "training.warmup=5000")],
    "learning_rate": [
        ({"config": configured(optimizer={"_target_": "torch.optim.Adam", "lr": 0.1})}, "unusually high for NCSNpp"),
        ({"config": configured(optimizer={"_target_": "torch.optim.AdamW", "lr": 1e-7})}, "unusually low"),
        ({"model": replace(HEALTHY_MODEL, name="EDM2")}, "0.001 to 0.1 is usual"),
    ],
    "average_length": [
        ({"ema": EMAOptions(decay=0.999999)}, "ema.decay=0.9999 fits"),
        ({"ema": EMAOptions(decay=0.999999, warmup=False)}, "90.5 % of it will be the weights of the beginning"),
    ],
    "shared_memory": [
        ({"machine": replace(CPU, shared_memory=2**26), "options": TrainingOptions(workers=2)}, "64 MiB"),
    ],
    "rare_checkpoints": [
        (
            {"options": TrainingOptions(checkpoint_every=50_000)},
            "Checkpoints are 1 h 23 min apart: training.checkpoint_every=18000",
        )
    ],
    "costly_previews": [
        ({"speed": replace(HEALTHY_SPEED, preview_evaluations=200_000)}, "12 min each and 59 % of the time"),
    ],
    "disk": [({"machine": replace(CPU, disk_free=3 * 2**28)}, "training.keep=2")],
    "wandb_login": [
        ({"config": configured(logger={"_target_": "sde.training.logging.WandB", "mode": "auto"})}, "wandb login"),
    ],
}


def test_nothing_wrong_gives_no_advice() -> None:
    assert advise(healthy()) == []
    assert advise(healthy(speed=None, model=replace(HEALTHY_MODEL, free=None))) == []


@pytest.mark.parametrize(("name", "case"), [(name, i) for name in SICK for i in range(len(SICK[name]))])
def test_a_rule_speaks_alone(name: str, case: int) -> None:
    changed, text = SICK[name][case]
    found = healthy(**changed)
    said = [rule.__name__ for rule in RULES if rule(found) is not None]
    assert said == [name]
    sentence = getattr(rules, name)(found)
    assert text in sentence
    assert sentence.endswith(".")


def test_every_rule_has_a_case() -> None:
    assert {rule.__name__ for rule in RULES} == set(SICK)


@pytest.mark.parametrize(
    "changed",
    [
        {"noise": noise_of(VE(sigma_max=50))},
        {"noise": noise_of(EDM())},
        {"config": configured(parameterization={"sigma_data": 0.46})},
        {"config": configured(parameterization={"sigma_data": "auto"})},
        {"config": configured(optimizer={"_target_": "torch.optim.SGD", "lr": 0.1})},
        {"config": configured(logger={"_target_": "sde.training.logging.WandB", "mode": "offline"})},
        {
            "config": configured(logger={"_target_": "sde.training.logging.WandB", "mode": "auto"}),
            "machine": replace(CPU, wandb_login=True),
        },
        {"config": configured(conditional=True), "data": replace(HEALTHY_DATA, classes=10)},
        {"machine": replace(CPU, threads=2, threads_asked="2", processes=2, processes_here=2)},
        {"machine": replace(CPU, gpus=(V100,)), "device": "cuda", "options": TrainingOptions(compile="auto")},
        {
            "machine": replace(CPU, gpus=(H100,), threads=1),
            "device": "cuda",
            "options": TrainingOptions(compile="graphs", precision="bf16"),
        },
        {"ema": EMAOptions(decay=(), std=(0.05,))},
        {"speed": replace(HEALTHY_SPEED, preview_evaluations=None)},
        {"machine": replace(CPU, shared_memory=2**26)},
        {"machine": replace(CPU, load=None)},
        {"options": TrainingOptions(preview_every=0, checkpoint_every=30_000)},
    ],
)
def test_what_is_usual_gives_no_advice(changed: dict[str, Any]) -> None:
    assert advise(healthy(**changed)) == []


# The command line


ON_CPU = ["training.device=cpu"]  # where the numbers below are exact


def sections(done: Answer) -> dict[str, str]:
    """What was printed below each title."""
    assert done.code == 0, done.err
    blocks = [block.split("\n", 1) for block in done.out.strip().split("\n\n")]
    return {block[0]: block[1] for block in blocks}


def test_points_are_diagnosed_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sde.doctoring.speed.affordable_batch", lambda *_: 32)  # however busy the machine is
    done = command("sde.doctor", *TINY_2D, *ON_CPU, "seconds=0.2", "out=doctor.json", folder=tmp_path)
    assert list(sections(done)) == ["Machine", "Data", "Noise", "Network", "Speed", "Advice"]
    assert max(map(len, done.out.splitlines())) <= WIDTH
    assert [path.name for path in tmp_path.rglob("*")] == ["doctor.json"]
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["device"] == "cpu"
    assert found["data"]["train"] == 256
    # the moons have a deviation of 0.5, which 512 values give to some percent
    assert found["data"]["sigma_data"] == pytest.approx(0.5, abs=0.05)
    assert found["data"]["distance_examples"] == 256
    speed = found["speed"]
    assert speed["timing"]["seconds"]
    assert speed["timed"] == speed["batch_size"] == 32
    assert speed["seconds_of_training"] == pytest.approx(20 * speed["seconds_a_step"])
    assert speed["pictures_a_second"] == pytest.approx(32 / speed["seconds_a_step"])
    # Heun's 4 steps take 2 evaluations each; one more denoises
    assert speed["preview_evaluations"] == 9
    weights = found["model"]["parameters"] * 4
    # weights, averages and two moments, besides some bytes of buffers and counters
    assert 4 * weights <= speed["checkpoint"] <= 4 * weights + 2000
    assert any("conditional=true" in sentence for sentence in found["advice"])


def test_pictures_are_diagnosed_on_a_part_of_a_long_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sde.doctoring.speed.affordable_batch", lambda *_: 3)
    arguments = [*TINY, *ON_CPU, "data.characters=digits", "training.batch_size=64", "training.accumulation=2"]
    done = command("sde.doctor", *arguments, "conditional=true", "seconds=0.01", "out=d.json", folder=tmp_path)
    assert "Advice" in sections(done)
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["model"]["at_once"] == 32
    assert found["data"]["gray_level"] == pytest.approx(2 / 255)
    assert (found["speed"]["timed"], found["speed"]["batch_size"]) == (3, 64)
    assert "scaled from steps of 3 examples" in " ".join(done.out.split())


def test_what_does_not_fit_is_measured_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sde.doctor.free_memory", lambda *_: 2**21)
    monkeypatch.setattr("sde.doctoring.speed.affordable_batch", lambda *_: 16)
    arguments = [*TINY, *ON_CPU, "data.characters=digits", "training.batch_size=16", "seconds=0.1", "out=d.json"]
    done = command("sde.doctor", *arguments, folder=tmp_path)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["speed"]["accumulation"] == found["model"]["fitting"] > 1
    assert f"training.accumulation={found['model']['fitting']}" in found["advice"][0]


def test_parts_are_made_smaller_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def measure(*arguments: Any) -> Speed:
        tried.append(arguments[5])
        if arguments[5] < 6:
            raise torch.OutOfMemoryError
        return HEALTHY_SPEED

    monkeypatch.setattr("sde.doctor.measure_speed", measure)
    dataset, options, cpu = Given(torch.ones(4, 2)), TrainingOptions(batch_size=12), torch.device("cpu")
    fits = replace(HEALTHY_MODEL, fitting=2)
    assert measured(CONFIG, dataset, cpu, fits, options, 1) is HEALTHY_SPEED
    assert tried == [2, 3, 4, 6]
    assert measured(CONFIG, dataset, cpu, replace(HEALTHY_MODEL, fitting=None), options, 1) is None
    assert measured(CONFIG, dataset, cpu, fits, replace(options, batch_size=4), 1) is None


@pytest.mark.parametrize(
    ("once", "each", "seconds", "examples"),
    [
        (0.0, 0.001, 10.0, 64),  # 64 take 0.064 s
        (0.5, 0.001, 10.0, 64),  # what does not grow with the batch does not make it too long
        (0.0, 1.0, 64.0, 64),
        (0.0, 1.0, 40.0, 6),  # 24 s for 4 steps of 6 examples
        (0.0, 100.0, 10.0, 1),
    ],
)
def test_a_step_that_would_take_too_long_has_fewer_examples(
    once: float, each: float, seconds: float, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def at(_: object, x: torch.Tensor, *__: object) -> tuple[torch.Tensor, torch.Tensor]:
        taken.append(len(x))
        return x.clone().requires_grad_(), x

    def timed(call: Callable[[], None], *_: object) -> Timing:
        call()
        return Timing((once + each * taken[-1],), 1.0, warm=True)

    monkeypatch.setattr("sde.doctoring.speed.repeat", timed)
    trainer: Any = SimpleNamespace(
        options=TrainingOptions(batch_size=64),
        batches=lambda step: (torch.zeros(64, 1), None),
        denoiser=SimpleNamespace(sde=VP()),
        loss=SimpleNamespace(at=at),
        optimizer=torch.optim.Adam([torch.zeros(1, requires_grad=True)]),
        device=torch.device("cpu"),
    )
    assert affordable_batch(trainer, seconds) == examples
    assert taken == sorted(taken)


def test_the_record_has_no_numbers_that_json_lacks() -> None:
    found = healthy(noise=replace(examine_noise(VE(), HEALTHY_DATA), to_distance=math.inf))
    text = json.dumps(record(found), allow_nan=False)
    assert json.loads(text)["noise"]["to_distance"] is None
    assert json.loads(text)["data"]["shape"] == [3, 32, 32]


def test_one_of_several_processes_speaks_and_measures_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sde.doctoring.machine.world", lambda: World(rank=0, size=2, local_rank=0))
    done = command("sde.doctor", *TINY_2D, *ON_CPU, folder=tmp_path)
    assert "process 0 of 2" in sections(done)["Machine"]
    assert "leave torchrun out" in sections(done)["Speed"]
    monkeypatch.setattr("sde.doctor.is_main", lambda: False)
    silent = command("sde.doctor", *TINY_2D, *ON_CPU, folder=tmp_path)
    assert (silent.code, silent.out) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["seconds=0"], ["seconds=0", "above 0"]),
        (["preview_solver=pc"], ["solver@preview_solver"]),
        (["ema.decay=1"], ["ema.decay=1", "below 1"]),
        (["seconds=long"], ["seconds='long'", "not a number"]),
        (["resume=runs/p"], ["resume=", "leave it out"]),
        (["training.stepz=5"], ["'training.stepz'", "did you mean 'training.steps'"]),
        (["sde=vpp"], ["sde=vpp", "did you mean 'vp'"]),
        (["training.batch_size=0"], ["training.batch_size=0", "at least 1"]),
        (["conditional=perhaps"], ["conditional='perhaps'", "true or false"]),
        (["out=."], ["out=.", "a folder"]),
        (["data=images", "data.path=/no/such/folder"], ["/no/such/folder"]),
    ],
)
def test_a_mistake_gets_one_sentence(arguments: list[str], expected: list[str], tmp_path: Path) -> None:
    done = command("sde.doctor", *arguments, folder=tmp_path)
    assert done.code == 2, done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    for text in expected:
        assert text in done.err
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    done = command("sde.doctor", "training.device=cuda", folder=tmp_path)
    assert done.code == 2
    assert "training.device=cuda is not there" in done.sentence


def test_experiments_mean_what_they_mean_in_training() -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from sde.config import conf_dir

    overrides = ["+experiment=cifar10_ve_ncsnpp", "training.batch_size=64", "optimizer=adamw"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        train, doctor = (OmegaConf.to_container(compose(name, overrides)) for name in ("train", "doctor"))
    assert isinstance(doctor, dict)
    assert {key: value for key, value in doctor.items() if key not in ("seconds", "out")} == train
