"""Networks read from score_sde_pytorch's checkpoints compute what the original computes.

`../shared/golden` holds outputs of the original itself; `score_sde_reference` is an independent network in its layout,
for every other configuration.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.original import ListNetwork
from sde.errors import UserError
from sde.interop.score_sde import describe
from sde.interop.score_sde_weights import (
    convert_state_dict,
    ema_state_dict,
    network_from_config,
    original_order,
    read_checkpoint,
    settings_from_config,
)
from sde.interop.weights import read_tensors
from sde.models import DDPM, NCSNpp

GOLDEN = Path(__file__).parents[1] / ".." / "shared" / "golden"
CASES = ("subvp_ddpmpp", "ve_ffhq", "ve_ncsnpp", "vp_ddpm", "vp_ncsnpp")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks lose more to the coordination of threads than they gain, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest) -> Path:
    folder = GOLDEN / request.param
    if not folder.is_dir():
        pytest.skip(f"{GOLDEN} is not here")
    return folder


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((ours - theirs).norm() / theirs.norm())


def test_golden_outputs(golden: Path) -> None:
    """float32 networks of some thirty layers agree to rounding, with the last and with the averaged weights."""
    network = network_from_config(json.loads((golden / "config.json").read_text())).eval()
    checkpoint = read_checkpoint(golden / "checkpoint.pth")
    data = {name: torch.from_numpy(array) for name, array in np.load(golden / "io.npz").items()}
    weights = {"out": convert_state_dict(network, checkpoint["model"]), "out_ema": ema_state_dict(network, checkpoint)}
    for name, state in weights.items():
        network.load_state_dict(state)
        with torch.no_grad():
            assert distance(network(data["x"], data["label"]), data[name]) < 1e-5


def config(*, size: int = 8, channels: int = 3, centered: bool = False, name: str = "ncsnpp", **model: Any) -> dict:
    """A small configuration of the original's: CIFAR-10's NCSN++ unless told otherwise."""
    settings = {
        "name": name, "nf": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "dropout": 0.1,
        "resamp_with_conv": True, "conditional": True, "nonlinearity": "swish", "scale_by_sigma": True,
        "sigma_min": 0.01, "sigma_max": 50, "num_scales": 1000, "embedding_type": "fourier",
    }  # fmt: skip
    if name == "ncsnpp":
        settings |= {
            "fourier_scale": 16, "fir": True, "fir_kernel": [1, 3, 3, 1], "skip_rescale": True, "init_scale": 0.0,
            "resblock_type": "biggan", "progressive": "none", "progressive_input": "residual",
            "progressive_combine": "sum",
        }  # fmt: skip
    else:
        settings |= {"nf": 32}
    data = {"image_size": size, "num_channels": channels, "centered": centered}
    return {"data": data, "model": settings | model, "training": {"sde": "vesde"}}


def labels(model: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Three noise labels as the original's network takes them and as ours does."""
    if model["embedding_type"] == "fourier" and model["name"] == "ncsnpp":
        label = torch.tensor([0.0123, 1.1, 47.0], dtype=torch.float64)
        return label, label
    if not model["scale_by_sigma"]:
        label = torch.tensor([0.5, 321.25, 999.0], dtype=torch.float64)
        return label, label
    index = torch.tensor([0, model["num_scales"] // 3, model["num_scales"] - 1])
    return index, index.double()


def check_parity(settings: dict[str, Any]) -> None:
    """Outputs in float64 agree to rounding, with both kinds of weights; every parameter gets a finite gradient."""
    theirs = ListNetwork(settings).eval()
    checkpoint = theirs.checkpoint()
    ours = network_from_config(settings).double().eval()
    data = settings["data"]
    generator = torch.Generator().manual_seed(1)
    shape = (3, data["num_channels"], data["image_size"], data["image_size"])
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    their_label, our_label = labels(settings["model"])

    ours.load_state_dict(ema_state_dict(ours, checkpoint))
    with torch.no_grad():
        averaged = ours(x, our_label)
    ours.load_state_dict(convert_state_dict(ours, checkpoint["model"]))
    y = ours(x, our_label)
    with torch.no_grad():
        assert distance(y, theirs(x, their_label)) < 1e-12
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
        assert distance(averaged, theirs(x, their_label)) < 1e-12

    y.square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


SEVEN_LEVELS = {"ch_mult": [1, 1, 2, 2, 2, 2, 2], "attn_resolutions": [16], "size": 64}
PROGRESSIVE = {"progressive": "output_skip", "progressive_input": "input_skip"}
DISCRETE = {"embedding_type": "positional", "scale_by_sigma": True}
CONFIGURATIONS = {
    "cifar10": config(size=16, ch_mult=[1, 2, 2, 2], attn_resolutions=[8], num_res_blocks=2),
    "cifar10_deep": config(num_res_blocks=8),
    "cifar10_discrete": config(**DISCRETE),
    "cifar10_vp": config(centered=True, embedding_type="positional", scale_by_sigma=False),
    "cifar10_ddpm_discrete": config(name="ddpm", num_res_blocks=2, **DISCRETE),
    "church_ddpm": config(name="ddpm", scale_by_sigma=False, centered=True, ch_mult=[1, 1, 2], attn_resolutions=[2]),
    "ddpm_without_conv": config(name="ddpm", scale_by_sigma=False, resamp_with_conv=False),
    "bedroom": config(**SEVEN_LEVELS, **PROGRESSIVE, num_res_blocks=2, sigma_max=378, num_scales=2000),
    "celebahq": config(**SEVEN_LEVELS, **PROGRESSIVE, num_res_blocks=1, sigma_max=348, num_scales=2000),
    "ffhq_1024": config(size=32, nf=4, ch_mult=[1, 2, 4, 8, 16], **PROGRESSIVE),
    "one_channel": config(channels=1, **PROGRESSIVE),
    "five_channels": config(channels=5),
    "discrete_few_scales": config(num_scales=7, sigma_max=90.0, **DISCRETE),
    "odd_embedding": config(nf=12, embedding_type="positional", scale_by_sigma=False),
    "three_widths": config(size=16, ch_mult=[1, 3, 2], progressive="residual"),
    "attention_everywhere": config(attn_resolutions=[8, 4]),
    "no_attention": config(attn_resolutions=[]),
}


@pytest.mark.parametrize("settings", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_parity_configurations(settings: dict[str, Any]) -> None:
    check_parity(settings)


BLOCKS = ({"resblock_type": "biggan"}, {"resblock_type": "ddpm"}, {"resblock_type": "ddpm", "resamp_with_conv": False})
INPUTS = (
    {"progressive_input": "none"},
    {"progressive_input": "residual"},
    {"progressive_input": "input_skip"},
    {"progressive_input": "input_skip", "progressive_combine": "cat"},
)
EMBEDDINGS = tuple(itertools.product(("fourier", "positional"), (True, False)))


def variations() -> Iterator[dict[str, Any]]:
    """Settings that do not change the arrangement of the layers, each in turn."""
    activations = itertools.cycle(("swish", "elu", "relu", "lrelu"))
    kernels = itertools.cycle(([1, 3, 3, 1], [1, 1], [1, 2, 1], [1, 4, 2, 3, 1], [2, 1, 3, 5, 4, 1]))
    for rescale, scale, centered in itertools.cycle(itertools.product((True, False), repeat=3)):
        yield {
            "skip_rescale": rescale,
            "scale_by_sigma": scale,
            "centered": centered,
            "nonlinearity": next(activations),
            "fir_kernel": next(kernels),
        }


@pytest.mark.parametrize("fir", [True, False], ids=["fir", "plain"])
@pytest.mark.parametrize("progressive", ["none", "output_skip", "residual"])
@pytest.mark.parametrize("block", BLOCKS, ids=["biggan", "ddpm", "ddpm_no_conv"])
def test_parity_of_every_combination(fir: bool, progressive: str, block: dict[str, Any]) -> None:
    varied = variations()
    for inputs, (embedding, conditional) in itertools.product(INPUTS, EMBEDDINGS):
        kind = {"embedding_type": embedding, "conditional": conditional, "progressive": progressive, "fir": fir}
        check_parity(config(**kind, **block, **inputs, **next(varied)))


def test_names_are_not_needed_to_have_the_prefix() -> None:
    settings = config()
    network = network_from_config(settings)
    state = ListNetwork(settings).checkpoint()["model"]
    plain = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    with_prefix, without = convert_state_dict(network, state), convert_state_dict(network, plain)
    assert all(torch.equal(with_prefix[name], without[name]) for name in with_prefix)


@pytest.mark.parametrize("name", ["cifar10_deep", "celebahq", "cifar10_ddpm_discrete", "church_ddpm"])
def test_every_tensor_has_one_place(name: str) -> None:
    """The conversion is one to one: entries keep their number and values."""
    settings = CONFIGURATIONS[name]
    network, theirs = network_from_config(settings), ListNetwork(settings)
    state = theirs.checkpoint()["model"]
    converted = convert_state_dict(network, state)
    assert converted.keys() == network.state_dict().keys()
    values = torch.cat([tensor.flatten() for key, tensor in state.items() if key != "module.sigmas"])
    ours = torch.cat([tensor.flatten() for tensor in converted.values()])
    assert torch.equal(values.sort().values, ours.sort().values)
    modules = [module for module in original_order(network) if module is not None]
    assert len(set(modules)) == len(modules) == len(theirs.all_modules)


def test_settings_of_the_papers_configurations() -> None:
    """The full sizes, by their numbers of trained parameters, on the meta device.

    The original also counts its 128 Fourier frequencies: 62,758,915 for NCSN++, 65,574,549 for CelebA-HQ.
    """
    cifar10 = {"nf": 128, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 4, "attn_resolutions": [16]}
    plain = {"fir": False, "progressive_input": "none", "embedding_type": "positional", "scale_by_sigma": False}
    faces = {"nf": 128, "ch_mult": [1, 1, 2, 2, 2, 2, 2], "num_res_blocks": 2, "attn_resolutions": [16]}
    counts = {
        "NCSN++": (config(size=32, **cifar10), 62_758_787),
        "DDPM++": (config(size=32, **cifar10 | plain), 61_804_419),
        "DDPM": (config(size=32, name="ddpm", **cifar10 | {"num_res_blocks": 2, "scale_by_sigma": False}), 35_218_947),
        "CelebA-HQ": (config(size=256, **faces | PROGRESSIVE), 65_574_421),
    }
    with torch.device("meta"):
        for name, (settings, count) in counts.items():
            network = network_from_config(settings)
            assert sum(p.numel() for p in network.parameters()) == count, name


def test_settings_from_config() -> None:
    name, settings, shape = settings_from_config(config(size=16, channels=1, num_scales=2000, conditional=False))
    assert (name, shape) == ("ncsnpp", (1, 16, 16))
    assert settings["noise_conditional"] is False
    assert settings["num_scales"] == 2000
    assert isinstance(network_from_config(config()), NCSNpp)
    assert isinstance(network_from_config(config(name="ddpm", scale_by_sigma=False)), DDPM)


def test_missing_keys_have_the_originals_defaults() -> None:
    model = {
        "name": "ncsnpp",
        "nf": 8,
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "fir": True,
        "progressive_input": "none",
    }
    _, settings, shape = settings_from_config({"model": model, "training": {"sde": "vesde"}})
    assert shape == (3, 32, 32)
    assert settings["centered"] is False
    assert settings["scale_by_sigma"] is True
    assert settings["embedding"] == "fourier"
    assert (settings["sigma_min"], settings["sigma_max"], settings["num_scales"]) == (0.01, 50, 1000)
    assert settings_from_config({"model": model, "training": {"sde": "vpsde"}})[1]["scale_by_sigma"] is False
    for key in ("name", "nf", "ch_mult", "num_res_blocks", "fir", "progressive_input"):
        with pytest.raises(UserError, match=rf"no model\.{key}"):
            settings_from_config({"model": {k: v for k, v in model.items() if k != key}})


def test_errors_name_the_first_offending_tensor() -> None:
    settings = config()
    network, checkpoint = network_from_config(settings), ListNetwork(settings).checkpoint()
    state = checkpoint["model"]
    with pytest.raises(UserError, match=r"no all_modules\.4\.Conv_0\.bias"):
        convert_state_dict(network, {k: v for k, v in state.items() if "all_modules.4.Conv_0.bias" not in k})
    with pytest.raises(UserError, match=r"^all_modules\.99\.weight of the checkpoint has no place"):
        convert_state_dict(network, state | {"module.all_modules.99.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"^all_modules\.1\.weight of the checkpoint has shape \(2, 2\)"):
        convert_state_dict(network, state | {"module.all_modules.1.weight": torch.zeros(2, 2)})
    wrong = next(name for name in state if name.endswith("NIN_0.W"))
    with pytest.raises(UserError, match=r"^all_modules\.\d+\.NIN_0\.W of the checkpoint has shape \(3,\)"):
        convert_state_dict(network, state | {wrong: torch.zeros(3)})
    with pytest.raises(UserError, match=r"nothing for embedding\.classes"):
        convert_state_dict(NCSNpp((3, 8, 8), 5, **settings_from_config(settings)[1]), state)
    with pytest.raises(UserError, match="averages 3 tensors"):
        ema_state_dict(network, checkpoint | {"ema": {"shadow_params": checkpoint["ema"]["shadow_params"][:3]}})
    with pytest.raises(UserError, match="it has no 'ema'"):
        ema_state_dict(network, {"model": state})
    with pytest.raises(UserError, match="'ncsnv2' is not one of ddpm, ncsnpp"):
        settings_from_config({"model": {"name": "ncsnv2"}})


class Malicious:
    """Runs a function when unpickled by the trusting kind of loader."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("the checkpoint was executed",)


def test_checkpoint_files(tmp_path: Path) -> None:
    checkpoint = ListNetwork(config()).checkpoint()
    torch.save(checkpoint, tmp_path / "good.pth")
    assert read_checkpoint(tmp_path / "good.pth")["model"].keys() == checkpoint["model"].keys()
    with pytest.raises(UserError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save({"model": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="not a checkpoint that can be read safely"):
        read_checkpoint(tmp_path / "bad.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(tmp_path / "short.pth")
    for failing in ("bad.pth", "short.pth"):
        with pytest.raises(UserError) as caught:
            read_checkpoint(tmp_path / failing)
        assert "weights_only" not in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    torch.save([1, 2], tmp_path / "other.pth")
    with pytest.raises(UserError, match="not a checkpoint of score_sde_pytorch"):
        read_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "content", [b"just text\n", b"\x80\x04.", b"\x80\x02X\x05\x00\x00\x00\xff\xff\xff\xff\xff.", b"", b"PK\x03\x04"]
)
def test_broken_files_are_refused_by_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.pth").write_bytes(content)
    for read in (read_checkpoint, read_tensors):
        with pytest.raises(UserError, match=r"broken\.pth is not a checkpoint that can be read safely: it is damaged"):
            read(tmp_path / "broken.pth")


def test_files_that_hold_code(tmp_path: Path) -> None:
    torch.save({"model": Malicious()}, tmp_path / "code.pth")
    (tmp_path / "code.pkl").write_bytes((tmp_path / "code.pth").read_bytes())
    for read in (read_checkpoint, read_tensors):
        with pytest.raises(UserError, match=r"code\.pth .* read safely: it holds something other than tensors$"):
            read(tmp_path / "code.pth")
        with pytest.raises(UserError, match=r"is a pickle, which runs code .* write its weights as code\.safetensors"):
            read(tmp_path / "code.pkl")


@pytest.mark.parametrize("model", [None, [], {3: torch.zeros(1)}, {"a": None}, {"a": {"b": torch.zeros(1)}}])
def test_models_that_are_no_tensors_by_name(model: Any, tmp_path: Path) -> None:
    torch.save({"model": model}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="its 'model' does not hold tensors by name"):
        read_checkpoint(tmp_path / "c.pth")
    torch.save(model, tmp_path / "d.pth")
    with pytest.raises(UserError, match="is not a state dictionary"):
        read_tensors(tmp_path / "d.pth")


@pytest.mark.parametrize("averages", [None, 3, {"a": torch.zeros(1)}, [None], ["a"]])
def test_averages_that_are_no_list_of_tensors(averages: Any) -> None:
    settings = config()
    checkpoint = ListNetwork(settings).checkpoint() | {"ema": {"shadow_params": averages}}
    with pytest.raises(UserError, match="its 'shadow_params' is not a list of tensors"):
        ema_state_dict(network_from_config(settings), checkpoint)


@pytest.mark.parametrize(
    ("part", "name", "value", "kind"),
    [
        ("model", "ch_mult", 2, "a list that is not empty, each entry a whole number of at least 1"),
        ("model", "attn_resolutions", 16, "a list, each entry a whole number of at least 1"),
        ("model", "nonlinearity", None, "a word"),
        ("model", "fir_kernel", 3, "a list that is not empty, each entry a number"),
        ("model", "embedding_type", 1, "a word"),
        ("model", "beta_min", "x", "a number above 0"),
        ("model", "skip_rescale", "yes", "true or false"),
        ("model", "num_scales", 1, "a whole number of at least 2"),
        ("data", "image_size", "large", "a whole number of at least 1"),
        ("training", "continuous", 1, "true or false"),
        ("training", "sde", 3, "a word"),
    ],
)
def test_values_of_another_kind(part: str, name: str, value: Any, kind: str) -> None:
    settings = config()
    settings = settings | {part: {**settings[part], name: value}}
    with pytest.raises(UserError, match=rf"^{part}\.{name}={value!r} of the configuration must be {kind}"):
        describe(settings)


def test_parts_that_are_none() -> None:
    for part in ("data", "model", "training"):
        with pytest.raises(UserError, match=rf"^{part}=\[1\] of the configuration must be an object with options"):
            describe(config() | {part: [1]})


def test_flags_as_text() -> None:
    settings = config()
    plain = settings | {"model": settings["model"] | {"scale_by_sigma": False, "fir": True}}
    text = settings | {"model": settings["model"] | {"scale_by_sigma": "False", "fir": "True"}}
    assert describe(text) == describe(plain)
    centered = settings | {"data": settings["data"] | {"centered": "False"}}
    assert describe(centered).info.low == 0.0
    assert describe(centered).settings["centered"] is False
