r"""The training loop.

Everything random in step k - the examples, the flips, the times, the noise, dropout - is a function of (seed, k).
So a run that was interrupted goes on exactly, and nothing has to be saved for it besides weights, averaged weights
and the optimizer.

A step's batch is cut into equal parts: one for each process, and these into `accumulation` parts that go through the
network one after the other. Every example's noise depends on its row of the batch alone, and the seed of dropout on
the number of the part among all, so that two processes make the step that one process makes, with dropout if it cuts
the batch into as many parts. The loss is the mean over the whole batch.

Losses stay on the device until they are logged: the loop waits for the device every `log_every` steps only, and looks
then for a step whose loss was not finite.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sde.denoiser import Denoiser
from sde.devices import autocast
from sde.distributed import (
    Agreement,
    full_optimizer_state,
    full_state,
    is_main,
    load_full_optimizer_state,
    load_full_state,
    part_of,
    total,
    world,
)
from sde.errors import UserError
from sde.losses import DenoisingScoreMatching
from sde.memory import peak_memory
from sde.progress import progress_bar
from sde.randomness import seed_global, step_seed
from sde.training.batches import Batches
from sde.training.ema import Averages
from sde.training.options import TrainingOptions
from sde.training.parallel import Objective, spread_objective
from sde.training.schedules import Constant, Schedule
from sde.training.stopping import StopRequest

_KEPT = 64  # steps whose errors wait to be told apart by noise level
_SMALLEST_SCALE = 2.0**-10  # of a loss in fp16: gradients that are not finite even then never will be
LEVELS = 10  # noise levels by which errors are told apart, equal in log-SNR


@dataclass
class Trainer:
    """What is trained, and how one step is made.

    Args:
        denoiser: holds the network; on the training device.
        averages: averaged weights of the same network.
        loss: the objective.
        optimizer: of the network's parameters.
        options: how.
        batches: the examples; this process's rows of each batch.
        schedule: of the learning rate.
        step: optimizer steps made so far.
        skipped: how many of them left the weights as they were, for a gradient that was not finite.

    Attributes:
        averaged: a denoiser with the first of the averages.
    """

    denoiser: Denoiser
    averages: Averages
    loss: DenoisingScoreMatching
    optimizer: torch.optim.Optimizer
    options: TrainingOptions
    batches: Batches
    schedule: Schedule = field(default_factory=Constant)
    step: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        options, size = self.options, world().size
        self.device = self.batches.device
        self.lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.parameters = [p for p in self.denoiser.network.parameters() if p.requires_grad]
        self.averaged = Denoiser(self.averages.primary, self.denoiser.sde, self.denoiser.parameterization)
        self.objective = Objective(self.denoiser, self.loss)
        self.spread = spread_objective(self.objective, options.parallel, self.device)
        parts = options.parts(size)
        own = part_of(parts, world().rank, size)
        self._parts = [(part, part_of(options.batch_size, part, parts)) for part in own]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")
        self._skips_on_device = bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))
        examples, kept = len(self.batches.rows), min(options.log_every, _KEPT)
        self._losses = torch.zeros(options.log_every, 2, dtype=options.dtype, device=self.device)
        self._errors = torch.zeros(kept, examples, dtype=options.dtype, device=self.device)
        self._times = torch.zeros(kept, examples, dtype=torch.float64, device=self.device)
        self._by_level = torch.zeros(2, LEVELS, dtype=torch.float64, device=self.device)
        self._logged_from = self._summed_to = self.step

    def make_step(self) -> None:
        """One optimizer step; its loss and gradient norm stay on the device until `flush`."""
        options, step, first = self.options, self.step, self.batches.rows.start
        x0, label = self.batches(step)
        t = self.times(step)
        z = self.batches.noise(step, "noise of the examples")
        if x0.ndim == 4:
            x0, z = (v.contiguous(memory_format=torch.channels_last) for v in (x0, z))
        row = step % options.log_every
        self._losses[row] = 0
        for part, rows in self._parts:
            seed_global(step_seed(options.seed, step, f"dropout {part}"), self.device)
            mine = slice(rows.start - first, rows.stop - first)
            last = part == self._parts[-1][0]
            with self.spread.accumulating(not last), autocast(self.device, options.precision):
                losses, errors = self.spread.objective(
                    x0[mine], z[mine], t[rows.start : rows.stop], None if label is None else label[mine]
                )
            loss = losses.sum() / options.batch_size
            # gradients are averaged over processes, and have to be added up
            self.scaler.scale(loss * world().size).backward()
            self._losses[row, 0] += loss.detach()
            self._errors[step % len(self._errors), mine] = errors.detach()
        self._times[step % len(self._times)] = t[first : self.batches.rows.stop]
        self._losses[row, 1] = self._update(step)
        self.averages.update(step)
        self.step = step + 1
        if self.step - self._summed_to == len(self._errors):
            self._sum_by_level()

    def times(self, step: int) -> Tensor:
        """Times of all examples of a step, (batch_size,) float64."""
        generator = torch.Generator(self.device).manual_seed(step_seed(self.options.seed, step, "noise"))
        return self.loss.draw_times(self.denoiser.sde, self.options.batch_size, generator, self.device)

    def _update(self, step: int) -> Tensor:
        """Change the weights; gives the norm of the gradient before clipping."""
        options = self.options
        self.scaler.unscale_(self.optimizer)
        norm = self.spread.clip(self.parameters, options.clip or math.inf)
        factor = self.schedule(step, options.steps, options.warmup)
        for group, lr in zip(self.optimizer.param_groups, self.lr, strict=True):
            group["lr"] = lr * factor
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif options.non_finite == "skip":
            loss = total(self._losses[step % options.log_every, 0].clone())
            self._step_if(torch.isfinite(norm) & torch.isfinite(loss))
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _step_if(self, finite: Tensor) -> None:
        """An optimizer step unless loss or gradient was not finite, which a fused optimizer finds out on the device."""
        if self._skips_on_device:
            fused: Any = self.optimizer
            fused.grad_scale, fused.found_inf = None, (~finite).float()
            fused.step()
            del fused.grad_scale, fused.found_inf
        elif bool(finite):
            self.optimizer.step()

    def flush(self, last_good: Callable[[], str]) -> dict[str, float]:
        """Means since the last flush, over all processes: loss, gradient norm, error by noise level.

        It waits for the device.

        Args:
            last_good: names the last checkpoint, for the message.

        Raises:
            UserError: when a loss or a gradient was not finite and such steps are not skipped, or all of them were,
                naming the step and the noise levels.
        """
        steps = range(self._logged_from, self.step)
        self._logged_from = self.step
        if not steps:
            return {}
        rows = torch.tensor([step % self.options.log_every for step in steps], device=self.device)
        by_level = self._errors_by_level()
        losses = total(self._losses[rows, 0].double()).cpu()
        norms = self._losses[rows, 1].double().cpu()
        overflows = ~torch.isfinite(norms) & self.scaler.is_enabled()  # are left out, and the loss is scaled less
        finite = torch.isfinite(losses) & (torch.isfinite(norms) | overflows)
        hopeless = overflows & (self.scaler.get_scale() < _SMALLEST_SCALE)
        bad = (~finite | hopeless).nonzero().flatten().tolist()
        if bad and (self.options.non_finite == "stop" or len(bad) == len(steps) > 1 or bool(hopeless.any())):
            raise UserError(self._sentence(steps[bad[0]], losses[bad[0]], norms[bad[0]], len(bad), last_good))
        self.skipped += len(bad) + int((overflows & finite).sum())
        if bad and is_main():
            print(
                f"\nwarning: the loss or gradient of step {steps[bad[0]]}"
                + (f" and {len(bad) - 1} later ones" if len(bad) > 1 else "")
                + f" was not finite: skipped, {self.skipped} in all",
                file=sys.stderr,
            )
        norms = norms[finite & torch.isfinite(norms)]
        return {
            "train/loss": losses[finite].mean().item(),
            **({"train/gradient_norm": norms.mean().item()} if len(norms) else {}),
            **({"train/skipped": float(self.skipped)} if self.skipped else {}),
            **({"train/loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}),
            **by_level,
        }

    def _sum_by_level(self) -> None:
        """Add the errors of the last steps to the sums of their noise levels, on the device."""
        rows = torch.arange(self._summed_to, self.step, device=self.device) % len(self._errors)
        self._summed_to = self.step
        sde, (low, width) = self.denoiser.sde, self._levels
        errors = self._errors[rows].double().flatten()
        level = ((sde.log_snr(self._times[rows].flatten()) - low) / width).long().clamp(0, LEVELS - 1)
        known = torch.isfinite(errors)
        self._by_level[0].index_add_(0, level, torch.where(known, errors, 0.0))
        self._by_level[1].index_add_(0, level, known.double())

    @property
    def _levels(self) -> tuple[float, float]:
        """Log-SNR at T, and the width of a noise level."""
        low, high = (float(self.denoiser.sde.log_snr(t)) for t in (self.denoiser.sde.T, self.denoiser.sde.t_min))
        return low, (high - low) / LEVELS

    def _errors_by_level(self) -> dict[str, float]:
        """Mean square error of eps since the last time, by noise level; levels without examples left out."""
        self._sum_by_level()
        sums, counts = total(self._by_level).tolist()
        self._by_level.zero_()
        low, width = self._levels
        centers = [low + width * (k + 0.5) for k in range(LEVELS)]
        found = zip(centers, sums, counts, strict=True)
        return {f"train/eps_mse/log_snr={c:.1f}": s / n for c, s, n in found if n}

    def _sentence(self, step: int, loss: Tensor, norm: Tensor, count: int, last_good: Callable[[], str]) -> str:
        levels = self.denoiser.sde.noise_level(self.times(step)).cpu()
        skipped = f" ({count} steps in a row, none of which could be skipped)" if count > 1 else ""
        return (
            f"the loss of step {step} is {loss.item():g} and its gradient's norm {norm.item():g}, at noise levels from "
            f"{levels.min():.3g} to {levels.max():.3g}"
            + (skipped if self.options.non_finite == "skip" else "")
            + f": lower optimizer.lr or training.clip; {last_good()}"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this trainer. All processes have to ask."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "model": full_state(self.denoiser.network),
            **self.averages.state(),
            "optimizer": full_optimizer_state(self.optimizer),
            **({"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}),
        }

    def load_state(self, content: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, with the optimizer's options as they were asked for now."""
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        load_full_state(self.denoiser.network, content["model"])
        self.averages.load_state(content)
        load_full_optimizer_state(self.optimizer, content["optimizer"])
        for group, asked in zip(self.optimizer.param_groups, options, strict=True):
            group.update(asked)
        if self.scaler.is_enabled() and "scaler" in content:
            self.scaler.load_state_dict(content["scaler"])
        self.step = self._logged_from = self._summed_to = int(content["step"])
        self.skipped = int(content.get("skipped", 0))


@dataclass
class Hooks:
    """What the loop calls besides training; each is told nothing that the trainer does not know. All processes call."""

    log: Callable[[dict[str, float]], None]
    validate: Callable[[], dict[str, float]]
    preview: Callable[[], None]
    snapshot: Callable[[], None]
    save: Callable[[bool], None]  # whether training ends with this checkpoint
    last_good: Callable[[], str]


def fit(trainer: Trainer, hooks: Hooks, stop: StopRequest) -> bool:
    """Train up to `options.steps`, or until `stop` in any process; the last step always has a checkpoint.

    Returns:
        Whether all steps were made.
    """
    options = trainer.options
    trainer.denoiser.network.train()
    clock, since = time.monotonic(), trainer.step
    asked_to_stop = Agreement()

    def due(every: int) -> bool:
        return bool(every) and (trainer.step % every == 0 or trainer.step == options.steps)

    with (
        contextlib.closing(asked_to_stop),
        progress_bar(options.steps, initial=trainer.step, unit="step", desc="training") as bar,
    ):
        while trainer.step < options.steps and not asked_to_stop(stop.signal is not None):
            trainer.make_step()
            bar.update()
            saves, snapshots = due(options.checkpoint_every), due(trainer.averages.options.snapshot_every)
            validates = due(options.validate_every) or (saves and options.keep_best is not None)
            if due(options.log_every) or validates or saves or snapshots:
                metrics = trainer.flush(hooks.last_good)
                seconds = time.monotonic() - clock
                metrics["train/pictures_per_second"] = (trainer.step - since) * options.batch_size / seconds
                metrics["train/lr"] = trainer.optimizer.param_groups[0]["lr"]
                metrics["train/epoch"] = trainer.batches.order.epoch(trainer.step)
                metrics["train/memory_gib"] = (peak_memory(trainer.device) or 0) / 2**30
                if validates:
                    metrics |= hooks.validate()
                hooks.log(metrics)
                bar.set_postfix_str(_brief(metrics), refresh=False)
                clock, since = time.monotonic(), trainer.step
            if snapshots:
                hooks.snapshot()
            if saves:
                hooks.save(trainer.step == options.steps)
            if due(options.preview_every):
                hooks.preview()
            if saves or due(options.preview_every):
                clock, since = time.monotonic(), trainer.step
    if trainer.step < options.steps:
        if trainer.step > trainer._logged_from:
            hooks.log(trainer.flush(hooks.last_good))
        hooks.save(True)
    return trainer.step >= options.steps


def _brief(metrics: Mapping[str, float]) -> str:
    text = f"loss {metrics['train/loss']:.4f}, {metrics['train/pictures_per_second']:.0f} pictures/s"
    return text + (f", validation {metrics['val/loss']:.4f}" if "val/loss" in metrics else "")
