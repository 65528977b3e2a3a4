r"""How much faster the networks here are than the original's formulation of the same function.

    python -m benchmarks.networks                                  # CIFAR-10 NCSN++ of arXiv 2011.13456, batch 8
    python -m benchmarks.networks --device cuda --batch 128        # and the largest batch that fits

Both sides have the same weights. The original's formulation is `benchmarks.original`, in contiguous layout and float32:
FIR resampling by inserting zeros, padding and a generic convolution, 1x1 layers and attention by einsum, no fusion; it
is trained with clipping, Adam and averaging tensor by tensor. Ours is trained as `sde.train` does.

Each side has a process of its own, set up as its user would have it. The two take turns; the ratio is the median of
those of successive turns, so that a machine that gets slower or faster meanwhile does not change it. Errors are
relative to the same network in float64.

    forward    network evaluations without gradients, as in sampling
    training   forward, backward, clipping to norm 1, Adam, averaged weights; the network's dropout at 0.1
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.original import ListNetwork

CIFAR10 = {
    "data": {"image_size": 32, "num_channels": 3, "centered": True},
    "training": {"sde": "vpsde"},
    "model": {
        "name": "ncsnpp", "nf": 128, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 4, "attn_resolutions": [16],
        "dropout": 0.1, "nonlinearity": "swish", "resblock_type": "biggan", "embedding_type": "positional",
        "progressive": "none", "progressive_input": "residual", "progressive_combine": "sum", "fir": True,
        "fir_kernel": [1, 3, 3, 1], "skip_rescale": True, "conditional": True, "resamp_with_conv": True,
        "scale_by_sigma": False, "sigma_min": 0.01, "sigma_max": 50, "num_scales": 1000, "init_scale": 0.0,
    },
}  # fmt: skip
DDPMPP = {"fir": False, "progressive_input": "none"}
DECAY = 0.9999
Step = Callable[[], object]


class Task(NamedTuple):
    """What one process measures."""

    side: str  # original or ours
    config: dict[str, Any]
    device: str
    batch: int
    threads: int
    compile: bool


def inputs(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, times and noise, the same for both sides."""
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(batch, 3, 32, 32, generator=generator) for _ in range(2))
    t = 999 * torch.rand(batch, generator=generator)
    return x.to(device), t.to(device), z.to(device)


class OriginalSide:
    """The original's formulation; imports nothing of the package."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.network = ListNetwork(task.config).float().to(device)
        self.x, self.t, self.z = inputs(task.batch, device)

    def forward(self, precision: str) -> Step:
        """One evaluation in sampling."""

        def step() -> object:
            with torch.no_grad():
                return self.network(self.x, self.t)

        return step

    def training(self, precision: str) -> Step:
        """One training step tensor by tensor."""
        network = deepcopy(self.network).train()
        parameters = [p for p in network.parameters() if p.requires_grad]
        shadow = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.Adam(parameters, 2e-4, foreach=False)

        def step() -> None:
            optimizer.zero_grad()
            losses = (network(self.x, self.t) - self.z).square().reshape(len(self.x), -1).mean(1)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
            optimizer.step()
            with torch.no_grad():
                for average, weight in zip(shadow, parameters, strict=True):
                    average.sub_((1 - DECAY) * (average - weight))

        return step


class OurSide:
    """The package's network, in channels-last layout."""

    def __init__(self, task: Task, device: torch.device) -> None:
        from sde.devices import keep_memory

        keep_memory(device)
        self.network = our_network(task.config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device, self.compile = device, task.compile
        x, self.t, z = inputs(task.batch, device)
        self.x, self.z = (v.contiguous(memory_format=torch.channels_last) for v in (x, z))

    def compiled(self, network: nn.Module) -> nn.Module:
        """The network, compiled if that was asked for: on a GPU with CUDA graphs."""
        if self.compile:
            network.compile(mode="max-autotune" if self.device.type == "cuda" else None)
        return network

    def forward(self, precision: str) -> Step:
        """One evaluation in sampling."""
        from sde.devices import autocast

        network = self.compiled(deepcopy(self.network).requires_grad_(False))

        def step() -> object:
            with torch.no_grad(), autocast(self.device, precision):
                return network(self.x, self.t)

        return step

    def training(self, precision: str) -> Step:
        """One training step as `sde.training.loop` makes it."""
        from sde.devices import autocast
        from sde.training.ema import EMA

        network = deepcopy(self.network).train()
        ema = EMA(network, DECAY, warmup=False)
        parameters = list(network.parameters())
        optimizer = torch.optim.Adam(parameters, 2e-4, fused=True)
        self.compiled(network)

        def step() -> None:
            with autocast(self.device, precision):
                y = network(self.x, self.t)
            (y.float() - self.z).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(0)

        return step


def our_network(config: dict[str, Any]) -> nn.Module:
    """The package's network with the weights of the original's."""
    from sde.interop.score_sde_weights import convert_state_dict, network_from_config

    network = network_from_config(config)
    network.load_state_dict(convert_state_dict(network, dict(ListNetwork(config).state_dict())))
    return network.eval()


def serve(task: Task, connection: Connection) -> None:
    """Make the steps that are asked for, ("make", kind, precision), and take turns, ("turn",), until None comes."""
    if task.threads:
        torch.set_num_threads(task.threads)
    device = torch.device(task.device)
    side = (OriginalSide if task.side == "original" else OurSide)(task, device)
    step: Step = lambda: None  # noqa: E731
    while (request := connection.recv()) is not None:
        if request[0] == "make":
            step = getattr(side, request[1])(request[2])
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        connection.send((time.perf_counter() - start, memory))
    connection.close()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Worker:
    """A process that measures one side.

    Args:
        task: what it measures.
    """

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(task, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *request: str) -> tuple[float, int]:
        """Seconds and bytes of one step."""
        self.connection.send(request)
        return self.connection.recv()

    def close(self) -> None:
        """End the process."""
        self.connection.send(None)
        self.process.join()


class Times(NamedTuple):
    """Seconds of each turn, and the most memory in use (on a GPU)."""

    seconds: list[float]
    memory: int

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)


def ratio(base: Times, times: Times) -> float:
    """The median ratio of successive turns."""
    return statistics.median(a / b for a, b in zip(base.seconds, times.seconds, strict=True))


def turns(workers: list[Worker], requests: list[tuple[str, str]], repeats: int) -> list[Times]:
    """The times of each worker's step; they take turns, after one that is not counted."""
    for worker, request in zip(workers, requests, strict=True):
        worker.ask("make", *request)
    taken: list[list[tuple[float, int]]] = [[] for _ in workers]
    for _ in range(repeats):
        for times, worker in zip(taken, workers, strict=True):
            times.append(worker.ask("turn"))
    return [Times([second for second, _ in times], times[-1][1]) for times in taken]


def rows(original: Worker, ours: Worker, arguments: argparse.Namespace, flops: int) -> Iterator[str]:
    """One line per measurement: milliseconds a picture, ratios, and on a GPU throughput, utilization and memory."""
    batch = arguments.batch
    peak = peak_flops(arguments.device) if arguments.device == "cuda" else None

    def line(name: str, times: Times, ratio: str) -> str:
        text = f"{name} {1e3 * times.median / batch:8.2f} ms a picture (fastest {1e3 * min(times.seconds) / batch:.2f})"
        if peak is not None:
            work = flops * (3 if name.startswith("training") else 1)
            used = batch * work / times.median / peak
            text += f", {batch / times.median:.0f} pictures/s, utilization {used:.0%}, {times.memory / 2**30:.2f} GiB"
        return text + ratio

    for kind in ("forward", "training"):
        for precision in arguments.precision:
            base, times = turns([original, ours], [(kind, "fp32"), (kind, precision)], arguments.repeats)
            yield line(f"{kind:8} original fp32", base, "")
            yield line(f"{kind:8} ours     {precision}", times, f"   {ratio(base, times):.2f} x as fast")


def peak_flops(device: str) -> float:
    """Operations per second of a bfloat16 product of 8192x8192 matrices, against which utilization is measured."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * 8192**3 / min(times)


def largest_batch(task: Task, kind: str, precision: str) -> tuple[int, Times]:
    """The largest power of two that fits into the memory of the GPU, and its time."""
    best = 0, Times([float("inf")], 0)
    while True:
        worker = Worker(task._replace(batch=2 * (best[0] or task.batch // 2)))
        try:
            best = 2 * (best[0] or task.batch // 2), turns([worker], [(kind, precision)], 3)[0]
            worker.close()
        except EOFError:  # the process died for lack of memory
            return best


def error(network: nn.Module, exact: nn.Module, device: torch.device, precision: str) -> tuple[float, float]:
    """Relative difference from `exact`, which is float64: root mean square, and largest over largest."""
    from sde.devices import autocast

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 32, 32, generator=generator).to(device)
    t = torch.tensor([0.5, 10.0, 300.0, 999.0]).to(device)
    with torch.no_grad(), autocast(device, precision):
        y = network(x, t).double()
    with torch.no_grad():
        truth = exact(x.double(), t.double())
    return float((y - truth).norm() / truth.norm()), float((y - truth).abs().max() / truth.abs().max())


def errors(config: dict[str, Any], precisions: list[str], device: torch.device) -> Iterator[str]:
    """Relative errors of both sides against float64, on four pictures."""
    original, ours = ListNetwork(config).float().to(device), our_network(config).to(device)
    ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    exact = deepcopy(ours).double()
    cases = [("original fp32", original, "fp32")] + [(f"ours     {p}", ours, p) for p in precisions]
    for name, network, precision in cases:
        rms, largest = error(network, exact, device, precision)
        yield f"error    {name} {rms:8.1e} (root mean square)   {largest:8.1e} (largest)"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=8, help="pictures of a batch")
    parser.add_argument("--repeats", type=int, default=12, help="turns of each side")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 for PyTorch's choice")
    parser.add_argument(
        "--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"], help="of our side"
    )
    parser.add_argument("--network", default="ncsnpp", choices=["ncsnpp", "ddpmpp"])
    parser.add_argument("--compile", action="store_true", help="torch.compile on our side")
    arguments = parser.parse_args()
    config = CIFAR10 if arguments.network == "ncsnpp" else CIFAR10 | {"model": CIFAR10["model"] | DDPMPP}

    from sde.devices import multiplies_bfloat16
    from sde.models.summary import count_flops

    device = torch.device(arguments.device)
    network = our_network(config)
    parameters, flops = sum(p.numel() for p in network.parameters()), count_flops(network)
    print(
        f"CIFAR-10 {arguments.network}: {parameters / 1e6:.1f} M parameters, {flops / 1e9:.1f} GFLOP a picture; "
        f"batch {arguments.batch}, {device}, {arguments.threads or torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    if "bf16" in arguments.precision and device.type == "cpu" and not multiplies_bfloat16():
        print("this CPU has no units for bfloat16: precision bf16 computes in float32, as everywhere in the package")
    for line in errors(config, arguments.precision, device):
        print(line, flush=True)
    task = Task("ours", config, arguments.device, arguments.batch, arguments.threads, arguments.compile)
    workers = Worker(task._replace(side="original")), Worker(task)
    for line in rows(*workers, arguments, flops):
        print(line, flush=True)
    for worker in workers:
        worker.close()
    if device.type == "cuda":
        for kind in ("forward", "training"):
            batch, times = largest_batch(task, kind, "bf16")
            speed, memory = batch / times.median, times.memory / 2**30
            print(f"{kind:8} largest batch {batch}: {speed:.0f} pictures/s, {memory:.1f} GiB")


if __name__ == "__main__":
    main()
