r"""What a network costs: parameters, floating-point operations, memory.

All of it is found by running the network on the meta device, which has shapes and no numbers: that takes seconds for
the largest network, and no memory. Operations are those of convolutions, matrix products and attention, a
multiplication and an addition counting as two. The memory of training is

    4 numbers per parameter: weight, averaged weight, two moments of Adam
    + the most that is alive at one moment of a forward and a backward pass: what is kept for the backward pass, levels
      that are being recomputed, gradients, and what the layer at work needs

in float32. At each moment m that is a straight line in the batch size B, f_m + B e_m: weights that a network normalizes
and gradients do not grow with B. Two runs, with two and three examples, give the lines of all moments, and the highest
line at B is the memory.

Layers are counted as a GPU has them (dropout keeps one byte for an entry) and attention as its fused kernels have it:
they keep queries, keys, values, the result and one number for each row, and never a matrix of all pairs. What kernels
and the allocator take for themselves, and what copies of layouts cost, is not counted.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sde.models.attention import FUSED_ON_META

NUMBERS_PER_PARAMETER = 4  # beside gradients, which are counted in the backward pass
BYTES = 4

Line = tuple[int, int]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of fused attention of (batch, heads, n, size), given shapes: two products with a matrix of all pairs."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


_FLOPS = {FUSED_ON_META: _attention_flops}


@dataclass(frozen=True)
class Summary:
    """What a network costs.

    Attributes:
        parameters: numbers that are learned.
        flops: floating-point operations of one evaluation for one example; a training step takes about three times as
            many.
        lines: bytes in use at the moments of a training step that may be its peak in float32, as (those of the step,
            those of each example), beside weights, averages and moments of Adam.
    """

    parameters: int
    flops: int
    lines: tuple[Line, ...]

    @property
    def activations(self) -> int:
        """Bytes that each example of a large batch adds to the peak of a training step in float32."""
        return max(each for _, each in self.lines)

    def training_memory(self, batch_size: int) -> int:
        """Bytes that training with Adam and averaged weights takes in float32 at its peak."""
        step = max(fixed + batch_size * each for fixed, each in self.lines)
        return BYTES * NUMBERS_PER_PARAMETER * self.parameters + step

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:.2f} M parameters, {self.flops / 1e9:.3g} GFLOP an evaluation, "
            f"{self.activations / 2**20:.3g} MiB of activations an example"
        )


def summarize(network: nn.Module) -> Summary:
    """The costs of a network, which stays as it is, on whatever device."""
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    two, three = (count_bytes(_on_meta(network), *_inputs(network, batch)) for batch in (2, 3))
    return Summary(parameters, count_flops(network), highest_lines(two, three))


def count_flops(network: nn.Module) -> int:
    """Floating-point operations of one evaluation for one example."""
    network = _on_meta(network).eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
        network(*_inputs(network, 1))
    return counter.get_total_flops()


def count_bytes(network: nn.Module, *inputs: Tensor) -> list[int]:
    """Bytes in use after each operation of a training step, beside parameters, buffers and `inputs`, on any device.

    The loss is the sum of what `network` gives at `inputs`; its gradients are discarded.
    """
    network.train().zero_grad(set_to_none=True)
    with _LiveBytes((*network.parameters(), *network.buffers(), *inputs)) as live:
        network(*inputs).sum().backward()
    network.zero_grad(set_to_none=True)
    return live.after


def highest_lines(two: list[int], three: list[int]) -> tuple[Line, ...]:
    """The lines (f, e) of all moments that are the highest somewhere, f + 2 e and f + 3 e being given.

    A network that takes another course with three examples than with two is known by its two peaks alone.
    """
    if len(two) != len(three):
        two, three = [max(two)], [max(three)]
    lines = {(2 * a - 2 * (b - a) - a, b - a) for a, b in zip(two, three, strict=True)}
    highest: list[Line] = []
    for fixed, each in sorted(lines, key=lambda line: (-line[1], -line[0])):
        if not highest or fixed > highest[-1][0]:
            highest.append((fixed, each))
    return tuple(highest)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and that are not freed yet.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = [tensor.untyped_storage() for tensor in known]
        self.alive: dict[int, weakref.ref[Any] | None] = {storage._cdata: None for storage in self.known}
        self.now = 0
        self.after: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                self._count(tensor.untyped_storage())
        self.after.append(self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()

        def freed(_: object) -> None:
            self.now -= size
            del self.alive[name]

        self.now += size
        self.alive[name] = weakref.ref(storage, freed)


def _on_meta(network: nn.Module) -> nn.Module:
    """A copy without numbers."""
    tensors = {id(t): nn.Parameter(t.detach().to("meta"), t.requires_grad) for t in network.parameters()}
    return copy.deepcopy(network, {**tensors, **{id(t): t.to("meta") for t in network.buffers()}})


def _inputs(network: Any, batch: int) -> tuple[Tensor, Tensor]:
    x = torch.zeros(batch, *network.shape, device="meta")
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)  # as training has pictures
    return x, torch.zeros(batch, device="meta")
