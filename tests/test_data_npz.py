"""Arrays in NumPy files: pictures and sequences of every layout, vectors, labels, divisions, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sde.data.npz import Npz
from sde.errors import UserError

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (10, 3, 6, 8), dtype=np.uint8)
LABELS = np.arange(10) % 3


def save(root: Path, **arrays: Any) -> str:
    np.savez(root / "arrays.npz", **arrays)
    return str(root / "arrays.npz")


@pytest.mark.parametrize(
    ("array", "layout", "expected"),
    [
        (COLOR, "auto", COLOR),
        (COLOR, "nchw", COLOR),
        (COLOR.transpose(0, 2, 3, 1), "auto", COLOR),
        (COLOR.transpose(0, 2, 3, 1), "nhwc", COLOR),
        (COLOR[:, 0], "auto", COLOR[:, :1]),
        (COLOR[:, 0], "nhw", COLOR[:, :1]),
        (COLOR[:, :1], "auto", COLOR[:, :1]),
        (COLOR[:, :, :3].transpose(0, 2, 3, 1), "nhwc", COLOR[:, :, :3]),
        (COLOR[:, :, :, :3], "nchw", COLOR[:, :, :, :3]),
        (COLOR.repeat(2, axis=1), "nchw", COLOR.repeat(2, axis=1)),
    ],
)
def test_layouts_of_pictures(tmp_path: Path, array: np.ndarray, layout: str, expected: np.ndarray) -> None:
    dataset = Npz(save(tmp_path, x=array), layout=layout, test_fraction=0)
    assert dataset.info.kind == "pixels"
    assert dataset.info.shape == expected.shape[1:]
    assert (dataset.split("train").values.numpy() == expected).all()


def test_a_layout_that_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    for array in (COLOR[:, :, :, :3], COLOR.repeat(2, axis=1), COLOR[:, 0, 0]):
        with pytest.raises(UserError, match="set layout to nhwc or nchw"):
            Npz(save(tmp_path, x=array)).split("train")
    with pytest.raises(UserError, match=r"layout=nhw has 3 axes"):
        Npz(save(tmp_path, x=COLOR), layout="nhw").split("train")


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("shape", [(10, 2), (10, 3, 5), (10, 1, 4, 4)])
def test_floats_are_vectors(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = RNG.standard_normal(shape).astype(dtype)
    dataset = Npz(save(tmp_path, samples=array), test_fraction=0)
    assert dataset.info.kind == "vectors"
    assert dataset.info.shape == shape[1:]
    split = dataset.split("train")
    assert split.values.dtype == torch.float32
    assert (split.values.numpy() == array.astype(np.float32)).all()
    assert torch.equal(dataset.info.decode(dataset.info.encode(split.values)), split.values)


@pytest.mark.parametrize(("layout", "axes"), [("auto", (0, 1, 2)), ("ncl", (0, 1, 2)), ("nlc", (0, 2, 1))])
def test_layouts_of_sequences(tmp_path: Path, layout: str, axes: tuple[int, ...]) -> None:
    sequences = RNG.standard_normal((10, 3, 8)).astype(np.float32)
    dataset = Npz(save(tmp_path, x=sequences.transpose(axes)), layout=layout, test_fraction=0)
    assert (dataset.info.kind, dataset.info.shape) == ("vectors", (3, 8))
    assert (dataset.split("train").values.numpy() == sequences).all()


def test_sequences_of_one_value_at_each_place(tmp_path: Path) -> None:
    sequences = RNG.standard_normal((10, 8))
    np.save(tmp_path / "sequences.npy", sequences)
    for path in (save(tmp_path, x=sequences), str(tmp_path / "sequences.npy")):
        dataset = Npz(path, layout="nl", test_fraction=0)
        assert dataset.info.shape == (1, 8)
        assert (dataset.split("train").values[:, 0].numpy() == sequences.astype(np.float32)).all()


@pytest.mark.parametrize(
    ("array", "layout", "message"),
    [
        (COLOR, "nlc", "layout=nlc is for sequences, and x in .* has dtype uint8: use one of auto, nhwc, nchw, nhw"),
        (COLOR / 255, "nchw", "layout=nchw is for pictures, and x in .* has dtype float64: use one of auto, ncl"),
        (COLOR / 255, "nlc", r"shape \(10, 3, 6, 8\), and layout=nlc has 3 axes"),
        (COLOR[:, 0] / 255, "nl", r"shape \(10, 6, 8\), and layout=nl has 2 axes"),
    ],
)
def test_layouts_of_something_else_are_refused(tmp_path: Path, array: np.ndarray, layout: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Npz(save(tmp_path, x=array), layout=layout).split("train")


def test_a_npy_is_memory_mapped_and_never_written_to(tmp_path: Path) -> None:
    path = tmp_path / "pictures.npy"
    np.save(path, COLOR)
    before = path.read_bytes()
    split = Npz(str(path), test_fraction=0).split("train")
    assert split.labels is None
    assert (split.values.numpy() == COLOR).all()
    split.values.zero_()
    assert path.read_bytes() == before
    assert len(Npz(str(path)).split("test")) == 1


@pytest.mark.parametrize("key", ["x", "images", "samples", "data", "arr_0"])
@pytest.mark.parametrize("label_key", ["y", "labels", "label", "arr_1"])
def test_usual_names_are_found(tmp_path: Path, key: str, label_key: str) -> None:
    dataset = Npz(save(tmp_path, **{"other": LABELS, key: COLOR, label_key: LABELS}), test_fraction=0)
    split = dataset.split("train")
    assert dataset.info.num_classes == 3
    assert split.labels is not None
    assert split.labels.tolist() == LABELS.tolist()
    assert split.labels.dtype == torch.int64


def test_names_can_be_given(tmp_path: Path) -> None:
    path = save(tmp_path, x=COLOR, pictures=COLOR[::-1], y=LABELS, kinds=LABELS[:, None].astype(np.uint8))
    split = Npz(path, key="pictures", label_key="kinds", test_fraction=0).split("train")
    assert (split.values.numpy() == COLOR[::-1]).all()
    assert split.labels is not None
    assert split.labels.tolist() == LABELS.tolist()
    assert Npz(path, label_key="none").split("train").labels is None
    with pytest.raises(UserError, match=r"key='picture' is not in .*; did you mean 'pictures'"):
        Npz(path, key="picture").split("train")
    with pytest.raises(UserError, match=r"label_key='kind' is not in"):
        Npz(path, label_key="kind").split("train")
    with pytest.raises(UserError, match=r"has a, b: say with key which to use"):
        Npz(save(tmp_path, a=COLOR, b=LABELS)).split("train")


def test_a_second_array_without_a_name_need_not_be_labels(tmp_path: Path) -> None:
    path = tmp_path / "arrays.npz"
    np.savez(path, COLOR, COLOR)
    assert Npz(str(path)).split("train").labels is None


def test_the_layout_of_keras_has_its_own_test_split(tmp_path: Path) -> None:
    path = save(tmp_path, x_train=COLOR, y_train=LABELS, x_test=COLOR[:4], y_test=LABELS[1:5])
    dataset = Npz(path)
    assert (dataset.split("train").values.numpy() == COLOR).all()
    assert (dataset.split("test").values.numpy() == COLOR[:4]).all()
    test_labels = dataset.split("test").labels
    assert test_labels is not None
    assert test_labels.tolist() == [1, 2, 0, 1]
    assert dataset.info.num_classes == 3
    without = Npz(save(tmp_path, x_train=COLOR, x_test=COLOR[:4]))
    assert (len(without.split("test")), without.split("test").labels) == (4, None)
    with pytest.raises(UserError, match="different shapes or types"):
        Npz(save(tmp_path, x_train=COLOR, x_test=COLOR[:, :, :5])).split("train")


def test_the_held_out_fraction(tmp_path: Path) -> None:
    array = np.arange(200, dtype=np.float32).reshape(100, 2)
    path = save(tmp_path, x=array, y=np.arange(100))
    dataset = Npz(path, test_fraction=0.2)
    train, test = dataset.split("train"), dataset.split("test")
    assert (len(train), len(test)) == (80, 20)
    assert test.labels is not None
    assert torch.equal(test.values[:, 0], 2.0 * test.labels)  # labels stay with their examples
    assert sorted(torch.cat([train.values, test.values])[:, 0].tolist()) == array[:, 0].tolist()
    assert not torch.equal(Npz(path, test_fraction=0.2, seed=1).split("test").values, test.values)
    with pytest.raises(UserError, match="set test_fraction above 0"):
        Npz(path, test_fraction=0).split("test")
    with pytest.raises(UserError, match="has no test split"):
        Npz(save(tmp_path, x=array[:1])).split("test")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": COLOR.astype(np.int32)}, "dtype int32: pictures are uint8"),
        ({"x": np.array(["a", "b"])[:, None]}, "dtype <U1"),
        ({"x": np.zeros(3)}, r"shape \(3,\): it must be"),
        ({"x": np.zeros((0, 2))}, "at least one value"),
        ({"x": np.array([[1.0, np.nan]])}, "not finite"),
        ({"x": COLOR, "y": LABELS[:9]}, r"labels must be whole numbers of shape \(10,\)"),
        ({"x": COLOR, "y": LABELS * 1.0}, "label_key=none"),
        ({"x": COLOR, "y": LABELS - 1}, "label -1"),
        ({"x": np.array([[1], [2, 3]], dtype=object)}, "Python objects, which are never loaded"),
        ({"x": COLOR, "y": np.array([None] * 10)}, "y in .* holds Python objects"),
        ({}, "no arrays"),
    ],
)
def test_arrays_that_are_something_else_are_sentences(tmp_path: Path, arrays: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Npz(save(tmp_path, **arrays)).split("train")


def test_files_that_are_something_else_are_sentences(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(UserError, match="does not exist"):
        Npz(str(path)).split("train")
    for content in (b"", b"text", np.arange(3).dumps()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.npz.*(is damaged or is not a \.npz|Python objects)"):
            Npz(str(path)).split("train")
    np.savez(path, x=COLOR)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        Npz(str(path)).split("train")
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 0xFF
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"x in .* is damaged"):
        Npz(str(path)).split("train")
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}]))
    with pytest.raises(UserError, match="Python objects"):
        Npz(str(objects)).split("train")
    short = tmp_path / "short.npy"
    np.save(short, COLOR)
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        Npz(str(short)).split("train")


def test_vectors_are_not_mirrored(tmp_path: Path) -> None:
    path = save(tmp_path, x=np.zeros((4, 2)))
    with pytest.raises(UserError, match="random_flip=true"):
        Npz(path, random_flip=True).split("train")
    assert Npz(save(tmp_path, x=COLOR), random_flip=True).split("train").values.dtype == torch.uint8


@pytest.mark.parametrize("options", [{"layout": "hwc"}, {"test_fraction": 1.0}, {"seed": -1}, {"random_flip": None}])
def test_options_out_of_range_are_refused(options: dict) -> None:
    (name,) = options
    with pytest.raises(UserError, match=name):
        Npz("x", **options)
