"""The machine as this process may use it: cores, memory, GPUs, packages.

What a machine has and what a process may use differ in containers and on clusters: the cores are those of the
process's affinity, cut by the CPU quota of its control groups, and the memory is cut by their memory limits.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from sde.devices import multiplies_bfloat16
from sde.distributed import world
from sde.memory import CGROUPS, OWN, control_groups, read_lines, read_words, usable_memory

PACKAGES = ("torch", "numpy", "scipy", "hydra-core", "omegaconf", "pillow", "matplotlib", "safetensors", "torchsde")
EXTRAS = {"wandb": "wandb", "datasets": "hf", "huggingface_hub": "hub"}
"""Optional packages, and the extra of this package that installs each."""


@dataclass(frozen=True)
class GPU:
    """A graphics processor.

    Attributes:
        name: as the driver calls it.
        total: bytes of memory.
        free: bytes that nobody uses.
        capability: compute capability, (9, 0) for an H100.
    """

    name: str
    total: int
    free: int
    capability: tuple[int, int]

    @property
    def bf16(self) -> bool:
        """Whether it has units for bfloat16 (and TF32): compute capability 8.0 and above."""
        return self.capability >= (8, 0)


@dataclass(frozen=True)
class Machine:
    """What this process can use.

    Attributes:
        system: operating system.
        python: version.
        cpu: name of the processor.
        cores: cores that may be used, a fraction where a quota says so.
        cores_there: logical cores of the machine.
        load: threads at work on the machine or waiting for a core, on average over the last minute; None if unknown.
        threads: that torch uses.
        threads_asked: OMP_NUM_THREADS, or None.
        bf16: whether the CPU multiplies bfloat16 matrices.
        fused: kinds of device with a fused Adam, "cpu" and "cuda".
        memory: bytes of memory, up to the limit of the process's control groups.
        memory_free: bytes of it that can be had.
        gpus: visible ones.
        cuda: version that torch was built for, None without.
        cudnn: version, None without.
        shared_memory: bytes of /dev/shm, through which worker processes pass tensors; None where there is none.
        disk: folder that runs are written to.
        disk_free: bytes free there.
        packages: versions.
        missing: optional packages that are not installed, with the extra that installs each.
        wandb_login: whether Weights & Biases knows an API key.
        processes: of the torchrun job that this is one of; 1 without.
        rank: number of this one.
        processes_here: of the job, on this machine.
    """

    system: str
    python: str
    cpu: str
    cores: float
    cores_there: int
    load: float | None
    threads: int
    threads_asked: str | None
    bf16: bool
    fused: tuple[str, ...]
    memory: int | None
    memory_free: int | None
    gpus: tuple[GPU, ...]
    cuda: str | None
    cudnn: str | None
    shared_memory: int | None
    disk: str
    disk_free: int
    packages: dict[str, str]
    missing: dict[str, str]
    wandb_login: bool
    processes: int
    rank: int
    processes_here: int


def examine_machine(runs: Path) -> Machine:
    """The machine, as this process may use it; `runs` is where runs will be written and need not exist."""
    there = os.cpu_count() or 1
    memory, free = usable_memory()
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        python=platform.python_version(),
        cpu=cpu_name(),
        cores=usable_cores(),
        cores_there=there,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        threads=torch.get_num_threads(),
        threads_asked=os.environ.get("OMP_NUM_THREADS"),
        bf16=multiplies_bfloat16(),
        fused=tuple(kind for kind in ("cpu", "cuda") if has_fused_adam(kind)),
        memory=memory,
        memory_free=free,
        gpus=tuple(examine_gpu(i) for i in range(torch.cuda.device_count())),
        cuda=torch.version.cuda,
        cudnn=None if cudnn is None else str(cudnn),
        shared_memory=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        disk=str(runs),
        disk_free=shutil.disk_usage(existing(runs)).free,
        packages={name: found for name in PACKAGES if (found := version(name)) is not None},
        missing={name: extra for name, extra in EXTRAS.items() if version(name) is None},
        wandb_login=knows_wandb(),
        processes=world().size,
        rank=world().rank,
        processes_here=int(os.environ.get("LOCAL_WORLD_SIZE") or world().size) if world().size > 1 else 1,
    )


def examine_gpu(index: int) -> GPU:
    """GPU number `index`."""
    free, total = torch.cuda.mem_get_info(index)
    return GPU(torch.cuda.get_device_name(index), total, free, torch.cuda.get_device_capability(index))


def has_fused_adam(kind: str) -> bool:
    """Whether PyTorch can update all parameters on such a device in one kernel."""
    if kind == "cuda" and not torch.cuda.is_available():
        return False
    try:
        torch.optim.Adam([torch.zeros(1, device=kind, requires_grad=True)], fused=True)
    except RuntimeError:
        return False
    return True


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, where the system gives one."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine() or "unknown"


def usable_cores(root: Path = CGROUPS, own: Path = OWN) -> float:
    """Cores that this process may use: its affinity, cut by the CPU quotas of its control groups."""
    if hasattr(os, "sched_getaffinity"):
        cores: float = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min(cores, cpu_quota(root, own))


def cpu_quota(root: Path = CGROUPS, own: Path = OWN) -> float:
    """The smallest CPU quota of the process's control groups (version 2 or 1), in cores; infinite without."""
    quota = float("inf")
    for folder in control_groups(root, own, "cpu"):
        words = read_words(folder / "cpu.max") or [
            *read_words(folder / "cpu.cfs_quota_us"),
            *read_words(folder / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:  # "max", or -1, is no quota
            quota = min(quota, int(words[0]) / int(words[1]))
    return quota


def existing(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def knows_wandb() -> bool:
    """Whether Weights & Biases finds an API key: in the environment or in the file that `wandb login` writes."""
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return bool(os.environ.get("WANDB_API_KEY")) or any("wandb.ai" in line for line in read_lines(file))
