"""The flow of variational dequantization: a density on the cube, exact in both directions, uniform when new."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sde.density.dequantizer import Dequantizer, DequantizerOptions, uniform
from sde.errors import UserError
from tests.problems import EPS32, EPS64, F64, generator, normal

SHAPES = [(1, 1, 1), (1, 1, 2), (1, 5, 7), (2, 3, 4), (3, 4, 5)]
SMALL = DequantizerOptions(channels=6, blocks=1, layers=4, bins=5)


def flow_of(shape: tuple[int, ...], strength: float = 1.0, options: DequantizerOptions = SMALL) -> Dequantizer:
    """A flow in float64 far from the identity: what the last layers give has about the size `strength`."""
    torch.manual_seed(0)
    flow = Dequantizer(shape, options).double()
    with torch.no_grad():
        for layer in flow.layers:
            torch.nn.init.normal_(layer.last.weight, std=strength)
            torch.nn.init.normal_(layer.last.bias, std=strength)
    return flow.requires_grad_(False)


def pictures(*shape: int, seed: int = 3) -> Tensor:
    """Encoded pictures, in [-1, 1]."""
    return 2 * torch.rand(shape, generator=generator(seed), dtype=F64) - 1


# Uniform at the beginning


@pytest.mark.parametrize("shape", [*SHAPES, (1, 28, 28), (3, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_new_flow_is_uniform(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    flow = Dequantizer(shape).to(dtype)
    x, noise = pictures(4, *shape).to(dtype), normal(4, *shape).to(dtype)
    u, log_q = flow.requires_grad_(False)(x, noise)
    # every layer and bin rounds a few times
    rounding = 100 * (EPS32 if dtype == torch.float32 else EPS64)
    assert u.dtype == log_q.dtype == dtype
    assert float((u - torch.special.ndtr(noise)).abs().max()) < rounding
    assert float(log_q.abs().max()) < rounding * math.prod(shape)


def test_a_new_flow_learns_in_every_layer() -> None:
    """Zeros in the last layers must not keep gradients from them."""
    flow = Dequantizer((1, 4, 4), SMALL).double()
    u, log_q = flow(pictures(3, 1, 4, 4), normal(3, 1, 4, 4))
    (log_q.sum() + u.square().sum()).backward()
    for layer in flow.layers:
        assert float(layer.last.weight.grad.abs().max()) > 1e-3


# Both directions


@pytest.mark.parametrize("shape", [*SHAPES, (1, 28, 28)])
@pytest.mark.parametrize("strength", [0.2, 1.0])
def test_the_inverse_is_exact(shape: tuple[int, ...], strength: float) -> None:
    flow, x = flow_of(shape, strength), pictures(4, *shape)
    u = torch.rand(4, *shape, generator=generator(1), dtype=F64)
    noise, log_q = flow.inverse(u, x)
    again, log_q_again = flow(x, noise)
    assert float((again - u).abs().max()) < 1e-10
    torch.testing.assert_close(log_q_again, log_q, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(flow.log_prob(u, x), log_q, rtol=0, atol=0)
    assert float(log_q.abs().min()) > 0.02 * strength  # it is not the identity that is inverted


@pytest.mark.parametrize("shape", SHAPES)
def test_log_q_is_that_of_the_jacobian(shape: tuple[int, ...]) -> None:
    """log q(u) = log N(noise) - log |du / dnoise|."""
    flow, x, noise = flow_of(shape), pictures(2, *shape), normal(2, *shape)
    d = math.prod(shape)
    _, log_q = flow(x, noise)
    for k in range(2):

        def one(z: Tensor, k: int = k) -> Tensor:
            return flow(x[k : k + 1], z[None])[0][0]

        jacobian = torch.autograd.functional.jacobian(one, noise[k]).reshape(d, d)
        base = torch.distributions.Normal(0.0, 1.0).log_prob(noise[k]).sum()
        # rounding grows with the steepest slopes, at most exp(5) times a bin's 1e3 in a layer; here far less
        torch.testing.assert_close(log_q[k], base - torch.linalg.slogdet(jacobian)[1], rtol=1e-8, atol=1e-8)
        assert float(jacobian.diagonal().min()) > 0


@pytest.mark.parametrize("shape", [s for s in SHAPES if math.prod(s) > 1])
def test_every_pixel_is_changed_and_looks_at_others(shape: tuple[int, ...]) -> None:
    flow, x, noise = flow_of(shape), pictures(1, *shape), normal(1, *shape)
    d = math.prod(shape)
    jacobian = torch.autograd.functional.jacobian(lambda z: flow(x, z)[0], noise).reshape(d, d)
    plain = torch.exp(torch.distributions.Normal(0.0, 1.0).log_prob(noise)).flatten()
    assert float((jacobian.diagonal() / plain - 1).abs().min()) > 1e-3
    others = jacobian - torch.diag(jacobian.diagonal())
    assert int((others.abs().amax(1) > 1e-6).sum()) >= d // 2
    if d > 2:
        assert not torch.equal(jacobian, jacobian.tril())  # nor is it an order of pixels


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1, 1)])
def test_q_integrates_to_one(shape: tuple[int, ...]) -> None:
    """By the midpoint rule on a grid of the square, for two pictures whose densities differ."""
    flow, n = flow_of(shape, 0.15), 250
    middle = (torch.arange(n, dtype=F64) + 0.5) / n
    u = torch.cartesian_prod(middle, middle).reshape(-1, *shape)
    densities = []
    for picture in pictures(2, *shape):
        x = picture.expand(len(u), *shape)
        densities.append(flow.log_prob(u, x).exp())
        assert abs(float(densities[-1].mean()) - 1) < 1e-4
        assert float(densities[-1].std()) > 0.1
    assert float((densities[0] - densities[1]).abs().mean()) > 1e-4


def test_draws_have_the_density_q() -> None:
    """The mean of a function of u over draws is its integral against q."""
    flow, n, shape = flow_of((1, 1, 2), 0.3), 200, (1, 1, 2)
    middle = (torch.arange(n, dtype=F64) + 0.5) / n
    u = torch.cartesian_prod(middle, middle).reshape(-1, *shape)
    picture = pictures(1, *shape)

    def f(v: Tensor) -> Tensor:
        return v.flatten(1).sum(1)

    exact = float((flow.log_prob(u, picture.expand(len(u), *shape)).exp() * f(u)).mean())
    drawn = f(flow(picture.expand(40_000, *shape), normal(40_000, *shape))[0])
    assert abs(float(drawn.mean()) - exact) < 4 * float(drawn.std()) / math.sqrt(len(drawn))
    assert abs(exact - float(f(u).mean())) > 0.05  # which uniform draws would have


# Numbers


@pytest.mark.parametrize("strength", [0.0, 1.0, 30.0])
def test_float32_stays_inside_and_finite(strength: float) -> None:
    """At the far ends of the noise, and with splines as steep as they can get."""
    shape = (1, 5, 7)
    flow = flow_of(shape, strength).float().requires_grad_(True)
    noise = normal(8, *shape).float()
    noise[0], noise[1], noise[2], noise[3] = -40, 40, 0, 5.4
    u, log_q = flow(pictures(8, *shape).float(), noise)
    assert u.dtype == torch.float32
    assert bool(((u > 0) & (u < 1)).all())
    assert bool(torch.isfinite(log_q).all())
    log_q.sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in flow.parameters() if p.grad is not None)
    ends = torch.tensor([0.0, 1 - EPS32], dtype=torch.float32)[:, None, None, None].expand(2, *shape)
    back, log_q = flow.inverse(ends, pictures(2, *shape).float())
    assert bool(torch.isfinite(back).all())
    assert bool(torch.isfinite(log_q).all())


def test_float32_agrees_with_float64() -> None:
    shape = (1, 5, 7)
    flow, x, noise = flow_of(shape, 0.3), pictures(4, *shape), normal(4, *shape)
    u, log_q = flow(x, noise)
    u32, log_q32 = flow.float()(x.float(), noise.float())
    assert float((u32 - u).abs().max()) < 1e-4
    assert float((log_q32 - log_q).abs().max()) < 1e-3


def test_gradients_are_those_of_differences() -> None:
    flow, shape = flow_of((1, 2, 2), 0.5), (1, 2, 2)
    x, noise = pictures(2, *shape), normal(2, *shape)
    weight = flow.layers[0].last.weight.detach().clone()

    def of_weight(w: Tensor) -> tuple[Tensor, Tensor]:
        u, log_q = torch.func.functional_call(flow, {"layers.0.last.weight": w}, (x, noise))
        return u, log_q

    assert torch.autograd.gradcheck(of_weight, weight.requires_grad_(True), fast_mode=True)
    assert torch.autograd.gradcheck(lambda z: flow(x, z), noise.requires_grad_(True), fast_mode=True)


# Batches


def test_a_picture_does_not_see_the_batch() -> None:
    flow, x, noise = flow_of((2, 3, 4)), pictures(5, 2, 3, 4), normal(5, 2, 3, 4)
    u, log_q = flow(x, noise)
    parts = [flow(a, b) for a, b in zip(x.split([2, 3]), noise.split([2, 3]), strict=True)]
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), u, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), log_q, rtol=0, atol=1e-9)


def test_the_context_can_be_kept() -> None:
    flow, x = flow_of((1, 4, 4)), pictures(2, 1, 4, 4)
    context = flow.context(x)
    for seed in (0, 1):
        noise = normal(2, 1, 4, 4, seed=seed)
        assert torch.equal(flow(x, noise)[1], flow(x, noise, context)[1])
    many = flow(x.repeat(3, 1, 1, 1), normal(6, 1, 4, 4), context.repeat(3, 1, 1, 1))
    torch.testing.assert_close(many[1][:2], flow(x, normal(6, 1, 4, 4)[:2])[1], rtol=0, atol=1e-10)


def test_there_is_no_density_outside_the_cube() -> None:
    flow, x = flow_of((1, 2, 2)), pictures(3, 1, 2, 2)
    u = torch.full((3, 1, 2, 2), 0.5, dtype=F64)
    u[0, 0, 0, 1], u[1, 0, 1, 1] = 1.01, -1e-6
    log_q = flow.log_prob(u, x)
    assert torch.isneginf(log_q).tolist() == [True, True, False]


def test_uniform_keeps_off_the_ends() -> None:
    for dtype in (torch.float32, F64):
        u = uniform(torch.tensor([-50.0, 0.0, 50.0], dtype=dtype))
        assert 0 < float(u[0]) < 1e-7
        assert float(u[1]) == 0.5
        assert 1 - 1e-7 < float(u[2]) < 1


# Mistakes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"channels": 0}, "flow.channels=0 is out of range: it must be at least 1"),
        ({"layers": 1}, "flow.layers=1 is out of range: it must be at least 2"),
        ({"bins": 500}, "flow.bins=500 is out of range: it must be at most 256"),
        ({"blocks": 1.5}, "flow.blocks=1.5 must be a whole number"),
    ],
)
def test_options_are_checked(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DequantizerOptions(**options)  # type: ignore[arg-type]


def test_vectors_have_no_pixels() -> None:
    with pytest.raises(UserError, match=r"shape=\(2,\) has no pixels to dequantize"):
        Dequantizer((2,))
