"""From configuration to objects: where `conf/` lies, and how a node with a `_target_` becomes an instance.

Objects are built from registered classes alone. A `_target_` is looked up, never imported, so a run folder or a
checkpoint that somebody else wrote can name a class of this package and nothing more. To use a class of your own, put
the module that registers it into `plugins=[my_package.my_module]` on the command line.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf

import sde.data
import sde.density
import sde.evaluation
import sde.grids
import sde.interop.chains
import sde.losses
import sde.metrics
import sde.models
import sde.parameterizations
import sde.processes
import sde.solvers
import sde.training.ema
import sde.training.logging
import sde.training.optimizers
import sde.training.options
import sde.training.schedules  # noqa: F401 - for the registries
from sde.data import DATASETS
from sde.errors import UserError, closest, suggest
from sde.registry import Registry

Options = TypeVar("Options")


def conf_dir() -> Path:
    """The configuration folder, absolute: the copy inside an installed wheel, otherwise the checkout's."""
    packaged = Path(__file__).resolve().parent / "conf"
    return packaged if packaged.is_dir() else packaged.parent.parent / "conf"


def import_plugins(modules: Sequence[str]) -> None:
    """Import `modules`, which register classes of their own.

    Raises:
        UserError: when one cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"plugins: cannot import {module!r} ({error}): install it or correct the name") from error


def path_of(cls: type) -> str:
    """What `_target_` says for a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def find_class(target: str, group: str) -> type:
    """The registered class, or optimizer of `torch.optim`, called `target`.

    Raises:
        UserError: when there is none; nothing is imported to look.
    """
    known = {path_of(cls): cls for registry in Registry.all if registry.kind == group for _, cls in registry.items()}
    if group == "optimizer":
        known |= {
            f"torch.optim.{name}": cls
            for name, cls in vars(torch.optim).items()
            if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
        }
    if target not in known:
        raise UserError(
            f"{group}._target_={target!r} is not a registered {group}: it is one of {', '.join(sorted(known))}"
            f"{suggest(target, known)} (classes of your own: plugins=[module])"
        )
    return known[target]


def build(node: Mapping[str, Any], group: str, **runtime: Any) -> Any:
    """An instance of the class that `node["_target_"]` names.

    Args:
        node: the configuration: `_target_` and constructor arguments.
        group: the configuration group, for messages and for the registry ("solver").
        runtime: arguments that are facts of the run and not configuration (shapes, parameters).

    Raises:
        UserError: for an unknown class, an argument it does not take, or a value of the wrong type or range.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UserError(f"{group}={node!r} has no _target_: choose one of the files in {conf_dir() / group}")
    cls = find_class(str(node["_target_"]), group)
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    parameters = inspect.signature(cls).parameters
    arguments = {}
    for name, value in node.items():
        if name == "_target_":
            continue
        if name not in parameters:
            takes = [known for known in parameters if known not in runtime]
            raise UserError(
                f"{group}.{name} is not an option of {cls.__name__}, which takes {', '.join(takes)}"
                f"{suggest(name, takes)}"
            )
        arguments[name] = conform(f"{group}.{name}", value, hints.get(name, Any))
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in arguments
        and name not in runtime
    ]
    if missing:
        raise UserError(f"{group}.{missing[0]} is missing: {cls.__name__} needs a value for it")
    return cls(**arguments, **runtime)


def options_of(cls: type[Options], node: Any, group: str) -> Options:
    """The options `cls`, a dataclass, as the configuration `node` gives them; a `_target_` says nothing new.

    Raises:
        UserError: for one that it does not take, or a value of the wrong type or range.
    """
    hints = typing.get_type_hints(cls)
    if not isinstance(node, Mapping):
        raise UserError(f"{group}={node!r} must be options, such as {group}.{next(iter(hints))}=...")
    given = {str(name): value for name, value in node.items() if name != "_target_"}
    unknown = [name for name in given if name not in hints]
    if unknown:
        raise UserError(
            f"{group}.{unknown[0]} is not an option: there are {', '.join(hints)}{suggest(unknown[0], hints)}"
        )
    return cls(**{name: conform(f"{group}.{name}", value, hints[name]) for name, value in given.items()})


def conform(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` wants it: whole floats for int, ints for float, lists for tuples.

    Raises:
        UserError: naming the value and the type, when it cannot be had.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _conform_union(name, value, arguments)
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise UserError(f"{name}={value!r} must be true or false")
    if hint is int:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise UserError(f"{name}={value!r} must be a whole number")
    if hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise UserError(f"{name}={value!r} must be a number")
    if hint is str:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        raise UserError(f"{name}={value!r} must be a word")
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise UserError(f"{name}={value!r} is not one of {', '.join(str(choice) for choice in arguments)}")
    if origin in (tuple, list) or (inspect.isclass(origin) and issubclass(origin, Sequence)):
        return _conform_sequence(name, value, origin, arguments)
    if inspect.isclass(hint) and hint is not Any and not isinstance(value, hint):
        raise UserError(f"{name}={value!r} is not a {hint.__name__}")
    return value


def _conform_union(name: str, value: Any, choices: Sequence[Any]) -> Any:
    if value is None and type(None) in choices:
        return None
    failure: UserError | None = None
    # a value that already has one of the types is left alone; otherwise the first that takes it
    for choice in sorted(choices, key=lambda choice: not (inspect.isclass(choice) and isinstance(value, choice))):
        if choice is type(None):
            continue
        try:
            return conform(name, value, choice)
        except UserError as error:
            failure = failure or error
    raise failure or UserError(f"{name}={value!r} has none of the types {choices}")


def _conform_sequence(name: str, value: Any, origin: Any, arguments: Sequence[Any]) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"{name}={value!r} must be a list, such as {name}=[1,2]")
    items = list(value)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(items) != len(arguments):
            raise UserError(f"{name}={items!r} must be a list of {len(arguments)}")
        return tuple(conform(name, item, hint) for item, hint in zip(items, arguments, strict=True))
    hint = arguments[0] if arguments else Any
    converted = [conform(name, item, hint) for item in items]
    return converted if origin is list else tuple(converted)


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration with all interpolations resolved, as dictionaries, lists and plain values.

    Recipes have options of their own data set; those that another one, chosen in its place, does not take are left out.
    """
    container = OmegaConf.to_container(_with_fitting_data(config), resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _with_fitting_data(config: DictConfig) -> DictConfig:
    """`config` without the options that its data set does not take, unless the command line gives them."""
    node = OmegaConf.select(config, "data")
    sources = {path_of(cls): cls for _, cls in DATASETS.items()}
    cls = sources.get(node.get("_target_")) if isinstance(node, DictConfig) else None
    if cls is None:
        return config
    given = {word.lstrip("+").partition("=")[0] for word in sys.argv[1:]}
    takes = ("_target_", *inspect.signature(cls).parameters)
    kept = [str(key) for key in node if key in takes or f"data.{key}" in given]
    config = config.copy()
    config.data = OmegaConf.masked_copy(node, kept)
    return config


def closest_key(key: str, config: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """The keys that exist where a misspelt dotted `key` goes wrong, and the most similar one of the configuration."""

    def keys(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, Mapping):
            return []
        here = [f"{prefix}{name}" for name in node if name not in ("hydra", "_target_")]
        return here + [k for name, child in node.items() if name != "hydra" for k in keys(child, f"{prefix}{name}.")]

    everything = keys(config, "")
    node: Any = config
    parts = key.split(".")
    for part in parts[:-1]:
        if isinstance(node, Mapping) and part not in node:
            break
        node = node[part] if isinstance(node, Mapping) else {}
    beside = [str(k) for k in node if k not in ("hydra", "_target_")] if isinstance(node, Mapping) else []
    elsewhere = [name for name in everything if name.rpartition(".")[2] == parts[-1]]
    return beside, closest(key, everything) or (elsewhere[0] if len(elsewhere) == 1 else None)
