"""Problems with exact answers, shared by the tests, and lists of everything that is registered.

A test that loops over `sdes()`, `parameterizations()`, `grids()` or `solvers()` takes in whatever is added later by
itself. Reference values come from elsewhere than the package: torch.distributions, SciPy, or formulas written out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from sde.broadcast import expand
from sde.denoiser import AbstractDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from sde.grids import GRIDS, Grid
from sde.parameterizations import PARAMETERIZATIONS, Parameterization
from sde.processes import EDM, SDE, SDES, VE, VP, Cosine, RectifiedFlow, SubVP
from sde.solvers import SOLVERS, Solver

F64 = torch.float64
EPS32 = 2.0**-24  # largest relative error of one rounding
EPS64 = 2.0**-53

# The same processes far from their defaults: a time axis that does not end at 1 shows every forgotten T, and one
# that begins late every forgotten t_min.
ODD_SDES: dict[str, SDE] = {
    "vp-odd": VP(beta_min=0.05, beta_max=6.0, T=3.0, t_min=0.04, t_min_sampling=0.02),
    "subvp-odd": SubVP(beta_min=0.0, beta_max=9.0, T=2.0),
    "ve-odd": VE(sigma_min=0.02, sigma_max=15.0, T=2.5, t_min=0.05, t_min_sampling=0.2),
    "cosine-odd": Cosine(s=0.1, T=0.9),
    "edm-odd": EDM(T=12.0, t_min=0.1, t_min_sampling=0.03),
    "rectified_flow-odd": RectifiedFlow(T=0.9),
}


def all_sdes() -> dict[str, SDE]:
    """Every registered SDE with its defaults, and the odd ones."""
    return {name: cls() for name, cls in SDES.items()} | ODD_SDES


def _params(named: dict[str, Any]) -> list[Any]:
    return [pytest.param(value, id=name) for name, value in named.items()]


def sdes(*, odd: bool = True) -> list[Any]:
    """pytest parameters: every SDE, by its name."""
    return _params({n: s for n, s in all_sdes().items() if odd or n not in ODD_SDES})


def _of_a_chain(cls: type) -> bool:
    """Whether a class belongs to an importer: those know the chain of one kind of process only."""
    return cls.__module__.startswith("sde.interop.")


def parameterizations() -> list[Any]:
    """pytest parameters: every parameterization with its defaults."""
    return _params({name: cls() for name, cls in PARAMETERIZATIONS.items() if not _of_a_chain(cls)})


def all_grids() -> dict[str, Grid]:
    """Every registered grid that places its own steps (all but those given time by time)."""
    return {name: cls() for name, cls in GRIDS.items() if name != "explicit"}


def grids() -> list[Any]:
    """pytest parameters: `all_grids`."""
    return _params(all_grids())


def all_solvers() -> dict[str, Solver]:
    """Every registered solver with its defaults."""
    return {name: cls() for name, cls in SOLVERS.items()}


def solvers() -> list[Any]:
    """pytest parameters: `all_solvers`."""
    return _params(all_solvers())


def in_turn(*lists: list[Any]) -> list[Any]:
    """pytest parameters (a, b, c): every a with every b, and with each pair one c, so that c meets every a and every b.

    For a test whose claim is about pairs: all pairs of three lists, without the product of the three.
    """
    first, second, third = lists
    if len(third) > min(len(first), len(second)):
        raise ValueError("the third list is longer than another: some pairs would be missing")
    chosen = [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]
    return [pytest.param(*(p.values[0] for p in three), id="-".join(p.id for p in three)) for three in chosen]


def with_options(solver: Solver, **options: Any) -> Solver:
    """`solver` with those of `options` that it has."""
    known = {field.name for field in dataclasses.fields(solver)}  # type: ignore[arg-type]
    return dataclasses.replace(solver, **{k: v for k, v in options.items() if k in known})  # type: ignore[type-var]


def times_of(sde: SDE, n: int = 40) -> Tensor:
    """Increasing times from t_min to T, close together at both ends, float64."""
    low = torch.logspace(np.log10(sde.t_min), np.log10(0.3 * sde.T), n, dtype=F64)
    return torch.cat([low, torch.linspace(0.31 * sde.T, sde.T, n, dtype=F64)])


def moderate(sde: SDE, low: float = 0.3, high: float = 3.0) -> tuple[float, float]:
    """Times at noise levels `low` and `high`: between them every SDE is smooth and a few dozen steps are many."""
    return float(sde.t_of_noise_level(low)), float(sde.t_of_noise_level(high))


def generator(seed: int = 0) -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """Standard normals from a fixed seed."""
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


# Targets


def gaussian(sde: SDE, mean: float = 0.7, std: float = 0.5) -> GaussianDenoiser:
    """One Gaussian in one dimension."""
    return GaussianDenoiser(sde, torch.tensor([mean], dtype=F64), torch.tensor(std**2, dtype=F64))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture and its noisy versions, by torch.distributions alone."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def denoiser(self, sde: SDE) -> GaussianMixtureDenoiser:
        """The package's exact denoiser of the same mixture."""
        return GaussianMixtureDenoiser(sde, self.weights, self.means, self.covariances)

    def marginal(self, alpha: float, sigma: float) -> MixtureSameFamily:
        """The law of alpha x_0 + sigma z."""
        noise = sigma**2 * torch.eye(self.means.shape[1], dtype=F64)
        components = MultivariateNormal(alpha * self.means, alpha**2 * self.covariances + noise)
        return MixtureSameFamily(Categorical(self.weights), components)

    def score(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """grad log density at `x` (B, D), by autograd."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.marginal(alpha, sigma).log_prob(x).sum(), x)
        return grad


def mixture() -> Mixture:
    """Three correlated Gaussians in the plane, unequal in weight, place and shape."""
    root = torch.tensor([[[0.5, 0.0], [0.3, 0.2]], [[0.25, 0.0], [-0.2, 0.4]], [[0.35, 0.0], [0.0, 0.35]]], dtype=F64)
    return Mixture(
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=F64),
        means=torch.tensor([[1.0, 0.4], [-0.8, 0.9], [0.1, -1.2]], dtype=F64),
        covariances=root @ root.mT,
    )


def flow_end_point(law: Mixture, sde: SDE, x: Tensor, t: float, s: float, rtol: float = 1e-10) -> Tensor:
    """Where the probability-flow ODE carries `x` (B, D) from t to s: SciPy's DOP853 on torch.distributions' score."""

    def derivative(time: float, y: np.ndarray) -> np.ndarray:
        at = torch.tensor(y).reshape(x.shape)
        score = law.score(at, float(sde.alpha(time)), float(sde.sigma(time)))
        return (float(sde.f(time)) * at - 0.5 * float(sde.g(time)) ** 2 * score).numpy().ravel()

    solution = solve_ivp(derivative, (t, s), x.numpy().ravel(), method="DOP853", rtol=rtol, atol=0.01 * rtol)
    return torch.tensor(solution.y[:, -1]).reshape(x.shape)


def gaussian_flow(sde: SDE, x: Tensor, t: float, s: float, mean: float, std: float) -> Tensor:
    """The same for data N(mean, std^2): the flow keeps the number of standard deviations from the mean."""
    (m_t, v_t), (m_s, v_s) = (marginal_of_gaussian(sde, time, mean, std) for time in (t, s))
    return m_s + (v_s / v_t) ** 0.5 * (x - m_t)


def marginal_of_gaussian(sde: SDE, t: float, mean: float, std: float) -> tuple[float, float]:
    """Mean and variance of x_t for data N(mean, std^2)."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    return alpha * mean, alpha**2 * std**2 + sigma**2


# Networks


class NetworkFromDenoiser(nn.Module):
    """The perfect network of a denoiser: F = p E[x_0 | x_t] + q E[z | x_t], found from (c_in x, c_noise) alone.

    It undoes c_noise to learn the time, as a network would have to, so that a wrong label shows as a wrong answer.

    Args:
        denoiser: the exact answer.
        parameterization: what F should be.
        noise_label: the label that the network asks for.
    """

    def __init__(self, denoiser: AbstractDenoiser, parameterization: Parameterization, noise_label: str) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.parameterization = parameterization
        self.noise_label = noise_label
        self.calls = 0
        self.labels: list[Tensor | None] = []

    def time(self, c_noise: Tensor) -> Tensor:
        """The time (B,) that has the label `c_noise`, float64."""
        sde, c_noise = self.denoiser.sde, c_noise.double()
        kind = self.parameterization.noise_label
        kind = self.noise_label if kind == "auto" else kind
        if kind == "time":
            return time_of_unit_time(sde, c_noise / 999)
        return sde.t_of_noise_level(c_noise if kind == "sigma" else torch.exp(4 * c_noise))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        self.calls += 1
        self.labels.append(label)
        sde, t = self.denoiser.sde, self.time(c_noise)
        state = x.double() / expand(self.parameterization.c_in(sde, t), x)
        p, q = self.parameterization.direction(sde, t)
        f = expand(p, x) * self.denoiser.denoised(state, t) + expand(q, x) * self.denoiser.eps(state, t)
        return f.to(x.dtype)


def time_of_unit_time(sde: SDE, unit: Tensor) -> Tensor:
    """The inverse of `sde.unit_time`: linear in t, or in log t for the process whose t is the noise level."""
    return sde.t_min * (sde.T / sde.t_min) ** unit if isinstance(sde, EDM) else unit * sde.T


class RandomNetwork(nn.Module):
    """A small smooth random network for data of any shape; its output differs with input, noise label and class."""

    noise_label = "log_sigma"

    def __init__(self, numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        hidden = 16
        self.into = nn.Parameter(normal(numel, hidden, seed=seed, dtype=dtype) / numel**0.5)
        self.time = nn.Parameter(normal(hidden, seed=seed + 1, dtype=dtype))
        self.classes = nn.Parameter(normal(10, hidden, seed=seed + 2, dtype=dtype))
        self.out = nn.Parameter(normal(hidden, numel, seed=seed + 3, dtype=dtype) / hidden**0.5)
        self.labels: list[Tensor | None] = []

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        self.labels.append(label)
        hidden = x.flatten(1) @ self.into + c_noise[:, None] * self.time
        if label is not None:
            hidden = hidden + self.classes[label]
        return (torch.tanh(hidden) @ self.out).reshape(x.shape)


class Fixed(nn.Module):
    """A "network" that gives the same answer whatever it is asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return self.answer


# Convergence


def observed_order(error: Callable[[int], Tensor], steps: int, order: int) -> float:
    """The order at which the vector `error(n)` falls, from n = `steps` and twice and four times as many.

    An error C n^-p (1 + O(1 / n)) times n^`order` is a_n; 2 a_2n - a_n is free of the next order in every entry, so
    that entries whose two terms cancel at some n do not spoil the slope, and its growth from n to 2n gives p to
    O(n^-2). An error of another order shows as it is.
    """
    a, b, c = (n**order * error(n) for n in (steps, 2 * steps, 4 * steps))
    return order - float(torch.log2((2 * c - b).norm() / (2 * b - a).norm()))
