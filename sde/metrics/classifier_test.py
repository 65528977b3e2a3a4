r"""Classifier two-sample test: can a classifier tell generated examples from data? (arXiv 1610.06545)

As many examples of either kind are labeled; whoever cannot tell them apart is right about half of the time. The
accuracy on examples that the classifier has not seen is the metric, and the p-value is the probability of one at least
as high if both had the same law. There are two classifiers.

    neighbors   the majority among the k nearest other examples (leave-one-out). Its guesses depend on each other: two
                examples that are each other's nearest are right or wrong together. Their sum is therefore not binomial
                (for k = 1 in the plane its variance is 1.6 times as large), and the p-value is that of permutations
                of the labels, for which the neighbors stay what they are. k = 1 is the 1-NN accuracy of arXiv
                1806.07755; below 0.5 it tells of generated examples that lie next to data as copies do.
    network     one hidden layer (logistic regression with hidden=0), trained on one half of the examples and asked
                about the other, about which it is right a binomial number of times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from sde.errors import UserError, check_choice, check_number
from sde.metrics.base import Metric, Sets, check_sets, register
from sde.metrics.distances import nearest, shuffled

BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 3e-3, 1e-2  # of AdamW


def neighbor_guesses(neighbors: Tensor, labels: Tensor) -> Tensor:
    """What the majority of `neighbors` (n, k), k odd, is labeled; boolean (n,), or (..., n) for labels (..., n)."""
    votes = labels[..., neighbors].sum(-1)
    return 2 * votes > neighbors.shape[1]


def permutation_p(neighbors: Tensor, labels: Tensor, permutations: int, seed: int) -> float:
    """The share of labelings, the given one among them, for which at least as many guesses are right."""
    generator = torch.Generator().manual_seed(seed)
    right = int((neighbor_guesses(neighbors, labels) == labels).sum())
    as_good = 1
    for _ in range(permutations):
        other = labels[torch.randperm(len(labels), generator=generator)]
        as_good += int((neighbor_guesses(neighbors, other) == other).sum()) >= right
    return as_good / (1 + permutations)


def vote_error(neighbors: Tensor, right: Tensor) -> float:
    """The standard error of the share of right votes, some of which depend on each other.

    Guesses i and j are taken for dependent where one of them is among the neighbors (n, k) of the other:

        error^2 = 1/n^2 sum over such (i, j), and over i = j, of  e_i e_j,    e_i = right_i - mean right.
    """
    e = right.double() - right.double().mean()
    products = e[:, None] * e[neighbors]  # of i and each of its neighbors
    mutual = (neighbors[neighbors] == torch.arange(len(e))[:, None, None]).any(-1)  # counted from either end
    total = e.square().sum() + 2 * products.sum() - products[mutual].sum()
    return float(total.clamp_min(0).sqrt()) / len(e)


def fit(x: Tensor, labels: Tensor, hidden: int, steps: int, seed: int) -> Callable[[Tensor], Tensor]:
    """A network of one hidden layer, or none, that tells the labels of x (n, D).

    Returns:
        A function of examples (m, D) that gives what it takes their labels for, boolean (m,).
    """
    generator = torch.Generator().manual_seed(seed)
    mean, std = x.double().mean(0), x.double().std(0)
    std[std == 0] = 1.0

    def standard(x: Tensor) -> Tensor:
        return ((x.double() - mean) / std).float()

    widths = [x.shape[1], hidden, 1] if hidden else [x.shape[1], 1]
    weights = [torch.randn(b, a, generator=generator) * (2 / a) ** 0.5 for a, b in pairwise(widths)]
    weights[-1].zero_()
    biases = [torch.zeros(len(weight)) for weight in weights]
    for parameter in (*weights, *biases):
        parameter.requires_grad_()

    def logits(h: Tensor) -> Tensor:
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            h = F.linear(F.relu(h) if layer else h, weight, bias)
        return h[:, 0]

    inputs, targets = standard(x), labels.float()
    optimizer = torch.optim.AdamW([*weights, *biases], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits(inputs[batch]), targets[batch]).backward()
        optimizer.step()

    @torch.no_grad()
    def guess(x: Tensor) -> Tensor:
        return torch.cat([logits(standard(part)) > 0 for part in x.split(4096)])

    return guess


@register("c2st")
@dataclass(frozen=True)
class ClassifierTest(Metric):
    """The accuracy of a classifier that tells generated examples from data, and its p-value (arXiv 1610.06545).

    The standard error of the accuracy is that of its mean over the examples that the classifier was asked about:
    binomial for a network, and with the dependence between guesses for neighbors, where groups of examples cannot be
    left out to learn it (other neighbors would vote: half too much). The p-value has none.

    Args:
        classifier: "neighbors", those nearest, leave-one-out; or "network", trained on half of the examples.
        neighbors: k of the neighbors that vote; odd.
        hidden: width of the network's hidden layer; 0 for logistic regression.
        steps: of the network's training, with 128 examples each.
        examples: at most as many of either kind, drawn by the seed.
        permutations: of the labels for the p-value of "neighbors", which is therefore at least 1 / (1 + permutations).

    Raises:
        UserError: an option is out of range.
    """

    better: ClassVar[dict[str, str | float]] = {"c2st": 0.5, "c2st_p": ""}
    labels: ClassVar[dict[str, str]] = {"c2st": "C2ST", "c2st_p": "C2ST p"}
    of: ClassVar[str] = "examples"
    cap: ClassVar[str] = "examples"

    classifier: str = "neighbors"
    neighbors: int = 1
    hidden: int = 64
    steps: int = 1000
    examples: int = 5000
    permutations: int = 999

    def __post_init__(self) -> None:
        check_choice("classifier", self.classifier, ["neighbors", "network"])
        check_number("neighbors", self.neighbors, at_least=1)
        if self.neighbors % 2 == 0:
            raise UserError(f"neighbors={self.neighbors} must be odd, or votes end in a draw: take one more or less")
        check_number("hidden", self.hidden, at_least=0)
        check_number("steps", self.steps, at_least=1)
        check_number("examples", self.examples, at_least=4)
        check_number("permutations", self.permutations, at_least=1)

    def counts(self, n: int, m: int) -> tuple[int, int]:
        return min(n, m, self.examples), min(n, m, self.examples)

    def least(self, groups: int = 0, dimensions: int = 1) -> tuple[int, int]:
        return max(4, self.neighbors), max(4, self.neighbors)  # no groups are left out

    def _pooled(self, sets: Sets) -> tuple[Tensor, Tensor]:
        """As many examples of either kind, alternating, (N, D), and which of them are generated, (N,)."""
        check_sets(sets, "c2st", self.least()[0])
        n, _ = self.used(sets)
        x, y = (z[shuffled(len(z), sets.seed, n)] for z in (sets.generated, sets.reference))
        return torch.stack([x, y], dim=1).flatten(0, 1), torch.arange(2 * n) % 2 == 0

    def _measure(self, sets: Sets) -> tuple[float, float, float]:
        """The accuracy, its p-value and its standard error."""
        x, labels = self._pooled(sets)
        if self.classifier == "neighbors":
            _, neighbors = nearest(x, x, self.neighbors, same=True)
            right = neighbor_guesses(neighbors, labels) == labels
            p = permutation_p(neighbors, labels, self.permutations, sets.seed)
            return float(right.double().mean()), p, vote_error(neighbors, right)
        half = len(x) // 4 * 2
        guess = fit(x[:half], labels[:half], self.hidden, self.steps, sets.seed)
        right = guess(x[half:]) == labels[half:]
        accuracy = float(right.double().mean())
        p = float(scipy.stats.binom.sf(int(right.sum()) - 1, len(right), 0.5))
        return accuracy, p, math.sqrt(accuracy * (1 - accuracy) / len(right))

    def __call__(self, sets: Sets) -> dict[str, float]:
        accuracy, p, _ = self._measure(sets)
        return {"c2st": accuracy, "c2st_p": p}

    def with_errors(self, sets: Sets, groups: int = 10) -> tuple[dict[str, float], dict[str, float]]:
        """The numbers and their standard errors; of no groups."""
        accuracy, p, error = self._measure(sets)
        return {"c2st": accuracy, "c2st_p": p}, {"c2st": error, "c2st_p": 0.0}

    def error_from(self, sets: Sets, groups: int = 10) -> str:
        return "votes that depend on each other" if self.classifier == "neighbors" else "binomial law of the answers"
