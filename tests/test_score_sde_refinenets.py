"""RefineNets of score_sde_pytorch, ermongroup/ncsnv2 and ermongroup/ncsn: read, and computed as the originals do.

The reference here is a network written from the description alone, slowly and literally: a dilated kernel has zeros
between its taps, a pool unfolds its windows, enlarging is two matrices. It knows the originals' names of weights, so it
also makes the checkpoints. There are no recorded outputs of the originals to compare with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sde.errors import UserError
from sde.interop.chains import SMLDChain
from sde.interop.score_sde import describe, load, parameterization_from_config, read_config
from sde.interop.score_sde_refinenets import translate_config
from sde.interop.score_sde_weights import (
    convert_state_dict,
    ema_state_dict,
    network_from_config,
    read_checkpoint,
    settings_from_config,
)
from sde.models import NCSN, NCSNv2
from sde.processes import VE

LAYOUTS: dict[str, tuple[list[tuple[str, int, int]], list[str]]] = {
    "4": ([("1", 1, 1), ("2", 2, 1), ("3", 2, 2), ("4", 2, 4)], ["1", "2", "3", "4"]),
    "5": ([("1", 1, 1), ("2", 2, 1), ("3", 2, 1), ("4", 4, 2), ("5", 4, 4)], ["1", "2", "3", "4", "5"]),
    "6": (
        [("1", 1, 1), ("2", 2, 1), ("3", 2, 1), ("31", 2, 1), ("4", 4, 2), ("5", 4, 4)],
        ["1", "2", "31", "3", "4", "5"],
    ),
}
DEPTHS = {"ncsn": "4", "ncsnv2_64": "4", "ncsnv2_128": "5", "ncsnv2_256": "6"}


class Original:
    """One of the four networks; `weights` are made when first used, under the originals' names, and kept.

    Args:
        config: the original's configuration.
        device: "meta" to count weights only.
    """

    def __init__(self, config: dict[str, Any], device: str = "cpu") -> None:
        self.model, self.data, self.device = config["model"], config["data"], device
        self.conditional = self.model["name"] == "ncsn"
        self.norm_kind = self.model["normalization"]
        self.generator = torch.Generator().manual_seed(0)
        self.weights: dict[str, Tensor] = {}
        self.level = torch.zeros(1, dtype=torch.int64)

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.weights:
            if self.device == "meta":
                self.weights[name] = torch.empty(shape, device="meta")
            else:
                fan = math.prod(shape[1:]) if len(shape) == 4 else 9
                drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64) / math.sqrt(fan)
                self.weights[name] = drawn
        return self.weights[name]

    def conv(self, x: Tensor, name: str, out: int, size: int = 3, dilation: int = 1, bias: bool = True) -> Tensor:
        kernel = self.weight(f"{name}.weight", out, x.shape[1], size, size)
        if dilation > 1:
            holes = kernel.new_zeros(out, x.shape[1], 2 * dilation + 1, 2 * dilation + 1)
            holes[:, :, ::dilation, ::dilation] = kernel
            kernel = holes
        y = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        return y + self.weight(f"{name}.bias", out)[:, None, None] if bias else y

    def act(self, x: Tensor) -> Tensor:
        kinds = {
            "elu": lambda x: torch.where(x > 0, x, torch.exp(x) - 1),
            "relu": lambda x: torch.where(x > 0, x, 0.0),
            "lrelu": lambda x: torch.where(x > 0, x, 0.2 * x),
            "swish": lambda x: x / (1 + torch.exp(-x)),
        }
        return kinds[self.model["nonlinearity"]](x)

    def norm(self, x: Tensor, name: str) -> Tensor:
        kind, channels = self.norm_kind, x.shape[1]
        count = {"InstanceNorm++": 3, "InstanceNorm": 2, "VarianceNorm": 1, "NoneNorm": 2}[kind]
        vectors: list[Tensor]
        if self.conditional:
            table = self.weight(f"{name}.embed.weight", self.model["num_scales"], count * channels)
            vectors = [part[:, :, None, None] for part in table[self.level].split(channels, 1)]
        elif kind in ("InstanceNorm++", "VarianceNorm"):
            names = ("gamma", "alpha", "beta") if kind == "InstanceNorm++" else ("alpha",)
            vectors = [self.weight(f"{name}.{vector}", channels)[None, :, None, None] for vector in names]
        else:
            vectors = [torch.ones_like(x), torch.zeros_like(x)]
        pixels = x.shape[2] * x.shape[3]
        mean = x.sum((2, 3), keepdim=True) / pixels
        variance = ((x - mean) ** 2).sum((2, 3), keepdim=True) / pixels
        if kind == "VarianceNorm":
            return vectors[0] * x / torch.sqrt(variance * pixels / (pixels - 1) + 1e-5)
        if kind == "NoneNorm":
            return vectors[0] * x + vectors[1]
        h = (x - mean) / torch.sqrt(variance + 1e-5)
        if kind == "InstanceNorm++":
            center = mean.sum(1, keepdim=True) / channels
            spread = ((mean - center) ** 2).sum(1, keepdim=True) / (channels - 1)
            h = h + vectors[1] * (mean - center) / torch.sqrt(spread + 1e-5)
        return vectors[0] * h + vectors[-1]

    def residual(self, x: Tensor, name: str, out: int, dilation: int, down: bool) -> Tensor:
        pooled = down and dilation == 1
        h = self.conv(self.act(self.norm(x, f"{name}.normalize1")), f"{name}.conv1", x.shape[1], dilation=dilation)
        h = self.act(self.norm(h, f"{name}.normalize2"))
        if pooled:
            h = quarter(self.conv(h, f"{name}.conv2.conv", out))
            return quarter(self.conv(x, f"{name}.shortcut.conv", out, size=1)) + h
        h = self.conv(h, f"{name}.conv2", out, dilation=dilation)
        return h + (self.conv(x, f"{name}.shortcut", out, dilation=dilation) if down else x)

    def refinement_norm(self, x: Tensor, name: str) -> Tensor:
        return self.norm(x, name) if self.conditional else x

    def units(self, x: Tensor, name: str, count: int) -> Tensor:
        for i in range(1, count + 1):
            h = x
            for j in (1, 2):
                h = self.act(self.refinement_norm(h, f"{name}.{i}_{j}_norm"))
                h = self.conv(h, f"{name}.{i}_{j}_conv", x.shape[1], bias=False)
            x = x + h
        return x

    def refine(self, xs: list[Tensor], name: str, out: int, end: bool) -> Tensor:
        xs = [self.units(x, f"{name}.adapt_convs.{i}", 2) for i, x in enumerate(xs)]
        if len(xs) > 1:
            terms = []
            for i, x in enumerate(xs):
                h = self.conv(self.refinement_norm(x, f"{name}.msf.norms.{i}"), f"{name}.msf.convs.{i}", out)
                terms.append(enlarge(h, xs[0].shape[2], xs[0].shape[3]))
            x = terms[0] + terms[1]
        else:
            x = xs[0]
        x = path = self.act(x)
        for i in range(2):
            path = windows(self.refinement_norm(path, f"{name}.crp.norms.{i}"), mean=self.conditional)
            path = self.conv(path, f"{name}.crp.convs.{i}", out, bias=False)
            x = x + path
        return self.units(x, f"{name}.output_convs", 3 if end else 1)

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        self.level = level
        nf, (stages, refine) = self.model["nf"], LAYOUTS[DEPTHS[self.model["name"]]]
        h = self.conv(x if self.data["centered"] else 2 * x - 1, "begin_conv", nf)
        layers = []
        for i, (suffix, multiplier, dilation) in enumerate(stages):
            for j in (0, 1):
                h = self.residual(h, f"res{suffix}.{j}", multiplier * nf, dilation, down=i > 0 and j == 0)
            layers.append(h)
        for k, suffix in enumerate(refine):
            i = len(stages) - 1 - k
            out = nf * (stages[i][1] if k == 0 else stages[max(i - 1, 0)][1])
            h = self.refine([layers[i]] if k == 0 else [layers[i], h], f"refine{suffix}", out, end=i == 0)
        h = self.conv(self.act(self.norm(h, "normalizer")), "end_conv", x.shape[1])
        return h if self.conditional else h / self.sigmas()[level][:, None, None, None]

    def sigmas(self) -> Tensor:
        model = self.model
        return torch.tensor(
            np.exp(np.linspace(np.log(model["sigma_max"]), np.log(model["sigma_min"]), model["num_scales"]))
        )

    def state(self) -> dict[str, Tensor]:
        """The weights under the names of a checkpoint of score_sde_pytorch; only ermongroup/ncsnv2 has `sigmas`."""
        return {f"module.{name}": weight for name, weight in self.weights.items()}


def quarter(x: Tensor) -> Tensor:
    """The mean of each 2x2 pixels."""
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def windows(x: Tensor, mean: bool) -> Tensor:
    """Mean or maximum over 5x5 windows; outside is 0 for means and minus infinity for maxima."""
    outside = 0.0 if mean else -math.inf
    views = F.pad(x, (2, 2, 2, 2), value=outside).unfold(2, 5, 1).unfold(3, 5, 1)
    return views.sum((-1, -2)) / 25 if mean else views.amax((-1, -2))


def enlarge(x: Tensor, height: int, width: int) -> Tensor:
    """Linear interpolation along both axes, corners onto corners."""

    def matrix(new: int, old: int) -> Tensor:
        rows = torch.zeros(new, old, dtype=torch.float64)
        for i in range(new):
            place = i * (old - 1) / (new - 1) if new > 1 else 0.0
            low = min(int(place), max(old - 2, 0))
            rows[i, low] += 1 - (place - low)
            if old > 1:
                rows[i, low + 1] += place - low
        return rows.to(x)

    return torch.einsum("ih,bchw,jw->bcij", matrix(height, x.shape[2]), x, matrix(width, x.shape[3]))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks lose more to the coordination of threads than they gain, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(name: str, *, size: int = 8, channels: int = 3, centered: bool = False, **model: Any) -> dict[str, Any]:
    """A small configuration of score_sde_pytorch's."""
    settings = {
        "name": name, "nf": 4, "nonlinearity": "elu", "normalization": "InstanceNorm++", "num_scales": 7,
        "sigma_min": 0.01, "sigma_max": 50, "scale_by_sigma": name != "ncsn", "dropout": 0.1,
    }  # fmt: skip
    data = {"image_size": size, "num_channels": channels, "centered": centered, "dataset": "CIFAR10"}
    return {"data": data, "model": settings | model, "training": {"sde": "vesde", "continuous": False}}


def inputs(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Three pictures and the first, a middle and the last noise level."""
    data = settings["data"]
    shape = (3, data["num_channels"], data["image_size"], data["image_size"])
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    last = settings["model"]["num_scales"] - 1
    return x, torch.tensor([0, last // 2, last])


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm, the largest over the examples."""
    ours, theirs = ours.double().flatten(1), theirs.flatten(1)
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


CONFIGURATIONS = {
    "ncsnv2_64": config("ncsnv2_64"),
    "ncsnv2_128": config("ncsnv2_128"),
    "ncsnv2_256": config("ncsnv2_256", size=16),
    "ncsn": config("ncsn"),
    "mnist": config("ncsnv2_64", size=14, channels=1, num_scales=10, sigma_max=1),
    "mnist_ncsn": config("ncsn", size=14, channels=1, centered=True),
    "centered": config("ncsnv2_64", centered=True, nonlinearity="swish"),
    "variance": config("ncsnv2_64", normalization="VarianceNorm", nonlinearity="relu"),
    "none": config("ncsnv2_64", normalization="NoneNorm", nonlinearity="lrelu"),
    "ncsn_variance": config("ncsn", normalization="VarianceNorm", nonlinearity="swish"),
    "ncsn_instance": config("ncsn", normalization="InstanceNorm", nonlinearity="relu"),
    "ncsn_none": config("ncsn", normalization="NoneNorm"),
}


@pytest.mark.parametrize("settings", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_parity(settings: dict[str, Any]) -> None:
    """Rounding alone: some sixty layers of float64 (1e-12) and of float32 (1e-5); with last and averaged weights."""
    original = Original(settings)
    x, level = inputs(settings)
    expected = original(x, level)
    state = original.state()
    network = network_from_config(settings).eval()
    double = network_from_config(settings).double().eval()
    averages = {"shadow_params": list(state.values())}
    other = {name: 1.1 * weight for name, weight in state.items()}
    with torch.no_grad():
        double.load_state_dict(convert_state_dict(double, state))
        assert distance(double(x, level.double()), expected) < 1e-12
        double.load_state_dict(ema_state_dict(double, {"model": other, "ema": averages}))
        assert distance(double(x, level.double()), expected) < 1e-12
        network.load_state_dict(convert_state_dict(network, state))
        assert distance(network(x.float(), level.float()), expected) < 1e-5


@pytest.mark.parametrize("name", DEPTHS)
def test_every_tensor_has_one_place(name: str) -> None:
    settings = config(name, size=16)
    original = Original(settings)
    original(*inputs(settings))
    network = network_from_config(settings)
    converted = convert_state_dict(network, original.state())
    assert converted.keys() == network.state_dict().keys()
    values = torch.cat([weight.flatten() for weight in original.weights.values()])
    assert torch.equal(
        values.sort().values, torch.cat([weight.flatten() for weight in converted.values()]).sort().values
    )


@pytest.mark.parametrize(
    ("name", "scales", "count"),
    [
        ("ncsnv2_64", 232, 29_694_083),
        ("ncsnv2_128", 1086, 83_445_379),
        ("ncsnv2_256", 2311, 94_132_611),
        ("ncsn", 10, 30_117_635),
    ],
)
def test_sizes_of_the_papers(name: str, scales: int, count: int) -> None:
    """Trained numbers at full size, of ours and of the reference; 29.7 million is what is reported for CIFAR-10."""
    settings = config(name, size=32, nf=128, num_scales=scales)
    with torch.device("meta"):
        network = network_from_config(settings)
    original = Original(settings, "meta")
    x = torch.empty(1, 3, 32, 32, device="meta")
    original.sigmas = lambda: torch.empty(scales, device="meta")  # type: ignore[method-assign]
    original(x, torch.zeros(1, dtype=torch.int64, device="meta"))
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert sum(weight.numel() for weight in original.weights.values()) == count


def test_settings() -> None:
    name, settings, shape = settings_from_config(config("ncsnv2_128", size=16, channels=1, sigma_max=190))
    assert (name, shape) == ("ncsnv2", (1, 16, 16))
    assert (settings["noise_label"], settings["sigma_min"], settings["sigma_max"]) == ("index", 0.01, 190.0)
    assert isinstance(network_from_config(config("ncsnv2_64")), NCSNv2)
    assert isinstance(network_from_config(config("ncsn")), NCSN)
    sparse = config("ncsnv2_64")
    for key in ("nf", "nonlinearity", "normalization"):
        model = {k: v for k, v in sparse["model"].items() if k != key}
        with pytest.raises(UserError, match=rf"no model\.{key}"):
            settings_from_config(sparse | {"model": model})
    with pytest.raises(UserError, match="'GroupNorm' is not one of InstanceNorm"):
        settings_from_config(config("ncsnv2_64", normalization="GroupNorm"))
    with pytest.raises(UserError, match="cannot be followed for ncsnv2: the original gives its last layer"):
        settings_from_config(config("ncsnv2_64", normalization="InstanceNorm"))


def test_always_discrete() -> None:
    """One published configuration misspells `continuous`; these networks have no continuous label."""
    settings = config("ncsnv2_128", num_scales=1086)
    settings["training"] = {"sde": "vesde", "continuous": True}
    assert parameterization_from_config(settings) == SMLDChain(n=1086)
    settings["training"]["sde"] = "vpsde"
    with pytest.raises(UserError, match="of ncsnv2_128='vpsde' is not one of vesde"):
        parameterization_from_config(settings)


def test_errors_name_the_first_offending_tensor() -> None:
    settings = config("ncsnv2_64")
    original = Original(settings)
    original(*inputs(settings))
    network, state = network_from_config(settings), original.state()
    with pytest.raises(UserError, match=r"no res2\.0\.conv2\.conv\.bias"):
        convert_state_dict(network, {k: v for k, v in state.items() if "res2.0.conv2.conv.bias" not in k})
    with pytest.raises(UserError, match=r"^res31\.0\.conv1\.weight of the checkpoint has no place"):
        convert_state_dict(network, state | {"module.res31.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"^refine2\.crp\.convs\.1\.weight of the checkpoint has shape \(2, 2\)"):
        convert_state_dict(network, state | {"module.refine2.crp.convs.1.weight": torch.zeros(2, 2)})


def check_scores(checkpoint: Path, settings: dict[str, Any], original: Original, factor: float) -> None:
    """The denoiser's score at three times is the reference's output at the level that is rounded to."""
    denoiser = load(checkpoint, settings)
    n = original.model["num_scales"]
    assert denoiser.sde == VE(
        sigma_min=float(original.model["sigma_min"]), sigma_max=float(original.model["sigma_max"])
    )
    assert denoiser.parameterization == SMLDChain(n=n)
    x, _ = inputs(settings) if "nf" in settings["model"] else inputs(config("ncsn"))
    t = torch.tensor([1.0, 0.52, 0.01])
    level = torch.round((1 - t) * (n - 1)).long()
    original.weights = {name: factor * weight for name, weight in original.weights.items()}
    assert distance(denoiser.score(x.float(), t), original(x, level)) < 1e-5


@pytest.mark.parametrize("name", ["ncsnv2_64", "ncsn"])
def test_load(name: str, tmp_path: Path) -> None:
    """From files, through the denoiser; what a run's folder would hold builds the same network."""
    settings = config(name)
    original = Original(settings)
    original(*inputs(settings))
    averages = [1.1 * weight for weight in original.weights.values()]
    checkpoint = {"model": original.state(), "ema": {"shadow_params": averages}, "optimizer": {}, "step": 5}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_config(tmp_path / "config.json") == settings
    node = describe(settings).config()["model"]
    assert node.pop("_target_") in ("sde.models.ncsn.NCSN", "sde.models.ncsnv2.NCSNv2")
    assert node == {k: list(v) if isinstance(v, tuple) else v for k, v in settings_from_config(settings)[1].items()}
    check_scores(tmp_path / "checkpoint.pth", settings, original, 1.1)


def ermongroup(**model: Any) -> dict[str, Any]:
    """A small configuration of ermongroup/ncsnv2."""
    settings = {
        "sigma_begin": 50, "sigma_end": 0.01, "num_classes": 7, "sigma_dist": "geometric", "spec_norm": False,
        "normalization": "InstanceNorm++", "nonlinearity": "elu", "ngf": 4, "ema": True,
    }  # fmt: skip
    data = {"dataset": "CIFAR10", "image_size": 8, "channels": 3, "logit_transform": False, "rescaled": False}
    return {"data": data, "model": settings | model, "training": {"anneal_power": 2}}


def test_ermongroup(tmp_path: Path) -> None:
    """Lists of states with averages by name (ncsnv2), and without (ncsn), where the weights stand for them."""
    assert translate_config(ermongroup())["model"] == {
        key: value for key, value in config("ncsnv2_64")["model"].items() if key not in ("scale_by_sigma", "dropout")
    }
    original = Original(config("ncsnv2_64"))
    original(*inputs(config("ncsnv2_64")))
    state = original.state() | {"module.sigmas": original.sigmas().float()}
    shadow = {name: 1.1 * weight for name, weight in reversed(original.weights.items())}
    torch.save([state, {}, 3, 1234, shadow], tmp_path / "ncsnv2.pth")
    assert read_checkpoint(tmp_path / "ncsnv2.pth")["step"] == 1234
    check_scores(tmp_path / "ncsnv2.pth", ermongroup(), original, 1.1)

    original = Original(config("ncsn", sigma_max=1))
    original(*inputs(config("ncsn")))
    torch.save([original.state(), {}], tmp_path / "ncsn.pth")
    check_scores(tmp_path / "ncsn.pth", ermongroup(name="ncsn", sigma_begin=1), original, 1.0)


def test_ermongroup_configurations() -> None:
    for dataset, name in (("CELEBA", "ncsnv2_64"), ("LSUN", "ncsnv2_128"), ("FFHQ", "ncsnv2_256")):
        settings = ermongroup()
        settings["data"]["dataset"] = dataset
        assert translate_config(settings)["model"]["name"] == name
    settings["data"]["dataset"] = "MNIST"
    with pytest.raises(UserError, match=r"data\.dataset of the configuration='MNIST' is not one of"):
        translate_config(settings)
    with pytest.raises(UserError, match=r"model\.spec_norm=True of the configuration cannot be followed"):
        translate_config(ermongroup(spec_norm=True))
    with pytest.raises(UserError, match=r"model\.sigma_dist='uniform' of the configuration cannot be followed"):
        translate_config(ermongroup(sigma_dist="uniform"))
    settings = ermongroup()
    del settings["model"]["sigma_begin"]
    with pytest.raises(UserError, match=r"no model\.sigma_begin"):
        translate_config(settings)
    assert translate_config(config("ncsn")) == config("ncsn")
