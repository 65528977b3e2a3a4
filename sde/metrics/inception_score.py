r"""Inception score: how sure a classifier is of each example, and how evenly the examples spread over the classes.

    IS = exp E_x KL(p(y|x) || p(y)),    p(y) = E_x p(y|x)                                        (arXiv 1606.03498)

is 1 where all examples get the same probabilities, and C where C classes are equally frequent and certain. It is
computed in parts of the examples, each with a p(y) of its own; mean and standard deviation over the parts are what is
published. No data enters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde.errors import UserError, check_flag, check_number
from sde.metrics.base import Metric, Sets, fewest, register
from sde.metrics.distances import shuffled


@register("is")
@dataclass(frozen=True)
class InceptionScore(Metric):
    """Inception score (arXiv 1606.03498), mean and standard deviation over parts of the examples.

    Args:
        splits: how many parts; 10 in the literature.
        shuffle: parts of examples in random order, which those sorted by class need; otherwise in the order they have.
    """

    better: ClassVar[dict[str, str | float]] = {"is": "higher", "is_std": ""}
    labels: ClassVar[dict[str, str]] = {"is": "IS", "is_std": "IS (std of splits)"}
    of: ClassVar[str] = "probabilities"

    splits: int = 10
    shuffle: bool = True

    def __post_init__(self) -> None:
        check_number("splits", self.splits, at_least=1)
        check_flag("shuffle", self.shuffle)

    def __call__(self, sets: Sets) -> dict[str, float]:
        return self.both(sets, 0)[0]

    def counts(self, n: int, m: int) -> tuple[int, int]:
        return n, 0

    def least(self, groups: int = 0, dimensions: int = 1) -> tuple[int, int]:
        """Enough that every split keeps some: from 20 examples a split on no group has all of them but by a miracle."""
        if groups == 0 or self.splits == 1:
            return max(self.splits, fewest(1, groups)), 0
        lacking = (n for n in range(20 * self.splits, self.splits - 1, -1) if not self._keeps_all(n, min(groups, n)))
        return next(lacking, self.splits - 1) + 1, 0

    def _keeps_all(self, n: int, groups: int) -> bool:
        """Whether none of the splits of n examples is of one group alone."""
        cells = self._cells(n, groups, 0)
        count = torch.bincount(cells, minlength=self.splits * groups).view(self.splits, groups)
        return bool((count.amax(1) < count.sum(1)).all())

    def _cells(self, n: int, groups: int, seed: int) -> Tensor:
        """The part of each example times the number of groups, and its group, (n,)."""
        order = shuffled(n, seed) if self.shuffle else torch.arange(n)
        # part s holds the examples from s n / splits up to (s + 1) n / splits, both rounded down
        part = torch.empty(n, dtype=torch.long)
        part[order] = ((torch.arange(n) + 1) * self.splits - 1) // n
        return part * groups + torch.arange(n) % groups

    def both(self, sets: Sets, groups: int) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Every example stays in its part when a group is left out."""
        p = self._probabilities(sets)
        n, parts = len(p), max(groups, 1)
        cell = self._cells(n, parts, sets.seed).to(p.device)

        def sums(x: Tensor) -> Tensor:
            """Of the rows of x, (n, K), over the examples of each part and group: (splits, groups, K)."""
            zeros = x.new_zeros(self.splits * parts, x.shape[1])
            return zeros.index_add_(0, cell, x).view(self.splits, parts, -1)

        count, surprise, mass = sums(torch.ones_like(p[:, :1])), sums(_entropy(p)[:, None]), sums(p)
        found = []
        for left in range(-1, groups):
            kept = torch.arange(parts, device=p.device) != left
            total = count[:, kept].sum(1)
            if float(total.min()) == 0:
                raise UserError(
                    f"is: {n} examples leave one of {self.splits} splits without any: take more, or fewer splits"
                )
            # the mean KL divergence from the mean is the entropy of the mean less the mean entropy
            scores = (_entropy(mass[:, kept].sum(1) / total) - surprise[:, kept].sum(1)[:, 0] / total[:, 0]).exp()
            found.append({"is": float(scores.mean()), "is_std": float(scores.std(correction=0))})
        return found[0], found[1:]

    def _probabilities(self, sets: Sets) -> Tensor:
        """Those of the sets, (n, C), checked and in float64."""
        if sets.probabilities is None:
            raise UserError("is needs class probabilities: choose an extractor that is a classifier")
        p = sets.probabilities.double()
        if p.ndim != 2 or len(p) < self.splits:
            raise UserError(
                f"is needs probabilities of at least {self.splits} examples, one for each split, and got "
                f"{tuple(p.shape)}: take more examples, or fewer splits"
            )
        # float32 probabilities of a thousand classes add up to one within 1e-4
        if not bool(torch.isfinite(p).all()) or bool((p < 0).any()) or float((p.sum(1) - 1).abs().max()) > 1e-3:
            raise UserError("is: some rows are no probabilities, which are not negative and add up to one")
        return p


def _entropy(p: Tensor) -> Tensor:
    """-sum p log p over the last axis, in nats; 0 log 0 is 0."""
    return torch.special.entr(p).sum(-1)
