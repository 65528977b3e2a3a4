"""Features of networks that others have trained on photographs; their packages fetch the weights.

`inception` is what published FIDs, KIDs and Inception Scores are made of: the Inception network of 2015 with its
TensorFlow weights, through torch-fidelity. `dinov2` is what FD-DINOv2 is made of (arXiv 2306.04675): the class token of
a ViT-L/14, through transformers. Both see three channels; gray pictures are repeated. Weights are read without running
anything that they hold.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sde.data import DataInfo, Dataset
from sde.data.base import check_whole
from sde.distributed import is_main, on_main
from sde.errors import UserError
from sde.evaluation.classifier import resized
from sde.evaluation.extractors import Extractor, Features, refuse_vectors, register

T = TypeVar("T")

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by channel
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@register("inception")
@dataclass(eq=False)
class Inception(Extractor):
    """The 2048 features before the classes of the Inception network of FID (arXiv 1706.08500), and its 1008 classes.

    Pictures are scaled to 299 x 299 inside of the network, bilinearly, as TensorFlow 1 did it: without antialiasing and
    with corners that are not aligned. The probabilities are made of logits without their bias, as the Inception Score
    of 2016 was (arXiv 1606.03498).
    """

    any_size = True
    classifies = True

    def _check(self, info: DataInfo) -> None:
        refuse_vectors(self.name, info)
        _check_channels(self.name, info)

    def _make(self, dataset: Dataset, device: torch.device) -> nn.Module:
        fidelity = _module("torch_fidelity.feature_extractor_inceptionv3", "inception", "torch-fidelity", "fid")
        self._version = _version("torch-fidelity")

        def fetch() -> nn.Module:
            with weights_alone():
                return fidelity.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])

        return _fetched(fetch, "inception")

    def _compute(self, values: Tensor) -> Features:
        assert self._network is not None
        features, logits = self._network(in_color(values))
        return Features(features, logits.softmax(1))

    def _facts(self) -> dict[str, Any]:
        return {
            "dimensions": 2048,
            "resize": "bilinear as in TensorFlow 1, to 299 x 299, without antialiasing, inside of the network",
            "range": [-1.0, 127 / 128],
            "gray": "repeated to three channels",
            "package": f"torch-fidelity {self._version}",
        }

    def _numbers(self) -> list[Any]:
        return [*super()._numbers(), self._version]


@register("dinov2")
@dataclass(eq=False)
class DINOv2(Extractor):
    """The normalized class token of DINOv2's ViT-L/14 (arXiv 2304.07193), 1024 features.

    Pictures are scaled to 224 x 224 as Pillow does it, bicubic, antialiased and rounded, which is what the authors of
    FD-DINOv2 use unless told otherwise (arXiv 2306.04675), and normalized by mean and deviation of ImageNet.

    Args:
        repo: "user/name" on the Hugging Face hub, of a model that transformers reads as DINOv2.
        revision: branch, tag or commit there.
        size: side in pixels that pictures are scaled to; a multiple of 14.

    Raises:
        UserError: a value is not allowed.
    """

    repo: str = "facebook/dinov2-large"
    revision: str = "main"
    size: int = 224

    any_size = True

    def __post_init__(self) -> None:
        check_whole("features.size", self.size, at_least=14)
        if self.size % 14:
            raise UserError(f"features.size={self.size} must be a multiple of 14, the side of a patch")

    def _check(self, info: DataInfo) -> None:
        refuse_vectors(self.name, info)
        _check_channels(self.name, info)

    def _make(self, dataset: Dataset, device: torch.device) -> nn.Module:
        transformers = _module("transformers", "dinov2", "transformers", "dino")
        self._version = _version("transformers")

        def fetch() -> nn.Module:
            model = transformers.Dinov2Model.from_pretrained(self.repo, revision=self.revision, use_safetensors=True)
            return model.float()

        return _fetched(fetch, "dinov2")

    def _compute(self, values: Tensor) -> Features:
        assert self._network is not None
        pixels = resized(in_color(values), (self.size, self.size)).float() / 255
        mean, std = (torch.tensor(x, device=pixels.device).reshape(3, 1, 1) for x in (_MEAN, _STD))
        return Features(self._network(pixel_values=(pixels - mean) / std).pooler_output)

    def _facts(self) -> dict[str, Any]:
        assert self._network is not None
        return {
            "dimensions": int(self._network.config.hidden_size),  # type: ignore[union-attr, arg-type]
            "resize": f"bicubic, antialiased, to {self.size} x {self.size}, rounded",
            "normalization": {"mean": list(_MEAN), "std": list(_STD)},
            "gray": "repeated to three channels",
            "package": f"transformers {self._version}",
        }

    def _numbers(self) -> list[Any]:
        # the weights themselves are part of the identity, whatever they are called
        return [self.size, list(self.info.shape), self._version]


def in_color(values: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) of gray or color pictures."""
    return values.expand(-1, 3, -1, -1) if values.shape[1] == 1 else values


def _check_channels(name: str, info: DataInfo) -> None:
    if info.shape[0] not in (1, 3):
        raise UserError(
            f"features={name} are of gray or color pictures, and {info.name} has {info.shape[0]} channels: "
            "use features=random"
        )


@contextlib.contextmanager
def weights_alone() -> Iterator[None]:
    """Let `torch.load` read nothing but tensors and plain values, whatever a package asks it for."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _module(path: str, features: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(path)
    except ImportError as error:
        raise UserError(
            f'features={features} needs the package {package} (pip install "sde[{extra}]"); without it there are '
            "features=random, and features=classifier for labeled pictures"
        ) from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # imported from a folder
        return "unknown"


def _fetched(fetch: Callable[[], nn.Module], features: str) -> nn.Module:
    """The network, fetched by one process first, so that all do not write the same file at once.

    Raises:
        UserError: when it cannot be had, in every process.
    """
    made: list[nn.Module] = []

    def attempt() -> None:
        try:
            made.append(fetch())
        except Exception as error:  # of the network, the disk, the package or a damaged file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"the weights of features={features} cannot be had ({type(error).__name__}: {reason[:200]}): check the "
                "network and the package, or use features=random"
            ) from error

    on_main(attempt)
    if not is_main():
        attempt()
    return made[0]
