"""Devices and precisions."""

from __future__ import annotations

import platform
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import nn

from sde import devices
from sde.devices import autocast, cast_weights, compile_network, computes_in, keep_memory, pick_device
from sde.errors import UserError
from sde.models import winograd
from sde.models.recompute import recompute
from sde.training.options import TrainingOptions
from tests.small_models import build, distance, inputs

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["with AMX", "without"])
def amx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: request.param)
    return bool(request.param)


def test_bfloat16_where_it_is_the_faster_type(amx: bool) -> None:
    with autocast(CPU, "bf16"):
        assert torch.is_autocast_enabled("cpu") == amx
        y = nn.Linear(3, 4)(torch.zeros(2, 3))
    assert y.dtype is (torch.bfloat16 if amx else torch.float32)
    assert computes_in(CPU, "bf16") == ("bfloat16" if amx else "float32 (faster than bfloat16 on this CPU)")
    assert computes_in(CPU, "fp32") == "float32"
    assert computes_in(torch.device("cuda"), "bf16") == "bfloat16"
    assert computes_in(CPU, "fp16") == ("float16" if amx else "float32 (faster than float16 on this CPU)")
    with pytest.raises(UserError, match="precision='fp8'"):
        autocast(CPU, "fp8")


@pytest.mark.parametrize("name", ["ncsnpp", "adm", "dit", "mlp", "edm2", "ncsnv2", "unet1d"])
def test_weights_that_are_cast_once_give_what_autocast_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (devices, winograd):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda: True)
    model, cast = build(name), build(name)
    cast_weights(cast, CPU, "bf16")
    x, noise = inputs(name)
    with torch.no_grad(), autocast(CPU, "bf16"):
        expected, y = model(x, noise), cast(x, noise)
    with torch.no_grad():
        exact = model(x, noise)
    if name == "ncsnv2":  # its pooling convolutions average their weights, which are rounded before it or after
        assert distance(y, exact) < 1.5 * distance(expected, exact)
    else:
        assert torch.equal(y, expected)
    cast_weights(model, CPU, "fp32")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_memory_is_kept_on_a_cpu_with_glibc() -> None:
    """In a process of its own, since it cannot be undone."""
    program = "import torch; from sde.devices import keep_memory; print(keep_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(platform.libc_ver()[0] == "glibc")
    assert not keep_memory(torch.device("cuda"))


@pytest.mark.parametrize(
    ("how", "device", "expected"),
    [
        (False, "cpu", None), (False, "cuda", None), (True, "cpu", {}), (True, "cuda", {}),
        ("auto", "cpu", None), ("auto", "cuda", {}),
        ("graphs", "cpu", None), ("graphs", "cuda", {"mode": "max-autotune"}),
    ],
)  # fmt: skip
def test_when_networks_are_compiled(how: bool | str, device: str, expected: dict[str, str] | None) -> None:
    network = mock.Mock()
    compile_network(network, torch.device(device), how)
    assert network.compile.call_args_list == ([] if expected is None else [mock.call(**expected)])


def test_graphs_on_a_cpu_are_left_out_in_so_many_words(capsys: pytest.CaptureFixture[str]) -> None:
    for how in (False, "auto"):
        compile_network(mock.Mock(), CPU, how)
    assert capsys.readouterr() == ("", "")
    compile_network(mock.Mock(), CPU, "graphs")
    assert capsys.readouterr() == ("", "compile=graphs is for a GPU: left out on this CPU\n")


def test_unknown_ways_to_compile() -> None:
    with pytest.raises(UserError, match="compile='max' is not one of false, true, auto, graphs"):
        compile_network(nn.Linear(1, 1), CPU, "max")
    with pytest.raises(UserError, match=r"training\.compile='max' is not one of false, true, auto, graphs"):
        TrainingOptions(compile="max")


def test_unknown_devices() -> None:
    with pytest.raises(UserError, match="device='gpu' is not a device"):
        pick_device("gpu")
    with pytest.raises(UserError, match="device='mps' is not supported"):
        pick_device("mps")
    assert pick_device("auto").type in ("cpu", "cuda")


def test_recomputing_is_the_same_to_the_bit_and_keeps_the_arguments_only() -> None:
    """With dropout, whose random numbers come again."""
    module = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5), nn.SiLU(), nn.Linear(50, 5))
    x = torch.randn(3, 5)
    gradients, kept = [], []
    for call in (lambda m, v: m(v), recompute):
        module.zero_grad()
        torch.manual_seed(0)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):  # noqa: B023
            y = call(module, x.clone().requires_grad_())
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
        kept.append(max(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[0] >= 150 > kept[1]
    with torch.no_grad():
        assert torch.equal(recompute(module.eval(), x), module(x))
