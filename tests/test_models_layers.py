"""The layers of the U-Nets against literal formulations, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.original import attention, fir_conv_down, fir_conv_up, fir_down, fir_up
from sde.errors import UserError
from sde.models.embeddings import ConditionEmbedding, FourierFeatures, NoiseScales, SinusoidalFeatures
from sde.models.layers import ACTIVATIONS, BlockSettings, ResidualBlock, SelfAttention, conv, group_norm, initialize
from sde.models.resample import FIRConvDownsample, FIRConvUpsample, check_fir_kernel, downsample, upsample

KERNELS = ([1, 3, 3, 1], [1, 1], [1, 2, 1], [1, 4, 6, 4, 1], [1, 2, 3, 5, 4, 1])
EXACT = {"rtol": 0, "atol": 1e-13}


def pictures(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("size", [(6, 4), (2, 2)], ids=str)
def test_fir_resampling(kernel: list[float], size: tuple[int, int]) -> None:
    """Strided depthwise convolutions against inserted zeros, padding and a convolution, with their gradients."""
    for make, literal in ((downsample, fir_down), (upsample, fir_up)):
        module = make(3, with_conv=False, fir_kernel=kernel).double()
        x, y = (pictures(2, 3, *size).requires_grad_() for _ in range(2))
        ours, theirs = module(x), literal(y, kernel)
        torch.testing.assert_close(ours, theirs, **EXACT)
        weight = pictures(*ours.shape)
        (ours * weight).sum().backward()
        (theirs * weight).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, **EXACT)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_fir_resampling_with_a_convolution(kernel: list[float]) -> None:
    x, weight, bias = pictures(2, 3, 6, 4), pictures(5, 3, 3, 3), pictures(5)
    down, up = FIRConvDownsample(3, 5, kernel).double(), FIRConvUpsample(3, 5, kernel).double()
    with torch.no_grad():
        down.conv.weight.copy_(weight)
        down.conv.bias.copy_(bias)
        up.conv.weight.copy_(weight.flip(2, 3).transpose(0, 1))
        up.bias.copy_(bias)
        shift = bias[:, None, None]
        torch.testing.assert_close(down(x), fir_conv_down(x, weight, kernel) + shift, **EXACT)
        torch.testing.assert_close(up(x), fir_conv_up(x, weight, kernel) + shift, **EXACT)


def test_fir_filters_keep_constants_and_the_box_is_the_plain_kind() -> None:
    """Inside the border a constant stays; the kernel [1, 1] averages on the way down and repeats on the way up."""
    ones = torch.ones(1, 2, 8, 8, dtype=torch.float64)
    for make in (downsample, upsample):
        y = make(2, with_conv=False, fir_kernel=[1, 3, 3, 1]).double()(ones)
        torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.ones_like(y[:, :, 2:-2, 2:-2]), **EXACT)
        x = pictures(2, 3, 8, 4)
        box, plain = (make(3, with_conv=False, fir_kernel=k).double()(x) for k in ([1, 1], None))
        torch.testing.assert_close(box, plain, **EXACT)


def test_plain_resampling() -> None:
    x = pictures(2, 3, 6, 4)
    mean = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(downsample(3, with_conv=False, fir_kernel=None)(x), mean, **EXACT)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(upsample(3, with_conv=False, fir_kernel=None)(x), repeated, **EXACT)
    down = downsample(3, 5, with_conv=True, fir_kernel=None).double()
    up = upsample(3, 5, with_conv=True, fir_kernel=None).double()
    with torch.no_grad():
        strided = F.conv2d(F.pad(x, (1, 1, 1, 1)), down.conv.weight, down.conv.bias)[..., 1::2, 1::2]
        torch.testing.assert_close(down(x), strided, **EXACT)
        torch.testing.assert_close(up(x), F.conv2d(repeated, up.conv.weight, up.conv.bias, padding=1), **EXACT)


def test_fir_kernels_that_are_no_filters() -> None:
    for kernel in ([1], [1, -1], [], [1, math.nan], [1, math.inf]):
        with pytest.raises(UserError, match=r"model\.fir_kernel"):
            check_fir_kernel(kernel)


def settings(**changes: Any) -> BlockSettings:
    """Plain blocks, with `changes`."""
    plain = {
        "activation": nn.SiLU(), "groups": "quarter", "norm_eps": 1e-6, "dropout": 0.0, "init_scale": 1.0,
        "shortcut_scale": 1.0, "skip_rescale": False, "embedding_size": None, "adaptive_norm": False,
        "project_resampled": True, "head_channels": None,
    }  # fmt: skip
    return BlockSettings(**plain | changes)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention(rescale: bool, memory_format: torch.memory_format) -> None:
    """The fused attention against an einsum over pixels."""
    block = SelfAttention(8, settings(skip_rescale=rescale)).double()
    x = pictures(2, 8, 3, 5).contiguous(memory_format=memory_format)
    with torch.no_grad():
        q, k, v = block.query_key_value(F.group_norm(x, 2, eps=1e-6)).chunk(3, 1)
        weight, bias = block.output.weight[:, :, 0, 0], block.output.bias
        h = torch.einsum("oi,bihw->bohw", weight, attention(q, k, v)) + bias[:, None, None]
        torch.testing.assert_close(block(x), (x + h) / (math.sqrt(2) if rescale else 1), **EXACT)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_with_heads(memory_format: torch.memory_format) -> None:
    """Heads are consecutive channels: each is the attention of one head over its own."""
    block = SelfAttention(12, settings(head_channels=4)).double()
    x = pictures(2, 12, 3, 5).contiguous(memory_format=memory_format)
    with torch.no_grad():
        q, k, v = (y.chunk(3, 1) for y in block.query_key_value(F.group_norm(x, 3, eps=1e-6)).chunk(3, 1))
        h = torch.cat([attention(*head) for head in zip(q, k, v, strict=True)], 1)
        torch.testing.assert_close(block(x), x + block.output(h), **EXACT)
    with pytest.raises(UserError, match=r"model.head_channels=5 does not divide 12 channels"):
        SelfAttention(12, settings(head_channels=5))


def test_residual_block_adds_the_embedding_before_its_second_normalization() -> None:
    block = ResidualBlock(8, 12, settings(embedding_size=5)).double()
    x, e = pictures(2, 8, 4, 4), pictures(2, 5)
    with torch.no_grad():
        h = F.conv2d(F.silu(F.group_norm(x, 2, eps=1e-6)), block.conv_1.weight, padding=1)
        h = F.silu(F.group_norm(h + (e @ block.condition.weight.T)[:, :, None, None], 3, eps=1e-6))
        h = F.conv2d(h, block.conv_2.weight, padding=1) + F.conv2d(x, block.shortcut.weight)
        torch.testing.assert_close(block(x, e), h, **EXACT)


def test_adaptive_normalization_scales_and_shifts_after_it() -> None:
    block = ResidualBlock(8, 12, settings(embedding_size=5, adaptive_norm=True, norm_eps=0.1)).double()
    x, e = pictures(2, 8, 4, 4), pictures(2, 5)
    with torch.no_grad():
        scale, shift = (e @ block.condition.weight.T)[:, :, None, None].chunk(2, 1)
        h = F.conv2d(F.silu(F.group_norm(x, 2, eps=0.1)), block.conv_1.weight, padding=1)
        h = F.silu(F.group_norm(h, 3, eps=0.1) * (1 + scale) + shift)
        h = F.conv2d(h, block.conv_2.weight, padding=1) + F.conv2d(x, block.shortcut.weight)
        torch.testing.assert_close(block(x, e), h, **EXACT)


def test_shortcut_of_a_block_that_resamples() -> None:
    """Projected in NCSN++, the resampled picture itself in ADM."""
    x = pictures(2, 8, 4, 4)
    for projected in (True, False):
        block = ResidualBlock(8, 8, settings(project_resampled=projected), nn.AvgPool2d(2)).double()
        nn.init.zeros_(block.conv_2.weight)
        shortcut = block.shortcut if projected else nn.Identity()
        with torch.no_grad():
            torch.testing.assert_close(block(x, None), shortcut(F.avg_pool2d(x, 2)), **EXACT)


def test_initialization() -> None:
    """Uniform with variance scale / mean of fan-in and fan-out; a scale of 0 means 1e-10."""
    torch.manual_seed(0)
    for weight, fan in ((torch.empty(300, 100), 200), (torch.empty(60, 40, 3, 3), 450)):
        for scale in (1.0, 0.1, 0.0):
            initialize(weight, scale)
            variance = (scale or 1e-10) / fan
            # the variance of n uniform draws has a relative standard deviation of sqrt(0.8 / n)
            assert float(weight.var()) == pytest.approx(variance, rel=5 * math.sqrt(0.8 / weight.numel()))
            assert float(weight.abs().max()) <= math.sqrt(3 * variance) * (1 + 1e-6)
    assert not conv(3, 5).bias.any()
    block = SelfAttention(32, settings(init_scale=0.0))
    assert float(block.query_key_value.weight.abs().max()) == pytest.approx(math.sqrt(0.3 / 32), rel=0.01)


@pytest.mark.parametrize(
    ("channels", "rule", "groups"),
    [
        (4, "quarter", 1), (64, "quarter", 16), (128, "quarter", 32), (384, "quarter", 32), (24, "quarter", 6),
        (10, "quarter", 2), (14, "quarter", 2), (136, "quarter", 17),
        (32, "thirty_two", 32), (128, "thirty_two", 32), (16, "thirty_two", 4),
        (48, "thirty_two", 12), (36, "thirty_two", 9), (7, "thirty_two", 1), (136, "thirty_two", 17),
    ],
)  # fmt: skip
def test_group_norm(channels: int, rule: str, groups: int) -> None:
    norm = group_norm(channels, rule)
    assert norm.num_groups == groups
    assert norm.eps == 1e-6


@pytest.mark.parametrize("rule", ["quarter", "thirty_two"])
def test_group_norm_of_too_few_channels(rule: str) -> None:
    with pytest.raises(UserError, match=r"layer of 3 channels .* make model.channels at least 4"):
        group_norm(3, rule)


def test_sinusoidal_features() -> None:
    """Sines, then cosines, of frequencies from 1 to 1e-4, the last included; an odd size ends in a zero."""
    t = torch.tensor([0.0, 1.0, 321.5, 999.0], dtype=torch.float64)
    frequencies = 10_000 ** -np.linspace(0, 1, 4)
    phase = t.numpy()[:, None] * frequencies
    expected = torch.from_numpy(np.concatenate((np.sin(phase), np.cos(phase)), 1))
    # frequencies are float32 constants, so that a phase is right to 999 * 2^-24
    torch.testing.assert_close(SinusoidalFeatures(8)(t), expected, rtol=0, atol=1e-4)
    odd = SinusoidalFeatures(9)(t)
    torch.testing.assert_close(odd[:, :8], expected, rtol=0, atol=1e-4)
    assert not odd[:, 8].any()
    assert SinusoidalFeatures(8)(t.bfloat16()).dtype == torch.float32


def test_fourier_features() -> None:
    torch.manual_seed(0)
    features = FourierFeatures(20_000, 16.0)
    assert float(features.frequencies.std()) == pytest.approx(16, rel=0.03)
    assert not list(features.parameters())
    c = torch.tensor([0.3, -2.0], dtype=torch.float64)
    phase = 2 * math.pi * c[:, None] * features.double().frequencies
    torch.testing.assert_close(features(c), torch.cat((phase.sin(), phase.cos()), 1), rtol=0, atol=1e-11)


def test_no_label_is_the_last_class() -> None:
    embedding = ConditionEmbedding(SinusoidalFeatures(8), 16, 3, nn.SiLU())
    noise = torch.tensor([1.0, 500.0])
    assert torch.equal(embedding(noise, None), embedding(noise, torch.tensor([3, 3])))
    assert not torch.equal(embedding(noise, None), embedding(noise, torch.tensor([3, 0])))
    classes_only = ConditionEmbedding(None, 16, 3, nn.SiLU())
    assert classes_only(noise, None).shape == (2, 16)
    assert ConditionEmbedding(None, 16, 0, nn.SiLU())(noise, None) is None
    with pytest.raises(UserError, match="without classes"):
        ConditionEmbedding(SinusoidalFeatures(8), 16, 0, nn.SiLU())(noise, torch.tensor([0, 0]))


def test_noise_scales() -> None:
    """A geometric sequence from the highest to the lowest level; fractions of an index are dropped."""
    scales = NoiseScales(0.01, 50.0, 1000)
    expected = torch.from_numpy(np.geomspace(50.0, 0.01, 1000))
    index = torch.arange(1000)
    torch.testing.assert_close(scales.sigma(index.double()), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(scales.sigma(index.double() + 0.9), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(scales.sigma(index), expected.float(), rtol=2e-6, atol=0)  # 8.5 * 2^-24, the exponent's


def test_activations() -> None:
    x = torch.tensor([-2.0, 0.5])
    values = {"swish": x * x.sigmoid(), "relu": x.relu(), "elu": F.elu(x), "lrelu": torch.tensor([-0.4, 0.5])}
    assert values.keys() == ACTIVATIONS.keys()
    for name, expected in values.items():
        torch.testing.assert_close(ACTIVATIONS[name]()(x), expected)
