r"""How much faster the networks here are than the original's formulation of the same function.

    python -m benchmarks.networks                                  # CIFAR-10 NCSN++ of arXiv 2011.13456, batch 8
    python -m benchmarks.networks --device cuda --batch 128 --compile

Both sides have the same weights. The original's formulation is `benchmarks.original`, in contiguous layout: FIR
resampling by inserting zeros, padding and a generic convolution, 1x1 layers and attention by einsum, attention without
fusion; it is trained with Adam, clipping and averaging tensor by tensor. Ours is trained as `sde.train` does. The two
take turns in one process, so that a busy machine slows both; times are medians. Errors are relative to the same network
in float64.

    forward    network evaluations without gradients, as in sampling
    training   forward, backward, clipping to norm 1, Adam, averaged weights; the network's dropout at 0.1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.original import ListNetwork
from sde.devices import autocast, pick_device
from sde.interop.score_sde_weights import convert_state_dict, network_from_config
from sde.models.summary import count_flops
from sde.training.ema import EMA

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


class Sides(NamedTuple):
    """The same network twice, on the device, in float32 and evaluation mode."""

    original: nn.Module
    ours: nn.Module


def make_sides(config: dict[str, Any], device: torch.device) -> Sides:
    """Both formulations with the same random weights of natural size."""
    original = ListNetwork(config)
    ours = network_from_config(config)
    ours.load_state_dict(convert_state_dict(ours, dict(original.state_dict())))
    return Sides(
        original.float().to(device),
        ours.to(device).to(memory_format=torch.channels_last).eval(),  # type: ignore[call-overload]
    )


def error(network: nn.Module, exact: nn.Module, x: Tensor, t: Tensor, precision: str = "fp32") -> tuple[float, float]:
    """Relative difference from `exact`, which is float64: root mean square, and largest over largest."""
    with torch.no_grad(), autocast(x.device, precision):
        y = network(x, t).double()
    with torch.no_grad():
        truth = exact(x.double(), t.double())
    return float((y - truth).norm() / truth.norm()), float((y - truth).abs().max() / truth.abs().max())


def original_training(network: nn.Module, x: Tensor, t: Tensor, z: Tensor, precision: str) -> Step:
    """One training step tensor by tensor, as the original makes it."""
    network = deepcopy(network).train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    shadow = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, 2e-4, foreach=False)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(x.device, precision):
            y = network(x, t)
        (y.float() - z).square().reshape(len(x), -1).mean(1).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        optimizer.step()
        with torch.no_grad():
            for average, weight in zip(shadow, parameters, strict=True):
                average.sub_((1 - DECAY) * (average - weight))

    return step


def our_training(network: nn.Module, x: Tensor, t: Tensor, z: Tensor, precision: str) -> Step:
    """One training step as `sde.training.loop` makes it."""
    network = deepcopy(network).train()
    parameters = list(network.parameters())
    ema = EMA(network, DECAY, warmup=False)
    optimizer = torch.optim.Adam(parameters, 2e-4, fused=True)
    x, z = (v.contiguous(memory_format=torch.channels_last) for v in (x, z))

    def step() -> None:
        with autocast(x.device, precision):
            y = network(x, t)
        (y.float() - z).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(0)

    return step


def forward(network: nn.Module, x: Tensor, t: Tensor, precision: str) -> Step:
    """One evaluation in sampling."""

    def step() -> object:
        with torch.inference_mode(), autocast(x.device, precision):
            return network(x, t)

    return step


def seconds(steps: list[Step], repeats: int, device: torch.device) -> list[float]:
    """Median seconds of each step; they take turns, after one turn that is not counted."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats + 1):
        for taken, step in zip(times, steps, strict=True):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if turn:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows(sides: Sides, batch: int, repeats: int, precisions: list[str], device: torch.device) -> Iterator[str]:
    """One line per measurement: milliseconds a picture of both sides, and the ratio."""
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(batch, 3, 32, 32, generator=generator).to(device) for _ in range(2))
    t = (999 * torch.rand(batch, generator=generator)).to(device)
    rows = x.contiguous(memory_format=torch.channels_last)
    kinds: list[tuple[str, Callable[..., Step], Callable[..., Step], tuple[Tensor, ...], tuple[Tensor, ...]]] = [
        ("forward", forward, forward, (x, t), (rows, t)),
        ("training", original_training, our_training, (x, t, z), (x, t, z)),
    ]
    for name, theirs, ours, their_inputs, our_inputs in kinds:
        steps = [theirs(sides.original, *their_inputs, "fp32")]
        steps += [ours(sides.ours, *our_inputs, precision) for precision in precisions]
        base, *times = seconds(steps, repeats, device)
        yield f"{name:9} original fp32 {1e3 * base / batch:8.2f} ms a picture"
        for precision, taken in zip(precisions, times, strict=True):
            yield f"{name:9} ours     {precision} {1e3 * taken / batch:8.2f} ms a picture   {base / taken:5.2f} x as fast"


def errors(sides: Sides, precisions: list[str], device: torch.device) -> Iterator[str]:
    """Relative errors of both sides against float64, on four pictures."""
    exact = deepcopy(sides.ours).double()
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, 3, 32, 32, generator=generator).to(device), torch.tensor([0.5, 10.0, 300.0, 999.0]).to(device)
    cases = [("original fp32", sides.original, "fp32")] + [(f"ours {p}", sides.ours, p) for p in precisions]
    for name, network, precision in cases:
        rms, largest = error(network, exact, x, t, precision)
        yield f"error     {name:13} {rms:8.1e} (root mean square)   {largest:8.1e} (largest)"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--batch", type=int, default=8, help="pictures of a batch")
    parser.add_argument("--repeats", type=int, default=7, help="turns of which the median is taken")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 for PyTorch's choice")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--network", default="ncsnpp", choices=["ncsnpp", "ddpmpp"])
    parser.add_argument("--compile", action="store_true", help="torch.compile on our side")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)
    torch.manual_seed(0)
    config = CIFAR10 if arguments.network == "ncsnpp" else CIFAR10 | {"model": CIFAR10["model"] | DDPMPP}
    sides = make_sides(config, device)
    parameters = sum(p.numel() for p in sides.ours.parameters())
    flops = count_flops(sides.ours)
    print(
        f"CIFAR-10 {arguments.network}: {parameters / 1e6:.1f} M parameters, {flops / 1e9:.1f} GFLOP a picture; "
        f"batch {arguments.batch}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for line in errors(sides, arguments.precision, device):
        print(line, flush=True)
    if arguments.compile:
        sides.ours.compile(mode="max-autotune" if device.type == "cuda" else None)
    for line in rows(sides, arguments.batch, arguments.repeats, arguments.precision, device):
        print(line, flush=True)


if __name__ == "__main__":
    main()
