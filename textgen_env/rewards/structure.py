"""Rewards for form: a regular expression, valid JSON, and a JSON schema.

A prefix says little about form (an open brace is no JSON), so there are no running scores: give
them a potential with ``Shaped`` where the agent needs a hint on the way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ConfigError, RewardError
from textgen_env.rewards.base import REWARDS, Generation, Reward, shorten

if TYPE_CHECKING:
    import regex
    from jsonschema.protocols import Validator

PARTS = ("completion", "text")
"""What a reward may look at: the completion alone, or the prompt and the completion."""


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
        if not self.timeout > 0:
            raise ConfigError(f"the timeout of a regex must be above 0 seconds, got {self.timeout!r}")
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
        import regex

        try:
            return regex.compile(self.pattern)
        except (regex.error, TypeError) as error:
            raise ConfigError(f"{self.pattern!r} is no regular expression: {error}") from error


@REWARDS.register("json")
@dataclass(frozen=True)
class Json(Reward):
    """Whether the text is JSON, and whether it follows a schema.

    Strict: one value with nothing around it but whitespace, no NaN, no Infinity.

    Range: 0 or 1 (it parses); with a schema 0, 0.5 (it parses) or 1 (it also follows the schema).
    Running score: no.
    How it is gamed: "0" is JSON; ask for what you want with the schema.

    Args:
        schema: A JSON schema, draft 2020-12. References to the network are not followed.
        part: ``"completion"`` or ``"text"``, for a prompt that opens the brace.
    """

    schema: Mapping[str, Any] | bool | None = None
    part: str = "completion"

    name = "json"

    def __post_init__(self) -> None:
        check_part(self.part)
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
        return 1.0 if self._validator.is_valid(value) else 0.5

    @cached_property
    def _validator(self) -> Validator | None:
        if self.schema is None:
            return None
        from jsonschema import Draft202012Validator, SchemaError
        from referencing import Registry

        try:
            Draft202012Validator.check_schema(self.schema)
        except SchemaError as error:
            raise ConfigError(f"not a JSON schema: {error.message}") from error
        return Draft202012Validator(self.schema, registry=Registry())


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
