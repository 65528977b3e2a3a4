"""Room on the disk: old checkpoints, runs that never got one, and runs that nobody needs any more.

Nothing goes unless `yes=true` is given. What is being trained is left alone (its lock is held), and so is whatever is
no run, lies outside the folder of runs, or is reached through a link. A run without a checkpoint stays where there is a
file in it that training does not write, unless it is named. A run is renamed to a hidden `.trash-...` before
its files are deleted one by one: a removal that is interrupted leaves nothing that looks like a run, and the next one
finishes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sde.errors import UserError
from sde.runs_summary import Summary, bytes_below, named_run, readable_age, readable_bytes
from sde.training.checkpoint import list_checkpoints

TRASH = ".trash-"
_TRASH = re.compile(re.escape(TRASH) + r".+-[0-9a-f]{8}")  # of this command; others have hidden folders too
_BEGINNING = r"(config\.yaml|data\.json|environment\.json|metrics\.jsonl)"
_WRITTEN = re.compile(  # what a training writes that has not come to a checkpoint, or was killed as it wrote
    rf"{_BEGINNING}|\.{_BEGINNING}\..*|\.lock|checkpoints/\.step-.*|previews/\.?step-.*|ema/\.?snapshot-.*"
    r"|wandb-(id|step)\.txt|(wandb|\.hydra)/.*"
)
_RECENT = 3600.0  # seconds without a line of metrics after which a run that has a lock file counts as dead


@dataclass(frozen=True)
class Removal:
    """What is to go from one place.

    Args:
        text: for the user.
        paths: files of a run; or one folder, which is the run or what an interrupted removal left of one.
        size: their bytes.
        run: whose lock is held meanwhile; None for what is left of one.
        unused: whether it goes because there is nothing in it that is of use.
    """

    text: str
    paths: tuple[Path, ...]
    size: int
    run: Summary | None = None
    unused: bool = False


def prune(root: Path, found: Sequence[Summary], chosen: Sequence[Summary], config: Mapping[str, Any]) -> None:
    """Say what goes by the rule `config["prune"]`, and remove it if `config["yes"]`.

    Args:
        root: the folder of all runs.
        found: the runs in it.
        chosen: those that the options state, match and older_than leave.
        config: the options.

    Raises:
        UserError: for a rule that is none, or a run that is not there.
    """
    root, freed = root.resolve(), 0
    removals = [*planned(found, chosen, config), *left_over(root)]
    for removal in removals:
        if config["yes"] and not remove(root, removal):
            print(f"left {removal.text}: somebody has begun to use it")
            continue
        freed += removal.size
        print(f"{'removed' if config['yes'] else 'would remove'} {removal.text}, {readable_bytes(removal.size)}")
    if not removals:
        print("there is nothing to remove")
    elif config["yes"]:
        print(f"freed {readable_bytes(freed)}")
    else:
        print(f"this would free {readable_bytes(freed)}: add yes=true to do it")


def planned(found: Sequence[Summary], chosen: Sequence[Summary], config: Mapping[str, Any]) -> Iterator[Removal]:
    """What the rule takes from each run; runs in use are named and left out."""
    rule = config["prune"]
    if rule == "checkpoints":
        candidates = [run for run in chosen if old_checkpoints(run, config["keep"])]
    elif rule == "empty":
        candidates = [run for run in chosen if run.checkpoint is None]
    elif isinstance(rule, list) and rule:
        named = list(dict.fromkeys(named_run(found, str(name), "prune") for name in rule))
        candidates = [run for run in named if run in chosen]
        for run in named:
            if run not in chosen:
                print(f"left {run.name}: state=, match= or older_than= leave it out")
    else:
        raise UserError(f"prune={rule!r} is no rule: it is checkpoints, empty, or a list of runs as in prune=[RUN,RUN]")
    for run in candidates:
        reason = why_left(run) or (why_used(run) if rule == "empty" else None)
        if reason is not None:
            print(f"left {run.name}: {reason}")
        elif rule == "checkpoints":
            yield checkpoints_of(run, config["keep"])
        else:
            yield whole(run, unused=rule == "empty")


def why_left(run: Summary) -> str | None:
    """Why nothing may be removed from a run; None if it may."""
    if run.state == "running":
        return "it is being trained"
    if (run.run.path / ".lock").exists() and run.age < _RECENT:
        return f"it has a lock file and was written {readable_age(run.age)} ago, perhaps by another machine"
    if run.part("sde") is None or run.part("model") is None:
        return "its config.yaml is not that of a run"
    if run.run.checkpoints.is_symlink():
        return "its checkpoints are a link to somewhere else"
    return None


def why_used(run: Summary) -> str | None:
    """Why a run without a checkpoint may be of use; None if it is not."""
    names = others(run.run.path)
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"it holds more than what a run without a checkpoint is made of: {some}" if names else None


def others(folder: Path) -> list[str]:
    """What lies in a run's folder that a training which has not come to a checkpoint does not write; links too."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name).relative_to(folder).as_posix() for name in (*links, *files)]
    return sorted(name for name in found if not _WRITTEN.fullmatch(name))


def old_checkpoints(run: Summary, keep: int) -> list[tuple[int, Path]]:
    """The checkpoints but the newest `keep` and those that are protected."""
    old, protected = list_checkpoints(run.run.checkpoints)[:-keep], run.protected()
    return [(step, path) for step, path in old if step not in protected and not path.is_symlink()]


def checkpoints_of(run: Summary, keep: int) -> Removal:
    """The old checkpoints of a run."""
    old = old_checkpoints(run, keep)
    steps = ", ".join(str(step) for step, _ in old[:4]) + (", ..." if len(old) > 4 else "")
    count = len(list_checkpoints(run.run.checkpoints))
    text = f"{len(old)} of {count} checkpoints of {run.name} ({steps})"
    return Removal(text, tuple(path for _, path in old), sum(path.stat().st_size for _, path in old), run)


def whole(run: Summary, unused: bool) -> Removal:
    """A run with all that is in it."""
    at = f"{run.state}, step {run.step}" + (f" of {run.steps}" if run.steps is not None else "")
    return Removal(f"the run {run.name} ({at})", (run.run.path,), run.size, run, unused)


def left_over(root: Path) -> list[Removal]:
    """What removals that were interrupted have left."""
    found = []
    for folder, names, _ in os.walk(root):
        trash = [Path(folder, name) for name in names if _TRASH.fullmatch(name)]
        is_run = os.path.exists(os.path.join(folder, "config.yaml"))
        names[:] = [] if is_run else [name for name in names if not name.startswith(".")]
        found += [
            Removal(f"{path.relative_to(root)}, the rest of a removal", (path,), bytes_below(path))
            for path in trash
            if not path.is_symlink()
        ]
    return found


def remove(root: Path, removal: Removal) -> bool:
    """Remove it, unless its run has been taken up since; whether it is gone."""
    if removal.run is None:
        shutil.rmtree(removal.paths[0])
        return True
    path = removal.run.run.path
    assert path == path.resolve(), path
    assert root in path.parents, path
    if not (path / "config.yaml").is_file():
        return False
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(removal.run.run.locked())
        except UserError:
            return False
        if removal.paths != (path,):
            for file in removal.paths:
                file.unlink(missing_ok=True)
            return True
        if removal.run.checkpoint is None and list_checkpoints(removal.run.run.checkpoints):
            return False
        if removal.unused and others(path):
            return False
        trash = path.with_name(f"{TRASH}{path.name}-{secrets.token_hex(4)}")
        path.rename(trash)
    (trash / "config.yaml").unlink(missing_ok=True)
    shutil.rmtree(trash)
    for parent in path.parents:
        if parent == root or not _removed(parent):
            break
    return True


def _removed(folder: Path) -> bool:
    """Remove a folder if it is empty."""
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
