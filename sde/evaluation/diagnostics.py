r"""What can be measured of a model without drawing a sample, noise level by noise level.

    denoising_error  E |eps(x_t, t) - z|^2 / D on training and on held-out examples: where it overfits
    score_error      E |eps - eps*|^2 / D against a score that is known exactly: of a Gaussian mixture, or of the
                     training examples themselves (`EmpiricalDenoiser`), whose score is that of a model that copies
    curl             E |J - J'|_F^2 / E |J|_F^2 with J = d score / dx: 0 for the gradient of any density
    fokker_planck    E |R|^2 / E |d_t s|^2, R the residual of the equation that the scores of all noise levels obey
                     together (arXiv 2210.04296): with s = score, and f and g those of dx = f x dt + g dw,

                     R = d_t s - grad [ g^2 / 2 (div s + |s|^2) - f x's - f D ].

All at x_t = alpha x_0 + sigma z, of given examples x_0 and noise that depends on (seed, number of the example) alone:
the numbers are the same whatever the batch size and the number of processes. All levels share the noise of an example,
as do training example k and held-out example k: curves are smooth, and differences better known than their terms.

What is needed of J are products with vectors v from either side. Their sum over all unit vectors is exact; above 64
dimensions random v with E v v' = I take their place, E |(J - J')v|^2 = |J - J'|_F^2 and E grad v'Jv = grad div s
(Hutchinson 1990). (J - J')v costs what v'Jw - w'Jv does and varies less. With random v the square of an estimated R
would be too large by its variance; the products of estimates from different v are not.

Errors are standard errors over examples, of a quotient to first order: how far other examples and noise would move it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from sde import losses
from sde.broadcast import expand
from sde.data.base import check_whole
from sde.denoiser import AbstractDenoiser, evaluating
from sde.density.divergence import draw_probes
from sde.density.flow import SMALL, check_examples
from sde.distributed import is_sharded, share_of, total
from sde.errors import UserError, check_number
from sde.pictures import Line, save_lines
from sde.processes import SDE
from sde.randomness import SampleNoise, step_seed

Levels = int | Sequence[float]
"""How many noise levels, equally spaced in log signal-to-noise ratio as in validation; or their log SNRs."""
Progress = Callable[[float], None]
"""Called with the share of the work that is done."""


@dataclass(frozen=True)
class Curve:
    """A number at each noise level.

    Attributes:
        values: the numbers.
        errors: their standard errors.
        signed: whether the number may be on either side of 0.
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]
    signed: bool = False


@dataclass(frozen=True)
class Diagnostic:
    """Curves over noise levels.

    Attributes:
        name: of what was measured, "denoising_error" for instance.
        log_snr: of each level, increasing.
        times: t of each level.
        noise_level: sigma / alpha of each level.
        curves: by name.
        settings: what the numbers depend on besides the model, plain values.
    """

    name: str
    log_snr: tuple[float, ...]
    times: tuple[float, ...]
    noise_level: tuple[float, ...]
    curves: Mapping[str, Curve]
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; numbers that are not finite are None."""
        curves = {
            name: {"values": _plain(curve.values), "errors": _plain(curve.errors)}
            for name, curve in self.curves.items()
        }
        levels = {key: list(getattr(self, key)) for key in ("log_snr", "times", "noise_level")}
        return {"name": self.name, **levels, "curves": curves, "settings": dict(self.settings)}


def denoising_error(
    denoiser: AbstractDenoiser,
    train: Tensor,
    test: Tensor,
    *,
    train_labels: Tensor | None = None,
    test_labels: Tensor | None = None,
    levels: Levels = 10,
    loss: losses.DenoisingScoreMatching | None = None,
    repeats: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Diagnostic:
    """Mean square error of eps on examples that were trained on and on others, with the same noise.

    Args:
        denoiser: the model; asked in evaluation mode.
        train: training examples (N, ...) as the network sees them, on its device.
        test: held-out examples (M, ...).
        train_labels: class labels (N,) int64 or None.
        test_labels: class labels (M,) int64 or None.
        levels: noise levels.
        loss: the objective, for its weighted loss too.
        repeats: draws of noise for each example.
        seed: of the noise.
        batch_size: examples at a time; no number depends on it.
        progress: told of the progress.

    Returns:
        Curves "train", "test" and "gap", the second less the first: positive where the model knows the training
        examples better. The error of the gap is that of pairs for the examples that have a partner of the same noise.
        "train_loss", "test_loss" and "gap_loss" are the same with the weight of `loss`, where it is given.

    Raises:
        UserError: for examples, labels or options that do not fit.
    """
    at = _Levels.of(denoiser.sde, levels)
    objective = losses.DenoisingScoreMatching() if loss is None else loss
    suffixes = ("",) if loss is None else ("", "_loss")

    def measure(batch: _Batch) -> Sequence[Tensor]:
        with torch.no_grad():
            weighted, error = objective.at(denoiser, batch.x0, batch.z, batch.t, batch.label)
        return error, weighted

    sets = [(train, train_labels), (test, test_labels)]
    share, found = len(train) / max(1, len(train) + len(test)), []
    for k, (examples, labels) in enumerate(sets):
        told = _part(progress, k * share, share if k == 0 else 1 - share)
        found.append(_measure(measure, denoiser, examples, labels, at, repeats, seed, batch_size, told))
    curves: dict[str, Curve] = {}
    for k, suffix in enumerate(suffixes):
        on_train, on_test = (values[k] for values in found)
        curves |= {f"train{suffix}": _mean(on_train), f"test{suffix}": _mean(on_test)}
        curves[f"gap{suffix}"] = _difference(on_test, on_train)
    counts = {"train_examples": len(train), "test_examples": len(test)}
    return at.result("denoising_error", curves, **counts, repeats=repeats, seed=seed)


def score_error(
    denoiser: AbstractDenoiser,
    exact: AbstractDenoiser,
    examples: Tensor,
    *,
    labels: Tensor | None = None,
    levels: Levels = 10,
    repeats: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Diagnostic:
    """Distance of the score from one that is known exactly, sigma^2 E |score - exact|^2 / D.

    Args:
        denoiser: the model; asked in evaluation mode.
        exact: of the same process. Against `EmpiricalDenoiser` of the training examples, 0 means that the model copies.
        examples: (N, ...) that give the x_t.
        labels: class labels (N,) int64 or None, for both.
        levels, repeats, seed, batch_size, progress: as for `denoising_error`.

    Returns:
        Curves "error", which is also the mean square difference of eps; and "relative" to that of the exact eps.

    Raises:
        UserError: for examples, labels or options that do not fit, or another process.
    """
    at = _Levels.of(denoiser.sde, levels)
    if exact.sde is not denoiser.sde and exact.sde != denoiser.sde:
        raise UserError(f"the exact score is of {exact.sde} and the model's of {denoiser.sde}: take the same process")

    def measure(batch: _Batch) -> Sequence[Tensor]:
        x = denoiser.sde.perturb(batch.x0, batch.t, batch.z)
        with torch.no_grad():
            known = exact.eps(x, batch.t, batch.label)
            difference = denoiser.eps(x, batch.t, batch.label) - known
        return difference.square().flatten(1).mean(1), known.square().flatten(1).mean(1)

    found = _measure(measure, denoiser, examples, labels, at, repeats, seed, batch_size, progress)
    curves = {"error": _mean(found[0]), "relative": _quotient(found[0], found[1])}
    return at.result("score_error", curves, examples=len(examples), repeats=repeats, seed=seed)


def curl(
    denoiser: AbstractDenoiser,
    examples: Tensor,
    *,
    labels: Tensor | None = None,
    levels: Levels = 10,
    probes: int | None = None,
    repeats: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Diagnostic:
    """How far the score is from the gradient of anything: E |J - J'|_F^2 / E |J|_F^2, between 0 and 4.

    Args:
        denoiser: the model; asked in evaluation mode.
        examples: (N, ...) that give the x_t.
        labels: class labels (N,) int64 or None.
        probes: random vectors for each example; None for all unit vectors up to 64 dimensions, and 1 above.
        levels, repeats, seed, batch_size, progress: as for `denoising_error`.

    Returns:
        Curves "asymmetry", and "size": E |J|_F^2 / D of eps.

    Raises:
        UserError: for examples, labels or options that do not fit.
    """
    at = _Levels.of(denoiser.sde, levels)
    chosen = _probes(probes, examples, default=1, least=1)

    def measure(batch: _Batch) -> Sequence[Tensor]:
        def eps(x: Tensor) -> Tensor:
            return denoiser.eps(x, batch.t, batch.label)

        x = denoiser.sde.perturb(batch.x0, batch.t, batch.z)
        vectors = _vectors(chosen, seed, batch.rows, x)
        asymmetry, size = x.new_zeros(len(x)), x.new_zeros(len(x))
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            point = x.requires_grad_()
            value = eps(point)
            for v in vectors.unbind(1):
                back = _pull(value, point, v)
                along = jvp(eps, (x.detach(),), (v,))[1].detach()
                asymmetry = asymmetry + (along - back).square().flatten(1).sum(1)
                size = size + 0.5 * (along.square() + back.square()).flatten(1).sum(1)
        scale = 1 if chosen is None else 1 / chosen
        return scale * asymmetry.detach(), scale * size.detach()

    found = _measure(measure, denoiser, examples, labels, at, repeats, seed, batch_size, progress)
    curves = {"asymmetry": _quotient(found[0], found[1]), "size": _mean(found[1] / math.prod(examples.shape[1:]))}
    return at.result("curl", curves, examples=len(examples), repeats=repeats, seed=seed, probes=chosen)


def fokker_planck(
    denoiser: AbstractDenoiser,
    examples: Tensor,
    *,
    labels: Tensor | None = None,
    levels: Levels = 10,
    probes: int | None = None,
    step: float | None = None,
    repeats: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Diagnostic:
    """The residual R of the score Fokker-Planck equation: 0 if the scores of all levels belong to one diffused density.

    Near pure noise d_t s is small, as the law of x_t hardly changes any more, and what is relative to it is large for
    any model; "residual" tells there how large R is itself.

    Args:
        denoiser: the model; asked in evaluation mode. Its network has to be differentiable twice.
        examples: (N, ...) that give the x_t.
        labels: class labels (N,) int64 or None.
        probes: random vectors for each example, 2 or more; None for all unit vectors up to 64 dimensions, and 2 above.
        step: None for the derivative in t in forward mode; h for [s((1 + h) t) - s((1 - h) t)] / (2 h t).
        levels, repeats, seed, batch_size, progress: as for `denoising_error`.

    Returns:
        Curves "relative", E |R|^2 / E |d_t s|^2; and "residual" and "change", the mean squares of the entries of
        sigma R and sigma d_t s with log(sigma / alpha) for time: rates of eps per e-fold of noise. With random vectors
        "relative" and "residual" are unbiased, and may be below 0 where R is small.

    Raises:
        UserError: for examples, labels or options that do not fit, or a network that knows discrete noise levels alone.
    """
    at = _Levels.of(denoiser.sde, levels)
    chosen = _probes(probes, examples, default=2, least=2)
    if step is not None:
        check_number("step", step, above=0, at_most=0.1)
    if getattr(denoiser, "label_kind", "time") == "index":
        raise UserError("this network knows discrete noise levels alone, so that its score has no derivative in t")

    def measure(batch: _Batch) -> Sequence[Tensor]:
        sde = denoiser.sde
        x = sde.perturb(batch.x0, batch.t, batch.z)
        scale = sde.sigma(batch.t) * 2 * (sde.sigma(batch.t) / sde.g(batch.t)) ** 2
        scale = expand(scale.to(x.dtype), x) / math.sqrt(math.prod(x.shape[1:]))
        change = scale * _time_derivative(denoiser, x, batch.t, batch.label, step)
        common, divergences = _right_side(denoiser, batch, x, _vectors(chosen, seed, batch.rows, x))
        rest = change - scale * common
        if chosen is None:
            square = _square(rest - scale * divergences.sum(1))
        else:
            each = rest[:, None] - scale[:, None] * divergences
            square = (_square(each.sum(1)) - _square(each)) / (chosen * (chosen - 1))
        return square, _square(change)

    found = _measure(measure, denoiser, examples, labels, at, repeats, seed, batch_size, progress)
    signed = chosen is not None
    curves = {
        "relative": _quotient(found[0], found[1], signed),
        "residual": _mean(found[0], signed),
        "change": _mean(found[1]),
    }
    return at.result(
        "fokker_planck", curves, examples=len(examples), repeats=repeats, seed=seed, probes=chosen, step=step
    )


_TITLES = {
    "denoising_error": "mean square error of eps",
    "score_error": "mean square distance from the exact eps",
    "curl": "asymmetry of the Jacobian of the score",
    "fokker_planck": "residual of the score Fokker-Planck equation",
}


def save_diagnostics(folder: Path, results: Sequence[Diagnostic]) -> list[Path]:
    """Write the curves over log SNR with their error bars as PNGs into `folder`; their paths.

    NAME.png holds the curves of a result that are above 0, on a logarithmic axis, NAME_CURVE.png one that has a sign.
    """
    paths = []
    for result in results:
        lines = {
            name: Line(name, result.log_snr, curve.values, "test" in name, curve.errors)
            for name, curve in result.curves.items()
        }
        pairs: list[list[Line]] = []
        for name in (name for name, curve in result.curves.items() if not curve.signed):
            if name.startswith("test"):
                pairs[-1].append(lines[name])
            else:
                pairs.append([lines[name]])
        drawn = [("", pairs, True)] if pairs else []
        drawn += [(f"_{name}", [[lines[name]]], False) for name, curve in result.curves.items() if curve.signed]
        for suffix, shown, logarithmic in drawn:
            path = folder / f"{result.name}{suffix}.png"
            save_lines(
                path, shown, _TITLES.get(result.name, result.name), "log SNR", suffix.strip("_"), log_y=logarithmic
            )
            paths.append(path)
    return paths


# Noise levels and examples


class _Batch(NamedTuple):
    """Some examples at one noise level: `x0` and `z` (B, ...), `t` (B,) float64, and their numbers."""

    x0: Tensor
    z: Tensor
    t: Tensor
    label: Tensor | None
    rows: range


@dataclass(frozen=True)
class _Levels:
    sde: SDE
    log_snr: tuple[float, ...]
    times: tuple[float, ...]

    @classmethod
    def of(cls, sde: SDE, levels: Levels) -> _Levels:
        """Centers of `levels` equal parts of the way from T to `t_min_sampling`, or the log SNRs given."""
        low, high = (float(sde.log_snr(t)) for t in (sde.T, sde.t_min_sampling))
        if isinstance(levels, int):
            check_whole("levels", levels, at_least=1)
            chosen = low + (high - low) / levels * (torch.arange(levels, dtype=torch.float64) + 0.5)
        else:
            chosen = torch.tensor(sorted(levels), dtype=torch.float64)
            high = max(high, float(sde.log_snr(sde.t_min)))
            slack = 1e-9 * (high - low)
            if not len(chosen) or not bool(((chosen >= low - slack) & (chosen <= high + slack)).all()):
                raise UserError(f"levels={list(levels)} must be log SNRs from {low:.4g} to {high:.4g}, at least one")
        return cls(sde, tuple(chosen.tolist()), tuple(sde.t_of_log_snr(chosen).tolist()))

    def result(self, name: str, curves: Mapping[str, Curve], **settings: Any) -> Diagnostic:
        noise = torch.exp(-0.5 * torch.tensor(self.log_snr, dtype=torch.float64))
        return Diagnostic(name, self.log_snr, self.times, tuple(noise.tolist()), curves, settings)


def _measure(
    measure: Callable[[_Batch], Sequence[Tensor]],
    denoiser: AbstractDenoiser,
    examples: Tensor,
    labels: Tensor | None,
    levels: _Levels,
    repeats: int,
    seed: int,
    batch_size: int,
    progress: Progress | None,
) -> Tensor:
    """The numbers that `measure` gives for each example at each level, in every process: (2, L, N) float64.

    Means over the `repeats` draws of noise. Several processes share the examples.
    """
    check_examples(examples, labels)
    check_whole("repeats", repeats, at_least=1)
    check_whole("batch_size", batch_size, at_least=1)
    n = len(examples)
    if n < 2:
        raise UserError(f"{n} examples are too few for a standard error: take at least 2")
    found = torch.zeros(2, len(levels.times), n, dtype=torch.float64)
    together = is_sharded(denoiser)  # all have to work on what they share
    rows = range(n) if together else share_of(n)
    done, work = 0, math.ceil(len(rows) / batch_size) * repeats * len(levels.times)
    noise_seed = step_seed(seed, 0, "diagnostics") >> 1
    with evaluating(denoiser):
        for start in range(rows.start, rows.stop, batch_size):
            part = range(start, min(start + batch_size, rows.stop))
            here = slice(part.start, part.stop)
            x0, label = examples[here], None if labels is None else labels[here]
            noise = SampleNoise(noise_seed, part, tuple(x0.shape[1:]), dtype=x0.dtype, device=x0.device)
            for _ in range(repeats):
                z = noise()
                for k, time in enumerate(levels.times):
                    t = torch.full((len(part),), time, dtype=torch.float64, device=x0.device)
                    for values, room in zip(measure(_Batch(x0, z, t, label, part)), found[:, k, here], strict=True):
                        room += values.to("cpu", torch.float64) / repeats
                    done += 1
                    if progress is not None:
                        progress(done / work)
    return found if together else total(found)


def _part(progress: Progress | None, done: float, share: float) -> Progress | None:
    """`progress` for work that is a `share` of all, after what is `done`."""
    return None if progress is None else lambda inner: progress(done + share * inner)


# Derivatives


def _probes(probes: int | None, examples: Tensor, default: int, least: int) -> int | None:
    """How many random vectors; None for all unit vectors."""
    if probes is None:
        return None if math.prod(examples.shape[1:]) <= SMALL else default
    check_whole("probes", probes, at_least=least)
    return probes


def _vectors(probes: int | None, seed: int, rows: range, x: Tensor) -> Tensor:
    """Vectors (B, V, ...) of the examples `rows`: random signs, or the unit vectors."""
    if probes is not None:
        return draw_probes("rademacher", probes, seed, rows, x)
    d = math.prod(x.shape[1:])
    return torch.eye(d, dtype=x.dtype, device=x.device).reshape(1, d, *x.shape[1:]).expand(len(x), -1, *x.shape[1:])


def _pull(value: Tensor, x: Tensor, v: Tensor, differentiable: bool = False) -> Tensor:
    """J'v for J = d value / dx, any number of times."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    found = torch.autograd.grad(
        value, x, v, retain_graph=True, create_graph=differentiable, allow_unused=True, materialize_grads=True
    )
    return found[0]


def _time_derivative(
    denoiser: AbstractDenoiser, x: Tensor, t: Tensor, label: Tensor | None, step: float | None
) -> Tensor:
    """d score / dt at fixed `x` (B, ...)."""

    def score(t: Tensor) -> Tensor:
        return denoiser.score(x, t, label)

    with torch.no_grad():
        if step is not None:
            return (score(t * (1 + step)) - score(t * (1 - step))) / expand((2 * step * t).to(x.dtype), x)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
            return jvp(score, (t,), (torch.ones_like(t),))[1]


def _right_side(denoiser: AbstractDenoiser, batch: _Batch, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """grad [ g^2 / 2 |s|^2 - f x's ] (B, ...), and g^2 / 2 grad v'Jv for each of `vectors` (B, V, ...)."""
    sde = denoiser.sde
    f, half = (expand(c.to(x.dtype), x) for c in (sde.f(batch.t), 0.5 * sde.g(batch.t) ** 2))
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():  # fused attention has no second derivative
        point = x.detach().requires_grad_()
        value = denoiser.score(point, batch.t, batch.label)
        s = value.detach()
        common = _pull(value, point, 2 * half * s - f * x) - f * s
        grads = []
        for v in vectors.unbind(1):
            bent = _pull(value, point, v, differentiable=True)
            grads.append(half * _pull(bent, point, v))
    return common.detach(), torch.stack(grads, 1).detach()


# Means over examples


def _square(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


def _mean(values: Tensor, signed: bool = False) -> Curve:
    """Means of `values` (L, N) over the examples."""
    return _curve(values.mean(1), values.var(1) / values.shape[1], signed)


def _quotient(above: Tensor, below: Tensor, signed: bool = False) -> Curve:
    """Quotients of the means of two sets of values (L, N) of the same examples."""
    mean = below.mean(1)
    quotient = above.mean(1) / mean
    rest = above - quotient[:, None] * below
    return _curve(quotient, rest.var(1) / (rest.shape[1] * mean**2), signed)


def _difference(a: Tensor, b: Tensor) -> Curve:
    """Differences of the means of (L, N) and (L, M) values, of which those of the same number belong together."""
    n, m = a.shape[1], b.shape[1]
    pairs = min(n, m)
    one, other = (values[:, :pairs] - values[:, :pairs].mean(1, keepdim=True) for values in (a, b))
    covariance = (one * other).sum(1) / (pairs - 1)
    variance = a.var(1) / n + b.var(1) / m - 2 * pairs * covariance / (n * m)
    return _curve(a.mean(1) - b.mean(1), variance.clamp_min(0), signed=True)


def _curve(mean: Tensor, variance: Tensor, signed: bool) -> Curve:
    return Curve(tuple(mean.tolist()), tuple(variance.sqrt().tolist()), signed)


def _plain(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
