"""Time grids against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sde.config import build, conf_dir
from sde.errors import UserError
from sde.grids import (
    CosineGrid,
    EDMGrid,
    Explicit,
    Exponential,
    Focused,
    Grid,
    Karras,
    LogSNR,
    Polyexponential,
    Quadratic,
    ScoreSDEGrid,
    Uniform,
)
from sde.processes import EDM, SDE, VE, VP, Cosine, RectifiedFlow
from tests.problems import F64, all_grids, grids, sdes

every_sde = pytest.mark.parametrize("sde", sdes())

# The level of a time is known to about 1e-13 of itself: a time rounds to 1.1e-16 of itself, and a level changes up to
# a thousand times as fast as its time (rectified flow and cosine close to T, where the signal ends).
LEVELS = 1e-12


def levels(sde: SDE, times: list[float]) -> np.ndarray:
    return sde.noise_level(torch.tensor(times, dtype=F64)).numpy()


def level_ends(sde: SDE) -> tuple[float, float]:
    high, low = levels(sde, [sde.T, sde.t_min_sampling])
    return float(high), float(low)


@pytest.mark.parametrize("grid", grids())
@every_sde
def test_ends_and_direction(sde: SDE, grid: Grid) -> None:
    for steps in (2, 3, 10, 18, 256, 1000):
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
        Quadratic(power=0.5): lambda t: t**2,
        EDMGrid(): lambda t: level(t) ** (1 / 7),
        EDMGrid(rho=2.5): lambda t: level(t) ** (1 / 2.5),
        Karras(rho=3.0): lambda t: level(t) ** (1 / 3),
        LogSNR(): lambda t: float(sde.log_snr(t)),
        Exponential(): lambda t: math.log(level(t)),
        CosineGrid(): lambda t: math.atan2(float(sde.sigma(t)), 0.5 * float(sde.alpha(t))),
        CosineGrid(sigma_data=3.0): lambda t: math.atan2(float(sde.sigma(t)), 3.0 * float(sde.alpha(t))),
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
@pytest.mark.parametrize("n", [2, 11, 101])
@pytest.mark.parametrize("own_ends", [False, True])
def test_grids_of_k_diffusion(sde: SDE, n: int, own_ends: bool) -> None:
    """The sigmas that get_sigmas_karras, _exponential and _polyexponential give for n levels, less the zero."""
    high, low = level_ends(sde)
    options = {"sigma_min": 2 * low, "sigma_max": 0.3 * high} if own_ends else {}
    high, low = options.get("sigma_max", high), options.get("sigma_min", low)

    def karras(rho: float) -> np.ndarray:
        # theirs is top + ramp (bottom - top), the same but for the rounding, which would be as large as `top`'s
        return (np.linspace(1, 0, n) * high ** (1 / rho) + np.linspace(0, 1, n) * low ** (1 / rho)) ** rho

    def polyexponential(rho: float) -> np.ndarray:
        return np.exp(np.linspace(1, 0, n) ** rho * (np.log(high) - np.log(low)) + np.log(low))

    expected = {
        Karras(**options): karras(7),
        Karras(**options, rho=1.5): karras(1.5),
        Exponential(**options): np.exp(np.linspace(np.log(high), np.log(low), n)),
        Polyexponential(**options): polyexponential(1),
        Polyexponential(**options, rho=2.0): polyexponential(2),
        Polyexponential(**options, rho=0.5): polyexponential(0.5),
    }
    for grid, sigmas in expected.items():
        np.testing.assert_allclose(levels(sde, grid(sde, n - 1)), sigmas, rtol=LEVELS, err_msg=str(grid))


@every_sde
def test_grids_of_several_names_are_the_same(sde: SDE) -> None:
    assert Karras()(sde, 18) == EDMGrid()(sde, 18)
    assert Exponential()(sde, 18) == LogSNR()(sde, 18)
    np.testing.assert_allclose(
        levels(sde, Polyexponential(rho=1.0)(sde, 18)), levels(sde, LogSNR()(sde, 18)), rtol=LEVELS
    )


@every_sde
def test_powers_that_are_other_grids(sde: SDE) -> None:
    np.testing.assert_allclose(Quadratic(power=1.0)(sde, 10), Uniform()(sde, 10), rtol=1e-13)
    high, low = level_ends(sde)
    np.testing.assert_allclose(levels(sde, EDMGrid(rho=1.0)(sde, 10)), np.linspace(high, low, 11), rtol=LEVELS)
    # large powers are uniform in the logarithm: v^(1/rho) = 1 + log(v)/rho + O(1/rho^2)
    near = np.log(levels(sde, LogSNR()(sde, 10)))
    for rho in (1e3, 1e5, 1e8):
        far = np.log(levels(sde, EDMGrid(rho=rho)(sde, 10)))
        np.testing.assert_allclose(far, near, atol=(near[0] - near[-1]) ** 2 / rho + LEVELS)
    far = Quadratic(power=1e12)(sde, 10)
    np.testing.assert_allclose(far, np.geomspace(sde.T, sde.t_min_sampling, 11), rtol=1e-10)


@every_sde
def test_cosine_grid_between_two_others(sde: SDE) -> None:
    """arctan(v / c) is v/c - O((v/c)^3) for large c, and pi/2 - c/v + O((c/v)^3) for small."""
    high, low = level_ends(sde)
    flat = levels(sde, CosineGrid(sigma_data=1e3 * high)(sde, 10))
    np.testing.assert_allclose(flat, np.linspace(high, low, 11), atol=high * 1e-6, rtol=0)
    steep = levels(sde, CosineGrid(sigma_data=1e-3 * low)(sde, 10))
    np.testing.assert_allclose(1 / steep, np.linspace(1 / high, 1 / low, 11), atol=1e-6 / low, rtol=0)


def test_cosine_grid_is_the_cosine_schedule() -> None:
    """alpha-bar = cos^2 of equally spaced angles (arXiv 2102.09672, equation 17, without the division by f(0))."""
    n = 20
    for sde in (VP(), VP(beta_max=6.0, T=3.0), Cosine()):
        first, last = (math.acos(float(sde.alpha(t))) for t in (sde.T, sde.t_min_sampling))
        alpha_bar = sde.alpha(torch.tensor(CosineGrid(sigma_data=1.0)(sde, n), dtype=F64)).numpy() ** 2
        # acos of a number beside 1 knows the smallest angle, 1e-2, to 1e-14; alpha-bar as small as 1e-6 counts
        # the rounding of pi/2 a thousandfold
        np.testing.assert_allclose(alpha_bar, np.cos(np.linspace(first, last, n + 1)) ** 2, rtol=1e-12)
    straight = Cosine(s=0.0)  # alpha = cos(pi t / 2)
    np.testing.assert_allclose(CosineGrid(sigma_data=1.0)(straight, n), Uniform()(straight, n), rtol=LEVELS)


@every_sde
@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 1.0, 4.0])
def test_cosine_grid_has_a_shifted_log_snr(sde: SDE, sigma_data: float) -> None:
    """log SNR = -2 log tan(angle) - 2 log(sigma_data) (arXiv 2301.11093, section 3.1)."""
    high, low = level_ends(sde)
    angles = np.linspace(np.arctan2(high, sigma_data), np.arctan2(low, sigma_data), 31)
    times = torch.tensor(CosineGrid(sigma_data)(sde, 30), dtype=F64)
    # the angle's 1.1e-16 is up to 1e3 / 0.1 of what lacks to pi/2
    np.testing.assert_allclose(
        sde.log_snr(times).numpy(), -2 * np.log(np.tan(angles)) - 2 * np.log(sigma_data), rtol=0, atol=1e-11
    )


def test_processes_whose_time_is_the_variable_of_a_grid() -> None:
    np.testing.assert_allclose(Exponential()(VE(), 30), Uniform()(VE(), 30), rtol=0, atol=1e-14)
    np.testing.assert_allclose(EDMGrid(rho=1.0)(EDM(), 30), Uniform()(EDM(), 30), rtol=1e-13)
    np.testing.assert_allclose(EDMGrid(rho=3.0)(EDM(), 30), Quadratic(power=3.0)(EDM(), 30), rtol=1e-13)


@pytest.mark.parametrize("n", [10, 25, 50])
def test_timestep_spacings_of_diffusers(n: int) -> None:
    """arXiv 2305.08891, table 2: the place k = 0 ... N - 1 of a chain is the time (k + 1) / N."""
    chain = 1000
    trailing = (np.round(np.arange(chain, 0, -chain / n)) - 1 + 1) / chain
    times = Uniform()(VP(), n)
    np.testing.assert_allclose(times[:-1], trailing, rtol=0, atol=VP().t_min_sampling)
    linspace = (np.linspace(0, chain - 1, n)[::-1] + 1) / chain  # before its rounding to whole numbers
    np.testing.assert_allclose(Uniform()(VP(t_min_sampling=1 / chain), n - 1), linspace, rtol=1e-13)


@pytest.mark.parametrize("grid", [Karras, Exponential, Polyexponential])
def test_ends_of_ones_own(grid: Any) -> None:
    for sde in (VP(), VE(), EDM(), RectifiedFlow(T=0.9)):
        high, low = level_ends(sde)
        for n in (1, 2, 100):
            times = grid(sigma_min=0.2, sigma_max=5.0)(sde, n)
            assert len(times) == n + 1
            np.testing.assert_allclose(levels(sde, [times[0], times[-1]]), [5.0, 0.2], rtol=LEVELS)
            assert grid(sigma_max=5.0)(sde, n)[-1] == sde.t_min_sampling
            assert grid(sigma_min=0.2)(sde, n)[0] == sde.T
        # the SDE's own levels, even when they have been float32, are its own ends exactly
        rounded = grid(sigma_min=float(np.float32(low)), sigma_max=float(np.float32(high)))
        assert rounded(sde, 10) == grid()(sde, 10)


def test_ends_outside_the_process() -> None:
    with pytest.raises(UserError, match=r"grid\.sigma_min=0\.001 is not between 0\.002 and 80"):
        Karras(sigma_min=0.001)(EDM(), 10)
    with pytest.raises(UserError, match=r"grid\.sigma_max=81 is not between 0\.002 and 80"):
        Exponential(sigma_max=81.0)(EDM(), 10)
    with pytest.raises(UserError, match=r"grid\.sigma_min=80 is not between"):
        Polyexponential(sigma_min=80.0)(EDM(), 10)
    with pytest.raises(UserError, match=r"grid\.sigma_max=0\.002 is not between"):
        Polyexponential(sigma_max=0.002)(EDM(), 10)


@pytest.mark.parametrize("grid", [Karras, Exponential, Polyexponential])
def test_ends_that_are_refused(grid: Any) -> None:
    for value in (0.0, -1.0, math.nan, math.inf, "1", True):
        for name in ("sigma_min", "sigma_max"):
            with pytest.raises(UserError, match=rf"grid\.{name}={value!r} is"):
                grid(**{name: value})
    for low in (5.0, 6.0):
        with pytest.raises(UserError, match=rf"grid\.sigma_max=5\.0 .* above {low:g}"):
            grid(sigma_min=low, sigma_max=5.0)


@pytest.mark.parametrize(
    ("grid", "steps"),
    [(Polyexponential(rho=7.0), 1000), (Polyexponential(rho=60.0), 10), (CosineGrid(sigma_data=1e-20), 10)],
)
def test_steps_too_close_to_tell_apart(grid: Grid, steps: int) -> None:
    with pytest.raises(UserError, match=rf"^{type(grid).__name__}\(.*steps={steps} .*take fewer"):
        grid(EDM(), steps)


def test_extreme_powers_do_not_overflow() -> None:
    for grid in (
        EDMGrid(rho=1e-2),
        EDMGrid(rho=1e300),
        Karras(rho=1e-2),
        Quadratic(power=1e-2),
        Quadratic(power=1e300),
    ):
        for sde in (EDM(), VP(beta_max=4000.0)):
            times = grid(sde, 100)
            assert all(t > s > 0 for t, s in pairwise(times))


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


def test_explicit_lists_of_any_kind() -> None:
    values = [0.75, 0.5, 0.125]
    kinds: list[Callable[[list[float]], Any]]
    kinds = [list, tuple, iter, np.array, torch.tensor, lambda v: np.array(v, dtype=np.float32)]
    for kind in kinds:
        grid = Explicit(times=kind(values))
        assert grid == Explicit(times=tuple(values))
        assert hash(grid) == hash(Explicit(times=tuple(values)))
        assert grid(VP()) == values
        assert Explicit(noise_levels=kind(values))(EDM()) == pytest.approx(values, rel=1e-15)
    assert Explicit(times=[1, 0])(VP()) == [1.0, 0.0]


@every_sde
def test_explicit_takes_what_other_grids_give(sde: SDE) -> None:
    for grid in all_grids().values():
        times = grid(sde, 18)
        assert Explicit(times=times)(sde) == times
        sigmas = levels(sde, times)
        back = Explicit(noise_levels=sigmas.tolist())(sde, 18)
        np.testing.assert_allclose(levels(sde, back), sigmas, rtol=LEVELS)
        # sigmas of libraries that compute in float32
        back = Explicit(noise_levels=sigmas.astype(np.float32).tolist())(sde)
        assert back[0] <= sde.T
        assert back[-1] >= 0
        np.testing.assert_allclose(levels(sde, back), sigmas, rtol=2e-7)


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
    with pytest.raises(UserError, match=f"grid.rho={value}"):
        Karras(rho=value)
    with pytest.raises(UserError, match=f"grid.rho={value}"):
        Polyexponential(rho=value)
    with pytest.raises(UserError, match=f"grid.sigma_data={value}"):
        CosineGrid(sigma_data=value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["grid=uniform"], Uniform()),
        (["grid=quadratic", "grid.power=3"], Quadratic(power=3.0)),
        (["grid=edm", "grid.rho=5"], EDMGrid(rho=5.0)),
        (["grid=logsnr"], LogSNR()),
        (["grid=cosine", "grid.sigma_data=1"], CosineGrid(sigma_data=1.0)),
        (["grid=karras", "grid.sigma_max=40", "grid.rho=3"], Karras(sigma_max=40.0, rho=3.0)),
        (["grid=exponential", "grid.sigma_min=1e-2"], Exponential(sigma_min=0.01)),
        (["grid=polyexponential", "grid.rho=2"], Polyexponential(rho=2.0)),
        (["grid=explicit", "grid.times=[1,0.5,0]"], Explicit(times=(1.0, 0.5, 0.0))),
        (["grid=explicit", "grid.noise_levels=[80,1e-2]"], Explicit(noise_levels=(80.0, 0.01))),
        (["grid=score_sde"], ScoreSDEGrid()),
    ],
)
def test_grids_of_the_command_line(overrides: list[str], expected: Grid) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        node = OmegaConf.to_container(compose("sample", overrides=overrides)["grid"])
    grid = build(node, "grid")  # type: ignore[arg-type]
    assert grid == expected
    assert type(grid) is type(expected)


@pytest.mark.parametrize("sde", sdes())
@pytest.mark.parametrize(("center", "focus"), [(0.25, 2.0), (2.0, 0.7), (0.01, 30.0)])
def test_focused_grid_has_its_density(sde: SDE, center: float, focus: float) -> None:
    """Steps of log u + 2 focus arctan(u / center) are equal; the step at the center is that of the stated density."""
    log_level = np.log(levels(sde, Focused(center, focus)(sde, 400)))
    coordinate = log_level + 2 * focus * np.arctan(np.exp(log_level) / center)
    steps = -np.diff(coordinate)
    # what is lost going from a level to a time and back where levels move a thousand times as fast as time
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-6)
    middle = 0.5 * (log_level[1:] + log_level[:-1])
    density = 1 + focus / np.cosh(middle - math.log(center))  # 1 + focus at the center
    # a step's mean density against that in its middle: off by its curvature, 1 / 24 of the step squared and more
    np.testing.assert_allclose(steps / -np.diff(log_level), density, rtol=0.02)


@pytest.mark.parametrize("sde", sdes())
def test_focused_grid_without_focus_is_logsnr(sde: SDE) -> None:
    np.testing.assert_allclose(
        levels(sde, Focused(focus=0.0)(sde, 30)), levels(sde, LogSNR()(sde, 30)), rtol=LEVELS, atol=0
    )
