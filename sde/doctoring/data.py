r"""The data as the network sees it: range, scale, spread, and examples that look wrong.

The largest distance between two examples is what the largest noise level of a variance-exploding process is measured
against (arXiv 2006.09011, technique 1). All pairs are looked at in blocks of matrix products,

    |a - b|^2 = |a|^2 + |b|^2 - 2 a.b,

with the mean of the data taken away first, so that little cancels, and the winning pair is measured again in float64.
Where all examples are too many, a subset drawn at random is taken, and what it gives is a lower bound.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde.data import DataInfo, Dataset, Split, measure_sigma_data
from sde.errors import UserError
from sde.progress import progress_bar

SAMPLE_VALUES = 1 << 24  # numbers of the sample that range and repetitions are looked up in
SAMPLE_EXAMPLES = 8192
DISTANCE_WORK = 4e10  # multiplications that the largest distance may take: seconds on two cores
DISTANCE_VALUES = 1 << 27  # numbers that it may look at: half a GiB
SIGMA_VALUES = 1 << 28  # numbers up to which sigma_data is measured on all examples
_BLOCK = 1024


@dataclass(frozen=True)
class DataFacts:
    """What the training data is like.

    Attributes:
        name: of the data set.
        kind: "pixels" or "vectors".
        shape: of an example.
        train: training examples.
        test: test examples; 0 without.
        classes: of its labels; 0 without.
        sample: examples that the following six were measured on.
        low: smallest value that the network sees.
        high: largest.
        mean: of all values.
        std: of all values.
        constant: share of examples whose values are all the same.
        repeated: share of examples that are byte for byte another one of the sample.
        not_finite: share of examples with a value that is not a finite number.
        sigma_data: root mean square deviation from the one mean, as EDM's preconditioning needs it.
        sigma_examples: examples that it was measured on.
        distance: largest Euclidean distance of two examples, a lower bound unless all were looked at.
        distance_examples: examples that it was looked for in.
        gray_level: distance of two gray levels, as the network sees them; None for vectors.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    train: int
    test: int
    classes: int
    sample: int
    low: float
    high: float
    mean: float
    std: float
    constant: float
    repeated: float
    not_finite: float
    sigma_data: float
    sigma_examples: int
    distance: float
    distance_examples: int
    gray_level: float | None


def examine_data(dataset: Dataset, seed: int, device: torch.device) -> DataFacts:
    """Measure the training split of a data set, on a sample of it where it is large.

    Args:
        dataset: where the data comes from.
        seed: of the samples.
        device: where distances are computed.

    Raises:
        UserError: without training examples.
    """
    info, split = dataset.info, dataset.split("train")
    if len(split) == 0:
        raise UserError(f"data={info.name} has no training examples: give another source or split")
    numel = math.prod(info.shape)
    stored = draw_sample(split, min(SAMPLE_EXAMPLES, max(16, SAMPLE_VALUES // numel)), seed)
    seen = info.encode(stored).flatten(1)
    sigma, of = measure_scale(split, info, stored)
    far = draw_sample(split, distance_examples(numel), seed)
    finite = torch.isfinite(seen).all(1)
    good = seen[finite].double()
    return DataFacts(
        name=info.name,
        kind=info.kind,
        shape=tuple(info.shape),
        train=len(split),
        test=count_test(dataset),
        classes=info.num_classes,
        sample=len(stored),
        low=float(good.min()) if len(good) else math.nan,
        high=float(good.max()) if len(good) else math.nan,
        mean=float(good.mean()) if len(good) else math.nan,
        std=float(good.std(correction=0)) if len(good) else math.nan,
        constant=float((seen == seen[:, :1]).all(1).double().mean()) if numel > 1 else 0.0,
        repeated=repeated_share(stored),
        not_finite=float(1 - finite.double().mean()),
        sigma_data=sigma,
        sigma_examples=of,
        distance=largest_distance(info.encode(far).flatten(1).to(device)),
        distance_examples=len(far),
        gray_level=(info.high - info.low) / 255 if info.kind == "pixels" else None,
    )


def draw_sample(split: Split, n: int, seed: int) -> Tensor:
    """The stored values of all examples, or of `n` of them drawn without repetition (n, *shape), on the CPU."""
    if len(split) <= n:
        return split.values.cpu()
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(len(split), generator=generator)[:n].sort().values
    return split.values[indices.to(split.values.device)].cpu()


def count_test(dataset: Dataset) -> int:
    """Test examples; 0 for a source without."""
    try:
        return len(dataset.split("test"))
    except UserError:
        return 0


def measure_scale(split: Split, info: DataInfo, sample: Tensor) -> tuple[float, int]:
    """sigma_data and the number of examples it was measured on; 0 where all values are the same."""
    small = split.values.numel() <= SIGMA_VALUES
    try:
        return measure_sigma_data(split if small else Split(sample), info), len(split) if small else len(sample)
    except UserError:
        return 0.0, len(split) if small else len(sample)


def repeated_share(values: Tensor) -> float:
    """The share of examples (N, ...) that an earlier one equals byte for byte."""
    flat = values.contiguous().flatten(1).numpy()
    different = {hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in flat}
    return 1 - len(different) / len(values)


def distance_examples(numel: int) -> int:
    """How many examples of `numel` values can be compared with each other in seconds."""
    quick = int(math.sqrt(2 * DISTANCE_WORK / (numel + 64)))
    return max(2, min(16384, quick, DISTANCE_VALUES // numel))


def largest_distance(x: Tensor, block: int = _BLOCK) -> float:
    """The largest Euclidean distance between two rows of `x` (N, D); examples that are not finite do not count.

    Args:
        x: float32 or float64.
        block: rows that are compared with `block` others at a time.
    """
    x = x[torch.isfinite(x).all(1)]
    if len(x) < 2:
        return 0.0
    x = x - x.mean(0)
    squares = x.square().sum(1)
    best, pair = -1.0, (0, 0)
    starts = [(i, j) for i in range(0, len(x), block) for j in range(i, len(x), block)]
    with progress_bar(len(starts), desc="distances", unit="block", leave=False, delay=2) as bar:
        for i, j in starts:
            rows, columns = x[i : i + block], x[j : j + block]
            apart = squares[i : i + block, None] + squares[j : j + block] - 2 * rows @ columns.T
            place = int(apart.argmax())
            largest = float(apart.flatten()[place])
            if largest > best:
                best, pair = largest, (i + place // len(columns), j + place % len(columns))
            bar.update()
    return float((x[pair[0]].double() - x[pair[1]].double()).norm())
