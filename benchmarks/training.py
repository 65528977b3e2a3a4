"""Training against a bare loop: what the package adds to forward, backward, optimizer and averages.

    python -m benchmarks.training                                        # the network of make demo, and points
    python -m benchmarks.training --case +experiment=cifar10_vp_ddpmpp data=glyphs data.size=32 training.batch_size=8

The bare loop calls the same network on one fixed batch of noisy examples with fixed noise labels and a fixed target:
the mean square error, its backward pass, the same optimizer and an average of the weights in one call (`foreach`). It
draws nothing, reads no data, does not clip, logs nothing and is not asked to stop. Ours is the training loop itself
(`fit`) with its lines of the log at the given interval: order, pixels, times, noise, weighting, clipping, learning
rate, averages, losses by noise level, progress. Validation, previews and checkpoints are left out, as they are rare.

Both have networks of their own with the same weights and take turns, so that a machine that gets slower meanwhile slows
both; with OMP_NUM_THREADS=1 on a CPU times are those that the process has computed. The ratio is the median of the
ratios of neighboring turns; 1.00 would be the bare loop's speed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir

from sde.config import build, conf_dir, plain
from sde.devices import autocast, keep_memory, pick_device
from sde.train_setup import make_trainer
from sde.training.loop import Hooks, Trainer, fit
from sde.training.stopping import StopRequest

CASES = {
    "make demo": ["+experiment=demo", "data.size=16"],
    "points": ["data=moons", "model=mlp", "training.batch_size=512"],
}


class Turn(NamedTuple):
    """Seconds of the same number of steps."""

    bare: float
    ours: float


def make(overrides: Sequence[str], device: torch.device) -> Trainer:
    """The trainer that a command line with these options would have."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = plain(compose("train", overrides=[*overrides, "training.steps=1000000", f"training.device={device}"]))
    return make_trainer(config, build(config["data"], "data"), device)


def bare_loop(trainer: Trainer) -> Callable[[int], None]:
    """A loop of steps on copies of the trainer's network and optimizer."""
    options, device = trainer.options, trainer.device
    network = copy.deepcopy(trainer.denoiser.network).train()
    average = copy.deepcopy(network).eval().requires_grad_(False)
    kept, weights = list(average.parameters()), list(network.parameters())
    settings = {k: v for k, v in trainer.optimizer.param_groups[0].items() if k != "params"}
    known = {"lr", "betas", "eps", "weight_decay", "fused", "amsgrad"}
    optimizer = type(trainer.optimizer)(weights, **{k: v for k, v in settings.items() if k in known})
    x, label = trainer.batches(0)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    target = torch.randn_like(x)
    denoiser = trainer.denoiser
    t = trainer.loss.draw_times(denoiser.sde, len(x), None, device)
    noise = denoiser.parameterization.c_noise(denoiser.sde, t, denoiser.label_kind).to(x.dtype)
    decay = trainer.averages.options.decays[0]

    def steps(count: int) -> None:
        for _ in range(count):
            with autocast(device, options.precision):
                loss = (network(x, noise, label) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(kept, weights, 1 - decay)
        loss.item()

    return steps


def our_loop(trainer: Trainer) -> Callable[[int], None]:
    """The training loop, going on for so many steps, with nobody to write down what it finds."""

    def nothing(*_: Any) -> None:
        pass

    hooks = Hooks(nothing, dict, nothing, nothing, nothing, str)
    loop = copy.copy(trainer.options)
    rare = {"validate_every": 0, "preview_every": 0, "checkpoint_every": 10**9}

    def steps(count: int) -> None:
        values = {**vars(loop), **rare, "steps": trainer.step + count}
        trainer.options = type(loop)(**values)
        with open(os.devnull, "w") as silent, contextlib.redirect_stderr(silent):
            fit(trainer, hooks, StopRequest())

    return steps


def measure(
    overrides: Sequence[str], device: torch.device, seconds: float, turns: int
) -> tuple[Trainer, int, list[Turn]]:
    """Seconds of turns of equally many steps by the bare loop and by ours."""
    trainer = make(overrides, device)
    bare, ours = bare_loop(trainer), our_loop(trainer)
    bare(2), ours(2)
    steps = max(trainer.options.log_every, 1)
    taken = timed(bare, steps)
    steps = max(1, round(seconds / taken)) * steps if taken < seconds else steps
    found = []
    for turn in range(turns):
        order = (bare, ours) if turn % 2 == 0 else (ours, bare)
        times = {loop: timed(loop, steps) for loop in order}
        found.append(Turn(times[bare], times[ours]))
    return trainer, steps, found


def timed(loop: Callable[[int], None], steps: int) -> float:
    """Seconds that `steps` steps take; with one thread on a CPU those of this process, whatever else is running."""
    gpu = torch.cuda.is_available()
    clock = time.process_time if torch.get_num_threads() == 1 and not gpu else time.perf_counter
    if gpu:
        torch.cuda.synchronize()
    start = clock()
    loop(steps)
    if gpu:
        torch.cuda.synchronize()
    return clock() - start


def report(name: str, trainer: Trainer, steps: int, turns: Sequence[Turn]) -> None:
    """Print the speeds and their ratio."""
    pictures = steps * trainer.options.batch_size
    bare, ours = (pictures / statistics.median(times) for times in zip(*turns, strict=True))
    ratios = sorted(turn.ours / turn.bare for turn in turns)
    print(
        f"{name}: batch {trainer.options.batch_size}, {len(turns)} turns of {steps} steps\n"
        f"    bare loop {bare:10.1f} examples/s\n"
        f"    sde.train {ours:10.1f} examples/s, {statistics.median(ratios):.3f} of the bare loop's time "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f})",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", help="options of python -m sde.train, in place of the usual cases")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--seconds", type=float, default=10, help="of one turn")
    parser.add_argument("--turns", type=int, default=6, help="how often both take turns")
    chosen = parser.parse_args(arguments)
    device = pick_device(chosen.device, "--device")
    keep_memory(device)
    threads = f", {torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{where}{threads}, torch {torch.__version__}", flush=True)
    for name, overrides in {"as given": chosen.case}.items() if chosen.case else CASES.items():
        report(name, *measure(overrides, device, chosen.seconds, chosen.turns))


if __name__ == "__main__":
    main()
