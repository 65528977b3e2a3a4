"""Metrics of examples themselves, against closed forms, brute force and independent implementations."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sde.errors import UserError
from sde.evaluation.scores import Floor, score, table
from sde.metrics import METRICS, Metric, Rows, Sets, base, distances
from sde.metrics.classifier_test import ClassifierTest, fit, neighbor_guesses, permutation_p, vote_error
from sde.metrics.distances import distance_sum, nearest, shuffled
from sde.metrics.memorization import Memorization, closest_pairs, mann_whitney
from sde.metrics.planar import GridKL, Wasserstein, assignment_distance
from sde.metrics.sliced import (
    EnergyDistance,
    SlicedWasserstein,
    directions,
    energy_on_lines,
    kappa,
    wasserstein_on_lines,
)
from tests.problems import normal

OURS = ("c2st", "energy", "grid_kl", "memorization", "swd", "wasserstein")


def leaf(name: str) -> Metric:
    """A metric at its defaults, but for the cost of tests."""
    return ClassifierTest(permutations=49) if name == "c2st" else METRICS.get(name)()


def planar_sets(n: int = 120, m: int = 90, k: int = 60, shift: float = 0.3, seed: int = 0) -> Sets:
    held_out = normal(k, 2, seed=seed + 2)
    return Sets(normal(n, 2, seed=seed) + shift, normal(m, 2, seed=seed + 1), held_out, seed=seed)


def cdist(x: Tensor, y: Tensor) -> np.ndarray:
    """All distances, by SciPy."""
    return scipy.spatial.distance.cdist(x.double().numpy(), y.double().numpy())


# Distances


@pytest.mark.parametrize("d", [2, 40])
@pytest.mark.parametrize("tile", [7, 2048])
def test_sums_and_neighbors_are_those_of_all_distances(d: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that do not divide the sets, and a mean that would cost a product of float64 ten digits."""
    monkeypatch.setattr(distances, "TILE", tile)
    x, y = normal(30, d, seed=1) + 1e5, normal(23, d, seed=2) + 1e5
    exact = cdist(x, y)
    assert distance_sum(x, y) == pytest.approx(exact.sum(), rel=1e-12)
    assert distance_sum(x, x, same=True) == pytest.approx(cdist(x, x).sum(), rel=1e-12)
    found, index = nearest(x, y, 3)
    np.testing.assert_array_equal(index.numpy(), exact.argsort(1)[:, :3])
    np.testing.assert_allclose(found.numpy(), np.sort(exact, 1)[:, :3], rtol=1e-12)
    own = cdist(x, x)
    np.fill_diagonal(own, np.inf)
    np.testing.assert_array_equal(nearest(x, x, 4, same=True)[1].numpy(), own.argsort(1)[:, :4])


def test_a_copy_has_distance_zero_in_float32() -> None:
    x = normal(50, 300, seed=0).float() + 10
    found, index = nearest(x[torch.arange(49, -1, -1)], x)
    assert found.abs().max() == 0
    assert index[:, 0].tolist() == list(range(49, -1, -1))


# Distances on lines


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("n", "m"), [(5, 5), (6, 4), (7, 3), (12, 1)])
def test_distances_on_lines_of_unequal_sets(p: int, n: int, m: int) -> None:
    """Against the sets with every point repeated until they are equally large."""
    a, b = np.sort(normal(3, n, seed=1).numpy()), np.sort(normal(3, m, seed=2).numpy() + 0.5)
    repeated = np.abs(np.repeat(a, m, axis=1) - np.repeat(b, n, axis=1)) ** p
    found = wasserstein_on_lines(a, b, p)
    np.testing.assert_allclose(found, repeated.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found, wasserstein_on_lines(b, a, p), rtol=1e-12)
    if p == 1:
        rows = list(zip(a, b, strict=True))
        np.testing.assert_allclose(found, [scipy.stats.wasserstein_distance(*row) for row in rows], rtol=1e-12)
        energy = [scipy.stats.energy_distance(*row) ** 2 for row in rows]
        np.testing.assert_allclose(energy_on_lines(a, b), energy, rtol=1e-9)


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("p", [1, 2])
def test_a_shift_is_seen_projected(d: int, p: int) -> None:
    """W_p of a set and its shift by v is |<w, v>| on each line."""
    x, v = normal(50, d, seed=0), normal(d, seed=1)
    found = SlicedWasserstein(p=p, directions=64)(Sets(x + v, x[torch.randperm(50)], seed=3))["swd"]
    exact = (directions(d, 64, seed=3) @ v).abs().pow(p).mean() ** (1 / p)
    assert found == pytest.approx(float(exact), rel=1e-9)
    if d == 2:  # evenly spread: exact for p = 2, the error of the midpoint rule at a kink, (pi / 64)^2 / 12, for p = 1
        mean = v.norm() * (kappa(2) if p == 1 else 0.5**0.5)
        assert found == pytest.approx(float(mean), rel=1e-9 if p == 2 else 1e-3)


def test_shifted_gaussians() -> None:
    """SW_1 of N(0, I) and N(v, I) is kappa_d |v|, since W_1 of N(0, 1) and N(m, 1) is |m|."""
    d, n, lines = 8, 4000, 1000
    v = torch.zeros(d).double()
    v[0] = 3.0
    found = SlicedWasserstein(directions=lines)(Sets(normal(n, d, seed=0) + v, normal(n // 2, d, seed=1)))["swd"]
    # |w_1| has mean square 1/d. On a line the distance is off by at most that of the sets from their laws, together in
    # the mean sqrt(2 / pi) int sqrt(F (1 - F)) dz (n^-1/2 + m^-1/2), where the integral is 1.615 for a normal law
    lines_error = 3 * math.sqrt((1 / d - kappa(d) ** 2) / lines)
    floor = 1.615 * math.sqrt(2 / math.pi) * (n**-0.5 + (n / 2) ** -0.5)
    assert abs(found - 3 * kappa(d)) < 4 * lines_error + floor
    assert 4 * lines_error + floor < 0.15 * 3 * kappa(d)


def test_energy_of_point_masses() -> None:
    """2 |x - y|, whatever the estimate, the sizes and the dimension."""
    for d in (1, 3, 40):
        x, y = torch.zeros(7, d).double(), torch.full((4, d), 2.0).double()
        exact = 2 * 2 * math.sqrt(d)
        for unbiased in (False, True):
            assert EnergyDistance(unbiased=unbiased)(Sets(x, y))["energy"] == pytest.approx(exact, rel=1e-7)
    lines = EnergyDistance(exact=0, directions=4000)(Sets(x, y))["energy"]
    # |w_1| is about half-normal: its relative spread is sqrt(pi / 2 - 1)
    assert lines == pytest.approx(exact, rel=4 * math.sqrt((math.pi / 2 - 1) / 4000))


@pytest.mark.parametrize("unbiased", [False, True])
def test_energy_of_all_pairs(unbiased: bool) -> None:
    sets = planar_sets()
    x, y = sets.generated, sets.reference
    n, m = len(x), len(y)
    within = cdist(x, x).sum() / (n * (n - unbiased)) + cdist(y, y).sum() / (m * (m - unbiased))
    exact = 2 * cdist(x, y).mean() - within
    assert EnergyDistance(unbiased=unbiased)(sets)["energy"] == pytest.approx(exact, rel=1e-9)
    # on lines: the mean of |<w, v>| over 256 even directions is right to (pi / 256)^2 / 6 of each mean distance
    lines = EnergyDistance(unbiased=unbiased, exact=0)(sets)["energy"]
    assert lines == pytest.approx(exact, abs=1e-4 * cdist(x, y).mean())


def test_the_unbiased_energy_is_zero_in_the_mean() -> None:
    drawn = [planar_sets(shift=0, seed=10 * seed) for seed in range(60)]
    found = {b: [EnergyDistance(unbiased=b)(sets)["energy"] for sets in drawn] for b in (False, True)}
    error = np.std(found[True]) / math.sqrt(60)
    assert abs(np.mean(found[True])) < 4 * error
    # the other counts n + m distances to themselves: E|X - X'| (1/n + 1/m), with E|X - X'| = sqrt(pi) in the plane
    assert np.mean(found[False]) == pytest.approx(math.sqrt(math.pi) * (1 / 120 + 1 / 90), abs=4 * error)


# Classifiers


def test_neighbors_vote_and_do_not_count_themselves() -> None:
    x, labels = normal(41, 3, seed=0), torch.arange(41) % 2 == 0
    own = cdist(x, x)
    for k in (1, 5):
        index = nearest(x, x, k, same=True)[1]
        expected = []
        for i in range(41):
            others = sorted((j for j in range(41) if j != i), key=lambda j: own[i, j])[:k]
            expected.append(sum(bool(labels[j]) for j in others) > k / 2)
        assert neighbor_guesses(index, labels).tolist() == expected


@pytest.mark.parametrize("options", [{"neighbors": 1}, {"neighbors": 5}, {"classifier": "network", "steps": 150}])
def test_who_cannot_tell_is_right_about_half_of_the_time(options: dict) -> None:
    test = ClassifierTest(**options)
    n = 400
    same = test(Sets(normal(n, 2, seed=0), normal(2 * n, 2, seed=1)))
    answers = n if "classifier" in options else 2 * n
    # votes depend on each other: less than twice the binomial variance; the first term is that of leaving one out
    assert abs(same["c2st"] - 0.5) < 0.5 / answers + 3 * math.sqrt(2 * 0.25 / answers)
    assert same["c2st_p"] > 0.01
    apart = test(Sets(normal(n, 2, seed=0) + 10, normal(2 * n, 2, seed=1)))
    assert apart["c2st"] == 1
    assert apart["c2st_p"] == (pytest.approx(0.5**answers, rel=1e-9, abs=0) if "classifier" in options else 0.001)
    accuracies = [test(Sets(normal(n, 2, seed=0) + shift, normal(n, 2, seed=1)))["c2st"] for shift in (1, 2, 3)]
    assert 0.55 < accuracies[0] < accuracies[1] < accuracies[2] < 1


def test_copies_are_told_by_the_nearest_neighbor() -> None:
    """Whoever lies on top of an example of the other kind is always taken for it."""
    x = normal(100, 5, seed=0)
    assert ClassifierTest()(Sets(x.clone(), x))["c2st"] == 0


def test_a_linear_network_finds_the_best_line_and_no_ring() -> None:
    """Of N(-1, 1) and N(1, 1) on the first axis no classifier tells more than Phi(1)."""
    n = 2000
    labels = torch.arange(n) % 2 == 0
    x = normal(n, 4, seed=0)
    x[:, 0] += 2.0 * labels - 1
    x[:, 1] = 3.0  # constant
    guess = fit(x[: n // 2], labels[: n // 2], hidden=0, steps=300, seed=0)
    best = scipy.stats.norm.cdf(1)
    accuracy = float((guess(x[n // 2 :]) == labels[n // 2 :]).double().mean())
    assert best - 0.02 - 4 * math.sqrt(0.25 * 2 / n) < accuracy < best + 4 * math.sqrt(0.25 * 2 / n)
    ring = normal(n, 2, seed=1)
    ring[labels] *= 3 / ring[labels].norm(dim=1, keepdim=True)
    right = {h: (fit(ring, labels, h, 300, 0)(ring) == labels).double().mean() for h in (0, 32)}
    assert right[0] < 0.6
    assert right[32] > 0.9


def test_the_permutation_p_is_the_share_of_all_labelings() -> None:
    """Against all labelings of 8 points; under one law the p-value is uniform."""
    x = normal(8, 2, seed=3)
    neighbors = nearest(x, x, 1, same=True)[1]
    labels = torch.tensor([True, True, True, True, False, False, False, False])[torch.tensor([0, 4, 1, 2, 5, 3, 6, 7])]
    right = int((labels[neighbors[:, 0]] == labels).sum())
    all_of_them = []
    for chosen in itertools.combinations(range(8), 4):
        other = torch.zeros(8, dtype=torch.bool)
        other[list(chosen)] = True
        all_of_them.append(int((other[neighbors[:, 0]] == other).sum()) >= right)
    exact = float(np.mean(all_of_them))
    assert 0 < exact < 1
    error = math.sqrt(exact * (1 - exact) / 2000)
    assert permutation_p(neighbors, labels, 2000, 0) == pytest.approx(exact, abs=4 * error)


def test_the_error_of_votes_counts_those_that_depend_on_each_other() -> None:
    """The double sum written out; and the spread of the accuracy over many sets, where the binomial is too small."""
    x = normal(30, 2, seed=0)
    neighbors = nearest(x, x, 3, same=True)[1]
    right = normal(30, seed=1) > 0
    e = right.double() - right.double().mean()
    sets = [set(row) for row in neighbors.tolist()]
    total = sum(float(e[i] * e[j]) for i in range(30) for j in range(30) if i == j or i in sets[j] or j in sets[i])
    assert vote_error(neighbors, right) == pytest.approx(math.sqrt(max(total, 0)) / 30, rel=1e-9)
    test = ClassifierTest(permutations=1)
    drawn = [planar_sets(150, 150, seed=10 * seed, shift=0.5) for seed in range(150)]
    spread = np.std([test(sets)["c2st"] for sets in drawn], ddof=1)
    told = np.mean([test.errors(sets)["c2st"] for sets in drawn])
    # a standard deviation of 150 is known to 1 / sqrt(300) of it
    assert told == pytest.approx(spread, rel=4 / math.sqrt(300))
    assert told > 1.15 * math.sqrt(0.25 / 300)


# Memorization


def test_copies_of_training_and_of_held_out_data() -> None:
    training, held_out = normal(500, 3, seed=0), normal(200, 3, seed=1)
    chosen = training[shuffled(500, 0)][:200]  # those that are compared in equal numbers
    copied = Memorization()(Sets(chosen, training, held_out))
    assert copied["memorization"] == 1
    assert copied["memorization_ratio"] == 0
    assert copied["memorization_copies"] == 1
    # all zeros against none: U = 0
    assert copied["memorization_ct"] == pytest.approx(-math.sqrt(3 * 200 * 200 / 401))
    assert Memorization()(Sets(training, training, held_out))["memorization_copies"] == 1
    fresh = Memorization()(Sets(held_out.clone(), training, held_out))
    assert fresh["memorization"] == 0
    assert fresh["memorization_ratio"] == math.inf
    assert fresh["memorization_copies"] == pytest.approx(0.01, abs=1e-9)
    assert fresh["memorization_ct"] == pytest.approx(0, abs=1e-9)
    both = Memorization()(Sets(training[:50], training, training.clone()))  # a copy of either is a draw
    assert (both["memorization"], both["memorization_ratio"]) == (0.5, 1)


def test_fresh_examples_are_as_close_to_either() -> None:
    """Many reference examples, so that the spread is that of the generated ones: binomial."""
    n, q = 500, 0.05
    sets = Sets(normal(n, 2, seed=0), normal(9000, 2, seed=1), normal(6000, 2, seed=2))
    found = Memorization(quantile=q)(sets)
    # where training examples are nearer is a random part of the plane, of 1/2 with a variance below 1 / 6000
    error = math.sqrt(0.25 / n + 1 / 6000)
    assert abs(found["memorization"] - 0.5) < 3 * error
    assert abs(found["memorization_copies"] - q) < 3 * math.sqrt(q * (1 - q) / n + q * (1 - q) / 6000)
    assert abs(found["memorization_ct"]) < 3
    # d^2 is about exponential: the log ratio has density f = 1/2 at 0, and its median the error 1 / (2 f sqrt n)
    assert abs(math.log(found["memorization_ratio"])) < 3 * error / 0.5
    noisy = [
        Memorization()(Sets(sets.reference[:n] + scale * normal(n, 2, seed=3), sets.reference[:n], sets.held_out))
        for scale in (0.001, 0.02, 0.1)
    ]
    for name, order in (("memorization", -1), ("memorization_copies", -1), ("memorization_ratio", 1)):
        values = [each[name] for each in noisy]
        assert values == sorted(values, reverse=order < 0)
        assert values[0] != values[-1]


def test_memorization_by_brute_force() -> None:
    sets = Sets(normal(40, 5, seed=0), normal(70, 5, seed=1), normal(25, 5, seed=2), seed=4)
    assert sets.held_out is not None
    chosen = sets.reference[shuffled(70, 4)][:25]
    to_training, to_held_out = cdist(sets.generated, chosen).min(1), cdist(sets.generated, sets.held_out).min(1)
    nearest_of_all, fresh = cdist(sets.generated, sets.reference).min(1), cdist(sets.held_out, sets.reference).min(1)
    test = scipy.stats.mannwhitneyu(nearest_of_all, fresh)
    exact = {
        "memorization": np.mean(to_training < to_held_out),
        "memorization_ratio": np.median(to_training / to_held_out),
        "memorization_copies": np.mean(nearest_of_all <= np.quantile(fresh, 0.1)),
        "memorization_ct": (test.statistic - 500) / math.sqrt(40 * 25 * 66 / 12),
    }
    assert Memorization(quantile=0.1)(sets) == pytest.approx(exact, rel=1e-9)
    # fewer training than held-out examples: the other set is cut
    few = replace(sets, reference=sets.reference[:10])
    there = cdist(few.generated, sets.held_out[shuffled(25, 4, 10)]).min(1)
    exact_share = np.mean(cdist(few.generated, few.reference).min(1) < there)
    assert Memorization()(few)["memorization"] == pytest.approx(exact_share)
    # each group left out of every set
    left = Memorization(quantile=0.1).leave_out(sets, 5)
    order, held = shuffled(70, 4), shuffled(25, 4)
    keep = [torch.arange(n) % 5 != 2 for n in (25, 45, 25, 40)]
    c = sets.reference[order][:25][keep[0]]
    t = torch.cat([c, sets.reference[order][25:][keep[1]]])
    h, g = sets.held_out[held][keep[2]], sets.generated[shuffled(40, 4)][keep[3]]
    assert left[2]["memorization"] == pytest.approx(np.mean(cdist(g, c).min(1) < cdist(g, h).min(1)))
    assert left[2]["memorization_ct"] == pytest.approx(mann_whitney(cdist(g, t).min(1), cdist(h, t).min(1)))


def stored_pictures(n: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (n, 2, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def encoded(stored: Tensor) -> Tensor:
    """As vectors of 24 dimensions, float32."""
    return (stored.float() / 127.5 - 1).flatten(1)


def picture_sets(train: int = 130) -> Sets:
    training, held_out = stored_pictures(train, 1), encoded(stored_pictures(40, 2))
    generated = torch.cat([encoded(training[:5]), encoded(stored_pictures(45, 3))])
    return Sets(generated, encoded(training), held_out, seed=4)


@pytest.mark.parametrize("tile", [1, 7, 64, 2048])
def test_blocks_of_stored_examples_give_the_same_numbers(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their size, those of all vectors at once; and what is compared does not depend on the reference then."""
    metric, whole = Memorization(quantile=0.1), picture_sets()
    expected = [metric(whole), *metric.leave_out(whole, 3)]
    monkeypatch.setattr(distances, "TILE", tile)
    sizes = list[int]()

    def counted(stored: Tensor) -> Tensor:
        sizes.append(len(stored))
        return encoded(stored)

    rows = replace(whole, reference=whole.reference[:2], training=Rows(stored_pictures(130, 1), counted))
    monkeypatch.setattr(base, "_BLOCK", tile)
    assert [metric(rows), *metric.leave_out(rows, 3)] == expected
    assert max(sizes) == min(tile, 130)


def test_memory_does_not_grow_with_the_training_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of floating type that is made anywhere, of few and of many training examples."""
    monkeypatch.setattr(distances, "TILE", 64)
    monkeypatch.setattr(base, "_BLOCK", 64)
    largest = []
    for train in (400, 3000):
        sets = picture_sets(train)
        stored, few = stored_pictures(train, 1), replace(sets, reference=sets.reference[:2])
        with LargestFloat() as watched:
            Memorization().errors(replace(few, training=Rows(stored, encoded)), 4)
        largest.append(watched.numel)
    assert largest == [50 * 64, 50 * 64]  # distances of the generated examples from a tile
    with LargestFloat() as watched:
        Memorization().errors(sets, 4)
    assert watched.numel >= 3000 * 24


class LargestFloat(TorchDispatchMode):
    """Looks at every result of PyTorch."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor) and each.is_floating_point():
                self.numel = max(self.numel, each.numel())
        return result


def test_rows_are_indexed_like_a_tensor() -> None:
    stored = stored_pictures(20, 5)
    rows, whole = Rows(stored, encoded), encoded(stored)
    order = torch.tensor([4, 4, 0, 19])
    for key in (slice(3, 15, 4), order, torch.arange(20) % 3 != 1, slice(30, 40)):
        assert torch.equal(rows[key].tensor(), whole[key])
        assert rows[key].shape == whole[key].shape
    assert torch.equal(rows[order][1:3].double(), whole[order][1:3].double())
    assert torch.equal(torch.cat(list(rows.blocks(6))), whole)
    assert (len(rows), rows.dtype, rows.ndim) == (20, torch.float32, 2)
    left = Sets(whole, whole, training=rows).without(1, 3).training
    assert left is not None
    assert torch.equal(left.tensor(), whole[torch.arange(20) % 3 != 1])
    with pytest.raises(UserError, match="memorization: some of the training features are not finite"):
        Memorization()(Sets(whole, whole, whole, training=Rows(stored, lambda x: encoded(x) / (encoded(x) < 0.9))))
    with pytest.raises(UserError, match="memorization needs at least 2 training examples"):
        Memorization()(Sets(whole, whole, whole, training=rows[:1]))


def test_mann_whitney_with_ties() -> None:
    x, y = np.array([0.0, 1, 1, 2]), np.array([1.0, 1, 3])
    u = sum((a > b) + (a == b) / 2 for a in x for b in y)
    assert mann_whitney(x, y) == pytest.approx((u - 6) / math.sqrt(12 * 8 / 12))


def test_the_closest_pairs() -> None:
    x, y = normal(20, 4, seed=0), normal(30, 4, seed=1)
    x[7] = y[11]
    found, generated, reference = closest_pairs(x, y, 5)
    exact = cdist(x, y)
    order = exact.min(1).argsort()[:5]
    assert generated.tolist() == order.tolist()
    assert reference.tolist() == exact.argmin(1)[order].tolist()
    np.testing.assert_allclose(found.numpy(), exact.min(1)[order], rtol=1e-12)
    assert (int(generated[0]), int(reference[0]), float(found[0])) == (7, 11, 0)
    assert len(closest_pairs(x, y, 100)[0]) == 20


# The plane


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("n", [2, 5, 7])
def test_assignment_by_brute_force(n: int, p: int) -> None:
    x, y = normal(n, 2, seed=n), normal(n, 2, seed=n + 1)
    cost = cdist(x, y) ** p
    best = min(sum(cost[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(n)))
    assert assignment_distance(x, y, p) == pytest.approx((best / n) ** (1 / p), rel=1e-12)
    assert Wasserstein(p=p)(Sets(x, y))["wasserstein"] == pytest.approx((best / n) ** (1 / p), rel=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_assignment_of_a_shift_and_on_a_line(p: int) -> None:
    x, v = normal(60, 2, seed=0), torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert assignment_distance(x + v, x.flip(0), p) == pytest.approx(0.5, rel=1e-9)
    line, other = normal(60, 1, seed=1), normal(60, 1, seed=2)
    on_line = [torch.cat([z, torch.zeros(60, 1)], 1) for z in (line, other)]
    quantiles = (line.sort(0).values - other.sort(0).values).abs().pow(p).mean() ** (1 / p)
    assert assignment_distance(*on_line, p) == pytest.approx(float(quantiles), rel=1e-9)
    # 20 of 200 points: sets of which all are drawn, and a draw that the seed fixes
    sets = Sets(normal(200, 2, seed=3), normal(90, 2, seed=4) + 3)
    few = [Wasserstein(points=20)(replace(sets, seed=seed))["wasserstein"] for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    exact = assignment_distance(sets.generated[shuffled(200, 0, 20)], sets.reference[shuffled(90, 0, 20)])
    assert few[0] == pytest.approx(exact, rel=1e-12)


def test_divergences_of_histograms() -> None:
    data, generated = normal(400, 2, seed=0), 1.5 * normal(300, 2, seed=1)
    bins = 4
    (low_x, low_y), (high_x, high_y) = data.min(0).values.tolist(), data.max(0).values.tolist()
    box = [[low_x, high_x], [low_y, high_y]]

    def shares(x: Tensor) -> np.ndarray:
        inside = np.histogram2d(*x.T.numpy(), bins=bins, range=box)[0].ravel()
        counts = np.append(inside, len(x) - inside.sum())
        return (counts + 0.5) / (len(x) + 0.5 * 17)

    p, q = shares(data), shares(generated)
    found = GridKL(bins=bins)(Sets(generated, data))
    assert found["grid_kl"] == pytest.approx(scipy.stats.entropy(p, q), rel=1e-9)
    assert found["grid_kl_reverse"] == pytest.approx(scipy.stats.entropy(q, p), rel=1e-9)
    assert found["grid_js"] == pytest.approx(scipy.spatial.distance.jensenshannon(p, q) ** 2, rel=1e-9)
    assert set(GridKL()(Sets(data, data)).values()) == {0.0}
    outside = GridKL(bins=bins)(Sets(generated + 100, data))
    # of the generated half-points 8 of 308.5 stay inside the box
    assert 0.9 * math.log(2) < outside["grid_js"] < math.log(2)
    # data on a line have a box without a width
    line = torch.stack([torch.linspace(0, 1, 50), torch.zeros(50)], 1)
    assert GridKL(bins=5)(Sets(line, line))["grid_kl"] == 0
    assert GridKL(bins=5)(Sets(line + torch.tensor([0.0, 0.1]), line))["grid_kl"] > 1


def test_the_floor_of_divergences() -> None:
    """(K - 1) / 2 (1/n + 1/m) for sets of one law, and a quarter of it for Jensen-Shannon."""
    draws = [(torch.rand(4000, 2, generator=g), torch.rand(6000, 2, generator=g)) for g in map(seeded, range(20))]
    found = [GridKL(bins=5)(Sets(x, y)) for x, y in draws]
    floor = 24 / 2 * (1 / 4000 + 1 / 6000)
    for name, expected in (("grid_kl", floor), ("grid_kl_reverse", floor), ("grid_js", floor / 4)):
        # chi-square of 24 degrees: relative spread sqrt(2 / 24), and 10 % for the cell outside and higher orders
        assert np.mean([f[name] for f in found]) == pytest.approx(expected, rel=4 * math.sqrt(2 / 24 / 20) + 0.1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# All of them


@pytest.mark.parametrize("name", OURS)
def test_a_metric_says_what_it_is(name: str) -> None:
    metric = leaf(name)
    found = metric(planar_sets())
    assert list(found) == list(metric.better) == list(metric.labels)
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert metric.of == "examples"
    assert metric.planar == (name in ("wasserstein", "grid_kl"))
    assert metric.needs_held_out == (name == "memorization")
    assert found == metric(planar_sets())  # nothing is drawn but by the seed
    in_float32 = metric(replace(planar_sets(), generated=planar_sets().generated.float()))
    assert in_float32 == pytest.approx(found, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_order_does_not_matter_where_all_are_used(name: str) -> None:
    sets = planar_sets(100, 100, 100)  # equal numbers: none of them draws
    assert sets.held_out is not None
    flipped = Sets(sets.generated.flip(0), sets.reference.roll(7, 0), sets.held_out.flip(0))
    found, other = leaf(name)(sets), leaf(name)(flipped)
    for number in found:
        if number != "c2st_p":  # drawn permutations
            assert other[number] == pytest.approx(found[number], rel=1e-9), number


@pytest.mark.parametrize("metric", [SlicedWasserstein(), SlicedWasserstein(p=2), EnergyDistance(), Wasserstein()])
def test_distances_are_symmetrical_and_grow(metric: Metric) -> None:
    (name,) = metric.better
    sets = planar_sets(120, 90)
    swapped = Sets(sets.reference, sets.generated, seed=sets.seed)
    assert metric(swapped)[name] == pytest.approx(metric(sets)[name], rel=1e-9)
    x = normal(150, 2, seed=5)
    shifts = [metric(Sets(x + shift, x))[name] for shift in (0.0, 0.1, 0.5, 2.0)]
    assert shifts == sorted(shifts)
    assert shifts[0] <= 1e-12
    noises = [metric(Sets(x + scale * normal(150, 2, seed=6), normal(150, 2, seed=7)))[name] for scale in (0.5, 1, 3)]
    assert noises == sorted(noises)


@pytest.mark.parametrize("name", ["swd", "energy", "grid_kl", "wasserstein"])
def test_what_is_left_out_at_once_is_what_is_left_out_anew(name: str) -> None:
    sets = planar_sets(100, 100)
    if name == "wasserstein":
        order = shuffled(100, 0)
        back = replace(sets, generated=sets.generated[order], reference=sets.reference[order])
        # where all are drawn the cost does not depend on their order
        anew = [Wasserstein()(back.without(group, 4)) for group in range(4)]
    else:
        anew = [leaf(name)(sets.without(group, 4)) for group in range(4)]
    for found, exact in zip(leaf(name).leave_out(sets, 4), anew, strict=True):
        assert found == pytest.approx(exact, rel=1e-9)
    if name == "energy":
        lines = EnergyDistance(exact=0)
        anew = [lines(sets.without(group, 4)) for group in range(4)]
        assert [f["energy"] for f in lines.leave_out(sets, 4)] == pytest.approx([f["energy"] for f in anew], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "most"), [("swd", 1), ("energy", 1), ("wasserstein", 1), ("memorization", 1.4), ("grid_kl", 1.5)]
)
def test_errors_are_the_spread_over_samples(name: str, most: float) -> None:
    """The spread over 60 draws is known to 9 %, a jackknife of 10 groups to 24 %, 20 of them to 5 %.

    Of nearest neighbors, and of a box that the outermost points make, the jackknife is an upper bound.
    """
    drawn = [planar_sets(150, 150, 150, shift=1.0, seed=10 * seed) for seed in range(60)]
    metric = leaf(name)
    found = [metric.with_errors(sets) for sets in drawn[:20]]
    values = [*(numbers for numbers, _ in found), *(metric(sets) for sets in drawn[20:])]
    within = 4 * math.hypot(0.09, 0.05)
    for number in metric.better:
        spread = np.std([each[number] for each in values], ddof=1)
        told = np.sqrt(np.mean([errors[number] ** 2 for _, errors in found]))
        assert 1 - within < told / spread < most + within, number


def test_names_have_the_number_that_was_used_of_metrics_that_draw() -> None:
    """In the label, and for the floor, which is of as many where enough are held out."""
    sets, held_out = planar_sets(120, 90), normal(60, 2, seed=7)
    floor = Floor(Sets(held_out, sets.reference), [Sets(sets.generated[:60], sets.reference)])
    cases: list[tuple[str, Metric, str, int, int]] = [
        ("wasserstein", Wasserstein(points=30), "Wasserstein-30", 30, 30),
        ("wasserstein", Wasserstein(), "Wasserstein-90", 90, 60),
        ("c2st", ClassifierTest(examples=40, permutations=9), "C2ST-40", 40, 40),
        ("c2st", ClassifierTest(permutations=9), "C2ST-90", 90, 60),
    ]
    for name, metric, label, n, floor_n in cases:
        found = score(name, metric, [sets], "none", floor, groups=3)[0]
        assert (found.label, found.n, found.reference_n, found.floor_n) == (label, n, n, floor_n)
        assert (found.value_at_floor_n is None) == (floor_n == n)
        assert f"(n = {floor_n})" in table([found])[0]["data themselves"]
    few = Memorization(examples=50)
    assert score("memorization", few, [sets], "none", groups=3)[0].label == "closer to training-50"
    assert few.used(sets) == (50, 90)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("groups", [2, 10])
def test_what_is_enough_is_enough(name: str, groups: int) -> None:
    """From `least` on everything can be computed; below it is refused before there are any examples."""
    metric = leaf(name)
    n, m = metric.least(groups)
    for more in (0, 1, 7):
        metric.check_size(n + more, m, groups)
        numbers, errors = metric.with_errors(planar_sets(n + more, m, 20), groups)
        assert list(numbers) == list(errors)
        assert all(math.isfinite(error) for error in errors.values())
    with pytest.raises(UserError) as error:
        metric.check_size(n - 1, m, groups)
    sentence = f"metric={name} needs at least {n} generated examples with groups={groups} and gets {n - 1}: take n={n} "
    assert str(error.value) == sentence + "or more"
    with pytest.raises(UserError, match=f"examples with groups={groups} and gets {n - 1}: take examples={n} or more"):
        metric.check_size(n - 1, m, groups, option="examples")
    with pytest.raises(UserError, match=f"needs at least {m} reference examples with groups={groups} and gets {m - 1}"):
        metric.check_size(n, m - 1, groups)
    metric.check_size(n, 0, groups)  # none that are looked at


def test_an_option_that_draws_too_few_is_named() -> None:
    for metric, sentence in (
        (Wasserstein(points=2), "needs at least 3 examples with groups=10 and draws 2: take wasserstein.points=3 or"),
        (Memorization(examples=2), "draws 2: take memorization.examples=3 or more"),
        (ClassifierTest(neighbors=9, examples=5), "needs at least 9 examples with groups=10 and draws 5: take c2st.ex"),
    ):
        with pytest.raises(UserError, match=sentence):
            metric.check_size(1000, 1000, 10)


@pytest.mark.parametrize("name", ["swd", "energy", "grid_kl", "wasserstein", "memorization"])
def test_there_are_no_more_groups_than_examples(name: str) -> None:
    """An empty group would add a value without any influence to the jackknife, and its factor would be that of ten."""
    metric = leaf(name)
    for sizes in ((5, 40, 30), (40, 5, 30), (40, 30, 5)) if name == "memorization" else ((5, 40), (40, 5)):
        sets = planar_sets(*sizes)
        assert metric.with_errors(sets, 10) == metric.with_errors(sets, 5)
        assert metric.error_from(sets, 10) == "jackknife over 5 groups"
    assert metric.error_from(planar_sets(40, 40, 40), 10) == "jackknife over 10 groups"


@pytest.mark.parametrize("name", ["swd", "energy", "lines", "memorization", "c2st"])
def test_values_and_errors_come_from_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = EnergyDistance(exact=0) if name == "lines" else leaf(name)
    sets, calls = planar_sets(), list[str]()
    if name in ("energy", "lines"):  # of more dimensions distances are of a product
        sets = Sets(normal(60, 40, seed=1) + 0.2, normal(50, 40, seed=2))
    module = sys.modules[type(metric).__module__]
    check = module.check_sets
    alone, anew = metric(sets), metric.leave_out(sets, 4) if name != "c2st" else []
    monkeypatch.setattr(module, "check_sets", lambda sets, name, *a: calls.append(name) or check(sets, name, *a))
    numbers, errors = metric.with_errors(sets, 4)
    assert calls.count(metric.name) == 1
    assert numbers == pytest.approx(alone, rel=1e-12, abs=1e-12)
    if name != "c2st":
        assert errors == {key: base.jackknife_error([each[key] for each in anew]) for key in numbers}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SlicedWasserstein(p=3), "p=3 is out of range"),
        (lambda: SlicedWasserstein(directions=0), "directions=0 is out of range"),
        (lambda: EnergyDistance(unbiased=1), "unbiased=1 must be true or false"),
        (lambda: ClassifierTest(neighbors=4), "neighbors=4 must be odd"),
        (lambda: ClassifierTest(classifier="networks"), "did you mean 'network'"),
        (lambda: Memorization(quantile=1.0), "quantile=1.0 is out of range"),
        (lambda: GridKL(smoothing=0.0), "smoothing=0.0 is out of range"),
        (lambda: Wasserstein(points=1), "points=1 is out of range"),
        (lambda: Memorization()(replace(planar_sets(), held_out=None)), "was not trained on and got none"),
        (lambda: GridKL()(Sets(torch.zeros(5, 3), torch.zeros(5, 3))), "points in the plane and got 3 dimensions"),
        (lambda: Wasserstein()(Sets(torch.zeros(5, 3), torch.zeros(5, 3))), "points in the plane and got 3"),
        (lambda: EnergyDistance()(Sets(torch.zeros(1, 2), torch.zeros(5, 2))), "at least 2 generated examples"),
        (lambda: SlicedWasserstein()(Sets(torch.zeros(4, 2), torch.zeros(5, 3))), "of 2 and of 3 dimensions"),
        (lambda: Memorization()(Sets(torch.zeros(4, 2), torch.zeros(5, 2), torch.zeros(5, 3))), "held-out"),
    ],
)
def test_mistakes_are_told_in_a_sentence(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)
    assert "\n" not in str(error.value)
