"""Models of yang-song/score_sde_pytorch: their checkpoints as denoisers, and as runs to sample from.

    denoiser = load("checkpoint_8.pth", "config.json")                    # averaged weights
    python -m sde.interop.score_sde checkpoint=checkpoint_8.pth config=config.json

The configuration is the original's, as JSON: `json.dump(config.to_dict(), file)` where it was made. What the original
does with a network's output depends on how it was trained:

    VP, sub-VP, continuous   score = -F(x, 999 t) / sigma(t)
    VP, discrete             score = -F(x, (n - 1) t) / sigma_i                      (`chains.DDPMChain`)
    VE, continuous           score = F(x, sigma(t))
    VE, discrete             score = F(x, round((1 - t) (n - 1)))                    (`chains.SMLDChain`)

RefineNets (`ncsn`, `ncsnv2_64` and larger) are always discrete; those of ermongroup/ncsnv2 are read as well, from their
own configurations and checkpoints (`score_sde_refinenets`).

`solver=pc solver.discretization=score_sde solver.final=mean` then samples as the original does. The original takes the
number of sampling steps for n, too: to follow a discrete network there, set n of its parameterization to the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sde.cli import output_dir, run_command
from sde.data import DataInfo
from sde.denoiser import Denoiser
from sde.errors import UserError, check_choice
from sde.interop import chains
from sde.interop.rules import section
from sde.interop.runs import Description, write_run
from sde.interop.score_sde_options import DATA, MODEL, TRAINING
from sde.interop.score_sde_refinenets import SIZES, translate_config
from sde.interop.score_sde_weights import (
    convert_state_dict,
    ema_state_dict,
    network_from_config,
    read_checkpoint,
    settings_from_config,
)
from sde.interop.weights import read_json
from sde.parameterizations import Eps, Parameterization, Score
from sde.processes import SDE, VE, VP, SubVP

_HOW = "write the original's with json.dump(config.to_dict(), file)"
_SDES = {"vpsde": VP, "subvpsde": SubVP, "vesde": VE}


def load(checkpoint: str | Path, config: str | Path | Mapping[str, Any], ema: bool = True) -> Denoiser:
    """The denoiser that a checkpoint of the original holds, in evaluation mode, on the CPU.

    Args:
        checkpoint: a file with "model" and "ema", as the original writes; nothing in it is executed.
        config: its configuration: a JSON file, or nested dictionaries.
        ema: the averaged weights, rather than the last ones.

    Raises:
        UserError: when a file is missing or damaged, or the weights do not fit the configuration.
    """
    settings = translate_config(config) if isinstance(config, Mapping) else read_config(config)
    content = read_checkpoint(checkpoint)
    network = network_from_config(settings)
    weights = ema_state_dict(network, content) if ema else convert_state_dict(network, content["model"])
    network.load_state_dict(weights)
    return describe(settings).denoiser(network)


def read_config(path: str | Path) -> dict[str, Any]:
    """The original's configuration from a JSON file.

    Raises:
        UserError: when there is no such file or it is not JSON.
    """
    return dict(translate_config(read_json(path, _HOW)))


def sde_from_config(config: Mapping[str, Any]) -> SDE:
    """The forward process of an original configuration."""
    model = section(config, "model", MODEL)
    name = section(config, "training", TRAINING)["sde"].lower()
    check_choice("training.sde of the configuration", name, _SDES)
    if name == "vesde":
        return VE(sigma_min=float(model["sigma_min"]), sigma_max=float(model["sigma_max"]))
    rates = {"beta_min": float(model["beta_min"]), "beta_max": float(model["beta_max"])}
    return VP(**rates) if name == "vpsde" else SubVP(**rates)


def parameterization_from_config(config: Mapping[str, Any]) -> Parameterization:
    """What the network of an original configuration predicts, and which label it is told."""
    training, model = section(config, "training", TRAINING), section(config, "model", MODEL)
    name, n = training["sde"].lower(), model["num_scales"]
    discrete = model.get("name") in SIZES
    continuous = training["continuous"] and not discrete
    if discrete:
        check_choice(f"training.sde of the configuration of {model['name']}", name, ("vesde",))
    if name == "vesde":
        return Score(noise_label="sigma") if continuous else chains.SMLDChain(n=n)
    if name == "vpsde" and not continuous:
        return chains.DDPMChain(n=n)
    return Eps(noise_label="time")


def info_from_config(config: Mapping[str, Any]) -> DataInfo:
    """The facts about the data of an original configuration."""
    data = section(config, "data", DATA)
    _, _, shape = settings_from_config(config)
    return DataInfo(name=data["dataset"].lower(), shape=shape, low=-1.0 if data["centered"] else 0.0, high=1.0)


def describe(config: Mapping[str, Any]) -> Description:
    """What an original configuration describes."""
    name, settings, _ = settings_from_config(config)
    return Description(
        name, settings, sde_from_config(config), parameterization_from_config(config), info_from_config(config)
    )


def import_run(config: dict[str, Any]) -> None:
    """Write a run folder from `checkpoint` and `config`."""
    original = read_config(config["config"])
    content = read_checkpoint(config["checkpoint"])
    network = network_from_config(original)
    averaged, last = ema_state_dict(network, content), convert_state_dict(network, content["model"])
    step = content.get("step", 0)
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise UserError(f"step={step!r} of the checkpoint is not a number of optimizer steps: the file is damaged")
    write_run(Path(output_dir()), describe(original), averaged, last, step)


def main() -> None:
    """Entry point of the command line."""
    run_command("score_sde", import_run)


if __name__ == "__main__":
    main()
