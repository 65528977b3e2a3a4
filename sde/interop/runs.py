"""What another project's configuration describes, in the words of this package, and a run made of it.

Every importer turns a configuration into a `Description` and a checkpoint into weights under our names; the rest, a
`Denoiser` or the folder of a run, is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sde.config import build, path_of
from sde.data import DataInfo
from sde.denoiser import Denoiser
from sde.errors import UserError
from sde.models import MODELS
from sde.parameterizations import Parameterization
from sde.processes import SDE
from sde.runs import Run
from sde.training.checkpoint import list_checkpoints, save_checkpoint


@dataclass(frozen=True)
class Description:
    """A network, what it predicts, and the data it was made for.

    Args:
        model: the registered name of the network.
        settings: its keyword settings.
        sde: the forward process.
        parameterization: what the network's output means.
        info: the facts about the data; its classes are those that the network is told.
    """

    model: str
    settings: Mapping[str, Any]
    sde: SDE
    parameterization: Parameterization
    info: DataInfo

    def network(self) -> nn.Module:
        """The network with new weights.

        Raises:
            UserError: a setting out of range.
        """
        return MODELS.get(self.model)(self.info.shape, self.info.num_classes, **self.settings)

    def denoiser(self, network: nn.Module) -> Denoiser:
        """The denoiser of a network with trained weights, in evaluation mode."""
        return Denoiser(network, self.sde, self.parameterization).eval().requires_grad_(False)

    def config(self) -> dict[str, Any]:
        """The part of a run's configuration that sampling needs."""
        listed = {key: list(value) if isinstance(value, tuple) else value for key, value in self.settings.items()}
        return {
            "sde": _node(self.sde),
            "parameterization": _node(self.parameterization),
            "model": {"_target_": path_of(MODELS.get(self.model)), **listed},
            "conditional": self.info.num_classes > 0,
        }


def _node(value: SDE | Parameterization) -> dict[str, Any]:
    """A frozen dataclass as a node of the configuration."""
    return {"_target_": path_of(type(value)), **vars(value)}


def write_run(
    folder: Path,
    description: Description,
    averaged: Mapping[str, Tensor],
    last: Mapping[str, Tensor] | None = None,
    step: int = 0,
) -> None:
    """Write a run with one checkpoint, and say how to sample from it.

    Args:
        folder: of the run.
        description: of the network.
        averaged: its averaged weights.
        last: its weights as last trained; None where only one set is published.
        step: optimizer steps that were made.

    Raises:
        UserError: the folder holds a run already.
    """
    run, settings, info = Run(folder), description.config(), description.info
    build(settings["model"], "model", shape=info.shape, num_classes=info.num_classes)  # what sampling will do
    if list_checkpoints(run.checkpoints):
        raise UserError(f"{run.path} holds a run already: choose another hydra.run.dir")
    run.write_beginning(settings, info, torch.device("cpu"))
    weights = {"model": dict(averaged if last is None else last), "ema": dict(averaged)}
    path = save_checkpoint(run.checkpoints, {"step": step, "config": settings, "data": info.to_dict(), **weights})
    print(f"checkpoint {path}")
    print(f"draw samples with: python -m sde.sample run={run.path}")
