r"""A residual multilayer perceptron for vectors, made for two-dimensional problems.

    h_0 = W_in x,    h_{k+1} = h_k + A_k act((1 + s_k) * B_k act(norm(h_k)) + b_k),    y = W_out act(norm(h_n))

Each block's factor s_k and offset b_k are linear in an embedding of the noise level (feature-wise modulation, arXiv
1709.07871) made of Fourier features (arXiv 2006.10739). Every A_k and W_out starts near zero, so that at first each
block is the identity and the network gives zero.
"""

from __future__ import annotations

from torch import Tensor, nn

from sde.errors import check_choice, check_number
from sde.models.base import check_count, check_shape, register
from sde.models.embeddings import ConditionEmbedding, FourierFeatures
from sde.models.layers import ACTIVATIONS, initialize, linear


class MLPBlock(nn.Module):
    """One block of the perceptron.

    Args:
        width: entries of h.
        embedding_size: entries of the embedding.
        activation: the nonlinearity.
        dropout: probability of dropping an entry before the last layer.
    """

    def __init__(self, width: int, embedding_size: int, activation: nn.Module, dropout: float) -> None:
        super().__init__()
        self.activation = activation
        self.norm = nn.LayerNorm(width)
        self.linear_1 = linear(width, width)
        self.condition = linear(embedding_size, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.linear_2 = linear(width, width)
        initialize(self.linear_2.weight, 0.0)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(B, width) and the activated embedding (B, embedding_size) to (B, width)."""
        scale, shift = self.condition(embedding).chunk(2, dim=1)
        r = self.linear_1(self.activation(self.norm(h)))
        return h + self.linear_2(self.dropout(self.activation(r * (1 + scale) + shift)))


@register("mlp")
class MLP(nn.Module):
    """A residual multilayer perceptron.

    Args:
        shape: (D,) of one vector.
        num_classes: classes of the data, 0 for none.
        width: entries of the hidden vectors, at least 4.
        depth: number of residual blocks.
        dropout: probability of dropping an entry inside blocks, 0 to below 1.
        activation: "swish", "elu", "relu" or "lrelu" (slope 0.2).
        fourier_scale: standard deviation of the Fourier frequencies, in cycles per unit of the noise label
            log(sigma / alpha) / 4, which runs from about -1.7 to 1.3 for common SDEs.

    Raises:
        UserError: a setting out of range, or data that are not vectors.
    """

    noise_label = "log_sigma"

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        width: int = 128,
        depth: int = 4,
        dropout: float = 0.0,
        activation: str = "swish",
        fourier_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_shape("mlp", shape, "D")
        check_count("num_classes", num_classes, at_least=0)
        check_count("model.width", width, at_least=4)
        check_count("model.depth", depth)
        check_number("model.dropout", dropout, at_least=0, below=1)
        check_choice("model.activation", activation, ACTIVATIONS)
        check_number("model.fourier_scale", fourier_scale, above=0)
        self.shape = shape
        self.num_classes = num_classes
        self.activation = ACTIVATIONS[activation]()
        features = FourierFeatures(width // 2, fourier_scale)
        self.embedding = ConditionEmbedding(features, width, num_classes, self.activation)
        self.input = linear(shape[0], width)
        self.blocks = nn.ModuleList(MLPBlock(width, width, self.activation, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = linear(width, shape[0])
        initialize(self.output.weight, 0.0)

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """The output at vectors `x` (B, D), of their shape and type.

        Args:
            noise: (B,), log(sigma / alpha) / 4.
            label: class labels (B,) int64, `num_classes` for "no label"; None for "no label" throughout.
        """
        embedding = self.embedding(noise, label)
        h = self.input(x)
        for block in self.blocks:
            h = block(h, embedding)
        return self.output(self.activation(self.norm(h))).to(x.dtype)
