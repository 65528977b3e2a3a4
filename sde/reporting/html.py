"""HTML in which nothing is left unescaped by oversight: text is escaped unless it is `Markup`, which elements are."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

_EMPTY = frozenset({"br", "img", "input", "meta"})  # the elements of SVG need their end


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: Any) -> Markup:
    """`<tag attributes>children</tag>`.

    Args:
        tag: name of the element.
        children: contents; escaped, except `Markup`.
        attributes: values are escaped; None and False leave one out, True gives one without a value. Underscores
            become hyphens, and one at the end, as in `class_`, goes.
    """
    words = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        words.append(name if value is True else f'{name}="{html.escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    return Markup(opening if tag in _EMPTY else f"{opening}{join(children)}</{tag}>")


def join(children: Iterable[str]) -> Markup:
    """Contents one after the other; escaped, except `Markup`."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(c, quote=False) for c in children))


def data_block(name: str, value: Any) -> Markup:
    """Plain values for the script to read, as JSON that no text in it can end."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="{html.escape(name)}">{text}</script>')


def table(head: Iterable[str], rows: Iterable[Iterable[str]], caption: str | None = None, **attributes: Any) -> Markup:
    """A table with a row of headings; the first cell of each row is its heading."""
    body = [
        element("tr", *(element("td" if k else "th", cell, scope=None if k else "row") for k, cell in enumerate(row)))
        for row in rows
    ]
    return element(
        "div",
        element(
            "table",
            *([element("caption", caption)] if caption else []),
            element("thead", element("tr", *(element("th", text, scope="col") for text in head))),
            element("tbody", *body),
            **attributes,
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption or "table",
    )
