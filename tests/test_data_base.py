"""Facts, splits, order and scale of data, against exact answers; configuration against constructors."""

import inspect
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sde.data import DATASETS, DataInfo, Order, Split, batch_indices, measure_sigma_data
from sde.errors import UserError

CONF = Path(__file__).parents[1] / "conf" / "data"
BYTES = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-0.5, 2.5)])
def test_all_256_values_survive_the_round_trip(low: float, high: float, dtype: torch.dtype) -> None:
    info = DataInfo("x", (1, 16, 16), low=low, high=high)
    x = info.encode(BYTES, dtype)
    exact = low + (high - low) * np.arange(256) / 255
    np.testing.assert_allclose(x.flatten().numpy(), exact, rtol=0, atol=3 * torch.finfo(dtype).eps * abs(high))
    assert x.dtype == dtype
    assert x.min() == low
    assert torch.equal(info.decode(x), BYTES)


def test_half_precision_loses_its_bits_once() -> None:
    info = DataInfo("x", (1, 16, 16))
    assert torch.equal(info.encode(BYTES, torch.bfloat16), info.encode(BYTES).to(torch.bfloat16))
    # 11 significant bits are enough to tell 256 values apart, 8 are not
    assert torch.equal(info.decode(info.encode(BYTES, torch.float16)), BYTES)


def test_decode_rounds_and_clamps() -> None:
    info = DataInfo("x", (1, 1, 8))
    pixels = torch.tensor([-3.0, 0.49, 0.51, 99.6, 254.4, 254.6, 300.0, math.nan]).reshape(1, 1, 1, 8)
    expected = torch.tensor([0, 0, 1, 100, 254, 255, 255, 0], dtype=torch.uint8).reshape(1, 1, 1, 8)
    assert torch.equal(info.decode(pixels / 127.5 - 1), expected)


def test_vectors_pass_through() -> None:
    info = DataInfo("x", (2,), kind="vectors")
    x = torch.tensor([[1.5, -300.0]])
    assert torch.equal(info.encode(x, torch.float64), x.double())
    assert torch.equal(info.decode(x.double()), x)


def test_encode_refuses_pictures_that_are_floats() -> None:
    with pytest.raises(UserError, match=r"float32.*uint8"):
        DataInfo("x", (1, 2, 2)).encode(torch.zeros(1, 1, 2, 2))


def test_facts_survive_json() -> None:
    info = DataInfo("x", (3, 8, 8), 2, ("Ж", "b"), low=0.0)
    assert DataInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info
    assert DataInfo.from_dict({"name": "x", "shape": [2], "kind": "vectors"}) == DataInfo("x", (2,), kind="vectors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [3, 8]}, "channels, height, width"),
        ({"shape": [3, 0, 8]}, "whole numbers above 0"),
        ({"shape": 3}, "must be a list"),
        ({"shape": []}, "whole numbers"),
        ({"name": ""}, "string"),
        ({"kind": "pixel"}, "did you mean 'pixels'"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"num_classes": True}, "num_classes=True"),
        ({"class_names": ["a"]}, "1 names for num_classes=0"),
        ({"class_names": [1]}, "strings"),
        ({"low": 1.0}, "high=1.0"),
        ({"low": "a"}, "not a number"),
        ({"colour": 1}, "unknown colour"),
    ],
)
def test_facts_that_are_nonsense_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataInfo.from_dict({"name": "x", "shape": [3, 8, 8]} | change)


def test_facts_need_a_name_and_a_shape() -> None:
    with pytest.raises(UserError, match="missing shape"):
        DataInfo.from_dict({"name": "x"})
    with pytest.raises(UserError, match="dictionary"):
        DataInfo.from_dict([1])  # type: ignore[arg-type]


def test_split_knows_its_size_and_checks_its_labels() -> None:
    split = Split(torch.zeros(5, 3, 4, 4, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
    assert (len(split), split.nbytes) == (5, 5 * 48 + 5 * 8)
    assert torch.equal(split.to("cpu").values, split.values)
    assert Split(torch.zeros(5, 2)).to("cpu").nbytes == 40
    with pytest.raises(UserError, match=r"int64 of shape \(5,\)"):
        Split(split.values, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match="float64"):
        Split(torch.zeros(5, 2, dtype=torch.float64))


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (7, 7), (5, 12), (1, 3), (64, 1)])
def test_every_index_comes_once_an_epoch(n: int, batch_size: int) -> None:
    order = Order(n, batch_size, seed=3)
    stream = torch.cat([order(step) for step in range(4 * n)])
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(n).expand_as(epochs))
    assert order(0).dtype == torch.int64


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    forward = [Order(10, 4, 1)(step) for step in range(9)]
    order = Order(10, 4, 1)
    for step in (8, 0, 5, 5, 2):
        assert torch.equal(order(step), forward[step])
        assert torch.equal(batch_indices(10, 4, 1, step), forward[step])
    # the stream is the same however it is cut into batches
    assert torch.equal(torch.cat(forward), torch.cat([batch_indices(10, 12, 1, step) for step in range(3)]))
    assert not torch.equal(Order(100, 100, 1)(0), Order(100, 100, 2)(0))
    assert not torch.equal(Order(100, 100, 1)(0), Order(100, 100, 1)(1))


def test_order_is_the_same_everywhere() -> None:
    """Shuffles of PCG64 by NumPy: a change of this order would change every run."""
    assert Order(10, 10, 0)(0).tolist() == np.random.Generator(np.random.PCG64([0, 0])).permutation(10).tolist()
    assert Order(10, 4, 3)(0).tolist() == [9, 6, 0, 2]
    assert Order(10, 4, 3).epoch(5) == 2.0


def test_order_shuffles_evenly() -> None:
    """Each example is equally often first: 4000 shuffles of 4, a standard deviation of 27 around 1000."""
    order = Order(4, 4, 0)
    first = np.bincount([int(order(step)[0]) for step in range(4000)], minlength=4)
    assert np.abs(first - 1000).max() < 5 * math.sqrt(4000 * 0.25 * 0.75)


@pytest.mark.parametrize("values", [(0, 1, 0), (1, 0, 0), (1, 1, -1), (1.5, 1, 0), (True, 1, 0)])
def test_order_refuses_nonsense(values: tuple) -> None:
    with pytest.raises(UserError):
        Order(*values)
    with pytest.raises(UserError, match="step"):
        Order(1, 1, 0)(-1)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0)])
def test_sigma_data_of_pictures_is_the_standard_deviation_of_everything(
    low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sde.data.statistics.CHUNK_VALUES", 100)  # several chunks
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (37, 3, 4, 4), generator=generator, dtype=torch.uint8)
    info = DataInfo("x", (3, 4, 4), low=low, high=high)
    expected = info.encode(values, torch.float64).std(correction=0).item()
    assert measure_sigma_data(Split(values), info) == pytest.approx(expected, rel=1e-14)


def test_sigma_data_of_vectors_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sde.data.statistics.CHUNK_VALUES", 64)
    values = 1000 + torch.randn(501, 2, generator=torch.Generator().manual_seed(0))
    expected = values.double().std(correction=0).item()
    assert measure_sigma_data(Split(values), DataInfo("x", (2,), kind="vectors")) == pytest.approx(expected, rel=1e-12)


def test_sigma_data_needs_something_to_measure() -> None:
    info = DataInfo("x", (1, 2, 2))
    with pytest.raises(UserError, match="empty"):
        measure_sigma_data(Split(torch.zeros(0, 1, 2, 2, dtype=torch.uint8)), info)
    with pytest.raises(UserError, match="the same"):
        measure_sigma_data(Split(torch.full((3, 1, 2, 2), 7, dtype=torch.uint8)), info)


@pytest.mark.parametrize(("name", "cls"), DATASETS.items())
def test_configuration_and_constructor_agree(name: str, cls: type) -> None:
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    assert config.pop("_target_") == f"{cls.__module__}.{cls.__qualname__}"
    parameters = inspect.signature(cls).parameters.values()
    wanted = {p.name: "???" if p.default is inspect.Parameter.empty else p.default for p in parameters}
    assert config == wanted
    assert list(config) == list(wanted)
    for key in config:
        assert re.search(rf"^{key}:.*#.+", text, re.MULTILINE), f"{key} has no comment"
        assert re.search(rf"^\s+{key}: ", cls.__doc__ or "", re.MULTILINE), f"{key} is not documented"


def test_every_configuration_has_a_data_set() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(DATASETS)


@pytest.mark.parametrize("name", DATASETS)
def test_constructors_open_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDE_CACHE", str(tmp_path / "cache"))
    cls = DATASETS.get(name)
    needs_path = "path" in inspect.signature(cls).parameters
    dataset = cls(path=str(tmp_path / "absent")) if needs_path else cls()  # type: ignore[call-arg]
    assert dataset.random_flip is (name == "cifar10")
    assert not (tmp_path / "cache").exists()


def test_data_knows_nothing_of_the_rest_of_the_package() -> None:
    root = Path(__file__).parents[1]
    program = "import sys, sde.data; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert not {"hydra", "omegaconf", "wandb", "matplotlib", "datasets"} & set(result.stdout.split())
    for path in (root / "sde" / "data").glob("*.py"):
        for module in re.findall(r"^\s*(?:from|import) (sde\.\S+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert module in ("sde.errors", "sde.registry") or module.startswith("sde.data"), f"{path.name}: {module}"
