"""NCSN, NCSNv2 and their layers against formulas written out, special cases that coincide and invariants."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sde.errors import UserError
from sde.models import NCSN, NCSNv2
from sde.models.refinenet import (
    NORMALIZATIONS,
    ChainedResidualPooling,
    ConvMeanPool,
    InstanceNorm,
    InstanceNormPlus,
    MultiResolutionFusion,
    NoNorm,
    RefineNetSettings,
    ResidualConvUnits,
    VarianceNorm,
)
from tests.small_models import build, distance, inputs, lively

NOTHING = ()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks lose more to the coordination of threads than they gain, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def settings_of(**changes: Any) -> RefineNetSettings:
    settings: dict[str, Any] = {
        "channels": 4, "channel_multipliers": (1,), "dilations": (1,), "normalization": "instance++", "tables": (),
        "normalize_refinement": False, "pool": "max", "activation": "elu", "dropout": 0.0, "recompute": False,
    }  # fmt: skip
    return RefineNetSettings(**settings | changes)


def test_instance_norm_plus_number_by_number() -> None:
    """The equations of arXiv 1907.05600, A.1, in plain Python; with rows of a table, each example has its own."""
    x = normal(3, 4, 2, 5) * 3 + normal(3, 4, 1, 1, seed=1)
    rows = torch.tensor([2, 0, 2])
    for tables in ((), (3,)):
        norm = lively(InstanceNormPlus(4, tables)).double()
        y = norm(x, (rows,) if tables else NOTHING)
        table = norm.coefficients.tables[0].weight.tolist()
        for b in range(3):
            row = table[int(rows[b])] if tables else table[0]
            gamma, alpha, beta = row[:4], row[4:8], row[8:]
            means = [sum(x[b, c].flatten().tolist()) / 10 for c in range(4)]
            center = sum(means) / 4
            spread = math.sqrt(sum((mean - center) ** 2 for mean in means) / 3 + 1e-5)
            for c in range(4):
                values = x[b, c].flatten().tolist()
                deviation = math.sqrt(sum((value - means[c]) ** 2 for value in values) / 10 + 1e-5)
                expected = [
                    gamma[c] * ((value - means[c]) / deviation + alpha[c] * (means[c] - center) / spread) + beta[c]
                    for value in values
                ]
                assert y[b, c].flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_instance_norm_plus_does_not_see_brightness_and_contrast() -> None:
    """y(a x + b) = y(x) for a > 0, up to the 1e-5 that is added to variances of about 1 and of about 100."""
    norm = lively(InstanceNormPlus(6, ())).double()
    x = normal(2, 6, 8, 8) + 5 * normal(2, 6, 1, 1, seed=1)
    assert distance(norm(100 * x - 30, NOTHING), norm(x, NOTHING)) < 1e-5
    assert distance(norm(x + normal(2, 6, 1, 1, seed=2), NOTHING), norm(x, NOTHING)) > 0.01  # as InstanceNorm cannot


def test_other_normalizations() -> None:
    x, rows = normal(3, 4, 3, 5) + 2, torch.tensor([1, 0, 1])
    centered = F.instance_norm(x, eps=1e-5)
    deviation = torch.sqrt(x.var((2, 3), keepdim=True) + 1e-5)
    assert distance(InstanceNorm(4, ())(x, NOTHING), centered) < 1e-14
    assert torch.equal(NoNorm(4, ())(x, NOTHING), x)
    assert not list(NoNorm(4, ()).parameters()) + list(InstanceNorm(4, ()).parameters())
    variance = lively(VarianceNorm(4, ())).double()
    gamma = variance.coefficients.tables[0].weight.detach()
    assert distance(variance(x, NOTHING), gamma[:, :, None, None] * x / deviation) < 1e-14
    for norm, inner in (
        (InstanceNorm(4, (2,)), centered),
        (NoNorm(4, (2,)), x),
        (VarianceNorm(4, (2,)), x / deviation),
    ):
        table = lively(norm).double().coefficients.tables[0].weight.detach()[rows]
        expected = table[:, :4, None, None] * inner
        expected = expected + table[:, 4:, None, None] if table.shape[1] == 8 else expected
        assert distance(norm(x, (rows,)), expected) < 1e-14


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_tables_of_coefficients(name: str) -> None:
    """At the start factors are near one and offsets zero; rows of two tables add up, and the second starts at zero."""
    norm = NORMALIZATIONS[name](8, (5, 3)).double()
    tables = norm.coefficients.tables
    first = tables[0].weight.detach().view(5, -1, 8)
    factors = {"instance++": 2, "variance": 1}.get(name, 1)
    assert float((first[:, :factors] - 1).abs().max()) < 0.02 * 5
    assert float(first[:, :factors].std()) > 0.01
    assert not first[:, factors:].any()
    assert not tables[1].weight.any()
    x, rows, classes = normal(2, 8, 4, 4), torch.tensor([4, 1]), torch.tensor([0, 2])
    alone = NORMALIZATIONS[name](8, (5,)).double()
    alone.coefficients.tables[0].load_state_dict(tables[0].state_dict())
    assert torch.equal(norm(x, (rows, classes)), alone(x, (rows,)))
    lively(norm)
    with torch.no_grad():
        alone.coefficients.tables[0].weight[rows] = tables[0].weight[rows] + tables[1].weight[classes]
    assert torch.equal(norm(x, (rows, classes)), alone(x, (rows,)))


@pytest.mark.parametrize("size", [1, 3])
def test_pooling_is_exact(size: int) -> None:
    """One convolution of stride 2 equals the convolution and then the mean of 2x2 pixels, and so do its gradients."""
    layer, x = ConvMeanPool(3, 5, size).double(), normal(2, 3, 6, 8)
    results = []
    for y in (layer(x), F.avg_pool2d(layer.conv(x), 2)):
        gradients = torch.autograd.grad((y * normal(2, 5, 3, 4, seed=1)).sum(), list(layer.parameters()))
        results.append((y, *gradients))
    assert all(distance(one, two) < 1e-14 for one, two in zip(*results, strict=True))


def test_units_and_pools_are_the_identity_without_weights() -> None:
    """With convolutions of zero, residual units are x, and chained pooling is act(x)."""
    x = normal(2, 4, 5, 6)
    for layer, expected in (
        (ResidualConvUnits(4, 3, settings_of()), x),
        (ChainedResidualPooling(4, settings_of()), F.elu(x)),
    ):
        for module in layer.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
        assert torch.equal(layer.double()(x, NOTHING), expected)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_chained_pooling(pool: str) -> None:
    """Kernels that pass on the middle pixel: x + pool(x) + pool(pool(x)), where two 5x5 maxima are one of 9x9."""
    layer = ChainedResidualPooling(1, settings_of(pool=pool, activation="relu")).double()
    for convolution in layer.convs:
        nn.init.dirac_(convolution.weight)
    x = normal(2, 1, 12, 11).relu()
    if pool == "max":
        expected = x + F.max_pool2d(x, 5, 1, 2) + F.max_pool2d(x, 9, 1, 4)
    else:
        box = torch.ones(1, 1, 5, 5, dtype=torch.float64) / 25
        once = F.conv2d(x, box, padding=2)
        expected = x + once + F.conv2d(once, box, padding=2)
    assert distance(layer(x, NOTHING), expected) < 1e-14


def test_fusion_enlarges_linear_functions_exactly() -> None:
    """Corners stay corners: a ramp over 3x4 pixels becomes the ramp with the same corners over 7x10."""
    layer = MultiResolutionFusion((1, 1), 1, settings_of()).double()
    for convolution in layer.convs:
        nn.init.dirac_(convolution.weight)
        nn.init.zeros_(convolution.bias)

    def ramp(height: int, width: int) -> Tensor:
        i, j = (torch.linspace(0, 1, n, dtype=torch.float64) for n in (height, width))
        return (2 * i[:, None] - 3 * j[None, :] + 0.5)[None, None]

    y = layer((torch.zeros(1, 1, 7, 10, dtype=torch.float64), ramp(3, 4)), NOTHING)
    assert float((y - ramp(7, 10)).detach().abs().max()) < 1e-14


def test_output_is_divided_by_the_noise_level() -> None:
    """The network itself does not see it: F(x, c sigma) = F(x, sigma) / c, to the bit for a power of two."""
    x, noise = inputs("ncsnv2")
    model = build("ncsnv2")
    with torch.no_grad():
        assert torch.equal(model(x, 8 * noise), model(x, noise) / 8)
        plain = build("ncsnv2", scale_by_sigma=False)
        assert torch.equal(plain(x, noise), plain(x, 8 * noise))
        assert torch.equal(model(x, noise), plain(x, noise) / noise[:, None, None, None])


def test_index_of_the_noise_level() -> None:
    """Level i of n is sigma_max (sigma_min / sigma_max)^(i / (n - 1)); an index between two is rounded down."""
    levels = {"sigma_min": 0.1, "sigma_max": 10.0, "num_scales": 3}
    index, sigma = torch.tensor([0.0, 1.0, 2.9]), torch.tensor([10.0, 1.0, 0.1])
    x, _ = inputs("ncsnv2")
    by_index, by_sigma = build("ncsnv2", noise_label="index", **levels), build("ncsnv2", noise_label="sigma")
    assert (by_index.noise_label, by_sigma.noise_label, build("ncsn").noise_label) == ("index", "sigma", "index")
    assert distance(by_index(x, index), by_sigma(x, sigma)) < 1e-6


@pytest.mark.parametrize("name", ["ncsn", "ncsnv2"])
def test_centered(name: str) -> None:
    """Data in [0, 1] is shown to the network as 2x - 1."""
    x, noise = inputs(name)
    assert torch.equal(build(name, centered=False)(x, noise), build(name)(2 * x - 1, noise))


def test_levels_of_ncsn_know_nothing_of_each_other() -> None:
    """A level's output depends on its own rows alone; an index is rounded down."""
    x, _ = inputs("ncsn")
    model, index = build("ncsn", num_scales=4), torch.tensor([3.0, 1.0, 3.9])
    y = model(x, index)
    assert torch.equal(model(x, index.floor()), y)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight[[0, 1, 2]] += 1.0
    changed = model(x, index)
    assert torch.equal(changed[[0, 2]], y[[0, 2]])
    assert distance(changed[1], y[1]) > 0.01
    for outside in (1.0, -2.0):
        with pytest.raises(UserError, match="is not one of the 4 of the model: use parameterization=smld_chain"):
            model(x, index + outside)


@pytest.mark.parametrize("name", ["ncsn", "ncsnv2"])
def test_classes_choose_the_coefficients(name: str) -> None:
    """Changing the row of one class changes the output for this class alone."""
    x, noise = inputs(name)
    model, label = build(name, 3), torch.tensor([0, 2, 3])
    y = model(x, noise, label)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings == 4:
                module.weight[2] += 1.0
    changed = model(x, noise, label)
    assert torch.equal(changed[[0, 2]], y[[0, 2]])
    assert distance(changed[1], y[1]) > 0.01


def test_ncsn_starts_without_preferring_a_class() -> None:
    """Rows of classes start at zero: with the other weights equal, the output is that of a network without classes."""
    x, noise = inputs("ncsn")
    settings = {"channels": 8, "channel_multipliers": (1, 2), "dilations": (1, 1), "num_scales": 1300}
    plain, conditional = NCSN((3, 8, 8), **settings), NCSN((3, 8, 8), 3, **settings)
    nn.init.dirac_(plain.refinenet.output.weight)
    missing = conditional.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(".tables.1." in key for key in missing)
    assert torch.equal(conditional(x, noise, torch.tensor([0, 1, 3])), plain(x, noise))


@pytest.mark.parametrize("name", ["ncsn", "ncsnv2"])
def test_recomputing_changes_no_gradient(name: str) -> None:
    """To the bit, dropout included."""
    x, noise = inputs(name)
    gradients = []
    for again in (False, True):
        model = build(name, 3, recompute=again, dropout=0.3).train()
        torch.manual_seed(0)
        model(x, noise, torch.tensor([0, 1, 3])).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("cls", [NCSN, NCSNv2])
def test_dilations_see_far_and_keep_the_size(cls: type[nn.Module]) -> None:
    """Stages with dilation 1 after the first halve the picture, others keep its size; sides must allow it."""
    model = cls((3, 14, 6), channels=4, channel_multipliers=(1, 2, 1), dilations=(1, 1, 4)).double()
    sizes = []
    for stage in model.refinenet.stages:
        stage[1].register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    x = normal(2, 3, 14, 6)
    assert model(x, torch.tensor([0.0, 3.0])).shape == x.shape
    assert sizes == [(4, 14, 6), (8, 7, 3), (4, 7, 3)]
    message = (
        r"pictures of 14x6 cannot be halved 2 times: with model.dilations=\[1, 1, 1\] the sides must be multiples of 4"
    )
    with pytest.raises(UserError, match=message):
        cls((3, 14, 6), channel_multipliers=(1, 1, 1), dilations=(1, 1, 1))


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (NCSNv2, {"channels": 3}, "model.channels=3 is out of range"),
        (NCSNv2, {"channel_multipliers": [1, 2]}, r"=\[1, 2\] and model.dilations=\[1, 1, 2, 4\] must have one number"),
        (NCSNv2, {"channel_multipliers": [], "dilations": []}, "must have one number for each stage"),
        (NCSNv2, {"dilations": [1, 0, 2, 4]}, r"model.dilations\[1\]=0"),
        (NCSNv2, {"normalization": "instance+"}, "model.normalization='instance.' is not one of instance"),
        (NCSNv2, {"activation": "gelu"}, "model.activation='gelu'"),
        (NCSNv2, {"dropout": 1.0}, "model.dropout=1.0"),
        (NCSNv2, {"noise_label": "time"}, "model.noise_label='time' is not one of sigma, index"),
        (NCSNv2, {"sigma_min": 0.0}, "model.sigma_min=0.0"),
        (NCSNv2, {"sigma_max": 0.001}, "model.sigma_max=0.001 is out of range: it must be above 0.01"),
        (NCSNv2, {"num_scales": 1}, "model.num_scales=1"),
        (NCSNv2, {"scale_by_sigma": "yes"}, "model.scale_by_sigma='yes' must be true or false"),
        (NCSN, {"num_scales": 1}, "model.num_scales=1"),
        (NCSN, {"centered": 1}, "model.centered=1 must be true or false"),
        (NCSN, {"recompute": None}, "model.recompute=None must be true or false"),
    ],
)
def test_settings_out_of_range(cls: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cls((3, 32, 32), **settings)


def test_shapes_that_do_not_suit() -> None:
    for name, cls in (("ncsn", NCSN), ("ncsnv2", NCSNv2)):
        with pytest.raises(UserError, match=rf"model={name} works on examples of shape \(C, H, W\), not \(2,\)"):
            cls((2,))
        with pytest.raises(UserError, match="num_classes=-1"):
            cls((3, 8, 8), -1)
