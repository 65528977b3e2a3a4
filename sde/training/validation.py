"""The loss on held-out examples, overall and by noise level."""

from __future__ import annotations

import torch
from torch import Tensor

from sde.data import DataInfo, Dataset, Order
from sde.denoiser import Denoiser
from sde.devices import autocast
from sde.losses import DenoisingScoreMatching
from sde.randomness import step_seed
from sde.training.batches import check_pixels, dequantize
from sde.training.options import TrainingOptions


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
        if options.dequantize:
            check_pixels(self.info)
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
        seed = step_seed(self.options.seed, 0, "dequantize validation")
        uniform = torch.Generator(self.device).manual_seed(seed)
        results = []
        for part in torch.arange(len(self.values)).split(self.options.batch_size):
            x0 = self.info.encode(self.values[part].to(self.device))
            if self.options.dequantize:
                x0 = dequantize(x0, self.info, uniform)
            label = None if self.labels is None else self.labels[part].to(self.device)
            z = torch.empty_like(x0).normal_(generator=generator)
            with autocast(self.device, self.options.precision):
                results.append(loss.at(denoiser, x0, z, t[part.to(self.device)], label))
        weighted, errors = zip(*results, strict=True)
        return torch.cat(weighted), torch.cat(errors)
