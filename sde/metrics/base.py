r"""What a metric is: numbers made of sets of feature vectors, each with an uncertainty.

A metric compares generated examples with data, both as vectors: the features that an extractor finds in them, or the
examples themselves. It gives one number or several (precision and recall), each under a name of its own.

How much a number would change with other samples is told by the delete-a-group jackknife: the examples are cut into G
groups, the metric is computed G times with one group of each set left out, and

    error^2 = (G - 1) / G  sum_g (theta_g - mean theta)^2.

(A bootstrap repeats examples, which distances between nearest neighbors and estimates of covariances take for
structure.) Groups are every G-th example of the sets in the order of `Sets.shuffled`, so the law of each is that of the
whole.
"""

from __future__ import annotations

import itertools
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
        strata: class of each generated example, (n,), where these were drawn of given classes; or None.
    """

    generated: Tensor
    reference: Tensor
    held_out: Tensor | None = None
    probabilities: Tensor | None = None
    seed: int = 0
    training: Rows | None = None
    strata: Tensor | None = None

    def shuffled(self, groups: int = 1) -> Sets:
        """The sets in an order that the seed fixes.

        Groups of the jackknife are every G-th example. In samples of each class in turn they would be classes, and an
        error that of forgetting a class. So generated examples of given classes are dealt to the groups class by class:
        each has its share of every class, as every draw has. Otherwise, and within a group, the order is random.
        """
        draws = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.generated), generator=draws)
        if self.strata is not None:
            dealt = order[self.strata[order].argsort(stable=True)]
            for group in range(min(groups, len(dealt))):
                own = dealt[group::groups]
                order[group::groups] = own[torch.randperm(len(own), generator=draws)]
        rest = torch.randperm(len(self.reference), generator=torch.Generator().manual_seed(self.seed + 1))
        held_out = self.held_out
        if held_out is not None:
            held_out = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(self.seed + 2))]
        return replace(
            self,
            generated=self.generated[order],
            reference=self.reference[rest],
            held_out=held_out,
            probabilities=None if self.probabilities is None else self.probabilities[order],
            strata=None if self.strata is None else self.strata[order],
        )

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
            strata=rest(self.strata),
            training=None if training is None else training[torch.arange(len(training)) % groups != group],
        )


class Metric(ABC):
    """A metric; leaves are frozen dataclasses of its options.

    Attributes:
        better: for each of the names of its numbers, "lower" or "higher", or a number that is best; "" for numbers
            that are no measure of quality.
        labels: for each of the names, what it is called in a table ("FID").
        of: what it is computed from: "features" of an extractor, class "probabilities", or the "examples" themselves.
        needs_held_out: whether it needs data that the model was not trained on.
        planar: whether it is for points in the plane alone.
        cap: the option that bounds how many examples it draws, or "".
    """

    better: ClassVar[dict[str, str | float]]
    labels: ClassVar[dict[str, str]]
    of: ClassVar[str] = "features"
    needs_held_out: ClassVar[bool] = False
    planar: ClassVar[bool] = False
    cap: ClassVar[str] = ""

    @abstractmethod
    def __call__(self, sets: Sets) -> dict[str, float]:
        """The numbers, by their names.

        Raises:
            UserError: when the sets are too small, or do not fit together.
        """

    # How many examples

    @property
    def name(self) -> str:
        """What `metric=` calls it."""
        return next((name for name, kind in METRICS.items() if kind is type(self)), next(iter(self.labels)))

    def counts(self, n: int, m: int) -> tuple[int, int]:
        """How many of n generated and of m other examples the numbers are of; leaves that draw some override it."""
        return n, m

    def used(self, sets: Sets) -> tuple[int, int]:
        """How many generated and how many other examples the numbers of these sets are of."""
        return self.counts(*_sizes(sets))

    def least(self, groups: int = 0, dimensions: int = 1) -> tuple[int, int]:
        """How many generated and how many other examples are enough, without any of `groups` groups as well."""
        return fewest(2, groups), fewest(2, groups)

    def check_size(self, n: int, m: int, groups: int = 0, dimensions: int = 1, option: str = "n") -> None:
        """Check that there are enough examples, before any are drawn.

        Args:
            n: generated examples.
            m: examples of the data; 0 where something else takes their place.
            groups: of the jackknife; 0 if there is none.
            dimensions: of the vectors.
            option: that says how many are generated; "" if none does.

        Raises:
            UserError: they are too few, in one of the two sets or of those that the metric draws from them.
        """
        ours, theirs = self.least(groups, dimensions)
        jackknife = f" with groups={groups}" if groups else ""
        if n < ours:
            raise UserError(
                f"metric={self.name} needs at least {ours} generated examples{jackknife} and gets {n}: take "
                f"{f'{option}={ours} or more' if option else 'more of them'}"
            )
        if 0 < m < theirs:
            raise UserError(
                f"metric={self.name} needs at least {theirs} reference examples{jackknife} and gets {m}: take "
                "more of them, or another metric"
            )
        if self.cap and min(count for count in self.counts(n, m or n) if count) < max(ours, theirs):
            raise UserError(
                f"metric={self.name} needs at least {max(ours, theirs)} examples{jackknife} and draws "
                f"{getattr(self, self.cap)}: take {self.name}.{self.cap}={max(ours, theirs)} or more"
            )

    # Errors

    def both(self, sets: Sets, groups: int) -> tuple[dict[str, float], list[dict[str, float]]]:
        """The numbers, and those without each of `groups` groups of examples.

        Leaves for which all of them come from one pass over the examples override it.
        """
        return self(sets), [self(sets.without(group, groups)) for group in range(groups)]

    def leave_out(self, sets: Sets, groups: int) -> list[dict[str, float]]:
        """The numbers without each of `groups` groups of examples."""
        return self.both(sets, groups)[1]

    def groups_of(self, sets: Sets, groups: int) -> int:
        """The groups of the jackknife: `groups`, or where a set has fewer examples than that, as many as it has."""
        held_out = [len(sets.held_out)] if self.needs_held_out and sets.held_out is not None else []
        return min([groups, *(count for count in (*self.used(sets), *held_out) if count)])

    def with_errors(self, sets: Sets, groups: int = 10) -> tuple[dict[str, float], dict[str, float]]:
        """The numbers, and their standard errors by the jackknife over at most `groups` groups.

        Raises:
            UserError: the sets are too small, or do not fit together.
        """
        self.check_size(*_sizes(sets), groups, sets.generated.shape[-1])
        numbers, left_out = self.both(sets, self.groups_of(sets, groups))
        return numbers, {name: jackknife_error([each[name] for each in left_out]) for name in numbers}

    def errors(self, sets: Sets, groups: int = 10) -> dict[str, float]:
        """Standard errors of the numbers."""
        return self.with_errors(sets, groups)[1]

    def error_from(self, sets: Sets, groups: int = 10) -> str:
        """Where the standard errors of one set come from, in words."""
        return f"jackknife over {self.groups_of(sets, groups)} groups"


def _sizes(sets: Sets) -> tuple[int, int]:
    """How many generated and how many other examples there are."""
    return len(sets.generated), len(sets.reference if sets.training is None else sets.training)


def fewest(left: int, groups: int) -> int:
    """The least number of examples of which `left` remain without any of as many groups, or of one each if fewer."""
    if groups == 0:
        return left
    return next(n for n in itertools.count(max(left, 2)) if n - -(-n // min(groups, n)) >= left)


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
