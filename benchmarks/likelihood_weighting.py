r"""Whether training for the likelihood gives better likelihoods, everything else the same.

    python -m benchmarks.likelihood_weighting                       # MNIST is downloaded; half an hour on a CPU core
    python -m benchmarks.likelihood_weighting --mnist FOLDER        # the folder of the four files of MNIST
    python -m benchmarks.likelihood_weighting --lr 1e-3 2e-3 4e-3   # each objective at several learning rates
    python -m benchmarks.likelihood_weighting --set parameterization.noise_label=log_sigma      # for all runs

The objectives (arXiv 2101.09258), both on the sub-VP process:

    likelihood   lambda = g^2, which bounds -log p, with times drawn in proportion to its weights
    sigma2       lambda = sigma^2, equal weight on the error of eps, with uniform times

Data are MNIST's digits at 14 pixels, means of 2 x 2, dequantized. For each seed both objectives train the same network
from the same weights on the same batches, with the same optimizer; gradients are clipped at the norm that the mean
weight of the loss is, 1 for sigma2. Measured are held-out digits, with the averaged weights:

    ODE     bits per dimension of uniformly dequantized pictures by the probability-flow ODE (`sde.density.flow`)
    bound   the continuous variational bound on the same (`sde.density.bound`), and its integral by noise level

All runs see the same pictures, noise and probes, so that differences of runs are those of single pictures, whose
spread is small. The error of a mean over pictures is their standard deviation by the square root of their number; that
of the mean over seeds comes from the differences between seeds, and is the one that says whether training again would
give the same answer. Runs that are there already are not trained again.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import markdown_table, replace_section
from sde.data.mnist import MNIST
from sde.data.npz import Npz
from sde.density.bound import continuous_bound, quantile
from sde.density.flow import log_prob
from sde.density.quantization import Quantization, bits_per_dim
from sde.errors import UserError, check_number
from sde.files import atomic_write, write_json
from sde.processes import SDES
from sde.progress import progress_bar
from sde.runs import Run, open_checkpoint, restore_denoiser
from sde.solvers.adams import Adams
from sde.training.checkpoint import list_checkpoints

OBJECTIVES = {"likelihood": ("likelihood", "importance"), "sigma2": ("sigma2", "uniform")}
NETWORK = [
    "model=ddpmpp",
    "model.channels=16",
    "model.channel_multipliers=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[]",
    "model.dropout=0.0",
]
MEASURES = ("ODE", "bound")
STRATA = 16
SOLVER, SOLVER_STEPS = Adams(), 100  # about 0.001 bits per dimension from tight tolerances
SEED = 0  # of the pictures that are measured, their noise and the probes


@dataclass(frozen=True)
class Trial:
    """One run.

    Args:
        objective: one of `OBJECTIVES`.
        lr: learning rate.
        seed: of initialization, batches, noise and times.
    """

    objective: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.objective}_lr{self.lr:g}_seed{self.seed}"


def mean_weight(objective: str, process: str = "subvp") -> float:
    """The mean over uniform t of w(t): the loss of a network that says 0."""
    sde, (weighting, time) = SDES.get(process)(), OBJECTIVES[objective]
    if weighting == "sigma2":
        return 1.0
    assert weighting == "likelihood", time
    # w = g^2 / sigma^2 = -d log SNR / dt
    return float(sde.log_snr(sde.t_min) - sde.log_snr(sde.T)) / (sde.T - sde.t_min)


def write_digits(path: Path, root: str | None) -> None:
    """MNIST at 14 pixels as x_train and x_test, (N, 14, 14) uint8: means of 2 x 2 pixels."""
    mnist = MNIST(root=root, size=28)
    arrays = {}
    for name in ("train", "test"):
        values = mnist.split(name).values.float()
        arrays[f"x_{name}"] = torch.nn.functional.avg_pool2d(values, 2).round().to(torch.uint8)[:, 0].numpy()
    with atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def overrides(trial: Trial, data: Path, options: argparse.Namespace) -> list[str]:
    """The command line of `sde.train` for one run."""
    weighting, time = OBJECTIVES[trial.objective]
    every = max(options.steps // 5, 1)
    return [
        "sde=subvp",
        *NETWORK,
        "data=npz",
        f"data.path='{data}'",
        "training.dequantize=true",
        f"loss.weighting={weighting}",
        f"loss.time={time}",
        f"optimizer.lr={trial.lr:g}",
        f"training.clip={mean_weight(trial.objective):.4g}",
        f"training.seed={trial.seed}",
        f"training.steps={options.steps}",
        f"training.batch_size={options.batch_size}",
        f"training.warmup={min(100, options.steps // 4)}",
        f"training.validate_every={every}",
        f"training.checkpoint_every={every}",
        "training.keep=1",
        "training.preview_every=0",
        "training.device=cpu",
        "ema.decay=0.995",
        *options.set,
    ]


def train(trial: Trial, run: Run, data: Path, options: argparse.Namespace) -> None:
    """Train one run, or what is left of it."""
    known = list_checkpoints(run.checkpoints)
    if known and known[-1][0] >= options.steps:
        return
    arguments = [f"resume={run.path}"] if known else [*overrides(trial, data, options), f"hydra.run.dir={run.path}"]
    done = subprocess.run([sys.executable, "-m", "sde.train", *arguments], check=False)
    if done.returncode or list_checkpoints(run.checkpoints)[-1][0] < options.steps:
        raise UserError(f"training {run.path} ended before its last step: start again to go on")


def held_out(data: Path, examples: int) -> tuple[Tensor, Quantization]:
    """Dequantized pictures (N, 1, 14, 14) of the test split, float64, and their gray levels."""
    dataset = Npz(str(data))
    values = dataset.split("test").values
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randperm(len(values), generator=generator)[:examples]
    quantization = Quantization.of(dataset.info)
    u = torch.rand(chosen.shape + values.shape[1:], generator=generator, dtype=torch.float64)
    return quantization.dequantize(values[chosen], u), quantization


@dataclass(frozen=True)
class Measured:
    """Bits per dimension of one run.

    Args:
        bits: of each picture, by each of `MEASURES`.
        levels: the mean over pictures of the bound's integral over each of `STRATA` equal ranges of the log-SNR, from
            the smallest noise level up.
    """

    bits: dict[str, list[float]]
    levels: list[float]


def measure(run: Run, x: Tensor, quantization: Quantization, batch: int = 128) -> Measured:
    """What the averaged weights of a run make of the pictures `x`, float64."""
    denoiser, _ = restore_denoiser(open_checkpoint(run, "latest"))
    bits: dict[str, list[float]] = {name: [] for name in MEASURES}
    levels: Tensor = torch.zeros(STRATA, dtype=torch.float64)
    numel = x[0].numel()
    with progress_bar(len(x), desc=f"measuring {run.path.name}", unit="picture") as bar:
        for numbers in torch.arange(len(x)).split(batch):
            part, indices = x[numbers], numbers.tolist()
            bound = continuous_bound(denoiser, part.float(), seed=SEED, indices=indices, points=STRATA)
            flow = log_prob(denoiser, part, solver=SOLVER, steps=SOLVER_STEPS, seed=SEED, indices=indices)
            for name, nats in (("ODE", flow.log_prob), ("bound", -bound.total)):
                bits[name] += bits_per_dim(nats, numel, quantization.width).tolist()
            levels += bound.terms.sum(0) / (len(x) * numel * math.log(2))
            bar.update(len(part))
    return Measured(bits, levels.tolist())


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, NaN for a single value."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan


def cell(mean: float, error: float, sign: str = "") -> str:
    """Both as a table shows them."""
    return f"{mean:{sign}.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def table_of_runs(results: Mapping[Trial, Measured]) -> str:
    """Bits per dimension of each run."""
    rows = [
        [trial.objective, f"{trial.lr:g}", str(trial.seed), *(cell(*mean_and_error(found.bits[m])) for m in MEASURES)]
        for trial, found in results.items()
    ]
    return markdown_table(["objective", "learning rate", "seed", *(f"{m}, bits/dim" for m in MEASURES)], rows)


def table_of_differences(results: Mapping[Trial, Measured]) -> str:
    """How much better the likelihood weighting is: for each seed the mean over pictures, and the mean of these."""
    rows = []
    for lr in dict.fromkeys(trial.lr for trial in results):
        means: dict[str, list[float]] = {m: [] for m in MEASURES}
        for seed in dict.fromkeys(trial.seed for trial in results):
            ours, theirs = (results[Trial(name, lr, seed)].bits for name in OBJECTIVES)
            pairs = {m: mean_and_error(np.subtract(theirs[m], ours[m]).tolist()) for m in MEASURES}
            rows.append([f"{lr:g}", str(seed), *(cell(*pairs[m], "+") for m in MEASURES)])
            for m in MEASURES:
                means[m].append(pairs[m][0])
        rows.append([f"{lr:g}", "mean", *(cell(*mean_and_error(means[m]), "+") for m in MEASURES)])
    return markdown_table(["learning rate", "seed", *(f"{m}, sigma2 - likelihood" for m in MEASURES)], rows)


def table_of_levels(results: Mapping[Trial, Measured]) -> str:
    """Where the bound's integral differs, means over seeds: bits per dimension of each range of noise levels."""
    sde = SDES.get("subvp")()
    edges = sde.noise_level(quantile(sde, torch.linspace(0, 1, STRATA + 1, dtype=torch.float64))).tolist()
    rows = []
    for lr in dict.fromkeys(trial.lr for trial in results):
        ours, theirs = (
            np.mean([found.levels for trial, found in results.items() if (trial.objective, trial.lr) == (name, lr)], 0)
            for name in OBJECTIVES
        )
        for k in range(STRATA):
            level = f"{edges[k]:.2g} to {edges[k + 1]:.2g}"
            rows.append([f"{lr:g}", level, f"{theirs[k]:.3f}", f"{ours[k]:.3f}", f"{theirs[k] - ours[k]:+.3f}"])
    return markdown_table(["learning rate", "sigma / alpha", "sigma2, bits/dim", "likelihood", "difference"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", metavar="FOLDER", help="of MNIST's files; without it they are in the cache")
    parser.add_argument("--data", metavar="FILE", help="pictures in a .npz with x_train and x_test, instead of MNIST")
    parser.add_argument("--out", metavar="FOLDER", default="runs/likelihood_weighting")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--examples", type=int, default=512, help="held-out pictures")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of sde.train for all runs")
    parser.add_argument("--docs", metavar="FILE", help="Markdown file to put the tables into")
    options = parser.parse_args(arguments)
    try:
        for name in ("seeds", "steps", "examples"):
            check_number(f"--{name}", getattr(options, name), at_least=1)
        out = Path(options.out).resolve()
        data = out / "mnist14.npz" if options.data is None else Path(options.data).resolve()
        if not data.is_file() and options.data is None:
            write_digits(data, options.mnist)
        trials = [Trial(name, lr, seed) for lr in options.lr for seed in range(options.seeds) for name in OBJECTIVES]
        for trial in trials:
            train(trial, Run(out / trial.name), data, options)
        x, quantization = held_out(data, options.examples)
        results = {trial: measure(Run(out / trial.name), x, quantization) for trial in trials}
    except UserError as error:
        parser.error(str(error))
    named = [{**asdict(trial), **asdict(found)} for trial, found in results.items()]
    write_json(out / "likelihood_weighting.json", named)
    text = (
        f"{len(x)} held-out pictures of {' x '.join(map(str, x.shape[1:]))}, {options.steps} steps of "
        f"{options.batch_size}{''.join(f', {setting}' for setting in options.set)}, torch {torch.__version__}\n\n"
        f"{table_of_runs(results)}\n\n{table_of_differences(results)}\n\n{table_of_levels(results)}"
    )
    print(text)
    if options.docs is not None:
        replace_section(Path(options.docs), "likelihood-weighting", text)


if __name__ == "__main__":
    main()
