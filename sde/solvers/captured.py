r"""A solver's loop as a CUDA graph: one step is recorded and replayed along the grid.

On a GPU, small networks and small batches leave the device waiting for Python to launch the next kernel. Here the
state, the history and the draws of a `LinearSolver` live in fixed places, and the coefficients and times of all steps
in tables on the device, so that every step of the same structure is the same sequence of kernels. It is captured once
and replayed. Steps of another structure (the start of a multistep formula, a last step without noise) run as they are,
on the same memory. Without `capture` all steps do, on any device, which is what tests compare.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sde.denoiser import AbstractDenoiser
from sde.randomness import Noise
from sde.solvers.stages import Stage

_WARM_UP = 3  # runs before capture, as CUDA libraries choose their kernels and workspaces in the first ones


class _Form(NamedTuple):
    """What of a stage decides about its kernels."""

    moves: bool
    keep: bool
    again: bool
    terms: int
    draws: int
    evaluates: bool
    mixes: bool


def _form(stage: Stage) -> _Form:
    evaluates = stage.time is not None
    terms = len(stage.terms) if any(stage.terms) else 0
    return _Form(stage.moves, stage.keep, stage.again, terms, len(stage.draws), evaluates, stage.mix != 0)


def _row(step: Sequence[Stage]) -> list[float]:
    """The coefficients of a step in the order in which `CapturedLoop._step` takes them."""
    row: list[float] = []
    for stage in step:
        form = _form(stage)
        if form.moves:
            row += [stage.base, *stage.terms[: form.terms], *(draw.scale for draw in stage.draws)]
        row += [stage.mix] if form.mixes else []
    return row


class CapturedLoop:
    """The steps of one plan, for one denoiser and one shape of the state.

    Args:
        steps: the stages of each step.
        output: what of the denoiser they combine.
        denoiser: the score; on a GPU its network must not wait for the device while it computes.
        x: a state (B, ...): its shape, type and device.
        label: class labels (B,) or None.
        capture: whether to record the common step, which needs a CUDA device.
    """

    def __init__(
        self,
        steps: Sequence[Sequence[Stage]],
        output: str,
        denoiser: AbstractDenoiser,
        x: Tensor,
        label: Tensor | None,
        capture: bool,
    ) -> None:
        self._denoiser, self._output = weakref.ref(denoiser), output
        self.steps = [tuple(step) for step in steps]
        self.forms = [tuple(_form(stage) for stage in step) for step in self.steps]
        rows = [_row(step) for step in self.steps]
        times = [[stage.time for stage in step if stage.time is not None] for step in self.steps]
        self.evaluations = [len(at) for at in times]
        self._table = _padded(rows).to(x.device, x.dtype)
        self._times = _padded(times).to(x.device)
        self._index = torch.zeros(1, dtype=torch.long, device=x.device)
        self.x, self._origin = torch.zeros_like(x), torch.zeros_like(x)
        self.label = None if label is None else label.clone()
        depth = max((len(stage.terms) for step in self.steps for stage in step), default=0)
        self._history = [torch.zeros_like(x) for _ in range(depth)]
        draws = max((sum(form.draws for form in forms) for forms in self.forms), default=0)
        self._draws = [torch.zeros_like(x) for _ in range(draws)]
        self._common = Counter(self.forms).most_common(1)[0][0]
        self._graph = self._captured() if capture else None

    def start(self, x: Tensor, label: Tensor | None) -> None:
        """Begin at `x` (B, ...)."""
        self.x.copy_(x)
        self._index.zero_()
        for kept in (self._origin, *self._history):
            kept.zero_()
        if self.label is not None and label is not None:
            self.label.copy_(label)

    def advance(self, i: int, noise: Noise) -> None:
        """Take step i, which must be the next one: `x` holds the state after it until the next is taken."""
        drawn = iter(self._draws)
        for stage in self.steps[i]:
            for _, t, s in stage.draws:
                next(drawn).copy_(noise(t, s))
        if self._graph is not None and self.forms[i] == self._common:
            self._graph.replay()
        else:
            self._step(self.forms[i])

    def _step(self, forms: Sequence[_Form]) -> None:
        """One step of this structure on the fixed places, at the row of the tables that `_index` points to."""
        denoiser = self._denoiser()
        assert denoiser is not None
        row = iter(self._table.index_select(0, self._index)[0].unbind())
        at = iter(self._times.index_select(0, self._index)[0].unbind())
        x, origin, draws = self.x, self.x, iter(self._draws)
        history = list(self._history)
        for form in forms:
            y = x
            if form.moves:
                y = (self._origin if form.again else x) * next(row)
                for m in history[: form.terms]:
                    y = torch.addcmul(y, m, next(row))
                for _ in range(form.draws):
                    y = torch.addcmul(y, next(draws), next(row))
                if form.keep:
                    origin, x = x, y
            if form.evaluates:
                m = denoiser.output(self._output, y, next(at), self.label)
                history.insert(0, torch.addcmul(m, y, next(row)) if form.mixes else m)
        self._origin.copy_(origin)
        self.x.copy_(x)
        # from the oldest on: a place is read, by its successor, before it is written
        for place, m in reversed(list(zip(self._history, history, strict=False))):
            place.copy_(m)
        self._index.add_(1)

    def _captured(self) -> torch.cuda.CUDAGraph:
        first = self.forms.index(self._common)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._index.fill_(first)
                self._step(self._common)
        torch.cuda.current_stream().wait_stream(side)
        self._index.fill_(first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(self._common)
        return graph


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Rows of different lengths as one float64 table (n, widest)."""
    width = max(1, *(len(row) for row in rows))
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)


_LOOPS: weakref.WeakKeyDictionary[AbstractDenoiser, dict[Hashable, CapturedLoop]] = weakref.WeakKeyDictionary()


def captured_loop(
    key: Hashable,
    steps: Sequence[Sequence[Stage]],
    output: str,
    denoiser: AbstractDenoiser,
    x: Tensor,
    label: Tensor | None,
) -> CapturedLoop:
    """The loop for this plan (named by `key`), denoiser and shape of the state: made once, for all batches."""
    loops = _LOOPS.setdefault(denoiser, {})
    place = (key, tuple(x.shape), x.dtype, x.device, label is None)
    if place not in loops:
        loops[place] = CapturedLoop(steps, output, denoiser, x, label, capture=True)
    return loops[place]
