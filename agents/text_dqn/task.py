"""What an agent has learned on: remembered as plain data, made again, and compared with what it meets.

environment  ->  task_of  ->  task (JSON)  ->  env_to_write_in  ->  an environment like it
                                           ->  check_fits: the same language model and sizes
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv

from textgen_env.errors import ConfigError, ModelError, PromptError
from textgen_env.models.base import LanguageModel
from textgen_env.rewards import reward_spec
from textgen_env.vector_env import TextGenVectorEnv

KEPT_SETTINGS = ("top_k", "top_p", "min_new_tokens", "max_new_tokens")
"""Settings of the environment that a task holds, beside the strings that stop a text."""

PROBES = 32
"""Tokens by which a language model is recognised."""


def task_of(env: VecEnv) -> dict[str, Any]:
    """Return what an agent that learns in ``env`` should remember of it, as plain data."""
    model: LanguageModel = env.get_attr("language_model")[0]
    task: dict[str, Any] = {"model": model.name, "fingerprint": fingerprint(model)}
    if not env.has_attr("episodes"):
        return task
    episodes = env.get_attr("episodes")[0]
    config = episodes.config
    try:
        prompts = len(episodes.prompts)
    except PromptError:
        prompts = None  # a function makes them
    return task | {
        "reward": reward_spec(episodes.reward),
        "reward_name": episodes.reward.name,
        "scores": episodes.reward.running() is not None,
        "prompts": prompts,
        **{name: getattr(config, name) for name in KEPT_SETTINGS},
        "stop": list(config.stop),
        **({} if episodes.partner is None else {"partner": episodes.partner.name}),
    }


def env_to_write_in(
    env: VecEnv | None, task: Mapping[str, Any] | None, model: LanguageModel, reward: Any, sees_scores: bool,
    rows: int = 1, prompts: Any = None, **changed: Any,
) -> tuple[TextGenVectorEnv, bool]:  # fmt: skip
    """Return an environment like the one that an agent was trained in, and True if its reward is known.

    Args:
        env: The agent's own. None, or of another make: ``task`` describes it.
        task: From ``task_of``.
        model: That the agent was trained on.
        reward: See ``make_reward``. None: that of ``env`` or ``task``; where that was not stored every text gets 0.
        sees_scores: The agent reads the environment's running scores.
        rows: N.
        prompts: See ``make_prompts``.
        changed: Keywords of ``TextGenVectorEnv`` that should have other values.

    Raises:
        ConfigError: the task is unknown, or the agent needs scores of a reward that was not stored.
    """
    if env is not None and env.has_attr("episodes"):
        episodes = env.get_attr("episodes")[0]
        settings = vars(episodes.config) | {"observation": "default", "render_mode": None}
        settings["partner"] = episodes.partner
        reward = episodes.reward if reward is None else reward
    else:
        task = known_task(task)
        settings = {name: task[name] for name in (*KEPT_SETTINGS, "stop") if name in task}
        settings["max_prompt_tokens"] = max(1, min(512, model.max_context - task["max_new_tokens"]))
        reward = task["reward"] if reward is None else reward
        if reward is None and task["scores"] and sees_scores:
            raise ConfigError(
                f"the agent sees running scores of reward {task['reward_name']!r}, a Python object that was not "
                "stored: give it again, as reward=..."
            )
    judge = (lambda text: 0.0) if reward is None else reward
    return TextGenVectorEnv(rows, model, prompts, judge, **settings | changed), reward is not None


def known_task(task: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return ``task`` if an environment can be made from it: of our make, and without a partner, who is not stored.

    Raises:
        ConfigError: it is another.
    """
    if task is None or "top_k" not in task:
        raise ConfigError("the agent does not know its task: it was trained in an environment of another make")
    if task.get("partner") is not None:
        raise ConfigError(
            f"the agent has learned conversations with partner {task['partner']!r}, which is not stored: let it act in "
            "an environment with that partner"
        )
    return task


def fingerprint(model: LanguageModel) -> dict[str, Any]:
    """Return a few numbers by which a model and its vocabulary are known, whatever the precision and name."""
    ids = np.linspace(0, model.vocab_size - 1, min(PROBES, model.vocab_size)).astype(np.int64)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "end_ids": list(model.end_ids),
        "tokens": [model.decode([i]) for i in ids.tolist()],
        "embeddings": np.round(model.embed(ids)[:, :4].astype(np.float64), 6).tolist(),
    }


def check_trained_on(task: Mapping[str, Any] | None, model: LanguageModel) -> None:
    """Check that ``model`` is what the agent of ``task`` was trained on.

    Raises:
        ModelError: it is another one.
        ConfigError: the task does not say, as it should.
    """
    if task is None:
        return
    found = fingerprint(model)
    try:
        name, known = task["model"], task["fingerprint"]
        differs = [part for part in found if part != "embeddings" and found[part] != known[part]]
        embeddings = np.array(known["embeddings"], np.float64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"the agent's record of its language model is damaged: {error!r}") from error
    same_shape = embeddings.shape == np.shape(found["embeddings"])
    if not differs and not (same_shape and np.allclose(found["embeddings"], embeddings, rtol=0.02, atol=1e-3)):
        differs = ["embeddings"]
    if differs:
        what = "vocabulary" if {"vocab_size", "tokens", "end_ids"} & set(differs) else "weights"
        raise ModelError(
            f"the agent was trained on model {name!r} ({known['vocab_size']} tokens), and {model.name!r} "
            f"({found['vocab_size']} tokens) has another {what} (its {', '.join(differs)}): load it with the model "
            "that it was trained on"
        )


def check_sizes(trained: Mapping[str, int | None], found: Mapping[str, int | None]) -> None:
    """Raise ``ConfigError`` where a size is not the one that the agent was ``trained`` with; None is not known."""
    for name, expected in trained.items():
        if expected is not None and found[name] != expected:
            raise ConfigError(
                f"the agent was trained with {name}={expected}, the environment has {found[name]}: make it with "
                f"{name}={expected}"
            )


def check_fits(
    env: VecEnv, task: Mapping[str, Any] | None, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
) -> None:
    """Check that the agent of ``task``, with these spaces, can act and learn in ``env``.

    Raises:
        ModelError: its language model is another one.
        ConfigError: its sizes or spaces are others.
    """
    check_trained_on(task, env.get_attr("language_model")[0])
    check_sizes(
        {"top_k": getattr(action_space, "n", None), "max_new_tokens": (task or {}).get("max_new_tokens")},
        {"top_k": getattr(env.action_space, "n", None), "max_new_tokens": env.get_attr("max_new_tokens")[0]},
    )
    try:
        check_for_correct_spaces(env, observation_space, action_space)
    except ValueError as error:
        raise ConfigError(f"the agent does not fit the environment. {error}") from error
