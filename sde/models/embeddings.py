r"""How a network is told the noise level and the class.

A number c becomes a vector of sines and cosines, `FourierFeatures` (random frequencies, arXiv 2006.10739) or
`SinusoidalFeatures` (geometric frequencies, arXiv 1706.03762), then passes through two linear layers; a learned vector
per class is added:

    e = act(W_2 act(W_1 features(c)) + class[label])
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sde.models.base import check_labels, check_unlabeled
from sde.models.layers import linear


def _at_least_float32(c: Tensor) -> Tensor:
    """Phases reach thousands of radians: half precision would leave nothing of them."""
    return c.to(torch.promote_types(c.dtype, torch.float32))


class FourierFeatures(nn.Module):
    r"""(sin 2 pi w c, cos 2 pi w c) with frequencies w ~ N(0, scale^2) that are drawn once and not trained.

    Args:
        size: number of frequencies; there are `2 * size` features.
        scale: standard deviation of the frequencies, in cycles per unit of c.
    """

    frequencies: Tensor

    def __init__(self, size: int, scale: float) -> None:
        super().__init__()
        self.out_features = 2 * size
        self.register_buffer("frequencies", torch.randn(size) * scale)

    def forward(self, c: Tensor) -> Tensor:
        """(B,) to (B, 2 * size), computed in float32 or better."""
        phase = _at_least_float32(c)[:, None] * self.frequencies * (2 * math.pi)
        return torch.cat((phase.sin(), phase.cos()), dim=1)


class SinusoidalFeatures(nn.Module):
    """(sin w c, cos w c) with frequencies w from 1 down to 1e-4 rad per unit of c in geometric progression.

    Made for c from 0 to 999, the time step of arXiv 2006.11239.

    Args:
        size: number of features, at least 4; for an odd number the last is zero.
        endpoint: whether 1e-4 is the lowest frequency, as in DDPM, or would be the next one, as in ADM.
    """

    frequencies: Tensor

    def __init__(self, size: int, endpoint: bool = True) -> None:
        super().__init__()
        self.out_features = size
        half = size // 2
        decay = math.log(10_000) / (half - 1 if endpoint else half)
        self.register_buffer(
            "frequencies", torch.exp(-decay * torch.arange(half, dtype=torch.float32)), persistent=False
        )

    def forward(self, c: Tensor) -> Tensor:
        """(B,) to (B, size), computed in float32 or better."""
        phase = _at_least_float32(c)[:, None] * self.frequencies
        parts = [phase.sin(), phase.cos()]
        if self.out_features % 2:
            parts.append(torch.zeros_like(phase[:, :1]))
        return torch.cat(parts, dim=1)


class ClassEmbedding(nn.Module):
    """A learned vector for each of `num_classes` classes, and a last one for "no label".

    Args:
        num_classes: number of classes; labels are 0 to `num_classes`, the last meaning "no label".
        size: length of the vectors.
    """

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.vectors = nn.Embedding(num_classes + 1, size)

    def forward(self, label: Tensor | None) -> Tensor:
        """Labels (B,) int64 to (B, size); None to (1, size), the vector of "no label".

        Raises:
            UserError: a label out of range, on the CPU.
        """
        if label is None:
            return self.vectors.weight[-1:]
        check_labels(label, self.num_classes)
        return self.vectors(label)


class ConditionEmbedding(nn.Module):
    """Noise label and class label as one vector, already passed through the activation that its readers want.

    Args:
        features: turns the noise label (B,) into (B, features); None for a network that is not told the noise level.
        hidden: width of the two linear layers and of the result.
        num_classes: number of classes; 0 for none.
        activation: the nonlinearity.
        classes_join: where the vector of the class is added: "output" of the two linear layers, or "features", their
            input (as EDM's DDPM++ and NCSN++ have it).
    """

    def __init__(
        self,
        features: FourierFeatures | SinusoidalFeatures | None,
        hidden: int,
        num_classes: int,
        activation: nn.Module,
        classes_join: str = "output",
    ) -> None:
        super().__init__()
        self.features = features
        if features is not None:
            self.linear_1 = linear(features.out_features, hidden)
            self.linear_2 = linear(hidden, hidden)
        self.classes_first = features is not None and classes_join == "features"
        size = features.out_features if features is not None and self.classes_first else hidden
        self.classes = ClassEmbedding(num_classes, size) if num_classes else None
        self.activation = activation

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to embed."""
        return self.features is None and self.classes is None

    def forward(self, noise: Tensor, label: Tensor | None) -> Tensor | None:
        """Noise labels (B,) and class labels (B,) to (B, hidden), or None when there is nothing to embed.

        Raises:
            UserError: class labels for a network without classes.
        """
        classes: Tensor | None = None
        if self.classes is None:
            check_unlabeled(label)
        else:
            classes = self.classes(label)
        embedding: Tensor | None = None
        if self.features is not None:
            features = self.features(noise).to(self.linear_1.weight.dtype)
            if classes is not None and self.classes_first:
                features = features + classes
            embedding = self.linear_2(self.activation(self.linear_1(features)))
        if classes is not None and not self.classes_first:
            embedding = classes.expand(noise.shape[0], -1) if embedding is None else embedding + classes
        return None if embedding is None else self.activation(embedding)


class NoiseScales:
    """The geometric sequence of noise levels of arXiv 1907.05600: index 0 is the highest, `count - 1` the lowest.

    Args:
        sigma_min: lowest noise level, above 0.
        sigma_max: highest noise level, above `sigma_min`.
        count: number of levels, at least 2.
    """

    def __init__(self, sigma_min: float, sigma_max: float, count: int) -> None:
        self.sigma_max = float(sigma_max)
        self.count = count
        self.log_ratio = math.log(sigma_min / sigma_max)

    def sigma(self, index: Tensor) -> Tensor:
        """Noise level of an index (rounded down), of the same shape, in float32 or better."""
        index = _at_least_float32(index).floor()
        return self.sigma_max * torch.exp(index * (self.log_ratio / (self.count - 1)))
