"""What kinds of values the options of other projects' configurations have, checked once and by name.

A configuration comes as JSON, in which flags of a command line are often text: "True", "8", "32,16". Text that stands
for a value of the right kind is read as that value; everything else is refused, so that nothing is taken for what it
is not ("False" is true in Python).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sde.errors import UserError


@dataclass(frozen=True)
class Kind:
    """A kind of values.

    Args:
        says: what values are, for messages: "a whole number".
        read: makes a value of what stands in a configuration; a `ValueError` or `TypeError` says that it cannot.
    """

    says: str
    read: Callable[[Any], Any]


class Option(NamedTuple):
    """An option of a configuration: its kind and its default, which may be of another one; `REQUIRED` for none."""

    kind: Kind
    default: Any = None


REQUIRED = object()


def read_options(
    config: Mapping[str, Any], table: Mapping[str, Option], what: str | None, prefix: str = ""
) -> dict[str, Any]:
    """The options of `table` as `config` has them, with defaults for the others.

    Args:
        config: as it was read.
        table: options by name. A required one that `config` does not have, or has as null, is not in the result.
        what: the project, for the message that refuses other names; None passes over them.
        prefix: of names in messages, such as "model.".

    Raises:
        UserError: a value of another kind, or an unknown name.
    """
    options = {key: option.default for key, option in table.items() if option.default is not REQUIRED}
    for key, value in config.items():
        if key in table and value is None and table[key].default is REQUIRED:
            continue
        if key in table:
            options[key] = _read(f"{prefix}{key}", value, table[key].kind)
        elif what is not None:
            raise UserError(f"{prefix}{key} of the configuration is not an option of {what} that can be followed")
    return options


def _read(name: str, value: Any, kind: Kind) -> Any:
    try:
        return kind.read(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name}={value!r} of the configuration must be {kind.says}") from None


def _flag(value: Any) -> bool:
    known = {"true": True, "false": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in known:
        return known[value.strip().lower()]
    raise ValueError


def _word(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError


FLAG = Kind("true or false", _flag)
WORD = Kind("a word", _word)
ANYTHING = Kind("anything", lambda value: value)


def whole(at_least: int) -> Kind:
    """Whole numbers of at least `at_least`."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError
        number = int(value)
        if number < at_least or (isinstance(value, float) and number != value):
            raise ValueError
        return number

    return Kind(f"a whole number of at least {at_least}", read)


def number(
    *, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf, infinite: bool = False
) -> Kind:
    """Numbers above `above`, of at least `at_least` and below `below`; infinity only where it is asked for."""
    bounds = ((" above", above), (" of at least", at_least), (" below", below))
    says = " and".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))

    def read(value: Any) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError
        given = float(value) if isinstance(value, str) else value
        if not (above < given and at_least <= given and (given < below or (infinite and given == math.inf == below))):
            raise ValueError
        return given

    return Kind(f"a number{says}", read)


def several(kind: Kind, at_least: int = 0) -> Kind:
    """Lists of at least `at_least` values of `kind`, as tuples; a text has commas between them, and may be empty."""

    def read(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")] if value.strip() else []
        if not isinstance(value, list | tuple) or len(value) < at_least:
            raise ValueError
        return tuple(kind.read(item) for item in value)

    return Kind(f"a list{' that is not empty' if at_least else ''}, each entry {kind.says}", read)


def optional(kind: Kind) -> Kind:
    """`kind`, or null."""
    return Kind(f"{kind.says}, or null", lambda value: None if value is None else kind.read(value))
