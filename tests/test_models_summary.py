"""What networks are said to cost, against counts by hand, the memory of real steps, and published numbers."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sde.models import MODELS
from sde.models.attention import attend
from sde.models.summary import Summary, _inputs, _on_meta, count_bytes, count_flops, summarize
from tests.commands import command
from tests.small_models import SMALL, build, inputs, shape_of

NAMES = sorted(MODELS)
WITHOUT_DROPOUT = {name: {} if name == "mlp" else {"dropout": 0.0} for name in NAMES}


class TwoLayers(nn.Module):
    """A convolution, an activation and a linear layer, whose costs are counted by hand."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.linear = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.sigmoid(self.conv(x)).permute(0, 2, 3, 1))


class Perceptron(nn.Module):
    """Three layers of `hidden` numbers; the weight of the one between may be normalized, as EDM2's are."""

    shape = (30,)

    def __init__(self, hidden: int, normalized: bool = False) -> None:
        super().__init__()
        self.normalized = normalized
        self.first = nn.Linear(30, hidden)
        self.between = nn.Linear(hidden, hidden, bias=False)
        self.last = nn.Linear(hidden, 10)

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        weight = self.between.weight * 2.0 if self.normalized else self.between.weight
        return self.last(torch.tanh(nn.functional.linear(torch.tanh(self.first(x)), weight)))


class Attentive(nn.Module):
    """Attention alone, over a sequence whose length shows what is kept."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.shape = (length, 4)
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        x = (x * self.weight)[:, None]
        return attend(x, x, x)


def test_counts_by_hand() -> None:
    network = TwoLayers()
    assert count_flops(network) == 2 * (64 * 5 * 27 + 64 * 5 * 7)
    costs = summarize(network)
    assert costs.parameters == 5 * 28 + 7 * 6
    assert str(Summary(62_690_000, 21_800_000_000, ((0, 95_630_000),))) == (
        "62.69 M parameters, 21.8 GFLOP an evaluation, 91.2 MiB of activations an example"
    )


def test_peak_by_hand() -> None:
    """The peak of a large batch is where the last tanh has its result, the gradient of that and the one it makes of it,
    while the first waits with its result; the last layer has its gradients then. The peak of a small batch is the end,
    with all gradients and the last of `hidden` numbers."""
    hidden = 200
    costs = summarize(Perceptron(hidden))
    assert costs.activations == 4 * 4 * hidden
    weights, few = 16 * costs.parameters, 64  # bytes: losses and their gradients
    last = 4 * (10 * hidden + 10)
    assert costs.training_memory(10_000) == pytest.approx(weights + 10_000 * costs.activations + last, abs=few)
    assert costs.training_memory(1) == pytest.approx(weights + 4 * costs.parameters + 4 * hidden, abs=few)


def test_normalized_weights_count_once_and_not_for_each_example() -> None:
    plain, normalized = summarize(Perceptron(200)), summarize(Perceptron(200, normalized=True))
    assert normalized.activations == plain.activations
    assert normalized.training_memory(10_000) - plain.training_memory(10_000) == 4 * 200 * 200


def test_attention_keeps_no_matrix_of_all_pairs() -> None:
    """Queries, keys, values, result, gradients of each: a few numbers for an entry, whatever the length."""
    short, long = (summarize(Attentive(length)) for length in (64, 4096))
    assert long.activations == 64 * short.activations
    assert long.flops == 2 * 2 * 4096**2 * 4


@pytest.mark.parametrize(
    ("name", "again"), [*((name, False) for name in NAMES), ("ncsnpp", True), ("dit", True), ("unet1d", True)]
)
def test_memory_is_what_a_training_step_takes(name: str, again: bool) -> None:
    """The peak on the meta device against the allocations of a real step on the CPU, where some kernels take memory
    for themselves: up to a tenth at this size."""
    batch = 16
    model = build(name, **WITHOUT_DROPOUT[name], **(recomputing(name) if again else {})).train()
    x, noise = inputs(name, batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(x, noise).sum().backward()
    live = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    real = max(accumulate(live))
    costs = summarize(model)
    ours = costs.training_memory(batch) - 16 * costs.parameters
    assert 0.88 * real <= ours <= 1.01 * real


def recomputing(name: str) -> dict[str, Any]:
    """The setting of a model that computes everything again."""
    settings = MODELS.get(name).__init__.__kwdefaults__
    if "recompute_levels" in settings:
        return {"recompute_levels": 2}
    return {"recompute": True} if "recompute" in settings else {}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mlp"])
def test_recomputing_gives_the_same_gradients_for_less_memory(name: str) -> None:
    plain, recomputed = build(name, 3, dropout=0.2).train(), build(name, 3, dropout=0.2, **recomputing(name)).train()
    kept, kept_less = (max(count_bytes(_on_meta(m), *_inputs(m, 64))) for m in (plain, recomputed))
    assert kept_less < 0.9 * kept
    x, noise = inputs(name)
    for model in (plain, recomputed):
        torch.manual_seed(0)
        model(x, noise, torch.tensor([0, 2, 3])).square().sum().backward()
    for (key, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad), key


def test_levels_are_recomputed_from_the_highest() -> None:
    taken = [summarize(build("ncsnpp", recompute_levels=n)).activations for n in (0, 1, 2)]
    assert taken[0] > taken[1] > taken[2]


def test_ncsnpp_of_cifar10() -> None:
    """62.7 M parameters; its operations are known as 2 x 10.9 G multiplications."""
    network = MODELS.get("ncsnpp")((3, 32, 32), channels=128, channel_multipliers=[1, 2, 2, 2], blocks_per_level=4)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(62.7e6, abs=0.05e6)
    convolutions = sum(
        2 * module.weight.numel() * pixels for module, pixels in convolution_pixels(network, (3, 32, 32))
    )
    assert convolutions < count_flops(network) < 1.05 * convolutions  # the rest is attention and linear layers


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
