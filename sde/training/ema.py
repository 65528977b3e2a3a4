r"""Averaged weights: what samples are drawn with. Several averages can be kept at once.

`EMA` is the exponential average of n updates (n counts from 0),

    average <- d average + (1 - d) weights,    d = min(decay, (1 + n) / (10 + n)) with warm-up,

so that it follows quickly at first and forgets the initialization (arXiv 2011.13456 uses decay 0.9999 for VP and 0.999
for VE). `PowerEMA` is the power-function average of arXiv 2312.02696 (section 3.1 and appendix C.1): after t updates

    average = sum_k w_k weights_k,    w_k = (k^(gamma+1) - (k-1)^(gamma+1)) / t^(gamma+1),    k = 1 .. t,
    average <- b average + (1 - b) weights,    b = (1 - 1/t)^(gamma+1),

the profile (gamma+1) tau^gamma / t^(gamma+1) on (0, t], integrated over each step. It is as wide relative to the
training so far at any t: its standard deviation is `std` t, with

    std^2 = (gamma+1) / ((gamma+2)^2 (gamma+3)).

Since b = 0 at the first update it never holds the initialization. Snapshots of power-function averages are enough to
compute one of another width after the training (`sde.training.posthoc`).
"""

from __future__ import annotations

import copy
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sde.distributed import full_state, is_main, load_full_state, local
from sde.errors import UserError, check_flag, check_number
from sde.files import new_file
from sde.registry import Registry

WIDEST = 1 / math.sqrt(12)  # std of gamma = 0, the plain mean of all weights
FOLDER = "ema"  # of a run, where snapshots lie
FORMAT = "power-function averages, 1"  # of a snapshot

AVERAGES: Registry[EMAOptions] = Registry("averages")


# Width and exponent of a power-function average


def std_of_gamma(gamma: float) -> float:
    """The width of the profile tau^gamma on (0, 1] (arXiv 2312.02696, eq. 123); `gamma` is above -1."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of_std(std: float) -> float:
    """The exponent of the power-function average of relative width `std`, in (0, 1/sqrt(12)), where gamma is above 0.

    With u = gamma + 2 and t = 1 / std^2 the equation is u^3 + u^2 - t u + t = 0 (eq. 126), which has three real roots;
    the largest is Viete's.

    Raises:
        UserError: for a width out of range.
    """
    check_number("std", std, above=0, below=WIDEST)
    t = std**-2
    p, q = t + 1 / 3, 4 * t / 3 + 2 / 27  # v^3 - p v + q = 0 with v = u + 1/3
    v = 2 * math.sqrt(p / 3) * math.cos(math.acos(max(-1.0, -q / 2 / (p / 3) ** 1.5)) / 3)
    return v - 7 / 3


# Names


def decay_name(decay: float) -> str:
    """What the exponential average of a decay is called: "0.9999"."""
    return repr(float(decay))


def std_name(std: float) -> str:
    """What the power-function average of a relative width is called: "std0.05"."""
    return f"std{float(std)!r}"


def average_name(text: str | float) -> str | None:
    """The name of the average that a user calls `text` (0.9990, "0.999", "std0.050"); None when it cannot be one."""
    try:
        if isinstance(text, str) and text.startswith("std"):
            return std_name(float(text[3:]))
        return None if isinstance(text, bool) else decay_name(float(text))
    except ValueError:
        return None


# One average


class Average(ABC):
    """A moving average of a network's parameters, kept in a copy of the network; buffers are copied as they are.

    Parameters may be spread over processes (FSDP2). A network that is spread cannot be copied: make the average first,
    then spread both in the same way before the first update.

    Args:
        network: what is trained.

    Attributes:
        network: the copy, in evaluation mode, whose parameters are the averages.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._source = network
        self._tensors: tuple[list[Tensor], ...] | None = None

    @abstractmethod
    def weight(self, step: int) -> float:
        """The share of the present weights in the average after `step` earlier updates."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the network's present weights in; `step` is the number of updates before this one."""
        reshard = getattr(self.network, "reshard", None)
        if callable(reshard):  # FSDP2 leaves whole weights behind after drawing samples
            reshard()
        if self._tensors is None:  # walking through the modules takes longer than the rest
            networks = (self.network, self._source)
            parameters: list[list[Tensor]] = [[*n.parameters()] for n in networks]
            self._tensors = (*parameters, *([*n.buffers()] for n in networks))
        averages, weights, buffers, present = ([local(x) for x in tensors] for tensors in self._tensors)
        if averages:
            torch._foreach_lerp_(averages, weights, self.weight(step))
        if buffers:
            torch._foreach_copy_(buffers, present)


class EMA(Average):
    """An exponential moving average.

    Args:
        network: what is trained.
        decay: in [0, 1); the average is over about 1 / (1 - decay) steps.
        warmup: shorten the average at the beginning: the decay is at most (1 + n) / (10 + n) at step n.

    Attributes:
        network: the copy, in evaluation mode, whose parameters are the averages.
    """

    def __init__(self, network: nn.Module, decay: float = 0.9999, warmup: bool = True) -> None:
        check_number("ema.decay", decay, at_least=0, below=1)
        super().__init__(network)
        self.decay = decay
        self.warmup = warmup

    def weight(self, step: int) -> float:
        """1 - d of the module's first equation."""
        return 1 - (min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay)


class PowerEMA(Average):
    """A power-function average.

    Args:
        network: what is trained.
        std: standard deviation of its profile, relative to the training so far; in (0, 1/sqrt(12)). Typical ones are
            0.05 and 0.1 (arXiv 2312.02696, section 3.2).

    Attributes:
        network: the copy, in evaluation mode, whose parameters are the averages.
        gamma: the exponent of the profile.
    """

    def __init__(self, network: nn.Module, std: float) -> None:
        check_number("ema.std", std, above=0, below=WIDEST)
        super().__init__(network)
        self.std = std
        self.gamma = gamma_of_std(std)

    def weight(self, step: int) -> float:
        """1 - (1 - 1/t)^(gamma+1) at update t = step + 1; 1 at the first."""
        return 1.0 if step == 0 else -math.expm1((self.gamma + 1) * math.log1p(-1 / (step + 1)))


# Several at once


@AVERAGES.register("default")
@dataclass(frozen=True)
class EMAOptions:
    """Which averages of the weights are kept. The first one is what previews and samples are drawn with.

    Args:
        decay: of an exponential average over about 1 / (1 - decay) steps, in [0, 1); a list keeps several.
        warmup: shorten exponential averages in the beginning: decay is at most (1 + n) / (10 + n) at step n.
        std: relative widths of power-function averages, in (0, 0.2886); two of them, such as 0.05 and 0.1, are enough
            to reconstruct others.
        snapshot_every: steps between snapshots of the power-function averages; 0 for never.
    """

    decay: float | tuple[float, ...] = 0.9999
    warmup: bool = True
    std: tuple[float, ...] = ()
    snapshot_every: int = 0

    def __post_init__(self) -> None:
        for decay in self.decays:
            check_number("ema.decay", decay, at_least=0, below=1)
        check_flag("ema.warmup", self.warmup)
        for std in self.std:
            check_number("ema.std", std, above=0, below=WIDEST)
        check_number("ema.snapshot_every", self.snapshot_every, at_least=0)
        if not self.names:
            raise UserError("ema.decay=[] and ema.std=[] leave no average: give one, such as ema.decay=0.9999")
        repeated = [name for name in self.names if self.names.count(name) > 1]
        if repeated:
            raise UserError(f"ema holds the average {repeated[0]} twice: leave one out")
        if self.snapshot_every and not self.std:
            raise UserError(
                f"ema.snapshot_every={self.snapshot_every} has no power-function averages to keep: "
                "give some, such as ema.std=[0.05,0.1]"
            )

    @property
    def decays(self) -> tuple[float, ...]:
        """Of all exponential averages."""
        return tuple(self.decay) if isinstance(self.decay, tuple | list) else (self.decay,)

    @property
    def names(self) -> list[str]:
        """Of all averages, in their order: "0.9999" for a decay, "std0.05" for a relative width."""
        return [*map(decay_name, self.decays), *map(std_name, self.std)]


class Averages:
    """All averages of a network that `options` names.

    Args:
        network: what is trained. It must not be spread over processes yet: see `Average`.
        options: which averages.

    Attributes:
        networks: the averaged networks by name, exponential averages first, in the order of the options. The names are
            what `ema=NAME` means when sampling: "0.9999" for a decay, "std0.05" for a relative width.
    """

    def __init__(self, network: nn.Module, options: EMAOptions) -> None:
        self.options = options
        kept: list[Average] = [EMA(network, decay, options.warmup) for decay in options.decays]
        kept += [PowerEMA(network, std) for std in options.std]
        self._all = dict(zip(options.names, kept, strict=True))
        self.networks: dict[str, nn.Module] = {name: average.network for name, average in self._all.items()}

    @property
    def primary(self) -> nn.Module:
        """The first averaged network, which is "ema" in a checkpoint."""
        return next(iter(self.networks.values()))

    def update(self, step: int) -> None:
        """Take the network's present weights into all averages; `step` is the number of updates before this one."""
        for average in self._all.values():
            average.update(step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: "ema", the first one, and "averages", further ones by name. All processes have to
        ask."""
        states = {name: full_state(network) for name, network in self.networks.items()}
        first = next(iter(states))
        return {"ema": states.pop(first), "averages": states}

    def load_state(self, content: Mapping[str, Any]) -> None:
        """Go on from a checkpoint with "ema", "averages" and the configuration that names the first.

        An exponential average goes on with another decay if it is the first one then and now; others have to be there.

        Raises:
            UserError: when the checkpoint does not have an average.
        """
        known = averages_of(content)
        before, first = next(iter(known)), self.options.names[0]
        if before == "ema" or not (before.startswith("std") or first.startswith("std")):
            known.setdefault(first, content["ema"])
        for name, network in self.networks.items():
            if name not in known:
                raise UserError(
                    f"there is no average {name} to go on with, but {', '.join(known)}: averages cannot begin in the "
                    "middle of a run"
                )
            load_full_state(network, known[name])

    def snapshot(self, folder: Path, step: int) -> Path:
        """Write the power-function averages after `step` steps into `folder`, RUN/ema. All processes have to call it.

        The file holds each tensor as NAME/KEY of the average's name and the key of its state, and is either whole or
        not there. Snapshots of later steps, of a run that goes on from before them, are written again.
        """
        path = snapshot_path(folder, step)
        kept = {std_name(std): std for std in self.options.std}
        tensors = {}
        for name in kept:
            for key, tensor in full_state(self.networks[name]).items():
                tensors[f"{name}/{key}"] = tensor.detach().cpu().contiguous().clone()
        if is_main():
            about = {"about": json.dumps({"format": FORMAT, "step": step, "std": list(kept.values())})}
            with new_file(path) as temporary:
                safetensors.torch.save_file(tensors, temporary, metadata=about)
        return path


def snapshot_path(folder: Path, step: int) -> Path:
    """Where the snapshot of a step lies."""
    return folder / f"snapshot-{step:08d}.safetensors"


def averages_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The state of each average in a checkpoint by its name, the first one first.

    The first is named in the configuration; where that says nothing, as in weights of other projects, it is "ema".
    """
    node = content.get("config", {}).get("ema") or {}
    decays, widths = node.get("decay", ()), node.get("std") or ()
    names = [decay_name(d) for d in (decays if isinstance(decays, list | tuple) else (decays,))]
    names += [std_name(std) for std in widths]
    return {(names or ["ema"])[0]: content["ema"], **(content.get("averages") or {})}
