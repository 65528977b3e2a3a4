"""What the importers of U-Nets share: how tensors are rearranged, and rules for whole networks.

An importer says which of our layers (by name) is which of the other project's (by prefix), and for each kind of layer
which tensors it is made of; `unet_rules` puts the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sde.errors import UserError
from sde.interop.rules import Rule

Kinds = Mapping[type[nn.Module], Callable[[Any], list[Rule]]]


def unet_rules(network: nn.Module, places: Iterable[tuple[str, str]], kinds: Kinds) -> Iterator[Rule]:
    """The rules of all layers, with full names on both sides.

    Args:
        network: ours.
        places: (name of a layer of ours, prefix of the other project's tensors); the prefix is put before the sources
            of the layer's rules as it is.
        kinds: the rules of each kind of layer; layers of other kinds have no tensors.
    """
    for ours, prefix in places:
        layer = network.get_submodule(ours)
        for target, sources, convert in kinds.get(type(layer), _nothing)(layer):
            full = None if target is None else f"{ours}.{target}"
            yield Rule(full, tuple(prefix + source for source in sources), convert)


def _nothing(_layer: nn.Module) -> list[Rule]:
    return []


def cosines_first(weight: Tensor) -> Tensor:
    """Columns (..., 2n) of a layer that reads n cosines and then n sines, for one that reads sines first."""
    cosines, sines = weight.chunk(2, dim=-1)
    return torch.cat((sines, cosines), dim=-1)


def with_null_row(vectors: Tensor) -> Tensor:
    """A vector for each class (classes, size), and zero for "no label"."""
    return torch.cat((vectors, torch.zeros_like(vectors[:1])))


def first(channels: int) -> Callable[[Tensor], Tensor]:
    """Keep the first output channels of a layer."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor[:channels]

    return convert


def as_conv1x1(tensor: Tensor) -> Tensor:
    """The weight (out, in) or (out, in, 1) of a layer on single pixels as (out, in, 1, 1); biases as they are."""
    return tensor.reshape(*tensor.shape[:2], 1, 1) if tensor.ndim > 1 else tensor


def heads_outside(heads: int, *, interleaved: bool) -> Callable[[Tensor], Tensor]:
    """Rows of queries, keys and values for our order, (3, heads, channels).

    Args:
        heads: number of heads.
        interleaved: whether theirs are (heads, channels, 3), as EDM's, or (heads, 3, channels), as the first of ADM.
    """

    def convert(tensor: Tensor) -> Tensor:
        rest = tensor.shape[1:]
        if interleaved:
            rows = tensor.reshape(heads, -1, 3, *rest).movedim(2, 0)
        else:
            rows = tensor.reshape(heads, 3, -1, *rest).movedim(1, 0)
        return as_conv1x1(rows.reshape(tensor.shape))

    return convert


def check_groups(network: nn.Module, theirs: Callable[[int], int]) -> None:
    """Raise `UserError` unless every normalization has as many groups as there.

    Args:
        network: ours.
        theirs: the number of groups there, given the number of channels.
    """
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm) and layer.num_groups != theirs(layer.num_channels):
            raise UserError(
                f"layers of {layer.num_channels} channels are normalized in {theirs(layer.num_channels)} groups there "
                f"and in {layer.num_groups} here: this network cannot be followed"
            )


def multipliers_of(name: str, widths: Iterable[int], channels: int) -> tuple[int, ...]:
    """`widths` of the levels as multiples of `channels`.

    Raises:
        UserError: the first is not `channels`, or one is not a multiple.
    """
    widths = list(widths)
    if not widths or widths[0] != channels or any(width % channels for width in widths):
        raise UserError(
            f"{name}={widths} of the configuration cannot be followed: every width must be a multiple of the first, "
            f"and that must be {channels}"
        )
    return tuple(width // channels for width in widths)


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise `UserError` for an option of `fixed` with another value than the one that can be followed."""
    for key, value in fixed.items():
        if config[key] != value:
            raise UserError(f"{key}={config[key]!r} of the configuration cannot be followed: only {value!r} can")
