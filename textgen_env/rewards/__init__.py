"""Rewards by name, from functions, from other libraries, and mixed."""

from __future__ import annotations

from textgen_env.rewards.adapters import EvaluateReward, PipelineReward, TransformersClassifier
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
from textgen_env.rewards.functions import FunctionReward, batch_reward
from textgen_env.rewards.lexical import DistinctReward, Keywords, Length, Metre, Readability, RepetitionReward
from textgen_env.rewards.linear import Classifier
from textgen_env.rewards.neural import Fluency, Similarity
from textgen_env.rewards.references import BleuReward, ChrfReward, RougeReward
from textgen_env.rewards.rhyme import Rhyme
from textgen_env.rewards.sentiment import Sentiment
from textgen_env.rewards.structure import Json, Regex

__all__ = [
    "REWARDS",
    "BleuReward",
    "ChrfReward",
    "Classifier",
    "DistinctReward",
    "EvaluateReward",
    "Fluency",
    "FunctionReward",
    "Generation",
    "Json",
    "Keywords",
    "Length",
    "Metre",
    "Mix",
    "PipelineReward",
    "Readability",
    "Regex",
    "RepetitionReward",
    "Reward",
    "Rhyme",
    "RougeReward",
    "RunningScore",
    "ScoreState",
    "Scored",
    "Sentiment",
    "Shaped",
    "Similarity",
    "TransformersClassifier",
    "batch_reward",
    "check_rewards",
    "make_reward",
    "reward_spec",
]
