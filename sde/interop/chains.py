r"""Networks that were trained on a discrete chain, asked at continuous times.

The discretely trained networks of score_sde_pytorch know n noise levels. Between them the original interpolates in its
own way: the label is rounded or not, and the noise level is that of the chain and not of the SDE. These
parameterizations do the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sde.broadcast import Time, as_tensor
from sde.errors import check_number
from sde.parameterizations import Parameterization, register
from sde.processes import SDE


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
