"""What every command line shares: Hydra composes, the command runs, and errors become one sentence.

A mistake of the user (`UserError`, an override that Hydra refuses, a file that cannot be written) is printed as one
sentence on standard error with exit code 2, or 1 where the machine and not the input was at fault (no space, no
permission). Ctrl-C leaves with 130. Anything else is a fault of the package and shows its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sde.config import closest_key, conf_dir, import_plugins, plain
from sde.distributed import is_main, join, leave, lost_another, printing_on_main, say_once, world
from sde.errors import Fault, UserError, check_choice, suggest
from sde.interrupting import SENTENCE, raise_again

RESUMABLE = "training, ema, optimizer, schedule, logger and the previews"
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


def run_command(name: str, command: Command, *, several: bool = False) -> None:
    """Compose `conf/<name>.yaml` with the overrides in `sys.argv`, call `command` with plain values, and exit.

    In a sweep (`--multirun`) every job is called, in this process or where a launcher of Hydra puts it; one that fails
    does not keep the others from being run, unless it was interrupted.

    Args:
        name: of the configuration file, without ending.
        command: receives the resolved configuration.
        several: whether the processes that torchrun starts can share its work.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come here whole, and are made readable here
    sys.argv[1:] = flags_first([quoted(word) for word in sys.argv[1:]])
    _FAILURES.clear()
    try:
        raise_again()
        if world().size > 1:
            meet_others(name, several)
        job = Job(name, command)
        with printing_on_main():
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(job)()
        if job.error is not None:
            raise job.error
        leave()
    except (Exception, KeyboardInterrupt) as error:
        failure = explain(error, name)
        if failure is None:
            raise
        _FAILURES.append(failure)
    if _FAILURES:
        _leave(_FAILURES)


def meet_others(name: str, several: bool) -> None:
    """Meet the other processes that torchrun has started; rank 0 alone gets a folder from Hydra.

    Raises:
        UserError: when the command works in one process alone.
    """
    if not several:
        raise UserError(f"python -m sde.{name} works in one process: start it without torchrun")
    if {"-m", "--multirun"} & set(sys.argv):
        raise UserError("--multirun starts one run after the other: leave it out, or start it without torchrun")
    join()
    if not is_main():
        sys.argv.append("hydra.run.dir=.")


@dataclass(frozen=True)
class Failure:
    """Why a command ended before its end.

    It enters the list of the process that it arrives in: a job of a sweep may have run in another one, from which
    Hydra's launchers bring back what it returned.

    Args:
        sentence: for the user.
        code: the exit code.
        prefix: stands before the sentence.
    """

    sentence: str
    code: int
    prefix: str = "error: "

    def __str__(self) -> str:
        return f"{self.prefix}{self.sentence}"

    def __reduce__(self) -> tuple[Callable[..., Failure], tuple[str, int, str]]:
        return _received, (self.sentence, self.code, self.prefix)


_FAILURES: list[Failure] = []


def _received(sentence: str, code: int, prefix: str) -> Failure:
    _FAILURES.append(Failure(sentence, code, prefix))
    return _FAILURES[-1]


class Job:
    """What Hydra calls: the command, in the folder that Hydra made for it. Can be sent to another process.

    Args:
        name: of the command.
        command: receives the resolved configuration.

    Attributes:
        error: what it raised, unless it is a job of a sweep: Hydra would print lines of its own before passing it on.
    """

    def __init__(self, name: str, command: Command) -> None:
        self.__module__ = f"sde.{name}"  # Hydra calls the job by the last part
        self.name, self.command, self.words = name, command, sys.argv[1:]
        self.before = folders_before(name)
        self.error: BaseException | None = None
        self.stopped = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "command": importable(self.command)}

    def __call__(self, config: DictConfig) -> Failure | None:
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        folder = Path(output_dir())
        if self.stopped:  # an earlier job of this sweep was interrupted
            _remove_empty(folder, self.before)
            return None
        try:
            with own_arguments() if sweep else contextlib.nullcontext():
                settings = plain(config)
                import_plugins(settings.pop("plugins", None) or [])
                self.command(settings)
        except BaseException as error:
            if not sweep:
                self.error = error
                return None
            if isinstance(error, SystemExit):  # of a launcher, to put the job into the queue again
                raise
            return self.failed(error)
        finally:
            _remove_empty(folder, self.before)
        return None

    def failed(self, error: BaseException) -> Failure:
        """Say at once that a job of a sweep failed, and note it for the end."""
        self.stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        cause = explain(error, self.name)
        if cause is None:
            traceback.print_exception(error)
            cause = Failure(f"{type(error).__name__}: {_first_line(error)}", 1)
        own = [word for word in task_overrides() if word not in self.words]  # what the sweep varies
        which = f"job {HydraConfig.get().job.num}" + (f" ({' '.join(own)})" if own else "")
        failure = _received(f"{which}: {cause.sentence}", cause.code, cause.prefix)
        print(failure, file=sys.stderr, flush=True)
        return failure


def importable(command: Command) -> Command:
    """`command` as other processes can import it, when it stands in the module that this process runs."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if command.__module__ != "__main__" or spec is None:
        return command
    return getattr(importlib.import_module(spec.name), command.__name__, command)


@contextlib.contextmanager
def own_arguments() -> Iterator[None]:
    """The arguments of one job of a sweep in `sys.argv`, in whichever process it runs."""
    before = sys.argv
    sys.argv = [before[0], *task_overrides()]
    try:
        yield
    finally:
        sys.argv = before


def explain(error: BaseException, name: str) -> Failure | None:
    """A sentence and an exit code for what can be explained; None for a fault of the package."""
    if isinstance(error, UserError):
        return Failure(str(error), 2)
    if isinstance(error, Interrupted):
        return Failure(str(error), error.code, prefix="")
    if isinstance(error, HydraException | OmegaConfBaseException):
        return Failure(explain_hydra(str(error), name), 2)
    if isinstance(error, KeyboardInterrupt):
        return Failure(SENTENCE, 130, prefix="")
    if isinstance(error, Fault):
        return Failure(str(error), 1)
    if lost_another(error):
        what = "another process has ended in the middle of the work"
        return Failure(f"{what} ({_first_line(error)}): its reason stands above or below", 1)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        advice = "lower the batch size or the size of the model"
        return Failure(f"out of memory ({_first_line(error)}): {advice}", 1)
    if isinstance(error, OSError):
        return Failure(explain_os(error), 1)
    if type(error).__module__.split(".")[0] in ("joblib", "submitit"):
        return Failure(f"a process of the sweep ended without an answer ({_first_line(error)}): look into its log", 1)
    return None


def flags_first(words: list[str]) -> list[str]:
    """The words of a command line with the overrides last, as Hydra reads `sde=vp,ve --multirun training.steps=9`."""
    return sorted(words, key=lambda word: "=" in word and not word.startswith("-"))


def quoted(word: str) -> str:
    """An override key=value with the value quoted where it is a plain text that Hydra's grammar cannot read.

    The shell has taken away the quotes around paths with spaces, apostrophes or letters beyond ASCII; lists, sweeps,
    interpolations and values that begin with a quote stay as they are.
    """
    key, equals, value = word.partition("=")
    plain_text = equals and not word.startswith("-") and not re.search(r"""^['"]|[,\[\]{}()$\\]""", value)
    if plain_text and not re.fullmatch(r"[\w.+\-/:%*@?|~]*", value, re.ASCII):
        return f"{key}={in_quotes(value)}"
    return word


def in_quotes(text: str) -> str:
    """`text` as Hydra's grammar reads it whatever it holds."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + "\\'" * len(found[2]), text) + "'"


def out_of_quotes(text: str) -> str:
    """What a value means that may stand in quotes; without the quotes that a shell has left alone, if not."""
    quote = text[:1]
    if quote in ("'", '"') and len(text) > 1 and text.endswith(quote):
        return re.sub(rf"(\\+)({quote}|$)", lambda found: found[1][: len(found[1]) // 2] + found[2], text[1:-1])
    return text


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
            value = None if text in ("", "null") else out_of_quotes(text)
    return value


def _leave(failures: list[Failure]) -> None:
    """Exit with the first code that is not 0; jobs of a sweep have said their sentences, which are listed again."""
    sys.stdout.flush()
    for failure in dict.fromkeys(failures):
        if say_once(str(failure)):
            print(failure, file=sys.stderr)
    sys.exit(next((failure.code for failure in failures if failure.code), 0))


def folders_before(name: str) -> set[Path]:
    """The folders that are there before Hydra makes those of this command, which are not this command's to remove."""
    hydra_options = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{name}.yaml"), resolve=False)
    assert isinstance(hydra_options, dict)
    found = set()
    for way in ("run", "sweep"):
        default = {
            "dir": "multirun/${now:}/${now:}",
            "subdir": "${hydra:job.num}",
            **hydra_options["hydra"].get(way, {}),
        }
        folder = argument(f"hydra.{way}.dir") or default["dir"]
        if way == "sweep":
            folder = f"{folder}/{argument('hydra.sweep.subdir') or default['subdir']}"
        found |= {Path(path).resolve() for part in _beginnings(folder) for path in glob.iglob(part)}
    return found


def _beginnings(folder: str) -> list[str]:
    """Patterns of a folder and those around it; what Hydra will fill in may be anything."""
    filled, count = folder, 1
    while count:
        filled, count = re.subn(r"\$\{[^{}]*\}", "\0", filled)
    whole = Path(glob.escape(filled).replace("\0", "*"))
    return [str(path) for path in (whole, *whole.parents)]


def _remove_empty(folder: Path, before: set[Path]) -> None:
    """Remove the folder that Hydra made for a command that wrote nothing to it, and those that it made around it."""
    folder, here = folder.resolve(), Path.cwd().resolve()
    with contextlib.suppress(OSError):
        for path in (folder, *folder.parents):
            if path in before or path == here or path in here.parents:
                return
            path.rmdir()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def explain_os(error: OSError) -> str:
    """One sentence for a failed file operation."""
    where = f" {error.filename!r}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
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
        hint = f" (did you mean '{close}'?)" if close else ""
        return f"there is no option '{key[1]}'{hint}: there are {', '.join(beside) or 'none below it'}"
    unreadable = ("mismatched input", "extraneous input", "missing EQUAL", "token recognition error", "NoViableAlt")
    if any(sign in message for sign in unreadable):
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


def default_settings(name: str) -> dict[str, Any]:
    """The configuration that `conf/<name>.yaml` makes without any overrides."""
    return plain(hydra.compose(name))


def task_overrides() -> list[str]:
    """The overrides given on the command line, as written."""
    return list(HydraConfig.get().overrides.task)
