"""Reading networks of yang-song/score_sde_pytorch, the code of arXiv 2011.13456: its configurations and its weights.

There a network is one list, `all_modules`, in the order in which `forward` uses it; a weight is called
`module.all_modules.<index>.<name>`. Which layer has which index follows from the configuration alone, so
`original_order` walks our network in that order, and each kind of layer has a list of rules that say which of the
original's tensors its own tensors are made of. Every tensor must find its place, and none may be left over.

    network = network_from_config(config)
    network.load_state_dict(convert_state_dict(network, checkpoint["model"]))     # as last trained
    network.load_state_dict(ema_state_dict(network, checkpoint))                  # averaged: what samples are made with

RefineNets (`ncsn`, `ncsnv2_64` and larger) have named layers instead: see `sde.interop.score_sde_refinenets`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sde.errors import UserError, check_choice
from sde.interop.rules import Rule, apply_rules, concatenate, pair, required, same, section
from sde.interop.score_sde_options import DATA, MODEL, TRAINING, UNET
from sde.interop.score_sde_refinenets import SIZES, refinenet_rules, refinenet_settings, translate_checkpoint
from sde.interop.weights import is_state, load_safely
from sde.models.base import MODELS
from sde.models.embeddings import FourierFeatures
from sde.models.layers import Conv3x3, GroupNorm, Head, ResidualBlock, SelfAttention
from sde.models.levels import DownLevel, InputResidual, InputSkip, OutputResidual, OutputSkip, UpLevel
from sde.models.resample import ConvDownsample, ConvUpsample, FIRConvDownsample, FIRConvUpsample
from sde.models.unet import UNet

Shape = tuple[int, int, int]


def settings_from_config(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], Shape]:
    """The model's name here, its keyword settings and the shape (C, H, W) of its pictures.

    Args:
        config: the original's configuration as nested dictionaries (or ml_collections' own): "data" with image_size,
            num_channels, centered; "model" with name, nf, ch_mult and so on; "training" with sde.

    Raises:
        UserError: the network is not one that can be read, or a value is missing, unknown or of another kind.
    """
    data, sde = section(config, "data", DATA), section(config, "training", TRAINING)["sde"]
    name = required(section(config, "model", MODEL), "name")
    check_choice("model.name of the configuration", name, ("ddpm", "ncsnpp", *SIZES))
    shape = (data["num_channels"], data["image_size"], data["image_size"])
    if name in SIZES:
        return *refinenet_settings(config), shape
    model = {"scale_by_sigma": sde.lower() == "vesde"} | section(config, "model", UNET)
    settings: dict[str, Any] = {
        "channels": required(model, "nf"),
        "channel_multipliers": required(model, "ch_mult"),
        "blocks_per_level": required(model, "num_res_blocks"),
        "attention_resolutions": model["attn_resolutions"],
        "dropout": model["dropout"],
        "activation": model["nonlinearity"].lower(),
        "resample_with_conv": model["resamp_with_conv"],
        "centered": data["centered"],
        "scale_by_sigma": model["scale_by_sigma"],
        "sigma_min": model["sigma_min"],
        "sigma_max": model["sigma_max"],
        "num_scales": model["num_scales"],
    }
    if name == "ncsnpp":
        settings |= {
            "block": model["resblock_type"].lower(),
            "skip_rescale": model["skip_rescale"],
            "init_scale": model["init_scale"],
            "fir": required(model, "fir"),
            "fir_kernel": model["fir_kernel"],
            "embedding": model["embedding_type"].lower(),
            "fourier_scale": model["fourier_scale"],
            "noise_conditional": model["conditional"],
            "progressive": model["progressive"].lower(),
            "progressive_input": required(model, "progressive_input").lower(),
            "progressive_combine": model["progressive_combine"].lower(),
        }
    return name, settings, shape


def network_from_config(config: Mapping[str, Any]) -> nn.Module:
    """A network as the original's configuration describes it, with new weights; errors as `settings_from_config`."""
    name, settings, shape = settings_from_config(config)
    return MODELS.get(name)(shape, **settings)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The original's checkpoint file: a dictionary with "model", "ema", "optimizer" and "step", on the CPU.

    Nothing in the file is executed. The lists that ermongroup/ncsnv2 writes are turned into such a dictionary.

    Raises:
        UserError: there is no such file, or it is not such a checkpoint.
    """
    checkpoint = translate_checkpoint(load_safely(path))
    _tensors_by_name(checkpoint)
    return checkpoint


def convert_state_dict(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's weights under our names, ready for `network.load_state_dict`.

    Args:
        network: made by `network_from_config` from the configuration of the checkpoint.
        state: `checkpoint["model"]`; its names may lack the prefix "module.".

    Raises:
        UserError: a tensor is missing, left over or of another shape; the message names the first.
    """
    rules = _unet_rules(network) if isinstance(network, UNet) else refinenet_rules(network)
    return apply_rules(rules, _plain_names(state), network.state_dict())


def ema_state_dict(network: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The original's averaged weights under our names; arguments and errors as `convert_state_dict`.

    `checkpoint["ema"]["shadow_params"]` is a list without names, in the order of the parameters that are trained: that
    of `checkpoint["model"]` without the buffer `sigmas` and the Fourier frequencies, which come from there.
    """
    model = _plain_names(_tensors_by_name(checkpoint))
    averages = _checkpoint_part(_checkpoint_part(checkpoint, "ema"), "shadow_params")
    if not isinstance(averages, list | tuple) or not all(isinstance(average, Tensor) for average in averages):
        raise UserError("this is not a checkpoint of score_sde_pytorch: its 'shadow_params' is not a list of tensors")
    fixed = ["all_modules.0.W"] if isinstance(network, UNet) and network.settings.embedding == "fourier" else []
    trained = [name for name in model if name not in fixed]
    if len(trained) != len(averages):
        raise UserError(f"the checkpoint averages {len(averages)} tensors but its model trains {len(trained)}")
    averaged = dict(zip(trained, averages, strict=True))
    return convert_state_dict(network, {name: averaged.get(name, model[name]) for name in model})


def original_order(network: UNet) -> Iterator[nn.Module | None]:
    """The layers of `network` in the order of the original's `all_modules`.

    None stands for the Fourier frequencies of a network that is not told the noise level: the original has them all the
    same. Resampling between blocks takes an index with or without weights; resampling of the pyramids of pictures,
    which has none, is not in the list.
    """
    embedding = network.embedding
    if network.settings.embedding == "fourier":
        yield embedding.features
    if embedding.features is not None:
        yield from (embedding.linear_1, embedding.linear_2)
    yield network.input
    for level in network.down:
        assert isinstance(level, DownLevel)
        for block, attention in zip(level.blocks, level.attentions, strict=True):
            yield block
            yield from _if_attention(attention)
        if level.down is not None:
            yield level.down
        yield from _pyramid_order(level.input_pyramid)
    yield from (network.middle.block_1, network.middle.attention, network.middle.block_2)
    for level in network.up:
        assert isinstance(level, UpLevel)
        yield from level.blocks
        yield from _if_attention(level.attentions[-1])
        yield from _pyramid_order(level.output_pyramid)
        if level.up is not None:
            yield level.up
    if network.output is not None:
        yield from _head_order(network.output)


def _if_attention(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, SelfAttention):
        yield module


def _head_order(head: Head) -> Iterator[nn.Module]:
    yield from (head.norm, head.conv)


def _pyramid_order(pyramid: nn.Module | None) -> Iterator[nn.Module]:
    if isinstance(pyramid, InputSkip):
        yield pyramid
    elif isinstance(pyramid, InputResidual):
        yield pyramid.shrink
    elif isinstance(pyramid, OutputSkip):
        yield from _head_order(pyramid.head)
    elif isinstance(pyramid, OutputResidual):
        if pyramid.grow is not None:
            yield pyramid.grow
        if pyramid.head is not None:
            yield from _head_order(pyramid.head)


def _matrices_to_conv(*matrices: Tensor) -> Tensor:
    """(in, out) matrices to the weight (out + out + ..., in, 1, 1) of one 1x1 convolution."""
    return torch.cat([matrix.t() for matrix in matrices])[:, :, None, None]


def _correlation_to_transposed(weight: Tensor) -> Tensor:
    """(out, in, 3, 3) of a correlation to (in, out, 3, 3) of the transposed convolution that equals it."""
    return weight.flip(2, 3).transpose(0, 1)


def _nin(target: str, *sources: str) -> list[Rule]:
    """A 1x1 convolution of ours, which stacks one or more of the original's matrices."""
    return [
        Rule(f"{target}.weight", tuple(f"{source}.W" for source in sources), _matrices_to_conv),
        Rule(f"{target}.bias", tuple(f"{source}.b" for source in sources), concatenate),
    ]


def _residual_rules(block: ResidualBlock, kind: str) -> list[Rule]:
    rules = pair("norm_1", "GroupNorm_0") + pair("conv_1", "Conv_0")
    condition = pair("condition", "Dense_0")
    if block.condition is None:
        condition = [rule._replace(target=None) for rule in condition]
    rules += condition + pair("norm_2", "GroupNorm_1") + pair("conv_2", "Conv_1")
    if block.shortcut is not None:
        rules += _nin("shortcut", "NIN_0") if kind == "ddpm" else pair("shortcut", "Conv_2")
    return rules


def _fir_up_rules() -> list[Rule]:
    return [
        Rule("conv.weight", ("Conv2d_0.weight",), _correlation_to_transposed),
        Rule("bias", ("Conv2d_0.bias",), same),
    ]


_LAYER_RULES: dict[type[nn.Module], list[Rule]] = {
    nn.Linear: pair("", ""),
    nn.Conv2d: pair("", ""),
    Conv3x3: pair("", ""),
    GroupNorm: pair("", ""),
    FourierFeatures: [Rule("frequencies", ("W",), same)],
    SelfAttention: pair("norm", "GroupNorm_0")
    + _nin("query_key_value", "NIN_0", "NIN_1", "NIN_2")
    + _nin("output", "NIN_3"),
    ConvDownsample: pair("conv", "Conv_0"),
    ConvUpsample: pair("conv", "Conv_0"),
    FIRConvDownsample: pair("conv", "Conv2d_0"),
    FIRConvUpsample: _fir_up_rules(),
    InputSkip: pair("conv", "Conv_0"),
}


def _unet_rules(network: UNet) -> Iterator[Rule]:
    """The rules of all layers, with full names on both sides."""
    prefixes = {id(module): name for name, module in network.named_modules()}
    for index, module in enumerate(original_order(network)):
        if module is None:
            rules = [Rule(None, ("W",), same)]
        elif isinstance(module, ResidualBlock):
            rules = _residual_rules(module, network.settings.block)
        else:
            rules = _LAYER_RULES.get(type(module), [])
        for target, sources, convert in rules:
            full = None if target is None else f"{prefixes[id(module)]}.{target}"
            yield Rule(full, tuple(f"all_modules.{index}.{source}" for source in sources), convert)


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix "module." and without `sigmas`, which follows from the configuration."""
    plain = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in plain.items() if name != "sigmas"}


def _tensors_by_name(checkpoint: Any) -> Mapping[str, Tensor]:
    model = _checkpoint_part(checkpoint, "model")
    if not is_state(model):
        raise UserError("this is not a checkpoint of score_sde_pytorch: its 'model' does not hold tensors by name")
    return model


def _checkpoint_part(checkpoint: Any, name: str) -> Any:
    if not isinstance(checkpoint, Mapping) or name not in checkpoint:
        raise UserError(f"this is not a checkpoint of score_sde_pytorch: it has no '{name}'")
    return checkpoint[name]
