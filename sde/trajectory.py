"""The way from noise to data as an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sde.data import DataInfo
from sde.pictures import save_animation, scatter, tile
from sde.processes import SDE

_FRAMES = 60


class Trajectory:
    """Keeps the states that a solver passes through, each scaled to the spread of the data.

    Args:
        sde: the forward process.
        times: the solver's grid.
        n: samples that are shown, the first ones of a batch.
    """

    def __init__(self, sde: SDE, times: Sequence[float], n: int) -> None:
        self.sde, self.last, self.n = sde, times[-1], n
        self.frames: list[Tensor] = []
        self._every = max(1, len(times) // _FRAMES)
        self._seen = 0

    def keep(self, _share: float, t: float, x: Tensor | None) -> None:
        """What a solver calls with its state `x` (B, ...) at time `t`."""
        if x is None:
            return
        self._seen += 1
        if self._seen % self._every == 0 or t == self.last:
            # x_t of data with standard deviation 1/2, brought back to that standard deviation
            spread = float(torch.hypot(0.5 * self.sde.alpha(t), self.sde.sigma(t)))
            self.frames.append((x[: self.n] * (0.5 / spread)).cpu())

    def save(self, path: Path, x: Tensor, info: DataInfo) -> None:
        """Write the animation, which ends with the samples `x` (B, ...); for pictures and points in the plane."""
        frames = [*self.frames, x[: self.n].cpu()]
        if info.kind == "pixels":
            save_animation(path, [tile(info.decode(frame)) for frame in frames])
        else:
            limit = max(0.1, 1.2 * max(float(frame.nan_to_num(0, 0, 0).abs().quantile(0.995)) for frame in frames))
            save_animation(path, [scatter(frame, limit=limit) for frame in frames])


def can_be_shown(info: DataInfo) -> bool:
    """Whether there is a picture for such data: for pictures themselves, and for points in the plane."""
    return info.kind == "pixels" or info.shape == (2,)
