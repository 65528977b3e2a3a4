"""How a tensor of ours is made of tensors of another project."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde.errors import UserError
from sde.interop.options import Option, read_options


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


def section(config: Mapping[str, Any], name: str, table: Mapping[str, Option]) -> dict[str, Any]:
    """The options of `table` in the part `name` of a configuration, with their defaults.

    Raises:
        UserError: the part holds no options, or one of another kind.
    """
    part = config.get(name)
    if part is not None and not hasattr(part, "items"):  # ml_collections' own have items, too
        raise UserError(f"{name}={part!r} of the configuration must be an object with options")
    return read_options({} if part is None else dict(part.items()), table, None, f"{name}.")


def required(model: Mapping[str, Any], key: str) -> Any:
    """`model[key]`, or `UserError` when the configuration has none."""
    if key not in model:
        raise UserError(f"the configuration has no model.{key}: give the one that the network was trained with")
    return model[key]


def apply_rules(
    rules: Iterable[Rule], theirs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors that `rules` make of `theirs`, ready for `load_state_dict`.

    Args:
        rules: one for each of our tensors, and those without a target for tensors that we do not use.
        theirs: the other project's tensors by name.
        expected: the `state_dict()` of our network.

    Raises:
        UserError: a tensor is missing, left over or of another shape; the message names the first.
    """
    left = dict(theirs)
    converted: dict[str, Tensor] = {}
    for target, sources, convert in rules:
        tensors = [_take(left, source) for source in sources]
        if target is None:
            continue
        try:
            converted[target] = convert(*tensors)
        except (RuntimeError, IndexError):
            converted[target] = tensors[0]
        if converted[target].shape != expected[target].shape:
            raise UserError(
                f"{sources[0]} of the checkpoint has shape {tuple(tensors[0].shape)}, which does not fit "
                f"{target} of shape {tuple(expected[target].shape)}: the configuration is not the checkpoint's"
            )
    if left:
        raise UserError(
            f"{next(iter(left))} of the checkpoint has no place in the network: the configuration is not its own"
        )
    for name in expected:
        if name not in converted:
            raise UserError(f"the checkpoint has nothing for {name}: the configuration is not the checkpoint's")
    return converted


def _take(theirs: dict[str, Tensor], name: str) -> Tensor:
    if name not in theirs:
        raise UserError(f"the checkpoint has no {name}: the configuration is not the checkpoint's")
    return theirs.pop(name)
