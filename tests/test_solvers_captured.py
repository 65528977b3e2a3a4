"""The loop on fixed places against the plain one; captured as a CUDA graph where there is a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sde.denoiser import AbstractDenoiser, Denoiser
from sde.errors import UserError
from sde.parameterizations import X0, Eps, Preconditioned
from sde.processes import SDE, VE, VP, RectifiedFlow
from sde.randomness import RecordedNoise, SampleNoise
from sde.reverse import ReverseProcess
from sde.solvers import Adams, Heun
from sde.solvers.captured import CapturedLoop
from sde.solvers.linear import LinearSolver
from tests.problems import F64, RandomNetwork, mixture, moderate, normal
from tests.solver_variants import uneven, variants

LINEAR = [p for p in variants(stepping=True) if isinstance(p.values[0], LinearSolver)]


def loop_for(
    solver: LinearSolver, denoiser: AbstractDenoiser, times: list[float], x: Tensor, label: Tensor | None = None
) -> CapturedLoop:
    steps = solver.plan(denoiser.sde, times)
    return CapturedLoop(steps, solver.output, denoiser, x, label, capture=False)


def run(loop: CapturedLoop, x: Tensor, noise: Any, label: Tensor | None = None) -> Tensor:
    loop.start(x, label)
    for i in range(len(loop.steps)):
        loop.advance(i, noise)
    return loop.x.clone()


@pytest.mark.parametrize("sde", [VP(), VE(), RectifiedFlow()], ids=["vp", "ve", "rectified_flow"])
@pytest.mark.parametrize("solver", LINEAR)
def test_fixed_places_give_the_same_samples(solver: LinearSolver, sde: SDE) -> None:
    """Twice, on two batches: nothing of the first is left in the second."""
    denoiser = mixture().denoiser(sde)
    times = uneven(*reversed(moderate(sde)), 8)
    loop = loop_for(solver, denoiser, times, normal(5, 2))
    for seed in (0, 1):
        x, draws = normal(5, 2, seed=seed), normal(40, 5, 2, seed=seed + 7)
        process = ReverseProcess(denoiser)
        expected = solver.solve(process, x, times, RecordedNoise(draws)).x
        got = run(loop, x, RecordedNoise(draws))
        # the same sums in another order, over steps that grow errors by less than a hundred
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
        assert sum(loop.evaluations) == process.nfe


@pytest.mark.parametrize("parameterization", [Eps(), X0(), Preconditioned()], ids=["eps", "x0", "edm"])
def test_with_a_network_and_labels(parameterization: Any) -> None:
    sde = VP()
    denoiser = Denoiser(RandomNetwork(6, dtype=F64), sde, parameterization).requires_grad_(False)
    times = uneven(*reversed(moderate(sde)), 8)
    loop = loop_for(Adams(), denoiser, times, normal(3, 6), torch.zeros(3, dtype=torch.long))
    for classes in ([0, 1, 2], [5, 5, 9]):
        x, label = normal(3, 6, seed=classes[0]), torch.tensor(classes)
        expected = Adams().solve(ReverseProcess(denoiser, label), x, times).x
        torch.testing.assert_close(run(loop, x, None, label), expected, rtol=1e-11, atol=1e-11)


def test_capture_needs_a_gpu() -> None:
    process = ReverseProcess(mixture().denoiser(VP()))
    with pytest.raises(UserError, match=r"solver\.compile=true .*cpu"):
        Heun(compile=True).solve(process, normal(2, 2), [1.0, 0.5, 0.1])
    with pytest.raises(UserError, match=r"solver\.compile='yes'"):
        Heun(compile="yes").solve(process, normal(2, 2), [1.0, 0.5, 0.1])  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", LINEAR)
def test_captured_on_a_gpu(solver: LinearSolver) -> None:
    sde = VP()
    denoiser = Denoiser(RandomNetwork(6), sde, Eps()).requires_grad_(False).cuda()
    times = uneven(*reversed(moderate(sde)), 8)
    for batch in ([0, 1, 2], [3, 4, 5]):
        noises = [SampleNoise(0, batch, (6,), device="cuda") for _ in range(2)]
        plain, captured = (
            replace(solver, compile=flag).solve(ReverseProcess(denoiser), noise(), times, noise)
            for flag, noise in zip((False, True), noises, strict=True)
        )
        torch.testing.assert_close(captured.x, plain.x, rtol=1e-4, atol=1e-4)
        assert captured.nfe == plain.nfe
