"""`python -m sde.decode`: samples from latent codes, and what lies between two of them.

Codes come from a file of `python -m sde.encode`, or are the noise that `python -m sde.sample` starts from with a seed.
Which of the two says how they are decoded: a file along the way on which they were encoded, from T to the SDE's t_min
in float64; a seed as `sde.sample` does, from T to `t_min_sampling` in float32 and with a denoising step at the end, so
that the same solver gives the same samples.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde.cli import run_command
from sde.commands import (
    Model,
    carry_all,
    check_finite,
    check_settings,
    chosen_grid,
    class_labels,
    condition,
    describe_way,
    new_folder,
    open_model,
    whole_folder,
    write_samples,
)
from sde.config import build
from sde.data import DataInfo
from sde.density import decode, times_to_noise
from sde.density.flow import dtype_of
from sde.devices import autocast, pick_device
from sde.errors import UserError, check_choice, check_number
from sde.files import write_json
from sde.grids import Grid
from sde.latents import INTERPOLATIONS, Carry, Latents, Progress, check_fit, in_batches, interpolate, read_latents
from sde.pictures import Path2D, save_grid, save_panels, save_paths, save_rows, save_scatter
from sde.randomness import MASK, SampleNoise
from sde.reverse import ReverseProcess
from sde.sampling import denoised_at_the_end, make_times
from sde.solvers import SOLVERS, Solver

_N = 64  # latents of a seed, unless told otherwise
_SHOWN = 256  # pictures in a grid
_WIDE = 16  # pictures in a row
_GROUND = 500  # points behind paths


def main() -> None:
    """Entry point of the command line."""
    run_command("decode", decode_latents)


def decode_latents(config: dict[str, Any]) -> None:
    """Decode latent codes as `config` says and write samples and pictures into a new folder."""
    given = None if config["latents"] is None else Path(str(config["latents"])).expanduser()
    denoise = given is None if config["denoise"] is None else config["denoise"]
    check_settings({**config, "n": _N if config["n"] is None else config["n"], "denoise": denoise})
    wish = chosen_wish(config)
    device = pick_device(config["device"])
    solver: Solver = build(config["solver"], "solver")
    grid = chosen_grid(config)
    latents = None if given is None else read_latents(given)
    model = open_model(config, device)
    carry, times = way_back(model, solver, grid, config["steps"], denoise, from_file=given is not None)
    codes: FileCodes | SeedCodes
    if latents is not None and given is not None:
        check_fit(latents, model.denoiser.sde, model.info.shape, given)
        codes = FileCodes(latents, given)
    else:
        codes = SeedCodes(config["seed"], model, device)
    z, labels, rows = frames_of(wish, codes, config["label"], model)

    folder = new_folder(model.run, config["out"], default_name(solver, times, given, config["seed"]))
    with whole_folder(folder):
        started = time.perf_counter()
        x, nfe = carry_all("decoding", carry, z, labels, config, device)
        seconds = time.perf_counter() - started
        check_finite(x, "samples")
        samples = model.info.decode(x)
        write_samples(folder / "samples.npz", samples, model.info, labels)
        facts = {
            "n": len(samples),
            "latents": None if given is None else str(given),
            "encoded_by": codes.encoded_by,
            "seed": config["seed"] if given is None else None,
            "interpolation": wish.interpolation if wish.pairs else None,
            "rows": [
                {"pair": row.pair, "temperature": row.temperature, "first": row.first, "n": row.n} for row in rows
            ],
            "label": config["label"],
            "denoise": denoise,
            **describe_way(solver, grid, times),
            "times": times,
            "nfe": max(nfe),
            "nfe_per_batch": nfe,
            "seconds": round(seconds, 3),
            "batch_size": config["batch_size"],
            "precision": config["precision"],
            "device": str(device),
            "checkpoint": str(model.checkpoint.path),
            "ema": config["ema"],
        }
        write_json(folder / "info.json", facts)
        ground = None
        if wish.pairs and model.info.shape == (2,):
            with autocast(device, config["precision"]):
                ground = ground_of(carry, config["label"], config["batch_size"], model, device)
        draw_pictures(folder, samples, z / model.denoiser.sde.prior_std, rows, model.info, ground)
    print(
        f"{len(samples)} samples in {seconds:.1f} s, {max(nfe)} evaluations each, from {model.checkpoint.path}"
        + ("" if given is None else f" and {given}")
    )
    for file in sorted(folder.iterdir()):
        print(file)


# What is asked for


@dataclass(frozen=True)
class Wish:
    """What is to be decoded.

    Args:
        n: how many codes, or None for all.
        pairs: numbers of codes to go between; when there are any, `n` says nothing.
        points: of an interpolation.
        interpolation: its kind.
        temperatures: what codes are multiplied by, one set for each.
    """

    n: int | None
    pairs: tuple[tuple[int, int], ...]
    points: int
    interpolation: str
    temperatures: tuple[float, ...]


def chosen_wish(config: Mapping[str, Any]) -> Wish:
    """The options that say what is decoded.

    Raises:
        UserError: for the first that has no meaning.
    """
    temperatures = config["temperature"] if isinstance(config["temperature"], list) else [config["temperature"]]
    if not temperatures:
        raise UserError("temperature=[] leaves nothing to decode: write temperature=1, or temperature=[0.8,1]")
    for temperature in temperatures:
        check_number("temperature", temperature, above=0)
    if not isinstance(config["points"], int) or isinstance(config["points"], bool):
        raise UserError(f"points={config['points']!r} must be a whole number")
    check_number("points", config["points"], at_least=2)
    check_choice("interpolation", config["interpolation"], INTERPOLATIONS)
    pairs = chosen_pairs(config["interpolate"])
    return Wish(
        config["n"], pairs, config["points"], config["interpolation"], tuple(float(value) for value in temperatures)
    )


def chosen_pairs(interpolate: Any) -> tuple[tuple[int, int], ...]:
    """Pairs of numbers from [a, b] or [[a, b], [c, d], ...]; none from None."""
    if interpolate is None:
        return ()
    nested = isinstance(interpolate, list) and bool(interpolate) and all(isinstance(p, list) for p in interpolate)
    pairs = interpolate if nested else [interpolate]
    for pair in pairs:
        whole = isinstance(pair, list) and all(isinstance(k, int) and not isinstance(k, bool) for k in pair)
        if not whole or len(pair) != 2:
            raise UserError(
                f"interpolate={interpolate!r} is no pair of numbers of latents: write interpolate=[0,1], or "
                "interpolate=[[0,1],[2,5]]"
            )
        if pair[0] == pair[1]:
            raise UserError(f"interpolate={interpolate!r} goes from {pair[0]} to itself: name two different latents")
    return tuple((pair[0], pair[1]) for pair in pairs)


# Where codes come from


class FileCodes:
    """The codes of a file."""

    def __init__(self, latents: Latents, path: Path) -> None:
        self.latents, self.path = latents, path
        self.encoded_by = latents.about.get("checkpoint")

    def count(self, n: int | None) -> int:
        """How many are meant by `n`."""
        if n is not None and n > len(self.latents):
            raise UserError(f"n={n} is more than {self.path} has: it holds {len(self.latents)} latents")
        return len(self.latents) if n is None else n

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Codes (N, *shape)."""
        beyond = [k for k in numbers if not 0 <= k < len(self.latents)]
        if beyond:
            raise UserError(
                f"interpolate names latent {beyond[0]}, and {self.path} has numbers 0 to {len(self.latents) - 1}"
            )
        return self.latents.values[torch.tensor(numbers)]

    def labels(self, numbers: Sequence[int], label: Any, model: Model) -> Tensor | None:
        """Their classes (N,), those of the file unless `label` names others."""
        found = None if self.latents.labels is None else self.latents.labels[torch.tensor(numbers)]
        return condition(label, found, len(numbers), model, str(self.path))


class SeedCodes:
    """The noise from which `python -m sde.sample` draws the samples of a seed."""

    encoded_by = None

    def __init__(self, seed: int, model: Model, device: torch.device) -> None:
        self.seed, self.model, self.device = seed, model, device

    def count(self, n: int | None) -> int:
        """How many are meant by `n`."""
        return _N if n is None else n

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Codes (N, *shape) of samples number `numbers`."""
        beyond = [k for k in numbers if not 0 <= k <= MASK]
        if beyond:
            raise UserError(f"interpolate names sample {beyond[0]}, and a seed has numbers 0 to {MASK}")
        noise = SampleNoise(self.seed, list(numbers), self.model.info.shape, device=self.device)
        return (noise() * self.model.denoiser.sde.prior_std).cpu()

    def labels(self, numbers: Sequence[int], label: Any, model: Model) -> Tensor | None:
        """The classes (N,) that `sde.sample` gives them."""
        names = label if isinstance(label, list) else None
        period = len(names) if names else int(getattr(model.denoiser.network, "num_classes", 0)) or 1
        cycle = class_labels(label, period, model.denoiser, model.info)
        return None if cycle is None else cycle[torch.tensor([k % period for k in numbers])]


@dataclass(frozen=True)
class Row:
    """Frames that belong together: numbers `first` to `first` + `n` - 1 of all, and what they are."""

    pair: tuple[int, int] | None
    temperature: float
    first: int
    n: int


def frames_of(
    wish: Wish, codes: FileCodes | SeedCodes, label: Any, model: Model
) -> tuple[Tensor, Tensor | None, list[Row]]:
    """All codes to decode (M, *shape), their classes (M,) or None, and the rows that they make.

    A point between two codes is given the class of the nearer one, the first half-way.
    """
    parts: list[tuple[tuple[int, int] | None, Tensor, Tensor | None]] = []
    if wish.pairs:
        weights = torch.linspace(0, 1, wish.points, dtype=torch.float64)
        for pair in wish.pairs:
            ends, classes = codes(pair), codes.labels(pair, label, model)
            between = interpolate(ends[0], ends[1], weights, wish.interpolation)
            parts.append((pair, between, None if classes is None else classes[(weights > 0.5).long()]))
    else:
        numbers = range(codes.count(wish.n))
        parts.append((None, codes(numbers), codes.labels(numbers, label, model)))
    frames: list[Tensor] = []
    rows: list[Row] = []
    for temperature in wish.temperatures:
        for which, values, _ in parts:
            rows.append(Row(which, temperature, sum(len(part) for part in frames), len(values)))
            frames.append(values * temperature)
    found = [classes for _, _, classes in parts if classes is not None]
    return torch.cat(frames), torch.cat(found * len(wish.temperatures)) if found else None, rows


# The way


def way_back(
    model: Model, solver: Solver, grid: Grid | None, steps: int | None, denoise: bool, *, from_file: bool
) -> tuple[Carry, list[float]]:
    """What decodes a batch of codes, and the times that it goes along.

    Raises:
        UserError: for a solver that draws noise, or a grid that means nothing to it.
    """
    denoiser, sde = model.denoiser, model.denoiser.sde
    if solver.stochastic:
        raise UserError(
            f"solver={SOLVERS.name_of(type(solver))} draws noise on its way, and a latent code leads to one sample "
            "without any: take one of the probability-flow ODE, such as dopri5, heun or adams, without noise"
        )
    if from_file:
        times = times_to_noise(solver, sde, grid, steps)[::-1]

        @torch.no_grad()
        def back(z: Tensor, label: Tensor | None, progress: Progress | None) -> tuple[Tensor, int]:
            x, nfe = decode(denoiser, z, solver=solver, grid=grid, steps=steps, label=label, progress=progress)
            if not denoise:
                return x, nfe
            return denoiser.denoised(x.to(dtype_of(denoiser)), times[-1], label), nfe + 1

        return back, times
    place = make_times(solver, denoiser, grid, steps)
    last = denoised_at_the_end(solver, denoiser, place) if denoise else solver

    def sampled(z: Tensor, label: Tensor | None, progress: Progress | None) -> tuple[Tensor, int]:
        def told(share: float, _t: float, _x: Tensor | None) -> None:
            if progress is not None:
                progress(share)

        solution = last.solve(ReverseProcess(denoiser, label), z, place, None, told)
        return solution.x, solution.nfe

    return sampled, list(place)


def default_name(solver: Solver, times: Sequence[float], given: Path | None, seed: int) -> str:
    """What a folder of decoded samples is called."""
    steps = "" if solver.default_steps is None else f"-{len(times) - 1}"
    where = f"seed{seed}" if given is None else given.parent.name if given.is_file() else given.name
    return f"decode-{SOLVERS.name_of(type(solver))}{steps}-{where or 'latents'}"


# Pictures


def ground_of(carry: Carry, label: Any, batch_size: int, model: Model, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draws of the prior in the plane, over its deviation, and what they decode to: what paths are drawn over."""
    source, numbers = SeedCodes(0, model, device), range(_GROUND)
    z = source(numbers)
    x, _ = in_batches(carry, z, batch_size, source.labels(numbers, label, model), device)
    return z / model.denoiser.sde.prior_std, x.float()


def draw_pictures(
    folder: Path,
    samples: Tensor,
    unit: Tensor,
    rows: Sequence[Row],
    info: DataInfo,
    ground: tuple[Tensor, Tensor] | None,
) -> None:
    """grid.png; interpolation.png where there are pairs, temperatures.png where there are several temperatures."""
    between, several = rows[0].pair is not None, len({row.temperature for row in rows}) > 1
    name = "interpolation.png" if between else "temperatures.png"
    captioned = [(caption(row, several), samples[row.first : row.first + row.n]) for row in rows]
    if info.kind == "pixels":
        save_grid(folder / "grid.png", samples[:_SHOWN], columns=rows[0].n if between else None)
        if between or several:
            save_rows(folder / name, [(text, part if between else part[:_WIDE]) for text, part in captioned])
    elif info.shape == (2,):
        save_scatter(folder / "grid.png", samples, title=f"{len(samples)} samples")
        if between and ground is not None:
            lines = [[part[row.first : row.first + row.n] for row in rows] for part in (unit, samples)]
            captions = [text for text, _ in captioned]
            titles = ("latents / prior deviation", "samples")
            panels = [Path2D(t, g, line) for t, g, line in zip(titles, ground, lines, strict=True)]
            save_paths(folder / name, panels, captions)
        elif several:
            save_panels(folder / name, captioned, columns=min(4, len(captioned)))


def caption(row: Row, several: bool) -> str:
    """What stands beside a row."""
    between = "" if row.pair is None else f"{row.pair[0]} to {row.pair[1]}"
    heat = f"temperature {row.temperature:g}" if several else ""
    return "\n".join(text for text in (between, heat) if text)


if __name__ == "__main__":
    main()
