"""Networks of NVlabs/edm (arXiv 2206.00364) and NVlabs/edm2 (arXiv 2312.02696) as denoisers, and as runs.

    denoiser = load("edm.safetensors", "edm.json")
    python -m sde.interop.edm checkpoint=edm.safetensors config=edm.json

Both projects publish pickles, which run code when they are read. So they are read where they come from, inside that
repository, by a program of two lines that a .pkl file is answered with; it writes the averaged weights as .safetensors,
and as JSON the class around the network with the arguments that it was made with:

    {"class_name": "EDMPrecond", "img_resolution": 32, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet", ...}

    EDMPrecond, Precond (EDM2)   D = c_skip x + c_out F(c_in x, log(sigma) / 4)         sde=edm, parameterization=edm
    VPPrecond                    D = x - sigma F(x / sqrt(1 + sigma^2), 999 t)          sde=vp, parameterization=eps
    VEPrecond                    D = x + sigma F(x, log(sigma / 2))                     sde=ve, parameterization=eps
    iDDPMPrecond                 D = x - sigma F(x / sqrt(1 + sigma^2), nearest index)  sde=cosine, beta_chain

Of the arguments, only those with which the function is the same here are accepted. Labels for augmentation are not used
in sampling, where they are zero; dropout plays no part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sde.cli import output_dir, run_command
from sde.data import DataInfo
from sde.denoiser import Denoiser
from sde.errors import UserError, check_choice
from sde.interop.chains import BetaChain
from sde.interop.edm_weights import convert_edm2, convert_unet
from sde.interop.options import (
    ANYTHING,
    FLAG,
    REQUIRED,
    WORD,
    Option,
    number,
    optional,
    read_options,
    several,
    whole,
)
from sde.interop.runs import Description, write_run
from sde.interop.unets import check_fixed, check_groups
from sde.interop.weights import read_json, read_tensors
from sde.parameterizations import Eps, Parameterization, Preconditioned
from sde.processes import EDM, SDE, VE, VP, Cosine

_HOW = "give the arguments of the network as JSON, which the program that converts a pickle writes"
# What the classes take, with their defaults.
_SHARE = number(at_least=0, below=1)
_WIDTHS = Option(several(whole(1), at_least=1), (1, 2, 3, 4))
_COMMON: dict[str, Option] = {
    "class_name": Option(ANYTHING, None),
    "img_resolution": Option(whole(1), REQUIRED),
    "img_channels": Option(whole(1), REQUIRED),
    "label_dim": Option(whole(0), 0),
    "use_fp16": Option(FLAG, False),
}
_SIGMA_DATA = Option(number(above=0), 0.5)
PRECONDS: dict[str, dict[str, Option]] = {
    "EDMPrecond": {
        "sigma_min": Option(number(at_least=0), 0.0),
        "sigma_max": Option(number(above=0, infinite=True), math.inf),
        "sigma_data": _SIGMA_DATA,
        "model_type": Option(WORD, "DhariwalUNet"),
    },
    "VPPrecond": {
        "beta_d": Option(number(above=0), 19.9),
        "beta_min": Option(number(above=0), 0.1),
        "M": Option(whole(2), 1000),
        "epsilon_t": Option(number(above=0), 1e-5),
        "model_type": Option(WORD, "SongUNet"),
    },
    "VEPrecond": {
        "sigma_min": Option(number(above=0), 0.02),
        "sigma_max": Option(number(above=0), 100.0),
        "model_type": Option(WORD, "SongUNet"),
    },
    "iDDPMPrecond": {
        "C_1": Option(number(above=0, below=1), 0.001),
        "C_2": Option(number(above=0, below=1), 0.008),
        "M": Option(whole(2), 1000),
        "model_type": Option(WORD, "DhariwalUNet"),
    },
    "Precond": {
        "sigma_data": _SIGMA_DATA,
        "logvar_channels": Option(whole(1), 128),
        "use_fp16": Option(FLAG, True),
        "model_type": Option(WORD, "UNet"),
    },
}
NETWORKS: dict[str, dict[str, Option]] = {
    "SongUNet": {
        "augment_dim": Option(whole(0), 0),
        "model_channels": Option(whole(1), 128),
        "channel_mult": _WIDTHS._replace(default=(1, 2, 2, 2)),
        "channel_mult_emb": Option(whole(1), 4),
        "num_blocks": Option(whole(1), 4),
        "attn_resolutions": Option(several(whole(1)), (16,)),
        "dropout": Option(_SHARE, 0.10),
        "label_dropout": Option(number(at_least=0), 0.0),
        "embedding_type": Option(WORD, "positional"),
        "channel_mult_noise": Option(whole(1), 1),
        "encoder_type": Option(WORD, "standard"),
        "decoder_type": Option(WORD, "standard"),
        "resample_filter": Option(several(number(), at_least=1), (1.0, 1.0)),
    },
    "DhariwalUNet": {
        "augment_dim": Option(whole(0), 0),
        "model_channels": Option(whole(1), 192),
        "channel_mult": _WIDTHS,
        "channel_mult_emb": Option(whole(1), 4),
        "num_blocks": Option(whole(1), 3),
        "attn_resolutions": Option(several(whole(1)), (32, 16, 8)),
        "dropout": Option(_SHARE, 0.10),
        "label_dropout": Option(number(at_least=0), 0.0),
    },
    "UNet": {
        "model_channels": Option(whole(1), 192),
        "channel_mult": _WIDTHS,
        "channel_mult_noise": Option(optional(whole(1)), None),
        "channel_mult_emb": Option(optional(whole(1)), None),
        "num_blocks": Option(whole(1), 3),
        "attn_resolutions": Option(several(whole(1)), (16, 8)),
        "label_balance": Option(number(at_least=0), 0.5),
        "concat_balance": Option(number(at_least=0), 0.5),
        "resample_filter": Option(several(number(), at_least=1), (1.0, 1.0)),
        "channels_per_head": Option(whole(1), 64),
        "dropout": Option(_SHARE, 0.0),
        "res_balance": Option(number(at_least=0), 0.3),
        "attn_balance": Option(number(at_least=0), 0.3),
        "clip_act": Option(optional(number(above=0)), 256.0),
    },
}


def load(checkpoint: str | Path, config: str | Path | Mapping[str, Any]) -> Denoiser:
    """The denoiser that a checkpoint holds, in evaluation mode, on the CPU.

    Args:
        checkpoint: the state dictionary of the original, as .safetensors or by `torch.save`.
        config: the arguments of the network: a JSON file, or a dictionary.

    Raises:
        UserError: a file is missing or damaged, is a pickle, or describes what cannot be followed.
    """
    given = config if isinstance(config, Mapping) else read_json(config, _HOW)
    description, network, weights = _read(checkpoint, given)
    network.load_state_dict(weights)
    return description.denoiser(network)


def describe(config: Mapping[str, Any]) -> Description:
    """What the arguments of a network describe.

    Raises:
        UserError: an argument is unknown, missing, or makes another function than can be followed.
    """
    full = _with_defaults(config)
    size, channels, label_dim = full["img_resolution"], full["img_channels"], full["label_dim"]
    info = DataInfo(
        name=str(full["class_name"]).lower(),
        shape=(channels, size, size),
        num_classes=label_dim,
        kind="pixels" if channels in (1, 3) else "vectors",  # EDM2's latents have 4 or 8 channels
    )
    make = {"SongUNet": _song_settings, "DhariwalUNet": _adm_settings, "UNet": _edm2_settings}[full["model_type"]]
    model, settings = make(full)
    return Description(model, settings, *_process(full), info)


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the defaults of their classes."""
    name = str(config.get("class_name")).rsplit(".", 1)[-1]
    check_choice("class_name of the configuration", name, PRECONDS)
    networks = ["UNet"] if name == "Precond" else ["SongUNet", "DhariwalUNet"]
    network = config.get("model_type", PRECONDS[name]["model_type"].default)
    check_choice("model_type of the configuration", network, networks)
    table = {**_COMMON, **PRECONDS[name], **NETWORKS[network]}
    full = read_options(config, table, f"{name} with a {network}") | {"class_name": name}
    for key in ("img_resolution", "img_channels"):
        if key not in full:
            raise UserError(f"the configuration has no {key}: give the one that the network was made with")
    return full


def _process(full: Mapping[str, Any]) -> tuple[SDE, Parameterization]:
    """The process and what the network predicts."""
    name, fourier = full["class_name"], full.get("embedding_type") == "fourier"
    if name in ("EDMPrecond", "Precond"):
        low, high = max(full.get("sigma_min", 0), 0.002), min(full.get("sigma_max", 80), 80)
        label = "sigma" if fourier else "log_sigma"
        sde = EDM(T=float(high), t_min=min(1e-3, low), t_min_sampling=float(low))
        return sde, Preconditioned(sigma_data=full["sigma_data"], noise_label=label)
    if (name == "VEPrecond") != fourier:
        told = "log(sigma / 2), of which" if name == "VEPrecond" else "a time step, of which"
        kind = "positional" if name == "VEPrecond" else "Fourier"
        raise UserError(f"{name} tells the network {told} there are no {kind} features here: it cannot be followed")
    if name == "VEPrecond":
        return VE(sigma_min=full["sigma_min"], sigma_max=full["sigma_max"]), Eps(noise_label="sigma")
    if name == "iDDPMPrecond":
        chain = BetaChain(schedule="cosine", n=full["M"], s=full["C_2"], beta_limit=1 - full["C_1"], between="nearest")
        return Cosine(s=full["C_2"]), chain
    check_fixed(full, {"M": 1000})
    return VP(beta_min=full["beta_min"], beta_max=full["beta_min"] + full["beta_d"]), Eps(noise_label="time")


def _shared(full: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "channels": full["model_channels"],
        "channel_multipliers": full["channel_mult"],
        "blocks_per_level": full["num_blocks"],
        "attention_resolutions": full["attn_resolutions"],
        "dropout": full["dropout"],
    }


def _song_settings(full: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    taps = full["resample_filter"]
    check_choice("embedding_type of the configuration", full["embedding_type"], ("positional", "fourier"))
    check_choice("encoder_type of the configuration", full["encoder_type"], ("standard", "skip", "residual"))
    check_choice("decoder_type of the configuration", full["decoder_type"], ("standard", "skip"))
    check_fixed(full, {"channel_mult_emb": 4, "channel_mult_noise": 2 if full["embedding_type"] == "fourier" else 1})
    if len(taps) % 2 or taps != taps[::-1]:
        raise UserError(f"resample_filter={list(taps)} cannot be followed: it must be even in number and symmetric")
    settings = _shared(full) | {
        "fir_kernel": taps,
        "embedding": full["embedding_type"],
        "progressive": {"standard": "none", "skip": "output_skip"}[full["decoder_type"]],
        "progressive_input": {"standard": "none", "skip": "input_skip"}.get(full["encoder_type"], "residual"),
        "classes_join": "features",
    }
    return "ncsnpp", settings


def _adm_settings(full: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    check_fixed(full, {"channel_mult_emb": 4})
    if full["channel_mult"][0] != 1:
        raise UserError(f"channel_mult={list(full['channel_mult'])} cannot be followed: the first factor must be 1")
    return "adm", _shared(full)


def _edm2_settings(full: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    check_fixed(full, {"resample_filter": (1, 1)})
    factors = full["channel_mult"]
    for key, value in (("channel_mult_noise", factors[0]), ("channel_mult_emb", max(factors))):
        if full[key] is not None:
            check_fixed(full, {key: value})
    settings = _shared(full) | {
        "head_channels": full["channels_per_head"],
        "residual_balance": full["res_balance"],
        "attention_balance": full["attn_balance"],
        "label_balance": full["label_balance"],
        "concat_balance": full["concat_balance"],
        "clip": full["clip_act"],
    }
    return "edm2", settings


def _read(checkpoint: str | Path, config: Mapping[str, Any]) -> tuple[Description, nn.Module, dict[str, Tensor]]:
    """What the arguments describe, the network with new weights, and those of the checkpoint."""
    refuse_pickle(Path(checkpoint))
    full, description = _with_defaults(config), describe(config)
    state = read_tensors(checkpoint)
    network = description.network()
    if full["model_type"] == "UNet":
        return description, network, convert_edm2(network, state)  # type: ignore[arg-type]
    check_groups(network, lambda channels: min(32, channels // 4))
    weights = convert_unet(network, state, full["class_name"], full["model_type"])  # type: ignore[arg-type]
    return description, network, weights


def refuse_pickle(path: Path) -> None:
    """Raise `UserError` with the program that converts it when `path` is a pickle."""
    if path.suffix != ".pkl":
        return
    stem = path.stem
    program = (
        "import json, pickle, safetensors.torch as s; "
        f"net = pickle.load(open('{path}', 'rb'))['ema'].float(); "
        f"s.save_file({{k: v.contiguous() for k, v in net.state_dict().items()}}, '{stem}.safetensors'); "
        f"json.dump({{'class_name': type(net).__name__, **net.init_kwargs}}, open('{stem}.json', 'w'))"
    )
    raise UserError(
        f"{path} is a pickle, which runs code when it is read: inside the repository that it comes from, run "
        f'python -c "{program}" and give checkpoint={stem}.safetensors config={stem}.json'
    )


def import_run(config: dict[str, Any]) -> None:
    """Write a run folder from `checkpoint` and `config`."""
    refuse_pickle(Path(config["checkpoint"]))
    description, _, weights = _read(config["checkpoint"], read_json(config["config"], _HOW))
    write_run(Path(output_dir()), description, weights)


def main() -> None:
    """Entry point of the command line."""
    run_command("edm", import_run)


if __name__ == "__main__":
    main()
