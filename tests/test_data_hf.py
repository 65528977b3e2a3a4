"""Data sets of the Hub: with a stand-in for the library `datasets`, and with the library itself where it is installed.

The stand-in has what `hf` uses of it: `load_dataset`, splits with `features`, columns and `select_columns`.
"""

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from sde.data.hf import HuggingFace
from sde.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDE_CACHE", str(tmp_path / "cache"))


class Image:
    """The type of a column of pictures."""


class Value:
    """The type of a column of numbers or text."""


class ClassLabel:
    """The type of a column of classes."""

    def __init__(self, names: list[str]) -> None:
        self.names = names


class Table:
    def __init__(self, columns: dict[str, list], features: dict[str, Any]) -> None:
        self._columns, self.features = columns, features

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, name: str) -> list:
        return self._columns[name]

    def select_columns(self, names: list[str]) -> list[dict]:
        return [{name: self._columns[name][i] for name in names} for i in range(len(self))]


def gray(level: int, size: int = 8) -> Pillow.Image:
    return Pillow.new("L", (size, size), level)


def table(levels: range, **more: tuple[Any, list]) -> Table:
    columns = {"img": (Image(), [gray(level) for level in levels])} | more
    return Table(
        {name: values for name, (_, values) in columns.items()}, {name: kind for name, (kind, _) in columns.items()}
    )


def classes(values: list[int]) -> tuple[Any, list]:
    return ClassLabel(["cat", "dog", "emu"]), values


class Hub:
    """Replaces the library; keeps what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, splits: Any) -> None:
        self.asked: list[tuple] = []
        module = ModuleType("datasets")

        def load_dataset(path: str, name: str | None, revision: str | None) -> Any:
            self.asked.append((path, name, revision))
            if isinstance(splits, Exception):
                raise splits
            return splits

        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)


def levels(dataset: HuggingFace, split: str = "train") -> list[int]:
    return dataset.split(split).values[:, 0, 0, 0].tolist()


def labels(dataset: HuggingFace, split: str = "train") -> list[int] | None:
    found = dataset.split(split).labels
    return None if found is None else found.tolist()


def test_pictures_labels_and_splits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": table(range(3), kind=classes([2, 0, 1])), "test": table(range(9, 11), kind=classes([1, 1]))}
    hub = Hub(monkeypatch, splits)
    dataset = HuggingFace("who/what", name="plain", revision="v1", size=8)
    assert hub.asked == []
    assert dataset.info.shape == (3, 8, 8)
    assert dataset.info.class_names == ("cat", "dog", "emu")
    assert (levels(dataset), labels(dataset)) == ([0, 1, 2], [2, 0, 1])
    assert (levels(dataset, "test"), labels(dataset, "test")) == ([9, 10], [1, 1])
    assert levels(HuggingFace("who/what", name="plain", revision="v1", size=8)) == [0, 1, 2]
    assert hub.asked == [("who/what", "plain", "v1")]  # once: afterwards it is in the cache
    assert HuggingFace("who/what", name="plain", revision="v1", size=8, channels=1).info.shape == (1, 8, 8)
    assert len(hub.asked) == 2


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_a_validation_split_serves_as_test(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    Hub(monkeypatch, {"train": table(range(3)), name: table(range(5, 6))})
    assert levels(HuggingFace("x", size=8), "test") == [5]


def test_splits_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, {"full": table(range(3)), "extra": table(range(5, 6)), "test": table(range(7, 8))})
    dataset = HuggingFace("x", train_split="full", test_split="extra", size=8)
    assert (levels(dataset), levels(dataset, "test")) == ([0, 1, 2], [5])
    with pytest.raises(UserError, match=r"train_split='train' is not in 'x', which has full, extra, test"):
        HuggingFace("x", size=8).split("train")
    with pytest.raises(UserError, match=r"test_split='tests' is not in.*did you mean 'test'"):
        HuggingFace("x", train_split="full", test_split="tests").split("train")


def test_without_a_test_split_a_fraction_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, {"train": table(range(20), label=(Value(), list(range(20))))})
    dataset = HuggingFace("x", size=8, test_fraction=0.2)
    assert len(dataset.split("test")) == 4
    assert labels(dataset, "test") == levels(dataset, "test")
    assert sorted(levels(dataset) + levels(dataset, "test")) == list(range(20))
    with pytest.raises(UserError, match="name one with test_split, or set test_fraction above 0"):
        HuggingFace("x", size=8, test_fraction=0).split("test")


def test_pictures_come_in_many_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    gray(3).save(file, "PNG")
    forms = [gray(3), file.getvalue(), {"bytes": file.getvalue(), "path": None}, np.full((8, 8), 3), [[3] * 8] * 8]
    Hub(monkeypatch, {"train": Table({"picture": forms}, {"picture": Value()})})
    assert levels(HuggingFace("x", image_key="picture", size=8, test_fraction=0)) == [3] * 5


@pytest.mark.parametrize("form", ["text", None, {"bytes": None, "path": "x"}, [300], b"no picture"])
def test_a_picture_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    Hub(monkeypatch, {"train": Table({"picture": [gray(1), form]}, {"picture": Image()})})
    with pytest.raises(UserError, match=r"picture 1 of 'x' .*not a picture"):
        HuggingFace("x", size=8).split("train")


def test_columns_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"second": (Image(), [gray(9)] * 2), "fine": classes([0, 1]), "coarse": classes([1, 1])}
    Hub(monkeypatch, {"train": table(range(2), **more)})
    dataset = HuggingFace("x", image_key="second", label_key="coarse", size=8, test_fraction=0)
    assert (levels(dataset), labels(dataset)) == ([9, 9], [1, 1])
    none = HuggingFace("x", image_key="img", label_key="none", size=8, test_fraction=0)
    assert (levels(none), labels(none), none.info.num_classes) == ([0, 1], None, 0)
    with pytest.raises(UserError, match=r"several columns of pictures \(img, second\): set image_key"):
        HuggingFace("x").split("train")
    with pytest.raises(UserError, match="several columns of classes: set label_key to one of fine, coarse"):
        HuggingFace("x", image_key="img").split("train")
    with pytest.raises(UserError, match=r"image_key='im' is not a column.*did you mean 'img'"):
        HuggingFace("x", image_key="im").split("train")
    with pytest.raises(UserError, match="label_key='rough' is not a column"):
        HuggingFace("x", image_key="img", label_key="rough").split("train")


def test_labels_that_are_text_or_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, {"train": table(range(2), label=(Value(), ["emu", "cat"]))})
    dataset = HuggingFace("x", size=8, test_fraction=0)
    assert (labels(dataset), dataset.info.class_names) == ([1, 0], ("cat", "emu"))
    Hub(monkeypatch, {"train": table(range(2), label=classes([0, 1])), "test": table(range(1), label=classes([-1]))})
    with pytest.raises(UserError, match="does not tell all classes"):
        HuggingFace("secret", size=8).split("train")
    assert labels(HuggingFace("secret", size=8, label_key="none"), "test") is None


def test_data_sets_that_cannot_be_had_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, FileNotFoundError("Dataset 'x' doesn't exist\non the Hub"))
    with pytest.raises(UserError, match=r"'x' cannot be had \(Dataset 'x' doesn't exist on the Hub\)"):
        HuggingFace("x").split("train")
    Hub(monkeypatch, [1, 2])
    with pytest.raises(UserError, match="has no splits"):
        HuggingFace("x").split("train")
    Hub(monkeypatch, {"train": Table({"text": []}, {"text": Value()})})
    with pytest.raises(UserError, match="is empty"):
        HuggingFace("x").split("train")
    Hub(monkeypatch, {"train": Table({"text": ["a"]}, {"text": Value()})})
    with pytest.raises(UserError, match="no column of pictures: set image_key to one of text"):
        HuggingFace("x").split("train")
    Hub(monkeypatch, {"train": Table({"img": [gray(1), gray(1, 9)]}, {"img": Image()})})
    with pytest.raises(UserError, match=r"picture 1 of 'x' has shape \(3, 9, 9\)"):
        HuggingFace("x", size=None, resize="none").split("train")


def test_the_missing_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'sde\[hf\]'"):
        HuggingFace("x").split("train")


@pytest.mark.parametrize(
    "options", [{"path": ""}, {"size": -1}, {"channels": 2}, {"resize": 1}, {"test_fraction": 2}, {"seed": 0.5}]
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    (name,) = options
    with pytest.raises(UserError, match=name):
        HuggingFace(**{"path": "x"} | options)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the library datasets")
def test_the_library_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of pictures, which `datasets.load_dataset` reads without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home")
    for split, name, level in (("train", "cat", 1), ("train", "dog", 2), ("test", "dog", 3), ("train", "dog", 4)):
        path = tmp_path / "pictures" / split / name / f"{level}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        gray(level).save(path)
    dataset = HuggingFace(str(tmp_path / "pictures"), size=8)
    assert dataset.info.class_names == ("cat", "dog")
    assert sorted(zip(levels(dataset), labels(dataset) or [], strict=True)) == [(1, 0), (2, 1), (4, 1)]
    assert (levels(dataset, "test"), labels(dataset, "test")) == ([3], [1])
