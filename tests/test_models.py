"""Every registered model keeps the contract of `sde.models.base`, and agrees with its YAML."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from sde.config import path_of
from sde.data import DataInfo
from sde.errors import UserError
from sde.interop.chains import SMLDChain
from sde.models import DDPM, MLP, MODELS, DDPMpp, NCSNpp
from sde.parameterizations import Eps
from sde.processes import VE
from sde.runs import build_denoiser
from tests.small_models import SMALL, build, distance, inputs, lively, shape_of

CONF = Path(__file__).parents[1] / "conf" / "model"
NAMES = sorted(MODELS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks lose more to the coordination of threads than they gain, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_yaml_and_constructor_agree(name: str) -> None:
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(config, dict)
    cls = MODELS.get(name)
    assert config.pop("_target_") == f"{cls.__module__}.{cls.__qualname__}"
    parameters = inspect.signature(cls).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert list(config) == list(defaults)
    assert config == {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == ["shape", "num_classes"]


def test_every_model_has_a_yaml() -> None:
    assert set(NAMES) <= {path.stem for path in CONF.glob("*.yaml")}


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_documented(name: str) -> None:
    documentation = inspect.getdoc(MODELS.get(name)) or ""
    for parameter in inspect.signature(MODELS.get(name)).parameters:
        assert f"    {parameter}: " in documentation, parameter
    for line in (CONF / f"{name}.yaml").read_text().splitlines():
        assert line.startswith(("#", "_target_")) or " # " in line, line


@pytest.mark.parametrize("name", NAMES)
def test_hydra_builds_it(name: str) -> None:
    config = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), SMALL[name])
    model = instantiate(config, shape=shape_of(name), num_classes=4)
    assert isinstance(model, MODELS.get(name))
    x, noise = inputs(name)
    assert model(x, noise, torch.tensor([0, 3, 4])).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient(name: str) -> None:
    """With labels and without; so that data-parallel training finds no unused parameters."""
    for num_classes, label in ((0, None), (4, torch.tensor([0, 3, 4])), (4, None)):
        model = build(name, num_classes).train()
        x, noise = inputs(name)
        model(x.requires_grad_(), noise, label).square().sum().backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert bool(parameter.grad.isfinite().all()), key


@pytest.mark.parametrize("name", NAMES)
def test_examples_do_not_see_each_other(name: str) -> None:
    model = build(name, 4).double()
    x, noise = inputs(name, 4, torch.float64)
    label = torch.tensor([0, 4, 2, 1])
    with torch.no_grad():
        together = model(x, noise, label)
        alone = torch.cat([model(x[i : i + 1], noise[i : i + 1], label[i : i + 1]) for i in range(4)])
    assert distance(together, alone) < 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_it_depends_on_noise_and_label(name: str) -> None:
    model = build(name, 4).double()
    x, noise = inputs(name, 3, torch.float64)
    with torch.no_grad():
        y = model(x, noise, torch.tensor([0, 1, 2]))
        assert distance(model(x, noise * 1.3, torch.tensor([0, 1, 2])), y) > 1e-3
        assert distance(model(x, noise, torch.tensor([1, 2, 0])), y) > 1e-3
        assert torch.equal(model(x, noise), model(x, noise, torch.full((3,), 4)))
    with pytest.raises(UserError, match="without classes"):
        build(name)(x.float(), noise.float(), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("name", NAMES)
def test_types_and_memory_formats(name: str) -> None:
    """float64 is the reference; float32 and channels_last agree to rounding, bfloat16 autocast to its 8 bits."""
    model = build(name)
    x, noise = inputs(name)
    with torch.no_grad():
        y = model(x, noise)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x, noise)
        rows = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        fast = (model.to(memory_format=torch.channels_last) if x.ndim == 4 else model)(rows, noise)
        exact = model.double()(x.double(), noise.double())
    assert y.dtype == half.dtype == torch.float32
    assert exact.dtype == torch.float64
    assert distance(y, exact) < 1e-4  # phases of up to 999 rad or of 16 cycles per unit, in float32
    assert distance(fast, y) < 1e-5
    assert distance(half, y) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_without_graph_breaks(name: str) -> None:
    model = build(name, 4)
    x, noise = inputs(name)
    label = torch.tensor([0, 1, 4])
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert distance(compiled(x, noise, label), model(x, noise, label)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name: str) -> None:
    """Everything that is drawn at random is in the state."""
    model, other = build(name, 4), MODELS.get(name)(shape_of(name), 4, **SMALL[name]).eval()
    other.load_state_dict(model.state_dict())
    x, noise = inputs(name)
    assert torch.equal(other(x, noise), model(x, noise))


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_model_gives_zero(name: str) -> None:
    model = MODELS.get(name)(shape_of(name), **SMALL[name])
    x, noise = inputs(name)
    with torch.no_grad():
        assert float(model(x, noise).abs().max()) < 1e-3


def test_dropout_is_for_training() -> None:
    for name in NAMES:
        model = build(name, dropout=0.5)
        x, noise = inputs(name)
        with torch.no_grad():
            assert torch.equal(model(x, noise), model(x, noise))
            model.train()
            assert not torch.equal(model(x, noise), model(x, noise))


@pytest.mark.parametrize("name", ["ncsnpp", "ddpmpp", "ddpm"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 12, 4), (2, 2, 6)])
def test_any_channels_and_sides(name: str, shape: tuple[int, ...]) -> None:
    model = lively(MODELS.get(name)(shape, **SMALL[name])).double().eval()
    y = model(torch.randn(2, *shape, dtype=torch.float64), torch.tensor([0.5, 20.0], dtype=torch.float64))
    assert y.shape == (2, *shape)
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("size", [2, 7, 50])
def test_vectors_of_any_length(size: int) -> None:
    model = lively(MLP((size,), width=8, depth=1))
    assert model(torch.randn(3, size), torch.zeros(3)).shape == (3, size)


def test_centered() -> None:
    """Data in [0, 1] is shown to the network as 2x - 1."""
    for name in ("ncsnpp", "ddpmpp", "ddpm"):
        x, noise = inputs(name)
        shifted, plain = build(name, centered=False), build(name)
        assert distance(shifted(x, noise), plain(2 * x - 1, noise)) < 1e-6


def test_noise_labels() -> None:
    assert build("ddpmpp").noise_label == build("ddpm").noise_label == "time"
    assert build("mlp").noise_label == "log_sigma"
    assert build("ncsnpp").noise_label == "time"
    assert build("ncsnpp", embedding="fourier").noise_label == "sigma"
    assert build("ncsnpp", embedding="fourier", scale_by_sigma=True).noise_label == "sigma"
    assert build("ncsnpp", embedding="positional", scale_by_sigma=True).noise_label == "index"
    assert build("ddpm", scale_by_sigma=True).noise_label == "index"


def test_scale_by_sigma() -> None:
    """Fourier: divided by the noise level itself. Positional: by the level that has the index."""
    x, noise = inputs("ncsnpp")
    scaled, plain = (build("ncsnpp", embedding="fourier", scale_by_sigma=flag) for flag in (True, False))
    assert distance(scaled(x, noise) * noise[:, None, None, None], plain(x, noise)) < 1e-6
    levels = {"sigma_min": 1.0, "sigma_max": 100.0, "num_scales": 3}
    scaled = build("ncsnpp", embedding="positional", scale_by_sigma=True, **levels)
    plain = build("ncsnpp", embedding="positional")
    index, sigma = torch.tensor([0, 1, 2]), torch.tensor([100.0, 10.0, 1.0])[:, None, None, None]
    assert distance(scaled(x, index) * sigma, plain(x, index)) < 1e-6


def test_noise_conditional() -> None:
    """A network that is not told the noise level, with classes and without."""
    x, noise = inputs("ncsnpp")
    model = build("ncsnpp", noise_conditional=False)
    assert torch.equal(model(x, noise), model(x, 2 * noise))
    model = build("ncsnpp", 4, noise_conditional=False)
    assert torch.equal(model(x, noise, torch.tensor([0, 1, 2])), model(x, 2 * noise, torch.tensor([0, 1, 2])))
    assert distance(model(x, noise, torch.tensor([1, 1, 1])), model(x, noise)) > 1e-3


def test_resolutions_of_attention() -> None:
    """By the longer side of the data; resolutions that no level has are ignored."""
    for resolutions, expected in (([8, 100], [True, False]), ([4], [False, True]), ([], [False, False])):
        model = NCSNpp((3, 4, 8), channels=8, channel_multipliers=[1, 2], attention_resolutions=resolutions)
        found = [not isinstance(level.attentions[0], nn.Identity) for level in model.down]
        assert found == expected
        assert [not isinstance(level.attentions[-1], nn.Identity) for level in model.up] == expected[::-1]


def test_ddpmpp_is_ncsnpp_with_other_settings() -> None:
    settings = {"fir": False, "progressive_input": "none", "embedding": "positional"}
    one, two = build("ddpmpp"), build("ncsnpp", **settings)
    two.load_state_dict(one.state_dict())
    x, noise = inputs("ddpmpp")
    assert torch.equal(one(x, noise), two(x, noise))


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (NCSNpp, {"block": "bigan"}, "model.block='bigan' is not one of biggan, ddpm; did you mean 'biggan'"),
        (NCSNpp, {"progressive": "skip"}, "model.progressive='skip'"),
        (NCSNpp, {"progressive_input": "output_skip"}, "model.progressive_input='output_skip'"),
        (NCSNpp, {"progressive_combine": "add"}, "model.progressive_combine='add'"),
        (NCSNpp, {"embedding": "sin"}, "model.embedding='sin'"),
        (NCSNpp, {"activation": "gelu"}, "model.activation='gelu'"),
        (NCSNpp, {"fourier_scale": 0}, "model.fourier_scale=0"),
        (NCSNpp, {"init_scale": -1}, "model.init_scale=-1"),
        (NCSNpp, {"fir_kernel": [1]}, "model.fir_kernel="),
        (NCSNpp, {"channels": 3}, "model.channels=3 is out of range"),
        (NCSNpp, {"channels": 64.0}, "model.channels=64.0 is not a whole number"),
        (NCSNpp, {"channel_multipliers": []}, "model.channel_multipliers is empty"),
        (NCSNpp, {"channel_multipliers": [1, 0]}, r"model.channel_multipliers\[1\]=0"),
        (NCSNpp, {"channel_multipliers": 2}, "model.channel_multipliers=2 is not a list"),
        (DDPMpp, {"blocks_per_level": 0}, "model.blocks_per_level=0"),
        (DDPMpp, {"dropout": 1.0}, "model.dropout=1.0"),
        (DDPM, {"sigma_min": 60.0}, "model.sigma_max=50.0 is out of range: it must be above 60"),
        (DDPM, {"num_scales": 1}, "model.num_scales=1"),
        (MLP, {"width": 2}, "model.width=2"),
        (MLP, {"depth": 0}, "model.depth=0"),
        (MLP, {"fourier_scale": -1.0}, "model.fourier_scale=-1.0"),
    ],
)
def test_settings_out_of_range(cls: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cls((2,) if cls is MLP else (3, 32, 32), **settings)


@pytest.mark.parametrize("name", ["ncsnpp", "ddpm", "edm2", "unet1d"])
def test_recomputed_levels_are_at_most_all(name: str) -> None:
    build(name, recompute_levels=2)
    with pytest.raises(UserError, match=r"model\.recompute_levels=3 is out of range: .* at least 0 and at most 2$"):
        build(name, recompute_levels=3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:var_mean")  # of no examples
def test_no_examples(name: str) -> None:
    model, (x, noise) = build(name, 3), inputs(name)
    for label in (None, torch.zeros(0, dtype=torch.int64)):
        assert model(x[:0], noise[:0], label).shape == x[:0].shape


@pytest.mark.parametrize("name", NAMES)
def test_class_labels_out_of_range(name: str) -> None:
    model, (x, noise) = build(name, 3), inputs(name)
    model(x, noise, torch.tensor([0, 2, 3]))
    for label in (4, -1):
        with pytest.raises(UserError, match=rf"class label {label} is not one of the 3 classes .* give 0 to 2, or 3"):
            model(x, noise, torch.tensor([0, label, 3]))


@pytest.mark.parametrize(
    ("parameterization", "message"),
    [
        ({"_target_": path_of(Eps)}, "this network is told a place in a table of noise levels: use parameterization="),
        ({"_target_": path_of(SMLDChain), "n": 1301}, "noise level 1300 is not one of the 1300 of the model"),
        ({"_target_": path_of(SMLDChain), "n": 1300}, None),
    ],
)
def test_noise_labels_that_a_network_does_not_know(parameterization: dict[str, Any], message: str | None) -> None:
    """Before anything is trained."""
    config = {
        "model": {"_target_": path_of(MODELS.get("ncsn")), **SMALL["ncsn"]},
        "sde": {"_target_": path_of(VE)},
        "parameterization": parameterization,
    }
    info = DataInfo(name="pictures", shape=(3, 8, 8))
    if message is None:
        assert isinstance(build_denoiser(config, info).network, MODELS.get("ncsn"))
        return
    with pytest.raises(UserError, match=message):
        build_denoiser(config, info)


def test_shapes_that_do_not_suit() -> None:
    message = r"pictures of 28x30 cannot be halved 2 times: with 3 levels the sides must be multiples of 4; resize"
    with pytest.raises(UserError, match=message):
        NCSNpp((1, 28, 30))
    assert NCSNpp((1, 28, 28), channels=8)(torch.zeros(1, 1, 28, 28), torch.ones(1)).shape == (1, 1, 28, 28)
    with pytest.raises(UserError, match=r"model=mlp works on examples of shape \(D\), not \(3, 8, 8\)"):
        MLP((3, 8, 8))
    with pytest.raises(UserError, match=r"model=ddpm works on examples of shape \(C, H, W\), not \(2,\)"):
        DDPM((2,))
    with pytest.raises(UserError, match="num_classes=-1"):
        NCSNpp((3, 8, 8), -1)


def test_mlp_learns_a_mixture() -> None:
    """Noise prediction for two points in the plane at +-(1, 1): the exact answer is known.

    E[x0 | x] = (1, 1) tanh((x . (1, 1)) / sigma^2), for x = x0 + sigma z.
    """
    torch.manual_seed(0)
    model = MLP((2,), width=64, depth=2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sigma = torch.exp(torch.empty(count).uniform_(-1.5, 1.5))
        x0 = torch.where(torch.rand(count) < 0.5, 1.0, -1.0)[:, None].expand(-1, 2)
        x = x0 + sigma[:, None] * torch.randn(count, 2)
        return x0, x, sigma, x / (1 + sigma[:, None] ** 2).sqrt()

    for _ in range(600):
        x0, _, sigma, scaled = draw(512)
        optimizer.zero_grad()
        (model(scaled, sigma.log() / 4) - x0).square().mean().backward()
        optimizer.step()
    _, x, sigma, scaled = draw(4000)
    exact = torch.tanh(x.sum(1) / sigma**2)[:, None].expand(-1, 2)
    with torch.no_grad():
        error = (model(scaled, sigma.log() / 4) - exact).square().mean()
    assert float(error) < 0.01  # a constant answer would be wrong by about 0.6, the data itself by 0.4
