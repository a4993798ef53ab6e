"""What a run leaves in its folder."""

from __future__ import annotations

CONFIG_FILE = "config.json"
"""The configuration: enough to repeat the run."""

PROMPTS_FILE = "prompts.jsonl"
"""The prompts, where they are not in the box."""

AGENT_FILE = "agent.zip"
"""The agent, as Stable-Baselines3 saves it."""

METRICS_FILE = "metrics.csv"
"""The course of the training, a row for each log."""

EVENTS = "tensorboard"
"""A folder: the same as events."""

LEARNING_FILE = "learning.png"
"""The same as a picture."""

SUMMARY_FILE = "summary.json"
"""Every figure of the table."""

PLANE_FILE = "plane.png"
"""Reward against KL: the agent, policies without learning, the best possible one."""

TOKENS_FILE = "tokens.png"
"""What more tokens a text buy; left by an evaluation with particles."""

SAMPLES_FILE = "samples.md"
"""Texts before and after."""

CHECKPOINTS = "checkpoints"
"""A folder, while the run goes on: its state, for resuming."""
