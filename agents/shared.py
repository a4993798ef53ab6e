"""Agents that were shared: what ``save_pretrained`` or ``push_to_hub`` wrote, with an environment to write in.

    folder, or "user/agent"  ->  open_shared  ->  SharedAgent: TextDQN, TextGenVectorEnv, and whether texts are scored

A run's folder (``agents.runs``) holds its prompts and reward; these hold the agent alone, so the environment is made
from what it remembers of its task.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.hub import is_repository
from agents.runs.files import CONFIG_FILE
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.networks import check_observation_space
from agents.text_dqn.portable import SETTINGS_FILE
from agents.text_dqn.task import env_to_write_in
from textgen_env.vector_env import TextGenVectorEnv


@dataclass(frozen=True)
class SharedAgent:
    """A shared agent, ready to write."""

    agent: TextDQN
    env: TextGenVectorEnv
    unscored: str = ""  # the reason why texts have no reward


def is_shared(source: Path) -> bool:
    """Return True if ``source`` is a folder that ``save_pretrained`` wrote, or means a repository on the Hub."""
    return is_repository(source) or ((source / SETTINGS_FILE).is_file() and not (source / CONFIG_FILE).exists())


def open_shared(source: Any, reward: Any = None, model: Any = None, rows: int = 1) -> SharedAgent:
    """Return the agent in ``source`` with an environment like the one that it was trained in.

    Args:
        source: A folder, or ``"user/agent"`` on the Hugging Face Hub.
        reward: See ``make_reward``. None: the stored one; where there is none, texts are not scored.
        model: See ``TextDQN.from_pretrained``.
        rows: N.

    Raises:
        ConfigError: no such agent, a damaged one, or one that needs scores of a reward that was not stored.
        ModelError: another language model than it was trained on.
    """
    agent = TextDQN.from_pretrained(source, model=model)
    space = check_observation_space(agent.observation_space)
    longest = space["tokens"].shape[0] - agent.q_net.max_new_tokens  # type: ignore[index]
    reads_scores = agent.q_net.reads_given_scores
    keys = tuple(key for key in space.spaces if reads_scores or key not in ("score", "candidate_scores"))
    env, is_scored = env_to_write_in(
        None, agent.task, agent.language_model, reward, sees_scores=reads_scores,
        rows=rows, observation=keys, max_prompt_tokens=max(1, longest),
    )  # fmt: skip
    unscored = "" if is_scored else "the agent's reward was not stored; give it as --reward FILE.py:NAME"
    return SharedAgent(agent, env, unscored)
