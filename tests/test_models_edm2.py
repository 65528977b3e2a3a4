"""EDM2: magnitudes, the sphere of the weights, and the whole network against its equations (arXiv 2312.02696)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sde.denoiser import Denoiser
from sde.errors import UserError
from sde.models import EDM2
from sde.models.magnitude import (
    EPSILON,
    MPClassEmbedding,
    MPConv,
    MPFourier,
    MPLayer,
    MPLinear,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    normalize_weights,
)
from sde.parameterizations import PARAMETERIZATIONS
from sde.processes import SDES
from tests.small_models import SMALL, build, distance, inputs, lively

PUBLISHED_SIZES = {128: 125, 192: 280, 256: 498, 320: 777, 384: 1119, 448: 1523}  # channels: millions of parameters


def rms(x: Tensor, *dims: int) -> Tensor:
    """Root mean square over `dims`, or over everything."""
    return x.detach().double().square().mean(dims or None).sqrt()


def row_magnitudes(layer: MPLayer) -> Tensor:
    """The magnitude of each row of the weight: (out_features,)."""
    return rms(layer.weight.flatten(1), 1)


def layers_of(model: nn.Module) -> list[MPLayer]:
    return [module for module in model.modules() if isinstance(module, MPLayer)]


@pytest.fixture
def stretched() -> tuple[MPLinear, MPConv]:
    """Layers in float64 whose weights have left the sphere, each row by another factor."""
    torch.manual_seed(0)
    layers = MPLinear(7, 5).double(), MPConv(3, 4, 3).double()
    with torch.no_grad():
        for layer in layers:
            factors = torch.linspace(0.1, 30, len(layer.weight), dtype=torch.float64)
            layer.weight.mul_(factors.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    return layers


# ---------------------------------------------------------------------------------------------- magnitudes of layers


def test_effective_rows_have_unit_norm(stretched: tuple[MPLinear, MPConv]) -> None:
    """Read off from unit vectors and impulses; a unit row is what gives variance 1 for independent inputs."""
    linear, conv = stretched
    matrix = linear(torch.eye(7, dtype=torch.float64)).T
    expected = row_magnitudes(linear) / (row_magnitudes(linear) + EPSILON)
    assert torch.allclose(matrix.norm(dim=1), expected, rtol=1e-14, atol=0)
    impulses = torch.zeros(3, 3, 5, 5, dtype=torch.float64)
    for channel in range(3):
        impulses[channel, channel, 2, 2] = 1
    expected = row_magnitudes(conv) / (row_magnitudes(conv) + EPSILON)
    assert torch.allclose(conv(impulses).square().sum((0, 2, 3)).sqrt(), expected, rtol=1e-14, atol=0)


@torch.no_grad()
def test_layers_preserve_magnitude() -> None:
    """On N(0, 1). A mean of n squares of normal numbers has standard deviation sqrt(2 / n); 5 of them are allowed, with
    n the number of independent examples alone, and 2 EPSILON for the sphere."""
    torch.manual_seed(0)
    n = 2000
    tolerance = 5 * math.sqrt(2 / n) + 2 * EPSILON
    square = MPLinear(16, 8)(torch.randn(n, 16)).square().mean(0)
    assert float((square - 1).abs().max()) < tolerance
    pictures = torch.randn(n, 4, 3, 3)
    assert float((MPConv(4, 6, 3)(pictures)[:, :, 1, 1].square().mean(0) - 1).abs().max()) < tolerance
    assert float((MPConv(4, 6, 1)(pictures)[:, :, 0, 2].square().mean(0) - 1).abs().max()) < tolerance
    gain = torch.tensor(0.25)
    layer = MPLinear(16, 8)
    x = torch.randn(n, 16)
    assert distance(layer(x, gain), layer(x) / 4) < 1e-6


@torch.no_grad()
def test_fourier_features_preserve_magnitude() -> None:
    """2 cos^2 of a uniform phase has mean 1 and variance 1/2, whatever the noise label and the scale."""
    torch.manual_seed(0)
    n = 20_000
    for scale in (0.5, 4.0):
        features = MPFourier(n, scale)(torch.tensor([-1.7, 0.0, 1.3]))
        assert float((features.square().mean(1) - 1).abs().max()) < 5 * math.sqrt(0.5 / n)
        # E[2 cos(f c + p) cos(f d + p)] = exp(-(2 pi scale (c - d))^2 / 2) for normal f.
        c = torch.tensor([0.0, 0.1 / scale])
        one, two = MPFourier(n, scale)(c)
        assert abs(float((one * two).mean()) - math.exp(-((0.2 * math.pi) ** 2) / 2)) < 5 / math.sqrt(n)


def test_silu_preserves_magnitude() -> None:
    """By quadrature; the constant has three digits."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    square = torch.trapezoid(mp_silu(z) ** 2 * density, z)
    assert abs(float(square.sqrt()) - 1) < 0.0005 / 0.596
    assert distance(mp_silu(z), z * torch.sigmoid(z) / 0.596) < 1e-15


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_sum_and_concatenation_are_exact(t: float) -> None:
    """For orthogonal inputs of magnitude 1 the sum has magnitude 1, and the parts have the ratio 1 - t to t."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q * math.sqrt(12)
    a, b = basis[:4], basis[4:8]
    mixed = mp_sum(a, b, t)
    assert torch.allclose(rms(mixed, 1), torch.ones(4, dtype=torch.float64), rtol=1e-14)
    along_a, along_b = (mixed * a).mean(1), (mixed * b).mean(1)
    assert torch.allclose(along_a * t, along_b * (1 - t), atol=1e-14)

    narrow = F.normalize(torch.randn(4, 3, 2, dtype=torch.float64), dim=1) * math.sqrt(3)
    wide = F.normalize(torch.randn(4, 9, 2, dtype=torch.float64), dim=1) * math.sqrt(9)
    joined = mp_cat(narrow, wide, t)
    assert joined.shape == (4, 12, 2)
    assert torch.allclose(rms(joined, 1), torch.ones(4, 2, dtype=torch.float64), rtol=1e-14)
    norms = joined[:, :3].norm(dim=1), joined[:, 3:].norm(dim=1)
    assert torch.allclose(norms[0] * t, norms[1] * (1 - t), atol=1e-14)


def test_normalize() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 4, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)[:, None, None]
    r = rms(x, 1)
    assert torch.allclose(rms(normalize(x, (1,)), 1), r / (r + 1e-4), rtol=1e-13)
    assert torch.allclose(rms(normalize(x, (1, 2)), 1, 2), rms(x, 1, 2) / (rms(x, 1, 2) + 1e-4), rtol=1e-13)
    assert bool((normalize(torch.zeros(2, 3), (1,)) == 0).all())
    assert normalize(x.bfloat16(), (1,)).dtype == torch.bfloat16


def test_class_vectors_are_a_linear_layer_on_one_hot_vectors() -> None:
    torch.manual_seed(0)
    layer = MPClassEmbedding(4, 6).double()
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.5, 2, 6, dtype=torch.float64)[:, None])
    linear = MPLinear(5, 6).double()
    linear.load_state_dict(layer.state_dict())
    label = torch.tensor([3, 0, 4])
    expected = linear(F.one_hot(label, 5).double() * math.sqrt(5))
    assert distance(layer(label), expected) < 1e-15
    assert torch.equal(layer(None)[0], layer(label)[2])
    # Over the labels, every entry has magnitude 1: one-hot vectors lose none.
    r = row_magnitudes(layer)
    assert torch.allclose(rms(layer(torch.arange(5)), 0), r / (r + EPSILON), rtol=1e-14)


# ------------------------------------------------------------------------------------------- the sphere of the weights


def test_gradients_are_orthogonal_to_weights(stretched: tuple[MPLinear, MPConv]) -> None:
    """y is linear in w^ = w / (|w| + eps), so stretching w by s changes it by dy/ds = y eps / (|w| + eps) at s = 1.

    With the loss linear in y that is all that remains of w . grad; without eps it would be 0.
    """
    torch.manual_seed(1)
    for layer, shape in zip(stretched, ((6, 7), (6, 3, 5, 5)), strict=True):
        y = layer(torch.randn(shape, dtype=torch.float64))
        g = torch.randn_like(y)
        (y * g).sum().backward()
        assert layer.weight.grad is not None
        along = (layer.weight.detach() * layer.weight.grad).flatten(1).sum(1)
        r = row_magnitudes(layer)
        expected = (y.detach() * g).transpose(0, 1).flatten(1).sum(1) * EPSILON / (r + EPSILON)
        scale = layer.weight.detach().flatten(1).norm(dim=1) * layer.weight.grad.flatten(1).norm(dim=1)
        assert float(((along - expected) / scale).abs().max()) < 1e-14
        assert float((along[r > 1] / scale[r > 1]).abs().max()) < 10 * EPSILON


def test_forced_normalization_keeps_the_function(stretched: tuple[MPLinear, MPConv]) -> None:
    """It turns |w| = r into r / (r + eps), which changes the function by (r - 1) eps / r at most, and fixes 1 - eps."""
    x = torch.randn(6, 7, dtype=torch.float64)
    layer = stretched[0]
    r, before = row_magnitudes(layer), layer(x)
    layer.normalize_weight()
    assert torch.allclose(row_magnitudes(layer), r / (r + EPSILON), rtol=1e-14)
    change = (layer(x) / before - 1).abs()
    assert bool((change <= ((r - 1).abs() / r + EPSILON) * EPSILON + 1e-14).all())
    for _ in range(5):
        layer.normalize_weight()
    assert torch.allclose(row_magnitudes(layer), torch.full((5,), 1 - EPSILON, dtype=torch.float64), atol=1e-15)
    y, weight = layer(x), layer.weight.detach().clone()
    layer.normalize_weight()
    assert distance(layer.weight, weight) < 1e-15
    assert distance(layer(x), y) < 1e-15


def test_training_keeps_weights_on_the_sphere() -> None:
    """Every call in training normalizes what the optimizer left, to r / (r + eps) exactly, and only then computes."""
    model = build("edm2", 4).double().train()
    x, noise = inputs("edm2", dtype=torch.float64)
    label = torch.tensor([0, 3, 4])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(3):
        left = [row_magnitudes(layer) for layer in layers_of(model)]
        y = model(x, noise, label)
        for layer, r in zip(layers_of(model), left, strict=True):
            assert torch.allclose(row_magnitudes(layer), r / (r + EPSILON), rtol=1e-14)
        still = copy.deepcopy(model).eval()
        state = {key: value.clone() for key, value in still.state_dict().items()}
        assert torch.equal(still(x, noise, label), y)
        assert all(torch.equal(value, state[key]) for key, value in still.state_dict().items())
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
    left = [row_magnitudes(layer) for layer in layers_of(model)]
    assert max(float((r - 1).abs().max()) for r in left) > 0.01  # the optimizer does leave the sphere


def test_two_calls_before_one_backward_pass() -> None:
    """Normalizing again moves nothing, so the first graph stays valid: gradients are the sum of both."""
    model = build("edm2").double().train()
    normalize_weights(model)
    normalize_weights(model)
    x, noise = inputs("edm2", dtype=torch.float64)
    (model(x, noise).square().sum() + model(2 * x, noise).square().sum()).backward()
    together = [p.grad for p in model.parameters()]
    model.zero_grad()
    for factor in (1, 2):
        model(factor * x, noise).square().sum().backward()
    for one, p in zip(together, model.parameters(), strict=True):
        assert one is not None
        assert p.grad is not None
        assert distance(one, p.grad) < 1e-9


@pytest.mark.parametrize("levels", [1, 2])
def test_recomputing_gives_the_same_gradients(levels: int) -> None:
    """To the bit, dropout included."""
    x, noise = inputs("edm2")
    gradients = []
    for recompute_levels in (0, levels):
        model = build("edm2", recompute_levels=recompute_levels, dropout=0.3).train()
        torch.manual_seed(3)
        model(x, noise).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]


def test_training_compiles() -> None:
    """Weights after two steps are those of plain PyTorch: normalization stays out of the graph, of which it makes two.

    What computes is one graph in training as well.
    """
    model = lively(EDM2((1, 4, 4), 4, **SMALL["edm2"] | {"channel_multipliers": [1]})).train()
    other = copy.deepcopy(model)
    other.compile(backend="eager")
    x, noise, label = torch.randn(3, 1, 4, 4), torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0, 1, 4])
    for network in (model, other):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(2):
            network(x, noise, label).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert distance(q, p) < 1e-6
    normalize_weights(model)
    compiled = torch.compile(model.evaluate, backend="eager", fullgraph=True)
    assert distance(compiled(x, noise, label), model(x, noise, label)) < 1e-6


# --------------------------------------------------------------------------------- the network against its equations


class Equations:
    """The network of figure 21 in float64, from the authors' names of its weights, with nothing taken from the package.

    Sides need not be even: the mean of the pixels there are equals that of 2x2 pixels of the picture continued by its
    last row and column.
    """

    def __init__(self, weights: Mapping[str, Tensor], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        self.weights = weights
        self.settings = {
            "residual_balance": 0.3,
            "attention_balance": 0.3,
            "label_balance": 0.5,
            "concat_balance": 0.5,
            "clip": 256.0,
        } | dict(settings)
        self.sides = [math.ceil(max(shape[1:]) / 2**i) for i in range(len(settings["channel_multipliers"]))]

    def unit(self, v: Tensor, dim: int | tuple[int, ...], count: int) -> Tensor:
        return v / (1e-4 + (v**2).sum(dim, keepdim=True).sqrt() / count**0.5)

    def apply(self, name: str, x: Tensor) -> Tensor:
        w = self.weights[f"{name}.weight"]
        fan = w[0].numel()
        w = self.unit(w.reshape(len(w), fan), 1, fan).reshape(w.shape) / fan**0.5
        if w.ndim == 2:
            return torch.einsum("oi,bi->bo", w, x)
        return F.conv2d(x, w, padding=w.shape[-1] // 2)

    @staticmethod
    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x)) / 0.596

    @staticmethod
    def mix(a: Tensor, b: Tensor, t: float) -> Tensor:
        return ((1 - t) * a + t * b) / (t**2 + (1 - t) ** 2) ** 0.5

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        t, n, m = self.settings["concat_balance"], a.shape[1], b.shape[1]
        c = ((n + m) / ((1 - t) ** 2 + t**2)) ** 0.5
        return torch.cat([(1 - t) / n**0.5 * c * a, t / m**0.5 * c * b], 1)

    def attention(self, name: str, x: Tensor) -> Tensor:
        size = self.settings["head_channels"]
        qkv = self.apply(f"{name}.attn_qkv", x).flatten(2)
        qkv = qkv.reshape(len(x), x.shape[1] // size, size, 3, -1)
        q, k, v = (self.unit(qkv[:, :, :, i], 2, size) for i in range(3))
        weights = torch.softmax(torch.einsum("nhcq,nhck->nhqk", q, k) / size**0.5, 3)
        y = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape)
        return self.apply(f"{name}.attn_proj", y)

    def block(self, name: str, x: Tensor, emb: Tensor, attention: bool = False) -> Tensor:
        encoder, has_skip = name.startswith("enc"), f"{name}.conv_skip.weight" in self.weights
        assert (f"{name}.attn_qkv.weight" in self.weights) == attention, name
        if encoder:
            x = self.apply(f"{name}.conv_skip", x) if has_skip else x
            x = self.unit(x, 1, x.shape[1])
        c = self.weights[f"{name}.emb_gain"] * self.apply(f"{name}.emb_linear", emb) + 1
        y = self.apply(f"{name}.conv_res0", self.silu(x)) * c[:, :, None, None]
        y = self.apply(f"{name}.conv_res1", self.silu(y))
        if has_skip and not encoder:
            x = self.apply(f"{name}.conv_skip", x)
        x = self.mix(x, y, self.settings["residual_balance"])
        if attention:
            x = self.mix(x, self.attention(name, x), self.settings["attention_balance"])
        clip = self.settings["clip"]
        return x if clip is None else torch.where(x.abs() > clip, clip * torch.sign(x), x)

    def halve(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
        return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4

    def embed(self, c_noise: Tensor, label: Tensor | None) -> Tensor:
        phase = torch.outer(c_noise, self.weights["emb_fourier.freqs"]) + self.weights["emb_fourier.phases"]
        emb = self.apply("emb_noise", 2**0.5 * torch.cos(phase))
        if label is not None:
            classes = self.weights["emb_label.weight"].shape[1]
            one_hot = (label[:, None] == torch.arange(classes)).double()
            emb = self.mix(emb, self.apply("emb_label", one_hot * classes**0.5), self.settings["label_balance"])
        return self.silu(emb)

    def __call__(self, x: Tensor, c_noise: Tensor, label: Tensor | None) -> Tensor:
        emb, count = self.embed(c_noise, label), self.settings["blocks_per_level"]
        x = self.apply(f"enc.{self.sides[0]}x{self.sides[0]}_conv", F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0))
        skips = [x]
        for i, side in enumerate(self.sides):
            if i > 0:
                x = self.block(f"enc.{side}x{side}_down", self.halve(x), emb)
                skips.append(x)
            for j in range(count):
                attends = side in self.settings["attention_resolutions"]
                x = self.block(f"enc.{side}x{side}_block{j}", x, emb, attends)
                skips.append(x)
        x = self.block(f"dec.{side}x{side}_in0", x, emb, True)
        x = self.block(f"dec.{side}x{side}_in1", x, emb)
        for i, side in reversed(list(enumerate(self.sides))):
            if i < len(self.sides) - 1:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.block(f"dec.{side}x{side}_up", x[:, :, : skips[-1].shape[2], : skips[-1].shape[3]], emb)
            for j in range(count + 1):
                attends = side in self.settings["attention_resolutions"]
                x = self.block(f"dec.{side}x{side}_block{j}", self.join(x, skips.pop()), emb, attends)
        assert not skips
        return self.weights["out_gain"] * self.apply("out_conv", x)


NETWORKS: list[tuple[tuple[int, ...], int, dict[str, Any]]] = [
    ((3, 8, 8), 5, {"channel_multipliers": [1, 2, 3], "blocks_per_level": 2}),
    ((2, 8, 12), 0, {"channel_multipliers": [2, 1], "attention_resolutions": [12, 6], "head_channels": 8}),
    (
        (1, 10, 7),
        3,
        {"channel_multipliers": [1, 1, 2], "attention_resolutions": [5], "clip": 0.7}
        | {"residual_balance": 0.6, "attention_balance": 0.1, "label_balance": 0.8, "concat_balance": 0.2},
    ),
    ((2, 4, 4), 2, {"channel_multipliers": [1], "attention_resolutions": [], "clip": None, "fourier_scale": 3.0}),
]


@pytest.mark.parametrize(("shape", "num_classes", "settings"), NETWORKS)
def test_the_network_is_its_equations(shape: tuple[int, ...], num_classes: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    chosen = SMALL["edm2"] | settings
    model = lively(EDM2(shape, num_classes, **chosen)).double().eval()
    names = model.published_names()
    assert len(set(names.values())) == len(names) == len(model.state_dict())
    equations = Equations({names[key]: value for key, value in model.state_dict().items()}, chosen, shape)
    x = 2 * torch.randn(3, *shape, dtype=torch.float64)
    noise = torch.tensor([-1.5, 0.1, 1.2], dtype=torch.float64)
    label = torch.tensor([num_classes, 0, num_classes - 1]) if num_classes else None
    with torch.no_grad():
        y = model(x, noise, label)
        assert distance(y, equations(x, noise, label)) < 1e-12
        if label is not None:
            nobody = torch.full((3,), num_classes)
            assert distance(model(x, noise), equations(x, noise, nobody)) < 1e-12
        if settings.get("clip") == 0.7:
            unclipped = lively(EDM2(shape, num_classes, **chosen | {"clip": None})).double().eval()
            unclipped.load_state_dict(model.state_dict())
            assert distance(unclipped(x, noise, label), y) > 1e-3


def test_published_sizes() -> None:
    """Within the rounding of the published millions, the vector of "no label" apart, which they do not have."""
    settings = {"channel_multipliers": [1, 2, 3, 4], "blocks_per_level": 3, "attention_resolutions": [16, 8]}
    for channels, millions in PUBLISHED_SIZES.items():
        with torch.device("meta"):
            model = EDM2((4, 64, 64), 1000, channels=channels, **settings)
        count = sum(p.numel() for p in model.parameters()) - 4 * channels
        assert abs(count - 1e6 * millions) <= 0.5e6


def test_published_names_of_the_original_resolutions() -> None:
    """Spot checks of names as they stand in the authors' checkpoints for 64x64."""
    settings = {"head_channels": 4, "channel_multipliers": [1, 2, 3, 4], "blocks_per_level": 3}
    with torch.device("meta"):
        model = EDM2((4, 64, 64), 10, channels=4, attention_resolutions=[16, 8], **settings)
    shapes = {theirs: tuple(model.state_dict()[ours].shape) for ours, theirs in model.published_names().items()}
    assert shapes["enc.64x64_conv.weight"] == (4, 5, 3, 3)
    assert shapes["enc.32x32_down.conv_res0.weight"] == (4, 4, 3, 3)
    assert shapes["enc.32x32_block0.conv_skip.weight"] == (8, 4, 1, 1)
    assert shapes["enc.16x16_block2.attn_qkv.weight"] == (36, 12, 1, 1)
    assert shapes["dec.8x8_in0.attn_proj.weight"] == (16, 16, 1, 1)
    assert shapes["dec.8x8_block3.conv_res0.weight"] == (16, 16 + 12, 3, 3)
    assert shapes["dec.64x64_block0.conv_skip.weight"] == (4, 8 + 4, 1, 1)
    assert shapes["dec.64x64_up.emb_linear.weight"] == (8, 16)
    assert shapes["emb_noise.weight"] == (16, 4)
    assert shapes["emb_label.weight"] == (16, 11)
    assert "dec.8x8_in1.attn_qkv.weight" not in shapes
    assert "enc.32x32_block0.attn_qkv.weight" not in shapes


def test_a_column_for_no_label_changes_no_other() -> None:
    """What `published_names` says: filled with the magnitude of its row, it leaves magnitudes as they are."""
    torch.manual_seed(0)
    theirs = torch.rand(6, 4, dtype=torch.float64)
    magnitudes = rms(theirs, 1)[:, None]
    layer = MPClassEmbedding(4, 6).double()
    layer.load_state_dict({"weight": torch.cat((theirs, magnitudes), 1)})
    assert distance(layer(torch.arange(4)), (theirs / (magnitudes + 1e-4)).T) < 1e-15


# ------------------------------------------------------------------------------------------------ use and settings


@pytest.mark.parametrize("name", sorted(name for name in PARAMETERIZATIONS if "chain" not in name))
def test_any_parameterization_on_any_sde(name: str) -> None:
    """It is told log(sigma / alpha) / 4 whatever it predicts, and a fresh one denoises to c_skip x."""
    parameterization = PARAMETERIZATIONS.get(name)()
    model = EDM2((1, 4, 4), **SMALL["edm2"]).double().eval()
    told: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, args: told.append(args[1]))
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    for kind in SDES:
        sde = SDES.get(kind)()
        low, high = sde.t_min, sde.T
        t = torch.tensor([low + 0.1 * (high - low), low + 0.8 * (high - low)], dtype=torch.float64)
        denoised = Denoiser(model, sde, parameterization).denoised(x, t)
        expected = (sde.sigma(t) / sde.alpha(t)).log() / 4
        assert torch.allclose(told[-1], expected, atol=1e-10), kind
        c_skip = parameterization.coefficients(sde, t).c_skip
        assert torch.allclose(denoised, c_skip[:, None, None, None] * x, rtol=1e-12, atol=1e-12), kind


def test_half_precision_with_classes() -> None:
    """Under autocast and entirely in bfloat16, to its 8 bits."""
    model = build("edm2", 4).eval()
    x, noise = inputs("edm2")
    label = torch.tensor([0, 3, 4])
    with torch.no_grad():
        y = model(x, noise, label)
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(model(x, noise, label), y) < 0.1
        half = model.bfloat16().train()(x.bfloat16(), noise.bfloat16(), label)
    assert half.dtype == torch.bfloat16
    assert distance(half, y) < 0.1


def test_it_learns_a_mixture_of_two_pictures() -> None:
    """Denoising +-p for a picture p of magnitude 1 over n pixels: E[x0 | x] = p tanh(x . p / sigma^2)."""
    torch.manual_seed(0)
    p = torch.tensor([1.0, -1.0]).repeat(8).reshape(1, 4, 4)
    model = EDM2((1, 4, 4), **SMALL["edm2"] | {"channel_multipliers": [1], "attention_resolutions": []})
    optimizer = torch.optim.Adam(model.parameters(), 0.02, betas=(0.9, 0.99))

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sigma = torch.exp(torch.empty(count).uniform_(0, 2.5))
        x0 = torch.where(torch.rand(count) < 0.5, 1.0, -1.0)[:, None, None, None] * p
        x = x0 + sigma[:, None, None, None] * torch.randn(count, 1, 4, 4)
        return x0, x, sigma, x / (1 + sigma**2).sqrt()[:, None, None, None]

    for _ in range(100):
        x0, _, sigma, scaled = draw(64)
        optimizer.zero_grad()
        (model(scaled, sigma.log() / 4) - x0).square().mean().backward()
        optimizer.step()
    model.eval()
    _, x, sigma, scaled = draw(1000)
    exact = torch.tanh((x * p).sum((1, 2, 3)) / sigma**2)[:, None, None, None] * p
    with torch.no_grad():
        error = (model(scaled, sigma.log() / 4) - exact).square().mean()
    assert float(error) < 0.1 * float(exact.square().mean())
    assert all(float((row_magnitudes(layer) - 1).abs().max()) < 0.2 for layer in layers_of(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "model.channels=0"),
        ({"channel_multipliers": []}, "model.channel_multipliers is empty: give one factor"),
        ({"channel_multipliers": [1, 0]}, r"model.channel_multipliers\[1\]=0"),
        ({"blocks_per_level": 0}, "model.blocks_per_level=0"),
        ({"head_channels": 0}, "model.head_channels=0"),
        ({"channels": 10}, "model.head_channels=4 do not divide the 10 channels of a level with attention: choose"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"residual_balance": 1.5}, "model.residual_balance=1.5"),
        ({"attention_balance": -0.1}, "model.attention_balance=-0.1"),
        ({"label_balance": 2}, "model.label_balance=2"),
        ({"concat_balance": 2}, "model.concat_balance=2"),
        ({"fourier_scale": 0}, "model.fourier_scale=0"),
        ({"clip": 0}, "model.clip=0"),
        ({"recompute_levels": -1}, "model.recompute_levels=-1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EDM2((3, 4, 4), **SMALL["edm2"] | {"channel_multipliers": [1]} | settings)


def test_shapes_that_do_not_suit() -> None:
    with pytest.raises(UserError, match=r"model=edm2 works on examples of shape \(C, H, W\), not \(2,\)"):
        EDM2((2,))
