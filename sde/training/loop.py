r"""The training loop.

Everything random in step k - the examples, the flips, the times, the noise, dropout - is a function of (seed, k).
So a run that was interrupted goes on exactly, and nothing has to be saved for it besides weights, averaged weights
and the optimizer.

Losses stay on the device until they are logged: the loop waits for the device every `log_every` steps only, and looks
then for a step whose loss was not finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sde.denoiser import Denoiser
from sde.devices import autocast
from sde.errors import UserError
from sde.losses import DenoisingScoreMatching
from sde.progress import progress_bar
from sde.randomness import step_seed
from sde.training.batches import Batches
from sde.training.ema import EMA
from sde.training.options import TrainingOptions
from sde.training.stopping import StopRequest


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
            UserError: when a loss or a gradient was not finite, naming the step and the noise levels.
        """
        steps = range(self._logged_from, self.step)
        rows = torch.tensor([step % self.options.log_every for step in steps], device=self.device)
        values = self._losses[rows].double().cpu()
        self._logged_from = self.step
        bad = (~torch.isfinite(values).all(1)).nonzero().flatten()
        if len(bad):
            step = steps[int(bad[0])]
            t = self._times[step % self.options.log_every]
            levels = self.denoiser.sde.noise_level(t).cpu()
            raise UserError(
                f"the loss of step {step} is {values[bad[0], 0].item():g} and its gradient's norm "
                f"{values[bad[0], 1].item():g}, at noise levels from {levels.min():.3g} to "
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
        """Go on from a checkpoint, with the optimizer's options as they were asked for now."""
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.denoiser.network.load_state_dict(content["model"])
        self.ema.network.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        for group, asked in zip(self.optimizer.param_groups, options, strict=True):
            group.update(asked)
        self.step = self._logged_from = int(content["step"])


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
