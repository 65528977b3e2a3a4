"""Several processes without torchrun's seconds: `python -m tests.distributed_worker` forks off worlds of any size.

It imports PyTorch once. Each line that it reads is a job for a number of processes, which are forked off, meet by gloo
and either make trainings of some steps, whose results rank 0 writes to files, or run a command line. When one of them
has ended badly the others have some seconds left, as torchrun would end them at once.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sde.distributed import gather, is_main, join, leave, share_of, world
from tests.small_trainings import Examples, build, configuration

PATIENCE = 120.0  # seconds within which a job must have ended, on whatever machine
LINGERING = 30.0  # seconds that the others have to notice that one is gone


class Worlds:
    """The process that forks, seen from the tests.

    Args:
        folder: where results and what the processes print go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._jobs = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed_worker"],
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, size: int, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make the trainings `cases` (`train_case`) in `size` processes; what rank 0 wrote, by name."""
        notes, codes = self._do({"size": size, "cases": list(cases)})
        printed = "\n".join((notes / f"{rank}.err").read_text() for rank in range(size))
        assert codes == [0] * size, f"{codes}\n{printed}"
        return {case["name"]: torch.load(notes / f"{case['name']}.pt", weights_only=True) for case in cases}

    def command(
        self, size: int, module: str, *words: str, folder: Path, environment: Mapping[str, str] | None = None
    ) -> list[tuple[int, str, str]]:
        """Run `python -m module words` in `size` processes; exit code, standard output and error of each."""
        job = {"module": module, "words": words, "folder": str(folder), "environment": dict(environment or {})}
        notes, codes = self._do({"size": size, **job})
        return [
            (code, (notes / f"{rank}.out").read_text(), (notes / f"{rank}.err").read_text())
            for rank, code in enumerate(codes)
        ]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)

    def _do(self, job: Mapping[str, Any]) -> tuple[Path, list[int]]:
        self._jobs += 1
        notes = self.folder / str(self._jobs)
        notes.mkdir()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**job, "notes": str(notes)}) + "\n")
        self._process.stdin.flush()
        return notes, json.loads(self._process.stdout.readline())


# In the process that forks, and in those that it forks off


def main() -> None:
    """Read jobs, a line each, and answer each with the exit codes by rank."""
    importlib.import_module("torch.distributed.fsdp")
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        agent = os.fork()
        if agent == 0:
            keep_store(port)
        processes: list[int] = []
        for rank in range(job["size"]):
            processes.append(os.fork())
            if processes[-1] == 0:
                answers.close()
                work(job, rank, port)
        codes = ended(processes)
        os.kill(agent, signal.SIGKILL)
        os.waitpid(agent, 0)
        print(json.dumps(codes), file=answers, flush=True)


def keep_store(port: int) -> None:
    """What torchrun's own process does: keep the store by which the others meet."""
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store:
        time.sleep(1)


def ended(processes: Sequence[int]) -> list[int]:
    """The exit codes of processes; those that outlive a failed one for too long are killed, with code -9."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    codes[process] = os.waitstatus_to_exitcode(status)
                    if codes[process]:
                        deadline = min(deadline, time.monotonic() + LINGERING)
                elif time.monotonic() > deadline:
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[process] for process in processes]


def work(job: Mapping[str, Any], rank: int, port: int) -> None:
    """Do one process's part of a job, and leave."""
    notes = Path(job["notes"])
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(notes / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if job["size"] > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["size"], "MASTER_PORT": port}
        named = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ.update({key: str(value) for key, value in here.items()} | named)
    world.cache_clear()
    code = 1
    try:
        if "module" in job:
            run_command_line(job)
        else:
            join()
            for case in job["cases"]:
                result = train_case(case, notes)
                if is_main():
                    torch.save(result, notes / f"{case['name']}.pt")
            leave()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_command_line(job: Mapping[str, Any]) -> None:
    """`python -m module words` in a folder."""
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    sys.path.insert(0, job["folder"])
    sys.argv = [f"{job['module']}.py", *job["words"]]
    importlib.import_module(job["module"]).main()


def train_case(case: Mapping[str, Any], notes: Path) -> dict[str, Any]:
    """Some steps of a training.

    Args:
        case: name; words, of the command line; examples, arguments of `Examples`; steps, up to which; optionally
            optimizer, its section; load, the path of a checkpoint to go on from; watch, whether to validate and draw a
            preview; disturb, whether global generators differ in all processes.
        notes: where a checkpoint is saved too, if it is to be read: case["save"] is its name.

    Returns:
        In rank 0: lines, what is logged of each step; batches, the examples and noise of each step, of all processes;
        state; and of `watch` validation and preview.
    """
    sections = {"optimizer": case["optimizer"]} if "optimizer" in case else {}
    config = configuration(*case["words"], **sections)
    dataset = Examples(**{key: tuple(v) if isinstance(v, list) else v for key, v in case["examples"].items()})
    trainer = build(config, dataset)
    if "load" in case:
        trainer.load_state(torch.load(case["load"], weights_only=True))
    lines, batches = [], []
    while trainer.step < case["steps"]:
        if case.get("disturb"):
            torch.manual_seed(100 * trainer.step + world().rank)
        parts = gather((*trainer.batches(trainer.step), trainer.batches.noise(trainer.step, "noise of the examples")))
        batches.append([torch.cat([part[i] for part in parts]) for i in (0, 1, 2) if parts and parts[0][i] is not None])
        trainer.make_step()
        lines.append(trainer.flush(str))
    found = {"lines": lines, "batches": batches, "state": trainer.state()}
    if case.get("watch"):
        found |= watch(trainer, dataset)
    if "save" in case:
        path = Path(case["save"])
        content = {"config": config, "data": dataset.info.to_dict(), **found["state"]}
        if is_main():
            save_as(content, path)
    return found


def save_as(content: Mapping[str, Any], path: Path) -> None:
    """A checkpoint under a name of its own."""
    from sde.training.checkpoint import save_checkpoint

    save_checkpoint(path.parent, content).replace(path)


def watch(trainer: Any, dataset: Examples) -> dict[str, Any]:
    """Validation and preview."""
    from sde.sampling import Plan, make_times
    from sde.solvers import SOLVERS
    from sde.train_hooks import draw_preview
    from sde.training.validation import Validation

    labeled = trainer.batches.labels is not None
    validation = Validation(dataset, trainer.options, trainer.device, labeled)
    values = validation(trainer.averaged, trainer.loss, trainer.denoiser)
    solver = SOLVERS.get("heun")()
    times = make_times(solver, trainer.denoiser, None, 2)
    plan = Plan(solver, times, dataset.info.shape, 0, trainer.device, dtype=trainer.options.dtype)
    labels = torch.arange(trainer.options.preview_samples) % 3 if labeled else None
    x, _ = draw_preview(trainer, plan, labels)
    return {"validation": values, "preview": x, "own": len(share_of(trainer.options.preview_samples))}


if __name__ == "__main__":
    main()
