"""A run is a folder.

    runs/<date>/<time>_<sde>_<model>_<data>/
        config.yaml        every setting, resolved
        data.json          the facts about the data (shape, classes, range of pixels)
        environment.json   versions, git revision, device, command line
        metrics.jsonl      the record: one JSON object per line
        checkpoints/       step-00001000.pt, ...
        ema/               snapshots of power-function averages, and averages that python -m sde.ema makes of them
        previews/          sample grids drawn during training
        samples/           what `python -m sde.sample` draws

`python -m sde.runs` lists, compares and prunes them (`sde.runs_table`).

Sampling needs the checkpoint alone for the weights and this module for everything around it: which run, which
checkpoint, and the denoiser that they describe.
"""

from __future__ import annotations

import contextlib
import os
import platform
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import OmegaConf

from sde.config import build, options_of
from sde.data import DataInfo
from sde.denoiser import Denoiser
from sde.errors import UserError, suggest
from sde.files import write_json, write_text
from sde.interop.folders import is_exported, read_folder
from sde.training.checkpoint import Checkpoint, best_step, list_checkpoints, load_checkpoint, load_newest
from sde.training.ema import EMAOptions, average_name, averages_of
from sde.training.metrics import read_metrics

try:
    import fcntl
except ImportError:  # Windows has no fcntl
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs")
_OF_NETWORK = ("sde", "parameterization", "model")
_OF_TRAINING = ("data", "loss", "optimizer", "ema", "training", "logger", "preview_solver")
_HELD: set[IO[str]] = set()  # locks of this process


def _let_go() -> None:
    """In a process that was forked off, such as a worker that reads ahead, and may outlive the one with the lock."""
    while _HELD:
        _HELD.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@dataclass(frozen=True)
class Run:
    """A run folder.

    Args:
        path: the folder.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The record of metrics."""
        return self.path / "metrics.jsonl"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing this run; the system lets go of the lock when a process dies.

        Raises:
            UserError: when another process is writing it.
        """
        if fcntl is None:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / ".lock"
        handle = self._locked_file(file)
        _HELD.add(handle)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            _HELD.remove(handle)
            handle.close()

    def _locked_file(self, file: Path) -> IO[str]:
        """`file`, open and locked, unless the file system has no locks."""
        while True:
            handle = file.open("a")
            try:
                _lock(handle)
                if os.path.samestat(os.fstat(handle.fileno()), os.stat(file)):
                    return handle
            except BlockingIOError:
                handle.close()
                raise UserError(
                    f"{self.path} is being written by another process: wait for it, or choose another hydra.run.dir"
                ) from None
            except FileNotFoundError:  # the process that had it has removed it just now
                pass
            except OSError:  # some network file systems have no locks
                return handle
            handle.close()

    def is_locked(self) -> bool:
        """Whether another process is writing the run; False where a file system has no locks to ask."""
        if fcntl is None:
            return False
        try:
            with (self.path / ".lock").open("rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go of when the file is closed
        except BlockingIOError:
            return True
        except OSError:  # no such file, or no locks
            return False
        return False

    def config(self) -> dict[str, Any]:
        """The configuration that the run was made with.

        Raises:
            UserError: when the file is missing or is not a configuration.
        """
        file = self.path / "config.yaml"
        try:
            config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        except FileNotFoundError:
            raise UserError(f"run={self.path} has no config.yaml: give the folder that training made") from None
        except Exception as error:  # a YAML error of any kind means the same to the user
            reason = str(error).splitlines()[0]
            raise UserError(f"{file} is damaged ({reason}): restore it (a checkpoint holds a copy)") from error
        if not isinstance(config, dict) or not config:
            raise UserError(f"{file} is damaged (it holds no settings): restore it (a checkpoint holds a copy)")
        return {str(key): value for key, value in config.items()}

    def write_beginning(self, config: Mapping[str, Any], info: DataInfo, device: torch.device) -> None:
        """Write config.yaml, data.json and environment.json."""
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        write_json(self.path / "data.json", info.to_dict())
        write_json(self.path / "environment.json", environment(device))


def lacking(config: Mapping[str, Any]) -> str | None:
    """The first section that a run's configuration lacks; None for a whole one.

    That of a run made from a foreign network describes the network and no training.
    """
    trained = any(name in config for name in (*_OF_TRAINING, "preview_steps"))
    wanted = (*_OF_NETWORK, *(_OF_TRAINING if trained else ()))
    return next((name for name in wanted if not isinstance(config.get(name), Mapping)), None)


def _lock(handle: IO[str]) -> None:
    """Lock a file, trying again for a moment: `Run.is_locked` of another process may be asking just now."""
    for wait in (0.01, 0.05, 0.2):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(wait)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def find_run(path: str | int | None, root: Path = RUNS) -> Run:
    """The run at `path`; without one, or for "latest", the newest run below `root` that has a checkpoint.

    Raises:
        UserError: when there is none.
    """
    if path is not None and path != "latest":
        folder = Path(str(path)).expanduser()
        if not folder.is_dir():
            raise UserError(f"run={path} does not exist: give the folder of a run, or leave run= out for the newest")
        return Run(folder)
    files = root.glob("**/checkpoints/step-*.pt")
    folders = {file.parent.parent for file in files if not _hidden(file.relative_to(root))}
    if not folders:
        raise UserError(f"there is no run to use in {root.resolve()}: train one with python -m sde.train, or give run=")
    return Run(max(folders, key=lambda folder: max(f.stat().st_mtime for f in folder.glob("checkpoints/step-*.pt"))))


def _hidden(path: Path) -> bool:
    """Whether it lies in a hidden folder, such as what an interrupted removal leaves."""
    return any(part.startswith(".") for part in path.parts)


def open_checkpoint(run: Run, which: str | int) -> Checkpoint:
    """The checkpoint `which` of a run: "latest", "best", a step, or the path of a file.

    The best one has the lowest value of the metric that `training.keep_best` names, or else of val/loss. The folder of
    an exported model (`sde.interop.export`) has one, which is its latest.

    Raises:
        UserError: when there is none, or the one asked for by name is damaged. A damaged newest one is passed over,
            which is said on standard error.
    """
    if which == "latest" and is_exported(run.path):
        return read_folder(run.path)
    if which == "latest":
        return load_newest(run.checkpoints)
    if which == "best":
        return load_checkpoint(_best(run))
    if str(which).isdigit():
        steps = dict(list_checkpoints(run.checkpoints))
        if int(which) not in steps:
            known = ", ".join(str(step) for step in sorted(steps)) or "none"
            raise UserError(f"checkpoint={which} is not one of the steps that {run.path} has: {known}")
        return load_checkpoint(steps[int(which)])
    return load_checkpoint(Path(str(which)).expanduser())


def _best(run: Run) -> Path:
    """The checkpoint with the lowest value of the metric by which a run tells them apart."""
    name = (run.config().get("training") or {}).get("keep_best") or "val/loss"
    known = dict(list_checkpoints(run.checkpoints))
    step = best_step(known, read_metrics(run.metrics) if run.metrics.exists() else [], name)
    if step is None:
        raise UserError(
            f"checkpoint=best: {name} was measured at none of the checkpoints that {run.path} has: use latest, or "
            f"train with training.keep_best={name}, which measures it at each"
        )
    return known[step]


def build_denoiser(config: Mapping[str, Any], info: DataInfo) -> Denoiser:
    """An untrained denoiser as the configuration describes it, for data as `info` describes it.

    Raises:
        UserError: a value that cannot be, or parts that do not fit together.
    """
    num_classes = info.num_classes if config.get("conditional", False) else 0
    if config.get("conditional", False) and num_classes == 0:
        raise UserError(f"conditional=true needs labels and {info.name} has none: use conditional=false")
    network = build(config["model"], "model", shape=info.shape, num_classes=num_classes)
    sde = build(config["sde"], "sde")
    parameterization = build(config["parameterization"], "parameterization")
    denoiser = Denoiser(network, sde, parameterization)
    ends = torch.tensor([0.0, sde.T], dtype=torch.float64)
    noise = parameterization.c_noise(sde, ends, denoiser.label_kind)  # refuses a label that the network does not know
    if hasattr(network, "check_noise"):
        network.check_noise(noise)
    return denoiser


def ema_options(node: Any) -> EMAOptions:
    """Which averages a run keeps, from `ema` of its configuration; old ones have a decay and a warm-up alone.

    Raises:
        UserError: an option that there is not, or a value of the wrong type or range.
    """
    return options_of(EMAOptions, node, "ema")


def check_ema(value: object) -> None:
    """Raise `UserError` unless `ema=value` can mean something: true, false or the name of an average."""
    if not isinstance(value, bool | int | float | str) or (not isinstance(value, bool) and average_name(value) is None):
        raise UserError(
            f"ema={value!r} must be true or false, or an average that the run keeps, such as 0.9999 or std0.05"
        )


def chosen_weights(checkpoint: Checkpoint, ema: bool | float | str) -> Mapping[str, torch.Tensor]:
    """The weights of a checkpoint that `ema` means.

    Args:
        checkpoint: an opened checkpoint.
        ema: True for its first average, False for the last weights, or the name of any average: its decay (0.9999) or
            its relative width ("std0.05").

    Raises:
        UserError: when the checkpoint does not have them.
    """
    check_ema(ema)
    known = averages_of(checkpoint.content)
    if ema is True:
        return checkpoint.content["ema"]
    if ema is False:
        last = checkpoint.content.get("model")
        if last is None:
            raise UserError(f"{checkpoint.path} has averaged weights alone: use ema=true")
        return last
    name = average_name(ema)
    if name not in known:
        named = [name for name in known if name != "ema"]
        those = f"ema=true for the first, or one of {', '.join(named)}" if named else "ema=true for the only one"
        raise UserError(f"ema={ema} is not an average in {checkpoint.path}: use {those}{suggest(name, named)}")
    return known[name]


def restore_denoiser(checkpoint: Checkpoint, *, ema: bool | float | str = True) -> tuple[Denoiser, DataInfo]:
    """The trained denoiser of a checkpoint, in evaluation mode, and the facts about its data.

    Args:
        checkpoint: an opened checkpoint; it holds the configuration that describes its network.
        ema: which weights, as `chosen_weights` has it; the first average unless told otherwise.

    Raises:
        UserError: when there are no such weights, or they do not fit the network that the configuration describes.
    """
    weights = chosen_weights(checkpoint, ema)
    info = DataInfo.from_dict(checkpoint.content["data"])
    denoiser = build_denoiser(checkpoint.content["config"], info)
    try:
        denoiser.network.load_state_dict(weights)
    except (RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{checkpoint.path} does not fit its own configuration ({reason}): take another one") from error
    return denoiser.eval().requires_grad_(False), info


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, git revision, device and command line, for the record."""
    packages = ("torch", "numpy", "scipy", "hydra-core", "omegaconf", "pillow", "matplotlib", "wandb")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in ("sde", *packages)},
        "git": _git_revision(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of the checkout that the package runs from, with "+changes" when it differs from it."""

    def git(*arguments: str) -> str:
        here = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    runpy.run_module("sde.runs_table", run_name="__main__")
