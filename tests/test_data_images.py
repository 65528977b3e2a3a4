"""Pictures in folders and archives: pixels, labels, divisions, and files that are not what they seem."""

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sde.data.files import open_files
from sde.data.images import Images
from sde.data.prepared import held_out
from sde.errors import UserError

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10-train-jpeg.zip"
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDE_CACHE", str(tmp_path / "cache"))


def random_pixels(height: int = 8, width: int = 8) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels))


def gray(level: int) -> bytes:
    return png(np.full((8, 8, 3), level, dtype=np.uint8))


def write(root: Path, files: dict[str, bytes], archive: bool = False) -> str:
    """The files in a folder, or in a .zip."""
    if archive:
        path = root / "pictures.zip"
        with zipfile.ZipFile(path, "w") as target:
            for name, content in files.items():
                target.writestr(name, content)
        return str(path)
    for name, content in files.items():
        path = root / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root / "pictures")


def levels(dataset: Images, split: str = "train") -> list[int]:
    """The gray level of each picture of a split."""
    return dataset.split(split).values[:, 0, 0, 0].tolist()


def labels(dataset: Images, split: str = "train") -> list[int] | None:
    found = dataset.split(split).labels
    return None if found is None else found.tolist()


@pytest.mark.skipif(not CIFAR.exists(), reason="needs pictures of CIFAR-10")
def test_a_data_set_in_the_layout_of_edm() -> None:
    dataset = Images(str(CIFAR))
    train, test = dataset.split("train"), dataset.split("test")
    assert dataset.info.shape == (3, 32, 32)
    assert dataset.info.class_names[:2] == ("airplane", "automobile")
    assert train.labels is not None
    assert test.labels is not None
    assert (len(train), len(test)) == (13500, 1500)
    assert torch.bincount(torch.cat([train.labels, test.labels])).tolist() == [1500] * 10
    with zipfile.ZipFile(CIFAR) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        in_test = held_out(names, 0.1, seed=0)
        for split, chosen in ((train, ~in_test), (test, in_test)):
            first = [names[i] for i in np.flatnonzero(chosen)[:100]]
            pixels = np.stack([np.asarray(Image.open(archive.open(name))) for name in first])
            assert (split.values[:100].numpy() == pixels.transpose(0, 3, 1, 2)).all()


@pytest.mark.parametrize("archive", [False, True])
def test_pixels_are_those_of_the_file(tmp_path: Path, archive: bool) -> None:
    pixels = [random_pixels() for _ in range(5)]
    path = write(tmp_path, {f"{i}.png": png(p) for i, p in enumerate(pixels)}, archive)
    dataset = Images(path, size=8, test_fraction=0)
    expected = np.stack(pixels).transpose(0, 3, 1, 2)
    assert (dataset.split("train").values.numpy() == expected).all()
    assert dataset.split("train").labels is None
    assert dataset.info.num_classes == 0
    with pytest.raises(UserError, match=r"no test split: set test_fraction above 0, or put pictures in folders"):
        dataset.split("test")


def test_every_format_is_read(tmp_path: Path) -> None:
    pixels = np.full((8, 8, 3), 77, dtype=np.uint8)
    forms = {"a.bmp": "BMP", "b.gif": "GIF", "c.JPG": "JPEG", "d.png": "PNG", "e.ppm": "PPM", "f.tiff": "TIFF"}
    files = {name: encoded(Image.fromarray(pixels), form) for name, form in forms.items()}
    files["g.webp"] = encoded(Image.fromarray(pixels), "WEBP", lossless=True)
    files["notes.txt"] = b"not a picture"
    files[".hidden.png"] = files["__MACOSX/._a.png"] = b"left by a file manager"
    dataset = Images(write(tmp_path, files), size=8, test_fraction=0, labels="none")
    assert levels(dataset) == [77] * 7


def test_resize_none(tmp_path: Path) -> None:
    path = write(tmp_path, {"a.png": png(random_pixels(6, 10)), "b.png": png(random_pixels(6, 10))})
    dataset = Images(path, size=None, resize="none", channels=1, test_fraction=0)
    assert dataset.info.shape == (1, 6, 10)
    with pytest.raises(UserError, match=r"a.png.* has 10 x 6 pixels, not 8 x 8: set resize"):
        Images(path, size=8, resize="none").split("train")
    (tmp_path / "pictures" / "c.png").write_bytes(png(random_pixels(6, 9)))
    with pytest.raises(UserError, match=r"c.png.* has shape \(3, 6, 9\) and the first picture \(3, 6, 10\)"):
        Images(path, size=None, resize="none").split("train")


NAMED = {"cat/a.png": gray(1), "cat/deep/b.png": gray(2), "dog/c.png": gray(3)}


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("prefix", ["", "wrapped/twice/"])
def test_labels_from_folders(tmp_path: Path, archive: bool, prefix: str) -> None:
    path = write(tmp_path, {prefix + name: content for name, content in NAMED.items()}, archive)
    for mode in ("auto", "folders"):
        dataset = Images(path, size=8, labels=mode, test_fraction=0)
        assert dataset.info.class_names == ("cat", "dog")
        assert (levels(dataset), labels(dataset)) == ([1, 2, 3], [0, 0, 1])
    assert labels(Images(path, size=8, labels="none", test_fraction=0)) is None


def test_folders_that_are_no_classes(tmp_path: Path) -> None:
    path = write(tmp_path, NAMED | {"stray.png": gray(4)})
    assert labels(Images(path, size=8, test_fraction=0)) is None
    with pytest.raises(UserError, match=r"stray.png.* is in no class folder"):
        Images(path, size=8, labels="folders").split("train")


@pytest.mark.parametrize(
    ("index", "expected", "classes"),
    [
        ({"labels": [["cat/a.png", 2], ["cat/deep/b.png", 0], ["dog/c.png", 2]]}, [2, 0, 2], ()),
        ({"labels": {"cat/a.png": 1, "cat/deep/b.png": 0, "dog/c.png": 1, "x": 7}}, [1, 0, 1], ()),
        (
            {"labels": [["cat/a.png", 1], ["cat/deep/b.png", 0], ["dog/c.png", 1]], "classes": ["u", "v", "w"]},
            [1, 0, 1],
            ("u", "v", "w"),
        ),
        ({"labels": [["cat/a.png", "z"], ["cat/deep/b.png", "y"], ["dog/c.png", "z"]]}, [1, 0, 1], ("y", "z")),
        ({"labels": None}, None, ()),
        ({}, None, ()),
    ],
)
@pytest.mark.parametrize("prefix", ["", "wrapped/"])
def test_labels_from_json(
    tmp_path: Path, index: dict, expected: list[int] | None, classes: tuple[str, ...], prefix: str
) -> None:
    files = {prefix + name: content for name, content in NAMED.items()}
    path = write(tmp_path, files | {f"{prefix}dataset.json": json.dumps(index).encode()}, archive=True)
    dataset = Images(path, size=8, test_fraction=0)
    assert labels(dataset) == expected
    assert dataset.info.class_names == classes
    assert dataset.info.num_classes == (0 if expected is None else max(len(classes), max(expected) + 1))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "is not JSON"),
        (b'{"labels": 3}', "must be a list"),
        (b'{"labels": [["dog/c.png", 0]]}', "no label for 2 pictures, such as 'cat/a.png'"),
        (b'{"labels": {"cat/a.png": -1, "cat/deep/b.png": 0, "dog/c.png": 0}}', "label -1"),
        (b'{"labels": {"cat/a.png": 0.5, "cat/deep/b.png": 0, "dog/c.png": 0}}', "label 0.5"),
        (b'{"labels": {"cat/a.png": [0], "cat/deep/b.png": 0, "dog/c.png": 0}}', r"label \[0\]"),
        (b'{"labels": {"cat/a.png": 1, "cat/deep/b.png": 0, "dog/c.png": 0}, "classes": ["a"]}', "only 1 classes"),
        (b'{"labels": {"cat/a.png": "x", "cat/deep/b.png": "a", "dog/c.png": "a"}, "classes": ["a"]}', "'x', which"),
        (b'{"labels": {"cat/a.png": 0, "cat/deep/b.png": 0, "dog/c.png": 0}, "classes": [1]}', "list of names"),
    ],
)
def test_labels_that_are_wrong_are_sentences(tmp_path: Path, index: bytes, message: str) -> None:
    path = write(tmp_path, NAMED | {"dataset.json": index})
    with pytest.raises(UserError, match=rf"dataset.json.*{message}"):
        Images(path, size=8).split("train")


def test_json_that_is_asked_for_and_absent(tmp_path: Path) -> None:
    path = write(tmp_path, NAMED)
    with pytest.raises(UserError, match=r"there is no dataset.json"):
        Images(path, labels="json").split("train")
    (tmp_path / "pictures" / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(UserError, match=r"holds no labels"):
        Images(path, labels="json").split("train")


@pytest.mark.parametrize("prefix", ["", "wrapped/"])
@pytest.mark.parametrize("test", ["test", "val", "valid", "validation"])
def test_folders_train_and_test_are_the_splits(tmp_path: Path, prefix: str, test: str) -> None:
    files = {
        "train/cat/a.png": gray(1),
        "train/dog/b.png": gray(2),
        f"{test}/cat/c.png": gray(3),
        f"{test}/dog/d.png": gray(4),
    }
    dataset = Images(write(tmp_path, {prefix + name: content for name, content in files.items()}), size=8)
    assert dataset.info.class_names == ("cat", "dog")
    assert (levels(dataset), labels(dataset)) == ([1, 2], [0, 1])
    assert (levels(dataset, "test"), labels(dataset, "test")) == ([3, 4], [0, 1])


def test_test_comes_before_val_and_strays_make_no_splits(tmp_path: Path) -> None:
    files = {"train/a.png": gray(1), "val/b.png": gray(2), "test/c.png": gray(3)}
    dataset = Images(write(tmp_path, files), size=8)
    assert (levels(dataset), levels(dataset, "test"), labels(dataset)) == ([1], [3], None)
    path = write(tmp_path, {"more/d.png": gray(4)})
    dataset = Images(path, size=8, test_fraction=0)
    assert dataset.info.class_names == ("more", "test", "train", "val")


def test_the_held_out_fraction(tmp_path: Path) -> None:
    path = write(tmp_path, {f"{i:02}.png": gray(i) for i in range(40)})
    dataset, other = Images(path, size=8, test_fraction=0.25), Images(path, size=8, test_fraction=0.25, seed=1)
    assert len(dataset.split("test")) == 10
    assert sorted(levels(dataset) + levels(dataset, "test")) == list(range(40))
    assert levels(dataset, "test") != levels(other, "test")


def test_pictures_are_prepared_once_and_again_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, NAMED)
    assert levels(Images(path, size=8, test_fraction=0)) == [1, 2, 3]

    def never(*_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr("sde.data.images.decode", never)
        assert levels(Images(path, size=8, test_fraction=0)) == [1, 2, 3]
    (tmp_path / "pictures" / "dog" / "c.png").write_bytes(gray(9))
    os.utime(tmp_path / "pictures" / "dog" / "c.png", ns=(1, 1))
    assert levels(Images(path, size=8, test_fraction=0)) == [1, 2, 9]
    assert levels(Images(path, size=4, test_fraction=0)) == [1, 2, 9]
    folders = [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    assert len(folders) == 3


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        png(random_pixels(64, 64))[:-200],
        encoded(Image.fromarray(random_pixels(64, 64)), "JPEG")[:-200],
        b"%!PS-Adobe-3.0 EPSF",
    ],
)
def test_a_damaged_picture_is_named(tmp_path: Path, archive: bool, content: bytes) -> None:
    path = write(tmp_path, NAMED | {"dog/bad.png": content}, archive)
    with pytest.raises(UserError, match=r"dog/bad.png.*is damaged or is not a picture.*take it out") as caught:
        Images(path, size=8).split("train")
    assert "\n" not in str(caught.value)
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.suffix != ".lock"]


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    """A PNG of 60000 x 60000 pixels in 100 bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    with pytest.raises(UserError, match=r"bomb.png.* is too large"):
        Images(write(tmp_path, {"bomb.png": bomb})).split("train")


@pytest.mark.parametrize("archive", [False, True])
def test_a_file_that_would_fill_the_memory_is_refused(
    tmp_path: Path, archive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sde.data.files.MAX_BYTES", 1000)
    path = write(tmp_path, {"a.png": bytes(1001)}, archive)
    with pytest.raises(UserError, match=r"a.png.* is larger than 1000 bytes"):
        Images(path).split("train")


def test_names_in_an_archive_reach_nothing_outside(tmp_path: Path) -> None:
    path = write(tmp_path, {"../../evil.png": gray(1), "/abs/olute.png": gray(2)}, archive=True)
    before = sorted(tmp_path.parent.iterdir())
    dataset = Images(path, size=8, test_fraction=0, labels="none")
    assert sorted(levels(dataset)) in ([2], [1, 2])
    assert sorted(tmp_path.parent.iterdir()) == before
    assert not list(tmp_path.rglob("evil.png"))


def test_damaged_and_locked_archives_are_named(tmp_path: Path) -> None:
    path = Path(write(tmp_path, NAMED, archive=True))
    content = bytearray(path.read_bytes())
    at = content.find(gray(3))
    content[at + 50] ^= 0xFF  # the checksum of this member fails
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"'dog/c.png' in .*pictures.zip' is damaged"):
        Images(str(path), size=8).split("train")
    flags = path.read_bytes().replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00")
    path.write_bytes(flags)
    with pytest.raises(UserError, match="damaged or locked"):
        Images(str(path), size=8).split("train")
    path.write_bytes(content[:-30])
    with pytest.raises(UserError, match=r"not a folder or a \.zip that can be read"):
        Images(str(path)).split("train")


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Images(str(tmp_path / "absent")).split("train")
    with pytest.raises(UserError, match="holds no pictures"):
        Images(write(tmp_path, {"notes.txt": b""})).split("train")


def test_a_link_to_nothing_is_left_out(tmp_path: Path) -> None:
    path = Path(write(tmp_path, NAMED))
    (path / "dog" / "gone.png").symlink_to(tmp_path / "absent.png")
    assert open_files(path).names == sorted(NAMED)


def test_a_file_that_goes_while_preparing_is_named(tmp_path: Path) -> None:
    files = open_files(Path(write(tmp_path, NAMED)))
    (tmp_path / "pictures" / "dog" / "c.png").unlink()
    with pytest.raises(UserError, match=r"dog/c.png' cannot be read \(No such file"):
        files.read("dog/c.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 10_000}, "at most 4096"),
        ({"size": None}, "size=None with resize='crop'"),
        ({"resize": "fit"}, "resize='fit' is not one of crop, squash, none"),
        ({"channels": 4}, "channels=4 is not one of 3"),
        ({"labels": "yes"}, "labels='yes'"),
        ({"test_fraction": 1}, "test_fraction=1"),
        ({"seed": -1}, "seed=-1"),
        ({"random_flip": 1}, "random_flip=1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Images("x", **options)
