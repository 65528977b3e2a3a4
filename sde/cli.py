"""What every command line shares: Hydra composes, the command runs, and errors become one sentence.

A mistake of the user (`UserError`, an override that Hydra refuses, a file that cannot be written) is printed as one
sentence on standard error with exit code 2, or 1 where the machine and not the input was at fault (no space, no
permission). Ctrl-C leaves with 130. Anything else is a fault of the package and shows its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sde.config import closest_key, conf_dir, import_plugins, plain
from sde.errors import UserError, check_choice, suggest

RESUMABLE = "training, ema, optimizer and logger, and preview_steps"
Command = Callable[[dict[str, Any]], None]


class Interrupted(Exception):
    """The user or the system asked a command to stop; what was to be saved has been.

    Args:
        message: what to tell the user.
        code: the exit code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run_command(name: str, command: Command) -> None:
    """Compose `conf/<name>.yaml` with the overrides in `sys.argv`, call `command` with plain values, and exit.

    Args:
        name: of the configuration file, without ending.
        command: receives the resolved configuration.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come here whole, and are made readable here
    sys.argv[1:] = [quoted(word) for word in sys.argv[1:]]

    failures: list[BaseException] = []
    folders: list[Path] = []

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)
    def entry(config: DictConfig) -> None:
        if failures:  # an earlier job of a multirun
            return
        folders.append(Path(output_dir()))
        try:
            settings = plain(config)
            import_plugins(settings.pop("plugins", None) or [])
            command(settings)
        except BaseException as error:  # Hydra would print lines of its own before passing it on
            failures.append(error)

    try:
        entry()
        _remove_empty(folders)
        if failures:
            raise failures[0]
    except UserError as error:
        _leave(str(error), 2)
    except Interrupted as stop:
        _leave(str(stop), stop.code, prefix="")
    except (HydraException, OmegaConfBaseException) as error:
        _leave(explain_hydra(str(error), name), 2)
    except KeyboardInterrupt:
        _leave("interrupted; nothing was left half-written", 130, prefix="")
    except torch.OutOfMemoryError as error:
        _leave(f"the device is out of memory ({_first_line(error)}): lower the batch size or the size of the model", 1)
    except OSError as error:
        _leave(explain_os(error), 1)


def quoted(word: str) -> str:
    """An override key=value with the value quoted where it is a plain text that Hydra's grammar cannot read.

    The shell has taken away the quotes around paths with spaces or letters beyond ASCII; lists, sweeps,
    interpolations and values with quotes of their own stay as they are.
    """
    key, equals, value = word.partition("=")
    plain_text = equals and not word.startswith("-") and not re.search(r"""['",\[\]{}()$\\]""", value)
    if plain_text and not re.fullmatch(r"[\w.+\-/:%*@?|~]*", value, re.ASCII):
        return f"{key}='{value}'"
    return word


def add_data_overrides() -> None:
    """Let data=NAME and data.OPTION=... in `sys.argv` add to a configuration that has no data set of its own.

    For commands whose data set is the run's: Hydra has nothing there to override.
    """

    def adding(word: str) -> str:
        bare = word.lstrip("+")
        return f"+{bare}" if bare.startswith("data=") else f"++{bare}" if bare.startswith("data.") else word

    sys.argv[1:] = [adding(word) for word in sys.argv[1:]]


def argument(name: str) -> str | None:
    """The value given for `name` on the command line, as Hydra reads it; None for none or null."""
    value: str | None = None
    for word in sys.argv[1:]:
        key, equals, text = word.partition("=")
        if equals and key.lstrip("+") == name:
            value = None if text in ("", "null") else text.strip("'\"")
    return value


def _leave(sentence: str, code: int, prefix: str = "error: ") -> None:
    sys.stdout.flush()
    print(f"{prefix}{sentence}", file=sys.stderr)
    sys.exit(code)


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders that Hydra made for commands that wrote nothing to them."""
    for folder in folders:
        for path in (folder, folder.parent):
            if path.resolve() not in Path.cwd().resolve().parents and path.resolve() != Path.cwd().resolve():
                with contextlib.suppress(OSError):
                    path.rmdir()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def explain_os(error: OSError) -> str:
    """One sentence for a failed file operation."""
    where = f" {error.filename!r}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"no space is left on the device{where}: free some, or choose another folder"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"no permission for{where or ' a file'}: choose a folder that you may write, such as hydra.run.dir=FOLDER"
        )
    return f"{error.strerror or _first_line(error)}{':' + where if where else ''}: check the path"


def explain_hydra(message: str, name: str) -> str:
    """One sentence for an override or configuration that Hydra refused."""
    found = re.search(r"Could not find '([\w/@.]+)/([^'/]+)'", message)
    options = re.search(r"Available options in '[^']+':\s*\n((?:\s+\S+\n?)+)", message)
    if found and options:
        group, choice, names = found[1], found[2], options[1].split()
        return f"{group}={choice} is not one of {', '.join(names)}{suggest(choice, names)}"
    added = re.search(r"Could not override '.*\n?.*To append to your default list use (\+\S+)", message)
    if added:
        return f"{added[1][1:]} has nothing to replace: write {added[1]}"
    key = re.search(r"Could not override '([^']+)'", message) or re.search(r"Key '([^']+)' is not in struct", message)
    if key and argument("resume") is not None:
        return f"there is no option '{key[1]}' to change in the middle of a run: there are those of {RESUMABLE}"
    if key:
        beside, close = closest_key(key[1], _defaults(name))
        hint = f"; did you mean '{close}'?" if close else ""
        return f"there is no option '{key[1]}': there are {', '.join(beside) or 'none below it'}{hint}"
    if "mismatched input" in message or "extraneous input" in message or "missing EQUAL" in message:
        return f"cannot read an option ({_compact(message)}): write key=value, with quotes around special characters"
    if "mandatory value" in message or "Missing mandatory" in message:
        missing = re.search(r"full_key: (\S+)", message) or re.search(r"mandatory value: (\S+)", message)
        return (
            f"the option '{missing[1] if missing else '?'}' needs a value: write {missing[1] if missing else 'key'}=..."
        )
    return _compact(message)


def _compact(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return "; ".join(lines[:2]).rstrip(".")


def _defaults(name: str) -> Mapping[str, Any]:
    """The composed configuration with the chosen files of each group, and no other overrides."""
    groups = [word for word in sys.argv[1:] if (conf_dir() / word.split("=", 1)[0].split("@")[0]).is_dir()]
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose(name, overrides=groups), resolve=False)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def output_dir() -> str:
    """The folder that Hydra made for this command."""
    return HydraConfig.get().runtime.output_dir


def choices() -> dict[str, str]:
    """Which file was chosen for each configuration group."""
    return {str(group): str(choice) for group, choice in HydraConfig.get().runtime.choices.items()}


def group_file(group: str, name: str) -> dict[str, Any]:
    """The options in `conf/<group>/<name>.yaml`, those of the files it rests on filled in.

    Raises:
        UserError: when there is no such file.
    """
    known = GlobalHydra.instance().config_loader()  # with the folders of --config-dir
    check_choice(group, name, known.get_group_options(group))
    node = plain(hydra.compose(f"{group}/{name}"))
    return node.get(group, node)


def task_overrides() -> list[str]:
    """The overrides given on the command line, as written."""
    return list(HydraConfig.get().overrides.task)
