"""Which solvers, in which option sets, the tests of all solvers run.

A registered solver that is not named here is tested as it comes. Solvers of one kind have a test file of their own; the
tests that hold for all of them (order, law, count, independence of the batch, every SDE, parameterization and shape of
data) are in test_solvers.py and take their solvers from `variants`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sde.solvers import SOLVERS
from tests.problems import with_options

# Option sets under which a solver is a method of its own. A solver that is not named here is tested as it comes.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "euler_maruyama": [{}, {"eta": 0.7}, {"eta": 0.0}],
    "reverse_diffusion": [{}, {"eta": 0.0}],
    "ancestral": [{}, {"eta": 0.0}],
    "dpmpp_2s_ancestral": [{}, {"eta": 0.0}],
    "dpmpp_sde": [{}, {"eta": 0.5}, {"r": 0.7, "eta": 0.0}],
    # those of more values need more steps to show an order under noise: tests/test_solvers_sde.py
    "dpmpp_2m_sde": [{"few_steps": 0}, {"few_steps": 0, "solver_type": "heun"}],
    "dpmpp_3m_sde": [{"few_steps": 0, "eta": 0.0}],
    "sa_solver": [
        {"predictor_order": 1, "corrector_order": 2, "few_steps": 0},
        {"predictor_order": 3, "corrector_order": 4, "tau": 0.0, "few_steps": 0},
    ],
    "heun": [{}, {"s_churn": 5.0}],
    "ddim": [{}, {"eta": 1.0}],
    # its error soon falls below that of the reference: tests/test_solvers_one_step.py
    "rk4": [],
    "dpm_solver": [{"order": 2}, {}],
    "deis": [{}, {"order": 2, "variable": "time"}],
    "dpmpp_2m": [{}, {"solver_type": "heun"}],
    "unipc": [
        {},
        {"solver_order": 1, "variant": "bh1"},
    ],
    # its order depends on the grid: tests/test_solvers_multistep.py
    "ipndm": [],
    "pc": [
        {"corrector": "none", **options}
        for options in (
            {},
            {"predictor": "euler_maruyama"},
            {"predictor": "ancestral"},
            {"probability_flow": True},
            {"predictor": "euler_maruyama", "probability_flow": True},
        )
    ],
    "dopri5": [{}, {"prediction": "denoised", "variable": "log_snr"}, {"prediction": "eps", "variable": "time"}],
    "adams_adaptive": [{}, {"order": 2, "prediction": "denoised", "variable": "log_snr"}],
    "dpm_adaptive": [{}, {"order": 2, "eta": 1.0}],
    "adaptive_sde": [{}, {"variable": "time", "max_share": 1.0}],
    # with noise on paths of its own, not in draws: tests/test_solvers_adaptive.py
    "torchsde": [{"eta": 0.0}, {"eta": 0.0, "method": "euler"}],
    # Langevin dynamics approximates a law, not a flow: no order
    "langevin": [],
    "ald": [],
    "mala": [],
    "box_langevin": [],
}
# and those that have no order of their own, only a law, a count and an independence of the batch
CORRECTED: dict[str, list[dict[str, Any]]] = {
    "pc": [
        {},
        {"corrector": "ald", "corrector_steps": 2},
        {"corrector_position": "after", "predictor": "ancestral"},
        {"predictor": "none", "corrector": "ald"},
        {"predictor": "heun", "corrector_position": "after"},
        {"predictor": "dpmpp_2s_ancestral"},
        {"corrector": "mala"},
    ],
    "dpmpp_2m_sde": [{}],
    "dpmpp_3m_sde": [{}],
    "sa_solver": [{}, {"predictor_order": 4, "corrector_order": 5, "few_steps": 0, "tau_high": 1.5}],
    "ipndm": [{}],
    "torchsde": [{}],
    "langevin": [{"steps_per_level": 2}],
    "ald": [{"steps_per_level": 2}, {"steps_per_level": 1, "step_size": 0.1}],
    "mala": [{"steps_per_level": 2}, {"steps_per_level": 1, "warm_up": 1}, {"steps_per_level": 2, "density": "line"}],
    "box_langevin": [{"steps": 9}, {"steps": 9, "outside": "add", "start": "normal"}],
}


# solvers that remember earlier steps: they cannot be interrupted, and start at lower orders than they reach
MULTISTEP = ["adams", "lms", "deis", "ipndm", "gradient_estimation", "dpmpp_2m", "dpmpp_3m", "unipc"]
MULTISTEP += ["dpmpp_2m_sde", "dpmpp_3m_sde", "sa_solver"]
# solvers that stay at every time of the grid, the first included: cut in two, they stay at the cut twice
STAYING = ["langevin", "ald", "mala"]
# and those that draw the seed of their noise, not the noise: no draw belongs to a step
SEEDED = ["torchsde"]


def variants(*, corrected: bool = True, stepping: bool = False, stochastic: bool | None = None) -> list[Any]:
    """pytest parameters: every registered solver, in every variant, without a last step."""
    found = []
    for name, cls in SOLVERS.items():
        for options in VARIANTS.get(name, [{}]) + (CORRECTED.get(name, []) if corrected else []):
            solver = with_options(cls(**options), final="none")
            if stepping and (solver.default_steps is None or (name in SEEDED and solver.stochastic)):
                continue
            if stochastic is None or solver.stochastic == stochastic:
                label = "-".join([name, *(f"{k}={v}" for k, v in options.items())])
                found.append(pytest.param(solver, id=label))
    return found


# Time grids


def uniform(t: float, s: float, n: int) -> list[float]:
    """Equal steps."""
    return np.linspace(t, s, n + 1).tolist()


def stretched(t: float, s: float, n: int) -> list[float]:
    """Steps that shrink smoothly towards the data."""
    return (np.linspace(t**0.5, s**0.5, n + 1) ** 2).tolist()


def uneven(t: float, s: float, n: int) -> list[float]:
    """Long and short steps in turn: no formula for equal steps survives it."""
    steps = np.tile([1.0, 2.0], n // 2)
    return [t, *(t + (s - t) * np.cumsum(steps) / steps.sum())[:-1].tolist(), s]


def graded(times: list[float], halvings: int = 14) -> list[float]:
    """The same grid with its first step halved again and again towards the start.

    Multistep formulas start at order one, whose error of h^2 would hide all orders above two; behind a first step of
    2^-14 h it is 4e-9 h^2.
    """
    first, second = times[:2]
    return [first, *(first + (second - first) * 2.0**-k for k in range(halvings, 0, -1)), *times[1:]]
