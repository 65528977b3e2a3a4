r"""The probability-flow ODE with its linear part solved, and the weights of multistep formulas on any grid.

With u = sigma / alpha the state y = x / alpha obeys dy/du = eps. For any positive r(u), Y = y / r obeys

    dY/du = N / r,    N = eps - (r' / r) y,

so that what is linear in x is solved exactly and N alone is approximated. Three choices of r have names:

    eps        r = 1                        N = eps                 DDIM, DEIS, DPM-Solver
    denoised   r = u                        N = -denoised / u       DPM-Solver++, UniPC
    edm        r = sqrt(u^2 + sigma_data^2) N = -sigma_data F / r   F as EDM's network predicts it (arXiv 2206.00364)

The third is exact on Gaussian data of standard deviation sigma_data, whatever the step. A formula replaces eps, the
denoised x_0 or F by the polynomial through its values at some noise levels, in a `VARIABLES` of its own, and
integrates: x_s = decay x_t + sum_j weight_j m_j. `Levels` knows the grid and gives decay and weights, all in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sde.errors import check_choice, check_number
from sde.processes import SDE

PREDICTIONS = ("eps", "denoised", "edm")
VARIABLES = ("noise_level", "log_snr", "angle", "focused", "time")
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)  # exact to rounding for a step of several units of log u


@dataclass(frozen=True)
class Interpolation:
    """What is interpolated, and in which variable.

    Args:
        prediction: "eps", "denoised" or "edm": see above.
        variable: "noise_level" u = sigma / alpha; "log_snr" -2 log u; "angle" arctan(u / sigma_data), in which the
            flow of Gaussian data turns at constant speed; "focused" log u + 4 arctan(2 u / sigma_data), in which the
            grid of that name has equal steps for a focus of 2; or "time" t.
        sigma_data: standard deviation of the data; 0.5 for data in [-1, 1] as EDM has it.
    """

    prediction: str = "eps"
    variable: str = "log_snr"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_choice("solver.prediction", self.prediction, PREDICTIONS)
        check_choice("solver.variable", self.variable, VARIABLES)
        check_number("solver.sigma_data", self.sigma_data, above=0)

    def scale(self, u: np.ndarray) -> np.ndarray:
        """r(u)."""
        if self.prediction == "edm":
            return np.hypot(u, self.sigma_data)
        return u if self.prediction == "denoised" else np.ones_like(u)

    def density(self, u: np.ndarray) -> np.ndarray:
        """What a value m that was evaluated adds to Y per unit of u: N / (r m) with m = eps, denoised or r N."""
        if self.prediction == "edm":
            return 1 / (u**2 + self.sigma_data**2)
        return -1 / u**2 if self.prediction == "denoised" else np.ones_like(u)

    def coordinate(self, sde: SDE, u: np.ndarray) -> np.ndarray:
        """The variable of interpolation at noise levels `u`, as an array of the same shape."""
        if self.variable == "time":
            return sde.t_of_noise_level(torch.from_numpy(u)).numpy()
        if self.variable == "angle":
            return np.arctan(u / self.sigma_data)
        if self.variable == "focused":
            return np.log(u) + 4 * np.arctan(2 * u / self.sigma_data)
        return u if self.variable == "noise_level" else -2 * np.log(u)


class Levels:
    """The places of a grid, as numbers.

    Args:
        sde: the process.
        times: decreasing.

    Attributes:
        steps: number of steps of the grid.
        t, alpha, sigma, u: lists of floats, one entry for each time; u = sigma / alpha.
    """

    def __init__(self, sde: SDE, times: Sequence[float]) -> None:
        self.sde = sde
        self.steps = len(times) - 1
        t = torch.tensor(list(times), dtype=torch.float64)
        self.t = t.tolist()
        self.alpha: list[float] = sde.alpha(t).tolist()
        self.sigma: list[float] = sde.sigma(t).tolist()
        self.u: list[float] = sde.noise_level(t).tolist()

    def add(self, u: float) -> int:
        """The number of a further place at noise level `u`, not on the grid: a stage of a step."""
        t = float(self.sde.t_of_noise_level(u))
        for values, value in (
            (self.t, t),
            (self.alpha, float(self.sde.alpha(t))),
            (self.sigma, float(self.sde.sigma(t))),
            (self.u, u),
        ):
            values.append(value)
        return len(self.t) - 1

    def between(self, i: int, j: int, share: float) -> int:
        """`add` the place a `share` of the way from i to j in log u."""
        return self.add(self.u[i] ** (1 - share) * self.u[j] ** share)

    def mix(self, rule: Interpolation, i: int) -> float:
        """The c with which m = eps + c x is the interpolated quantity at place i, up to `_unit`; 0 but for "edm"."""
        if rule.prediction != "edm":
            return 0.0
        return -self.u[i] / ((self.u[i] ** 2 + rule.sigma_data**2) * self.alpha[i])

    def formula(self, rule: Interpolation, i: int, j: int, nodes: Sequence[int]) -> tuple[float, tuple[float, ...]]:
        """(decay, weights) of x_j = decay x_i + sum_k weights[k] m[k], with m[k] the value at place `nodes[k]`.

        m is eps, denoised, or eps + `mix` x for "edm". A step to u = 0, where logarithms end, takes the newest value
        (`nodes[0]`) as constant.
        """
        a, b = self.u[i], self.u[j]
        if b == 0:
            nodes, kept = [nodes[0]], len(nodes)
            tail = (0.0,) * (kept - 1)
            if rule.prediction == "denoised":
                return 0.0, (self.alpha[j], *tail)
            # the flow of constant m: Y changes by m times the integral of the density from a to 0
            at_zero = rule.sigma_data if rule.prediction == "edm" else 1.0
            angle = math.atan(a / at_zero) / at_zero
            change = -self._unit(rule, nodes[0]) * angle if rule.prediction == "edm" else -a
            decay = self.alpha[j] * at_zero / (self.alpha[i] * float(rule.scale(np.array(a))))
            return decay, (self.alpha[j] * at_zero * change, *tail)
        half, middle = 0.5 * math.log(b / a), 0.5 * math.log(a * b)
        u = np.exp(half * _NODES + middle)
        mass = half * _WEIGHTS * u * rule.density(u)
        basis = lagrange(rule.coordinate(self.sde, u), rule.coordinate(self.sde, np.array([self.u[k] for k in nodes])))
        end, start = float(rule.scale(np.array(b))), float(rule.scale(np.array(a)))
        reach = self.alpha[j] * end
        weights = (basis @ mass).tolist()
        return reach / (self.alpha[i] * start), tuple(
            reach * w * self._unit(rule, k) for w, k in zip(weights, nodes, strict=True)
        )

    def _unit(self, rule: Interpolation, i: int) -> float:
        """The interpolated quantity at place i over m: r for "edm", whose m is N."""
        return math.hypot(self.u[i], rule.sigma_data) if rule.prediction == "edm" else 1.0


def lagrange(x: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The Lagrange polynomials of `nodes` (k,) at `x` (n,): (k, n)."""
    factors: Callable[[int], list[np.ndarray]] = lambda j: [  # noqa: E731
        (x - nodes[k]) / (nodes[j] - nodes[k]) for k in range(len(nodes)) if k != j
    ]
    return np.stack([np.prod([np.ones_like(x), *factors(j)], axis=0) for j in range(len(nodes))])
