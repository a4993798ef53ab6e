"""What the environment asks of a language model: slots that propose next tokens.

A ``LanguageModel`` is weights and a tokenizer, shared by all environments of a process.
``slots`` opens a batch of rows on it: each row holds one text and whatever the model caches for
it. ``start``, ``advance`` and ``fork`` only say which tokens a row holds; ``propose`` catches up
with all of them in one ragged forward, so rows that go on and rows that restart share a call.

    start / advance / fork  ->  token ids of each row  ->  propose  ->  Proposals (B, k)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MASKED_LOGPROB = -1e4
"""Stands for minus infinity: finite, so that bounds hold and 0 times it is 0."""


@dataclass(frozen=True)
class Proposals:
    """What may come next, for B rows, best first.

    candidates: (B, k) int32 token ids, sorted by log-probability, ties by smaller id.
        With ``k=None`` at ``slots``, k is the vocabulary size and column i is token id i.
    logprobs: (B, k) float32, nats, normalised over the whole vocabulary (without the end tokens
        where they were blocked); a blocked token has ``MASKED_LOGPROB``.
    hidden: (B, d) float32, the last hidden state that the model reads its logits from.
    """

    candidates: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    hidden: npt.NDArray[np.float32]


class Slots(ABC):
    """Rows of text on a language model. Rows are independent of their neighbours.

    ``rows`` is always an (B,) integer array of distinct row numbers.
    """

    rows: int
    length: int  # tokens a row can hold

    @abstractmethod
    def start(self, rows: npt.NDArray[np.int64], prompts: Sequence[Sequence[int]]) -> None:
        """Let each row hold its prompt and nothing else. No forward."""

    @abstractmethod
    def advance(self, rows: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> None:
        """Append one token id to each row. No forward."""

    @abstractmethod
    def fork(self, src: npt.NDArray[np.int64], dst: npt.NDArray[np.int64]) -> None:
        """Let row ``dst[i]`` hold what row ``src[i]`` holds, cache included: O(row), no forward."""

    @abstractmethod
    def propose(self, rows: npt.NDArray[np.int64], block_end: npt.NDArray[np.bool_]) -> Proposals:
        """Return what may come next in each row. At most one forward.

        Args:
            rows: (B,) which rows.
            block_end: (B,) True where end tokens must not be proposed.
        """

    @abstractmethod
    def save(self, row: int) -> Any:
        """Return a copy of one row (ids and cache) that later changes do not touch."""

    @abstractmethod
    def load(self, row: int, saved: Any) -> None:
        """Put back what ``save`` returned, into any row of slots of the same model."""

    @abstractmethod
    def rebuild(self) -> None:
        """Forget every memo and cached state but the token ids, as a resumed process must."""


class LanguageModel(ABC):
    """Weights and a tokenizer. Slots opened on it share them."""

    name: str
    vocab_size: int
    hidden_size: int
    embedding_size: int
    max_context: int  # tokens, prompt included
    end_ids: tuple[int, ...]  # tokens that end a text

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, with what the tokenizer puts in front of every text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens."""

    @abstractmethod
    def embed(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Return the input embedding of each token: ids of any shape to (..., embedding_size)."""

    @abstractmethod
    def slots(self, rows: int, length: int, k: int | None) -> Slots:
        """Open ``rows`` rows of up to ``length`` tokens that propose ``k`` candidates each.

        ``k=None`` proposes the whole vocabulary in id order.

        Raises:
            ConfigError: ``k`` is not in 1..vocab_size minus the end tokens, or ``length`` exceeds the context.
            CapacityError: the cache would not fit into memory (says how many bytes it needs).
        """

    @abstractmethod
    def continuations(self, prompt_ids: Sequence[int], ids: Sequence[int], candidates: Sequence[int]) -> list[str]:
        """Return, for each candidate token, the completion ``decode(ids + [candidate])``; cheap.

        ``prompt_ids`` is the context that ``ids`` continue (some tokenizers strip a leading space
        at the start of a text).
        """

    def extended(self, completion: str, token: int) -> str | None:
        """Return the completion once ``token`` is appended, or None where that takes the ids before it."""
        return None
