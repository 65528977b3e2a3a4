r"""Memorization: do generated examples lie closer to the training data than they should?

The measure of "should" is data that the model was not trained on. With d_T(x) the distance from x to its nearest
training example and d_H(x) that to its nearest held-out example, among as many of either,

    closer   the share of generated x with d_T(x) < d_H(x); one half if the model knows no more of the one than of the
             other
    ratio    the median of d_T(x) / d_H(x)

and with d_T to the nearest of all training examples,

    copies   the share of generated x with d_T(x) at most the q-quantile of d_T over the held-out data: about q if
             generated examples lie as close to the training data as new data do
    C_T      (arXiv 2004.05675, with one cell) the Mann-Whitney statistic of d_T over generated examples against d_T
             over held-out data, standardized: N(0, 1) for examples of the law of the data, and far below zero where
             they are closer. Far above zero they are farther from the data than data are, as noisy examples are. It
             grows with the root of the numbers of examples: compare it at equal ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from sde.errors import UserError, check_number
from sde.metrics.base import Metric, Sets, check_sets, check_vectors, register
from sde.metrics.distances import nearest, shuffled
from sde.metrics.rows import Rows


def closest_pairs(generated: Tensor, reference: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The generated examples (n, D) that lie closest to one of the reference (m, D).

    Returns:
        Of the `count` (n, if there are fewer) closest, increasing: the distances (float64), the row numbers among
        generated ones, of which each appears once, and those of the nearest reference examples.
    """
    distances, index = nearest(generated, reference)
    order = distances[:, 0].argsort(stable=True)[:count]
    return distances[order, 0], order, index[order, 0]


def mann_whitney(x: np.ndarray, y: np.ndarray) -> float:
    """(U - n m / 2) / sqrt(n m (n + m + 1) / 12) with U the number of pairs with x > y, ties counting half."""
    n, m = len(x), len(y)
    u = scipy.stats.rankdata(np.concatenate([x, y]))[:n].sum() - n * (n + 1) / 2
    return float((u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12))


@dataclass(frozen=True)
class _Found:
    """Distances to the nearest example of each of G groups, so that any group can be left out, (n, G) each.

    Args:
        chosen: from generated to training examples, as many of these as there are held-out ones.
        training: from generated to all training examples.
        held_out: from generated to held-out examples.
        fresh: from held-out to all training examples.
    """

    chosen: np.ndarray
    training: np.ndarray
    held_out: np.ndarray
    fresh: np.ndarray

    def without(self, group: int | None) -> list[np.ndarray]:
        """The four distances, (n,), without a group of every set, or with all."""

        def least(x: np.ndarray) -> np.ndarray:
            if group is None:
                return x.min(axis=1)
            return np.delete(x, group, axis=1)[np.arange(len(x)) % x.shape[1] != group].min(axis=1)

        return [least(x) for x in (self.chosen, self.training, self.held_out, self.fresh)]


def _by_group(x: Tensor, y: Tensor | Rows, groups: int) -> np.ndarray:
    """Distances from x (n, D) to the nearest of each group of y (m, D), (n, groups); infinite to an empty one."""
    parts = [y[group::groups] for group in range(groups)]
    columns = [nearest(x, part)[0][:, 0] if len(part) else torch.full((len(x),), torch.inf) for part in parts]
    return torch.stack([column.double().cpu() for column in columns], dim=1).numpy()


@register("memorization")
@dataclass(frozen=True)
class Memorization(Metric):
    """Whether generated examples are closer to the training data than to held-out data.

    Distances are Euclidean. `Sets.training` are the training data, of which a tile is in memory at a time, or the
    reference where there are none; where there are more of these than of held-out
    data, or fewer, what is compared in equal numbers is drawn by the seed.

    Args:
        quantile: q of the held-out data's distances to the training data, up to which a generated example is a copy.
        examples: at most as many generated ones, drawn by the seed; the work grows with them times the training data.

    Raises:
        UserError: an option is out of range.
    """

    better: ClassVar[dict[str, str | float]] = {
        "memorization": 0.5,
        "memorization_ratio": 1.0,
        "memorization_copies": "lower",
        "memorization_ct": 0.0,
    }
    labels: ClassVar[dict[str, str]] = {
        "memorization": "closer to training",
        "memorization_ratio": "distance ratio",
        "memorization_copies": "copies",
        "memorization_ct": "C_T",
    }
    of: ClassVar[str] = "examples"
    cap: ClassVar[str] = "examples"
    needs_held_out: ClassVar[bool] = True

    quantile: float = 0.01
    examples: int = 10_000

    def __post_init__(self) -> None:
        check_number("quantile", self.quantile, above=0, below=1)
        check_number("examples", self.examples, at_least=2)

    def counts(self, n: int, m: int) -> tuple[int, int]:
        return min(n, self.examples), m

    def _measure(self, sets: Sets, groups: int) -> _Found:
        data = sets.reference if sets.training is None else sets.training
        check_sets(sets, "memorization", 2)
        check_vectors(data, "training", "memorization", 2)
        if sets.held_out is None:
            raise UserError(
                "memorization needs data that the model was not trained on and got none: take a data set with a test "
                "split"
            )
        check_sets(Sets(sets.generated, sets.held_out), "memorization with held-out data as reference", 2)
        training = data[shuffled(len(data), sets.seed)]
        held_out = sets.held_out[shuffled(len(sets.held_out), sets.seed, len(training))]
        generated = sets.generated[shuffled(len(sets.generated), sets.seed, self.examples)]
        equal = len(held_out)
        chosen = _by_group(generated, training[:equal], groups)
        return _Found(
            chosen=chosen,
            training=np.minimum(chosen, _by_group(generated, training[equal:], groups)),
            held_out=_by_group(generated, held_out, groups),
            fresh=_by_group(held_out, training, groups),
        )

    def _numbers(self, found: _Found, group: int | None = None) -> dict[str, float]:
        chosen, training, held_out, fresh = found.without(group)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(chosen == held_out, 1.0, chosen / held_out)  # 0 / 0 is a copy of both
        return {
            "memorization": float(np.mean(chosen < held_out) + np.mean(chosen == held_out) / 2),
            "memorization_ratio": float(np.median(ratio)),
            "memorization_copies": float(np.mean(training <= np.quantile(fresh, self.quantile))),
            "memorization_ct": mann_whitney(training, fresh),
        }

    def __call__(self, sets: Sets) -> dict[str, float]:
        return self._numbers(self._measure(sets, 1))

    def both(self, sets: Sets, groups: int) -> tuple[dict[str, float], list[dict[str, float]]]:
        found = self._measure(sets, max(groups, 1))
        return self._numbers(found), [self._numbers(found, group) for group in range(groups)]
