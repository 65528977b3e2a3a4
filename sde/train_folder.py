"""Which folder `python -m sde.train` works in, and with which configuration a run goes on."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sde.cli import RESUMABLE, argument, choices, group_file, in_quotes, task_overrides
from sde.distributed import (
    is_main,
    on_main,
    remembered,
)
from sde.errors import UserError
from sde.runs import Run, find_run, lacking
from sde.training.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_newest,
    set_aside,
)
from sde.training.loop import Trainer
from sde.training.options import TrainingOptions

_SECTIONS = ("training", "ema", "optimizer", "schedule", "logger", "preview_solver", "preview_steps")  # may change
_HARMLESS = re.compile(r"\..*|multirun\.yaml|slurm-.*|.*\.(log|out|err)|logs|wandb")  # beside which a run may begin


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
    """The configuration to train with, and whether the run goes on; to be asked for with the run's lock held.

    Raises:
        UserError: when the folder holds a run and none was to be resumed, or something else than a run, or what was
            asked for cannot change.
    """
    wanted = config.pop("resume", None)
    known = bool(list_checkpoints(run.checkpoints))
    if wanted is None and known:
        raise UserError(f"{run.path} holds a run already: use resume={run.path}, resume=auto, or another hydra.run.dir")
    if wanted is None or (wanted == "auto" and not known):
        check_free(run)
        return config, False
    return (same_run(run, config) if wanted == "auto" else resumed_config(run)), True


def check_free(run: Run) -> None:
    """Raise `UserError` where a run is to begin among files that no run has written."""
    if is_begun(run):
        return
    names = sorted(path.name for path in run.path.iterdir() if not _HARMLESS.fullmatch(path.name))
    if names:
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(f"{run.path} is no run and holds {some}: choose another hydra.run.dir, such as a new folder")


def is_begun(run: Run) -> bool:
    """Whether a training has begun in the folder, which may have ended before its first checkpoint."""
    if all((run.path / name).is_file() for name in ("config.yaml", "data.json", "environment.json")):
        return True
    try:
        return lacking(run.config()) is None
    except UserError:
        return False


def own_config(run: Run) -> dict[str, Any]:
    """The configuration of a run; the copy in its newest checkpoint where config.yaml is damaged, which is said.

    Raises:
        UserError: when that cannot be read either.
    """
    try:
        config = run.config()
        missing = lacking(config)
        if missing is not None:
            file = run.path / "config.yaml"
            raise UserError(f"{file} is damaged (it has no {missing}): restore it (a checkpoint holds a copy)")
    except UserError as error:
        damage = str(error).rpartition(": ")[0]
        try:
            checkpoint = load_newest(run.checkpoints)
        except UserError:
            raise error from None
        config = checkpoint.content["config"]
        if lacking(config) is not None:
            raise
        print(f"warning: {damage}: taking the copy in {checkpoint.path}", file=sys.stderr)
    return with_new_options(config)


def resumed_config(run: Run) -> dict[str, Any]:
    """The run's own configuration with this command's overrides, which may concern how it is trained and no more.

    Raises:
        UserError: when one of them cannot change.
    """
    own = own_config(run)
    config, chosen = dict(own), choices()
    words = [word.lstrip("+") for word in task_overrides()]
    words = [word for word in words if word.partition("=")[0] not in ("resume", "plugins")]
    options = []
    for word in words:
        key = word.partition("=")[0]
        group, _, section = key.partition("@")
        section = section or group
        if key in chosen and section in _SECTIONS:
            config[section] = group_file(group, chosen[key])
        elif key in chosen or section.partition(".")[0] not in _SECTIONS:
            raise UserError(
                f"{word} cannot change in the middle of a run, where only the options of {RESUMABLE} can: "
                "leave it out, or train a new run"
            )
        else:
            options.append(word)
    config = with_options(config, options, run)
    found = changed_identity(config, own)
    if found is not None:
        name, wanted, before = found
        raise UserError(
            f"{name}={wanted} cannot change in the middle of a run, which has {before}: "
            "leave it out, or train a new run"
        )
    return config


def with_options(config: dict[str, Any], words: Sequence[str], run: Run) -> dict[str, Any]:
    """A configuration with the values of overrides such as training.steps=9.

    Raises:
        UserError: for an option that it has not.
    """
    settings, parser = OmegaConf.create(config), OverridesParser.create()
    OmegaConf.set_struct(settings, True)
    for word in words:
        key = word.partition("=")[0]
        if OmegaConf.select(settings, key, default=...) is ...:
            raise UserError(f"{word}: {run.path / 'config.yaml'} has no option {key}")
        OmegaConf.update(settings, key, parser.parse_override(word).value())
    return {str(k): v for k, v in OmegaConf.to_container(settings).items()}  # type: ignore[union-attr]


def changed_identity(config: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """What differs although it is part of what a run is, in a section that may change: option, value wanted, own value.

    The numbers that an optimizer keeps are those of its kind, and the seed decides what every step draws.
    """
    for section, option in (("optimizer", "_target_"), ("training", "seed")):
        wanted, before = (
            node.get(option) if isinstance(node := each.get(section), Mapping) else node for each in (config, own)
        )
        if wanted != before:
            return f"{section}.{option}", wanted, before
    return None


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
    own = own_config(run)
    settings = {**own, **{key: config[key] for key in _SECTIONS if key in config}}
    others = (first_difference(key, value, own.get(key)) for key, value in config.items() if key not in _SECTIONS)
    for found in (*others, changed_identity(settings, own)):
        if found is not None:
            raise UserError(
                f"resume=auto: {run.path} holds a run with {found[0]}={found[2]} and not {found[1]}: give the same "
                "options as before, or another hydra.run.dir"
            )
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
