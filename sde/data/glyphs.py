"""Pictures of characters, drawn on first use from fonts that are already there: the default data set.

No download: matplotlib ships 22 text faces (DejaVu, STIX, Computer Modern), which hold some thousands of distinct
pictures of letters and digits; any other font file works as well. The character is the label. With a Chinese font

    data.font=/usr/share/fonts/truetype/wqy/wqy-microhei.ttc data.characters=cjk

gives the twenty thousand unified ideographs. How the pictures are drawn is in `fonts`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sde.data.base import DataInfo, Dataset, Split, check_whole, register
from sde.data.cache import cache_dir, key
from sde.data.fonts import ALL, Face, find_faces, parse_characters, specimens
from sde.data.prepared import VERSION, Prepared, SplitWriter, held_out, load_or_prepare
from sde.errors import UserError, check_flag, check_number


@register("glyphs")
class Glyphs(Dataset):
    """Characters of fonts, one gray picture each, labelled by the character.

    Characters that a face lacks, blank ones and exact repetitions of a picture are left out. The test split holds
    out pictures, not characters: a held-out letter is usually seen in other faces (with one face, in none).

    Args:
        font: `matplotlib`, or the path of a .ttf, .otf or .ttc file, or a list of paths. All faces of a .ttc
            collection are used; `file.ttc#0` is one of them.
        characters: `letters` (Latin, Greek and Cyrillic letters and digits, without those that look like another),
            `latin`, `digits`, `greek`, `cyrillic`, `ascii`, `cjk`, `all` (whatever a face has), hexadecimal code
            points (`4E00-9FFF`, `0041-005A,0061-007A`), or the characters themselves.
        size: side of the pictures in pixels, 8 to 256.
        margin: empty border, as a fraction of the side, 0 to 0.4.
        invert: black on white instead of white on black.
        test_fraction: share of the pictures that are held out, 0 up to 1 (exclusive).
        seed: chooses which are held out.

    Raises:
        UserError: a value is not allowed, a font cannot be read, or no face has any of the characters.
    """

    random_flip = False

    def __init__(
        self,
        font: str | Sequence[str] = "matplotlib",
        characters: str = "letters",
        size: int = 32,
        margin: float = 0.0625,
        invert: bool = False,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        check_whole("size", size, at_least=8, at_most=256)
        check_number("margin", margin, at_least=0, at_most=0.4)
        check_flag("invert", invert)
        check_number("test_fraction", test_fraction, at_least=0, below=1)
        check_whole("seed", seed, at_least=0)
        self._wanted = parse_characters(characters)
        self._font = font if isinstance(font, str | Path) else [str(path) for path in font]
        self._what = characters
        self._size, self._margin, self._invert = size, float(margin), invert
        self._test_fraction, self._seed = float(test_fraction), seed
        self._prepared: Prepared | None = None

    @property
    def info(self) -> DataInfo:
        """(1, size, size) pictures; as many classes as there are characters that were drawn."""
        return self._prepare().info

    def split(self, name: str) -> Split:
        """uint8 values (N, 1, size, size), memory-mapped, and labels that count the characters."""
        return self._prepare().split(name, "set test_fraction above 0 to hold pictures out")

    def _prepare(self) -> Prepared:
        if self._prepared is None:
            faces = find_faces(self._font)
            files = [[face.name, face.only, *_identity(face.path)] for face in faces]
            options = [self._wanted or ALL, self._size, self._margin, self._invert, self._test_fraction, self._seed]
            folder = cache_dir() / f"glyphs-{key(VERSION, files, options)}"
            self._prepared = load_or_prepare(folder, lambda temporary: self._draw(faces, temporary))
        return self._prepared

    def _draw(self, faces: list[Face], folder: Path) -> DataInfo:
        """Draw everything into `folder`. Pictures wait in a file, since how many there will be is not known before."""
        names: list[str] = []
        characters: list[str] = []
        seen: set[bytes] = set()
        area = self._size**2
        with tempfile.TemporaryFile(dir=folder) as pile:
            for face in tqdm(faces, desc="drawing glyphs", unit="face", leave=False, disable=None):
                for character, picture in specimens(face, self._wanted, self._size, self._margin):
                    pixels = (255 - picture if self._invert else picture).tobytes()
                    if pixels not in seen:
                        seen.add(pixels)
                        names.append(f"{face.name}:{ord(character):X}")
                        characters.append(character)
                        pile.write(pixels)
            if not names:
                raise UserError(
                    f"no face of font={self._font!r} has any of characters={self._what!r}: "
                    "choose characters that it has, or another font"
                )
            classes = sorted(set(characters))
            number = {character: i for i, character in enumerate(classes)}
            labels = np.array([number[character] for character in characters])
            in_test = held_out(names, self._test_fraction, self._seed)
            writer = SplitWriter(folder, in_test, (1, self._size, self._size), labels)
            pile.seek(0)
            for i in range(len(names)):
                picture = np.frombuffer(pile.read(area), dtype=np.uint8)
                writer.write(i, picture.reshape(1, self._size, self._size))
            writer.close()
        return DataInfo("glyphs", (1, self._size, self._size), len(classes), tuple(classes))


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
