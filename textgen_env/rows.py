"""The state of N rows of text: phases and arrays, and a row that was saved.

Token ids are not here: ``Slots`` keeps them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from textgen_env.models.base import Rows

FINISH_REASONS = ("", "eos", "stop", "length", "turns", "partner")
"""Why a text ended; the first stands for one that goes on. The last two: a conversation's turns are used up, or its
partner has ended it."""


class Phase:
    """Where a row is in its life: small integers, which arrays compare faster than an enumeration."""

    EMPTY = 0  # no episode: never begun, or given up after an error
    STALE = 1  # its tokens changed, its proposals are old
    READY = 2  # its proposals are of its tokens
    ENDED = 3  # its text is whole and paid; no proposals


class RowStates:
    """The state of N rows: one array an attribute, row by row.

    Python objects (prompts, texts, the reward's running state) sit in object arrays, so one indexing
    rule copies a row of any attribute. They are replaced and never changed: rows that fork share them.

    Args:
        rows: N.
        new: Tokens behind a prompt at most, replies included.
        k: Candidates a step.
        hidden: Units of the model's hidden state.
    """

    def __init__(self, rows: int, new: int, k: int, hidden: int) -> None:
        self.token_logprobs = np.zeros((rows, new), np.float32)  # nats, of the chosen tokens
        self.phase = np.full(rows, Phase.EMPTY, np.int8)
        self.paid = np.zeros(rows, np.float64)  # reward paid so far
        self.illegal = np.zeros(rows, np.int64)  # masked actions that were mapped
        self.prompt = np.full(rows, None, object)  # Prompt
        self.completion = np.full(rows, None, object)  # text so far, kept where stop strings or scores need it
        self.score_state = np.full(rows, None, object)  # the running score's state
        self.candidates = np.zeros((rows, k), np.int32)  # token ids
        self.logprobs = np.zeros((rows, k), np.float32)  # nats
        self.legal = np.ones((rows, k), np.bool_)
        self.hidden = np.zeros((rows, hidden), np.float32)
        self.score = np.zeros(rows, np.float32)
        self.candidate_scores = np.zeros((rows, k), np.float32)
        self.continuations = np.full(rows, None, object)  # list of the k texts, or None

    def copy_rows(self, src: Rows, dst: Rows) -> None:
        for array in vars(self).values():
            array[dst] = array[src]

    def save(self, row: int) -> dict[str, Any]:
        return {name: copy.copy(array[row]) for name, array in vars(self).items()}

    def load(self, row: int, saved: dict[str, Any]) -> None:
        for name, array in vars(self).items():
            array[row] = saved[name]


@dataclass(frozen=True)
class Snapshot:
    """One row at one moment. Later steps do not touch it."""

    owner: object  # the ``Episodes`` it was taken in
    state: dict[str, Any]
    slot: Any
