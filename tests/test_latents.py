"""Latent codes as a library: exact maps, round trips, what lies between two codes, and files of them."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sde.data import DataInfo
from sde.denoiser import Denoiser
from sde.density import decode, encode
from sde.density.flow import dtype_of
from sde.errors import UserError
from sde.grids import LogSNR
from sde.latents import (
    INTERPOLATIONS,
    Latents,
    check_fit,
    in_batches,
    interpolate,
    normality,
    read_latents,
    round_trip_error,
    sde_facts,
    write_latents,
)
from sde.parameterizations import Preconditioned
from sde.processes import SDE, VE, VP
from sde.solvers import Dopri5, Heun, Solver
from tests.problems import F64, RandomNetwork, gaussian, gaussian_flow, marginal_of_gaussian, normal, sdes

MEAN, STD = 0.7, 0.5
FINE = Dopri5(rtol=1e-9, atol=1e-9)


# The map


@pytest.mark.parametrize("sde", sdes())
def test_codes_of_gaussian_data_are_an_affine_map(sde: SDE) -> None:
    """x = m_0 + c (sd_0 / sd_T) goes to m_T + c, for the flow keeps the deviations from the mean."""
    x = MEAN + STD * normal(50, 1)
    z, nfe = encode(gaussian(sde, MEAN, STD), x, solver=FINE)
    exact = gaussian_flow(sde, x, sde.t_min, sde.T, MEAN, STD)
    assert float((z - exact).abs().max()) < 1e-6 * sde.prior_std
    assert nfe > 0
    back, _ = decode(gaussian(sde, MEAN, STD), exact, solver=FINE)
    assert float((back - x).abs().max()) < 1e-6


@pytest.mark.parametrize("sde", sdes())
def test_a_temperature_scales_the_deviation(sde: SDE) -> None:
    """The flow of Gaussian data is affine: codes t z decode to t times as far from where 0 leads."""
    denoiser, z = gaussian(sde, MEAN, STD), sde.prior_std * normal(20, 1)
    center, one, cold = (decode(denoiser, factor * z, solver=FINE)[0] for factor in (0.0, 1.0, 0.6))
    assert float((cold - center - 0.6 * (one - center)).abs().max()) < 1e-6
    (_, variance), (_, noise) = (marginal_of_gaussian(sde, t, MEAN, STD) for t in (sde.t_min, sde.T))
    slope = float((one - center).norm() / z.norm())
    assert slope == pytest.approx(math.sqrt(variance / noise), rel=1e-6)


def network(sde: SDE, numel: int) -> Denoiser:
    """A random float32 network that is asked for EDM's F: as a trained one, it knows x at little noise.

    Asked for eps, it would spread small differences by powers of the noise level, as no trained network does.
    """
    return Denoiser(RandomNetwork(numel), sde, Preconditioned())


# Root-mean-square errors of the way there and back, in a float64 state with a float32 network. dopri5 keeps those of
# some 15 steps below 1e-5 each; what one is at the other end is more by as much as the flow spreads there. Measured are
# 3e-4 at most, and 3e-5 with steps in log-SNR, the axis that networks are smooth on. Heun's steps leave 4e-5.
# An error in the map as such, or an end at another time than t_min, would be of order one.
WAYS: dict[str, tuple[Solver, dict[str, Any], float]] = {
    "dopri5": (Dopri5(), {}, 1e-3),
    "dopri5 in log-SNR": (Dopri5(variable="log_snr"), {}, 1e-4),
    "dopri5 1e-7": (Dopri5(rtol=1e-7, atol=1e-7), {}, 3e-5),
    "heun": (Heun(), {"grid": LogSNR(), "steps": 300}, 1e-4),
}


@pytest.mark.parametrize("sde", sdes(odd=False))
@pytest.mark.parametrize("way", WAYS)
def test_there_and_back(way: str, sde: SDE) -> None:
    solver, options, bound = WAYS[way]
    x = 0.5 * normal(6, 3, 2, 2)
    denoiser = network(sde, 12)
    z, _ = encode(denoiser, x, solver=solver, **options)
    assert float((z - x).abs().max()) > sde.prior_std  # it has gone somewhere
    back, _ = decode(denoiser, z, solver=solver, **options)
    assert float((back - x).square().mean().sqrt()) < bound


@pytest.mark.parametrize("sde", sdes())
def test_float32_codes_are_enough(sde: SDE) -> None:
    """Rounding a code moves what it decodes to by a hundredth of what solvers are off by, on steps that stay."""
    denoiser = network(sde, 12)
    way: dict[str, Any] = {"solver": Heun(), "grid": LogSNR(), "steps": 20}
    z = sde.prior_std * normal(6, 12)
    exact, rounded = (decode(denoiser, code, **way)[0] for code in (z, z.float()))
    assert 0 < float((exact - rounded).abs().max()) < 1e-6


def test_states_are_float32_where_some_weights_are_bfloat16() -> None:
    """As `precision=bf16` casts them: a state in bfloat16 would lose all but two digits of a picture."""
    model = torch.nn.Linear(3, 3)
    model.weight = torch.nn.Parameter(model.weight.to(torch.bfloat16))
    assert dtype_of(Denoiser(model, VP(), Preconditioned())) == torch.float32
    assert dtype_of(gaussian(VP())) == F64


@pytest.mark.parametrize("direction", [encode, decode])
def test_codes_do_not_depend_on_the_batch(direction: Any) -> None:
    """dopri5 chooses the steps of each example by itself; float32 sums would depend on the batch all the same."""
    sde = VP()
    denoiser = Denoiser(RandomNetwork(12, F64), sde, Preconditioned())
    carry = lambda x, label, progress: direction(denoiser, x, label=label, progress=progress)  # noqa: E731
    x, labels = 0.5 * normal(7, 12), torch.arange(7)
    shares: list[float] = []
    whole, nfe = in_batches(carry, x, 7, labels, progress=shares.append)
    assert len(nfe) == 1
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    for size in (1, 3):
        parts, nfe = in_batches(carry, x, size, labels)
        assert len(nfe) == math.ceil(7 / size)
        assert float((parts - whole).abs().max()) < 1e-10
    assert float((in_batches(carry, x, 7, labels.flip(0))[0] - whole).abs().max()) > 1e-2  # classes are told


# Between two codes


def ends(d: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two codes of different length."""
    return normal(d // 3, 3, seed=seed), 1.5 * normal(d // 3, 3, seed=seed + 1)


@pytest.mark.parametrize("kind", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_ends_are_exact_and_the_way_back_is_the_same(kind: str, dtype: torch.dtype) -> None:
    a, b = (end.to(dtype) for end in ends())
    w = torch.linspace(0, 1, 9, dtype=F64)
    there, back = interpolate(a, b, w, kind), interpolate(b, a, w, kind)
    assert there.shape == (9, *a.shape)
    assert there.dtype == dtype
    assert torch.equal(there[0], a)
    assert torch.equal(there[-1], b)
    torch.testing.assert_close(there, back.flip(0), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-13)


def test_spherical_is_slerp_at_a_length_in_between() -> None:
    """Shoemake's formula on unit vectors, and lengths that go linearly."""
    a, b = ends()
    w = torch.linspace(0, 1, 9, dtype=F64)
    found = interpolate(a, b, w)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.lerp(a.norm(), b.norm(), w), rtol=1e-13, atol=0)
    one, other = a / a.norm(), b / b.norm()
    angle = torch.arccos((one * other).sum())
    share = [(torch.sin(c * angle) / torch.sin(angle))[:, None, None] for c in (1 - w, w)]
    unit = found / found.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(unit, share[0] * one + share[1] * other, rtol=0, atol=1e-13)
    equal = torch.arccos((unit[:-1] * unit[1:]).sum((1, 2)))
    torch.testing.assert_close(equal, torch.full_like(equal, float(angle) / 8), rtol=1e-9, atol=0)


@pytest.mark.parametrize("gap", [0.0, 1e-300, 1e-14, 1e-9, 1e-3])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_spherical_between_nearly_parallel_and_opposite_directions(gap: float, sign: float) -> None:
    """No digits are lost: lengths are right, steps are equal, and the middle is as far from either end."""
    a, aside = normal(50), normal(50, seed=1)
    b = sign * (a + gap * aside)
    w = torch.linspace(0, 1, 5, dtype=F64)
    points = interpolate(a, b, w)
    torch.testing.assert_close(points.norm(dim=1), torch.lerp(a.norm(), b.norm(), w), rtol=1e-12, atol=0)
    unit = points / points.norm(dim=1, keepdim=True)
    steps = unit.diff(dim=0).norm(dim=1)
    angle = float(torch.atan2((b - (b @ a) / (a @ a) * a).norm() / b.norm(), (a @ b) / (a.norm() * b.norm())))
    torch.testing.assert_close(steps, torch.full_like(steps, 2 * math.sin(angle / 8)), rtol=1e-6, atol=1e-14)
    # the plane of the circle is known to a rounding of the codes over the angle that is left
    known = 1e-12 if sign > 0 or gap < 1e-12 else 1e-14 / gap
    torch.testing.assert_close(points, interpolate(b, a, w).flip(0), rtol=0, atol=known)


def test_spherical_between_opposite_codes_passes_the_axis_farthest_from_both() -> None:
    a = torch.tensor([3.0, 0.0, 4.0], dtype=F64)
    middle = interpolate(a, -2 * a, torch.tensor([0.5], dtype=F64))[0]
    torch.testing.assert_close(middle, torch.tensor([0.0, 7.5, 0.0], dtype=F64), rtol=0, atol=1e-14)


def test_spherical_with_a_code_of_length_zero() -> None:
    a = normal(4)
    half = interpolate(torch.zeros_like(a), a, torch.tensor([0.5], dtype=F64))[0]
    torch.testing.assert_close(half, 0.5 * a, rtol=1e-14, atol=0)
    assert not interpolate(0 * a, 0 * a, torch.tensor([0.5], dtype=F64)).any()


def test_what_stays_in_the_shell() -> None:
    """Half-way between independent draws |z|^2 / D is 1, and 1/2 on the straight line, up to a few sqrt(2 / D)."""
    d, half = 20_000, torch.tensor([0.5], dtype=F64)
    a, b = normal(d), normal(d, seed=1)
    sizes = {kind: float(interpolate(a, b, half, kind).square().mean()) for kind in INTERPOLATIONS}
    assert sizes == pytest.approx({"spherical": 1.0, "gaussian": 1.0, "linear": 0.5}, abs=4 * math.sqrt(2 / d))


def test_gaussian_points_are_draws_of_the_prior() -> None:
    """Over many pairs every point has variance one; spherical ones have it in high dimensions alone."""
    a, b = normal(40_000), normal(40_000, seed=1)
    points = interpolate(a, b, torch.tensor([0.2, 0.5, 0.9], dtype=F64), "gaussian")  # entries are pairs in 1-D
    assert points.var(1).tolist() == pytest.approx([1.0] * 3, abs=4 * math.sqrt(2 / 40_000))
    assert points.mean(1).abs().max() < 4 / math.sqrt(40_000)


def test_an_interpolation_that_does_not_exist() -> None:
    with pytest.raises(UserError, match=r"interpolation='sphericl'.*did you mean 'spherical'"):
        interpolate(*ends(), torch.tensor([0.5]), "sphericl")


# What is reported


def test_normality_of_draws_and_of_others() -> None:
    z = 3.0 * normal(200, 5, 10)
    found = normality(z, 3.0)
    assert found["mean"] == pytest.approx(0.0, abs=4 / 100)
    assert found["std"] == pytest.approx(1.0, abs=4 / math.sqrt(2 * 10_000))
    assert found["expected_spread"] == 0.2
    assert found["squared_norm_spread"] == pytest.approx(0.2, abs=4 * 0.2 / math.sqrt(2 * 200) * 1.2)
    assert found["squared_norm"][3] == pytest.approx(float(z[3].square().sum()) / 50 / 9, abs=1e-6)
    assert normality(z, 1.5)["std"] == pytest.approx(2 * found["std"], rel=1e-12)


def test_round_trip_error_in_units_and_gray_levels() -> None:
    info = DataInfo("four", (1, 2, 2), low=0.0, high=5.1)  # a gray level is 0.02
    values = torch.tensor([[[[0, 10], [200, 255]]]], dtype=torch.uint8)
    back = info.encode(values, F64) + torch.tensor([[0.0, 0.009], [-0.011, 0.04]], dtype=F64)
    found = round_trip_error(values, back, info)
    rms = math.sqrt((0.009**2 + 0.011**2 + 0.04**2) / 4)
    assert found == pytest.approx(
        {"rms": rms, "max": 0.04, "rms_gray_levels": 50 * rms, "max_gray_levels": 2.0, "exact": 0.75}, rel=1e-9
    )  # half a level is not noticed, and 257 is as white as 255
    points = DataInfo("points", (2,), kind="vectors")
    assert round_trip_error(torch.zeros(1, 2), torch.tensor([[0.3, -0.4]]), points) == pytest.approx(
        {"rms": math.sqrt(0.125), "max": 0.4}
    )


# Files


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    about = {"sde": sde_facts(VP()), "checkpoint": "a.pt"}
    latents = Latents(normal(4, 1, 2, 2).float(), torch.arange(4), torch.tensor([7, 1, 2, 3]), about)
    write_latents(tmp_path / "latents.npz", latents)
    for path in (tmp_path, tmp_path / "latents.npz"):
        found = read_latents(path)
        assert torch.equal(found.values, latents.values)
        assert found.labels is not None
        assert found.indices is not None
        assert found.labels.tolist() == [0, 1, 2, 3]
        assert found.indices.tolist() == [7, 1, 2, 3]
        assert dict(found.about) == about
        check_fit(found, VP(t_min_sampling=0.01), (1, 2, 2), path)
    bare = tmp_path / "bare.npz"
    np.savez(bare, latents=np.zeros((2, 3)))  # of somebody else, float64
    assert read_latents(bare).labels is None
    check_fit(read_latents(bare), VE(), (3,), bare)


def test_codes_of_another_model_are_refused(tmp_path: Path) -> None:
    latents = Latents(torch.zeros(4, 2), about={"sde": sde_facts(VP())})
    fits = partial(check_fit, latents, path=tmp_path)
    fits(VP(), (2,))
    with pytest.raises(UserError, match=r"shape \(2,\) and the run has data of shape \(3,\)"):
        fits(VP(), (3,))
    with pytest.raises(UserError, match="sde=vp and the run has sde=ve"):
        fits(VE(), (2,))
    with pytest.raises(UserError, match=r"sde.beta_max=20.0 and the run has sde.beta_max=10.0"):
        fits(VP(beta_max=10.0), (2,))
    with pytest.raises(UserError, match=r"sde.t_min=1e-05 and the run has sde.t_min=0.0001"):
        fits(VP(t_min=1e-4), (2,))


class Evil:
    """Would run something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"samples": np.zeros((2, 3))}, "holds no latents .but samples."),
    "whole numbers": ({"latents": np.zeros((2, 3), int)}, "int64 of shape .2, 3.: they must be floats"),
    "one axis": ({"latents": np.zeros(3)}, "shape .3,."),
    "empty": ({"latents": np.zeros((0, 3))}, "shape .0, 3."),
    "not finite": ({"latents": np.array([[0.0, 1.0], [np.nan, 0.0]])}, "not finite, number 1 the first"),
    "labels": ({"latents": np.zeros((2, 3)), "labels": np.zeros(3, int)}, "labels .* of shape .3,."),
    "indices": ({"latents": np.zeros((2, 3)), "indices": np.zeros(2)}, "indices .* are float64"),
    "pickle": ({"latents": np.array([Evil()], dtype=object)}, "is damaged or no .npz file"),
    "about": ({"latents": np.zeros((2, 3)), "about": np.array("{")}, "what it says about its latents"),
    "about a list": ({"latents": np.zeros((2, 3)), "about": np.array("[]")}, "what it says about its latents"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_of_something_else(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arrays, message = BROKEN[name]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_latents(tmp_path / "a.npz")
    assert not Path("touched").exists()


def test_a_file_that_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"latents=.*none.npz does not exist"):
        read_latents(tmp_path / "none.npz")
    with pytest.raises(UserError, match=r"latents=.*latents.npz does not exist"):
        read_latents(tmp_path)
    file = tmp_path / "latents.npz"
    write_latents(file, Latents(normal(4, 500).float()))
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[3000] ^= 255
    np.save(tmp_path / "one.npy", np.zeros((2, 2)))
    array = (tmp_path / "one.npy").read_bytes()
    for content in (whole[:2000], whole[:-30], b"", b"not an archive", bytes(flipped), array):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged or no \.npz file"):
            read_latents(file)
