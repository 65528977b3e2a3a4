r"""Latent codes: what lies between them, files of them, and how good they are.

The probability-flow ODE (arXiv 2011.13456, section 4.3) carries data x at t_min to a latent code z = x_T and back.
Under the model z is a draw of N(0, s^2 I) with s = `prior_std`, and in D dimensions nearly all of that law lies in a
thin shell: |z| / (s sqrt(D)) is 1 up to about 1 / sqrt(2 D). Whatever is done to latent codes should end in the shell,
since a network has seen nothing else there.

Between two codes a and b, with w from 0 to 1:

    linear      (1 - w) a + w b. For independent a and b, which are nearly orthogonal, its length half-way is
                s sqrt(D / 2): inside the shell, as if the temperature were 0.7, where pictures lose their detail.
    spherical   along the great circle from the direction of a to that of b (Shoemake, SIGGRAPH 1985), at a length that
                goes linearly from |a| to |b|. Stays in the shell.
    gaussian    ((1 - w) a + w b) / sqrt((1 - w)^2 + w^2): for independent draws a and b every point is one too.

A temperature multiplies codes. Below 1 they get nearer to the mode of the prior, and samples more typical and less
varied; above 1 the reverse.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sde.data import DataInfo
from sde.errors import UserError, check_choice
from sde.files import atomic_write
from sde.processes import SDE, SDES

INTERPOLATIONS = ("spherical", "linear", "gaussian")
FILE = "latents.npz"

_UNREADABLE = (ValueError, OSError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error)

Progress = Callable[[float], None]
Carry = Callable[[Tensor, Tensor | None, Progress | None], tuple[Tensor, int]]
"""Takes a batch (B, ...), its labels and whom to tell of the progress; gives where it leads and the evaluations."""


# Between two codes


def interpolate(a: Tensor, b: Tensor, weights: Tensor, kind: str = "spherical") -> Tensor:
    """Points between two latent codes, the ends exactly.

    Args:
        a, b: codes of any one shape.
        weights: (K,) in [0, 1]: 0 gives `a`, 1 gives `b`.
        kind: one of `INTERPOLATIONS`. Codes that point in opposite directions have no shortest great circle between
            them: "spherical" then takes the one through the coordinate axis that is the farthest from both, the same
            from either end.

    Returns:
        (K, *shape), of the type of `a`; computed in float64.

    Raises:
        UserError: for another kind.
    """
    check_choice("interpolation", kind, INTERPOLATIONS)
    start, end = a.double().flatten(), b.double().flatten()
    w = weights.to(start)[:, None]
    between = {"spherical": _spherical, "linear": _linear, "gaussian": _gaussian}[kind](start, end, w)
    between = torch.where(w == 0, start, torch.where(w == 1, end, between))
    return between.reshape(-1, *a.shape).to(a.dtype)


def _linear(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return torch.lerp(a, b, w)


def _gaussian(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return torch.lerp(a, b, w) / torch.hypot(1 - w, w)


def _spherical(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """In the basis of a's direction and the one perpendicular to it towards b, where no angle is divided by."""
    lengths = a.norm(), b.norm()
    one, other = _direction(a, b), _direction(b, a)
    sign = 1.0 if float(one @ other) >= 0 else -1.0
    apart = other - sign * one  # short where the angle is near 0 or 180 degrees, without loss of digits
    side = apart - (apart @ one) * one
    if sign < 0 and float(side.norm()) < 1e-12:
        axis = torch.zeros_like(one)
        axis[one.abs().argmin()] = 1.0
        side = axis - (axis @ one) * one
        angle = torch.tensor(math.pi, dtype=one.dtype, device=one.device)
    else:
        angle = torch.atan2(side.norm(), one @ other)
    side = side / side.norm().clamp_min(torch.finfo(side.dtype).tiny)
    return torch.lerp(*lengths, w) * (torch.cos(w * angle) * one + torch.sin(w * angle) * side)


def _direction(a: Tensor, instead: Tensor) -> Tensor:
    """The unit vector along `a`; along `instead` when it is zero, or zero when both are."""
    chosen = a if float(a.norm()) > 0 else instead
    return chosen / chosen.norm().clamp_min(torch.finfo(a.dtype).tiny)


# In batches


def in_batches(
    carry: Carry,
    x: Tensor,
    batch_size: int,
    labels: Tensor | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[Tensor, list[int]]:
    """What `carry` makes of `x` (N, ...), at most `batch_size` at once.

    Args:
        carry: such as `sde.density.encode` with its denoiser and solver.
        x: anywhere; batches are moved to `device`.
        batch_size: most examples at once.
        labels: class labels (N,) or None.
        device: where to compute.
        progress: called with the share of all examples' way that is done.

    Returns:
        The result (N, ...) on the CPU, and the evaluations that each batch took.
    """
    results, nfe, n = [], [], len(x)
    for start in range(0, n, batch_size):
        part = x[start : start + batch_size].to(device)
        label = None if labels is None else labels[start : start + batch_size].to(device)

        def report(share: float, start: int = start, size: int = len(part)) -> None:
            if progress is not None:
                progress((start + share * size) / n)

        result, count = carry(part, label, report)
        results.append(result.cpu())
        nfe.append(count)
    return torch.cat(results), nfe


# How good they are


def normality(z: Tensor, prior_std: float) -> dict[str, Any]:
    """How far codes `z` (N, ...) are from draws of N(0, prior_std^2 I), by their first two moments.

    Returns:
        `mean` and `std` of all values over `prior_std`, 0 and 1 for such draws; `squared_norm`, |z|^2 / (D prior_std^2)
        of each code, with its mean, 1, and its spread over the codes, `expected_spread` = sqrt(2 / D).
    """
    unit = z.double().flatten(1) / prior_std
    norms = unit.square().mean(1)
    return {
        "mean": float(unit.mean()),
        "std": float(unit.std(correction=0)),
        "squared_norm_mean": float(norms.mean()),
        "squared_norm_spread": float(norms.std(correction=0)),
        "expected_spread": math.sqrt(2 / unit.shape[1]),
        "squared_norm": [round(value, 6) for value in norms.tolist()],
    }


def round_trip_error(values: Tensor, back: Tensor, info: DataInfo) -> dict[str, float]:
    """How far decoded codes are from the examples that were encoded.

    Args:
        values: the examples (N, ...) as they are stored, uint8 pixels or float32 vectors.
        back: (N, ...) as the network sees them.
        info: the facts about the data.

    Returns:
        `rms` and `max`, the root-mean-square and largest difference of a value in the network's units; for pictures the
        same in gray levels, and the share of pixels (`exact`) that come back as they were.
    """
    difference = back.double() - info.encode(values, torch.float64)
    errors = {"rms": float(difference.square().mean().sqrt()), "max": float(difference.abs().max())}
    if info.kind == "pixels":
        levels = 255 / (info.high - info.low)
        errors |= {"rms_gray_levels": errors["rms"] * levels, "max_gray_levels": errors["max"] * levels}
        errors["exact"] = float((info.decode(back) == values).double().mean())
    return errors


# Files


@dataclass(frozen=True)
class Latents:
    """Latent codes and where they come from.

    Args:
        values: (N, *shape) float32. Half a unit in their last place moves what they decode to by less than a solver's
            tolerance does, so float64 would store nothing of use.
        labels: class labels (N,) int64, or None.
        indices: which examples of the split they are, (N,) int64, or None.
        about: plain values: what encoded them, `sde` (its name and options) among it. Empty for codes from elsewhere.
    """

    values: Tensor
    labels: Tensor | None = None
    indices: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)


def sde_facts(sde: SDE) -> dict[str, Any]:
    """The name and options of an SDE, as a file of latents remembers them."""
    return {"name": SDES.name_of(type(sde)), **asdict(sde)}  # type: ignore[call-overload]  # SDEs are dataclasses


def write_latents(path: Path, latents: Latents) -> None:
    """`latents` float32 (N, *shape), `labels` and `indices` (N,) where there are any, and `about`, a JSON text."""
    arrays = {"latents": latents.values.float().numpy(), "about": np.array(json.dumps(dict(latents.about)))}
    for name in ("labels", "indices"):
        if (found := getattr(latents, name)) is not None:
            arrays[name] = found.numpy()
    with atomic_write(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_latents(path: Path) -> Latents:
    """What `write_latents` wrote, or `latents` alone from elsewhere; of a folder, the file in it.

    Raises:
        UserError: when there is no such file, it is damaged, or it holds something else.
    """
    path = path / FILE if path.is_dir() else path
    arrays = read_arrays(path, "latents")
    if "latents" not in arrays:
        raise UserError(f"{path} holds no latents (but {', '.join(arrays) or 'nothing'}): make one with sde.encode")
    found = arrays["latents"]
    if found.dtype.kind != "f" or found.ndim < 2 or found.size == 0:
        raise UserError(f"the latents in {path} are {found.dtype} of shape {found.shape}: they must be floats (N, ...)")
    if not np.isfinite(found).all():
        rows = np.flatnonzero(~np.isfinite(found.reshape(len(found), -1)).all(1))
        raise UserError(f"{path} has latents that are not finite, number {rows[0]} the first: encode them again")
    numbers = {name: _whole_numbers(arrays, name, len(found), path) for name in ("labels", "indices")}
    return Latents(torch.from_numpy(found.astype(np.float32)), about=_about(arrays, path), **numbers)


def read_arrays(path: Path, option: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, read without pickle.

    Raises:
        UserError: naming `option`, when there is no such file or it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{option}={path} does not exist: give the .npz file, or the folder that holds it")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (
        ValueError,
        OSError,
        EOFError,
        KeyError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"{option}={path} is damaged or no .npz file of numbers: make it again") from error


def _whole_numbers(arrays: Mapping[str, np.ndarray], name: str, n: int, path: Path) -> Tensor | None:
    if name not in arrays:
        return None
    found = arrays[name]
    if found.dtype.kind not in "iu" or found.shape != (n,):
        raise UserError(
            f"the {name} in {path} are {found.dtype} of shape {found.shape}: there must be whole numbers ({n},)"
        )
    return torch.from_numpy(found.astype(np.int64))


def _about(arrays: Mapping[str, np.ndarray], path: Path) -> dict[str, Any]:
    if "about" not in arrays:
        return {}
    try:
        about = json.loads(str(arrays["about"]))
    except ValueError:
        about = None
    if not isinstance(about, dict) or not isinstance(about.get("sde", {}), dict):
        raise UserError(f"{path} is damaged (what it says about its latents cannot be read): encode them again")
    return about


def check_fit(latents: Latents, sde: SDE, shape: Sequence[int], path: Path) -> None:
    """Raise `UserError` unless latents are codes for data of `shape` under `sde`.

    Where samplers stop (`t_min_sampling`) does not matter to a code.
    """
    found = tuple(latents.values.shape[1:])
    if found != tuple(shape):
        raise UserError(f"{path} has latents of shape {found} and the run has data of shape {tuple(shape)}: {_FIX}")
    theirs, ours = latents.about.get("sde"), sde_facts(sde)
    if theirs is None:
        return
    for name in ("name", *(key for key in ours if key not in ("name", "t_min_sampling"))):
        if theirs.get(name) != ours[name]:
            what = "sde" if name == "name" else f"sde.{name}"
            raise UserError(
                f"{path} has latents of {what}={theirs.get(name)} and the run has {what}={ours[name]}: {_FIX}"
            )


_FIX = "encode with this run, or give the run that they were made with"
