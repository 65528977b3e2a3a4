"""What networks are said to cost, against counts by hand, the tensors that are really kept, and published numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sde.models import MODELS
from sde.models.summary import Summary, _storage, count_activations, count_flops, summarize
from tests.commands import command
from tests.small_models import SMALL, build, inputs, shape_of

NAMES = sorted(MODELS)


class TwoLayers(nn.Module):
    """A convolution, an activation and a linear layer, whose costs are counted by hand."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.linear = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.sigmoid(self.conv(x)).permute(0, 2, 3, 1))


def test_counts_by_hand() -> None:
    network = TwoLayers()
    assert count_flops(network) == 2 * (64 * 5 * 27 + 64 * 5 * 7)
    # the convolution keeps its input; the sigmoid its output, of which the linear layer keeps a copy in its own order
    assert count_activations(network) in (4 * 64 * (3 + 5), 4 * 64 * (3 + 5 + 5))
    costs = summarize(network)
    assert costs.parameters == 5 * 28 + 7 * 6
    assert costs.training_memory(10) == 20 * costs.parameters + 10 * costs.activations
    assert str(Summary(62_690_000, 21_800_000_000, 95_630_000)) == (
        "62.69 M parameters, 21.8 GFLOP an evaluation, 91.2 MiB of activations an example"
    )


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_those_that_a_training_step_keeps(name: str) -> None:
    """Ours are found without numbers; attention keeps slightly different tensors on the CPU."""
    model = build(name).train()
    weights = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in weights:
            kept[_storage(tensor)] = tensor
        return tensor

    x, noise = inputs(name, 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x, noise)
    assert y.requires_grad
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert count_activations(model) == pytest.approx(real, rel=0.2)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mlp"])
def test_recomputing_gives_the_same_gradients_for_less_memory(name: str) -> None:
    option = {"recompute_levels": 2} if "recompute_levels" in MODELS.get(name).__init__.__kwdefaults__ else None
    settings = option or {"recompute": True}
    plain, recomputed = build(name, 3, dropout=0.2).train(), build(name, 3, dropout=0.2, **settings).train()
    assert count_activations(recomputed) < 0.6 * count_activations(plain)
    x, noise = inputs(name)
    for model in (plain, recomputed):
        torch.manual_seed(0)
        model(x, noise, torch.tensor([0, 2, 3])).square().sum().backward()
    for (key, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad), key


def test_levels_are_recomputed_from_the_highest() -> None:
    kept = [count_activations(build("ncsnpp", recompute_levels=n)) for n in (0, 1, 2)]
    assert kept[0] > kept[1] > kept[2]


def test_ncsnpp_of_cifar10() -> None:
    """62.7 M parameters; its operations are known as 2 x 10.9 G multiplications."""
    network = MODELS.get("ncsnpp")((3, 32, 32), channels=128, channel_multipliers=[1, 2, 2, 2], blocks_per_level=4)
    costs = summarize(network)
    assert costs.parameters == pytest.approx(62.7e6, abs=0.05e6)
    convolutions = sum(
        2 * module.weight.numel() * pixels for module, pixels in convolution_pixels(network, (3, 32, 32))
    )
    assert convolutions < costs.flops < 1.05 * convolutions  # the rest is attention and linear layers


def convolution_pixels(network: nn.Module, shape: tuple[int, ...]) -> list[tuple[nn.Conv2d, int]]:
    """Each convolution with the pixels of what it gives."""
    found: list[tuple[nn.Conv2d, int]] = []
    network = network.to("meta")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, _, y: found.append((m, y.shape[2] * y.shape[3])))
    with torch.no_grad():
        network(torch.zeros(1, *shape, device="meta"), torch.zeros(1, device="meta"))
    return found


def test_command_line(tmp_path: Path) -> None:
    answer = command("sde.summary", "model=mlp", "shape=[2]", "batch_size=4", folder=tmp_path)
    assert answer.code == 0
    assert answer.out.startswith("MLP for examples of shape (2,): ")
    assert [line.split()[0] for line in answer.out.splitlines()[2:]] == ["1", "8", "4", "16"]
    answer = command("sde.summary", "model=mlp", folder=tmp_path)
    assert answer.code == 2
    assert answer.err.startswith("error: model=mlp works on examples of shape (D)")
    assert len(answer.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_shapes_of_small_models_are_known() -> None:
    assert set(SMALL) == set(NAMES)
    assert all(shape_of(name) for name in NAMES)
