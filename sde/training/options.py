"""How long and how to train: the settings of the loop, checked."""

from __future__ import annotations

from dataclasses import dataclass

from sde.devices import PRECISIONS, check_compile
from sde.errors import UserError, check_choice, check_flag, check_number
from sde.registry import Registry

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
        device: auto, cpu, cuda or cuda:0, ...
        precision: fp32, or bf16 for the network where the device has units for it (the loss stays float32).
        compile: compile the network with torch.compile: False, True, "auto" (on a GPU) or "graphs" (on a GPU, with CUDA
            graphs).
        dequantize: add uniform noise one gray level wide to the pixels, in training and validation; not for vectors.
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
    compile: bool | str = False
    dequantize: bool = False
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
        check_compile("training.compile", self.compile)
        check_flag("training.dequantize", self.dequantize)
        if self.batch_size % self.accumulation:
            raise UserError(
                f"training.accumulation={self.accumulation} does not divide training.batch_size={self.batch_size}: "
                "choose a divisor"
            )
