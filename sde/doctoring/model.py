"""What the network costs (`sde.models.summary`), against what the device has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sde.config import build
from sde.data import DataInfo
from sde.models.summary import BYTES, NUMBERS_PER_PARAMETER, Summary, summarize
from sde.training.options import TrainingOptions


@dataclass(frozen=True)
class ModelFacts:
    """The network, and what training it takes.

    Attributes:
        name: of its class.
        parameters: numbers that are learned.
        flops: floating-point operations of an evaluation of one example.
        activations: bytes that an example adds to the memory of a training step.
        at_once: examples that go through the network at a time.
        memory: bytes of a training step, by estimate; in float32 unless all is float64.
        free: bytes that the device has for it; None if unknown.
        largest: most examples at a time that fit; None if `free` is unknown.
        fitting: parts of a batch (training.accumulation), the fewest that fit; None if none does, or unknown.
        recompute: the fewest levels whose recomputation makes `at_once` fit, where that is needed and helps.
    """

    name: str
    parameters: int
    flops: int
    activations: int
    at_once: int
    memory: int
    free: int | None
    largest: int | None
    fitting: int | None
    recompute: int | None

    @property
    def fits(self) -> bool:
        """Whether the batch fits, as far as known."""
        return self.free is None or self.memory <= self.free


def examine_model(
    config: Mapping[str, Any],
    info: DataInfo,
    options: TrainingOptions,
    free: int | None,
    averages: int = 1,
    processes: int = 1,
) -> ModelFacts:
    """The costs of the network of a training configuration, found without making it.

    Args:
        config: of training.
        info: the facts about its data.
        options: of training.
        free: bytes that the device has.
        averages: how many averages of the weights are kept.
        processes: that share a batch, each with a whole network.
    """
    network = bare_network(config, info)
    costs = summarize(network)
    wider = options.dtype.itemsize // BYTES
    more = wider * (averages - 1) * BYTES * costs.parameters
    at_once = -(-options.batch_size // options.parts(processes))
    memory = wider * costs.training_memory(at_once) + more
    fits = free is None or memory <= free
    largest = None if free is None else largest_batch(costs, (free - more) // wider)
    parts = None if largest is None else fewest_parts(options.batch_size, largest, processes)
    recompute = None
    if free is not None and not fits:
        recompute = fewest_levels(config, info, at_once, (free - more) // wider)
    return ModelFacts(
        name=type(network).__name__,
        parameters=costs.parameters,
        flops=costs.flops,
        activations=wider * costs.activations,
        at_once=at_once,
        memory=memory,
        free=free,
        largest=largest,
        fitting=options.accumulation if fits else parts,
        recompute=recompute,
    )


def bare_network(config: Mapping[str, Any], info: DataInfo, **changed: Any) -> nn.Module:
    """The network of a configuration, with options `changed`, without numbers in it."""
    classes = info.num_classes if config["conditional"] else 0
    with torch.device("meta"):
        network: nn.Module = build({**config["model"], **changed}, "model", shape=info.shape, num_classes=classes)
    return network


def largest_batch(costs: Summary, free: int) -> int:
    """The most examples at a time whose training step takes at most `free` bytes; 0 if not even one does."""
    left = free - BYTES * NUMBERS_PER_PARAMETER * costs.parameters
    rooms = [(left - fixed) // each if each > 0 else (2**62 if fixed <= left else 0) for fixed, each in costs.lines]
    return max(0, min(rooms))


def fewest_parts(batch_size: int, largest: int, processes: int = 1) -> int | None:
    """The smallest divisor of `batch_size` that makes parts of at most `largest` examples; None if there is none.

    Each of `processes` has that many parts of its share.
    """
    divisors = (parts for parts in range(1, batch_size // processes + 1) if batch_size % parts == 0)
    return next((parts for parts in divisors if -(-batch_size // (parts * processes)) <= largest), None)


def fewest_levels(config: Mapping[str, Any], info: DataInfo, at_once: int, free: int) -> int | None:
    """The fewest levels to recompute with which `at_once` examples fit; None for networks without, or if none do."""
    levels = len(config["model"].get("channel_multipliers", ()))
    now = config["model"].get("recompute_levels")
    if now is None:
        return None
    for count in range(now + 1, levels + 1):
        if summarize(bare_network(config, info, recompute_levels=count)).training_memory(at_once) <= free:
            return count
    return None
