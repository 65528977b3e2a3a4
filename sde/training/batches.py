"""Which examples each step sees, as the network sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from sde.data import Dataset, Order, Split
from sde.errors import UserError
from sde.randomness import step_seed


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
        indices = self._send(self.order(step), self.split.values.device)
        values = self._send(self.split.values[indices], self.device)
        x = self.info.encode(values)
        if self.flip:
            generator = torch.Generator().manual_seed(step_seed(self.seed, step, "flip"))
            flips = self._send(torch.rand(len(x), generator=generator) < 0.5, self.device)
            x = torch.where(flips[:, None, None, None], x.flip(-1), x)
        label = None if self.labels is None else self._send(self.labels[indices], self.device)
        return x, label

    @staticmethod
    def _send(tensor: Tensor, device: torch.device) -> Tensor:
        """`tensor` on `device`, without waiting for the device: only pinned memory is copied in the background."""
        if tensor.device == device or device.type != "cuda":
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)


def fits(split: Split, device: torch.device) -> bool:
    """Whether a split may live on the device: within a quarter of a GPU's free memory; always false for the CPU,
    where a memory-mapped file is best left as it is."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return split.nbytes < free / 4
