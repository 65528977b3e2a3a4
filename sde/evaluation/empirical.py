r"""The exact denoiser of a finite data set: what a network would be that had learned its training examples by heart.

Of M examples x_i, each as likely as the others, with noise,

    p_t(x) = 1/M sum_i N(x; alpha x_i, sigma^2 I),
    E[x_0 | x_t = x] = sum_i w_i x_i,    w = softmax_i( - |x - alpha x_i|^2 / (2 sigma^2) ).

This is the minimum of denoising score matching on these examples (arXiv 2206.00364, appendix B.3); sampling with it
gives the examples back, and nothing else.

At small noise the exponents are large and close to each other only for examples that are close: they are computed in
float64, from the differences to the mean of the examples, and the softmax is taken block by block beside its running
maximum, so that neither many examples nor little noise overflow anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sde.broadcast import Time, as_tensor
from sde.data.base import check_whole
from sde.denoiser import AbstractDenoiser
from sde.errors import UserError, check_choice
from sde.parameterizations import OUTPUTS
from sde.processes import SDE


class EmpiricalDenoiser(AbstractDenoiser):
    """The exact denoiser of the distribution that gives every example the same probability.

    An evaluation costs about 4 M D products in float64 for each x.

    Args:
        sde: the forward process.
        examples: (M, *shape), as a network sees them; they may stay on the CPU where what is asked about is not.
        labels: class labels (M,) int64: asked with a label, the denoiser is that of the examples of the class alone.
        block: examples that are compared with at a time; changes memory and speed, not the answer.

    Raises:
        UserError: for examples that are none, or labels that do not fit them.
    """

    examples: Tensor
    labels: Tensor | None
    center: Tensor

    def __init__(self, sde: SDE, examples: Tensor, labels: Tensor | None = None, *, block: int = 4096) -> None:
        super().__init__()
        check_whole("block", block, at_least=1)
        if len(examples) == 0 or examples.ndim < 2 or not examples.is_floating_point():
            raise UserError(
                f"examples of shape {tuple(examples.shape)} and type {examples.dtype} are no data set: give (M, ...) "
                "of a floating type, with M at least 1"
            )
        if labels is not None and labels.shape != examples.shape[:1]:
            raise UserError(f"labels of shape {tuple(labels.shape)} do not fit {len(examples)} examples: give one each")
        self.sde = sde
        self.block = block
        self.register_buffer("examples", examples)
        self.register_buffer("labels", labels)
        self.register_buffer("center", examples.flatten(1).double().mean(0))

    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        check_choice("output", name, OUTPUTS)
        t = as_tensor(t).double()
        alpha, sigma = (c.to(x.device).reshape(-1, 1) for c in (self.sde.alpha(t), self.sde.sigma(t)))
        center = self.center.to(x.device)
        offset = x.flatten(1).double() - alpha * center
        mean = self._mean(offset, alpha, sigma, self._checked(label))
        eps = (offset - alpha * mean) / sigma
        denoised = center + mean
        outputs = {"denoised": denoised, "eps": eps, "score": -eps / sigma, "v": alpha * eps - sigma * denoised}
        return outputs[name].to(x.dtype).reshape(x.shape)

    def _mean(self, offset: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """E[x_0 | x_t] - center (B, D) at x_t = `offset` + alpha center, both (B, D)."""
        largest = offset.new_full((len(offset), 1), -torch.inf)
        weight, mean = offset.new_zeros(len(offset), 1), torch.zeros_like(offset)
        for start in range(0, len(self.examples), self.block):
            here = slice(start, start + self.block)
            block = (self.examples[here].flatten(1).double() - self.center).to(offset.device)
            # |x|^2 is common to all examples
            logits = (alpha * (offset @ block.mT) - 0.5 * alpha**2 * block.square().sum(1)) / sigma**2
            if label is not None:
                assert self.labels is not None
                logits = logits.masked_fill(self.labels[here].to(label.device) != label[:, None], -torch.inf)
            # what is subtracted cancels in the quotient and needs no derivative; -inf less itself would be no number
            above = torch.maximum(largest, logits.detach().amax(1, keepdim=True))
            finite = above.clamp_min(torch.finfo(above.dtype).min)
            share, shrink = torch.exp(logits - finite), torch.exp(largest - finite)
            weight = weight * shrink + share.sum(1, keepdim=True)
            mean = mean * shrink + share @ block
            largest = above
        return mean / weight

    def _checked(self, label: Tensor | None) -> Tensor | None:
        if label is None:
            return None
        if self.labels is None:
            raise UserError("this data set has no labels: give its labels too, or ask without one")
        missing = label[~torch.isin(label, self.labels.to(label.device))]
        if len(missing):
            raise UserError(f"label {int(missing[0])} is that of no example: the labels are {self._known()}")
        return label

    def _known(self) -> str:
        assert self.labels is not None
        known = torch.unique(self.labels).tolist()
        return ", ".join(map(str, known[:10])) + (", ..." if len(known) > 10 else "")
