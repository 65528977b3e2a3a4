"""The record of a run: `metrics.jsonl` always, Weights & Biases where it is asked for.

metrics.jsonl holds one JSON object per line, {"step": ..., "seconds": ..., name: value, ...}; W&B mirrors it with
charts and pictures. wandb is imported here alone, and only by a run with `logger=wandb`.

A command that evaluates a run later adds a line of its own with the checkpoint's step (`append_metrics`), without
"seconds", which are those of training. In W&B, which drops what is logged at a step below the newest, such numbers have
an axis of their own, evaluation/step.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sde.errors import UserError, check_choice
from sde.registry import Registry
from sde.training.metrics import MetricsFile, append_metrics, read_metrics  # noqa: F401

LOGGERS: Registry[Logger] = Registry("logger")
register = LOGGERS.register
_EVALUATED = "evaluation/step"


class Logger(ABC):
    """Somewhere that metrics go besides metrics.jsonl.

    Attributes:
        elsewhere: whether there is such a place.
    """

    elsewhere: ClassVar[bool] = True

    @abstractmethod
    def start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """A run in `folder` begins, or goes on from `step`."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers at a step."""

    @abstractmethod
    def image(self, step: int, name: str, path: Path) -> None:
        """A picture file at a step."""

    @abstractmethod
    def animation(self, step: int, name: str, path: Path) -> None:
        """An animated picture file (GIF) at a step."""

    @abstractmethod
    def evaluation(self, step: int, metrics: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """Numbers and picture files about the checkpoint of a step, at any time after it."""

    @abstractmethod
    def finish(self, code: int) -> None:
        """The run has ended with exit code `code`."""


@register("none")
class NoLogger(Logger):
    """metrics.jsonl alone."""

    elsewhere: ClassVar[bool] = False

    def start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """Nothing to do."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing to do."""

    def image(self, step: int, name: str, path: Path) -> None:
        """Nothing to do."""

    def animation(self, step: int, name: str, path: Path) -> None:
        """Nothing to do."""

    def evaluation(self, step: int, metrics: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """Nothing to do."""

    def finish(self, code: int) -> None:
        """Nothing to do."""


@register("wandb")
class WandB(Logger):
    """Weights & Biases: scalars, loss by noise level as a chart, sample grids, configuration.

    Args:
        project: W&B project.
        entity: user or team; None is W&B's default.
        mode: "online", "offline", or "auto": online when the user has logged in, offline otherwise. An offline run lies
            in the run's folder and is uploaded with `wandb sync`.
        tags: labels of the run.
    """

    def __init__(
        self,
        project: str = "sde",
        entity: str | None = None,
        mode: str = "auto",
        tags: tuple[str, ...] = (),
    ) -> None:
        check_choice("logger.mode", mode, ("auto", "online", "offline"))
        if importlib.util.find_spec("wandb") is None:
            raise UserError("logger=wandb needs the package wandb: pip install wandb, or use logger=none")
        self.project, self.entity, self.mode, self.tags = project, entity, mode, tags
        self._run: Any = None
        self._levels: list[str] = []

    def start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """Open a W&B run, or the one that this folder had, as a further leg of it."""
        import wandb

        identity = folder / "wandb-id.txt"
        mode: Any = self._mode(wandb)
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,
            tags=list(self.tags) or None,
            dir=str(folder),
            name=folder.name,
            config=dict(config),
            id=identity.read_text().strip() if identity.exists() else None,
            resume="allow",
        )
        identity.write_text(self._run.id)
        self._wandb = wandb
        where = self._run.url if mode == "online" else f"{folder / 'wandb'} (upload it with wandb sync)"
        print(f"W&B run: {where}", file=sys.stderr)

    def _mode(self, wandb: Any) -> str:
        if self.mode != "auto":
            return self.mode
        chosen = os.environ.get("WANDB_MODE")
        if chosen in ("online", "offline", "disabled"):
            return chosen
        return "online" if os.environ.get("WANDB_API_KEY") or getattr(wandb.api, "api_key", None) else "offline"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars; those named val/eps_mse/<level> also become one chart of loss against noise level."""
        self._run.log(dict(metrics), step=step)
        levels = {name: value for name, value in metrics.items() if name.startswith("val/eps_mse/")}
        if levels:
            rows = [[float(name.rsplit("=", 1)[1]), value] for name, value in levels.items()]
            table = self._wandb.Table(data=rows, columns=["log SNR", "eps error"])
            chart = self._wandb.plot.line(table, "log SNR", "eps error", title="loss by noise level")
            self._run.log({"val/loss_by_noise_level": chart}, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        """A sample grid."""
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def animation(self, step: int, name: str, path: Path) -> None:
        """How samples come out of noise."""
        self._run.log({name: self._wandb.Video(str(path), format="gif")}, step=step)

    def evaluation(self, step: int, metrics: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """Charts over evaluation/step, and the run's summary: a point in training's own charts would be dropped."""
        self._run.define_metric(_EVALUATED)
        for name in metrics:
            self._run.define_metric(name, step_metric=_EVALUATED)
        shown = {name: self._wandb.Image(str(path)) for name, path in pictures.items()}
        self._run.log({_EVALUATED: step, **metrics, **shown})
        self._run.summary.update(dict(metrics))  # an offline leg of a run may know no earlier step

    def finish(self, code: int) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish(exit_code=code)
