r"""Noise levels against the data: whether the process ends in its prior and begins in the data.

A process that keeps the data's scale (alpha(T) = 1: variance-exploding, EDM) has to drown it: its largest noise level
is compared with the largest distance of two examples (arXiv 2006.09011, technique 1). One that shrinks it
(variance-preserving, flows) leaves the signal-to-noise ratio (alpha(T) sigma_data / sigma(T))^2. Either costs

    KL(x_T | x_0 || prior) = 1/2 [ (alpha^2 m + sigma^2) / p^2 - 1 - log(sigma^2 / p^2) ],    m = E x_0^2,

nats for each dimension, on average over the data: the last term of the bound on -log p(x_0) (arXiv 2107.00630).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sde.doctoring.data import DataFacts
from sde.processes import SDE


@dataclass(frozen=True)
class NoiseFacts:
    """The ends of a process, beside the data.

    Attributes:
        name: of the process.
        option: that sets the largest noise level of a process that keeps the data's scale, "sde.sigma_max" or "sde.T".
        keeps_scale: whether the data is as large at T as at 0.
        largest: noise level sigma / alpha at T.
        to_distance: that, over the largest distance of two examples.
        signal_left: alpha(T) sigma_data / sigma(T), the root of the signal-to-noise ratio at T.
        prior_bits: KL(x_T | x_0 || prior) in bits per dimension.
        smallest: noise level at which samplers stop.
        smallest_trained: noise level at t_min.
    """

    name: str
    option: str
    keeps_scale: bool
    largest: float
    to_distance: float
    signal_left: float
    prior_bits: float
    smallest: float
    smallest_trained: float


def examine_noise(sde: SDE, data: DataFacts) -> NoiseFacts:
    """The ends of `sde`, beside data like `data`."""
    alpha, sigma, largest = (float(curve(sde.T)) for curve in (sde.alpha, sde.sigma, sde.noise_level))
    return NoiseFacts(
        name=type(sde).__name__,
        option="sde.sigma_max" if hasattr(sde, "sigma_max") else "sde.T",
        keeps_scale=alpha > 0.5,
        largest=largest,
        to_distance=largest / data.distance if data.distance else math.inf,
        signal_left=alpha * data.sigma_data / sigma,
        prior_bits=prior_bits(alpha, sigma, sde.prior_std, data.mean**2 + data.std**2),
        smallest=float(sde.noise_level(sde.t_min_sampling)),
        smallest_trained=float(sde.noise_level(sde.t_min)),
    )


def prior_bits(alpha: float, sigma: float, prior_std: float, square: float) -> float:
    """KL(N(alpha x, sigma^2) || N(0, prior_std^2)) in bits, for x with E x^2 = `square`."""
    ratio = (sigma / prior_std) ** 2
    return 0.5 * ((alpha / prior_std) ** 2 * square + (ratio - 1 - math.log(ratio))) / math.log(2)
