"""A playground on an exact model, served until the process is ended: ``python serve.py PORT``."""

from __future__ import annotations

import sys

import numpy as np

from agents.baselines.one_step import LookaheadAgent
from agents.playground.desk import Desk
from agents.playground.page import build_page
from textgen_env.models.table import TableModel
from textgen_env.rewards import Keywords
from textgen_env.vector_env import TextGenVectorEnv

HOSTILE = "<img src=x onerror=alert(1)>"
TOKENS = [" a", " b", f" {HOSTILE}", "<end>"]
TABLE = np.array([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.5, 0.2, 0.2, 0.1], [0.25] * 4])
"""Probabilities of the next token, a row for each token before."""


def make_desk() -> Desk:
    """Return a desk whose agent wants " b", and so the language model's greedy text differs from the agent's."""
    env = TextGenVectorEnv(
        2,
        TableModel(TOKENS, TABLE),
        [" a"],
        Keywords(words=["b"]),
        top_k=3,
        max_new_tokens=4,
        observation=LookaheadAgent.needs,
    )
    return Desk(env, LookaheadAgent(beta=0.1), "lookahead")


if __name__ == "__main__":
    build_page(make_desk()).launch(server_name="127.0.0.1", server_port=int(sys.argv[1]), quiet=True)
