r"""The tensors of NVlabs/edm's and NVlabs/edm2's networks under our names.

Their networks are those of score_sde_pytorch and guided-diffusion, and equal ours, up to these:

    attention     rows of queries, keys and values are ordered (heads, channels, 3)
    Fourier       `EDMPrecond` tells the network log(sigma) / 4, ours takes log(sigma): frequencies are divided by 4.
                  `VEPrecond` tells it log(sigma / 2): phases turn by 2 pi w log(2), which the first linear layer takes
                  in, sin(a - b) and cos(a - b) being combinations of sin(a) and cos(a)
    classes       a linear layer on one-hot vectors (SongUNet: times sqrt(classes)) is a table; "no label" is its bias
    sign          `VEPrecond` predicts -z: the last convolutions change sign
    variance      `iDDPMPrecond` has twice the channels: the first half predicts z
    ADM           positional features begin with the cosines

Of EDM2, whose tables are normalized by row, "no label" is zero and the rows are made shorter by what keeps the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sde.errors import UserError
from sde.interop.rules import Rule, apply_rules, pair, same
from sde.interop.unets import cosines_first, first, heads_outside, unet_rules, with_null_row
from sde.models.edm2 import EDM2
from sde.models.embeddings import ConditionEmbedding
from sde.models.layers import Conv3x3, Head, ResidualBlock, SelfAttention
from sde.models.levels import InputResidual, InputSkip, OutputSkip
from sde.models.unet import UNet


def convert_unet(network: UNet, state: Mapping[str, Tensor], precond: str, network_class: str) -> dict[str, Tensor]:
    """The weights of a SongUNet or DhariwalUNet under our names.

    Args:
        network: ours, as the configuration describes it.
        state: theirs, with or without the prefix "model.".
        precond: the class around it, such as "EDMPrecond".
        network_class: "SongUNet" or "DhariwalUNet".

    Raises:
        UserError: a tensor is missing, left over or of another shape, or filters are not those of the configuration.
    """
    theirs = {name.removeprefix("model."): tensor for name, tensor in state.items() if name not in ("u", "model.u")}
    _check_filters(theirs, network.settings.fir_kernel or (1.0, 1.0))
    unused = ("resample_filter", "map_augment.weight")
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith(unused)}
    theirs = _told_log_sigma(theirs, precond)
    song = network_class == "SongUNet"
    last = _last_layer(network.shape[0], precond)
    kinds = {
        ConditionEmbedding: _song_embedding if song else _adm_embedding,
        Conv3x3: lambda _: pair("", ""),
        ResidualBlock: _block,
        SelfAttention: _attention,
        InputSkip: lambda _: pair("conv", "_skip"),
        InputResidual: lambda _: pair("shrink.conv", "_residual"),
        OutputSkip: lambda _: pair("head.norm", "_norm") + last("head.conv", "_conv"),
        Head: lambda _: pair("norm", "_norm") + last("conv", "_conv"),
    }
    rules = unet_rules(network, _places(network, song), kinds)
    return apply_rules(rules, theirs, network.state_dict())


def _check_filters(theirs: Mapping[str, Tensor], taps: Sequence[float]) -> None:
    """Raise `UserError` unless every filter of a checkpoint is that of `taps` along both axes, with a sum of 1."""
    stated = ", ".join(f"{tap:g}" for tap in taps)
    along = torch.tensor(taps, dtype=torch.float64)
    expected = torch.outer(along, along) / along.sum() ** 2
    for name, tensor in theirs.items():
        if not name.endswith("resample_filter"):
            continue
        # the taps were rounded to float16 or float32
        square = tensor.squeeze().double()
        if square.shape != expected.shape or not torch.allclose(square, expected, rtol=2**-10, atol=2**-24):
            raise UserError(
                f"{name} of the checkpoint is not resample_filter=[{stated}] of the configuration: "
                "give the one that the network was made with"
            )


def _places(network: UNet, song: bool) -> Iterator[tuple[str, str]]:
    """(our layer, prefix of their tensors) of the whole network."""
    sides = [f"{network.shape[1] >> i}x{network.shape[1] >> i}" for i in range(len(network.down))]
    lowest = len(sides) - 1
    count = network.settings.blocks_per_level
    yield from (("embedding", ""), ("input", f"enc.{sides[0]}_conv."))
    for i, side in enumerate(sides):
        for j in range(count):
            yield from ((f"down.{i}.{kind}.{j}", f"enc.{side}_block{j}.") for kind in ("blocks", "attentions"))
        if i < lowest:
            yield f"down.{i}.down", f"enc.{sides[i + 1]}_down."
            if network.settings.progressive_input != "none":
                yield f"down.{i}.input_pyramid", f"enc.{sides[i + 1]}_aux"
    yield from (("middle.block_1", f"dec.{sides[-1]}_in0."), ("middle.attention", f"dec.{sides[-1]}_in0."))
    yield "middle.block_2", f"dec.{sides[-1]}_in1."
    for i, side in enumerate(sides):
        ours = f"up.{lowest - i}"
        for j in range(count + 1):
            yield from ((f"{ours}.{kind}.{j}", f"dec.{side}_block{j}.") for kind in ("blocks", "attentions"))
        if i > 0:
            yield f"{ours}.up", f"dec.{sides[i - 1]}_up."
        if network.settings.progressive != "none":
            yield f"{ours}.output_pyramid", f"dec.{side}_aux"
    if network.output is not None:
        yield "output", f"dec.{sides[0]}_aux" if song else "out"


def _block(block: ResidualBlock) -> list[Rule]:
    rules = pair("norm_1", "norm0") + pair("conv_1", "conv0") + pair("condition", "affine")
    rules += pair("norm_2", "norm1") + pair("conv_2", "conv1")
    return rules + (pair("shortcut", "skip") if block.shortcut is not None else [])


def _attention(attention: SelfAttention) -> list[Rule]:
    reorder = heads_outside(attention.heads, interleaved=True)
    projected = [rule._replace(convert=reorder) for rule in pair("query_key_value", "qkv")]
    return pair("norm", "norm2") + projected + pair("output", "proj")


def _last_layer(channels: int, precond: str) -> Callable[[str, str], list[Rule]]:
    keep = torch.neg if precond == "VEPrecond" else first(channels)

    def rules(target: str, source: str) -> list[Rule]:
        return [rule._replace(convert=keep) for rule in pair(target, source)]

    return rules


def _adm_embedding(embedding: ConditionEmbedding) -> list[Rule]:
    rules = [Rule("linear_1.weight", ("map_layer0.weight",), cosines_first)]
    rules += [pair("linear_1", "map_layer0")[1], *pair("linear_2", "map_layer1")]
    if embedding.classes is not None:
        rules.append(Rule("classes.vectors.weight", ("map_label.weight",), lambda weight: with_null_row(weight.t())))
    return rules


def _song_embedding(embedding: ConditionEmbedding) -> list[Rule]:
    rules = [*pair("linear_1", "map_layer0"), *pair("linear_2", "map_layer1")]
    if embedding.features is not None and embedding.features.state_dict():  # Fourier's frequencies are kept
        rules.append(Rule("features.frequencies", ("map_noise.freqs",), same))
    if embedding.classes is not None:
        rules.append(Rule("classes.vectors.weight", ("map_label.weight", "map_label.bias"), _class_table))
    return rules


def _class_table(weight: Tensor, bias: Tensor) -> Tensor:
    """weight (size, classes) and bias (size,) of a layer on one-hot vectors times sqrt(classes), as a table."""
    return with_null_row(weight.t() * math.sqrt(weight.shape[1])) + bias


def _told_log_sigma(theirs: Mapping[str, Tensor], precond: str) -> dict[str, Tensor]:
    """The tensors of a network with Fourier features for one that is told log(sigma); those of others as they are."""
    frequencies = theirs.get("map_noise.freqs")
    if frequencies is None:
        return dict(theirs)
    if precond == "EDMPrecond":
        return {**theirs, "map_noise.freqs": frequencies / 4}
    turned = {
        name: _turn(theirs[name], frequencies) for name in ("map_layer0.weight", "map_label.bias") if name in theirs
    }
    if "map_label.weight" in theirs:
        turned["map_label.weight"] = _turn(theirs["map_label.weight"].t(), frequencies).t()
    return {**theirs, **turned}


def _turn(features: Tensor, frequencies: Tensor) -> Tensor:
    """Coefficients (..., sines and cosines) of w log(sigma / 2) as those of w log(sigma), for w (frequencies,)."""
    if features.shape[-1] != 2 * len(frequencies):
        return features  # whose shape is refused with its name later
    phase = 2 * math.pi * math.log(2) * frequencies.double()
    sines, cosines = features.double().chunk(2, dim=-1)
    turned = (sines * phase.cos() + cosines * phase.sin(), cosines * phase.cos() - sines * phase.sin())
    return torch.cat(turned, dim=-1).to(features.dtype)


def convert_edm2(network: EDM2, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of EDM2's `Precond` or its `unet` under our names; the estimate of uncertainty is left out.

    Args:
        network: ours, as the configuration describes it.
        state: theirs, with or without the prefix "unet.".

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    theirs = {name.removeprefix("unet."): tensor for name, tensor in state.items() if not name.startswith("logvar_")}
    table = "embedding.classes.weight"
    rules = [
        Rule(ours, (name,), _table_with_null if ours == table else same)
        for ours, name in network.published_names().items()
    ]
    return apply_rules(rules, theirs, network.state_dict())


def _table_with_null(weight: Tensor) -> Tensor:
    """The table (size, classes) with a column of zeros, which leaves what the network makes of the others as it is.

    A row w of n numbers counts as w / (r + e), with r its root mean square and e = 1e-4. A zero more makes that
    r s, s^2 = n / (n + 1), so the row has to be c w with c / (c r s + e) = 1 / (r + e).
    """
    count, e = weight.shape[1], 1e-4
    rms = weight.double().square().mean(1, keepdim=True).sqrt()
    c = e / (rms * (1 - math.sqrt(count / (count + 1))) + e)
    return torch.cat((c * weight, torch.zeros_like(c)), dim=1).to(weight.dtype)
