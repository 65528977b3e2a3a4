"""Features of data, kept, with a hash of everything that they were made from.

    <cache>/features-<key>.safetensors    features (m, D), probabilities (m, C); the header tells what they are of

The key is a hash of the stored examples that were used, in their order, and of the extractor's identity. A file in the
cache that does not fit or is damaged is made again; one that the user names is refused with what differs.

Others publish a mean and a covariance, as an .npz of `mu` and `sigma` (pytorch-fid, EDM). Such statistics are enough
for a Frechet distance, but nothing in them tells the network, the resizing or the pictures that they are of.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sde.data import Dataset, Order
from sde.data.base import check_whole
from sde.data.cache import cache_dir, new_file
from sde.distributed import collect, is_main, on_main, own_batches, share
from sde.errors import UserError
from sde.evaluation.digests import digest_of, digest_of_examples, digest_of_tensors
from sde.evaluation.extractors import Extractor, Features
from sde.files import atomic_write
from sde.metrics.frechet import Moments
from sde.progress import progress_bar

VERSION = 1  # of the files
UNCHECKED = "statistics of others: which network, resizing, rounding and pictures they are of cannot be checked"


@dataclass(frozen=True)
class Reference:
    """Features of data.

    Args:
        features: (m, D) float32, on the CPU.
        probabilities: of classes, (m, C), or None.
        key: a hash of the examples and of what was done to them.
        about: the facts: data, split, n, of, seed, examples (their hash), features (the extractor), pipeline (its
            identity).
    """

    features: Tensor
    probabilities: Tensor | None
    key: str
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.features)


# Features of many examples


def extract(
    extractor: Extractor, read: Callable[[range], Tensor], n: int, batch_size: int, name: str = "features"
) -> Features:
    """The features of examples 0 .. n - 1, in batches, with a progress bar. Several processes share the batches.

    Args:
        extractor: prepared.
        read: gives stored examples by their numbers.
        n: how many there are.
        batch_size: examples at once.
        name: of the bar.

    Returns:
        All features in rank 0; the others get those of their own batches.
    """
    own = own_batches(n, batch_size)
    found = {}
    with progress_bar(sum(map(len, own.values())), unit="example", desc=name) as bar:
        for number, rows in own.items():
            found[number] = extractor(read(rows))
            bar.update(len(rows))
    parts = collect(found)
    if not parts:
        return Features(torch.empty(0, 0))
    probabilities = [part.probabilities for part in parts if part.probabilities is not None]
    return Features(torch.cat([part.features for part in parts]), torch.cat(probabilities) if probabilities else None)


def reference(
    dataset: Dataset,
    split: str,
    extractor: Extractor,
    device: torch.device,
    batch_size: int,
    n: int | None = None,
    seed: int = 0,
) -> Reference:
    """The features of a split, from the cache if they are there. All processes have to ask.

    Args:
        dataset: the data.
        split: "train" or "test".
        extractor: prepared for these data, or not yet prepared.
        device: where to prepare it.
        batch_size: examples at once; does not change them.
        n: how many examples; None for all.
        seed: which, if not all: the first `n` of a shuffle, in the order that the split has them in.

    Returns:
        All of it in rank 0; in the others the features are empty.

    Raises:
        UserError: there is no such split, `n` is out of range, or the cache cannot be written.
    """
    if not extractor.prepared:
        extractor.prepare(dataset, device)
    values = dataset.split(split).values
    chosen = choose(len(values), n, seed)
    about = on_main(lambda: _facts(dataset, split, extractor, values, chosen, seed))
    key = digest_of(VERSION, about["examples"], about["pipeline"])
    path = cache_dir() / f"features-{key[:16]}.safetensors"
    found = _read_cached(path, about) if is_main() else None
    if share(found is None):

        def read(rows: range) -> Tensor:
            return values[rows.start : rows.stop] if chosen is None else values[chosen[rows.start : rows.stop]]

        m = len(values) if chosen is None else len(chosen)
        made = extract(extractor, read, m, batch_size, f"features of the {split} split")
        on_main(lambda: write_reference(path, Reference(*made, key, about), cache=True))
        found = made
    if found is None or not is_main():
        found = Features(torch.empty(0, 0))
    return Reference(*found, key, about)


def choose(count: int, n: int | None, seed: int) -> Tensor | None:
    """Which n of `count` examples, ascending; None for all.

    Raises:
        UserError: there are not so many.
    """
    if count == 0:
        raise UserError("the split has no examples: choose another")
    if n is None:
        return None
    check_whole("n", n, at_least=1, at_most=count)
    return None if n == count else Order(count, n, seed)(0).sort().values


def _facts(
    dataset: Dataset, split: str, extractor: Extractor, values: Tensor, chosen: Tensor | None, seed: int
) -> dict[str, Any]:
    """What `Reference.about` says, by which two references are compared."""
    return {
        "data": dataset.info.name,
        "split": split,
        "n": len(values) if chosen is None else len(chosen),
        "of": len(values),
        "seed": None if chosen is None else seed,
        "examples": digest_of_examples(values, chosen),
        "features": extractor.name,
        "pipeline": extractor.identity(),
    }


# Files


def write_reference(path: Path, found: Reference, *, cache: bool = False) -> None:
    """Write features with what they are of, atomically.

    Raises:
        UserError: a file of the cache cannot be written.
        OSError: another cannot be.
    """
    tensors = {"features": found.features.contiguous()}
    if found.probabilities is not None:
        tensors["probabilities"] = found.probabilities.contiguous()
    facts = {"version": VERSION, **found.about, "content": digest_of_tensors(tensors), "torch": torch.__version__}
    content = safetensors.torch.save(tensors, {"reference": json.dumps(facts)})
    if cache:
        with new_file(path) as temporary:
            temporary.write_bytes(content)
    else:
        with atomic_write(path) as file:
            file.write(content)


def read_reference(path: Path) -> Reference:
    """What `write_reference` wrote.

    Raises:
        UserError: there is no such file, it is damaged, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"reference={path} does not exist: give a file of features or of statistics")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["reference"])
        tensors = safetensors.torch.load_file(path)
        version, content, _ = (facts.pop(name) for name in ("version", "content", "torch"))
        key = digest_of(version, facts["examples"], facts["pipeline"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"reference={path} is damaged or holds no features of this package: make it anew") from error
    if version != VERSION:
        raise UserError(f"reference={path} has version {version} and this package reads {VERSION}: make it anew")
    if "features" not in tensors or digest_of_tensors(tensors) != content:
        raise UserError(f"reference={path} is damaged: its numbers are not those that were written; make it anew")
    return Reference(tensors["features"], tensors.get("probabilities"), key, facts)


def _read_cached(path: Path, about: Mapping[str, Any]) -> Features | None:
    try:
        found = read_reference(path)
    except UserError:
        return None
    same = all(found.about.get(name) == about[name] for name in ("examples", "pipeline"))
    return Features(found.features, found.probabilities) if same else None


def open_reference(path: Path, extractor: Extractor, dataset: Dataset | None = None, split: str = "train") -> Reference:
    """Features that the user names, made by the same extractor, of examples of `dataset` if that is given.

    Raises:
        UserError: the file cannot be read, or was made from something else; the message says what differs.
    """
    found = read_reference(path)
    theirs = found.about
    if theirs["features"] != extractor.name:
        raise UserError(
            f"reference={path} holds features={theirs['features']} and these are features={extractor.name}: "
            "give one that was made with the same"
        )
    if theirs["pipeline"] != extractor.identity():
        raise UserError(
            f"reference={path} was made by another features={extractor.name} (its options, weights or version differ: "
            f"{theirs['pipeline'][:8]}, and these are {extractor.identity()[:8]}): make it anew"
        )
    if dataset is None:
        return found
    values = dataset.split(split).values
    ours = f"{len(values)} examples of the {split} split of {dataset.info.name}"
    what = f"reference={path} was made from {theirs['n']} of {theirs['of']} examples of the {theirs['split']} split of "
    what += str(theirs["data"])
    if (theirs["split"], theirs["of"]) != (split, len(values)):
        raise UserError(f"{what}, and here are {ours}: give one of the same data")
    chosen = choose(len(values), theirs["n"], theirs["seed"] or 0)
    if digest_of_examples(values, chosen) != theirs["examples"]:
        raise UserError(f"{what}, whose pixels or values are not those of the {ours} here: make it anew")
    return found


# Statistics of others


@dataclass(frozen=True)
class Statistics:
    """A mean and a covariance.

    Args:
        mean: (D,) float64.
        covariance: (D, D) float64.
        source: the file.
        note: what cannot be known about them.
    """

    mean: Tensor
    covariance: Tensor
    source: str
    note: str = UNCHECKED


def read_statistics(path: Path, dimensions: int | None = None) -> Statistics:
    """The mean `mu` and covariance `sigma` in an .npz file, as pytorch-fid and EDM write them; read without pickle.

    Args:
        path: the file.
        dimensions: that they must have; None for any.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"reference={path} does not exist: give an .npz file of mu and sigma")
    if path.suffix != ".npz":
        raise UserError(
            f"reference={path} is not an .npz file: statistics are arrays mu and sigma in one (a .pkl can run code and "
            "is not read)"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not {"mu", "sigma"} <= set(arrays.files):
                raise UserError(f"reference={path} has {', '.join(arrays.files) or 'nothing'}, not mu and sigma")
            mu, sigma = (arrays[name] for name in ("mu", "sigma"))
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"reference={path} is damaged or is not an .npz file of arrays ({error})") from error
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or "f" not in (mu.dtype.kind, sigma.dtype.kind):
        raise UserError(f"reference={path} has mu of shape {mu.shape} and sigma of {sigma.shape}: not (D,) and (D, D)")
    mean, covariance = (torch.from_numpy(x.astype(np.float64)) for x in (mu, sigma))
    if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise UserError(f"reference={path} holds values that are not finite: get the file anew")
    if float((covariance - covariance.mT).abs().max()) > 1e-4 * float(covariance.abs().max()):
        raise UserError(f"reference={path} has a sigma that is not symmetric: it is no covariance")
    if dimensions is not None and len(mean) != dimensions:
        raise UserError(
            f"reference={path} has {len(mean)} dimensions and the features have {dimensions}: they are of another "
            "network (published ones have 2048, for features=inception)"
        )
    return Statistics(mean, (covariance + covariance.mT) / 2, str(path))


def write_statistics(path: Path, features: Tensor) -> None:
    """Write mean and covariance (over m - 1) of features (m, D) as `mu` and `sigma`, float64, atomically.

    Raises:
        UserError: fewer than two features.
        OSError: the file cannot be written.
    """
    if len(features) < 2:
        raise UserError(f"{len(features)} examples have no covariance: take at least 2")
    moments = Moments.of(features)
    with atomic_write(path) as file:
        np.savez(file, mu=moments.mean.numpy(), sigma=moments.covariance().numpy())
