"""`UNet2DModel`s of diffusers compute what the original computes.

`tests.foreign.PlainUNet` in its layout stands for the original everywhere; where diffusers is installed, so does that.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from sde.errors import UserError
from sde.interop.chains import BetaChain, chain_log_levels
from sde.interop.diffusers import SCHEDULERS, convert, describe, load
from sde.processes import VE, VP, Cosine
from tests.commands import command
from tests.foreign import Layout, PlainUNet, Weights, distance, sinusoids

BASE: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.39.0",
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
}
RESNET = {
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"],
    "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "block_out_channels": [32, 64, 64],
}
DDPM = {
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "ddpm": DDPM,
    "classes_and_centering": {"num_class_embeds": 5, "center_input_sample": True, "layers_per_block": 2},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
    "resnet": RESNET | {"attention_head_dim": 16},
    "oblong": {"sample_size": [8, 4], "time_embedding_dim": 128},
}


def layout() -> Layout:
    def place(way: str, level: int, kind: str, index: int) -> str:
        if way == "mid":
            return f"mid_block.{'resnets' if kind == 'block' else 'attentions'}.{index}"
        resampler = "downsamplers" if way == "down" else "upsamplers"
        part = {"block": "resnets", "attention": "attentions", "resample": resampler}[kind]
        return f"{way}_blocks.{level}.{part}.{index}"

    def project(w: Weights, name: str, flat: Tensor, heads: int) -> tuple[Tensor, ...]:
        rows = (w.linear(f"{name}.{part}", flat.mT, flat.shape[1]).mT for part in ("to_q", "to_k", "to_v"))
        return tuple(part.unflatten(1, (heads, -1)) for part in rows)

    return Layout(
        "norm1 conv1 time_emb_proj norm2 conv2 conv_shortcut",
        place,
        project,
        "conv_in time_embedding.linear_1 time_embedding.linear_2 conv_norm_out conv_out",
        "group_norm to_out.0",
    )


def original(config: dict[str, Any], x: Tensor, time: Tensor, label: list[int] | None) -> tuple[Tensor, PlainUNet]:
    """The output of the original, and its network."""
    head = config.get("attention_head_dim", 8)
    padding = config.get("downsample_padding", 1)
    network = PlainUNet(
        layout(),
        config["block_out_channels"],
        config["layers_per_block"],
        [name.startswith("Attn") for name in config["down_block_types"]],
        heads=lambda channels: channels // (head or channels),
        inside=config.get("downsample_type") == "resnet",
        scale_shift=config.get("resnet_time_scale_shift") == "scale_shift",
        pad=(padding, 1),
        eps=config.get("norm_eps", 1e-5),
    )
    features = sinusoids(time, 32, config.get("freq_shift", 0) == 1, config.get("flip_sin_to_cos", True))
    vector = None
    if label is not None:
        table = network.weights("class_embedding.weight", config["num_class_embeds"], 128)
        vector = torch.cat([table, torch.zeros_like(table[:1])])[label]
    x = 2 * x - 1 if config.get("center_input_sample") else x
    return network(x, features, vector, config.get("out_channels", 3)), network


@pytest.mark.parametrize("name", CASES)
def test_parity(name: str) -> None:
    config = BASE | CASES[name]
    description = describe(config)
    assert description.model == ("ddpm" if name == "ddpm" else "adm")
    x = torch.randn(3, *description.info.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    time = torch.tensor([0, 321.5, 999], dtype=torch.float64)
    classes = description.info.num_classes
    label = [1, classes, 0] if classes else None
    expected, theirs = original(config, x, time, label)
    network = description.network().double().eval()
    network.load_state_dict(convert(network, theirs.weights.state, config))
    with torch.no_grad():
        assert distance(network(x, time, None if label is None else torch.tensor(label)), expected) < 1e-12


def test_old_names_of_attention() -> None:
    """Before version 0.15 attention had query, key, value and proj_attn."""
    config = BASE | DDPM
    _, theirs = original(config, torch.zeros(1, 3, 8, 8).double(), torch.zeros(1).double(), None)
    network, state = describe(config).network(), theirs.weights.state
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in state.items():
        for now, before in new.items():
            name = name.replace(f".{now}.", f".{before}.")
        old[name] = tensor
    assert old.keys() != state.keys()
    ours, again = convert(network, state, config), convert(network, old, config)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("name", CASES)
def test_diffusers_itself(name: str) -> None:
    """Features of time are float32 there: at step 0 they are exact, and so is the rest; elsewhere that rounding."""
    diffusers = pytest.importorskip("diffusers")
    config = BASE | CASES[name]
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**{k: v for k, v in config.items() if k[0] != "_"}).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    stored = json.loads(theirs.to_json_string())
    description = describe(stored)
    network = description.network().double().eval()
    network.load_state_dict(convert(network, theirs.state_dict(), stored))
    x = torch.randn(2, *description.info.shape, dtype=torch.float64)
    label = torch.tensor([0, 1]) if description.info.num_classes else None
    with torch.no_grad():
        for time, tolerance in ((0.0, 1e-12), (777.0, 1e-5)):
            t = torch.full((2,), time, dtype=torch.float64)
            assert distance(network(x, t, label), theirs(x, t, class_labels=label).sample) < tolerance


NCSNPP = BASE | {
    "block_out_channels": [64, 128],
    "sample_size": 16,
    "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
    "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"],
    "time_embedding_type": "fourier",
    "center_input_sample": True,
    "attention_head_dim": None,
    "norm_num_groups": None,
    "norm_eps": 1e-6,
    "mid_block_scale_factor": 1.41421356237,
}


@pytest.mark.parametrize("count", [1, 2])
def test_ncsnpp_of_diffusers_itself(count: int) -> None:
    """The score of NCSN++, at sigma = 0.02 and 300; theirs divides the middle by a square root of 12 digits."""
    diffusers = pytest.importorskip("diffusers")
    config = NCSNPP | {"layers_per_block": count}
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**{k: v for k, v in config.items() if k[0] != "_"}).double().eval()
    stored = json.loads(theirs.to_json_string())
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, std=16.0 if "time_proj" in name else 0.05)
    description = describe(stored, {"_class_name": "ScoreSdeVeScheduler", "sigma_max": 348})
    assert description.sde == VE(sigma_min=0.01, sigma_max=348)
    network = description.network().double()
    network.load_state_dict(convert(network, theirs.state_dict(), stored))
    denoiser = description.denoiser(network)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    sigma = torch.tensor([0.02, 300.0], dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x, sigma).sample
        assert distance(denoiser.score(x, denoiser.sde.t_of_noise_level(sigma)), expected) < 1e-10


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mid_block_scale_factor": 1}, "mid_block_scale_factor=1 .* only the square root of 2 can"),
        ({"norm_num_groups": 32}, "norm_num_groups=32 .* only None can"),
        ({"attention_head_dim": 8}, "attention_head_dim=8 .* only None can"),
        ({"up_block_types": ["UpBlock2D"] * 2}, "up_block_types of the configuration='UpBlock2D' is not one of Skip"),
        ({"up_block_types": ["SkipUpBlock2D"] * 2}, "attention must be at the levels of down_block_types"),
    ],
)
def test_ncsnpp_that_cannot_be_followed(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        describe(NCSNPP | changes)
    with pytest.raises(UserError, match="scheduler of blocks with skips='DDPMScheduler'"):
        describe(NCSNPP, {"_class_name": "DDPMScheduler"})
    small = NCSNPP | {"block_out_channels": [32, 64]}
    with pytest.raises(UserError, match="channels are normalized in 32 groups there"):
        convert(describe(small).network(), {}, small)


def test_schedulers() -> None:
    """Betas, target and process; what a scheduler says of sampling plays no part."""
    linear = describe(BASE, {"_class_name": "DDIMScheduler", "clip_sample": True, "steps_offset": 1})
    assert (linear.sde, linear.parameterization) == (VP(), BetaChain())
    assert describe(BASE).parameterization == BetaChain()
    cosine = describe(BASE, {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"})
    assert (cosine.sde, cosine.parameterization) == (Cosine(), BetaChain(schedule="cosine", predicts="v"))
    scaled = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "sample"}
    chain = describe(BASE, scaled).parameterization
    assert chain == BetaChain(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, predicts="x0")


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_tables_of_diffusers(schedule: str) -> None:
    """Whose betas are float32."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule=schedule)
    chain = describe(BASE, dict(scheduler.config) | {"_class_name": "DDPMScheduler"}).parameterization
    assert isinstance(chain, BetaChain)
    torch.testing.assert_close(chain.betas().float(), scheduler.betas, rtol=1e-4, atol=1e-7)
    bar = scheduler.alphas_cumprod.double()
    theirs = 0.5 * torch.log((1 - bar) / bar)
    torch.testing.assert_close(chain_log_levels(chain)[:-1], theirs[:-1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_run_from_the_command_line(pipeline: bool, tmp_path: Path) -> None:
    config = BASE | {"num_class_embeds": 2}
    x = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    f, theirs = original(config, x, torch.tensor([500.0]).double(), [1])
    model = tmp_path / "p" / "unet" if pipeline else tmp_path / "p"
    scheduler = tmp_path / "p" / "scheduler" if pipeline else model
    model.mkdir(parents=True)
    scheduler.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(config))
    (scheduler / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler", "beta_end": 0.03}))
    state = {name: tensor.float().contiguous() for name, tensor in theirs.weights.state.items()}
    if pipeline:
        torch.save(state, model / "diffusion_pytorch_model.bin")
    else:
        safetensors.torch.save_file(state, model / "diffusion_pytorch_model.safetensors")
    denoiser = load(tmp_path / "p")
    assert denoiser.sde == VP(beta_min=0.1, beta_max=30.0)
    t = denoiser.sde.t_of_log_snr(-2 * chain_log_levels(BetaChain(beta_end=0.03))[500:501])
    assert distance(denoiser.eps(x.float(), t, torch.tensor([1])), f) < 1e-5
    done = command("sde.interop.diffusers", "folder=p", "hydra.run.dir=runs/i", folder=tmp_path)
    assert done.code == 0, done.err
    done = command("sde.sample", "solver=heun", "steps=2", "n=2", "out=s", folder=tmp_path)
    assert done.code == 0, done.err
    assert np.load(tmp_path / "s" / "samples.npz")["samples"].shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name of the configuration='UNet2DConditionModel' is not one"),
        ({"depth": 3}, "depth of the configuration is not an option of UNet2DModel"),
        ({"sample_size": None}, "sample_size=None of the configuration cannot be followed"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier' .* only 'positional' can"),
        ({"mid_block_scale_factor": 1.4}, "mid_block_scale_factor=1.4 .* only 1 can"),
        ({"act_fn": "gelu"}, "act_fn of the configuration='gelu' is not one of silu, swish"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' .* only None can"),
        ({"freq_shift": 2}, "freq_shift of the configuration='2' is not one of 0, 1"),
        ({"downsample_padding": 2}, "downsample_padding of the configuration='2' is not one of 0, 1"),
        ({"block_out_channels": [32, 80]}, r"block_out_channels=\[32, 80\] of the configuration cannot be followed"),
        ({"down_block_types": ["CrossAttnDownBlock2D"] * 2}, "down_block_types of the configuration='CrossAttnDown"),
        ({"up_block_types": ["UpBlock2D"] * 2}, "attention must be at the levels of down_block_types"),
        ({"up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"], "upsample_type": "resnet"}, "conv and resnet"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None with scale_shift cannot be followed"),
        ({"out_channels": 6}, "out_channels=6 of the configuration cannot be followed"),
        ({"add_attention": False}, "add_attention=False .* only True can"),
    ],
)
def test_what_cannot_be_followed(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        describe(BASE | changes)


@pytest.mark.parametrize(
    ("scheduler", "sentence"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "the scheduler ScoreSdeVeScheduler has no table of betas"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule of the scheduler='sigmoid' is not one of linear"),
        ({"prediction_type": "flow"}, "prediction_type of the scheduler='flow' is not one of epsilon"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True .* only False can"),
        ({"trained_betas": [0.1]}, r"trained_betas=\[0.1\] .* only None can"),
    ],
)
def test_schedulers_that_cannot_be_followed(scheduler: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        describe(BASE, scheduler)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("block_out_channels", 64, "a list that is not empty, each entry a whole number of at least 1"),
        ("block_out_channels", [], "a list that is not empty"),
        ("block_out_channels", [32, None], "a list that is not empty"),
        ("dropout", None, "a number of at least 0 and below 1"),
        ("center_input_sample", 1, "true or false"),
        ("flip_sin_to_cos", "maybe", "true or false"),
        ("sample_size", "large", "a whole number, or a list of two, or null"),
        ("down_block_types", [1], "a list that is not empty, each entry a word"),
        ("norm_eps", 0, "a number above 0"),
        ("layers_per_block", 1.5, "a whole number of at least 1"),
    ],
)
def test_values_of_another_kind(name: str, value: Any, kind: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}={re.escape(repr(value))} of the configuration must be {kind}"):
        describe(BASE | {name: value})


def test_flags_as_text() -> None:
    assert describe(BASE | {"center_input_sample": "False"}) == describe(BASE)
    assert describe(BASE | {"center_input_sample": "True"}).settings["centered"] is False
    with pytest.raises(UserError, match=r"rescale_betas_zero_snr=True .* only False can"):
        describe(BASE, {"rescale_betas_zero_snr": "True"})


def test_levels_are_counted() -> None:
    with pytest.raises(UserError, match="speak of different numbers of levels"):
        describe(BASE | {"block_out_channels": [32, 64, 64]})


@pytest.mark.parametrize("name", SCHEDULERS)
def test_defaults_of_schedulers(name: str) -> None:
    """As diffusers has them."""
    diffusers = pytest.importorskip("diffusers")
    defaults = inspect.signature(getattr(diffusers, name).__init__).parameters
    chain = describe(BASE, {"_class_name": name}).parameterization
    assert isinstance(chain, BetaChain)
    assert (chain.beta_start, chain.beta_end) == (defaults["beta_start"].default, defaults["beta_end"].default)
    assert (chain.n, chain.schedule) == (defaults["num_train_timesteps"].default, defaults["beta_schedule"].default)
    assert defaults["prediction_type"].default == "epsilon"
    assert describe(BASE, {"_class_name": name, "beta_end": 0.03}).parameterization == replace(chain, beta_end=0.03)


@pytest.mark.parametrize("name", ["DDPMWuerstchenScheduler", "EDMEulerScheduler", "CogVideoXDDIMScheduler", "DDPM"])
def test_schedulers_of_other_kinds(name: str) -> None:
    with pytest.raises(UserError, match=f"the scheduler {name} has no table of betas that can be followed"):
        describe(BASE, {"_class_name": name})


def test_errors_of_files_and_tensors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: give the folder of a UNet2DModel"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors"):
        load(tmp_path)
    network = describe(BASE).network()
    _, theirs = original(BASE, torch.zeros(1, 3, 8, 8).double(), torch.zeros(1).double(), None)
    state = theirs.weights.state
    missing = {k: v for k, v in state.items() if k != "mid_block.attentions.0.to_k.bias"}
    with pytest.raises(UserError, match=r"has no mid_block\.attentions\.0\.to_k\.bias"):
        convert(network, missing, BASE)
    with pytest.raises(UserError, match=r"^conv_in\.weight of the checkpoint has shape \(2,\)"):
        convert(network, state | {"conv_in.weight": torch.zeros(2)}, BASE)
    with pytest.raises(UserError, match=r"^conv_up\.weight of the checkpoint has no place"):
        convert(network, state | {"conv_up.weight": torch.zeros(2)}, BASE)
    with pytest.raises(UserError, match="32 channels are normalized in 16 groups there and in 32 here"):
        convert(network, state, BASE | {"norm_num_groups": 16})
