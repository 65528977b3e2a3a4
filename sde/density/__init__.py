"""Densities: log p(x) of a model, exactly or bounded, and what they need.

divergence.py    the trace of a Jacobian beside the value of the field
flow.py          log p(x) and latent codes by the probability-flow ODE
quantization.py  pixels: bucket width, dequantization, bits per dimension, discretized decoders
bound.py         variational bounds on -log p, term by term
dequantizer.py   a flow that dequantizes better than uniform noise does
discrete.py      log P of quantized pictures from all of these, and what kind of bound it is
likelihood.py    all that of stored examples, with what suits a model and its data, and what is told of the numbers
"""

from sde.density.bound import Bound, Decoder, continuous_bound, discrete_bound
from sde.density.dequantizer import Dequantizer, DequantizerOptions
from sde.density.discrete import (
    ChainBound,
    ContinuousBound,
    DiscreteLogProb,
    Discretization,
    Flow,
    discrete_log_prob,
)
from sde.density.divergence import DIVERGENCES, Divergence, Exact, Hutchinson, HutchPlusPlus
from sde.density.flow import LogProb, decode, encode, log_prob, times_to_noise
from sde.density.likelihood import Likelihood
from sde.density.quantization import Quantization, bits_per_dim, change_of_units

__all__ = [
    "DIVERGENCES",
    "Bound",
    "ChainBound",
    "ContinuousBound",
    "Decoder",
    "Dequantizer",
    "DequantizerOptions",
    "DiscreteLogProb",
    "Discretization",
    "Divergence",
    "Exact",
    "Flow",
    "HutchPlusPlus",
    "Hutchinson",
    "Likelihood",
    "LogProb",
    "Quantization",
    "bits_per_dim",
    "change_of_units",
    "continuous_bound",
    "decode",
    "discrete_bound",
    "discrete_log_prob",
    "encode",
    "log_prob",
    "times_to_noise",
]
