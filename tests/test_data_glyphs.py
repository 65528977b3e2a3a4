"""Pictures of characters: which there are, what they look like, and that they are the same every time."""

import struct
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sde.data import fonts
from sde.data.fonts import SETS, Face, Specimen, find_faces, ink, parse_characters, specimens
from sde.data.glyphs import Glyphs
from sde.errors import UserError

FONTS = fonts._matplotlib_fonts()
SANS = FONTS / "DejaVuSans.ttf"
CHINESE = Path("/usr/share/fonts/truetype/wqy/wqy-microhei.ttc")


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("SDE_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    monkeypatch.undo()


def test_the_default_is_thousands_of_letters() -> None:
    glyphs = Glyphs()
    info, train, test = glyphs.info, glyphs.split("train"), glyphs.split("test")
    assert info.shape == (1, 32, 32)
    assert "".join(info.class_names) == SETS["letters"]
    assert 2300 < len(train) + len(test) < 2600
    assert len(test) == round(0.1 * (len(train) + len(test)))
    assert train.labels is not None
    assert train.labels.unique().tolist() == list(range(info.num_classes))
    pictures = torch.cat([train.values, test.values]).flatten(1)
    assert len(pictures.unique(dim=0)) == len(pictures)  # no picture twice, and none in both splits
    assert pictures.amax(dim=1).min() > 100


def test_pictures_are_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Glyphs(font=str(SANS), characters="digits", size=16)
    monkeypatch.setenv("SDE_CACHE", str(tmp_path))
    second = Glyphs(font=str(SANS), characters="digits", size=16)
    for name in ("train", "test"):
        a, b = first.split(name), second.split(name)
        assert torch.equal(a.values, b.values)
        assert a.labels is not None
        assert b.labels is not None
        assert torch.equal(a.labels, b.labels)


def test_the_split_does_not_depend_on_the_size_or_on_where_fonts_are(tmp_path: Path) -> None:
    copy = tmp_path / SANS.name
    copy.write_bytes(SANS.read_bytes())
    held = [Glyphs(font=str(font), size=size).split("test").labels for font, size in ((SANS, 16), (copy, 24))]
    assert held[0] is not None
    assert held[1] is not None
    assert torch.equal(held[0], held[1])
    other = Glyphs(font=str(SANS), size=16, seed=1).split("test").labels
    assert other is not None
    assert not torch.equal(held[0], other)


@pytest.mark.parametrize("size", [8, 13, 32, 256])
def test_glyphs_are_inside_the_margin_and_centered(size: int) -> None:
    margin = 0.125
    for character, picture in specimens(Face(SANS), SETS["latin"], size, margin):
        rows, columns = np.nonzero(picture)
        border = int(margin * size)
        assert picture.shape == (size, size)
        assert min(rows.min(), columns.min()) >= border - 1, character
        assert max(rows.max(), columns.max()) <= size - border, character
        # ink reaches equally far on both sides, to the pixel that antialiasing touches
        assert abs(columns.min() - (size - 1 - columns.max())) <= 1, character


def test_letters_share_scale_and_baseline() -> None:
    size = 256
    drawn = dict(specimens(Face(SANS), SETS["latin"], size, 0.1))

    def extent(character: str) -> tuple[int, int]:
        rows = np.flatnonzero((drawn[character] > 127).any(axis=1))
        return int(rows[0]), int(rows[-1]) + 1

    # All stand on one line, and x is as tall, relative to X, as in the font itself: 1120 of 1493 units.
    assert {extent(c)[1] for c in "xzXHIET"} == {extent("x")[1]}
    assert extent("p")[1] > extent("x")[1]
    heights = [bottom - top for top, bottom in (extent("x"), extent("X"))]
    assert heights[0] / heights[1] == pytest.approx(1120 / 1493, abs=0.01)
    # The set reaches from edge to edge of the frame: by height, or by width when that is larger.
    tops, bottoms = zip(*(extent(c) for c in drawn), strict=True)
    widths = [np.ptp(np.flatnonzero((picture > 127).any(axis=0))) + 1 for picture in drawn.values()]
    assert max(max(bottoms) - min(tops), *widths) == pytest.approx(0.8 * size, abs=2)
    assert (min(tops) + max(bottoms)) / 2 == pytest.approx(size / 2, abs=1.5)


def test_a_freak_is_shrunk_alone() -> None:
    font = Face(SANS).at(64)
    wide = max(Face(SANS).characters, key=font.getlength)
    assert font.getlength(wide) > 1.7 * font.getlength("W")
    plain = Specimen(Face(SANS), SETS["latin"], 64, 0.1)
    mixed = Specimen(Face(SANS), SETS["latin"] + wide, 64, 0.1)
    assert mixed._scale > plain._scale / 1.31
    picture = mixed.draw(wide)
    assert picture is not None
    columns = np.flatnonzero(picture.any(axis=0))
    assert columns.min() >= 5
    assert columns.max() <= 64 - 6


def test_antialiasing_keeps_the_amount_of_ink() -> None:
    """A full block is a rectangle: its area, in pixels, is the sum of the gray values."""
    specimen = Specimen(Face(SANS), "█", 32, 0.1)
    picture = specimen.draw("█")
    assert picture is not None
    block = ink(Face(SANS).at(2048), "█")
    assert block is not None
    width, height = (side / 2048 * specimen._scale for side in block.size)
    assert picture.sum() / 255 == pytest.approx(width * height, rel=0.03)
    assert max(width, height) == pytest.approx(0.8 * 32, rel=0.01)


def test_inverted_pictures_are_the_negatives() -> None:
    white, black = (Glyphs(font=str(SANS), characters="abc", size=16, invert=invert) for invert in (False, True))
    assert torch.equal(255 - white.split("train").values, black.split("train").values)
    assert black.split("train").values[0, 0, 0, 0] == 255


def test_missing_blank_and_repeated_glyphs_are_left_out() -> None:
    """U+00A0 is blank, U+4E00 is not in the face, and Greek and Cyrillic A are drawn as the Latin one."""
    info = Glyphs(font=str(SANS), characters="A\u00a0\u4e00ΑАB", test_fraction=0.0).info
    assert info.class_names == ("A", "B")


def test_a_glyph_that_is_the_missing_box_is_left_out(tmp_path: Path) -> None:
    """A character map may promise a glyph and point to the box."""
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

    font = TTFont(SANS)
    for table in font["cmap"].tables:
        if table.isUnicode():
            table.cmap[ord("A")] = font.getGlyphName(0)
    font["cmap"].tables = [table for table in font["cmap"].tables if table.isUnicode()]
    font.save(tmp_path / "box.ttf")
    face = Face(tmp_path / "box.ttf")
    assert "A" not in face.characters
    specimen = Specimen(face, "ABC", 32, 0.1)
    assert specimen.draw("A") is None
    assert specimen.draw("C") is not None


@pytest.mark.parametrize(
    ("characters", "expected"),
    [
        ("digits", "0123456789"),
        ("0041-0043", "ABC"),
        ("0041-0043,0061-0061", "ABCa"),
        ("1F600-1F601", "\U0001f600\U0001f601"),
        ("cba abc", "abc"),
        ("Жй", "Жй"),
    ],
)
def test_characters(characters: str, expected: str) -> None:
    assert parse_characters(characters) == "".join(sorted(expected))


def test_named_sets() -> None:
    assert parse_characters("all") is None
    cjk = parse_characters("cjk")
    assert cjk is not None
    assert (len(cjk), cjk[0]) == (0x5200, "一")
    letters = SETS["letters"]
    assert len(letters) == len(set(letters)) == 130
    assert all(unicodedata.category(c) in ("Lu", "Ll", "Nd") for c in letters)
    assert set(SETS["latin"] + SETS["digits"]) <= set(letters)


@pytest.mark.parametrize(
    ("characters", "message"),
    [
        ("", "string of characters"),
        ("  ", "string of characters"),
        (123, "in quotes when they are digits"),
        ("lettres", "did you mean 'letters'"),
        ("0043-0041", "go upward"),
        ("0041-110000", "10FFFF"),
    ],
)
def test_characters_that_mean_nothing_are_refused(characters: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Glyphs(characters=characters)


def test_all_is_what_the_character_map_has() -> None:
    face = Face(FONTS / "DejaVuSansDisplay.ttf")
    assert face.choose(None) == "".join(sorted(face.characters))
    drawn = [character for character, _ in specimens(face, None, 16, 0.0625)]
    assert drawn == sorted(face.characters - set("\u200b"))
    assert Glyphs(font=str(face.path), characters="all", size=16).info.num_classes <= len(drawn)


def test_computer_modern_gives_letters_and_digits_only() -> None:
    faces = {face.name: face for face in find_faces("matplotlib")}
    assert len(faces) == 22
    assert faces["cmr10.ttf#0"].choose(None) == "".join(sorted(SETS["latin"] + SETS["digits"]))
    assert faces["cmr10.ttf#0"].choose("Ωa") == "a"


def _collection(path: Path, *members: Path) -> None:
    """A .ttc of whole fonts: a header, and the tables' offsets moved to where each font lies."""
    head = 12 + 4 * len(members)
    blocks, offsets, position = [], [], head
    for member in members:
        data = bytearray(member.read_bytes())
        for i in range(struct.unpack(">H", data[4:6])[0]):
            at = 12 + 16 * i + 8
            data[at : at + 4] = struct.pack(">I", struct.unpack(">I", data[at : at + 4])[0] + position)
        data.extend(b"\0" * (-len(data) % 4))
        offsets.append(position)
        blocks.append(bytes(data))
        position += len(data)
    header = b"ttcf" + struct.pack(f">HHI{len(members)}I", 1, 0, len(members), *offsets)
    path.write_bytes(header + b"".join(blocks))


def test_a_collection_gives_all_its_faces_or_one(tmp_path: Path) -> None:
    path = tmp_path / "two.ttc"
    _collection(path, FONTS / "DejaVuSans.ttf", FONTS / "STIXGeneral.ttf")
    assert [face.name for face in find_faces(str(path))] == ["two.ttc#0", "two.ttc#1"]
    assert [face.index for face in find_faces(f"{path}#1")] == [1]
    second = dict(specimens(find_faces(f"{path}#1")[0], "abc", 32, 0.1))
    alone = dict(specimens(Face(FONTS / "STIXGeneral.ttf"), "abc", 32, 0.1))
    assert all((second[c] == alone[c]).all() for c in "abc")
    with pytest.raises(UserError, match=r"has faces 0 \.\. 1"):
        find_faces(f"{path}#2")


def test_fonts_that_cannot_be_used_are_sentences(tmp_path: Path) -> None:
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"\0\1\0\0 no font")
    text = tmp_path / "text.txt"
    text.write_text("text")
    for font, message in (
        (str(tmp_path / "absent.ttf"), "does not exist"),
        (str(text), "is not a font file"),
        ([], "empty list"),
        (str(broken), "cannot be read"),
        (f"{SANS}#7", "names face '7'"),
        (f"{SANS}#x", "names face 'x'"),
    ):
        with pytest.raises(UserError, match=message):
            Glyphs(font=font).split("train")
    with pytest.raises(UserError, match="matplotlib's fonts are not in"):
        find_faces("matplotlib", tmp_path)
    with pytest.raises(UserError, match="has any of characters='一'"):
        Glyphs(font=str(SANS), characters="一").split("train")


@pytest.mark.parametrize(
    "options",
    [
        {"size": 7},
        {"size": 257},
        {"size": 32.0},
        {"margin": 0.5},
        {"invert": 1},
        {"test_fraction": 1.0},
        {"test_fraction": -0.1},
        {"seed": -1},
    ],
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    (name,) = options
    with pytest.raises(UserError, match=name):
        Glyphs(**options)


def test_without_a_test_fraction_there_is_no_test_split() -> None:
    glyphs = Glyphs(font=str(SANS), characters="abc", size=8, test_fraction=0)
    assert len(glyphs.split("train")) == 3
    with pytest.raises(UserError, match="set test_fraction above 0"):
        glyphs.split("test")


@pytest.mark.skipif(not CHINESE.exists(), reason="needs the font WenQuanYi Micro Hei")
def test_chinese_characters() -> None:
    glyphs = Glyphs(font=str(CHINESE), characters="4E00-4E3F", size=24)
    assert glyphs.info.num_classes == 64
    assert glyphs.info.class_names[0] == "一"
    rows = np.flatnonzero((glyphs.split("train").values > 127).any(dim=0)[0].any(dim=1).numpy())
    assert len(rows) >= 20  # together they fill the frame
