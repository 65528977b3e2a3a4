"""Parameterizations against their definitions, EDM's table and exact rational identities of their coefficients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sde.broadcast import expand
from sde.denoiser import Denoiser
from sde.errors import UserError
from sde.parameterizations import (
    NOISE_LABELS,
    OUTPUTS,
    X0,
    Eps,
    Parameterization,
    Preconditioned,
    Score,
    V,
    Velocity,
    noise_label,
    scalar_input,
    scalar_row,
)
from sde.processes import EDM, SDE, VE, VP, RectifiedFlow
from tests.problems import (
    EPS32,
    EPS64,
    F64,
    Fixed,
    NetworkFromDenoiser,
    mixture,
    normal,
    parameterizations,
    sdes,
    times_of,
)

every_sde = pytest.mark.parametrize("sde", sdes())
every_parameterization = pytest.mark.parametrize("parameterization", parameterizations())


def states(sde: SDE, t: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x_0 (B, 5), z (B, 5) and x_t at the times `t` (B,)."""
    x0, z = normal(len(t), 5, seed=seed), normal(len(t), 5, seed=seed + 1)
    return x0, z, expand(sde.alpha(t), x0) * x0 + expand(sde.sigma(t), x0) * z


def combine(row: tuple, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a row, in the form that its docstring prefers, and the sum of the sizes of its terms."""
    on_x, on_f, rest = (None if c is None else expand(c, x) for c in row)
    terms = (on_x * x, on_f * f) if rest is None else (on_x * (x - f), rest * f)
    return terms[0] + terms[1], terms[0].abs() + terms[1].abs()


# Definitions


def test_directions_as_defined() -> None:
    for param in sdes():
        sde: SDE = param.values[0]
        t = times_of(sde)[:-1]
        x0, z, _ = states(sde, t)
        alpha, sigma = expand(sde.alpha(t), x0), expand(sde.sigma(t), x0)
        d_alpha = expand(torch.autograd.functional.jvp(sde.alpha, t, torch.ones_like(t))[1], x0)
        d_sigma = expand(torch.autograd.functional.jvp(sde.sigma, t, torch.ones_like(t))[1], x0)
        s_data = 0.5
        w = (alpha**2 * s_data**2 + sigma**2).sqrt()
        targets = {
            Eps(): z,
            Score(): -z / sigma,
            X0(): x0,
            V(): alpha * z - sigma * x0,
            Velocity(): d_alpha * x0 + d_sigma * z,
            Preconditioned(): (sigma * x0 - alpha * s_data**2 * z) / (w * s_data),
        }
        for parameterization, target in targets.items():
            p, q = parameterization.direction(sde, t)
            got = expand(p, x0) * x0 + expand(q, x0) * z
            torch.testing.assert_close(got, target, rtol=1e-9, atol=1e-12)


def test_velocity_of_a_rectified_flow_is_noise_less_data() -> None:
    sde = RectifiedFlow()
    t = times_of(sde)
    p, q = Velocity().direction(sde, t)
    # 1 - t is 1e-3 at the end: three digits of the float64 are lost there
    torch.testing.assert_close(p, -torch.ones_like(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(q, torch.ones_like(t), rtol=1e-12, atol=0)


def test_edm_preconditioning_as_printed() -> None:
    # arXiv 2206.00364, table 1, on EDM's own process
    sde, sigma = EDM(), torch.logspace(-3, math.log10(80), 50, dtype=F64)
    for s_data in (0.5, 1.7):
        skip, out, into, noise = Preconditioned(sigma_data=s_data, noise_label="log_sigma").coefficients(sde, sigma)
        torch.testing.assert_close(skip, s_data**2 / (sigma**2 + s_data**2), rtol=1e-13, atol=0)
        torch.testing.assert_close(out, sigma * s_data / (s_data**2 + sigma**2).sqrt(), rtol=1e-13, atol=0)
        torch.testing.assert_close(into, 1 / (sigma**2 + s_data**2).sqrt(), rtol=1e-13, atol=0)
        torch.testing.assert_close(noise, torch.log(sigma) / 4, rtol=1e-13, atol=1e-15)


@every_sde
def test_edm_input_and_target_have_unit_variance(sde: SDE) -> None:
    # with Var x_0 = sigma_data^2 per entry: the point of the preconditioning, on any SDE
    t, s_data = times_of(sde), 0.37
    parameterization = Preconditioned(sigma_data=s_data)
    p, q = parameterization.direction(sde, t)
    one = torch.ones_like(t)
    torch.testing.assert_close(p**2 * s_data**2 + q**2, one, rtol=1e-13, atol=0)
    variance = sde.alpha(t) ** 2 * s_data**2 + sde.sigma(t) ** 2
    torch.testing.assert_close(parameterization.c_in(sde, t) ** 2 * variance, one, rtol=1e-13, atol=0)
    # and it is orthogonal to the input, which makes c_skip optimal
    cross = sde.alpha(t) * p * s_data**2 + sde.sigma(t) * q
    assert (cross.abs() <= 8 * EPS64 * variance.sqrt()).all()


# Inversion


@every_parameterization
@every_sde
def test_rows_invert_the_direction(sde: SDE, parameterization: Parameterization) -> None:
    t = times_of(sde)[:-1]
    x0, z, x = states(sde, t)
    p, q = parameterization.direction(sde, t)
    f = expand(p, x) * x0 + expand(q, x) * z
    alpha, sigma = expand(sde.alpha(t), x), expand(sde.sigma(t), x)
    expected = {"denoised": x0, "eps": z, "score": -z / sigma, "v": alpha * z - sigma * x0}
    assert set(expected) == set(OUTPUTS)
    for name, value in expected.items():
        row = parameterization.row(name, sde, t)
        got, size = combine(row, x, f)
        # rounding of the sums x and F themselves enters through the plain form of the row
        size = size + expand(row.x, x).abs() * ((alpha * x0).abs() + (sigma * z).abs())
        size = size + expand(row.F, x).abs() * (expand(p, x).abs() * x0.abs() + expand(q, x).abs() * z.abs())
        # the velocity's q = sigma' is f sigma + g^2 / (2 sigma), of size |f| / alpha^2 before the two cancel, and
        # cancels with p in v
        lost = expand(1 + (sde.f(t) * t).abs(), x) ** 2 / alpha**2
        assert ((got - value).abs() <= 32 * EPS64 * lost * (size + value.abs())).all(), name
        # the two forms of a row are one
        if row.rest is not None:
            torch.testing.assert_close(row.rest, row.x + row.F, rtol=0, atol=16 * EPS64 * float(row.x.abs().max()))


@every_parameterization
@every_sde
def test_coefficients_are_the_denoised_row(sde: SDE, parameterization: Parameterization) -> None:
    t = times_of(sde)
    skip, out, into, noise = parameterization.coefficients(sde, t, "sigma")
    row = parameterization.row("denoised", sde, t)
    assert torch.equal(skip, row.x)
    assert torch.equal(out, row.F)
    assert torch.equal(into, parameterization.c_in(sde, t))
    assert torch.equal(noise, sde.noise_level(t))
    # moving z alone must leave x_0: c_skip sigma + c_out q = 0 and c_skip alpha + c_out p = 1
    p, q = parameterization.direction(sde, t)
    scale = (skip * sde.sigma(t)).abs() + (out * q).abs()
    pole = 1 + (sde.f(t) * t).abs()
    assert ((skip * sde.sigma(t) + out * q).abs() <= 16 * EPS64 * scale * pole).all()
    one = skip * sde.alpha(t) + out * p
    assert ((one - 1).abs() <= 16 * EPS64 * ((skip * sde.alpha(t)).abs() + (out * p).abs() + 1) * pole).all()


@every_parameterization
@pytest.mark.parametrize("label", NOISE_LABELS)
@every_sde
def test_a_perfect_network_gives_the_exact_denoiser(sde: SDE, parameterization: Parameterization, label: str) -> None:
    law = mixture()
    exact = law.denoiser(sde)
    network = NetworkFromDenoiser(exact, parameterization, label)
    denoiser = Denoiser(network, sde, parameterization)
    t = times_of(sde, 4)[1:-1]
    x = sde.perturb(exact.sample(len(t)), t, normal(len(t), 2))
    for name in OUTPUTS:
        expected = exact.output(name, x, t)
        row = parameterization.row(name, sde, t)
        p, q = parameterization.direction(sde, t)
        # the time that the network reads from its label is right to the rounding of the log-SNR (EPS64 times 30), and
        # everything is as sensitive to it as 1 + t f; then the row amplifies the rounding of F
        size = expand(row.F.abs() * (p.abs() + q.abs()) + row.x.abs(), x) * (1 + x.abs())
        pole = expand(1 + (sde.f(t) * t).abs(), x) ** 2
        tolerance = 400 * EPS64 * pole * (size + 1)
        assert ((denoiser.output(name, x, t) - expected).abs() <= tolerance).all(), name
        for b in range(len(t)):
            single = denoiser.output(name, x[b : b + 1], float(t[b]))
            assert ((single - expected[b]).abs() <= tolerance[b]).all(), name


# float32


def float32_case(parameterization: Parameterization, sde: SDE, t: float) -> tuple[Tensor, Tensor]:
    """Realistic float32 inputs (x, F) at time t."""
    at = torch.tensor(t, dtype=F64)
    x0, z, x = states(sde, at.expand(400))
    p, q = parameterization.direction(sde, at)
    return x.float(), (p * x0 + q * z).float()


@every_parameterization
@every_sde
@pytest.mark.parametrize("output", OUTPUTS)
def test_float32_outputs_are_as_good_as_their_inputs(sde: SDE, parameterization: Parameterization, output: str) -> None:
    """From the same float32 (x, F), float32 arithmetic gives the float64 answer to a few roundings.

    Next to the data, where a score taken through x_0 would have lost 2.5 %.
    """
    for t in (1e-5, sde.t_min, sde.t_min_sampling):
        t = float(torch.tensor(t, dtype=torch.float32))
        x, f = float32_case(parameterization, sde, t)
        exact = Denoiser(Fixed(f.double()), sde, parameterization).output(output, x.double(), t)
        _, size = combine(parameterization.row(output, sde, torch.tensor(t, dtype=F64)), x.double(), f.double())
        times = (t, torch.tensor(t), torch.full((len(x),), t), torch.full((len(x),), t, dtype=F64))
        for at in times:
            got = Denoiser(Fixed(f), sde, parameterization).output(output, x, at)
            assert got.dtype == torch.float32
            error = (got.double() - exact).abs()
            # each term: rounded coefficient, rounded product (of a rounded difference); then the sum
            assert (error <= 4 * EPS32 * (size + exact.abs())).all()
            # and the terms hardly cancel: near rounding over all entries together
            assert float(error.norm() / exact.norm()) < 8 * EPS32


# Noise labels


@every_sde
def test_noise_labels_as_stated(sde: SDE) -> None:
    t = times_of(sde)
    level = sde.sigma(t) / sde.alpha(t)
    unit = torch.log(t / sde.t_min) / math.log(sde.T / sde.t_min) if isinstance(sde, EDM) else t / sde.T
    torch.testing.assert_close(noise_label("time", sde, t), 999 * unit, rtol=1e-14, atol=0)
    torch.testing.assert_close(noise_label("sigma", sde, t), level, rtol=1e-12, atol=0)
    torch.testing.assert_close(noise_label("log_sigma", sde, t), torch.log(level) / 4, rtol=1e-12, atol=1e-14)


class Listener(torch.nn.Module):
    """Keeps the noise label that it is shown."""

    def __init__(self, noise_label: str | None) -> None:
        super().__init__()
        if noise_label is not None:
            self.noise_label = noise_label

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        self.heard, self.seen = c_noise, x
        return x


@every_parameterization
@pytest.mark.parametrize("wanted", [None, *NOISE_LABELS])
def test_auto_is_what_the_network_asks_for(parameterization: Parameterization, wanted: str | None) -> None:
    sde, x = VP(), normal(3, 2)
    network = Listener(wanted)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    Denoiser(network, sde, parameterization).denoised(x, t)
    torch.testing.assert_close(network.heard, noise_label(wanted or "time", sde, t), rtol=1e-15, atol=0)
    torch.testing.assert_close(network.seen, x * expand(parameterization.c_in(sde, t), x), rtol=1e-15, atol=0)
    Denoiser(network, sde, parameterization).denoised(x, 0.5)
    assert network.heard.shape == (3,)
    torch.testing.assert_close(network.heard, noise_label(wanted or "time", sde, t[1]).expand(3), rtol=1e-15, atol=0)


@pytest.mark.parametrize("cls", [pytest.param(type(case.values[0]), id=case.id) for case in parameterizations()])
def test_a_label_of_its_own_overrides_the_network(cls: type) -> None:
    sde, x, t = VE(), normal(3, 2), torch.full((3,), 0.5, dtype=F64)
    for own in NOISE_LABELS:
        for asked in NOISE_LABELS:
            network = Listener(asked)
            Denoiser(network, sde, cls(noise_label=own)).eps(x, t)
            torch.testing.assert_close(network.heard, noise_label(own, sde, t), rtol=1e-15, atol=0)
    with pytest.raises(UserError, match=r"noise_label='sigmas'.*did you mean 'sigma'"):
        cls(noise_label="sigmas")


# Tables and errors


@every_parameterization
@every_sde
def test_numbers_and_tensors_agree(sde: SDE, parameterization: Parameterization) -> None:
    for t in (sde.t_min, 0.37 * sde.T, sde.T):
        for output in OUTPUTS:
            row = parameterization.row(output, sde, torch.tensor([t], dtype=F64))
            scalars = scalar_row(parameterization, output, sde, t)
            for tensor, number in zip(row, scalars, strict=True):
                assert (tensor is None) == (number is None)
                if tensor is not None:
                    assert number == pytest.approx(tensor.item(), rel=1e-10, abs=1e-300)
        c_in, c_noise = scalar_input(parameterization, sde, t, "time")
        assert c_in == pytest.approx(parameterization.c_in(sde, t).item(), rel=1e-14)
        assert c_noise == pytest.approx(999 * float(sde.unit_time(t)), rel=1e-14)


@every_parameterization
def test_an_unknown_output_is_named(parameterization: Parameterization) -> None:
    with pytest.raises(UserError, match=r"output='scores'.*did you mean 'score'"):
        parameterization.row("scores", VP(), 0.5)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "auto"])
def test_bad_sigma_data_is_named(value: object) -> None:
    with pytest.raises(UserError, match="sigma_data"):
        Preconditioned(sigma_data=value)
