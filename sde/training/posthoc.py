r"""Power-function averages of any width, after the training, from snapshots of a few (arXiv 2312.02696, section 3.2).

A snapshot is the average of all weights so far with the profile p(tau) = (gamma+1) tau^gamma / t^(gamma+1) on (0, t].
Sums of snapshots are averages with the sum of their profiles, so the coefficients are those for which

    || sum_i c_i p_i - p ||^2  is least,    sum_i c_i = 1,

p being the wanted profile. With the inner products (eq. 151), for s <= t,

    <p_a, p_b> = (a+1)(b+1) / (a+b+1)  (s/t)^b / t,    a and s of the earlier one, b and t of the later one,

that is a small linear system. The original solves it without the constraint and divides by the sum afterwards. What is
left of the norm, relative to that of p, says how well the snapshots can give the wanted average: the weights are off by
at most `error` ||p|| (sum_k |weights_k - c|^2)^(1/2) for any fixed c, k running over the steps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from sde.progress import progress_bar
from sde.training.ema import FORMAT, gamma_of_std, std_name

# Profiles


@dataclass(frozen=True)
class Profile:
    """How a power-function average weighs the training.

    Args:
        step: where it ends, in steps; above 0.
        std: its standard deviation relative to `step`, in (0, 1/sqrt(12)).
    """

    step: float
    std: float

    @property
    def gamma(self) -> float:
        """The exponent."""
        return gamma_of_std(self.std)

    def __call__(self, tau: Tensor) -> Tensor:
        """The density per step at the steps `tau`, of any shape; 0 from `step` on."""
        inside = (self.gamma + 1) / self.step * (tau / self.step).clamp(0, 1) ** self.gamma
        return torch.where((tau > 0) & (tau <= self.step), inside, 0.0)


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> Tensor:
    """Integrals of the products of profiles, (len(a), len(b)) in float64."""
    step_a, gamma_a = _columns(a)
    step_b, gamma_b = (column.T for column in _columns(b))
    ratio, last = step_a / step_b, torch.maximum(step_a, step_b)
    overlap = torch.where(ratio < 1, ratio**gamma_b, (1 / ratio) ** gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * overlap / last


def _columns(profiles: Sequence[Profile]) -> tuple[Tensor, Tensor]:
    numbers = torch.tensor([(profile.step, profile.gamma) for profile in profiles], dtype=torch.float64)
    return numbers[:, :1], numbers[:, 1:]


@dataclass(frozen=True)
class Fit:
    """Coefficients of known profiles that give a wanted one.

    Args:
        coefficients: one for each known profile; their sum is 1.
        error: the norm of what is missing relative to that of the wanted profile: 0 for a perfect fit. Below 1e-7 it is
            rounding.
    """

    coefficients: tuple[float, ...]
    error: float


def fit_profile(known: Sequence[Profile], wanted: Profile) -> Fit:
    """The best coefficients of the `known` profiles, at least one, for the `wanted` one.

    Neighboring profiles are nearly the same: directions of the normalized Gram matrix that are below rounding are left
    out, so that the coefficients are no larger than they have to be.
    """
    if wanted in known:
        return Fit(tuple(float(profile == wanted) for profile in known), 0.0)
    gram, against = inner_products(known, known), inner_products(known, [wanted])[:, 0]
    norms = gram.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(gram / norms[:, None] / norms)
    kept = values > len(known) * torch.finfo(torch.float64).eps * values[-1]
    half = vectors[:, kept] / values[kept].sqrt()  # half half^T is the inverse
    target, ones = half.T @ (against / norms), half.T @ (1 / norms)
    coordinates = target + ones * (1 - ones @ target) / (ones @ ones)
    coefficients = half @ coordinates / norms
    norm = inner_products([wanted], [wanted])[0, 0]
    missing = norm - 2 * coefficients @ against + coefficients @ gram @ coefficients
    return Fit(tuple(coefficients.tolist()), float((missing.clamp_min(0) / norm).sqrt()))


# Snapshots


@dataclass(frozen=True)
class Snapshot:
    """A file that `Averages.snapshot` wrote.

    Args:
        path: of the file.
        step: optimizer steps made.
        widths: the relative widths of the averages in it.
    """

    path: Path
    step: int
    widths: tuple[float, ...]


def list_snapshots(folder: Path, network: nn.Module) -> list[Snapshot]:
    """The snapshots in `folder` of averages of `network`, oldest first.

    A file that is damaged, or of another network, is named on standard error and passed over.
    """
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    found = []
    for path in sorted(folder.glob("snapshot-*.safetensors")):
        try:
            found.append(_read_header(path, shapes))
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            print(f"warning: {path} is damaged or of another network and passed over ({reason})", file=sys.stderr)
    return sorted(found, key=lambda snapshot: snapshot.step)


def _read_header(path: Path, shapes: Mapping[str, list[int]]) -> Snapshot:
    """What a file says of itself, checked; opening it checks that it is as long as it has to be."""
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        if about.get("format") != FORMAT:
            raise ValueError(f"its format is {about.get('format')!r} and not {FORMAT!r}")
        snapshot = Snapshot(path, int(about["step"]), tuple(float(std) for std in about["std"]))
        wanted = {f"{std_name(std)}/{key}": shape for std in snapshot.widths for key, shape in shapes.items()}
        if {name: file.get_slice(name).get_shape() for name in file.keys()} != wanted:  # noqa: SIM118 - not a dict
            raise ValueError("its tensors are not those of the network")
    return snapshot


def profiles_of(snapshots: Sequence[Snapshot]) -> list[Profile]:
    """The profiles of all averages in the snapshots, in the order of `weighted_sum`'s coefficients."""
    return [Profile(snapshot.step, std) for snapshot in snapshots for std in snapshot.widths]


def weighted_sum(snapshots: Sequence[Snapshot], coefficients: Iterable[float], network: nn.Module) -> dict[str, Tensor]:
    """The state of `network` whose parameters are weighted sums of those in the snapshots.

    Args:
        snapshots: at least one.
        coefficients: one for each of `profiles_of(snapshots)`.
        network: says which keys are parameters; all others (buffers) are taken from the last snapshot.

    Returns:
        Tensors by the keys of the network, in the precision of the snapshots; sums are made in float64.
    """
    averaged = {key for key, _ in network.named_parameters(remove_duplicate=False)}
    sums: dict[str, Tensor] = {}
    rest = iter(coefficients)
    with progress_bar(len(snapshots), unit="snapshot", desc="averaging", leave=False) as bar:
        for snapshot in snapshots:
            with safetensors.safe_open(snapshot.path, "pt") as file:
                for std in snapshot.widths:
                    coefficient = next(rest)
                    for key in averaged if coefficient else ():
                        part = coefficient * file.get_tensor(f"{std_name(std)}/{key}").double()
                        sums[key] = sums[key].add_(part) if key in sums else part
            bar.update()
    last = snapshots[-1]
    with safetensors.safe_open(last.path, "pt") as file:
        own = {key: file.get_tensor(f"{std_name(last.widths[0])}/{key}") for key in network.state_dict()}
    return {key: sums[key].to(tensor.dtype) if key in averaged else tensor for key, tensor in own.items()}
