r"""The divergence of a vector field beside its value, from one evaluation of the network.

The log-density along the probability-flow ODE needs tr(J), J = d eps / d x, at every evaluation of eps. Whatever an
estimator asks of J - products with vectors, from one side or the other - is computed on the graph of the evaluation
that gives eps, so that value and divergence cost one forward pass together.

    exact        sum_i e_i' J e_i: D Jacobian-vector products, vectorized; for small D
    hutchinson   v' J v with E v v' = I, averaged over probes v (Hutchinson 1990; FFJORD, arXiv 1810.01367)
    hutchpp      tr(Q' J Q) exactly on the range Q of a sketch of J', Hutchinson on the rest (arXiv 2010.09649)

What is estimated is the trace of J - c I for a number c that the caller knows, to which c D is added: for probes of
random length the identity in J would be all of their variance. Each estimator draws its probes once per example and
keeps them along the whole path, so that the mean over the probes has an error that their spread tells, and what is
estimated is as smooth in time as J; but for the subspace of `hutchpp`, which may turn suddenly. In expectation all are
exact.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from sde.errors import UserError, check_choice
from sde.randomness import SampleNoise, seed_words
from sde.registry import Registry

DIVERGENCES: Registry[Divergence] = Registry("divergence")
register = DIVERGENCES.register

DISTRIBUTIONS = ("rademacher", "gaussian")
MODES = ("forward", "reverse")

Field = Callable[[Tensor], Tensor]
"""A vector field: x (B, ...) to a tensor of the same shape, every example by itself."""


class Divergence(ABC):
    """An estimator of traces. Leaves are frozen dataclasses of their options."""

    @property
    @abstractmethod
    def estimates(self) -> int:
        """K: independent estimates for each example."""

    @property
    def vectors(self) -> int:
        """Probes of each example."""
        return 0

    def passes(self, numel: int) -> int:
        """Forward passes of the field at each evaluation, for examples of `numel` entries."""
        return 1

    def check(self, numel: int) -> None:  # noqa: B027 - most suit any
        """Raise `UserError` where the options do not suit examples of `numel` entries."""

    def draw(self, seed: int, indices: Sequence[int], like: Tensor) -> Tensor | None:
        """Probes (B, `vectors`, ...) for examples `indices` of `seed`, shaped and typed like `like` (B, ...).

        A function of (seed, index) alone; None for an estimator without probes.
        """
        return None

    @abstractmethod
    def __call__(self, field: Field, x: Tensor, probes: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor]:
        """The field at `x` (B, ...), and estimates (B, K) of tr(J - shift I), both without a graph.

        Args:
            field: what is evaluated.
            x: where, in the type in which to compute.
            probes: those of these examples.
            shift: c of each example, (B,), in the type of `x`.
        """


@register("exact")
@dataclass(frozen=True)
class Exact(Divergence):
    """The trace itself, by D Jacobian-vector products.

    Args:
        mode: "forward" sends the unit vectors through the network beside the value, all in one pass; "reverse" goes
            back through the graph once for each, slower, for networks with parts that know no forward derivative.
        chunk: most unit vectors at a time in forward mode; null for all. Each chunk takes a forward pass, and memory
            for `chunk` times the batch.
    """

    mode: str = "forward"
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_choice("divergence.mode", self.mode, MODES)
        if self.chunk is not None:
            _check_count("chunk", self.chunk)

    @property
    def estimates(self) -> int:
        return 1

    def passes(self, numel: int) -> int:
        return 1 if self.chunk is None or self.mode == "reverse" else math.ceil(numel / self.chunk)

    def __call__(self, field: Field, x: Tensor, probes: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor]:
        d = math.prod(x.shape[1:])
        if self.mode == "reverse":
            value, product = _pull_back(field, x)
            flat = torch.eye(d, dtype=x.dtype, device=x.device)
            rows = (product(e.reshape(x.shape[1:]).expand_as(x)).flatten(1)[:, i] for i, e in enumerate(flat))
            trace = torch.stack(list(rows)).sum(0)
        else:
            value, trace = self._forward(field, x, d)
        return value, (trace - d * shift)[:, None]

    def _forward(self, field: Field, x: Tensor, d: int) -> tuple[Tensor, Tensor]:
        def along(vector: Tensor) -> tuple[Tensor, Tensor]:
            value, change = jvp(field, (x,), (vector.expand_as(x),))  # type: ignore[misc]  # no auxiliary output
            return value, (vector * change).flatten(1).sum(1)

        units = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, *x.shape[1:])
        trace = x.new_zeros(len(x))
        # fused attention has no forward derivative, and activations that work in place would overwrite what has one
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for part in units.split(self.chunk or d):
                value, diagonal = vmap(along, out_dims=(None, 0))(part)  # type: ignore[arg-type]  # one value for all
                trace = trace + diagonal.sum(0)
        return value.detach(), trace.detach()


@register("hutchinson")
@dataclass(frozen=True)
class Hutchinson(Divergence):
    """v' J v, averaged over probes: one forward pass and one backward pass for each probe.

    Args:
        probes: number of probes; two or more give every example an error bar.
        distribution: "rademacher" (+-1 with equal odds; the least variance of all) or "gaussian".
    """

    probes: int = 1
    distribution: str = "rademacher"

    def __post_init__(self) -> None:
        _check_count("probes", self.probes)
        check_choice("divergence.distribution", self.distribution, DISTRIBUTIONS)

    @property
    def estimates(self) -> int:
        return self.probes

    @property
    def vectors(self) -> int:
        return self.probes

    def draw(self, seed: int, indices: Sequence[int], like: Tensor) -> Tensor:
        return draw_probes(self.distribution, self.vectors, seed, indices, like)

    def __call__(self, field: Field, x: Tensor, probes: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor]:
        assert probes is not None
        value, product = _pull_back(field, x)
        estimates = []
        for v in probes.unbind(1):
            rest = torch.addcmul(product(v), _like(shift, x), v, value=-1)
            estimates.append((v * rest).flatten(1).sum(1))
        return value, torch.stack(estimates, 1)


@register("hutchpp")
@dataclass(frozen=True)
class HutchPlusPlus(Divergence):
    """Hutch++: exact on a subspace that a sketch finds, Hutchinson with Rademacher probes on what is orthogonal to it.

    Its error falls with the reciprocal of the number of products, and at once where J is a few directions beside a
    multiple of the identity; Hutchinson's falls with the square root. One forward and 3 `rank` backward passes. All
    estimates of an example share the subspace, so its error bar is that of the rest. The subspace turns suddenly where
    the sketch is close to losing a dimension, which solvers with an error control pay for with short steps: take one
    with a grid, such as `adams`.

    Args:
        rank: dimensions of the subspace, and number of probes on the rest; at most the dimension of the data.
    """

    rank: int = 2

    def __post_init__(self) -> None:
        _check_count("rank", self.rank)

    @property
    def estimates(self) -> int:
        return self.rank

    @property
    def vectors(self) -> int:
        return 2 * self.rank

    def check(self, numel: int) -> None:
        if self.rank > numel:
            raise UserError(
                f"divergence.rank={self.rank} is more than the {numel} dimensions of the data: take at most {numel}, "
                f"or divergence=exact"
            )

    def draw(self, seed: int, indices: Sequence[int], like: Tensor) -> Tensor:
        return draw_probes("rademacher", self.vectors, seed, indices, like)

    def __call__(self, field: Field, x: Tensor, probes: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor]:
        assert probes is not None
        value, product = _pull_back(field, x)

        def times(vectors: Tensor) -> Tensor:
            """(J - shift I)' of the columns of `vectors` (B, D, r)."""
            columns = [product(v.reshape(x.shape)).flatten(1) for v in vectors.unbind(2)]
            return torch.stack(columns, 2) - shift[:, None, None] * vectors

        sketch, rest = probes.flatten(2).mT.split(self.rank, dim=2)
        basis, _ = torch.linalg.qr(times(sketch))
        on_basis = (basis * times(basis)).sum((1, 2))
        rest = rest - basis @ (basis.mT @ rest)
        beside = (rest * times(rest)).sum(1)
        return value, on_basis[:, None] + beside


def draw_probes(distribution: str, count: int, seed: int, indices: Sequence[int], like: Tensor) -> Tensor:
    """`count` probes (B, count, ...) of mean 0 and covariance I for examples `indices` of `seed`."""
    high, low = seed_words(seed, 0xD1F, 2)
    noise = SampleNoise(
        (high << 31) ^ low, indices, (count, *like.shape[1:]), dtype=torch.float32, device=like.device
    )()
    return (noise if distribution == "gaussian" else torch.where(noise < 0, -1.0, 1.0)).to(like.dtype)


def _pull_back(field: Field, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The field at `x` and the map v -> J' v, any number of times."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = field(x)

    def product(v: Tensor) -> Tensor:
        if not value.requires_grad:  # a field that does not depend on x
            return torch.zeros_like(v)
        return torch.autograd.grad(value, x, v, retain_graph=True)[0]

    return value.detach(), product


def _like(c: Tensor, x: Tensor) -> Tensor:
    return c.reshape(-1, *[1] * (x.ndim - 1))


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"divergence.{name}={value!r} must be a whole number, at least 1")
