"""Samples from files: exact round trips in any layout, a batch at a time, and one sentence for what cannot be taken."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sde.commands import write_samples
from sde.data import DataInfo
from sde.errors import UserError
from sde.evaluation.loader import Array, Samples, changes_of, load_samples
from sde.files import write_json

GRAY, COLOR = DataInfo("gray", (1, 6, 5)), DataInfo("color", (3, 6, 5))
POINTS = DataInfo("points", (2,), kind="vectors")


def pixels(info: DataInfo, n: int = 11) -> Tensor:
    return torch.randint(0, 256, (n, *info.shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def points(n: int = 11) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0))


def whole(samples: Samples) -> Tensor:
    return torch.cat(list(samples))


def save_pictures(folder: Path, x: Tensor, names: Sequence[str]) -> None:
    for name, picture in zip(names, x, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        array = picture.permute(1, 2, 0).numpy()
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path)


# Arrays


@pytest.mark.parametrize("info", [GRAY, COLOR, POINTS], ids=lambda info: info.name)
@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_what_sampling_writes_is_read(info: DataInfo, batch_size: int, tmp_path: Path) -> None:
    x = points() if info is POINTS else pixels(info)
    write_samples(tmp_path / "samples.npz", x, info, torch.arange(11))
    samples = load_samples(tmp_path / "samples.npz", info, batch_size)
    batches = list(samples)
    assert torch.equal(torch.cat(batches), x)
    assert [len(batch) for batch in batches] == [min(batch_size, 11 - start) for start in range(0, 11, batch_size)]
    assert (len(samples), samples.shape) == (11, info.shape)
    assert torch.equal(whole(samples), x)  # a second time
    assert torch.equal(samples.read(range(7, 10)), x[7:10])
    assert torch.equal(samples.read(range(2, 4)), x[2:4])  # back again
    assert samples.about["n"] == 11


@pytest.mark.parametrize("packed", [False, True])
def test_arrays_in_any_layout(packed: bool, tmp_path: Path) -> None:
    gray, color = pixels(GRAY).numpy(), pixels(COLOR).numpy()
    floats = points().double().numpy()
    cases: list[tuple[np.ndarray, DataInfo | None, Any]] = [
        (gray[:, 0], GRAY, gray),
        (gray, GRAY, gray),
        (gray.transpose(0, 2, 3, 1), None, gray),
        (color, COLOR, color),
        (color.transpose(0, 2, 3, 1), None, color),
        (np.asfortranarray(color.transpose(0, 2, 3, 1)), COLOR, color),
        (floats, POINTS, floats.astype(np.float32)),
        (floats.astype(np.float16), None, floats.astype(np.float16).astype(np.float32)),
        (floats.astype(">f8"), POINTS, floats.astype(np.float32)),
        (np.asfortranarray(floats), None, floats.astype(np.float32)),
    ]
    save: Any = np.savez_compressed if packed else np.savez
    for array, info, expected in cases:
        save(tmp_path / "x.npz", labels=np.zeros(11), images=array)
        np.save(tmp_path / "x.npy", array)
        for name in ("x.npz", "x.npy"):
            samples = load_samples(tmp_path / name, info, 4)
            assert np.array_equal(whole(samples).numpy(), expected), (name, array.shape)
            assert np.array_equal(samples.read(range(9, 11)).numpy(), expected[9:])


def test_the_data_tell_where_the_channels_are(tmp_path: Path) -> None:
    """(N, 3, 4, 3) could be either."""
    x = pixels(DataInfo("narrow", (3, 4, 3)))
    np.savez(tmp_path / "x.npz", samples=x.numpy())
    assert torch.equal(whole(load_samples(tmp_path / "x.npz", DataInfo("narrow", (3, 4, 3)))), x)
    flat = load_samples(tmp_path / "x.npz", DataInfo("flat", (3, 3, 4)))
    assert torch.equal(whole(flat), x.permute(0, 3, 1, 2))
    with pytest.raises(UserError, match=r"pictures are stored as \(N, H, W, C\)"):
        load_samples(tmp_path / "x.npz")


def test_arrays_are_read_a_batch_at_a_time(tmp_path: Path) -> None:
    """What has been cut off is missed by the batch that it belongs to."""
    x = pixels(COLOR, 1000)
    np.save(tmp_path / "x.npy", x.numpy())
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content[: len(content) // 2])
    samples = load_samples(tmp_path / "x.npy", COLOR, 100)
    assert torch.equal(samples.read(range(400, 450)), x[400:450])
    with pytest.raises(UserError, match="ends before example 600"):
        samples.read(range(500, 600))


def test_a_packed_array_that_is_damaged_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, samples=pixels(COLOR, 500).numpy())
    content = path.read_bytes()
    for damaged in (content[:1000], content[:5000] + bytes([content[5000] ^ 255]) + content[5001:], b"", b"PK\x03\x04"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged|ends before"):
            whole(load_samples(path, COLOR, 64))


def test_arrays_that_are_no_samples_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    small, large, gray = (np.zeros((4, *shape), np.uint8) for shape in ((2, 2), (8, 8, 3), (6, 5, 1)))
    cases: list[tuple[dict[str, Any], DataInfo | None, str]] = [
        ({"samples": np.array([{}, []], dtype=object)}, None, "Python objects, which are never loaded"),
        ({"weights": np.zeros((2, 2))}, None, "has weights: call the array of samples `samples`"),
        ({"samples": np.zeros(4)}, None, r"has the shape \(4,\)"),
        ({"samples": np.zeros((0, 2))}, None, r"has the shape \(0, 2\)"),
        ({"samples": np.zeros((4, 2), int)}, None, "has the type int64: pictures are uint8, vectors float32"),
        ({"samples": np.zeros((4, 6, 5, 3))}, COLOR, "holds vectors and color pixels: save pictures as uint8, rounded"),
        ({"samples": small}, POINTS, "holds pixels and points vectors: save vectors as float32"),
        ({"samples": np.zeros((4, 3))}, POINTS, r"shape \(3,\) and points has \(2,\)"),
        ({"samples": large}, COLOR, r"shape \(3, 8, 8\) and color has \(3, 6, 5\): give samples"),
        ({"samples": gray}, COLOR, r"shape \(1, 6, 5\) and color has \(3, 6, 5\)"),
    ]
    for arrays, info, match in cases:
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=match):
            load_samples(path, info)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="Python objects"):
        Array(path, None, 4)


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e300])
def test_examples_that_are_not_finite_are_named(bad: float, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Whichever batch is read first, the sentence tells the first of all of them and how many there are."""
    x = points().double().numpy()
    x[6, 1] = x[9, 0] = x[9, 1] = bad
    np.savez(tmp_path / "x.npz", samples=x)
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    for name in ("x.npz", "x.npy"):
        samples = load_samples(tmp_path / name, POINTS, 4)
        assert np.array_equal(samples.read(range(6)).numpy(), x[:6].astype(np.float32))
        for rows in (range(4, 8), range(8, 11)):
            with pytest.raises(UserError) as found:
                samples.read(rows)
            told = "2 of the 11 examples are not finite in float32, the first of them number 6,"
            assert str(found.value).startswith(f"samples={tmp_path / name}: {told}")
    assert not recwarn.list


def test_the_digest_of_an_array_is_that_of_its_file(tmp_path: Path) -> None:
    for name, save in (("x.npz", np.savez_compressed), ("x.npy", np.save)):
        path = tmp_path / name
        save(path, pixels(COLOR).numpy())
        samples = load_samples(path, COLOR, 4)
        assert samples.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
        assert torch.equal(samples.read(range(4, 9)), pixels(COLOR)[4:9])  # whatever has been read
        assert load_samples(path, None, 1).digest() == samples.digest()


def test_how_samples_were_drawn_is_found_beside_them(tmp_path: Path) -> None:
    path, beside = tmp_path / "samples.npz", tmp_path / "info.json"
    write_samples(path, points(), POINTS, None)
    facts = {"solver": "heun", "steps": 20, "nfe": 41, "n": 11, "seeds": {"seed": 3, "samples": [0, 10]}, "x": 0.5}
    assert load_samples(path, POINTS).info is None
    write_json(beside, {**facts, "end": float("inf")})
    assert load_samples(path, POINTS).info == {**facts, "end": "Infinity"}  # which JSON has no number for
    assert load_samples(tmp_path, POINTS).digest() == load_samples(path, POINTS).digest()
    assert load_samples(tmp_path, POINTS).info is not None
    path.rename(tmp_path / "others.npz")
    assert load_samples(tmp_path / "others.npz", POINTS).info is None  # what is beside it need not be of it
    (tmp_path / "others.npz").rename(path)
    whole_text = json.dumps(facts)
    deep = "[" * 100_000 + "]" * 100_000
    damaged = [whole_text[:-5], "", "[1]", "null", deep, json.dumps({**facts, "n": 12}), "{}", '{"n": 1e999}']
    for content in (*(text.encode() for text in damaged), b"\xff\xfe{", b" " * (1 << 24) + whole_text.encode()):
        beside.write_bytes(content)
        assert load_samples(path, POINTS).info is None
    beside.unlink()
    beside.mkdir()
    assert load_samples(path, POINTS).info is None


# Pictures


@pytest.mark.parametrize("info", [GRAY, COLOR], ids=lambda info: info.name)
def test_pictures_come_in_the_order_of_their_names(info: DataInfo, tmp_path: Path) -> None:
    x = pixels(info)
    names = [f"{k // 4:03d}/img{k:05d}.png" for k in range(11)]
    save_pictures(tmp_path / "folder", x, names)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as file:
        for name in reversed(names):
            file.write(tmp_path / "folder" / name, name)
    (tmp_path / "folder" / "notes.txt").write_text("not a picture")
    for path in (tmp_path / "folder", tmp_path / "pictures.zip"):
        for told in (info, None):
            samples = load_samples(path, told, 4)
            assert torch.equal(whole(samples), x)
            assert [len(batch) for batch in samples] == [4, 4, 3]
            assert torch.equal(samples.read(range(5, 7)), x[5:7])
            assert samples.about == {"format": "pictures", "n": 11, "compressed": 0}


def test_the_digest_of_pictures_is_of_names_and_bytes(tmp_path: Path) -> None:
    folder, names = tmp_path / "folder", ["a.png", "b/c.png", "d.png"]
    save_pictures(folder, pixels(COLOR, 3), names)
    packed = tmp_path / "pictures.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name in reversed(names):
            file.write(folder / name, name)
    (folder / "notes.txt").write_text("not a picture")
    before = load_samples(folder, COLOR).digest()
    assert len(bytes.fromhex(before)) == 32
    assert load_samples(packed, COLOR, 1).digest() == before
    found = {before}
    (folder / "d.png").rename(folder / "e.png")  # the same order and pixels
    found.add(load_samples(folder, COLOR).digest())
    other, picture = (folder / "b" / "c.png"), (folder / "a.png")
    content = picture.read_bytes()
    picture.write_bytes(other.read_bytes())
    found.add(load_samples(folder, COLOR).digest())
    other.write_bytes(content)  # the same bytes in another order
    found.add(load_samples(folder, COLOR).digest())
    assert len(found) == 4


def test_gray_and_color_change_without_loss_or_not_at_all(tmp_path: Path) -> None:
    gray = pixels(GRAY, 3)
    names = ["a.png", "b.png", "c.png"]
    save_pictures(tmp_path / "gray", gray, names)
    assert torch.equal(whole(load_samples(tmp_path / "gray", COLOR)), gray.expand(-1, 3, -1, -1))
    save_pictures(tmp_path / "colorless", gray.expand(-1, 3, -1, -1), names)
    assert torch.equal(whole(load_samples(tmp_path / "colorless", GRAY)), gray)
    save_pictures(tmp_path / "color", pixels(COLOR, 3), names)
    with pytest.raises(UserError, match=r"a\.png' has colors among gray pictures"):
        load_samples(tmp_path / "color", GRAY)


def png_of_16_bits(values: np.ndarray, color: int) -> bytes:
    """A PNG of uint16 (H, W, channels); color as its header has it: 0 gray, 2 RGB, 4 and 6 the same with alpha."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, color, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


def encoded(array: np.ndarray, form: str, mode: str | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(file, form, **options)
    return file.getvalue()


def test_changes_of_pictures_are_counted(tmp_path: Path) -> None:
    """Every way to store pictures that is not taken bit for bit, and none that is."""
    color = pixels(COLOR, 1)[0].permute(1, 2, 0).numpy()
    gray, wide = color[..., 0], color.astype(np.uint16) * 257
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha, palette, bits = "alpha_on_white", "from_palette", "reduced_from_16_bits"
    maps = {"P6": wide.astype(">u2").tobytes(), "P5": wide[..., 0].astype(">u2").tobytes()}
    kept_rgb = [encoded(color, form) for form in ("PNG", "BMP", "PPM", "TIFF")]
    kept_gray = [encoded(gray, form) for form in ("PNG", "BMP", "PPM", "TIFF")]
    cases: list[tuple[bytes, bool, list[str]]] = [
        *((content, False, []) for content in [*kept_rgb, *kept_gray]),
        *((content, True, []) for content in kept_gray),
        *((content, True, ["reduced_to_gray"]) for content in kept_rgb),
        (encoded(gray, "PNG", "1"), True, []),
        (png_of_16_bits(wide[..., :1], 0), True, [bits]),
        (png_of_16_bits(wide, 2), False, [bits]),
        (png_of_16_bits(wide[..., :2], 4), True, [bits, alpha]),
        (png_of_16_bits(np.concatenate([wide, wide[..., :1]], 2), 6), False, [bits, alpha]),
        (encoded(wide[..., 0], "TIFF"), False, [bits]),
        (b"P6 5 6 65535\n" + maps["P6"], False, [bits]),
        (b"P5 5 6 65535\n" + maps["P5"], True, [bits]),
        (encoded(color, "PNG", "RGBA"), False, [alpha]),
        (encoded(gray, "PNG", "LA"), True, [alpha]),
        (encoded(np.concatenate([color, color[..., :1]], 2), "WEBP", lossless=True), False, [alpha]),
        (encoded(color, "PNG", transparency=(1, 2, 3)), False, [alpha]),
        (encoded(color, "PNG", "P"), False, [palette]),
        (encoded(color, "PNG", "P", transparency=0), False, [alpha, palette]),
        (encoded(color, "JPEG", "CMYK"), False, ["from_other_color_space"]),
        (encoded(color, "JPEG", exif=turned), False, ["turned_by_exif"]),
        (encoded(color, "PNG", exif=turned), False, ["turned_by_exif"]),
        (b"not a picture", False, []),
    ]
    for number, (content, to_gray, expected) in enumerate(cases):
        assert changes_of(content, to_gray) == expected, number


def test_the_card_is_told_what_is_changed(tmp_path: Path) -> None:
    x = pixels(COLOR, 4)
    save_pictures(tmp_path, x, ["a.png", "b.png", "c.png", "d.png"])
    array = x[1].permute(1, 2, 0).numpy()
    (tmp_path / "b.png").write_bytes(encoded(array, "PNG", "RGBA"))
    (tmp_path / "d.png").write_bytes(png_of_16_bits(x[3].permute(1, 2, 0).numpy().astype(np.uint16) * 257, 2))
    samples = load_samples(tmp_path, COLOR, 2)
    expected = {"format": "pictures", "n": 4, "compressed": 0, "reduced_from_16_bits": 1, "alpha_on_white": 1}
    assert samples.about == expected  # before anything is read
    assert torch.equal(whole(samples), x)
    assert samples.about == expected


def test_compression_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pictures(tmp_path, pixels(COLOR, 3), ["a.png", "b.JPG", "c.jpeg"])
    samples = load_samples(tmp_path, COLOR, 1)
    assert len(whole(samples)) == 3
    told = capsys.readouterr().err
    assert told.count("warning: 2 of the 3 pictures") == 1
    assert "compression alone changes FID" in told
    assert samples.about["compressed"] == 2


def test_pictures_that_cannot_be_taken_are_named(tmp_path: Path) -> None:
    def attempt(folder: Path, info: DataInfo | None = COLOR) -> None:
        whole(load_samples(folder, info, 2))

    with pytest.raises(UserError, match=r"does not exist: give an \.npz"):
        attempt(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures: they end in"):
        attempt(tmp_path / "empty")
    (tmp_path / "x.txt").touch()
    with pytest.raises(UserError, match=r"is not an \.npz or \.npy file, nor a folder"):
        attempt(tmp_path / "x.txt")
    (tmp_path / "x.zip").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"samples=.*x\.zip is not a \.zip that can be read"):
        attempt(tmp_path / "x.zip")
    save_pictures(tmp_path / "size", pixels(DataInfo("other", (3, 7, 5)), 2), ["a.png", "b.png"])
    with pytest.raises(UserError, match=r"holds examples of shape \(3, 7, 5\) and color has \(3, 6, 5\)"):
        attempt(tmp_path / "size")
    save_pictures(tmp_path / "size", pixels(COLOR, 1), ["c.png"])
    with pytest.raises(UserError, match=r"c\.png' has shape \(3, 6, 5\) and the first of the samples \(3, 7, 5\)"):
        attempt(tmp_path / "size", None)
    save_pictures(tmp_path / "damage", pixels(COLOR, 3), ["a.png", "b.png", "c.png"])
    path = tmp_path / "damage" / "c.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"c\.png' is damaged or is not a picture"):
        attempt(tmp_path / "damage")
    with pytest.raises(UserError, match="holds pixels and points vectors"):
        attempt(tmp_path / "damage", POINTS)
    with pytest.raises(UserError, match="batch_size=0"):
        load_samples(tmp_path / "damage", COLOR, 0)
