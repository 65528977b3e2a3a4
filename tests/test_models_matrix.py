"""Every model under every parameterization on every SDE: identities between outputs to rounding, finite gradients.

The relations that define the outputs, with (p, q) the direction of the parameterization,

    x = alpha denoised + sigma eps,    F = p denoised + q eps,
    score = -eps / sigma,              v = alpha eps - sigma denoised,

fix them uniquely. Each is checked in float64 at both ends of time and between. Both sides are sums of a few products;
every coefficient has some six roundings, and a bound of 16 roundings of the sizes of the terms holds all of them.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sde.interop.chains  # noqa: F401 - registers its parameterizations
from sde.broadcast import expand
from sde.denoiser import Denoiser
from sde.errors import UserError
from sde.losses import DenoisingScoreMatching
from sde.models import MODELS
from sde.parameterizations import PARAMETERIZATIONS, Eps, Parameterization, Velocity
from sde.processes import EDM, SDE, SDES, VE
from tests.problems import EPS64, F64, normal
from tests.problems import parameterizations as general
from tests.small_models import build, shape_of

ROUNDINGS = 16 * 2 * EPS64

# Further settings of registered models that change how they are told the noise level.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in sorted(MODELS)} | {
    "ncsnpp-fourier": ("ncsnpp", {"embedding": "fourier", "scale_by_sigma": True}),
    "ncsnpp-index": ("ncsnpp", {"embedding": "positional", "scale_by_sigma": True}),
    "ddpm-index": ("ddpm", {"scale_by_sigma": True}),
    "ncsnv2-index": ("ncsnv2", {"noise_label": "index"}),
}

# Parameterizations of networks that were trained on a chain: what the network is told, the chain, its processes.
CHAINS = [
    ("time", "ddpm_chain", "vp"),
    ("time", "beta_chain", "vp"),
    ("time", "beta_chain", "cosine"),
    ("index", "smld_chain", "ve"),
]


@cache
def model_of(variant: str, dtype: torch.dtype) -> nn.Module:
    """The small model, which tests share and leave as it is: in evaluation mode nothing in it changes."""
    name, settings = VARIANTS[variant]
    return build(name, **settings).to(dtype)


def label_kind(variant: str) -> str:
    kind = model_of(variant, torch.float32).noise_label
    assert isinstance(kind, str)
    return kind


def triples() -> list[Any]:
    """pytest parameters: every (variant, parameterization, SDE) that belong together.

    A network that is told an index looks its noise level up in a table, of which `smld_chain` alone knows the places:
    the others tell a time or a noise level. Chains belong to certain processes and to networks that are told places.
    """
    found = []
    for variant in VARIANTS:
        kind = label_kind(variant)
        pairs = [(str(p.id), sde) for p in general() for sde in SDES] if kind != "index" else []
        pairs += [pair for told, *pair in CHAINS if told == kind]
        found += [pytest.param(variant, *pair, id="-".join((variant, *pair))) for pair in pairs]
    return found


def times(sde: SDE) -> Tensor:
    """Both ends, where samplers stop, and noise levels of 0.3 and 3, in float64."""
    between = [float(sde.t_of_noise_level(level)) for level in (0.3, 3.0)]
    return torch.tensor([sde.t_min, sde.t_min_sampling, *between, sde.T], dtype=F64)


def noise_label(kind: str, parameterization: str, sde: SDE, t: Tensor) -> Tensor:
    """What a network of a kind is told, from the definitions."""
    if parameterization == "smld_chain":
        return torch.round((1 - t / sde.T) * 999)
    if parameterization == "ddpm_chain":
        return 999 * t / sde.T
    level = sde.sigma(t) / sde.alpha(t)
    if parameterization == "beta_chain":
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        levels = 0.5 * np.log((1 - alpha_bar) / alpha_bar)
        return torch.from_numpy(np.interp(level.log().numpy(), levels, np.arange(1000)))
    log_time = torch.log(t / sde.t_min) / math.log(sde.T / sde.t_min)
    unit = log_time if isinstance(sde, EDM) else t / sde.T
    return {"time": 999 * unit, "sigma": level, "log_sigma": torch.log(level) / 4}[kind]


def assert_within(difference: Tensor, size: Tensor) -> None:
    """`difference` (B, ...) is rounding of terms of `size`, at each time."""
    assert bool(difference.isfinite().all())
    assert bool((difference.abs() <= ROUNDINGS * size).all()), float((difference.abs() / size).max() / EPS64)


@pytest.mark.parametrize(("variant", "parameterization_name", "sde_name"), triples())
def test_outputs_keep_their_identities(variant: str, parameterization_name: str, sde_name: str) -> None:
    sde, parameterization = SDES.get(sde_name)(), PARAMETERIZATIONS.get(parameterization_name)()
    model, t = model_of(variant, F64), times(sde)
    shape = shape_of(VARIANTS[variant][0])
    x0, z = normal(len(t), *shape), normal(len(t), *shape, seed=1)
    x = sde.perturb(x0, t, z)
    denoiser = Denoiser(model, sde, parameterization)
    with torch.no_grad():
        denoised, eps, score, v = (denoiser.output(name, x, t) for name in ("denoised", "eps", "score", "v"))
        error = denoiser.eps_error(x0, z, t)
        scaled = expand(parameterization.c_in(sde, t), x) * x
        f = model(scaled, noise_label(label_kind(variant), parameterization_name, sde, t))
        raw = denoiser.raw(x, t)
    # the label of the definition may differ from the package's in its last bits, which phases of up to 999 rad or of
    # 100 cycles per unit turn into as many times as much
    assert float((f - raw).norm() / raw.norm()) < 1e4 * EPS64
    size = {name: size_of(name, parameterization, sde, t, x, raw) for name in ("denoised", "eps", "score", "v")}
    alpha, sigma = expand(sde.alpha(t), x), expand(sde.sigma(t), x)
    p, q = (expand(c, x) for c in parameterization.direction(sde, t))
    assert_within(alpha * denoised + sigma * eps - x, alpha * size["denoised"] + sigma * size["eps"])
    assert_within(p * denoised + q * eps - raw, p.abs() * size["denoised"] + q.abs() * size["eps"])
    assert_within(sigma * score + eps, sigma * size["score"] + size["eps"])
    assert_within(v - alpha * eps + sigma * denoised, size["v"] + alpha * size["eps"] + sigma * size["denoised"])
    # the error of eps, which the loss computes another way
    target = (p * x0).abs() + (q * z).abs()
    scale = expand(parameterization.row("eps", sde, t).F, x).abs()
    assert_within(error - (eps - z), size["eps"] + scale * (raw.abs() + target) + z.abs())


def size_of(name: str, parameterization: Parameterization, sde: SDE, t: Tensor, x: Tensor, f: Tensor) -> Tensor:
    """The sum of the absolute values of the terms of an output."""
    row = parameterization.row(name, sde, t)
    on_x, on_f = expand(row.x, x).abs(), expand(row.F, x).abs()
    return on_x * (x.abs() + f.abs()) + on_f * f.abs()


@pytest.mark.parametrize(("variant", "parameterization_name", "sde_name"), triples())
def test_the_loss_and_its_gradients_are_finite(variant: str, parameterization_name: str, sde_name: str) -> None:
    """In float32, from t_min to T."""
    sde, parameterization = SDES.get(sde_name)(), PARAMETERIZATIONS.get(parameterization_name)()
    model = model_of(variant, torch.float32)
    shape, t = shape_of(VARIANTS[variant][0]), times(sde)
    x0, z = (normal(len(t), *shape, seed=seed, dtype=torch.float32) for seed in (0, 1))
    loss, error = DenoisingScoreMatching().at(Denoiser(model, sde, parameterization), x0, z, t)
    assert torch.equal(loss, error)  # this weighting is 1
    assert bool((loss > 0).all() & loss.isfinite().all())
    parameters = dict(model.named_parameters())
    for key, gradient in zip(parameters, torch.autograd.grad(loss.sum(), list(parameters.values())), strict=True):
        assert bool(gradient.isfinite().all()), key
        assert float(gradient.abs().max()) > 0, key


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if label_kind(variant) == "index"])
def test_an_index_is_given_by_its_chain_alone(variant: str) -> None:
    x = normal(1, *shape_of(VARIANTS[variant][0]))
    for parameterization in (Eps(), Velocity()):
        with pytest.raises(UserError, match="use parameterization=smld_chain"):
            Denoiser(model_of(variant, F64), VE(), parameterization).denoised(x, 0.5)


def test_the_matrix_is_whole() -> None:
    """Every model, parameterization and SDE that is registered has its place in it."""
    variants, parameterizations, sdes = (set(column) for column in zip(*(p.values for p in triples()), strict=True))
    assert variants == set(VARIANTS)
    assert {VARIANTS[str(variant)][0] for variant in variants} == set(MODELS)
    assert parameterizations == set(PARAMETERIZATIONS)
    assert sdes == set(SDES)
