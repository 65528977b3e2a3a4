r"""The stages that a step of a linear solver consists of.

Almost every sampler of the field builds its states from combinations

    y = base x + sum_j terms_j m_j + sum_k scale_k z_k

of the state x that its step started from, of values m of the network (the newest first, those of earlier steps
included) and of fresh normal draws z. A step is a list of such `Stage`s; each may evaluate the network at its y and
become the new x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Draw(NamedTuple):
    """`scale` times a standard normal that belongs to the interval from t to s < t, or to no time at all."""

    scale: float
    t: float | None = None
    s: float | None = None


class Stage(NamedTuple):
    """One combination, and what becomes of it.

    Attributes:
        base: factor on the x of the step.
        terms: factors on the evaluations made so far, the newest first; shorter than their number where old ones are
            out of use.
        draws: the noise in it.
        keep: the combination becomes the x of the stages, and of the step, that follow.
        time: evaluate the network at the combination and this time; None for not at all.
        mix: the evaluation enters as m = output + mix y, with y the combination.
        again: the combination is of the x that the previous step ended from, not of what it led to: a corrector, which
            does that step again.
    """

    base: float = 1.0
    terms: tuple[float, ...] = ()
    draws: tuple[Draw, ...] = ()
    keep: bool = False
    time: float | None = None
    mix: float = 0.0
    again: bool = False

    @property
    def moves(self) -> bool:
        """Whether y is anything but x."""
        return self.base != 1 or any(self.terms) or bool(self.draws) or self.again


Step = Sequence[Stage]


def evaluate_at(t: float, mix: float = 0.0) -> Stage:
    """The stage that evaluates the network at x itself."""
    return Stage(time=t, mix=mix)


def arrive(base: float, terms: Sequence[float], *draws: Draw) -> Stage:
    """The stage that ends a step; draws of scale zero are left out."""
    return Stage(base, tuple(terms), tuple(draw for draw in draws if draw.scale != 0), keep=True)
