r"""Time grids: where a solver stops on its way from noise to data.

A grid turns an SDE and a number of steps into steps + 1 decreasing times, the first at T and the last at
`sde.t_min_sampling`. It knows no solver, and no solver chooses its times itself. Nearly all grids are equal steps in
some function of time: of t itself (`uniform`, `quadratic`), or of the noise level sigma / alpha (arXiv 2206.00364),
which is what k-diffusion and diffusers call sigma, so that a grid places the same noise levels on every SDE.

Other libraries count levels and append a zero: n of theirs are steps = n - 1 here, and what they do on the way from the
last level to zero is the solver's `final`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sde.errors import UserError, check_number
from sde.processes import SDE
from sde.registry import Registry

GRIDS: Registry[Grid] = Registry("grid")
register = GRIDS.register

_ROUNDING = 1e-6  # relative; levels that come from elsewhere are often float32


class Grid(ABC):
    """Places of the steps between T and t_min_sampling. Leaves are frozen dataclasses and state `interior`."""

    @abstractmethod
    def interior(self, sde: SDE, steps: int) -> Tensor:
        """The steps + 1 times before their ends are set exactly, float64, decreasing."""

    def ends(self, sde: SDE) -> tuple[float, float]:
        """The first and the last time."""
        return sde.T, sde.t_min_sampling

    def __call__(self, sde: SDE, steps: int) -> list[float]:
        """The times, decreasing: `steps` + 1 of them, from one of `ends` to the other.

        Raises:
            UserError: for fewer than one step, or options that crowd the steps until two of them coincide.
        """
        check_steps(steps)
        times = self.interior(sde, steps).tolist()
        times[0], times[-1] = self.ends(sde)
        if not all(t > s for t, s in pairwise(times)):  # false for NaN too
            raise UserError(
                f"{self} puts some of steps={steps} closer together than float64 can tell apart: take fewer steps, or "
                f"options nearer to their defaults"
            )
        return times

    def place(self, sde: SDE, steps: int | None, default: int) -> list[float]:
        """The grid of `steps` steps, of `default` where None leaves it open; a grid of given times has its own."""
        return self(sde, default if steps is None else steps)


def check_steps(steps: int) -> None:
    """Raise `UserError` unless `steps` is a whole number of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"steps={steps!r} must be a whole number of at least 1")


def _linear(high: float, low: float, steps: int) -> Tensor:
    """`steps` + 1 equally spaced values from `high` to `low`."""
    return torch.linspace(high, low, steps + 1, dtype=torch.float64)


def _linear_in_root(high: float, low: float, power: float, steps: int) -> Tensor:
    """Logarithms of values whose 1/`power`-th powers are equally spaced; `high` and `low` are logarithms as well.

    With expm1 and log1p of the ratios to the first value, no `power` overflows, and a large one turns into the equal
    steps in the logarithm that are its limit instead of losing its digits.
    """
    return high + power * torch.log1p(_linear(0, 1, steps) * math.expm1((low - high) / power))


def _log_levels(sde: SDE, ends: tuple[float, float]) -> tuple[float, float]:
    """log(sigma / alpha) at both ends."""
    start, end = ends
    return -0.5 * float(sde.log_snr(start)), -0.5 * float(sde.log_snr(end))


def _t_of_log_level(sde: SDE, log_level: Tensor) -> Tensor:
    return sde.t_of_log_snr(-2 * log_level)


def _check_levels(sigma_min: float | None, sigma_max: float | None) -> None:
    """Raise `UserError` unless the noise levels, where given, are positive and decreasing."""
    if sigma_min is not None:
        check_number("grid.sigma_min", sigma_min, above=0)
    if sigma_max is not None:
        check_number("grid.sigma_max", sigma_max, above=sigma_min or 0)


def _ends_at_levels(sde: SDE, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    """The times of the noise levels `sigma_max` and `sigma_min`; exactly T and t_min_sampling for None and for theirs.

    Raises:
        UserError: when one lies outside the noise levels from t_min_sampling to T.
    """
    ends = sde.T, sde.t_min_sampling
    high, low = (float(sde.noise_level(t)) for t in ends)

    def time(name: str, level: float | None, end: float) -> float:
        if level is None or math.isclose(level, float(sde.noise_level(end)), rel_tol=_ROUNDING):
            return end
        if not low < level < high:
            raise UserError(
                f"grid.{name}={level:g} is not between {low:g} and {high:g}, the noise levels at which this SDE is "
                f"sampled: choose one of those, or null for the SDE's own"
            )
        return float(sde.t_of_noise_level(level))

    return time("sigma_max", sigma_max, ends[0]), time("sigma_min", sigma_min, ends[1])


@register("uniform")
@dataclass(frozen=True)
class Uniform(Grid):
    """Equal steps in t: t_i = T + i/n (t_min_sampling - T).

    Of the ways in which diffusers thins out a chain (arXiv 2305.08891, table 2), "trailing" with n steps is this grid
    with n steps, up to t_min_sampling; "linspace" is this grid with n - 1 steps and `solver.final=tweedie` as the n-th.
    "leading" begins near T - T/n, where data is left: give its times to `explicit`.
    """

    def interior(self, sde: SDE, steps: int) -> Tensor:
        return _linear(*self.ends(sde), steps)


@register("quadratic")
@dataclass(frozen=True)
class Quadratic(Grid):
    """Equal steps in t^(1/power): finer towards the data (power 2 in DDIM, arXiv 2010.02502, appendix D.2).

    Args:
        power: 1 is uniform; above 1 moves steps towards the data.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        check_number("grid.power", self.power, above=0)

    def interior(self, sde: SDE, steps: int) -> Tensor:
        high, low = (math.log(t) for t in self.ends(sde))
        return torch.exp(_linear_in_root(high, low, self.power, steps))


@register("edm")
@dataclass(frozen=True)
class EDMGrid(Grid):
    """Equal steps in (sigma / alpha)^(1/rho) (EDM, arXiv 2206.00364, equation 5).

    Args:
        rho: 7 in the paper; 1 is uniform in the noise level, infinity uniform in its logarithm.
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        check_number("grid.rho", self.rho, above=0)

    def interior(self, sde: SDE, steps: int) -> Tensor:
        high, low = _log_levels(sde, self.ends(sde))
        return _t_of_log_level(sde, _linear_in_root(high, low, self.rho, steps))


@register("logsnr")
@dataclass(frozen=True)
class LogSNR(Grid):
    """Equal steps in the log signal-to-noise ratio log(alpha^2 / sigma^2) (DPM-Solver, arXiv 2206.00927)."""

    def interior(self, sde: SDE, steps: int) -> Tensor:
        return _t_of_log_level(sde, _linear(*_log_levels(sde, self.ends(sde)), steps))


@register("cosine")
@dataclass(frozen=True)
class CosineGrid(Grid):
    """Equal steps in the angle arctan(sigma / (alpha sigma_data)) (TrigFlow, arXiv 2410.11081).

    x_t is proportional to cos(angle) x_0 + sin(angle) sigma_data z. For sigma_data = 1 the steps have the
    signal-to-noise ratios of the cosine schedule, alpha^2 / sigma^2 = cot^2(angle) (arXiv 2102.09672), whatever the
    process; any other shifts their logarithms by -2 log(sigma_data), as arXiv 2301.11093 does with d / 64 for pictures
    of d x d pixels.

    Args:
        sigma_data: standard deviation of the data; half of the angles lie on either side of this noise level.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_number("grid.sigma_data", self.sigma_data, above=0)

    def interior(self, sde: SDE, steps: int) -> Tensor:
        high, low = (math.atan(float(sde.noise_level(t)) / self.sigma_data) for t in self.ends(sde))
        return sde.t_of_noise_level(self.sigma_data * torch.tan(_linear(high, low, steps)))


@register("focused")
@dataclass(frozen=True)
class Focused(Grid):
    """Equal steps in log(u) + 2 focus arctan(u / center), u = sigma / alpha: `logsnr` with denser steps near `center`.

    Per unit of log u there are 1 + 2 focus c u / (u^2 + c^2) steps, 1 + focus at the center c. Most of what a picture
    is gets decided at noise levels around half the data's standard deviation; `logsnr` spends as many steps far above
    and below. Unlike with `cosine`, noise levels never fall by a large factor in one step, which networks that
    predict the noise do not bear at high levels. More focus is better with exact scores, and with networks that were
    preconditioned at high noise (EDM's).

    Args:
        center: noise level sigma / alpha of the densest steps; 0.25 for data of standard deviation 0.5.
        focus: how much denser they are; 0 is `logsnr`.
    """

    center: float = 0.25
    focus: float = 1.0

    def __post_init__(self) -> None:
        check_number("grid.center", self.center, above=0)
        check_number("grid.focus", self.focus, at_least=0)

    def interior(self, sde: SDE, steps: int) -> Tensor:
        high, low = _log_levels(sde, self.ends(sde))
        ends = self._coordinate(torch.tensor([high, low], dtype=torch.float64)).tolist()
        wanted = _linear(ends[0], ends[1], steps)
        above, below = torch.full_like(wanted, high), torch.full_like(wanted, low)
        for _ in range(64):  # bisection: the coordinate grows with log u
            middle = 0.5 * (above + below)
            high_side = self._coordinate(middle) > wanted
            above, below = torch.where(high_side, middle, above), torch.where(high_side, below, middle)
        return _t_of_log_level(sde, 0.5 * (above + below))

    def _coordinate(self, log_level: Tensor) -> Tensor:
        """What the steps are equal in."""
        return log_level + 2 * self.focus * torch.atan(torch.exp(log_level) / self.center)


@register("karras")
@dataclass(frozen=True)
class Karras(Grid):
    """`edm` between noise levels of one's own (k-diffusion's get_sigmas_karras).

    Args:
        sigma_min: last noise level sigma / alpha, not below that of t_min_sampling, which None stands for.
        sigma_max: first noise level, not above that of T, which None stands for.
        rho: 7 in the paper (arXiv 2206.00364, equation 5); 1 is uniform in the noise level.
    """

    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0

    def __post_init__(self) -> None:
        _check_levels(self.sigma_min, self.sigma_max)
        check_number("grid.rho", self.rho, above=0)

    def ends(self, sde: SDE) -> tuple[float, float]:
        return _ends_at_levels(sde, self.sigma_min, self.sigma_max)

    def interior(self, sde: SDE, steps: int) -> Tensor:
        high, low = _log_levels(sde, self.ends(sde))
        return _t_of_log_level(sde, _linear_in_root(high, low, self.rho, steps))


@register("exponential")
@dataclass(frozen=True)
class Exponential(Grid):
    """Equal ratios of noise levels: `logsnr` between noise levels of one's own (k-diffusion's get_sigmas_exponential).

    Args:
        sigma_min: last noise level sigma / alpha, not below that of t_min_sampling, which None stands for.
        sigma_max: first noise level, not above that of T, which None stands for.
    """

    sigma_min: float | None = None
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        _check_levels(self.sigma_min, self.sigma_max)

    def ends(self, sde: SDE) -> tuple[float, float]:
        return _ends_at_levels(sde, self.sigma_min, self.sigma_max)

    def interior(self, sde: SDE, steps: int) -> Tensor:
        return _t_of_log_level(sde, _linear(*_log_levels(sde, self.ends(sde)), steps))


@register("polyexponential")
@dataclass(frozen=True)
class Polyexponential(Grid):
    """log(sigma_i / sigma_n) = (1 - i/n)^rho log(sigma_0 / sigma_n) (k-diffusion's get_sigmas_polyexponential).

    Args:
        sigma_min: last noise level sigma_n, not below that of t_min_sampling, which None stands for.
        sigma_max: first noise level sigma_0, not above that of T, which None stands for.
        rho: 1 is `exponential`; above 1 moves steps towards the data.
    """

    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 1.0

    def __post_init__(self) -> None:
        _check_levels(self.sigma_min, self.sigma_max)
        check_number("grid.rho", self.rho, above=0)

    def ends(self, sde: SDE) -> tuple[float, float]:
        return _ends_at_levels(sde, self.sigma_min, self.sigma_max)

    def interior(self, sde: SDE, steps: int) -> Tensor:
        high, low = _log_levels(sde, self.ends(sde))
        return _t_of_log_level(sde, low + (high - low) * _linear(1, 0, steps) ** self.rho)


@register("explicit")
@dataclass(frozen=True)
class Explicit(Grid):
    """Times or noise levels given one by one, from noise to data; exactly one of the two.

    Args:
        times: decreasing values of t in [0, T]; any sequence, array or tensor of numbers.
        noise_levels: decreasing values of sigma / alpha, likewise: the sigmas of k-diffusion and diffusers.
    """

    times: Sequence[float] | None = None
    noise_levels: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if (self.times is None) == (self.noise_levels is None):
            raise UserError("the explicit grid takes either grid.times or grid.noise_levels: give exactly one")
        for name in ("times", "noise_levels"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        values = self._values
        falls = all(math.inf > a > b >= 0 for a, b in pairwise(values))  # false for NaN too
        if len(values) < 2 or not falls:
            raise UserError(f"the explicit grid {list(values)} must be at least two decreasing values, none negative")

    @property
    def _values(self) -> Sequence[float]:
        return self.times if self.times is not None else self.noise_levels or ()

    def interior(self, sde: SDE, steps: int) -> Tensor:
        values = torch.tensor(self._values, dtype=torch.float64)
        return values if self.times is not None else sde.t_of_noise_level(values)

    def place(self, sde: SDE, steps: int | None, default: int) -> list[float]:
        return self(sde, steps)

    def __call__(self, sde: SDE, steps: int | None = None) -> list[float]:
        """The times as given; `steps` must be their number less one, or None.

        Raises:
            UserError: when `steps` says otherwise or a time lies outside [0, T].
        """
        times = self.interior(sde, 0).tolist()
        if steps is not None and steps != len(times) - 1:
            raise UserError(f"steps={steps} does not fit the explicit grid of {len(times)} times: leave steps out")
        if times[0] > sde.T * (1 + _ROUNDING):
            raise UserError(f"the explicit grid starts at t={times[0]:g}, beyond T={sde.T:g} of the SDE")
        if times[-1] < -_ROUNDING * sde.T:
            raise UserError(
                f"the explicit grid ends at a noise level of {self._values[-1]:g}, below the SDE's smallest, "
                f"{float(sde.noise_level(0.0)):g}: end there, and leave the rest to solver.final"
            )
        return [min(times[0], sde.T), *times[1:-1], max(times[-1], 0.0)]


@register("score_sde")
@dataclass(frozen=True)
class ScoreSDEGrid(Grid):
    """The times of score_sde_pytorch: `steps` of them, equally spaced from T to t_min_sampling, then 0.

    Its samplers update once at each of the `steps` times with a step of T / steps, so that the last update, whose mean
    is the sample, leads from t_min_sampling to data. Use it with `solver.discretization=score_sde`.
    """

    def interior(self, sde: SDE, steps: int) -> Tensor:
        return torch.cat([torch.linspace(sde.T, sde.t_min_sampling, steps, dtype=torch.float64), torch.zeros(1)])

    def __call__(self, sde: SDE, steps: int) -> list[float]:
        """`steps` + 1 times, the last of them 0."""
        check_steps(steps)
        if math.isclose(sde.T, sde.t_min_sampling) or steps < 2:
            raise UserError(f"steps={steps} is too few for the score_sde grid: take at least 2")
        return self.interior(sde, steps).tolist()
