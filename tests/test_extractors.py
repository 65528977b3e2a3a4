"""Features: known answers, the same bits whenever asked, an identity for every difference, a sentence for errors."""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sde.config import build, conf_dir
from sde.data import DATASETS, DataInfo, Dataset, Split
from sde.errors import UserError
from sde.evaluation import classifier
from sde.evaluation.classifier import FACTS, WEIGHTS, Classifier, ClassifierNetwork, Module, resized, steps_for
from sde.evaluation.digests import digest_of_tensors
from sde.evaluation.extractors import EXTRACTORS, Examples, Extractor, Random, RandomNetwork, chosen_for
from sde.evaluation.pretrained import DINOv2, Inception, weights_alone
from tests.pictures_of_shapes import SIDE, Bars

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"width": 8, "steps": 60, "batch_size": 32}


class Fixed(Dataset):
    """Given examples under either name."""

    def __init__(self, values: Tensor, labels: Tensor | None = None) -> None:
        kind = "pixels" if values.dtype == torch.uint8 else "vectors"
        self._split = Split(values, labels)
        self._info = DataInfo("fixed", tuple(values.shape[1:]), 0 if labels is None else 2, kind=kind)

    @property
    def info(self) -> DataInfo:
        """Of the given examples."""
        return self._info

    def split(self, name: str) -> Split:
        """The given examples."""
        return self._split


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def prepared(extractor: Extractor, dataset: Dataset) -> Extractor:
    extractor.prepare(dataset, CPU)
    return extractor


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# The examples themselves


def test_vectors_are_their_own_features() -> None:
    x = torch.randn(5, 3, 2)
    features, probabilities = prepared(Examples(), Fixed(x))(x)
    assert torch.equal(features, x.flatten(1))
    assert probabilities is None


def test_pixels_are_in_the_unit_range_whatever_the_network_sees() -> None:
    x = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    features = prepared(Examples(), Fixed(x))(x).features
    expected = torch.linspace(-1, 1, 256, dtype=torch.float64).reshape(4, 64)
    assert float((features - expected).abs().max()) < 2**-23
    assert features.dtype == torch.float32


# The random network


def test_random_features_are_those_of_matrix_products_in_float64() -> None:
    """Three convolutions of stride 2, written as products of unfolded patches, and means over cells."""
    x = pixels(3, 2, 16, 12)
    extractor = prepared(Random(seed=4), Fixed(x))
    h, found = x.double() / 127.5 - 1, []
    network = RandomNetwork(2, 4).requires_grad_(False)
    for depth, layer in enumerate(network.layers):
        assert isinstance(layer, nn.Conv2d)
        assert layer.bias is not None
        height, width = (-(-side // 2) for side in h.shape[2:])
        patches = F.unfold(h, 3, padding=1, stride=2)
        h = (layer.weight.double().flatten(1) @ patches + layer.bias.double()[:, None]).unflatten(2, (height, width))
        h = torch.where(h > 0, h, 0.2 * h)
        if depth < 2:
            found.append(h.mean((2, 3)))
    assert h.shape[2:] == (2, 2)  # each quarter is one pixel
    found.append(h.flatten(1))
    expected = torch.cat(found, 1)
    features = extractor(x).features
    assert features.shape == expected.shape == (3, 512)
    # a sum of at most 9 * 64 products in each of three layers
    assert float((features - expected).abs().max()) < 3 * 576 * 2**-24 * float(expected.abs().max())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (4, 5, 7), (3, 64, 64), (1, 1, 1)])
def test_random_features_of_any_pictures(shape: tuple[int, ...]) -> None:
    x = pixels(7, *shape)
    extractor = prepared(Random(), Fixed(x))
    whole = extractor(x).features
    assert whole.shape == (7, 512)
    parts = torch.cat([extractor(part).features for part in x.split(2)])
    assert float((parts - whole).abs().max()) <= 1e-6 * float(whole.abs().max())
    assert len({tuple(row.tolist()) for row in whole}) == 7


def test_random_weights_are_the_same_bits_everywhere() -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 - the global one
    extractor = prepared(Random(), Fixed(pixels(1, 3, 8, 8)))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert extractor._network is not None
    state = extractor._network.state_dict()
    for value in state.values():
        assert torch.equal(value * 2**16, (value * 2**16).round())
    # recorded once; another NumPy or LAPACK that changes it changes every number
    assert digest_of_tensors(state)[:16] == "8b4ae2dfe99711bb"


def test_random_weights_are_orthogonal() -> None:
    for layer in RandomNetwork(3, 1).layers:
        assert isinstance(layer, nn.Conv2d)
        weight = layer.weight.detach().double().flatten(1)
        gram = weight @ weight.mT if weight.shape[0] <= weight.shape[1] else weight.mT @ weight
        gram = gram / gram.diagonal().mean()
        # weights are off by 2^-17, and rows have norm 1.4 or more
        assert float((gram - torch.eye(len(gram))).abs().max()) < 2**-15 * weight.shape[1] ** 0.5


def test_another_seed_is_another_network() -> None:
    x = pixels(2, 1, 8, 8)
    one, two = (prepared(Random(seed=seed), Fixed(x)) for seed in (0, 1))
    assert one.identity() != two.identity()
    assert not torch.allclose(one(x).features, two(x).features)
    assert one.identity() == prepared(Random(), Fixed(pixels(9, 1, 8, 8, seed=3))).identity()
    assert one.identity() != prepared(Random(), Fixed(pixels(9, 1, 8, 9))).identity()


def test_precision_of_products_is_put_back() -> None:
    x = pixels(2, 1, 8, 8)
    extractor = prepared(Random(), Fixed(x))
    exact = extractor(x).features
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(extractor(x).features, exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


# A trained classifier


def test_a_classifier_learns_bars_and_says_how_well(cache: Path) -> None:
    dataset = Bars()
    extractor = prepared(Classifier(**QUICK), dataset)
    test = dataset.split("test")
    features, probabilities = extractor(test.values)
    assert probabilities is not None
    assert features.shape == (60, 32)
    assert torch.allclose(probabilities.sum(1), torch.ones(60), atol=1e-6)
    right = float((probabilities.argmax(1) == test.labels).double().mean())
    described = extractor.describe()
    assert described["test_accuracy"] == pytest.approx(right, abs=1e-12)
    assert right >= 0.95
    assert described["dimensions"] == 32
    assert described["identity"] == extractor.identity()
    network = extractor._network
    assert isinstance(network, ClassifierNetwork)
    assert torch.allclose(network.last(features).softmax(1), probabilities, atol=1e-6)
    parts = torch.cat([extractor(part).features for part in test.values.split(7)])
    assert float((parts - features).abs().max()) <= 1e-5 * float(features.abs().max())


def test_a_classifier_is_trained_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(Classifier(**QUICK), Bars(flip=True))
    before = torch.random.get_rng_state()
    trained: list[Any] = []
    train = classifier.train_classifier
    monkeypatch.setattr(classifier, "train_classifier", lambda *args: trained.append(args) or train(*args))
    again = prepared(Classifier(**QUICK), Bars(flip=True))
    assert not trained
    assert again.identity() == first.identity()
    assert again.describe() == first.describe()
    others = [(QUICK | {"seed": 1}, Bars(flip=True)), (QUICK, Bars(flip=False)), (QUICK, Bars(flip=True, train=299))]
    for count, (options, dataset) in enumerate(others, 1):
        assert prepared(Classifier(**options), dataset).identity() != first.identity()
        assert len(trained) == count
    assert torch.equal(before, torch.random.get_rng_state())
    changed = Bars(flip=True)
    changed.split("test").values[0, 0, 0, 0] += 1
    assert prepared(Classifier(**QUICK), changed).identity() == first.identity()  # the same training ...
    assert len(trained) == 4  # ... whose accuracy was measured anew


@pytest.mark.parametrize("file", [WEIGHTS, FACTS])
@pytest.mark.parametrize("how", ["a byte", "the end", "all"])
def test_a_damaged_classifier_is_trained_again(
    file: str, how: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, options = Bars(train=40, test=6), {"width": 2, "steps": 2, "batch_size": 8}
    identity = prepared(Classifier(**options), dataset).identity()
    (path,) = cache.glob(f"classifier-*/{file}")
    content = path.read_bytes()
    middle = content.index(b'"weights"') + 15 if file == FACTS else len(content) - 20
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    damaged = {"a byte": flipped, "the end": content[:-9]}
    path.write_bytes(damaged.get(how, b""))
    capsys.readouterr()
    assert prepared(Classifier(**options), dataset).identity() == identity
    assert "is damaged: it is trained again" in capsys.readouterr().err
    assert path.read_bytes() == content


def test_an_interrupted_training_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for function in ("accuracy", "write_weights"):
        with monkeypatch.context() as patch:
            patch.setattr(classifier, function, interrupt)
            with pytest.raises(KeyboardInterrupt):
                prepared(Classifier(width=2, steps=1), Bars(train=40))
        assert [path for path in cache.rglob("*") if path.suffix != ".lock"] == []


def test_small_data_take_fewer_steps() -> None:
    options = Classifier(steps=700, epochs=25, batch_size=128)
    assert [steps_for(options, n) for n in (1, 128, 1000, 3584, 60_000)] == [1, 25, 195, 700, 700]


def test_larger_pictures_are_halved_first() -> None:
    for side in (28, 32, 33, 64, 200):
        network = ClassifierNetwork((3, side, side), 5, 4)
        deep = network.layers(torch.zeros(1, 3, side, side))
        assert deep.shape[1:2] == (16,)
        assert 3 <= deep.shape[2] <= 4
        features, logits = network(torch.zeros(2, 3, side, side))
        assert (features.shape, logits.shape) == ((2, 16), (2, 5))


@pytest.mark.slow
def test_a_classifier_learns_digits(shared: Path, cache: Path) -> None:
    """With half of the width and a third of the steps that it has unless told otherwise."""
    dataset = DATASETS.get("mnist")(root=str(shared / "data" / "mnist"), size=28, download=False)  # type: ignore[call-arg]
    described = prepared(Classifier(width=16, steps=250), dataset).describe()
    assert described["test_accuracy"] >= 0.975


# A classifier from a file


def test_a_classifier_can_be_given_away(cache: Path, tmp_path: Path) -> None:
    dataset = Bars()
    made = prepared(Classifier(**QUICK), dataset)
    path = Path(made.describe()["file"])
    other = tmp_path / "given.safetensors"
    other.write_bytes(path.read_bytes())
    unlabelled = Bars(labels=False)
    given = prepared(Module(str(other)), unlabelled)
    x = unlabelled.split("test").values
    for ours, theirs in zip(given(x), made(x), strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    assert given.identity() == prepared(Module(str(path)), unlabelled).identity()
    larger = pixels(3, 1, 20, 20)
    with pytest.raises(UserError, match=r"is for pictures of shape \(1, 12, 12\) .* set features.resize=true"):
        prepared(Module(str(other)), Fixed(larger))
    scaled = prepared(Module(str(other), resize=True), Fixed(larger))
    assert torch.equal(scaled(larger).features, given(resized(larger, (SIDE, SIDE))).features)
    assert "bicubic" in scaled.describe()["resize"]
    with pytest.raises(UserError, match="give one for as many channels"):
        prepared(Module(str(other), resize=True), Fixed(pixels(3, 3, 12, 12)))


def test_files_that_are_no_classifier_are_refused(tmp_path: Path) -> None:
    def load(path: Path) -> None:
        prepared(Module(str(path)), Bars())

    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "none.safetensors")
    script = tmp_path / "script.pt"
    script.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"is not a \.safetensors file, and others can run code"):
        load(script)
    strange = tmp_path / "strange.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, strange)
    with pytest.raises(UserError, match="holds no classifier of this package"):
        load(strange)
    good = {"version": 1, "shape": [1, 12, 12], "num_classes": 3, "width": 4}
    for change in ({"width": 10**9}, {"width": "4"}, {"shape": []}, {"shape": [1, 1e300, 1]}, {"num_classes": None}):
        header = {"classifier": json.dumps({**good, **change})}
        safetensors.torch.save_file({"x": torch.zeros(1)}, strange, header)
        with pytest.raises(UserError, match="holds no classifier of this package"):
            load(strange)
    safetensors.torch.save_file({"x": torch.zeros(1)}, strange, {"classifier": '{"version": 9}'})
    with pytest.raises(UserError, match="has version 9 and this package reads version 1"):
        load(strange)


# Networks of others, of which stand-ins are loaded here


class StandInInception(nn.Module):
    """Takes what torch-fidelity's network takes, and remembers it."""

    def __init__(self, name: str, features_list: list[str]) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        self.weight = nn.Parameter(torch.arange(3.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        mean = x.float().mean((2, 3))
        return mean * self.weight, mean


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    for depth in range(1, len(name.split(".")) + 1):
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:depth]), types.ModuleType(name))
    vars(sys.modules[name]).update(content)


def test_inception_sees_three_channels_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "torch_fidelity.feature_extractor_inceptionv3", FeatureExtractorInceptionV3=StandInInception)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    gray = pixels(4, 1, 6, 6)
    extractor = prepared(Inception(), Fixed(gray))
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    features, probabilities = extractor(gray)
    mean = gray.float().mean((1, 2, 3))
    assert torch.allclose(features, mean[:, None] * torch.arange(3.0))
    assert probabilities is not None
    assert torch.allclose(probabilities, torch.full((4, 3), 1 / 3))
    assert extractor(pixels(2, 1, 9, 9)).features.shape == (2, 3)  # of any size
    assert "TensorFlow 1" in extractor.describe()["resize"]
    before = extractor.identity()
    monkeypatch.setattr(StandInInception, "__init__", lambda self, *_: _moved(self))
    assert prepared(Inception(), Fixed(gray)).identity() != before  # other weights under the same name


def _moved(self: Any) -> None:
    nn.Module.__init__(self)
    self.weight = nn.Parameter(torch.arange(3.0) + 1)


class StandInDINO(nn.Module):
    """Answers with the mean of each channel."""

    asked: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(hidden_size=3)
        self.weight = nn.Parameter(torch.ones(1))

    @classmethod
    def from_pretrained(cls, repo: str, **options: Any) -> StandInDINO:
        cls.asked = repo, options
        return cls()

    def forward(self, pixel_values: Tensor) -> Any:
        assert pixel_values.shape[2:] == (224, 224)
        return types.SimpleNamespace(pooler_output=pixel_values.mean((2, 3)))


def test_dinov2_sees_normalized_pictures_of_224_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "transformers", Dinov2Model=StandInDINO)
    x = torch.tensor([0, 100, 255], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 8, 8)
    extractor = prepared(DINOv2(), Fixed(x.contiguous()))
    assert StandInDINO.asked == ("facebook/dinov2-large", {"revision": "main", "use_safetensors": True})
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (x[:, :, 0, 0].double() / 255 - mean) / std
    assert torch.allclose(extractor(x).features.double(), expected, atol=1e-5)
    assert extractor.describe()["dimensions"] == 3
    assert extractor(x).probabilities is None


def test_scaling_is_that_of_pillow() -> None:
    """Pillow has weights of 22 bits, so that a value at an edge between gray levels may be rounded the other way.

    That moves a pixel by one level in the rows, and by less than two in the columns, whose weights add up to under 1.5.
    """
    x = pixels(2, 3, 40, 32)
    for size in ((12, 12), (64, 48), (224, 224), (40, 64), (20, 32)):
        found = resized(x, size)
        pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in x]
        expected = np.stack([np.asarray(p.resize(size[::-1], Image.Resampling.BICUBIC)) for p in pictures])
        off = (found.permute(0, 2, 3, 1).int() - torch.from_numpy(expected).int()).abs()
        assert int(off.max()) <= 2
        assert float((off > 0).double().mean()) < 0.005  # halves that are rounded to even make it 0.011
    assert resized(x, (40, 32)) is x


@pytest.mark.parametrize(
    ("cls", "package", "extra"), [(Inception, "torch-fidelity", "fid"), (DINOv2, "transformers", "dino")]
)
def test_a_package_that_is_missing_is_named(
    cls: type[Extractor], package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=rf'needs the package {package} \(pip install "sde\[{extra}\]"\)'):
        prepared(cls(), Bars())


def test_weights_that_cannot_be_had_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ConnectionError("no route to host\nand more")

    stand_in(monkeypatch, "torch_fidelity.feature_extractor_inceptionv3", FeatureExtractorInceptionV3=fail)
    with pytest.raises(UserError, match=r"cannot be had \(ConnectionError: no route to host\): check the network"):
        prepared(Inception(), Bars())


def test_a_download_can_run_nothing(tmp_path: Path) -> None:
    """What a package reads with weights_only=False, as torch.hub does, is read safely all the same."""
    path = tmp_path / "weights.pth"
    torch.save({"x": Evil()}, path)
    with weights_alone(), pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=False)


class Evil:
    """An object whose pickle calls a function."""

    def __reduce__(self) -> Any:
        return os.getcwd, ()


# What all have


def test_data_without_such_features_are_refused() -> None:
    vectors, strange = Fixed(torch.randn(4, 2)), Fixed(pixels(2, 5, 8, 8))
    for extractor in (Random(), Classifier(), Inception(), DINOv2()):
        with pytest.raises(UserError, match=r"are of pictures, and fixed holds vectors of shape \(2,\)"):
            extractor.prepare(vectors, CPU)
    with pytest.raises(UserError, match="learns labels, and bars has none"):
        Classifier().prepare(Bars(labels=False), CPU)
    for extractor in (Inception(), DINOv2()):
        with pytest.raises(UserError, match="has 5 channels"):
            extractor.prepare(strange, CPU)


def test_examples_unlike_the_data_are_refused() -> None:
    extractor = prepared(Random(), Fixed(pixels(2, 1, 8, 8)))
    with pytest.raises(UserError, match=r"shape \(1, 9, 9\) cannot be compared with fixed, whose shape is \(1, 8, 8\)"):
        extractor(pixels(2, 1, 9, 9))
    with pytest.raises(UserError, match="give uint8 pixels"):
        extractor(torch.zeros(2, 1, 8, 8))
    with pytest.raises(UserError, match="give float32"):
        prepared(Examples(), Fixed(torch.randn(4, 2)))(torch.zeros(1, 2, dtype=torch.float64))


def test_options_are_checked() -> None:
    for make, match in (
        (lambda: Random(seed=-1), "features.seed=-1"),
        (lambda: Classifier(steps=0), "features.steps=0"),
        (lambda: Classifier(batch_size=1), "features.batch_size=1"),
        (lambda: Classifier(lr=0.0), "features.lr=0.0"),
        (lambda: DINOv2(size=225), "must be a multiple of 14"),
    ):
        with pytest.raises(UserError, match=match):
            make()


def test_auto_suits_the_data() -> None:
    assert isinstance(chosen_for(Bars().info), Classifier)
    assert isinstance(chosen_for(Bars(labels=False).info), Random)
    assert isinstance(chosen_for(DATASETS.get("gaussians")().info), Examples)


def test_every_extractor_is_chosen_by_its_name() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for name in EXTRACTORS:
            words = [f"+features={name}", *(["features.path=x.safetensors"] if name == "module" else [])]
            node = OmegaConf.to_container(compose("train", overrides=words).features)
            assert isinstance(node, dict)
            extractor = build({str(key): value for key, value in node.items()}, "features")
            assert extractor.name == name
            assert not extractor.prepared
        assert compose("train", overrides=["+features=auto"]).features._target_ is None
