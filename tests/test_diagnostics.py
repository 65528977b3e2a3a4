"""What is measured of a model itself: 0 where the score is exact, known amounts where a known field is added to it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sde.broadcast import Time, as_tensor, expand
from sde.denoiser import AbstractDenoiser, Denoiser, GaussianDenoiser, GaussianMixtureDenoiser
from sde.distributed import part_of
from sde.errors import UserError
from sde.evaluation import diagnostics
from sde.evaluation.diagnostics import (
    Curve,
    Diagnostic,
    curl,
    denoising_error,
    fokker_planck,
    save_diagnostics,
    score_error,
)
from sde.evaluation.empirical import EmpiricalDenoiser
from sde.interop.chains import SMLDChain
from sde.losses import DenoisingScoreMatching
from sde.parameterizations import PARAMETERIZATIONS
from sde.processes import SDE, VE, VP, RectifiedFlow
from tests.problems import EPS64, F64, Fixed, NetworkFromDenoiser, generator, mixture, normal, sdes, times_of
from tests.small_models import SMALL, build, shape_of

Field = Callable[[Tensor, Tensor], Tensor]
EPS = PARAMETERIZATIONS.get("eps")()


class Perturbed(AbstractDenoiser):
    """A denoiser to whose score `field(x, t)` is added."""

    def __init__(self, base: AbstractDenoiser, field: Field) -> None:
        super().__init__()
        self.sde, self.base, self.field = base.sde, base, field

    def output(self, name: str, x: Tensor, t: Time, label: Tensor | None = None) -> Tensor:
        t = as_tensor(t)
        score = self.base.score(x, t, label) + self.field(x, t)
        return score if name == "score" else -expand(self.sde.sigma(t), x) * score


def isotropic(sde: SDE, *shape: int, std: float = 0.6) -> GaussianDenoiser:
    return GaussianDenoiser(sde, 0.3 * torch.ones(shape, dtype=F64), torch.tensor(std**2, dtype=F64))


def variance(sde: SDE, t: Tensor, std: float = 0.6) -> Tensor:
    return (sde.alpha(t) * std) ** 2 + sde.sigma(t) ** 2


def times(result: Diagnostic) -> Tensor:
    return torch.tensor(result.times, dtype=F64)


def values(result: Diagnostic, name: str) -> Tensor:
    return torch.tensor(result.curves[name].values, dtype=F64)


def errors(result: Diagnostic, name: str) -> Tensor:
    return torch.tensor(result.curves[name].errors, dtype=F64)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 0.0) -> None:
    torch.testing.assert_close(found, expected.expand_as(found), rtol=rtol, atol=atol)


# Exact scores


@pytest.mark.parametrize("sde", sdes())
def test_exact_scores_have_no_curl_and_obey_the_equation(sde: SDE) -> None:
    exact = mixture().denoiser(sde)
    x = exact.sample(6, generator(1))
    assert float(values(curl(exact, x, levels=6), "asymmetry").max()) < 1e-24
    found = fokker_planck(exact, x, levels=6)
    assert float(values(found, "relative").max().sqrt()) < 1e-9
    assert float(values(found, "change").max()) > 0.1, "d_t s is not 0 everywhere, or it would be a small wonder"


@pytest.mark.parametrize("sde", sdes())
def test_a_perfect_network_is_found_to_be_one(sde: SDE) -> None:
    """Its derivative in t goes through the noise label and all coefficients."""
    exact = mixture().denoiser(sde)
    for parameterization in ("eps", "edm"):
        kind = PARAMETERIZATIONS.get(parameterization)()
        model = Denoiser(NetworkFromDenoiser(exact, kind, "log_sigma"), sde, kind)
        x = exact.sample(4, generator(2))
        assert float(values(score_error(model, exact, x, levels=5), "relative").max()) < 1e-18
        middle = [0.0, 2.0]  # elsewhere d_t s is the difference of much larger numbers
        assert float(values(fokker_planck(model, x, levels=middle), "relative").max().sqrt()) < 1e-6


@pytest.mark.parametrize("sde", sdes())
def test_the_error_of_the_exact_denoiser_is_the_variance_that_is_left(sde: SDE) -> None:
    exact = isotropic(sde, 8)
    train, test = (exact.sample(300, generator(seed)) for seed in (3, 4))
    found = denoising_error(exact, train, test, levels=5, loss=DenoisingScoreMatching("likelihood"))
    t = times(found)
    left = sde.alpha(t) ** 2 * 0.36 / variance(sde, t)
    weight = (sde.g(t) / sde.sigma(t)) ** 2
    for name in ("train", "test"):
        assert bool(((values(found, name) - left).abs() < 4 * errors(found, name)).all())
        close(values(found, f"{name}_loss"), weight * values(found, name))
        close(errors(found, f"{name}_loss"), weight * errors(found, name))
    close(values(found, "gap"), values(found, "test") - values(found, "train"), atol=1e-14)
    assert bool((values(found, "gap").abs() < 4 * errors(found, "gap")).all())


# Known fields


@pytest.mark.parametrize("shape", [(2,), (1, 3, 2)])
@pytest.mark.parametrize("sde", sdes(odd=False))
def test_a_rotation_has_its_curl(sde: SDE, shape: tuple[int, ...]) -> None:
    d = math.prod(shape)
    spin = normal(d, d, seed=5)
    spin = spin - spin.mT

    def rotation(x: Tensor, t: Tensor) -> Tensor:
        return expand(1 / variance(sde, t), x) * (x.flatten(1) @ spin.mT).reshape(x.shape)

    model = Perturbed(isotropic(sde, *shape), rotation)
    x = model.base.sample(5, generator(6))
    rotated = float(spin.square().sum())
    found = curl(model, x, levels=4)
    # J = (spin - I) / v
    close(values(found, "asymmetry"), torch.tensor(4 * rotated / (d + rotated), dtype=F64))
    t = times(found)
    close(values(found, "size"), sde.sigma(t) ** 2 / variance(sde, t) ** 2 * (d + rotated) / d)
    assert float(errors(found, "asymmetry").max()) < 1e-9, "it is the same everywhere"


def test_pure_rotation_has_the_largest_curl() -> None:
    def turn(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([-x[:, 1], x[:, 0]], 1)

    sde = VP()
    model = Perturbed(Denoiser(Fixed(torch.zeros(4, 2, dtype=F64)), sde, EPS), turn)
    for probes in (None, 1, 3):
        close(values(curl(model, normal(4, 2), probes=probes), "asymmetry"), torch.tensor(4.0, dtype=F64))


def bent(x: Tensor, t: Tensor) -> Tensor:
    """A field that is no gradient and bends in x and t."""
    a, b = x.unbind(1)
    return torch.stack([torch.sin(a * b + t) + b, torch.cos(2 * a - t) * b], 1)


def test_curl_of_a_field_of_any_kind() -> None:
    """Against the Jacobian entry by entry."""
    exact = mixture().denoiser(VP())
    model, x0 = Perturbed(exact, bent), exact.sample(5, generator(7))
    found = curl(model, x0, levels=[0.5], seed=3)
    above = below = 0.0
    for x, t in points(model, x0, found, seed=3):
        jacobian = torch.autograd.functional.jacobian(lambda x, t=t: model.score(x[None], t)[0], x)
        above += float((jacobian - jacobian.mT).square().sum())
        below += float(jacobian.square().sum())
    close(values(found, "asymmetry"), torch.tensor(above / below, dtype=F64))


def points(model: AbstractDenoiser, x0: Tensor, found: Diagnostic, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The (x_t, t) at which the first level of `found` was measured."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Seen(torch.nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
            seen.extend(zip(x, t, strict=True))
            return x

    t = torch.full((len(x0),), found.times[0], dtype=F64)
    probe = Denoiser(Seen(), model.sde, EPS)
    score_error(probe, model, x0, levels=list(found.log_snr[:1]), seed=seed)
    return seen


@pytest.mark.parametrize("sde", sdes())
def test_a_known_field_has_its_residual_and_its_error(sde: SDE) -> None:
    """With s = -(x - m) / v + h b, everything but d_t h b - g^2 h J'b + f h b cancels."""
    b = torch.tensor([0.7, -0.4, 0.2], dtype=F64)
    model = Perturbed(isotropic(sde, 3), lambda x, t: expand((t / sde.T) ** 2, x) * b)
    x = model.base.sample(4, generator(8))
    found = fokker_planck(model, x, levels=[-2.0, 0.0, 1.5])
    t = times(found)
    h, rate = (t / sde.T) ** 2, 2 * t / sde.T**2
    residual = rate + sde.g(t) ** 2 * h / variance(sde, t) + sde.f(t) * h
    scale = 2 * sde.sigma(t) ** 3 / sde.g(t) ** 2
    expected = (scale * residual) ** 2 * float(b.square().mean())
    close(values(found, "residual"), expected, rtol=1e-7)
    for probes in (2, 3):  # the field's divergence is 0, so that chance has no part in it
        close(values(fokker_planck(model, x, levels=[-2.0, 0.0, 1.5], probes=probes), "residual"), expected, rtol=1e-7)
    off = score_error(model, model.base, x, levels=[-2.0, 0.0, 1.5])
    close(values(off, "error"), (sde.sigma(t) * h) ** 2 * float(b.square().mean()))
    assert float(errors(off, "error").max()) < 1e-12 * float(values(off, "error").max())


@pytest.mark.parametrize("sde", sdes(odd=False))
def test_residual_of_a_field_of_any_kind(sde: SDE) -> None:
    """Against the equation written out with nested derivatives, for a field whose Jacobian is not symmetric."""
    exact = mixture().denoiser(sde)
    model, x0 = Perturbed(exact, bent), exact.sample(4, generator(9))
    found = fokker_planck(model, x0, levels=[0.3], seed=5)
    square = change = 0.0
    for x, t in points(model, x0, found, seed=5):
        f, half = float(sde.f(t)), 0.5 * float(sde.g(t)) ** 2

        def score(x: Tensor, t: Tensor = t) -> Tensor:
            return model.score(x[None], t)[0]

        def under_grad(x: Tensor, f: float = f, half: float = half, score: Callable[..., Tensor] = score) -> Tensor:
            s = score(x)
            return half * (torch.func.jacfwd(score)(x).trace() + s @ s) - f * (x @ s)

        in_time = torch.func.jacfwd(lambda t, x=x: model.score(x[None], t)[0])(t)
        square += float((in_time - torch.func.grad(under_grad)(x)).square().sum())
        change += float(in_time.square().sum())
    close(values(found, "relative"), torch.tensor(square / change, dtype=F64), rtol=1e-8)


def test_probes_agree_with_unit_vectors() -> None:
    exact = mixture().denoiser(VP())
    model, x = Perturbed(exact, bent), exact.sample(100, generator(10))
    levels: dict[str, Any] = {"levels": [-1.0, 0.0, 2.0], "batch_size": 100}
    for measure, names, probes in ((curl, ("asymmetry", "size"), 1), (fokker_planck, ("relative", "residual"), 2)):
        whole, some = measure(model, x, **levels), measure(model, x, probes=probes, **levels)
        for name in names:
            apart = (values(some, name) - values(whole, name)).abs()
            assert bool((apart < 4 * errors(some, name)).all()), name
            assert bool((apart > 0).all())


def test_central_differences_have_order_two() -> None:
    exact = mixture().denoiser(VP())
    x = exact.sample(8, generator(11))
    coarse, fine = (values(fokker_planck(exact, x, levels=[0.0, 1.0], step=h), "residual").sqrt() for h in (0.02, 0.01))
    close(coarse / fine, torch.tensor(4.0, dtype=F64), rtol=0.01)


# Memorization


def memory(sde: SDE, n: int = 30, d: int = 12) -> tuple[Denoiser, Tensor, Tensor]:
    """A network that has learned its training examples by heart, those, and others of the same law."""
    train, test = normal(n, d, seed=12), normal(n, d, seed=13)
    network = NetworkFromDenoiser(EmpiricalDenoiser(sde, train, block=7), EPS, "log_sigma")
    return Denoiser(network, sde, EPS), train, test


@pytest.mark.parametrize("sde", [VP(), VE(), RectifiedFlow()])
def test_a_network_that_copies_is_found_out(sde: SDE) -> None:
    model, train, test = memory(sde)
    copies = EmpiricalDenoiser(sde, train)
    levels = [-6.0, 0.0, 3.0, 6.0]
    for examples in (train, test):
        assert float(values(score_error(model, copies, examples, levels=levels), "error").max()) < 1e-16
    found = denoising_error(model, train, test, levels=levels)
    gap, error = values(found, "gap"), errors(found, "gap")
    assert bool((gap[1:] > 5 * error[1:]).all())
    assert float(values(found, "train")[3]) < 1e-6, "it knows what it was shown"
    assert float(values(found, "test")[3]) > 1, "and replaces what it was not by something else"
    assert abs(float(gap[0])) < 0.01, "at this noise all but nothing is left to know"
    # one that knows the law is as good on either, and far from the score of the examples
    honest = GaussianDenoiser(sde, torch.zeros(12, dtype=F64), torch.tensor(1.0, dtype=F64))
    fair = denoising_error(honest, train, test, levels=levels)
    assert bool((values(fair, "gap").abs() < 4 * errors(fair, "gap")).all())
    assert float(values(score_error(honest, copies, train, levels=[3.0]), "relative")[0]) > 0.05


@pytest.mark.parametrize("sde", sdes())
def test_the_empirical_score_is_that_of_a_mixture_without_width(sde: SDE) -> None:
    examples = normal(9, 2, 2, seed=14)
    exact = GaussianMixtureDenoiser(sde, torch.ones(9, dtype=F64), examples, torch.zeros((), dtype=F64))
    t = times_of(sde, 4)
    x = sde.perturb(examples[torch.arange(len(t)) % 9], t, normal(len(t), 2, 2, seed=15))
    sigma = expand(sde.sigma(t), x)
    rounding = 20 * EPS64 * float(x.abs().max())  # of x - alpha x_i
    for name, unit in (("denoised", 1), ("eps", 1 / sigma), ("v", 1 + 1 / sigma), ("score", 1 / sigma**2)):
        known = exact.output(name, x, t)
        for block in (1, 4, 100):
            found = EmpiricalDenoiser(sde, examples, block=block).output(name, x, t)
            assert bool(((found - known).abs() <= rounding * unit + 1e-11 * known.abs()).all()), name


@pytest.mark.parametrize("sigma", [1.0, 1e-2, 1e-4])
def test_neighbors_at_small_noise(sigma: float) -> None:
    """Two examples as large as pictures, two noises apart, among many far away: exponents of 1e11 that differ by 1.

    Each logit is a difference of products as large as |x|^2 / sigma^2, with rounding errors of some EPS64 of that.
    """
    sde, d = VE(sigma_min=1e-5, sigma_max=10.0), 3072
    t = torch.full((4,), float(sde.t_of_noise_level(sigma)), dtype=F64)
    examples = normal(40, d, seed=16).clamp(-1, 1)
    step = normal(d, seed=17)
    examples[20] = examples[3] + 2 * sigma * step / step.norm()
    examples[33] = examples[3]
    x = examples[3] + sigma * step / step.norm() + sigma * normal(4, d, seed=18)
    logits = -0.5 * ((x[:, None] - examples) / sigma).square().sum(2)
    expected = torch.softmax(logits, 1)
    near = expected[:, 20] / (expected[:, 3] + expected[:, 33])
    assert bool(((near > 0.01) & (near < 100)).all()), "both neighbors count"
    for block in (7, 4096):
        found = EmpiricalDenoiser(sde, examples, block=block).eps(x, t)
        known = (x - expected @ examples) / sigma
        nats = 20 * EPS64 * d / sigma**2  # of which a share of the distance between the neighbors, 2 sigma, changes
        rounding = 20 * EPS64 / sigma
        assert float((found - known).norm(dim=1).max()) < 2 * nats + rounding * d**0.5
    far = EmpiricalDenoiser(sde, examples.float()).score(1e4 * x.float(), t)
    assert bool(torch.isfinite(far).all())


def test_labels_choose_examples() -> None:
    sde, examples, labels = VP(), normal(12, 3, seed=19), torch.arange(12) // 4  # whole blocks without some class
    whole = EmpiricalDenoiser(sde, examples, labels, block=5)
    x, asked = normal(4, 3, seed=20), torch.tensor([2, 0, 1, 1])
    together = whole.eps(x, 0.3, asked)
    for k in range(4):
        alone = EmpiricalDenoiser(sde, examples[labels == asked[k]])
        close(together[k], alone.eps(x[k : k + 1], 0.3)[0], rtol=1e-12)
    close(whole.eps(x, 0.3), EmpiricalDenoiser(sde, examples).eps(x, 0.3), rtol=1e-12)
    with pytest.raises(UserError, match="label 7 is that of no example: the labels are 0, 1, 2"):
        whole.eps(x, 0.3, torch.tensor([0, 7, 1, 1]))
    unlabeled = GaussianMixtureDenoiser(sde, torch.ones(12, dtype=F64), examples, torch.zeros((), dtype=F64))
    found = score_error(whole, unlabeled, examples, labels=labels, levels=[0.0])
    assert float(values(found, "error")[0]) > 0.01, "it was asked with labels"


# Examples, batches, processes


def everything(**options: Any) -> list[Diagnostic]:
    """All four of a model that is wrong, on 7 examples (and 5 others)."""
    exact = mixture().denoiser(VP())
    model, x = Perturbed(exact, bent), exact.sample(12, generator(21))
    options = {"levels": 2, "seed": 4, **options}
    return [
        denoising_error(model, x[:7], x[7:], loss=DenoisingScoreMatching("edm"), **options),
        score_error(model, exact, x[:7], **options),
        curl(model, x[:7], probes=2, **options),
        curl(model, x[:7], **options),
        fokker_planck(model, x[:7], probes=2, **options),
        fokker_planck(model, x[:7], **options),
    ]


def same(one: Diagnostic, other: Diagnostic) -> None:
    assert one.settings == other.settings
    assert one.curves.keys() == other.curves.keys()
    for name in one.curves:
        close(values(one, name), values(other, name), rtol=1e-10, atol=1e-14)
        close(errors(one, name), errors(other, name), rtol=1e-8, atol=1e-14)


def test_no_number_depends_on_the_batch_size() -> None:
    whole = everything()
    for batch_size in (1, 3):
        for one, other in zip(everything(batch_size=batch_size), whole, strict=True):
            same(one, other)
    for one, other in zip(everything(seed=5), whole, strict=True):
        assert any(one.curves[name].values != other.curves[name].values for name in one.curves)


def test_processes_share_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = everything(repeats=2)
    parts: list[list[Tensor]] = []
    for rank in range(3):
        parts.append([])
        monkeypatch.setattr(diagnostics, "share_of", lambda n, rank=rank: part_of(n, rank, 3))
        monkeypatch.setattr(diagnostics, "total", lambda x, seen=parts[-1]: seen.append(x) or x)
        everything(repeats=2, batch_size=2)
    sums = iter([sum(found) for found in zip(*parts, strict=True)])
    monkeypatch.setattr(diagnostics, "share_of", lambda n: range(0))
    monkeypatch.setattr(diagnostics, "total", lambda x: next(sums))
    for one, other in zip(everything(repeats=2), whole, strict=True):
        same(one, other)


def test_repeats_are_draws_of_their_own() -> None:
    exact = isotropic(VP(), 4)
    x = exact.sample(40, generator(22))
    once, often = (score_error(Perturbed(exact, lambda x, t: x), exact, x, repeats=k, levels=[-1.0]) for k in (1, 30))
    assert float(errors(often, "error")[0]) < 0.9 * float(errors(once, "error")[0])
    assert float((values(often, "error") - values(once, "error")).abs()[0]) < 4 * float(errors(once, "error")[0])


def test_levels() -> None:
    sde = VP()
    exact = isotropic(sde, 2)
    x = exact.sample(3, generator(23))
    found = score_error(exact, exact, x, levels=4)
    ends = [float(sde.log_snr(t)) for t in (sde.T, sde.t_min_sampling)]
    width = (ends[1] - ends[0]) / 4
    close(torch.tensor(found.log_snr, dtype=F64), ends[0] + width * torch.tensor([0.5, 1.5, 2.5, 3.5], dtype=F64))
    close(sde.log_snr(times(found)), torch.tensor(found.log_snr, dtype=F64))
    close(sde.noise_level(times(found)), torch.tensor(found.noise_level, dtype=F64))
    assert score_error(exact, exact, x, levels=[3.0, -1.0]).log_snr == (-1.0, 3.0)
    assert score_error(exact, exact, x, levels=[float(sde.log_snr(sde.t_min))]).times[0] == pytest.approx(1e-5)


def test_progress_reaches_one() -> None:
    exact = isotropic(VP(), 2)
    x, told = exact.sample(5, generator(24)), []
    denoising_error(exact, x[:3], x[3:], levels=2, batch_size=2, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
    assert len(told) == 6


# Errors


def spread(draw: Callable[[int], tuple[Diagnostic, str, Tensor]], draws: int) -> tuple[float, float]:
    """Mean and standard deviation of (value - truth) / error over draws."""
    z = []
    for k in range(draws):
        found, name, truth = draw(k)
        z.append(float(((values(found, name) - truth) / errors(found, name))[0]))
    z = torch.tensor(z, dtype=F64)
    return float(z.mean()), float(z.std())


@pytest.mark.parametrize("case", ["mean", "pairs", "unequal", "quotient", "probes"])
def test_standard_errors_cover(case: str) -> None:
    """Standardized by its error, a number scatters with standard deviation 1, of which 100 draws tell 0.07.

    The mean of squares that 40 examples give is not quite normal, which shifts its mean by some 0.1.
    """
    sde = VP()
    gaussian, planar = isotropic(sde, 8), mixture().denoiser(sde)
    b = torch.full((8,), 0.5, dtype=F64)
    biased = Perturbed(gaussian, lambda x, t: b)
    level: dict[str, Any] = {"levels": [0.0]}

    def draw(k: int) -> tuple[Diagnostic, str, Tensor]:
        x = gaussian.sample(100, generator(1000 + k))
        if case == "probes":
            x = planar.sample(40, generator(1000 + k))
            return fokker_planck(planar, x, probes=2, seed=k, **level), "relative", torch.zeros(1, dtype=F64)
        if case == "quotient":
            found = score_error(biased, gaussian, x[:40], seed=k, **level)
            # E |eps|^2 / D = sigma^2 / v
            return found, "relative", 0.25 * variance(sde, times(found))
        split = {"mean": (40, 2), "pairs": (40, 40), "unequal": (60, 40)}[case]
        found = denoising_error(gaussian, x[: split[0]], x[split[0] : sum(split)], seed=k, **level)
        t = times(found)
        truth = sde.alpha(t) ** 2 * 0.36 / variance(sde, t) if case == "mean" else torch.zeros(1, dtype=F64)
        return found, "train" if case == "mean" else "gap", truth

    mean, std = spread(draw, 100)
    assert abs(mean) < 0.45
    assert 0.79 < std < 1.25


def test_errors_of_pairs_are_smaller() -> None:
    """At little noise the error is about that of eps = 0, the noise itself, which partners share."""
    sde = VP()
    exact = isotropic(sde, 8)
    found = denoising_error(exact, exact.sample(50, generator(25)), exact.sample(50, generator(26)), levels=[6.0])
    independent = (errors(found, "train") ** 2 + errors(found, "test") ** 2).sqrt()
    one = denoising_error(exact, *[exact.sample(50, generator(25))] * 2, levels=[6.0])
    assert float(errors(found, "gap")[0]) < 0.2 * float(independent[0])
    assert one.curves["gap"].values == (0.0,)
    assert float(errors(one, "gap")[0]) < 1e-9


# Networks


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"ncsn"}))
def test_every_network(name: str) -> None:
    """Derivatives pass through attention, norms and convolutions; in time they are those of central differences."""
    network = build(name).double()
    model = Denoiser(network, VP(), EPS).train()
    x = normal(2, *shape_of(name), seed=27)
    options: dict[str, Any] = {"levels": [-2.0], "probes": 2, "seed": 1}
    forward, central = fokker_planck(model, x, **options), fokker_planck(model, x, step=1e-6, **options)
    for curve in ("change", "residual"):
        size = float(values(forward, "change")[0])
        close(values(forward, curve), values(central, curve), rtol=0, atol=1e-4 * size)
    alone, together = (curl(model, x, batch_size=k, **options) for k in (1, 2))
    close(values(alone, "asymmetry"), values(together, "asymmetry"))
    assert 0 < float(values(alone, "asymmetry")[0]) < 4
    assert all(module.training for module in model.modules()), "left as it was"


def test_classes_reach_the_network() -> None:
    model = Denoiser(build("mlp", num_classes=3).double(), VP(), EPS)
    x, labels = normal(4, 2, seed=28), torch.tensor([0, 1, 2, 0])
    for measure in (curl, fokker_planck):
        one, other = (measure(model, x, labels=given, levels=[0.0]) for given in (labels, labels.flip(0) * 0 + 1))
        assert one.to_dict()["curves"] != other.to_dict()["curves"]
    labeled = denoising_error(model, x, x, train_labels=labels, test_labels=torch.ones_like(labels), levels=[0.0])
    assert labeled.curves["gap"].values != (0.0,)


# Results


def test_results_are_plain_values() -> None:
    for found in everything():
        plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert plain["name"] == found.name
        assert plain["log_snr"] == list(found.log_snr)
        for key, curve in found.curves.items():
            assert plain["curves"][key] == {"values": list(curve.values), "errors": list(curve.errors)}
        assert plain["settings"]["seed"] == 4
    nothing = Denoiser(Fixed(torch.zeros(3, 2, dtype=F64)), VP(), EPS)  # 0 relative to 0
    asymmetry = curl(nothing, normal(3, 2), levels=2).to_dict()["curves"]["asymmetry"]
    assert asymmetry["values"] == [None, None]


def test_pictures(tmp_path: Path) -> None:
    found = everything()
    paths = save_diagnostics(tmp_path, [found[0], found[4]])
    names = [path.name for path in paths]
    assert names == [
        *("denoising_error.png", "denoising_error_gap.png", "denoising_error_gap_loss.png"),
        *("fokker_planck.png", "fokker_planck_relative.png", "fokker_planck_residual.png"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    sizes = {Image.open(path).size for path in paths}
    assert len(sizes) == 1
    certain = Diagnostic("curl", (0.0, 1.0), (0.5, 0.2), (1.0, 0.6), {"asymmetry": Curve((1.0, 2.0), (0.0, 0.0))}, {})
    vague = Diagnostic("curl", (0.0, 1.0), (0.5, 0.2), (1.0, 0.6), {"asymmetry": Curve((1.0, 2.0), (0.3, 0.3))}, {})
    drawn = [save_diagnostics(tmp_path / str(k), [d])[0].read_bytes() for k, d in enumerate((certain, vague))]
    assert drawn[0] != drawn[1], "bars are drawn"


def test_what_cannot_be_measured() -> None:
    sde = VP()
    exact, x = isotropic(sde, 2), normal(4, 2)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: curl(exact, x[:1]), "1 examples are too few for a standard error"),
        (lambda: curl(exact, x, labels=torch.zeros(3, dtype=torch.int64)), "label of shape .* does not fit 4 examples"),
        (lambda: curl(exact, x * torch.nan), "4 of 4 examples are not finite"),
        (lambda: curl(exact, x, probes=0), "probes=0 is out of range"),
        (lambda: curl(exact, x, levels=0), "levels=0 is out of range"),
        (lambda: curl(exact, x, levels=[]), "at least one"),
        (lambda: curl(exact, x, levels=[40.0]), r"levels=\[40.0\] must be log SNRs from -10"),
        (lambda: curl(exact, x, repeats=0), "repeats=0 is out of range"),
        (lambda: curl(exact, x, batch_size=0.5), "batch_size=0.5 is not a whole number"),  # type: ignore[arg-type]
        (lambda: fokker_planck(exact, x, probes=1), "probes=1 is out of range: it must be at least 2"),
        (lambda: fokker_planck(exact, x, step=0.0), "step=0.0 is out of range"),
        (lambda: score_error(exact, isotropic(VE(), 2), x), "the exact score is of VE.* take the same process"),
        (lambda: EmpiricalDenoiser(sde, x[:0]), "are no data set"),
        (lambda: EmpiricalDenoiser(sde, x, torch.zeros(2)), "labels of shape .* do not fit 4 examples"),
        (lambda: EmpiricalDenoiser(sde, x).eps(x, 0.1, torch.zeros(4)), "this data set has no labels"),
        (lambda: EmpiricalDenoiser(sde, x, block=0), "block=0 is out of range"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(UserError, match="discrete noise levels alone"):
        fokker_planck(Denoiser(build("ncsn"), VE(), SMLDChain()), normal(2, *shape_of("ncsn"), dtype=torch.float32))
