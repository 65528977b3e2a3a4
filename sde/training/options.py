"""How long and how to train: the settings of the loop, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sde.devices import PRECISIONS, check_compile
from sde.errors import UserError, check_choice, check_flag, check_number
from sde.registry import Registry

TRAINING: Registry[TrainingOptions] = Registry("training")
PARALLEL = ("ddp", "fsdp")
NON_FINITE = ("stop", "skip")


@TRAINING.register("default")
@dataclass(frozen=True)
class TrainingOptions:
    """How long and how to train.

    Args:
        steps: optimizer steps in all.
        batch_size: examples of one optimizer step, of all processes together. In a configuration also "auto": the
            most that fit, found before the training.
        accumulation: parts in which a process's share of a batch goes through the network, to save memory.
        seed: of everything random.
        device: auto, cpu, cuda or cuda:0, ...
        precision: fp32; tf32 (products of float32 in TF32); bf16 or fp16 for the network where the device has units for
            it (weights and loss stay float32; fp16 with a scaled loss); fp64 for everything.
        compile: compile the network with torch.compile: False, True, "auto" (on a GPU) or "graphs" (on a GPU, with CUDA
            graphs).
        parallel: what several processes have of the network: "ddp", a whole copy each; "fsdp", a part each of weights,
            averages and optimizer state (FSDP2), for networks that do not fit.
        deterministic: let a repeated run give the same bits on a GPU too; slower. On a CPU it does so anyway.
        workers: processes that read ahead where the examples do not fit on the GPU; "auto" for 2 then, 0 for none.
        dequantize: add uniform noise one gray level wide to the pixels, in training and validation; not for vectors.
        clip: largest norm of the gradient; 0 does not clip.
        warmup: steps over which the learning rate rises from 0.
        non_finite: what a loss or gradient that is not finite does: "stop" ends the training at the next line of the
            log, naming step and noise levels; "skip" leaves the weights as they are in that step and counts it.
        log_every: steps between lines of the log.
        validate_every: steps between validation losses; 0 for never.
        validation_examples: examples of the test split that they are measured on.
        preview_every: steps between grids of samples; 0 for never.
        preview_samples: samples of a grid.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep: newest checkpoints that are kept; 0 for all.
        keep_every: keep the checkpoints of every so many steps for good; 0 for none.
        keep_best: also keep the checkpoint with the lowest value of this metric, such as val/loss, which is then
            measured for every checkpoint; None for none.
    """

    steps: int = 100_000
    batch_size: int = 128
    accumulation: int = 1
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    compile: bool | str = False
    parallel: str = "ddp"
    deterministic: bool = False
    workers: int | str = "auto"
    dequantize: bool = False
    clip: float = 1.0
    warmup: int = 1000
    non_finite: str = "stop"
    log_every: int = 50
    validate_every: int = 1000
    validation_examples: int = 512
    preview_every: int = 5000
    preview_samples: int = 36
    checkpoint_every: int = 5000
    keep: int = 3
    keep_every: int = 0
    keep_best: str | None = None

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
            ("keep_every", 0),
        ):
            check_number(f"training.{name}", getattr(self, name), at_least=least)
        check_number("training.clip", self.clip, at_least=0)
        check_choice("training.precision", self.precision, (*PRECISIONS, "fp64"))
        check_choice("training.parallel", self.parallel, PARALLEL)
        check_choice("training.non_finite", self.non_finite, NON_FINITE)
        check_compile("training.compile", self.compile)
        check_flag("training.dequantize", self.dequantize)
        check_flag("training.deterministic", self.deterministic)
        if self.workers != "auto":
            if not isinstance(self.workers, int) or isinstance(self.workers, bool):
                raise UserError(f"training.workers={self.workers!r} must be a whole number or auto")
            check_number("training.workers", self.workers, at_least=0)
        if self.batch_size % self.accumulation:
            raise UserError(
                f"training.accumulation={self.accumulation} does not divide training.batch_size={self.batch_size}: "
                "choose a divisor"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and data."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def parts(self, processes: int) -> int:
        """In how many parts a batch goes through the networks of all processes.

        Raises:
            UserError: when there are more of them than examples.
        """
        parts = processes * self.accumulation
        if parts > self.batch_size:
            raise UserError(
                f"training.batch_size={self.batch_size} is less than one example for each of {processes} processes "
                f"and training.accumulation={self.accumulation}: raise it, or start fewer processes"
            )
        return parts
