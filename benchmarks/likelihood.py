r"""What log p(x) by the probability-flow ODE costs, and how exact it is, beside the original's way on the same network.

    python -m benchmarks.likelihood                                # trains two small networks first, some minutes
    python -m benchmarks.likelihood --targets gaussian mixture     # exact scores alone
    python -m benchmarks.likelihood --targets run --run runs/...   # a trained run of yours

The original is `benchmarks.original_likelihood`; ours is `sde.density.flow.log_prob`. Targets:

    gaussian   N(0, s^2 I) in 3 x 32 x 32, s = 0.5 and s = 0.25: its score is exact, and so is a single probe's trace
    mixture    5 modes of unequal covariances in 64 dimensions (`benchmarks.targets`), its score exact
    network    a small network that is trained on characters of 16 pixels, a minute on a CPU core (kept in --out)
    run        the run that --run names

Networks compute in float32. All methods see the same examples and the same single Rademacher probe of each. Forward and
backward passes are counted by the network itself, a batch at a time. Errors are against `dopri5` with the network in
float64, at 1e-9 where the score is exact, and at 1e-6 for trained networks, which are rough in time; in nats per
dimension: root mean square over the batch, and the largest. Ratios of calls and of times are to the original at the
same tolerance; those of solvers with a fixed number of steps to the original at 1e-5.

All methods take turns within a round, after one that is not counted; times are medians over rounds, ratios the medians
of each round's ratio. With one thread it is the time of the process on the processor, which does not count what other
programs take.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.original_likelihood import original_log_prob
from benchmarks.report import markdown_table
from benchmarks.targets import unequal
from sde.config import build
from sde.denoiser import AbstractDenoiser, Denoiser, GaussianDenoiser
from sde.density.divergence import Hutchinson
from sde.density.flow import log_prob
from sde.density.quantization import Quantization
from sde.errors import UserError, check_number
from sde.parameterizations import Eps
from sde.processes import SDE, SDES
from sde.progress import progress_bar
from sde.runs import Run, find_run, open_checkpoint, restore_denoiser
from sde.solvers import SOLVERS, Solver
from sde.training.checkpoint import list_checkpoints

TARGETS = ("gaussian", "mixture", "network")
STEPPING = ("adams", "unipc", "heun")
TIGHT = {"exact": 1e-9, "trained": 1e-6}  # tolerances of references
TRAINING = [
    "model.channels=16",
    "model.channel_multipliers=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[]",
    "model.dropout=0.0",
    "data=glyphs",
    "data.size=16",
    "optimizer.lr=2e-3",
    "ema.decay=0.99",
    "training.dequantize=true",
    "training.batch_size=64",
    "training.warmup=50",
    "training.preview_every=0",
    "training.keep=1",
    "training.device=cpu",
]
MODELS = {"ve": "ncsnpp"}  # others: ddpmpp, as the paper pairs them


class Counted(nn.Module):
    """A network that counts its forward passes and the backward passes through it.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.noise_label: str = getattr(network, "noise_label", "time")
        self.forward_passes = self.backward_passes = 0

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        self.forward_passes += 1
        answer: Tensor = self.network(x, c_noise, label)
        if answer.requires_grad:
            answer.register_hook(self._passed)
        return answer

    def _passed(self, gradient: Tensor) -> None:
        self.backward_passes += 1


class ExactEps(nn.Module):
    """The network that predicts the noise perfectly.

    Args:
        denoiser: knows it.
    """

    noise_label = "time"

    def __init__(self, denoiser: AbstractDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return self.denoiser.eps(x, c_noise.double() * (self.denoiser.sde.T / 999))


@dataclass(frozen=True)
class Case:
    """A model and examples to find the density of.

    Args:
        name: of the case.
        denoiser: in float32, its network a `Counted`.
        x: (B, ...) float64.
        probes: (B, 1, ...).
        reference: log p of the examples with these probes, (B,) float64.
    """

    name: str
    denoiser: Denoiser
    x: Tensor
    probes: Tensor
    reference: Tensor

    @classmethod
    def of(cls, name: str, denoiser: Denoiser, x: Tensor, score: str = "exact") -> Case:
        """The case of a denoiser whose `score` is one of `TIGHT`; in float32 it is widened for the reference."""
        probes = Hutchinson().draw(0, range(len(x)), x.double())
        tight = SOLVERS.get("dopri5")(rtol=TIGHT[score], atol=TIGHT[score])
        exact = deepcopy(denoiser).double()
        reference = log_prob(exact, x, solver=tight, divergence=Hutchinson(), probes=probes).log_prob
        counted = Denoiser(Counted(deepcopy(denoiser.network).float()), denoiser.sde, denoiser.parameterization)
        return cls(name, counted.requires_grad_(False), x.double(), probes, reference)

    @property
    def network(self) -> Counted:
        """The network that counts."""
        assert isinstance(self.denoiser.network, Counted)
        return self.denoiser.network

    def ours(self, solver: Solver, steps: int | None = None) -> Tensor:
        """log p by the package."""
        found = log_prob(self.denoiser, self.x, solver=solver, divergence=Hutchinson(), probes=self.probes, steps=steps)
        return found.log_prob

    def original(self, tolerance: float) -> Tensor:
        """log p by the original."""
        return original_log_prob(self.denoiser, self.x, self.probes[:, 0], tolerance, tolerance).log_prob


class Method(NamedTuple):
    """A way to log p: its row, and that of the original it is held against (its place in the list of methods)."""

    name: str
    setting: str
    run: Callable[[Case], Tensor]
    base: int


def methods(tolerances: Sequence[float], steps: Sequence[int], stepping: Sequence[str] = STEPPING) -> list[Method]:
    """What is compared: at each tolerance the original first."""
    found: list[Method] = []
    for tolerance in tolerances:
        base, setting = len(found), f"{tolerance:.0e}"
        options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
        found.append(Method("original", setting, partial(Case.original, tolerance=tolerance), base))
        for name, solver in (
            ("adams_adaptive", SOLVERS.get("adams_adaptive")(**options)),
            ("dopri5", SOLVERS.get("dopri5")(**options)),
            ("ode", SOLVERS.get("ode")(**options)),
            ("ode, jointly", SOLVERS.get("ode")(per_sample=False, **options)),
        ):
            found.append(Method(name, setting, partial(Case.ours, solver=solver), base))
    base = next((i for i, m in enumerate(found) if m.setting == "1e-05"), 0)
    for name in stepping:
        solver = SOLVERS.get(name)()
        for n in steps:
            found.append(Method(name, f"{n} steps", partial(Case.ours, solver=solver, steps=n), base))
    return found


class Result(NamedTuple):
    """What one method took and gave.

    Attributes:
        forward, backward: passes of the network on a batch.
        seconds: of each round.
        error: of log p in nats per dimension, (B,).
    """

    forward: int
    backward: int
    seconds: list[float]
    error: Tensor


def measure(case: Case, compared: Sequence[Method], rounds: int) -> list[Result]:
    """Run the methods in turns."""
    results = [run_once(case, method) for method in compared]  # not counted: the first touches memory
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with progress_bar(rounds * len(compared), desc=case.name, unit="run") as bar:
        for _ in range(rounds):
            for method, result in zip(compared, results, strict=True):
                start = clock()
                method.run(case)
                result.seconds.append(clock() - start)
                bar.update()
    return results


def run_once(case: Case, method: Method) -> Result:
    """Passes and errors of a method."""
    network = case.network
    network.forward_passes = network.backward_passes = 0
    error = (method.run(case) - case.reference).abs() / case.x[0].numel()
    return Result(network.forward_passes, network.backward_passes, [], error)


def table(compared: Sequence[Method], results: Sequence[Result]) -> str:
    """One row for each method."""
    rows = []
    for method, result in zip(compared, results, strict=True):
        base = results[method.base]
        ratio = statistics.median(a / b for a, b in zip(result.seconds, base.seconds, strict=True))
        rows.append(
            [
                method.name,
                method.setting,
                str(result.forward),
                str(result.backward),
                f"{result.forward / base.forward:.2f}",
                f"{statistics.median(result.seconds):.3f}",
                f"{ratio:.2f}",
                f"{float(result.error.square().mean().sqrt()):.1e}",
                f"{float(result.error.max()):.1e}",
            ]
        )
    head = ["method", "tolerance or steps", "forward", "backward", "of original's calls", "seconds"]
    return markdown_table([*head, "of its time", "error, rms", "largest"], rows)


# Cases


def gaussian_case(sde: SDE, std: float, batch: int, shape: tuple[int, ...] = (3, 32, 32)) -> Case:
    """N(0, std^2 I)."""
    data = GaussianDenoiser(sde, torch.zeros(shape, dtype=torch.float64), torch.tensor(std**2, dtype=torch.float64))
    x = data.sample(batch, torch.Generator().manual_seed(0))
    return Case.of(f"gaussian {std:g}", Denoiser(ExactEps(data), sde, Eps()), x)


def mixture_case(sde: SDE, batch: int, numel: int = 64) -> Case:
    """Unequal modes; the examples carry the noise of t_min."""
    data = unequal(sde, numel)
    generator = torch.Generator().manual_seed(0)
    x = data.sample(batch, generator)
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    x = sde.perturb(x, torch.full((batch,), sde.t_min, dtype=torch.float64), z)
    return Case.of("mixture", Denoiser(ExactEps(data), sde, Eps()), x)


def run_case(name: str, run: Run, batch: int) -> Case:
    """Held-out examples of a trained run, dequantized where they are pictures."""
    checkpoint = open_checkpoint(run, "latest")
    denoiser, info = restore_denoiser(checkpoint)
    values = build(checkpoint.content["config"]["data"], "data").split("test").values
    generator = torch.Generator().manual_seed(0)
    x = values[torch.randperm(len(values), generator=generator)[:batch]]
    if info.kind == "pixels":
        u = torch.rand(x.shape, generator=generator, dtype=torch.float64)
        x = Quantization.of(info).dequantize(x, u)
    return Case.of(name, denoiser, x, score="trained")


def train(process: str, folder: Path, steps: int, settings: Sequence[str] = TRAINING) -> Run:
    """A small network, if it is not there already."""
    run = Run(folder)
    known = list_checkpoints(run.checkpoints)
    if not known or known[-1][0] < steps:
        words = [f"sde={process}", f"model={MODELS.get(process, 'ddpmpp')}", *settings, f"training.steps={steps}"]
        words += [f"training.checkpoint_every={steps}", f"training.validate_every={steps}", f"hydra.run.dir={folder}"]
        done = subprocess.run([sys.executable, "-m", "sde.train", *words], check=False)
        if done.returncode or not list_checkpoints(run.checkpoints):
            raise UserError(f"training {folder} ended before its last step: start again")
    return run


def make_cases(options: argparse.Namespace) -> list[Case]:
    """What the command line asks for."""
    found = []
    for process in options.sdes:
        sde = SDES.get(process)()
        for target in options.targets:
            if target == "gaussian":
                found += [gaussian_case(sde, std, options.batch) for std in (0.5, 0.25)]
            elif target == "mixture":
                found.append(mixture_case(sde, options.batch))
            elif target == "network":
                run = train(process, Path(options.out).resolve() / process, options.training_steps)
                found.append(run_case("network", run, options.batch))
    if options.run is not None:
        found.append(run_case("run", find_run(options.run), options.batch))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=[*TARGETS, "run"])
    parser.add_argument("--sdes", nargs="+", default=["vp", "ve"], metavar="NAME", help="processes of the targets")
    parser.add_argument("--run", metavar="RUN", help="the folder of a trained run, which is measured too")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3])
    parser.add_argument("--steps", type=int, nargs="*", default=[50, 100], help="of solvers with a fixed number")
    parser.add_argument("--batch", type=int, default=8, help="examples")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--training-steps", type=int, default=300)
    parser.add_argument("--out", metavar="FOLDER", default="runs/likelihood", help="of the networks it trains")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    try:
        for name in ("batch", "rounds", "threads", "training_steps"):
            check_number(f"--{name.replace('_', '-')}", getattr(options, name), at_least=1)
        if "run" in options.targets and options.run is None:
            raise UserError("--targets run needs a run to measure: give --run")
        torch.set_num_threads(options.threads)
        compared = methods(options.tolerances, options.steps)
        print(f"{options.rounds} rounds, {options.threads} thread(s), torch {torch.__version__}")
        for case in make_cases(options):
            shape = " x ".join(map(str, case.x.shape))
            results = measure(case, compared, options.rounds)
            what = f"{case.name}, {type(case.denoiser.sde).__name__}, {shape}"
            print(f"\n{what}\n\n{table(compared, results)}", flush=True)
    except UserError as error:
        parser.error(str(error))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
