"""Fréchet distance to a Gaussian that others have published: a mean and a covariance, of unknown examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.errors import UserError
from sde.evaluation.reference import Statistics
from sde.metrics import Metric, Sets
from sde.metrics.frechet import Gaussian, Moments


@dataclass(frozen=True, eq=False)
class ToGaussian(Metric):
    """FD of features to a Gaussian; the reference of the sets is not looked at.

    Errors are by the jackknife over the generated examples alone: those of the Gaussian cannot be known.

    Args:
        gaussian: the other one.
        unbiased: the covariance of the features is over n - 1.
    """

    better: ClassVar[dict[str, str | float]] = {"fd": "lower"}
    labels: ClassVar[dict[str, str]] = {"fd": "FD"}

    gaussian: Gaussian
    unbiased: bool = True

    @classmethod
    def from_statistics(cls, statistics: Statistics, unbiased: bool) -> ToGaussian:
        """FD to the mean and covariance of a file."""
        moments = Moments.from_covariance(2, statistics.mean, statistics.covariance)
        return cls(Gaussian.of_moments(moments, True), unbiased)

    def __call__(self, sets: Sets) -> dict[str, float]:
        x = sets.generated
        if len(x) < 2 or not bool(torch.isfinite(x).all()):
            raise UserError(f"fd needs at least 2 examples with finite features and got {len(x)}: look at the samples")
        return {"fd": self._distance(Gaussian.of(x, self.unbiased))}

    def both(self, sets: Sets, groups: int) -> tuple[dict[str, float], list[dict[str, float]]]:
        return self(sets), [{"fd": self._distance(gaussian)} for gaussian in self._without(sets.generated, groups)]

    def _without(self, x: Tensor, groups: int) -> list[Gaussian]:
        """The Gaussians of x without each group."""
        if len(x) - -(-len(x) // groups) <= x.shape[1]:
            numbers = torch.arange(len(x)) % groups
            return [Gaussian.of(x[numbers != group], self.unbiased) for group in range(groups)]
        whole = Moments.of(x)
        rest = (whole.without(Moments.of(x[group::groups])) for group in range(groups))
        return [Gaussian.of_moments(moments, self.unbiased) for moments in rest]

    def _distance(self, ours: Gaussian) -> float:
        return ours.distance(self.gaussian)
