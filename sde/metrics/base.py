r"""What a metric is: numbers made of sets of feature vectors, each with an uncertainty.

A metric compares generated examples with data, both as vectors: the features that an extractor finds in them, or the
examples themselves. It gives one number or several (precision and recall), each under a name of its own.

How much a number would change with other samples is told by the delete-a-group jackknife: the examples are cut into G
groups, the metric is computed G times with one group of each set left out, and

    error^2 = (G - 1) / G  sum_g (theta_g - mean theta)^2.

(A bootstrap repeats examples, which distances between nearest neighbors and estimates of covariances take for
structure.) Groups are every G-th example, so the law of each is that of the whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sde.errors import UserError
from sde.metrics.rows import Rows
from sde.registry import Registry

METRICS: Registry[Metric] = Registry("metrics")
register = METRICS.register
_BLOCK = 2048  # vectors that are made at a time to be checked


@dataclass(frozen=True)
class Sets:
    """What a metric is computed from.

    Args:
        generated: features of generated examples, (n, D).
        reference: features of the data that they are held against, (m, D): the training examples, unless told
            otherwise.
        held_out: features of data that the model was not trained on, (k, D), or None.
        probabilities: of the classes of each generated example, (n, C), by a classifier; or None.
        seed: of everything that a metric draws.
        training: all training examples, for metrics that look for copies, (N, D); None for the reference.
    """

    generated: Tensor
    reference: Tensor
    held_out: Tensor | None = None
    probabilities: Tensor | None = None
    seed: int = 0
    training: Rows | None = None

    def without(self, group: int, groups: int) -> Sets:
        """The sets without every `groups`-th example, from number `group` on."""

        def rest(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[torch.arange(len(x), device=x.device) % groups != group]

        generated, reference, training = rest(self.generated), rest(self.reference), self.training
        assert generated is not None
        assert reference is not None
        return replace(
            self,
            generated=generated,
            reference=reference,
            held_out=rest(self.held_out),
            probabilities=rest(self.probabilities),
            training=None if training is None else training[torch.arange(len(training)) % groups != group],
        )


class Metric(ABC):
    """A metric; leaves are frozen dataclasses of its options.

    Attributes:
        better: for each of the names of its numbers, "lower" or "higher", or a number that is best.
        labels: for each of the names, what it is called in a table ("FID").
        of: what it is computed from: "features" of an extractor, class "probabilities", or the "examples" themselves.
        needs_held_out: whether it needs data that the model was not trained on.
        planar: whether it is for points in the plane alone.
    """

    better: ClassVar[dict[str, str | float]]
    labels: ClassVar[dict[str, str]]
    of: ClassVar[str] = "features"
    needs_held_out: ClassVar[bool] = False
    planar: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, sets: Sets) -> dict[str, float]:
        """The numbers, by their names.

        Raises:
            UserError: when the sets are too small, or do not fit together.
        """

    def used(self, sets: Sets) -> tuple[int, int]:
        """How many generated and how many other examples the numbers are of; leaves that draw some override it."""
        return len(sets.generated), len(sets.reference if sets.training is None else sets.training)

    def leave_out(self, sets: Sets, groups: int) -> list[dict[str, float]]:
        """The numbers without each of `groups` groups of examples; leaves that have a faster way override it."""
        return [self(sets.without(group, groups)) for group in range(groups)]

    def errors(self, sets: Sets, groups: int = 10) -> dict[str, float]:
        """Standard errors of the numbers, by the jackknife over `groups` groups."""
        found = self.leave_out(sets, groups)
        return {name: jackknife_error([each[name] for each in found]) for name in found[0]}


def jackknife_error(values: list[float]) -> float:
    """The standard error that the values without each group tell."""
    mean = sum(values) / len(values)
    return math.sqrt((len(values) - 1) / len(values) * sum((value - mean) ** 2 for value in values))


def check_sets(sets: Sets, name: str, least: int) -> None:
    """Raise `UserError` unless both sets have at least `least` finite examples of the same number of dimensions."""
    for what, x in (("generated", sets.generated), ("reference", sets.reference)):
        check_vectors(x, what, name, least)
    if sets.generated.shape[1] != sets.reference.shape[1]:
        raise UserError(
            f"{name} compares vectors of {sets.generated.shape[1]} and of {sets.reference.shape[1]} dimensions: they "
            "have to come from the same extractor"
        )


def check_vectors(x: Tensor | Rows, what: str, name: str, least: int) -> None:
    """Raise `UserError` unless x, which holds `what`, has at least `least` finite vectors."""
    if x.ndim != 2 or len(x) < least:
        raise UserError(
            f"{name} needs at least {least} {what} examples as vectors and got {tuple(x.shape)}: take more of them"
        )
    if not all(bool(torch.isfinite(part).all()) for part in (x.blocks(_BLOCK) if isinstance(x, Rows) else [x])):
        raise UserError(f"{name}: some of the {what} features are not finite: look at the examples, or take more steps")
