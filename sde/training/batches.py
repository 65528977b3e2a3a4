r"""Which examples each step sees, as the network sees them.

The batch of step k is a function of (seed, k). Of several processes, each makes its own rows of it: what row i gets,
noise and flips included, does not depend on who makes it.

Pixels are whole numbers, and a density that is to be high on them can be made as high as one likes: it has to be that
of data without atoms (arXiv 1511.01844, section 3.1). `dequantize` spreads every pixel evenly over its bucket,

    x + w (u - 1/2),    u uniform on (0, 1),    w = (high - low) / 255,

and then -log_2 of the probability of a picture is at most that of the density times the volume w^D, on average over u.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as StepData

from sde.data import DataInfo, Dataset, Order, Split
from sde.density.dequantizer import uniform
from sde.density.quantization import Quantization
from sde.errors import UserError
from sde.randomness import SampleNoise, step_seed


class Batches:
    """The training examples of each step, as the network sees them.

    Args:
        dataset: where they come from; its training split is kept on `device` when it fits in a quarter of the memory.
        batch_size: examples of a step, of all processes together.
        seed: of order, flips and dequantization.
        device: where the network is.
        labeled: give class labels too.
        dequantize: add uniform noise one gray level wide; for pixels alone.
        dtype: of the examples.
        rows: which rows of the batch to make; all by default.
        workers: processes that read ahead; "auto" for 2 where the examples are not on a GPU that works on them.

    Attributes:
        split: all training examples.
        order: which of them each step has.

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
        dtype: torch.dtype = torch.float32,
        rows: range | None = None,
        workers: int | str = 0,
    ) -> None:
        self.info = dataset.info
        self.device = device
        self.seed = seed
        self.dequantize = dequantize
        self.dtype = dtype
        self.rows = rows if rows is not None else range(batch_size)
        if dequantize:
            check_pixels(self.info)
        self.flip = dataset.random_flip and self.info.kind == "pixels"
        split = dataset.split("train")
        if len(split) == 0:
            raise UserError(f"data={self.info.name} has no training examples: give another source or split")
        self.split = split.to(device) if fits(split, device) else split
        self.labels = self.split.labels if labeled else None
        self.order = Order(len(split), batch_size, seed)
        if workers == "auto":
            workers = 2 if device.type == "cuda" and self.split.values.device != device else 0
        self._workers = int(workers)
        self._ahead: Iterator[tuple[Tensor, Tensor | None]] | None = None
        self._next = -1

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The examples (b, *shape) of step `step`, b rows of it, and their labels (b,) or None."""
        values, label = self._stored(step)
        x = self.info.encode(self._send(values, self.device), self.dtype)
        if self.flip:
            generator = torch.Generator().manual_seed(step_seed(self.seed, step, "flip"))
            drawn = torch.rand(self.order.batch_size, generator=generator)[self.rows.start : self.rows.stop]
            flips = self._send(drawn < 0.5, self.device)
            x = torch.where(flips[:, None, None, None], x.flip(-1), x)
        if self.dequantize:
            x = dequantize(x, self.info, self.noise(step, "dequantize"))
        return x, None if label is None else self._send(label, self.device)

    def noise(self, step: int, purpose: str) -> Tensor:
        """Standard normals (b, *shape) for the examples of a step; row i of a batch is the same whoever draws it."""
        seed = step_seed(self.seed, step, purpose) >> 1
        return SampleNoise(seed, self.rows, tuple(self.info.shape), dtype=self.dtype, device=self.device).lend()

    def _stored(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The rows of a step as they are stored, where they are, or in memory if workers read them."""
        if not self._workers:
            return _Stored(self.split.values, self.labels, self.order, self.rows)[step]
        if self._ahead is None or step != self._next:
            stored = _Stored(self.split.values, self.labels, self.order, self.rows)
            loader = DataLoader(
                stored,
                batch_size=None,
                sampler=_From(step),
                num_workers=self._workers,
                pin_memory=self.device.type == "cuda",
                prefetch_factor=4,
            )
            self._ahead = iter(loader)
        self._next = step + 1
        values, label = next(self._ahead)
        return values, label

    @staticmethod
    def _send(tensor: Tensor, device: torch.device) -> Tensor:
        """`tensor` on `device`, without waiting for the device: only pinned memory is copied in the background."""
        if tensor.device == device or device.type != "cuda":
            return tensor.to(device)
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(device, non_blocking=True)


class _Stored(StepData[tuple[Tensor, Tensor | None]]):
    """The rows of each step as they are stored; item k is step k. It goes to the workers, so it holds no more."""

    def __init__(self, values: Tensor, labels: Tensor | None, order: Order, rows: range) -> None:
        self.values, self.labels, self.order, self.rows = values, labels, order, rows

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor | None]:
        indices = self.order(step)[self.rows.start : self.rows.stop]
        if self.values.device.type == "cuda":
            indices = Batches._send(indices, self.values.device)
        return self.values[indices], None if self.labels is None else self.labels[indices]


class _From:
    """The whole numbers from `start` on."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1


def check_pixels(info: DataInfo) -> None:
    """Raise `UserError` unless the data are pictures, which have gray levels."""
    if info.kind != "pixels":
        raise UserError(f"training.dequantize=true: data={info.name} has vectors and no gray levels: leave it out")


def dequantize(x: Tensor, info: DataInfo, noise: Tensor) -> Tensor:
    """Encoded pixels `x` (B, C, H, W) spread evenly over their buckets by standard normal `noise` of the same shape.

    A part of 2^-13 is left out at either end of a bucket, since rounding to float32 could take what lies there into the
    next one. So `info.decode` gives the pixels back, all of them.
    """
    u = uniform(noise.double())
    return Quantization.of(info).dequantize(x, _MARGIN + (1 - 2 * _MARGIN) * u, x.dtype)


_MARGIN = 2.0**-13


def fits(split: Split, device: torch.device) -> bool:
    """Whether a split may live on the device: within a quarter of a GPU's free memory; always false for the CPU,
    where a memory-mapped file is best left as it is."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return split.nbytes < free / 4
