"""Solvers: ways from noise to data. `SOLVERS` names them; each has a file here and one in `conf/solver/`."""

from sde.solvers.adams import Adams
from sde.solvers.ancestral import Ancestral, DPMpp2SAncestral, EulerAncestral, ReverseDiffusion
from sde.solvers.base import SOLVERS, Callback, Solution, Solver, State, register
from sde.solvers.box_langevin import BoxLangevin
from sde.solvers.dpm_sde import DPMpp2MSDE, DPMpp3MSDE, DPMppSDE
from sde.solvers.euler_maruyama import EulerMaruyama
from sde.solvers.heun import Heun
from sde.solvers.langevin import AnnealedLangevin, Langevin
from sde.solvers.mala import MALA, MALASolution
from sde.solvers.pc import PredictorCorrector
from sde.solvers.sa_solver import SASolver
from sde.solvers.scipy import SciPyODE

__all__ = [
    "MALA",
    "SOLVERS",
    "Adams",
    "Ancestral",
    "AnnealedLangevin",
    "BoxLangevin",
    "Callback",
    "DPMpp2MSDE",
    "DPMpp2SAncestral",
    "DPMpp3MSDE",
    "DPMppSDE",
    "EulerAncestral",
    "EulerMaruyama",
    "Heun",
    "Langevin",
    "MALASolution",
    "PredictorCorrector",
    "ReverseDiffusion",
    "SASolver",
    "SciPyODE",
    "Solution",
    "Solver",
    "State",
    "register",
]
