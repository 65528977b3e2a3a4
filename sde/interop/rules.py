"""How a tensor of ours is made of tensors of another project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde.errors import UserError


class Rule(NamedTuple):
    """One of our tensors and what it is made of: `target = convert(*sources)`; None for what we do not use."""

    target: str | None
    sources: tuple[str, ...]
    convert: Callable[..., Tensor]


def same(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


def concatenate(*tensors: Tensor) -> Tensor:
    """The tensors one after the other, along the first axis."""
    return torch.cat(tensors)


def pair(target: str, source: str) -> list[Rule]:
    """Weight and bias of a layer that is the same on both sides; "" for the layer itself."""
    target, source = (f"{name}." if name else "" for name in (target, source))
    return [Rule(f"{target}{kind}", (f"{source}{kind}",), same) for kind in ("weight", "bias")]


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The part `name` of a configuration; empty when there is none."""
    part = config.get(name)
    return {} if part is None else dict(part.items())


def required(model: Mapping[str, Any], key: str) -> Any:
    """`model[key]`, or `UserError` when the configuration has none."""
    if key not in model:
        raise UserError(f"the configuration has no model.{key}: give the one that the network was trained with")
    return model[key]
