"""DiT against an independent computation, and against what its parts are defined by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sde.errors import UserError
from sde.models.dit import DiT, DiTBlock, RotaryPositions, SinCosPositions, patchify, rotate, unpatchify
from tests.small_models import distance, lively

SHAPE = (3, 8, 12)  # 4 x 6 patches of side 2
GRID = (4, 6)
SMALL: dict[str, Any] = {"patch_size": 2, "width": 16, "depth": 2, "heads": 2}


def small(num_classes: int = 0, shape: tuple[int, ...] = SHAPE, **settings: Any) -> DiT:
    """A small network with weights of natural size, in float64."""
    torch.manual_seed(0)
    model = lively(DiT(shape, num_classes, **SMALL | settings)).double().eval()
    assert isinstance(model, DiT)
    return model


def batch(shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, times and labels (the last one "no label" of four classes)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((3, *shape), generator=generator, dtype=torch.float64)
    return x, torch.tensor([0.5, 40.0, 900.0], dtype=torch.float64), torch.tensor([0, 2, 4])


def sincos_table(width: int, rows: int, columns: int) -> np.ndarray:
    """(rows * columns, width), entry by entry, by the formula."""
    table = np.zeros((rows * columns, width))
    quarter = width // 4
    for n in range(rows * columns):
        for k in range(quarter):
            w = 10_000.0 ** (-k / quarter)
            row, column = w * (n // columns), w * (n % columns)
            table[n, k::quarter] = math.sin(column), math.cos(column), math.sin(row), math.cos(row)
    return table


def turn(x: Tensor, rows: int, columns: int) -> Tensor:
    """Rotary positions by complex numbers; x (B, heads, n, d)."""
    half, quarter = x.shape[-1] // 2, x.shape[-1] // 4
    w = (100.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)).float().double()
    n = torch.arange(rows * columns)
    angle = torch.cat([torch.outer(n // columns, w), torch.outer(n % columns, w)], 1)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
    return torch.cat([z.real, z.imag], -1)


def functional(model: DiT, x: Tensor, noise: Tensor, label: Tensor | None, *, heads: int, rotary: bool) -> Tensor:
    """The network from its weights alone, written with einsum and elementary functions."""
    w = dict(model.named_parameters())
    (rows, columns), p, (batch, channels) = GRID, 2, x.shape[:2]

    def affine(name: str, value: Tensor) -> Tensor:
        return torch.einsum("oi,...i->...o", w[f"{name}.weight"], value) + w[f"{name}.bias"]

    def silu(value: Tensor) -> Tensor:
        return value / (1 + torch.exp(-value))

    def norm(value: Tensor) -> Tensor:
        centered = value - value.mean(-1, keepdim=True)
        return centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + 1e-6)

    def split(name: str, count: int) -> list[Tensor]:
        return [part[:, None] for part in affine(name, e).split(16, dim=1)][:count]

    frequencies = (10_000.0 ** (-torch.arange(128, dtype=torch.float32) / 127)).double()
    torch.testing.assert_close(frequencies, model.embedding.features.frequencies, rtol=1e-6, atol=0)
    phase = noise[:, None] * model.embedding.features.frequencies
    e = affine("embedding.linear_2", silu(affine("embedding.linear_1", torch.cat([phase.sin(), phase.cos()], 1))))
    if "embedding.classes.vectors.weight" in w:
        e = e + w["embedding.classes.vectors.weight"][[-1] * batch if label is None else label]
    e = silu(e)

    patches = torch.stack(
        [x[:, :, i * p : i * p + p, j * p : j * p + p].flatten(1) for i in range(rows) for j in range(columns)], 1
    )
    h = affine("input", patches)
    if not rotary:
        h = h + torch.from_numpy(sincos_table(16, rows, columns).astype(np.float32)).double()
    for k in range(2):
        block = f"blocks.{k}"
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = split(f"{block}.condition", 6)
        qkv = affine(f"{block}.attention.query_key_value", norm(h) * (1 + scale_1) + shift_1)
        q, key, v = qkv.reshape(batch, -1, 3, heads, 16 // heads).permute(2, 0, 3, 1, 4)
        if f"{block}.attention.query_norm.weight" in w:
            q, key = (
                a / torch.sqrt((a**2).mean(-1, keepdim=True) + 1e-6) * w[f"{block}.attention.{name}_norm.weight"]
                for a, name in ((q, "query"), (key, "key"))
            )
        if rotary:
            q, key = turn(q, rows, columns), turn(key, rows, columns)
        weights = torch.exp(torch.einsum("bhid,bhjd->bhij", q, key) / math.sqrt(16 / heads))
        mixed = torch.einsum("bhij,bhjd->bihd", weights / weights.sum(-1, keepdim=True), v).reshape(batch, -1, 16)
        h = h + gate_1 * affine(f"{block}.attention.output", mixed)
        a = affine(f"{block}.mlp.0", norm(h) * (1 + scale_2) + shift_2)
        a = a / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        h = h + gate_2 * affine(f"{block}.mlp.2", a)
    shift, scale = split("head.condition", 2)
    out = affine("head.output", norm(h) * (1 + scale) + shift)
    y = torch.zeros_like(x)
    for n in range(rows * columns):
        i, j = n // columns * p, n % columns * p
        y[:, :, i : i + p, j : j + p] = out[:, n].reshape(batch, channels, p, p)
    return y


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("num_classes", [0, 4])
def test_it_is_what_the_formulas_say(positions: str, qk_norm: bool, num_classes: int) -> None:
    model = small(num_classes, positions=positions, qk_norm=qk_norm)
    x, noise, label = batch()
    for given in (None, label) if num_classes else (None,):
        with torch.no_grad():
            expected = functional(model, x, noise, given, heads=2, rotary=positions == "rotary")
            assert distance(model(x, noise, given), expected) < 1e-12


def test_patches_are_cut_row_by_row_and_put_together_again() -> None:
    x, _, _ = batch()
    patches = patchify(x, 2)
    assert patches.shape == (3, 24, 12)
    assert torch.equal(patches[:, 1 * 6 + 4], x[:, :, 2:4, 8:10].flatten(1))
    assert torch.equal(unpatchify(patches, 2, GRID), x)
    assert torch.equal(patchify(unpatchify(patches, 2, GRID), 2), patches)
    assert torch.equal(patchify(x.contiguous(memory_format=torch.channels_last), 2), patches)


def test_a_fresh_block_is_the_identity_and_a_fresh_network_gives_zero() -> None:
    torch.manual_seed(0)
    model = DiT(SHAPE, 4, **SMALL, positions="rotary", dropout=0.5)
    h, e = torch.randn(3, 24, 16), torch.randn(3, 16)
    assert model.rotary is not None
    for block in model.blocks:
        assert torch.equal(block(h, e, model.rotary()), h)
    x, noise, label = batch()
    assert not model(x.float(), noise.float(), label).any()


def test_the_initialization_of_the_paper() -> None:
    """Uniform within Xavier's bounds, and filling them; normal with standard deviation 0.02 for time and classes."""
    torch.manual_seed(0)
    model = DiT((3, 8, 8), 100, patch_size=2, width=64, depth=2, heads=4)
    small_ones = {"embedding.linear_1.weight", "embedding.linear_2.weight", "embedding.classes.vectors.weight"}
    for name, weight in model.named_parameters():
        if "condition" in name or "head.output" in name or weight.ndim == 1:
            assert not weight.any(), name
        elif name in small_ones:
            # five standard errors of the estimate
            assert abs(float(weight.detach().std()) / 0.02 - 1) < 5 / math.sqrt(2 * weight.numel()), name
        else:
            bound = math.sqrt(6 / sum(weight.shape))
            largest = float(weight.detach().abs().max()) / bound
            assert 1 - 15 / weight.numel() < largest <= 1, name  # exceeded by chance once in e^15


@pytest.mark.parametrize("grid", [(4, 6), (5, 1), (3, 3)])
def test_sincos_positions(grid: tuple[int, int]) -> None:
    """The formula, distinct vectors of one length, and products that depend on the displacement alone."""
    module = SinCosPositions(32, grid)
    assert module.table.dtype == torch.float32
    exact = sincos_table(32, *grid)
    assert abs(module.table.double().numpy() - exact).max() <= 2.0**-25  # half a unit in the last place below 1
    h = torch.randn(2, grid[0] * grid[1], 32)
    assert torch.equal(module(h), h + module.table)
    products = exact @ exact.T
    w = 10_000.0 ** (-np.arange(8) / 8)
    index = np.arange(grid[0] * grid[1])
    steps = [np.subtract.outer(i, i) for i in (index // grid[1], index % grid[1])]
    expected = sum(np.cos(np.multiply.outer(step, w)).sum(-1) for step in steps)
    assert abs(products - expected).max() < 32 * 2.0**-52 * 4
    off = products - np.diag(np.diag(products))
    assert np.allclose(np.diag(products), 16, rtol=1e-14)
    assert off.max() < 15.9


def test_rotary_positions_are_relative() -> None:
    """One query and one key at every place: the product depends on the displacement alone, as the formula says."""
    torch.manual_seed(0)
    rows, columns, size = 5, 7, 16
    rotation = RotaryPositions(size, (rows, columns)).double()()
    q, k = torch.randn(2, size, dtype=torch.float64)
    turned_q, turned_k = (rotate(v.expand(rows * columns, size), rotation) for v in (q, k))
    bound = 1e-14 * float(q.norm() * k.norm())
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(rows * columns), rtol=1e-14, atol=0)
    logits = (turned_q @ turned_k.T).reshape(rows, columns, rows, columns)
    assert float((logits[1:, :, 1:] - logits[:-1, :, :-1]).abs().max()) < bound
    assert float((logits[:, 2:, :, 2:] - logits[:, :-2, :, :-2]).abs().max()) < bound
    pairs = torch.complex(q[:8], q[8:]) * torch.complex(k[:8], k[8:]).conj()
    w = (100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)).float().double()
    angle = torch.cat([(1 - 4) * w, (6 - 2) * w])
    assert abs(float((pairs * torch.exp(1j * angle)).real.sum() - logits[1, 6, 4, 2])) < bound
    assert float((logits[1, 6, 4, 2] - logits[4, 2, 1, 6]).abs()) > 0.1  # which way matters


def test_both_axes_take_half_of_the_rotary_pairs() -> None:
    cos, _ = RotaryPositions(16, (3, 4))()
    along_column, along_row = cos[[0, 4, 8]], cos[:4]
    assert torch.equal(along_column[:, 4:], torch.ones(3, 4))
    assert torch.equal(along_row[:, :4], torch.ones(4, 4))
    assert not (along_column[1:, :4] == 1).any()
    assert not (along_row[1:, 4:] == 1).any()


def test_without_positions_a_block_does_not_know_the_order() -> None:
    torch.manual_seed(0)
    block = lively(DiTBlock(16, 2, 32, 0.0, True)).double()
    h, e = torch.randn(2, 24, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    order = torch.randperm(24)
    rotation = RotaryPositions(8, GRID).double()()
    with torch.no_grad():
        assert distance(block(h[:, order], e, None), block(h, e, None)[:, order]) < 1e-14
        assert distance(block(h[:, order], e, rotation), block(h, e, rotation)[:, order]) > 1e-3


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_the_network_knows_where_patches_are(positions: str) -> None:
    model = small(positions=positions)
    x, noise, _ = batch()
    with torch.no_grad():
        assert distance(model(x.roll(2, 3), noise), model(x, noise).roll(2, 3)) > 1e-3
        assert distance(model(x.roll(2, 2), noise), model(x, noise).roll(2, 2)) > 1e-3


def test_normalized_queries_and_keys_do_not_grow_with_their_weights() -> None:
    model, grown = small(qk_norm=True), small(qk_norm=True)
    with torch.no_grad():
        for block in grown.blocks:
            for parameter in block.attention.query_key_value.parameters():
                parameter[:32] *= 1000  # queries and keys, not values
        x, noise, _ = batch()
        assert distance(grown(x, noise), model(x, noise)) < 1e-4  # epsilon: 1e-6 of a mean square near 1
        assert distance(small()(x, noise), model(x, noise)) > 1e-3


PUBLISHED = {  # arXiv 2212.09748, table 4: width, depth, heads and millions of parameters for patches of 8, 4 and 2
    "S": (384, 12, 6, (33, 33, 33)),
    "B": (768, 12, 12, (131, 130, 130)),
    "L": (1024, 24, 16, (459, 458, 458)),
    "XL": (1152, 28, 16, (676, 675, 675)),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_sizes_of_the_paper(name: str) -> None:
    """The paper counts outputs for variances besides; its published network also the fixed table of positions."""
    width, depth, heads, millions = PUBLISHED[name]
    for patch_size, published in zip((8, 4, 2), millions, strict=True):
        with torch.device("meta"):
            model = DiT((4, 32, 32), 1000, patch_size=patch_size, width=width, depth=depth, heads=heads)
        variances = 4 * patch_size**2 * (width + 1)
        total = sum(parameter.numel() for parameter in model.parameters()) + variances
        assert round(total / 1e6) == published
        if (name, patch_size) == ("XL", 2):
            assert total + 16**2 * width == 675_129_632


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_recomputing_changes_nothing_to_the_bit(positions: str) -> None:
    """Dropout included."""
    gradients = []
    for flag in (False, True):
        model = small(4, positions=positions, dropout=0.3, recompute=flag).train()
        x, noise, label = batch()
        torch.manual_seed(5)
        model(x.requires_grad_(), noise, label).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_recomputing_keeps_nothing_of_a_block_but_its_inputs() -> None:
    """What autograd stores for one block more: tokens and embedding, where it would be many times that."""
    x, noise, _ = batch()
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
        return tensor

    def numbers(depth: int, flag: bool) -> int:
        nonlocal kept
        kept = 0
        model = small(depth=depth, recompute=flag)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(x, noise)
        return kept

    inputs = 3 * 24 * 16 + 3 * 16
    assert numbers(3, True) - numbers(2, True) == inputs
    assert numbers(3, False) - numbers(2, False) > 10 * inputs


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_half_precision_and_compiling_with_every_setting(positions: str) -> None:
    model = small(4, positions=positions, qk_norm=True).float()
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


def test_the_sum_over_blocks_keeps_its_precision_under_autocast() -> None:
    seen = []
    model = small(positions="rotary").float()
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _arguments, output: seen.append(output.dtype))
    x, noise, _ = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x.float(), noise.float())
    assert seen == [torch.float32] * 2


def test_dropout_drops_what_branches_add() -> None:
    """With all but nothing dropped, a block is close to the identity in training and not in evaluation."""
    torch.manual_seed(0)
    block = lively(DiTBlock(16, 2, 32, 1 - 1e-9, False)).double()
    h, e = torch.randn(2, 24, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    assert torch.equal(block.train()(h, e, None), h)
    assert distance(block.eval()(h, e, None), h) > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 5}, r"pictures of 8x12 cannot be cut .*patch_size=5.*choose one of 1, 2, 4, or resize"),
        ({"patch_size": 0}, "model.patch_size=0"),
        ({"width": 16.0}, "model.width=16.0 is not a whole number"),
        ({"depth": 0}, "model.depth=0"),
        ({"heads": 3}, "model.heads=3 does not divide model.width=16"),
        ({"heads": 0}, "model.heads=0"),
        ({"width": 18}, "model.width=18 is not a multiple of 4"),
        ({"width": 12, "positions": "rotary"}, "heads of 6 entries"),
        ({"mlp_ratio": 0}, "model.mlp_ratio=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"positions": "rotari"}, "model.positions='rotari' is not one of sincos, rotary; did you mean 'rotary'"),
        ({"qk_norm": 1}, "model.qk_norm=1 must be true or false"),
        ({"recompute": None}, "model.recompute=None must be true or false"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiT(SHAPE, **SMALL | settings)


def test_shapes_that_do_not_suit() -> None:
    with pytest.raises(UserError, match=r"model=dit works on examples of shape \(C, H, W\), not \(3, 16\)"):
        DiT((3, 16))
    with pytest.raises(UserError, match="num_classes=-1"):
        DiT(SHAPE, -1, **SMALL)
