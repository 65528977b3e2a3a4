"""From a picture file to pixels: cropping, scaling, colors, transparency and orientation."""

import io

import numpy as np
import pytest
from PIL import Image

from sde.data.pictures import Shaping, decode
from sde.errors import UserError

RNG = np.random.default_rng(0)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_cropping_takes_the_largest_centered_square() -> None:
    pixels = RNG.integers(0, 256, (8, 14, 3), dtype=np.uint8)
    assert (Shaping(8)(Image.fromarray(pixels), "x") == pixels[:, 3:11].transpose(2, 0, 1)).all()
    assert (Shaping(8)(Image.fromarray(pixels.transpose(1, 0, 2)), "x") == pixels.transpose(2, 1, 0)[:, 3:11]).all()


def test_scaling_keeps_the_mean_and_does_not_alias() -> None:
    # Stripes finer than the result can show become an even gray; the nearest pixel would be black or white.
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    inner = Shaping(16)(Image.fromarray(stripes), "x")[:, :, 2:-2]
    assert np.abs(inner.astype(int) - 127.5).max() < 8
    wide = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 32, axis=0).repeat(3, axis=2)
    squashed = Shaping(16, "squash")(Image.fromarray(wide), "x")
    assert squashed.shape == (3, 16, 16)
    assert squashed[0, 0, 0] < 16  # from one edge to the other
    assert squashed[0, 0, -1] > 236


def test_gray_is_luma() -> None:
    colors = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
    luma = Shaping(None, "none", channels=1)(Image.fromarray(colors), "x")
    np.testing.assert_allclose(luma[0, 0], [0.299 * 255, 0.587 * 255, 0.114 * 255, 255], atol=0.6)


def test_modes_of_pictures() -> None:
    """Transparency shows white, 16 bits are scaled, palettes and gray become color."""
    shaping = Shaping(None, "none")

    def level(image: Image.Image, form: str = "PNG") -> list[int]:
        return decode(encoded(image, form), shaping, "x")[:, 0, 0].tolist()

    assert level(Image.new("RGBA", (2, 2), (10, 20, 30, 0))) == [255, 255, 255]
    assert level(Image.new("RGBA", (2, 2), (0, 0, 0, 51))) == [204, 204, 204]
    assert level(Image.new("LA", (2, 2), (10, 255))) == [10, 10, 10]
    assert level(Image.fromarray(np.full((2, 2), 257 * 100, dtype=np.uint16))) == [100, 100, 100]
    assert level(Image.new("1", (2, 2), 1)) == [255, 255, 255]
    assert level(Image.new("CMYK", (2, 2), (0, 0, 0, 255)), "TIFF") == [0, 0, 0]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert level(palette) == [9, 8, 7]
    with pytest.raises(UserError, match="x has floating-point pixels"):
        level(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF")


def test_orientation_is_obeyed() -> None:
    pixels = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the left: shown after a quarter turn to the right
    turned = decode(encoded(Image.fromarray(pixels), "PNG", exif=exif), Shaping(8), "x")
    assert (turned == np.rot90(pixels, -1).transpose(2, 0, 1)).all()
