"""ADM as openai/guided-diffusion trains it (arXiv 2105.05233), as denoisers and as runs to sample from.

    denoiser = load("64x64_diffusion.pt", "flags.json")
    python -m sde.interop.guided_diffusion checkpoint=64x64_diffusion.pt config=flags.json

The configuration is the flags of the original's scripts as JSON, those that differ from its defaults:

    {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "attention_resolutions": "32,16,8", "class_cond": true,
     "learn_sigma": true, "noise_schedule": "cosine", "num_head_channels": 64, "resblock_updown": true, ...}

The networks know a discrete chain: see `sde.interop.chains.BetaChain`. With learn_sigma the second half of the output,
which speaks of the variance of a reverse step, is left out. Of the flags, only those with which the function is the
same here are accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sde.cli import output_dir, run_command
from sde.data import DataInfo
from sde.denoiser import Denoiser
from sde.errors import UserError, check_choice
from sde.interop.chains import BetaChain, process_of
from sde.interop.options import FLAG, WORD, Option, number, read_options, several, whole
from sde.interop.rules import Rule, apply_rules, pair
from sde.interop.runs import Description, write_run
from sde.interop.unets import (
    as_conv1x1,
    check_fixed,
    check_groups,
    cosines_first,
    first,
    heads_outside,
    unet_rules,
    with_null_row,
)
from sde.interop.weights import read_json, read_tensors
from sde.models.embeddings import ConditionEmbedding
from sde.models.layers import Conv3x3, Head, ResidualBlock, SelfAttention
from sde.models.resample import ConvDownsample, ConvUpsample
from sde.models.unet import UNet

_HOW = "give the flags of the original's scripts as a JSON object"
FLAGS: dict[str, Option] = {
    "image_size": Option(whole(1), 64),
    "num_channels": Option(whole(1), 128),
    "num_res_blocks": Option(whole(1), 2),
    "num_heads": Option(whole(1), 4),
    "num_heads_upsample": Option(whole(-1), -1),
    "num_head_channels": Option(whole(-1), -1),
    "attention_resolutions": Option(several(whole(1)), (16, 8)),
    "channel_mult": Option(several(whole(1)), ()),
    "dropout": Option(number(at_least=0, below=1), 0.0),
    "class_cond": Option(FLAG, False),
    "num_classes": Option(whole(1), 1000),  # fixed in the original
    "use_scale_shift_norm": Option(FLAG, True),
    "resblock_updown": Option(FLAG, False),
    "use_new_attention_order": Option(FLAG, False),
    "learn_sigma": Option(FLAG, False),
    "diffusion_steps": Option(whole(2), 1000),
    "noise_schedule": Option(WORD, "linear"),
    "predict_xstart": Option(FLAG, False),
    "rescale_timesteps": Option(FLAG, False),
}
# Flags that say how to train or sample, and nothing of the function.
IGNORED = ("use_kl", "timestep_respacing", "rescale_learned_sigmas", "use_checkpoint", "use_fp16", "sigma_small")
_FACTORS = {256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}


def load(checkpoint: str | Path, config: str | Path | Mapping[str, Any]) -> Denoiser:
    """The denoiser that a checkpoint holds, in evaluation mode, on the CPU.

    Args:
        checkpoint: the original's state dictionary (.pt), or the same as .safetensors.
        config: its flags: a JSON file, or a dictionary.

    Raises:
        UserError: a file is missing or damaged, or describes what cannot be followed.
    """
    given = config if isinstance(config, Mapping) else read_json(config, _HOW)
    description = describe(given)
    network = description.network()
    network.load_state_dict(convert(network, read_tensors(checkpoint), given))
    return description.denoiser(network)


def describe(config: Mapping[str, Any]) -> Description:
    """What the original's flags describe.

    Raises:
        UserError: a flag is unknown or makes another function than can be followed.
    """
    flags = _with_defaults(config)
    size = flags["image_size"]
    factors = _factors(flags)
    sides = flags["attention_resolutions"]
    settings = {
        "channels": flags["num_channels"],
        "channel_multipliers": factors,
        "blocks_per_level": flags["num_res_blocks"],
        "attention_resolutions": tuple(size // (size // side) for side in sides if side <= size),
        "head_channels": _head_channels(flags, factors),
        "dropout": flags["dropout"],
        "adaptive_norm": flags["use_scale_shift_norm"],
        "resample_inside": flags["resblock_updown"],
        "pad_around": True,
    }
    classes = flags["num_classes"] if flags["class_cond"] else 0
    info = DataInfo(name="guided_diffusion", shape=(3, size, size), num_classes=classes)
    chain = _chain(flags)
    return Description("adm", settings, process_of(chain), chain, info)


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    return read_options({key: config[key] for key in config if key not in IGNORED}, FLAGS, "guided-diffusion")


def _factors(flags: Mapping[str, Any]) -> tuple[int, ...]:
    factors = flags["channel_mult"] or _FACTORS.get(flags["image_size"])
    if factors is None:
        raise UserError(
            f"channel_mult of image_size={flags['image_size']} cannot be followed: it must be whole factors, "
            "the first of them 1, such as 1,2,3,4"
        )
    if factors[0] != 1:
        raise UserError(f"channel_mult={list(factors)} cannot be followed: the first factor must be 1")
    return factors


def _head_channels(flags: dict[str, Any], factors: tuple[int, ...]) -> int:
    """Channels of one head, which the original may state as the number of heads."""
    if flags["num_head_channels"] != -1:
        return flags["num_head_channels"]
    if flags["num_heads_upsample"] != -1:
        check_fixed(flags, {"num_heads_upsample": flags["num_heads"]})
    size = flags["image_size"]
    scales = [size // side for side in flags["attention_resolutions"]]
    widths = {flags["num_channels"] * f for i, f in enumerate(factors) if 2**i in scales or i == len(factors) - 1}
    if len(widths) > 1 or min(widths) % flags["num_heads"]:
        raise UserError(
            f"num_heads={flags['num_heads']} at levels of {', '.join(str(w) for w in sorted(widths))} channels cannot "
            "be followed: heads must have the same channels everywhere"
        )
    return min(widths) // flags["num_heads"]


def _chain(flags: Mapping[str, Any]) -> BetaChain:
    check_choice("noise_schedule of the configuration", flags["noise_schedule"], ("linear", "cosine"))
    steps = flags["diffusion_steps"]
    if flags["rescale_timesteps"]:
        check_fixed(flags, {"diffusion_steps": 1000})
    return BetaChain(
        schedule=flags["noise_schedule"],
        n=steps,
        beta_start=0.1 / steps,
        beta_end=20 / steps,
        predicts="x0" if flags["predict_xstart"] else "eps",
    )


def convert(network: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The original's weights under our names.

    Args:
        network: ours, as `describe(config)` makes it.
        state: theirs.
        config: their flags.

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    assert isinstance(network, UNet)
    check_groups(network, lambda _: 32)
    flags = _with_defaults(config)
    kinds = {
        ConditionEmbedding: _embedding,
        Conv3x3: lambda _: pair("", ""),
        ResidualBlock: _block,
        SelfAttention: lambda layer: _attention(layer, flags["use_new_attention_order"]),
        ConvDownsample: lambda _: pair("conv", "op"),
        ConvUpsample: lambda _: pair("conv", "conv"),
        Head: lambda _: _head(network.shape[0] * (2 if flags["learn_sigma"] else 1), network.shape[0]),
    }
    return apply_rules(unet_rules(network, _places(network), kinds), state, network.state_dict())


def _places(network: UNet) -> Iterator[tuple[str, str]]:
    """(our layer, prefix of their tensors): their layers are numbered in the order of use."""
    yield from (("embedding", ""), ("input", "input_blocks.0.0."))
    count, number = network.settings.blocks_per_level, 0
    lowest = len(network.down) - 1
    for i in range(lowest + 1):
        for j in range(count):
            number += 1
            yield f"down.{i}.blocks.{j}", f"input_blocks.{number}.0."
            yield f"down.{i}.attentions.{j}", f"input_blocks.{number}.1."
        if i < lowest:
            number += 1
            yield f"down.{i}.down", f"input_blocks.{number}.0."
    for k, ours in enumerate(("block_1", "attention", "block_2")):
        yield f"middle.{ours}", f"middle_block.{k}."
    for number in range((lowest + 1) * (count + 1)):
        i, j = divmod(number, count + 1)
        yield f"up.{i}.blocks.{j}", f"output_blocks.{number}.0."
        yield f"up.{i}.attentions.{j}", f"output_blocks.{number}.1."
        if j == count and i < lowest:
            has_attention = any(True for _ in network.get_submodule(f"up.{i}.attentions.{j}").parameters())
            yield f"up.{i}.up", f"output_blocks.{number}.{2 if has_attention else 1}."
    yield "output", "out."


def _embedding(embedding: ConditionEmbedding) -> list[Rule]:
    rules = [Rule("linear_1.weight", ("time_embed.0.weight",), cosines_first), pair("linear_1", "time_embed.0")[1]]
    rules += pair("linear_2", "time_embed.2")
    if embedding.classes is not None:
        rules.append(Rule("classes.vectors.weight", ("label_emb.weight",), with_null_row))
    return rules


def _block(block: ResidualBlock) -> list[Rule]:
    rules = pair("norm_1", "in_layers.0") + pair("conv_1", "in_layers.2") + pair("condition", "emb_layers.1")
    rules += pair("norm_2", "out_layers.0") + pair("conv_2", "out_layers.3")
    return rules + (pair("shortcut", "skip_connection") if block.shortcut is not None else [])


def _attention(attention: SelfAttention, new_order: bool) -> list[Rule]:
    """The new order is ours; the old one has queries, keys and values of one head after the other."""
    rows = as_conv1x1 if new_order else heads_outside(attention.heads, interleaved=False)
    projected = [rule._replace(convert=rows) for rule in pair("query_key_value", "qkv")]
    output = [rule._replace(convert=as_conv1x1) for rule in pair("output", "proj_out")]
    return pair("norm", "norm") + projected + output


def _head(given: int, kept: int) -> list[Rule]:
    """`given` channels are expected, of which the first are `kept`."""

    def keep(tensor: Tensor) -> Tensor:
        return first(kept)(tensor) if tensor.shape[0] == given else tensor[:0]

    return pair("norm", "0") + [rule._replace(convert=keep) for rule in pair("conv", "2")]


def import_run(config: dict[str, Any]) -> None:
    """Write a run folder from `checkpoint` and `config`."""
    flags = read_json(config["config"], _HOW)
    description = describe(flags)
    weights = convert(description.network(), read_tensors(config["checkpoint"]), flags)
    write_run(Path(output_dir()), description, weights)


def main() -> None:
    """Entry point of the command line."""
    run_command("guided_diffusion", import_run)


if __name__ == "__main__":
    main()
