"""Pictures of a run as data URIs, as many as fit: the newest of each kind first, then previews spread over the run."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

_TYPES = {"PNG": "image/png", "GIF": "image/gif"}
_PREVIEW = re.compile(r"step-(\d+)")
OTHERS = (  # pattern below the run, what it is
    ("samples/*/grid.png", "Samples"),
    ("samples/*/trajectory.gif", "From noise to data"),
    ("likelihood/*/histogram.png", "Likelihoods"),
    ("likelihood/*/best_worst.png", "The likeliest and the least likely"),
    ("likelihood/*/terms.png", "Terms of the bound"),
    ("ema/profiles.png", "Averages of the weights"),
)


@dataclass(frozen=True)
class Picture:
    """A picture file.

    Args:
        path: the file.
        mime: its type.
        size: width and height in pixels.
        bytes: that its data URI takes.
        step: of a preview.
        title: of any other picture.
    """

    path: Path
    mime: str
    size: tuple[int, int]
    bytes: int
    step: int = 0
    title: str = ""

    def uri(self) -> str:
        """The file as a data URI."""
        return f"data:{self.mime};base64,{base64.b64encode(self.path.read_bytes()).decode()}"


@dataclass
class Gallery:
    """The pictures of a run that the page shows, and what it does not.

    Attributes:
        previews: sample grids in the order of their steps.
        animation: the newest one of a preview.
        others: what commands have drawn later.
        notes: sentences about what was left out.
    """

    previews: list[Picture] = field(default_factory=list)
    animation: Picture | None = None
    others: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def gather(run: Path, count: int, budget: float) -> Gallery:
    """The pictures of the run at `run`: at most `count` previews, and all together at most `budget` bytes."""
    gallery = Gallery()
    previews = _previews(run, "png")
    animations = _previews(run, "gif")
    newest_of = [(title, _newest(run, pattern)) for pattern, title in OTHERS]
    wanted = [
        *((p, "the newest preview") for p in previews[-1:]),
        *((p, "the newest animation") for p in animations[-1:]),
        *((open_picture(path, title=title), f"{path.relative_to(run)}") for title, path in newest_of if path),
    ]
    chosen: set[Path] = set()
    for picture, what in wanted:
        if picture is None:
            gallery.notes.append(f"{what} is no PNG or GIF that can be read.")
        elif picture.bytes > budget:
            gallery.notes.append(f"{what} ({picture.bytes / 1e6:.1f} MB) would make the page too large.")
        else:
            budget -= picture.bytes
            chosen.add(picture.path)
            if picture.title:
                gallery.others.append(picture)
    gallery.animation = next((p for p in animations[-1:] if p.path in chosen), None)
    newest = [p for p in previews[-1:] if p.path in chosen]
    gallery.previews = _spread(previews[:-1], count - 1, budget) + newest
    if len(gallery.previews) < len(previews):
        gallery.notes.append(
            f"{len(gallery.previews)} of {len(previews)} previews are shown, spread over the run; "
            "previews= and max_megabytes= set how many."
        )
    return gallery


def _previews(run: Path, ending: str) -> list[Picture]:
    found = []
    for path in (run / "previews").glob(f"step-*.{ending}"):
        step = _PREVIEW.fullmatch(path.stem)
        picture = open_picture(path, step=int(step[1])) if step else None
        if picture is not None:
            found.append(picture)
    return sorted(found, key=lambda picture: picture.step)


def _newest(run: Path, pattern: str) -> Path | None:
    return max(run.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def open_picture(path: Path, step: int = 0, title: str = "") -> Picture | None:
    """What the header of a file says; None for one that is no PNG or GIF."""
    try:
        with Image.open(path) as image:
            mime, size = _TYPES.get(image.format or ""), image.size
        length = path.stat().st_size
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        return None
    return None if mime is None else Picture(path, mime, size, 4 * -(-length // 3) + 30, step, title)


def _spread(pictures: Sequence[Picture], count: int, budget: float) -> list[Picture]:
    """As many of `pictures` as `count` and `budget` allow, evenly spread, the first one among them."""
    for n in range(min(count, len(pictures)), 0, -1):
        chosen = [pictures[round(k * len(pictures) / n)] for k in range(n)]
        if sum(picture.bytes for picture in chosen) <= budget:
            return chosen
    return []
