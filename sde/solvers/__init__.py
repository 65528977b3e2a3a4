"""Solvers: ways from noise to data. `SOLVERS` names them; each has a file here and one in `conf/solver/`."""

from sde.solvers.adams import Adams
from sde.solvers.base import SOLVERS, Callback, Solution, Solver, State, register
from sde.solvers.euler_maruyama import EulerMaruyama
from sde.solvers.heun import Heun
from sde.solvers.pc import PredictorCorrector
from sde.solvers.scipy import SciPyODE

__all__ = [
    "SOLVERS",
    "Adams",
    "Callback",
    "EulerMaruyama",
    "Heun",
    "PredictorCorrector",
    "SciPyODE",
    "Solution",
    "Solver",
    "State",
    "register",
]
