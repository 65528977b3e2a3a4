"""Score-based generative modelling with stochastic differential equations.

The public names of the library. Importing it imports neither hydra nor wandb.
"""

from sde.denoiser import AbstractDenoiser, Denoiser, GaussianDenoiser, GaussianMixtureDenoiser
from sde.errors import UserError
from sde.grids import GRIDS, Grid
from sde.losses import LOSSES, DenoisingScoreMatching
from sde.parameterizations import PARAMETERIZATIONS, Parameterization
from sde.processes import EDM, SDE, SDES, VE, VP, Cosine, RectifiedFlow, SubVP
from sde.randomness import BatchNoise, RecordedNoise, SampleNoise
from sde.reverse import ReverseProcess
from sde.solvers import SOLVERS, Solution, Solver

__all__ = [
    "EDM",
    "GRIDS",
    "LOSSES",
    "PARAMETERIZATIONS",
    "SDE",
    "SDES",
    "SOLVERS",
    "VE",
    "VP",
    "AbstractDenoiser",
    "BatchNoise",
    "Cosine",
    "Denoiser",
    "DenoisingScoreMatching",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "Grid",
    "Parameterization",
    "RecordedNoise",
    "RectifiedFlow",
    "ReverseProcess",
    "SampleNoise",
    "Solution",
    "Solver",
    "SubVP",
    "UserError",
]
