"""Winograd's convolutions against plain ones: values, all derivatives, rounding, and when they are used."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sde.models import winograd
from sde.models.layers import Conv3x3, Dropout
from sde.models.winograd import WinogradConvolution, conv3x3, interpolation_matrices

SHAPES = [(3, 5, 7, 12, 8), (2, 4, 4, 4, 4), (1, 3, 2, 16, 4), (4, 1, 1, 8, 12)]  # batch, in, out, height, width
BIASES = ("none", "channel", "example")


@pytest.fixture(params=[winograd.PORTION, 3000, 1], ids=["whole", "some rows", "row by row"])
def _portion(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a small input at once, and in small portions."""
    monkeypatch.setattr(winograd, "PORTION", request.param)


def problem(shape: tuple[int, ...], bias: str, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    batch, channels, outputs, height, width = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    biases = {"none": None, "channel": draw(outputs), "example": draw(batch, outputs)}
    x, weight = draw(batch, channels, height, width), draw(outputs, channels, 3, 3)
    return [x, weight, biases[bias]]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.conv2d(x, weight, padding=1)
    return y if bias is None else y + bias[..., None, None]


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.usefixtures("_portion")
def test_values_and_gradients(shape: tuple[int, ...], bias: str, memory_format: torch.memory_format) -> None:
    tensors = problem(shape, bias)
    tensors[0], tensors[1] = (
        t.detach().contiguous(memory_format=memory_format).requires_grad_()
        for t in tensors[:2]  # type: ignore[union-attr]
    )
    y, exact = WinogradConvolution.apply(*tensors), plain(*tensors)  # type: ignore[arg-type]
    assert relative(y, exact) < 1e-13
    assert y.is_contiguous(memory_format=torch.channels_last)
    present = [t for t in tensors if t is not None]
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(
        torch.autograd.grad(y, present, direction), torch.autograd.grad(exact, present, direction), strict=True
    ):
        assert mine.shape == theirs.shape
        assert relative(mine, theirs) < 1e-13


@pytest.mark.parametrize("bias", BIASES)
def test_second_and_forward_mode_derivatives(bias: str) -> None:
    """By finite differences: gradients, gradients of gradients, and derivatives along a direction."""
    tensors = problem((2, 2, 3, 8, 4), bias)
    assert torch.autograd.gradcheck(WinogradConvolution.apply, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(WinogradConvolution.apply, tensors)


@torch.no_grad()
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradients_that_are_wanted(wanted: tuple[bool, bool]) -> None:
    x, weight, _ = problem((2, 4, 3, 8, 8), "none")
    dx, dweight = winograd.convolve_backward(torch.ones(2, 3, 8, 8, dtype=torch.float64), x, weight, *wanted)
    assert (dx is not None, dweight is not None) == wanted


def test_interpolation_matrices_are_an_identity_of_rational_numbers() -> None:
    """A^T ((G g) * (B^T d)) is the correlation for every g and d: exact in fractions, but for the division in G."""
    A, G, B = (np.vectorize(Fraction)(m) for m in interpolation_matrices())
    for k in range(winograd.KERNEL):
        for j in range(winograd.WINDOW):
            y = A @ (G[:, k] * B[:, j])
            expected = [1 if i + k == j else 0 for i in range(winograd.TILE)]
            assert max(abs(float(a - b)) for a, b in zip(y, expected, strict=True)) < 1e-14


def test_rounding_errors() -> None:
    """float32: below 2e-6, where the customary points 0, +-1, +-2 give 3e-6 and a plain convolution 5e-7."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 128, 16, 16, generator=generator), torch.randn(128, 128, 3, 3, generator=generator)
    x.requires_grad_()
    weight.requires_grad_()
    y = WinogradConvolution.apply(x, weight, None)
    dy = torch.randn(y.shape, generator=generator)
    exact = plain(x.double(), weight.double(), None)
    gradients = torch.autograd.grad(exact, [x, weight], dy.double())
    assert relative(y, exact) < 2e-6
    for mine, theirs in zip(torch.autograd.grad(y, [x, weight], dy), gradients, strict=True):
        assert relative(mine, theirs) < 3e-6


def test_it_is_used_where_it_is_faster_and_nowhere_else() -> None:
    def name(x: Tensor, weight: Tensor) -> str:
        return type(conv3x3(x.requires_grad_(), weight).grad_fn).__name__

    weight = torch.randn(96, 96, 3, 3)
    assert name(torch.randn(2, 96, 16, 16), weight) == "WinogradConvolutionBackward"
    assert name(torch.randn(2, 96, 16, 18), weight) == "ConvolutionBackward0"  # not in tiles
    assert name(torch.randn(2, 96, 8, 8), weight) == "ConvolutionBackward0"  # too few of them
    assert name(torch.randn(2, 8, 16, 16), torch.randn(96, 8, 3, 3)) == "ConvolutionBackward0"
    assert name(torch.randn(2, 96, 16, 16).double(), weight.double()) == "ConvolutionBackward0"
    x = torch.randn(2, 96, 16, 16)
    vectorized = torch.func.vmap(lambda v: conv3x3(v[None], weight)[0])(x)
    assert relative(vectorized, F.conv2d(x, weight, padding=1)) < 1e-6
    compiled = torch.compile(conv3x3, backend="eager", fullgraph=True)
    assert relative(compiled(x, weight), F.conv2d(x, weight, padding=1)) < 1e-6


@pytest.mark.parametrize("bias", [(1,), (95,), (2, 1), (3, 96), (96, 2), (2, 96, 1)], ids=str)
def test_biases_that_do_not_fit_are_not_added(bias: tuple[int, ...]) -> None:
    """As the plain convolution has it: (2, 1) is one number for each example there, and the others are refused."""
    x, weight, offset = torch.randn(2, 96, 16, 16), torch.randn(96, 96, 3, 3), torch.randn(bias)
    if bias == (2, 1):
        assert relative(conv3x3(x, weight, offset), plain(x, weight, offset)) < 1e-6
        return
    with pytest.raises((RuntimeError, IndexError)):
        conv3x3(x, weight, offset)


@pytest.mark.parametrize("weight", [(96, 96, 5, 5), (96, 97, 3, 3), (96, 96, 3)], ids=str)
def test_weights_that_do_not_fit_are_those_of_plain_convolutions(weight: tuple[int, ...]) -> None:
    x, kernels = torch.randn(2, 96, 16, 16), torch.randn(weight)
    if weight == (96, 96, 5, 5):
        assert torch.equal(conv3x3(x, kernels), F.conv2d(x, kernels, padding=1))
        return
    with pytest.raises(RuntimeError):
        conv3x3(x, kernels)


def test_workspaces_do_not_leak_from_call_to_call_or_between_modes() -> None:
    """Memory is kept: a smaller problem after a larger one, inside inference mode and out, twice the same."""
    torch.manual_seed(0)
    large, small = Conv3x3(128, 96), Conv3x3(96, 112)
    a, b = torch.randn(2, 128, 32, 32), torch.randn(2, 96, 16, 16)
    with torch.inference_mode():
        first = large(a), small(b)
    with torch.no_grad():
        second = large(a), small(b)
        assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    y = small(b.requires_grad_())
    y.square().sum().backward()
    assert torch.equal(y.detach(), second[1])


def test_bfloat16_autocast() -> None:
    """On a CPU without units for it the sum is taken in float32; the result is bfloat16 in any case."""
    torch.manual_seed(0)
    layer, x = Conv3x3(96, 96), torch.randn(2, 96, 16, 16)
    offset = torch.randn(2, 96)
    with torch.no_grad():
        exact = layer.double()(x.double(), offset.double())
        with torch.autocast("cpu", torch.bfloat16):
            y = layer.float()(x, offset)
    assert y.dtype is torch.bfloat16
    assert relative(y, exact) < (2**-7 if winograd.multiplies_bfloat16() else 2**-8)


def test_dropout() -> None:
    """The law: entries stay with probability 1 - p, independently, scaled to leave the mean; 5 standard errors."""
    torch.manual_seed(0)
    dropout = Dropout(0.3)
    x = torch.ones(50, 8, 25, 41).contiguous(memory_format=torch.channels_last)
    y = dropout(x)
    assert y.stride() == x.stride()
    values = y.unique()
    assert values.tolist() == pytest.approx([0, 1 / 0.7], rel=1e-4)
    stays = (y != 0).double()
    n = stays.numel()
    assert abs(float(stays.mean()) - 0.7) < 5 * (0.21 / n) ** 0.5 + 2**-16
    assert abs(float(y.mean()) - 1) < 5 * (0.21 / n) ** 0.5 / 0.7
    for shift in (1, 2, 3, 4, 8):  # four entries share one random number of the generator
        flat = stays.permute(0, 2, 3, 1).flatten() - 0.7
        assert abs(float((flat[shift:] * flat[:-shift]).mean())) < 5 * 0.21 / n**0.5
    x = torch.randn(7, 3, requires_grad=True)  # not a multiple of four
    torch.manual_seed(1)
    y = dropout(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, gradient * x, rtol=0, atol=0)
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


@pytest.mark.parametrize("p", [0.999999, 1 - 2**-12, 2**-12, 2**-18])
def test_dropout_near_all_and_near_nothing(p: float) -> None:
    """5 standard errors of the number of entries that are dropped, or that stay."""
    torch.manual_seed(0)
    n = 2**22
    y = Dropout(p)(torch.ones(n))
    stay = int((y != 0).sum())
    assert abs(stay - n * (1 - p)) <= 5 * max(1.0, (n * p * (1 - p)) ** 0.5)
    assert stay < n
    if stay:
        assert float(y.max()) == pytest.approx(1 / (1 - p), rel=1e-5)
