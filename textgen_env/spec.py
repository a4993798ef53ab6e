"""Objects in an ``EnvSpec``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec

from textgen_env.errors import SpecError


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


INSTEAD: Mapping[str, str] = {
    "model": "a name, a folder or a hub id",
    "prompts": "a name, a file, or a list of strings",
    "reward": "a name, or a dict with one: of a reward in the box, or yours after REWARDS.register('NAME')(factory)",
    "partner": "a name, or a dict with one: 'script', or yours after PARTNERS.register('NAME')(factory)",
}
"""What JSON can hold of an argument of ``gym.make``. Not ``module:function``: a spec from a file could run any code."""


class TextGenSpec(EnvSpec):
    """An ``EnvSpec`` whose ``to_json`` names the objects that it cannot write."""

    def to_json(self) -> str:
        """Return the spec as JSON.

        Raises:
            SpecError: an argument is an object.
        """
        for name, value in self.kwargs.items():
            if isinstance(value, Uncopied):
                given = getattr(value.value, "__qualname__", None)
                what = f"the object {given}" if given else f"an object of type {type(value.value).__name__}"
                raise SpecError(
                    f"{name}= was given as {what}, which JSON cannot hold; give {INSTEAD.get(name, 'plain data')}. "
                    "Within a process gym.make(env.spec) works with objects, too"
                )
        return super().to_json()


_PLAIN: tuple[type, ...] = (str, int, float, bool, type(None))


def wrap_objects(spec: EnvSpec | None) -> EnvSpec | None:
    """Return ``spec`` with the objects wrapped that cannot be copied or written as JSON."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, Mapping):
            return all(is_plain(v) for v in value.values())
        if isinstance(value, list | tuple):
            return all(map(is_plain, value))
        return isinstance(value, _PLAIN)

    if spec is None:
        return None
    wrapped = object.__new__(TextGenSpec)  # not made anew: that would look the id up once more
    vars(wrapped).update(vars(spec))
    for name, value in spec.kwargs.items():
        value = value.item() if isinstance(value, np.generic) else value
        wrapped.kwargs[name] = value if is_plain(value) or isinstance(value, Uncopied) else Uncopied(value)
    return wrapped
