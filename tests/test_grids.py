"""Time grids against their formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from sde.errors import UserError
from sde.grids import EDMGrid, Explicit, Grid, LogSNR, Quadratic, ScoreSDEGrid, Uniform
from sde.processes import EDM, SDE, VE, VP
from tests.problems import F64, all_grids, grids, sdes

every_sde = pytest.mark.parametrize("sde", sdes())


@pytest.mark.parametrize("grid", grids())
@every_sde
def test_ends_and_direction(sde: SDE, grid: Grid) -> None:
    for steps in (2, 3, 18, 1000):
        times = grid(sde, steps)
        assert len(times) == steps + 1
        assert all(isinstance(t, float) for t in times)
        assert all(s < t for t, s in pairwise(times))
        assert times[0] == sde.T  # exactly, whatever the rounding of a formula
        if isinstance(grid, ScoreSDEGrid):
            assert times[-2:] == [sde.t_min_sampling, 0.0]
        else:
            assert times[-1] == sde.t_min_sampling


@every_sde
def test_one_step_goes_all_the_way(sde: SDE) -> None:
    for name, grid in all_grids().items():
        if name != "score_sde":
            assert grid(sde, 1) == [sde.T, sde.t_min_sampling]


@every_sde
def test_equal_steps_in_the_promised_variable(sde: SDE) -> None:
    n = 20

    def level(t: float) -> float:
        return float(sde.noise_level(t))

    variables = {
        Uniform(): lambda t: t,
        Quadratic(): lambda t: t**0.5,
        Quadratic(power=3.0): lambda t: t ** (1 / 3),
        EDMGrid(): lambda t: level(t) ** (1 / 7),
        EDMGrid(rho=2.5): lambda t: level(t) ** (1 / 2.5),
        LogSNR(): lambda t: float(sde.log_snr(t)),
    }
    for grid, variable in variables.items():
        steps = np.diff([variable(t) for t in grid(sde, n)])
        # a step is 1/20 of the range, so rounding of the ends counts 20-fold; the inverse of the log-SNR adds
        # its own 40 roundings
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-10)


def test_edm_grid_as_printed() -> None:
    # arXiv 2206.00364, equation 5, for N noise levels
    n, rho, low, high = 18, 7, 0.002, 80.0
    i = np.arange(n)
    printed = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    np.testing.assert_allclose(EDMGrid()(EDM(), n - 1), printed, rtol=1e-13)


@every_sde
def test_powers_that_are_other_grids(sde: SDE) -> None:
    np.testing.assert_allclose(Quadratic(power=1.0)(sde, 10), Uniform()(sde, 10), rtol=1e-13)
    levels = sde.noise_level(torch.tensor(EDMGrid(rho=1.0)(sde, 10), dtype=F64))
    np.testing.assert_allclose(levels.diff(), levels.diff().mean(), rtol=1e-9)
    # rho to infinity is uniform in the logarithm: v^(1/rho) = 1 + log(v)/rho + O(1/rho^2)
    far = [np.log(float(sde.noise_level(t))) for t in EDMGrid(rho=1e5)(sde, 10)]
    near = [-0.5 * float(sde.log_snr(t)) for t in LogSNR()(sde, 10)]
    np.testing.assert_allclose(far, near, atol=1e-5 * (near[0] - near[-1]) ** 2)


@pytest.mark.parametrize("sde", [VP(), VE(), VP(T=2.0)])
@pytest.mark.parametrize("n", [2, 10, 1000])
def test_score_sde_grid_as_published(sde: SDE, n: int) -> None:
    # equal to the rounding of T
    printed = [*np.linspace(sde.T, sde.t_min_sampling, n), 0.0]
    np.testing.assert_allclose(ScoreSDEGrid()(sde, n), printed, rtol=0, atol=4e-16 * sde.T)


def test_explicit_times_are_taken_literally() -> None:
    times = (1.0, 0.3, 0.01, 0.0)
    assert Explicit(times=times)(VP()) == list(times)
    assert Explicit(times=times)(VP(), 3) == list(times)
    levels = (50.0, 3.0, 0.2, 0.01)
    for sde in (VE(), VP(), EDM()):
        back = [float(sde.noise_level(t)) for t in Explicit(noise_levels=levels)(sde)]
        np.testing.assert_allclose(back, levels, rtol=1e-12)
    assert Explicit(noise_levels=(3.0, 0.0))(EDM())[-1] == 0
    assert Explicit(noise_levels=(3.0, 0.0))(VP())[-1] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one"),
        ({"times": (1.0, 0.5), "noise_levels": (1.0, 0.5)}, "exactly one"),
        ({"times": (1.0,)}, r"\[1.0\].*at least two decreasing"),
        ({"times": ()}, "at least two decreasing"),
        ({"times": (0.5, 1.0)}, r"\[0.5, 1.0\].*decreasing"),
        ({"times": (1.0, 0.5, 0.5)}, "decreasing"),
        ({"times": (1.0, -0.1)}, "none negative"),
        ({"times": (1.0, math.nan, 0.1)}, "nan"),
        ({"noise_levels": (math.inf, 1.0)}, "inf"),
        ({"noise_levels": (1.0, -1.0)}, "none negative"),
    ],
)
def test_explicit_grids_that_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Explicit(**options)


def test_explicit_grids_outside_the_process() -> None:
    with pytest.raises(UserError, match=r"t=1\.5, beyond T=1"):
        Explicit(times=(1.5, 0.1))(VP())
    with pytest.raises(UserError, match="beyond T"):
        Explicit(noise_levels=(100.0, 1.0))(VE())
    # VE begins with sigma_min = 0.01: a lower noise level lies before t = 0
    with pytest.raises(UserError, match=r"ends at a noise level of 0\.001.*0\.01"):
        Explicit(noise_levels=(50.0, 0.001))(VE())
    assert Explicit(noise_levels=(50.0, 0.01))(VE())[-1] == pytest.approx(0, abs=1e-15)
    assert Explicit(noise_levels=(50.0, 0.01))(VE())[-1] >= 0
    with pytest.raises(UserError, match=r"steps=7 .* 3 times"):
        Explicit(times=(1.0, 0.5, 0.1))(VP(), 7)


@pytest.mark.parametrize("grid", grids())
@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "10", None])
def test_steps_that_are_refused(grid: Grid, steps: object) -> None:
    with pytest.raises(UserError, match="steps="):
        grid(VP(), steps)


def test_score_sde_grid_needs_two_steps() -> None:
    with pytest.raises(UserError, match="steps=1"):
        ScoreSDEGrid()(VP(), 1)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_exponents_are_named(value: float) -> None:
    with pytest.raises(UserError, match=f"grid.power={value}"):
        Quadratic(power=value)
    with pytest.raises(UserError, match=f"grid.rho={value}"):
        EDMGrid(rho=value)
