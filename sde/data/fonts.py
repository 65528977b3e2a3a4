"""Pictures of characters, drawn the way a type specimen shows them.

All characters of a face share one scale and one baseline, so that x is smaller than X and p hangs below the line;
each is centered left to right on its ink. The scale is the largest at which the set fits inside the margin. A few
freaks (a ligature as wide as a word, a bracket as tall as three lines) must not shrink everything else: extents count
up to `FREAK` times their 95 % quantile, and a glyph beyond that is shrunk alone.

Glyphs are drawn several times larger and averaged down. That places them at fractions of a pixel and makes hinting,
which distorts small sizes and differs among builds of FreeType, irrelevant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sde.errors import UserError, suggest

FREAK = 1.3
MEASURE = 256  # pixels of an em at which extents are measured
NO_CHARACTER = "\U0010ffff"  # never assigned, so that a face shows its missing-glyph box for it
SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")

LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
GREEK = "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩαβγδεζηθικλμνξοπρςστυφχψω"
CYRILLIC = "АБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯабвгдежзийклмнопрстуфхцчшщъыьэюя"
# Letters that look like a Latin letter, a digit or (the Cyrillic ones) a Greek letter: each would be a second class
# for the same picture.
TWINS = "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧικνορυχ" + "АВГЕЗКМНОПРСТУФХаекорсух"
SETS: dict[str, str] = {
    "letters": "".join(sorted(set(LATIN + DIGITS + GREEK + CYRILLIC) - set(TWINS))),
    "latin": LATIN,
    "digits": DIGITS,
    "greek": GREEK,
    "cyrillic": CYRILLIC,
    "ascii": "".join(chr(code) for code in range(0x21, 0x7F)),
    "cjk": "".join(chr(code) for code in range(0x4E00, 0xA000)),
}
ALL = "all"
RANGES = re.compile(r"[0-9A-Fa-f]{4,6}-[0-9A-Fa-f]{4,6}(,[0-9A-Fa-f]{4,6}-[0-9A-Fa-f]{4,6})*")

# The upright, slanted and bold text faces that matplotlib ships. Those of Computer Modern keep TeX's encoding, in
# which only letters and digits are where Unicode has them.
MATPLOTLIB_FACES: tuple[tuple[str, str | None], ...] = (
    *((f"DejaVuSans{style}.ttf", None) for style in ("", "-Oblique", "-Bold", "-BoldOblique")),
    *((f"DejaVuSansMono{style}.ttf", None) for style in ("", "-Oblique", "-Bold", "-BoldOblique")),
    *((f"DejaVuSerif{style}.ttf", None) for style in ("", "-Italic", "-Bold", "-BoldItalic")),
    *((f"STIXGeneral{style}.ttf", None) for style in ("", "Italic", "Bol", "BolIta")),
    *((f"cm{style}10.ttf", LATIN + DIGITS) for style in ("r", "ti", "b", "ss", "tt", "mi")),
)


def parse_characters(characters: str) -> str | None:
    """The characters that an option means, sorted and each once; None for every character a face has.

    Args:
        characters: the name of a set (`letters`, `latin`, ...), `all`, ranges of hexadecimal code points
            (`4E00-9FFF` or `0041-005A,0061-007A`), or the characters themselves.

    Raises:
        UserError: it is empty, a backward range, or looks like a misspelt name.
    """
    if not isinstance(characters, str) or not characters.strip():
        raise UserError(
            f"characters={characters!r} must be {', '.join(SETS)}, {ALL}, code points such as 4E00-9FFF, or a "
            "string of characters (in quotes when they are digits)"
        )
    if characters == ALL:
        return None
    if characters in SETS:
        return "".join(sorted(SETS[characters]))
    if RANGES.fullmatch(characters):
        return _parse_ranges(characters)
    if hint := suggest(characters, [*SETS, ALL]):
        raise UserError(
            f"characters={characters!r} is not one of {', '.join(SETS)}, {ALL}{hint} For these letters themselves "
            "write them in another order"
        )
    return "".join(sorted(set(characters) - set(" \t\n\r")))


def _parse_ranges(text: str) -> str:
    codes: set[int] = set()
    for part in text.split(","):
        first, last = (int(end, 16) for end in part.split("-"))
        if first > last or last > 0x10FFFF:
            raise UserError(f"characters={text!r}: {part} must go upward and end at 10FFFF at most")
        codes.update(range(first, last + 1))
    return "".join(map(chr, sorted(codes)))


@dataclass(frozen=True)
class Face:
    """One face of a font file.

    Args:
        path: a .ttf, .otf or .ttc file.
        index: which face of a collection.
        only: the characters to use of it; None for all.

    Raises:
        UserError: the file is not a font that can be read (when its content is first asked for).
    """

    path: Path
    index: int = 0
    only: str | None = None

    @property
    def name(self) -> str:
        """File name and index: the same on every platform."""
        return f"{self.path.name}#{self.index}"

    @cached_property
    def characters(self) -> frozenset[str]:
        """What the face has a glyph for, by its character map."""
        from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

        try:
            with TTFont(self.path, fontNumber=self.index, lazy=True) as font:
                table = font.getBestCmap() or {}
        except Exception as error:  # fontTools raises whatever the damage leads to
            raise _unreadable(self.path, error) from error
        if not table:
            raise UserError(f"the font {str(self.path)!r} has no Unicode character map: choose another font")
        # U+D800 .. DFFF are halves of UTF-16 pairs, not characters.
        return frozenset(chr(code) for code, glyph in table.items() if glyph != ".notdef" and code >> 11 != 0x1B)

    def at(self, size: float) -> ImageFont.FreeTypeFont:
        """The face with an em of `size` pixels."""
        try:
            return ImageFont.truetype(self.path, size, index=self.index, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def choose(self, wanted: str | None) -> str:
        """Those of the characters `wanted` (None: all) that the face has, sorted."""
        chosen = self.characters if wanted is None else self.characters.intersection(wanted)
        return "".join(sorted(chosen if self.only is None else chosen.intersection(self.only)))


def find_faces(font: str | Path | Sequence[str | Path], matplotlib_fonts: Path | None = None) -> list[Face]:
    """The faces that an option means.

    Args:
        font: "matplotlib", or the path of a font file or several; all faces of a collection are used, or one with
            `#index` after its name.
        matplotlib_fonts: where matplotlib's .ttf files are, when not where matplotlib says.

    Raises:
        UserError: a file does not exist or is not a font file.
    """
    if font == "matplotlib":
        folder = matplotlib_fonts or _matplotlib_fonts()
        faces = [Face(folder / name, 0, only) for name, only in MATPLOTLIB_FACES if (folder / name).exists()]
        if not faces:
            raise UserError(f"matplotlib's fonts are not in {str(folder)!r}: give font= the path of a .ttf file")
        return faces
    paths = [font] if isinstance(font, str | Path) else list(font)
    if not paths:
        raise UserError("font is an empty list: give matplotlib, or paths of .ttf, .otf or .ttc files")
    return [face for path in paths for face in _faces_of(path)]


def _matplotlib_fonts() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _faces_of(given: str | Path) -> list[Face]:
    text, _, index = str(given).partition("#")
    path = Path(text).expanduser()
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        problem = "is not a font file" if path.exists() else "does not exist"
        raise UserError(f"font={str(given)!r} {problem}: give matplotlib, or paths of {', '.join(SUFFIXES)} files")
    count = _count_faces(path)
    if index and (not index.isdecimal() or int(index) >= count):
        raise UserError(f"font={str(given)!r} names face {index!r}: {path.name} has faces 0 .. {count - 1}")
    return [Face(path, int(index))] if index else [Face(path, i) for i in range(count)]


def _count_faces(path: Path) -> int:
    with open(path, "rb") as file:
        head = file.read(12)
    if head[:4] != b"ttcf":
        return 1
    return max(1, int.from_bytes(head[8:12], "big"))


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"the font {str(path)!r} cannot be read ({error or type(error).__name__}): choose another file")


class Ink(NamedTuple):
    """The box that a character's ink fills, in pixels from its origin on the baseline; y points down."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.right - self.left, self.bottom - self.top


def ink(font: ImageFont.FreeTypeFont, character: str) -> Ink | None:
    """Where the ink of a character is, None when it leaves none.

    Not the box that Pillow has for text, which reaches from the origin to where the next character would begin.
    """
    mask, (x, y) = font.getmask2(character, mode="L", anchor="ls")
    box = mask.getbbox()
    return None if box is None else Ink(x + box[0], y + box[1], x + box[2], y + box[3])


class Specimen:
    """Draws a set of characters of one face at their common scale.

    Args:
        face: the face.
        characters: those that share the scale; all must be in the face.
        size: side of the pictures in pixels.
        margin: empty border as a fraction of the side, in [0, 0.5).
    """

    def __init__(self, face: Face, characters: str, size: int, margin: float) -> None:
        self._face, self._size, self._inner = face, size, size * (1 - 2 * margin)
        # At least 4 x 4 samples a pixel, and an em large enough for hinting not to matter.
        self._oversampling = max(4, -(-192 // size))
        ruler = face.at(MEASURE)
        inks = [box for box in (ink(ruler, character) for character in characters) if box is not None]
        above = _extent([-box.top for box in inks]) / MEASURE
        below = _extent([box.bottom for box in inks]) / MEASURE
        width = _extent([box.size[0] for box in inks]) / MEASURE
        self._scale = self._inner / max(above + below, width, 1 / MEASURE)  # pixels an em
        self._baseline = size / 2 + (above - below) / 2 * self._scale  # from the top
        self._font = face.at(self._scale * self._oversampling)
        self._missing = self._draw(NO_CHARACTER)

    def draw(self, character: str) -> np.ndarray | None:
        """White on black, uint8 (size, size); None when there is no ink or it is the face's missing-glyph box."""
        picture = self._draw(character)
        if picture is None or (self._missing is not None and np.array_equal(picture, self._missing)):
            return None
        return picture

    def _draw(self, character: str) -> np.ndarray | None:
        font, box = self._font, ink(self._font, character)
        side, room = self._size * self._oversampling, self._inner * self._oversampling
        if box is not None and max(box.size) > room + 1:  # a freak, rather than a box rounded up
            font = self._face.at(font.size * room / max(box.size))
            box = ink(font, character)
        if box is None:
            return None
        edge = (side - room) / 2
        baseline = min(max(self._baseline * self._oversampling, edge - box.top), side - edge - box.bottom)
        canvas = Image.new("L", (side, side))
        origin = round((side - box.left - box.right) / 2), round(baseline)
        ImageDraw.Draw(canvas).text(origin, character, fill=255, font=font, anchor="ls")
        picture = np.asarray(canvas.reduce(self._oversampling))
        return picture if picture.any() else None


def _extent(reaches: list[int]) -> float:
    """How far a set of glyphs reaches in one direction, freaks apart; not less than 0."""
    if not reaches:
        return 0.0
    return max(0.0, min(float(max(reaches)), FREAK * float(np.quantile(reaches, 0.95))))


def specimens(face: Face, wanted: str | None, size: int, margin: float) -> Iterator[tuple[str, np.ndarray]]:
    """(character, picture) of everything in `wanted` that `face` has and that leaves ink, in order of code point."""
    characters = face.choose(wanted)
    if characters:
        specimen = Specimen(face, characters, size, margin)
        for character in characters:
            picture = specimen.draw(character)
            if picture is not None:
                yield character, picture
