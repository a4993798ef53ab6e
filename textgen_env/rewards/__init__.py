"""What a text is worth: rewards by name, from functions, from other libraries, and mixed."""

from __future__ import annotations

from textgen_env.rewards.base import (
    REWARDS,
    Generation,
    Reward,
    RunningScore,
    Scored,
    ScoreState,
    check_rewards,
)
from textgen_env.rewards.combine import Mix, Shaped, make_reward, reward_spec
from textgen_env.rewards.functions import batch_reward
from textgen_env.rewards.sentiment import Sentiment

__all__ = [
    "REWARDS",
    "Generation",
    "Mix",
    "Reward",
    "RunningScore",
    "ScoreState",
    "Scored",
    "Sentiment",
    "Shaped",
    "batch_reward",
    "check_rewards",
    "make_reward",
    "reward_spec",
]
