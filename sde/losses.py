r"""Denoising score matching (arXiv 2011.13456, equation 7).

    L = E_t [ lambda(t) E || score(x_t, t) + z / sigma ||^2 ],    x_t = alpha x_0 + sigma z,

written with the error of eps = -sigma score, in which nothing blows up at small noise:

    L = E_t [ w(t) E || eps(x_t, t) - z ||^2 ],    w = lambda / sigma^2.

The mean over t is over the uniform distribution on [t_min, T] whatever distribution the times are drawn from: each
example is weighted by the ratio of the two densities, unless `reweight` is off, which makes the density part of the
objective, as EDM does.

Weightings, with the lambda they stand for (`u` = sigma / alpha is the noise level):

    sigma2      lambda = sigma^2: equal weight on the error of eps (Song's and DDPM's simple loss)
    likelihood  lambda = g^2: a bound on -log p (arXiv 2101.09258)
    edm         (u^2 + sigma_data^2) / (u sigma_data)^2 on the error of x_0 (arXiv 2206.00364)
    min_snr     min(SNR, gamma) on the error of x_0 (arXiv 2303.09556)
    uniform     lambda = 1: equal weight on the error of the score

Distributions of t:

    uniform     on [t_min, T]
    log_normal  log u normal, cut to the range of u (EDM)
    log_snr     uniform in the log signal-to-noise ratio (arXiv 2107.00630)
    importance  proportional to w(t), so that every example counts alike; for the likelihood weighting,
                w = g^2 / sigma^2, it is the importance sampling of arXiv 2101.09258, section 5.1

All are drawn through their quantile functions, so each can be stratified: one draw in each of B equal parts of (0, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sde.denoiser import AbstractDenoiser
from sde.errors import check_choice, check_number
from sde.processes import SDE
from sde.registry import Registry

LOSSES: Registry[DenoisingScoreMatching] = Registry("loss")
register = LOSSES.register

WEIGHTINGS = ("sigma2", "likelihood", "edm", "min_snr", "uniform")
TIMES = ("uniform", "log_normal", "log_snr", "importance")

_CELLS = 1024  # of the importance distribution, equal in log-SNR


class Losses(NamedTuple):
    """What one batch gives: `loss` (B,) weighted, `eps_error` (B,) the unweighted mean square, `t` (B,)."""

    loss: Tensor
    eps_error: Tensor
    t: Tensor


@register("dsm")
@dataclass(frozen=True)
class DenoisingScoreMatching:
    """The training objective.

    Args:
        weighting: one of `WEIGHTINGS`.
        time: distribution of t, one of `TIMES`.
        stratified: one t in each of B equal parts of the distribution: less variance, the same mean.
        reweight: keep the expectation that of uniform t; off, the density of t is part of the objective.
        gamma: where `min_snr` cuts the signal-to-noise ratio off.
        sigma_data: standard deviation of the data, for the `edm` weighting.
        log_normal_mean: mean of log u for `log_normal`.
        log_normal_std: standard deviation of log u for `log_normal`.
    """

    weighting: str = "sigma2"
    time: str = "uniform"
    stratified: bool = True
    reweight: bool = True
    gamma: float = 5.0
    sigma_data: float = 0.5
    log_normal_mean: float = -1.2
    log_normal_std: float = 1.2

    def __post_init__(self) -> None:
        check_choice("loss.weighting", self.weighting, WEIGHTINGS)
        check_choice("loss.time", self.time, TIMES)
        check_number("loss.gamma", self.gamma, above=0)
        check_number("loss.sigma_data", self.sigma_data, above=0)
        check_number("loss.log_normal_std", self.log_normal_std, above=0)
        check_number("loss.log_normal_mean", self.log_normal_mean)

    def weight(self, sde: SDE, t: Tensor) -> Tensor:
        """w(t), the weight on the mean square error of eps, of the shape of `t`."""
        if self.weighting == "sigma2":
            return torch.ones_like(t)
        if self.weighting == "likelihood":
            return (sde.g(t) / sde.sigma(t)) ** 2
        if self.weighting == "edm":
            return 1 + (sde.noise_level(t) / self.sigma_data) ** 2
        if self.weighting == "min_snr":
            snr = torch.exp(sde.log_snr(t))
            return snr.clamp_max(self.gamma) / snr
        return sde.sigma(t) ** -2

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        """The time below which a share `u` (B,) in (0, 1) of the draws lies, or above which, float64."""
        if self.time == "uniform":
            return sde.t_min + u * (sde.T - sde.t_min)
        low, high = _log_levels(sde)
        if self.time == "log_normal":
            below, above = (self._normal_cdf(end) for end in (low, high))
            level = torch.special.ndtri(below + u * (above - below)) * self.log_normal_std + self.log_normal_mean
        elif self.time == "log_snr":
            level = low + u * (high - low)
        else:
            cumulative, _ = _importance(self, sde, u.device)
            cell = torch.searchsorted(cumulative, u, right=True).clamp(1, _CELLS) - 1
            inside = (u - cumulative[cell]) / (cumulative[cell + 1] - cumulative[cell])
            level = low + (high - low) * (cell + inside) / _CELLS
        return sde.t_of_noise_level(torch.exp(level.clamp(low, high))).clamp(sde.t_min, sde.T)

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        """Density of the draws of t with respect to dt, of the shape of `t`."""
        if self.time == "uniform":
            return torch.full_like(t, 1 / (sde.T - sde.t_min))
        low, high = _log_levels(sde)
        level = torch.log(sde.noise_level(t))
        # d log u / dt = g^2 / (2 sigma^2)
        speed = 0.5 * (sde.g(t) / sde.sigma(t)) ** 2
        if self.time == "log_snr":
            return speed / (high - low)
        if self.time == "log_normal":
            below, above = (self._normal_cdf(end) for end in (low, high))
            peak = (above - below) * self.log_normal_std * math.sqrt(2 * math.pi)
            standard = (level - self.log_normal_mean) / self.log_normal_std
            return speed * torch.exp(-0.5 * standard**2) / peak
        _, shares = _importance(self, sde, t.device)
        cell = ((level - low) / (high - low) * _CELLS).long().clamp(0, _CELLS - 1)
        return speed * shares[cell] * _CELLS / (high - low)

    def _normal_cdf(self, log_level: float) -> float:
        # erfc keeps the digits of the lower tail, where 1 + erf rounds to 0
        return 0.5 * math.erfc((self.log_normal_mean - log_level) / self.log_normal_std / math.sqrt(2))

    def draw_times(self, sde: SDE, n: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """`n` times, float64 (n,)."""
        u = torch.rand(n, generator=generator, dtype=torch.float64, device=device)
        if self.stratified:
            u = (torch.arange(n, device=device) + u) / n
        return self.quantile(sde, u.clamp(1e-12, 1 - 1e-12))

    def at(
        self, denoiser: AbstractDenoiser, x0: Tensor, z: Tensor, t: Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss and unweighted error of eps (B,) each, at given noise and times, computed in float32 or wider.

        Args:
            denoiser: what is trained or judged.
            x0: data (B, ...), as the network sees it.
            z: standard normal noise of the same shape.
            t: times (B,).
            label: class labels (B,) or None.
        """
        error = denoiser.eps_error(x0, z, t, label)
        if error.dtype in (torch.float16, torch.bfloat16):
            error = error.float()
        eps_error = error.square().flatten(1).mean(1)
        weight = self.weight(denoiser.sde, t)
        if self.reweight and self.time != "uniform":
            weight = weight / (self.density(denoiser.sde, t) * (denoiser.sde.T - denoiser.sde.t_min))
        return weight.to(eps_error.dtype) * eps_error, eps_error

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        x0: Tensor,
        generator: torch.Generator | None = None,
        label: Tensor | None = None,
    ) -> Losses:
        """Loss of each example of a batch `x0` (B, ...), mean over its dimensions, at times and noise drawn here."""
        t = self.draw_times(denoiser.sde, x0.shape[0], generator, x0.device)
        z = torch.empty_like(x0).normal_(generator=generator)
        loss, eps_error = self.at(denoiser, x0, z, t, label)
        return Losses(loss, eps_error, t)


@lru_cache(maxsize=32)
def _log_levels(sde: SDE) -> tuple[float, float]:
    """log(sigma / alpha) at t_min and T."""
    return math.log(sde.noise_level(sde.t_min)), math.log(sde.noise_level(sde.T))


@lru_cache(maxsize=32)
def _importance(loss: DenoisingScoreMatching, sde: SDE, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cumulative shares (cells + 1,) and shares (cells,) of the distribution proportional to w(t) dt."""
    low, high = _log_levels(sde)
    edges = torch.linspace(low, high, _CELLS + 1, dtype=torch.float64)
    middle = sde.t_of_noise_level(torch.exp(0.5 * (edges[1:] + edges[:-1])))
    speed = 0.5 * (sde.g(middle) / sde.sigma(middle)) ** 2
    shares = loss.weight(sde, middle) / speed
    shares = shares / shares.sum()
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(shares, 0)])
    return cumulative.to(device), shares.to(device)
