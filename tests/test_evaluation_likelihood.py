"""Likelihoods of training and held-out examples, against densities that are known."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from sde.data import DATASETS, Dataset, Order
from sde.denoiser import Denoiser, GaussianMixtureDenoiser
from sde.density.likelihood import check_arithmetic, suitable_dequantization
from sde.errors import UserError
from sde.evaluation.likelihood import TrainAndTest, likelihood_numbers, likelihood_of, likelihood_rows, likelihood_way
from sde.interop.chains import SMLDChain
from sde.processes import VE, VP
from tests.small_models import build

CPU = torch.device("cpu")
F64 = torch.float64
SOLVING = 2e-4  # nats: the largest error per dimension at the default tolerance is 1e-4 (docs/likelihood.md), here of 2


def gaussians(**options: Any) -> Dataset:
    return DATASETS.get("gaussians")(**{"train_size": 150, "test_size": 90, **options})


def exact(dataset: Dataset) -> GaussianMixtureDenoiser:
    """Of the law that the data are drawn from."""
    mixture = dataset.mixture  # type: ignore[attr-defined]
    variance = torch.tensor(mixture.std**2, dtype=F64)
    return GaussianMixtureDenoiser(VP(), mixture.weights, mixture.means, variance)


def smoothed_copies(dataset: Dataset, std: float) -> GaussianMixtureDenoiser:
    """Of the training examples, each a Gaussian: a model that has memorized them."""
    means = dataset.split("train").values.double()
    weights = torch.ones(len(means), dtype=F64)
    return GaussianMixtureDenoiser(VP(), weights, means, torch.tensor(std**2, dtype=F64))


def compared(model: GaussianMixtureDenoiser, dataset: Dataset, told: list[float] | None = None, **options: Any) -> Any:
    chosen = {"labeled": False, "examples": 40, "seed": 3, "batch_size": 100, "device": CPU} | options
    way = likelihood_of(model, dataset.info, dequantized=False)
    found = TrainAndTest(dataset, **chosen)(way, lambda share: None if told is None else told.append(share))
    assert found is not None
    return found


@pytest.mark.parametrize("std", [0.0, 0.03])
def test_known_densities(std: float) -> None:
    """Of the data's own law, and of a model that knows the training examples: means, errors and gap."""
    dataset = gaussians(train_size=40)
    model = smoothed_copies(dataset, std) if std else exact(dataset)
    found = compared(model, dataset)
    known = {}
    for split in ("train", "test"):
        values = dataset.split(split).values
        x = values[Order(len(values), 40, 3)(0)].double()
        known[split] = model.log_prob(x, VP().t_min)
        mean, error = float(known[split].mean()), float(known[split].std()) / math.sqrt(40)
        assert found[split]["log_prob"] == pytest.approx(mean, abs=SOLVING)
        assert found[split]["log_prob_standard_error"] == pytest.approx(error, abs=SOLVING)
        assert found[split]["bits_per_dim"] == pytest.approx(-mean / (2 * math.log(2)), abs=SOLVING)
        assert (found[split]["n"], found[split]["split_size"]) == (40, len(values))
        assert found[split]["standard_error_of_trace"] == 0
    gap, variances = found["gap"], [each.var() / 40 for each in known.values()]
    difference = float(known["train"].mean() - known["test"].mean())
    assert gap["log_prob"] == pytest.approx(difference, abs=2 * SOLVING)
    assert gap["log_prob_standard_error"] == pytest.approx(math.sqrt(sum(variances)), abs=SOLVING)
    assert gap["bits_per_dim"] == pytest.approx(difference / (2 * math.log(2)), abs=2 * SOLVING)
    assert gap["standard_error"] == pytest.approx(gap["log_prob_standard_error"] / (2 * math.log(2)))
    if std:
        assert gap["bits_per_dim"] > 4 * gap["standard_error"], "it has memorized"
    else:
        assert abs(gap["bits_per_dim"]) < 4 * gap["standard_error"]


def test_the_entropy_of_the_law() -> None:
    """Modes that do not touch: -E log p = log K + 1 + log 2 pi v in the plane, v with the noise at t_min."""
    sde, dataset = VP(), gaussians(modes=4)
    variance = float(sde.alpha(sde.t_min)) ** 2 * 0.05**2 + float(sde.sigma(sde.t_min)) ** 2
    entropy = math.log(4) + 1 + math.log(2 * math.pi * variance)
    found = compared(exact(dataset), dataset, examples=90)
    for split in ("train", "test"):
        assert abs(-found[split]["log_prob"] - entropy) < 4 * found[split]["log_prob_standard_error"]
        # -log p is entropy - 1 + |z|^2 / 2, whose variance is 1
        assert found[split]["log_prob_standard_error"] == pytest.approx(1 / math.sqrt(90), rel=0.4)


def test_no_number_depends_on_the_batch_size_and_progress_reaches_one() -> None:
    dataset, told = gaussians(), list[float]()
    model = exact(dataset)
    whole = compared(model, dataset, told, examples=9, batch_size=64)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
    parts = compared(model, dataset, examples=9, batch_size=4)
    for split in ("train", "test", "gap"):
        for name in ("bits_per_dim", "standard_error", "log_prob"):
            assert parts[split][name] == pytest.approx(whole[split][name], rel=1e-9, abs=1e-12)
    assert compared(model, dataset, examples=9, seed=4)["train"]["log_prob"] != whole["train"]["log_prob"]


def test_fewer_are_held_out_than_asked_for() -> None:
    dataset, told = gaussians(test_size=12), list[float]()
    found = compared(exact(dataset), dataset, told)
    assert (found["train"]["n"], found["test"]["n"]) == (40, 12)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)


def test_what_is_told() -> None:
    dataset = gaussians()
    found = json.loads(json.dumps(compared(exact(dataset), dataset, examples=20), allow_nan=False))
    rows = likelihood_rows(found)
    assert [next(iter(row.values())) for row in rows] == ["nats, train", "nats, test", "gap, test - train"]
    assert rows[0]["value"].startswith(f"{-found['train']['log_prob']:.1f}")
    assert rows[1]["examples"] == "20 of 90"
    words = likelihood_way(found)
    for part in (
        "ode, dequantization none; 1 draw",
        "solver adams_adaptive (rtol 1e-05, atol 1e-05",
        "divergence exact",
        "20 of split=train and 20 of split=test, chosen by seed 3",
    ):
        assert part in words, words
    numbers, notes = likelihood_numbers(found)
    assert numbers["evaluation/likelihood/gap/bits_per_dim"] == found["gap"]["bits_per_dim"]
    assert numbers["evaluation/likelihood/test/n"] == 20
    assert numbers["evaluation/likelihood/train/nfe"] == found["train"]["nfe"] > 10
    assert notes == {"evaluation/likelihood/kind": "ode-none", "evaluation/likelihood/way": words}


def test_a_number_that_is_not_finite_is_told() -> None:
    dataset = gaussians()
    found = compared(exact(dataset), dataset, examples=4)
    found["gap"] |= {"bits_per_dim": None, "log_prob": None}
    assert likelihood_rows(found)[2]["value"] == "not finite"
    assert "evaluation/likelihood/gap/bits_per_dim" not in likelihood_numbers(found)[0]


def test_what_has_no_likelihood() -> None:
    assert [suitable_dequantization(*each) for each in (("vectors", True), ("pixels", True), ("pixels", False))] == [
        *("none", "uniform", "decoder")
    ]
    dataset = gaussians(test_size=1)
    with pytest.raises(UserError, match="split=test of gaussians has 1 examples: leave it out"):
        TrainAndTest(dataset, False, 4, 0, 4, CPU)
    discrete = Denoiser(build("ncsn"), VE(), SMLDChain())
    with pytest.raises(UserError, match="this network knows discrete ones alone: leave it out"):
        likelihood_of(discrete, dataset.info, dequantized=False)
    for precision, compiled in (("bf16", False), ("tf32", False), ("fp32", "graphs")):
        with pytest.raises(UserError, match="take"):
            check_arithmetic(precision, compiled)
    check_arithmetic("fp32", "auto")
