"""Which folder `python -m sde.train` works in, and with which configuration a run goes on."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sde.cli import RESUMABLE, argument, choices, in_quotes, task_overrides
from sde.distributed import (
    is_main,
    on_main,
    remembered,
)
from sde.errors import UserError
from sde.runs import Run, find_run
from sde.training.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_newest,
    set_aside,
)
from sde.training.loop import Trainer
from sde.training.options import TrainingOptions

_SECTIONS = ("training", "ema", "optimizer", "schedule", "logger", "preview_solver", "preview_steps")  # may change


def choose_folder() -> None:
    """Tell Hydra the folder of a run that goes on, which has to exist before Hydra would make one of that name.

    That is the run that `resume=` names, or the one that torchrun has started again.

    Raises:
        UserError: when there is no such run.
    """
    wanted = argument("resume")
    before = remembered("run")
    if before is not None:
        folder = before
        if wanted is None:
            sys.argv.append("resume=auto")
    elif wanted is None or wanted == "auto":
        option = "hydra.sweep.dir" if {"-m", "--multirun"} & set(sys.argv) else "hydra.run.dir"
        if wanted == "auto" and argument(option) is None:
            raise UserError(f"resume=auto goes on in the folder that {option}=FOLDER names: give it")
        return
    else:
        if {"-m", "--multirun"} & set(sys.argv):
            raise UserError("resume= goes on with one run: leave --multirun out")
        folder = str(find_run(wanted).path)
        sys.argv[1:] = [addressed_to_run(word) for word in sys.argv[1:]]
    sys.argv.append(f"hydra.run.dir={in_quotes(folder)}")


def addressed_to_run(word: str) -> str:
    """An override as Hydra takes it for a run of another schedule, optimizer or logger than this command's own."""
    bare = word.lstrip("+")
    if bare.startswith("resume="):
        return bare
    return f"++{bare}" if bare.startswith(("schedule.", "optimizer.", "logger.", "preview_solver.")) else word


def as_written(folder: Path) -> Path:
    """`folder` as seen from where the command was given, if it lies there."""
    here = Path.cwd().resolve()
    return folder.relative_to(here) if folder.is_relative_to(here) and folder != here else folder


def settle(run: Run, config: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The configuration to train with, and whether the run goes on.

    Raises:
        UserError: when the folder holds a run and none was to be resumed, or what was asked for cannot change.
    """
    wanted = config.pop("resume", None)
    known = bool(list_checkpoints(run.checkpoints))
    if wanted is None and known:
        raise UserError(f"{run.path} holds a run already: use resume={run.path}, resume=auto, or another hydra.run.dir")
    if wanted == "auto":
        return (same_run(run, config), True) if known else (config, False)
    return (config, False) if wanted is None else (resumed_config(run), True)


def resumed_config(run: Run) -> dict[str, Any]:
    """The run's own configuration with this command's overrides, which may concern how it is trained and no more."""
    config = with_new_options(run.config())
    groups = choices()
    for override in task_overrides():
        override = override.lstrip("+")
        key, _, value = override.partition("=")
        if key in ("resume", "plugins") or key.startswith("hydra"):
            continue
        if key in groups or not key.startswith(("training.", "ema.", "optimizer.", "schedule.", "logger.", "preview_")):
            raise UserError(
                f"{override} cannot change in the middle of a run, where only the options of {RESUMABLE} can: "
                "leave it out, or train a new run"
            )
        settings = OmegaConf.create(config)
        OmegaConf.set_struct(settings, True)
        if OmegaConf.select(settings, key, default=...) is ...:
            raise UserError(f"{override}: {run.path / 'config.yaml'} has no option {key}")
        OmegaConf.update(settings, key, OmegaConf.from_dotlist([f"v={value}"])["v"])
        assert isinstance(settings, DictConfig)
        config = {str(k): v for k, v in OmegaConf.to_container(settings).items()}  # type: ignore[union-attr]
    return config


def with_new_options(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration with the options that there were not yet when it began, at their defaults."""
    config = {**config, "schedule": config.get("schedule", {"_target_": "sde.training.schedules.Constant"})}
    known = {name: value for name, value in vars(TrainingOptions()).items() if name not in config["training"]}
    return {**config, "training": {**config["training"], **known}}


def same_run(run: Run, config: dict[str, Any]) -> dict[str, Any]:
    """The run's own configuration with the sections of `config` that may change in the middle of a run.

    Raises:
        UserError: when `config` differs from the run's own in any other.
    """
    own = with_new_options(run.config())
    for key, value in config.items():
        found = None if key in _SECTIONS else first_difference(key, value, own.get(key))
        if found is not None:
            raise UserError(
                f"resume=auto: {run.path} holds a run with {found[0]}={found[2]} and not {found[1]}: give the same "
                "options as before, or another hydra.run.dir"
            )
    settings = {**own, **{key: config[key] for key in _SECTIONS if key in config}}
    if settings["training"]["batch_size"] == "auto":
        settings["training"] = {**settings["training"], "batch_size": own["training"]["batch_size"]}
    return settings


def first_difference(name: str, wanted: Any, own: Any) -> tuple[str, Any, Any] | None:
    """Where two configurations differ first: option, value wanted and own value; "auto" has become a number."""
    if isinstance(wanted, Mapping) and isinstance(own, Mapping):
        keys = [*wanted, *(key for key in own if key not in wanted)]
        found = (first_difference(f"{name}.{key}", wanted.get(key), own.get(key)) for key in keys)
        return next((difference for difference in found if difference is not None), None)
    return None if wanted == own or wanted == "auto" else (name, wanted, own)


def go_on(run: Run, trainer: Trainer) -> bool:
    """Load the newest whole checkpoint; whether there is anything left to do.

    Damaged newer ones are renamed, so that nobody takes them for good again.
    """
    path = on_main(lambda: str(load_newest(run.checkpoints).path))
    checkpoint = load_checkpoint(Path(path))
    try:
        trainer.load_state(checkpoint.content)
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{checkpoint.path} does not fit the run's config.yaml ({reason}): restore it") from error
    if trainer.step >= trainer.options.steps:
        return False
    if is_main():
        set_aside(run.checkpoints, trainer.step)
        if "skipped" not in checkpoint.content:
            print(
                f"warning: {run.path} was begun with an earlier version: its steps go on with other random draws",
                file=sys.stderr,
            )
    return True
