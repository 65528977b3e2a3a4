r"""Denoisers: all that a solver sees.

A denoiser answers, at a noisy x (B, ...) and a time t (a number, or shape () or (B,)), with any of

    denoised  E[x_0 | x_t]                          eps  (x - alpha denoised) / sigma
    score     grad log p_t(x) = -eps / sigma        v    alpha eps - sigma denoised

`Denoiser` composes them from a network, an SDE and a parameterization. `GaussianDenoiser` and
`GaussianMixtureDenoiser` are exact: Tweedie's formula with the density known in closed form. Tests, benchmarks and
examples run on them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sde.broadcast import Time, as_tensor, expand
from sde.errors import UserError
from sde.parameterizations import Parameterization, ScalarRow, scalar_input, scalar_row, scalar_table
from sde.processes import SDE

Evaluation = Callable[[Tensor], Tensor]
"""One output at one time, with everything but the state settled: called with x (B, ...), gives the same shape."""


class AbstractDenoiser(nn.Module, ABC):
    """An estimate of the score of p_t. Leaves give `output`; the four named outputs are derived here.

    Attributes:
        sde: the forward process.
    """

    sde: SDE

    @abstractmethod
    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        """The output `name` ("denoised", "eps", "score" or "v") at `x` (B, ...), of the shape of `x`.

        Args:
            t: time, a number or a tensor of shape () or (B,).
            label: class labels (B,) int64, or None for no condition.
        """

    def evaluations(
        self, name: str, times: Sequence[float], like: Tensor, label: Tensor | None = None
    ) -> list[Evaluation]:
        """The output `name` at each of `times`, ready to be called step by step with states shaped like `like`.

        What depends on the times alone may be computed here once and for all; what an evaluation returns is never
        written to by solvers, and has to stay as it is until the last step. The default settles nothing.
        """

        def at(t: float) -> Evaluation:
            return lambda x: self.output(name, x, t, label)

        return [at(float(t)) for t in times]

    def select(self, indices: Tensor) -> AbstractDenoiser:
        """The denoiser for these examples of the batch (b,) alone; itself, unless it knows them one by one."""
        return self

    def denoised(self, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t = x]."""
        return self.output("denoised", x, t, label)

    def eps(self, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        """E[z | x_t = x]: the noise in x."""
        return self.output("eps", x, t, label)

    def score(self, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        """grad log p_t(x)."""
        return self.output("score", x, t, label)

    def v(self, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        """E[alpha z - sigma x_0 | x_t = x]."""
        return self.output("v", x, t, label)

    def eps_error(self, x0: Tensor, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """eps(x_t, t) - z at x_t = alpha x0 + sigma z: what denoising score matching makes small."""
        return self.eps(self.sde.perturb(x0, t, z), t, label) - z


@contextmanager
def evaluating(denoiser: AbstractDenoiser) -> Iterator[None]:
    """The denoiser in evaluation mode: a density is one of a function, and dropout makes another one at each call."""
    training = [module for module in denoiser.modules() if module.training]
    denoiser.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Denoiser(AbstractDenoiser):
    """A network on an SDE under a parameterization.

    Args:
        network: `network(x, c_noise, label)` with `x` (B, ...), `c_noise` (B,) and class labels (B,) or None, giving a
            tensor of the shape of `x`. Its attribute `noise_label` names the number it wants as `c_noise`
            (default "time"). Its attribute `reuses_output` (default False) tells that the next call overwrites what
            it returned, as a network does that is replayed as a CUDA graph.
        sde: the forward process.
        parameterization: what the network's output means.
    """

    def __init__(self, network: nn.Module, sde: SDE, parameterization: Parameterization) -> None:
        super().__init__()
        self.network = network
        self.sde = sde
        self.parameterization = parameterization
        self.label_kind: str = getattr(network, "noise_label", "time")

    def raw(self, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        """The network's own output F(c_in x, c_noise), in the type of `x`."""
        if isinstance(t, Tensor):
            c_in = self.parameterization.c_in(self.sde, _exact(t))
            # In the type of t, as other implementations do: Fourier features tell the last bit of a label apart.
            c_noise = self.parameterization.c_noise(self.sde, t, self.label_kind)
            c_noise = c_noise.to(x.device, x.dtype).expand(x.shape[0])
            scaled = x * expand(c_in.to(x.dtype), x)
        else:
            scale, noise = scalar_input(self.parameterization, self.sde, t, self.label_kind)
            c_noise = torch.full((x.shape[0],), noise, dtype=x.dtype, device=x.device)
            scaled = x if scale == 1 else x * scale
        return self.network(scaled, c_noise, label).to(x.dtype)

    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        f = self.raw(x, t, label)
        if not isinstance(t, Tensor):
            own = not getattr(self.network, "reuses_output", False)
            return combine(x, f, scalar_row(self.parameterization, name, self.sde, t), own)
        row = self.parameterization.row(name, self.sde, _exact(t))
        x_coefficient, f_coefficient = (expand(c.to(x.dtype), x) for c in (row.x, row.F))
        if row.rest is not None:
            return x_coefficient * (x - f) + expand(row.rest.to(x.dtype), x) * f
        return x_coefficient * x + f_coefficient * f

    def evaluations(
        self, name: str, times: Sequence[float], like: Tensor, label: Tensor | None = None
    ) -> list[Evaluation]:
        """As in the base class: all coefficients in float64, and the noise labels on the device, once per grid."""
        table = scalar_table(self.parameterization, name, self.sde, tuple(times), self.label_kind)
        labels = torch.tensor([noise for _, noise, _ in table], dtype=torch.float64).to(like.device, like.dtype)
        network, own = self.network, not getattr(self.network, "reuses_output", False)
        return [
            _evaluation(network, own, scale, c_noise, row, label)
            for (scale, _, row), c_noise in zip(table, labels[:, None].expand(-1, len(like)).unbind(), strict=True)
        ]

    def eps_error(self, x0: Tensor, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """As in the base class, with the network compared to its own target: nothing cancels at small noise."""
        exact = _exact(t)
        alpha, sigma = (c.to(x0.dtype) for c in (self.sde.alpha(exact), self.sde.sigma(exact)))
        f = self.raw(expand(alpha, x0) * x0 + expand(sigma, x0) * z, t, label)
        p, q = (c.to(x0.dtype) for c in self.parameterization.direction(self.sde, exact))
        target = expand(p, x0) * x0 + expand(q, x0) * z
        scale = self.parameterization.row("eps", self.sde, exact).F.to(x0.dtype)
        return expand(scale, x0) * (f - target)


def _evaluation(
    network: nn.Module, own: bool, scale: float, c_noise: Tensor, row: ScalarRow, label: Tensor | None
) -> Evaluation:
    def evaluate(x: Tensor) -> Tensor:
        f = network(x if scale == 1 else x * scale, c_noise, label)
        return combine(x, f if f.dtype == x.dtype else f.to(x.dtype), row, own)

    return evaluate


def combine(x: Tensor, f: Tensor, row: ScalarRow, own: bool) -> Tensor:
    """An output from the state and the network's answer `f`, which may be returned itself when it is our `own`."""
    on_x, on_f, on_rest = row
    if on_rest is not None:
        return torch.add(on_x * (x - f), f, alpha=on_rest)
    if on_x != 0:
        return torch.add(on_f * f, x, alpha=on_x)
    return f if on_f == 1 and own else on_f * f


def _exact(t: Tensor) -> Tensor:
    """`t` in float64, in which all coefficients are computed."""
    return t.double()


class GaussianMixtureDenoiser(AbstractDenoiser):
    """The exact denoiser of data drawn from a mixture of Gaussians.

    p_t is again a mixture, with means alpha m_k and covariances alpha^2 C_k + sigma^2 I; each C_k is diagonalized once.

    Args:
        sde: the forward process.
        weights: (K,) positive; normalized to sum to one.
        means: (K, *shape), `shape` that of one example.
        covariances: (K, D, D) with D the number of entries of `shape`, positive semi-definite; or (K,) or () for
            multiples of the identity.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    axes: Tensor | None
    """Principal axes (K, D, D) in columns; None for multiples of the identity, whose axes are those of the data."""

    def __init__(self, sde: SDE, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        if weights.ndim != 1 or means.shape[0] != weights.shape[0] or not bool((weights > 0).all()):
            raise UserError(
                f"weights of shape {tuple(weights.shape)} and means of shape {tuple(means.shape)} are not a mixture: "
                "give K positive weights and K means"
            )
        k, d = means.shape[0], means[0].numel()
        isotropic = covariances.ndim <= 1
        if covariances.shape not in ((), (k,), (k, d, d)):
            raise UserError(
                f"covariances of shape {tuple(covariances.shape)} do not fit {k} means of {d} entries: "
                f"give shape ({k}, {d}, {d}), ({k},) or ()"
            )
        axes: Tensor | None = None
        if isotropic:
            variances = covariances.expand(k)[:, None].expand(k, d)
        else:
            variances, axes = torch.linalg.eigh(covariances)
        self.sde = sde
        self.shape = tuple(means.shape[1:])
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("means", means.reshape(k, d))
        self.register_buffer("variances", variances.clamp_min(0))
        self.register_buffer("axes", axes)

    def _components(self, x: Tensor, t: Time) -> tuple[Tensor, ...]:
        """Logits (B, K) of the components; x - alpha m and the variances along each component's axes (B, K, D)."""
        t = _exact(as_tensor(t))
        alpha, sigma = (c.to(x.device, x.dtype).reshape(-1, 1, 1) for c in (self.sde.alpha(t), self.sde.sigma(t)))
        offset = x.flatten(1)[:, None, :] - alpha * self.means
        along = offset if self.axes is None else torch.einsum("bkd,kde->bke", offset, self.axes)
        variance = alpha**2 * self.variances + sigma**2
        log_density = -0.5 * (along**2 / variance + torch.log(2 * math.pi * variance)).sum(-1)
        return log_density + torch.log(self.weights), along, variance, alpha, sigma

    def log_prob(self, x: Tensor, t: Time) -> Tensor:
        """log p_t(x) in nats, shape (B,)."""
        return torch.logsumexp(self._components(x, t)[0], dim=1)

    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        logits, along, variance, alpha, sigma = self._components(x, t)
        share = torch.softmax(logits, dim=1)
        if name in ("score", "eps"):
            factor = -1.0 if name == "score" else sigma[..., 0]
            result = factor * self._mix(share, along / variance)
        else:
            gain = alpha * self.variances / variance
            denoised = share @ self.means + self._mix(share, gain * along)
            result = denoised
            if name == "v":
                result = (alpha * sigma)[..., 0] * self._mix(share, along / variance) - sigma[..., 0] * denoised
        return result.reshape(x.shape)

    def _mix(self, share: Tensor, along: Tensor) -> Tensor:
        """Components' vectors, given along their axes (B, K, D), averaged with the weights `share` (B, K): (B, D)."""
        if self.axes is None:
            return torch.einsum("bk,bke->be", share, along)
        return torch.einsum("bk,bke,kde->bd", share, along, self.axes)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` draws of data, (n, *shape)."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        normal = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        scaled = normal.to(self.means.device) * self.variances[component].sqrt()
        if self.axes is not None:
            scaled = torch.einsum("ne,nde->nd", scaled, self.axes[component])
        return (self.means[component] + scaled).reshape(n, *self.shape)


class GaussianDenoiser(AbstractDenoiser):
    """The exact denoiser of data drawn from one Gaussian N(mean, covariance).

    Args:
        sde: the forward process.
        mean: (*shape,).
        covariance: (D, D) with D the number of entries of `shape`, or () for a multiple of the identity.
    """

    def __init__(self, sde: SDE, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.sde = sde
        one = torch.ones(1, dtype=mean.dtype, device=mean.device)
        full = covariance if covariance.ndim == 0 else covariance[None]
        self.mixture = GaussianMixtureDenoiser(sde, one, mean[None], full)

    def log_prob(self, x: Tensor, t: Time) -> Tensor:
        """log p_t(x) in nats, shape (B,)."""
        return self.mixture.log_prob(x, t)

    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        return self.mixture.output(name, x, t, label)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` draws of data, (n, *shape)."""
        return self.mixture.sample(n, generator)
