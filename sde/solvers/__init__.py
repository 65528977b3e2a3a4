"""Solvers: ways from noise to data. `SOLVERS` names them; each has a file here and one in `conf/solver/`."""

from sde.solvers.adams import Adams
from sde.solvers.adams_adaptive import AdamsAdaptive
from sde.solvers.adaptive_sde import AdaptiveSDE
from sde.solvers.ancestral import Ancestral, DPMpp2SAncestral, EulerAncestral, ReverseDiffusion
from sde.solvers.base import SOLVERS, Callback, Solution, Solver, State, register
from sde.solvers.box_langevin import BoxLangevin
from sde.solvers.ddim import DDIM
from sde.solvers.dopri5 import Dopri5
from sde.solvers.dpm_adaptive import DPMAdaptive
from sde.solvers.dpm_sde import DPMpp2MSDE, DPMpp3MSDE, DPMppSDE
from sde.solvers.dpm_solver import DPMpp2S, DPMpp3S, DPMSolver, Exponential
from sde.solvers.euler_maruyama import EulerMaruyama
from sde.solvers.heun import Heun
from sde.solvers.langevin import AnnealedLangevin, Langevin
from sde.solvers.mala import MALA, MALASolution
from sde.solvers.multistep import DEIS, IPNDM, LMS, DPMpp2M, DPMpp3M, GradientEstimation
from sde.solvers.pc import PredictorCorrector
from sde.solvers.runge_kutta import DPM2, RK4, Euler, Midpoint
from sde.solvers.sa_solver import SASolver
from sde.solvers.scipy import SciPyODE
from sde.solvers.torch_sde import TorchSDE
from sde.solvers.unipc import UniPC

__all__ = [
    "DDIM",
    "DEIS",
    "DPM2",
    "IPNDM",
    "LMS",
    "MALA",
    "RK4",
    "SOLVERS",
    "Adams",
    "AdamsAdaptive",
    "AdaptiveSDE",
    "Ancestral",
    "AnnealedLangevin",
    "BoxLangevin",
    "Callback",
    "DPMAdaptive",
    "DPMSolver",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp2S",
    "DPMpp2SAncestral",
    "DPMpp3M",
    "DPMpp3MSDE",
    "DPMpp3S",
    "DPMppSDE",
    "Dopri5",
    "Euler",
    "EulerAncestral",
    "EulerMaruyama",
    "Exponential",
    "GradientEstimation",
    "Heun",
    "Langevin",
    "MALASolution",
    "Midpoint",
    "PredictorCorrector",
    "ReverseDiffusion",
    "SASolver",
    "SciPyODE",
    "Solution",
    "Solver",
    "State",
    "TorchSDE",
    "UniPC",
    "register",
]
