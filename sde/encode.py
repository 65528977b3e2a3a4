"""`python -m sde.encode`: the latent codes of pictures, and how well they decode again.

Data at the SDE's t_min are carried to noise by the probability-flow ODE (`sde.density.encode`); the way back from the
codes, as they are written to the file, measures solver and network together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde.cli import add_data_overrides, run_command
from sde.commands import (
    Model,
    carry_all,
    check_finite,
    check_settings,
    chosen_grid,
    condition,
    describe_way,
    new_folder,
    open_model,
    run_dataset,
    whole_folder,
)
from sde.config import build
from sde.data import DATASETS, DataInfo
from sde.density import decode, encode, times_to_noise
from sde.devices import pick_device
from sde.errors import UserError, check_choice, check_flag
from sde.files import write_json
from sde.latents import (
    FILE,
    Carry,
    Latents,
    Progress,
    normality,
    read_arrays,
    round_trip_error,
    sde_facts,
    write_latents,
)
from sde.pictures import save_panels, save_rows
from sde.solvers import Solver

_N = 64  # of a split, unless told otherwise
_SHOWN = 16  # pictures in a row


def main() -> None:
    """Entry point of the command line."""
    add_data_overrides()
    run_command("encode", encode_examples)


def encode_examples(config: dict[str, Any]) -> None:
    """Encode examples as `config` says and write their latent codes into a new folder."""
    check_settings({**config, "n": _N if config["n"] is None else config["n"], "seed": 0, "denoise": False})
    check_flag("round_trip", config["round_trip"])
    split = config["data"].get("split", config["split"])
    check_choice("split", split, ("train", "test"))
    data = {key: value for key, value in config["data"].items() if key != "split"}
    config = {**config, "split": split, "data": data}
    device = pick_device(config["device"])
    solver: Solver = build(config["solver"], "solver")
    grid = chosen_grid(config)
    model = open_model(config, device)
    sde, info = model.denoiser.sde, model.info
    times = times_to_noise(solver, sde, grid, config["steps"])
    examples = chosen_examples(config, model)
    labels = condition(config["label"], examples.labels, len(examples), model, examples.source)

    folder = new_folder(model.run, config["out"], examples.name, "latents")
    with whole_folder(folder):
        started = time.perf_counter()
        way: dict[str, Any] = {"solver": solver, "grid": grid, "steps": config["steps"]}

        def carry(values: Tensor, label: Tensor | None, progress: Progress | None) -> tuple[Tensor, int]:
            x = info.encode(values, torch.float64)
            return encode(model.denoiser, x, label=label, progress=progress, **way)

        z, nfe = carry_all("encoding", carry, examples.values, labels, config, device)
        seconds = time.perf_counter() - started
        check_finite(z)
        kept = examples.labels if labels is None else labels
        about = {
            "sde": sde_facts(sde),
            "prior_std": sde.prior_std,
            "shape": list(info.shape),
            "checkpoint": str(model.checkpoint.path),
            "source": examples.source,
        }
        latents = Latents(z.float(), kept, examples.indices, about)
        back = None
        if config["round_trip"]:
            reverse: Carry = lambda z, label, progress: decode(  # noqa: E731
                model.denoiser, z, label=label, progress=progress, **way
            )
            back, _ = carry_all("decoding", reverse, latents.values, labels, config, device)
        facts = {
            "n": len(latents),
            **about,
            "ema": config["ema"],
            "label": config["label"],
            **describe_way(solver, grid, times),
            "nfe": max(nfe),
            "nfe_per_batch": nfe,
            "seconds": round(seconds, 3),
            "batch_size": config["batch_size"],
            "precision": config["precision"],
            "device": str(device),
            "normality": normality(latents.values, sde.prior_std),
            "round_trip": None if back is None else round_trip_error(examples.values, back, info),
        }
        write_latents(folder / FILE, latents)
        write_json(folder / "info.json", facts)
        draw_pictures(folder, examples.values, latents.values / sde.prior_std, back, info)
    print(summary(facts))
    for file in sorted(folder.iterdir()):
        print(file)


# Examples


@dataclass(frozen=True)
class Examples:
    """What is to be encoded.

    Args:
        values: uint8 (N, C, H, W) or float32 (N, *shape), as they are stored.
        labels: (N,) or None.
        indices: which of the source they are, (N,).
        source: where they come from, in words.
        name: what to call a folder of them.
    """

    values: Tensor
    labels: Tensor | None
    indices: Tensor
    source: str
    name: str

    def __len__(self) -> int:
        return len(self.values)


def chosen_examples(config: Mapping[str, Any], model: Model) -> Examples:
    """The examples that `input`, or `data` and `split`, and `n` or `indices` name.

    Raises:
        UserError: when they cannot be had, do not look as the network expects them, or are too few.
    """
    if config["input"] is not None:
        path = Path(str(config["input"])).expanduser()
        values, labels = read_folder(path, model.info) if path.is_dir() else read_samples(path, model.info)
        source, name, most = f"input={path}", path.stem or "input", len(values)
    else:
        dataset = run_dataset(model, config["data"])
        split = dataset.split(config["split"])
        values, labels = split.values, split.labels
        source, name, most = f"the {config['split']} split of {dataset.info.name}", config["split"], _N
    if not len(values):
        raise UserError(f"{source} is empty: take another split, or another data set")
    if config["indices"] is not None:
        numbers = chosen_indices(config["indices"], len(values), source)
    else:
        n = min(most, len(values)) if config["n"] is None else config["n"]
        if n > len(values):
            raise UserError(f"n={n} is more than {source} has: it holds {len(values)}")
        numbers = list(range(n))
    rows = torch.tensor(numbers)
    chosen = values[rows]
    if not bool(torch.isfinite(chosen).all()):
        raise UserError(f"{source} holds values that are not finite: remove those examples")
    return Examples(chosen, None if labels is None else labels[rows], rows, source, f"{name}-{len(rows)}")


def chosen_indices(indices: Any, n: int, source: str) -> list[int]:
    """`indices` of `n` examples, checked."""
    if not isinstance(indices, list) or not indices:
        raise UserError(f"indices={indices!r} is not a list of numbers: write indices=[3,14]")
    for k in indices:
        if not isinstance(k, int) or isinstance(k, bool) or not 0 <= k < n:
            raise UserError(f"indices holds {k!r}, and {source} has examples 0 to {n - 1}")
    if len(set(indices)) < len(indices):
        raise UserError(f"indices={indices} names an example twice: name each once")
    return indices


def read_samples(path: Path, info: DataInfo) -> tuple[Tensor, Tensor | None]:
    """`samples` and `labels` of a file as `python -m sde.sample` writes it, as they are stored in data sets."""
    arrays = read_arrays(path, "input")
    if "samples" not in arrays:
        raise UserError(f"input={path} has no array `samples` (but {', '.join(arrays) or 'none'}): name it so")
    samples = torch.from_numpy(arrays["samples"]) if arrays["samples"].dtype.kind in "uif" else torch.empty(0)
    wanted = torch.uint8 if info.kind == "pixels" else torch.float32
    shape = (*info.shape[1:], info.shape[0]) if info.kind == "pixels" else tuple(info.shape)
    if samples.dtype != wanted or samples.shape[1:] != shape or not len(samples):
        raise UserError(
            f"the samples in {path} are {arrays['samples'].dtype} of shape {arrays['samples'].shape}: this run takes "
            f"{str(wanted).removeprefix('torch.')} of shape (N, {', '.join(map(str, shape))})"
        )
    labels = arrays.get("labels")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (len(samples),)):
        raise UserError(f"the labels in {path} are {labels.dtype} of shape {labels.shape}: give one number a sample")
    values = samples.permute(0, 3, 1, 2).contiguous() if info.kind == "pixels" else samples
    return values, None if labels is None else torch.from_numpy(labels.astype("int64"))


def read_folder(path: Path, info: DataInfo) -> tuple[Tensor, None]:
    """All pictures of a folder, brought to the size of the run's."""
    if info.kind != "pixels" or info.shape[1] != info.shape[2] or info.shape[0] not in (1, 3):
        raise UserError(
            f"input={path} is a folder, which can be read for square pictures in gray or color, and this run has "
            f"{info.kind} of shape {tuple(info.shape)}: give a .npz file with `samples`"
        )
    channels, side, _ = info.shape
    dataset = build(
        {"_target_": _IMAGES, "path": str(path), "size": side, "channels": channels, "labels": "none"}
        | {"test_fraction": 0.0},
        "data",
    )
    return dataset.split("train").values, None


_IMAGES = f"{DATASETS.get('images').__module__}.{DATASETS.get('images').__qualname__}"


# What is shown


def summary(facts: Mapping[str, Any]) -> str:
    """What is printed: cost, normality and round-trip error."""
    normal, trip = facts["normality"], facts["round_trip"]
    lines = [
        f"{facts['n']} latents in {facts['seconds']:.1f} s, {facts['nfe']} evaluations each, "
        f"from {facts['checkpoint']}",
        f"latents     mean {normal['mean']:.4f}, deviation {normal['std']:.4f} of the prior's; |z|^2 / D "
        f"{normal['squared_norm_mean']:.3f} +- {normal['squared_norm_spread']:.3f}, for draws of the prior "
        f"1 +- {normal['expected_spread']:.3f}",
    ]
    if trip is not None:
        lines.append(f"round trip  rms {trip['rms']:.1e}, largest {trip['max']:.1e} in the network's units")
        if "exact" in trip:
            lines[-1] += f" ({trip['rms_gray_levels']:.1e} and {trip['max_gray_levels']:.1e} gray levels)"
            lines.append(f"            {100 * trip['exact']:.4g} % of the pixels come back as they were")
    return "\n".join(lines)


def draw_pictures(folder: Path, values: Tensor, unit: Tensor, back: Tensor | None, info: DataInfo) -> None:
    """round_trip.png (latents.png without a way back): data, latents, what they decode to, and the difference."""
    file = folder / ("latents.png" if back is None else "round_trip.png")
    difference = None if back is None else back - info.encode(values, torch.float64)
    if info.kind == "pixels":
        rows = [("data", values[:_SHOWN]), ("latents\n-3 to 3 prior deviations", shaded(unit[:_SHOWN], 3.0))]
        if back is not None and difference is not None:
            part = difference[:_SHOWN]
            factor = magnification(part, (info.high - info.low) / 2)
            rows += [
                ("decoded", info.decode(back[:_SHOWN])),
                (f"difference x {factor:g}", shaded(part, (info.high - info.low) / 2 / factor)),
            ]
        save_rows(file, rows)
    elif info.shape == (2,):
        panels = [("data", values), ("latents / 2 prior deviations", unit / 2)]  # as wide as data should be
        if back is not None and difference is not None:
            factor = magnification(difference, 1.0)
            panels += [("decoded", back.float()), (f"difference x {factor:g}", difference.float() * factor)]
        save_panels(file, panels, columns=len(panels))


def shaded(x: Tensor, most: float) -> Tensor:
    """uint8 pixels: middle gray for 0, black and white for -`most` and `most`."""
    return (127.5 * (1 + x / most)).round().clamp(0, 255).to(torch.uint8)


def magnification(difference: Tensor, most: float) -> float:
    """The factor among 1, 2, 5, 10, ... that brings the largest difference nearest to `most` from below."""
    largest = float(difference.abs().max())
    if not 0 < largest < most:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most / largest))
    return max(step * power for step in (1, 2, 5) if step * power * largest <= most)


if __name__ == "__main__":
    main()
