"""What an evaluation asks the model itself, without samples: `sde.evaluation.diagnostics` on examples of its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde.data import Dataset, Order
from sde.data.base import check_whole
from sde.denoiser import AbstractDenoiser, GaussianMixtureDenoiser
from sde.errors import UserError, check_choice
from sde.evaluation.diagnostics import Diagnostic, curl, denoising_error, fokker_planck, score_error
from sde.evaluation.empirical import EmpiricalDenoiser
from sde.evaluation.scores import with_error

LIKELIHOOD = "likelihood"  # of no noise level: see `sde.evaluation.likelihood`
NAMES = ("denoising", "curl", "fokker_planck", "score", LIKELIHOOD)
_SHOWN = {  # curves in the table; R relative to d_t s is large near pure noise for any model
    "denoising_error": ("train", "test", "gap"),
    "curl": ("asymmetry",),
    "fokker_planck": ("residual",),
    "score_error": ("error", "relative"),
}
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Asked:
    """Which diagnostics, and of what.

    Args:
        names: some of `NAMES`.
        levels: noise levels.
        examples: of each split, chosen by the seed.
        repeats: draws of noise for each example; the likelihood has one.
        probes: random vectors of curl and fokker_planck; None for what suits the data.
        seed: of examples and of everything that is drawn.
        batch_size: examples at once.

    Raises:
        UserError: a value is not allowed.
    """

    names: Sequence[str]
    levels: int = 10
    examples: int = 256
    repeats: int = 1
    probes: int | None = None
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in self.names:
            check_choice("diagnostics", name, NAMES)
        check_whole("diagnostics_options.levels", self.levels, at_least=1)
        check_whole("diagnostics_options.examples", self.examples, at_least=2)
        check_whole("diagnostics_options.repeats", self.repeats, at_least=1)
        check_whole("diagnostics_options.seed", self.seed, at_least=0)
        if self.probes is not None:
            check_whole("diagnostics_options.probes", self.probes, at_least=2)

    @property
    def curves(self) -> list[str]:
        """Those that are curves over noise levels."""
        return [name for name in self.names if name != LIKELIHOOD]

    @property
    def likelihood(self) -> bool:
        """Whether the likelihood is asked for."""
        return LIKELIHOOD in self.names

    def __call__(
        self, denoiser: AbstractDenoiser, dataset: Dataset, labeled: bool, device: torch.device, progress: Progress
    ) -> list[Diagnostic]:
        """Ask for all curves, in every process; they share the examples.

        Args:
            denoiser: the model.
            dataset: its data.
            labeled: whether it is told classes.
            device: where it is.
            progress: told of the share of everything that is done.

        Raises:
            UserError: the data or the network do not have what is asked for.
        """
        found = []
        for k, name in enumerate(self.curves):

            def part(share: float, before: int = k) -> None:
                progress((before + share) / len(self.curves))

            found.append(self._ask(name, denoiser, dataset, labeled, device, part))
        return found

    def _ask(
        self,
        name: str,
        denoiser: AbstractDenoiser,
        dataset: Dataset,
        labeled: bool,
        device: torch.device,
        progress: Progress,
    ) -> Diagnostic:
        common: dict[str, Any] = {"levels": self.levels, "repeats": self.repeats, "seed": self.seed}
        common |= {"batch_size": self.batch_size, "progress": progress}
        if name == "denoising":
            train, test = (self._examples(dataset, split, labeled, device) for split in ("train", "test"))
            if not len(test[0]):
                raise UserError("diagnostics=denoising compares with data that the model has not seen: there are none")
            return denoising_error(denoiser, train[0], test[0], train_labels=train[1], test_labels=test[1], **common)
        split = "test" if len(dataset.split("test")) else "train"
        x, labels = self._examples(dataset, split, labeled, device)
        if name == "score":
            exact = self._exact(denoiser, dataset, labeled).to(device)
            return score_error(denoiser, exact, x, labels=labels, **common)
        ask = {"curl": curl, "fokker_planck": fokker_planck}[name]
        return ask(denoiser, x, labels=labels, probes=self.probes, **common)

    def _examples(
        self, dataset: Dataset, split: str, labeled: bool, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        found = dataset.split(split)
        if not len(found):
            return torch.empty(0), None
        rows = Order(len(found), min(len(found), self.examples), self.seed)(0)
        labels = found.labels[rows].to(device) if labeled and found.labels is not None else None
        return dataset.info.encode(found.values[rows].to(device)), labels

    def _exact(self, denoiser: AbstractDenoiser, dataset: Dataset, labeled: bool) -> AbstractDenoiser:
        """The exact score of the data's law where that is known, otherwise of the training examples."""
        mixture = getattr(dataset, "mixture", None)
        if mixture is not None and not labeled:
            variance = torch.tensor(mixture.std**2, dtype=torch.float64)
            return GaussianMixtureDenoiser(denoiser.sde, mixture.weights, mixture.means, variance)
        train = dataset.split("train")
        return EmpiricalDenoiser(denoiser.sde, dataset.info.encode(train.values), train.labels if labeled else None)


def exact_of(dataset: Dataset, labeled: bool) -> str:
    """What the exact score is of, in words."""
    known = getattr(dataset, "mixture", None) is not None and not labeled
    return "the law of the data" if known else "the training examples themselves: 0 would be a model that copies"


def by_level(diagnostics: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows of a table over noise levels, of diagnostics as `Diagnostic.to_dict` has them."""
    rows = []
    for k, level in enumerate(diagnostics[0]["log_snr"] if diagnostics else []):
        row = {"log SNR": f"{level:.2f}", "noise level": f"{diagnostics[0]['noise_level'][k]:.3g}"}
        for each in diagnostics:
            for name in _SHOWN[each["name"]]:
                curve = each["curves"][name]
                row[f"{each['name']} {name}".replace("_", " ")] = with_error(curve["values"][k], curve["errors"][k])
        rows.append(row)
    return rows


def means(diagnostics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean over noise levels of what the table shows, by name."""
    found = {}
    for each in diagnostics:
        for name in _SHOWN[each["name"]]:
            values = [value for value in each["curves"][name]["values"] if value is not None]
            found[f"{each['name']}/{name}"] = math.fsum(values) / len(values) if values else math.nan
    return found
