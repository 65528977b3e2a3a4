r"""The reverse process: what turns noise into data, with its network evaluations counted.

For every eta >= 0 the process

    dx = [f x - (1 + eta^2)/2 g^2 score(x, t)] dt + eta g dw        (time running from T to 0)

has the marginals p_t of the forward SDE (arXiv 2011.13456, appendix D; arXiv 2106.01357). eta = 1 is Anderson's
reverse SDE, eta = 0 the probability-flow ODE.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sde.broadcast import Time, as_tensor, expand
from sde.denoiser import AbstractDenoiser, Evaluation


class ReverseProcess:
    """A denoiser together with the condition it is asked under and a count of its evaluations.

    Args:
        denoiser: the score.
        label: class labels (B,) int64 for the batch that is solved, or None.

    Attributes:
        nfe: how often the denoiser has been evaluated on the batch.
    """

    def __init__(self, denoiser: AbstractDenoiser, label: Tensor | None = None) -> None:
        self.denoiser = denoiser
        self.sde = denoiser.sde
        self.label = label
        self.nfe = 0

    def _output(self, name: str, x: Tensor, t: Time) -> Tensor:
        self.nfe += 1
        return self.denoiser.output(name, x, t, self.label)

    def evaluations(self, name: str, times: Sequence[float], like: Tensor) -> list[Evaluation]:
        """The output `name` ("denoised", "eps", "score" or "v") at each of `times`, counted as it is called.

        Args:
            name: which output.
            times: one for each evaluation that is returned.
            like: a state (B, ...): its shape, type and device are those of the states to come.
        """
        return [self._counted(f) for f in self.denoiser.evaluations(name, times, like, self.label)]

    def _counted(self, evaluation: Evaluation) -> Evaluation:
        def evaluate(x: Tensor) -> Tensor:
            self.nfe += 1
            return evaluation(x)

        return evaluate

    def denoised(self, x: Tensor, t: Time) -> Tensor:
        """E[x_0 | x_t = x], one evaluation."""
        return self._output("denoised", x, t)

    def eps(self, x: Tensor, t: Time) -> Tensor:
        """The noise in x, one evaluation."""
        return self._output("eps", x, t)

    def score(self, x: Tensor, t: Time) -> Tensor:
        """grad log p_t(x), one evaluation."""
        return self._output("score", x, t)

    def drift(self, x: Tensor, t: Time, eta: float = 0.0) -> Tensor:
        """f x - (1 + eta^2)/2 g^2 score, one evaluation. eta = 0: the probability-flow ODE's dx/dt."""
        f, g = self.sde.f(as_tensor(t)), self.sde.g(as_tensor(t))
        pull = -0.5 * (1 + eta**2) * g**2
        return expand(f.to(x.dtype), x) * x + expand(pull.to(x.dtype), x) * self.score(x, t)

    def select(self, indices: Tensor) -> ReverseProcess:
        """The same process on part of the batch (with a count of its own)."""
        return ReverseProcess(self.denoiser.select(indices), None if self.label is None else self.label[indices])
