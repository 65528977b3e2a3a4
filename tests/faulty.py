"""Trainings that go wrong on purpose: `python -m tests.faulty` forks off processes that run a command line.

Importing PyTorch takes seconds, forking a process that has done so takes none. Each job is a process of its own, to be
killed and to be sent signals; what happens to it from inside (`Plan`) happens at a step and not at a time, so that the
load of the machine does not matter.

As a plugin this module holds a loss that goes wrong.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde.losses import LOSSES, DenoisingScoreMatching
from tests.commands import Answer

PATIENCE = 300.0  # seconds within which anything must have happened, on whatever machine


@LOSSES.register("faulty")
@dataclass(frozen=True)
class FaultyLoss(DenoisingScoreMatching):
    """Denoising score matching that fails in some steps.

    Args:
        how: "loss" has an infinite loss with a finite gradient, "gradient" a gradient that is no number with a finite
            loss, "both" neither; "memory" asks for more memory than there is, "device" fails as a GPU does.
        steps: in which, counted by this process.
    """

    how: str = "both"
    steps: tuple[int, ...] = ()
    _made: list[int] = field(default_factory=list, init=False, compare=False)

    def draw_times(self, sde: Any, n: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        self._made.append(len(self._made))
        return super().draw_times(sde, n, generator, device)

    def at(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        loss, error = super().at(*arguments, **named)
        if self._made[-1] not in self.steps:
            return loss, error
        if self.how == "memory":
            torch.empty(2**48, dtype=torch.uint8)
        if self.how == "device":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        if self.how == "gradient":
            loss.register_hook(lambda gradient: gradient * torch.nan)
        if self.how == "loss":
            loss = loss + torch.inf
        return (loss * torch.nan if self.how == "both" else loss), error


@dataclass(frozen=True)
class Plan:
    """What happens to a training.

    Args:
        kill: (save, event): the process kills itself (SIGKILL) at that event of that checkpoint that it writes, or at
            the end of it, where there are fewer. Both are counted from 0, or the event is the first of a kind: "write"
            to the file, "synced", "renaming", "renamed", "removed" (an older one), "end".
        signals: (where, step, number): sends itself a signal: "picture" (while it is prepared), "announce", "step",
            "validate", "preview", "save" (in the middle of writing); of the first two the step is of no account.
        fill: (from, to): steps after which a file takes all the space of the disk that the run is on, until it goes.
        refuse: (where, from, to, errno): writing a checkpoint fails, in "write" or "fsync", from a step to another.
        memory: bytes of address space that it may take beyond what it has.
        environment: variables.
    """

    kill: tuple[int, int | str] | None = None
    signals: tuple[tuple[str, int, int], ...] = ()
    fill: tuple[int, int] | None = None
    refuse: tuple[str, int, int, int] | None = None
    memory: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class Trainings:
    """The process that forks, seen from the tests; one job at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faulty"],
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = 0

    def start(self, module: str, *words: str, folder: Path, plan: Plan | None = None) -> None:
        """Start `python -m module words` in `folder`."""
        for name in ("out", "err", "progress"):
            (self._folder / name).write_bytes(b"")
        job = {"module": module, "words": words, "folder": str(folder), "notes": str(self._folder)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**job, "plan": asdict(plan or Plan())}) + "\n")
        self._process.stdin.flush()
        self.pid = self._answer()

    def end(self) -> Answer:
        """Wait for the end; the code is negative after a signal, as `subprocess` has it."""
        code = self._answer()
        return Answer(code, (self._folder / "out").read_text(), (self._folder / "err").read_text())

    def run(self, module: str, *words: str, folder: Path, plan: Plan | None = None) -> Answer:
        """Both."""
        self.start(module, *words, folder=folder, plan=plan)
        return self.end()

    def progress(self) -> list[tuple[str, int]]:
        """What the process has noted: ("step", n) made, ("saving", n) and ("saved", n)."""
        lines = (self._folder / "progress").read_text().split("\n")[:-1]
        return [(line.split()[0], int(line.split()[1])) for line in lines]

    def wait_for(self, what: str, least: int) -> None:
        """Wait until that has been noted with a number of at least `least`."""
        wait_until(lambda: any(name == what and number >= least for name, number in self.progress()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until something holds, or fail."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


# In the process that forks, and in those that it forks off


def main() -> None:
    """Read jobs, a line each, and answer each with a line for its process and one for its end."""
    for name in ("sde.train", "sde.sample", "sde.data.images"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            answers.close()
            work(json.loads(line))
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def work(job: Mapping[str, Any]) -> None:
    """Run a command line, and leave."""
    notes = Path(job["notes"])
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(notes / name, os.O_WRONLY | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        os.chdir(job["folder"])
        os.environ.update(job["plan"]["environment"])
        sys.argv = [f"{job['module']}.py", *job["words"]]
        arrange(Plan(**job["plan"]), notes / "progress")
        importlib.import_module(job["module"]).main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Watched:
    """A file, of which every write is an event."""

    def __init__(self, file: Any, event: Callable[[], None]) -> None:
        self._file, self._event = file, event

    def write(self, content: Any) -> int:
        self._event()
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def arrange(plan: Plan, progress: Path) -> None:
    """Let in this process happen what the plan says."""
    from sde import files, train, train_hooks
    from sde.data import images
    from sde.training import checkpoint, loop

    notes = progress.open("ab", buffering=0)
    state = {"step": 0, "saves": -1, "events": 0}

    def note(what: str, number: int) -> None:
        notes.write(f"{what} {number}\n".encode())

    def event(kind: str) -> None:
        if plan.kill is not None and state["saves"] == plan.kill[0] and plan.kill[1] in (kind, state["events"]):
            os.kill(os.getpid(), signal.SIGKILL)
        state["events"] += 1
        if kind == "write":
            refuse(plan, "write", state["step"])
            send(plan, "save", state["step"])

    def end(_run: Any, content: Any, *_: Any) -> None:
        event("end")
        if plan.kill is not None and state["saves"] == plan.kill[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        note("saved", content["step"])

    @contextlib.contextmanager
    def watched_write(path: Path) -> Iterator[Watched]:
        with files.atomic_write(path) as file:
            yield Watched(file, lambda: event("write"))

    def around(owner: Any, name: str, before: Callable[..., None] | None, after: Callable[..., None] | None) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            if before is not None:
                before(*arguments)
            result = original(*arguments, **named)
            if after is not None:
                after(*arguments)
            return result

        setattr(owner, name, wrapped)

    def made(trainer: Any) -> None:
        state["step"] = trainer.step
        note("step", trainer.step)
        send(plan, "step", trainer.step)
        if plan.fill is not None and plan.fill[0] <= trainer.step < plan.fill[1]:
            fill_up(Path(FILLER))
        elif plan.fill is not None:
            Path(FILLER).unlink(missing_ok=True)

    def begin(_run: Any, content: Any, *_: Any) -> None:
        state["saves"] += 1
        state["events"] = 0
        note("saving", content["step"])

    checkpoint.atomic_write = watched_write
    around(loop.Trainer, "make_step", None, made)
    around(train_hooks, "write_checkpoint", begin, end)
    around(images.Images, "_decode", lambda *_: send(plan, "picture", 0), None)
    around(train, "announce", lambda *_: send(plan, "announce", 0), None)
    around(train_hooks, "draw_preview", lambda *_: send(plan, "preview", state["step"]), None)
    around(train.Validation, "__call__", lambda *_: send(plan, "validate", state["step"]), None)
    around(
        files, "sync", lambda path: refuse(plan, "fsync", state["step"], path), lambda p: saving(p) and event("synced")
    )
    around(Path, "replace", lambda p, _: saving(p) and event("renaming"), lambda p, _: saving(p) and event("renamed"))
    around(Path, "unlink", None, lambda path, *_: kept(path) and event("removed"))
    if plan.memory is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + plan.memory, resource.RLIM_INFINITY))


FILLER = "filler"


def saving(path: Path) -> bool:
    """Whether it is the temporary file of a checkpoint."""
    return path.name.startswith(".step-") and path.parent.name == "checkpoints"


def kept(path: Path) -> bool:
    """Whether it is a checkpoint."""
    return path.name.startswith("step-") and path.parent.name == "checkpoints"


_SENT: set[int] = set()


def send(plan: Plan, where: str, step: int) -> None:
    """Send this process the signals of the plan for here and now, once."""
    for index, (place, when, number) in enumerate(plan.signals):
        if place == where and (when == step or where in ("picture", "announce")) and index not in _SENT:
            _SENT.add(index)
            os.kill(os.getpid(), number)


def refuse(plan: Plan, where: str, step: int, path: Path | None = None) -> None:
    """Fail as the system does, if that is the plan."""
    if plan.refuse is None or (path is not None and not saving(path)):
        return
    place, first, last, number = plan.refuse
    if place == where and first <= step < last:
        raise OSError(number, os.strerror(number))


def fill_up(path: Path) -> None:
    """Write to a file until the disk is full."""
    with path.open("ab", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


if __name__ == "__main__":
    main()
