r"""Which examples each step sees, as the network sees them.

Pixels are whole numbers, and a density that is to be high on them can be made as high as one likes: it has to be that
of data without atoms (arXiv 1511.01844, section 3.1). `dequantize` spreads every pixel evenly over its bucket,

    x + w (u - 1/2),    u uniform on (0, 1),    w = (high - low) / 255,

and then -log_2 of the probability of a picture is at most that of the density times the volume w^D, on average over u.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sde.data import DataInfo, Dataset, Order, Split
from sde.density.quantization import Quantization
from sde.errors import UserError
from sde.randomness import step_seed


class Batches:
    """The training examples of each step, as the network sees them.

    Args:
        dataset: where they come from; its training split is kept on `device` when it fits in a quarter of the memory.
        batch_size: examples of a step.
        seed: of order, flips and dequantization.
        device: where the network is.
        labeled: give class labels too.
        dequantize: add uniform noise one gray level wide; for pixels alone.

    Raises:
        UserError: without training examples, or for vectors that are to be dequantized.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        device: torch.device,
        labeled: bool,
        dequantize: bool = False,
    ) -> None:
        self.info = dataset.info
        self.device = device
        self.seed = seed
        self.dequantize = dequantize
        if dequantize:
            check_pixels(self.info)
        self.flip = dataset.random_flip and self.info.kind == "pixels"
        split = dataset.split("train")
        if len(split) == 0:
            raise UserError(f"data={self.info.name} has no training examples: give another source or split")
        self.split = split.to(device) if fits(split, device) else split
        self.labels = self.split.labels if labeled else None
        self.order = Order(len(split), batch_size, seed)

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The examples (B, *shape) of step `step` and their labels (B,) or None."""
        indices = self._send(self.order(step), self.split.values.device)
        values = self._send(self.split.values[indices], self.device)
        x = self.info.encode(values)
        if self.flip:
            generator = torch.Generator().manual_seed(step_seed(self.seed, step, "flip"))
            flips = self._send(torch.rand(len(x), generator=generator) < 0.5, self.device)
            x = torch.where(flips[:, None, None, None], x.flip(-1), x)
        if self.dequantize:
            generator = torch.Generator(self.device).manual_seed(step_seed(self.seed, step, "dequantize"))
            x = dequantize(x, self.info, generator)
        label = None if self.labels is None else self._send(self.labels[indices], self.device)
        return x, label

    @staticmethod
    def _send(tensor: Tensor, device: torch.device) -> Tensor:
        """`tensor` on `device`, without waiting for the device: only pinned memory is copied in the background."""
        if tensor.device == device or device.type != "cuda":
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)


def check_pixels(info: DataInfo) -> None:
    """Raise `UserError` unless the data are pictures, which have gray levels."""
    if info.kind != "pixels":
        raise UserError(f"training.dequantize=true: data={info.name} has vectors and no gray levels: leave it out")


def dequantize(x: Tensor, info: DataInfo, generator: torch.Generator) -> Tensor:
    """Encoded pixels `x` (B, C, H, W) spread evenly over their buckets; `generator` is of the device of `x`.

    A part of 2^-13 is left out at either end of a bucket, since rounding to float32 could take what lies there into the
    next one. So `info.decode` gives the pixels back, all of them.
    """
    u = torch.rand(x.shape, generator=generator, device=x.device)
    return Quantization.of(info).dequantize(x, _MARGIN + (1 - 2 * _MARGIN) * u, x.dtype)


_MARGIN = 2.0**-13


def fits(split: Split, device: torch.device) -> bool:
    """Whether a split may live on the device: within a quarter of a GPU's free memory; always false for the CPU,
    where a memory-mapped file is best left as it is."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return split.nbytes < free / 4
