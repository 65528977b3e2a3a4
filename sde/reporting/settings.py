"""The configuration of runs as rows of a table: what differs from the defaults, and what between runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from sde.config import find_class
from sde.errors import UserError

MISSING = "-"


def flatten(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"training.steps": 800, ...} for nested options; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{before}{key}"
        if isinstance(inner, Mapping) and inner:
            flat |= flatten(inner, f"{name}.")
        else:
            flat[name] = inner
    return flat


def show(value: Any) -> str:
    """A value as the command line writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(show(v) for v in value)}]"
    return str(value)


def defaults_of(config: Mapping[str, Any], composed: Mapping[str, Any]) -> dict[str, Any]:
    """The default of every option of `config` that has one.

    Args:
        config: of a run.
        composed: what a run without any options has.

    An option of a class that `composed` does not have there has the class's own default, which a file in conf/ repeats.
    """
    found = {}
    for name, value in flatten(composed).items():
        group = name.partition(".")[0]
        if name == f"{group}._target_" or _target(config, group) == _target(composed, group):
            found[name] = value
    for group in config:
        target = _target(config, group)
        if target is not None and target != _target(composed, group):
            found |= {f"{group}.{name}": value for name, value in _class_defaults(target, group).items()}
    return {name: found[name] for name in flatten(config) if name in found}


def _target(config: Mapping[str, Any], group: str) -> str | None:
    node = config.get(group)
    return str(node["_target_"]) if isinstance(node, Mapping) and "_target_" in node else None


def _class_defaults(target: str, group: str) -> dict[str, Any]:
    try:
        parameters = inspect.signature(find_class(target, group.removeprefix("preview_"))).parameters
    except (UserError, ValueError):  # a class of the user's own, or one without a signature
        return {}
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def same(value: Any, other: Any) -> bool:
    """Whether two values are the same to a reader: 1 and 1.0 are, as are a list and a tuple."""
    return show(value) == show(other)


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(option, its value in each configuration) where they are not all the same; `MISSING` where there is none."""
    flats = [flatten(config) for config in configs]
    names = list(dict.fromkeys(name for flat in flats for name in flat))
    rows = [(name, [show(flat[name]) if name in flat else MISSING for flat in flats]) for name in names]
    return [row for row in rows if len(set(row[1])) > 1]
