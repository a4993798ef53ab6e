"""The plain settings of ``gym.make("TextGen-v0", ...)``, checked once.

The model, the prompts and the reward are objects, looked up elsewhere; the rest is plain data, so
a run can be rebuilt from JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from textgen_env.errors import ConfigError, TextGenError, UnknownArgument
from textgen_env.registry import unknown_name

OBSERVATION_KEYS = (
    "tokens",
    "length",
    "budget",
    "candidates",
    "logprobs",
    "score",
    "candidate_scores",
    "action_mask",
    "hidden",
    "source",
)
"""The keys of the Dict observation, in the order of the documentation."""
ONLY_WHEN_NAMED = ("source",)
"""Keys that neither ``"default"`` nor ``"full"`` has."""
OF_CONVERSATIONS = ("turn", "turn_budget", "speaker")
"""Further keys of an environment with a partner; ``"default"`` leaves them out."""

FLAT_OBSERVATIONS = ("hidden", "tokens")
"""Observations that are one flat Box, for agents built on a plain MLP."""

RENDER_MODES = ("ansi", "human", "rgb_array")
MOST_TOKENS = 2**20
"""Of a text, or candidates of a step: more than any model has. Larger numbers would exhaust memory."""

MOST_ROWS = 2**16
MOST_SEED = 2**32 - 1
"""Numpy's legacy generator, which Stable-Baselines3 seeds, takes no more."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EnvConfig:
    """How an episode runs. Lengths are in tokens.

    Raises:
        ConfigError: a value outside its range (names the setting and the range).
    """

    reward_at: str = "end"  # "end": once; "step": the increments of the running score
    top_k: int | None = 16  # candidates a step = number of actions; None: the whole vocabulary
    top_p: float = 1.0  # candidates beyond this cumulative probability are masked
    max_new_tokens: int = 32  # reaching it ends the episode
    min_new_tokens: int = 0  # end tokens are not proposed before
    max_prompt_tokens: int = 64
    stop: tuple[str, ...] = ()  # strings that end the episode (with a partner: the turn) once it holds one
    max_turns: int = 1  # of the agent, in a conversation
    max_turn_tokens: int | None = None  # of the agent, reaching it ends the turn; None: only max_new_tokens does
    max_reply_tokens: int = 0  # of the partner, each turn
    reply_seconds: float | None = 60.0  # that the partner may take for a reply; None: as long as it takes
    observation: str | tuple[str, ...] = "default"
    on_illegal: str = "raise"  # or "last_legal": map a masked action and count it
    dtype: str = "auto"  # of the language model's weights
    trust_remote_code: bool = False  # run code that a hub repository ships
    render_mode: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), np.generic):
                object.__setattr__(self, field.name, value.item())  # sums of numpy's small integers wrap around
        check_one_of("reward_at", self.reward_at, ("end", "step"))
        check_one_of("on_illegal", self.on_illegal, ("raise", "last_legal"))
        check_one_of("dtype", self.dtype, DTYPES)
        check_one_of("trust_remote_code", self.trust_remote_code, (True, False))
        check_one_of("render_mode", self.render_mode, (None, *RENDER_MODES))
        check_in_range("max_new_tokens", self.max_new_tokens, 1, MOST_TOKENS)
        check_in_range("max_prompt_tokens", self.max_prompt_tokens, 1, MOST_TOKENS)
        check_at_least("min_new_tokens", self.min_new_tokens, 0)
        if self.top_k is not None:
            check_in_range("top_k", self.top_k, 1, MOST_TOKENS)
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens must be at most max_new_tokens={self.max_new_tokens}, got {self.min_new_tokens}"
            )
        if not isinstance(self.top_p, Real) or not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p!r}")
        stop = (self.stop,) if isinstance(self.stop, str) or not isinstance(self.stop, Iterable) else tuple(self.stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise ConfigError(f"stop must be non-empty strings, got {self.stop!r}")
        check_unicode("stop", stop)
        object.__setattr__(self, "stop", stop)
        self._check_turns()
        self._check_observation()

    def _check_turns(self) -> None:
        check_in_range("max_turns", self.max_turns, 1, MOST_TOKENS)
        check_in_range("max_reply_tokens", self.max_reply_tokens, 0, MOST_TOKENS)
        if self.max_turn_tokens is not None:
            check_in_range("max_turn_tokens", self.max_turn_tokens, 1, MOST_TOKENS)
        if self.reply_seconds is not None and not (isinstance(self.reply_seconds, Real) and self.reply_seconds > 0):
            raise ConfigError(f"reply_seconds must be above 0 or None, got {self.reply_seconds!r}")

    def _check_observation(self) -> None:
        if isinstance(self.observation, str) or not isinstance(self.observation, Iterable):
            check_one_of("observation", self.observation, ("default", "full", *FLAT_OBSERVATIONS))
            return
        keys = tuple(self.observation)
        for key in keys:
            if key not in (*OBSERVATION_KEYS, *OF_CONVERSATIONS):
                raise unknown_name("observation key", key, (*OBSERVATION_KEYS, *OF_CONVERSATIONS))
        if not keys or len(set(keys)) != len(keys):
            raise ConfigError(f"observation must name distinct keys, at least one, got {keys}")
        if self.top_k is None:
            for key in {"candidates", "candidate_scores"} & set(keys):
                raise ConfigError(
                    f"observation key {key!r} needs top_k: with top_k=None action i is token id i and the "
                    "whole vocabulary would be listed; set top_k, or leave the key out"
                )
        object.__setattr__(self, "observation", keys)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> EnvConfig:
        """Return the configuration with these fields.

        Raises:
            UnknownArgument: a field that does not exist (with a suggestion).
        """
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                unknown = unknown_name("argument", name, ["model", "prompts", "reward", "partner", *known])
                raise UnknownArgument(f"got an unexpected keyword argument {name!r}: {unknown}")
        return cls(**settings)

    @property
    def max_length(self) -> int:
        """Tokens of the longest text, prompt and replies included."""
        return self.max_prompt_tokens + self.max_new_tokens + self.max_turns * self.max_reply_tokens

    def num_actions(self, vocab_size: int) -> int:
        """Return k, the number of actions with this vocabulary."""
        return vocab_size if self.top_k is None else self.top_k

    def keys(self, scores_prefixes: bool, has_partner: bool = False) -> tuple[str, ...]:
        """Return the keys that are computed.

        Args:
            scores_prefixes: True if the reward can score a prefix.
            has_partner: True if a partner answers.

        Raises:
            ConfigError: ``candidate_scores`` was named but the reward cannot score a prefix, or a key of
                conversations and there is no partner.
        """
        named = () if isinstance(self.observation, str) else self.observation
        if not has_partner and (of_partner := set(OF_CONVERSATIONS).intersection(named)):
            raise ConfigError(f"observation keys {sorted(of_partner)} need a partner: give partner=, or leave them out")
        if not scores_prefixes and "candidate_scores" in named:
            raise ConfigError(
                "observation key 'candidate_scores' needs a reward that can score a prefix; this one "
                "cannot: leave the key out, or give the reward a running() score"
            )
        match self.observation:
            case "full" | "default":
                keys: Sequence[str] = [key for key in OBSERVATION_KEYS if key not in ONLY_WHEN_NAMED]
                if has_partner and self.observation == "full":
                    keys = (*keys, *OF_CONVERSATIONS)
            case "hidden":
                keys = ("hidden", "logprobs", "budget", "score")
            case "tokens":
                keys = ("length", "budget", "tokens")
            case _:
                keys = self.observation
        left_out = {"hidden", "candidate_scores"} if self.observation == "default" else set()
        left_out |= {"candidates", "candidate_scores"} if self.top_k is None else set()
        left_out |= set() if scores_prefixes else {"candidate_scores"}
        return tuple(key for key in keys if key not in left_out)


def is_unicode(text: str) -> bool:
    """Return True if ``text`` can be encoded: half of a surrogate pair cannot, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unicode(name: str, value: object, error: type[TextGenError] = ConfigError) -> None:
    """Raise ``error`` if a string in ``value``, at any depth of lists and mappings, cannot be encoded."""
    if isinstance(value, str) and not is_unicode(value):
        raise error(f"{name} must be Unicode text, got {value!r} with a lone surrogate")
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_unicode(name, key, error)
            check_unicode(name, item, error)
    elif isinstance(value, list | tuple):
        for item in value:
            check_unicode(name, item, error)


def check_one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ``ConfigError`` unless ``value`` is among ``allowed``."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_at_least(name: str, value: object, least: int) -> None:
    """Raise ``ConfigError`` unless ``value`` is an integer (no bool) from ``least`` on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_in_range(name: str, value: object, least: int, most: int) -> None:
    """Raise ``ConfigError`` unless ``value`` is an integer (no bool) in ``least..most``."""
    check_at_least(name, value, least)
    if isinstance(value, Integral) and int(value) > most:
        raise ConfigError(f"{name} must be a whole number in {least}..{most}, got {value!r}")


def check_seed(name: str, value: object) -> None:
    """Raise ``ConfigError`` unless ``value`` can seed numpy, torch and Python alike."""
    check_in_range(name, value, 0, MOST_SEED)


def check_type(name: str, value: object, *allowed: type) -> None:
    """Raise ``ConfigError`` unless ``value`` is of an allowed type; a bool is no number."""
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
        raise ConfigError(f"{name} must be {names}, got {value!r}")
