"""Score-based generative modelling with stochastic differential equations.

The public names of the library. Importing it imports neither hydra nor wandb.
"""

import os
import sys

if sys.argv[:1] == ["-m"]:  # python -m sde.train: Ctrl-C while all of this is being imported is answered in a sentence
    from sde.interrupting import leave_at_once

    leave_at_once()

# Threads of PyTorch's CPU kernels wait by sleeping rather than spinning (read when torch is first imported). It costs
# nothing when the cores are free; where another program shares them, spinning makes training many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from sde.brownian import BrownianNoise
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
    "BrownianNoise",
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
