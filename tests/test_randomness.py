"""Sample k of seed s is the same numbers wherever it is drawn, and they are normal and independent."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from sde.errors import UserError
from sde.randomness import BatchNoise, RecordedNoise, SampleNoise, sample_seed, step_seed
from tests.problems import F64, generator, normal

# from 4096 samples a group to one; (15,) and (17,) because PyTorch's CPU code draws 16 numbers at a time
SHAPES = [(), (1,), (3,), (15,), (17,), (2, 5), (3, 8, 8), (1, 28, 28), (40, 40), (3, 32, 32), (70, 70)]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sample_does_not_depend_on_its_batch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    order = torch.randperm(64, generator=generator(0)).tolist()
    whole = SampleNoise(5, range(64), shape, dtype=dtype)
    parts = {
        "shuffled": order,
        "seven": range(10, 17),
        "as a list": list(range(10, 17)),
        "strided": range(3, 60, 5),
        "backwards": range(40, 2, -1),
        "single": [13],
        "twice": [7, 7, 9],
        "none": [],
    }
    noises = {name: SampleNoise(5, rows, shape, dtype=dtype) for name, rows in parts.items()}
    for _ in range(4):
        a = whole()
        assert a.shape == (64, *shape)
        assert a.dtype == dtype
        for name, rows in parts.items():
            b = noises[name]()
            assert b.is_contiguous()
            assert torch.equal(a[list(rows)], b), name


@pytest.mark.parametrize("shape", [(1,), (300,)], ids=str)
def test_a_sample_does_not_depend_on_the_edges_of_its_batch(shape: tuple[int, ...]) -> None:
    # batches that begin and end anywhere, across several groups
    n = 10_000 if shape == (1,) else 100
    whole = SampleNoise(5, range(n), shape)
    ends = [0, 1, n // 3, n // 2 + 1, n - 1, n]
    parts = [SampleNoise(5, range(low, high), shape) for low, high in pairwise(ends)]
    for _ in range(3):
        assert torch.equal(whole(), torch.cat([part() for part in parts]))


def test_a_draw_stays_what_it_was() -> None:
    # a solver may hold a draw, or write into it, while others are made
    for indices in (range(2), range(5, 7), [3, 1]):
        noise, again = SampleNoise(1, indices, (9,)), SampleNoise(1, indices, (9,))
        held = [noise() for _ in range(20)]
        for draw in held:
            fresh = again()
            assert torch.equal(draw, fresh)
            fresh.zero_()


def test_a_draw_that_is_lent_is_the_same_and_goes_with_the_next() -> None:
    given, lent = (SampleNoise(3, [5, 6, 2], (2,)) for _ in range(2))
    assert torch.equal(given(), lent.lend())
    kept = lent.lend()
    second = given()
    assert torch.equal(second, kept)
    # consecutive samples are lent as they lie in the room that is filled again
    consecutive = SampleNoise(3, range(4), (2,))
    first = consecutive.lend()
    before = first.clone()
    consecutive.lend()
    assert not torch.equal(first, before)


def test_the_interval_changes_nothing() -> None:
    noise, again = SampleNoise(1, range(3), (4,)), SampleNoise(1, range(3), (4,))
    assert torch.equal(noise(0.7, 0.4), again())
    like = torch.empty(3, 4)
    assert torch.equal(BatchNoise(like, generator(2))(0.7, 0.4), BatchNoise(like, generator(2))())
    assert RecordedNoise([like])(0.7, 0.4) is like


def test_seeds_and_samples_differ() -> None:
    a, b, c = SampleNoise(0, [0, 1], (50,)), SampleNoise(1, [0, 1], (50,)), SampleNoise(0, [1, 2], (50,))
    x, y, z = a(), b(), c()
    assert torch.equal(x[1], z[0])
    rows = torch.stack([x[0], x[1], y[0], y[1], z[1]])
    for i in range(5):
        for j in range(i):
            assert (rows[i] - rows[j]).abs().min() > 0


@pytest.mark.parametrize("seeds", ["indices", "seeds"])
def test_draws_are_normal_and_uncorrelated(seeds: str) -> None:
    """Across neighboring samples of one seed, or across neighboring seeds of one sample: five standard errors each."""
    n, d = 4000, 32
    if seeds == "indices":
        x = SampleNoise(3, range(n), (d,), dtype=F64)()
    else:
        x = torch.cat([SampleNoise(s, [0], (d,), dtype=F64)() for s in range(n)])
    count = x.numel()
    # moments of a standard normal have variances 1, 2, 15, 96 and 105 - 9
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(float((x**power).mean()) - moment) < 5 * math.sqrt(variance / count)
    # Kolmogorov's distance: sqrt(n) D exceeds 2.5 with probability 2 exp(-12.5) = 7e-6
    ordered = torch.special.ndtr(x.flatten().sort().values)
    distance = (ordered - (torch.arange(count, dtype=F64) + 0.5) / count).abs().max() + 0.5 / count
    assert float(distance) * math.sqrt(count) < 2.5
    # entries of one sample, and one entry of samples 1, 2 and 7 apart; 496 pairs at once need 6 standard errors
    between = (x.T @ x / n).triu(1).abs().max()
    assert float(between) < 6 / math.sqrt(n)
    for lag in (1, 2, 7):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 5 / math.sqrt(count)


def test_draws_of_one_sample_are_uncorrelated_in_time() -> None:
    noise = SampleNoise(3, range(20), (8,), dtype=F64)
    x = torch.stack([noise() for _ in range(1000)])
    for lag in (1, 2, 3):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 5 / math.sqrt(x[lag:].numel())


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345])
def test_no_two_generators_share_the_low_bits(seed: int) -> None:
    # PyTorch's CPU generator keeps 32 bits of a seed
    low = np.fromiter((sample_seed(seed, k) & 0xFFFFFFFF for k in range(200_000 if seed == 0 else 2000)), np.uint64)
    assert len(np.unique(low)) == len(low)


def test_pytorch_keeps_only_the_low_bits_and_the_package_knows() -> None:
    # should this ever fail, PyTorch keeps more of the seed and sample_seed may be simplified
    a, b = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7 + (1 << 32))
    assert torch.equal(torch.randn(5, generator=a), torch.randn(5, generator=b))
    for k in (0, 1, 2**32 - 1):
        assert 0 <= sample_seed(2**63 - 1, k) < 2**64
        torch.Generator().manual_seed(sample_seed(2**63 - 1, k))


def test_seeds_have_no_pattern() -> None:
    # each of the 64 bits is set in half of the seeds of neighboring samples: binomial, six standard errors for 64 bits
    n = 20_000
    values = np.array([sample_seed(9, k) for k in range(n)], dtype=np.uint64)
    share = np.array([((values >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)])
    assert np.abs(share - 0.5).max() < 6 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("index", [-1, 2**32])
def test_indices_out_of_range(index: int) -> None:
    for refuses in (
        lambda: sample_seed(0, index),
        lambda: SampleNoise(0, [5, index], (2,)),
        lambda: SampleNoise(0, range(index, index + 2), (2,)),
        lambda: SampleNoise(0, range(index + 4, index - 1, -2), (2,)),
    ):
        with pytest.raises(UserError, match=r"sample index -?\d+ is out of range"):
            refuses()


@pytest.mark.parametrize("indices", [[0.0, 1.0], [[0, 1]], ["a"], [None]])
def test_indices_that_are_no_numbers(indices: list[object]) -> None:
    with pytest.raises(UserError, match="whole numbers"):
        SampleNoise(0, indices, (2,))


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.0, "0"])
def test_seeds_out_of_range(seed: object) -> None:
    for refuses in (lambda: sample_seed(seed, 0), lambda: step_seed(seed, 0, "noise")):
        with pytest.raises(UserError, match="seed="):
            refuses()


def test_step_seeds_are_functions_of_all_three() -> None:
    seeds = {step_seed(s, k, p) for s in range(5) for k in range(200) for p in ("noise", "dropout", "times")}
    assert len(seeds) == 5 * 200 * 3
    assert step_seed(3, 4, "noise") == step_seed(3, 4, "noise")
    assert len({value & 0xFFFFFFFF for value in seeds}) == len(seeds)  # 3000 of 2^32: a collision has odds of 1e-3


def test_batch_noise_is_its_generator() -> None:
    like = torch.empty(3, 4, dtype=F64)
    noise = BatchNoise(like, generator(8))
    reference = generator(8)
    for _ in range(3):
        assert torch.equal(noise(), torch.empty_like(like).normal_(generator=reference))


def test_recorded_noise_replays_and_runs_out() -> None:
    draws = [normal(2, 3, seed=k) for k in range(3)]
    noise = RecordedNoise(iter(draws))
    for k, draw in enumerate(draws):
        assert noise() is draw
        assert noise.used == k + 1
    with pytest.raises(UserError, match="3 draws"):
        noise()
    assert noise.used == 3
