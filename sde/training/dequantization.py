r"""Training a dequantizer for a score model that stays as it is (arXiv 2101.09258, section 5).

What is made small is the mean of

    log q(u | picture) + B(x + w (u - 1/2)),      u ~ q,

where B bounds -log p: the continuous variational bound of the score model (`sde.density.bound`) with one noise level in
place of the integral over all. For a level drawn with density r(s), s in [0, 1] the place on the axis of the log
signal-to-noise ratio (log-SNR) from t_min to T,

    B = L_prior + (log-SNR(t_min) - log-SNR(T)) / (2 r(s)) ||eps(x_t, t) - z||^2.

How a pixel lies in its bucket is seen best at noise levels of about the bucket's size, so half of the levels are drawn
from those, and half from the whole axis. The mean of B bounds -log p_{t_min} averaged over noise of level t_min around
x, but for a constant: what a dequantizer learns from is the model's log density blurred by that much.

What is gained over uniform u is the mean of B(x + w (u' - 1/2)) - B(x + w (u - 1/2)) - log q(u), with u' uniform and
everything else the same. As in `loop`, all draws are functions of (seed, step).

    RUN/dequantizer/step-00001000.pt   a checkpoint (`checkpoint`): weights, average, optimizer, options
    RUN/dequantizer/metrics.jsonl      the record
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sde.data import DataInfo, Dataset, Order
from sde.denoiser import AbstractDenoiser
from sde.density.bound import integrand, log_snr_range, prior_term, quantile
from sde.density.dequantizer import Dequantizer, DequantizerOptions, uniform
from sde.density.quantization import Quantization
from sde.devices import autocast
from sde.errors import UserError, check_number
from sde.progress import progress_bar
from sde.randomness import step_seed
from sde.training.batches import Batches
from sde.training.checkpoint import Checkpoint, list_checkpoints, load_newest
from sde.training.ema import EMA
from sde.training.stopping import StopRequest

FOLDER = "dequantizer"
_FINE = (1 / 16, 4.0)  # buckets: noise levels between these tell most of where in its bucket a pixel lies


@dataclass(frozen=True)
class DequantizationOptions:
    """How long and how to train a dequantizer.

    Args:
        steps: optimizer steps in all.
        batch_size: pictures of one optimizer step.
        seed: of everything random.
        clip: largest norm of the gradient; 0 does not clip.
        warmup: steps over which the learning rate rises from 0.
        ema_decay: averaged weights: over about 1 / (1 - ema_decay) steps.
        log_every: steps between lines of the log.
        compare_every: steps between comparisons with uniform u, each of which evaluates the score model once more.
        validate_every: steps between measurements of the bits gained on the test split; 0 for never.
        validation_examples: examples of the test split that they are measured on.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep: newest checkpoints that are kept; 0 for all.
    """

    steps: int = 5000
    batch_size: int = 64
    seed: int = 0
    clip: float = 1.0
    warmup: int = 100
    ema_decay: float = 0.999
    log_every: int = 50
    compare_every: int = 5
    validate_every: int = 500
    validation_examples: int = 512
    checkpoint_every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("warmup", 0),
            ("log_every", 1),
            ("compare_every", 1),
            ("validate_every", 0),
            ("validation_examples", 1),
            ("checkpoint_every", 1),
            ("keep", 0),
        ):
            check_number(f"training.{name}", getattr(self, name), at_least=least)
        check_number("training.clip", self.clip, at_least=0)
        check_number("training.ema_decay", self.ema_decay, at_least=0, below=1)


class Levels(NamedTuple):
    """Noise levels of a batch: times t (B,), and the weight (B,) of the bound's integrand at each, float64."""

    t: Tensor
    weight: Tensor


class Objective:
    """The variational bound B of a score model, at one noise level for each picture.

    Args:
        denoiser: the score model; its weights are left alone.
        info: of its pictures.

    Raises:
        UserError: for vectors, which have no buckets.
    """

    def __init__(self, denoiser: AbstractDenoiser, info: DataInfo) -> None:
        self.denoiser, self.sde = denoiser, denoiser.sde
        self.width = Quantization.of(info).width
        self.range = log_snr_range(self.sde)
        finest = float(self.sde.noise_level(self.sde.t_min))
        low, high = (min(max(2 * math.log(k * self.width / finest) / self.range, 0.0), 1.0) for k in _FINE)
        length = min(max(high - low, 2 / self.range), 1.0)  # a factor of e at least, for buckets finer than all levels
        self.fine = (min(low, 1 - length), length)

    def draw(self, n: int, generator: torch.Generator | None, device: torch.device | str) -> Levels:
        """`n` noise levels, one in each of n equal parts of their distribution."""
        drawn = torch.rand(n, generator=generator, dtype=torch.float64, device=device)
        share = (torch.arange(n, device=device) + drawn) / n
        start, length = self.fine
        inner = 0.5 + 0.5 / length  # density of the places that are fine; that of the others is 1/2
        place = torch.where(
            share < 0.5 * start, 2 * share, torch.maximum(start + (share - 0.5 * start) / inner, 2 * share - 1)
        )
        fine = (place >= start) & (place < start + length)
        density = torch.where(fine, torch.full_like(place, inner), torch.full_like(place, 0.5))
        return Levels(quantile(self.sde, place), self.range / density)

    def place(self, x: Tensor, u: Tensor) -> Tensor:
        """Encoded pictures `x` (B, C, H, W) with each pixel at `u` in its bucket."""
        return x + self.width * (u - 0.5)

    def __call__(self, x: Tensor, z: Tensor, levels: Levels, label: Tensor | None = None) -> Tensor:
        """B in nats (B,), float64, of `x` (B, C, H, W) with standard normal noise `z`."""
        return prior_term(self.sde, x) + levels.weight * integrand(self.denoiser, x, z, levels.t, label)


@dataclass
class DequantizerTrainer:
    """What is trained, and how one step is made.

    Args:
        flow: the dequantizer, on the training device.
        ema: averaged weights of it.
        objective: the bound of the score model, which is on the same device and frozen.
        optimizer: of the flow's parameters.
        options: how.
        batches: the pictures.
        precision: of the score model, fp32 or bf16.
        step: optimizer steps made so far.
    """

    flow: Dequantizer
    ema: EMA
    objective: Objective
    optimizer: torch.optim.Optimizer
    options: DequantizationOptions
    batches: Batches
    precision: str = "fp32"
    step: int = 0

    def __post_init__(self) -> None:
        self.device = self.batches.device
        self.lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.bit = math.log(2) * math.prod(self.flow.shape)  # a bit for each dimension of a picture, in nats
        self._rows: list[Tensor] = []
        self._gains: list[Tensor] = []

    def make_step(self) -> None:
        """One optimizer step; what it measures stays on the device until `flush`."""
        options, step = self.options, self.step
        x, label = self.batches(step)
        generator = torch.Generator(self.device).manual_seed(step_seed(options.seed, step, "dequantizer"))
        levels = self.objective.draw(len(x), generator, self.device)
        noise, z = (torch.empty_like(x).normal_(generator=generator) for _ in range(2))
        u, log_q = self.flow(x, noise)
        bound = self._bound(x, u, z, levels, label)
        loss = (log_q + bound).mean() / math.prod(self.flow.shape)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.flow.parameters(), options.clip or math.inf)
        for group, lr in zip(self.optimizer.param_groups, self.lr, strict=True):
            group["lr"] = lr * min(1.0, (step + 1) / options.warmup) if options.warmup else lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)
        self._rows.append(torch.stack([loss.detach(), norm.detach(), log_q.detach().mean() / self.bit]))
        if step % options.compare_every == 0:
            with torch.no_grad():
                even = self._bound(x, uniform(noise), z, levels, label)
            self._gains.append((even - bound.detach() - log_q.detach()).mean() / self.bit)
        self.step = step + 1

    def _bound(self, x: Tensor, u: Tensor, z: Tensor, levels: Levels, label: Tensor | None) -> Tensor:
        with autocast(self.device, self.precision):
            return self.objective(self.objective.place(x, u), z, levels, label)

    @torch.no_grad()
    def gain(
        self, flow: Dequantizer, x: Tensor, generator: torch.Generator, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Bits per dimension that `flow` gains over uniform u, and log_2 q per dimension, of pictures x: (B,) each."""
        levels = self.objective.draw(len(x), generator, self.device)
        noise, z = (torch.empty_like(x).normal_(generator=generator) for _ in range(2))
        u, log_q = flow(x, noise)
        even, bound = (self._bound(x, v, z, levels, label) for v in (uniform(noise), u))
        return (even - bound - log_q) / self.bit, log_q / self.bit

    def flush(self) -> dict[str, float]:
        """Means since the last flush, without the gain where nothing was compared; waits for the device.

        Raises:
            UserError: when a loss or a gradient was not finite.
        """
        first = self.step - len(self._rows)
        values = torch.stack(self._rows).double().cpu()
        gains = torch.stack(self._gains).double().cpu() if self._gains else None
        self._rows, self._gains = [], []
        bad = (~torch.isfinite(values).all(1)).nonzero().flatten()
        if len(bad):
            row = values[bad[0]]
            raise UserError(
                f"the loss of step {first + int(bad[0])} is {row[0].item():g} and its gradient's norm "
                f"{row[1].item():g}: lower optimizer.lr or training.clip, or check the score model"
            )
        means = dict(
            zip(("train/loss", "train/gradient_norm", "train/bits_of_q"), values.mean(0).tolist(), strict=True)
        )
        return means if gains is None else means | {"train/bits_gained": gains.mean().item()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this trainer."""
        return {
            "step": self.step,
            "model": self.flow.state_dict(),
            "ema": self.ema.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, content: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, with the optimizer's options as they were asked for now."""
        asked = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.flow.load_state_dict(content["model"])
        self.ema.network.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        for group, options in zip(self.optimizer.param_groups, asked, strict=True):
            group.update(options)
        self.step = int(content["step"])


class GainValidation:
    """The bits gained on the test split, with averaged weights and always the same draws.

    Args:
        dataset: its test split is used, or its training split when there is none.
        trainer: whose dequantizer is measured.
        labeled: give class labels to the score model.
    """

    def __init__(self, dataset: Dataset, trainer: DequantizerTrainer, labeled: bool) -> None:
        self.info, self.trainer = dataset.info, trainer
        split = dataset.split("test")
        if len(split) == 0:
            split = dataset.split("train")
        chosen = Order(len(split), min(trainer.options.validation_examples, len(split)), seed=0)(0)
        self.values = split.values[chosen]
        self.labels = split.labels[chosen] if labeled and split.labels is not None else None

    def __call__(self) -> dict[str, float]:
        """`val/bits_gained` per dimension, its standard error, and `val/bits_of_q`, the mean of log_2 q.

        Within a batch each level is of a stratum of its own, in their order. So the error comes from the differences of
        neighbors: what one stratum differs from another is no error.
        """
        trainer, options = self.trainer, self.trainer.options
        device = trainer.device
        generator = torch.Generator(device).manual_seed(step_seed(options.seed, 0, "dequantizer validation"))
        flow = trainer.ema.network
        assert isinstance(flow, Dequantizer)
        gains, bits = [], []
        for part in torch.arange(len(self.values)).split(options.batch_size):
            x = self.info.encode(self.values[part].to(device))
            label = None if self.labels is None else self.labels[part].to(device)
            gain, bit = trainer.gain(flow, x, generator, label)
            gains.append(gain.double().cpu())
            bits.append(bit.double().cpu())
        steps = torch.cat([gain.diff() for gain in gains])
        error = math.sqrt(float(steps.square().mean()) / 2 / len(self.values)) if len(steps) else math.nan
        return {
            "val/bits_gained": float(torch.cat(gains).mean()),
            "val/bits_gained_error": error,
            "val/bits_of_q": float(torch.cat(bits).mean()),
        }


def fit_dequantizer(
    trainer: DequantizerTrainer,
    log: Callable[[int, dict[str, float]], None],
    validate: Callable[[], dict[str, float]],
    save: Callable[[], None],
    stop: StopRequest,
) -> None:
    """Train up to `options.steps`, or until `stop`; the last step always has a checkpoint."""
    options = trainer.options
    trainer.flow.train()
    clock, since = time.monotonic(), trainer.step

    def due(every: int) -> bool:
        return bool(every) and (trainer.step % every == 0 or trainer.step == options.steps)

    with progress_bar(options.steps, initial=trainer.step, unit="step", desc="dequantizer") as bar:
        while trainer.step < options.steps and stop.signal is None:
            trainer.make_step()
            bar.update()
            if due(options.log_every) or due(options.validate_every) or due(options.checkpoint_every):
                metrics = trainer.flush()
                metrics["train/pictures_per_second"] = (
                    (trainer.step - since) * options.batch_size / (time.monotonic() - clock)
                )
                metrics["train/lr"] = trainer.optimizer.param_groups[0]["lr"]
                if due(options.validate_every):
                    metrics |= validate()
                log(trainer.step, metrics)
                bar.set_postfix_str(_brief(metrics), refresh=False)
                clock, since = time.monotonic(), trainer.step
            if due(options.checkpoint_every):
                save()
    if trainer.step < options.steps:
        if trainer._rows:
            log(trainer.step, trainer.flush())
        save()


def _brief(metrics: Mapping[str, float]) -> str:
    gained = metrics.get("val/bits_gained", metrics.get("train/bits_gained"))
    speed = f"{metrics['train/pictures_per_second']:.0f} pictures/s"
    return speed if gained is None else f"{gained:+.4f} bits/dim gained, {speed}"


def newest_dequantizer(run_folder: Path) -> Checkpoint:
    """The newest whole checkpoint of the dequantizer of a run; a damaged newer one is named on standard error.

    Raises:
        UserError: when there is none, or all are damaged.
    """
    folder = run_folder / FOLDER
    known = list_checkpoints(folder)
    if not known:
        raise UserError(
            f"run={run_folder} has no dequantizer: train one with python -m sde.dequantize run={run_folder}"
        )
    try:
        return load_newest(folder)
    except UserError as error:
        raise UserError(
            f"no dequantizer in {folder} can be read ({error}): remove that folder and train it again with "
            f"python -m sde.dequantize run={run_folder}"
        ) from error


def restore_dequantizer(checkpoint: Checkpoint, info: DataInfo | None = None) -> Dequantizer:
    """The dequantizer of a checkpoint, with averaged weights, in evaluation mode, on the CPU.

    Args:
        checkpoint: as `newest_dequantizer` gives it.
        info: the facts about the pictures that it is wanted for; None does not compare them.

    Raises:
        UserError: when it is not that of a dequantizer, or was made for other pictures.
    """
    try:
        options = DequantizerOptions(**checkpoint.content["config"]["flow"])
        made_for = DataInfo.from_dict(checkpoint.content["data"])
        flow = Dequantizer(made_for.shape, options, Quantization.of(made_for))
        flow.load_state_dict(checkpoint.content["ema"])
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"{checkpoint.path} does not hold a dequantizer ({reason}): give one of python -m sde.dequantize"
        ) from error
    if info is not None:
        check_same_pictures(checkpoint, made_for, info)
    return flow.eval().requires_grad_(False)


def check_same_pictures(checkpoint: Checkpoint, made_for: DataInfo, info: DataInfo) -> None:
    """Raise `UserError` unless a dequantizer `made_for` some pictures fits those of `info`."""
    for name in ("shape", "low", "high"):
        theirs, ours = getattr(made_for, name), getattr(info, name)
        if theirs != ours:
            raise UserError(
                f"{checkpoint.path} was made for pictures with {name}={theirs} and these have {name}={ours}: "
                f"remove {checkpoint.path.parent} and train it again"
            )


def load_dequantizer(
    run_folder: str | Path, device: torch.device | str = "cpu", info: DataInfo | None = None
) -> Dequantizer:
    """The newest dequantizer of a run, with averaged weights, frozen, in evaluation mode, on `device`.

    Args:
        run_folder: of the run whose score model it was trained for.
        device: where it is to be.
        info: the facts about the pictures that it is wanted for; None does not compare them.

    Raises:
        UserError: when there is none, it is damaged, or was made for other pictures.
    """
    return restore_dequantizer(newest_dequantizer(Path(run_folder)), info).to(device)
