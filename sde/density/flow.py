r"""log p(x) and the latent code of x, by the probability-flow ODE (arXiv 2011.13456, section 4.3 and appendix D.2).

With u = sigma / alpha and y = x / alpha the flow is dy/du = eps(alpha y, t), and the density of y along it changes by

    d log p / du = - alpha tr(J),    J = d eps / d x

(the instantaneous change of variables, arXiv 1806.07366). So the log-density is one more dimension of the same ODE,
and every solver of the flow integrates it at its own order, from t_min, where data are, to T, where p is the prior:

    log p_{t_min}(x) = log prior(x_T) + D log(alpha_T / alpha_{t_min}) + integral of alpha tr(J) du.

Of the integrand, the part that Gaussian data of standard deviation s = sigma_data would have, D u / (u^2 + s^2), is
integrated in closed form. The integral l of the rest, which vanishes for such data and at large noise, is the added
dimension of the state: a = kappa alpha r l with r = sqrt(1 + (u / s)^2), which obeys d(a / alpha)/du = eps_a,

    eps_a = u / (u^2 + s^2) a / alpha + kappa alpha r tr(J - u / (alpha (u^2 + s^2)) I).

So the longer state has an eps, and with it a denoised, a score and a v, like any other, and solvers need not know. The
factor r makes a as large as the noise in x, so that what solves the flow of Gaussian data exactly integrates the second
term alone; kappa = 4 / sqrt(D K) for K estimates of the trace makes an error of e nats per dimension weigh as much in a
root-mean-square norm as an error of 4 e in every entry of x: it is the density that is asked for.

The density is that of the model at t_min: data with the SDE's smallest noise, not those at t = 0. `LogProb.truncation`
says how far the two are apart where the density is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sde.broadcast import Time, as_tensor, expand
from sde.denoiser import AbstractDenoiser, Evaluation, evaluating
from sde.density.divergence import Divergence, Exact, Hutchinson
from sde.errors import UserError
from sde.grids import GRIDS, Grid
from sde.processes import SDE
from sde.reverse import ReverseProcess
from sde.solvers import SOLVERS, Solver

SMALL = 64
"""Dimensions up to which the exact trace is the default."""
Progress = Callable[[float], None]
"""Called with the share of the way that is done."""


@dataclass(frozen=True)
class LogProb:
    """Log-densities of a batch of B examples of D dimensions.

    Attributes:
        log_prob: log p_{t_min}(x) in nats, (B,) float64: the mean of `estimates`.
        estimates: (B, K), one for each probe; K = 1 for the exact trace.
        standard_error: of `log_prob` in nats, (B,): of the trace alone, from the spread of the estimates, and as rough
            as a spread of K numbers is. 0 for the exact trace, NaN for a single probe or probes that are all alike.
        latent: x_T (B, ...) float64, the point of the prior that the flow leads to.
        prior: log prior(x_T) in nats, (B,).
        truncation: log p_0(x) - log p_{t_min}(x) in nats, (B,), to first order in the noise level at t_min; p_0 is the
            density without any noise. An estimate for smooth densities (data on a surface have no p_0), made when it
            is asked for.
        nfe: forward passes of the network on the batch, all of them.
    """

    log_prob: Tensor
    estimates: Tensor
    standard_error: Tensor
    latent: Tensor
    prior: Tensor
    truncation: Tensor | None
    nfe: int


def log_prob(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    solver: Solver | None = None,
    divergence: Divergence | None = None,
    grid: Grid | None = None,
    steps: int | None = None,
    label: Tensor | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    probes: Tensor | None = None,
    sigma_data: float = 0.5,
    truncation: bool = False,
    progress: Progress | None = None,
) -> LogProb:
    """The log-density of the model at `x`, by the probability-flow ODE.

    Args:
        denoiser: the model, on the device of `x`; it is asked in evaluation mode.
        x: examples (B, ...) as the network sees them, of any floating type. The state is float64; the network computes
            in its own type.
        solver: any solver of the flow (`Solver.both_ways`) without noise; None for `adams_adaptive` at its defaults.
        divergence: how the trace is found; None for the exact one up to 64 dimensions and one Rademacher probe above.
        grid: where a solver with a fixed number of steps stops; None for the solver's own.
        steps: how many steps; None for the solver's own number.
        label: class labels (B,) or None.
        seed: of the probes.
        indices: the number of each example (B,), on which its probes depend; None for 0 to B - 1.
        probes: (B, `divergence.vectors`, ...) to take in place of drawn ones.
        sigma_data: standard deviation of the Gaussian whose log-density is integrated in closed form. It changes the
            work, not the answer.
        truncation: estimate the effect of stopping at t_min too, for one evaluation more.
        progress: told of the progress.

    Raises:
        UserError: for a solver that cannot go from data to noise, a grid that means nothing to it, options of the
            divergence that do not suit the data, or examples that are not finite.
    """
    solver = SOLVERS.get("adams_adaptive")() if solver is None else solver
    check_examples(x, label, indices)
    d = math.prod(x.shape[1:])
    if divergence is None:
        divergence = Exact() if d <= SMALL else Hutchinson()
    divergence.check(d)
    x = x.double()
    if probes is None:
        probes = divergence.draw(seed, range(len(x)) if indices is None else indices, x)
    elif probes.shape != (len(x), divergence.vectors, *x.shape[1:]):
        raise UserError(
            f"probes of shape {tuple(probes.shape)} do not fit examples of shape {tuple(x.shape)}: give "
            f"{divergence.vectors} for each, with shape {(len(x), divergence.vectors, *x.shape[1:])}"
        )
    sde, times = denoiser.sde, times_to_noise(solver, denoiser.sde, grid, steps)
    field = DensityDenoiser(denoiser, divergence, probes, tuple(x.shape[1:]), sigma_data)
    process = ReverseProcess(field, label)
    with evaluating(denoiser):
        first = process.eps(field.join(x), times[0]) if truncation else None
        solution = solver.solve(process, field.join(x), times, callback=_telling(progress, solver, times))
    latent, added = field.split(solution.x)
    change = added / field.scale(times[-1])
    u = sde.noise_level(torch.tensor([times[0], times[-1]], dtype=torch.float64))
    gaussian = 0.5 * d * float(torch.log((u[1] ** 2 + sigma_data**2) / (u[0] ** 2 + sigma_data**2)))
    prior = sde.prior_log_prob(latent)
    scaling = d * float(sde.log_alpha(times[-1]) - sde.log_alpha(times[0]))
    estimates = prior[:, None] + change + gaussian + scaling
    return LogProb(
        log_prob=estimates.mean(1),
        estimates=estimates,
        standard_error=_standard_error(estimates, divergence),
        latent=latent,
        prior=prior,
        truncation=None if first is None else _truncation(field, x, first, times[0]),
        nfe=process.nfe * divergence.passes(d),
    )


def encode(
    denoiser: AbstractDenoiser,
    x: Tensor,
    *,
    solver: Solver | None = None,
    grid: Grid | None = None,
    steps: int | None = None,
    label: Tensor | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, int]:
    """The latent code x_T of `x`: where the probability-flow ODE leads from t_min to T, without the density.

    Args:
        denoiser, x, solver, grid, steps, label, progress: as for `log_prob`.

    Returns:
        x_T (B, ...) float64, under the model a draw of N(0, prior_std^2 I), and the evaluations it took.
    """
    solver = SOLVERS.get("adams_adaptive")() if solver is None else solver
    times = times_to_noise(solver, denoiser.sde, grid, steps)
    return _carry(denoiser, x, solver, times, label, progress)


def decode(
    denoiser: AbstractDenoiser,
    z: Tensor,
    *,
    solver: Solver | None = None,
    grid: Grid | None = None,
    steps: int | None = None,
    label: Tensor | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, int]:
    """Data of latent codes `z` (B, ...) at T: the inverse of `encode`, with the same arguments.

    Returns:
        x (B, ...) float64 at t_min, and the evaluations it took.
    """
    solver = SOLVERS.get("adams_adaptive")() if solver is None else solver
    times = times_to_noise(solver, denoiser.sde, grid, steps)[::-1]
    return _carry(denoiser, z, solver, times, label, progress)


def _carry(
    denoiser: AbstractDenoiser,
    x: Tensor,
    solver: Solver,
    times: Sequence[float],
    label: Tensor | None,
    progress: Progress | None,
) -> tuple[Tensor, int]:
    process = ReverseProcess(_InDouble(denoiser), label)
    check_examples(x, label)
    with evaluating(denoiser):
        solution = solver.solve(process, x.double(), times, callback=_telling(progress, solver, times))
    return solution.x, solution.nfe


def check_examples(x: Tensor, label: Tensor | None, indices: Sequence[int] | None = None) -> None:
    """Raise `UserError` unless `x` is a batch of finite examples, and labels and numbers are one for each."""
    if x.ndim < 2 or not x.is_floating_point():
        raise UserError(
            f"examples of shape {tuple(x.shape)} and type {x.dtype} are no batch: give (B, ...) of a floating type"
        )
    for name, given in (("label", label), ("indices", indices)):
        shape = None if given is None else tuple(given.shape) if isinstance(given, Tensor) else (len(given),)
        if shape is not None and shape != (len(x),):
            raise UserError(f"{name} of shape {shape} does not fit {len(x)} examples: give one for each")
    finite = torch.isfinite(x).flatten(1).all(1)
    if not bool(finite.all()):
        first = int((~finite).int().argmax())
        raise UserError(f"{int((~finite).sum())} of {len(x)} examples are not finite, number {first} the first of them")


def times_to_noise(solver: Solver, sde: SDE, grid: Grid | None = None, steps: int | None = None) -> list[float]:
    """Increasing times from `sde.t_min` to T for `solver`; the two ends for one that chooses its own steps.

    Raises:
        UserError: when the solver cannot go that way, or has no use for `grid` or `steps`.
    """
    ends = [sde.t_min, sde.T]
    if solver.default_steps is None:
        if steps is not None or grid is not None:
            raise UserError(
                f"{'steps' if steps is not None else 'grid'} means nothing to {type(solver).__name__}, which chooses "
                f"its own steps: set solver.rtol and solver.atol"
            )
        return solver.check_times(sde, ends)
    chosen = GRIDS.get(solver.grid_name)() if grid is None else grid
    whole = replace(sde, t_min_sampling=sde.t_min)  # type: ignore[type-var]  # grids end where samplers stop
    times = chosen.place(whole, steps, solver.default_steps)
    if not math.isclose(times[-1], sde.t_min, rel_tol=1e-6) or not math.isclose(times[0], sde.T, rel_tol=1e-6):
        raise UserError(
            f"the grid leads from t={times[0]:g} to t={times[-1]:g}: a density needs all the way from T={sde.T:g} to "
            f"t_min={sde.t_min:g}"
        )
    return solver.check_times(sde, times[::-1])


class DensityDenoiser(AbstractDenoiser):
    """A denoiser of states (B, D + K): x, flat, and beside it K estimates of the log-density's change.

    Args:
        denoiser: of x alone.
        divergence: gives eps and its divergence.
        probes: (B, vectors, ...), or None.
        shape: of one x.
        sigma_data: of the Gaussian that is left out.
    """

    def __init__(
        self,
        denoiser: AbstractDenoiser,
        divergence: Divergence,
        probes: Tensor | None,
        shape: tuple[int, ...],
        sigma_data: float,
    ) -> None:
        super().__init__()
        self.sde = denoiser.sde
        self.inner, self.divergence, self.shape, self.sigma_data = denoiser, divergence, shape, sigma_data
        self.dtype = dtype_of(denoiser)
        self.drawn = None if probes is None else probes.to(self.dtype)
        self.numel = math.prod(shape)
        self.kappa = 4 * (self.numel * divergence.estimates) ** -0.5

    def select(self, indices: Tensor) -> DensityDenoiser:
        probes = None if self.drawn is None else self.drawn[indices]
        return DensityDenoiser(self.inner, self.divergence, probes, self.shape, self.sigma_data)

    def join(self, x: Tensor) -> Tensor:
        """The state at the start: x (B, ...) and no change yet."""
        return torch.cat([x.flatten(1), x.new_zeros(len(x), self.divergence.estimates)], 1)

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, ...) and the added entries (B, K) of a state."""
        return state[:, : self.numel].reshape(-1, *self.shape), state[:, self.numel :]

    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        eps = self._eps(lambda part: self.inner.output("eps", part, t, label), x, as_tensor(t))
        return _from_eps(name, x, eps, self.sde, as_tensor(t))

    def evaluations(
        self, name: str, times: Sequence[float], like: Tensor, label: Tensor | None = None
    ) -> list[Evaluation]:
        """As in the base class, with the coefficients of the inner denoiser settled."""
        part = self.split(like)[0].to(self.dtype)
        inner = self.inner.evaluations("eps", times, part, label)

        def at(t: float, field: Evaluation) -> Evaluation:
            time = as_tensor(t)
            return lambda state: _from_eps(name, state, self._eps(field, state, time), self.sde, time)

        return [at(float(t), field) for t, field in zip(times, inner, strict=True)]

    def _eps(self, field: Evaluation, state: Tensor, t: Tensor) -> Tensor:
        """eps of the whole state, (B, D + K)."""
        alpha, u = self.sde.alpha(t.double()), self.sde.noise_level(t.double())
        shift = u / (alpha * (u**2 + self.sigma_data**2))
        x = self.split(state)[0].to(self.dtype)
        shifts = shift.to(x.device, x.dtype).expand(len(x))
        eps, traces = self.divergence(field, x, self.drawn, shifts)
        added = self.split(state)[1]
        factor, grown = (expand(c.to(state.device), added) for c in (self._scale(alpha, u), shift))
        return torch.cat([eps.flatten(1).to(state.dtype), grown * added + factor * traces], 1)

    def scale(self, t: float) -> float:
        """a / l at time `t`."""
        return float(self._scale(self.sde.alpha(t), self.sde.noise_level(t)))

    def _scale(self, alpha: Tensor, u: Tensor) -> Tensor:
        return self.kappa * alpha * torch.sqrt(1 + (u / self.sigma_data) ** 2)


def _from_eps(name: str, x: Tensor, eps: Tensor, sde: SDE, t: Tensor) -> Tensor:
    """The output `name` of a denoiser that says `eps` at `x`."""
    if name == "eps":
        return eps
    alpha, sigma = (expand(c.to(x.device, x.dtype), x) for c in (sde.alpha(t), sde.sigma(t)))
    if name == "score":
        return -eps / sigma
    denoised = (x - sigma * eps) / alpha
    return denoised if name == "denoised" else alpha * eps - sigma * denoised


class _InDouble(AbstractDenoiser):
    """A denoiser of float64 states that asks another one in its own type."""

    def __init__(self, denoiser: AbstractDenoiser) -> None:
        super().__init__()
        self.inner, self.sde, self.dtype = denoiser, denoiser.sde, dtype_of(denoiser)

    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        return self.inner.output(name, x.to(self.dtype), t, label).to(x.dtype)

    def evaluations(
        self, name: str, times: Sequence[float], like: Tensor, label: Tensor | None = None
    ) -> list[Evaluation]:
        inner = self.inner.evaluations(name, times, like.to(self.dtype), label)

        def cast(field: Evaluation) -> Evaluation:
            return lambda x: field(x.to(self.dtype)).to(x.dtype)

        return [cast(field) for field in inner]


def dtype_of(denoiser: AbstractDenoiser) -> torch.dtype:
    """The type of the states that a denoiser takes: the longest of its weights, float64 for one without.

    Some of them may be cast to bfloat16, which is for the insides of a network alone (`sde.devices.cast_weights`).
    """
    weights = [w.dtype for w in (*denoiser.parameters(), *denoiser.buffers()) if w.is_floating_point()]
    return max(weights, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float64)


def _standard_error(estimates: Tensor, divergence: Divergence) -> Tensor:
    if divergence.vectors == 0:
        return torch.zeros_like(estimates[:, 0])
    k = estimates.shape[1]
    if k == 1:
        return torch.full_like(estimates[:, 0], math.nan)
    error = estimates.std(1) / math.sqrt(k)
    # probes that agree up to a sign, half of all pairs in the plane, say nothing about each other
    alike = error <= 1e-12 * estimates.abs().amax(1)
    return torch.where(alike, math.nan, error)


def _truncation(field: DensityDenoiser, x: Tensor, joint: Tensor, t: float) -> Tensor:
    """log p_0(x) - log p_t(x) from eps and its divergence at x and t.

    The density of y = x / alpha spreads by the heat equation in u^2 / 2: with score q = -eps / u of y at x,

        log p_0 - log p_t = D log alpha - (1 / alpha - 1) x'q - u^2 / 2 (div q + |q|^2) + O(u^4).
    """
    sde, d = field.sde, field.numel
    eps, rest = field.split(joint)
    alpha, u = float(sde.alpha(t)), float(sde.noise_level(t))
    trace = rest.mean(1) / field.scale(t) + d * u / (alpha * (u**2 + field.sigma_data**2))
    eps, x = eps.flatten(1), x.flatten(1)
    moved = math.expm1(-math.log(alpha)) / u * (x * eps).sum(1)
    return d * math.log(alpha) + moved + 0.5 * (u * alpha * trace - eps.square().sum(1))


def _telling(
    progress: Progress | None, solver: Solver, times: Sequence[float]
) -> Callable[[float, float, Tensor | None], None] | None:
    if progress is None:
        return None
    if solver.default_steps is not None:
        return lambda share, t, x: progress(share)
    # between two ends a solver with steps of its own can tell its time alone
    return lambda share, t, x: progress(max(share, (t - times[0]) / (times[-1] - times[0])))
