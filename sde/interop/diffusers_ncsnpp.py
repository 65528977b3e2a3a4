"""NCSN++ as diffusers has it: a `UNet2DModel` of `SkipDownBlock2D`s and `SkipUpBlock2D`s, with or without attention.

It is score_sde's network for CelebA-HQ and FFHQ (arXiv 2011.13456, appendix H): told sigma, of which it takes the
logarithm, and divided by it, so that it gives the score. Groups of normalization are 32 where diffusers has them fixed;
below 128 channels that is another network than ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sde.data import DataInfo
from sde.errors import UserError, check_choice
from sde.interop.options import Option, number, read_options
from sde.interop.rules import Rule, apply_rules, pair, same
from sde.interop.runs import Description
from sde.interop.unets import as_conv1x1, check_fixed, multipliers_of, unet_rules
from sde.models.embeddings import ConditionEmbedding
from sde.models.layers import Conv3x3, Head, ResidualBlock, SelfAttention
from sde.models.levels import InputSkip
from sde.models.unet import UNet
from sde.parameterizations import Score
from sde.processes import VE

_LEVELS = {"sigma_min": Option(number(above=0), 0.01), "sigma_max": Option(number(above=0), 1348.0)}
_DOWN = {"SkipDownBlock2D": False, "AttnSkipDownBlock2D": True}
_UP = {"SkipUpBlock2D": False, "AttnSkipUpBlock2D": True}


def is_ncsnpp(options: Mapping[str, Any]) -> bool:
    """Whether these are the options of an NCSN++."""
    return any("Skip" in str(name) for name in options["down_block_types"])


def describe_ncsnpp(options: Mapping[str, Any], scheduler: Mapping[str, Any], info: DataInfo) -> Description:
    """What the configurations of an NCSN++ and of its scheduler describe.

    Args:
        options: of the model, with defaults.
        scheduler: of a ScoreSdeVeScheduler; empty for its defaults.
        info: the facts about the data.

    Raises:
        UserError: an option makes another function than can be followed.
    """
    name = scheduler.get("_class_name", "ScoreSdeVeScheduler")
    check_choice("the scheduler of blocks with skips", name, ("ScoreSdeVeScheduler",))
    levels = read_options(scheduler, _LEVELS, None)
    sde = VE(sigma_min=levels["sigma_min"], sigma_max=levels["sigma_max"])
    check_fixed(
        options,
        {
            "in_channels": 3,
            "out_channels": 3,
            "time_embedding_type": "fourier",
            "attention_head_dim": None,
            "norm_num_groups": None,
            "attn_norm_num_groups": None,
            "norm_eps": 1e-6,
            "resnet_time_scale_shift": "default",
            "num_class_embeds": None,
        },
    )
    if abs(options["mid_block_scale_factor"] - 2**0.5) > 1e-6:
        raise UserError(
            f"mid_block_scale_factor={options['mid_block_scale_factor']} of the configuration cannot be followed: "
            "only the square root of 2 can"
        )
    for side, kinds in (("down", _DOWN), ("up", _UP)):
        for kind in options[f"{side}_block_types"]:
            check_choice(f"{side}_block_types of the configuration", kind, kinds)
    attention = [_DOWN[kind] for kind in options["down_block_types"]]
    if attention != [_UP[kind] for kind in reversed(options["up_block_types"])]:
        raise UserError("up_block_types cannot be followed: attention must be at the levels of down_block_types")
    widths = options["block_out_channels"]
    settings = {
        "channels": widths[0],
        "channel_multipliers": multipliers_of("block_out_channels", widths, widths[0]),
        "blocks_per_level": options["layers_per_block"],
        "attention_resolutions": tuple(max(info.shape[1:]) // 2**i for i, has in enumerate(attention) if has),
        "dropout": options["dropout"],
        "embedding": "fourier",
        "progressive": "output_skip",
        "progressive_input": "input_skip",
        "centered": not options["center_input_sample"],
        "scale_by_sigma": True,
    }
    return Description("ncsnpp", settings, sde, Score(noise_label="sigma"), info)


def convert_ncsnpp(network: UNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an NCSN++ under our names.

    Args:
        network: ours, as the configuration describes it.
        state: theirs, with today's names of attention.

    Raises:
        UserError: a tensor is missing, left over or of another shape, or normalization has other groups.
    """
    _check_fixed_groups(network)
    last = f"up_blocks.{len(network.up) - 1}.skip_"
    theirs = {name: tensor for name, tensor in state.items() if name != "time_proj.W"}
    for name, new in (("conv_norm_out", "norm"), ("conv_out", "conv")):
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in theirs:
                theirs[f"{last}{new}.{kind}"] = theirs.pop(f"{name}.{kind}")
    kinds = {
        ConditionEmbedding: _embedding,
        Conv3x3: lambda _: pair("", ""),
        ResidualBlock: block_rules,
        SelfAttention: attention_rules,
        InputSkip: lambda _: pair("conv", "skip_conv"),
        Head: lambda _: pair("norm", "skip_norm") + pair("conv", "skip_conv"),
    }
    return apply_rules(unet_rules(network, _places(network), kinds), theirs, network.state_dict())


def _check_fixed_groups(network: UNet) -> None:
    """Attention of the levels, and what blocks on the way up read, is in 32 groups there."""
    norms = [block.norm_1 for level in network.up for block in level.blocks]  # type: ignore[union-attr]
    for level in (*network.down, *network.up):
        norms += [layer.norm for layer in level.attentions if list(layer.parameters())]
    for norm in norms:
        if norm.num_groups != 32:
            raise UserError(
                f"layers of {norm.num_channels} channels are normalized in 32 groups there and in {norm.num_groups} "
                "here: this network cannot be followed"
            )


def _places(network: UNet) -> Iterator[tuple[str, str]]:
    yield from (("embedding", ""), ("input", "conv_in."))
    lowest, count = len(network.down) - 1, network.settings.blocks_per_level
    for i in range(lowest + 1):
        for j in range(count):
            yield f"down.{i}.blocks.{j}", f"down_blocks.{i}.resnets.{j}."
            yield f"down.{i}.attentions.{j}", f"down_blocks.{i}.attentions.{j}."
        if i < lowest:
            yield f"down.{i}.down", f"down_blocks.{i}.resnet_down."
            yield f"down.{i}.input_pyramid", f"down_blocks.{i}."
    for ours, theirs in (("block_1", "resnets.0"), ("attention", "attentions.0"), ("block_2", "resnets.1")):
        yield f"middle.{ours}", f"mid_block.{theirs}."
    for i in range(lowest + 1):
        for j in range(count + 1):
            yield f"up.{i}.blocks.{j}", f"up_blocks.{i}.resnets.{j}."
        yield f"up.{i}.attentions.{count}", f"up_blocks.{i}.attentions.0."
        yield f"up.{i}.output_pyramid.head", f"up_blocks.{i}."
        if i < lowest:
            yield f"up.{i}.up", f"up_blocks.{i}.resnet_up."


def _embedding(_embedding: ConditionEmbedding) -> list[Rule]:
    rules = [Rule("features.frequencies", ("time_proj.weight",), same)]
    return rules + pair("linear_1", "time_embedding.linear_1") + pair("linear_2", "time_embedding.linear_2")


def block_rules(block: ResidualBlock) -> list[Rule]:
    """Of a ResnetBlock2D."""
    rules = pair("norm_1", "norm1") + pair("conv_1", "conv1") + pair("condition", "time_emb_proj")
    rules += pair("norm_2", "norm2") + pair("conv_2", "conv2")
    return rules + (pair("shortcut", "conv_shortcut") if block.shortcut is not None else [])


def attention_rules(_attention: SelfAttention) -> list[Rule]:
    """Of an Attention."""

    def stacked(*tensors: Tensor) -> Tensor:
        return as_conv1x1(torch.cat(tensors))

    parts = ("to_q", "to_k", "to_v")
    projected = [
        Rule(f"query_key_value.{kind}", tuple(f"{part}.{kind}" for part in parts), stacked)
        for kind in ("weight", "bias")
    ]
    output = [rule._replace(convert=as_conv1x1) for rule in pair("output", "to_out.0")]
    return pair("norm", "group_norm") + projected + output
