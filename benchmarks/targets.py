"""Data whose score is known exactly, on any SDE, and where the probability-flow ODE leads from given noise.

    ring      8 modes in the plane, radius 0.69, standard deviation 0.05, the first at angle 0.3, weights proportional
              to 1 2 3 4 2 1 4 3
    sixteen   5 modes in 16 dimensions whose covariances differ: principal axes of their own, standard deviations from
              0.03 to 0.55 in one mode; weights proportional to 1 2 3 4 5

Both have a standard deviation of about 0.5 per dimension, as pictures in [-1, 1] have. No solver has been tuned on the
second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from sde.broadcast import Time
from sde.denoiser import AbstractDenoiser, Evaluation, GaussianMixtureDenoiser
from sde.processes import SDE


class SharedVarianceMixture(AbstractDenoiser):
    """The exact denoiser of equally wide, round modes: `GaussianMixtureDenoiser` with all constants of a time settled.

    denoised = (alpha v x + sigma^2 sum_k share_k m_k) / V with V = alpha^2 v + sigma^2. Modes come first in the tensors
    in between, which makes the softmax over them many times as fast.

    Args:
        sde: the forward process.
        weights: (K,) positive.
        means: (K, D).
        variance: v of every mode.
    """

    weights: Tensor
    means: Tensor

    def __init__(self, sde: SDE, weights: Tensor, means: Tensor, variance: float) -> None:
        super().__init__()
        self.sde = sde
        self.variance = variance
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("means", means)

    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        if isinstance(t, Tensor) and t.ndim:
            mixture = GaussianMixtureDenoiser(self.sde, self.weights, self.means, self._full_variance())
            return mixture.output(name, x, t, label)
        return self._evaluation(name, float(t), x)(x)

    def evaluations(
        self, name: str, times: Sequence[float], like: Tensor, label: Tensor | None = None
    ) -> list[Evaluation]:
        return [self._evaluation(name, float(t), like) for t in times]

    def _evaluation(self, name: str, t: float, like: Tensor) -> Evaluation:
        alpha, sigma = float(self.sde.alpha(t)), float(self.sde.sigma(t))
        total = alpha**2 * self.variance + sigma**2
        means = self.means.to(like)
        bias = torch.log(self.weights.to(like)) - alpha**2 / (2 * total) * means.square().sum(1)
        # `on_x` and `on_mean` of the output as a combination of x and of the modes' mean
        on_x, on_mean = {
            "denoised": (alpha * self.variance / total, sigma**2 / total),
            "eps": (sigma / total, -alpha * sigma / total),
            "score": (-1 / total, alpha / total),
            "v": (alpha * sigma * (1 - self.variance) / total, -sigma * (alpha**2 + sigma**2) / total),
        }[name]
        return partial(
            _from_shares, means=means * (alpha / total), bias=bias[:, None], on_x=on_x, ends=means.T * on_mean
        )

    def _full_variance(self) -> Tensor:
        return torch.tensor(self.variance, dtype=self.means.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` draws of data, (n, D)."""
        mixture = GaussianMixtureDenoiser(self.sde, self.weights, self.means, self._full_variance())
        return mixture.sample(n, generator)


def _from_shares(x: Tensor, means: Tensor, bias: Tensor, on_x: float, ends: Tensor) -> Tensor:
    share = torch.softmax(torch.addmm(bias, means, x.T), dim=0)
    return torch.add((ends @ share).T.contiguous(), x, alpha=on_x)


def ring(sde: SDE, dtype: torch.dtype = torch.float64) -> AbstractDenoiser:
    """Eight unequal modes on a ring, (2,)."""
    angle = 0.3 + 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    means = 0.69 * torch.stack([angle.cos(), angle.sin()], dim=1)
    weights = torch.tensor([1, 2, 3, 4, 2, 1, 4, 3], dtype=torch.float64)
    return SharedVarianceMixture(sde, weights.to(dtype), means.to(dtype), 0.05**2)


def unequal(sde: SDE, numel: int, dtype: torch.dtype = torch.float64) -> GaussianMixtureDenoiser:
    """Five modes of unequal covariances, (numel,)."""
    random = np.random.default_rng(numel)
    weights = np.arange(1.0, 6.0)
    means = 0.4 * random.standard_normal((5, numel))
    widths = np.stack([random.permutation(np.geomspace(0.03, 0.55, numel)) for _ in range(5)])
    axes = np.linalg.qr(random.standard_normal((5, numel, numel)))[0]
    covariances = np.einsum("kij,kj,klj->kil", axes, widths**2, axes)
    tensors = (torch.from_numpy(value).to(dtype) for value in (weights, means, covariances))
    return GaussianMixtureDenoiser(sde, *tensors)


def sixteen(sde: SDE, dtype: torch.dtype = torch.float64) -> AbstractDenoiser:
    """Five modes of unequal covariances, (16,)."""
    return unequal(sde, 16, dtype)


TARGETS = {"ring": ring, "sixteen": sixteen}


def end_points(denoiser: AbstractDenoiser, x: Tensor, tolerance: float = 1e-11) -> Tensor:
    """Where the probability-flow ODE leads from `x` (B, D) float64 at T by t_min_sampling.

    By SciPy's DOP853 on dy/dl = u eps(alpha y), y = x / alpha, l = log u, u = sigma / alpha: none of the package's
    solvers. At the default tolerance the results are good to 1e-10.
    """
    sde = denoiser.sde

    def derivative(level: float, y: np.ndarray) -> np.ndarray:
        u = math.exp(level)
        t = float(sde.t_of_noise_level(u))
        state = torch.from_numpy(y).reshape(x.shape) * float(sde.alpha(t))
        return (u * denoiser.eps(state, t)).numpy().reshape(-1)

    ends = [-0.5 * float(sde.log_snr(t)) for t in (sde.T, sde.t_min_sampling)]
    start = (x / float(sde.alpha(sde.T))).numpy().reshape(-1)
    solution = solve_ivp(derivative, ends, start, method="DOP853", rtol=tolerance, atol=tolerance)
    assert solution.success, solution.message
    return torch.from_numpy(solution.y[:, -1]).reshape(x.shape) * float(sde.alpha(sde.t_min_sampling))
