r"""Networks that were trained on a discrete chain, asked at continuous times.

The discretely trained networks of score_sde_pytorch know n noise levels. Between them the original interpolates in its
own way: the label is rounded or not, and the noise level is that of the chain and not of the SDE. These
parameterizations do the same.

Networks of other projects come with a table of betas; `BetaChain` finds the place in it by the noise level alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sde.broadcast import Time, as_tensor
from sde.errors import UserError, check_choice, check_number
from sde.parameterizations import X0, Eps, Parameterization, Row, V, register
from sde.processes import SDE, VP, Cosine


@lru_cache(maxsize=8)
def chain_sigmas(sde: SDE, n: int) -> Tensor:
    """Standard deviations (n,) of the n-step chain of a variance-preserving `sde`: sqrt(1 - prod_j decay_j^2)."""
    decay = [sde.discretize(i / (n - 1) * sde.T, n).decay for i in range(n)]
    return torch.sqrt(1 - torch.cumprod(torch.tensor(decay, dtype=torch.float64) ** 2, 0))


@register("ddpm_chain")
@dataclass(frozen=True)
class DDPMChain(Parameterization):
    """F = sigma_i / sigma(t) z, i = floor(t (n - 1)): score = -F / sigma_i, with sigma_i that of DDPM's n-step chain.

    The label is t (n - 1), not rounded.

    Args:
        n: number of noise levels that the network was trained on.
    """

    n: int = 1000
    noise_label: str = "auto"

    def __post_init__(self) -> None:
        check_number("parameterization.n", self.n, at_least=2)
        self.check()

    def _position(self, sde: SDE, t: Time) -> Tensor:
        return as_tensor(t) * ((self.n - 1) / sde.T)

    def direction(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        t = as_tensor(t)
        # i / (n - 1) times n - 1 may be a rounding error below i
        index = torch.floor(self._position(sde, t) + 1e-9).long().clamp(0, self.n - 1)
        sigma = chain_sigmas(sde, self.n).to(t.device)[index]
        return torch.zeros_like(t), sigma / sde.sigma(t)

    def c_noise(self, sde: SDE, t: Time, label: str) -> Tensor:
        return self._position(sde, t)


@register("smld_chain")
@dataclass(frozen=True)
class SMLDChain(Parameterization):
    """F = -z / sigma(t), the score, with the rounded label (1 - t) (n - 1): level 0 is the noisiest (arXiv 1907.05600).

    Args:
        n: number of noise levels that the network was trained on.
    """

    n: int = 1000
    noise_label: str = "auto"

    def __post_init__(self) -> None:
        check_number("parameterization.n", self.n, at_least=2)
        self.check()

    def direction(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(as_tensor(t)), -1 / sde.sigma(t)

    def c_noise(self, sde: SDE, t: Time, label: str) -> Tensor:
        return torch.round((1 - as_tensor(t) / sde.T) * (self.n - 1))


@lru_cache(maxsize=32)
def chain_log_levels(chain: BetaChain) -> Tensor:
    """log(sigma_i / alpha_i) (n,) of a chain, in float64 and rising: alpha_i^2 = prod_{j <= i} (1 - beta_j)."""
    log_alpha_bar = torch.cumsum(torch.log1p(-chain.betas()), 0)
    return 0.5 * (torch.log(-torch.expm1(log_alpha_bar)) - log_alpha_bar)


@register("beta_chain")
@dataclass(frozen=True)
class BetaChain(Parameterization):
    r"""Networks trained on a chain with a table of betas, asked at the place whose noise level is that of time t.

    The label i(t) solves sigma_i / alpha_i = sigma(t) / alpha(t), with alpha_i^2 = (1 - beta_0) ... (1 - beta_i). At
    the levels of the chain it is a whole number and the output is just what the network was trained to give; in
    between it is interpolated in the logarithm of the noise level, or rounded. Below the lowest level and above the
    highest it stays. The SDE is any variance-preserving one (`vp`, `cosine`); how its noise level depends on t is free.

    Args:
        schedule: betas from beta_start to beta_end in equal steps ("linear", arXiv 2006.11239), their square roots in
            equal steps ("scaled_linear"), or those of a cosine alpha_i ("cosine", arXiv 2102.09672, equation 17).
        n: number of noise levels.
        beta_start: first beta of "linear" and "scaled_linear".
        beta_end: last beta of the same.
        s: offset of "cosine".
        beta_limit: largest beta of "cosine".
        predicts: "eps", "x0" or "v".
        between: what the network is told between two levels: "interpolated" or "nearest".
    """

    schedule: str = "linear"
    n: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    s: float = 0.008
    beta_limit: float = 0.999
    predicts: str = "eps"
    between: str = "interpolated"
    noise_label: str = "auto"

    def __post_init__(self) -> None:
        check_choice("parameterization.schedule", self.schedule, ("linear", "scaled_linear", "cosine"))
        check_number("parameterization.n", self.n, at_least=2)
        check_number("parameterization.beta_start", self.beta_start, above=0, below=1)
        check_number("parameterization.beta_end", self.beta_end, at_least=self.beta_start, below=1)
        check_number("parameterization.s", self.s, at_least=0, below=1)
        check_number("parameterization.beta_limit", self.beta_limit, above=0, below=1)
        check_choice("parameterization.predicts", self.predicts, _TARGETS)
        check_choice("parameterization.between", self.between, ("interpolated", "nearest"))
        self.check()

    def betas(self) -> Tensor:
        """The table (n,), in float64."""
        if self.schedule == "cosine":
            share = torch.linspace(0, 1, self.n + 1, dtype=torch.float64)
            alpha_bar = torch.cos((share + self.s) / (1 + self.s) * (0.5 * math.pi)).square()
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(self.beta_limit)
        power = 1 if self.schedule == "linear" else 2
        ends = (self.beta_start ** (1 / power), self.beta_end ** (1 / power))
        return torch.linspace(*ends, self.n, dtype=torch.float64) ** power

    def direction(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        if abs(float(sde.alpha(sde.T) ** 2 + sde.sigma(sde.T) ** 2) - 1) > 1e-6:
            raise UserError("parameterization=beta_chain needs a variance-preserving SDE: take sde=vp or sde=cosine")
        return _TARGETS[self.predicts].direction(sde, t)

    def row(self, output: str, sde: SDE, t: Time) -> Row:
        self.direction(sde, t)
        return _TARGETS[self.predicts].row(output, sde, t)

    def c_noise(self, sde: SDE, t: Time, label: str) -> Tensor:
        t = as_tensor(t)
        levels = chain_log_levels(self).to(t.device)
        level = -0.5 * sde.log_snr(t).double()
        if self.between == "nearest":
            sigmas = torch.exp(levels)
            return torch.bucketize(torch.exp(level), 0.5 * (sigmas[1:] + sigmas[:-1])).to(t.dtype)
        above = torch.bucketize(level, levels).clamp(1, self.n - 1)
        low, high = levels[above - 1], levels[above]
        return (above - 1 + (level - low) / (high - low)).clamp(0, self.n - 1).to(t.dtype)


_TARGETS: dict[str, Parameterization] = {"eps": Eps(), "x0": X0(), "v": V()}


def process_of(chain: BetaChain) -> SDE:
    """A process that runs through the noise levels of `chain`, at about the pace of its steps."""
    if chain.schedule == "cosine":
        return Cosine(s=chain.s)
    first, last = chain.n * chain.beta_start, chain.n * chain.beta_end
    if chain.schedule == "scaled_linear":  # the rate is not linear in t: as much noise in all
        last = 2 * math.log1p(math.exp(2 * float(chain_log_levels(chain)[-1]))) - first
    return VP(beta_min=first, beta_max=last)
