"""One helper for one problem: coefficients of shape () or (B,) meet data of shape (B, ...).

Every schedule in the package is a function of time alone, so its values have the shape of `t`; data may be vectors
(B, D), pictures (B, C, H, W) or sequences (B, C, L). `expand` adds the trailing axes that make the two multiply.
"""

from __future__ import annotations

import torch
from torch import Tensor

Time = float | Tensor
"""A time: a number, or a tensor of shape () or (B,)."""


def as_tensor(t: Time) -> Tensor:
    """`t` itself when it is a tensor; a number becomes a float64 tensor of shape ()."""
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """`coefficient` of shape () or (B,) viewed as (B, 1, ..., 1) so that it multiplies `x` of shape (B, ...).

    A tensor of shape () is returned as it is: as a scalar it multiplies data of any type and on any device.
    """
    if coefficient.ndim == 0:
        return coefficient
    if coefficient.ndim != 1 or coefficient.shape[0] != x.shape[0]:
        raise ValueError(
            f"time-dependent values of shape {tuple(coefficient.shape)} do not fit data of shape {tuple(x.shape)}: "
            "t must have shape () or (B,)"
        )
    return coefficient.reshape(-1, *[1] * (x.ndim - 1))
