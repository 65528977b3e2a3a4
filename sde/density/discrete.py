r"""The log-probability of quantized pictures under a model of densities, or a bound on it, several ways.

A picture's gray levels are the point x of the network's space, each level in the middle of a bucket of width w, D of
them. The model has a density p at its smallest time t, when data carry noise of standard deviation sigma (x_t = alpha x
+ sigma z), and a way from p to the probability of levels is needed:

    uniform      log P(x) >= E[log p(x + w (u - 1/2))] + D log w,                 u uniform  (arXiv 1511.01844)
    variational  log P(x) >= E[log p(x + w (u - 1/2)) - log q(u | x)] + D log w,  u ~ q      (arXiv 1902.00275)
    decoder      log P(x) >= E[log P(x | x_t) + log p(x_t) - log q(x_t | x)],     x_t ~ N(alpha x, sigma^2)
    none         log p(x) itself: the density of vectors, which are not quantized

In the first two P is the mass of p in the buckets of x; in the third that of the model which draws x_t from p and the
levels from a decoder. All are Jensen's inequality for log P = log E[weight], with the weight's logarithm in brackets,
so that of K draws the logarithm of the mean weight lies between the mean logarithm and log P in expectation, and tends
to log P (the importance-weighted bound, arXiv 1509.00519).

The decoder's bound depends on t. Where p is smooth on the scale of a bucket, noise much finer than that costs what it
takes to say where in the bucket x_t lies, log(w / sigma) for each dimension, and p that is trained on the levels
themselves has to know them that sharply. Coarse noise has to be undone by the decoder, which treats pixels one by one.
Between them is sigma / alpha = w / 4 (`decoding_time`), about EDM's smallest noise level.

How log p is had is the method: `Flow` by the probability-flow ODE, whose density it is; `ContinuousBound` and
`ChainBound` bound that of the reverse SDE from below, and have a decoder of their own for the step to data.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from sde.denoiser import AbstractDenoiser
from sde.density.bound import VARIANCES, Bound, Decoder, continuous_bound, discrete_bound
from sde.density.dequantizer import Dequantizer, uniform
from sde.density.divergence import Divergence
from sde.density.flow import Progress, dtype_of, log_prob
from sde.density.quantization import Quantization
from sde.errors import UserError, check_choice, check_flag, check_number
from sde.grids import GRIDS, Grid
from sde.processes import SDE
from sde.randomness import SampleNoise, step_seed
from sde.solvers import Solver

DEQUANTIZATIONS = ("uniform", "variational", "decoder", "none")
_CHAIN_GRID, _CHAIN_STEPS = "logsnr", 1000
_SHARE = 0.25  # of a bucket's width, the noise from which a decoder is to decode unless told otherwise


@dataclass(frozen=True)
class Examples:
    """A batch, and what its randomness is a function of.

    Args:
        x: (B, ...) float64, as the network sees it.
        label: class labels (B,) or None.
        seed: of the method's own draws.
        indices: the number of each example, (B,).
    """

    x: Tensor
    label: Tensor | None
    seed: int
    indices: Sequence[int]

    @property
    def numel(self) -> int:
        """D."""
        return math.prod(self.x.shape[1:])


@dataclass(frozen=True, eq=False)
class Weights:
    """Logarithms of weights of a batch for one draw, as the sum of what they are made of.

    Attributes:
        parts: name: nats (B,) float64.
        nfe: forward passes of the network on the batch.
        trace_error: standard error of the traces in it, in nats (B,): NaN where it is not known.
        terms: of a bound's diffusion part, by time: nats (B, N).
        times: theirs, (N,).
        truncation: see `LogProb`.
    """

    parts: dict[str, Tensor]
    nfe: int
    trace_error: Tensor
    terms: Tensor | None = None
    times: Tensor | None = None
    truncation: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The sum of the parts, (B,)."""
        return torch.stack(list(self.parts.values())).sum(0)

    def and_also(self, **parts: Tensor) -> Weights:
        """The same with more parts."""
        return replace(self, parts={**self.parts, **parts})


class Method(ABC):
    """A way to have log p, or to bound it from below. Leaves are frozen dataclasses of their options."""

    name: ClassVar[str]
    exact: ClassVar[bool]
    """Whether it is log p and no bound on it."""

    @property
    def estimates_traces(self) -> bool:
        """Whether random probes are in it."""
        return False

    @abstractmethod
    def density(self, denoiser: AbstractDenoiser, of: Examples, progress: Progress | None) -> Weights:
        """log p(x)."""

    @abstractmethod
    def decoded(
        self, denoiser: AbstractDenoiser, of: Examples, decoder: Decoder, z: Tensor, progress: Progress | None
    ) -> Weights:
        """The logarithm in brackets for the levels x, through `decoder`; `z` (B, ...) is the noise in x_t."""


@dataclass(frozen=True)
class Flow(Method):
    """log p by the probability-flow ODE, to the solver's tolerance and the error of the trace.

    Args:
        solver, divergence, grid, steps: see `log_prob`.
        truncation: also estimate how far p is from the density without noise.
    """

    solver: Solver | None = None
    divergence: Divergence | None = None
    grid: Grid | None = None
    steps: int | None = None
    truncation: bool = False
    name = "ode"
    exact = True

    @property
    def estimates_traces(self) -> bool:
        return self.divergence is not None and self.divergence.vectors > 0

    def density(self, denoiser: AbstractDenoiser, of: Examples, progress: Progress | None) -> Weights:
        found = log_prob(
            denoiser,
            of.x,
            solver=self.solver,
            divergence=self.divergence,
            grid=self.grid,
            steps=self.steps,
            label=of.label,
            seed=of.seed,
            indices=of.indices,
            truncation=self.truncation,
            progress=progress,
        )
        return Weights({"density": found.log_prob}, found.nfe, found.standard_error, truncation=found.truncation)

    def decoded(
        self, denoiser: AbstractDenoiser, of: Examples, decoder: Decoder, z: Tensor, progress: Progress | None
    ) -> Weights:
        sde, own = denoiser.sde, dtype_of(denoiser)
        t = torch.full((len(of.x),), sde.t_min, dtype=torch.float64, device=of.x.device)
        alpha, sigma = float(sde.alpha(sde.t_min)), float(sde.sigma(sde.t_min))
        found = self.density(denoiser, replace(of, x=alpha * of.x + sigma * z.double()), progress)
        spread = of.numel * math.log(sigma * math.sqrt(2 * math.pi))
        return replace(found, nfe=found.nfe + decoder.evaluates).and_also(
            decoder=-decoder.term(denoiser, of.x.to(own), z.to(own), t, of.label),
            noise=0.5 * z.double().square().flatten(1).sum(1) + spread,  # -log q(x_t | x)
        )


@dataclass(frozen=True)
class ContinuousBound(Method):
    """The bound of the reverse SDE (`continuous_bound`).

    Args:
        points: times, one in each of as many equal parts of the log-SNR.
    """

    points: int = 32
    name = "continuous_bound"
    exact = False

    def __post_init__(self) -> None:
        _check_count("points", self.points)

    def density(self, denoiser: AbstractDenoiser, of: Examples, progress: Progress | None) -> Weights:
        return self._bound(denoiser, of, Decoder(), progress)

    def decoded(
        self, denoiser: AbstractDenoiser, of: Examples, decoder: Decoder, z: Tensor, progress: Progress | None
    ) -> Weights:
        return self._bound(denoiser, of, decoder, progress)

    def _bound(self, denoiser: AbstractDenoiser, of: Examples, decoder: Decoder, progress: Progress | None) -> Weights:
        return _of_bound(
            continuous_bound(
                denoiser,
                of.x.to(dtype_of(denoiser)),
                quantization=decoder.quantization,
                decoder=decoder.kind,
                decoder_std=decoder.std,
                label=of.label,
                seed=of.seed,
                indices=of.indices,
                points=self.points,
                draws=1,
                callback=_telling(progress),
            )
        )


@dataclass(frozen=True)
class ChainBound(Method):
    """The bound of a chain (`discrete_bound`).

    Args:
        grid: times of the chain; None for equal steps in the log-SNR.
        steps: how many steps; None for 1000, or the grid's own number.
        variance, share, subset: see `discrete_bound`.
    """

    grid: Grid | None = None
    steps: int | None = None
    variance: str = "posterior"
    share: float = 0.5
    subset: int | None = None
    name = "discrete_bound"
    exact = False

    def __post_init__(self) -> None:
        check_choice("bound.variance", self.variance, VARIANCES)
        check_number("bound.share", self.share)
        for name in ("steps", "subset"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))

    def times(self, sde: SDE) -> list[float]:
        """The times from T to t_min."""
        grid = GRIDS.get(_CHAIN_GRID)() if self.grid is None else self.grid
        whole = replace(sde, t_min_sampling=sde.t_min)  # type: ignore[type-var]  # grids end where samplers stop
        return grid.place(whole, self.steps, _CHAIN_STEPS)

    def density(self, denoiser: AbstractDenoiser, of: Examples, progress: Progress | None) -> Weights:
        return self._bound(denoiser, of, Decoder(), progress)

    def decoded(
        self, denoiser: AbstractDenoiser, of: Examples, decoder: Decoder, z: Tensor, progress: Progress | None
    ) -> Weights:
        return self._bound(denoiser, of, decoder, progress)

    def _bound(self, denoiser: AbstractDenoiser, of: Examples, decoder: Decoder, progress: Progress | None) -> Weights:
        return _of_bound(
            discrete_bound(
                denoiser,
                of.x.to(dtype_of(denoiser)),
                self.times(denoiser.sde),
                quantization=decoder.quantization,
                variance=self.variance,
                share=self.share,
                decoder=decoder.kind,
                decoder_std=decoder.std,
                label=of.label,
                seed=of.seed,
                indices=of.indices,
                draws=1,
                subset=self.subset,
                callback=_telling(progress),
            )
        )


@dataclass(frozen=True)
class Discretization:
    """How log P of levels is had from log p.

    Args:
        kind: one of `DEQUANTIZATIONS`.
        quantization: the levels; None for "none" alone.
        dequantizer: q of "variational".
        decoder: kind of the decoder of "decoder", one of `DECODERS`.
        decoder_std: see `Decoder`.
        draws: K, independent draws for each picture.
        importance: the logarithm of the mean weight instead of the mean logarithm.

    Raises:
        UserError: values that do not go together.
    """

    kind: str
    quantization: Quantization | None = None
    dequantizer: Dequantizer | None = field(default=None, compare=False)
    decoder: str = "gaussian"
    decoder_std: float | None = None
    draws: int = 1
    importance: bool = False

    def __post_init__(self) -> None:
        check_choice("dequantization", self.kind, DEQUANTIZATIONS)
        if isinstance(self.draws, bool) or not isinstance(self.draws, int):
            raise UserError(f"draws={self.draws!r} must be a whole number")
        check_number("draws", self.draws, at_least=1)
        check_flag("importance", self.importance)
        if self.kind == "none" and self.quantization is not None:
            raise UserError(
                "dequantization=none gives a density, which pixels do not have: take uniform, variational or decoder"
            )
        if self.kind != "none" and self.quantization is None:
            raise UserError(f"dequantization={self.kind} is for pixels and these are vectors: take none")
        if self.kind == "variational" and self.dequantizer is None:
            raise UserError("dequantization=variational needs a dequantizer: train one, or take uniform")
        if self.importance and self.kind == "none":
            raise UserError("importance=true weighs draws and dequantization=none makes none: leave it out")
        if self.decoder_kind is None and (self.decoder != "gaussian" or self.decoder_std is not None):
            raise UserError(
                f"decoder={self.decoder} and decoder_std={self.decoder_std} belong to dequantization=decoder: leave "
                "them out"
            )

    @property
    def decoder_kind(self) -> Decoder | None:
        """The decoder of "decoder"."""
        if self.kind != "decoder":
            return None
        return Decoder(self.decoder, self.decoder_std, self.quantization)

    def check(self, method: Method) -> None:
        """Raise `UserError` where `method` does not go with these."""
        if self.importance and not method.exact:
            raise UserError(
                "importance=true needs log p itself (method=ode): the exponential of an estimated bound is above the "
                "bound's in the mean, so that nothing would be bounded"
            )

    def meaning(self, method: Method) -> str:
        """What the bits per dimension are, and which side of it they are on."""
        if not method.exact:
            chain = "chain" if isinstance(method, ChainBound) else "reverse SDE"
            what = {
                "none": f"-log2 p(x) / D of the {chain}",
                "decoder": f"-log2 P(pixels) / D of the {chain} and its decoder",
            }.get(self.kind, f"-log2 P(pixels) / D, P the mass of the {chain}'s density in the pixels' buckets")
            return f"upper bound, in expectation over all draws, on {what}"
        if self.kind == "none":
            return (
                "-log2 p(x) / D, p the density of the probability-flow ODE at the smallest time: no bound, and right "
                "up to the error of the solver's steps"
            )
        weighted = f" (importance-weighted, {self.draws} draws)" if self.importance else ""
        what = {
            "decoder": "the probability-flow ODE draws x_t and the decoder the pixels",
        }.get(self.kind, "P the mass of the probability-flow ODE's density in the pixels' buckets")
        estimated = self.importance and method.estimates_traces
        limits = "; as far as the error of estimated traces is the same in all draws of a picture" if estimated else ""
        return (
            f"upper bound{weighted}, in expectation over the draws and up to the error of the solver's steps, on "
            f"-log2 P(pixels) / D, {what}{limits}"
        )


@dataclass(frozen=True, eq=False)
class DiscreteLogProb:
    """log P, or log p, of a batch in nats, float64.

    Attributes:
        log_prob: (B,): the mean of `draws`, or the logarithm of the mean of their exponentials.
        draws: (B, K), of each draw.
        standard_error: of `log_prob` from the spread of the draws, (B,): NaN for one draw, and for weights of which
            fewer than two count (1 / the sum of their squared shares), whose spread tells nothing.
        trace_error: of `log_prob` from the spread of the trace's estimates, (B,): 0 for exact ones, NaN for one probe
            and for bounds, which have no trace.
        parts: what the mean of the draws is made of: name: (B,).
        terms: of a bound's diffusion part, by time, (B, N), with the sign of log P; None without a bound.
        times: theirs, (N,).
        truncation: see `LogProb`; None unless it was asked for.
        nfe: forward passes of the network on the batch.
    """

    log_prob: Tensor
    draws: Tensor
    standard_error: Tensor
    trace_error: Tensor
    parts: dict[str, Tensor]
    terms: Tensor | None
    times: Tensor | None
    truncation: Tensor | None
    nfe: int


@torch.no_grad()
def discrete_log_prob(
    denoiser: AbstractDenoiser,
    x: Tensor,
    discretization: Discretization,
    method: Method | None = None,
    *,
    label: Tensor | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> DiscreteLogProb:
    """log P of quantized pictures, or log p of vectors, exactly or bounded from below (`Discretization.meaning`).

    The mean of K draws has its expectation whatever K. With `importance` the trace's probes are the same in all draws
    of a picture, since an error that they share adds to the result and is right in expectation, while one of their own
    would raise the mean weight: what is left of that is what the error differs by between draws.

    Args:
        denoiser: the model.
        x: (B, ...), as the network sees it: the levels' values, or vectors.
        discretization: from densities to levels.
        method: None for `Flow()`.
        label: class labels (B,) or None.
        seed: all draws of example k are a function of (seed, k) alone.
        indices: the number k of each example, (B,); None counts from 0.
        progress: told of the share that is done.

    Raises:
        UserError: options that do not go together.
    """
    method = Flow() if method is None else method
    discretization.check(method)
    numbers = range(len(x)) if indices is None else indices
    count = discretization.draws
    noise = SampleNoise(
        step_seed(seed, 0, "dequantization") >> 1, numbers, x.shape[1:], dtype=dtype_of(denoiser), device=x.device
    )
    found = []
    for r in range(count):
        probes = seed if discretization.importance else step_seed(seed, r, "density") >> 1
        of = Examples(x.double(), label, probes, numbers)
        found.append(_draw(denoiser, of, discretization, method, noise, _share(progress, r, count)))
    return _combine(found, discretization.importance)


def decoding_time(sde: SDE, quantization: Quantization) -> float:
    """The time from which to decode: where the noise level is a quarter of a bucket, or t_min where that is noisier."""
    level = _SHARE * quantization.width
    return sde.t_min if float(sde.noise_level(sde.t_min)) >= level else float(sde.t_of_noise_level(level))


def from_time(denoiser: AbstractDenoiser, t_min: float | None) -> AbstractDenoiser:
    """The same denoiser with another smallest time, at which its density is meant; None leaves it.

    Raises:
        UserError: for a time that is not between the SDE's smallest and largest.
    """
    if t_min is None:
        return denoiser
    sde = denoiser.sde
    check_number("t_min", t_min, at_least=sde.t_min, below=sde.T)
    later = copy.copy(denoiser)
    changed = {"t_min": t_min, "t_min_sampling": max(t_min, sde.t_min_sampling)}
    later.sde = replace(sde, **changed)  # type: ignore[type-var]  # SDEs are dataclasses
    return later


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"bound.{name}={value!r} must be a whole number of at least 1")


def _draw(
    denoiser: AbstractDenoiser,
    of: Examples,
    discretization: Discretization,
    method: Method,
    noise: SampleNoise,
    progress: Progress | None,
) -> Weights:
    """The logarithm in brackets for one draw."""
    if discretization.kind == "none":
        return method.density(denoiser, of, progress)
    levels, decoder = discretization.quantization, discretization.decoder_kind
    assert levels is not None
    if decoder is not None:
        return method.decoded(denoiser, of, decoder, noise(), progress)
    extra = {"width": of.x.new_full((len(of.x),), of.numel * math.log(levels.width))}
    if discretization.kind == "variational":
        flow = discretization.dequantizer
        assert flow is not None
        own = next(flow.parameters()).dtype
        u, log_q = flow(of.x.to(own), noise().to(own))
        extra["dequantizer"] = -log_q.double()
    else:
        u = uniform(noise().double())
    inside = replace(of, x=levels.dequantize(of.x, u))
    return method.density(denoiser, inside, progress).and_also(**extra)


def _combine(found: Sequence[Weights], importance: bool) -> DiscreteLogProb:
    count = len(found)
    draws = torch.stack([weights.total for weights in found], 1)
    errors = torch.stack([weights.trace_error for weights in found], 1)
    shares = torch.softmax(draws, 1) if importance else torch.full_like(draws, 1 / count)
    if importance:
        value = torch.logsumexp(draws, 1) - math.log(count)
        spread = count * shares  # by the delta method
        trace_error = (shares * errors).sum(1)  # one and the same error
    else:
        value, spread = draws.mean(1), draws
        trace_error = errors.square().sum(1).sqrt() / count
    error = spread.std(1) / math.sqrt(count) if count > 1 else torch.full_like(value, math.nan)
    error = error.masked_fill(1 / shares.square().sum(1) < 2, math.nan)
    first = found[0]
    terms = [weights.terms for weights in found if weights.terms is not None]
    moved = [weights.truncation for weights in found if weights.truncation is not None]
    return DiscreteLogProb(
        log_prob=value,
        draws=draws,
        standard_error=error,
        trace_error=trace_error,
        parts={name: torch.stack([weights.parts[name] for weights in found]).mean(0) for name in first.parts},
        terms=torch.stack(terms).mean(0) if terms else None,
        times=first.times,
        truncation=torch.stack(moved).mean(0) if moved else None,
        nfe=sum(weights.nfe for weights in found),
    )


def _of_bound(bound: Bound) -> Weights:
    return Weights(
        {"prior": -bound.prior, "diffusion": -bound.terms.sum(1), "decoder": -bound.decoder},
        bound.nfe,
        torch.full_like(bound.prior, math.nan),
        -bound.terms,
        bound.times,
    )


def _share(progress: Progress | None, r: int, count: int) -> Progress | None:
    if progress is None:
        return None
    return lambda share: progress((r + share) / count)


def _telling(progress: Progress | None) -> Callable[[float, float, Tensor | None], None] | None:
    if progress is None:
        return None
    return lambda share, t, x: progress(share)
