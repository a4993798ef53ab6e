"""Names to factories, with an error that helps."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from textgen_env.errors import ConfigError, UnknownName

T = TypeVar("T")


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownName:
    """Return the error for ``name``, with the closest known one as a suggestion."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UnknownName(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}")


def split_settings(spec: str, kind: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the settings of ``name:setting=value:...``; a value that is no JSON is text.

    Raises:
        ConfigError: a setting without ``=``.

    >>> split_settings("Keywords:model=tiny:count=4", "task")
    ('Keywords', {'model': 'tiny', 'count': 4})
    """
    name, *parts = spec.split(":")
    settings: dict[str, Any] = {}
    for part in parts:
        setting, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"a setting of {kind} {name!r} is written name=value, got {part!r} in {spec!r}")
        try:
            settings[setting] = json.loads(value)
        except (ValueError, RecursionError):
            settings[setting] = value
    return name, settings


class Registry(Mapping[str, T], Generic[T]):
    """A mapping that refuses duplicates and suggests a name when one is unknown.

    >>> shapes: Registry[type] = Registry("shape")
    >>> @shapes.register("square")
    ... class Square: ...
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its argument under ``name``."""

        def decorate(entry: T) -> T:
            if name in self._entries:
                raise ConfigError(f"{self.kind} {name!r} is registered already; choose another name")
            self._entries[name] = entry
            return entry

        return decorate

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def build(registry: Registry[Callable[..., T]], name: Any, **settings: Any) -> T:
    """Return what the factory ``name`` makes of ``settings``.

    Raises:
        UnknownName: no entry of that name (suggests one).
        ConfigError: a name that is no string, or settings that the factory does not take.
    """
    if not isinstance(name, str):
        raise ConfigError(f"a {registry.kind}'s name must be a string, got {name!r}")
    factory = registry[name]
    signature = inspect.signature(factory)
    try:
        signature.bind(**settings)
        return factory(**settings)
    except TypeError as error:  # an unknown or missing setting, or one of the wrong type
        takes = ", ".join(map(str, signature.parameters.values())) or "no settings"
        raise ConfigError(f"{registry.kind} {name!r}: {error}; it takes {takes}") from error
