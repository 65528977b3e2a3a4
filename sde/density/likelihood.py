"""How likely a model finds the stored examples of a data set: one way to compute it, asked batch by batch, and the
numbers that are told of it.

What the way is made of, and what its number bounds, is in `sde.density.discrete`; here parts that were not chosen get
those that suit the data, and everything is checked to go together before anything is computed.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sde.denoiser import AbstractDenoiser
from sde.density.discrete import (
    ChainBound,
    DiscreteLogProb,
    Discretization,
    Flow,
    Method,
    decoding_time,
    discrete_log_prob,
    from_time,
)
from sde.density.divergence import Divergence, Exact, Hutchinson
from sde.density.flow import SMALL, Progress, times_to_noise
from sde.density.quantization import bits_per_dim
from sde.errors import UserError
from sde.grids import GRIDS
from sde.solvers import SOLVERS, Solver

if TYPE_CHECKING:  # the sources of data need libraries that densities do not
    from sde.data.base import DataInfo


@dataclass(frozen=True, eq=False)
class Likelihood:
    """A model and a way to have log P of stored examples; `Likelihood.of` makes it.

    Args:
        denoiser: the model, from the time on whose density is meant.
        info: the facts about the data.
        discretization: from densities to gray levels.
        method: how log p is had.
    """

    denoiser: AbstractDenoiser
    info: DataInfo
    discretization: Discretization
    method: Method

    @classmethod
    def of(
        cls,
        denoiser: AbstractDenoiser,
        info: DataInfo,
        discretization: Discretization,
        method: Method | None = None,
        t_min: float | None = None,
    ) -> Likelihood:
        """The way with everything chosen that was left open.

        Args:
            denoiser: the model.
            info: the facts about the data.
            discretization: from densities to gray levels.
            method: None for `Flow()`. A flow without a solver gets `adams_adaptive`; without a divergence the exact one
                up to 64 dimensions, and one Rademacher probe above.
            t_min: the time whose density is meant; None for the SDE's own, but where a decoder takes over
                (`decoding_time`).

        Raises:
            UserError: options that do not go together, with the model or with its data.
        """
        method = Flow() if method is None else method
        check_kind(discretization.kind, info.kind)
        discretization.check(method)
        levels = discretization.quantization if discretization.kind == "decoder" else None
        if t_min is None and levels is not None:
            t_min = decoding_time(denoiser.sde, levels)
        later = from_time(denoiser, t_min)
        if isinstance(method, Flow):
            solver = SOLVERS.get("adams_adaptive")() if method.solver is None else method.solver
            divergence = settled(method.divergence, math.prod(info.shape))
            method = replace(method, solver=solver, divergence=divergence, truncation=discretization.kind == "none")
            check_way(solver, later, method)
        elif isinstance(method, ChainBound):
            method.times(later.sde)
        return cls(later, info, discretization, method)

    @property
    def name(self) -> str:
        """The method and the way to gray levels, in short: "ode-decoder"."""
        return f"{self.method.name}-{self.discretization.kind}"

    @property
    def numel(self) -> int:
        """Dimensions of an example."""
        return math.prod(self.info.shape)

    def __call__(
        self,
        stored: Tensor,
        *,
        label: Tensor | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> DiscreteLogProb:
        """log P of a batch.

        Args:
            stored: uint8 pictures (B, C, H, W) or vectors (B, ...), on the device of the model.
            label: class labels (B,) or None.
            seed: all draws of example k are a function of (seed, k) alone.
            indices: the number k of each example, (B,); None counts from 0.
            progress: told of the share that is done.
        """
        x = self.info.encode(stored, torch.float64)
        with full_float32():
            return discrete_log_prob(
                self.denoiser,
                x,
                self.discretization,
                self.method,
                label=label,
                seed=seed,
                indices=indices,
                progress=progress,
            )

    def bits(self, log_prob: Tensor) -> Tensor:
        """Bits per dimension of a log-probability in nats, any shape."""
        return bits_per_dim(log_prob, self.numel) + 0.0  # no -0.0

    def summary(self, scores: Scores) -> dict[str, Any]:
        """What is told of the examples that were scored: means, standard errors, parts, and how much work it was."""
        log_prob, per_bit, n = scores.column("log_prob"), self.numel * math.log(2), len(scores)
        bits = self.bits(log_prob)
        mean, error = mean_and_error(bits)
        nats, nats_error = mean_and_error(log_prob)
        ordered = sorted(bits.tolist())
        moved = scores.found[0].truncation
        return {
            "bits_per_dim": mean,
            "standard_error": error,
            "standard_error_of": "the mean over examples, from their spread, which holds that of draws and probes too; "
            "the error of a solver's steps is not in it",
            "standard_error_of_draws": mean_of_independent(scores.column("standard_error") / per_bit),
            "standard_error_of_trace": mean_of_independent(scores.column("trace_error") / per_bit),
            "meaning": self.discretization.meaning(self.method),
            "log_prob": nats,
            "log_prob_standard_error": nats_error,
            "median": statistics.median(ordered),
            "least": ordered[0],
            "most": ordered[-1],
            "parts": {name: float(self.bits(part).mean()) for name, part in scores.parts.items()},
            "truncation": None if moved is None else float(self.bits(scores.column("truncation")).mean()),
            "n": n,
            "dimensions": self.numel,
            "nfe": sum(scores.nfe) / n,
        }

    def describe(self) -> dict[str, Any]:
        """How it is computed: method, dequantization, times and options."""
        ways, sde, method = self.discretization, self.denoiser.sde, self.method
        levels = ways.quantization
        about: dict[str, Any] = {
            "method": method.name,
            "dequantization": ways.kind,
            "draws": ways.draws,
            "importance": ways.importance,
            "decoder": None if ways.decoder_kind is None else {"kind": ways.decoder, "std": ways.decoder_std},
            "quantization": None if levels is None else {**asdict(levels), "width": levels.width},
            "t_min": sde.t_min,
            "noise_level_at_t_min": float(sde.noise_level(sde.t_min)),
            "T": sde.T,
        }
        if isinstance(method, Flow):
            assert method.solver is not None
            assert method.divergence is not None
            solver, divergence = method.solver, method.divergence
            times = times_to_noise(solver, sde, method.grid, method.steps)
            return about | {
                "solver": SOLVERS.name_of(type(solver)),
                "solver_options": plain_options(solver),
                "grid": GRIDS.name_of(type(method.grid)) if method.grid is not None else solver.grid_name,
                "steps": None if solver.default_steps is None else len(times) - 1,
                "divergence": type(divergence).__name__.lower(),
                "divergence_options": plain_options(divergence),
            }
        if isinstance(method, ChainBound):
            chain = {key: getattr(method, key) for key in ("variance", "share", "subset")}
            grid = GRIDS.name_of(type(method.grid)) if method.grid is not None else "logsnr"
            return about | {"bound": {"grid": grid, "steps": len(method.times(sde)) - 1, **chain}}
        return about | {"bound": plain_options(method)}


def full_float32() -> contextlib.AbstractContextManager[None]:
    """A context in which convolutions on a GPU keep all digits of float32: TF32, their default, has three decimal."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, allow_tf32=False)


# What goes together


def suitable_dequantization(kind: str, dequantized: bool) -> str:
    """The way from densities to levels that suits the kind of data, and whether the model's were dequantized."""
    return "none" if kind == "vectors" else "uniform" if dequantized else "decoder"


def check_kind(dequantization: str, kind: str) -> None:
    """Raise `UserError` unless a way to gray levels suits data of this kind."""
    if kind == "pixels" and dequantization == "none":
        raise UserError(
            "dequantization=none gives a density and pixels have probabilities: take uniform, variational or decoder"
        )
    if kind == "vectors" and dequantization != "none":
        raise UserError(f"dequantization={dequantization} is for pixels and this run has vectors: take none or auto")


def check_way(solver: Solver, denoiser: AbstractDenoiser, method: Flow) -> None:
    """Raise `UserError` unless `solver` goes from data to noise on its grid."""
    if not solver.both_ways or solver.stochastic or solver.final != "none":
        able = [name for name, cls in SOLVERS.items() if cls.both_ways]
        raise UserError(
            f"solver={SOLVERS.name_of(type(solver))} cannot go from data to noise with these options: take one of "
            f"{', '.join(able)}, without noise and with solver.final=none"
        )
    times_to_noise(solver, denoiser.sde, method.grid, method.steps)


def check_arithmetic(precision: str, compiled: Any) -> None:
    """Raise `UserError` for a precision or a compilation that a likelihood cannot have."""
    if precision != "fp32":
        raise UserError(
            f"precision={precision} is too coarse for a likelihood, which it moves by up to 0.1 bits/dim: take fp32"
        )
    if compiled == "graphs":
        raise UserError("compile=graphs replays one forward pass and a density needs its derivative: take auto")


def settled(divergence: Divergence | None, numel: int) -> Divergence:
    """The divergence that was asked for, or the one that suits data of `numel` dimensions."""
    chosen = divergence if divergence is not None else Exact() if numel <= SMALL else Hutchinson()
    chosen.check(numel)
    return chosen


# What was found


@dataclass(eq=False)
class Scores:
    """What was found of n examples, batch by batch.

    Attributes:
        index: which of the split each is, in the order in which they were taken.
        nfe: forward passes of the batch that each was in.
        found: the batches.
    """

    index: list[int] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    found: list[DiscreteLogProb] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.index)

    def add(self, index: Sequence[int], found: DiscreteLogProb) -> None:
        """Take one batch in."""
        self.index += [int(k) for k in index]
        self.nfe += [found.nfe] * len(index)
        self.found.append(found)

    def column(self, name: str) -> Tensor:
        """The attribute `name` of `DiscreteLogProb` for all examples, (n, ...) on the CPU."""
        return torch.cat([getattr(batch, name).cpu() for batch in self.found])

    @property
    def parts(self) -> dict[str, Tensor]:
        """name: (n,)."""
        return {name: torch.cat([batch.parts[name].cpu() for batch in self.found]) for name in self.found[0].parts}


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean of `values` (n,) and its standard error, None for one."""
    n = len(values)
    return float(values.mean()), None if n < 2 else float(values.std()) / math.sqrt(n)


def mean_of_independent(errors: Tensor) -> float | None:
    """The standard error of a mean of numbers with independent `errors` (n,); None when one is not known."""
    value = float(errors.square().sum().sqrt()) / len(errors)
    return value if math.isfinite(value) else None


def plain_options(of: Any) -> dict[str, Any]:
    """The options of a dataclass, infinities as JSON has none."""
    values = {item.name: getattr(of, item.name) for item in fields(of)}
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def without_nan(value: Any) -> Any:
    """`value` with null for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
