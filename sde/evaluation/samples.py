"""Samples that are evaluated as they are drawn: a batch is drawn, decoded, described by its features and let go.

Each batch's features are a file of their own in a hidden folder beside the results, named by what made them, so that an
evaluation that is interrupted goes on where it was. Several processes share the batches.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sde.data import DataInfo, Order
from sde.denoiser import AbstractDenoiser
from sde.distributed import collect, is_main, on_main, own_batches
from sde.errors import UserError
from sde.evaluation.extractors import Extractor
from sde.evaluation.loader import Samples
from sde.evaluation.reference import extract
from sde.files import new_file
from sde.sampling import Plan, draw_batch

_PARTS = ".samples-"  # how the names of folders of done batches begin


@dataclass(frozen=True)
class Described:
    """Examples as an evaluation knows them.

    Args:
        features: (n, D) float32.
        probabilities: of classes, (n, C), or None.
        examples: some as they are stored, uint8 or float32 (k, *shape): the first ones of those that were drawn, and
            of a file, where they may be sorted, random ones.
        nfe: network evaluations of a sample, the mean; None for examples that were not drawn here.
        seconds: that drawing took, of all processes together.
        labels: class that each was drawn of, (n,), or None.
    """

    features: Tensor
    probabilities: Tensor | None
    examples: Tensor
    nfe: float | None = None
    seconds: float = 0.0
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def some(self, n: int) -> Described:
        """n of them, chosen at random by seed 0: files may be sorted."""
        rows = Order(len(self), n, 0)(0)
        probabilities = None if self.probabilities is None else self.probabilities[rows]
        labels = None if self.labels is None else self.labels[rows]
        return Described(self.features[rows], probabilities, self.examples, self.nfe, self.seconds, labels)


def describe_file(samples: Samples, extractor: Extractor, batch_size: int, keep: int) -> Described:
    """The examples of a file, `keep` of them kept as they are; all of it in rank 0, which shares the work.

    Raises:
        UserError: one is damaged.
    """
    n = len(samples)
    found = extract(extractor, samples.read, n, batch_size, "features of the samples")
    if not is_main():
        return _nothing()
    kept = torch.zeros(n, dtype=torch.bool)
    kept[Order(n, min(n, keep), 0)(0)] = True
    parts = []
    for start in range(0, n, batch_size):
        rows = range(start, min(start + batch_size, n))
        if kept[start : rows.stop].any():
            parts.append(samples.read(rows)[kept[start : rows.stop]])
    return Described(found.features, found.probabilities, torch.cat(parts))


def _nothing() -> Described:
    """What processes other than the first have."""
    return Described(torch.empty(0, 1), None, torch.empty(0))


def forget_given_up(folder: Path, days: float = 7.0) -> None:
    """Delete what interrupted evaluations into `folder` have left, unless they were gone on with in the last days."""
    for parts in folder.glob(f"{_PARTS}*"):
        files = [parts, *parts.iterdir()] if parts.is_dir() else []
        if files and time.time() - max(file.stat().st_mtime for file in files) > days * 86400:
            shutil.rmtree(parts, ignore_errors=True)


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
        folder: the folder of the files of done batches lies in it.
        identity: everything besides that the samples depend on, plain values.
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
        self.folder = folder / f"{_PARTS}{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def draw(self, progress: Callable[[float], None]) -> None:
        """Draw what has not been drawn of this process's batches.

        Args:
            progress: called with the share of them that is done; what it raises leaves what is done.

        Raises:
            UserError: samples are not finite.
        """
        done, mine = 0, max(1, sum(map(len, self.batches.values())))
        for indices in self.batches.values():
            if not _is_whole(self._path(indices)):

                def report(share: float, *_: Any, before: int = done, size: int = len(indices)) -> None:
                    progress((before + share * size) / mine)

                self._draw(indices, report)
            done += len(indices)
            progress(done / mine)

    def collected(self) -> Described:
        """All samples, once all processes have drawn theirs, in rank 0."""
        paths = collect({number: self._path(indices) for number, indices in self.batches.items()})
        if not is_main():
            return _nothing()
        parts = [safetensors.torch.load_file(path) for path in paths]
        evaluations = sum(len(part["features"]) * float(part["cost"][0]) for part in parts)
        return Described(
            torch.cat([part["features"] for part in parts]),
            torch.cat([part["probabilities"] for part in parts]) if "probabilities" in parts[0] else None,
            torch.cat([part["examples"] for part in parts if "examples" in part]),
            evaluations / self.n,
            sum(float(part["cost"][1]) for part in parts),
            None if self.labels is None else self.labels.cpu(),
        )

    def kept(self) -> int:
        """How many samples all processes have drawn so far."""

        def count() -> int:
            paths = [path for path in self.folder.glob("*.safetensors") if _is_whole(path)]
            return sum(int(stop) - int(start) for start, stop in (path.stem.split("-") for path in paths))

        return on_main(count)

    def forget(self) -> None:
        """Delete the files of the batches."""
        if is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, indices: range) -> Path:
        return self.folder / f"{indices.start:08d}-{indices.stop:08d}.safetensors"

    def _draw(self, indices: range, report: Callable[..., None]) -> None:
        label = None if self.labels is None else self.labels[indices.start : indices.stop].to(self.plan.device)
        started = time.perf_counter()
        solution = draw_batch(self.denoiser, self.plan, indices, label, report)
        bad = int((~torch.isfinite(solution.x)).flatten(1).any(1).sum())
        if bad:
            raise UserError(
                f"{bad} of samples {indices.start} to {indices.stop - 1} of seed {self.plan.seed} are not finite: the "
                "solver is not stable with these steps, so take more of them"
            )
        stored = self.info.decode(solution.x)
        seconds = time.perf_counter() - started  # the search for bad ones has waited for the device
        found = self.extractor(stored)
        tensors = {"features": found.features, "cost": torch.tensor([solution.nfe, seconds], dtype=torch.float64)}
        if found.probabilities is not None:
            tensors["probabilities"] = found.probabilities
        kept = max(0, min(len(indices), self.keep - indices.start))
        if kept:
            tensors["examples"] = stored[:kept].cpu()
        with new_file(self._path(indices)) as temporary:
            safetensors.torch.save_file({name: x.cpu().contiguous().clone() for name, x in tensors.items()}, temporary)


def _is_whole(path: Path) -> bool:
    """Whether a batch has been done."""
    try:
        with safe_open(path, framework="pt") as file:
            return "features" in file.keys()  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError):
        return False
