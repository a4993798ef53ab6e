"""Rewards for form: a regular expression, valid JSON, and a JSON schema.

A prefix says little about form (an open brace is no JSON), so there are no running scores: give
them a potential with ``Shaped`` where the agent needs a hint on the way.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ConfigError, RewardError
from textgen_env.extras import require
from textgen_env.rewards.base import REWARDS, Generation, Reward, shorten

if TYPE_CHECKING:
    import regex
    from jsonschema.protocols import Validator

PARTS = ("completion", "text")
"""The parts of a text that a reward may read: the completion alone, or the prompt and the completion."""


MOST_PATTERN = 4_000
"""Characters. The worst found, an alternation, takes 0.1 s to compile at this length and 3 s at six times it."""


def part_of(generation: Generation, part: str) -> str:
    return generation.text if part == "text" else generation.completion


def check_part(part: str) -> None:
    if part not in PARTS:
        raise ConfigError(f"part must be one of {', '.join(PARTS)}, got {part!r}")


@REWARDS.register("regex")
@dataclass(frozen=True)
class Regex(Reward):
    """Whether a regular expression matches.

    Range: 0 or 1.
    Running score: no.
    How it is gamed: by the shortest text that matches.

    Args:
        pattern: In the syntax of the ``regex`` package, which includes that of ``re``.
        full: The whole text must match, not a part of it.
        part: ``"completion"`` or ``"text"`` (prompt and completion).
        timeout: Seconds that one text may take; more is a ``RewardError``, since patterns that
            backtrack would otherwise hang the training.
    """

    pattern: str
    full: bool = False
    part: str = "completion"
    timeout: float = 1.0

    name = "regex"

    def __post_init__(self) -> None:
        check_part(self.part)
        _check_timeout(self.name, self.timeout)
        _ = self._compiled

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        return np.array([self._matches(part_of(g, self.part)) for g in generations], np.float64)

    def _matches(self, text: str) -> bool:
        match = self._compiled.fullmatch if self.full else self._compiled.search
        try:
            return match(text, timeout=self.timeout) is not None
        except TimeoutError as error:
            raise RewardError(
                f"the pattern {self.pattern!r} took more than {self.timeout} s on {shorten(text)}; "
                "make it backtrack less, or raise timeout"
            ) from error

    @cached_property
    def _compiled(self) -> regex.Pattern[str]:
        require("regex", extra="structure", for_="reward 'regex'")
        import regex

        _check_pattern_length(self.pattern)
        try:
            return regex.compile(self.pattern)
        except (regex.error, OverflowError, RecursionError, TypeError) as error:
            raise ConfigError(f"{shorten(str(self.pattern))} is no regular expression: {error}") from error


@REWARDS.register("json")
@dataclass(frozen=True)
class Json(Reward):
    """Validity of the text as JSON, and under a schema.

    Strict: one value with nothing around it but whitespace, no NaN, no Infinity.

    Range: 0 or 1 (it parses); with a schema 0, 0.5 (it parses) or 1 (it also follows the schema).
    Running score: no.
    How it is gamed: "0" is JSON; demand content with the schema.

    Args:
        schema: A JSON schema, draft 2020-12. References to the network are not followed.
            ``unevaluatedProperties`` cannot stand together with ``patternProperties``.
        part: ``"completion"`` or ``"text"``, for a prompt that opens the brace.
        timeout: Seconds that one text may take; more is a ``RewardError``, since patterns that
            backtrack and references that branch would otherwise hang the training.
    """

    schema: Mapping[str, Any] | bool | None = None
    part: str = "completion"
    timeout: float = 1.0

    name = "json"

    def __post_init__(self) -> None:
        check_part(self.part)
        _check_timeout(self.name, self.timeout)
        _ = self._validator

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        return np.array([self._one(part_of(g, self.part)) for g in generations], np.float64)

    def _one(self, text: str) -> float:
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):  # RecursionError: a few thousand open brackets
            return 0.0
        if self._validator is None:
            return 1.0
        self._deadline.start(self.timeout)
        try:
            return 1.0 if self._validator.is_valid(value) else 0.5
        except (OverflowError, RecursionError):  # numbers and nestings too large to check
            return 0.5
        except TimeoutError as error:
            raise RewardError(
                f"the JSON schema took more than {self.timeout} s on {shorten(text)}; make its patterns backtrack "
                "less and its references branch less, or raise timeout"
            ) from error

    @cached_property
    def _deadline(self) -> _Deadline:
        return _Deadline()

    @cached_property
    def _validator(self) -> Validator | None:
        if self.schema is None:
            return None
        require("jsonschema", extra="structure", for_="a JSON schema")
        from jsonschema import Draft202012Validator, FormatChecker, SchemaError
        from jsonschema.validators import extend
        from referencing import Registry
        from referencing.exceptions import Unresolvable

        try:
            for pattern in _patterns(self.schema):
                _check_pattern_length(pattern)
            Draft202012Validator.check_schema(self.schema, format_checker=FormatChecker(["regex"]))
            timed = extend(Draft202012Validator, _timed(Draft202012Validator.VALIDATORS, self._deadline))
            validator: Validator = timed(self.schema, registry=Registry())
            self._deadline.start(self.timeout)
            validator.is_valid(None)
        except SchemaError as error:
            raise ConfigError(f"not a JSON schema: {error.message}") from error
        except (OverflowError, RecursionError, TimeoutError, Unresolvable) as error:
            raise ConfigError(f"the JSON schema cannot be followed: {type(error).__name__}: {error}") from error
        if {"patternProperties", "unevaluatedProperties"} <= _keys(self.schema):
            raise ConfigError(
                "a JSON schema with patternProperties cannot have unevaluatedProperties, whose patterns know no "
                "time limit: use additionalProperties"
            )
        return validator


def _check_pattern_length(pattern: object) -> None:
    """Raise ``ConfigError`` for a pattern that would take long to compile: the time grows with the square of it."""
    if isinstance(pattern, str) and len(pattern) > MOST_PATTERN:
        raise ConfigError(f"a pattern has at most {MOST_PATTERN:,} characters, got {len(pattern):,}: split it in two")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _check_timeout(name: str, timeout: object) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, Real) or not 0 < float(timeout) < math.inf:
        raise ConfigError(f"the timeout of reward {name!r} must be a number of seconds above 0, got {timeout!r}")


# --- JSON schemas that stop in time

Keyword = Callable[[Any, Any, Any, Any], Iterator[Any] | None]
"""The function that ``jsonschema`` calls for a keyword: (validator, its value, instance, schema) to errors."""


class _Deadline:
    """When the text at hand has had its time."""

    def start(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left, or raise ``TimeoutError``."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _timed(keywords: Mapping[str, Keyword], deadline: _Deadline) -> dict[str, Keyword]:
    """Return keywords that heed the deadline, for those that may take long: patterns, which
    ``jsonschema`` gives to ``re``, and references, which may branch at every level."""
    require("regex", extra="structure", for_="a JSON schema")
    import regex
    from jsonschema import ValidationError

    def found(pattern: str, text: str) -> bool:
        return regex.search(pattern, text, timeout=deadline.left()) is not None

    def pattern(validator: Any, wanted: str, instance: Any, schema: Any) -> Iterator[Any]:
        if isinstance(instance, str) and not found(wanted, instance):
            yield ValidationError(f"{instance!r} does not match {wanted!r}")

    def pattern_properties(validator: Any, schemas: Mapping[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
        for wanted, subschema in schemas.items() if isinstance(instance, dict) else ():
            for key, value in instance.items():
                if found(wanted, key):
                    yield from validator.descend(value, subschema, path=key, schema_path=wanted)

    def additional_properties(validator: Any, subschema: Any, instance: Any, schema: Any) -> Iterator[Any]:
        for key, value in instance.items() if isinstance(instance, dict) else ():
            named = key in schema.get("properties", {})
            if not named and not any(found(wanted, key) for wanted in schema.get("patternProperties", {})):
                yield from validator.descend(value, subschema, path=key)

    def unique_items(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        seen: set[Any] = set()
        for item in instance if wanted is True and isinstance(instance, list) else ():
            deadline.left()
            value = _hashable(item)
            if value in seen:
                yield ValidationError(f"{shorten(str(item))} occurs twice")
                return
            seen.add(value)

    def heeding(keyword: Keyword) -> Keyword:
        def heeded(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any] | None:
            deadline.left()
            return keyword(validator, value, instance, schema)

        return heeded

    return {
        "pattern": pattern,
        "patternProperties": pattern_properties,
        "additionalProperties": additional_properties,
        "uniqueItems": unique_items,
        "$ref": heeding(keywords["$ref"]),
        "$dynamicRef": heeding(keywords["$dynamicRef"]),
    }


def _hashable(value: Any) -> Any:
    """Return a hashable stand-in that is equal exactly where JSON values are: 1 is 1.0, and true is not 1."""
    if isinstance(value, list):
        return ("list", *map(_hashable, value))
    if isinstance(value, dict):
        return frozenset((key, _hashable(item)) for key, item in value.items())
    return (type(value) is bool, value)


def _patterns(schema: Any) -> Iterator[Any]:
    """Yield every pattern at any depth."""
    if isinstance(schema, Mapping):
        properties = schema.get("patternProperties")
        yield from (schema.get("pattern"), *(properties if isinstance(properties, Mapping) else ()))
    inner = schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list | tuple) else ()
    for part in inner:
        yield from _patterns(part)


def _keys(schema: Any) -> set[str]:
    """Return every key at any depth."""
    if isinstance(schema, Mapping):
        return set(schema).union(*map(_keys, schema.values()))
    return set().union(*map(_keys, schema)) if isinstance(schema, list | tuple) else set()
