"""Networks of guided-diffusion compute what the original computes: `tests.foreign.PlainUNet` in its layout."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sde.errors import UserError
from sde.interop.chains import BetaChain, chain_log_levels, process_of
from sde.interop.guided_diffusion import FLAGS, convert, describe, load
from sde.parameterizations import V
from sde.processes import EDM, SDE, VP, Cosine
from tests.commands import command
from tests.foreign import Layout, PlainUNet, Weights, distance, sinusoids

BASE: dict[str, Any] = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": "4",
    "channel_mult": "1,2",
    "num_head_channels": 16,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "resampling_inside": {"resblock_updown": True, "num_res_blocks": 2, "class_cond": True, "num_classes": 5},
    "new_order": {"use_new_attention_order": True, "learn_sigma": True, "noise_schedule": "cosine"},
    "added": {"use_scale_shift_norm": False, "attention_resolutions": "8,4", "channel_mult": "1,1,2"},
    "heads_by_number": {"num_head_channels": -1, "num_heads": 2, "predict_xstart": True},
}


def layout(flags: dict[str, Any], attention: list[bool]) -> Layout:
    """Blocks are numbered in the order of use; attention and resampling follow inside of a block's list."""
    count = flags["num_res_blocks"]

    def place(way: str, level: int, kind: str, index: int) -> str:
        if way == "mid":
            return f"middle_block.{level}"
        if way == "down":
            number = 1 + level * (count + 1) + (count if kind == "resample" else index)
            return f"input_blocks.{number}.{1 if kind == 'attention' else 0}"
        index = count if kind == "resample" else index
        after = 1 + attention[len(attention) - 1 - level]
        inside = {"block": 0, "attention": 1, "resample": after}[kind]
        return f"output_blocks.{level * (count + 1) + index}.{inside}"

    def project(w: Weights, name: str, flat: Tensor, heads: int) -> tuple[Tensor, ...]:
        channels = flat.shape[1]
        weight = w(f"{name}.qkv.weight", 3 * channels, channels, 1)[:, :, 0]
        rows = weight @ flat + w(f"{name}.qkv.bias", 3 * channels)[:, None]
        if flags.get("use_new_attention_order"):
            return tuple(rows.unflatten(1, (3, heads, -1)).unbind(1))
        return tuple(rows.unflatten(1, (heads, 3, -1)).unbind(2))

    return Layout(
        "in_layers.0 in_layers.2 emb_layers.1 out_layers.0 out_layers.3 skip_connection",
        place,
        project,
        "input_blocks.0.0 time_embed.0 time_embed.2 out.0 out.2",
        "norm proj_out",
    )


def original(flags: dict[str, Any], x: Tensor, time: Tensor, label: list[int] | None) -> tuple[Tensor, PlainUNet]:
    """The output of the original, and its network."""
    factors = [int(f) for f in flags["channel_mult"].split(",")]
    attention = [str(8 >> i) in flags["attention_resolutions"].split(",") for i in range(len(factors))]
    size = flags["num_head_channels"]
    network = PlainUNet(
        layout(flags, attention),
        [32 * f for f in factors],
        flags["num_res_blocks"],
        attention,
        heads=lambda channels: flags["num_heads"] if size == -1 else channels // size,
        inside=flags.get("resblock_updown", False),
        scale_shift=flags.get("use_scale_shift_norm", True),
        pad=(1, 1),
    )
    features = sinusoids(time, 32, endpoint=False, cosines_first=True)
    vector = None
    if flags.get("class_cond"):
        table = network.weights("label_emb.weight", flags["num_classes"], 128)
        vector = torch.cat([table, torch.zeros_like(table[:1])])[label]
    return network(x, features, vector, 6 if flags.get("learn_sigma") else 3), network


@pytest.mark.parametrize("name", CASES)
def test_parity(name: str) -> None:
    """At steps of the chain the denoised picture is the original's, in float64; without a class it has no vector."""
    flags = BASE | CASES[name]
    description = describe(flags)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([0, 321, 998])
    label = [1, flags["num_classes"], 0] if flags.get("class_cond") else None
    f, theirs = original(flags, x, steps.double(), label)
    chain = description.parameterization
    assert isinstance(chain, BetaChain)
    alpha_bar = torch.cumprod(1 - betas(flags.get("noise_schedule", "linear")), 0)[steps][:, None, None, None]
    eps = (x - alpha_bar.sqrt() * f[:, :3]) / (1 - alpha_bar).sqrt() if flags.get("predict_xstart") else f[:, :3]

    network = description.network().double()
    network.load_state_dict(convert(network, theirs.weights.state, flags))
    denoiser = description.denoiser(network)
    t = denoiser.sde.t_of_log_snr(-2 * chain_log_levels(chain)[steps])
    # a label of a thousand has 1e-13 of rounding, amplified by the inverse of the schedule
    assert distance(denoiser.eps(x, t, None if label is None else torch.tensor(label)), eps) < 1e-10


def betas(schedule: str, n: int = 1000) -> Tensor:
    """The tables of guided-diffusion."""
    if schedule == "linear":
        return torch.linspace(0.1 / n, 20 / n, n, dtype=torch.float64)
    bar = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
    return torch.tensor([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(n)], dtype=torch.float64)


def test_the_table_of_betas() -> None:
    for schedule in ("linear", "cosine"):
        torch.testing.assert_close(BetaChain(schedule=schedule).betas(), betas(schedule), rtol=1e-12, atol=0)
        chain = BetaChain(schedule=schedule, n=100, beta_start=1e-3, beta_end=0.2)
        torch.testing.assert_close(chain.betas(), betas(schedule, 100), rtol=1e-12, atol=0)
        bar = torch.cumprod(1 - betas(schedule), 0)
        levels = 0.5 * torch.log((1 - bar) / bar)
        torch.testing.assert_close(chain_log_levels(BetaChain(schedule=schedule)), levels, rtol=0, atol=1e-9)
    scaled = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    chain = BetaChain(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    torch.testing.assert_close(chain.betas(), scaled, rtol=1e-12, atol=0)


CHAINS = {
    "linear": BetaChain(),
    "scaled_linear": BetaChain(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": BetaChain(schedule="cosine"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_labels_follow_the_noise_level(name: str) -> None:
    """Steps of the chain have whole labels; between them the logarithm of the noise level is interpolated."""
    chain, sde = CHAINS[name], process_of(CHAINS[name])
    levels = chain_log_levels(chain)
    exact = torch.arange(1000, dtype=torch.float64)
    inside = levels < -0.5 * sde.log_snr(sde.T)
    assert inside.sum() >= 996  # VP ends at B = 10.05 and DDPM's chain at 10.12, four steps of 0.02 later
    t = sde.t_of_log_snr(-2 * levels)
    torch.testing.assert_close(chain.c_noise(sde, t, "time")[inside], exact[inside], rtol=0, atol=1e-8)
    between = sde.t_of_log_snr(-(levels[:-1] + levels[1:]))
    kept = inside[1:]
    half = chain.c_noise(sde, between, "time")[kept]
    torch.testing.assert_close(half, exact[:-1][kept] + 0.5, rtol=0, atol=1e-8)
    assert float(chain.c_noise(sde, 1e-9, "time")) == 0
    nearest = BetaChain(**{**vars(chain), "between": "nearest"})
    assert torch.equal(nearest.c_noise(sde, t, "time")[inside], exact[inside])


def test_processes_of_chains() -> None:
    """VP with DDPM's rates, which is as far as the chain goes; cosine; and as much noise in all for scaled_linear."""
    assert process_of(CHAINS["linear"]) == VP(beta_min=0.1, beta_max=20.0)
    assert process_of(CHAINS["cosine"]) == Cosine()
    sde = process_of(CHAINS["scaled_linear"])
    assert float(sde.log_snr(1.0)) == pytest.approx(-2 * float(chain_log_levels(CHAINS["scaled_linear"])[-1]), abs=1e-9)


@pytest.mark.parametrize("sde", [VP(), Cosine()])
def test_targets(sde: SDE) -> None:
    t = torch.tensor([0.1, 0.9], dtype=torch.float64)
    for one, other in zip(BetaChain(predicts="v").direction(sde, t), V().direction(sde, t), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="beta_chain needs a variance-preserving SDE"):
        BetaChain().row("eps", EDM(), t)
    with pytest.raises(UserError, match="schedule='sigmoid' is not one of linear, scaled_linear, cosine"):
        BetaChain(schedule="sigmoid")


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    flags = BASE | {"use_fp16": True, "class_cond": True, "num_classes": 2}
    _, theirs = original(flags, torch.zeros(1, 3, 8, 8, dtype=torch.float64), torch.zeros(1).double(), [0])
    torch.save({name: tensor.float() for name, tensor in theirs.weights.state.items()}, tmp_path / "c.pt")
    (tmp_path / "c.json").write_text(json.dumps(flags))
    assert load(tmp_path / "c.pt", tmp_path / "c.json").sde == VP()
    run = ("checkpoint=c.pt", "config=c.json", "hydra.run.dir=runs/i")
    done = command("sde.interop.guided_diffusion", *run, folder=tmp_path)
    assert done.code == 0, done.err
    done = command("sde.sample", "solver=heun", "steps=2", "n=2", "out=s", folder=tmp_path)
    assert done.code == 0, done.err
    assert np.load(tmp_path / "s" / "samples.npz")["samples"].shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"depth": 3}, "depth of the configuration is not an option of guided-diffusion"),
        ({"noise_schedule": "sqrt"}, "noise_schedule of the configuration='sqrt' is not one of linear, cosine"),
        ({"channel_mult": "", "image_size": 512}, "channel_mult of image_size=512 cannot be followed"),
        ({"channel_mult": "2,2"}, r"channel_mult=\[2, 2\] cannot be followed: the first factor must be 1"),
        ({"rescale_timesteps": True, "diffusion_steps": 4000}, "diffusion_steps=4000 .* only 1000 can"),
        ({"num_head_channels": -1, "attention_resolutions": "8,4"}, "num_heads=4 at levels of 32, 64 channels"),
    ],
)
def test_what_cannot_be_followed(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        describe(BASE | changes)


@pytest.mark.parametrize("name", [name for name, option in FLAGS.items() if isinstance(option.default, bool)])
def test_flags_as_text(name: str) -> None:
    """Text is read as what it says: "False" is not true."""
    for text, value in (("False", False), ("True", True), ("false", False)):
        assert describe(BASE | {name: text}) == describe(BASE | {name: value})
    for other in ("no", "", 1, 0, None):
        with pytest.raises(UserError, match=rf"^{name}={other!r} of the configuration must be true or false$"):
            describe(BASE | {name: other})


def test_lists_and_numbers_as_text() -> None:
    expected = describe(BASE | {"attention_resolutions": "8,4", "channel_mult": "1,1,2"})
    assert expected.settings["attention_resolutions"] == (8, 4)
    changes = {"attention_resolutions": [8, 4], "channel_mult": [1, 1, 2], "image_size": "8", "dropout": "0"}
    assert describe(BASE | changes) == expected
    assert describe(BASE | {"attention_resolutions": ""}).settings["attention_resolutions"] == ()


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("attention_resolutions", "a", "a list, each entry a whole number of at least 1"),
        ("attention_resolutions", "0", "a list, each entry a whole number of at least 1"),
        ("attention_resolutions", 8, "a list"),
        ("attention_resolutions", None, "a list"),
        ("channel_mult", "1,x", "a list, each entry a whole number of at least 1"),
        ("image_size", "large", "a whole number of at least 1"),
        ("image_size", 8.5, "a whole number of at least 1"),
        ("image_size", True, "a whole number of at least 1"),
        ("image_size", [8], "a whole number of at least 1"),
        ("diffusion_steps", 0, "a whole number of at least 2"),
        ("num_heads", 0, "a whole number of at least 1"),
        ("dropout", "nan", "a number of at least 0 and below 1"),
        ("dropout", None, "a number of at least 0 and below 1"),
        ("noise_schedule", 3, "a word"),
    ],
)
def test_values_of_another_kind(name: str, value: Any, kind: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}={re.escape(repr(value))} of the configuration must be {kind}"):
        describe(BASE | {name: value})


def test_errors_name_the_first_offending_tensor() -> None:
    _, theirs = original(BASE, torch.zeros(1, 3, 8, 8, dtype=torch.float64), torch.zeros(1).double(), None)
    network, state = describe(BASE).network(), theirs.weights.state
    with pytest.raises(UserError, match=r"^out\.2\.weight of the checkpoint has shape \(3, 32, 3, 3\)"):
        convert(network, state, BASE | {"learn_sigma": True})
    with pytest.raises(UserError, match=r"has no input_blocks\.1\.0\.in_layers\.0\.weight"):
        convert(network, {k: v for k, v in state.items() if k != "input_blocks.1.0.in_layers.0.weight"}, BASE)
    with pytest.raises(UserError, match=r"^label_emb\.weight of the checkpoint has no place"):
        convert(network, state | {"label_emb.weight": torch.zeros(2, 2)}, BASE)
