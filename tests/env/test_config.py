"""Settings: every bad one is refused with what was given and what is allowed; names are suggested."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from toys import letters

from textgen_env import TextGenEnv
from textgen_env.config import OBSERVATION_KEYS, EnvConfig
from textgen_env.errors import ConfigError, TextGenError, UnknownName
from textgen_env.registry import Registry


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reward_at": "End"}, "reward_at must be one of 'end', 'step', got 'End'"),
        ({"on_illegal": "ignore"}, "on_illegal must be one of 'raise', 'last_legal', got 'ignore'"),
        ({"dtype": "int8"}, "dtype must be one of 'auto', 'float32', 'bfloat16', 'float16', got 'int8'"),
        ({"render_mode": "rgb"}, "render_mode must be one of None, 'ansi', 'human', 'rgb_array', got 'rgb'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a whole number of at least 1, got 2.0"),
        ({"max_prompt_tokens": True}, "max_prompt_tokens must be a whole number of at least 1, got True"),
        ({"min_new_tokens": -1}, "min_new_tokens must be a whole number of at least 0, got -1"),
        ({"min_new_tokens": 33}, "min_new_tokens must be at most max_new_tokens=32, got 33"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"top_k": "16"}, "top_k must be a whole number of at least 1, got '16'"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.01}, r"top_p must be in \(0, 1\], got 1.01"),
        ({"top_p": float("nan")}, r"top_p must be in \(0, 1\], got nan"),
        ({"top_p": "0.9"}, r"top_p must be in \(0, 1\], got '0.9'"),
        ({"stop": ("a", "")}, r"stop must be non-empty strings, got \('a', ''\)"),
        ({"stop": ("a", 3)}, "stop must be non-empty strings"),
        ({"stop": 3}, "stop must be non-empty strings, got 3"),
        ({"observation": "all"}, "observation must be one of 'default', 'full', 'hidden', 'tokens', got 'all'"),
        ({"observation": ()}, "distinct keys, at least one"),
        ({"observation": ("score", "score")}, "distinct keys"),
        ({"observation": 3}, "observation must be .* got 3"),
        ({"observation": ("tokens", 3)}, "unknown observation key 3. Known: action_mask"),
        ({"observation": ("token",)}, "unknown observation key 'token'. Did you mean 'tokens'?"),
        ({"observation": ("candidates",), "top_k": None}, "'candidates' needs top_k"),
        ({"observation": ("candidate_scores",), "top_k": None}, "'candidate_scores' needs top_k"),
        ({"trust_remote_code": "no"}, "trust_remote_code must be one of True, False, got 'no'"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_with_the_allowed_values(settings, words):
    with pytest.raises(ConfigError, match=words):
        EnvConfig(**settings)


@pytest.mark.parametrize("settings", [{"stop": "ab"}, {"stop": ["ab"]}, {"stop": {"ab"}}])
def test_one_string_or_any_collection_of_them_stops(settings):
    assert EnvConfig(**settings).stop == ("ab",)


@pytest.mark.parametrize("top_k", [16, np.int64(16), None])
def test_whole_numbers_of_any_kind_are_settings(top_k):
    assert EnvConfig(top_k=top_k).top_k == top_k


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int64])
def test_sums_of_small_numpy_integers_do_not_wrap_around(kind):
    numbers = {"max_new_tokens": 100, "max_prompt_tokens": 120, "max_turns": 5, "max_reply_tokens": 60}
    config = EnvConfig(**{name: kind(number) for name, number in numbers.items()})
    assert config.max_length == 100 + 120 + 5 * 60
    assert config == EnvConfig(**numbers)


def test_a_text_under_small_numpy_integers_is_as_long_as_said():
    env = TextGenEnv(letters(), ["a"], len, top_k=4, max_new_tokens=np.uint8(200), max_prompt_tokens=np.uint8(100))
    env.reset(seed=0)
    steps = 1
    while not env.step(0)[2]:
        steps += 1
    assert steps == 200


def test_settings_are_found_by_name_and_an_unknown_one_gets_a_suggestion():
    assert EnvConfig.from_settings({"top_k": 3, "stop": ["."]}) == EnvConfig(top_k=3, stop=(".",))
    with pytest.raises(UnknownName, match=r"unknown argument 'topk'. Did you mean 'top_k'\? Known: .*reward_at"):
        EnvConfig.from_settings({"topk": 3})


def test_a_configuration_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EnvConfig().top_k = 3


ALL = set(OBSERVATION_KEYS) - {"source"}  # which must be named


@pytest.mark.parametrize(
    ("settings", "scores_prefixes", "expected"),
    [
        ({}, True, ALL - {"hidden", "candidate_scores"}),
        ({}, False, ALL - {"hidden", "candidate_scores"}),  # score stays, as 0
        ({"observation": "full"}, True, ALL),
        ({"observation": "full"}, False, ALL - {"candidate_scores"}),
        ({"observation": "full", "top_k": None}, True, ALL - {"candidates", "candidate_scores"}),
        ({"top_k": None}, True, ALL - {"hidden", "candidates", "candidate_scores"}),
        ({"observation": "hidden"}, True, {"hidden", "logprobs", "budget", "score"}),
        ({"observation": "tokens"}, True, {"tokens", "length", "budget"}),
        ({"observation": ("hidden", "candidate_scores")}, True, {"hidden", "candidate_scores"}),
        ({"observation": ["score"]}, False, {"score"}),
        ({"observation": ("tokens", "source")}, False, {"tokens", "source"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_the_keys_of_an_observation(settings, scores_prefixes, expected):
    assert set(EnvConfig(**settings).keys(scores_prefixes)) == expected


def test_a_registry_refuses_duplicates_and_suggests_names():
    shapes: Registry[type] = Registry("shape")
    shapes.register("square")(int)
    assert shapes["square"] is int
    assert ("square" in shapes, "cube" in shapes, list(shapes), len(shapes)) == (True, False, ["square"], 1)
    with pytest.raises(ConfigError, match="shape 'square' is registered already"):
        shapes.register("square")(str)
    with pytest.raises(UnknownName, match=r"unknown shape 'sqare'\. Did you mean 'square'\? Known: square"):
        shapes["sqare"]
    with pytest.raises(LookupError, match=r"unknown shape 'x'\. Known: square"):
        shapes["x"]


@pytest.mark.parametrize("error", TextGenError.__subclasses__())
def test_every_error_can_be_caught_without_knowing_this_package(error):
    assert any(base.__module__ in ("builtins", "gymnasium.error") for base in error.__bases__)


def test_stop_strings_that_cannot_be_encoded_are_refused():
    with pytest.raises(ConfigError, match="stop must be Unicode text"):
        EnvConfig(stop=("\ud800",))
