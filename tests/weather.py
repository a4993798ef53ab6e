"""A run on an exact model whose best policy is known, and what it leaves: shared by the tests of whole runs."""

from __future__ import annotations

import csv

from agents.runs.config import RunConfig
from textgen_env.models.table import TableModel

WORDS = [" sun", " rain", " fog", " the", " warm", "<end>"]

CONFIG = RunConfig(
    agent_settings={"learning_starts": 100, "steps_per_update": 20},
    prompts=[" the", " fog"],
    reward={"name": "keywords", "words": ["sun", "warm"]},
    env={"top_k": 4, "max_new_tokens": 3, "min_new_tokens": 0},
    steps=1500,
    envs=8,
    eval_texts=64,
    eval_samples=400,
)

RUN_FILES = [
    "agent.zip",
    "config.json",
    "learning.png",
    "metrics.csv",
    "plane.png",
    "samples.md",
    "summary.json",
    "tensorboard",
]
"""What a finished run leaves in its folder."""


def weather():
    return TableModel(WORDS, [0.1, 0.3, 0.2, 0.2, 0.15, 0.05])


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
