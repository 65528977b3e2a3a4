"""The loss on held-out examples, overall and by noise level, and the gradient that each noise level has."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sde.data import DataInfo, Dataset, Order
from sde.denoiser import Denoiser
from sde.devices import autocast
from sde.distributed import is_sharded, share_of, total, world
from sde.losses import DenoisingScoreMatching
from sde.randomness import SampleNoise, step_seed
from sde.training.batches import check_pixels, dequantize
from sde.training.options import TrainingOptions


class Validation:
    """The loss on the test split, overall and by noise level, with averaged weights and always the same noise.

    Several processes share the examples; the noise of each example is the same whoever takes it.

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
    def __call__(
        self, denoiser: Denoiser, loss: DenoisingScoreMatching, trained: Denoiser | None = None
    ) -> dict[str, float]:
        """What is measured, of all processes together.

        Args:
            denoiser: with averaged weights.
            loss: the objective.
            trained: with the weights that are trained; its gradients are measured if it is given.

        Returns:
            `val/loss`; `val/eps_mse/log_snr=...` for each noise level: mean square error of eps, 1 if it knows nothing
            and 0 if it knew the noise; and, of `trained`, `val/gradient_norm/log_snr=...`: norm of the gradient of the
            loss at that noise level.
        """
        n, sde = len(self.values), denoiser.sde
        generator = torch.Generator(self.device).manual_seed(step_seed(self.options.seed, 0, "validation"))
        drawn = loss.draw_times(sde, n, generator, self.device)
        edges = [float(sde.log_snr(t)) for t in (sde.T, sde.t_min_sampling)]
        width = (edges[1] - edges[0]) / self.levels
        centers = edges[0] + width * (torch.arange(self.levels, dtype=torch.float64, device=self.device) + 0.5)
        times = sde.t_of_log_snr(centers)
        level = torch.arange(n, device=self.device) % self.levels
        results = torch.zeros(3, self.levels, dtype=torch.float64, device=self.device)
        rows = range(n) if is_sharded(denoiser.network) else share_of(n)  # all have to work on what they share
        for start in range(rows.start, rows.stop, self.options.batch_size):
            part = range(start, min(start + self.options.batch_size, rows.stop))
            here = slice(part.start, part.stop)
            weighted, _ = self._evaluate(denoiser, loss, part, drawn[here], "loss")
            _, errors = self._evaluate(denoiser, loss, part, times[level[here]], "levels")
            results[0, 0] += weighted.double().sum()
            results[1].index_add_(0, level[here], errors.double())
            results[2].index_add_(0, level[here], torch.ones_like(errors, dtype=torch.float64))
        if not is_sharded(denoiser.network):
            total(results)
        means = (results[1] / results[2]).tolist()
        names = [f"log_snr={center:.1f}" for center in centers.tolist()]
        found = {f"val/eps_mse/{name}": mean for name, mean in zip(names, means, strict=True) if not math.isnan(mean)}
        if trained is not None:
            norms = self._gradient_norms(trained, loss, times)
            found |= {f"val/gradient_norm/{name}": norm for name, norm in zip(names, norms, strict=True)}
        return {"val/loss": results[0, 0].item() / n, **found}

    def _evaluate(
        self, denoiser: Denoiser, loss: DenoisingScoreMatching, rows: range, t: Tensor, purpose: str
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss and error of eps of the examples `rows` at times `t`, always with the same noise."""
        here = slice(rows.start, rows.stop)
        x0 = self.info.encode(self.values[here].to(self.device), self.options.dtype)
        if self.options.dequantize:
            x0 = dequantize(x0, self.info, self._noise(rows, "dequantize validation"))
        label = None if self.labels is None else self.labels[here].to(self.device)
        with autocast(self.device, self.options.precision):
            return loss.at(denoiser, x0, self._noise(rows, f"validation {purpose}"), t, label)

    def _noise(self, rows: range, purpose: str) -> Tensor:
        seed = step_seed(self.options.seed, 0, purpose) >> 1
        shape = tuple(self.info.shape)
        return SampleNoise(seed, rows, shape, dtype=self.options.dtype, device=self.device)()

    def _gradient_norms(self, trained: Denoiser, loss: DenoisingScoreMatching, times: Tensor) -> list[float]:
        """Norm of the gradient of the mean loss at each of `times`, over as many examples as a step has, or fewer.

        Computed by each process alone, in parts as large as those of a step; of a network that is spread over
        processes, by all together.
        """
        n = min(len(self.values), self.options.batch_size, _MOST)
        most = self.options.batch_size // self.options.parts(world().size)
        parts = [range(start, min(start + most, n)) for start in range(0, n, most)]
        network = trained.network
        parameters = [p for p in network.parameters() if p.requires_grad]
        training = network.training
        network.eval()
        norms = []
        try:
            for t in times:
                for rows in parts:
                    with torch.enable_grad():
                        weighted, _ = self._evaluate(trained, loss, rows, t.expand(len(rows)), "levels")
                        (weighted.sum() / n).backward()
                gradients = [p.grad for p in parameters if p.grad is not None]
                norms.append(torch.linalg.vector_norm(torch.stack([_norm(g) for g in gradients])))
                for p in parameters:
                    p.grad = None
        finally:
            network.train(training)
        return torch.stack(norms).tolist()


_MOST = 64  # examples that tell the size of a gradient well enough


def _norm(gradient: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(gradient)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
