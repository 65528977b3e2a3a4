"""Features of TorchScript modules: known answers, and nothing loaded that is not trusted or would touch files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sde.errors import UserError
from sde.evaluate import reader_of
from sde.evaluation.card import comparable
from sde.evaluation.classifier import resized
from sde.evaluation.torchscript import FILES, TorchScript, forbidden_calls
from tests.commands import TINY, command
from tests.test_extractors import CPU, Fixed, pixels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Moments(nn.Module):
    """Means and mean squares of channels; control flow, lists and dictionaries, which make TorchScript code long."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.last = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, squares: bool = True) -> Tensor:
        found = {"mean": x.flatten(2).mean(2)}
        parts = [found[name] for name in found]
        if squares:
            parts.append(x.square().flatten(2).mean(2))
        assert len(parts) > 0, f"no parts of {x.shape}"
        return self.scale * torch.cat(parts, 1)


class Maps(nn.Module):
    """Features (B, D, h, w) and logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :, ::2], x.mean((2, 3))


class Writer(nn.Module):
    """Writes a file when it is called."""

    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "written")
        return x.flatten(1)


class Reader(nn.Module):
    """Reads a file when it is called."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_file("secret", size=1) + x.flatten(1)


class Raiser(nn.Module):
    """Raises an error of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim > 2:
            raise ValueError("wants vectors")
        return x


def saved(path: Path, module: nn.Module) -> str:
    """A file of the module."""
    torch.jit.save(torch.jit.script(module.eval()), str(path))
    return str(path)


def prepared(values: Tensor, path: str, **options: Any) -> TorchScript:
    extractor = TorchScript(path, trusted=True, **options)
    extractor.prepare(Fixed(values), CPU)
    return extractor


def test_features_are_those_of_the_module(tmp_path: Path) -> None:
    x, path = pixels(5, 3, 6, 4), saved(tmp_path / "moments.pt", Moments())
    for name, y in (("unit", x / 127.5 - 1), ("zero_one", x / 255), ("bytes", x.float())):
        found = prepared(x, path, range=name)(x)
        flat = y.double().flatten(2)
        expected = 2 * torch.cat([flat.mean(2), flat.square().mean(2)], 1)
        torch.testing.assert_close(found.features.double(), expected, rtol=1e-5, atol=1e-5)
        assert found.probabilities is None
    fewer = prepared(x, path, arguments={"squares": False}, range="zero_one", mean=[0.1, 0.2, 0.3], std=[0.5])
    expected = 2 * ((x / 255).mean((2, 3)) - torch.tensor([0.1, 0.2, 0.3])) / 0.5
    torch.testing.assert_close(fewer(x).features, expected)
    assert fewer.describe()["dimensions"] == 3
    assert fewer.describe()["arguments"] == {"squares": False}


def test_gray_pictures_of_another_size(tmp_path: Path) -> None:
    x = pixels(3, 1, 7, 7)
    extractor = prepared(x, saved(tmp_path / "moments.pt", Moments()), range="bytes", color=True, size=12)
    scaled = resized(x, (12, 12)).float().expand(-1, 3, -1, -1)
    torch.testing.assert_close(extractor(x).features, Moments()(scaled))
    assert extractor(pixels(2, 1, 9, 9)).features.shape == (2, 6)  # samples may have a size of their own


def test_maps_are_averaged_and_logits_are_probabilities(tmp_path: Path) -> None:
    x, path = pixels(4, 2, 4, 4), saved(tmp_path / "maps.pt", Maps())
    extractor = prepared(x, path, range="zero_one", logits=True)
    found = extractor(x)
    torch.testing.assert_close(found.features, x[:, :, ::2].float().mean((2, 3)) / 255)
    torch.testing.assert_close(found.probabilities, (x / 255).mean((2, 3)).softmax(1))
    assert extractor.classifies
    assert not prepared(x, path).classifies


def test_vectors_are_given_as_they_are(tmp_path: Path) -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(3, 5)
    path = saved(tmp_path / "linear.pt", layer)
    torch.testing.assert_close(prepared(x, path)(x).features, layer(x).detach())
    with pytest.raises(UserError, match="holds vectors"):
        prepared(x, path, size=4)


def test_identity_is_of_content_and_options(tmp_path: Path) -> None:
    x, path = pixels(3, 3, 4, 4), saved(tmp_path / "a.pt", Moments())
    other = tmp_path / "elsewhere.pt"
    other.write_bytes(Path(path).read_bytes())
    known = {
        prepared(x, path).identity(),
        prepared(x, path, range="bytes").identity(),
        prepared(x, path, mean=[0.5]).identity(),
        prepared(x, path, std=[0.5]).identity(),
        prepared(x, path, size=8).identity(),
        prepared(x, path, arguments={"squares": False}).identity(),
        prepared(x, saved(tmp_path / "b.pt", Maps())).identity(),
    }
    assert len(known) == 7
    assert prepared(x, path).identity() == prepared(x, str(other)).identity()


def test_traced_modules_of_torch_are_allowed(tmp_path: Path) -> None:
    """Convolutions, normalization, attention, interpolation: the check of the code stops none of these."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Upsample(size=(6, 6), mode="bilinear")]
    network = nn.Sequential(
        *layers, nn.Flatten(2), nn.TransformerEncoderLayer(36, 2, 8, batch_first=True), nn.Flatten()
    )
    x = pixels(3, 3, 8, 8)
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(network.eval(), torch.zeros(2, 3, 8, 8)), str(tmp_path / "traced.pt"))
        expected = network(x.float())
    found = prepared(x, str(tmp_path / "traced.pt"), range="bytes")(x).features
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# What is not loaded


def rewritten(source: str, path: Path, change: Callable[[str], str]) -> str:
    """A copy of an archive under other names."""
    with zipfile.ZipFile(source) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            bad.writestr(change(name), good.read(name))
    return str(path)


@pytest.mark.parametrize("old_and_new", [("/code/", "/CODE/"), (".py", ".PY")])
def test_code_is_found_under_any_name_that_torch_finds(tmp_path: Path, old_and_new: tuple[str, str]) -> None:
    source = saved(tmp_path / "bad.pt", Writer())
    path = rewritten(source, tmp_path / "other.pt", lambda name: name.replace(*old_and_new))
    with pytest.raises(UserError, match=r"calls torch\.save"):
        prepared(pixels(2, 3, 4, 4), path)


def test_a_module_that_raises_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be called with") as raised:
        prepared(pixels(2, 3, 4, 4), saved(tmp_path / "r.pt", Raiser()))
    assert "wants vectors" in str(raised.value)


def test_where_a_file_lies_makes_no_other_evaluation(tmp_path: Path) -> None:
    def record(path: str) -> dict[str, Any]:
        about = prepared(pixels(3, 3, 4, 4), path).describe()
        record: dict[str, Any] = {"features": about, "reference": {"features": about, "hash": "a"}, "n": 3, "data": {}}
        return record

    path = saved(tmp_path / "a.pt", Moments())
    other = tmp_path / "b.pt"
    other.write_bytes(Path(path).read_bytes())
    assert comparable(record(path)) == comparable(record(str(other)))
    assert comparable(record(path)) != comparable(record(saved(tmp_path / "c.pt", Maps())))


def test_nothing_is_loaded_without_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "moments.pt", Moments())
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(UserError, match=r"is a program: with features\.trusted=true it is loaded"):
        TorchScript(path).prepare(Fixed(pixels(2, 3, 4, 4)), CPU)


@pytest.mark.parametrize(("module", "call"), [(Writer(), r"torch\.save"), (Reader(), r"torch\.from_file")])
def test_modules_that_touch_files_are_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: nn.Module, call: str
) -> None:
    path = saved(tmp_path / "bad.pt", module)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"calls {call} in .*: it is not loaded"):
        prepared(pixels(2, 3, 4, 4), path)
    assert not (tmp_path / "written").exists()
    if isinstance(module, Writer):  # the danger is real
        torch.jit.load(path)(torch.zeros(1, 2))
        assert (tmp_path / "written").exists()


def test_no_other_operation_of_torch_takes_the_name_of_a_file() -> None:
    """Of all schemas of torch's own operations only those that are refused have an argument called so."""
    found = set()
    for schema in torch._C._jit_get_all_schemas():
        library, _, name = schema.name.partition("::")
        texts = [a.name for a in schema.arguments if "str" in str(a.type)]
        if library in ("aten", "prim") and any(word in text for text in texts for word in ("file", "path", "dir")):
            found.add(name)
    assert found == {*FILES}


@pytest.mark.parametrize(
    "code",
    [
        "def forward(self, x):\n  ops.c10d.send(x)",
        "def forward(self, x):\n  y = (x).save('a')",
        "def forward(self, x):\n  torch . save (x, 'a')",
        "def forward(self, x:\n",
        "def forward(self, x):\n  getattr(torch, 'save')(x, 'a')",
        "def forward(self, x):\n  getattr(self, 'save')(x, 'a')",
        "def forward(self, x):\n  y = getattr\n  y(x, 'save')",
        "def forward(self, x):\n  getattr(x, x)",
        "def forward(self, x):\n  y = ops\n  y.mkldnn.f(x)",
        "import os",
    ],
)
def test_calls_that_are_more_than_a_network_needs(code: str) -> None:
    assert list(forbidden_calls(code))
    assert not list(
        forbidden_calls("def forward(self, x):\n  ops.prim.NumToTensor(torch.size(getattr(self, '0')(x), 0))")
    )


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    x = pixels(2, 3, 4, 4)
    with pytest.raises(UserError, match="does not exist"):
        prepared(x, str(tmp_path / "none.pt"))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="holds weights without a network"):
        prepared(x, str(tmp_path / "weights.pt"))
    path = Path(saved(tmp_path / "moments.pt", Moments()))
    (tmp_path / "half.pt").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="damaged or no TorchScript archive"):
        prepared(x, str(tmp_path / "half.pt"))
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name))
        place = next(info.header_offset for info in bad.infolist() if info.filename.endswith(".py"))
    content = bytearray((tmp_path / "packed.pt").read_bytes())
    for k in range(place + 60, place + 120):
        content[k] ^= 0xFF
    (tmp_path / "packed.pt").write_bytes(content)
    with pytest.raises(UserError, match="damaged or no TorchScript archive"):
        prepared(x, str(tmp_path / "packed.pt"))
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(tmp_path / "lacking.pt", "w") as bad:
        for name in good.namelist():
            if not name.endswith("data.pkl"):
                bad.writestr(name, good.read(name))
    with pytest.raises(UserError, match=r"is damaged: torch\.jit\.load says"):
        prepared(x, str(tmp_path / "lacking.pt"))
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(tmp_path / "twice.pt", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name))
        code = next(name for name in good.namelist() if name.endswith(".py"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            bad.writestr(code, "another program")
    with pytest.raises(UserError, match="damaged or no TorchScript archive"):
        prepared(x, str(tmp_path / "twice.pt"))


def test_calls_that_fail_are_one_sentence(tmp_path: Path) -> None:
    gray, path = pixels(2, 1, 4, 4), saved(tmp_path / "moments.pt", Moments())
    conv = saved(tmp_path / "conv.pt", nn.Conv2d(3, 4, 1))
    with pytest.raises(
        UserError, match=r"cannot be called with \(2, 1, 4, 4\) in unit .* see features\.color"
    ) as raised:
        prepared(gray, conv)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="and sqares=False"):
        prepared(gray, path, arguments={"sqares": False})
    with pytest.raises(UserError, match=r"returns \[\(2, 3, 4, 4\)\].* and logits"):
        prepared(pixels(2, 3, 4, 4), saved(tmp_path / "same.pt", nn.Identity()), logits=True)
    with pytest.raises(UserError, match=r"returns \[\(96,\)\] of B = 2: it must be \(B, D\)"):
        prepared(pixels(2, 3, 4, 4), saved(tmp_path / "flat.pt", nn.Flatten(0)))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("trusted", "yes", "features.trusted"),
        ("range", "units", "did you mean 'unit'"),
        ("size", 0, "features.size"),
        ("mean", "0.5", "must be a list of numbers"),
        ("std", [0.5, 0.0, 0.5], "must be a list of numbers above 0"),
        ("arguments", ["a"], "must be names and values"),
    ],
)
def test_options_are_checked(option: str, value: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        TorchScript(**{"path": "network.pt", option: value})
    with pytest.raises(UserError, match="2 numbers and pictures have 3 channels"):
        TorchScript("network.pt", mean=[0.5, 0.5])._check(Fixed(pixels(2, 3, 4, 4)).info)


def test_files_are_read_by_their_kind() -> None:
    assert reader_of("folder/network.pt") == "torchscript"
    assert reader_of("classifier.safetensors") == "module"
    assert reader_of("program.pt2") == "module"  # which says that it is not read


def test_the_command_takes_a_file(tmp_path: Path) -> None:
    done = command("sde.train", *TINY, "hydra.run.dir=runs/g", folder=tmp_path)
    assert done.code == 0, done.err
    saved(tmp_path / "network.pt", nn.Flatten())
    samples = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", samples=samples)
    words = ["samples=samples.npz", "features=network.pt", "metric=fd", "groups=3", "out=results"]
    refused = command("sde.evaluate", *words, folder=tmp_path)
    assert refused.code == 2
    assert "features.trusted=true" in refused.err
    words += ["features.trusted=true", "features.arguments={x: 1}"]
    done = command("sde.evaluate", *words, folder=tmp_path)
    assert done.code == 2
    assert "and x=1" in done.err
    done = command("sde.evaluate", *words[:-1], folder=tmp_path)
    assert done.code == 0, done.err
    card = next((tmp_path / "results").glob("*.md")).read_text()
    assert "FD-torchscript-12" in card
