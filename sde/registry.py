"""Names for classes: `@register("pc")` on a class makes it `solver=pc` on the command line.

A registry is a dictionary from the name used in `conf/<group>/<name>.yaml` to a class. There is one for each kind
of component (sde, parameterization, grid, solver, model, data, ...), created in the module that holds their base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from sde.errors import UserError, suggest

T = TypeVar("T")


class Registry(Generic[T]):
    """The named classes of one kind.

    Args:
        kind: what the classes are, as the configuration group calls it (`"solver"`).
    """

    all: list[Registry] = []  # noqa: RUF012 - every registry of the package, for building and for tests

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}
        Registry.all.append(self)

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that enters a class under `name`; a name can be taken only once."""

        def enter(cls: type[T]) -> type[T]:
            taken = self._classes.get(name)
            if taken is not None and taken.__qualname__ != cls.__qualname__:
                raise ValueError(f"the {self.kind} name {name!r} is taken by {taken.__qualname__}")
            self._classes[name] = cls
            return cls

        return enter

    def get(self, name: str) -> type[T]:
        """The class called `name`; `UserError` listing the names when there is none."""
        if name not in self._classes:
            raise UserError(f"there is no {self.kind} {name!r}: it is one of {', '.join(self)}{suggest(name, self)}")
        return self._classes[name]

    def name_of(self, cls: type) -> str:
        """The name under which `cls` is registered."""
        return next(name for name, known in self._classes.items() if known is cls)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __len__(self) -> int:
        return len(self._classes)

    def items(self) -> list[tuple[str, type[T]]]:
        """(name, class) pairs in the order of the names."""
        return sorted(self._classes.items())
