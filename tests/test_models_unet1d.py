"""The U-Net for sequences against an independent computation, and its symmetries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sde.errors import UserError
from sde.models.unet1d import AverageDown, AverageUp, ConvDown, ConvUp, SelfAttention1d, UNet1d
from tests.commands import command
from tests.small_models import distance, lively

SHAPE = (2, 24)
SMALL: dict[str, Any] = {"channels": 8, "channel_multipliers": [1, 2, 3], "blocks_per_level": 1, "heads": 2}


def small(num_classes: int = 0, shape: tuple[int, ...] = SHAPE, **settings: Any) -> UNet1d:
    """A small network with weights of natural size, in float64."""
    torch.manual_seed(0)
    model = lively(UNet1d(shape, num_classes, **SMALL | settings)).double().eval()
    assert isinstance(model, UNet1d)
    return model


def batch(shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences, noise labels and class labels (the last one "no label" of four classes)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((3, *shape), generator=generator, dtype=torch.float64)
    return x, torch.tensor([-1.5, 0.2, 1.2], dtype=torch.float64), torch.tensor([0, 2, 4])


class Literal:
    """The network from its weights alone: sums over taps, explicit indices, elementary functions."""

    def __init__(self, model: UNet1d, *, circular: bool, average: bool) -> None:
        self.weights = dict(model.named_parameters())
        self.frequencies = dict(model.named_buffers())["embedding.features.frequencies"]
        self.circular, self.average = circular, average
        self.embedding = torch.zeros(0)

    def at(self, x: Tensor, index: int) -> Tensor:
        """x[:, :, index], beyond the ends too."""
        length = x.shape[2]
        if 0 <= index < length or self.circular:
            return x[:, :, index % length]
        return torch.zeros_like(x[:, :, 0])

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        w, b = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        before = (w.shape[2] - 1) // 2
        columns = [
            sum(self.at(x, i + k - before) @ w[:, :, k].T for k in range(w.shape[2])) + b
            for i in range(0, x.shape[2], stride)
        ]
        return torch.stack(columns, 2)

    def down(self, name: str, x: Tensor) -> Tensor:
        if not self.average:
            return self.conv(name, x, 2)
        taps = (1 / 8, 3 / 8, 3 / 8, 1 / 8)
        return torch.stack(
            [sum(t * self.at(x, i + k - 1) for k, t in enumerate(taps)) for i in range(0, x.shape[2], 2)], 2
        )

    def up(self, name: str, x: Tensor) -> Tensor:
        """Entry i lies between the new entries 2i and 2i + 1, and reaches from 2i - 1 to 2i + 2."""
        columns = []
        for j in range(2 * x.shape[2]):
            near, far = j // 2, j // 2 + (1 if j % 2 else -1)
            if self.average:
                columns.append(0.75 * self.at(x, near) + 0.25 * self.at(x, far))
            else:
                w = self.weights[f"{name}.weight"]
                reached = sum(self.at(x, i) @ w[:, :, j + 1 - 2 * i] for i in (near, far))
                columns.append(reached + self.weights[f"{name}.bias"])
        return torch.stack(columns, 2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return torch.einsum("oi,...i->...o", self.weights[f"{name}.weight"], x) + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Groups of four channels: no layer here has as many as 33 groups would need."""
        grouped = x.reshape(x.shape[0], x.shape[1] // 4, -1)
        grouped = grouped - grouped.mean(2, keepdim=True)
        grouped = grouped / torch.sqrt((grouped**2).mean(2, keepdim=True) + 1e-6)
        return (
            grouped.reshape(x.shape) * self.weights[f"{name}.weight"][:, None] + self.weights[f"{name}.bias"][:, None]
        )

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm_2", self.conv(f"{name}.conv_1", silu(self.norm(f"{name}.norm_1", x))))
        scale, shift = self.linear(f"{name}.condition", self.embedding)[:, :, None].split(h.shape[1], 1)
        h = self.conv(f"{name}.conv_2", silu(h * (1 + scale) + shift))
        return h + (self.conv(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in self.weights else x)

    def attention(self, name: str, x: Tensor, heads: int) -> Tensor:
        if f"{name}.norm.weight" not in self.weights:
            return x
        batch, channels, length = x.shape
        qkv = self.linear(f"{name}.query_key_value", self.norm(f"{name}.norm", x).transpose(1, 2))
        q, k, v = qkv.reshape(batch, length, 3, heads, channels // heads).unbind(2)
        weights = torch.exp(torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(channels / heads))
        mixed = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)
        return x + self.linear(f"{name}.output", mixed.reshape(batch, length, channels)).transpose(1, 2)

    def layer(self, name: str, index: int, x: Tensor) -> Tensor:
        return self.attention(f"{name}.attentions.{index}", self.block(f"{name}.blocks.{index}", x), 2)

    def __call__(self, x: Tensor, noise: Tensor, label: Tensor | None) -> Tensor:
        phase = 2 * math.pi * noise[:, None] * self.frequencies
        e = self.linear("embedding.linear_1", torch.cat([phase.sin(), phase.cos()], 1))
        e = self.linear("embedding.linear_2", silu(e))
        table = self.weights.get("embedding.classes.vectors.weight")
        if table is not None:
            e = e + table[[-1] * len(x) if label is None else label]
        self.embedding = silu(e)
        a = self.conv("input", x)
        b = self.layer("down.0", 0, a)
        c = self.down("down.0.down", b)
        d = self.layer("down.1", 0, c)
        e = self.down("down.1.down", d)
        f = self.layer("down.2", 0, e)
        h = self.block("middle.block_1", f)
        h = self.block("middle.block_2", self.attention("middle.attention", h, 2))
        for i, skips in enumerate(((f, e), (d, c), (b, a))):
            for k, skip in enumerate(skips):
                h = self.layer(f"up.{i}", k, torch.cat([h, skip], 1))
            h = self.up(f"up.{i}.up", h) if i < 2 else h
        return self.conv("output.2", silu(self.norm("output.0", h)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("resample", ["conv", "average"])
@pytest.mark.parametrize(("num_classes", "kernel_size", "attention_lengths"), [(0, 5, []), (4, 3, [12, 6])])
def test_it_is_what_the_formulas_say(
    padding_mode: str, resample: str, num_classes: int, kernel_size: int, attention_lengths: list[int]
) -> None:
    settings = {"padding_mode": padding_mode, "resample": resample, "kernel_size": kernel_size}
    model = small(num_classes, attention_lengths=attention_lengths, **settings)
    x, noise, label = batch()
    literal = Literal(model, circular=padding_mode == "circular", average=resample == "average")
    for given in (None, label) if num_classes else (None,):
        with torch.no_grad():
            assert distance(model(x, noise, given), literal(x, noise, given)) < 1e-12


@pytest.mark.parametrize("resample", ["conv", "average"])
@pytest.mark.parametrize("attention_lengths", [[], [12, 6]])
def test_on_a_ring_shifts_go_through(resample: str, attention_lengths: list[int]) -> None:
    """By multiples of 2^(levels - 1), with circular padding and not with zeros; other shifts do not."""
    x, noise, _ = batch()
    settings = {"resample": resample, "attention_lengths": attention_lengths}
    ring, line = small(padding_mode="circular", **settings), small(**settings)
    with torch.no_grad():
        for steps in (4, 12, -8):
            assert distance(ring(x.roll(steps, 2), noise), ring(x, noise).roll(steps, 2)) < 1e-13
            assert distance(line(x.roll(steps, 2), noise), line(x, noise).roll(steps, 2)) > 1e-3
        assert distance(ring(x.roll(2, 2), noise), ring(x, noise).roll(2, 2)) > 1e-3


def test_a_period_stays_a_period() -> None:
    """On a ring, a sequence of equal pieces gives what one piece gives alone."""
    x, noise, _ = batch()
    long, short = small(shape=(2, 72), padding_mode="circular"), small(padding_mode="circular")
    with torch.no_grad():
        assert distance(long(x.repeat(1, 1, 3), noise), short(x, noise).repeat(1, 1, 3)) < 1e-13


def test_a_kernel_may_reach_once_around_the_ring() -> None:
    x, noise, _ = batch((2, 8))
    model = small(shape=(2, 8), padding_mode="circular", kernel_size=5)  # the lowest level has two entries
    with torch.no_grad():
        literal = Literal(model, circular=True, average=False)
        assert distance(model(x, noise), literal(x, noise, None)) < 1e-12
    with pytest.raises(UserError, match=r"wraps more than once around .* length is 2: .* at most 5"):
        small(shape=(2, 8), padding_mode="circular", kernel_size=7)
    small(shape=(2, 8), kernel_size=7)  # with zeros there is nothing to wrap


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_longer_is_the_transpose_of_shorter(padding_mode: str) -> None:
    """<down x, y> = <x, up y> for equal weights; of the averages up is twice the transpose."""
    torch.manual_seed(0)
    down, up = ConvDown(3, padding_mode).double(), ConvUp(3, padding_mode).double()
    up.load_state_dict(down.state_dict())
    x, y = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    pairs = ((down, up, 1), (AverageDown(padding_mode).double(), AverageUp(padding_mode).double(), 2))
    for shorter, longer, factor in pairs:
        left, right = (shorter(x) * y).sum() * factor, (x * longer(y)).sum()
        assert abs(float((left - right).detach())) < 1e-13


def test_averages_keep_constants_and_stop_the_highest_frequency() -> None:
    """The transfer function of (1, 3, 3, 1)/8 is cos^3(w/2): 1 at w = 0, and 0 at w = pi, which would alias to 0."""
    length = 32
    i = torch.arange(length, dtype=torch.float64)
    down, up = AverageDown("circular").double(), AverageUp("circular").double()
    constant = torch.ones(1, 2, length, dtype=torch.float64)
    assert torch.equal(down(constant), constant[:, :, ::2])
    assert torch.equal(up(constant[:, :, ::2]), constant)
    for k in range(length // 2 + 1):
        w = 2 * math.pi * k / length
        half_way = torch.cos(w * (i[::2] + 0.5))[None, None]
        exact = math.cos(w / 2) ** 3 * half_way
        assert float((down(torch.cos(w * i)[None, None]) - exact).abs().max()) < 1e-14
    line = AverageUp("zeros").double()(torch.arange(8.0, dtype=torch.float64)[None, None])
    assert torch.equal(line[0, 0, 1:-1], torch.arange(1, 15, dtype=torch.float64) / 2 - 0.25)


def test_new_weights_keep_the_variance() -> None:
    """Of white noise, through resampling by convolutions: within five standard errors."""
    torch.manual_seed(0)
    x = torch.randn(4, 64, 256)
    for module in (ConvDown(64, "circular"), ConvUp(64, "circular")):
        weights = module.weight.numel() / 2
        assert abs(float(module(x).detach().var()) - 1) < 5 * math.sqrt(2 / weights) + 5 * math.sqrt(2 / x.numel())


def test_attention_is_where_it_is_asked_for() -> None:
    for lengths in ([], [24], [12], [6], [24, 6]):
        model = small(attention_lengths=lengths)
        expected = [length in lengths for length in (24, 12, 6)]
        for levels, wanted in ((model.down, expected), (model.up, expected[::-1])):
            for level, want in zip(levels, wanted, strict=True):
                assert [isinstance(a, SelfAttention1d) for a in level.attentions] == [want] * len(level.blocks)
        assert isinstance(model.middle.attention, SelfAttention1d) == (6 in lengths)
    with pytest.raises(UserError, match=r"attention_lengths\[1\]=16 is not the length of a level: they are 24, 12, 6"):
        small(attention_lengths=[12, 16])
    with pytest.raises(UserError, match=r"model.heads=3 does not divide the 16 channels of the level of length 12"):
        small(attention_lengths=[12], heads=3)
    small(attention_lengths=[6], heads=3)  # which has 24 channels


def test_attention_reaches_everything_and_convolutions_their_neighbours() -> None:
    """The receptive field, from gradients; one level, one block down, two in the middle, two up, kernels of 3."""
    for lengths, reach in (([], 12), ([64], 63)):
        model = small(shape=(1, 64), channel_multipliers=[1], kernel_size=3, attention_lengths=lengths)
        for module in model.modules():  # normalization looks at the whole sequence
            if isinstance(module, nn.GroupNorm):
                module.forward = lambda x: x  # type: ignore[method-assign]
        x = torch.randn(1, 1, 64, dtype=torch.float64, requires_grad=True)
        model(x, torch.zeros(1, dtype=torch.float64))[0, 0, 0].backward()
        assert x.grad is not None
        assert int(x.grad[0, 0].nonzero().max()) == reach


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_recomputing_changes_nothing_to_the_bit(levels: int) -> None:
    """Dropout included."""
    gradients = []
    for count in (0, levels):
        model = small(4, dropout=0.3, attention_lengths=[12], recompute_levels=count).train()
        x, noise, label = batch()
        torch.manual_seed(5)
        model(x.requires_grad_(), noise, label).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_recomputing_keeps_less_with_every_level() -> None:
    x, noise, _ = batch()
    kept = [0] * 4
    for levels in range(4):

        def count(tensor: Tensor, levels: int = levels) -> Tensor:
            kept[levels] += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
            return tensor

        model = small(recompute_levels=levels)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(x, noise)
    assert kept[0] > kept[1] > kept[2] > kept[3]


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("resample", ["conv", "average"])
def test_half_precision_and_compiling_with_every_setting(padding_mode: str, resample: str) -> None:
    model = small(4, padding_mode=padding_mode, resample=resample, attention_lengths=[12]).float()
    x, noise, label = batch()
    x, noise = x.float(), noise.float()
    with torch.no_grad():
        exact = model(x, noise, label)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x, noise, label)
        assert half.dtype == torch.float32
        assert distance(half, exact) < 0.1
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert distance(compiled(x, noise, label), exact) < 1e-6


@pytest.mark.parametrize("shape", [(1, 4), (7, 100), (2, 1)])
def test_any_channels_and_lengths(shape: tuple[int, ...]) -> None:
    multipliers = [1] if shape[1] == 1 else [1, 2, 3]
    model = small(shape=shape, channel_multipliers=multipliers)
    x, noise, _ = batch(shape)
    with torch.no_grad():
        y = model(x, noise)
    assert y.shape == x.shape
    assert bool(y.isfinite().all())
    assert np.unique(y.numpy()).size == y.numel()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 3}, "model.channels=3"),
        ({"channel_multipliers": []}, "model.channel_multipliers is empty"),
        ({"channel_multipliers": [1, 0]}, r"model.channel_multipliers\[1\]=0"),
        (
            {"channel_multipliers": [1, 1, 1, 1, 1]},
            r"length 24 cannot be halved 4 times: with 5 levels the length must be a multiple of 16; pad",
        ),
        ({"blocks_per_level": 0}, "model.blocks_per_level=0"),
        ({"kernel_size": 4}, "model.kernel_size=4 is even and has no middle: use 5"),
        ({"kernel_size": 0}, "model.kernel_size=0"),
        ({"attention_lengths": 12}, "model.attention_lengths=12 is not a list"),
        ({"heads": 0}, "model.heads=0"),
        ({"resample": "fir"}, "model.resample='fir' is not one of conv, average"),
        ({"padding_mode": "zero"}, "model.padding_mode='zero' .* did you mean 'zeros'"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"activation": "gelu"}, "model.activation='gelu'"),
        ({"fourier_scale": 0}, "model.fourier_scale=0"),
        ({"recompute_levels": 4}, "model.recompute_levels=4 is out of range: it must be at least 0 and at most 3"),
        ({"recompute_levels": -1}, "model.recompute_levels=-1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UNet1d(SHAPE, **SMALL | settings)


def test_shapes_that_do_not_suit() -> None:
    with pytest.raises(UserError, match=r"model=unet1d works on examples of shape \(C, L\), not \(24\,\)"):
        UNet1d((24,))
    with pytest.raises(UserError, match="num_classes=-1"):
        UNet1d(SHAPE, -1)


def test_sequences_in_a_file_are_learned_and_drawn(tmp_path: Path) -> None:
    """Waves of two frequencies, one a class; the same samples in batches of any size."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 96)
    phase = rng.uniform(0, 2 * np.pi, (96, 1)) + 2 * np.pi * np.arange(24) / 24 * (1 + labels[:, None])
    waves = np.stack([np.cos(phase), np.sin(phase)], axis=2) / np.sqrt(2)
    np.savez(tmp_path / "waves.npz", x=waves, y=labels)
    settings = ["model=unet1d", "model.channels=8", "model.channel_multipliers=[1,2]", "model.blocks_per_level=1"]
    settings += ["model.padding_mode=circular", "model.attention_lengths=[12]", "data=npz", "data.path=waves.npz"]
    settings += ["data.layout=nlc", "conditional=true", "training.steps=4", "training.batch_size=8"]
    settings += ["training.validation_examples=8", "training.preview_samples=4", "training.warmup=2", "preview_steps=2"]
    done = command("sde.train", *settings, "hydra.run.dir=runs/w", folder=tmp_path)
    assert done.code == 0, done.err
    assert "examples of shape (2, 24), 2 classes" in done.out
    drawn = []
    for size in (2, 5):
        arguments = ["solver=heun", "steps=3", "n=5", f"batch_size={size}", f"out=drawn-{size}"]
        done = command("sde.sample", *arguments, folder=tmp_path)
        assert done.code == 0, done.err
        with np.load(tmp_path / f"drawn-{size}" / "samples.npz") as arrays:
            assert arrays["labels"].tolist() == [0, 1, 0, 1, 0]
            drawn.append(arrays["samples"])
    assert drawn[0].shape == (5, 2, 24)
    assert drawn[0].dtype == np.float32
    np.testing.assert_allclose(drawn[0], drawn[1], rtol=0, atol=1e-4 * abs(drawn[0]).max())
    assert len(np.unique(drawn[0].round(3), axis=0)) == 5


def test_a_length_that_does_not_suit_is_one_sentence(tmp_path: Path) -> None:
    np.save(tmp_path / "odd.npy", np.zeros((4, 1, 9)))
    done = command("sde.train", "model=unet1d", "data=npz", "data.path=odd.npy", folder=tmp_path)
    assert done.code == 2
    assert "sequences of length 9 cannot be halved 2 times" in done.sentence
