"""The state of N rows of text: their phases, and everything else besides their token ids."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from textgen_env.models.base import Rows


class Phase(IntEnum):
    """Where a row is in its life."""

    EMPTY = 0  # no episode: never begun, or given up after an error
    STALE = 1  # its tokens changed, its proposals are old
    READY = 2  # its proposals are of its tokens
    ENDED = 3


@dataclass
class RowStates:
    """The state of N rows besides their token ids, which ``Slots`` keeps: one array a field, row by row.

    Python objects (prompts, texts, the reward's running state) are immutable and sit in object
    arrays, so one indexing rule copies a row of any field.
    """

    token_logprobs: npt.NDArray[np.float32]  # (N, max_new_tokens) nats, of the chosen tokens
    phase: npt.NDArray[np.int8]  # (N,) Phase
    paid: npt.NDArray[np.float64]  # (N,) reward paid so far
    illegal: npt.NDArray[np.int64]  # (N,) masked actions that were mapped
    prompt: npt.NDArray[np.object_]  # (N,) Prompt
    completion: npt.NDArray[np.object_]  # (N,) text so far, kept where stop strings or scores need it
    score_state: npt.NDArray[np.object_]  # (N,) the running score's state
    candidates: npt.NDArray[np.int32]  # (N, k) token ids
    logprobs: npt.NDArray[np.float32]  # (N, k) nats
    legal: npt.NDArray[np.bool_]  # (N, k)
    hidden: npt.NDArray[np.float32]  # (N, d)
    score: npt.NDArray[np.float32]  # (N,)
    candidate_scores: npt.NDArray[np.float32]  # (N, k)
    continuations: npt.NDArray[np.object_]  # (N,) list of the k texts, or None

    @classmethod
    def empty(cls, rows: int, new: int, k: int, hidden: int) -> RowStates:
        prompt, completion, score_state, continuations = (np.full(rows, None, dtype=object) for _ in range(4))
        return cls(
            token_logprobs=np.zeros((rows, new), np.float32),
            phase=np.full(rows, Phase.EMPTY, np.int8),
            paid=np.zeros(rows, np.float64),
            illegal=np.zeros(rows, np.int64),
            prompt=prompt,
            completion=completion,
            score_state=score_state,
            candidates=np.zeros((rows, k), np.int32),
            logprobs=np.zeros((rows, k), np.float32),
            legal=np.ones((rows, k), np.bool_),
            hidden=np.zeros((rows, hidden), np.float32),
            score=np.zeros(rows, np.float32),
            candidate_scores=np.zeros((rows, k), np.float32),
            continuations=continuations,
        )

    def copy_rows(self, src: Rows, dst: Rows) -> None:
        for array in vars(self).values():
            array[dst] = array[src]

    def save(self, row: int) -> dict[str, Any]:
        return {name: copy.copy(array[row]) for name, array in vars(self).items()}

    def load(self, row: int, saved: dict[str, Any]) -> None:
        for name, array in vars(self).items():
            array[row] = saved[name]
