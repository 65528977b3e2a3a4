"""How long training takes on this device, measured with the trainer's own optimizer steps.

A first step pays for what happens once (allocations, choice of algorithms, compilation) and is left out, unless it
alone uses the time up. On a GPU the clock is read with the device at rest, after groups of steps long enough for that
not to matter. What has a rate (operations, pictures) is computed from the median.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sde.config import build
from sde.data import Dataset
from sde.devices import autocast, compile_network
from sde.memory import peak_memory
from sde.progress import progress_bar
from sde.sampling import count_evaluations, denoised_at_the_end, make_times
from sde.solvers import Solver
from sde.train_setup import make_trainer
from sde.training.loop import Trainer
from sde.training.options import TrainingOptions

SHARES = {"steps": 0.6, "evaluations": 0.2, "loading": 0.05, "optimizer": 0.15}  # of the time there is
PICTURES = 64  # that sampling is told for
REPEATS = 4  # of a step that is so long that it is measured on a part of its batch
_GROUP = 0.2  # seconds between looks at a GPU's clock

# Dense peak rates in TFLOP/s from the vendor's data sheets: bfloat16 and float16, TF32, float32
PEAKS = {
    "B200": (2250.0, 1125.0, 75.0),
    "H200": (989.0, 494.0, 67.0),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100": (989.0, 494.0, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "L4": (121.0, 60.0, 30.3),
    "A10": (125.0, 62.5, 31.2),
    "A6000": (154.8, 77.4, 38.7),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
}


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls.

    Attributes:
        seconds: of each.
        first: of the first one.
        warm: whether the first is left out of `seconds`.
    """

    seconds: tuple[float, ...]
    first: float
    warm: bool

    @property
    def median(self) -> float:
        """Seconds of the call in the middle."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds below which a quarter of the calls lies, and three quarters."""
        if len(self.seconds) == 1:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Speed:
    """How long training takes.

    Attributes:
        device: "cpu" or "cuda".
        steps: optimizer steps of the whole training.
        batch_size: examples of a step.
        accumulation: parts of a batch that were measured with.
        timed: examples of the steps that were measured; fewer than `batch_size` where those would take too long.
        timing: of them.
        evaluation: seconds of a network evaluation, for one example of `evaluated`.
        evaluated: examples at a time that this was measured with.
        loading: seconds of a step for reading and encoding its examples.
        optimizer: seconds of a step for optimizer and averages.
        flops: floating-point operations of an evaluation of one example.
        peak: operations a second that the device can do at the precision of training; None if not known.
        memory: bytes, at the peak: of the device, or of this process on a CPU; None if not known.
        checkpoint: bytes of a checkpoint.
        checkpoints: how many there will be at a time.
        preview_evaluations: network evaluations of a preview's sample; None if the solver chooses its own steps.
        preview_samples: samples of a preview.
        previews: how many previews there will be.
    """

    device: str
    steps: int
    batch_size: int
    accumulation: int
    timed: int
    timing: Timing
    evaluation: float
    evaluated: int
    loading: float
    optimizer: float
    flops: int
    peak: float | None
    memory: int | None
    checkpoint: int
    checkpoints: int
    preview_evaluations: int | None
    preview_samples: int
    previews: int

    @property
    def step(self) -> float:
        """Seconds of an optimizer step."""
        rest = self.timing.median - self.optimizer  # the optimizer's part does not grow with the batch
        return self.optimizer + rest * self.batch_size / self.timed

    @property
    def at_once(self) -> int:
        """Examples that went through the network at a time when the steps were measured."""
        return self.timed // self.accumulation

    @property
    def pictures(self) -> float:
        """Examples a second."""
        return self.batch_size / self.step

    @property
    def rate(self) -> float:
        """Floating-point operations a second, a training step counting as three evaluations."""
        return 3 * self.flops * self.pictures

    @property
    def training(self) -> float:
        """Seconds of all steps."""
        return self.steps * self.step

    def sampling(self, evaluations: int) -> float:
        """Seconds for `PICTURES` samples of so many evaluations each."""
        return PICTURES * evaluations * self.evaluation

    def derived(self) -> dict[str, float]:
        """What follows from the measurements, for the record."""
        return {
            "seconds_a_step": self.step,
            "pictures_a_second": self.pictures,
            "flops_a_second": self.rate,
            "seconds_of_training": self.training,
            "seconds_of_sampling_20": self.sampling(20),
            "seconds_of_sampling_200": self.sampling(200),
            "seconds_of_previews": self.previews * self.preview,
        }

    @property
    def preview(self) -> float:
        """Seconds of a preview; 0 if not known."""
        return (self.preview_evaluations or 0) * self.preview_samples * self.evaluation


def measure_speed(
    config: Mapping[str, Any],
    dataset: Dataset,
    device: torch.device,
    asked: TrainingOptions,
    flops: int,
    parts: int,
    seconds: float,
) -> Speed:
    """Train for some `seconds` and measure.

    Args:
        config: of training.
        dataset: what is trained on.
        device: where.
        asked: the options of training.
        flops: floating-point operations of an evaluation of one example.
        parts: parts that each batch goes through the network in.
        seconds: about how long all measurements may take; each is made once at least.
    """
    trainer = make_timed(config, dataset, device, asked.batch_size, parts, seconds)
    options = trainer.options
    budget = {part: share * seconds for part, share in SHARES.items()}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with progress_bar(len(budget), desc="timing", unit="part", leave=False, delay=1) as bar:
        timing = repeat(trainer.make_step, budget["steps"], device, compiled(trainer))
        memory = peak_memory(device)
        bar.update()
        evaluation, evaluated = time_evaluations(trainer, timing.median, budget["evaluations"])
        bar.update()
        steps = itertools.count(trainer.step)  # workers read ahead, so they must not be asked for one step again
        loading = repeat(lambda: trainer.batches(next(steps)), budget["loading"], device).median
        bar.update()
        checkpoint = state_bytes(trainer)
        optimizer = time_optimizer(trainer, budget["optimizer"])
        bar.update()
    return Speed(
        device=device.type,
        steps=options.steps,
        batch_size=asked.batch_size,
        accumulation=options.accumulation,
        timed=options.batch_size,
        timing=timing,
        evaluation=evaluation,
        evaluated=evaluated,
        loading=loading * asked.batch_size / options.batch_size,
        optimizer=min(optimizer, timing.median),
        flops=flops,
        peak=peak_rate(device, options.precision),
        memory=memory,
        checkpoint=checkpoint,
        checkpoints=kept_checkpoints(options),
        preview_evaluations=preview_evaluations(config, trainer),
        preview_samples=options.preview_samples,
        previews=-(-options.steps // options.preview_every) if options.preview_every else 0,
    )


def make_timed(
    config: Mapping[str, Any], dataset: Dataset, device: torch.device, batch_size: int, parts: int, seconds: float
) -> Trainer:
    """A trainer whose steps take `parts` parts, on fewer examples where a whole batch would take a CPU too long."""

    def make(**changed: int) -> Trainer:
        own = copy.deepcopy(dict(config))
        return make_trainer({**own, "training": {**own["training"], **changed}}, dataset, device)

    trainer = make(accumulation=parts)
    if device.type == "cpu":
        affordable = affordable_batch(trainer, seconds)
        if affordable < batch_size:
            del trainer
            trainer = make(accumulation=1, batch_size=min(affordable, batch_size // parts))
    compile_network(trainer.denoiser.network, device, trainer.options.compile)
    trainer.denoiser.network.train()
    return trainer


def affordable_batch(trainer: Trainer, seconds: float) -> int:
    """How many examples a CPU's step may have: all if it makes one within `seconds`, else as many as leave `REPEATS`.

    Forward and backward passes of more and more examples are timed, since few of them say little of many.
    """
    options, limit = trainer.options, SHARES["steps"] * seconds / REPEATS
    x, label = trainer.batches(0)
    t = torch.full((len(x),), trainer.denoiser.sde.T / 2, dtype=torch.float64)

    def once() -> None:
        labels = None if label is None else label[:n]
        trainer.loss.at(trainer.denoiser, x[:n], torch.randn_like(x[:n]), t[:n], labels)[0].sum().backward()

    n, most = 1, options.batch_size // options.accumulation
    once()  # the first time is slower
    while 2 * (taken := repeat(once, 0.02, trainer.device).median) < limit and n < most:
        n = min(2 * n, most)
    trainer.optimizer.zero_grad(set_to_none=True)
    whole = taken * options.batch_size / n
    return options.batch_size if whole <= seconds else max(1, min(most, int(n * limit / taken)))


def repeat(call: Callable[[], Any], seconds: float, device: torch.device, compiled: bool = False) -> Timing:
    """Time `call` for some `seconds`: the first time, which counts only if no time is left then, and once at least."""

    def timed(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / count

    begin = time.perf_counter()
    first = timed(1)
    if first >= seconds and not compiled:
        return Timing((first,), first, warm=False)
    begin = time.perf_counter() if compiled else begin
    group = max(1, math.ceil(_GROUP / timed(1))) if device.type == "cuda" else 1
    taken = [timed(group)]
    while time.perf_counter() - begin < seconds:
        taken.append(timed(group))
    return Timing(tuple(taken), first, warm=True)


def compiled(trainer: Trainer) -> bool:
    """Whether the first step compiles the network."""
    return getattr(trainer.denoiser.network, "_compiled_call_impl", None) is not None


@torch.no_grad()
def time_evaluations(trainer: Trainer, step: float, seconds: float) -> tuple[float, int]:
    """Seconds of an evaluation of the averaged network for one example, and how many were taken at a time.

    Args:
        trainer: whose network.
        step: seconds of a training step, of which an evaluation takes about a third.
        seconds: about how long this may take.
    """
    options = trainer.options
    affordable = int(seconds / (step / 3 / options.batch_size))
    n = max(1, min(PICTURES, options.batch_size // options.accumulation, affordable))
    x, label = trainer.batches(0)
    x, label = x[:n], None if label is None else label[:n]
    denoiser = trainer.averaged
    t = 0.5 * denoiser.sde.T

    def evaluate() -> Tensor:
        with autocast(trainer.device, options.precision):
            return denoiser.denoised(x, t, label)

    return repeat(evaluate, seconds, trainer.device).median / n, n


def time_optimizer(trainer: Trainer, seconds: float) -> float:
    """Seconds of an update of weights and averages; the weights are not worth anything afterwards."""

    def update() -> None:
        trainer.optimizer.step()
        trainer.averages.update(trainer.step)

    for p in trainer.denoiser.network.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    taken = repeat(update, seconds, trainer.device).median
    trainer.optimizer.zero_grad(set_to_none=True)
    return taken


def state_bytes(trainer: Trainer) -> int:
    """Bytes of the tensors in a checkpoint."""
    return sum(leaf.nbytes for leaf in tree_leaves(trainer.state()) if isinstance(leaf, Tensor))


def kept_checkpoints(options: TrainingOptions) -> int:
    """The most checkpoints that there are at a time; a new one is written before an old one goes."""
    written = -(-options.steps // options.checkpoint_every)
    if not options.keep:
        return written
    for_good = options.steps // options.keep_every if options.keep_every else 0
    return min(written, options.keep + 1 + for_good + (options.keep_best is not None))


def preview_evaluations(config: Mapping[str, Any], trainer: Trainer) -> int | None:
    """Network evaluations of a sample of the previews; None for a solver that chooses its own steps."""
    solver: Solver = build(config["preview_solver"], "solver")
    times = make_times(solver, trainer.denoiser, None, config["preview_steps"])
    if solver.default_steps is None:
        return None
    return count_evaluations(denoised_at_the_end(solver, trainer.denoiser, times), trainer.denoiser.sde, times)


def peak_rate(device: torch.device, precision: str) -> float | None:
    """Operations a second that a GPU can do in `precision`, if it is one of `PEAKS`."""
    if device.type != "cuda":
        return None
    allowed = precision == "tf32" or torch.backends.cudnn.allow_tf32
    return known_peak(torch.cuda.get_device_name(device), precision, allowed)


def known_peak(name: str, precision: str, tf32: bool) -> float | None:
    """The rate of `PEAKS` for a GPU called `name`; convolutions in float32 are TF32 where that is allowed."""
    words = name.replace("-", " ").split()
    column = {"bf16": 0, "fp16": 0, "tf32": 1, "fp32": 1 if tf32 else 2}.get(precision)
    for known, rates in PEAKS.items():
        if column is not None and all(word in words for word in known.split()):
            return rates[column] * 1e12
    return None
