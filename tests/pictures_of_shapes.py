"""Labelled pictures that a network learns in a second: bars that lie, stand or lean, at random places, with noise."""

from __future__ import annotations

import torch
from torch import Tensor

from sde.data import DataInfo, Dataset, Split

SIDE = 12


class Bars(Dataset):
    """Three classes of bars.

    Args:
        train: pictures of the train split.
        test: of the test split.
        channels: of a picture, all alike but for the noise.
        labels: whether there are labels.
        flip: mirror pictures at random in training.
    """

    def __init__(
        self, train: int = 300, test: int = 60, channels: int = 1, labels: bool = True, flip: bool = False
    ) -> None:
        self._info = DataInfo("bars", (channels, SIDE, SIDE), num_classes=3 if labels else 0)
        self.random_flip = flip
        self._splits = {
            name: draw(n, channels, k, labels) for k, (name, n) in enumerate((("train", train), ("test", test)))
        }

    @property
    def info(self) -> DataInfo:
        """Gray or colored pictures of 12 x 12 pixels."""
        return self._info

    def split(self, name: str) -> Split:
        """The pictures of one split."""
        return self._splits[name]


def draw(n: int, channels: int, seed: int, labels: bool) -> Split:
    """n pictures, the classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.arange(n) % 3
    place = torch.randint(2, SIDE - 2, (n,), generator=generator)[:, None, None]
    row, column = torch.arange(SIDE)[None, :, None], torch.arange(SIDE)[None, None, :]
    kinds = torch.stack(
        [(row == place) | (column < 0), (column == place) | (row < 0), row + column == place + SIDE // 2]
    )
    bars: Tensor = kinds[numbers, torch.arange(n)]
    noise = torch.randint(0, 56, (n, channels, SIDE, SIDE), generator=generator)
    return Split((bars[:, None] * 200 + noise).to(torch.uint8), numbers if labels else None)
