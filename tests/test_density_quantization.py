"""Gray levels, bits per dimension and decoders, against DataInfo, score_sde's formulas and numbers of 60 digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import logsumexp
from torch import Tensor

from sde.data.base import DataInfo
from sde.density.quantization import Quantization, bits_per_dim, change_of_units, nats
from sde.errors import UserError
from tests.problems import EPS64, F64, normal

PICTURES = DataInfo("pictures", (1, 4, 4))
ODD = DataInfo("odd", (1, 4, 4), low=-0.3, high=2.2)
every_info = pytest.mark.parametrize("info", [PICTURES, ODD], ids=["unit", "odd"])


def every_level(q: Quantization) -> Tensor:
    return torch.arange(q.levels)[:, None]


# Levels


@every_info
def test_levels_are_those_of_the_data(info: DataInfo) -> None:
    q, pixels = Quantization.of(info), torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        x = q.encode(pixels, dtype)
        assert torch.equal(x, info.encode(pixels.reshape(1, 1, 16, 16), dtype).flatten())
        assert torch.equal(q.index(x), pixels.long())
        assert torch.equal(q.index(x).to(torch.uint8), info.decode(x))
    assert q.width == pytest.approx((info.high - info.low) / 255, rel=1e-15)
    far = torch.tensor([info.low - 9, info.high + 9, math.nan])
    assert q.index(far).tolist() == [0, 255, 0]


def test_vectors_are_refused_and_so_are_bad_numbers() -> None:
    with pytest.raises(UserError, match="'points' holds vectors"):
        Quantization.of(DataInfo("points", (2,), kind="vectors"))
    for wrong in ({"low": 2.0}, {"levels": 1}, {"levels": 2.5}, {"levels": True}, {"high": math.inf}):
        with pytest.raises(UserError, match=next(iter(wrong)) if wrong != {"low": 2.0} else "high"):
            Quantization(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="give integers"):
        Quantization().encode(torch.zeros(3))
    for call in (lambda: bits_per_dim(torch.zeros(1), 0), lambda: bits_per_dim(torch.zeros(1), 1, 0.0)):
        with pytest.raises(UserError, match="out of range"):
            call()
    with pytest.raises(UserError, match="scale"):
        change_of_units(torch.zeros(1), 0.0, 3)


@every_info
def test_dequantized_pixels_fill_their_buckets(info: DataInfo) -> None:
    q, pixels = Quantization.of(info), torch.arange(256, dtype=torch.uint8)
    low, high = (q.dequantize(pixels, torch.full((256,), u, dtype=F64)) for u in (0.0, 1.0))
    # the buckets lie side by side, a level in the middle of each
    torch.testing.assert_close(high[:-1], low[1:], rtol=0, atol=8 * EPS64)
    torch.testing.assert_close(0.5 * (low + high), q.encode(pixels, F64), rtol=0, atol=8 * EPS64)
    u = torch.rand(256, dtype=F64, generator=torch.Generator().manual_seed(0)) * 0.999
    x = q.dequantize(q.encode(pixels, F64), u)
    assert torch.equal(q.index(x), pixels.long())
    assert q.dequantize(pixels, u, torch.float32).dtype == torch.float32
    assert torch.equal(q.dequantize(pixels, u), x)


@pytest.mark.parametrize("centered", [True, False])
def test_score_sde_convention(centered: bool) -> None:
    """Its data, scaler and offset, written out."""
    q, pixels = Quantization.score_sde(centered), torch.arange(256)
    u = torch.linspace(0, 0.99, 256, dtype=F64)
    dequantized = (255 * (pixels.double() / 255) + u) / 256
    expected = 2 * dequantized - 1 if centered else dequantized
    torch.testing.assert_close(q.dequantize(pixels, u), expected, rtol=0, atol=4 * EPS64)
    log_prob, numel = torch.tensor([-3000.0, 12000.0], dtype=F64), 3072
    offset = 7.0 - ((-1.0 + 1) / 2 if centered else -1.0)
    torch.testing.assert_close(
        bits_per_dim(log_prob, numel, q.width), -log_prob / math.log(2) / numel + offset, rtol=1e-14, atol=0
    )


# Bits


def test_bits_of_known_densities() -> None:
    q, d = Quantization(), 12
    # uniform over the buckets: a probability of 1 / 256 for each level
    uniform = torch.full((2,), -d * math.log(256 * q.width), dtype=F64)
    torch.testing.assert_close(bits_per_dim(uniform, d, q.width), torch.full((2,), 8.0, dtype=F64), rtol=1e-14, atol=0)
    # a density that gives half of each bucket twice the mass costs a bit less where it is
    torch.testing.assert_close(
        bits_per_dim(uniform + d * math.log(2), d, q.width), torch.full((2,), 7.0, dtype=F64), rtol=1e-14, atol=0
    )
    coin = torch.tensor([-5 * math.log(2)], dtype=F64)
    assert float(bits_per_dim(coin, 5)) == pytest.approx(1, rel=1e-15)


def test_bits_and_nats_are_inverse() -> None:
    log_prob = 1e3 * normal(5)
    for width in (None, 2 / 255):
        torch.testing.assert_close(nats(bits_per_dim(log_prob, 7, width), 7, width), log_prob, rtol=1e-12, atol=1e-11)


def test_change_of_units() -> None:
    law, x, scale = torch.distributions.Normal(0.3, 0.7), normal(6, 4), -2.5
    scaled = torch.distributions.Normal(0.3 * scale, 0.7 * abs(scale))
    torch.testing.assert_close(
        change_of_units(law.log_prob(x).sum(1), scale, 4), scaled.log_prob(scale * x).sum(1), rtol=1e-6, atol=0
    )
    # the number of bits is that of the pixels, whatever unit the density is in
    q, log_prob = Quantization(), law.log_prob(x).double().sum(1)
    torch.testing.assert_close(
        bits_per_dim(change_of_units(log_prob, scale, 4), 4, q.width * abs(scale)),
        bits_per_dim(log_prob, 4, q.width),
        rtol=1e-13,
        atol=0,
    )


# The normal mass of a bucket


def reference_log_mass(center: float, half: float) -> float:
    """log of the standard normal mass of [center - half, center + half], from the standard library and quadrature.

    An interval that reaches far to both sides of 0 is 1 less its tails; any other is the quadrature of the density
    relative to that at the inner end. All integrands are positive, nothing cancels.
    """
    low = abs(center) - half
    if low < -1:
        return math.log1p(-0.5 * (math.erfc(-low / math.sqrt(2)) + math.erfc((abs(center) + half) / math.sqrt(2))))
    # exp(-low s - s^2/2) falls below 1e-17 of itself beyond the second and the third
    reach = min(2 * half, 40 / max(low, 1e-300), 10.0)
    total, _ = quad(lambda s: math.exp(-s * (low + 0.5 * s)), 0, reach, epsabs=0, epsrel=1e-13, limit=200)
    return -0.5 * low * low - 0.5 * math.log(2 * math.pi) + math.log(total)


CENTERS = (0.0, 1e-3, 0.3, 0.9, 1.0, 1.7, 6.0, 12.0, 40.0, 300.0, 1000.0)
WIDTHS = (1e-9, 1e-6, 1e-3, 0.09, 0.5, 0.99, 1.01, 2.0, 3.5, 20.0, 600.0, 3000.0)


def bucket(center: float, width: float) -> tuple[Quantization, Tensor, Tensor]:
    """A middle bucket of 5 of `width` standard deviations, its level 2 at `center` deviations from the mean 0."""
    q = Quantization(center - 2 * width, center + 2 * width, 5)
    return q, torch.tensor([[2]]), torch.zeros(1, 1, dtype=F64)


@pytest.mark.parametrize("width", WIDTHS)
def test_log_mass_in_the_tails_and_of_narrow_and_wide_buckets(width: float) -> None:
    for center in CENTERS:
        for sign in (-1, 1):
            q, level, mean = bucket(sign * center, width)
            got = float(q.log_mass(level, mean, 1.0))
            at, half = float(q.encode(level, F64)), 0.5 * q.width
            expected = reference_log_mass(at, half)
            # an end that is rounded moves the log of a density by end^2 roundings; quadrature is good to 1e-13. The
            # probability outside of a bucket with nearly all of it is right to its last digits too
            end = abs(at) + half
            tolerance = 8 * EPS64 * (1 + (end if expected > -1 else at) ** 2 + abs(expected)) + 2e-13
            assert abs(got - expected) <= tolerance * min(1, abs(expected)), center


def test_a_narrow_bucket_is_density_times_width() -> None:
    """To second order in the width: log mass = log phi(c) + log w + log(1 + (c^2 - 1) w^2 / 24 + ...)."""
    for center in (0.0, 0.5, 3.0, 100.0, 1000.0):
        for width in (1e-12, 1e-9, 1e-7):
            q, level, mean = bucket(center, width)
            at = float(q.encode(level, F64))
            expected = -0.5 * at * at - 0.5 * math.log(2 * math.pi) + math.log(q.width)
            expected += math.log1p((at * at - 1) * q.width**2 / 24)
            # the next term is (c w)^4 / 1920 < 1e-19
            assert float(q.log_mass(level, mean, 1.0)) == pytest.approx(expected, rel=8 * EPS64)


def test_end_buckets_are_open() -> None:
    q = Quantization(levels=4)
    law = torch.distributions.Normal(torch.tensor(0.2, dtype=F64), 0.6)
    x, mean = every_level(q), torch.full((4, 1), 0.2, dtype=F64)
    edges = law.cdf(torch.tensor([-2 / 3, 0.0, 2 / 3], dtype=F64))
    expected = torch.cat([edges[:1], edges.diff(), 1 - edges[2:]])
    torch.testing.assert_close(q.log_mass(x, mean, 0.6).exp(), expected, rtol=1e-13, atol=0)
    # far from both ends of the range too: nothing is clamped
    far = q.log_mass(x, torch.full((4, 1), 500.0, dtype=F64), 1.0)
    assert (far.diff() > 0).all()
    # probability 1 of the last level, less a tail that exp(-1e5) does not have
    assert float(far[-1]) == 0.0
    # Mills: log Phi(-z) = -z^2/2 - log(z sqrt(2 pi)) - 1/z^2 + 5 / (2 z^4) - ..., here z = 500 + 2/3
    z = 500 + 2 / 3
    assert float(far[0]) == pytest.approx(
        -0.5 * z * z - math.log(z * math.sqrt(2 * math.pi)) - 1 / z**2 + 2.5 / z**4, rel=4 * EPS64
    )


@pytest.mark.parametrize("std", [1e-7, 1e-3, 2 / 255, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("info", [PICTURES, ODD], ids=["unit", "odd"])
def test_probabilities_sum_to_one(std: float, info: DataInfo) -> None:
    q = Quantization.of(info)
    for mean in (-40.0, -1.0, 0.123, 0.5 * q.width, 1.0, 7.0):
        value = torch.full((256, 1), mean, dtype=F64)
        for each in (q.log_mass(every_level(q), value, std), q.log_mass_softmax(every_level(q), value, std)):
            assert float(each.exp().sum()) == pytest.approx(1, abs=1e-12), mean


def test_probabilities_of_a_picture_are_products() -> None:
    q = Quantization.of(PICTURES)
    x = torch.randint(0, 256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    mean = q.encode(x, F64) + 0.02 * normal(3, 1, 4, 4)
    std = torch.tensor([0.005, 0.02, 0.3], dtype=F64)
    for log_mass in (q.log_mass, q.log_mass_softmax):
        together = log_mass(x, mean, std)
        assert together.shape == (3,)
        assert together.dtype == F64
        one_by_one = [
            sum(
                float(log_mass(x[b].reshape(-1, 1)[i : i + 1], mean[b].reshape(-1, 1)[i : i + 1], s)) for i in range(16)
            )
            for b, s in enumerate(std.tolist())
        ]
        torch.testing.assert_close(together, torch.tensor(one_by_one, dtype=F64), rtol=1e-13, atol=0)
        # levels as bytes, and as their values in the type that networks see
        assert torch.equal(log_mass(x.to(torch.uint8), mean, std), together)
        assert torch.equal(log_mass(q.encode(x), mean, std), together)


def test_softmax_over_levels_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    q = Quantization.of(ODD)
    x = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(2))
    value, noise_level = q.encode(x, F64) + 0.01 * normal(2, 50), torch.tensor([0.004, 0.7], dtype=F64)
    levels = q.low + q.width * np.arange(256)
    energy = -((levels - value.numpy()[..., None]) ** 2) / (2 * noise_level.numpy()[:, None, None] ** 2)
    logits = np.take_along_axis(energy, x.numpy()[..., None], 2)[..., 0] - logsumexp(energy, axis=2)
    got = q.log_mass_softmax(x, value, noise_level)
    # at these noise levels energies are below 1e5
    torch.testing.assert_close(got, torch.tensor(logits.sum(1)), rtol=0, atol=50 * 1e5 * 4 * EPS64)
    monkeypatch.setattr("sde.density.quantization._AT_ONCE", 7 * 256)
    assert torch.equal(q.log_mass_softmax(x, value, noise_level), got)
    # noise beyond all levels tells nothing: 8 bits
    blind = q.log_mass_softmax(x, 1e3 * value, 1e9)
    torch.testing.assert_close(bits_per_dim(blind, 50), torch.full((2,), 8.0, dtype=F64), rtol=1e-12, atol=0)
    # and at small noise the two nearest levels share the probability: the odds of x_p against x_p + w
    near = q.log_mass_softmax(torch.tensor([[7], [8]]), (q.encode(torch.tensor([[7], [7]]), F64) + 0.4 * q.width), 1e-3)
    odds = (0.6**2 - 0.4**2) * q.width**2 / 2e-6
    assert float(near[0] - near[1]) == pytest.approx(odds, rel=1e-11)


@pytest.mark.parametrize("width", [1e-7, 0.3, 1.5, 8.0, 400.0])
def test_gradients_are_those_of_the_mass(width: float) -> None:
    """d/dmean log mass = (phi(a) - phi(b)) / mass in standard deviations, and finite in every branch."""
    for center in (0.0, 0.2, 1.1, 7.0, 900.0):
        q, level, mean = bucket(center, width)
        mean.requires_grad_()
        std = torch.ones(1, dtype=F64, requires_grad=True)
        by_mean, by_std = torch.autograd.grad(q.log_mass(level, mean, std).sum(), (mean, std))
        at, half = float(q.encode(level, F64)), 0.5 * q.width
        low, high = at - half, at + half
        log_mass = reference_log_mass(at, half)
        density = [math.exp(-0.5 * e * e - 0.5 * math.log(2 * math.pi) - log_mass) for e in (low, high)]
        if width > 1e-3:  # else the difference of the densities has no digits: the mean over the bucket is c
            expected = density[0] - density[1]
            expected_std = low * density[0] - high * density[1]
            assert float(by_std) == pytest.approx(expected_std, rel=1e-8, abs=1e-8)
        else:
            expected = at
            assert float(by_std) == pytest.approx(at * at - 1, rel=1e-8)
        assert float(by_mean) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_gradients_stay_finite_on_pictures() -> None:
    q = Quantization.of(PICTURES)
    x = every_level(q)
    for std in (1e-8, 1e-3, 1.0, 1e4):
        for log_mass in (q.log_mass, q.log_mass_softmax):
            mean = (0.3 * normal(256, 1)).requires_grad_()
            (grad,) = torch.autograd.grad(log_mass(x, mean, std).sum(), mean)
            assert torch.isfinite(grad).all()
            # towards the level, everywhere but where both agree to rounding
            towards = torch.sign(q.encode(x, F64) - mean.detach())
            inner = (x > 0) & (x < 255)
            if std < 1 and log_mass == q.log_mass:
                assert (torch.sign(grad)[inner] == towards[inner]).all()
