"""One registry for each kind of plug-in (data sets, criteria …)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from spamprune.errors import SpampruneError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Plug-ins of one kind, by name.

    Args:
        kind: What the plug-ins are, in the words of an error message ("data set").
        error: The error raised for an unknown name.
    """

    def __init__(self, kind: str, error: type[SpampruneError]):
        self.kind = kind
        self._error = error
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its target under ``name``.

        Raises:
            ValueError: The name is taken: plug-ins never overwrite each other.
        """

        def decorator(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return decorator

    def __getitem__(self, name: str) -> T:
        """Return the plug-in called ``name``, or raise the kind's error with suggestions."""
        if name not in self._items:
            raise self._error(f"unknown {self.kind} {name!r}: {nearest(name, self._items)}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))
