r"""Forward processes: each SDE is a pair of curves.

Every process here is linear, dx = f(t) x dt + g(t) dw, so that a data point x_0 becomes

    x_t = alpha(t) x_0 + sigma(t) z,    z ~ N(0, I),

with f = d log(alpha)/dt and g^2 = d(sigma^2)/dt - 2 f sigma^2 (arXiv 2011.13456, appendix B; arXiv 2107.00630).
A leaf states `log_alpha`, `sigma`, `f`, `g` and the inverse of its log signal-to-noise ratio in closed form;
everything else - transition kernels, priors, drifts - is derived from them once, in `SDE`.

t = 0 is data and t = T is noise, everywhere. t is a number or a tensor of shape () or (B,), float32 or float64;
what is returned has the shape and type of t (float64 for a number). 1 - exp is written with expm1, so float32 sigma
is right to 1e-6 at t = 1e-5.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sde.broadcast import Time, as_tensor, expand
from sde.errors import UserError, check_number
from sde.registry import Registry

SDES: Registry[SDE] = Registry("sde")
register = SDES.register


class Discretization(NamedTuple):
    """One step of an n-step forward chain x_{i+1} = decay x_i + spread z, and the reverse noise that goes with it."""

    decay: float
    spread: float
    ancestral_spread: float


class SDE(ABC):
    """A linear forward process on [0, T].

    Attributes:
        T: the time at which data has become noise.
        t_min: smallest time of training and likelihood (the paper's eps).
        t_min_sampling: time at which samplers stop, before their last denoising step.
    """

    T: float
    t_min: float
    t_min_sampling: float

    @abstractmethod
    def log_alpha(self, t: Time) -> Tensor:
        """log alpha(t)."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Standard deviation sigma(t) of x_t given x_0."""

    @abstractmethod
    def f(self, t: Time) -> Tensor:
        """Drift coefficient f(t) = d log(alpha)/dt."""

    @abstractmethod
    def g(self, t: Time) -> Tensor:
        """Diffusion coefficient g(t) >= 0."""

    @abstractmethod
    def t_of_log_snr(self, log_snr: Time) -> Tensor:
        """The time at which `log_snr(t)` has this value: the inverse of `log_snr`."""

    def unit_time(self, t: Time) -> Tensor:
        """A time from 0 (data) to 1 (noise) in which noise levels are spread out; time labels are made of it."""
        return as_tensor(t) / self.T

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior N(0, prior_std^2 I) that stands in for the law of x_T."""
        return float(self.sigma(self.T))

    def _check_times(self) -> None:
        check_number("T", self.T, above=0)
        check_number("t_min", self.t_min, above=0, below=self.T)
        check_number("t_min_sampling", self.t_min_sampling, above=0, below=self.T)

    def alpha(self, t: Time) -> Tensor:
        """Scale alpha(t) of the data in x_t."""
        return torch.exp(self.log_alpha(t))

    def log_snr(self, t: Time) -> Tensor:
        """log(alpha^2 / sigma^2), decreasing in t."""
        return 2 * (self.log_alpha(t) - torch.log(self.sigma(t)))

    def noise_level(self, t: Time) -> Tensor:
        """sigma(t) / alpha(t): the noise on x_t / alpha(t), which EDM (arXiv 2206.00364) calls sigma."""
        return self.sigma(t) * torch.exp(-self.log_alpha(t))

    def t_of_noise_level(self, noise_level: Time) -> Tensor:
        """The time at which sigma / alpha has this value."""
        return self.t_of_log_snr(-2 * torch.log(as_tensor(noise_level)))

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """f(t) x, of the shape and type of `x` (B, ...)."""
        return expand(self.f(t), x).to(x.dtype) * x

    def diffusion(self, t: Time) -> Tensor:
        """g(t), of the shape of `t`: noise enters every dimension alike."""
        return self.g(t)

    def marginal(self, x0: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and standard deviation (shape of `t`) of x_t given `x0` (B, ...)."""
        return expand(self.alpha(t), x0).to(x0.dtype) * x0, self.sigma(t)

    def perturb(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) noise, for `x0` and `noise` of the same shape (B, ...) and type."""
        alpha, sigma = (expand(c, x0).to(x0.dtype) for c in (self.alpha(t), self.sigma(t)))
        return alpha * x0 + sigma * noise

    def transition(self, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """(a, b) of the kernel x_t | x_s ~ N(a x_s, b^2 I), s <= t.

        a = alpha_t / alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2, written as -sigma_t^2 expm1(log_snr_t - log_snr_s),
        which cannot turn negative; what it loses when s is close to t is the rounding of the two log-SNRs relative to
        their difference. s may be 0: the kernel from data itself.
        """
        s, t = as_tensor(s), as_tensor(t)
        a = torch.exp(self.log_alpha(t) - self.log_alpha(s))
        shrink = -torch.expm1(self.log_snr(t) - self.log_snr(s))
        return a, self.sigma(t) * torch.sqrt(shrink.clamp_min(0))

    def prior_sample(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """A draw of `shape` (B, ...) from the prior N(0, prior_std^2 I)."""
        return self.prior_std * torch.randn(shape, generator=generator, dtype=dtype, device=device)

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """Log density in nats of `z` (B, ...) under the prior, summed over dimensions: shape (B,)."""
        d = math.prod(z.shape[1:])
        log_norm = 0.5 * d * math.log(2 * math.pi * self.prior_std**2)
        return -0.5 * (z / self.prior_std).square().flatten(1).sum(1) - log_norm

    def discretize(self, t: float, n: int) -> Discretization:
        """The n-step chain with which arXiv 2011.13456 discretizes the process, at time `t`.

        The default is Euler-Maruyama with step T / n. VP and VE have chains of their own, DDPM's and SMLD's
        (its appendix E); both are first-order approximations of `transition`, kept to reproduce published samplers.
        """
        h = self.T / n
        _, spread = self.transition(max(t - h, 0.0), t)
        ratio = float(self.sigma(max(t - h, 0.0)) / self.sigma(t))
        return Discretization(
            decay=1 + float(self.f(t)) * h,
            spread=float(self.g(t)) * math.sqrt(h),
            ancestral_spread=float(spread) * ratio,
        )


def _chain_index(share: float, n: int) -> int:
    """The number of the last chain time i / (n - 1) that is not above `share`, which may be off by rounding."""
    return math.floor(share * (n - 1) + 1e-9)


@dataclass(frozen=True)
class LinearBeta:
    """The rate beta(t) = beta_min + (t / T) (beta_max - beta_min) of VP and sub-VP, and its integral B(t)."""

    beta_min: float
    beta_max: float
    T: float

    def __post_init__(self) -> None:
        check_number("beta_min", self.beta_min, at_least=0)
        check_number("beta_max", self.beta_max, above=self.beta_min)

    @property
    def slope(self) -> float:
        """d beta / dt."""
        return (self.beta_max - self.beta_min) / self.T

    def rate(self, t: Time) -> Tensor:
        """beta(t)."""
        return self.beta_min + self.slope * as_tensor(t)

    def integral(self, t: Time) -> Tensor:
        """B(t), the integral of beta from 0 to t."""
        t = as_tensor(t)
        return t * (self.beta_min + 0.5 * self.slope * t)

    def t_of_integral(self, b: Tensor) -> Tensor:
        """The time at which the integral has the value `b`."""
        twice_rate = self.beta_min + torch.sqrt(self.beta_min**2 + 2 * self.slope * b)
        return 2 * b / twice_rate.clamp_min(torch.finfo(b.dtype).tiny)  # not 0 / 0 when beta_min and b are 0


@register("vp")
@dataclass(frozen=True)
class VP(SDE):
    """Variance-preserving SDE dx = -beta/2 x dt + sqrt(beta) dw (arXiv 2011.13456, equation 11): DDPM's limit.

    alpha = exp(-B/2), sigma^2 = 1 - exp(-B), with B the integral of beta(t) = beta_min + (t/T) (beta_max - beta_min).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    T: float = 1.0
    t_min: float = 1e-5
    t_min_sampling: float = 1e-3

    def __post_init__(self) -> None:
        self._check_times()
        _ = self.beta

    @property
    def beta(self) -> LinearBeta:
        """The rate beta and its integral."""
        return LinearBeta(self.beta_min, self.beta_max, self.T)

    @property
    def prior_std(self) -> float:
        """1: the limit of the standard deviation of x_t for data of unit variance, as the paper has it."""
        return 1.0

    def log_alpha(self, t: Time) -> Tensor:
        return -0.5 * self.beta.integral(t)

    def f(self, t: Time) -> Tensor:
        return -0.5 * self.beta.rate(t)

    def sigma(self, t: Time) -> Tensor:
        return torch.sqrt(-torch.expm1(-self.beta.integral(t)))

    def g(self, t: Time) -> Tensor:
        return torch.sqrt(self.beta.rate(t))

    def t_of_log_snr(self, log_snr: Time) -> Tensor:
        return self.beta.t_of_integral(F.softplus(-as_tensor(log_snr)))

    def discretize(self, t: float, n: int) -> Discretization:
        """DDPM's chain (arXiv 2006.11239): beta_i = beta(t_i) T / n at the chain time t_i = i T / (n - 1) below t."""
        if n < 2:
            raise UserError(f"steps={n} is too few for DDPM's chain: take at least 2")
        beta = float(self.beta.rate(_chain_index(t / self.T, n) / (n - 1) * self.T)) * self.T / n
        if beta > 1:
            least = math.ceil(self.beta_max * self.T)
            raise UserError(f"steps={n} is too few for DDPM's chain, whose beta would exceed 1: take at least {least}")
        return Discretization(math.sqrt(1 - beta), spread=math.sqrt(beta), ancestral_spread=math.sqrt(beta))


@register("subvp")
@dataclass(frozen=True)
class SubVP(SDE):
    """Sub-VP SDE dx = -beta/2 x dt + sqrt(beta (1 - exp(-2B))) dw (arXiv 2011.13456, equation 13).

    alpha = exp(-B/2), sigma = 1 - exp(-B): the variance is below that of VP at every t.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    T: float = 1.0
    t_min: float = 1e-5
    t_min_sampling: float = 1e-3

    def __post_init__(self) -> None:
        self._check_times()
        _ = self.beta

    @property
    def beta(self) -> LinearBeta:
        """The rate beta and its integral."""
        return LinearBeta(self.beta_min, self.beta_max, self.T)

    @property
    def prior_std(self) -> float:
        """1: the limit of the standard deviation of x_t for data of unit variance, as the paper has it."""
        return 1.0

    def log_alpha(self, t: Time) -> Tensor:
        return -0.5 * self.beta.integral(t)

    def f(self, t: Time) -> Tensor:
        return -0.5 * self.beta.rate(t)

    def sigma(self, t: Time) -> Tensor:
        return -torch.expm1(-self.beta.integral(t))

    def g(self, t: Time) -> Tensor:
        return torch.sqrt(-self.beta.rate(t) * torch.expm1(-2 * self.beta.integral(t)))

    def t_of_log_snr(self, log_snr: Time) -> Tensor:
        # sigma / alpha = 2 sinh(B / 2)
        return self.beta.t_of_integral(2 * torch.asinh(0.5 * torch.exp(-0.5 * as_tensor(log_snr))))


@register("ve")
@dataclass(frozen=True)
class VE(SDE):
    """Variance-exploding SDE dx = sqrt(d sigma^2/dt) dw (arXiv 2011.13456, equation 9): SMLD's limit.

    alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^(t/T). sigma(0) = sigma_min is not zero: what the paper calls
    data at t = 0 carries that much noise. sigma_max should be close to the largest distance between two data points
    (arXiv 2006.09011).
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    T: float = 1.0
    t_min: float = 1e-5
    t_min_sampling: float = 1e-5

    def __post_init__(self) -> None:
        check_number("sigma_min", self.sigma_min, above=0)
        check_number("sigma_max", self.sigma_max, above=self.sigma_min)
        self._check_times()

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min) / self.T

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def log_alpha(self, t: Time) -> Tensor:
        return 0 * as_tensor(t)

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** (as_tensor(t) / self.T)

    def f(self, t: Time) -> Tensor:
        return 0 * as_tensor(t)

    def g(self, t: Time) -> Tensor:
        return math.sqrt(2 * self._rate) * self.sigma(t)

    def t_of_log_snr(self, log_snr: Time) -> Tensor:
        return (-0.5 * as_tensor(log_snr) - math.log(self.sigma_min)) / self._rate

    def discretize(self, t: float, n: int) -> Discretization:
        """SMLD's chain (arXiv 1907.05600): sigma_i at the chain time t_i = i T / (n - 1) below t, sigma_{-1} = 0."""
        if n < 2:
            raise UserError(f"steps={n} is too few for SMLD's chain: take at least 2")
        i = _chain_index(t / self.T, n)
        sigma = float(self.sigma(i / (n - 1) * self.T))
        below = float(self.sigma((i - 1) / (n - 1) * self.T)) if i > 0 else 0.0
        spread = math.sqrt(sigma**2 - below**2)
        return Discretization(decay=1.0, spread=spread, ancestral_spread=spread * below / sigma)


@register("cosine")
@dataclass(frozen=True)
class Cosine(SDE):
    """Variance-preserving process on the cosine schedule (arXiv 2102.09672, equation 17).

    alpha = cos(phi(t)) / cos(phi(0)), phi(t) = pi/2 (t + s) / (1 + s), sigma^2 = 1 - alpha^2. alpha(1) = 0, where
    f and g are infinite, so T is below 1: the default leaves a signal-to-noise ratio of 2e-6.

    Args:
        s: offset that keeps the first noise levels from being too small, dimensionless.
    """

    s: float = 0.008
    T: float = 0.999
    t_min: float = 1e-5
    t_min_sampling: float = 1e-3

    def __post_init__(self) -> None:
        check_number("s", self.s, at_least=0, below=1)
        self._check_times()
        check_number("T", self.T, above=0, below=1)

    @property
    def _phi0(self) -> float:
        return 0.5 * math.pi * self.s / (1 + self.s)

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1 + self.s)

    def _phi(self, t: Time) -> Tensor:
        return self._phi0 + self._rate * as_tensor(t)

    @property
    def prior_std(self) -> float:
        return 1.0

    def log_alpha(self, t: Time) -> Tensor:
        # log(cos(phi) / cos(phi0)) = log1p(-v), with v written so that small t keeps its digits
        half = 0.5 * self._rate * as_tensor(t)
        v = 2 * torch.sin(half) * torch.sin(self._phi0 + half) / math.cos(self._phi0)
        return torch.log1p(-v)

    def sigma(self, t: Time) -> Tensor:
        # 1 - alpha^2 = sin(phi - phi0) sin(phi + phi0) / cos(phi0)^2
        turned = self._rate * as_tensor(t)
        return torch.sqrt(torch.sin(turned) * torch.sin(turned + 2 * self._phi0)) / math.cos(self._phi0)

    def f(self, t: Time) -> Tensor:
        return -self._rate * torch.tan(self._phi(t))

    def g(self, t: Time) -> Tensor:
        return torch.sqrt(2 * self._rate * torch.tan(self._phi(t)))

    def t_of_log_snr(self, log_snr: Time) -> Tensor:
        # alpha and sigma follow from the ratio alone, since alpha^2 + sigma^2 = 1; 2 sin(d/2) gives the turned angle
        log_snr = as_tensor(log_snr)
        cos0, sin0 = math.cos(self._phi0), math.sin(self._phi0)
        alpha, variance = torch.sqrt(torch.sigmoid(log_snr)), torch.sigmoid(-log_snr)
        sin = torch.sqrt(sin0**2 + variance * cos0**2)
        # sin(phi - phi0) = sin cos0 - alpha cos0 sin0, with the difference of two close numbers taken as a quotient
        shortfall = variance * cos0**2 / (sin + sin0) + variance / (1 + alpha) * sin0
        cos_turned = alpha * cos0**2 + sin * sin0
        return torch.atan2(cos0 * shortfall, cos_turned) / self._rate


@register("edm")
@dataclass(frozen=True)
class EDM(SDE):
    """The process of EDM (arXiv 2206.00364, table 1): alpha = 1, sigma = t.

    Args:
        T: largest noise level (the paper's sigma_max = 80 for data of standard deviation 0.5).
        t_min: smallest noise level of training.
        t_min_sampling: noise level at which samplers stop (the paper's sigma_min = 0.002).
    """

    T: float = 80.0
    t_min: float = 1e-3
    t_min_sampling: float = 2e-3

    def __post_init__(self) -> None:
        self._check_times()

    def unit_time(self, t: Time) -> Tensor:
        """Linear in log(t), from t_min to T: t itself would crowd all small noise levels together."""
        return torch.log(as_tensor(t) / self.t_min) / math.log(self.T / self.t_min)

    def log_alpha(self, t: Time) -> Tensor:
        return 0 * as_tensor(t)

    def sigma(self, t: Time) -> Tensor:
        return as_tensor(t).clone()

    def f(self, t: Time) -> Tensor:
        return 0 * as_tensor(t)

    def g(self, t: Time) -> Tensor:
        return torch.sqrt(2 * as_tensor(t))

    def t_of_log_snr(self, log_snr: Time) -> Tensor:
        return torch.exp(-0.5 * as_tensor(log_snr))


@register("rectified_flow")
@dataclass(frozen=True)
class RectifiedFlow(SDE):
    """The straight path x_t = (1 - t) x_0 + t z of rectified flow and flow matching (arXiv 2209.03003, 2210.02747).

    f = -1 / (1 - t) and g^2 = 2 t / (1 - t) are infinite at t = 1, where the signal is gone, so T is below 1: the
    default leaves a signal-to-noise ratio of 1e-6.
    """

    T: float = 0.999
    t_min: float = 1e-5
    t_min_sampling: float = 1e-3

    def __post_init__(self) -> None:
        self._check_times()
        check_number("T", self.T, above=0, below=1)

    @property
    def prior_std(self) -> float:
        return 1.0

    def log_alpha(self, t: Time) -> Tensor:
        return torch.log1p(-as_tensor(t))

    def sigma(self, t: Time) -> Tensor:
        return as_tensor(t).clone()

    def f(self, t: Time) -> Tensor:
        return -1 / (1 - as_tensor(t))

    def g(self, t: Time) -> Tensor:
        t = as_tensor(t)
        return torch.sqrt(2 * t / (1 - t))

    def t_of_log_snr(self, log_snr: Time) -> Tensor:
        return torch.sigmoid(-0.5 * as_tensor(log_snr))
