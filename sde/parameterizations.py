r"""What a network predicts: a direction in the plane of data and noise.

With x_t = alpha x_0 + sigma z, every prediction target of the field is a fixed combination

    F = p(t) x_0 + q(t) z,

so that x_0, z, the score and v follow from (x_t, F) by inverting one 2x2 system with determinant
D = alpha q - sigma p:

    x_0 = (q x - sigma F) / D,    eps = z = (alpha F - p x) / D,
    score = -eps / sigma,         v = alpha eps - sigma x_0.

A parameterization states p, q and the input scale c_in; nothing else. Each output is composed from the coefficients
directly - a score obtained through x_0 loses 2.5 % in float32 at t = 1e-5. In the notation of EDM (arXiv 2206.00364,
equation 7) the denoised x_0 is c_skip x + c_out F(c_in x, c_noise), with c_skip = q / D and c_out = -sigma / D.

c_noise, the number that tells the network the noise level, has a scale that its embedding was made for. `noise_label`
names it; "auto" asks the network:

    time       999 t / T (999 `unit_time`): what DDPM's sinusoidal embedding expects (arXiv 2011.13456)
    sigma      sigma / alpha, of which NCSN++'s Fourier embedding takes the logarithm itself
    log_sigma  log(sigma / alpha) / 4, EDM's c_noise
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sde.broadcast import Time, as_tensor
from sde.errors import UserError, check_choice, check_number
from sde.processes import SDE
from sde.registry import Registry

PARAMETERIZATIONS: Registry[Parameterization] = Registry("parameterization")
register = PARAMETERIZATIONS.register

NOISE_LABELS = ("time", "sigma", "log_sigma")
OUTPUTS = ("denoised", "eps", "score", "v")


class Coefficients(NamedTuple):
    """The four coefficients: denoised(x, t) = c_skip x + c_out F(c_in x, c_noise). Shape of t each."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Row(NamedTuple):
    """One output as a combination of the noisy x and the network's F: `x * x_t + F * F`.

    When the two nearly cancel (x_0 prediction at small noise) the same number is better computed as
    `x * (x_t - F) + rest * F` with `rest = x + F`; `rest` is None when there is nothing to gain.
    """

    x: Tensor
    F: Tensor
    rest: Tensor | None = None


def noise_label(kind: str, sde: SDE, t: Time) -> Tensor:
    """The noise label of `kind` (one of `NOISE_LABELS`) at time `t`, of the shape of `t`.

    Raises:
        UserError: for another kind; "index", the place in a table of noise levels, is known to chains alone.
    """
    if kind == "index":
        raise UserError("this network is told a place in a table of noise levels: use parameterization=smld_chain")
    check_choice("parameterization.noise_label", kind, NOISE_LABELS)
    if kind == "time":
        return 999 * sde.unit_time(t)
    if kind == "sigma":
        return sde.noise_level(t)
    return -0.125 * sde.log_snr(t)


class Parameterization(ABC):
    """A prediction target F = p x_0 + q z. Leaves are frozen dataclasses and state `direction`."""

    noise_label: str
    cancels: bool = False
    """Whether x_t and F nearly cancel in eps, score and v at small noise, so that `Row.rest` is worth its cost."""

    @abstractmethod
    def direction(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        """(p, q) of the shape of `t`."""

    def c_in(self, sde: SDE, t: Time) -> Tensor:
        """The factor on the network's input; 1 unless the leaf says otherwise."""
        return torch.ones_like(as_tensor(t))

    def c_noise(self, sde: SDE, t: Time, label: str) -> Tensor:
        """The network's noise label; `label` is what the network asks for, used when `noise_label` is "auto"."""
        return noise_label(label if self.noise_label == "auto" else self.noise_label, sde, t)

    def coefficients(self, sde: SDE, t: Time, label: str = "time") -> Coefficients:
        """The four coefficients at time `t`."""
        skip, out, _ = self.row("denoised", sde, t)
        return Coefficients(skip, out, self.c_in(sde, t), self.c_noise(sde, t, label))

    def row(self, output: str, sde: SDE, t: Time) -> Row:
        """The combination of x_t and F that gives `output`, one of `OUTPUTS`."""
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        p, q = self.direction(sde, t)
        det = alpha * q - sigma * p
        if output == "denoised":
            return Row(q / det, -sigma / det)
        if output == "eps":
            return Row(-p / det, alpha / det, self._rest(output, sde, t, -p / det, alpha / det))
        if output == "score":
            x, f = p / (sigma * det), -alpha / (sigma * det)
            return Row(x, f, self._rest(output, sde, t, x, f))
        check_choice("output", output, OUTPUTS)
        x, f = -(alpha * p + sigma * q) / det, (alpha**2 + sigma**2) / det
        return Row(x, f, self._rest(output, sde, t, x, f))

    def _rest(self, output: str, sde: SDE, t: Time, x: Tensor, f: Tensor) -> Tensor | None:
        return x + f if self.cancels else None

    def check(self) -> None:
        """Raise `UserError` for a noise label that does not exist."""
        check_choice("parameterization.noise_label", self.noise_label, ("auto", *NOISE_LABELS))


@register("eps")
@dataclass(frozen=True)
class Eps(Parameterization):
    """F = z: the noise (DDPM, arXiv 2006.11239; score_sde's VP and sub-VP networks)."""

    noise_label: str = "auto"

    def __post_init__(self) -> None:
        self.check()

    def direction(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        t = as_tensor(t)
        return torch.zeros_like(t), torch.ones_like(t)


@register("score")
@dataclass(frozen=True)
class Score(Parameterization):
    """F = -z / sigma: the score itself, as score_sde's VE networks do, which divide their output by sigma."""

    noise_label: str = "auto"

    def __post_init__(self) -> None:
        self.check()

    def direction(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(as_tensor(t)), -1 / sde.sigma(t)


@register("x0")
@dataclass(frozen=True)
class X0(Parameterization):
    """F = x_0: the clean data."""

    noise_label: str = "auto"
    cancels = True

    def __post_init__(self) -> None:
        self.check()

    def direction(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        t = as_tensor(t)
        return torch.ones_like(t), torch.zeros_like(t)

    def _rest(self, output: str, sde: SDE, t: Time, x: Tensor, f: Tensor) -> Tensor:
        # x + f is x (1 - alpha), less sigma for v, and 1 - alpha has its digits only when written with expm1
        rest = -x * torch.expm1(sde.log_alpha(t))
        return rest - sde.sigma(t) if output == "v" else rest


@register("v")
@dataclass(frozen=True)
class V(Parameterization):
    """F = alpha z - sigma x_0 (progressive distillation, arXiv 2202.00512)."""

    noise_label: str = "auto"

    def __post_init__(self) -> None:
        self.check()

    def direction(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        return -sde.sigma(t), sde.alpha(t)


@register("velocity")
@dataclass(frozen=True)
class Velocity(Parameterization):
    """F = dx_t/dt = alpha' x_0 + sigma' z: flow matching (arXiv 2210.02747); z - x_0 for a rectified flow."""

    noise_label: str = "auto"

    def __post_init__(self) -> None:
        self.check()

    def direction(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        f, sigma = sde.f(t), sde.sigma(t)
        return f * sde.alpha(t), 0.5 * sde.g(t) ** 2 / sigma + f * sigma


@register("edm")
@dataclass(frozen=True)
class Preconditioned(Parameterization):
    """EDM's preconditioning (arXiv 2206.00364, table 1) on any SDE: input and target have unit variance.

    With w^2 = alpha^2 sigma_data^2 + sigma^2, the variance of x_t: c_in = 1 / w and
    F = (sigma x_0 - alpha sigma_data^2 z) / (w sigma_data).

    Args:
        sigma_data: standard deviation of the data as the network sees it; `sde.data.measure_sigma_data` measures it,
            and so does training when it is "auto".
    """

    sigma_data: float = 0.5
    noise_label: str = "auto"

    def __post_init__(self) -> None:
        self.check()
        check_number("parameterization.sigma_data", self.sigma_data, above=0)

    def _std(self, sde: SDE, t: Time) -> Tensor:
        return torch.hypot(sde.alpha(t) * self.sigma_data, sde.sigma(t))

    def direction(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        w = self._std(sde, t)
        return sde.sigma(t) / (w * self.sigma_data), -sde.alpha(t) * self.sigma_data / w

    def c_in(self, sde: SDE, t: Time) -> Tensor:
        return 1 / self._std(sde, t)


class ScalarRow(NamedTuple):
    """`Row` at one time, as Python numbers."""

    x: float
    F: float
    rest: float | None


@lru_cache(maxsize=65536)
def scalar_row(parameterization: Parameterization, output: str, sde: SDE, t: float) -> ScalarRow:
    """`row` at a time given as a number, computed once in float64 however often a solver asks for it."""
    x, f, rest = parameterization.row(output, sde, t)
    return ScalarRow(x.item(), f.item(), None if rest is None else rest.item())


@lru_cache(maxsize=65536)
def scalar_input(parameterization: Parameterization, sde: SDE, t: float, label: str) -> tuple[float, float]:
    """(c_in, c_noise) at a time given as a number."""
    return parameterization.c_in(sde, t).item(), parameterization.c_noise(sde, t, label).item()


@lru_cache(maxsize=256)
def scalar_table(
    parameterization: Parameterization, output: str, sde: SDE, times: tuple[float, ...], label: str
) -> tuple[tuple[float, float, ScalarRow], ...]:
    """(c_in, c_noise, row) at each of `times`, looked up at once for a whole grid."""
    return tuple(
        (*scalar_input(parameterization, sde, t, label), scalar_row(parameterization, output, sde, t)) for t in times
    )
