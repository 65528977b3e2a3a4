"""`UNet2DModel`s of huggingface/diffusers as denoisers, and as runs to sample from.

    denoiser = load("ddpm-cifar10-32")
    python -m sde.interop.diffusers folder=ddpm-cifar10-32

The folder is that of the model (config.json and diffusion_pytorch_model.safetensors) or of a pipeline that has it in
unet/. A scheduler_config.json beside it, or in scheduler/, says on which chain of betas and for which target the
network was trained; without one it is DDPM's, for the noise. The networks know the chain's steps alone: see
`sde.interop.chains.BetaChain`.

The U-Net is our `ddpm`, or `adm` where it has several heads, scale and shift, resampling inside of blocks or zeros all
around; with skips it is `ncsnpp` (`sde.interop.diffusers_ncsnpp`). Every option that makes another function is refused
with its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sde.cli import output_dir, run_command
from sde.data import DataInfo
from sde.denoiser import Denoiser
from sde.errors import UserError, check_choice
from sde.interop.chains import BetaChain, process_of
from sde.interop.diffusers_ncsnpp import (
    attention_rules,
    block_rules,
    convert_ncsnpp,
    describe_ncsnpp,
    is_ncsnpp,
)
from sde.interop.options import (
    ANYTHING,
    FLAG,
    WORD,
    Kind,
    Option,
    number,
    optional,
    read_options,
    several,
    whole,
)
from sde.interop.rules import Rule, apply_rules, pair
from sde.interop.runs import Description, write_run
from sde.interop.unets import (
    check_fixed,
    check_groups,
    cosines_first,
    first,
    multipliers_of,
    unet_rules,
    with_null_row,
)
from sde.interop.weights import read_json, read_tensors
from sde.models.embeddings import ConditionEmbedding
from sde.models.layers import Conv3x3, Head, ResidualBlock, SelfAttention
from sde.models.resample import ConvDownsample, ConvUpsample
from sde.models.unet import UNet

_HOW = "give the folder of a UNet2DModel, or of a pipeline that has one in unet/"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_SIDES = Kind(
    "a whole number, or a list of two",
    lambda value: several(whole(1)).read(value) if isinstance(value, list | tuple) else whole(1).read(value),
)
_CHANNELS = several(whole(1), at_least=1)
OPTIONS: dict[str, Option] = {
    "sample_size": Option(optional(_SIDES), None),
    "in_channels": Option(whole(1), 3),
    "out_channels": Option(whole(1), 3),
    "center_input_sample": Option(FLAG, False),
    "time_embedding_type": Option(WORD, "positional"),
    "time_embedding_dim": Option(optional(whole(1)), None),
    "freq_shift": Option(whole(0), 0),
    "flip_sin_to_cos": Option(FLAG, True),
    "down_block_types": Option(
        several(WORD, at_least=1), ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    ),
    "mid_block_type": Option(optional(WORD), "UNetMidBlock2D"),
    "up_block_types": Option(
        several(WORD, at_least=1), ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    ),
    "block_out_channels": Option(_CHANNELS, (224, 448, 672, 896)),
    "layers_per_block": Option(whole(1), 2),
    "mid_block_scale_factor": Option(number(above=0), 1),
    "downsample_padding": Option(whole(0), 1),
    "downsample_type": Option(WORD, "conv"),
    "upsample_type": Option(WORD, "conv"),
    "dropout": Option(number(at_least=0, below=1), 0.0),
    "act_fn": Option(WORD, "silu"),
    "attention_head_dim": Option(optional(whole(1)), 8),
    "norm_num_groups": Option(optional(whole(1)), 32),
    "attn_norm_num_groups": Option(optional(whole(1)), None),
    "norm_eps": Option(number(above=0), 1e-5),
    "resnet_time_scale_shift": Option(WORD, "default"),
    "add_attention": Option(FLAG, True),
    "class_embed_type": Option(optional(WORD), None),
    "num_class_embeds": Option(optional(whole(1)), None),
    "num_train_timesteps": Option(optional(whole(1)), None),
}
# The kinds of levels: whether they have attention, and how they resample; None for what an option says.
_DOWN = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
_UP = {"UpBlock2D": (False, "conv"), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, "resnet")}
SCHEDULER: dict[str, Option] = {
    "num_train_timesteps": Option(whole(2), 1000),
    "beta_start": Option(number(above=0, below=1), 1e-4),
    "beta_end": Option(number(above=0, below=1), 0.02),
    "beta_schedule": Option(WORD, "linear"),
    "trained_betas": Option(ANYTHING, None),
    "prediction_type": Option(WORD, "epsilon"),
    "rescale_betas_zero_snr": Option(FLAG, False),
    "use_flow_sigmas": Option(FLAG, False),
    "variance_type": Option(optional(WORD), None),
}
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_TARGETS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# The schedulers that walk a chain of betas, with the defaults that differ from DDPM's.
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS: dict[str, dict[str, float]] = {
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDIMParallelScheduler": {},
    "DDIMInverseScheduler": {},
    "PNDMScheduler": {},
    "LMSDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": _LATENT,
    "KDPM2DiscreteScheduler": _LATENT,
    "KDPM2AncestralDiscreteScheduler": _LATENT,
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DPMSolverSDEScheduler": _LATENT,
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "SASolverScheduler": {},
}


def load(folder: str | Path) -> Denoiser:
    """The denoiser of a model's or a pipeline's folder, in evaluation mode, on the CPU.

    Raises:
        UserError: a file is missing or damaged, or an option makes another function than can be followed.
    """
    description, weights = _read(Path(folder).expanduser())
    network = description.network()
    network.load_state_dict(weights)
    return description.denoiser(network)


def describe(config: Mapping[str, Any], scheduler: Mapping[str, Any] | None = None) -> Description:
    """What the configurations of a model and of its scheduler describe.

    Args:
        config: content of config.json.
        scheduler: content of scheduler_config.json; None for DDPM's chain.

    Raises:
        UserError: an option is unknown, missing, or makes another function than can be followed.
    """
    options, scheduler = _with_defaults(config), scheduler or {}
    size = options["sample_size"]
    size = (size, size) if isinstance(size, int) else size
    if size is None or len(size) != 2:
        raise UserError(f"sample_size={size!r} of the configuration cannot be followed: give height and width")
    levels = {len(options[key]) for key in ("down_block_types", "up_block_types", "block_out_channels")}
    if len(levels) > 1:
        raise UserError(
            "down_block_types, up_block_types and block_out_channels of the configuration speak of different numbers "
            "of levels: give one entry of each for every level"
        )
    check_fixed(
        options,
        {"mid_block_type": "UNetMidBlock2D", "add_attention": True, "class_embed_type": None},
    )
    check_choice("act_fn of the configuration", options["act_fn"], ("silu", "swish"))
    if options["time_embedding_dim"] is not None:
        check_fixed(options, {"time_embedding_dim": 4 * options["block_out_channels"][0]})
    info = DataInfo(
        name="diffusers",
        shape=(options["in_channels"], *size),
        num_classes=options["num_class_embeds"] or 0,
        kind="pixels" if options["in_channels"] in (1, 3) else "vectors",
        low=0.0 if options["center_input_sample"] else -1.0,
    )
    if is_ncsnpp(options):
        return describe_ncsnpp(options, scheduler, info)
    check_fixed(options, {"time_embedding_type": "positional", "mid_block_scale_factor": 1})
    told = _scheduler(scheduler)
    _check_outputs(options, told["variance_type"])
    chain = _chain(told)
    return Description(*_model(options, max(size)), process_of(chain), chain, info)


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    check_choice("_class_name of the configuration", config.get("_class_name", "UNet2DModel"), ("UNet2DModel",))
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    return read_options(given, OPTIONS, "UNet2DModel")


def _check_outputs(options: Mapping[str, Any], variance_type: str | None) -> None:
    inputs, outputs = options["in_channels"], options["out_channels"]
    if outputs != inputs and not (outputs == 2 * inputs and str(variance_type).startswith("learned")):
        raise UserError(
            f"out_channels={outputs} of the configuration cannot be followed: it must be in_channels={inputs}, or "
            "twice that with variance_type=learned_range of the scheduler"
        )


def _model(options: Mapping[str, Any], side: int) -> tuple[str, dict[str, Any]]:
    """The registered name and the settings of the network."""
    attention, resampling = _levels(options)
    check_choice("freq_shift of the configuration", str(options["freq_shift"]), ("0", "1"))
    shift = options["resnet_time_scale_shift"]
    check_choice("resnet_time_scale_shift of the configuration", shift, ("default", "scale_shift"))
    if options["attn_norm_num_groups"] is None and shift == "scale_shift":
        raise UserError("attn_norm_num_groups=None with scale_shift cannot be followed: attention is not normalized")
    if options["attn_norm_num_groups"] is not None:
        check_fixed(options, {"attn_norm_num_groups": options["norm_num_groups"]})
    widths = options["block_out_channels"]
    settings: dict[str, Any] = {
        "channels": widths[0],
        "channel_multipliers": multipliers_of("block_out_channels", widths, widths[0]),
        "blocks_per_level": options["layers_per_block"],
        "attention_resolutions": tuple(side // 2**i for i, has in enumerate(attention) if has),
        "attention_up": "every",
        "norm_eps": options["norm_eps"],
        "dropout": options["dropout"],
        "centered": not options["center_input_sample"],
    }
    adm = {
        "head_channels": options["attention_head_dim"],
        "adaptive_norm": shift == "scale_shift",
        "resample_inside": resampling == "resnet",
        "pad_around": resampling == "conv" and options["downsample_padding"] == 1,
        "lowest_frequency": options["freq_shift"] == 1,
    }
    if resampling == "conv":
        check_choice("downsample_padding of the configuration", str(options["downsample_padding"]), ("0", "1"))
    plain = {
        "head_channels": None,
        "adaptive_norm": False,
        "resample_inside": False,
        "pad_around": False,
        "lowest_frequency": True,
    }
    return ("ddpm", settings) if adm == plain else ("adm", settings | adm)


def _levels(options: Mapping[str, Any]) -> tuple[list[bool], str]:
    """Whether each level has attention, and how levels are resampled: "conv" or "resnet"."""
    down, up = options["down_block_types"], options["up_block_types"]
    for name in down:
        check_choice("down_block_types of the configuration", name, _DOWN)
    for name in up:
        check_choice("up_block_types of the configuration", name, _UP)
    attention = [_DOWN[name][0] for name in down]
    if attention != [_UP[name][0] for name in reversed(up)]:
        raise UserError(
            f"up_block_types={list(up)} cannot be followed: attention must be at the levels of down_block_types"
        )
    # the lowest level of the way down and the highest of the way up are not resampled
    ways = {_DOWN[name][1] or options["downsample_type"] for name in down[:-1]}
    ways |= {_UP[name][1] or options["upsample_type"] for name in up[:-1]}
    if len(ways) > 1 or not ways <= {"conv", "resnet"}:
        raise UserError(
            f"resampling by {' and '.join(sorted(map(str, ways)))} cannot be followed: downsample_type, upsample_type "
            "and the types of blocks must all say conv, or all resnet"
        )
    return attention, ways.pop() if ways else "conv"


def _scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler says of the chain that it walks, with its own defaults; what it says of sampling is left out."""
    name = str(config.get("_class_name", "DDPMScheduler"))
    if name not in SCHEDULERS:
        raise UserError(
            f"the scheduler {name} has no table of betas that can be followed: give one such as DDPMScheduler"
        )
    return read_options({**SCHEDULERS[name], **config}, SCHEDULER, None)


def _chain(options: Mapping[str, Any]) -> BetaChain:
    """The chain that a scheduler describes."""
    check_fixed(options, {"trained_betas": None, "rescale_betas_zero_snr": False, "use_flow_sigmas": False})
    check_choice("beta_schedule of the scheduler", options["beta_schedule"], _SCHEDULES)
    check_choice("prediction_type of the scheduler", options["prediction_type"], _TARGETS)
    return BetaChain(
        schedule=_SCHEDULES[options["beta_schedule"]],
        n=options["num_train_timesteps"],
        beta_start=options["beta_start"],
        beta_end=options["beta_end"],
        predicts=_TARGETS[options["prediction_type"]],
    )


def convert(network: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a `UNet2DModel` under our names.

    Args:
        network: ours, as `describe(config)` makes it.
        state: theirs; attention may have the names of older versions (query, key, value, proj_attn).
        config: content of config.json.

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    assert isinstance(network, UNet)
    options = _with_defaults(config)
    theirs = {_new_name(name): tensor for name, tensor in state.items()}
    if is_ncsnpp(options):
        return convert_ncsnpp(network, theirs)
    check_groups(network, lambda _: int(options["norm_num_groups"]))
    kinds = {
        ConditionEmbedding: lambda layer: _embedding(layer, options["flip_sin_to_cos"]),
        Conv3x3: lambda _: pair("", ""),
        ResidualBlock: block_rules,
        SelfAttention: attention_rules,
        ConvDownsample: lambda _: pair("conv", "conv"),
        ConvUpsample: lambda _: pair("conv", "conv"),
        Head: lambda _: pair("norm", "norm_out") + _last_layer(network.shape[0]),
    }
    return apply_rules(unet_rules(network, _places(network), kinds), theirs, network.state_dict())


def _new_name(name: str) -> str:
    """The name of a tensor of attention before version 0.15 as today's."""
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{new[m[2]]}.", name)


def _places(network: UNet) -> Iterator[tuple[str, str]]:
    """(our layer, prefix of their tensors) of the whole network."""
    yield from (("embedding", ""), ("input", "conv_in."))
    for way, resampler in (("down", "downsamplers"), ("up", "upsamplers")):
        levels = network.get_submodule(way)
        for i in range(len(network.down)):
            for j in range(len(levels.get_submodule(f"{i}.blocks"))):  # type: ignore[arg-type]
                yield f"{way}.{i}.blocks.{j}", f"{way}_blocks.{i}.resnets.{j}."
                yield f"{way}.{i}.attentions.{j}", f"{way}_blocks.{i}.attentions.{j}."
            if i < len(network.down) - 1:
                yield f"{way}.{i}.{way}", f"{way}_blocks.{i}.{resampler}.0."
    for ours, theirs in (("block_1", "resnets.0"), ("attention", "attentions.0"), ("block_2", "resnets.1")):
        yield f"middle.{ours}", f"mid_block.{theirs}."
    yield "output", "conv_"


def _embedding(embedding: ConditionEmbedding, flipped: bool) -> list[Rule]:
    rules = pair("linear_1", "time_embedding.linear_1")
    if flipped:
        rules[0] = rules[0]._replace(convert=cosines_first)
    rules += pair("linear_2", "time_embedding.linear_2")
    if embedding.classes is not None:
        rules.append(Rule("classes.vectors.weight", ("class_embedding.weight",), with_null_row))
    return rules


def _last_layer(channels: int) -> list[Rule]:
    return [rule._replace(convert=first(channels)) for rule in pair("conv", "out")]


def _read(folder: Path) -> tuple[Description, dict[str, Tensor]]:
    """What a folder describes, and its weights under our names."""
    model = folder / "unet" if (folder / "unet").is_dir() else folder
    config = read_json(model / "config.json", _HOW)
    places = (folder, folder / "scheduler", model.parent / "scheduler")
    files = [place / "scheduler_config.json" for place in places if (place / "scheduler_config.json").is_file()]
    description = describe(config, read_json(files[0], _HOW) if files else None)
    weights = [model / name for name in _WEIGHTS if (model / name).is_file()]
    if not weights:
        raise UserError(f"{model} has no {_WEIGHTS[0]}: {_HOW}")
    return description, convert(description.network(), read_tensors(weights[0]), config)


def import_run(config: dict[str, Any]) -> None:
    """Write a run folder from `folder`."""
    description, weights = _read(Path(str(config["folder"])).expanduser())
    write_run(Path(output_dir()), description, weights)


def main() -> None:
    """Entry point of the command line."""
    run_command("diffusers", import_run)


if __name__ == "__main__":
    main()
