"""The scale of a data set, which noise levels and the EDM preconditioning are measured against."""

from __future__ import annotations

import math

import torch

from sde.data.base import DataInfo, Split
from sde.errors import UserError

CHUNK_VALUES = 1 << 24  # values looked at at a time: 16 MiB of pixels


def measure_sigma_data(split: Split, info: DataInfo) -> float:
    """Standard deviation of the encoded examples, taken over examples and dimensions together.

        sigma_data = sqrt(mean_ij (x_ij - m)^2),    m = mean_ij x_ij

    with i over examples and j over all dimensions (channels and positions) and one mean m for all of them. This is
    sigma_data of EDM (Karras et al. 2022, arXiv:2206.00364, Table 1), about 0.5 for photographs in [-1, 1]. The sums
    over pixels are exact (integers); those over vectors are float64.

    Args:
        split: examples as they are stored.
        info: the facts of the same data set.

    Raises:
        UserError: the split is empty, or all its values are the same.
    """
    if split.values.numel() == 0:
        raise UserError(f"the scale of {info.name!r} cannot be measured on an empty split")
    step = max(1, CHUNK_VALUES // max(1, split.values[0].numel()))
    count, total, squares = split.values.numel(), 0.0, 0.0
    if info.kind == "pixels":
        histogram = torch.zeros(256, dtype=torch.int64)
        for chunk in split.values.split(step):
            histogram += torch.bincount(chunk.flatten(), minlength=256).cpu()
        values = torch.arange(256)
        total, squares = int((histogram * values).sum()), int((histogram * values**2).sum())
        # In integers count * squares - total^2 does not cancel.
        variance = (count * squares - total**2) / count**2
        sigma = math.sqrt(variance) * (info.high - info.low) / 255
    else:
        mean = sum(float(chunk.sum(dtype=torch.float64)) for chunk in split.values.split(step)) / count
        for chunk in split.values.split(step):
            squares += float((chunk.to(torch.float64) - mean).square().sum())
        sigma = math.sqrt(squares / count)
    if sigma == 0:
        raise UserError(f"every value of {info.name!r} is the same, so that it has no scale: look at its examples")
    return sigma
