"""Networks of NVlabs/edm and edm2 read from state dictionaries compute what the originals compute.

`Original` is an independent network in EDM's layout, `original_edm2` one in EDM2's.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from sde.errors import UserError
from sde.interop.chains import BetaChain, chain_log_levels
from sde.interop.edm import describe, load
from sde.interop.edm_weights import convert_edm2, convert_unet
from sde.parameterizations import Eps
from sde.processes import EDM, VE, VP, Cosine
from tests.commands import command
from tests.foreign import Weights, attend, distance, sinusoids

SIGMAS = torch.tensor([0.05, 0.7, 31.0], dtype=torch.float64)


class Original:
    """A SongUNet or DhariwalUNet with its preconditioning; the weights come to be in the first call."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.weights = Weights()
        self.song = config["model_type"] == "SongUNet"
        self.eps = 1e-6 if self.song else 1e-5
        taps = torch.tensor(config.get("resample_filter", [1, 1]), dtype=torch.float64)
        self.filter = torch.outer(taps, taps) / taps.sum() ** 2

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.weights.norm(name, x, min(32, x.shape[1] // 4), self.eps)

    def filtered(self, x: Tensor) -> Tensor:
        """Every channel filtered, without padding."""
        return F.conv2d(x.flatten(0, 1)[:, None], self.filter[None, None]).unflatten(0, x.shape[:2])[:, :, 0]

    def resampled(self, x: Tensor, how: str) -> Tensor:
        """Filtered and every second pixel, or filtered with a zero after every pixel."""
        taps = len(self.filter)
        if how == "down":
            return self.filtered(F.pad(x, [(taps - 1) // 2] * 4))[:, :, ::2, ::2]
        if how == "up":
            grown = x.new_zeros(*x.shape[:2], 2 * x.shape[2] - 1, 2 * x.shape[3] - 1)
            grown[:, :, ::2, ::2] = x
            return 4 * self.filtered(F.pad(grown, [taps - 1 - (taps - 1) // 2] * 4))
        return x

    def block(self, name: str, x: Tensor, emb: Tensor, out: int, how: str = "", attention: bool = False) -> Tensor:
        w = self.weights
        h = w.conv(f"{name}.conv0", self.resampled(F.silu(self.norm(f"{name}.norm0", x)), how), out)
        condition = w.linear(f"{name}.affine", emb, out if self.song else 2 * out)[:, :, None, None]
        if self.song:
            h = F.silu(self.norm(f"{name}.norm1", h + condition))
        else:
            h = F.silu(self.norm(f"{name}.norm1", h) * (1 + condition[:, :out]) + condition[:, out:])
        h = w.conv(f"{name}.conv1", h, out)
        shortcut = self.resampled(x, how)
        if out != x.shape[1] or (how and self.song):
            shortcut = w.conv(f"{name}.skip", shortcut, out, 1)
        scale = math.sqrt(0.5) if self.song else 1.0
        x = (shortcut + h) * scale
        if attention:
            heads = 1 if self.song else out // 64
            flat = w.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x), 3 * out, 1).flatten(2)
            per_head = 3 * out // heads
            parts = [flat[:, k * per_head : (k + 1) * per_head] for k in range(heads)]
            seen = torch.cat([attend(part[:, 0::3], part[:, 1::3], part[:, 2::3]) for part in parts], 1)
            x = (x + w.conv(f"{name}.proj", seen.unflatten(2, x.shape[2:]), out, 1)) * scale
        return x

    def embedding(self, label: Tensor, onehot: Tensor | None) -> Tensor:
        w, config, channels = self.weights, self.config, self.config["model_channels"]
        if config.get("embedding_type") == "fourier":
            phase = 2 * math.pi * label[:, None] * (16 * w("map_noise.freqs", channels))
            features = torch.cat([phase.sin(), phase.cos()], 1)
        else:
            features = sinusoids(label, channels, endpoint=self.song, cosines_first=not self.song)
        if self.song and onehot is not None:
            features = features + w.linear("map_label", onehot * math.sqrt(onehot.shape[1]), features.shape[1])
        emb = F.silu(w.linear("map_layer0", features, 4 * channels))
        emb = w.linear("map_layer1", emb, 4 * channels)
        if not self.song and onehot is not None:
            emb = emb + w.linear("map_label", onehot, 4 * channels, bias=False)
        return F.silu(emb)

    def network(self, x: Tensor, label: Tensor, onehot: Tensor | None, out_channels: int) -> Tensor:
        w, config = self.weights, self.config
        encoder, decoder = config.get("encoder_type", "standard"), config.get("decoder_type", "standard")
        channels, factors, count = config["model_channels"], config["channel_mult"], config["num_blocks"]
        emb = self.embedding(label, onehot)
        sides = [f"{x.shape[2] >> i}x{x.shape[2] >> i}" for i in range(len(factors))]
        seen = [side in (f"{r}x{r}" for r in config["attn_resolutions"]) for side in sides]
        aux, h, skips = x, x, []
        for i, side in enumerate(sides):
            if i == 0:
                h = w.conv(f"enc.{side}_conv", h, channels)
            else:
                h = self.block(f"enc.{side}_down", h, emb, h.shape[1], "down")
            if i > 0 and encoder == "skip":
                aux = self.resampled(aux, "down")
                h = h + w.conv(f"enc.{side}_aux_skip", aux, h.shape[1], 1)
            if i > 0 and encoder == "residual":
                pad = 1 + (len(self.filter) - 1) // 2
                name = f"enc.{side}_aux_residual"
                weight, bias = w(f"{name}.weight", h.shape[1], aux.shape[1], 3, 3), w(f"{name}.bias", h.shape[1])
                made = self.filtered(F.conv2d(F.pad(aux, [pad] * 4), weight))[:, :, ::2, ::2]
                h = aux = (h + made + bias[:, None, None]) / math.sqrt(2)
            skips.append(h)
            for j in range(count):
                h = self.block(f"enc.{side}_block{j}", h, emb, channels * factors[i], attention=seen[i])
                skips.append(h)
        said: Tensor | None = None
        for i, side in reversed(list(enumerate(sides))):
            if i == len(sides) - 1:
                h = self.block(f"dec.{side}_in0", h, emb, h.shape[1], attention=True)
                h = self.block(f"dec.{side}_in1", h, emb, h.shape[1])
            else:
                h = self.block(f"dec.{side}_up", h, emb, h.shape[1], "up")
            for j in range(count + 1):
                attention = seen[i] and (j == count or not self.song)
                h = torch.cat([h, skips.pop()], 1)
                h = self.block(f"dec.{side}_block{j}", h, emb, channels * factors[i], attention=attention)
            if self.song and (decoder == "skip" or i == 0):
                last = w.conv(f"dec.{side}_aux_conv", F.silu(self.norm(f"dec.{side}_aux_norm", h)), out_channels)
                said = last if said is None else self.resampled(said, "up") + last
        if said is not None:
            return said
        return w.conv("out_conv", F.silu(self.norm("out_norm", h)), out_channels)

    def denoised(self, x: Tensor, sigma: Tensor, onehot: Tensor | None) -> Tensor:
        """D(x; sigma) of the class around the network."""
        config, s, channels = self.config, sigma[:, None, None, None], x.shape[1]
        if config["class_name"] == "EDMPrecond":
            variance, data = s**2 + config["sigma_data"] ** 2, config["sigma_data"]
            f = self.network(x / variance.sqrt(), sigma.log() / 4, onehot, channels)
            return data**2 / variance * x + s * data / variance.sqrt() * f
        if config["class_name"] == "VEPrecond":
            return x + s * self.network(x, torch.log(sigma / 2), onehot, channels)
        scaled = x / (1 + s**2).sqrt()
        if config["class_name"] == "VPPrecond":
            rate, low = config["beta_d"], config["beta_min"]
            t = ((low**2 + 2 * rate * torch.log(1 + sigma**2)).sqrt() - low) / rate
            return x - s * self.network(scaled, 999 * t, onehot, channels)
        levels = iddpm_levels(config["M"], config["C_1"], config["C_2"])
        index = (sigma[:, None] - levels).abs().argmin(1)
        f = self.network(scaled, (config["M"] - 1 - index).double(), onehot, 2 * channels)
        return x - s * f[:, :channels]

    def state(self) -> dict[str, Tensor]:
        """The checkpoint, with what the original stores and we have no use for."""
        state = {f"model.{name}": tensor for name, tensor in self.weights.state.items()}
        if "model.map_noise.freqs" in state:
            state["model.map_noise.freqs"] = 16 * state["model.map_noise.freqs"]
        extra = {"model.enc.4x4_down.conv0.resample_filter": self.filter[None, None].float()}
        return state | extra | {"model.map_augment.weight": torch.zeros(8, 9)}


def iddpm_levels(count: int, c1: float, c2: float) -> Tensor:
    """u_M = 0, ..., u_0, the noise levels of the table in arXiv 2206.00364 (equation 162)."""

    def alpha_bar(j: int) -> float:
        return math.sin(0.5 * math.pi * j / count / (c2 + 1)) ** 2

    levels = [0.0]
    for j in range(count, 0, -1):
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), c1) - 1))
    return torch.tensor(levels[::-1], dtype=torch.float64)


def config(kind: str, precond: str = "EDMPrecond", **changes: Any) -> dict[str, Any]:
    """Arguments of a small network."""
    arguments: dict[str, Any] = {"class_name": precond, "img_resolution": 8, "img_channels": 3, "model_type": kind}
    arguments |= {"label_dim": 0, "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1, "augment_dim": 9}
    song = kind == "SongUNet"  # the other has heads of 64 channels
    arguments |= {"model_channels": 8 if song else 128, "channel_mult": [1, 2 if song else 1]}
    arguments |= {
        "EDMPrecond": {"sigma_data": 0.6},
        "VPPrecond": {"beta_d": 17.0, "beta_min": 0.2},
        "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
        "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 100},
    }[precond]
    return arguments | changes


NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}
CASES = {
    "ddpmpp": config("SongUNet"),
    "ddpmpp_classes": config("SongUNet", label_dim=5, num_blocks=2, channel_mult=[1, 1, 2]),
    "ddpmpp_vp": config("SongUNet", "VPPrecond", label_dim=3),
    "ddpmpp_iddpm": config("SongUNet", "iDDPMPrecond"),
    "ncsnpp": config("SongUNet", **NCSNPP),
    "ncsnpp_ve": config("SongUNet", "VEPrecond", label_dim=4, **NCSNPP),
    "ncsnpp_ve_skip": config("SongUNet", "VEPrecond", **NCSNPP | {"encoder_type": "skip", "decoder_type": "skip"}),
    "six_taps": config("SongUNet", **NCSNPP | {"resample_filter": [1, 2, 5, 5, 2, 1], "encoder_type": "residual"}),
    "two_taps_residual": config("SongUNet", encoder_type="residual", decoder_type="skip", img_channels=1),
    "adm": config("DhariwalUNet", label_dim=3),
    "adm_iddpm": config("DhariwalUNet", "iDDPMPrecond", num_blocks=1),
}


def one_hot(label: list[int], classes: int) -> Tensor | None:
    """One-hot vectors; the number of classes stands for zeros."""
    return torch.eye(classes + 1, dtype=torch.float64)[label, :classes] if classes else None


@pytest.mark.parametrize("name", CASES)
def test_parity(name: str) -> None:
    """The denoised picture at three noise levels, with classes and without a label, in float64."""
    arguments = CASES[name]
    original, description = Original(arguments), describe(arguments)
    x = torch.randn(3, *description.info.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x * SIGMAS[:, None, None, None]
    classes = arguments["label_dim"]
    labels = [1, classes, 0]
    sigmas = SIGMAS
    if arguments["class_name"] == "iDDPMPrecond":
        sigmas = iddpm_levels(arguments["M"], arguments["C_1"], arguments["C_2"])[[90, 50, 7]] * 1.003
    expected = original.denoised(x, sigmas, one_hot(labels, classes))
    network = description.network().double()
    kind = (arguments["class_name"], arguments["model_type"])
    network.load_state_dict(convert_unet(network, original.state(), *kind))
    denoiser = description.denoiser(network)
    t = denoiser.sde.t_of_noise_level(sigmas)
    given = torch.tensor(labels) if classes else None
    ours = denoiser.denoised(denoiser.sde.alpha(t)[:, None, None, None] * x, t, given)
    # phases of some hundred radians carry 1e-14 each
    assert distance(ours, expected) < 1e-11
    plain = original.denoised(x, sigmas, one_hot([classes] * 3, classes))
    assert distance(denoiser.denoised(denoiser.sde.alpha(t)[:, None, None, None] * x, t), plain) < 1e-11


def test_every_tensor_has_one_place() -> None:
    """A checkpoint without classes has the entries of our network, no more and no fewer."""
    arguments = config("SongUNet", **NCSNPP)
    original, network = Original(arguments), describe(arguments).network()
    original.denoised(torch.zeros(3, 3, 8, 8, dtype=torch.float64), SIGMAS, None)
    assert sum(t.numel() for t in original.weights.state.values()) == sum(
        t.numel() for t in network.state_dict().values()
    )


def original_edm2(w: Weights, config: dict[str, Any], x: Tensor, label: Tensor, onehot: Tensor | None) -> Tensor:
    """EDM2's network, config G, in the layout of `unet`."""

    def unit(v: Tensor, dims: tuple[int, ...]) -> Tensor:
        return v / (1e-4 + v.square().mean(dims, keepdim=True).sqrt())

    def weight(name: str, *shape: int) -> Tensor:
        made = w(f"{name}.weight", *shape) * 3
        return unit(made, tuple(range(1, len(shape)))) / math.sqrt(math.prod(shape[1:]))

    def mixed(a: Tensor, b: Tensor, t: float) -> Tensor:
        return ((1 - t) * a + t * b) / math.hypot(1 - t, t)

    def silu(v: Tensor) -> Tensor:
        return F.silu(v) / 0.596

    def conv(name: str, v: Tensor, out: int, size: int) -> Tensor:
        return F.conv2d(v, weight(name, out, v.shape[1], size, size), padding=size // 2)

    def gain(name: str) -> Tensor:
        return w(name)

    channels, factors, count = config["model_channels"], config["channel_mult"], config["num_blocks"]
    widths = [channels * factor for factor in factors]
    phase = label[:, None] * w("emb_fourier.freqs", widths[0]) + w("emb_fourier.phases", widths[0])
    emb = math.sqrt(2) * phase.cos() @ weight("emb_noise", max(widths), widths[0]).T
    if onehot is not None:
        classes = onehot.shape[1]
        emb = mixed(emb, onehot * math.sqrt(classes) @ weight("emb_label", max(widths), classes).T, 0.5)
    emb = silu(emb)

    def block(name: str, v: Tensor, out: int, encoder: bool, attention: bool = False) -> Tensor:
        if encoder:
            v = unit(v if v.shape[1] == out else conv(f"{name}.conv_skip", v, out, 1), (1,))
        h = conv(f"{name}.conv_res0", silu(v), out, 3)
        factor = 1 + gain(f"{name}.emb_gain") * (emb @ weight(f"{name}.emb_linear", out, emb.shape[1]).T)
        h = conv(f"{name}.conv_res1", silu(h * factor[:, :, None, None]), out, 3)
        if not encoder and v.shape[1] != out:
            v = conv(f"{name}.conv_skip", v, out, 1)
        v = mixed(v, h, 0.3)
        if attention:
            size = config["channels_per_head"]
            flat = conv(f"{name}.attn_qkv", v, 3 * out, 1).flatten(2)
            seen = []
            for k in range(out // size):
                rows = flat[:, 3 * size * k : 3 * size * (k + 1)]
                seen.append(attend(*(unit(rows[:, i::3], (1,)) for i in range(3))))
            v = mixed(v, conv(f"{name}.attn_proj", torch.cat(seen, 1).unflatten(2, v.shape[2:]), out, 1), 0.3)
        return v.clamp(-256, 256)

    sides = [f"{x.shape[2] >> i}x{x.shape[2] >> i}" for i in range(len(widths))]
    seen = [x.shape[2] >> i in config["attn_resolutions"] for i in range(len(widths))]
    h = conv(f"enc.{sides[0]}_conv", torch.cat([x, torch.ones_like(x[:, :1])], 1), widths[0], 3)
    skips = [h]
    for i, side in enumerate(sides):
        if i > 0:
            h = block(f"enc.{side}_down", F.avg_pool2d(h, 2), h.shape[1], True)
            skips.append(h)
        for j in range(count):
            h = block(f"enc.{side}_block{j}", h, widths[i], True, seen[i])
            skips.append(h)
    for i, side in reversed(list(enumerate(sides))):
        if i == len(sides) - 1:
            h = block(f"dec.{side}_in0", h, h.shape[1], False, True)
            h = block(f"dec.{side}_in1", h, h.shape[1], False)
        else:
            h = block(f"dec.{side}_up", h.repeat_interleave(2, 2).repeat_interleave(2, 3), h.shape[1], False)
        for j in range(count + 1):
            skip = skips.pop()
            a, b = h / math.sqrt(h.shape[1]), skip / math.sqrt(skip.shape[1])
            h = torch.cat([a, b], 1) * math.sqrt((h.shape[1] + skip.shape[1]) / 2)
            h = block(f"dec.{side}_block{j}", h, widths[i], False, seen[i])
    return gain("out_gain") * conv("out_conv", h, x.shape[1], 3)


@pytest.mark.parametrize("classes", [0, 3])
def test_edm2(classes: int) -> None:
    """In float64, with classes and without a label, which is a vector of zeros there."""
    arguments = {"class_name": "Precond", "img_resolution": 8, "img_channels": 4, "label_dim": classes}
    arguments |= {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    arguments |= {"channels_per_head": 8}
    description, weights = describe(arguments), Weights()
    assert description.info.kind == "vectors"
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    onehot = one_hot([1, classes, 0], classes)
    variance = SIGMAS[:, None, None, None] ** 2 + 0.25
    f = original_edm2(weights, arguments, x / variance.sqrt(), SIGMAS.log() / 4, onehot)
    expected = 0.25 / variance * x + 0.5 * SIGMAS[:, None, None, None] / variance.sqrt() * f
    state = {f"unet.{name}": (tensor * 3 if tensor.ndim > 1 else tensor) for name, tensor in weights.state.items()} | {
        "logvar_linear.weight": torch.zeros(1, 128)
    }
    network = description.network().double()
    network.load_state_dict(convert_edm2(network, state))
    denoiser = description.denoiser(network)
    ours = denoiser.denoised(x, SIGMAS, torch.tensor([1, classes, 0]) if classes else None)
    assert distance(ours, expected) < 1e-12


def test_processes() -> None:
    edm = describe(config("SongUNet", sigma_max=50, sigma_min=0.01))
    assert edm.sde == EDM(T=50.0, t_min_sampling=0.01)
    assert edm.parameterization.noise_label == "log_sigma"
    assert describe(config("SongUNet")).sde == EDM()
    vp = describe(config("SongUNet", "VPPrecond"))
    assert (vp.sde, vp.parameterization) == (VP(beta_min=0.2, beta_max=17.2), Eps(noise_label="time"))
    ve = describe(config("SongUNet", "VEPrecond", **NCSNPP))
    assert (ve.sde, ve.parameterization) == (VE(sigma_min=0.02, sigma_max=100), Eps(noise_label="sigma"))
    iddpm = describe(config("DhariwalUNet", "iDDPMPrecond", M=1000))
    assert iddpm.sde == Cosine()
    assert isinstance(iddpm.parameterization, BetaChain)
    ours, theirs = chain_log_levels(iddpm.parameterization), iddpm_levels(1000, 0.001, 0.008)[:-1].flip(0).log()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_full_sizes() -> None:
    """Trained numbers of the published networks: 55.7 M for CIFAR-10's DDPM++, 295.9 M for ImageNet's ADM."""
    with torch.device("meta"):
        cifar10 = {"class_name": "EDMPrecond", "img_resolution": 32, "img_channels": 3, "model_type": "SongUNet"}
        imagenet = {"class_name": "EDMPrecond", "img_resolution": 64, "img_channels": 3, "label_dim": 1000}
        small = describe(cifar10 | {"channel_mult": [2, 2, 2]}).network()
        large = describe(imagenet).network()
    # 9 labels for augmentation of 128 numbers each are not ours; ours has a vector more, for "no label"
    assert sum(p.numel() for p in small.parameters()) == 55_733_891 - 9 * 128
    assert sum(p.numel() for p in large.parameters()) == 295_899_267 + 768


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    """From files to samples."""
    arguments = config("SongUNet", label_dim=3)
    original = Original(arguments)
    expected = original.denoised(torch.ones(1, 3, 8, 8, dtype=torch.float64), SIGMAS[1:2], one_hot([2], 3))
    state = {name: tensor.float().contiguous() for name, tensor in original.state().items()}
    safetensors.torch.save_file(state, tmp_path / "c.safetensors")
    torch.save(state, tmp_path / "c.pt")
    (tmp_path / "c.json").write_text(json.dumps(arguments | {"sigma_max": float("inf")}))
    for name in ("c.safetensors", "c.pt"):
        denoiser = load(tmp_path / name, tmp_path / "c.json")
        ours = denoiser.denoised(torch.ones(1, 3, 8, 8), SIGMAS[1:2], torch.tensor([2]))
        assert distance(ours, expected) < 1e-5
    arguments_of_run = ("checkpoint=c.safetensors", "config=c.json", "hydra.run.dir=runs/i")
    done = command("sde.interop.edm", *arguments_of_run, folder=tmp_path)
    assert done.code == 0, done.err
    done = command("sde.sample", "solver=heun", "steps=3", "n=2", "label=[0,2]", "out=s", folder=tmp_path)
    assert done.code == 0, done.err
    samples = np.load(tmp_path / "s" / "samples.npz")
    assert samples["samples"].shape == (2, 8, 8, 3)
    assert samples["labels"].tolist() == [0, 2]
    done = command("sde.interop.edm", *arguments_of_run, folder=tmp_path)
    assert done.code == 2
    assert "holds a run already" in done.sentence


def test_pickles_are_answered_with_the_program_that_converts_them(tmp_path: Path) -> None:
    (tmp_path / "edm.pkl").write_bytes(b"\x80\x04.")
    done = command("sde.interop.edm", "checkpoint=edm.pkl", "config=edm.json", folder=tmp_path)
    assert done.code == 2
    assert 'python -c "import json, pickle' in done.sentence
    assert "checkpoint=edm.safetensors config=edm.json" in done.sentence
    program = done.sentence.split('python -c "')[1].split('"')[0]
    compile(program, "program", "exec")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "VGG"}, "model_type of the configuration='VGG' is not one of SongUNet, DhariwalUNet"),
        ({"class_name": "Other"}, "class_name of the configuration='Other' is not one of EDMPrecond"),
        ({"depth": 3}, "depth of the configuration is not an option of EDMPrecond with a SongUNet"),
        ({"channel_mult_emb": 2}, "channel_mult_emb=2 of the configuration cannot be followed: only 4 can"),
        ({"resample_filter": [1, 2, 1]}, r"resample_filter=\[1, 2, 1\] cannot be followed"),
        ({"class_name": "VEPrecond"}, "VEPrecond tells the network .* positional features here"),
        ({"class_name": "VPPrecond", "sigma_data": 1}, "sigma_data of the configuration is not an option of VPPrecond"),
        ({"img_resolution": None}, "the configuration has no img_resolution"),
    ],
)
def test_what_cannot_be_followed(changes: dict[str, Any], sentence: str) -> None:
    arguments = {key: value for key, value in config("SongUNet").items() if key != "sigma_data"}
    with pytest.raises(UserError, match=sentence):
        describe(arguments | changes)


@pytest.mark.parametrize(
    ("network", "name", "value", "kind"),
    [
        ("SongUNet", "resample_filter", 1, "a list that is not empty, each entry a number"),
        ("SongUNet", "resample_filter", [], "a list that is not empty"),
        ("SongUNet", "dropout", "x", "a number of at least 0 and below 1"),
        ("SongUNet", "sigma_min", None, "a number of at least 0"),
        ("SongUNet", "sigma_min", -1, "a number of at least 0"),
        ("SongUNet", "sigma_max", "high", "a number above 0"),
        ("SongUNet", "use_fp16", "yes", "true or false"),
        ("SongUNet", "img_resolution", "8x8", "a whole number of at least 1"),
        ("SongUNet", "embedding_type", None, "a word"),
        ("DhariwalUNet", "channel_mult", 1, "a list that is not empty, each entry a whole number of at least 1"),
        ("DhariwalUNet", "attn_resolutions", {}, "a list"),
        ("UNet", "clip_act", "x", "a number above 0, or null"),
    ],
)
def test_values_of_another_kind(network: str, name: str, value: Any, kind: str) -> None:
    sentence = rf"^{name}={re.escape(repr(value))} of the configuration must be {kind}"
    edm2 = {"class_name": "Precond", "img_resolution": 8, "img_channels": 4}
    with pytest.raises(UserError, match=sentence):
        describe((edm2 if network == "UNet" else config(network)) | {name: value})


def test_infinity_as_json_and_as_text() -> None:
    arguments = config("SongUNet")
    for text in ("inf", math.inf, json.loads("Infinity")):
        assert describe(arguments | {"sigma_max": text}) == describe(arguments)
    with pytest.raises(UserError, match="sigma_max=nan of the configuration must be a number above 0"):
        describe(arguments | {"sigma_max": math.nan})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_filters_are_those_of_the_configuration(dtype: torch.dtype) -> None:
    arguments = config("SongUNet", **NCSNPP)
    original, network = Original(arguments), describe(arguments).network()
    original.denoised(torch.zeros(3, 3, 8, 8, dtype=torch.float64), SIGMAS, None)
    state, name = original.state(), "model.enc.4x4_down.conv0.resample_filter"
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = (torch.outer(taps, taps) / 64)[None, None].to(dtype)
    convert_unet(network, state | {name: kernel}, "EDMPrecond", "SongUNet")
    box = torch.full((1, 1, 2, 2), 0.25)
    for wrong in (box, torch.nn.functional.pad(box, (1, 1, 1, 1)), kernel.flip(3) * 1.01, kernel[0, 0, 0]):
        with pytest.raises(UserError, match=r"resample_filter of the checkpoint is not resample_filter=\[1, 3, 3, 1\]"):
            convert_unet(network, state | {name: wrong}, "EDMPrecond", "SongUNet")


def test_errors_name_the_first_offending_tensor(tmp_path: Path) -> None:
    arguments = config("SongUNet", label_dim=3)
    original, network = Original(arguments), describe(arguments).network()
    original.denoised(torch.zeros(3, 3, 8, 8, dtype=torch.float64), SIGMAS, one_hot([0, 1, 2], 3))
    state = original.state()
    kind = ("EDMPrecond", "SongUNet")
    missing = {name: tensor for name, tensor in state.items() if not name.endswith("enc.8x8_block0.conv1.bias")}
    with pytest.raises(UserError, match=r"has no enc\.8x8_block0\.conv1\.bias"):
        convert_unet(network, missing, *kind)
    with pytest.raises(UserError, match=r"^enc\.2x2_conv\.weight of the checkpoint has no place"):
        convert_unet(network, state | {"enc.2x2_conv.weight": torch.zeros(1)}, *kind)
    with pytest.raises(UserError, match=r"^dec\.4x4_in0\.qkv\.weight of the checkpoint has shape \(2, 2\)"):
        convert_unet(network, state | {"model.dec.4x4_in0.qkv.weight": torch.zeros(2, 2)}, *kind)
    small = config("DhariwalUNet", model_channels=64)
    torch.save({}, tmp_path / "empty.pt")
    with pytest.raises(UserError, match="64 channels are normalized in 16 groups there and in 32 here"):
        load(tmp_path / "empty.pt", small)
    torch.save({"model": state}, tmp_path / "nested.pt")
    with pytest.raises(UserError, match="is not a state dictionary"):
        load(tmp_path / "nested.pt", arguments)
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path / "bad.safetensors", arguments)
    with pytest.raises(UserError, match="there is no checkpoint"):
        load(tmp_path / "none.safetensors", arguments)
