"""Objects in an ``EnvSpec``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gymnasium.envs.registration import EnvSpec


class Uncopied:
    """An object in an ``EnvSpec`` that must not be copied: a loaded model, a reward, a function."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Uncopied:
        return self

    def __repr__(self) -> str:
        return f"Uncopied({type(self.value).__name__})"


def unwrap(value: Any) -> Any:
    """Return the object in an ``Uncopied``, or ``value`` itself."""
    return value.value if isinstance(value, Uncopied) else value


_PLAIN: tuple[type, ...] = (str, int, float, bool, type(None))


def wrap_objects(spec: EnvSpec | None) -> EnvSpec | None:
    """Wrap the objects in ``spec`` that cannot be copied or written as JSON."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, Mapping):
            return all(is_plain(v) for v in value.values())
        if isinstance(value, list | tuple):
            return all(map(is_plain, value))
        return isinstance(value, _PLAIN)

    if spec is not None:
        for name, value in spec.kwargs.items():
            if not is_plain(value) and not isinstance(value, Uncopied):
                spec.kwargs[name] = Uncopied(value)
    return spec
