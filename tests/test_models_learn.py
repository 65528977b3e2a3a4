"""Every model file of conf/model learns: the loss falls from that of knowing nothing most of the way to the exact one.

The data are two pictures and noise: x_0 = +-p + s w, p one half bright and one dark, w standard normal; the class is
the sign. With v = 1 + s^2 the mean square of an entry, three errors of eps are known on the same draws of x_0, z, t:

    z^2                                   of zero, which a fresh model gives
    alpha^2 v / (alpha^2 v + sigma^2)     expected, of the best multiple of x: it knows how bright pictures are, no more
    ||eps*(x, t) - z||^2 / D              of the exact posterior mean, which no model can beat

A model that knows the pictures comes close to the last. Half of the examples are trained without their class; so the
model answers without, and given the right class, must do better than when given the wrong one.

Sizes are cut (channels, levels, depth); what makes a file differ from others stays. Files that are then the same are
trained once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from sde.broadcast import expand
from sde.config import build, conf_dir
from sde.denoiser import Denoiser, GaussianMixtureDenoiser
from sde.interop.chains import SMLDChain
from sde.losses import DenoisingScoreMatching
from sde.parameterizations import Eps, Parameterization, Score
from sde.processes import SDE, VE, VP
from sde.training.ema import EMA
from tests.problems import F64, generator
from tests.test_config import options

SPREAD = 0.3  # s
BATCH = 16
DRAWS = 1024
LOSS = DenoisingScoreMatching()
SHAPES = {"MLP": (2,), "UNet1d": (1, 16)}
PICTURE = (1, 4, 8)
STEPS = {"MLP": 500, "DiT": 250, "NCSN": 200, "NCSNv2": 200, "EDM2": 160}  # of the others: 100
RATES = {"EDM2": 1e-2}  # of weights that are forced to unit magnitude; of the others: 3e-3
DEEP = 8  # blocks of a level in the "deep" files, which are about nothing else


def kind_of(settings: dict[str, Any]) -> str:
    return str(settings["_target_"]).rpartition(".")[2]


def shrunken(name: str) -> dict[str, Any]:
    """The settings of a file, with channels, levels and depth cut, and without dropout."""
    node = options("model", name)
    kind = kind_of(node)
    sizes: dict[str, Any] = {"channels": 8, "dropout": 0.0, "num_scales": 10, "attention_resolutions": [4]}
    if "blocks_per_level" in node:
        sizes |= {"channel_multipliers": [min(m, 2) for m in node["channel_multipliers"][:3]]}
        sizes |= {"blocks_per_level": node["blocks_per_level"] if node["blocks_per_level"] == DEEP else 1}
    if kind == "UNet1d":
        sizes |= {"attention_lengths": [4], "heads": 2}
    if node.get("head_channels"):
        sizes |= {"head_channels": 8}
    if kind in ("DiT", "MLP"):
        sizes |= {"patch_size": 2, "width": 32, "depth": min(node["depth"], 4), "heads": 4}
    return node | {key: value for key, value in sizes.items() if key in node}


def groups() -> list[Any]:
    """pytest parameters: settings as JSON, each with the names of all files that share them."""
    names: dict[str, list[str]] = {}
    for path in sorted((conf_dir() / "model").glob("*.yaml")):
        names.setdefault(json.dumps(shrunken(path.stem), sort_keys=True), []).append(path.stem)
    params = []
    for node, same in names.items():
        settings = json.loads(node)
        slow = settings.get("blocks_per_level") == DEEP or kind_of(settings) == "NCSN"
        params.append(pytest.param(node, id="=".join(same), marks=[pytest.mark.slow] if slow else []))
    return params


def process_of(settings: dict[str, Any], noise_label: str) -> tuple[SDE, Parameterization]:
    """What such a model is made for: those that give a score divided by the noise level, VE; the others, eps on VP."""
    if noise_label == "index":
        return VE(sigma_min=0.1, sigma_max=10.0), SMLDChain(n=settings["num_scales"])
    if settings.get("scale_by_sigma"):
        return VE(sigma_min=0.1, sigma_max=10.0), Score()
    return VP(), Eps()


def picture(shape: tuple[int, ...]) -> Tensor:
    """p: 1 in the first half of the last axis, -1 in the second."""
    return torch.where(torch.arange(shape[-1]) < shape[-1] // 2, 1.0, -1.0).expand(shape)


def draw(shape: tuple[int, ...], n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """`n` examples of data (n, *shape) and their classes (n,): 0 for p, 1 for -p."""
    label = torch.randint(2, (n,), generator=random)
    x0 = expand(1.0 - 2.0 * label, torch.empty(n, *shape)) * picture(shape)
    return x0 + SPREAD * torch.randn(n, *shape, generator=random), label


@dataclass(frozen=True)
class Outcome:
    """Errors of eps (DRAWS,) on the same draws.

    Args:
        free: of the trained model without the class.
        right: of the trained model told the class.
        wrong: of the trained model told the other class.
        fresh: of the model before training.
        zero: of 0.
        multiple: expected, of the best multiple of x.
        exact: of the exact posterior mean without the class.
        exact_of_class: of the exact posterior mean given the class.
    """

    free: Tensor
    right: Tensor
    wrong: Tensor
    fresh: Tensor
    zero: Tensor
    multiple: Tensor
    exact: Tensor
    exact_of_class: Tensor


@cache
def trained(node: str) -> Outcome:
    settings = json.loads(node)
    kind = kind_of(settings)
    shape: tuple[int, ...] = SHAPES.get(kind, PICTURE)
    torch.manual_seed(0)
    network = build(settings, "model", shape=shape, num_classes=2)
    sde, parameterization = process_of(settings, network.noise_label)
    denoiser, ema = Denoiser(network, sde, parameterization), EMA(network, decay=0.95)
    averaged = Denoiser(ema.network, sde, parameterization)
    (fresh,) = evaluate(averaged, shape, "free")
    optimizer, random = torch.optim.Adam(network.parameters(), RATES.get(kind, 3e-3)), generator(0)
    for step in range(STEPS.get(kind, 100)):
        x0, label = draw(shape, BATCH, random)
        told = torch.where(torch.rand(BATCH, generator=random) < 0.5, 2, label)
        optimizer.zero_grad()
        LOSS(denoiser, x0, random, told).loss.mean().backward()
        optimizer.step()
        ema.update(step)
    return Outcome(*evaluate(averaged, shape, "free", "right", "wrong"), fresh, *known(sde, shape))


def evaluation(sde: SDE, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The draws x_0, z, t and classes on which everything is compared."""
    random = generator(1)
    x0, label = draw(shape, DRAWS, random)
    z = torch.randn(x0.shape, generator=random)
    return x0, z, LOSS.draw_times(sde, DRAWS, random, "cpu"), label


@torch.no_grad()
def evaluate(denoiser: Denoiser, shape: tuple[int, ...], *classes: str) -> list[Tensor]:
    """Errors of eps (DRAWS,), told no class ("free"), the right or the wrong one."""
    x0, z, t, label = evaluation(denoiser.sde, shape)
    told = {"free": None, "right": label, "wrong": 1 - label}
    return [LOSS.at(denoiser, x0, z, t, told[name])[1].double() for name in classes]


def known(sde: SDE, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Errors of zero, of the best multiple of x, and of the exact posterior mean without and with the class."""
    x0, z, t, label = evaluation(sde, shape)
    x0, z, p, variance = x0.double(), z.double(), picture(shape).double(), torch.tensor(SPREAD**2, dtype=F64)
    signal, noise = sde.alpha(t) ** 2 * (1 + variance), sde.sigma(t) ** 2
    law = GaussianMixtureDenoiser(sde, torch.ones(2, dtype=F64), torch.stack([p, -p]), variance)
    mean = expand(1.0 - 2.0 * label, x0) * p
    # given the class the data are Gaussian: eps = sigma (x - alpha mean) / (alpha^2 s^2 + sigma^2)
    offset = sde.perturb(x0, t, z) - expand(sde.alpha(t), x0) * mean
    eps = expand(sde.sigma(t) / (sde.alpha(t) ** 2 * variance + noise), x0) * offset
    exact_of_class = (eps - z).square().flatten(1).mean(1)
    return z.square().flatten(1).mean(1), signal / (signal + noise), LOSS.at(law, x0, z, t)[1], exact_of_class


def standard_errors(difference: Tensor) -> float:
    """The mean of paired differences in units of its standard error."""
    return float(difference.mean() / difference.std() * len(difference) ** 0.5)


@pytest.mark.parametrize("node", groups())
def test_it_learns_and_uses_the_class(node: str) -> None:
    found = trained(node)
    zero, multiple, exact = (float(error.mean()) for error in (found.zero, found.multiple, found.exact))
    # outputs of a fresh model are below 1e-3, times noise levels of up to 10
    assert float(found.fresh.mean()) == pytest.approx(zero, abs=0.02)
    assert exact < multiple < zero
    # more than half way from the best multiple of x to the exact answer, and not beyond it
    assert float(found.free.mean()) < 0.5 * (multiple + exact)
    assert standard_errors(found.free - found.exact) > -4
    assert standard_errors(found.right - found.exact_of_class) > -4
    assert standard_errors(found.wrong - found.right) > 4


def test_every_file_is_trained() -> None:
    names = [name for group in groups() for name in str(group.id).split("=")]
    assert sorted(names) == sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))


@pytest.mark.parametrize("sde", [VP(), VE(sigma_min=0.1, sigma_max=10.0)])
def test_the_known_errors_are_ordered_as_derived(sde: SDE) -> None:
    """The best multiple's error as expected is that of its draws; knowing the class helps the exact answer."""
    x0, z, t, _ = evaluation(sde, PICTURE)
    zero, multiple, exact, exact_of_class = known(sde, PICTURE)
    x, v = sde.perturb(x0, t, z).double(), 1 + SPREAD**2
    gain = expand(sde.sigma(t) / (sde.alpha(t) ** 2 * v + sde.sigma(t) ** 2), x)
    drawn = (gain * x - z).square().flatten(1).mean(1)
    assert abs(standard_errors(drawn - multiple)) < 4
    assert standard_errors(zero - drawn) > 4
    assert standard_errors(drawn - exact) > 4
    assert standard_errors(exact - exact_of_class) > 4
