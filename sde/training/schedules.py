r"""Learning-rate schedules: what the learning rate of the optimizer is multiplied by at each step.

Every schedule is preceded by a linear warm-up of `training.warmup` steps w,

    lr(k) = lr min(1, (k + 1) / w) f(k),      k = 0, 1, ...

with f = 1 throughout (`constant`), or with K = `steps` steps in all and a last factor e = `end`

    cosine        f = e + (1 - e) (1 + cos(pi (k - w) / (K - w))) / 2   after warm-up          (arXiv 1608.03983)
    linear        f = 1 - (1 - e) (k - s) / (K - s)                     from step s = `start` on
    inverse_sqrt  f = 1 / sqrt(max(1, k / s))                           (arXiv 2312.02696, eq. 67)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from sde.errors import check_number
from sde.registry import Registry

SCHEDULES: Registry[Schedule] = Registry("schedule")
register = SCHEDULES.register


class Schedule(ABC):
    """A learning-rate schedule: a function of the step alone."""

    @abstractmethod
    def factor(self, step: int, steps: int, warmup: int) -> float:
        """What the learning rate is multiplied by at step `step` (from 0) of `steps`, after warm-up's own factor."""

    def __call__(self, step: int, steps: int, warmup: int) -> float:
        """The factor at step `step` with that of the warm-up."""
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return rise * self.factor(step, steps, warmup)


@register("constant")
@dataclass(frozen=True)
class Constant(Schedule):
    """The same throughout, as score_sde and EDM have it."""

    def factor(self, step: int, steps: int, warmup: int) -> float:
        """1."""
        return 1.0


@register("cosine")
@dataclass(frozen=True)
class CosineDecay(Schedule):
    """Half a period of a cosine, from 1 after the warm-up to `end` at the last step.

    Args:
        end: factor at the end, in [0, 1].
        steps: at which it is reached; None for training.steps, which a resumed run may raise: the factor then follows
            the longer curve from there on.
    """

    end: float = 0.0
    steps: int | None = None

    def __post_init__(self) -> None:
        check_number("schedule.end", self.end, at_least=0, at_most=1)
        check_number("schedule.steps", 1 if self.steps is None else self.steps, at_least=1)

    def factor(self, step: int, steps: int, warmup: int) -> float:
        """Between 1 and `end`."""
        way = _share(step, warmup, self.steps or steps)
        return self.end + (1 - self.end) * 0.5 * (1 + math.cos(math.pi * way))


@register("linear")
@dataclass(frozen=True)
class LinearDecay(Schedule):
    """A straight line from 1 at step `start` to `end` at the last step.

    Args:
        start: step up to which the factor is 1.
        end: factor at the end, in [0, 1].
        steps: at which it is reached; None for training.steps.
    """

    start: int = 0
    end: float = 0.0
    steps: int | None = None

    def __post_init__(self) -> None:
        check_number("schedule.start", self.start, at_least=0)
        check_number("schedule.end", self.end, at_least=0, at_most=1)
        check_number("schedule.steps", 1 if self.steps is None else self.steps, at_least=1)

    def factor(self, step: int, steps: int, warmup: int) -> float:
        """Between 1 and `end`."""
        return 1 - (1 - self.end) * _share(step, max(self.start, warmup), self.steps or steps)


@register("inverse_sqrt")
@dataclass(frozen=True)
class InverseSquareRoot(Schedule):
    """Constant up to step `start`, then falling as the inverse square root of the step, as EDM2 has it.

    Args:
        start: step at which it begins to fall. EDM2 uses 35,000 to 70,000.
    """

    start: int = 10_000

    def __post_init__(self) -> None:
        check_number("schedule.start", self.start, at_least=1)

    def factor(self, step: int, steps: int, warmup: int) -> float:
        """1 / sqrt(max(1, step / start))."""
        return 1 / math.sqrt(max(1.0, step / self.start))


def _share(step: int, start: int, end: int) -> float:
    """How much of the way from step `start` to the last one before `end` is done at `step`, within [0, 1]."""
    return min(max((step - start) / max(end - 1 - start, 1), 0.0), 1.0)
