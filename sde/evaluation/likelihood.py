"""How likely a model finds examples that it was trained on and others: where the first are likelier, it overfits.

The numbers are those of `python -m sde.likelihood` at its defaults, for the same examples and seed: log P by the
probability-flow ODE, of gray levels for pictures, of the density for vectors. The gap is that of bits per dimension,
held-out less training examples, and of log P the other way round: above 0 where the model overfits. The examples of
the two splits are independent, so the squares of their standard errors add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sde.data import DataInfo, Dataset, Order
from sde.denoiser import AbstractDenoiser
from sde.density.discrete import DiscreteLogProb, Discretization
from sde.density.likelihood import Likelihood, Scores, suitable_dequantization, without_nan
from sde.density.quantization import Quantization
from sde.distributed import collect, is_main, own_batches
from sde.errors import UserError
from sde.evaluation.scores import with_error

SPLITS = ("train", "test")
_TOLD = ("bits_per_dim", "standard_error", "log_prob", "log_prob_standard_error", "n", "nfe")  # in a metrics.jsonl
Progress = Callable[[float], None]


def likelihood_of(denoiser: AbstractDenoiser, info: DataInfo, dequantized: bool) -> Likelihood:
    """The way of `python -m sde.likelihood` at its defaults.

    Args:
        denoiser: the model.
        info: the facts about its data.
        dequantized: whether it was trained on dequantized pictures.

    Raises:
        UserError: for a network that no ODE can be made of.
    """
    if getattr(denoiser, "label_kind", "time") == "index":
        raise UserError(
            "diagnostics=likelihood follows an ODE through all noise levels and this network knows discrete ones "
            "alone: leave it out"
        )
    levels = Quantization.of(info) if info.kind == "pixels" else None
    return Likelihood.of(denoiser, info, Discretization(suitable_dequantization(info.kind, dequantized), levels))


@dataclass(frozen=True)
class TrainAndTest:
    """Which examples are compared.

    Args:
        dataset: of both splits.
        labeled: whether the model is told classes.
        examples: at most as many of each split, chosen by the seed.
        seed: of the choice and of all draws.
        batch_size: examples at once; no number depends on it.
        device: where the model is.

    Raises:
        UserError: a split has no two examples.
    """

    dataset: Dataset
    labeled: bool
    examples: int
    seed: int
    batch_size: int
    device: torch.device

    def __post_init__(self) -> None:
        for split in SPLITS:
            found = len(self.dataset.split(split))
            if found < 2:
                raise UserError(
                    f"diagnostics=likelihood compares training with held-out data and split={split} of "
                    f"{self.dataset.info.name} has {found or 'no'} examples: leave it out, or hold some out"
                )

    @property
    def counts(self) -> list[int]:
        """How many of either split."""
        return [min(self.examples, len(self.dataset.split(split))) for split in SPLITS]

    @property
    def n(self) -> int:
        """How many in all."""
        return sum(self.counts)

    def __call__(self, likelihood: Likelihood, progress: Progress) -> dict[str, Any] | None:
        """The comparison as plain values, in rank 0; several processes share the examples.

        Args:
            likelihood: the model and the way.
            progress: told of the share that is done.

        Returns:
            "train" and "test", each as `Likelihood.summary` has it with the size of the split; "gap" with the same
            names; "about", the way, and "seed". Numbers that are not finite are None.
        """
        found: dict[str, Any] = {}
        for k, split in enumerate(SPLITS):
            before, share = sum(self.counts[:k]) / self.n, self.counts[k] / self.n

            def part(inner: float, before: float = before, share: float = share) -> None:
                progress(before + inner * share)

            scores = self._score(likelihood, split, self.counts[k], part)
            if is_main():
                found[split] = {**likelihood.summary(scores), "split_size": len(self.dataset.split(split))}
        if not is_main():
            return None
        gap = _gap(found["train"], found["test"])
        return dict(without_nan({**found, "gap": gap, "seed": self.seed, "about": likelihood.describe()}))

    def _score(self, likelihood: Likelihood, split: str, n: int, progress: Progress) -> Scores:
        """The first n of the split in the seed's order; all of them in rank 0."""
        data = self.dataset.split(split)
        indices = Order(len(data), n, self.seed)(0)
        labels = data.labels[indices] if self.labeled and data.labels is not None else None
        own = own_batches(n, self.batch_size)
        mine, done = sum(map(len, own.values())), 0
        found: dict[int, tuple[list[int], DiscreteLogProb]] = {}
        for number, batch in own.items():
            rows = slice(batch.start, batch.stop)

            def report(share: float, done: int = done, size: int = len(batch)) -> None:
                progress((done + share * size) / mine)

            values = likelihood(
                data.values[indices[rows]].to(self.device),
                label=None if labels is None else labels[rows].to(self.device),
                seed=self.seed,
                indices=indices[rows].tolist(),
                progress=report,
            )
            found[number] = indices[rows].tolist(), values
            done += len(batch)
            progress(done / mine)
        scores = Scores()
        for index, values in collect(found):
            scores.add(index, values)
        return scores


def _gap(train: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, float]:
    """How much likelier training examples are."""
    return {
        "bits_per_dim": test["bits_per_dim"] - train["bits_per_dim"],
        "standard_error": math.hypot(test["standard_error"], train["standard_error"]),
        "log_prob": train["log_prob"] - test["log_prob"],
        "log_prob_standard_error": math.hypot(test["log_prob_standard_error"], train["log_prob_standard_error"]),
    }


# What is told


def likelihood_rows(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of a table: bits per dimension of pictures; of vectors nats, which their densities are commonly told in."""
    vectors = found["about"]["quantization"] is None
    unit, name, error = (
        ("nats", "log_prob", "log_prob_standard_error") if vectors else ("bits/dim", "bits_per_dim", "standard_error")
    )
    rows = []
    for split in (*SPLITS, "gap"):
        each = found[split]
        value = -each[name] if vectors and split != "gap" and each[name] is not None else each[name]
        row = {"-log P" if not vectors else "-log p": f"{unit}, {split}" if split != "gap" else "gap, test - train"}
        row["value"] = with_error(value, each[error])
        row["examples"] = f"{each['n']} of {each['split_size']}" if split != "gap" else ""
        row["NFE"] = f"{each['nfe']:.4g}" if split != "gap" else ""
        rows.append(row)
    return rows


def likelihood_way(found: Mapping[str, Any]) -> str:
    """How it was computed, and of what, in a line."""
    about = found["about"]
    words = [f"{about['method']}, dequantization {about['dequantization']}"]
    if about["decoder"] is not None:
        words.append(f"decoder {about['decoder']['kind']}")
    words.append(f"{about['draws']} draw{'s' if about['draws'] > 1 else ''}")
    for name in ("solver", "divergence"):
        options = ", ".join(f"{key} {value}" for key, value in about[f"{name}_options"].items() if value is not None)
        words.append(f"{name} {about[name]}" + (f" ({options})" if options else ""))
    words.append(f"from t = {about['t_min']:.4g} to {about['T']:g}")
    counts = " and ".join(f"{found[split]['n']} of split={split}" for split in SPLITS)
    words.append(f"{counts}, chosen by seed {found['seed']}, from which the draws come too")
    return "; ".join(words)


def likelihood_numbers(found: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers and words for a metrics.jsonl."""
    numbers = {
        f"evaluation/likelihood/{split}/{name}": float(found[split][name])
        for split in (*SPLITS, "gap")
        for name in _TOLD
        if found[split].get(name) is not None
    }
    about = found["about"]
    words = {"kind": f"{about['method']}-{about['dequantization']}", "way": likelihood_way(found)}
    return numbers, {f"evaluation/likelihood/{name}": text for name, text in words.items()}
