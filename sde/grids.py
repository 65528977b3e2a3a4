r"""Time grids: where a solver stops on its way from noise to data.

A grid turns an SDE and a number of steps into steps + 1 decreasing times, the first at T and the last at
`sde.t_min_sampling`. It knows no solver, and no solver chooses its times itself.
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


class Grid(ABC):
    """Places of the steps between T and t_min_sampling. Leaves are frozen dataclasses and state `interior`."""

    @abstractmethod
    def interior(self, sde: SDE, steps: int) -> Tensor:
        """The steps + 1 times before their ends are set exactly, float64, decreasing."""

    def __call__(self, sde: SDE, steps: int) -> list[float]:
        """The times, decreasing: `steps` + 1 of them, from `sde.T` to `sde.t_min_sampling`.

        Raises:
            UserError: for fewer than one step.
        """
        check_steps(steps)
        times = self.interior(sde, steps).tolist()
        times[0], times[-1] = sde.T, sde.t_min_sampling
        return times


def check_steps(steps: int) -> None:
    """Raise `UserError` unless `steps` is a whole number of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"steps={steps!r} must be a whole number of at least 1")


@register("uniform")
@dataclass(frozen=True)
class Uniform(Grid):
    """Equal steps in t."""

    def interior(self, sde: SDE, steps: int) -> Tensor:
        return torch.linspace(sde.T, sde.t_min_sampling, steps + 1, dtype=torch.float64)


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
        ends = sde.T ** (1 / self.power), sde.t_min_sampling ** (1 / self.power)
        return torch.linspace(*ends, steps + 1, dtype=torch.float64) ** self.power


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
        high, low = (float(sde.noise_level(t)) ** (1 / self.rho) for t in (sde.T, sde.t_min_sampling))
        return sde.t_of_noise_level(torch.linspace(high, low, steps + 1, dtype=torch.float64) ** self.rho)


@register("logsnr")
@dataclass(frozen=True)
class LogSNR(Grid):
    """Equal steps in the log signal-to-noise ratio (DPM-Solver, arXiv 2206.00927)."""

    def interior(self, sde: SDE, steps: int) -> Tensor:
        ends = float(sde.log_snr(sde.T)), float(sde.log_snr(sde.t_min_sampling))
        return sde.t_of_log_snr(torch.linspace(*ends, steps + 1, dtype=torch.float64))


@register("explicit")
@dataclass(frozen=True)
class Explicit(Grid):
    """Times or noise levels given one by one, from noise to data; exactly one of the two.

    Args:
        times: decreasing values of t in [0, T].
        noise_levels: decreasing values of sigma / alpha.
    """

    times: tuple[float, ...] | None = None
    noise_levels: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if (self.times is None) == (self.noise_levels is None):
            raise UserError("the explicit grid takes either grid.times or grid.noise_levels: give exactly one")
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

    def __call__(self, sde: SDE, steps: int | None = None) -> list[float]:
        """The times as given; `steps` must be their number less one, or None.

        Raises:
            UserError: when `steps` says otherwise or a time lies outside [0, T].
        """
        times = self.interior(sde, 0).tolist()
        if steps is not None and steps != len(times) - 1:
            raise UserError(f"steps={steps} does not fit the explicit grid of {len(times)} times: leave steps out")
        if times[0] > sde.T * (1 + 1e-9):
            raise UserError(f"the explicit grid starts at t={times[0]:g}, beyond T={sde.T:g} of the SDE")
        if times[-1] < -1e-9 * sde.T:
            raise UserError(
                f"the explicit grid ends at a noise level of {self._values[-1]:g}, below the SDE's smallest, "
                f"{float(sde.noise_level(0.0)):g}"
            )
        return [*times[:-1], max(times[-1], 0.0)]


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
