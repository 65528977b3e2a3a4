"""From a picture file to pixels: decoding, orientation, transparency, cropping and scaling.

Only formats that Pillow decodes itself are opened (no PostScript, which would run a program). Large pictures are
scaled down with the Lanczos filter over the full support, as antialiasing asks, from the largest centered square.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from sde.data.base import check_whole
from sde.errors import UserError, check_choice

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # what Pillow calls them
SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
RESIZES = ("crop", "squash", "none")
MAX_SIZE = 4096


@dataclass(frozen=True)
class Shaping:
    """How pictures of any size and mode become arrays of one shape.

    Args:
        size: side of the result in pixels; None, with resize "none", leaves pictures as large as they are.
        resize: "crop" scales the largest centered square, "squash" scales the whole picture to a square, "none" takes
            only pictures that have the size already.
        channels: 3 for color, 1 for gray (luma of ITU-R 601).

    Raises:
        UserError: a value is not allowed.
    """

    size: int | None
    resize: str = "crop"
    channels: int = 3

    def __post_init__(self) -> None:
        check_choice("resize", self.resize, RESIZES)
        if self.size is not None:
            check_whole("size", self.size, at_least=1, at_most=MAX_SIZE)
        elif self.resize != "none":
            raise UserError(f"size=None with resize={self.resize!r}: give a size in pixels, or resize=none")
        if self.channels not in (1, 3) or isinstance(self.channels, bool):
            raise UserError(f"channels={self.channels!r} is not one of 3 (color), 1 (gray)")

    def __call__(self, image: Image.Image, name: str) -> np.ndarray:
        """The pixels of `image`, uint8 (channels, height, width); `name` is for messages."""
        image = _flatten(ImageOps.exif_transpose(image), name).convert("RGB" if self.channels == 3 else "L")
        if self.resize == "none":
            if self.size is not None and image.size != (self.size, self.size):
                raise UserError(
                    f"{name} has {image.width} x {image.height} pixels, not {self.size} x {self.size}: "
                    "set resize to crop or squash"
                )
        elif image.size != (self.size, self.size):
            assert self.size is not None
            image = image.resize((self.size, self.size), Image.Resampling.LANCZOS, box=self._box(image))
        pixels = np.asarray(image, dtype=np.uint8)
        return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], self.channels).transpose(2, 0, 1))

    def _box(self, image: Image.Image) -> tuple[float, float, float, float]:
        width, height = image.size
        if self.resize == "squash":
            return 0, 0, width, height
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side


def decode(content: bytes, shaping: Shaping, name: str) -> np.ndarray:
    """The pixels of a picture file; of an animation, its first frame.

    Args:
        content: the bytes of the file.
        shaping: what to make of it.
        name: what to call it in messages.

    Returns:
        uint8 (channels, height, width).

    Raises:
        UserError: it is damaged, not a picture, or larger than Pillow's limit against decompression bombs.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            return shaping(image, name)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large ({error}): make it smaller, or take it out") from error
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to
        reason = "Pillow knows no such format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(f"{name} is damaged or is not a picture ({reason}): replace it, or take it out") from error


def _flatten(image: Image.Image, name: str) -> Image.Image:
    """8 bits a channel and no transparency: what shows through is white."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip instead of scale
        return Image.fromarray(((_wide(image, name) * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise UserError(f"{name} has floating-point pixels: save it with 8 bits a channel")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image)
    return image


def _wide(image: Image.Image, name: str) -> np.ndarray:
    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise UserError(f"{name} has pixels beyond 16 bits: save it with 8 bits a channel")
    return values
