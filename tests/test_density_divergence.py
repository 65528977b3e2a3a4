"""Estimators of the trace: exact where they claim it, unbiased and calibrated elsewhere, on the graph of one pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sde.density import Divergence, Exact, Hutchinson, HutchPlusPlus
from sde.errors import UserError
from sde.models import MODELS
from tests.problems import F64, normal
from tests.small_models import SMALL, lively, shape_of

D = 12
MODES = ("forward", "reverse")
MIX = normal(D, D, seed=3) / D**0.5


def linear(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> A x, its own matrix for every example."""
    return lambda x: torch.einsum("bij,bj->bi", matrix, x.flatten(1)).reshape(x.shape)


def bent(x: Tensor) -> Tensor:
    """A field with a full Jacobian that differs from place to place, at one evaluation per call."""
    return torch.tanh(x.flatten(1) @ MIX).reshape(x.shape) * x


def trace_of(field: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    def one(example: Tensor) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(lambda v: field(v[None])[0], example)
        return jacobian.reshape(example.numel(), -1).trace()

    return torch.stack([one(example) for example in x])


@pytest.mark.parametrize("divergence", [Exact(), Exact(chunk=5), Exact(mode="reverse"), HutchPlusPlus(rank=D)])
@pytest.mark.parametrize("shape", [(D,), (3, 2, 2)])
def test_the_trace_itself(divergence: Divergence, shape: tuple[int, ...]) -> None:
    x, shift = normal(4, *shape, seed=1), normal(4, seed=2)
    with torch.no_grad():
        value, estimates = divergence(bent, x, divergence.draw(0, range(4), x), shift)
    torch.testing.assert_close(value, bent(x), rtol=0, atol=0)
    assert not value.requires_grad
    assert not estimates.requires_grad
    expected = trace_of(bent, x) - D * shift
    torch.testing.assert_close(estimates, expected[:, None].expand_as(estimates), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_forward_and_reverse_mode_agree_on_every_network(name: str) -> None:
    """Forward mode goes through attention, norms and convolutions; both orders of the chain rule give one number."""
    network = lively(MODELS.get(name)(shape=shape_of(name), num_classes=0, **SMALL[name])).eval()
    x, noise = normal(2, *shape_of(name), dtype=torch.float32), torch.full((2,), 3.0)

    def field(x: Tensor) -> Tensor:
        return network(x, noise, None)

    with torch.no_grad():
        (value, forward), (again, reverse) = (Exact(mode=mode)(field, x, None, torch.zeros(2)) for mode in MODES)
        plain = field(x)
    for other in (value, again):
        assert float((other - plain).norm() / plain.norm()) < 1e-5
    # sums of D float32 products of order one
    torch.testing.assert_close(forward, reverse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "divergence",
    [
        Hutchinson(),
        Hutchinson(probes=3, distribution="gaussian"),
        Hutchinson(probes=4),
        HutchPlusPlus(rank=1),
        HutchPlusPlus(rank=3),
    ],
)
def test_estimates_are_unbiased(divergence: Divergence) -> None:
    """The mean over 4,000 examples with the same Jacobian is the trace within 4 standard errors."""
    n = 4000
    matrix = normal(D, D, seed=5).expand(n, D, D)
    x = normal(1, D, seed=6).expand(n, D)
    _, estimates = divergence(linear(matrix), x, divergence.draw(7, range(n), x), torch.full((n,), 0.3, dtype=F64))
    assert estimates.shape == (n, divergence.estimates)
    means = estimates.mean(1)
    exact = float(matrix[0].trace()) - D * 0.3
    assert abs(float(means.mean()) - exact) < 4 * float(means.std()) / n**0.5
    assert float(means.std()) > 0.01


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_variance_of_hutchinson(distribution: str) -> None:
    """2 |S|^2 with S the symmetric part, less its diagonal for signs (Avron and Toledo 2011, lemmas 2 and 5)."""
    n = 20_000
    matrix = normal(D, D, seed=5)
    symmetric = 0.5 * (matrix + matrix.mT)
    expected = 2 * float(symmetric.square().sum())
    if distribution == "rademacher":
        expected -= 2 * float(symmetric.diagonal().square().sum())
    divergence, x = Hutchinson(distribution=distribution), torch.zeros(n, D, dtype=F64)
    _, estimates = divergence(
        linear(matrix.expand(n, D, D)), x, divergence.draw(1, range(n), x), torch.zeros(n, dtype=F64)
    )
    variance = float(estimates.var())
    # the variance of a variance: (kurtosis - 1) / n, with a kurtosis of at most 15 for squares of normals
    assert abs(variance / expected - 1) < 4 * (14 / n) ** 0.5


def test_the_identity_is_no_variance() -> None:
    """What is a multiple of the identity goes into the shift and leaves probes of random length nothing to miss."""
    n = 8
    x = normal(n, D)
    for divergence in (Hutchinson(distribution="gaussian"), Hutchinson(), HutchPlusPlus(rank=2)):
        _, estimates = divergence(
            lambda x: 2.5 * x, x, divergence.draw(0, range(n), x), torch.full((n,), 2.5, dtype=F64)
        )
        assert float(estimates.abs().max()) < 1e-12
    # signs do without: v'v is D
    _, estimates = Hutchinson()(lambda x: 2.5 * x, x, Hutchinson().draw(0, range(n), x), torch.zeros(n, dtype=F64))
    torch.testing.assert_close(estimates, torch.full((n, 1), 2.5 * D, dtype=F64))


def test_hutchpp_is_exact_on_low_rank() -> None:
    """A Jacobian of rank 3 beside the identity: the sketch finds its range, and nothing is left to chance."""
    n = 20
    left, right = normal(n, D, 3, seed=1), normal(n, 3, D, seed=2)
    matrix = left @ right + 0.7 * torch.eye(D, dtype=F64)
    x, shift = normal(n, D), torch.full((n,), 0.7, dtype=F64)
    exact = matrix.diagonal(dim1=1, dim2=2).sum(1) - 0.7 * D
    errors = {}
    for divergence in (HutchPlusPlus(rank=3), Hutchinson(probes=9)):  # the same number of products
        _, estimates = divergence(linear(matrix), x, divergence.draw(0, range(n), x), shift)
        errors[type(divergence)] = float((estimates.mean(1) - exact).abs().max())
    assert errors[HutchPlusPlus] < 1e-10
    assert errors[Hutchinson] > 1e-2


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(probes=3), HutchPlusPlus(rank=2)])
def test_one_evaluation_of_the_field(divergence: Divergence) -> None:
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return bent(x)

    x = normal(3, D)
    divergence(counted, x, divergence.draw(0, range(3), x), torch.zeros(3, dtype=F64))
    assert calls == divergence.passes(D) == 1


def test_chunks_take_a_pass_each() -> None:
    assert [Exact(chunk=c).passes(D) for c in (1, 5, 12, 100)] == [12, 3, 1, 1]
    assert Exact(mode="reverse", chunk=2).passes(D) == 1


@pytest.mark.parametrize(
    "divergence", [Hutchinson(probes=3), Hutchinson(distribution="gaussian"), HutchPlusPlus(rank=2)]
)
def test_probes_belong_to_examples(divergence: Divergence) -> None:
    """Those of example k are a function of the seed and k, and no two examples or seeds share them."""
    like = torch.zeros(6, 3, 4, 4)
    whole = divergence.draw(5, range(6), like)
    assert whole is not None
    assert whole.shape == (6, divergence.vectors, 3, 4, 4)
    for k in range(6):
        assert torch.equal(divergence.draw(5, [k], like[:1]), whole[k : k + 1])
    assert torch.equal(divergence.draw(5, [4, 1], like[:2]), whole[[4, 1]])
    assert not torch.equal(divergence.draw(6, range(6), like), whole)
    assert len({tuple(v.flatten().tolist()) for v in whole.flatten(0, 1)}) == 6 * divergence.vectors


def test_a_field_without_a_gradient() -> None:
    """A constant field has divergence zero, whatever autograd knows of it."""
    x = normal(2, D)
    constant = nn.Parameter(normal(2, D, seed=4), requires_grad=False)
    for divergence in (Hutchinson(), Exact(), Exact(mode="reverse"), HutchPlusPlus(rank=2)):
        _, estimates = divergence(lambda x: constant + 0, x, divergence.draw(0, range(2), x), torch.zeros(2, dtype=F64))
        assert float(estimates.abs().max()) == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Hutchinson(probes=0), r"divergence\.probes=0 must be a whole number, at least 1"),
        (lambda: Hutchinson(probes=True), r"divergence\.probes=True"),
        (
            lambda: Hutchinson(distribution="normal"),
            r"divergence\.distribution='normal' is not one of rademacher, gauss",
        ),
        (lambda: HutchPlusPlus(rank=1.5), r"divergence\.rank=1\.5"),  # type: ignore[arg-type]
        (lambda: HutchPlusPlus(rank=13).check(D), r"divergence\.rank=13 is more than the 12 dimensions"),
        (lambda: Exact(mode="both"), r"divergence\.mode='both' is not one of forward, reverse"),
        (lambda: Exact(chunk=0), r"divergence\.chunk=0"),
    ],
)
def test_bad_options(make: Callable[[], Divergence], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()
