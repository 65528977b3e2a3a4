"""Metrics of features: the Fréchet distance, KID and MMD, the Inception score, precision, recall, density, coverage.

Held against closed forms, definitions written out as loops, and the numbers of other libraries.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from sde.errors import UserError
from sde.evaluation.card import drawn_sentences
from sde.evaluation.scores import Floor, score, table
from sde.metrics import METRICS, Metric, Sets
from sde.metrics.base import jackknife_error
from sde.metrics.classifier_test import ClassifierTest
from sde.metrics.frechet import FrechetDistance, Moments, frechet_distance
from sde.metrics.inception_score import InceptionScore
from sde.metrics.kernel import KernelDistance, MeanDiscrepancy, gaussian_mixture, unbiased_mmd
from sde.metrics.precision_recall import DensityCoverage, PrecisionRecall

F64 = torch.float64
WITHIN = {"rel": 1e-9, "abs": 1e-9}
OURS = ("fd", "kid", "mmd", "is", "pr", "dc")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def covariance(d: int, seed: int, rank: int | None = None) -> Tensor:
    root = normal(rank or d, d, seed=seed)
    return root.mT @ root / d


def gaussian(mean: Tensor, cov: Tensor) -> Moments:
    return Moments.from_covariance(1000, mean, cov)


def written_out(mean_a: Tensor, a: Tensor, mean_b: Tensor, b: Tensor) -> float:
    """The definition, by SciPy's matrix square root of the product, which needs not be symmetric."""
    root = np.real(scipy.linalg.sqrtm((a @ b).numpy()))
    return float((mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * np.trace(root))


def two_sets(n: int = 60, m: int = 50, d: int = 5, seed: int = 0) -> Sets:
    """Sets that differ a little, with probabilities of four classes."""
    probabilities = (2 * normal(n, 4, seed=seed + 2)).softmax(1)
    return Sets(normal(n, d, seed=seed), 1.3 * normal(m, d, seed=seed + 1) + 0.2, probabilities=probabilities)


# Fréchet distance: closed forms


def test_frechet_distance_of_commuting_covariances() -> None:
    """sum (sqrt a - sqrt b)^2 of the eigenvalues, in any common basis of eigenvectors."""
    basis = torch.linalg.qr(normal(6, 6)).Q
    a, b = torch.arange(1.0, 7.0, dtype=F64), torch.tensor([9.0, 4.0, 1.0, 0.25, 16.0, 2.0], dtype=F64)
    means = normal(2, 6, seed=1)
    expected = (a.sqrt() - b.sqrt()).square().sum() + (means[0] - means[1]).square().sum()
    sets = [gaussian(mean, basis * v @ basis.mT) for mean, v in zip(means, (a, b), strict=True)]
    assert frechet_distance(*sets) == pytest.approx(float(expected), **WITHIN)


@pytest.mark.parametrize("d", [1, 2, 7, 40])
def test_frechet_distance_of_covariances_that_do_not_commute(d: int) -> None:
    a, b, means = covariance(d, 1, 2 * d), covariance(d, 2, 2 * d), normal(2, d, seed=3)
    expected = written_out(means[0], a, means[1], b)
    assert frechet_distance(gaussian(means[0], a), gaussian(means[1], b)) == pytest.approx(expected, **WITHIN)
    assert frechet_distance(gaussian(means[1], b), gaussian(means[0], a)) == pytest.approx(expected, **WITHIN)


def test_two_by_two_by_hand() -> None:
    """tr (S_a S_b)^{1/2} = sqrt(tr + 2 sqrt det) of the product of two matrices of order 2."""
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=F64)
    b = torch.tensor([[5.0, -2.0], [-2.0, 1.0]], dtype=F64)
    # a b = [[8, -3], [-1, 1]]: trace 9, determinant 5
    zero = torch.zeros(2, dtype=F64)
    expected = 5 + 6 - 2 * math.sqrt(9 + 2 * math.sqrt(5))
    assert frechet_distance(gaussian(zero, a), gaussian(zero, b)) == pytest.approx(expected, **WITHIN)


def test_singular_covariances() -> None:
    """Equal subspaces: as in the subspace; orthogonal ones: the sum of the traces; a point: the trace of the other."""
    basis = torch.linalg.qr(normal(9, 9)).Q
    inner = [covariance(3, seed, 6) for seed in (1, 2)]
    zero, flat = torch.zeros(9, dtype=F64), torch.zeros(9, 9, dtype=F64)
    low = [basis[:, :3] @ s @ basis[:, :3].mT for s in inner]
    other = basis[:, 3:6] @ inner[1] @ basis[:, 3:6].mT
    within = written_out(zero[:3], inner[0], zero[:3], inner[1])
    traces = float(inner[0].trace() + inner[1].trace())
    first = gaussian(zero, low[0])
    assert frechet_distance(first, gaussian(zero, low[1])) == pytest.approx(within, **WITHIN)
    assert frechet_distance(first, gaussian(zero, other)) == pytest.approx(traces, **WITHIN)
    assert frechet_distance(first, gaussian(zero, flat)) == pytest.approx(float(inner[0].trace()), **WITHIN)
    assert frechet_distance(gaussian(zero, flat), gaussian(zero + 2, flat)) == pytest.approx(36.0, **WITHIN)
    full = covariance(9, 5, 20)
    projected = frechet_distance(first, gaussian(zero, full))
    # with a singular first matrix the trace is that of (S^{1/2} B S^{1/2})^{1/2}, here within the subspace
    root = torch.from_numpy(np.real(scipy.linalg.sqrtm(inner[0].numpy())))
    squares = torch.linalg.eigvalsh(root @ basis[:, :3].mT @ full @ basis[:, :3] @ root)
    expected = low[0].trace() + full.trace() - 2 * squares.sqrt().sum()
    assert projected == pytest.approx(float(expected), **WITHIN)


def test_units_of_the_coordinates_do_not_hide_any() -> None:
    """A feature of variance 1e-10 next to one of 1e10, and one that never changes."""
    scale = torch.tensor([1e5, 1.0, 1e-5, 0.0], dtype=F64)
    a, b = (scale * covariance(4, seed, 8) * scale[:, None] for seed in (1, 2))
    small = slice(1, 3)
    zero = torch.zeros(4, dtype=F64)
    a[0, 1:] = a[1:, 0] = b[0, 1:] = b[1:, 0] = 0
    whole = frechet_distance(gaussian(zero, a), gaussian(zero, b))
    large = float((a[0, 0].sqrt() - b[0, 0].sqrt()) ** 2)
    rest = written_out(zero[small], a[small, small], zero[small], b[small, small])
    # traces of 1e10 leave 1e-6 of rounding
    assert whole == pytest.approx(large + rest, abs=1e-5)
    least = [gaussian(zero[:1], m[2:3, 2:3]) for m in (a, b)]
    assert frechet_distance(*least) == pytest.approx(float((a[2, 2].sqrt() - b[2, 2].sqrt()) ** 2), rel=1e-9)
    # beside a variance of one, 1e-16 is below rounding, and yet its root is not: (1 - 1e-8)^2 + 1
    tiny = gaussian(zero[:3], torch.tensor([1.0, 1e-16, 0.0], dtype=F64).diag())
    assert frechet_distance(tiny, gaussian(zero[:3], torch.eye(3, dtype=F64))) == pytest.approx(2 - 2e-8, abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(8, 6), (8, 50), (50, 8)])
def test_fewer_examples_than_dimensions_in_high_precision(n: int, m: int) -> None:
    """The nonzero eigenvalues of S_a S_b from 50 digits; from examples, and to fewer digits from moments."""
    d = 12
    x, y = normal(n, d), normal(m, d, seed=1) @ normal(d, d, seed=2)
    with mpmath.workdps(50):
        a, b = (mpmath.matrix(z.tolist()) for z in (x, y))
        means = [[mpmath.fsum(z[:, j]) / z.rows for j in range(d)] for z in (a, b)]
        for z, mean in zip((a, b), means, strict=True):
            for i in range(z.rows):
                for j in range(d):
                    z[i, j] = (z[i, j] - mean[j]) / mpmath.sqrt(z.rows - 1)
        short, long = (a, b) if n < m else (b, a)
        cross = short * long.T
        values = mpmath.eigsy(cross * cross.T, eigvals_only=True)
        traces = mpmath.fsum(v * v for z in (a, b) for v in z)
        shift = mpmath.fsum((p - q) ** 2 for p, q in zip(*means, strict=True))
        expected = float(shift + traces - 2 * mpmath.fsum(mpmath.sqrt(abs(v)) for v in values))
    assert FrechetDistance()(Sets(x, y))["fd"] == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [5, 30, 200])
def test_frechet_distance_of_a_set_to_itself_is_zero(n: int) -> None:
    x = normal(n, 20) * torch.logspace(0, -6, 20, dtype=F64)
    assert FrechetDistance()(Sets(x, x.clone()))["fd"] < 1e-12
    assert frechet_distance(Moments.of(x), Moments.of(x.flip(0))) < 1e-12


def test_rotations_and_shifts_of_both_change_nothing() -> None:
    sets = two_sets(200, 150, 12)
    turn = torch.linalg.qr(normal(12, 12, seed=9)).Q
    turned = Sets(sets.generated @ turn + 3, sets.reference @ turn + 3)
    assert FrechetDistance()(turned)["fd"] == pytest.approx(FrechetDistance()(sets)["fd"], **WITHIN)


def test_covariances_over_n_or_n_minus_one() -> None:
    sets = two_sets(20, 30, 3)
    for unbiased in (True, False):
        a, b = (z.T.cov(correction=int(unbiased)) for z in (sets.generated, sets.reference))
        expected = written_out(sets.generated.mean(0), a, sets.reference.mean(0), b)
        assert FrechetDistance(unbiased=unbiased)(sets)["fd"] == pytest.approx(expected, **WITHIN)
        moments = [Moments.of(z) for z in (sets.generated, sets.reference)]
        assert frechet_distance(*moments, unbiased=unbiased) == pytest.approx(expected, **WITHIN)
    wide = two_sets(4, 5, 7)
    halves = [FrechetDistance(unbiased=u)(replace(wide, reference=wide.generated + 1))["fd"] for u in (True, False)]
    assert halves == pytest.approx([7.0, 7.0])  # equal covariances, whatever they are divided by
    single = Sets(wide.generated, wide.reference[:1].repeat(5, 1))
    shift = float((single.generated.mean(0) - single.reference[0]).square().sum())
    traces = [FrechetDistance(unbiased=u)(single)["fd"] - shift for u in (True, False)]
    assert traces[0] / traces[1] == pytest.approx(4 / 3)


# Moments


def test_moments_of_batches_are_those_of_the_whole() -> None:
    """Far from the origin too, where sums of x x^T would lose ten digits."""
    x = normal(1000, 6) * torch.arange(1.0, 7.0, dtype=F64) + 1e5
    expected = x.T.cov()
    once = Moments.of(x)
    assert torch.allclose(once.covariance(), expected, rtol=1e-9, atol=1e-9)
    streamed = Moments.empty(6)
    for batch in x.split([1, 0, 499, 37, 463]):
        streamed.update(batch)
    process = [Moments.of(x[k::2]) for k in range(2)]
    process[0].merge(process[1])
    for each in (streamed, process[0]):
        assert each.n == 1000
        assert torch.allclose(each.mean, once.mean, rtol=1e-14, atol=0)
        assert torch.allclose(each.scatter, once.scatter, rtol=1e-9, atol=1e-9)
    other = Moments.of(normal(500, 6, seed=1) + 1e5)
    values = [frechet_distance(m, other) for m in (once, streamed, process[0])]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)


def test_moments_without_a_part() -> None:
    x = normal(500, 6) + 100
    rest = Moments.of(x).without(Moments.of(x[:123]))
    assert rest.n == 377
    assert torch.allclose(rest.mean, x[123:].mean(0), rtol=1e-13)
    assert torch.allclose(rest.covariance(False), x[123:].T.cov(correction=0), rtol=1e-9, atol=1e-9)


def test_float32_features_are_taken_in_float64() -> None:
    x = (normal(20000, 3) * 1e-2 + 100).float()
    assert torch.allclose(Moments.of(x).covariance(), x.double().T.cov(), rtol=1e-9)


# Bias and extrapolation


def test_the_bias_of_fd_falls_like_one_over_n_and_the_line_removes_it() -> None:
    """Two samples of N(0, I) in d dimensions: FD = (2 d + d (d + 1) / 2) / n + ... for equal n, as derived here.

    E |mean difference|^2 is 2 d / n. With S = I + E / sqrt n the distance of the covariances is |E_a - E_b|^2 / (4 n)
    to lowest order; E has variance 2 on the diagonal and 1 off it, so |E_a - E_b|^2 has mean 2 (2 d + d (d - 1)).
    """
    d = 6
    constant = 2 * d + 2 * (d * d + d) / 4
    means = {}
    for n in (250, 500, 1000):
        found = [FrechetDistance()(Sets(normal(n, d, seed=2 * k), normal(n, d, seed=2 * k + 1))) for k in range(60)]
        values = torch.tensor([each["fd"] for each in found])
        error = float(values.std()) / math.sqrt(len(values))
        # the next order is 1 / n smaller, by a factor of about d
        assert float(values.mean()) == pytest.approx(constant / n, abs=4 * error + constant / n * 2 * d / n)
        means[n] = float(values.mean())
    assert means[250] / means[1000] == pytest.approx(4, rel=0.15)
    line = FrechetDistance(extrapolate=True)
    found = [line(Sets(normal(1000, d, seed=2 * k), normal(1000, d, seed=2 * k + 1))) for k in range(100)]
    infinity = torch.tensor([each["fd_infinity"] for each in found])
    error = float(infinity.std()) / math.sqrt(len(infinity))
    assert abs(float(infinity.mean())) < 4 * error
    assert 4 * error < means[1000] / 5
    told = [line.errors(Sets(normal(1000, d, seed=2 * k), normal(1000, d, seed=2 * k + 1))) for k in range(4)]
    assert all(0.3 < each["fd_infinity"] / float(infinity.std()) < 3 for each in told)


def test_extrapolation_of_different_laws_and_its_parts() -> None:
    """FD of N(0, I) and N(1, 4 I) in d dimensions is 2 d; all examples give what they give without extrapolation."""
    d = 4
    sets = Sets(normal(4000, d), 1 + 2 * normal(3000, d, seed=1))
    for whole in (False, True):
        metric = FrechetDistance(extrapolate=True, whole_reference=whole)
        found, error = metric(sets), metric.errors(sets)
        assert found["fd"] == pytest.approx(FrechetDistance()(sets)["fd"], **WITHIN)
        assert found["fd_infinity"] == pytest.approx(2 * d, abs=4 * error["fd_infinity"])
        assert metric(sets) == found
        assert metric(replace(sets, seed=1))["fd_infinity"] != found["fd_infinity"]


def test_extrapolation_needs_halves_of_twice_the_dimensions() -> None:
    metric = FrechetDistance(extrapolate=True)
    assert metric(two_sets(80, 80, 20))["fd_infinity"] < metric(two_sets(80, 80, 20))["fd"]
    with pytest.raises(UserError, match="80 examples of each set, and got 79"):
        metric(two_sets(79, 90, 20))


# Kernels


def test_kid_is_the_double_loop() -> None:
    x, y = normal(9, 4), 0.5 * normal(9, 4, seed=1) + 1

    def k(u: Tensor, v: Tensor) -> float:
        return (float(u @ v) / 4 + 1) ** 3

    n = len(x)
    within = sum(k(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    across = sum(k(u, v) for u in x for v in y) / n**2
    found = KernelDistance()(Sets(x, y))
    assert found["kid"] == pytest.approx(within - 2 * across, rel=1e-12)
    assert found["kid_std"] == 0  # one subset, of everything


def test_kid_averages_subsets_without_repetition() -> None:
    """Of sets of two examples each, a subset of one set of two and the other of two of three: three values."""
    x, y = normal(2, 3), normal(3, 3, seed=1)
    values = [KernelDistance()(Sets(x, y[list(pair)]))["kid"] for pair in ((0, 1), (0, 2), (1, 2))]
    found = KernelDistance(subsets=3000, subset_size=2)(Sets(x, y))
    spread = float(np.std(values))
    assert found["kid"] == pytest.approx(np.mean(values), abs=4 * spread / math.sqrt(3000))
    assert found["kid_std"] == pytest.approx(spread, rel=0.1)
    assert KernelDistance(subsets=50, subset_size=1000)(Sets(x, y)) == KernelDistance(50, 2)(Sets(x, y))


def test_kid_draws_from_both_sets_independently() -> None:
    """Of a set and its copy the mean over subsets is that of all pairs: equal subsets of both would be lower."""
    x, size, subsets = normal(30, 3), 6, 2000
    values = (x @ x.mT / 3 + 1) ** 3
    expected = 2 * float((values.sum() - values.trace()) / (30 * 29) - values.mean())
    found = KernelDistance(subsets=subsets, subset_size=size)(Sets(x, x.clone()))
    assert found["kid"] == pytest.approx(expected, abs=4 * found["kid_std"] / math.sqrt(subsets))


def test_kid_and_mmd_of_one_law_are_zero_in_the_mean() -> None:
    for metric, name in ((KernelDistance(subsets=5, subset_size=40), "kid"), (MeanDiscrepancy(), "mmd")):
        values = torch.tensor(
            [metric(Sets(normal(60, 3, seed=k), normal(60, 3, seed=-k)))[name] for k in range(1, 200)]
        )
        error = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean())) < 4 * error
        assert bool((values < 0).any())
        far = metric(Sets(normal(60, 3), normal(60, 3, seed=1) + 1))[name]
        assert far > 5 * float(values.std())


def test_mmd_is_the_double_loop_and_has_its_closed_form() -> None:
    x, y = normal(7, 2), normal(11, 2, seed=1) + 1
    scales, bandwidth = (0.5, 2.0), 1.7

    def k(u: Tensor, v: Tensor) -> float:
        return sum(math.exp(-float((u - v).square().sum()) / (2 * (s * bandwidth) ** 2)) for s in scales) / 2

    def mean(a: Tensor, b: Tensor) -> float:
        values = [k(u, v) for i, u in enumerate(a) for j, v in enumerate(b) if a is not b or i != j]
        return sum(values) / len(values)

    expected = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    found = MeanDiscrepancy(bandwidth=bandwidth, scales=scales)(Sets(x, y))["mmd"]
    assert found == pytest.approx(expected, rel=1e-10)
    # the kernel between N(0, I) and N(s, I) is that of N(s, 2 I) at 0: Gaussians have means in closed form
    shift, h, n = 0.7, 1.5, 1500
    peak = h**2 / (h**2 + 2)
    expected = 2 * peak * (1 - math.exp(-2 * shift**2 / (2 * (h**2 + 2))))
    sets = Sets(normal(n, 2), normal(n, 2, seed=1) + shift)
    metric = MeanDiscrepancy(bandwidth=h, scales=(1.0,))
    assert metric(sets)["mmd"] == pytest.approx(expected, abs=4 * metric.errors(sets)["mmd"])


def test_the_bandwidth_is_the_median_distance_in_the_reference() -> None:
    reference = torch.tensor([[0.0], [1.0], [3.0]], dtype=F64)  # distances 1, 2, 3
    sets = Sets(normal(20, 1), reference)
    assert MeanDiscrepancy()(sets) == MeanDiscrepancy(bandwidth=2.0)(sets)
    with pytest.raises(UserError, match="give a bandwidth"):
        MeanDiscrepancy()(Sets(normal(20, 1), torch.ones(9, 1)))


def test_tiles_do_not_change_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = two_sets(40, 33)
    metrics = [KernelDistance(subsets=2, subset_size=30), MeanDiscrepancy()]
    whole = [metric(sets) for metric in metrics]
    monkeypatch.setattr("sde.metrics.kernel.TILE", 7)
    for metric, expected in zip(metrics, whole, strict=True):
        assert metric(sets) == pytest.approx(expected, **WITHIN)
    kernel: Callable[[Tensor, Tensor], Tensor] = lambda x, y: gaussian_mixture(x, y, [1.0])  # noqa: E731
    same = unbiased_mmd(kernel, [sets.generated], [sets.generated.clone()])[0]
    n = 40
    values = kernel(sets.generated, sets.generated)
    mean = (float(values.sum()) - n) / (n * (n - 1))
    assert same == pytest.approx(2 * mean - 2 * float(values.mean()), rel=1e-9)


# Inception score


def with_probabilities(p: Tensor) -> Sets:
    return Sets(torch.zeros(len(p), 1), torch.zeros(len(p), 1), probabilities=p)


@pytest.mark.parametrize("splits", [1, 4, 10])
def test_inception_score_of_known_probabilities(splits: int) -> None:
    metric = InceptionScore(splits=splits, shuffle=False)
    assert metric(with_probabilities(torch.full((40, 7), 1 / 7))) == pytest.approx({"is": 1.0, "is_std": 0.0}, abs=1e-6)
    certain = torch.eye(4, dtype=F64).repeat(40, 1)  # balanced in every split
    assert metric(with_probabilities(certain)) == pytest.approx({"is": 4.0, "is_std": 0.0})
    one = torch.eye(4, dtype=F64)[:1].repeat(40, 1)
    assert metric(with_probabilities(one))["is"] == pytest.approx(1.0)


def test_inception_score_is_its_definition() -> None:
    p = two_sets(103).probabilities
    assert p is not None
    scores = []
    for part in (p[k * 103 // 5 : (k + 1) * 103 // 5] for k in range(5)):
        mean = part.mean(0)
        scores.append(math.exp(sum(float((row * (row / mean).log()).sum()) for row in part) / len(part)))
    found = InceptionScore(splits=5, shuffle=False)(with_probabilities(p))
    assert found == pytest.approx({"is": np.mean(scores), "is_std": np.std(scores)}, rel=1e-12)


def test_examples_sorted_by_class_need_shuffling() -> None:
    sets = with_probabilities(torch.eye(5, dtype=F64).repeat_interleave(200, 0))
    assert InceptionScore(splits=5, shuffle=False)(sets)["is"] == pytest.approx(1.0)
    assert InceptionScore(splits=5)(sets)["is"] > 4.9
    assert InceptionScore(splits=1)(sets)["is"] == pytest.approx(5.0)


# Precision, recall, density, coverage


def both(sets: Sets, k: int = 2) -> dict[str, float]:
    return PrecisionRecall(k=k)(sets) | DensityCoverage(k=k)(sets)


def brute_force(x: Tensor, y: Tensor, k: int) -> dict[str, float]:
    """The definitions, a pair at a time."""
    a, b = x.double().tolist(), y.double().tolist()

    def radii(z: list[list[float]]) -> list[float]:
        return [sorted(math.dist(u, v) for j, v in enumerate(z) if j != i)[k - 1] for i, u in enumerate(z)]

    def share(hits: list[bool]) -> float:
        return sum(hits) / len(hits)

    ra, rb = radii(a), radii(b)
    return {
        "precision": share([any(math.dist(u, v) <= r for v, r in zip(b, rb, strict=True)) for u in a]),
        "recall": share([any(math.dist(u, v) <= r for u, r in zip(a, ra, strict=True)) for v in b]),
        "density": sum(math.dist(u, v) < r for u in a for v, r in zip(b, rb, strict=True)) / (k * len(a)),
        "coverage": share([any(math.dist(u, v) < r for u in a) for v, r in zip(b, rb, strict=True)]),
    }


@pytest.mark.parametrize(("n", "m", "d", "k"), [(40, 55, 3, 3), (55, 40, 2, 5), (30, 30, 20, 1)])
def test_neighbors_by_brute_force(n: int, m: int, d: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        sets = two_sets(n, m, d, seed=10 * seed)
        expected = brute_force(sets.generated, sets.reference, k)
        assert both(sets, k) == pytest.approx(expected, abs=1e-12)
    assert all(value > 0 for value in expected.values())
    assert expected["coverage"] < 1
    monkeypatch.setattr("sde.metrics.precision_recall._BLOCK", 200)  # blocks of a few rows
    assert both(sets, k) == pytest.approx(expected, abs=1e-12)


def test_ties_on_a_grid_by_brute_force() -> None:
    """Whole numbers: most distances are equal to radii, and many examples are copies; the origin is far away."""
    numbers = torch.Generator().manual_seed(0)
    for k in (1, 3):
        x, y = (torch.randint(0, 4, (n, 3), generator=numbers).double() for n in (60, 50))
        expected = brute_force(x, y, k)
        assert both(Sets(x, y), k) == pytest.approx(expected, abs=1e-12)
        assert both(Sets(x.float() + 1000, y.float() + 1000), k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", [PrecisionRecall, DensityCoverage])
def test_at_most_so_many_examples_are_drawn_by_the_seed(metric: type[PrecisionRecall | DensityCoverage]) -> None:
    """The numbers, and those without a group, are those of the drawn sets; where there are no more all are taken."""
    sets = replace(two_sets(60, 45, 3), seed=7)

    def rows(x: Tensor, n: int) -> Tensor:
        return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(7))[:n]]

    for examples, other in ((30, rows(sets.reference, 30)), (50, sets.reference)):
        few, drawn = metric(examples=examples), Sets(rows(sets.generated, examples), other)
        assert few.used(sets) == metric().used(drawn) == (examples, min(examples, 45))
        assert few(sets) == metric()(drawn) != metric()(sets)
        assert few.leave_out(sets, 4) == metric().leave_out(drawn, 4)
    assert metric(examples=60)(sets) == metric(examples=None)(sets) == metric()(sets)
    assert metric(examples=60).used(sets) == metric().used(sets) == (60, 45)
    assert metric(examples=30)(replace(sets, seed=8)) != metric(examples=30)(sets)
    with pytest.raises(UserError, match="examples=4 is out of range: it must be at least 5"):
        metric(k=4, examples=4)
    with pytest.raises(UserError, match="cannot be found among 8 examples without one of 2 groups"):
        metric(k=4, examples=8).leave_out(sets, 2)


def test_names_have_the_number_that_was_used() -> None:
    """In the label; the floor is of as many where enough are held out, so that no third number is needed."""
    sets, held_out = two_sets(60, 45, 3), normal(50, 3, seed=9)
    fewer = [Sets(sets.generated[:50], sets.reference)]
    for examples, n, at_floor in ((None, 60, 50), (40, 40, None), (55, 55, 50)):
        metric, floor = PrecisionRecall(examples=examples), Floor(Sets(held_out, sets.reference), fewer)
        precision, recall = score("pr", metric, [sets], "random", floor, groups=3)
        assert (precision.label, recall.label) == (f"precision-random-{n}", f"recall-random-{n}")
        assert (precision.n, precision.reference_n) == (n, min(n, 45))
        assert precision.floor_n == min(n, 50)
        assert (precision.value_at_floor_n is None) == (at_floor is None)
    record = {"metrics": {"pr": {"k": 3, "examples": 55}, "dc": {"examples": None}}}
    assert drawn_sentences({**record, "scores": [precision.to_dict(), recall.to_dict()]}) == [
        "precision-random-55, recall-random-55: of 55 samples and 45 examples of the data, drawn by seed 0 where there "
        "are more (pr.examples=55).",
        "",
    ]


def test_identical_and_disjoint_sets() -> None:
    x = normal(100, 4)
    # each open ball holds its own center and k - 1 others
    same = {"precision": 1.0, "recall": 1.0, "density": 1.0, "coverage": 1.0}
    assert both(Sets(x, x.clone()), 5) == pytest.approx(same)
    assert both(Sets(x, x.flip(0)), 5) == pytest.approx(same)
    assert set(both(Sets(x, x + 100), 5).values()) == {0.0}


def test_half_of_the_modes_and_half_of_the_examples() -> None:
    """Two clusters far apart. A model of one: all that it makes is good, and half is missing; and the other way."""
    low, high = normal(50, 3), normal(50, 3, seed=1) + 1000
    data = torch.cat([low, high])
    dropped = both(Sets(low.clone(), data), 3)
    assert dropped == pytest.approx({"precision": 1.0, "recall": 0.5, "density": 1.0, "coverage": 0.5})
    invented = both(Sets(data, low.clone()), 3)
    assert invented == pytest.approx({"precision": 0.5, "recall": 1.0, "density": 0.5, "coverage": 1.0})


def test_density_counts_balls_and_precision_does_not() -> None:
    """On a line: reference 0, 1, 2, 10 with k = 1 has balls of radius 1, 1, 1, 8; the outlier's holds 2.5 and 3."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0]], dtype=F64)
    found = both(Sets(torch.tensor([[2.5], [3.0], [1.5], [50.0]], dtype=F64), reference), 1)
    # 2.5 in the balls of 2 and 10; 3 in that of 10 and on the edge of that of 2; 1.5 in those of 1 and 2; 50 in none
    assert found["precision"] == 0.75
    assert found["density"] == pytest.approx(5 / 4)
    assert found["coverage"] == 0.75
    assert found["recall"] == 0.75  # of balls with radii .5, .5, 1, 47 around 2.5, 3, 1.5, 50: 10, 2 and 1 lie in some


def test_density_is_one_and_coverage_a_power_of_two_for_one_law() -> None:
    n, k = 2000, 3
    found = DensityCoverage(k=k)(Sets(normal(n, 2), normal(n, 2, seed=1)))
    error = DensityCoverage(k=k).errors(Sets(normal(n, 2), normal(n, 2, seed=1)))
    assert found["density"] == pytest.approx(1, abs=4 * error["density"])
    # no generated example among the nearest k of 2 n that are as likely of either set
    assert found["coverage"] == pytest.approx(1 - 2.0**-k, abs=4 * error["coverage"])


# Errors by the jackknife


class Mean(Metric):
    """The mean of the first feature: an example of a metric whose standard error is known."""

    better = {"mean": "lower"}  # noqa: RUF012
    labels = {"mean": "mean"}  # noqa: RUF012

    def __call__(self, sets: Sets) -> dict[str, float]:
        return {"mean": float(sets.generated[:, 0].mean())}


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    """With as many groups as examples exactly std / sqrt n; with ten an estimate with nine degrees of freedom."""
    sets = two_sets(50, 50)
    values = sets.generated[:, 0]
    assert Mean().errors(sets, groups=50)["mean"] == pytest.approx(float(values.std()) / math.sqrt(50), rel=1e-12)
    squares = torch.tensor(
        [Mean().errors(Sets(x, x))["mean"] ** 2 for x in (normal(100, 1, seed=k) for k in range(200))]
    )
    # the variance of chi^2 / nu is 2 / nu
    assert float(squares.mean()) == pytest.approx(1 / 100, rel=4 * math.sqrt(2 / 9 / 200))


FASTER = {
    "fd": FrechetDistance(),
    "mmd": MeanDiscrepancy(bandwidth=1.0),
    "is": InceptionScore(splits=1),
    "pr": PrecisionRecall(),
    "dc": DensityCoverage(),
    "kid": KernelDistance(subset_size=10**6),
}


@pytest.mark.parametrize("name", FASTER)
@pytest.mark.parametrize(("n", "m", "d"), [(61, 53, 5), (33, 61, 31)])
def test_leaving_groups_out_is_computing_anew(name: str, n: int, m: int, d: int) -> None:
    # of sets of one size the only subset for KID is everything, with and without a group
    metric, sets = FASTER[name], two_sets(n, n if name == "kid" else m, d)
    for fast, slow in zip(metric.leave_out(sets, 7), Metric.both(metric, sets, 7)[1], strict=True):
        assert fast == pytest.approx(slow, **WITHIN)


def test_a_subset_is_the_same_one_without_a_group() -> None:
    """So the errors of KID tell how far its mean strays, and do not add how far new subsets would."""
    sets = two_sets(200, 200)
    metric = KernelDistance(subsets=3, subset_size=20)
    fixed = metric.errors(sets)["kid"]
    anew = Metric.both(metric, sets, 10)[1]
    assert fixed < jackknife_error([each["kid"] for each in anew])


@pytest.mark.parametrize(
    ("metric", "most"),
    [
        (FrechetDistance(), 1.4),
        (KernelDistance(subsets=8, subset_size=50), 1.4),
        (MeanDiscrepancy(bandwidth=2.0), 1.4),
        (InceptionScore(splits=2), 1.4),
        (PrecisionRecall(), math.sqrt(10)),
        (DensityCoverage(), math.sqrt(10)),
    ],
)
def test_errors_are_those_of_repeated_draws(metric: Metric, most: float) -> None:
    """Up to the interactions of c examples, whose variance the jackknife counts c times (Efron and Stein, 1981).

    Nearest neighbors are all interaction, of k + 2 examples and more: there it is a bound, and not a tight one.
    """
    draws = [two_sets(150, 150, 3, seed=1000 + 10 * k) for k in range(60)]
    found = [metric(sets) for sets in draws]
    told = [metric.errors(sets) for sets in draws[:30]]
    for name in found[0]:
        spread = float(torch.tensor([each[name] for each in found]).std())
        error = math.sqrt(sum(each[name] ** 2 for each in told) / len(told))
        # the spread of 60 values is known to 1 / sqrt 118 = 9 %, the mean of 30 errors of ten groups to 4 %
        assert 0.7 < error / spread < (2 if name.endswith("_std") else most), name


def test_errors_say_where_they_come_from() -> None:
    """Of one set and of several, in the JSON; a spread of three tells its degrees of freedom."""
    sets = [two_sets(20, 7, seed=seed) for seed in range(3)]
    for drawn, words in (
        (sets[:1], "jackknife over 7 groups"),
        (sets[:2], "spread over 2 sets, 1 degree of freedom"),
        (sets, "spread over 3 sets, 2 degrees of freedom"),
    ):
        (found,) = score("fd", FrechetDistance(), drawn, "random")
        assert found.to_dict()["error_from"] == words
    few = ClassifierTest(permutations=9)
    assert [each.error_from for each in score("c2st", few, sets[:1], "none")] == ["votes that depend on each other", ""]
    network = ClassifierTest("network", steps=2)
    assert score("c2st", network, sets[:1], "none")[0].error_from == "binomial law of the answers"


def test_numbers_that_are_no_measure_of_quality_have_no_better() -> None:
    sets = two_sets(60, 60)
    found = [
        each
        for name, metric in (("kid", KernelDistance()), ("is", InceptionScore()), ("c2st", ClassifierTest()))
        for each in score(name, metric, [sets], "random", groups=3)
    ]
    shown = {row["metric"]: row["better"] for row in table(found)}
    assert shown == {
        "KID-random-60": "lower",
        "KID (std of subsets)-random-60": "",
        "IS-random-60": "higher",
        "IS (std of splits)-random-60": "",
        "C2ST-60": "near 0.5",
        "C2ST p-60": "",
    }
    assert found[2].reference_n is None  # the Inception score is of no data


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("groups", [3, 10])
def test_what_is_enough_is_enough(name: str, groups: int) -> None:
    """From `least` on everything can be computed; below it is refused before there are any examples."""
    metric = KernelDistance(subset_size=10**6) if name == "kid" else METRICS.get(name)()
    n, m = metric.least(groups)
    for more in (0, 1, 7):
        size = m + more if name == "kid" else m  # of unequal sets subsets of the larger one are drawn
        metric.check_size(n + more, size, groups)
        numbers, errors = metric.with_errors(two_sets(n + more, size or 20), groups)
        assert all(math.isfinite(errors[key]) for key in numbers)
    with pytest.raises(UserError) as error:
        metric.check_size(n - 1, m, groups)
    sentence = f"metric={name} needs at least {n} generated examples with groups={groups} and gets {n - 1}: take n={n} "
    assert str(error.value) == sentence + "or more"
    if name == "is":
        with pytest.raises(UserError, match="leave one of 10 splits without any"):
            metric.leave_out(two_sets(n - 1), min(groups, n - 1))
        for splits, sizes in ((1, range(2, 20)), (4, range(metric.least(groups)[0], 90))):
            for k in sizes:
                InceptionScore(splits=splits).with_errors(two_sets(k), groups)
    else:
        with pytest.raises(UserError, match=f"needs at least {m} reference examples with groups={groups} and gets"):
            metric.check_size(n, m - 1, groups)


def test_options_that_take_too_few_are_named() -> None:
    for metric, sizes, sentence in (
        (
            PrecisionRecall(k=4, examples=5),
            (90, 90),
            "needs at least 6 examples with groups=10 and draws 5: take pr.exa",
        ),
        (DensityCoverage(examples=6), (90, 90), "draws 6: take dc.examples=7 or more"),
        (KernelDistance(subset_size=2), (90, 90), "subsets of 2 examples, of which fewer than two can be left with"),
        (KernelDistance(), (5, 90), "subsets of 5 examples, of which fewer than two can be left with groups=10: take"),
        (FrechetDistance(extrapolate=True), (79, 90), "at least 80 generated examples with groups=10 and gets 79"),
        (FrechetDistance(extrapolate=True, whole_reference=True), (90, 2), "at least 3 reference examples"),
    ):
        with pytest.raises(UserError, match=sentence):
            metric.check_size(*sizes, 10, 20)
    with pytest.raises(UserError, match=r"take kid\.subset_size=(8|16|32),") as error:
        KernelDistance(subset_size=3).check_size(90, 90, 10)
    enough = int(str(error.value).split("subset_size=")[1].split(",")[0])
    KernelDistance(subset_size=enough).check_size(90, 90, 10)
    KernelDistance(subset_size=enough).with_errors(two_sets(90, 90), 10)


@pytest.mark.parametrize("name", ["fd", "mmd", "pr", "dc"])
def test_there_are_no_more_groups_than_examples(name: str) -> None:
    """An empty group would add a value without any influence to the jackknife, and its factor would be that of ten."""
    metric = METRICS.get(name)()
    for sets in (two_sets(7, 40), two_sets(40, 7)):
        assert metric.with_errors(sets, 10) == metric.with_errors(sets, 7)
        assert metric.error_from(sets, 10) == "jackknife over 7 groups"


@pytest.mark.parametrize("name", OURS[1:])
def test_values_and_errors_come_from_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metric, sets = FASTER[name], two_sets(61, 61 if name == "kid" else 53)
    module, calls = sys.modules[type(metric).__module__], []
    function = "_entropy" if name == "is" else "check_sets"
    original = getattr(module, function)
    alone, left_out = metric(sets), metric.leave_out(sets, 4)
    monkeypatch.setattr(module, function, lambda *a: calls.append(a) or original(*a))
    numbers, errors = metric.with_errors(sets, 4)
    assert len([a for a in calls if name != "is" or len(a[0]) == 61]) == 1
    assert numbers == pytest.approx(alone, rel=1e-11, abs=1e-12)
    assert errors == {key: jackknife_error([each[key] for each in left_out]) for key in numbers}


# All of them


@pytest.mark.parametrize("name", OURS)
def test_the_order_of_examples_does_not_matter(name: str) -> None:
    """For KID and the Inception score it chooses subsets and splits, and none where these are everything."""
    metric = FASTER[name]
    sets = two_sets(60, 60)
    order = [torch.randperm(60, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    assert sets.probabilities is not None
    mixed = Sets(sets.generated[order[0]], sets.reference[order[1]], probabilities=sets.probabilities[order[0]])
    assert metric(mixed) == pytest.approx(metric(sets), **WITHIN)


@pytest.mark.parametrize("name", OURS)
def test_the_same_seed_gives_the_same_numbers_and_names_are_told(name: str) -> None:
    metric = METRICS.get(name)()
    sets = two_sets(80, 90)
    found = metric(sets)
    assert found == metric(sets)
    assert set(found) <= set(metric.better) == set(metric.labels)
    assert set(metric.errors(sets)) == set(found)
    single = replace(
        sets,
        generated=sets.generated.float(),
        reference=sets.reference.float(),
        probabilities=None if sets.probabilities is None else sets.probabilities.float(),
    )
    assert metric(single) == pytest.approx(found, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in OURS if name != "is"])
def test_sets_that_do_not_fit_are_refused_in_one_sentence(name: str) -> None:
    metric = METRICS.get(name)()
    good, broken = normal(50, 3), normal(50, 3)
    broken[4, 1] = math.nan
    for sets, message in (
        (Sets(good[:1], good), "needs at least . generated examples"),
        (Sets(good, good[:1]), "needs at least . reference examples"),
        (Sets(broken, good), "generated features are not finite"),
        (Sets(good, broken), "reference features are not finite"),
        (Sets(good, good[:, :2]), "vectors of 3 and of 2 dimensions"),
    ):
        with pytest.raises(UserError, match=message):
            metric(sets)
        with pytest.raises(UserError):
            metric.leave_out(sets, 10)


def test_other_errors_are_one_sentence() -> None:
    x, p = normal(12, 3), torch.full((12, 2), 0.5)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: InceptionScore()(Sets(x, x)), "choose an extractor that is a classifier"),
        (lambda: InceptionScore()(with_probabilities(p[:9])), "at least 10 examples"),
        (lambda: InceptionScore()(with_probabilities(p * 2)), "add up to one"),
        (lambda: InceptionScore()(with_probabilities(p * math.nan)), "add up to one"),
        (lambda: InceptionScore(shuffle=False).leave_out(with_probabilities(p), 3), "leave one of 10 splits"),
        (lambda: PrecisionRecall(k=10).leave_out(Sets(x, x), 3), "pr.k=10 neighbors cannot be found"),
        (lambda: KernelDistance(subset_size=2).leave_out(Sets(x, x), 4), "fewer than two"),
        (lambda: FrechetDistance().leave_out(Sets(x[:2], x), 12), "at least 3 generated"),
        (lambda: frechet_distance(Moments.of(x), Moments.of(x[:, :2])), "12 vectors of 3 with 12 of 2 dimensions"),
        (lambda: frechet_distance(Moments.of(x), Moments.of(x[:1])), "needs two of each"),
        (lambda: MeanDiscrepancy(scales=()), "names no kernel"),
        (lambda: FrechetDistance(levels=1), "levels=1"),
        (lambda: KernelDistance(subset_size=1), "subset_size=1"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


# Other libraries


def fixed_sets() -> tuple[Sets, Tensor]:
    """Features and logits whose bits NumPy promises for ever."""
    random = np.random.RandomState(7)
    x = random.standard_normal((300, 12))
    y = random.standard_normal((300, 12)) @ (np.eye(12) + 0.2 * random.standard_normal((12, 12))) + 0.1
    logits = torch.from_numpy(2 * random.standard_normal((300, 8)))
    return Sets(torch.from_numpy(x), torch.from_numpy(y), probabilities=logits.softmax(1)), logits


def test_numbers_of_other_libraries() -> None:
    """torch-fidelity 0.4.0 (fid, kid of all examples, isc, prc), torchmetrics 1.9.0 (fid, kid), prdc 0.2 (k = 5)."""
    sets, _ = fixed_sets()
    assert FrechetDistance()(sets)["fd"] == pytest.approx(3.6180804266881275, rel=1e-12)
    assert KernelDistance()(sets)["kid"] == pytest.approx(0.47525486849818055, rel=1e-12)
    expected = {"is": 2.2347757725640713, "is_std": 0.15082870935753911}
    assert InceptionScore(shuffle=False)(sets) == pytest.approx(expected, rel=1e-12)
    assert PrecisionRecall()(sets) == pytest.approx({"precision": 187 / 300, "recall": 172 / 300})
    assert DensityCoverage()(sets) == pytest.approx({"density": 0.6466666666666667, "coverage": 0.7966666666666666})


def test_torch_fidelity_where_it_is_installed() -> None:
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    sets, logits = fixed_sets()
    x, y = sets.generated, sets.reference
    theirs = {
        **fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False),
        **kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=300, verbose=False),
        **isc_features_to_metric(logits, 10, False),
        **prc_features_to_metric(x, y, verbose=False),
    }
    score, shares = InceptionScore(shuffle=False)(sets), PrecisionRecall()(sets)
    ours = {
        "frechet_inception_distance": FrechetDistance()(sets)["fd"],
        "kernel_inception_distance_mean": KernelDistance()(sets)["kid"],
        "inception_score_mean": score["is"],
        "inception_score_std": score["is_std"],
        "precision": shares["precision"],
        "recall": shares["recall"],
    }
    assert {name: theirs[name] for name in ours} == pytest.approx(ours, rel=1e-6)


def test_torchmetrics_where_it_is_installed() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid", exc_type=ImportError)
    kid = pytest.importorskip("torchmetrics.image.kid", exc_type=ImportError)
    sets, _ = fixed_sets()
    x, y = sets.generated, sets.reference
    distance = fid._compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert FrechetDistance()(sets)["fd"] == pytest.approx(float(distance), rel=1e-9)
    assert KernelDistance()(sets)["kid"] == pytest.approx(float(kid.poly_mmd(x, y)), rel=1e-9)
