"""Where the numbers and pictures of a run are shown besides metrics.jsonl: Weights & Biases, or nowhere.

wandb is imported here alone, and only by a run with `logger=wandb`. Nothing that W&B does or fails to do ends a
training: without wandb, without a network or with a wrong key, one sentence says what happens instead.

Steps. W&B takes no row whose own step goes back, and a run that resumes goes back to its checkpoint. So every row has
the training step as a metric of its own, `step`, the axis of all charts; W&B's internal step is the same number
where it can be and otherwise the next free one, of which wandb-step.txt has the newest for the leg that comes next.

Leg by leg. A run that resumes is the same W&B run: wandb-id.txt holds its id. Every offline leg lies in a folder of its
own in RUN/wandb, marked as one that resumes; `wandb sync RUN/wandb` uploads them in their order, each behind the other.

Numbers about a checkpoint that are computed at any later time have another axis, evaluation/step.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec

from sde.errors import check_choice, check_number
from sde.files import write_text
from sde.registry import Registry
from sde.training.metrics import read_metrics

LOGGERS: Registry[Logger] = Registry("logger")
register = LOGGERS.register

P = ParamSpec("P")

_STEP = "step"
_EVALUATED = "evaluation/step"
_BY_LEVEL = re.compile(r"(.+)/log_snr=([-+.0-9e]+)")
_BEST = ("train/loss", "val/loss")
_CHART_SECONDS = 60.0  # a chart is a file that is uploaded, a heat map's column a few numbers


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


def _tolerant(method: Callable[Concatenate[WandB, P], None]) -> Callable[Concatenate[WandB, P], None]:
    """A method that does nothing in a run that W&B does not have, and that goes on, saying so once, when W&B fails."""

    @functools.wraps(method)
    def tolerant(self: WandB, *args: P.args, **kwargs: P.kwargs) -> None:
        if self._run is None:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            if not self._warned:
                _warn(f"\nW&B does not take what is logged ({_reason(error)}); metrics.jsonl has every number")
            self._warned = True

    return tolerant


@register("wandb")
class WandB(Logger):
    """Weights & Biases: curves, errors by noise level, sample grids and trajectories over training, configuration.

    Args:
        project: W&B project.
        entity: user or team; None is W&B's default.
        mode: "online", "offline", or "auto": online when the user has logged in, offline otherwise. An offline run lies
            in the run's folder and is uploaded with `wandb sync`.
        tags: labels of the run.
        group: runs with one group are shown together; None is the folder of a `--multirun`, and no group for a run
            of its own.
        name: of the run; None is its folder's name.
        notes: a text beside it.
        job_type: what kind of run of its group it is.
        timeout: seconds that W&B may take to answer in the beginning, and to take what is left in the end.
    """

    def __init__(
        self,
        project: str = "sde",
        entity: str | None = None,
        mode: str = "auto",
        tags: tuple[str, ...] = (),
        group: str | None = None,
        name: str | None = None,
        notes: str | None = None,
        job_type: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        check_choice("logger.mode", mode, ("auto", "online", "offline"))
        check_number("logger.timeout", timeout, above=0)
        self.project, self.entity, self.mode, self.tags = project, entity, mode, tags
        self.group, self.name, self.notes, self.job_type = group, name, notes, job_type
        self.timeout = timeout
        self._wandb: Any = None
        self._run: Any = None
        self._warned = False

    def start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """Open a W&B run, or the one that this folder had, as a further leg of it."""
        self._run, self._warned = None, False
        self._defined: set[str] = set()
        self._drawn: dict[str, float] = {}
        try:
            import wandb
        except ImportError:
            _warn("wandb is not installed (pip install wandb), so that the run is recorded in metrics.jsonl alone")
            return
        self._wandb = wandb
        identity = folder / "wandb-id.txt"
        options = {
            "project": self.project,
            "entity": self.entity,
            "dir": str(folder),
            "id": identity.read_text().strip() if identity.exists() else _new_id(),
            "resume": "allow",
            "reinit": "finish_previous",  # of a --multirun, whose job before this one may have failed
            "config": dict(config),
            "tags": list(self.tags) or None,
            "group": self.group or os.environ.get("WANDB_RUN_GROUP") or multirun_of(folder),
            "name": self.name or os.environ.get("WANDB_NAME") or folder.name,
            "notes": self.notes,
            "job_type": self.job_type,
        }
        self._open(self._mode(wandb), folder, options)
        self._begin(folder, step)

    @_tolerant
    def _begin(self, folder: Path, step: int) -> None:
        self._newest = folder / "wandb-step.txt"
        known = self._newest.read_text() if self._newest.exists() else ""
        # the server knows no offline leg that was not uploaded, and an offline leg knows no server
        self._row = max(self._run.starting_step - 1, int(known) if known.isdecimal() else 0)
        self._best = _best(folder / "metrics.jsonl", step)
        write_text(folder / "wandb-id.txt", self._run.id)

    def _mode(self, wandb: Any) -> str:
        if self.mode != "auto":
            return self.mode
        chosen = os.environ.get("WANDB_MODE")
        if chosen in ("online", "offline", "disabled"):
            return chosen
        return "online" if os.environ.get("WANDB_API_KEY") or getattr(wandb.api, "api_key", None) else "offline"

    def _open(self, mode: str, folder: Path, options: Mapping[str, Any]) -> None:
        """Start the run, offline when it cannot be online, and not at all when that fails too."""
        files = folder / "wandb"
        upload = f"wandb sync {shlex.quote(str(files))}"
        try:
            self._run = self._wandb.init(mode=mode, settings=self._settings(), **options)
        except Exception as error:
            if mode == "online":
                _warn(f"W&B cannot be reached ({_reason(error)}), so that the run is offline until it is resumed")
                return self._open("offline", folder, options)
            _warn(f"W&B cannot be started ({_reason(error)}), so that the run is recorded in metrics.jsonl alone")
            return None
        where = self._run.url if mode == "online" else f"{files} (upload it with {upload})"
        print(f"W&B run: {where}", file=sys.stderr)
        return None

    def _settings(self) -> Any:
        waits = {"init_timeout": self.timeout, "finish_timeout": self.timeout}
        flush = "x_transaction_log_flush_interval"  # not a setting that W&B promises to keep
        if flush in getattr(self._wandb.Settings, "model_fields", ()):
            waits[flush] = 1.0  # instead of 15 s, that are lost when everything is killed at once
        return self._wandb.Settings(**waits)

    @_tolerant
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars; those named <what>/log_snr=<center> also become a chart and a heat map of <what> by noise level."""
        self._write(step, {**metrics, **self._by_level(metrics)})
        better = {name: metrics[name] for name in _BEST if metrics.get(name, float("nan")) < self._best[name]}
        self._best.update(better)
        if better:
            self._run.summary.update({_best_name(name): value for name, value in better.items()})

    @_tolerant
    def image(self, step: int, name: str, path: Path) -> None:
        """A sample grid, media/<name>, under which a slider goes through training."""
        self._write(step, {f"media/{name}": self._wandb.Image(str(path), caption=f"step {step}")})

    @_tolerant
    def animation(self, step: int, name: str, path: Path) -> None:
        """A GIF, media/<name>; the file is shown as it is, so that no encoder is needed."""
        self._write(step, {f"media/{name}": self._wandb.Video(str(path), caption=f"step {step}", format="gif")})

    @_tolerant
    def evaluation(self, step: int, metrics: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """Charts over evaluation/step, and the run's summary."""
        self._run.define_metric(_EVALUATED)
        for name in metrics:
            self._run.define_metric(name, step_metric=_EVALUATED)
        caption = f"step {step}"
        shown = {name: self._wandb.Image(str(path), caption=caption) for name, path in pictures.items()}
        self._send(self._row + 1, {_EVALUATED: step, **metrics, **shown})
        self._run.summary.update(dict(metrics))  # an offline leg of a run may know no earlier step

    @_tolerant
    def finish(self, code: int) -> None:
        """Close the run."""
        run, self._run = self._run, None
        try:
            run.finish(exit_code=code)
        except Exception:
            with contextlib.suppress(Exception):
                self._wandb.teardown()  # of what would print a traceback at exit, and fail the next job of a --multirun
            raise

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        """A row of the run's history, sent at once; a run that is killed loses none."""
        for name in values:
            if name not in self._defined:
                self._run.define_metric(name, step_metric=_STEP, hidden=_BY_LEVEL.fullmatch(name) is not None)
        if not self._defined:
            self._run.define_metric(_STEP, hidden=True)
        self._defined |= values.keys()
        self._send(max(step, self._row + 1), {_STEP: step, **values})

    def _send(self, row: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=row, commit=True)
        self._row = row
        self._newest.write_text(str(row))

    def _by_level(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """A chart against log SNR and a column of a heat map for each quantity that is known by noise level."""
        shown: dict[str, Any] = {}
        for quantity, values in by_level(metrics).items():
            name = f"noise_levels/{quantity.replace('/', '_')}"
            levels, heights = list(values), list(values.values())
            now = time.monotonic()
            if quantity.startswith("val/") or now - self._drawn.get(quantity, -_CHART_SECONDS) >= _CHART_SECONDS:
                self._drawn[quantity] = now
                table = self._wandb.Table(data=[list(row) for row in values.items()], columns=["log SNR", quantity])
                shown[name] = self._wandb.plot.line(table, "log SNR", quantity, title=f"{quantity} by noise level")
            if len(levels) > 1:
                # a histogram whose bins are the noise levels is drawn over steps as a heat map
                shown[f"{name}_over_steps"] = self._wandb.Histogram(np_histogram=(heights, _edges(levels)))
        return shown


def multirun_of(folder: Path) -> str | None:
    """The group of a run in a `--multirun`: its folder below runs/multirun, or the name of wherever it is."""
    above = folder.resolve().parent
    if "multirun" in above.parts[:-1]:
        last = len(above.parts) - 1 - above.parts[::-1].index("multirun")
        return "/".join(above.parts[last + 1 :]) or None
    return above.name if (above / "multirun.yaml").is_file() else None


def by_level(metrics: Mapping[str, float]) -> dict[str, dict[float, float]]:
    """The finite numbers named <quantity>/log_snr=<center>: quantity to center to number, by growing center."""
    found: dict[str, dict[float, float]] = {}
    for name, value in metrics.items():
        match = _BY_LEVEL.fullmatch(name)
        if match and abs(value) < float("inf"):
            found.setdefault(match[1], {})[float(match[2])] = value
    return {quantity: dict(sorted(values.items())) for quantity, values in found.items()}


def _new_id() -> str:
    """A W&B run's id, known before W&B answers: what is begun online and what goes on offline is one run."""
    return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)  # the former is a sweep's


def _edges(centers: list[float]) -> list[float]:
    """Edges of bins around increasing centers."""
    between = [(a + b) / 2 for a, b in pairwise(centers)]
    return [2 * centers[0] - between[0], *between, 2 * centers[-1] - between[-1]]


def _best(path: Path, step: int) -> dict[str, float]:
    """The least losses until `step` in a metrics.jsonl."""
    lines = [line for line in read_metrics(path) if line["step"] <= step] if step and path.exists() else []
    losses = {name: [line[name] for line in lines if line.get(name) is not None] for name in _BEST}
    return {name: min(values, default=float("inf")) for name, values in losses.items()}


def _best_name(name: str) -> str:
    return f"best/{name.replace('/', '_')}"


def _reason(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _warn(sentence: str) -> None:
    lead = "\n" * sentence.startswith("\n")  # below a progress bar
    print(f"{lead}warning: {sentence.strip()}", file=sys.stderr)
