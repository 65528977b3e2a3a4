r"""Features: the vectors that two sets of examples are compared as.

A Frechet distance, a precision or a kernel distance is a statement about features f(x), not about pictures, so numbers
are comparable only when everything in f is the same: weights, range, resizing, what becomes of gray pictures. An
extractor states all of it (`describe`), and has a hash of it (`identity`).

    none        the examples themselves: points in the plane, sequences
    random      an untrained convolutional network: no weights to fetch, no labels needed (arXiv 2002.09797, section 4)
    classifier  the penultimate layer of a small network trained on the labels of the data set (`classifier`)
    module      the same of a network that was trained before (`classifier`)
    torchscript what any network makes of them that was saved as TorchScript (`torchscript`)
    inception   what published FIDs are made of (`pretrained`)
    dinov2      the features of FD-DINOv2 (`pretrained`)

    from sde.evaluation.extractors import EXTRACTORS

    extractor = EXTRACTORS.get("random")()
    extractor.prepare(dataset, torch.device("cpu"))
    features, probabilities = extractor(dataset.split("test").values[:64])   # (64, 512), None
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sde.data import DataInfo, Dataset
from sde.data.base import check_whole
from sde.errors import UserError
from sde.evaluation.digests import digest_of, digest_of_tensors
from sde.registry import Registry

VERSION = 1  # of what is done to examples here; part of every identity

EXTRACTORS: Registry[Extractor] = Registry("features")
register = EXTRACTORS.register


class Features(NamedTuple):
    """What an extractor finds in B examples.

    Attributes:
        features: (B, D), float32, on the CPU.
        probabilities: of the classes of each, (B, C), by extractors that classify; otherwise None.
    """

    features: Tensor
    probabilities: Tensor | None = None


class Extractor(ABC):
    """A function from stored examples to features; leaves are dataclasses of its options.

    It is prepared for a data set once, which may train or fetch a network, and then called with batches.

    Attributes:
        any_size: whether pictures may have another size than those of the data set.
        classifies: whether there are probabilities.
    """

    any_size: bool = False
    classifies: bool = False

    _info: DataInfo | None = None
    _device: torch.device = torch.device("cpu")
    _network: nn.Module | None = None
    _identity: str | None = None

    @property
    def name(self) -> str:
        """What `features=` calls it."""
        return EXTRACTORS.name_of(type(self))

    @property
    def prepared(self) -> bool:
        """Whether it can be called."""
        return self._info is not None

    @property
    def info(self) -> DataInfo:
        """The facts about the data set that it was prepared for."""
        assert self._info is not None, "prepare the extractor first"
        return self._info

    def prepare(self, dataset: Dataset, device: torch.device) -> None:
        """Make ready for the examples of `dataset`, to compute on `device`. All processes have to ask.

        Raises:
            UserError: its features do not exist for such examples, or what it needs cannot be had.
        """
        self._check(dataset.info)
        with torch.random.fork_rng(devices=[]):  # layers draw weights when they are made, which are replaced
            network = self._make(dataset, device)
        if network is not None:
            network = network.to(device).eval()
            for parameter in network.parameters():  # scripted modules have no requires_grad_ of their own
                parameter.requires_grad_(False)
        self._info, self._device, self._network, self._identity = dataset.info, device, network, None

    def __call__(self, values: Tensor) -> Features:
        """The features of a batch as it is stored: uint8 (B, C, H, W), or float32 (B, ...).

        Raises:
            UserError: the examples are not like those that it was prepared for.
        """
        self._check_like(values)
        with torch.inference_mode(), exactly(self._device):
            features, probabilities = self._compute(values.to(self._device))
            if probabilities is not None:
                probabilities = probabilities.float().cpu()
            return Features(features.float().cpu(), probabilities)

    def identity(self) -> str:
        """A hash of everything that the numbers depend on, hexadecimal; only for a prepared extractor."""
        if self._identity is None:  # of a large network it takes seconds
            weights = None if self._network is None else digest_of_tensors(self._network.state_dict())
            self._identity = digest_of(VERSION, self.name, self._numbers(), weights)
        return self._identity

    def describe(self) -> dict[str, Any]:
        """What is done to examples, in words and numbers, for the card; only of a prepared extractor."""
        return {"features": self.name, **asdict(self), **self._facts(), "identity": self.identity()}  # type: ignore[call-overload]

    def _check(self, info: DataInfo) -> None:  # noqa: B027 - not every leaf is choosy
        """Raise `UserError` for data that have no such features."""

    def _make(self, dataset: Dataset, device: torch.device) -> nn.Module | None:
        """The network, if there is one."""
        return None

    @abstractmethod
    def _compute(self, values: Tensor) -> Features:
        """The features of examples on the device."""

    @abstractmethod
    def _facts(self) -> dict[str, Any]:
        """What `describe` says besides the options: dimensions, range, resize, gray, ..."""

    def _numbers(self) -> list[Any]:
        """What `identity` depends on besides name and weights."""
        return [asdict(self), list(self.info.shape), self.info.kind]  # type: ignore[call-overload]

    def _check_like(self, values: Tensor) -> None:
        pixels = self.info.kind == "pixels"
        if values.dtype != (torch.uint8 if pixels else torch.float32):
            wanted = "uint8 pixels" if pixels else "float32"
            raise UserError(f"examples of type {values.dtype} have no features={self.name}: give {wanted}")
        shape, wanted_shape = tuple(values.shape[1:]), tuple(self.info.shape)
        same = shape[:1] == wanted_shape[:1] and len(shape) == 3 if self.any_size else shape == wanted_shape
        if not same:
            raise UserError(
                f"examples of shape {shape} cannot be compared with {self.info.name}, whose shape is {wanted_shape}: "
                "give samples of this data set"
            )


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """A context in which products are of float32, whatever precision samples are drawn in."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_unit_range(values: Tensor) -> Tensor:
    """Pixels 0 .. 255 in [-1, 1], whatever range the network has; vectors as they are. float32."""
    return values.float() / 127.5 - 1 if values.dtype == torch.uint8 else values.float()


def refuse_vectors(name: str, info: DataInfo) -> None:
    """Raise `UserError` for data that are no pictures."""
    if info.kind != "pixels":
        raise UserError(
            f"features={name} are of pictures, and {info.name} holds vectors of shape {tuple(info.shape)}: "
            "use features=none"
        )


def chosen_for(info: DataInfo) -> Extractor:
    """What features=auto is: the examples themselves for vectors; a classifier where there are labels; else random."""
    name = "none" if info.kind == "vectors" else "classifier" if info.num_classes > 1 else "random"
    return EXTRACTORS.get(name)()


@register("none")
@dataclass(eq=False)
class Examples(Extractor):
    """The examples themselves, flattened: vectors as they are, pixels in [-1, 1]."""

    def _compute(self, values: Tensor) -> Features:
        return Features(in_unit_range(values).flatten(1))

    def _facts(self) -> dict[str, Any]:
        pixels = self.info.kind == "pixels"
        return {"dimensions": int(np.prod(self.info.shape)), "range": [-1.0, 1.0] if pixels else None}


@register("random")
@dataclass(eq=False)
class Random(Extractor):
    """What an untrained network sees: three convolutions of stride 2 with orthogonal weights.

    Averages over the whole picture of the first two layers (32 + 64), over its four quarters of the third (4 x 104).
    A unit of the third layer sees 15 x 15 pixels. Random features tell laws of pictures apart without the leanings of
    one trained on photographs (arXiv 2002.09797), but their distances mean nothing outside of this package.

    Args:
        seed: of the weights. They come from NumPy's PCG64 in float64, rounded to multiples of 2^-16, so that they have
            the same bits on every machine.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("features.seed", self.seed, at_least=0)

    def _check(self, info: DataInfo) -> None:
        refuse_vectors(self.name, info)

    def _make(self, dataset: Dataset, device: torch.device) -> nn.Module:
        return RandomNetwork(dataset.info.shape[0], self.seed)

    def _compute(self, values: Tensor) -> Features:
        assert self._network is not None
        return Features(self._network(in_unit_range(values)))

    def _facts(self) -> dict[str, Any]:
        return {"dimensions": RandomNetwork.dimensions, "range": [-1.0, 1.0], "resize": None}


class RandomNetwork(nn.Module):
    """Pictures (B, C, H, W) to features (B, 512), see `Random`."""

    widths = (32, 64, 104)
    dimensions = widths[0] + widths[1] + 4 * widths[2]

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        draws = np.random.Generator(np.random.PCG64([seed, channels]))
        self.layers = nn.ModuleList()
        for before, after in zip((channels, *self.widths), self.widths, strict=False):
            layer = nn.Conv2d(before, after, 3, stride=2, padding=1)
            weight = orthogonal(draws, after, 9 * before) * np.sqrt(2 * max(1.0, after / (9 * before)))
            bias = 0.1 * draws.standard_normal(after)  # layers without biases would see contrast as a factor
            for parameter, value in ((layer.weight, weight), (layer.bias, bias)):
                rounded = np.round(value * 2**16) / 2**16
                assert parameter is not None
                parameter.data.copy_(torch.from_numpy(rounded).reshape(parameter.shape))
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 512)."""
        found = []
        for depth, layer in enumerate(self.layers):
            x = F.leaky_relu(layer(x), 0.2)
            cells = 2 if depth == len(self.layers) - 1 else 1
            found.append(F.adaptive_avg_pool2d(x, cells).flatten(1))
        return torch.cat(found, 1)


def orthogonal(draws: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A matrix with orthonormal rows, or columns where there are more rows; uniformly distributed among such."""
    square = draws.standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(square)
    q = q * np.sign(np.diag(r))  # otherwise the signs would be those of a LAPACK
    return q if rows >= columns else q.T
