r"""The training loop.

Everything random in step k - the examples, the flips, the times, the noise, dropout - is a function of (seed, k).
So a run that was interrupted goes on exactly, and nothing has to be saved for it besides weights, averaged weights
and the optimizer.

Losses stay on the device until they are logged: the loop waits for the device every `log_every` steps only, and looks
then for a step whose loss was not finite.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from sde.data import DataInfo, Dataset, Order, Split
from sde.denoiser import Denoiser
from sde.devices import PRECISIONS, autocast
from sde.errors import UserError, check_choice, check_number
from sde.losses import DenoisingScoreMatching
from sde.progress import progress_bar
from sde.randomness import step_seed
from sde.registry import Registry
from sde.training.ema import EMA

TRAINING: Registry[TrainingOptions] = Registry("training")


@TRAINING.register("default")
@dataclass(frozen=True)
class TrainingOptions:
    """How long and how to train.

    Args:
        steps: optimizer steps in all.
        batch_size: examples of one optimizer step.
        accumulation: parts in which a batch goes through the network, to save memory.
        seed: of everything random.
        device: auto, cpu, cuda, cuda:0, ... or mps.
        precision: fp32, or bf16 for the network (the loss stays float32).
        compile: compile the network with torch.compile.
        clip: largest norm of the gradient; 0 does not clip.
        warmup: steps over which the learning rate rises from 0.
        log_every: steps between lines of the log.
        validate_every: steps between validation losses; 0 for never.
        validation_examples: examples of the test split that they are measured on.
        preview_every: steps between grids of samples; 0 for never.
        preview_samples: samples of a grid.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep: newest checkpoints that are kept; 0 for all.
    """

    steps: int = 100_000
    batch_size: int = 128
    accumulation: int = 1
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    clip: float = 1.0
    warmup: int = 1000
    log_every: int = 50
    validate_every: int = 1000
    validation_examples: int = 512
    preview_every: int = 5000
    preview_samples: int = 36
    checkpoint_every: int = 5000
    keep: int = 3

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("accumulation", 1),
            ("seed", 0),
            ("warmup", 0),
            ("log_every", 1),
            ("validate_every", 0),
            ("validation_examples", 1),
            ("preview_every", 0),
            ("preview_samples", 1),
            ("checkpoint_every", 1),
            ("keep", 0),
        ):
            check_number(f"training.{name}", getattr(self, name), at_least=least)
        check_number("training.clip", self.clip, at_least=0)
        check_choice("training.precision", self.precision, PRECISIONS)
        if self.batch_size % self.accumulation:
            raise UserError(
                f"training.accumulation={self.accumulation} does not divide training.batch_size={self.batch_size}: "
                "choose a divisor"
            )


class Batches:
    """The training examples of each step, as the network sees them.

    Args:
        dataset: where they come from; its training split is kept on `device` when it fits in a quarter of the memory.
        batch_size: examples of a step.
        seed: of order and flips.
        device: where the network is.
        labeled: give class labels too.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, device: torch.device, labeled: bool) -> None:
        self.info = dataset.info
        self.device = device
        self.seed = seed
        self.flip = dataset.random_flip and self.info.kind == "pixels"
        split = dataset.split("train")
        if len(split) == 0:
            raise UserError(f"data={self.info.name} has no training examples: give another source or split")
        self.split = split.to(device) if fits(split, device) else split
        self.labels = self.split.labels if labeled else None
        self.order = Order(len(split), batch_size, seed)

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The examples (B, *shape) of step `step` and their labels (B,) or None."""
        indices = self.order(step).to(self.split.values.device)
        values = self.split.values[indices].to(self.device, non_blocking=True)
        x = self.info.encode(values)
        if self.flip:
            generator = torch.Generator().manual_seed(step_seed(self.seed, step, "flip"))
            flips = (torch.rand(len(x), generator=generator) < 0.5).to(self.device)
            x = torch.where(flips[:, None, None, None], x.flip(-1), x)
        label = None if self.labels is None else self.labels[indices].to(self.device)
        return x, label


def fits(split: Split, device: torch.device) -> bool:
    """Whether a split may live on the device: within a quarter of a GPU's free memory; always false for the CPU,
    where a memory-mapped file is best left as it is."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return split.nbytes < free / 4


class StopRequest:
    """Remembers that the process was asked to stop, so that the loop can save and leave between two steps."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take SIGINT and SIGTERM over within this context; a second SIGINT interrupts at once."""

        def handle(number: int, _frame: FrameType | None) -> None:
            if self.signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number
            print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)

        try:
            before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are somebody else's
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Trainer:
    """What is trained, and how one step is made.

    Args:
        denoiser: holds the network; on the training device.
        ema: averaged weights of the same network.
        loss: the objective.
        optimizer: of the network's parameters.
        options: how.
        batches: the examples.
        step: optimizer steps made so far.
    """

    denoiser: Denoiser
    ema: EMA
    loss: DenoisingScoreMatching
    optimizer: torch.optim.Optimizer
    options: TrainingOptions
    batches: Batches
    step: int = 0

    def __post_init__(self) -> None:
        self.device = self.batches.device
        self.lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.parameters = [p for p in self.denoiser.network.parameters() if p.requires_grad]
        self.averaged = Denoiser(self.ema.network, self.denoiser.sde, self.denoiser.parameterization)
        log_every = self.options.log_every
        self._losses = torch.zeros(log_every, 2, dtype=torch.float32, device=self.device)
        self._times = torch.zeros(log_every, self.options.batch_size, dtype=torch.float64, device=self.device)
        self._logged_from = self.step

    def make_step(self) -> None:
        """One optimizer step; its loss and gradient norm stay on the device until `flush`."""
        options, step = self.options, self.step
        torch.manual_seed(step_seed(options.seed, step, "dropout"))
        generator = torch.Generator(self.device).manual_seed(step_seed(options.seed, step, "noise"))
        x0, label = self.batches(step)
        t = self.loss.draw_times(self.denoiser.sde, len(x0), generator, self.device)
        z = torch.empty_like(x0).normal_(generator=generator)
        if x0.ndim == 4:
            x0, z = (v.contiguous(memory_format=torch.channels_last) for v in (x0, z))
        total = torch.zeros((), device=self.device)
        parts = options.accumulation
        labels = [None] * parts if label is None else label.chunk(parts)
        for part in zip(x0.chunk(parts), z.chunk(parts), t.chunk(parts), labels, strict=True):
            with autocast(self.device, options.precision):
                losses, _ = self.loss.at(self.denoiser, *part)
            loss = losses.sum() / len(x0)
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.parameters, options.clip or math.inf, foreach=True)
        for group, lr in zip(self.optimizer.param_groups, self.lr, strict=True):
            group["lr"] = lr * min(1.0, (step + 1) / options.warmup) if options.warmup else lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)
        row = step % options.log_every
        self._losses[row, 0], self._losses[row, 1] = total, norm
        self._times[row] = t
        self.step = step + 1

    def flush(self, last_good: Callable[[], str]) -> dict[str, float]:
        """Mean loss and gradient norm since the last flush; waits for the device.

        Args:
            last_good: names the last checkpoint, for the message.

        Raises:
            UserError: when a loss was not finite, naming the step and the noise levels.
        """
        steps = range(self._logged_from, self.step)
        rows = torch.tensor([step % self.options.log_every for step in steps], device=self.device)
        values = self._losses[rows].double().cpu()
        self._logged_from = self.step
        bad = (~torch.isfinite(values[:, 0])).nonzero().flatten()
        if len(bad):
            step = steps[int(bad[0])]
            t = self._times[step % self.options.log_every]
            levels = self.denoiser.sde.noise_level(t).cpu()
            raise UserError(
                f"the loss of step {step} is {values[bad[0], 0].item()}, at noise levels from {levels.min():.3g} to "
                f"{levels.max():.3g}: lower optimizer.lr or training.clip; {last_good()}"
            )
        return {"train/loss": values[:, 0].mean().item(), "train/gradient_norm": values[:, 1].mean().item()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this trainer."""
        return {
            "step": self.step,
            "model": self.denoiser.network.state_dict(),
            "ema": self.ema.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, content: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.denoiser.network.load_state_dict(content["model"])
        self.ema.network.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step = self._logged_from = int(content["step"])


class Validation:
    """The loss on the test split, overall and by noise level, with averaged weights and always the same noise.

    Args:
        dataset: its test split is used, or its training split when there is none.
        options: how many examples, and the seed.
        device: where the network is.
        labeled: give class labels too.
        levels: noise levels, equally spaced in log signal-to-noise ratio.
    """

    def __init__(
        self, dataset: Dataset, options: TrainingOptions, device: torch.device, labeled: bool, levels: int = 10
    ) -> None:
        self.info: DataInfo = dataset.info
        self.options = options
        self.device = device
        self.levels = levels
        split = dataset.split("test")
        if len(split) == 0:
            split = dataset.split("train")
        chosen = Order(len(split), min(options.validation_examples, len(split)), seed=0)(0)
        self.values = split.values[chosen]
        self.labels = split.labels[chosen] if labeled and split.labels is not None else None

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, loss: DenoisingScoreMatching) -> dict[str, float]:
        """`val/loss`, and `val/eps_mse/log_snr=...` for each noise level: mean square error of eps, 1 if it knows
        nothing and 0 if it knew the noise."""
        n, sde = len(self.values), denoiser.sde
        generator = torch.Generator(self.device).manual_seed(step_seed(self.options.seed, 0, "validation"))
        drawn = loss.draw_times(sde, n, generator, self.device)
        edges = [float(sde.log_snr(t)) for t in (sde.T, sde.t_min_sampling)]
        width = (edges[1] - edges[0]) / self.levels
        centers = edges[0] + width * (torch.arange(self.levels, dtype=torch.float64, device=self.device) + 0.5)
        level = torch.arange(n, device=self.device) % self.levels
        fixed = sde.t_of_log_snr(centers)[level]
        weighted, _ = self._evaluate(denoiser, loss, drawn, generator)
        _, errors = self._evaluate(denoiser, loss, fixed, generator)
        sums = torch.zeros(self.levels, device=self.device).index_add_(0, level, errors)
        means = (sums / torch.bincount(level, minlength=self.levels)).tolist()
        by_level = {f"val/eps_mse/log_snr={c:.1f}": m for c, m in zip(centers.tolist(), means, strict=True)}
        return {"val/loss": weighted.mean().item(), **by_level}

    def _evaluate(
        self, denoiser: Denoiser, loss: DenoisingScoreMatching, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        results = []
        for part in torch.arange(len(self.values)).split(self.options.batch_size):
            x0 = self.info.encode(self.values[part].to(self.device))
            label = None if self.labels is None else self.labels[part].to(self.device)
            z = torch.empty_like(x0).normal_(generator=generator)
            with autocast(self.device, self.options.precision):
                results.append(loss.at(denoiser, x0, z, t[part.to(self.device)], label))
        weighted, errors = zip(*results, strict=True)
        return torch.cat(weighted), torch.cat(errors)


@dataclass
class Hooks:
    """What the loop calls besides training; each is told nothing that the trainer does not know."""

    log: Callable[[dict[str, float]], None]
    validate: Callable[[], dict[str, float]]
    preview: Callable[[], None]
    save: Callable[[], None]
    last_good: Callable[[], str]


def fit(trainer: Trainer, hooks: Hooks, stop: StopRequest) -> None:
    """Train up to `options.steps`, or until `stop`; the last step always has a checkpoint."""
    options = trainer.options
    trainer.denoiser.network.train()
    clock, since = time.monotonic(), trainer.step

    def due(every: int) -> bool:
        return bool(every) and (trainer.step % every == 0 or trainer.step == options.steps)

    with progress_bar(options.steps, initial=trainer.step, unit="step", desc="training") as bar:
        while trainer.step < options.steps and stop.signal is None:
            trainer.make_step()
            bar.update()
            if due(options.log_every) or due(options.validate_every) or due(options.checkpoint_every):
                metrics = trainer.flush(hooks.last_good)
                seconds = time.monotonic() - clock
                metrics["train/pictures_per_second"] = (trainer.step - since) * options.batch_size / seconds
                metrics["train/lr"] = trainer.optimizer.param_groups[0]["lr"]
                clock, since = time.monotonic(), trainer.step
                if due(options.validate_every):
                    metrics |= hooks.validate()
                hooks.log(metrics)
                bar.set_postfix_str(_brief(metrics), refresh=False)
            if due(options.checkpoint_every):
                hooks.save()
            if due(options.preview_every):
                hooks.preview()
                clock, since = time.monotonic(), trainer.step
    if trainer.step < options.steps:
        if trainer.step > trainer._logged_from:
            hooks.log(trainer.flush(hooks.last_good))
        hooks.save()


def _brief(metrics: Mapping[str, float]) -> str:
    text = f"loss {metrics['train/loss']:.4f}, {metrics['train/pictures_per_second']:.0f} pictures/s"
    return text + (f", validation {metrics['val/loss']:.4f}" if "val/loss" in metrics else "")
