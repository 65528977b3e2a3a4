"""Log P of quantized pictures: each way against the exact mass of densities that are known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.special import ndtr, ndtri

from sde.denoiser import AbstractDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from sde.density import ChainBound, ContinuousBound, Discretization, Exact, Flow, Hutchinson, Quantization
from sde.density.bound import Decoder
from sde.density.discrete import Examples, Weights, decoding_time, discrete_log_prob, from_time
from sde.errors import UserError
from sde.processes import VE, VP, SubVP
from sde.solvers import SOLVERS
from tests.problems import F64, normal

LEVELS = Quantization(-1.0, 1.0, 4)
WIDTH = LEVELS.width
STD = 0.2


class Known(Flow):
    """The density of a mixture, in closed form."""

    def density(self, denoiser: AbstractDenoiser, of: Examples, progress: object) -> Weights:
        known: Any = denoiser
        log_prob = known.log_prob(of.x, denoiser.sde.t_min)
        return Weights({"density": log_prob}, 1, torch.zeros_like(log_prob))


def mixture(t_min: float = 0.01) -> GaussianMixtureDenoiser:
    """Two bumps over pictures of two pixels with four levels, a few buckets wide each, neither in a bucket's middle."""
    means = torch.tensor([[[[-0.5, 0.1]]], [[[0.6, -0.2]]]], dtype=F64)
    # at T nothing is left of the data, so that the flow's prior is p_T
    sde = VP(beta_max=40.0, t_min=t_min, t_min_sampling=t_min)
    weights, variance = torch.tensor([0.3, 0.7], dtype=F64), torch.tensor(STD**2, dtype=F64)
    return GaussianMixtureDenoiser(sde, weights, means, variance)


def pictures() -> Tensor:
    """All 16 pictures, (16, 1, 1, 2)."""
    index = torch.cartesian_prod(torch.arange(4), torch.arange(4)).reshape(16, 1, 1, 2)
    return LEVELS.encode(index, F64)


def log_mass(denoiser: GaussianMixtureDenoiser, x: Tensor) -> Tensor:
    """The exact log mass of p_{t_min} in the buckets of x: each component's is a product of normal masses."""
    sde = denoiser.sde
    alpha, std = float(sde.alpha(sde.t_min)), math.hypot(float(sde.alpha(sde.t_min)) * STD, float(sde.sigma(sde.t_min)))
    center = x.flatten(1)[:, None] - alpha * denoiser.means
    mass = (ndtr((center + WIDTH / 2) / std) - ndtr((center - WIDTH / 2) / std)).prod(2)
    return torch.log((mass * denoiser.weights).sum(1))


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of `values` (B, n) over n."""
    return values.mean(1), values.std(1) / math.sqrt(values.shape[1])


# The flow


@pytest.mark.parametrize("kind", ["uniform", "decoder", "none"])
def test_the_flow_has_the_density_that_is_known(kind: str) -> None:
    levels = None if kind == "none" else LEVELS
    way = Discretization(kind, levels, draws=2)
    x = pictures()[3:11]
    flow = Flow(SOLVERS.get("dopri5")(rtol=1e-6, atol=1e-6), Exact())
    found, known = (discrete_log_prob(mixture(), x, way, m, seed=1) for m in (flow, Known()))
    torch.testing.assert_close(found.draws, known.draws, rtol=0, atol=1e-4)
    assert torch.equal(found.trace_error, torch.zeros(8, dtype=F64))
    assert found.nfe > 2 * 6


# Uniform dequantization


def test_uniform_is_the_mean_of_log_p_over_the_bucket() -> None:
    """A quadrature over both pixels' places gives what 1024 draws have for their mean."""
    denoiser, x = mixture(), pictures()[4:9]
    nodes = (torch.arange(200, dtype=F64) + 0.5) / 200
    u = torch.cartesian_prod(nodes, nodes).reshape(-1, 1, 1, 2)
    places = [denoiser.log_prob(LEVELS.dequantize(p.expand_as(u), u), denoiser.sde.t_min).mean() for p in x]
    exact = torch.stack(places) + 2 * math.log(WIDTH)
    found = discrete_log_prob(denoiser, x, Discretization("uniform", LEVELS, draws=1024), Known())
    assert ((found.log_prob - exact).abs() < 4 * found.standard_error).all()
    assert (found.log_prob < log_mass(denoiser, x) - 10 * found.standard_error).all()
    torch.testing.assert_close(found.parts["density"] + found.parts["width"], found.log_prob)
    torch.testing.assert_close(found.parts["width"], torch.full((5,), 2 * math.log(WIDTH), dtype=F64))


def test_more_draws_weighted_by_importance_come_nearer_to_log_p() -> None:
    denoiser, x = mixture(), pictures()[4:9]
    exact, before = log_mass(denoiser, x), torch.full((5,), -math.inf, dtype=F64)
    for k, copies in ((1, 2048), (4, 1024), (32, 512)):
        way = Discretization("uniform", LEVELS, draws=k, importance=True)
        repeated = x.repeat_interleave(copies, 0)
        found = discrete_log_prob(denoiser, repeated, way, Known())
        assert torch.equal(found.log_prob, torch.logsumexp(found.draws, 1) - math.log(k))
        mean, error = mean_and_error(found.log_prob.reshape(5, copies))
        assert (mean - 4 * error < exact).all()
        assert (mean > before).all()
        before = mean
    assert (exact - mean < 0.2).all()
    weights = found.draws.reshape(5, -1).exp()
    assert ((weights.mean(1) - exact.exp()).abs() < 4 * weights.std(1) / math.sqrt(512 * 32)).all()
    # the error bars, from the spread of 32 draws, against the spread of the results, where no weight stands out
    bars, spread = found.standard_error.reshape(5, -1)[1:3], found.log_prob.reshape(5, -1)[1:3].std(1)
    assert bars.isfinite().all()
    assert bars.mean(1).tolist() == pytest.approx(spread.tolist(), rel=0.25)


def test_probes_are_shared_between_draws_that_are_weighted() -> None:
    """Of Gaussian data the trace's error is the same everywhere: shared probes make it the same in all draws."""
    axes = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64) * 0.09
    denoiser = GaussianDenoiser(VP(), torch.zeros(1, 1, 2, dtype=F64), axes)
    solver = SOLVERS.get("heun")()
    for importance, shared in ((True, True), (False, False)):
        way = Discretization("uniform", LEVELS, draws=6, importance=importance)
        found, exact = (
            discrete_log_prob(denoiser, pictures()[5:6], way, Flow(solver, d, None, 20), seed=2).draws
            for d in (Hutchinson(), Exact())
        )
        error = (found - exact)[0]
        assert bool((error - error[0]).abs().max() < 1e-9) == shared
    assert float(error.abs().max()) > 0.1


# A dequantizer


class Best(nn.Module):
    """The dequantizer of a normal density: u has the density inside its bucket, so that nothing is lost."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.weight = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (ndtr((x + side * WIDTH / 2 - self.mean) / self.std) for side in (-1, 1))
        value = self.mean + self.std * ndtri(low + (high - low) * ndtr(noise))
        standard = (value - self.mean) / self.std
        log_q = -0.5 * standard**2 - math.log(self.std * math.sqrt(2 * math.pi)) - torch.log(high - low)
        return (value - x) / WIDTH + 0.5, (log_q + math.log(WIDTH)).flatten(1).sum(1)


def test_with_the_best_dequantizer_the_bound_is_log_p() -> None:
    sde = VP(t_min=0.01, t_min_sampling=0.01)
    denoiser = GaussianDenoiser(sde, torch.full((1, 1, 2), 0.1, dtype=F64), torch.tensor(STD**2, dtype=F64))
    alpha = float(sde.alpha(0.01))
    mean, std = alpha * 0.1, math.hypot(alpha * STD, float(sde.sigma(0.01)))
    way = Discretization("variational", LEVELS, Best(mean, std), draws=3)  # type: ignore[arg-type]
    x = pictures()
    x = x[(x.abs() < 0.5).flatten(1).all(1)]  # beyond, the normal distribution function has no digits left
    found = discrete_log_prob(denoiser, x, way, Known())
    center = x.flatten(1) - mean
    exact = torch.log(ndtr((center + WIDTH / 2) / std) - ndtr((center - WIDTH / 2) / std)).sum(1)
    torch.testing.assert_close(found.draws, exact[:, None].expand(-1, 3), rtol=0, atol=1e-9)
    even = discrete_log_prob(denoiser, x, Discretization("uniform", LEVELS, draws=64), Known())
    assert (even.log_prob < exact).all()


# Decoders


def test_the_posterior_of_equally_likely_levels_loses_nothing() -> None:
    """Data on the levels, all alike, and the softmax decoder: every draw gives log 1/16, whatever the noise."""
    atoms = GaussianMixtureDenoiser(VP(), torch.ones(16, dtype=F64), pictures(), torch.tensor(0.0, dtype=F64))
    way = Discretization("decoder", LEVELS, decoder="softmax", draws=3)
    for t in (None, 0.05, 0.3):
        found = discrete_log_prob(from_time(atoms, t), pictures(), way, Known())
        torch.testing.assert_close(found.draws, torch.full((16, 3), -math.log(16), dtype=F64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["gaussian", "softmax"])
def test_decoders_bound_what_a_quadrature_gives(kind: str) -> None:
    """One pixel, P = int p(x_t) P(x | x_t) dx_t on a fine grid: the mean is below, weighted draws tend to it."""
    sde = VP(t_min=0.1, t_min_sampling=0.1)
    means = torch.tensor([[[[-0.4]]], [[[0.5]]]], dtype=F64)
    variance = torch.tensor(0.05**2, dtype=F64)  # below that of the noise, or weights would have no variance
    denoiser = GaussianMixtureDenoiser(sde, torch.tensor([0.4, 0.6], dtype=F64), means, variance)
    alpha, sigma = float(sde.alpha(0.1)), float(sde.sigma(0.1))
    grid = torch.linspace(-3, 3, 6001, dtype=F64).reshape(-1, 1, 1, 1)
    t, decoder = torch.full((6001,), 0.1, dtype=F64), Decoder(kind, None, LEVELS)
    density = denoiser.log_prob(grid, 0.1)
    x = LEVELS.encode(torch.arange(4), F64).reshape(4, 1, 1, 1)
    masses = []
    for p in x:
        log_decoder = -decoder.term(denoiser, p.expand_as(grid), (grid - alpha * p) / sigma, t)
        masses.append((density + log_decoder).exp().sum() * 6 / 6000)
    exact = torch.stack(masses).log()
    assert float(exact.exp().sum()) == pytest.approx(1, abs=1e-6)
    copies = 10_000
    way = Discretization("decoder", LEVELS, decoder=kind)
    found = discrete_log_prob(denoiser, x.repeat_interleave(copies, 0), way, Known())
    torch.testing.assert_close(torch.stack(list(found.parts.values())).sum(0), found.log_prob)
    mean, error = mean_and_error(found.log_prob.reshape(4, copies))
    assert (mean < exact - 4 * error).all()
    weights = found.log_prob.reshape(4, copies).exp()
    assert ((weights.mean(1) - exact.exp()).abs() < 4 * weights.std(1) / math.sqrt(copies)).all()


# Bounds of the reverse SDE


@pytest.mark.parametrize("method", [ContinuousBound(64), ChainBound(steps=256)], ids=["continuous", "chain"])
def test_bounds_are_below_and_add_up(method: Any) -> None:
    """The data's own atoms, 1/16 each: on average no model can give them more than -log 16, and little is lost."""
    atoms = GaussianMixtureDenoiser(VP(), torch.ones(16, dtype=F64), pictures(), torch.tensor(0.0, dtype=F64))
    way = Discretization("decoder", LEVELS, decoder="softmax")
    found = discrete_log_prob(atoms, pictures().repeat(64, 1, 1, 1), way, method)
    torch.testing.assert_close(torch.stack(list(found.parts.values())).sum(0), found.log_prob)
    assert found.terms is not None
    assert found.times is not None
    torch.testing.assert_close(found.terms.sum(1), found.parts["diffusion"])
    assert found.terms.shape == (1024, 256 if isinstance(method, ChainBound) else 64)
    assert bool((found.times.diff() > 0).all())
    mean, error = mean_and_error(found.log_prob[None])
    slack = -math.log(16) - float(mean)
    assert slack > -4 * float(error)
    # the continuous bound of the exact score loses nothing; the chain's loss is of order 1 / steps
    assert slack < (0.3 if isinstance(method, ChainBound) else 0) + 4 * float(error)


def test_bounds_of_dequantized_pictures() -> None:
    """Below log P, and not far: of an exact score the continuous bound is that of its density."""
    denoiser = mixture()
    x = pictures()[4:9].repeat_interleave(64, 0)
    found = discrete_log_prob(denoiser, x, Discretization("uniform", LEVELS, draws=4), ContinuousBound(32))
    mean, error = mean_and_error(found.log_prob.reshape(5, 64))
    exact = log_mass(denoiser, pictures()[4:9])
    assert (mean < exact + 4 * error).all()


# Randomness


@pytest.mark.parametrize("kind", ["uniform", "decoder", "none"])
@pytest.mark.parametrize(
    "method",
    [Flow(SOLVERS.get("dopri5")(rtol=1e-3, atol=1e-3), Hutchinson(2)), ContinuousBound(4), ChainBound(steps=4)],
)
def test_a_picture_is_the_same_in_any_batch(kind: str, method: Any) -> None:
    way = Discretization(kind, None if kind == "none" else LEVELS, draws=2)
    x, numbers = pictures()[:6], [3, 11, 200, 4, 5, 8000]
    whole = discrete_log_prob(mixture(), x, way, method, seed=7, indices=numbers)
    alone = torch.cat(
        [
            discrete_log_prob(mixture(), x[k : k + 1], way, method, seed=7, indices=numbers[k : k + 1]).draws
            for k in reversed(range(6))
        ]
    )
    torch.testing.assert_close(alone.flip(0), whole.draws, rtol=1e-9, atol=1e-9)
    other = discrete_log_prob(mixture(), x, way, method, seed=8, indices=numbers)
    assert not torch.allclose(other.draws, whole.draws)
    assert (whole.draws[:, 0] != whole.draws[:, 1]).all()


def test_progress_goes_from_0_to_1() -> None:
    for method in (Flow(), ContinuousBound(3), ChainBound(steps=3)):
        shares: list[float] = []
        way = Discretization("uniform", LEVELS, draws=2)
        discrete_log_prob(mixture(), pictures()[:2], way, method, progress=shares.append)
        assert shares == sorted(shares)
        assert shares[-1] == 1
        assert 0 < shares[0] < 0.5


# Times


def test_the_density_is_that_of_the_smallest_time() -> None:
    denoiser, x = mixture(), pictures()[:4]
    later = from_time(denoiser, 0.2)
    assert denoiser.sde.t_min == 0.01
    found = discrete_log_prob(later, x, Discretization("none"), Flow(SOLVERS.get("dopri5")(rtol=1e-7, atol=1e-7)))
    torch.testing.assert_close(found.log_prob, denoiser.log_prob(x, 0.2), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"t_min=0\.005 is out of range"):
        from_time(denoiser, 0.005)


def test_decoding_starts_at_a_quarter_of_a_bucket() -> None:
    bytes_ = Quantization()
    for sde in (VP(), SubVP()):
        assert float(sde.noise_level(decoding_time(sde, bytes_))) == pytest.approx(bytes_.width / 4, rel=1e-6)
    sde = VE(sigma_min=0.01)
    assert decoding_time(sde, bytes_) == sde.t_min


# Options


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: Discretization("even", LEVELS), "dequantization='even' is not one of uniform, variational, decoder, none"),
    (lambda: Discretization("none", LEVELS), "dequantization=none gives a density"),
    (lambda: Discretization("uniform"), "dequantization=uniform is for pixels"),
    (lambda: Discretization("variational", LEVELS), "needs a dequantizer"),
    (lambda: Discretization("uniform", LEVELS, draws=0), "draws=0"),
    (lambda: Discretization("uniform", LEVELS, draws=1.5), "draws=1.5"),  # type: ignore[arg-type]
    (lambda: Discretization("uniform", LEVELS, importance=1), "importance=1"),  # type: ignore[arg-type]
    (lambda: Discretization("none", importance=True), "importance=true weighs draws"),
    (lambda: Discretization("uniform", LEVELS, decoder="softmax"), "decoder=softmax and decoder_std=None belong"),
    (lambda: Discretization("uniform", LEVELS, importance=True).check(ContinuousBound()), "needs log p itself"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message for _, message in WRONG])
def test_options_that_do_not_go_together(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        make()


def test_it_says_which_bound_it_is() -> None:
    said = {
        (kind, type(method).__name__): Discretization(kind, None if kind == "none" else LEVELS).meaning(method)
        for kind in ("uniform", "decoder", "none")
        for method in (Flow(), ContinuousBound(), ChainBound())
    }
    assert len(set(said.values())) == 9
    for (kind, method), text in said.items():
        assert ("no bound" in text) == (kind == "none" and method == "Flow"), text
        assert ("upper bound" in text) == (not (kind == "none" and method == "Flow")), text
    way = Discretization("uniform", LEVELS, draws=8, importance=True)
    assert "importance-weighted, 8 draws" in way.meaning(Flow())
    assert dataclasses.replace(way, importance=False).meaning(Flow()) == said["uniform", "Flow"]


def test_weights_of_which_one_counts_have_no_error_bar() -> None:
    """Far in the tail a draw at the inner edge of the bucket outweighs all others."""
    x = torch.full((1, 1, 1, 2), 40.0, dtype=F64)
    way = Discretization("uniform", LEVELS, draws=8, importance=True)
    assert discrete_log_prob(mixture(), x, way, Known()).standard_error.isnan().all()
    assert "estimated traces" in way.meaning(Flow(divergence=Hutchinson()))
    assert "estimated traces" not in way.meaning(Flow(divergence=Exact()))


def test_one_draw_has_no_spread() -> None:
    found = discrete_log_prob(
        mixture(), normal(3, 1, 1, 2), Discretization("none"), Flow(divergence=Hutchinson(3, "gaussian"))
    )
    assert found.standard_error.isnan().all()
    assert (found.trace_error > 0).all()
