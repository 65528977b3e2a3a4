r"""Variational bounds on -log p(x), for any process and any denoiser.

Both start from the prior at the largest time, walk down to the smallest, t_0, and end in a decoder P(x | x_{t_0}):

    -log p(x) <= L_prior + L_diffusion + L_decoder,
    L_prior   = KL(q(x_T | x) || N(0, prior_std^2)),    L_decoder = -E log P(x | x_{t_0}),    x_t = alpha x + sigma z.

With u = sigma / alpha, SNR = u^-2, and e = eps(x_t, t) - z the error that denoising score matching makes small:

discrete (arXiv 2006.11239, equation 5; 2102.09672): a chain over times t_0 < ... < t_N whose step from t to s < t is
normal with the mean of q(x_s | x_t, x), x replaced by the denoised. A term is the KL of two Gaussians. When both have
the posterior's variance, sigma_s^2 (1 - SNR_t / SNR_s), it is the difference of signal-to-noise ratios on the error
of the denoised (arXiv 2107.00630, section 4), or what keeps its digits at small noise,

    L_{t -> s} = 1/2 E ||e||^2 expm1(lambda),    lambda = log SNR_s - log SNR_t,

and with a variance exp(kappa) times as large, in D dimensions,

    L_{t -> s} = 1/2 [exp(-kappa) expm1(lambda) E ||e||^2 + D (expm1(-kappa) + kappa)].

It is least at exp(kappa) = 1 + expm1(lambda) E ||e||^2 / D. kappa is 0 for "posterior", log(sigma_t^2 / sigma_s^2) for
"forward", the variance of q(x_t | x_s), and `share` times that for "interpolated" (2102.09672, equation 15).

continuous (arXiv 2101.09258, theorem 3; 2107.00630, section 5): its limit, whatever the variance,

    L_diffusion = 1/2 int E ||e||^2 d log(1 / SNR),

over times drawn uniformly in the log-SNR, so that every draw counts alike. A chain of N posterior steps is above it by
an amount of order 1 / N.

These are upper bounds on -log p of the reverse SDE (the chain) with its decoder, hence lower bounds on log p, in
expectation over the draws; a single estimate may lie on either side. They are no bounds on the density of the
probability-flow ODE, another model unless the score is exact. With a `Quantization` the total bounds -log P of the gray
levels: bits are `bits_per_dim(-total, D)`. Without one the decoder is a normal density and the total bounds -log p_0 of
the values: of dequantized pictures bits are `bits_per_dim(-total, D, width)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sde.broadcast import expand
from sde.denoiser import AbstractDenoiser, evaluating
from sde.density.quantization import Quantization
from sde.errors import UserError, check_choice, check_number
from sde.processes import SDE
from sde.randomness import SampleNoise, step_seed
from sde.solvers.base import Callback

VARIANCES = ("posterior", "forward", "interpolated")
DECODERS = ("gaussian", "softmax")


@dataclass(frozen=True, eq=False)
class Bound:
    """An upper bound on -log p of each sample and what it is made of, in nats and float64.

    Attributes:
        prior: L_prior (B,).
        terms: L_diffusion by time (B, N), averaged over the draws: a term of the chain for each step, or the integral
            over each stratum. With a subset of a chain's terms a single entry is an unbiased estimate of its term.
        times: the later time of each step or stratum, (N,) increasing, float64 on the CPU.
        decoder: L_decoder (B,).
        nfe: how often the denoiser was evaluated on the batch.
        standard_error: of the total, from the spread of the draws (B,), or None after a single draw.
    """

    prior: Tensor
    terms: Tensor
    times: Tensor
    decoder: Tensor
    nfe: int
    standard_error: Tensor | None

    @property
    def total(self) -> Tensor:
        """The bound (B,)."""
        return self.prior + self.terms.sum(1) + self.decoder


@dataclass(frozen=True)
class Decoder:
    """P(x | x_{t_0}), the last step from the smallest time to data.

    Args:
        kind: "gaussian" is N(denoised, std^2), as a density or as the mass of each gray level's bucket
            (arXiv 2006.11239, equation 13); "softmax" is the posterior of equally likely gray levels, without the
            network (arXiv 2107.00630).
        std: standard deviation of "gaussian", in the network's units; None is the noise level sigma / alpha at t_0.
        quantization: the gray levels; None for data that are not quantized.

    Raises:
        UserError: values that do not go together.
    """

    kind: str = "gaussian"
    std: float | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        check_choice("decoder", self.kind, DECODERS)
        if self.std is not None:
            check_number("decoder_std", self.std, above=0)
        if self.kind == "softmax" and self.quantization is None:
            raise UserError("decoder='softmax' is for gray levels: give a quantization, or take decoder='gaussian'")
        if self.kind == "softmax" and self.std is not None:
            raise UserError(f"decoder_std={self.std!r} belongs to decoder='gaussian': leave it out")

    @property
    def evaluates(self) -> bool:
        """Whether the denoiser is asked."""
        return self.kind == "gaussian"

    def term(self, denoiser: AbstractDenoiser, x0: Tensor, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """-log P(x0 | alpha x0 + sigma z) in nats (B,), float64.

        Args:
            denoiser: the model.
            x0: data (B, ...), as the network sees it.
            z: standard normal noise of the same shape.
            t: the smallest time (B,).
            label: class labels (B,) or None.
        """
        u = denoiser.sde.noise_level(t.double())
        levels = self.quantization
        if not self.evaluates:
            assert levels is not None
            return -levels.log_mass_softmax(x0, x0.double() + expand(u, x0) * z.double(), u)
        std = u if self.std is None else torch.full_like(u, self.std)
        error = denoiser.eps_error(x0, z, t, label).double()
        if levels is None:
            log_norm = 0.5 * math.prod(x0.shape[1:]) * torch.log(2 * math.pi * std**2)
            return 0.5 * (u / std) ** 2 * error.square().flatten(1).sum(1) + log_norm
        # denoised = x0 - u e, in which x0 keeps its digits
        return -levels.log_mass(x0, x0.double() - expand(u, x0) * error, std)


def prior_term(sde: SDE, x0: Tensor, t: float | None = None) -> Tensor:
    """KL(q(x_t | x0) || N(0, prior_std^2 I)) in nats for `x0` (B, ...), t = T unless given: (B,) float64."""
    t = sde.T if t is None else t
    alpha, log_ratio = float(sde.alpha(t)), 2 * math.log(float(sde.sigma(t)) / sde.prior_std)
    square = x0.double().square().flatten(1).sum(1)
    excess = math.expm1(log_ratio) - log_ratio
    return 0.5 * ((alpha / sde.prior_std) ** 2 * square + math.prod(x0.shape[1:]) * excess)


def integrand(denoiser: AbstractDenoiser, x0: Tensor, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    """1/2 ||eps(x_t, t) - z||^2 (B,), float64: what the continuous bound integrates over log(1 / SNR).

    Differentiable in `x0` and in the network's parameters. Its mean over times uniform in the log-SNR (`quantile`),
    times `log_snr_range`, is an unbiased estimate of L_diffusion.

    Args:
        denoiser: the model.
        x0: data (B, ...), as the network sees it.
        z: standard normal noise of the same shape.
        t: times (B,).
        label: class labels (B,) or None.
    """
    return 0.5 * denoiser.eps_error(x0, z, t, label).double().square().flatten(1).sum(1)


def log_snr_range(sde: SDE, t_min: float | None = None, T: float | None = None) -> float:
    """log SNR(t_min) - log SNR(T), by default between the SDE's own ends."""
    low, high = _ends(sde, t_min, T)
    return float(sde.log_snr(low) - sde.log_snr(high))


def quantile(sde: SDE, u: Tensor, t_min: float | None = None, T: float | None = None) -> Tensor:
    """The times below which shares `u` in [0, 1] of the log-SNRs from t_min to T lie, float64, of the shape of `u`."""
    low, high = _ends(sde, t_min, T)
    log_snr = float(sde.log_snr(low)) - log_snr_range(sde, low, high) * u.double()
    return sde.t_of_log_snr(log_snr).clamp(low, high)


@torch.no_grad()
def discrete_bound(
    denoiser: AbstractDenoiser,
    x0: Tensor,
    times: Sequence[float],
    *,
    quantization: Quantization | None = None,
    variance: str = "posterior",
    share: float | Sequence[float] = 0.5,
    decoder: str = "gaussian",
    decoder_std: float | None = None,
    label: Tensor | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    draws: int = 1,
    subset: int | None = None,
    callback: Callback | None = None,
) -> Bound:
    """The bound of a chain over `times`, every term by its time.

    Args:
        denoiser: the model.
        x0: data (B, ...), as the network sees it: levels' values where there is a `quantization`.
        times: of the chain, decreasing as a grid gives them or increasing.
        quantization: gray levels; None for data that are not quantized, dequantized pictures among them.
        variance: of the model's steps, one of `VARIANCES`.
        share: for "interpolated", how far from "posterior" (0) to "forward" (1) in the logarithm; one or one for each
            step from the smallest time up.
        decoder: one of `DECODERS`.
        decoder_std: see `Decoder`.
        label: class labels (B,) or None.
        seed: the draws of sample k are a function of (seed, k) alone.
        indices: the number k of each sample, (B,); None counts from 0.
        draws: independent repetitions of all noise.
        subset: evaluate so many of the terms instead of all, drawn for every sample and repetition by itself from as
            many strata, in proportion to the weight on ||e||^2, and weighted so that the mean stays the same.
        callback: told of the progress.

    Raises:
        UserError: an argument that is not one of these.
    """
    sde = denoiser.sde
    grid = _increasing(sde, times)
    gain, constant = _chain_weights(sde, grid, variance, share)
    end = Decoder(decoder, decoder_std, quantization)
    steps = len(gain)
    count = steps if subset is None else _check_count("subset", subset)
    if count > steps:
        raise UserError(f"subset={count} is more than the {steps} terms of the chain: leave it out for all of them")
    run = _Run(denoiser, x0, label, seed, indices, count)
    at, weight = grid[1:].to(x0.device), 2 * gain.to(x0.device)
    total, below = weight.sum(), torch.cumsum(gain / gain.sum(), 0)[:-1].to(x0.device)

    def plan() -> _Plan:
        if subset is None:
            return _Plan(at.expand(len(x0), -1), weight)
        chosen = torch.bucketize(run.strata(), below)
        return _Plan(at[chosen], (total / count).expand(count), chosen)

    with evaluating(denoiser):
        bound = run.estimate(plan, end, float(grid[0]), grid[1:], draws, callback)
    return replace(bound, terms=bound.terms + math.prod(x0.shape[1:]) * constant.to(x0.device))


def continuous_bound(
    denoiser: AbstractDenoiser,
    x0: Tensor,
    *,
    quantization: Quantization | None = None,
    t_min: float | None = None,
    T: float | None = None,
    decoder: str = "gaussian",
    decoder_std: float | None = None,
    label: Tensor | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    points: int = 16,
    draws: int = 4,
    callback: Callback | None = None,
) -> Bound:
    """The bound of the reverse SDE, its integral estimated at `points` times in each of `draws` repetitions.

    The times are uniform in the log-SNR, one in each of `points` equal strata, drawn for every sample and repetition
    by itself: the estimate is unbiased. Where gradients are enabled it is differentiable in `x0` and in the network's
    parameters.

    Args:
        denoiser: the model.
        x0: data (B, ...), as the network sees it: levels' values where there is a `quantization`.
        quantization: gray levels; None for data that are not quantized, dequantized pictures among them.
        t_min: smallest time, that of the decoder; None is the SDE's.
        T: largest time, that of the prior; None is the SDE's.
        decoder: one of `DECODERS`.
        decoder_std: see `Decoder`.
        label: class labels (B,) or None.
        seed: the draws of sample k are a function of (seed, k) alone.
        indices: the number k of each sample, (B,); None counts from 0.
        points: strata.
        draws: independent repetitions of all noise.
        callback: told of the progress.

    Raises:
        UserError: an argument that is not one of these.
    """
    sde = denoiser.sde
    low, high = _ends(sde, t_min, T)
    end = Decoder(decoder, decoder_std, quantization)
    run = _Run(denoiser, x0, label, seed, indices, _check_count("points", points))
    weight = run.zeros(points)[0] + log_snr_range(sde, low, high) / points

    def plan() -> _Plan:
        return _Plan(quantile(sde, run.strata(), low, high), weight)

    edges = quantile(sde, torch.arange(1, points + 1, dtype=torch.float64) / points, low, high)
    edges[-1] = high  # not a rounding below
    with evaluating(denoiser):
        return run.estimate(plan, end, low, edges, draws, callback)


class _Plan(NamedTuple):
    """Times (B, n) of one repetition, weights (n,) on the integrand there, and the number (B, n) of the term that each
    belongs to, or None when every term has one."""

    t: Tensor
    weight: Tensor
    term: Tensor | None = None


class _Run:
    """One batch, its noise, and a count of the denoiser's evaluations."""

    def __init__(
        self,
        denoiser: AbstractDenoiser,
        x0: Tensor,
        label: Tensor | None,
        seed: int,
        indices: Sequence[int] | None,
        strata: int,
    ) -> None:
        numbers = range(len(x0)) if indices is None else indices
        if len(numbers) != len(x0):
            raise UserError(f"indices has {len(numbers)} numbers for {len(x0)} samples: give one for each")
        self.denoiser, self.x0, self.label = denoiser, x0, label
        self.nfe = 0
        # seeds of their own: two sources of one seed would draw the same numbers
        noise, places = (step_seed(seed, 0, purpose) >> 1 for purpose in ("bound noise", "bound times"))
        self._noise = SampleNoise(noise, numbers, x0.shape[1:], dtype=x0.dtype, device=x0.device)
        self._places = SampleNoise(places, numbers, (strata,), dtype=torch.float64, device=x0.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(len(self.x0), *shape, dtype=torch.float64, device=self.x0.device)

    def strata(self) -> Tensor:
        """Uniform numbers (B, strata), one in each of as many equal parts of (0, 1)."""
        uniform = torch.special.ndtr(self._places())
        n = uniform.shape[1]
        return (torch.arange(n, device=uniform.device) + uniform) / n

    def estimate(
        self,
        plan: Callable[[], _Plan],
        decoder: Decoder,
        t_min: float,
        times: Tensor,
        draws: int,
        callback: Callback | None,
    ) -> Bound:
        """The bound whose terms end at `times` (N,): the mean of `draws` repetitions, each at times of a new plan."""
        _check_count("draws", draws)
        terms, decoded, totals = self.zeros(len(times)), self.zeros(), []
        labels = times.tolist()
        for r in range(draws):
            last = self._decode(decoder, t_min)
            t, weight, term = plan()
            n, each = t.shape[1], []
            for j in range(n):
                each.append(weight[j] * self._integrand(t[:, j]))
                if callback is not None:
                    callback((r + (j + 1) / n) / draws, labels[j] if n == len(labels) else labels[-1], None)
            once = torch.stack(each, 1)
            if term is not None:
                once = self.zeros(len(times)).scatter_add(1, term, once)
            terms, decoded = terms + once / draws, decoded + last / draws
            totals.append((once.sum(1) + last).detach())
        prior = prior_term(self.denoiser.sde, self.x0, labels[-1])
        error = None if draws == 1 else torch.stack(totals).std(0) / math.sqrt(draws)
        return Bound(prior, terms, times, decoded, self.nfe, error)

    def _integrand(self, t: Tensor) -> Tensor:
        """`integrand` (B,) at times (B,) and fresh noise."""
        self.nfe += 1
        return integrand(self.denoiser, self.x0, self._noise(), t, self.label)

    def _decode(self, decoder: Decoder, t: float) -> Tensor:
        """The decoder's term (B,) at fresh noise."""
        self.nfe += decoder.evaluates
        times = torch.full((len(self.x0),), t, dtype=torch.float64, device=self.x0.device)
        return decoder.term(self.denoiser, self.x0, self._noise(), times, self.label)


def _chain_weights(sde: SDE, grid: Tensor, variance: str, share: float | Sequence[float]) -> tuple[Tensor, Tensor]:
    """(gain, constant) (N,): a term of the chain is gain ||e||^2 + D constant."""
    check_choice("variance", variance, VARIANCES)
    step = -sde.log_snr(grid).diff()
    kappa = 2 * torch.log(sde.sigma(grid)).diff()
    if variance != "forward":
        shares = torch.tensor(0.0 if variance == "posterior" else share, dtype=torch.float64)
        if shares.ndim > 1 or (shares.ndim == 1 and len(shares) != len(step)):
            raise UserError(
                f"share has shape {tuple(shares.shape)}: give one number, or one for each of {len(step)} steps"
            )
        if not torch.isfinite(shares).all():
            raise UserError(f"share={share!r} must be finite")
        kappa = shares * kappa
    return 0.5 * torch.exp(-kappa) * torch.expm1(step), 0.5 * (torch.expm1(-kappa) + kappa)


def _increasing(sde: SDE, times: Sequence[float]) -> Tensor:
    """The times of a chain from the smallest up, float64, checked."""
    values = [float(t) for t in times]
    values = values[::-1] if values and values[0] > values[-1] else values
    if len(values) < 2 or not all(s < t for s, t in pairwise(values)):  # false for NaN too
        raise UserError("the times of a chain must be at least two, all increasing or all decreasing")
    _ends(sde, values[0], values[-1])
    return torch.tensor(values, dtype=torch.float64)


def _ends(sde: SDE, t_min: float | None, T: float | None) -> tuple[float, float]:
    """The smallest and the largest time, the SDE's own where they are None, checked."""
    low, high = sde.t_min if t_min is None else t_min, sde.T if T is None else T
    check_number("the largest time", high, above=0, at_most=sde.T)
    check_number("the smallest time", low, at_least=0, below=high)
    if not float(sde.sigma(low)) > 0:
        raise UserError(f"there is no noise at the smallest time {low:g}, which no decoder can undo: end above it")
    return low, high


def _check_count(name: str, value: int) -> int:
    """`value`, if it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={value!r} must be a whole number of at least 1")
    return value
