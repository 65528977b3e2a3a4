"""Samples that are evaluated as they are drawn: a batch is drawn, decoded, described by its features and let go.

Each batch's features are a file of their own in a hidden folder beside the results, named by what made them, so that an
evaluation that is interrupted goes on where it was. Several processes share the batches.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sde.data import DataInfo
from sde.denoiser import AbstractDenoiser
from sde.distributed import collect, is_main, own_batches
from sde.errors import UserError
from sde.evaluation.extractors import Extractor
from sde.files import new_file
from sde.sampling import Plan, draw_batch


@dataclass(frozen=True)
class Described:
    """Examples as an evaluation knows them.

    Args:
        features: (n, D) float32.
        probabilities: of classes, (n, C), or None.
        examples: the first ones as they are stored, uint8 or float32 (k, *shape).
        nfe: network evaluations of each batch; empty for examples that were not drawn here.
        seconds: that drawing took, of all processes together.
    """

    features: Tensor
    probabilities: Tensor | None
    examples: Tensor
    nfe: tuple[int, ...] = ()
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.features)


def describe_all(batches: Iterable[Tensor], extractor: Extractor, keep: int) -> Described:
    """Features of stored examples that come in batches.

    Raises:
        UserError: when there are none.
    """
    features: list[Tensor] = []
    probabilities: list[Tensor] = []
    kept: list[Tensor] = []
    for batch in batches:
        found = extractor(batch)
        features.append(found.features)
        if found.probabilities is not None:
            probabilities.append(found.probabilities)
        left = keep - sum(len(part) for part in kept)
        if left > 0:
            kept.append(batch[:left].cpu())
    if not features:
        raise UserError("there are no samples to evaluate: give a file or folder that has some")
    return Described(torch.cat(features), torch.cat(probabilities) if probabilities else None, torch.cat(kept))


class Drawn:
    """Samples of a model, drawn and described batch by batch, with a file for each batch that is done.

    Args:
        denoiser: on the plan's device.
        plan: how they are drawn.
        info: of the data.
        extractor: gives the features.
        n: number of samples.
        batch_size: at once.
        labels: class labels (n,) or None.
        keep: so many examples are kept as they are.
        folder: where the files of done batches lie.
        identity: everything that the samples depend on, plain values.
    """

    def __init__(
        self,
        denoiser: AbstractDenoiser,
        plan: Plan,
        info: DataInfo,
        extractor: Extractor,
        n: int,
        batch_size: int,
        labels: Tensor | None,
        keep: int,
        folder: Path,
        identity: Mapping[str, Any],
    ) -> None:
        self.denoiser, self.plan, self.info, self.extractor = denoiser, plan, info, extractor
        self.n, self.labels, self.keep = n, labels, keep
        self.batches = own_batches(n, batch_size)
        text = json.dumps([identity, extractor.identity(), n, batch_size, plan.seed, keep], sort_keys=True, default=str)
        self.folder = folder / f".{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def __call__(self, progress: Callable[[float], None]) -> Described:
        """Draw what has not been drawn; rank 0 gets all of it, other processes their own part."""
        done = 0
        mine = max(1, sum(map(len, self.batches.values())))
        found: dict[int, Path] = {}
        for number, indices in self.batches.items():
            path = self.folder / f"{indices.start:08d}-{indices.stop:08d}.safetensors"
            if not _is_whole(path):
                before = done

                def report(share: float, *_: Any, before: int = before, size: int = len(indices)) -> None:
                    progress((before + share * size) / mine)

                self._draw(indices, path, report)
            done += len(indices)
            progress(done / mine)
            found[number] = path
        parts = [safetensors.torch.load_file(path) for path in collect(found)] if is_main() else []
        if not is_main():
            collect(found)
            return Described(torch.empty(0, 1), None, torch.empty(0))
        return Described(
            torch.cat([part["features"] for part in parts]),
            torch.cat([part["probabilities"] for part in parts]) if "probabilities" in parts[0] else None,
            torch.cat([part["examples"] for part in parts if "examples" in part]),
            tuple(int(part["cost"][0]) for part in parts),
            sum(float(part["cost"][1]) for part in parts),
        )

    def _draw(self, indices: range, path: Path, report: Callable[..., None]) -> None:
        label = None if self.labels is None else self.labels[indices.start : indices.stop].to(self.plan.device)
        started = time.perf_counter()
        solution = draw_batch(self.denoiser, self.plan, indices, label, report)
        stored = self.info.decode(solution.x)
        if stored.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        found = self.extractor(stored)
        tensors = {"features": found.features, "cost": torch.tensor([solution.nfe, seconds], dtype=torch.float64)}
        if found.probabilities is not None:
            tensors["probabilities"] = found.probabilities
        kept = max(0, min(len(indices), self.keep - indices.start))
        if kept:
            tensors["examples"] = stored[:kept].cpu()
        with new_file(path) as temporary:
            safetensors.torch.save_file({name: x.cpu().contiguous().clone() for name, x in tensors.items()}, temporary)

    def forget(self) -> None:
        """Delete the files of the batches."""
        if is_main():
            shutil.rmtree(self.folder, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    """Whether a batch has been done."""
    try:
        with safe_open(path, framework="pt") as file:
            return "features" in file.keys()  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError):
        return False
