"""Errors that are the user's to fix, and the checks that raise them.

Every constructor checks what it is given with these functions, so that the message always has the same three
parts: the value, what is allowed, and the fix. The command lines print such a message as one sentence and leave
with a non-zero exit code; nothing else in the package catches them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable

_ALIKE = 0.7  # of 1: from here on two words are taken for one that was misspelt


class UserError(ValueError):
    """Something that the user asked for cannot be done; the message says what, what is allowed and the fix."""


class Fault(Exception):
    """Something that nothing in the input has caused, such as a lack of memory; the message is one sentence with a way
    out, and a command leaves with exit code 1."""


def suggest(value: object, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` when `value` is close to one of `allowed`, otherwise an empty string."""
    names = list(allowed)
    same = (name for name in names if name.lower() == str(value).lower())
    close = next(same, None) or closest(str(value), names)
    return f"; did you mean '{close}'?" if close else ""


def closest(wanted: str, names: Iterable[str]) -> str | None:
    """The name that `wanted` may be a misspelling of; None where none is close.

    What stands before the last dot or slash is compared for itself: options of one section are not alike for its sake.
    """
    found = [(likeness(wanted, name), name) for name in names]
    best = max(found, key=lambda pair: pair[0], default=(0.0, ""))
    return best[1] if best[0] >= _ALIKE else None


def likeness(one: str, other: str) -> float:
    """From 0 to 1: how much of two dotted names is the same, in the part that differs most."""
    pairs = zip(_halves(one), _halves(other), strict=True)
    return min(difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)


def _halves(name: str) -> tuple[str, str]:
    """A name's section, or nothing, and its last part; the point of a number divides nothing."""
    parts = re.split(r"[./](?=[^\W\d][^./]*$)", name, maxsplit=1)
    return ("", name) if len(parts) == 1 else (parts[0], parts[1])


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise `UserError` unless `value` is one of the strings in `allowed`."""
    names = list(allowed)
    if value not in names:
        raise UserError(f"{name}={value!r} is not one of {', '.join(names)}{suggest(value, names)}")


def check_number(
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """Raise `UserError` unless `value` is a finite number with above < value < below, at_least <= value <= at_most."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name}={value!r} is not a number")
    inside = above < value < below and at_least <= value <= at_most
    if not (math.isfinite(value) and inside):
        bounds = [
            text
            for text, bound in (
                (f"above {above:g}", above),
                (f"at least {at_least:g}", at_least),
                (f"below {below:g}", below),
                (f"at most {at_most:g}", at_most),
            )
            if math.isfinite(bound)
        ]
        raise UserError(f"{name}={value!r} is out of range: it must be {' and '.join(bounds) or 'finite'}")


def check_flag(name: str, value: object) -> None:
    """Raise `UserError` unless `value` is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r} must be true or false")
