"""Results as Markdown, and their places in docs/."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sde.errors import UserError
from sde.files import write_text


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns, so that it reads well in a terminal too."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        parts = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        return "| " + " | ".join(parts) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(cells[0]), rule, *(line(row) for row in cells[1:])])


def replace_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the comments <!-- name --> and <!-- end of name --> of a Markdown file.

    Raises:
        UserError: when the file has no such place.
    """
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(content):
        raise UserError(f"{path} has no place for results: write {begin} and {end} where they belong")
    write_text(path, pattern.sub(lambda _: f"{begin}\n{text.strip()}\n{end}", content, count=1))
