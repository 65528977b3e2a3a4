"""Several processes, started by torchrun: who this one is, and what they tell each other.

    torchrun --nproc-per-node=2 -m sde.train ...

torchrun starts a process for each GPU (or as many as asked for on a CPU), tells each its rank by environment variables,
ends all when one ends badly, and starts all again with --max-restarts. What they compute together is summed by
torch.distributed: nccl between GPUs, gloo between CPUs. Without torchrun there is a world of one process, in which
everything here does nothing and costs nothing.

Rank 0 alone writes files and prints. A sentence that all processes have to say is said once (`say_once`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sde.errors import UserError

T = TypeVar("T")
_PARTING = 10.0  # seconds that a process waits for others at its end
_PATIENCE = timedelta(minutes=30)  # how long a process waits for another, which may be writing a large checkpoint


@dataclass(frozen=True)
class World:
    """Who this process is.

    Attributes:
        rank: its number among all, from 0.
        size: how many there are.
        local_rank: its number on this machine, that of its GPU.
        local_size: how many there are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


@lru_cache(maxsize=1)
def world() -> World:
    """Who this process is, as torchrun's environment variables say; one process alone without them."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return World()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, local_size = (int(os.environ.get(name) or 0) for name in names)
    return World(rank, size, local_rank, max(1, local_size))


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return world().rank == 0


def join() -> None:
    """Meet the other processes; does nothing where there are none, or after the first time.

    Raises:
        UserError: when they cannot be reached.
    """
    if world().size == 1 or dist.is_initialized():
        return
    here = world()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        kept = _torchrun_store()
        # torchrun's store still holds the addresses that an earlier attempt left in it
        store = None if kept is None else dist.PrefixStore(f"sde/{meeting(kept, here)}", kept)
        rank, size = (-1, -1) if store is None else (here.rank, here.size)
        dist.init_process_group(backend, timeout=_PATIENCE, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"rank {here.rank} of {here.size} cannot reach the other processes ({reason}): check torchrun's "
            "--rdzv-endpoint, or name the network interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error


def meeting(store: dist.Store, here: World) -> str:
    """A name that the processes of one attempt agree on, and no other attempt has.

    Their number of restarts is no such name: a torchrun that starts its processes again because those of another node
    died does not count that. torchrun ends all processes of an attempt before it starts any of the next, so what is
    announced after rank 0 has cleared away old announcements is of this attempt. A process announces until it is heard.
    """
    if here.rank == 0:
        name, others = secrets.token_hex(8), [f"sde/here/{rank}" for rank in range(1, here.size)]
        for other in others:
            store.delete_key(other)
        for other in others:
            store.set(f"sde/meeting/{store.get(other).decode()}", name)
        return name
    own, end = secrets.token_hex(8), time.monotonic() + _PATIENCE.total_seconds()
    while time.monotonic() < end:
        store.set(f"sde/here/{here.rank}", own)
        if store.check([f"sde/meeting/{own}"]):
            return store.get(f"sde/meeting/{own}").decode()
        time.sleep(0.05)
    raise RuntimeError("rank 0 does not answer")


def leave() -> None:
    """Part from the other processes once all have come here: who leaves early cuts off what others still read."""
    if not dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError, ValueError):  # the process that keeps the store has left
        store = dist.distributed_c10d._get_default_store()
        store.add("sde/leaving", 1)
        end = time.monotonic() + _PARTING
        while int(store.add("sde/leaving", 0)) < world().size and time.monotonic() < end:
            time.sleep(0.01)
    dist.destroy_process_group()


# What outlives the processes


def remembered(key: str, value: str | None = None) -> str | None:
    """What an earlier attempt of this torchrun has remembered under `key`, after remembering `value` if it is given.

    It is kept by torchrun itself, so it outlives the processes that --max-restarts replaces. None where nothing was
    remembered, or without torchrun.
    """
    store = _torchrun_store()
    if store is None:
        return None
    name = f"sde/remembered/{key}"
    if value is not None:
        store.set(name, value)
    return store.get(name).decode() if store.check([name]) else None


def _torchrun_store() -> dist.Store | None:
    """The key-value store that torchrun itself keeps, where it keeps one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=_PATIENCE)


def say_once(sentence: str) -> bool:
    """Whether this process is the first of all to ask to say `sentence`."""
    if not dist.is_initialized():
        return is_main()
    name = f"sde/said/{hashlib.sha256(sentence.encode()).hexdigest()}"
    try:
        return dist.distributed_c10d._get_default_store().add(name, 1) == 1
    except (RuntimeError, ValueError):  # the process that keeps the store is gone: better twice than never
        return True


def lost_another(error: BaseException) -> bool:
    """Whether `error` is what a process gets when another one has ended in the middle of their work."""
    if world().size == 1 or not isinstance(error, RuntimeError):
        return False
    signs = ("connection closed", "connection reset", "broken pipe", "timed out waiting", "ncclremoteerror", "aborted")
    return any(sign in str(error).lower() for sign in signs)


# What they tell each other


def share(value: T) -> T:
    """Rank 0's `value`, of plain types, in every process."""
    if world().size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value: T) -> list[T]:
    """Every process's `value` by rank, in rank 0; the others get an empty list."""
    if world().size == 1:
        return [value]
    box: list[Any] | None = [None] * world().size if is_main() else None
    dist.gather_object(value, box)
    return box or []


def on_main(function: Callable[[], T]) -> T:
    """What `function` gives in rank 0, in every process.

    Raises:
        UserError, OSError: that it raised, in every process.
    """
    if world().size == 1:
        return function()
    answer: tuple[Any, Exception | None] = (None, None)
    if is_main():
        try:
            answer = function(), None
        except (UserError, OSError) as error:
            answer = None, error
    value, raised = share(answer)
    if raised is not None:
        raise raised
    return value


def total(x: Tensor) -> Tensor:
    """The sum of every process's `x`, in place."""
    if world().size > 1:
        dist.all_reduce(x)
    return x


def least(value: int) -> int:
    """The smallest of every process's `value`."""
    if world().size == 1:
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, dist.ReduceOp.MIN)
    return int(box)


def part_of(n: int, part: int, parts: int) -> range:
    """Number `part` of `parts` nearly equal parts of 0 .. n - 1."""
    return range(part * n // parts, (part + 1) * n // parts)


def share_of(n: int) -> range:
    """This process's part of 0 .. n - 1."""
    return part_of(n, world().rank, world().size)


def own_batches(n: int, batch_size: int) -> dict[int, range]:
    """This process's batches of 0 .. n - 1 by their number; batches are smaller where some would have none."""
    size = min(batch_size, max(1, -(-n // world().size)))
    starts = range(0, n, size)
    return {k: range(starts[k], min(starts[k] + size, n)) for k in range(world().rank, len(starts), world().size)}


def collect(own: dict[int, T]) -> list[T]:
    """What all processes found for their batches, in the order of the batches, up to the first that is missing.

    Rank 0 gets it; the others get what is their own.
    """
    found = {number: value for part in gather(own) for number, value in part.items()} if world().size > 1 else own
    if not is_main():
        return list(own.values())
    return [found[k] for k in range(len(found)) if all(j in found for j in range(k + 1))]


def any_signal(signal: int | None) -> int | None:
    """The signal that asked a process to stop, of the first that was; in every process."""
    return next((number for number in share(gather(signal)) if number is not None), None)


class Agreement:
    """A question that all processes answer alike, asked in every step without waiting: has anybody said yes?

    The answers of one step are exchanged in the background and known in the next. So a signal that reaches one process
    a step earlier than another ends all of them after the same step.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if world().size > 1 else None
        self._pending: tuple[Tensor, Any] | None = None

    def __call__(self, yes: bool) -> bool:
        """Whether any process has said yes by the last step; of one process alone, its own answer at once."""
        if self._group is None:
            return yes
        known = False
        if self._pending is not None:
            box, work = self._pending
            work.wait()
            known = bool(box)
        box = torch.tensor(float(yes))
        self._pending = box, dist.all_reduce(box, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return known

    def close(self) -> None:
        """Wait for the last exchange."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None


# Parameters that are spread over processes (FSDP2)


def is_sharded(module: nn.Module) -> bool:
    """Whether the parameters of a module are spread over processes."""
    return any(_is_dtensor(parameter) for parameter in module.parameters())


def _is_dtensor(x: object) -> bool:
    return hasattr(x, "full_tensor")


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor that is spread over processes; any other tensor itself."""
    return x.to_local() if _is_dtensor(x) else x  # type: ignore[attr-defined]


def full(x: Any) -> Any:
    """A tensor that is spread over processes, put together on the CPU of rank 0, empty in others; anything else itself.

    All processes have to ask.
    """
    if not _is_dtensor(x):
        return x
    whole = x.full_tensor()
    return whole.cpu() if is_main() else whole.new_empty(0, device="cpu")


def spread_like(x: Any, like: Any) -> Any:
    """`x` spread over processes as `like` is, which may be spread or not."""
    if not (_is_dtensor(like) and isinstance(x, Tensor) and x.shape == like.shape and not _is_dtensor(x)):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)


def full_state(module: nn.Module) -> dict[str, Any]:
    """The state of a module as one process alone has it, in rank 0. All processes have to ask."""
    return {name: full(value) for name, value in module.state_dict().items()}


def load_full_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Load what `full_state` gave, whether the module's parameters are spread or not.

    Raises:
        RuntimeError: when the state is that of another module.
    """
    own = module.state_dict()
    module.load_state_dict({name: spread_like(value, own.get(name)) for name, value in state.items()})


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer as one process alone has it, in rank 0. All processes have to ask."""
    state = optimizer.state_dict()
    numbers = {k: {name: full(value) for name, value in s.items()} for k, s in state["state"].items()}
    return {**state, "state": numbers}


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `full_optimizer_state` gave."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {
        k: {name: spread_like(value, parameters[int(k)]) for name, value in s.items()}
        for k, s in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": numbers})
    for k, saved in numbers.items():
        held = optimizer.state[parameters[int(k)]]
        for name, value in saved.items():
            # PyTorch casts to the parameter's type what NAdam, say, keeps in float32 whatever that is
            if isinstance(value, Tensor) and value.dtype != held[name].dtype:
                held[name] = value.to(held[name].device, copy=True)


@contextlib.contextmanager
def printing_on_main() -> Iterator[None]:
    """Let rank 0 alone print on standard output."""
    with contextlib.ExitStack() as stack:
        if not is_main():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield
