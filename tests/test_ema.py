"""Averaged weights: each average against its explicit sum, widths against the closed form, averages that are made
afterwards against those that were tracked, and the command lines that take them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image
from scipy.integrate import quad
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from sde.data import DATASETS
from sde.errors import UserError
from sde.interop.export import load_pretrained
from sde.interop.runs import Description
from sde.models import MODELS
from sde.parameterizations import Eps
from sde.processes import VP
from sde.runs import Run, chosen_weights, ema_options, open_checkpoint, restore_denoiser
from sde.training.checkpoint import Checkpoint, save_checkpoint
from sde.training.ema import (
    EMA,
    FOLDER,
    WIDEST,
    Averages,
    EMAOptions,
    PowerEMA,
    average_name,
    averages_of,
    gamma_of_std,
    snapshot_path,
    std_of_gamma,
)
from sde.training.posthoc import Profile, fit_profile, inner_products, list_snapshots, profiles_of, weighted_sum
from tests.commands import command


class Small(nn.Module):
    """Parameters of several shapes and a buffer, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def vector(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def walk(network: nn.Module, steps: int, update: Callable[[int], object], seed: int = 0) -> Tensor:
    """A random walk of the weights: (steps, parameters) of them, `update(step)` being called after each step."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for step in range(steps):
        with torch.no_grad():
            for p in network.parameters():
                p += torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            for buffer in network.buffers():
                buffer += 1
        update(step)
        seen.append(vector(network))
    return torch.stack(seen)


def bins(gamma: float, t: int, steps: int) -> Tensor:
    """The profile of a power-function average after t steps, integrated over each of the first `steps` steps."""
    edges = (torch.arange(steps + 1, dtype=torch.float64) / t).clamp(max=1) ** (gamma + 1)
    return edges.diff()


# One average


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_is_its_explicit_sum(warmup: bool) -> None:
    network = Small()
    first = vector(network)
    ema = EMA(network, 0.8, warmup)
    seen = walk(network, 60, ema.update)
    decays = [min(0.8, (1 + n) / (10 + n)) if warmup else 0.8 for n in range(60)]
    expected = math.prod(decays) * first
    for n in range(60):
        expected = expected + (1 - decays[n]) * math.prod(decays[n + 1 :]) * seen[n]
    assert torch.allclose(vector(ema.network), expected, rtol=0, atol=1e-13 * float(seen.abs().max()))
    assert int(ema.network.count) == 60
    assert not any(p.requires_grad for p in ema.network.parameters())


@pytest.mark.parametrize("steps", [1, 2, 50])
@pytest.mark.parametrize("std", [0.01, 0.1, 0.25])
def test_a_power_function_average_is_its_explicit_sum(std: float, steps: int) -> None:
    network = Small()
    nn.init.constant_(network.a, 1e6)  # the initialization, which must leave no trace
    average = PowerEMA(network, std)
    nn.init.zeros_(network.a)
    seen = walk(network, steps, average.update)
    weights = bins(average.gamma, steps, steps)
    assert float(weights.sum()) == pytest.approx(1, rel=1e-14)
    assert torch.allclose(vector(average.network), weights @ seen, rtol=0, atol=1e-13 * float(seen.abs().max()))
    if steps == 1:
        assert torch.equal(vector(average.network), seen[0])
    assert int(average.network.count) == steps


def test_the_profile_is_as_wide_as_its_name_says() -> None:
    """Mean (gamma+1)/(gamma+2) t and standard deviation std t, to the width of a step."""
    t = 20_000
    for std in (0.02, 0.1, 0.2):
        gamma = gamma_of_std(std)
        weights, middles = bins(gamma, t, t), torch.arange(t, dtype=torch.float64) + 0.5
        mean = weights @ middles
        spread = (weights @ (middles - mean) ** 2).sqrt()
        assert float(mean) == pytest.approx((gamma + 1) / (gamma + 2) * t, abs=1)
        assert float(spread) == pytest.approx(std * t, abs=1)


def test_gamma_is_the_inverse_of_the_closed_form_and_the_root_of_the_cubic() -> None:
    for std in (1e-4, 0.01, 0.05, 0.1, 0.2, 0.28, 0.2886):
        gamma = gamma_of_std(std)
        assert std_of_gamma(gamma) == pytest.approx(std, rel=1e-14)
        t = std**-2
        assert gamma == pytest.approx(np.roots([1, 7, 16 - t, 12 - t]).real.max(), rel=1e-12)
    for gamma in (1e-3, 1.0, 6.94, 16.97, 500.0):
        assert gamma_of_std(std_of_gamma(gamma)) == pytest.approx(gamma, rel=1e-12, abs=1e-12)
    assert std_of_gamma(0.0) == pytest.approx(WIDEST, rel=1e-15)
    for std in (0, -0.1, WIDEST, 0.3, math.nan):
        with pytest.raises(UserError, match="std="):
            gamma_of_std(std)


# Several at once

SEVERAL = EMAOptions(decay=(0.9, 0.99), std=(0.05, 0.1))


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS.get("mlp")((2,), width=16, depth=1)


def assert_same_bits(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> None:
    one, other = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_several_averages_are_each_by_itself() -> None:
    network = mlp()
    averages = Averages(network, SEVERAL)
    alone = [EMA(network, 0.9), EMA(network, 0.99), PowerEMA(network, 0.05), PowerEMA(network, 0.1)]
    assert list(averages.networks) == ["0.9", "0.99", "std0.05", "std0.1"] == SEVERAL.names
    assert averages.primary is averages.networks["0.9"]

    def update(step: int) -> None:
        for average in (averages, *alone):
            average.update(step)

    walk(network, 30, update)
    for together, single in zip(averages.networks.values(), alone, strict=True):
        assert_same_bits(together, single.network)
    assert not torch.equal(vector(alone[2].network), vector(alone[3].network))


def content_of(averages: Averages, network: nn.Module, **more: object) -> dict[str, object]:
    config = {"ema": asdict(averages.options)}
    return {"config": config, "model": network.state_dict(), **averages.state(), **more}


def test_averages_go_on_bit_for_bit(tmp_path: Path) -> None:
    network = mlp()
    averages = Averages(network, SEVERAL)
    seen: dict[int, dict[str, object]] = {}

    def update(step: int) -> None:
        averages.update(step)
        if step == 11:
            seen[step] = copy.deepcopy(content_of(averages, network))
        if step == 19:
            averages.snapshot(tmp_path / "whole", 20)

    walk(network, 20, update)
    assert list(seen[11]["averages"]) == ["0.99", "std0.05", "std0.1"]  # type: ignore[call-overload]
    again = mlp(seed=5)
    resumed = Averages(again, SEVERAL)
    resumed.load_state(seen[11])

    def replay(step: int) -> None:
        if step == 11:
            assert_same_bits(again, seen[11]["model"])  # type: ignore[arg-type]
        if step > 11:
            resumed.update(step)

    again.load_state_dict(mlp().state_dict())
    walk(again, 20, replay)
    for name, kept in averages.networks.items():
        assert_same_bits(kept, resumed.networks[name])
    resumed.snapshot(tmp_path / "resumed", 20)
    files = [snapshot_path(tmp_path / folder, 20).read_bytes() for folder in ("whole", "resumed")]
    assert files[0] == files[1]


def test_going_on_with_other_averages() -> None:
    network = mlp()
    averages = Averages(network, SEVERAL)
    walk(network, 5, averages.update)
    content = content_of(averages, network)
    order = Averages(mlp(1), EMAOptions(decay=0.99, std=(0.1,)))
    order.load_state(content)
    assert_same_bits(order.networks["0.99"], averages.networks["0.99"])
    assert_same_bits(order.networks["std0.1"], averages.networks["std0.1"])
    longer = Averages(mlp(1), EMAOptions(decay=0.999))
    longer.load_state(content)
    assert_same_bits(longer.primary, averages.primary)
    for options in (EMAOptions(decay=(0.9, 0.5)), EMAOptions(std=(0.07,)), EMAOptions(decay=(), std=(0.07,))):
        with pytest.raises(UserError, match=r"there is no average (0\.5|std0\.07) .* 0\.9, 0\.99, std0\.05, std0\.1"):
            Averages(mlp(), options).load_state(content)


def test_runs_of_before_there_were_several() -> None:
    """Their configuration has a decay and a warm-up, and their checkpoint one average."""
    old = ema_options({"decay": 0.97, "warmup": False})
    assert old == EMAOptions(decay=0.97, warmup=False)
    network = mlp()
    averages = Averages(network, old)
    content = {"config": {"ema": {"decay": 0.97, "warmup": False}}, "ema": mlp(3).state_dict()}
    averages.load_state(content)
    assert_same_bits(averages.primary, mlp(3))
    assert list(averages_of(content)) == ["0.97"]


def test_options_from_a_command_line() -> None:
    assert ema_options({"decay": 0.99}).decays == (0.99,)
    assert ema_options({"decay": [0.999, 0.9999], "std": [0.05]}).names == ["0.999", "0.9999", "std0.05"]
    assert ema_options({"_target_": "sde.training.ema.EMAOptions", "decay": 0}).names == ["0.0"]
    assert ema_options({"decay": [], "std": [0.1]}).names == ["std0.1"]
    assert [average_name(text) for text in (0.9990, "0.9990", "std0.050", "maybe", True, "stdx")] == [
        "0.999", "0.999", "std0.05", None, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        ({"decay": 1}, r"ema\.decay=1\.0 is out of range"),
        ({"decay": [0.9, -0.1]}, r"ema\.decay=-0\.1 is out of range"),
        ({"decay": "long"}, r"ema\.decay='long' must be a number"),
        ({"decay": [0.9, 0.90]}, r"the average 0\.9 twice"),
        ({"decay": []}, "leave no average"),
        ({"warmup": "no"}, r"ema\.warmup='no' must be true or false"),
        ({"std": [0.3]}, r"ema\.std=0\.3 is out of range: it must be above 0 and below 0\.288675"),
        ({"std": 0.1}, r"ema\.std=0\.1 must be a list, such as ema\.std=\[1,2\]"),
        ({"snapshot_every": 10}, r"ema\.snapshot_every=10 has no power-function averages"),
        ({"snapshot_every": -1, "std": [0.1]}, r"ema\.snapshot_every=-1 is out of range"),
        ({"std": [0.1], "snapshot_ever": 5}, r"did you mean 'snapshot_every'"),
    ],
)
def test_options_are_checked(node: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ema_options(node)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_parameters_that_are_spread_over_processes(one_process: None) -> None:
    """FSDP2: the same bits as without, also after the averaged network has been used, which gathers its weights."""
    network, whole = mlp(), mlp()
    averages, expected = Averages(network, SEVERAL), Averages(whole, SEVERAL)
    for module in (network, *averages.networks.values()):
        fully_shard(module)
    x, t = torch.randn(3, 2), torch.rand(3)

    def move(module: nn.Module) -> None:
        (module(x, t) ** 2).sum().backward()
        with torch.no_grad():
            for p in module.parameters():
                p -= 0.1 * p.grad
                p.grad = None

    for step in range(6):
        for module, kept in ((network, averages), (whole, expected)):
            move(module)
            kept.update(step)
        with torch.no_grad():
            for name, averaged in averages.networks.items():
                assert torch.equal(averaged(x, t), expected.networks[name](x, t))
    state, plain = averages.state(), expected.state()
    assert_same_bits(state["ema"], plain["ema"])
    for name in plain["averages"]:
        assert_same_bits(state["averages"][name], plain["averages"][name])
    averages.load_state(content_of(Averages(mlp(7), SEVERAL), mlp(7)))
    assert_same_bits(averages.state()["ema"], mlp(7))


# Afterwards


def test_inner_products_are_the_integrals() -> None:
    profiles = [Profile(step, std) for step in (3.0, 10.0) for std in (0.02, 0.1, 0.25)]
    found = inner_products(profiles, profiles)

    def density(profile: Profile, tau: float) -> float:
        return (profile.gamma + 1) / profile.step * (tau / profile.step) ** profile.gamma

    for i, a in enumerate(profiles):
        for j, b in enumerate(profiles):
            end = min(a.step, b.step)
            expected, _ = quad(
                lambda tau, a=a, b=b: density(a, tau) * density(b, tau), 0, end, epsabs=0, epsrel=1e-12, limit=200
            )
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-10)
    tau = torch.tensor([-1.0, 0.5, 2.9, 3.1], dtype=torch.float64)
    assert profiles[1](tau).tolist() == pytest.approx([0, density(profiles[1], 0.5), density(profiles[1], 2.9), 0])


GRID = [Profile(step, std) for step in (50, 100, 150, 200) for std in (0.05, 0.1)]


@pytest.mark.parametrize("std", [0.03, 0.07, 0.2])
def test_the_fit_is_the_constrained_minimum(std: float) -> None:
    """The bordered system of the Lagrange conditions, and the norm of what is missing by quadrature."""
    wanted = Profile(200, std)
    fit = fit_profile(GRID, wanted)
    gram, against = inner_products(GRID, GRID).numpy(), inner_products(GRID, [wanted]).numpy()
    n = len(GRID)
    bordered = np.block([[gram, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    expected = np.linalg.solve(bordered, np.concatenate([against, [[1.0]]]))[:n, 0]
    assert fit.coefficients == pytest.approx(expected, rel=1e-8, abs=1e-8)
    assert sum(fit.coefficients) == pytest.approx(1, abs=1e-13)
    middles = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 2000  # the midpoint rule, exact at the jumps
    made = torch.tensor(fit.coefficients, dtype=torch.float64) @ torch.stack([p(middles) for p in GRID])
    error = ((made - wanted(middles)).square().sum() / wanted(middles).square().sum()).sqrt()
    assert fit.error == pytest.approx(float(error), rel=1e-5)


def test_the_fit_converges_and_stays_stable() -> None:
    """Four times the snapshots: 1/16 of the error, down to rounding; large coefficients would spoil the weights."""
    errors = []
    for n in (16, 64, 256):
        known = [Profile(1000.0 * (k + 1) / n, std) for k in range(n) for std in (0.05, 0.1)]
        fit = fit_profile(known, Profile(1000.0, 0.07))
        assert sum(fit.coefficients) == pytest.approx(1, abs=1e-12)
        assert sum(map(abs, fit.coefficients)) < 2
        errors.append(fit.error)
    assert all(15 < a / b < 17 for a, b in pairwise(errors))
    assert fit_profile(GRID, Profile(200, 0.005)).error > 0.3  # far too narrow for snapshots so far apart


def tracked(tmp_path: Path, steps: int = 400, every: int = 25) -> tuple[Small, Tensor, dict[float, Tensor]]:
    """A random walk with snapshots of two averages, and others that were tracked all along."""
    network = Small()
    averages = Averages(network, EMAOptions(std=(0.05, 0.1)))
    direct = {std: PowerEMA(network, std) for std in (0.03, 0.05, 0.07, 0.15)}

    def update(step: int) -> None:
        averages.update(step)
        for average in direct.values():
            average.update(step)
        if (step + 1) % every == 0:
            averages.snapshot(tmp_path, step + 1)

    seen = walk(network, steps, update)
    return network, seen, {std: vector(average.network) for std, average in direct.items()}


def test_averages_made_afterwards_are_those_that_were_tracked(tmp_path: Path) -> None:
    """The difference is the sum of the weights with what is missing of the profile, and below its norm."""
    network, seen, direct = tracked(tmp_path)
    snapshots = list_snapshots(tmp_path, network)
    known = profiles_of(snapshots)
    assert [snapshot.step for snapshot in snapshots] == list(range(25, 401, 25))
    sizes = {}
    for std, expected in direct.items():
        wanted = Profile(400, std)
        fit = fit_profile(known, wanted)
        state = weighted_sum(snapshots, fit.coefficients, network)
        assert int(state["count"]) == 400
        made = torch.cat([state[key].flatten() for key, _ in network.named_parameters()])
        missing = -bins(wanted.gamma, 400, 400)
        for coefficient, profile in zip(fit.coefficients, known, strict=True):
            missing += coefficient * bins(profile.gamma, int(profile.step), 400)
        assert torch.allclose(made - expected, missing @ seen, rtol=0, atol=1e-11)
        spread = (seen - seen.mean(0)).square().sum(0).sqrt()
        norm = float(inner_products([wanted], [wanted]).sqrt())
        assert bool(((made - expected).abs() <= fit.error * norm * spread + 1e-11).all())
        sizes[std] = float((made - expected).norm())
    assert sizes[0.05] == 0  # it is in the snapshots: nothing is summed
    apart = float((direct[0.05] - direct[0.07]).norm())
    assert 0 < sizes[0.07] < 1e-2 * apart


def test_an_average_that_is_a_snapshot_is_that_snapshot(tmp_path: Path) -> None:
    network, _, _ = tracked(tmp_path, steps=60, every=20)
    snapshots = list_snapshots(tmp_path, network)
    fit = fit_profile(profiles_of(snapshots), Profile(40, 0.1))
    assert (fit.coefficients, fit.error) == ((0.0, 0.0, 0.0, 1.0, 0.0, 0.0), 0.0)
    state = weighted_sum(snapshots, fit.coefficients, network)
    held = safetensors.torch.load_file(snapshot_path(tmp_path, 40))
    for key in ("a", "b"):
        assert torch.equal(state[key], held[f"std0.1/{key}"])
    with_rounding = fit_profile([*profiles_of(snapshots)[:3], *profiles_of(snapshots)[4:]], Profile(40, 0.1 + 1e-12))
    assert with_rounding.error > 1e-3  # and without it the others cannot give it exactly


def test_damaged_and_foreign_snapshots_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, _, _ = tracked(tmp_path, steps=80, every=20)
    cut = snapshot_path(tmp_path, 20)
    cut.write_bytes(cut.read_bytes()[:-8])
    safetensors.torch.save_file({"w": torch.zeros(2)}, snapshot_path(tmp_path, 40))
    Averages(mlp(), EMAOptions(std=(0.1,))).snapshot(tmp_path, 60)
    snapshot_path(tmp_path, 100).write_bytes(b"no")
    assert [snapshot.step for snapshot in list_snapshots(tmp_path, network)] == [80]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    for line, step in zip(said, (20, 40, 60, 100), strict=True):
        assert f"snapshot-{step:08d}.safetensors is damaged or of another network and passed over" in line
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# Command lines


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run `r` of 100 steps, a random walk, with four averages and snapshots of two every 10 steps."""
    folder = tmp_path_factory.mktemp("ema")
    info = DATASETS.get("moons")(train_size=16, test_size=8).info
    description = Description("mlp", {"width": 16, "depth": 1}, VP(), Eps(), info)
    torch.manual_seed(0)
    network, run = description.network(), Run(folder / "r")
    options = {"decay": [0.9, 0.99], "warmup": True, "std": [0.05, 0.1], "snapshot_every": 10}
    averages = Averages(network, ema_options(options))
    generator = torch.Generator().manual_seed(1)
    for step in range(100):
        with torch.no_grad():
            for p in network.parameters():
                p += 0.02 * torch.randn(p.shape, generator=generator)
        averages.update(step)
        if (step + 1) % 10 == 0:
            averages.snapshot(run.path / FOLDER, step + 1)
    config = {**description.config(), "ema": options, "data": {"_target_": "sde.data.toy2d.Moons"}}
    run.write_beginning(config, info, torch.device("cpu"))
    content = {"step": 100, "config": config, "data": info.to_dict(), "model": network.state_dict()}
    save_checkpoint(run.checkpoints, {**content, **averages.state()})
    return folder


def sample(folder: Path, *arguments: str) -> np.ndarray:
    """Samples as a command line draws them, without the pictures, which take longest."""
    number = len(list(folder.glob("samples-*")))
    out = f"samples-{number}"
    with mock.patch("sde.sample.draw_pictures"):
        done = command("sde.sample", *arguments, "solver=heun", "steps=3", "n=4", f"out={out}", folder=folder)
    assert done.code == 0, done.err
    return np.load(folder / out / "samples.npz")["samples"]


def test_making_averages_and_sampling_with_them(run_folder: Path) -> None:
    done = command("sde.ema", "run=r", "std=[0.05,0.07,0.0725]", folder=run_folder)
    assert done.code == 0, done.err
    assert "warning" not in done.err
    names = [f"std{text}-step-00000100.pt" for text in ("0.050", "0.070", "0.0725")]
    lines = done.out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"r/ema/{name}" for name in names] + ["r/ema/profiles.png"]
    assert lines[0].endswith("relative error of the profile 0.0e+00, from 20 averages")
    with Image.open(run_folder / "r" / "ema" / "profiles.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    drawn = {name: sample(run_folder, "run=r", f"ema={name}") for name in ("true", "false", "0.9", "0.99", "std0.050")}
    made = [sample(run_folder, f"checkpoint=r/ema/{name}") for name in names]
    assert np.array_equal(drawn["true"], drawn["0.9"])
    assert np.array_equal(drawn["std0.050"], made[0])
    different = [drawn["true"], drawn["false"], drawn["0.99"], made[0], made[1], made[2]]
    assert len({array.tobytes() for array in different}) == 6
    assert np.array_equal(sample(run_folder, f"checkpoint=r/ema/{names[1]}", "ema=std0.07"), made[1])
    last = command("sde.sample", f"checkpoint=r/ema/{names[1]}", "ema=false", folder=run_folder)
    assert (last.code, last.sentence) == (2, f"error: r/ema/{names[1]} has averaged weights alone: use ema=true")
    info = json.loads((run_folder / "samples-2" / "info.json").read_text())
    assert info["ema"] == 0.9


def test_what_a_made_checkpoint_holds(run_folder: Path) -> None:
    done = command("sde.ema", "runs=.", "std=0.08", "step=60", "out=elsewhere", folder=run_folder)
    assert done.code == 0, done.err
    run = Run(run_folder / "r")
    path = run_folder / "elsewhere" / "std0.080-step-00000060.pt"
    checkpoint = open_checkpoint(run, str(path))
    assert checkpoint.step == 60
    assert list(averages_of(checkpoint.content)) == ["std0.08"]
    assert len(checkpoint.content["made_of"]["snapshots"]) == 10
    denoiser, _ = restore_denoiser(checkpoint)
    network = denoiser.network
    snapshots = list_snapshots(run.path / FOLDER, network)
    fit = fit_profile(profiles_of(snapshots), Profile(60, 0.08))
    assert checkpoint.content["made_of"]["error"] == fit.error
    assert_same_bits(network, weighted_sum(snapshots, fit.coefficients, network))


def test_a_fit_that_is_poor_is_said(run_folder: Path) -> None:
    done = command("sde.ema", "run=r", "std=0.01", "out=poor", folder=run_folder)
    assert done.code == 0
    assert done.sentence.startswith("warning: these snapshots cannot give std=0.01 at step 100 (error 0.5)")
    assert "keep them more often" in done.sentence
    between = command("sde.ema", "run=r", "std=0.05", "step=36", "out=poor", folder=run_folder)
    assert "take the step of one, such as step=40" in between.sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["std=0.3"], "std=0.3 is out of range: it must be above 0 and below 0.288675"),
        (["std=0"], "std=0 is out of range"),
        (["std=wide"], "std='wide' is not a number: it is the relative width of the average to make, such as std=0.1"),
        (["std="], "std= names no width: give one or several, such as std=[0.05,0.1]"),
        (["std=null"], "std= names no width"),
        (["std=[]"], "std=[] names no width"),
        ([], "the option 'std' needs a value"),
        (["std=0.1", "step=5"], "step=5 is outside the snapshots of r: give one from 10 to 100"),
        (["std=0.1", "step=101"], "step=101 is outside the snapshots"),
        (["std=0.1", "step=last"], "step='last' must be a whole number"),
    ],
)
def test_mistakes_of_the_command_line(arguments: list[str], sentence: str, run_folder: Path) -> None:
    done = command("sde.ema", "run=r", *arguments, folder=run_folder)
    assert done.code == 2
    assert sentence in done.sentence
    assert "Traceback" not in done.err


def test_a_run_without_snapshots(tmp_path: Path, run_folder: Path) -> None:
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)
    held = run_folder / "r" / "checkpoints" / "step-00000100.pt"
    (tmp_path / "r" / "checkpoints" / held.name).write_bytes(held.read_bytes())
    done = command("sde.ema", "run=r", "std=0.1", folder=tmp_path)
    assert done.code == 2
    assert "r/ema has no snapshots" in done.sentence
    assert "ema.std=[0.05,0.1] ema.snapshot_every=STEPS" in done.sentence
    kept = (run_folder / "r" / "ema" / "snapshot-00000050.safetensors").read_bytes()
    (tmp_path / "r" / "ema").mkdir()
    (tmp_path / "r" / "ema" / "snapshot-00000050.safetensors").write_bytes(kept)
    (tmp_path / "r" / "ema" / "snapshot-00000060.safetensors").write_bytes(kept[:1000])
    done = command("sde.ema", "run=r", "std=0.1", folder=tmp_path)
    assert done.code == 0
    assert "snapshot-00000060.safetensors is damaged" in done.err
    assert "std0.100-step-00000050.pt" in done.out


QUICK = {
    "sde.compare": ["solvers=[heun]", "steps=[2]", "n=4", "reference_steps=4"],
    "sde.encode": ["n=2", "steps=2", "solver=heun", "round_trip=false"],
    "sde.decode": ["n=2", "steps=2", "solver=heun"],
    "sde.likelihood": ["n=2", "method=continuous_bound"],
    "sde.interop.export": ["to=exported"],
}


@pytest.mark.parametrize("module", QUICK)
def test_every_command_takes_every_average(module: str, run_folder: Path) -> None:
    out = [] if module == "sde.interop.export" else [f"out={module}"]
    done = command(module, "run=r", "ema=std0.1", *QUICK[module], *out, folder=run_folder)
    assert done.code == 0, done.err
    if module == "sde.interop.export":
        wanted = chosen_weights(open_checkpoint(Run(run_folder / "r"), "latest"), "std0.1")
        assert_same_bits(load_pretrained(run_folder / "exported")[0].network, dict(wanted))


@pytest.mark.parametrize("module", ["sde.sample", "sde.dequantize", *QUICK])
def test_every_command_names_the_averages_that_there_are(module: str, run_folder: Path) -> None:
    options = [word for word in QUICK.get(module, []) if word.startswith("to=")]
    to = [f"to=not-{k}" for k, _ in enumerate(options)]
    unknown = command(module, "run=r", "ema=std0.15", *to, folder=run_folder)
    assert unknown.code == 2
    assert "ema=std0.15 is not an average in r/checkpoints/step-00000100.pt" in unknown.sentence
    assert "ema=true for the first, or one of 0.9, 0.99, std0.05, std0.1; did you mean 'std0.1'?" in unknown.sentence
    senseless = command(module, "run=r", "ema=maybe", *to, folder=run_folder)
    assert senseless.code == 2
    assert "ema='maybe' must be true or false, or an average that the run keeps" in senseless.sentence


def test_weights_without_names(run_folder: Path) -> None:
    """Imported weights have one average, which has no name."""
    content = dict(open_checkpoint(Run(run_folder / "r"), "latest").content)
    unnamed = {key: value for key, value in content["config"].items() if key != "ema"}
    checkpoint = Checkpoint(Path("theirs.pt"), {**content, "config": unnamed, "averages": {}})
    assert chosen_weights(checkpoint, True) is content["ema"]
    assert chosen_weights(checkpoint, False) is content["model"]
    with pytest.raises(UserError, match=r"ema=0\.9 is not an average in theirs\.pt: use ema=true for the only one"):
        chosen_weights(checkpoint, 0.9)
