"""Everything that was found out, in one object: what rules judge and what is printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sde.doctoring.data import DataFacts
from sde.doctoring.machine import Machine
from sde.doctoring.model import ModelFacts
from sde.doctoring.noise import NoiseFacts
from sde.doctoring.speed import Speed
from sde.training.ema import EMAOptions
from sde.training.options import TrainingOptions


@dataclass(frozen=True)
class Findings:
    """What is known before training.

    Attributes:
        config: of training, as it was asked for.
        options: of training.
        ema: which averages are kept.
        device: "cpu" or "cuda".
        machine: what there is.
        data: the training data.
        noise: the process beside the data.
        model: the network.
        speed: how fast it trains; None where not one step fits into the memory.
    """

    config: Mapping[str, Any]
    options: TrainingOptions
    ema: EMAOptions
    device: str
    machine: Machine
    data: DataFacts
    noise: NoiseFacts
    model: ModelFacts
    speed: Speed | None
