r"""Layers that keep the magnitude of what passes through them (EDM2, arXiv 2312.02696, sections 2 and B.4).

The magnitude of a vector v of n entries is the root of its mean square, |v| = ||v||_2 / sqrt(n). A layer preserves
magnitude when independent inputs of magnitude 1 give outputs of magnitude 1 in expectation. Then nothing needs group
normalization or biases, and no activation grows during training. With hat for division by magnitude, v^ = v / |v|:

    linear, convolution    y_i = w^_i . x / sqrt(n),    n the entries of the row w_i                   (equation 47)
    SiLU                   silu(x) / 0.596                                                             (equation 81)
    sum                    ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)                                   (equation 88)
    concatenation          of w_a a and w_b b, where b makes the fraction t of what comes next         (equation 103)
    Fourier features       sqrt(2) cos(f c + p)                                                        (equation 75)

Since y depends on the direction of w_i alone, the gradient is orthogonal to w_i, and plain gradient steps would make
w_i longer and longer and so learn slower and slower. So training puts every weight back onto the sphere |w_i| = 1
before each step ("forced weight normalization", equation 66): `normalize_weights`. The hat in the forward pass stays,
for it is what projects gradients onto the sphere, and averages of weights lie inside of it.

As in the paper, a division by |v| is one by |v| + 1e-4, so that zero vectors stay finite. The sphere is then
|w_i| = 1 - 1e-4, where normalizing again changes nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sde.models.base import check_labels

EPSILON = 1e-4
SILU_MAGNITUDE = 0.596  # magnitude of silu(z) for z ~ N(0, 1), rounded as in the paper


def magnitude(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Root mean square over `dims`, which become 1 entry long, plus 1e-4; in float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide)
    return norm / math.sqrt(math.prod([x.shape[dim] for dim in dims])) + EPSILON


def normalize(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`x` scaled to magnitude 1 over `dims`; of the shape and type of `x`."""
    return x / magnitude(x, dims).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU of `x`, of magnitude 1 for x ~ N(0, 1)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """`a` and `b` mixed, t from 0 (only `a`) to 1 (only `b`); of magnitude 1 when both are and they are orthogonal."""
    norm = math.hypot(1 - t, t)
    return torch.add(a * ((1 - t) / norm), b, alpha=t / norm)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """`a` and `b` joined along axis 1, of magnitude 1 when both are.

    Of what a layer with independent weights makes of the result, `a` and `b` contribute in the proportion 1 - t to t,
    whatever their numbers of channels.
    """
    channels_a, channels_b = a.shape[1], b.shape[1]
    scale = math.sqrt(channels_a + channels_b) / math.hypot(1 - t, t)
    return torch.cat((a * (scale * (1 - t) / math.sqrt(channels_a)), b * (scale * t / math.sqrt(channels_b))), dim=1)


class MPFourier(nn.Module):
    r"""sqrt(2) cos(f c + p) with f ~ N(0, (2 pi scale)^2) and p ~ U(0, 2 pi), drawn once and not trained.

    Args:
        size: number of features.
        scale: standard deviation of the frequencies, in cycles per unit of c.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, size: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(size) * (2 * math.pi * scale))
        self.register_buffer("phases", torch.rand(size) * (2 * math.pi))

    def forward(self, c: Tensor) -> Tensor:
        """(B,) to (B, size), computed in float32 or better."""
        c = c.to(torch.promote_types(c.dtype, torch.float32))
        return torch.cos(c[:, None] * self.frequencies + self.phases) * math.sqrt(2)


class MPLayer(nn.Module):
    """What the layers with weights have in common; without biases.

    Args:
        in_features: features or channels of the input.
        out_features: features or channels of the output.
        kernel: sides of the kernel of a convolution.

    Attributes:
        weight: (out_features, in_features, *kernel), on the sphere at first.
    """

    def __init__(self, in_features: int, out_features: int, *kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features, *kernel))
        self.normalize_weight()

    def magnitudes(self) -> Tensor:
        """Magnitude of each row of the weight, plus 1e-4: (out_features, 1, ...)."""
        return magnitude(self.weight, tuple(range(1, self.weight.ndim)))

    def scaled_weight(self, x: Tensor, gain: Tensor | None) -> Tensor:
        """The weight that preserves magnitude, times `gain`, in the type of `x`."""
        scale = 1 / (self.magnitudes() * math.sqrt(math.prod(self.weight.shape[1:])))
        return (self.weight * (scale if gain is None else scale * gain)).to(x.dtype)

    @torch.no_grad()
    def normalize_weight(self) -> None:
        """Put every row of the weight onto the sphere, in place."""
        # Through .data because it hides from autograd: what is on the sphere stays where it is, and so the graph of
        # an earlier forward pass remains valid.
        self.weight.data.div_(self.magnitudes())


class MPLinear(MPLayer):
    """A linear layer. Arguments as `MPLayer`, without kernel."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """(B, in_features) to (B, out_features), times the scalar `gain`."""
        return F.linear(x, self.scaled_weight(x, gain))


class MPConv(MPLayer):
    """A convolution that keeps the size of the picture; zeros outside of it.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        size: side of the kernel, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int) -> None:
        super().__init__(in_channels, out_channels, size, size)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W), times the scalar `gain`."""
        return F.conv2d(x, self.scaled_weight(x, gain), padding=self.weight.shape[-1] // 2)


class MPClassEmbedding(MPLayer):
    """A linear layer on one-hot vectors of magnitude 1: `num_classes` classes, and a last one for "no label".

    The product is a look-up: column k of the weight, each entry divided by the magnitude of its row.

    Args:
        num_classes: number of classes; labels are 0 to `num_classes`, the last meaning "no label".
        size: length of the vectors.
    """

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__(num_classes + 1, size)
        self.num_classes = num_classes

    def forward(self, label: Tensor | None) -> Tensor:
        """Labels (B,) int64 to (B, size); None to (1, size), the vector of "no label".

        Raises:
            UserError: a label out of range, on the CPU.
        """
        vectors = self.weight.t()
        if label is not None:
            check_labels(label, self.num_classes)
        chosen = vectors[-1:] if label is None else F.embedding(label, vectors)
        return chosen / self.magnitudes().t().to(chosen.dtype)


@torch.compiler.disable
def normalize_weights(module: nn.Module) -> None:
    """Put the weights of every `MPLayer` inside `module` onto the sphere, in place and outside of compiled graphs.

    Inductor's backward pass reads the weights anew (PyTorch 2.13). If its forward pass has changed them meanwhile,
    gradients are wrong, and changes to weights of convolutions were lost, all without an error.
    """
    for layer in module.modules():
        if isinstance(layer, MPLayer):
            layer.normalize_weight()
