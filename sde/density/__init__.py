"""The density of data under a model: what log p(x) is, and bounds on it."""

from sde.density.bound import Bound, Decoder, continuous_bound, discrete_bound
from sde.density.quantization import Quantization, bits_per_dim, change_of_units

__all__ = [
    "Bound",
    "Decoder",
    "Quantization",
    "bits_per_dim",
    "change_of_units",
    "continuous_bound",
    "discrete_bound",
]
