"""Reading the RefineNets of the score_sde_pytorch family: `ncsn`, `ncsnv2_64`, `ncsnv2_128` and `ncsnv2_256`.

Their layers are named (`res2.0.conv1`, `refine3.msf.convs.1`, ...), not listed, and have these names in three projects:

    yang-song/score_sde_pytorch   where, as published, these networks do not run: convolutions of dilation 2 and 4 have
                                  padding 1, noise levels are a NumPy array, `ncsn` has normalizations without a label
    ermongroup/ncsnv2             where they come from, with padding equal to the dilation
    ermongroup/ncsn               the same for `ncsn`; averages of weights are not kept

So what a network computes follows ermongroup's, for checkpoints of all three. Configurations of ermongroup/ncsnv2 and
ermongroup/ncsn (YAML there; JSON of the same keys here) are translated, as are their checkpoints, which are lists.
All of these networks know discrete noise levels: `training.continuous` has no meaning for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sde.errors import UserError, check_choice
from sde.interop.rules import Rule, concatenate, pair, required, same, section
from sde.interop.score_sde_options import DATA, ERMONGROUP_DATA, ERMONGROUP_MODEL, REFINENET
from sde.interop.unets import check_fixed
from sde.interop.weights import is_state
from sde.models.ncsn import NCSN
from sde.models.ncsnv2 import NCSNv2

SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "ncsn": {"channel_multipliers": (1, 2, 2, 2), "dilations": (1, 1, 2, 4)},
    "ncsnv2_64": {"channel_multipliers": (1, 2, 2, 2), "dilations": (1, 1, 2, 4)},
    "ncsnv2_128": {"channel_multipliers": (1, 2, 2, 4, 4), "dilations": (1, 1, 1, 2, 4)},
    "ncsnv2_256": {"channel_multipliers": (1, 2, 2, 2, 4, 4), "dilations": (1, 1, 1, 1, 2, 4)},
}
# The original's names of stages and refine blocks, in the order of use, by the number of stages.
_STAGES = {4: "1 2 3 4", 5: "1 2 3 4 5", 6: "1 2 3 31 4 5"}
_REFINE = {4: "1 2 3 4", 5: "1 2 3 4 5", 6: "1 2 31 3 4 5"}
_NORMALIZATIONS = {
    "InstanceNorm++": "instance++",
    "InstanceNorm": "instance",
    "VarianceNorm": "variance",
    "NoneNorm": "none",
}
_DATASETS = {"CIFAR10": "ncsnv2_64", "CELEBA": "ncsnv2_64", "LSUN": "ncsnv2_128", "FFHQ": "ncsnv2_256"}


def refinenet_settings(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model's name here and its keyword settings.

    Args:
        config: as for `sde.interop.score_sde_weights.settings_from_config`, with a model.name of `SIZES`.

    Raises:
        UserError: a value is missing or unknown.
    """
    data, model = section(config, "data", DATA), section(config, "model", REFINENET)
    name = required(model, "name")
    check_choice("model.normalization of the configuration", required(model, "normalization"), _NORMALIZATIONS)
    settings: dict[str, Any] = {
        "channels": required(model, "nf"),
        **SIZES[name],
        "activation": required(model, "nonlinearity").lower(),
        "normalization": _NORMALIZATIONS[model["normalization"]],
        "centered": data["centered"],
        "num_scales": model["num_scales"],
    }
    if name == "ncsn":
        return "ncsn", settings
    if settings["normalization"] == "instance":
        raise UserError(
            "model.normalization='InstanceNorm' cannot be followed for ncsnv2: the original gives its last layer the "
            "number of noise levels for an epsilon; networks with InstanceNorm++, VarianceNorm or NoneNorm can be read"
        )
    settings |= {
        "noise_label": "index",
        "sigma_min": float(model["sigma_min"]),
        "sigma_max": float(model["sigma_max"]),
    }
    return "ncsnv2", settings


def refinenet_rules(network: nn.Module) -> Iterator[Rule]:
    """Which of the original's tensors each tensor of `network`, an `NCSN` or `NCSNv2`, is made of."""
    assert isinstance(network, NCSN | NCSNv2)
    for rule in _named_rules(network):
        yield rule._replace(target=f"refinenet.{rule.target}")


def _named_rules(network: NCSN | NCSNv2) -> Iterator[Rule]:
    inner = network.refinenet
    depth = len(inner.stages)
    modules = dict(inner.named_modules())
    for target, source in _layer_names(modules, _STAGES[depth].split(), _REFINE[depth].split()):
        module = modules.get(target)
        coefficients = getattr(module, "coefficients", None)
        if isinstance(module, nn.Conv2d):
            yield from pair(target, source)[: 1 if module.bias is None else 2]
        elif coefficients is not None:
            table = f"{target}.coefficients.tables.0.weight"
            yield _table_rule(table, source, coefficients.count, isinstance(network, NCSN))


def _table_rule(table: str, source: str, count: int, has_levels: bool) -> Rule:
    """The table of a normalization: an embedding there, or one or three vectors that are its only row."""
    if has_levels:
        return Rule(table, (f"{source}.embed.weight",), same)
    vectors = ("gamma", "alpha", "beta") if count == 3 else ("alpha",)
    return Rule(table, tuple(f"{source}.{vector}" for vector in vectors), _row)


def _row(*vectors: Tensor) -> Tensor:
    return concatenate(*vectors)[None]


def _layer_names(modules: Mapping[str, nn.Module], stages: list[str], refine: list[str]) -> Iterator[tuple[str, str]]:
    """Our name and the original's of every layer that may have weights, and of some that are not there."""
    yield from (("input", "begin_conv"), ("norm", "normalizer"), ("output", "end_conv"))
    for i, stage in enumerate(stages):
        for j in range(2):
            ours, theirs = f"stages.{i}.{j}", f"res{stage}.{j}"
            for k in ("1", "2"):
                yield f"{ours}.norm_{k}", f"{theirs}.normalize{k}"
            yield f"{ours}.conv_1", f"{theirs}.conv1"
            for layer, name in (("conv_2", "conv2"), ("shortcut", "shortcut")):
                inside = ".conv" if f"{ours}.{layer}.conv" in modules else ""
                yield f"{ours}.{layer}{inside}", f"{theirs}.{name}{inside}"
    for i, block in enumerate(refine):
        ours, theirs = f"refine.{i}", f"refine{block}"
        for j in range(1 if i == 0 else 2):
            yield from _unit_names(f"{ours}.adapt.{j}", f"{theirs}.adapt_convs.{j}", 2)
        yield from _unit_names(f"{ours}.output", f"{theirs}.output_convs", 3 if i == len(refine) - 1 else 1)
        for j in range(2):
            for layer, name in (("fuse", "msf"), ("pooling", "crp")):
                yield f"{ours}.{layer}.convs.{j}", f"{theirs}.{name}.convs.{j}"
                yield f"{ours}.{layer}.norms.{j}", f"{theirs}.{name}.norms.{j}"


def _unit_names(ours: str, theirs: str, count: int) -> Iterator[tuple[str, str]]:
    for i in range(2 * count):
        place = f"{theirs}.{i // 2 + 1}_{i % 2 + 1}"
        yield f"{ours}.convs.{i}", f"{place}_conv"
        yield f"{ours}.norms.{i}", f"{place}_norm"


def translate_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration of ermongroup/ncsnv2 or ermongroup/ncsn as score_sde_pytorch would write it; others as they are.

    The network follows from the data set, as there, unless model.name names it: `ncsn` must be named.

    Raises:
        UserError: a value is missing, or stands for something that no network here has.
    """
    if "ngf" not in (config.get("model") or ()):
        return config
    data, model = section(config, "data", ERMONGROUP_DATA), section(config, "model", ERMONGROUP_MODEL)
    check_fixed({f"data.{key}": value for key, value in data.items()}, {"data.logit_transform": False})
    fixed = {"model.spec_norm": False, "model.sigma_dist": "geometric"}
    check_fixed({f"model.{key}": value for key, value in model.items()}, fixed)
    dataset = data["dataset"]
    if "name" not in model:
        check_choice("data.dataset of the configuration", dataset, _DATASETS)
    return {
        "data": {
            "dataset": dataset,
            "image_size": data["image_size"],
            "num_channels": data["channels"],
            "centered": data["rescaled"],
        },
        "model": {
            "name": model["name"] if "name" in model else _DATASETS[dataset],
            "nf": required(model, "ngf"),
            "nonlinearity": model["nonlinearity"],
            "normalization": model["normalization"],
            "num_scales": required(model, "num_classes"),
            "sigma_max": required(model, "sigma_begin"),
            "sigma_min": required(model, "sigma_end"),
        },
        "training": {"sde": "vesde", "continuous": False},
    }


def translate_checkpoint(content: Any) -> Any:
    """A checkpoint of ermongroup's, a list, as score_sde_pytorch would write it; others as they are.

    The list holds the weights, the optimizer's state and, in ermongroup/ncsnv2, epoch, step and averages by name.
    Without averages, the weights stand for them: they are what samples were made with.
    """
    is_theirs = isinstance(content, list) and len(content) >= 2 and isinstance(content[1], Mapping)
    if not is_theirs or not is_state(content[0]):
        return content
    weights = {name.removeprefix("module."): tensor for name, tensor in content[0].items() if "sigmas" not in name}
    averages = content[4] if len(content) > 4 and is_state(content[4]) else {}
    return {
        "model": weights,
        "ema": {"shadow_params": [averages.get(name, tensor) for name, tensor in weights.items()]},
        "optimizer": content[1] if len(content) > 1 else {},
        "step": content[3] if len(content) > 3 else 0,
    }
